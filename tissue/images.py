"""Reads any tissue image or mask, pairs them by name, and checks a pair before work starts.

A file's format is told by its first bytes, not by its suffix. TIFF is read by tifffile, 16-bit PNG
by imagecodecs (Pillow drops the low byte of colours), everything else by Pillow.
"""

import hashlib
import logging
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from tissue.files import InputError

IMAGE_SUFFIXES = ("tif", "tiff", "png", "jpg", "jpeg", "bmp", "svs")
IMAGE_FOLDER = "tissue_images"
LABEL_FOLDER = "instance_labels"
MASK_FOLDERS = ("mask binary", "mask_binary", "masks")

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, both byte orders
ORIENTATION = 0x0112  # tag of TIFF and EXIF; TIFF 6.0, page 36
_SIDEWAYS = (5, 6, 7, 8)  # the orientations that swap height and width

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


class Pair(NamedTuple):
    """A tissue image and its mask; `name` is the stem that both share."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class PairFacts:
    """What `check_pair` learned about a pair that is fit for use."""

    height: int  # pixels
    width: int  # pixels
    pixel_size_um: float | None
    foreground: float  # fraction of the mask, 0 to 1
    pixels_sha256: str  # of shape and RGB pixels: equal for one picture in two formats


class _Stored(NamedTuple):
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
        stored = _decode(path)
        if stored.palette is not None:
            pixels = stored.palette[stored.pixels]
        else:
            pixels = _to_uint8(path, stored.pixels)
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        return np.require(pixels, requirements=["C_CONTIGUOUS", "WRITEABLE"])


def read_mask(path: str | Path) -> np.ndarray:
    """Return the foreground as bool (H, W).

    Any value but 0 is foreground: 0 / 255, 0 / 1, bool and label maps of any integer type. Equal
    colour channels count as grey, alpha is ignored. Of a palette, index 0 is the background; only
    if all colours are grey and index 0 is not black, black is. JPEG is thresholded at 128.
    White-is-zero TIFFs count as a viewer shows them, except ImageJ's (its inverting LUT shows the
    foreground, 255, as black) and tifffile's bool arrays: there the stored value counts.

    Raises InputError for what `read_image` does, for colours, fractions, and a JPEG that is not
    black and white.
    """
    path = Path(path)
    with decoding(path):
        stored = _decode(path)
        if stored.palette is not None:
            return _palette_foreground(path, stored)
        values = stored.pixels
        if values.ndim == 3:
            if (values != values[..., :1]).any():
                raise InputError(
                    f"{path}: found a mask of several colours, expected one value per pixel (0 is "
                    f"background), save it as a grey or label image"
                )
            values = values[..., 0]
        if values.dtype.kind not in "bui" and (values != np.rint(values)).any():
            raise InputError(
                f"{path}: found fractions in a {values.dtype} mask, expected 0 and 1 or whole "
                f"numbers, threshold it and save it as 0 and 255"
            )
        if stored.lossy:
            return _jpeg_foreground(path, values)
        return np.ascontiguousarray(values != 0)


def read_label_map(path: str | Path) -> np.ndarray | None:
    """Return one integer per nucleus, (H, W), 0 the background, or None if it is but a mask.

    A file with a single value beside 0 (0 / 255, 0 / 1, bool), a palette or JPEG is a mask. Raises
    InputError for what `read_mask` does, and for numbers below 0.
    """
    path = Path(path)
    with decoding(path):
        stored = _decode(path)
    values = stored.pixels
    if stored.palette is not None or stored.lossy or values.dtype == bool:
        return None
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            return None
        values = values[..., 0]
    if values.dtype.kind == "f":
        values = np.rint(values).astype(np.int64)
    if values.size and values.min() < 0:
        raise InputError(
            f"{path}: found the label {values.min()}, expected 0 for the background and numbers "
            f"above for nuclei, save it so"
        )
    found = values[values > 0]
    return values if found.size and found.min() != found.max() else None


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
            with _open_raster(path) as picture:
                dots_per_inch = picture.info.get("dpi", (0, 0))[0]
                size = _UM_PER_INCH / dots_per_inch if dots_per_inch else 0.0
    smallest, largest = _MICROSCOPE_UM
    return size if smallest <= size <= largest else None


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
            with _open_raster(path) as picture:
                shape = picture.height, picture.width
                orientation = _raster_orientation(picture)
    return shape[::-1] if orientation in _SIDEWAYS else shape


def find_images(*places: str | Path) -> dict[str, Path]:
    """Return {stem: path} of the image files given and of those in the folders given, by stem.

    `x.ome.tif` has the stem `x`. In a folder, hidden files, folders and other suffixes are passed
    over. Raises FileNotFoundError for a place that is not there, InputError if files share a stem
    or a folder has no image.
    """
    paths, faults = [], []
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"{place}: no such file or folder, expected images there")
        found = _image_files(place) if place.is_dir() else [place]
        if not found:
            faults.append(_no_image(place))
        paths += found
    images, shared = _by_stem(paths)
    if faults + shared:
        raise InputError("; ".join(faults + shared))
    return images


def label_folder(root: str | Path) -> dict[str, Path]:
    """Return {stem: path} of the label maps in `root`'s folder for them; empty without any."""
    folder = Path(root) / LABEL_FOLDER
    return find_images(folder) if folder.is_dir() and _image_files(folder) else {}


