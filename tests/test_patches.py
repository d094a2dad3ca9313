import csv
import os
from contextlib import suppress
from functools import partial

import cv2
import numpy as np
import pytest

from tissue import patches
from tissue.files import InputError
from tissue.manifest import read_manifest, read_table, size_on_disk, write_manifest
from tissue.patches import PatchDataset
from tissue.sampling import PatchSampler, balanced_order

FOLDERS = [f"patches_{kind}_{split}" for kind in ("rgb", "mask") for split in ("train", "val")]


@pytest.fixture
def picture(generator):
    """An image of 104 x 80 pixels: at dim 32 and stride 24 it holds 4 x 3 patches."""
    image = generator.integers(0, 256, (104, 80, 3), dtype=np.uint8)
    mask = generator.random((104, 80)) < 0.3
    return image, mask


@pytest.fixture
def empty(tmp_path):
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    return tmp_path


def source(name, split):
    """What a manifest says of an image, made by hand."""
    told = {"name": name, "split": split, "image": f"tissue_images/{name}.tif"}
    told |= {"mask": f"masks/{name}.png", "image_sha256": "0" * 64, "mask_sha256": "f" * 64}
    told |= {"labels": None, "labels_sha256": None}
    told |= {"height": 104, "width": 80, "pixel_size_um": None, "foreground": 0.3}
    return told | {"stain": None}


def finish(folder, table, images=(("tissue", "train"), ("other", "val")), labels=None):
    told = {"patch_dim": 32, "patch_stride": 24, "val_pattern": "other", "val_fraction": None}
    told |= {"group_pattern": None, "seed": None, "pixel_size_given_um": None, "bits": None}
    told |= {"pixel_size_um": None, "images": [source(*image) for image in images]}
    told["images"][0] |= {"labels": labels, "labels_sha256": labels and "0" * 64}
    return write_manifest(folder, told, table)


def write_set(folder, picture):
    """Write patches of two images below an empty set's `folder`."""
    table = patches.write_patches(folder, "train", "tissue", *picture, patches.Grid(32, 24))
    table += patches.write_patches(folder, "val", "other", *picture, patches.Grid(32, 32))
    finish(folder, table)


@pytest.fixture
def patch_set(empty, picture):
    write_set(empty, picture)
    return empty


@pytest.mark.parametrize("package", ["patchify", "numpy"])
@pytest.mark.parametrize(("dim", "stride"), [(32, 24), (32, 32), (80, 1), (33, 7), (1, 1)])
@pytest.mark.parametrize("part", [0, 1])
def test_patches_are_the_crops_of_a_plain_loop(picture, package, dim, stride, part, monkeypatch):
    if package == "patchify":
        pytest.importorskip("patchify", reason="it has no release for numpy 2")
    else:
        monkeypatch.setattr(patches, "patchify", None)
    pixels = picture[part]
    found = patches.cut(pixels, patches.Grid(dim, stride))
    tops, lefts = (range(0, side - dim + 1, stride) for side in pixels.shape[:2])
    crops = [[pixels[y : y + dim, x : x + dim] for x in lefts] for y in tops]
    assert found.dtype == pixels.dtype
    np.testing.assert_array_equal(found, np.array(crops))


def test_a_patch_file_is_the_same_bytes_with_patchify_and_without(tmp_path, picture, monkeypatch):
    pytest.importorskip("patchify", reason="it has no release for numpy 2")
    for place in ("with", "without"):
        for name in FOLDERS:
            (tmp_path / place / name).mkdir(parents=True)
        patches.write_patches(tmp_path / place, "train", "tissue", *picture, patches.Grid(32, 24))
        monkeypatch.setattr(patches, "patchify", None)
    files = [path.relative_to(tmp_path / "with") for path in tmp_path.glob("with/*/*.png")]
    assert len(files) == 2 * 4 * 3
    for file in files:
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()


