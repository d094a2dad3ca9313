"""Many slides, two processes, each killed three times: every slide is done once.

    python -m tests.faults.many_slides        (200 slides, 6 kills)

Draws slides of several sizes, runs inference.py on them once undisturbed, and then twice at once
into another folder. Whenever so many slides are finished, drawn by the seed, one of the two gets
SIGKILL and is started again by the same command. All the while the records are watched. At the end
each must have been written once, tables and status.csv must have each slide once, every file must
have the bytes of the undisturbed run, and nothing of the killed processes may be left.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tifffile

from tests.scripts import REPOSITORY, table_of
from tissue.files import InputError, Parser, check_numbers, run_script
from tissue.synthetic import draw_tissue

SIDES = 96, 224  # pixels; the least and the most


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--slides", type=int, default=200, help="how many to draw")
    parser.add_argument("--kills", type=int, default=3, help="of each of the two processes")
    parser.add_argument("--seed", type=int, default=0, help="another draws other moments")
    parser.add_argument("--folder", help="keep all there; without it a temporary one")
    return parser.parse_args(argv)


def main(args):
    check_numbers(args, {"slides": (2, 10**5), "kills": (1, 100)})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        draw(folder / "slides", args.slides)
        began = time.monotonic()
        if code := start(folder, "alone").wait():
            raise InputError(f"{folder}: the undisturbed run ended with {code}")
        alone = time.monotonic() - began
        killed, written, seconds = disturb(folder, args)
        faults = faults_of(folder, written)
        print(
            f"{args.slides} slides, {killed} kills: {len(faults)} faults; {alone:.0f} s by one "
            f"process, {seconds:.0f} s by two that were killed"
        )
        if faults:
            raise InputError("; ".join(faults[:20]))


def draw(folder, slides):
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(1)
    for number in range(slides):
        height, width = (generator.randrange(*SIDES) for _ in range(2))
        path = folder / f"slide_{number:04}.tif"
        image = draw_tissue(height, width, seed=number).image
        tifffile.imwrite(
            path, image, photometric="rgb", tile=(64, 64), compression="adobe_deflate",
            resolution=(4e4, 4e4), resolutionunit="CENTIMETER",
        )  # fmt: skip


def start(folder, results):
    command = [sys.executable, "inference.py", "--gpu_id", "-1", "--images", folder / "slides"]
    return subprocess.Popen(
        [*map(str, command), "--image_folder", str(folder / results)],
        cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def disturb(folder, args):
    """Kill and start again until both end well; (kills, {name: times of its records}, seconds)."""
    generator, began = random.Random(args.seed), time.monotonic()
    moments = [generator.uniform(0, 0.95) * args.slides for _ in range(2 * args.kills)]
    moments = sorted(zip(moments, [0, 1] * args.kills, strict=True))
    both, written, killed = [start(folder, "results") for _ in range(2)], {}, 0
    while any(one.poll() is None for one in both):
        for path in (folder / "results" / "rows").glob("slide_*.json"):
            written.setdefault(path.stem, set()).add(path.stat().st_mtime_ns)
        if moments and len(written) >= moments[0][0]:
            time.sleep(generator.uniform(0, 0.3))  # anywhere in an image
            _, which = moments.pop(0)
            both[which].kill()
            both[which].wait()
            killed += 1
            both[which] = start(folder, "results")
        time.sleep(0.02)
    if codes := [one.returncode for one in both if one.returncode]:
        raise InputError(f"{folder}: found exit codes {codes} at the end, expected 0")
    return killed, written, time.monotonic() - began


def faults_of(folder, written):
    """What is not as the undisturbed run left it, in lines."""
    results, alone = folder / "results", folder / "alone"
    names = sorted(path.stem for path in (folder / "slides").iterdir())
    faults = [f"{name}: recorded {len(t)} times" for name, t in written.items() if len(t) != 1]
    if sorted(written) != names:
        faults.append("records: not those of the slides")
    tables = [table_of(place / "counts.csv") for place in (results, alone)]
    for table in tables:
        for row in table:
            del row["seconds"]
    if tables[0] != tables[1] or [row["image"] for row in tables[0]] != names:
        faults.append("counts.csv: not that of the undisturbed run")
    if (results / "review.csv").read_bytes() != (alone / "review.csv").read_bytes():
        faults.append("review.csv: not that of the undisturbed run")
    states = [(row["image"], row["state"]) for row in table_of(results / "status.csv")]
    if states != [(name, "done") for name in names]:
        faults.append("status.csv: not each slide once, and done")
    return faults + faults_of_files(results, alone)


def faults_of_files(results, alone):
    """Which files of two folders differ, but for what was measured of time."""
    files = [{path.relative_to(f) for path in f.rglob("*")} for f in (results, alone)]
    faults = [f"{path}: in one of the folders alone" for path in files[0] ^ files[1]]
    for path in sorted(files[0] & files[1]):
        both = [place / path for place in (results, alone)]
        if path.suffix == ".json":
            records = [json.loads(file.read_text()) for file in both]
            for record in records:
                del record["row"]["seconds"], record["sha256"]
                for mark in record["marks"].values():
                    del mark["time"]
            if records[0] != records[1]:
                faults.append(f"{path}: another record")
        elif path.name.startswith("slide_") and both[0].read_bytes() != both[1].read_bytes():
            faults.append(f"{path}: other bytes")
    return faults


if __name__ == "__main__":
    run_script(main, parse_args)
