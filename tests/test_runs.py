"""A run ends well or in one line, whatever its flags, its files and the moment it is stopped."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

import train
import utils
from learning import checkpoints, runs, splitting
from learning.optimisation import one_cycle
from learning.signals import Stopped
from tests.mutations import MISSING, NONSENSE, OF_PICKLES, changed, damaged, places
from tests.scripts import REPOSITORY, cut, fingerprint, infer, learn, table_of
from tissue import pictures
from tissue.files import InputError
from tissue.nuclei import PREDICTION_SPLIT
from tissue.patches import read_manifest
from tissue.synthetic import draw_tissue

DEFAULT = PREDICTION_SPLIT._asdict()
OF_INSTANCES = {"sigma": 0.25, "h": 0.2, "hole": 2.5, "smallest": 2.5, "confidence": 0.3}
CONFIG = {"arch": "unet", "dimensions": 4}


def resume(run, *more):
    train.main(train.parse_args(["--resume", str(run), *map(str, more)]))


def label(root, *numbers, labels=None):
    """Give drawn images of `root` their label maps."""
    (root / "instance_labels").mkdir(exist_ok=True)
    for number in numbers:
        drawn = draw_tissue(96, 80, seed=number).labels.astype(np.uint16)
        values = drawn if labels is None else labels
        pictures.write_image(root / "instance_labels" / f"Drawn_{number:02}.png", values)


def weights(run):
    return torch.load(run / "last.pt", weights_only=True)["training"]["model"]


def saved(run, file="last.pt"):
    return torch.load(run / file, weights_only=True)


# --- the schedule


def test_rates_are_those_of_one_cycle_for_every_length_and_no_length_fails():
    warnings.simplefilter("ignore")  # of steps without an optimiser's
    failed = []
    for steps in range(1, 301):
        rates = [0.003 * one_cycle(step, steps) for step in range(steps)]
        assert all(0 < rate <= 0.003 for rate in rates)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.003)
        try:
            cycle = OneCycleLR(optimizer, 0.003, steps, pct_start=0.1, cycle_momentum=False)
            for rate in rates:
                assert rate == pytest.approx(cycle.get_last_lr()[0], rel=1e-9)
                if rate is not rates[-1]:
                    cycle.step()
        except ZeroDivisionError:
            failed.append(steps)
    assert failed == [10]  # torch's own fails there, ours does not


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_training_of_ten_steps_ends(root, tmp_path, epochs):
    cut(root, "--patch_stride", "24")
    patches = read_manifest(root)["patches"]["train"]
    batch = patches // 9 if epochs == 1 else patches // 3
    run = learn(root, tmp_path / "log", "--epoch", epochs, "--batch_size", batch)
    assert saved(run)["training"]["schedule"]["last_epoch"] == 9  # and the rate after it is a step


# --- flags


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("workers", -3), ("workers", 10**6), ("seed", -1), ("seed", 2**40), ("seed", 10**400),
        ("lr", "nan"), ("lr", "inf"), ("lr", 1e9), ("lr", 0), ("lr", -1e-3), ("epoch", 0),
        ("epoch", 10**30), ("dimensions", 0), ("dimensions", 10**6), ("dimensions", -4),
        ("patience", -1), ("gpu_id", -5), ("gpu_id", 10**20), ("batch_size", 0),
        ("batch_size", 10**12), ("name", "a/b"), ("name", ".."), ("name", "x" * 300),
        ("name", "a\\b"), ("name", "a\0b"), ("name", "a\nb"), ("name", "\udcff"),
        ("name", "é" * 150),        ("log", "\udcff"), ("root", "\0"),
    ],
)  # fmt: skip
def test_a_flag_that_cannot_be_is_one_line_and_leaves_no_run(root, tmp_path, flag, value):
    cut(root)
    with pytest.raises(InputError, match=f"^--{flag}: found ") as error:
        learn(root, tmp_path / "log", f"--{flag}", value)
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.glob("log/*"))


def test_a_name_may_be_of_any_language(root, tmp_path):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1, "--name", "prøve می‌شود.2")
    assert run.name.endswith("-prøve می‌شود.2")


def test_a_batch_of_one_patch_that_has_no_variance_is_named(root, tmp_path):
    cut(root)
    with pytest.raises(InputError, match=r"--batch_size: found 1, expected 2 or more"):
        learn(root, tmp_path / "log", "--arch", "resnet34", "--batch_size", 1)
    assert not (tmp_path / "log").exists()
    learn(root, tmp_path / "log", "--batch_size", 1, "--epoch", 1)  # four values a channel


# --- what a checkpoint says


def test_checkpoints_say_pixel_size_bits_and_split_from_the_first_epoch_on(root, tmp_path):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1)
    manifest = read_manifest(root)
    for file in ("best.pt", "last.pt"):
        checkpoint = saved(run, file)
        assert checkpoint["pixel_size_um"] == manifest["pixel_size_um"]
        assert checkpoint["bits"] == manifest["bits"]
        assert checkpoint["split"] == DEFAULT


# --- label maps


@pytest.mark.parametrize("fault", ["size", "damaged", "empty"])
def test_a_bad_label_map_is_told_before_the_training(root, tmp_path, fault):
    label(root, 1, 2)
    cut(root)
    path = root / "instance_labels" / "Drawn_02.png"
    if fault == "size":
        pictures.write_image(path, draw_tissue(64, 64, seed=2).labels.astype(np.uint16))
    else:
        path.write_bytes(path.read_bytes()[:100] if fault == "damaged" else b"")
    with pytest.raises(InputError, match=r"Drawn_02\.png"):
        learn(root, tmp_path / "log")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("enough", [True, False])
def test_the_split_is_chosen_on_label_maps_that_were_not_learned(
    root, tmp_path, monkeypatch, enough
):
    if enough:
        monkeypatch.setattr(splitting, "LEAST_COUNTED", 1)
    label(root, 1, 2, 3, 4)
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1)
    lines = (run / "train.log").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("split "))
    if enough:
        assert "chosen on 1 images with label maps" in line
    else:
        assert "the default (5 validation images with label maps would choose it)" in line
        assert saved(run, "best.pt")["split"] == OF_INSTANCES
    assert saved(run)["training"]["progress"]["finished"]


def test_label_maps_without_nuclei_choose_nothing_and_a_line_says_so(root, tmp_path, monkeypatch):
    monkeypatch.setattr(splitting, "LEAST_COUNTED", 1)
    label(root, 1, 2, 4, labels=np.zeros((96, 80), np.uint16))
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1)
    log = (run / "train.log").read_text()
    assert "nan" not in log and "no label map has nuclei" in log
    assert saved(run, "best.pt")["split"] == OF_INSTANCES


def test_what_fails_while_the_split_is_chosen_costs_no_training(root, tmp_path):
    label(root, 1, 2)
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1)
    counted = splitting.counted_images([str(root)], [read_manifest(root)])
    assert len(counted) == 2
    best = saved(run, "best.pt") | {"split": DEFAULT}
    checkpoints.save_checkpoint(run / "best.pt", best)
    (root / "tissue_images" / "Drawn_02.tif").write_bytes(b"II*\0 and no more")
    predictions = splitting.Predictions(best, torch.device("cpu"))
    line, _ = splitting.choose_split(run / "best.pt", counted, predictions)
    assert "could not be chosen" in line and "Drawn_02.tif" in line
    assert saved(run, "best.pt")["split"] == DEFAULT
    checkpoints.load_checkpoint(run / "best.pt")


@pytest.mark.parametrize("labelled", [True, False])
def test_best_says_how_far_counts_of_validation_images_are_off(
    root, tmp_path, monkeypatch, labelled
):
    """As a call of inference.py with their references finds it."""
    monkeypatch.setattr(splitting, "LEAST_COUNTED", 1)
    if labelled:
        label(root, 1, 2, 3, 4)
    cut(root)
    (val,) = [i for i in read_manifest(root)["images"] if i["split"] == "val"]
    run = learn(root, tmp_path / "log", "--epoch", 3, "--lr", 1e-2)
    best = saved(run, "best.pt")["count_error"]
    flags = ["--ckpt", run, "--images", root / val["image"]]
    flags += ["--masks", root / (val["labels"] or val["mask"])]
    # It is counted by the split that the other images chose, of which there are none.
    default = ["--split", "h=0.2", "--confidence", 0.3] if labelled else []
    infer(tmp_path / "out", *flags, *default)
    (row,) = table_of(tmp_path / "out" / "counts.csv")
    found, true = int(row["nuclei"]), int(row["gt_nuclei"])
    infer(tmp_path / "as it is", *flags)
    (row,) = table_of(tmp_path / "as it is" / "counts.csv")
    assert best == {"mean": pytest.approx(abs(found - true) / true), "images": 1}
    said = f"counts: off by {best['mean']:.1%} in the mean on 1 validation images"
    assert said in (run / "train.log").read_text()
    assert float(row["expected_count_error"]) == pytest.approx(best["mean"], abs=1e-4)


def test_few_validation_images_tell_nothing_of_others(root, tmp_path):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1)
    assert "on 1 validation images, too few" in (run / "train.log").read_text()
    assert "count_error" not in saved(run, "best.pt")


def test_where_validation_images_cannot_be_counted_a_line_says_so(root, tmp_path):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1)
    manifests = [read_manifest(root)]
    (one,) = splitting.Images.of([str(root)], manifests, CONFIG, None).held_out
    before = saved(run, "best.pt")
    one.path.write_bytes(b"II*\0 and no more")
    predictions = splitting.Predictions(before, torch.device("cpu"))
    line = splitting.expect_error(run / "best.pt", [one], predictions)
    assert "counts: validation images failed" in line and one.path.name in line
    assert saved(run, "best.pt").keys() == before.keys()
    one.path.unlink()
    assert splitting.Images.of([str(root)], manifests, CONFIG, None).held_out == []
    assert "no validation image" in splitting.expect_error(run / "best.pt", [], predictions)


def test_the_split_is_chosen_at_the_pixel_size_of_the_set(root, monkeypatch):
    label(root, 1)
    cut(root)
    manifest = read_manifest(root)
    entry = next(image for image in manifest["images"] if image["name"] == "Drawn_01")
    for own, of_set, scale in ((0.125, 0.25, 2), (0.5, 0.25, 0.5), (None, 0.25, 1), (0.5, None, 1)):
        entry["pixel_size_um"], manifest["pixel_size_um"] = own, of_set
        (counted,) = splitting.counted_images([str(root)], [manifest])
        assert counted.scale == scale
        assert counted.count == draw_tissue(96, 80, seed=1).labels.max()
    entry["pixel_size_um"], manifest["pixel_size_um"] = 5.0, 0.25
    with pytest.raises(InputError, match=r"Drawn_01\.tif: found a pixel size of 5"):
        splitting.counted_images([str(root)], [manifest])


# --- a run that is stopped


def signalling(function, number=signal.SIGINT, calls=1):
    """The function, which sends this process a signal before its nth call."""
    left = [calls]

    def wrapped(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return function(*args, **options)

    return wrapped


def test_a_run_stopped_in_validation_logs_its_real_speed(root, tmp_path, monkeypatch):
    cut(root)
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", signalling(train.validate))
        with pytest.raises(Stopped) as stopped:
            learn(root, tmp_path / "log", "--epoch", 1)
    assert stopped.value.code == 130
    (run,) = tmp_path.glob("log/*")
    progress = saved(run)["training"]["progress"]
    steps = read_manifest(root)["patches"]["train"] // 8
    assert progress["batch"] == progress["timed_steps"] == steps
    resume(run)
    (row,) = table_of(run / "metrics.csv")
    speed = steps * 8 / progress["timed_seconds"]
    assert float(row["patches_per_second"]) == pytest.approx(speed, rel=1e-4)


def test_a_signal_after_the_loop_is_heard_and_resume_completes_the_run(root, tmp_path, monkeypatch):
    monkeypatch.setattr(splitting, "LEAST_COUNTED", 1)
    label(root, 1, 2, 4)
    cut(root)
    undisturbed = learn(root, tmp_path / "undisturbed", "--epoch", 1)
    with monkeypatch.context() as patch:  # it is read to be counted, twice, and to be predicted
        stopping = signalling(splitting.open_image, signal.SIGTERM, calls=3)
        patch.setattr(splitting, "open_image", stopping)
        with pytest.raises(Stopped) as stopped:
            learn(root, tmp_path / "log", "--epoch", 1)
    assert stopped.value.code == 143
    (run,) = tmp_path.glob("log/*")
    assert "go on with: train.py --resume" in (run / "train.log").read_text()
    assert saved(run, "best.pt")["split"] == OF_INSTANCES
    assert not saved(run)["training"]["progress"]["finished"]
    resume(run)
    assert saved(run)["training"]["progress"]["finished"]
    for key in ("split", "epoch", "best_dice"):
        assert saved(run, "best.pt")[key] == saved(undisturbed, "best.pt")[key]
    with pytest.raises(InputError, match="finished run"):
        resume(run)


def test_a_signal_before_the_run_has_a_folder_leaves_none(root, tmp_path, monkeypatch):
    cut(root)
    monkeypatch.setattr(train, "make_loaders", signalling(train.make_loaders))
    with pytest.raises(Stopped):
        learn(root, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_a_run_killed_after_its_last_epoch_is_completed(root, tmp_path, monkeypatch):
    """Its files are as such a kill leaves them: best.pt and last.pt whole, the rest not."""
    monkeypatch.setattr(splitting, "LEAST_COUNTED", 1)
    label(root, 1, 2, 4)
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 2)
    wanted = {file: saved(run, file) for file in ("best.pt", "last.pt")}
    rows = table_of(run / "metrics.csv")

    def as_killed(finished, split):
        last = changed(wanted["last.pt"], ("training", "progress", "finished"), finished)
        checkpoints.save_checkpoint(run / "last.pt", last)
        checkpoints.save_checkpoint(run / "best.pt", changed(wanted["best.pt"], ("split",), split))
        (run / "metrics.csv").write_text("".join((run / "metrics.csv").open().readlines()[:2]))
        for events in run.glob("events*"):
            events.unlink()

    # As this version leaves them; and as an earlier one did, which called such a run finished.
    for finished, split in ((False, DEFAULT), (True, MISSING)):
        as_killed(finished, split)
        resume(run)
        assert table_of(run / "metrics.csv") == rows
        assert saved(run, "best.pt")["split"] == wanted["best.pt"]["split"]
        assert saved(run)["training"]["progress"]["finished"]
        assert list(run.glob("events*"))
        with pytest.raises(InputError, match="finished run"):
            resume(run)


@pytest.fixture
def begun(root, tmp_path, monkeypatch):
    """A run of two epochs that was stopped in the validation of the second, and its end."""
    cut(root, "--patch_stride", "24")
    flags = ("--epoch", 2, "--batch_size", 9, "--precision", "float32")
    undisturbed = learn(root, tmp_path / "undisturbed", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", signalling(train.validate, calls=2))
        with pytest.raises(Stopped):
            learn(root, tmp_path / "log", *flags)
    (run,) = tmp_path.glob("log/*")
    return run, undisturbed


def same_end(run, undisturbed):
    """Whether two runs end with the same weights, to the last bit, and the same scores."""
    for file in ("last.pt", "best.pt"):
        one, two = saved(run, file), saved(undisturbed, file)
        if any(not torch.equal(one["model"][key], two["model"][key]) for key in two["model"]):
            return False
    rows = [table_of(r / "metrics.csv") for r in (run, undisturbed)]
    return [row["val_dice"] for row in rows[0]] == [row["val_dice"] for row in rows[1]]


def test_resume_needs_no_file_that_the_run_began_with(root, tmp_path, monkeypatch):
    cut(root)
    first = learn(root, tmp_path / "first", "--epoch", 1)
    shutil.copy(first / "best.pt", tmp_path / "start.pt")
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", signalling(train.validate))
        with pytest.raises(Stopped):
            learn(root, tmp_path / "log", "--epoch", 1, "--init", tmp_path / "start.pt")
    (tmp_path / "start.pt").unlink()
    (run,) = tmp_path.glob("log/*")
    resume(run)
    assert saved(run)["training"]["progress"]["finished"]


def test_a_set_that_is_cut_anew_under_a_training_is_one_line_and_last_pt_stays(
    root, tmp_path, monkeypatch
):
    cut(root)
    validate, before = train.validate, []

    def cut_anew(*args):
        if len(before) == 1:
            cut(root, "--patch_stride", "31")
        (run,) = tmp_path.glob("log/*")
        before.append((run / "last.pt").read_bytes() if (run / "last.pt").exists() else b"")
        return validate(*args)

    monkeypatch.setattr(train, "validate", cut_anew)
    with pytest.raises(InputError, match="another patch set than the run began with"):
        learn(root, tmp_path / "log", "--epoch", 4)
    assert len(before) == 2
    (run,) = tmp_path.glob("log/*")
    assert saved(run)["training"]["progress"]["epoch"] in (2, 3)


def test_a_patch_that_a_loader_process_finds_missing_is_one_line(root, tmp_path):
    cut(root)
    for path in (root / "patches_mask_train").glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"patches_mask_train") as error:
        learn(root, tmp_path / "log", "--workers", 1)
    assert len(str(error.value).splitlines()) == 1


def test_two_processes_cannot_go_on_with_one_run(root, tmp_path):
    cut(root)
    log = tmp_path / "log"
    flags = ["--root", root, "--log", log, "--gpu_id", -1, "--dimensions", 4, "--epoch", 10_000]
    command = [sys.executable, "train.py", *map(str, flags), "--workers", "0"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        while not list(log.glob("*/last.pt")):
            assert process.poll() is None
            time.sleep(0.1)
        (run,) = log.iterdir()
        with pytest.raises(InputError, match=rf"process {process.pid} on .*which trains"):
            resume(run)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    checkpoints.load_checkpoint(run / "last.pt")


STOP_ONE_OF_TWO = """
import os, signal, sys, time
import train

