"""Outlines of one image's nuclei, as files have them: gathered, mended, checked."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely

from tissue.files import InputError
from tissue.shapes import Shapes

BATCH = 2000  # outlines that are checked at once
LARGEST = 2**24  # pixels; up to there float32 holds whole numbers
MOST_POINTS = 10**6  # corners of one outline
UNCLASSIFIED, LONGEST_CLASS = "unclassified", 80  # letters
OVAL_CORNERS = 256
_DEGREES = 180, 90  # longitude, latitude
_HUGE = 50  # times the median nucleus: no nucleus (13 times is the most in four public sets)
# Square micrometres and pixels of a nucleus; 234 (at 0.25 um) and 6,845 at most in these sets.
_LARGEST_UM2, _LARGEST_PX = 1000, 8000
_TINY = 10  # square pixels; no median nucleus is so small
# Parts of an outline, and of all on average; 2 and 1.06 at most in 681 images of four public sets.
_MOST_PARTS, _MOST_ON_AVERAGE = 8, 2
_CRUMB = 1 / 20  # of the largest part; what is smaller is no nucleus beside it


class Fault(ValueError):
    """What is wrong with one outline: found, expected, what to do; whoever has the file adds it."""


class Outline(NamedTuple):
    """One outline as a file has it."""

    where: str  # which of the file: "feature 3"
    label: str  # its class, "" without
    # Polygons, each a list of closed rings float64 (k, 2) of x, y; all but the first are holes.
    polygons: Sequence[Sequence[np.ndarray]]
    name: str = ""  # its own, if it has one
    kind: str = ""  # of a QuPath object: "annotation", "detection", ...


class Gathered(NamedTuple):
    """What `gather` makes of a file's outlines."""

    nuclei: Shapes
    classes: dict[str, int]
    regions: shapely.Geometry | None
    notes: tuple[str, ...]


def named(path, where, read, *given):
    """What `read(where, *given)` yields; what it finds wrong names file and place."""
    try:
        yield from read(where, *given)
    except Fault as fault:
        raise InputError(f"{path}: {where}: {fault}") from fault
    except RecursionError as error:
        raise InputError(
            f"{path}: {where}: found an object that is nested too deep, expected an outline, draw "
            f"it anew"
        ) from error


def ring_of(points) -> np.ndarray | None:
    """A closed ring, float64 (k, 2), of nested lists of numbers; None of fewer than three corners.

    Raises Fault for what are no finite coordinates, or too many.
    """
    if isinstance(points, list) and not points:
        return None
    try:
        ring = np.asarray(points)
    except (ValueError, OverflowError):
        ring = np.empty(0)
    if ring.ndim != 2 or ring.shape[1] < 2 or ring.dtype.kind not in "iuf":
        raise Fault("found coordinates that are no list of [x, y], expected numbers in pixels")
    if len(ring) > MOST_POINTS:
        raise Fault(
            f"found an outline of {len(ring):,} corners, expected {MOST_POINTS:,} at most, "
            f"simplify or remove it"
        )
    with np.errstate(invalid="ignore"):  # NaN of any kind
        ring = ring[:, :2].astype(float)
    if not (np.abs(ring) <= LARGEST).all():  # neither is NaN
        raise Fault(
            f"found coordinates that are not finite or beyond {LARGEST:,}, expected pixels of the "
            f"image, draw it anew or remove it"
        )
    if len(ring) and (ring[0] != ring[-1]).any():
        ring = np.concatenate([ring, ring[:1]])
    return ring if len(ring) > 3 else None


def polygons_of(geometry: shapely.Geometry) -> list[list[np.ndarray]]:
    """The polygons of a shapely geometry, as Outline has them."""
    parts = [g for g in shapely.get_parts(geometry) if g.geom_type == "Polygon"]
    return [[shapely.get_coordinates(r) for r in (p.exterior, *p.interiors)] for p in parts]


def box_ring(left, top, right, bottom):
    """The closed ring of a rectangle."""
    return polygons_of(shapely.box(left, top, right, bottom))[0][0]


