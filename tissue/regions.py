"""Regions of an image, outlined or painted by a person, and what is counted in each.

A pixel belongs to a region if its centre lies within, and a nucleus if the pixel does that holds
its centroid. So regions that share an edge share no pixel and no nucleus, and leave out none:
what is counted in parts adds up to the whole. Regions that overlap each count all that is in them.
"""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import shapely

from tissue import masks, measures, outlines, windows
from tissue.annotations import LABEL_SUFFIXES, image_name
from tissue.files import InputError, check_regular
from tissue.outline_files import read_outlines
from tissue.shapes import Shapes

MOST = 10_000  # regions of an image; more are nuclei
MOST_PAINTED = 100  # values of an image of classes; more are soft edges, or nuclei
NUCLEI = ("detection", "cell")  # objects of QuPath that no person drew as a region
AS_REGION = outlines.Outline("", "Region", ())


class Regions:
    """The regions of an image of (height, width) pixels.

    `regions` has (name, class) of each, both texts; a class of several regions comes once more as a
    whole, without a name. `notes` are lines that say what was assumed.
    """

    def __init__(self, drawn, regions: list[tuple[str, str]], shape: tuple[int, int], notes=()):
        self.regions, self.shape, self.notes = regions, shape, notes
        self.is_painted = isinstance(drawn, _Painted)
        self._drawn = drawn  # has runs(...), as Shapes

    def meets(self, y: int, x: int, height: int, width: int, of: np.ndarray | None = None) -> bool:
        """Whether any pixel of a window is in a region, in one of those of which `of`, bool (n,),
        holds.
        """
        item = self._drawn.runs(y, x, height, width)[0]
        return bool(item.size if of is None else of[item].any())

    def within(
        self, y: int, x: int, height: int, width: int, of: np.ndarray | None = None
    ) -> np.ndarray:
        """Whether each pixel of a window is in any region, bool (h, w); `of` as `meets` has it."""
        item, row, first, last = self._drawn.runs(y, x, height, width)
        if of is not None:
            row, first, last = (values[of[item]] for values in (row, first, last))
        edges = np.zeros((height, width + 1), np.int32)
        np.add.at(edges, (row, first), 1)
        np.add.at(edges, (row, last), -1)
        return np.cumsum(edges, axis=1)[:, :-1] > 0

    def count(self, y: np.ndarray, x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
        """(pixels int64 (n,), nuclei int64 (n,), sums of their values (n, k)) of each region.

        Centroids `y` and `x` (m,) are whole numbers at pixel centres; `values` is (m, k).
        """
        height, width = self.shape
        place = np.floor(y + 0.5).astype(int) * width + np.floor(x + 0.5).astype(int)
        order = np.argsort(place)
        place = place[order]
        sums = np.zeros((len(place) + 1, values.shape[1]))
        np.cumsum(values[order], axis=0, out=sums[1:])
        pixels, nuclei = np.zeros((2, len(self.regions)), int)
        totals = np.zeros((len(self.regions), values.shape[1]))
        rows = max(1, masks.BAND // width)
        for top in range(0, height, rows):
            item, row, first, last = self._drawn.runs(top, 0, min(rows, height - top), width)
            begin = (top + row) * width
            low, high = np.searchsorted(place, begin + first), np.searchsorted(place, begin + last)
            np.add.at(pixels, item, last - first)
            np.add.at(nuclei, item, high - low)
            np.add.at(totals, item, sums[high] - sums[low])
        return pixels, nuclei, totals

    def pixels(self, y: int, x: int, mask: np.ndarray) -> np.ndarray:
        """How many pixels of a mask, bool (h, w), whose corner lies at y, x, each region has."""
        sums = np.zeros((mask.shape[0], mask.shape[1] + 1), np.int64)
        np.cumsum(mask, axis=1, out=sums[:, 1:])
        item, row, first, last = self._drawn.runs(y, x, *mask.shape)
        found = np.zeros(len(self.regions), np.int64)
        np.add.at(found, item, sums[row, last] - sums[row, first])
        return found

    def close(self) -> None:
        if hasattr(self._drawn, "close"):
            self._drawn.close()


def rows_of(opened: Regions, table: dict[str, np.ndarray], tissue: np.ndarray) -> list[dict]:
    """What is counted in each region, record.Region, by the table of an image's nuclei, which has
    `y`, `x`, `area_px` and `haematoxylin_od`, each (m,), and the pixels (n,) of its `tissue`.
    """
    means = {"nuclear_area_px": "area_px", "haematoxylin_od": "haematoxylin_od"}
    values = np.stack([table[column] for column in means.values()], axis=1)
    rows = []
    for (name, label), pixels, nuclei, total, own in zip(
        opened.regions, *opened.count(table["y"], table["x"], values), tissue, strict=True
    ):
        row = {"region": name, "label": label, "area_px": int(pixels), "nuclei": int(nuclei)}
        row["tissue_px"] = int(own)
        if nuclei:
            row |= dict(zip(means, (total / nuclei).tolist(), strict=True))
        rows.append(row)
    return rows


def open_regions(path: Path, shape: tuple[int, int]) -> Regions:
    """Open the regions of an image of (height, width) pixels.

    Outlines are read as `annotations.open_annotation` reads them, each a region of its class, and
    those of a class Ignore* are cut out of all; an image of numbers is one region for each value
    but 0, and may be smaller than the image by the same factor both ways. Raises InputError that
    names the file, and the outline at fault.
    """
    path, shape = Path(path), tuple(shape)
    check_regular(path)
    painted = path.name.lower().endswith(LABEL_SUFFIXES)
    return (_painted if painted else _outlined)(path, shape)


def _outlined(path, shape):
    seen, found, geometries = Counter(), [], []
    facts = outlines.Facts(path, shape, seen)
    drawn = read_outlines(path, image_name(path), shape, seen)
    while batch := list(islice(drawn, outlines.BATCH)):
        people = [outline for outline in batch if outline.kind not in NUCLEI]
        if passed := len(batch) - len(people):
            seen["detections and cells, passed over"] += passed
        people, made = outlines.geometries_of(people, seen)
        made, kept = facts.take([AS_REGION._replace(where=o.where) for o in people], made)
        found += [people[i] for i in kept]
        geometries += list(made)
        if len(found) > MOST:
            raise InputError(
                f"{path}: found more than {MOST:,} outlines, expected regions, export these "
                f"without the nuclei"
            )
    facts.check()
    found, geometries = _without_ignored(found, geometries, seen)
    said = [f"{path}: {text}: {count}" for text, count in seen.items()]
    if not found:
        raise InputError(
            f"{path}: found no region ({'; '.join(said) or 'it is empty'}), expected a polygon, "
            f"draw one or remove the file"
        )
    whole = shapely.union_all(geometries)
    if shapely.area(geometries).sum() - whole.area >= 1:  # square pixel
        said.append(f"{path}: regions overlap: what lies in several is counted in each")
    regions = list(zip(_names(found), (outline.label for outline in found), strict=True))
    geometries = np.array(geometries, object)
    labels = np.array([outline.label for outline in found], object)
    for label, count in Counter(labels).items():
        if label and count > 1:
            whole = shapely.union_all(geometries[: len(labels)][labels == label])
            geometries = np.append(geometries, whole)
            regions.append(("", label))
    return Regions(Shapes.of(geometries), regions, shape, tuple(said))


def _without_ignored(found, geometries, seen):
    """The outlines and their geometries without what others, of a class Ignore*, lie over."""
    is_ignored = np.array([outlines.is_ignored(outline.label) for outline in found], bool)
    if not is_ignored.any():
        return found, geometries
    geometries = np.array(geometries, object)
    seen["areas of a class Ignore*, left out"] += int(is_ignored.sum())
    left = shapely.difference(geometries, shapely.union_all(geometries[is_ignored]))
    kept = np.flatnonzero(~is_ignored & (shapely.area(left) > 0))
    if hidden := int((~is_ignored).sum()) - len(kept):
        seen["regions wholly within these, passed over"] += hidden
    return [found[i] for i in kept], list(left[kept])


def _names(found):
    """A name for each region, its own or its class's, numbered where several have it."""
    names = [(outline.name or outline.label).strip() or "region" for outline in found]
    often, taken, given = Counter(names), set(names), []
    for name in names:
        number, wanted = 1, name
        if often[name] > 1 or name == "region":
            while (wanted := f"{name} {number}") in taken:
                number += 1
            taken.add(wanted)
        given.append(wanted)
    return given


def _painted(path, shape):
    source = windows.open_depth(path)
    height, width = source.height, source.width
    is_smaller = 2 * height <= shape[0] + 1 and 2 * width <= shape[1] + 1
    is_alike = is_smaller and abs(height * shape[1] - width * shape[0]) <= max(shape)
    if (height, width) != shape and not is_alike:
        raise InputError(
            f"{path}: found {height} x {width} pixels (height x width), expected {shape[0]} x "
            f"{shape[1]} as its image, or half and less of both alike, take that of this image"
        )
    values = np.zeros(1, int)
    rows = max(1, masks.BAND // width)
    for y in range(0, height, rows):
        part = source.read(y, 0, min(rows, height - y), width)
        if (part.dtype.kind == "f" and (part != np.rint(part)).any()) or (part < 0).any():
            raise InputError(
                f"{path}: found values that are no whole numbers from 0 up, expected one for each "
                f"class, save it so"
            )
        values = np.union1d(values, part.astype(int))
        if len(values) > MOST_PAINTED + 1:
            raise InputError(
                f"{path}: found more than {MOST_PAINTED} values, expected one for each class of "
                f"regions, save it without soft edges or as outlines"
            )
    values = values[values > 0]
    if not len(values):
        raise InputError(f"{path}: found nothing but 0, expected the numbers of regions, paint one")
    notes = [f"{path}: each of its {len(values)} values is taken as a class of regions"]
    if (height, width) != shape:
        notes.append(f"{path}: enlarged from {height} x {width} to {shape[0]} x {shape[1]} pixels")
    regions = [(str(value), str(value)) for value in values.tolist()]
    return Regions(_Painted(source, values, shape), regions, shape, tuple(notes))


class _Painted:
    """Windows of an image of numbers as runs of regions, enlarged by the nearest pixel."""

    def __init__(self, source, values, shape):
        self.source, self.values, self.shape = source, values, shape

    def runs(self, y, x, height, width):
        sides = self.source.height, self.source.width
        rows, columns = windows.nearest((y, x, height, width), sides, self.shape)
        top, left = int(rows[0]), int(columns[0])
        part = self.source.read(top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left)
        number = np.searchsorted(self.values, part) + 1
        number = np.where(part > 0, number, 0)[np.ix_(rows - top, columns - left)]
        label, row, first, last = measures.runs_of(number)
        return label - 1, row, first, last

    def close(self):
        self.source.close()
