"""Patches that are not as preprocess.py wrote them: changed by somebody, or put there.

A patch that is newer than the tables of its set, or of which they do not tell, is somebody's work.
"""

import csv
import filecmp
import io
import os
from collections.abc import Iterator
from pathlib import Path

from tissue.files import InputError, file_hash, some
from tissue.manifest import (
    MANIFEST,
    SPLITS,
    TABLE,
    TABLE_COLUMNS,
    folder,
    is_patch,
    read_manifest,
    size_on_disk,
)
from tissue.results import place_aside


def of_no_set(root: Path) -> list[Path]:
    """The patches below a root without a manifest that its table does not list, all of them where
    there is no table of ours: those of the first version, or of another program.
    """
    listed = _listed(root) or {}
    return [p for p, split in _patches(root) if p.name not in listed.get(split, ())]


def has_table(root: Path) -> bool:
    """Whether a patches.csv below a root is one that preprocess.py wrote, by its columns."""
    return _listed(root) is not None


def keep_edited(root: Path, new: Path) -> list[str]:
    """Rename the patches of a set that somebody changed or added, before the `new` one takes its
    place; a line that names them, if there are any.

    Where a folder was copied all its patches are newer: they are what was written if the set has
    the bytes that it had. What is equal in the new set, or empty, is not kept.
    """
    tables = [path for path in (root / MANIFEST, root / TABLE) if path.is_file()]
    if not tables:  # what a killed call has left
        return []
    written = min(path.stat().st_mtime_ns for path in tables)
    listed, as_many = _told(root)
    found = [(path, split, path.stat().st_mtime_ns > written) for path, split in _patches(root)]
    copied = {path.parent for path, *_ in found} if as_many else set()
    copied -= {path.parent for path, _, is_newer in found if not is_newer}
    kept = []
    for path, split, is_newer in found:
        is_added = listed is not None and path.name not in listed.get(split, ())
        is_changed = is_newer and path.parent not in copied
        if (is_added or is_changed) and not _is_no_matter(path, new):
            place = place_aside(path)
            os.rename(path, place)
            kept.append(f"{path.parent.name}/{path.name} as {place.name}")
    if not kept:
        return []
    return [
        f"{root}: {len(kept)} files were changed or added since the patches were cut, and are kept "
        f"({some(kept)}); patches are cut from masks and annotations: correct these"
    ]


def _told(root):
    """What the tables of a set list (`_listed`), None where the table is not the manifest's; and
    whether as many patches, of as many bytes, lie there as were written.
    """
    try:
        manifest = read_manifest(root)
        is_its = file_hash(root / TABLE) == manifest["table_sha256"]
        as_many = size_on_disk(root) == (manifest["patches"], manifest["bytes"])
    except (InputError, OSError):
        return _listed(root), False
    return _listed(root) if is_its else None, as_many


def _listed(root: Path) -> dict[str, set[str]] | None:
    """The files that patches.csv lists, by split; None where it is not ours or cannot be read."""
    try:
        text = (root / TABLE).read_bytes().decode("utf-8")
        header, *rows = csv.reader(io.StringIO(text, newline=""))
        its = [dict(zip(header, row, strict=True)) for row in rows]
        columns = set(header)
    except (OSError, ValueError, csv.Error):
        return None
    if not columns >= set(TABLE_COLUMNS):
        return None
    return {split: {row["file"] for row in its if row["split"] == split} for split in SPLITS}


def _patches(root: Path) -> Iterator[tuple[Path, str]]:
    """The patches below a root, and the split of each."""
    for split in SPLITS:
        for place in (folder(root, kind, split) for kind in ("rgb", "mask")):
            for path in sorted(place.iterdir()) if place.is_dir() else ():
                if is_patch(path.name) and path.is_file():
                    yield path, split


def _is_no_matter(path, new):
    """Whether a patch is empty, as after a fault of the disk, or equal in the new set."""
    other = new / path.parent.name / path.name
    same = other.is_file() and filecmp.cmp(path, other, shallow=False)
    return same or not path.stat().st_size
