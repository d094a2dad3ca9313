"""Which images are segmented, opened and looked at once, so that faults show before any result."""

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tissue import pairs, results, windows
from tissue.annotations import (
    ENDINGS,
    LABEL_SUFFIXES,
    find_annotations,
    image_name,
    open_annotation,
)
from tissue.bits import bit_lines
from tissue.files import InputError, some
from tissue.given_sizes import read_sizes
from tissue.images import bits_of, said_of_turned
from tissue.manifest import MANIFEST, read_manifest
from tissue.masks import ANNOTATION_FOLDER
from tissue.unused import passed_over, uncut

ENDS = 2**16  # bytes


class Task(NamedTuple):
    """One image to segment, and what is known of it."""

    pair: pairs.Pair
    image: windows.Windows
    label_map: Path | None  # one number per nucleus, if there is such a reference
    bits: int | None  # in use, of an image of 16
    results: Path  # the folder
    told_um: float | None = None  # micrometres a pixel by a table, the patch set or the image
    pixel_size_um: float | None = None
    split_at_um: float | None = None  # the same, or where that is not known the network's
    scale: float = 1.0  # pixels of the image that make one of the network's
    formats: tuple[str, ...] = ()  # of exports.FORMATS
    made_with: dict | None = None  # record.MadeWith
    regions: Path | None = None  # the file of its regions
    only_regions: bool = False  # whether nuclei are looked for in them alone
    density: bool = False  # whether its density map is written
    tissue: Path | None = None  # the file that marks its tissue
    finds_tissue: bool = False  # whether artefacts are looked for instead
    row: dict | None = None  # of an earlier run, of which only files of nuclei are missing

    @property
    def shape(self) -> tuple[int, int]:
        return self.image.height, self.image.width

    @property
    def source(self) -> str:
        """The image's path as seen from the results, which stays where a project is moved."""
        try:
            return Path(os.path.relpath(self.pair.image, self.results)).as_posix()
        except ValueError:  # on another drive of Windows
            return str(self.pair.image.absolute())

    @property
    def megapixels(self) -> float:
        return self.image.height * self.image.width / 1e6

    @property
    def is_shared(self) -> bool:
        """Whether all processes of a call predict it together."""
        return self.image.is_big and not self.row

    def file_marks(self) -> list[list[int] | None]:
        """What changes when image, mask or label map does, or what alone is looked at: `file_mark`
        of each file.
        """
        paths = [*self.pair[1:], self.label_map] + [self.regions] * self.only_regions
        if self.tissue:  # one more, which is not taken for regions
            paths[3:] = [self.regions if self.only_regions else None, self.tissue]
        return [path and file_mark(path) for path in paths]

    def file(self, kind: str) -> Path:
        """Where a file of this image lies; `kind` is one of results.ENDINGS. Prediction and
        distance are TIFFs of a big image.
        """
        is_map = kind in ("prediction", "distance")
        kind = f"big_{kind}" if is_map and self.image.is_big else kind
        return results.path_of(self.results, self.pair.name, kind)


def file_mark(path: Path) -> list[int]:
    """Size and time of a file and a checksum of its ends: others where it is not the same.

    Archives and servers give files times alike, and images of one scanner have one size.
    """
    stat = path.stat()
    with path.open("rb") as file:
        first = file.read(ENDS)
        file.seek(max(len(first), stat.st_size - ENDS))
        return [stat.st_size, stat.st_mtime_ns, zlib.crc32(file.read(ENDS), zlib.crc32(first))]


class Found(NamedTuple):
    """What is to be segmented, and what was said on the way."""

    pairs: list[pairs.Pair]  # sorted by name, each with the path of its reference mask or None
    label_maps: dict[str, Path]  # by name
    told_um: dict[str, float | None]  # pixel sizes, by name, of a table or that a patch set took
    notes: list[str]


def find_images(
    images: Sequence[str] | None,
    mask_folder: str | None,
    root: Sequence[str],
    sizes: str | None = None,
) -> Found:
    """The images of --images and --masks, or else the validation images of --root.

    `sizes` is the table of --pixel_sizes, if any.
    """
    found = _find_images(images, mask_folder, root)
    if sizes:
        given, line = read_sizes(sizes, [pair.name for pair in found.pairs])
        found.told_um.update(given)
        found.notes.append(line)
    return found


