"""Images of one tissue in other colours look alike to the network, in training and in use."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from learning import checkpoints
from learning.predictor import Predictor
from model import UNet
from tests.scripts import cut, infer, learn, table_of
from tissue import images, masks, pairs, patches, tiling
from tissue.background import background
from tissue.patches import PatchDataset
from tissue.pictures import write_image
from tissue.stain import MOST, TARGET, Stain, stain_of, to_stain
from tissue.synthetic import draw_tissue
from tissue.windows import from_array


def own(image):
    return stain_of(from_array(image))


def differing(one, other):
    return np.abs(one.astype(int) - other).mean()


@pytest.fixture(scope="module")
def picture():
    return draw_tissue(300, 420, seed=3).image


@pytest.fixture(scope="module")
def restained(picture):
    """The same tissue, paler and more violet."""
    return (255 * (picture / 255) ** np.array([0.8, 0.6, 0.4])).astype(np.uint8)


def test_an_image_gets_the_mean_and_the_spread_that_are_wanted(picture):
    found = own(to_stain(picture, own(picture), TARGET))
    np.testing.assert_allclose(found.mean, TARGET.mean, atol=1.5)
    np.testing.assert_allclose(found.spread, TARGET.spread, rtol=0.1)


def test_the_same_tissue_in_another_stain_becomes_nearly_the_same(picture, restained):
    ours, theirs = (to_stain(image, own(image), TARGET) for image in (picture, restained))
    assert differing(picture, restained) > 30
    assert differing(ours, theirs) < 6


def test_glass_does_not_count(picture):
    beside = np.full((304, 800, 3), 244, np.uint8)
    beside[:300, :420] = picture
    beside[:, 640:] = 0  # nor what was not scanned
    np.testing.assert_allclose(own(beside).mean, own(picture).mean, atol=1)
    np.testing.assert_allclose(own(beside).spread, own(picture).spread, atol=1.5)
    glass = np.full((40, 50, 3), 244, np.uint8)
    assert own(glass) is None
    assert to_stain(glass, own(glass), TARGET) is glass


def test_noise_is_not_made_large(generator):
    plain = np.full((64, 64, 3), (180, 90, 160), np.uint8)
    noisy = plain + generator.integers(0, 3, plain.shape, dtype=np.uint8)
    found = own(to_stain(noisy, own(noisy), TARGET))
    np.testing.assert_allclose(found.mean, TARGET.mean, atol=1)
    assert max(found.spread) < 2.5 * MOST


def test_of_a_large_image_windows_tell_the_colour(picture):
    large = np.tile(picture, (9, 7, 1))  # 2700 x 2940 pixels
    read = []

    class Counted:
        height, width = large.shape[:2]

        def read(self, y, x, height, width):
            read.append((y, x, height, width))
            return large[y : y + height, x : x + width]

    found = stain_of(Counted())
    assert sum(height * width for _, _, height, width in read) <= 2048**2
    assert {y + height for y, _, height, _ in read} >= {128, 2700}
    assert {x + width for _, x, _, width in read} >= {128, 2940}
    np.testing.assert_allclose(found.mean, own(picture).mean, atol=1)
    np.testing.assert_allclose(found.spread, own(picture).spread, atol=1)


@pytest.mark.parametrize("scale", [1.0, 1.6])
def test_tiles_take_the_colour_of_the_whole_image(picture, scale):
    half = picture.copy()
    half[:, 200:] = 255 - (255 - half[:, 200:]) // 3  # a pale part, whose own colour is another

    def red(tiles, kept):
        return tiles[:, None, *kept, 0].astype(np.float32)

    network = tiling.Network(predict=red, scale=scale, stain=TARGET, halo=16)
    untiled, tiled = (
        tiling.predict_image(from_array(half), replace(network, tile_size=tile))
        for tile in (1024, 64)
    )
    np.testing.assert_array_equal(tiled, untiled)
    if scale == 1:
        tissue = ~background(half)
        expected = to_stain(half, own(half), TARGET)[..., 0] * tissue
        np.testing.assert_array_equal(untiled[0], expected)


def test_training_sees_the_colours_that_inference_sees(root):
    cut(root)

    def untouched(image, mask):
        return {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask)}

    dataset = PatchDataset(root, "train", untouched, TARGET)
    pair = pairs.find_pairs(root)[0]
    image = images.read_image(pair.image)
    whole = to_stain(image, own(image), TARGET)
    tissue = ~background(image)
    for index, row in enumerate(patches.read_table(root, "train")):
        if row["name"] == pair.name:
            y, x = int(row["y"]), int(row["x"])
            at = np.s_[y : y + 32, x : x + 32]
            # What is glass is told within the patch, without what lies around it.
            same = (dataset[index][0].numpy() == whole[at]).all(2) | ~tissue[at]
            assert same.mean() > 0.95


def test_the_checkpoint_decides_what_inference_does(root, tmp_path, restained, capsys):
    cut(root)
    write_image(tmp_path / "restained.png", restained)
    for stain in ("reinhard", "none"):
        run = learn(root, tmp_path / "log", "--stain", stain)
        last = checkpoints.load_checkpoint(run / "last.pt")
        assert last["stain"] == (TARGET._asdict() if stain == "reinhard" else None)
        model = checkpoints.build_model(last)
        network = replace(Predictor.of(model, last, torch.device("cpu")), stain=None)
        seen = to_stain(restained, own(restained), TARGET) if stain == "reinhard" else restained
        expected = tiling.predict_image(from_array(seen), network)[0]
        threshold = float(np.median(expected))
        flags = ["--ckpt", run / "last.pt", "--images", tmp_path / "restained.png"]
        infer(tmp_path / stain, *flags, "--threshold", threshold)
        mask = masks.read_mask(tmp_path / stain / "restained_prediction.png")
        assert 0.2 < mask.mean() < 0.8
        np.testing.assert_array_equal(mask, expected >= threshold)
        assert len(table_of(tmp_path / stain / "counts.csv")) == 1
    capsys.readouterr()
    learn(root, tmp_path / "log", "--init", run / "last.pt", "--epoch", 1, "--stain", "reinhard")
    assert "learned with --stain none, this run does not" in capsys.readouterr().out
    learn(root, tmp_path / "log", "--init", run / "last.pt", "--epoch", 1)  # that of --init
    assert "learned with" not in capsys.readouterr().out


def test_a_checkpoint_without_a_stain_leaves_images_alone(tmp_path):
    def stain_of(checkpoint):
        checkpoints.save_checkpoint(tmp_path / "net.pt", checkpoint)
        return Predictor.load(tmp_path / "net.pt", torch.device("cpu")).stain

    older = {
        "format_version": checkpoints.CHECKPOINT_VERSION,
        "model": UNet(4).state_dict(),
        "config": {"arch": "unet", "dimensions": 4},
        "normalisation": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "channel_order": "rgb",
        "threshold": 0.5,
    }
    assert stain_of(older) is None
    assert stain_of(UNet(4).state_dict()) is None
    newer = older | {"stain": {"mean": [50.0, 20.0, -20.0], "spread": [15.0, 8.0, 8.0]}}
    assert isinstance(stain_of(newer), Stain)