def test_patches_are_where_the_table_says_bit_by_bit(patch_set, picture):
    image, mask = picture
    rows = patches.read_table(patch_set, "train")
    assert len(rows) == 4 * 3
    for row in rows:
        y, x = row["y"], row["x"]
        assert (y, x) == (24 * row["row"], 24 * row["col"])
        patch, patch_mask = patches.read_patch(patch_set, "train", row["file"])
        np.testing.assert_array_equal(patch, image[y : y + 32, x : x + 32])
        np.testing.assert_array_equal(patch_mask, mask[y : y + 32, x : x + 32] * 255)
        assert row["foreground"] == pytest.approx((patch_mask > 0).mean(), abs=5e-5)


def test_table_has_the_columns_of_the_contract(patch_set):
    with (patch_set / "patches.csv").open() as file:
        assert ",".join(next(csv.reader(file))) == "split,name,file,row,col,y,x,foreground"


def test_patch_names_do_not_collide_in_a_grid_of_more_than_ten(empty):
    image = np.zeros((140, 140, 3), np.uint8)
    table = patches.write_patches(
        empty, "train", "a", image, image[..., 0] > 0, patches.Grid(16, 4)
    )
    files = [row["file"] for row in table]
    assert len(set(files)) == len(files) == 32 * 32
    assert files[:2] == ["a_patch_00_00.png", "a_patch_00_01.png"]
    counts, sizes = size_on_disk(empty)
    assert counts == {"train": 32 * 32, "val": 0} and sizes["val"] == 0
    assert sizes["train"] == sum(path.stat().st_size for path in empty.glob("*/*.png"))


def test_a_patch_file_shows_true_colours_and_a_mask_0_and_255(empty):
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    patches.write_patches(empty, "val", "red", red, red[..., 0] > 0, patches.Grid(16, 16))
    blue, green, shown_red = cv2.imread(str(empty / "patches_rgb_val/red_patch_00_00.png"))[0, 0]
    assert (shown_red, green, blue) == (200, 0, 0)
    assert (cv2.imread(str(empty / "patches_mask_val/red_patch_00_00.png"), -1) == 255).all()


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


def test_a_missing_patch_is_named(patch_set):
    (patch_set / "patches_mask_train" / "tissue_patch_00_01.png").unlink()
    with pytest.raises(InputError, match=r"patches_mask_train.tissue_patch_00_01\.png"):
        patches.read_patch(patch_set, "train", "tissue_patch_00_01.png")


