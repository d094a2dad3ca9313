"""Reads slides in the formats of scanners by OpenSlide, which is an extra: the rest works without.

tifffile reads plain TIFF, OME-TIFF and Aperio's SVS (tissue/slides.py): it reads 16 bit, says of
what it lost, and needs no C library. OpenSlide has what it has not: files of several parts, tiles
that overlap or lie anywhere, and levels that are not what their tags say.
"""

import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from tissue.files import InputError, check_regular, one_line
from tissue.tiff import TIFF_SIGNATURES, is_of_scanner, signature_of

SUFFIXES = ("mrxs", "ndpi", "scn", "bif", "vms", "vmu", "dcm", "svslide", "czi")
INSTALL = "pip install openslide-python openslide-bin pydicom"
CELL = 256  # pixels; of a level whose pixels are no whole number of the image's, read at once
BAND = 2**24  # pixels read at once of a slide that is read whole
_KEY_FILE = 2**20  # bytes; OpenSlide reads no larger one
_PATIENCE = 300  # seconds
_TRY = """
import sys, openslide
try:  # what claims more memory than any slide takes, for one of its tiles
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30,) * 2)
except (ImportError, ValueError, OSError):
    pass
slide = openslide.OpenSlide(sys.argv[1])
for level, (width, height) in enumerate(slide.level_dimensions):
    step = slide.level_downsamples[level]
    for y in (0, 0.5, 1):
        for x in (0, 0.5, 1):
            at = int(step * x * max(0, width - 64)), int(step * y * max(0, height - 64))
            slide.read_region(at, level, (64, 64))
"""  # an exception, which is told when the slide is read, is exit code 1


def is_scan(path: Path) -> bool:
    """Whether OpenSlide is to read a file, installed or not; by its suffix or its first bytes.

    Raises FileNotFoundError, and InputError for what is no file.
    """
    signature = signature_of(path)
    if path.suffix.lower()[1:] in SUFFIXES or signature[128:] == b"DICM":
        return True
    return signature.startswith(TIFF_SIGNATURES) and is_of_scanner(path)


def knows(path: Path) -> bool:
    """Whether OpenSlide is installed and reads a file, whatever else does."""
    try:
        return _openslide(path).OpenSlide.detect_format(path) is not None
    except InputError:
        return False


def heads(paths: Iterable[Path]) -> list[Path]:
    """The paths without those of files that belong to another's slide.

    Of the DICOM files of one folder and series the first by name stands for the slide; what a VMS
    or VMU file names is a part of it. Raises InputError for DICOM files where pydicom is missing.
    """
    paths, series = list(paths), {}
    parts = companions(paths)
    for path in sorted(paths, key=lambda path: path.name):
        if path.suffix.lower() == ".dcm" and (number := _series_of(path)):
            first = series.setdefault((path.parent, number), path)
            parts |= {path} - {first}
    return [path for path in paths if path not in parts]


def companions(paths: Iterable[Path]) -> set[Path]:
    """The folders of MIRAX slides, and the files that VMS and VMU files name, there or not."""
    found = set()
    for path in paths:
        kind = path.suffix.lower()
        if kind == ".mrxs":
            found.add(path.with_suffix(""))
        elif kind in (".vms", ".vmu") and path.is_file():
            named = (line.partition("=")[2].strip() for line in _key_file(path).splitlines())
            found |= {path.parent / name for name in named if name}
    return found


def _series_of(path):
    """The SeriesInstanceUID of a DICOM file, None where it has none."""
    try:
        from pydicom.filereader import read_partial
    except ImportError as error:
        raise _missing(path) from error
    series = 0x0020000E
    check_regular(path)
    try:
        with open(path, "rb") as file:
            head = read_partial(file, stop_when=lambda tag, *_: tag > series)
        return str(head[series].value)
    except Exception:  # pydicom raises nearly anything on other bytes
        return None  # whoever opens it says why


