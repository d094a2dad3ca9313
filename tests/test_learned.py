"""No image that a network has learned is taken for one that was held out, and no patch is older
than the mask that it was cut from.
"""

import os
import shutil

import numpy as np
import pytest
import torch

import train
from learning.loading import Sets
from tests.scripts import cut, infer, learn
from tests.test_runs import label
from tissue import pictures
from tissue.files import InputError
from tissue.patches import read_manifest
from tissue.unused import said_since_cut


def split_of(root):
    return {image["name"]: image["split"] for image in read_manifest(root)["images"]}


def test_scores_of_images_that_were_learned_are_said_to_be_so(root, tmp_path, capsys):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1)
    learned = sorted(name for name, split in split_of(root).items() if split == "train")
    assert len(torch.load(run / "best.pt", weights_only=True)["learned"]) == len(learned) == 3
    infer(tmp_path / "all", "--ckpt", run, "--images", root / "tissue_images", "--masks",
          root / "mask binary")  # fmt: skip
    assert f"has learned {', '.join(learned)}: scores of others" in capsys.readouterr().out
    for n, flags in enumerate((("--root", root), ("--images", root / "tissue_images"))):
        infer(tmp_path / f"{n}", "--ckpt", run, *flags)  # held out, or not scored
        assert "has learned" not in capsys.readouterr().out


@pytest.mark.parametrize("outputs", ["the same", "others"])
def test_validation_images_that_init_has_learned_are_said_to_be_so(root, tmp_path, outputs):
    if outputs == "others":
        label(root, 1, 2, 3, 4)
    cut(root)
    before = split_of(root)
    first = learn(root, tmp_path / "log", "--epoch", 1)
    shutil.rmtree(root / "instance_labels", ignore_errors=True)
    cut(root, "--val_pattern", "Drawn_0[12].tif")
    second = learn(root, tmp_path / "log", "--epoch", 1, "--init", first / "best.pt")
    both = [n for n, s in split_of(root).items() if s == "val" and before[n] == "train"]
    assert len(both) == 2
    assert (
        f"has learned {', '.join(both)}, which validate here" in (second / "train.log").read_text()
    )
    last = torch.load(second / "last.pt", weights_only=True)
    assert len(last["learned"]) == 4  # of both runs
    last["training"]["progress"] |= {"finished": False}
    torch.save(last, second / "last.pt")
    first.rename(tmp_path / "elsewhere")
    train.main(train.parse_args(["--resume", str(second)]))
    assert len(torch.load(second / "last.pt", weights_only=True)["learned"]) == 4


@pytest.mark.parametrize("changed", ["tissue_images/Drawn_01.tif", "mask binary/Drawn_02.png"])
def test_files_that_were_changed_after_cutting_are_cut_again_before_they_are_learned(
    root, tmp_path, changed
):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1)
    newer = (root / "patches.json").stat().st_mtime + 1
    for path in (root / "tissue_images").iterdir():  # copied, and so newer, but the same
        os.utime(path, (newer, newer))
    learn(root, tmp_path / "log", "--epoch", 1)
    shape = (80, 96) if changed.endswith("png") else (80, 96, 3)
    pictures.write_image(root / changed, np.full(shape, 255, np.uint8))
    os.utime(root / changed, (newer, newer))
    with pytest.raises(InputError, match=r"found other files than those that were cut") as error:
        learn(root, tmp_path / "log", "--epoch", 1)
    assert str(error.value).startswith(f"{root / changed}: ")
    if changed.endswith("png"):  # of a mask its time is no matter
        os.utime(root / changed, (1, 1))
        with pytest.raises(InputError, match=r"found other files than those that were cut"):
            learn(root, tmp_path / "log", "--epoch", 1)
    shutil.rmtree(run)


def test_images_that_came_or_went_after_cutting_are_said(root, tmp_path, capsys):
    cut(root)
    for place in ("tissue_images", "mask binary"):
        (old,) = (root / place).glob("Drawn_01.*")
        old.rename(old.with_stem("Drawn_09"))
    shutil.copy(root / "tissue_images" / "Drawn_02.tif", root / "tissue_images" / "no_mask.tif")
    run = learn(root, tmp_path / "log", "--epoch", 1)
    again = f"; run preprocess.py --root {root}"
    images = root / "tissue_images"
    lines = [
        f"Drawn_09: in {images} since it was cut, and not in the set{again}",
        f"Drawn_01: no longer in {images}, but still in the set{again}",
    ]
    assert [line for line in capsys.readouterr().out.splitlines() if "the set;" in line] == lines
    assert all(line in (run / "train.log").read_text() for line in lines)
    shutil.rmtree(images)  # patches alone, as on another machine
    images.mkdir()
    learn(root, tmp_path / "log", "--epoch", 1)
    assert "the set;" not in capsys.readouterr().out


def test_of_annotated_sets_the_images_that_are_passed_over_are_not_said(root):
    """Some of an annotated set have neither mask nor annotation; one is annotated later."""
    shutil.rmtree(root / "mask binary")
    (root / "annotations").mkdir()
    told = [{"name": f"Drawn_0{k}"} for k in (1, 2)]
    for image in told:
        (root / "annotations" / f"{image['name']}.geojson").touch()
    assert said_since_cut(root, told) == []
    (root / "annotations" / "DRAWN_03_nuclei.geojson").touch()
    (line,) = said_since_cut(root, told)
    assert line.startswith(f"Drawn_03: in {root / 'tissue_images'} since it was cut")


def test_masks_that_were_changed_are_said_where_a_run_goes_on(root):
    cut(root)
    path = root / "mask binary" / "Drawn_02.png"
    assert Sets.of([str(root)], [], begins=False).notes == []
    pictures.write_image(path, np.full((80, 96), 255, np.uint8))
    (note,) = Sets.of([str(root)], [], begins=False).notes
    assert note.startswith(f"{path}: found other files than those that were cut; the run goes on")
    with pytest.raises(InputError, match="found other files than those that were cut, expected"):
        Sets.of([str(root)], [])


def test_a_validation_image_that_is_gone_is_told_with_what_to_do(root, tmp_path):
    cut(root)
    (name,) = (name for name, split in split_of(root).items() if split == "val")
    image, mask = root / "tissue_images" / f"{name}.tif", root / "mask binary" / f"{name}.png"
    image.unlink()
    for gone in (f"{image}", f"{image}, {mask}"):
        with pytest.raises(FileNotFoundError) as error:
            infer(tmp_path / "out", "--root", root)
        assert str(error.value) == (
            f"{gone}: not found, expected the validation images and masks that were cut; bring "
            "them back, run preprocess.py again to cut others, or name images of your own: "
            "--images"
        )
        mask.unlink(missing_ok=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [(("--pixel_size", "0.5"), "learned at 0.25 um a pixel, these patches have 0.5"),
     ((), "learned at 0.25 um a pixel, that of these patches is not known"),
     (("--pixel_size", "0.25"), None)],
)  # fmt: skip
def test_another_or_no_pixel_size_than_that_of_init_is_said(root, tmp_path, flags, said):
    cut(root, "--pixel_size", "0.25")
    first = learn(root, tmp_path / "log", "--epoch", 1)
    cut(root, *flags)
    second = learn(root, tmp_path / "log", "--epoch", 1, "--init", first / "best.pt")
    log = (second / "train.log").read_text()
    assert said in log if said else "learned at" not in log
