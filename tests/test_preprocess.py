"""preprocess.py: what it refuses, says, chooses, and leaves behind; and what its tables may say."""

import copy
import csv
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import tifffile

import preprocess
from tests import slide_files
from tests.scripts import REPOSITORY, SMALL, cut, fingerprint
from tests.test_scanners import needs_openslide
from tissue import inputs, patches, splits
from tissue.files import InputError, locked
from tissue.images import read_image
from tissue.manifest import read_manifest, read_table, size_on_disk, write_manifest
from tissue.masks import read_mask
from tissue.pictures import write_image
from tissue.stain import TARGET
from tissue.synthetic import draw_tissue

# --- as the tests call it


def run(root, *flags):
    """As a user calls it: small patches, and no word on which images are for validation."""
    small = ["--patch_dim", 32, "--patch_stride", 16, "--workers", 2]
    preprocess.main(preprocess.parse_args(list(map(str, ["--root", root, *small, *flags]))))


def refused(root, *flags):
    before = fingerprint(root)
    with pytest.raises(InputError) as error:
        run(root, *flags)
    assert fingerprint(root) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def put(root, name, size=96, um=None, side=None, seed=0):
    """Put a drawn image of `size` pixels, that says `um`, and its mask into a root folder; with a
    `side` drawn at that and resampled.
    """
    for folder in ("tissue_images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    tissue = draw_tissue(side or size, side or size, seed)
    image, mask = tissue.image, (tissue.labels > 0).astype(np.uint8) * 255
    if side:
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
        mask = cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA) // 128 * 255
    tags = {"resolution": (1e4 / um, 1e4 / um), "resolutionunit": "CENTIMETER"} if um else {}
    tifffile.imwrite(root / "tissue_images" / f"{name}.tif", image, photometric="rgb", **tags)
    write_image(root / "masks" / f"{name}.png", mask > 0)


# --- flags


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--patch_dim", 8], "--patch_dim: found 8, expected 32 or more"),
        (["--patch_dim", "9" * 400], "--patch_dim: found 9+, |smaller patches"),
        (["--patch_stride", -1], "--patch_stride: found -1"),
        (["--workers", -3], "--workers: found -3, expected 1 or more"),
        (["--workers", 10**9], "--workers: found 1000000000"),
        (["--pixel_size", "nan"], "--pixel_size: found nan"),
        (["--pixel_size", "inf"], "--pixel_size: found inf"),
        (["--pixel_size", 0], "--pixel_size: found 0"),
        (["--pixel_size", -0.25], "--pixel_size: found -0.25"),
        (["--pixel_size", 250], "--pixel_size: found 250"),
        (["--val_fraction", "nan"], "--val_fraction: found nan"),
        (["--val_fraction", 0], "--val_fraction: found 0.0, expected more than 0"),
        (["--val_fraction", 1], "--val_fraction: found 1"),
        (["--seed", -1], "--seed: found -1"),
        (["--val_fraction", 0.5, "--val_pattern", "*1"], "--val_fraction: found it with"),
        (["--val_pattern", "*9"], "no validation image .*--val_fraction"),
        (["--val_pattern", "*"], "no training image .*--val_fraction"),
        (["--val_pattern", "*\udcff"], "--val_pattern: found text that is no UTF-8"),
        (["--group_pattern", "("], "--group_pattern: found '\\(', expected a regular expression"),
        (["--group_pattern", "Drawn"], "--group_pattern: found one group \\(Drawn\\)"),
        (["--group_pattern", "_0[12]"], "--group_pattern: found nothing .*Drawn_03, Drawn_04"),
        (["--group_pattern", "x*"], "--group_pattern: found nothing"),
    ],
)
def test_a_flag_that_cannot_be_is_named_and_nothing_is_written(root, flags, text):
    with pytest.raises(InputError, match=text):
        run(root, *flags)
    assert not list(root.glob("patches*")) and not list(root.glob(".*"))


def test_images_that_are_turned_are_named_in_a_line(tmp_path, capsys):
    for seed, name in enumerate(("a_01", "a_03")):
        put(tmp_path, name, seed=seed)
    turned = tmp_path / "tissue_images" / "a_01.tif"
    image = np.fliplr(read_image(turned))  # is shown as the mask was drawn
    tifffile.imwrite(turned, image, photometric="rgb", extratags=[(274, "H", 1, 2, True)])
    run(tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "turned or" in line]
    assert line.startswith("a_01.tif: turned or mirrored as the orientation in the file says")


def test_one_image_is_told_what_is_missing(tmp_path):
    put(tmp_path, "only")
    for flags in ([], ["--val_pattern", "only.tif"], ["--val_fraction", 0.5]):
        assert "expected at least two images, one to train on and one to validate" in refused(
            tmp_path, *flags
        )


# --- which images are for validation


def split_of(root):
    return {image["name"]: image["split"] for image in read_manifest(root)["images"]}


