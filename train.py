"""Train a network on the patches of preprocess.py.

    python3 train.py --gpu_id 0
    python3 train.py --gpu_id 0 --lr 2e-5 --dimensions 64      (as the first version was called)
    python3 train.py --root ./data/demo/ --gpu_id -1 --dimensions 16 --epoch 4
    python3 train.py --root data/one data/other --sampler balanced --augment moderate
    python3 train.py --resume
    torchrun --nproc_per_node 4 -- train.py --batch_size 32
    tensorboard --logdir=.

Writes log/<YYYYmmddHHMMSS>[-<name>]/ with args.json, train.log, metrics.csv, tensorboard's events,
best.pt (highest validation Dice) and last.pt, from which --resume goes on.
"""

import argparse
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import utils
from learning import checkpoints, pretrained, runs
from model import UNET, build, config_of, sees_all, usual_dimensions
from tissue import nuclei
from tissue.depth import segment
from tissue.files import InputError, Parser, locked, run_script
from tissue.manifest import MANIFEST
from tissue.masks import read as read_labels
from tissue.pairs import set_folders
from tissue.patches import PatchDataset, PatchSampler, balanced_order, read_manifests, set_hash
from tissue.pixel_size import scale_of
from tissue.splits import spread
from tissue.tiling import predict_image
from tissue.windows import open_image

LOG_EVERY = 50  # steps between points of the training curves; each makes the device wait once
SAVE_EVERY = 300  # seconds between writings of last.pt within a long epoch
GRID_PATCHES = 6  # rows of the image | prediction | reference grid
GRADIENT_NORM = 1.0  # longer gradients are shortened to this
EMA_EVERY = 4  # steps between updates of the averaged weights, each of which costs 3 % of a step
EMA_DECAY = 0.992  # an update, once they are warm: 0.998 a step, so about the last 500 steps
MOST_COUNTED = 32  # images of a set by which the split of touching nuclei is chosen
SHEET_PATCHES = 24  # of the contact sheet of augmented patches
LOSSES = {"bce": binary_cross_entropy_with_logits, "bce_dice": utils.bce_dice}
# what --resume cannot change
FIXED = ("arch", "dimensions", "loss", "colour", "augment", "sampler", "lr", "batch_size", "epoch")
FIXED += ("seed", "init", "pretrained")


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    files = parser.add_argument_group("files")
    files.add_argument("--root", nargs="+", default="./data/", help="folders with a patch set each")
    files.add_argument("--log", default="./log", help="folder in which the run gets its own")
    files.add_argument("--name", default="", help="added to the name of the run's folder")
    files.add_argument(
        "--resume", nargs="?", const="newest", metavar="RUN", help="go on with a run (the newest)"
    )
    files.add_argument("--init", metavar="CKPT", help="checkpoint whose weights to start from")
    learning = parser.add_argument_group("network and learning")
    learning.add_argument(
        "--arch", metavar="NAME",
        help="unet, or timm's name of an encoder for it; without it unet, or that of --init",
    )  # fmt: skip
    learning.add_argument(
        "--dimensions", type=int,
        help="channels at full resolution; without it 64, with an encoder 16, or those of --init",
    )  # fmt: skip
    learning.add_argument(
        "--pretrained", nargs="?", const=pretrained.FETCHED, metavar="FILE",
        help="start the encoder from ImageNet's weights, fetched by timm or in a file",
    )  # fmt: skip
    learning.add_argument(
        "--loss", choices=LOSSES, default="bce_dice",
        help="cross-entropy alone, or with 1 - soft Dice added",
    )  # fmt: skip
    learning.add_argument(
        "--colour", choices=utils.COLOURS,
        help="one: bring all images to one colour first, in inference.py too; own: as they are; "
        "without it one for unet, own with an encoder, or that of --init",
    )  # fmt: skip
    learning.add_argument(
        "--augment", choices=("basic", "moderate", "strong"), default="basic",
        help="flips and lightness; moderate: also turns, sizes, stains, sharpness; strong: all of "
        "it more, and pale nuclei, colours, noise",
    )  # fmt: skip
    learning.add_argument(
        "--sampler", choices=("uniform", "balanced"), default="uniform",
        help="each patch once an epoch; or sparse and dense ones alike, and small sets more often",
    )  # fmt: skip
    learning.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    learning.add_argument(
        "--batch_size", type=int, default=8, help="patches a step, over all processes together"
    )
    learning.add_argument("--epoch", type=int, default=50, help="passes over the training patches")
    learning.add_argument(
        "--seed", type=int, default=0, help="seed of weights, order, augmentation"
    )
    learning.add_argument(
        "--patience",
        type=int,
        default=0,
        help="epochs without a better Dice before the end; 0: all",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpu_id", type=int, default=0, help="number of the GPU; -1: the CPU")
    machine.add_argument(
        "--workers", type=int, help="processes that read patches; without it as many as pay"
    )
    machine.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, default=True,
        help="bfloat16 or float16 where the device multiplies it fast",
    )  # fmt: skip
    machine.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile: costs about half a minute, then saves time on each step",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.resume:
        args.resume = runs.find_run(args.log, args.resume)
        saved = runs.read_settings(args.resume)
        # An earlier version's run lacks newer flags.
        older = {"arch": UNET, "loss": "bce", "colour": "own"}
        saved = vars(args) | older | saved
        parser.set_defaults(**{key: saved[key] for key in vars(args) if key != "resume"})
        args = argparse.Namespace(**vars(parser.parse_args(argv)) | {"resume": args.resume})
        runs.check_same(args, saved, FIXED)
    return args


