"""Several sets at once, and sets with label maps: what is cut, and what is learned from it."""

import shutil

import numpy as np
import pytest
import tifffile
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import preprocess
import train
from learning.augment import transform
from learning.loading import number_images
from learning.losses import depth_loss, total_loss
from learning.splitting import counted_images
from learning.start import take_weights
from model import build
from tests.scripts import infer, learn, table_of
from tests.test_preprocess import put, refused, run
from tissue import patches
from tissue.files import InputError
from tissue.manifest import read_manifest, read_table
from tissue.pairs import set_folders
from tissue.patches import PatchDataset
from tissue.pictures import write_image
from tissue.synthetic import draw_tissue


def folder_of(tmp_path, name, um=None, size=96, side=None, numbers=(1, 2, 3)):
    for number in numbers:
        put(tmp_path / name, f"{name}_{number:02}", um=um, size=size, side=side, seed=number)
    return tmp_path / name


def label(root, size=96, numbers=(1, 2, 3), scale=1):
    """Give drawn images their label maps, each pixel of which is `scale` x `scale` of the image."""
    (root / "instance_labels").mkdir(exist_ok=True)
    for number in numbers:
        labels = draw_tissue(size, size, number).labels.astype(np.uint16)
        labels = labels.repeat(scale, 0).repeat(scale, 1)
        write_image(root / "instance_labels" / f"{root.name}_{number:02}.png", labels)


# --- label maps


def test_patches_of_a_labelled_image_tell_its_nuclei_apart(tmp_path):
    root = folder_of(tmp_path, "one", um=0.25)
    label(root)
    run(root)
    labels = draw_tissue(96, 96, 1).labels
    number = np.bincount(labels[labels > 0]).argmax()  # the largest nucleus
    ys, xs = np.nonzero(labels == number)
    y, x = ys.min() // 16 * 16, xs.min() // 16 * 16
    row = next(
        row for row in read_table(root, "train")
        if row["name"] == "one_01" and (row["y"], row["x"]) == (min(y, 64), min(x, 64))
    )  # fmt: skip
    _, mask = patches.read_patch(root, "train", row["file"])
    own = labels[row["y"] : row["y"] + 32, row["x"] : row["x"] + 32]
    assert ((mask > 0) == (own > 0)).all()
    assert mask[own == number].max() > 100 and mask[own == number].min() < 128
    source = read_manifest(root)["images"][0]
    assert source["labels"] == "instance_labels/one_01.png" and source["labels_sha256"]


def test_label_maps_alone_are_masks_too(tmp_path):
    root = folder_of(tmp_path, "one", um=0.25)
    label(root)
    for mask in (root / "masks").iterdir():
        mask.unlink()
    (root / "masks").rmdir()
    run(root)
    dataset = PatchDataset(root, "train", transform("val"))
    masks = torch.stack([dataset[index][1] for index in range(len(dataset))])
    assert masks.min() == 0 and masks.max() == 1
    assert read_manifest(root)["images"][0]["mask"] == "instance_labels/one_01.png"


@pytest.mark.parametrize("folder", ["masks", "mask binary"])
def test_masks_whose_values_are_nuclei_are_label_maps(tmp_path, folder):
    """Two squares that touch: the border between them is as shallow as any, and they are two."""
    root = folder_of(tmp_path, "one", um=0.25)
    (root / "masks").rename(root / folder)
    squares = np.zeros((96, 96), np.uint8)
    squares[8:24, 4:16], squares[8:24, 16:28] = 1, 2
    write_image(root / folder / "one_01.png", squares)
    run(root)
    manifest = read_manifest(root)
    labelled, *plain = manifest["images"]
    assert labelled["labels"] == labelled["mask"] == f"{folder}/one_01.png"
    assert labelled["labels_sha256"] and not any(source["labels"] for source in plain)
    row = next(row for row in read_table(root, "train") if row["name"] == "one_01")
    _, mask = patches.read_patch(root, "train", row["file"])
    assert (row["y"], row["x"]) == (0, 0) and ((mask > 0) == (squares[:32, :32] > 0)).all()
    assert mask[16, 9] == 255 and mask[16, 22] == 255 and mask[16, 15] == mask[16, 4] < 100
    (counted,) = counted_images([root], [manifest])
    assert counted.count == 2 and counted.reference == root / folder / "one_01.png"


