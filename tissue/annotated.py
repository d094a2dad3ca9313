"""Patches of annotated images: cut by windows, where a person has said what is nucleus.

An image of any size takes this one way: no more of it is in memory than a block and its margin.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, floor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import shapely

from tissue import patches, pictures, windows
from tissue.annotations import Annotation, open_annotation
from tissue.depth import depth_of
from tissue.files import InputError
from tissue.manifest import TABLE_COLUMNS
from tissue.nuclei import reference_labels
from tissue.pairs import Pair, PairFacts, how_much_darker, picture_hash, size_fault
from tissue.pixel_size import pixel_size_um
from tissue.tiling import Tile, tiles_of
from tissue.windows import Scaled, Windows

BLOCK = 2048  # pixels a side that are cut at once
MARGIN = 256  # pixels beyond a block; a nucleus that reaches further has the depth of what is seen
SHOWN, TILE = 12, 480  # images of the contact sheet, and pixels a side that each gets
OF_REGIONS = (0, 220, 255)  # RGB


class Annotated(NamedTuple):
    """An image and its annotation at one pixel size."""

    image: Windows | Scaled
    annotation: Annotation


class Spot(NamedTuple):
    """Where a patch lies, as in patches.csv: rows are counted on from region to region."""

    row: int
    col: int
    y: int
    x: int


@contextmanager
def opened(
    pair: Pair, scale: float = 1.0, bits: int | None = None, pixel_size_um: float | None = None
) -> Iterator[Annotated]:
    """An annotated Pair with pixels `scale` times as large; `bits` as windows.open_image has them,
    `pixel_size_um` of the image as annotations.open_annotation.

    Raises InputError for an image or an annotation that cannot be read.
    """
    image = windows.open_image(pair.image, bits=bits)
    annotation = open_annotation(pair.mask, (image.height, image.width), pixel_size_um)
    try:
        scaled = image if scale == 1 else Scaled(image, scale)
        yield Annotated(
            scaled, annotation if scale == 1 else annotation.scaled(scaled.height, scaled.width)
        )
    finally:
        image.close()
        annotation.close()


def check(pair: Pair, patch_dim: int, scale: float, pixel_size_taken_um: float | None) -> PairFacts:
    """Return the PairFacts of an annotated pair; InputError as `pairs.check_pair`, also where its
    regions hold no pixel, or its outlines are no nuclei at the pixel size that is taken.

    Of a big image a view stands for all of its pixels.
    """
    with opened(pair, pixel_size_um=pixel_size_taken_um) as (image, annotation):
        if fault := size_fault(pair, image, scale, patch_dim):
            raise InputError(fault)
        shape = image.height, image.width
        shown = image.view() if image.is_big else image.read(0, 0, *shape)
        darker = None
        if not image.is_big:
            whole = annotation.read(0, 0, *shape), annotation.known(0, 0, *shape)
            darker = how_much_darker(shown, *whole)
        nuclei = pixels = 0
        for block in blocks(annotation):
            known = annotation.known(*block)
            mask = annotation.read(*block)
            nuclei += np.count_nonzero(mask if known is None else mask & known)
            pixels += mask.size if known is None else np.count_nonzero(known)
        if not pixels:
            raise InputError(
                f"{pair.mask}: found regions that hold no pixel of the image, expected some, "
                f"draw them anew, or none where all nuclei of the image are outlined"
            )
        regions = annotation.regions
        return PairFacts(
            *shape, pixel_size_um(pair.image), nuclei / pixels, picture_hash(shape, shown),
            annotation.notes, annotation.classes,
            None if regions is None else len(shapely.get_parts(regions)), darker,
        )  # fmt: skip


def blocks(annotation: Annotation) -> Iterator[Tile]:
    """The squares of an image, BLOCK pixels a side, that touch its regions."""
    for tile in tiles_of(annotation.height, annotation.width, BLOCK):
        box = shapely.box(tile.x, tile.y, tile.x + tile.width, tile.y + tile.height)
        if annotation.regions is None or annotation.regions.intersects(box):
            yield tile


def cut(new: Path, split: str, name: str, found: Annotated, grid: patches.Grid) -> list[dict]:
    """Write the patches of an annotated image below `new`; their rows of patches.csv.

    Without regions these are the patches of `patches.write_patches`. Else each region has a grid of
    its own, which begins at its top left corner and reaches to its end, and of these patches those
    are written of which a pixel is annotated. Raises OSError where a file cannot be written.
    """
    starts = _starts(found.annotation, grid)
    most = max(sum(len(ys) for ys, _ in starts), *(len(xs) for _, xs in starts))
    digits = max(2, len(str(most - 1)))
    table = []
    for spots in _blocks_of(starts, grid):
        for spot, image, mask in _patches_of(found, spots, grid.dim):
            file = f"{name}_patch_{spot.row:0{digits}}_{spot.col:0{digits}}.png"
            foreground = patches.write_patch(new, split, file, image, mask)
            values = (split, name, file, *spot, f"{foreground:.4f}")
            table.append(dict(zip(TABLE_COLUMNS, values, strict=True)))
    return sorted(table, key=lambda row: (row["row"], row["col"]))


def _starts(annotation, grid):
    """[(y of all rows, x of all columns)] of the grid of the image, or of each region."""
    shape = annotation.height, annotation.width
    if annotation.regions is None:
        return [tuple(range(0, side - grid.dim + 1, grid.stride) for side in shape)]
    parts = shapely.get_parts(annotation.regions)
    bounds = [part.bounds for part in parts if part.area > 0]
    return [
        (_along(top, bottom, shape[0], grid), _along(left, right, shape[1], grid))
        for left, top, right, bottom in bounds
    ]


def _along(low, high, side, grid):
    """Where patches begin that cover the pixels from low to high; a short way has one around it."""
    low, high = max(0, floor(low)), min(side, ceil(high))
    last = high - grid.dim
    if last <= low:
        return [min(max(0, (low + last) // 2), side - grid.dim)]
    return [*range(low, last, grid.stride), last]


def _blocks_of(starts, grid):
    """The Spots of all grids, block by block."""
    run = max(1, (BLOCK - grid.dim) // grid.stride + 1)  # patches along a block
    first = 0
    for ys, xs in starts:
        for row in range(0, len(ys), run):
            for col in range(0, len(xs), run):
                yield [
                    Spot(first + r, c, ys[r], xs[c])
                    for r in range(row, min(row + run, len(ys)))
                    for c in range(col, min(col + run, len(xs)))
                ]
        first += len(ys)


def _patches_of(found, spots, dim):
    """Yield (Spot, RGB uint8, mask) of the patches of a block of which any pixel is annotated."""
    (top, left), (bottom, right) = spots[0][2:], spots[-1][2:]
    window = top, left, bottom + dim - top, right + dim - left
    known = found.annotation.known(*window)
    if known is not None and not known.any():
        return
    image, mask = found.image.read(*window), _depth(found.annotation, *window)
    for spot in spots:
        place = np.s_[spot.y - top : spot.y - top + dim, spot.x - left : spot.x - left + dim]
        if known is None or known[place].all():
            yield spot, image[place], mask[place]
        elif known[place].any():
            yield spot, image[place], np.where(known[place], mask[place], patches.NO_MASK)


def _depth(annotation, y, x, height, width):
    """The depth of a window's pixels in their nuclei, uint8 (h, w), as `depth.depth_of` has it."""
    top, left = max(0, y - MARGIN), max(0, x - MARGIN)
    bottom = min(annotation.height, y + height + MARGIN)
    right = min(annotation.width, x + width + MARGIN)
    depth = depth_of(reference_labels(annotation.numbers(top, left, bottom - top, right - left)))
    return depth[y - top : y - top + height, x - left : x - left + width]


