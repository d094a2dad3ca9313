import zlib

import cv2
import numpy as np
import pytest
import tifffile

from tissue import windows
from tissue.files import InputError
from tissue.images import read_image
from tissue.pictures import write_image


@pytest.fixture
def picture(generator):
    """Smooth colours, RGB uint8 (300, 410, 3), that JPEG does not hurt much."""
    coarse = generator.integers(0, 256, (20, 27, 3), dtype=np.uint8)
    return cv2.resize(coarse, (410, 300), interpolation=cv2.INTER_CUBIC)


def smaller(picture, factor):
    return cv2.resize(picture, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)


LAYOUTS = {
    "deflate tiles": {"tile": (64, 32), "compression": "deflate"},
    "JPEG tiles": {"tile": (64, 64), "compression": "jpeg"},
    "plain tiles in BigTIFF": {"tile": (32, 64), "bigtiff": True},
    "LZW strips": {"rowsperstrip": 7, "compression": "lzw"},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_window_is_the_crop_of_the_whole_image(tmp_path, picture, generator, layout):
    path = tmp_path / "big.tif"
    tifffile.imwrite(path, picture, photometric="rgb", **layout)
    image = windows.open_image(path, big=1)
    assert image.is_big and (image.height, image.width) == (300, 410)
    check_windows(image, read_image(path), generator)


def check_windows(image, whole, generator):
    for _ in range(30):
        y, x = generator.integers(0, image.height), generator.integers(0, image.width)
        height = generator.integers(1, image.height - y + 1)
        width = generator.integers(1, image.width - x + 1)
        window = image.read(y, x, height, width)
        np.testing.assert_array_equal(window, whole[y : y + height, x : x + width])


@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.tif"])
def test_small_images_and_pictures_are_read_whole_and_then_by_windows(
    tmp_path, picture, generator, name
):
    write_image(tmp_path / name, picture)
    image = windows.open_image(tmp_path / name)
    assert not image.is_big
    check_windows(image, read_image(tmp_path / name), generator)
    image.close()
    check_windows(image, read_image(tmp_path / name), generator)  # it reads on


def write_ome_pyramid(path, picture):
    tiled = {"tile": (64, 64), "compression": "jpeg", "photometric": "rgb"}
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        resolution = {"resolution": (4e4, 4e4), "resolutionunit": "CENTIMETER"}
        tif.write(picture, subifds=2, **tiled, **resolution)
        for factor in (2, 4):
            tif.write(smaller(picture, factor), subfiletype=1, **tiled)


def write_svs_pyramid(path, picture):
    tiled = {"tile": (64, 64), "compression": "jpeg", "photometric": "rgb", "metadata": None}
    about = "Aperio Image Library v12\n410x300 |AppMag = 40|MPP = 0.2500"
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        tif.write(picture, description=about, **tiled)
        tif.write(smaller(picture, 5), photometric="rgb", metadata=None)
        for factor in (2, 4):
            tif.write(smaller(picture, factor), description=about, **tiled)


@pytest.mark.parametrize(
    "name,write", [("slide.ome.tif", write_ome_pyramid), ("slide.svs", write_svs_pyramid)]
)
def test_of_a_pyramid_the_next_finer_level_is_read(tmp_path, picture, generator, name, write):
    write(tmp_path / name, picture)
    image = windows.open_image(tmp_path / name)
    assert image.levels == [(300, 410), (150, 205), (75, 102)]
    assert image.pixel_size_um == pytest.approx(0.25)
    check_windows(image, read_image(tmp_path / name), generator)
    for scale, level in ((1.9, 0), (2.0, 1), (3.9, 1), (4.1, 2), (0.5, 0)):
        assert windows.Scaled(image, scale).level == level
    level_1 = tifffile.imread(tmp_path / name, level=1)
    np.testing.assert_array_equal(
        windows.Scaled(image, 2).read(10, 20, 50, 60), level_1[10:60, 20:80]
    )


@pytest.mark.parametrize("scale", [0.6, 1.4, 2.0, 3.7, 6.0])
def test_windows_of_a_scaled_image_agree(picture, generator, scale):
    image = windows.Scaled(windows.from_array(picture), scale)
    whole = image.read(0, 0, image.height, image.width)
    expected = cv2.resize(picture, (image.width, image.height), interpolation=cv2.INTER_AREA)
    assert np.abs(whole.astype(int) - expected).mean() < 4
    for _ in range(30):
        y, x = generator.integers(0, image.height), generator.integers(0, image.width)
        height = generator.integers(1, image.height - y + 1)
        width = generator.integers(1, image.width - x + 1)
        difference = (
            image.read(y, x, height, width).astype(int) - whole[y : y + height, x : x + width]
        )
        assert np.abs(difference).max() <= 1


def test_a_mask_is_read_by_windows_as_it_is_read_whole(tmp_path, generator):
    labels = np.zeros((200, 300), np.uint16)
    for number in range(1, 40):
        y, x = number // 8 * 38, number % 8 * 37
        labels[y : y + 20, x : x + 30] = number
    tifffile.imwrite(tmp_path / "labels.tif", labels, tile=(64, 64), compression="deflate")
    mask = windows.open_mask(tmp_path / "labels.tif", big=1)
    assert mask.read(0, 0, 1, 1).dtype == bool
    check_windows(mask, labels > 0, generator)


@pytest.mark.parametrize("bits", [None, 12, 16])
def test_16_bit_images_are_read_by_windows_with_one_brightness(tmp_path, picture, bits, generator):
    path = tmp_path / "deep.tif"
    deep = picture.astype(np.uint16) * 16  # 12 bits
    tifffile.imwrite(path, deep, photometric="rgb", tile=(64, 64), compression="lzw")
    image = windows.open_image(path, big=1, bits=bits)
    check_windows(image, picture if bits != 16 else picture // 16, generator)
    np.testing.assert_array_equal(read_image(path, bits), image.read(0, 0, 300, 410))
    bright = np.minimum(picture.astype(int) * 4, 255)  # of 10 bits, what is brighter is white
    check_windows(windows.open_image(path, big=1, bits=10), bright, generator)


@pytest.mark.parametrize("samples", [2, 4])
def test_alpha_is_no_foreground_by_windows_either(tmp_path, generator, samples):
    grey, alpha = generator.integers(0, 2, (2, 100, 120, 1), dtype=np.uint8) * 255
    pixels = np.concatenate([np.repeat(grey, samples - 1, axis=2), alpha], axis=2)
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, photometric="minisblack" if samples == 2 else "rgb",
        planarconfig="contig", tile=(64, 64), extrasamples=["unassalpha"],
    )  # fmt: skip
    check_windows(windows.open_mask(tmp_path / "a.tif", big=1), grey[..., 0] > 0, generator)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("samples", [2, 4])
@pytest.mark.parametrize("alpha", ["unassalpha", "assocalpha"])
def test_what_is_transparent_is_white_by_windows_too(tmp_path, generator, dtype, samples, alpha):
    pixels = np.full((150, 200, samples), 90, dtype)
    pixels[..., -1] = 255
    pixels[:100, :120, -1] = 0  # erased, and its colours are still there
    pixels[100:, :, -1] = 51  # a fifth
    pixels = pixels * 257 if dtype == np.uint16 else pixels
    kind = {"photometric": "rgb" if samples == 4 else "minisblack", "planarconfig": "contig"}
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, tile=(64, 64), extrasamples=[alpha], **kind)
    image = windows.open_image(path, big=1, bits=16 if dtype == np.uint16 else None)
    is_laid = alpha == "unassalpha"  # the others' colours are what is shown already
    for (y, x), shown in {(0, 0): 255, (99, 119): 255, (0, 120): 90, (120, 5): 222}.items():
        assert image.read(y, x, 1, 1)[0, 0].tolist() == [shown if is_laid else 90] * 3
    check_windows(image, read_image(path, 16), generator)


