"""Checkpoints of the pipeline's first version give what its own network gave.

That network is written out here, with nothing but torch's functions, so that no mistake of ours can
be on both sides.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from learning import checkpoints
from tests.scripts import cut, infer, learn
from tissue import pictures
from tissue.files import InputError
from tissue.images import read_image

WIDTH = 4


def random_state(generator):
    """A state dict as the first version saved one: bare, in the order of its modules."""
    state = {}

    def convolution(name, *shape, outputs):
        scale = (2 / np.prod(shape[1:])) ** 0.5
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        state[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1

    def twice(name, channels, out):
        for layer, inputs in ((0, channels), (3, out)):
            convolution(f"{name}.conv.{layer}", out, inputs, 3, 3, outputs=out)
            norm = f"{name}.conv.{layer + 1}"
            state[f"{norm}.weight"] = 0.5 + torch.rand(out, generator=generator)
            state[f"{norm}.bias"] = torch.randn(out, generator=generator) * 0.2
            state[f"{norm}.running_mean"] = torch.randn(out, generator=generator) * 0.2
            state[f"{norm}.running_var"] = 0.5 + torch.rand(out, generator=generator)
            state[f"{norm}.num_batches_tracked"] = torch.tensor(1000)

    twice("conv1", 3, WIDTH)
    for stage in (1, 2, 3, 4):
        twice(f"down{stage}.conv", WIDTH * 2 ** (stage - 1), WIDTH * 2**stage)
    for stage in (1, 2, 3, 4):
        channels = WIDTH * 2 ** (5 - stage)
        name = f"up{stage}.up.up_scale"
        convolution(name, channels, channels // 2, 2, 2, outputs=channels // 2)
        twice(f"up{stage}.conv", channels, channels // 2)
    convolution("last_conv", 1, WIDTH, 1, 1, outputs=1)
    return state


def original(state, x):
    """The logits of the first version's network for normalised images (N, 3, H, W)."""

    def twice(x, name):
        for layer in (0, 3):
            conv, norm = f"{name}.conv.{layer}", f"{name}.conv.{layer + 1}"
            x = F.conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], padding=1)
            statistics = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
            x = F.batch_norm(x, *statistics, state[f"{norm}.weight"], state[f"{norm}.bias"])
            x = F.relu(x)
        return x

    def up(low, skip, name):
        scale = f"{name}.up.up_scale"
        low = F.conv_transpose2d(low, state[f"{scale}.weight"], state[f"{scale}.bias"], stride=2)
        rows, columns = skip.shape[2] - low.shape[2], skip.shape[3] - low.shape[3]
        low = F.pad(low, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return twice(torch.cat([low, skip], dim=1), f"{name}.conv")

    skips = [twice(x, "conv1")]
    for stage in (1, 2, 3, 4):
        skips.append(twice(F.max_pool2d(skips[-1], 2), f"down{stage}.conv"))
    x = skips.pop()
    for stage in (1, 2, 3, 4):
        x = up(x, skips.pop(), f"up{stage}")
    return F.conv2d(x, state["last_conv.weight"], state["last_conv.bias"])


@pytest.fixture
def state():
    return random_state(torch.Generator().manual_seed(5))


@pytest.mark.parametrize("size", [(64, 64), (50, 77)])
def test_a_bare_state_dict_gives_the_logits_of_the_first_versions_network(tmp_path, state, size):
    torch.save(state, tmp_path / "original.pth")
    checkpoint = checkpoints.load_checkpoint(tmp_path / "original.pth")
    network = checkpoints.build_model(checkpoint).eval()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = original(state, images), network(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_inference_feeds_it_blue_green_red_with_the_normalisation_of_imagenet(
    tmp_path, state, generator
):
    noise = generator.normal(0, 30, (24, 20, 3)).repeat(4, axis=0).repeat(4, axis=1)
    image = (noise + np.array([170, 90, 150])).clip(0, 255).astype(np.uint8)  # tissue by any rule
    (tmp_path / "images").mkdir()
    pictures.write_image(tmp_path / "images" / "drawn.png", image)
    bgr = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    logits = original(state, (bgr - mean) / std)[0, 0]
    state["last_conv.bias"] -= logits.median()  # half of the pixels become nucleus
    expected = (logits - logits.median()).numpy()
    torch.save(state, tmp_path / "original.pth")
    infer(
        tmp_path / "results", "--ckpt", tmp_path / "original.pth", "--images", tmp_path / "images"
    )
    mask = read_image(tmp_path / "results" / "drawn_prediction.png")[..., 0] > 0
    clear = np.abs(expected) > 0.05 * expected.std()  # bfloat16 may decide the others
    assert clear.mean() > 0.9
    assert ((expected > 0) == mask)[clear].mean() > 0.995


def test_weights_of_this_version_keep_their_order(root, tmp_path):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1)
    saved = torch.load(run / "best.pt", weights_only=True)["model"]
    network = checkpoints.build_model(checkpoints.load_checkpoint(run / "best.pt"))
    for key, value in network.state_dict().items():
        assert torch.equal(value, saved[key]), key


def test_a_run_cannot_begin_at_weights_for_blue_green_red(root, tmp_path, state):
    cut(root)
    torch.save(state, tmp_path / "original.pth")
    with pytest.raises(InputError, match=r"original\.pth.*first version.*blue, green, red"):
        learn(root, tmp_path / "log", "--init", tmp_path / "original.pth")
    assert not (tmp_path / "log").exists()