@pytest.mark.parametrize("content", [b"", b"\x89PNG", "half", "flipped", "not square", "jpeg"])
def test_a_damaged_patch_is_named_with_an_advice_that_helps(patch_set, picture, content):
    path = patch_set / "patches_rgb_train" / "tissue_patch_00_01.png"
    whole = path.read_bytes()
    wide, jpeg = (cv2.imencode(s, picture[0][:32, :w])[1] for s, w in ((".png", 40), (".jpg", 40)))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    made = {"half": whole[: len(whole) // 2], "flipped": flipped, "not square": wide, "jpeg": jpeg}
    path.write_bytes(bytes(made.get(content, content)))
    with pytest.raises(InputError, match=r"tissue_patch_00_01\.png: .*remove patches\.json"):
        patches.read_patch(patch_set, "train", "tissue_patch_00_01.png")


def test_a_patch_of_another_side_than_the_sets_is_named(patch_set, picture):
    for kind, pixels in (("rgb", picture[0]), ("mask", picture[1] * np.uint8(255))):
        path = patch_set / f"patches_{kind}_val" / "other_patch_00_01.png"
        path.write_bytes(cv2.imencode(".png", pixels[:40, :40])[1].tobytes())
    dataset = PatchDataset(patch_set, "val", plain_transform)
    with pytest.raises(InputError, match=r"other_patch_00_01\.png: found a side of 40 pixels"):
        dataset[1]


# --- one pixel size


@pytest.mark.parametrize("scale", [2, 4, 0.5, 1.5, 0.4])
def test_a_resampled_mask_lies_where_its_image_does(scale):
    y, x = np.mgrid[:120, :90]
    mask = (y - 50) ** 2 + (x - 40) ** 2 < 25**2
    image = np.repeat((mask * np.uint8(200))[..., None], 3, axis=2)
    pixels, resampled = patches.resample(image, mask, scale)
    assert resampled.shape == pixels.shape[:2] == (round(120 / scale), round(90 / scale))
    assert resampled.dtype == bool and pixels.dtype == np.uint8
    assert (resampled != (pixels[..., 0] > 100)).mean() < 0.01
    assert resampled.sum() * scale**2 == pytest.approx(mask.sum(), rel=0.03)


def test_a_pixel_of_a_reduced_mask_is_what_more_than_half_of_it_is():
    blocks = [[[1, 1], [1, 0]], [[1, 1], [0, 0]], [[0, 1], [0, 0]]]  # 3/4, a half, 1/4
    mask = np.concatenate(np.array(blocks, bool), axis=1)
    image = np.zeros((2, 6, 3), np.uint8)
    assert patches.resample(image, mask, 2)[1].tolist() == [[True, False, False]]


def test_an_image_wider_than_opencv_remaps_is_resampled():
    image = np.zeros((8, 40_000, 3), np.uint8)
    image[:, 20_000:] = 255
    pixels, mask = patches.resample(image, image[..., 0] > 0, 0.8)
    assert mask.shape == pixels.shape[:2] == (10, 50_000)
    assert (pixels[:, :24_990] == 0).all() and (pixels[:, 25_010:] == 255).all()


# --- several sets


def two_sets(tmp_path, picture, **second):
    for name, changes in (("one", {}), ("two", second)):
        for folder in FOLDERS:
            (tmp_path / name / folder).mkdir(parents=True)
        table = patches.write_patches(
            tmp_path / name, "train", "tissue", *picture, patches.Grid(32, 24)
        )
        table += patches.write_patches(
            tmp_path / name, "val", "other", *picture, patches.Grid(32, 32)
        )
        finish(tmp_path / name, table, **changes)
    return [tmp_path / "one", tmp_path / "two"]


def test_sets_are_learned_from_together(tmp_path, picture):
    roots = two_sets(tmp_path, picture)
    dataset = PatchDataset(roots, "train", plain_transform)
    assert len(dataset) == 24 and dataset.roots == [roots[0]] * 12 + [roots[1]] * 12
    (roots[1] / "patches_rgb_train" / dataset.files[13]).unlink()
    with pytest.raises(InputError, match=r"two.patches_rgb_train.tissue_patch_00_01\.png"):
        dataset[13]
    dataset[1]
    assert patches.set_hash(*roots) not in map(patches.set_hash, roots)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ({}, {"pixel_size_um": 0.5}, None),
        ({"pixel_size_um": 0.25}, {"pixel_size_um": 0.25}, None),
        ({"pixel_size_um": 0.25}, {"pixel_size_um": 0.5}, "0.5 um a pixel, expected 0.25 as in"),
        ({"bits": 12}, {"bits": 16}, "16-bit images of 16 bits, expected 12"),
        ({"patch_dim": 64}, {"patch_dim": 32}, "patches of 32 pixels a side, expected 64"),
    ],
)
def test_sets_that_do_not_go_together_are_refused(tmp_path, picture, first, second, text):
    roots = two_sets(tmp_path, picture)
    for root, changes in zip(roots, (first, second), strict=True):
        manifest = read_manifest(root) | changes
        left_out = ("format_version", "patches", "bytes", "table_sha256", "sha256")
        told = {key: value for key, value in manifest.items() if key not in left_out}
        write_manifest(root, told, read_table(root, "train") + read_table(root, "val"))
    if text is None:
        assert len(patches.read_manifests(roots)) == 2
    else:
        with pytest.raises(InputError, match=text):
            patches.read_manifests(roots)


# --- a set takes the place of another


def tree(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*.*")
        if path.is_file()
    }


