"""A prediction feeds the network what training fed it."""

import numpy as np
import pytest
import torch

from learning.augment import transform
from learning.predictor import Predictor
from model import UNet
from tests.scripts import checkpoint_of


def test_swapped_colours_are_fed_swapped(generator):
    model, tiles = UNet(4), generator.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    rgb, bgr = checkpoint_of(model), checkpoint_of(model) | {"channel_order": "bgr"}
    cpu = torch.device("cpu")
    fed_swapped = Predictor.of(model, bgr, cpu).predict(tiles)
    np.testing.assert_array_equal(
        fed_swapped, Predictor.of(model, rgb, cpu).predict(np.ascontiguousarray(tiles[..., ::-1]))
    )
    assert not np.array_equal(fed_swapped, Predictor.of(model, rgb, cpu).predict(tiles))


@pytest.mark.parametrize(("instances", "h", "confidence"), [(False, 0.05, 0.0), (True, 0.2, 0.3)])
def test_what_a_checkpoint_does_not_say_is_what_was_meant(instances, h, confidence):
    """As in docs/counting.md, of a network in memory as of one from a file."""
    model = UNet(4, instances)
    network = Predictor.of(model, checkpoint_of(model), torch.device("cpu"))
    assert (network.split.h, network.split.confidence) == (h, confidence)
    assert network.stain is None and network.pixel_size_um is None and network.expected == {}


def test_prediction_and_training_feed_the_network_alike(generator):
    """Predictor normalises on the device what transform() normalises by albumentations."""
    model, tile = UNet(4).eval(), generator.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    predict = Predictor.of(model, checkpoint_of(model), torch.device("cpu")).predict
    patch = transform("val")(image=tile, mask=tile[..., 0])["image"]
    with torch.inference_mode():
        expected = model(patch[None]).sigmoid()[0, 0]
    np.testing.assert_allclose(predict(tile[None])[0, 0], expected, atol=0.01)
