"""Pixel sizes as files tell them, and what is done with them."""

import time

import numpy as np
import pytest
import tifffile
from PIL import Image

from tissue.files import InputError
from tissue.pixel_size import pixel_size_um, resampling_lines, scale_of

RGB = np.zeros((40, 50, 3), np.uint8)
APERIO = "Aperio Image Library v11.2.1\r\n40x50 (256x256) JPEG/RGB Q=70|"
OME = (
    '<?xml version="1.0"?><OME><Instrument><Objective ID="O:0" {}/></Instrument><Pixels {}/></OME>'
)


def told(folder, description, **tags):
    path = folder / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", description=description, metadata=None, **tags)
    return pixel_size_um(path)


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        (APERIO + "AppMag = 20|StripeWidth = 1000", 0.5),
        (APERIO + "AppMag = 40", 0.25),
        (APERIO + "AppMag=20x|Left = 1", 0.5),
        (APERIO + "AppMag = 20|MPP = 0.4990", 0.499),
        (APERIO + "MPP = 0.2521|AppMag = 40", 0.2521),
        (APERIO + "AppMag = 20|MPP = 0,4990", 0.499),  # a comma for decimals
        (APERIO + "AppMag = 20|MPP = 0", 0.5),  # nonsense is as if it were not there
        (APERIO + "AppMag = 20|MPP = nan", 0.5),
        (APERIO + "AppMag = 20|MPP = -0.5", 0.5),
        (APERIO + "AppMag = 0", None),
        (APERIO + "AppMag = 1000", None),
        (APERIO + "AppMag = nan", None),
        (APERIO + "AppMag = -20", None),
        (APERIO + "AppMag = 1e999", None),
        (APERIO + "AppMag =", None),
        (OME.format('NominalMagnification="40.0"', ""), 0.25),
        (OME.format('NominalMagnification="20"', 'PhysicalSizeX="0.46"'), 0.46),
        (OME.format('NominalMagnification="20"', 'PhysicalSizeX="0"'), 0.5),
        (OME.format('NominalMagnification="0"', ""), None),
        (OME.format("", 'PhysicalSizeX="230" PhysicalSizeXUnit="nm"'), 0.23),
        (OME.format("", 'PhysicalSizeX="0.23" PhysicalSizeXUnit="&#181;m"'), 0.23),
        (OME.format("", 'PhysicalSizeX="2.5e-1"'), 0.25),
        (OME.format("", 'PhysicalSizeX=".25"'), 0.25),
        (OME.format("", 'PhysicalSizeX="nan"'), None),
        (OME.format("", 'PhysicalSizeX="1e999"'), None),
        (OME.format("", 'PhysicalSizeX="0.25" PhysicalSizeY="0.26"'), 0.25),
        (OME.format("", 'PhysicalSizeX="0.25" PhysicalSizeY="0.5"'), None),
        (OME.format("", 'PhysicalSizeX="0.25" PhysicalSizeY="0"'), None),
        (OME.format("", 'PhysicalSizeX="2.5e-7" PhysicalSizeXUnit="m"'), 0.25),
        (OME.format("", 'PhysicalSizeX="2500" PhysicalSizeXUnit="\u00c5"'), 0.25),
    ],
)
def test_an_objective_tells_the_pixel_size_where_nothing_better_does(
    tmp_path, description, expected
):
    assert told(tmp_path, description.encode()) == pytest.approx(expected)


def test_the_resolution_tag_is_nearer_than_the_objective(tmp_path):
    tags = {"resolution": (1e4 / 0.22, 1e4 / 0.22), "resolutionunit": "centimeter"}
    assert told(tmp_path, APERIO + "AppMag = 40", **tags) == pytest.approx(0.22, rel=1e-3)
    screen = {"resolution": (72, 72), "resolutionunit": "inch"}
    assert told(tmp_path, APERIO + "AppMag = 40", **screen) == 0.25