def test_what_only_the_mask_has_is_of_unknown_depth(tmp_path):
    root = folder_of(tmp_path, "one", um=0.25)
    label(root)
    empty = np.zeros((96, 96), np.uint16)
    write_image(root / "instance_labels" / "one_01.png", empty)
    run(root)
    dataset = PatchDataset(root, "train", transform("val"))
    first = torch.stack([dataset[k][1] for k in range(25)])  # of one_01
    second = torch.stack([dataset[k][1] for k in range(25, 50)])
    assert set(first.unique().tolist()) == {-1, 0}
    assert second.min() == 0 and second.max() == 1


def test_a_label_map_that_does_not_fit_its_mask_is_said(tmp_path, capsys):
    root = folder_of(tmp_path, "one", um=0.25)
    label(root)
    run(root)
    assert "Dice" not in capsys.readouterr().out
    turned = draw_tissue(96, 96, 2).labels.astype(np.uint16)[::-1, ::-1]
    write_image(root / "instance_labels" / "one_02.png", turned)
    run(root)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "Dice" in line)
    path = root / "instance_labels" / "one_02.png"
    assert line.startswith(f"{path}: found nuclei at other places than {root / 'masks'}")
    assert "expected 0.7 at least" in line


def test_a_label_map_changes_the_set(tmp_path, capsys):
    root = folder_of(tmp_path, "one", um=0.25)
    run(root)
    label(root)
    run(root)
    assert "nothing to do" not in capsys.readouterr().out
    run(root)
    assert "nothing to do" in capsys.readouterr().out


def test_a_label_map_of_another_size_or_a_jpeg_is_refused(tmp_path):
    root = folder_of(tmp_path, "one", um=0.25)
    label(root)
    write_image(root / "instance_labels" / "one_01.png", np.ones((40, 50), np.uint16))
    (root / "instance_labels" / "one_02.png").unlink()
    tissue = draw_tissue(96, 96, 2)
    write_image(root / "instance_labels" / "one_02.jpg", tissue.labels > 0)
    said = refused(root)
    assert "one_01.png: found a label map of 40 x 50 pixels" in said
    assert "one_02.jpg: found a JPEG, which holds no numbers" in said


# --- pixel sizes


def test_several_roots_are_cut_at_one_pixel_size(tmp_path, capsys):
    roots = [folder_of(tmp_path, "one", um=0.5), folder_of(tmp_path, "two", um=0.25, size=192)]
    run(tmp_path / "one", "--root", *roots)
    assert "enlarged" not in capsys.readouterr().out.split("one")[0]
    sizes = {read_manifest(root)["pixel_size_um"] for root in roots}
    assert len(sizes) == 1
    run(tmp_path / "one", "--root", tmp_path)  # a folder of folders
    assert capsys.readouterr().out.count("nothing to do") == 2
    run(tmp_path / "one", "--root", *roots, "--patch_pixel_size", 0.5)
    assert [read_manifest(root)["pixel_size_um"] for root in roots] == [0.5, 0.5]
    assert [read_manifest(root)["patches"]["train"] for root in roots] == [50, 50]


def test_a_set_without_pixel_size_goes_by_its_nuclei(tmp_path, capsys):
    """Nuclei drawn for 0.25 um, shown twice as large, are those of 0.125 um."""
    known = folder_of(tmp_path, "known", um=0.25)
    unknown = folder_of(tmp_path, "unknown", size=384, side=192)
    label(unknown, size=192, scale=2)
    drawn = [np.bincount(draw_tissue(192, 192, n).labels.ravel())[1:] for n in (1, 2, 3)]
    expected = np.sqrt(28 / (4 * np.median(np.concatenate(drawn))))
    run(known, "--root", known, unknown)
    said = capsys.readouterr().out
    own = read_manifest(unknown)["images"][0]["pixel_size_um"]
    assert own == pytest.approx(expected, rel=0.15)  # nuclei at the edge do not count
    assert f"{unknown}: taken as {own:g} um a pixel, by its median nucleus of" in said
    assert read_manifest(unknown)["pixel_size_um"] == read_manifest(known)["pixel_size_um"]


