"""How deep in its nucleus a pixel lies, which a network learns so as to tell nuclei apart.

Naylor et al. 2019 (IEEE TMI 38:448) learn a distance to the border; as a share of the nucleus' own
largest one, small nuclei count as much as large ones (Graham et al. 2019, Med. Image Anal. 58).
"""

import cv2
import numpy as np
from scipy import ndimage

FULL = 255  # what a nucleus' deepest pixel has
UNKNOWN = 1  # what a nucleus has that is in the mask and not in the label map


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
            depth[wide] = FULL
            continue
        distance = cv2.distanceTransform(own.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        share = np.rint(distance * (FULL / distance.max())).clip(UNKNOWN + 1, FULL)
        depth[wide][own] = share[own]
    return depth
