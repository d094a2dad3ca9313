"""A run's folder, and going on with a run: what its files say is checked before it is used."""

import json
import time
import unicodedata
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import torch
from pydantic import Field, TypeAdapter, with_config
from torch import nn
from typing_extensions import TypedDict

from learning.checkpoints import (
    DIMENSIONS,
    SplitValues,
    Threshold,
    check_weights,
    load_checkpoint,
    load_tensors,
    misfit,
)
from model import UNET, check_arch
from tissue import agreement
from tissue.files import InputError, check_numbers, in_the_way, named
from tissue.schema import CLOSED, OPEN, Count, Finite, Positive, check_content

# The least and the most of each number that train.py takes.
RANGES = {
    "dimensions": DIMENSIONS,
    "lr": (0.0, 10),
    "batch_size": (1, 100_000),
    "epoch": (1, 1_000_000),
    "seed": (0, 2**32 - 1),  # what numpy takes
    "patience": (0, 1_000_000),
    "keep": (0, 1),
    "gpu_id": (-1, 1023),
    "workers": (0, 256),
}
# What --resume cannot change.
FIXED = ("arch", "dimensions", "loss", "stain", "augment", "sampler", "lr", "batch_size", "epoch")
FIXED += ("seed", "init", "pretrained", "keep")
LONGEST = 200  # bytes of --name; file systems take 255 with the time before it
ANEW = "start a new run"


# --- what the files hold ------------------------------------------------------------------------


PixelCounts = Annotated[list[Count], Field(min_length=4, max_length=4)]


@with_config(OPEN)
class Settings(TypedDict):
    """args.json. What is not required, the first versions did not write."""

    root: str | list[str]  # a list since several sets are learned at once
    log: str
    name: str
    dimensions: int
    lr: float
    batch_size: int
    epoch: int
    seed: int
    gpu_id: int
    device: Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:\d{1,4})?)$")]
    precision: Literal["float32", "bfloat16", "float16"]
    arch: NotRequired[str]
    loss: NotRequired[Literal["bce", "bce_dice"]]
    stain: NotRequired[Literal["none", "reinhard"]]
    augment: NotRequired[Literal["basic", "moderate", "strong"]]
    sampler: NotRequired[Literal["uniform", "balanced"]]
    init: NotRequired[str | None]
    pretrained: NotRequired[str | None]
    patience: NotRequired[int]
    replay: NotRequired[list[str]]
    keep: NotRequired[float]
    workers: NotRequired[int | None]
    compile: NotRequired[bool]
    asked_precision: NotRequired[Literal["auto", "float32", "bfloat16", "float16"]]
    amp: NotRequired[bool]  # earlier versions', in place of asked_precision


@with_config(CLOSED)
class Row(TypedDict):
    """An epoch's row of metrics.csv."""

    epoch: Annotated[int, Field(ge=1)]
    train_loss: Finite
    val_loss: Finite
    val_accuracy: Annotated[Finite, Field(ge=0, le=1)]
    val_dice: Annotated[Finite, Field(ge=0, le=1)]
    learning_rate: Annotated[Finite, Field(ge=0)]
    patches_per_second: Annotated[Finite, Field(ge=0)]
    seconds: Annotated[Finite, Field(ge=0)]


@with_config(CLOSED)
class Progress(TypedDict):
    """How far a run has come: the epoch that is under way, and its steps that are done."""

    epoch: Annotated[int, Field(ge=1)]
    batch: Count
    losses: list[Finite]  # of the last steps, which no curve shows yet
    epoch_loss: Finite
    seconds: Annotated[Finite, Field(ge=0)]  # of the whole run
    best_dice: Annotated[Finite, Field(ge=-1, le=1)]
    best_epoch: Count
    metrics: list[Row]
    finished: bool
    # Steps of this epoch and their seconds, for patches a second; earlier versions had none.
    timed_steps: NotRequired[Count]
    timed_seconds: NotRequired[Annotated[Finite, Field(ge=0)]]
    # `agreement.pixel_counts` of each validation image, of a fine-tuning alone.
    before: NotRequired[list[PixelCounts]]
    after: NotRequired[list[PixelCounts]]


