"""The folder of results: the name of every file in it, the records that say which images are
finished and with what, and what all of them come to.

An image is finished if `rows/<name>.json` is a valid record and every file that it lists is there,
with as many bytes as it says, and of those that people edit with the same bytes.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from pydantic import TypeAdapter

from tissue.files import (
    InputError,
    file_hash,
    in_the_way,
    longest_name,
    replacing,
    some,
    unfinished,
)
from tissue.pairs import same_name
from tissue.pixel_size import NEAR
from tissue.record import EDITED, ENDINGS, Record
from tissue.schema import check_content, seal

ROWS = "rows"
ROW_ENDINGS = {"record": ".json", "fault": ".failed"}  # of what lies there for each image
COUNTS, ERRORS, REGIONS = "counts.csv", "errors.csv", "regions.csv"
REVIEW, REPORT = "review.csv", "report.html"
TABLES = COUNTS, ERRORS, REGIONS, REVIEW, REPORT
STATUS = "status.csv"
STATUS_COLUMNS = "image", "state", "fault", "seconds", "mm2"

# What of made_with makes the results of two calls differ, as a person calls it.
SETTINGS = {
    "checkpoint": "checkpoint",
    "threshold": "threshold",
    "tta": "averaging",
    "overlap": "overlap of tiles",
    "split": "split",
    "bits": "bits of 16-bit images",
    "pixel_size": "pixel size",
    "version": "version",
}
_RECORD = TypeAdapter(Record)


# --- names


def path_of(folder: Path | str, name: str, kind: str) -> Path:
    """Where a file of an image lies; `kind` is one of ENDINGS, "record", or "fault".

    Raises InputError for a name that is not the name of a file, and so might lead elsewhere.
    """
    if fault := _name_fault(name):
        raise InputError(fault)
    if kind in ROW_ENDINGS:
        return Path(folder) / ROWS / f"{name}{ROW_ENDINGS[kind]}"
    return Path(folder) / f"{name}{ENDINGS[kind]}"


def check_names(folder: Path | str, names: Iterable[str]) -> list[str]:
    """The faults of the names of images whose results are to lie in `folder`, one text each.

    A name must be a file's, short enough for this file system once endings are added, and not
    differ from another, or from one in the folder, by case or Unicode form alone: on many systems
    one would overwrite the other.
    """
    folder, faults, known = Path(folder), [], {}
    room = longest_name(folder) - max(map(len, ENDINGS.values()))
    for path in _record_files(folder):
        known.setdefault(same_name(path.stem), path.stem)
    for name, times in Counter(names).items():
        if fault := _name_fault(name):
            faults.append(fault)
            continue
        if len(os.fsencode(name)) > room:
            faults.append(
                f"{name}: found a name of {len(os.fsencode(name))} bytes, expected at most {room}, "
                f"so that endings fit; rename the image"
            )
        if times > 1:
            faults.append(f"{name}: found this name {times} times, expected one image each; rename")
        other = known.setdefault(same_name(name), name)
        if other != name:
            faults.append(
                f"{name}: found {other} too, a name that differs in case or Unicode form alone, "
                f"expected others in one folder of results; rename one, or choose another folder"
            )
    return faults


def _name_fault(name):
    """What is wrong with a name, or None."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return f"{name!a}: found a name that no file can have, expected an image's name; rename it"
    if name in ("", ".", "..") or "\0" in name or "/" in name or PurePath(name).name != name:
        return f"{name!a}: found a name with a path in it, expected a file's name alone; rename it"
    return None


# --- the folder and its records


def check_folder(folder: Path | str) -> None:
    """Raise InputError if results cannot lie there, for a file is in the place of a folder, a
    folder in that of a file, or a link in that of the folder of records.
    """
    folder = Path(folder)
    if place := in_the_way(folder):
        what = "a file" if place.exists() else "a link that leads nowhere"
        raise InputError(f"{place}: found {what}, expected a folder of results; choose another")
    rows = folder / ROWS
    if os.path.lexists(rows) and (rows.is_symlink() or not rows.is_dir()):
        raise InputError(f"{rows}: found a link or a file, expected a folder; remove it")
    for place, ours in (
        (folder, (*ENDINGS.values(), *TABLES)),
        (rows, tuple(ROW_ENDINGS.values())),
    ):
        entries = list(os.scandir(place)) if place.is_dir() else []
        for entry in entries:
            if entry.name.endswith(ours) and entry.is_dir(follow_symlinks=False):
                raise InputError(f"{entry.path}: found a folder, expected a file; remove it")