def test_a_pixel_size_can_be_given_for_each_root(tmp_path):
    roots = [folder_of(tmp_path, name, um=0.25) for name in ("one", "two")]
    label(roots[1])
    run(roots[0], "--root", *roots, "--pixel_size", 0.5, "nuclei")
    one, two = (read_manifest(root)["images"][0]["pixel_size_um"] for root in roots)
    assert one == 0.5 and two != 0.25
    assert "found 3 values for 2 roots" in refused(
        tmp_path, "--root", *roots, "--pixel_size", 1, 1, 1
    )
    assert "found no label map with nuclei" in refused(
        tmp_path, "--root", *roots, "--pixel_size", "nuclei"
    )
    assert "expected micrometres or nuclei" in refused(roots[0], "--pixel_size", "many")


def test_a_fault_in_one_root_leaves_all_as_they_were(tmp_path):
    roots = [folder_of(tmp_path, name, um=0.25) for name in ("one", "two")]
    (roots[1] / "tissue_images" / "two_02.tif").write_bytes(b"II*\0")
    assert "two_02.tif" in refused(tmp_path, "--root", *roots)


def test_a_picture_on_both_sides_in_one_root_leaves_all_as_they_were(tmp_path):
    roots = [folder_of(tmp_path, name, um=0.25) for name in ("one", "two")]
    for folder, suffix in (("tissue_images", "tif"), ("masks", "png")):
        shutil.copy(roots[1] / folder / f"two_01.{suffix}", roots[1] / folder / f"two_03.{suffix}")
    text = f"{roots[1] / 'two_01'} = {roots[1] / 'two_03'}"
    assert text in refused(tmp_path, "--root", *roots)


@pytest.mark.parametrize("more", [0, 1])
def test_a_group_on_both_sides_of_two_roots_is_said(tmp_path, capsys, more):
    one, two = (folder_of(tmp_path, name) for name in ("one", "two"))
    for root, first in ((one, 0), (two, more)):  # p1, p2 and p3; or p2, p3 and p4
        for path in (*(root / "tissue_images").iterdir(), *(root / "masks").iterdir()):
            path.rename(path.with_name(f"{root.name}-p{int(path.stem[-1]) + first}{path.suffix}"))
    run(tmp_path, "--root", one, two, "--group_pattern", "p[0-9]")
    parts = {"train": set(), "val": set()}
    for root in (one, two):
        for image in read_manifest(root)["images"]:
            parts[image["split"]].add(image["name"][-2:])
    both = parts["train"] & parts["val"]
    said = f"so that scores may be too good: {', '.join(sorted(both))}; if they are the same"
    assert bool(both) == bool(more) == (said in capsys.readouterr().out)


def test_a_table_of_pixel_sizes_names_one_image_each(tmp_path):
    one, two = (folder_of(tmp_path, name) for name in ("one", "two"))
    for folder in ("tissue_images", "masks"):
        (path,) = (two / folder).glob("two_02.*")
        path.rename(path.with_name(f"One_02{path.suffix}"))
    table = tmp_path / "sizes.csv"
    table.write_text("image,pixel_size_um\none_02,0.5\none_01,0.5\n")
    text = refused(tmp_path, "--root", one, two, "--pixel_sizes", table)
    assert "sizes.csv: found One_02, of which several roots have an image, expected" in text


