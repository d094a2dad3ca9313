"""The console commands of an installation: nuclei-preprocess, nuclei-train, nuclei-infer
and nuclei-doctor.

Each is its script, with the same flags: `nuclei-train --help` says what `train.py --help` says.
"""

from importlib import import_module

from tissue import ending


def preprocess() -> None:
    _run("preprocess")


def train() -> None:
    _run("train")


def infer() -> None:
    _run("inference")


def doctor() -> None:
    _run("doctor")


def _run(name):
    ending.end_at_once()  # Ctrl-C while all else is imported
    script = import_module(name)  # not above: cutting patches does not wait for torch
    from tissue.files import run_script

    run_script(script.main, script.parse_args)
