"""Depth maps: where the nuclei of an image are, and how deep in its nucleus each pixel lies.

A depth map is uint8 (H, W): 0 is background, 1 to 255 are pixels of nuclei, by their distance to
the border of their own nucleus as a share of that nucleus' largest (Naylor et al. 2019, IEEE Trans.
Med. Imaging 38:448; Graham et al. 2019, Med. Image Anal. 58:101563 predict such maps). So it holds
the mask too, as the network has it: the nuclei that are found in a map once are found in it again.
"""

import cv2
import numpy as np
from scipy import ndimage

DEEPEST = 255  # the depth of a nucleus' innermost pixels
# In what is learned from: a nucleus that is in the mask and not in the label map; and where nobody
# has annotated anything, beside depths as a share, of 0 to 1.
UNKNOWN, NOT_ANNOTATED = 1, -2
CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


def depth_of(labels: np.ndarray) -> np.ndarray:
    """The depth of each pixel in its nucleus, uint8 (H, W): 0 is the background, 255 the deepest.

    `labels` are int32 (H, W), 1 to n. Depth is the distance to the nearest pixel of anything else,
    as a share of the nucleus' largest; the image's edge is no border. A nucleus has 2 at least.
    """
    depth = np.zeros(labels.shape, np.uint8)
    for number, place in enumerate(ndimage.find_objects(labels), 1):
        if place is None:
            continue
        # One pixel more on all sides but beyond the image's edge.
        wide = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in place)
        own = labels[wide] == number
        if own.all():
            depth[wide] = DEEPEST
            continue
        distance = cv2.distanceTransform(own.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        # OpenCV's root is off in its last bit or not, as the memory lies; its square is a whole
        # number, of which the root is the same every time.
        squared = np.rint(np.square(distance, dtype=np.float64))
        share = np.rint(DEEPEST * np.sqrt(squared / squared.max())).clip(UNKNOWN + 1, DEEPEST)
        depth[wide][own] = share[own]
    return depth


def segment(outputs: np.ndarray, threshold: float) -> np.ndarray:
    """Where the nuclei are, by what a network gives: float32 (C, h, w), 0 to 1.

    The first of the C outputs is the probability of a nucleus. Alone it makes a mask, bool (h, w);
    with the depth as the second one the two make a depth map, uint8 (h, w).
    """
    mask = outputs[0] >= threshold
    if len(outputs) == 1:
        return mask
    depth = np.rint(outputs[1] * DEEPEST).astype(np.uint8)
    return np.maximum(depth, 1) * mask


def fill_holes(depth: np.ndarray, holes: np.ndarray) -> np.ndarray:
    """The depth map with each of the `holes`, bool (H, W), as deep as the deepest pixel beside it.

    So a hole is no pit, which would part what lies around it.
    """
    count, regions = cv2.connectedComponents(holes.view(np.uint8), connectivity=4)
    deepest = np.zeros(count, np.uint8)
    np.maximum.at(deepest, regions[holes], cv2.dilate(depth, CROSS)[holes])
    deepest[0] = 0
    return np.where(holes, deepest[regions], depth)


def confidence(depth: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The largest depth within each nucleus, 1 to `count` of a label map (H, W), as a share of
    DEEPEST: float64 (n,), 0 to 1. Where two nuclei meet or there is none, no pixel lies deep.
    """
    inside = labels > 0
    deepest = np.zeros(count + 1, np.uint8)
    np.maximum.at(deepest, labels[inside], depth[inside])
    return deepest[1:] / DEEPEST
