"""Train a network on the patches of preprocess.py.

    python3 train.py --gpu_id 0 --lr 2e-5 --dimensions 64
    python3 train.py --root ./data/demo/ --gpu_id -1 --dimensions 16 --epoch 4
    python3 train.py --augment strong --sampler balanced --loss bce
    python3 train.py --resume
    torchrun --nproc_per_node 4 -- train.py --batch_size 32
    tensorboard --logdir=.

Writes log/<YYYYmmddHHMMSS>[-<name>]/ with args.json, train.log, metrics.csv, tensorboard's events,
best.pt (highest validation Dice) and last.pt, from which --resume goes on.
"""

import argparse
import json
import os
import time
from itertools import islice
from pathlib import Path

# Threads that wait leave their core to other programs; it must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import utils
from model import NETWORKS
from tissue import nuclei
from tissue.files import Parser, check_positive, run_script
from tissue.masks import read_label_map
from tissue.pairs import label_folder
from tissue.patches import PatchDataset, PatchSampler, read_manifest, set_hash
from tissue.tiling import predict_image
from tissue.windows import open_image

LOG_EVERY = 50  # steps between points of the training curves; each makes the device wait once
SAVE_EVERY = 300  # seconds between writings of last.pt within a long epoch
GRID_PATCHES = 6  # rows of the image | prediction | reference grid
WARM_UP = 0.1  # fraction of all steps in which the learning rate rises
GRADIENT_NORM = 1.0  # longer gradients are shortened to this
EMA_EVERY = 4  # steps between updates of the averaged weights, each of which costs 3 % of a step
EMA_DECAY = 0.992  # an update, once they are warm: 0.998 a step, so about the last 500 steps
SHEET_PATCHES = 24  # of the contact sheet of augmented patches
LOSSES = {"bce": binary_cross_entropy_with_logits, "bce_dice": utils.bce_dice}
# what --resume cannot change
FIXED = ("arch", "dimensions", "loss", "colour", "augment", "sampler", "lr", "batch_size", "epoch")
FIXED += ("seed", "init", "pretrained")


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    files = parser.add_argument_group("files")
    files.add_argument("--root", default="./data/", help="folder with the patch set")
    files.add_argument("--log", default="./log", help="folder in which the run gets its own")
    files.add_argument("--name", default="", help="added to the name of the run's folder")
    files.add_argument(
        "--resume", nargs="?", const="newest", metavar="RUN", help="go on with a run (the newest)"
    )
    files.add_argument("--init", metavar="CKPT", help="checkpoint whose weights to start from")
    learning = parser.add_argument_group("network and learning")
    learning.add_argument(
        "--arch", choices=NETWORKS, default="unet",
        help="U-Net; U-Net with self-attention at its bottleneck; U-Net on a ResNet-34",
    )  # fmt: skip
    learning.add_argument(
        "--dimensions", type=int, default=64,
        help="channels of the first stage (of the last one, for resnet34)",
    )  # fmt: skip
    learning.add_argument(
        "--pretrained", nargs="?", const="imagenet", metavar="FILE",
        help="start resnet34 from torchvision's ImageNet weights, fetched or in a file",
    )  # fmt: skip
    learning.add_argument(
        "--loss", choices=LOSSES, default="bce_dice",
        help="cross-entropy alone, or with 1 - soft Dice added",
    )  # fmt: skip
    learning.add_argument(
        "--colour", choices=utils.COLOURS, default="one",
        help="one: bring all images to one colour first, in inference.py too; own: as they are",
    )  # fmt: skip
    learning.add_argument(
        "--augment", choices=("basic", "moderate", "strong"), default="basic",
        help="flips and lightness; moderate: also turns, sizes, stains, sharpness; strong: all of "
        "it more, and pale nuclei, colours, noise",
    )  # fmt: skip
    learning.add_argument(
        "--sampler", choices=("uniform", "balanced"), default="uniform",
        help="each patch once an epoch, or sparse and dense ones alike",
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
        args.resume = utils.find_run(args.log, args.resume)
        saved = json.loads((args.resume / "args.json").read_text())
        older = {"loss": "bce", "colour": "own"}  # an earlier version's run lacks newer flags
        saved = vars(args) | older | saved
        parser.set_defaults(**{key: saved[key] for key in vars(args) if key != "resume"})
        args = argparse.Namespace(**vars(parser.parse_args(argv)) | {"resume": args.resume})
        utils.check_same(args, saved, FIXED)
    return args


def main(args):
    check_positive(args, ("dimensions", "lr", "batch_size", "epoch"))
    device, rank, processes = utils.start_processes(args.gpu_id)
    precision = utils.choose_precision(device) if args.amp else torch.float32
    if args.resume:  # measured anew it might come out otherwise, and the run with it
        began = json.loads((args.resume / "args.json").read_text())
        if (began["device"], began["amp"]) == (str(device), args.amp):
            precision = getattr(torch, began["precision"])
    precision = utils.everyone(precision)[0]  # one choice for all processes
    torch.backends.cudnn.benchmark = True  # all patches have one size, so the search pays
    utils.seed_everything(args.seed)
    stop = utils.StopSignal()

    # --- data ---
    manifest = read_manifest(args.root)
    patch_set = set_hash(args.root)
    colour = utils.COLOURS[args.colour]
    train_set = PatchDataset(args.root, "train", utils.transform("train", args.augment), colour)
    val_set = PatchDataset(args.root, "val", utils.transform("val"), colour)
    batch_size = utils.share_of_batch(args.batch_size, len(train_set), processes)
    foreground = train_set.foreground if args.sampler == "balanced" else None
    sampler = PatchSampler(len(train_set), args.batch_size, args.seed, rank, processes, foreground)
    workers = utils.choose_workers(device) if args.workers is None else args.workers
    loading = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": utils.ignore_signals,
        "generator": torch.Generator(),  # else the loaders draw from the one that is saved
    }
    train_loader = DataLoader(train_set, batch_size, sampler=sampler, **loading)
    # Every process validates every n-th patch, none of them twice.
    val_loader = DataLoader(
        val_set, batch_size, sampler=range(rank, len(val_set), processes), **loading
    )
    batches = len(train_set) // args.batch_size  # an epoch
    grid = [val_set[len(val_set) * row // GRID_PATCHES] for row in range(GRID_PATCHES)]
    grid_images, grid_masks = (torch.stack([item[part] for item in grid]) for part in (0, 1))

    # --- model, optimiser, schedule ---
    model = NETWORKS[args.arch](args.dimensions).to(device, memory_format=torch.channels_last)
    if args.pretrained and not args.resume:
        utils.start_from_imagenet(model, args.pretrained)
    origin = utils.start_from(model, args.init) if args.init else None
    if processes > 1:
        utils.share_batch_norm(model)
    average = utils.warm_ema(EMA_DECAY, lambda: schedule.last_epoch // EMA_EVERY)
    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    ema.n_averaged = ema.n_averaged.cpu()  # it is looked at on each update
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    steps = args.epoch * batches + 1  # the rate after the last step counts as one, too
    schedule = OneCycleLR(optimizer, args.lr, steps, pct_start=WARM_UP, cycle_momentum=False)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    loss_of = LOSSES[args.loss]

    parts = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    parts["scaler"] = scaler

    # --- run folder, and where an interrupted run goes on ---
    progress = {"epoch": 1, "batch": 0, "losses": [], "epoch_loss": 0.0, "seconds": 0.0}
    progress |= {"best_dice": -1.0, "best_epoch": 0, "metrics": [], "finished": False}
    if args.resume:
        training = utils.load_training(args.resume / "last.pt", patch_set)
        progress = training["progress"]
        for name, part in parts.items():
            part.load_state_dict(training[name])
        torch.set_rng_state(training["random"])
    settings = {**vars(args), "resume": None, "device": str(device), "processes": processes}
    settings |= {
        "loader_processes": workers,
        "precision": str(precision).removeprefix("torch."),
        "versions": utils.versions(),
    }
    checkpoint = {  # what best.pt and last.pt say all through the run
        "format_version": utils.CHECKPOINT_VERSION,
        "config": model.config,
        "normalisation": {"mean": utils.IMAGENET_MEAN, "std": utils.IMAGENET_STD},
        "channel_order": "rgb",
        "colour": colour._asdict() if colour else None,
        "patch_dim": manifest["patch_dim"],
        "pixel_size_um": utils.typical_pixel_size(manifest),
        "threshold": 0.5,
        "args": settings,
        "versions": settings["versions"],
    }
    if rank == 0:
        run = args.resume or utils.make_run_folder(args.log, args.name)
        utils.write_json(run / "args.json", settings)
        utils.write_table(run / "metrics.csv", progress["metrics"])
        writer = SummaryWriter(run, purge_step=schedule.last_epoch + 1 if args.resume else None)
        utils.log_line(
            run,
            f"{run} | {args.arch} {args.dimensions} | {processes} x {device}, "
            f"{settings['precision']} | "
            f"{len(train_set)} training and {len(val_set)} validation patches"
            + (f" | goes on after step {schedule.last_epoch}" if args.resume else ""),
        )

        if origin and origin["colour"] != checkpoint["colour"]:
            others = "own" if args.colour == "one" else "one"
            utils.log_line(run, f"{args.init} learned with --colour {others}, this run does not")
        if not args.resume:
            sampler.epoch = progress["epoch"]
            utils.log_augmented(writer, [train_set[key] for key in islice(sampler, SHEET_PATCHES)])

    losses = [torch.tensor(loss, device=device) for loss in progress["losses"]]  # not yet logged
    seen = [()] * len(losses)  # the patches behind each of them
    started = time.monotonic() - progress["seconds"]

    def save_last():
        utils.check_finite(losses, seen, train_set.files)
        now = {"losses": [loss.item() for loss in losses], "seconds": time.monotonic() - started}
        training = {name: part.state_dict() for name, part in parts.items()}
        training |= {"progress": progress | now, "patch_set": patch_set}
        training["random"] = torch.get_rng_state()
        writer.flush()  # the curves reach at least as far as what is saved
        weights = {"model": ema.module.state_dict(), "training": training}
        utils.save_checkpoint(run / "last.pt", checkpoint | weights)

    # --- loop ---
    if args.compile:
        model.compile()
    network = DistributedDataParallel(model) if processes > 1 else model
    saved = time.monotonic()
    try:
        while not progress["finished"]:
            epoch = sampler.epoch = progress["epoch"]
            sampler.start = first = progress["batch"]
            epoch_started = time.monotonic()
            model.train()
            for images, masks, indices in tqdm(
                train_loader, f"epoch {epoch}", batches, initial=first,
                leave=False, disable=None if rank == 0 else True,
            ):  # fmt: skip
                images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
                masks = masks.to(device, non_blocking=True)
                losses.append(
                    train_step(network, images, masks, loss_of, optimizer, scaler, autocast)
                )
                schedule.step()
                if schedule.last_epoch % EMA_EVERY == 1:  # from the first step on
                    ema.update_parameters(model)
                seen.append(indices)
                progress["batch"] += 1
                log_point = progress["batch"] % LOG_EVERY == 0 or progress["batch"] == batches
                if log_point:
                    utils.check_finite(losses, seen, train_set.files)
                    mean_loss = torch.stack(losses).mean() / processes
                    utils.add_up([mean_loss], processes)
                    loss = mean_loss.item()  # here the device is waited for
                    progress["epoch_loss"] += loss * len(losses) / batches
                    losses, seen = [], []
                    if rank == 0:
                        point = {"loss": loss, "learning_rate": schedule.get_last_lr()[0]}
                        utils.log_scalars(writer, "train", point, schedule.last_epoch)
                        if time.monotonic() - saved > SAVE_EVERY:
                            save_last()
                            saved = time.monotonic()
                stop.check(processes, log_point)
            seconds = time.monotonic() - epoch_started
            speed = (progress["batch"] - first) * args.batch_size / seconds

            val_loss, counts = validate(ema.module, val_loader, device, autocast, processes, stop)
            dice = utils.dice(counts)
            is_best = dice > progress["best_dice"]
            if is_best:
                progress |= {"best_dice": dice, "best_epoch": epoch}
            waited = epoch - progress["best_epoch"]
            row = {
                "epoch": epoch,
                "train_loss": progress["epoch_loss"],
                "val_loss": val_loss,
                "val_accuracy": utils.accuracy(counts),
                "val_dice": dice,
                "learning_rate": schedule.get_last_lr()[0],
                "patches_per_second": speed,
                "seconds": time.monotonic() - started,
            }
            progress["metrics"].append(row)
            progress |= {"epoch": epoch + 1, "batch": 0, "epoch_loss": 0.0}
            progress["finished"] = epoch == args.epoch or 0 < args.patience <= waited
            if rank == 0:
                step = schedule.last_epoch
                utils.log_scalars(writer, "train", {"patches_per_second": speed}, step)
                val = {"loss": val_loss, "accuracy": row["val_accuracy"], "dice_score": dice}
                utils.log_scalars(writer, "val", val, step)
                with torch.inference_mode(), autocast:
                    logits = ema.module(grid_images.to(device))
                utils.log_images(writer, grid_images, logits.float().sigmoid(), grid_masks, step)
                checkpoint |= {"epoch": epoch, "best_dice": progress["best_dice"]}
                if is_best:
                    best = {"model": ema.module.state_dict()}
                    utils.save_checkpoint(run / "best.pt", checkpoint | best)
                save_last()
                utils.write_table(run / "metrics.csv", progress["metrics"])
                utils.log_line(run, utils.epoch_line(row, args.epoch, progress["best_dice"]))
    except utils.Stopped as stopped:
        if rank == 0:
            save_last()
            utils.log_line(run, f"stopped by {stopped.name}; go on with: train.py --resume {run}")
        raise
    except (RuntimeError, ConnectionError, EOFError) as error:
        utils.explain_killed_loader(error)
        raise
    finally:
        utils.end_processes()

    # --- how to split touching nuclei, and clean up ---
    if rank == 0:
        best = utils.load_checkpoint(run / "best.pt")
        best["split"], found = choose_split(args.root, manifest, best, device)
        utils.save_checkpoint(run / "best.pt", best)
        utils.log_line(run, found)
        utils.log_hyperparameters(writer, settings, progress)
        writer.close()
        utils.log_line(run, f"best validation Dice {progress['best_dice']:.4f}: {run / 'best.pt'}")


def choose_split(root, manifest, checkpoint, device) -> tuple[dict, str]:
    """Parameters of nuclei.Split with the smallest count error on the training images that have a
    label map, the defaults where none has, and a line that says which and why.
    """
    label_maps = label_folder(root)
    model = utils.build_model(checkpoint, "best.pt")
    predict = utils.predictor(model, checkpoint, device)
    settings = utils.prediction_settings(model, checkpoint)
    masks, counts, sizes = [], [], []
    for entry in manifest["images"]:
        path = Path(root) / entry["image"]
        if entry["split"] != "train" or entry["name"] not in label_maps or not path.is_file():
            continue
        image = open_image(path)
        if image.is_big:
            continue
        labels = read_label_map(label_maps[entry["name"]])
        masks.append(predict_image(image, predict, **settings) >= checkpoint["threshold"])
        counts.append(0 if labels is None else int(nuclei.reference_labels(labels).max()))
        sizes.append(entry["pixel_size_um"])
    split, error = nuclei.choose_split(masks, counts, sizes)
    if not masks:
        return split._asdict(), f"split {split} (no training image has a label map to choose on)"
    found = f"on {len(masks)} training images with label maps, count error {error:.1%}"
    return split._asdict(), f"split {split}, chosen {found}"


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
    for images, masks, _ in loader:
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        masks = masks.to(device, non_blocking=True)
        with autocast:
            logits = network(images).float()
        batch_loss = binary_cross_entropy_with_logits(logits, masks)
        loss += torch.stack([batch_loss * len(masks), torch.tensor(len(masks), device=device)])
        counts += utils.pixel_counts(logits > 0, masks > 0)  # logit 0 is probability 0.5
        stop.check(processes, False)
    utils.add_up([loss, counts], processes)
    return (loss[0] / loss[1]).item(), counts.cpu()


if __name__ == "__main__":
    run_script(main, parse_args)