def fault_of_files(folder: Path, names: Sequence[str], given: Iterable[Path]) -> str | None:
    """Why the results of these images would overwrite files that are not ours, if they would.

    Such are the files `given` to the call, and all in a folder without records: the folder of them
    is made before any result.
    """
    files = {f"{name}{ending}" for name in names for ending in ENDINGS.values()}
    files |= {*TABLES, STATUS}
    own = os.path.realpath(folder)
    written = {os.path.join(own, name) for name in files}
    for path in given:
        entry = os.path.join(os.path.realpath(path.parent), path.name)
        if not written.isdisjoint((entry, os.path.realpath(path))):
            return (
                f"--image_folder: found {path} among the files of this call, which results in "
                f"{folder} would overwrite, expected another folder"
            )
    there = sorted(files.intersection(os.listdir(folder))) if folder.is_dir() else []
    if there and not os.path.lexists(folder / ROWS):
        return (
            f"--image_folder: found {some(there)} in {folder} without the folder {ROWS} of results "
            f"of ours, expected nothing that results would overwrite; choose another folder"
        )
    return None


def read(folder: Path | str, name: str) -> Record | None:
    """An image's record, None without one; InputError that says what is wrong with it."""
    path = path_of(folder, name, "record")
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError("it is no file")
        record = json.loads(path.read_text(encoding="utf-8"))
        made_with = record.get("made_with") if isinstance(record, dict) else None
        version = made_with.get("version") if isinstance(made_with, dict) else None
        by = f" (it was made by version {version!a:.20})" if isinstance(version, str) else ""
        check_content(_RECORD, record, path, f"it is no record by this inference.py{by}")
        if record["row"]["image"] != name:
            raise ValueError("it is of an image of another name")
        if record["sha256"] != seal(record):
            raise ValueError("it was changed since it was written")
        return record
    except FileNotFoundError:
        return None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        said = " ".join(ascii(str(error))[1:-1].split())
        raise InputError(
            f"{path}: found no valid record ({said:.200}), expected one by inference.py"
        ) from error


def _record_files(folder):
    """The paths of all records, sorted by the names of their images."""
    rows = folder / ROWS
    return sorted(set(rows.glob("*.json")) - set(unfinished(rows)), key=lambda path: path.stem)


def has_records(folder: Path | str) -> bool:
    """Whether any image has, or had, results there."""
    return bool(_record_files(Path(folder)))


def marks_of(folder: Path | str, name: str) -> dict[str, dict]:
    """record.Mark of each file of an image that people edit, as it is now."""
    paths = {kind: path_of(folder, name, kind) for kind in EDITED}
    return {
        kind: {"time": path.stat().st_mtime_ns, "sha256": file_hash(path)}
        for kind, path in paths.items()
        if path.is_file()
    }


def write(
    folder: Path | str,
    row: dict,
    made_with: dict,
    shown: Mapping[str, Any],
    marks: dict | None = None,
) -> None:
    """Write the record of an image whose files are all written: it is finished with that.

    NaN, for a number that is not known, is left out of the row. `marks` is what `marks_of` gives.
    """
    name = row["image"]
    paths = {kind: path_of(folder, name, kind) for kind in ENDINGS}
    record = {
        "row": {key: value for key, value in row.items() if value == value},
        "made_with": made_with,
        "shown": {k: str(v).encode("utf-8", "backslashreplace").decode() for k, v in shown.items()},
        "files": {kind: path.stat().st_size for kind, path in paths.items() if path.is_file()},
    }
    record |= {"marks": marks} if marks else {}
    record["sha256"] = seal(record)
    _RECORD.validate_python(record)
    with replacing(path_of(folder, name, "record")) as beside:
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path_of(folder, name, "fault").unlink(missing_ok=True)


def write_fault(folder: Path | str, name: str, line: str) -> None:
    """Write why an image is not finished, until it is."""
    with replacing(path_of(folder, name, "fault")) as beside:
        beside.write_text(line, encoding="utf-8", errors="backslashreplace")


def lost(folder: Path | str, record: Record) -> list[str]:
    """The kinds of files that a record lists and that are gone, or not what it says."""
    paths = {kind: path_of(folder, record["row"]["image"], kind) for kind in record["files"]}
    marks = record.get("marks", {})
    return [
        kind
        for kind, path in paths.items()
        if _size(path) != record["files"][kind] or not _is_marked(path, marks.get(kind))
    ]


