"""The project as it is installed: its commands, its packages, and the versions it says it takes."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import commands
import tasks

REPOSITORY = Path(__file__).parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_each_console_command_can_be_called():
    pytest.importorskip("torch", reason="two of the scripts need it")
    found = PROJECT["project"]["scripts"]
    assert sorted(found) == ["nuclei-doctor", "nuclei-infer", "nuclei-preprocess", "nuclei-train"]
    for target in found.values():
        module, function = target.split(":")
        assert module in PROJECT["tool"]["setuptools"]["py-modules"]
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    ("command", "script"),
    [("preprocess", "preprocess"), ("train", "train"), ("infer", "inference")],
)
def test_a_console_command_is_its_script(command, script, monkeypatch, capsys):
    if command != "preprocess":
        pytest.importorskip("torch")
    monkeypatch.setattr(sys, "argv", [f"nuclei-{command}", "--no_such_flag"])
    with pytest.raises(SystemExit) as exit_:
        getattr(commands, command)()
    assert exit_.value.code == 2
    assert "--no_such_flag" in capsys.readouterr().err
    assert importlib.import_module(script).parse_args([])  # the script's own flags, all with values


def test_all_that_the_commands_import_is_installed():
    """The modules and packages of pyproject.toml are those that import one another."""
    setup = PROJECT["tool"]["setuptools"]
    ours = {path.stem for path in REPOSITORY.glob("*.py")}
    ours |= {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    installed = {*setup["py-modules"], *setup["packages"]}
    files = [REPOSITORY / f"{name}.py" for name in setup["py-modules"]]
    files += [path for name in setup["packages"] for path in (REPOSITORY / name).glob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            needed = {name.partition(".")[0] for name in names} & ours
            assert needed <= installed, file
    pages = {path.suffix for path in (REPOSITORY / "tissue").iterdir() if path.is_file()} - {".py"}
    assert pages == {pattern.removeprefix("*") for pattern in setup["package-data"]["tissue"]}


def test_version_and_dependencies_are_told_in_one_place_each():
    dynamic = PROJECT["tool"]["setuptools"]["dynamic"]
    assert not {"version", "dependencies", "optional-dependencies"} & PROJECT["project"].keys()
    module, _, name = dynamic["version"]["attr"].rpartition(".")
    tree = ast.parse((REPOSITORY / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    (version,) = (
        node.value.value  # a literal: an installation need not import torch to read it
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()
    for file in (dynamic["dependencies"]["file"], dynamic["optional-dependencies"]["dev"]["file"]):
        lines = (REPOSITORY / file).read_text().splitlines()
        assert not [line for line in lines if line.startswith("-")]  # setuptools follows no -r


def test_the_versions_of_python_are_the_same_everywhere():
    least, beyond = re.fullmatch(
        r">=3\.(\d+),<3\.(\d+)", PROJECT["project"]["requires-python"]
    ).groups()
    most = int(beyond) - 1
    makefile = (REPOSITORY / "Makefile").read_text()
    assert f"(3, {least}) <= v <= (3, {most})" in makefile
    assert f"3.{least} to 3.{most} expected" in makefile
    for file in ("requirements.txt", "README.md"):
        assert f"Python 3.{least} to 3.{most}" in (REPOSITORY / file).read_text()
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py3{least}"


def test_patches_are_cut_without_torch(root):
    """The image side imports none of it, so that it runs where there is none."""
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('torch', 'torchvision', 'albumentations', 'timm'))\n"
        "import commands\n"
        "commands.preprocess()\n"
    )
    flags = ["--root", root, "--patch_dim", "32", "--val_pattern", "*04"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, flags)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (root / "patches.json").is_file() and "patches" in done.stdout


def needs_torch(file):
    """Whether a test file imports what has torch, itself or by another test file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = (REPOSITORY / f"{name.replace('.', '/')}.py" for name in names if name[:6] == "tests.")
    others = [path for path in paths if path.is_file()]
    has_torch = {"torch", "train", "inference", "model", "utils", "learning", "doctor"}
    has_torch |= {"benchmarks", "experiments", "tools"}
    return bool({name.partition(".")[0] for name in names} & has_torch) or any(
        map(needs_torch, others)
    )


def test_the_image_side_has_all_tests_that_need_no_torch():
    files = sorted((REPOSITORY / "tests").glob("test_*.py"))
    without = [file.stem.removeprefix("test_") for file in files if not needs_torch(file)]
    assert list(tasks.IMAGE_SIDE) == without


def test_the_demo_is_the_three_scripts_and_is_not_done_twice(tmp_path, monkeypatch, capsys):
    scripts = []

    def run(command, cwd, **_):
        scripts.append(command[1] if command[1] != "-m" else command[2])
        if scripts[-1] == "train.py":
            (cwd / "log" / "20260102-demo").mkdir(parents=True)
            (cwd / "log" / "20260101-demo").mkdir()
        if scripts[-1] == "inference.py":
            assert command[command.index("--ckpt") + 1].endswith("20260102-demo")  # the newest
            (cwd / "results" / "demo").mkdir(parents=True)
            (cwd / "results" / "demo" / "report.html").touch()
        return subprocess.CompletedProcess(command, 0)

    (tmp_path / "tissue").mkdir()
    (tmp_path / "tissue" / "nuclei.py").touch()
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        tasks.main(["demo"])
        assert scripts == ["tissue.synthetic", "preprocess.py", "train.py", "inference.py"]
        assert "results/demo/report.html" in capsys.readouterr().out


def test_a_task_that_is_none_says_which_there_are(capsys):
    for arguments in ([], ["tests"], ["test", "lint"]):
        with pytest.raises(SystemExit) as exit_:
            tasks.main(arguments)
        assert "python -m tasks demo" in str(exit_.value)


def test_a_task_ends_with_the_code_of_the_command_that_fails(monkeypatch):
    called = []

    def run(command, **_):
        called.append(command[1:])
        return subprocess.CompletedProcess(command, 3 if "format" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tasks.main(["test"])
    *first, programs, _, what = called.pop()
    assert first == ["-m", "pytest", "-q", "-n"] and 1 <= int(programs) <= 4 and what == "not slow"
    with pytest.raises(SystemExit) as exit_:
        tasks.main(["lint"])
    assert exit_.value.code == 3 and len(called) == 2
