"""The device, the number format that it multiplies fast, and how many threads and workers pay."""

import multiprocessing
import os
import time
from pathlib import Path

import torch

from tissue.files import InputError


def choose_device(gpu_id: int) -> torch.device:
    """The GPU of that number, or Apple's; the CPU for -1 and, with a line that says so, where no
    GPU is. Raises InputError for a number beyond the last GPU.
    """
    if gpu_id < 0:
        return torch.device("cpu")
    if not torch.cuda.is_available() and torch.backends.mps.is_available():
        return torch.device("mps")
    if not torch.cuda.is_available():
        if int(os.environ.get("RANK", 0)) == 0:
            print("No GPU found, using the CPU")
        return torch.device("cpu")
    if gpu_id >= torch.cuda.device_count():
        raise InputError(
            f"--gpu_id: found {gpu_id}, expected 0 to {torch.cuda.device_count() - 1} "
            f"(or -1 for the CPU)"
        )
    torch.cuda.set_device(gpu_id)
    return torch.device("cuda", gpu_id)


def choose_precision(device: torch.device) -> torch.dtype:
    """The number format that this device multiplies fast: bfloat16 on GPUs since Ampere and on CPUs
    that do so, float16 on GPUs since Volta, else float32.

    With AMX a CPU does. With AVX512-BF16 alone AMD's do, and Intel's do not: a step takes half as
    long as in float32 on an EPYC, half as long again on a Xeon (docs/lab_notes.md).
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) else torch.float32
    if device.type == "mps":
        return torch.float32
    has = torch.cpu.get_capabilities()
    by_amd = has.get("avx512_bf16", False) and "AMD" in has.get("cpu_name", "")
    return torch.bfloat16 if has.get("amx_bf16", False) or by_amd else torch.float32


def choose_workers(device: torch.device) -> int:
    """How many loader processes pay: on a GPU, all that this process's share of the cores gives (16
    at most); on a CPU none, because each would hold up one of the threads that the others wait for.
    """
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class Threads:
    """Leaves cores to other programs: of PyTorch's threads on the CPU only as many as are free.

    Threads that wait for each other within an operation, as oneDNN's do, hold a core while they
    wait; two trainings with all threads each are four times as slow as one after the other. Where
    OMP_NUM_THREADS is set (torchrun sets it), and without Linux's /proc/stat, their number stays.
    """

    INTERVAL = 2.0  # seconds over which it is seen what others take

    def __init__(self, device: torch.device):
        self.most = torch.get_num_threads()
        fixed = "OMP_NUM_THREADS" in os.environ or not Path("/proc/stat").is_file()
        self.adapts = device.type == "cpu" and self.most > 1 and not fixed
        self.before = moment() if self.adapts else None

    def adapt(self) -> None:
        """Look at what other programs take, if it is time to, and set the number of threads."""
        if not self.adapts or time.monotonic() - self.before[0] < self.INTERVAL:
            return
        now = moment()
        seconds, others = (after - before for after, before in zip(now, self.before, strict=True))
        self.before = now
        threads = min(self.most, max(1, round(self.most - others / seconds)))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)


def moment() -> tuple[float, float]:
    """The time, and the processor seconds of all programs but this one and its children (Linux)."""
    ticks = Path("/proc/stat").read_text().split()[1:4]  # user, nice, system
    busy = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy - own_seconds()


def own_seconds() -> float:
    """The processor seconds of this process and its children, as those that read patches (Linux).

    os.times() has those of children that have ended, /proc those of the others.
    """
    ticks = 0
    for child in multiprocessing.active_children():
        try:
            stat = Path(f"/proc/{child.pid}/stat").read_text()
        except OSError:  # it has ended meanwhile
            continue
        # Behind its name, in which anything may stand: user and system, and of its own children.
        ticks += sum(map(int, stat.rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK") + sum(os.times()[:4])
