"""What two or more of the scripts share: transforms, scores, checkpoints, device, logging."""

import contextlib
import copy
import ctypes
import functools
import json
import math
import multiprocessing
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network

import albumentations as A
import cv2
import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from albumentations.pytorch import ToTensorV2
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from learning.checkpoints import IMAGENET_MEAN, IMAGENET_STD, load_checkpoint
from model import EvenConv
from tissue import files
from tissue.colour import ONE, Colour
from tissue.files import InputError, replacing
from tissue.tiling import SIZES

VERSION = "0.1.0"
WARM_UP = 0.1  # fraction of all steps in which the learning rate rises
MEET_EVERY, MOST_CALLS = 1.0, 1000  # seconds from meeting to meeting of processes, and calls
COLOURS = {"own": None, "one": ONE}  # by the names that --colour gives them


# --- transforms ---------------------------------------------------------------------------------


# Unit vectors of optical density (red, green, blue) of haematoxylin and eosin (Macenko et al. 2009,
# ISBI 1107, as in its reference implementation), and what is left, at right angles to both.
STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581], [0.2013, -0.5958, 0.7775]])
STAIN_GAIN = (0.55, 1.35)  # how strong a stain is beside the patch's own: others are mostly paler
STAIN_OFFSET = 0.08  # optical density that a stain has more or less everywhere
STAIN_HUE = 0.08  # change of each part of a stain's vector
DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)  # of each pixel value, base e
# Sizes, of one nucleus to another's or of one scanner to another's.
MODERATE_SCALE, STRONG_SCALE = (0.65, 1.6), (0.65, 1.6)
WARP_BEND = 1.5  # pixels, standard deviation of the displacement of knots
WARP_KNOTS = 32  # pixels from knot to knot
RIM = (1.0, 3.0)  # pixels, of a nucleus' border that stays dark
PALENESS = 0.8  # share of its optical density that a nucleus' interior may lose
PATCHINESS = 24  # pixels from nuclei that become pale to others that do not
CLUMPS = 4  # pixels, of chromatin that stays dark within


def to_pixels(density: np.ndarray) -> np.ndarray:
    """The pixel values, uint8, of optical densities float32, both (H, W, 3): DENSITY's inverse."""
    return np.clip(256 * cv2.exp(-density) - 0.5, 0, 255).astype(np.uint8)  # - 1, rounded


class StainJitter(A.ImageOnlyTransform):
    """Other amounts and other hues of haematoxylin and eosin in an RGB uint8 image (H, W, 3).

    Each stain gets a random gain and offset, as Tellez et al. 2018 (IEEE TMI 37:2126) draw them in
    haematoxylin-eosin-DAB space, and a random vector near its own, so that dyes and scanners differ
    too. All of it is one affine map of optical densities.
    """

    def get_params(self) -> dict:
        uniform = self.random_generator.uniform
        gain = uniform(*STAIN_GAIN, 3)
        offset = uniform(-STAIN_OFFSET, STAIN_OFFSET, 3)
        stains = STAINS + uniform(-STAIN_HUE, STAIN_HUE, (3, 3))
        stains /= np.linalg.norm(stains, axis=1, keepdims=True)
        change = np.linalg.inv(STAINS) @ np.diag(gain) @ stains  # density rows -> density rows
        return {"change": np.column_stack([change.T, offset @ stains])}  # (3, 4), as OpenCV has it

    def apply(self, img: np.ndarray, change: np.ndarray, **params) -> np.ndarray:
        return to_pixels(cv2.transform(cv2.LUT(img, DENSITY), change))


