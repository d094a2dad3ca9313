"""The house keeps its order: who imports whom, and no room that one cannot see at a glance."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = ("preprocess", "train", "inference")
MAY_IMPORT = {  # by room; a room's files may import each other
    "commands": {"tissue"},
    "doctor": {"scripts", "learning", "tissue"},
    "tasks": set(),
    "scripts": {"learning", "utils", "model", "tissue"},
    "learning": {"utils", "model", "tissue"},
    "utils": {"model", "tissue"},
    "model": {"tissue"},
    "tissue": set(),
}
OURS = {*MAY_IMPORT, *SCRIPTS, "benchmarks", "experiments", "tools", "tests"} - {"scripts"}
MOST_LINES, MOST_LINES_A_FUNCTION, MOST_PARAMETERS = 400, 60, 6
LONG = {"tissue/synthetic.py"}  # draws tissue, and may be as long as it likes


def room_of(name):
    return "scripts" if name in SCRIPTS else name


FILES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.py", "learning/*.py", "tissue/*.py")
    for path in REPOSITORY.glob(pattern)
)


def tree_of(file):
    return ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))


def imports_of(tree):
    """The first names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import that is relative"
            found.add(node.module.partition(".")[0])
    return found


def functions_of(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters_of(function):
    """How many parameters a function has, `self` and `cls` not counted."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [a.arg for a in (given.vararg, given.kwarg) if a]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_every_file_is_in_a_room():
    assert {room_of(Path(file).parts[0].removesuffix(".py")) for file in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("file", FILES)
def test_imports_go_one_way(file):
    room = room_of(Path(file).parts[0].removesuffix(".py"))
    inside = {room} if room in ("learning", "tissue") else set()
    ours = {room_of(name) for name in imports_of(tree_of(file)) & OURS}
    assert ours <= MAY_IMPORT[room] | inside


@pytest.mark.parametrize("room", ["learning", "tissue"])
def test_files_of_a_room_do_not_import_each_other_in_circles(room):
    imports = {}
    for file in FILES:
        if file.startswith(f"{room}/"):
            froms = [n for n in ast.walk(tree_of(file)) if isinstance(n, ast.ImportFrom)]
            names = {f"{n.module}.{alias.name}" for n in froms for alias in n.names}
            names |= {n.module for n in froms}
            paths = {"/".join(name.split(".")[:2]) + ".py" for name in names}
            imports[file] = paths & set(FILES)
    TopologicalSorter(imports).prepare()  # raises CycleError


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("tissue/")])
def test_the_image_side_does_without_torch(file):
    torch = {"torch", "torchvision", "timm", "albumentations", "tensorboard"}
    assert not imports_of(tree_of(file)) & torch


@pytest.mark.parametrize("file", [file for file in FILES if file not in LONG])
def test_no_file_is_too_long(file):
    assert len((REPOSITORY / file).read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("file", FILES)
def test_no_function_is_too_long_or_takes_too_much(file):
    functions = functions_of(tree_of(file))
    first = {f: min(n.lineno for n in (f, *f.decorator_list)) for f in functions}
    long = {f.name: f.end_lineno - first[f] + 1 for f in functions}
    assert {name: lines for name, lines in long.items() if lines > MOST_LINES_A_FUNCTION} == {}
    many = {f.name: parameters_of(f) for f in functions}
    assert {name: count for name, count in many.items() if count > MOST_PARAMETERS} == {}


@pytest.mark.parametrize("file", FILES)
def test_nothing_runs_on_import(file):
    """Beside definitions a module only sets up what its definitions need."""
    for node in tree_of(file).body:
        is_call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        what = ast.unparse(node)
        assert not is_call or what.startswith("os.environ.setdefault("), what
        assert not isinstance(node, ast.For | ast.While | ast.With), what
