"""Draw H&E-stained tissue together with its exact truth: the built-in data of this project.

    python3 -m tissue.synthetic --root data/demo --images 27 --size 512 --seed 0

Whatever is drawn at a place follows from the seed, the name of a noise field and the place alone
(`Canvas.hash`), never from what was drawn before, so that windows of one large image would agree.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import cv2
import numpy as np
import tifffile
from scipy.ndimage import find_objects
from scipy.spatial import cKDTree

from tissue.files import InputError, Parser, check_positive, replacing, run_script

PIXEL_SIZE = 0.25  # micrometres
MICRON = 1 / PIXEL_SIZE  # pixels
# Optical density of the stains per unit of concentration in R, G, B. The first pair is Ruifrok &
# Johnston 2001 (Anal Quant Cytol Histol 23:291), the second the reference of Macenko et al. 2009
# (ISBI, 1107), to which scanned slides come closer; an image's own stains lie along the way.
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29]), np.array([0.5626, 0.7201, 0.4062])
EOSIN = np.array([0.07, 0.99, 0.11]), np.array([0.2159, 0.8012, 0.5581])

MARGIN = 20.0  # micrometres around the image in which nuclei are placed too
CELL_REACH = 4.0  # micrometres from a nucleus to where its cell ends at the latest
CLOSEST = 0.72  # two centres are no closer than this x the sum of their radii
SMALLEST = 2.0  # square micrometres; what is left of a nucleus below this is not drawn


class Organ(NamedTuple):
    """What makes the images of one organ alike; fractions are of the image's area."""

    nests: float  # fraction of epithelium; the rest is stroma
    lumens: float  # fraction of white inside the epithelium
    clefts: float  # fraction of white anywhere: vessels, tears, fat
    infiltrate: float  # fraction of stroma that is crowded with lymphocytes
    radius: float  # micrometres, of an epithelial nucleus
    spacing: float  # micrometres between epithelial nuclei
    length: float  # long axis / short axis of an epithelial nucleus
    fibres: float  # strength of collagen, 0 to 1
    vesicular: float  # 0: dense dark nuclei, 1: pale ones with a dark rim and nucleoli
    shrunken: float  # share of the room between cells that is white, 0 to 1


ORGANS = {
    #                nests lumen cleft infil radius spacing length fibre vesic shrunk
    "Liver": Organ(0.88, 0.00, 0.08, 0.15, 3.3, 11.0, 1.10, 0.2, 0.6, 0.2),
    "Kidney": Organ(0.70, 0.10, 0.05, 0.20, 2.9, 8.0, 1.15, 0.3, 0.3, 0.2),
    "Lung": Organ(0.35, 0.05, 0.30, 0.35, 3.0, 8.5, 1.30, 0.5, 0.4, 0.5),
    "Breast": Organ(0.40, 0.03, 0.05, 0.15, 3.3, 7.5, 1.25, 1.0, 0.6, 0.2),
    "Colon": Organ(0.60, 0.09, 0.04, 0.40, 2.9, 6.2, 1.70, 0.4, 0.3, 0.2),
    "Prostate": Organ(0.50, 0.10, 0.04, 0.10, 3.0, 7.0, 1.20, 0.9, 0.5, 0.2),
    "Skin": Organ(0.65, 0.00, 0.12, 0.25, 3.4, 8.8, 1.30, 0.8, 0.1, 0.7),
    "Spleen": Organ(0.10, 0.00, 0.06, 0.95, 3.4, 7.5, 1.10, 0.3, 0.2, 0.6),
    "Thyroid": Organ(0.60, 0.22, 0.08, 0.15, 2.8, 7.5, 1.15, 0.4, 0.2, 0.4),
}


