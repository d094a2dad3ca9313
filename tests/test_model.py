import pytest
import torch

from model import UNet


@pytest.mark.parametrize(("dimensions", "millions"), [(64, 31.04), (32, 7.77), (16, 1.94)])
def test_number_of_parameters(dimensions, millions):
    parameters = sum(p.numel() for p in UNet(dimensions).parameters())
    assert round(parameters / 1e6, 2) == millions


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (37, 128), (100, 19)])
def test_the_output_has_one_logit_a_pixel_whatever_the_size(size):
    with torch.inference_mode():
        logits = UNet(4).eval()(torch.zeros(2, 3, *size))
    assert logits.shape == (2, 1, *size)


def test_state_dict_keys_are_those_of_the_first_version():
    keys = set(UNet(4).state_dict())
    for stage in ("conv1", "down1.conv", "down4.conv", "up1.conv", "up4.conv"):
        assert {f"{stage}.conv.{layer}.weight" for layer in (0, 1, 3, 4)} <= keys
    assert {"up1.up.up_scale.weight", "up4.up.up_scale.bias", "last_conv.weight"} <= keys


def test_config_rebuilds_the_network():
    config = UNet(8).config
    assert config == {"arch": "unet", "dimensions": 8}


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
