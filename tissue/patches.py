"""The patch set on disk: cut images into it, its manifest, and how training reads it.

A set lies below one root folder. `patches.json` is written last and is what makes it complete.
"""

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from patchify import patchify

from tissue.colour import Colour, for_network
from tissue.files import InputError, file_hash, replacing

FORMAT_VERSION = 2
SPLITS = ("train", "val")
# Tissue has no repetitions worth looking for: 15 % faster, and no larger. Masks have.
PNG_OF_TISSUE = (cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY)
MANIFEST = "patches.json"
TABLE = "patches.csv"
TABLE_COLUMNS = ("split", "name", "file", "row", "col", "y", "x", "foreground")
STRATA = (0.05, 0.1, 0.2, 0.3, 0.4)  # foreground at which a stratum of nuclear density ends
MOST_VIEWS = 4  # a patch comes at most so often in a balanced epoch


def folder(root: Path | str, kind: str, split: str) -> Path:
    """The folder of one kind ("rgb" or "mask") and one split ("train" or "val") of patches."""
    return Path(root) / f"patches_{kind}_{split}"


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
    which exists, and are called `<name>_patch_<row>_<col>.png`; masks are 0 / 255. Raises OSError
    where a file cannot be written.
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


def write_manifest(root: Path | str, manifest: dict, table: Sequence[dict]) -> None:
    """Write `patches.csv` and then `patches.json`, which makes the set complete."""
    with (
        replacing(Path(root) / TABLE) as path,
        path.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, TABLE_COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    with replacing(Path(root) / MANIFEST) as path:
        path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def read_manifest(root: Path | str) -> dict:
    """What `patches.json` says of a complete set: settings, images and patch counts.

    Raises FileNotFoundError where there is no set, InputError where it is unfinished or foreign.
    """
    root = Path(root)
    path = root / MANIFEST
    if not path.is_file():
        if any(folder(root, "rgb", split).is_dir() for split in SPLITS):
            raise InputError(
                f"{root}: found an unfinished patch set (no {MANIFEST}), expected a finished one; "
                f"run preprocess.py --root {root} again"
            )
        raise FileNotFoundError(
            f"{path}: not found, expected a patch set; run preprocess.py --root {root} first"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: found no readable manifest ({error}), expected one by preprocess.py; "
            f"run preprocess.py --root {root} again"
        ) from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: found format version {version}, expected {FORMAT_VERSION}; "
            f"run preprocess.py --root {root} again"
        )
    return manifest


def set_hash(root: Path | str) -> str:
    """SHA-256 of a complete set's manifest, which tells sets of other images or settings apart."""
    return file_hash(Path(root) / MANIFEST)


def remove_set(root: Path | str) -> None:
    """Remove a patch set, its manifest first, and leave its four folders, without patches."""
    (Path(root) / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        for kind in ("rgb", "mask"):
            place = folder(root, kind, split)
            place.mkdir(parents=True, exist_ok=True)
            for path in place.glob("*_patch_*.png"):
                path.unlink()


def count_files(root: Path | str) -> dict[str, int]:
    """How many patches of each split lie on the disk together with their mask."""
    files = {
        (kind, split): {path.name for path in folder(root, kind, split).glob("*_patch_*.png")}
        for kind in ("rgb", "mask")
        for split in SPLITS
    }
    return {split: len(files["rgb", split] & files["mask", split]) for split in SPLITS}


def read_patch(root: Path | str, split: str, file: str) -> tuple[np.ndarray, np.ndarray]:
    """A patch, RGB uint8 (dim, dim, 3), and its mask, bool (dim, dim); InputError if it is gone."""
    pixels = []
    for kind, mode in (("rgb", cv2.IMREAD_COLOR_RGB), ("mask", cv2.IMREAD_GRAYSCALE)):
        path = folder(root, kind, split) / file
        pixels.append(cv2.imread(str(path), mode))
        if pixels[-1] is None:
            raise InputError(
                f"{path}: missing or unreadable, expected a patch; run preprocess.py again"
            )
    return pixels[0], pixels[1] > 0


def read_table(root: Path | str, split: str) -> list[dict]:
    """The rows of `patches.csv` of one split, in the file's order, all values as text."""
    with (Path(root) / TABLE).open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]


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
        own = {
            image["name"]: Colour(**image["colour"]) if image["colour"] else None
            for image in read_manifest(root)["images"]
        }
        self.split = split
        table = read_table(root, split)
        self.files = [row["file"] for row in table]
        self.own_colours = [own[row["name"]] for row in table]
        self.foreground = [float(row["foreground"]) for row in table]  # fraction, 0 to 1
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple:
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, mask = read_patch(self.root, self.split, self.files[index])
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
