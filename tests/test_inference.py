"""inference.py on images that are read by windows, on several processes, and its other uses."""

import cv2
import numpy as np
import pytest
import tifffile
import torch

from model import UNet
from tests.scripts import call, cut, infer, learn, table_of
from tests.test_windows import write_ome_pyramid
from tissue import masks, nuclei, windows
from tissue.colour import ONE, colour_of, to_colour
from tissue.files import InputError
from tissue.report import write_image
from tissue.synthetic import draw_tissue


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network of random weights for 0.25 micrometres that calls half of drawn tissue nuclei."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("ckpt") / "net.pt"
    model = UNet(4).eval()
    image = draw_tissue(320, 400, seed=1).image
    image = to_colour(image, colour_of(windows.from_array(image)), ONE)
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
            "colour": ONE._asdict(),
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


TILES = ["--tile", 96, "--overlap", 96]


def test_a_big_image_gives_the_mask_and_counts_of_a_small_one(
    slide, checkpoint, tmp_path, monkeypatch
):
    flags = ["--ckpt", checkpoint, "--images", slide, "--no-skip", *TILES]
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
    slide, checkpoint, tmp_path, all_are_big, capsys
):
    image = np.full((320, 400, 3), (200, 150, 190), np.uint8)
    image[:, 310:] = 244
    resolution = {"resolution": (4e4, 4e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(slide, image, photometric="rgb", tile=(64, 64), **resolution)
    infer(tmp_path / "out", "--ckpt", checkpoint, "--images", slide, "--tile", 64, "--overlap", 0)
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
        if path.suffix in (".png", ".tif"):
            assert path.read_bytes() == other.read_bytes(), path
    tables = [table_of(tmp_path / name / "counts.csv") for name in "13"]
    for row in tables[0] + tables[1]:
        row.pop("seconds")
    assert tables[0] == tables[1] and len(tables[0]) == 5


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
        patched.setattr("tissue.report.overlay", stop)
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


def test_seams_are_checked_on_demand(slide, checkpoint, tmp_path, capsys):
    infer(tmp_path / "out", "--ckpt", checkpoint, "--images", slide, "--check_seams", *TILES)
    assert "big: 0 of 128000 pixels differ" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


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
        (["--tile", 100], "--tile: found 100, expected a multiple of 16"),
        (["--tile", 64, "--overlap", 96], "--tile: found 64, expected a multiple of 16 of 96"),
        (["--overlap", 10], "--overlap: found 10, expected a multiple of 16"),
        (["--pixel_size", 0], "--pixel_size: found 0"),
        (["--export_model", "net.bin"], "expected a name in .pt2 or .onnx"),
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
    assert 0 <= float(row["pq"]) <= float(row["aji"]) + 1
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
    flags = ["--ckpt", checkpoint, "--images", slide, "--no-skip", "--check_exports", *TILES]
    infer(tmp_path / "small", *flags)
    monkeypatch.setattr(windows, "BIG", 1)
    infer(tmp_path / "big", *flags)
    tables = [table_of(tmp_path / name / "big_nuclei.csv") for name in ("small", "big")]
    for table in tables:
        for nucleus in table:
            nucleus.pop("id")
        table.sort(key=lambda nucleus: (float(nucleus["y"]), float(nucleus["x"])))
    assert tables[0] == tables[1] and len(tables[0]) > 20


def test_split_changes_what_a_nucleus_is_and_is_recorded(slide, checkpoint, tmp_path):
    counts = []
    for number, smallest in enumerate((0, 30)):
        results = tmp_path / str(number)
        infer(results, "--ckpt", checkpoint, "--images", slide, "--split", f"smallest={smallest}")
        counts.append(int(table_of(results / "counts.csv")[0]["nuclei"]))
        assert f"smallest={smallest}" in (results / "report.html").read_text()
    assert counts[0] > counts[1]


@pytest.mark.parametrize("change", ["size=3", "h", "h=much", "sigma=-1", "h=nan", "sigma=1e9"])
def test_a_split_that_is_none_is_named(slide, checkpoint, tmp_path, change):
    with pytest.raises(InputError, match=f"--split: found {change}, expected NAME=NUMBER"):
        infer(tmp_path / "out", "--ckpt", checkpoint, "--images", slide, "--split", change)


def test_a_label_map_of_another_size_is_named(labelled, checkpoint, tmp_path):
    tifffile.imwrite(labelled / "instance_labels" / "a_03.tif", np.eye(7, dtype=np.uint16) * 3 + 1)
    with pytest.raises(InputError, match=r"a_03\.tif: found a label map of 7 x 7"):
        infer(tmp_path / "out", "--root", labelled, "--ckpt", checkpoint)


def test_training_chooses_the_split_on_label_maps_and_inference_uses_it(labelled, tmp_path, capsys):
    run = learn(labelled, tmp_path)
    assert "chosen on 1 training images with label maps" in (run / "train.log").read_text()
    chosen = torch.load(run / "best.pt", weights_only=True)["split"]
    assert set(chosen) == set(nuclei.Split._fields)
    infer(tmp_path / "out", "--root", labelled, "--ckpt", run)
    assert f"smallest={chosen['smallest']:g}" in capsys.readouterr().out
