"""Whether a script that runs for hours grows: its memory and its open files, from Linux's /proc.

    python -m tests.faults.long_run train --minutes 120
    python -m tests.faults.long_run inference --minutes 120

Runs train.py, or inference.py over many images in one call, as it is called by people, on drawn
tissue, and stops it with Ctrl-C when the time is over. Compares what it holds at the end with what
it held after the first tenth: memory within 5 %, and no more open files (a tenth is chance: patches
on their way from a loader process are files too).
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tissue.synthetic import write_demo

ROOT = Path(__file__).parents[2]
EVERY = 5.0  # seconds between samples
WINDOW = 0.1  # share of the time of which a median is taken: images and steps come and go
MOST_GROWTH = 0.05


def command_of(script: str, folder: Path, minutes: float) -> list[str]:
    """Draw what the script needs for more than so many minutes; its command line."""
    write_demo(folder / "data", images=12, size=512)
    if script == "train":
        cut = ["preprocess.py", "--root", folder / "data", "--patch_stride", "64"]
        subprocess.run([sys.executable, *cut], check=True, cwd=ROOT)
        flags = ["--root", folder / "data", "--log", folder / "log", "--dimensions", 8]
        return ["train.py", *flags, "--epoch", 1_000_000, "--workers", 1]
    drawn = sorted((folder / "data/tissue_images").iterdir())
    (folder / "images").mkdir()
    for number in range(round(100 * minutes)):
        image = drawn[number % len(drawn)]
        os.link(image, folder / "images" / f"{number:06}{image.suffix}")
    flags = ["--images", folder / "images", "--image_folder", folder / "results"]
    return ["inference.py", *flags]


def hear_ctrl_c() -> None:
    """Undo that what runs in the background ignores Ctrl-C, and its children with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def held(process: int) -> tuple[int, int]:
    """Memory of a process and of all that it started, KiB, and how many files they have open.

    Each page counts once, whoever shares it (Pss), but those of files, of which a process counts
    the more the fewer other programs use the same libraries. What ends meanwhile counts as nothing.
    """
    memory = files = 0
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        own = ("Pss_Anon:", "Pss_Shmem:")
        memory = sum(int(line.split()[1]) for line in lines if line.startswith(own))
        files = len(os.listdir(f"/proc/{process}/fd"))
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            more = [held(int(child)) for child in children.read_text().split()]
            memory, files = memory + sum(m for m, _ in more), files + sum(f for _, f in more)
    except (FileNotFoundError, ProcessLookupError):
        pass
    return memory, files


def watch(process: subprocess.Popen, seconds: float) -> list[tuple[int, int]]:
    """What a process held every few seconds, until the time is over."""
    samples, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(EVERY)
        if process.poll() is not None:
            sys.exit(f"it ended by itself with {process.returncode} after {len(samples)} samples")
        samples.append(held(process.pid))
        if len(samples) % 60 == 1:
            memory, files = samples[-1]
            print(f"{len(samples) * EVERY / 60:6.1f} min | {memory / 1024:7.1f} MiB | {files}")
            sys.stdout.flush()
    return samples


def verdict(samples: list[tuple[int, int]]) -> tuple[str, bool]:
    """A line that compares the end with the time after the first tenth, and whether all is well."""
    window = max(1, round(WINDOW * len(samples)))
    parts = samples[window : 2 * window], samples[-window:]
    early, late = (statistics.median(m for m, _ in part) / 1024 for part in parts)
    early_files, late_files = (statistics.median(f for _, f in part) for part in parts)
    growth = late / early - 1
    line = (
        f"memory {early:.1f} MiB after the first tenth, {late:.1f} MiB at the end ({growth:+.1%}), "
        f"open files {early_files:g} and {late_files:g}, {len(samples)} samples"
    )
    return line, growth <= MOST_GROWTH and late_files <= 1.1 * early_files + 1


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script", choices=("train", "inference"))
    parser.add_argument("--minutes", type=float, default=120)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="long_run_") as folder:
        command = command_of(args.script, Path(folder), args.minutes)
        command = [sys.executable, *map(str, command), "--gpu_id", "-1"]
        with (Path(folder) / "output.txt").open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, preexec_fn=hear_ctrl_c
            )
            try:
                samples = watch(process, 60 * args.minutes)
            finally:
                process.send_signal(signal.SIGINT)
                code = process.wait()
                print(*(Path(folder) / "output.txt").read_text().splitlines()[-3:], sep="\n")
        done = len(list(Path(folder).glob("results/rows/*.json")))
        done += sum(len(p.read_text().splitlines()) - 1 for p in Path(folder).glob("log/*/*.csv"))
    line, is_well = verdict(samples)
    print(f"{args.script}, {args.minutes:g} minutes, {done} images or epochs: {line}")
    sys.exit(0 if is_well and code == 130 else 1)


if __name__ == "__main__":
    main()