class Scan:
    """An open slide: `levels`, the (height, width) of each, and OpenSlide's `properties`.

    Where a scanner says which part of its stage it scanned, the image is that part, as in QuPath.
    What was not scanned is white. `read` gives RGB uint8 (h, w, 3), to any number of threads. After
    `close` it reads on as if opened anew. Raises InputError for what OpenSlide cannot read.
    """

    def __init__(self, path: Path):
        self.path, self.lock, self._slide = path, threading.Lock(), None
        slide = self._opened()
        with _telling(path):
            self.properties: Mapping[str, str] = dict(slide.properties)
            sizes, self.steps = slide.level_dimensions, slide.level_downsamples
        left, top, width, height = self._bounds(*sizes[0])
        self.levels, self.origins = [], []
        for step, (columns, rows) in zip(self.steps, sizes, strict=True):
            y, x = min(round(top / step), rows - 1), min(round(left / step), columns - 1)
            inside = min(round(height / step), rows - y), min(round(width / step), columns - x)
            self.origins.append((y, x))
            self.levels.append((max(inside[0], 1), max(inside[1], 1)))

    def _bounds(self, width, height):
        """(left, top, width, height) of what was scanned, in pixels."""
        names = ("x", "y", "width", "height")
        told = [self.properties.get(f"openslide.bounds-{name}", "") for name in names]
        if all(re.fullmatch(r"\d{1,12}", text) for text in told):
            left, top, wide, high = map(int, told)
            wide, high = min(wide, width - left), min(high, height - top)
            if wide > 0 and high > 0:
                return left, top, wide, high
        return 0, 0, width, height

    def close(self) -> None:
        with self.lock:
            self._slide = None  # closed when the last thread that reads has read

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> np.ndarray:
        place = f"{self.path}, rows {y} to {y + height}, columns {x} to {x + width}"
        out = np.empty((height, width, 3), np.uint8)
        (top, left), step = self.origins[level], self.steps[level]
        slide = self._opened()
        with _telling(place, self._forget):
            for row, up, rows in _cells(top + y, height, step):
                for column, back, columns in _cells(left + x, width, step):
                    # OpenSlide wants a place in pixels of level 0, to the left and top of it.
                    at = round((column - back) * step), round((row - up) * step)
                    part = slide.read_region(at, level, (back + columns, up + rows))
                    to_y, to_x = row - top - y, column - left - x
                    out[to_y : to_y + rows, to_x : to_x + columns] = on_white(
                        np.asarray(part)[up:, back:]
                    )
        return out

    def whole(self) -> np.ndarray:
        """All of level 0, RGB uint8 (H, W, 3)."""
        height, width = self.levels[0]
        out = np.empty((height, width, 3), np.uint8)
        rows = max(1, BAND // width)
        for y in range(0, height, rows):
            out[y : y + rows] = self.read(y, 0, min(rows, height - y), width)
        return out

    def _opened(self):
        with self.lock:
            if self._slide is None:
                _check(self.path)
                with _telling(self.path):
                    self._slide = _openslide(self.path).OpenSlide(self.path)
            return self._slide

    def _forget(self):
        self.close()  # after an error a slide gives nothing but that error


def _check(path):
    """Raise InputError for a slide on which OpenSlide ends the program in place of an error.

    It does so with some damaged headers, so another process tries it first.
    """
    _check_parts(path)
    state = path.stat()
    if said := _tried(path, state.st_size, state.st_mtime_ns):
        raise InputError(
            f"{path}: found a slide on which OpenSlide {said}, expected a whole one, replace it"
        )


def _check_parts(path):
    """Raise InputError for a slide that names files elsewhere, or has a pipe among its own."""
    kind, parts = path.suffix.lower(), companions([path])
    if kind == ".dcm":  # OpenSlide looks at all there are
        parts = set(path.parent.iterdir())
    told = path.with_suffix("") / "Slidedat.ini" if kind == ".mrxs" else path
    if kind in (".mrxs", ".vms", ".vmu") and told.is_file():
        parts |= set(told.parent.iterdir()) if kind == ".mrxs" else set()
        for line in _key_file(told).splitlines():
            key, _, name = (text.strip() for text in line.partition("="))
            if "FILE" in key.upper() and (set(name) & set("/\\") or name in (".", "..")):
                raise InputError(
                    f"{told}: found {name!r:.60} as {key:.40}, expected the name of a file beside "
                    f"it; copy the slide anew, with all its files in one folder"
                )
    for part in parts:
        if not part.is_dir():
            check_regular(part)


@lru_cache(4096)
def _tried(path, *_):
    """What became of OpenSlide on a file of this state; None if nothing did."""
    command = [sys.executable, "-P", "-c", _TRY, path]
    try:
        ended = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return f"takes more than {_PATIENCE} seconds to begin"
    return f"dies (exit code {ended.returncode})" if ended.returncode not in (0, 1) else None


def _key_file(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(_KEY_FILE)


def _cells(start, size, step):
    """(start, how far back to read from, size) of the parts of a window, along one axis of a level.

    Between the pixels of a level OpenSlide interpolates. Where `step`, the size of its pixels, is
    no whole number, the places to read from are a grid, so that windows agree where they overlap.
    """
    if float(step).is_integer():
        yield start, 0, size
        return
    for cell in range(start // CELL * CELL, start + size, CELL):
        first, last = max(cell, start), min(cell + CELL, start + size)
        yield first, first - cell, last - first


def on_white(pixels: np.ndarray) -> np.ndarray:
    """RGBA uint8 (h, w, 4) before a white ground: RGB uint8 (h, w, 3)."""
    colours, alpha = cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), pixels[..., 3:]
    if alpha.min() == 255:
        return colours
    alpha = alpha.astype(np.uint16)
    return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _openslide(path):
    """The library; InputError where it is not installed."""
    try:
        import openslide
    except (ImportError, OSError) as error:  # the latter of a library of another machine
        raise _missing(path) from error
    return openslide


def _missing(path):
    return InputError(
        f"{path}: found a slide of a format that OpenSlide reads, expected it to be installed; "
        f"{INSTALL}"
    )


@contextmanager
def _telling(what, failed=lambda: None) -> Iterator[None]:
    """Turn OpenSlide's errors into an InputError of one line, which calls the slide `what`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # OpenSlideError, and what ctypes and Pillow make of nonsense
        failed()
        said = one_line(error)
        raise InputError(
            f"{what}: found a slide that OpenSlide cannot read ({said}), expected a whole one with "
            f"all files that belong to it, replace it"
        ) from error