@with_config(CLOSED)
class Scaler(TypedDict, total=False):
    """torch.amp.GradScaler's state; empty where it is not used."""

    scale: Positive
    growth_factor: Annotated[Finite, Field(gt=1)]
    backoff_factor: Annotated[Finite, Field(gt=0, lt=1)]
    growth_interval: Annotated[int, Field(ge=1)]
    _growth_tracker: Count


@with_config(OPEN)
class Schedule(TypedDict):
    last_epoch: Count  # torch's name for the number of steps


@with_config(OPEN)
class Optimizer(TypedDict):
    state: dict[int, dict[str, Any]]


@with_config(CLOSED)
class Origin(TypedDict):
    """What a fine-tuning began with."""

    model: dict[str, Any]
    split: SplitValues
    threshold: NotRequired[Threshold]
    keep: Annotated[Finite, Field(ge=0, le=1)]  # the share of it in what the run makes


@with_config(OPEN)
class Training(TypedDict):
    """What last.pt keeps beside a checkpoint's own."""

    model: dict[str, Any]
    ema: dict[str, Any]
    optimizer: Optimizer
    schedule: Schedule
    scaler: Scaler
    progress: Progress
    patch_set: str
    random: Any  # uint8, torch's generator
    origin: NotRequired[Origin]


SETTINGS, TRAINING = TypeAdapter(Settings), TypeAdapter(Training)


# --- the folder ---------------------------------------------------------------------------------


def check_flags(args: Namespace) -> None:
    """Raise InputError for flags of train.py that have no such value."""
    check_numbers(args, RANGES)
    if args.arch is not None:
        try:
            check_arch(args.arch)
        except InputError as error:
            raise InputError(f"--arch: {error}") from error
    for flag in ("name", "root", "log", "init", "pretrained"):
        value = getattr(args, flag) or ""
        text = "".join(value) if isinstance(value, list) else str(value)
        if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text):
            raise InputError(f"--{flag}: found {text!r:.80}, expected text that can be printed")
    alone = {"replay": args.replay, "keep": args.keep is not None and not args.resume}
    if (flag := next(filter(alone.get, alone), None)) and not args.init:
        raise InputError(f"--{flag}: found it without --init, expected both; add --init")
    name = args.name
    if set(name) & set("/\\") or name in (".", "..") or len(name.encode()) > LONGEST:
        raise InputError(
            f"--name: found {name!r:.80}, expected the end of a folder's name, without slashes, of "
            f"at most {LONGEST} bytes"
        )


def make_run_folder(log: Path | str, name: str) -> Path:
    """Make and return `<log>/<YYYYmmddHHMMSS>[-<name>]`; waits for a free second.

    Raises InputError where `log` cannot be a folder.
    """
    if place := in_the_way(Path(log)):  # it would never be free
        raise InputError(f"--log: found a file or a broken link, {place}, expected a folder")
    while True:
        run = Path(log) / (time.strftime("%Y%m%d%H%M%S") + (f"-{name}" if name else ""))
        try:
            with named(run):
                run.mkdir(parents=True)
            return run
        except FileExistsError:
            time.sleep(0.1)


def find_run(log: Path | str, run: str) -> Path:
    """The run folder that `--resume` means: its path, or "newest" for the last one in `log`."""
    if run == "newest":
        runs = sorted(path.parent for path in Path(log).glob("*/args.json"))
        if not runs:
            raise FileNotFoundError(
                f"{log}: found no run, expected one to resume; start one without --resume"
            )
        run = runs[-1]
    for name in ("args.json", "last.pt"):
        if not (Path(run) / name).is_file():
            raise FileNotFoundError(
                f"{Path(run) / name}: not found, expected a run to resume; one that ended before "
                f"its first last.pt is started again, another is named: --resume RUN"
            )
    return Path(run)


