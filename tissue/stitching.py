"""Counts what lies across the borders of tiles, once, without ever holding the whole mask.

Each tile is labelled by itself; its pieces get a node each, and nodes that meet across a border are
one piece (Rosenfeld & Pfaltz 1966, J. ACM 13:471). What is kept is one row of nodes, and which
nodes are one.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from tissue.tiling import TILE, Tile, ahead, tiles_of
from tissue.windows import Windows

MARGIN = 64  # pixels around a tile in which nuclei are looked for, at first
THREADS = min(4, os.cpu_count() or 1)  # that look for nuclei; the watershed lets others work
WIDEST = 512  # pixels; the margin that clumps too large for a smaller one get at most


class ContourCounter:
    """Counts the outer contours of a mask that comes in tiles: `len(nuclei.contours(mask))`.

    An outer contour belongs to an object (8-connected) whose surroundings (4-connected) reach the
    image's edge; an object in the hole of another has none. So both are followed across borders.
    Tiles come row by row, from left to right, and cover the image without gap or overlap.
    """

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width  # pixels of the whole image
        self.objects = _Regions(width, corners=True)
        self.surroundings = _Regions(width, corners=False)
        # Of objects at a border of tiles: node, place of the first pixel, what is above (n, 3).
        self.firsts = []
        self.whole = []  # of the others: surroundings, and how many lie in them (2, n)

    def add(self, mask: np.ndarray, y: int, x: int) -> None:
        """Add a tile, bool (h, w), whose first pixel lies at row `y` and column `x`."""
        above = self.surroundings.above(x, y, mask.shape[1])
        around, node_of = self.surroundings.add(~mask, y, x)
        h, w = mask.shape
        at_edge = (around[0], y == 0), (around[-1], y + h == self.height)
        at_edge += (around[:, 0], x == 0), (around[:, -1], x + w == self.width)
        for edge, is_images in at_edge:
            if is_images:
                self.surroundings.unite(node_of(edge), np.where(edge > 0, OUTSIDE, -1))

        known = self.objects.nodes
        labels, _ = self.objects.add(mask, y, x)
        nodes = np.arange(known, self.objects.nodes)
        row, column = np.divmod(_first_pixels(labels, len(nodes) + 1)[1:], w)
        # The pixel above an object's first one belongs to what surrounds it.
        surrounded = np.where(row > 0, node_of(around[row - 1, column]), above[column])
        places = (y + row) * self.width + x + column
        shared = np.isin(nodes - known + 1, _on_border(labels))
        self.firsts.append(np.stack([nodes, places, surrounded], axis=1)[shared])
        # Of those within the tile alone only their number is of use later.
        self.whole.append(np.stack(np.unique(surrounded[~shared], return_counts=True)))

    def count(self) -> int:
        """The number of outer contours of all that was added."""
        node, place, surrounded = np.concatenate(self.firsts).T
        found = self.objects.joined()[node]
        _, first = np.unique(found[order := np.argsort(place)], return_index=True)
        around = self.surroundings.joined()
        is_outer = around == around[OUTSIDE]
        inside, number = np.concatenate(self.whole, axis=1)
        return int(
            np.count_nonzero(is_outer[surrounded[order][first]]) + number[is_outer[inside]].sum()
        )


OUTSIDE = 0  # the node of what lies around the image


class _Regions:
    """Pieces of a mask that comes in tiles: each has a node, and nodes that meet are united."""

    def __init__(self, width, corners):
        self.corners = corners  # whether pixels that meet at a corner are connected
        self.nodes = 1  # so many are given, OUTSIDE among them
        self.pairs = [np.zeros((2, 0), int)]  # nodes that are one
        # Nodes along the borders to the tiles above and to the left; -1 where no piece is.
        self.last_row, self.row = np.full(width + 2, -1), np.full(width + 2, -1)
        self.column = None

    def above(self, x, y, width):
        """The nodes in the row above a tile that comes next, OUTSIDE where the image ends."""
        last = self.row if x == 0 else self.last_row
        return last[1 + x : 1 + x + width].copy() if y else np.full(width, OUTSIDE)

    def add(self, mask, y, x):
        """A tile's pieces, int32 (h, w), 1 to n, 0 for none, and what gives the nodes of these
        numbers, int64 of any shape, -1 for none.
        """
        if x == 0:
            self.last_row, self.row = self.row, np.full_like(self.row, -1)
        count, labels = cv2.connectedComponents(
            mask.view(np.uint8), connectivity=8 if self.corners else 4
        )
        before = self.nodes - 1

        def node_of(numbers):
            return np.where(numbers > 0, numbers.astype(np.int64) + before, -1)

        self.nodes += count - 1
        top, left = node_of(labels[0]), node_of(labels[:, 0])
        for shift in (-1, 0, 1) if self.corners else (0,):
            self.unite(self.last_row[1 + x + shift :][: mask.shape[1]] if y else None, top)
        if x > 0:
            self.unite(self.column, left)
            if self.corners:
                self.unite(self.column[1:], left[:-1])
                self.unite(self.column[:-1], left[1:])
        self.row[1 + x : 1 + x + mask.shape[1]] = node_of(labels[-1])
        self.column = node_of(labels[:, -1])
        return labels, node_of

    def unite(self, ones, others):
        """Unite nodes that face each other; negative ones are none."""
        if ones is None:
            return
        both = (ones >= 0) & (others >= 0)
        if both.any():
            self.pairs.append(np.unique(np.stack([ones[both], others[both]]), axis=1))

    def joined(self):
        """The number of the piece that each node belongs to, (nodes,)."""
        one, other = np.concatenate(self.pairs, axis=1)
        links = coo_matrix((np.ones(len(one), bool), (one, other)), (self.nodes,) * 2)
        return connected_components(links, directed=False)[1]


def count_contours(mask: Windows) -> int:
    """The number of outer contours of a mask that is read by windows, as ContourCounter says."""
    counter = ContourCounter(mask.height, mask.width)
    for tile in tiles_of(mask.height, mask.width, TILE):
        counter.add(mask.read(*tile), tile.y, tile.x)
    return counter.count()


class FoundNuclei(NamedTuple):
    """What `nuclei_by_tiles` found in a tile, and which nuclei it met there for the first time."""

    tile: Tile
    labels: np.ndarray  # int32 (h, w): ids of the whole image in the tile's pixels
    window: Tile  # where the new nuclei lie, which may reach beyond the tile
    new: np.ndarray  # int32 (h, w) of the window: 1 to n, the new nuclei alone
    ids: np.ndarray  # int64 (n,): their ids
    confidence: np.ndarray | None  # float64 (n,): theirs, None without depths
    dropped: np.ndarray  # bool (h, w): the tile's pixels of nuclei without enough confidence
    new_dropped: int  # number of those that no tile before has met


def nuclei_by_tiles(
    mask: Windows,
    tiles: Iterable[Tile],
    find: Callable[[np.ndarray, tuple[slice, slice]], tuple[np.ndarray, np.ndarray | None]],
    least: float = 0.0,
) -> Iterator[FoundNuclei]:
    """The nuclei of a mask or a depth map that is read by windows, each met once, tile by tile.

    `find` gives the labels of a mask bool (H, W) or of a depth map uint8 (H, W), int32, and the
    confidence of each nucleus, or None: `nuclei.Found`; of objects alone that reach into a core,
    its rows and columns. Nuclei with less than the `least` are dropped: they get no ids. What
    `find` makes of an object must depend on that object and its nearest surroundings alone. Ids are
    1, 2, 3, ... in the order in which tiles meet the nuclei. A
    nucleus in several tiles is known by its first pixel. That is exact for objects that reach no
    more than WIDEST pixels beyond the tiles they lie in.
    """
    known = {}  # first pixel's place -> id, of nuclei that reach beyond a tile seen so far; 0: none
    count = 0
    looked = ahead(lambda tile: (tile, _labels_around(mask, tile, find)), tiles, THREADS, THREADS)
    for tile, (window, (labels, confidence)) in looked:
        if tile.x == 0:
            above = (tile.y - 2 * WIDEST) * mask.width
            known = {place: number for place, number in known.items() if place >= above}
        top, left = tile.y - window.y, tile.x - window.x
        core = labels[top : top + tile.height, left : left + tile.width]
        present = np.flatnonzero(np.bincount(core.ravel(), minlength=1))
        present = present[present > 0]
        highest = int(labels.max(initial=0))
        y, x = np.divmod(_first_pixels(labels, highest + 1)[present], window.width)
        places = ((window.y + y) * mask.width + window.x + x).tolist()
        number = np.zeros(highest + 1, np.int32)
        kept = np.ones(highest + 1, bool)
        if confidence is not None:
            kept[1:] = confidence >= least
        fresh = np.array([place not in known for place in places], bool)
        new = present[fresh & kept[present]]
        ids = count + 1 + np.arange(len(new))
        count += len(ids)
        number[new] = ids
        number[present[~fresh]] = [
            known[p] for p, is_new in zip(places, fresh, strict=True) if not is_new
        ]
        at_border = np.isin(present, _on_border(core))
        known.update((p, int(number[label])) for p, label, reaches in
                     zip(places, present, at_border, strict=True) if reaches)  # fmt: skip
        local = np.zeros(highest + 1, np.int32)
        local[new] = np.arange(1, len(ids) + 1)
        yield FoundNuclei(
            tile, number[core], window, local[labels], ids,
            None if confidence is None else confidence[new - 1],
            (~kept)[core], int(np.count_nonzero(fresh)) - len(new),  # not of numpy
        )  # fmt: skip


def _labels_around(mask, tile, find):
    """A window around a tile that holds all objects of the tile whole, and its labels."""
    margin = MARGIN
    while True:
        y, x = max(tile.y - margin, 0), max(tile.x - margin, 0)
        bottom = min(tile.y + tile.height + margin, mask.height)
        right = min(tile.x + tile.width + margin, mask.width)
        pixels = mask.read(y, x, bottom - y, right - x)
        _, objects = cv2.connectedComponents((pixels > 0).view(np.uint8), connectivity=4)
        starts = tile.y - y, tile.x - x
        core = tuple(slice(a, a + n) for a, n in zip(starts, tile[2:], strict=True))
        inside = objects[core]
        sides = ((y, objects[0]), (x, objects[:, 0]))
        sides += ((mask.height - bottom, objects[-1]), (mask.width - right, objects[:, -1]))
        cut = np.unique(np.concatenate([side for more, side in sides if more] or [[0]]))
        if margin >= WIDEST or not np.isin(cut[cut > 0], inside).any():
            return Tile(y, x, bottom - y, right - x), find(pixels, core)
        margin *= 2


def _on_border(labels):
    """The labels along the four sides of a tile."""
    return np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))


def _first_pixels(labels, count):
    """The flat index of each label's first pixel, int64 (count,)."""
    flat = labels.ravel()
    first = np.zeros(count, np.int64)
    begins = np.append(True, flat[1:] != flat[:-1])  # a label's first pixel begins a run
    starts = np.flatnonzero(begins)[::-1]
    first[flat[starts]] = starts  # of equal indices the last assignment, the first pixel, stays
    return first
