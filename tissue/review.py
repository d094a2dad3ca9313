"""What to annotate next: the fields of an image in which the network is least sure.

The doubt of a pixel that is nucleus with probability p is 4 p (1 - p): its variance as a share of
the largest, 0 where the network is sure and 1 where p is 0.5. A field's doubt is the mean over its
pixels, those that are no tissue without any. docs/counting.md says how well it finds errors.
"""

import csv
import heapq
import math
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from tissue import pictures
from tissue.files import InputError, write_table
from tissue.jsons import write_features
from tissue.results import REVIEW, path_of
from tissue.tables import cell, read_table
from tissue.tiling import Tile

SIDE = 256  # pixels of the network, about, of a field; and of its picture
SHARE = 0.1  # of an image's fields is proposed, and one at least
PICTURES = 12  # most proposed fields of an image that have a picture; most on the page
LISTED = 100_000  # most fields of review.csv
CLASS = "Region"  # of a field in QuPath; where preprocess.py takes an annotation as complete
COLOUR = (0, 158, 115)  # RGB
DIGITS = 4  # decimals of a doubt, as tables.cell writes them
COLUMNS = ("image", "y", "x", "height", "width", "nuclei", "doubt", "rank")


class Fields:
    """The fields of an image: as even as can be, about SIDE pixels of the network a side.

    `scale` is the number of the image's pixels that make one of the network's. Tiles and nuclei
    come in any order; what several processes saw of an image is added up in `doubt`.
    """

    def __init__(self, shape: tuple[int, int], scale: float):
        self.edges = [_edges(length, SIDE * scale) for length in shape]  # of rows, of columns
        grid = [len(edges) - 1 for edges in self.edges]
        self.doubt = np.zeros(grid)  # sums over a field's pixels
        self.nuclei = np.zeros(grid, np.int64)

    def add(self, tile: Tile, probability: np.ndarray) -> None:
        """Add the doubt of a tile by its probabilities, float32 (h, w), which are 0 where there is
        no tissue.
        """
        places, starts = [], []
        for edges, start, length in zip(self.edges, tile[:2], tile[2:], strict=True):
            first, *inner = np.flatnonzero((edges[1:] > start) & (edges[:-1] < start + length))
            places.append(slice(first, first + 1 + len(inner)))
            starts.append(np.maximum(edges[places[-1]] - start, 0))
        doubt = probability * (1 - probability)
        sums = np.add.reduceat(doubt, starts[1], axis=1, dtype=np.float64)
        self.doubt[tuple(places)] += 4 * np.add.reduceat(sums, starts[0], axis=0)

    def count(self, y: np.ndarray, x: np.ndarray) -> None:
        """Count nuclei by their centroids (n,), whole numbers at pixel centres."""
        at = (
            np.searchsorted(edges[1:-1], values + 0.5, side="right")
            for edges, values in zip(self.edges, (y, x), strict=True)
        )
        np.add.at(self.nuclei, tuple(at), 1)

    def table(self, name: str) -> list[dict]:
        """A row of COLUMNS for each field in which there is any doubt, the most doubtful first."""
        (top, left), (bottom, right) = (
            np.meshgrid(*(edges[side] for edges in self.edges), indexing="ij")
            for side in (np.s_[:-1], np.s_[1:])
        )
        height, width = bottom - top, right - left
        # As it is written, so that tiles of another size, whose sums are rounded otherwise, give
        # the same order.
        doubt = np.round(self.doubt / (height * width), DIGITS)
        columns = (top, left, height, width, self.nuclei, doubt)
        rows = zip(*(column.ravel().tolist() for column in columns), strict=True)
        rows = sorted((row for row in rows if row[-1] > 0), key=lambda row: -row[-1])
        return [
            dict(zip(COLUMNS, (name, *row, rank), strict=True)) for rank, row in enumerate(rows, 1)
        ]


