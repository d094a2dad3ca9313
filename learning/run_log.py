"""A run's folder as its training writes it: settings, lines, curves, best.pt and last.pt."""

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import utils
from learning.checkpoints import CHECKPOINT_VERSION, save_checkpoint
from learning.learned import learned_images
from learning.optimisation import check_finite
from learning.state import State
from model import IMAGENET_MEAN, IMAGENET_STD
from tissue import agreement, nuclei
from tissue.files import write_table
from tissue.stain import STAINS

SHEET_PATCHES = 24  # of the contact sheet of augmented patches
SAVE_EVERY = 300  # seconds between writings of last.pt within a long epoch


def describe(
    config: dict,
    manifests: list[dict],
    settings: dict,
    origin: dict | None = None,
    learned: Sequence[str] = (),
) -> dict:
    """What best.pt and last.pt say all through a run, beside weights and scores.

    `config` is the network's, `manifests` are those of the patch sets, `settings` what args.json
    has, `origin` what a fine-tuning began with, `learned` what the checkpoint of --init, or of
    a run that goes on, says of its images.
    """
    origin = origin or {}
    known = {
        key: next((m[key] for m in manifests if m[key]), None) for key in ("pixel_size_um", "bits")
    }
    stain = STAINS[settings["stain"]]
    return {
        "format_version": CHECKPOINT_VERSION,
        "config": config,
        "normalisation": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        "channel_order": "rgb",
        "stain": stain._asdict() if stain else None,
        "patch_dim": manifests[0]["patch_dim"],
        **known,
        "threshold": origin.get("threshold", 0.5),
        "split": origin.get("split") or nuclei.default_split("instances" in config)._asdict(),
        "learned": learned_images(manifests, learned),
        "args": settings,
        "versions": settings["versions"],
    }


