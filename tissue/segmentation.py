"""An image's way from the network to its results, the same for a field of view and a whole slide.

What the network finds is written tile by tile into a map on disk (store.Store), the nuclei are
found there, each once, and every file is written from such maps. Only the views that a person looks
at, and what small images are read from, are ever whole in memory.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from tissue import (
    agreement,
    artefacts,
    density,
    exports,
    measures,
    nuclei,
    pictures,
    review,
    stitching,
    tiling,
    windows,
)
from tissue.depth import segment
from tissue.files import InputError
from tissue.inputs import Task, file_mark, open_reference
from tissue.marked import open_tissue
from tissue.regions import open_regions, rows_of
from tissue.results import forget
from tissue.store import Store


@dataclass(frozen=True, kw_only=True)
class Finder(tiling.Network):
    """A network, and how nuclei are found in what it gives; learning.predictor.Predictor is one."""

    threshold: float  # probability from which a pixel is nucleus
    split: nuclei.Split


def map_tissue(task: Task) -> None:
    """Write where the tissue of an image is, if it is to be found."""
    if task.finds_tissue:
        found = artefacts.find(task.image, task.pixel_size_um)
        files = task.file("tissue"), task.file("tissue_geojson")
        artefacts.Map(found, task.shape).write(*files)


def new_map(task: Task, network: Finder) -> Store:
    """An empty map of what the network will find: a mask or, with instances, a depth map."""
    return Store(task.results, task.shape, bool if network.outputs == 1 else np.uint8)


def predict(
    task: Task,
    network: Finder,
    found: Store,
    place: tuple[int, int] = (0, 1),
    advance: Callable[[float], None] = lambda megapixels: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write the map of an image; return the shares of it that are tissue, were skipped, and lie
    outside of what is looked at, (3,), the doubt in each of its fields (review.Fields), and the
    pixels of tissue in each of its regions (n,).

    `place` is this process's rank and the number of processes: it does every so many'th row of
    tiles. `advance` is told how many megapixels of all processes came to an end.
    """
    network = network.at_scale(task.scale)
    fields = review.Fields(task.shape, task.scale)
    rank, processes = place
    tiles = tiling.tiles_of(*task.shape, network.tile_size)
    mine = [part for part in tiles if part.y // network.tile_size % processes == rank]
    regions = open_regions(task.regions, task.shape) if task.regions else None
    in_regions = np.zeros(len(regions.regions) if regions else 0, np.int64)
    marked = open_tissue(task)
    limits = [regions] * task.only_regions + [marked] * (marked is not None)
    met = [part for part in mine if all(limit.meets(*part) for limit in limits)]

    def keep(predicted):
        part, outputs, tissue = predicted
        size, outside = tissue.size, 0
        if limits:
            inside = np.logical_and.reduce([limit.within(*part) for limit in limits])
            outside = size - np.count_nonzero(inside)
            tissue = tissue & inside
        if regions:
            in_regions[:] += regions.pixels(part.y, part.x, tissue)
        if outputs is not None:
            outputs = outputs * inside if outside else outputs
            found.write(part, segment(outputs, network.threshold))
            fields.add(part, outputs[0])
        return size, (np.count_nonzero(tissue), size * (outputs is None), outside)

    all_pixels, met_pixels = (sum(p.height * p.width for p in parts) for parts in (mine, met))
    pixels = np.array([0, 1, 1]) * float(all_pixels - met_pixels)
    advance(pixels[1] * processes / 1e6)
    predicted = tiling.predict_tiles(task.image, met, network)
    for size, seen in tiling.ahead(keep, predicted, 1):
        pixels += seen
        advance(size * processes / 1e6)
    for opened in {regions, *limits} - {None}:
        opened.close()
    return pixels / (task.megapixels * 1e6), fields.doubt, in_regions


def finish(task: Task, network: Finder, segmented: Store, seen: Sequence[np.ndarray]) -> dict:
    """Write all files of a segmented image, and return its row: what is counted and scored.

    `seen` is what `predict` gave, summed over all processes.
    """
    shares, doubt, in_regions = seen
    fields = review.Fields(task.shape, task.scale)
    fields.doubt += doubt
    with ExitStack() as held:
        labels, mask = (
            held.enter_context(Store(task.results, task.shape, dtype))
            for dtype in (np.uint32, bool)
        )

        def keep(found, table):
            fields.count(table["y"], table["x"])
            labels.write(found.tile, found.labels)
            mask.write(found.tile, (segmented.read(*found.tile) > 0) & ~found.dropped)

        # Pictures are written beside what else there is to do.
        beside = held.enter_context(ThreadPoolExecutor(1))
        longest = windows.VIEW if task.image.is_big else max(task.shape)
        read = beside.submit(task.image.view, longest)
        written = [beside.submit(lambda: pictures.write_image(task.file("image"), read.result()))]
        if segmented.dtype != bool:
            written.append(beside.submit(segmented.save, task.file("distance"), task.pixel_size_um))
        row = _measured(task, shares) | write_nuclei(task, network.split, segmented, keep)
        if row.get("tissue_mm2"):
            row["nuclei_per_mm2"] = row["nuclei"] / row["tissue_mm2"]
        for kind, made in (("prediction", mask), ("labels", labels)):
            written.append(beside.submit(made.save, task.file(kind), task.pixel_size_um))
        row["contours"] = stitching.count_contours(mask)
        shown = labels.every(-(-max(task.shape) // longest))
        view = read.result()
        pictures.write_image(task.file("overlay"), pictures.overlay(view, shown))
        if task.pair.mask:
            truth = held.enter_context(Store(task.results, task.shape, np.uint32))
            row |= _compare(task, mask, labels, truth, (view, shown))

        def draw(*window):
            return pictures.overlay(task.image.read(*window), labels.read(*window))

        name = task.pair.name
        review.write_image_review(task.results, fields.table(name), name, draw)
        for writing in written:
            writing.result()  # or what it failed by
    return row | from_nuclei(task, in_regions)


def _measured(task, shares):
    """The row of an image, as far as it is known before its nuclei are."""
    tissue, skipped, outside = map(float, shares)
    row = {"image": task.pair.name, "height": task.image.height, "width": task.image.width}
    row |= {"tissue": tissue, "skipped": skipped}
    if task.only_regions:
        row["outside"] = outside
    if size := task.pixel_size_um:
        row["tissue_mm2"] = tissue * task.megapixels * size**2
    if limit := open_tissue(task):
        unit, each = ("mm2", size**2 / 1e6) if size else ("px", 1)
        row["excluded"] = {f"{k}_{unit}": n * each for k, n in limit.pixels().items()}
        limit.close()
    return row


def _tiles(task: Task) -> list[tiling.Tile]:
    """The parts of an image in which nuclei are looked for, one after the other."""
    return tiling.tiles_of(*task.shape, tiling.TILE)


def write_nuclei(
    task: Task,
    split: nuclei.Split,
    segmented: Store,
    visit: Callable[[stitching.FoundNuclei, dict], None] = lambda found, table: None,
) -> dict:
    """Write the files of the nuclei of a mask or depth map while they are found, and count them;
    `visit` is shown what is found in each tile, and what is measured of the nuclei that are new.
    """
    row = {"nuclei": 0, "nuclei_in_frame": 0, "dropped": 0}
    find = partial(_find, task.split_at_um, split, segmented.dtype != bool)
    image = task.results, task.pair.name, task.shape
    picture = task.source if task.image.is_big else None  # of which there is a small view alone
    with exports.NucleiFiles(*image, task.formats, task.made_with, picture) as files:
        for found in stitching.nuclei_by_tiles(segmented, _tiles(task), find, split.confidence):
            table = measures.measure(found.new, task.image.read(*found.window), task.pixel_size_um)
            corner = np.array([found.window.x, found.window.y])
            table |= {"id": found.ids, "y": table["y"] + corner[1], "x": table["x"] + corner[0]}
            if found.confidence is not None:
                table["confidence"] = found.confidence
            rings = [ring + corner for ring in measures.outlines(found.new)]
            files.add(table, rings)
            row["nuclei"] += len(rings)
            row["nuclei_in_frame"] += measures.count_in_frame(rings)
            row["dropped"] += found.new_dropped
            visit(found, table)
    if not row["dropped"]:
        del row["dropped"]
    return row


def _find(um: float | None, split: nuclei.Split, has_depth: bool, segmented: np.ndarray, core):
    """The nuclei of a window of a mask bool (H, W), or of a depth map uint8 (H, W)."""
    return nuclei.find_nuclei(segmented > 0, um, split, segmented if has_depth else None, core)


def from_nuclei(task: Task, tissue: np.ndarray | None = None) -> dict:
    """Write the density map, and count in the regions, by the table of nuclei that is there. The
    image's record, if any, goes before a file does, and nothing is slow after that.

    `tissue` are the pixels of tissue in each region, int64 (n,), where `predict` has counted them.
    Returns what the image's row gets; nothing and no file where the task asks for neither.
    """
    row = {}
    if not (task.density or task.regions):
        return row
    columns = "y", "x", "area_px", "haematoxylin_od"
    table = exports.read_measures(task.results, task.pair.name, columns)
    if task.regions:
        row["regions_file"] = file_mark(task.regions)
        with closing(open_regions(task.regions, task.shape)) as opened:
            tissue = _tissue_in(task, opened) if tissue is None else tissue
            row["regions"] = rows_of(opened, table, tissue)
    if task.density:
        found = density.density_of(table["y"], table["x"], task.shape, task.pixel_size_um)
        picture = found.picture()
        forget(task.results, task.pair.name)
        found.write(task.file("density"))
        pictures.write_image(task.file("density_picture"), picture)
    return row


def _tissue_in(task, regions):
    """Pixels of tissue in each region, int64 (n,), as `predict` has it."""
    found = np.zeros(len(regions.regions), np.int64)
    limit = open_tissue(task)
    met = (t for t in _tiles(task) if regions.meets(*t) and (limit is None or limit.meets(*t)))
    for tile, tissue in tiling.tissue_of(task.image, met, task.scale):
        inside = tissue if limit is None else tissue & limit.within(*tile)
        found += regions.pixels(tile.y, tile.x, inside)
    if limit is not None:
        limit.close()
    return found


def _compare(task: Task, mask: Store, labels: Store, truth: Store, shown) -> dict:
    """What is scored against a reference, whose nuclei go to `truth`; writes its two pictures.

    Where it has regions, pixels in them are scored, and nuclei whose first pixel lies in them; what
    is counted in the whole image is then not compared.
    """
    tiles, (view, labels_shown) = _tiles(task), shown
    reference = open_reference(task.pair.mask, task.shape)
    counts = sum(agreement.pixel_counts(*_known(reference, t, mask, reference)) for t in tiles)
    row, scored = {"gt_contours": stitching.count_contours(reference)}, labels
    row["gt_nuclei"] = _write_reference(task, reference, truth)
    if reference.regions is not None:
        row = {}
        scored, truth = (_Inside(store, reference, tiles) for store in (labels, truth))
        labels_shown = scored.keep(labels_shown)
    row |= agreement.scores(counts)
    table = agreement.overlap_of_tiles((scored.read(*t), truth.read(*t)) for t in tiles)
    found = agreement.errors(table)
    row |= {"aji": agreement.aji(table), "errors": found.counts}
    row |= agreement.panoptic_quality(table)
    pictures.write_image(task.file("gt"), reference.view(max(view.shape)) > 127)
    truth_shown = truth.every(-(-max(task.shape) // max(view.shape)))
    drawn = pictures.error_overlay(
        view, labels_shown, truth_shown, found.prediction, found.reference
    )
    pictures.write_image(task.file("errors"), drawn)
    reference.close()
    return row


def _known(reference: windows.MaskWindows, tile: tiling.Tile, *masks) -> list[np.ndarray]:
    """The pixels of a tile of several masks, of those alone that are annotated."""
    known = reference.known(*tile)
    return [mask.read(*tile) if known is None else mask.read(*tile)[known] for mask in masks]


class _Inside:
    """The nuclei of a Store of labels whose first pixel, row by row, lies in a region."""

    def __init__(self, labels: Store, reference: windows.MaskWindows, tiles: list[tiling.Tile]):
        self.labels, found = labels, []
        for tile in tiles:
            number, at = np.unique(labels.read(*tile), return_index=True)
            row, column = np.divmod(at, tile.width)
            place = (tile.y + row) * reference.width + tile.x + column
            found.append(np.stack([number, place, reference.known(*tile)[row, column]]))
        number, place, inside = np.concatenate(found, axis=1)
        order = np.lexsort((place, number))
        number, first = np.unique(number[order], return_index=True)
        self.inside = np.zeros(number[-1] + 1, bool)
        self.inside[number] = inside[order][first]

    def keep(self, labels: np.ndarray) -> np.ndarray:
        return labels * self.inside[labels]

    def read(self, *tile) -> np.ndarray:
        return self.keep(self.labels.read(*tile))

    def every(self, step: int) -> np.ndarray:
        return self.keep(self.labels.every(step))


def _write_reference(task: Task, mask: windows.MaskWindows, truth: Store) -> int:
    """Write the reference's nuclei, as its label map has them or else split, and count them."""
    source = open_reference(task.label_map, task.shape) if task.label_map else mask
    count = 0
    if source.is_label_map:
        known = (np.unique(source.numbers(*tile)) for tile in _tiles(task))
        numbers = np.unique(np.concatenate([[0], *known]))
        for tile in _tiles(task):
            truth.write(tile, np.searchsorted(numbers, source.numbers(*tile)))
        count = len(numbers) - 1
    else:
        find = partial(_find, task.split_at_um, nuclei.REFERENCE_SPLIT, False)
        for found in stitching.nuclei_by_tiles(mask, _tiles(task), find):
            truth.write(found.tile, found.labels)
            count += len(found.ids)
    if source is not mask:
        source.close()
    return count


def export_again(task: Task, network: Finder) -> dict:
    """Write the files of the nuclei of a map that an earlier run made; return its row."""
    with new_map(task, network) as segmented:
        is_mask = segmented.dtype == bool
        path = task.file("prediction" if is_mask else "distance")
        made = (windows.open_mask if is_mask else windows.open_depth)(path)
        for tile in _tiles(task):
            segmented.write(tile, made.read(*tile))
        made.close()
        row = task.row | write_nuclei(task, network.split, segmented)
    if row["nuclei"] != task.row["nuclei"]:
        raise InputError(
            f"{path}: found a mask of {row['nuclei']} nuclei, expected {task.row['nuclei']} as it "
            f"was predicted; run inference.py again"
        )
    return row