def test_a_set_that_fails_leaves_the_old_one(patch_set, picture):
    before = tree(patch_set)
    with pytest.raises(OSError, match="full"), patches.new_set(patch_set) as new:
        patches.write_patches(new, "train", "tissue", *picture, patches.Grid(32, 32))
        raise OSError("the disk is full")
    assert tree(patch_set) == before
    assert not list(patch_set.glob(".patches*"))


def test_a_set_takes_the_place_of_the_old_one_and_leaves_other_files_alone(patch_set, picture):
    mine = [patch_set / "patches_rgb_train" / name for name in ("notes.txt", "my_patch_notes.png")]
    for path in mine:
        path.write_text("mine")
    (patch_set / "patches_mask_val" / "sub").mkdir()
    (patch_set / "patches_mask_val" / "sub" / "more.txt").write_text("mine, too")
    with patches.new_set(patch_set) as new:
        table = patches.write_patches(new, "train", "new", *picture, patches.Grid(32, 32))
        table += patches.write_patches(new, "val", "other", *picture, patches.Grid(32, 32))
        finish(new, table, (("new", "train"), ("other", "val")))
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    mine[1].unlink()
    assert (patch_set / "patches_mask_val" / "sub" / "more.txt").read_text() == "mine, too"
    for kind in ("rgb", "mask"):
        for split, name in (("train", "new"), ("val", "other")):
            files = {p.name for p in (patch_set / f"patches_{kind}_{split}").glob("*.png")}
            assert files == {row["file"] for row in patches.read_table(patch_set, split)}
            assert all(file.startswith(name) for file in files)
    assert not list(patch_set.glob(".patches*"))


class Killed(BaseException):
    """Nothing that runs after it may be relied on."""


def dying(monkeypatch, renames):
    """Let this process be Killed at the given rename, and nothing be removed; those that it did."""
    rename, done = os.rename, []

    def dies(*arguments, **how):
        if len(done) == renames:
            raise Killed
        done.append(arguments)
        return rename(*arguments, **how)

    monkeypatch.setattr(os, "rename", dies)
    monkeypatch.setattr(patches, "_remove", lambda place: None)
    return done


@pytest.mark.parametrize("renames", range(13))
def test_a_kill_between_two_moves_leaves_the_old_set_or_none_or_the_new_one(
    patch_set, picture, monkeypatch, renames
):
    """The process ends at the given rename: what would undo it does not run, either."""
    mine = patch_set / "patches_rgb_train" / "notes.txt"
    mine.write_text("mine")
    done = dying(monkeypatch, renames)
    other = 255 - picture[0], picture[1]
    ended = False
    try:
        with patches.new_set(patch_set) as new:
            write_set(new, other)
        ended = True
    except Killed:
        pass
    monkeypatch.undo()
    first = "tissue_patch_00_00.png"
    try:
        patches.read_manifest(patch_set)
    except (InputError, FileNotFoundError) as error:
        assert renames > 0 and "run preprocess.py" in str(error)
    else:
        seen, _ = patches.read_patch(patch_set, "train", first)
        whole = (picture if renames == 0 else other)[0]
        np.testing.assert_array_equal(seen, whole[:32, :32])
        assert ended or renames == 0 or len(done) >= 11
    with patches.new_set(patch_set) as new:  # and the next run mends it all
        write_set(new, picture)
    seen, _ = patches.read_patch(patch_set, "train", first)
    np.testing.assert_array_equal(seen, picture[0][:32, :32])
    assert mine.read_text() == "mine"
    assert not list(patch_set.glob(".patches*"))


