import cv2
import numpy as np
import pytest

from tests.pictures import blobs
from tissue import measures, nuclei
from tissue.files import InputError
from tissue.nuclei import PREDICTION_SPLIT, REFERENCE_SPLIT, Split
from tissue.synthetic import draw_tissue

EVERYTHING = Split(sigma=0.5, h=0.05, hole=0.0, smallest=0.0)  # drops nothing


def discs(shape, *centres_and_radii):
    rows, columns = np.indices(shape)
    mask = np.zeros(shape, bool)
    for y, x, radius in centres_and_radii:
        mask |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    return mask


def pieces(mask):
    """The number of its pieces, pixels being joined by their sides."""
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1


# --- contours ---


def test_contours_are_counted_without_holes_and_without_what_lies_in_them():
    mask = np.zeros((12, 12), bool)
    mask[1:9, 1:9] = True
    mask[2:8, 2:8] = False  # a hole
    mask[4:6, 4:6] = True  # something in it
    mask[10, 10] = True  # a speck
    assert len(nuclei.contours(mask)) == 2


def test_objects_that_touch_at_a_corner_are_one():
    assert len(nuclei.contours(np.eye(4, dtype=bool))) == 1


def test_an_empty_mask_has_no_contours():
    assert nuclei.contours(np.zeros((5, 5), bool)) == []


# --- splitting ---


@pytest.mark.parametrize("split", [REFERENCE_SPLIT, PREDICTION_SPLIT])
def test_touching_discs_are_split_where_they_touch_and_a_long_one_is_not(split):
    mask = discs((60, 120), (30, 20, 11), (30, 40, 11), (30, 90, 10))
    mask[20:41, 90:110] = True
    labels = nuclei.nuclei(mask, 0.25, split)
    assert labels.dtype == np.int32
    assert labels.max() == 3
    assert labels[30, 20] != labels[30, 40]
    assert (labels[mask] > 0).all()
    assert abs(np.flatnonzero(labels[30] == labels[30, 40])[0] - 30) <= 1  # the neck


def test_the_same_tissue_at_another_pixel_size_is_split_alike():
    small = discs((80, 120), (40, 30, 11), (40, 50, 11), (40, 90, 10), (10, 100, 4))
    large = (
        cv2.resize(small.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST) > 0
    )
    assert nuclei.nuclei(small, 0.25, PREDICTION_SPLIT).max() == 4
    assert nuclei.nuclei(large, 0.125, PREDICTION_SPLIT).max() == 4
    specks_too_small = PREDICTION_SPLIT._replace(smallest=3.5)
    assert nuclei.nuclei(small, 0.25, specks_too_small).max() == 3
    assert nuclei.nuclei(large, 0.125, specks_too_small).max() == 3


def test_an_unknown_pixel_size_is_split_as_at_a_quarter_micrometre():
    mask = blobs(0)
    unknown = nuclei.nuclei(mask, None, PREDICTION_SPLIT)
    np.testing.assert_array_equal(unknown, nuclei.nuclei(mask, 0.25, PREDICTION_SPLIT))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("split", [EVERYTHING, PREDICTION_SPLIT])
def test_every_nucleus_is_one_piece_without_holes_in_raster_order(seed, split):
    labels = nuclei.nuclei(blobs(seed), 0.25, split)
    numbers, first = np.unique(labels, return_index=True)
    assert np.array_equal(numbers, np.arange(labels.max() + 1))
    assert (np.diff(first[1:]) > 0).all()
    for number in numbers[1:]:
        nucleus = np.pad(labels == number, 1)
        assert pieces(nucleus) == 1
        assert pieces(~nucleus) == 1
        assert nucleus.sum() * 0.25**2 >= split.smallest


def test_nothing_is_lost_but_specks():
    mask = blobs(1)
    labels = nuclei.nuclei(mask, 0.25, EVERYTHING)
    assert (labels[mask] > 0).all()
    large = nuclei.nuclei(mask, 0.25, EVERYTHING._replace(smallest=2.5))
    _, objects, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    specks = stats[objects, cv2.CC_STAT_AREA] < 40  # pixels
    assert (large[mask & ~specks] > 0).all()


def test_a_hole_belongs_to_its_nucleus_and_what_lies_in_it_too():
    mask = discs((40, 40), (20, 20, 12))
    mask[16:24, 16:24] = False
    mask[19:21, 19:21] = True
    labels = nuclei.nuclei(mask, 0.25, PREDICTION_SPLIT._replace(hole=5.0))
    np.testing.assert_array_equal(labels, discs((40, 40), (20, 20, 12)))


def test_a_ring_around_other_nuclei_does_not_swallow_them():
    ring = discs((160, 160), (80, 80, 70)) & ~discs((160, 160), (80, 80, 60))
    inside = discs((160, 160), (70, 60, 8), (90, 100, 8))
    for split in (PREDICTION_SPLIT, PREDICTION_SPLIT._replace(h=0.9)):
        labels = nuclei.nuclei(ring | inside, 0.25, split)
        assert labels[80, 80] == 0
        assert labels[70, 60] != labels[90, 100]
        assert np.count_nonzero(labels == labels[70, 60]) == discs((160, 160), (70, 60, 8)).sum()
        assert len(measures.outlines(labels)) == labels.max()


