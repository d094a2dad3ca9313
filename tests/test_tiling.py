from dataclasses import replace

import numpy as np
import pytest
import torch

from learning.devices import choose_precision
from learning.predictor import Predictor, halving
from model import UNet
from tests.scripts import checkpoint_of
from tissue import tiling
from tissue.files import InputError
from tissue.windows import from_array


def predictor_of(tta=False):
    torch.manual_seed(0)
    model = UNet(4)
    return Predictor.of(model, checkpoint_of(model), torch.device("cpu"), tta)


@pytest.fixture(scope="module")
def network():
    return predictor_of()


def red(tiles, kept):
    """A network that returns a colour: the prediction is that colour's plane."""
    return tiles[:, None, *kept, 0].astype(np.float32)


@pytest.mark.parametrize("shape", [(300, 470), (256, 512), (513, 257)])
@pytest.mark.parametrize("tta", [False, True])
def test_tiles_give_the_untiled_prediction(generator, shape, tta):
    network = predictor_of(tta)
    image = from_array(generator.integers(0, 256, (*shape, 3), dtype=np.uint8))
    untiled = tiling.predict_image(image, network)
    tiled = tiling.predict_image(image, replace(network, tile_size=128, batch_size=3))
    assert untiled.shape == tiled.shape == (1, *shape)
    np.testing.assert_allclose(tiled, untiled, atol=1e-2 if bfloat16() else 1e-5)
    assert np.array_equal(tiled >= 0.5, untiled >= 0.5)


def bfloat16():
    return choose_precision(torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 30), (5, 40), (16, 16), (31, 17)])
@pytest.mark.parametrize("scale", [1.0, 1.7, 0.6])
def test_small_images_are_padded_and_cut_back(network, generator, shape, scale):
    image = from_array(generator.integers(60, 180, (*shape, 3), dtype=np.uint8))
    probability = tiling.predict_image(image, replace(network, scale=scale))
    assert probability.shape == (1, *shape)
    assert ((probability > 0) & (probability < 1)).all()


def test_every_pixel_comes_from_its_own_place():
    image = np.random.default_rng(1).integers(0, 256, (200, 333, 3), dtype=np.uint8)
    found = tiling.predict_image(
        from_array(image), tiling.Network(predict=red, tile_size=64, halo=16, batch_size=5)
    )
    np.testing.assert_array_equal(found, image[None, ..., 0])


@pytest.mark.parametrize("scale", [1.37, 2.0, 3.3, 0.7])
def test_the_prediction_at_another_pixel_size_lies_where_the_image_does(scale):
    """A ramp is a ramp at any pixel size, so a network that returns a colour returns the ramp."""
    ramp = np.add.outer(np.arange(300) * 0.15, 60 + np.arange(500) * 0.15).astype(np.uint8)
    image = from_array(np.repeat(ramp[..., None], 3, axis=2))
    whole = tiling.predict_image(image, tiling.Network(predict=red, scale=scale, tile_size=1024))
    tiled = tiling.predict_image(
        image, tiling.Network(predict=red, scale=scale, tile_size=96, halo=16, batch_size=2)
    )
    np.testing.assert_array_equal(whole, tiled)
    inner = slice(8, -8)
    assert np.abs(whole[0] - ramp)[inner, inner].max() < 1.3


def test_seen_at_several_sizes_the_probability_is_their_mean(network, generator):
    image = from_array(generator.integers(0, 256, (90, 130, 3), dtype=np.uint8))
    alone = [tiling.predict_image(image, replace(network, scale=1.5 * size)) for size in (1, 2)]
    both = tiling.predict_image(image, replace(network, scale=1.5, sizes=(1, 2)))
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    np.testing.assert_allclose(both, (alone[0] + alone[1]) / 2, atol=1e-6)


def test_glass_is_not_predicted_and_tissue_is_measured(generator):
    image = generator.integers(238, 252, (256, 512, 3), dtype=np.uint8)  # no margin of one colour
    image[:128, 384:] = generator.integers((175, 85, 155), (186, 96, 166), (128, 128, 3))
    tiles = tiling.tiles_of(256, 512, 128)
    network = tiling.Network(predict=red, tile_size=128, halo=0)
    outcomes = list(tiling.predict_tiles(from_array(image), tiles, network))
    assert [outcome.tile for outcome in outcomes] == tiles
    predicted = [outcome.outputs is not None for outcome in outcomes]
    assert predicted[3] and not any(predicted[k] for k in (0, 1, 4, 5))
    tissue = [0, 0, 0.02, 1, 0, 0, 0, 0.02]  # smoothing makes an edge of two pixels uncertain
    np.testing.assert_allclose([outcome.tissue.mean() for outcome in outcomes], tissue, atol=0.02)
    twice = replace(network, sizes=(1, 2))
    outcomes = list(tiling.predict_tiles(from_array(image), tiles, twice))
    found = [outcome.outputs is not None for outcome in outcomes]
    assert found[3] and not any(found[:1])  # a larger window may reach into its neighbour's tissue


def test_the_average_over_flips_and_turns_does_not_depend_on_how_the_image_lies(generator):
    predict = predictor_of(tta=True).predict
    image = generator.integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    turned = predict(np.ascontiguousarray(np.rot90(image, axes=(1, 2))))
    np.testing.assert_allclose(np.rot90(turned, -1, axes=(2, 3)), predict(image), atol=2e-3)


def test_a_batch_that_does_not_fit_is_halved_until_it_does(capsys):
    sizes = []

    def small_memory(tiles, kept):
        sizes.append(len(tiles))
        if len(tiles) > 2:
            raise torch.OutOfMemoryError
        return red(tiles, kept)

    tiles = np.arange(7 * 4 * 4 * 3, dtype=np.uint8).reshape(7, 4, 4, 3)
    predict, kept = halving(small_memory), np.s_[1:3, :4]
    np.testing.assert_array_equal(predict(tiles, kept), red(tiles, kept))
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert "going on with 3" in capsys.readouterr().out


def test_things_are_computed_ahead_and_come_in_order():
    assert list(tiling.ahead(lambda x: x * x, range(10), 3)) == [x * x for x in range(10)]
    with pytest.raises(ZeroDivisionError):
        list(tiling.ahead(lambda x: 1 / x, [1, 0, 2], 2))


def test_a_batch_too_large_for_the_cpus_memory_is_halved_too(capsys):
    def little_memory(tiles, kept):
        if len(tiles) > 1:
            torch.empty(2**60, dtype=torch.uint8)  # raises what torch does where there is no more
        return tiles[..., 0]

    predict = halving(little_memory)
    tiles = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1)
    assert predict(tiles).ravel().tolist() == [0, 1, 2]
    assert "does not fit the memory: going on with 1" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"smaller --tile_size"):
        halving(lambda tiles, kept: torch.empty(2**60, dtype=torch.uint8))(tiles[:1])
