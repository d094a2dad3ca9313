"""inference.py on images that are read by windows, on several processes, and its other uses."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile

import cv2
import numpy as np
import pytest
import tifffile
import torch
from shapely.geometry import Polygon, box

import inference
from model import UNet
from tests import slide_files
from tests.scripts import REPOSITORY, call, cut, fingerprint, infer, learn, table_of
from tests.test_agreement import naive_aji, naive_pq
from tests.test_regions import feature, write_regions
from tests.test_scanners import needs_openslide
from tests.test_windows import write_ome_pyramid
from tissue import exports, files, images, masks, nuclei, nuclei_tables, windows
from tissue.files import InputError
from tissue.pictures import write_image
from tissue.results import STATUS, TABLES
from tissue.schema import seal
from tissue.stain import TARGET, stain_of, to_stain
from tissue.summary import write_summary
from tissue.synthetic import draw_tissue


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network of random weights for 0.25 micrometres that calls half of drawn tissue nuclei."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("ckpt") / "net.pt"
    model = UNet(4).eval()
    image = draw_tissue(320, 400, seed=1).image
    image = to_stain(image, stain_of(windows.from_array(image)), TARGET)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        model.last_conv.weight *= 200
        model.last_conv.bias *= 200
        model.last_conv.bias -= model((pixels - 0.65) / 0.2).median()
    torch.save(
        {
            "format_version": 1,
            "model": model.state_dict(),
            "config": model.config,
            "normalisation": {"mean": (0.65, 0.65, 0.65), "std": (0.2, 0.2, 0.2)},
            "channel_order": "rgb",
            "stain": TARGET._asdict(),
            "pixel_size_um": 0.25,
            "threshold": 0.5,
        },
        path,
    )
    return path


@pytest.fixture
def slide(tmp_path):
    """A folder with one drawn image, 320 x 400 pixels in tiles, one third of it glass."""
    image = draw_tissue(320, 400, seed=1).image
    image[:, 260:] = 244
    (tmp_path / "slides").mkdir()
    path = tmp_path / "slides" / "big.tif"
    resolution = {"resolution": (4e4, 4e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, image, photometric="rgb", tile=(64, 64), **resolution)
    return path


@pytest.fixture
def all_are_big(monkeypatch):
    monkeypatch.setattr(windows, "BIG", 1)


TILES = ["--tile_size", 96, "--overlap", 96]


def test_a_big_image_gives_the_mask_and_counts_of_a_small_one(
    slide, checkpoint, tmp_path, monkeypatch
):
    flags = ["--ckpt", checkpoint, "--images", slide, *TILES]
    infer(tmp_path / "small", *flags)
    monkeypatch.setattr(windows, "BIG", 1)
    infer(tmp_path / "big", *flags)
    small = masks.read_mask(tmp_path / "small" / "big_prediction.png")
    big = masks.read_mask(tmp_path / "big" / "big_prediction.tif")
    assert 0.01 < small.mean() < 0.99
    np.testing.assert_array_equal(big, small)
    rows = [table_of(tmp_path / name / "counts.csv")[0] for name in ("small", "big")]
    assert rows[1]["contours"] == str(len(nuclei.contours(small)))
    for row in rows:
        row.pop("seconds")
    assert rows[0] == rows[1]
    assert [path.name for path in (tmp_path / "big").glob(".*")] == [".lock"]  # no tiles are left


def test_glass_is_skipped_in_big_images_and_the_report_says_so(
    slide, checkpoint, tmp_path, all_are_big, capsys, generator
):
    image = generator.integers((190, 140, 180), (210, 160, 200), (320, 400, 3)).astype(np.uint8)
    image[:, 310:] = generator.integers(238, 250, (320, 90, 3))
    resolution = {"resolution": (4e4, 4e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(slide, image, photometric="rgb", tile=(64, 64), **resolution)
    infer(
        tmp_path / "out", "--ckpt", checkpoint, "--images", slide, "--tile_size", 64, "--overlap", 0
    )
    assert "20% of it is glass" in capsys.readouterr().out  # the last 80 of 400 columns
    assert "20%" in (tmp_path / "out" / "report.html").read_text()
    mask = masks.read_mask(tmp_path / "out" / "big_prediction.tif")
    assert not mask[:, 320:].any()
    (row,) = table_of(tmp_path / "out" / "counts.csv")
    assert float(row["tissue_mm2"]) == pytest.approx(320 * 310 * 0.25**2 / 1e6, rel=0.05)


IN_ONE_FOLDER = """
import sys
import inference
from tissue import windows
windows.BIG = 100_000
inference.main(inference.parse_args(sys.argv[1:]))
"""


@pytest.mark.slow
def test_three_processes_write_the_files_of_one(slide, checkpoint, tmp_path):
    """One image is shared out by tiles (128,000 pixels), the four others as they are."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for number in range(4):
        tissue = draw_tissue(100, 120, seed=number)
        write_image(slide.parent / f"small{number}.png", tissue.image)
        write_image(masks / f"small{number}.png", tissue.labels > 0)
    write_image(masks / "big.png", np.zeros((320, 400), bool))
    for processes in (1, 3):
        flags = ["--ckpt", checkpoint, "--images", slide.parent, "--masks", masks, *TILES]
        flags += ["--image_folder", tmp_path / str(processes), "--gpu_id", -1]
        call(tmp_path, IN_ONE_FOLDER, flags, processes)
    one, three = (sorted((tmp_path / name).rglob("*")) for name in "13")
    assert [path.name for path in one] == [path.name for path in three]
    assert len([path for path in one if "prediction" in path.name]) == 5
    for path, other in zip(one, three, strict=True):
        if path.suffix in (".png", ".tif") or "review" in path.name:
            assert path.read_bytes() == other.read_bytes(), path
    tables = [table_of(tmp_path / name / "counts.csv") for name in "13"]
    for row in tables[0] + tables[1]:
        row.pop("seconds")
    assert tables[0] == tables[1] and len(tables[0]) == 5
    assert len(table_of(tmp_path / "3" / "review.csv")) == 6  # two of the big one


def test_finished_images_stay_and_a_truncated_one_is_named_and_done_later(
    slide, checkpoint, tmp_path, all_are_big, capsys
):
    other = slide.with_name("cut.tif")
    whole = slide.read_bytes()
    tifffile.imwrite(other, tifffile.imread(slide), photometric="rgb", tile=(64, 64))
    whole = other.read_bytes()
    other.write_bytes(whole[:-40_000])
    results = tmp_path / "out"
    flags = ["--ckpt", checkpoint, "--images", slide.parent, *TILES]
    with pytest.raises(InputError, match=r"cut\.tif, rows .*, columns .*ends before its pixels do"):
        infer(results, *flags)
    assert [row["image"] for row in table_of(results / "counts.csv")] == ["big"]
    finished = (results / "big_prediction.tif").stat().st_mtime_ns
    assert not (results / "cut_prediction.tif").exists()

    other.write_bytes(whole)
    infer(results, *flags)
    assert "1 of them finished already" in capsys.readouterr().out
    assert [row["image"] for row in table_of(results / "counts.csv")] == ["big", "cut"]
    assert (results / "big_prediction.tif").stat().st_mtime_ns == finished

    infer(results, *flags, "--overwrite")
    assert (results / "big_prediction.tif").stat().st_mtime_ns > finished


def test_an_interrupted_redo_does_not_pass_for_finished(slide, checkpoint, tmp_path, monkeypatch):
    results = tmp_path / "out"
    flags = ["--ckpt", checkpoint, "--images", slide]
    infer(results, *flags)
    before = masks.read_mask(results / "big_prediction.png")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("tissue.pictures.overlay", stop)
        infer(results, *flags, "--threshold", 0.2)
    infer(results, *flags)
    np.testing.assert_array_equal(masks.read_mask(results / "big_prediction.png"), before)
    labels = tifffile.imread(results / "big_labels.tif")
    assert labels.max() == int(table_of(results / "counts.csv")[0]["nuclei"])


def test_a_name_that_is_a_pattern_is_a_name(slide, checkpoint, tmp_path, capsys):
    odd = slide.with_name("a [1] *.tif")
    slide.rename(odd)
    for _ in range(2):
        infer(tmp_path / "out", "--ckpt", checkpoint, "--images", odd)
    assert "1 of them finished already" in capsys.readouterr().out
    assert table_of(tmp_path / "out" / "counts.csv")[0]["image"] == "a [1] *"


def test_results_do_not_go_into_the_folder_of_the_images(slide, checkpoint):
    with pytest.raises(InputError, match="--image_folder: found input in"):
        infer(slide.parent, "--ckpt", checkpoint, "--images", slide)
    assert [path.name for path in slide.parent.iterdir()] == ["big.tif"]


