"""Training goes on exactly where it was stopped, and does the same on one process or many."""

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import train
import utils
from learning import checkpoints
from learning.augment import transform
from learning.devices import choose_precision
from learning.losses import LOSSES, total_loss
from learning.processes import share_of_batch
from learning.runs import check_state
from learning.signals import Stopped, StopSignal
from learning.state import make_state
from model import UNet
from tests.scripts import REPOSITORY, call, cut, dice_of, infer, learn, table_of
from tissue.files import InputError
from tissue.patches import PatchDataset
from tissue.sampling import PatchSampler


def command(root, log, *more):
    """train.py as a process of its own, on the patches of `root`."""
    flags = ["--root", root, "--log", log, "--gpu_id", -1, "--dimensions", 4, "--workers", 1]
    return [sys.executable, "train.py", *map(str, flags), *map(str, more)]


def start(arguments, **options):
    """Start a command and let its output go to a pipe."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, cwd=REPOSITORY, text=True, **pipes, **options)


def wait_for(path, process, seconds=300):
    end = time.monotonic() + seconds
    while not path() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert path(), process.communicate()


def curve(run, tag):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def shown(run, tag):
    """The pictures of a run in tensorboard, uint8 (number, H, W, 3)."""
    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    found = [np.frombuffer(event.encoded_image_string, np.uint8) for event in events.Images(tag)]
    return np.stack([cv2.imdecode(picture, cv2.IMREAD_COLOR_RGB) for picture in found])


def same(one, two):
    """Whether two nested collections of numbers and tensors are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def same_training(run, reference):
    """Weights, optimiser and curves of two runs are equal to the last bit."""
    last, wanted = (torch.load(r / "last.pt", weights_only=True) for r in (run, reference))
    assert same(last["model"], wanted["model"])
    for part in ("model", "ema", "optimizer", "schedule", "scaler"):
        assert same(last["training"][part], wanted["training"][part]), part
    for tag in ("train/loss", "train/learning_rate", "val/loss", "val/dice_score"):
        assert curve(run, tag) == curve(reference, tag)
    tables = [table_of(r / "metrics.csv") for r in (run, reference)]
    for row, wanted_row in zip(*tables, strict=True):
        for column in ("epoch", "train_loss", "val_loss", "val_accuracy", "val_dice"):
            assert row[column] == wanted_row[column]
    bests = [torch.load(r / "best.pt", weights_only=True) for r in (run, reference)]
    assert bests[0]["epoch"] == bests[1]["epoch"] and same(bests[0]["model"], bests[1]["model"])


# --- stopping and going on


OTHERWISE = ("--arch", "test_efficientnet", "--sampler", "balanced", "--augment", "strong")
OTHERWISE += ("--loss", "bce")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "more"), [(signal.SIGINT, 130, ()), (signal.SIGTERM, 143, OTHERWISE)]
)
def test_a_signal_ends_at_the_next_step_and_resume_ends_as_if_nothing_happened(
    root, tmp_path, number, code, more
):
    cut(root)
    settings = ("--epoch", 12, "--batch_size", 2, *more)
    undisturbed = learn(root, tmp_path / "undisturbed", *settings)
    log = tmp_path / "log"
    process = start(command(root, log, *settings), start_new_session=True)
    wait_for(lambda: list(log.glob("*/metrics.csv")), process)
    os.killpg(process.pid, number)  # as Ctrl-C does: the loader's processes get it too
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert err == ""
    assert f"stopped by {number.name}" in out
    (run,) = log.iterdir()
    progress = torch.load(run / "last.pt", weights_only=True)["training"]["progress"]
    assert not progress["finished"]
    assert len(progress["losses"]) == progress["batch"] < 30  # no curve shows these steps yet
    train.main(train.parse_args(["--log", str(log), "--resume"]))
    same_training(run, undisturbed)


def test_a_run_goes_on_in_the_precision_in_which_it_began(root, tmp_path, monkeypatch):
    cut(root)
    began = choose_precision(torch.device("cpu"))
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[began]

    def stop(self, *_):
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(StopSignal, "check", stop)
    with pytest.raises(Stopped):
        learn(root, tmp_path / "log")
    monkeypatch.setattr("learning.start.choose_precision", lambda device: other)
    for more, expected in (([], began), (["--precision", "float32"], torch.float32)):
        with pytest.raises(Stopped):
            train.main(train.parse_args(["--log", str(tmp_path / "log"), "--resume", *more]))
        (settings,) = tmp_path.glob("log/*/args.json")
        precision = json.loads(settings.read_text())["precision"]
        assert precision == str(expected).removeprefix("torch.")


