"""Annotations as training data: what is cut of them, what a network learns from, what is scored."""

import gzip
import json
import shutil

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

import preprocess
import train
import utils
from learning import splitting
from learning.augment import transform
from learning.losses import LOSSES, bce_dice, depth_loss, total_loss
from learning.processes import Machine
from learning.signals import StopSignal
from learning.splitting import counted_images, read_reference
from model import UNet
from tests.scripts import SMALL, cut, fingerprint, infer, learn, table_of
from tissue import annotated, manifest, patches, pictures, windows
from tissue.agreement import pixel_counts
from tissue.depth import NOT_ANNOTATED, depth_of
from tissue.files import InputError
from tissue.patches import NO_MASK, PatchDataset, read_patch
from tissue.results import read as read_record
from tissue.synthetic import draw_tissue

SIDE = 32  # pixels of the patches of SMALL, and STRIDE from one to the next
STRIDE = 16


def feature(corners, label="Nucleus", number=None):
    """A rectangle (y, x, y, x) or a polygon of (x, y) as QuPath writes it."""
    if len(np.shape(corners)) == 1:
        top, left, bottom, right = corners
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    ring = [list(map(float, corner)) for corner in (*corners, corners[0])]
    named = {"id": f"00000000-0000-4000-8000-{number:012}"} if number is not None else {}
    return named | {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation", "classification": {"name": label}},
    }


def annotate(root, name, *features, ending=".geojson"):
    """Write an annotation; its path."""
    path = root / "annotations" / f"{name}{ending}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def squares(labels):
    """Features of the boxes around the nuclei of a label map, and these boxes as a label map."""
    features, drawn = [], np.zeros(labels.shape, np.uint16)
    for number in range(1, labels.max() + 1):
        rows, columns = np.nonzero(labels == number)
        if len(rows):
            box = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
            features.append(feature(box, number=number))
            drawn[box[0] : box[2], box[1] : box[3]] = len(features)
    return features, drawn


@pytest.fixture
def mine(tmp_path):
    """Four images of 96 x 80 pixels without masks; what they show as boxes, by name."""
    root, boxes = tmp_path / "mine", {}
    (root / "tissue_images").mkdir(parents=True)
    for number in (1, 2, 3, 4):
        name, tissue = f"Drawn_{number:02}", draw_tissue(96, 80, seed=number)
        pictures.write_image(root / "tissue_images" / f"{name}.tif", tissue.image)
        boxes[name] = squares(tissue.labels)
    return root, boxes


def annotate_all(root, boxes, *more):
    for name, (features, _) in boxes.items():
        annotate(root, name, *features, *more)


def said(capsys, root, *more):
    """What preprocess.py prints."""
    capsys.readouterr()
    cut(root, *more)
    return capsys.readouterr().out


def table(root):
    return [row for split in manifest.SPLITS for row in manifest.read_table(root, split)]


def refused(root, *more):
    """The error of preprocess.py, which has written nothing."""
    before = fingerprint(root)
    with pytest.raises(InputError) as error:
        cut(root, *more)
    assert fingerprint(root) == before
    assert "\n" not in str(error.value)
    return str(error.value)


# --- cut


def test_annotated_images_give_the_patches_of_their_label_maps(mine, tmp_path):
    root, boxes = mine
    annotate_all(root, boxes)
    for name, ending in (("Drawn_02", "_labels.tif"), ("Drawn_03", "_cp_masks.png")):
        (root / "annotations" / f"{name}.geojson").unlink()
        pictures.write_image(root / "annotations" / f"{name}{ending}", boxes[name][1])
    cut(root)
    other = tmp_path / "other"
    (other / "instance_labels").mkdir(parents=True)
    (other / "tissue_images").symlink_to(root / "tissue_images")
    for name, (_, drawn) in boxes.items():
        tifffile.imwrite(other / "instance_labels" / f"{name}.tif", drawn)
    cut(other)
    assert table(root) == table(other) and len(table(root)) == 4 * 20
    for row in table(root):
        pair = [read_patch(place, row["split"], row["file"]) for place in (root, other)]
        for one, two in zip(*pair, strict=True):
            assert one.dtype == two.dtype == np.uint8 and (one == two).all()
    sources = manifest.read_manifest(root)["images"]
    assert [s["mask"] for s in sources] == [
        f"annotations/Drawn_{kind}"
        for kind in ("01.geojson", "02_labels.tif", "03_cp_masks.png", "04.geojson")
    ]
    assert all(s["labels"] == s["mask"] for s in sources)
    others = manifest.read_manifest(other)["images"]
    for key in ("foreground", "stain", "height", "width"):
        assert [s[key] for s in sources] == [s[key] for s in others]


