"""Where the tissue of a slide is: glass, pen marks, folds, blur and black told apart, decided once.

Colours are judged on a thumbnail, sharpness at one micrometre a pixel where there is tissue. Tissue
that is taken for something else costs nuclei, so each threshold is where hardly any tissue of four
data sets is lost, as `python3 -m experiments.artefacts` measures (docs/lab_notes.md).
"""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import shapely
from PIL import Image

from tissue import measures, tiling, windows
from tissue.background import glass_and_black
from tissue.files import InputError, replacing
from tissue.jsons import write_features
from tissue.palettes import MAP_COLOURS
from tissue.regions import open_regions
from tissue.windows import Scaled, Windows

# Pixels of the thumbnail, micrometres, about: one is a nucleus, so that textures are gone and the
# colours of tissue are few; of a fold it has several, of a stroke many.
UM = 8.0
SIDE_UM = 1000.0  # artefacts are looked for in images of this and more both ways
CLASSES = "glass", "tissue", "pen", "fold", "blur", "black"  # by their values in a map
TISSUE, ARTEFACTS = CLASSES.index("tissue"), CLASSES[2:]
LEAST_UM2 = 10_000.0  # smaller artefacts are left, and smaller holes in tissue are tissue
SPECK = 4  # pixels; less than this in glass is dust
RIM = 5  # pixels, twice what tissue and ink reach beyond what is seen of them, and one

# Of the optical density (base 10) of a pixel. In haematoxylin and eosin, however mixed, green light
# is absorbed most, and blue least but for red blood cells (Ruifrok and Johnston 2001).
WHITE = 99  # percentile of a thumbnail's pixels that is bare glass
INK = 0.1  # red light is absorbed by so much more than green by blue, green and violet ink,
RED_INK = 0.35  # and blue by so much more than red by red ink
BLACK_INK, GREY = 0.5, 0.35  # black ink absorbs so much, and its channels differ by this share
BESIDE, TOO_DARK = -0.1, 0.55  # as INK, and of red light, of ink over tissue beside such ink,
SEEN = 0.25  # which is at least this share of both
# A fold has two layers or three. Their density of blue light is beyond what one layer has:
# haematoxylin, of which layers have most different amounts, absorbs little of that.
FOLD, DENSE = 1.3, 90  # times this percentile of the slide's tissue

# Tissue in focus has about as much structure in each octave; blur takes the fine ones away. Bands
# are differences of Gaussians, by their standard deviations in pixels of SHARP_UM.
BANDS, REACH = ((0.7, 1.5), (3.0, 6.0)), 24
SHARP_UM, SQUARE = 1.0, 9  # of the image that is looked at; pixels of the square that decides
BLUR, LEAST_STRUCTURE = 0.085, 0.05  # ratio of variances; grey levels squared in the coarse band
TILE = 128  # pixels of the thumbnail


def are_likely(shape: tuple[int, int], um: float | None) -> bool:
    """Whether artefacts are looked for: in images of SIDE_UM both ways, of known pixel size."""
    return bool(um) and min(shape) * um >= SIDE_UM


