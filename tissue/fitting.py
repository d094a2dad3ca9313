"""How large an image's nuclei are beside those that a network has learned: where an image does not
tell its pixel size, that is the best guess at it.
"""

import math
from collections.abc import Callable

import numpy as np

from tissue.windows import Windows

SIDE = 768  # pixels; of the windows that are looked at, four of a large image
ENOUGH = 20  # nuclei; the median of fewer says little
USUAL = 4 / 3  # nuclei so many times as large or as small are of other tissue, not of other pixels
MOST = 3.0  # a guess goes no further


def nuclear_scale(
    image: Windows, find: Callable[[np.ndarray], np.ndarray], usual: float
) -> tuple[float, int]:
    """How many times as long the image's nuclei are as those of `usual` area (pixels), by their
    median area, and how many were looked at; 1 where that is within USUAL, or they are too few.

    `find` makes a label map int32 (h, w) of RGB uint8 (h, w, 3). Nuclei at a window's edge do not
    count.
    """
    areas = np.concatenate(
        [areas_within(find(image.read(*place))) for place in places(image.height, image.width)]
    )
    if len(areas) < ENOUGH:
        return 1.0, len(areas)
    scale = math.sqrt(np.median(areas) / usual)
    if 1 / USUAL <= scale <= USUAL:
        return 1.0, len(areas)
    return min(max(scale, 1 / MOST), MOST), len(areas)


def places(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """(y, x, height, width) of the windows to look at: all of a small image, of a large one the
    middles of its four quarters.
    """
    sides = []
    for length in (height, width):
        if length <= 2 * SIDE:
            sides.append([(0, length)])
        else:
            sides.append([(length * k // 4 - SIDE // 2, SIDE) for k in (1, 3)])
    return [(y, x, h, w) for y, h in sides[0] for x, w in sides[1]]


def areas_within(labels: np.ndarray) -> np.ndarray:
    """The areas, pixels (n,), of the nuclei of a label map (H, W), 1 to n, that do not meet its
    edge.
    """
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        areas[edge] = 0
    return areas[areas > 0]
