"""What tissue.images promises, on real files written by the libraries that users write with."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from tissue.files import InputError
from tissue.images import image_shape, read_image
from tissue.masks import read_mask
from tissue.pairs import Pair, check_pair, find_images, find_pairs
from tissue.pixel_size import pixel_size_um

HEIGHT, WIDTH = 90, 70
_random = np.random.default_rng(0)
_y, _x = np.mgrid[:HEIGHT, :WIDTH]
# Smooth, so that JPEG keeps it, with a little noise, so that no two pixels can be mixed up.
RGB = np.stack([2 * _y + 20, 3 * _x + 10, _x + _y], axis=-1).astype(np.uint8)
RGB += _random.integers(0, 4, RGB.shape, dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = _random.integers(0, 256, GREY.shape, dtype=np.uint8)
RGBA = np.dstack([RGB, ALPHA])
CHANNEL_FIRST = np.moveaxis(RGB, -1, 0).copy()
MASK = (_x - 30) ** 2 + (_y - 40) ** 2 < 400
LABELS = np.where(MASK, 1 + _x // 10, 0).astype(np.uint8)


def tiff(array, **options):
    """A writer of `array` by tifffile."""
    return lambda path: tifffile.imwrite(path, array, **options)


def pillow(array, **options):
    """A writer of `array` by Pillow."""
    return lambda path: Image.fromarray(array).save(path, **options)


def opencv(array):
    """A writer of `array` in RGB order by OpenCV, which wants BGR."""
    swapped = array[..., [2, 1, 0, 3][: array.shape[2]]] if array.ndim == 3 else array
    return lambda path: cv2.imwrite(str(path), swapped)


def with_palette(indices, colours, **options):
    """A writer of a palette image by Pillow."""

    def write(path):
        picture = Image.fromarray(indices)
        picture.putpalette(np.asarray(colours, np.uint8).ravel().tolist())
        picture.save(path, **options)

    return write


def pyramid(array, subifds):
    """A writer of `array` with two smaller levels, in SubIFDs or in pages marked as reduced."""

    def write(path):
        with tifffile.TiffWriter(path) as tif:
            tif.write(array, photometric="rgb", tile=(32, 32), subifds=2 if subifds else 0)
            for step in (2, 4):
                level = np.ascontiguousarray(array[::step, ::step])
                tif.write(level, photometric="rgb", tile=(32, 32), subfiletype=1, metadata=None)

    return write


def aperio(path):
    """Full resolution, thumbnail, a level, label and macro photograph, as in an SVS file."""
    options = {"photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as tif:
        text = "Aperio Image Library v10\n90x70 |AppMag = 20|MPP = 0.4990|Left = 25.1"
        tif.write(RGB, tile=(32, 32), description=text, **options)
        tif.write(RGB[::3, ::3].copy(), description="Aperio thumbnail", **options)
        tif.write(RGB[::4, ::4].copy(), tile=(16, 16), description="Aperio level", **options)
        tif.write(RGB[:20, :30].copy(), subfiletype=1, description="Aperio label", **options)
        tif.write(RGB[:30, :20].copy(), subfiletype=9, description="Aperio macro", **options)


def grey3(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def refusal(read, path, *words):
    """Assert that `read` refuses `path` in one line that names it and has `words`."""
    with pytest.raises(InputError) as error:
        read(path)
    text = str(error.value)
    assert "\n" not in text
    for word in (str(path), "found", "expected", *words):
        assert word in text


IMAGES = {
    "plain.tif": (tiff(RGB, photometric="rgb"), RGB),
    "lzw.tif": (tiff(RGB, photometric="rgb", compression="lzw", predictor=True), RGB),
    "deflate.tiff": (tiff(RGB, photometric="rgb", compression="zlib"), RGB),
    "strips.tif": (tiff(RGB, photometric="rgb", rowsperstrip=7), RGB),
    "tiled.tif": (tiff(RGB, photometric="rgb", tile=(32, 32), compression="zlib"), RGB),
    "big.tif": (tiff(RGB, photometric="rgb", bigtiff=True), RGB),
    "separate.tif": (tiff(CHANNEL_FIRST, photometric="rgb", planarconfig="separate"), RGB),
    "big_endian.tif": (tiff(RGB.astype(">u2") * 257, photometric="rgb", byteorder=">"), RGB),
    "imagej.tif": (tiff(RGB, imagej=True), RGB),
    "imagej_channels.tif": (tiff(CHANNEL_FIRST, imagej=True, metadata={"axes": "CYX"}), RGB),
    "ome.ome.tif": (tiff(RGB, photometric="rgb", ome=True), RGB),
    "ome_channels.ome.tif": (
        tiff(CHANNEL_FIRST, photometric="minisblack", metadata={"axes": "CYX"}),
        RGB,
    ),
    "three_plain_samples.tif": (tiff(RGB, photometric="minisblack", planarconfig="contig"), RGB),
    "rgba.tif": (tiff(RGBA, photometric="rgb", extrasamples=["unassalpha"]), RGB),
    "rgb_and_unnamed.tif": (tiff(RGBA, photometric="rgb", extrasamples=["unspecified"]), RGB),
    "grey.tif": (tiff(GREY), grey3(GREY)),
    "grey_alpha.tif": (
        tiff(np.dstack([GREY, ALPHA]), photometric="minisblack", extrasamples=["unassalpha"]),
        grey3(GREY),
    ),
    "white_is_zero.tif": (tiff(255 - GREY, photometric="miniswhite"), grey3(GREY)),
    "palette.tif": (
        tiff(GREY, photometric="palette", colormap=np.tile(np.arange(256) * 257, (3, 1))),
        grey3(GREY),
    ),
    "bool.tif": (tiff(MASK), grey3(MASK * np.uint8(255))),
    "subifds.tif": (pyramid(RGB, subifds=True), RGB),
    "levels.tif": (pyramid(RGB, subifds=False), RGB),
    "slide.svs": (aperio, RGB),
    "pillow.tif": (pillow(RGB, compression="tiff_lzw"), RGB),
    "rgb.png": (pillow(RGB), RGB),
    "rgba.png": (pillow(RGBA), RGB),
    "grey.png": (pillow(GREY), grey3(GREY)),
    "grey_alpha.png": (pillow(np.dstack([GREY, ALPHA])), grey3(GREY)),
    "bool.png": (pillow(MASK), grey3(MASK * np.uint8(255))),
    "opencv.png": (opencv(RGB), RGB),
    "opencv_alpha16.png": (opencv(RGBA.astype(np.uint16) * 257), RGB),
    "palette.png": (
        with_palette(LABELS, 10 * np.arange(24).reshape(8, 3)),
        10 * np.arange(24, dtype=np.uint8).reshape(8, 3)[LABELS],
    ),
    "rgb.bmp": (pillow(RGB), RGB),
    "grey.BMP": (pillow(GREY), grey3(GREY)),
    "png_in_truth.tif": (lambda path: Image.fromarray(RGB).save(path, format="PNG"), RGB),
}


@pytest.mark.parametrize("name", IMAGES)
def test_read_image_gives_the_rgb_pixels_that_were_written(tmp_path, name):
    write, expected = IMAGES[name]
    write(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, expected)
    assert image_shape(tmp_path / name) == (HEIGHT, WIDTH)


JPEGS = {
    "pillow.jpg": (pillow(RGB, quality=95), RGB),
    "grey.jpeg": (pillow(GREY, quality=95), grey3(GREY)),
    "opencv.JPG": (opencv(RGB), RGB),
    "ycbcr.tif": (tiff(RGB, photometric="rgb", compression="jpeg"), RGB),
    "rgb.tif": (
        tiff(RGB, photometric="rgb", compression="jpeg", compressionargs={"outcolorspace": "rgb"}),
        RGB,
    ),
    "cmyk.jpg": (lambda path: Image.fromarray(RGB).convert("CMYK").save(path, quality=95), RGB),
}


@pytest.mark.parametrize("name", JPEGS)
def test_read_image_of_a_jpeg_is_close_to_what_was_written(tmp_path, name):
    write, expected = JPEGS[name]
    write(tmp_path / name)
    difference = read_image(tmp_path / name).astype(int) - expected
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_16_bit_files_keep_the_upper_8_of_the_bits_in_use(tmp_path, bits, suffix):
    deep = RGB.astype(np.uint16) << (bits - 8)
    deep[0, 0] = (1 << bits) - 1
    path = tmp_path / f"deep.{suffix}"
    tiff(deep, photometric="rgb")(path) if suffix == "tif" else opencv(deep)(path)
    expected = RGB.copy()
    expected[0, 0] = 255
    np.testing.assert_array_equal(read_image(path), expected)


# What an EXIF or TIFF reader must do with pixels stored under each orientation.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_stand_upright_as_their_orientation_says(tmp_path, orientation):
    expected = UPRIGHT[orientation](RGB)
    path = tmp_path / "turned.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    np.testing.assert_array_equal(read_image(path), expected)
    assert image_shape(path) == expected.shape[:2]
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(RGB).save(path, quality=95, exif=exif)
    assert np.abs(read_image(path).astype(int) - expected).mean() < 4
    assert image_shape(path) == expected.shape[:2]


def several(*arrays):
    """A writer of independent images, one per page."""

    def write(path):
        with tifffile.TiffWriter(path) as tif:
            for array in arrays:
                tif.write(array, metadata=None)

    return write


NO_IMAGES = {
    "z.tif": (tiff(np.stack([GREY] * 5), imagej=True, metadata={"axes": "ZYX"}), "ZYX"),
    "t.ome.tif": (
        tiff(np.stack([RGB] * 4), photometric="rgb", ome=True, metadata={"axes": "TYXS"}),
        "TYXS",
    ),
    "pages.tif": (several(GREY, GREY), "stack"),
    "sizes.tif": (several(GREY, GREY[:60, :31]), "2 images"),
    "two.tif": (tiff(RGB[..., :2], photometric="minisblack", planarconfig="contig"), "2 channels"),
    "five.tif": (tiff(np.dstack([RGB, RGB[..., :2]]), photometric="rgb"), "5 channels"),
    "cmyk.tif": (tiff(RGBA, photometric="separated"), "SEPARATED"),
    "jpeg2000_ycbcr.tif": (tiff(RGB, photometric="rgb", compression=33003), "YCBCR"),
    "lab.tif": (tiff(RGB, photometric="cielab"), "CIELAB"),
    "float.tif": (tiff(RGB.astype(np.float32), photometric="rgb"), "float32"),
    "signed.tif": (tiff(RGB.astype(np.int16), photometric="rgb"), "int16"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_stacks_and_strange_channels_or_types_are_refused(tmp_path, name):
    write, word = NO_IMAGES[name]
    write(tmp_path / name)
    refusal(read_image, tmp_path / name, word)


def test_an_image_beyond_pillows_limit_is_read(tmp_path):
    path = tmp_path / "wide.png"
    Image.new("1", (14000, 13000)).save(path)  # twice the limit is 179 million pixels
    assert image_shape(path) == (13000, 14000)
    assert not read_mask(path).any()


def test_a_missing_file_is_reported_as_missing(tmp_path):
    for read in (read_image, read_mask, pixel_size_um, image_shape):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nowhere.png")


@pytest.mark.parametrize("suffix", ["tif", "png", "jpg", "bmp", "svs"])
@pytest.mark.parametrize(
    "content", [b"", b"Dear colleague,\nthe slides\n", _random.bytes(3000)], ids=["0", "text", "?"]
)
def test_bytes_that_are_no_image_are_refused_by_every_function(tmp_path, suffix, content):
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(content)
    for read in (read_image, read_mask, pixel_size_um, image_shape):
        refusal(read, path, "replace the file")


@pytest.mark.parametrize("signature", [b"II*\0", b"MM\0*", b"II+\0\x08\0", b"\x89PNG\r\n\x1a\n"])
def test_random_bytes_behind_a_true_signature_are_refused(tmp_path, signature, caplog):
    path = tmp_path / "bad.tif"
    for seed in range(20):
        path.write_bytes(signature + np.random.default_rng(seed).bytes(2000))
        refusal(read_image, path, "replace the file")
    assert not caplog.records


@pytest.mark.parametrize("name", IMAGES | JPEGS)
def test_a_truncated_file_is_refused_unless_all_its_pixels_are_there(tmp_path, name, capfd):
    path = tmp_path / name
    (IMAGES | JPEGS)[name][0](path)
    whole, content = read_image(path), path.read_bytes()
    for part in (0.02, 0.3, 0.5):
        path.write_bytes(content[: int(part * len(content))])
        refusal(read_image, path)
    for missing in (200, 100, 50, 20, 10, 5, 2, 1):
        path.write_bytes(content[:-missing])
        try:
            np.testing.assert_array_equal(read_image(path), whole)
        except InputError:
            continue
    assert capfd.readouterr().err == ""


def test_threads_do_not_share_the_faults_of_their_files(tmp_path):
    good, bad = tmp_path / "good.tif", tmp_path / "bad.tif"
    tiff(CHANNEL_FIRST, imagej=True, metadata={"axes": "CYX"})(good)
    bad.write_bytes(good.read_bytes()[:10000])  # of three planes, one

    def is_read(path):
        try:
            return read_image(path).shape == RGB.shape
        except InputError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(is_read, [good, bad] * 60)) == [True, False] * 60


VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (9, 9, 9), (7, 0, 0)]
BRIGHT = [(200, 200, 255), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (9, 9, 9)]
BYTES = MASK * np.uint8(255)
MASKS = {
    "bytes.png": pillow(BYTES),
    "ones.png": pillow(MASK.astype(np.uint8)),
    "bits.png": pillow(MASK),
    "labels8.png": pillow(LABELS),
    "labels16.png": opencv(LABELS * np.uint16(300)),
    "rgb.png": pillow(grey3(BYTES)),
    "rgba.png": pillow(np.dstack([grey3(BYTES), ALPHA])),
    "grey_alpha.png": pillow(np.dstack([BYTES, ALPHA])),
    "palette.png": with_palette(LABELS, VOC),
    "palette_of_bright_background.png": with_palette(LABELS % 6, BRIGHT),
    "palette_white_on_black.png": with_palette(MASK.astype(np.uint8), [(0,) * 3, (255,) * 3]),
    "palette_white_first.png": with_palette((~MASK).astype(np.uint8), [(255,) * 3, (0,) * 3]),
    "palette.bmp": with_palette(LABELS, VOC),
    "palette.tif": with_palette(LABELS, VOC),
    "bytes.bmp": pillow(BYTES),
    "bits.bmp": pillow(MASK),
    "bytes.jpg": pillow(BYTES, quality=60),
    "rgb.jpg": pillow(grey3(BYTES), quality=60),
    "jpeg.tif": tiff(BYTES, compression="jpeg"),
    "bits.tif": pillow(MASK),
    "fax.tif": pillow(MASK, compression="group4"),
    "bool.tif": tiff(MASK),
    "bool.ome.tif": tiff(MASK, ome=True),
    "imagej.tif": tiff(BYTES, imagej=True),
    "imagej_inverting_lut.tif": tiff(BYTES, imagej=True, photometric="miniswhite"),
    "white_is_zero.tif": tiff(255 - BYTES, photometric="miniswhite"),
    "labels16.tif": tiff(LABELS * np.uint16(300), compression="lzw"),
    "labels32.tif": tiff(LABELS * np.uint32(70000)),
    "labels_signed.tif": tiff(LABELS.astype(np.int32)),
    "float.tif": tiff(MASK.astype(np.float32)),
    "double.tif": tiff(LABELS.astype(np.float64)),
}


@pytest.mark.parametrize("name", MASKS)
def test_read_mask_gives_the_foreground_that_was_written(tmp_path, name):
    MASKS[name](tmp_path / name)
    mask = read_mask(tmp_path / name)
    assert mask.dtype == bool and mask.flags.c_contiguous
    expected = MASK & (LABELS % 6 != 0) if "bright" in name else MASK
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("value", [0, 255])
def test_a_jpeg_mask_may_be_all_background_or_all_foreground(tmp_path, value):
    path = tmp_path / "mask.jpg"
    Image.fromarray(np.full((40, 40), value, np.uint8)).save(path)
    assert (read_mask(path) == (value > 0)).all()


NO_MASKS = {
    "colours.png": (pillow(RGB), "several colours"),
    "probability.tif": (tiff(RGB[..., 0] / np.float32(255)), "fractions"),
    "nan.tif": (tiff(np.full((40, 40), np.nan, np.float32)), "fractions"),
    "ones.jpg": (pillow(3 * MASK.astype(np.uint8), quality=100), "black and white"),
    "labels.jpg": (pillow(20 * LABELS), "black and white"),
    "black_is_not_first.png": (with_palette(LABELS % 2, [(255, 0, 0), (0, 0, 0)]), "palette"),
    "stack.tif": (tiff(np.stack([BYTES] * 5), photometric="minisblack"), "stack"),
}


@pytest.mark.parametrize("name", NO_MASKS)
def test_a_mask_of_doubtful_meaning_is_refused(tmp_path, name):
    write, word = NO_MASKS[name]
    write(tmp_path / name)
    refusal(read_mask, tmp_path / name, word)


def by_imagej(unit):
    """A writer of a TIFF of 4 pixels per `unit` as ImageJ describes it."""
    return tiff(RGB, imagej=True, resolution=(4, 4), metadata={"unit": unit})


def by_ome(size, unit):
    metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeXUnit": unit}
    return tiff(RGB, photometric="rgb", ome=True, metadata=metadata)


PIXEL_SIZES = {
    "inch.tif": (tiff(RGB, resolution=(101600, 101600), resolutionunit="inch"), 0.25),
    "cm.tif": (tiff(RGB, resolution=(40000, 40000), resolutionunit="centimeter"), 0.25),
    "no_unit.tif": (tiff(RGB, resolution=(40000, 40000), resolutionunit="none"), None),
    "screen.tif": (tiff(RGB, resolution=(72, 72), resolutionunit="inch"), None),
    "nothing.tif": (tiff(RGB), None),
    "um.tif": (by_imagej("um"), 0.25),
    "micron.tif": (by_imagej("micron"), 0.25),
    "spelled.tif": (by_imagej("\\u00B5m"), 0.25),
    "mm.tif": (tiff(RGB, imagej=True, resolution=(4000, 4000), metadata={"unit": "mm"}), 0.25),
    "pixel.tif": (by_imagej("pixel"), None),
    "um.ome.tif": (by_ome(0.25, "µm"), 0.25),
    "nm.ome.tif": (by_ome(250, "nm"), 0.25),
    "mm.ome.tif": (by_ome(2.5e-4, "mm"), 0.25),
    "reference.ome.tif": (by_ome(0.25, "pixel"), None),
    "slide.svs": (aperio, 0.499),
    "dpi.png": (pillow(RGB, dpi=(101600, 101600)), 0.25),
    "screen.png": (pillow(RGB, dpi=(96, 96)), None),
    "nothing.png": (pillow(RGB), None),
    "dpi.jpg": (pillow(RGB, dpi=(50800, 50800)), 0.5),
    "screen.jpg": (pillow(RGB, dpi=(72, 72)), None),
    "screen.bmp": (pillow(RGB, dpi=(72, 72)), None),
}


@pytest.mark.parametrize("name", PIXEL_SIZES)
def test_pixel_size_is_what_a_microscope_wrote_or_none(tmp_path, name):
    write, expected = PIXEL_SIZES[name]
    write(tmp_path / name)
    found = pixel_size_um(tmp_path / name)
    assert found == (expected if expected is None else pytest.approx(expected, rel=1e-4))


def test_find_images_gives_the_stems_in_order_and_passes_over_the_rest(tmp_path):
    for name in ("b.PNG", "a.b.tif", "c.ome.tif", "z.svs", "A.jpeg", ".hidden.tif", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tif").mkdir()
    images = find_images(tmp_path)
    assert list(images) == ["A", "a.b", "b", "c", "z"]
    assert images["c"] == tmp_path / "c.ome.tif"


def test_find_images_names_all_files_that_share_a_stem(tmp_path):
    for name in ("a.tif", "a.png", "a.ome.tiff", "b.bmp", "b.jpg", "c.tif"):
        (tmp_path / name).touch()
    with pytest.raises(InputError) as error:
        find_images(tmp_path)
    for name in ("a.tif", "a.png", "a.ome.tiff", "b.bmp", "b.jpg"):
        assert name in str(error.value)
    assert "c.tif" not in str(error.value)


def test_find_images_of_a_missing_folder_is_reported_as_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file or folder"):
        find_images(tmp_path / "nowhere")


def test_find_images_takes_files_and_folders_together(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("folder/b.png", "a.tif", "left_out.tif"):
        (tmp_path / name).touch()
    found = find_images(tmp_path / "a.tif", tmp_path / "folder")
    assert found == {"a": tmp_path / "a.tif", "b": tmp_path / "folder" / "b.png"}
    with pytest.raises(InputError, match="several files named b"):
        find_images(tmp_path / "folder", tmp_path / "folder" / "b.png")


def test_find_images_of_a_folder_without_any_is_an_error(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="found no image"):
        find_images(tmp_path)


def folders(root, images=(), masks=(), mask_folder="mask binary"):
    for folder, names in (("tissue_images", images), (mask_folder, masks)):
        (root / folder).mkdir()
        for name in names:
            (root / folder / name).touch()


@pytest.mark.parametrize("mask_folder", ["mask binary", "mask_binary", "masks"])
def test_find_pairs_joins_image_and_mask_of_one_stem_whatever_their_formats(tmp_path, mask_folder):
    folders(tmp_path, ["b.ome.tif", "a.jpg"], ["a.png", "b.bmp"], mask_folder)
    images, masks = tmp_path / "tissue_images", tmp_path / mask_folder
    assert find_pairs(tmp_path) == [
        Pair("a", images / "a.jpg", masks / "a.png"),
        Pair("b", images / "b.ome.tif", masks / "b.bmp"),
    ]


def test_find_pairs_takes_the_first_mask_folder_there_is(tmp_path):
    folders(tmp_path, ["a.tif"], ["a.png"])
    (tmp_path / "masks").mkdir()
    assert find_pairs(tmp_path)[0].mask == tmp_path / "mask binary" / "a.png"


def faults_of(root):
    with pytest.raises(InputError) as error:
        find_pairs(root)
    assert "\n" not in str(error.value)
    return str(error.value).split("; ")


def test_find_pairs_reports_all_faults_of_the_folders_at_once(tmp_path):
    images = ["a.tif", "a.png", "only_image_1.tif", "only_image_2.tif", "c.tif"]
    folders(tmp_path, images, ["a.png", "c.png", "c.tif", "only_mask.png"])
    twice_image, twice_mask, no_mask, no_image = faults_of(tmp_path)
    assert "a.png" in twice_image and "a.tif" in twice_image
    assert "c.png" in twice_mask and "c.tif" in twice_mask
    assert "only_image_1.tif" in no_mask and "only_image_2.tif" in no_mask
    assert "only_mask.png" in no_image


def test_find_pairs_reports_both_missing_folders(tmp_path):
    no_images, no_masks = faults_of(tmp_path)
    assert "tissue_images" in no_images and "mask binary" in no_masks


def test_find_pairs_reports_an_empty_image_folder(tmp_path):
    folders(tmp_path)
    (fault,) = faults_of(tmp_path)
    assert "found no image" in fault


def written_pair(root, image, mask, suffix="tif"):
    pair = Pair("a", root / f"a.{suffix}", root / "a.png")
    options = {"resolution": (4, 4), "metadata": {"unit": "um"}} if suffix == "tif" else {}
    (tiff(image, imagej=True, **options) if suffix == "tif" else pillow(image))(pair.image)
    pillow(mask)(pair.mask)
    return pair


def test_check_pair_tells_size_pixel_size_and_foreground(tmp_path):
    facts = check_pair(written_pair(tmp_path, RGB, BYTES), patch_dim=64)
    assert (facts.height, facts.width) == (HEIGHT, WIDTH)
    assert facts.pixel_size_um == pytest.approx(0.25)
    assert facts.foreground == pytest.approx(MASK.mean())


def test_check_pair_recognises_a_picture_in_another_format_and_no_other_picture(tmp_path):
    digests = [
        check_pair(written_pair(tmp_path, image, mask, suffix), 32).pixels_sha256
        for image, mask, suffix in (
            (RGB, BYTES, "tif"),
            (RGB, BYTES, "bmp"),
            (RGB ^ 1, BYTES, "tif"),
            (RGB.reshape(WIDTH, HEIGHT, 3), BYTES.T, "tif"),
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_check_pair_reports_two_sizes_and_an_image_smaller_than_a_patch(tmp_path):
    pair = written_pair(tmp_path, RGB, BYTES[:80])
    refusal(lambda _: check_pair(pair, 128), pair.image, "90 x 70", "80 x 70", "128 x 128")


def test_check_pair_reports_both_files_that_cannot_be_read(tmp_path):
    pair = Pair("a", tmp_path / "a.tif", tmp_path / "a.png")
    pair.image.write_bytes(b"II*\0 no image")
    pair.mask.write_bytes(b"")
    refusal(lambda _: check_pair(pair, 32), pair.image, str(pair.mask), "; ")