def test_the_default_pattern_stays_where_it_matches(root, capsys):
    run(root)
    assert [name for name, split in split_of(root).items() if split == "val"] == ["Drawn_03"]
    assert "1 of 4 images are for validation (*03.tif): Drawn_03\n" in capsys.readouterr().out
    assert read_manifest(root)["val_pattern"] == "*03.tif"


@pytest.mark.parametrize("flags", [[], ["--val_pattern", "*02"]])
def test_a_seed_is_said_to_draw_nothing_where_a_pattern_chooses(root, capsys, flags):
    run(root, "--seed", 0, *flags)
    pattern = flags[-1] if flags else "*03.tif"
    assert f"--seed 0: nothing is drawn where {pattern} chooses\n" in capsys.readouterr().out
    run(root, *flags)
    assert "drawn" not in capsys.readouterr().out
    run(root, "--seed", 0, "--val_fraction", 0.5)
    assert "nothing is drawn" not in capsys.readouterr().out


def test_images_that_begin_alike_are_told_to_be_kept_together(tmp_path, capsys):
    """The third image of each patient is for validation, and the others are learned."""
    for seed, name in enumerate(("p1_01", "p1_03", "P2-03", "p2-04", "x03", "slide_9")):
        put(tmp_path, name, seed=seed)
    run(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "for validation" in line]
    assert lines == [
        "3 of 6 images are for validation (*03.tif): P2-03, p1_03, x03; if images of one start "
        "(p1, p2) are of one patient, --group_pattern keeps them together"
    ]
    run(tmp_path, "--val_pattern", "p1_*")  # the user's own choice
    assert "for validation" not in capsys.readouterr().out


def test_one_of_many_running_numbers_is_too_little_for_validation(tmp_path, capsys):
    for number in range(1, 12):
        put(tmp_path, f"img_{number:02d}", seed=number)
    run(tmp_path)
    assert "*03.tif matches 1 of the 11 images: --val_fraction 0.2 is" in capsys.readouterr().out
    assert list(split_of(tmp_path).values()).count("val") == 3
    run(tmp_path, "--val_pattern", "*03.tif")  # the user's own choice
    assert [name for name, split in split_of(tmp_path).items() if split == "val"] == ["img_03"]


def test_where_no_name_fits_the_default_a_fraction_is_drawn_and_said(root, capsys):
    for folder in ("tissue_images", "mask binary"):
        (path,) = (root / folder).glob("Drawn_03.*")
        path.rename(path.with_stem("Drawn_05"))
    run(root)
    said = capsys.readouterr().out
    (name,) = (name for name, split in split_of(root).items() if split == "val")
    assert "*03.tif matches none of the 4 images: --val_fraction 0.2 is taken instead" in said
    assert f"1 of 4 images are for validation (--seed 0): {name}\n" in said
    manifest = read_manifest(root)
    assert (manifest["val_pattern"], manifest["val_fraction"], manifest["seed"]) == (None, 0.2, 0)
    run(root)
    assert "nothing to do" in capsys.readouterr().out
    run(root, "--seed", 1)
    assert "nothing to do" not in capsys.readouterr().out


NAMES = [f"P{patient}_slide{slide}" for patient in range(6) for slide in range(4)]


def groups_of(fraction, pattern, seed):
    return splits.by_groups(NAMES, fraction, pattern, seed)


@pytest.mark.parametrize(("fraction", "count"), [(0.2, 8), (0.1, 4), (0.5, 12), (0.99, 20)])
@pytest.mark.parametrize("pattern", [r"^P\d", r"^(P\d)_slide(\d)"])
def test_groups_stay_together_and_hold_the_fraction(fraction, count, pattern):
    split, groups = groups_of(fraction, pattern, seed=3)
    assert list(split) == NAMES
    assert sum(part == "val" for part in split.values()) == count  # of 24, in whole patients
    assert groups == sorted({name[:2] for name, part in split.items() if part == "val"})
    assert all((name[:2] in groups) == (part == "val") for name, part in split.items())


def test_one_group_at_least_is_drawn_and_case_makes_no_other_group():
    assert list(groups_of(1e-12, None, 0)[0].values()).count("val") == 1
    names = ["P1_a", "p1_b", "P2_a", "p2_B", "caf\u00e9_1", "CAFE\u0301_2"]
    for seed in range(10):
        split, groups = splits.by_groups(names, 0.3, "^[^_]+", seed)
        assert len(groups) == 1 and split[names[0]] == split[names[1]]
        assert split[names[2]] == split[names[3]] and split[names[4]] == split[names[5]]