@pytest.mark.parametrize("later", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("steps_later", [0, 1])
def test_a_run_that_skipped_steps_in_float16_goes_on_in_any_precision(later, steps_later):
    """And is stopped and goes on again: the optimiser has made fewer steps than the run."""

    def learn_on(precision, steps, before=None, times=1.0):
        model = UNet(4)
        state = make_state(model.train(), args, 10, precision, before)
        for _ in range(steps):
            images, masks = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32).round()
            loss = train.train_step(
                state, model, images, masks, lambda *both: times * loss_of(*both), nullcontext()
            )
            state.after_step(loss, torch.arange(2))
        saved = copy.deepcopy(state.to_save("patches"))
        check_state(saved, UNet(4), Path("last.pt"))
        return saved

    args = Namespace(lr=1e-3, epoch=5, init=None)
    loss_of = partial(total_loss, LOSSES["bce_dice"])
    first = learn_on(torch.float16, 1)
    first = learn_on(torch.float16, 1, first, times=1e36)  # too much: the step is skipped
    assert first["optimizer"]["state"][0]["step"] == 1
    again = learn_on(later, steps_later, first)
    last = learn_on(torch.float16, 1, again)
    assert last["schedule"]["last_epoch"] == 3 + steps_later


@pytest.fixture
def stopped_run(root, tmp_path):
    """A run that was stopped after its first epoch."""
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 2)
    last = torch.load(run / "last.pt", weights_only=True)
    last["training"]["progress"] |= {"finished": False, "epoch": 2}
    torch.save(last, run / "last.pt")
    return run


@pytest.mark.parametrize(
    "change",
    [
        ["--dimensions", "8"],
        ["--lr", "0.5"],
        ["--batch_size", "4"],
        ["--epoch", "3"],
        ["--seed", "9"],
        ["--arch", "resnet34"],
        ["--loss", "bce"],
        ["--stain", "none"],
        ["--augment", "strong"],
        ["--sampler", "balanced"],
        ["--pretrained", "imagenet"],
    ],
)
def test_resume_of_another_set_up_is_named(stopped_run, change):
    before = (stopped_run / "last.pt").read_bytes()
    with pytest.raises(InputError, match=f"{change[0]}: found {change[1]}, expected"):
        train.parse_args(["--resume", str(stopped_run), *change])
    assert (stopped_run / "last.pt").read_bytes() == before


def test_resume_takes_the_settings_of_the_run(stopped_run):
    args = train.parse_args(["--resume", str(stopped_run), "--workers", "0"])
    assert (args.dimensions, args.workers, args.resume) == (4, 0, stopped_run)


def test_a_run_from_before_there_was_a_colour_goes_on_without(stopped_run):
    settings = json.loads((stopped_run / "args.json").read_text())
    del settings["stain"]
    utils.write_json(stopped_run / "args.json", settings)
    assert train.parse_args(["--resume", str(stopped_run)]).stain == "none"


@pytest.mark.parametrize(("amp", "asked"), [(True, "auto"), (False, "float32")])
def test_a_run_from_before_there_was_precision_goes_on_as_amp_said(stopped_run, amp, asked):
    settings = json.loads((stopped_run / "args.json").read_text())
    del settings["asked_precision"]
    utils.write_json(stopped_run / "args.json", settings | {"amp": amp})
    assert train.parse_args(["--resume", str(stopped_run)]).asked_precision == asked


@pytest.mark.parametrize("flag", ["root", "replay"])
def test_resume_where_a_patch_set_has_moved_says_what_to_do(stopped_run, tmp_path, flag):
    settings = json.loads((stopped_run / "args.json").read_text())
    utils.write_json(stopped_run / "args.json", settings | {flag: [str(tmp_path / "gone")]})
    resume = ["--resume", str(stopped_run)]
    with pytest.raises(FileNotFoundError, match=f"if it has moved, tell where with --{flag}"):
        train.parse_args(resume)
    moved = str(tmp_path)
    assert getattr(train.parse_args([*resume, f"--{flag}", moved]), flag) == [moved]


def test_resume_on_another_patch_set_is_named(stopped_run, root):
    cut(root, "--patch_stride", "32")
    with pytest.raises(InputError, match="another patch set"):
        train.main(train.parse_args(["--resume", str(stopped_run)]))


