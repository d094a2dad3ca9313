"""Train a network on the patches of preprocess.py.

    python3 train.py --root ./data/demo/ --gpu_id -1 --dimensions 16 --epoch 4
    python3 train.py --init log/ckpt/nuclei.pt
    python3 train.py --gpu_id 0 --lr 2e-5 --dimensions 64      (as the first version was called)
    python3 train.py --root data/one data/other --sampler balanced --augment moderate
    python3 train.py --resume
    torchrun --nproc_per_node 4 -- train.py --batch_size 32
    tensorboard --logdir=.

Writes log/<YYYYmmddHHMMSS>[-<name>]/ with args.json, train.log, metrics.csv, tensorboard's events,
best.pt (highest validation Dice) and last.pt, from which --resume goes on.
"""

if __name__ == "__main__":  # Ctrl-C while all else is imported
    from tissue import ending

    ending.end_at_once()

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from learning import pretrained, runs
from learning.devices import Threads
from learning.loading import Sets, make_loaders, number_images
from learning.losses import LOSSES, total_loss
from learning.optimisation import check_finite, keep_statistics
from learning.processes import Machine, add_up
from learning.run_log import RunLog, describe
from learning.signals import Stopped, StopSignal, end_processes, explain
from learning.splitting import Images
from learning.start import (
    check_patches,
    choose_network,
    find_machine,
    make_network,
    said_of_origin,
    settle_learning,
)
from learning.state import State, began_with, make_state
from model import config_of, sees_all
from tissue.depth import NOT_ANNOTATED
from tissue.files import InputError, Parser, locked, run_script
from tissue.manifest import MANIFEST
from tissue.pairs import set_folders
from tissue.stain import STAINS
from tissue.unused import uncut

LOG_EVERY = 50  # steps between points of the training curves; each makes the device wait once
GRID_PATCHES = 6  # rows of the image | prediction | reference grid
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
GRADIENT_NORM = 1.0  # longer gradients are shortened to this


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_files(parser.add_argument_group("files"))
    learning = parser.add_argument_group("network and learning")
    add_network(learning)
    add_learning(learning)
    add_machine(parser.add_argument_group("machine"))
    return runs.read_flags(parser, argv)


def add_files(group) -> None:
    group.add_argument("--root", nargs="+", default="./data/", help="folders with a patch set each")
    group.add_argument("--log", default="./log", help="folder in which the run gets its own")
    group.add_argument("--name", default="", help="added to the name of the run's folder")
    group.add_argument(
        "--resume", nargs="?", const="newest", metavar="RUN", help="go on with a run (the newest)"
    )
    group.add_argument("--init", metavar="CKPT", help="checkpoint to fine-tune")
    group.add_argument(
        "--keep", type=float,
        help="share of the old weights in the new ones, without it 0.5; 0: nothing of them is kept",
    )  # fmt: skip
    group.add_argument(
        "--replay", nargs="+", default=[], metavar="ROOT",
        help="folders with patch sets that make half of each batch, so that --init forgets less",
    )  # fmt: skip


def add_network(group) -> None:
    group.add_argument(
        "--arch", metavar="NAME",
        help="unet, or timm's name of an encoder; without it unet, or that of --init",
    )  # fmt: skip
    group.add_argument(
        "--dimensions", type=int,
        help="channels at full resolution; without it 64, with an encoder 16, or those of --init",
    )  # fmt: skip
    group.add_argument(
        "--pretrained", nargs="?", const=pretrained.FETCHED, metavar="FILE",
        help="ImageNet's weights for the encoder, fetched by timm or in a file",
    )  # fmt: skip


