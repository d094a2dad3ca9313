"""What the indices of a picture with a palette mean, where it is no image: numbers or greys."""

from pathlib import Path

import numpy as np

from tissue.files import InputError

# Of a map of tissue and artefacts, by the values of artefacts.CLASSES.
MAP_COLOURS = (
    (255, 255, 255), (240, 170, 200), (0, 70, 200), (230, 120, 0), (120, 120, 120), (0, 0, 0),
)  # fmt: skip


def check_background(path: Path, used: np.ndarray, colours: np.ndarray) -> None:
    """Raise InputError where one of the indices `used` (N,) but 0 is black, by `colours` (N, 3)."""
    if used[~colours.any(axis=1)].any():
        raise black_is_not_first(path)


def black_is_not_first(path: Path) -> InputError:
    """The error for a palette whose background is not index 0."""
    return InputError(
        f"{path}: found a palette in which black is not index 0, expected index 0 as the "
        f"background, save it as a grey or label image"
    )


def numbers(path: Path, indices: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return the numbers of regions, (H, W), of `indices` into a `palette`, uint8 (N, 3).

    Of greys the grey that is shown, but the index if they run from white to black (ImageJ's
    inverting LUT); of colours, and of MAP_COLOURS, the index. Raises InputError for colours with a
    black that is not index 0.
    """
    if np.array_equal(palette[: len(MAP_COLOURS)], MAP_COLOURS):
        return indices
    used = np.unique(indices).astype(int)
    colours = palette[used].astype(int)
    if (colours != colours[:, :1]).any():
        check_background(path, used, colours)
        return indices
    if used[-1] > 15 and (colours[:, 0] == 255 - used).all():
        return indices
    return palette[:, 0][indices]
