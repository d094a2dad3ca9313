"""Stain normalisation: the tissue of each image is brought to the same mean and spread of colour.

Sections differ in stain, thickness and scanner. What a network learns from some holds better for
others where all look alike, those that it learns from and those that it is used on. What is no
tissue (tissue/background.py) has no stain: it is left as it is.
"""

from typing import NamedTuple

import cv2
import numpy as np

from tissue.background import background, background_and_padding

SIDE, ROWS = 128, 16  # pixels of a window, and rows and columns of windows, that tell the colour
LEAST, MOST = 0.5, 3.0  # change of a spread; more would only make noise large
# Of OpenCV's 8-bit CIELAB: what a step of a channel is worth, and its zero.
STEP, ZERO = np.array([100 / 255, 1, 1]), np.array([0, 128, 128])


class Stain(NamedTuple):
    """Mean and standard deviation of the channels of CIELAB (L from 0 to 100), over tissue."""

    mean: tuple[float, float, float]
    spread: tuple[float, float, float]


# A section stained well, with room above and below: neither chromatin nor lumina are cut off.
TARGET = Stain((62.0, 26.0, -18.0), (17.0, 10.5, 8.5))
STAINS = {"none": None, "reinhard": TARGET}  # by the names that --stain gives them


def stain_of(image) -> Stain | None:
    """The stain of an image's tissue, or None where there is only glass.

    `image` has `height`, `width` and `read(y, x, height, width)`, as windows.Windows. It is read
    whole up to 2048 x 2048 pixels, and of a larger one 16 x 16 windows spread over all of it.
    """
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for y, height in _places(image.height):
        for x, width in _places(image.width):
            window = image.read(y, x, height, width)
            tissue = ~background(window)
            number = np.count_nonzero(tissue)
            lab = cv2.cvtColor(window, cv2.COLOR_RGB2LAB)
            its_mean, its_spread = cv2.meanStdDev(lab, mask=tissue.view(np.uint8))
            count += number
            total += number * its_mean[:, 0]
            squares += number * (its_mean**2 + its_spread**2)[:, 0]
    if count == 0:
        return None
    mean = total / count
    spread = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return Stain(  # rounded, so that it is the same on all machines
        tuple(((mean - ZERO) * STEP).round(3).tolist()), tuple((spread * STEP).round(3).tolist())
    )


def to_stain(image: np.ndarray, source: Stain | None, target: Stain | None) -> np.ndarray:
    """RGB uint8 (H, W, 3) whose tissue is brought from the stain `source` to `target`.

    Each channel of CIELAB is shifted and stretched, as Reinhard et al. 2001 (IEEE CG&A 21(5):34)
    do in another space; a spread is changed to its half at least and three times at most. What is
    `background` keeps its colour, and everything does without a source (there is no tissue) or
    without a target.
    """
    if source is None or target is None:
        return image
    return _changed(image, source, target, background(image))


def for_network(
    image: np.ndarray, source: Stain | None, target: Stain | None
) -> tuple[np.ndarray, np.ndarray]:
    """`to_stain` with padding in the mean colour of tissue, and the image's `background`.

    A network has not learned what black corners or grey margins are, and errs beside them; tissue
    without structure is the least that it can see there (docs/lab_notes.md).
    """
    kept, padding = background_and_padding(image)
    if source is None:
        return image, kept
    changed = _changed(image, source, target, kept) if target else image
    if padding.any():
        mean = (np.array((target or source).mean) / STEP + ZERO).round().clip(0, 255)
        colour = cv2.cvtColor(mean.astype(np.uint8)[None, None], cv2.COLOR_LAB2RGB)
        changed = np.where(padding[..., None], colour, changed)
    return changed, kept


def _changed(image, source, target, kept):
    """`to_stain` but for the pixels `kept`, bool (H, W)."""
    gain = np.array(target.spread) / np.maximum(source.spread, 1e-6)
    values = (np.arange(256)[:, None] - ZERO) * STEP  # (256, 3)
    values = (values - source.mean) * gain.clip(LEAST, MOST) + target.mean
    table = (values / STEP + ZERO).round().clip(0, 255).astype(np.uint8)[None]
    lab = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2LAB), table)
    return cv2.copyTo(image, kept.view(np.uint8), cv2.cvtColor(lab, cv2.COLOR_LAB2RGB))


def _places(length):
    """(start, length) of the windows along a side."""
    if length <= SIDE * ROWS:
        return [(start, min(SIDE, length - start)) for start in range(0, length, SIDE)]
    return [((length - SIDE) * i // (ROWS - 1), SIDE) for i in range(ROWS)]
