"""How two trainings share a machine: patches a second of one alone and of two at once.

    python3 -m benchmarks.beside
    python3 -m benchmarks.beside --demo

Each is measured as train.py starts it, which takes as many threads as others leave it cores, and
with all threads always, with waiting threads that spin and that sleep. All ways take turns. --demo
times `make demo` alone and beside a training instead. Writes sections of benchmarks/RESULTS.md.
"""

import contextlib
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import data, results
from tissue.files import Parser, run_script

REPOSITORY = Path(__file__).resolve().parent.parent
ALL = {"OMP_NUM_THREADS": str(os.cpu_count())}
WAYS = {"as started": {}, "all threads": ALL}
WAYS["all threads, sleeping"] = ALL | {"OMP_WAIT_POLICY": "PASSIVE"}
WHAT_DEMO_MAKES = ("data/demo/patches.json", "results/demo/report.html")


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--width", type=int, default=16, help="--dimensions of the U-Net")
    parser.add_argument("--epochs", type=int, default=6, help="of each training")
    parser.add_argument("--rounds", type=int, default=3, help="the median of this many is told")
    parser.add_argument("--demo", action="store_true", help="time `make demo` instead")
    parser.add_argument("--results", default=results.RESULTS, help="file for the section")
    return parser.parse_args(argv)


def main(args):
    since = results.moment()
    with tempfile.TemporaryDirectory() as folder:
        root = data.tissue(Path(folder) / "data", None, number=4, size=512)
        data.cut(root, "--patch_stride", "64")
        if args.demo:
            title, text = "`make demo` beside a training", demo(root, args)
        else:
            title, text = "Two trainings at once", trainings(root, args)
    results.write_section(title, text, args.results, since)


def trainings(root, args) -> str:
    rates = {(way, many): [] for way in WAYS for many in (1, 2)}
    for _ in range(args.rounds):
        for way, many in rates:
            rates[way, many].append(together(root, args, WAYS[way], many))
            print(f"{way}, {many}: {rates[way, many][-1]:.1f} patches/s", flush=True)
    rows = []
    for way in WAYS:
        one, two = (statistics.median(rates[way, many]) for many in (1, 2))
        ratios = [b / a for a, b in zip(rates[way, 1], rates[way, 2], strict=True)]
        rows.append([way, f"{one:.1f}", f"{two:.1f}", f"{statistics.median(ratios):.2f}"])
    return (
        f"Patches a second of `train.py --dimensions {args.width}` "
        f"on drawn tissue, of two at once added up; median of {args.rounds} rounds in which all "
        f"ways take turns, the ratio by round.\n\n"
        + results.table(["threads", "one alone", "two at once", "two / one"], rows)
    )


def together(root, args, environment, many) -> float:
    """Patches a second of `many` trainings at once, from when all learn to when one has ended."""
    with tempfile.TemporaryDirectory() as log:
        runs = [start(root, Path(log) / str(k), args, environment) for k in range(many)]
        if any(run.wait() for run in runs):
            raise RuntimeError("a training failed")
        rates = []
        for k in range(many):
            (table,) = Path(log, str(k)).glob("*/metrics.csv")
            with table.open(newline="") as file:
                speeds = [float(row["patches_per_second"]) for row in csv.DictReader(file)]
            rates.append(statistics.median(speeds[1:-1]))  # the others are not alone, or are
    return sum(rates)


def start(root, log, args, environment) -> subprocess.Popen:
    flags = {"root": root, "log": log, "gpu_id": -1, "dimensions": args.width, "epoch": args.epochs}
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in flags.items())]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=os.environ | environment, stdout=subprocess.DEVNULL
    )


def demo(root, args) -> str:
    seconds = {"alone": [], "beside a training": []}
    for _ in range(args.rounds):
        for way, its in seconds.items():
            for path in WHAT_DEMO_MAKES:
                (REPOSITORY / path).unlink(missing_ok=True)
            with tempfile.TemporaryDirectory() as log, contextlib.ExitStack() as stack:
                if way != "alone":
                    args.epochs = 10_000
                    other = start(root, log, args, {})
                    stack.callback(other.wait)
                    stack.callback(other.terminate)
                    while not list(Path(log).glob("*/metrics.csv")):
                        time.sleep(0.5)
                begun = time.monotonic()
                subprocess.run(["make", "demo"], cwd=REPOSITORY, check=True, capture_output=True)
                its.append(time.monotonic() - begun)
                print(f"{way}: {its[-1]:.1f} s", flush=True)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    rows = [[way, f"{statistics.median(its):.0f}"] for way, its in seconds.items()]
    return (
        f"Seconds of `make demo` after its installation, "
        f"alone and beside `train.py --dimensions {args.width}`; median of {args.rounds} rounds. "
        f"Ratio, median of the rounds': {statistics.median(ratios):.2f}.\n\n"
        + results.table(["`make demo`", "seconds"], rows)
    )


if __name__ == "__main__":
    run_script(main, parse_args)
