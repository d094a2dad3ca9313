"""Nuclei for other programs: tables (nuclei_tables.py), GeoJSON (QuPath), label TIFF, ROI zip
(ImageJ), COCO JSON.

A nucleus has the same id in all of them. Polygons are in pixels of the full resolution, x to the
right and y down from the top left corner of the image's first pixel, so that the outer edges of a
nucleus' pixels enclose exactly its area. Texts of JSON are ASCII, so any name survives any reader.
"""

import hashlib
import json
import uuid
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import roifile

from tissue import nuclei_tables
from tissue.files import InputError, one_line, replacing
from tissue.jsons import items_of, writing_items
from tissue.nuclei_tables import Batch, joined, lines
from tissue.pictures import OUTLINE
from tissue.results import path_of
from tissue.tiff import open_tiff

CLASS = "Nucleus"
SMALL, BIG = ("csv", "geojson"), ("parquet", "geojson_gz")  # formats of all images, by `is_big`
MORE = "rois", "coco", "anndata", "csv", "parquet"  # those of --export
BATCH = 5000  # nuclei that are turned into text at once

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

    `formats` are keys of FORMATS, `made_with` is what the tables say of the nuclei, `picture` is
    the file in whose pixels they are, seen from the folder: without it the copy there. Files move
    into their place together when the block ends well; those of other formats that an earlier run
    left are then removed, for their ids hold no more.
    """

    def __init__(
        self,
        folder: Path | str,
        name: str,
        shape: tuple[int, int],
        formats: Sequence[str] = SMALL,
        made_with: dict | None = None,
        picture: str | None = None,
    ):
        self.paths = {key: path_of(folder, name, key) for key in formats}
        self.count = 0  # nuclei
        self._outdated = [path_of(folder, name, key) for key in FORMATS if key not in formats]
        self._image = nuclei_tables.Image(name, *shape, made_with or {}, picture)
        self._columns, self._held = None, []

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
        if raised != (None, None, None):
            self._stack.__exit__(*raised)
            return
        with self._stack:
            self._write()
        for path in self._outdated:
            path.unlink(missing_ok=True)

    def add(self, table: dict[str, np.ndarray], rings: Sequence[np.ndarray]) -> None:
        """Append nuclei: arrays (n,) of one measure each, with `id` and `area_px` among them, and n
        outlines.

        A ring is (k, 2) of whole x, y pixels, closed. NaN is an unknown measure: empty in tables,
        left out elsewhere. Every call must have the same columns. Ids are unique over all calls.
        """
        columns = tuple(table)
        if self._columns not in (None, columns):
            raise ValueError(f"found the columns {columns}, expected {self._columns} as before")
        self._columns = columns
        if len(table["id"]) != len(rings):
            raise ValueError(f"found {len(rings)} rings for {len(table['id'])} nuclei")
        self._held.append((table, rings))
        self.count += len(rings)
        if sum(len(rings) for _, rings in self._held) >= BATCH:
            self._write()

    def _write(self):
        """Write the nuclei that were added since."""
        if not self._held:
            return
        table = {
            key: np.concatenate([np.asarray(table[key]) for table, _ in self._held])
            for key in self._columns
        }
        rings = [ring for _, rings in self._held for ring in rings]
        self._held.clear()
        for start in range(0, max(1, len(rings)), BATCH):  # once without nuclei: their columns
            part = slice(start, start + BATCH)
            batch = Batch({key: values[part] for key, values in table.items()}, rings[part])
            for write in self._writers:
                write(batch)


class Exported(NamedTuple):
    """What `check_exports` found to be the same in all files."""

    nuclei: int
    area_px: int  # of all nuclei together
    files: tuple[str, ...]  # names

    def __str__(self):
        return f"{self.nuclei} nuclei, {self.area_px} pixels, the same in {', '.join(self.files)}"


def formats_of(is_big: bool, more: Sequence[str] | None) -> tuple[str, ...]:
    """The formats of an image's nuclei, with `more` by --export: None without the flag, and without
    a name ROIs and COCO JSON."""
    wanted = (*(BIG if is_big else SMALL), *(("rois", "coco") if more == [] else more or ()))
    return tuple(key for key in FORMATS if key in wanted)


def check_exports(folder: Path | str, name: str, kinds: Sequence[str] = ()) -> Exported:
    """Read back what there is of an image's exports, and compare ids and areas with its table's.

    `kinds` are keys of FORMATS, and "labels", that must be there. The area of a polygon is that of
    its outline (the shoelace formula), of a label its number of pixels. Raises InputError that
    names the file and the first difference.
    """
    path = _table_of(folder, name)
    readers = {key: export.read for key, export in FORMATS.items()} | {"labels": _read_labels}
    paths = {key: path_of(folder, name, key) for key in readers}
    for key in kinds:
        if not paths[key].is_file():
            raise InputError(f"{paths[key]}: not found, expected it beside the others, {_AGAIN}")
    ids, areas = _reading(path, nuclei_tables.read_ids)
    if len(np.unique(ids)) != len(ids):
        raise InputError(f"{path}: found an id twice, expected one row per nucleus, {_AGAIN}")
    files = [path.name]
    for key, other in paths.items():
        if other != path and other.is_file():
            order = np.argsort(ids) if key == "labels" else slice(None)
            _compare(path, ids[order], areas[order], other, *_reading(other, readers[key]))
            files.append(other.name)
    return Exported(len(ids), int(areas.sum()), tuple(files))


def read_measures(folder: Path | str, name: str, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of an image's table of nuclei, float64 (n,) each; InputError if it cannot be read."""
    found = _reading(
        _table_of(folder, name), lambda path: nuclei_tables.read_columns(path, columns)
    )
    return dict(zip(columns, found, strict=True))


