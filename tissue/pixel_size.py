"""How large a pixel is, in micrometres, as files tell it."""

import re
from pathlib import Path

from tissue.files import InputError
from tissue.images import TIFF_SIGNATURES, decoding, open_raster, open_tiff, signature_of

SAME = 0.1  # pixel sizes this close to each other, as a fraction, count as equal
LEAST_SCALE, MOST_SCALE = 1 / 4, 8.0  # an image is enlarged 4 times and reduced 8 times at most
# Outside of this range a resolution is a screen's or a printer's (96 dpi: 265 um), or nonsense.
_MICROSCOPE_UM = (0.01, 20.0)
_UM_PER_INCH = 25400.0
_UM_PER_TIFF_UNIT = {2: _UM_PER_INCH, 3: 1e4}  # inch, cm
_UM_PER_UNIT = {"nm": 1e-3, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0}
_UM_PER_UNIT |= {"mm": 1e3, "cm": 1e4, "inch": _UM_PER_INCH}
_NUMBER = r"(\d*\.?\d+(?:[eE][-+]?\d+)?)"
_OME_SIZE = re.compile(rf"""PhysicalSizeX=["']{_NUMBER}["']""")
_OME_UNIT = re.compile(r"""PhysicalSizeXUnit=["']([^"']+)["']""")
_APERIO_MPP = re.compile(rf"\bMPP\s*=\s*{_NUMBER}")
_IMAGEJ_UNIT = re.compile(r"^ImageJ=.*^unit=(.+?)$", re.DOTALL | re.MULTILINE)


def pixel_size_um(path: str | Path) -> float | None:
    """Return micrometres per pixel along x, or None if the file does not tell.

    Sources: OME-XML PhysicalSizeX, Aperio MPP, ImageJ's unit, and the resolution tags of TIFF, PNG,
    JPEG and BMP. Sizes no microscope has (above 20 um: 72 dpi and the like) count as not told.
    Raises InputError for a file that is damaged or no image.
    """
    path = Path(path)
    with decoding(path):
        if signature_of(path).startswith(TIFF_SIGNATURES):
            with open_tiff(path) as tif:
                size = _tiff_pixel_size(tif.pages.first)
        else:
            with open_raster(path) as picture:
                dots_per_inch = picture.info.get("dpi", (0, 0))[0]
                size = _UM_PER_INCH / dots_per_inch if dots_per_inch else 0.0
    smallest, largest = _MICROSCOPE_UM
    return size if smallest <= size <= largest else None


def _tiff_pixel_size(page):
    """Return micrometres per pixel as the TIFF tells them, 0 if it does not."""
    text = page.description
    if ome := _OME_SIZE.search(text):
        unit = _OME_UNIT.search(text)
        return float(ome[1]) * _um_per_unit(unit[1] if unit else "um")
    if aperio := _APERIO_MPP.search(text):
        return float(aperio[1])
    if imagej := _IMAGEJ_UNIT.search(text):
        um_per_unit = _um_per_unit(imagej[1])
    else:
        um_per_unit = _UM_PER_TIFF_UNIT.get(page.resolutionunit, 0.0)
    pixels_per_unit = page.resolution[0]
    return um_per_unit / pixels_per_unit if pixels_per_unit else 0.0


def _um_per_unit(unit):
    # The micro sign comes as U+00B5, as the Greek letter, and spelled out by ImageJ.
    unit = unit.strip().replace("\\u00B5", "u").replace("\u00b5", "u").replace("\u03bc", "u")
    return _UM_PER_UNIT.get(unit.lower(), 0.0)


def scale_of(size: float | None, wanted: float | None, name: str | Path) -> float:
    """How many of an image's pixels, of `size` micrometres, make one of the `wanted` size.

    1 if they are about equal, or if one of them is not known. Raises InputError, which calls the
    image `name`, where the image would have to be enlarged more than 4 or reduced more than 8
    times: such a pixel size is hardly ever true.
    """
    if not size or not wanted or abs(wanted / size - 1) <= SAME:
        return 1.0
    scale = wanted / size
    if not LEAST_SCALE <= scale <= MOST_SCALE:
        raise InputError(
            f"{name}: found a pixel size of {size:.4g} um, expected {wanted / MOST_SCALE:.3g} to "
            f"{wanted / LEAST_SCALE:.3g} um for {wanted:.3g} um of the network; if it is wrong, "
            f"give the true one with --pixel_size"
        )
    return scale
