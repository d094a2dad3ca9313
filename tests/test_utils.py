import itertools
import pickle
import random
import time
from itertools import pairwise

import albumentations as A
import cv2
import numpy as np
import pytest
import torch

import utils
from learning import checkpoints, runs
from model import UNet
from tests.scripts import checkpoint_of
from tissue.files import InputError

# --- transforms


def test_validation_input_is_normalised_by_imagenet():
    image = np.full((16, 16, 3), 255, np.uint8)
    patch = utils.transform("val")(image=image, mask=np.ones((16, 16), np.float32))
    expected = (1 - np.array(utils.IMAGENET_MEAN)) / np.array(utils.IMAGENET_STD)
    assert patch["image"].shape == (3, 16, 16) and patch["image"].dtype == torch.float32
    np.testing.assert_allclose(patch["image"][:, 3, 5], expected, atol=1e-5)
    assert patch["mask"].shape == (16, 16)


def test_training_flips_image_and_mask_alike_in_all_four_ways():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:4, :4] = 200
    mask = (image[..., 0] > 0).astype(np.float32)
    transform = utils.transform("train")
    corners = set()
    for seed in range(40):
        transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        patch = transform(image=image, mask=mask)
        bright = patch["image"][0] > patch["image"][0].mean()
        assert torch.equal(bright, patch["mask"] > 0)
        corners.add(tuple(patch["mask"].nonzero()[0].tolist()))
    assert corners == {(0, 0), (0, 12), (12, 0), (12, 12)}


def test_training_changes_brightness_by_no_more_than_it_says():
    image = np.full((16, 16, 3), 100, np.uint8)
    steps = [
        step for step in utils.transform("train").transforms if not isinstance(step, A.Normalize)
    ]
    transform = A.Compose(steps)
    means = [
        transform(image=image, mask=image[..., 0])["image"].float().mean().item()
        for _ in range(200)
    ]
    assert min(means) < 80 and max(means) > 120
    assert max(means) <= 100 * 1.3 + 255 * 0.3 + 1  # 1.3 times the contrast and 0.3 of white more
    assert 60 < means.count(100.0) < 140


@pytest.fixture
def discs():
    """Dark discs on a light ground, and their mask."""
    mask = np.zeros((128, 128), np.float32)
    for x, y, radius in ((30, 40, 14), (90, 30, 10), (70, 90, 20), (20, 105, 8)):
        cv2.circle(mask, (x, y), radius, 1, -1)
    image = np.where(mask[..., None] > 0, (110, 60, 140), (225, 180, 215)).astype(np.uint8)
    return image, mask


def seeded(transform, seed, image, mask):
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return transform(image=image, mask=mask)


@pytest.mark.parametrize(("augment", "different"), [("moderate", 20), ("strong", 30)])
def test_augmentation_keeps_image_and_mask_aligned_and_the_mask_0_and_1(discs, augment, different):
    transform = utils.transform("train", augment)
    for step in transform.transforms:
        if isinstance(step, utils.PaleNuclei):
            step.p = 0  # discs as pale as the ground would hide a shift
    places = set()
    for seed in range(60):
        patch = seeded(transform, seed, *discs)
        image, nuclei = patch["image"].mean(0), patch["mask"] > 0
        assert patch["image"].shape == (3, 128, 128)
        assert patch["mask"].shape == (128, 128) and patch["mask"].dtype == torch.float32
        assert set(patch["mask"].unique().tolist()) == {0, 1}
        between = (image[nuclei].mean() + image[~nuclei].mean()) / 2
        assert ((image < between) == nuclei).float().mean() > 0.96
        places.add(tuple(nuclei.nonzero().float().mean(0).round().tolist()))
    assert len(places) > different  # not the eight of flips and quarter turns


@pytest.mark.parametrize("augment", ["basic", "moderate", "strong"])
def test_augmentation_repeats_for_a_seed_and_differs_for_another(discs, augment):
    one, two = (utils.transform("train", augment) for _ in range(2))
    for seed in range(20):
        patch, again = seeded(one, seed, *discs), seeded(two, seed, *discs)
        assert torch.equal(patch["image"], again["image"])
        assert torch.equal(patch["mask"], again["mask"])
    images = [seeded(one, seed, *discs)["image"] for seed in range(20)]
    assert sum(torch.equal(a, b) for a, b in pairwise(images)) <= 3


