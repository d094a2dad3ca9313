"""The one rule for masks: what in a file is foreground, and when its values are nuclei.

Small files are judged in memory, large ones while they are read by windows (windows.open_mask), by
the same evidence, which is gathered band by band.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from tissue.files import InputError
from tissue.images import decode, decoding
from tissue.palettes import black_is_not_first, check_background
from tissue.places import check_background_is_0, check_largest, places_of, times_filled

# What lies in a folder of one of these names has one number per nucleus.
LABEL_FOLDER, ANNOTATION_FOLDER = "instance_labels", "annotations"
BAND = 4 * 10**6  # pixels that are judged at once
_MOST_MARKED = 0.6  # of a mask; the densest tissue (lymph nodes, thymus) has up to 58 % of nuclei
_MOST_PIECES = 3  # of a nucleus, on average
_FULL = (1, 255, 65535)  # the largest values that a mask of 0 and one value can have by its kind
_MOST_PLACES, _TIMES_THE_NEXT = 10, 5  # of one number, where all others lie in fewer
_WRAPPED = 10  # of the numbers 1 to 255, in two or more places; of real maps 5 of all at most
_OUTLINES = 2  # times as large as a mask is what it encloses; 1.03 at most in 706 real ones
_FRACTION = 1024  # parts of 1 to which fractions are rounded: resized floats are not quite 0 or 1


class Mask(NamedTuple):
    """A mask as its file means it."""

    foreground: np.ndarray  # bool (H, W)
    labels: np.ndarray | None  # one integer per nucleus (H, W), 0 the background, if it has them
    notes: tuple[str, ...]  # what was assumed, or looks odd: lines that name the file


class Meaning(NamedTuple):
    """What the values of a mask mean: foreground is what is above `threshold`."""

    threshold: float
    is_label_map: bool
    notes: tuple[str, ...]  # as in Mask


def read(path: str | Path) -> Mask:
    """Return the Mask of a file, by this rule:

    Foreground is what is above half of the largest value of the file's kind (bool, 0 / 1, 0 / 255,
    0 / 65535, integers or floats), soft edges included. 0 and one other value are a mask too. A
    label map is what lies in a folder LABEL_FOLDER or ANNOTATION_FOLDER, or a file whose values
    other than 0 are one connected piece each (8 neighbours). Equal colour channels count as grey,
    alpha is ignored. Of a palette of colours the index counts, and 0 is background; of a palette of
    greys the grey that is shown, but the index if the greys run from white to black (ImageJ's
    inverting LUT). JPEG is a mask, never a label map. White-is-zero TIFFs count as a viewer shows
    them, except ImageJ's (its inverting LUT shows the foreground, 255, as black) and tifffile's
    bool arrays: there the stored value counts.

    Raises InputError for what `images.read_image` does, and for classes (values that lie in several
    places), colours, pictures, values below 0, a JPEG that is not black and white, and a label map
    whose background, or what is not annotated, has a number, or one number of which stands for many
    nuclei.
    """
    path = Path(path)
    with decoding(path):
        stored = decode(path)
        values, notes = _values(path, stored)
        rows = max(1, BAND // values.shape[1])

        def bands():
            return (values[y : y + rows] for y in range(0, len(values), rows))

        meaning = meaning_of(path, bands, stored.lossy)
        labels = None
        if meaning.is_label_map:
            labels = whole_numbers(values)
        foreground = np.ascontiguousarray(values > meaning.threshold)
        if (times := times_filled(foreground)) > _OUTLINES:
            meaning = meaning._replace(notes=(*meaning.notes, _of_outlines(path, times)))
        return Mask(foreground, labels, notes + meaning.notes)


def _of_outlines(path, times):
    return (
        f"{path}: found outlines alone (filled, they are {times:.1f} times as large), expected "
        f"filled nuclei; fill them"
    )


def read_mask(path: str | Path) -> np.ndarray:
    """Return the foreground of a mask as bool (H, W), as `read` does."""
    return read(path).foreground


def read_label_map(path: str | Path) -> np.ndarray | None:
    """Return one integer per nucleus, (H, W), 0 the background, as `read` does, or None."""
    return read(path).labels


def whole_numbers(values: np.ndarray) -> np.ndarray:
    """A label map's values (H, W) as integers."""
    return values if values.dtype.kind in "ui" else np.rint(values).astype(np.int64)