def test_16_bit_images_of_several_roots_are_of_one_brightness(tmp_path):
    """And a set that is cut already with other bits is cut anew."""
    roots = [folder_of(tmp_path, name, um=0.25) for name in ("one", "two")]
    for root, largest in zip(roots, (4000, 60_000), strict=True):
        for path in (root / "tissue_images").iterdir():
            pixels = (tifffile.imread(path) / 255 * largest).astype(np.uint16)
            tifffile.imwrite(path, pixels, photometric="rgb")
    for root in roots:
        run(root)
    assert [read_manifest(root)["bits"] for root in roots] == [12, 16]
    run(tmp_path, "--root", *roots)
    assert [read_manifest(root)["bits"] for root in roots] == [16, 16]
    learn(tmp_path, tmp_path / "log", "--root", *roots, "--epoch", 1)


# --- learning


def leaking(tmp_path):
    """Two sets, each cut by itself; image 2 of one, which is learned, is image 3 of the other."""
    one, two = folder_of(tmp_path, "one"), folder_of(tmp_path, "two", numbers=(4, 5))
    for kind, suffix in (("tissue_images", "tif"), ("masks", "png")):
        shutil.copy(one / kind / f"one_02.{suffix}", two / kind / f"two_03.{suffix}")
    return one, two


def test_a_picture_on_both_sides_in_two_roots_is_refused_whatever_is_cut_already(tmp_path):
    one, two = leaking(tmp_path)
    both = [tmp_path, "--root", one, two]
    text = f"validation ({one / 'one_02'} = {two / 'two_03'})"
    assert text in refused(*both)
    run(one)
    assert text in refused(*both)  # one is up to date
    run(two)
    assert text in refused(*both)
    run(tmp_path, "--root", one, two, "--val_pattern", "*0[234]")


def test_a_picture_on_both_sides_in_another_format_is_refused_whatever_is_cut_already(tmp_path):
    one, two = leaking(tmp_path)
    path = two / "tissue_images" / "two_03.tif"
    write_image(path.with_suffix(".png"), tifffile.imread(path))
    path.unlink()
    run(one)
    run(two)
    text = f"validation ({one / 'one_02'} = {two / 'two_03'})"
    assert text in refused(tmp_path, "--root", one, two)
    with pytest.raises(InputError, match=r"two: two_03: found .*\(\S*one: one_02\)"):
        learn(tmp_path, tmp_path / "log", "--root", one, two)


def test_a_root_that_is_given_twice_is_one(tmp_path):
    root = folder_of(tmp_path, "one")
    run(root)
    assert set_folders([str(root), f"{root}/", str(root)], "patches.json") == [str(root)]
    folder = learn(root, tmp_path / "log", "--root", root, f"{root}/", "--epoch", 1)
    assert "50 training and 25 validation patches" in (folder / "train.log").read_text()