class Tissue(NamedTuple):
    """A drawn image and its truth."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    labels: np.ndarray  # (H, W) int32: 0 background, 1 to count one number per nucleus
    count: int  # nuclei


class Canvas(NamedTuple):
    """The window to draw, and where all that is random comes from."""

    seed: int
    height: int  # pixels
    width: int

    def hash(self, name, rows, cols):
        """Return uniform numbers in [0, 1), (len(rows), len(cols)) float32, one per grid cell.

        Each depends on seed, name, row and column alone (the mixer of SplitMix64, Steele et al.
        2014, OOPSLA, 453), so it is the same in every window, on every machine.
        """
        key = np.random.SeedSequence([self.seed, zlib.crc32(name.encode())])
        first, second, third = key.generate_state(3, np.uint64) | np.uint64(1)
        mixed = (rows.astype(np.uint64) * first)[:, None] + (cols.astype(np.uint64) * second)
        mixed += third
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed ^= mixed >> np.uint64(shift)
            mixed *= np.uint64(factor)
        return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / 2**24

    def noise(self, name, period, octaves=1):
        """Return smooth noise, (H, W) float32, mean 0 and deviation about 1.

        Random values on a grid of `period` micrometres, interpolated; each further octave halves
        period and amplitude.
        """
        total = np.zeros((self.height, self.width), np.float32)
        for octave in range(octaves):
            pixels = max(1, round(period * MICRON / 2**octave))
            total += self._one_octave(f"{name} {octave}", pixels) / 2**octave
        return total * np.float32(4.0 / sum(4.0**-o for o in range(octaves)) ** 0.5)

    def _one_octave(self, name, pixels):
        if pixels > 32:  # coarse first, to keep the border that is cut off below small
            grid = Canvas(self.seed, self.height // 8 + 6, self.width // 8 + 6)
            grid, scale = grid._one_octave(name, round(pixels / 8)), 8
        else:
            rows = np.arange(-2, -(-self.height // pixels) + 2)
            cols = np.arange(-2, -(-self.width // pixels) + 2)
            grid, scale = self.hash(name, rows, cols) - np.float32(0.5), pixels
        if scale > 1:
            grid = cv2.resize(grid, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        return grid[2 * scale :, 2 * scale :][: self.height, : self.width]

    def stretched(self, name, v, u):
        """Return noise as above where v and u, (H, W) float32, give the place in grid cells."""
        top, left = int(np.floor(v.min())) - 1, int(np.floor(u.min())) - 1
        rows, cols = np.arange(top, int(v.max()) + 3), np.arange(left, int(u.max()) + 3)
        grid = self.hash(name, rows, cols) - np.float32(0.5)
        return 4 * cv2.remap(grid, u - left, v - top, cv2.INTER_CUBIC, None, cv2.BORDER_REPLICATE)

    def scatter(self, name, spacing):
        """Return one jittered point per cell of a grid, and its own random numbers.

        (N, 2) float64 y and x in pixels, and (10, N) float32 uniform in [0, 1). The grid covers
        MARGIN around the canvas, for nuclei that reach into it.
        """
        step, border = spacing * MICRON, int(np.ceil(MARGIN / spacing))
        rows = np.arange(-border, int(self.height / step) + border + 1)
        cols = np.arange(-border, int(self.width / step) + border + 1)
        draws = [self.hash(f"{name} {k}", rows, cols).ravel() for k in range(12)]
        y, x = (axis.ravel() for axis in np.meshgrid(rows, cols, indexing="ij"))
        x = x + 0.5 * (y % 2)  # odd rows by half a step: six neighbours, not four
        return np.stack([y + 0.9 * draws[0], x + 0.9 * draws[1]], axis=1) * step, np.stack(
            draws[2:]
        )

    def at(self, field, centres):
        """Return the field's values at (N, 2) centres, those outside at the nearest border."""
        y, x = np.floor(centres).astype(int).T
        return field[y.clip(0, self.height - 1), x.clip(0, self.width - 1)]


class Ground(NamedTuple):
    """The tissue before nuclei are put in; every field is (H, W) float32."""

    gland: np.ndarray  # rises from stroma (below 0) into the epithelium (above 0)
    nest: np.ndarray  # 0 stroma, 1 epithelium
    solid: np.ndarray  # 0 white, 1 tissue
    across: np.ndarray  # coordinate across the fibres, in micrometres
    fibre: np.ndarray  # 0 to 1, strands of collagen
    infiltrate: np.ndarray  # above 0 where lymphocytes crowd


