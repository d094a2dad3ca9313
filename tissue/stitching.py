"""Counts what lies across the borders of tiles, once, without ever holding the whole mask.

Each tile is labelled by itself. Of its components, those inside are done with at once; those that
touch a border get a node, and nodes that meet across a border are united (union-find; Rosenfeld &
Pfaltz 1966, J. ACM 13:471). What is kept is one row of labels and the nodes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import cv2
import numpy as np

from tissue.tiling import Tile
from tissue.windows import Windows

MARGIN = 64  # pixels around a tile in which nuclei are looked for, at first
WIDEST = 512  # pixels; the margin that clumps too large for a smaller one get at most


class ContourCounter:
    """Counts the outer contours of a mask that comes in tiles: `len(nuclei.contours(mask))`.

    An outer contour belongs to an object (8-connected) whose surroundings (4-connected) reach the
    image's edge; an object in the hole of another has none. So both are followed across borders.
    Tiles come row by row, from left to right, and cover the image without gap or overlap.
    """

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width  # pixels of the whole image
        self.objects, self.surroundings = _Nodes(), _Nodes()
        self.outside = self.surroundings.new(1)  # what is connected with the image's edge
        self.firsts = {}  # object node -> its first pixel's place and the surroundings above it
        self.enclosed = {}  # surroundings node -> objects within one tile that lie in it
        # Nodes along the borders to the tiles above and to the left; -1: the other kind of pixel.
        self.above = {kind: np.full(width + 2, -1) for kind in ("objects", "surroundings")}
        self.next_above = {kind: np.full(width + 2, -1) for kind in ("objects", "surroundings")}
        self.left = {}

    def add(self, mask: np.ndarray, y: int, x: int) -> None:
        """Add a tile, bool (h, w), whose first pixel lies at row `y` and column `x`."""
        w = mask.shape[1]
        if x == 0 and y > 0:
            self.above, self.next_above = self.next_above, self.above
            for nodes in self.next_above.values():
                nodes.fill(-1)
        pixels = mask.astype(np.uint8)
        count, labels = cv2.connectedComponents(pixels, connectivity=8)
        around, around_labels = cv2.connectedComponents(1 - pixels, connectivity=4)

        # Surroundings: outside, a node, or (-2) closed within this tile.
        nodes = np.full(around, -2)
        nodes[_on_border(around_labels)] = 0
        nodes[0] = -1
        nodes[nodes == 0] = self.surroundings.new(np.count_nonzero(nodes == 0))
        for edge, at_edge in self._edges(around_labels, y, x):
            if at_edge:
                for node in np.unique(nodes[edge[edge > 0]]):
                    self.surroundings.unite(self.outside, node)
        around_nodes = nodes

        # Objects: a node, or (-2) whole within this tile.
        shared = np.zeros(count, bool)  # reaches a border with another tile
        for edge, at_edge in self._edges(labels, y, x):
            if not at_edge:
                shared[edge] = True
        shared[0] = False
        nodes = np.full(count, -2)
        nodes[0] = -1
        nodes[shared] = self.objects.new(np.count_nonzero(shared))

        # The pixel above an object's first one belongs to what surrounds it.
        row, column = np.divmod(_first_pixels(labels, count), w)
        surroundings = np.full(count, self.outside)
        below = row > 0
        surroundings[below] = around_nodes[around_labels[row[below] - 1, column[below]]]
        if y > 0:
            surroundings[~below] = self.above["surroundings"][1 + x + column[~below]]
        for label in np.flatnonzero(shared):
            place = (y + int(row[label])) * self.width + x + int(column[label])
            self.firsts[int(nodes[label])] = place, int(surroundings[label])
        whole = ~shared
        whole[0] = False
        for node, objects in zip(*np.unique(surroundings[whole], return_counts=True), strict=True):
            if node >= 0:
                self.enclosed[int(node)] = self.enclosed.get(int(node), 0) + int(objects)

        self._join("objects", self.objects, nodes[labels[[0, -1]]], y, x, diagonally=True)
        self._join("surroundings", self.surroundings, around_nodes[around_labels[[0, -1]]], y, x)
        for kind, tree, sides in (
            ("objects", self.objects, nodes[labels[:, [0, -1]]]),
            ("surroundings", self.surroundings, around_nodes[around_labels[:, [0, -1]]]),
        ):
            if x > 0:
                tree.unite_all(self.left[kind], sides[:, 0])
                if kind == "objects":
                    tree.unite_all(self.left[kind][1:], sides[:-1, 0])
                    tree.unite_all(self.left[kind][:-1], sides[1:, 0])
            self.left[kind] = sides[:, 1]

    def _edges(self, labels, y, x):
        """The labels along each side of a tile, and whether the image ends there."""
        h, w = labels.shape
        yield labels[0], y == 0
        yield labels[-1], y + h == self.height
        yield labels[:, 0], x == 0
        yield labels[:, -1], x + w == self.width

    def _join(self, kind, tree, rows, y, x, diagonally=False):
        """Unite a tile's first row of nodes with those above it, and keep its last one."""
        first, last = rows
        w = len(first)
        if y > 0:
            for shift in (-1, 0, 1) if diagonally else (0,):
                tree.unite_all(self.above[kind][1 + x + shift : 1 + x + shift + w], first)
        self.next_above[kind][1 + x : 1 + x + w] = last

    def count(self) -> int:
        """The number of outer contours of all that was added."""
        outside = self.surroundings.root(self.outside)
        first = {}
        for node, place_and_surroundings in self.firsts.items():
            root = self.objects.root(node)
            first[root] = min(first.get(root, place_and_surroundings), place_and_surroundings)
        total = sum(self.surroundings.root(around) == outside for _, around in first.values())
        return total + sum(
            objects
            for node, objects in self.enclosed.items()
            if self.surroundings.root(node) == outside
        )


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
    find: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]],
    least: float = 0.0,
) -> Iterator[FoundNuclei]:
    """The nuclei of a mask or a depth map that is read by windows, each met once, tile by tile.

    `find` gives the labels of a mask bool (H, W) or of a depth map uint8 (H, W), int32, and the
    confidence of each nucleus, or None: `nuclei.Found`. Nuclei with less than the `least` are
    dropped: they get no ids. What `find` makes of an object must depend on that object and its
    nearest surroundings alone. Ids are 1, 2, 3, ... in the order in which tiles meet the nuclei. A
    nucleus in several tiles is known by its first pixel. That is exact for objects that reach no
    more than WIDEST pixels beyond the tiles they lie in.
    """
    known = {}  # first pixel's place -> id, of nuclei that reach beyond a tile seen so far; 0: none
    count = 0
    for tile in tiles:
        if tile.x == 0:
            above = (tile.y - 2 * WIDEST) * mask.width
            known = {place: number for place, number in known.items() if place >= above}
        window, (labels, confidence) = _labels_around(mask, tile, find)
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
        inside = objects[tile.y - y :, tile.x - x :][: tile.height, : tile.width]
        sides = ((y, objects[0]), (x, objects[:, 0]))
        sides += ((mask.height - bottom, objects[-1]), (mask.width - right, objects[:, -1]))
        cut = np.unique(np.concatenate([side for more, side in sides if more] or [[0]]))
        if margin >= WIDEST or not np.isin(cut[cut > 0], inside).any():
            return Tile(y, x, bottom - y, right - x), find(pixels)
        margin *= 2