def _table_of(folder, name):
    """The table of an image's nuclei: the CSV, or that of a big image."""
    paths = [path_of(folder, name, key) for key in ("csv", "parquet")]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise InputError(
            f"{paths[0]}: not found, nor {paths[1].name}, expected one of them, {_AGAIN}"
        )
    return found


# --- one format each: a context that gives what writes a batch, and what reads ids and areas back


class _Format(NamedTuple):
    write: Callable  # (path, nuclei_tables.Image) -> context of Batch -> None
    read: Callable  # path -> ids, areas


def _write_geojson(path, image):
    """Features as QuPath 0.4 and later reads them (QuPathTypeAdapters.java): it keeps an id only
    if that is a UUID, so the shared id is the name and a measurement. It reads them gzipped too,
    by the ending .gz (PathIO.java)."""
    space = hashlib.sha1(uuid.uuid5(uuid.NAMESPACE_URL, ascii(image.name)).bytes)
    kind = {"objectType": "detection", "classification": {"name": CLASS, "color": OUTLINE}}
    common = json.dumps(kind, separators=(",", ":"))[:-1]

    def features(batch):
        numbers = batch.texts["id"]
        uuids = pa.array([_uuid5(space, number) for number in numbers.to_pylist()], pa.string())
        rings = pc.binary_join(pa.ListArray.from_arrays(batch.first, batch.corners), "],[")
        known = [joined([f"{json.dumps(key)}:", text]) for key, text in batch.texts.items()]
        return lines(joined([
            '{"type":"Feature","id":"', uuids, '","geometry":{"type":"Polygon","coordinates":[[[',
            rings, f']]]}},"properties":{common},"name":"', numbers, '","measurements":{',
            joined(known, ",", null_handling="skip"), "}}}",
        ]), ",\n")  # fmt: skip

    return writing_items(path, {"type": "FeatureCollection"}, "features", features)


def _uuid5(space, text):
    """`str(uuid.uuid5(...))`, by RFC 9562, of a SHA-1 that has the name space already."""
    digest = space.copy()
    digest.update(text.encode())
    found = digest.hexdigest()
    variant = "89ab"[int(found[16], 16) & 3]
    return f"{found[:8]}-{found[8:12]}-5{found[13:16]}-{variant}{found[17:20]}-{found[20:32]}"