@pytest.mark.parametrize(
    ("unit", "um"),
    [("micron", 1), ("microns", 1), ("um", 1), ("\\u00B5m", 1), ("\u00b5m", 1), ("Micrometers", 1),
     ("micrometre", 1), ("nanometer", 1e-3), ("nm", 1e-3), ("mm", 1e3), ("millimeter", 1e3),
     ("in", 25400), ("m", 1e6), ("pixel", None), ("", None), ("s", None)],
)  # fmt: skip
def test_units_of_imagej(tmp_path, unit, um):
    text = f"ImageJ=1.54f\nunit={unit}\nmin=0\n".encode()
    tags = {"resolution": (4 * (um or 1), 4 * (um or 1)), "resolutionunit": "none"}
    assert told(tmp_path, text, **tags) == (um and pytest.approx(0.25))


def test_pixels_that_are_not_square_have_no_size(tmp_path):
    for across, down, size in ((40000, 41000, 0.25), (40000, 20000, None), (20000, 40000, None)):
        assert told(tmp_path, "", resolution=(across, down), resolutionunit="centimeter") == size
    for dots, size in (((101600, 101600), 0.25), ((101600, 50800), None)):
        Image.fromarray(RGB).save(tmp_path / "a.png", dpi=dots)
        assert pixel_size_um(tmp_path / "a.png") == (size and pytest.approx(size, rel=1e-3))


@pytest.mark.parametrize(
    "text",
    [
        'PhysicalSizeX="' + "1" * 40_000,
        "MPP = " + "1" * 40_000 + "x",
        'PhysicalSizeX="' * 20_000,
        'NominalMagnification="' + "." * 40_000,
        "PhysicalSizeXUnit='" * 20_000,
        "MPP " * 40_000,
        "MPP" + " " * 200_000,
        "ImageJ=1.0\n" * 20_000,
        "ImageJ=1.0\nunit=" + "u" * 400_000,
        "unit=\n" * 60_000,
    ],
)
def test_long_metadata_are_searched_in_no_time(tmp_path, text):
    path = tmp_path / "a.tif"
    description = ("" if text.startswith("ImageJ") else "x ") + text
    tifffile.imwrite(path, RGB, photometric="rgb", description=description, metadata=None)
    started = time.process_time()
    pixel_size_um(path)
    assert time.process_time() - started < 2  # in the square of its length it would be minutes


@pytest.mark.parametrize(
    ("size", "wanted", "scale"),
    [(0.25, 0.25, 1), (0.25, 0.27, 1), (0.5, 0.25, 0.5), (0.125, 0.25, 2), (1, 0.25, 0.25),
     (0.03125, 0.25, 8), (None, 0.25, 1), (0.25, None, 1)],
)  # fmt: skip
def test_scale_is_how_many_pixels_make_a_wanted_one(size, wanted, scale):
    assert scale_of(size, wanted, "a.tif") == pytest.approx(scale)


@pytest.mark.parametrize("size", [1.1, 10.58, 250, 0.02, 2.5e-4])
def test_a_scale_beyond_a_quarter_and_eight_names_the_flag(size):
    with pytest.raises(InputError, match=r"a\.tif: found a pixel size of .*--pixel_size"):
        scale_of(size, 0.25, "a.tif")


def test_a_line_says_what_is_resampled_and_another_what_is_assumed():
    sizes = {"a": 0.25, "b": 0.5, "c": None, "d": 0.5, "e": 0.26, "f": 0.1}
    assert resampling_lines(sizes, 0.25) == [
        "b, d: 0.5 um a pixel, enlarged 2 times to 0.25 um",
        "f: 0.1 um a pixel, reduced 2.5 times to 0.25 um",
        "No pixel size in c: taken as 0.25 um; --pixel_size tells it",
    ]
    assert resampling_lines({"a": 0.25, "b": 0.26}, 0.25) == []
    (line,) = resampling_lines({str(n): 0.5 for n in range(10, 40)}, 0.25)
    assert line == "10, 11, 12, 13, 14 and 25 more: 0.5 um a pixel, enlarged 2 times to 0.25 um"
    (line,) = resampling_lines({"a": None, "b": None}, None)
    assert "--pixel_size" in line
