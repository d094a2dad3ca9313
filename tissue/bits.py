"""How many bits of a 16-bit image are in use, of which the upper 8 are kept."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tissue.files import InputError, some

DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras have
BRIGHTER = 0.01  # of the samples; a scale bar, a label or broken pixels have no more
_MAX_SAMPLE_VALUE = 281  # tag of TIFF
_BAND = 2**16  # samples that are counted at once, as 8 bytes each


class Bits(NamedTuple):
    """Of a 16-bit image."""

    used: int  # bits that hold 99 % of its samples, one of DEPTHS
    most: int  # bits that hold all


def upper_bytes(pixels: np.ndarray) -> np.ndarray:
    """How many samples of uint16 (H, W) or (H, W, C), but for 0, have each upper byte: (256,)."""
    counts = np.zeros(256, np.int64)
    rows = max(1, _BAND // pixels[0].size)
    for y in range(0, len(pixels), rows):
        band = pixels[y : y + rows]
        counts += np.bincount((band >> 8).ravel(), minlength=256)
        counts[0] -= band.size - np.count_nonzero(band)
    return counts


def bits_for(counts: np.ndarray, told: int | None) -> Bits:
    """The Bits of an image with such `upper_bytes`, and no less than the file has `told`.

    What is exactly 0 does not count: it fits any number of bits, and padding has a lot of it.
    """
    allowed = BRIGHTER * counts.sum()
    least = next(bits for bits in DEPTHS if bits >= (told or 0))
    used = next(bits for bits in DEPTHS if counts[1 << (bits - 8) :].sum() <= allowed)
    most = next(bits for bits in DEPTHS if not counts[1 << (bits - 8) :].any())
    return Bits(max(used, least), max(most, least))


def told_bits(page) -> int | None:
    """How many bits of uint16 samples a TIFF's page says are in use; None for 16 or nothing."""
    if page.dtype != np.uint16:
        return None
    if page.bitspersample != 16:
        return page.bitspersample  # packed
    largest = page.tags.valueof(_MAX_SAMPLE_VALUE, default=0)
    told = int(np.max(largest)).bit_length()
    if ome := re.search(r"SignificantBits=[\"'](\d+)[\"']", page.description):
        told = max(told, int(ome[1]))
    return told if 8 < told < 16 else None


def to_uint8(path: Path, pixels: np.ndarray, bits: int | None, told: int | None) -> np.ndarray:
    """Return bool, 8-bit or 16-bit pixels as uint8; the rule is in `images.read_image`.

    `told` is how many of 16 bits the file says are in use. Raises InputError for other types.
    """
    if pixels.dtype == bool:
        return pixels * np.uint8(255)
    if pixels.dtype.kind != "u" or pixels.dtype.itemsize > 2:
        raise InputError(
            f"{path}: found {pixels.dtype} pixels, expected unsigned integers of 8 or 16 bit, save "
            f"it as 8-bit RGB"
        )
    if pixels.dtype.itemsize == 1:
        return pixels
    bits = bits or bits_for(upper_bytes(pixels), told).used
    upper = pixels >> (bits - 8)
    return np.minimum(upper, 255, out=upper).astype(np.uint8)


def bit_lines(found: dict[str, Bits], kept: int) -> list[str]:
    """Lines on the 16-bit images that are read together, by name; `kept` bits count for all."""
    lines = [f"16-bit images: {kept} bits are in use, of which the upper 8 are kept"]
    if brighter := [name for name, bits in found.items() if bits.most > kept]:
        lines.append(
            f"{some(brighter)}: {kept} bits hold 99 % of it; what is brighter, as a scale bar, is "
            f"white"
        )
    if fewer := [f"{name} ({b.used} bits)" for name, b in found.items() if b.used <= kept - 2]:
        lines.append(
            f"{some(fewer)}: fewer bits are in use than {kept}, and it is read darker; if that is "
            f"its camera and not its light, save it as 8-bit RGB"
        )
    return lines
