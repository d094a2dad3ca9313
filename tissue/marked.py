"""Files in which a person has marked regions or tissue of the images that are segmented."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from tissue import artefacts, pairs
from tissue.annotations import find_annotations
from tissue.files import InputError, some
from tissue.inputs import Task
from tissue.record import ENDINGS
from tissue.regions import open_regions

OF_TISSUE = tuple(ENDINGS[kind] for kind in ("tissue", "tissue_geojson"))  # our own, corrected


def open_tissue(task: Task) -> artefacts.Map | artefacts.Marked | None:
    """Where the tissue of an image is, marked or found; None where no artefacts are looked for."""
    if task.tissue:
        return artefacts.Marked(task.tissue, task.shape)
    return artefacts.open_map(task.file("tissue"), task.shape) if task.finds_tissue else None


class Said(NamedTuple):
    """Lines that say what is assumed of files, and their faults."""

    notes: list[str]
    faults: list[str]


def with_regions(
    tasks: list[Task], folder: str, only: bool, is_mine: Callable[[int], bool]
) -> tuple[list[Task], Said]:
    """The tasks with the files of their regions, of which `is_mine` says which are opened once.

    With `only`, nuclei are looked for in them alone, and each image must have some and no
    reference. Raises InputError else, and for a folder without regions of any of the images.
    """
    scored = [str(task.pair.mask) for task in tasks if task.pair.mask]
    if only and scored:
        raise InputError(
            f"--only_regions: found references ({some(scored)}), expected none, for nuclei "
            f"outside of regions would count as missed; leave the flag out, or give --images alone"
        )
    paths, said = _files_of(tasks, "regions", folder, open_regions, is_mine)
    given = [t._replace(regions=p, only_regions=only) for t, p in zip(tasks, paths, strict=True)]
    without = [task.pair.name for task in given if not task.regions]
    if without and only:
        said.faults.append(
            f"--only_regions: found no regions of {some(without)} in {folder}, expected a "
            f"file of each image; add it, or leave the image out"
        )
    elif without:
        said.notes.append(f"{some(without)}: without regions in {folder}")
    return given, said


def with_tissue(
    tasks: list[Task], folder: str, is_mine: Callable[[int], bool]
) -> tuple[list[Task], Said]:
    """The tasks with the files in which their tissue is marked, as `with_regions`; no image with
    such a file must have a reference.
    """
    paths, said = _files_of(tasks, "tissue", folder, artefacts.Marked, is_mine)
    given = [task._replace(tissue=path) for task, path in zip(tasks, paths, strict=True)]
    scored = [str(task.pair.mask) for task in given if task.tissue and task.pair.mask]
    if scored:
        raise InputError(
            f"--tissue: found references ({some(scored)}), expected none, for nuclei outside "
            f"of what is marked would count as missed; leave the flag out, or give --images alone"
        )
    without = [task.pair.name for task in given if not task.tissue]
    if without:
        said.notes.append(f"{some(without)}: nothing is marked in {folder}, as without it")
    return given, said


def _files_of(tasks, kind, folder, opened, is_mine):
    """The file of each task in the folder of a flag, or None, each opened once; what is Said."""
    place, said, paths = Path(folder), Said([], []), []
    if not place.is_dir():
        what = "found a file" if place.exists() else "no such folder"
        raise InputError(f"--{kind} {place}: {what}, expected a folder of files, one for an image")
    names = pairs.Files({task.pair.name: task.pair.image for task in tasks})
    found = find_annotations(place, names, OF_TISSUE if kind == "tissue" else ())
    for index, task in enumerate(tasks):
        paths.append(path := found.get(task.pair.name))
        if path and is_mine(index):
            try:
                with closing(opened(path, task.shape)) as its:
                    said.notes.extend(its.notes)
            except (InputError, OSError) as error:
                said.faults.append(str(error))
    if tasks and not any(paths):
        raise InputError(
            f"--{kind}: found no {kind} of any image in {place}, expected files named as the "
            f"images, such as {tasks[0].pair.name}.geojson"
        )
    left = [str(path) for name, path in found.items() if name not in names]
    if left:
        said.notes.append(f"{some(left)}: without an image of that name, passed over")
    return paths, said