def test_patches_are_cut_in_regions_and_what_lies_outside_has_no_mask(mine):
    root, boxes = mine
    nuclei = feature((40, 20, 50, 30)), feature((60, 58, 70, 70))  # the second: beyond the region
    region = feature((20, 10, 75, 60), "Region*")
    annotate_all(root, boxes)
    annotate(root, "Drawn_01", *nuclei, region)
    cut(root)
    rows = [row for row in table(root) if row["name"] == "Drawn_01"]
    # From the corner of the region on, and a last one at its end.
    assert {(row["y"], row["x"]) for row in rows} == {
        (y, x) for y in (20, 36, 43) for x in (10, 26, 28)
    }
    whole = cv2.imread(str(root / "tissue_images" / "Drawn_01.tif"))[..., ::-1]
    labels = np.zeros((96, 80), np.int32)
    labels[40:50, 20:30], labels[60:70, 58:70] = 1, 2
    depth = depth_of(labels)
    assert depth[60:70, 58:60].any()  # of the whole nucleus, whatever the region
    for row in rows:
        image, mask = read_patch(root, row["split"], row["file"])
        place = np.s_[row["y"] : row["y"] + SIDE, row["x"] : row["x"] + SIDE]
        assert mask.dtype == np.uint8  # wholly annotated
        assert (image == whole[place]).all() and (mask == depth[place]).all()


def test_patches_at_a_slanted_region_say_what_is_annotated(mine):
    root, boxes = mine
    corners = [(0, 0), (80, 0), (0, 80)]  # a triangle; x + y < 80
    annotate_all(root, boxes)
    annotate(root, "Drawn_02", feature((2, 2, 12, 12)), feature(corners, "Training"))
    cut(root)
    y, x = np.mgrid[:96, :80]
    known = y + x + 1 < 80  # of pixels by their middle
    known[y + x + 1 == 80] = False
    edge = y + x + 1 == 80  # a middle on the line belongs to either
    rows = [row for row in table(root) if row["name"] == "Drawn_02"]
    assert len(rows) < 16
    mixed = 0
    for row in rows:
        _, mask = read_patch(root, row["split"], row["file"])
        place = np.s_[row["y"] : row["y"] + SIDE, row["x"] : row["x"] + SIDE]
        mixed += mask.dtype == np.int16
        assert ((mask != NO_MASK) == known[place])[~edge[place]].all()
        annotated = mask[mask != NO_MASK]
        assert len(annotated)
        assert row["foreground"] == pytest.approx((annotated > 0).mean(), abs=5e-5)
        path = manifest.folder(root, "mask", row["split"]) / row["file"]
        assert Image.open(path).mode == ("LA" if mask.dtype == np.int16 else "L")
    assert mixed > 3
    assert all((row["y"] + row["x"]) < 80 for row in rows)  # none without an annotated pixel


def test_a_region_smaller_than_a_patch_has_one_around_it_and_all_rows_have_their_own_number(mine):
    root, boxes = mine
    annotate_all(root, boxes)
    small = feature((50, 40, 60, 50), "region 1"), feature((0, 70, 5, 80), "REGION")
    annotate(root, "Drawn_03", feature((52, 42, 58, 48)), *small)
    cut(root)
    rows = [row for row in table(root) if row["name"] == "Drawn_03"]
    assert sorted((row["y"], row["x"]) for row in rows) == [(0, 48), (39, 29)]
    assert sorted((row["row"], row["col"]) for row in rows) == [(0, 0), (1, 0)]
    (row,) = (row for row in rows if row["y"])
    _, mask = read_patch(root, row["split"], row["file"])
    known = np.zeros((SIDE, SIDE), bool)
    known[11:21, 11:21] = True
    assert ((mask != NO_MASK) == known).all()
    assert row["foreground"] == pytest.approx(36 / 100)


