"""Kill train.py ten times and resume it: the end is that of a run that nobody disturbed.

    python3 -m benchmarks.kill_and_resume
    python3 -m benchmarks.kill_and_resume --seed 1

SIGKILL comes at moments drawn at random within the start-up, training, validation and the writing
of checkpoints. Exit code 1 if anything differs. Writes a section of benchmarks/RESULTS.md.
"""

import argparse
import contextlib
import csv
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import data, results
from tissue.files import PART, run_script

REPOSITORY = Path(__file__).resolve().parent.parent
EPOCHS = 14  # more than the kills can let pass
KILLS = ["start-up"] * 2 + ["training"] * 3 + ["validation"] * 2 + ["saving"] * 3
START_UP = 4.0  # seconds, about what the imports take
SAVING = 0.03  # seconds, about what one checkpoint takes
CURVES = ("train/loss", "train/learning_rate", "val/loss", "val/accuracy", "val/dice_score")
TIMES = ("patches_per_second", "seconds")  # the columns of metrics.csv that differ in any two runs


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", help="folder with own images and masks; without it drawn ones")
    parser.add_argument("--gpu_id", type=int, default=0, help="number of the GPU; -1: the CPU")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other moments")
    parser.add_argument("--results", default=results.RESULTS, help="file for the verdict")
    return parser.parse_args(argv)


def main(args):
    since = results.moment()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no train.py stays behind
    generator = random.Random(args.seed)
    kills = generator.sample(KILLS, len(KILLS))
    with tempfile.TemporaryDirectory() as folder:
        root = data.tissue(Path(folder) / "data", args.root, number=3)
        data.cut(root, "--patch_stride", 48)
        command = [sys.executable, "train.py", "--root", root, "--gpu_id", args.gpu_id]
        command += ["--dimensions", 8, "--epoch", EPOCHS]

        finish(start([*command, "--log", Path(folder) / "undisturbed"]))
        (wanted,) = (Path(folder) / "undisturbed").iterdir()
        rows = metrics(wanted)
        epoch = (rows[-1]["seconds"] - rows[0]["seconds"]) / (EPOCHS - 1)
        patches = len(list((root / "patches_rgb_train").iterdir()))
        learning = patches / rows[-1]["patches_per_second"]
        print(f"undisturbed | an epoch: {learning:.1f} of {epoch:.1f} s for training", flush=True)

        log = Path(folder) / "killed"
        lines = []
        for number, phase in enumerate(kills, start=1):
            process = resume(command, log)
            started = time.monotonic()
            try:
                wait_until_moment(process, log, phase, generator, learning, epoch)
                after = time.monotonic() - started
            finally:
                code = kill(process)
            if code != -signal.SIGKILL:
                raise RuntimeError(f"train.py ended with {code} before it was killed")
            halves = len(list(log.glob(f"*/.*{PART}*")))
            saved = max((len(metrics(run.parent)) for run in log.glob("*/metrics.csv")), default=0)
            lines.append((number, phase, f"{after:.2f}", saved, halves))
            print(
                f"kill {number:2} | in {phase:10} | {after:5.2f} s after its start | "
                f"{saved} of {EPOCHS} epochs done | unfinished files so far: {halves}",
                flush=True,
            )
        code = finish(resume(command, log))
        (run,) = (path.parent for path in log.glob("*/last.pt"))
        faults = differences(run, wanted)
        if code:
            faults.append(f"the last train.py ended with exit code {code}")
        halves = [path.name for path in run.glob(f".*{PART}*")]

    verdict = "**equal to the last bit**" if not faults else f"**different**: {'; '.join(faults)}"
    header = "kill", "aimed at", "seconds after its start", "epochs done", "unfinished files so far"
    results.write_section(
        "Killed and resumed",
        f"`python3 -m benchmarks.kill_and_resume`: {EPOCHS} epochs at width 8 on "
        f"{data.source(args.root)}, killed {len(kills)} times (seed {args.seed}) and resumed. "
        f"Weights, averaged weights, optimiser, schedule, best.pt, all curves of tensorboard (no "
        f"point twice, no gap) and metrics.csv against those of an undisturbed run: {verdict}. "
        f"Unfinished files beside the run's own at the end: {len(halves)}.\n\n"
        f"{results.table(header, lines)}",
        args.results,
        since,
    )
    if faults:
        sys.exit(1)


def start(command: list) -> subprocess.Popen:
    """Start train.py in a process group of its own."""
    return subprocess.Popen(
        list(map(str, command)),
        cwd=REPOSITORY,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())},  # else it may change: bits too
    )


def kill(process: subprocess.Popen) -> int:
    """Kill train.py and its loader processes at once, as a power cut does; its exit code."""
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def finish(process: subprocess.Popen) -> int:
    """Let train.py come to its end, unless the benchmark itself is stopped; its exit code."""
    try:
        return process.wait()
    finally:
        kill(process)


def resume(command: list, log: Path) -> subprocess.Popen:
    """Go on with the run in `log`; one that was killed before its first checkpoint starts anew."""
    saved = [path.parent for path in log.glob("*/last.pt")]
    if not saved:
        shutil.rmtree(log, ignore_errors=True)
        return start([*command, "--log", log])
    (run,) = saved
    return start([*command, "--log", log, "--resume", run])


def wait_until_moment(
    process: subprocess.Popen,
    log: Path,
    phase: str,
    generator: random.Random,
    learning: float,
    epoch: float,
) -> None:
    """Return at a random moment of a phase; `learning` is the part of `epoch`, both in seconds,
    in which the network learns. In `saving` it waits for the unfinished file of a checkpoint.
    """

    def written():
        """How often train.py has said something: a line at its start, and one an epoch."""
        return sum(path.read_text().count("\n") for path in log.glob("*/train.log"))

    if phase == "start-up":
        time.sleep(generator.uniform(0, START_UP))
        return
    # The first epoch of a process has its own pace, so the clock serves from the second one on.
    passed = generator.randint(0, 1) if phase in ("training", "saving") else 1
    before = written()
    while written() < before + 1 + passed and process.poll() is None:
        time.sleep(0.01)
    if phase == "training":
        time.sleep(generator.uniform(0, learning))
    elif phase == "validation":
        time.sleep(generator.uniform(learning, epoch))
    else:
        unfinished = set(log.glob("*/.*.pt"))  # by earlier kills
        while set(log.glob("*/.*.pt")) <= unfinished and process.poll() is None:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, SAVING))


def metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def differences(run: Path, wanted: Path) -> list[str]:
    """In what a run differs from another; empty if they are equal to the last bit."""
    faults = []
    for file in ("last.pt", "best.pt"):
        one, two = (torch.load(path / file, weights_only=True) for path in (run, wanted))
        # Not the random state: each process draws seeds for its loaders, which nothing depends on.
        for part in ("model", "ema", "optimizer", "schedule", "scaler"):
            if not same(one.get("training", {}).get(part), two.get("training", {}).get(part)):
                faults.append(f"{file}: {part} of training")
        faults += [f"{file}: {key}" for key in ("model", "epoch") if not same(one[key], two[key])]
    one, two = curves(run), curves(wanted)
    faults += [f"tensorboard: {tag}" for tag in CURVES if one[tag] != two[tag]]
    one, two = (
        [{key: value for key, value in row.items() if key not in TIMES} for row in metrics(path)]
        for path in (run, wanted)
    )
    return faults + ["metrics.csv"] * (one != two)


def same(one, two) -> bool:
    """Whether two nested collections of numbers and tensors are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of tensorboard's curves, as its viewer shows them."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each resume
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in CURVES}


if __name__ == "__main__":
    run_script(main, parse_args)