def picture(found: Annotated, table: list[dict], dim: int) -> np.ndarray:
    """The image around its patch with most nuclei, outlines and regions drawn in, RGB uint8
    (h, w, 3) of at most TILE pixels a side. `table` and `dim` are its patches and their side.
    """
    annotation = found.annotation
    middle = max(table, key=lambda row: float(row["foreground"]))
    height, width = min(2 * TILE, annotation.height), min(2 * TILE, annotation.width)
    y = min(max(0, middle["y"] + (dim - height) // 2), annotation.height - height)
    x = min(max(0, middle["x"] + (dim - width) // 2), annotation.width - width)
    window = y, x, height, width
    size = [min(side, -(-side * TILE // max(height, width))) for side in (width, height)]
    image = cv2.resize(found.image.read(*window), size, interpolation=cv2.INTER_AREA)
    known, labels = annotation.known(*window), annotation.numbers(*window)
    if known is not None:
        known = cv2.resize(known.view(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT)
        image[known > cv2.erode(known, np.ones((5, 5), np.uint8))] = OF_REGIONS
    return pictures.overlay(image, cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT))


def sheet(tiles: list[np.ndarray]) -> np.ndarray:
    """The tiles that `picture` has made side by side, RGB uint8 (H, W, 3)."""
    height, width = np.max([tile.shape[:2] for tile in tiles], axis=0)
    same = np.full((len(tiles), height, width, 3), 255, np.uint8)
    for place, tile in zip(same, tiles, strict=True):
        place[: tile.shape[0], : tile.shape[1]] = tile
    return pictures.contact_sheet(same, columns=min(4, len(tiles)))