def find_pairs(root: str | Path) -> list[Pair]:
    """Return the Pairs of `root`, sorted by name: images and masks of one stem, any formats.

    Images lie in `tissue_images`, masks in the first there is of `mask binary`, `mask_binary` and
    `masks`. Raises one InputError with all faults of the folders, separated by "; ".
    """
    root = Path(root)
    image_folder = root / IMAGE_FOLDER
    candidates = [root / name for name in MASK_FOLDERS]
    mask_folder = next((folder for folder in candidates if folder.is_dir()), None)
    faults = []
    images, masks = {}, {}
    if image_folder.is_dir():
        images, faults = _by_stem(_image_files(image_folder))
        if not images:
            faults.append(_no_image(image_folder))
    else:
        faults.append(f"{image_folder}: no such folder, expected the tissue images there")
    if mask_folder:
        masks, mask_faults = _by_stem(_image_files(mask_folder))
        faults += mask_faults
    else:
        faults.append(f"{candidates[0]}: no such folder, expected the masks there")
    if mask_folder and image_folder.is_dir():
        for here, there, other in ((images, masks, mask_folder), (masks, images, image_folder)):
            lonely = ", ".join(str(path) for stem, path in here.items() if stem not in there)
            if lonely:
                faults.append(f"{lonely}: found no file of that name in {other}, add or remove it")
    if faults:
        raise InputError("; ".join(faults))
    return [Pair(name, path, masks[name]) for name, path in images.items()]


def check_pair(pair: Pair, patch_dim: int) -> PairFacts:
    """Decode both files of a Pair and return its PairFacts.

    Raises InputError with all faults, separated by "; ": files that cannot be read, sizes that
    differ, an image smaller than a patch of `patch_dim` x `patch_dim` pixels.
    """
    decoded, faults = [], []
    for read, path in ((read_image, pair.image), (read_mask, pair.mask)):
        try:
            decoded.append(read(path))
        except (InputError, OSError) as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    image, mask = decoded
    height, width = image.shape[:2]
    if mask.shape != (height, width):
        faults.append(
            f"{pair.mask}: found a mask of {mask.shape[0]} x {mask.shape[1]} pixels (height x "
            f"width), expected {height} x {width} as in {pair.image}, replace one of them"
        )
    if min(height, width) < patch_dim:
        faults.append(
            f"{pair.image}: found {height} x {width} pixels (height x width), expected at least "
            f"{patch_dim} x {patch_dim} (one patch), use smaller patches or a larger image"
        )
    if faults:
        raise InputError("; ".join(faults))
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(image)
    return PairFacts(
        height, width, pixel_size_um(pair.image), float(mask.mean()), digest.hexdigest()
    )


def _image_files(folder):
    """Return the paths of the image files in a folder, sorted."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
    ]


def _no_image(folder):
    return f"{folder}: found no image, expected files of type {', '.join(IMAGE_SUFFIXES)}"


def _by_stem(paths):
    """Return ({stem: path} sorted by stem, faults): a fault for each stem of several files."""
    files = {}
    for path in paths:
        stem = re.sub(r"\.ome$", "", path.stem, flags=re.IGNORECASE)
        files.setdefault(stem, []).append(path)
    faults = [
        f"{' and '.join(str(path) for path in paths)}: found several files named {stem}, expected "
        f"one, remove or rename the others"
        for stem, paths in sorted(files.items())
        if len(paths) > 1
    ]
    return {stem: paths[0] for stem, paths in sorted(files.items())}, faults


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


def _open_raster(path):
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


def _decode(path):
    """Return the _Stored pixels of a file of any format."""
    signature = signature_of(path)
    if signature.startswith(TIFF_SIGNATURES):
        with open_tiff(path) as tif:
            return _decode_tiff(path, tif)
    with _open_raster(path) as picture:
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
        return _Stored(pixels, palette, lossy=picture.format in ("JPEG", "MPO"))


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
    """Return the _Stored pixels of an open TIFF."""
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
    return _Stored(_upright(pixels, orientation), palette, lossy)


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


def _palette_foreground(path, stored):
    """Return where a palette image shows foreground; the rule is in `read_mask`."""
    indices, palette = stored.pixels, stored.palette
    black = ~palette.any(axis=1)
    if black[0]:
        return indices != 0
    if (palette == palette[:, :1]).all():
        return ~black[indices]
    if black[indices].any():
        raise InputError(
            f"{path}: found a palette in which black is not index 0, expected index 0 as the "
            f"background, save it as a grey or label image"
        )
    return indices != 0


def _jpeg_foreground(path, values):
    """Return where a JPEG mask is white, if compression left it black and white."""
    grey = np.count_nonzero((values >= 64) & (values < 192))
    white = np.count_nonzero(values >= 192)
    if grey > white or 0 < values.max() < 64:
        raise InputError(
            f"{path}: found a JPEG that is not black and white, expected 0 and 255 (JPEG blurs 0 "
            f"and 1 or labels), save it as PNG"
        )
    return values >= 128


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
