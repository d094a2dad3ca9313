"""The patch set on disk: cut images into it, its manifest, and how training reads it.

A set lies below one root folder. `patches.json` is written last and is what makes it complete.
"""

import hashlib
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from tissue import edited
from tissue.depth import DEEPEST, NOT_ANNOTATED, UNKNOWN
from tissue.files import InputError, file_hash, some
from tissue.manifest import (
    MANIFEST,
    SPLITS,
    TABLE,
    TABLE_COLUMNS,
    folder,
    is_patch,
    read_manifest,
    read_table,
)
from tissue.stain import Stain, for_network
from tissue.windows import Scaled, from_array

try:
    from patchify import patchify
except ImportError:  # there is none for numpy 2, and so none for Python 3.13
    patchify = None

# Tissue has no repetitions worth looking for: 15 % faster, and no larger. Masks have.
PNG_OF_TISSUE = (cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY)
COLOUR_TYPE, GREY_AND_ALPHA = 25, 4  # byte of a PNG and its value (PNG 1.2, section 4.1.1)
NO_MASK = np.int16(NOT_ANNOTATED * DEEPEST)  # in a mask of a patch: nobody has annotated this
PREVIEW, ANNOTATIONS = "patches_preview.png", "annotations_preview.png"
NEW, OLD = ".patches_new", ".patches_old"  # where a set is made, and where the one before it waits
BLOCK = 2048  # pixels; OpenCV's remap takes no side of 32,768


class Grid(NamedTuple):
    """Where the patches of an image lie: that of row r and column c begins at (r, c) * stride."""

    dim: int  # pixels a side of a patch
    stride: int  # pixels from one to the next


def cut(image: np.ndarray, grid: Grid) -> np.ndarray:
    """Patches of an image as a view: (H, W) -> (rows, cols, dim, dim), (H, W, 3) likewise + 3."""
    dim, stride = grid
    if patchify is None:
        views = sliding_window_view(image, (dim, dim), axis=(0, 1))[::stride, ::stride]
        return views if image.ndim == 2 else np.moveaxis(views, 2, -1)
    if image.ndim == 2:
        return patchify(image, (dim, dim), step=stride)
    # patchify also steps over the channels: one step, which is dropped here.
    return patchify(image, (dim, dim, image.shape[2]), step=stride)[:, :, 0]


def write_patches(
    root: Path | str,
    split: str,
    name: str,
    image: np.ndarray,
    mask: np.ndarray,
    grid: Grid,
) -> list[dict]:
    """Write an image's patches and its mask's as PNG; the rows of `patches.csv` that tell of them.

    `image` is RGB uint8 (H, W, 3), `mask` bool (H, W) or, where a label map tells nuclei apart,
    `depth.depth_of` them; a mask's file has 0 and 255, or that depth. Files lie in `folder(root,
    kind, split)`, which exists, and are called `<name>_patch_<row>_<col>.png`. `y` and `x` are
    pixels of this image: of one that was resampled, not of its file. Raises OSError where a file
    cannot be written.
    """
    tissue = cut(image, grid)
    nuclei = cut(mask * np.uint8(255) if mask.dtype == bool else mask, grid)
    rows, cols = tissue.shape[:2]
    digits = max(2, len(str(max(rows, cols) - 1)))
    table = []
    for row in range(rows):
        for col in range(cols):
            file = f"{name}_patch_{row:0{digits}}_{col:0{digits}}.png"
            foreground = write_patch(root, split, file, tissue[row, col], nuclei[row, col])
            position = (row, col, row * grid.stride, col * grid.stride)
            values = (split, name, file, *position, f"{foreground:.4f}")
            table.append(dict(zip(TABLE_COLUMNS, values, strict=True)))
    return table


def write_patch(
    root: Path | str, split: str, file: str, image: np.ndarray, mask: np.ndarray
) -> float:
    """Write a patch, RGB uint8 (dim, dim, 3), and its mask (dim, dim); what of it is foreground.

    `mask` is uint8 or, where not all of it is annotated, int16 with NO_MASK there; the share, 0 to
    1, is of the annotated pixels. In the file those that are not have an alpha of 0. Raises OSError
    where a file cannot be written.
    """
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)  # the order that OpenCV writes from
    if mask.dtype == np.uint8:
        known, png = mask.size, cv2.imencode(".png", mask)[1]
    else:
        alpha = mask != NO_MASK
        known, mask = np.count_nonzero(alpha), np.where(alpha, mask, 0).astype(np.uint8)
        png = io.BytesIO()  # OpenCV writes no grey with alpha
        Image.fromarray(np.dstack([mask, alpha * np.uint8(255)]), "LA").save(png, "PNG")
        png = png.getbuffer()
    # Not imwrite, which does not always notice a full disk.
    with open(f"{folder(root, 'rgb', split)}/{file}", "wb") as to:
        to.write(cv2.imencode(".png", bgr, PNG_OF_TISSUE)[1])
    with open(f"{folder(root, 'mask', split)}/{file}", "wb") as to:
        to.write(png)
    return cv2.countNonZero(mask) / known