@pytest.mark.parametrize(("top", "left"), [(40, 56), (7, 3), (200, 90)])
def test_a_window_has_the_nuclei_that_the_whole_image_has_there(top, left, monkeypatch):
    """What becomes of an object depends on nothing farther off than 32 pixels."""
    labels = draw_tissue(480, 460, 5, "Spleen").labels
    mask = labels > 0
    mask[::64] = mask[:, ::72] = False  # or all objects of dense tissue hang together
    whole = nuclei.nuclei(mask, 0.25, PREDICTION_SPLIT)
    part = mask[top : top + 256, left : left + 320]
    windowed = nuclei.nuclei(part, 0.25, PREDICTION_SPLIT)
    _, objects = cv2.connectedComponents(part.astype(np.uint8), connectivity=4)
    margin = np.ones(part.shape, bool)
    margin[32:-32, 32:-32] = False
    inner = ~np.isin(objects, np.unique(objects[margin]))
    assert len(np.unique(windowed[inner])) > 40
    places = whole[top : top + 256, left : left + 320]
    pairs = np.unique(np.stack([windowed[inner], places[inner]]), axis=1)
    assert len(pairs[0]) == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))
    monkeypatch.setattr(nuclei, "WINDOW", 50)
    np.testing.assert_array_equal(nuclei.nuclei(mask, 0.25, PREDICTION_SPLIT), whole)


def test_drawn_tissue_is_counted_within_a_tenth():
    for seed, organ in enumerate(("Colon", "Breast", "Liver")):
        tissue = draw_tissue(512, 512, seed, organ)
        counted = nuclei.nuclei(tissue.labels > 0, 0.25, REFERENCE_SPLIT).max()
        assert abs(counted - tissue.count) < 0.1 * tissue.count


def test_masks_of_nothing_of_all_and_of_one_pixel():
    assert not nuclei.nuclei(np.zeros((30, 40), bool), 0.25, PREDICTION_SPLIT).any()
    assert (nuclei.nuclei(np.ones((30, 40), bool), 0.25, PREDICTION_SPLIT) == 1).all()
    one = np.zeros((30, 40), bool)
    one[3, 4] = True
    assert not nuclei.nuclei(one, 0.25, PREDICTION_SPLIT).any()
    np.testing.assert_array_equal(nuclei.nuclei(one, 0.25, EVERYTHING), one)
    assert nuclei.nuclei(np.ones((1, 1), bool), None, EVERYTHING).tolist() == [[1]]


# --- label maps of annotators ---


@pytest.mark.parametrize("numbers", [[3, 70_000, 2**31 + 5], [1, 2, 3], [9, 8, 200]])
def test_label_maps_with_gaps_keep_their_nuclei_and_order(numbers):
    label_map = np.zeros((4, 6), np.uint64)
    label_map[0, :2], label_map[3, 3], label_map[3, 5] = numbers[0], numbers[1], numbers[2]
    label_map[2, 0] = numbers[0]  # in two places by its annotator's word
    labels = nuclei.reference_labels(label_map)
    assert labels.dtype == np.int32
    order = [sorted(numbers).index(number) + 1 for number in numbers]
    assert labels[0, 0] == labels[2, 0] == order[0]
    assert [labels[3, 3], labels[3, 5]] == order[1:]
    assert np.count_nonzero(labels) == 5


def test_more_than_65535_labels():
    label_map = np.arange(300 * 300, dtype=np.uint32).reshape(300, 300)
    np.testing.assert_array_equal(nuclei.reference_labels(label_map), label_map)
    assert nuclei.reference_labels(label_map * 100).max() == 300 * 300 - 1
    full = nuclei.reference_labels(label_map + 1_000_000)
    assert (full.min(), full.max()) == (1, 300 * 300)


def test_label_maps_without_labels():
    assert not nuclei.reference_labels(np.zeros((3, 4), np.uint8)).any()
    assert nuclei.reference_labels(np.zeros((0, 4), np.uint8)).shape == (0, 4)


@pytest.mark.parametrize(
    ("label_map", "found"),
    [
        (np.zeros((4, 4)), "float64"),
        (np.zeros((4, 4, 3), np.uint8), "(4, 4, 3)"),
        (np.full((4, 4), [[0], [3], [-2], [1]]), "-2"),
    ],
)
def test_what_is_no_label_map_is_refused(label_map, found):
    with pytest.raises(InputError, match="label map: found") as error:
        nuclei.reference_labels(label_map)
    assert found in str(error.value)


# --- parameters from training images ---


def test_the_chosen_split_counts_best_and_its_error_is_that_of_the_counts():
    drawn = [draw_tissue(200, 200, seed, "Colon") for seed in range(3)]
    masks, sizes = [tissue.labels > 0 for tissue in drawn], [0.25, None, 0.25]
    counts = [tissue.count for tissue in drawn]

    def error(split):
        found = [nuclei.nuclei(m, size, split).max() for m, size in zip(masks, sizes, strict=True)]
        return np.mean([abs(n - c) / c for n, c in zip(found, counts, strict=True)])

    default = REFERENCE_SPLIT._replace(smallest=20.0, h=0.9)
    errors = nuclei.count_errors(masks, counts, sizes, default)
    best = min(errors, key=errors.get)
    assert next(iter(errors)) == default and {split.hole for split in errors} == {default.hole}
    for split in (default, best):
        assert error(split) == pytest.approx(errors[split], abs=0.01)
    assert errors[best] < errors[default] / 2


def test_without_true_counts_there_is_no_error():
    for masks, counts in (([], []), ([blobs(0)], [0])):
        assert nuclei.count_errors(masks, counts, [0.25] * len(masks)) == {}