class PaleNuclei(A.ImageOnlyTransform):
    """Take chromatin from within nuclei and leave them a rim and clumps: vesicular nuclei.

    So they look in fixed, paraffin-embedded tissue, above all in tumours, and hardly ever in frozen
    sections; a network that knows only dense ones tears or misses them. Each patch gets its own rim
    and strength, and within it some nuclei change and others do not. RGB uint8 (H, W, 3), with a
    mask (H, W) that is above 0 in nuclei.
    """

    @property
    def targets_as_params(self) -> list[str]:
        return ["mask"]

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        uniform, normal = self.random_generator.uniform, self.random_generator.normal
        mask = (data["mask"] > 0).astype(np.uint8)
        height, width = mask.shape
        depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3)  # pixels from the background
        interior = np.clip((depth - uniform(*RIM)) / uniform(1.0, 2.5), 0, 1)
        coarse = uniform(-0.5, 1.0, (height // PATCHINESS + 2, width // PATCHINESS + 2))
        where = cv2.resize(coarse.astype(np.float32), (width, height))
        paleness = np.clip(where * uniform(0.6, 1.4), 0, PALENESS) * interior
        fine = normal(0, 1, (height // CLUMPS + 1, width // CLUMPS + 1)).astype(np.float32)
        clumps = cv2.resize(fine, (width, height), interpolation=cv2.INTER_CUBIC)
        paleness *= np.clip(1 - uniform(0, 0.8) * np.maximum(clumps, 0), 0, 1)
        left = cv2.GaussianBlur((1 - paleness).astype(np.float32), (0, 0), 0.7)
        return {"left": left[..., None]}  # (H, W, 1), share of the optical density

    def apply(self, img: np.ndarray, left: np.ndarray, **params) -> np.ndarray:
        return to_pixels(cv2.LUT(img, DENSITY) * left)


class Warp(A.DualTransform):
    """Rotation by any angle, scale and a mild elastic deformation, in one resampling.

    The image is interpolated, the mask takes the nearest pixel and so keeps its values; both are
    mirrored at their edges. `scale` is the smallest and the largest size of what is seen.
    """

    def __init__(self, scale: tuple[float, float], p: float):
        super().__init__(p=p)
        self.scale = scale

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict:
        height, width = params["shape"][:2]
        angle = self.random_generator.uniform(0, 2 * np.pi)
        scale = np.exp(self.random_generator.uniform(*np.log(self.scale)))
        knots = (height // WARP_KNOTS + 2, width // WARP_KNOTS + 2, 2)
        bend = self.random_generator.normal(0, WARP_BEND, knots).astype(np.float32)
        bend = cv2.resize(bend, (width, height), interpolation=cv2.INTER_CUBIC)
        # Where each pixel comes from, so the inverse of the rotation and the scale.
        y, x = np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2
        cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
        source = bend + np.array([(width - 1) / 2, (height - 1) / 2], np.float32)
        source[..., 0] += (cosine * x)[None] + (sine * y)[:, None]
        source[..., 1] += (cosine * y)[:, None] - (sine * x)[None]
        return {"source": source}  # (H, W, 2) float32, x and y

    def apply(self, img: np.ndarray, source: np.ndarray, **params) -> np.ndarray:
        return cv2.remap(img, source, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)

    def apply_to_mask(self, mask: np.ndarray, source: np.ndarray, **params) -> np.ndarray:
        return cv2.remap(mask, source, None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)


def transform(split: str, augment: str = "basic") -> A.Compose:
    """What happens to a patch before the network sees it, for the split "train" or "val".

    Called with `image` RGB uint8 (H, W, 3) and `mask` (H, W), it returns a dict with `image`
    float32 (3, H, W), normalised by ImageNet's mean and standard deviation, and `mask` (H, W).
    "train" augments: "basic" flips at random and changes brightness and contrast by up to 0.3;
    "moderate" turns, scales and bends as well, and changes stain and sharpness, as one laboratory's
    images differ; "strong" does all that in wider ranges and draws chromatin, colour, noise and
    compression, so as to cover other laboratories and scanners (1.3 ms a patch of 128 x 128 pixels
    on one core).
    """
    basic = [
        A.HorizontalFlip(p=0.5),
        A.VerticalFlip(p=0.5),
        A.RandomBrightnessContrast(brightness_limit=0.3, contrast_limit=0.3, p=0.5),
    ]
    smooth = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_LINEAR}
    moderate = [
        A.D4(p=1),  # flips and quarter turns
        Warp(MODERATE_SCALE, p=0.5),
        StainJitter(p=0.4),
        A.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.2, p=0.4),
        A.OneOf(
            [A.GaussianBlur(sigma_limit=(0.3, 1.3), p=1), A.Sharpen(alpha=(0.1, 0.4), p=1)], p=0.2
        ),
    ]
    strong = [
        PaleNuclei(p=0.5),
        A.D4(p=1),
        Warp(STRONG_SCALE, p=0.6),
        StainJitter(p=0.8),
        A.HueSaturationValue(hue_shift_limit=8, sat_shift_limit=20, val_shift_limit=0, p=0.3),
        A.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.2, p=0.4),
        A.RandomGamma(gamma_limit=(70, 140), p=0.3),
        A.OneOf(
            [
                A.GaussianBlur(sigma_limit=(0.3, 1.3), p=1),
                A.Downscale(scale_range=(0.5, 0.8), interpolation_pair=smooth, p=0.5),
                A.Sharpen(alpha=(0.1, 0.4), p=0.5),
            ],
            p=0.3,
        ),
        A.GaussNoise(std_range=(0.01, 0.05), noise_scale_factor=1, p=0.2),
        A.ImageCompression(quality_range=(40, 95), p=0.2),
    ]
    to_input = [A.Normalize(IMAGENET_MEAN, IMAGENET_STD), ToTensorV2()]
    train = {"basic": basic, "moderate": moderate, "strong": strong}[augment] + to_input
    return A.Compose({"train": train, "val": to_input}[split])


# --- scores -------------------------------------------------------------------------------------


def pixel_counts(prediction: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """True positive, false positive, false negative and true negative pixels: int64 (4,).

    Both arguments are bool tensors of one shape, True where there is a nucleus. Counts of batches,
    images and processes add up; the scores below divide their sum once.
    """
    hits = (prediction & reference).sum()
    predicted, present = prediction.sum(), reference.sum()
    false_positive, false_negative = predicted - hits, present - hits
    true_negative = prediction.numel() - hits - false_positive - false_negative
    return torch.stack([hits, false_positive, false_negative, true_negative])


def accuracy(counts: torch.Tensor) -> float:
    """Correct pixels / pixels, from `pixel_counts`."""
    true_positive, false_positive, false_negative, true_negative = counts.tolist()
    correct = true_positive + true_negative
    return correct / (correct + false_positive + false_negative)


def dice(counts: torch.Tensor) -> float:
    """2 TP / (2 TP + FP + FN) from `pixel_counts`; 1 where both masks are empty (Dice 1945)."""
    true_positive, false_positive, false_negative, _ = counts.tolist()
    pixels = 2 * true_positive + false_positive + false_negative
    return 2 * true_positive / pixels if pixels else 1.0


def iou(counts: torch.Tensor) -> float:
    """TP / (TP + FP + FN) from `pixel_counts`; 1 where both masks are empty (Jaccard 1912)."""
    true_positive, false_positive, false_negative, _ = counts.tolist()
    pixels = true_positive + false_positive + false_negative
    return true_positive / pixels if pixels else 1.0


def scores(counts: torch.Tensor) -> dict[str, float]:
    """Accuracy, Dice and IoU by these names, from `pixel_counts`."""
    return {"accuracy": accuracy(counts), "dice": dice(counts), "iou": iou(counts)}


def bce_dice(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy plus 1 - soft Dice, a scalar (Milletari et al. 2016, 3DV).

    `logits` and `masks` (0 or 1) are float32 (N, 1, H, W). The soft Dice takes probabilities for
    pixels, 2 sum(p m) / (sum(p) + sum(m)), over the whole batch, that of all processes if there are
    several: patches without nuclei have no Dice of their own.
    """
    probability = logits.sigmoid()
    sums = torch.stack([(probability * masks).sum(), probability.sum() + masks.sum()])
    if dist.is_available() and dist.is_initialized():
        sums = AddUp.apply(sums)
    soft_dice = (2 * sums[0] + 1) / (sums[1] + 1)  # 1 where both are empty
    return binary_cross_entropy_with_logits(logits, masks) + 1 - soft_dice


def depth_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the depth in the nucleus as probability, a scalar.

    `logits` and `masks` are float32 (N, 1, H, W), the latter as patches.PatchDataset has them:
    nuclei of unknown depth, -1, do not count. Nor does a patch without a nucleus of known depth:
    the background of masks alone would teach that there is no depth in tissue like theirs.
    """
    tells = (masks > 0).flatten(1).any(1).view(-1, 1, 1, 1)
    known = ((masks >= 0) & tells).float()
    return binary_cross_entropy_with_logits(logits, masks.clamp(min=0), weight=known)


# --- device, precision, seeds -------------------------------------------------------------------


def choose_device(gpu_id: int) -> torch.device:
    """The GPU of that number; the CPU for -1 and, with a line that says so, where no GPU is.

    Raises InputError for a number beyond the last GPU.
    """
    if gpu_id < 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"No GPU here: --gpu_id {gpu_id} means the CPU.")
        return torch.device("cpu")
    if gpu_id >= torch.cuda.device_count():
        raise InputError(
            f"--gpu_id: found {gpu_id}, expected 0 to {torch.cuda.device_count() - 1} "
            f"(or -1 for the CPU)"
        )
    torch.cuda.set_device(gpu_id)
    return torch.device("cuda", gpu_id)


@functools.cache  # one answer a process, whatever else the processor does meanwhile
def choose_precision(device: torch.device) -> torch.dtype:
    """The number format that this device multiplies fast: bfloat16 on GPUs since Ampere and on CPUs
    that do so, float16 on GPUs since Volta, else float32.

    With AMX a CPU does. With AVX512-BF16 alone it depends on the processor (a step takes half as
    long as in float32 on an AMD EPYC, half as long again on a Xeon; docs/lab_notes.md), so products
    of both kinds are timed, in a tenth of a second; the ratios found are far from the limit.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) else torch.float32
    has = torch.cpu.get_capabilities()
    fast = has.get("amx_bf16", False)
    if not fast and has.get("avx512_bf16", False):
        fast = bfloat16_gain() > 1.3
    return torch.bfloat16 if fast else torch.float32


def bfloat16_gain() -> float:
    """How many times as fast as float32 the CPU multiplies matrices of 512 x 512 in bfloat16.

    The fastest of thirty products each, in turns, so that other programs hold up both alike.
    """
    seconds = {torch.float32: [], torch.bfloat16: []}
    for _ in range(30):
        for precision, its in seconds.items():
            matrix = torch.ones(512, 512, dtype=precision)
            started = time.perf_counter()
            matrix @ matrix
            its.append(time.perf_counter() - started)
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


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
    busy = 0.0
    if Path("/proc/stat").is_file():
        ticks = Path("/proc/stat").read_text().split()[1:4]  # user, nice, system
        busy = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])
    return time.monotonic(), busy


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


def choose_workers(device: torch.device) -> int:
    """How many loader processes pay: on a GPU, all that this process's share of the cores gives (16
    at most); on a CPU none, because each would hold up one of the threads that the others wait for.
    """
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


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


def ignore_signals(worker: int) -> None:
    """For loader processes: signals to the whole group reach them too, but it is the training
    process that ends them, after its step (`end_processes`).
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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
    a loader process was killed, or found a bad patch, the memory is full, or nothing compiles here.

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
            f"look at these patches, or try a smaller --lr or --no-amp (last.pt is from before)"
        )


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, numpy and torch (weights of a new network among them)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def warm_ema(decay: float, updates: Callable[[], int]) -> Callable:
    """An averaging function for AveragedModel: exponential, with a decay that grows to `decay`.

    After n = updates() updates the decay is at most (1 + n) / (10 + n), so that the first weights,
    which know nothing, are forgotten soon (TensorFlow's ExponentialMovingAverage, `num_updates`).
    """

    @torch.no_grad()
    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], _) -> None:
        # Not AveragedModel's own count: it comes as a tensor of the device, which would wait.
        weight = 1 - min(decay, (1 + updates()) / (10 + updates()))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, weight)
        else:  # batch norm's counters
            torch._foreach_copy_(averaged, current)

    return average


