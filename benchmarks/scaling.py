"""What images cost when there are more and more of them, and by one process and by two.

    python3 -m benchmarks.scaling                      (all four parts, on a quiet machine)
    python3 -m benchmarks.scaling --parts folder

cut, learn and infer call the scripts as a user does. folder fills a folder of results with finished
images, links to three, and takes the processor seconds of a call that finds all of them done, and
of --report_only. Writes a section for each part into benchmarks/RESULTS.md.
"""

import csv
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np

import inference
from benchmarks import data, results
from benchmarks.train_speed import REPOSITORY, take
from tissue import pairs
from tissue import results as records
from tissue.files import Parser, run_script
from tissue.status import Status
from tissue.synthetic import write_demo

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
# What is put before a script, and the threads of each process.
WAYS = {"one process, two threads": ([], "2"), "two processes": (TORCHRUN, "1")}
STEPS = {  # of a call that finds all images done
    "call": (inference, "main"),
    "plan": (inference, "plan"),
    "records": (inference, "unfinished"),
    "status.csv": (Status, "write"),
    "tables and page": (inference, "write_tables"),
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--images", type=int, nargs="+", default=[2, 4, 16, 64], help="how many")
    parser.add_argument("--folder", type=int, nargs="+", default=[100, 1000, 10_000], help="done")
    parser.add_argument("--size", type=int, default=512, help="side of an image, pixels")
    parser.add_argument("--patches", type=int, default=960, help="of an epoch of training")
    parser.add_argument("--rounds", type=int, default=3, help="the median of this many is told")
    parser.add_argument("--results", default=results.RESULTS, help="file for the tables")
    return parser.parse_args(argv)


def main(args):
    for part in args.parts:
        since = results.moment()
        with tempfile.TemporaryDirectory() as folder:
            title, text = PARTS[part](args, Path(folder))
        results.write_section(title, text, args.results, since)


def measure_cutting(args, folder: Path):
    def cut(root, workers):
        for path in root.glob("patches*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return call(["preprocess.py", "--root", root, "--workers", workers])

    ways = {"one thread": 1, "two threads": 2}
    return "More and more images: cutting", over_images(args, folder, ways, cut)


def measure_inference(args, folder: Path):
    def segment(root, way):
        before, threads = way
        with tempfile.TemporaryDirectory() as out:
            flags = ["--images", root / pairs.IMAGE_FOLDER, "--image_folder", out, "--gpu_id", -1]
            return call([*before, "inference.py", *flags], threads)

    return "More and more images: inference", over_images(args, folder, WAYS, segment)


def over_images(args, folder, ways, measure) -> str:
    """A table of seconds over numbers of images, and what each way takes for one more."""
    rows, found = [], {way: [] for way in ways}
    for number in args.images:
        write_demo(root := folder / f"{number}", number, args.size)
        for way, how in ways.items():
            rounds = [measure(root, how) for _ in range(args.rounds)]
            found[way].append([statistics.median(one) for one in zip(*rounds, strict=True)])
        rows.append([number, *(f"{v:.1f}" for its in found.values() for v in its[-1])])
        print(*rows[-1], flush=True)
    header = ["images", *(f"{way}: {unit}" for way in ways for unit in ("s", "processor s"))]
    text = f"The whole command on drawn images of {args.size} x {args.size} pixels; median of "
    text += f"{args.rounds}.\n\n{results.table(header, rows)}\n"
    for way, its in found.items():
        (more, busier), (first, busy) = np.polyfit(args.images, np.array(its), 1)
        text += f"\n{way}: {first:.1f} s and {more:.2f} s an image, of the processor "
        text += f"{busy:.1f} and {busier:.2f}.\n"
    return text


def measure_learning(args, folder: Path):
    root = data.tissue(folder / "data", None, 4)
    data.cut(root, "--patch_stride", 64)
    take(root, folder / "sample", {"train": args.patches, "val": 8})
    flags = ["--root", folder / "sample", "--epoch", 2, "--dimensions", 32, "--gpu_id", -1]
    found = {way: [] for way in WAYS}
    for number, (way, (before, threads)) in product(range(args.rounds), WAYS.items()):
        log = folder / f"{number} {way}"
        spent = call([*before, "train.py", *flags, "--log", log], threads)
        (table,) = log.glob("*/metrics.csv")
        speed = list(csv.DictReader(table.read_text().splitlines()))[-1]["patches_per_second"]
        found[way].append([float(speed), *spent])
    rows = [[way, *np.median(its, axis=0).round(1)] for way, its in found.items()]
    text = f"U-Net of width 32, batch 8, two epochs of {args.patches} patches; patches a "
    text += f"second in the second; median of {args.rounds}.\n\n"
    header = ["", "patches/s", "s, whole command", "processor s"]
    return "More processes: learning", text + results.table(header, rows)


def call(arguments, threads=None) -> tuple[float, float]:
    """Call Python: its seconds, and the processor seconds of it and of its processes."""
    environment = os.environ | ({"OMP_NUM_THREADS": threads} if threads else {})
    command, before = [sys.executable, *map(str, arguments)], os.times()
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    after = os.times()
    return after.elapsed - before.elapsed, sum(after[2:4]) - sum(before[2:4])


def measure_folder(args, folder: Path):
    spent, rows = Counter(), []
    for step, (owner, name) in STEPS.items():
        setattr(owner, name, timed(getattr(owner, name), step, spent))
    few, many, images = folder / "few", folder / "results", folder / "images"
    write_demo(folder, 3, args.size)
    drawn = sorted((folder / pairs.IMAGE_FOLDER).iterdir())

    def infer(*flags):
        inference.main(inference.parse_args([*map(str, flags), "--gpu_id", "-1"]))

    infer("--images", *drawn, "--image_folder", few)
    (many / records.ROWS).mkdir(parents=True)
    images.mkdir()
    for number in args.folder:
        for place in range(len(os.listdir(images)), number):
            add_finished(few, many, drawn[place % 3], images / f"Image_{place:06}.tif")
        spent.clear()
        infer("--images", images, "--image_folder", many)
        seconds = [*map(spent.get, STEPS)]
        infer("--image_folder", many, "--report_only")
        seconds.append(spent["call"] - seconds[0])
        tables = [many / name for name in (*records.TABLES, records.STATUS)]
        sizes = {path.name: path.stat().st_size / 1e6 for path in tables if path.exists()}
        rows.append([f"{number:,}", *(f"{s:.1f}" for s in seconds)])
        rows[-1] += [f"{sizes.pop(records.REPORT):.1f}", f"{sum(sizes.values()):.2f}"]
        print(*rows[-1], flush=True)
    header = ["images", *STEPS, "--report_only", "page, MB", "tables, MB"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB, on Linux
    text = "Processor seconds of a call that finds all done and of its steps (status.csv twice), "
    text += f"and of --report_only, without imports; images of {args.size} x {args.size} pixels "
    text += f"without references; at most {peak:.2f} GiB.\n\n"
    return "A folder of many results", text + results.table(header, rows)


def timed(function, step, spent):
    """A function whose processor seconds go to `spent`."""

    def called(*arguments, **named):
        began = time.process_time()
        found = function(*arguments, **named)
        spent[step] += time.process_time() - began
        return found

    return called


def add_finished(few: Path, many: Path, drawn: Path, image: Path) -> None:
    """One more finished image, all files of which are links to those of one of a few."""
    os.link(drawn, image)
    record = records.read(few, drawn.stem)
    for kind in record["files"]:
        os.link(records.path_of(few, drawn.stem, kind), records.path_of(many, image.stem, kind))
    records.write(many, record["row"] | {"image": image.stem}, record["made_with"], record["shown"])


PARTS = {"cut": measure_cutting, "learn": measure_learning, "infer": measure_inference}
PARTS["folder"] = measure_folder

if __name__ == "__main__":
    run_script(main, parse_args)
