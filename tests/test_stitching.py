import cv2
import numpy as np
import pytest

from tissue.nuclei import contours
from tissue.stitching import ContourCounter
from tissue.tiling import tiles_of


def count(mask, tile):
    counter = ContourCounter(*mask.shape)
    for part in tiles_of(*mask.shape, tile):
        counter.add(
            mask[part.y : part.y + part.height, part.x : part.x + part.width], part.y, part.x
        )
    return counter.count()


def blobs(generator, height, width, size):
    coarse = generator.random((height // size + 1, width // size + 1)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("size", [1, 3, 9])
def test_contours_counted_by_tiles_are_those_of_the_whole_mask(generator, size):
    for _ in range(60):
        height, width = map(int, generator.integers(1, 120, 2))
        mask = blobs(generator, height, width, size) > generator.random()
        tile = int(generator.integers(1, 50))
        assert count(mask, tile) == len(contours(mask))


def test_an_object_in_the_hole_of_another_is_not_counted_across_tiles():
    mask = np.zeros((40, 40), bool)
    mask[2:38, 2:38] = True
    mask[5:35, 5:35] = False
    mask[15:25, 15:25] = True  # in the hole
    for tile in (7, 16, 40):
        assert count(mask, tile) == 1
    mask[2, 20] = mask[3, 20] = mask[4, 20] = False  # the ring is open
    for tile in (7, 16, 40):
        assert count(mask, tile) == 2


def test_objects_that_meet_at_a_corner_of_four_tiles_are_one():
    for flip in (False, True):
        mask = np.zeros((16, 16), bool)
        mask[4:8, 4:8] = mask[8:12, 8:12] = True
        mask = mask[:, ::-1] if flip else mask
        assert count(mask, 8) == 1
