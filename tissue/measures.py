"""What is measured of each nucleus of a label map, int32 (H, W), 0 the background; its outline."""

import math
from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np
from skimage.color import hed_from_rgb

from tissue.nuclei import count_where


def measure(
    labels: np.ndarray, image: np.ndarray, pixel_size_um: float | None
) -> dict[str, np.ndarray]:
    """A table of the nuclei 1 to n of a label map: columns of n values in the order of their ids.

    `image` is RGB uint8 (H, W, 3). `y` and `x` are the centroid, whole numbers at pixel centres.
    Lengths are pixels, with `_um` micrometres (NaN where the pixel size is None).

    - `perimeter`: from the chords in four directions (Crofton), unbiased over all directions, as
      skimage.measure.perimeter_crofton's; pi / 4 * (2 + sqrt(2)) = 2.7 for one pixel.
    - `eccentricity`, `orientation` (radians from the row axis to the long axis, -pi/2 to pi/2): of
      the ellipse with the same second moments, as skimage.measure.regionprops'.
    - `equivalent_diameter`: of the disc with the same area.
    - `solidity`: area / number of pixels whose centres lie in the convex hull of the nucleus' pixel
      centres; 1 for what has no dent.
    - `haematoxylin_od`: mean decadic optical density of haematoxylin, white being 255, after colour
      deconvolution with skimage's `hed_from_rgb`, whose vectors are those of Ruifrok & Johnston
      2001, Anal. Quant. Cytol. Histol. 23:291. Below 0 where there is far more of other stains.
    """
    count = int(labels.max(initial=0))
    runs, y, start, stop = runs_of(labels)

    def total(values):
        return np.bincount(runs, values, minlength=count + 1)[1:]

    length, middle = stop - start, (start + stop - 1) / 2
    area = total(length).astype(np.int64)
    centre_y, centre_x = total(length * y) / area, total(length * middle) / area
    dy, dx = y - centre_y[runs - 1], middle - centre_x[runs - 1]
    yy, xy = total(length * dy**2) / area, total(length * dx * dy) / area
    xx = total(length * (dx**2 + (length**2 - 1) / 12)) / area
    spread, mean = np.hypot((yy - xx) / 2, xy), (yy + xx) / 2  # of the two principal moments
    ratio = np.divide(mean - spread, mean + spread, out=np.ones(count), where=mean > 0)
    perimeter = math.pi / 4 * _chords(labels, area, np.bincount(runs, minlength=count + 1)[1:])
    diameter = np.sqrt(4 * area / math.pi)
    um = math.nan if pixel_size_um is None else pixel_size_um
    at_border = np.zeros(count + 1, bool)
    for edge in (labels[:1], labels[-1:], labels[:, :1], labels[:, -1:]):
        at_border[edge] = True
    return {
        "id": np.arange(1, count + 1),
        "y": centre_y,
        "x": centre_x,
        "area_px": area,
        "area_um2": area * um**2,
        "perimeter": perimeter,
        "perimeter_um": perimeter * um,
        "equivalent_diameter": diameter,
        "equivalent_diameter_um": diameter * um,
        "eccentricity": np.sqrt(np.clip(1 - ratio, 0, 1)),
        "solidity": area / _convex_area(runs, y, start, stop, count),
        "orientation": np.arctan2(2 * xy, yy - xx) / 2,
        "haematoxylin_od": _haematoxylin(labels, image, count) / area,
        "touches_border": at_border[1:],
    }


def outlines(labels: np.ndarray) -> list[np.ndarray]:
    """The outline of each nucleus 1 to n: a closed ring int32 (m, 2) of x, y, first point = last.

    It runs along the outer edges of the pixels, clockwise as seen, from the image's top left corner
    at (0, 0): the ring of one pixel is a square of area 1, and any ring's area is that of its
    nucleus. Rings are simple for labels as `nuclei` gives them. Raises ValueError for a label that
    is missing, in pieces or has a hole.
    """
    count = int(labels.max(initial=0))
    runs, y, start, stop = runs_of(labels)
    ids = np.tile(runs.astype(np.int64), 4)
    xs, ys = np.concatenate([start, stop] * 2), np.concatenate([y, y, y + 1, y + 1])
    sides = labels.shape[0] + 1, labels.shape[1] + 1
    order = np.argsort((ids * sides[0] + ys) * sides[1] + xs)
    ids, xs, ys = ids[order], xs[order], ys[order]
    # Where a run ends right below another's end the outline goes straight on: no corner.
    new = (np.diff(ids) != 0) | (np.diff(ys) != 0) | (np.diff(xs) != 0)
    corner = np.append(True, new)[: len(ids)] & np.append(new, True)[: len(ids)]
    ids, xs, ys = ids[corner], xs[corner], ys[corner]
    # Corners come in pairs along each row of corners, and likewise along each column.
    across = np.arange(len(ids)) ^ 1
    by_column = np.argsort((ids * sides[1] + xs) * sides[0] + ys)
    along = np.empty_like(across)
    along[by_column] = by_column[across]
    label = np.arange(1, count + 1)
    begin, end = (np.searchsorted(ids, label, side) for side in ("left", "right"))
    corners = end - begin
    arrive, steps = _steps_to(begin[ids - 1], along[across], corners.max(initial=0))
    at = np.flatnonzero(arrive)  # every second corner, if there is but one ring
    wrong = (corners < 4) | (2 * np.bincount(ids[at], minlength=count + 1)[1:] != corners)
    if wrong.any():
        raise ValueError(f"label {wrong.argmax() + 1} is not one piece without holes")
    points = np.stack([xs, ys], 1).astype(np.int32)
    closed = np.empty((len(ids) + count, 2), np.int32)
    start = begin + label - 1  # of each ring, which has its first point twice
    place = start[ids[at] - 1] + -2 * steps[at] % corners[ids[at] - 1]
    closed[place], closed[place + 1] = points[at], points[across[at]]
    closed[start + corners] = closed[start]
    return np.split(closed, start[1:]) if count else []


