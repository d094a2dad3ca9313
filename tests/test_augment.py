"""What training does to a patch keeps image and mask together, and follows its seed."""

import random
from itertools import pairwise

import albumentations as A
import cv2
import numpy as np
import pytest
import torch

from learning.augment import STAINS, PaleNuclei, StainJitter, transform
from model import IMAGENET_MEAN, IMAGENET_STD


def test_validation_input_is_normalised_by_imagenet():
    image = np.full((16, 16, 3), 255, np.uint8)
    patch = transform("val")(image=image, mask=np.ones((16, 16), np.float32))
    expected = (1 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    assert patch["image"].shape == (3, 16, 16) and patch["image"].dtype == torch.float32
    np.testing.assert_allclose(patch["image"][:, 3, 5], expected, atol=1e-5)
    assert patch["mask"].shape == (16, 16)


def test_training_flips_image_and_mask_alike_in_all_four_ways():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:4, :4] = 200
    mask = (image[..., 0] > 0).astype(np.float32)
    augmentation = transform("train")
    corners = set()
    for seed in range(40):
        augmentation.set_random_state(np.random.default_rng(seed), random.Random(seed))
        patch = augmentation(image=image, mask=mask)
        bright = patch["image"][0] > patch["image"][0].mean()
        assert torch.equal(bright, patch["mask"] > 0)
        corners.add(tuple(patch["mask"].nonzero()[0].tolist()))
    assert corners == {(0, 0), (0, 12), (12, 0), (12, 12)}


def test_training_changes_brightness_by_no_more_than_it_says():
    """Contrast by up to 0.3 of a value, brightness by up to 0.3 of white, each in half of all."""
    image = np.full((16, 16, 3), 128, np.uint8)
    steps = [step for step in transform("train").transforms if not isinstance(step, A.Normalize)]
    augmentation = A.Compose(steps)
    means = [
        seeded(augmentation, seed, image, image[..., 0])["image"].float().mean().item()
        for seed in range(400)
    ]
    least, most = 128 * 0.7 - 255 * 0.3, 128 * 1.3 + 255 * 0.3  # 13 and 243: nothing is cut off
    assert least - 1 <= min(means) < least + 30 and most - 30 < max(means) <= most + 1
    assert 150 < means.count(128) < 250


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
    augmentation = transform("train", augment)
    for step in augmentation.transforms:
        if isinstance(step, PaleNuclei):
            step.p = 0  # discs as pale as the ground would hide a shift
    places = set()
    for seed in range(60):
        patch = seeded(augmentation, seed, *discs)
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
    one, two = (transform("train", augment) for _ in range(2))
    for seed in range(20):
        patch, again = seeded(one, seed, *discs), seeded(two, seed, *discs)
        assert torch.equal(patch["image"], again["image"])
        assert torch.equal(patch["mask"], again["mask"])
    images = [seeded(one, seed, *discs)["image"] for seed in range(20)]
    assert sum(torch.equal(a, b) for a, b in pairwise(images)) <= 3


def image_steps():
    """The steps of the strong augmentation that leave the mask alone, each made certain."""
    for step in transform("train", "strong").transforms:
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
    np.testing.assert_allclose(STAINS @ STAINS.T @ [0, 0, 1], [0, 0, 1], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(STAINS, axis=1), 1, atol=1e-3)
    image = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    same = StainJitter().apply(image, np.eye(3, 4))
    np.testing.assert_array_equal(same, image)


def test_more_haematoxylin_darkens_nuclei_more_than_their_surroundings(discs):
    image, mask = discs
    gain = np.diag([1.3, 1, 1])
    change = (np.linalg.inv(STAINS) @ gain @ STAINS).T
    stained = StainJitter().apply(image, np.column_stack([change, np.zeros(3)]))
    darker = (image.astype(int) - stained).sum(2)
    assert darker[mask > 0].mean() > 2 * darker[mask == 0].mean() > 0


def test_pale_nuclei_lose_chromatin_within_and_keep_rim_and_surroundings(discs):
    image, mask = discs
    step = A.Compose([PaleNuclei(p=1)])
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
