"""Small pictures for the tests, and writers that write them as users' programs do."""

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from tissue.files import InputError

HEIGHT, WIDTH = 90, 70
_random = np.random.default_rng(0)
_y, _x = np.mgrid[:HEIGHT, :WIDTH]
# Smooth, so that JPEG keeps it, with a little noise, so that no two pixels can be mixed up.
RGB = np.stack([2 * _y + 20, 3 * _x + 10, _x + _y], axis=-1).astype(np.uint8)
RGB += _random.integers(0, 4, RGB.shape, dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = _random.integers(0, 256, GREY.shape, dtype=np.uint8)
RGBA = np.dstack([RGB, ALPHA])
CHANNEL_FIRST = np.moveaxis(RGB, -1, 0).copy()
MASK = (_x - 30) ** 2 + (_y - 40) ** 2 < 400
BYTES = MASK * np.uint8(255)
LABELS = np.where(MASK, 1 + _x // 10, 0).astype(np.uint8)


def tiff(array, **options):
    """A writer of `array` by tifffile."""
    return lambda path: tifffile.imwrite(path, array, **options)


def pillow(array, **options):
    """A writer of `array` by Pillow."""
    return lambda path: Image.fromarray(array).save(path, **options)


def opencv(array):
    """A writer of `array` in RGB order by OpenCV, which wants BGR."""
    swapped = array[..., [2, 1, 0, 3][: array.shape[2]]] if array.ndim == 3 else array
    return lambda path: cv2.imwrite(str(path), swapped)


def with_palette(indices, colours, **options):
    """A writer of a palette image by Pillow."""

    def write(path):
        picture = Image.fromarray(indices)
        picture.putpalette(np.asarray(colours, np.uint8).ravel().tolist())
        picture.save(path, **options)

    return write


def pyramid(array, subifds):
    """A writer of `array` with two smaller levels, in SubIFDs or in pages marked as reduced."""

    def write(path):
        with tifffile.TiffWriter(path) as tif:
            tif.write(array, photometric="rgb", tile=(32, 32), subifds=2 if subifds else 0)
            for step in (2, 4):
                level = np.ascontiguousarray(array[::step, ::step])
                tif.write(level, photometric="rgb", tile=(32, 32), subfiletype=1, metadata=None)

    return write


def aperio(path):
    """Full resolution, thumbnail, a level, label and macro photograph, as in an SVS file."""
    options = {"photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as tif:
        text = "Aperio Image Library v10\n90x70 |AppMag = 20|MPP = 0.4990|Left = 25.1"
        tif.write(RGB, tile=(32, 32), description=text, **options)
        tif.write(RGB[::3, ::3].copy(), description="Aperio thumbnail", **options)
        tif.write(RGB[::4, ::4].copy(), tile=(16, 16), description="Aperio level", **options)
        tif.write(RGB[:20, :30].copy(), subfiletype=1, description="Aperio label", **options)
        tif.write(RGB[:30, :20].copy(), subfiletype=9, description="Aperio macro", **options)


def grey3(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def refusal(read, path, *words):
    """Assert that `read` refuses `path` in one line that names it and has `words`."""
    with pytest.raises(InputError) as error:
        read(path)
    text = str(error.value)
    assert "\n" not in text
    for word in (str(path), "found", "expected", *words):
        assert word in text


def blobs(seed, shape=(300, 280), share=0.45):
    """A mask of touching shapes of all kinds, with holes, specks and corners that meet."""
    noise = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3) * 10 + noise * 0.3
    return smooth > np.quantile(smooth, 1 - share)