def _read_geojson(path):
    return _arrays(
        (
            feature["properties"]["measurements"]["id"],
            _shoelace(np.array(feature["geometry"]["coordinates"][0], float)),
        )
        for feature in items_of(path)
    )


def _write_coco(path, image):
    """The format of cocodataset.org; the picture named has the height and width that it says."""
    picture = {"id": 1, "file_name": image.picture or f"{image.name}_image.png"}
    picture |= {"width": image.width, "height": image.height}
    head = {"images": [picture], "categories": [{"id": 1, "name": CLASS.lower()}]}

    def annotations(batch):
        texts, first = batch.texts, batch.first
        low, high = (f.reduceat(batch.points, first[:-1]) for f in (np.minimum, np.maximum))
        box = [pa.array(side).cast(pa.string()) for side in (*low.T, *(high - low).T)]
        is_last = np.zeros(len(batch.points), bool)
        is_last[first[1:] - 1] = True
        open_rings = first - np.arange(len(first), dtype=np.int32)
        corners = pa.ListArray.from_arrays(open_rings, batch.corners.filter(pa.array(~is_last)))
        score = []
        if "confidence" in texts:
            score = ['"score":', pc.fill_null(texts["confidence"], "null"), ","]
        return lines(joined([
            "{", *score, '"id":', texts["id"], ',"image_id":1,"category_id":1,"segmentation":[[',
            pc.binary_join(corners, ","), ']],"bbox":[', joined(box, ","), '],"area":',
            texts["area_px"], ',"iscrowd":0}',
        ]), ",\n")  # fmt: skip

    return writing_items(path, head, "annotations", annotations)


def _read_coco(path):
    return _arrays(
        (annotation["id"], _shoelace(np.array(annotation["segmentation"][0], float).reshape(-1, 2)))
        for annotation in items_of(path)
    )


@contextmanager
def _write_rois(path, image):
    with zipfile.ZipFile(path, "w") as archive:

        def write(batch):
            numbers = batch.texts["id"].to_pylist()
            for number, (start, stop) in zip(numbers, pairwise(batch.first), strict=True):
                points = batch.points[start : stop - 1]
                far = points.max() > LARGEST_ROI_INTEGER
                points = points.astype(np.float32 if far else np.int32)
                roi = roifile.ImagejRoi.frompoints(points, name=number)
                roi.roitype = roifile.ROI_TYPE.POLYGON
                roi.version = ROI_VERSION
                entry = zipfile.ZipInfo(f"{number}.roi", ROI_TIME)
                entry.external_attr, entry.create_system = ROI_MODE, ROI_SYSTEM
                archive.writestr(entry, roi.tobytes(), zipfile.ZIP_DEFLATED, compresslevel=1)

        yield write


def _read_rois(path):
    with zipfile.ZipFile(path) as archive:
        rois = map(roifile.ImagejRoi.frombytes, map(archive.read, archive.namelist()))
        return _arrays((int(roi.name), _shoelace(roi.coordinates().astype(float))) for roi in rois)


FORMATS = {
    "csv": _Format(nuclei_tables.write_csv, nuclei_tables.read_ids),
    "parquet": _Format(nuclei_tables.write_parquet, nuclei_tables.read_ids),
    "geojson": _Format(_write_geojson, _read_geojson),
    "geojson_gz": _Format(_write_geojson, _read_geojson),
    "rois": _Format(_write_rois, _read_rois),
    "coco": _Format(_write_coco, _read_coco),
    "anndata": _Format(nuclei_tables.write_anndata, nuclei_tables.read_ids),
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
        # Of the file and not of its content, as pyarrow's and gzip's errors may be too.
        if isinstance(error, InputError) or getattr(error, "filename", None):
            raise
        said = one_line(error)
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