def _find_images(images, mask_folder, root):
    if not images:
        if mask_folder:
            raise InputError("--masks: found it without --images, expected both; add --images")
        try:
            return _validation_images(root)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}, or name images of your own: --images") from error
    found = pairs.find_images(*images)
    notes = passed_over(*images)
    if not mask_folder:
        return Found([pairs.Pair(name, path, None) for name, path in found.items()], {}, {}, notes)
    folder = Path(mask_folder)
    if not folder.exists():
        raise FileNotFoundError(f"--masks {folder}: no such folder, expected masks or annotations")
    outlined = sorted(filter(is_outlines, folder.iterdir())) if folder.is_dir() else []
    if any(image_name(path, found) in found for path in outlined):
        references = find_annotations(folder, found)
    elif outlined and not pairs.image_files(folder):
        raise InputError(
            f"--masks: found outlines of other names in {folder} ({outlined[0].name}), expected "
            f"files named as the images, such as {next(iter(found))}.geojson; rename them"
        )
    else:
        references = pairs.find_images(folder)
        notes += passed_over(folder)
    lonely = ", ".join(str(path) for name, path in found.items() if name not in references)
    if lonely:
        raise InputError(
            f"{lonely}: found no mask of that name in {mask_folder}, expected one each"
        )
    left = [path for name, path in references.items() if name not in found]
    if left:
        notes.append(f"{some(map(str, left))}: without an image of that name, passed over")
    both = [pairs.Pair(name, path, references[name]) for name, path in found.items()]
    return Found(both, {}, {}, notes)


def _validation_images(root):
    found, label_maps, told, gone = [], {}, {}, []
    for folder in map(Path, pairs.set_folders(root, MANIFEST)):
        images = read_manifest(folder)["images"]
        its = pairs.label_folder(folder)
        for image in images:
            if image["split"] == "val":
                name = image["name"]
                found.append(pairs.Pair(name, folder / image["image"], folder / image["mask"]))
                gone += [path for path in found[-1][1:] if not path.exists()]
                told[name] = image["pixel_size_um"]
                if name in its and not image["mask"].startswith(f"{ANNOTATION_FOLDER}/"):
                    label_maps[name] = its[name]
    if gone:
        raise FileNotFoundError(
            f"{some(map(str, gone))}: not found, expected the validation images and masks "
            f"that were cut; bring them back, run preprocess.py again to cut others"
        )
    return Found(found, label_maps, told, uncut(root))


def is_outlines(path: Path) -> bool:
    """Whether a file, by its name, has outlines of nuclei."""
    name = path.name.lower()
    return name.endswith(ENDINGS) and not name.endswith(LABEL_SUFFIXES)


def open_reference(path: Path, shape: tuple[int, int]) -> windows.MaskWindows:
    """Open the mask, label map or annotation of an image of (height, width) pixels; InputError."""
    return open_annotation(path, shape) if is_outlines(path) else windows.open_mask(path)


def open_tasks(
    found: Found, folder: Path, learned_bits: int | None, is_mine: Callable[[int], bool]
) -> tuple[list[Task], list[str], list[str]]:
    """A Task for each image, the biggest first, what is assumed of the files, and all faults.

    The small images for whose place in the list `is_mine` holds are decoded once, and so are their
    references. Big ones show their faults where they are read. 16-bit images are as bright as they
    are to each other, and to those that the network learned from: all have the most bits that any
    of them uses.
    """
    bits, tasks, notes, faults = {}, [], [], []
    for pair in found.pairs:
        try:
            if used := bits_of(pair.image):
                bits[pair.name] = used
        except (InputError, OSError) as error:
            faults.append(str(error))
    if bits:
        most = max(learned_bits or 0, *(found_bits.used for found_bits in bits.values()))
        notes += bit_lines(bits, most)
        bits = dict.fromkeys(bits, most)
    for pair in found.pairs:
        used, label_map = bits.get(pair.name), found.label_maps.get(pair.name)
        try:
            image = windows.open_image(pair.image, bits=used)
            told = found.told_um.get(pair.name, image.pixel_size_um)
            tasks.append(Task(pair, image, label_map, used, folder, told))
        except (InputError, OSError) as error:
            faults.append(str(error))
    tasks.sort(key=lambda task: (-task.megapixels, task.pair.name))
    darker, mine = {}, [task for index, task in enumerate(tasks) if is_mine(index)]
    for task in mine:
        try:
            more, darker[task.pair.name] = _assumed(task)
            notes += more
        except (InputError, OSError) as error:
            faults.append(str(error))
    notes += said_of_turned(task.pair.image for task in mine)
    shown_in = results.path_of(folder, "<name>", "errors")
    return tasks, notes + pairs.said_of_darker(darker, shown_in), faults


