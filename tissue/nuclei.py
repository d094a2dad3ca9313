"""From mask to nuclei: contours, and touching nuclei split.

A label map is int32 (H, W): 0 is background, 1 to n are the nuclei. Everything here works for a
place of an image as it does for the whole: what becomes of an object depends on that object and on
what lies within a few micrometres of it.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import cv2
import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

from tissue.depth import CROSS, confidence, fill_holes
from tissue.files import InputError

USUAL_PIXEL_SIZE = 0.25  # micrometres; 40x, what an image of unknown pixel size is split as
DEEPEST = 1000  # pixels; an image without background would have no distance to it
WINDOW = 1024  # pixels; the side of what is split at once, which bounds the memory


class Split(NamedTuple):
    """How objects of a mask become nuclei; lengths in micrometres, areas in square micrometres."""

    sigma: float  # of the Gaussian that smooths the distance to the background, or the depth
    h: float  # a neck is cut if the distance falls there by this share of the smaller peak, or more
    hole: float  # holes up to this area are filled first; larger ones tell nuclei apart
    smallest: float  # smaller objects are dropped, smaller parts stay with their neighbour
    confidence: float = 0.0  # nuclei are dropped whose largest depth, a share, is below; 0: none

    def values(self) -> dict[str, float]:
        """The values by name, without a confidence of 0: as before there were depths."""
        values = self._asdict()
        if not self.confidence:
            del values["confidence"]
        return values

    def __str__(self):
        return " ".join(f"{name}={value:g}" for name, value in self.values().items())


SPLITTING = Split._fields[:-1]  # what --split can change; confidence has its own flag
# One rule for both: only holes and specks mean less where a network made them.
REFERENCE_SPLIT = Split(sigma=0.5, h=0.05, hole=0.0, smallest=1.25)
PREDICTION_SPLIT = Split(sigma=0.5, h=0.05, hole=2.5, smallest=2.5)
INSTANCE_SPLIT = Split(sigma=0.25, h=0.2, hole=2.5, smallest=2.5, confidence=0.3)  # of depth maps
# What `count_errors` tries.
SIGMAS, HS = (0.25, 0.375, 0.5, 0.75), (0.02, 0.03, 0.05, 0.08, 0.12, 0.2)
SMALLESTS = (1.25, 2.5, 3.75, 5.0)


class Found(NamedTuple):
    """All nuclei of a mask, those that a lack of confidence drops too."""

    labels: np.ndarray  # int32 (H, W), 1 to n
    confidence: np.ndarray | None  # float64 (n,), 0 to 1, `depth.confidence`; None without depths


def contours(mask: np.ndarray) -> list[np.ndarray]:
    """Outer contours of a mask bool (H, W): one int32 (n, 1, 2) of x, y pixels an object.

    Holes inside an object are not counted (cv2.RETR_EXTERNAL), nor is what lies in a hole. Objects
    that touch, also at a corner, are one. Suzuki & Abe 1985, CVGIP 30:32.
    """
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return list(found)


# --- splitting ---


def default_split(instances: bool) -> Split:
    """The Split of a network's predictions: with `instances` it gives depths too."""
    return INSTANCE_SPLIT if instances else PREDICTION_SPLIT


