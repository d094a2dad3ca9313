"""A disk that is full, read-only, another's or gone: one line with what to do, nothing lost."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="two of the scripts need it")

from learning.runs import make_run_folder
from tests.faults.kill import COMMANDS, ROOT, files_of, is_hidden, open_whole, prepare
from tests.scripts import fingerprint
from tissue.files import InputError, named, replacing

OUTPUT = {"preprocess": "data", "train": "log", "inference": "results"}
SCRIPTS = pytest.mark.parametrize("script", COMMANDS)
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("mount"),
    reason="mounts file systems, or runs as another user",
)


def mount(*arguments):
    if subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")


@pytest.fixture(scope="module")
def before():
    """What every script finds, in a place that any user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="disk_"))
    folder.chmod(0o755)
    (folder / "before").mkdir()
    prepare(folder / "before")
    yield folder / "before"
    shutil.rmtree(folder)


@pytest.fixture
def place(before):
    """A copy of it."""
    copy = shutil.copytree(before, before.parent / "place")
    (copy / "log").mkdir()
    yield copy
    subprocess.run(["umount", "-q", *(copy / name for name in OUTPUT.values())], check=False)
    shutil.rmtree(copy)


def start(script, place, without_rights=False):
    """Start a script; `without_rights` root has no more of them than any user."""
    name, *flags = COMMANDS[script]
    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    return subprocess.Popen(
        [*(drop if without_rights else []), sys.executable, ROOT / name, *flags], cwd=place,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def refusal(process):
    """The one line in which a script says that it cannot go on, or one for each image and how many
    they are.
    """
    _, err = process.communicate(timeout=300)
    assert process.returncode in (2, 3) and "Traceback" not in err, err
    *lines, last = err.splitlines()
    if process.returncode == 3:
        assert last == f"{len(lines)} image{'s' * (len(lines) > 1)} failed", err
        assert all("make room" in line or "is the disk full?" in line for line in lines), err
    else:
        assert not lines, err
    return err


def all_whole(folder):
    files = files_of(folder)
    for path in files.values():
        open_whole(path)
    assert not [name for name in files if is_hidden(name)]


@pytest.mark.slow
@needs_root
@SCRIPTS
@pytest.mark.parametrize("room", [0, 30])  # KiB
def test_a_full_disk(script, room, place):
    """What is on it before stays, but for results that are redone with another threshold."""
    output, kept = place / OUTPUT[script], place / "kept"
    shutil.copytree(output, kept)
    there = [path for path in kept.rglob("*") if path.is_file()]
    used = sum(-(-path.stat().st_size // 4096) * 4 for path in there) + 4
    mount("-t", "tmpfs", "-o", f"size={used + room}k", "tmpfs", output)
    shutil.copytree(kept, output, dirs_exist_ok=True)
    was = fingerprint(output)
    said = refusal(start(script, place))
    assert "make room" in said or "is the disk full?" in said
    all_whole(output)
    if script != "inference":
        assert was.items() <= fingerprint(output).items()


@pytest.mark.slow
@needs_root
@SCRIPTS
def test_a_disk_that_is_read_only(script, place):
    output = place / OUTPUT[script]
    was = fingerprint(output)
    mount("--bind", output, output)
    mount("-o", "remount,ro,bind", output)
    said = refusal(start(script, place))
    assert "Read-only file system; choose" in said and OUTPUT[script] in said
    assert fingerprint(output) == was


@pytest.mark.slow
@needs_root
@SCRIPTS
def test_a_folder_of_another_user(script, place):
    output = place / OUTPUT[script]
    was = fingerprint(output)
    for path in (output, *output.rglob("*")):
        os.chown(path, 65534, 65534)
    said = refusal(start(script, place, without_rights=True))
    assert "Permission denied; ask its owner" in said and OUTPUT[script] in said
    assert fingerprint(output) == was


@pytest.mark.slow
@SCRIPTS
def test_a_folder_that_is_removed_under_a_running_script(script, place):
    output = place / OUTPUT[script]
    begun = {"preprocess": "*/*/*", "train": "*/last.pt", "inference": ".*.part"}[script]
    known = set(output.glob(begun))
    process = start(script, place)
    while not set(output.glob(begun)) - known and process.poll() is None:
        time.sleep(0.005)
    while output.is_dir():
        shutil.rmtree(output, ignore_errors=True)
    said = refusal(process)
    assert "give the command again" in said or "found" in said or "could not be written" in said


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "inference"])
@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_a_file_in_the_place_of_the_folder(script, kind, place):
    output = place / OUTPUT[script]
    shutil.rmtree(output)
    if kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to("nowhere")
    said = refusal(start(script, place))
    assert re.search("found a (file|link that leads nowhere).*expected a folder", said)
    assert output.read_text() == "mine" if kind == "file" else output.is_symlink()


@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_a_log_that_cannot_be_a_folder_is_not_waited_for(kind, tmp_path):
    log = tmp_path / "log"
    log.write_text("mine") if kind == "file" else log.symlink_to("nowhere")
    with pytest.raises(InputError, match=r"--log: found a file or a broken link, .*log"):
        make_run_folder(log, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_error_of_the_disk_names_the_file_and_what_to_do(tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text("old")
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left.*; make room.*counts\.csv"), replacing(path):
        full.write(b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    gone = tmp_path / "gone" / "counts.csv"
    said = r"give the command again: '.*gone/counts\.csv'"
    with pytest.raises(FileNotFoundError, match=said), replacing(gone):
        pass


def test_an_error_is_told_once_and_by_its_own_file(tmp_path):
    missing = tmp_path / "a.tif"
    with pytest.raises(FileNotFoundError) as error, named(tmp_path), named("other"):
        missing.read_bytes()
    assert str(error.value).count("give the command again") == 1
    assert error.value.filename == str(missing)


def test_other_errors_are_as_they_were():
    with pytest.raises(IsADirectoryError) as error, named("a"):
        open("/").close()
    assert "choose" not in str(error.value)
