"""Which image goes with which mask: finds files by name, and checks a pair before work starts.

The name of a file is its own without suffix. Names that differ in case, or in how Unicode composes
their letters, are one name: file systems differ in whether they can keep them apart.
"""

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tissue import agreement, masks, scanners
from tissue.files import InputError, some
from tissue.images import read_image
from tissue.masks import ANNOTATION_FOLDER, LABEL_FOLDER
from tissue.pixel_size import pixel_size_um
from tissue.windows import Scaled, Windows, from_array

IMAGE_SUFFIXES = ("tif", "tiff", "png", "jpg", "jpeg", "bmp", "svs", *scanners.SUFFIXES)
IMAGE_FOLDER = "tissue_images"
MASK_FOLDERS = ("mask binary", "mask_binary", "masks")
LEAST_DICE = 0.7  # of a mask and its label map, which are of one annotation
LEAST_DARKER = 0.5  # `how_much_darker`: right masks of 675 images of five sets have 0.89 or more
LONGEST = 230  # bytes of a name, so that patches and results, which add to it, stay within 255


class Pair(NamedTuple):
    """A tissue image and its mask or annotation; `name` is the image's, as `name_of` has it."""

    name: str
    image: Path
    mask: Path

    @property
    def is_annotated(self) -> bool:
        """Whether an annotation stands for the mask (tissue.annotations)."""
        return self.mask.parent.name == ANNOTATION_FOLDER


@dataclass(frozen=True)
class PairFacts:
    """What `check_pair`, or `annotated.check`, learned about a pair that is fit for use."""

    height: int  # pixels
    width: int  # pixels
    pixel_size_um: float | None
    foreground: float  # fraction of the mask, or of what is annotated, 0 to 1
    pixels_sha256: str  # of shape and RGB pixels: equal for one picture in two formats
    notes: tuple[str, ...]  # what was assumed of the mask, or looks odd
    classes: dict[str, int] = field(default_factory=dict)  # annotated nuclei by class
    regions: int | None = None  # in which the annotation is complete; None: everywhere
    darker: float | None = None  # see `how_much_darker`; None where that was not looked at


class Files(Mapping[str, Path]):
    """{name: path} sorted by name, in which any form of a name finds it (see `same_name`)."""

    def __init__(self, files: Mapping[str, Path]):
        self._files = dict(sorted(files.items()))
        self._names = {same_name(name): name for name in files}

    def __getitem__(self, name: str) -> Path:
        return self._files[self._names[same_name(name)]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"Files({self._files})"


def name_of(path: Path) -> str:
    """A file's name without suffix (`x.ome.tif` has `x`), its letters composed (NFC)."""
    return unicodedata.normalize("NFC", re.sub(r"\.ome$", "", path.stem, flags=re.IGNORECASE))


def same_name(name: str) -> str:
    """What all forms of a name have in common: without case, letters composed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def matches(path: Path, pattern: str) -> bool:
    """Whether an image's name fits a pattern of * and ?, the suffix of an image left out of both.

    `*03.tif` fits x_03.png and X_03.TIF. A pattern that has nothing else, as `*.png`, tells by it.
    """
    name, wanted = same_name(path.name), same_name(pattern)
    stem = re.sub(rf"(\.ome)?\.({'|'.join(IMAGE_SUFFIXES)})$", "", wanted)
    if stem.strip("*?"):
        name, wanted = same_name(name_of(path)), stem
    return fnmatchcase(name, wanted)


def name_fault(name: str) -> str | None:
    """Why a name cannot be that of a file wherever it is taken, in a few words; None if it can."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "a name that is no UTF-8"
    if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in name):
        return "control characters in a name"
    if name in ("", ".", "..") or "/" in name or "\\" in name or re.match("[A-Za-z]:", name):
        return "a path in place of a name"
    if (length := len(name.encode("utf-8"))) > LONGEST:
        return f"a name of {length} bytes, {LONGEST} at most"
    return None


def find_images(*places: str | Path) -> Files:
    """Return {name: path} of the image files given and of those in the folders given, by name.

    In a folder, hidden files, folders and other suffixes are passed over, which
    `unused.passed_over` tells. Raises FileNotFoundError for a place that is not there, InputError
    if files share a name, a link leads nowhere, or a folder has no image.
    """
    paths, faults = [], []
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"{shown(place)}: no such file or folder, expected images")
        found = image_files(place) if place.is_dir() else [place]
        if not found:
            faults.append(_no_image(place))
        paths += found
    paths = list(
        {(path.name, os.path.realpath(path)): path for path in paths}.values()
    )  # given twice
    images, shared = _by_name(paths)
    if faults + shared:
        raise InputError("; ".join(faults + shared))
    return images


def set_folders(places: Iterable[str], holds: str) -> list[str]:
    """The folders, of those given, that hold a file or folder of that name, each once; one that
    does not stands for those within it that do, if there are any.
    """
    found = []
    for place in places:
        inner = sorted(Path(place).glob(f"*/{holds}")) if not (Path(place) / holds).exists() else ()
        found += [str(path.parent) for path in inner] or [place]
    first = {}
    for place in found:
        first.setdefault(os.path.realpath(place), place)
    return list(first.values())


