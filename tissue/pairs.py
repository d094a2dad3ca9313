"""Which image goes with which mask: finds files by name, and checks a pair before work starts."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tissue import masks
from tissue.files import InputError
from tissue.images import read_image
from tissue.masks import LABEL_FOLDER
from tissue.pixel_size import pixel_size_um

IMAGE_SUFFIXES = ("tif", "tiff", "png", "jpg", "jpeg", "bmp", "svs")
IMAGE_FOLDER = "tissue_images"
MASK_FOLDERS = ("mask binary", "mask_binary", "masks")


class Pair(NamedTuple):
    """A tissue image and its mask; `name` is the stem that both share."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class PairFacts:
    """What `check_pair` learned about a pair that is fit for use."""

    height: int  # pixels
    width: int  # pixels
    pixel_size_um: float | None
    foreground: float  # fraction of the mask, 0 to 1
    pixels_sha256: str  # of shape and RGB pixels: equal for one picture in two formats
    notes: tuple[str, ...]  # what was assumed of the mask, or looks odd


def find_images(*places: str | Path) -> dict[str, Path]:
    """Return {stem: path} of the image files given and of those in the folders given, by stem.

    `x.ome.tif` has the stem `x`. In a folder, hidden files, folders and other suffixes are passed
    over. Raises FileNotFoundError for a place that is not there, InputError if files share a stem
    or a folder has no image.
    """
    paths, faults = [], []
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"{place}: no such file or folder, expected images there")
        found = _image_files(place) if place.is_dir() else [place]
        if not found:
            faults.append(_no_image(place))
        paths += found
    images, shared = _by_stem(paths)
    if faults + shared:
        raise InputError("; ".join(faults + shared))
    return images


def label_folder(root: str | Path) -> dict[str, Path]:
    """Return {stem: path} of the label maps in `root`'s folder for them; empty without any."""
    folder = Path(root) / LABEL_FOLDER
    return find_images(folder) if folder.is_dir() and _image_files(folder) else {}


def find_pairs(root: str | Path) -> list[Pair]:
    """Return the Pairs of `root`, sorted by name: images and masks of one stem, any formats.

    Images lie in `tissue_images`, masks in the first there is of `mask binary`, `mask_binary` and
    `masks`. Raises one InputError with all faults of the folders, separated by "; ".
    """
    root = Path(root)
    image_folder = root / IMAGE_FOLDER
    candidates = [root / name for name in MASK_FOLDERS]
    mask_folder = next((folder for folder in candidates if folder.is_dir()), None)
    faults = []
    images, masks = {}, {}
    if image_folder.is_dir():
        images, faults = _by_stem(_image_files(image_folder))
        if not images:
            faults.append(_no_image(image_folder))
    else:
        faults.append(f"{image_folder}: no such folder, expected the tissue images there")
    if mask_folder:
        masks, mask_faults = _by_stem(_image_files(mask_folder))
        faults += mask_faults
    else:
        faults.append(f"{candidates[0]}: no such folder, expected the masks there")
    if mask_folder and image_folder.is_dir():
        for here, there, other in ((images, masks, mask_folder), (masks, images, image_folder)):
            lonely = ", ".join(str(path) for stem, path in here.items() if stem not in there)
            if lonely:
                faults.append(f"{lonely}: found no file of that name in {other}, add or remove it")
    if faults:
        raise InputError("; ".join(faults))
    return [Pair(name, path, masks[name]) for name, path in images.items()]


def check_pair(pair: Pair, patch_dim: int) -> PairFacts:
    """Decode both files of a Pair and return its PairFacts.

    Raises InputError with all faults, separated by "; ": files that cannot be read, sizes that
    differ, an image smaller than a patch of `patch_dim` x `patch_dim` pixels.
    """
    decoded, faults = [], []
    for read, path in ((read_image, pair.image), (masks.read, pair.mask)):
        try:
            decoded.append(read(path))
        except (InputError, OSError) as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    image, (mask, _, notes) = decoded
    height, width = image.shape[:2]
    if mask.shape != (height, width):
        faults.append(
            f"{pair.mask}: found a mask of {mask.shape[0]} x {mask.shape[1]} pixels (height x "
            f"width), expected {height} x {width} as in {pair.image}, replace one of them"
        )
    if min(height, width) < patch_dim:
        faults.append(
            f"{pair.image}: found {height} x {width} pixels (height x width), expected at least "
            f"{patch_dim} x {patch_dim} (one patch), use smaller patches or a larger image"
        )
    if faults:
        raise InputError("; ".join(faults))
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(image)
    return PairFacts(
        height, width, pixel_size_um(pair.image), float(mask.mean()), digest.hexdigest(), notes
    )


def _image_files(folder):
    """Return the paths of the image files in a folder, sorted."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
    ]


def _no_image(folder):
    return f"{folder}: found no image, expected files of type {', '.join(IMAGE_SUFFIXES)}"


def _by_stem(paths):
    """Return ({stem: path} sorted by stem, faults): a fault for each stem of several files."""
    files = {}
    for path in paths:
        stem = re.sub(r"\.ome$", "", path.stem, flags=re.IGNORECASE)
        files.setdefault(stem, []).append(path)
    faults = [
        f"{' and '.join(str(path) for path in paths)}: found several files named {stem}, expected "
        f"one, remove or rename the others"
        for stem, paths in sorted(files.items())
        if len(paths) > 1
    ]
    return {stem: paths[0] for stem, paths in sorted(files.items())}, faults
