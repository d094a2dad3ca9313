"""Several processes that train one network, or infer together, under torchrun."""

import os
import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from learning.devices import choose_device
from tissue.files import InputError


class Machine(NamedTuple):
    """With what a process learns: its device and number format, its place among the others."""

    device: torch.device
    precision: torch.dtype
    rank: int = 0
    processes: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def autocast(self) -> torch.autocast:
        """A context in which the network works in the number format."""
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled)


def start_processes(gpu_id: int, waiting: bool = False) -> tuple[torch.device, int, int]:
    """This process's device, its rank and the number of processes: (device, 0, 1) when alone.

    Under torchrun it joins the others, by NCCL where there are GPUs (one a process, whatever
    `gpu_id` above -1 says) and by gloo on CPUs. With `waiting`, for processes that meet after hours
    of their own work and exchange no tensors, by gloo always.
    """
    if not dist.is_torchelastic_launched():
        return choose_device(gpu_id), 0, 1
    device = choose_device(int(os.environ["LOCAL_RANK"]) if gpu_id >= 0 else -1)
    if waiting:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    else:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, *place_among_processes()


def place_among_processes() -> tuple[int, int]:
    """The rank of this process and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def everyone(value) -> list:
    """What every process gave, in the order of their ranks; all wait here for each other."""
    values = [value] * place_among_processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def everyones(texts: list[str]) -> list[str]:
    """The texts of all processes, each once."""
    return list(dict.fromkeys(text for given in everyone(texts) for text in given))


class Team:
    """The processes that work on one thing, this one with its `place`: (rank, number of them).

    They are all of this call or, `alone`, this one. What one of them cannot do fails in all: none
    waits for another that has given up.
    """

    def __init__(self, alone: bool = False):
        self.place = (0, 1) if alone else place_among_processes()

    def each(self, work: Callable[[], Any]) -> list:
        """What `work` gives in each process, by rank; the first InputError or OSError as one."""
        value, fault = None, None
        try:
            value = work()
        except (InputError, OSError) as error:
            fault = str(error)
        found = everyone((value, fault)) if self.place[1] > 1 else [(value, fault)]
        if faults := [fault for _, fault in found if fault]:
            raise InputError(faults[0])
        return [value for value, _ in found]

    def first(self, work: Callable[[], Any]) -> Any:
        """What `work` gives in the first process, for all, which wait for it."""
        return self.each(lambda: work() if self.place[0] == 0 else None)[0]


def share_of_batch(batch_size: int, patches: int, processes: int) -> int:
    """A process's share of each batch; InputError if the batch is larger than the set or uneven."""
    if batch_size > patches:
        raise InputError(
            f"--batch_size: found {batch_size}, expected at most the {patches} training patches"
        )
    if batch_size % processes:
        raise InputError(
            f"--batch_size: found {batch_size}, expected a multiple of the {processes} processes "
            f"that share each batch"
        )
    return batch_size // processes


def add_up(tensors: list[torch.Tensor], processes: int) -> None:
    """Replace each tensor by its sum over all processes."""
    if processes > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


class AddUp(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return AddUp.forward(ctx, gradient)


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on any device (torch's own is for GPUs).

    With it, n processes compute what one does on the whole batch. Each has the same share of it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.normalised(x) if self.training else super().forward(x)
        return self.act(self.drop(x)) if hasattr(self, "act") else x  # timm's BatchNormAct2d

    def normalised(self, x: torch.Tensor) -> torch.Tensor:
        """The batch norm alone, which takes its statistics over all processes and keeps them."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        # Of equal shares, the mean is the mean of means, and the mean square that of mean squares.
        # In float64, because squares of means are taken from each other.
        variance, mean = (part.double() for part in torch.var_mean(values, (0, 2, 3), correction=0))
        sums = AddUp.apply(torch.stack([mean, variance + mean.square()]))
        mean, square = sums / dist.get_world_size()
        variance = (square - mean.square()).to(values.dtype)
        mean = mean.to(values.dtype)
        with torch.no_grad():
            count = x.numel() / x.shape[1] * dist.get_world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return torch.addcmul(shift.view(1, -1, 1, 1), values, scale.view(1, -1, 1, 1)).to(x.dtype)


def share_batch_norm(model: nn.Module) -> None:
    """Make every batch norm of a network a SharedBatchNorm, in place; its keys stay as they are."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SharedBatchNorm


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, numpy and torch (weights of a new network among them)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
