import csv
import json

import cv2
import numpy as np
import pytest
import torch

from tissue import patches
from tissue.files import InputError
from tissue.patches import PatchDataset, PatchSampler


@pytest.fixture
def picture(generator):
    """An image of 52 x 40 pixels: at dim 16 and stride 12 it holds 4 x 3 patches."""
    image = generator.integers(0, 256, (52, 40, 3), dtype=np.uint8)
    mask = generator.random((52, 40)) < 0.3
    return image, mask


@pytest.fixture
def patch_set(tmp_path, picture):
    patches.remove_set(tmp_path)
    table = patches.write_patches(tmp_path, "train", "tissue", *picture, dim=16, stride=12)
    table += patches.write_patches(tmp_path, "val", "other", *picture, dim=16, stride=16)
    manifest = {"format_version": patches.FORMAT_VERSION, "patch_dim": 16}
    manifest["images"] = [{"name": name, "colour": None} for name in ("tissue", "other")]
    patches.write_manifest(tmp_path, manifest, table)
    return tmp_path


def test_patches_are_where_the_table_says_bit_by_bit(patch_set, picture):
    image, mask = picture
    rows = patches.read_table(patch_set, "train")
    assert len(rows) == 4 * 3
    for row in rows:
        y, x = int(row["y"]), int(row["x"])
        assert (y, x) == (12 * int(row["row"]), 12 * int(row["col"]))
        patch, patch_mask = patches.read_patch(patch_set, "train", row["file"])
        np.testing.assert_array_equal(patch, image[y : y + 16, x : x + 16])
        np.testing.assert_array_equal(patch_mask, mask[y : y + 16, x : x + 16])
        assert float(row["foreground"]) == pytest.approx(patch_mask.mean(), abs=5e-5)


def test_table_has_the_columns_of_the_contract(patch_set):
    with (patch_set / "patches.csv").open() as file:
        assert ",".join(next(csv.reader(file))) == "split,name,file,row,col,y,x,foreground"


def test_patch_names_do_not_collide_in_a_grid_of_more_than_ten(tmp_path):
    patches.remove_set(tmp_path)
    image = np.zeros((140, 140, 3), np.uint8)
    table = patches.write_patches(tmp_path, "train", "a", image, image[..., 0] > 0, 16, 4)
    files = [row["file"] for row in table]
    assert len(set(files)) == len(files) == 32 * 32
    assert files[:2] == ["a_patch_00_00.png", "a_patch_00_01.png"]
    assert patches.count_files(tmp_path) == {"train": 32 * 32, "val": 0}


def test_a_patch_file_shows_true_colours_and_a_mask_0_and_255(tmp_path):
    patches.remove_set(tmp_path)
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    patches.write_patches(tmp_path, "val", "red", red, red[..., 0] > 0, dim=16, stride=16)
    blue, green, shown_red = cv2.imread(str(tmp_path / "patches_rgb_val/red_patch_00_00.png"))[0, 0]
    assert (shown_red, green, blue) == (200, 0, 0)
    assert (cv2.imread(str(tmp_path / "patches_mask_val/red_patch_00_00.png"), -1) == 255).all()


def test_a_set_without_its_manifest_is_unfinished(patch_set):
    (patch_set / "patches.json").unlink()
    with pytest.raises(InputError, match=r"unfinished.*preprocess\.py"):
        patches.read_manifest(patch_set)


def test_no_set_at_all_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocess\.py --root"):
        patches.read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"patch_dim": 3}', '{"format_version": 99}'])
def test_a_foreign_manifest_is_an_input_error(tmp_path, text):
    (tmp_path / "patches.json").write_text(text)
    with pytest.raises(InputError, match=r"patches\.json"):
        patches.read_manifest(tmp_path)


def test_removing_a_set_leaves_other_files_alone(patch_set):
    mine = patch_set / "patches_rgb_train" / "notes.txt"
    mine.write_text("mine")
    patches.remove_set(patch_set)
    assert mine.exists()
    assert patches.count_files(patch_set) == {"train": 0, "val": 0}
    assert not (patch_set / "patches.json").exists()


def test_a_missing_patch_is_named(patch_set):
    (patch_set / "patches_mask_train" / "tissue_patch_00_01.png").unlink()
    with pytest.raises(InputError, match=r"patches_mask_train.tissue_patch_00_01\.png"):
        patches.read_patch(patch_set, "train", "tissue_patch_00_01.png")


def plain_transform(image, mask):
    return {"image": torch.from_numpy(image).permute(2, 0, 1), "mask": torch.from_numpy(mask)}


