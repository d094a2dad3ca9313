import math

import numpy as np
import pytest

from tissue import agreement
from tissue.agreement import MATCHED, MERGED, MISSED, SPLIT, SPURIOUS
from tissue.files import InputError


def row(text):
    """A label map of one row: a digit a pixel, '.' the background."""
    return np.array([[0 if character == "." else int(character) for character in text]])


def table(prediction, reference):
    return agreement.overlap(row(prediction), row(reference))


def random_labels(generator, count):
    """Squares at random places, later ones over earlier ones, some of them gone altogether."""
    labels = np.zeros((60, 70), np.int32)
    for number in range(1, count + 1):
        y, x, size = generator.integers(0, 60), generator.integers(0, 70), generator.integers(3, 15)
        labels[y : y + size, x : x + size] = number
    return labels


def numbers(labels):
    return [number for number in np.unique(labels) if number]


def naive_iou(prediction, reference):
    """IoU of each pair of labels, from their masks one by one."""
    return {
        (p, r): np.sum((prediction == p) & (reference == r))
        / np.sum((prediction == p) | (reference == r))
        for p in numbers(prediction)
        for r in numbers(reference)
    }


def naive_aji(prediction, reference):
    iou, used, shared, union = naive_iou(prediction, reference), set(), 0, 0
    for r in numbers(reference):
        p = max(numbers(prediction), key=lambda p: iou[p, r], default=None)
        if p is None or iou[p, r] == 0:
            union += np.sum(reference == r)
            continue
        used.add(p)
        shared += np.sum((prediction == p) & (reference == r))
        union += np.sum((prediction == p) | (reference == r))
    union += sum(np.sum(prediction == p) for p in numbers(prediction) if p not in used)
    return shared / union if union else 1.0


def naive_pq(prediction, reference):
    matched = [iou for iou in naive_iou(prediction, reference).values() if iou > 0.5]
    false_positive = len(numbers(prediction)) - len(matched)
    false_negative = len(numbers(reference)) - len(matched)
    return sum(matched) / (len(matched) + false_positive / 2 + false_negative / 2)


@pytest.mark.parametrize("seed", range(8))
def test_scores_are_those_of_a_pixel_by_pixel_count(seed):
    generator = np.random.default_rng(seed)
    reference = random_labels(generator, 25)
    prediction = random_labels(generator, 20)
    same = generator.random(reference.shape) < 0.9
    prediction[reference % 3 == 1] = 0
    prediction[same & (reference % 3 == 1)] = 100 + reference[same & (reference % 3 == 1)]
    overlap = agreement.overlap(prediction, reference)
    assert agreement.aji(overlap) == pytest.approx(naive_aji(prediction, reference))
    scores = agreement.panoptic_quality(overlap)
    assert scores["pq"] == pytest.approx(naive_pq(prediction, reference))
    assert scores["pq"] == pytest.approx(scores["dq"] * scores["sq"])


def test_overlap_by_hand():
    overlap = table("11.22.4", ".1122..")
    assert overlap.predicted.tolist() == [1, 2]
    assert overlap.reference.tolist() == [1, 2]
    assert overlap.shared.tolist() == [1, 2]
    assert overlap.union.tolist() == [3, 2]
    assert overlap.iou == pytest.approx([1 / 3, 1])
    assert overlap.predicted_area.tolist() == [0, 2, 2, 0, 1]  # no nucleus has number 3


def test_scores_by_hand():
    overlap = table("111.222.44", "1111222...")
    # 1 and 2 match with 3/4 and 3/3, 4 is spurious: 2 of (2 + 3) / 2 nuclei
    assert agreement.panoptic_quality(overlap) == {
        "pq": pytest.approx(0.8 * 0.875),
        "dq": pytest.approx(0.8),
        "sq": pytest.approx(0.875),
    }
    assert agreement.aji(overlap) == pytest.approx((3 + 3) / (4 + 3 + 2))


def test_half_overlap_is_no_match_and_a_nucleus_may_serve_two_in_aji():
    overlap = table("1111", "1122")
    assert agreement.panoptic_quality(overlap) == {"pq": 0, "dq": 0, "sq": 0}
    assert agreement.aji(overlap) == pytest.approx((2 + 2) / (4 + 4))


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [("....", "....", 1), ("11..", "....", 0), ("....", "1", 0)],
)
def test_scores_without_nuclei(prediction, reference, score):
    overlap = table(prediction, reference.ljust(4, "."))
    assert agreement.aji(overlap) == score
    assert agreement.panoptic_quality(overlap)["pq"] == score
    assert sum(agreement.errors(overlap).counts.values()) == 1 - score


def test_maps_of_two_sizes_are_refused():
    with pytest.raises(InputError, match=r"\(4, 5\).*\(5, 4\)"):
        agreement.overlap(np.zeros((4, 5), int), np.zeros((5, 4), int))


def test_the_border_zone_by_hand():
    nucleus = np.zeros((7, 7), np.uint16)
    nucleus[2:5, 2:5] = 65535
    drawn = [".......", "..***..", ".*****.", ".**.**.", ".*****.", "..***..", "......."]
    expected = [[pixel == "*" for pixel in line] for line in drawn]
    assert agreement.border_zone(nucleus, 1).tolist() == expected
    assert agreement.border_zone(nucleus, 2).sum() == 5 * 7 + 2 * 3  # nothing is left of it
    assert not agreement.border_zone(nucleus, 0).any()