class Nuclei(NamedTuple):
    """Nuclei that may be drawn, one entry of each array per nucleus."""

    centres: np.ndarray  # (N, 2) float64, y and x in pixels
    axes: np.ndarray  # (N, 2) half axes in micrometres, the long one first
    angles: np.ndarray  # (N,) of the long axis, radians from the x axis towards y
    stain: np.ndarray  # (N,) haematoxylin relative to the image's nuclei
    vesicular: np.ndarray  # (N,) 0 dense, 1 pale with a dark rim and nucleoli
    blur: np.ndarray  # (N,) micrometres over which the border fades inwards
    slit: np.ndarray  # (N,) micrometres left free where it meets another nucleus
    halo: np.ndarray  # (N,) bool, torn off its cytoplasm


class Outlines(NamedTuple):
    """Where each pixel lies to the outlines of N nuclei; each (H, W)."""

    distance: np.ndarray  # float32 micrometres to the nearest outline, below 0 inside
    gap: np.ndarray  # float32, how much further the second nearest is
    owner: np.ndarray  # int32, whose outline the nearest is, -1 at the limit


def beer_lambert(
    white: np.ndarray, stains: np.ndarray, concentrations: Sequence[np.ndarray]
) -> np.ndarray:
    """Return the light that stained tissue lets through: I = I0 exp(-sum_k c_k v_k), base e.

    white: (3,) I0; stains: (K, 3) optical density v per unit of concentration; concentrations:
    K arrays c, (H, W). (H, W, 3) float32. Ruifrok & Johnston 2001, Anal Quant Cytol Histol
    23:291, equation 1.
    """
    density = np.stack(concentrations, axis=-1).astype(np.float32) @ np.float32(stains)
    return np.float32(white) * np.exp(-density)


def draw_tissue(height: int, width: int, seed: int, organ: str | None = None) -> Tissue:
    """Return Tissue: an RGB image of H&E tissue at 0.25 micrometres a pixel and its label map.

    height, width: pixels, 16 or more; seed: an integer from 0; organ: a key of ORGANS, chosen by
    the seed if not given. The same arguments give the same bytes. Raises InputError for a smaller
    image or an unknown organ.
    """
    if min(height, width) < 16:
        raise InputError(f"found {height} x {width} pixels to draw, expected at least 16 x 16")
    if organ not in (None, *ORGANS):
        raise InputError(f"found organ {organ!r}, expected one of {', '.join(ORGANS)}")
    rng = np.random.default_rng([seed, 0])  # for what is the same all over the image
    organ = ORGANS[organ or list(ORGANS)[rng.integers(len(ORGANS))]]
    canvas = Canvas(seed, height, width)
    ground = draw_ground(canvas, organ, rng)
    nuclei = place_nuclei(canvas, organ, ground)
    outlines = nearest(canvas, nuclei.centres, nuclei.axes, nuclei.angles, CELL_REACH)
    index, numbers = label_nuclei(nuclei, outlines)
    haematoxylin, eosin = draw_cells(canvas, organ, ground, nuclei, index, outlines)
    image = photograph(canvas, haematoxylin, eosin, rng)
    return Tissue(image, numbers[index], int(numbers.max()))


def level(fraction: float) -> float:
    """Return what a standard normal variable exceeds with this probability."""
    return NormalDist().inv_cdf(1 - min(max(fraction, 1e-6), 1 - 1e-6))


