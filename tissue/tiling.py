"""Predict an image of any size tile by tile, to the same result as in one piece.

Each tile is predicted with a margin of real context, its halo, which is then cut off. Where a tile
ends at the image's edge the network meets that edge just as it does in the untiled image, so no
margin is made up there. Reading, the network, and what is done with a tile overlap in time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np

from tissue.background import REACH, background, frame_of
from tissue.stain import Stain, for_network, stain_of
from tissue.windows import Part, Scaled, Windows, interpolate, nearest

TILE = 1024  # pixels; a smaller one wastes more on its halo, a larger one more memory
EVEN = 16  # pixels; windows are mirrored up to multiples, a coarser grid is the network's affair
# Factors of the pixel size at which an image is seen for an average over sizes: nuclei of other
# tissue are often larger than those that were learned, hardly ever smaller.
SIZES = (1.0, 4 / 3)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network, and all that must be known of it to predict an image of any size."""

    # RGB uint8 (N, h, w, 3), and which rows and columns are kept of it -> float32 (N, C, h', w')
    predict: Callable[[np.ndarray, tuple[slice, slice]], np.ndarray]
    outputs: int = 1  # C: the probability of a nucleus, and what else the network gives
    grid: int = 16  # pixels; what it sees begins and ends at multiples
    halo: int = 96  # pixels of context around a tile, a multiple of the grid
    tile_size: int = TILE  # pixels of the image, a multiple of the grid
    batch_size: int = 1  # windows that are predicted at once
    scale: float = 1.0  # pixels of the image that make one of the network's
    sizes: Sequence[float] = SIZES[:1]  # factors of `scale` whose outputs are averaged
    stain: Stain | None = None  # to which each image is brought as a whole

    def at_scale(self, scale: float) -> "Network":
        """The same for an image of another pixel size; a tile is of about one size for it."""
        tile_size = round(self.tile_size * min(scale, 4) / self.grid) * self.grid or self.grid
        return replace(self, scale=scale, tile_size=tile_size)


class Tile(NamedTuple):
    """A rectangle of an image, in pixels."""

    y: int
    x: int
    height: int
    width: int


class Predicted(NamedTuple):
    """A tile's outcome; outputs are None where there is no tissue to predict."""

    tile: Tile
    outputs: np.ndarray | None  # float32 (C, h, w)
    tissue: np.ndarray  # bool (h, w)


def tiles_of(height: int, width: int, tile_size: int) -> list[Tile]:
    """The tiles that cover an image, row by row, from left to right."""
    return [
        Tile(y, x, min(tile_size, height - y), min(tile_size, width - x))
        for y in range(0, height, tile_size)
        for x in range(0, width, tile_size)
    ]


def predict_tiles(image: Windows, tiles: Iterable[Tile], network: Network) -> Iterator[Predicted]:
    """The outcome of each tile, in their order; they start at multiples of the network's tile_size.

    Where the network wants pixels of another size than the image's, it gets them, and its outputs
    are interpolated back. All outputs of `background` are 0. Margins of one colour
    (`background.frame_of`) are cut off before anything else, so that an image's prediction is with
    them what it is without.
    """
    frame, inner, source = _framed(image, network.scale)
    own = stain_of(source) if frame.height else None
    shown = partial(for_network, source=own, target=network.stain)
    tiles = list(tiles)
    parts = [_within(tile, frame) for tile in tiles]
    some = [part for part in parts if part]
    views = zip(
        *(_predict_at(inner, some, network, size, shown) for size in network.sizes), strict=True
    )
    outcomes = (next(views) if part else () for part in parts)

    def finish(item):
        tile, part, outcome = item
        tissue = np.zeros((tile.height, tile.width), bool)
        if not part:
            return Predicted(tile, None, tissue)
        inside = _place(frame, tile, part)
        tissue[inside] = outcome[0][0]  # as it is at the network's pixel size
        seen = [values for _, values in outcome if values is not None]
        if not seen:
            return Predicted(tile, None, tissue)
        outputs = np.zeros((network.outputs, *tissue.shape), np.float32)
        mean = np.mean(seen, axis=0) if len(seen) > 1 else seen[0]
        np.multiply(mean, tissue[inside], out=outputs[inside])
        return Predicted(tile, outputs, tissue)

    yield from ahead(finish, zip(tiles, parts, outcomes, strict=True), 1)


def tissue_of(image: Windows, tiles: Iterable[Tile], scale: float) -> Iterator[tuple]:
    """(Tile, where it is tissue, bool (h, w)) of each tile, as `predict_tiles` has it for a network
    of `scale`, without one.
    """
    frame, inner, source = _framed(image, scale)
    sides, ends = (inner.height, inner.width), (source.height, source.width)

    def look(tile):
        tissue = np.zeros((tile.height, tile.width), bool)
        if part := _within(tile, frame):
            rows, columns = places = nearest(part, ends, sides)
            starts, lengths = zip(
                *((int(at[0]), int(np.ptp(at)) + 1) for at in places), strict=True
            )
            y, x, height, width = _with_context(starts, lengths, ends)
            nothing = background(source.read(y, x, height, width))
            tissue[_place(frame, tile, part)] = ~nothing[np.ix_(rows - y, columns - x)]
        return tile, tissue

    yield from ahead(look, tiles, 4, threads=2)


