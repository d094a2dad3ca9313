"""inference.py with networks that have instances: depths, confidence, and what is dropped."""

import gzip
import json
import re
from dataclasses import replace

import cv2
import numpy as np
import pytest
import tifffile
import torch
from pycocotools.coco import COCO

import inference
from learning import checkpoints, splitting
from model import UNet
from tests.scripts import cut, infer, table_of
from tests.test_runs import label
from tissue import claims, masks, nuclei, results, windows
from tissue.files import InputError
from tissue.patches import read_manifest
from tissue.pictures import write_image
from tissue.summary import check_exports, write_summary
from tissue.synthetic import draw_tissue

SHAPE = 320, 400  # pixels
TILES = ["--tile_size", 96, "--overlap", 96]
KINDS = ["prediction.png", "image.png", "overlay.png", "labels.tif", "nuclei.csv", "nuclei.geojson"]
KINDS += ["review.csv", "review.geojson", "review.jpg"]


def write_network(path, instances):
    """A network of random weights that calls half of drawn tissue nuclei, half of it deep."""
    torch.manual_seed(3)
    model = UNet(4, instances).eval()
    pixels = torch.from_numpy(draw_tissue(*SHAPE, seed=1).image).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        model.last_conv.weight *= 200
        model.last_conv.bias.zero_()
        logits = model((pixels - 0.65) / 0.2)
        model.last_conv.bias -= logits.transpose(0, 1).flatten(1).median(dim=1).values
    content = {
        "format_version": 1,
        "model": model.state_dict(),
        "config": model.config,
        "normalisation": {"mean": (0.65, 0.65, 0.65), "std": (0.2, 0.2, 0.2)},
        "channel_order": "rgb",
        "pixel_size_um": 0.25,
        "threshold": 0.5,
    }
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("ckpt") / "instances.pt", True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A network without instances."""
    return write_network(tmp_path_factory.mktemp("ckpt") / "plain.pt", False)


def write_slide(path, image):
    path.parent.mkdir(exist_ok=True)
    resolution = {"resolution": (4e4, 4e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, image, photometric="rgb", tile=(64, 64), **resolution)
    return path


@pytest.fixture
def slide(tmp_path):
    return write_slide(tmp_path / "slides" / "a.tif", draw_tissue(*SHAPE, seed=1).image)


def distance_of(folder):
    paths = [results.path_of(folder, "a", kind) for kind in ("distance", "big_distance")]
    (path,) = (path for path in paths if path.is_file())
    return tifffile.imread(path) if path.suffix == ".tif" else cv2.imread(str(path), -1)


def mask_of(folder):
    (path,) = folder.glob("a_prediction.*")
    return masks.read_mask(path)


def nuclei_of(folder):
    """The rows of a CSV, without ids, which large images give in another order."""
    table = table_of(folder / "a_nuclei.csv")
    for nucleus in table:
        nucleus.pop("id")
    return sorted(table, key=lambda nucleus: (float(nucleus["y"]), float(nucleus["x"])))


# --- what is drawn is found


def drawing():
    """An image that tells its own probability and depth, and its mask without what is dropped.

    Two nuclei without a neck between them where four tiles meet, one of a depth of 0.3 alone, and
    one of 0.8 on one of 0.4.
    """
    generator = np.random.default_rng(0)
    image = np.array((200, 130, 170)) + generator.integers(-4, 5, (*SHAPE, 3))
    rows, columns = np.indices(SHAPE)
    kept = np.zeros(SHAPE, bool)
    for box, peaks in (
        ((80, 111, 76, 117), ((95, 86, 1), (95, 106, 1))),
        ((190, 211, 190, 211), ((200, 200, 0.3),)),
        ((240, 261, 170, 200), ((250, 185, 0.8),)),
        ((240, 261, 200, 230), ((250, 215, 0.4),)),
    ):
        at = np.s_[box[0] : box[1], box[2] : box[3]]
        depth = np.zeros(SHAPE)
        for y, x, peak in peaks:
            slope = np.clip(1 - np.hypot(rows - y, columns - x) / 16, 0.02, 1)
            depth = np.maximum(depth, peak * slope)
        image[at] = 100, 60, 0
        image[at][..., 2] = 100 + np.rint(100 * depth[at])
        kept[at] = peaks[0][2] >= 0.5
    return image.astype(np.uint8), kept


def as_drawn(tiles, kept):
    tiles = tiles[:, *kept]
    probability = tiles[..., 0] < 150
    depth = (tiles[..., 2] - 100.0) / 100 * probability
    return np.stack([probability, depth], axis=1, dtype=np.float32)


def infer_drawn(folder, *flags):
    """inference.py, but with `as_drawn` as what the network says."""
    arguments = ["--image_folder", folder, "--gpu_id", -1, *flags, *TILES]
    args = inference.parse_args([str(argument) for argument in arguments])
    network = inference.load_network(args, torch.device("cpu"))
    network = replace(network, predict=as_drawn)
    tasks, _, faults = inference.plan(args, network)
    with claims.working(folder) as job:
        inference.infer_all(tasks, tasks, network, {}, job)
        faults += job.faults + check_exports(tasks)
        write_summary(folder, {"a"})
    assert not faults


@pytest.mark.parametrize("big", [False, True])
def test_nuclei_that_are_drawn_are_found_and_unsure_ones_dropped(
    checkpoint, tmp_path, monkeypatch, big
):
    image, kept = drawing()
    path = write_slide(tmp_path / "slides" / "a.tif", image)
    (tmp_path / "masks").mkdir()
    write_image(tmp_path / "masks" / "a.png", kept)
    if big:
        monkeypatch.setattr(windows, "BIG", 1)
    folder = tmp_path / "out"
    flags = ["--ckpt", checkpoint, "--images", path, "--masks", tmp_path / "masks"]
    infer_drawn(folder, *flags, "--export", "csv", "coco", "--confidence", 0.5)
    (row,) = table_of(folder / "counts.csv")
    assert (row["nuclei"], row["dropped"], row["contours"]) == ("3", "2", "2")
    assert float(row["dice"]) > 0.97
    assert "<dt>dropped</dt>" in (folder / "report.html").read_text()

    found = nuclei_of(folder)
    assert [nucleus["confidence"] for nucleus in found] == ["1.0", "1.0", "0.8"]
    centres = [(float(nucleus["y"]), float(nucleus["x"])) for nucleus in found]
    np.testing.assert_allclose(centres, [(95, 86), (95, 106), (250, 185)], atol=1)
    labels, mask = tifffile.imread(folder / "a_labels.tif"), mask_of(folder)
    np.testing.assert_array_equal(labels > 0, mask)
    assert not mask[:, 204:][130:].any() and not mask[190:211, 190:200].any()
    assert mask[240:261, 170:197].all()
    distance = distance_of(folder)
    assert distance.dtype == np.uint8 and distance[95, 86] == 255
    np.testing.assert_array_equal(distance > 0, image[..., 0] < 150)
    assert distance[200, 200] == round(0.3 * 255) and distance[250, 215] == round(0.4 * 255)

    confidence = {int(row["id"]): float(row["confidence"]) for row in table_of(
        folder / "a_nuclei.csv")}  # fmt: skip
    path = folder / ("a_nuclei.geojson.gz" if big else "a_nuclei.geojson")
    text = gzip.decompress(path.read_bytes()) if big else path.read_bytes()
    features = json.loads(text)["features"]
    measures = [feature["properties"]["measurements"] for feature in features]
    assert {each["id"]: each["confidence"] for each in measures} == confidence
    coco = COCO(folder / "a_coco.json")
    assert {a["id"]: a["score"] for a in coco.loadAnns(coco.getAnnIds())} == confidence


# --- a network from end to end


def test_a_network_with_instances_from_end_to_end(checkpoint, slide, tmp_path, capsys):
    folder = tmp_path / "out"
    infer(folder, "--ckpt", checkpoint, "--images", slide, "--confidence", 0.9)
    out = capsys.readouterr().out
    assert "confidence=0.9" in out and "dropped" in out
    (row,) = table_of(folder / "counts.csv")
    record = json.loads((folder / "rows" / "a.json").read_text())
    assert record["row"]["dropped"] == int(row["dropped"]) > 0
    assert record["files"]["distance"] == (folder / "a_distance.png").stat().st_size
    assert record["made_with"]["split"]["confidence"] == 0.9
    labels, distance = tifffile.imread(folder / "a_labels.tif"), distance_of(folder)
    table = table_of(folder / "a_nuclei.csv")
    assert len(table) == labels.max() == int(row["nuclei"]) > 5
    for nucleus in table:
        largest = distance[labels == int(nucleus["id"])].max() / 255
        assert float(nucleus["confidence"]) == pytest.approx(largest, abs=1e-4)
        assert largest >= 0.9
    dropped = (distance > 0) & ~mask_of(folder)
    assert dropped.any() and distance[dropped].max() / 255 < 0.9
    assert not labels[dropped].any()

    infer(tmp_path / "all", "--ckpt", checkpoint, "--images", slide, "--confidence", 0)
    (everything,) = table_of(tmp_path / "all" / "counts.csv")
    assert "dropped" not in everything
    assert int(everything["nuclei"]) == int(row["nuclei"]) + int(row["dropped"])
    np.testing.assert_array_equal(mask_of(tmp_path / "all"), distance > 0)


def test_a_big_image_has_the_nuclei_of_a_small_one(checkpoint, slide, tmp_path, monkeypatch):
    (tmp_path / "masks").mkdir()
    write_image(tmp_path / "masks" / "a.png", draw_tissue(*SHAPE, seed=1).labels > 0)
    flags = ["--ckpt", checkpoint, "--images", slide, "--masks", tmp_path / "masks"]
    flags += ["--confidence", 0.9, "--check_exports", "--export", "csv", *TILES]
    infer(tmp_path / "small", *flags)
    monkeypatch.setattr(windows, "BIG", 1)
    infer(tmp_path / "big", *flags)
    small, big = tmp_path / "small", tmp_path / "big"
    np.testing.assert_array_equal(mask_of(big), mask_of(small))
    np.testing.assert_array_equal(distance_of(big), distance_of(small))
    assert nuclei_of(big) == nuclei_of(small) and len(nuclei_of(big)) > 5
    rows = [table_of(folder / "counts.csv")[0] for folder in (small, big)]
    assert int(rows[0]["dropped"]) > 0
    for row in rows:
        for key in ("seconds", "gt_nuclei", "aji", "pq"):  # the latter of small images alone
            row.pop(key)
    assert rows[0] == rows[1]
    assert [path.name for path in big.glob(".*")] == [".lock"]  # no tiles are left


@pytest.mark.parametrize("big", [False, True])
def test_exports_that_come_later_are_of_the_same_nuclei(
    checkpoint, slide, tmp_path, monkeypatch, capsys, big
):
    if big:
        monkeypatch.setattr(windows, "BIG", 1)
    flags = ["--ckpt", checkpoint, "--images", slide, "--confidence", 0.9, *TILES]
    infer(tmp_path / "at once", *flags, "--export")
    folder = tmp_path / "out"
    infer(folder, *flags)
    predicted = {path: path.stat().st_mtime_ns for path in folder.glob("a_*.*")
                 if path.stem in ("a_prediction", "a_distance", "a_overlay")}  # fmt: skip
    assert len(predicted) == 3
    infer(folder, *flags, "--export", "--check_exports")
    assert "exported from the masks" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in predicted} == predicted
    for path in (tmp_path / "at once").glob("a_*"):
        assert (folder / path.name).read_bytes() == path.read_bytes(), path
    rows = [table_of(folder / "counts.csv")[0] for folder in (tmp_path / "at once", folder)]
    assert rows[0]["dropped"] == rows[1]["dropped"] and int(rows[0]["dropped"]) > 0


def test_without_instances_there_is_no_word_of_depth(checkpoint, plain, slide, tmp_path):
    folder = tmp_path / "out"
    infer(folder, "--ckpt", checkpoint, "--images", slide, "--confidence", 0.9, "--export")
    assert (folder / "a_distance.png").is_file()
    infer(folder, "--ckpt", plain, "--images", slide, "--export")
    names = {path.name for path in folder.glob("a_*")}
    assert names == {f"a_{kind}" for kind in (*KINDS, "rois.zip", "coco.json")}
    texts = [*folder.glob("a_*.*json"), *folder.glob("*.csv"), *folder.rglob("rows/*")]
    for path in texts:
        text = path.read_text()
        assert "confidence" not in text and "dropped" not in text and '"score"' not in text, path
    page = (folder / "report.html").read_text()
    assert "confidence" not in page and ">dropped<" not in page and "_distance" not in page


def counted_of(root, *numbers):
    """Drawn images of `root`, which get their label maps."""
    label(root, *numbers)
    cut(root)
    return splitting.counted_images([str(root)], [read_manifest(root)])


@pytest.fixture
def scored(checkpoint, root, tmp_path):
    """An image with its label map, `counted`; `content` of a checkpoint; and what `inference.py`
    makes of the image with a split: Dice, AJI and relative count error.
    """
    tissue = draw_tissue(96, 80, seed=1)
    counted = counted_of(root, 1)
    content = checkpoints.load_checkpoint(checkpoint)

    def scores_of(split):
        checkpoints.save_checkpoint(root / "net.pt", content | {"split": split._asdict()})
        flags = ["--ckpt", root / "net.pt", "--masks", root / "instance_labels", "--overwrite"]
        infer(tmp_path / "out", *flags, "--images", root / "tissue_images" / "Drawn_01.tif")
        (row,) = table_of(tmp_path / "out" / "counts.csv")
        error = abs(int(row["nuclei"]) - tissue.count) / tissue.count
        return float(row["dice"]), float(row["aji"]), error

    return counted, content, scores_of


def predictions_of(content):
    return splitting.Predictions(content, torch.device("cpu"))


def test_the_split_is_chosen_by_the_scores_that_inference_gives(scored):
    counted, content, scores_of = scored
    chosen, said, _ = splitting.agreed_split(predictions_of(content), counted)
    numbers = [float(text) for text in re.findall(r"[0-9.]+", said)]
    dice, aji, error = scores_of(chosen)
    assert [*numbers[:2], numbers[2] / 100] == pytest.approx([dice, aji, error], abs=0.05)
    for h in (0.05, 0.3):
        for confidence in (0.0, 0.3, 0.6):
            others = scores_of(nuclei.INSTANCE_SPLIT._replace(h=h, confidence=confidence))
            assert dice + aji - error >= others[0] + others[1] - others[2] - 0.01


def test_the_default_split_stays_where_nothing_is_better_by_more_than_chance(scored, monkeypatch):
    counted, content, _ = scored
    monkeypatch.setattr(splitting, "NEARLY", 4.0)
    chosen, _, _ = splitting.agreed_split(predictions_of(content), counted)
    assert chosen == nuclei.INSTANCE_SPLIT


@pytest.mark.parametrize(
    ("counts", "chosen"), [({"train": 6, "val": 5}, 5), ({"train": 6, "val": 4}, 0)]
)
def test_images_that_were_not_learned_choose_where_there_are_enough(tmp_path, counts, chosen):
    manifest = {"pixel_size_um": 0.25, "bits": None, "images": []}
    for split, count in counts.items():
        for number in range(count):
            name = f"{split}_{number}.png"
            write_image(tmp_path / name, np.full((32, 32, 3), 200, np.uint8))
            write_image(tmp_path / f"of_{name}", np.eye(32, dtype=bool))
            entry = {"image": name, "mask": f"of_{name}", "labels": f"of_{name}", "split": split}
            manifest["images"].append(entry | {"pixel_size_um": 0.25, "name": name})
            labels = np.zeros((32, 32), np.uint8)
            labels[4:20, 4:20], labels[22:30, 4:20] = 1, 2
            cv2.imwrite(str(tmp_path / f"of_{name}"), labels)
    config = UNet(4, instances=True).config
    both = splitting.Images.of([str(tmp_path)], [manifest], config, None)
    assert len(both.choosing) == chosen
    origin = {"split": nuclei.INSTANCE_SPLIT._asdict()}
    both = splitting.Images.of([str(tmp_path)], [manifest], config, origin)
    assert len(both.choosing) == 6 + counts["val"]
    plain = splitting.Images.of([str(tmp_path)], [manifest], UNet(4).config, None)
    assert {one.path.name[:5] for one in plain.choosing} == {"train"}


def test_images_of_16_bits_are_counted_as_bright_as_they_were_learned(checkpoint, root):
    """By the bits of their set: alone, the darker one would seem four times as bright."""
    folder = root / "tissue_images"
    for number, darker in ((1, 1), (2, 4)):
        image = draw_tissue(96, 80, seed=number).image
        tifffile.imwrite(folder / f"Drawn_0{number}.tif", image // darker)
    content = checkpoints.load_checkpoint(checkpoint)
    found = []
    for bits in (8, 12):
        for path in folder.iterdir() if bits == 12 else ():
            tifffile.imwrite(path, tifffile.imread(path).astype(np.uint16) << 4)
        counted = counted_of(root, 1, 2)
        assert read_manifest(root)["bits"] == (12 if bits == 12 else None)
        found.append(predictions_of(content).of(counted)[0])
    assert len(found[0]) == 2
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_split_of_a_fine_tuning_is_near_that_of_its_beginning(checkpoint, root):
    """And it is better by the scores that inference then gives, or the one of the beginning."""
    counted = counted_of(root, 1)
    content = checkpoints.load_checkpoint(checkpoint)
    scores = []
    for confidence in (0.1, 0.9):  # few are dropped, or nearly all
        start = nuclei.Split(**content["split"])._replace(confidence=confidence)
        split, said, _ = splitting.agreed_split(predictions_of(content), counted, start)
        assert abs(split.h - start.h) <= 0.1001 and abs(split.confidence - confidence) <= 0.1001
        assert split._replace(h=start.h, confidence=confidence) == start
        for name, tried in (("start", start), ("near", split)):
            checkpoints.save_checkpoint(root / "net.pt", content | {"split": tried._asdict()})
            out = root / f"{name}-{confidence}"
            images, masks = root / "tissue_images" / "Drawn_01.tif", root / "instance_labels"
            infer(out, "--ckpt", root / "net.pt", "--images", images, "--masks", masks)
            (row,) = table_of(out / "counts.csv")
            scores.append(float(row["dice"]) + float(row["aji"]))
        dice, aji, _ = re.findall(r"[0-9.]+", said)
        assert scores[-1] == pytest.approx(float(dice) + float(aji), abs=0.05)
        assert scores[-1] >= scores[-2] - 0.01


def test_an_end_of_a_fine_tuning_that_is_repeated_moves_the_split_once(checkpoint, root):
    counted = counted_of(root, 1)
    content = checkpoints.load_checkpoint(checkpoint)
    start = nuclei.Split(**content["split"])._replace(confidence=0.9)  # nearly all are dropped
    checkpoints.save_checkpoint(root / "best.pt", content | {"split": start._asdict()})
    chosen = []
    for _ in range(2):  # as when the first was interrupted before last.pt was written
        predictions = predictions_of(checkpoints.load_checkpoint(root / "best.pt"))
        splitting.choose_split(root / "best.pt", counted, predictions, start)
        chosen.append(checkpoints.load_checkpoint(root / "best.pt")["split"])
    assert chosen[0] == chosen[1] != start._asdict()


def test_an_image_is_counted_by_the_split_that_the_others_chose(checkpoint, root):
    """In a fine-tuning, in which validation images choose the split, too."""
    both = counted_of(root, 1, 2)
    content = checkpoints.load_checkpoint(checkpoint)
    start = nuclei.Split(**content["split"])._replace(confidence=0.9)
    predictions = predictions_of(content)
    _, _, without = splitting.agreed_split(predictions, both, start)
    for one, other in (both, both[::-1]):
        assert without[one.path] == splitting.agreed_split(predictions, [other], start)[0]


# --- flags


def test_a_checkpoint_that_says_no_split_has_the_default_of_instances(
    checkpoint, plain, slide, tmp_path, capsys
):
    for path, said in ((checkpoint, "h=0.2 hole=2.5 smallest=2.5 confidence=0.3 |"),
                       (plain, "h=0.05 hole=2.5 smallest=2.5 |")):  # fmt: skip
        infer(tmp_path / "out", "--ckpt", path, "--images", slide)
        assert said in capsys.readouterr().out
    content = torch.load(checkpoint, weights_only=True)
    earlier = {"sigma": 0.5, "h": 0.1, "hole": 1.0, "smallest": 2.0}
    torch.save(content | {"split": earlier}, tmp_path / "net.pt")
    infer(tmp_path / "out", "--ckpt", tmp_path / "net.pt", "--images", slide)
    assert "split sigma=0.5 h=0.1 hole=1 smallest=2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--confidence", 1.5], "--confidence: found 1.5, expected 0 or more and at most 1"),
        (["--confidence", -0.1], "--confidence: found -0.1"),
        (["--confidence", "nan"], "--confidence: found nan"),
        (["--split", "confidence=0.3"], "--split: found confidence=0.3, expected NAME=NUMBER"),
    ],
)
def test_a_confidence_that_is_none_is_named(checkpoint, slide, tmp_path, flags, text):
    with pytest.raises(InputError, match=text):
        infer(tmp_path / "out", "--ckpt", checkpoint, "--images", slide, *flags)
    assert not (tmp_path / "out").exists()


def test_a_confidence_for_a_network_without_instances_is_refused(plain, slide, tmp_path):
    with pytest.raises(
        InputError, match="--confidence: found a network without instances"
    ) as error:
        infer(tmp_path / "out", "--ckpt", plain, "--images", slide, "--confidence", 0.5)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["net.pt2", "net.onnx"])
def test_an_exported_network_gives_both_outputs_and_says_so(checkpoint, tmp_path, capsys, name):
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime", reason="the ONNX export needs its packages")
        pytest.importorskip("onnxscript", reason="the ONNX export needs its packages")
    infer(tmp_path / "out", "--ckpt", checkpoint, "--export_model", tmp_path / name)
    assert "probability and depth (N, 2, H, W)" in capsys.readouterr().out
    pixels = torch.rand(3, 3, 160, 32) * 255
    if name.endswith("pt2"):
        found = torch.export.load(tmp_path / name).module()(pixels)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / name)
        found = session.run(None, {"images": pixels.numpy()})[0]
    assert tuple(found.shape) == (3, 2, 160, 32)