def ramp(field: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return 0 where field <= low, 1 where field >= high, linear between."""
    return np.clip((field - np.float32(low)) / np.float32(high - low), 0, 1)


def draw_ground(canvas: Canvas, organ: Organ, rng: np.random.Generator) -> Ground:
    """Return Ground: where epithelium, stroma, lumens, clefts and collagen are."""
    rough = canvas.noise("edges", 3.0, octaves=4)
    gland = canvas.noise("gland", 45.0, octaves=2) + 0.05 * rough
    cleft = canvas.noise("cleft", 28.0, octaves=3) + 0.06 * rough
    crack = np.abs(canvas.noise("crack", 16.0, octaves=3) + 0.04 * rough)
    torn = ramp(canvas.noise("torn", 40.0), 2.0 - 2 * organ.shrunken, 3.0 - 2 * organ.shrunken)
    white = np.maximum.reduce(
        [
            ramp(gland, level(organ.lumens), level(organ.lumens) + 0.12),
            ramp(cleft, level(organ.clefts), level(organ.clefts) + 0.12),
            ramp(0.4 * torn - crack, 0.0, 0.1),
        ]
    )
    debris = 0.5 * ramp(canvas.noise("debris", 8.0, octaves=4), 1.5, 2.5)
    # Collagen: noise stretched along one direction, which two scales of waves bend.
    angle = rng.uniform(0, np.pi)
    cos, sin = np.float32(np.cos(angle) * PIXEL_SIZE), np.float32(np.sin(angle) * PIXEL_SIZE)
    y = np.arange(canvas.height, dtype=np.float32)[:, None]
    x = np.arange(canvas.width, dtype=np.float32)
    across = y * cos - x * sin + 10 * canvas.noise("bend", 60.0) + canvas.noise("wave", 12.0)
    along = y * sin + x * cos
    strands = [
        canvas.stretched(f"strand {wide}", across / np.float32(wide), along / np.float32(20))
        for wide in (1.4, 3.0, 6.0)
    ]
    fibre = ramp(sum(strands), -2.2, 2.6)
    gland -= np.float32(level(organ.nests))
    infiltrate = canvas.noise("infiltrate", 40.0, octaves=2) - np.float32(level(organ.infiltrate))
    nest, solid = ramp(gland, -0.05, 0.05), np.maximum(1 - white, debris)
    return Ground(gland, nest, solid, across, fibre, infiltrate)


def place_nuclei(canvas: Canvas, organ: Organ, ground: Ground) -> Nuclei:
    """Return Nuclei: epithelial ones, lymphocytes and fibroblasts, no two too close."""
    points, numbers = zip(
        canvas.scatter("epithelium", organ.spacing), canvas.scatter("stroma", 5.2), strict=True
    )
    centres = np.concatenate(points)
    keep, rank, *sizes, longer, turn, pale, dark, slit, halo = np.concatenate(numbers, axis=1)
    nest = np.arange(len(centres)) < len(points[0])
    gland, crowded = canvas.at(ground.gland, centres), canvas.at(ground.infiltrate, centres) > 0
    fibroblast = ~nest & ~crowded & (rank > 0.25)
    round_cell = ~nest & ~fibroblast
    kept = np.where(nest, gland > 0, gland < 0)
    kept &= keep < np.where(nest, 0.93, np.where(crowded, 0.9, 0.08))
    kept &= (canvas.at(ground.solid, centres) > 0.5) | (keep < 0.02)

    # Sizes spread like a logarithmic normal distribution: the sum of two draws is nearly normal.
    spread = (sum(sizes) - 1) * 6**0.5
    radius = np.where(nest, organ.radius * np.exp(0.22 * spread), 2.5 * np.exp(0.14 * spread))
    radius = np.where(fibroblast, 2.0 * np.exp(0.2 * spread), radius)
    length = np.where(nest, organ.length, 1.1) * (1 + 0.35 * longer)
    length = np.where(fibroblast, 2.2 + 3.0 * longer, length)
    axes = radius[:, None] * np.stack([length**0.5, length**-0.5], axis=1)

    # Fibroblasts lie along the fibres, epithelium stands across the border of its nest.
    along_fibres = _slope(canvas, ground.across, centres) + np.pi / 2 + 0.5 * (turn - 0.5)
    across_border = _slope(canvas, ground.gland, centres) + 1.2 * (turn - 0.5)
    angles = np.where(fibroblast, along_fibres, across_border)
    angles = np.where(round_cell, 2 * np.pi * turn, angles)
    vesicular = np.where(nest, organ.vesicular + 0.8 * (pale - 0.5), 0.5 * pale).clip(0, 1)
    stain = 1.0 - 0.35 * vesicular + np.where(nest, 0.35, 0.25) * (dark - 0.6)
    blur = 0.2 + 1.2 * longer**4

    # Of two that are too close the one of lower rank goes, whether or not the other stays: a rule
    # that looks no further than the neighbours (Matern's second process, 1960).
    chosen = np.flatnonzero(kept)
    pairs = cKDTree(centres[chosen]).query_pairs(10 * MICRON, output_type="ndarray")
    one, two = chosen[pairs].T
    apart = np.hypot(*(centres[one] - centres[two]).T) * PIXEL_SIZE
    close = apart < CLOSEST * (radius[one] + radius[two])
    kept[np.where(rank[one] < rank[two], one, two)[close]] = False
    slit, halo = np.where(slit < 0.5, 0, 0.3), halo < 0.25
    fields = centres, axes, angles, stain, vesicular, blur, slit, halo
    return Nuclei(*(field[kept] for field in fields))


def _slope(canvas, field, centres):
    """Return the direction in which the field rises at the centres, radians from x towards y."""
    dy, dx = (
        canvas.at(field, centres + step) - canvas.at(field, centres - step)
        for step in 2 * MICRON * np.eye(2)
    )
    return np.arctan2(dy, dx)


def nearest(canvas, centres, axes, angles, limit) -> Outlines:
    """Return the Outlines of N nuclei, no distance above the limit, micrometres.

    centres, axes, angles: as in Nuclei. Outlines are ellipses seen through a smooth warp, so that
    none is a perfect ellipse.
    """
    shape = canvas.height, canvas.width
    distance, second = np.full((2, *shape), limit, np.float32)
    owner = np.full(shape, -1, np.int32)
    y = np.arange(canvas.height, dtype=np.float32)[:, None]
    x = np.arange(canvas.width, dtype=np.float32)
    y, x = (
        axis + MICRON * (0.35 * canvas.noise(f"warp {name}", 3.5) + 0.06 * canvas.noise(name, 1.0))
        for axis, name in ((y, "y"), (x, "x"))
    )
    for i, ((cy, cx), (long, short), angle) in enumerate(zip(centres, axes, angles, strict=True)):
        reach = (max(long, short) * (1 + limit / np.sqrt(long * short)) + 1) * MICRON
        window = (
            slice(max(0, int(cy - reach)), max(0, int(cy + reach) + 2)),
            slice(max(0, int(cx - reach)), max(0, int(cx + reach) + 2)),
        )
        dy, dx = y[window] - np.float32(cy), x[window] - np.float32(cx)
        cos, sin = np.cos(angle) * PIXEL_SIZE, np.sin(angle) * PIXEL_SIZE
        u = dx * np.float32(cos / long) + dy * np.float32(sin / long)
        v = dy * np.float32(cos / short) - dx * np.float32(sin / short)
        away = (np.sqrt(u * u + v * v) - 1) * np.float32(np.sqrt(long * short))
        best = distance[window]
        second[window] = np.minimum(second[window], np.maximum(best, away))
        owner[window][away < best] = i
        distance[window] = np.minimum(best, away)
    return Outlines(distance, second - distance, owner)


def label_nuclei(nuclei, outlines):
    """Return which nucleus is drawn at each pixel, and the numbers that the drawn ones get.

    index: (H, W) int32, position in nuclei + 1 or 0; numbers: (N + 1,) int32, 1, 2, ... for nuclei
    of which a piece of SMALLEST is in sight, else 0: numbers[index] is the label map. Of a nucleus
    that a neighbour cuts in two the larger piece stays.
    """
    distance, gap, owner = outlines
    slit = np.append(nuclei.slit, 0)[owner]
    index = np.where((distance < 0) & (gap > slit), owner + 1, 0).astype(np.int32)
    numbers = np.zeros(len(nuclei.centres) + 1, np.int32)
    count = 0
    for i, window in enumerate(find_objects(index), start=1):
        if window is None:
            continue
        mine = (index[window] == i).astype(np.uint8)
        _, pieces, stats, _ = cv2.connectedComponentsWithStats(mine, connectivity=4)
        largest = 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
        index[window][(mine == 1) & (pieces != largest)] = 0
        if stats[largest, cv2.CC_STAT_AREA] * PIXEL_SIZE**2 >= SMALLEST:
            numbers[i] = count = count + 1
    index[numbers[index] == 0] = 0
    return index, numbers


def draw_cells(canvas, organ, ground, nuclei, index, outlines):
    """Return the concentrations of haematoxylin and eosin, each (H, W) float32.

    Haematoxylin 1 is a dense nucleus, eosin 1 is dense collagen.
    """
    distance, gap, owner = outlines
    grain = canvas.noise("grain", 1.0, octaves=2)
    patchy = canvas.noise("patchy", 6.0, octaves=3)
    nest, fibre = ground.nest, ground.fibre * np.float32(organ.fibres)

    # Between the nuclei: cytoplasm in the nests, collagen and ground substance in the stroma.
    haematoxylin = 0.17 + 0.15 * nest + 0.05 * fibre
    eosin = 0.30 * nest + (1 - nest) * (0.28 + 0.75 * fibre)
    haematoxylin += nest * (0.10 * ramp(-distance, -2.5, 0) + 0.12 * ramp(patchy, 0.3, 2.0))
    texture = np.maximum(1 + 0.15 * grain + 0.2 * patchy + 0.10 * canvas.noise("fine", 0.5), 0.1)
    haematoxylin, eosin = haematoxylin * texture, eosin * texture

    # White: lumens and clefts, seams between cells that shrank, halos round some nuclei.
    outside = distance > 0
    seam = ramp(distance + 0.5 * patchy, 2.2, 3.4)
    seam += ramp(0.9 - gap + 0.3 * grain, 0, 0.6) * outside
    shrunken = organ.shrunken * ramp(canvas.noise("shrunken", 20.0), -1.2, 1.0)
    halo = np.append(nuclei.halo, False)[owner] & outside
    halo = halo * ramp(canvas.noise("halo", 5.0, octaves=2) - distance, 0.0, 0.5)
    solid = ground.solid * (1 - np.minimum(seam * shrunken, 1) * (1 - 0.6 * fibre))
    solid = _blur(solid * (1 - 0.8 * halo), 0.2 * MICRON)
    haematoxylin, eosin = haematoxylin * solid, eosin * solid

    # What is stained and is no nucleus: red cells in the white, specks and smudges in the tissue.
    # Spacing, radius and the width of the border are in micrometres; share: of the grid's points.
    bleeding = (ground.solid < 0.1) & (canvas.noise("bleeding", 30.0) > 0.8)
    for name, place, spacing, share, radius, border, blue, red in (
        ("red cells", bleeding, 7.0, 0.2, 2.4, 0.6, 0.05, 1.1),
        ("specks", solid > 0.3, 6.0, 0.1, 0.6, 0.5, 0.6, 0.2),
        ("smudges", solid > 0.3, 14.0, 0.3, 3.2, 2.5, 0.4, 0.1),
    ):
        centres, (keep, long, short, turn, *_) = canvas.scatter(name, spacing)
        kept = canvas.at(place, centres) & (keep < share)
        axes = radius * np.exp(0.6 * np.stack([long, short], axis=1)[kept] - 0.3)
        inside = nearest(canvas, centres[kept], axes, 2 * np.pi * turn[kept], 0.0).distance
        cover = ramp(-inside, 0, border)
        haematoxylin += blue * cover
        eosin += red * cover

    # Nuclei: dense ones are even; vesicular ones pale, with clumps, nucleoli and a dark rim.
    stain, vesicular, blur = (
        np.append(0, values).astype(np.float32)[index]
        for values in (nuclei.stain, nuclei.vesicular, nuclei.blur)
    )
    clumps = canvas.noise("chromatin", 1.2, octaves=2)
    nucleoli = ramp(canvas.noise("nucleoli", 1.8), 1.2, 1.8) * ramp(-distance, 0.7, 1.2)
    pale = 0.45 * ramp(-distance, 0.3, 1.0) - 0.16 * clumps - 0.6 * nucleoli
    body = stain * (1 + 0.10 * clumps + 0.10 * patchy - vesicular * pale)
    cover = (index > 0) * (0.5 + 0.5 * ramp(-distance / np.maximum(blur, 0.1), 0, 1))
    haematoxylin = haematoxylin * (1 - cover) + np.maximum(body, 0.1) * cover
    eosin = eosin * (1 - 0.6 * cover)
    return haematoxylin, eosin


def photograph(canvas, haematoxylin, eosin, rng):
    """Return the RGB image, (H, W, 3) uint8: this image's stains, light, optics and camera."""
    drift = rng.uniform(0.4, 1.2)  # from Ruifrok's stain vectors towards Macenko's
    stains = [pair[0] + drift * (pair[1] - pair[0]) for pair in (HAEMATOXYLIN, EOSIN)]
    stains = np.stack(stains) + rng.normal(0, 0.02, (2, 3))
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    blue, red = rng.uniform((2.2, 0.7), (3.3, 1.8)).tolist()  # optical density at concentration 1
    white = rng.uniform(234, 246) + np.array([1, -2, 3]) + rng.normal(0, 1.5, 3)
    thickness = 1 + 0.12 * canvas.noise("thickness", 50.0)
    light = beer_lambert(white, stains, (haematoxylin * thickness * blue, eosin * thickness * red))
    sharp, soft = rng.uniform((0.17, 0.40), (0.30, 0.65)) * MICRON
    focus = ramp(canvas.noise("focus", 50.0), -0.5, 2.5)[..., None]
    light = (1 - focus) * _blur(light, sharp) + focus * _blur(light, soft)
    light += 0.5 * (light - _blur(light, 0.4 * MICRON))  # scanners sharpen
    grain = np.stack([canvas.noise(f"camera {channel}", PIXEL_SIZE) for channel in "rgb"], axis=-1)
    return np.clip(np.rint(light + grain), 0, 255).astype(np.uint8)


def _blur(image, sigma):
    """Return the image blurred by a Gaussian of sigma pixels."""
    return cv2.GaussianBlur(image, (0, 0), sigma)


def write_demo(root: str | Path, images: int = 27, size: int = 512, seed: int = 0) -> list[str]:
    """Write drawn images, masks and label maps below root; return their names.

    `tissue_images/Demo_<Organ>_<nn>.tif` with its pixel size, `mask binary/<same>.png` (0 / 255)
    and `instance_labels/<same>.png` (uint16), organ by organ, three images of each and then
    further ones of each again. The same arguments write the same bytes.
    """
    folders = [Path(root) / name for name in ("tissue_images", "mask binary", "instance_labels")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    names = []
    for index in range(images):
        group, of_three = divmod(index, 3)
        organ = list(ORGANS)[group % len(ORGANS)]
        number = 3 * (group // len(ORGANS)) + of_three + 1
        names.append(f"Demo_{organ}_{number:02d}")
        tissue = draw_tissue(size, size, seed * 10_000 + index, organ)
        if tissue.count > 65_535:
            raise InputError(
                f"{names[-1]}: found {tissue.count} nuclei, expected at most the 65535 that a "
                f"16-bit label map holds; draw smaller images"
            )
        with replacing(folders[0] / f"{names[-1]}.tif") as path:
            tifffile.imwrite(
                path,
                tissue.image,
                photometric="rgb",
                compression="zlib",
                resolution=(1e4 / PIXEL_SIZE, 1e4 / PIXEL_SIZE),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
        mask = np.where(tissue.labels > 0, 255, 0).astype(np.uint8)
        for folder, array in zip(folders[1:], (mask, tissue.labels.astype(np.uint16)), strict=True):
            with replacing(folder / f"{names[-1]}.png") as path:
                path.write_bytes(cv2.imencode(".png", array)[1])
    return names


def parse_args(argv=None):
    parser = Parser("Draw H&E tissue with its exact truth: images, masks and label maps.")
    parser.add_argument("--root", default="data/demo", help="folder to write to")
    parser.add_argument("--images", type=int, default=27, help="number of images, 3 of each organ")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other images")
    return parser.parse_args(argv)


def main(args):
    check_positive(args, ("images", "size"))
    names = write_demo(args.root, args.images, args.size, args.seed)
    print(f"wrote {len(names)} images of {args.size} x {args.size} pixels to {args.root}")


if __name__ == "__main__":
    run_script(main, parse_args)