def meaning_of(path: Path, bands: Callable[[], Iterable], lossy: bool) -> Meaning:
    """Return the Meaning of a mask's values.

    `bands()` gives the whole mask once more, from top to bottom, as arrays (h, W) of bool, integers
    or floats; `lossy` says that it is a JPEG. Raises InputError as `read` does.
    """
    values, pixels, whole = _tally(path, bands())
    numbered = _is_numbered(path)
    least = 0.5 if values.dtype.kind == "f" else 0  # above it lie the numbers from 1 up
    if lossy:
        _check_jpeg(path, values, pixels)
        notes = (f"{path}: a JPEG holds no numbers: taken as a mask",) if numbered else ()
        return Meaning(127, False, notes + _share_notes(path, values, pixels, 127))
    marked = values[values > 0]
    if numbered:
        if whole:  # first: a background of many places is no number that was cut to 8 bits
            check_background_is_0(path, values, pixels)
        _check_numbers(path, bands, marked, whole)
        check_largest(path, values, pixels)
        return Meaning(least, True, _share_notes(path, values, pixels, least, most=1))
    if len(values) == 1 or (len(marked) == 1 and values[0] == 0):  # nothing, everything, or both
        return _plain(path, values, pixels)
    full = next((full for full in _FULL if values[-1] <= full), None)
    if full and values[-1] >= 0.9 * full and _has_soft_edges(bands(), values, pixels, full):
        threshold = full / 2 if values.dtype.kind == "f" else full // 2
        note = f"{path}: a mask with soft edges, taken as nucleus above {full / 2:g}"
        return Meaning(threshold, False, (note, *_share_notes(path, values, pixels, threshold)))
    if not whole:
        raise InputError(
            f"{path}: found fractions in a mask, expected 0 and 1, soft edges alone between them, "
            f"or whole numbers; threshold it and save it as 0 and 255"
        )
    if values[0] > 0:
        raise InputError(
            f"{path}: found values from {values[0]:g} to {values[-1]:g} and no 0: everything is "
            f"marked, expected 0 for the background, save it so"
        )
    _check_pieces(path, marked, _places(bands(), marked))
    check_background_is_0(path, values, pixels)
    check_largest(path, values, pixels)
    note = f"{path}: taken as a label map: each of its {len(marked)} values is one connected piece"
    return Meaning(least, True, (note,))


def _is_numbered(path):
    return path.absolute().parent.name.lower() in (LABEL_FOLDER, ANNOTATION_FOLDER)


def _values(path, stored):
    """The one value per pixel of a decoded file, (H, W), and notes."""
    if stored.palette is not None:
        return _palette_values(path, stored.pixels, stored.palette)
    return (grey(path, stored.pixels) if stored.pixels.ndim == 3 else stored.pixels), ()