def test_resume_of_a_finished_run_says_so(root, tmp_path):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1)
    with pytest.raises(InputError, match=r"finished run.*--init"):
        train.main(train.parse_args(["--resume", str(run)]))


def test_resume_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run"):
        train.parse_args(["--log", str(tmp_path), "--resume"])
    with pytest.raises(FileNotFoundError, match=r"args\.json"):
        train.parse_args(["--resume", str(tmp_path)])


def test_a_full_disk_keeps_the_old_checkpoint_whole(tmp_path):
    path = tmp_path / "last.pt"
    checkpoints.save_checkpoint(path, {"weights": torch.zeros(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match=r"last\.pt: could not be written"):
            checkpoints.save_checkpoint(path, {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(torch.load(path, weights_only=True)["weights"]) == 10
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_loader_process_is_one_line(root, tmp_path):
    cut(root)
    log = tmp_path / "log"
    process = start(command(root, log, "--epoch", 500))
    wait_for(lambda: list(log.glob("*/last.pt")), process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1 and "killed from outside" in err
    checkpoints.load_checkpoint(next(log.glob("*/last.pt")))


# --- what a good run needs


def test_a_loss_that_is_no_number_stops_with_the_names_of_its_patches(root, tmp_path):
    cut(root)
    run = learn(root, tmp_path / "first", "--epoch", 1)
    huge = torch.load(run / "best.pt", weights_only=True)
    huge["model"]["last_conv.bias"].fill_(3e38)  # finite, but not what becomes of it
    torch.save(huge, tmp_path / "huge.pt")
    flags = ["--init", tmp_path / "huge.pt", "--precision", "float32", "--batch_size", 2]
    with pytest.raises(InputError, match=r"step on Drawn_0._patch_.*\.png") as error:
        learn(root, tmp_path / "log", *flags)
    assert str(error.value).count(".png") == 2


def test_a_network_too_wide_for_the_memory_is_one_line(root, tmp_path):
    cut(root)
    gigabytes = 6 * 2**30  # of addresses; torch itself takes four
    done = subprocess.run(
        command(root, tmp_path / "log", "--dimensions", 512),
        capture_output=True, text=True, cwd=REPOSITORY,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (gigabytes, gigabytes)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "the memory is full" in done.stderr
    assert not (tmp_path / "log").exists()


def test_patience_ends_a_run_early(root, tmp_path):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 40, "--lr", 1e-12, "--patience", 2)
    dices = [float(row["val_dice"]) for row in table_of(run / "metrics.csv")]
    assert len(dices) < 40
    assert len(dices) - 1 - dices.index(max(dices)) == 2


def test_init_starts_from_the_weights_of_another_run(root, tmp_path):
    cut(root)
    first = learn(root, tmp_path / "log", "--epoch", 1)
    second = learn(
        root, tmp_path / "log2", "--epoch", 1, "--lr", 1e-12, "--init", first / "best.pt"
    )
    weights = [torch.load(r / "last.pt", weights_only=True)["model"] for r in (first, second)]
    torch.testing.assert_close(weights[1]["conv1.conv.0.weight"], weights[0]["conv1.conv.0.weight"])


def test_init_from_another_width_or_channel_order_is_named(root, tmp_path):
    cut(root)
    first = learn(root, tmp_path / "log", "--epoch", 1)
    with pytest.raises(InputError, match=r"--init .*'dimensions': 4.*'dimensions': 8"):
        learn(root, tmp_path / "log2", "--dimensions", 8, "--init", first / "best.pt")
    torch.save(UNet(4).state_dict(), tmp_path / "original.pth")
    with pytest.raises(InputError, match="bgr"):
        learn(root, tmp_path / "log2", "--init", tmp_path / "original.pth")
    assert not (tmp_path / "log2").exists()


def test_the_learning_rate_warms_up_and_ends_near_zero(root, tmp_path):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 40, "--lr", 0.01, "--batch_size", 20)
    rates = [rate for _, rate in curve(run, "train/learning_rate")]
    top = rates.index(max(rates))
    assert rates[0] < 0.006 and max(rates) == pytest.approx(0.01, rel=0.05)
    assert 1 <= top <= 6 and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 1e-6


def test_hyperparameters_and_final_scores_are_in_tensorboard(root, tmp_path):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1)
    events = EventAccumulator(str(run))
    events.Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert "final/best_dice" in events.Tags()["scalars"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_settings_and_the_choice_of_precision_are_recorded(root, tmp_path, precision):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1, "--precision", precision)
    settings = json.loads((run / "args.json").read_text())
    assert settings["precision"] == precision and settings["device"] == "cpu"
    assert set(settings["versions"]) == {"project", "torch", "torchvision", "timm"}


@pytest.mark.slow
def test_a_compiled_run_saves_clean_keys(root, tmp_path):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1, "--compile")
    checkpoint = checkpoints.load_checkpoint(run / "best.pt")
    checkpoints.build_model(checkpoint)


@pytest.mark.parametrize("arch", ["unet", "tf_efficientnet_lite0"])
def test_every_network_learns_is_recorded_and_infers(root, tmp_path, arch):
    cut(root)
    run = learn(root, tmp_path / "log", "--arch", arch, "--loss", "bce", "--epoch", 3)
    losses = [float(row["train_loss"]) for row in table_of(run / "metrics.csv")]
    assert losses[2] < losses[0]
    assert checkpoints.load_checkpoint(run / "best.pt")["config"] == {"arch": arch, "dimensions": 4}
    settings = json.loads((run / "args.json").read_text())
    recorded = [settings[flag] for flag in ("arch", "loss", "augment", "sampler")]
    assert recorded == [arch, "bce", "basic", "uniform"]
    infer(tmp_path / "results", "--root", root, "--ckpt", run)
    (row,) = table_of(tmp_path / "results" / "counts.csv")
    prediction = tmp_path / "results" / "Drawn_04_prediction.png"
    found = dice_of(prediction, root / "mask binary" / "Drawn_04.png")
    assert float(row["dice"]) == pytest.approx(found, abs=1e-4)


def test_a_contact_sheet_shows_what_the_network_is_fed(root, tmp_path):
    cut(root)
    run = learn(root, tmp_path / "log", "--epoch", 1, "--augment", "strong")
    events = EventAccumulator(str(run))
    events.Reload()
    (sheet,) = events.Images("train/augmented")
    assert (sheet.width, sheet.height) == (8 * (32 + 4) + 4, 6 * (32 + 4) + 4)


# --- feeding


def batches(root, seed, epoch, workers, augment="basic"):
    dataset = PatchDataset(root, "train", transform("train", augment))
    sampler = PatchSampler(len(dataset), 4, seed)
    sampler.epoch = epoch
    return list(DataLoader(dataset, 4, sampler=sampler, num_workers=workers))


@pytest.mark.parametrize("augment", ["basic", "moderate", "strong"])
def test_augmentation_repeats_for_a_seed_however_many_workers(root, augment):
    cut(root)
    alone, shared = (batches(root, 0, 1, workers, augment) for workers in (0, 3))
    for (images, masks, indices), (images_3, masks_3, indices_3) in zip(alone, shared, strict=True):
        assert torch.equal(images, images_3)
        assert torch.equal(masks, masks_3)
        assert torch.equal(indices, indices_3)


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_differs_between_epochs_seeds_and_patches(root, workers):
    cut(root)

    def brightness(seed, epoch):
        means = torch.zeros(60)
        for images, _, indices in batches(root, seed, epoch, workers):
            means[indices] = images.mean((1, 2, 3))
        return means

    first = brightness(0, 1)
    for other in (brightness(0, 2), brightness(1, 1)):
        assert (first != other).float().mean() > 0.5
    dataset = PatchDataset(root, "train", transform("val"))
    plain = torch.stack([dataset[index][0].mean() for index in range(60)])
    changes = (first - plain).abs() > 1e-3
    assert 0.2 < changes.float().mean() < 0.8  # about half of the patches get another brightness
    assert len(set((first - plain)[changes].tolist())) > 10


def test_processes_share_each_batch_without_overlap():
    whole = PatchSampler(50, 8, seed=0)
    shares = [PatchSampler(50, 8, 0, rank, 2) for rank in range(2)]
    for sampler in (whole, *shares):
        sampler.epoch, sampler.start = 3, 2
    keys = list(whole)
    assert [len(share) for share in shares] == [16, 16] and len(whole) == len(keys) == 32
    parts = [list(share) for share in shares]
    for batch in range(4):
        both = parts[0][batch * 4 : batch * 4 + 4] + parts[1][batch * 4 : batch * 4 + 4]
        assert sorted(both) == sorted(keys[batch * 8 : batch * 8 + 8])


def test_an_interrupted_epoch_goes_on_with_the_patches_that_are_left():
    sampler = PatchSampler(50, 8, seed=0)
    whole = list(sampler)
    sampler.start = 2
    assert list(sampler) == whole[16:]


# --- many processes

WITHOUT_AUGMENTATION = """
import sys
import train
from learning import loading

plain = loading.transform
loading.transform = lambda split, augment="basic": plain("val")
train.main(train.parse_args(sys.argv[1:]))
"""

IN_FLOAT64 = """
import sys
import torch
from learning.losses import bce_dice
from learning.processes import share_batch_norm, start_processes
from model import UNet
from torch.nn.parallel import DistributedDataParallel

device, rank, processes = start_processes(-1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
model = UNet(4)
if processes > 1:
    share_batch_norm(model)
network = DistributedDataParallel(model) if processes > 1 else model
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(5):
    images, masks = torch.randn(8, 3, 32, 32), (torch.rand(8, 1, 32, 32) > 0.7).double()
    logits = network(images[rank::processes])
    loss = bce_dice(logits, masks[rank::processes])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if rank == 0:
    torch.save(model.state_dict(), sys.argv[1])
"""


def distance(weights, wanted):
    """Relative distance of all weights and running statistics together."""
    keys = [key for key, value in wanted.items() if value.is_floating_point()]
    apart = sum((weights[key] - wanted[key]).square().sum() for key in keys)
    return (apart / sum(wanted[key].square().sum() for key in keys)).sqrt().item()


def test_two_processes_compute_what_one_does_on_the_whole_batch(tmp_path):
    """In float64, where rounding hides nothing: batch norm, gradients and steps are the same."""
    for processes in (1, 2):
        call(tmp_path, IN_FLOAT64, [tmp_path / f"{processes}.pt"], processes)
    one, two = (torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2))
    assert distance(two, one) < 1e-9


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_whole_batch(root, tmp_path):
    """In float32, at a low learning rate: Adam makes full steps of what is rounding noise."""
    cut(root)
    flags = ["--root", root, "--gpu_id", -1, "--dimensions", 4, "--workers", 0]
    flags += ["--precision", "float32", "--epoch", 3, "--batch_size", 8, "--lr", 2e-5]
    runs = []
    for processes in (1, 2):
        log = tmp_path / f"log{processes}"
        call(tmp_path, WITHOUT_AUGMENTATION, [*flags, "--log", log], processes)
        runs += log.iterdir()
    losses = [[value for _, value in curve(run, "train/loss")] for run in runs]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    one, two = (torch.load(run / "last.pt", weights_only=True)["model"] for run in runs)
    assert distance(two, one) < 1e-4
    one, two = (table_of(run / "metrics.csv") for run in runs)
    for column in ("val_accuracy", "val_dice"):
        assert [row[column] for row in one] == [row[column] for row in two]


@pytest.mark.slow
def test_two_processes_fine_tune_as_one_with_the_same_whole_batch(root, tmp_path):
    """What is kept of --init is validated and shown by one process or all, without waiting."""
    cut(root)
    start = learn(root, tmp_path / "start", "--epoch", 1) / "best.pt"
    flags = ["--root", root, "--gpu_id", -1, "--workers", 0, "--init", start, "--epoch", 2]
    flags += ["--precision", "float32", "--batch_size", 8, "--lr", 2e-5]
    runs = []
    for processes in (1, 2):
        log = tmp_path / f"log{processes}"
        call(tmp_path, WITHOUT_AUGMENTATION, [*flags, "--log", log], processes)
        runs += log.iterdir()
    one, two = (torch.load(run / "last.pt", weights_only=True)["model"] for run in runs)
    assert distance(two, one) < 1e-4
    one, two = (table_of(run / "metrics.csv") for run in runs)
    assert len(one) == 2
    for column in ("val_accuracy", "val_dice"):
        assert [row[column] for row in one] == [row[column] for row in two]
    one, two = (shown(run, "val/Ref_Prediction_GroundTruth") for run in runs)
    assert len(one) == 2
    np.testing.assert_allclose(one, two, rtol=0, atol=1.0)


def test_a_batch_that_processes_cannot_share_is_named():
    with pytest.raises(InputError, match="multiple of the 3 processes"):
        share_of_batch(8, 100, 3)
