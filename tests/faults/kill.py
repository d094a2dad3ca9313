"""Kill each script at random moments, and see what is left: `python -m tests.faults.kill`.

    python -m tests.faults.kill --kills 50              (of each script; 150 in all)
    python -m tests.faults.kill --only train --first 17 --kills 1

A moment is a share of the processor time that the undisturbed run takes, drawn by script, seed and
number. A fifth of the runs are new programs, killed while they import too; the others are forked
from this one, which has imported all, so that most moments fall where files are written.

After each kill, no file may be there that a reader takes for whole and is not: every one is opened
by an independent reader and by the project's own, and is the one from before or the new one. The
same command again (of a training that was saved, --resume) must end well, with the files of the
undisturbed run, and no process may be left.
"""

import argparse
import csv
import importlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import cv2
import tifffile
import torch
from PIL import Image

from learning import runs
from learning.checkpoints import load_checkpoint
from tests.test_training import same, same_training
from tissue import results
from tissue.files import LOCK, run_script
from tissue.manifest import MANIFEST, SPLITS
from tissue.patches import PatchDataset
from tissue.synthetic import write_demo

ROOT = Path(__file__).parents[2]
OF_TIME = {"seconds", "patches_per_second"}  # what differs from run to run
CUT = ["preprocess.py", "--root", "data", "--patch_dim", "32", "--patch_stride"]
LEARN = ["train.py", "--root", "data", "--log", "log", "--gpu_id", "-1", "--dimensions", "2"]
LEARN += ["--epoch", "4", "--batch_size", "16", "--workers", "1"]
INFER = ["inference.py", "--images", "data/tissue_images", "--masks", "data/mask binary"]
INFER += ["--ckpt", "net.pt", "--image_folder", "results", "--gpu_id", "-1", "--export"]
INFER += ["--threshold"]
COMMANDS = {"preprocess": [*CUT, "16"], "train": LEARN, "inference": [*INFER, "0.5"]}


# --- running and killing


def run(folder: Path, argv: list[str], warm: bool = True, moment: float = float("inf")) -> tuple:
    """Run a script in `folder`, killed after `moment` seconds of processor time: its exit code,
    -9 where it was killed, the seconds that it took, and its group of processes.
    """
    sys.stdout.flush()
    process = os.fork()
    if not process:
        begin(folder, argv, warm)
    clock, spent = (~process << 3) | 2, 0.0  # Linux: the processor time of another process
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), spent, process
        spent = max(spent, time.clock_gettime(clock))
        if spent >= moment:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)


def begin(folder: Path, argv: list[str], warm: bool) -> None:
    """Be the script, in a forked process: never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open("output.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(output, stream)
        if not warm:
            os.execv(sys.executable, [sys.executable, str(ROOT / argv[0]), *argv[1:]])
        sys.argv = argv
        script = importlib.import_module(Path(argv[0]).stem)
        run_script(script.main, script.parse_args)
        code = 0
    except SystemExit as ending:
        code = ending.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(group: int, seconds: float = 20.0) -> bool:
    """Whether all processes of a group end within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


# --- what is left


