"""The three scripts, end to end on drawn tissue, and every bad input that they promise to name."""

import json
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import inference
import preprocess
import train
import utils
from learning import checkpoints
from learning.predictor import Predictor
from model import UNet
from tests.scripts import REPOSITORY, cut, dice_of, fingerprint, infer, learn, table_of
from tissue import agreement, images, masks, pictures
from tissue.files import InputError

# --- end to end


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The three scripts called as a user does, each as a command of its own."""
    folder = tmp_path_factory.mktemp("project")
    root, log, results = folder / "data", folder / "log", folder / "results"
    commands = [
        ["-m", "tissue.synthetic", "--root", root, "--images", 6, "--size", 160],
        ["preprocess.py", "--root", root, "--patch_stride", 32],
        ["train.py", "--root", root, "--log", log, "--gpu_id", -1, "--name", "e2e"],
        ["inference.py", "--root", root, "--image_folder", results, "--gpu_id", 0, "--ckpt"],
    ]
    commands[2] += ["--dimensions", 8, "--epoch", 3, "--workers", 1]
    outputs = []
    for command in commands:
        run = list(log.glob("*-e2e"))  # there is one when inference comes
        command = [sys.executable, *map(str, command + run)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    return folder, outputs


def test_preprocess_prints_its_counts(finished):
    _, outputs = finished
    assert re.search(r"patches +16 \| +8\n", outputs[1])


def test_a_run_folder_holds_what_the_contract_says(finished):
    folder, outputs = finished
    (run,) = (folder / "log").iterdir()
    assert re.fullmatch(r"\d{14}-e2e", run.name)
    assert json.loads((run / "args.json").read_text())["dimensions"] == 8
    metrics = table_of(run / "metrics.csv")
    assert [row["epoch"] for row in metrics] == ["1", "2", "3"]
    lines = (run / "train.log").read_text().splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 3
    assert all(line in outputs[2] for line in lines)
    best = torch.load(run / "best.pt", weights_only=True)
    last = torch.load(run / "last.pt", weights_only=True)
    assert last["epoch"] == 3
    dices = [float(row["val_dice"]) for row in metrics]
    assert best["best_dice"] == pytest.approx(max(dices), abs=1e-5)
    assert best["epoch"] == 1 + dices.index(max(dices))
    assert not [key for key in best["model"] if "module" in key or "_orig_mod" in key]
    assert best["pixel_size_um"] == pytest.approx(0.25)


def test_tensorboard_has_the_curves_and_the_grid(finished):
    folder, _ = finished
    (run,) = (folder / "log").iterdir()
    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    wanted = {"train/loss", "train/learning_rate", "train/patches_per_second"}
    assert wanted | {"val/loss", "val/accuracy", "val/dice_score"} <= scalars
    grids = events.Images("val/Ref_Prediction_GroundTruth")
    assert len(grids) == 3
    height, width = grids[0].height, grids[0].width
    assert (height, width) == (6 * (128 + 4) + 4, 3 * (128 + 4) + 4)
    dices = [event.value for event in events.Scalars("val/dice_score")]
    logged = [float(row["val_dice"]) for row in table_of(run / "metrics.csv")]
    np.testing.assert_allclose(dices, logged, atol=1e-5)


def test_results_are_whole_images_with_their_counts(finished):
    folder, outputs = finished
    results, root = folder / "results", folder / "data"
    rows = table_of(results / "counts.csv")
    assert [row["image"] for row in rows] == ["Demo_Kidney_03", "Demo_Liver_03"]
    for row in rows:
        name = row["image"]
        prediction = cv2.imread(str(results / f"{name}_prediction.png"), cv2.IMREAD_UNCHANGED)
        reference = masks.read_mask(root / "mask binary" / f"{name}.png")
        assert prediction.shape == reference.shape == (160, 160)
        assert set(np.unique(prediction)) <= {0, 255}
        predicted = prediction > 0
        assert float(row["accuracy"]) == pytest.approx((predicted == reference).mean(), abs=1e-4)
        overlap = 2 * (predicted & reference).sum() / (predicted.sum() + reference.sum())
        assert float(row["dice"]) == pytest.approx(overlap, abs=1e-4)
        objects, _ = cv2.connectedComponents(reference.astype(np.uint8), connectivity=8)
        assert int(row["gt_contours"]) == objects - 1
        copy = images.read_image(results / f"{name}_image.png")
        original = images.read_image(root / "tissue_images" / f"{name}.tif")
        np.testing.assert_array_equal(copy, original)
        np.testing.assert_array_equal(masks.read_mask(results / f"{name}_gt.png"), reference)
        assert (results / f"{name}_overlay.png").is_file()
        assert name in outputs[3]
    page = (results / "report.html").read_text()
    assert page.count("data:image/jpeg") == 10  # image, prediction, reference, errors; a field
    assert not re.search(r"(src|href)=[\"']https?:", page)


# --- preprocess


def test_the_same_input_again_changes_nothing(root, capsys):
    cut(root)
    before = fingerprint(root)
    cut(root)
    assert fingerprint(root) == before
    assert "nothing to do" in capsys.readouterr().out


def test_every_patch_equals_its_crop_bit_by_bit(root):
    cut(root)
    rows = table_of(root / "patches.csv")
    assert len(rows) == 4 * 5 * 4  # images of 96 x 80 pixels, patches of 32 each 16
    for row in rows:
        y, x = int(row["y"]), int(row["x"])
        window = (slice(y, y + 32), slice(x, x + 32))
        image = images.read_image(root / "tissue_images" / f"{row['name']}.tif")[window]
        mask = masks.read_mask(root / "mask binary" / f"{row['name']}.png")[window]
        patch = images.read_image(root / f"patches_rgb_{row['split']}" / row["file"])
        nuclei = masks.read_mask(root / f"patches_mask_{row['split']}" / row["file"])
        np.testing.assert_array_equal(patch, image)
        np.testing.assert_array_equal(nuclei, mask)


@pytest.mark.parametrize("change", ["stride", "mask", "split", "deleted patch"])
def test_changed_input_rebuilds_the_set(root, change):
    cut(root)
    more = []
    if change == "stride":
        more = ["--patch_stride", "32"]
    elif change == "split":
        more = ["--val_pattern", "*0[34].tif"]
    elif change == "mask":
        path = root / "mask binary" / "Drawn_01.png"
        pictures.write_image(path, ~masks.read_mask(path))
    else:
        next((root / "patches_mask_train").iterdir()).unlink()
    cut(root, *more)
    rows = table_of(root / "patches.csv")
    for split in ("train", "val"):
        listed = {row["file"] for row in rows if row["split"] == split}
        for kind in ("rgb", "mask"):
            folder = root / f"patches_{kind}_{split}"
            assert {path.name for path in folder.iterdir()} == listed
    if change == "mask":
        (first,) = (r for r in rows if r["file"] == "Drawn_01_patch_00_00.png")
        mask = masks.read_mask(root / "mask binary" / "Drawn_01.png")[:32, :32]
        assert float(first["foreground"]) == pytest.approx(mask.mean(), abs=1e-4)


def no_images(root):
    shutil.rmtree(root / "tissue_images")
    (root / "tissue_images").mkdir()


def image_without_mask(root):
    (root / "mask binary" / "Drawn_01.png").unlink()
    (root / "mask binary" / "Drawn_02.png").unlink()


def mask_without_image(root):
    (root / "tissue_images" / "Drawn_03.tif").unlink()


def sizes_differ(root):
    pictures.write_image(root / "mask binary" / "Drawn_01.png", np.zeros((96, 81), bool))


def two_of_one_stem(root):
    pictures.write_image(root / "tissue_images" / "Drawn_01.png", np.zeros((96, 80, 3), np.uint8))


def truncated(root):
    for name in ("tissue_images/Drawn_01.tif", "mask binary/Drawn_02.png"):
        path = root / name
        path.write_bytes(path.read_bytes()[:-60])


def smaller_than_the_patch(root):
    for folder, array in (("tissue_images", np.zeros((20, 90, 3), np.uint8)),):
        pictures.write_image(root / folder / "Drawn_01.tif", array)
    pictures.write_image(root / "mask binary" / "Drawn_01.png", np.zeros((20, 90), bool))


def same_picture_in_both_splits(root):
    image = images.read_image(root / "tissue_images" / "Drawn_04.tif")
    (root / "tissue_images" / "Drawn_01.tif").unlink()
    pictures.write_image(root / "tissue_images" / "Drawn_01.bmp", image)


BAD_FOLDERS = [
    (no_images, ["tissue_images: found no image"]),
    (image_without_mask, ["Drawn_01.tif", "Drawn_02.tif", "mask binary"]),
    (mask_without_image, ["Drawn_03.png", "tissue_images"]),
    (sizes_differ, ["Drawn_01.png", "96 x 81", "96 x 80"]),
    (two_of_one_stem, ["Drawn_01.png", "Drawn_01.tif"]),
    (truncated, ["Drawn_01.tif", "Drawn_02.png"]),
    (smaller_than_the_patch, ["Drawn_01.tif", "20 x 90", "32 x 32"]),
    (same_picture_in_both_splits, ["same picture", "Drawn_01 = Drawn_04"]),
]


@pytest.mark.parametrize(("spoil", "named"), BAD_FOLDERS, ids=[f.__name__ for f, _ in BAD_FOLDERS])
def test_a_bad_folder_is_named_and_the_old_set_stays(root, spoil, named):
    cut(root)
    spoil(root)
    before = fingerprint(root)
    with pytest.raises(InputError) as error:
        cut(root)
    assert all(name in str(error.value) for name in named)
    assert "\n" not in str(error.value)
    assert fingerprint(root) == before


BAD_SETTINGS = [
    (["--patch_dim", "0"], "--patch_dim: found 0"),
    (["--patch_dim", "-3"], "--patch_dim: found -3"),
    (["--patch_stride", "0"], "--patch_stride: found 0"),
    (["--patch_stride", "33"], "--patch_stride: found 33"),
    (["--val_pattern", "*9"], "no validation image"),
    (["--val_pattern", "*"], "no training image"),
    (["--workers", "0"], "--workers: found 0"),
]


@pytest.mark.parametrize(("flags", "text"), BAD_SETTINGS, ids=[text for _, text in BAD_SETTINGS])
def test_a_bad_setting_is_named_and_nothing_is_written(root, flags, text):
    before = fingerprint(root)
    with pytest.raises(InputError, match=text):
        cut(root, *flags)
    assert fingerprint(root) == before


@pytest.mark.parametrize(("value", "content"), [(False, "nothing"), (True, "everything")])
def test_an_empty_or_full_mask_is_a_line_with_its_name(root, capsys, value, content):
    pictures.write_image(root / "mask binary" / "Drawn_02.png", np.full((96, 80), value))
    cut(root)
    out = capsys.readouterr().out
    assert len(re.findall(rf"^.*Drawn_02\.png: {content} is marked", out, re.MULTILINE)) == 1


# --- train and inference


def test_train_without_a_patch_set_says_what_to_run(root):
    with pytest.raises(FileNotFoundError, match=r"preprocess\.py"):
        learn(root, root / "log")


@pytest.mark.parametrize("flag", ["dimensions", "lr", "batch_size", "epoch"])
def test_train_refuses_settings_of_zero(root, flag):
    cut(root)
    with pytest.raises(InputError, match=f"--{flag}: found 0"):
        learn(root, root / "log", f"--{flag}", 0)
    assert not (root / "log").exists()


def test_a_batch_larger_than_the_set_is_named(root):
    cut(root)
    with pytest.raises(InputError, match=r"--batch_size: found 500, expected at most the 60"):
        learn(root, root / "log", "--batch_size", 500)


def test_the_same_seed_trains_the_same_weights_and_another_does_not(root):
    cut(root)
    runs = [
        learn(root, root / "log", "--seed", seed, "--workers", workers, "--epoch", 1)
        for seed, workers in ((1, 0), (1, 2), (2, 0))
    ]
    weights = [torch.load(run / "last.pt", weights_only=True)["model"] for run in runs]
    key = "up4.conv.conv.3.weight"
    assert torch.equal(weights[0][key], weights[1][key])
    assert not torch.equal(weights[0][key], weights[2][key])


@pytest.fixture
def checkpoint(tmp_path):
    """A bare state dict, as the first version wrote it."""
    path = tmp_path / "original.pth"
    torch.save(UNet(4).state_dict(), path)
    return path


def test_images_of_any_format_without_masks_leave_the_scores_empty(root, checkpoint, capsys):
    picture = images.read_image(root / "tissue_images" / "Drawn_01.tif")
    pictures.write_image(root / "a b.png", picture)
    infer(root / "out", "--ckpt", checkpoint, "--images", root / "tissue_images", root / "a b.png")
    rows = table_of(root / "out" / "counts.csv")
    assert [row["image"] for row in rows] == ["Drawn_01", "Drawn_02", "Drawn_03", "Drawn_04", "a b"]
    assert all(row["dice"] == row["gt_contours"] == "" for row in rows)
    assert rows[0]["contours"] == rows[4]["contours"]
    assert not list((root / "out").glob("*_gt.png"))
    assert "swapped" in capsys.readouterr().out


def test_images_with_masks_are_scored(root, checkpoint):
    places = ["--images", root / "tissue_images", "--masks", root / "mask binary"]
    infer(root / "out", "--ckpt", checkpoint, *places)
    rows = table_of(root / "out" / "counts.csv")
    assert len(rows) == 4
    for row in rows:
        reference = root / "mask binary" / f"{row['image']}.png"
        found = dice_of(root / "out" / f"{row['image']}_prediction.png", reference)
        assert float(row["dice"]) == pytest.approx(found, abs=1e-4)


def test_threshold_decides_what_a_nucleus_is(root, checkpoint):
    found = []
    for threshold in (0.01, 0.99):
        infer(
            root / "out", "--ckpt", checkpoint, "--threshold", threshold, "--images",
            root / "tissue_images" / "Drawn_01.tif",
        )  # fmt: skip
        found.append(masks.read_mask(root / "out" / "Drawn_01_prediction.png"))
    assert found[0].sum() > found[1].sum()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--ckpt", "nowhere.pt"], "nowhere.pt"),
        (["--threshold", "1.5"], "--threshold"),
        (["--batch_size", "0"], "--batch_size"),
        (["--images", "nowhere"], "nowhere"),
        (["--masks", "nowhere"], "--images"),
    ],
)
def test_inference_names_what_is_wrong_and_writes_nothing(root, checkpoint, flags, text):
    flags = flags if "--ckpt" in flags else ["--ckpt", checkpoint, *flags]
    with pytest.raises((InputError, FileNotFoundError), match=text):
        infer(root / "out", "--root", root, *flags)
    assert not (root / "out").exists()


def test_a_missing_checkpoint_names_the_newest_run(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "log" / "20260101000000"
    run.mkdir(parents=True)
    (run / "best.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"--ckpt log.20260101000000.best\.pt"):
        infer(root / "out", "--ckpt", "nowhere.pt")


def test_all_broken_images_are_named_before_anything_is_written(root, checkpoint):
    truncated(root)
    (root / "tissue_images" / "Drawn_03.tif").write_text("no image")
    with pytest.raises(InputError) as error:
        infer(root / "out", "--ckpt", checkpoint, "--images", root / "tissue_images")
    assert "Drawn_01.tif" in str(error.value) and "Drawn_03.tif" in str(error.value)
    assert not (root / "out").exists()


@pytest.mark.parametrize("script", ["preprocess.py", "train.py", "inference.py"])
def test_a_wrong_path_is_one_line_on_stderr_and_exit_code_2(script, tmp_path):
    done = subprocess.run(
        [sys.executable, script, "--root", str(tmp_path / "nowhere")],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{script}: ")


@pytest.mark.parametrize("script", [preprocess, train, inference])
def test_help_fits_a_screen_and_shows_two_examples(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "--root" in text and "(default: ./data/)" in text
    assert len(text.splitlines()) <= 50
    assert text.rpartition("examples:")[2].count(f"python3 {script.__name__}.py") == 2


def test_the_scores_of_a_run_are_those_of_its_checkpoint(root):
    """best.pt, loaded again, gives the Dice that was logged when it was saved."""
    cut(root)
    run = learn(root, root / "log", "--stain", "none")  # as the patches are
    checkpoint = checkpoints.load_checkpoint(run / "best.pt")
    model = checkpoints.build_model(checkpoint)
    predict = Predictor.of(model, checkpoint, torch.device("cpu")).predict
    counts = torch.zeros(4, dtype=torch.int64)
    for path in sorted((root / "patches_rgb_val").iterdir()):
        predicted = torch.from_numpy(predict(images.read_image(path)[None])[0, 0] >= 0.5)
        reference = masks.read_mask(root / "patches_mask_val" / path.name)
        counts += utils.pixel_counts(predicted, torch.from_numpy(reference))
    assert agreement.dice(counts) == pytest.approx(checkpoint["best_dice"], abs=2e-3)