def changed(split: Split, changes: list[str]) -> Split:
    """How touching nuclei are split, with the changes of `--split`."""
    names = [change.partition("=")[0] for change in changes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--split: found {twice[0]} twice, expected it once")
    for change in changes:
        name, _, value = change.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        largest = {"sigma": 10, "h": 1}.get(name, 10_000)  # um; share of the depth; um^2
        if name not in SPLITTING or not 0 <= number <= largest:
            raise InputError(
                f"--split: found {change}, expected NAME=NUMBER, a name of "
                f"{', '.join(SPLITTING)} and a number from 0 up (sigma to 10, h to 1, "
                f"others to 10,000)"
            )
        split = split._replace(**{name: number})
    return split


def nuclei(
    mask: np.ndarray, pixel_size_um: float | None, split: Split, depth: np.ndarray | None = None
) -> np.ndarray:
    """The nuclei of a mask bool (H, W): int32 (H, W), 1 to n in raster order of the first pixels.

    Every nucleus is one piece (its pixels share sides) without holes. Small holes are filled, the
    distance to the background is smoothed, each of its maxima floods a basin (watershed, Meyer
    1994, Signal Processing 38:113), and basins whose neck is shallow are joined again, the highest
    neck first. An unknown pixel size (None) is taken as 0.25 micrometres.

    With a depth map, uint8 (H, W), its depths are taken instead of the distance, and nuclei that
    have not `split.confidence` are dropped.
    """
    found = find_nuclei(mask, pixel_size_um, split, depth)
    if found.confidence is None:
        return found.labels
    kept = np.append(False, found.confidence >= split.confidence)
    return (np.cumsum(kept, dtype=np.int32) * kept)[found.labels]


def find_nuclei(
    mask: np.ndarray,
    pixel_size_um: float | None,
    split: Split,
    depth: np.ndarray | None = None,
    core: tuple[slice, slice] = np.s_[:, :],
) -> Found:
    """`nuclei`, but none is dropped for lack of confidence; those of objects alone that reach into
    the `core`, rows and columns.
    """
    um = pixel_size_um or USUAL_PIXEL_SIZE
    mask, deep = _filled(mask, depth, split.hole / um**2)
    # Objects that meet at a corner only are two, so that each nucleus has a simple outline.
    _, objects, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=4)
    large = stats[:, cv2.CC_STAT_AREA] >= split.smallest / um**2
    large &= np.bincount(objects[core].ravel(), minlength=len(large)) > 0
    large[0] = False  # the background
    labels = np.zeros(mask.shape, np.int32)
    count = 0
    sigma, smallest = split.sigma / um, split.smallest / um**2

    for window, ids in _windows(stats, large, reach=math.ceil(8 * sigma) + 8):
        own = np.isin(objects[window], ids, kind="table")
        depths = None if deep is None else deep[window]
        basins, pairs, saddles, peak, area = _flood(mask[window], own, sigma, depths)
        nucleus = _join(pairs, saddles, peak, area, split.h, smallest)
        np.add(nucleus[basins], count, out=labels[window], where=own)
        count += int(nucleus.max())
    count = _without_holes(labels, count)
    labels = _in_raster_order(labels, count)
    if depth is None:
        return Found(labels, None)
    return Found(labels, confidence(depth, labels, int(labels.max(initial=0))))


def reference_labels(label_map: np.ndarray) -> np.ndarray:
    """An annotator's label map, any integers (H, W), as labels int32 1 to n without gaps.

    The order of the numbers is kept, and so is every pixel: one number in two places is one nucleus
    by its annotator's word. Raises InputError for what is not a map of whole numbers from 0 up.
    """
    if label_map.ndim != 2 or label_map.dtype.kind not in "ui":
        found = f"{label_map.dtype} of shape {label_map.shape}"
        raise InputError(f"label map: found {found}, expected whole numbers (height, width)")
    if label_map.size == 0 or label_map.max() == 0:
        return np.zeros(label_map.shape, np.int32)
    if label_map.min() < 0:
        raise InputError(f"label map: found {label_map.min()}, expected no number below 0")
    if label_map.max() <= label_map.size:
        number = np.zeros(int(label_map.max()) + 1, np.int32)
        number[label_map.ravel()] = 1
        number[0] = 0
        return (np.cumsum(number, dtype=np.int32) * number)[label_map]
    found, places = np.unique(label_map, return_inverse=True)
    return places.reshape(label_map.shape).astype(np.int32) + (found[0] > 0)


def count_errors(
    masks: Sequence[np.ndarray],
    counts: Sequence[int],
    pixel_sizes_um: Sequence[float | None],
    default: Split = PREDICTION_SPLIT,
) -> dict[Split, float]:
    """The mean |count - true count| / true count by each Split of a grid, `default` first.

    `masks` are bool (H, W), `counts` the true numbers of nuclei, which only label maps tell: where
    masks are all that is known, the defaults stay. Images without nuclei do not count; with none
    left it returns {}.
    """
    known = [i for i, count in enumerate(counts) if count > 0]
    if not known:
        return {}
    usual = default.sigma, default.h, default.smallest
    tried = dict.fromkeys((usual, *product(SIGMAS, HS, SMALLESTS)), 0.0)
    for i in known:
        um = pixel_sizes_um[i] or USUAL_PIXEL_SIZE
        for key, area in _tried(masks[i], um, default.hole, tried):
            found = np.count_nonzero(area >= key[2] / um**2)
            tried[key] += abs(found - counts[i]) / counts[i] / len(known)
    return {
        default._replace(sigma=sigma, h=h, smallest=smallest): error
        for (sigma, h, smallest), error in tried.items()
    }


