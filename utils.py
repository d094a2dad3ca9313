"""What two or more of the scripts share: transforms, scores, checkpoints, device, logging."""

import os
import pickle
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network

import albumentations as A
import numpy as np
import torch
import torchvision
from albumentations.pytorch import ToTensorV2
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from model import UNet
from tissue.files import InputError, replacing

VERSION = "0.1.0"
CHECKPOINT_VERSION = 1
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# --- transforms ---------------------------------------------------------------------------------


def transform(split: str) -> A.Compose:
    """What happens to a patch before the network sees it, for the split "train" or "val".

    Called with `image` RGB uint8 (H, W, 3) and `mask` (H, W), it returns a dict with `image`
    float32 (3, H, W), normalised by ImageNet's mean and standard deviation, and `mask` (H, W).
    "train" flips at random and changes brightness and contrast by up to 0.3.
    """
    augment = [
        A.HorizontalFlip(p=0.5),
        A.VerticalFlip(p=0.5),
        A.RandomBrightnessContrast(brightness_limit=0.3, contrast_limit=0.3, p=0.5),
    ]
    to_input = [A.Normalize(IMAGENET_MEAN, IMAGENET_STD), ToTensorV2()]
    return A.Compose({"train": augment + to_input, "val": to_input}[split])


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


# --- device, precision, seeds -------------------------------------------------------------------


def choose_device(gpu_id: int) -> torch.device:
    """The GPU of that number; the CPU for -1 and, with a line that says so, where no GPU is.

    Raises InputError for a number beyond the last GPU.
    """
    if gpu_id < 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        print(f"No GPU here: --gpu_id {gpu_id} means the CPU.")
        return torch.device("cpu")
    if gpu_id >= torch.cuda.device_count():
        raise InputError(
            f"--gpu_id: found {gpu_id}, expected 0 to {torch.cuda.device_count() - 1} "
            f"(or -1 for the CPU)"
        )
    torch.cuda.set_device(gpu_id)
    return torch.device("cuda", gpu_id)


def choose_precision(device: torch.device) -> torch.dtype:
    """The number format in which this device multiplies fast without harm to training: bfloat16 on
    CPUs with AMX or AVX512-BF16 and on GPUs since Ampere, else float32.
    """
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, numpy and torch (weights of a new network among them)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def warm_ema(decay: float) -> Callable:
    """An averaging function for AveragedModel: exponential, with a decay that grows to `decay`.

    After n updates the decay is at most (1 + n) / (10 + n), so that the first weights, which know
    nothing, are forgotten soon (the rule of TensorFlow's ExponentialMovingAverage, `num_updates`).
    """

    @torch.no_grad()
    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], updates) -> None:
        weight = 1 - min(decay, (1 + int(updates)) / (10 + int(updates)))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, weight)
        else:  # batch norm's counters
            torch._foreach_copy_(averaged, current)

    return average


# --- checkpoints --------------------------------------------------------------------------------


def save_checkpoint(path: Path | str, checkpoint: dict) -> None:
    """Write a checkpoint, a dict of plain types and tensors, in one move."""
    with replacing(path) as beside:
        torch.save(checkpoint, beside)