def add_learning(group) -> None:
    group.add_argument(
        "--loss", choices=LOSSES, default="bce_dice",
        help="cross-entropy alone, or with 1 - soft Dice added",
    )  # fmt: skip
    group.add_argument(
        "--stain", choices=STAINS,
        help="reinhard: bring the tissue of all images to one mean and spread of colour first, in "
        "inference.py too; without it reinhard for unet, none with an encoder, or that of --init",
    )  # fmt: skip
    group.add_argument(
        "--augment", choices=("basic", "moderate", "strong"),
        help="flips and lightness; moderate: also turns, sizes, stains, sharpness; strong: all of "
        "it more, and pale nuclei, colours, noise; without it basic, with --init moderate",
    )  # fmt: skip
    group.add_argument(
        "--sampler", choices=("uniform", "balanced"), default="uniform",
        help="each patch once an epoch; or sparse and dense ones alike, and small sets more often",
    )  # fmt: skip
    group.add_argument("--lr", type=float, help="highest rate; without it 1e-3, with --init 1e-4")
    group.add_argument(
        "--batch_size", type=int, default=8, help="patches a step, over all processes together"
    )
    group.add_argument(
        "--epoch", type=int,
        help="passes over the training patches; without it 50, with --init as many as a short "
        "fine-tuning needs",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="seed of weights, order, augmentation")
    group.add_argument(
        "--patience", type=int, default=0, help="end after N epochs of no better Dice; 0: never",
    )  # fmt: skip


def add_machine(group) -> None:
    group.add_argument("--gpu_id", type=int, default=0, help="number of the GPU; -1: the CPU")
    group.add_argument(
        "--workers", type=int, help="processes that read patches; without it as many as pay"
    )
    group.add_argument(
        "--precision", dest="asked_precision", default="auto", choices=PRECISIONS,
        help="number format of the network; auto: bfloat16 or float16 where that is fast",
    )  # fmt: skip
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile: costs time at the start, then saves some on each step",
    )  # fmt: skip


def main(args):
    runs.check_flags(args)
    stop = StopSignal()
    with ExitStack() as until_the_end:
        until_the_end.callback(end_processes)
        try:
            learn(args, stop, until_the_end)
        except RuntimeError as error:  # before the loop, as of a network too wide for the memory
            explain(error)
            raise


def learn(args, stop: StopSignal, until_the_end: ExitStack) -> None:
    """All of a training; what must be closed however it ends goes onto `until_the_end`."""
    machine = find_machine(args)
    print("".join(f"{line}\n" for line in uncut(args.root) if machine.is_first), end="")
    args.root, args.replay = (set_folders(r, MANIFEST) for r in (args.root, args.replay))
    torch.backends.cudnn.benchmark = True  # all patches have one size, so the search pays

    # --- patches and network, looked at before anything is written ---
    origin = None if args.resume else choose_network(args)
    sets = Sets.of(args.root, args.replay, begins=not args.resume)
    settle_learning(args, sets.patches)
    config = config_of(args.arch, args.dimensions, sets.have_label_maps)
    check_patches(args, config, sets.patch_dim)
    run = Run(args, machine, sets, make_loaders(args, machine), stop)
    model = make_network(args, config, origin, machine)

    # --- where an interrupted run goes on, and the folder of a new one ---
    folder, training, counted = args.resume, None, None
    if folder and machine.is_first:
        until_the_end.enter_context(locked(folder, "trains"))
    if folder:
        training = runs.load_training(folder, sets.hash, args, model, run.batches)
    first = began_with(model, args.keep, origin, training)
    if machine.is_first:
        counted = Images.of(args.root, sets.own, config, first)
    # Until the loop is done, a signal waits for where last.pt can be written.
    stop.hold(machine.processes)
    if machine.is_first and not folder:
        folder = runs.make_run_folder(args.log, args.name)
        until_the_end.enter_context(locked(folder, "trains"))
    state = make_state(model, args, run.batches, machine.precision, training, first)
    if machine.is_first:
        learned = (training or origin or {}).get("learned", ())
        run.log = open_log(folder, run, state, origin, learned)

    # --- loop ---
    if args.compile:
        model.compile()
    network = DistributedDataParallel(model) if machine.processes > 1 else model
    try:
        learn_epochs(run, state, network)
        end_processes()
        stop.release()
        if run.log:
            for line in counted.settle_counts(folder / "best.pt", machine.device):
                run.log.line(line)
            run.log.finish(state, run.images)
    except Stopped as stopped:
        if run.log:
            sets.check()
            run.log.save_last(state)
            run.log.line(f"stopped by {stopped.name}; go on with: train.py --resume {folder}")
        raise
    except (InputError, RuntimeError, OSError, EOFError) as error:
        end_processes()  # first: of one killed, torch would tell again while the run is closed
        sets.check()
        explain(error)
        raise