def _framed(image, scale):
    """(What is left of an image without its margins, that as an image, the same at a scale)"""
    whole = Tile(0, 0, image.height, image.width)
    # The levels of a pyramid end at different places, and no scanner adds such margins.
    frame = whole if len(image.levels) > 1 else Tile(*frame_of(image))
    inner = image if frame == whole else Part(image, frame)
    return frame, inner, Scaled(inner, scale) if frame.height and scale != 1 else inner


def _place(frame, tile, part):
    """Where in a tile its part within the frame lies."""
    y, x = part.y + frame.y - tile.y, part.x + frame.x - tile.x
    return np.s_[..., y : y + part.height, x : x + part.width]


def _within(tile, frame):
    """The part of a tile that lies in a frame, in the frame's pixels, or None."""
    y, x = max(tile.y, frame.y), max(tile.x, frame.x)
    height = min(tile.y + tile.height, frame.y + frame.height) - y
    width = min(tile.x + tile.width, frame.x + frame.width) - x
    return Tile(y - frame.y, x - frame.x, height, width) if min(height, width) > 0 else None


def _with_context(starts, lengths, ends):
    """(y, x, height, width) of a window grown by REACH on each side as far as the image goes."""
    first = [max(start - REACH, 0) for start in starts]
    last = [
        min(start + length + REACH, end)
        for start, length, end in zip(starts, lengths, ends, strict=True)
    ]
    return *first, *(b - a for a, b in zip(first, last, strict=True))


def _predict_at(image, tiles, network, size, shown):
    """(What of each tile is tissue, bool (h, w); its outputs, or None for windows without tissue)
    of `predict_tiles` at one of its sizes.

    `shown` makes of a window what the network sees, and tells what of it is background: at the
    network's pixel size that is what it is in training, whatever the image's own.
    """
    scale = network.scale * size
    source = image if scale == 1 else Scaled(image, scale)
    whole, ends = (image.height, image.width), (source.height, source.width)
    scale = whole[0] / ends[0], whole[1] / ends[1]  # rounded to whole pixels
    grid = network.grid

    def read(part):
        starts, lengths, kept, sides = [], [], [], []
        for start, length, step, end in zip(part[:2], part[2:], scale, ends, strict=True):
            first = int((start + 0.5) / step - 0.5) // grid * grid - network.halo
            # One length for all, whatever the rounding, so that windows make batches.
            is_even = step == 1 and start % grid == 0
            room = network.tile_size if is_even else network.tile_size / step + grid + 2
            last = first + _up(room, grid) + 2 * network.halo
            starts.append(max(first, 0))
            lengths.append(min(last, end) - starts[-1])
            inner = first + network.halo, min(last - network.halo, end)
            kept.append(slice(*(side - starts[-1] for side in inner)))
            sides.append((np.arange(start, start + length) + 0.5) / step - 0.5 - inner[0])
        y, x, height, width = _with_context(starts, lengths, ends)
        at = np.s_[starts[0] - y :, starts[1] - x :]
        window, nothing = (
            found[at][: lengths[0], : lengths[1]]
            for found in shown(source.read(y, x, height, width))
        )
        window = np.pad(
            window, ((0, -lengths[0] % EVEN), (0, -lengths[1] % EVEN), (0, 0)), "reflect"
        )
        rows, columns = nearest(part, ends, whole)
        tissue = ~nothing[np.ix_(rows - starts[0], columns - starts[1])]
        return part, sides, window, tissue, (window.shape, tuple(kept), not nothing.all())

    read_ahead = ahead(read, tiles, 2 * network.batch_size)
    for (_, kept, worth), alike in groupby(read_ahead, key=lambda item: item[-1]):
        for items in _batches(alike, network.batch_size):
            if not worth:
                yield from ((tissue, None) for _, _, _, tissue, _ in items)
                continue
            predicted = network.predict(np.stack([window for _, _, window, *_ in items]), kept)
            for (part, (rows, columns), _, tissue, _), values in zip(items, predicted, strict=True):
                if scale == (1, 1):
                    y, x = round(rows[0]), round(columns[0])
                    yield tissue, values[:, y : y + part.height, x : x + part.width]
                else:
                    outputs = [interpolate(output, rows, columns) for output in values]
                    yield tissue, np.stack(outputs)


def predict_image(image: Windows, network: Network) -> np.ndarray:
    """What a network makes of a whole image, float32 (C, H, W), the first the probability of a
    nucleus.
    """
    whole = np.zeros((network.outputs, image.height, image.width), np.float32)
    tiles = tiles_of(image.height, image.width, network.tile_size)
    for part, values, _ in predict_tiles(image, tiles, network):
        if values is not None:
            whole[:, part.y : part.y + part.height, part.x : part.x + part.width] = values
    return whole


def ahead(function: Callable, items: Iterable, depth: int, threads: int = 1) -> Iterator:
    """`function` of each item, in order, computed by threads up to `depth` items ahead."""
    with ThreadPoolExecutor(threads) as pool:
        queue = deque()
        try:
            for item in items:
                queue.append(pool.submit(function, item))
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
