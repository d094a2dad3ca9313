"""Pixel sizes that a table of the user's gives, for files that tell none or a wrong one."""

import csv
from collections.abc import Iterable
from pathlib import Path

from tissue.files import InputError, check_regular
from tissue.pairs import name_of, same_name
from tissue.pixel_size import MICROSCOPE_UM

COLUMNS = ("image", "pixel_size_um")


def read_sizes(path: str | Path, names: Iterable[str]) -> tuple[dict[str, float], str]:
    """Micrometres per pixel of those of the images, by name, that a CSV gives, and a line that
    says so.

    The CSV has the columns `image`, a file's name with or without suffix, and `pixel_size_um`.
    Raises InputError with its first fault: columns, an image that is none of `names` or is there
    twice, what is no number or no microscope's.
    """
    named = {same_name(name): name for name in names}
    sizes = {}
    for place, image, text in _rows(path):
        wanted = (same_name(image), same_name(name_of(Path(image))))
        name = next((named[form] for form in wanted if form in named), None)
        if name is None:
            raise InputError(
                f"{place}: found {image!r:.100}, expected one of the {len(named)} images; correct "
                f"or remove the line"
            )
        if name in sizes:
            raise InputError(f"{place}: found {image!r:.100} again, expected one line an image")
        sizes[name] = _micrometres(place, text)
    span = f"{min(sizes.values()):.4g} to {max(sizes.values()):.4g}" if sizes else "none"
    return sizes, f"{path}: the pixel size of {len(sizes)} of {len(named)} images, {span} um"


def _rows(path):
    """(place, image, text of its size) of each line of a CSV, in a list."""
    check_regular(Path(path))
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, skipinitialspace=True)
            columns = [(column or "").strip() for column in table.fieldnames or ()]
            if sorted(columns) != sorted(COLUMNS):
                raise InputError(
                    f"{path}: found the columns {', '.join(columns)!r:.100}, expected "
                    f"{','.join(COLUMNS)}, separated by a comma; correct the first line"
                )
            table.fieldnames = columns
            rows = []
            for row in table:
                place = f"{path}, line {table.line_num}"
                if None in row or None in row.values():
                    raise InputError(f"{place}: found {_count(row)} values, expected 2")
                rows.append((place, *(row[column].strip() for column in COLUMNS)))
            return rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path}: found a file that is no table ({error}), expected a CSV in UTF-8 with the "
            f"columns {','.join(COLUMNS)}"
        ) from error


def _count(row):
    return len([value for value in row.values() if isinstance(value, str)]) + len(row.get(None, ()))


def _micrometres(place, text):
    smallest, largest = MICROSCOPE_UM
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not smallest <= size <= largest:
        raise InputError(
            f"{place}: found a pixel size of {text!r:.40}, expected micrometres from {smallest:g} "
            f"to {largest:g}, with a point for decimals"
        )
    return size
