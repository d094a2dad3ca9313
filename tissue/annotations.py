"""Nuclei that a person outlined in another program, read by windows as a reference mask is.

They lie in `annotations/`, one file per image, of the image's name. docs/own_data.md has the rules.
"""

import threading
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely

from tissue import masks, outlines, shapes, windows
from tissue.files import InputError, check_regular
from tissue.masks import ANNOTATION_FOLDER
from tissue.outline_files import read_features, read_outlines
from tissue.outlines import is_region
from tissue.pairs import Files, name_fault, name_of, same_name

LABEL_SUFFIXES = (".png", ".tif", ".tiff")
# What follows the image's name, the longest first: those of our own exports too.
ENDINGS = (
    *("_nuclei.geojson.gz", "_nuclei.geojson", ".geojson.gz", ".geojson"),
    *("_coco.json", ".json", "_rois.zip", ".zip", ".roi"),
    *(f"{kind}{suffix}" for kind in ("_cp_masks", "_labels", "") for suffix in LABEL_SUFFIXES),
)
INSTEAD = {  # endings that hold outlines which cannot be read, and what to do
    "_seg.npy": "in Cellpose choose 'save masks as PNG/tif', or 'save outlines as .zip archive'",
    ".qpdata": "in QuPath choose File > Export objects as GeoJSON",
    ".qpproj": "in QuPath choose File > Export objects as GeoJSON",
    ".xml": "save the outlines as GeoJSON",
    ".jpg": "save label maps as PNG: JPEG holds no numbers",
    ".jpeg": "save label maps as PNG: JPEG holds no numbers",
}


class Changes(NamedTuple):
    """Nuclei that were corrected, by `compare`."""

    added: int
    deleted: int
    changed: int


class Annotation(windows.MaskWindows):
    """Annotated nuclei of an image, by windows as a mask and as numbers (see `MaskWindows`).

    Numbers are int32, 1 to `nuclei` in the order of the file (of a label map: of its values), the
    same in every window. `classes` counts them by class. `regions`, a shapely geometry in pixels,
    is where all nuclei are annotated, None for everywhere.
    """

    def __init__(self, path, pixels, shape, classes, regions=None):
        is_big = shape[0] * shape[1] >= windows.BIG
        super().__init__(path, pixels, [tuple(shape)], is_big, pixel_size=1)  # not to be looked up
        self.pixel_size_um = None
        self.classes, self.regions = classes, regions
        self.nuclei = sum(classes.values())
        parts = shapely.get_parts(regions)
        self._known = shapes.Shapes.of(parts[shapely.area(parts) > 0])

    def known(self, y: int, x: int, height: int, width: int) -> np.ndarray | None:
        """Whether each pixel of a window is annotated, bool (h, w); None without regions."""
        if self.regions is None:
            return None
        return self._known.numbers(y, x, height, width) > 0

    def scaled(self, height: int, width: int) -> "Annotation":
        """The same nuclei on the image resampled to (height, width) pixels."""
        factor = width / self.width, height / self.height
        regions = self.regions
        if regions is not None:
            regions = shapely.transform(regions, lambda points: points * factor)
        pixels = self._pixels.scaled(height, width)
        return Annotation(self.path, pixels, (height, width), self.classes, regions)