def read_settings(run: Path) -> dict:
    """A run's args.json, an earlier version's with this one's `asked_precision`; InputError where
    it is damaged or says what no flag can.
    """
    path = run / "args.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: found no readable JSON ({error!s:.80}), expected what train.py wrote; {ANEW}"
        ) from error
    if isinstance(content, dict) and "colour" in content:  # as 0.1.0 called it
        content["stain"] = {"own": "none", "one": "reinhard"}.get(str(content.pop("colour")))
    settings = check_content(SETTINGS, content, path, ANEW)
    try:
        check_numbers(Namespace(**dict.fromkeys(RANGES) | settings), RANGES)
        check_arch(settings.get("arch", UNET))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    asked = "auto" if settings.pop("amp", True) else "float32"
    return {"asked_precision": asked} | settings


def read_flags(parser: ArgumentParser, argv: list[str] | None) -> Namespace:
    """The flags of train.py; with --resume those that are not given are the run's, and `resume` is
    its folder. Raises InputError for flags that would change what FIXED names.
    """
    args = parser.parse_args(argv)
    if args.resume:
        run = find_run(args.log, args.resume)
        # An earlier version's run lacks newer flags.
        older = {"arch": UNET, "loss": "bce", "stain": "none", "augment": "basic", "keep": 0.0}
        saved = vars(args) | older | read_settings(run)
        parser.set_defaults(**{key: saved[key] for key in vars(args) if key != "resume"})
        args = Namespace(**vars(parser.parse_args(argv)) | {"resume": run})
        check_same(args, saved)
        for flag, roots in (("root", args.root), ("replay", args.replay)):
            for root in roots:
                if not Path(root).exists():
                    raise FileNotFoundError(
                        f"{root}: no such folder, expected the patch set of {run}; if it has "
                        f"moved, tell where with --{flag}"
                    )
    return args


def check_same(args: Namespace, saved: dict) -> None:
    """Raise InputError for the flags whose value is not the one a run was started with."""
    for flag in FIXED:
        if getattr(args, flag) != saved[flag]:
            raise InputError(
                f"--{flag}: found {getattr(args, flag)}, expected {saved[flag]} as the run was "
                f"started; leave the flag out, or start a new run"
            )


# --- going on -----------------------------------------------------------------------------------


def load_training(run: Path, patch_set: str, args: Namespace, model: nn.Module, steps: int) -> dict:
    """What a run's last.pt keeps beside the weights, to go on with, as `Training` has it, and the
    images that it says were `learned`.

    `patch_set` is the `patches.set_hash`, `args` are the flags of train.py, `model` is a new
    network of the run's kind, `steps` are those of an epoch. Raises InputError for a run that is
    finished, is of another patch set or other settings, or whose state contradicts itself.
    """
    path = run / "last.pt"
    checkpoint = load_checkpoint(path)
    if "training" not in checkpoint:
        raise InputError(f"{path}: found no state of training, expected a last.pt by train.py")
    training = check_content(TRAINING, checkpoint["training"], path, ANEW)
    if training["patch_set"] != patch_set:
        raise InputError(
            f"{path}: found a run on another patch set than the one in --root, expected the same; "
            f"cut it again as it was, or start a new run with --init {path}"
        )
    if checkpoint["config"] != model.config:
        raise InputError(
            f"{path}: found {checkpoint['config']}, expected {model.config} as in args.json; {ANEW}"
        )
    began = checkpoint.get("args")
    for flag in FIXED:
        value = getattr(args, flag)
        if isinstance(began, dict) and began.get(flag, value) != value:
            raise InputError(
                f"{path}: found a run with --{flag} {began[flag]!r:.80}, expected {value!r:.80} as "
                f"in args.json; {ANEW}"
            )
    best = run / "best.pt"
    if training["progress"]["best_epoch"] or training["progress"].get("before"):
        load_checkpoint(best)  # later epochs may not be better
    # An earlier version said so before it had chosen the split.
    if training["progress"]["finished"] and "split" in load_tensors(best):
        raise InputError(
            f"{path}: found a finished run, expected one that was stopped; to train further, "
            f"start a new run with --init {path}"
        )
    check_state(training, model, path)
    check_progress(training, args.epoch, steps, path)
    return training | {"learned": checkpoint.get("learned", [])}