def test_a_coloured_mask_is_refused_by_windows_too(tmp_path, picture):
    tifffile.imwrite(tmp_path / "a.tif", picture, photometric="rgb", tile=(64, 64))
    with pytest.raises(InputError, match=r"a\.tif: .*several colours"):
        windows.open_mask(tmp_path / "a.tif", big=1).read(0, 0, 9, 9)


@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_pyramid_of_other_channels_is_refused_as_a_plain_file_is(tmp_path, channels, dtype):
    pixels = np.full((128, 128, channels), 200, dtype)
    kind = {"photometric": "rgb" if channels == 5 else "minisblack", "planarconfig": "contig"}
    kind |= {"extrasamples": [0] * (channels - (3 if channels == 5 else 1)), "tile": (64, 64)}
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(pixels, subifds=1, **kind)
        tif.write(pixels[::2, ::2], subfiletype=1, **kind)
    tifffile.imwrite(tmp_path / "plain.tif", pixels, **kind)
    for name, big in (("a.tif", None), ("plain.tif", 1)):
        with pytest.raises(InputError, match=rf"{name}: found {channels} channels, expected RGB"):
            windows.open_image(tmp_path / name, big=big)


def test_a_small_pyramid_of_16_bit_is_read_whole(tmp_path, picture):
    write_ome = {"photometric": "rgb", "tile": (64, 64)}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tif:
        tif.write(picture.astype(np.uint16) * 16, subifds=1, **write_ome)
        tif.write(smaller(picture, 2).astype(np.uint16) * 16, subfiletype=1, **write_ome)
    whole = read_image(tmp_path / "a.ome.tif")
    np.testing.assert_array_equal(
        windows.open_image(tmp_path / "a.ome.tif").read(0, 0, 300, 410), whole
    )