def grey(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Return the one value per pixel, (H, W), of pixels (H, W, C); InputError for colours."""
    if pixels.shape[2] > 1 and (pixels != pixels[..., :1]).any():
        raise InputError(
            f"{path}: found a mask of several colours, expected one value per pixel (0 is "
            f"background), save it as a grey or label image"
        )
    return pixels[..., 0]


def _palette_values(path, indices, palette):
    """As `_values`, of a palette image; the rule is in `read`."""
    used = np.unique(indices).astype(int)
    colours = palette[used].astype(int)
    if _is_numbered(path):
        _check_black(path, indices, used[~colours.any(axis=1)])
        return indices, ()
    if (colours == colours[:, :1]).all():
        greys = colours[:, 0]
        for count in (2, 4, 16, 256):
            ramp = used * 255 // (count - 1)
            if used[-1] < count and (greys == 255 - ramp).all():
                marked = np.count_nonzero(indices) / indices.size
                if count < 256 and marked > _MOST_MARKED:  # not ImageJ's, and colours by their use
                    raise InputError(
                        f"{path}: found a palette in which white comes before black, expected "
                        f"black first, as background, save it as a grey or label image"
                    )
                note = f"{path}: its palette is inverted: what it shows black is taken as nucleus"
                return indices, (note,)
        return palette[:, 0][indices], ()
    check_background(path, used, colours)
    return indices, ()


def _check_black(path, indices, black):
    """Raise InputError where a label map's background is black, and black not index 0.

    `black` are the used indices of that colour. One that has fewer pixels than index 0 is a nucleus
    that happens to be black.
    """
    pixels = np.bincount(indices.ravel(), minlength=1)
    if 0 not in black and len(black) and pixels[black].max() > pixels[0]:
        raise black_is_not_first(path)


def _tally(path, bands):
    """(values in order, how many pixels have each, whether all are whole numbers)"""
    counts, least, whole = Counter(), 0, True
    for band in bands:
        band = _comparable(path, band)
        highest = band.max()
        plain = np.count_nonzero(band == highest)
        if highest > 0 and np.count_nonzero(band) == plain:  # 0 and one value: no need to sort
            found, pixels = np.array([0, highest], band.dtype), [band.size - plain, plain]
        else:
            found, pixels = np.unique(band, return_counts=True)
        least = min(least, found[0])
        whole = whole and (band.dtype.kind != "f" or bool((found == np.rint(found)).all()))
        for value, count in zip(found.tolist(), pixels, strict=True):
            counts[value] += int(count)
    values = np.array(sorted(value for value, count in counts.items() if count))
    if least < 0:
        raise InputError(
            f"{path}: found the value {least:g} in a mask, expected 0 for the background and "
            f"numbers above for nuclei, save it so"
        )
    return values, np.array([counts[value] for value in values.tolist()]), whole


def _comparable(path, band):
    """A band of a mask as integers, or as floats that are rounded to parts of 1."""
    if band.dtype == bool:
        return band.view(np.uint8)
    if band.dtype.kind != "f":
        if band.dtype == np.uint64 and band.max() > np.iinfo(np.int64).max:
            raise InputError(
                f"{path}: found numbers of 64 bits in a mask, expected 63 at most, save it so"
            )
        return band
    if not np.isfinite(band).all() or float(np.abs(band).max()) > 2**31:
        raise InputError(
            f"{path}: found values that are not finite or of more than 31 bits in a mask, expected "
            f"0 and 1 or whole numbers, save it so"
        )
    return np.rint(band.astype(float) * _FRACTION) / _FRACTION


def _plain(path, values, pixels):
    """The Meaning of a mask of 0 and one other value at most."""
    value = values[-1]
    notes = _share_notes(path, values, pixels, 0)
    if len(values) > 1 and value not in _FULL:
        notes = (
            f"{path}: a mask of 0 and {value:g}, taken as nucleus where it is {value:g}",
            *notes,
        )
    return Meaning(value / 2 if values.dtype.kind == "f" else 0, False, notes)


def _share_notes(path, values, pixels, threshold, most=_MOST_MARKED):
    """A note where nothing, everything, or more than the fraction `most` is foreground."""
    share = pixels[values > threshold].sum() / pixels.sum()
    if share == 0:
        return (f"{path}: nothing is marked in this mask",)
    if share == 1:
        return (f"{path}: everything is marked in this mask",)
    if share > most:
        return (f"{path}: {100 * share:.0f} % of this mask is marked as nucleus: is it inverted?",)
    return ()


def _check_jpeg(path, values, pixels):
    """Raise InputError unless compression left a JPEG black and white."""
    grey = pixels[(values >= 64) & (values < 192)].sum()
    if grey > pixels[values >= 192].sum() or 0 < values[-1] < 64:
        raise InputError(
            f"{path}: found a JPEG that is not black and white, expected 0 and 255 (JPEG blurs 0 "
            f"and 1 or labels), save it as PNG"
        )


def _check_numbers(path, bands, marked, whole):
    """Raise InputError for what lies in LABEL_FOLDER and has no number for each nucleus.

    A nucleus may be in two pieces; numbers in many are a mask, classes, a picture, or a label map
    that was resized by interpolation.
    """
    each = _places(bands(), marked) if whole else np.zeros(1, int)
    places = int(each.sum())
    most = 1 if len(marked) == 1 else _MOST_PIECES * len(marked)
    if whole and places <= most:
        _check_places(path, marked, each)
        return
    numbers = f"one number, {marked[0]:g}," if len(marked) == 1 else f"{len(marked)} numbers"
    found = f"{numbers} in {places} places" if whole else "fractions"
    raise InputError(
        f"{path}: found {found}, expected one whole number per nucleus; put a mask into a folder "
        f"of masks"
    )


def _places(bands, marked):
    """`places_of` the values of a mask, whatever its type."""
    return places_of((_comparable(Path(), band) for band in bands), marked)


def _check_places(path, marked, places):
    """Raise InputError where one of several numbers stands for many nuclei, or for no nucleus."""
    if len(marked) < 2:
        return
    several = np.count_nonzero(places > 1)
    if len(marked) == marked[-1] == 255 and several > _WRAPPED:  # numbered 1 to 255 once more
        raise InputError(
            f"{path}: found all numbers from 1 to 255 and no other, {several} of which lie in "
            f"several places, expected one nucleus a number; was it saved with 8 bits? save it "
            f"with 16"
        )
    *_, next_most, most = np.sort(places)
    if most > max(_MOST_PLACES, _TIMES_THE_NEXT * next_most):
        raise InputError(
            f"{path}: found value {marked[places.argmax()]:g} in {most} places, expected one "
            f"nucleus a number; was it saved with 8 bits? save it with 16, and outlines as 0"
        )


def _check_pieces(path, marked, places):
    """Raise InputError unless each value lies in one place."""
    several = marked[places > 1]
    if not len(several):
        return
    if len(several) > 3:
        found = (
            f"{len(marked)} values, {len(several)} of which lie in several places each (a picture, "
            f"or probabilities?)"
        )
    elif len(several) > 1 and len(set(places[places > 1])) == 1:
        names = f"{', '.join(f'{value:g}' for value in several[:-1])} and {several[-1]:g}"
        found = f"a mask whose values {names} lie in {places[places > 1][0]} places each"
    else:
        each = zip(several, places[places > 1], strict=True)
        text = ", ".join(f"value {value:g} lies in {count} places" for value, count in each)
        found = f"a mask whose {text}"
    raise InputError(
        f"{path}: found {found}, expected one number per nucleus, or 0 and 255; if its numbers are "
        f"nuclei, put it into a folder {LABEL_FOLDER}"
    )


def _has_soft_edges(bands, values, pixels, full) -> bool:
    """Whether what is between 0 and `full` are soft edges: of resizing, blur or drawing.

    They are thin. Classes form flat areas, pictures and probabilities are grey in the wide.
    """
    white = 0.97 * full
    is_grey, is_between = (values >= full / 4) & (values < full * 3 / 4), values < white
    grey, between = pixels[is_grey].sum(), pixels[is_between & (values > 0)].sum()
    if grey and np.count_nonzero(is_between & (values > 0)) == 1:
        return False  # a class: a border, or what is uncertain
    if grey >= pixels[values >= full * 3 / 4].sum():
        return False
    flat, alone, thick = 0, 0, 0
    tail = None  # the last rows of the band above: every block of pixels is looked at once
    for band in bands:
        band = _comparable(Path(), band).astype(np.float32)
        new = len(band)
        band = band if tail is None else np.vstack([tail, band])
        tail = band[-4:]
        grey_here = ((band >= full / 4) & (band < full * 3 / 4)).astype(np.uint8)
        thick += np.count_nonzero(cv2.erode(grey_here, np.ones((5, 5)))[2:-2, 2:-2])
        band = band[-new - 2 :]
        # No darker neighbour, and not the background: inside of a class, or walled in by a border.
        is_between = (band > 0) & (band < white)
        lowest = is_between & (cv2.erode(band, np.ones((3, 3))) == band)
        flat += np.count_nonzero(lowest[1:-1, 1:-1])
        # No brighter neighbour: not the edge of anything.
        highest = is_between & (cv2.dilate(band, np.ones((3, 3))) == band)
        alone += np.count_nonzero(highest[1:-1, 1:-1])
    return flat <= 0.15 * between and alone <= 0.5 * between and thick <= 0.05 * grey
