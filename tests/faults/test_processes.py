"""Ctrl-C, closed output, processes that are killed, and two programs in one folder."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="two of the scripts need it")

from learning.checkpoints import load_checkpoint
from tests.faults.kill import COMMANDS, INFER, LEARN, ROOT, check_inference, ended, prepare
from tests.faults.long_run import hear_ctrl_c
from tests.test_training import same_training
from tissue import results
from tissue.manifest import MANIFEST

SCRIPTS = pytest.mark.parametrize("script", COMMANDS)
INTERRUPTS = 4  # of each script, in the tests
LOADERS_KILLED = 10


@pytest.fixture(scope="module")
def before():
    """What every script finds."""
    folder = Path(tempfile.mkdtemp(prefix="processes_"))
    (folder / "before").mkdir()
    prepare(folder / "before")
    yield folder / "before"
    shutil.rmtree(folder)


@pytest.fixture
def place(before):
    copy = shutil.copytree(before, before.parent / "place")
    yield copy
    shutil.rmtree(copy)


def start(place, argv, launcher=(sys.executable,)):
    name, *flags = argv
    return subprocess.Popen(
        [*launcher, str(ROOT / name), *flags], cwd=place, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=hear_ctrl_c,
    )  # fmt: skip


def end_of(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(found, process):
    while not found() and process.poll() is None:
        time.sleep(0.02)
    assert found(), process.communicate()


# --- Ctrl-C


def interrupt(place, argv, moment):
    """Ctrl-C after so many seconds of processor time: the exit code, and all that was said."""
    process = start(place, argv)
    clock = (~process.pid << 3) | 2  # Linux
    while process.poll() is None and time.clock_gettime(clock) < moment:
        time.sleep(0.002)
    with suppress(ProcessLookupError):  # where it was faster
        os.killpg(process.pid, signal.SIGINT)  # the loader's processes get it too
    return end_of(process)


@pytest.mark.slow
@SCRIPTS
def test_ctrl_c_at_any_moment_is_one_line(script, place):
    process = start(place, COMMANDS[script])
    clock, whole = (~process.pid << 3) | 2, 0.0
    process.stdout.close(), process.stderr.close()
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        whole = time.clock_gettime(clock)
        time.sleep(0.01)
    process.wait()
    generator = random.Random(script)
    for _ in range(INTERRUPTS):
        if script == "preprocess":  # so that there is work again
            (place / "data" / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(place / "results", ignore_errors=True)
        moment = generator.uniform(0.1, whole)  # Python itself starts within the first tenth
        code, out, err = interrupt(place, COMMANDS[script], moment)
        if code == 0:  # it had just done all
            assert err == ""
            continue
        name = COMMANDS[script][0]
        assert code == 130, (moment, err)
        is_saved = err == "" and "stopped by SIGINT; go on with" in out
        assert is_saved or err == f"{name}: stopped\n", (moment, err)


def interrupted_by_import(module, name, begin):
    """Ctrl-C when a module comes, late in what is imported: the exit code, and what was said."""
    code = f"""
import os, signal, sys
class Late:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Late())
sys.argv = ["{name}"]
{begin}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    return done.returncode, done.stderr


@SCRIPTS
def test_ctrl_c_while_a_script_imports_is_one_line(script, tmp_path):
    module = "concurrent.futures" if script == "preprocess" else "torch.utils.data"
    begin = "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    found = interrupted_by_import(module, ROOT / f"{script}.py", begin)
    assert found == (130, f"{script}.py: stopped\n")


def test_a_console_command_ends_so_too():
    found = interrupted_by_import(
        "cv2", "nuclei-preprocess", "import commands; commands.preprocess()"
    )
    assert found == (130, "nuclei-preprocess: stopped\n")


def test_where_ctrl_c_is_ignored_it_stays_so():
    """As in the background of a shell script."""
    code = "import signal; from tissue import ending; ending.end_at_once(); ending.raise_again(); "
    code += "print(signal.getsignal(signal.SIGINT))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert done.stdout.strip() == str(signal.Handlers.SIG_IGN)


# --- output that nobody reads

SPEAK = """
import sys
from tissue.files import run_script
def main(args):
    for line in range(100_000):
        print("line", line, flush=True)
    open(sys.argv[1], "w").write("whole")
run_script(main, lambda: None)
"""


