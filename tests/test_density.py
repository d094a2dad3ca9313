"""The density map of an image: its numbers, its files, and when it is written."""

import math

import cv2
import numpy as np
import pytest
import tifffile

from tests.scripts import infer
from tests.test_review import checkpoint  # noqa: F401, a fixture
from tissue.density import density_of, round_up
from tissue.images import read_image
from tissue.synthetic import draw_tissue


def grid(height, width, step):
    """Points in the middles of squares of `step` pixels."""
    y, x = np.mgrid[step // 2 : height : step, step // 2 : width : step]
    return y.ravel() - 0.5, x.ravel() - 0.5


@pytest.mark.parametrize("shape", [(2000, 2000), (2160, 4080), (400, 2000)])
def test_even_nuclei_are_even_up_to_the_edge(shape):
    found = density_of(*grid(*shape, 20), shape, 0.5)  # each has 10 x 10 um
    np.testing.assert_allclose(found.per_mm2, 10_000, rtol=1e-5)
    assert found.per_mm2.dtype == np.float32
    assert found.per_mm2.shape == tuple(round(side * 0.5 / 20) for side in shape)
    np.testing.assert_allclose(found.cell_um, 20, rtol=0.02)


def test_one_nucleus_is_spread_as_far_and_over_as_large_an_area_as_by_a_disc_of_100_um():
    found = density_of(np.array([999.5]), np.array([1299.5]), (2010, 2610), 0.5)
    cell = np.prod(found.cell_um) / 1e6  # mm2
    weights = found.per_mm2.astype(float) * cell
    assert weights.sum() == pytest.approx(1, abs=1e-3)
    assert 1 / (weights**2).sum() * cell == pytest.approx(math.pi * 0.05**2, rel=0.05)
    y = (np.arange(len(weights)) + 0.5) * found.cell_um[0]
    variance = (weights.sum(axis=1) * (y - 500) ** 2).sum()
    # A cell's own width adds a twelfth of its square.
    assert variance == pytest.approx(50**2 / 4 + found.cell_um[0] ** 2 / 12, rel=0.05)
    peak = np.unravel_index(found.per_mm2.argmax(), weights.shape)
    assert peak == (500 // found.cell_um[0], 650 // found.cell_um[1])


def test_images_without_nuclei_and_of_one_cell_have_a_density():
    empty = density_of(np.zeros(0), np.zeros(0), (100, 300), 0.25)
    assert empty.per_mm2.shape == (1, 4) and not empty.per_mm2.any()
    assert empty.picture().dtype == np.uint8
    one = density_of(np.array([3.0, 4.0]), np.array([3.0, 9.4]), (10, 10), 0.25)
    assert one.per_mm2 == pytest.approx(2 / (2.5e-3) ** 2)


def test_the_file_says_its_pixel_size_and_the_picture_its_scale(tmp_path):
    y, x = grid(1990, 4130, 25)  # 6,400 per mm2, so the scale goes to 10,000
    left = x < 2000
    found = density_of(y[left], x[left], (1990, 4130), 0.5)
    found.write(tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        np.testing.assert_array_equal(tif.asarray(), found.per_mm2)
        for tag, side in (("XResolution", found.cell_um[1]), ("YResolution", found.cell_um[0])):
            above, below = tif.pages[0].tags[tag].value
            assert 1e4 * below / above == pytest.approx(side, rel=1e-4)
    picture = found.picture()
    assert picture.shape == (round(640 * 1990 / 4130) + 64, 640, 3)
    scale = picture[len(picture) - 50]
    np.testing.assert_array_equal(scale[0], picture[100, 600])  # nothing is there, as at its left
    assert abs(scale[205].astype(int) - picture[100, 100]).max() <= 12  # at 0.64 of 320 pixels


@pytest.mark.parametrize(
    ("value", "above"), [(0, 1), (1, 1), (3, 5), (5.1, 10), (1999, 2000), (2001, 5000), (8e4, 1e5)]
)
def test_a_scale_ends_at_a_round_number(value, above):
    assert round_up(value) == above


@pytest.mark.parametrize("source", ["tif", "png"])
def test_images_of_500_um_have_a_map_and_others_on_demand(
    tmp_path, checkpoint, source  # noqa: F811
):  # fmt: skip
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / f"i.{source}"
    image = draw_tissue(256, 288, seed=1).image
    cv2.imwrite(str(path), image[..., ::-1])
    flags = ["--ckpt", checkpoint, "--images", path, "--tile_size", 96]
    out = tmp_path / "out"
    infer(out, *flags, "--pixel_size", 0.25)  # 64 um
    assert not list(out.glob("*density*"))
    infer(out, *flags, "--pixel_size", 0.25, "--density")
    assert tifffile.imread(out / "i_density.tif").shape == (3, 4)
    assert read_image(out / "i_density.png").shape[2] == 3
    page = (out / "report.html").read_text()
    assert 'data-layer="density_picture"' in page and "i_density.tif" in page
    (out / "i_density.tif").unlink()
    mask = (out / "i_prediction.png").stat().st_mtime_ns
    infer(out, *flags, "--pixel_size", 0.25, "--density")
    assert (out / "i_density.tif").is_file()
    assert (out / "i_prediction.png").stat().st_mtime_ns == mask


def test_a_map_of_an_image_of_500_um_goes_when_it_is_made_anew_as_a_smaller_one(
    tmp_path, checkpoint  # noqa: F811
):  # fmt: skip
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "i.png"), draw_tissue(510, 510, seed=1).image)
    flags = ["--ckpt", checkpoint, "--images", tmp_path / "images"]
    infer(tmp_path / "out", *flags, "--pixel_size", 0.99)
    assert tifffile.imread(tmp_path / "out" / "i_density.tif").shape == (25, 25)
    infer(tmp_path / "out", *flags, "--pixel_size", 0.25)
    assert not list((tmp_path / "out").glob("*density*"))
