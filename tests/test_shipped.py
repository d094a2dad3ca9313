"""The weights that ship do their work without a training, and their cards are of these files."""

import hashlib

import pytest
import torch

import inference
from learning import checkpoints
from model import UNet
from tests.scripts import cut, infer, learn, table_of
from tissue.files import InputError
from tissue.synthetic import write_demo
from tools import ship_weights

CARDS = inference.SHIPPED.parents[2] / "docs"


def test_without_a_checkpoint_the_shipped_weights_segment_drawn_tissue(tmp_path):
    write_demo(tmp_path, 3, 256, seed=99)
    images, labels = tmp_path / "tissue_images", tmp_path / "instance_labels"
    infer(tmp_path / "results", "--images", images, "--masks", labels)
    rows = table_of(tmp_path / "results" / "counts.csv")
    assert len(rows) == 3
    assert all(float(row["dice"]) > 0.7 for row in rows)  # of which they learned nothing
    assert all(abs(int(row["nuclei"]) / int(row["gt_nuclei"]) - 1) < 0.3 for row in rows)


@pytest.mark.parametrize(
    ("name", "card", "megabytes"),
    [("nuclei.pt", "model_card.md", 25), ("nuclei_unet.pt", "model_card_unet.md", 40)],
)
def test_the_model_card_is_of_the_file_that_ships(name, card, megabytes):
    weights = (inference.SHIPPED.parent / name).read_bytes()
    assert len(weights) < megabytes * 1e6
    assert hashlib.sha256(weights).hexdigest() in (CARDS / card).read_text()


def test_the_files_that_ship_say_what_inference_needs():
    shipped = checkpoints.load_checkpoint(inference.SHIPPED)
    assert shipped["pixel_size_um"] == pytest.approx(0.25, rel=0.05)
    assert shipped["config"]["arch"] == "tf_efficientnet_lite0" and shipped["config"]["instances"]
    assert shipped["stain"] is None and shipped["threshold"] == 0.5
    assert 0 < shipped["split"]["confidence"] < 1
    assert shipped["count_error"] == {"mean": 0.24, "images": 675}  # of the card's tables
    unet = checkpoints.load_checkpoint(inference.SHIPPED.with_name("nuclei_unet.pt"))  # of 0.1.0
    assert unet["pixel_size_um"] == pytest.approx(0.25, rel=0.05)
    assert unet["config"] == {"arch": "unet", "dimensions": 32} and unet["threshold"] == 0.45
    assert unet["stain"] == {"mean": (62.0, 26.0, -18.0), "spread": (17.0, 10.5, 8.5)}


def ship(out, *runs, flags=("--pixel_size", 0.25)):
    files = (run if run.suffix else run / "last.pt" for run in runs)
    arguments = [*files, "--threshold", 0.4, "--out", out, *flags]
    ship_weights.main(ship_weights.parse_args([str(a) for a in arguments]))


