"""Print the model card's table of scores: a row for each folder of results, or each group in it.

    python3 -m tools.card_table MoNuSeg=results/monuseg CryoNuSeg=results/cryonuseg
    python3 -m tools.card_table NuInsSeg=results/nuinsseg --by '^(?:human|mouse)_.*(?=_\\d+$)'

All images of the folders have references. Counts are those of nuclei: the mean error is |predicted
- reference| / reference, bias and limits of agreement are of predicted - reference.
"""

import re
import statistics
from pathlib import Path

from tissue.agreement import count_agreement
from tissue.files import InputError, Parser, run_script
from tissue.tables import read_table

HEADER = ("tissue", "images", "Dice", "worst image", "AJI", "PQ", "count error", "bias")
HEADER += ("limits of agreement",)


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("results", nargs="+", metavar="NAME=FOLDER", help="folders of results")
    parser.add_argument("--by", metavar="REGEX", help="a row for each that it finds in the names")
    return parser.parse_args(argv)


def main(args):
    print(f"| {' | '.join(HEADER)} |\n|---|{'---|' * (len(HEADER) - 1)}")
    for text in args.results:
        name, _, folder = text.partition("=")
        rows = read_table(Path(folder) / "counts.csv")
        if not all(row["dice"] and row["gt_nuclei"] for row in rows):
            raise InputError(
                f"{folder}: found images without a reference, expected all to have one"
            )
        groups = {}
        for row in rows if args.by else ():
            found = re.search(args.by, row["image"])
            groups.setdefault(found[0] if found else "others", []).append(row)
        for group, its in {name: rows, **groups}.items():
            print(f"| {' | '.join([group, *cells(its)])} |")


def cells(rows: list[dict]) -> list[str]:
    """What the HEADER names, of some rows of counts.csv."""
    means = [statistics.mean(float(row[key]) for row in rows) for key in ("dice", "aji", "pq")]
    worst = min(float(row["dice"]) for row in rows)
    counts = [[int(row[key]) for row in rows] for key in ("nuclei", "gt_nuclei")]
    found = count_agreement(*counts)
    limits = f"{found['lower']:.0f} to {found['upper']:.0f}" if len(rows) > 1 else ""
    return [
        str(len(rows)), f"{means[0]:.4f}", f"{worst:.4f}", f"{means[1]:.4f}", f"{means[2]:.4f}",
        f"{found['mean_relative_error']:.1%}", f"{found['bias']:+.1f}", limits,
    ]  # fmt: skip


if __name__ == "__main__":
    run_script(main, parse_args)
