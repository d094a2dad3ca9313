"""What two or more of the scripts share: scores, tables, log lines, tensorboard and versions."""

import json
from pathlib import Path

import timm
import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from model import IMAGENET_MEAN, IMAGENET_STD
from tissue import files
from tissue.depth import NOT_ANNOTATED
from tissue.files import replacing

VERSION = "1.0.0"


# --- scores -------------------------------------------------------------------------------------


def pixel_counts(
    prediction: torch.Tensor, reference: torch.Tensor, known: torch.Tensor | None = None
) -> torch.Tensor:
    """True positive, false positive, false negative and true negative pixels: int64 (4,).

    All arguments are bool tensors of one shape on one device: `prediction` and `reference` True
    where there is a nucleus, `known` where a pixel counts, if not all do. Counts of batches, images
    and processes add up; `agreement.scores` divides their sum once.
    """
    pixels = prediction.numel()
    if known is not None:
        prediction, reference, pixels = prediction & known, reference & known, known.sum()
    hits = (prediction & reference).sum()
    predicted, present = prediction.sum(), reference.sum()
    false_positive, false_negative = predicted - hits, present - hits
    true_negative = pixels - hits - false_positive - false_negative
    return torch.stack([hits, false_positive, false_negative, true_negative])


def versions() -> dict[str, str]:
    """Versions that a run's files and checkpoints record."""
    modules = {"torch": torch, "torchvision": torchvision, "timm": timm}
    return {"project": VERSION} | {name: str(m.__version__) for name, m in modules.items()}


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
    masks = with_grey(masks, masks.abs())
    cells = torch.stack([to_colours(images), masks.expand(-1, 3, -1, -1)], dim=1).flatten(0, 1)
    writer.add_image("train/augmented", make_grid(cells, nrow=8, padding=4, pad_value=1.0), 0)


def to_colours(images: torch.Tensor) -> torch.Tensor:
    """Normalised images (N, 3, H, W) as RGB float32 from 0 to 1, on the CPU."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.cpu().float() * std + mean).clamp(0, 1)


def with_grey(masks: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Masks as they are `shown`, float32, grey where the `masks` of a PatchDataset say nothing."""
    return torch.where(masks == NOT_ANNOTATED, 0.5, shown)


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


def log_hyperparameters(
    writer: SummaryWriter, settings: dict, last: dict, best_dice: float
) -> None:
    """Put a run's settings beside its final scores, for tensorboard's HPARAMS tab.

    `last` is the last row of metrics.csv.
    """
    values = {
        key: value if isinstance(value, int | float | bool) else str(value)
        for key, value in settings.items()
        if key != "versions"
    }
    scores = {f"final/{key}": last[key] for key in ("val_dice", "val_loss", "epoch", "seconds")}
    scores["final/best_dice"] = best_dice
    writer.add_hparams(values, scores, run_name=".")  # into the run's own folder


def duration(seconds: float) -> str:
    """Seconds for people: `48s`, `14m`, `2h05m`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f}s"
    return f"{minutes}m" if minutes < 100 else f"{minutes // 60}h{minutes % 60:02d}m"
