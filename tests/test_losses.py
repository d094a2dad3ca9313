"""What is made small, by hand."""

import numpy as np
import pytest
import torch

from learning.losses import bce_dice


def test_bce_dice_by_hand():
    masks = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.0]]]])  # two patches of 1 x 2 pixels
    odds = torch.tensor([[[[4.0, 1.0]]], [[[1.0, 1.0]]]])  # probabilities 0.8, 0.5, 0.5, 0.5
    cross_entropy = -(np.log(0.8) + 3 * np.log(0.5)) / 4
    soft_dice = (2 * 0.8 + 1) / (0.8 + 0.5 * 3 + 1 + 1)
    assert bce_dice(odds.log(), masks).item() == pytest.approx(cross_entropy + 1 - soft_dice)


def test_bce_dice_of_a_perfect_prediction_is_zero_also_of_an_empty_one():
    for masks in (torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)):
        assert bce_dice((masks - 0.5) * 200, masks).item() == pytest.approx(0, abs=1e-6)