def main(args):
    args.root = set_folders(args.root, MANIFEST)
    runs.check_flags(args)
    stop = utils.StopSignal()
    with ExitStack() as until_the_end:
        until_the_end.callback(utils.end_processes)
        try:
            learn(args, stop, until_the_end)
        except RuntimeError as error:  # before the loop, as of a network too wide for the memory
            utils.explain(error)
            raise


def learn(args, stop: utils.StopSignal, until_the_end: ExitStack) -> None:
    """All of a training; what must be closed however it ends goes onto `until_the_end`."""
    device, rank, processes = utils.start_processes(args.gpu_id)
    precision = utils.everyone(choose_precision(args, device))[0]  # one for all processes
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    torch.backends.cudnn.benchmark = True  # all patches have one size, so the search pays

    # --- network and data, looked at before anything is written ---
    origin = None if args.resume else choose_network(args)
    manifests, patch_set = read_manifests(args.root), set_hash(*args.root)
    config = config_of(args.arch, args.dimensions, has_label_maps(manifests))
    check_patches(args, config, manifests[0]["patch_dim"])
    counted = counted_images(args.root, manifests) if rank == 0 else []
    train_loader, val_loader = make_loaders(args, device, rank, processes)
    train_set, val_set, sampler = train_loader.dataset, val_loader.dataset, train_loader.sampler
    batches = len(train_set) // args.batch_size  # an epoch
    grid = [val_set[len(val_set) * row // GRID_PATCHES][:2] for row in range(GRID_PATCHES)]

    # --- network ---
    utils.seed_everything(args.seed)
    model = build(config)
    if not args.resume and args.pretrained:
        pretrained.start_pretrained(model, args.pretrained)
    if origin:
        load_origin(model, origin)
    model = model.to(device, memory_format=torch.channels_last)
    if device.type == "cpu":
        utils.depthwise_in_float32(model)
    if processes > 1:
        utils.share_batch_norm(model)

    # --- run folder, and where an interrupted run goes on ---
    stop.hold(processes)  # until the loop is done: a signal waits for where last.pt can be written
    run, training = args.resume, None
    if rank == 0:
        run = run or runs.make_run_folder(args.log, args.name)
        until_the_end.enter_context(locked(run, "trains"))
    if args.resume:
        fixed = {flag: getattr(args, flag) for flag in FIXED}
        training = runs.load_training(run, patch_set, fixed, model, batches)
    state = make_state(model, args, batches, precision, training)
    progress = state.progress
    settings = {**vars(args), "resume": None, "device": str(device), "processes": processes}
    settings |= {
        "loader_processes": train_loader.num_workers,
        "precision": str(precision).removeprefix("torch."),
        "versions": utils.versions(),
    }
    checkpoint = describe(model, manifests, settings)
    if rank == 0:
        utils.write_json(run / "args.json", settings)
        utils.write_table(run / "metrics.csv", progress["metrics"])
        writer = SummaryWriter(run, purge_step=state.step + 1 if args.resume else None)
        utils.log_line(
            run,
            f"{run} | {args.arch} {args.dimensions} | {processes} x {device}, "
            f"{settings['precision']} | "
            f"{len(train_set)} training and {len(val_set)} validation patches"
            + (f" | goes on after step {state.step}" if args.resume else ""),
        )
        if sees_all(model):
            utils.log_line(run, f"{args.arch} sees all of an image: tiles will not be exact")
        if origin and origin["colour"] != checkpoint["colour"]:
            others = "own" if args.colour == "one" else "one"
            utils.log_line(run, f"{args.init} learned with --colour {others}, this run does not")
        if not args.resume:
            sampler.epoch = progress["epoch"]
            utils.log_augmented(writer, [train_set[key] for key in islice(sampler, SHEET_PATCHES)])
    started = time.monotonic() - progress["seconds"]
    saved = time.monotonic()

    def save_last():
        nonlocal saved
        utils.check_finite(state.losses, state.seen, train_set.files)
        progress["seconds"] = time.monotonic() - started
        writer.flush()  # the curves reach at least as far as what is saved
        weights = {"model": state.ema.module.state_dict(), "training": state.to_save(patch_set)}
        checkpoints.save_checkpoint(run / "last.pt", checkpoint | weights)
        saved = time.monotonic()

    threads = utils.Threads(device)

    def after_step():
        threads.adapt()
        if progress["batch"] % LOG_EVERY == 0 or progress["batch"] == batches:
            utils.check_finite(state.losses, state.seen, train_set.files)
            loss = end_losses(state, batches, processes)
            if rank == 0:
                point = {"loss": loss, "learning_rate": state.schedule.get_last_lr()[0]}
                utils.log_scalars(writer, "train", point, state.step)
                if time.monotonic() - saved > SAVE_EVERY:
                    check_set(args.root, patch_set)
                    save_last()
        stop.check()

    # --- loop ---
    if args.compile:
        model.compile()
    network = DistributedDataParallel(model) if processes > 1 else model
    try:
        while not is_over(progress, args):
            sampler.epoch, sampler.start = progress["epoch"], progress["batch"]
            bar = tqdm(
                train_loader, f"epoch {progress['epoch']}", batches, initial=progress["batch"],
                leave=False, disable=None if rank == 0 else True,
            )  # fmt: skip
            stop.soon()
            loss_of = partial(total_loss, LOSSES[args.loss])
            train_one_epoch(state, network, bar, loss_of, autocast, after_step)
            check_set(args.root, patch_set)
            stop.soon()
            scores = validate(state.ema.module, val_loader, device, autocast, processes, stop)
            is_best = end_epoch(state, *scores, args.batch_size, time.monotonic() - started)
            if rank == 0:
                row = progress["metrics"][-1]
                log_epoch(writer, state, grid, autocast)
                checkpoint |= {"epoch": row["epoch"], "best_dice": progress["best_dice"]}
                # A run that is killed between these lines goes on from the last.pt before: the
                # epoch's best.pt is written again, and metrics.csv from what last.pt has.
                if is_best:
                    best = {"model": state.ema.module.state_dict()}
                    checkpoints.save_checkpoint(run / "best.pt", checkpoint | best)
                save_last()
                utils.write_table(run / "metrics.csv", progress["metrics"])
                utils.log_line(run, utils.epoch_line(row, args.epoch, progress["best_dice"]))
        utils.end_processes()
        stop.release()
        if rank == 0:
            utils.log_line(run, choose_split(run / "best.pt", counted, device))
            utils.log_hyperparameters(writer, settings, progress)
            writer.close()
            progress["finished"] = True
            save_last()
            best = f"best validation Dice {progress['best_dice']:.4f}: {run / 'best.pt'}"
            utils.log_line(run, best)
    except utils.Stopped as stopped:
        if rank == 0:
            check_set(args.root, patch_set)
            save_last()
            utils.log_line(run, f"stopped by {stopped.name}; go on with: train.py --resume {run}")
        raise
    except (InputError, RuntimeError, OSError, EOFError) as error:
        check_set(args.root, patch_set)
        utils.explain(error)
        raise


# --- what a training needs ----------------------------------------------------------------------


def choose_precision(args, device) -> torch.dtype:
    """This device's fast number format, or that in which the run to go on with began: measured
    anew it might come out otherwise, and the run with it.
    """
    if args.resume:
        began = runs.read_settings(args.resume)
        if (began["device"], began["amp"]) == (str(device), args.amp):
            return getattr(torch, began["precision"])
    return utils.choose_precision(device) if args.amp else torch.float32


def choose_network(args) -> dict | None:
    """Settle `args.arch`, `dimensions` and `colour`, and return the checkpoint of --init, if any.

    What the flags leave open is the checkpoint's, or else the usual. Raises InputError for flags
    that contradict it.
    """
    if args.init and args.pretrained:
        raise InputError(
            "--pretrained: found it with --init, whose weights take the place of all others, "
            "expected one of the two; leave one out"
        )
    origin = utils.load_origin(args.init) if args.init else None
    config = origin["config"] if origin else {}
    args.arch = args.arch or config.get("arch", UNET)
    args.dimensions = args.dimensions or config.get("dimensions", usual_dimensions(args.arch))
    usual = origin["colour"] is not None if origin else args.arch == UNET
    args.colour = args.colour or ("one" if usual else "own")
    asked = {"arch": args.arch, "dimensions": args.dimensions}
    if origin and any(config[key] != value for key, value in asked.items()):
        raise InputError(
            f"--init {args.init}: found {config}, expected {asked} as asked for; leave --arch and "
            f"--dimensions out, or choose another file"
        )
    return origin


def load_origin(model: nn.Module, origin: dict) -> None:
    """Give a network the weights of --init; an output that those lack keeps its random ones, and
    one that the network lacks is left out.
    """
    state, own = dict(origin["model"]), model.state_dict()
    for key in ("last_conv.weight", "last_conv.bias"):
        same = min(len(own[key]), len(state[key]))
        state[key] = torch.cat([state[key][:same], own[key][same:]])
    model.load_state_dict(state)


def has_label_maps(manifests: list[dict]) -> bool:
    """Whether any training image has a label map, by which a network can learn to tell nuclei
    apart."""
    return any(i["labels"] and i["split"] == "train" for m in manifests for i in m["images"])


def total_loss(mask_loss, logits, masks) -> torch.Tensor:
    """The loss of the mask and, of a network that has that output, of the depth in nuclei."""
    loss = mask_loss(logits[:, :1], (masks != 0).float())
    return loss + utils.depth_loss(logits[:, 1:], masks) if logits.shape[1] > 1 else loss


def check_patches(args, config: dict, dim: int) -> None:
    """Raise InputError unless the network can learn from patches of `dim` x `dim` pixels."""
    with torch.device("meta"):  # shapes alone
        network = build(config)
        try:
            network(torch.empty(args.batch_size, 3, dim, dim))
        except ValueError as error:  # of batch norm, whose variance of one value is none
            raise InputError(
                f"--batch_size: found {args.batch_size}, expected 2 or more for --arch "
                f"{args.arch} and patches of {dim} x {dim} pixels"
            ) from error


def check_set(roots: list[str], patch_set: str) -> None:
    """Raise InputError if the patch sets are not those that a run began with."""
    try:
        same = set_hash(*roots) == patch_set
    except OSError:  # one is being cut
        same = False
    if not same:
        raise InputError(
            f"{', '.join(roots)}: found another patch set than the run began with, expected the "
            f"same until its end; last.pt is from before: cut the set as it was and go on with "
            f"--resume, or start a new run"
        )


def make_loaders(args, device, rank: int, processes: int) -> tuple[DataLoader, DataLoader]:
    """This process's share of the training patches, a batch at a time, and of those to validate."""
    colour = utils.COLOURS[args.colour]
    train_set = PatchDataset(args.root, "train", utils.transform("train", args.augment), colour)
    val_set = PatchDataset(args.root, "val", utils.transform("val"), colour)
    if not len(val_set):
        raise InputError("--root: found no validation patch, expected some; cut the sets anew")
    batch_size = utils.share_of_batch(args.batch_size, len(train_set), processes)
    order = None
    if args.sampler == "balanced":
        order = partial(balanced_order, train_set.foreground, sets=train_set.roots)
    sampler = PatchSampler(len(train_set), args.batch_size, args.seed, rank, processes, order)
    workers = utils.choose_workers(device) if args.workers is None else args.workers
    loading = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": utils.ignore_signals,
        "generator": torch.Generator(),  # else the loaders draw from the one that is saved
    }
    # Every process validates every n-th patch, none of them twice.
    mine = range(rank, len(val_set), processes)
    return (
        DataLoader(train_set, batch_size, sampler=sampler, **loading),
        DataLoader(val_set, batch_size, sampler=mine, **loading),
    )


@dataclass
class State:
    """All that changes while a network learns; last.pt keeps it."""

    model: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    progress: dict  # runs.Progress
    losses: list[torch.Tensor]  # of the steps that no curve shows yet
    seen: list[torch.Tensor | tuple]  # the patches behind each of them

    @property
    def step(self) -> int:
        return self.schedule.last_epoch

    def to_save(self, patch_set: str) -> dict:
        """The state as runs.Training has it; waits for the device."""
        parts = ("model", "ema", "optimizer", "scaler")
        saved = {name: getattr(self, name).state_dict() for name in parts}
        saved["schedule"] = {"last_epoch": self.step}
        saved["progress"] = self.progress | {"losses": [loss.item() for loss in self.losses]}
        return saved | {"patch_set": patch_set, "random": torch.get_rng_state()}


def make_state(model, args, batches: int, precision: torch.dtype, training: dict | None) -> State:
    """The state at a run's first step or, with what `runs.load_training` read, where it goes on."""
    device = next(model.parameters()).device
    average = utils.warm_ema(EMA_DECAY, lambda: schedule.last_epoch // EMA_EVERY)
    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    ema.n_averaged = ema.n_averaged.cpu()  # it is looked at on each update
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    progress = {"epoch": 1, "batch": 0, "losses": [], "epoch_loss": 0.0, "seconds": 0.0}
    progress |= {"timed_steps": 0, "timed_seconds": 0.0}
    progress |= {"best_dice": -1.0, "best_epoch": 0, "metrics": [], "finished": False}
    done = 0  # steps
    if training:
        progress |= training["progress"] | {"finished": False}
        done = training["schedule"]["last_epoch"]
        model.load_state_dict(training["model"])
        ema.load_state_dict(training["ema"])
        # Its settings follow from the flags and the step.
        optimizer.load_state_dict(
            optimizer.state_dict() | {"state": training["optimizer"]["state"]}
        )
        optimizer.param_groups[0]["initial_lr"] = args.lr
        if scaler.is_enabled() and training["scaler"]:
            scaler.load_state_dict(training["scaler"])
        torch.set_rng_state(training["random"])
    steps = args.epoch * batches + 1  # the rate after the last step counts as one, too
    rate = partial(utils.one_cycle, steps=steps)
    schedule = LambdaLR(optimizer, rate, last_epoch=done - 1)
    losses = [torch.tensor(loss, device=device) for loss in progress["losses"]]
    return State(model, ema, optimizer, schedule, scaler, progress, losses, [()] * len(losses))


def describe(model: nn.Module, manifests: list[dict], settings: dict) -> dict:
    """What best.pt and last.pt say all through a run."""
    known = {
        key: next((m[key] for m in manifests if m[key]), None) for key in ("pixel_size_um", "bits")
    }
    colour = utils.COLOURS[settings["colour"]]
    return {
        "format_version": checkpoints.CHECKPOINT_VERSION,
        "config": model.config,
        "normalisation": {"mean": utils.IMAGENET_MEAN, "std": utils.IMAGENET_STD},
        "channel_order": "rgb",
        "colour": colour._asdict() if colour else None,
        "patch_dim": manifests[0]["patch_dim"],
        **known,
        "threshold": 0.5,
        "split": nuclei.default_split("instances" in model.config)._asdict(),
        "args": settings,
        "versions": settings["versions"],
    }


# --- the loop -----------------------------------------------------------------------------------


def is_over(progress: dict, args) -> bool:
    """Whether all epochs are done, or too many in a row were no better."""
    waited = progress["epoch"] - 1 - progress["best_epoch"]
    return progress["epoch"] > args.epoch or 0 < args.patience <= waited


def train_one_epoch(state: State, network, loader, loss_of, autocast, after_step) -> None:
    """Learn from the batches that are left of an epoch; `after_step()` is called after each."""
    progress = state.progress
    started = time.monotonic() - progress["timed_seconds"]
    device = next(state.model.parameters()).device
    state.model.train()
    for images, masks, indices in loader:
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        masks = masks.to(device, non_blocking=True)
        loss = train_step(network, images, masks, loss_of, state.optimizer, state.scaler, autocast)
        state.schedule.step()
        if state.step % EMA_EVERY == 1:  # from the first step on
            state.ema.update_parameters(state.model)
        state.losses.append(loss)
        state.seen.append(indices)
        progress["batch"] += 1
        progress["timed_steps"] += 1
        progress["timed_seconds"] = time.monotonic() - started
        after_step()


def end_losses(state: State, batches: int, processes: int) -> float:
    """The mean loss of the steps since the last call, over all processes; waits for the device."""
    mean_loss = torch.stack(state.losses).mean() / processes
    utils.add_up([mean_loss], processes)
    loss = mean_loss.item()
    state.progress["epoch_loss"] += loss * len(state.losses) / batches
    state.losses, state.seen = [], []
    return loss


def end_epoch(state: State, val_loss: float, counts, batch_size: int, seconds: float) -> bool:
    """Take an epoch's scores into the state's progress, and return whether they are the best."""
    progress, dice = state.progress, utils.dice(counts)
    is_best = dice > progress["best_dice"]
    if is_best:
        progress |= {"best_dice": dice, "best_epoch": progress["epoch"]}
    patches, timed = progress["timed_steps"] * batch_size, progress["timed_seconds"]
    row = {
        "epoch": progress["epoch"],
        "train_loss": progress["epoch_loss"],
        "val_loss": val_loss,
        "val_accuracy": utils.accuracy(counts),
        "val_dice": dice,
        "learning_rate": state.schedule.get_last_lr()[0],
        "patches_per_second": patches / timed if timed else 0.0,
        "seconds": seconds,
    }
    progress["metrics"].append(row)
    progress |= {"epoch": progress["epoch"] + 1, "batch": 0, "epoch_loss": 0.0}
    progress |= {"timed_steps": 0, "timed_seconds": 0.0}
    return is_best


@torch.inference_mode()
def log_epoch(writer: SummaryWriter, state: State, grid: list, autocast) -> None:
    """Put an epoch's scores into tensorboard, and what the network makes of the patches `grid`."""
    row = state.progress["metrics"][-1]
    speed = {"patches_per_second": row["patches_per_second"]}
    utils.log_scalars(writer, "train", speed, state.step)
    val = {"loss": row["val_loss"], "accuracy": row["val_accuracy"], "dice_score": row["val_dice"]}
    utils.log_scalars(writer, "val", val, state.step)
    images, references = (torch.stack(part) for part in zip(*grid, strict=True))
    with autocast:
        logits = state.ema.module(images.to(next(state.model.parameters()).device))
    predictions = logits[:, :1].float().sigmoid()
    utils.log_images(writer, images, predictions, (references != 0).float(), state.step)


def train_step(network, images, masks, loss_of, optimizer, scaler, autocast) -> torch.Tensor:
    """One step of the optimiser; the loss before it, a scalar that stays on the device."""
    with autocast:
        logits = network(images)
    loss = loss_of(logits.float(), masks)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_(network.parameters(), GRADIENT_NORM)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


@torch.inference_mode()
def validate(network, loader, device, autocast, processes, stop) -> tuple[float, torch.Tensor]:
    """Mean loss a patch and `utils.pixel_counts` over the validation patches of all processes.

    The loss is cross-entropy whatever --loss says, so that the curves of runs compare.
    """
    network.eval()
    loss = torch.zeros(2, dtype=torch.float64, device=device)  # sum and number of patches
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    meetings = len(loader.dataset) // processes // loader.batch_size  # batches that all have
    for batch, (images, masks, _) in enumerate(loader):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        masks = masks.to(device, non_blocking=True)
        with autocast:
            logits = network(images)[:, :1].float()
        batch_loss = binary_cross_entropy_with_logits(logits, (masks != 0).float())
        loss += torch.stack([batch_loss * len(masks), torch.tensor(len(masks), device=device)])
        counts += utils.pixel_counts(logits > 0, masks != 0)  # logit 0 is probability 0.5
        stop.check(meeting=batch < meetings)
    utils.add_up([loss, counts], processes)
    return (loss[0] / loss[1]).item(), counts.cpu()


# --- how to split touching nuclei ---------------------------------------------------------------


class Counted(NamedTuple):
    """A training image by which `choose_split` chooses."""

    path: Path
    pixel_size_um: float | None
    scale: float  # how many of its pixels make one of the network's
    count: int  # nuclei


def counted_images(roots: list[str], manifests: list[dict]) -> list[Counted]:
    """The training images that have a label map and are small enough for the memory, of each set
    MOST_COUNTED at most, spread over it. Raises InputError with all faults of the maps.
    """
    counted, faults = [], []
    for root, manifest in zip(roots, manifests, strict=True):
        wanted = [i for i in manifest["images"] if i["split"] == "train" and i["labels"]]
        for entry in spread(wanted, MOST_COUNTED):
            path, label_map = Path(root) / entry["image"], Path(root) / entry["labels"]
            if not (path.is_file() and label_map.is_file()):  # patches alone were brought here
                continue
            try:
                image = open_image(path)
                if image.is_big:
                    continue
                scale = scale_of(entry["pixel_size_um"], manifest["pixel_size_um"], path)
                mask = read_labels(label_map)
                if mask.foreground.shape != (image.height, image.width):
                    found = " x ".join(map(str, mask.foreground.shape))
                    raise InputError(
                        f"{label_map}: found labels of {found} pixels (height x width), expected "
                        f"{image.height} x {image.width} as in {path}; replace or remove it"
                    )
                if mask.labels is None:  # it was when the set was cut
                    raise InputError(f"{label_map}: found a mask, expected a label map, as before")
                labels = nuclei.reference_labels(mask.labels)
                counted.append(Counted(path, entry["pixel_size_um"], scale, int(labels.max())))
            except (InputError, OSError) as error:
                faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    return counted


def choose_split(best: Path, counted: list[Counted], device) -> str:
    """Put into best.pt the parameters of nuclei.Split with the smallest count error on the images
    of `counted_images`, and return a line that says which and why.

    Whatever fails, best.pt keeps the defaults: a training is not lost by it.
    """
    checkpoint = checkpoints.load_checkpoint(best)
    default = f"split {nuclei.Split(**checkpoint['split'])}, the default"
    if not counted:
        return f"{default} (no training image has a label map to choose on)"
    try:
        split, error = best_split(checkpoint, counted, device)
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        return f"{default} (it could not be chosen: {' '.join(str(error).split()):.300})"
    if math.isnan(error):
        return f"{default} (no label map of a training image has nuclei to choose on)"
    checkpoints.save_checkpoint(best, checkpoint | {"split": split._asdict()})
    return (
        f"split {split}, chosen on {len(counted)} training images with label maps, count error "
        f"{error:.1%}"
    )


def best_split(checkpoint: dict, counted: list[Counted], device) -> tuple[nuclei.Split, float]:
    """`nuclei.choose_split` on what the network finds in the images of `counted_images`."""
    model = checkpoints.build_model(checkpoint, "best.pt")
    predict = utils.predictor(model, checkpoint, device)
    settings = utils.prediction_settings(model, checkpoint)
    found, sizes = [], []
    for one in counted:
        image = open_image(one.path)
        outputs = predict_image(image, predict, scale=one.scale, **settings)
        image.close()
        found.append(segment(outputs, checkpoint["threshold"]))
        sizes.append(one.pixel_size_um or checkpoint["pixel_size_um"])
    instances = settings["outputs"] > 1
    default, depths = nuclei.default_split(instances), found if instances else None
    masks, counts = [segmented > 0 for segmented in found], [one.count for one in counted]
    return nuclei.choose_split(masks, counts, sizes, default, depths)


if __name__ == "__main__":
    run_script(main, parse_args)
