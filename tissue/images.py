"""Reads the pixels of any tissue image or mask.

A file's format is told by its first bytes, not by its suffix. TIFF is read by tifffile, 16-bit PNG
by imagecodecs (Pillow drops the low byte of colours), everything else by Pillow.
"""

import logging
import re
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from tissue.files import InputError

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, both byte orders
ORIENTATION = 0x0112  # tag of TIFF and EXIF; TIFF 6.0, page 36
_SIDEWAYS = (5, 6, 7, 8)  # the orientations that swap height and width


class Stored(NamedTuple):
    """A file's pixels, upright and without alpha, before they become an image or a mask."""

    pixels: np.ndarray  # (H, W) or (H, W, 3), any dtype; indices into the palette if there is one
    palette: np.ndarray | None  # (N, 3) uint8
    lossy: bool  # JPEG: values near the stored ones


def read_image(path: str | Path) -> np.ndarray:
    """Return the image as RGB uint8 (H, W, 3), C-contiguous and writeable.

    Grey is repeated over the channels, a palette becomes its colours, alpha is dropped, the
    orientation of EXIF (JPEG) or TIFF is applied, and a pyramid gives its full resolution.
    16 bit becomes 8 bit by keeping the upper 8 of the bits in use: 8, 10, 12, 14 or 16, the fewest
    that hold the file's largest value, because cameras of 10 to 14 bits store in 16 without
    saying so. The contrast of the image plays no other part.

    Raises InputError for a file that is damaged, no image, a stack, or of other channels or types.
    """
    path = Path(path)
    with decoding(path):
        stored = decode(path)
        if stored.palette is not None:
            pixels = stored.palette[stored.pixels]
        else:
            pixels = _to_uint8(path, stored.pixels)
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        return np.require(pixels, requirements=["C_CONTIGUOUS", "WRITEABLE"])


def image_shape(path: str | Path) -> tuple[int, int]:
    """Return (H, W) in pixels as `read_image` would give it, from the header alone.

    Raises InputError for a file whose header is damaged or tells of no single image.
    """
    path = Path(path)
    with decoding(path):
        if signature_of(path).startswith(TIFF_SIGNATURES):
            with open_tiff(path) as tif:
                plane = tiff_plane(path, tif)
                shape = plane.shape[plane.axes.index("Y")], plane.shape[plane.axes.index("X")]
                orientation = plane.keyframe.tags.valueof(ORIENTATION, default=1)
        else:
            with open_raster(path) as picture:
                shape = picture.height, picture.width
                orientation = _raster_orientation(picture)
    return shape[::-1] if orientation in _SIDEWAYS else shape


@contextmanager
def decoding(path):
    """Turn whatever a decoder raises on a bad file into an InputError of one line."""
    try:
        yield
    except (InputError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # decoders raise nearly anything on bytes that are no image
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: found a file that cannot be decoded ({said}), expected a whole TIFF, PNG, "
            f"JPEG or BMP image, replace the file"
        ) from error


def signature_of(path):
    with open(path, "rb") as file:
        return file.read(25)  # up to the bit depth in the header of a PNG


def open_raster(path):
    Image.MAX_IMAGE_PIXELS = None  # whole slides exceed Pillow's guard against web uploads
    return Image.open(path, formats=("PNG", "JPEG", "BMP"))


class _Lost(threading.local):
    """What tifffile logged in this thread about the TIFF being opened."""

    offsets = ()


_lost = _Lost()


@contextmanager
def open_tiff(path):
    """Open a TIFF, and raise what tifffile only logs: offsets out of the file, for it is truncated.

    Tags and pages would silently be lost with them, and three channels pass as one grey plane.
    """
    logging.getLogger("tifffile").addFilter(_note_lost_offset)  # has no effect the second time
    _lost.offsets = ()
    with tifffile.TiffFile(path) as tif:
        if tif.series and _lost.offsets:
            raise ValueError(_lost.offsets[0])
        yield tif


def _note_lost_offset(record):
    message = record.getMessage()
    if re.search("invalid (value|page) offset", message):
        _lost.offsets += (message,)
    return False  # to the filtered logger: keep it off stderr


