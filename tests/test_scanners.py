"""Slides in the formats of scanners, written by tests/slide_files.py, against OpenSlide itself."""

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from tests import slide_files
from tests.pictures import refusal
from tissue import pairs, unused, windows
from tissue.files import InputError
from tissue.images import bits_in_use, image_shape, read_image
from tissue.pixel_size import pixel_size_um
from tissue.scanners import INSTALL, Scan, heads, on_white

needs_openslide = pytest.mark.skipif(
    not (find_spec("openslide") and find_spec("pydicom")), reason="the extra [slides] is missing"
)
TIFFS = {  # writer, suffix, pixel size: what tifffile reads
    "Aperio": (slide_files.aperio, ".svs", 0.499),
    "generic TIFF": (slide_files.generic, ".tif", 0.25),
    "OME-TIFF": (slide_files.ome, ".ome.tif", 0.25),
}
SCANS = {  # what OpenSlide reads
    "Philips": (slide_files.philips, ".tiff", 0.25),
    "Leica": (slide_files.leica, ".scn", 0.5),
    "Ventana TIFF": (slide_files.ventana_tiff, ".tif", 0.465),
    "Ventana BIF": (slide_files.ventana_bif, ".bif", 0.25),
    "Trestle": (slide_files.trestle, ".tif", 0.5),
    "Hamamatsu NDPI": (slide_files.hamamatsu_ndpi, ".ndpi", 0.5),
    "Hamamatsu VMS": (slide_files.hamamatsu_vms, ".vms", 0.25),
    "Hamamatsu VMU": (slide_files.hamamatsu_vmu, ".vmu", 0.5),
    "Sakura": (slide_files.sakura, ".svslide", 0.5),
    "MIRAX": (slide_files.mirax, ".mrxs", 0.25),
    "DICOM": (slide_files.dicom, ".dcm", 0.25),
    "DICOM of JPEGs": (slide_files.dicom_jpeg, ".dcm", 0.25),
}


@pytest.fixture
def levels(generator):
    return slide_files.pyramid(generator)


def each(formats):
    return pytest.mark.parametrize(("write", "suffix", "um"), formats.values(), ids=formats)


def own_levels(path):
    """All levels as OpenSlide itself gives them, before white, without what was not scanned."""
    import openslide

    found = []
    with openslide.OpenSlide(path) as slide:
        told = slide.properties
        place = tuple(int(told.get(f"openslide.bounds-{axis}", 0)) for axis in "xy")
        for level, (size, step) in enumerate(
            zip(slide.level_dimensions, slide.level_downsamples, strict=True)
        ):
            if "openslide.bounds-width" in told:
                names = ("bounds-width", "bounds-height")
                size = tuple(round(int(told[f"openslide.{name}"]) / step) for name in names)
            region = slide.read_region(place, level, size)
            found.append(Image.new("RGB", region.size, "white"))
            found[-1].paste(region, mask=region.getchannel("A"))
    return [np.asarray(image) for image in found]


@needs_openslide
@each(TIFFS | SCANS)
def test_every_level_has_the_pixels_that_were_written_and_openslide_reads(
    tmp_path, levels, write, suffix, um
):
    path = tmp_path / f"slide{suffix}"
    expected = write(path, levels)
    image = windows.open_image(path, big=1)
    assert (image.height, image.width) == expected[0].shape[:2] == image_shape(path)
    for level, pixels in enumerate(expected):
        found = image.read(0, 0, *image.levels[level], level)
        np.testing.assert_array_equal(found, pixels)
    own = own_levels(path)  # of JPEGs OpenSlide makes further ones, it sees none of OME-TIFF
    assert len(own) == len(image.levels) or write is slide_files.ome
    for level, pixels in enumerate(own):
        np.testing.assert_array_equal(image.read(0, 0, *image.levels[level], level), pixels)
    assert image.pixel_size_um == pytest.approx(um) == pixel_size_um(path)
    np.testing.assert_array_equal(read_image(path), expected[0])
    assert bits_in_use(path) is None


