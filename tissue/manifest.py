"""What `patches.json` and `patches.csv` say of a patch set, checked where they are read.

Each has one schema. Both end in hashes, so that no damage goes unnoticed; and neither can lead out
of the root folder: names are plain file names, images and masks lie directly in their folders. A
file there, the folder itself or the root may be a link, for the user has put it there.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NotRequired

import pydantic_core
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict  # typing's is not enough for pydantic before Python 3.12

from tissue.files import InputError, check_regular, file_hash, replacing, write_table
from tissue.masks import ANNOTATION_FOLDER, LABEL_FOLDER
from tissue.pairs import IMAGE_FOLDER, MASK_FOLDERS, name_fault, same_name
from tissue.pixel_size import MICROSCOPE_UM
from tissue.schema import CLOSED, check_content, is_newer, seal

FORMAT_VERSION = 4
SPLITS = ("train", "val")
MANIFEST = "patches.json"
TABLE = "patches.csv"
TABLE_COLUMNS = ("split", "name", "file", "row", "col", "y", "x", "foreground")
LEAST_DIM = 32  # pixels; the networks take no smaller patch
SHOWN = 60  # characters of a wrong value that a message repeats
_FILE = re.compile(r"_patch_\d+_\d+\.png")  # what follows the name of the image


def folder(root: Path | str, kind: str, split: str) -> Path:
    """The folder of one kind ("rgb" or "mask") and one split ("train" or "val") of patches."""
    return Path(root) / f"patches_{kind}_{split}"


# --- schemas ------------------------------------------------------------------------------------


def _plain_name(name):
    if fault := name_fault(name):
        raise ValueError(f"the name of a file, not {fault}")
    return name


def _directly_in(*folders):
    def check(path):
        place, _, name = path.partition("/")
        if place not in folders or name_fault(name):
            raise ValueError(f"a file directly in {' or '.join(folders)}")
        return path

    return AfterValidator(check)


Split = Literal["train", "val"]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Side = Annotated[int, Field(ge=1, le=10**7)]  # pixels
Fraction = Annotated[float, Field(ge=0, le=1)]
Micrometres = Annotated[float, Field(ge=MICROSCOPE_UM[0], le=MICROSCOPE_UM[1])]
Three = Field(min_length=3, max_length=3)
Mean = Annotated[list[Annotated[float, Field(ge=-200, le=200)]], Three]  # of CIELAB's channels
Spread = Annotated[list[Annotated[float, Field(ge=0, le=200)]], Three]
Count = Annotated[int, Field(ge=1, le=10**12)]


class _Stain(TypedDict):
    __pydantic_config__ = CLOSED
    mean: Mean
    spread: Spread


class _Source(TypedDict):
    """An image, its mask, and its label map if it has one; an annotation is both, and a mask may
    be."""

    __pydantic_config__ = CLOSED
    name: Annotated[str, AfterValidator(_plain_name)]
    split: Split
    image: Annotated[str, _directly_in(IMAGE_FOLDER)]
    mask: Annotated[str, _directly_in(*MASK_FOLDERS, LABEL_FOLDER, ANNOTATION_FOLDER)]
    labels: Annotated[str, _directly_in(*MASK_FOLDERS, LABEL_FOLDER, ANNOTATION_FOLDER)] | None
    image_sha256: Hash
    mask_sha256: Hash
    labels_sha256: Hash | None
    pixels_sha256: NotRequired[Hash]  # of the image's pixels, in whatever file; 1.0.0 has none
    height: Side  # of the image as it is
    width: Side
    pixel_size_um: Micrometres | None  # of the image as it is
    foreground: Fraction  # of its mask, or of what is annotated
    stain: _Stain | None


class _Counts(TypedDict):
    __pydantic_config__ = CLOSED
    train: Count
    val: Count


class _Manifest(TypedDict):
    __pydantic_config__ = CLOSED
    format_version: Literal[4]
    patch_dim: Annotated[int, Field(ge=LEAST_DIM, le=10**6)]  # pixels
    patch_stride: Side
    val_pattern: str | None  # either this chose the validation images, or the next three
    val_fraction: Annotated[float, Field(gt=0, le=1)] | None
    group_pattern: str | None
    seed: Annotated[int, Field(ge=0, le=2**32)] | None
    pixel_size_given_um: Micrometres | Literal["nuclei"] | None  # --pixel_size
    pixel_size_um: Micrometres | None  # of all patches
    bits: Annotated[int, Field(ge=8, le=16)] | None  # that 16-bit images use; None without any
    patches: _Counts
    bytes: _Counts  # of the patches and their masks on the disk
    images: Annotated[list[_Source], Field(min_length=2)]
    table_sha256: Hash  # of patches.csv
    sha256: Hash  # of all the rest


class Row(TypedDict):
    """A patch: `y` and `x` is its top left pixel in the image as it was cut, that is, brought to
    the pixel size of the set; `foreground` the fraction of it, as annotated, that is nucleus."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    split: Split
    name: str
    file: str
    row: Annotated[int, Field(ge=0, le=10**7)]
    col: Annotated[int, Field(ge=0, le=10**7)]
    y: Annotated[int, Field(ge=0, le=10**7)]
    x: Annotated[int, Field(ge=0, le=10**7)]
    foreground: Fraction


_MANIFEST, _ROWS = TypeAdapter(_Manifest), TypeAdapter(list[Row])


