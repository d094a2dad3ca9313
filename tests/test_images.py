"""What tissue.images promises, on real files written by the libraries that users write with."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.pictures import (
    ALPHA,
    BYTES,
    CHANNEL_FIRST,
    GREY,
    HEIGHT,
    LABELS,
    MASK,
    RGB,
    RGBA,
    WIDTH,
    aperio,
    grey3,
    opencv,
    pillow,
    pyramid,
    refusal,
    tiff,
    with_palette,
)
from tissue import windows
from tissue.bits import Bits, bit_lines
from tissue.files import InputError
from tissue.images import bits_in_use, bits_of, image_shape, read_image, said_of_turned
from tissue.masks import read_mask
from tissue.pairs import Pair, check_pair, find_images, find_pairs
from tissue.pixel_size import pixel_size_um


def on_white(pixels):
    """What a viewer shows of `pixels` with ALPHA before a white ground."""
    alpha = ALPHA[..., None].astype(int)
    return np.rint((pixels * alpha + 255 * (255 - alpha)) / 255).astype(np.uint8)


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
    "rgba.tif": (tiff(RGBA, photometric="rgb", extrasamples=["unassalpha"]), on_white(RGB)),
    "rgba_separate.tif": (
        tiff(
            np.moveaxis(RGBA, -1, 0).astype(np.uint16) * 257,
            photometric="rgb",
            planarconfig="separate",
            extrasamples=["unassalpha"],
        ),
        on_white(RGB),
    ),
    "premultiplied.tif": (tiff(RGBA, photometric="rgb", extrasamples=["assocalpha"]), RGB),
    "opaque.tif": (
        tiff(np.dstack([RGB, 0 * ALPHA + 255]), photometric="rgb", extrasamples=["unassalpha"]),
        RGB,
    ),
    "opaque.png": (pillow(np.dstack([RGB, 0 * ALPHA + 255])), RGB),
    "rgb_and_unnamed.tif": (tiff(RGBA, photometric="rgb", extrasamples=["unspecified"]), RGB),
    "grey.tif": (tiff(GREY), grey3(GREY)),
    "grey_alpha.tif": (
        tiff(np.dstack([GREY, ALPHA]), photometric="minisblack", extrasamples=["unassalpha"]),
        on_white(grey3(GREY)),
    ),
    "white_is_zero.tif": (tiff(255 - GREY, photometric="miniswhite"), grey3(GREY)),
    "palette.tif": (
        tiff(GREY, photometric="palette", colormap=np.tile(np.arange(256) * 257, (3, 1))),
        grey3(GREY),
    ),
    "bool.tif": (tiff(MASK), grey3(BYTES)),
    "subifds.tif": (pyramid(RGB, subifds=True), RGB),
    "levels.tif": (pyramid(RGB, subifds=False), RGB),
    "slide.svs": (aperio, RGB),
    "pillow.tif": (pillow(RGB, compression="tiff_lzw"), RGB),
    "rgb.png": (pillow(RGB), RGB),
    "rgba.png": (pillow(RGBA), on_white(RGB)),
    "grey.png": (pillow(GREY), grey3(GREY)),
    "grey_alpha.png": (pillow(np.dstack([GREY, ALPHA])), on_white(grey3(GREY))),
    "bool.png": (pillow(MASK), grey3(BYTES)),
    "opencv.png": (opencv(RGB), RGB),
    "opencv_alpha16.png": (opencv(RGBA.astype(np.uint16) * 257), on_white(RGB)),
    "palette.png": (
        with_palette(LABELS, 10 * np.arange(24).reshape(8, 3)),
        10 * np.arange(24, dtype=np.uint8).reshape(8, 3)[LABELS],
    ),
    "transparent_index.png": (
        with_palette(LABELS, 10 * np.arange(24).reshape(8, 3), transparency=2),
        np.where((LABELS == 2)[..., None], 255, 10 * np.arange(24).reshape(8, 3)[LABELS]),
    ),
    "transparent_colour.png": (
        pillow(GREY, transparency=int(GREY[0, 0])),
        grey3(np.where(np.isin(GREY, GREY[0, 0]), 255, GREY).astype(np.uint8)),
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
    lines = said_of_turned([path, path.with_suffix(".tif"), tmp_path / "none.png"])
    named = [line.partition(":")[0] for line in lines]
    assert named == ["turned.jpg, turned.tif"] * (orientation != 1)


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for read in (read_image, image_shape, bits_in_use, pixel_size_um, read_mask):
        refusal(read, tmp_path / "a.png", "no regular file")


def test_a_missing_file_is_reported_as_missing(tmp_path):
    for read in (read_image, read_mask, pixel_size_um, image_shape):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nowhere.png")


@pytest.mark.parametrize("suffix", ["tif", "png", "jpg", "bmp", "svs"])
@pytest.mark.parametrize(
    "content",
    [b"", b"Dear colleague,\nthe slides\n", np.random.default_rng(0).bytes(3000)],
    ids=["0", "text", "?"],
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
    (tmp_path / "b.tif").touch()
    with pytest.raises(InputError, match="several files named b"):
        find_images(tmp_path / "folder", tmp_path / "b.tif")


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


def deep(largest, shape=(40, 50)):
    """16-bit grey pixels, 1000 but for a row that is `largest`."""
    pixels = np.full(shape, 1000, np.uint16)
    pixels[3] = largest
    return pixels


def ome(pixels, bits):
    metadata = {"axes": "YX", "SignificantBits": bits}
    return tiff(pixels, ome=True, photometric="minisblack", metadata=metadata)


MAX_SAMPLE_VALUE = 281  # TIFF tag
BITS = {
    "8.png": (opencv(deep(200) % 256), 8),
    "10.tif": (tiff(deep(1023)), 10),
    "odd.tif": (tiff(deep(1024)), 12),
    "12.png": (opencv(deep(4095)), 12),
    "14.tif": (tiff(deep(16383), compression="zlib", tile=(16, 16)), 14),
    "16.png": (opencv(deep(40000)), 16),
    "alpha.tif": (
        tiff(np.dstack([deep(1023), deep(65535)]), photometric=1, extrasamples=["unassalpha"]),
        10,
    ),
    "alpha.png": (opencv(np.dstack([deep(1000)] * 3 + [deep(65535)])), 10),
    "told.tif": (tiff(deep(1023), extratags=[(MAX_SAMPLE_VALUE, "H", 1, 4095, True)]), 12),
    "told_wrongly.tif": (tiff(deep(4095), extratags=[(MAX_SAMPLE_VALUE, "H", 1, 255, True)]), 12),
    "told_nothing.tif": (tiff(deep(1023), extratags=[(MAX_SAMPLE_VALUE, "H", 1, 65535, True)]), 10),
    "told.ome.tif": (ome(deep(1023), 14), 14),
    "negative.tif": (tiff(~deep(1023), photometric="miniswhite"), 10),
    "eight.tif": (tiff(RGB), None),
    "eight.png": (pillow(RGB), None),
    "eight.jpg": (pillow(RGB), None),
}


@pytest.mark.parametrize("name", BITS)
def test_bits_in_use_are_the_fewest_that_hold_the_file_or_what_it_tells(tmp_path, name):
    write, bits = BITS[name]
    write(tmp_path / name)
    assert bits_in_use(tmp_path / name) == bits


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_one_number_of_bits_makes_one_brightness_of_a_set(tmp_path, suffix):
    dim, bright = tmp_path / f"dim.{suffix}", tmp_path / f"bright.{suffix}"
    for path, largest in ((dim, 1000), (bright, 4000)):
        (tiff if suffix == "tif" else opencv)(deep(largest))(path)
    bits = max(bits_in_use(dim), bits_in_use(bright))
    assert bits == 12
    for path in (dim, bright):
        assert (read_image(path, bits)[0, 0] == 1000 // 16).all()
        assert (windows.open_image(path, bits=bits).read(0, 0, 1, 1) == 1000 // 16).all()
    assert (read_image(dim)[0, 0] == 1000 // 4).all()
    np.testing.assert_array_equal(read_image(bright, 12)[3, 4], [250] * 3)


@pytest.mark.parametrize("name", ["a.tif", "tiles.tif", "a.png"])
def test_a_scale_bar_does_not_make_a_12_bit_image_black(tmp_path, name):
    pixels = np.full((200, 100, 3), 1600, np.uint16)
    pixels[:, 50:] = 4000
    pixels[:100, :90] = 0  # padding fits any number of bits: it does not count
    pixels[180:182, 30:60] = 65535  # 0.5 % of the others
    layout = {"tile": (64, 64), "compression": "zlib"} if name == "tiles.tif" else {}
    path = tmp_path / name
    (opencv(pixels) if name == "a.png" else tiff(pixels, photometric="rgb", **layout))(path)
    assert bits_of(path) == (12, 16) and bits_in_use(path) == 12
    window = windows.open_image(path, big=1).read(0, 0, 200, 100)
    for image in (read_image(path), read_image(path, 12), window):
        for (y, x), value in {(0, 0): 0, (120, 0): 100, (120, 60): 250, (181, 59): 255}.items():
            assert image[y, x].tolist() == [value] * 3
    assert read_image(path, 16)[181, 59].tolist() == [255] * 3
    assert read_image(path, 16)[120, 60].tolist() == [4000 // 256] * 3


def test_lines_say_which_16_bit_images_lose_their_brightest_or_are_darker():
    found = {"bar": Bits(12, 16), "plain": Bits(12, 12), "dim": Bits(10, 10), "few": Bits(8, 8)}
    assert bit_lines(found, 12) == [
        "16-bit images: 12 bits are in use, of which the upper 8 are kept",
        "bar: 12 bits hold 99 % of it; what is brighter, as a scale bar, is white",
        "dim (10 bits), few (8 bits): fewer bits are in use than 12, and it is read darker; if "
        "that is its camera and not its light, save it as 8-bit RGB",
    ]
    assert bit_lines({"plain": Bits(12, 12)}, 12) == [
        "16-bit images: 12 bits are in use, of which the upper 8 are kept"
    ]


def test_bits_do_not_touch_images_of_8_bit(tmp_path):
    pillow(RGB)(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 16), RGB)


@pytest.mark.parametrize("how", ["file name", "uuid"])
@pytest.mark.parametrize("layout", ["RGB", "planes"])
def test_an_ome_tiff_that_names_another_file_is_read_as_itself(tmp_path, how, layout):
    """As when a.ome.tif is processed by a program that keeps its metadata, saved as b.ome.tif."""
    one, other = tmp_path / "a.ome.tif", tmp_path / "b.ome.tif"
    axes = {"axes": "YXS"} if layout == "RGB" else {"axes": "YX"}
    first, second = (RGB, RGB[::-1].copy()) if layout == "RGB" else (GREY, GREY[::-1].copy())
    uuid = "urn:uuid:00000000-0000-0000-0000-000000000001"
    named = f'<UUID FileName="a.ome.tif">{uuid}</UUID>'
    for path, pixels, size in ((one, first, 0.25), (other, second, 0.5)):
        metadata = axes | {"PhysicalSizeX": size, "PhysicalSizeXUnit": "um"}
        tifffile.imwrite(path, pixels, ome=True, metadata=metadata, compression="zlib")
        text = tifffile.TiffFile(path).pages[0].description
        own = 'UUID="urn' if 'UUID="urn' in text else None
        text = re.sub(r"<TiffData[^>]*?/>|<TiffData.*?</TiffData>",
                      f'<TiffData IFD="0" PlaneCount="1">{named}</TiffData>', text)  # fmt: skip
        text = re.sub(r'(<OME[^>]*?) UUID="[^"]*"', r"\1", text) if own else text
        if path == one and how == "uuid":
            text = text.replace("<OME ", f'<OME UUID="{uuid}" ', 1)
        if path == other and how == "uuid":
            text = text.replace("<OME ", f'<OME UUID="{uuid[:-1]}2" ', 1)
        tifffile.tiffcomment(path, text.encode())
    assert "a.ome.tif" in tifffile.TiffFile(other).pages[0].description
    expected = second if layout == "RGB" else grey3(second)
    np.testing.assert_array_equal(read_image(other), expected)
    np.testing.assert_array_equal(windows.open_image(other).read(0, 0, HEIGHT, WIDTH), expected)
    assert image_shape(other) == (HEIGHT, WIDTH)
    assert pixel_size_um(other) == 0.5
    np.testing.assert_array_equal(read_image(one), first if layout == "RGB" else grey3(first))
    one.unlink()
    np.testing.assert_array_equal(read_image(other), expected)


@pytest.mark.parametrize("suffix", ["tif", "ome.tif", "png", "jpg", "bmp"])
def test_names_in_any_script_are_read(tmp_path, suffix):
    folder = tmp_path / "Gewebe_ä_日本"
    folder.mkdir()
    path, mask = folder / f"bild ü.{suffix}", folder / f"maske ß.{suffix}"
    (tiff if "tif" in suffix else pillow)(RGB)(path)
    (tiff if "tif" in suffix else pillow)(BYTES)(mask)
    assert np.abs(read_image(path).astype(int) - RGB).mean() < 4
    np.testing.assert_array_equal(read_mask(mask), MASK)
    assert image_shape(path) == windows.open_image(path).read(0, 0, HEIGHT, WIDTH).shape[:2]
    assert windows.open_mask(mask).read(40, 30, 1, 1).all()


@pytest.mark.parametrize("planes", [0, 3, 77])
def test_a_planar_configuration_that_tiff_does_not_know_is_refused(tmp_path, planes):
    path = tmp_path / "planes.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", tile=(32, 32))
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags["PlanarConfiguration"].overwrite(planes)
    for read in (read_image, read_mask, image_shape, lambda p: windows.open_image(p, big=1)):
        refusal(read, path, f"planar configuration of {planes}")


def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "header.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", rowsperstrip=8, compression="zlib")
    for side in (299_000, 10**6):
        with tifffile.TiffFile(path, mode="r+b") as tif:
            tif.pages[0].tags["ImageWidth"].overwrite(side)
            tif.pages[0].tags["ImageLength"].overwrite(side)
        refusal(read_image, path, f"{side} x {side}")
        refusal(read_mask, path, f"{side} x {side}")


def test_a_tiff_that_lists_fewer_strips_than_it_is_high_is_refused(tmp_path):
    path = tmp_path / "short.tif"
    for compression in (None, "zlib", "lzw"):
        tifffile.imwrite(path, GREY, rowsperstrip=8, compression=compression)
        with tifffile.TiffFile(path, mode="r+b") as tif:
            tif.pages[0].tags["ImageLength"].overwrite(2 * HEIGHT)
        refusal(read_image, path)
