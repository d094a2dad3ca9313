"""What in the folders of a patch set is not used, in lines that say so."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tissue import scanners
from tissue.annotations import find_annotations
from tissue.files import InputError, some
from tissue.manifest import MANIFEST
from tissue.masks import ANNOTATION_FOLDER, LABEL_FOLDER
from tissue.pairs import (
    IMAGE_FOLDER,
    IMAGE_SUFFIXES,
    MASK_FOLDERS,
    Files,
    Pair,
    find_images,
    image_files,
    label_folder,
    mask_folder,
    name_of,
    same_name,
    shown,
)

NEAR = 0.85  # of the name of a folder to one that is read, by `difflib`: a letter or two


def uncut(places: Iterable[str]) -> list[str]:
    """A line for each of these folders in which some folders are patch sets and others, which have
    images, are not. Raises InputError for one with images of its own, for which the sets within it
    would be taken.
    """
    lines = []
    for place in map(Path, places):
        inner = {path.parent for path in place.glob(f"*/{MANIFEST}")}
        others = sorted({path.parent for path in place.glob(f"*/{IMAGE_FOLDER}")} - inner)
        if not inner or (place / MANIFEST).exists():
            continue
        own = place / IMAGE_FOLDER
        if own.is_dir() and image_files(own):
            raise InputError(
                f"{shown(place)}: found images that are not cut, expected a patch set; run "
                f"preprocess.py --root {shown(place)} first, or give --root "
                f"{' '.join(shown(path) for path in sorted(inner))}"
            )
        if others:
            lines.append(
                f"{some([shown(path) for path in others])}: not cut, passed over; run "
                f"preprocess.py --root {shown(place)}"
            )
    return lines


def said_since_cut(root: str | Path, images: Iterable[Mapping]) -> list[str]:
    """Lines on images that were added to a set, or taken from it, since it was cut; `images` is
    what its manifest says of them.

    None where no image is there, as where patches alone were brought to another machine. An added
    one counts if there is a mask or annotation of its name, so that it would be cut.
    """
    root = Path(root)
    place, masks = root / IMAGE_FOLDER, mask_folder(root)
    try:
        files = scanners.heads(image_files(place)) if place.is_dir() else []
        there = Files({name_of(path): path for path in files})
        annotated = find_annotations(root / ANNOTATION_FOLDER, there)
    except InputError:  # preprocess.py says why
        return []
    if not files:
        return []
    fit = [name_of(path) for path in image_files(masks)] if masks else []
    fit = set(map(same_name, [*fit, *annotated]))
    cut = {same_name(image["name"]): image["name"] for image in images}
    added = [name for name in there if same_name(name) in fit - cut.keys()]
    gone = [name for name in cut.values() if name not in there]
    again = f"run preprocess.py --root {shown(root)}"
    lines = [f"{some(map(shown, added))}: in {shown(place)} since it was cut, and not in the set"]
    lines += [f"{some(map(shown, gone))}: no longer in {shown(place)}, but still in the set"]
    return [f"{line}; {again}" for line, its in zip(lines, (added, gone), strict=True) if its]


def passed_over(*places: str | Path) -> list[str]:
    """Return a line for each of these folders in which anything but hidden files is no image."""
    lines = []
    for place in map(Path, places):
        if not place.is_dir():
            continue
        images = image_files(place)
        images = {path.name for path in (*images, *scanners.companions(images))}
        others = [p for p in sorted(place.iterdir()) if p.name not in images and p.name[0] != "."]
        if others:
            names = [shown(path.name) + "/" * path.is_dir() for path in others]
            lines.append(
                f"{_files(len(others))} in {shown(place)} {_was(others)} passed over "
                f"({some(names)}): expected files of type {', '.join(IMAGE_SUFFIXES)}"
            )
    return lines


def unused_labels(root: str | Path, names: Iterable[str]) -> list[str]:
    """Return a line if `root` has label maps of none of these images, else no line."""
    used = {same_name(name) for name in names}
    unused = [
        shown(path.name) for name, path in label_folder(root).items() if same_name(name) not in used
    ]
    if not unused:
        return []
    return [
        f"{_files(len(unused))} in {shown(Path(root) / LABEL_FOLDER)} {_was(unused)} passed over "
        f"({some(unused)}): no image has that name"
    ]


def unused_masks(root: str | Path) -> list[str]:
    """Return a line if `root` has further folders of masks than the one that is used."""
    used, *others = [n for n in MASK_FOLDERS if (Path(root) / n).is_dir()] or [""]
    return [
        f"{shown(Path(root) / name)} was passed over: masks are taken from {used!r}"
        for name in others
    ]


def said_of_spelling(root: str | Path) -> list[str]:
    """A line for each folder of `root` whose name is nearly that of one that is read, as of another
    case or without an s; none where the system takes both names for one.
    """
    root = Path(root)
    read = [root / name for name in (IMAGE_FOLDER, *MASK_FOLDERS, LABEL_FOLDER, ANNOTATION_FOLDER)]
    plain = {re.sub(r"[\W_]|s$", "", same_name(path.name)): path.name for path in reversed(read)}
    plain |= {"label": LABEL_FOLDER, "labelmap": LABEL_FOLDER, "binarymask": MASK_FOLDERS[0]}
    lines = []
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        name = re.sub(r"[\W_]|s$", "", same_name(path.name))
        if path in read or not path.is_dir() or any(p.exists() and p.samefile(path) for p in read):
            continue
        if near := difflib.get_close_matches(name, plain, 1, NEAR):
            lines.append(f"{shown(path)} is not read: expected {plain[near[0]]!r} as its name")
    return lines


def said_of_annotations(root: str | Path, pairs: Iterable[Pair]) -> list[str]:
    """Return lines on what was passed over because `root` has a folder of annotations."""
    folder = Path(root) / ANNOTATION_FOLDER
    if not folder.is_dir():
        return []
    annotated = {same_name(pair.name): pair.mask for pair in pairs if pair.is_annotated}
    used = {path.name for path in annotated.values()}
    others = [p for p in sorted(folder.iterdir()) if p.name not in used and p.name[0] != "."]
    images = find_images(Path(root) / IMAGE_FOLDER)
    left = images.keys() - {pair.name for pair in pairs}
    left = [shown(images[name].name) for name in sorted(left)]
    lines = []
    places = [mask_folder(root), Path(root) / LABEL_FOLDER]
    for place in dict.fromkeys(place for place in places if place and place.is_dir()):
        both = [shown(p.name) for p in image_files(place) if same_name(name_of(p)) in annotated]
        if both:
            lines.append(
                f"{_files(len(both))} in {shown(place)} {_was(both)} passed over "
                f"({some(both)}): {shown(folder)} has annotations of these images"
            )
    if others:
        names = [shown(path.name) + "/" * path.is_dir() for path in others]
        lines.append(
            f"{_files(len(others))} in {shown(folder)} {_was(others)} passed over "
            f"({some(names)}): expected annotations (docs/own_data.md)"
        )
    if left:
        lines.append(
            f"{len(left)} of {len(images)} images {_was(left)} passed over ({some(left)}): "
            f"neither annotation nor mask has that name"
        )
    return lines


def _files(count):
    return "1 file" if count == 1 else f"{count} files"


def _was(files):
    return "was" if len(files) == 1 else "were"
