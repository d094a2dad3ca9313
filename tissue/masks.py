"""The one rule for masks: what in a file is foreground, and when its values are nuclei."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from tissue.files import InputError
from tissue.images import decode, decoding


class Mask(NamedTuple):
    """A mask as its file means it."""

    foreground: np.ndarray  # bool (H, W)
    labels: np.ndarray | None  # one integer per nucleus (H, W), 0 the background, if it has them
    notes: tuple[str, ...]  # what was assumed, or looks odd: lines that name the file


def read(path: str | Path) -> Mask:
    """Return the Mask of a file; InputError where the rule of `read_mask` does not hold."""
    return Mask(read_mask(path), read_label_map(path), ())


def read_mask(path: str | Path) -> np.ndarray:
    """Return the foreground as bool (H, W).

    Any value but 0 is foreground: 0 / 255, 0 / 1, bool and label maps of any integer type. Equal
    colour channels count as grey, alpha is ignored. Of a palette, index 0 is the background; only
    if all colours are grey and index 0 is not black, black is. JPEG is thresholded at 128.
    White-is-zero TIFFs count as a viewer shows them, except ImageJ's (its inverting LUT shows the
    foreground, 255, as black) and tifffile's bool arrays: there the stored value counts.

    Raises InputError for what `read_image` does, for colours, fractions, and a JPEG that is not
    black and white.
    """
    path = Path(path)
    with decoding(path):
        stored = decode(path)
        if stored.palette is not None:
            return _palette_foreground(path, stored)
        values = stored.pixels
        if values.ndim == 3:
            if (values != values[..., :1]).any():
                raise InputError(
                    f"{path}: found a mask of several colours, expected one value per pixel (0 is "
                    f"background), save it as a grey or label image"
                )
            values = values[..., 0]
        if values.dtype.kind not in "bui" and (values != np.rint(values)).any():
            raise InputError(
                f"{path}: found fractions in a {values.dtype} mask, expected 0 and 1 or whole "
                f"numbers, threshold it and save it as 0 and 255"
            )
        if stored.lossy:
            return _jpeg_foreground(path, values)
        return np.ascontiguousarray(values != 0)


def read_label_map(path: str | Path) -> np.ndarray | None:
    """Return one integer per nucleus, (H, W), 0 the background, or None if it is but a mask.

    A file with a single value beside 0 (0 / 255, 0 / 1, bool), a palette or JPEG is a mask. Raises
    InputError for what `read_mask` does, and for numbers below 0.
    """
    path = Path(path)
    with decoding(path):
        stored = decode(path)
    values = stored.pixels
    if stored.palette is not None or stored.lossy or values.dtype == bool:
        return None
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            return None
        values = values[..., 0]
    if values.dtype.kind == "f":
        values = np.rint(values).astype(np.int64)
    if values.size and values.min() < 0:
        raise InputError(
            f"{path}: found the label {values.min()}, expected 0 for the background and numbers "
            f"above for nuclei, save it so"
        )
    found = values[values > 0]
    return values if found.size and found.min() != found.max() else None


def _palette_foreground(path, stored):
    """Return where a palette image shows foreground; the rule is in `read_mask`."""
    indices, palette = stored.pixels, stored.palette
    black = ~palette.any(axis=1)
    if black[0]:
        return indices != 0
    if (palette == palette[:, :1]).all():
        return ~black[indices]
    if black[indices].any():
        raise InputError(
            f"{path}: found a palette in which black is not index 0, expected index 0 as the "
            f"background, save it as a grey or label image"
        )
    return indices != 0


def _jpeg_foreground(path, values):
    """Return where a JPEG mask is white, if compression left it black and white."""
    grey = np.count_nonzero((values >= 64) & (values < 192))
    white = np.count_nonzero(values >= 192)
    if grey > white or 0 < values.max() < 64:
        raise InputError(
            f"{path}: found a JPEG that is not black and white, expected 0 and 255 (JPEG blurs 0 "
            f"and 1 or labels), save it as PNG"
        )
    return values >= 128
