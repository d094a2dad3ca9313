"""What decides a default is measured from the trainings to the table, in small."""

import json
import re
import shutil
from hashlib import sha256

import numpy as np
import pytest
import torch

from benchmarks import data
from experiments import (
    ablation,
    counts,
    cross_validation,
    field_protocol,
    finishing,
    left_out,
    review,
    transfer,
)
from learning.predictor import Predictor
from model import UNet
from tests.scripts import checkpoint_of, cut, infer, learn, table_of
from tissue.files import InputError
from tissue.images import read_image
from tissue.manifest import read_manifest
from tissue.patches import SPLITS
from tissue.synthetic import write_demo

SCORES = "dice", "aji", "pq"  # columns of counts.csv


@pytest.fixture
def study(tmp_path):
    """Six drawn images of two organs, and a function that runs the study on them."""
    write_demo(tmp_path / "tissue", 6, 160)
    output = tmp_path / "docs"
    output.mkdir()

    def run(*more):
        flags = ["--root", tmp_path / "tissue", "--results", output, "--gpu_id", -1]
        flags += ["--dimensions", 2, "--budget", 16, "--runs", "plain", *more]
        ablation.main(ablation.parse_args(list(map(str, flags))))
        return output

    return run


@pytest.mark.slow
def test_the_study_goes_on_where_it_stopped_and_keeps_what_was_learned(study, tmp_path):
    output = study("--other", tmp_path / "tissue")
    rows = table_of(output / "ablation.csv")
    assert len(rows) == 2 * 3  # folds; nothing averaged, weights averaged, --tta with them
    assert {row["fold"] for row in rows} == {"1/2", "2/2"}
    for row in rows:
        assert float(row["worst_dice"]) <= float(row["dice"]) <= 1
        assert abs(float(row["count_bias"])) <= float(row["count_error"])
    report = output / "ablation.md"
    report.write_text(report.read_text() + "\nThat drawn tissue is easy.\n")
    before = (output / "ablation.csv").read_bytes()
    study("--other", tmp_path / "tissue")  # all is there: nothing is trained
    assert (output / "ablation.csv").read_bytes() == before
    study("balanced", "--confirm")
    rows = table_of(output / "ablation.csv")[6:]
    assert [row["run"] for row in rows] == ["plain"] * 3 + ["balanced"] * 3
    assert {row["fold"] for row in rows} == {"validation"}
    assert [row["sampler"] for row in rows] == ["uniform"] * 3 + ["balanced"] * 3
    text = report.read_text()
    assert text.endswith("That drawn tissue is easy.\n")
    assert text.count("| plain | 2 |") == 1  # trainings
    assert text.count("| plain | 1 |") == 2  # seeds, and the training on all folds
    assert "## On the validation images" in text
    assert read_image(output / "ablation.png").std() > 10  # something is drawn


def test_folds_hold_out_whole_organs_each_once(study, tmp_path):
    with pytest.raises(InputError, match=r"--folds: found 3, expected 2 to 2.*Demo_"):
        study("--folds", 3)
    assert not list((tmp_path / "docs").iterdir())


def test_counts_are_compared_with_the_annotators(tmp_path):
    write_demo(tmp_path, 3, 160)
    flags = ["--images", tmp_path / "tissue_images", "--labels", tmp_path / "instance_labels"]
    path = tmp_path / "RESULTS.md"
    counts.main(counts.parse_args([*map(str, flags), "--results", str(path)]))
    assert "Demo_Liver_01" in path.read_text() and "mean error" in path.read_text()


