"""Writes the mask or depth map of an image too big for the memory, tile by tile, into one TIFF.

Each process puts its tiles, compressed, one behind the other into a file of its own; at the end one
of them puts all tiles in order. What is compressed once is copied as it is.
"""

import secrets
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tifffile

from tissue.files import PART, replacing
from tissue.tiling import Tile


class Spool:
    """A file of compressed tiles of a mask or a depth map, each tile x tile pixels; it knows where.

    It is a new, hidden file in `folder`; what a killed run leaves of it, `files.locked` removes.
    """

    def __init__(self, folder: Path, tile: int):
        self.path, self.tile = folder / f".{secrets.token_hex(6)}{PART}", tile
        self.places = {}  # Tile -> (offset, bytes)
        self.file = self.path.open("xb")

    def add(self, part: Tile, values: np.ndarray) -> None:
        """Add a tile, bool (h, w), stored as 0 / 255, or uint8, filled up with background to tile x
        tile pixels.
        """
        pixels = np.zeros((self.tile, self.tile), np.uint8)
        pixels[: part.height, : part.width] = values
        if values.dtype == bool:
            pixels *= 255
        data = zlib.compress(pixels, 1)
        self.places[part] = self.file.tell(), len(data)
        self.file.write(data)

    def close(self) -> dict[Tile, tuple[Path, int, int]]:
        """Close the file and return for each tile the file, the offset and the bytes."""
        self.file.close()
        return {part: (self.path, *place) for part, place in self.places.items()}

    def remove(self) -> None:
        """Remove the file, be it closed or not."""
        try:
            self.file.close()
        finally:
            self.path.unlink(missing_ok=True)


def write_mosaic(
    path: Path,
    tiles: Sequence[Tile],
    places: dict[Tile, tuple[Path, int, int]],
    tile: int,
    pixel_size_um: float | None,
    visit: Callable[[Tile, np.ndarray], None],
) -> None:
    """Write a tiled, compressed BigTIFF, uint8, and show every tile to `visit`, in order.

    `tiles` are all of an image, row by row, `places` what the processes' spools returned together.
    `visit` gets each tile's mask as bool (h, w). The spools are left to the caller to remove.
    """
    files = {spool: spool.open("rb") for spool, _, _ in places.values()}

    def in_order():
        for part in tiles:
            spool, offset, size = places[part]
            files[spool].seek(offset)
            data = files[spool].read(size)
            pixels = np.frombuffer(zlib.decompress(data), np.uint8).reshape(tile, tile)
            visit(part, pixels[: part.height, : part.width] > 0)
            yield data

    try:
        write_tiles(path, in_order(), tiles, tile, np.uint8, pixel_size_um)
    finally:
        for file in files.values():
            file.close()


def write_tiles(
    path: Path,
    contents: Iterable[np.ndarray | bytes],
    tiles: Sequence[Tile],
    tile: int,
    dtype: type,
    pixel_size_um: float | None,
) -> None:
    """Write a tiled, deflated BigTIFF, (H, W) of `dtype`, from what its tiles hold, in order.

    `tiles` are all of an image, row by row; `contents` arrays of their sizes, or compressed bytes.
    A generator is run to its end before the file is put in place.
    """
    contents = iter(contents)
    until_closed = (content for content in contents)  # tifffile closes it when it has enough
    height = tiles[-1].y + tiles[-1].height
    width = tiles[-1].x + tiles[-1].width
    resolution = (1e4 / pixel_size_um,) * 2 if pixel_size_um else None
    with replacing(path) as beside, tifffile.TiffWriter(beside, bigtiff=True) as tif:
        tif.write(
            until_closed, shape=(height, width), dtype=dtype, tile=(tile, tile),
            photometric="minisblack", compression="adobe_deflate", metadata=None,
            resolution=resolution, resolutionunit="CENTIMETER" if resolution else None,
            software=False,
        )  # fmt: skip
        if next(contents, None) is not None:
            raise ValueError(f"{path}: more tiles than the image has")