def _is_marked(path, mark):
    """Whether a file is as its mark says, if it has one; another time alone is that of a copy."""
    with suppress(OSError):
        is_same = not mark or path.stat().st_mtime_ns == mark["time"]
        return is_same or file_hash(path) == mark["sha256"]
    return False


def _size(path):
    """The bytes of a file, None of what is none or a link."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def changed(folder: Path | str, record: Record) -> list[str]:
    """Of the files that are lost, the kinds of those that somebody has changed: there is something
    in them.
    """
    paths = {kind: path_of(folder, record["row"]["image"], kind) for kind in lost(folder, record)}
    return [kind for kind, path in paths.items() if _size(path)]


def not_listed(folder: Path | str, record: Record) -> list[str]:
    """The kinds of files that lie where an image's results would, and that its record does not
    list: somebody's own, for a record lists all that is there, and is gone while that changes.
    """
    name, listed = record["row"]["image"], record["files"]
    return [k for k in ENDINGS if k not in listed and _size(path_of(folder, name, k))]


def outlines_of(folder: Path | str, name: str) -> tuple[Path | None, bool]:
    """The GeoJSON of an image's nuclei as its results have it, None without, and whether its record
    says that somebody has changed it.
    """
    record, kinds = None, ()
    with suppress(InputError):  # no valid record: nobody knows how the file was
        if record := read(folder, name):
            kinds = changed(folder, record)
    for kind in ("geojson", "geojson_gz"):
        path = path_of(folder, name, kind)
        if path.is_file() and (not record or kind in record["files"]):
            return path, kind in kinds
    return None, False


def place_aside(path: Path) -> Path:
    """Where a changed file, or somebody's own, is kept: `<file>.changed`, or the next of that kind
    that is free.
    """
    number, place = 1, path.with_name(f"{path.name}.changed")
    while os.path.lexists(place):
        number += 1
        place = path.with_name(f"{path.name}.changed-{number}")
    return place


def set_aside(folder: Path | str, name: str) -> None:
    """Rename what somebody has changed since an image was finished, or has put there, before it is
    made anew.
    """
    try:
        record = read(folder, name)
    except InputError:
        return  # nobody knows what the files were
    for kind in [*changed(folder, record), *not_listed(folder, record)] if record else ():
        path = path_of(folder, name, kind)
        path.rename(place_aside(path))


def forget(folder: Path | str, name: str, kinds: Sequence[str] = ()) -> None:
    """Say that an image is not finished any more, before any of its files changes.

    Those of `kinds` go at once: new results may not have them.
    """
    for kind in ("record", *kinds):
        path_of(folder, name, kind).unlink(missing_ok=True)


# --- what all records come to


def finished(folder: Path | str) -> tuple[list[Record], list[str]]:
    """The records of all finished images of a folder, sorted by name, and why others are not."""
    whole, faults = [], []
    for path in _record_files(Path(folder)):
        try:
            record = read(folder, path.stem)
            if record and (missing := lost(folder, record)):
                faults.append(said_of_lost(folder, path.stem, missing))
            elif record:  # it may have been removed just now
                whole.append(record)
        except (InputError, OSError) as error:
            faults.append(str(error))
    return whole, faults


def said_of_lost(folder: Path | str, name: str, kinds: Sequence[str]) -> str:
    """That files of a finished image are lost, as one text."""
    files = ", ".join(path_of(folder, name, kind).name for kind in kinds)
    return f"{Path(folder) / files}: gone or changed since the image was finished"


def settings_of(records: Sequence[Record]) -> tuple[dict[str, str], list[str]]:
    """The settings that the page shows, and the names of those in which the records differ.

    Where there are several values, each has the number of its images with it.
    """
    shown = {}
    for key in dict.fromkeys(key for record in records for key in record["shown"]):
        values = Counter(record["shown"].get(key, "not known") for record in records)
        shown[key] = next(iter(values))
        if len(values) > 1:
            counted = (f"{text} ({n} image{'s' * (n != 1)})" for text, n in values.items())
            shown[key] = "; ".join(counted)
    differing = []
    for key, title in SETTINGS.items():
        values = (record["made_with"].get(key) for record in records)
        known = [value for value in values if value is not None]
        if key == "pixel_size":
            known = known if known and max(known) > (1 + NEAR) * min(known) else ()
        if any(value != known[0] for value in known):
            differing.append(title)
    if len({"outside" in record["row"] for record in records}) > 1:
        differing.append("--only_regions")
    return shown, differing
