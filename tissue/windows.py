"""Reads windows of an image or a mask, of one too big for the memory too, at a wanted pixel size.

TIFFs are read segment by segment (tiles or strips), slides of scanners by OpenSlide, and of a
pyramid the level that is next finer than wanted. PNG and JPEG cannot be read in part, and small
TIFFs need not: they are read whole.
"""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from tissue import masks, palettes
from tissue.images import (
    bits_in_use,
    check_memory,
    check_shape,
    decode,
    decoding,
    image_shape,
    read_image,
    tiff_plane,
)
from tissue.pixel_size import pixel_size_um
from tissue.scanners import Scan, is_scan, knows
from tissue.slides import Segments, colours
from tissue.tiff import TIFF_SIGNATURES, open_tiff, signature_of

BIG = 64e6  # pixels; from here on an image is not held in memory
VIEW = 2048  # pixels; the longer side of a view of the whole image


class Windows:
    """An open image or mask: `height` and `width` in pixels, `pixel_size_um` or None.

    `read(y, x, height, width)` gives a window at full resolution, which lies within the image: RGB
    uint8 (h, w, 3), or bool (h, w) of a mask. Any number of threads may read. `levels` has the
    (height, width) of each level of a pyramid, `levels[0]` the image's own. `is_big` says that
    what is made of it must not be held in memory either. After `close()`, which frees memory and
    file, it reads on as if opened anew.
    """

    def __init__(
        self, path: Path, pixels, levels: list[tuple], big: bool, pixel_size: float | None = None
    ):
        self.path, self.levels = path, levels
        self.height, self.width = levels[0]
        self.is_big = big
        self.pixel_size_um = pixel_size or (pixel_size_um(path) if path.name else None)
        self._pixels = pixels  # has read(y, x, height, width, level) and close()

    def close(self) -> None:
        self._pixels.close()

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> np.ndarray:
        return self._pixels.read(y, x, height, width, level)

    def view(self, longest: int = VIEW) -> np.ndarray:
        """The whole image, RGB uint8, or mask, 0 to 255, of at most `longest` pixels a side."""
        step = max(1, -(-max(self.height, self.width) // longest))
        level, (rows, columns) = _finer_level(self.levels, step)
        height, width = -(-self.height // step), -(-self.width // step)
        out = None
        band = max(1, 4 * 10**6 // columns)  # rows of the level that are read at once
        for start in range(0, height, max(1, band * height // rows)):
            stop = min(height, start + max(1, band * height // rows))
            first, last = start * rows // height, max(1, -(-stop * rows // height))
            part = self.read(first, 0, last - first, columns, level)
            part = part * np.uint8(255) if part.dtype == bool else part
            part = cv2.resize(part, (width, stop - start), interpolation=cv2.INTER_AREA)
            out = np.empty((height, width, *part.shape[2:]), np.uint8) if out is None else out
            out[start:stop] = part
        return out


def open_image(path: str | Path, big: float | None = None, bits: int | None = None) -> Windows:
    """Open an image for reading by windows.

    What has fewer than `big` pixels (BIG of them) and is no pyramid is read whole, at the first
    window, by `images.read_image`, which says what `bits` is. Raises InputError for a file that is
    damaged, no image, empty, too large for the memory where it must be read whole, or of a kind
    without windows.
    """
    path = Path(path)
    parts, shape, is_big = _open(path, big, is_mask=False)
    if isinstance(parts, Segments):
        if parts.dtype == np.uint16 and bits is None:
            bits = bits_in_use(path)
        parts.convert = partial(colours, path, bits, parts.alpha)
    pixels = parts or _Whole(lambda: read_image(path, bits))
    return Windows(path, pixels, parts.levels if parts else [shape], is_big)


class Part:
    """A rectangle of an open image, `box` (y, x, height, width), as an image of its own."""

    def __init__(self, source: Windows, box: tuple[int, int, int, int]):
        self.source = source
        self.y, self.x, self.height, self.width = box
        self.levels = [(self.height, self.width)]

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> np.ndarray:
        return self.source.read(self.y + y, self.x + x, height, width)


def from_array(pixels: np.ndarray, pixel_size_um: float | None = None) -> Windows:
    """Windows of what is in memory: an image, RGB uint8 (H, W, 3), a mask, bool (H, W), or a depth
    map, uint8 (H, W).
    """
    return Windows(Path(), _Whole(lambda: pixels), [pixels.shape[:2]], False, pixel_size_um)


class MaskWindows(Windows):
    """Windows of a mask, with what `masks.Mask` says of it; the first use reads all of the file.

    `regions` are where an annotation is complete (annotations.Annotation), None for everywhere.
    """

    regions = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines that say what was assumed of the mask, or looks odd."""
        return self._pixels.meaning().notes

    @property
    def is_label_map(self) -> bool:
        """Whether it has a number for each nucleus, which `numbers` reads."""
        return self._pixels.meaning().is_label_map

    def numbers(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """A window of a label map: one integer per nucleus (h, w), 0 the background."""
        return self._pixels.numbers(y, x, height, width)

    def known(self, y: int, x: int, height: int, width: int) -> np.ndarray | None:
        """Whether each pixel of a window is in a region, bool (h, w); None without regions."""
        return None


def open_mask(path: str | Path, big: float | None = None) -> MaskWindows:
    """Open a mask for reading by windows, as `open_image` does, by the rule of `masks.read`."""
    path = Path(path)
    segments, shape, is_big = _open(path, big, is_mask=True)
    pixels = _MaskSegments(path, segments) if segments else _WholeMask(path)
    return MaskWindows(path, pixels, segments.levels if segments else [shape], is_big)


def open_depth(path: str | Path, big: float | None = None) -> Windows:
    """Open a depth map of ours, uint8 (H, W), or a picture of regions for reading by windows, as
    `open_image` does.
    """
    path = Path(path)
    segments, shape, is_big = _open(path, big, is_mask=True)
    pixels = segments or _Whole(lambda: _stored(path))
    return Windows(path, pixels, segments.levels if segments else [shape], is_big)


def _stored(path):
    """The values of a file as they are, (H, W); of one with a palette as `palettes.numbers`."""
    with decoding(path):
        stored = decode(path)
        pixels = stored.pixels
        if stored.palette is not None:
            return palettes.numbers(path, pixels, stored.palette)
        return masks.grey(path, pixels) if pixels.ndim == 3 else pixels


def _open(path, big, is_mask):
    """(Segments or Scan, None where the file is to be read whole; (height, width); whether big)"""
    big = BIG if big is None else big
    if not is_mask and is_scan(path):
        return _scan(path, big)
    height, width = image_shape(path)
    is_big = height * width >= big
    if signature_of(path).startswith(TIFF_SIGNATURES):
        with decoding(path), open_tiff(path) as tif:
            is_pyramid = len(tiff_plane(path, tif).levels) > 1
        if is_big or is_pyramid:
            segments = Segments(path, is_mask)
            if is_big and segments.odd and not is_mask and knows(path):
                return _scan(path, big)
            if is_big:
                segments.check()
            if not segments.odd:
                return segments, (height, width), is_big
    if is_big:
        check_memory(path)
    return None, (height, width), is_big


def _scan(path, big):
    scan = Scan(path)
    height, width = scan.levels[0]
    check_shape(path, height, width)
    return scan, (height, width), height * width >= big


class _Whole:
    """Windows of an image that is decoded once and held."""

    def __init__(self, read_whole: Callable):
        self.read_whole = read_whole
        self.pixels = None
        self.lock = threading.Lock()

    def get(self):
        with self.lock:
            if self.pixels is None:
                self.pixels = self.read_whole()
            return self.pixels

    def read(self, y, x, height, width, level=0):
        return self.get()[y : y + height, x : x + width]

    def close(self):
        with self.lock:
            self.pixels = None


class _WholeMask:
    """Windows of a mask that is decoded once and held."""

    def __init__(self, path):
        self.whole = _Whole(lambda: masks.read(path))
        self._meaning = None

    def meaning(self):
        if self._meaning is None:
            mask = self.whole.get()
            self._meaning = masks.Meaning(0, mask.labels is not None, mask.notes)
        return self._meaning

    def read(self, y, x, height, width, level=0):
        return self.whole.get().foreground[y : y + height, x : x + width]

    def numbers(self, y, x, height, width):
        return self.whole.get().labels[y : y + height, x : x + width]

    def close(self):
        self.whole.close()


class _MaskSegments:
    """Windows of a mask, from the segments of its TIFF; the first reads all to know the rule."""

    def __init__(self, path, segments):
        self.path, self.segments = path, segments
        self._meaning = None
        self.lock = threading.Lock()

    def meaning(self):
        with self.lock, decoding(self.path):
            if self._meaning is None:
                self._meaning = masks.meaning_of(self.path, self._bands, self.segments.lossy)
            return self._meaning

    def read(self, y, x, height, width, level=0):
        return self.segments.read(y, x, height, width, level) > self.meaning().threshold

    def numbers(self, y, x, height, width):
        return masks.whole_numbers(self.segments.read(y, x, height, width))

    def close(self):
        self.segments.close()

    def _bands(self) -> Iterator[np.ndarray]:
        height, width = self.segments.levels[0]
        rows = max(1, masks.BAND // width)
        for y in range(0, height, rows):
            yield self.segments.read(y, 0, min(rows, height - y), width)


class Scaled:
    """An image as it would be with pixels `scale` times as large, still read by windows.

    Averages whole blocks of pixels first, then interpolates linearly, at places that depend on the
    image alone: windows agree where they overlap. `scale` is a float, `height` and `width` pixels
    of the scaled image.
    """

    def __init__(self, source: Windows, scale: float):
        self.source = source
        self.height = max(1, round(source.height / scale))
        self.width = max(1, round(source.width / scale))
        self.level, (rows, columns) = _finer_level(source.levels, scale)
        self.step = rows / self.height, columns / self.width  # of the level's pixels, y and x
        self.block = max(1, int(min(self.step)))

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        rows, columns = self.source.levels[self.level]
        places, starts, sizes = [], [], []
        for start, count, step, end in (
            (y, height, self.step[0], -(-rows // self.block)),
            (x, width, self.step[1], -(-columns // self.block)),
        ):
            # Centres of the wanted pixels, in blocks.
            at = ((np.arange(start, start + count) + 0.5) * step / self.block - 0.5).clip(
                0, end - 1
            )
            first, last = int(at[0]), min(int(at[-1]) + 2, end)
            places.append((at - first).astype(np.float32))
            starts.append(first)
            sizes.append(last - first)
        top, left = (start * self.block for start in starts)
        bottom = min(top + sizes[0] * self.block, rows)
        right = min(left + sizes[1] * self.block, columns)
        part = self.source.read(top, left, bottom - top, right - left, self.level)
        if self.block > 1:
            short = sizes[0] * self.block - len(part), sizes[1] * self.block - part.shape[1]
            part = cv2.copyMakeBorder(part, 0, short[0], 0, short[1], cv2.BORDER_REPLICATE)
            part = cv2.resize(part, sizes[::-1], interpolation=cv2.INTER_AREA)
        return interpolate(part, *places)


def interpolate(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`values` (h, w) or (h, w, C), any type of OpenCV, linearly at all `rows` x `columns`."""
    grid = np.meshgrid(columns.astype(np.float32), rows.astype(np.float32))
    return cv2.remap(values, *grid, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def nearest(
    part: tuple[int, int, int, int], sides: tuple[int, int], shape: tuple[int, int]
) -> list[np.ndarray]:
    """Rows and columns of a picture of `sides` pixels, brought to `shape`, that a window of it, (y,
    x, height, width), shows: those of the nearest pixels.
    """
    return [
        (2 * np.arange(start, start + count) + 1) * side // (2 * whole)
        for start, count, side, whole in zip(part[:2], part[2:], sides, shape, strict=True)
    ]


def _finer_level(levels, scale):
    """(index, shape) of the coarsest level whose pixels are at most `scale` times the image's."""
    fits = [i for i, (_, width) in enumerate(levels) if levels[0][1] / width <= scale * 1.001]
    best = max(fits, default=0)
    return best, levels[best]
