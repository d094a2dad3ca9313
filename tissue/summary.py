"""What all finished images of a folder come to: tables, the page, and lines for the terminal."""

from collections.abc import Sequence
from pathlib import Path

from tissue import exports, report, results, review, tables
from tissue.claims import making_tables
from tissue.files import InputError
from tissue.inputs import Task, at_most, how_many
from tissue.kept import keep, keeping
from tissue.record import Record
from tissue.todo import unfinished


def write_tables(folder: Path, tasks: Sequence[Task], mine: Sequence[Task]) -> list[str]:
    """As `write_summary` for the images of this call, `mine`, once those of all shards, `tasks`,
    are finished; else a line that says how many are not.
    """
    if len(mine) < len(tasks) and (left := unfinished(tasks, overwrite=False)[0]):
        return [
            f"{len(left)} of {how_many(len(tasks), 'image')} are not finished: the last shard "
            f"makes tables and page, or: inference.py --image_folder {folder} --report_only"
        ]
    return write_summary(folder, {task.pair.name for task in mine})


def write_summary(folder: Path, names: set[str] | None = None) -> list[str]:
    """Write the tables and the page of all finished images of a folder, and return lines that say
    what those of this call, by their names, come to; all, without names.

    Raises InputError for a folder without a record of a finished image, if no names are given.
    """
    if names is None and not results.has_records(folder):
        raise InputError(
            f"{folder}: found no record of any image, expected results of inference.py; give their "
            f"folder as --image_folder"
        )
    with making_tables(folder) as is_due:
        records, faults = results.finished(folder)
        if names is None and not records:
            raise InputError(
                f"{folder}: found no image whose results are whole, expected one; tables and page "
                f"stay as they are: {'; '.join(at_most(faults))}"
            )
        lines = [f"{fault}; left out of the tables" for fault in at_most(faults)]
        if is_due or not records:
            with keeping(folder) as kept:
                lines += kept + _write(folder, records)
        if not records:
            return lines
    rows = [record["row"] for record in records]
    own = [row for row in rows if names is None or row["image"] in names]
    if own:
        lines.append(report.text_table(own))
    lines += [
        f"{name}: {share} of it is {why}glass and was skipped"
        for name, (share, why) in _skipped(own).items()
    ]
    if len(rows) > len(own):
        others = how_many(len(rows) - len(own), "image")
        lines.append(f"{others} of earlier calls in {folder} too: in its tables, not in this one")
    if differing := results.settings_of(records)[1]:
        lines.append(f"{report.said_of_differing(differing)}")
    lines.append(f"masks and overlays: {folder} | counts: {folder / results.COUNTS}")
    if regions := sum(len(row.get("regions", ())) for row in rows):
        lines.append(f"regions: {folder / results.REGIONS}, {how_many(regions, 'row')}")
    lines.append(f"look at {folder / results.REPORT}")
    return lines


def check_exports(tasks: Sequence[Task]) -> list[str]:
    """Read back the exports of these images, say what was found, and return the faults."""
    faults = []
    for task in tasks:
        try:
            record = results.read(task.results, task.pair.name)
            if record is not None:  # else its own fault is said
                kinds = [key for key in (*exports.FORMATS, "labels") if key in record["files"]]
                found = exports.check_exports(task.results, task.pair.name, kinds)
                print(f"{task.pair.name}: {found}")
        except (InputError, OSError) as error:
            faults.append(str(error))
    return faults


def _skipped(rows):
    """Of which images a part was skipped: {name: (share, why)}."""
    return {
        row["image"]: (f"{row['skipped']:.0%}", "outside regions or " * ("outside" in row))
        for row in rows
        if row.get("skipped")
    }


def _write(folder: Path, records: Sequence[Record]) -> list[str]:
    """Write the tables and the page; lines of what is not in them. Those that are there are kept
    beside, where there are no records any more.
    """
    if not records:
        there = [folder / name for name in results.TABLES if (folder / name).is_file()]
        return [keep(path, "of images whose results are not whole any more") for path in there]
    rows = [record["row"] for record in records]
    shown, differing = results.settings_of(records)
    shown |= {f"skipped as {why}glass in {n}": share for n, (share, why) in _skipped(rows).items()}
    sizes = [{"pixel_size_um": record["made_with"]["pixel_size"]} for record in records]
    counted = [row | size for row, size in zip(rows, sizes, strict=True)]
    tables.write_counts(folder / results.COUNTS, counted)
    tables.write_errors(folder / results.ERRORS, rows)
    tables.write_regions(folder / results.REGIONS, records)
    reviewed = [record["row"]["image"] for record in records if "review" in record["files"]]
    doubtful, faults = review.write_review(folder, reviewed)
    lines = [f"{fault}; left out of {results.REVIEW}" for fault in at_most(faults)]
    if len(reviewed) < len(rows):
        others = how_many(len(rows) - len(reviewed), "image")
        lines.append(f"{others} of an earlier version are not in {results.REVIEW}; --overwrite")
    report.write_report(folder / results.REPORT, folder, rows, shown, differing, doubtful)
    return lines
