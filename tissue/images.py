"""Reads the pixels of any tissue image or mask.

A file's format is told by its first bytes, not by its suffix. TIFF is read by tifffile, 16-bit PNG
by imagecodecs (Pillow drops the low byte of colours), the formats of scanners by OpenSlide
(tissue/scanners.py), everything else by Pillow. What their decoders only warn of is an error
(tissue/strict.py), and but for those of scanners no other file is ever opened, whatever the
metadata name.
"""

import math
import os
import re
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
from PIL import Image

from tissue import strict
from tissue.bits import Bits, bits_for, to_uint8, told_bits, upper_bytes
from tissue.files import InputError, one_line, some
from tissue.scanners import Scan, is_scan, on_white
from tissue.tiff import TIFF_SIGNATURES, open_tiff, signature_of

LARGEST = 10**11  # pixels; no scanner makes more, so a header that says so is wrong
PROMISED = 2**28  # bytes of pixels that a file of any size may promise
MOST_PACKED = 1400  # times that pixels are as long as their file: deflate has 1032, LZW 1365
ORIENTATION = 0x0112  # tag of TIFF and EXIF; TIFF 6.0, page 36
_SIDEWAYS = (5, 6, 7, 8)  # the orientations that swap height and width


class Stored(NamedTuple):
    """A file's pixels, upright, before they become an image or a mask."""

    pixels: np.ndarray  # (H, W) or (H, W, 3), any dtype; indices into the palette if there is one
    palette: np.ndarray | None  # (N, 3) uint8
    lossy: bool  # JPEG: values near the stored ones
    depth: int | None = None  # bits of a sample of two bytes, where the file tells of less than 16
    alpha: np.ndarray | None = None  # (H, W) of the pixels' dtype, 0 is transparent; None without


def read_image(path: str | Path, bits: int | None = None) -> np.ndarray:
    """Return the image as RGB uint8 (H, W, 3), C-contiguous and writeable.

    Grey is repeated over the channels, a palette becomes its colours, the orientation of EXIF
    (JPEG) or TIFF is applied, and a pyramid gives its full resolution. What alpha makes transparent
    is laid on white, unless a TIFF says that its colours are multiplied by it or not what it is.
    16 bit becomes 8 bit by keeping the upper 8 of `bits`, which images of one set must share, or
    else they differ in brightness; without it those of `bits_in_use`. What is brighter than they
    hold is white. The contrast of the image plays no other part.

    Raises InputError for a file that is damaged, no image, a stack, or of other channels or types.
    """
    path = Path(path)
    with decoding(path):
        stored = decode(path)
        if stored.palette is not None:
            pixels = stored.palette[stored.pixels]
        else:
            pixels = to_uint8(path, stored.pixels, bits, stored.depth)
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        pixels = np.require(pixels, requirements=["C_CONTIGUOUS", "WRITEABLE"])
        if stored.alpha is not None:
            lay_on_white(pixels, stored.alpha)
        return pixels


def bits_in_use(path: str | Path) -> int | None:
    """Return how many bits of its samples a 16-bit image uses: 8, 10, 12, 14 or 16; else None.

    The fewest that hold 99 % of its samples (`bits.bits_for`), because cameras of 10 to 14 bits
    store in 16 without saying so, and no less than it says (TIFF's MaxSampleValue, OME's
    SignificantBits; that all 16 are in use is what writers say who do not know). Raises InputError
    as `read_image` does.
    """
    found = bits_of(path)
    return found.used if found else None


def bits_of(path: str | Path) -> Bits | None:
    """As `bits_in_use`, and how many bits the largest sample needs."""
    path = Path(path)
    with decoding(path):
        signature = signature_of(path)
        if signature.startswith(b"\x89PNG") and signature[24] == 16:
            return bits_for(upper_bytes(decode(path).pixels), None)
        if not signature.startswith(TIFF_SIGNATURES) or is_scan(path):
            return None
        with open_tiff(path) as tif:
            plane = tiff_plane(path, tif)
            if plane.dtype != np.uint16 or plane.keyframe.photometric.name == "PALETTE":
                return None
            strict.check_pieces(tif, plane)
            return bits_for(_upper_bytes(path, tif, plane), told_bits(plane.keyframe))


