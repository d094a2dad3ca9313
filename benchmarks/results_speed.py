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
    measures,
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
TILE = 400  # nuclei that come at once, as those of a tile do
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
    written = files_of(args.nuclei)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        counts = draw_results(folder, args.images)
        page = folder / "report.html"
        measure(
            f"report.html of {args.images:,} images with four pictures each",
            lambda: report.write_report(page, folder, counts, {}),
            lambda: page,
        )
    text = f"""{args.nuclei:,} nuclei of one image, by
windows of image and mask, as inference.py finds and writes them above 64 megapixels (the process
held at most {memory:.2f} GiB, libraries included); and the report.

{results.table(["", "seconds", "MB"], rows)}

The files alone, of nuclei that are found and measured: processor seconds, the median of 3.

{results.table(["files", "seconds", "MB"], written)}"""
    results.write_section("Writing results", text, args.results, since)


def slide(folder: Path, count: int) -> tuple[Task, Store]:
    """What inference.py does with an image of drawn tissue once its mask, of `count` tilted
    ellipses, is predicted; and that mask.
    """
    side = int(np.ceil(count**0.5))
    mask = np.zeros((side * CELL, side * CELL), np.uint8)
    shapes = ellipses()
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


def files_of(count: int) -> list[list[str]]:
    """For the files of small and of big images and those of --export: processor seconds that
    NucleiFiles takes for `count` nuclei, median of 3, and megabytes.
    """
    image, shapes = np.full((CELL, CELL, 3), 200, np.uint8), []
    for ellipse in ellipses():
        labels = ellipse.astype(np.int32)
        shapes.append((measures.measure(labels, image, PIXEL_SIZE), measures.outlines(labels)[0]))
    side, batches = int(np.ceil(count**0.5)), []
    for start in range(0, count, TILE):
        ids = np.arange(start, min(start + TILE, count))
        own = [shapes[number % len(shapes)] for number in ids]
        corner = CELL * np.stack(np.divmod(ids, side), 1)
        table = {key: np.concatenate([shape[key] for shape, _ in own]) for key in own[0][0]}
        table |= {"id": ids + 1, "y": table["y"] + corner[:, 0], "x": table["x"] + corner[:, 1]}
        batches.append(
            (table, [ring + at[::-1] for (_, ring), at in zip(own, corner, strict=True)])
        )

    rows = []
    for formats in (exports.SMALL, exports.BIG, *((key,) for key in exports.MORE)):
        seconds = []
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(3):
                started = time.process_time()
                with exports.NucleiFiles(folder, "a", (side * CELL,) * 2, formats) as files:
                    for batch in batches:
                        files.add(*batch)
                seconds.append(time.process_time() - started)
            sizes = [path.stat().st_size / 1e6 for path in files.paths.values()]
        names = " and ".join(path.name.removeprefix("a") for path in files.paths.values())
        rows.append([names, f"{np.median(seconds):.2f}", " + ".join(f"{mb:.1f}" for mb in sizes)])
        print(*rows[-1], flush=True)
    return rows


def ellipses() -> list[np.ndarray]:
    """64 tilted ellipses, bool (CELL, CELL)."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    shapes = []
    for angle, long, short in np.random.default_rng(0).uniform((0, 9, 7), (np.pi, 15, 12), (64, 3)):
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        shapes.append((u / long) ** 2 + (v / short) ** 2 <= 1)
    return shapes


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
