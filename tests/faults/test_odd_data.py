"""Odd data and odd numbers on the way from the images to the results: a right end, or one line."""

import json

import numpy as np
import pytest
import torch

from learning import checkpoints
from learning.predictor import Predictor
from model import UNet
from tests.mutations import with_entry
from tests.scripts import checkpoint_of, cut, infer, learn, table_of
from tests.test_results import MADE_WITH, finish
from tissue import manifest, pictures, results
from tissue.files import InputError
from tissue.schema import seal
from tissue.synthetic import draw_tissue


def drawn(root, change=lambda image, nuclei: (image, nuclei), names=("a", "b", "c")):
    """A root folder of images with their masks, each changed."""
    for number, name in enumerate(names):
        tissue = draw_tissue(64, 64, seed=number)
        image, nuclei = change(tissue.image, tissue.labels > 0)
        for folder, pixels in (("tissue_images", image), ("masks", nuclei)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            pictures.write_image(root / folder / f"{name}.png", pixels)
    return root


def preprocess(root, *more):
    cut(root, "--patch_stride", "32", "--val_pattern", "a*", *more)


ODD = {  # what becomes of image and mask; the reference's nuclei where some may be found
    "only nuclei": (lambda image, nuclei: (image, nuclei | True), 1),
    "one colour": (lambda image, nuclei: (np.full_like(image, 90), nuclei), None),
    "glass": (lambda image, nuclei: (np.full_like(image, 250), nuclei), None),
    "black": (lambda image, nuclei: (image * np.uint8(0), nuclei), None),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_images_come_to_their_end(tmp_path, capsys, name):
    """One colour is no tissue: no nucleus is found there, whatever its mask says."""
    change, marked = ODD[name]
    shades = iter(range(3))

    def apart(image, nuclei):  # three pictures, or else they are the same on both sides
        image, nuclei = change(image, nuclei)
        return image + np.uint8(next(shades)), nuclei

    preprocess(drawn(tmp_path / "data", apart))
    run = learn(tmp_path / "data", tmp_path / "log", "--epoch", 1)
    infer(tmp_path / "out", "--root", tmp_path / "data", "--ckpt", run, "--export",
          "--check_exports")  # fmt: skip
    (row,) = table_of(tmp_path / "out" / "counts.csv")
    assert row["image"] == "a"
    if marked is None:
        assert row["nuclei"] == "0"
        assert "100% of it is glass" in capsys.readouterr().out
    else:
        assert int(row["gt_nuclei"]) == marked


def test_a_set_without_nuclei_is_cut_and_segmented_but_not_learned(tmp_path):
    preprocess(drawn(tmp_path / "data", lambda image, nuclei: (image, nuclei & False)))
    with pytest.raises(InputError, match="found no nucleus in any of the"):
        learn(tmp_path / "data", tmp_path / "log", "--epoch", 1)
    checkpoints.save_checkpoint(tmp_path / "a.pt", checkpoint_of(UNet(2)))
    infer(tmp_path / "out", "--root", tmp_path / "data", "--ckpt", tmp_path / "a.pt", "--export",
          "--check_exports")  # fmt: skip
    (row,) = table_of(tmp_path / "out" / "counts.csv")
    assert (row["image"], row["gt_nuclei"]) == ("a", "0")


def test_an_image_of_one_row_is_smaller_than_a_patch_and_is_segmented(tmp_path):
    row = draw_tissue(32, 320, seed=1).image[:1].repeat(32, axis=1)[:, :10_000]
    drawn(tmp_path / "data", lambda *_: (row, row[..., 0] > 127))
    with pytest.raises(InputError, match=r"found 1 x 10000 pixels .*one patch"):
        preprocess(tmp_path / "data")
    torch.manual_seed(0)
    checkpoints.save_checkpoint(tmp_path / "a.pt", checkpoint_of(UNet(2)))
    image = tmp_path / "data" / "tissue_images" / "a.png"
    infer(tmp_path / "out", "--ckpt", tmp_path / "a.pt", "--images", image, "--export",
          "--check_exports")  # fmt: skip
    (found,) = table_of(tmp_path / "out" / "counts.csv")
    assert (found["height"], found["width"]) == ("1", "10000")


def test_one_image_is_one_line(tmp_path):
    with pytest.raises(InputError, match="at least two images"):
        preprocess(drawn(tmp_path, names=("a",)))


def test_a_picture_under_two_names_cannot_be_on_both_sides(tmp_path):
    root = drawn(tmp_path)
    pixels = draw_tissue(64, 64, seed=1).image  # of b
    pictures.write_image(root / "tissue_images" / "a2.bmp", pixels)
    pictures.write_image(root / "masks" / "a2.png", pixels[..., 0] > 200)
    with pytest.raises(InputError, match=r"same picture in training and validation \(a2 = b\)"):
        preprocess(root)
    assert not (root / "patches.json").exists()


def test_patients_on_both_sides_are_listed(tmp_path, capsys):
    drawn(tmp_path, names=("aP1_x", "bP1_y", "bP2_x", "aP3_x"))
    preprocess(tmp_path, "--group_pattern", "P[0-9]")
    said = capsys.readouterr().out
    assert "for training and for validation, so that scores may be too good: P1;" in said
    preprocess(tmp_path, "--group_pattern", "^.P[0-9]")
    assert "for training and for validation" not in capsys.readouterr().out
    splits = {i["name"]: i["split"] for i in manifest.read_manifest(tmp_path)["images"]}
    assert splits == {"aP1_x": "val", "aP3_x": "val", "bP1_y": "train", "bP2_x": "train"}


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_weights_that_grow_beyond_all_numbers_end_a_training_with_a_line(tmp_path, precision):
    """The loss of training is finite all the while; that of validation is none."""
    preprocess(drawn(tmp_path / "data"))
    with pytest.raises(InputError, match="validation loss is not a finite number"):
        learn(tmp_path / "data", tmp_path / "log", "--lr", 10, "--epoch", 1, "--precision",
              precision)  # fmt: skip
    assert not list(tmp_path.glob("log/*/best.pt"))


def test_an_absurd_learning_rate_is_one_line(tmp_path):
    with pytest.raises(InputError, match="--lr: found 1000000"):
        learn(tmp_path, tmp_path / "log", "--lr", 1e6)


def test_what_a_newer_version_made_is_said(tmp_path):
    newer = checkpoint_of(UNet(2)) | {"format_version": 2}
    torch.save(newer, tmp_path / "a.pt")
    with pytest.raises(InputError, match="format 2, made by a newer version, expected 1"):
        checkpoints.load_checkpoint(tmp_path / "a.pt")
    (tmp_path / "patches.json").write_text('{"format_version": 99}')
    with pytest.raises(InputError, match="version 99, made by a newer version, expected"):
        manifest.read_manifest(tmp_path)


def test_a_record_of_another_version_says_which(tmp_path):
    path = finish(tmp_path, made_with=MADE_WITH | {"version": "9.9.0"})
    record = json.loads(path.read_text())
    record["row"]["mitoses"] = 3
    record["sha256"] = seal(record)
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"row.mitoses.*made by version '9\.9\.0'"):
        results.read(tmp_path, "a")


def test_weights_of_a_gpu_load_without_one(tmp_path):
    torch.manual_seed(0)
    content, path = checkpoint_of(UNet(2)), tmp_path / "a.pt"
    torch.save(content, path)

    def moved(pickled):
        assert b"X\x03\0\0\0cpu" in pickled
        return pickled.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")

    with_entry(path, "data.pkl", moved)
    network = Predictor.load(path, torch.device("cpu"), False)
    for name, value in network.model.state_dict().items():
        assert value.device.type == "cpu" and torch.equal(value, content["model"][name])


def test_a_machine_that_compiles_nothing_is_one_line(tmp_path, monkeypatch):
    import torch._inductor.config as settings

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    preprocess(drawn(tmp_path / "data"))
    refused = pytest.raises(InputError, match="--compile: found no way to compile the network")
    with settings.patch({"cpp.cxx": (str(tmp_path / "no compiler"),)}), refused:
        learn(tmp_path / "data", tmp_path / "log", "--compile", "--epoch", 1)
