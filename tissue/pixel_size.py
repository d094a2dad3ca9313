"""How large a pixel is, in micrometres, as files tell it."""

import html
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tissue.files import InputError, some
from tissue.images import decoding, open_raster
from tissue.scanners import Scan, is_scan
from tissue.tiff import TIFF_SIGNATURES, open_tiff, signature_of

SAME = 0.1  # pixel sizes this close to each other, as a fraction, count as equal
NEAR = 0.05  # a given one this close to what an image says is not another
LEAST_SCALE, MOST_SCALE = 1 / 4, 8.0  # an image is enlarged 4 times and reduced 8 times at most
# Of a median nucleus: 21 in TNBC and 36 in MoNuSeg, both scanned at 0.25 um (docs/lab_notes.md).
NUCLEUS_UM2 = 28.0
# Outside of this range a resolution is a screen's or a printer's (96 dpi: 265 um), or nonsense.
MICROSCOPE_UM = (0.01, 20.0)
# What a scanner's camera makes of an objective: 20x 0.5 um, 40x 0.25 um.
_UM_AT_MAGNIFICATION_ONE = 10.0
_MAGNIFICATIONS = (1.0, 150.0)
_UM_PER_INCH = 25400.0
_UM_PER_TIFF_UNIT = {2: _UM_PER_INCH, 3: 1e4}  # inch, cm
_UM_PER_UNIT = {"nm": 1e-3, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "\u00e5": 1e-4}
_UM_PER_UNIT |= {"micron": 1.0, "inch": _UM_PER_INCH, "in": _UM_PER_INCH}
_UM_PER_UNIT |= {
    prefix + metre: um
    for prefix, um in (("", 1e6), ("nano", 1e-3), ("micro", 1.0), ("milli", 1e3), ("centi", 1e4))
    for metre in ("meter", "metre")
}
# Metadata can be megabytes of anything: no pattern may go back over more than a few characters.
_OME_SIZES = [
    tuple(
        re.compile(rf"""\bPhysicalSize{axis}{what}\s{{0,9}}=\s{{0,9}}["']([^"']{{1,60}})["']""")
        for what in ("", "Unit")
    )
    for axis in "XY"
]
_OME_OBJECTIVE = re.compile(r"""\bNominalMagnification\s{0,9}=\s{0,9}["']([^"']{1,60})["']""")
_APERIO_MPP = re.compile(r"\bMPP\s{0,9}=\s{0,9}([^\s|]{1,60})")
_APERIO_OBJECTIVE = re.compile(r"\bAppMag\s{0,9}=\s{0,9}([^\s|]{1,60})")
_NUMBER = re.compile(r"\d*[.,]?\d+(?:[eE][-+]?\d+)?")  # for those 60 characters, not for a text
_TOLD = re.compile(r"(\S{1,60})")
_IMAGEJ_UNIT = re.compile(r"^unit=([^\r\n]{1,60})", re.MULTILINE)


def pixel_size_um(path: str | Path) -> float | None:
    """Return micrometres per pixel, or None if the file does not tell.

    Sources, the first that is a microscope's: OME-XML PhysicalSizeX, Aperio MPP, ImageJ's unit, the
    resolution tags of TIFF, PNG, JPEG and BMP, and the objective (Aperio AppMag, OME
    NominalMagnification), of which a magnification of 1 to 150 counts, as 10 um divided by it.
    Of slides that OpenSlide reads: what it says of pixel size and objective.
    Sizes no microscope has (above 20 um: 72 dpi and the like; pixels that are not square) count as
    not told. Raises InputError for a file that is damaged or no image.
    """
    path = Path(path)
    with decoding(path):
        if is_scan(path):
            sizes = list(_scan_pixel_sizes(Scan(path).properties))
        elif signature_of(path).startswith(TIFF_SIGNATURES):
            with open_tiff(path) as tif:
                sizes = list(_tiff_pixel_sizes(tif.pages.first))
        else:
            with open_raster(path) as picture:
                sizes = [_over(_UM_PER_INCH, picture.info.get("dpi", (0, 0)))]
    smallest, largest = MICROSCOPE_UM
    fits = (x for x, y in sizes if smallest <= x <= largest and abs(y / x - 1) <= SAME)
    return next(fits, None)


def _tiff_pixel_sizes(page):
    """Yield micrometres per pixel (x, y) as each part of the TIFF tells them, 0 for nonsense."""
    text = page.description
    ome = [(size.search(text), unit.search(text)) for size, unit in _OME_SIZES]
    if ome[0][0]:
        both = [_number(n) * _um_per_unit(unit[1] if unit else "um") for n, unit in ome if n]
        yield both[0], both[-1]
    if aperio := _APERIO_MPP.search(text):
        yield (_number(aperio),) * 2
    imagej = _IMAGEJ_UNIT.search(text) if text.startswith("ImageJ=") else None
    if imagej:
        um_per_unit = _um_per_unit(imagej[1])
    else:
        um_per_unit = _UM_PER_TIFF_UNIT.get(page.resolutionunit, 0.0)
    yield _over(um_per_unit, page.resolution)
    for objective in (_APERIO_OBJECTIVE.search(text), _OME_OBJECTIVE.search(text)):
        yield from _by_objective(_number(objective))


