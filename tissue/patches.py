"""The patch set on disk: cut images into it, its manifest, and how training reads it.

A set lies below one root folder. `patches.json` is written last and is what makes it complete.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from patchify import patchify

from tissue.colour import Colour, for_network
from tissue.files import InputError, file_hash
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
from tissue.windows import Scaled, from_array

# Tissue has no repetitions worth looking for: 15 % faster, and no larger. Masks have.
PNG_OF_TISSUE = (cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY)
PREVIEW = "patches_preview.png"
NEW, OLD = ".patches_new", ".patches_old"  # where a set is made, and where the one before it waits
BLOCK = 2048  # pixels; OpenCV's remap takes no side of 32,768
STRATA = (0.05, 0.1, 0.2, 0.3, 0.4)  # foreground at which a stratum of nuclear density ends
MOST_VIEWS = 4  # a patch comes at most so often in a balanced epoch


def cut(image: np.ndarray, dim: int, stride: int) -> np.ndarray:
    """Patches of an image as a view: (H, W) -> (rows, cols, dim, dim), (H, W, 3) likewise + 3.

    The patch in row r and column c has its top left pixel at (r * stride, c * stride).
    """
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
    dim: int,
    stride: int,
) -> list[dict]:
    """Write an image's patches and its mask's as PNG; the rows of `patches.csv` that tell of them.

    `image` is RGB uint8 (H, W, 3), `mask` bool (H, W). Files lie in `folder(root, kind, split)`,
    which exists, and are called `<name>_patch_<row>_<col>.png`; masks are 0 / 255. `y` and `x` are
    pixels of this image: of one that was resampled, not of its file. Raises OSError where a file
    cannot be written.
    """
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)  # the order that OpenCV writes from
    tissue = cut(bgr, dim, stride)
    nuclei = cut(mask.astype(np.uint8) * 255, dim, stride)
    rows, cols = tissue.shape[:2]
    digits = max(2, len(str(max(rows, cols) - 1)))
    image_folder, mask_folder = (str(folder(root, kind, split)) for kind in ("rgb", "mask"))
    table = []
    for row in range(rows):
        for col in range(cols):
            file = f"{name}_patch_{row:0{digits}}_{col:0{digits}}.png"
            # Not imwrite, which does not always notice a full disk.
            with open(f"{image_folder}/{file}", "wb") as png:
                png.write(cv2.imencode(".png", tissue[row, col], PNG_OF_TISSUE)[1])
            with open(f"{mask_folder}/{file}", "wb") as png:
                png.write(cv2.imencode(".png", nuclei[row, col])[1])
            foreground = cv2.countNonZero(nuclei[row, col]) / dim**2
            position = (row, col, row * stride, col * stride)
            values = (split, name, file, *position, f"{foreground:.4f}")
            table.append(dict(zip(TABLE_COLUMNS, values, strict=True)))
    return table


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
    """Raise InputError where the files and folders of a patch set cannot be put below `root`."""
    root = Path(root)
    folders = [folder(root, kind, split) for split in SPLITS for kind in ("rgb", "mask")]
    for place in (*folders, *(root / file for file in (TABLE, PREVIEW, MANIFEST))):
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
    old folders stays there. One writer at a time (`files.locked`).
    """
    root = Path(root)
    new, old = root / NEW, root / OLD
    _remove_old(root)  # what a killed run has left
    _remove(new)
    try:
        for split in SPLITS:
            for kind in ("rgb", "mask"):
                folder(new, kind, split).mkdir(parents=True)
        yield new
        old.mkdir()
        names = sorted((path.name for path in new.iterdir()), key=lambda name: name == MANIFEST)
        away = [(root / name, old / name) for name in reversed(names)]
        _move([move for move in away if move[0].exists()] + [(new / n, root / n) for n in names])
        _remove_old(root)
    finally:
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


def _remove(place):
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


# --- read ---------------------------------------------------------------------------------------


def set_hash(root: Path | str) -> str:
    """SHA-256 of a complete set's manifest, which tells sets of other images or settings apart."""
    return file_hash(Path(root) / MANIFEST)


def read_patch(root: Path | str, split: str, file: str) -> tuple[np.ndarray, np.ndarray]:
    """A patch, RGB uint8 (dim, dim, 3), and its mask, bool (dim, dim).

    Raises InputError if it is gone, damaged, or no square.
    """
    pixels = []
    for kind, mode in (("rgb", cv2.IMREAD_COLOR_RGB), ("mask", cv2.IMREAD_GRAYSCALE)):
        path = folder(root, kind, split) / file
        try:  # not imread, which on Windows takes no path beyond ASCII
            decoded = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), mode)
        except (FileNotFoundError, cv2.error):  # OpenCV raises it for an empty file
            decoded = None
        if decoded is None:
            raise _bad_patch(path, "missing or damaged")
        pixels.append(decoded)
    image, mask = pixels
    if mask.shape != image.shape[:2] or mask.shape[0] != mask.shape[1]:
        raise _bad_patch(path, f"found sides of {mask.shape} and {image.shape[:2]} pixels")
    return image, mask > 0


