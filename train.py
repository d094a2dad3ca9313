"""Train a U-Net on the patches of preprocess.py.

    python3 train.py --gpu_id 0 --lr 2e-5 --dimensions 64
    python3 train.py --root ./data/demo/ --gpu_id -1 --dimensions 16 --epoch 4
    tensorboard --logdir=.

Writes log/<YYYYmmddHHMMSS>[-<name>]/ with args.json, train.log, metrics.csv, tensorboard's events,
best.pt (highest validation Dice) and last.pt.
"""

import argparse
import csv
import json
import time

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import utils
from model import UNet
from tissue.files import InputError, replacing
from tissue.patches import PatchDataset, PatchSampler, read_manifest

LOG_EVERY = 50  # steps between points of the training curves; each makes the device wait once
GRID_PATCHES = 6  # rows of the image | prediction | reference grid
WARM_UP = 0.1  # fraction of all steps in which the learning rate rises
GRADIENT_NORM = 1.0  # longer gradients are shortened to this
EMA_DECAY = 0.998  # a step of the averaged weights, once it is warm: about the last 500 steps


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    files = parser.add_argument_group("files")
    files.add_argument("--root", default="./data/", help="folder with the patch set")
    files.add_argument("--log", default="./log", help="folder in which the run gets its own")
    files.add_argument("--name", default="", help="added to the name of the run's folder")
    learning = parser.add_argument_group("network and learning")
    learning.add_argument("--dimensions", type=int, default=64, help="channels of the first stage")
    learning.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    learning.add_argument("--batch_size", type=int, default=8, help="patches a step")
    learning.add_argument("--epoch", type=int, default=50, help="passes over the training patches")
    learning.add_argument(
        "--seed", type=int, default=0, help="seed of weights, order, augmentation"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpu_id", type=int, default=0, help="number of the GPU; -1: the CPU")
    machine.add_argument("--workers", type=int, default=2, help="processes that read patches")
    return parser.parse_args(argv)


def main(args):
    for flag in ("dimensions", "lr", "batch_size", "epoch"):
        if getattr(args, flag) <= 0:
            raise InputError(f"--{flag}: found {getattr(args, flag)}, expected more than 0")
    device = utils.choose_device(args.gpu_id)
    precision = utils.choose_precision(device)
    utils.seed_everything(args.seed)

    # --- data ---
    manifest = read_manifest(args.root)
    train_set = PatchDataset(args.root, "train", utils.transform("train"))
    val_set = PatchDataset(args.root, "val", utils.transform("val"))
    if args.batch_size > len(train_set):
        raise InputError(
            f"--batch_size: found {args.batch_size}, expected at most the {len(train_set)} "
            f"training patches of {args.root}"
        )
    sampler = PatchSampler(len(train_set), args.batch_size, args.seed)
    loading = {
        "num_workers": args.workers,
        "persistent_workers": args.workers > 0,
        "pin_memory": device.type == "cuda",
    }
    train_loader = DataLoader(train_set, args.batch_size, sampler=sampler, **loading)
    val_loader = DataLoader(val_set, args.batch_size, **loading)
    grid = [val_set[len(val_set) * row // GRID_PATCHES] for row in range(GRID_PATCHES)]
    grid_images, grid_masks = (torch.stack([item[part] for item in grid]) for part in (0, 1))

    # --- model, optimiser, schedule ---
    model = UNet(args.dimensions).to(device, memory_format=torch.channels_last)
    ema = AveragedModel(model, multi_avg_fn=utils.warm_ema(EMA_DECAY), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    steps = args.epoch * len(train_loader)
    schedule = OneCycleLR(optimizer, args.lr, steps, pct_start=WARM_UP, cycle_momentum=False)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)

    # --- run folder ---
    run = utils.make_run_folder(args.log, args.name)
    settings = {**vars(args), "device": str(device), "precision": str(precision)[6:]}
    settings["versions"] = utils.versions()
    (run / "args.json").write_text(json.dumps(settings, indent=1) + "\n")
    log = run / "train.log"
    writer = SummaryWriter(run)
    utils.log_line(
        log,
        f"{run} | U-Net {args.dimensions} | {device}, {settings['precision']} | "
        f"{len(train_set)} training and {len(val_set)} validation patches",
    )
    checkpoint = {  # what best.pt and last.pt share over the whole run
        "format_version": utils.CHECKPOINT_VERSION,
        "config": model.config,
        "normalisation": {"mean": utils.IMAGENET_MEAN, "std": utils.IMAGENET_STD},
        "channel_order": "rgb",
        "patch_dim": manifest["patch_dim"],
        "pixel_size_um": utils.typical_pixel_size(manifest),
        "threshold": 0.5,
        "args": vars(args),
        "versions": settings["versions"],
    }

    # --- loop ---
    best_dice, metrics, started = -1.0, [], time.monotonic()
    for epoch in range(1, args.epoch + 1):
        sampler.epoch = epoch
        model.train()
        epoch_started = time.monotonic()
        losses, epoch_loss = [], 0.0
        progress = tqdm(train_loader, f"epoch {epoch}", leave=False, disable=None)
        for batch, (images, masks, _) in enumerate(progress, start=1):
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            masks = masks.to(device, non_blocking=True)
            with autocast:
                logits = model(images)
            loss = binary_cross_entropy_with_logits(logits.float(), masks)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            ema.update_parameters(model)

            losses.append(loss.detach())
            if batch % LOG_EVERY == 0 or batch == len(train_loader):
                interval = torch.stack(losses).sum().item()
                epoch_loss += interval
                step = schedule.last_epoch
                learning_rate = schedule.get_last_lr()[0]
                point = {"loss": interval / len(losses), "learning_rate": learning_rate}
                utils.log_scalars(writer, "train", point, step)
                losses = []
        epoch_loss /= len(train_loader)
        speed = len(train_loader) * args.batch_size / (time.monotonic() - epoch_started)

        network = ema.module
        val_loss, counts = validate(network, val_loader, device, autocast)
        val = {
            "loss": val_loss,
            "accuracy": utils.accuracy(counts),
            "dice_score": utils.dice(counts),
        }
        step = schedule.last_epoch
        learning_rate = schedule.get_last_lr()[0]
        utils.log_scalars(writer, "train", {"patches_per_second": speed}, step)
        utils.log_scalars(writer, "val", val, step)
        with torch.inference_mode(), autocast:
            grid_logits = network(grid_images.to(device, memory_format=torch.channels_last))
        utils.log_images(writer, grid_images, grid_logits.float().sigmoid(), grid_masks, step)

        is_best = val["dice_score"] > best_dice
        best_dice = max(best_dice, val["dice_score"])
        checkpoint |= {"model": network.state_dict(), "epoch": epoch, "best_dice": best_dice}
        utils.save_checkpoint(run / "last.pt", checkpoint)
        if is_best:
            utils.save_checkpoint(run / "best.pt", checkpoint)
        metrics.append(
            {
                "epoch": epoch,
                "train_loss": f"{epoch_loss:.5f}",
                "val_loss": f"{val_loss:.5f}",
                "val_accuracy": f"{val['accuracy']:.5f}",
                "val_dice": f"{val['dice_score']:.5f}",
                "learning_rate": f"{learning_rate:.3e}",
                "patches_per_second": f"{speed:.1f}",
                "seconds": f"{time.monotonic() - started:.1f}",
            }
        )
        with replacing(run / "metrics.csv") as path, path.open("w", newline="") as file:
            table = csv.DictWriter(file, metrics[0])
            table.writeheader()
            table.writerows(metrics)
        left = (time.monotonic() - started) / epoch * (args.epoch - epoch)
        utils.log_line(
            log,
            f"epoch {epoch}/{args.epoch} | loss {epoch_loss:.4f} | val loss {val_loss:.4f} | "
            f"val dice {val['dice_score']:.4f} (best {best_dice:.4f}) | lr {learning_rate:.1e} | "
            f"{speed:.0f} patches/s | left {utils.duration(left)}",
        )

    # --- clean up ---
    writer.close()
    utils.log_line(log, f"best validation Dice {best_dice:.4f}: {run / 'best.pt'}")


@torch.inference_mode()
def validate(network, loader, device, autocast) -> tuple[float, torch.Tensor]:
    """Mean loss a patch and `utils.pixel_counts` over all validation patches."""
    network.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    for images, masks, _ in loader:
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        masks = masks.to(device, non_blocking=True)
        with autocast:
            logits = network(images).float()
        loss += (
            binary_cross_entropy_with_logits(logits, masks, reduction="none").mean((1, 2, 3)).sum()
        )
        counts += utils.pixel_counts(logits > 0, masks > 0)  # logit 0 is probability 0.5
    return (loss / len(loader.dataset)).item(), counts.cpu()


if __name__ == "__main__":
    utils.run_script(main, parse_args())