@needs_openslide
@each(SCANS)
def test_windows_are_crops_in_many_threads_at_once(tmp_path, levels, write, suffix, um):
    path = tmp_path / f"slide{suffix}"
    write(path, levels)
    image = windows.open_image(path)
    assert not image.is_big
    wholes = [image.read(0, 0, *size, level) for level, size in enumerate(image.levels)]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: check_window(image, wholes, seed), range(64)))
    assert image.view(64).shape[2] == 3


def check_window(image, wholes, seed):
    """Compare a window of a level with all of the level, and now and then close the image."""
    generator = np.random.default_rng(seed)
    level = generator.integers(len(wholes))
    (height, width), whole = image.levels[level], wholes[level]
    y, x = generator.integers(height), generator.integers(width)
    rows, columns = generator.integers(1, height - y + 1), generator.integers(1, width - x + 1)
    found = image.read(y, x, rows, columns, level)
    np.testing.assert_array_equal(found, whole[y : y + rows, x : x + columns])
    if seed % 9 == 0:
        image.close()  # while others read


@needs_openslide
def test_windows_of_tiles_that_overlap_by_a_part_of_a_pixel_agree(tmp_path, generator):
    path = tmp_path / "slide.mrxs"
    slide_files.mirax(path, slide_files.pyramid(generator, 512, 640))
    told = tmp_path / "slide" / "Slidedat.ini"
    for axis in "XY":
        told.write_text(told.read_text().replace(f"OVERLAP_{axis}=0", f"OVERLAP_{axis}=7.5"))
    image = windows.open_image(path)
    assert image.levels == [(456, 512), (228, 256)]  # eight rows and nine columns less the overlaps
    wholes = [image.read(0, 0, *size, level) for level, size in enumerate(image.levels)]
    for seed in range(40):
        check_window(image, wholes, seed)


@needs_openslide
def test_windows_of_levels_that_are_no_whole_part_agree_where_they_overlap(tmp_path, generator):
    path = tmp_path / "slide.tif"
    levels = slide_files.pyramid(generator, 701, 903, 2)  # 903 / 451 is more than 2
    slide_files.generic(path, levels)
    scan = Scan(path)
    whole = scan.read(0, 0, *scan.levels[1], 1)
    assert not scan.steps[1].is_integer()
    np.testing.assert_array_equal(scan.read(201, 100, 140, 300, 1), whole[201:341, 100:400])
    off = np.abs(whole.astype(int) - levels[1])[:-1, :-1]  # a quarter of a pixel at most
    assert off.mean() < 1 and off.max() < 20


@needs_openslide
def test_a_large_aperio_file_of_jpeg_2000_in_ycbcr_is_openslides(tmp_path, levels):
    image = levels[0]
    parts = []
    for tile in (tile for row in slide_files.tiles(image) for tile in row):
        colours = np.asarray(Image.fromarray(tile).convert("YCbCr"))
        parts.append(imagecodecs.jpeg2k_encode(colours, codecformat="j2k", mct=False, level=0))
    path = tmp_path / "slide.svs"
    tifffile.imwrite(
        path, iter(parts), shape=image.shape, dtype=np.uint8, photometric="rgb", tile=(64, 64),
        compression=33003, description="Aperio |MPP = 0.25", metadata=None, software=False,
    )  # fmt: skip
    found = windows.open_image(path, big=1)
    pixels = found.read(0, 0, *found.levels[0])
    np.testing.assert_array_equal(pixels, own_levels(path)[0])
    assert np.abs(pixels.astype(int) - image).max() <= 3


def test_what_is_transparent_becomes_white():
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 51]]], np.uint8)
    expected = [[10, 20, 30], [255, 255, 255], [204, 224, 244]]
    np.testing.assert_array_equal(on_white(pixels)[0], expected)


# --- which files are a slide ---------------------------------------------------------------------


@needs_openslide
def test_the_files_of_a_slide_are_one_image(tmp_path, levels):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    for name in ("one", "two"):
        slide_files.dicom(tmp_path / "a" / f"{name}.dcm", levels)
    slide_files.hamamatsu_vms(tmp_path / "a" / "vms.vms", levels)
    slide_files.mirax(tmp_path / "b" / "three.mrxs", levels)
    found = pairs.find_images(tmp_path / "a", *sorted((tmp_path / "b").glob("*.mrxs")))
    assert [path.name for path in found.values()] == ["one.dcm", "three.mrxs", "two.dcm", "vms.vms"]
    assert unused.passed_over(tmp_path / "a", tmp_path / "b") == []
    given = sorted((tmp_path / "a").glob("*.dcm"))
    assert len(given) == 6
    assert [path.name for path in pairs.find_images(*given).values()] == ["one.dcm", "two.dcm"]
    image = windows.open_image(given[1])  # a smaller level of the first
    np.testing.assert_array_equal(image.read(0, 0, *image.levels[0]), levels[0])