def test_blocks_leave_no_trace(mine, monkeypatch):
    root, boxes = mine
    annotate_all(root, boxes, feature((3, 5, 90, 71), "Region"))
    cut(root)
    wanted = fingerprint(root)
    (root / manifest.MANIFEST).unlink()
    monkeypatch.setattr(annotated, "BLOCK", 50)
    monkeypatch.setattr(annotated, "MARGIN", 40)
    cut(root)
    found = fingerprint(root)
    assert found.keys() == wanted.keys()
    assert all(found[path][0] == wanted[path][0] for path in wanted)


def test_a_slide_gives_the_patches_of_a_crop_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "BIG", 10**6)
    tissue = draw_tissue(1300, 1100, seed=3)
    features, _ = squares(tissue.labels[:400, :400])
    here, crop = tmp_path / "slide", tmp_path / "crop"
    for root, cut_at in ((here, np.s_[:, :]), (crop, np.s_[600:1000, 500:900])):
        (root / "tissue_images").mkdir(parents=True)
        for name in ("a", "b_04"):
            pixels = np.roll(tissue.image, 7, axis=0) if name == "a" else tissue.image
            path = root / "tissue_images" / f"{name}.tif"
            tifffile.imwrite(path, pixels[cut_at], tile=(64, 64), photometric="rgb")
    for root, y, x in ((here, 600, 500), (crop, 0, 0)):
        moved = []
        for one in features:
            corners = one["geometry"]["coordinates"][0][:-1]
            moved.append(feature(np.add(corners, (x, y))))
        boxes = (20, 30, 120, 150), (250.5, 200.5, 390, 380)  # two regions
        boxes = [(y + a, x + b, y + c, x + d) for a, b, c, d in boxes]
        for name in ("a", "b_04"):
            annotate(root, name, *moved, *(feature(box, "Region") for box in boxes))
        cut(root)
    assert windows.open_image(here / "tissue_images" / "a.tif").is_big
    rows, wanted = table(here), table(crop)
    assert len(rows) == len(wanted) > 100
    for row, other in zip(rows, wanted, strict=True):
        assert row == other | {"y": other["y"] + 600, "x": other["x"] + 500}
        pair = [read_patch(root, row["split"], row["file"]) for root in (here, crop)]
        assert all((one == two).all() for one, two in zip(*pair, strict=True))


def test_images_of_another_pixel_size_are_brought_to_that_of_the_set(mine):
    root, boxes = mine
    annotate_all(root, boxes)
    annotate(root, "Drawn_01", feature((40, 20, 60, 40)), feature((16, 8, 96, 80), "Region"))
    sizes = {"Drawn_01": 0.25}
    for name in boxes:
        path = root / "tissue_images" / f"{name}.tif"
        per_cm = 1e4 / sizes.get(name, 0.5)
        tifffile.imwrite(
            path, tifffile.imread(path), resolution=(per_cm, per_cm), resolutionunit="CENTIMETER"
        )
    cut(root)
    assert manifest.read_manifest(root)["pixel_size_um"] == 0.5
    rows = [row for row in table(root) if row["name"] == "Drawn_01"]
    assert {(row["y"], row["x"]) for row in rows} == {(8, 4), (16, 4), (16, 8), (8, 8)}
    (row,) = (row for row in rows if (row["y"], row["x"]) == (8, 4))
    _, mask = read_patch(root, row["split"], row["file"])
    wanted = np.zeros((SIDE, SIDE), bool)
    wanted[20 - 8 : 30 - 8, 10 - 4 : 20 - 4] = True
    assert ((mask > 0) == wanted).all()


# --- which files are used, and what is said


def test_annotations_go_before_masks_and_images_with_neither_are_passed_over(root, capsys):
    annotate(root, "Drawn_01", feature((40, 20, 50, 30)))
    for path in (root / "mask binary").glob("*_02.*"):
        path.unlink()
    (root / "annotations" / "notes.txt").touch()
    said_of = said(capsys, root).splitlines()
    assert any("Drawn_01.png" in line and "passed over" in line for line in said_of)
    assert any("1 of 4 images was passed over (Drawn_02.tif)" in line for line in said_of)
    assert any("notes.txt" in line and "passed over" in line for line in said_of)
    masks = {image["name"]: image["mask"] for image in manifest.read_manifest(root)["images"]}
    assert masks == {
        "Drawn_01": "annotations/Drawn_01.geojson",
        "Drawn_03": "mask binary/Drawn_03.png",
        "Drawn_04": "mask binary/Drawn_04.png",
    }