def oval_ring(left, top, right, bottom):
    """The closed ring of an ellipse in a rectangle."""
    turn = np.linspace(0, 2 * math.pi, OVAL_CORNERS + 1)
    turn[-1] = 0
    x, y = (left + right) / 2, (top + bottom) / 2
    return np.stack(
        [x + (right - left) / 2 * np.cos(turn), y + (bottom - top) / 2 * np.sin(turn)], axis=1
    )


def is_region(label: str) -> bool:
    """Whether a class says where the annotation is complete, instead of naming a nucleus."""
    label = label.strip("_* ").lower()
    return label.startswith("region") or label == "training" or is_ignored(label)


def is_ignored(label: str) -> bool:
    """Whether a class says where nothing is annotated (QuPath's Ignore*, labelme's __ignore__)."""
    return label.strip("_* ").lower().startswith("ignore")


def gather(
    path: Path,
    outlines: Iterable[Outline],
    shape: tuple[int, int],
    seen: Counter,
    pixel_size_um: float | None = None,
) -> Gathered:
    """Check outlines of an image of (height, width) pixels, mend what can be, drop what is outside.

    Self-crossing outlines become what their lines enclose (shapely.make_valid). Those without area,
    and those wholly outside of the image, are passed over. Each of these is a note, as is what
    `seen` has, {text: how often}, when they are read. Raises InputError for outlines that cannot be
    the nuclei of this image (by their size too, where that of a pixel is known), and where one
    holds many nuclei.
    """
    classes = Counter()
    facts = Facts(path, shape, seen, pixel_size_um)
    regions, ignored, shapes = [], [], []
    outlines = iter(outlines)
    while batch := list(islice(outlines, BATCH)):
        batch, geometries = geometries_of(batch, seen)
        geometries, kept = facts.take(batch, geometries)
        is_nucleus = np.array([not is_region(batch[i].label) for i in kept], bool)
        for i, geometry in zip(kept[~is_nucleus], geometries[~is_nucleus], strict=True):
            (ignored if is_ignored(batch[i].label) else regions).append(geometry)
        shapes.append(Shapes.of(geometries[is_nucleus]))
        classes.update(_class(batch[i].label) for i in kept[is_nucleus])
    facts.check()
    region = whole = shapely.box(0, 0, *shape[::-1])
    if regions:
        region = shapely.intersection(shapely.union_all(regions), whole)
    if ignored:
        region = shapely.difference(region, shapely.union_all(ignored))
    if (regions or ignored) and not region.area:
        raise InputError(
            f"{path}: found no part of the image that is annotated, expected a region within it or "
            f"none at all, draw it anew"
        )
    said = [f"{text}: {count}" for text, count in seen.items()]
    if said and not classes and not regions:
        raise InputError(
            f"{path}: found no outline of a nucleus ({'; '.join(said)}), expected some, or an "
            f"empty file for an image without nuclei; draw them as polygons"
        )
    notes = tuple(f"{path}: {text}" for text in said)
    if not classes:
        notes += (f"{path}: no nucleus is outlined: taken as an image without nuclei",)
    return Gathered(
        Shapes.joined(shapes), dict(classes), region if regions or ignored else None, notes
    )