class _Nodes:
    """Union-find over nodes numbered from 0."""

    def __init__(self):
        self.parents = []

    def new(self, count):
        """The numbers of `count` new nodes; one is given as an int."""
        start = len(self.parents)
        self.parents.extend(range(start, start + count))
        return start if count == 1 else np.arange(start, start + count)

    def root(self, node):
        parents = self.parents
        while parents[node] != node:
            parents[node] = node = parents[parents[node]]
        return node

    def unite(self, one, other):
        one, other = self.root(one), self.root(other)
        self.parents[max(one, other)] = min(one, other)

    def unite_all(self, ones, others):
        """Unite pairs of nodes that face each other; negative ones are no nodes."""
        both = (ones >= 0) & (others >= 0)
        for one, other in np.unique(np.stack([ones[both], others[both]], 1), axis=0).tolist():
            self.unite(one, other)


def _on_border(labels):
    """The labels along the four sides of a tile."""
    return np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))


def _first_pixels(labels, count):
    """The flat index of each label's first pixel, int64 (count,)."""
    flat = labels.ravel()
    first = np.zeros(count, np.int64)
    starts = np.flatnonzero(np.diff(flat, prepend=0))[::-1]  # a label's first pixel starts a run
    first[flat[starts]] = starts  # of equal indices the last assignment, the first pixel, stays
    return first
