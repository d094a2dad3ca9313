"""Files find each other by name, and what is passed over is said."""

import unicodedata

import numpy as np
import pytest

from tissue.files import InputError
from tissue.pairs import (
    find_images,
    find_pairs,
    label_folder,
    matches,
    name_fault,
)
from tissue.pictures import write_image
from tissue.unused import passed_over, unused_labels, unused_masks

NFC, NFD = (unicodedata.normalize(form, "Präparat_é") for form in ("NFC", "NFD"))


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def fault_of(function, *arguments):
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_names_are_one_in_any_case_and_unicode_form(tmp_path):
    touch(tmp_path / "tissue_images", "x.PNG", f"{NFC}.tif", "Y.ome.TIF")
    touch(tmp_path / "masks", "X.png", f"{NFD}.png", "y.Png")
    touch(tmp_path / "instance_labels", f"{NFD.upper()}.png")
    pairs = {pair.name: pair for pair in find_pairs(tmp_path)}
    assert list(pairs) == sorted(["x", NFC, "Y"])
    assert pairs["x"].mask.name == "X.png" and pairs["Y"].mask.name == "y.Png"
    assert pairs[NFC].mask == tmp_path / "masks" / f"{NFD}.png"
    labels = label_folder(tmp_path)
    assert labels[NFC] == labels.get(NFC) and NFC in labels and "x" not in labels
    assert labels.get("x") is None and len(labels) == 1


@pytest.mark.parametrize("two", [("a.tif", "A.png"), (f"{NFC}.tif", f"{NFD}.tif")])
def test_two_files_that_become_one_name_are_both_named(tmp_path, two):
    fault = fault_of(find_images, touch(tmp_path / "images", *two))
    assert all(name in fault for name in two)


@pytest.mark.parametrize(
    ("file", "pattern", "expected"),
    [
        ("x_03.png", "*03.tif", True),
        ("x_03.TIF", "*03.tif", True),
        ("X_03.ome.tif", "*03.tif", True),
        ("x_03.png", "X_03", True),
        ("x_03.png", "x*.jpeg", True),
        ("x_031.tif", "*03.tif", False),
        ("x_03.tif.png", "*03.tif", False),
        ("x_03.png", "*.png", True),
        ("x_03.tif", "*.png", False),
        ("x_03.ome.tif", "*.ome.tif", True),
        (f"{NFD}.png", f"{NFC.upper()}.tif", True),
        ("a.v2.png", "*.v2", True),
        ("a.png", "*", True),
    ],
)
def test_a_pattern_fits_a_name_whatever_its_suffix(tmp_path, file, pattern, expected):
    assert matches(tmp_path / file, pattern) is expected


def test_files_that_are_no_images_are_said(tmp_path):
    names = ("a.png", "b.nd2", "c.webp", "d.gif", "e.jp2", "f.jfif", ".hidden.gif")
    images = touch(tmp_path / "images", *names)
    (line,) = passed_over(images)
    assert line == (
        f"5 files in {images} were passed over (b.nd2, c.webp, d.gif, e.jp2, f.jfif): expected "
        f"files of type tif, tiff, png, jpg, jpeg, bmp, svs, mrxs, ndpi, scn, bif, vms, vmu, dcm, "
        f"svslide, czi"
    )
    one = touch(tmp_path / "one", "a.png", "notes.txt")
    assert passed_over(one)[0].startswith(f"1 file in {one} was passed over (notes.txt): ")
    (one / "more").mkdir()
    assert "(more/, notes.txt)" in passed_over(one)[0]
    assert passed_over(touch(tmp_path / "none", "a.png", ".DS_Store"), tmp_path / "missing") == []


def test_a_file_given_twice_is_one(tmp_path):
    folder = touch(tmp_path / "images", "a.png", "b.png")
    images = find_images(folder / "a.png", folder, folder / ".." / "images" / "a.png")
    assert list(images) == ["a", "b"]


def test_a_second_folder_of_masks_is_said(tmp_path):
    for folder in ("masks", "mask binary"):
        assert unused_masks(tmp_path) == []
        touch(tmp_path / folder, "a.png")
    (line,) = unused_masks(tmp_path)
    assert line == f"{tmp_path / 'masks'} was passed over: masks are taken from 'mask binary'"


def test_label_maps_of_no_image_are_said(tmp_path):
    touch(tmp_path / "instance_labels", "a_01_labels.png", "B.png", "a_01.mat")
    (line,) = unused_labels(tmp_path, ["a_01", "b"])
    assert line.startswith("1 file in") and "(a_01_labels.png): no image has that name" in line
    assert unused_labels(tmp_path / "elsewhere", ["a"]) == []
    (tmp_path / "instance_labels" / "a_01_labels.png").unlink()
    assert unused_labels(tmp_path, ["a_01", "b"]) == []


def test_a_link_to_nowhere_is_an_error_and_another_link_is_a_file(tmp_path):
    write_image(tmp_path / "real.png", np.zeros((40, 40, 3), np.uint8))
    images = touch(tmp_path / "images")
    (images / "a.png").symlink_to(tmp_path / "real.png")
    assert list(find_images(images)) == ["a"]
    (images / "b.png").symlink_to(tmp_path / "not_mounted" / "b.png")
    assert "b.png: found a link" in fault_of(find_images, images)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "../a", "/a", "a\\b", "C:a", "a\0b", "a\nb", "a\x1bb", "a\u2028b",
     "a\udcffb", "x" * 231, "é" * 116],
)  # fmt: skip
def test_what_no_file_may_be_called(name):
    assert name_fault(name)


@pytest.mark.parametrize(
    "name", ["a b", "a.b", "Ünï", "x" * 230, "a<b>&'c\"?*[1]%d{x},;=@$#~", "-a"]
)
def test_what_a_file_may_be_called(name):
    assert name_fault(name) is None


def test_names_that_no_set_can_have_are_faults_of_the_pair_that_has_them(tmp_path):
    bad = ["a\nb.png", "x" * 236 + ".png"]
    for folder in ("tissue_images", "masks"):
        touch(tmp_path / folder, "fine.png", *bad)
        try:
            (tmp_path / folder / "no_utf8_\udcff.png").touch()
        except (OSError, UnicodeEncodeError):  # this file system takes no such name
            continue
    faults = fault_of(find_pairs, tmp_path).split("; ")
    assert len(faults) >= 4 and not any("fine" in fault for fault in faults)
    assert any("control characters" in fault for fault in faults)
    assert any("240 bytes, 230 at most" in fault for fault in faults)
