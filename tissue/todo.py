"""Which images of a call are to be done, and why: no results, or results of other settings."""

from pathlib import Path

from tissue import exports, nuclei_tables, results
from tissue.files import InputError, some
from tissue.inputs import Task, at_most, file_mark
from tissue.record import Record

OF_NUCLEI = ("density", "density_picture")  # files that are made of the table of nuclei
# What of made_with is an image's own, as a person calls it; else results.SETTINGS.
OWN = {"sizes": "averaging", "tissue": "search for artefacts"}
OF_FILES = "image", "reference", "label map", "regions", "tissue"  # as Task.file_marks has them


def unfinished(tasks: list[Task], overwrite: bool) -> tuple[list[Task], list[str]]:
    """The tasks that are not finished, or not with these settings, and lines that say so.

    An image of which only files of nuclei are missing has its `row`: its mask is there. One that
    was exported is exported again. It has no `formats` if only what is made of the nuclei
    (`OF_NUCLEI`, and what is counted in regions) is missing or outdated. Raises InputError if a
    package is missing that files need.
    """
    todo, notes, known = [], [], []
    for task in tasks:
        name, folder = task.pair.name, task.results
        try:
            record = results.read(folder, name)
        except (InputError, OSError) as error:
            record = None
            notes.append(f"{error}; made anew")
        if record is None:
            todo.append(task._replace(formats=_formats(task, ())))
            continue
        lost = results.lost(folder, record)
        known.append((task, record))
        if again := _again(task, record, None if overwrite else lost):
            todo.append(again)
            notes += [] if overwrite else _said_of_files(folder, record, lost)
    nuclei_tables.check_packages({key for task in todo for key in task.formats})
    anew = {task.pair.name for task in todo if not task.row}
    notes = at_most(notes) + _said_of_anew(known, anew)
    with_row = [task for task in todo if task.row]
    exported = len([task for task in with_row if task.formats])
    if done := len(tasks) - len(todo) + len(with_row):
        notes.append(f"{done} of them finished already; --overwrite redoes them")
    if exported:
        notes.append(f"{exported} of these are exported from the masks that are there")
    if more := len(with_row) - exported:
        notes.append(f"{more} of these get regions or a density map from the nuclei that are there")
    return todo, notes


def _formats(task, kept):
    """What an image is exported as: as is asked for, and as was before, by the kinds it has."""
    both = {*task.formats, *(key for key in exports.MORE if key in kept)}
    return tuple(key for key in exports.FORMATS if key in both)


def _again(task: Task, record: Record, lost: list[str] | None) -> Task | None:
    """An image with a record as it is to be done, None if it is finished; all of it where `lost`
    is None.
    """
    kept = record["files"]
    task = task._replace(formats=_formats(task, kept))
    if lost is None or record["made_with"] != task.made_with:
        return task
    missing = {*lost, *(key for key in task.formats if key not in kept)}
    if missing - {*exports.FORMATS, *OF_NUCLEI}:
        return task
    if missing & {*exports.FORMATS}:
        return task._replace(row=record["row"])
    is_due = missing or _outdated(task, record)
    return task._replace(row=record["row"], formats=()) if is_due else None


def _said_of_anew(known: list[tuple[Task, Record]], anew: set[str]) -> list[str]:
    """Why images with a record are done `anew`, and what of an earlier call goes or stays."""
    others, scored, counted, left = {}, [], [], []
    for task, record in known:
        name, row = task.pair.name, record["row"]
        if name in anew:
            if titles := _others(task, record):
                others[name] = titles
            scored += [name] * bool("dice" in row and not task.pair.mask)
            counted += [name] * bool("regions" in row and not task.regions)
        elif "regions" in row and not task.regions:
            left.append(name)
    lines = []
    if others:
        titles = dict.fromkeys(title for found in others.values() for title in found)
        lines.append(f"{some(others)}: results have other {', '.join(titles)}; made anew")
    if scored:
        lines.append(f"{some(scored)}: scores of an earlier call go, this one has no reference")
    if counted:
        lines.append(f"{some(counted)}: regions of an earlier call go, this one has none")
    if left and any(task.regions for task, _ in known):
        lines.append(f"{some(left)}: regions of an earlier call stay in {results.REGIONS}")
    return lines


def _others(task, record):
    """What of a record's settings is not the task's, as a person calls it."""
    own, theirs = task.made_with, record["made_with"]
    titles = results.SETTINGS | OWN
    found = [title for key, title in titles.items() if own.get(key) != theirs.get(key)]
    files = [[*made["files"], *[None] * len(OF_FILES)][: len(OF_FILES)] for made in (own, theirs)]
    found += [title for title, *both in zip(OF_FILES, *files, strict=True) if both[0] != both[1]]
    return list(dict.fromkeys(found))


def _said_of_files(folder: Path, record: Record, lost: list[str]) -> list[str]:
    """Which files of an image are lost, and where will be kept what somebody has changed or put
    there, in lines.
    """
    name, lines = record["row"]["image"], []
    if lost:
        kept = _kept(folder, name, results.changed(folder, record))
        changed = f", the changed {kept}" * bool(kept)
        lines.append(f"{results.said_of_lost(folder, name, lost)}; made anew{changed}")
    if kept := _kept(folder, name, results.not_listed(folder, record)):
        lines.append(
            f"{folder}: found files beside the results of {name} that are not ours: {kept}"
        )
    return lines


def _kept(folder, name, kinds):
    """Where files of an image will be kept, as a text."""
    paths = [results.path_of(folder, name, kind) for kind in kinds]
    return ", ".join(f"{path.name} kept as {results.place_aside(path).name}" for path in paths)


def _outdated(task, record):
    """Whether what is made of an image's nuclei is not what the task asks for."""
    if task.density and not all(kind in record["files"] for kind in OF_NUCLEI):
        return True
    return bool(task.regions) and record["row"].get("regions_file") != file_mark(task.regions)
