"""No image that a network has learned is taken for one that was held out, and no patch is older
than the mask that it was cut from.
"""

import os
import shutil

import numpy as np
import pytest
import torch

from tests.scripts import cut, infer, learn
from tissue import pictures
from tissue.files import InputError
from tissue.patches import read_manifest


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


def test_validation_images_that_init_has_learned_are_said_to_be_so(root, tmp_path):
    cut(root)
    before = split_of(root)
    first = learn(root, tmp_path / "log", "--epoch", 1)
    cut(root, "--val_pattern", "Drawn_0[12].tif")
    second = learn(root, tmp_path / "log", "--epoch", 1, "--init", first / "best.pt")
    both = [n for n, s in split_of(root).items() if s == "val" and before[n] == "train"]
    assert len(both) == 2
    assert (
        f"has learned {', '.join(both)}, which validate here" in (second / "train.log").read_text()
    )
    assert len(torch.load(second / "best.pt", weights_only=True)["learned"]) == 4  # of both runs


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
