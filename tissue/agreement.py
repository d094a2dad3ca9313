"""How predicted nuclei agree with a reference: overlap, counts, and where the error comes from.

Everything is computed from one sparse table of how many pixels each predicted nucleus shares with
each reference nucleus. Label maps are whole numbers (H, W), 0 the background; numbers left out are
no nuclei. Numbers much larger than the image has nuclei cost memory: `nuclei.reference_labels`.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

from tissue.files import InputError

# What became of a nucleus: the codes in `Errors.prediction` and `Errors.reference`.
CLASSES = ("background", "matched", "missed", "spurious", "merged", "split")
MATCHED, MISSED, SPURIOUS, MERGED, SPLIT = range(1, len(CLASSES))


class Overlap(NamedTuple):
    """Which nuclei share pixels, sorted by predicted, then by reference label."""

    predicted: np.ndarray  # labels of each pair, int (n,)
    reference: np.ndarray
    shared: np.ndarray  # pixels of each pair, int (n,)
    predicted_area: np.ndarray  # pixels by label, int (highest label + 1,), 0 for the background
    reference_area: np.ndarray

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each pair, float (n,)."""
        return self.shared / self.union

    @property
    def union(self) -> np.ndarray:
        """Pixels of each pair's union, int (n,)."""
        areas = self.predicted_area[self.predicted] + self.reference_area[self.reference]
        return areas - self.shared


class Errors(NamedTuple):
    """What became of each nucleus, as indices of CLASSES by label, and the numbers of each."""

    prediction: np.ndarray  # uint8 (highest label + 1,)
    reference: np.ndarray
    counts: dict[str, int]


def pixel_counts(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """True positive, false positive, false negative and true negative pixels: int64 (4,).

    Both arguments are bool (H, W). Counts of tiles and images add up; the scores below divide their
    sum once, be it an array or a tensor.
    """
    hits = np.count_nonzero(prediction & reference)
    predicted, present = np.count_nonzero(prediction), np.count_nonzero(reference)
    return np.array(
        [hits, predicted - hits, present - hits, prediction.size - predicted - present + hits]
    )


def accuracy(counts: np.ndarray) -> float:
    """Correct pixels / pixels, from `pixel_counts`."""
    true_positive, false_positive, false_negative, true_negative = counts.tolist()
    correct = true_positive + true_negative
    return correct / (correct + false_positive + false_negative)


def dice(counts: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) from `pixel_counts`; 1 where both masks are empty (Dice 1945)."""
    true_positive, false_positive, false_negative, _ = counts.tolist()
    pixels = 2 * true_positive + false_positive + false_negative
    return 2 * true_positive / pixels if pixels else 1.0


def iou(counts: np.ndarray) -> float:
    """TP / (TP + FP + FN) from `pixel_counts`; 1 where both masks are empty (Jaccard 1912)."""
    true_positive, false_positive, false_negative, _ = counts.tolist()
    pixels = true_positive + false_positive + false_negative
    return true_positive / pixels if pixels else 1.0


def scores(counts: np.ndarray) -> dict[str, float]:
    """Accuracy, Dice and IoU by these names, from `pixel_counts`."""
    return {"accuracy": accuracy(counts), "dice": dice(counts), "iou": iou(counts)}


def overlap(prediction: np.ndarray, reference: np.ndarray) -> Overlap:
    """The table of shared pixels of two label maps (H, W); InputError if their sizes differ."""
    return overlap_of_tiles([(prediction, reference)])


def overlap_of_tiles(tiles: Iterable[tuple[np.ndarray, np.ndarray]]) -> Overlap:
    """`overlap` of two label maps that come in tiles, as pairs of arrays (h, w)."""
    areas, found = (_Sums(), _Sums()), []
    for pair in tiles:
        prediction, reference = pair
        if prediction.shape != reference.shape:
            sizes = f"prediction {prediction.shape} and reference {reference.shape}"
            raise InputError(f"label maps: found {sizes}, expected one height and width")
        for area, labels in zip(areas, pair, strict=True):
            area.add(labels)
        both = (prediction > 0) & (reference > 0)
        place = prediction[both], reference[both]
        found.append(_added(np.ones(len(place[0]), np.int64), place, areas))
    columns = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    row, column, shared = _added(columns[2], columns[:2], areas)
    return Overlap(row, column, shared, areas[0].total, areas[1].total)


def _added(pixels, place, areas):
    """(predicted, reference, pixels) of each pair of labels, pixels of one pair added up."""
    table = csr_matrix((pixels, tuple(place)), [len(area.total) for area in areas])
    table.sort_indices()
    table = table.tocoo()
    return table.row, table.col, table.data


class _Sums:
    """Pixels of each label, but for the background's, of a label map that comes in tiles."""

    def __init__(self):
        self.total = np.zeros(1, np.int64)

    def add(self, labels):
        area = np.bincount(labels.ravel(), minlength=len(self.total))
        area[: len(self.total)] += self.total
        area[0] = 0
        self.total = area


def aji(table: Overlap) -> float:
    """Aggregated Jaccard index, 0 to 1 (Kumar et al. 2017, IEEE TMI 36:1550, algorithm 1).

    Each reference nucleus takes the predicted one with the highest IoU, of equal ones the lowest
    label; predicted nuclei that none has taken count as error. Both without nuclei: 1.
    """
    order = np.lexsort((table.predicted, -table.iou, table.reference))
    taken, first = np.unique(table.reference[order], return_index=True)
    best = order[first]
    alone = table.reference_area.sum() - table.reference_area[taken].sum()
    unused = table.predicted_area.copy()
    unused[table.predicted[best]] = 0
    union = table.union[best].sum() + alone + unused.sum()
    return float(table.shared[best].sum() / union) if union else 1.0


def panoptic_quality(table: Overlap) -> dict[str, float]:
    """`pq`, `dq` and `sq` (Kirillov et al. 2019, CVPR, equation 1), 0 to 1.

    Two nuclei match if their IoU is above 0.5, which each can have with one other only. dq =
    matches / mean number of nuclei of both is the F1 score at IoU 0.5, sq the mean IoU of matches
    (0 without any), pq their product. Both without nuclei: all 1.
    """
    found = [np.count_nonzero(area) for area in (table.predicted_area, table.reference_area)]
    if not any(found):
        return {"pq": 1.0, "dq": 1.0, "sq": 1.0}
    iou = table.iou[table.iou > 0.5]
    dq = 2 * len(iou) / sum(found)
    sq = float(iou.mean()) if len(iou) else 0.0
    return {"pq": dq * sq, "dq": dq, "sq": sq}


def border_zone(reference: np.ndarray, width: int) -> np.ndarray:
    """Pixels near the border of a nucleus, where annotators are not sure: bool (H, W).

    Those that the nucleus gains or loses where it is dilated or eroded by an ellipse of 2 `width` +
    1 pixels. With them taken out of both label maps, scores are those of NucEval's border zone
    (Mahbod et al. 2026, arXiv:2605.03144); nuclei that lie in the zone are none any more.
    """
    ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width + 1,) * 2)
    labels = reference.astype(np.float64)  # of all that OpenCV dilates, what holds any number
    return cv2.dilate(labels, ellipse) != cv2.erode(labels, ellipse)


