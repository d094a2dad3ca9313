"""What a person has corrected in an annotation since a network found its nuclei."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tissue.annotations import compare
from tissue.cutting import Plan
from tissue.results import outlines_of, place_aside


def said_of_corrections(plans: Sequence[Plan], results: Path) -> list[str]:
    """A line for each annotated image of these sets of which `results` has the nuclei that a
    network found: how many of them a person added, deleted and changed, or that this cannot be
    told. Raises InputError for unreadable files, FileNotFoundError where there is no such folder.
    """
    if not results.is_dir():
        raise FileNotFoundError(f"{results}: no such folder, expected results of inference.py")
    pairs = [pair for plan in plans for pair in plan.pairs]
    roots_of = Counter(pair.name for pair in pairs)
    lines = []
    for pair in pairs:
        if not pair.is_annotated or ".geojson" not in pair.mask.name.lower():
            continue
        found, is_changed = outlines_of(results, pair.name)
        if found and roots_of[pair.name] > 1:
            lines.append(f"{pair.mask}: not compared, for several roots have an image of this name")
        elif is_changed:
            lines.append(
                f"{pair.name}: {found} was changed since inference.py wrote it, expected it as it "
                f"was, to compare with: run inference.py again, which keeps yours as "
                f"{place_aside(found).name}"
            )
        elif found:
            added, deleted, changed = compare(found, pair.mask)
            lines.append(
                f"{pair.name}: {added} nuclei added, {deleted} deleted, {changed} changed since "
                f"{found}"
            )
    return lines or [
        f"{results}: no <name>_nuclei.geojson of an image annotated in GeoJSON, nothing was "
        "compared"
    ]
