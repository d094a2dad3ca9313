"""Masks scored as the field scores them: means over images, whole organs held out, border zones.

    python3 -m experiments.field_protocol --root monuseg --out OUT
    python3 -m experiments.field_protocol --root cryonuseg --out OUT --folds 5 \\
        --train --init log/ckpt/nuclei.pt

Without --folds the weights that ship are scored on all images. With it, organs (what of a name is
before its last underscore) are dealt into folds; train.py learns the other organs' images, but for
one organ that validates, in one epoch, and inference.py segments those held out. What is in --out
is not done again. All flags behind --train are train.py's.

Dice, AJI and PQ are of an image; their mean over the images is what MoNuSeg's challenge has, and
that weighted by nuclei, with pixels near the border of a reference nucleus left out
(agreement.border_zone), what NucEval adds. Where there are masks alone, the reference's nuclei are
split from them as inference.py does. Writes a section of benchmarks/RESULTS.md.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile

import inference
from benchmarks import data, results
from experiments.study import REPOSITORY, infer
from tissue import agreement, masks, nuclei
from tissue.files import InputError, Parser, run_script
from tissue.pairs import IMAGE_FOLDER, LABEL_FOLDER, Pair, find_pairs
from tissue.pixel_size import pixel_size_um
from tissue.results import path_of

STRIDE = 32  # pixels, of patches: about 3,000 of 18 images of 512 x 512 pixels
ORGAN = r"^(.+)_[^_]*$"  # of the name of an image
VALIDATED = 0.1  # of the images learned from, at least: one organ
ZONES = (0, 1, 2)  # pixels on both sides of the border; NucEval's examples have these


class Scores(NamedTuple):
    """How an image's nuclei agree with the reference's; `number` are the reference's."""

    dice: float
    aji: float
    pq: float
    number: int
    found: int


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--root", required=True, help="folder with images and their masks")
    parser.add_argument("--out", required=True, help="folder that keeps runs and predictions")
    parser.add_argument("--folds", type=int, default=0, help="0: nothing is trained")
    parser.add_argument("--title", default="The field's protocol", help="of the section")
    parser.add_argument("--results", default=results.RESULTS, help="file for the section")
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="flags of train.py")
    return parser.parse_args(argv)


def main(args):
    pairs = find_pairs(args.root)
    by_fold = []
    for number, held_out in enumerate(deal(pairs, args.folds)):
        place = Path(args.out) / f"fold-{number + 1}"
        if not (place / "results" / "counts.csv").is_file():
            shutil.rmtree(place, ignore_errors=True)
            others = [pair for pair in pairs if pair not in held_out]
            best = learn(others, place, args.train) if args.folds else inference.SHIPPED
            predict(best, link(held_out, place / "held_out"), place / "results")
        by_fold.append([score(pair, place / "results") for pair in held_out])
        print(f"fold {number + 1}: Dice {mean_dice(by_fold[-1]):.4f}", flush=True)
    results.write_section(args.title, text_of(args, by_fold), args.results)


def deal(pairs: list[Pair], folds: int) -> list[list[Pair]]:
    """The images held out in each fold, whole organs; all in one where there are no folds."""
    if not folds:
        return [pairs]
    organs = sorted({pair.name.rpartition("_")[0] for pair in pairs})
    if not 2 <= folds <= len(organs) // 2:
        raise InputError(
            f"--folds: found {folds}, expected 2 to {len(organs) // 2}, half the number of organs "
            f"in the names of the images ({', '.join(organs)})"
        )
    return [
        [pair for pair in pairs if pair.name.rpartition("_")[0] in organs[fold::folds]]
        for fold in range(folds)
    ]


def link(pairs: list[Pair], root: Path) -> Path:
    """A folder of links to these images and their masks or label maps."""
    for pair in pairs:
        kind = LABEL_FOLDER if pair.mask.parent.name == LABEL_FOLDER else "masks"
        for folder, path in ((IMAGE_FOLDER, pair.image), (kind, pair.mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / (pair.name + path.suffix)).symlink_to(path.resolve())
    return root


def learn(pairs: list[Pair], place: Path, flags: list[str]) -> Path:
    """Cut and learn these images as a user does; the best.pt."""
    root = link(pairs, place / "data")
    split = ("--val_fraction", VALIDATED, "--group_pattern", ORGAN)
    data.cut(root, "--patch_stride", STRIDE, *split)
    command = ["train.py", "--root", root, "--log", place / "log", "--epoch", 1, *flags]
    subprocess.run([sys.executable, *map(str, command)], cwd=REPOSITORY, check=True)
    (best,) = (place / "log").glob("*/best.pt")
    return best


def predict(ckpt, root: Path, out: Path, um: float | None = None) -> None:
    """Run inference.py, with its default flags, on a folder of `link`; `um` as `study.infer`."""
    references = next(folder for folder in root.iterdir() if folder.name != IMAGE_FOLDER)
    infer(ckpt, root / IMAGE_FOLDER, references, out, um)


def score(pair: Pair, folder: Path) -> list[Scores]:
    """The Scores of an image with each of the ZONES left out, of what inference.py wrote."""
    reference = masks.read(pair.mask)
    if reference.labels is None:
        size = pixel_size_um(pair.image)
        truth = nuclei.nuclei(reference.foreground, size, nuclei.REFERENCE_SPLIT)
    else:
        truth = nuclei.reference_labels(reference.labels)
    labels = tifffile.imread(path_of(folder, pair.name, "labels"))
    mask, found = masks.read_mask(path_of(folder, pair.name, "prediction")), int(labels.max())
    scores = []
    for width in ZONES:
        scored = ~agreement.border_zone(truth, width)
        dice = agreement.dice(agreement.pixel_counts(mask[scored], reference.foreground[scored]))
        table = agreement.overlap(labels * scored, truth * scored)
        number = np.count_nonzero(table.reference_area)
        pq = agreement.panoptic_quality(table)["pq"]
        scores.append(Scores(dice, agreement.aji(table), pq, number, found))
    return scores


def mean_dice(images: list[list[Scores]]) -> float:
    """The mean Dice of some images, without a border zone."""
    return float(np.mean([scores[0].dice for scores in images]))


def text_of(args, by_fold: list[list[list[Scores]]]) -> str:
    """What is written: a row for each border zone, and the counts."""
    images = [scores for fold in by_fold for scores in fold]
    rows = []
    for number, width in enumerate(ZONES):
        its = np.array([scores[number] for scores in images])
        weighted = np.average(its[:, :3], axis=0, weights=its[:, 3])
        cells = [*its[:, :3].mean(axis=0), its[:, 0].min(), *weighted]
        rows.append([f"{width} px", *(f"{cell:.4f}" for cell in cells)])
    there, found = np.array([scores[0][3:] for scores in images]).T
    errors = np.abs(found - there) / np.maximum(there, 1)
    folds = ", ".join(f"{mean_dice(fold):.4f}" for fold in by_fold)
    header = ["border zone left out", "Dice", "AJI", "PQ", "Dice, worst image"]
    header += [f"{name}, weighted by nuclei" for name in ("Dice", "AJI", "PQ")]
    return (
        f"Means over {len(images)} images.\n\n"
        f"{results.table(header, rows)}\n\n"
        f"Nuclei: {found.sum()} found, {there.sum()} in the reference "
        f"({found.sum() / there.sum() - 1:+.1%}); mean relative count error {errors.mean():.1%}. "
        f"Mean Dice by fold: {folds}."
    )


if __name__ == "__main__":
    run_script(main, parse_args)
