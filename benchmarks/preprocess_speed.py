"""Patches per second of preprocess.py against a plain loop that writes the same patches.

    python3 -m benchmarks.preprocess_speed
    python3 -m benchmarks.preprocess_speed --images 12 --rounds 3

All ways take turns in each round. Output folders are removed between them, outside of the timing.
Writes the section "Cutting patches" of benchmarks/RESULTS.md.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from benchmarks import data, results
from tissue import images, masks, pairs
from tissue.files import Parser, run_script
from tissue.patches import Grid, cut  # by patchify, where there is one

REPOSITORY = Path(__file__).resolve().parent.parent
DIM, STRIDE = 128, 20  # preprocess.py's defaults


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--root", help="folder with own images and masks; without it drawn ones")
    parser.add_argument("--images", type=int, default=30, help="number of images to draw")
    parser.add_argument("--size", type=int, default=512, help="their height and width, pixels")
    parser.add_argument("--rounds", type=int, default=5, help="the median of this many is told")
    parser.add_argument("--results", default=results.RESULTS, help="file for the table")
    return parser.parse_args(argv)


def main(args):
    since = results.moment()
    with tempfile.TemporaryDirectory() as folder:
        root = data.tissue(folder, args.root, args.images, args.size)
        command = [sys.executable, "preprocess.py", "--root", str(root)]
        ways = {
            "plain loop, one process": lambda: plain_loop(root),
            "`preprocess.main()`, imports done": lambda: data.cut(root),
            "`python3 preprocess.py`, whole command": lambda: subprocess.run(
                command, cwd=REPOSITORY, check=True, capture_output=True
            ),
        }
        seconds = {way: [] for way in ways}
        written = {}
        for number in range(1, args.rounds + 1):
            for way, work in ways.items():
                remove_patches(root)
                seconds[way].append(timed(work))
                written[way] = [path.stat().st_size for path in root.glob("patches_*/*.png")]
                print(f"round {number} | {seconds[way][-1]:6.2f} s | {way}", flush=True)

    counts = {len(sizes) // 2 for sizes in written.values()}  # a mask with every patch
    if len(counts) != 1:
        raise RuntimeError(f"the ways did not write the same patches: {counts}")
    (patches,) = counts
    plain, *others = seconds
    rows, rounds = [], []
    for way in ways:
        median = statistics.median(seconds[way])
        ratios = [a / b for a, b in zip(seconds[plain], seconds[way], strict=True)]
        ratio, megabytes = statistics.median(ratios), sum(written[way]) / 1e6
        columns = f"{median:.2f}", f"{patches / median:.0f}", f"{ratio:.2f}x", f"{megabytes:.0f}"
        rows.append((way, *columns))
        if way in others:
            rounds.append(f"{way}: {', '.join(f'{value:.2f}' for value in ratios)}")
    header = "", "seconds", "patches/s", "against the plain loop", "MB written"
    results.write_section(
        "Cutting patches",
        f"{patches:,} patches of {DIM} x {DIM} pixels at "
        f"stride {STRIDE}, with their masks, of {data.source(args.root)}; median of {args.rounds} "
        f"rounds in which all ways take turns. The plain loop writes with `patchify` and "
        f"`cv2.imwrite`; it hashes nothing, checks nothing and draws no preview.\n\n"
        f"{results.table(header, rows)}\n\n"
        f"Ratios of the single rounds, {'; '.join(rounds)}.",
        args.results,
        since,
    )


def plain_loop(root: Path) -> None:
    """Cut and write as a short script does: one image, one patch, one file after the other."""
    rgb, mask = (root / f"patches_plain_{kind}" for kind in ("rgb", "mask"))
    rgb.mkdir()
    mask.mkdir()
    for pair in pairs.find_pairs(root):
        image = cv2.cvtColor(images.read_image(pair.image), cv2.COLOR_RGB2BGR)
        nuclei = masks.read_mask(pair.mask).astype(np.uint8) * 255
        image_patches, mask_patches = (cut(pixels, Grid(DIM, STRIDE)) for pixels in (image, nuclei))
        for row in range(image_patches.shape[0]):
            for col in range(image_patches.shape[1]):
                file = f"{pair.name}_{row:02}_{col:02}.png"
                cv2.imwrite(str(rgb / file), image_patches[row, col])
                cv2.imwrite(str(mask / file), mask_patches[row, col])


def remove_patches(root: Path) -> None:
    """Remove all that was cut, and wait until the disk has nothing left to do."""
    for path in root.glob("patches*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()


def timed(work) -> float:
    """Seconds that `work` takes."""
    cv2.setNumThreads(-1)  # OpenCV's default, which preprocess.main changes
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    run_script(main, parse_args)