@pytest.mark.parametrize("shell", ["{} | head -1", "{} >&-", "{} 2>&- | head -1"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_script_whose_output_is_closed_goes_on(shell, unbuffered, tmp_path):
    (tmp_path / "speak.py").write_text(SPEAK)
    command = shell.format(f"{sys.executable} speak.py done.txt")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "done.txt").read_text() == "whole"


@pytest.mark.slow
def test_a_training_whose_output_is_closed_is_whole(place):
    process = start(place, LEARN)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 0, process.stderr.read()
    assert process.stderr.read() == ""
    (last,) = place.glob("log/*/last.pt")
    assert load_checkpoint(last)["training"]["progress"]["finished"]
    assert "best validation Dice" in (last.parent / "train.log").read_text()


# What a loader process has of its own, MiB, once Python has looked through all objects there.
OWN = """
import gc, os, sys
import train

def measured(*_):
    child = os.fork()
    if child == 0:
        gc.collect()
        with open("/proc/self/smaps_rollup") as file:
            line = next(line for line in file if line.startswith("Private_Dirty"))
        print("own", int(line.split()[1]) / 1024, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    sys.exit(0)

train.Run = measured
train.main(train.parse_args(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no /proc")
def test_a_loader_process_does_not_copy_what_the_training_has(place):
    out = subprocess.run(
        [sys.executable, "-c", OWN, *LEARN[1:]], cwd=place, capture_output=True, text=True,
        check=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    assert float(out.split("own ")[1]) < 40  # 115 before, which grew by the hour


# --- processes that are killed, and others in the same folder


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_where_a_rank_is_killed_the_others_end_and_the_run_goes_on(rank, place):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node=2", "--"]
    undisturbed = start(place, [*LEARN, "--log", "whole"], torchrun)
    assert end_of(undisturbed)[0] == 0
    process = start(place, LEARN, torchrun)
    wait_for(lambda: list(place.glob("log/*/last.pt")), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {
        child: f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for child in children
    }
    os.kill(int(next(child for child, is_it in ranks.items() if is_it)), signal.SIGKILL)
    killed = time.monotonic()
    code, _, err = end_of(process)
    assert code != 0 and time.monotonic() - killed < 60
    assert "train.py: another process of this training has ended" in err
    assert 'train.py", line' not in err, "a traceback of ours"
    assert ended(process.pid)
    code, _, err = end_of(start(place, ["train.py", "--log", "log", "--resume"], torchrun))
    assert code == 0, err
    same_training(*(next(place.glob(f"{log}/*")) for log in ("log", "whole")))


@pytest.mark.slow
def test_a_loader_process_killed_at_any_moment_is_one_line(place):
    """Torch tells of one in the middle of whatever is being done, be it last.pt."""
    generator = random.Random("loader")
    for _ in range(LOADERS_KILLED):
        process = start(place, [*LEARN, "--epoch", "500", "--workers", "2"])
        wait_for(lambda: list(place.glob("log/*/last.pt")), process)
        time.sleep(generator.uniform(0, 1))
        loaders = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(generator.choice(loaders)), signal.SIGKILL)
        code, _, err = end_of(process)
        assert code == 2 and err.count("\n") == 1 and "killed from outside" in err, err
        load_checkpoint(next(place.glob("log/*/last.pt")))
        shutil.rmtree(place / "log")


# A training that is killed between the birth of its last loader process and the end of that one's
# beginning, which torch's own watch does not see.
KILLED_EARLY = """
import os, signal, time
from torch.utils.data import DataLoader
from learning.signals import begin_loader

def late(worker, training=os.getpid()):
    if worker == 1:
        os.kill(training, signal.SIGKILL)
    while os.getppid() == training:
        time.sleep(0.01)
    begin_loader(worker)

next(iter(DataLoader(range(4), num_workers=2, worker_init_fn=late)))
"""


def test_loader_processes_end_with_a_training_that_is_killed_as_they_begin():
    training = subprocess.Popen(
        [sys.executable, "-c", KILLED_EARLY], cwd=ROOT, start_new_session=True
    )
    assert training.wait(timeout=60) == -signal.SIGKILL
    assert ended(training.pid), os.killpg(training.pid, signal.SIGKILL)


@pytest.mark.slow
def test_two_trainings_in_one_second_have_a_folder_each(place):
    both = [start(place, LEARN) for _ in range(2)]
    assert [end_of(process)[0] for process in both] == [0, 0]
    one, other = sorted((place / "log").iterdir())
    same_training(one, other)


@pytest.mark.slow
def test_two_inferences_into_one_folder_leave_no_wrong_file(before, place):
    """One may be refused, or both work: what a record says of a file is so in the end."""
    after = shutil.copytree(before, before.parent / "after")
    assert end_of(start(after, COMMANDS["inference"]))[0] == 0
    both = [start(place, COMMANDS["inference"]), start(place, [*INFER, "0.4", "--overwrite"])]
    ends = [end_of(process) for process in both]
    for code, _, err in ends:
        assert code == 0 or (code == 2 and err.count("\n") == 1), err
    assert 0 in [code for code, _, _ in ends]
    check_inference(place, before, after)
    finished, _ = results.finished(place / "results")
    assert len(finished) == 4
