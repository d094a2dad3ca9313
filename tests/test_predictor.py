"""A prediction feeds the network what training fed it."""

import numpy as np
import torch

from learning.augment import transform
from learning.predictor import predictor
from model import UNet
from tests.scripts import checkpoint_of


def test_swapped_colours_are_fed_swapped(generator):
    model, tiles = UNet(4), generator.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    rgb, bgr = checkpoint_of(model), checkpoint_of(model) | {"channel_order": "bgr"}
    cpu = torch.device("cpu")
    fed_swapped = predictor(model, bgr, cpu)(tiles)
    np.testing.assert_array_equal(
        fed_swapped, predictor(model, rgb, cpu)(np.ascontiguousarray(tiles[..., ::-1]))
    )
    assert not np.array_equal(fed_swapped, predictor(model, rgb, cpu)(tiles))


def test_prediction_and_training_feed_the_network_alike(generator):
    """predictor() normalises on the device what transform() normalises by albumentations."""
    model, tile = UNet(4).eval(), generator.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    predict = predictor(model, checkpoint_of(model), torch.device("cpu"))
    patch = transform("val")(image=tile, mask=tile[..., 0])["image"]
    with torch.inference_mode():
        expected = model(patch[None]).sigmoid()[0, 0]
    np.testing.assert_allclose(predict(tile[None])[0, 0], expected, atol=0.01)