@pytest.mark.parametrize("renames", range(14))
@pytest.mark.parametrize("is_first", [True, False])
def test_the_set_of_a_call_that_was_killed_often_is_told_from_files_of_the_user_s(
    patch_set, picture, tmp_path, monkeypatch, is_first, renames
):
    """Killed at the given rename, then at each removal of what that left, and then failing."""
    root = tmp_path / "first" if is_first else patch_set
    root.mkdir(exist_ok=True)
    if not is_first:
        (root / patches.ANNOTATIONS).write_bytes(b"of the set before")
    with monkeypatch.context() as killed, suppress(Killed):
        dying(killed, renames)
        with patches.new_set(root) as new:
            write_set(new, picture)
            (new / patches.PREVIEW).write_bytes(b"a picture")
    patches.check_places(root)
    remove = patches._remove
    for removals in range(12):
        left = iter([remove] * removals)
        with monkeypatch.context() as killed, suppress(Killed):
            killed.setattr(patches, "_remove", lambda place, left=left: next(left, dies)(place))
            with patches.new_set(root):
                raise Killed
        patches.check_places(root)
    with suppress(OSError), patches.new_set(root):
        raise OSError("the disk is full")
    patches.check_places(root)
    with patches.new_set(root) as new:
        write_set(new, picture)
    assert patches.read_manifest(root) and not list(root.glob(".patches*"))


def dies(place):
    raise Killed


def test_a_move_that_fails_is_undone(patch_set, picture, monkeypatch):
    before = tree(patch_set)
    rename, done = os.rename, []

    def fails(*arguments, **how):
        done.append(arguments)
        if len(done) == 8:
            raise PermissionError("not yours")
        return rename(*arguments, **how)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(PermissionError), patches.new_set(patch_set) as new:
        write_set(new, (255 - picture[0], picture[1]))
    assert tree(patch_set) == before


@pytest.mark.parametrize("name", [*FOLDERS, "patches.csv", "patches.json", "patches_preview.png"])
def test_what_lies_at_a_place_of_the_set_and_is_none_of_it_is_refused(tmp_path, name):
    patches.check_places(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=name):
        patches.check_places(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).touch() if name in FOLDERS else (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=name):
        patches.check_places(tmp_path)


# --- training reads it


def plain_transform(image, mask):
    torch = pytest.importorskip("torch")
    return {"image": torch.from_numpy(image).permute(2, 0, 1), "mask": torch.from_numpy(mask)}


def test_a_dataset_item_is_image_mask_and_index(patch_set, picture):
    image, mask = picture
    dataset = PatchDataset(patch_set, "val", plain_transform)
    assert len(dataset) == 3 * 2
    pixels, nuclei, index = dataset[3]
    assert index == 3
    assert nuclei.shape == (1, 32, 32) and str(nuclei.dtype) == "torch.float32"
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), image[32:64, 32:64])
    np.testing.assert_array_equal(nuclei[0], -1.0 * mask[32:64, 32:64])  # of unknown depth


def test_a_patch_of_a_labelled_image_has_the_depth_in_its_nuclei(empty, picture):
    marks = np.zeros((104, 80), np.uint8)
    marks[:10, :10], marks[20:30, :10], marks[40:50, :10] = 255, 51, 1  # the last in the mask alone
    table = patches.write_patches(empty, "train", "tissue", picture[0], marks, patches.Grid(32, 24))
    table += patches.write_patches(empty, "val", "other", *picture, patches.Grid(32, 32))
    finish(empty, table, labels="instance_labels/tissue.png")
    _, depth, _ = PatchDataset(empty, "train", plain_transform)[0]
    assert depth[0, ::4, 0].tolist() == pytest.approx([1, 1, 1, 0, 0, 0.2, 0.2, 0.2])
    _, depth, _ = PatchDataset(empty, "train", plain_transform)[3]  # from row 24 on
    assert depth[0, ::6, 0].tolist() == pytest.approx([0.2, 0, 0, -1, -1, 0])
    assert table[0]["foreground"] == f"{200 / 1024:.4f}"


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
    order = balanced_order(foreground, np.random.default_rng(0))
    assert len(order) == 300
    drawn = foreground[order]
    assert [(drawn == value).sum() for value in (SPARSE, MIDDLE, DENSE)] == [100, 100, 100]
    for start in range(0, 300, 30):  # and so has each part of it
        part = drawn[start : start + 30]
        assert all(8 <= (part == value).sum() <= 12 for value in (SPARSE, MIDDLE, DENSE))