def _assumed(task):
    """What is assumed of an image's reference, and `pairs.how_much_darker` its nuclei are, if that
    was looked at; InputError where they cannot be used together.
    """
    notes, darker, whole = [], None, (0, 0, *task.shape)
    if not task.image.is_big:
        pixels = task.image.read(*whole)
        if is_like_a_mask(pixels):
            notes.append(f"{task.pair.image}: two greys alone, as of a mask; is it an image?")
    task.image.close()
    for kind, path in (("mask", task.pair.mask), ("label map", task.label_map)):
        if not path:
            continue
        reference = open_reference(path, task.shape)
        shape = reference.height, reference.width
        if shape != task.shape:
            raise InputError(
                f"{path}: found a {kind} of {shape[0]} x {shape[1]} pixels (height x width), "
                f"expected {task.image.height} x {task.image.width} as in {task.pair.image}, "
                f"replace one of them"
            )
        notes += reference.notes
        if kind == "mask" and not task.image.is_big:
            mask = reference.read(*whole)
            darker = pairs.how_much_darker(pixels, mask, reference.known(*whole))
        if reference.regions is not None:
            notes.append(f"{path}: scored within its regions alone, and its counts not compared")
        reference.close()
    return notes, darker


def is_like_a_mask(pixels: np.ndarray) -> bool:
    """Whether an image, RGB uint8 (H, W, 3), has two values alone, which are greys."""
    if np.ptp(pixels[::16, ::16], axis=2).any():  # as of all tissue, without looking at all of it
        return False
    first = pixels[0, 0]
    others = pixels[(pixels != first).any(2)]
    return len(others) > 0 and not np.ptp(others[0]) and bool((others == others[0]).all())


def of_shard(tasks: Sequence, shard: str | None) -> Sequence:
    """The tasks of shard "i/n", every n'th from the i'th on, which have about the same sizes."""
    if not shard:
        return tasks
    place, _, shards = shard.partition("/")
    if not (place.isdecimal() and shards.isdecimal() and 1 <= int(place) <= int(shards)):
        raise InputError(f"--shard: found {shard}, expected I/N, such as 1/10 to 10/10")
    return tasks[int(place) - 1 :: int(shards)]


def faults_of_place(folder: Path, found: Found, more: Sequence[Path]) -> list[str]:
    """What keeps the results of these images from lying in a folder, so that no file of the user's
    is overwritten: none of the images and references, and of the files given beside them, `more`.
    """
    names = [pair.name for pair in found.pairs]
    faults = results.check_names(folder, names)
    given = [path for pair in found.pairs for path in pair[1:] if path]
    own = os.path.realpath(folder)  # of a loop of links too
    inside = [str(path) for path in given if os.path.realpath(path.parent) == own]
    if inside:
        faults.append(
            f"--image_folder: found input in {folder} ({inside[0]}), expected another folder: "
            f"results may have the names of images"
        )
    try:
        results.check_folder(folder)
        fault = results.fault_of_files(folder, names, [*given, *found.label_maps.values(), *more])
        faults += [fault] * bool(fault and not inside)
    except (InputError, OSError) as error:
        faults.append(str(error))
    return faults


def faults_of_names(tasks: list[Task]) -> list[str]:
    """A text if results of another image's file lie under the name of one, which would go."""
    other = []
    for task in tasks:
        try:
            record = results.read(task.results, task.pair.name)
        except (InputError, OSError):
            continue  # what it says is not to be trusted
        made_of = record["row"].get("source") if record else None
        if made_of and made_of != task.source and not _is_moved(task, record):
            other.append(f"{task.pair.image}: found results of another image of this name")
            other[-1] += f" ({os.path.normpath(task.results / made_of)}) in {task.results}"
    more = f" (as for {len(other) - 1} more)" * (len(other) > 1)
    return [f"{line}{more}, expected another --image_folder, or --overwrite" for line in other[:1]]


def _is_moved(task, record):
    """Whether the image's file is the one that its results are of, by its mark."""
    marks = record["made_with"].get("files") or [None]
    return marks[0] == task.file_marks()[0]


def at_most(lines: list[str], most: int = 5) -> list[str]:
    """So many lines, and a last one that says how many more there are."""
    return lines[:most] + [f"and {len(lines) - most} more"] * (len(lines) > most)


def how_many(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
