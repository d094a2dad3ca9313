"""What draws pixels: outlines over images, contact sheets, picture files, pictures for a page."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from tissue import agreement
from tissue.files import replacing

OUTLINE = (255, 224, 0)  # RGB; yellow stands out from both stains
# Okabe & Ito's colours (jfly.uni-koeln.de/color), which colour-blind people can tell apart, without
# those that are near the stains.
ERROR_COLOURS = {
    "matched": (255, 255, 255),
    "missed": (86, 180, 233),
    "merged": (0, 158, 115),
    "split": (240, 228, 66),
    "spurious": (213, 94, 0),
}

ENLARGED_SIDE = 512  # pixels; smaller ones are enlarged from the file beside the page
LARGEST_PICTURE = 2**28  # pixels; larger files are linked alone
JPEG = [cv2.IMWRITE_JPEG_QUALITY, 75, cv2.IMWRITE_JPEG_OPTIMIZE, 1]


def overlay(
    image: np.ndarray, labels: np.ndarray, colour: tuple[int, int, int] = OUTLINE
) -> np.ndarray:
    """The image with the outlines of objects (holes too) drawn in, on the objects' own pixels.

    `image` is RGB uint8 (H, W, 3), `labels` a mask bool (H, W) or one integer per nucleus (H, W);
    returns RGB uint8 (H, W, 3).
    """
    drawn = image.copy()
    drawn[_edges(labels)] = colour
    return drawn


def error_overlay(
    image: np.ndarray,
    labels: np.ndarray,
    reference_labels: np.ndarray,
    prediction_class: np.ndarray,
    reference_class: np.ndarray,
) -> np.ndarray:
    """The image with each nucleus outlined in the colour of its class (ERROR_COLOURS).

    `image` is RGB uint8 (H, W, 3), both label maps integer (H, W) with 0 as background. The class
    arrays, uint8, have a number of `agreement.CLASSES` per label, at the label's own place, as
    `agreement.errors` gives them. Of the reference, what is not matched is drawn, below the
    prediction. An outline is two pixels wide where something is wrong, but one where the prediction
    shows the same fault. Returns RGB uint8 (H, W, 3).
    """
    drawn = image.copy()
    colours = {"background": (0, 0, 0)} | ERROR_COLOURS
    palette = np.array([colours[name] for name in agreement.CLASSES], np.uint8)
    matched, missed = agreement.MATCHED, agreement.MISSED
    classes = reference_class[reference_labels]
    edge = _edges(reference_labels) & (classes != matched)
    edge |= _second_edges(reference_labels) & (classes == missed)
    drawn[edge] = palette[classes[edge]]
    classes = prediction_class[labels]
    edge = _edges(labels) | _second_edges(labels) & (classes != matched)
    drawn[edge] = palette[classes[edge]]
    return drawn


def _edges(labels):
    """Pixels of objects, bool (H, W), with a side on another object, background or the outside."""
    padded = np.pad(labels, 1)
    edge = np.zeros(labels.shape, bool)
    for neighbour in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        edge |= neighbour != labels
    return edge & (labels != 0)


def _second_edges(labels):
    """Pixels within objects that lie at `_edges`."""
    return _edges(np.where(_edges(labels), 0, labels))


def contact_sheet(tiles: Sequence[np.ndarray], columns: int, gap: int = 4) -> np.ndarray:
    """Tiles of one size, RGB uint8 (h, w, 3), side by side on white, `gap` pixels apart."""
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    sheet = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8
    )
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        y, x = gap + row * (height + gap), gap + column * (width + gap)
        sheet[y : y + height, x : x + width] = tile
    return sheet


def write_image(path: Path | str, image: np.ndarray) -> None:
    """Write RGB uint8 (H, W, 3), or bool or uint8 (H, W), bool as 0 / 255; the ending says how."""
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    with replacing(path) as beside:  # not imwrite, which does not always notice a full disk
        beside.write_bytes(cv2.imencode(beside.suffix, image)[1])


class Embedded(NamedTuple):
    """A picture for a page, or, without a `source`, what is said in its place."""

    source: str  # a data URL of a JPEG
    width: int  # pixels
    height: int
    said: str
    linked: bool  # whether its file shows much more


UNREADABLE = Embedded("", 0, 0, "unreadable", linked=False)


def embedded(path: Path, side: int) -> Embedded:
    """A PNG made small, at most `side` pixels a side; one that is damaged is said to be."""
    encoded = _bytes_of(path)
    if len(encoded) < 24:
        return UNREADABLE
    width, height = encoded[16:24].view(">u4").tolist()  # of the header; PNG 1.2, section 4.1.1
    if height * width > LARGEST_PICTURE:
        return Embedded("", width, height, f"{height} x {width} pixels", linked=True)
    pixels = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)  # a mask stays grey, which is smaller
    if pixels is None or pixels.shape[:2] != (height, width):
        return UNREADABLE
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    linked = scale < 1 and side < ENLARGED_SIDE
    return Embedded(_jpeg(pixels), *size, "", linked)


def embedded_squares(path: Path, side: int, places: Sequence[int]) -> list[Embedded]:
    """Squares of `side` pixels that lie one below the other in a picture, by their places there."""
    encoded = _bytes_of(path)
    pixels = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if len(encoded) else None
    if pixels is None or pixels.shape[1] != side or len(pixels) < side * (max(places) + 1):
        return [UNREADABLE] * len(places)
    squares = (pixels[side * place : side * (place + 1)] for place in places)
    return [Embedded(_jpeg(square), side, side, "", linked=False) for square in squares]


def _bytes_of(path):
    """A file's bytes, uint8 (n,); none while a call that works beside this one makes it anew."""
    try:
        return np.fromfile(path, np.uint8)
    except FileNotFoundError:
        return np.zeros(0, np.uint8)


def _jpeg(pixels):
    """A data URL of BGR or grey pixels."""
    jpeg = base64.b64encode(cv2.imencode(".jpg", pixels, JPEG)[1]).decode()
    return f"data:image/jpeg;base64,{jpeg}"
