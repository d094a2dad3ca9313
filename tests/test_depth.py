"""The depth in a nucleus, by hand."""

import numpy as np
import pytest

from tissue.depth import depth_of


def test_depth_grows_from_the_border_to_the_middle_and_is_a_share_of_the_largest():
    labels = np.zeros((9, 14), np.int32)
    labels[2:7, 2:7] = 1  # 5 x 5: distances 1, 2, 3
    labels[3:6, 7:10] = 2  # 3 x 3 and touching: distances 1, 2
    depth = depth_of(labels)
    assert depth[4].tolist() == [0, 0, 85, 170, 255, 170, 85, 128, 255, 128, 0, 0, 0, 0]
    assert (depth[labels == 0] == 0).all()
    assert depth[2, 2] == 85 and depth[3, 3] == 170 and depth[3, 8] == 128


def test_the_edge_of_the_image_is_no_border():
    labels = np.zeros((6, 8), np.int32)
    labels[:, :4] = 7  # numbers may have gaps
    assert depth_of(labels)[3].tolist() == [255, 191, 128, 64, 0, 0, 0, 0]
    assert (depth_of(np.full((5, 5), 1, np.int32)) == 255).all()
    assert (depth_of(np.zeros((5, 5), np.int32)) == 0).all()


@pytest.mark.parametrize("side", [1, 2])
def test_a_speck_is_all_depth(side):
    labels = np.zeros((9, 9), np.int32)
    labels[4 : 4 + side, 4 : 4 + side] = 1
    assert (depth_of(labels)[labels > 0] == 255).all()


def test_a_nucleus_as_large_as_can_be_is_nowhere_background():
    labels = np.ones((1000, 1000), np.int32)
    labels[0] = 0
    depth = depth_of(labels)
    assert depth[1].min() == 2 and depth[-1].max() == 255  # 1 is a nucleus without a label map