@needs_openslide
def test_what_is_no_dicom_stands_for_itself(tmp_path):
    paths = [tmp_path / name for name in ("a.dcm", "b.dcm", "gone.dcm")]
    for path in paths[:2]:
        path.write_bytes(b"nothing of that kind" * 20)
    assert heads(paths) == paths


@pytest.mark.parametrize("suffix", ["mrxs", "dcm", "ndpi", "czi", "tif"])
def test_without_openslide_one_line_says_what_to_install(tmp_path, levels, monkeypatch, suffix):
    path = tmp_path / f"slide.{suffix}"
    if suffix == "tif":
        slide_files.philips(path, levels)
    else:
        path.write_bytes(b"\xff\xd8 anything" * 20)
    for name in ("openslide", "pydicom", "pydicom.errors", "pydicom.filereader"):
        monkeypatch.setitem(sys.modules, name, None)
    for read in (windows.open_image, image_shape, read_image, windows.open_mask, pixel_size_um):
        refusal(read, path, INSTALL)
    if suffix == "dcm":
        refusal(pairs.find_images, path, INSTALL)


# --- damage --------------------------------------------------------------------------------------


@needs_openslide
@each(SCANS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_a_slide_that_was_cut_off_is_refused_in_one_line(
    tmp_path, levels, write, suffix, um, share
):
    """Of each of its files in turn; what can still be read, is what was written."""
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = write(whole / f"slide{suffix}", levels)
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    refused = 0
    for number, file in enumerate(files):
        place = tmp_path / str(number)
        shutil.copytree(whole, place)
        data = (place / file).read_bytes()
        (place / file).write_bytes(data[: int(share * len(data))])
        try:
            image = windows.open_image(place / f"slide{suffix}", big=1)
            for _ in range(2):  # after an error too
                for level, size in enumerate(image.levels):
                    pixels = image.read(0, 0, *size, level)
                    if level < len(expected) and pixels.shape == expected[level].shape:
                        np.testing.assert_array_equal(pixels, expected[level])
        except InputError as error:
            assert "\n" not in str(error) and f"slide{suffix}" in str(error)
            refused += 1
    assert refused


@needs_openslide
@pytest.mark.parametrize("suffix", ["mrxs", "ndpi", "scn", "vms", "dcm", "svslide", "czi"])
def test_what_is_no_slide_is_refused(tmp_path, suffix):
    path = tmp_path / f"slide.{suffix}"
    path.write_bytes(b"nothing of that kind" * 20)
    refusal(windows.open_image, path, "OpenSlide cannot read")
    with pytest.raises(FileNotFoundError):
        windows.open_image(tmp_path / f"other.{suffix}")


@needs_openslide
def test_a_slide_on_which_openslide_ends_the_program_is_refused(tmp_path, levels):
    path = tmp_path / "slide.vmu"
    slide_files.hamamatsu_vmu(path, levels)
    path.write_text(path.read_text().replace("BitsPerPixel=36", "BitsPerPixel=24"))
    refusal(windows.open_image, path, "on which OpenSlide dies")


@needs_openslide
def test_a_damaged_place_of_a_slide_does_not_spoil_the_rest(tmp_path, levels):
    path = tmp_path / "slide.mrxs"
    expected = slide_files.mirax(path, levels)
    data = tmp_path / "slide" / "Data0000.dat"
    good = data.read_bytes()
    data.write_bytes(b"\0" * 100 + good[100:])  # the first tile
    image = windows.open_image(path, big=1)
    for _ in range(2):
        with pytest.raises(InputError, match="rows 0 to 64, columns 0 to 64"):
            image.read(0, 0, 64, 64)
        np.testing.assert_array_equal(image.read(128, 128, 64, 64), expected[0][128:192, 128:192])