def find_annotations(
    folder: str | Path, images: Container[str] = (), more: Sequence[str] = ()
) -> Files:
    """Return {image name: path} of the annotations in a folder; empty if it is not there.

    `images` are the names known, and `more` endings beside ENDINGS (see `image_name`). Hidden files
    and other endings are passed over. Raises one InputError with all faults: several files of one
    image, names no image can have, and files that cannot be read (`INSTEAD`).
    """
    named, faults = {}, []
    folder = Path(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        lower = path.name.lower()
        if path.name.startswith(".") or path.is_dir():
            continue
        if ending := next((ending for ending in INSTEAD if lower.endswith(ending)), None):
            faults.append(f"{path}: found a file that is not read, {INSTEAD[ending]}")
        elif lower.endswith(ENDINGS):
            name = image_name(path, images, more)
            if fault := name_fault(name):
                faults.append(f"{path}: found {fault}, expected that of an image, rename it")
            named.setdefault(same_name(name), []).append((name, path))
    for _, several in sorted(named.items()):
        if len(several) > 1:
            faults.append(
                f"{' and '.join(str(path) for _, path in several)}: found several annotations of "
                f"image {several[0][0]}, expected one, remove the others"
            )
    if faults:
        raise InputError("; ".join(faults))
    return Files(dict(several[0] for several in named.values()))


def image_name(path: Path, images: Container[str] = (), more: Sequence[str] = ()) -> str:
    """The name of the image that a file of annotations belongs to: the longest that one of
    `images` has, or else what is left without the longest ending.
    """
    endings = [e for e in (*more, *ENDINGS) if path.name.lower().endswith(e)] or [""]
    names = [name_of(Path(f"{path.name[: len(path.name) - len(e)]}.tif")) for e in endings]
    return next((name for name in reversed(names) if name in images), names[0])


def open_annotation(
    path: str | Path, shape: tuple[int, int], pixel_size_um: float | None = None
) -> Annotation:
    """Open the annotation of an image of (height, width) pixels, of micrometres each if known.

    Outlines are read now, as `outlines.gather` says; a pixel is a nucleus' if its centre lies
    within the outline, the last one's of several. A label map is read by `masks.read`, which knows
    a folder ANNOTATION_FOLDER. Raises InputError that names the file, and the outline at fault.
    """
    path, shape = Path(path), tuple(shape)
    check_regular(path)
    if path.name.lower().endswith(LABEL_SUFFIXES):
        return _open_label_map(path, shape)
    seen = Counter()
    found = read_outlines(path, image_name(path), shape, seen)
    gathered = outlines.gather(path, found, shape, seen, pixel_size_um)
    pixels = _Drawn(path, gathered.nuclei, shape, gathered.notes)
    return Annotation(path, pixels, shape, gathered.classes, gathered.regions)


def _open_label_map(path, shape):
    source = windows.open_mask(path)
    if (source.height, source.width) != shape:
        raise InputError(
            f"{path}: found {source.height} x {source.width} pixels (height x width), expected "
            f"{shape[0]} x {shape[1]} as in its image, take that of this image"
        )
    if not source.is_label_map:
        raise InputError(
            f"{path}: found a mask, expected one number per nucleus, put it into a folder of masks "
            f"or into a folder {ANNOTATION_FOLDER} if its numbers are nuclei"
        )
    rows, values = max(1, masks.BAND // shape[1]), [np.zeros(0, int)]
    for y in range(0, shape[0], rows):
        values.append(np.unique(source.numbers(y, 0, min(rows, shape[0] - y), shape[1])))
    values = np.unique(np.concatenate(values))
    values = values[values > 0]
    classes = {outlines.UNCLASSIFIED: len(values)} if len(values) else {}
    return Annotation(path, _Numbered(source, values, shape), shape, classes)


class _Drawn:
    """Windows of outlines."""

    def __init__(self, path, drawn, shape, notes):
        self.path, self.drawn, self.shape, self.said = path, drawn, shape, notes
        self._meaning, self._lock = None, threading.Lock()

    def meaning(self):
        """masks.Meaning; the first use draws all of the image once."""
        with self._lock:
            if self._meaning is None:
                shared, hidden = shapes.overlaps(self.drawn, *self.shape)
                notes = list(self.said)
                if shared:
                    text = "pixels in several outlines, taken as the last one's of the file"
                    notes.append(f"{self.path}: {text}: {shared}")
                if hidden:
                    text = "nuclei without a pixel, too small or wholly under later ones"
                    notes.append(f"{self.path}: {text}: {hidden}")
                self._meaning = masks.Meaning(0, True, tuple(notes))
            return self._meaning

    def numbers(self, y, x, height, width):
        return self.drawn.numbers(y, x, height, width)

    def read(self, y, x, height, width, level=0):
        return self.numbers(y, x, height, width) > 0

    def scaled(self, height, width):
        factor = width / self.shape[1], height / self.shape[0]
        return _Drawn(self.path, self.drawn.scaled(factor), (height, width), self.said)

    def close(self):
        pass


class _Numbered:
    """Windows of a label map, its values as 1 to n, resampled to `shape` by the nearest pixel."""

    def __init__(self, source, values, shape):
        self.source, self.values, self.shape = source, values, shape

    def meaning(self):
        return masks.Meaning(0, True, self.source.notes)

    def numbers(self, y, x, height, width):
        sides = (self.source.height, self.source.width)
        rows, columns = windows.nearest((y, x, height, width), sides, self.shape)
        top, left = rows[0], columns[0]
        part = self.source.numbers(top, left, rows[-1] + 1 - top, columns[-1] + 1 - left)
        part = part[np.ix_(rows - top, columns - left)]
        return ((np.searchsorted(self.values, part) + 1) * (part > 0)).astype(np.int32)

    def read(self, y, x, height, width, level=0):
        return self.numbers(y, x, height, width) > 0

    def scaled(self, height, width):
        return _Numbered(self.source, self.values, (height, width))

    def close(self):
        self.source.close()


def compare(before: str | Path, after: str | Path) -> Changes:
    """How many nuclei of one GeoJSON file were added, deleted and changed in another.

    A nucleus is the same by its id, or else by its outline: programs give new ids to objects that
    they turn into others. Outlines are equal whatever corner they begin at, to a hundredth of a
    pixel. Raises InputError.
    """
    one, other = _identities(Path(before)), _identities(Path(after))
    changed = sum(one[key] != other[key] for key in one.keys() & other.keys())
    deleted, added = (
        Counter(these[key] for key in these.keys() - those.keys())
        for these, those in ((one, other), (other, one))
    )
    return Changes((added - deleted).total(), (deleted - added).total(), changed)


def _identities(path):
    """{id, or what stands for it: outline} of the nuclei of a GeoJSON file."""
    found = [
        (identity, _normal(outline.polygons))
        for identity, outline in read_features(path, Counter())
        if not is_region(outline.label)
    ]
    often = Counter(identity for identity, _ in found)
    return {i if i and often[i] == 1 else outline: outline for i, outline in found}


def _normal(polygons):
    """A hash of the edges of polygons, wherever their rings begin and whichever way they go."""
    edges = [np.zeros(0, np.int64)]
    for ring in (ring for polygon in polygons for ring in polygon if ring is not None):
        x, y = np.round(100 * ring).astype(np.int64).T
        points = (x << 32) + y
        low, high = np.minimum(points[:-1], points[1:]), np.maximum(points[:-1], points[1:])
        edges.append(low * 1_000_003 + high)  # may go round
    return hash(np.sort(np.concatenate(edges)).tobytes())