def test_one_annotation_is_too_few(mine):
    root, boxes = mine
    annotate(root, "Drawn_01", *boxes["Drawn_01"][0])
    assert "annotations: found annotations or masks of 1 images, expected two" in refused(root)


def test_an_annotation_without_an_image_is_an_error(mine):
    root, boxes = mine
    annotate_all(root, boxes)
    annotate(root, "Drown_01", *boxes["Drawn_01"][0])
    assert "Drown_01.geojson: found no file of that name in" in refused(root)


def test_faults_of_annotations_are_told_together_before_anything_is_written(mine):
    root, boxes = mine
    annotate_all(root, boxes)
    (root / "annotations" / "Drawn_01.geojson").write_text("{")
    annotate(root, "Drawn_02", feature((40, 20, 50, 30)), feature((10.1, 5, 10.2, 5.3), "Region"))
    fault = refused(root)
    assert "Drawn_01.geojson: " in fault
    assert "Drawn_02.geojson: found regions that hold no pixel" in fault


def test_a_folder_of_annotations_that_is_not_there_is_named_among_the_others(mine):
    root, _ = mine
    assert "or annotations in" in refused(root)


def test_nuclei_are_counted_by_image_and_class(mine, capsys):
    root, boxes = mine
    annotate_all(root, boxes)
    nuclei = feature((40, 20, 50, 30), "Tumor"), feature((60, 58, 70, 70), "Tumor")
    nuclei += (feature((10, 10, 20, 20), "Stroma"), feature((0, 0, 96, 80), "Region"))
    annotate(root, "Drawn_01", *nuclei)
    lines = said(capsys, root).splitlines()
    assert "Drawn_01: 3 annotated nuclei (Tumor 2, Stroma 1), regions: 1" in lines
    count = len(boxes["Drawn_02"][0])
    assert f"Drawn_02: {count} annotated nuclei (Nucleus {count})" in lines


