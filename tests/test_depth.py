"""Nuclei in depth maps that are drawn by hand, so that it is known which there are."""

import cv2
import numpy as np
import pytest

from tissue import depth, nuclei, stitching, tiling
from tissue.nuclei import INSTANCE_SPLIT, PREDICTION_SPLIT
from tissue.windows import from_array

EVERY = INSTANCE_SPLIT._replace(confidence=0)


def cones(shape, *peaks):
    """A depth map of cones (y, x, radius, peak): `peak` of 255 in the middle, 1 at the rim."""
    rows, columns = np.indices(shape)
    drawn = np.zeros(shape)
    for y, x, radius, peak in peaks:
        slope = 1 - np.hypot(rows - y, columns - x) / (radius + 0.5)
        drawn = np.maximum(drawn, np.where(slope > 0, 1 + (peak - 1) * slope, 0))
    return np.rint(drawn).astype(np.uint8)


def strips(*depths, wide=12, high=30):
    """A rectangle of strips of one depth each, with background around it."""
    drawn = np.repeat(np.array(depths, np.uint8), wide)[None].repeat(high, axis=0)
    return np.pad(drawn, 10)


def labels_of(drawn, split=EVERY):
    return nuclei.nuclei(drawn > 0, 0.25, split, drawn)


def test_two_outputs_make_a_depth_map_that_holds_the_mask_and_one_makes_a_mask():
    probability = [[0.2, 0.5, 0.9], [0.5, 0.4, 0.6]]
    outputs = np.array([probability, [[1, 0, 0.4], [1, 0.9, 0.001]]], np.float32)
    found = depth.segment(outputs, 0.5)
    assert found.dtype == np.uint8
    assert found.tolist() == [[0, 1, 102], [255, 0, 1]]
    mask = depth.segment(outputs[:1], 0.5)
    assert mask.dtype == bool and mask.tolist() == [[False, True, True], [True, False, True]]


def test_the_same_nuclei_have_the_same_depth_wherever_they_lie_in_the_memory(generator):
    """A bar of 39 rows is 20 pixels deep; five of its depths are half way between two numbers."""
    labels = np.pad(np.ones((39, 61), np.int32), 1)
    kept = []
    for _ in range(300):
        kept.append(np.empty(generator.integers(1, 3000), np.uint8))  # the next lies elsewhere
        found = depth.depth_of(labels)
        assert found[1:21, 31].tolist() == [
            13, 26, 38, 51, 64, 76, 89, 102, 115, 128, 140, 153, 166, 178, 191, 204, 217, 230, 242,
            255,
        ]  # fmt: skip
        kept.append(found)
        assert np.array_equal(found, kept[1])


def test_a_hole_is_as_deep_as_the_deepest_pixel_beside_it():
    drawn = np.array([[9, 20, 9, 9], [30, 0, 0, 50], [9, 10, 40, 99]], np.uint8)
    filled = depth.fill_holes(drawn, drawn == 0)
    assert filled.tolist() == [[9, 20, 9, 9], [30, 50, 50, 50], [9, 10, 40, 99]]
    np.testing.assert_array_equal(depth.fill_holes(drawn, np.zeros((3, 4), bool)), drawn)


def test_the_confidence_of_a_nucleus_is_its_largest_depth():
    labels = np.array([[1, 1, 0, 2], [3, 3, 0, 2]])
    drawn = np.array([[51, 204, 255, 255], [0, 0, 9, 1]], np.uint8)
    assert depth.confidence(drawn, labels, 3).tolist() == [0.8, 1, 0]
    assert depth.confidence(drawn, labels * 0, 0).shape == (0,)


# --- splitting


def test_nuclei_without_a_neck_between_them_are_split_where_the_depth_falls():
    """Two cones in one rectangle: the mask's own distances know one nucleus."""
    drawn = np.maximum(cones((60, 100), (30, 35, 14, 255), (30, 65, 14, 255)), 1)
    drawn[:16] = drawn[45:] = 0
    drawn[:, :21] = drawn[:, 80:] = 0
    assert nuclei.nuclei(drawn > 0, 0.25, PREDICTION_SPLIT).max() == 1
    labels = labels_of(drawn)
    assert labels.max() == 2
    np.testing.assert_array_equal(labels > 0, drawn > 0)
    rows, columns = np.indices(drawn.shape)
    for number, x in ((1, 35), (2, 65)):
        assert (labels[np.hypot(rows - 30, columns - x) < 13] == number).all()