def _bad_patch(path, found):
    return InputError(
        f"{path}: {found}, expected a patch; remove {MANIFEST} and run preprocess.py again"
    )


class PatchDataset:
    """The patches of one split, in the order of the manifest, as torch's DataLoader takes them.

    An item is an image and its mask as `transform` returns them, the mask as float32 (1, dim, dim)
    of 0 and 1, and the patch's index. `transform` is called with `image` RGB uint8 (dim, dim, 3)
    and `mask` float32 (dim, dim) and returns a dict of tensors (an albumentations.Compose). Given
    a `colour`, it gets the patch as it is when the whole image is brought to that colour.

    A key is an index, or the pair (index, seed) that PatchSampler gives: the augmentation then
    depends on that seed alone and not on which process happens to do the work.
    """

    def __init__(
        self, root: Path | str, split: str, transform: Callable, colour: Colour | None = None
    ):
        self.root = root
        self.colour = colour
        manifest = read_manifest(root)
        own = {
            image["name"]: Colour(**image["colour"]) if image["colour"] else None
            for image in manifest["images"]
        }
        self.dim = manifest["patch_dim"]
        self.split = split
        table = read_table(root, split)
        self.files = [row["file"] for row in table]
        self.own_colours = [own[row["name"]] for row in table]
        self.foreground = [row["foreground"] for row in table]  # fraction, 0 to 1
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple:
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, mask = read_patch(self.root, self.split, self.files[index])
        if len(mask) != self.dim:
            path = folder(self.root, "rgb", self.split) / self.files[index]
            raise _bad_patch(path, f"found a side of {len(mask)} pixels, not {self.dim},")
        image, _ = for_network(image, self.own_colours[index], self.colour)
        if seed is not None:
            # One generator for all steps: albumentations' own set_random_seed gives each step the
            # same numbers, so that the horizontal flip comes with the vertical one or not at all.
            self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        patch = self.transform(image=image, mask=mask.astype(np.float32))
        return patch["image"], patch["mask"][None], index


class PatchSampler:
    """Patches of an epoch, in an order and with seeds that follow from (seed, epoch) alone.

    Yields (index, seed of this patch's augmentation) for PatchDataset, whole batches of them. Of
    each batch of `batch_size` patches, process `rank` of `processes` gets its equal share, so that
    the batches are the same however many processes there are. The training loop sets `epoch` before
    each pass, and `start`, the number of batches that an interrupted epoch has behind it.

    Each patch comes once an epoch; given each patch's `foreground`, as often as `balanced_order`
    has it, in an epoch of the same length.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        foreground: Sequence[float] | None = None,
    ):
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.foreground = foreground
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        batches = self.count // self.batch_size - self.start
        return batches * self.batch_size // self.processes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        if self.foreground is None:
            order = generator.permutation(self.count).tolist()
        else:
            order = balanced_order(self.foreground, generator).tolist()
        seeds = generator.integers(2**31, size=self.count).tolist()
        first = self.start * self.batch_size + self.rank
        last = self.count - self.count % self.batch_size
        for place in range(first, last, self.processes):
            yield order[place], seeds[place]


def balanced_order(foreground: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    """Indices of as many patches as there are, int64 (count,), drawn evenly from the STRATA.

    Strata without patches are left out. The others share the epoch alike, except that no patch
    comes more than MOST_VIEWS times; what a small stratum leaves goes to the larger ones. Within a
    stratum each patch comes once before any comes again. Each stratum is spread over the whole
    epoch, so that every batch holds about as many patches of each.
    """
    strata = np.digitize(foreground, STRATA)
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    indices, places = [], []
    for done, stratum in enumerate(sorted(members, key=len)):  # the largest takes what is left
        left = len(strata) - sum(map(len, indices))
        views = min(left // (len(members) - done), MOST_VIEWS * len(stratum))
        passes = [generator.permutation(stratum) for _ in range(-(-views // len(stratum)))]
        indices.append(np.concatenate(passes)[:views])
        places.append((np.arange(views) + generator.random(views)) / views)  # 0 to 1, the epoch
    return np.concatenate(indices)[np.argsort(np.concatenate(places))]