@pytest.mark.parametrize("name", ["counts.csv", "status.csv", "report.html", "big_labels.tif"])
def test_files_in_a_folder_without_records_are_not_overwritten(slide, checkpoint, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    (tmp_path / "mine" / "notes.txt").touch()  # which is in nobody's way
    for more in ([], ["--overwrite"]):
        with pytest.raises(
            InputError, match=f"found {name} in .* without the folder rows"
        ) as error:
            infer(tmp_path / "mine", "--ckpt", checkpoint, "--images", slide, *more)
        assert "\n" not in str(error.value)
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {name, "notes.txt"}
    assert (tmp_path / "mine" / name).read_text() == "mine"
    (tmp_path / "mine" / name).rename(tmp_path / "mine" / "small_labels.tif")  # of no image here
    infer(tmp_path / "mine", "--ckpt", checkpoint, "--images", slide)


@pytest.mark.parametrize("flag", ["--regions", "--tissue"])
@pytest.mark.parametrize("link", [False, True])
def test_files_given_to_a_call_are_not_overwritten_by_it(slide, checkpoint, tmp_path, flag, link):
    """Nor in a folder that has results of an earlier call."""
    out, given = tmp_path / "out", tmp_path / "out"
    (out / "rows").mkdir(parents=True)
    file = out / "big_labels.tif"
    tifffile.imwrite(file, np.tri(320, 400, dtype=np.uint8))
    before = file.read_bytes()
    if link:
        given = tmp_path / "given"
        given.mkdir()
        (given / "big.tif").symlink_to(file)
    with pytest.raises(InputError, match="among the files of this call, which results in"):
        infer(out, "--ckpt", checkpoint, "--images", slide, flag, given)
    assert file.read_bytes() == before
    assert sorted(path.name for path in out.rglob("*")) == ["big_labels.tif", "rows"]


def test_a_table_of_pixel_sizes_is_not_overwritten(slide, checkpoint, tmp_path):
    table = tmp_path / "out" / "counts.csv"
    (tmp_path / "out" / "rows").mkdir(parents=True)
    table.write_text("image,pixel_size_um\nbig,0.25\n")
    with pytest.raises(InputError, match=r"counts\.csv among the files of this call"):
        infer(table.parent, "--ckpt", checkpoint, "--images", slide, "--pixel_sizes", table)
    assert table.read_text() == "image,pixel_size_um\nbig,0.25\n"


def test_a_loop_of_links_is_one_line(slide, checkpoint, tmp_path):
    loop, images = tmp_path / "loop", ["--ckpt", checkpoint, "--images"]
    loop.symlink_to(tmp_path / "back")
    (tmp_path / "back").symlink_to(loop)
    with pytest.raises(
        InputError, match=f"{loop}: found a link that leads nowhere, expected a folder"
    ):
        infer(loop, *images, slide)
    with pytest.raises(FileNotFoundError, match=f"{loop}: no such file or folder"):
        infer(tmp_path / "out", *images, loop)
    (slide.parent / "a.png").symlink_to(slide.parent / "a.png")
    with pytest.raises(InputError, match=r"a\.png: found a link to a file that is not there"):
        infer(tmp_path / "out", *images, slide.parent)
    assert not (tmp_path / "out").exists()


def test_without_masks_no_reference_of_an_earlier_run_stays(slide, checkpoint, tmp_path):
    (tmp_path / "masks").mkdir()
    write_image(tmp_path / "masks" / "big.png", np.ones((320, 400), bool))
    results, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", slide]
    infer(results, *flags, "--masks", tmp_path / "masks")
    assert (results / "big_gt.png").exists() and (results / "big_errors.png").exists()
    infer(results, *flags)
    assert not (results / "big_gt.png").exists() and not (results / "big_errors.png").exists()


def test_results_of_other_settings_are_made_anew(slide, checkpoint, tmp_path, capsys):
    for threshold in ("0.4", "0.6"):
        flags = ["--ckpt", checkpoint, "--images", slide, "--threshold", threshold]
        infer(tmp_path / "out", *flags)
        assert "finished already" not in capsys.readouterr().out


def test_an_image_of_another_pixel_size_is_predicted_at_the_networks(
    slide, checkpoint, tmp_path, capsys
):
    """An image of twice the pixels a micrometre has the mask of the image, twice as large."""
    image = tifffile.imread(slide)
    twice = np.repeat(np.repeat(image, 2, axis=0), 2, axis=1)
    tifffile.imwrite(tmp_path / "twice.tif", twice, photometric="rgb")
    infer(tmp_path / "a", "--ckpt", checkpoint, "--images", slide)
    flags = ["--ckpt", checkpoint, "--images", tmp_path / "twice.tif"]
    infer(tmp_path / "b", *flags, "--pixel_size", 0.125)
    assert "No pixel size" not in capsys.readouterr().out
    mask = masks.read_mask(tmp_path / "a" / "big_prediction.png")
    found = masks.read_mask(tmp_path / "b" / "twice_prediction.png")
    assert found.shape == (640, 800)
    shrunken = cv2.resize(found.astype(np.float32), (400, 320), interpolation=cv2.INTER_AREA)
    assert ((shrunken > 0.5) == mask).mean() > 0.95

    infer(tmp_path / "c", *flags)
    assert "No pixel size in twice" in capsys.readouterr().out
    assert (masks.read_mask(tmp_path / "c" / "twice_prediction.png") != found).any()


def test_a_pyramid_is_predicted_from_the_level_of_the_networks_pixel_size(
    checkpoint, tmp_path, all_are_big
):
    picture = draw_tissue(300, 410, seed=4).image
    write_ome_pyramid(tmp_path / "slide.ome.tif", picture)
    flags = ["--ckpt", checkpoint, "--images", tmp_path / "slide.ome.tif", "--pixel_size", 0.125]
    infer(tmp_path / "out", *flags)
    assert masks.read_mask(tmp_path / "out" / "slide_prediction.tif").shape == (300, 410)


@pytest.mark.parametrize("name", ["net.pt2", "net.onnx"])
def test_an_exported_network_says_what_it_takes(checkpoint, tmp_path, capsys, name):
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime", reason="the ONNX export needs its packages")
        pytest.importorskip("onnxscript", reason="the ONNX export needs its packages")
    infer(tmp_path / "out", "--ckpt", checkpoint, "--export_model", tmp_path / name)
    assert "multiples of 16" in capsys.readouterr().out
    sizes = [(1, 3, 64, 96), (3, 3, 160, 32)]
    for size in sizes:
        pixels = torch.rand(size) * 255
        if name.endswith("pt2"):
            found = torch.export.load(tmp_path / name).module()(pixels)
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(tmp_path / name)
            found = session.run(None, {"images": pixels.numpy()})[0]
        assert tuple(found.shape) == (size[0], 1, *size[2:])
        assert 0 <= found.min() <= found.max() <= 1


@pytest.mark.parametrize(
    "flags,text",
    [
        (["--tile_size", 100], "--tile_size: found 100, expected a multiple of 16"),
        (
            ["--tile_size", 64, "--overlap", 96],
            "--overlap 96 --tile_size 64: found more overlap than tile",
        ),
        (["--overlap", 10], "--overlap: found 10, expected a multiple of 16"),
        (["--tile_size", 0], "--tile_size: found 0"),
        (["--tile_size", 10**9], "--tile_size: found 1000000000, expected 1 or more and at most"),
        (["--overlap", -16], "--overlap: found -16"),
        (["--overlap", 16 * 10**9], "--overlap: found 16000000000"),
        (["--overlap", 2048], "--overlap 2048 --tile_size 1024: found more overlap than tile"),
        (["--batch_size", -1], "--batch_size: found -1"),
        (["--batch_size", "9" * 400], "--batch_size: found 9"),
        (["--gpu_id", -5], "--gpu_id: found -5"),
        (["--pixel_size", 0], "--pixel_size: found 0"),
        (["--pixel_size", "nan"], "--pixel_size: found nan"),
        (["--pixel_size", "inf"], "--pixel_size: found inf"),
        (["--pixel_size", 250], "--pixel_size: found 250"),
        (["--pixel_size", 0.00025], "--pixel_size: found 0.00025"),
        (["--threshold", "nan"], "--threshold: found nan"),
        (["--threshold=-inf"], "--threshold: found -inf"),
        (["--export_model", "net.bin"], "expected a name in .pt2 or .onnx"),
        (["--split", "h=0.1", "sigma=1", "h=0.2"], "--split: found h twice, expected it once"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(slide, checkpoint, tmp_path, flags, text):
    with pytest.raises(InputError, match=text):
        infer(tmp_path / "out", "--ckpt", checkpoint, "--images", slide, *flags)
    assert not (tmp_path / "out").exists()


# --- nuclei


@pytest.fixture
def labelled(tmp_path):
    """A root with one drawn validation image of 160 x 160 pixels, its mask and its label map."""
    root = tmp_path / "data"
    for folder in ("tissue_images", "mask binary", "instance_labels"):
        (root / folder).mkdir(parents=True)
    for number in (3, 4):
        tissue = draw_tissue(160, 160, seed=number)
        write_image(root / "tissue_images" / f"a_0{number}.png", tissue.image)
        write_image(root / "mask binary" / f"a_0{number}.png", tissue.labels > 0)
        labels = tissue.labels.astype(np.uint16)
        tifffile.imwrite(root / "instance_labels" / f"a_0{number}.tif", labels)
    cut(root, "--val_pattern", "*03.png")
    return root


def test_nuclei_are_compared_with_the_label_map_and_exported(
    labelled, checkpoint, tmp_path, capsys
):
    results = tmp_path / "out"
    flags = ["--root", labelled, "--ckpt", checkpoint, "--export", "--check_exports"]
    infer(results, *flags)
    truth = tifffile.imread(labelled / "instance_labels" / "a_03.tif")
    (row,) = table_of(results / "counts.csv")
    assert int(row["gt_nuclei"]) == len(np.unique(truth)) - 1
    labels = tifffile.imread(results / "a_03_labels.tif")
    assert int(row["nuclei"]) == labels.max() > 0
    assert float(row["aji"]) == pytest.approx(naive_aji(labels, truth), abs=1e-4)
    assert float(row["pq"]) == pytest.approx(naive_pq(labels, truth), abs=1e-4)
    (errors,) = table_of(results / "errors.csv")
    assert int(errors["true"]) == int(row["gt_nuclei"])
    kinds = ("matched", "missed", "merged", "split")
    assert sum(int(errors[kind]) for kind in kinds) == int(errors["true"])
    labels = tifffile.imread(results / "a_03_labels.tif")
    assert labels.max() == int(row["nuclei"]) == len(table_of(results / "a_03_nuclei.csv"))
    assert int(row["nuclei_in_frame"]) <= int(row["nuclei"])
    files = "a_03_nuclei.csv, a_03_nuclei.geojson, a_03_rois.zip, a_03_coco.json, a_03_labels.tif"
    assert f"the same in {files}" in capsys.readouterr().out


def test_nuclei_of_a_big_image_are_those_of_a_small_one(slide, checkpoint, tmp_path, monkeypatch):
    flags = ["--ckpt", checkpoint, "--images", slide, "--check_exports", *TILES]
    infer(tmp_path / "small", *flags)
    monkeypatch.setattr(windows, "BIG", 1)
    infer(tmp_path / "big", *flags, "--export", "csv")
    tables = [table_of(tmp_path / name / "big_nuclei.csv") for name in ("small", "big")]
    for table in tables:
        for nucleus in table:
            nucleus.pop("id")
        table.sort(key=lambda nucleus: (float(nucleus["y"]), float(nucleus["x"])))
    assert tables[0] == tables[1] and len(tables[0]) > 20


@pytest.mark.parametrize("kind", ["label map", "mask"])
def test_a_big_image_is_scored_as_a_small_one(slide, checkpoint, tmp_path, monkeypatch, kind):
    """Nucleus by nucleus, too: by the numbers of a label map, or by a mask that is split."""
    labels = draw_tissue(320, 400, seed=1).labels.astype(np.uint16) * 3  # numbers with gaps
    folder = tmp_path / ("instance_labels" if kind == "label map" else "masks")
    folder.mkdir()
    pixels = labels if kind == "label map" else np.where(labels > 0, 255, 0).astype(np.uint8)
    tifffile.imwrite(folder / "big.tif", pixels, tile=(64, 64))
    flags = ["--ckpt", checkpoint, "--images", slide, "--masks", folder, *TILES]
    infer(tmp_path / "small", *flags)
    monkeypatch.setattr(windows, "BIG", 1)
    infer(tmp_path / "big", *flags)
    for table in ("counts.csv", "errors.csv"):
        rows = [table_of(tmp_path / name / table)[0] for name in ("small", "big")]
        for row in rows:
            row.pop("seconds", None)
        assert rows[0] == rows[1]
    if kind == "label map":
        (row,) = table_of(tmp_path / "big" / "counts.csv")
        assert int(row["gt_nuclei"]) == len(np.unique(labels)) - 1
    for picture in ("gt", "errors"):
        small, big = (
            images.read_image(tmp_path / name / f"big_{picture}.png") for name in ("small", "big")
        )
        np.testing.assert_array_equal(small, big)


def test_split_changes_what_a_nucleus_is_and_is_recorded(slide, checkpoint, tmp_path):
    counts = []
    for number, smallest in enumerate((0, 30)):
        results = tmp_path / str(number)
        infer(results, "--ckpt", checkpoint, "--images", slide, "--split", f"smallest={smallest}")
        counts.append(int(table_of(results / "counts.csv")[0]["nuclei"]))
        assert f"smallest={smallest}" in (results / "report.html").read_text()
    assert counts[0] > counts[1]


@pytest.mark.parametrize(
    "change", ["size=3", "h", "h=much", "sigma=-1", "h=nan", "sigma=1e9", "hole=1e300"]
)
def test_a_split_that_is_none_is_named(slide, checkpoint, tmp_path, change):
    with pytest.raises(InputError, match=f"--split: found {change}, expected NAME=NUMBER"):
        infer(tmp_path / "out", "--ckpt", checkpoint, "--images", slide, "--split", change)


def test_a_label_map_of_another_size_is_named(labelled, checkpoint, tmp_path):
    tifffile.imwrite(labelled / "instance_labels" / "a_03.tif", np.eye(7, dtype=np.uint16) * 3 + 1)
    with pytest.raises(InputError, match=r"a_03\.tif: found a label map of 7 x 7"):
        infer(tmp_path / "out", "--root", labelled, "--ckpt", checkpoint)


def test_training_chooses_the_split_on_label_maps_and_inference_uses_it(tmp_path):
    root = tmp_path / "data"
    for folder in ("tissue_images", "instance_labels"):
        (root / folder).mkdir(parents=True)
    for number in range(6):
        tissue = draw_tissue(128, 128, seed=number)
        write_image(root / "tissue_images" / f"{number}.png", tissue.image)
        labels = tissue.labels.astype(np.uint16)
        tifffile.imwrite(root / "instance_labels" / f"{number}.tif", labels)
    cut(root, "--val_pattern", "[1-5].png")
    run = learn(root, tmp_path)
    assert "chosen on 5 images with label maps: Dice" in (run / "train.log").read_text()
    checkpoint = torch.load(run / "best.pt", weights_only=True)
    assert set(checkpoint["split"]) == set(nuclei.Split._fields)
    torch.save(checkpoint | {"split": checkpoint["split"] | {"h": 0.35}}, run / "best.pt")
    infer(tmp_path / "out", "--root", root, "--ckpt", run)
    assert " h=0.35 " in (tmp_path / "out" / "report.html").read_text()


# --- the folder of results


@pytest.fixture
def pictures(tmp_path):
    """A folder with three drawn images of 80 x 90 pixels, a, b and c, and one with their masks."""
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        tissue = draw_tissue(80, 90, seed=seed)
        for folder, pixels in (("images", tissue.image), ("masks", tissue.labels > 0)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_image(tmp_path / folder / f"{name}.png", pixels)
    return tmp_path / "images"


def names_in(results):
    page = (results / "report.html").read_text(encoding="utf-8")
    names = [row["image"] for row in table_of(results / "counts.csv")]
    assert [name for name in names if f'data-value="{name}"' in page] == names
    return names


def times(results, *endings):
    paths = [path for path in sorted(results.iterdir()) if path.name.endswith(endings)]
    return {path.name: path.stat().st_mtime_ns for path in paths}


def test_images_of_several_calls_are_all_in_the_tables(pictures, checkpoint, tmp_path, capsys):
    results = tmp_path / "out"
    for name in "abc":
        infer(results, "--ckpt", checkpoint, "--images", pictures / f"{name}.png")
    assert "2 images of earlier calls" in capsys.readouterr().out
    assert names_in(results) == ["a", "b", "c"]
    infer(tmp_path / "at once", "--ckpt", checkpoint, "--images", pictures)
    tables = [table_of(folder / "counts.csv") for folder in (results, tmp_path / "at once")]
    for row in tables[0] + tables[1]:
        row.pop("seconds")
    assert tables[0] == tables[1]


def test_results_of_another_image_of_the_same_name_stay(pictures, checkpoint, tmp_path, capsys):
    project = tmp_path / "project"
    for patient, name in (("patient1", "a"), ("patient2", "b")):
        for folder in (project / patient, project / patient / "images"):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(pictures / f"{name}.png", folder / "HE.png")
    out, flags = project / "out", ["--ckpt", checkpoint, "--images"]
    infer(project / "deep", *flags, project / "patient1" / "images" / "HE.png")
    with pytest.raises(InputError, match=r"patient1/images/HE\.png\) in "):
        infer(project / "deep", *flags, project / "patient2" / "images" / "HE.png")
    infer(out, *flags, project / "patient1" / "HE.png")
    before = fingerprint(out)
    with pytest.raises(InputError) as error:
        infer(out, *flags, project / "patient2" / "HE.png")
    assert str(error.value) == (
        f"{project}/patient2/HE.png: found results of another image of this name "
        f"({project}/patient1/HE.png) in {out}, expected another --image_folder, or --overwrite"
    )
    assert fingerprint(out) == before

    # The same image: in a project that was moved, in a folder that was renamed, edited in place.
    project, out = project.rename(tmp_path / "moved"), tmp_path / "moved" / "out"
    capsys.readouterr()
    infer(out, *flags, project / "patient1" / "HE.png")
    assert "1 of them finished already" in capsys.readouterr().out
    renamed = (project / "patient1").rename(project / "first patient")
    infer(out, *flags, renamed / "HE.png")
    assert "1 of them finished already" in capsys.readouterr().out
    renamed.rename(project / "patient1")
    shutil.copy(pictures / "c.png", project / "patient1" / "HE.png")
    infer(out, *flags, project / "patient1" / "HE.png")
    assert "finished already" not in capsys.readouterr().out

    infer(out, *flags, project / "patient2" / "HE.png", "--overwrite")
    record = json.loads((out / "rows" / "HE.json").read_text())
    assert record["row"]["source"] == "../patient2/HE.png"
    record["row"].pop("source")  # as versions before wrote it: of which image nobody knows
    record["sha256"] = seal(record)
    (out / "rows" / "HE.json").write_text(json.dumps(record))
    infer(out, *flags, project / "patient1" / "HE.png")


@pytest.mark.parametrize(
    ("flags", "is_known"), [((), True), (("--threshold", 0.6), False), (("--tta",), False)]
)
def test_counts_say_by_how_much_they_may_be_off(
    pictures, checkpoint, tmp_path, capsys, flags, is_known
):
    """Where the network is used as it was when that was measured, and no reference tells it."""
    content = torch.load(checkpoint, weights_only=True)
    told = tmp_path / "told.pt"
    torch.save(content | {"count_error": {"mean": 0.237, "images": 9}}, told)
    infer(tmp_path / "out", "--ckpt", told, "--images", pictures, *flags)
    said = capsys.readouterr().out
    assert ("not learned were off by 24 % in the mean" in said) is is_known
    for row in table_of(tmp_path / "out" / "counts.csv"):
        assert row.get("expected_count_error") == ("0.2370" if is_known else None)
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("expected count error" in page) is is_known


def test_other_settings_stay_in_the_tables_and_are_said(pictures, checkpoint, tmp_path, capsys):
    results, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images"]
    infer(results, *flags, pictures / "a.png", pictures / "b.png")
    assert "same settings" not in (results / "report.html").read_text()
    infer(results, *flags, pictures / "c.png", "--threshold", 0.6, "--masks", tmp_path / "masks")
    assert names_in(results) == ["a", "b", "c"]
    assert [bool(row["dice"]) for row in table_of(results / "counts.csv")] == [False, False, True]
    page = (results / "report.html").read_text()
    assert "same settings: other threshold" in page
    assert "0.5 (2 images); 0.6 (1 image)" in page
    assert "same settings: other threshold" in capsys.readouterr().out


def test_why_images_are_made_anew_and_which_scores_go_is_said(
    pictures, checkpoint, tmp_path, capsys
):
    out, masks = tmp_path / "out", tmp_path / "masks"
    flags = ["--ckpt", checkpoint, "--images", pictures]
    for name in "abc":
        write_regions(tmp_path / "regions" / f"{name}.geojson", feature(box(0, 0, 40, 40), "Tumor"))
    infer(out, *flags, "--masks", masks, "--regions", tmp_path / "regions")
    assert "made anew" not in capsys.readouterr().out
    (tmp_path / "regions" / "b.geojson").unlink()
    infer(out, *flags, "--masks", masks, "--regions", tmp_path / "regions")
    said = capsys.readouterr().out.splitlines()
    assert "b: regions of an earlier call stay in regions.csv" in said
    assert "b" in [row["image"] for row in table_of(out / "regions.csv")]
    infer(out, *flags, "--threshold", 0.6, "--regions", tmp_path / "regions")
    said = capsys.readouterr().out.splitlines()
    assert "a, b, c: results have other threshold, reference; made anew" in said
    assert "a, b, c: scores of an earlier call go, this one has no reference" in said
    assert "b: regions of an earlier call go, this one has none" in said
    assert not any(row["dice"] for row in table_of(out / "counts.csv"))
    infer(out, *flags, "--threshold", 0.6, "--regions", tmp_path / "regions", "--overwrite")
    assert "of an earlier call go" not in capsys.readouterr().out
    infer(out, *flags, "--threshold", 0.6, "--pixel_size", 0.25)
    said = capsys.readouterr().out.splitlines()
    assert "a, b, c: results have other pixel size; made anew" in said
    assert "a, c: regions of an earlier call go, this one has none" in said
    write_image(pictures / "c.png", draw_tissue(80, 90, seed=9).image)
    infer(out, *flags, "--threshold", 0.6, "--pixel_size", 0.25)
    said = capsys.readouterr().out.splitlines()
    assert "c: results have other image; made anew" in said
    assert "2 of them finished already; --overwrite redoes them" in said


def test_an_image_without_its_results_leaves_the_tables(pictures, checkpoint, tmp_path, capsys):
    results, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images"]
    infer(results, *flags, pictures)
    (results / "a_labels.tif").unlink()
    (results / "b_image.png").write_bytes(b"")
    infer(results, *flags, pictures / "c.png")
    assert names_in(results) == ["c"]
    assert "a_labels.tif: gone or changed" in capsys.readouterr().out


@pytest.mark.parametrize("big", [False, True])
def test_exports_stay_and_come_later_without_predicting_again(
    slide, checkpoint, tmp_path, monkeypatch, capsys, big
):
    if big:
        monkeypatch.setattr(windows, "BIG", 1)
    flags = ["--ckpt", checkpoint, "--images", slide, *TILES]
    infer(tmp_path / "at once", *flags, "--export")
    results = tmp_path / "out"
    infer(results, *flags)
    predicted = times(results, "_prediction.png", "_prediction.tif", "_overlay.png", "_image.png")
    assert len(predicted) == 3 and not (results / "big_rois.zip").exists()
    infer(results, *flags, "--export", "--check_exports")
    own = ["nuclei.parquet", "nuclei.geojson.gz"] if big else ["nuclei.csv", "nuclei.geojson"]
    endings = [*own, "rois.zip", "coco.json", "labels.tif"]
    files = ", ".join(f"big_{ending}" for ending in endings)
    out = capsys.readouterr().out
    assert f"the same in {files}" in out and "exported from the masks" in out
    exported = fingerprint(results)
    for ending in endings:
        assert (results / f"big_{ending}").read_bytes() == (
            tmp_path / "at once" / f"big_{ending}"
        ).read_bytes()
    infer(results, *flags)  # without --export
    assert times(results, *predicted) == predicted
    again = fingerprint(results)
    assert {path for path in exported if exported[path] != again[path]} <= {
        results / name
        for name in (*TABLES, STATUS, "rows/.tables", "rows/.written")  # made by each call
    }
    if importlib.util.find_spec("anndata"):
        capsys.readouterr()
        infer(results, *flags, "--export", "csv", "anndata", "--check_exports")
        both = [f"big_{ending}" for ending in dict.fromkeys(["nuclei.csv", *own, "rois.zip"])]
        both += ["big_coco.json", "big_nuclei.h5ad", "big_labels.tif"]
        assert f"the same in {', '.join(both)}" in capsys.readouterr().out
        assert times(results, *predicted) == predicted  # and what was exported before stays


def test_big_results_of_before_get_the_new_files_without_predicting(
    slide, checkpoint, tmp_path, monkeypatch, all_are_big, capsys
):
    flags, results = ["--ckpt", checkpoint, "--images", slide, *TILES], tmp_path / "out"
    with monkeypatch.context() as before:
        before.setattr(exports, "BIG", exports.SMALL)
        infer(results, *flags)
    predicted = times(results, "_prediction.tif")
    assert (results / "big_nuclei.geojson").is_file()
    infer(results, *flags, "--check_exports")
    out = capsys.readouterr().out
    assert "exported from the masks" in out and times(results, *predicted) == predicted
    assert "the same in big_nuclei.csv, big_nuclei.parquet, big_nuclei.geojson.gz, big_lab" in out
    assert not (results / "big_nuclei.geojson").exists()  # two annotations of one image


def test_an_export_that_is_none_or_lacks_its_package_is_refused(
    pictures, checkpoint, tmp_path, monkeypatch, capsys
):
    flags = ["--ckpt", checkpoint, "--images", pictures / "a.png", "--export"]
    with pytest.raises(SystemExit) as exit_:
        infer(tmp_path / "out", *flags, "excel")
    assert exit_.value.code == 2 and "invalid choice: 'excel'" in capsys.readouterr().err
    monkeypatch.setattr(nuclei_tables, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="found no package anndata, expected it"):
        infer(tmp_path / "out", *flags, "anndata")
    assert not (tmp_path / "out").exists()


def test_overwrite_redoes_and_exports_what_was_exported(pictures, checkpoint, tmp_path):
    results, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", pictures / "a.png"]
    infer(results, *flags, "--export")
    before = times(results, "")
    infer(results, *flags, "--overwrite")
    after = times(results, "")
    assert set(before) == set(after)
    names = {"a_prediction.png", "a_rois.zip", "a_coco.json", "a_labels.tif", "a_nuclei.csv"}
    assert all(after[name] > before[name] for name in names)


ALL_FILES = ["prediction.png", "image.png", "overlay.png", "gt.png", "errors.png", "labels.tif"]
ALL_FILES += ["nuclei.csv", "nuclei.geojson", "rois.zip", "coco.json"]
ALL_FILES += ["review.csv", "review.geojson", "review.jpg"]


@pytest.mark.parametrize("change", ["deleted", "emptied", "cut", "a link"])
def test_a_file_that_was_deleted_or_cut_is_made_anew(
    pictures, checkpoint, tmp_path, capsys, change
):
    results = tmp_path / "out"
    flags = ["--ckpt", checkpoint, "--images", pictures / "a.png", "--masks", tmp_path / "masks"]
    infer(results, *flags, "--export")
    whole = {name: (results / f"a_{name}").read_bytes() for name in ALL_FILES}
    for name in ALL_FILES:
        path = results / f"a_{name}"
        path.unlink()
        if change == "a link":
            (tmp_path / "elsewhere").write_bytes(whole[name])
            path.symlink_to(tmp_path / "elsewhere")
        elif change != "deleted":
            path.write_bytes(whole[name][: -1 if change == "cut" else 0])
        infer(results, *flags, "--check_exports")
        out = capsys.readouterr().out
        assert f"a_{name}: gone or changed since the image was finished; made anew" in out
        assert "pixels, the same in a_nuclei.csv, a_nuclei.geojson, a_rois.zip" in out
        assert not path.is_symlink()
        assert {name: (results / f"a_{name}").read_bytes() for name in ALL_FILES} == whole


def corrected(path, text):
    """What a person makes of a file of results, saved over it."""
    path.write_text(text)
    return path


def test_a_table_with_a_column_of_the_user_s_is_kept(pictures, checkpoint, tmp_path, capsys):
    out, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", pictures / "a.png"]
    infer(out, *flags, "--masks", tmp_path / "masks")
    infer(out, *flags, "--masks", tmp_path / "masks")  # nobody has changed anything
    assert "kept as" not in capsys.readouterr().out and not list(out.glob("*.changed*"))
    names = "counts.csv", "errors.csv", "review.csv"
    mine = {name: (out / name).read_text().replace("image,", "image,patient,") for name in names}
    for more in ([], ["--overwrite"], ["--report_only"]):
        for name in names:
            (out / name).write_text(mine[name])
        infer(out, *flags, "--masks", tmp_path / "masks", *more)
        said = capsys.readouterr().out.splitlines()
        number = "" if not more else "-2" if "--overwrite" in more else "-3"
        for name in names:
            kept = out / f"{name}.changed{number}"
            assert f"{out / name}: changed since it was written; kept as {kept.name}" in said
            assert kept.read_text() == mine[name]
            assert "patient" not in (out / name).read_text()


def test_tables_of_images_that_are_not_whole_any_more_are_kept(pictures, checkpoint, tmp_path):
    out, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", pictures / "a.png"]
    infer(out, *flags, "--masks", tmp_path / "masks")
    there = [out / name for name in TABLES if (out / name).is_file()]
    tables = {path: path.read_bytes() for path in there}
    assert {"counts.csv", "errors.csv", "review.csv", "report.html"} == {p.name for p in there}
    (out / "a_labels.tif").unlink()
    with pytest.raises(InputError, match=r"no image whose results are whole.*a_labels\.tif"):
        infer(out, "--report_only")
    assert {path: path.read_bytes() for path in there} == tables
    said = write_summary(out, {"a"})  # of a call that could not finish it
    for path, text in tables.items():
        assert not path.exists() and path.with_name(f"{path.name}.changed").read_bytes() == text
        assert f"kept as {path.name}.changed" in "\n".join(said)


@pytest.mark.parametrize("memory", [None, "", "[]", '{"counts.csv": 3', "\udcff"])
def test_tables_that_no_call_remembers_are_written_anew(pictures, checkpoint, tmp_path, memory):
    """As those of earlier versions."""
    out, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", pictures / "a.png"]
    infer(out, *flags)
    (out / "counts.csv").write_text("image\na\n")
    (out / "rows" / ".written").unlink()
    if memory is not None:
        (out / "rows" / ".written").write_text(memory, errors="surrogateescape")
    infer(out, *flags)
    assert table_of(out / "counts.csv")[0]["nuclei"] and not list(out.glob("*.changed*"))


@pytest.mark.parametrize("settings", [[], ["--threshold", 0.6]])
def test_a_corrected_file_is_kept_before_the_image_is_made_anew(
    pictures, checkpoint, tmp_path, capsys, settings
):
    out, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", pictures / "a.png"]
    infer(out, *flags, "--export")
    made = corrected(out / "a_nuclei.geojson", "corrected").with_name("a_nuclei.geojson.changed")
    corrected(out / "a_rois.zip", "corrected too")
    (out / "a_nuclei.csv").unlink()
    capsys.readouterr()
    infer(out, *flags, *settings)
    line = next(line for line in capsys.readouterr().out.splitlines() if "changed" in line)
    assert "a_nuclei.geojson" in line.partition(": gone or changed")[0] and "made anew" in line
    assert line.endswith(
        "made anew, the changed a_nuclei.geojson kept as a_nuclei.geojson.changed, "
        "a_rois.zip kept as a_rois.zip.changed"
    )
    assert made.read_text() == "corrected"
    assert (out / "a_rois.zip.changed").read_text() == "corrected too"
    assert not (out / "a_nuclei.csv.changed").exists() and (out / "a_nuclei.csv").is_file()
    assert json.loads((out / "a_nuclei.geojson").read_text())["features"]

    corrected(out / "a_nuclei.geojson", "corrected again")  # never instead of the first
    infer(out, *flags, *settings)
    assert "kept as a_nuclei.geojson.changed-2" in capsys.readouterr().out
    assert made.read_text() == "corrected"
    assert (out / "a_nuclei.geojson.changed-2").read_text() == "corrected again"


@pytest.mark.parametrize("ending", ["nuclei.geojson", "nuclei.csv", "rois.zip", "coco.json"])
def test_a_correction_of_the_same_length_is_kept(pictures, checkpoint, tmp_path, capsys, ending):
    out, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", pictures / "a.png"]
    infer(out, *flags, "--export")
    path = out / f"a_{ending}"
    whole = path.read_bytes()
    mine = whole.replace(b"1", b"2")
    assert len(mine) == len(whole) and mine != whole
    path.write_bytes(mine)
    infer(out, *flags)
    assert f"made anew, the changed {path.name} kept as" in capsys.readouterr().out
    assert path.with_name(f"{path.name}.changed").read_bytes() == mine
    assert path.read_bytes() == whole


def test_a_copy_of_results_is_finished_and_so_are_those_of_earlier_versions(
    pictures, checkpoint, tmp_path, capsys
):
    flags = ["--ckpt", checkpoint, "--images", pictures / "a.png"]
    infer(tmp_path / "out", *flags)
    for copied in ("copy", "earlier"):
        shutil.copytree(tmp_path / "out", tmp_path / copied, copy_function=shutil.copyfile)
    path = tmp_path / "earlier" / "rows" / "a.json"
    record = json.loads(path.read_text())
    del record["marks"], record["sha256"]  # a seal of all the rest, as JSON with sorted keys
    text = json.dumps(record, sort_keys=True).encode()
    path.write_text(json.dumps(record | {"sha256": hashlib.sha256(text).hexdigest()}))
    capsys.readouterr()
    for copied in ("copy", "earlier"):
        infer(tmp_path / copied, *flags)
        out = capsys.readouterr().out
        assert "1 of them finished already" in out and "made anew" not in out


def test_overwrite_keeps_no_corrected_file(pictures, checkpoint, tmp_path):
    out, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", pictures / "a.png"]
    infer(out, *flags)
    corrected(out / "a_nuclei.geojson", "corrected")
    infer(out, *flags, "--overwrite")
    assert json.loads((out / "a_nuclei.geojson").read_text())["features"]
    assert not list(out.glob("*.changed*"))


OWN = {"rois.zip", "gt.png", "coco.json", "tissue.geojson", "density.png", "prediction.tif"}


def own_files(out, name="a", endings=OWN):
    """Put files of the user's where results of an image would lie; {path: bytes}."""
    mine = {out / f"{name}_{ending}": f"my own {ending}".encode() for ending in endings}
    for path, text in mine.items():
        path.write_bytes(text)
    return mine


def assert_kept(mine, said):
    for path, text in mine.items():
        assert path.with_name(f"{path.name}.changed").read_bytes() == text
        assert f"{path.name} kept as {path.name}.changed" in said
    assert len(list(path.parent.glob("*.changed*"))) == len(mine)


def test_own_files_beside_results_are_kept_before_the_image_is_made_anew(
    pictures, checkpoint, tmp_path, capsys
):
    out, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", pictures / "a.png"]
    infer(out, *flags, "--export", "rois")
    made = (out / "a_rois.zip").read_bytes()
    mine = own_files(out, endings=OWN - {"rois.zip"})
    (out / "a_errors.png").touch()  # nothing is in it
    infer(out, *flags, "--export", "rois")  # nothing is to be done
    infer(out, *flags, "--report_only")
    assert all(path.read_bytes() == text for path, text in mine.items())
    capsys.readouterr()
    infer(out, *flags, "--threshold", 0.6)
    said = capsys.readouterr().out
    assert f"{out}: found files beside the results of a that are not ours: " in said
    assert_kept(mine, said)  # and not the ROIs, which are of the call before
    assert not [path for path in mine if path.exists()] and not (out / "a_errors.png").exists()
    assert (out / "a_rois.zip").read_bytes() != made
    infer(out, *flags, "--threshold", 0.6)
    assert "kept as" not in capsys.readouterr().out
    mine = own_files(out, endings={"coco.json"})
    infer(out, *flags, "--overwrite")  # keeps nothing
    assert not (out / "a_coco.json").exists() and len(list(out.glob("*.changed*"))) == len(OWN) - 1


def test_own_outlines_beside_a_slide_s_are_kept_when_it_is_exported(
    slide, checkpoint, tmp_path, all_are_big, capsys
):
    """As corrected in QuPath, and exported there without compression."""
    out, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", slide, *TILES]
    infer(out, *flags)
    mine = own_files(out, "big", {"nuclei.geojson"})
    infer(out, *flags, "--export")
    assert_kept(mine, capsys.readouterr().out)
    assert not (out / "big_nuclei.geojson").exists() and (out / "big_nuclei.geojson.gz").is_file()


def test_own_exports_beside_a_small_image_s_are_kept_when_others_are_made(
    pictures, checkpoint, tmp_path, capsys
):
    out, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", pictures / "a.png"]
    infer(out, *flags)
    mine = own_files(out, endings={"nuclei.geojson.gz", "coco.json", "rois.zip"})
    infer(out, *flags, "--export", "rois")
    assert_kept(mine, capsys.readouterr().out)
    assert zipfile.ZipFile(out / "a_rois.zip").namelist()
    assert not (out / "a_coco.json").exists()


KILLED = """
import os, sys

def kill(event, arguments):  # when such a file is to be moved into its place
    if event == "os.rename" and str(arguments[1]).endswith(sys.argv[1]):
        os.kill(os.getpid(), 9)

sys.addaudithook(kill)
import inference
inference.main(inference.parse_args(sys.argv[2:]))
"""


@pytest.mark.parametrize("ending", ["_density.png", "_coco.json", "rows/a.json"])
def test_what_a_killed_call_left_is_not_kept_as_a_file_of_the_user_s(
    pictures, checkpoint, tmp_path, capsys, ending
):
    out, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", pictures / "a.png"]
    flags += ["--pixel_size", 0.25, "--image_folder", out, "--gpu_id", -1]
    infer(out, *flags)
    more = ["--density", "--export", "rois", "coco"][: 1 if "density" in ending else None]
    command = [sys.executable, "-c", KILLED, ending, *flags, *more]
    for _ in range(2):
        done = subprocess.run(
            list(map(str, command)), cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == -9
    capsys.readouterr()
    infer(out, *flags, *more)
    assert "not ours" not in capsys.readouterr().out and not list(out.glob("*.changed*"))
    assert (out / "a_density.png").is_file() and (out / "rows" / "a.json").is_file()


@pytest.mark.parametrize("name", ["regions.csv", "counts.csv"])
def test_a_table_of_the_user_s_own_is_kept(pictures, checkpoint, tmp_path, capsys, name):
    out, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", pictures / "a.png"]
    infer(out, *flags)
    if name == "counts.csv":  # without any record all tables go, and none is remembered
        (out / "rows" / "a.json").write_text("spoilt")
        write_summary(out, {"a"})
        (out / f"{name}.changed").unlink()
    assert not (out / name).exists()
    (out / name).write_text("my,own\n1,2\n")
    capsys.readouterr()
    infer(out, *flags)
    line = f"{out / name}: no table that inference.py wrote; kept as {name}.changed"
    assert line in capsys.readouterr().out.splitlines()
    assert (out / f"{name}.changed").read_text() == "my,own\n1,2\n"


def test_coco_names_a_picture_of_the_height_and_width_that_it_says(
    slide, pictures, checkpoint, tmp_path, monkeypatch
):
    """Of a slide that is the slide itself: the copy beside the file is a small view."""
    out = tmp_path / "out"
    monkeypatch.setattr(windows, "VIEW", 100)
    for image, big, expected in (
        (slide, 1, "../slides/big.tif"),
        (pictures / "a.png", 10**9, "a_image.png"),
    ):
        monkeypatch.setattr(windows, "BIG", big)
        infer(out, "--ckpt", checkpoint, "--images", image, *TILES, "--export", "coco")
        (picture,) = json.loads((out / f"{image.stem}_coco.json").read_text())["images"]
        assert picture["file_name"] == expected
        shape = images.read_image(out / picture["file_name"]).shape[:2]
        assert shape == (picture["height"], picture["width"])


def test_exports_of_a_finished_image_are_checked(pictures, checkpoint, tmp_path, capsys):
    results, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images", pictures / "a.png"]
    infer(results, *flags, "--export")
    path = results / "a_coco.json"
    path.write_text(path.read_text().replace('"id":1,', '"id":9,'))  # as long as it was
    record = json.loads((results / "rows" / "a.json").read_text())
    del record["marks"]  # as of a version that did not notice this
    record["sha256"] = seal(record)
    (results / "rows" / "a.json").write_text(json.dumps(record))
    infer(results, *flags)
    assert "1 of them finished already" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"a_coco\.json: found id 9 at nucleus 1, expected id 1"):
        infer(results, *flags, "--check_exports")


def test_bad_records_are_said_and_their_images_made_anew(pictures, checkpoint, tmp_path, capsys):
    results, flags = tmp_path / "out", ["--ckpt", checkpoint, "--images"]
    infer(results, *flags, pictures)
    expected = table_of(results / "counts.csv")
    record = results / "rows" / "a.json"
    whole = record.read_text()
    for spoiled in (
        "", "{", "null", whole[:-20], whole.replace('"nuclei": ', '"nuclei": -'),
        whole.replace('"height": 80', '"height": NaN'), whole.replace('"image": "a"', '"image": 3'),
        whole.replace('"tissue"', '"tissues"'), (results / "rows" / "b.json").read_text(),
    ):  # fmt: skip
        assert spoiled != whole
        record.write_text(spoiled)
        infer(results, *flags, pictures)
        said = [line for line in capsys.readouterr().out.splitlines() if "a.json: found" in line]
        assert len(said) == 1 and said[0].endswith("made anew")
        found = table_of(results / "counts.csv")
        for row in found + expected:
            row.pop("seconds", None)
        assert found == expected
    record.write_text("{")
    infer(results, *flags, pictures / "c.png")  # of another image: said, and not in the tables
    assert "a.json: found no valid record" in capsys.readouterr().out
    assert names_in(results) == ["b", "c"]


def test_a_second_call_into_the_folder_is_told_who_is_there(pictures, checkpoint, tmp_path):
    results = tmp_path / "out"
    command = [sys.executable, "inference.py", "--gpu_id", "-1", "--ckpt", str(checkpoint)]
    command += ["--images", str(pictures), "--image_folder", str(results)]
    with files.locked(results, "writes results"):
        before = fingerprint(results)
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert fingerprint(results) == before
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"found process {os.getpid()} on" in done.stderr and "writes results" in done.stderr


def test_two_calls_at_once_leave_the_results_of_one(pictures, checkpoint, tmp_path):
    """Each started as a user does, with other settings; who comes second is told, or redoes all."""
    results = tmp_path / "out"
    command = [sys.executable, "inference.py", "--gpu_id", "-1", "--ckpt", str(checkpoint)]
    command += ["--images", str(pictures), "--image_folder", str(results), "--threshold"]
    calls = [
        subprocess.Popen([*command, threshold], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        for threshold in ("0.3", "0.7")
    ]
    said = [one.communicate(timeout=300)[1] for one in calls]
    for one, text in zip(calls, said, strict=True):
        assert one.returncode in (0, 2)
        assert one.returncode == 0 or "writing here with other settings" in text
    assert 0 in [one.returncode for one in calls]
    made = [json.loads(path.read_text()) for path in (results / "rows").glob("*.json")]
    (threshold,) = {record["made_with"]["threshold"] for record in made}
    alone = tmp_path / "alone"
    infer(alone, "--ckpt", checkpoint, "--images", pictures, "--threshold", threshold)
    for path in alone.glob("[abc]_*"):
        assert (results / path.name).read_bytes() == path.read_bytes()


def test_tiles_that_a_killed_run_left_are_removed(slide, checkpoint, tmp_path):
    """One that is killed while it writes tiles of a big image."""
    code = """
import os, sys
import inference
from tissue.store import Store
write = Store.write
def write_and_die(self, *tile):
    write(self, *tile)
    os.kill(os.getpid(), 9)
Store.write = write_and_die
inference.main(inference.parse_args(sys.argv[1:]))
"""
    results = tmp_path / "out"
    flags = ["--ckpt", checkpoint, "--images", slide, *TILES]
    with pytest.raises(AssertionError):
        call(tmp_path, code, [*flags, "--image_folder", results, "--gpu_id", -1], 1)
    assert len(list(results.glob(".*.part"))) == 1
    infer(results, *flags)
    assert not list(results.glob(".*.part*"))
    assert names_in(results) == ["big"]


BEGINNINGS = {"png": b"\x89PNG", "tif": b"II*", "zip": b"PK", "json": b"{", "geojson": b"{"}
BEGINNINGS |= {"html": b"<!DOCTYPE html>"}


def test_links_in_the_folder_are_replaced_and_not_followed(pictures, checkpoint, tmp_path):
    results, victim = tmp_path / "out", tmp_path / "victim"
    (results / "rows").mkdir(parents=True)
    victim.write_text("mine")
    names = [f"a_{name}" for name in ALL_FILES] + ["counts.csv", "errors.csv", "review.csv"]
    names.append("report.html")
    for name in [*names, "rows/a.json", ".lock.txt"]:
        (results / name).symlink_to(victim)
    flags = ["--ckpt", checkpoint, "--images", pictures / "a.png", "--masks", tmp_path / "masks"]
    infer(results, *flags, "--export")
    assert victim.read_text() == "mine"
    assert not [path for path in results.rglob("*") if path.is_symlink()]
    for name in names:
        content = (results / name).read_bytes()
        kind = name.rpartition(".")[2]
        if kind in BEGINNINGS:
            assert content.startswith(BEGINNINGS[kind]), name
        else:
            assert content and content != b"mine", name


def test_a_folder_of_records_that_is_a_link_is_one_line(pictures, checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "rows").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="rows: found a link or a file, expected a folder"):
        infer(tmp_path / "out", "--ckpt", checkpoint, "--images", pictures)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rows"]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["../evil", "../../evil", "/tmp/evil", "a\0b", "x" * 250, ".."])
def test_a_name_in_the_manifest_leads_nowhere(labelled, checkpoint, tmp_path, name):
    manifest = json.loads((labelled / "patches.json").read_text())
    for image in manifest["images"]:
        if image["split"] == "val":
            image["name"] = name
    (labelled / "patches.json").write_text(json.dumps(manifest))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        infer(tmp_path / "some" / "out", "--root", labelled, "--ckpt", checkpoint)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_differ_by_case_alone_are_refused(pictures, checkpoint, tmp_path):
    (pictures / "b.png").rename(pictures / "A.tif")
    with pytest.raises(InputError, match="differ"):
        infer(tmp_path / "out", "--ckpt", checkpoint, "--images", pictures)
    assert not (tmp_path / "out").exists()


def test_two_runs_give_the_same_bytes(pictures, checkpoint, tmp_path):
    for folder in ("one", "two"):
        flags = ["--ckpt", checkpoint, "--images", pictures, "--masks", tmp_path / "masks"]
        infer(tmp_path / folder, *flags, "--export")
        time.sleep(2.1 if folder == "one" else 0)  # a zip tells two seconds apart
    files = [path for path in (tmp_path / "one").iterdir() if path.name[1] == "_"]
    assert len(files) == 3 * len(ALL_FILES)
    for path in [*files, tmp_path / "one" / "errors.csv"]:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path


# --- names and masks


def test_names_of_any_script_work_from_end_to_end(checkpoint, tmp_path):
    """As a command, on a stream that can say ASCII alone."""
    tissue = draw_tissue(80, 90, seed=1)
    images, masks = tmp_path / "Gewebe_ä_日本", tmp_path / "Masken_ä_日本"
    for folder, pixels in ((images, tissue.image), (masks, tissue.labels > 0)):
        folder.mkdir()
        write_image(folder / "bild ü.png", pixels)
    results = tmp_path / "Ergebnis_ä_日本"
    command = [sys.executable, "inference.py", "--gpu_id", "-1", "--ckpt", checkpoint, "--export"]
    command += ["--images", images, "--masks", masks, "--image_folder", results, "--check_exports"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    for said in ("bild \\xfc: ", "1 of them finished already"):
        done = subprocess.run(
            [*map(str, command)], cwd=REPOSITORY, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    assert names_in(results) == ["bild ü"]
    assert all((results / f"bild ü_{name}").stat().st_size for name in ALL_FILES)


def test_another_image_of_the_same_name_size_and_time_is_not_finished(checkpoint, tmp_path, capsys):
    for patient in "12":  # as archives unpack them, with one time for all files
        path = tmp_path / patient / "HE.tif"
        path.parent.mkdir()
        tifffile.imwrite(path, draw_tissue(80, 90, seed=int(patient)).image, photometric="rgb")
        os.utime(path, ns=(10**18, 10**18))
    infer(tmp_path / "out", "--ckpt", checkpoint, "--images", tmp_path / "1" / "HE.tif")
    with pytest.raises(InputError, match="found results of another image of this name"):
        infer(tmp_path / "out", "--ckpt", checkpoint, "--images", tmp_path / "2" / "HE.tif")
    shutil.copy2(tmp_path / "2" / "HE.tif", tmp_path / "1" / "HE.tif")  # in its place
    capsys.readouterr()
    infer(tmp_path / "out", "--ckpt", checkpoint, "--images", tmp_path / "1" / "HE.tif")
    assert "finished already" not in capsys.readouterr().out


def test_images_that_look_like_masks_are_named(pictures, checkpoint, tmp_path, capsys):
    shutil.copy(tmp_path / "masks" / "a.png", pictures / "a_mask.png")
    write_image(pictures / "b.png", np.full((80, 90, 3), 255, np.uint8))  # is no mask
    infer(tmp_path / "out", "--ckpt", checkpoint, "--images", pictures)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "two greys" in line]
    assert line == f"{pictures / 'a_mask.png'}: two greys alone, as of a mask; is it an image?"


def test_flags_that_have_no_effect_with_others_are_named(pictures, checkpoint, tmp_path, capsys):
    out, image = tmp_path / "out", pictures / "a.png"
    infer(out, "--ckpt", checkpoint, "--images", image)
    assert "no effect" not in capsys.readouterr().out
    infer(out, "--report_only", "--threshold", 0.9, "--regions", tmp_path / "nowhere")
    said = capsys.readouterr().out
    assert said.startswith("--report_only: --threshold, --regions have no effect with it\n")
    infer(out, "--ckpt", checkpoint, "--export_model", tmp_path / "net.pt2", "--tta")
    said = capsys.readouterr().out
    assert said.startswith("--export_model: --image_folder, --tta have no effect with it\n")


def test_weights_that_are_not_there_are_told_by_whether_they_were_asked_for(
    pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(inference, "SHIPPED", tmp_path / "nuclei.pt")  # not in the installation
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="part of a checkout; copy them there, or give -"):
        infer(tmp_path / "out", "--images", pictures)
    with pytest.raises(
        FileNotFoundError, match=r"mine\.pt: no such checkpoint; try it without --c"
    ):
        infer(tmp_path / "out", "--images", pictures, "--ckpt", tmp_path / "mine.pt")


def test_masks_are_matched_without_case_and_unicode_form(pictures, checkpoint, tmp_path, capsys):
    masks = tmp_path / "masks"
    (pictures / "a.png").rename(pictures / "B\u00e4r.png")
    (masks / "a.png").rename(masks / "ba\u0308R.png")
    (pictures / "c.png").unlink()
    infer(tmp_path / "out", "--ckpt", checkpoint, "--images", pictures, "--masks", masks)
    assert all(row["dice"] for row in table_of(tmp_path / "out" / "counts.csv"))
    assert "c.png: without an image of that name, passed over" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["mask", "label map", "outlines"])
def test_references_whose_nuclei_are_no_darker_are_named(checkpoint, tmp_path, capsys, kind):
    """Turned by half a turn, they are scored against nuclei that are elsewhere."""
    (tmp_path / "masks").mkdir()
    for name, seed, turned in (("right", 1, 0), ("turned", 1, 2), ("both", 2, 2)):
        tissue = draw_tissue(160, 200, seed=seed)
        labels = np.rot90(tissue.labels, turned).astype(np.uint16)
        image = np.rot90(tissue.image, 2) if name == "both" else tissue.image
        (tmp_path / "images").mkdir(exist_ok=True)
        write_image(tmp_path / "images" / f"{name}.png", np.ascontiguousarray(image))
        if kind == "outlines":
            rings = [
                cv2.findContours(
                    np.uint8(labels == label), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
                )
                for label in range(1, int(labels.max()) + 1)
            ]
            shapes = [Polygon(found[0][:, 0]) for found, _ in rings if len(found[0]) > 3]
            write_regions(tmp_path / "masks" / f"{name}.geojson", *map(feature, shapes))
        else:
            pixels = labels if kind == "label map" else np.uint8(255) * (labels > 0)
            tifffile.imwrite(tmp_path / "masks" / f"{name}.tif", pixels)
    flags = ["--ckpt", checkpoint, "--images", tmp_path / "images", "--masks", tmp_path / "masks"]
    infer(tmp_path / "out", *flags)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no darker" in line]
    assert line.startswith("turned: the nuclei of the mask are no darker than the rest of the ima")
    assert line.endswith(f"Look at {tmp_path / 'out' / '<name>_errors.png'}")


# --- pixel sizes


def sized(path, size):
    image = draw_tissue(80, 90, seed=1).image
    tifffile.imwrite(
        path, image, photometric="rgb", resolution=(1e4 / size,) * 2, resolutionunit="CENTIMETER"
    )


def test_what_is_resampled_is_said_in_a_line_for_each_size(checkpoint, tmp_path, capsys):
    for name, size in (("a", 0.5), ("b", 0.5), ("c", 0.125), ("d", 0.25)):
        sized(tmp_path / f"{name}.tif", size)
    flags = ["--ckpt", checkpoint, "--images"]
    infer(tmp_path / "out", *flags, *(tmp_path / f"{name}.tif" for name in "abcd"))
    out = capsys.readouterr().out
    assert "a, b: 0.5 um a pixel, enlarged 2 times to 0.25 um\n" in out
    assert "c: 0.125 um a pixel, reduced 2 times to 0.25 um\n" in out
    assert out.count("um a pixel") == 2


def test_a_given_pixel_size_that_images_deny_is_said(checkpoint, tmp_path, capsys):
    for name, size in (("a", 0.25), ("b", 0.5), ("c", 0.26)):
        sized(tmp_path / f"{name}.tif", size)
    write_image(tmp_path / "d.png", draw_tissue(80, 90, seed=1).image)  # says nothing
    given = ["--ckpt", checkpoint, "--pixel_size", 0.25, "--images"]
    paths = [tmp_path / name for name in ("a.tif", "b.tif", "c.tif", "d.png")]
    infer(tmp_path / "out", *given, *paths)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if " is taken" in line] == [
        "b.tif says 0.5 um a pixel, 0.25 is taken"
    ]
    sized(tmp_path / "c.tif", 0.4)
    infer(tmp_path / "out", *given, *paths)
    end = "um a pixel, 0.25 is taken (2 of 4 images say otherwise)\n"
    assert end in capsys.readouterr().out
    infer(tmp_path / "told", "--ckpt", checkpoint, "--images", *paths)
    sizes = [
        {row["image"]: row["pixel_size_um"] for row in table_of(tmp_path / folder / "counts.csv")}
        for folder in ("out", "told")
    ]
    assert sizes[0] == dict.fromkeys("abcd", "0.250000")
    assert sizes[1] == {"a": "0.250000", "b": "0.500000", "c": "0.400000", "d": ""}


def test_a_density_map_without_a_pixel_size_is_missed_in_a_line(
    pictures, checkpoint, tmp_path, capsys
):
    flags = ["--ckpt", checkpoint, "--images", pictures / "a.png", "--density"]
    line = "No pixel size in a: no density map; --pixel_size tells it"
    infer(tmp_path / "out", *flags)
    assert line in capsys.readouterr().out.splitlines()
    infer(tmp_path / "out", *flags, "--pixel_size", 0.25)
    assert "no density map" not in capsys.readouterr().out
    assert (tmp_path / "out" / "a_density.tif").is_file()


def test_outlines_of_other_names_are_told(pictures, checkpoint, tmp_path):
    (tmp_path / "outlines").mkdir()
    (tmp_path / "outlines" / "a.png.geojson").write_text('{"type": "FeatureCollection"}')
    flags = ["--ckpt", checkpoint, "--images", pictures, "--masks", tmp_path / "outlines"]
    with pytest.raises(InputError, match=r"found outlines of other names in .*a\.png\.geojson"):
        infer(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_network_without_a_pixel_size_resamples_nothing_and_says_so(checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True) | {"pixel_size_um": None}
    torch.save(content, tmp_path / "net.pt")
    sized(tmp_path / "a.tif", 0.5)
    infer(tmp_path / "out", "--ckpt", tmp_path / "net.pt", "--images", tmp_path / "a.tif")
    out = capsys.readouterr().out
    assert "net.pt does not say its pixel size: no image is resampled" in out
    assert "times" not in out


def test_pixel_sizes_far_from_the_network_s_are_all_named(checkpoint, tmp_path):
    sized(tmp_path / "a.tif", 2.5)
    sized(tmp_path / "b.tif", 0.02)
    sized(tmp_path / "c.tif", 0.25)
    paths = [tmp_path / f"{name}.tif" for name in "abc"]
    with pytest.raises(InputError) as error:
        infer(tmp_path / "out", "--ckpt", checkpoint, "--images", *paths)
    text = str(error.value)
    assert f"{paths[0]}: found a pixel size of 2.5 um" in text and "--pixel_size" in text
    assert f"{paths[1]}: found a pixel size of 0.02 um" in text and "c.tif" not in text
    with pytest.raises(InputError, match="--pixel_size: found a pixel size of 5 um"):
        infer(tmp_path / "out", "--ckpt", checkpoint, "--images", *paths, "--pixel_size", 5)
    assert not (tmp_path / "out").exists()


def test_validation_images_have_the_pixel_size_that_their_patches_were_cut_at(
    root, checkpoint, tmp_path, capsys
):
    cut(root, "--pixel_size", "0.5")  # whatever the files say
    infer(tmp_path / "out", "--root", root, "--ckpt", checkpoint)
    assert "Drawn_04: 0.5 um a pixel, enlarged 2 times to 0.25 um" in capsys.readouterr().out


def test_a_table_gives_pixel_sizes_in_the_place_of_the_files(checkpoint, tmp_path, capsys):
    for name, size in (("a", 0.5), ("b", 2.5), ("c", 0.25)):
        sized(tmp_path / f"{name}.tif", size)
    table = tmp_path / "sizes.csv"
    table.write_text("image,pixel_size_um\na.tif,0.25\nb,0.125\n")
    flags = ["--ckpt", checkpoint, "--images", *sorted(tmp_path.glob("*.tif")), "--pixel_sizes"]
    infer(tmp_path / "out", *flags, table)
    out = capsys.readouterr().out
    assert f"{table}: the pixel size of 2 of 3 images, 0.125 to 0.25 um\n" in out
    assert "b: 0.125 um a pixel, reduced 2 times to 0.25 um\n" in out and "a: " not in out
    said = "a.tif says 0.5 um a pixel, 0.25 is taken (2 of 3 images say otherwise)\n"
    assert said in out
    table.write_text("image,pixel_size_um\nd,0.25\n")
    with pytest.raises(InputError, match=r"sizes\.csv, line 2: found 'd'"):
        infer(tmp_path / "none", *flags, table)
    with pytest.raises(SystemExit):
        infer(tmp_path / "none", *flags, table, "--pixel_size", 0.25)
    assert not (tmp_path / "none").exists()


@needs_openslide
@pytest.mark.parametrize("writer", ["mirax", "dicom"])
def test_a_slide_of_a_scanner_has_the_results_of_its_pixels(
    checkpoint, tmp_path, capsys, monkeypatch, writer
):
    suffix = {"mirax": ".mrxs", "dicom": ".dcm"}[writer]
    image = draw_tissue(256, 320, seed=1).image
    levels = [image, cv2.resize(image, (160, 128), interpolation=cv2.INTER_AREA)]
    for folder in ("slides", "same"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "slides" / f"drawn{suffix}"
    (whole, *_) = getattr(slide_files, writer)(path, levels)
    tifffile.imwrite(tmp_path / "same" / "drawn.tif", whole, photometric="rgb", tile=(64, 64))
    monkeypatch.setattr(windows, "BIG", 1)
    flags = ["--ckpt", checkpoint, *TILES, "--images"]
    infer(tmp_path / "out", *flags, tmp_path / "slides")
    assert "passed over" not in capsys.readouterr().out
    infer(tmp_path / "expected", *flags, tmp_path / "same", "--pixel_size", 0.25)
    (row,), (expected,) = (table_of(tmp_path / f / "counts.csv") for f in ("out", "expected"))
    assert int(row["nuclei"]) > 0
    assert {**row, "seconds": ""} == {**expected, "seconds": ""}  # per mm2 as well
    one, two = (masks.read_mask(tmp_path / f / "drawn_prediction.tif") for f in ("out", "expected"))
    np.testing.assert_array_equal(one, two)