@pytest.mark.parametrize(
    ("sizes", "count"), [((2, 2, 16), 4), ((3, 4, 43), 7), ((1, 1, 98), 2), ((30, *[1] * 9), 8)]
)
def test_a_group_of_most_images_is_not_drawn_for_a_fifth(sizes, count):
    names = [f"P{group}_{k}" for group, size in enumerate(sizes) for k in range(size)]
    for seed in range(8):
        split, _ = splits.by_groups(names, 0.2, "^P.", seed)
        assert list(split.values()).count("val") == count


def test_groups_of_about_one_size_are_drawn_as_ever():
    """The patients of TNBC, as the experiments have drawn them."""
    sizes = {1: 7, 2: 3, 4: 8, 5: 4, 7: 3, 8: 4, 10: 4}
    names = [f"patient_{p:02}_{k}" for p, size in sizes.items() for k in range(size)]
    assert splits.by_groups(names, 0.2, "^patient_[0-9]+", 0)[1] == ["patient_04", "patient_07"]


def test_a_draw_far_from_its_fraction_is_said(tmp_path, capsys):
    for seed, name in enumerate(("a_1", "a_2", "a_3", "b_1", "b_2", "b_3")):
        put(tmp_path, name, seed=seed)
    said = "that is 50% of the images in place of {}: groups stay whole; --seed draws others"
    run(tmp_path, "--val_fraction", 0.2, "--group_pattern", "^[^_]+")
    assert said.format("20%") in capsys.readouterr().out
    run(tmp_path, "--val_fraction", 0.45, "--group_pattern", "^[^_]+")
    assert "in place of" not in capsys.readouterr().out


def test_groups_are_drawn_by_seed_and_by_nothing_else():
    drawn = [groups_of(0.4, "^P.", seed)[1] for seed in range(20)]
    assert drawn == [groups_of(0.4, "^P.", seed)[1] for seed in range(20)]
    assert len(set(map(tuple, drawn))) > 5
    assert set().union(*drawn) == {name[:2] for name in NAMES}


def test_without_a_group_each_name_is_its_own():
    split, names = splits.by_groups(NAMES, 0.2, None, 0)
    assert len(names) == 5  # 4.8 of 24
    assert names == sorted(name for name, part in split.items() if part == "val")


def test_a_few_are_spread_over_all():
    assert splits.spread(list("abcdefghij"), 4) == ["a", "c", "f", "h"]  # 0, 2.5, 5, 7.5
    assert splits.spread(list("abc"), 3) == splits.spread(list("abc"), 7) == ["a", "b", "c"]
    assert splits.spread([], 3) == splits.spread(["a"], 0) == []


def test_patients_are_kept_apart_end_to_end(tmp_path, capsys):
    for seed, name in enumerate(("a_1", "a_2", "b_1", "b_2", "c_1")):
        put(tmp_path, name, seed=seed)
    run(tmp_path, "--val_fraction", 0.4, "--group_pattern", "^[^_]+", "--seed", 2)
    held_out = {name[0] for name, split in split_of(tmp_path).items() if split == "val"}
    learned = {name[0] for name, split in split_of(tmp_path).items() if split == "train"}
    assert held_out and learned and not held_out & learned
    said = capsys.readouterr().out
    assert f"for validation (--seed 2): {', '.join(sorted(held_out))}\n" in said
    manifest = read_manifest(tmp_path)
    assert (manifest["group_pattern"], manifest["seed"]) == ("^[^_]+", 2)


@pytest.mark.parametrize("flags", [["--val_fraction", 0.4], ["--val_pattern", "P1*"]])
def test_groups_of_one_image_each_are_told(tmp_path, capsys, flags):
    for seed, name in enumerate(("P0-1", "P0-2", "P1-1", "P1-2")):
        put(tmp_path, name, seed=seed)
    run(tmp_path, *flags, "--group_pattern", "^[^_]+")
    line = "--group_pattern '^[^_]+': each of the 4 images is a group of its own\n"
    assert line in capsys.readouterr().out
    run(tmp_path, *flags, "--group_pattern", "^[^-]+")
    assert "of its own" not in capsys.readouterr().out


# --- slides of scanners


@needs_openslide
def test_slides_of_scanners_are_cut_as_their_pixels_are(tmp_path):
    for root in ("scans", "same"):
        for folder in ("tissue_images", "masks"):
            (tmp_path / root / folder).mkdir(parents=True)
    writers = {"a.scn": slide_files.leica, "b.ndpi": slide_files.hamamatsu_ndpi}
    for seed, (name, write) in enumerate(writers.items()):
        tissue = draw_tissue(128, 192, seed)
        half = cv2.resize(tissue.image, (96, 64), interpolation=cv2.INTER_AREA)
        path = tmp_path / "scans" / "tissue_images" / name
        (pixels, *_) = write(path, [tissue.image, half])
        write_image(tmp_path / "same" / "tissue_images" / f"{path.stem}.png", pixels)
        for root in ("scans", "same"):
            write_image(tmp_path / root / "masks" / f"{path.stem}.png", tissue.labels > 0)
    run(tmp_path / "scans", "--val_pattern", "b")
    run(tmp_path / "same", "--val_pattern", "b", "--pixel_size", 0.5)
    sets = [{**fingerprint(tmp_path / root)} for root in ("scans", "same")]
    patch = "patches_*_*/*.png"
    one, two = ({p.name: c[0] for p, c in files.items() if p.match(patch)} for files in sets)
    assert one == two and len(one) > 10
    assert read_manifest(tmp_path / "scans")["pixel_size_um"] == pytest.approx(0.5)


