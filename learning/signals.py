"""How a script ends before its time: signals, its child processes, and errors explained."""

import multiprocessing
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from tissue import ending
from tissue.files import InputError

MEET_EVERY, MOST_CALLS = 1.0, 1000  # seconds from meeting to meeting of processes, and calls


class Stopped(SystemExit):
    """The user or the machine asked this script to stop; the exit code is 128 + the signal."""

    def __init__(self, signal_number: int):
        super().__init__(128 + signal_number)
        self.name = signal.Signals(signal_number).name


class StopSignal:
    """Raises Stopped where SIGINT (Ctrl-C) or SIGTERM comes: at once, or, from `hold` to
    `release`, at the next `check`, where a loop can be left.
    """

    def __init__(self):
        self.received = 0
        self.held = False
        self.processes = 1
        self.soon()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.received = number
        if not self.held:
            ending.stopped()
            raise Stopped(number)

    def hold(self, processes: int) -> None:
        """Let signals wait for `check`, which so many processes call alike."""
        self.held, self.processes = True, processes

    def release(self) -> None:
        """Signals are heard at once again, and so is one that has waited."""
        self.held = False
        if self.received:
            raise Stopped(self.received)

    def soon(self) -> None:
        """Steps of another pace begin: processes meet at the first of them."""
        self.calls, self.pause, self.met = 0, 1, time.monotonic()

    def check(self, meeting: bool = True) -> None:
        """Raise Stopped if a signal came. Several processes agree on it in a meeting about every
        second, which all of them reach at one call; `meeting` is false for calls that not all of
        them make.
        """
        if self.processes == 1:
            if self.received:
                raise Stopped(self.received)
            return
        self.calls += meeting
        if not meeting or self.calls % self.pause:
            return
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        pace = (time.monotonic() - self.met) / self.calls  # seconds a call
        highest = torch.tensor([self.received, pace], dtype=torch.float64, device=device)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        self.received, pace = int(highest[0]), float(highest[1])
        if self.received:
            raise Stopped(self.received)
        self.soon()
        self.pause = max(1, min(MOST_CALLS, round(MEET_EVERY / max(pace, 1e-6))))


def begin_loader(worker: int) -> None:
    """For loader processes: signals to the whole group reach them too, but it is the training
    process that ends them, after its step (`end_processes`), and that tells how it ended: their
    threads, which then hand a batch to nobody, are silent. Where it was killed they end by
    themselves; torch's own watch does not see it if that was while they began.
    """
    threading.Thread(target=end_with_parent, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *error: None  # errors of patches go to the training process otherwise


def end_with_parent() -> None:
    """Wait until the process that started this one is gone, and end this one."""
    multiprocessing.parent_process().join()
    os._exit(1)


def end_processes() -> None:
    """End the loader processes that are left, and leave the group of training processes."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise here
    for child in multiprocessing.active_children():
        child.kill()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def explain(error: Exception) -> None:
    """Raise InputError for an error in the training loop that is not the program's, else return:
    a loader process or another rank was killed, a patch is bad, the memory full, no compiler here.

    Torch tells of a killed one, unless a batch was just being handed over: then the connection
    breaks.
    """
    if isinstance(error, InputError | OSError) and "Original Traceback" in str(error):
        raise InputError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        raise InputError(
            f"--compile: found no way to compile the network ({str(error).splitlines()[0]:.200}), "
            f"expected a C++ compiler; install one, or leave --compile out"
        ) from error
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        raise InputError(
            "the memory is full, expected room for a step of the training; try a smaller "
            "--batch_size or --dimensions"
        ) from error
    if "DataLoader worker" in str(error) or isinstance(error, (ConnectionError, EOFError)):
        raise InputError(
            "a process that reads patches was killed from outside (is the memory full?); last.pt "
            "is whole: go on with --resume, with fewer --workers if need be"
        ) from error
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        raise InputError(
            "another process of this training has ended, or cannot be reached (is a memory full?); "
            "last.pt is whole: go on with --resume, under torchrun as before"
        ) from error
