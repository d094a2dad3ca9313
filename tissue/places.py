"""In how many places the numbers of a mask lie, counted band by band, what it encloses, and which
numbers are too large for nuclei.
"""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from skimage.measure import label

from tissue.files import InputError

# Numbers that are no nucleus. In 681 real label maps the largest is at most 13 times as large as
# the median, 12 as the next, 5 where it has a twentieth of the image.
_LARGEST, _TIMES_THE_MEDIAN, _LEAST_NUMBERS = 0.5, 50, 10
_VOID, _VOID_SHARE, _TIMES_THE_NEXT = (255, 65535, 2**31 - 1, 2**32 - 1), 0.05, 5


def places_of(bands: Iterable, marked: np.ndarray) -> np.ndarray:
    """In how many places each of the values `marked` (sorted) lies: pieces of 8 neighbours.

    `bands` are the whole mask from top to bottom, arrays (h, W) of integers or floats, of which
    `marked` (n,) has all but 0; returns int64 (n,).
    """
    places = np.zeros(len(marked), np.int64)
    above, above_values = None, np.zeros(0, marked.dtype)  # pieces in the last row, 1 to n
    for band in bands:
        pieces, count = label(band, background=0, connectivity=2, return_num=True)
        piece_values = np.zeros(count + 1, band.dtype)
        piece_values[pieces] = band
        known = len(above_values)
        values = np.concatenate([above_values, piece_values[1:]]).astype(marked.dtype)
        first = pieces[0] + known * (pieces[0] > 0)
        one, other = _touching(above, first, np.append(0, values))
        links = coo_matrix((np.ones(len(one)), (one - 1, other - 1)), (len(values),) * 2)
        total, joined = connected_components(links, directed=False)
        joined_values = np.zeros(total, marked.dtype)
        joined_values[joined] = values
        # Those from above are counted already.
        np.add.at(places, np.searchsorted(marked, joined_values), 1)
        np.add.at(places, np.searchsorted(marked, above_values), -1)
        last = np.append(0, joined[known:] + 1)[pieces[-1]]
        kept, places_in_kept = np.unique(last[last > 0], return_inverse=True)
        above = np.zeros_like(last)
        above[last > 0] = places_in_kept + 1
        above_values = joined_values[kept - 1]
    return places


def times_filled(foreground: np.ndarray) -> float:
    """How many times as large a mask, bool (H, W), is with all that it encloses; 1 if it is empty.

    Outlines that touch by their corners are closed.
    """
    outer, _ = cv2.findContours(
        foreground.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    filled = cv2.drawContours(np.zeros(foreground.shape, np.uint8), outer, -1, 1, cv2.FILLED)
    return max(1, np.count_nonzero(filled)) / max(1, np.count_nonzero(foreground))


def check_background_is_0(path: Path, values: np.ndarray, pixels: np.ndarray) -> None:
    """Raise InputError where a number of a label map can only be that of its background, or of what
    is not annotated: the last of its type, which others are far from.

    `values` (n,), sorted, have so many `pixels` (n,) each. A small crop may have one large nucleus
    and a few cut ones, and so few numbers tell nothing.
    """
    marked, areas = values[values > 0], pixels[values > 0]
    if len(areas) < 2:
        return
    share, median = areas.max() / pixels.sum(), np.median(areas)
    value, largest, next_largest = marked[areas.argmax()], areas.max(), np.sort(areas)[-2]
    if len(areas) >= _LEAST_NUMBERS and share > _LARGEST and largest > _TIMES_THE_MEDIAN * median:
        raise InputError(
            f"{path}: found value {value:g} on {100 * share:.0f} % of the image, {median:.0f} "
            f"pixels in the median number, expected 0 for the background, save {value:g} as 0"
        )
    is_last = value == marked[-1] and value in _VOID and marked[-2] < value - 1
    if is_last and share > _VOID_SHARE and largest > _TIMES_THE_NEXT * next_largest:
        raise InputError(
            f"{path}: found value {value:g}, the last of its type, on {100 * share:.0f} % of the "
            f"image, {largest / next_largest:.0f} times as large as any other, expected one number "
            f"per nucleus; save it as 0 if it marks what is not annotated, else by another number"
        )


def check_largest(path: Path, values: np.ndarray, pixels: np.ndarray) -> None:
    """Raise InputError where a number of a label map is too large for a nucleus, by the others.

    These are weighed by their pixels, for specks tell nothing of nuclei. See
    `check_background_is_0`.
    """
    marked, areas = values[values > 0], pixels[values > 0]
    if len(areas) < _LEAST_NUMBERS:
        return
    *others, largest = np.sort(areas)
    sums = np.cumsum(others)
    typical = others[np.searchsorted(sums, sums[-1] / 2)]
    if largest > _TIMES_THE_MEDIAN * typical:
        value, share = marked[areas.argmax()], largest / pixels.sum()
        raise InputError(
            f"{path}: found value {value:g} on {100 * share:.0f} % of the image, "
            f"{largest / typical:.0f} times as large as others are, expected one nucleus a number; "
            f"save it as 0 if it marks what is not annotated, and touching nuclei by one number "
            f"each"
        )


def _touching(above, row, values):
    """Pairs of pieces of one value in two rows that touch, their corners included."""
    if above is None:
        return np.zeros((2, 0), int)
    pairs = []
    for shift in (-1, 0, 1):
        upper = above[max(0, shift) : len(above) + min(0, shift)]
        lower = row[max(0, -shift) : len(row) + min(0, -shift)]
        same = (upper > 0) & (lower > 0) & (values[upper] == values[lower])
        pairs.append([upper[same], lower[same]])
    return np.concatenate(pairs, axis=1)
