"""What the experiments share: dealing images into folds, training on some, scoring on others."""

import contextlib
import csv
import io
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import inference
from learning import checkpoints
from learning.predictor import Predictor
from tissue import agreement, nuclei, patches, tiling, windows
from tissue.files import InputError
from tissue.manifest import write_manifest
from tissue.masks import read_mask
from tissue.pairs import Pair
from tissue.tables import read_table

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIRM = "validation"  # in place of a fold's number
VALIDATED = 6  # patches that train.py itself validates on; the study scores whole images instead
THRESHOLD = 0.5


def deal(root: Path, folds: int, confirm: bool) -> dict[str, tuple[list[str], list[str]]]:
    """For each fold the names of the images to learn from, and of those to be scored on.

    Images of one organ stay together. With `confirm` there is one fold, the manifest's own split.
    """
    names = {split: [] for split in patches.SPLITS}
    for image in patches.read_manifest(root)["images"]:
        names[image["split"]].append(image["name"])
    if confirm:
        return {CONFIRM: (names["train"], names["val"])}
    organs = sorted({name.rpartition("_")[0] for name in names["train"]})
    if not 2 <= folds <= len(organs):
        raise InputError(
            f"--folds: found {folds}, expected 2 to {len(organs)}, the number of organs in the "
            f"names of the training images ({', '.join(organs)})"
        )
    dealt = {}
    for fold in range(folds):
        held_out = [n for n in names["train"] if n.rpartition("_")[0] in organs[fold::folds]]
        dealt[f"{fold + 1}/{folds}"] = ([n for n in names["train"] if n not in held_out], held_out)
    return dealt


def write_set(
    root: Path, sample: Path, learn: Sequence[str], held_out: Sequence[str], budget: int
) -> None:
    """Make a patch set of `budget` random patches of the images to learn from, so that an epoch is
    a training; where there are too few, they come again. The patches themselves are links.
    """
    rows = [row for split in patches.SPLITS for row in patches.read_table(root, split)]
    train = [row for row in rows if row["name"] in learn]
    val = [row for row in rows if row["name"] in held_out]
    for there in (train, val):
        random.Random(0).shuffle(there)
    train = (train * (budget // len(train) + 1))[:budget]
    val = val[:VALIDATED]
    for split, there in (("train", train), ("val", val)):
        for kind in ("rgb", "mask"):
            folder = patches.folder(sample, kind, split)
            folder.mkdir()
            for file, source in {row["file"]: row["split"] for row in there}.items():
                (folder / file).symlink_to(patches.folder(root, kind, source) / file)
    train = [row | {"split": "train"} for row in train]
    val = [row | {"split": "val"} for row in val]
    manifest = patches.read_manifest(root)
    split_of = dict.fromkeys(learn, "train") | dict.fromkeys(held_out, "val")
    manifest["images"] = [
        image | {"split": split_of[image["name"]]}
        for image in manifest["images"]
        if image["name"] in split_of
    ]
    write_manifest(sample, manifest, train + val)


def call_train(sample: Path, **settings) -> tuple[Path, float]:
    """Run train.py as a user does; its last.pt and how long it trained, seconds.

    `settings` are its flags by name, those with None are left out.
    """
    flags = {"root": sample, "log": sample / "log", "epoch": 1, **settings}
    given = {key: value for key, value in flags.items() if value is not None}
    arguments = [str(part) for key, value in given.items() for part in (f"--{key}", value)]
    subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    (run,) = Path(flags["log"]).iterdir()
    with (run / "metrics.csv").open(newline="") as file:
        (epoch,) = csv.DictReader(file)
    return run / "last.pt", float(epoch["seconds"])


def infer(
    ckpt: Path | str, images: Path, references: Path, out: Path, um: float | None = None
) -> list[dict[str, str]]:
    """Run inference.py on folders of images and their masks or label maps, without what it prints;
    the rows of counts.csv. `um` is the pixel size that it is told.
    """
    flags = ["--ckpt", ckpt, "--images", images, "--masks", references, "--image_folder", out]
    flags += ["--gpu_id", -1, *(["--pixel_size", um] if um else [])]
    with contextlib.redirect_stdout(io.StringIO()):
        inference.main(inference.parse_args(list(map(str, flags))))
    return read_table(out / "counts.csv")


def score_checkpoint(
    path: Path,
    pairs: Sequence[Pair],
    device: torch.device,
    weights: dict | None = None,
    tta: bool = False,
) -> dict[str, float]:
    """`score` of a checkpoint file, or of other weights for its network."""
    checkpoint = checkpoints.load_checkpoint(path)
    model = checkpoints.build_model(checkpoint | ({"model": weights} if weights else {}))
    return score(Predictor.of(model, checkpoint, device, tta), pairs)


def score(network: tiling.Network, pairs: Sequence[Pair]) -> dict[str, float]:
    """Scores of whole images, averaged; of contour counts the error and the bias, as fractions."""
    dices, accuracies, errors = [], [], []
    for pair in pairs:
        reference = read_mask(pair.mask)
        image = windows.open_image(pair.image)
        mask = tiling.predict_image(image, network)[0] >= THRESHOLD
        counts = agreement.pixel_counts(mask, reference)
        dices.append(agreement.dice(counts))
        accuracies.append(agreement.accuracy(counts))
        there = len(nuclei.contours(reference))
        errors.append((len(nuclei.contours(mask)) - there) / max(there, 1))
    return {
        "dice": statistics.mean(dices),
        "worst_dice": min(dices),
        "accuracy": statistics.mean(accuracies),
        "count_error": statistics.mean(map(abs, errors)),
        "count_bias": statistics.mean(errors),
    }


def form(value: float, key: str) -> str:
    """A score for people."""
    return f"{value:.1%}" if "count" in key else f"{value:.4f}"