def count_agreement(counts: Sequence[int], reference: Sequence[int]) -> dict[str, float]:
    """How the counts of images agree with their reference counts, as a dict of numbers.

    `images`; `mean_absolute_error`, in nuclei; `mean_relative_error`, |difference| / reference
    averaged over images with any nuclei; `bias`, the mean difference count - reference, and
    `lower` and `upper`, its 95 % limits of agreement, bias -+ 1.96 sample standard deviations
    (Bland & Altman 1986, Lancet 327:307); `r2`, 1 - sum of squared differences / sum of squares of
    the reference about its mean: how well the line of identity explains the counts. It is below the
    squared correlation, which a count that is off by a constant factor does not lower, and below 0
    if the reference's mean would be the better guess. What the images are too few for is NaN.
    """
    if len(counts) != len(reference):
        raise ValueError(f"{len(counts)} counts and {len(reference)} reference counts")
    counts, reference = np.asarray(counts, float), np.asarray(reference, float)
    difference, some = counts - reference, reference > 0
    bias = difference.mean() if len(counts) else math.nan
    margin = 1.96 * difference.std(ddof=1) if len(counts) > 1 else math.nan
    spread = np.square(reference - reference.mean()).sum() if len(counts) else 0.0
    return {
        "images": len(counts),
        "mean_absolute_error": _mean(np.abs(difference)),
        "mean_relative_error": _mean(np.abs(difference[some]) / reference[some]),
        "bias": float(bias),
        "lower": float(bias - margin),
        "upper": float(bias + margin),
        "r2": float(1 - np.square(difference).sum() / spread) if spread else math.nan,
    }


def errors(table: Overlap) -> Errors:
    """Which nuclei are matched, missed, spurious, merged or split.

    A predicted and a reference nucleus belong together if they share more than half of the smaller
    one. What belongs together, also by way of others, is a group: one of each is matched, a
    reference nucleus alone is missed, a predicted one alone spurious, several reference nuclei with
    fewer predicted ones merged, and any other group split. All members of a group have its class.

    `counts` has the nuclei of each class: `matched`, `missed` and `spurious`, `merged_reference`
    and `merged_prediction` (the larger number became the smaller), `split_reference` and
    `split_prediction`. The predicted count is the reference count - missed + spurious -
    (merged_reference - merged_prediction) + (split_prediction - split_reference).
    """
    smaller = np.minimum(
        table.predicted_area[table.predicted], table.reference_area[table.reference]
    )
    linked = 2 * table.shared > smaller
    labels = len(table.predicted_area), len(table.reference_area)
    links = table.predicted[linked], table.reference[linked] + labels[0]
    graph = coo_matrix((np.ones(linked.sum(), bool), links), (sum(labels),) * 2)
    groups, group = connected_components(graph, directed=False)
    present = table.predicted_area > 0, table.reference_area > 0
    of = group[: labels[0]], group[labels[0] :]
    p, r = (np.bincount(g[here], minlength=groups) for g, here in zip(of, present, strict=True))
    kind = np.select(
        [(p == 1) & (r == 1), p == 0, r == 0, r > p], [MATCHED, MISSED, SPURIOUS, MERGED], SPLIT
    )
    prediction, reference = (
        np.where(here, kind[g], 0).astype(np.uint8) for g, here in zip(of, present, strict=True)
    )
    counts = {
        "matched": int(np.count_nonzero(reference == MATCHED)),
        "missed": int(np.count_nonzero(reference == MISSED)),
        "spurious": int(np.count_nonzero(prediction == SPURIOUS)),
    }
    for name, code in (("merged", MERGED), ("split", SPLIT)):
        counts[f"{name}_reference"] = int(np.count_nonzero(reference == code))
        counts[f"{name}_prediction"] = int(np.count_nonzero(prediction == code))
    return Errors(prediction, reference, counts)


def _mean(values):
    return float(values.mean()) if len(values) else math.nan