def image_steps():
    """The steps of the strong augmentation that leave the mask alone, each made certain."""
    for step in utils.transform("train", "strong").transforms:
        for choice in getattr(step, "transforms", [step]):
            if isinstance(choice, A.ImageOnlyTransform) and not isinstance(choice, A.Normalize):
                choice.p = 1
                yield choice


@pytest.mark.parametrize("step", list(image_steps()), ids=lambda step: type(step).__name__)
def test_a_step_that_changes_colours_leaves_the_mask_and_follows_the_seed(discs, step):
    image, mask = discs
    compose = A.Compose([step])
    patches = [seeded(compose, seed, image, mask) for seed in (0, 1, 0)]
    assert patches[0]["image"].dtype == np.uint8
    assert not np.array_equal(patches[0]["image"], image)
    assert not np.array_equal(patches[0]["image"], patches[1]["image"])
    np.testing.assert_array_equal(patches[0]["image"], patches[2]["image"])
    np.testing.assert_array_equal(patches[0]["mask"], mask)


def test_stains_are_unit_vectors_and_no_change_of_them_changes_no_pixel(generator):
    np.testing.assert_allclose(utils.STAINS @ utils.STAINS.T @ [0, 0, 1], [0, 0, 1], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(utils.STAINS, axis=1), 1, atol=1e-3)
    image = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    same = utils.StainJitter().apply(image, np.eye(3, 4))
    np.testing.assert_array_equal(same, image)


def test_more_haematoxylin_darkens_nuclei_more_than_their_surroundings(discs):
    image, mask = discs
    gain = np.diag([1.3, 1, 1])
    change = (np.linalg.inv(utils.STAINS) @ gain @ utils.STAINS).T
    stained = utils.StainJitter().apply(image, np.column_stack([change, np.zeros(3)]))
    darker = (image.astype(int) - stained).sum(2)
    assert darker[mask > 0].mean() > 2 * darker[mask == 0].mean() > 0


def test_pale_nuclei_lose_chromatin_within_and_keep_rim_and_surroundings(discs):
    image, mask = discs
    step = A.Compose([utils.PaleNuclei(p=1)])
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)
    lightest = image
    for seed in range(30):
        pale = seeded(step, seed, image, mask)["image"]
        assert (pale >= image).all()  # nothing becomes darker
        assert (pale[cv2.dilate(mask, np.ones((7, 7))) == 0] == image[0, 0]).all()
        lightest = np.maximum(lightest, pale)
    lighter = (lightest.astype(int) - image).mean(2)
    assert lighter[depth > 6].min() > 40  # every nucleus becomes pale in one patch or another
    assert lighter[(depth > 0) & (depth < 1.1)].max() < 30


# --- loss


def test_bce_dice_by_hand():
    masks = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.0]]]])  # two patches of 1 x 2 pixels
    odds = torch.tensor([[[[4.0, 1.0]]], [[[1.0, 1.0]]]])  # probabilities 0.8, 0.5, 0.5, 0.5
    cross_entropy = -(np.log(0.8) + 3 * np.log(0.5)) / 4
    soft_dice = (2 * 0.8 + 1) / (0.8 + 0.5 * 3 + 1 + 1)
    assert utils.bce_dice(odds.log(), masks).item() == pytest.approx(cross_entropy + 1 - soft_dice)


def test_bce_dice_of_a_perfect_prediction_is_zero_also_of_an_empty_one():
    for masks in (torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)):
        assert utils.bce_dice((masks - 0.5) * 200, masks).item() == pytest.approx(0, abs=1e-6)


# --- scores: by hand on 4 x 4 masks

PREDICTION = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
REFERENCE = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]).bool()


def test_pixel_counts_by_hand():
    # 1s in both: (0,0) (0,1) (1,0) (3,3); predicted alone: (1,1); missed: (0,2) (3,2)
    assert utils.pixel_counts(PREDICTION, REFERENCE).tolist() == [4, 1, 2, 9]


