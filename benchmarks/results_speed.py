"""Seconds and megabytes of what inference.py writes for other programs, and of the report.

    python3 -m benchmarks.results_speed
    python3 -m benchmarks.results_speed --nuclei 1000 --images 20

Nuclei are ellipses on a grid; the report's images are copies of
nine drawn ones. Writes the section "Writing results" of RESULTS.md.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import results
from tissue import exports, nuclei, report
from tissue.files import run_script
from tissue.synthetic import ORGANS, draw_tissue

CELL = 32  # pixels between two nuclei
LAYERS = ("image", "overlay", "gt", "errors")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--nuclei", type=int, default=100_000, help="nuclei to export")
    parser.add_argument("--images", type=int, default=3000, help="images of the report")
    parser.add_argument("--results", default=results.RESULTS, help="file for the table")
    return parser.parse_args(argv)


def main(args):
    since = results.moment()
    rows = []

    def measure(what, work, path=None):
        started = time.monotonic()
        work()
        seconds = time.monotonic() - started
        megabytes = f"{path().stat().st_size / 1e6:.1f}" if path else ""
        rows.append([what, f"{seconds:.2f}", megabytes])
        print(f"{seconds:6.2f} s | {what}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        labels = nuclei_on_a_grid(args.nuclei)
        image = np.resize(draw_tissue(1024, 1024, seed=0).image, (*labels.shape, 3))
        found = {}

        def find():
            found["labels"] = nuclei.nuclei(labels > 0, 0.25, nuclei.PREDICTION_SPLIT)

        def look():
            found["table"] = nuclei.measure(found["labels"], image, 0.25)
            found["rings"] = nuclei.outlines(found["labels"])

        measure("touching ones split", find)
        measure("measured and outlined", look)
        labels, table, rings = found.values()

        def write(*formats):
            with exports.NucleiFiles(folder, "a", labels.shape, formats) as files:
                files.add(table, rings)

        for key in exports.FORMATS:
            path = exports.export_path(folder, "a", key)
            measure(path.name.removeprefix("a"), lambda key=key: write(key), lambda path=path: path)
        measure("all four in one go", lambda: write(*exports.FORMATS))
        path = exports.export_path(folder, "a", "labels")
        measure("_labels.tif", lambda: exports.write_labels(path, labels, 0.25), lambda: path)
        measure("all five read back and compared", lambda: exports.check_exports(folder, "a"))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        counts = draw_results(folder, args.images)
        page = folder / "report.html"
        measure(
            f"report.html of {args.images:,} images with four pictures each",
            lambda: report.write_report(page, folder, counts, {}),
            lambda: page,
        )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    points = sum(map(len, rings)) / len(rings)
    text = f"""`python3 -m benchmarks.results_speed`: {args.nuclei:,} nuclei with outlines of
{points:.0f} points on average, and the report. The process held {memory:.1f} GiB at most.

{results.table(["", "seconds", "MB"], rows)}"""
    results.write_section("Writing results", text, args.results, since)


def nuclei_on_a_grid(count: int) -> np.ndarray:
    """Labels int32 (H, W) of `count` tilted ellipses."""
    side = int(np.ceil(count**0.5))
    labels = np.zeros((side * CELL, side * CELL), np.int32)
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    shapes = []
    for angle, long, short in np.random.default_rng(0).uniform((0, 9, 7), (np.pi, 15, 12), (64, 3)):
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        shapes.append((u / long) ** 2 + (v / short) ** 2 <= 1)
    for number in range(count):
        top, left = np.array(divmod(number, side)) * CELL
        labels[top : top + CELL, left : left + CELL][shapes[number % len(shapes)]] = number + 1
    return labels


def draw_results(folder: Path, count: int) -> list[dict]:
    """Pictures of `count` images in a folder, hard links to those of nine, and rows of counts."""
    for organ in ORGANS:
        tissue = draw_tissue(512, 512, seed=1, organ=organ)
        classes = np.full(tissue.count + 1, "matched")
        outlined = report.overlay(tissue.image, tissue.labels)
        errors = report.error_overlay(tissue.image, tissue.labels, tissue.labels, classes, classes)
        pictures = (tissue.image, outlined, tissue.labels > 0, errors)
        for layer, picture in zip(LAYERS, pictures, strict=True):
            report.write_image(folder / f"{organ}_{layer}.png", picture)
    rows, organs = [], list(ORGANS)
    for number in range(count):
        name = f"Image_{number:05}"
        for layer in LAYERS:
            source = folder / f"{organs[number % len(organs)]}_{layer}.png"
            os.link(source, folder / f"{name}_{layer}.png")
        reference = 100 + number % 97
        row = {"image": name, "nuclei": reference + number % 11 - 5, "gt_nuclei": reference}
        rows.append(row | {"dice": 0.8, "aji": 0.6, "pq": 0.5})
    return rows


if __name__ == "__main__":
    run_script(main, parse_args)
