"""The averaged weights."""

import pytest
import torch

from learning.optimisation import warm_ema


def test_averaged_weights_start_near_the_newest_and_end_slow():
    for updates, moved in ((1, 1 - 2 / 11), (10_000, 0.1)):
        averaged = [torch.zeros(1)]
        warm_ema(0.9, lambda updates=updates: updates)(averaged, [torch.ones(1)], None)
        assert averaged[0].item() == pytest.approx(moved)


def test_counters_are_copied_not_averaged():
    counters = [torch.tensor(3)]
    warm_ema(0.9, lambda: 1)(counters, [torch.tensor(7)], None)
    assert counters[0].item() == 7
