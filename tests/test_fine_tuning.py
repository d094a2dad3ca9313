"""Fine-tuning helps or says that it does not, forgets little, and goes on where it was stopped."""

import json
import shutil
import signal
from argparse import Namespace

import numpy as np
import pytest
import torch

import train
from learning import checkpoints, splitting
from learning.loading import with_replay
from learning.signals import Stopped, StopSignal
from learning.state import Progress, State, began_with, make_state
from model import UNet
from tests.scripts import cut, learn, table_of
from tests.test_runs import label
from tests.test_training import same, same_training
from tissue.files import InputError
from tissue.patches import folder, read_patch, read_table
from tissue.synthetic import write_demo

SPLIT = {"sigma": 0.5, "h": 0.3, "hole": 2.0, "smallest": 9.0}


@pytest.fixture
def start(root, tmp_path):
    """A checkpoint with its own split and threshold; two images of `root` validate."""
    cut(root, "--val_pattern", "*0[34]")
    run = learn(root, tmp_path / "first", "--epoch", 4, "--lr", 0.01, "--stain", "none")
    checkpoint = torch.load(run / "best.pt", weights_only=True)
    own = {"split": SPLIT | {"confidence": 0.0}, "threshold": 0.45}
    torch.save(checkpoint | own, tmp_path / "start.pt")
    return tmp_path / "start.pt"


@pytest.fixture
def kept(tmp_path):
    """A patch set to be replayed."""
    write_demo(tmp_path / "kept", 3, 96)
    cut(tmp_path / "kept", "--val_pattern", "*_03")
    return tmp_path / "kept"


def tune(root, log, start, *more):
    return learn(root, log, "--init", start, "--precision", "float32", *more)


def dices(root, path):
    """Dice of each validation image over its patches, by a checkpoint, counted in numpy."""
    checkpoint = checkpoints.load_checkpoint(path)
    model = checkpoints.build_model(checkpoint).eval()
    mean, std = (np.array(checkpoint["normalisation"][key]) for key in ("mean", "std"))
    sums = {}
    for row in read_table(root, "val"):
        image, mask = read_patch(root, "val", row["file"])
        pixels = torch.tensor((image / 255 - mean) / std, dtype=torch.float32).permute(2, 0, 1)
        with torch.inference_mode():
            found = model(pixels[None])[0, 0].numpy() > 0
        both, total = sums.get(row["name"], (0, 0))
        reference = mask > 0
        sums[row["name"]] = both + (found & reference).sum(), total + found.sum() + reference.sum()
    return {name: 2 * both / total for name, (both, total) in sums.items()}


def test_each_validation_image_is_scored_before_and_after(root, tmp_path, start, capsys):
    run = tune(root, tmp_path / "log", start, "--lr", 0.02, "--augment", "basic")
    rows = table_of(run / "before_after.csv")
    assert [row["image"] for row in rows] == ["Drawn_03", "Drawn_04"]
    for column, path in (("dice_before", start), ("dice_after", run / "best.pt")):
        found = {row["image"]: float(row[column]) for row in rows}
        assert found == pytest.approx(dices(root, path), abs=2e-4)
    said = capsys.readouterr().out
    assert f"Drawn_03 | {rows[0]['dice_before']} | {rows[0]['dice_after']}" in said
    # Whether it gets better depends on the last bits of a processor.
    old, new = (torch.load(p, weights_only=True)["model"] for p in (start, run / "best.pt"))
    stayed = all(torch.equal(old[key], new[key]) for key in old)
    assert ("no epoch was better" in said) is stayed
    assert ("Dice of the validation patches" in said and "of 2 images" in said) is not stayed


