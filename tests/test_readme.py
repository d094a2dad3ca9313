"""Every command of README runs; README and docs name no script and no flag that is not there."""

import contextlib
import importlib
import inspect
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import venv
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

pytest.importorskip("torch")

import tasks
from tests.scripts import REPOSITORY, infer, table_of
from tissue.synthetic import write_demo

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *REPOSITORY.glob("docs/*.md")]
PAGES = sorted({*PAGES} - {REPOSITORY / "docs" / "lab_notes.md"})  # which has commands of its days
PROGRAMS = "python|python3|make|pip|source|tensorboard|torchrun|nuclei-preprocess|nuclei-train"
PROGRAMS += "|nuclei-infer|nuclei-doctor"  # what begins inline code that is a whole command
ADDED = {  # to commands that take long as they stand
    "python3 train.py": "--dimensions 8 --epoch 1",  # 50 epochs at width 64
    "python3 train.py --init log/ckpt/nuclei.pt": "--epoch 1",
    "pip install -e .": "--no-deps --no-build-isolation",  # all is there, and maybe no network
    "nuclei-preprocess": "--help",  # the scripts run by their own names
    "nuclei-train": "--help",
    "nuclei-infer": "--help",
    "nuclei-doctor": "--help",
}
STANDS_FOR = {"IMAGES": "my_folder", "MASKS": "my_masks", "NAME": "mine"}
WRITTEN = {  # by each script, wherever README calls it
    "preprocess.py": ["data/patches_preview.png", "data/patches.csv"],
    "train.py": ["log/*/best.pt"],
    "inference.py": ["RESULTS/report.html", "RESULTS/counts.csv"],
    "tools.demo_picture": ["docs/demo.png"],
}
# A table of README: what each image has in its folder of results.
OF_EACH_IMAGE = re.findall(r"^\| `<name>(_\S+)` \|", README, re.MULTILINE)
ELSEWHERE = {"pip", "venv", "pytest", "ruff"}  # modules of others
FLAGS_OF_OTHERS = {"--nproc_per_node", "--build-arg", "--help", "--logdir"}


def code_of(text):
    """(whether it is a block, code) of all code of a page, in its order."""
    for block, inline in re.findall(r"^```\w*\n(.*?)^```|`([^`\n]+)`", text, re.DOTALL | re.M):
        yield bool(block), (block or inline).replace("\\\n", "")


def commands_of(text):
    """All lines of blocks that do not show where data lie, and inline code that is a command."""
    found = []
    for is_block, code in code_of(text):
        lines = [re.sub(r"\s+# .*", "", line) for line in code.splitlines()]
        if is_block:
            found += [line for line in lines if line and not line.startswith("data/")]
        elif re.match(rf"(?:{PROGRAMS})(?: |$)", code):
            found += lines
    return list(dict.fromkeys(found))


# --- README's commands, as they stand


@pytest.fixture
def tree(tmp_path):
    """A clone with an environment of its own that has this one's packages, and a user's data."""
    tree = tmp_path / "clone"
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY, text=True)
    for name in filter(None, tracked.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, tree / name)
    venv.create(tree / ".venv", symlinks=True)
    own = tree / ".venv" / "bin"
    packages = next((tree / ".venv").glob("lib/*/site-packages"))
    (packages / "others.pth").write_text("\n".join(p for p in sys.path if "-packages" in p))
    (own / "pip").write_text('#!/bin/sh\nexec python3 -m pip "$@"\n')  # installs there, not here
    (own / "pip").chmod(0o755)
    for program in Path(sys.executable).parent.iterdir():
        if not (own / program.name).exists() and not program.name.startswith("pip"):
            (own / program.name).symlink_to(program)
    write_demo(tmp_path / "drawn", 6, 256)  # with patches for a batch at stride 64
    for folder, mine in (("tissue_images", "my_folder"), ("mask binary", "my_masks")):
        (tree / mine).mkdir()
        (tree / "data" / folder).mkdir()
        for path in (tmp_path / "drawn" / folder).iterdir():
            name = path.name.removeprefix("Demo_")  # Liver_01 to Kidney_03
            shutil.copy(path, tree / "data" / folder / name)
            shutil.copy(path, tree / mine / f"Field_{name}")
    shutil.copy(tree / "my_folder" / "Field_Liver_01.tif", tree / "my_image.tif")
    return tree


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the commands are a shell's")
def test_every_command_of_readme_runs_and_leaves_what_readme_says(tree):
    for command in commands_of(README):
        began = time.time_ns()
        if command.startswith("make"):
            make(tree, command)
        elif command.startswith("tensorboard"):
            open_tensorboard(tree, command)
        else:
            if "--resume" in command:
                stop_a_training(tree)
            call(tree, f"{command} {ADDED.get(command, '')}")
        for script, patterns in WRITTEN.items():
            if f" {script}" in command:
                check_written(tree, command, patterns, began)
        if "--resume" in command:
            assert len(table_of(newest(tree, "metrics.csv"))) == 9


