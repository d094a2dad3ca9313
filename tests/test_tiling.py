import numpy as np
import pytest
import torch

import utils
from model import UNet
from tissue.tiling import HALO, predict_image


@pytest.fixture(scope="module")
def predict():
    torch.manual_seed(0)
    model = UNet(4)
    checkpoint = {
        "normalisation": {"mean": utils.IMAGENET_MEAN, "std": utils.IMAGENET_STD},
        "channel_order": "rgb",
    }
    return utils.predictor(model, checkpoint, torch.device("cpu"))


@pytest.mark.parametrize("shape", [(300, 470), (256, 512), (513, 257)])
def test_tiles_give_the_untiled_prediction(predict, generator, shape):
    image = generator.integers(0, 256, (*shape, 3), dtype=np.uint8)
    untiled = predict_image(image, predict, tile=1024)
    tiled = predict_image(image, predict, tile=128, halo=HALO, batch_size=3)
    assert untiled.shape == tiled.shape == shape
    np.testing.assert_allclose(tiled, untiled, atol=1e-2 if bfloat16() else 1e-5)
    assert np.array_equal(tiled >= 0.5, untiled >= 0.5)


def bfloat16():
    return utils.choose_precision(torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (16, 16), (31, 17)])
def test_small_images_are_padded_and_cut_back(predict, shape):
    probability = predict_image(np.full((*shape, 3), 120, np.uint8), predict)
    assert probability.shape == shape
    assert np.isfinite(probability).all()


def test_every_pixel_comes_from_its_own_place():
    """With a network that returns a colour, the prediction is that colour's plane."""
    image = np.random.default_rng(1).integers(0, 256, (200, 333, 3), dtype=np.uint8)
    red = predict_image(image, lambda tiles: tiles[..., 0].astype(np.float32), 64, 16, 5)
    np.testing.assert_array_equal(red, image[..., 0])
