"""Images of one tissue in other colours look alike to the network, in training and in use."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from learning import checkpoints
from learning.predictor import Predictor
from model import IMAGENET_MEAN, IMAGENET_STD, UNet
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


def reinhard(image):
    """An RGB uint8 image with the mean and the spread of TARGET, in floating point, float32."""
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    tissue = ~background(image)
    mean, spread = lab[tissue].mean(0), lab[tissue].std(0)
    lab[tissue] = (lab[tissue] - mean) * (TARGET.spread / spread).clip(0.5, 3) + TARGET.mean
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).clip(0, 1) * 255


def probability(checkpoint, image):
    """What the network of a checkpoint makes of an RGB image, (H, W), by torch alone."""
    model = UNet(checkpoint["config"]["dimensions"]).eval()
    model.load_state_dict(checkpoint["model"])
    pixels = torch.from_numpy((image / 255 - IMAGENET_MEAN) / IMAGENET_STD).permute(2, 0, 1)
    with torch.inference_mode():
        return model(pixels[None].float())[0, 0].sigmoid().numpy()


def test_the_checkpoint_decides_what_inference_does(root, tmp_path, restained, monkeypatch, capsys):
    for module in ("predictor", "fusing"):
        monkeypatch.setattr(f"learning.{module}.choose_precision", lambda device: torch.float32)
    cut(root)
    restained = restained[:288, :416]
    write_image(tmp_path / "restained.png", restained)
    within = np.s_[80:-80, 80:-80]  # the margin has other surroundings in tiles
    for stain in ("reinhard", "none"):
        run = learn(root, tmp_path / "log", "--stain", stain)
        last = checkpoints.load_checkpoint(run / "last.pt")
        assert last["stain"] == (TARGET._asdict() if stain == "reinhard" else None)
        ways = {"reinhard": reinhard(restained), "none": restained.astype(np.float32)}
        expected = {way: probability(last, seen)[within] for way, seen in ways.items()}
        threshold = float(np.median(expected[stain]))
        flags = ["--ckpt", run / "last.pt", "--images", tmp_path / "restained.png"]
        infer(tmp_path / stain, *flags, "--threshold", threshold)
        mask = masks.read_mask(tmp_path / stain / "restained_prediction.png")[within]
        same = {way: (mask == (values >= threshold)).mean() for way, values in expected.items()}
        assert same.pop(stain) > 0.95 and max(same.values()) < 0.8
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
