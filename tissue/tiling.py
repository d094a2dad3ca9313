"""Predict an image of any size tile by tile, to the same result as in one piece.

Each tile is predicted with a margin of real context, its halo, which is then cut off. Where a tile
ends at the image's edge the network meets that edge just as it does in the untiled image, so no
margin is made up there. Reading, the network, and what is done with a tile overlap in time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np

from tissue.colour import COARSE, Colour, colour_of, tissue, to_colour
from tissue.windows import Scaled, Windows, from_array, interpolate

TILE = 1024  # pixels; a smaller one wastes more on its halo, a larger one more memory
# Of the U-Net; other networks have their own.
GRID = 16  # pixels; it pools four times by two, so windows start at multiples of this
HALO = 96  # pixels; its logits depend on at most this distance around them
# Factors of the pixel size at which an image is seen for an average over sizes: nuclei of other
# tissue are often larger than those that were learned, hardly ever smaller.
SIZES = (1.0, 4 / 3)


class Tile(NamedTuple):
    """A rectangle of an image, in pixels."""

    y: int
    x: int
    height: int
    width: int


class Predicted(NamedTuple):
    """A tile's outcome; probability is None where there is nothing but glass."""

    tile: Tile
    probability: np.ndarray | None  # float32 (h, w)
    tissue: float  # fraction of the tile


def tiles_of(height: int, width: int, tile: int) -> list[Tile]:
    """The tiles that cover an image, row by row, from left to right."""
    return [
        Tile(y, x, min(tile, height - y), min(tile, width - x))
        for y in range(0, height, tile)
        for x in range(0, width, tile)
    ]


def predict_tiles(
    image: Windows,
    tiles: Iterable[Tile],
    predict: Callable[[np.ndarray], np.ndarray],
    scale: float = 1.0,
    sizes: Sequence[float] = (1.0,),
    colour: Colour | None = None,
    **settings,
) -> Iterator[Predicted]:
    """The outcome of each tile, in their order.

    `predict` takes RGB uint8 (N, h, w, 3) and returns probability float32 (N, h, w). Where the
    network wants pixels `scale` times as large as the image's, it gets them, and its probability
    is interpolated back; that is done for each of `sizes`, factors of `scale`, and the
    probabilities are averaged. Where the network wants all images of one `colour`, the image as a
    whole is brought to it. `settings` are `tile` and `halo`, pixels, multiples of the network's
    `grid`; `batch_size`, windows; and `skip_glass`: windows without tissue are not predicted. The
    tiles start at multiples of `tile`.
    """
    tiles = list(tiles)
    own = colour_of(image if scale == 1 else Scaled(image, scale)) if colour else None
    recolour = partial(to_colour, source=own, target=colour)
    views = (
        _predict_at(image, tiles, predict, recolour, scale * size, **settings) for size in sizes
    )
    for outcomes in zip(*views, strict=True):
        seen = [found.probability for found in outcomes if found.probability is not None]
        yield outcomes[0]._replace(probability=np.mean(seen, axis=0) if seen else None)


def _predict_at(
    image,
    tiles,
    predict,
    recolour,
    scale,
    tile=TILE,
    halo=HALO,
    grid=GRID,
    batch_size=1,
    skip_glass=False,
):
    """`predict_tiles` at one size."""
    source = image if scale == 1 else Scaled(image, scale)
    scale = image.height / source.height, image.width / source.width  # rounded to whole pixels

    def read(part):
        starts, lengths, sides = [], [], []
        for start, length, step, end in (
            (part.y, part.height, scale[0], source.height),
            (part.x, part.width, scale[1], source.width),
        ):
            first = int((start + 0.5) / step - 0.5) // grid * grid - halo
            # One length for all, whatever the rounding, so that windows make batches.
            room = tile if step == 1 else tile / step + grid + 2
            stop = min(first + _up(room, grid) + 2 * halo, end)
            starts.append(max(first, 0))
            lengths.append(stop - starts[-1])
            sides.append((np.arange(start, start + length) + 0.5) / step - 0.5 - starts[-1])
        window = source.read(*starts, *lengths)
        found = tissue(window)
        inner = _cut(found, sides[0] / COARSE, sides[1] / COARSE)
        window = np.pad(
            recolour(window), ((0, -lengths[0] % GRID), (0, -lengths[1] % GRID), (0, 0)), "reflect"
        )
        return part, sides, window, found.any() or not skip_glass, float(inner.mean())

    def shape(item):
        return item[2].shape, item[3]

    for (_, worth), alike in groupby(ahead(read, tiles, 2 * batch_size), key=shape):
        for items in _batches(alike, batch_size):
            if not worth:
                yield from (Predicted(part, None, share) for part, _, _, _, share in items)
                continue
            predicted = predict(np.stack([window for _, _, window, _, _ in items]))
            for (part, (rows, columns), _, _, share), values in zip(items, predicted, strict=True):
                if scale == (1, 1):
                    y, x = round(rows[0]), round(columns[0])
                    values = values[y : y + part.height, x : x + part.width]
                else:
                    values = interpolate(values, rows, columns)
                yield Predicted(part, values, share)


def predict_image(image: Windows, predict: Callable, **settings) -> np.ndarray:
    """Nucleus probability of a whole image, float32 (H, W); `settings` are `predict_tiles`'."""
    probability = np.zeros((image.height, image.width), np.float32)
    tiles = tiles_of(image.height, image.width, settings.get("tile", TILE))
    for part, values, _ in predict_tiles(image, tiles, predict, **settings):
        if values is not None:
            probability[part.y : part.y + part.height, part.x : part.x + part.width] = values
    return probability


def seam_samples(
    image: Windows,
    predict: Callable,
    tile: int = TILE,
    grid: int = GRID,
    side: int = 2 * TILE,
    **settings,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows of an image predicted untiled and tiled, both float32 (h, w), for comparing.

    Of a large image three windows of `side` pixels along its diagonal, of a small one all of it. A
    window that is not larger than a tile is cut into four.
    """
    height, width = min(image.height, side), min(image.width, side)
    places = {(f * (image.height - height) // 4, f * (image.width - width) // 4) for f in (1, 2, 3)}
    for y, x in sorted(places):
        window = from_array(image.read(y, x, height, width))
        whole = _up(max(height, width), grid)
        tiles = whole, min(tile, _up(whole / 2, grid))
        yield tuple(predict_image(window, predict, tile=t, grid=grid, **settings) for t in tiles)


def ahead(function: Callable, items: Iterable, depth: int) -> Iterator:
    """`function` of each item, in order, computed in a thread up to `depth` items ahead."""
    with ThreadPoolExecutor(1) as thread:
        queue = deque()
        try:
            for item in items:
                queue.append(thread.submit(function, item))
                if len(queue) > depth:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for waiting in queue:
                waiting.cancel()


def _batches(items, size):
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _up(length, grid):
    """The next multiple of the grid."""
    return int(-(-length // grid) * grid)


def _cut(coarse, rows, columns):
    """The part of a coarse map that holds the places from first to last of rows and columns."""
    (top, bottom), (left, right) = ((int(p[0]), int(p[-1]) + 1) for p in (rows, columns))
    return coarse[top : max(bottom, top + 1), left : max(right, left + 1)]