@pytest.mark.parametrize(
    ("reference", "zone"),
    [
        ("..111...", ".**.**.."),
        ("1111....", "...**..."),  # the edge of the image is no border
        ("111222..", "..**.**."),  # that of two nuclei is
        ("..11....", ".****..."),  # and nothing is left of a small one
        ("........", "........"),
    ],
)
def test_the_border_zone_of_a_row(reference, zone):
    found = agreement.border_zone(row(reference), 1)[0]
    assert "".join("*" if pixel else "." for pixel in found) == zone


def test_what_differs_in_the_border_zone_alone_is_no_error():
    prediction, reference = row("111111..22"), row(".11111222.")
    scored = ~agreement.border_zone(reference, 1)
    assert scored[0].tolist() == [False, False, True, True, True, False, False, True, False, False]
    overlap = agreement.overlap(prediction * scored, reference * scored)
    # of nucleus 1 the three pixels inside are found, of 2 the one that is left is not
    assert agreement.panoptic_quality(overlap) == {"pq": 2 / 3, "dq": 2 / 3, "sq": 1}
    assert agreement.aji(overlap) == 3 / 4


def test_count_agreement_by_hand():
    found = agreement.count_agreement([12, 18, 33], [10, 20, 30])
    assert found["images"] == 3
    assert found["mean_absolute_error"] == pytest.approx(7 / 3)
    assert found["mean_relative_error"] == pytest.approx((0.2 + 0.1 + 0.1) / 3)
    assert found["bias"] == pytest.approx(1)
    deviation = math.sqrt((1 + 9 + 4) / 2)
    assert found["lower"] == pytest.approx(1 - 1.96 * deviation)
    assert found["upper"] == pytest.approx(1 + 1.96 * deviation)
    assert found["r2"] == pytest.approx(1 - (4 + 4 + 9) / 200)


def test_counts_off_by_a_factor_do_not_agree_although_they_correlate():
    assert agreement.count_agreement([20, 40, 60], [10, 20, 30])["r2"] < 0


def test_count_agreement_of_too_few_images():
    none = agreement.count_agreement([], [])
    assert none.pop("images") == 0
    assert all(math.isnan(value) for value in none.values())
    one = agreement.count_agreement([3], [0])
    assert one["bias"] == 3
    assert math.isnan(one["upper"])
    assert math.isnan(one["mean_relative_error"])
    assert math.isnan(one["r2"])
    with pytest.raises(ValueError, match="2 counts and 1"):
        agreement.count_agreement([1, 2], [1])


def test_errors_by_hand():
    #        matched  missed  spurious  merged  split
    found = agreement.errors(table("11......22.33333.45.", "11.33......55666.777"))
    assert found.reference.tolist() == [0, MATCHED, 0, MISSED, 0, MERGED, MERGED, SPLIT]
    assert found.prediction.tolist() == [0, MATCHED, SPURIOUS, MERGED, SPLIT, SPLIT]
    assert found.reference.dtype == found.prediction.dtype == np.uint8
    assert found.counts == {
        "matched": 1,
        "missed": 1,
        "spurious": 1,
        "merged_reference": 2,
        "merged_prediction": 1,
        "split_reference": 1,
        "split_prediction": 2,
    }


def test_half_of_the_smaller_nucleus_is_too_little():
    assert agreement.errors(table("11..", ".11.")).counts["matched"] == 0
    assert agreement.errors(table("111.", ".111")).counts["matched"] == 1
    assert agreement.errors(table(".1..", "1111")).counts["matched"] == 1


def test_a_tangle_is_merged_if_nuclei_were_lost_and_split_otherwise():
    lost = agreement.errors(table("1122222222", "1111112233"))
    assert lost.reference.tolist() == [0, MERGED, MERGED, MERGED]
    assert lost.prediction.tolist() == [0, MERGED, MERGED]
    kept = agreement.errors(table("1122222222", "1111112222"))
    assert kept.reference.tolist() == [0, SPLIT, SPLIT]
    assert kept.prediction.tolist() == [0, SPLIT, SPLIT]


@pytest.mark.parametrize("seed", range(8))
def test_every_nucleus_has_one_class_and_the_counts_add_up(seed):
    generator = np.random.default_rng(seed)
    prediction, reference = random_labels(generator, 40), random_labels(generator, 30)
    found = agreement.errors(agreement.overlap(prediction, reference))
    c = found.counts
    assert np.flatnonzero(found.prediction).tolist() == numbers(prediction)
    assert np.flatnonzero(found.reference).tolist() == numbers(reference)
    assert c["matched"] + c["missed"] + c["merged_reference"] + c["split_reference"] == len(
        numbers(reference)
    )
    assert c["matched"] + c["spurious"] + c["merged_prediction"] + c["split_prediction"] == len(
        numbers(prediction)
    )
    assert c["matched"] == np.count_nonzero(found.prediction == MATCHED)
    assert c["merged_reference"] >= c["merged_prediction"]
    assert c["split_prediction"] >= c["split_reference"]