def test_a_corrected_annotation_is_cut_anew_and_what_was_corrected_is_said(mine, tmp_path, capsys):
    root, boxes = mine
    annotate_all(root, boxes)
    cut(root)
    assert "up to date" in said(capsys, root)
    results = tmp_path / "results"
    results.mkdir()
    before = annotate(root, "Drawn_01", *boxes["Drawn_01"][0])
    before.rename(results / "Drawn_01_nuclei.geojson")
    first, _, *others = boxes["Drawn_01"][0]
    moved = feature((1, 1, 9, 9), number=2)
    new = [feature((20 * i, 0, 20 * i + 6, 6), number=900 + i) for i in range(3)]
    annotate(root, "Drawn_01", first, moved, *others[1:], *new)
    lines = said(capsys, root, "--corrected_from", str(results))
    assert "Drawn_01: 3 nuclei added, 1 deleted, 1 changed since" in lines
    assert "Drawn_02: " not in lines.split("since")[0]
    assert "up to date" not in lines
    plain = results / "Drawn_01_nuclei.geojson"
    packed = plain.with_name(f"{plain.name}.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    lines = said(capsys, root, "--corrected_from", str(results))
    assert f"Drawn_01: 3 nuclei added, 1 deleted, 1 changed since {packed}" in lines
    packed.unlink()
    assert "nothing was compared" in said(capsys, root, "--corrected_from", str(results))
    with pytest.raises(FileNotFoundError, match="missing: no such folder"):
        cut(root, "--corrected_from", str(tmp_path / "missing"))
    plain.write_bytes(annotate(root, "Drawn_01", *others).read_bytes())
    shutil.copytree(root, tmp_path / "other")
    more = ["--root", str(root), str(tmp_path / "other"), "--corrected_from", str(results)]
    assert said(capsys, root, *more).count("not compared, for several roots have an image") == 2


def test_results_that_were_corrected_in_their_place_are_not_compared_with_their_copy(
    mine, tmp_path, capsys
):
    root, boxes = mine
    annotate_all(root, boxes)
    cut(root)
    run, results = learn(root, tmp_path / "log"), tmp_path / "results"
    (image,) = (root / "tissue_images").glob("Drawn_01.*")
    infer(results, "--ckpt", run, "--images", image)
    path = results / "Drawn_01_nuclei.geojson"
    made = path.read_bytes()
    path.write_bytes(annotate(root, "Drawn_01", *boxes["Drawn_01"][0][1:]).read_bytes())
    (line,) = [
        line
        for line in said(capsys, root, "--corrected_from", str(results)).splitlines()
        if line.startswith("Drawn_01: ") and "inference.py" in line
    ]
    assert line.startswith(f"Drawn_01: {path} was changed since inference.py wrote it, expected")
    assert line.endswith(
        "run inference.py again, which keeps yours as Drawn_01_nuclei.geojson.changed"
    )
    infer(results, "--ckpt", run, "--images", image)
    assert path.read_bytes() == made
    path.with_name(f"{path.name}.gz").write_bytes(b"the user's own")
    assert f"since {path}" in said(capsys, root, "--corrected_from", str(results))


def test_the_contact_sheet_shows_outlines_and_regions_and_goes_with_its_set(mine):
    root, boxes = mine
    annotate_all(root, boxes)
    annotate(root, "Drawn_01", feature((40, 20, 50, 30)), feature((10, 5, 90, 75), "Region"))
    cut(root)
    sheet = cv2.imread(str(root / patches.ANNOTATIONS))[..., ::-1]
    tile = sheet[4 : 4 + 96, 4 : 4 + 80]  # as large as the image
    for (top, left, bottom, right), colour, wide in (
        ((40, 20, 50, 30), pictures.OUTLINE, 1),
        ((10, 5, 90, 75), annotated.OF_REGIONS, 2),
    ):
        edge = np.zeros((96, 80), bool)
        edge[top:bottom, left:right] = True
        edge[top + wide : bottom - wide, left + wide : right - wide] = False
        assert ((tile == colour).all(axis=2) == edge).all()
    (root / "mask binary").mkdir()
    for name, (_, drawn) in boxes.items():
        pictures.write_image(root / "mask binary" / f"{name}.png", drawn > 0)
    (root / "annotations").rename(root / "put_away")
    cut(root)
    assert not (root / patches.ANNOTATIONS).exists()


def test_a_field_drawn_without_a_class_is_refused_at_its_pixel_size(mine):
    root, boxes = mine
    annotate_all(root, boxes)
    annotate(root, "Drawn_02", feature((10, 10, 70, 60)))
    error = refused(root, "--pixel_size", "0.6")
    assert "Drawn_02.geojson: feature 1: found an outline of 3,000 pixels" in error
    assert "of 1,080 square micrometres" in error and "pixel size of 0.6 um" in error
    cut(root, "--pixel_size", "0.5")


def test_sets_without_a_pixel_size_go_by_annotated_nuclei(mine, capsys):
    root, boxes = mine
    annotate_all(root, boxes)
    for name in boxes:
        nuclei = [feature((y, x, y + 5, x + 8)) for y in (10, 30, 50) for x in (10, 40)]
        annotate(root, name, *nuclei, feature((60, 0, 70, 9)))  # which meets the edge
    lines = said(capsys, root, "--pixel_size", "nuclei")
    assert "by its median nucleus of 40 pixels" in lines


# --- learned from


@pytest.fixture
def half_annotated(mine):
    """A set of which each image is annotated in a region that cuts through its patches."""
    root, boxes = mine
    annotate_all(root, boxes, feature([(5, 5), (70, 20), (60, 80), (20, 70)], "Region"))
    cut(root)
    return root


@pytest.mark.parametrize("augment", ["basic", "moderate", "strong"])
def test_what_is_not_annotated_goes_through_augmentation_as_one_value(half_annotated, augment):
    dataset = PatchDataset(half_annotated, "train", transform("train", augment))
    plain = PatchDataset(half_annotated, "train", transform("val"))
    unknown = 0
    for index in range(len(dataset)):
        _, mask, _ = dataset[index, 7]
        values = set(mask.unique().tolist())
        _, stored = read_patch(half_annotated, "train", plain.files[index])
        assert values <= set((stored.astype(np.float32) / np.float32(255)).ravel().tolist())
        unknown += NOT_ANNOTATED in values
        _, mask, _ = plain[index]
        assert ((mask[0] == NOT_ANNOTATED).numpy() == (stored == NO_MASK)).all()
    assert unknown > 5


def test_losses_do_not_see_what_is_not_annotated():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 4, 4, generator=generator)
    masks = torch.rand(2, 1, 4, 4, generator=generator)
    masks[masks < 0.5] = 0
    masks[:, :, :, 2:] = NOT_ANNOTATED
    for name, loss_of in LOSSES.items():
        seen = logits.clone().requires_grad_()
        loss = total_loss(loss_of, seen, masks)
        loss.backward()
        assert (seen.grad[:, :, :, 2:] == 0).all() and (seen.grad[:, :, :, :2] != 0).all(), name
        other = torch.where(masks == NOT_ANNOTATED, torch.randn(2, 2, 4, 4), logits)
        assert total_loss(loss_of, other, masks) == loss, name
    # By hand: each annotated pixel adds what it adds where all is annotated.
    left = total_loss(binary_cross_entropy_with_logits, logits[..., :2], masks[..., :2])
    assert total_loss(binary_cross_entropy_with_logits, logits, masks) == pytest.approx(left / 2)
    known = (masks != NOT_ANNOTATED).float()
    target = (masks != 0).float()  # whatever it says where nothing is known
    p = logits[:, :1, :, :2].sigmoid()
    soft = (2 * (p * target[..., :2]).sum() + 1) / (p.sum() + target[..., :2].sum() + 1)
    cross = binary_cross_entropy_with_logits(logits[:, :1, :, :2], target[..., :2]) / 2
    assert bce_dice(logits[:, :1], target, known) == pytest.approx(cross + 1 - soft)
    assert depth_loss(logits[:, 1:], torch.full_like(masks, NOT_ANNOTATED)) == 0