def load_checkpoint(path: Path | str) -> dict:
    """A checkpoint with its tensors on the CPU; nothing in the file is executed.

    A bare U-Net state dict, as the pipeline's first version wrote, gets the keys that inference
    needs: its width is read from the tensors, and its channel order is "bgr", because that version
    trained on patches with swapped colours. Raises FileNotFoundError, and InputError for a file
    that is damaged, no checkpoint, or would execute code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, expected a checkpoint; see --ckpt")
    advice = "expected a checkpoint by train.py; choose another file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; the errors say more
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise InputError(
                f"{path}: found objects that would execute code when loaded (refused), {advice}"
            ) from error
        raise InputError(f"{path}: found no checkpoint or a damaged one, {advice}") from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise InputError(f"{path}: found no checkpoint or a damaged one, {advice}") from error
    if isinstance(checkpoint, dict) and "format_version" in checkpoint:
        if checkpoint["format_version"] != CHECKPOINT_VERSION:
            raise InputError(
                f"{path}: found checkpoint format {checkpoint['format_version']}, expected "
                f"{CHECKPOINT_VERSION}; use the version of this project that wrote it"
            )
        return checkpoint
    if not isinstance(checkpoint, dict) or "conv1.conv.0.weight" not in checkpoint:
        raise InputError(f"{path}: found a file without a U-Net's weights, {advice}")
    return {
        "format_version": CHECKPOINT_VERSION,
        "model": checkpoint,
        "config": {"arch": "unet", "dimensions": len(checkpoint["conv1.conv.0.weight"])},
        "normalisation": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        "channel_order": "bgr",
        "threshold": 0.5,
    }


def build_model(checkpoint: dict, path: Path | str) -> UNet:
    """The network of a checkpoint, with its weights; `path` names it in the error (InputError)."""
    config = dict(checkpoint["config"])
    networks = {"unet": UNet}
    try:
        model = networks[config.pop("arch")](**config)
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: found weights that do not fit the network they name ({reason:.200}), "
            f"expected a checkpoint by this project's train.py; choose another file"
        ) from error
    return model


def predictor(model: UNet, checkpoint: dict, device: torch.device) -> Callable:
    """A function from RGB uint8 tiles (N, H, W, 3) to nucleus probability float32 (N, H, W).

    It does all that the checkpoint asks for: normalisation and order of the colour channels.
    """
    model = model.to(device, memory_format=torch.channels_last).eval()
    precision = choose_precision(device)
    mean, std = (
        torch.tensor(checkpoint["normalisation"][key], device=device).view(3, 1, 1) * 255
        for key in ("mean", "std")
    )
    swapped = checkpoint["channel_order"] == "bgr"

    @torch.inference_mode()
    def predict(tiles: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2)  # (N, 3, H, W), NHWC inside
        batch = (batch.flip(1) if swapped else batch).float().sub(mean).div(std)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(batch.contiguous(memory_format=torch.channels_last))
        return logits.float().sigmoid()[:, 0].cpu().numpy()

    return predict


def versions() -> dict[str, str]:
    """Versions that a run's files and checkpoints record."""
    modules = {"torch": torch, "torchvision": torchvision}
    return {"project": VERSION} | {name: str(m.__version__) for name, m in modules.items()}


def typical_pixel_size(manifest: dict) -> float | None:
    """Median pixel size of a patch set's training images, micrometres; None where none is known."""
    sizes = [image["pixel_size_um"] for image in manifest["images"] if image["split"] == "train"]
    known = [size for size in sizes if size is not None]
    return statistics.median(known) if known else None


# --- logging ------------------------------------------------------------------------------------


def make_run_folder(log: Path | str, name: str) -> Path:
    """Make and return `<log>/<YYYYmmddHHMMSS>[-<name>]`; waits for a free second."""
    while True:
        run = Path(log) / (time.strftime("%Y%m%d%H%M%S") + (f"-{name}" if name else ""))
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            time.sleep(0.1)


def log_line(path: Path | str, line: str) -> None:
    """Print a line and add it to a log file."""
    print(line, flush=True)
    with open(path, "a") as file:
        file.write(line + "\n")


def log_scalars(writer: SummaryWriter, group: str, values: dict[str, float], step: int) -> None:
    """Put numbers into tensorboard as `<group>/<name>`."""
    for name, value in values.items():
        writer.add_scalar(f"{group}/{name}", value, step)


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
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = (images.cpu().float() * std + mean).clamp(0, 1)
    predictions, references = (
        masks.cpu().float().expand(-1, 3, -1, -1) for masks in (predictions, references)
    )
    rows = torch.stack([images, predictions, references], dim=1).flatten(0, 1)  # (3N, 3, H, W)
    grid = make_grid(rows, nrow=3, padding=4, pad_value=1.0)
    writer.add_image("val/Ref_Prediction_GroundTruth", grid, epoch)


def duration(seconds: float) -> str:
    """Seconds for people: `48s`, `14m`, `2h05m`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f}s"
    return f"{minutes}m" if minutes < 100 else f"{minutes // 60}h{minutes % 60:02d}m"


# --- scripts ------------------------------------------------------------------------------------


def run_script(main: Callable, args) -> None:
    """Call `main(args)`; bad input and files that cannot be read or written end the script with
    one line and exit code 2, Ctrl-C with exit code 130. Any other exception is a defect and keeps
    its traceback.
    """
    try:
        main(args)
    except (InputError, OSError) as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> int:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return 2
