"""Scores by hand, and what people read."""

import pytest
import torch

import utils
from tissue import agreement

# --- scores: by hand on 4 x 4 masks

PREDICTION = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
REFERENCE = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]).bool()


BOTH = pytest.mark.parametrize("count", [
    utils.pixel_counts,
    lambda one, other: agreement.pixel_counts(one.numpy(), other.numpy()),
])  # fmt: skip


@BOTH
def test_pixel_counts_and_scores_by_hand(count):
    # 1s in both: (0,0) (0,1) (1,0) (3,3); predicted alone: (1,1); missed: (0,2) (3,2)
    counts = count(PREDICTION, REFERENCE)
    assert counts.tolist() == [4, 1, 2, 9]
    assert agreement.scores(counts) == {"accuracy": 13 / 16, "dice": 8 / 11, "iou": 4 / 7}


@BOTH
def test_counts_of_batches_add_up(count):
    whole = count(PREDICTION, REFERENCE)
    halves = [count(PREDICTION[i : i + 2], REFERENCE[i : i + 2]) for i in (0, 2)]
    assert whole.tolist() == sum(halves).tolist()


@BOTH
def test_two_empty_masks_agree_and_one_empty_mask_does_not(count):
    empty = torch.zeros(4, 4, dtype=torch.bool)
    assert set(agreement.scores(count(empty, empty)).values()) == {1}
    assert agreement.dice(count(empty, REFERENCE)) == 0


# --- logging


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (99, "99s"), (130, "2m"), (3600, "60m"), (7500, "2h05m")]
)
def test_durations_for_people(seconds, text):
    assert utils.duration(seconds) == text