# --- checkpoints --------------------------------------------------------------------------------


def load_origin(path: Path | str) -> dict:
    """The checkpoint that --init names; InputError for one that no training can start from."""
    checkpoint = load_checkpoint(path)
    if checkpoint["channel_order"] != "rgb":
        raise InputError(
            f"--init {path}: found weights of the first version, for blue, green, red (bgr), "
            f"expected weights for red, green, blue; choose a checkpoint by this train.py"
        )
    return checkpoint


def mean_of_weights(models: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of each tensor, batch norm's statistics included; integers are the first's.

    That of networks which learned on from the same weights is as good as an average of their
    probabilities would be (Wortsman et al. 2022, ICML, "Model soups"); of others it is nonsense.
    """
    return {
        key: torch.stack([model[key].float() for model in models]).mean(0)
        if value.is_floating_point()
        else value
        for key, value in models[0].items()
    }


def prediction_settings(model: nn.Module, checkpoint: dict, tta: bool = False) -> dict:
    """What `tiling.predict_tiles` must know of a network, and the sizes that --tta averages over.

    Beside `predictor`: what concerns the whole image and not a tile.
    """
    colour = checkpoint["colour"]
    return {
        "halo": model.halo,
        "grid": model.grid,
        "sizes": SIZES if tta else SIZES[:1],
        "colour": Colour(**colour) if colour else None,
        "outputs": model.last_conv.out_channels,
    }


def predictor(
    model: nn.Module, checkpoint: dict, device: torch.device, flips_and_turns: bool = False
) -> Callable:
    """A function from RGB uint8 tiles (N, H, W, 3) to what the network gives, float32 (N, C, H, W).

    The first of the C outputs is the probability of a nucleus, the second, of a network with
    instances, the depth in it; both are 0 to 1. The function does all that the checkpoint asks for:
    normalisation and order of the colour channels. With `flips_and_turns` it averages the eight
    ways to lay a tile (test-time augmentation). It works on a copy of the network that is fused for
    inference (`fuse`). A batch too large for the GPU's memory is halved, for good, and a line says
    so.
    """
    model = fuse(copy.deepcopy(model).eval(), device)
    model = model.to(device, memory_format=torch.channels_last)
    precision = choose_precision(device)
    threads = Threads(device)
    mean, std = (
        torch.tensor(checkpoint["normalisation"][key], device=device).view(3, 1, 1) * 255
        for key in ("mean", "std")
    )
    swapped = checkpoint["channel_order"] == "bgr"

    @torch.inference_mode()
    def predict(tiles: np.ndarray) -> np.ndarray:
        threads.adapt()
        batch = torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2)  # (N, 3, H, W), NHWC inside
        batch = (batch.flip(1) if swapped else batch).float().sub(mean).div(std)
        total, finite = torch.zeros((), device=device), torch.ones((), device=device, dtype=bool)
        ways = [(turns, flip) for turns in range(4) for flip in (False, True)]
        ways = ways if flips_and_turns else ways[:1]
        for turns, flip in ways:
            laid = batch.rot90(turns, (2, 3))
            laid = laid.flip(3) if flip else laid
            laid = laid.contiguous(memory_format=torch.channels_last)
            mixed = torch.autocast(device.type, precision, enabled=precision != torch.float32)
            with mixed, freed_memory_kept():
                logits = model(laid)
            finite &= logits.isfinite().all()
            outputs = logits.float().sigmoid()
            outputs = outputs.flip(3) if flip else outputs
            total = total + outputs.rot90(-turns, (2, 3))
        outputs = (total / len(ways)).cpu().numpy()
        if not finite:
            raise InputError(
                "found predictions that are not finite, expected numbers: the checkpoint's weights "
                "are too large to multiply; choose another"
            )
        return outputs

    return halving(predict)


def halving(predict: Callable) -> Callable:
    """`predict` for batches of any size: one that does not fit the memory is halved and tried anew.

    The size that fitted is kept for all later batches. Raises InputError if one tile is too much.
    """
    most = None

    def in_parts(tiles: np.ndarray) -> np.ndarray:
        nonlocal most
        while True:
            size = min(most or len(tiles), len(tiles))
            parts = np.split(tiles, range(size, len(tiles), size))
            try:
                return np.concatenate([predict(part) for part in parts])
            except RuntimeError as error:  # the GPU's has a class of its own, the CPU's has not
                on_gpu = isinstance(error, torch.OutOfMemoryError)
                if not on_gpu and "DefaultCPUAllocator" not in str(error):
                    raise
                memory = "the GPU's memory" if on_gpu else "the memory"
                if size == 1:
                    raise InputError(
                        f"one tile of {tiles.shape[1]} x {tiles.shape[2]} pixels does not fit "
                        f"{memory}, expected it to; try a smaller --tile"
                    ) from error
            most = size // 2
            torch.cuda.empty_cache()
            print(f"A batch of {size} tiles does not fit {memory}: going on with {most}.")

    return in_parts


class FusedConvReLU(nn.Module):
    """A convolution and its ReLU or ReLU6 in one pass over the memory, as oneDNN has it on a CPU.

    The operator is the one that torch.compile's CPU code calls; it is half as fast again as
    convolution and ReLU one after the other.
    """

    operator = None
    if torch.backends.mkldnn.is_available():
        operator = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    kinds = {nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0.0, 6.0])}  # noqa: RUF012

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module, precision: torch.dtype):
        super().__init__()
        self.register_buffer("weight", convolution.weight.detach().to(precision))
        self.register_buffer("bias", convolution.bias.detach().to(precision))
        self.geometry = convolution.padding, convolution.stride, convolution.dilation
        self.kind = self.kinds[type(activation)]

    @classmethod
    def can(cls, convolution: nn.Conv2d, activation: nn.Module) -> bool:
        """Whether there is such a pass for these two, on a CPU, that is faster."""
        plain = type(convolution) is nn.Conv2d and convolution.padding_mode == "zeros"
        plain &= convolution.groups == 1 and not isinstance(convolution.padding, str)
        return cls.operator is not None and plain and type(activation) in cls.kinds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.weight.dtype)
        return self.operator(x, self.weight, self.bias, *self.geometry, 1, *self.kind, "")


def fuse(model: nn.Module, device: torch.device) -> nn.Module:
    """Take batch norm into the convolution before it, and on a CPU the ReLU after it, in place.

    For inference alone.
    """
    precision = choose_precision(device)
    for convolution_name, norm_name, relu_name in fusable(model):
        norm = model.get_submodule(norm_name)
        convolution = fuse_conv_bn_eval(model.get_submodule(convolution_name), norm)
        model.set_submodule(norm_name, own_activation(norm))
        relu = model.get_submodule(relu_name)
        if device.type == "cpu" and FusedConvReLU.can(convolution, relu):
            convolution = FusedConvReLU(convolution, relu, precision)
            model.set_submodule(relu_name, nn.Identity())
        model.set_submodule(convolution_name, convolution)
    return model


def own_activation(norm: nn.BatchNorm2d) -> nn.Module:
    """The activation that timm's BatchNormAct2d has within; of others an nn.Identity."""
    return getattr(norm, "act", nn.Identity())


def fusable(model: nn.Module) -> list[tuple[str, str, str]]:
    """The names of each convolution, of the batch norm that alone takes what it makes, and of the
    ReLU that alone takes what that makes (the batch norm's again where it has one or none).

    A small image shows who takes what: its gradient's graph has each value's makers and takers.
    """
    kinds = (nn.Conv2d, EvenConv, nn.BatchNorm2d, BatchNormAct2d, nn.ReLU, nn.ReLU6)
    names = {module: name for name, module in model.named_modules() if type(module) in kinds}
    taken, made, hooks = defaultdict(list), defaultdict(list), []
    for module in names:
        hooks += [
            module.register_forward_pre_hook(lambda m, inputs: taken[m].append(inputs[0].grad_fn)),
            module.register_forward_hook(lambda m, _, output: made[m].append(output.grad_fn)),
        ]
    with torch.inference_mode(False), torch.enable_grad():
        parameter = next(model.parameters())
        todo = [model(torch.zeros(1, 3, 64, 64).to(parameter)).grad_fn]
    for hook in hooks:
        hook.remove()
    takers, seen = Counter(), set(todo)
    while todo:
        makers = [node for node, _ in todo.pop().next_functions if node is not None]
        takers.update(makers)
        todo += set(makers) - seen
        seen.update(makers)
    maker = {nodes[0]: module for module, nodes in made.items() if len(nodes) == 1}
    after = {
        maker[nodes[0]]: module
        for module, nodes in taken.items()
        if len(nodes) == 1 and nodes[0] in maker and takers[nodes[0]] == 1
    }
    found = []
    for module, name in names.items():
        norm = after.get(module)
        if isinstance(module, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            relu = after.get(norm)
            is_alone = isinstance(own_activation(norm), nn.Identity) and type(relu) in kinds[-2:]
            found.append((name, names[norm], names[relu if is_alone else norm]))
    return found


class WithColours(nn.Module):
    """A network with its normalisation: RGB 0 to 255 float32 (N, 3, H, W) -> probability, and with
    instances depth, (N, 1 or 2, H, W), for other programs.
    """

    def __init__(self, model: nn.Module, checkpoint: dict):
        super().__init__()
        self.model = model
        self.swapped = checkpoint["channel_order"] == "bgr"
        for key in ("mean", "std"):
            values = torch.tensor(checkpoint["normalisation"][key], dtype=torch.float32)
            self.register_buffer(key, values.view(3, 1, 1) * 255)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.flip(1) if self.swapped else images
        return self.model((images - self.mean) / self.std).sigmoid()


def export_model(path: Path, model: nn.Module, checkpoint: dict, image: np.ndarray) -> str:
    """Write a network for other programs, .pt2 (torch.export) or .onnx, and say what it takes.

    Batch, height and width are free, the latter multiples of the network's grid. Before the file is
    put in place it is read back and compared with the network on `image`, RGB uint8 (H, W, 3) of
    three cells of the grid or more a side. Raises InputError for another ending, a missing package,
    or a difference.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise InputError(f"--export_model: found {path.name}, expected a name in .pt2 or .onnx")
    grid = model.grid
    height, width = (side // grid * grid for side in image.shape[:2])
    height = min(height, width - grid) or height  # not square, so that swapped sides would show
    pixels = torch.from_numpy(image[:height, :width].copy()).permute(2, 0, 1)[None].float()
    whole = WithColours(model, checkpoint).eval()
    sides = {
        2: grid * torch.export.Dim("rows", min=2),
        3: grid * torch.export.Dim("columns", min=2),
    }
    free = {"images": {0: torch.export.Dim("batch")} | sides}
    batch = torch.cat([pixels, pixels.flip(2)])
    with torch.inference_mode():
        expected = whole(pixels)
    outputs = ("probability", "probability and depth")[expected.shape[1] - 1]
    with replacing(path) as beside, torch.no_grad():
        program = torch.export.export(whole, (batch,), dynamic_shapes=free)
        if path.suffix == ".pt2":
            torch.export.save(program, beside)
            found = torch.export.load(beside).module()(pixels)
        else:
            try:
                import onnxruntime
                import onnxscript  # noqa: F401
            except ImportError as error:
                raise InputError(
                    f"--export_model: found no package {error.name}, expected it for .onnx; "
                    f"pip install onnx onnxscript onnxruntime"
                ) from error
            torch.onnx.export(
                program, dynamo=True, input_names=["images"],
                output_names=[outputs.replace(" ", "_")],
                external_data=False, verbose=False,
            ).save(beside)  # fmt: skip
            session = onnxruntime.InferenceSession(beside, providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {"images": pixels.numpy()})[0])
        largest = (found - expected).abs().max().item()
        if not largest < 1e-3:
            raise InputError(
                f"{path}: found probabilities that differ from the network's by {largest:.1e}, "
                f"expected less than 1e-3; nothing was written, please report this"
            )
    colour = checkpoint["colour"]
    before = (
        f"; bring each image to one colour before (tissue/colour.py): {colour}" if colour else ""
    )
    return (
        f"{path}: RGB 0 to 255, float32 (N, 3, H, W), H and W multiples of {grid} -> {outputs} "
        f"(N, {expected.shape[1]}, H, W); differs from the network by {largest:.1e} at most"
        + before
    )


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, glibc keeps large blocks that are freed instead of giving them back to the system.

    The network's activations are tens of megabytes; fetching zeroed pages for each of them anew
    takes as long as the network itself. Everything else is better off without: blocks of all sizes
    in one heap leave ever more gaps. Elsewhere than with glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        yield
        return
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never trimmed
    mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
    try:
        yield
    finally:
        mallopt(-4, 65536)  # the default


def versions() -> dict[str, str]:
    """Versions that a run's files and checkpoints record."""
    modules = {"torch": torch, "torchvision": torchvision, "timm": timm}
    return {"project": VERSION} | {name: str(m.__version__) for name, m in modules.items()}


# --- logging ------------------------------------------------------------------------------------


def write_json(path: Path, content: dict) -> None:
    """Write a dict as JSON; paths become text."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows of equal keys as CSV, numbers with six digits; nothing where there is no row."""
    if rows:
        texts = [{key: f"{value:.6g}" for key, value in row.items()} for row in rows]
        files.write_table(path, rows[0], texts)


def epoch_line(row: dict, epochs: int, best_dice: float) -> str:
    """An epoch's row of metrics.csv for people."""
    left = row["seconds"] / row["epoch"] * (epochs - row["epoch"])
    return (
        f"epoch {row['epoch']}/{epochs} | loss {row['train_loss']:.4f} | "
        f"val loss {row['val_loss']:.4f} | val dice {row['val_dice']:.4f} "
        f"(best {best_dice:.4f}) | lr {row['learning_rate']:.1e} | "
        f"{row['patches_per_second']:.0f} patches/s | left {duration(left)}"
    )


def log_line(run: Path, line: str) -> None:
    """Print a line and add it to a run's train.log."""
    print(line, flush=True)
    with (run / "train.log").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def log_scalars(writer: SummaryWriter, group: str, values: dict[str, float], step: int) -> None:
    """Put numbers into tensorboard as `<group>/<name>`."""
    for name, value in values.items():
        writer.add_scalar(f"{group}/{name}", value, step)


def log_augmented(writer: SummaryWriter, patches: list[tuple]) -> None:
    """Put a contact sheet into tensorboard, as the network sees them: image | mask, image | mask...

    `patches` are items of a PatchDataset.
    """
    images, masks = (torch.stack([item[part] for item in patches]) for part in (0, 1))
    masks = masks.abs()
    cells = torch.stack([to_colours(images), masks.expand(-1, 3, -1, -1)], dim=1).flatten(0, 1)
    writer.add_image("train/augmented", make_grid(cells, nrow=8, padding=4, pad_value=1.0), 0)


def to_colours(images: torch.Tensor) -> torch.Tensor:
    """Normalised images (N, 3, H, W) as RGB float32 from 0 to 1, on the CPU."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.cpu().float() * std + mean).clamp(0, 1)


def log_images(
    writer: SummaryWriter,
    images: torch.Tensor,
    predictions: torch.Tensor,
    references: torch.Tensor,
    epoch: int,
) -> None:
    """Put a grid into tensorboard, a row a patch: image | prediction | reference.

    `images` is a normalised float32 (N, 3, H, W); `predictions` (probability) and `references` are
    float32 (N, 1, H, W) from 0 to 1.
    """
    predictions, references = (
        masks.cpu().float().expand(-1, 3, -1, -1) for masks in (predictions, references)
    )
    rows = torch.stack([to_colours(images), predictions, references], dim=1)
    rows = rows.flatten(0, 1)  # (3N, 3, H, W)
    grid = make_grid(rows, nrow=3, padding=4, pad_value=1.0)
    writer.add_image("val/Ref_Prediction_GroundTruth", grid, epoch)


def log_hyperparameters(writer: SummaryWriter, settings: dict, progress: dict) -> None:
    """Put a run's settings beside its final scores, for tensorboard's HPARAMS tab."""
    values = {
        key: value if isinstance(value, int | float | bool) else str(value)
        for key, value in settings.items()
        if key != "versions"
    }
    last = progress["metrics"][-1]
    scores = {f"final/{key}": last[key] for key in ("val_dice", "val_loss", "epoch", "seconds")}
    scores["final/best_dice"] = progress["best_dice"]
    writer.add_hparams(values, scores, run_name=".")  # into the run's own folder


def duration(seconds: float) -> str:
    """Seconds for people: `48s`, `14m`, `2h05m`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f}s"
    return f"{minutes}m" if minutes < 100 else f"{minutes // 60}h{minutes % 60:02d}m"
