"""Nuclei for other programs: CSV, GeoJSON (QuPath), label TIFF, ROI zip (ImageJ), COCO JSON.

A nucleus has the same id in all of them. Polygons are in pixels of the full resolution, x to the
right and y down from the top left corner of the image's first pixel, so that the outer edges of a
nucleus' pixels enclose exactly its area. Texts of JSON are ASCII, so any name survives any reader.
"""

import csv
import json
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np
import roifile

from tissue.files import InputError, replacing
from tissue.pictures import OUTLINE
from tissue.results import path_of
from tissue.tiff import open_tiff

CLASS = "Nucleus"
DIGITS = 4  # decimals kept of a measure
BATCH = 5000  # nuclei that are turned into text at once
TILE = 256  # pixels; side of a tile of the label image

# ImageJ keeps whole coordinates in 16 bits. Since this version of the format (and ImageJ 1.46) it
# reads 32-bit floats beside them, which are exact up to 2**24.
ROI_VERSION = 228
LARGEST_ROI_INTEGER = 32767

_AGAIN = "run inference.py with --overwrite"

# Of the files in a ROI zip, so that equal nuclei give equal bytes: the first time that a zip can
# tell, a plain file, made on Unix.
ROI_TIME, ROI_MODE, ROI_SYSTEM = (1980, 1, 1, 0, 0, 0), 0o644 << 16, 3


class NucleiFiles:
    """Writes the files of one image's nuclei as the nuclei come, so that any number fits.

        with NucleiFiles(folder, name, (height, width)) as files:
            for table, rings in batches:
                files.add(table, rings)

    `formats` are keys of FORMATS. Files move into their place together when the block ends well;
    those of other formats that an earlier run left are then removed, for their ids hold no more.
    """

    def __init__(
        self,
        folder: Path | str,
        name: str,
        shape: tuple[int, int],
        formats: Sequence[str] = ("csv", "geojson"),
    ):
        self.paths = {key: path_of(folder, name, key) for key in formats}
        self.count = 0  # nuclei
        self._outdated = [path_of(folder, name, key) for key in FORMATS if key not in formats]
        self._image = _Image(name, *shape)
        self._columns = None

    def __enter__(self):
        with ExitStack() as stack:
            besides = [stack.enter_context(replacing(path)) for path in self.paths.values()]
            # Closed before anything is moved: a full disk may show only then.
            files = stack.enter_context(ExitStack())
            self._writers = [
                files.enter_context(FORMATS[key].write(beside, self._image))
                for key, beside in zip(self.paths, besides, strict=True)
            ]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised):
        self._stack.__exit__(*raised)
        if raised == (None, None, None):
            for path in self._outdated:
                path.unlink(missing_ok=True)

    def add(self, table: dict[str, np.ndarray], rings: Sequence[np.ndarray]) -> None:
        """Append nuclei: arrays (n,) of one measure each, with `id` among them, and n outlines.

        A ring is (k, 2) of x, y pixels, closed or not. NaN is an unknown measure: empty in the CSV,
        left out elsewhere. Every call must have the same columns. Ids are unique over all calls.
        """
        columns = tuple(table)
        if self._columns not in (None, columns):
            raise ValueError(f"found the columns {columns}, expected {self._columns} as before")
        self._columns = columns
        for start in range(0, max(1, len(rings)), BATCH):  # once without nuclei: the CSV's header
            values = [_plain(column[start : start + BATCH]) for column in table.values()]
            rows = list(zip(*values, strict=True))
            closed = [_closed(ring) for ring in rings[start : start + BATCH]]
            if len(rows) != len(closed):
                raise ValueError(f"found {len(closed)} rings for {len(rows)} nuclei")
            for write in self._writers:
                write(columns, rows, closed)
        self.count += len(rings)


class Exported(NamedTuple):
    """What `check_exports` found to be the same in all files."""

    nuclei: int
    area_px: int  # of all nuclei together
    files: tuple[str, ...]  # names

    def __str__(self):
        return f"{self.nuclei} nuclei, {self.area_px} pixels, the same in {', '.join(self.files)}"