def geometries_of(batch: Sequence[Outline], seen: Counter) -> tuple[list[Outline], np.ndarray]:
    """(those outlines that have an area, their geometries: polygons and multipolygons, valid)"""
    batch = [
        outline._replace(polygons=[[ring for ring in polygon if ring is not None] for polygon in
                                   outline.polygons if polygon and polygon[0] is not None])
        for outline in batch
    ]  # fmt: skip
    drawn = [outline for outline in batch if outline.polygons]
    geometries = np.empty(0, object)
    if drawn:
        polygons = [(i, polygon) for i, o in enumerate(drawn) for polygon in o.polygons]
        rings = [(i, ring) for i, (_, polygon) in enumerate(polygons) for ring in polygon]
        of_ring = np.repeat(np.arange(len(rings)), [len(ring) for _, ring in rings])
        geometries = shapely.linearrings(np.concatenate([r for _, r in rings]), indices=of_ring)
        geometries = shapely.polygons(geometries, indices=[i for i, _ in rings])
        geometries = shapely.multipolygons(geometries, indices=[i for i, _ in polygons])
        if len(bad := np.flatnonzero(~shapely.is_valid(geometries))):
            # By structure: what a ring encloses twice is within, not a hole.
            geometries[bad] = shapely.make_valid(
                geometries[bad], method="structure", keep_collapsed=False
            )
        area = shapely.area(geometries)
        if mended := int((area[bad] > 0).sum()):
            first = drawn[bad[area[bad] > 0][0]].where
            _note(seen, "outlines that cross or touch themselves, mended", first, mended)
        drawn = [outline for outline, one in zip(drawn, area, strict=True) if one]
        geometries = geometries[area > 0]
    left = {id(outline) for outline in drawn}
    if empty := [outline.where for outline in batch if id(outline) not in left]:
        _note(seen, "outlines without area, passed over", empty[0], len(empty))
    return drawn, geometries


def _class(label):
    """A class as a name that fits into a line."""
    plain = "".join(letter if letter.isprintable() else " " for letter in label[:LONGEST_CLASS])
    return " ".join(plain.split()) or UNCLASSIFIED


def _note(seen, text, first, count=1):
    """Count what a note tells, which names the first."""
    known = next((key for key in seen if key.startswith(text)), f"{text} (the first: {first})")
    seen[known] += count