def call(tree, command):
    """Run a command in the clone's environment and return what it prints."""
    for word, meant in STANDS_FOR.items():
        command = re.sub(rf"\b{word}\b", meant, command)
    if "<run>" in command:
        command = command.replace("<run>", newest(tree, "best.pt").parent.name)
    done = subprocess.run(
        ["bash", "-c", command], cwd=tree, env=environment(tree), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(tree):
    """That of a user who has called `source .venv/bin/activate`; pytest names tests, runs none."""
    others = "PYTHON", "PYTEST", "PIP", "MAKE", "MFLAGS"  # make prints more within make
    found = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    found["PATH"] = f"{tree / '.venv' / 'bin'}{os.pathsep}{found['PATH']}"
    return found | {"PYTEST_ADDOPTS": "--collect-only --ignore-glob=*/test_[!w]*"}


def newest(tree, name):
    return max((tree / "log").glob(f"*/{name}"))


def make(tree, command):
    """Look what make would do, and do what it comes to once all is installed; of the demo smaller
    data are there, which it would otherwise draw, cut and learn for minutes.
    """
    recipe = call(tree, f"make -n {command.removeprefix('make')}")
    if command == "make":
        assert "pip install" in recipe and "tasks" not in recipe
        return
    if command == "make demo":
        demo = tree / "data" / "demo"
        write_demo(demo, 27, 128)
        images = [demo / "tissue_images" / f"Demo_{o}_03.tif" for o in ("Liver", "Colon", "Breast")]
        infer(tree / "results" / "demo", "--images", *images, "--masks", demo / "mask binary")
    task = recipe.splitlines()[-1].removeprefix(".venv/bin/")
    assert re.fullmatch(r"python -m tasks [\w-]+", task)
    if task not in commands_of(README):  # which comes to its turn
        call(tree, task)


def stop_a_training(tree):
    """Ctrl-C after the first epoch of nine."""
    command = "exec python3 train.py --dimensions 8 --epoch 9 --name stopped"
    with subprocess.Popen(
        ["bash", "-c", command], cwd=tree, env=environment(tree), stdout=subprocess.PIPE, text=True
    ) as training:
        for line in training.stdout:
            if line.startswith("epoch "):
                training.send_signal(signal.SIGINT)
    assert training.returncode == 130
    assert len(table_of(newest(tree, "metrics.csv"))) < 9


def open_tensorboard(tree, command):
    with subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=tree, env=environment(tree),
        stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            for line in server.stderr:
                if address := re.search(r" at (http://\S+)", line):
                    with urllib.request.urlopen(f"{address[1]}data/runs", timeout=60) as answer:
                        runs = answer.read().decode()
                    break
        finally:
            server.terminate()
    assert newest(tree, "best.pt").parent.name in runs


def check_written(tree, command, patterns, began):
    """Files of these patterns are there and were written by the command."""
    folder = re.search(r"--image_folder (\S+)|$", command)[1] or "results"
    folder = folder.replace("NAME", STANDS_FOR["NAME"])
    if "inference.py" in command:
        assert len(OF_EACH_IMAGE) == 5
        patterns = patterns + [f"RESULTS/*{ending}" for ending in OF_EACH_IMAGE]
    for pattern in patterns:
        found = tree.glob(pattern.replace("RESULTS", folder))
        assert any(path.stat().st_mtime_ns >= began for path in found), f"{command}: {pattern}"


# --- the scripts and flags that all pages name


def calls_of(code):
    """[module, argument, ...] of each call of Python, or by torchrun, in lines of a shell."""
    for line in code.splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        words.whitespace_split = True
        try:
            words = [*words, ";"]
        except ValueError:  # a quote in what is no command
            continue
        call, before = [], ""
        for word in words:
            if word in (";", "&&", "||", "|"):
                yield from [call] if call else []
                call = []
            elif re.match("python3? ", word):  # a command that is one word of another
                yield from calls_of(word)
            elif call:
                call += [re.sub(r"\$\w+", "1", word)] if word != "$@" else []
            elif before == "-m" or (before in ("python3", "--") and word.endswith(".py")):
                call = [word.removesuffix(".py").replace("/", ".")]
            before = word


CODE = {
    page.relative_to(REPOSITORY).as_posix(): [*code_of(page.read_text(encoding="utf-8"))]
    for page in PAGES
}
CALLS = {(page, *call) for page in CODE for _, code in CODE[page] for call in calls_of(code)}
CALLS = sorted(call for call in CALLS if call[1].partition(".")[0] not in ELSEWHERE)


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_what_pages_call_is_there_and_knows_its_flags(call, tmp_path, monkeypatch):
    _, name, *arguments = call
    module = module_of(name)
    monkeypatch.chdir(tmp_path)
    if hasattr(module, "parse_args"):
        with suppress(FileNotFoundError) if "--resume" in arguments else nullcontext():
            module.parse_args(arguments)
    elif name == "tasks":
        assert f"python -m tasks {arguments[0]} " in tasks.__doc__
    elif arguments:
        assert {word for word in arguments if word.startswith("--")} <= flags_of(module)


def test_every_flag_that_pages_name_is_one_of_a_script():
    known = set().union(*(flags_of(module_of(name)) for name in {call[1] for call in CALLS}))
    for page, parts in CODE.items():
        inline = " ".join(code for is_block, code in parts if not is_block)
        named = set(re.findall(r"(?<!\S)--[a-z][\w-]+", inline))
        assert named <= known | FLAGS_OF_OTHERS, page


def module_of(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = error.name.partition(".")[0]
        assert not [*REPOSITORY.glob(top), *REPOSITORY.glob(f"{top}.py")], error
        pytest.skip(f"{name} needs {error.name}")


def flags_of(module):
    """The flags that a module's --help shows."""
    show = getattr(module, "parse_args", None) or getattr(module, "main", None)
    if module is tasks or not show or not inspect.signature(show).parameters:
        return set()
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        show(["--help"])
    return set(re.findall(r"(?:^ +|, )(--[\w-]+)", shown.getvalue(), re.MULTILINE))