@pytest.mark.parametrize(
    ("empty", "text"),
    [((3,), "in any of the 25 validation patches"), ((1, 2), "in any of the 50 training patches")],
)
def test_patches_without_any_nucleus_are_refused_before_anything_is_written(tmp_path, empty, text):
    root = folder_of(tmp_path, "one")
    for number in empty:
        write_image(root / "masks" / f"one_{number:02}.png", np.zeros((96, 96), np.uint8))
    run(root)
    with pytest.raises(InputError, match=f"one: found no nucleus {text}"):
        learn(root, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_one_patch_with_nuclei_is_enough(tmp_path):
    root = folder_of(tmp_path, "one")
    write_image(root / "masks" / "one_01.png", np.zeros((96, 96), np.uint8))
    corner = np.zeros((96, 96), np.uint8)
    corner[:4, :4] = 255
    write_image(root / "masks" / "one_03.png", corner)
    run(root)
    learn(root, tmp_path / "log", "--epoch", 1)


def test_an_image_that_is_learned_in_one_root_and_validated_in_another_is_refused(tmp_path):
    one, two = leaking(tmp_path)
    run(one)
    run(two)
    for roots in ((one, two), (two, one)):
        with pytest.raises(InputError, match=r"two: two_03: found .*\(\S*one: one_02\)"):
            learn(tmp_path, tmp_path / "log", "--root", *roots)
    assert not (tmp_path / "log").exists()


def test_a_network_learns_from_several_roots_and_goes_on(tmp_path):
    roots = [folder_of(tmp_path, name, um=0.25) for name in ("one", "two")]
    label(roots[1])
    run(roots[0], "--root", *roots)
    log = tmp_path / "log"
    run_folder = learn(roots[0], log, "--root", *roots, "--epoch", 1, "--sampler", "balanced")
    best = torch.load(run_folder / "best.pt", weights_only=True)
    assert best["config"]["instances"] is True
    assert best["model"]["last_conv.weight"].shape[0] == 2
    assert "100 training and 50 validation patches" in (run_folder / "train.log").read_text()
    with pytest.raises(InputError, match="a finished run"):
        train.main(train.parse_args(["--resume", str(run_folder)]))
    masks_alone = learn(roots[0], log, "--epoch", 1, "--init", run_folder / "best.pt")
    assert "instances" not in torch.load(masks_alone / "best.pt", weights_only=True)["config"]
    assert "have no label maps" in (masks_alone / "train.log").read_text()
    assert not (masks_alone / "before_after.csv").exists()
    both = learn(tmp_path, log, "--epoch", 1, "--init", masks_alone / "best.pt")
    assert torch.load(both / "best.pt", weights_only=True)["config"]["instances"] is True


def test_validation_images_of_several_roots_are_inferred(tmp_path):
    roots = [folder_of(tmp_path, name, um=0.25) for name in ("one", "two")]
    label(roots[1])
    run(roots[0], "--root", *roots)
    run_folder = learn(roots[0], tmp_path / "log", "--root", tmp_path, "--epoch", 1)
    infer(tmp_path / "out", "--root", *roots, "--ckpt", run_folder)
    rows = table_of(tmp_path / "out" / "counts.csv")
    assert [row["image"] for row in rows] == ["one_03", "two_03"]
    assert int(rows[1]["gt_nuclei"]) == draw_tissue(96, 96, 3).labels.max()
    again = tmp_path / "again"
    shutil.copytree(roots[0], again)
    with pytest.raises(InputError, match="one_03"):  # two files of one name
        infer(tmp_path / "out", "--root", roots[0], again, "--ckpt", run_folder)


def test_a_set_that_is_not_cut_is_said_to_be_passed_over(tmp_path, capsys):
    one = folder_of(tmp_path / "sets", "one", um=0.25)
    two = folder_of(tmp_path / "sets", "two", um=0.25)
    run(one)
    folder = learn(tmp_path / "sets", tmp_path / "log", "--epoch", 1)
    infer(tmp_path / "out", "--root", tmp_path / "sets", "--ckpt", folder)
    said = f"{two}: not cut, passed over; run preprocess.py --root {two.parent}\n"
    assert capsys.readouterr().out.count(said) == 2


def test_a_folder_with_uncut_images_of_its_own_does_not_stand_for_the_sets_within_it(tmp_path):
    """As data/ beside data/demo, which is drawn tissue."""
    root = folder_of(tmp_path, "data", um=0.25)
    demo = folder_of(root, "demo", um=0.25)
    run(demo)
    said = f"{root}: found images that are not cut, expected a patch set; run preprocess.py --root"
    with pytest.raises(InputError) as error:
        learn(root, tmp_path / "log")
    assert str(error.value).startswith(said) and str(error.value).endswith(f"--root {demo}")
    with pytest.raises(InputError, match="found images that are not cut"):
        infer(tmp_path / "out", "--root", root)
    assert not (tmp_path / "log").exists() and not (tmp_path / "out").exists()
    run(root)
    learn(root, tmp_path / "log", "--epoch", 1)


def test_images_of_one_name_have_their_roots_before_them(tmp_path):
    one, two = (folder_of(tmp_path / name, "one") for name in ("a", "b"))
    for root in (one, two):
        run(root)
    sets = [PatchDataset(roots, "val", transform("val")) for roots in ([one, two], [one])]
    assert number_images(sets[0])[1] == [f"{one}/one_03", f"{two}/one_03"]
    assert number_images(sets[1])[1] == ["one_03"]


def test_a_label_map_is_that_of_its_root_whatever_the_case_of_its_name(tmp_path):
    """Also where an image that another root learns has the same name."""
    one, two = (folder_of(tmp_path, name, um=0.25) for name in ("one", "two"))
    for root in (one, two):
        label(root)
        for path in (root / "instance_labels").iterdir():
            path.rename(path.with_name(path.name.upper().replace("PNG", "png")))
    for folder in ("tissue_images", "masks", "instance_labels"):  # `two` learns a One_03
        (path,) = (two / folder).glob("[tT][wW][oO]_02.*")
        path.rename(path.with_name(f"One_03{path.suffix}"))
    write_image(two / "instance_labels" / "One_03.png", np.eye(96, dtype=np.uint16))
    run(one)
    run(two, "--val_pattern", "two_03")
    folder = learn(one, tmp_path / "log", "--epoch", 1)
    infer(tmp_path / "out", "--root", one, two, "--ckpt", folder)
    rows = table_of(tmp_path / "out" / "counts.csv")
    true = str(draw_tissue(96, 96, 3).labels.max())
    assert [(row["image"], row["gt_nuclei"]) for row in rows] == [
        ("one_03", true),
        ("two_03", true),
    ]


def test_patches_without_the_images_they_were_cut_from_are_learned_from(tmp_path):
    root = folder_of(tmp_path, "one", um=0.25)
    label(root)
    run(root)
    for folder in ("tissue_images", "masks", "instance_labels"):
        shutil.rmtree(root / folder)
    run_folder = learn(root, tmp_path / "log", "--epoch", 1)
    assert torch.load(run_folder / "best.pt", weights_only=True)["config"]["instances"] is True
    log = (run_folder / "train.log").read_text()
    assert "5 validation images with label maps would choose it" in log


def test_an_output_that_is_kept_keeps_its_weights():
    whole, half = (build({"arch": "unet", "dimensions": 4, "instances": i}) for i in (True, False))
    take_weights(half, {"model": whole.state_dict()})
    assert torch.equal(half.last_conv.weight, whole.last_conv.weight[:1])
    other = build(whole.config)
    kept = other.last_conv.weight[1:].clone()
    take_weights(other, {"model": half.state_dict()})
    assert torch.equal(other.last_conv.weight[:1], half.last_conv.weight)
    assert torch.equal(other.last_conv.weight[1:], kept)
    assert torch.equal(other.up1.conv.conv[0].weight, whole.up1.conv.conv[0].weight)


def test_the_loss_by_hand():
    logits = torch.tensor([[[[0.0, 2.0, -1.0]], [[0.0, 1.0, 3.0]]]])  # (1, 2, 1, 3)
    masks = torch.tensor([[[[0.0, 0.5, -1.0]]]])
    own = total_loss(binary_cross_entropy_with_logits, logits[:, :1], masks)
    ln = np.log
    p = 1 / (1 + np.exp(-np.array([0.0, 2.0, -1.0])))
    assert own.item() == pytest.approx(-(ln(1 - p[0]) + ln(p[1]) + ln(p[2])) / 3, rel=1e-6)
    d = 1 / (1 + np.exp(-1.0))
    depth = (ln(2) - (0.5 * ln(d) + 0.5 * ln(1 - d))) / 3  # the nucleus of unknown depth: nothing
    both = total_loss(binary_cross_entropy_with_logits, logits, masks)
    assert both.item() == pytest.approx(own.item() + depth, rel=1e-6)
    beside = torch.cat([masks, torch.tensor([[[[0.0, -1.0, 0.0]]]])])  # a patch of a mask alone
    found = depth_loss(logits[:, 1:].repeat(2, 1, 1, 1), beside)
    assert found.item() == pytest.approx(depth / 2, rel=1e-6)


def test_flags_of_preprocess_name_the_roots():
    args = preprocess.parse_args(["--root", "a", "b"])
    assert args.root == ["a", "b"] and preprocess.parse_args([]).root == ["./data/"]
