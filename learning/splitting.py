"""What the end of a training tells of counts, on its own images: how touching nuclei are split, and
by how much the counts of images that it did not learn are off.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
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
# How far h and confidence of --init are moved in fine-tuning, and the gain in Dice + AJI that this
# must bring (docs/lab_notes.md: few nuclei and their count alone chose splits that lost half).
NEAR_H, NEAR_CONFIDENCE, NEARLY = (0, -0.1, 0.1), (0, -0.1, -0.05, 0.05, 0.1), 0.005
# Of the splits whose count error is so near the smallest, so many are looked at.
CLOSE, LOOKED_AT = 0.01, 8
LEAST_COUNTED = 5  # images that tell how far counts of others may be off


class Counted(NamedTuple):
    """An image whose nuclei are known."""

    path: Path
    pixel_size_um: float | None
    scale: float  # how many of its pixels make one of the network's
    count: int  # nuclei; 0 where they are annotated in regions alone
    reference: Path  # label map, annotation, or mask


class Images(NamedTuple):
    """The images that are counted at the end of a training."""

    choosing: list[Counted]  # by which `choose_split` chooses
    held_out: list[Counted]  # of which `expect_error` tells
    fine_tuned: bool

    @classmethod
    def of(
        cls, roots: list[str], manifests: list[dict], config: dict, fine_tuned: bool
    ) -> "Images":
        """Those of a run on these patch sets, which trains or fine-tunes a network of that config;
        raises as `counted_images`.
        """
        splits = ("train", "val") if is_near(config, fine_tuned) else ("train",)
        return cls(
            counted_images(roots, manifests, splits),
            counted_images(roots, manifests, ("val",), masks=True),
            fine_tuned,
        )

    def settle_counts(self, best: Path, device) -> list[str]:
        """Put the split and the count error into a best.pt, by `choose_split` and `expect_error`,
        and return their lines.
        """
        line, without = choose_split(best, self.choosing, device, self.fine_tuned)
        return [line, expect_error(best, self.held_out, device, without)]


def is_near(config: dict, fine_tuned: bool) -> bool:
    """Whether the split is chosen near that of --init, and on validation images too, as of few
    images all are needed: it is of a fine-tuned network with instances.
    """
    return fine_tuned and config.get("instances", False)


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
                counted.append(count_image(Path(root), entry, manifest["pixel_size_um"]))
            except (InputError, OSError) as error:
                faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    return [one for one in counted if one]


def count_image(root: Path, entry: dict, pixel_size_um: float | None) -> Counted | None:
    """A training image as the manifest has it, with its nuclei counted, for a set of that pixel
    size; None where it is big or not there. Raises InputError for a label map that does not fit.
    """
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
    return Counted(path, entry["pixel_size_um"], scale, count, reference)


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
    best: Path, counted: list[Counted], device, fine_tuned: bool = False
) -> tuple[str, dict[Path, nuclei.Split]]:
    """Put into best.pt the parameters of nuclei.Split with the smallest count error on the training
    images of `counted_images` or, where it `is_near` that of --init, those with the highest Dice +
    AJI on all of them; and return a line that says which and why, and of the latter what would have
    been chosen without each of the images.

    Whatever fails, best.pt keeps what it has: a training is not lost by it.
    """
    without = {}
    checkpoint = load_checkpoint(best)
    kept = "that of --init" if fine_tuned else "the default"
    default = f"split {nuclei.Split(**checkpoint['split'])}, {kept}"
    near = is_near(checkpoint["config"], fine_tuned)
    image = "image" if near else "training image"
    if not counted:
        return f"{default} (no {image} has a label map to choose on)", without
    try:
        if near:
            split, error, without = near_split(checkpoint, counted, device)
        else:
            split, error = best_split(checkpoint, counted, device)
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        return f"{default} (it could not be chosen: {one_line(error):.300})", without
    if math.isnan(error):
        return f"{default} (no label map of a{'n' * near} {image} has nuclei to choose on)", without
    save_checkpoint(best, checkpoint | {"split": split._asdict()})
    said = f"{1 - error / 2:.4f} mean of Dice and AJI" if near else f"count error {error:.1%}"
    return f"split {split}, chosen on {len(counted)} {image}s with label maps, {said}", without


def best_split(checkpoint: dict, counted: list[Counted], device) -> tuple[nuclei.Split, float]:
    """The split with the smallest count error (`nuclei.count_errors`) on what the network finds in
    the images of `counted_images`, and that error, NaN without nuclei. Of a network with instances,
    of those that count about as well the one with the highest Dice + AJI: many count alike, by
    nuclei torn in one place and merged in another.
    """
    network, found, sizes = predict(checkpoint, counted, device)
    masks, counts = [segmented > 0 for segmented in found], [one.count for one in counted]
    default = nuclei.default_split(network.has_depth)
    depths = found if network.has_depth else None
    errors = nuclei.count_errors(masks, counts, sizes, default, depths)
    best = min(errors, key=errors.get, default=default)
    if depths and errors:
        close = [split for split in errors if errors[split] <= errors[best] + CLOSE]
        best = default if default in close else best
        close = dict.fromkeys([best, *sorted(close, key=errors.get)[:LOOKED_AT]])
        best, _ = _best_of(list(agreements(counted, depths, sizes, close).values()), best)
    return best, errors.get(best, math.nan)


def near_split(
    checkpoint: dict, counted: list[Counted], device
) -> tuple[nuclei.Split, float, dict[Path, nuclei.Split]]:
    """The split near the checkpoint's with the highest mean of Dice + AJI on these images, what
    that lacks to 2, NaN without nuclei, and the one that is best on all but each of the images; the
    checkpoint's, unless another gains NEARLY.
    """
    network, depths, sizes = predict(checkpoint, counted, device)
    split = network.split
    tried = dict.fromkeys(
        split._replace(h=_share(split.h + h), confidence=_share(split.confidence + confidence))
        for h in NEAR_H
        for confidence in NEAR_CONFIDENCE
    )
    scores = agreements(counted, depths, sizes, tried)
    best, lack = _best_of(list(scores.values()), split)
    without = {one.path: split for one in counted}
    for path in scores:
        others = [its for other, its in scores.items() if other != path]
        without[path], _ = _best_of(others, split)
    return best, lack, without


def _share(value):
    return min(max(value, 0.0), 1.0)


def agreements(
    counted: list[Counted], depths: list, sizes: list, splits: Iterable[nuclei.Split]
) -> dict[Path, dict[nuclei.Split, float]]:
    """Dice + AJI of each of the images that has nuclei, by each split."""
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
                counts = agreement.pixel_counts(labels > 0, truth > 0)
                score = agreement.dice(counts) + agreement.aji(agreement.overlap(labels, truth))
                scores[one.path][split] = score
    return scores


def _best_of(scores, split):
    """The split with the highest mean of an image's scores each, or `split`, and what it lacks."""
    if not scores:
        return split, math.nan
    means = {tried: statistics.mean(its[tried] for its in scores) for tried in scores[0]}
    best = max(means, key=means.get)
    best = best if means[best] > means[split] + NEARLY else split
    return best, 2 - means[best]


def expect_error(best: Path, held_out: list[Counted], device, without: dict | None = None) -> str:
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
        checkpoint = load_checkpoint(best)
        network, found, sizes = predict(checkpoint, known, device)
        errors = []
        for one, depth, um in zip(known, found, sizes, strict=True):
            depths = depth if network.has_depth else None
            split = without.get(one.path, network.split)
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


def predict(checkpoint: dict, counted: list[Counted], device) -> tuple[Predictor, list, list]:
    """The network, what it finds in these images (`depth.segment`), and their pixel sizes."""
    network = Predictor.of(build_model(checkpoint), checkpoint, device)
    found, sizes = [], []
    for one in counted:
        image = open_image(one.path)
        outputs = predict_image(image, network.at_scale(one.scale))
        image.close()
        found.append(segment(outputs, network.threshold))
        sizes.append(one.pixel_size_um or network.pixel_size_um)
    return network, found, sizes