@pytest.mark.parametrize(
    ("depths", "count"),
    [
        ((200, 150, 200), 2),  # falls by a quarter
        ((200, 170, 200), 1),  # by 15 %, and h is 20 %
        ((255, 119, 150), 2),  # by a fifth of the smaller peak
        ((255, 121, 150), 1),
        ((100, 200), 1),  # a ledge is no peak
        ((50, 100, 150, 200, 150, 100), 1),
        ((200, 200, 200), 1),
        ((255, 1, 255, 1, 255), 3),
    ],
)
def test_a_neck_is_cut_if_the_depth_falls_there_by_h_of_the_smaller_peak(depths, count):
    assert labels_of(strips(*depths)).max() == count


def test_without_smoothing_ledges_and_plateaus_are_no_peaks_either():
    for depths, count in (((200, 150, 200), 2), ((50, 100, 200, 150), 1), ((255, 255), 1)):
        assert labels_of(strips(*depths), EVERY._replace(sigma=0)).max() == count
    assert nuclei.nuclei(strips(9) > 0, 0.25, PREDICTION_SPLIT._replace(sigma=0)).max() == 1


def test_a_small_hole_is_no_pit_that_parts_a_nucleus():
    drawn = cones((50, 50), (25, 25, 15, 255))
    drawn[22:28, 22:28] = 0  # 36 pixels, 2.25 square micrometres
    labels = labels_of(drawn)
    assert labels.max() == 1 and labels[25, 25] == 1


def test_depths_outside_the_mask_count_for_nothing():
    drawn = strips(200, 150, 200)
    mask = drawn > 0
    beside = np.where(mask, drawn, 255).astype(np.uint8)
    expected = labels_of(drawn)
    np.testing.assert_array_equal(nuclei.nuclei(mask, 0.25, EVERY, beside), expected)


def noisy_cones(seed, shape=(300, 320)):
    """Cones of all sizes and peaks on each other, with noise, cut into objects of some nuclei."""
    generator = np.random.default_rng(seed)
    peaks = zip(*(generator.integers(low, high, 160) for low, high in
                  ((0, shape[0]), (0, shape[1]), (4, 14), (60, 256))), strict=True)  # fmt: skip
    drawn = cones(shape, *peaks).astype(float)
    noise = cv2.GaussianBlur(generator.normal(0, 60, shape), (0, 0), 1.5)
    drawn = np.where(drawn > 0, np.clip(drawn + noise, 0, 255), 0).astype(np.uint8)
    drawn[::64] = drawn[:, ::72] = 0
    return drawn


@pytest.mark.parametrize("seed", range(3))
def test_what_becomes_of_an_object_does_not_depend_on_the_window(seed, monkeypatch):
    drawn = noisy_cones(seed)
    whole = labels_of(drawn)
    assert whole.max() > 50
    monkeypatch.setattr(nuclei, "WINDOW", 50)
    np.testing.assert_array_equal(labels_of(drawn), whole)


# --- confidence


def test_nuclei_below_the_confidence_are_dropped_and_the_others_numbered_without_gaps():
    drawn = cones((40, 120), (20, 20, 9, 127), (20, 60, 9, 128), (20, 100, 9, 255))
    found = nuclei.find_nuclei(drawn > 0, 0.25, INSTANCE_SPLIT, drawn)
    assert found.labels.max() == 3
    np.testing.assert_allclose(found.confidence, [127 / 255, 128 / 255, 1])
    labels = labels_of(drawn, INSTANCE_SPLIT._replace(confidence=0.5))
    assert labels.dtype == np.int32
    assert [labels[20, x] for x in (20, 60, 100)] == [0, 1, 2]
    assert nuclei.nuclei(drawn > 0, 0.25, INSTANCE_SPLIT).max() == 3  # without depths none is