def test_weights_of_several_runs_are_averaged_and_infer(root, tmp_path):
    cut(root)
    first = learn(root, tmp_path / "log", "--epoch", 1)
    start = ("--epoch", 1, "--init", first / "last.pt", "--lr", 1e-2)
    runs = [first, *(learn(root, tmp_path / "log", *start, "--seed", seed) for seed in (1, 2))]
    ship(tmp_path / "shipped.pt", *runs)
    shipped = torch.load(tmp_path / "shipped.pt", weights_only=True)
    models = [torch.load(run / "last.pt", weights_only=True)["model"] for run in runs]
    learned = [key for key, value in shipped["model"].items() if value.is_floating_point()]
    for key in learned:
        mean = sum(model[key] for model in models) / 3
        torch.testing.assert_close(shipped["model"][key], mean.half())
    for model in models:
        assert any(not torch.equal(shipped["model"][key], model[key].half()) for key in learned)
    assert [run["seed"] for run in shipped["args"]] == [0, 1, 2]
    assert str(root) not in str(shipped["args"])
    ship(tmp_path / "again.pt", runs[1], tmp_path / "shipped.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert [run["seed"] for run in again["args"]] == [1, 0, 1, 2]
    for key in learned:
        mean = (models[1][key] + shipped["model"][key].float()) / 2
        torch.testing.assert_close(again["model"][key], mean.half())
    infer(tmp_path / "results", "--ckpt", tmp_path / "shipped.pt", "--root", root)
    assert len(table_of(tmp_path / "results" / "counts.csv")) == 1


def test_how_nuclei_are_split_can_be_changed_as_the_file_is_made(tmp_path):
    run, out = finished_run(tmp_path, 0.25), tmp_path / "shipped.pt"
    ship(out, run, flags=("--split", "h=0.3", "--confidence", 0.4))
    usual = checkpoints.load_checkpoint(run)["split"]
    assert checkpoints.load_checkpoint(out)["split"] == usual | {"h": 0.3, "confidence": 0.4}
    with pytest.raises(InputError, match="--split: found size=3"):
        ship(out, run, flags=("--split", "size=3"))


def test_networks_of_other_widths_are_not_averaged(root, tmp_path):
    cut(root)
    runs = [learn(root, tmp_path / "log", "--epoch", 1, "--dimensions", width) for width in (4, 8)]
    with pytest.raises(InputError, match="average runs of one network"):
        ship(tmp_path / "shipped.pt", *runs)
    assert not (tmp_path / "shipped.pt").exists()


def finished_run(folder, pixel_size, seed=0, largest=1.0):
    """A last.pt as one that learned from pixels of such a size, with weights of its own."""
    torch.manual_seed(seed)
    model = UNet(4)
    model.last_conv.bias.data.fill_(largest)
    checkpoint = {
        "format_version": 1,
        "config": model.config,
        "normalisation": {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)},
        "channel_order": "rgb",
        "threshold": 0.5,
        "pixel_size_um": pixel_size,
        "model": model.state_dict(),
    }
    path = folder / f"{seed}.pt"
    torch.save(checkpoint, path)
    return path


def test_weights_ship_with_the_pixel_size_of_their_runs_and_not_without(tmp_path):
    out = tmp_path / "shipped.pt"
    known = [finished_run(tmp_path, size, seed) for seed, size in enumerate((0.24, 0.26))]
    ship(out, *known, flags=())
    assert torch.load(out, weights_only=True)["pixel_size_um"] == pytest.approx(0.25)
    out.unlink()
    other, unknown = finished_run(tmp_path, 0.5, 2), finished_run(tmp_path, None, 3)
    for files in ((unknown,), (unknown, known[0]), (known[0], unknown), (known[0], other)):
        with pytest.raises(InputError, match=r"found a pixel size of .*give --pixel_size"):
            ship(out, *files, flags=())
        assert not out.exists()
    ship(out, unknown, flags=("--pixel_size", 0.5))
    assert torch.load(out, weights_only=True)["pixel_size_um"] == 0.5


@pytest.mark.parametrize(
    "flags", [("--pixel_size", size) for size in ("nan", "inf", -0.25, 0, 250)]
)
def test_no_pixel_size_that_cannot_be_ships(tmp_path, flags):
    with pytest.raises(InputError, match="--pixel_size: found"):
        ship(tmp_path / "shipped.pt", finished_run(tmp_path, 0.25), flags=flags)
    assert not (tmp_path / "shipped.pt").exists()


def test_weights_that_half_precision_cannot_hold_do_not_ship(tmp_path):
    out = tmp_path / "shipped.pt"
    ship(out, finished_run(tmp_path, 0.25))
    before = out.read_bytes()
    with pytest.raises(InputError, match=r"half precision.*not finite"):
        ship(out, finished_run(tmp_path, 0.25, largest=1e5))
    assert out.read_bytes() == before


def test_weights_do_not_ship_into_a_folder(tmp_path):
    with pytest.raises(InputError, match=r"--out .*found a folder"):
        ship(tmp_path, finished_run(tmp_path, 0.25))


def test_equal_weights_ship_as_equal_bytes(tmp_path):
    run = finished_run(tmp_path, 0.25)
    for name in ("one.pt", "two.pt"):
        ship(tmp_path / name, run, flags=())
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