def files_of(folder: Path) -> dict[str, Path]:
    """All files below a folder, but the locks, by their path in it."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    own = LOCK, ".tables", ".written"
    return {n: p for n, p in found.items() if p.is_file() and p.name not in own}


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def open_whole(path: Path) -> None:
    """Read all of a file with a reader that knows nothing of this project; raises what it does."""
    if path.suffix in (".png", ".jpg"):
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".tif":
        tifffile.imread(path)
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            lengths = {len(row) for row in csv.reader(file, strict=True)}
        assert len(lengths) == 1 and path.read_bytes().endswith(b"\n"), "a half table"
    elif path.suffix in (".json", ".geojson"):
        json.loads(path.read_text())
    elif path.suffix == ".pt":
        torch.load(path, weights_only=True)
    elif path.suffix == ".zip":
        assert zipfile.ZipFile(path).testzip() is None, "a damaged archive"
    elif path.suffix == ".html":
        assert path.read_text().rstrip().endswith("</html>"), "half a page"


def content(path: Path):
    """What a file says but for times; None of files that say when they were made."""
    if path.name in ("metrics.csv", results.COUNTS, results.STATUS):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [{k: v for k, v in row.items() if k not in OF_TIME} for row in rows]
    if path.parent.name == results.ROWS and path.suffix == ".json":
        record = json.loads(path.read_text())
        del record["sha256"], record["row"]["seconds"], record["marks"]
        return record
    is_dated = path.suffix in (".html", ".log", ".txt") or path.name.startswith("events")
    return None if is_dated else path.read_bytes()


def check_preprocess(folder: Path, before: Path, after: Path) -> None:
    if (folder / "data" / MANIFEST).is_file():
        for split in SPLITS:
            patches = PatchDataset(folder / "data", split, lambda image, mask: {})
            assert patches.files
        was = files_of(before), files_of(after)
        patch_files = {n for n in files_of(folder / "data") if n.startswith("patches_")}
        wanted = [{str(Path(n).relative_to("data")) for n in w if "/patches_" in n} for w in was]
        assert patch_files in wanted, "a set of neither run"


def check_inference(folder: Path, before: Path, after: Path) -> None:
    finished, faults = results.finished(folder / "results")
    assert not faults, faults
    for record in finished:
        made_by = after if record["made_with"]["threshold"] == 0.5 else before
        for kind in record["files"]:
            path = results.path_of("results", record["row"]["image"], kind)
            same = (folder / path).read_bytes() == (made_by / path).read_bytes()
            assert same, f"{path} is not what its record says"


def check_train(folder: Path, before: Path, after: Path) -> None:
    (undisturbed,) = after.glob("log/*")
    for path in folder.glob("log/*/*"):
        if path.suffix == ".pt" and not is_hidden(path.name):
            load_checkpoint(path)
        elif path.name == "args.json":
            runs.read_settings(path.parent)
        elif path.name == "metrics.csv":
            rows = content(path)
            assert rows == content(undisturbed / path.name)[: len(rows)], "rows of another run"


def check_files(folder: Path, before: Path, after: Path) -> None:
    """All visible files are whole, and each is that from before or the new one."""
    places = [files_of(before), files_of(after)]
    for name, path in files_of(folder).items():
        if is_hidden(name) or path.suffix == ".job":
            continue
        open_whole(path)
        of_neither = name.startswith("log/") or path.name == results.STATUS  # how far it was
        if not of_neither and (found := content(path)) is not None:
            known = [content(files[name]) for files in places if name in files]
            assert found in known, f"{name} is of neither run"


def finish(script: str, folder: Path, after: Path) -> None:
    """Give the same command again, and compare what it leaves with the undisturbed run."""
    argv = COMMANDS[script]
    (saved,) = [*folder.glob("log/*/last.pt")] or [None]
    if saved:
        argv = ["train.py", "--log", "log", "--resume"]
        done = torch.load(saved, weights_only=True)["training"]["progress"]["finished"]
    code, _, group = run(folder, argv)
    output = (folder / "output.txt").read_text()
    assert code == (2 if saved and done else 0), f"again: {code}, {output}"
    assert not (saved and done) or "found a finished run" in output, output
    assert ended(group), "a process of the second run is left"
    if script == "train":
        (run_folder,) = (path.parent for path in folder.glob("log/*/last.pt"))
        (undisturbed,) = after.glob("log/*")
        same_training(run_folder, undisturbed)
        bests = [torch.load(f / "best.pt", weights_only=True) for f in (run_folder, undisturbed)]
        assert same(*bests), "best.pt differs from the undisturbed run"
        pairs = {"metrics.csv": undisturbed / "metrics.csv"}
        left = files_of(run_folder)
    else:
        left, pairs = files_of(folder), files_of(after)
        assert left.keys() == pairs.keys(), left.keys() ^ pairs.keys()
    for name, wanted in pairs.items():
        assert content(left[name]) == content(wanted), f"{name} differs from the undisturbed run"
    assert not any(map(is_hidden, left)), [name for name in left if is_hidden(name)]


CHECKS = {"preprocess": check_preprocess, "train": check_train, "inference": check_inference}


# --- all of it


def prepare(folder: Path) -> None:
    """Draw tissue, and make what each script finds: an earlier patch set, a network, results."""
    write_demo(folder / "data", images=4, size=96)
    for argv in ([*CUT, "32"], LEARN, [*INFER, "0.4"]):
        assert run(folder, argv, warm=False)[0] == 0, (folder / "output.txt").read_text()
        if argv == LEARN:
            shutil.copy(next(folder.glob("log/*/best.pt")), folder / "net.pt")
            shutil.rmtree(folder / "log")


def attack(script: str, folder: Path, numbers: range, seed: int) -> list[str]:
    """Kill a script once for each number, below a folder with what `prepare` made; the faults."""
    before, after = folder / "before", folder / f"{script}_undisturbed"
    shutil.copytree(before, after)
    code, warm_seconds, _ = run(after, COMMANDS[script])
    assert code == 0, (after / "output.txt").read_text()
    shutil.copytree(before, folder / "cold")
    cold_seconds = run(folder / "cold", COMMANDS[script], warm=False)[1]
    shutil.rmtree(folder / "cold")
    faults = []
    for number in numbers:
        warm = script != "preprocess" and number % 5 > 0
        generator, place = random.Random(f"{script} {seed} {number}"), folder / "killed"
        code, tries = 0, 0
        while code != -signal.SIGKILL:  # where it was faster than that, it is done: once more
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(before, place)
            moment = generator.uniform(0, warm_seconds if warm else cold_seconds)
            code, _, group = run(place, COMMANDS[script], warm, moment)
            tries += 1
            assert tries < 20 and code in (0, -signal.SIGKILL), (place / "output.txt").read_text()
        try:
            check_files(place, before, after)
            CHECKS[script](place, before, after)
            finish(script, place, after)
            assert ended(group), "a process of the killed run is left"
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            faults.append(f"{script} {number}, killed after {moment:.2f} s: {said:.800}")
            print(faults[-1], flush=True)
    return faults


def main(argv=None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of each script")
    parser.add_argument("--first", type=int, default=0, help="number of the first kill")
    parser.add_argument("--only", choices=COMMANDS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a forked process has none of the threads that wait here for work
    cv2.setNumThreads(0)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that curves were begun twice
    for script in COMMANDS:
        importlib.import_module(script)
    faults, numbers = [], range(args.first, args.first + args.kills)
    with tempfile.TemporaryDirectory(prefix="kill_") as folder:
        (Path(folder) / "before").mkdir()
        prepare(Path(folder) / "before")
        for script in [args.only] if args.only else COMMANDS:
            started = time.monotonic()
            found = attack(script, Path(folder), numbers, args.seed)
            print(
                f"{script}: {args.kills - len(found)} of {args.kills} kills left nothing wrong "
                f"({time.monotonic() - started:.0f} s)",
                flush=True,
            )
            faults += found
    return faults


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
