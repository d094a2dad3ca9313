"""What tissue.masks promises, on real files and on the ways in which masks are made."""

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from tests.pictures import (
    ALPHA,
    BYTES,
    LABELS,
    MASK,
    RGB,
    grey3,
    opencv,
    pillow,
    refusal,
    tiff,
    with_palette,
)
from tissue import masks, windows
from tissue.files import InputError

VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (9, 9, 9), (7, 0, 0)]
BRIGHT = [(200, 200, 255), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (9, 9, 9)]
RAMP = np.repeat(np.arange(256), 3).reshape(-1, 3)
_y, _x = np.mgrid[:256, :256]
# 49 discs in rows of 7, far enough apart for soft edges, numbered from 1.
NUMBERS = np.where((_x % 36 - 18) ** 2 + (_y % 36 - 18) ** 2 < 100, 1 + _x // 36 + _y // 36 * 7, 0)
NUMBERS[:, 252:] = NUMBERS[252:] = 0
NUCLEI = NUMBERS > 0
WHITE = NUCLEI * np.uint8(255)


def ramp(count):
    return [(255 * index // (count - 1),) * 3 for index in range(count)]


PLAIN = {
    "bytes.png": pillow(BYTES),
    "ones.png": pillow(MASK.astype(np.uint8)),
    "bits.png": pillow(MASK),
    "rgb.png": pillow(grey3(BYTES)),
    "rgba.png": pillow(np.dstack([grey3(BYTES), ALPHA])),
    "grey_alpha.png": pillow(np.dstack([BYTES, ALPHA])),
    "sixteen.png": opencv(BYTES.astype(np.uint16) * 257),
    "palette_white_on_black.png": with_palette(MASK.astype(np.uint8), [(0,) * 3, (255,) * 3]),
    "palette_of_one_colour.png": with_palette(MASK.astype(np.uint8), [(0,) * 3, (255, 0, 0)]),
    "palette_ramp.png": with_palette(BYTES, RAMP),
    "palette_of_greys.png": with_palette(MASK.astype(np.uint8) + 2, [(9,) * 3] * 2 + ramp(2)),
    "bytes.bmp": pillow(BYTES),
    "bits.bmp": pillow(MASK),
    "bytes.jpg": pillow(BYTES, quality=60),
    "rgb.jpg": pillow(grey3(BYTES), quality=60),
    "jpeg.tif": tiff(BYTES, compression="jpeg"),
    "bits.tif": pillow(MASK),
    "fax_1.tif": pillow(MASK, compression="tiff_ccitt"),
    "fax_3.tif": pillow(MASK, compression="group3"),
    "fax_3_2d.tif": pillow(MASK, compression="group3", tiffinfo={292: 5}),
    "fax_4.tif": pillow(MASK, compression="group4"),
    "fax_strips.tif": pillow(MASK, compression="group4", tiffinfo={278: 7}),
    "bool.tif": tiff(MASK),
    "bool.ome.tif": tiff(MASK, ome=True),
    "imagej.tif": tiff(BYTES, imagej=True),
    "imagej_inverting_lut.tif": tiff(BYTES, imagej=True, photometric="miniswhite"),
    "white_is_zero.tif": tiff(255 - BYTES, photometric="miniswhite"),
    "float.tif": tiff(MASK.astype(np.float32)),
    "float_bytes.tif": tiff(BYTES.astype(np.float64)),
    "float_of_resizing.tif": tiff(np.abs(MASK - np.float32(1e-7))),
}
LABEL_MAPS = {
    "labels8.png": pillow(LABELS),
    "labels16.png": opencv(LABELS * np.uint16(300)),
    "palette.png": with_palette(LABELS, VOC),
    "palette.bmp": with_palette(LABELS, VOC),
    "palette.tif": with_palette(LABELS, VOC),
    "labels16.tif": tiff(LABELS * np.uint16(300), compression="lzw"),
    "labels32.tif": tiff(LABELS * np.uint32(70000)),
    "labels_signed.tif": tiff(LABELS.astype(np.int32)),
    "labels64.tif": tiff(LABELS.astype(np.int64) * 70000),
    "float.tif": tiff(LABELS.astype(np.float32)),
    "double.tif": tiff(LABELS.astype(np.float64)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_mask_is_read_as_it_was_written_and_nothing_is_said(tmp_path, name):
    PLAIN[name](tmp_path / name)
    mask = masks.read(tmp_path / name)
    assert mask.foreground.dtype == bool and mask.foreground.flags.c_contiguous
    np.testing.assert_array_equal(mask.foreground, MASK)
    assert mask.labels is None and not mask.notes


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_one_number_in_one_place_is_a_label_map_and_a_line_says_so(tmp_path, name):
    LABEL_MAPS[name](tmp_path / name)
    mask = masks.read(tmp_path / name)
    np.testing.assert_array_equal(mask.foreground, MASK)
    assert mask.labels.dtype.kind in "ui"
    np.testing.assert_array_equal(mask.labels / mask.labels.max() * LABELS.max(), LABELS)
    (note,) = mask.notes
    assert str(tmp_path / name) in note and "label map" in note and "\n" not in note


def test_a_label_map_may_use_the_largest_number_of_its_type(tmp_path):
    for largest, dtype in ((255, np.uint8), (65535, np.uint16)):
        numbers = np.zeros((60, 60), dtype)
        numbers[50:58, 40:50], numbers[3, 2], numbers[9:11, 5:7] = largest, 7, largest // 2
        tiff(numbers)(tmp_path / "a.tif")
        np.testing.assert_array_equal(masks.read(tmp_path / "a.tif").labels, numbers)


def test_two_nuclei_that_touch_at_a_corner_are_two_and_a_bent_one_is_one(tmp_path):
    numbers = np.zeros((60, 60), np.uint8)
    numbers[:30, :30], numbers[30:, 30:] = 1, 2
    numbers[5:20, 40:45] = numbers[5:10, 40:59] = numbers[5:20, 54:59] = 3  # a horseshoe
    numbers[[40, 41, 42], [5, 6, 7]] = 4  # by its corners
    pillow(numbers)(tmp_path / "a.png")
    np.testing.assert_array_equal(masks.read(tmp_path / "a.png").labels, numbers)
    numbers[50, 5] = 4
    pillow(numbers)(tmp_path / "a.png")
    refusal(masks.read, tmp_path / "a.png", "value 4 lies in 2 places", "instance_labels")


IN_LABEL_FOLDER = {
    "grey.png": pillow(LABELS),
    "palette.png": with_palette(LABELS, VOC),
    "bright_palette.png": with_palette(LABELS, [(200, 200, 255), *VOC]),
    "inverse_palette.png": with_palette(LABELS, RAMP[::-1]),
    "cut_in_two.png": pillow(np.where(np.arange(90)[:, None] == 40, 0, LABELS).astype(np.uint8)),
    "float.tif": tiff(LABELS.astype(np.float32)),
}


@pytest.mark.parametrize("name", IN_LABEL_FOLDER)
def test_in_the_folder_of_label_maps_every_number_is_a_nucleus(tmp_path, name):
    folder = tmp_path / "instance_labels"
    folder.mkdir()
    IN_LABEL_FOLDER[name](folder / name)
    mask = masks.read(folder / name)
    expected = np.where(np.arange(90)[:, None] == 40, 0, LABELS) if "cut" in name else LABELS
    np.testing.assert_array_equal(mask.labels, expected)
    np.testing.assert_array_equal(mask.foreground, expected > 0)
    assert not mask.notes


@pytest.mark.parametrize("folder", ["instance_labels", "masks"])
def test_a_background_that_has_a_number_is_refused(tmp_path, folder):
    """As a watershed leaves it: 0 on the lines between basins, one of which is the background."""
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "a.tif"
    basins = np.where(NUCLEI, NUMBERS + 1, 1)
    basins[NUCLEI & (cv2.erode(WHITE, np.ones((3, 3))) == 0)] = 0
    tiff(basins.astype(np.uint16))(path)
    refusal(masks.read, path, "value 1 on", "% of the image", "0 for the background")


FAR = np.pad(NUMBERS, ((0, 100), (0, 0)))  # below lies what nobody has annotated


def not_annotated(value, rows, numbers=FAR):
    """A label map with a number for what is not annotated, in two pieces."""
    found = numbers.astype(np.uint16)
    found[256 : 256 + rows, :120] = found[256 : 256 + rows, 130:] = value
    return found


@pytest.mark.parametrize("value", [50, 255, 65535])
@pytest.mark.parametrize("count", [3, 49])
def test_what_is_not_annotated_is_no_nucleus(tmp_path, value, count):
    """Of few numbers, it is told by the last one of a type alone."""
    (tmp_path / "instance_labels").mkdir()
    path = tmp_path / "instance_labels" / "a.png"
    few = np.where(count >= FAR, FAR, 0)
    opencv(not_annotated(value, 100, few))(path)
    if count == 49 or value != 50:
        refusal(masks.read, path, f"value {value}", "on 2", "% of the image", "not annotated")
    else:
        assert len(np.unique(masks.read_label_map(path))) == 5
    opencv(not_annotated(value, 4, few))(path)  # three nuclei
    assert len(np.unique(masks.read_label_map(path))) == count + 2


def test_a_large_nucleus_among_specks_or_as_number_255_is_a_nucleus(tmp_path):
    (tmp_path / "instance_labels").mkdir()
    path = tmp_path / "instance_labels" / "a.png"
    specks = NUMBERS.astype(np.uint16)
    specks[::36, ::3] = np.arange(50, 50 + specks[::36, ::3].size).reshape(8, -1)
    opencv(specks)(path)  # 49 nuclei of 300 pixels, 680 of one
    np.testing.assert_array_equal(masks.read_label_map(path), specks)
    whole = np.pad(squares(254), ((0, 60), (0, 0)))
    whole[102:, :14] = 255  # 51 times as large as the others, of 16 pixels
    opencv(whole)(path)
    refusal(masks.read, path, "value 255 on 5 %", "51 times as large")
    whole[102:, 13] = 0  # 47 times: the nucleus behind number 254
    opencv(whole)(path)
    assert masks.read(path).labels.max() == 255


def test_one_large_nucleus_in_a_small_crop_is_a_nucleus(tmp_path):
    (tmp_path / "instance_labels").mkdir()
    numbers = np.zeros((64, 64), np.uint16)
    numbers[2:62, 6:58] = 1  # three quarters
    for number in range(2, 10):  # and eight that the edge has cut
        numbers[7 * number - 12 : 7 * number - 9, 0] = number
    tiff(numbers)(tmp_path / "instance_labels" / "a.tif")
    np.testing.assert_array_equal(masks.read_label_map(tmp_path / "instance_labels/a.tif"), numbers)


def test_a_black_background_that_is_not_index_0_is_refused(tmp_path):
    (tmp_path / "instance_labels").mkdir()
    path = tmp_path / "instance_labels" / "a.png"
    indices = np.choose(LABELS, [1, 1, 0, 2, 3, 4, 5, 6]).astype(np.uint8)
    with_palette(indices, [VOC[6], *VOC[:6]])(path)
    refusal(masks.read, path, "palette in which black is not index 0")
    with_palette(LABELS, [(255,) * 3, *BRIGHT[1:3], (0,) * 3, *BRIGHT[3:]])(path)  # of a nucleus
    np.testing.assert_array_equal(masks.read_label_map(path), LABELS)


def test_a_number_that_stands_for_many_nuclei_is_refused(tmp_path):
    (tmp_path / "instance_labels").mkdir()
    path = tmp_path / "instance_labels" / "a.png"
    pillow(np.minimum(NUMBERS, 38).astype(np.uint8))(path)  # 38 to 49 share a number
    refusal(masks.read, path, "value 38 in 12 places", "8 bits")
    few = np.minimum(NUMBERS, 40)
    pillow(few.astype(np.uint8))(path)  # 10 places: pieces of one nucleus, for all that is known
    np.testing.assert_array_equal(masks.read_label_map(path), few)
    cut = np.minimum(NUMBERS, 38)
    cut[[14, 22], :36] = 0  # nucleus 1 has 3 places, a fourth of those of 38: a map of pieces
    pillow(cut.astype(np.uint8))(path)
    np.testing.assert_array_equal(masks.read_label_map(path), cut)


def squares(count):
    """A label map of 4 x 4 pixels a nucleus, 20 in a row, one pixel between them."""
    numbers = np.zeros((20 * 5, 20 * 5), np.uint16)
    for index in range(count):
        y, x = index // 20 * 5, index % 20 * 5
        numbers[y : y + 4, x : x + 4] = index + 1
    return numbers


def test_more_nuclei_than_8_bits_can_number_are_refused(tmp_path):
    folder = tmp_path / "instance_labels"
    folder.mkdir()
    for count in (300, 398):  # 1 to 255, 0, and from 1 again
        pillow(squares(count).astype(np.uint8))(folder / "a.png")
        words = f"{count - 256} of which lie in several places", "8 bits", "with 16"
        refusal(masks.read, folder / "a.png", *words)
        opencv(squares(count))(folder / "a.png")
        assert masks.read(folder / "a.png").labels.max() == count
    whole = squares(255).astype(np.uint8)
    pillow(whole)(folder / "a.png")
    assert masks.read(folder / "a.png").labels.max() == 255
    whole[1, :50] = 0  # ten nuclei in two pieces
    pillow(whole)(folder / "a.png")
    assert masks.read(folder / "a.png").labels.max() == 255


def test_a_mask_in_the_folder_of_label_maps_is_refused(tmp_path):
    folder = tmp_path / "instance_labels"
    folder.mkdir()
    pillow(WHITE)(folder / "a.png")
    refusal(masks.read, folder / "a.png", "255, in 49 places")
    pillow(np.where(NUMBERS == 5, 255, 0).astype(np.uint8))(folder / "one.png")
    assert masks.read(folder / "one.png").labels.max() == 255
    tiff(NUMBERS + np.float32(0.3))(folder / "a.tif")
    refusal(masks.read, folder / "a.tif", "fractions")
    resized = cv2.resize(NUMBERS.astype(np.uint8), (512, 512), interpolation=cv2.INTER_LINEAR)
    for pixels in (CLASSES, PHOTO, resized, blurred(1)):
        pillow(pixels.astype(np.uint8))(folder / "b.png")
        refusal(masks.read, folder / "b.png", "numbers in", "places")
    pillow(WHITE)(folder / "a.jpg")
    mask = masks.read(folder / "a.jpg")
    assert mask.labels is None and "JPEG" in mask.notes[0]


def half_as_large(how):
    return cv2.resize(WHITE, (128, 128), interpolation=how)


def by_jpeg(quality):
    return cv2.imdecode(cv2.imencode(".jpg", WHITE, [1, quality])[1], cv2.IMREAD_GRAYSCALE)


def drawn():
    picture = cv2.resize(WHITE, (1024, 1024), interpolation=cv2.INTER_NEAREST)
    return np.asarray(Image.fromarray(picture).resize((256, 256), Image.Resampling.LANCZOS))


def blurred(sigma, dtype=np.uint8, largest=255):
    soft = cv2.GaussianBlur(NUCLEI.astype(np.float64), (0, 0), sigma) * largest
    return (soft if np.dtype(dtype).kind == "f" else np.rint(soft)).astype(dtype)


SOFT = {
    "linear_and_back": cv2.resize(half_as_large(cv2.INTER_LINEAR), (256, 256)),
    "cubic_and_back": cv2.resize(half_as_large(cv2.INTER_CUBIC), (256, 256)),
    "area_and_back": cv2.resize(half_as_large(cv2.INTER_AREA), (256, 256)),
    "six_times_as_large": cv2.resize(WHITE, (1536, 1536)),
    "drawn": drawn(),
    "blurred": blurred(1.5),
    "blurred_16_bit": blurred(1, np.uint16, 65535),
    "blurred_float": blurred(1, np.float32, 1),
    "blurred_half": blurred(1, np.float16, 1),
    "blurred_float_255": blurred(1, np.float32, 255),
    "jpeg_saved_as_png_30": by_jpeg(30),
    "jpeg_saved_as_png_75": by_jpeg(75),
    "jpeg_saved_as_png_95": by_jpeg(95),
}


@pytest.mark.parametrize("name", SOFT)
def test_soft_edges_end_at_half_and_a_line_says_so(tmp_path, name):
    path = tmp_path / f"{name}.tif"
    tiff(SOFT[name])(path)
    mask = masks.read(path)
    scale = len(SOFT[name]) / len(NUCLEI)
    true = cv2.resize(WHITE, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST) > 0
    dice = 2 * (mask.foreground & true).sum() / (mask.foreground.sum() + true.sum())
    assert dice > 0.93
    assert mask.foreground.mean() == pytest.approx(true.mean(), rel=0.04)
    assert mask.labels is None
    (note,) = mask.notes
    assert "soft edges" in note and str(path) in note


BORDER = cv2.dilate(WHITE, np.ones((3, 3))) - WHITE > 0
CLASSES = np.where(NUCLEI, 1 + (NUMBERS % 49) % 2, 0)
SMALL = cv2.erode(WHITE, np.ones((3, 3)), iterations=7) > 0
SMALL_BORDER = cv2.dilate(SMALL.astype(np.uint8), np.ones((3, 3))) - SMALL > 0
PHOTO = (cv2.GaussianBlur(np.random.default_rng(1).normal(150, 300, (256, 256)), (0, 0), 4)).clip(
    0, 255
)
PROBABILITY = cv2.GaussianBlur(NUCLEI.astype(np.float32), (0, 0), 5)
DOUBTFUL = {
    "classes.png": (pillow(CLASSES.astype(np.uint8)), "value 1 lies in 25", "value 2 lies in 24"),
    "classes_16.tif": (tiff(CLASSES.astype(np.uint16)), "places"),
    "classes_float.tif": (tiff(CLASSES.astype(np.float32)), "places"),
    "classes_far_apart.png": (pillow((CLASSES * 127).astype(np.uint8)), "value 127 lies in 25"),
    "classes_full.png": (pillow((CLASSES * 127.5).astype(np.uint8)), "value 127 lies in 25"),
    "classes_palette.png": (with_palette(CLASSES.astype(np.uint8), VOC), "value 1 lies in 25"),
    "border.png": (pillow(np.where(BORDER, 255, NUCLEI).astype(np.uint8)), "values 1 and 255"),
    "border_of_small.png": (
        pillow(np.where(SMALL_BORDER, 255, SMALL).astype(np.uint8)),
        "values 1 and 255",
    ),
    "border_of_128.png": (
        pillow(np.where(BORDER, 128, WHITE).astype(np.uint8)),
        "values 128 and 255 lie in 49",
    ),
    "border_palette.png": (
        with_palette(np.where(BORDER, 255, NUCLEI).astype(np.uint8), [*VOC, *RAMP[7:]]),
        "values 1 and 255",
    ),
    "background_is_1.png": (pillow(NUCLEI.astype(np.uint8) + 1), "no 0", "everything is marked"),
    "picture.png": (pillow(PHOTO.astype(np.uint8)), "no 0"),
    "contrast.png": (pillow(((PHOTO - 140) * 9).clip(0, 255).astype(np.uint8)), "several places"),
    "padded.png": (pillow(np.pad(PHOTO.astype(np.uint8), ((256, 0), (0, 256)))), "several places"),
    "probability.tif": (tiff(PROBABILITY), "fractions"),
    "probability_255.png": (pillow((PROBABILITY * 255).astype(np.uint8)), "several places"),
    "pale.tif": (tiff(RGB[..., 0] / np.float32(255)), "fractions"),
    "negative.tif": (tiff(-LABELS.astype(np.int16)), "-5"),
    "all_negative.tif": (tiff(np.full((40, 40), -1, np.int16)), "-1"),
    "half_negative.tif": (tiff(np.repeat(np.int16([[0], [-1]]), 20, 0).repeat(40, 1)), "-1"),
    "nan.tif": (tiff(np.full((40, 40), np.nan, np.float32)), "not finite"),
    "infinite.tif": (tiff(np.where(MASK, np.inf, 0).astype(np.float32)), "not finite"),
    "colours.png": (pillow(RGB), "several colours"),
    "colours_of_labels.png": (pillow(np.array(VOC, np.uint8)[LABELS]), "several colours"),
    "ones.jpg": (pillow(3 * MASK.astype(np.uint8), quality=100), "black and white"),
    "labels.jpg": (pillow(20 * LABELS), "black and white"),
    "sixty_four_bits.tif": (tiff(NUCLEI * np.uint64(2**64 - 1)), "64 bits"),
    "white_comes_first.png": (
        with_palette((~NUCLEI).astype(np.uint8), [(255,) * 3, (0,) * 3]),
        "white comes before black",
    ),
    "black_is_not_first.png": (with_palette(LABELS % 2, [(255, 0, 0), (0, 0, 0)]), "palette"),
    "stack.tif": (tiff(np.stack([BYTES] * 5), photometric="minisblack"), "stack"),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_mask_of_doubtful_meaning_is_refused(tmp_path, name):
    write, *words = DOUBTFUL[name]
    write(tmp_path / name)
    refusal(masks.read, tmp_path / name, *words)


def test_the_index_counts_where_the_palette_of_imagej_is_inverted(tmp_path):
    indices = {256: BYTES, 2: MASK.astype(np.uint8)}
    for count, pixels in indices.items():
        for suffix in ("png", "bmp"):
            path = tmp_path / f"{count}.{suffix}"
            with_palette(pixels, ramp(count)[::-1])(path)
            mask = masks.read(path)
            np.testing.assert_array_equal(mask.foreground, MASK)
            (note,) = mask.notes
            assert "inverted" in note and str(path) in note


def test_a_palette_of_colours_has_its_background_at_0_whatever_the_colour(tmp_path):
    with_palette(LABELS % 6, BRIGHT)(tmp_path / "a.png")
    np.testing.assert_array_equal(masks.read(tmp_path / "a.png").labels, LABELS % 6)


ODD = {
    "nothing": (np.zeros((40, 40), np.uint8), "nothing is marked", 0),
    "nothing_bool": (np.zeros((40, 40), bool), "nothing is marked", 0),
    "everything": (np.full((40, 40), 255, np.uint8), "everything is marked", 1),
    "everything_1": (np.ones((40, 40), np.uint16), "everything is marked", 1),
    "inverted": (255 - WHITE, "77 % of this mask is marked as nucleus: is it inverted?", None),
    "of_128": (NUCLEI * np.uint8(128), "0 and 128", NUCLEI.mean()),
    "of_2": (NUCLEI * np.uint16(2), "0 and 2", NUCLEI.mean()),
    "of_half": (NUCLEI * np.float32(0.5), "0 and 0.5", NUCLEI.mean()),
}


@pytest.mark.parametrize("name", ODD)
def test_what_looks_odd_is_said_in_one_line(tmp_path, name):
    pixels, words, share = ODD[name]
    path = tmp_path / f"{name}.tif"
    tiff(pixels)(path)
    mask = masks.read(path)
    (note,) = mask.notes
    assert note.startswith(f"{path}: ") and words in note and "\n" not in note
    assert mask.foreground.mean() == (1 - NUCLEI.mean() if share is None else share)


LABELS_OF_RINGS = np.arange(100) // 35 + 3 * (np.arange(100)[:, None] // 35) + 1


def test_outlines_without_their_inside_are_said(tmp_path):
    rings = np.zeros((100, 100), np.uint8)
    for y in (5, 40):
        for x in (5, 40, 70):
            cv2.circle(rings, (x + 9, y + 9), 9, 255, 1)
    for folder, numbers in (
        ("masks", rings),
        ("instance_labels", (rings > 0) * LABELS_OF_RINGS.astype(np.uint8)),
    ):
        path = tmp_path / folder / "rings.png"
        path.parent.mkdir()
        pillow(numbers)(path)
        (note,) = (n for n in masks.read(path).notes if "outlines alone" in n)
        assert note.startswith(f"{path}: found ") and "expected filled nuclei" in note
    filled = cv2.floodFill(rings.copy(), None, (0, 0), 1)[1] != 1
    filled[9:12, 9:12] = 0  # a hole in a nucleus
    pillow(filled)(tmp_path / "filled.png")
    assert not masks.read(tmp_path / "filled.png").notes
    pillow(BYTES)(tmp_path / "nuclei.png")
    assert not masks.read(tmp_path / "nuclei.png").notes


def test_one_nucleus_is_a_mask_and_dense_tissue_is_not_called_inverted(tmp_path):
    for value in (1, 255):
        pillow(np.where(NUMBERS == 9, value, 0).astype(np.uint8))(tmp_path / "one.png")
        mask = masks.read(tmp_path / "one.png")
        assert mask.labels is None and not mask.notes
    dense = np.zeros((100, 100), np.uint8)
    dense[:58] = 255
    pillow(dense)(tmp_path / "dense.png")
    assert not masks.read(tmp_path / "dense.png").notes


@pytest.mark.parametrize("value", [0, 255])
def test_a_jpeg_mask_may_be_all_background_or_all_foreground(tmp_path, value):
    path = tmp_path / "mask.jpg"
    Image.fromarray(np.full((40, 40), value, np.uint8)).save(path)
    mask = masks.read(path)
    assert (mask.foreground == (value > 0)).all() and len(mask.notes) == 1


LARGE = {name: array for name, array in SOFT.items() if array.shape == (256, 256)}
LARGE |= {f"odd {name}": pixels for name, (pixels, *_) in ODD.items()}
LARGE |= {"plain": WHITE, "bool": NUCLEI, "labels": NUMBERS.astype(np.uint16)}
LARGE |= {"float labels": NUMBERS.astype(np.float32), "rgb": grey3(WHITE), "ones": NUCLEI * 1}
LARGE |= {"classes": CLASSES.astype(np.uint8), "picture": PHOTO.astype(np.uint8)}
LARGE |= {"nan picture": np.full((40, 40), np.nan, np.float32)}
LARGE |= {"probability": PROBABILITY, "negative": -NUMBERS.astype(np.int16)}
LARGE |= {"border": np.where(BORDER, 255, NUCLEI).astype(np.uint8)}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_mask_too_large_for_memory_means_what_a_small_one_means(
    tmp_path, monkeypatch, name, rows
):
    path = tmp_path / "mask.tif"
    kind = {"photometric": "rgb"} if name == "rgb" else {}
    tifffile.imwrite(path, LARGE[name], tile=(32, 48), compression="zlib", **kind)

    def outcome(read):
        try:
            foreground, notes = read()
            return foreground.tobytes(), notes
        except InputError as error:
            return str(error)

    def by_windows():
        with monkeypatch.context() as patch:
            patch.setattr(masks, "BAND", rows * LARGE[name].shape[1])
            mask = windows.open_mask(path, big=1)
            return mask.read(0, 0, mask.height, mask.width), mask.notes

    whole = outcome(lambda: masks.read(path)[::2])
    assert outcome(by_windows) == whole
    assert isinstance(whole, str) == (name in "classes nan picture probability negative border")


@pytest.mark.parametrize("seed", range(20))
def test_places_are_counted_across_bands_as_in_one(tmp_path, seed):
    """Against scipy, value by value."""
    random = np.random.default_rng(seed)
    numbers = random.integers(0, random.integers(2, 5), (31, 23)).astype(np.uint16)
    if seed % 2:
        numbers = cv2.resize(numbers, (60, 64), interpolation=cv2.INTER_NEAREST)
    numbers = np.pad(numbers, 1)
    if numbers.max() < 2:
        numbers[0, 0] = 2
    values = np.unique(numbers)[1:]
    counts = [ndimage.label(numbers == value, np.ones((3, 3)))[1] for value in values]
    several = [(v, n) for v, n in zip(values, counts, strict=True) if n > 1]
    for rows in (1, 2, 7, 100):

        def bands(rows=rows):
            return (numbers[y : y + rows] for y in range(0, len(numbers), rows))

        with pytest.raises(InputError) as error:
            masks.meaning_of(tmp_path / "a.tif", bands, lossy=False)
        if len({n for _, n in several}) == len(several):
            for value, count in several:
                assert f"value {value} lies in {count} places" in str(error.value)
        else:
            assert f"{several[0][1]} places" in str(error.value)
