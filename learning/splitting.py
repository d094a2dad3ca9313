"""What the end of a training tells of counts, on its own images: how touching nuclei are split, and
by how much the counts of images that it did not learn are off.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from learning.checkpoints import build_model, load_checkpoint, save_checkpoint
from learning.predictor import Predictor
from tissue import agreement, nuclei
from tissue.annotations import open_annotation
from tissue.depth import segment
from tissue.files import InputError, one_line
from tissue.masks import ANNOTATION_FOLDER, read_mask
from tissue.masks import read as read_labels
from tissue.pixel_size import scale_of
from tissue.splits import spread
from tissue.tiling import predict_image
from tissue.windows import open_image

MOST_COUNTED = 32  # images of a set by which the split of touching nuclei is chosen
# What is tried of h and confidence, how far those of --init are moved in fine-tuning, and what must
# be gained (docs/lab_notes.md: few nuclei and their count alone chose splits that lost half).
HS, CONFIDENCES = (0.05, 0.1, 0.2, 0.3), (0.0, 0.2, 0.3, 0.4, 0.5, 0.6)
NEAR_H, NEAR_CONFIDENCE, NEARLY = (0, -0.1, 0.1), (0, -0.1, -0.05, 0.05, 0.1), 0.005
LEAST_COUNTED = 5  # images that were not learned which tell of others: a split, an error of counts


class Counted(NamedTuple):
    """An image whose nuclei are known."""

    path: Path
    bits: int | None  # of the samples of its set, where those have 16
    pixel_size_um: float | None
    scale: float  # how many of its pixels make one of the network's
    count: int  # nuclei; 0 where they are annotated in regions alone
    reference: Path  # label map, annotation, or mask


class Images(NamedTuple):
    """The images that are counted at the end of a training."""

    choosing: list[Counted]  # by which `choose_split` chooses
    held_out: list[Counted]  # of which `expect_error` tells
    start: nuclei.Split | None  # that of --init in a fine-tuning

    @classmethod
    def of(
        cls, roots: list[str], manifests: list[dict], config: dict, origin: dict | None
    ) -> "Images":
        """Those of a run on these patch sets, which trains a network of that config or fine-tunes
        what it began with, as runs.Origin has it; raises as `counted_images`.
        """
        splits, start = ("train",), origin and nuclei.Split(**origin["split"])
        if config.get("instances", False):  # it is surer of what it has learned
            splits = ("train", "val") if origin else ("val",)
        choosing = counted_images(roots, manifests, splits)
        if splits == ("val",) and len(choosing) < LEAST_COUNTED:
            choosing = []
        return cls(choosing, counted_images(roots, manifests, ("val",), masks=True), start)

    def settle_counts(self, best: Path, device) -> list[str]:
        """Put the split and the count error into a best.pt, by `choose_split` and `expect_error`,
        and return their lines.
        """
        predictions = Predictions(load_checkpoint(best), device)
        line, without = choose_split(best, self.choosing, predictions, self.start)
        return [line, expect_error(best, self.held_out, predictions, without)]


class Predictions:
    """What the network of a checkpoint finds in images, each of which is predicted once."""

    def __init__(self, checkpoint: dict, device):
        self.checkpoint, self._device = checkpoint, device
        self._found = {}

    @cached_property
    def network(self) -> Predictor:
        return Predictor.of(build_model(self.checkpoint), self.checkpoint, self._device)

    def of(self, counted: list[Counted]) -> tuple[list, list]:
        """What is found in these images (`depth.segment`), and their pixel sizes."""
        found = [self._of_image(one) for one in counted]
        return found, [one.pixel_size_um or self.network.pixel_size_um for one in counted]

    def _of_image(self, one):
        if one.path not in self._found:
            image = open_image(one.path, bits=one.bits)
            outputs = predict_image(image, self.network.at_scale(one.scale))
            image.close()
            self._found[one.path] = segment(outputs, self.network.threshold)
        return self._found[one.path]


def counted_images(
    roots: list[str], manifests: list[dict], splits=("train",), masks: bool = False
) -> list[Counted]:
    """The images of these `splits` that have a label map, or with `masks` a mask alone, and are
    small enough for the memory, of each set MOST_COUNTED at most, spread over it. Raises InputError
    with all faults of their files.
    """
    counted, faults = [], []
    for root, manifest in zip(roots, manifests, strict=True):
        wanted = [i for i in manifest["images"] if i["split"] in splits and (masks or i["labels"])]
        for entry in spread(wanted, MOST_COUNTED):
            try:
                counted.append(count_image(Path(root), entry, manifest))
            except (InputError, OSError) as error:
                faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    return [one for one in counted if one]


def count_image(root: Path, entry: dict, manifest: dict) -> Counted | None:
    """An image as the manifest of its set has it in `entry`, with its nuclei counted; None where it
    is big or not there. Raises InputError for a label map that does not fit.
    """
    pixel_size_um = manifest["pixel_size_um"]
    path, reference = root / entry["image"], root / (entry["labels"] or entry["mask"])
    if not (path.is_file() and reference.is_file()):  # patches alone were brought here
        return None
    image = open_image(path)
    if image.is_big:
        return None
    scale = scale_of(entry["pixel_size_um"], pixel_size_um, path)
    if entry["labels"]:
        labels, known = read_reference(reference, (image.height, image.width), path)
    else:
        um, known = entry["pixel_size_um"] or pixel_size_um, None
        labels = nuclei.nuclei(read_mask(reference), um, nuclei.REFERENCE_SPLIT)
    count = int(labels.max()) if known is None else 0
    return Counted(path, manifest["bits"], entry["pixel_size_um"], scale, count, reference)


def read_reference(
    label_map: Path, shape: tuple[int, int], image: Path
) -> tuple[np.ndarray, np.ndarray | None]:
    """The nuclei of a label map or annotation of an image of (height, width) pixels, int32 (H, W),
    1 to n, and where they are annotated, bool (H, W), or None for everywhere.
    """
    if label_map.parent.name == ANNOTATION_FOLDER:
        annotation = open_annotation(label_map, shape)
        known = annotation.known(0, 0, *shape)
        return nuclei.reference_labels(annotation.numbers(0, 0, *shape)), known
    mask = read_labels(label_map)
    if mask.foreground.shape != shape:
        found = " x ".join(map(str, mask.foreground.shape))
        raise InputError(
            f"{label_map}: found labels of {found} pixels (height x width), expected "
            f"{shape[0]} x {shape[1]} as in {image}; replace or remove it"
        )
    if mask.labels is None:  # it was when the set was cut
        raise InputError(f"{label_map}: found a mask, expected a label map, as before")
    return nuclei.reference_labels(mask.labels), None


def choose_split(
    best: Path,
    counted: list[Counted],
    predictions: Predictions,
    start: nuclei.Split | None = None,
) -> tuple[str, dict[Path, nuclei.Split]]:
    """Put into best.pt the parameters of nuclei.Split that are best on the images of
    `counted_images`, by `agreed_split` or, of a network without instances, `counted_split`; and
    return a line that says which and why, and of the former what would have been chosen without
    each of the images. `start` is the split of --init in a fine-tuning.

    Whatever fails, best.pt keeps what it has: a training is not lost by it.
    """
    checkpoint, without = predictions.checkpoint, {}
    kept = "that of --init" if start else "the default"
    default = f"split {nuclei.Split(**checkpoint['split'])}, {kept}"
    instances = checkpoint["config"].get("instances", False)
    if not counted:
        why = "no image has a label map to choose on"
        if instances and not start:
            why = f"{LEAST_COUNTED} validation images with label maps would choose it"
        return f"{default} ({why})", without
    try:
        if instances:
            split, said, without = agreed_split(predictions, counted, start)
        else:
            split, said = counted_split(predictions, counted)
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        return f"{default} (it could not be chosen: {one_line(error):.300})", without
    if not said:
        return f"{default} (no label map has nuclei to choose on)", without
    save_checkpoint(best, checkpoint | {"split": split._asdict()})
    return f"split {split}, chosen on {len(counted)} images with label maps: {said}", without


def counted_split(predictions: Predictions, counted: list[Counted]) -> tuple[nuclei.Split, str]:
    """The split with the smallest count error (`nuclei.count_errors`) of a network without
    instances on the images of `counted_images`, and what that is; nothing without nuclei.
    """
    masks, sizes = predictions.of(counted)
    errors = nuclei.count_errors(masks, [one.count for one in counted], sizes)
    split = min(errors, key=errors.get, default=nuclei.PREDICTION_SPLIT)
    return split, f"count error {errors[split]:.1%}" if errors else ""


def agreed_split(
    predictions: Predictions, counted: list[Counted], start: nuclei.Split | None = None
) -> tuple[nuclei.Split, str, dict[Path, nuclei.Split]]:
    """The default with the h and confidence by which the nuclei of a network with instances agree
    best with these images, by the mean of Dice + AJI - count error; the default itself, unless that
    gains NEARLY. In a fine-tuning those near its `start` by Dice + AJI, as few nuclei are known.

    Returns it, its scores, nothing without nuclei, and what is best on all but each of the images.
    """
    depths, sizes = predictions.of(counted)
    default, pairs = nuclei.INSTANCE_SPLIT, product(HS, CONFIDENCES)
    if start:  # not that of best.pt, which an interrupted end of the run may have chosen
        default, steps = start, product(NEAR_H, NEAR_CONFIDENCE)
        pairs = ((_share(default.h + h), _share(default.confidence + c)) for h, c in steps)
    tried = [default, *(default._replace(h=h, confidence=c) for h, c in pairs)]
    scores = agreements(counted, depths, sizes, dict.fromkeys(tried))
    every = list(scores.values())
    best = _best_of(every, default, bool(start))
    without = {one.path: default for one in counted}
    for path in scores:
        others = [its for other, its in scores.items() if other != path]
        without[path] = _best_of(others, default, bool(start))
    if not every:
        return best, "", without
    dice, aji, error = _means(every, best)
    counts = f", count error {error:.1%}" if any(one.count for one in counted) else ""
    return best, f"Dice {dice:.4f}, AJI {aji:.4f}{counts}", without


def _share(value):
    return min(max(value, 0.0), 1.0)


def agreements(
    counted: list[Counted], depths: list, sizes: list, splits: Iterable[nuclei.Split]
) -> dict[Path, dict[nuclei.Split, tuple[float, float, float]]]:
    """Dice, AJI and relative count error of each of the images that has nuclei, by each split; an
    error of 0 where its nuclei are annotated in regions alone.
    """
    alike = defaultdict(list)  # but for the confidence
    for split in splits:
        alike[split._replace(confidence=0.0)].append(split)
    scores = {}
    for one, depth, um in zip(counted, depths, sizes, strict=True):
        truth, known = read_reference(one.reference, depth.shape, one.path)
        known = np.ones(depth.shape, bool) if known is None else known
        truth = truth * known
        if not truth.any():
            continue
        scores[one.path] = {}
        for all_kept, its in alike.items():
            found = nuclei.find_nuclei(depth > 0, um, all_kept, depth)
            for split in its:
                kept = np.append(False, found.confidence >= split.confidence)
                labels = found.labels * (kept[found.labels] & known)
                dice = agreement.dice(agreement.pixel_counts(labels > 0, truth > 0))
                aji = agreement.aji(agreement.overlap(labels, truth))
                error = abs(int(kept.sum()) - one.count) / one.count if one.count else 0.0
                scores[one.path][split] = dice, aji, error
    return scores


def _means(scores, split):
    """Of the scores of images, by split, the means for one split."""
    return np.mean([its[split] for its in scores], axis=0).tolist()


def _best_of(scores, default, fine_tuned):
    """The split with which the scores of images are best, or the `default`."""
    if not scores:
        return default
    weights = (1, 1, 0) if fine_tuned else (1, 1, -1)
    values = {split: np.dot(_means(scores, split), weights) for split in scores[0]}
    best = max(values, key=values.get)
    return best if values[best] > values[default] + NEARLY else default


def expect_error(
    best: Path, held_out: list[Counted], predictions: Predictions, without: dict | None = None
) -> str:
    """Put into best.pt the mean relative count error on images that the network did not learn, and
    how many they are, if these are LEAST_COUNTED; and return a line that says it, or why there is
    none, as `choose_split` does.

    `without` has the split for an image by which that of best.pt was chosen, as `choose_split`.
    """
    without = without or {}
    known = [one for one in held_out if one.count]
    if not known:
        return "counts: no validation image is there whose nuclei could be counted"
    try:
        checkpoint, errors = load_checkpoint(best), []  # with the split that was chosen
        default = nuclei.Split(**checkpoint["split"])
        for one, depth, um in zip(known, *predictions.of(known), strict=True):
            depths = depth if predictions.network.has_depth else None
            split = without.get(one.path, default)
            count = nuclei.nuclei(depth > 0, um, split, depths).max()
            errors.append(abs(int(count) - one.count) / one.count)
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        return f"counts: validation images failed ({one_line(error):.300})"
    expected = {"mean": statistics.mean(errors), "images": len(errors)}
    line = f"counts: off by {expected['mean']:.1%} in the mean on {len(errors)} validation images"
    if len(errors) < LEAST_COUNTED:
        return f"{line}, too few to expect it of others"
    save_checkpoint(best, checkpoint | {"count_error": expected})
    return line