def test_where_all_is_annotated_nothing_is_as_much_as_rounded_otherwise():
    masks = (torch.rand(3, 1, 32, 32) > 0.7).float()
    logits = torch.randn(3, 1, 32, 32)
    for name, loss_of in LOSSES.items():
        found = []
        for known in ((), (torch.ones_like(masks),)):
            seen = logits.clone().requires_grad_()
            loss = loss_of(seen, masks, *known)
            loss.backward()
            found.append((loss.detach(), seen.grad))
        assert all(map(torch.equal, *found)), name


def test_pixels_that_are_not_annotated_are_not_counted():
    prediction = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]]).bool()
    reference = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]]).bool()
    known = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    assert utils.pixel_counts(prediction, reference, known).tolist() == [1, 1, 1, 2]


def test_validation_is_of_annotated_pixels(half_annotated):
    dataset = PatchDataset(half_annotated, "val", transform("val"))
    torch.manual_seed(0)
    model = UNet(4).eval()
    machine = Machine(torch.device("cpu"), torch.float32, 0, 1)
    image_of = torch.zeros(len(dataset), dtype=torch.int64)
    loss, counts = train.validate(model, DataLoader(dataset, 5), machine, StopSignal(), image_of)
    images, masks, _ = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    with torch.inference_mode():
        logits = model(torch.stack(images))[:, 0].numpy()
    masks = torch.stack(masks)[:, 0].numpy()
    known = masks > -1.5
    assert 0.2 < known.mean() < 0.9
    assert counts.tolist() == [pixel_counts(logits[known] > 0, masks[known] > 0).tolist()]
    odds = np.where(masks > 0, logits, -logits)[known]
    assert loss == pytest.approx(np.log1p(np.exp(-odds)).mean(), rel=1e-4)


def test_pictures_are_grey_where_nothing_is_annotated():
    masks = torch.tensor([0.0, 0.25, -1.0, -2.0])
    assert utils.with_grey(masks, masks.abs()).tolist() == [0, 0.25, 1, 0.5]


