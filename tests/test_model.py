import copy

import numpy as np
import pytest
import torch
from torch import nn

from model import UNet, build
from tissue.tiling import Network, predict_image
from tissue.windows import from_array


@pytest.mark.parametrize(("dimensions", "millions"), [(64, 31.04), (32, 7.77), (16, 1.94)])
def test_number_of_parameters(dimensions, millions):
    parameters = sum(p.numel() for p in UNet(dimensions).parameters())
    assert round(parameters / 1e6, 2) == millions


# One of each kind: features from 1/2 and from 1/4, channels first and last.
NETWORKS = ("unet", "tf_efficientnet_lite0", "test_resnet", "test_mambaout")


@pytest.mark.parametrize("arch", NETWORKS)
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (37, 128), (100, 19)])
def test_the_output_has_one_logit_a_pixel_whatever_the_size(arch, size):
    with torch.inference_mode():
        logits = build({"arch": arch, "dimensions": 4}).eval()(torch.zeros(2, 3, *size))
    assert logits.shape == (2, 1, *size)


def test_state_dict_keys_are_those_of_the_first_version():
    keys = set(UNet(4).state_dict())
    for stage in ("conv1", "down1.conv", "down4.conv", "up1.conv", "up4.conv"):
        assert {f"{stage}.conv.{layer}.weight" for layer in (0, 1, 3, 4)} <= keys
    assert {"up1.up.up_scale.weight", "up4.up.up_scale.bias", "last_conv.weight"} <= keys


@pytest.mark.parametrize("arch", NETWORKS)
def test_config_rebuilds_the_network(arch):
    network = build({"arch": arch, "dimensions": 8})
    assert network.config == {"arch": arch, "dimensions": 8}
    again = build(network.config)
    again.load_state_dict(network.state_dict())


@pytest.mark.parametrize("arch", NETWORKS)
def test_every_trained_parameter_gets_a_gradient(arch):
    torch.manual_seed(0)
    network = build({"arch": arch, "dimensions": 4})
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # ResNet's blocks begin with a factor of 0 at their
            nn.init.ones_(module.weight)  # end, which lets no gradient through in the first step
    network(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_shifted_image_gives_a_shifted_prediction_far_from_the_edge():
    """The grid of the four poolings is 16 pixels: a shift by it moves the output alike."""
    torch.manual_seed(0)
    model = UNet(4).eval()
    image = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        whole = model(image)
        part = model(image[..., 16:, 16:])
    inner = slice(96, 128)
    torch.testing.assert_close(
        part[..., inner, inner], whole[..., 112:144, 112:144], atol=1e-5, rtol=1e-5
    )


# --- tiles


def linear(module):
    """A copy of a network that lets all through: every input that can matter has a gradient."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Identity())
            elif isinstance(child, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    return module


def test_the_halo_holds_all_that_the_logits_of_a_cell_of_the_grid_depend_on():
    torch.manual_seed(0)
    network = linear(UNet(1)).double().eval()
    start, stop = 256, 256 + network.grid
    image = torch.randn(1, 3, stop + 256, stop + 256, dtype=torch.double, requires_grad=True)
    network(image)[..., start:stop, start:stop].sum().backward()
    rows = image.grad[0].abs().sum((0, 2)).nonzero()
    assert start - rows.min() == rows.max() - (stop - 1) == 94
    assert network.halo >= 94


@pytest.mark.parametrize("arch", NETWORKS)
def test_halo_and_grid_are_whole_cells(arch):
    network = build({"arch": arch, "dimensions": 1})
    assert network.grid % 16 == 0 and network.halo % network.grid == 0


def test_tiles_with_the_halo_of_the_network_give_its_untiled_prediction(generator):
    torch.manual_seed(0)
    network = UNet(4)
    with torch.no_grad():
        for _ in range(10):  # so that batch norm has statistics, and activations a size
            network(torch.rand(4, 3, 64, 64))
    network.eval()

    @torch.inference_mode()
    def predict(tiles, kept):
        batch = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255
        return network(batch).sigmoid().numpy()[..., *kept]

    image = generator.integers(0, 256, (50, 150, 3), dtype=np.uint8).repeat(6, axis=1)
    settings = {"halo": network.halo, "grid": network.grid}
    untiled = predict_image(from_array(image), Network(predict=predict, tile_size=2048, **settings))
    tiled = predict_image(from_array(image), Network(predict=predict, tile_size=128, **settings))
    np.testing.assert_allclose(tiled, untiled, atol=1e-5)
