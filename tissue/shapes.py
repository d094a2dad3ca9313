"""Outlines as arrays, any number of them, drawn by windows.

A pixel belongs to an outline if its centre, (x + 0.5, y + 0.5), lies within; coordinates are pixels
from the top left corner of the image's first pixel. Of several outlines the last one has the pixel.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import shapely

BAND = 512  # rows that are looked at once


class Shapes:
    """Outlines as arrays: outline i, a set of rings, is what an odd number of its rings encloses.

    `points` is float32 (P, 2) of x, y, all rings after each other, each closed; `starts` int64
    (R + 1,) where each ring begins in it, `firsts` int64 (n + 1,) which ring is each outline's
    first. `scale` is by what (x, y) they are multiplied before they are drawn.
    """

    def __init__(self, points, starts, firsts, scale=(1.0, 1.0)):
        self.points, self.starts, self.firsts = points, starts, firsts
        self.scale = np.array(scale, float)

    @classmethod
    def of(cls, geometries: np.ndarray) -> "Shapes":
        """The Shapes of valid polygons and multipolygons, none of them empty."""
        if not len(geometries):
            return cls(np.empty((0, 2), np.float32), np.zeros(1, int), np.zeros(1, int))
        _, points, offsets = shapely.to_ragged_array(list(geometries))
        firsts = offsets[1] if len(offsets) == 2 else offsets[1][offsets[2]]
        return cls(points[:, :2].astype(np.float32), offsets[0].astype(int), firsts.astype(int))

    @classmethod
    def joined(cls, several: Sequence["Shapes"]) -> "Shapes":
        """All outlines of several Shapes in order."""
        several = [shapes for shapes in several if len(shapes)]
        if not several:
            return cls.of(np.empty(0, object))
        starts, firsts = [np.zeros(1, int)], [np.zeros(1, int)]
        for shapes in several:
            starts.append(shapes.starts[1:] + starts[-1][-1])
            firsts.append(shapes.firsts[1:] + firsts[-1][-1])
        points = np.concatenate([shapes.points for shapes in several])
        return cls(points, np.concatenate(starts), np.concatenate(firsts))

    def __len__(self):
        return len(self.firsts) - 1

    def scaled(self, scale: tuple[float, float]) -> "Shapes":
        """The same outlines, x and y multiplied by `scale` once more."""
        return Shapes(self.points, self.starts, self.firsts, self.scale * scale)

    @cached_property
    def _tree(self):
        """Finds the boxes around the outlines, before scaling."""
        begin = self.starts[self.firsts[:-1]]
        low = np.minimum.reduceat(self.points, begin).T if len(begin) else np.empty((2, 0))
        high = np.maximum.reduceat(self.points, begin).T if len(begin) else np.empty((2, 0))
        return shapely.STRtree(shapely.box(*low.astype(float), *high.astype(float)))

    @cached_property
    def _last(self):
        """Which points end a ring, bool (P,)."""
        last = np.zeros(len(self.points), bool)
        last[self.starts[1:] - 1] = True
        return last

    def runs(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """The pixels of a window row by row: int64 (4, m) of outline, row, first and last + 1
        column, the latter three counted from the window; outline by outline, in order."""
        corners = np.array([[x, y], [x + width, y + height]]) / self.scale
        which = np.sort(self._tree.query(shapely.box(*corners.ravel())))
        if not len(which):
            return np.empty((4, 0), int)
        begin, end = self.starts[self.firsts[which]], self.starts[self.firsts[which + 1]]
        at = _ranges(begin, end)
        points = self.points[at].astype(float) * self.scale
        item = np.repeat(np.arange(len(which)), end - begin)
        one, other = points[:-1], points[1:]
        # Edges that cross the middle of a row: y within [one end, other end).
        low, high = np.ceil(np.sort([one[:, 1], other[:, 1]], axis=0) - 0.5).clip(y, y + height)
        count = np.where(self._last[at[:-1]], 0, high - low).astype(int)
        edge = np.repeat(np.arange(len(count)), count)
        row = _ranges(low.astype(int), low.astype(int) + count)
        (x0, y0), (x1, y1) = one[edge].T, other[edge].T
        across = x0 + (row + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        column = np.ceil(across - 0.5).clip(x, x + width).astype(int) - x
        order = np.sort((item[edge] * height + row - y) * (width + 1) + column)
        place, column = np.divmod(order, width + 1)
        item, row = np.divmod(place[::2], height)
        runs = np.stack([which[item], row, column[::2], column[1::2]])
        return runs[:, runs[2] < runs[3]]

    def numbers(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """A window as int32 (h, w): which outline, from 1, has the pixel; 0 none."""
        drawn = np.zeros(height * width, np.int32)
        item, row, first, last = self.runs(y, x, height, width)
        # Of a place that is named twice, the last value stays.
        drawn[_ranges(row * width + first, row * width + last)] = np.repeat(item + 1, last - first)
        return drawn.reshape(height, width)


def _ranges(begin, end):
    """All whole numbers of several ranges after each other."""
    count = end - begin
    return np.arange(count.sum()) + np.repeat(begin - (np.cumsum(count) - count), count)


def overlaps(shapes: Shapes, height: int, width: int) -> tuple[int, int]:
    """(pixels that several outlines claim; outlines of which no pixel is to be seen)"""
    shared, visible = 0, np.zeros(len(shapes), bool)
    for y in range(0, height, BAND):
        item, row, first, last = shapes.runs(y, 0, min(BAND, height - y), width)
        if not len(item):
            continue
        begin, end = row * width + first, row * width + last
        order = np.argsort(begin, kind="stable")
        item, begin, end = item[order], begin[order], end[order]
        reached = np.maximum.accumulate(end)
        meets = np.zeros(len(item), bool)
        meets[1:] = begin[1:] < reached[:-1]
        shared += int((np.minimum(end[1:], reached[:-1]) - begin[1:])[meets[1:]].sum())
        # Runs that overlap nothing are seen whole; of a group that overlaps, pixels tell.
        meets[:-1] |= meets[1:]
        group = np.cumsum(~(np.append(False, begin[1:] < reached[:-1])))
        alone = np.bincount(group)[group] == 1
        visible[item[alone]] = True
        item, begin, end = item[~alone], begin[~alone], end[~alone]
        order = np.argsort(item, kind="stable")
        item, begin, end = item[order], begin[order], end[order]
        pixels = _ranges(begin, end)
        owner = np.repeat(item, end - begin)
        _, seen = np.unique(pixels[::-1], return_index=True)
        visible[owner[::-1][seen]] = True
    return shared, int((~visible).sum())
