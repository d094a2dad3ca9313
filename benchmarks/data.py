"""The tissue that benchmarks work on: drawn, or copies of the user's own."""

import contextlib
import io
import shutil
from pathlib import Path

import numpy as np
import tifffile

import preprocess
from tissue import pairs
from tissue.synthetic import PIXEL_SIZE, draw_tissue, write_demo


def tissue(folder: Path | str, root: str | None, number: int, size: int = 512) -> Path:
    """`folder`, filled with the images and masks of `root`, or without one with drawn ones.

    Images are copied, because a benchmark writes patches beside them and removes them again.
    """
    folder = Path(folder)
    if root is None:
        write_demo(folder, number, size)
        return folder
    pairs.find_pairs(root)  # or it says what is missing
    for name in (pairs.IMAGE_FOLDER, *pairs.MASK_FOLDERS, pairs.LABEL_FOLDER):
        if (Path(root) / name).is_dir():
            shutil.copytree(Path(root) / name, folder / name)
    return folder


def cut(folder: Path, *more) -> None:
    """Run preprocess.py on a folder within this process, without its closing table."""
    arguments = ["--root", str(folder), *map(str, more)]
    with contextlib.redirect_stdout(io.StringIO()):
        preprocess.main(preprocess.parse_args(arguments))


def source(root: str | None) -> str:
    """What the data was, for the results: no paths, they are nobody's business."""
    return "drawn tissue (tissue.synthetic)" if root is None else "tissue given by --root"


def draw_giant(path: Path, side: int) -> Path:
    """Write side x side pixels of drawn tissue, as JPEG tiles, without holding them.

    Blocks of drawn tissue lie side by side, each one of eight images turned or mirrored, as the
    block's place says.
    """
    block, tile = 1000, 512  # pixels; tiles of the file and blocks do not coincide
    drawn = [draw_tissue(block, block, seed).image for seed in range(8)]

    def block_at(row, column):
        pick = np.random.default_rng([row, column]).integers(0, 8, 2)
        image = np.rot90(drawn[pick[0]], pick[1] % 4)
        return image[:, ::-1] if pick[1] > 3 else image

    def window(y, x):
        out = np.full((tile, tile, 3), 245, np.uint8)
        for row in range(y // block, (min(y + tile, side) - 1) // block + 1):
            for column in range(x // block, (min(x + tile, side) - 1) // block + 1):
                top, left = row * block - y, column * block - x
                inner = block_at(row, column)[
                    max(-top, 0) : tile - top, max(-left, 0) : tile - left
                ]
                at_y, at_x = max(top, 0), max(left, 0)
                out[at_y : at_y + inner.shape[0], at_x : at_x + inner.shape[1]] = inner
        return out

    tiles = (window(y, x) for y in range(0, side, tile) for x in range(0, side, tile))
    tifffile.imwrite(
        path, tiles, shape=(side, side, 3), dtype=np.uint8, tile=(tile, tile), bigtiff=True,
        photometric="rgb", compression="jpeg", metadata=None,
        resolution=(1e4 / PIXEL_SIZE, 1e4 / PIXEL_SIZE), resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path
