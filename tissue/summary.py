"""What all finished images of a folder come to: tables, the page, and lines for the terminal."""

from pathlib import Path

from tissue import report, results, review
from tissue.inputs import at_most, how_many


def write_summary(folder: Path, names: set[str]) -> list[str]:
    """Write the tables and the page of all finished images of a folder, and return lines that say
    what those of this call, by their names, come to.
    """
    records, faults = results.finished(folder)
    lines = [f"{fault}; left out of the tables" for fault in at_most(faults)]
    rows = [record["row"] for record in records]
    if not rows:
        for outdated in results.TABLES:
            (folder / outdated).unlink(missing_ok=True)
        return lines
    shown, differing = results.settings_of(records)
    skipped = {row["image"]: f"{row['skipped']:.0%}" for row in rows if row.get("skipped")}
    shown |= {f"skipped as glass in {name}": share for name, share in skipped.items()}
    results.write_counts(folder / results.COUNTS, rows)
    results.write_errors(folder / results.ERRORS, rows)
    reviewed = [record["row"]["image"] for record in records if "review" in record["files"]]
    doubtful, faults = review.write_review(folder, reviewed)
    lines += [f"{fault}; left out of {results.REVIEW}" for fault in at_most(faults)]
    if len(reviewed) < len(rows):
        others = how_many(len(rows) - len(reviewed), "image")
        lines.append(f"{others} of an earlier version are not in {results.REVIEW}; --overwrite")
    report.write_report(folder / results.REPORT, folder, rows, shown, differing, doubtful)
    own = [row for row in rows if row["image"] in names]
    if own:
        lines.append(report.text_table(own))
    for name in names & set(skipped):
        share = skipped[name]
        lines.append(f"{name}: {share} of it is glass and was skipped")
    if len(rows) > len(own):
        others = how_many(len(rows) - len(own), "image")
        lines.append(f"{others} of earlier calls in {folder} too: in its tables, not in this one")
    if differing:
        lines.append(f"{report.said_of_differing(differing)}")
    lines.append(f"masks and overlays: {folder} | counts: {folder / results.COUNTS}")
    lines.append(f"look at {folder / results.REPORT}")
    return lines