def test_a_confidence_of_0_is_not_said():
    assert str(PREDICTION_SPLIT) == "sigma=0.5 h=0.05 hole=2.5 smallest=2.5"
    assert str(INSTANCE_SPLIT) == "sigma=0.25 h=0.2 hole=2.5 smallest=2.5 confidence=0.3"
    assert "confidence" not in PREDICTION_SPLIT.values()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tile", [50, 96])
def test_tiles_have_the_nuclei_of_the_whole_map_and_drop_each_once(seed, tile):
    drawn = noisy_cones(seed)
    shape = drawn.shape

    def find(window, core=np.s_[:, :]):
        return nuclei.find_nuclei(window > 0, 0.25, INSTANCE_SPLIT, window, core)

    whole = find(drawn)
    dropped = np.append(False, whole.confidence < 0.5)
    assert 5 < dropped.sum() < len(dropped) - 5
    labels, gone = np.zeros(shape, int), np.zeros(shape, bool)
    confidences, number = {}, 0
    tiles = tiling.tiles_of(*shape, tile)
    for found in stitching.nuclei_by_tiles(from_array(drawn), tiles, find, 0.5):
        y, x, height, width = found.tile
        labels[y : y + height, x : x + width] = found.labels
        gone[y : y + height, x : x + width] = found.dropped
        confidences |= dict(zip(found.ids.tolist(), found.confidence.tolist(), strict=True))
        assert type(found.new_dropped) is int  # the record of an image is JSON
        number += found.new_dropped
    np.testing.assert_array_equal(gone, dropped[whole.labels])
    assert number == dropped.sum()
    assert sorted(confidences) == list(range(1, np.count_nonzero(~dropped)))
    pairs = np.unique(np.stack([labels, whole.labels * ~gone], -1).reshape(-1, 2), axis=0)
    assert len(pairs) == len(confidences) + 1 and pairs[0].tolist() == [0, 0]
    for own, other in pairs[1:].tolist():
        assert confidences[own] == whole.confidence[other - 1]


# --- parameters from training images


def many(shape, *peaks):
    """A depth map of separate cones with these peaks."""
    places = [(20 + 30 * (i // 6), 20 + 30 * (i % 6)) for i in range(len(peaks))]
    return cones(shape, *((y, x, 9, peak) for (y, x), peak in zip(places, peaks, strict=True)))


# --- what is learned


def test_depth_grows_from_the_border_to_the_middle_and_is_a_share_of_the_largest():
    labels = np.zeros((9, 14), np.int32)
    labels[2:7, 2:7] = 1  # 5 x 5: distances 1, 2, 3
    labels[3:6, 7:10] = 2  # 3 x 3 and touching: distances 1, 2
    found = depth.depth_of(labels)
    assert found[4].tolist() == [0, 0, 85, 170, 255, 170, 85, 128, 255, 128, 0, 0, 0, 0]
    assert (found[labels == 0] == 0).all()
    assert found[2, 2] == 85 and found[3, 3] == 170 and found[3, 8] == 128


def test_the_edge_of_the_image_is_no_border():
    labels = np.zeros((6, 8), np.int32)
    labels[:, :4] = 7  # numbers may have gaps
    assert depth.depth_of(labels)[3].tolist() == [255, 191, 128, 64, 0, 0, 0, 0]
    assert (depth.depth_of(np.full((5, 5), 1, np.int32)) == 255).all()
    assert (depth.depth_of(np.zeros((5, 5), np.int32)) == 0).all()


@pytest.mark.parametrize("side", [1, 2])
def test_a_speck_is_all_depth(side):
    labels = np.zeros((9, 9), np.int32)
    labels[4 : 4 + side, 4 : 4 + side] = 1
    assert (depth.depth_of(labels)[labels > 0] == 255).all()


def test_a_nucleus_as_large_as_can_be_is_nowhere_background():
    labels = np.ones((1000, 1000), np.int32)
    labels[0] = 0
    found = depth.depth_of(labels)
    assert found[1].min() == 2 and found[-1].max() == 255  # 1 is a nucleus without a label map