def _tried(mask, um, hole, keys):
    """Of each key (sigma, h, smallest) the areas of its nuclei in pixels, (n,)."""
    filled = _fill_small_holes(mask, hole / um**2)
    floods = {sigma: _flood(filled, filled, sigma / um) for sigma in {key[0] for key in keys}}
    for sigma, h, smallest in keys:
        _, pairs, saddles, peak, area = floods[sigma]
        nucleus = _join(pairs, saddles, peak, area, h, smallest / um**2)
        yield (sigma, h, smallest), np.bincount(nucleus, area)[1:]


def _filled(mask, depth, largest):
    """A copy of the mask with its holes of up to `largest` pixels filled, and of its depth map."""
    filled = _fill_small_holes(mask, largest)
    return filled, None if depth is None else fill_holes(depth * mask, filled & ~mask)


def _fill_small_holes(mask, largest):
    """A copy of the mask with its holes of up to `largest` pixels filled."""
    _, regions, stats, _ = cv2.connectedComponentsWithStats((~mask).view(np.uint8), connectivity=4)
    x, y, width, height, area = stats.T
    inside = (x > 0) & (y > 0) & (x + width < mask.shape[1]) & (y + height < mask.shape[0])
    fill = inside & (area <= largest)
    fill[0] = True  # the mask itself
    return fill[regions]


def _windows(stats, kept, reach):
    """Windows (rows, columns) that hold all objects of `kept` (bool, by id) once, and their ids.

    An object belongs to the window in which its bounding box begins; each window is as large as its
    objects need, and `reach` pixels wider on all sides where the image goes on.
    """
    ids = np.flatnonzero(kept)
    x, y, width, height = stats[ids, :4].T
    cell = (y // WINDOW).astype(np.int64) << 32 | (x // WINDOW)
    order = np.argsort(cell, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(cell[order])) + 1) if len(ids) else ():
        rows = slice(max(y[group].min() - reach, 0), (y + height)[group].max() + reach)
        columns = slice(max(x[group].min() - reach, 0), (x + width)[group].max() + reach)
        yield (rows, columns), ids[group]


def _flood(mask, own, sigma, depth=None):
    """Basins of the smoothed distance in the objects `own` of a mask, both bool (H, W), or of the
    smoothed `depth`, uint8 (H, W), which is 0 outside the mask.

    Returns basins int (H, W), 1 to n; what touches what, int (m, 2), and the depth of the highest
    way between them (m,); each basin's peak and area, (n + 1,). Lengths and areas in pixels.
    """
    if depth is None:
        depth = _distance(mask)
    sigma = max(sigma, 1e-6)  # OpenCV knows no sigma of 0; this one leaves all as it is
    depth = cv2.GaussianBlur(depth.astype(np.float32), (0, 0), sigma) * own
    peaks = own & (depth == cv2.dilate(depth, CROSS))
    _, markers = cv2.connectedComponents(peaks.view(np.uint8), connectivity=4)
    # Peaks of one depth would be flooded in an order that depends on all others in the window.
    relief = -depth.astype(np.float64)
    relief[peaks] = np.arange(np.count_nonzero(peaks)) - relief.size
    basins = watershed(relief, markers, connectivity=1, mask=own)
    peak, area = np.zeros(basins.max() + 1), np.bincount(basins.ravel())
    peak[basins[peaks]] = depth[peaks]
    area[0] = 0
    return basins, *_necks(basins, depth), peak, area


def _distance(mask):
    """The distance to the background, float32 (H, W), pixels."""
    distance = cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Squared distances are whole numbers; without rounding they would depend on the window's place.
    return np.sqrt(np.rint(np.square(np.minimum(distance, DEEPEST))))


def _necks(basins, depth):
    """Pairs of touching basins int (n, 2) and the depth of the highest way between them (n,)."""
    pairs, heights = [], []
    for a, b in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        meet = (basins[a] != basins[b]) & (basins[a] > 0) & (basins[b] > 0)
        pairs.append(np.sort(np.stack([basins[a][meet], basins[b][meet]], 1), 1))
        heights.append(np.minimum(depth[a][meet], depth[b][meet]))
    pairs, heights = np.concatenate(pairs), np.concatenate(heights)
    order = np.lexsort((-heights, pairs[:, 1], pairs[:, 0]))
    pairs, heights = pairs[order], heights[order]
    highest = np.append(True, (pairs[1:] != pairs[:-1]).any(1))[: len(pairs)]
    return pairs[highest], heights[highest]


