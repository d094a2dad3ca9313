import math
from itertools import pairwise

import numpy as np
import pytest
from skimage.measure import regionprops_table
from skimage.morphology import convex_hull_image

from tests.pictures import blobs
from tissue import measures, nuclei
from tissue.nuclei import PREDICTION_SPLIT

EVERYTHING = PREDICTION_SPLIT._replace(hole=0.0, smallest=0.0)  # drops nothing


def one_colour(labels, colour=(200, 100, 180)):
    return np.full((*labels.shape, 3), colour, np.uint8)


def test_measures_are_those_of_scikit_image():
    labels = nuclei.nuclei(blobs(2), 0.25, PREDICTION_SPLIT)
    table = measures.measure(labels, one_colour(labels), 0.5)
    theirs = {
        "y": "centroid-0",
        "x": "centroid-1",
        "area_px": "area",
        "perimeter": "perimeter_crofton",
        "eccentricity": "eccentricity",
        "orientation": "orientation",
        "equivalent_diameter": "equivalent_diameter_area",
    }
    properties = {name.split("-")[0] for name in theirs.values()}
    expected = regionprops_table(labels, properties=sorted(properties))
    assert len(table["id"]) > 50
    for ours, name in theirs.items():
        np.testing.assert_allclose(table[ours], expected[name], rtol=1e-9, atol=1e-6, err_msg=ours)
    np.testing.assert_allclose(table["area_um2"], table["area_px"] * 0.25)
    np.testing.assert_allclose(table["perimeter_um"], table["perimeter"] * 0.5)
    np.testing.assert_allclose(table["equivalent_diameter_um"], table["equivalent_diameter"] * 0.5)


def test_solidity_counts_the_pixels_of_the_convex_hull():
    labels = nuclei.nuclei(blobs(3), 0.25, PREDICTION_SPLIT)
    solidity = measures.measure(labels, one_colour(labels), None)["solidity"]
    for number in range(1, 40):
        nucleus = labels == number
        hull = convex_hull_image(nucleus, offset_coordinates=False, include_borders=True)
        assert solidity[number - 1] == pytest.approx(nucleus.sum() / hull.sum())


def test_measures_by_hand():
    labels = np.zeros((8, 12), np.int32)
    labels[2, 3] = 1
    labels[4:7, 4:6] = 2
    labels[0, 6:10] = 3
    labels[2:5, 8], labels[4, 9:11] = 4, 4  # an L of 5 pixels in a hull of 6
    table = measures.measure(labels, one_colour(labels), 2.0)
    assert {name: len(column) for name, column in table.items()} == dict.fromkeys(table, 4)
    assert table["id"].tolist() == [1, 2, 3, 4]
    assert table["y"].tolist() == [2, 5, 0, 3.4]
    assert table["x"].tolist() == [3, 4.5, 7.5, 8.6]
    assert table["area_px"].tolist() == [1, 6, 4, 5]
    assert table["area_um2"].tolist() == [4, 24, 16, 20]
    assert table["touches_border"].tolist() == [False, False, True, False]
    assert table["solidity"] == pytest.approx([1, 1, 1, 5 / 6])
    # variances 2/3 and 1/4 about the centre; a line; a single point has none
    assert table["eccentricity"][:3] == pytest.approx([0, math.sqrt(1 - 3 / 8), 1])
    assert table["orientation"][1:3] == pytest.approx([0, math.pi / 2])
    assert table["perimeter"][0] == pytest.approx(math.pi / 4 * (2 + math.sqrt(2)))


def test_without_a_pixel_size_no_micrometre_is_guessed():
    labels = np.ones((5, 5), np.int32)
    table = measures.measure(labels, one_colour(labels), None)
    for name, column in table.items():
        assert np.isnan(column).all() == ("_um" in name)


