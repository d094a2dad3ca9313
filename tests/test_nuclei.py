import numpy as np

from tissue import nuclei


def test_contours_are_counted_without_holes_and_without_what_lies_in_them():
    mask = np.zeros((12, 12), bool)
    mask[1:9, 1:9] = True
    mask[2:8, 2:8] = False  # a hole
    mask[4:6, 4:6] = True  # something in it
    mask[10, 10] = True  # a speck
    assert len(nuclei.contours(mask)) == 2


def test_objects_that_touch_at_a_corner_are_one():
    assert len(nuclei.contours(np.eye(4, dtype=bool))) == 1


def test_an_empty_mask_has_no_contours():
    assert nuclei.contours(np.zeros((5, 5), bool)) == []