@pytest.mark.slow
def test_corrections_are_measured_on_images_held_out(root, tmp_path):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 4, "--lr", 0.01)
    write_demo(tmp_path / "own", 4, 300)
    own = tmp_path / "own"
    flags = ["--root", own, "--init", run / "best.pt", "--images", 2, "--nuclei", 30]
    flags += ["--worst", 0.5, "--of", 2, "--held_out", 1, "--draws", 2]
    flags += ["--also", f"Same={own / 'tissue_images'}:{own / 'instance_labels'}"]
    flags += ["--results", tmp_path / "RESULTS.md", "--curve", tmp_path / "curve.svg"]
    last = ["--train", "--gpu_id", -1, "--epoch", 1]
    transfer.main(transfer.parse_args(list(map(str, flags + last))))
    lines = (tmp_path / "RESULTS.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]
    assert [row[1] for row in rows] == ["1", "2", "mean"] * 3
    for first, second, mean in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert first[0] == second[0] == mean[0]
        for cells in zip(first[3:], second[3:], mean[3:], strict=True):
            numbers = [list(map(float, cell.split(" -> "))) for cell in cells]
            for one, other, both in zip(*numbers, strict=True):
                assert both == pytest.approx((one + other) / 2, abs=1e-4)
    before = {tuple(row[3].split(" -> ")[0] for row in rows[i::3]) for i in (0, 1)}
    assert all(len(set(its)) == 1 for its in before) and len(before) == 2  # by draw alone
    assert "fine-tuned" in (tmp_path / "curve.svg").read_text()
    flags[flags.index("--held_out") + 1] = 3
    with pytest.raises(InputError, match=r"--held_out: found 3 and 2 to learn from.*4 images"):
        transfer.main(transfer.parse_args(list(map(str, flags))))


@pytest.mark.slow
def test_the_end_of_a_training_is_measured_at_home_and_elsewhere(tmp_path):
    write_demo(tmp_path / "own", 6, 160)
    path = tmp_path / "RESULTS.md"
    flags = ["--root", tmp_path / "own", "--other", tmp_path / "own", "--dimensions", 2]
    flags += ["--budget", 16, "--gpu_id", -1, "--results", path]
    finishing.main(finishing.parse_args(list(map(str, flags))))
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 1 + 2 * len(finishing.ENDS)
    assert all(line.count("|") == 6 for line in lines)


def test_one_set_after_the_other_is_left_out(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        write_demo(tmp_path / name, 2, 160, seed=seed)
        cut(tmp_path / name, "--patch_stride", "32", "--val_pattern", "*_02")
    own = tmp_path / "one" / "tissue_images", tmp_path / "one" / "instance_labels"
    path = tmp_path / "RESULTS.md"
    flags = ["--root", tmp_path / "one", tmp_path / "two", "--also", "Third={}:{}".format(*own)]
    flags += ["--budget", 20, "--images", 1, "--results", path, "--log", tmp_path / "log"]
    flags += ["--train", "--dimensions", 2, "--gpu_id", -1, "--augment", "moderate"]
    left_out.main(left_out.parse_args(list(map(str, flags))))
    rows = [line.split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    assert [row[:2] for row in rows[2:]] == [
        ["| two", "one"], ["| two", "Third"], ["| one", "two"], ["| one", "Third"]
    ]  # fmt: skip
    assert "at most 1 images a set; about 20 patches" in path.read_text()
    for text in ("Third", "Third=a", "=a:b"):
        with pytest.raises(InputError, match="--also: found"):
            left_out.parse_also(text)


@pytest.mark.slow
def test_each_image_of_all_sets_is_segmented_by_a_network_that_did_not_learn_its_group(tmp_path):
    names = ["Aa_01", "Aa_02", "Bb_01", "Cc_01", "Dd_01"]
    for root in (tmp_path / "one", tmp_path / "two"):
        write_demo(root, 5, 160, seed=len(root.name))
        shutil.rmtree(root / "mask binary")
        for kind in ("tissue_images", "instance_labels"):
            for name, path in zip(names, sorted((root / kind).iterdir()), strict=True):
                path.rename(path.with_stem(name))
        flags = "--patch_stride 32 --pixel_size 0.3 --patch_pixel_size 0.25 --val_fraction 0.2"
        data.cut(root, *flags.split(), "--group_pattern", "^[A-Z]")
    out = tmp_path / "out"

    def run(folds):
        flags = ["--root", tmp_path / "one", tmp_path / "two", "--out", out, "--folds", folds]
        flags += ["--train", "--dimensions", 2, "--gpu_id", -1]
        cross_validation.main(cross_validation.parse_args(list(map(str, flags))))

    with pytest.raises(InputError, match="--folds: found 5, expected 2 to 4"):
        run(5)
    run(2)
    for name in ("one", "two"):
        assert [row["image"] for row in table_of(out / name / "counts.csv")] == names
        for fold, held_out in ((1, "AC"), (2, "BD")):
            manifest = read_manifest(out / f"fold-{fold}" / "data" / name)
            assert manifest["pixel_size_um"] == 0.25
            learned = [image["name"] for image in manifest["images"]]
            assert learned == [each for each in names if each[0] not in held_out]
            (run_folder,) = (out / f"fold-{fold}" / "log").iterdir()
            best = sha256((run_folder / "best.pt").read_bytes()).hexdigest()
            for each in names:
                record = json.loads((out / name / "rows" / f"{each}.json").read_text())
                assert (record["made_with"]["checkpoint"] == best) == (each[0] in held_out)
                assert record["made_with"]["pixel_size"] == pytest.approx(0.3)
    runs = sorted(out.glob("fold-*/log/*"))
    run(2)  # all is there
    assert sorted(out.glob("fold-*/log/*")) == runs


@pytest.mark.slow
def test_organs_are_held_out_once_and_scored_as_inference_does(tmp_path):
    write_demo(tmp_path / "drawn", 5, 160)
    names = ["Aa_01", "Aa_02", "Bb_01", "Cc_01", "Dd_01"]
    for kind in ("tissue_images", "mask binary", "instance_labels"):
        for name, path in zip(names, sorted((tmp_path / "drawn" / kind).iterdir()), strict=True):
            path.rename(path.with_stem(name))
    results, out = tmp_path / "RESULTS.md", tmp_path / "out"

    def run(*more):
        flags = ["--root", tmp_path / "drawn", "--out", out, "--results", results, *more]
        field_protocol.main(field_protocol.parse_args(list(map(str, flags))))
        rows = [line for line in results.read_text().splitlines() if line.startswith("| ")][1:]
        return [[float(cell) for cell in row.strip("| ").split(" | ")[1:]] for row in rows[1:]]

    learned = ["--train", "--dimensions", 2, "--gpu_id", -1, "--batch_size", 4]
    with pytest.raises(InputError, match=r"--folds: found 3, expected 2 to 2.*Aa, Bb, Cc, Dd"):
        run("--folds", 3, *learned)
    rows = run("--folds", 2, *learned)
    tables = [table_of(out / f"fold-{fold}" / "results" / "counts.csv") for fold in (1, 2)]
    held_out = [[row["image"] for row in table] for table in tables]
    assert held_out == [["Aa_01", "Aa_02", "Cc_01"], ["Bb_01", "Dd_01"]]
    for fold, those in zip((1, 2), held_out, strict=True):
        images = read_manifest(out / f"fold-{fold}" / "data")["images"]
        assert sorted([image["name"] for image in images] + those) == names
        organs = [{image["name"][:2] for image in images if image["split"] == s} for s in SPLITS]
        assert not organs[0] & organs[1]
    expected = [np.mean([float(row[key]) for row in tables[0] + tables[1]]) for key in SCORES]
    assert rows[0][:3] == pytest.approx(expected, abs=2e-4)
    run("--folds", 2, *learned)  # all is there
    assert len(list(out.glob("fold-*/log/*/best.pt"))) == 2

    shutil.rmtree(tmp_path / "drawn" / "mask binary")  # label maps are left
    out = tmp_path / "shipped"
    rows = run()
    table = table_of(out / "fold-1" / "results" / "counts.csv")
    scores = np.array([[float(row[key]) for key in SCORES] for row in table])
    weights = [int(row["gt_nuclei"]) for row in table]
    expected = [*scores.mean(axis=0), scores[:, 0].min(), *np.average(scores, 0, weights)]
    assert rows[0] == pytest.approx(expected, abs=2e-4)
    assert rows[1][2] > rows[0][2]  # panoptic quality, without what lies near borders


def test_fields_are_measured_as_inference_has_them(tmp_path, capsys):
    write_demo(tmp_path / "tissue", 2, 512)
    images, references = tmp_path / "tissue/tissue_images", tmp_path / "tissue/instance_labels"
    torch.manual_seed(3)
    model = UNet(4).eval()
    shown = np.stack([read_image(path) for path in images.iterdir()]) / 255 - 0.6
    with torch.no_grad():
        model.last_conv.weight *= 50
        logits = model(torch.tensor(shown, dtype=torch.float32).permute(0, 3, 1, 2) * 4)
        model.last_conv.bias -= logits.median()  # on both sides of 0.5
    torch.save(checkpoint_of(model), tmp_path / "net.pt")
    flags = ["--ckpt", tmp_path / "net.pt", "--gpu_id", -1, "--images", images]
    review.main(review.parse_args([*map(str, flags), "--references", str(references)]))
    said = capsys.readouterr().out
    assert "2 images, 8 fields, the most doubtful 1" in said
    assert len(re.findall(r"^\| the error itself .* 1.00 ", said, re.MULTILINE)) == 1

    infer(tmp_path / "out", *flags[:2], "--images", images, "--masks", references)
    network = Predictor.load(tmp_path / "net.pt", torch.device("cpu"))
    for row in table_of(tmp_path / "out" / "counts.csv"):
        image, reference = (next(f.glob(f"{row['image']}.*")) for f in (images, references))
        found = review.measured(network, image, reference)
        wrong = 1 - found["wrong pixels"].sum() / 512**2
        assert wrong == pytest.approx(float(row["accuracy"]), abs=1e-4)
        table = table_of(tmp_path / "out" / f"{row['image']}_review.csv")
        doubts = [float(field["doubt"]) for field in table]
        assert sorted(found["4 p (1 - p)"], reverse=True) == pytest.approx(doubts, abs=1e-4)
