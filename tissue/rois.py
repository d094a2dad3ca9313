"""Reads the outlines that ImageJ and Fiji save: one ROI, or a zip of the ROI Manager."""

import logging
import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import roifile
import shapely

from tissue.files import InputError, one_line
from tissue.outlines import (
    Fault,
    Outline,
    box_ring,
    is_region,
    named,
    oval_ring,
    polygons_of,
    ring_of,
)

MOST_ROI = 2**26  # bytes of one ROI, unpacked
_UNPACK = "unpack it"
_INSTEAD = {  # in a zip without a ROI
    ".geojson": _UNPACK,
    ".json": _UNPACK,
    ".xml": "export the annotations as COCO JSON",
}
AREAS = ("POLYGON", "FREEHAND", "TRACED")
# What zipfile and its decoders raise on other bytes, or on what they do not know.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError)
_ZIP_ERRORS += (NotImplementedError, RuntimeError, ValueError)


def read_rois(path: Path, seen: Counter) -> Iterator[Outline]:
    """The outlines of a .roi file, or of a zip of them, as `outline_files.read_outlines` does."""
    if path.suffix.lower() == ".roi":
        with path.open("rb") as file:
            yield from named(path, path.name, _roi, file.read(MOST_ROI + 1), set(), seen)
        return
    slices = set()
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not _is_of_mac(info.filename)]
            _check_content(path, [info.filename for info in infos])
            for info in infos:
                if info.filename.lower().endswith(".roi"):
                    where = f"ROI {info.filename!r:.80}"
                    with archive.open(info) as file:
                        data = file.read(MOST_ROI + 1)
                    yield from named(path, where, _roi, data, slices, seen)
                elif not info.is_dir():
                    seen["files that are no ROI, passed over"] += 1
    except (InputError, FileNotFoundError):
        raise
    except _ZIP_ERRORS as error:
        raise InputError(
            f"{path}: found a zip that cannot be read ({error!s:.100}), expected one of "
            f"ImageJ's ROI Manager, save it anew"
        ) from error


def _is_of_mac(name):
    """Whether a file of a zip is what macOS puts beside each file."""
    return name.startswith("__MACOSX/") or name.rpartition("/")[2].startswith("._")


def _check_content(path, names):
    """Raise InputError for a zip of outlines of another kind."""
    if any(name.lower().endswith(".roi") for name in names):
        return
    for name in names:
        if name.lower().endswith((*_INSTEAD, ".geojson.gz")):
            what = _INSTEAD.get(Path(name).suffix.lower(), _UNPACK)
            raise InputError(f"{path}: found a zip of {name!r:.80}, expected ROIs, {what}")


def _roi(where, data, slices, seen):
    if len(data) > MOST_ROI:
        raise Fault(f"found more than {MOST_ROI:,} bytes, expected one ROI, save it anew")
    logging.getLogger("roifile").setLevel(logging.ERROR)  # names cut off are no matter here
    try:
        roi = roifile.ImagejRoi.frombytes(data)
        kind = roi.roitype.name
        parts = roi.coordinates(multi=True)
    except Exception as error:  # roifile raises nearly anything on other bytes
        said = one_line(error)
        raise Fault(f"found what is no ROI ({said:.100}), save it anew") from error
    if roi.subtype.name in ("TEXT", "ARROW", "IMAGE"):
        seen["texts, arrows and pictures, passed over"] += 1
        return
    if roi.multi_coordinates is not None:  # rings of which an odd number encloses what is within
        rings = [ring_of(part) for part in parts]
        shapes = [shapely.make_valid(shapely.Polygon(ring)) for ring in rings if ring is not None]
        polygons = polygons_of(reduce(shapely.symmetric_difference, shapes, shapely.Polygon()))
    elif kind in AREAS:
        polygons = [[ring_of(parts[0])]]
    elif kind in ("RECT", "OVAL"):
        box = (roi.left, roi.top, roi.right, roi.bottom)
        if roi.subpixelrect:
            box = (roi.xd, roi.yd, roi.xd + roi.widthd, roi.yd + roi.heightd)
        if kind == "RECT" and roi.rounded_rect_arc_size:
            raise Fault("found a rectangle with round corners, expected an outline, draw it so")
        polygons = [[ring_of(oval_ring(*box) if kind == "OVAL" else box_ring(*box))]]
    elif kind == "UNKNOWN":
        raise Fault(
            "found a ROI of a kind that ImageJ does not document, expected an area, draw it"
        )
    else:
        seen["points and lines, passed over"] += 1
        return
    slices.add((roi.position, roi.z_position, roi.t_position))
    if len(slices - {(0, 0, 0)}) > 1:  # 0: of all; channels show one place
        raise Fault(
            "found it in another slice of a stack than ROIs before it, expected those of one "
            "image, save the ROIs of each slice in a file of its own"
        )
    label = roi.name if is_region(roi.name or "") else ""
    yield Outline(where, label, polygons, roi.name or "")