def test_a_network_that_got_worse_is_not_called_best(root, tmp_path, start, capsys):
    run = tune(root, tmp_path / "log", start, "--lr", 0.1, "--epoch", 1)
    best, before = (checkpoints.load_checkpoint(path) for path in (run / "best.pt", start))
    assert same(best["model"], before["model"])
    assert best["epoch"] == 0 and best["best_dice"] > float(
        table_of(run / "metrics.csv")[0]["val_dice"]
    )
    assert f"no epoch was better than {start}" in capsys.readouterr().out
    for row in table_of(run / "before_after.csv"):
        assert row["dice_before"] == row["dice_after"]


@pytest.mark.parametrize(
    ("after", "better"),
    [([[9, 0, 1, 0], [1, 0, 9, 0]], False),  # on one of two, by more than it lost on the other
     ([[9, 0, 1, 0], [6, 0, 4, 0]], True), ([[5, 0, 5, 0], [5, 0, 5, 0]], False),
     ([[9, 0, 1, 0], [5, 0, 5, 0]], True)],  # one of them is as before, say without nuclei
)  # fmt: skip
def test_one_image_of_two_does_not_make_a_network_better(after, better):
    before = [[5, 0, 5, 0], [5, 0, 5, 0]]
    state = State(*[None] * 5, Progress(before=before), [], [], 0.0, None)
    assert state.is_better(torch.tensor(after)) == better
    assert State(*[None] * 5, Progress(), [], [], 0.0, None).is_better(torch.tensor(after))


@pytest.mark.parametrize(("flags", "keep"), [((), 0.5), (("--keep", 0.8), 0.8), (("--keep", 0), 0)])
def test_what_is_kept_lies_between_the_start_and_what_was_learned(
    root, tmp_path, start, flags, keep
):
    run = tune(root, tmp_path / "log", start, *flags)
    last = torch.load(run / "last.pt", weights_only=True)
    before = torch.load(start, weights_only=True)["model"]
    for key, learned in last["training"]["ema"].items():
        name = key.removeprefix("module.")
        if learned.is_floating_point():
            between = keep * before[name] + (1 - keep) * learned
            torch.testing.assert_close(last["model"][name], between, rtol=1e-5, atol=1e-6)
            if "running" in name:
                assert torch.equal(learned, before[name]) == (keep > 0)
            elif name.endswith("0.weight"):
                assert not torch.equal(learned, before[name])


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_what_is_kept_does_not_learn(keep):
    """Its batch norm uses the statistics that it has, and needs no other process for them."""
    model = UNet(4).train()
    first = began_with(model, keep, {"config": model.config, "split": SPLIT, "threshold": 0.5})
    state = make_state(model, Namespace(lr=1e-3, epoch=1, init="a"), 1, torch.float32, origin=first)
    assert model.training and not any(part.training for part in state.make_kept().modules())


@pytest.mark.parametrize(("begins", "times"), [("at random", 10), ("with those of --init", 1)])
def test_few_weights_that_make_a_logit_learn_fast_unless_they_have_learned(begins, times):
    """Adam's first step is the rate, whatever the gradient."""
    model = UNet(4, instances=True)
    init = None if begins == "at random" else "nuclei.pt"  # with or without its output for depth
    state = make_state(model, Namespace(lr=1e-3, epoch=1, init=init), 100, torch.float32)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model(torch.rand(2, 3, 32, 32)).square().mean().backward()
    state.optimizer.step()
    for name, value in model.named_parameters():
        if value.requires_grad:
            faster = times if name.startswith("last_conv") else 1
            moved = (value.detach() - before[name]).abs().max().item()
            assert moved == pytest.approx(faster * state.rate, rel=0.05), name


def test_a_share_to_keep_is_a_share(root, tmp_path, start):
    with pytest.raises(InputError, match=r"--keep: found 2\.0, expected 0 or more and at most 1"):
        tune(root, tmp_path / "log", start, "--keep", 2)