@pytest.mark.parametrize("big", [1, 1e9])
def test_the_view_is_small_and_shows_all(tmp_path, picture, big):
    tifffile.imwrite(tmp_path / "a.tif", picture, photometric="rgb", tile=(64, 64))
    view = windows.open_image(tmp_path / "a.tif", big).view(100)
    assert view.shape == (60, 82, 3)
    expected = cv2.resize(picture, (82, 60), interpolation=cv2.INTER_AREA)
    assert np.abs(view.astype(int) - expected).mean() < 4


def test_a_truncated_image_fails_at_the_window_that_is_lost(tmp_path, picture):
    path = tmp_path / "cut.tif"
    tifffile.imwrite(path, picture, photometric="rgb", tile=(64, 64))
    path.write_bytes(path.read_bytes()[:-30_000])
    image = windows.open_image(path, big=1)
    assert image.read(0, 0, 64, 64).any()
    with pytest.raises(InputError, match=r"cut\.tif, rows 250 to 300, columns 350 to 410: .*ends"):
        image.read(250, 350, 50, 60)


def test_what_cannot_be_read_by_windows_is_refused_when_it_is_big(tmp_path, picture):
    path = tmp_path / "planes.tif"
    tifffile.imwrite(path, picture.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    assert windows.open_image(path).read(0, 0, 300, 410).shape == (300, 410, 3)
    with pytest.raises(InputError, match="separate colour planes"):
        windows.open_image(path, big=1)


def header_only(path, side):
    """A TIFF of 16 x 16 pixels whose header says it has side x side."""
    tifffile.imwrite(path, np.zeros((16, 16, 3), np.uint8), photometric="rgb", tile=(16, 16))
    with tifffile.TiffFile(path, mode="r+b") as tif:
        for tag in ("ImageWidth", "ImageLength"):
            tif.pages[0].tags[tag].overwrite(side)


@pytest.mark.parametrize("side", [0, 10**6])
def test_an_image_of_no_or_too_many_pixels_is_refused_before_it_is_held(tmp_path, side):
    header_only(tmp_path / "header.tif", side)
    with pytest.raises(InputError, match=r"header\.tif"):
        windows.open_image(tmp_path / "header.tif")


def test_a_picture_larger_than_the_memory_is_refused(tmp_path, picture):
    path = tmp_path / "huge.png"
    write_image(path, picture)
    data = bytearray(path.read_bytes())
    data[16:24] = (300_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(InputError, match="save it as a tiled TIFF"):
        windows.open_image(path)