def _steps_to(goal, following, most):
    """Whether each place gets to its goal, going from place to place as `following` has it, bool
    (n,), and in how many steps, up to `most`, int (n,), which are 0 at the goal itself.

    Each round doubles how far all have gone (Wyllie 1979, pointer jumping).
    """
    at = np.arange(len(following))
    steps = (at != goal).astype(np.int64)
    following = np.where(at == goal, at, following)
    for _ in range(int(most).bit_length()):
        steps, following = steps + steps[following], following[following]
    return following == goal, steps


def count_in_frame(rings: Sequence[np.ndarray]) -> int:
    """The number of nuclei that an unbiased counting frame around the image counts.

    `rings` are outlines in the image's pixels. A nucleus that meets the frame's top or left line or
    their extensions is out, one that meets its bottom or right line is in, so that frames side by
    side count each once (Gundersen 1977, J. Microsc. 111:219). The frame is the image without its
    first row and column of pixels, and the area to divide by is that of this frame.
    """
    return sum(bool(ring.min(axis=0).all()) for ring in rings)


def runs_of(labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Runs of one label in a row, in raster order: labels, rows, first columns, columns behind."""
    change = labels[:, 1:] != labels[:, :-1]
    first, last = labels > 0, labels > 0
    first[:, 1:] &= change
    last[:, :-1] &= change
    places = np.flatnonzero(first)
    y, start = np.divmod(places, labels.shape[1])
    stop = np.flatnonzero(last) - y * labels.shape[1] + 1
    return labels.ravel()[places], y, start, stop


def _chords(labels, area, runs):
    """Total length of each nucleus' shadows in four directions, pixels (n,).

    A shadow is as long as there are chords, which are as many as pixels less those that have the
    next pixel of the direction in the same nucleus, in a row as many as there are `runs`; diagonals
    lie 1 / sqrt(2) apart.
    """
    count = len(area)
    straight = runs + area - count_where(labels[1:], labels[1:] == labels[:-1], count)
    diagonal = 2 * area - count_where(labels[1:, 1:], labels[1:, 1:] == labels[:-1, :-1], count)
    diagonal -= count_where(labels[1:, :-1], labels[1:, :-1] == labels[:-1, 1:], count)
    return straight + diagonal / math.sqrt(2)


def _convex_area(runs, y, start, stop, count):
    """Pixels whose centres lie in the convex hull of each nucleus' pixel centres, int (n,).

    By Pick's theorem, area + boundary points / 2 + 1, with the hull's corners at pixel centres.
    """
    order = np.argsort(runs, kind="stable")
    points = np.stack([start[order], y[order], stop[order] - 1, y[order]], 1).astype(np.int32)
    bounds = np.cumsum(np.bincount(runs, minlength=count + 1)).tolist()
    hulls = [
        cv2.convexHull(points[begin:end].reshape(-1, 2)).reshape(-1, 2)
        for begin, end in pairwise(bounds)
    ]
    if not hulls:
        return np.zeros(0, np.int64)
    sizes = np.array([len(hull) for hull in hulls])
    begin = np.cumsum(sizes) - sizes
    x, y = np.concatenate(hulls).astype(np.int64).T
    following = np.arange(1, len(x) + 1)
    following[begin + sizes - 1] = begin
    doubled = np.add.reduceat(x * y[following] - y * x[following], begin)
    boundary = np.add.reduceat(np.gcd(x[following] - x, y[following] - y), begin)
    return (np.abs(doubled) + boundary) // 2 + 1


def _haematoxylin(labels, image, count):
    """Sum of the haematoxylin density over each nucleus, float (n,)."""
    density = -np.log10(np.maximum(np.arange(256), 1) / 255)
    inside = np.flatnonzero(labels > 0)
    red, green, blue = (
        (hed_from_rgb[channel, 0] * density)[values]
        for channel, values in enumerate(image.reshape(-1, 3)[inside].T)
    )
    return np.bincount(labels.ravel()[inside], red + green + blue, minlength=count + 1)[1:]