class Facts:
    """What must be true of all outlines of an image together."""

    def __init__(self, path, shape, seen, pixel_size_um=None):
        self.path, self.seen, self.pixel_size_um = path, seen, pixel_size_um
        self.height, self.width = shape
        self.size = f"an image of {self.height} x {self.width} pixels (height x width)"
        self.low, self.high = np.full(2, np.inf), np.full(2, -np.inf)
        self.whole = True  # coordinates
        self.count, self.astray = 0, 0
        self.areas, self.largest = [], (0.0, "", "")
        self.parts, self.most_parts = 0, (0, "")

    def take(self, batch, geometries):
        """(the geometries that lie in the image, at least in part; their places in the batch)"""
        if not len(geometries):
            return geometries, np.empty(0, int)
        bounds, size = shapely.bounds(geometries), (self.width, self.height)
        self.low = np.minimum(self.low, bounds[:, :2].min(axis=0))
        self.high = np.maximum(self.high, bounds[:, 2:].max(axis=0))
        self.whole = self.whole and bool((bounds == np.rint(bounds)).all())
        middle = (bounds[:, :2] + bounds[:, 2:]) / 2
        self.count += len(bounds)
        self.astray += int(((middle < 0) | (middle > size)).any(axis=1).sum())
        outside = (bounds[:, 2:] <= 0).any(axis=1) | (bounds[:, :2] >= size).any(axis=1)
        across = ~outside & ((bounds[:, :2] < 0) | (bounds[:, 2:] > size)).any(axis=1)
        lost = [
            o.where for o, far in zip(batch, outside, strict=True) if far and is_region(o.label)
        ]
        if lost:
            raise InputError(
                f"{self.path}: {lost[0]}: found a region outside of {self.size}, expected one "
                f"within it, draw it anew"
            )
        for text, which in (
            ("outlines outside of the image, passed over", outside),
            ("outlines that reach beyond the image, clipped", across),
        ):
            if which.any():
                _note(self.seen, text, batch[np.argmax(which)].where, int(which.sum()))
        kept = np.flatnonzero(~outside)
        nuclei = [i for i in kept if not is_region(batch[i].label)]
        areas = shapely.area(geometries[nuclei])
        self.areas.append(areas)
        if len(areas) and areas.max() > self.largest[0]:
            outline = batch[nuclei[np.argmax(areas)]]
            self.largest = float(areas.max()), outline.where, outline.label
        self._count_parts([batch[i].where for i in nuclei], geometries[nuclei])
        return geometries[kept], kept

    def _count_parts(self, where, geometries):
        """Count in how many parts nuclei lie; crumbs, as a brush leaves them, are none."""
        several = np.flatnonzero(shapely.get_num_geometries(geometries) > 1)
        self.parts += len(geometries) - len(several)
        first = ""
        for index in several:
            areas = shapely.area(shapely.get_parts(geometries[index]))
            parts = max(1, np.count_nonzero(areas >= max(_TINY, _CRUMB * areas.max())))
            self.parts += parts
            if parts > self.most_parts[0]:
                self.most_parts = parts, where[index]
            if parts > 1:
                first = first or where[index]
                _note(self.seen, "outlines of several parts, taken as one nucleus each", first)

    def check(self):
        """Raise InputError if these cannot be the nuclei of the image."""
        if not self.count:
            return
        areas = np.concatenate(self.areas)
        median = float(np.median(areas)) if len(areas) else 0.0
        within = (-np.array(_DEGREES) <= self.low).all() and (self.high <= _DEGREES).all()
        much_bigger = self.width >= 10 * _DEGREES[0] and self.height >= 10 * _DEGREES[1]
        may_be = "json" in self.path.name.lower()
        if may_be and within and not self.whole and (much_bigger or median < _TINY):
            raise InputError(
                f"{self.path}: found coordinates like longitude and latitude, within "
                f"{self.low.min():g} to {self.high.max():g}, for {self.size}, expected pixels; "
                f"export them in pixels, or outline a nucleus elsewhere too if they are"
            )
        if self.astray > self.count / 2:
            x, y = self.high
            raise InputError(
                f"{self.path}: found {self.astray} of {self.count} outlines outside {self.size}, "
                f"up to x = {x:g}, y = {y:g}, expected those of this image; name it as its own "
                f"image, and export it at full resolution"
            )
        self._check_parts(len(areas))
        largest, where, label = self.largest
        if len(areas) > 2 and largest > _HUGE * median:
            raise InputError(
                f"{self.path}: {where}: found an outline of {largest:,.0f} pixels (class "
                f"{label or UNCLASSIFIED!r:.60}), {largest / median:,.0f} times the median of the "
                f"others, expected a nucleus; give it the class Region if all nuclei in it are "
                f"outlined, else remove it"
            )
        self._check_size(areas)

    def _check_size(self, areas):
        """Raise InputError where nuclei are larger than any, or say it without a pixel size.

        Of one or two, the largest tells: there are no others to compare it with.
        """
        if not len(areas):
            return
        largest, where, label = self.largest
        area = largest if len(areas) <= 2 else float(np.median(areas))
        um2 = area * (self.pixel_size_um or 0) ** 2
        if um2 > _LARGEST_UM2:
            what = f"an outline of {area:,.0f} pixels (class {label or UNCLASSIFIED!r:.60})"
            found = f"{where}: found {what}" if len(areas) <= 2 else "found outlines with a median"
            raise InputError(
                f"{self.path}: {found} of {um2:,.0f} square micrometres, expected nuclei, of "
                f"{_LARGEST_UM2:,} at most; give the class Region to where all nuclei are "
                f"outlined, outline others too if this is a giant nucleus, or correct the pixel "
                f"size of {self.pixel_size_um:g} um"
            )
        if not self.pixel_size_um and len(areas) <= 2 and area > _LARGEST_PX:
            text = f"outlines of more than {_LARGEST_PX:,} pixels, taken as nuclei (regions?)"
            _note(self.seen, text, where)

    def _check_parts(self, nuclei):
        """Raise InputError where one outline holds many of a number of nuclei."""
        most, where = self.most_parts
        if most > _MOST_PARTS:
            found = f"{where}: found one outline of {most} parts, expected one nucleus"
        elif nuclei > 2 and self.parts > _MOST_ON_AVERAGE * nuclei:
            found = f"found {nuclei} outlines of {self.parts} parts, expected one nucleus each"
        else:
            return
        raise InputError(
            f"{self.path}: {found}; split what is merged (QuPath: Objects > Annotations > Split; "
            f"ImageJ's ROI Manager: More > Split; COCO: one annotation a nucleus; labelme: no "
            f"group_id), or give it the class Region if all nuclei in it are outlined"
        )