@pytest.mark.parametrize("flag", ["keep", "replay"])
def test_flags_of_a_fine_tuning_are_refused_without_one(root, tmp_path, flag):
    cut(root)
    with pytest.raises(InputError, match=f"--{flag}: found it without --init, expected both"):
        learn(root, tmp_path / "log", f"--{flag}", 0)
    run = learn(root, tmp_path / "log", "--epoch", 1)
    assert json.loads((run / "args.json").read_text())["keep"] == 0.5
    with pytest.raises(InputError, match="finished run"):  # and not for what it began with
        train.main(train.parse_args(["--resume", str(run)]))


def test_the_threshold_stays_and_where_nothing_tells_nuclei_apart_the_split(root, tmp_path, start):
    run = tune(root, tmp_path / "log", start)
    for file in ("best.pt", "last.pt"):
        content = checkpoints.load_checkpoint(run / file)
        assert content["split"] == SPLIT | {"confidence": 0.0}
        assert content["threshold"] == 0.45


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [((), (1, 2, 3, 4), "chosen on 2 images with label maps"),  # nothing is kept
     ((), (3, 4), "that of --init (no image has a label map to choose on)"),
     ((1, 2), (1, 2, 3, 4), "chosen on 4 images with label maps")],
)  # fmt: skip
def test_validation_images_choose_the_split_only_where_their_counts_stay_known(
    root, tmp_path, monkeypatch, before, now, said
):
    """Images 3 and 4 validate; a run that goes on does as one that was never stopped."""
    monkeypatch.setattr(splitting, "LEAST_COUNTED", 1)
    if before:
        label(root, *before)
    cut(root, "--val_pattern", "*0[34]")
    start = learn(root, tmp_path / "first", "--epoch", 4, "--lr", 0.01) / "best.pt"
    label(root, *now)
    cut(root, "--val_pattern", "*0[34]")
    run = tune(root, tmp_path / "log", start, "--epoch", 1)
    best = checkpoints.load_checkpoint(run / "best.pt")
    assert best["count_error"]["images"] == 2
    lines = (run / "train.log").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("split "))
    assert said in line
    if "that of --init" in said:
        assert best["split"] == checkpoints.load_checkpoint(start)["split"]

    last = torch.load(run / "last.pt", weights_only=True)
    last["training"]["progress"]["finished"] = False
    torch.save(last, run / "last.pt")
    first = {key: best[key] for key in best if key != "count_error"} | {"split": last["split"]}
    torch.save(first, run / "best.pt")
    start.unlink()
    train.main(train.parse_args(["--resume", str(run)]))
    again = checkpoints.load_checkpoint(run / "best.pt")
    assert [again[key] for key in ("split", "count_error")] == [best["split"], best["count_error"]]
    assert (run / "train.log").read_text().splitlines().count(line) == 2


def test_flags_of_learning_that_are_left_out_are_those_of_a_short_fine_tuning(
    root, tmp_path, start
):
    def settings(*flags):
        (run,) = (tmp_path / "log" / flags[-1]).glob("*/args.json")
        return json.loads(run.read_text())

    for name, flags in {"left out": (), "given": ("--lr", 1e-5, "--augment", "strong")}.items():
        arguments = ["--root", root, "--log", tmp_path / "log" / name, "--init", start]
        arguments += ["--gpu_id", -1, "--workers", 0, *flags]
        train.main(train.parse_args(list(map(str, arguments))))
    found = settings("left out")
    assert (found["lr"], found["augment"]) == (1e-4, "moderate") and 1 < found["epoch"] < 50
    assert (settings("given")["lr"], settings("given")["augment"]) == (1e-5, "strong")


# --- replay


@pytest.mark.parametrize("kept", [3, 40])
def test_half_of_each_batch_is_replayed(kept):
    order = with_replay(None, 10, kept, np.random.default_rng(0))
    assert sorted(order[::2]) == list(range(10))
    times = np.bincount(order[1::2] - 10, minlength=kept)
    assert times.sum() == 10 and len(times) == kept and times.max() - times.min() <= 1


