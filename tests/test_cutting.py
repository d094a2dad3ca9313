"""What a set is planned from and cut into, on label maps and masks drawn by hand."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tissue import cutting
from tissue.depth import UNKNOWN
from tissue.files import InputError
from tissue.pairs import Files, Pair, how_much_darker
from tissue.pictures import write_image
from tissue.synthetic import draw_tissue


@pytest.fixture
def label_map(tmp_path):
    """Nuclei of 6, 4 and 2 pixels, the second of which meets the edge; a third has number 9."""
    labels = np.zeros((6, 8), np.uint8)
    labels[1:3, 1:4] = 1
    labels[4:6, 0:2] = 2
    labels[4, 4:6] = 9
    path = tmp_path / "tissue.png"
    write_image(path, labels)
    return path


def plan(root, split_of, sizes, labels=()):
    pairs = [Pair(name, root / f"{name}.png", root / f"{name}_mask.png") for name in split_of]
    settings = {"patch_dim": 32, "patch_stride": 16, "bits": None}
    return cutting.Plan(root, pairs, Files(dict(labels)), split_of, settings, dict(sizes), sizes)


def test_nuclei_that_meet_the_edge_do_not_tell_a_size(label_map, tmp_path):
    (pair,) = plan(tmp_path, {"tissue": "train"}, {}).pairs
    assert cutting.nucleus_areas(pair, label_map).tolist() == [6, 2]
    assert cutting.nucleus_areas(pair, tmp_path / "not_there.png").tolist() == []


def test_the_size_of_a_set_is_that_of_its_median_nucleus(label_map, tmp_path):
    maps, pairs = Files({"tissue": label_map}), plan(tmp_path, {"tissue": "train"}, {}).pairs
    with ThreadPoolExecutor(1) as pool:
        size, line = cutting.size_of_set(tmp_path, pairs, maps, pool)
        assert "median nucleus of 4 pixels" in line and f"{size:g} um a pixel" in line
        write_image(label_map, np.zeros((6, 8), np.uint8))
        with pytest.raises(InputError, match="found no label map with nuclei"):
            cutting.size_of_set(tmp_path, pairs, maps, pool)


def test_a_set_has_the_pixel_size_of_its_median_training_image(label_map, tmp_path):
    split_of = {"a": "train", "b": "train", "c": "train", "d": "val"}
    known = plan(tmp_path, split_of, {"a": 0.5, "b": 0.25, "c": None, "d": 1.0})
    unknown = plan(tmp_path, split_of, dict.fromkeys(split_of), {"a": label_map})
    with ThreadPoolExecutor(1) as pool:
        (line,) = cutting.settle_pixel_size([known, unknown], None, pool)
        assert known.settings["pixel_size_um"] == unknown.settings["pixel_size_um"] == 0.25
        assert known.scale(known.pairs[0]) == 0.5 and known.scale(known.pairs[2]) == 1
        (size,) = set(unknown.sizes.values())  # its nuclei tell it
        assert f"{size:g} um" in line
        assert cutting.settle_pixel_size([known], 0.4, pool) == []
        assert known.settings["pixel_size_um"] == 0.4


def test_a_picture_in_both_splits_is_named(tmp_path):
    its_plan = plan(tmp_path, {"a": "train", "b": "train", "c": "val"}, {})

    def facts(digest):
        return cutting.PairFacts(64, 64, None, 0.3, digest, ())

    its_plan.facts = [facts("one"), facts("one"), facts("two")]
    cutting.check_pictures([its_plan])  # twice in training is the user's choice
    its_plan.facts = [facts("one"), facts("two"), facts("one")]
    with pytest.raises(InputError, match=r"\(a = c\)"):
        cutting.check_pictures([its_plan])


def test_a_mask_has_the_depth_of_its_label_map_and_where_that_has_none_it_is_unknown(label_map):
    mask = np.zeros((6, 8), bool)
    mask[1:3, 1:6] = True  # two columns more than nucleus 1, and nothing of the others
    found = cutting.with_depth(mask, label_map)
    assert found.dtype == np.uint8
    assert found[1:3].tolist() == [[0, 255, 255, 255, UNKNOWN, UNKNOWN, 0, 0]] * 2
    assert not found[[0, 3, 4, 5]].any()
    twice = cutting.with_depth(mask.repeat(2, 0).repeat(2, 1), label_map)
    rim, inner = [128] * 6, [128, 255, 255, 255, 255, 128]  # the map is brought to the mask's size
    assert twice[2:6, 2:8].tolist() == [rim, inner, inner, rim]


def test_a_fault_of_a_pair_is_text_and_a_sound_pair_is_facts(tmp_path):
    tissue = draw_tissue(40, 48, seed=1)
    for name in "ab":
        write_image(tmp_path / f"{name}.png", tissue.image)
    write_image(tmp_path / "a_mask.png", tissue.labels > 0)
    its_plan = plan(tmp_path, {"a": "train", "b": "val"}, {"a": None, "b": None})
    its_plan.settings["pixel_size_um"] = None
    facts, fault = (cutting.facts_or_fault(its_plan, pair) for pair in its_plan.pairs)
    assert (facts.height, facts.width) == (40, 48)
    assert facts.foreground == (tissue.labels > 0).mean()
    assert isinstance(fault, str) and "b_mask.png" in fault


def test_how_much_darker_nuclei_are_is_told_in_deviations_of_absorbance():
    image = np.full((20, 20, 3), 255, np.uint8)  # absorbs nothing, but a tenth of it 1
    image[:2, :, 0] = 24  # (24 + 1) / 256: 1.01
    mask = np.zeros((20, 20), bool)
    mask[:2] = True
    # Of values 1 (a share of 0.1) and 0 (0.9) the deviation is 0.3, the difference of the means 1.
    assert how_much_darker(image, mask) == pytest.approx(1 / 0.3)
    assert how_much_darker(image, mask[::-1]) == pytest.approx(-(2 / 18) / 0.3)
    known = np.zeros((20, 20), bool)
    known[:4] = True  # half of it dark: a deviation of 0.5
    assert how_much_darker(image, mask, known) == pytest.approx(2)
    assert how_much_darker(image, ~mask) is None  # more than 80 % of it
    assert how_much_darker(image, np.zeros_like(mask)) is None
    assert how_much_darker(np.full_like(image, 200), mask) is None


def test_masks_of_other_places_are_said(tmp_path):
    split_of = dict.fromkeys(["inverted", "right", "shifted"], "train")
    made = plan(tmp_path, split_of, dict.fromkeys(split_of))
    made.settings["pixel_size_um"] = None
    for seed, pair in enumerate(made.pairs):
        tissue = draw_tissue(256, 256, seed=seed)
        image, labels = tissue.image, tissue.labels
        changed = {"inverted": labels == 0, "right": labels > 0, "shifted": np.roll(labels > 0, 40)}
        write_image(pair.image, image)
        write_image(pair.mask, changed[pair.name] * np.uint8(255))
    made.facts = [cutting.facts_or_fault(made, pair) for pair in made.pairs]
    (line,) = cutting.doubtful_masks(made)
    assert line.startswith("inverted, shifted: the nuclei of the mask are no darker than the rest")
