"""All that changes while a network learns, which last.pt keeps, and how it changes."""

import copy
import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from learning.optimisation import one_cycle, warm_ema
from learning.processes import add_up
from tissue import agreement
from tissue.files import InputError

EMA_EVERY = 4  # steps between updates of the averaged weights, each of which costs 3 % of a step
# Adam moves a weight by the rate, whatever its gradient, and few weights make a logit: at the rate
# of the others logits are too small for hundreds of steps (docs/lab_notes.md).
HEAD_RATE = 10  # times the rate, of the last convolution of a network that begins at random
EMA_DECAY = 0.992  # an update, once they are warm: 0.998 a step, so about the last 500 steps


@dataclass
class Progress:
    """How far a run has come; runs.Progress says what of it a file may hold."""

    epoch: int = 1  # that is under way
    batch: int = 0  # steps of it that are done
    epoch_loss: float = 0.0  # what they add to the epoch's mean loss
    timed_steps: int = 0  # steps of this epoch, and the seconds that they took
    timed_seconds: float = 0.0
    seconds: float = 0.0  # of the whole run, when last.pt was written
    best_dice: float = -1.0
    best_epoch: int = 0
    metrics: list[dict] = field(default_factory=list)  # rows of metrics.csv
    finished: bool = False
    # Of each validation image its `agreement.pixel_counts`, with the weights that a fine-tuning
    # began with, and with the best ones; empty in other trainings.
    before: list[list[int]] = field(default_factory=list)
    after: list[list[int]] = field(default_factory=list)

    def is_over(self, epochs: int, patience: int) -> bool:
        """Whether all epochs are done, or too many in a row were no better."""
        waited = self.epoch - 1 - self.best_epoch
        return self.epoch > epochs or 0 < patience <= waited


@dataclass
class State:
    """All that changes while a network learns; last.pt keeps it."""

    model: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    progress: Progress
    losses: list[torch.Tensor]  # scalars of the steps that no curve shows yet, on the device
    seen: list[torch.Tensor | tuple]  # the patches behind each of them
    started: float  # on time.monotonic(), as if the run had never been interrupted
    origin: dict | None  # what a fine-tuning began with, as runs.Origin has it
    loss_scale: dict = field(default_factory=dict)  # of steps in float16 before, as `scaler` has it

    @property
    def step(self) -> int:
        """Steps that are done, of all epochs."""
        return self.schedule.last_epoch

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.schedule.get_last_lr()[0]

    @property
    def seconds(self) -> float:
        """What the run has taken, without its interruptions."""
        return time.monotonic() - self.started

    def make_kept(self) -> nn.Module:
        """The network that is validated and kept: with the averaged weights or, in fine-tuning, a
        new one between these and those that it began with (Wortsman et al. 2022, CVPR, "Robust
        fine-tuning of zero-shot models"). It is good until the next step.
        """
        if not self.keep:
            return self.ema.module
        network = copy.deepcopy(self.ema.module)
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                value.lerp_(self.origin["model"][key], self.keep)
        return network

    @property
    def keep(self) -> float:
        """The share of the weights that a fine-tuning began with in those that are kept."""
        return self.origin["keep"] if self.origin else 0.0

    def begin(self, counts: torch.Tensor) -> None:
        """Take the `counts` of the weights of --init, (images, 4), as what is to be surpassed."""
        self.progress.before = self.progress.after = counts.tolist()
        self.progress.best_dice = agreement.dice(counts.sum(0))

    def is_better(self, counts: torch.Tensor) -> bool:
        """Whether a fine-tuning is better than its beginning on more of the images than it is
        worse on, so that one of few does not decide; other trainings always are.
        """
        if not self.progress.before:
            return True
        pairs = zip(counts, torch.tensor(self.progress.before), strict=True)
        gains = [agreement.dice(after) - agreement.dice(before) for after, before in pairs]
        return sum(gain > 0 for gain in gains) > sum(gain < 0 for gain in gains)

    def after_step(self, loss: torch.Tensor, indices: torch.Tensor) -> None:
        """A step of the optimiser is done: the rate changes, the averaged weights follow."""
        self.schedule.step()
        if self.step % EMA_EVERY == 1:  # from the first step on
            self.ema.update_parameters(self.model)
        self.losses.append(loss)
        self.seen.append(indices)
        self.progress.batch += 1
        self.progress.timed_steps += 1

    def end_losses(self, batches: int, processes: int) -> float:
        """The mean loss of the steps since the last call, over all processes; waits for the device.

        `batches` are those of an epoch.
        """
        mean_loss = torch.stack(self.losses).mean() / processes
        add_up([mean_loss], processes)
        loss = mean_loss.item()
        self.progress.epoch_loss += loss * len(self.losses) / batches
        self.losses, self.seen = [], []
        return loss

    def end_epoch(self, val_loss: float, counts: torch.Tensor, batch_size: int) -> bool:
        """Take an epoch's scores into the progress, and return whether they are the best.

        `counts` are `utils.pixel_counts` of each validation image, (images, 4). Raises InputError
        for a loss that is not a finite number.
        """
        if not math.isfinite(val_loss):
            raise InputError(
                "the validation loss is not a finite number: the weights are too large to "
                "multiply; try a smaller --lr or --precision float32 (last.pt is from before)"
            )
        progress, total = self.progress, counts.sum(0)
        dice = agreement.dice(total)
        is_best = dice > progress.best_dice and self.is_better(counts)
        if is_best:
            progress.best_dice, progress.best_epoch = dice, progress.epoch
            progress.after = counts.tolist() if progress.before else []
        patches, timed = progress.timed_steps * batch_size, progress.timed_seconds
        row = {
            "epoch": progress.epoch,
            "train_loss": progress.epoch_loss,
            "val_loss": val_loss,
            "val_accuracy": agreement.accuracy(total),
            "val_dice": dice,
            "learning_rate": self.rate,
            "patches_per_second": patches / timed if timed else 0.0,
            "seconds": self.seconds,
        }
        progress.metrics.append(row)
        progress.epoch, progress.batch, progress.epoch_loss = progress.epoch + 1, 0, 0.0
        progress.timed_steps, progress.timed_seconds = 0, 0.0
        return is_best

    def to_save(self, patch_set: str) -> dict:
        """The state as runs.Training has it; waits for the device."""
        parts = ("model", "ema", "optimizer", "scaler")
        saved = {name: getattr(self, name).state_dict() for name in parts}
        saved["scaler"] = saved["scaler"] or self.loss_scale  # it says that steps were skipped
        saved["schedule"] = {"last_epoch": self.step}
        self.progress.seconds = self.seconds
        if self.origin:
            saved["origin"] = self.origin
        saved["progress"] = asdict(self.progress) | {"losses": [x.item() for x in self.losses]}
        return saved | {"patch_set": patch_set, "random": torch.get_rng_state()}


