"""The console commands of an installation: nuclei-preprocess, nuclei-train, nuclei-infer
and nuclei-doctor.

Each is its script, with the same flags: `nuclei-train --help` says what `train.py --help` says.
"""

from importlib import import_module

from tissue.files import run_script


def preprocess() -> None:
    _run("preprocess")


def train() -> None:
    _run("train")


def infer() -> None:
    _run("inference")


def doctor() -> None:
    _run("doctor")


def _run(name):
    script = import_module(name)  # not above: cutting patches does not wait for torch
    run_script(script.main, script.parse_args)