def test_haematoxylin_is_read_back_from_drawn_stain():
    """Light through stains of known optical densities: haematoxylin, then eosin."""
    haematoxylin, eosin = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])
    labels = np.zeros((10, 30), np.int32)
    labels[:, 5:10], labels[:, 12:20], labels[:, 22:25] = 1, 2, 3
    density = np.zeros((10, 30, 1))
    density[labels == 1], density[labels == 2] = 0.3, 0.8
    pink = np.where(labels == 3, 0.5, 0.2)[..., None]
    image = np.rint(255 * 10 ** -(density * haematoxylin + pink * eosin)).astype(np.uint8)
    found = measures.measure(labels, image, None)["haematoxylin_od"]
    assert found == pytest.approx([0.3, 0.8, 0.0], abs=0.01)
    assert np.isfinite(measures.measure(labels, image * 0, None)["haematoxylin_od"]).all()


def test_no_nucleus_has_empty_columns_and_no_outline():
    labels = np.zeros((6, 7), np.int32)
    table = measures.measure(labels, one_colour(labels), 0.25)
    assert all(column.shape == (0,) for column in table.values())
    assert measures.outlines(labels) == []
    assert measures.count_in_frame([]) == 0


def test_a_nucleus_that_fills_the_image():
    labels = np.ones((30, 40), np.int32)
    table = measures.measure(labels, one_colour(labels), 0.25)
    assert table["area_px"].tolist() == [1200]
    assert table["solidity"].tolist() == [1]
    assert table["touches_border"].tolist() == [True]
    (ring,) = measures.outlines(labels)
    assert ring.tolist() == [[0, 0], [40, 0], [40, 30], [0, 30], [0, 0]]


# --- outlines ---


def test_the_outline_of_a_pixel_is_its_square():
    labels = np.zeros((4, 6), np.int32)
    labels[2, 3] = 1
    (ring,) = measures.outlines(labels)
    assert ring.tolist() == [[3, 2], [4, 2], [4, 3], [3, 3], [3, 2]]


@pytest.mark.parametrize("seed", range(4))
def test_outlines_are_simple_closed_rings_around_the_nucleus_and_no_other_pixel(seed):
    labels = nuclei.nuclei(blobs(seed), 0.25, EVERYTHING)
    rings = measures.outlines(labels)
    assert len(rings) == labels.max() > 100
    for number, ring in enumerate(rings, 1):
        assert ring.dtype == np.int32
        assert np.array_equal(ring[0], ring[-1])
        assert len(np.unique(ring[:-1], axis=0)) == len(ring) - 1  # touches itself nowhere
        sides = np.diff(ring, axis=0)
        assert ((sides == 0).sum(1) == 1).all()
        assert ((sides[1:] == 0) != (sides[:-1] == 0)).all()  # corners only
        x, y = ring[:-1].astype(float).T
        area = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2
        assert area == np.count_nonzero(labels == number)  # and clockwise where y points down
    drawn = np.zeros(labels.shape, np.int32)
    for number, ring in enumerate(rings, 1):  # a row of pixels is inside between its odd crossings
        for (x, y), (_, end) in pairwise(ring):
            drawn[min(y, end) : max(y, end), x:] += number if end < y else -number
    np.testing.assert_array_equal(drawn, labels)


@pytest.mark.parametrize("fault", ["missing", "two pieces", "hole"])
def test_a_label_without_one_simple_outline_is_refused(fault):
    labels = np.zeros((9, 9), np.int32)
    labels[1, 1] = 1
    labels[3:8, 3:8] = {"missing": 3, "two pieces": 2, "hole": 2}[fault]
    if fault == "two pieces":
        labels[1, 8] = 2
    if fault == "hole":
        labels[5, 5] = 0
    with pytest.raises(ValueError, match="label 2"):
        measures.outlines(labels)


# --- counts for an area ---


def test_the_frame_of_an_image_leaves_out_two_edges():
    labels = np.zeros((10, 10), np.int32)
    for number, place in enumerate([(0, 5), (5, 0), (9, 5), (5, 9), (5, 5), (0, 0), (9, 9)], 1):
        labels[place] = number
    # Out: at the top, at the left, at both. In: at the bottom, at the right, at both, inside.
    assert measures.count_in_frame(measures.outlines(labels)) == 4