def resample(image: np.ndarray, mask: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """An image, RGB uint8 (H, W, 3), and its mask, bool (H, W), with pixels `scale` times as large.

    A pixel of the mask is foreground if more than half of its area is.
    """
    if scale == 1:
        return image, mask
    scaled = Scaled(from_array(image), scale)
    height, width = scaled.height, scaled.width
    pixels = np.empty((height, width, 3), np.uint8)
    for y in range(0, height, BLOCK):
        for x in range(0, width, BLOCK):
            rows, columns = min(BLOCK, height - y), min(BLOCK, width - x)
            pixels[y : y + rows, x : x + columns] = scaled.read(y, x, rows, columns)
    # Enlarged, OpenCV's area would be the nearest pixel, in steps; between pixels lies the outline.
    how = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
    return pixels, cv2.resize(mask.astype(np.float32), (width, height), interpolation=how) > 0.5


# --- a set takes the place of another -----------------------------------------------------------


def check_places(root: Path | str) -> None:
    """Raise InputError where the files and folders of a patch set cannot be put below `root`, or
    would take the place of files and patches that are not of one: there is no manifest, none that
    a killed run has left (`new_set`), and no table of ours that lists them.
    """
    root = Path(root)
    folders = [folder(root, kind, split) for split in SPLITS for kind in ("rgb", "mask")]
    files = [root / file for file in (TABLE, PREVIEW, ANNOTATIONS)]
    if not any(map(os.path.lexists, (root / MANIFEST, root / NEW, root / OLD))):
        others = [] if edited.has_table(root) else [path for path in files if path.is_file()]
        if others := others + edited.of_no_set(root):
            them = "them" if len(others) > 1 else "it"
            raise InputError(
                f"{some(map(str, others))}: found {them} without a patch set, expected nothing "
                f"where preprocess.py writes files of such names; move {them} away or rename {them}"
            )
    for place in (*folders, *files, root / MANIFEST):
        kind = "folder" if place in folders else "file"
        fits = place.is_dir() if place in folders else place.is_file()
        if os.path.lexists(place) and (place.is_symlink() or not fits):
            raise InputError(
                f"{place}: found a link or another kind of file, expected a {kind} or nothing, "
                f"move it away"
            )


@contextmanager
def new_set(root: Path | str) -> Iterator[Path]:
    """Give a folder to make a patch set in, and put the set below `root` when the block ends well.

    Until then, and if it ends badly, the old set stays. A set without its manifest is unfinished:
    that of the old one goes first and that of the new one comes last. What is not of a set in the
    old folders stays there. As long as a killed run has left patches without a manifest, one of the
    hidden folders says so (`check_places`). One writer at a time (`files.locked`).
    """
    root = Path(root)
    new, old = root / NEW, root / OLD
    was_killed = new.exists() or old.exists()
    if new.is_symlink() or not new.is_dir():
        _remove(new)
    new.mkdir(parents=True, exist_ok=True)
    _remove_old(root)  # what a killed run has left
    _empty(new)
    try:
        for split in SPLITS:
            for kind in ("rgb", "mask"):
                folder(new, kind, split).mkdir()
        yield new
        old.mkdir()
        paths = sorted(new.iterdir(), key=lambda path: (path.name == MANIFEST, path.is_file()))
        names = [path.name for path in paths]
        gone = dict.fromkeys([MANIFEST, ANNOTATIONS, *reversed(names)])
        away = [(root / name, old / name) for name in gone]
        _move([move for move in away if move[0].exists()] + [(new / n, root / n) for n in names])
        _remove_old(root)
    finally:
        _empty(new)
        if not was_killed or (root / MANIFEST).exists():
            _remove(new)


def _move(moves):
    """Rename each (source, target) in turn, or none of them."""
    done = []
    try:
        for source, target in moves:
            os.rename(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.rename(target, source)
        raise


def _remove_old(root):
    """Remove the set that waits; what is the user's own in its folders goes back to its place."""
    for place in (root / OLD).glob("patches_*_*"):
        for path in place.iterdir():
            target = root / place.name / path.name
            if not is_patch(path.name) and not target.exists():
                target.parent.mkdir(exist_ok=True)
                os.rename(path, target)
    _remove(root / OLD)


def _empty(place):
    for path in place.iterdir():
        _remove(path)


def _remove(place):
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


# --- read ---------------------------------------------------------------------------------------


def read_manifests(roots: Sequence[Path | str]) -> list[dict]:
    """The manifests of sets that are learned from together.

    Raises InputError unless all patches have one side, one pixel size (sets of unknown size go with
    any), and 16-bit images one number of bits.
    """
    manifests = [read_manifest(root) for root in roots]
    for key, what, unit in (
        ("patch_dim", "patches", "pixels a side"),
        ("pixel_size_um", "patches", "um a pixel"),
        ("bits", "16-bit images", "bits"),
    ):
        known = {root: m[key] for root, m in zip(roots, manifests, strict=True) if m[key]}
        (first, value), *others = list(known.items()) or [(None, None)]
        for root, other in others:
            if other != value:
                raise InputError(
                    f"{root}: found {what} of {other:g} {unit}, expected {value:g} as in {first}; "
                    f"cut both in one call: preprocess.py --root {first} {root}"
                )
    return manifests


def set_hash(*roots: Path | str) -> str:
    """SHA-256 of a complete set's manifest, which tells sets of other images or settings apart; of
    several sets that of all their hashes, in order.
    """
    hashes = [file_hash(Path(root) / MANIFEST) for root in roots]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_patch(root: Path | str, split: str, file: str) -> tuple[np.ndarray, np.ndarray]:
    """A patch, RGB uint8 (dim, dim, 3), and its mask (dim, dim), uint8 or int16, as `write_patches`
    has it.

    Raises InputError if it is gone, damaged, or no square.
    """
    pixels = []
    for kind, mode in (("rgb", cv2.IMREAD_COLOR_RGB), ("mask", cv2.IMREAD_GRAYSCALE)):
        path = folder(root, kind, split) / file
        try:  # not imread, which on Windows takes no path beyond ASCII
            content = np.frombuffer(path.read_bytes(), np.uint8)
            has_alpha = kind == "mask" and content[COLOUR_TYPE:][:1].tolist() == [GREY_AND_ALPHA]
            decoded = cv2.imdecode(content, cv2.IMREAD_UNCHANGED if has_alpha else mode)
            if has_alpha and decoded is not None:
                decoded = np.where(decoded[..., 3] > 0, decoded[..., 0], NO_MASK)
        except (FileNotFoundError, cv2.error):  # OpenCV raises it for an empty file
            decoded = None
        if decoded is None:
            raise _bad_patch(path, "missing or damaged")
        pixels.append(decoded)
    image, mask = pixels
    if mask.shape != image.shape[:2] or mask.shape[0] != mask.shape[1]:
        raise _bad_patch(path, f"found sides of {mask.shape} and {image.shape[:2]} pixels")
    return image, mask


def _bad_patch(path, found):
    return InputError(
        f"{path}: {found}, expected a patch; remove {MANIFEST} and run preprocess.py again"
    )


class PatchDataset:
    """The patches of one split, in the order of the manifest, as torch's DataLoader takes them.

    An item is an image as `transform` returns it, its mask float32 (1, dim, dim), and the patch's
    index. The mask is 0 in the background; in a nucleus it is the depth, above 0 and up to 1, or -1
    where no label map tells nuclei apart; and NOT_ANNOTATED, -2, where nobody has said what there
    is. `transform` is called with `image` RGB uint8 (dim, dim, 3) and `mask` float32 (dim, dim),
    above 0 in nuclei and below where it is not annotated, and returns a dict of tensors (an
    albumentations.Compose). Given a `stain`, it gets the patch as it is when the whole image is
    brought to that stain.

    A key is an index, or the pair (index, seed) that PatchSampler gives: the augmentation then
    depends on that seed alone and not on which process happens to do the work.
    """

    def __init__(
        self,
        roots: Path | str | Sequence[Path | str],
        split: str,
        transform: Callable,
        stain: Stain | None = None,
    ):
        roots = [roots] if isinstance(roots, Path | str) else roots
        self.stain = stain
        self.split = split
        self.transform = transform
        self.files, self.roots, self.sources, self.foreground = [], [], [], []
        for root in roots:
            manifest = read_manifest(root)
            images = {image["name"]: image for image in manifest["images"]}
            table = read_table(root, split)
            self.dim = manifest["patch_dim"]
            self.files += [row["file"] for row in table]
            self.roots += [root] * len(table)
            self.sources += [images[row["name"]] for row in table]
            self.foreground += [row["foreground"] for row in table]  # fraction, 0 to 1

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple:
        index, seed = key if isinstance(key, tuple) else (key, None)
        root, source = self.roots[index], self.sources[index]
        image, mask = read_patch(root, self.split, self.files[index])
        if len(mask) != self.dim:
            path = folder(root, "rgb", self.split) / self.files[index]
            raise _bad_patch(path, f"found a side of {len(mask)} pixels, not {self.dim},")
        own = Stain(**source["stain"]) if source["stain"] else None
        image, _ = for_network(image, own, self.stain)
        if seed is not None:
            # One generator for all steps: albumentations' own set_random_seed gives each step the
            # same numbers, so that the horizontal flip comes with the vertical one or not at all.
            self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        patch = self.transform(image=image, mask=mask.astype(np.float32))
        mask = patch["mask"][None]
        unknown = mask == UNKNOWN if source["labels"] else mask > 0
        return patch["image"], (mask / DEEPEST).masked_fill(unknown, -1), index
