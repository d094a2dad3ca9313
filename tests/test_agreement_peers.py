"""Scores against those of other packages: cellseg-metrics, which wants numpy 2, and MONAI."""

import numpy as np
import pytest

from tests.test_agreement import random_labels
from tissue import agreement
from tissue.synthetic import draw_tissue


def drawn(seed):
    """A drawn label map with touching nuclei, and the same shifted, with nuclei lost and new."""
    reference = draw_tissue(200, 240, seed).labels
    shifted = np.roll(reference, (2, -3), (0, 1))
    shifted[shifted % 5 == 0] = 0
    shifted[reference % 7 == 1] = 9000 + reference[reference % 7 == 1]  # some of them as they are
    return shifted, reference


def scattered(seed):
    """Squares at random places, and the same moved by a pixel, with others over them."""
    generator = np.random.default_rng(seed)
    reference, others = random_labels(generator, 25), random_labels(generator, 8)
    return np.where(others > 0, others + 100, np.roll(reference, 1, 0)), reference


MAPS = [drawn(seed) for seed in range(2)] + [scattered(seed) for seed in range(8)]
EMPTY, SOME = np.zeros((4, 6), np.int32), np.pad(np.array([[1, 1, 2], [1, 1, 2]]), ((1, 1), (1, 2)))


def ours(prediction, reference):
    table = agreement.overlap(prediction, reference)
    dice = agreement.dice(agreement.pixel_counts(prediction > 0, reference > 0))
    return {"dice": dice, "aji": agreement.aji(table), **agreement.panoptic_quality(table)}


@pytest.fixture
def cellseg():
    return pytest.importorskip("cellseg_metrics")


def theirs(cellseg, prediction, reference):
    masks = (reference > 0).astype(np.uint8), (prediction > 0).astype(np.uint8)
    dice = cellseg.dice_coef(*cellseg.get_stats(*masks))
    aji = cellseg.aggregated_jaccard_index(reference, prediction)
    return {"dice": dice, "aji": aji, **cellseg.panoptic_quality(reference, prediction)}


@pytest.mark.parametrize("maps", MAPS)
def test_dice_and_panoptic_quality_are_those_of_cellseg_metrics(cellseg, maps):
    found, expected = ours(*maps), theirs(cellseg, *maps)
    assert 0 < found["pq"] < found["dq"] < 1
    assert {key: found[key] for key in ("dice", "pq", "dq", "sq")} == pytest.approx(
        {key: expected[key] for key in ("dice", "pq", "dq", "sq")}, abs=1e-6
    )


@pytest.mark.parametrize("maps", MAPS)
def test_aji_is_that_of_cellseg_metrics_where_both_choose_the_same_nuclei(cellseg, maps):
    """Ours takes the nucleus with the highest IoU (Kumar et al. 2017), theirs all those that share
    most pixels: reference nuclei for which these differ are taken away.
    """
    prediction, reference = maps[0], maps[1].copy()
    present = np.unique(reference)[1:]
    for number in present:
        mask = reference == number
        touched = [p for p in np.unique(prediction[mask]) if p]
        shared = [np.sum(mask & (prediction == p)) for p in touched]
        iou = [s / np.sum(mask | (prediction == p)) for s, p in zip(shared, touched, strict=True)]
        if touched and (shared.count(max(shared)) > 1 or np.argmax(shared) != np.argmax(iou)):
            reference[mask] = 0
    assert len(np.unique(reference)) > 0.5 * len(present)
    found, expected = ours(prediction, reference), theirs(cellseg, prediction, reference)
    assert found["aji"] == pytest.approx(expected["aji"], abs=1e-6)


def test_aji_differs_from_cellseg_metrics_where_a_small_nucleus_fits_better(cellseg):
    reference = np.array([[1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    prediction = np.array([[1, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]])
    # IoU of 1 is 1 / 4, of 2 it is 2 / 13; the other one counts as error
    assert ours(prediction, reference)["aji"] == pytest.approx(1 / (4 + 11))
    assert theirs(cellseg, prediction, reference)["aji"] == pytest.approx(2 / (13 + 1))


@pytest.mark.parametrize("maps", [(EMPTY, SOME), (SOME, EMPTY)])
def test_nuclei_in_one_map_alone_score_0_in_both(cellseg, maps):
    expected = dict.fromkeys(("dice", "aji", "pq", "dq", "sq"), 0)
    assert ours(*maps) == theirs(cellseg, *maps) == expected


def test_two_empty_maps_agree_here_and_score_0_in_cellseg_metrics(cellseg):
    assert set(ours(EMPTY, EMPTY).values()) == {1}
    assert set(theirs(cellseg, EMPTY, EMPTY).values()) == {0}


def test_equal_maps_of_touching_nuclei_score_1(cellseg):
    assert set(ours(SOME, SOME).values()) == {1}
    assert list(theirs(cellseg, SOME, SOME).values()) == pytest.approx([1] * 5, abs=1e-6)


@pytest.mark.parametrize("maps", MAPS)
def test_panoptic_quality_is_that_of_monai(maps):
    metrics = pytest.importorskip("monai.metrics")
    torch = pytest.importorskip("torch")
    prediction, reference = (
        torch.from_numpy(np.unique(labels, return_inverse=True)[1].reshape(labels.shape))
        for labels in maps
    )
    found = ours(*maps)
    for key, name in (("pq", "pq"), ("dq", "rq"), ("sq", "sq")):
        expected = metrics.compute_panoptic_quality(prediction, reference, metric_name=name)
        assert found[key] == pytest.approx(float(expected), abs=1e-5)
