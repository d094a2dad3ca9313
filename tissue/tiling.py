"""Predict an image of any size tile by tile, to the same result as in one piece.

Each tile is predicted with a margin of real context, its halo, which is then cut off. Where a tile
ends at the image's edge the network meets that edge just as it does in the untiled image, so no
margin is made up there.
"""

from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np

GRID = 16  # pixels; the U-Net pools four times by two, so tiles start at multiples of this
TILE = 512
HALO = 96  # pixels; a logit of the U-Net depends on at most this distance around it


def predict_image(
    image: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray],
    tile: int = TILE,
    halo: int = HALO,
    batch_size: int = 4,
) -> np.ndarray:
    """Nucleus probability of a whole image, float32 (H, W).

    `image` is RGB uint8 (H, W, 3); `predict` takes uint8 (N, h, w, 3) and returns float32
    (N, h, w). `tile` and `halo` are pixels, multiples of 16.
    """
    height, width = image.shape[:2]
    image = np.pad(image, ((0, -height % GRID), (0, -width % GRID), (0, 0)), mode="reflect")
    probability = np.empty(image.shape[:2], np.float32)
    windows = sorted(_windows(*image.shape[:2], tile, halo), key=_shape)
    for _, alike in groupby(windows, key=_shape):  # only windows of one shape make a batch
        alike = list(alike)
        for start in range(0, len(alike), batch_size):
            batch = alike[start : start + batch_size]
            predicted = predict(np.stack([image[window] for window, _ in batch]))
            for (window, inner), values in zip(batch, predicted, strict=True):
                kept = zip(window, inner, strict=True)
                offset = [slice(i.start - w.start, i.stop - w.start) for w, i in kept]
                probability[inner] = values[tuple(offset)]
    return probability[:height, :width]


def _shape(window_and_inner: tuple) -> tuple[int, ...]:
    return tuple(side.stop - side.start for side in window_and_inner[0])


def _windows(height: int, width: int, tile: int, halo: int) -> Iterator[tuple]:
    """For each tile: the window to predict (rows, columns) and the part of it to keep."""
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            inner = (slice(y, min(y + tile, height)), slice(x, min(x + tile, width)))
            window = (
                slice(max(y - halo, 0), min(y + tile + halo, height)),
                slice(max(x - halo, 0), min(x + tile + halo, width)),
            )
            yield window, inner