def image_shape(path: str | Path) -> tuple[int, int]:
    """Return (H, W) in pixels as `read_image` would give it, from the header alone.

    Raises InputError for a file whose header is damaged or tells of no single image, or of a size
    that no image has.
    """
    return _header(Path(path))[0]


def said_of_turned(paths: Iterable[str | Path]) -> list[str]:
    """A line that names the images, of these, that are turned as their orientation says."""
    turned = []
    for path in map(Path, paths):
        with suppress(InputError, OSError):  # whoever reads it says why
            turned += [path.name] * (_header(path)[3] in range(2, 9))
    if not turned:
        return []
    return [
        f"{some(turned)}: turned or mirrored as the orientation in the file says, as viewers show "
        f"it; masks and outlines must lie on it so"
    ]


def _header(path):
    """((H, W) upright, bytes a pixel as stored, bytes a pixel that are held while it is decoded,
    the orientation by which it is turned, 1 where it is not)
    """
    with decoding(path):
        signature, orientation = signature_of(path), 1
        if is_scan(path):
            shape, stored, held = Scan(path).levels[0], 0, 6
        elif signature.startswith(TIFF_SIGNATURES):
            with open_tiff(path) as tif:
                plane = tiff_plane(path, tif)
                shape = plane.shape[plane.axes.index("Y")], plane.shape[plane.axes.index("X")]
                page = plane.keyframe
                orientation = page.tags.valueof(ORIENTATION, default=1)
                decoded = plane.nbytes / max(1, math.prod(shape))
                stored, held = decoded / 8 if page.bitspersample == 1 else decoded, 2 * decoded + 5
        else:
            with open_raster(path) as picture:
                shape = picture.height, picture.width
                orientation = _raster_orientation(picture)
                bands, bits = len(picture.getbands()), 8
                if signature.startswith(b"\x89PNG"):
                    bits = signature[24]
                elif picture.mode in ("1", "P"):  # of a BMP
                    bits = 1
                stored = bands * bits / 8
                held = 2 * bands + 10 if bits == 16 else {1: 6, 3: 11}.get(bands, 15)
    shape = shape[::-1] if orientation in _SIDEWAYS else shape
    check_shape(path, *shape)
    return shape, stored, held, orientation


def check_shape(path: Path, height: int, width: int) -> None:
    """Raise InputError for a size that no image has."""
    if not 0 < height * width <= LARGEST:
        raise InputError(
            f"{path}: found {height} x {width} pixels (height x width), expected 1 to "
            f"{LARGEST:.0e} in all, replace the file"
        )


def check_memory(path: Path) -> None:
    """Raise InputError for an image that is too large to be read whole: for this memory, or for its
    file, which cannot hold so many pixels.
    """
    (height, width), stored, held, _ = _header(path)
    pixels, room = height * width, free_memory()
    found = f"{path}: found {height} x {width} pixels in a file"
    if held * pixels > room:
        raise InputError(
            f"{found} that can only be read whole, expected at most {room / held:.1e} pixels for "
            f"this memory, save it as a tiled TIFF"
        )
    size = path.stat().st_size
    if stored * pixels > max(PROMISED, MOST_PACKED * size):
        raise InputError(
            f"{found} of {size:,} bytes, expected {stored * pixels / MOST_PACKED:,.0f} or more for "
            f"so many pixels, replace the file"
        )