def test_scores_by_hand():
    counts = utils.pixel_counts(PREDICTION, REFERENCE)
    assert utils.accuracy(counts) == 13 / 16
    assert utils.dice(counts) == 8 / 11
    assert utils.iou(counts) == 4 / 7


def test_counts_of_batches_add_up():
    whole = utils.pixel_counts(PREDICTION, REFERENCE)
    halves = [utils.pixel_counts(PREDICTION[i : i + 2], REFERENCE[i : i + 2]) for i in (0, 2)]
    assert torch.equal(whole, sum(halves))


def test_two_empty_masks_agree_and_one_empty_mask_does_not():
    empty = torch.zeros(4, 4, dtype=torch.bool)
    nothing = utils.pixel_counts(empty, empty)
    assert (utils.accuracy(nothing), utils.dice(nothing), utils.iou(nothing)) == (1, 1, 1)
    assert utils.dice(utils.pixel_counts(empty, REFERENCE)) == 0


# --- device


def test_minus_one_is_the_cpu_without_a_word(capsys):
    assert utils.choose_device(-1) == torch.device("cpu")
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_any_gpu_means_the_cpu_where_there_is_none_and_a_line_says_so(capsys):
    assert utils.choose_device(3) == torch.device("cpu")
    assert "--gpu_id 3 means the CPU" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_beyond_the_last_is_an_error():
    with pytest.raises(InputError, match="--gpu_id"):
        utils.choose_device(torch.cuda.device_count())


@pytest.mark.parametrize(
    ("has", "gain", "precision"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, 0.6, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, 2.3, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, 0.6, torch.float32),
        ({"avx2": True}, 2.3, torch.float32),
        ({}, 2.3, torch.float32),
    ],
)
def test_bfloat16_on_a_cpu_that_multiplies_it_faster(monkeypatch, has, gain, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(utils, "bfloat16_gain", lambda: gain)
    assert utils.choose_precision.__wrapped__(torch.device("cpu")) == precision


def test_the_precision_is_chosen_once(monkeypatch):
    chosen = utils.choose_precision(torch.device("cpu"))
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"amx_bf16": chosen != torch.bfloat16}
    )
    assert utils.choose_precision(torch.device("cpu")) == chosen


def test_the_gain_of_bfloat16_is_that_of_the_fastest_products(monkeypatch):
    """By a clock that says that float32 takes 6 s and bfloat16 2 s, now and then 50 s longer."""
    seconds, now = itertools.cycle([6, 2, 56, 2, 6, 52]), itertools.count()
    passed = [0.0]

    def clock():
        if next(now) % 2:  # the second of two calls ends a product
            passed[0] += next(seconds)
        return passed[0]

    monkeypatch.setattr(time, "perf_counter", clock)
    assert utils.bfloat16_gain() == 3


# --- a loader process that is killed


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DataLoader worker (pid 7) is killed"), ConnectionResetError(104), EOFError()],
)
def test_a_killed_loader_is_told_however_it_shows(error):
    with pytest.raises(InputError, match="killed from outside"):
        utils.explain(error)


def test_a_full_memory_and_a_bad_patch_in_a_loader_process_are_one_line():
    with pytest.raises(InputError, match=r"memory is full.*--batch_size"):
        utils.explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"))
    wrapped = (
        "Caught InputError in a worker.\nOriginal Traceback:\ntissue.files.InputError: a.png: bad"
    )
    with pytest.raises(InputError, match=r"^a\.png: bad$"):
        utils.explain(InputError(wrapped))


def test_other_errors_are_left_as_they_are():
    utils.explain(RuntimeError("shapes do not fit"))


# --- averaged weights


def test_averaged_weights_start_near_the_newest_and_end_slow():
    for updates, moved in ((1, 1 - 2 / 11), (10_000, 0.1)):
        averaged = [torch.zeros(1)]
        utils.warm_ema(0.9, lambda updates=updates: updates)(averaged, [torch.ones(1)], None)
        assert averaged[0].item() == pytest.approx(moved)


def test_counters_are_copied_not_averaged():
    counters = [torch.tensor(3)]
    utils.warm_ema(0.9, lambda: 1)(counters, [torch.tensor(7)], None)
    assert counters[0].item() == 7