# --- write --------------------------------------------------------------------------------------


def write_manifest(root: Path | str, manifest: dict, table: Sequence[dict]) -> dict:
    """Write `patches.csv` and then `patches.json`, which makes the set complete; the latter's dict.

    `manifest` lacks what is found here: the format's version, counts, bytes and hashes.
    """
    root = Path(root)
    write_table(root / TABLE, TABLE_COLUMNS, table)
    counts = {split: sum(row["split"] == split for row in table) for split in SPLITS}
    manifest = {"format_version": FORMAT_VERSION} | manifest
    manifest |= {"patches": counts, "bytes": size_on_disk(root)[1]}
    manifest["table_sha256"] = file_hash(root / TABLE)
    manifest["sha256"] = seal(manifest)
    with replacing(root / MANIFEST) as path:
        path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    return manifest


def size_on_disk(root: Path | str) -> tuple[dict[str, int], dict[str, int]]:
    """How many patches of each split lie on the disk together with their mask, and their bytes."""
    counts, sizes = {}, {}
    for split in SPLITS:
        rgb, mask = (_sizes(folder(root, kind, split)) for kind in ("rgb", "mask"))
        pairs = rgb.keys() & mask.keys()
        counts[split] = len(pairs)
        sizes[split] = sum(rgb[file] + mask[file] for file in pairs)
    return counts, sizes


def _sizes(place):
    with os.scandir(place) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if is_patch(entry.name)}


def is_patch(file: str) -> bool:
    """Whether a file in one of a set's folders is a patch, by its name, and not the user's own."""
    return re.search(r"_patch_[0-9]+_[0-9]+\.png$", file) is not None


# --- read ---------------------------------------------------------------------------------------


def read_manifest(root: Path | str) -> dict:
    """What `patches.json` says of a complete set: settings, images and patch counts.

    Raises FileNotFoundError where there is no set, InputError where it is unfinished, foreign,
    damaged, or leads out of `root`.
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
        manifest = pydantic_core.from_json(path.read_bytes(), allow_inf_nan=False)
    except ValueError as error:
        raise _refusal(root, MANIFEST, f"no readable manifest ({error})") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if is_newer(version, FORMAT_VERSION):
        raise InputError(
            f"{path}: found format version {_short(version)}, made by a newer version, expected "
            f"{FORMAT_VERSION}; use that version, or {_again(root)} to cut it anew"
        )
    if version != FORMAT_VERSION:
        found = f"format version {_short(version)}, expected {FORMAT_VERSION}"
        raise _refusal(root, MANIFEST, found)
    manifest = check_content(_MANIFEST, manifest, path, _again(root))
    names = {same_name(image["name"]) for image in manifest["images"]}
    if len(names) < len(manifest["images"]):
        raise _refusal(root, MANIFEST, "two images of one name")
    if manifest["sha256"] != seal(manifest):
        raise _refusal(root, MANIFEST, "other content than was written (its hash differs)")
    return manifest


def read_table(root: Path | str, split: str) -> list[Row]:
    """The Rows of `patches.csv` of one split, in the file's order.

    Raises InputError where the file is missing, damaged, not that of the manifest, or leads out of
    `root`, and what `read_manifest` does.
    """
    root = Path(root)
    manifest = read_manifest(root)
    try:
        check_regular(root / TABLE)
        content = (root / TABLE).read_bytes()
        lines = csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
        header, *rows = list(lines) or [[]]
    except FileNotFoundError as error:
        raise _refusal(root, TABLE, "no such file") from error
    except InputError:
        raise
    except (ValueError, csv.Error) as error:
        raise _refusal(root, TABLE, f"no readable table ({error})") from error
    if header != list(TABLE_COLUMNS):
        raise _refusal(root, TABLE, f"the columns {_short(','.join(header))}")
    if any(len(row) != len(TABLE_COLUMNS) for row in rows):
        raise _refusal(root, TABLE, "lines of other lengths than the header's")
    said = [dict(zip(TABLE_COLUMNS, row, strict=True)) for row in rows]
    table = check_content(_ROWS, said, root / TABLE, _again(root))
    splits = {image["name"]: image["split"] for image in manifest["images"]}
    for row in table:
        name, file = row["name"], row["file"]
        if splits.get(name) != row["split"]:
            raise _refusal(root, TABLE, f"{row['split']} patches of {_short(name)}, which has none")
        if not file.startswith(name) or not _FILE.fullmatch(file, len(name)):
            raise _refusal(root, TABLE, f"the file {_short(file)} of {_short(name)}")
    counts = {split: sum(row["split"] == split for row in table) for split in SPLITS}
    if counts != manifest["patches"]:
        found, wanted = (f"{c['train']} + {c['val']}" for c in (counts, manifest["patches"]))
        raise _refusal(root, TABLE, f"{found} patches, {wanted} were written")
    if hashlib.sha256(content).hexdigest() != manifest["table_sha256"]:
        raise _refusal(root, TABLE, "other content than was written (its hash differs)")
    return [row for row in table if row["split"] == split]


def _refusal(root, file, found):
    return InputError(
        f"{root / file}: found {' '.join(found.split())}, expected what preprocess.py has written; "
        f"{_again(root)}"
    )


def _again(root):
    return f"run preprocess.py --root {root} again"


def _short(value):
    """A value as text that fits into a message."""
    shown = value if isinstance(value, str) and value and value.isprintable() else ascii(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
