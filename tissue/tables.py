"""The tables of a folder of results, made of all of its records."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tissue.files import write_table
from tissue.record import Record

COUNT_COLUMNS = ("image", "height", "width", "pixel_size_um", "contours", "nuclei", "gt_contours")
COUNT_COLUMNS += ("gt_nuclei",)
COUNT_COLUMNS += ("accuracy", "dice", "iou", "aji", "pq", "tissue_mm2", "nuclei_per_mm2")
COUNT_COLUMNS += ("nuclei_in_frame", "seconds")
REGION_COLUMNS = ("image", "region", "class", "area_px", "area_mm2", "tissue_mm2", "nuclei")
REGION_COLUMNS += ("nuclei_per_mm2", "nuclear_area_px", "nuclear_area_um2", "haematoxylin_od")
ERROR_COLUMNS = ("image", "matched", "missed", "merged", "split", "true", "spurious")
NAMES = ("image", "region", "class")  # columns of texts that are the user's

# A text that begins so is a formula to a spreadsheet (OWASP, CSV Injection; East Asia: wide forms).
FORMULA = tuple("=+-@\t\r\uff1d\uff0b\uff0d\uff20")


def write_counts(path: Path | str, rows: Sequence[dict]) -> None:
    """Write counts.csv, a row per image with the columns of COUNT_COLUMNS, empty where unknown, and
    `dropped` and `expected_count_error` if any has them, and the area of each artefact if any was
    looked for.

    A name that a spreadsheet would run as a formula, or that begins with an apostrophe, gets an
    apostrophe before it, which `read_table` takes away again.
    """
    more = ("dropped", "expected_count_error")
    more = tuple(key for key in more if any(key in row for row in rows))
    rows = [{"dropped": 0} | row | row.get("excluded", {}) for row in rows]
    columns = COUNT_COLUMNS + more
    columns += tuple(dict.fromkeys(key for row in rows for key in row.get("excluded", ())))
    table = [{key: cell(row.get(key), _digits(key)) for key in columns} for row in rows]
    write_table(path, columns, table)


def write_errors(path: Path | str, rows: Sequence[dict]) -> None:
    """Write errors.csv, a row per image that has `errors`: ERROR_COLUMNS, as above.

    Numbers of nuclei: of the reference matched, missed, merged, split and all (`true`), and of the
    prediction those that match nothing (`spurious`).
    """
    table = []
    for row in rows:
        if counts := row.get("errors"):
            both = {key: counts[key] for key in ("matched", "missed", "spurious")}
            both |= {key: counts[f"{key}_reference"] for key in ("merged", "split")}
            true = sum(count for key, count in both.items() if key != "spurious")
            table.append({"image": cell(row["image"]), "true": true} | both)
    write_table(path, ERROR_COLUMNS, table)


def write_regions(path: Path | str, records: Sequence[Record]) -> None:
    """Write regions.csv, as above: REGION_COLUMNS of each region of the images that have any, in
    which a class as a whole has no `region`; nothing is written where there are none.
    """
    table = []
    for record in records:
        um = record["made_with"]["pixel_size"]
        for found in record["row"].get("regions", ()):
            row = {"image": record["row"]["image"], "class": found["label"]} | found
            del row["label"]
            tissue = row.pop("tissue_px", None)
            if um:
                row["tissue_mm2"] = "" if tissue is None else f"{tissue * um**2 / 1e6:.6f}"
                area = found["area_px"] * um**2 / 1e6
                row["area_mm2"] = f"{area:.6f}"
                if area:
                    row["nuclei_per_mm2"] = found["nuclei"] / area
                if found["nuclei"]:
                    row["nuclear_area_um2"] = found["nuclear_area_px"] * um**2
            table.append({key: cell(value) for key, value in row.items()})
    if table:
        write_table(path, REGION_COLUMNS, table)
    else:
        Path(path).unlink(missing_ok=True)


def _digits(column):
    """Of an area in square millimetres as many as make a square micrometre."""
    is_area = column.endswith("_mm2") and not column.endswith("per_mm2")
    return 6 if is_area or column == "pixel_size_um" else 4


def read_table(path: Path | str) -> list[dict[str, str]]:
    """The rows of such a table, with the names of images, regions and classes as they were."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.update({key: row[key].removeprefix("'") for key in NAMES if key in row})
    return rows


def cell(value, digits: int = 4):
    """A value as a table has it, with so many decimals; a text that a spreadsheet might run begins
    with '.
    """
    if isinstance(value, str):
        return f"'{value}" if value.startswith((*FORMULA, "'")) else value
    if value is None or value != value:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float | np.floating) else value
