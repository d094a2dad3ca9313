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
    manifest = {"format_version": patches.FORMAT_VERSION, "patch_dim": 16, "images": []}
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


def test_manifest_is_written_after_the_table(tmp_path):
    with pytest.raises(ValueError, match="fields"):
        patches.write_manifest(tmp_path, {"format_version": 1}, [{"unknown": 1}])
    assert not (tmp_path / "patches.json").exists()


def test_manifest_survives_names_beyond_ascii(tmp_path):
    patches.write_manifest(tmp_path, {"format_version": 1, "images": [{"name": "Nï"}]}, [])
    assert patches.read_manifest(tmp_path)["images"][0]["name"] == "Nï"
    assert json.loads((tmp_path / "patches.json").read_text(encoding="utf-8"))
