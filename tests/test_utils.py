"""Scores by hand, and what people read."""

import pytest
import torch

import utils

# --- scores: by hand on 4 x 4 masks

PREDICTION = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
REFERENCE = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]).bool()


def test_pixel_counts_by_hand():
    # 1s in both: (0,0) (0,1) (1,0) (3,3); predicted alone: (1,1); missed: (0,2) (3,2)
    assert utils.pixel_counts(PREDICTION, REFERENCE).tolist() == [4, 1, 2, 9]


def test_scores_by_hand():
    counts = utils.pixel_counts(PREDICTION, REFERENCE)
    assert utils.accuracy(counts) == 13 / 16
    assert utils.dice(counts) == 8 / 11
    assert utils.iou(counts) == 4 / 7


def test_counts_of_batches_add_up():
    whole = utils.pixel_counts(PREDICTION, REFERENCE)
    halves = [utils.pixel_counts(PREDICTION[i : i + 2], REFERENCE[i : i + 2]) for i in (0, 2)]
    assert torch.equal(whole, sum(halves))


def test_two_empty_masks_agree_and_one_empty_mask_does_not():
    empty = torch.zeros(4, 4, dtype=torch.bool)
    nothing = utils.pixel_counts(empty, empty)
    assert (utils.accuracy(nothing), utils.dice(nothing), utils.iou(nothing)) == (1, 1, 1)
    assert utils.dice(utils.pixel_counts(empty, REFERENCE)) == 0


# --- logging


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (99, "99s"), (130, "2m"), (3600, "60m"), (7500, "2h05m")]
)
def test_durations_for_people(seconds, text):
    assert utils.duration(seconds) == text