class RunLog:
    """Writes a run's folder; of several processes the first alone has one.

    `checkpoint` is as `describe` has it, `patch_set` the `patches.set_hash` of the sets that the
    run learns from, `files` their training patches. args.json and metrics.csv are written at once.
    """

    def __init__(self, run: Path, checkpoint: dict, patch_set: str, files: list[str], state: State):
        self.run, self.checkpoint = run, checkpoint
        self.patch_set, self.files = patch_set, files
        utils.write_json(run / "args.json", checkpoint["args"])
        self.write_metrics(state)
        # What a killed run wrote of steps that are done again is taken out.
        self.writer = SummaryWriter(run, purge_step=state.step + 1 if state.step else None)
        self.saved = time.monotonic()

    def line(self, text: str) -> None:
        """Print a line and add it to train.log."""
        utils.log_line(self.run, text)

    def show_augmented(self, loader: DataLoader) -> None:
        """Put the first patches of an epoch, as a `loader` feeds them, into tensorboard."""
        sheet = [loader.dataset[key] for key in islice(loader.sampler, SHEET_PATCHES)]
        utils.log_augmented(self.writer, sheet)

    def write_metrics(self, state: State) -> None:
        """Write metrics.csv, a row an epoch."""
        utils.write_table(self.run / "metrics.csv", state.progress.metrics)

    def is_due(self) -> bool:
        """Whether last.pt is SAVE_EVERY seconds old."""
        return time.monotonic() - self.saved > SAVE_EVERY

    def save_last(self, state: State, kept: nn.Module | None = None) -> None:
        """Write last.pt, from which --resume goes on; waits for the device.

        `kept` is `state.make_kept`, where it is there already. Raises InputError as `check_finite`,
        and last.pt is then as it was before.
        """
        check_finite(state.losses, state.seen, self.files)
        training = state.to_save(self.patch_set)
        self.writer.flush()  # the curves reach at least as far as what is saved
        kept = kept or state.make_kept()
        weights = {"model": kept.state_dict(), "training": training}
        save_checkpoint(self.run / "last.pt", self.checkpoint | weights)
        self.saved = time.monotonic()

    def point(self, state: State, loss: float) -> None:
        """Put a point of the training curves into tensorboard."""
        point = {"loss": loss, "learning_rate": state.rate}
        utils.log_scalars(self.writer, "train", point, state.step)

    def end_epoch(self, state: State, kept: nn.Module, is_best: bool) -> None:
        """Write what an epoch's end brings: best.pt if it `is_best`, last.pt, metrics.csv, a line.
        `kept` is `state.make_kept`.

        A run that is killed within goes on from the last.pt before: the epoch's best.pt is written
        again, and metrics.csv from what last.pt has.
        """
        row, best_dice = state.progress.metrics[-1], state.progress.best_dice
        self.checkpoint |= {"epoch": row["epoch"], "best_dice": best_dice}
        if is_best:
            self.save_best(state, kept)
        self.save_last(state, kept)
        self.write_metrics(state)
        epochs = self.checkpoint["args"]["epoch"]
        self.line(utils.epoch_line(row, epochs, best_dice))

    def save_best(self, state: State, kept: nn.Module) -> None:
        """Write best.pt, with the epoch and the Dice that the progress has as the best; `kept` is
        `state.make_kept`.
        """
        progress = state.progress
        best = {"epoch": progress.best_epoch, "best_dice": progress.best_dice}
        best |= {"model": kept.state_dict()}
        save_checkpoint(self.run / "best.pt", self.checkpoint | best)

    @torch.inference_mode()
    def show_epoch(self, state: State, kept: nn.Module, grid: list, autocast) -> None:
        """Put an epoch's scores into tensorboard, and what `kept`, which is `state.make_kept`,
        makes of the patches `grid`.

        `grid` has pairs of an image (3, H, W) and its mask (1, H, W), float32.
        """
        row = state.progress.metrics[-1]
        speed = {"patches_per_second": row["patches_per_second"]}
        utils.log_scalars(self.writer, "train", speed, state.step)
        val = {"loss": row["val_loss"], "accuracy": row["val_accuracy"]}
        val |= {"dice_score": row["val_dice"]}
        utils.log_scalars(self.writer, "val", val, state.step)
        images, references = (torch.stack(part) for part in zip(*grid, strict=True))
        with autocast:
            logits = kept(images.to(next(kept.parameters()).device))
        predictions = logits[:, :1].float().sigmoid()
        references = utils.with_grey(references, (references != 0).float())
        utils.log_images(self.writer, images, predictions, references, state.step)

    def compare(self, state: State, images: list[str]) -> None:
        """Write before_after.csv of a fine-tuning, a row for each of the validation `images`, and
        say whether it is better than what it began with, and on how many of them.
        """
        progress, init = state.progress, self.checkpoint["args"]["init"]
        dices = [
            [agreement.dice(np.array(counts)) for counts in both]
            for both in zip(progress.before, progress.after, strict=True)
        ]
        columns = ("image", "dice_before", "dice_after")
        texts = [
            (image, *(f"{d:.4f}" for d in both)) for image, both in zip(images, dices, strict=True)
        ]
        rows = [dict(zip(columns, row, strict=True)) for row in texts]
        write_table(self.run / "before_after.csv", columns, rows)
        width = max(map(len, images))
        for image, before, after in [("", "before", "after"), *texts]:
            self.line(f"{image:{width}} | {before:>6} | {after:>6}")
        if not progress.best_epoch:
            most = max(row["val_dice"] for row in progress.metrics)
            self.line(
                f"no epoch was better than {init} on the validation patches, and on more images "
                f"than worse (Dice {progress.best_dice:.4f} before, {most:.4f} at best after): "
                f"best.pt has the weights of {init}"
            )
            return
        before = agreement.dice(np.sum(progress.before, 0))
        better = sum(after > before for before, after in dices)
        self.line(
            f"Dice of the validation patches {before:.4f} before, {progress.best_dice:.4f} after; "
            f"better on {better} of {len(images)} images"
        )

    def finish(self, state: State, images: list[str]) -> None:
        """Write the end of a run: what a fine-tuning has brought to the validation `images`, and
        last.pt.
        """
        progress = state.progress
        if progress.before:
            self.compare(state, images)
        utils.log_hyperparameters(
            self.writer, self.checkpoint["args"], progress.metrics[-1], progress.best_dice
        )
        self.writer.close()
        progress.finished = True
        self.save_last(state)
        self.line(f"best validation Dice {progress.best_dice:.4f}: {self.run / 'best.pt'}")
        self.line(f"next: python3 inference.py --ckpt {self.run} --images FILES")