# --- checkpoints


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    model = UNet(4)
    checkpoints.save_checkpoint(tmp_path / "best.pt", checkpoint_of(model))
    loaded = checkpoints.load_checkpoint(tmp_path / "best.pt")
    again = checkpoints.build_model(loaded, "best.pt")
    assert again.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    assert loaded["channel_order"] == "rgb"


def test_a_bare_state_dict_loads_with_its_width_and_swapped_colours(tmp_path):
    torch.save(UNet(8).state_dict(), tmp_path / "original.pth")
    loaded = checkpoints.load_checkpoint(tmp_path / "original.pth")
    assert loaded["config"] == {"arch": "unet", "dimensions": 8}
    assert loaded["channel_order"] == "bgr"
    checkpoints.build_model(loaded, "original.pth")


def test_swapped_colours_are_fed_swapped(generator):
    model, tiles = UNet(4), generator.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    rgb, bgr = checkpoint_of(model), checkpoint_of(model) | {"channel_order": "bgr"}
    cpu = torch.device("cpu")
    fed_swapped = utils.predictor(model, bgr, cpu)(tiles)
    np.testing.assert_array_equal(
        fed_swapped, utils.predictor(model, rgb, cpu)(np.ascontiguousarray(tiles[..., ::-1]))
    )
    assert not np.array_equal(fed_swapped, utils.predictor(model, rgb, cpu)(tiles))


def test_prediction_and_training_feed_the_network_alike(generator):
    """predictor() normalises on the device what transform() normalises by albumentations."""
    model, tile = UNet(4).eval(), generator.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    predict = utils.predictor(model, checkpoint_of(model), torch.device("cpu"))
    patch = utils.transform("val")(image=tile, mask=tile[..., 0])["image"]
    with torch.inference_mode():
        expected = model(patch[None]).sigmoid()[0, 0]
    np.testing.assert_allclose(predict(tile[None])[0, 0], expected, atol=0.01)


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_that_would_execute_code_is_refused_and_executes_nothing(tmp_path):
    victim = tmp_path / "written_by_the_checkpoint"
    torch.save({"format_version": 1, "model": Malice(victim)}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt.*execute code.*refused"):
        checkpoints.load_checkpoint(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malice(victim)))
    with pytest.raises(InputError, match=r"plain\.pt"):
        checkpoints.load_checkpoint(tmp_path / "plain.pt")
    assert not victim.exists()


def test_a_whole_pickled_network_is_refused(tmp_path):
    torch.save(UNet(4), tmp_path / "whole.pt")
    with pytest.raises(InputError, match="execute code"):
        checkpoints.load_checkpoint(tmp_path / "whole.pt")


@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_a_truncated_checkpoint_is_named(tmp_path, keep):
    torch.save(checkpoint_of(UNet(4)), tmp_path / "whole.pt")
    path = tmp_path / "cut.pt"
    path.write_bytes((tmp_path / "whole.pt").read_bytes()[:keep])
    with pytest.raises(InputError, match=r"cut\.pt.*damaged"):
        checkpoints.load_checkpoint(path)


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], torch.zeros(3)])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt.*without a network"):
        checkpoints.load_checkpoint(tmp_path / "other.pt")


def test_an_image_given_as_checkpoint_is_named(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(InputError, match=r"image\.png"):
        checkpoints.load_checkpoint(tmp_path / "image.png")


def test_weights_that_do_not_fit_their_config_are_named():
    checkpoint = checkpoint_of(UNet(4)) | {"config": {"arch": "unet", "dimensions": 8}}
    with pytest.raises(InputError, match=r"best\.pt"):
        checkpoints.build_model(checkpoint, "best.pt")
    with pytest.raises(InputError, match="another"):
        checkpoints.build_model(checkpoint | {"config": {"arch": "another"}}, "best.pt")


# --- logging


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (99, "99s"), (130, "2m"), (3600, "60m"), (7500, "2h05m")]
)
def test_durations_for_people(seconds, text):
    assert utils.duration(seconds) == text


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    folders = {runs.make_run_folder(tmp_path, "same") for _ in range(2)}
    assert len(folders) == 2
    assert all(folder.name.endswith("-same") for folder in folders)
