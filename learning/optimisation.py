"""What the steps of a training share: rate, averaged weights, precision of layers, finite loss."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tissue.files import InputError

WARM_UP = 0.1  # fraction of all steps in which the learning rate rises


def one_cycle(step: int, steps: int) -> float:
    """The learning rate of a step, 0 to `steps` - 1, as a share of the highest.

    From 1/25 it rises in the first tenth of the steps and falls to 1/250,000 in the others, both by
    a cosine: OneCycleLR of torch (Smith & Topin 2019, SPIE 11006), which divides by zero where its
    rise takes no step. There, and in fewer steps, the highest rate comes first.
    """
    first, last = 1 / 25, 1 / 25e4
    top = WARM_UP * steps - 1  # the step of the highest rate
    if step <= top and top > 0:
        return 1 + (first - 1) / 2 * (1 + math.cos(math.pi * step / top))
    return last + (1 - last) / 2 * (1 + math.cos(math.pi * (step - top) / (steps - 1 - top)))


def warm_ema(decay: float, updates: Callable[[], int]) -> Callable:
    """An averaging function for AveragedModel: exponential, with a decay that grows to `decay`.

    After n = updates() updates the decay is at most (1 + n) / (10 + n), so that the first weights,
    which know nothing, are forgotten soon (TensorFlow's ExponentialMovingAverage, `num_updates`).
    """

    @torch.no_grad()
    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], count) -> None:
        # Not this count: it comes as a tensor of the device, which would wait.
        now = min(decay, (1 + updates()) / (10 + updates()))
        if averaged[0].is_floating_point():
            get_ema_multi_avg_fn(now)(averaged, current, count)
        else:  # batch norm's counters
            torch._foreach_copy_(averaged, current)

    return average


class InFloat32:
    """Beside a convolution's own class: it multiplies in float32, whatever autocast says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def depthwise_in_float32(model: nn.Module) -> None:
    """Let a network's depthwise convolutions work in float32, in place; its keys stay as they are.

    On a CPU their gradients take 4 to 10 times as long in bfloat16 (docs/lab_notes.md).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            own = type(module)
            module.__class__ = type(own.__name__, (InFloat32, own), {})


def keep_statistics(model: nn.Module) -> None:
    """Let batch norm use the statistics that it has and not those of the batches, in place.

    Few images have other statistics than the tissue that they stand for.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def check_finite(losses: list[torch.Tensor], seen: list, files: list[str]) -> None:
    """Raise InputError with the patches behind the first loss that is not a finite number.

    `losses` are scalars, `seen` the indices of each one's patches in `files`.
    """
    if not losses:
        return
    finite = torch.stack(losses).isfinite().tolist()
    if not all(finite):
        names = [files[index] for index in seen[finite.index(False)]]
        raise InputError(
            f"the loss is not a finite number any more, first in the step on {', '.join(names)}; "
            f"look at these patches, or try a smaller --lr or --precision float32 (last.pt is from "
            f"before)"
        )
