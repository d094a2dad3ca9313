"""Reads windows of a TIFF of any size from the tiles or strips that they touch.

Of a pyramid each level is read by itself. What is decoded is kept for a while, for windows overlap.
"""

import threading
from collections import OrderedDict
from functools import partial

import numpy as np

from tissue import masks
from tissue.bits import to_uint8
from tissue.files import InputError
from tissue.images import (
    ORIENTATION,
    colour_count,
    decoding,
    has_alpha,
    is_negative,
    lay_on_white,
    positive,
    tiff_plane,
)
from tissue.tiff import open_tiff

CACHE = 64 * 2**20  # bytes of decoded segments that are kept


class Segments:
    """Windows of a TIFF, from the tiles or strips that they touch."""

    def __init__(self, path, is_mask):
        self.path, self.convert = path, partial(_values, path)
        with decoding(path), open_tiff(path) as tif:
            plane = tiff_plane(path, tif)
            self.pages = [level.keyframe for level in plane.levels]
            self.odd = next(
                filter(None, (_oddity(plane, page, is_mask) for page in self.pages)), None
            )
            if not (is_mask or self.odd):
                colour_count(path, plane)  # InputError
            self.negative = [is_negative(tif, page) for page in self.pages]
            for page in self.pages:  # what tifffile reads at need, and the file is closed then
                page.jpegtables, page.dataoffsets, page.decode  # noqa: B018
        self.alpha = has_alpha(self.pages[0])
        self.dtype, self.lossy = self.pages[0].dtype, "JPEG" in self.pages[0].compression.name
        self.levels = [(page.imagelength, page.imagewidth) for page in self.pages]
        self.size = path.stat().st_size
        self.cache, self.cached = OrderedDict(), 0
        # A strip is as wide as the image: all that one row of windows needs must stay.
        strips = not self.pages[0].is_tiled
        self.room = CACHE if not strips else max(CACHE, 2048 * 3 * self.levels[0][1])
        self.lock = threading.Lock()
        self.file = None

    def check(self):
        if self.odd:
            raise InputError(
                f"{self.path}: found {self.odd} in an image too big to be read whole, expected "
                f"upright 8-bit RGB or grey in tiles or strips, save it so (OME-TIFF, SVS)"
            )

    def read(self, y, x, height, width, level=0):
        with decoding_window(self.path, y, x, height, width), self.lock:
            return self._window(y, x, height, width, level)

    def close(self):
        with self.lock:
            if self.file is not None:
                self.file.close()
            self.file, self.cached = None, 0
            self.cache.clear()

    def _window(self, y, x, height, width, level):
        page = self.pages[level]
        rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (
            page.rowsperstrip, page.imagewidth)  # fmt: skip
        across = -(-page.imagewidth // columns)
        out = None
        for row in range(y // rows, -(-(y + height) // rows)):
            for column in range(x // columns, -(-(x + width) // columns)):
                segment = self._segment(level, row * across + column)
                top, left = row * rows, column * columns
                part = segment[
                    max(y - top, 0) : y + height - top, max(x - left, 0) : x + width - left
                ]
                if out is None:
                    out = np.empty((height, width, *part.shape[2:]), part.dtype)
                at_y, at_x = max(top - y, 0), max(left - x, 0)
                out[at_y : at_y + part.shape[0], at_x : at_x + part.shape[1]] = part
        return out

    def _segment(self, level, index):
        key = level, index
        if key in self.cache:
            self.cache.move_to_end(key)
            return self.cache[key]
        page = self.pages[level]
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if offset + count > self.size:
            raise ValueError("the file ends before its pixels do")
        if self.file is None:
            self.file = open(self.path, "rb")  # noqa: SIM115, stays open from window to window
        self.file.seek(offset)
        data = self.file.read(count) if count else None
        segment, _, shape = page.decode(data, index, jpegtables=page.jpegtables)
        if segment is None:  # a tile that was never written is background
            segment = np.full(shape, page.nodata, page.dtype)
        segment = positive(segment, page) if self.negative[level] else segment
        segment = self.convert(segment[0])
        self.cache[key] = segment
        self.cached += segment.nbytes
        while self.cached > self.room and len(self.cache) > 1:
            self.cached -= self.cache.popitem(last=False)[1].nbytes
        return segment


def decoding_window(path, y, x, height, width):
    """As `images.decoding`, with the window's place in the message."""
    return decoding(f"{path}, rows {y} to {y + height}, columns {x} to {x + width}")


def _oddity(plane, page, is_mask):
    """What keeps a TIFF from being read by windows, or None."""
    kind = page.photometric.name
    converted = kind == "YCBCR" and "JPEG" in page.compression.name  # by its decoder, to RGB
    if (
        not (kind in ("RGB", "MINISBLACK", "MINISWHITE") or converted)
        or "YCBC" in page.compression.name
    ):
        return f"{kind} colours, {page.compression.name}"
    if not is_mask and page.dtype not in (np.uint8, np.uint16):
        return f"{page.dtype} pixels"
    if page.planarconfig == 2 and page.samplesperpixel > 1:
        return "separate colour planes"
    if page.tags.valueof(ORIENTATION, default=1) != 1:
        return "a turned image"
    if len(plane.pages) > 1 or len(plane.shape) - (page.samplesperpixel > 1) != 2:
        return "several planes"
    if not page.is_tiled and page.rowsperstrip * page.imagewidth > 4 * CACHE:
        return "no tiles or strips"
    return None


def colours(path, bits, alpha, segment):
    """A decoded segment, 8 or 16 bit (h, w, samples), as RGB uint8 (h, w, 3); `alpha` says whether
    its last sample is one to be laid on white by.
    """
    colours = segment[..., :1] if segment.shape[2] < 3 else segment[..., :3]
    colours = to_uint8(path, colours, bits, None)
    colours = np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours
    if alpha:
        colours = np.require(colours, requirements="W")
        lay_on_white(colours, segment[..., -1])
    return colours


def _values(path, segment):
    """A decoded segment of a mask (h, w, samples) as its values (h, w)."""
    return masks.grey(path, segment[..., : 1 if segment.shape[2] < 3 else 3])  # without alpha