def decode(path):
    """Return the Stored pixels of a file of any format."""
    signature = signature_of(path)
    if signature.startswith(TIFF_SIGNATURES):
        with open_tiff(path) as tif:
            return _decode_tiff(path, tif)
    with open_raster(path) as picture:
        palette = None
        if signature.startswith(b"\x89PNG") and signature[24] == 16:
            pixels = imagecodecs.png_decode(path.read_bytes())
        elif picture.mode == "P":
            pixels = np.asarray(picture)
            colours = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
            palette = np.zeros((256, 3), np.uint8)  # an index may lie beyond the colours
            palette[: len(colours)] = colours
        elif picture.mode in ("CMYK", "YCbCr"):
            pixels = np.asarray(picture.convert("RGB"))
        else:
            pixels = np.asarray(picture)
        if pixels.ndim == 3:
            pixels = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., 0]
        pixels = _upright(pixels, _raster_orientation(picture))
        return Stored(pixels, palette, lossy=picture.format in ("JPEG", "MPO"))


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
    # JPEG and LZW decoders fill up in silence what a truncated file lacks.
    size = tif.filehandle.size
    for stored in plane.pages:
        ends = zip(stored.dataoffsets, stored.databytecounts, strict=True)
        if any(offset + count > size for offset, count in ends):
            raise ValueError("the file ends before its pixels do")

    kind = page.photometric.name
    if page.compression.name == "APERIO_JP2000_YCBC":
        kind = "YCBCR"  # whatever the tag says
    lossy = "JPEG" in page.compression.name
    known = ("MINISWHITE", "MINISBLACK", "RGB", "PALETTE")
    if kind not in known and not (kind == "YCBCR" and lossy):  # the JPEG decoder gives RGB
        raise InputError(f"{path}: found {kind} colours, expected RGB or grey, convert it to RGB")
    if page.compression.name.startswith("CCITT"):
        with Image.open(path, formats=("TIFF",)) as picture:  # the fax codecs tifffile lacks
            pixels = np.asarray(picture)
    else:
        pixels = _tiff_samples(path, plane, kind)
        stored_as_meant = tif.is_imagej or (
            page.bitspersample == 1 and page.software.startswith("tifffile")
        )
        if kind == "MINISWHITE" and pixels.dtype.kind in "bu" and not stored_as_meant:
            pixels = pixels ^ pixels.dtype.type((1 << page.bitspersample) - 1)
    palette = None
    if kind == "PALETTE":
        palette = page.colormap.T  # (N, 3), 16 bit by the standard, 8 bit by some writers
        palette = (palette >> 8 if palette.max() > 255 else palette).astype(np.uint8)
    orientation = page.tags.valueof(ORIENTATION, default=1)
    return Stored(_upright(pixels, orientation), palette, lossy)


def _tiff_samples(path, plane, kind):
    """Return the decoded pixels, (H, W) or (H, W, 3), without alpha."""
    pixels = plane.asarray()
    channel_axis = next((axis for axis in "SC" if axis in plane.axes), None)
    if channel_axis is None:
        return pixels
    pixels = np.moveaxis(pixels, plane.axes.index(channel_axis), -1)
    count = pixels.shape[-1]
    extra = plane.keyframe.extrasamples
    has_alpha = extra and extra[-1] in (1, 2)  # associated or not
    has_alpha = has_alpha or (kind == "RGB" and count == 4)  # many writers do not say
    colours = count - 1 if has_alpha else count
    if colours not in (1, 3):
        raise InputError(f"{path}: found {count} channels, expected RGB or grey, save it as RGB")
    return pixels[..., 0] if colours == 1 else pixels[..., :3]


def _to_uint8(path, pixels):
    """Return bool, 8-bit or 16-bit pixels as uint8; the rule is in `read_image`."""
    if pixels.dtype == bool:
        return pixels * np.uint8(255)
    if pixels.dtype.kind != "u" or pixels.dtype.itemsize > 2:
        raise InputError(
            f"{path}: found {pixels.dtype} pixels, expected unsigned integers of 8 or 16 bit, save "
            f"it as 8-bit RGB"
        )
    if pixels.dtype.itemsize == 1:
        return pixels
    bits = max(8, int(pixels.max()).bit_length())
    bits += bits % 2
    return (pixels >> (bits - 8)).astype(np.uint8)