# --- one pixel size


def test_images_of_another_pixel_size_are_resampled_and_said(tmp_path, capsys):
    for number, um in ((1, 0.25), (2, 0.25), (4, 0.26)):
        put(tmp_path, f"a_{number:02}", um=um, seed=number)
    for number in (1, 3):
        put(tmp_path, f"c_{number:02}", size=48, side=96, um=0.5, seed=10 + number)
    put(tmp_path, "d_01", size=192, um=0.125, seed=20)
    put(tmp_path, "e_01", seed=21)
    run(tmp_path)
    said = capsys.readouterr().out
    assert "c_01, c_03: 0.5 um a pixel, enlarged 2 times to 0.25 um\n" in said
    assert "d_01: 0.125 um a pixel, reduced 2 times to 0.25 um\n" in said
    assert "No pixel size in e_01: taken as 0.25 um" in said
    manifest = read_manifest(tmp_path)
    assert manifest["pixel_size_um"] == pytest.approx(0.25)
    own = {image["name"]: image["pixel_size_um"] for image in manifest["images"]}
    assert own["c_03"] == pytest.approx(0.5) and own["e_01"] is None
    assert own["a_04"] == pytest.approx(0.26)
    rows = read_table(tmp_path, "train") + read_table(tmp_path, "val")
    per_image = {name: [row for row in rows if row["name"] == name] for name in own}
    assert {name: len(there) for name, there in per_image.items()} == dict.fromkeys(own, 25)
    assert max(row["y"] for row in per_image["c_01"]) == 64  # pixels of the resampled image
    drawn = draw_tissue(96, 96, 11)
    for row in per_image["c_01"]:
        y, x = row["y"], row["x"]
        patch, mask = patches.read_patch(tmp_path, "train", row["file"])
        truth = drawn.image[y : y + 32, x : x + 32].astype(float)
        assert np.abs(patch - truth).mean() < 15
        nuclei = drawn.labels[y : y + 32, x : x + 32] > 0
        assert ((mask > 0) == nuclei).mean() > 0.9
    untouched = read_image(tmp_path / "tissue_images" / "a_04.tif")
    first, _ = patches.read_patch(tmp_path, "train", per_image["a_04"][0]["file"])
    np.testing.assert_array_equal(first, untouched[:32, :32])


def test_the_pixel_size_is_that_of_the_training_images(tmp_path):
    for number, um in ((1, 0.5), (2, 0.25), (3, 0.25), (4, 0.5)):
        put(tmp_path, f"a_{number:02}", um=um, seed=number)
    run(tmp_path, "--val_pattern", "*0[23]")
    assert read_manifest(tmp_path)["pixel_size_um"] == pytest.approx(0.5)
    run(tmp_path, "--val_pattern", "*0[13]")  # 0.25 and 0.5: one of them, not their mean
    assert read_manifest(tmp_path)["pixel_size_um"] == pytest.approx(0.25)


def test_a_pixel_size_that_is_given_is_that_of_all_images(tmp_path, capsys):
    for number, um in ((1, 0.25), (2, None), (3, 0.5)):
        put(tmp_path, f"a_{number:02}", um=um, seed=number)
    run(tmp_path, "--pixel_size", 0.4)
    said = "a_01.tif says 0.25 um a pixel, 0.4 is taken (2 of 3 images say otherwise)"
    assert [line for line in capsys.readouterr().out.splitlines() if "um" in line] == [said]
    manifest = read_manifest(tmp_path)
    sizes = [image["pixel_size_um"] for image in manifest["images"]]
    assert [manifest["pixel_size_um"], *sizes] == [0.4] * 4
    assert manifest["patches"] == {"train": 50, "val": 25}
    run(tmp_path)
    assert "nothing to do" not in capsys.readouterr().out