def free_memory() -> int:
    """Bytes of memory that are free, or a guess where the system does not say."""
    if Path("/proc/meminfo").is_file():  # what caches hold counts as free
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            return int(found[1]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 * 2**30


@contextmanager
def decoding(path):
    """Turn whatever a decoder raises on a bad file into an InputError of one line."""
    try:
        yield
    except (InputError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # decoders raise nearly anything on bytes that are no image
        said = one_line(error)
        raise InputError(
            f"{path}: found a file that cannot be decoded ({said}), expected a whole TIFF, PNG, "
            f"JPEG or BMP image, replace the file"
        ) from error


def open_raster(path):
    Image.MAX_IMAGE_PIXELS = None  # whole slides exceed Pillow's guard against web uploads
    return Image.open(path, formats=("PNG", "JPEG", "BMP"))


def decode(path):
    """Return the Stored pixels of a file of any format."""
    check_memory(path)
    if is_scan(path):
        return Stored(Scan(path).whole(), None, lossy=True)
    signature = signature_of(path)
    if signature.startswith(b"\xff\xd8"):
        strict.check_jpeg(path.read_bytes())
    if signature.startswith(b"\x89PNG"):
        strict.check_png(path)
    if signature.startswith(TIFF_SIGNATURES):
        with open_tiff(path) as tif:
            return _decode_tiff(path, tif)
    with open_raster(path) as picture:
        palette = None
        if signature.startswith(b"\x89PNG") and signature[24] == 16:
            pixels = imagecodecs.png_decode(path.read_bytes())
        else:
            converted = picture.mode in ("CMYK", "YCbCr")
            pixels = np.asarray(picture.convert("RGB") if converted else picture)
        if picture.mode == "P":
            colours = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
            palette = np.zeros((256, 3), np.uint8)  # an index may lie beyond the colours
            palette[: len(colours)] = colours
        alpha = None
        if "transparency" in picture.info and pixels.dtype == np.uint8:  # of a colour or an index
            alpha = np.asarray(picture.convert("RGBA"))[..., 3]
        if pixels.ndim == 3:
            if picture.format == "PNG" and pixels.shape[2] in (2, 4):  # a BMP's means nothing
                alpha = pixels[..., -1]
            pixels = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., 0]
        pixels = _upright(pixels, _raster_orientation(picture))  # of a PNG, which has alpha, 1
        return Stored(pixels, palette, picture.format in ("JPEG", "MPO"), alpha=alpha)


def _raster_orientation(picture):
    # JPEG alone: a PNG may carry its EXIF behind the pixels, out of image_shape's sight.
    if picture.format not in ("JPEG", "MPO"):
        return 1
    return picture.getexif().get(ORIENTATION, 1)


def _upright(pixels, orientation):
    """Return `pixels` as a viewer shows them; `orientation` is 1 to 8."""
    if orientation in _SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def tiff_plane(path, tif):
    """Return the TiffPageSeries of the file's one image at full resolution."""
    first, *others = tif.series
    if first.keyframe.planarconfig not in (1, 2):
        raise InputError(
            f"{path}: found a planar configuration of {first.keyframe.planarconfig}, expected 1 "
            f"or 2 (colours in one plane or in planes of their own), save it anew"
        )
    # Lower levels of a pyramid, thumbnails, an Aperio file's label and photograph of the slide.
    others = [s for s in others if not (s.keyframe.is_subifd or s.keyframe.subfiletype & 5)]
    if others and not tif.is_svs:
        found = f"{1 + len(others)} images"
    elif set(first.axes) - set("YXSC") or {"S", "C"} <= set(first.axes):
        found = f"a stack of axes {first.axes}, shape {first.shape}"
    else:
        return first
    raise InputError(f"{path}: found {found}, expected one plane, save each to its own file")


def _decode_tiff(path, tif):
    """Return the Stored pixels of an open TIFF."""
    plane = tiff_plane(path, tif)
    page = plane.keyframe
    strict.check_pieces(tif, plane)
    kind = page.photometric.name
    if page.compression.name == "APERIO_JP2000_YCBC":
        kind = "YCBCR"  # whatever the tag says
    lossy = "JPEG" in page.compression.name
    known = ("MINISWHITE", "MINISBLACK", "RGB", "PALETTE")
    if kind not in known and not (kind == "YCBCR" and lossy):  # the JPEG decoder gives RGB
        raise InputError(f"{path}: found {kind} colours, expected RGB or grey, convert it to RGB")
    pixels, alpha = plane.asarray(), None
    orientation = page.tags.valueof(ORIENTATION, default=1)
    if (axis := _channel_axis(plane)) is not None:
        pixels = np.moveaxis(pixels, axis, -1)
        if has_alpha(page):
            alpha = _upright(pixels[..., -1], orientation)
        pixels = pixels[..., :3] if colour_count(path, plane) == 3 else pixels[..., 0]
    if is_negative(tif, page):
        pixels = positive(pixels, page)
    palette = None
    if kind == "PALETTE":
        palette = page.colormap.T  # (N, 3), 16 bit by the standard, 8 bit by some writers
        palette = (palette >> 8 if palette.max() > 255 else palette).astype(np.uint8)
    return Stored(_upright(pixels, orientation), palette, lossy, told_bits(page), alpha)


def _channel_axis(plane):
    """The axis of colours, None without."""
    return next((plane.axes.index(axis) for axis in "SC" if axis in plane.axes), None)


def has_alpha(page) -> bool:
    """Whether a TIFF's last channel is said to be alpha by which its colours are not multiplied."""
    if page.samplesperpixel not in (2, 4) or page.photometric.name == "MINISWHITE":
        return False
    return bool(page.extrasamples) and page.extrasamples[-1] == 2 and page.dtype.kind == "u"


def lay_on_white(pixels: np.ndarray, alpha: np.ndarray) -> None:
    """Lay RGB uint8 (H, W, 3) on white, in place, by its `alpha`, uint8 or uint16 (H, W)."""
    rows = max(1, 2**20 // alpha.shape[1])
    for y in range(0, len(alpha), rows):
        part = alpha[y : y + rows]
        part = (part >> 8).astype(np.uint8) if part.dtype.itemsize > 1 else part
        if part.min() < 255:
            pixels[y : y + rows] = on_white(np.dstack([pixels[y : y + rows], part]))


def colour_count(path, plane) -> int:
    """How many channels of a TIFF's plane are colours, 1 or 3, and not alpha; else InputError."""
    axis = _channel_axis(plane)
    if axis is None:
        return 1
    count = plane.shape[axis]
    extra = plane.keyframe.extrasamples
    has_other = extra and extra[-1] in (1, 2)  # alpha, associated or not
    # Many writers do not say.
    has_other = has_other or (plane.keyframe.photometric.name == "RGB" and count == 4)
    colours = count - 1 if has_other else count
    if colours not in (1, 3):
        raise InputError(f"{path}: found {count} channels, expected RGB or grey, save it as RGB")
    return colours


def is_negative(tif, page) -> bool:
    """Whether 0 is shown white in a TIFF's page, and meant so."""
    by_tifffile = page.bitspersample == 1 and page.software.startswith("tifffile")
    shown_white = page.photometric.name == "MINISWHITE" and page.dtype.kind in "bu"
    return shown_white and not (tif.is_imagej or by_tifffile)  # they store what they mean


def positive(pixels: np.ndarray, page) -> np.ndarray:
    """Return the stored pixels of a negative page as they are shown."""
    return pixels ^ pixels.dtype.type((1 << page.bitspersample) - 1)


def _upper_bytes(path, tif, plane):
    """`bits.upper_bytes` of a uint16 image's colours, with one strip or tile in memory at once."""
    colours = colour_count(path, plane)
    negative = is_negative(tif, plane.keyframe)
    counts = np.zeros(256, np.int64)
    for number, page in enumerate(plane.pages):
        for segment, (sample, *_), _ in page.segments(maxworkers=1):
            if segment is None or (len(plane.pages) > 1 and number >= colours) or sample >= colours:
                continue
            values = positive(segment, plane.keyframe) if negative else segment
            counts += upper_bytes(values[0, ..., :colours])
    return counts