def test_a_dataset_item_is_image_mask_and_index(patch_set, picture):
    image, mask = picture
    dataset = PatchDataset(patch_set, "val", plain_transform)
    assert len(dataset) == 3 * 2
    pixels, nuclei, index = dataset[3]
    assert index == 3
    assert nuclei.shape == (1, 16, 16) and nuclei.dtype == torch.float32
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), image[16:32, 16:32])
    np.testing.assert_array_equal(nuclei[0], mask[16:32, 16:32])


def test_an_epoch_holds_each_patch_at_most_once_and_whole_batches():
    sampler = PatchSampler(count=11, batch_size=4, seed=0)
    indices = [index for index, _ in sampler]
    assert len(indices) == len(sampler) == 8
    assert len(set(indices)) == 8


def test_order_and_seeds_differ_between_epochs_and_repeat_for_a_seed():
    def keys(seed, epoch):
        sampler = PatchSampler(count=50, batch_size=5, seed=seed)
        sampler.epoch = epoch
        return list(sampler)

    assert keys(0, 1) == keys(0, 1)
    assert keys(0, 1) != keys(0, 2)
    assert keys(0, 1) != keys(1, 1)
    assert {seed for _, seed in keys(0, 1)}.isdisjoint(seed for _, seed in keys(0, 2))


# --- strata of nuclear density

SPARSE, MIDDLE, DENSE = 0.0, 0.25, 0.6


def densities(*counts):
    return np.repeat([SPARSE, MIDDLE, DENSE], counts)


def test_a_balanced_epoch_has_as_many_patches_of_each_stratum():
    foreground = densities(30, 60, 210)
    order = patches.balanced_order(foreground, np.random.default_rng(0))
    assert len(order) == 300
    drawn = foreground[order]
    assert [(drawn == value).sum() for value in (SPARSE, MIDDLE, DENSE)] == [100, 100, 100]
    for start in range(0, 300, 30):  # and so has each part of it
        part = drawn[start : start + 30]
        assert all(8 <= (part == value).sum() <= 12 for value in (SPARSE, MIDDLE, DENSE))


def test_all_patches_of_a_stratum_come_before_any_comes_again():
    order = patches.balanced_order(densities(30, 60, 210), np.random.default_rng(0))
    views = np.bincount(order, minlength=300)
    assert set(views[:30]) == {3, 4} and set(views[30:90]) == {1, 2} and set(views[90:]) == {0, 1}


def test_a_few_patches_do_not_fill_an_epoch():
    order = patches.balanced_order(densities(2, 0, 98), np.random.default_rng(0))
    views = np.bincount(order, minlength=100)
    assert set(views[:2]) == {4} and set(views[2:]) == {0, 1}
    assert len(order) == 100


def test_a_set_of_one_density_is_drawn_as_ever():
    order = patches.balanced_order(densities(0, 40, 0), np.random.default_rng(0))
    assert sorted(order) == list(range(40))


def test_balanced_order_and_seeds_follow_from_seed_and_epoch():
    def keys(seed, epoch):
        sampler = PatchSampler(50, 8, seed, foreground=densities(10, 10, 30))
        sampler.epoch = epoch
        return list(sampler)

    assert len(keys(0, 1)) == 48
    assert keys(0, 1) == keys(0, 1)
    assert keys(0, 1) != keys(0, 2)
    assert keys(0, 1) != keys(1, 1)
    again = [key for key in keys(0, 1) if key[0] < 10]
    assert len(set(again)) == len(again) > 10  # a patch that comes again is augmented anew


def test_a_balanced_epoch_is_shared_and_gone_on_with_like_any_other():
    foreground = densities(10, 10, 30)
    whole = PatchSampler(50, 8, seed=0, foreground=foreground)
    shares = [PatchSampler(50, 8, 0, rank, 2, foreground) for rank in range(2)]
    keys = list(whole)
    for sampler in shares:
        sampler.start = 2
    parts = [list(share) for share in shares]
    assert [len(share) for share in shares] == [len(part) for part in parts] == [16, 16]
    assert parts[0] == keys[16::2] and parts[1] == keys[17::2]


def test_a_dataset_knows_the_density_of_its_patches(patch_set, picture):
    _, mask = picture
    dataset = PatchDataset(patch_set, "val", plain_transform)
    assert dataset.foreground[3] == pytest.approx(mask[16:32, 16:32].mean(), abs=5e-5)


def test_manifest_is_written_after_the_table(tmp_path):
    with pytest.raises(ValueError, match="fields"):
        patches.write_manifest(tmp_path, {"format_version": 1}, [{"unknown": 1}])
    assert not (tmp_path / "patches.json").exists()


def test_manifest_survives_names_beyond_ascii(tmp_path):
    patches.write_manifest(
        tmp_path, {"format_version": patches.FORMAT_VERSION, "images": [{"name": "Nï"}]}, []
    )
    assert patches.read_manifest(tmp_path)["images"][0]["name"] == "Nï"
    assert json.loads((tmp_path / "patches.json").read_text(encoding="utf-8"))
