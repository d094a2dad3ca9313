"""What is no tissue is never nucleus, keeps its colour, and does not change what is."""

import cv2
import numpy as np
import pytest

from tissue import tiling
from tissue.background import REACH, background, background_and_padding, frame_of
from tissue.stain import TARGET, for_network, stain_of, to_stain
from tissue.synthetic import draw_tissue
from tissue.windows import from_array

MARGINS = {"white": 255, "black": 0, "grey": 128, "light": 210, "magenta": (255, 0, 255)}


@pytest.fixture(scope="module")
def tissue():
    return draw_tissue(200, 240, seed=3).image


def with_margins(image, colour, top=100, left=120, bottom=100, right=120):
    height, width = image.shape[:2]
    page = np.full((top + height + bottom, left + width + right, 3), colour, np.uint8)
    page[top : top + height, left : left + width] = image
    return page


def red(tiles, kept):
    """A network that returns a colour: the prediction is that colour's plane, and never 0."""
    return tiles[:, None, *kept, 0].astype(np.float32) + 1


def noisy(colour, shape, generator):
    return generator.normal(colour, 4, (*shape, 3)).round().clip(0, 255).astype(np.uint8)


def test_glass_and_what_was_not_scanned_are_background_and_tissue_is_not(generator):
    image = noisy((225, 185, 212), (200, 180), generator)  # pale eosin
    image[:, :60] = noisy((243, 243, 243), (200, 60), generator)  # glass
    image[120:, :60] = noisy((120, 110, 115), (80, 60), generator)  # dark, nearly without colour
    image[176:] = noisy((6, 6, 6), (24, 180), generator)  # black
    found = background(image)
    assert found[:118, :58].all()
    assert found[178:].all()
    assert not found[:174, 62:].any()
    assert not found[122:174].any()


def test_a_nucleus_alone_in_a_lumen_is_tissue_and_its_surroundings_are_not(generator):
    image = noisy((244, 244, 244), (120, 120), generator)
    nucleus = np.zeros((120, 120), np.uint8)
    cv2.circle(nucleus, (60, 55), 9, 1, -1)
    image[nucleus > 0] = (95, 60, 140)
    found = background(image)
    assert not found[nucleus > 0].any()
    assert found[cv2.dilate(nucleus, np.ones((9, 9))) == 0].mean() > 0.95


def test_lumina_as_narrow_as_a_nucleus_are_tissue(generator):
    image = noisy((200, 130, 170), (100, 100), generator)
    image[40:54, 20:80] = 245
    assert not background(image).any()


@pytest.mark.parametrize("colour", MARGINS.values(), ids=MARGINS)
@pytest.mark.parametrize(
    "sides", [(100, 120, 100, 120), (0, 0, 100, 0), (33, 0, 0, 70), (8, 1, 0, 3)]
)
def test_an_image_with_margins_is_predicted_as_it_is_without(tissue, colour, sides):
    page = with_margins(tissue, colour, *sides)
    top, left = sides[:2]
    assert frame_of(from_array(page)) == (top, left, *tissue.shape[:2])
    for scale in (1.0, 1.6):
        network = tiling.Network(predict=red, stain=TARGET, halo=32, tile_size=64, scale=scale)
        (without,) = tiling.predict_image(from_array(tissue), network)
        (found,) = tiling.predict_image(from_array(page), network)
        inside = found[top : top + 200, left : left + 240].copy()
        if scale == 1:
            np.testing.assert_array_equal(inside, without)
        else:
            np.testing.assert_allclose(inside, without, atol=0.01)
        found[top : top + 200, left : left + 240] = 0
        assert not found.any()


def test_a_picture_of_one_colour_has_nothing_to_predict():
    image = from_array(np.full((90, 70, 3), 128, np.uint8))
    assert frame_of(image)[2] == 0
    network = tiling.Network(predict=red, stain=TARGET, halo=16)
    assert not tiling.predict_image(image, network).any()
    (outcome,) = tiling.predict_tiles(image, tiling.tiles_of(90, 70, 1024), network)
    assert outcome.outputs is None and not outcome.tissue.any()


@pytest.mark.parametrize("stripes", [(0, 255), (0, 128, 255)], ids=["two", "three"])
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
def test_margins_that_meet_leave_nothing_to_predict(stripes, turned):
    grey = np.repeat(np.array(stripes, np.uint8), 64)[:, None, None]
    page = np.repeat(np.repeat(grey, 128, axis=1), 3, axis=2)
    image = from_array(np.ascontiguousarray(page.swapaxes(0, 1)) if turned else page)
    if turned and len(stripes) == 3:  # rows are looked at first, and have no margin here
        assert frame_of(image) == (0, 64, 128, 64)
    else:
        assert frame_of(image) == (0, 0, 0, image.width)
    for scale in (1.0, 0.5):
        network = tiling.Network(predict=red, stain=TARGET, halo=16, scale=scale)
        assert not tiling.predict_image(image, network).any()


