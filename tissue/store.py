"""Maps of an image while they are made: masks, depths and labels on disk, never whole in memory.

A store is written tile by tile and read by windows of any place. Where nothing is found nothing is
written, and a file system with sparse files stores nothing. Its bytes are the map's own, row by
row, so that there is no format to decode.
"""

import secrets
from pathlib import Path

import numpy as np
import tifffile

from tissue.files import PART, named, replacing
from tissue.pictures import write_image
from tissue.tiling import Tile, tiles_of

TILE = 512  # pixels; of the TIFFs that are written
LARGEST_TIFF = 2**32 - 2**25  # bytes; offsets of a classic TIFF have 32 bits


class Store:
    """A map (H, W) of one dtype, 0 where nothing was written; a context that removes it at its end.

    It is a new, hidden file in `folder`; what a killed run leaves, `claims.working` removes. It is
    opened for each use, so that what one process wrote others read (a copy of the object is as
    good), and mapped pages do not count as memory for long. Rows are written, not mapped: a full
    disk is an OSError then.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: type):
        self.height, self.width = shape
        self.dtype = np.dtype(dtype)
        self.largest = 0  # value that this process wrote
        self.path = folder / f".{secrets.token_hex(6)}{PART}"
        with named(folder), self.path.open("xb") as file:
            file.truncate(self.height * self.width * self.dtype.itemsize)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.path.unlink(missing_ok=True)

    def write(self, place: Tile, values: np.ndarray) -> None:
        """Write a tile's values (h, w). Each place is written once: zeros are there already."""
        if not values.any():
            return
        rows = np.ascontiguousarray(values, self.dtype)
        self.largest = max(self.largest, int(rows.max()))
        with named(self.path.parent), self.path.open("r+b", buffering=0) as file:
            for y, row in enumerate(rows, place.y):
                file.seek((y * self.width + place.x) * self.dtype.itemsize)
                left = memoryview(row).cast("B")
                while left:  # a nearly full disk takes a part
                    left = left[file.write(left) :]

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """A window's values (height, width), a copy."""
        return self._mapped()[y : y + height, x : x + width].copy()

    def every(self, step: int) -> np.ndarray:
        """Every `step`-th pixel of every `step`-th row, from the first on: a small view, a copy."""
        rows = range(0, self.height, step)
        view = np.empty((len(rows), -(-self.width // step)), self.dtype)
        # Not mapped: the pages of so many rows would count as memory.
        with self.path.open("rb") as file:
            for row, y in zip(view, rows, strict=True):
                file.seek(y * self.width * self.dtype.itemsize)
                row[:] = np.fromfile(file, self.dtype, self.width)[::step]
        return view

    def save(self, path: Path, pixel_size_um: float | None) -> None:
        """Write the map as a picture: a mask as 0 / 255, numbers as uint16 where that holds them.

        PNG is for maps that fit the memory; a TIFF is tiled and deflated, says its pixel size where
        that is known, and is a BigTIFF where a classic one might not suffice.
        """
        full = 255 if self.dtype == bool else 1
        dtype = np.dtype(np.uint8 if self.dtype == bool else self.dtype)
        if dtype == np.uint32 and self.largest <= np.iinfo(np.uint16).max:
            dtype = np.dtype(np.uint16)

        def pixels(part):
            return np.multiply(self.read(*part), full, dtype=dtype)

        if Path(path).suffix == ".png":
            write_image(path, self.read(0, 0, self.height, self.width))
            return
        resolution = {}
        if pixel_size_um:
            per_cm = 1e4 / pixel_size_um
            resolution = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
        big = self.height * self.width * dtype.itemsize > LARGEST_TIFF
        tiles = map(pixels, tiles_of(self.height, self.width, TILE))
        with replacing(path) as beside, tifffile.TiffWriter(beside, bigtiff=big) as tif:
            tif.write(
                tiles, shape=(self.height, self.width), dtype=dtype, tile=(TILE, TILE),
                photometric="minisblack", compression="adobe_deflate", metadata=None,
                software=False, **resolution,
            )  # fmt: skip

    def _mapped(self):
        return np.memmap(self.path, self.dtype, "r", shape=(self.height, self.width))