def _join(pairs, saddles, peak, area, h, smallest):
    """The number of each basin's nucleus, without gaps, int32 (n,); basin 0 is the background.

    From the highest neck to the lowest, two nuclei are joined if the neck lies below the lower of
    their peaks by less than h of that peak, or if one of them is too small to be a nucleus.
    """
    nucleus = list(range(len(peak)))
    peak, area = peak.tolist(), area.tolist()

    def find(basin):
        while nucleus[basin] != basin:
            nucleus[basin] = nucleus[nucleus[basin]]
            basin = nucleus[basin]
        return basin

    order = np.argsort(-saddles, kind="stable")
    ways = (*pairs[order].T, saddles[order])
    for a, b, saddle in zip(*(way.tolist() for way in ways), strict=True):
        high, low = find(a), find(b)
        if peak[high] < peak[low]:
            high, low = low, high
        shallow = peak[low] - saddle < h * peak[low]
        if high != low and (shallow or min(area[high], area[low]) < smallest):
            nucleus[low] = high
            area[high] += area[low]
    _, number = np.unique([find(basin) for basin in range(len(nucleus))], return_inverse=True)
    return number.astype(np.int32)


def _without_holes(labels, count):
    """Give each nucleus 1 to `count` what it encloses, in place; returns the highest label then.

    Labels are of one piece each. One encloses something, be it closed at corners only, if its Euler
    number is below 1 with pixels that meet at corners connected; it is counted from 2 x 2 pixels
    (Gray 1971, IEEE Trans. Comput. C-20:551).
    """
    nw, ne, sw, se = labels[:-1, :-1], labels[:-1, 1:], labels[1:, :-1], labels[1:, 1:]
    euler = count_where(labels, labels > 0, count)
    euler -= count_where(labels[:, 1:], labels[:, 1:] == labels[:, :-1], count)
    euler -= count_where(labels[1:], labels[1:] == labels[:-1], count)
    euler += count_where(nw, (nw == ne) & (nw == sw) & (nw == se), count)
    euler -= count_where(nw, (nw == se) & (nw != ne) & (nw != sw), count)
    euler -= count_where(ne, (ne == sw) & (ne != nw) & (ne != se), count)
    closed = np.flatnonzero(euler < 1) + 1
    boxes = ndimage.find_objects(labels) if len(closed) else ()
    for number in closed:
        count = _fill_or_cut(labels[boxes[number - 1]], number, count)
    return count


def _fill_or_cut(box, number, count):
    """Fill what a label encloses, or cut it if that is more than itself; returns the highest label.

    A ring around that much is no nucleus but, say, a vessel's wall, and what it encloses has nuclei
    of its own. `box` is a view of the label map, as large as the label, and is changed in place.
    """
    own = box == number
    filled = ndimage.binary_fill_holes(own)
    if np.count_nonzero(filled) <= 2 * np.count_nonzero(own):
        box[filled] = number
        return count
    along = int(box.shape[1] > box.shape[0])
    for half in np.array_split(np.arange(box.shape[along]), 2):
        part = box[half[0] : half[-1] + 1] if along == 0 else box[:, half[0] : half[-1] + 1]
        _, pieces = cv2.connectedComponents((part == number).astype(np.uint8), connectivity=4)
        first, places = count, ndimage.find_objects(pieces)
        part[pieces > 0] = first + pieces[pieces > 0]
        count += len(places)
        for piece, place in enumerate(places, first + 1):
            count = _fill_or_cut(part[place], piece, count)
    return count


def count_where(labels: np.ndarray, where: np.ndarray, count: int) -> np.ndarray:
    """How often each label from 1 to `count` is found `where` a bool (H, W) is true, (count,)."""
    return np.bincount(labels[where & (labels > 0)], minlength=count + 1)[1:]


def _in_raster_order(labels, count):
    """The same labels numbered 1 to n without gaps, in raster order of their first pixels."""
    places = np.flatnonzero(labels > 0)[::-1]
    first = np.full(count + 1, labels.size)
    first[labels.ravel()[places]] = places  # of a label's pixels the first is written last
    number = np.zeros(count + 1, np.int32)
    present = np.flatnonzero(first < labels.size)
    number[present[np.argsort(first[present])]] = np.arange(1, len(present) + 1)
    return number[labels]
