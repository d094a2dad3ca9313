"""How densely nuclei lie in an image: a map of nuclei per square millimetre.

Nuclei are counted by their centroids in square cells, and smoothed with a Gaussian whose standard
deviation is a quarter of KERNEL_UM: it spreads a nucleus as far, and averages over as large an area
(4 pi sigma^2, the inverse of the integral of its square), as a disc of KERNEL_UM across does. What
of the kernel lies beyond the image's edge is not counted, so even tissue is even up to there.
"""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import tifffile
from scipy.ndimage import gaussian_filter

from tissue.files import replacing

KERNEL_UM = 100.0
CELL_UM = 20.0  # about: a whole number of cells covers the image
SIDE_UM = 500.0  # images of this much and more both ways have a map in any case
PICTURE = 640  # pixels; the longer side of the picture
STRIP = 64  # pixels; height of the scale below it


class Density(NamedTuple):
    """A map of an image."""

    per_mm2: np.ndarray  # float32 (h, w), nuclei per square millimetre
    cell_um: tuple[float, float]  # height and width of a pixel of it, micrometres

    def write(self, path: Path) -> None:
        """Write the map as a float32 TIFF that says its pixel size."""
        down, across = (1e4 / side for side in self.cell_um)
        with replacing(path) as beside:
            tifffile.imwrite(
                beside, self.per_mm2, photometric="minisblack", compression="adobe_deflate",
                resolution=(across, down), resolutionunit="CENTIMETER", metadata=None,
                software=False,
            )  # fmt: skip

    def picture(self) -> np.ndarray:
        """The map in colours over a scale from 0 to a round number, RGB uint8 (H, W, 3)."""
        height, width = (
            count * side for count, side in zip(self.per_mm2.shape, self.cell_um, strict=True)
        )
        factor = PICTURE / max(height, width)
        size = max(1, round(width * factor)), max(1, round(height * factor))
        full = round_up(float(self.per_mm2.max(initial=0)))
        grey = cv2.resize(self.per_mm2 / full, size, interpolation=cv2.INTER_LINEAR)
        sheet = np.full((size[1] + STRIP, max(size[0], 4 * STRIP), 3), 255, np.uint8)
        sheet[: size[1], : size[0]] = _coloured(grey)
        bar = np.linspace(0, 1, sheet.shape[1] // 2)[None].repeat(STRIP // 4, axis=0)
        top = size[1] + STRIP // 8
        sheet[top : top + len(bar), : bar.shape[1]] = _coloured(bar)
        for x, text in ((0, "0"), (bar.shape[1], f"{full:,.0f} nuclei per mm2")):
            (wide, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 1)
            place = max(0, min(x - wide // 2, sheet.shape[1] - wide)), sheet.shape[0] - STRIP // 4
            cv2.putText(
                sheet, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, (26, 26, 26), 1, cv2.LINE_AA
            )
        return sheet


def density_of(
    y: np.ndarray, x: np.ndarray, shape: tuple[int, int], pixel_size_um: float
) -> Density:
    """The density of nuclei by their centroids (n,), whole numbers at pixel centres, in an image of
    (height, width) pixels.
    """
    counts = [max(1, round(side * pixel_size_um / CELL_UM)) for side in shape]
    cell_um = tuple(side * pixel_size_um / n for side, n in zip(shape, counts, strict=True))
    row, column = (
        np.floor((values + 0.5) * n / side).astype(int)
        for values, n, side in zip((y, x), counts, shape, strict=True)
    )
    cells = np.bincount(row * counts[1] + column, minlength=counts[0] * counts[1])
    sigma = [KERNEL_UM / 4 / side for side in cell_um]
    found, covered = (
        gaussian_filter(values, sigma, mode="constant")
        for values in (cells.reshape(counts).astype(float), np.ones(counts))
    )
    area_mm2 = cell_um[0] * cell_um[1] / 1e6
    return Density((found / covered / area_mm2).astype(np.float32), cell_um)


def round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, ... that is as large."""
    power = 10 ** np.floor(np.log10(max(value, 1)))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= value))


def _coloured(shares):
    """Shares from 0 to 1 in the colours of viridis, RGB uint8 (h, w, 3)."""
    grey = np.clip(np.rint(shares * 255), 0, 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