def test_a_table_gives_pixel_sizes_of_some_images_and_is_minded(tmp_path, capsys):
    for number, um in ((1, 0.25), (2, None), (3, 2.5)):
        put(tmp_path, f"a_{number:02}", um=um, seed=number)
    table = tmp_path / "sizes.csv"
    table.write_text("image,pixel_size_um\na_02.tif,0.25\na_03,0.5\n")
    run(tmp_path, "--pixel_sizes", table)
    out = capsys.readouterr().out
    assert f"{table}: the pixel size of 2 of 3 images, 0.25 to 0.5 um\n" in out
    assert "a_03: 0.5 um a pixel, enlarged 2 times to 0.25 um\n" in out
    assert "a_03.tif says 2.5 um a pixel, 0.5 is taken\n" in out
    sizes = [image["pixel_size_um"] for image in read_manifest(tmp_path)["images"]]
    assert sizes == pytest.approx([0.25, 0.25, 0.5])
    run(tmp_path, "--pixel_sizes", table)
    assert "nothing to do" in capsys.readouterr().out
    table.write_text("image,pixel_size_um\na_02.tif,0.25\na_03,0.25\n")
    run(tmp_path, "--pixel_sizes", table)
    assert "nothing to do" not in capsys.readouterr().out
    table.write_text("image,pixel_size_um\na_04.tif,0.25\n")
    assert "sizes.csv, line 2: found 'a_04.tif'" in refused(tmp_path, "--pixel_sizes", table)


def test_without_any_pixel_size_a_line_says_so(root, capsys):
    for number in (1, 2, 3, 4):
        (root / "tissue_images" / f"Drawn_{number:02}.tif").unlink()
        tissue = draw_tissue(96, 80, seed=number)
        write_image(root / "tissue_images" / f"Drawn_{number:02}.png", tissue.image)
    cut(root)
    assert read_manifest(root)["pixel_size_um"] is None
    assert "No pixel size to go by" in capsys.readouterr().out


def test_an_absurd_pixel_size_is_refused_with_the_flag_that_mends_it(tmp_path):
    for number, um in ((1, 0.25), (2, 0.25), (3, 10.58)):
        put(tmp_path, f"a_{number:02}", um=um, seed=number)
    assert "a_03.tif: found a pixel size of 10.58 um" in refused(tmp_path)
    assert "--pixel_size" in refused(tmp_path)
    run(tmp_path, "--pixel_size", 0.25)


def test_smaller_than_a_patch_counts_resampled_pixels(tmp_path):
    put(tmp_path, "a_01", um=0.25)
    put(tmp_path, "a_02", um=0.25, seed=3)
    put(tmp_path, "a_03", um=0.25, seed=1)
    put(tmp_path, "b_01", size=40, um=0.1, seed=2)  # 16 pixels of 0.25 um
    assert "16 x 16 at the pixel size of the set, expected at least 32 x 32" in refused(tmp_path)
    put(tmp_path, "b_01", size=20, um=0.5, seed=2)  # 40 pixels of 0.25 um
    run(tmp_path)
    assert {row["name"] for row in read_table(tmp_path, "train")} == {"a_01", "a_02", "b_01"}


def test_16_bit_images_of_a_set_are_of_one_brightness(tmp_path):
    for number, largest in ((1, 4000), (2, 900), (3, 60_000)):  # of 12, 10 and 16 bits
        put(tmp_path, f"a_{number:02}", seed=number)
        path = tmp_path / "tissue_images" / f"a_{number:02}.tif"
        pixels = (read_image(path) / 255 * largest).astype(np.uint16)
        pixels[0, 0] = 1000
        tifffile.imwrite(path, pixels, photometric="rgb")
    run(tmp_path)
    assert read_manifest(tmp_path)["bits"] == 16
    for split in ("train", "val"):
        for row in read_table(tmp_path, split):
            if row["y"] == row["x"] == 0:
                patch, _ = patches.read_patch(tmp_path, split, row["file"])
                assert patch[0, 0].tolist() == [1000 >> 8] * 3


def test_a_scale_bar_of_one_16_bit_image_does_not_darken_the_set(tmp_path, capsys):
    for number in (1, 3):
        put(tmp_path, f"a_{number:02}", seed=number)
        path = tmp_path / "tissue_images" / f"a_{number:02}.tif"
        pixels = read_image(path).astype(np.uint16) << (4 if number == 1 else 2)
        pixels[90, :60] = 65535 if number == 1 else 1023
        tifffile.imwrite(path, pixels, photometric="rgb")
    run(tmp_path)
    assert read_manifest(tmp_path)["bits"] == 12
    lines = capsys.readouterr().out.splitlines()
    assert "a_01: 12 bits hold 99 % of it; what is brighter, as a scale bar, is white" in lines
    assert any(line.startswith("a_03 (10 bits): fewer bits are in use than 12") for line in lines)


# --- files of all kinds


def test_what_is_passed_over_is_said(root, capsys):
    for name in ("tissue_images/a.nd2", "mask binary/Thumbs.db", "tissue_images/.DS_Store"):
        (root / name).touch()
    (root / "instance_labels").mkdir()
    write_image(root / "instance_labels" / "Drawn_01_labels.png", np.zeros((96, 80), bool))
    for _ in range(2):  # and again where nothing is to do
        cut(root)
        lines = capsys.readouterr().out.splitlines()
        assert sum("1 file in" in line and "a.nd2" in line for line in lines) == 1
        assert sum("1 file in" in line and "Thumbs.db" in line for line in lines) == 1
        assert sum("Drawn_01_labels.png" in line for line in lines) == 1
        assert not any("DS_Store" in line for line in lines)