def test_no_line_is_cut_off_where_the_edge_is_tissue(tissue):
    assert frame_of(from_array(tissue)) == (0, 0, 200, 240)
    striped = tissue.copy()
    striped[:12] = 255
    striped[0, 100] = 254
    assert frame_of(from_array(striped)) == (0, 0, 200, 240)
    assert frame_of(from_array(tissue[:, :31])) == (0, 0, 200, 31)
    even = tissue[:, :31].copy()
    even[0] = 255  # shorter than what tissue cannot have
    assert frame_of(from_array(even)) == (0, 0, 200, 31)


def test_a_nucleus_beside_a_wide_margin_is_not_cut(generator):
    page = np.full((200, 640, 3), 255, np.uint8)
    page[100:] = noisy((200, 130, 170), (100, 640), generator)
    cv2.circle(page, (300, 60), 9, (100, 60, 140), -1)
    assert frame_of(from_array(page)) == (51, 0, 149, 640)


@pytest.mark.parametrize("colour", [0, 255, 128])
def test_margins_that_jpeg_has_blurred_are_no_nuclei(tissue, colour):
    page = with_margins(tissue, colour)
    page = cv2.imdecode(cv2.imencode(".jpg", page, [cv2.IMWRITE_JPEG_QUALITY, 85])[1], 1)
    network = tiling.Network(predict=red, stain=TARGET, halo=32)
    (found,) = tiling.predict_image(from_array(page), network)
    found[98:302, 118:362] = 0
    assert not found.any()


def test_black_corners_keep_their_colour_and_the_network_sees_tissue_instead(tissue):
    turned = cv2.warpAffine(tissue, cv2.getRotationMatrix2D((120, 100), 30, 1), (240, 200))
    own = stain_of(from_array(turned))
    kept, padding = background_and_padding(turned)
    black = (turned == 0).all(2)
    assert padding[black].mean() > 0.97 and kept[padding].all()
    assert (to_stain(turned, own, TARGET)[padding] == turned[padding]).all()
    shown, nothing = for_network(turned, own, TARGET)
    assert (shown[padding].min(1) > 100).all()
    np.testing.assert_array_equal(nothing, kept)
    inside = stain_of(from_array(tissue))  # black decides no stain
    np.testing.assert_allclose(own.mean, inside.mean, atol=3)


@pytest.mark.parametrize("colour", MARGINS.values(), ids=MARGINS)
@pytest.mark.parametrize("angle", [3, 8, 20, 45])
def test_the_thin_ends_of_turned_corners_are_no_tissue(tissue, colour, angle):
    def turned(image, outside):
        turn = cv2.getRotationMatrix2D((120, 100), angle, 1)
        return cv2.warpAffine(image, turn, (240, 200), flags=0, borderValue=outside)

    colour = colour if isinstance(colour, tuple) else (colour,) * 3
    image, outside = turned(tissue, colour), turned(np.zeros_like(tissue[..., 0]), 1)
    found = background(image)
    assert found[outside > 0].mean() > 0.95
    inside = cv2.dilate(outside, np.ones((5, 5))) == 0
    assert not found[inside & (image.max(axis=2) < 200)].any()


def test_white_stays_white_however_the_tissue_is_stretched(generator):
    flat = noisy((150, 100, 140), (128, 200), generator)  # a spread that is stretched threefold
    flat[:, 128:] = 255
    own = stain_of(from_array(flat))
    changed = to_stain(flat, own, TARGET)
    assert (changed[:, 130:] == 255).all()
    assert np.abs(changed[:, :120].astype(int) - flat[:, :120]).mean() > 5


def test_what_is_background_does_not_depend_on_the_window(generator):
    """So that tiles agree: REACH pixels around a window decide about all that is in it."""
    image = cv2.resize(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8), (400, 300))
    image[generator.random((300, 400)) < 0.2] = 240
    image[:, 250:] = np.where(image[:, 250:] > 120, 244, image[:, 250:])
    image[150:220, 30:120] = 77
    whole = background(image)
    assert 0.05 < whole.mean() < 0.95
    for y, x in ((50, 60), (120, 170), (180, 300)):
        window = background(image[y - REACH : y + 64 + REACH, x - REACH : x + 64 + REACH])
        inner = window[REACH:-REACH, REACH:][:, :64]
        np.testing.assert_array_equal(inner, whole[y : y + 64, x : x + 64][:, : inner.shape[1]])