def label_folder(root: str | Path) -> Files:
    """Return {name: path} of the label maps in `root`'s folder for them; empty without any."""
    folder = Path(root) / LABEL_FOLDER
    return find_images(folder) if folder.is_dir() and image_files(folder) else Files({})


def numbered(pair: Pair) -> Path | None:
    """The mask of a pair where its values are nuclei, by the rule of `masks.read`; else None, also
    where it cannot be read.
    """
    if pair.is_annotated:
        return None
    try:
        return None if masks.read_label_map(pair.mask) is None else pair.mask
    except (InputError, OSError):
        return None  # `check_pair` says why


def mask_folder(root: str | Path) -> Path | None:
    """The folder that the masks of `root` are taken from, if there is one."""
    candidates = [Path(root) / name for name in (*MASK_FOLDERS, LABEL_FOLDER)]
    return next((folder for folder in candidates if folder.is_dir()), None)


def find_pairs(root: str | Path, annotated: Files | None = None) -> list[Pair]:
    """Return the Pairs of `root`, sorted by name: images and masks of one name, any formats.

    Images lie in `tissue_images`, masks in the first there is of `mask binary`, `mask_binary`,
    `masks` and `instance_labels`. Where there is a folder of annotations, which has those
    `annotated`, an annotation stands for the mask, and images that have neither are left out.
    Raises one InputError with all faults of the folders, separated by "; "; one of them is a name
    that a patch set cannot have (`name_fault`).
    """
    root = Path(root)
    image_folder, annotation_folder = root / IMAGE_FOLDER, root / ANNOTATION_FOLDER
    folder = mask_folder(root)
    faults = []
    images, masks_of = Files({}), Files({})
    if image_folder.is_dir():
        images, faults = _by_name(image_files(image_folder))
        if not images:
            faults.append(_no_image(image_folder))
    else:
        faults.append(
            f"{image_folder}: no such folder, expected the tissue images there, see README, or "
            f"draw some: python3 -m tissue.synthetic --root data/demo"
        )
    if folder:
        masks_of, mask_faults = _by_name(image_files(folder))
        faults += mask_faults
    elif annotated is None:
        faults.append(
            f"{root / MASK_FOLDERS[0]}: no such folder, expected the masks there, label maps in "
            f"{root / LABEL_FOLDER}, or annotations in {annotation_folder}"
        )
    if image_folder.is_dir():
        if folder and annotated is None:
            faults += _lonely(images, masks_of, folder)
        faults += _lonely(masks_of, images, image_folder)
        faults += _lonely(annotated or {}, images, image_folder)
    for path in (*images.values(), *masks_of.values()):
        if fault := name_fault(path.name):
            faults.append(f"{shown(path)}: found {fault}, expected a plain one, rename the file")
    masks_of = Files({**masks_of, **(annotated or {})})
    found = [Pair(name, path, masks_of[name]) for name, path in images.items() if name in masks_of]
    if len(found) < 2 and annotated is not None and not faults:
        faults.append(
            f"{annotation_folder}: found annotations or masks of {len(found)} images, expected two "
            f"at least, one to train on and one to validate, annotate another"
        )
    if faults:
        raise InputError("; ".join(faults))
    return found


def _lonely(files, others, folder):
    """A list of the fault that some `files` have none of their name among `others` of a folder."""
    lonely = ", ".join(shown(path) for name, path in files.items() if name not in others)
    return [f"{lonely}: found no file of that name in {folder}, add or remove it"] * bool(lonely)


def size_fault(pair: Pair, image: Windows, scale: float, patch_dim: int) -> str | None:
    """What is wrong with an image that, with pixels `scale` times as large, has no room for a
    patch of `patch_dim` x `patch_dim` pixels; None if it has.
    """
    cut = Scaled(image, scale)
    if min(cut.height, cut.width) >= patch_dim:
        return None
    size = f", {cut.height} x {cut.width} at the pixel size of the set"
    return (
        f"{pair.image}: found {image.height} x {image.width} pixels (height x width)"
        f"{'' if scale == 1 else size}, expected at least {patch_dim} x {patch_dim} (one patch), "
        f"use smaller patches or a larger image"
    )


def picture_hash(shape: tuple[int, int], pixels: np.ndarray) -> str:
    """SHA-256 of an image's (height, width) and its RGB pixels, uint8 (h, w, 3)."""
    digest = hashlib.sha256(repr((*shape, 3)).encode())
    digest.update(pixels)
    return digest.hexdigest()