def test_folders_of_nearly_the_names_that_are_read_are_said(root, capsys):
    near = dict.fromkeys(["Annotations", "annotation", "anotations"], "annotations")
    names = ["Instance_Labels", "instance labels", "labels"]
    near |= dict.fromkeys(names, "instance_labels")
    near |= {"Mask Binary": "mask binary", "mask": "masks", "tissue images": "tissue_images"}
    for name in (*near, "patches_of_mine", "images", "results", "qupath"):
        (root / name).mkdir()
    (root / "label").touch()
    cut(root)
    lines = [line for line in capsys.readouterr().out.splitlines() if "is not read" in line]
    read = [path for path in map(root.joinpath, near.values()) if path.exists()]
    others = [n for n in sorted(near) if not any((root / n).samefile(path) for path in read)]
    assert lines == [f"{root / n} is not read: expected {near[n]!r} as its name" for n in others]


def test_a_folder_of_images_in_another_case_is_said_before_it_is_missed(tmp_path, capsys):
    put(tmp_path, "a")
    (tmp_path / "tissue_images").rename(tmp_path / "Tissue_Images")
    if (tmp_path / "tissue_images").exists():
        pytest.skip("this file system takes both for one")
    assert "tissue_images: no such folder" in refused(tmp_path)
    assert "Tissue_Images is not read: expected 'tissue_images'" in capsys.readouterr().out


def test_a_broken_link_is_an_error(root):
    (root / "tissue_images" / "Drawn_05.tif").symlink_to("/not/mounted/Drawn_05.tif")
    assert "Drawn_05.tif: found a link" in refused(root)


def test_links_that_the_user_made_go_on_working(root, tmp_path):
    (tmp_path / "store").mkdir()
    image = root / "tissue_images" / "Drawn_01.tif"
    image.rename(tmp_path / "store" / "far.tif")
    image.symlink_to(tmp_path / "store" / "far.tif")
    (root / "mask binary").rename(tmp_path / "store" / "masks")
    (root / "mask binary").symlink_to(tmp_path / "store" / "masks", target_is_directory=True)
    link = tmp_path / "link"
    link.symlink_to(root, target_is_directory=True)
    cut(link)
    assert len(patches.PatchDataset(link, "train", None)) == 60
    (pair,) = found_by_inference(link)
    assert pair.image.is_file() and pair.mask.is_file()


def found_by_inference(root):
    return inputs.find_images(None, None, [str(root)]).pairs


def test_odd_letters_in_names_are_kept(root):
    odd = "o'd <d> & #1 [x] 100% {b},;=$~ \u00e9\u4e16 \U0001f52c"
    for folder, suffix in (("tissue_images", ".tif"), ("mask binary", ".png")):
        (root / folder / f"Drawn_01{suffix}").rename(root / folder / f"{odd}{suffix}")
    cut(root)
    (row, *_) = (row for row in read_table(root, "train") if row["name"] == odd)
    patch, mask = patches.read_patch(root, "train", row["file"])
    image = read_image(root / "tissue_images" / f"{odd}.tif")
    np.testing.assert_array_equal(patch, image[:32, :32])
    np.testing.assert_array_equal(mask, read_mask(root / "mask binary" / f"{odd}.png")[:32, :32])


@pytest.mark.parametrize("name", [b"x" * 240, b"no_utf8_\xff", b"two\nlines"])
def test_a_name_that_cannot_be_is_one_line_and_the_old_set_stays(root, name):
    cut(root)
    shown = fingerprint(root)
    for folder in ("tissue_images", "mask binary"):
        for path in (root / folder).glob("Drawn_01.*"):
            target = str(path.parent).encode() + b"/" + name + path.suffix.encode()
            try:
                shutil.copy(path, target)
            except OSError:
                pytest.skip("this file system has no such names")
    command = [sys.executable, "preprocess.py", "--root", str(root), *SMALL]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert b"rename the file" in done.stderr
    after = fingerprint(root)
    assert {path: after[path] for path in shown} == shown
    assert read_manifest(root)


# --- the set is put in the place of the old one


def test_what_cannot_be_replaced_is_found_before_anything_is_written(root):
    cut(root)
    (root / "patches_preview.png").unlink()
    (root / "patches_preview.png").mkdir()
    before = fingerprint(root)
    with pytest.raises(InputError, match=r"patches_preview\.png: found a link or another kind"):
        cut(root, "--patch_stride", "32")
    assert fingerprint(root) == before