def test_replayed_patches_are_learned_from_and_not_validated(root, tmp_path, start, kept):
    fed = []
    train_step = train.train_step

    def noted(state, network, images, masks, *more):
        fed.append(len(images))
        return train_step(state, network, images, masks, *more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "train_step", noted)
        run = tune(root, tmp_path / "log", start, "--replay", kept, "--epoch", 1)
    own = len(read_table(root, "train"))
    assert sum(fed) == 2 * own
    assert [row["image"] for row in table_of(run / "before_after.csv")] == ["Drawn_03", "Drawn_04"]
    shown = (run / "train.log").read_text()
    assert f"{own + 50} training and {len(read_table(root, 'val'))} validation patches" in shown


def test_a_replayed_patch_that_is_damaged_is_named(root, tmp_path, start, kept):
    for path in folder(kept, "rgb", "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"kept.*missing or damaged"):
        tune(root, tmp_path / "log", start, "--replay", kept, "--epoch", 1)


def test_replay_of_what_is_learned_anyway_is_refused(root, tmp_path, start):
    with pytest.raises(InputError, match=r"--replay: found .*data in --root, too"):
        tune(root, tmp_path / "log", start, "--replay", root)
    assert not (tmp_path / "log").exists()


def test_replay_of_an_image_that_is_validated_is_refused(root, tmp_path, start):
    shutil.copytree(root, tmp_path / "again")
    cut(tmp_path / "again", "--val_pattern", "*0[24]")  # learns 03, which `root` validates
    with pytest.raises(InputError, match=r"Drawn_03: found .*again: Drawn_03"):
        tune(root, tmp_path / "log", start, "--replay", tmp_path / "again")
    assert not (tmp_path / "log").exists()
    cut(tmp_path / "again", "--val_pattern", "*0[34]")  # what is validated there is not learned
    tune(root, tmp_path / "log", start, "--replay", tmp_path / "again", "--epoch", 1)


def test_a_replay_that_is_no_patch_set_is_one_line(root, tmp_path, start):
    with pytest.raises((InputError, FileNotFoundError), match="nowhere"):
        tune(root, tmp_path / "log", start, "--replay", tmp_path / "nowhere")
    assert not (tmp_path / "log").exists()


# --- going on


@pytest.mark.parametrize("stopped_at", [1, 9, 40])
def test_a_fine_tuning_that_was_stopped_ends_as_if_nothing_happened(
    root, tmp_path, start, kept, monkeypatch, stopped_at
):
    flags = ("--replay", kept, "--epoch", 3, "--lr", 0.01)
    undisturbed = tune(root, tmp_path / "undisturbed", start, *flags)
    checks, check = [], StopSignal.check

    def stop(self, *more, **flags):
        checks.append(1)
        if len(checks) == stopped_at:
            raise Stopped(signal.SIGINT)
        return check(self, *more, **flags)

    monkeypatch.setattr(StopSignal, "check", stop)
    with pytest.raises(Stopped):
        tune(root, tmp_path / "log", start, *flags)
    start.unlink()
    (run,) = (tmp_path / "log").iterdir()
    train.main(train.parse_args(["--resume", str(run)]))
    same_training(run, undisturbed)
    bests = [torch.load(r / "best.pt", weights_only=True) for r in (run, undisturbed)]
    assert bests[0]["split"] == bests[1]["split"]
    assert (run / "before_after.csv").read_text() == (undisturbed / "before_after.csv").read_text()


@pytest.mark.parametrize(
    ("place", "value"), [("model", {}), ("split", {"sigma": -1}), ("split", None)]
)
def test_a_damaged_beginning_is_named(root, tmp_path, start, place, value):
    run = tune(root, tmp_path / "log", start)
    last = torch.load(run / "last.pt", weights_only=True)
    last["training"]["progress"] |= {"finished": False}
    last["training"]["origin"][place] = value
    torch.save(last, run / "last.pt")
    with pytest.raises(InputError, match=r"last\.pt: found"):
        train.main(train.parse_args(["--resume", str(run)]))