def check_exports(folder: Path | str, name: str, kinds: Sequence[str] = ()) -> Exported:
    """Read back what there is of an image's exports, and compare ids and areas with the CSV's.

    `kinds` are keys of FORMATS, and "labels", that must be there. The area of a polygon is that of
    its outline (the shoelace formula), of a label its number of pixels. Raises InputError that
    names the file and the first difference.
    """
    readers = {key: export.read for key, export in FORMATS.items()} | {"labels": _read_labels}
    paths = {key: path_of(folder, name, key) for key in readers}
    for key, path in paths.items():
        if key in ("csv", *kinds) and not path.is_file():
            raise InputError(f"{path}: not found, expected it beside the others, {_AGAIN}")
    path = paths.pop("csv")
    ids, areas = _reading(path, readers["csv"])
    if len(np.unique(ids)) != len(ids):
        raise InputError(f"{path}: found an id twice, expected one row per nucleus, {_AGAIN}")
    files = [path.name]
    for key, other in paths.items():
        if other.is_file():
            order = np.argsort(ids) if key == "labels" else slice(None)
            _compare(path, ids[order], areas[order], other, *_reading(other, readers[key]))
            files.append(other.name)
    return Exported(len(ids), int(areas.sum()), tuple(files))


def read_measures(folder: Path | str, name: str, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of an image's table of nuclei, float64 (n,) each; InputError if it cannot be read."""

    def read(path):
        with path.open(encoding="utf-8") as file:
            head = file.readline().rstrip().split(",")
            if head == ["id"] or not (line := file.readline()):
                return np.empty((len(columns), 0))
            at = [head.index(column) for column in columns]
            lines = chain([line], file)
            return np.loadtxt(lines, delimiter=",", usecols=at, ndmin=2, unpack=True)

    return dict(zip(columns, _reading(path_of(folder, name, "csv"), read), strict=True))


# --- one format each: a context that gives what writes a batch, and what reads ids and areas back


class _Image(NamedTuple):
    name: str
    height: int  # pixels
    width: int


class _Format(NamedTuple):
    write: Callable  # (path, _Image) -> context of (columns, rows, rings) -> None
    read: Callable  # path -> ids, areas


@contextmanager
def _write_csv(path, image):
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)

        def write(columns, rows, rings):
            if file.tell() == 0:
                table.writerow(columns)
            table.writerows(rows)

        yield write
        if file.tell() == 0:
            table.writerow(["id"])


def _read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if "id" not in (rows.fieldnames or ()):
            raise ValueError("its header is missing")
        return _arrays((int(row["id"]), float(row["area_px"])) for row in rows)


def _write_geojson(path, image):
    """Features as QuPath 0.4 and later reads them (QuPathTypeAdapters.java): it keeps an id only
    if that is a UUID, so the shared id is the name and a measurement."""
    uuids = uuid.uuid5(uuid.NAMESPACE_URL, ascii(image.name))
    common = {"objectType": "detection", "classification": {"name": CLASS, "color": OUTLINE}}

    def feature(measures, ring):
        number = str(measures["id"])
        known = {key: value for key, value in measures.items() if value is not None}
        return {
            "type": "Feature",
            "id": str(uuid.uuid5(uuids, number)),
            "geometry": {"type": "Polygon", "coordinates": [ring.tolist()]},
            "properties": {**common, "name": number, "measurements": known},
        }

    return _json_lines(path, {"type": "FeatureCollection"}, "features", feature)


def _read_geojson(path):
    return _arrays(
        (
            feature["properties"]["measurements"]["id"],
            _shoelace(np.array(feature["geometry"]["coordinates"][0], float)),
        )
        for feature in _lines(path)
    )


def _write_coco(path, image):
    """The format of cocodataset.org; the picture named is the copy beside the file."""
    picture = {"id": 1, "file_name": f"{image.name}_image.png"}
    picture |= {"width": image.width, "height": image.height}
    head = {"images": [picture], "categories": [{"id": 1, "name": CLASS.lower()}]}

    def annotation(measures, ring):
        corner = ring.min(axis=0)
        score = {"score": measures["confidence"]} if "confidence" in measures else {}
        return score | {
            "id": measures["id"],
            "image_id": 1,
            "category_id": 1,
            "segmentation": [ring[:-1].ravel().tolist()],
            "bbox": [*corner.tolist(), *(ring.max(axis=0) - corner).tolist()],
            "area": measures.get("area_px", _shoelace(ring)),
            "iscrowd": 0,
        }

    return _json_lines(path, head, "annotations", annotation)


def _read_coco(path):
    return _arrays(
        (annotation["id"], _shoelace(np.array(annotation["segmentation"][0], float).reshape(-1, 2)))
        for annotation in _lines(path)
    )


@contextmanager
def _write_rois(path, image):
    with zipfile.ZipFile(path, "w") as archive:

        def write(columns, rows, rings):
            at = columns.index("id")
            for row, ring in zip(rows, rings, strict=True):
                far = ring.dtype.kind == "f" or ring.max() > LARGEST_ROI_INTEGER
                points = ring[:-1].astype(np.float32 if far else np.int32)
                roi = roifile.ImagejRoi.frompoints(points, name=str(row[at]))
                roi.roitype = roifile.ROI_TYPE.POLYGON
                roi.version = ROI_VERSION
                entry = zipfile.ZipInfo(f"{row[at]}.roi", ROI_TIME)
                entry.external_attr, entry.create_system = ROI_MODE, ROI_SYSTEM
                archive.writestr(entry, roi.tobytes(), zipfile.ZIP_DEFLATED, compresslevel=1)

        yield write