def find(image: Windows, um: float) -> np.ndarray:
    """The class of each pixel of a thumbnail, uint8 (h, w) of places in CLASSES.

    A pixel of the image has `um` micrometres. A thumbnail's has about UM; h and w are such that it
    covers the image as `Windows.view` does.
    """
    step = max(1, round(UM / um))
    view = image.view(-(-max(image.height, image.width) // step))
    unit = (um * step) ** 2  # of a pixel, square micrometres
    glass, black = glass_and_black(view, 1)
    white = np.percentile(view[black == 0], WHITE, axis=0) if not black.all() else np.full(3, 255)
    density = np.log10(np.maximum(white, 1) / np.maximum(view, 1)).clip(0).astype(np.float32)
    found = _tissue(1 - (glass | black), unit)
    tissue = found > 0
    near = np.ones((3, 3), np.uint8)  # pixels at the edge of what is black are in part
    black = _parts(cv2.dilate(black, near), LEAST_UM2 / unit) > 0
    ink = _large(_inked(density), unit, RIM)
    plain = tissue & (glass == 0) & ~ink & ~black
    marks = {
        "blur": _large(_blurred(image, um, tissue), unit, SQUARE),
        "fold": _large(_folded(density[..., 2], plain), unit, 1),
        "pen": ink,
        "black": black,
    }
    for kind, mark in marks.items():  # what comes later is surer
        found[mark & (tissue | (kind in ("pen", "black")))] = CLASSES.index(kind)
    return found


def _tissue(coloured, unit):
    """Tissue without dust, with some glass around it and what glass is within, uint8 (h, w)."""
    tissue = cv2.dilate(_parts(coloured, SPECK), np.ones((RIM, RIM), np.uint8))
    return 1 - _parts(1 - tissue, LEAST_UM2 / unit)


def _large(mask, unit, reach):
    """A mask smoothed, without small parts, grown by squares of `reach` pixels, bool (h, w)."""
    mask = _parts(cv2.medianBlur(mask.astype(np.uint8), 3), LEAST_UM2 / unit)
    return cv2.dilate(mask, np.ones((reach, reach), np.uint8)) > 0


def _parts(mask, least):
    """The connected parts of a mask of at least so many pixels, uint8 (h, w) of 0 and 1."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= least
    keep[0] = False
    return keep[labels].astype(np.uint8)


def _inked(density):
    """Where there is ink, uint8 (h, w): its colours, and what is dark beside them."""
    red, green, blue = cv2.split(density)
    low, high = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    is_black = (low > BLACK_INK) & (high - low < GREY * high)
    ink = (red - green > INK) | (blue - red > RED_INK) | is_black
    dark = ink | ((red - green > BESIDE) & (red > TOO_DARK))
    _, labels = cv2.connectedComponents(dark.astype(np.uint8))
    count = labels.max() + 1
    all_of, ink_of = (np.bincount(v.ravel(), minlength=count) for v in (labels, labels[ink]))
    keep = ink_of >= SEEN * all_of
    keep[0] = False
    return keep[labels]


def _folded(blue, tissue):
    """Where tissue is too dense for one layer, bool (h, w), by its density of blue light."""
    if not tissue.any():
        return tissue
    return tissue & (cv2.blur(blue, (3, 3)) > FOLD * np.percentile(blue[tissue], DENSE))


def _blurred(image, um, tissue):
    """Where tissue is out of focus, bool (h, w)."""
    if um > SHARP_UM:
        return np.zeros_like(tissue)
    scaled = Scaled(image, SHARP_UM / um)
    bands = np.zeros((2, *tissue.shape), np.float32)

    def fill(tile):
        place = np.s_[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width]
        if tissue[place].any():
            bands[:, *place] = _variances(scaled, tile, tissue.shape)

    for _ in tiling.ahead(fill, tiling.tiles_of(*tissue.shape, TILE), 4, threads=2):
        pass
    weight = cv2.blur(tissue.astype(np.float32), (SQUARE, SQUARE)) + 1e-6
    fine, coarse = (cv2.blur(band * tissue, (SQUARE, SQUARE)) / weight for band in bands)
    return tissue & (coarse > LEAST_STRUCTURE) & (fine < BLUR * coarse)


def _variances(scaled, tile, shape):
    """The variances of both bands in each pixel of a tile of the thumbnail, float32 (2, h, w)."""
    sides = scaled.height, scaled.width
    first = [at * side // n for at, side, n in zip(tile[:2], sides, shape, strict=True)]
    last = [
        -(-(at + count) * side // n)
        for at, count, side, n in zip(tile[:2], tile[2:], sides, shape, strict=True)
    ]
    begin = [max(0, at - REACH) for at in first]
    end = [min(side, at + REACH) for at, side in zip(last, sides, strict=True)]
    window = scaled.read(*begin, end[0] - begin[0], end[1] - begin[1])
    grey = cv2.cvtColor(window, cv2.COLOR_RGB2GRAY).astype(np.float32)
    inner = tuple(slice(a - c, b - c) for a, b, c in zip(first, last, begin, strict=True))
    found = []
    for narrow, wide in BANDS:
        band = cv2.GaussianBlur(grey, (0, 0), narrow) - cv2.GaussianBlur(grey, (0, 0), wide)
        size = tile.width, tile.height
        found.append(cv2.resize(band[inner] ** 2, size, interpolation=cv2.INTER_AREA))
    return np.stack(found)


# --- maps, found or given


class Map:
    """The tissue of an image of (height, width) pixels by `find`'s classes, uint8 (h, w), enlarged
    by the nearest pixel.
    """

    def __init__(self, classes: np.ndarray, shape: tuple[int, int]):
        self.classes, self.shape = classes, shape

    def meets(self, y: int, x: int, height: int, width: int) -> bool:
        """Whether any pixel of a window is tissue."""
        rows, columns = windows.nearest((y, x, height, width), self.classes.shape, self.shape)
        part = self.classes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return bool((part == TISSUE).any())

    def within(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Whether each pixel of a window is tissue, bool (h, w)."""
        rows, columns = windows.nearest((y, x, height, width), self.classes.shape, self.shape)
        return (self.classes == TISSUE)[np.ix_(rows, columns)]

    def pixels(self) -> dict[str, float]:
        """Of the image, by artefact."""
        count = np.bincount(self.classes.ravel(), minlength=len(CLASSES))
        each = self.shape[0] * self.shape[1] / self.classes.size
        return {kind: float(count[CLASSES.index(kind)] * each) for kind in ARTEFACTS}

    def close(self) -> None:
        pass

    def write(self, picture: Path, outlines: Path) -> None:
        """Write the map as a PNG of indices with colours, and its classes but glass as polygons for
        QuPath, in pixels of the image.
        """
        with replacing(picture) as beside:
            indexed = Image.fromarray(self.classes)
            indexed.putpalette(np.array(MAP_COLOURS, np.uint8).ravel().tolist())
            indexed.save(beside, "PNG")
        label, row, first, last = measures.runs_of(self.classes)
        y, x = (whole / side for whole, side in zip(self.shape, self.classes.shape, strict=True))
        boxes = shapely.box(first * x, row * y, last * x, (row + 1) * y)
        features = [
            _feature(kind, part)
            for kind in CLASSES[1:]
            for part in shapely.get_parts(shapely.union_all(boxes[label == CLASSES.index(kind)]))
        ]
        write_features(outlines, features)


def _feature(kind, polygon):
    """An annotation as QuPath reads it (QuPathTypeAdapters.java)."""
    colour = MAP_COLOURS[CLASSES.index(kind)]
    return {
        "type": "Feature",
        "geometry": json.loads(shapely.to_geojson(polygon)),
        "properties": {
            "objectType": "annotation",
            "classification": {"name": kind.capitalize(), "color": colour},
        },
    }


def open_map(path: Path, shape: tuple[int, int]) -> Map:
    """The map of an image of (height, width) pixels that `Map.write` has written."""
    source = windows.open_depth(path)
    return Map(source.read(0, 0, source.height, source.width), shape)


class Marked:
    """The tissue of an image as a person has marked it, in a file as `open_regions` reads.

    All that is marked is tissue but what has the class of an artefact or is "glass", in letters of
    any case. Of a picture of several numbers these are those of `Map.write`. Raises InputError for
    other numbers, and where no tissue is marked.
    """

    def __init__(self, path: Path, shape: tuple[int, int]):
        self.marked = open_regions(path, shape)
        self.notes = self.marked.notes
        # A ROI of ImageJ has a name and no class; names that several have are numbered.
        labels = [label or re.sub(r" \d+$", "", name) for name, label in self.marked.regions]
        if self.marked.is_painted and len(labels) == 1:
            labels = [CLASSES[TISSUE]]
        elif self.marked.is_painted:
            if int(labels[-1]) >= len(CLASSES):
                self.close()
                known = ", ".join(f"{i} {name}" for i, name in enumerate(CLASSES))
                raise InputError(
                    f"{path}: found the numbers {', '.join(labels)}, expected one for tissue, or "
                    f"those of a map by inference.py ({known}), change them"
                )
            labels = [CLASSES[int(label)] for label in labels]
        self.labels = np.array([label.strip().lower() for label in labels])
        self._is_tissue = ~np.isin(self.labels, [*ARTEFACTS, CLASSES[0]])
        if not self._is_tissue.any():
            self.close()
            raise InputError(
                f"{path}: found {', '.join(sorted(set(self.labels)))} alone, expected tissue that "
                f"is marked, mark it"
            )

    def meets(self, y: int, x: int, height: int, width: int) -> bool:
        """As `Map.meets`; also where an artefact lies over all of the tissue."""
        return self.marked.meets(y, x, height, width, self._is_tissue)

    def within(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        part = y, x, height, width
        return self.marked.within(*part, self._is_tissue) & ~self.marked.within(
            *part, ~self._is_tissue
        )

    def pixels(self) -> dict[str, float]:
        """As `Map.pixels`: what is marked so."""
        count, *_ = self.marked.count(np.empty(0), np.empty(0), np.empty((0, 0)))
        # Of a class of several regions the last is the whole.
        whole = [*{label or at: at for at, (_, label) in enumerate(self.marked.regions)}.values()]
        count, labels = count[whole], self.labels[whole]
        return {kind: float(count[labels == kind].sum()) for kind in ARTEFACTS}

    def close(self) -> None:
        self.marked.close()