def test_all_patches_of_a_stratum_come_before_any_comes_again():
    order = balanced_order(densities(30, 60, 210), np.random.default_rng(0))
    views = np.bincount(order, minlength=300)
    assert set(views[:30]) == {3, 4} and set(views[30:90]) == {1, 2} and set(views[90:]) == {0, 1}


def test_a_few_patches_do_not_fill_an_epoch():
    order = balanced_order(densities(2, 0, 98), np.random.default_rng(0))
    views = np.bincount(order, minlength=100)
    assert set(views[:2]) == {4} and set(views[2:]) == {0, 1}
    assert len(order) == 100


def test_a_set_of_one_density_is_drawn_as_ever():
    order = balanced_order(densities(0, 40, 0), np.random.default_rng(0))
    assert sorted(order) == list(range(40))


def test_a_set_of_sixteen_times_as_many_patches_counts_four_times_as_much():
    sets = np.repeat(["small", "large"], [20, 320])
    order = balanced_order([MIDDLE] * 340, np.random.default_rng(0), sets)
    assert len(order) == 340 and np.count_nonzero(order < 20) == 68
    for start in range(0, 340, 34):
        assert 3 <= np.count_nonzero(order[start : start + 34] < 20) <= 12
    order = balanced_order([MIDDLE] * 340, np.random.default_rng(0), sets[::-1])
    assert np.count_nonzero(order >= 320) == 68


def test_a_set_too_small_for_its_share_leaves_the_rest_to_the_others():
    sets = [0] * 2 + [1] * 338
    views = np.bincount(balanced_order([DENSE] * 340, np.random.default_rng(0), sets))
    assert set(views[:2]) == {4} and views.sum() == 340


def test_balanced_order_and_seeds_follow_from_seed_and_epoch():
    def keys(seed, epoch):
        sampler = PatchSampler(50, 8, seed, order=partial(balanced_order, densities(10, 10, 30)))
        sampler.epoch = epoch
        return list(sampler)

    assert len(keys(0, 1)) == 48
    assert keys(0, 1) == keys(0, 1)
    assert keys(0, 1) != keys(0, 2)
    assert keys(0, 1) != keys(1, 1)
    again = [key for key in keys(0, 1) if key[0] < 10]
    assert len(set(again)) == len(again) > 10  # a patch that comes again is augmented anew


def test_a_balanced_epoch_is_shared_and_gone_on_with_like_any_other():
    order = partial(balanced_order, densities(10, 10, 30))
    whole = PatchSampler(50, 8, seed=0, order=order)
    shares = [PatchSampler(50, 8, 0, rank, 2, order) for rank in range(2)]
    keys = list(whole)
    for sampler in shares:
        sampler.start = 2
    parts = [list(share) for share in shares]
    assert [len(share) for share in shares] == [len(part) for part in parts] == [16, 16]
    assert parts[0] == keys[16::2] and parts[1] == keys[17::2]


def test_a_dataset_knows_the_density_of_its_patches(patch_set, picture):
    _, mask = picture
    dataset = PatchDataset(patch_set, "val", plain_transform)
    assert dataset.foreground[3] == pytest.approx(mask[32:64, 32:64].mean(), abs=5e-5)


def test_manifest_is_written_after_the_table(empty):
    with pytest.raises(ValueError, match="fields"):
        finish(empty, [{"unknown": 1}])
    assert not (empty / "patches.json").exists()


def test_manifest_survives_names_beyond_ascii(empty, picture):
    table = patches.write_patches(empty, "train", "Nï", *picture, patches.Grid(32, 24))
    table += patches.write_patches(empty, "val", "other", *picture, patches.Grid(32, 32))
    told = finish(empty, table, (("Nï", "train"), ("other", "val")))
    assert patches.read_manifest(empty) == told
    assert patches.read_manifest(empty)["images"][0]["name"] == "Nï"
    assert {row["name"] for row in patches.read_table(empty, "train")} == {"Nï"}
