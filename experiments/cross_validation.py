"""Masks of every tissue and patient, each by a network that learned none of its images.

    python3 -m experiments.cross_validation --root data/dsb2018 data/nuinsseg data/tnbc --out OUT \\
        --train --arch tf_efficientnet_lite0 --pretrained FILE --sampler balanced
    python3 -m tools.card_table TNBC=OUT/tnbc NuInsSeg=OUT/nuinsseg --by '^(?:human|mouse)_.*(?=_)'

The sets are cut as for train.py; their groups are those of preprocess.py --group_pattern, and are
dealt into --folds. A fold's network learns from the other groups of all sets, cut in the same way,
in one epoch, and inference.py writes the results of the groups held out to OUT/<set>/, at the pixel
size that the set has. What is in --out is not done again. All flags behind --train are train.py's.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks import data
from experiments.field_protocol import link, predict
from experiments.study import REPOSITORY
from tissue.files import InputError, Parser, run_script
from tissue.manifest import read_manifest
from tissue.pairs import Pair, find_pairs
from tissue.splits import groups_of

VALIDATED = 0.05  # of the images learned from


class Set(NamedTuple):
    """A set as preprocess.py cut it: its images by groups, and what it was told."""

    name: str
    groups: list[list[Pair]]
    um: float | None  # pixel size of its images, if all have one
    cut: list  # flags of preprocess.py that cut a part of it alike


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--root", nargs="+", required=True, help="sets, cut for train.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--folds", type=int, default=5, help="networks that are trained")
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="flags of train.py")
    return parser.parse_args(argv)


def main(args):
    sets = [read_set(root) for root in args.root]
    few = min(len(each.groups) for each in sets)
    if not 2 <= args.folds <= few:
        raise InputError(
            f"--folds: found {args.folds}, expected 2 to {few}, the groups of the smallest set"
        )
    for fold in range(args.folds):
        place = args.out / f"fold-{fold + 1}"
        if not list(place.glob("log/*/best.pt")):
            learn(sets, fold, args.folds, place, args.train)
        (best,) = place.glob("log/*/best.pt")
        for each in sets:
            held_out = [pair for its in each.groups[fold :: args.folds] for pair in its]
            root = place / "held_out" / each.name
            if not root.exists():
                link(held_out, root)
            predict(best, root, args.out / each.name, each.um)
            print(f"fold {fold + 1}: {each.name}, {len(held_out)} images", flush=True)


def read_set(root: str) -> Set:
    """A cut set, with its groups in the order of their names."""
    manifest, pairs = read_manifest(root), find_pairs(root)
    group_of = groups_of([pair.name for pair in pairs], manifest["group_pattern"])
    groups = {}
    for pair in sorted(pairs, key=lambda pair: group_of[pair.name]):
        groups.setdefault(group_of[pair.name], []).append(pair)
    sizes = {entry["pixel_size_um"] for entry in manifest["images"]}
    um = sizes.pop() if len(sizes) == 1 else None
    flags = {"--patch_stride": manifest["patch_stride"], "--pixel_size": um}
    flags |= {"--patch_pixel_size": manifest["pixel_size_um"], "--val_fraction": VALIDATED}
    flags |= {"--group_pattern": manifest["group_pattern"]}
    cut = [part for flag, value in flags.items() if value is not None for part in (flag, value)]
    return Set(Path(root).resolve().name, list(groups.values()), um, cut)


def learn(sets: list[Set], fold: int, folds: int, place: Path, flags: list[str]) -> None:
    """Cut and learn the groups of the other folds as a user does."""
    roots = []
    for each in sets:
        roots.append(place / "data" / each.name)
        if not (roots[-1] / "patches.json").exists():
            learned = [its for number, its in enumerate(each.groups) if number % folds != fold]
            if not roots[-1].exists():
                link([pair for its in learned for pair in its], roots[-1])
            data.cut(roots[-1], *each.cut)
    command = ["train.py", "--root", *roots, "--log", place / "log", "--epoch", 1, *flags]
    subprocess.run([sys.executable, *map(str, command)], cwd=REPOSITORY, check=True)


if __name__ == "__main__":
    run_script(main, parse_args)
