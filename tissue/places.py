"""In how many places the numbers of a mask lie, counted band by band, and what it encloses."""

from collections.abc import Iterable

import cv2
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from skimage.measure import label


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