def test_what_is_outlined_beyond_the_regions_changes_nothing(mine):
    root, boxes = mine
    region = feature([(5, 5), (70, 20), (60, 80), (20, 70)], "Region")
    found = []
    for beyond in (), (feature((86, 60, 96, 80)), feature((0, 30, 6, 40))):
        for name in boxes:
            annotate(root, name, feature((40, 20, 50, 30)), region, *beyond)
        cut(root)
        files = fingerprint(root)
        found.append({path: content for path, (content, _) in files.items() if path.suffix in
                      (".png", ".csv") and path.name != patches.ANNOTATIONS})  # fmt: skip
    assert found[0] == found[1] and len(found[0]) > 50


def test_a_network_learns_from_regions_and_is_scored_in_them(
    half_annotated, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(splitting, "LEAST_COUNTED", 1)
    root = half_annotated
    run = learn(root, tmp_path / "log", "--sampler", "balanced", "--augment", "strong")
    metrics = table_of(run / "metrics.csv")
    assert all(np.isfinite(float(row["val_loss"])) for row in metrics)
    (line,) = (line for line in (run / "train.log").read_text().splitlines() if "chosen on" in line)
    assert "AJI" in line and "count error" not in line  # which nobody knows
    counted = counted_images([str(root)], [manifest.read_manifest(root)])
    assert [one.count for one in counted] == [0, 0, 0]
    labels, known = read_reference(counted[0].reference, (96, 80), counted[0].path)
    assert labels.max() == 6 and 0 < known.mean() < 1  # as drawn, in the region and beyond
    results = tmp_path / "results"
    sure_of_all = ("--threshold", 0.01, "--confidence", 0)
    infer(results, "--root", root, "--ckpt", run, *sure_of_all)
    assert "scored within its regions alone" in capsys.readouterr().out
    row = read_record(results, "Drawn_04")["row"]
    assert "gt_nuclei" not in row and "gt_contours" not in row
    annotation = annotated.open_annotation(root / "annotations" / "Drawn_04.geojson", (96, 80))
    known = annotation.known(0, 0, 96, 80)
    predicted = cv2.imread(str(results / "Drawn_04_prediction.png"), cv2.IMREAD_GRAYSCALE) > 0
    truth = annotation.numbers(0, 0, 96, 80)
    both = (predicted & (truth > 0))[known].sum()
    total = predicted[known].sum() + (truth > 0)[known].sum()
    assert both and row["dice"] == pytest.approx(2 * both / total)
    inside = {n for n in range(1, truth.max() + 1) if known.ravel()[np.argmax(truth == n)]}
    counts = row["errors"]
    assert counts["matched"] + counts["missed"] + counts["merged_reference"] + counts[
        "split_reference"
    ] == len(inside)
    assert 0 < len(inside) < truth.max()


def test_a_whole_annotation_is_a_reference_like_a_label_map(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(splitting, "LEAST_COUNTED", 1)
    root, boxes = mine
    annotate_all(root, boxes)
    (root / "instance_labels").mkdir()  # an older label map, of one nucleus
    old = np.zeros((96, 80), np.uint8)
    old[:9, :9] = 1
    pictures.write_image(root / "instance_labels" / "Drawn_04.png", old)
    cut(root)
    run = learn(root, tmp_path / "log")
    assert "chosen on 1 images" in (run / "train.log").read_text()
    counted = counted_images([str(root)], [manifest.read_manifest(root)], ("train",))
    assert [c.count for c in counted] == [len(boxes[f"Drawn_{n:02}"][0]) for n in (1, 2, 3)]
    infer(tmp_path / "one", "--root", root, "--ckpt", run)
    maps = tmp_path / "instance_labels"
    maps.mkdir()
    for name, (_, drawn) in boxes.items():
        tifffile.imwrite(maps / f"{name}.tif", drawn)
    image = root / "tissue_images" / "Drawn_04.tif"
    for place, masks in ((tmp_path / "two", maps), (tmp_path / "three", root / "annotations")):
        infer(place, "--images", image, "--masks", masks, "--ckpt", run)
    rows = [table_of(tmp_path / one / "counts.csv") for one in ("one", "two", "three")]
    for row in rows:
        row[0].pop("seconds")
    assert rows[0] == rows[1] == rows[2]
    assert rows[0][0]["gt_nuclei"] == str(len(boxes["Drawn_04"][0]))


def test_flags_name_the_folder_of_results():
    assert preprocess.parse_args(["--corrected_from", "r", *SMALL]).corrected_from == "r"
