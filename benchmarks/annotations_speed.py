"""Seconds and memory of opening one image's annotation of many nuclei, as QuPath saves it.

    python3 -m benchmarks.annotations_speed
    python3 -m benchmarks.annotations_speed --nuclei 10000

The file is one of our own exports, gzipped; outlines run along pixels. One process, which does
nothing else, opens it, says its notes (all of it is drawn once) and reads 1,000 windows.
Writes the section "Reading annotations" of RESULTS.md.
"""

import argparse
import gzip
import multiprocessing
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import results
from tissue import exports, measures
from tissue.annotations import open_annotation
from tissue.files import run_script
from tissue.results import path_of

CELL = 32  # pixels between two nuclei
WINDOWS, SIDE = 1000, 128  # windows that are read, pixels


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--nuclei", type=int, default=300_000, help="nuclei of the image")
    parser.add_argument("--results", default=results.RESULTS, help="file for the table")
    return parser.parse_args(argv)


def main(args):
    since = results.moment()
    with tempfile.TemporaryDirectory() as folder:
        path, side = draw(Path(folder), args.nuclei)
        megabytes = path.stat().st_size / 1e6
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows, gibibytes = pool.apply(measure, (path, side))
    table = results.table(["", "seconds", "of them on the processor"], rows)
    text = f"""{args.nuclei:,} nuclei in one gzipped
GeoJSON of {megabytes:.0f} MB, of an image of {side:,} x {side:,} pixels, in one process that held
at most {gibibytes:.2f} GiB, libraries included.

{table}"""
    results.write_section("Reading annotations", text, args.results, since)


def draw(folder: Path, count: int) -> tuple[Path, int]:
    """A gzipped GeoJSON of `count` tilted ellipses on a grid; the side of their image, pixels."""
    side = int(np.ceil(count**0.5))
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    shapes = []
    for angle, long, short in np.random.default_rng(0).uniform((0, 9, 7), (np.pi, 15, 12), (64, 3)):
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        labels = ((u / long) ** 2 + (v / short) ** 2 <= 1).astype(np.int32)
        image = np.full((CELL, CELL, 3), 200, np.uint8)
        shapes.append((measures.measure(labels, image, 0.25), measures.outlines(labels)[0]))
    with exports.NucleiFiles(folder, "a", (side * CELL,) * 2, ("geojson",)) as files:
        for number in range(count):
            table, ring = shapes[number % len(shapes)]
            place = CELL * np.array(divmod(number, side))
            files.add(table | {"id": np.array([number + 1])}, [ring + place[::-1]])
    path = path_of(folder, "a", "geojson")
    with path.open("rb") as plain, gzip.open(f"{path}.gz", "wb", 6) as packed:
        shutil.copyfileobj(plain, packed)
    return path.with_name(f"{path.name}.gz"), side * CELL


def measure(path: Path, side: int) -> tuple[list[list[str]], float]:
    """Rows of what was done and its seconds; the most memory that this process held, GiB."""
    rows, started = [], np.array([time.monotonic(), time.process_time()])

    def done(what):
        nonlocal started
        now = np.array([time.monotonic(), time.process_time()])
        rows.append([what, *(f"{seconds:.1f}" for seconds in now - started)])
        started = now

    annotation = open_annotation(path, (side, side))
    done(f"opened, {annotation.nuclei:,} nuclei counted")
    notes = annotation.notes
    done(f"drawn once for its {len(notes)} notes")
    window = min(SIDE, side)
    for y, x in np.random.default_rng(0).integers(0, side - window + 1, (WINDOWS, 2)).tolist():
        annotation.numbers(y, x, window, window)
    done(f"{WINDOWS:,} windows of {window} x {window} pixels read")
    return rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    run_script(main, parse_args)