validate = train.validate

def slowly(network, loader, *more):
    rank = int(os.environ["RANK"])
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    class Loader:
        dataset, batch_size = loader.dataset, loader.batch_size
        def __iter__(self):
            for number in range(200):
                open(sys.argv[1] + f"/{rank}-{number}", "w").close()
                time.sleep(0.2)
                yield next(iter(loader))
    Loader.dataset = range(10**6)
    return validate(network, Loader(), *more)

if sys.argv[2] == "validation":
    train.validate = slowly
else:
    step = train.train_step
    def slow_step(*args):
        number = len(os.listdir(sys.argv[1]))
        open(sys.argv[1] + f"/{os.environ['RANK']}-{number}", "w").close()
        time.sleep(0.2)
        if os.environ["RANK"] == "1" and number > 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)
    train.train_step = slow_step
train.main(train.parse_args(sys.argv[3:]))
"""


@pytest.mark.parametrize("phase", ["validation", "training"])
def test_a_signal_to_one_of_two_processes_stops_both_within_seconds(root, tmp_path, phase):
    cut(root)
    script, seen = tmp_path / "script.py", tmp_path / "seen"
    script.write_text(STOP_ONE_OF_TWO)
    seen.mkdir()
    flags = ["--root", root, "--log", tmp_path / "log", "--gpu_id", -1, "--dimensions", 4]
    flags += ["--workers", 0, "--batch_size", 2, "--epoch", 2]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(seen), phase, *map(str, flags)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "stopped by SIGTERM" in done.stdout
    (run,) = tmp_path.glob("log/*")
    progress = saved(run)["training"]["progress"]
    assert not progress["finished"] and not progress["metrics"]
    calls = len(list(seen.iterdir()))
    assert calls < 60  # of 400, or of 60 steps before the first point of the curve


# --- damaged files of a run


def check_resume(run, undisturbed):
    """Whether a damaged run is refused, in one line and unchanged; else it must end right."""
    before = {p: c for p, c in fingerprint(run).items() if ".lock" not in p.name}
    try:
        resume(run)
    except (InputError, FileNotFoundError) as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 700
        after = {p: c for p, c in fingerprint(run).items() if ".lock" not in p.name}
        assert after == before
        return False
    assert same_end(run, undisturbed)
    return True


def restore(run, copy):
    shutil.rmtree(run)
    shutil.copytree(copy, run)


@pytest.mark.slow
def test_damaged_settings_are_refused_or_change_nothing(begun, tmp_path):
    run, undisturbed = begun
    shutil.copytree(run, tmp_path / "copy")
    settings = json.loads((run / "args.json").read_text())
    generator = random.Random(2)
    keys = [place for place in places(settings) if place[0] not in ("asked_precision", "patience")]
    went_on = 0
    for number in range(150):
        restore(run, tmp_path / "copy")
        if number < 110:
            content = changed(settings, generator.choice(keys), generator.choice(NONSENSE))
            (run / "args.json").write_text(json.dumps(content))
        else:
            whole = (run / "args.json").read_bytes()
            (run / "args.json").write_bytes(damaged(whole, number))
        went_on += check_resume(run, undisturbed)
    assert went_on < 60


@pytest.mark.slow
def test_a_damaged_state_of_training_is_refused_or_changes_nothing(begun, tmp_path):
    run, undisturbed = begun
    shutil.copytree(run, tmp_path / "copy")
    last = saved(run)
    parts = [("training", *place) for place in places(last["training"])]
    groups = {}
    for place in parts:  # as often of the small parts as of the large ones
        groups.setdefault(place[1], []).append(place)
    parts = [("training",), *(("training", name) for name in groups)]
    generator = random.Random(3)
    went_on = 0
    for number in range(160):
        restore(run, tmp_path / "copy")
        if number < 130:
            group = groups[generator.choice(sorted(groups))]
            place = generator.choice(parts if number % 5 == 0 else group)
            value = generator.choice(NONSENSE + OF_PICKLES)
            torch.save(changed(last, place, value), run / "last.pt")
        else:
            whole = (run / "last.pt").read_bytes()
            (run / "last.pt").write_bytes(damaged(whole, number))
        went_on += check_resume(run, undisturbed)
    assert went_on < 60


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("progress", "epoch"), 1), (("progress", "epoch"), 3), (("progress", "batch"), 0),
        (("progress", "best_dice"), 0.99), (("progress", "best_epoch"), 2),
        (("progress", "metrics"), []), (("progress", "metrics", 0, "epoch"), 2),
        (("progress", "metrics", 0, "val_dice"), math.nan), (("progress", "losses"), [1.0] * 99),
        (("schedule", "last_epoch"), 1), (("schedule", "last_epoch"), 10**9),
        (("schedule",), MISSING), (("optimizer", "state"), {}), (("optimizer", "state", 0), {}),
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(3)),
        (("optimizer", "state", 0, "exp_avg"), torch.full((4, 3, 3, 3), math.nan)),
        (("optimizer", "state", 0, "exp_avg_sq"), torch.full((4, 3, 3, 3), -1.0)),
        (("optimizer", "state", 0, "step"), torch.tensor(2.0)),
        (("ema", "n_averaged"), torch.tensor(0)),
        (("optimizer", "state", 10**6), {}), (("random",), torch.zeros(9, dtype=torch.uint8)),
        (("random",), None), (("patch_set",), "x"), (("model", "conv1.conv.0.weight"), None),
        (("ema", "module.last_conv.bias"), torch.tensor([math.inf])), (("scaler",), {"scale": 1.0}),
        (("scaler",), {"scale": math.nan}), (("scaler",), None),
    ],
)  # fmt: skip
def test_a_state_that_contradicts_itself_is_named(begun, place, value):
    run, _ = begun
    torch.save(changed(saved(run), ("training", *place), value), run / "last.pt")
    with pytest.raises(InputError, match=r"last\.pt: found "):
        resume(run)


def test_settings_of_the_optimiser_in_the_file_do_not_count(begun):
    run, undisturbed = begun
    last = saved(run)
    for key, value in (("lr", 5.0), ("maximize", True), ("weight_decay", 9.0), ("betas", (0, 0))):
        last["training"]["optimizer"]["param_groups"][0][key] = value
    torch.save(last, run / "last.pt")
    resume(run)
    assert same_end(run, undisturbed)


def test_settings_that_are_not_those_of_the_run_are_named(begun):
    run, _ = begun
    settings = json.loads((run / "args.json").read_text())
    for flag, value in (("lr", 2e-3), ("seed", 1), ("loss", "bce"), ("epoch", 3)):
        utils.write_json(run / "args.json", settings | {flag: value})
        with pytest.raises(InputError, match=rf"last\.pt: found a run with --{flag} .*args\.json"):
            resume(run)


def test_the_newest_run_is_not_passed_over_for_an_older_one(begun):
    """It has no last.pt yet: the older one would be trained in its place."""
    run, _ = begun
    newer = run.with_name("29990101000000")
    newer.mkdir()
    shutil.copy(run / "args.json", newer)
    with pytest.raises(FileNotFoundError, match=rf"{newer.name}/last\.pt: not found.*--resume RUN"):
        train.main(train.parse_args(["--log", str(run.parent), "--resume"]))


def test_a_run_without_its_best_weights_is_named(begun):
    run, _ = begun
    (run / "best.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"best\.pt"):
        resume(run)


def test_a_run_of_an_earlier_version_goes_on(begun):
    """Without what that did not write; with the schedule that it wrote."""
    run, undisturbed = begun
    last = saved(run)
    for key in ("timed_steps", "timed_seconds"):
        del last["training"]["progress"][key]
    del last["split"], last["bits"]
    step = last["training"]["schedule"]["last_epoch"]
    last["training"]["schedule"] = {"last_epoch": step, "total_steps": 99, "_last_lr": [1.0]}
    torch.save(last, run / "last.pt")
    settings = json.loads((run / "args.json").read_text())
    for key in ("arch", "augment", "sampler", "pretrained", "compile", "loader_processes"):
        del settings[key]
    utils.write_json(run / "args.json", settings)
    resume(run)
    assert same_end(run, undisturbed)


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    folders = {runs.make_run_folder(tmp_path, "same") for _ in range(2)}
    assert len(folders) == 2
    assert all(folder.name.endswith("-same") for folder in folders)