def check_pair(
    pair: Pair, patch_dim: int, scale: float = 1.0, label_map: Path | None = None
) -> PairFacts:
    """Decode both files of a Pair, and its label map if it has one, and return its PairFacts.

    Raises InputError with all faults, separated by "; ": files that cannot be read, sizes that
    differ, an image that, with pixels `scale` times as large, is smaller than a patch of
    `patch_dim` x `patch_dim` pixels.
    """
    decoded, faults = {}, []
    wanted = {"image": pair.image, "mask": pair.mask}
    if label_map and label_map != pair.mask:
        wanted["label map"] = label_map
    for kind, path in wanted.items():
        try:
            decoded[kind] = (read_image if kind == "image" else masks.read)(path)
        except (InputError, OSError) as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    image, notes = decoded.pop("image"), ()
    height, width = image.shape[:2]
    for kind, (foreground, labels, its_notes) in decoded.items():
        notes += its_notes
        if label_map == wanted[kind] and labels is None:
            faults.append(
                f"{label_map}: found a JPEG, which holds no numbers, expected one number per "
                f"nucleus; save it as PNG, or put it into a folder of masks"
            )
        if foreground.shape != (height, width):
            faults.append(
                f"{wanted[kind]}: found a {kind} of {foreground.shape[0]} x {foreground.shape[1]} "
                f"pixels (height x width), expected {height} x {width} as in {pair.image}, replace "
                f"one of them"
            )
    if fault := size_fault(pair, from_array(image), scale, patch_dim):
        faults.append(fault)
    if faults:
        raise InputError("; ".join(faults))
    if "label map" in decoded:
        notes += _fit(pair.mask, label_map, *(its.foreground for its in decoded.values()))
    size, foreground = pixel_size_um(pair.image), float(decoded["mask"].foreground.mean())
    digest = picture_hash((height, width), image)
    darker = how_much_darker(image, decoded["mask"].foreground)
    return PairFacts(height, width, size, foreground, digest, notes, darker=darker)


def _fit(mask, label_map, one, other):
    """A note where the foregrounds of a mask and of its label map hardly meet."""
    dice = agreement.dice(agreement.pixel_counts(one, other)) if other.any() else 1
    if dice >= LEAST_DICE:
        return ()
    return (
        f"{label_map}: found nuclei at other places than {mask} (Dice {dice:.2f}), expected "
        f"{LEAST_DICE} at least; is one of them shifted, turned, or of another image?",
    )


def how_much_darker(
    image: np.ndarray, mask: np.ndarray, known: np.ndarray | None = None
) -> float | None:
    """How much more red light, which haematoxylin absorbs, an image absorbs in its nuclei than
    beside them, in standard deviations of its absorbance.

    `image` is RGB uint8 (H, W, 3), `mask` and what is `known` of it are bool (H, W). About a
    million pixels are looked at. None where nuclei cover less than 1 or more than 80 % of them.
    """
    step = max(1, round((mask.size / 10**6) ** 0.5))
    looked_at = (slice(None, None, step),) * 2
    absorbance, mask = -np.log10((image[looked_at][..., 0] + 1.0) / 256), mask[looked_at]
    if known is not None:
        absorbance, mask = absorbance[known[looked_at]], mask[known[looked_at]]
    spread = absorbance.std() if mask.size else 0
    if not (spread > 1e-6 and 0.01 <= mask.mean() <= 0.8):
        return None
    return float((absorbance[mask].mean() - absorbance[~mask].mean()) / spread)


def said_of_darker(darker: Mapping[str, float | None], shown_in: str | Path) -> list[str]:
    """A line that names the images whose nuclei, by `how_much_darker` of each, are no darker than
    what is beside them, and a picture to look at.
    """
    names = [n for n, found in darker.items() if found is not None and found < LEAST_DARKER]
    if not names:
        return []
    return [
        f"{some(names)}: the nuclei of the mask are no darker than the rest of the image; is it "
        f"shifted, turned, inverted, of another scale or image? Look at {shown_in}"
    ]


def image_files(folder: Path) -> list[Path]:
    """Return the paths of the image files in a folder, sorted, and of links that lead nowhere."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and (path.is_file() or not path.exists())
    ]


def _no_image(folder):
    return f"{shown(folder)}: found no image, expected files of type {', '.join(IMAGE_SUFFIXES)}"


def _by_name(paths):
    """Return (Files, faults): a fault for each link to nowhere, and each name of several files.

    A slide of several files is the one that stands for it (`scanners.heads`).
    """
    named, faults = {}, []
    for path in scanners.heads(paths):
        if not path.exists():
            faults.append(
                f"{shown(path)}: found a link to a file that is not there, expected an image, "
                f"bring the file back or remove the link"
            )
        else:
            named.setdefault(same_name(name_of(path)), []).append(path)
    for _, several in sorted(named.items()):
        if len(several) > 1:
            faults.append(
                f"{' and '.join(map(shown, several))}: found several files named "
                f"{name_of(several[0])} (case does not count), expected one, remove or rename the "
                f"others"
            )
    return Files({name_of(several[0]): several[0] for several in named.values()}), faults


def shown(path: str | Path) -> str:
    """A path as text in one line that any stream can take."""
    kept = (
        letter if letter.isprintable() or letter == " " else ascii(letter)[1:-1]
        for letter in str(path)
    )
    return "".join(kept)