def _edges(length, side):
    """Where fields begin and end along `length` pixels, int (n + 1,)."""
    count = max(1, round(length / side))
    return np.arange(count + 1) * length // count


def proposed(table: Sequence[dict]) -> Sequence[dict]:
    """The most doubtful SHARE of an image's fields, one at least."""
    return table[: math.ceil(SHARE * len(table))]


# --- of one image


def write_image_review(
    folder: Path | str, table: Sequence[dict], name: str, draw: Callable[..., np.ndarray]
) -> None:
    """Write an image's table of fields, and those that are proposed for QuPath and as pictures.

    `draw` gives a window (y, x, height, width) of the image with its nuclei outlined, RGB uint8.
    Without any field there are no pictures, and nothing is proposed.
    """
    _write_table(path_of(folder, name, "review"), table)
    chosen = proposed(table)
    write_features(path_of(folder, name, "review_geojson"), map(_feature, chosen))
    if tiles := [_small(draw(*_place(row))) for row in chosen[:PICTURES]]:
        pictures.write_image(path_of(folder, name, "review_pictures"), np.concatenate(tiles))


def _write_table(path, rows):
    write_table(path, COLUMNS, ({key: cell(row[key]) for key in COLUMNS} for row in rows))


def _place(row):
    return [row[key] for key in ("y", "x", "height", "width")]


def _feature(row):
    """A field as an annotation, as QuPath reads it (QuPathTypeAdapters.java)."""
    y, x, height, width = _place(row)
    ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    names = uuid.uuid5(uuid.NAMESPACE_URL, ascii(row["image"]))
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(names, f"field {y} {x}")),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {
            "objectType": "annotation",
            "classification": {"name": CLASS, "color": COLOUR},
            "isLocked": False,
            "name": f"Field {row['rank']}",
            "measurements": {"doubt": row["doubt"]},
        },
    }


def _small(pixels):
    """A picture of at most SIDE pixels a side, on SIDE x SIDE white ones."""
    height, width = pixels.shape[:2]
    scale = min(1, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    sheet = np.full((SIDE, SIDE, 3), 255, np.uint8)
    sheet[: size[1], : size[0]] = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return sheet


# --- of a folder


class Field(NamedTuple):
    """A field of a finished image."""

    row: dict  # of COLUMNS
    place: int  # among the image's fields, from the most doubtful on
    pictures: Path | None  # squares of SIDE pixels one below the other, its own at its place


def write_review(folder: Path, names: Iterable[str]) -> tuple[list[Field], list[str]]:
    """Write review.csv: the fields of the finished images `names`, LISTED of them at most.

    Returns the most doubtful ones that have pictures, PICTURES at most, and the faults of images
    whose fields cannot be read, which are left out.
    """
    faults = []

    def fields():
        for name in names:
            try:
                table = _read_table(path_of(folder, name, "review"))
            except (InputError, OSError) as error:
                faults.append(str(error))
                continue
            pictured = len(proposed(table)[:PICTURES])
            path = path_of(folder, name, "review_pictures")
            for place, row in enumerate(table):
                yield Field(row | {"image": name}, place, path if place < pictured else None)

    def order(field):
        return -field.row["doubt"], field.row["image"], field.place

    first = heapq.nsmallest(LISTED, fields(), key=order)
    for rank, field in enumerate(first, 1):
        field.row["rank"] = rank
    _write_table(folder / REVIEW, (field.row for field in first))
    return [field for field in first if field.pictures][:PICTURES], faults


def _read_table(path):
    """The rows of an image's table of fields; InputError if they are none."""
    whole = [key for key in COLUMNS if key not in ("image", "doubt")]
    try:
        return [
            row | {key: int(row[key]) for key in whole} | {"doubt": float(row["doubt"])}
            for row in read_table(path)
        ]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(
            f"{path}: found no table of fields ({error}), expected one by inference.py; delete it "
            f"and run inference.py again"
        ) from error