def check_state(training: Mapping, model: nn.Module, path: Path) -> None:
    """Raise InputError unless weights, averaged weights and the optimiser's moments fit."""
    own, step = model.state_dict(), training["schedule"]["last_epoch"]
    check_weights(training["model"], own, path)
    averaged = {f"module.{key}": value for key, value in own.items()}
    averaged["n_averaged"] = torch.tensor(0)
    check_weights(training["ema"], averaged, path)
    if "origin" in training:
        check_weights(training["origin"]["model"], own, path)
    if (training["ema"]["n_averaged"] == 0) != (step == 0):  # the first update copies
        raise contradiction(path, f"{training['ema']['n_averaged']} averages at step {step}")
    state = training["optimizer"]["state"]
    learned = {i: p for i, p in enumerate(model.parameters()) if p.requires_grad}
    wanted = {i: {"exp_avg": p, "exp_avg_sq": p} for i, p in learned.items()}
    for i in wanted:
        wanted[i] |= {"step": torch.tensor(0.0)}
    may_be_empty = step == 0 or training["scaler"]  # float16 may skip the first steps
    if state.keys() != wanted.keys() and (state or not may_be_empty):
        raise contradiction(path, "the optimiser knows other parameters than the network has")
    for i, moments in state.items():
        if reason := misfit(moments, wanted[i]):
            raise contradiction(path, f"the optimiser's parameter {i}: {reason}")
        done = moments["step"].item()
        late = done != step if not training["scaler"] else not 0 <= done <= step
        if late or (moments["exp_avg_sq"] < 0).any():
            raise contradiction(path, f"the optimiser's parameter {i} at step {done:g} of {step}")
    if len(training["scaler"]) not in (0, len(Scaler.__annotations__)):
        raise contradiction(path, f"a loss scale with {', '.join(training['scaler'])} alone")
    try:
        torch.Generator().set_state(training["random"])
    except (RuntimeError, TypeError) as error:
        raise contradiction(path, "no state of torch's random numbers") from error


def check_progress(training: Mapping, epochs: int, steps: int, path: Path) -> None:
    """Raise InputError unless epochs, steps and rows of metrics.csv agree with each other."""
    progress, step = training["progress"], training["schedule"]["last_epoch"]
    epoch, batch, rows = progress["epoch"], progress["batch"], progress["metrics"]
    if not (epoch <= epochs + 1 and batch <= (steps if epoch <= epochs else 0)):
        raise contradiction(path, f"step {batch} of epoch {epoch}, of {steps} and {epochs}")
    if step != (epoch - 1) * steps + batch:
        raise contradiction(path, f"step {step} in step {batch} of epoch {epoch}")
    if [row["epoch"] for row in rows] != list(range(1, epoch)):
        raise contradiction(path, f"{len(rows)} rows of metrics in epoch {epoch}")
    if len(progress["losses"]) > batch or progress.get("timed_steps", 0) > batch:
        raise contradiction(path, f"more steps than the {batch} of this epoch")
    before, after = progress.get("before", []), progress.get("after", [])
    start = agreement.dice(np.sum(before, 0)) if before else -1.0
    scores = [{"val_dice": start, "epoch": 0}, *rows]
    best = max(scores, key=lambda row: row["val_dice"])
    if before:  # the best may be better on too few images
        best = scores[min(progress["best_epoch"], len(rows))]
    if (progress["best_dice"], progress["best_epoch"]) != (best["val_dice"], best["epoch"]):
        raise contradiction(path, f"a best epoch {progress['best_epoch']}, which is not the best")
    if len(before) != len(after):
        raise contradiction(path, f"{len(before)} images before and {len(after)} after")


def contradiction(path: Path, what: str) -> InputError:
    """The error for a state of training that cannot be."""
    return InputError(f"{path}: found {what}, expected the state of a run by train.py; {ANEW}")