# --- what a training needs ----------------------------------------------------------------------


class Run:
    """What stays as it is while a network learns; `State` is what changes."""

    def __init__(self, args, machine: Machine, sets: Sets, loaders: tuple, stop: StopSignal):
        self.args, self.machine, self.sets, self.stop = args, machine, sets, stop
        self.train_loader, self.val_loader = loaders
        self.batches = self.train_loader.sampler.count // args.batch_size  # an epoch
        self.threads = Threads(machine.device)
        self.log: RunLog | None = None  # of the first process alone
        val_set = self.val_loader.dataset
        self.image_of, self.images = number_images(val_set)
        self.grid = [val_set[len(val_set) * row // GRID_PATCHES][:2] for row in range(GRID_PATCHES)]


def open_log(
    folder: Path, run: Run, state: State, origin: dict | None, learned: Sequence[str]
) -> RunLog:
    """The run's folder, with its settings, first lines and contact sheet written; `origin` is the
    checkpoint of --init, `learned` as `describe` has it.
    """
    args, machine, train_set = run.args, run.machine, run.train_loader.dataset
    settings = {**vars(args), "resume": None, "device": str(machine.device)}
    settings |= {
        "processes": machine.processes,
        "loader_processes": run.train_loader.num_workers,
        "precision": str(machine.precision).removeprefix("torch."),
        "versions": utils.versions(),
    }
    checkpoint = describe(state.model.config, run.sets.manifests, settings, state.origin, learned)
    log = RunLog(folder, checkpoint, run.sets.hash, train_set.files, state)
    log.line(
        f"{folder} | {args.arch} {args.dimensions} | {machine.processes} x {machine.device}, "
        f"{settings['precision']} | {len(train_set)} training and "
        f"{len(run.val_loader.dataset)} validation patches of {', '.join(args.root)}"
        + (f" | goes on after step {state.step}" if args.resume else "")
    )
    if sees_all(state.model):
        log.line(f"{args.arch} sees all of an image: tiles will not be exact")
    for line in [*run.sets.notes, *said_of_origin(args, origin, checkpoint, run.sets.own)]:
        log.line(line)
    if not args.resume:
        run.train_loader.sampler.epoch = state.progress.epoch
        log.show_augmented(run.train_loader)
    return log


# --- the loop -----------------------------------------------------------------------------------


def learn_epochs(run: Run, state: State, network: nn.Module) -> None:
    """Learn, validate and write, an epoch at a time, until all are done or none is better.

    `network` is the state's model, wrapped where several processes share each batch.
    """
    args, log = run.args, run.log
    if state.origin and not state.progress.before:
        kept = state.make_kept()
        _, counts = validate(kept, run.val_loader, run.machine, run.stop, run.image_of)
        state.begin(counts)
        if log:
            log.save_best(state, kept)
    while not state.progress.is_over(args.epoch, args.patience):
        train_one_epoch(run, state, network)
        run.sets.check()
        run.stop.soon()
        kept = state.make_kept()
        scores = validate(kept, run.val_loader, run.machine, run.stop, run.image_of)
        is_best = state.end_epoch(*scores, args.batch_size)
        if log:
            log.show_epoch(state, kept, run.grid, run.machine.autocast)
            log.end_epoch(state, kept, is_best)


def train_one_epoch(run: Run, state: State, network: nn.Module) -> None:
    """Learn from the batches that are left of an epoch."""
    machine, progress, sampler = run.machine, state.progress, run.train_loader.sampler
    sampler.epoch, sampler.start = progress.epoch, progress.batch
    bar = tqdm(
        run.train_loader, f"epoch {progress.epoch}", run.batches, initial=progress.batch,
        leave=False, disable=None if machine.is_first else True,
    )  # fmt: skip
    loss_of = partial(total_loss, LOSSES[run.args.loss])
    run.stop.soon()
    started = time.monotonic() - progress.timed_seconds
    state.model.train()
    if state.keep:
        keep_statistics(state.model)
    for images, masks, indices in bar:
        images = images.to(machine.device, non_blocking=True, memory_format=torch.channels_last)
        masks = masks.to(machine.device, non_blocking=True)
        loss = train_step(state, network, images, masks, loss_of, machine.autocast)
        state.after_step(loss, indices)
        progress.timed_seconds = time.monotonic() - started
        run.threads.adapt()
        if progress.batch % LOG_EVERY == 0 or progress.batch == run.batches:
            show_losses(run, state)
        run.stop.check()


def train_step(state: State, network, images, masks, loss_of, autocast) -> torch.Tensor:
    """One step of the optimiser; the loss before it, a scalar that stays on the device.

    `images` (N, 3, H, W) and `masks` (N, 1, H, W) are float32, `loss_of` takes logits and masks.
    """
    with autocast:
        logits = network(images)
    loss = loss_of(logits.float(), masks)
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    state.scaler.unscale_(state.optimizer)
    clip_grad_norm_(network.parameters(), GRADIENT_NORM)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return loss.detach()


def show_losses(run: Run, state: State) -> None:
    """Put the mean loss since the last call into the curves, and write last.pt if it is old."""
    check_finite(state.losses, state.seen, run.train_loader.dataset.files)
    loss = state.end_losses(run.batches, run.machine.processes)
    if run.log:
        run.log.point(state, loss)
        if run.log.is_due():
            run.sets.check()
            run.log.save_last(state)


@torch.inference_mode()
def validate(
    network: nn.Module, loader: DataLoader, machine: Machine, stop: StopSignal, image_of: Tensor
) -> tuple[float, Tensor]:
    """Mean loss a validation patch and `utils.pixel_counts` of each image, (images, 4), over all
    processes, of annotated pixels alone; `image_of` has the number of the image of each patch.

    The loss is cross-entropy whatever --loss says, so that the curves of runs compare.
    """
    network.eval()
    device, processes = machine.device, machine.processes
    loss = torch.zeros(2, dtype=torch.float64, device=device)  # sum; patches, as annotated
    counts = torch.zeros((int(image_of.max()) + 1, 4), dtype=torch.int64, device=device)
    meetings = len(loader.dataset) // processes // loader.batch_size  # batches that all have
    for batch, (images, masks, indices) in enumerate(loader):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        masks = masks.to(device, non_blocking=True)
        with machine.autocast:
            logits = network(images)[:, :1].float()
        known = masks != NOT_ANNOTATED
        weight = known.float()
        batch_loss = binary_cross_entropy_with_logits(logits, (masks != 0).float(), weight)
        loss += torch.stack([batch_loss, weight.mean()]) * len(masks)
        found = zip(logits > 0, masks != 0, known, strict=True)  # logit 0 is probability 0.5
        of_patches = torch.stack([utils.pixel_counts(*each) for each in found])
        counts.index_add_(0, image_of[indices].to(device), of_patches)
        stop.check(meeting=batch < meetings)
    add_up([loss, counts], processes)
    return (loss[0] / loss[1]).item(), counts.cpu()


if __name__ == "__main__":
    run_script(main, parse_args)