def _scan_pixel_sizes(properties):
    """Yield micrometres per pixel (x, y) as OpenSlide's properties tell them."""
    x, y, objective = (
        _number(_TOLD.match(properties.get(f"openslide.{name}", "")))
        for name in ("mpp-x", "mpp-y", "objective-power")
    )
    yield x, y
    yield from _by_objective(objective)


def _by_objective(magnification):
    lowest, highest = _MAGNIFICATIONS
    if lowest <= magnification <= highest:
        yield (_UM_AT_MAGNIFICATION_ONE / magnification,) * 2


def _over(um, resolution):
    """Micrometres per pixel (x, y) of pixels per `um` micrometres, 0 for nonsense."""
    return tuple(um / pixels if pixels else 0.0 for pixels in resolution[:2])


def _number(match):
    number = _NUMBER.match(match[1]) if match else None
    return float(number[0].replace(",", ".")) if number else 0.0


def _um_per_unit(unit):
    # The micro sign comes as U+00B5, as the Greek letter, and spelled out by ImageJ and XML.
    unit = html.unescape(unit).strip().replace("\\u00B5", "u")
    unit = unit.replace("\u00b5", "u").replace("\u03bc", "u")
    unit = unit.lower()
    return _UM_PER_UNIT.get(unit) or _UM_PER_UNIT.get(unit.removesuffix("s"), 0.0)


def size_by_nuclei(areas: Sequence[float]) -> float | None:
    """Micrometres per pixel at which nuclei of these areas, pixels, have the usual one; None
    without any.
    """
    return math.sqrt(NUCLEUS_UM2 / statistics.median(areas)) if len(areas) else None


def scale_of(size: float | None, wanted: float | None, name: str | Path) -> float:
    """How many of an image's pixels, of `size` micrometres, make one of the `wanted` size.

    1 if they are about equal, or if one of them is not known. Raises InputError, which calls the
    image `name`, where the image would have to be enlarged more than 4 or reduced more than 8
    times: such a pixel size is hardly ever true.
    """
    if not size or not wanted or abs(wanted / size - 1) <= SAME:
        return 1.0
    scale = wanted / size
    if not LEAST_SCALE * 0.999 <= scale <= MOST_SCALE * 1.001:  # tags hold rounded fractions
        raise InputError(
            f"{name}: found a pixel size of {size:.4g} um, expected {wanted / MOST_SCALE:.3g} to "
            f"{wanted / LEAST_SCALE:.3g} um, which can be resampled to {wanted:.3g} um; if it is "
            f"wrong, give the true one with --pixel_size"
        )
    return scale


def said_of_other(sizes: Mapping[str, tuple[float | None, float | None]]) -> list[str]:
    """A line where images, by name, tell another size than the one that is taken for them.

    Sizes are micrometres a pixel, as told and as taken; those within 5 % are about equal.
    """
    others = [
        f"{name} says {told:.3g} um a pixel, {taken:.4g} is taken"
        for name, (told, taken) in sizes.items()
        if told and taken and abs(told / taken - 1) > NEAR
    ]
    more = f" ({len(others)} of {len(sizes)} images say otherwise)" * (len(others) > 1)
    return [line + more for line in others[:1]]


def resampling_lines(sizes: Mapping[str, float | None], wanted: float | None) -> list[str]:
    """What is assumed and done where images of these `sizes`, by name, are used at the `wanted`.

    A line for each size that is resampled (as `scale_of` has it), and one for the images that do
    not tell theirs, or for all where no size is wanted. No line where all are about equal. Sizes
    are micrometres.
    """
    if not wanted:
        return ["No pixel size to go by: all images are taken as they are; --pixel_size tells it"]
    resampled, unknown = {}, []
    for name, size in sizes.items():
        if not size:
            unknown.append(name)
        elif (scale := scale_of(size, wanted, name)) != 1:
            change = f"enlarged {1 / scale:.3g}" if scale < 1 else f"reduced {scale:.3g}"
            line = f"{size:.3g} um a pixel, {change} times to {wanted:.3g} um"
            resampled.setdefault(line, []).append(name)
    lines = [f"{some(names)}: {line}" for line, names in resampled.items()]
    if unknown:
        lines.append(
            f"No pixel size in {some(unknown)}: taken as {wanted:.3g} um; --pixel_size tells it"
        )
    return lines