def _read_rois(path):
    with zipfile.ZipFile(path) as archive:
        rois = map(roifile.ImagejRoi.frombytes, map(archive.read, archive.namelist()))
        return _arrays((int(roi.name), _shoelace(roi.coordinates().astype(float))) for roi in rois)


FORMATS = {
    "csv": _Format(_write_csv, _read_csv),
    "geojson": _Format(_write_geojson, _read_geojson),
    "rois": _Format(_write_rois, _read_rois),
    "coco": _Format(_write_coco, _read_coco),
}


def _read_labels(path):
    ids, areas = [np.empty(0, int)], [np.empty(0, int)]
    with open_tiff(path) as tif:
        for tile, _, (_, height, width, _) in tif.pages.first.segments():
            tile = tile[0, :height, :width]
            found, pixels = np.unique(tile[tile > 0], return_counts=True)
            ids.append(found.astype(int))
            areas.append(pixels)
    found, where = np.unique(np.concatenate(ids), return_inverse=True)
    return found, np.bincount(where, np.concatenate(areas), len(found))


# --- shared by the formats


@contextmanager
def _json_lines(path, head, key, item):
    """A JSON object: `head` and a list under `key`, one item a line so that none need be held."""
    with path.open("w", encoding="ascii") as file:
        file.write(f'{json.dumps(head)[:-1]}, "{key}": [')
        separator = "\n"

        def write(columns, rows, rings):
            nonlocal separator
            for row, ring in zip(rows, rings, strict=True):
                file.write(separator)
                measures = dict(zip(columns, row, strict=True))
                file.write(json.dumps(item(measures, ring), separators=(",", ":")))
                separator = ",\n"

        yield write
        file.write("\n]}\n")


def _lines(path) -> Iterator[dict]:
    """The items that `_json_lines` wrote."""
    with path.open(encoding="ascii") as file:
        file.readline()
        for line in file:
            if line == "]}\n":
                return
            yield json.loads(line.rstrip(",\n"))
    raise ValueError("its end is missing")


def _plain(column):
    """A measure as Python's numbers, floats rounded; None where it is not known."""
    column = np.asarray(column)
    if column.dtype.kind in "bui":
        return column.astype(int).tolist()
    rounded = np.round(column.astype(float), DIGITS) + 0.0  # turns -0.0 into 0.0
    return [value if isfinite(value) else None for value in rounded.tolist()]


def _closed(ring):
    """A ring with its first point repeated at its end, int64 where all coordinates are whole."""
    ring = np.asarray(ring)
    whole = ring.astype(np.int64)
    if (whole == ring).all():
        ring = whole
    return ring if (ring[0] == ring[-1]).all() else np.concatenate([ring, ring[:1]])


def _shoelace(ring):
    """Area within a ring (k, 2), closed or not."""
    x, y = (ring - ring[0]).T
    return abs(float(x[:-1] @ y[1:] - x[1:] @ y[:-1])) / 2


def _arrays(pairs):
    """Ids int64 (n,) and areas float64 (n,) of pairs of them."""
    table = np.fromiter(pairs, "i8, f8")
    return table["f0"], table["f1"]


def _reading(path, read):
    """Call `read(path)`, and turn what it raises on bytes that are not ours into InputError."""
    try:
        return read(path)
    except Exception as error:  # readers raise nearly anything on other bytes
        if isinstance(error, OSError) and error.filename:  # the file's, not its content's
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: found a file that cannot be read back ({said:.200}), expected what "
            f"inference.py writes, {_AGAIN}"
        ) from error


def _compare(path, ids, areas, other, other_ids, other_areas):
    if len(ids) != len(other_ids):
        found, expected = f"{len(other_ids)} nuclei", f"{len(ids)}"
    elif len(different := np.flatnonzero(ids != other_ids)):
        at = different[0]
        found, expected = f"id {other_ids[at]} at nucleus {at + 1}", f"id {ids[at]}"
    elif len(different := np.flatnonzero(np.abs(areas - other_areas) > 1e-6 * areas)):
        at = different[0]
        found, expected = f"{other_areas[at]:g} pixels for nucleus {ids[at]}", f"{areas[at]:g}"
    else:
        return
    raise InputError(f"{other}: found {found}, expected {expected} as in {path}, {_AGAIN}")
