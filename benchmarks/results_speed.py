"""Seconds and megabytes of what inference.py writes for other programs, and of the report.

    python3 -m benchmarks.results_speed
    python3 -m benchmarks.results_speed --nuclei 1000 --images 20

Nuclei are ellipses on a grid; the report's images are copies of nine drawn ones.
Writes the section "Writing results" of RESULTS.md.
"""

import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import data, results
from tissue import (
    agreement,
    exports,
    nuclei,
    pairs,
    pictures,
    report,
    segmentation,
    tiling,
    windows,
)
from tissue.files import Parser, run_script
from tissue.inputs import Task
from tissue.store import Store
from tissue.synthetic import ORGANS, PIXEL_SIZE, draw_tissue

CELL = 32  # pixels between two nuclei
LAYERS = ("image", "overlay", "gt", "errors")


def parse_args(argv=None):
    parser = Parser(__doc__)
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
        task, mask = slide(Path(folder), args.nuclei)
        measure("split, measured, all files written", lambda: write_nuclei(task, mask))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        for key in (*exports.FORMATS, "labels"):
            path = task.file(key)
            rows.append([path.name.removeprefix("a"), "", f"{path.stat().st_size / 1e6:.1f}"])
        measure("all files read back and compared", lambda: exports.check_exports(folder, "a"))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        counts = draw_results(folder, args.images)
        page = folder / "report.html"
        measure(
            f"report.html of {args.images:,} images with four pictures each",
            lambda: report.write_report(page, folder, counts, {}),
            lambda: page,
        )
    text = f"""`python3 -m benchmarks.results_speed`: {args.nuclei:,} nuclei of one image, by
windows of image and mask, as inference.py finds and writes them above 64 megapixels (the process
held at most {memory:.2f} GiB, libraries included); and the report.

{results.table(["", "seconds", "MB"], rows)}"""
    results.write_section("Writing results", text, args.results, since)


def slide(folder: Path, count: int) -> tuple[Task, Store]:
    """What inference.py does with an image of drawn tissue once its mask, of `count` tilted
    ellipses, is predicted; and that mask.
    """
    side = int(np.ceil(count**0.5))
    mask = np.zeros((side * CELL, side * CELL), np.uint8)
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    shapes = []
    for angle, long, short in np.random.default_rng(0).uniform((0, 9, 7), (np.pi, 15, 12), (64, 3)):
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        shapes.append((u / long) ** 2 + (v / short) ** 2 <= 1)
    for number in range(count):
        top, left = np.array(divmod(number, side)) * CELL
        mask[top : top + CELL, left : left + CELL][shapes[number % len(shapes)]] = 255
    task = Task(
        pair=pairs.Pair("a", data.draw_giant(folder / "tissue.tif", side * CELL), None),
        image=windows.open_image(folder / "tissue.tif", big=0), label_map=None, bits=None,
        results=folder, pixel_size_um=PIXEL_SIZE, split_at_um=PIXEL_SIZE, formats=exports.FORMATS,
    )  # fmt: skip
    store = Store(folder, mask.shape, bool)
    for tile in tiling.tiles_of(*mask.shape, tiling.TILE):
        store.write(tile, mask[tile.y :, tile.x :][: tile.height, : tile.width] > 0)
    return task, store


def write_nuclei(task: Task, mask: Store) -> None:
    """Find, measure and write the nuclei of a mask by windows, and their label map."""
    with Store(task.results, task.shape, np.uint32) as labels:
        segmentation.write_nuclei(
            task,
            nuclei.PREDICTION_SPLIT,
            mask,
            lambda found, table: labels.write(found.tile, found.labels),
        )
        labels.save(task.file("labels"), task.pixel_size_um)


def draw_results(folder: Path, count: int) -> list[dict]:
    """Pictures of `count` images in a folder, hard links to those of nine, and rows of counts."""
    for organ in ORGANS:
        tissue = draw_tissue(512, 512, seed=1, organ=organ)
        classes = np.full(tissue.count + 1, agreement.MATCHED, np.uint8)
        outlined = pictures.overlay(tissue.image, tissue.labels)
        twice = (tissue.labels,) * 2 + (classes,) * 2
        errors = pictures.error_overlay(tissue.image, *twice)
        layers = (tissue.image, outlined, tissue.labels > 0, errors)
        for layer, picture in zip(LAYERS, layers, strict=True):
            pictures.write_image(folder / f"{organ}_{layer}.png", picture)
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