def began_with(
    model: nn.Module, keep: float, origin: dict | None = None, training: dict | None = None
) -> dict | None:
    """What a fine-tuning began with, as runs.Origin has it, on the device of `model`; None of other
    trainings, also where nothing of --init is kept, as its network has other outputs.

    `origin` is the checkpoint of --init, whose weights `model` has, `keep` the share of them in
    what is made; `training` is what `runs.load_training` read of a run that goes on.
    """
    if training:
        first = training.get("origin")
        device = next(model.parameters()).device
        return first and first | {"model": {k: v.to(device) for k, v in first["model"].items()}}
    if not origin or origin["config"] != model.config:
        return None
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    first = {key: origin[key] for key in ("split", "threshold")}
    return first | {"model": weights, "keep": keep}


def make_state(
    model: nn.Module,
    args,
    batches: int,
    precision: torch.dtype,
    training: dict | None = None,
    origin: dict | None = None,
) -> State:
    """The state at a run's first step or, with what `runs.load_training` read, where it goes on.

    `model` is on its device; `args` are train.py's, `batches` those of an epoch. `origin` is as
    `began_with` has it.
    """
    device = next(model.parameters()).device
    average = warm_ema(EMA_DECAY, lambda: schedule.last_epoch // EMA_EVERY)
    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    ema.module.eval()  # it never learns by itself, and copies of it neither
    ema.n_averaged = ema.n_averaged.cpu()  # it is looked at on each update
    *others, weight, bias = model.parameters()  # these two of last_conv
    head_rate = args.lr * (1 if args.init else HEAD_RATE)  # that of --init has its size
    groups = [{"params": others, "lr": args.lr}, {"params": [weight, bias], "lr": head_rate}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    progress, losses, done = Progress(), [], 0  # steps that are done
    if training:
        saved = dict(training["progress"])
        losses = [torch.tensor(loss, device=device) for loss in saved.pop("losses")]
        progress = Progress(**saved | {"finished": False})
        done = training["schedule"]["last_epoch"]
        model.load_state_dict(training["model"])
        ema.load_state_dict(training["ema"])
        # Its settings follow from the flags and the step.
        moments = {"state": training["optimizer"]["state"]}
        optimizer.load_state_dict(optimizer.state_dict() | moments)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if scaler.is_enabled() and training["scaler"]:
            scaler.load_state_dict(training["scaler"])
        torch.set_rng_state(training["random"])
    steps = args.epoch * batches + 1  # the rate after the last step counts as one, too
    schedule = LambdaLR(optimizer, partial(one_cycle, steps=steps), last_epoch=done - 1)
    started = time.monotonic() - progress.seconds
    seen = [()] * len(losses)
    scale = training["scaler"] if training else {}
    return State(
        model, ema, optimizer, schedule, scaler, progress, losses, seen, started, origin, scale
    )