@pytest.mark.parametrize("name", ["patches.csv", "patches_preview.png", "annotations_preview.png"])
def test_files_of_the_user_s_where_a_first_set_would_lie_are_not_touched(root, name):
    (root / name).write_bytes(b"my own")
    before = fingerprint(root)
    with pytest.raises(InputError, match=f"{name}: found it without a patch set, expected nothing"):
        cut(root)
    assert fingerprint(root) == before
    (root / name).unlink()
    cut(root)
    (root / "patches.json").unlink()  # to have the set cut anew
    cut(root)
    assert read_manifest(root)


def test_a_full_disk_leaves_the_old_set(root, monkeypatch):
    cut(root)
    before = {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
    write, written = patches.write_patches, []

    def fails(*arguments):
        written.append(write(*arguments))
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return written[-1]

    monkeypatch.setattr(patches, "write_patches", fails)
    with pytest.raises(OSError, match="No space"):
        cut(root, "--patch_stride", "32")
    after = {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert not list(root.glob(".patches*"))


def test_a_killed_run_leaves_the_old_set_and_the_next_cleans_up(root):
    cut(root)
    old = read_manifest(root)
    command = [sys.executable, "preprocess.py", "--root", root, *SMALL, "--patch_stride", "1"]
    process = subprocess.Popen(list(map(str, command)), cwd=REPOSITORY)
    while not list(root.glob(".patches_new/*/*.png")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_manifest(root) == old
    assert size_on_disk(root) == (old["patches"], old["bytes"])
    assert list(root.glob(".patches_new"))
    cut(root, "--patch_stride", "32")
    assert not list(root.glob(".patches*"))
    assert read_manifest(root)["patch_stride"] == 32


def test_two_cannot_cut_at_once(root):
    with locked(root, "is a test"):
        with pytest.raises(InputError, match="which is a test, writing here"):
            cut(root)
        assert not list(root.glob("patches*"))
    cut(root)
    with locked(root, "is a test"):
        cut(root)  # nothing to do: nothing is written


@pytest.mark.parametrize(
    "damage", ["emptied", "shortened", "mask deleted", "table", "half", "seal"]
)
def test_a_damaged_set_is_no_set_that_is_up_to_date(root, damage, capsys):
    cut(root)
    path = root / "patches_rgb_train" / "Drawn_01_patch_01_01.png"
    whole = path.read_bytes()
    if damage == "emptied":
        path.write_bytes(b"")
    elif damage == "shortened":
        path.write_bytes(whole[:-1])
    elif damage == "mask deleted":
        (root / "patches_mask_train" / path.name).unlink()
    elif damage == "seal":
        text = (root / "patches.json").read_text().replace('"patch_dim": 32', '"patch_dim": 33')
        (root / "patches.json").write_text(text)
    else:
        table = root / "patches.csv"
        lines = table.read_text().splitlines(keepends=True)
        half = lines[: len(lines) // 2] if damage == "half" else [*lines[:-1], lines[-2]]
        table.write_text("".join(half))
        with pytest.raises(InputError, match=r"patches\.csv: found .*run preprocess\.py"):
            read_table(root, "train")
    capsys.readouterr()
    cut(root)
    assert "nothing to do" not in capsys.readouterr().out
    assert path.read_bytes() == whole and len(read_table(root, "train")) == 60
    cut(root)
    assert "nothing to do" in capsys.readouterr().out


# --- what patches.json and patches.csv may say


@pytest.fixture
def sealed(root):
    """A set whose tables can be changed by someone who knows how to seal them."""
    cut(root)

    def change(edit=None, table=None):
        manifest = read_manifest(root)
        rows = read_table(root, "train") + read_table(root, "val")
        if edit:
            edit(manifest)
        if table:
            table(rows)
        write_manifest(root, manifest, rows)

    return root, change


def readings(root):
    """What train.py and inference.py have of a set before they do anything."""
    manifest = read_manifest(root)
    datasets = [patches.PatchDataset(root, split, None, TARGET) for split in ("train", "val")]
    told = [(d.dim, d.files, d.sources, d.foreground) for d in datasets]
    return manifest, told, found_by_inference(root)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../evil"), ("name", "/evil"), ("name", "a/b"), ("name", "C:evil"), ("name", ""),
        ("name", ".."), ("name", "a\\b"), ("name", "a\0b"), ("name", "\u2028"),
        ("image", "../tissue_images/x.tif"), ("image", "/etc/passwd"), ("image", "C:/x.tif"),
        ("image", "tissue_images/../../x.tif"), ("image", "tissue_images/sub/x.tif"),
        ("image", "tissue_images"), ("image", "elsewhere/x.tif"), ("image", "tissue_images/a\0"),
        ("image", "tissue_images\\x.tif"), ("mask", "../masks/x.png"), ("mask", "/etc/passwd"),
        ("mask", "tissue_images/x.tif"), ("mask", "masks//etc/passwd"),
    ],
)  # fmt: skip
def test_a_manifest_cannot_lead_outside_though_it_is_sealed(sealed, tmp_path, key, value):
    root, change = sealed
    (root / "elsewhere").symlink_to(tmp_path, target_is_directory=True)
    change(lambda manifest: manifest["images"][3].update({key: value}))
    for read in (read_manifest, found_by_inference):
        with pytest.raises(InputError, match=r"patches\.json: found images\.3") as error:
            read(root)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file",
    ["../../secret_patch_00_00.png", "/secret_patch_00_00.png", "Drawn_01/../x_patch_00_00.png",
     "Drawn_01_patch_00_00.png\0", "Drawn_02_patch_00_00.png", "Drawn_01_patch_00_00.tif", ""],
)  # fmt: skip
def test_a_table_cannot_lead_outside_though_it_is_sealed(sealed, file):
    root, change = sealed
    change(table=lambda rows: rows[0].update(file=file))
    with pytest.raises(InputError, match=r"patches\.csv: found") as error:
        patches.PatchDataset(root, "train", None)
    assert "\n" not in str(error.value)


def test_two_images_of_one_name_are_refused(sealed):
    root, change = sealed
    change(lambda manifest: manifest["images"][1].update(name="DRAWN_01"))
    with pytest.raises(InputError, match="two images of one name"):
        read_manifest(root)


def test_a_set_of_an_earlier_version_is_told_what_to_run(root):
    cut(root)
    manifest = json.loads((root / "patches.json").read_text())
    (root / "patches.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(InputError, match=r"format version 2, expected 4.*preprocess\.py"):
        read_manifest(root)
    cut(root)
    assert read_manifest(root)["format_version"] == 4


WRONG = [None, True, -1, 0, 0.5, 1e308, -1e308, 10**30, float("nan"), float("inf"), "", "x", "\0"]
WRONG += ["../x", [], [1], {}, {"a": 1}, [[]], "9" * 5000]


def places_in(value, path=()):
    """The places of all values in nested dicts and lists."""
    if not isinstance(value, dict | list):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        yield from places_in(inner, (*path, key))


def spoil_bytes(content, generator):
    """Cut short, or with some bytes replaced, left out, or put in."""
    content = bytearray(content)
    where = generator.randrange(len(content))
    kind = generator.choice(("cut", "flip", "replace", "drop", "insert"))
    if kind == "cut":
        del content[where:]
    elif kind == "flip":
        content[where] ^= 1 << generator.randrange(8)
    elif kind == "replace":
        content[where : where + 8] = generator.randbytes(8)
    elif kind == "drop":
        del content[where : where + generator.randrange(1, 40)]
    else:
        content[where:where] = generator.randbytes(3)
    return bytes(content)


def spoil_json(content, generator):
    manifest = copy.deepcopy(json.loads(content))
    *path, key = generator.choice(list(places_in(manifest)))
    place = manifest
    for step in path:
        place = place[step]
    if generator.random() < 0.25:
        del place[key]
    else:
        place[key] = generator.choice(WRONG)
    return json.dumps(manifest).encode()


def spoil_csv(content, generator):
    rows = list(csv.reader(content.decode().splitlines()))
    row = generator.choice(rows)
    column = generator.randrange(len(row))
    kind = generator.choice(("value", "value", "value", "cell", "row", "again", "columns"))
    if kind == "value":
        row[column] = str(generator.choice(WRONG))
    elif kind == "cell":
        del row[column]
    elif kind == "row":
        rows.remove(row)
    elif kind == "again":
        rows.append(row)
    else:
        rows = [line[::-1] for line in rows]
    return "\r\n".join(",".join(line) for line in rows).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize(
    ("file", "spoil"), [("patches.json", spoil_json), ("patches.csv", spoil_csv)]
)
def test_every_damage_of_a_table_is_one_line_or_no_matter(root, file, spoil):
    cut(root, "--patch_stride", "32")
    whole = (root / file).read_bytes()
    right = readings(root)
    generator, refusals = random.Random(7), 0
    for number in range(300):
        spoiled = (spoil if number % 3 else spoil_bytes)(whole, generator)
        (root / file).write_bytes(spoiled)
        try:
            assert readings(root) == right, spoiled
        except InputError as error:
            refusals += 1
            assert len(str(error)) < 600 and str(error).isprintable(), str(error)
            assert file in str(error) and "preprocess.py" in str(error)
    assert refusals > 250


def test_damage_is_one_line_of_the_scripts_and_exit_code_2(root):
    cut(root)
    (root / "patches.json").write_bytes(b"[" * 100_000)
    for command in (
        ["train.py", "--log", root / "log"],
        ["inference.py", "--image_folder", root / "r"],
    ):
        command = [sys.executable, *map(str, command), "--root", str(root), "--gpu_id", "-1"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 2 and "patches.json: found" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (root / "log").exists() and not (root / "r").exists()
