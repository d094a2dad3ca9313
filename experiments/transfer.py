"""What a few annotated or corrected images of one's own do to weights that are there.

    python3 -m experiments.transfer --root monuseg --images 1 2 4 --nuclei 50 100 200
    python3 -m experiments.transfer --root monuseg --images --nuclei --worst 0.1 --of 4 \\
        --also CryoNuSeg=val/images:val/masks --train --replay data/tnbc data/dsb2018

In each draw --held_out images are kept to be scored. Fields of 256 x 256 pixels of the others are
learned from: whole images, fields at random until they have so many nuclei, or (--worst) of each of
--of images the share of its fields in which --init is worst, as if a person had corrected those.
Scores are of the whole images held out, before and after; those of --also must not be forgotten.
All flags behind --train are train.py's. Writes a section of benchmarks/RESULTS.md, and with --curve
an SVG.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import inference
from benchmarks import data, results
from experiments.left_out import parse_also
from experiments.study import REPOSITORY, infer
from learning.checkpoints import load_checkpoint
from tissue import agreement, masks, nuclei, pictures
from tissue.files import InputError, Parser, check_numbers, run_script
from tissue.images import read_image
from tissue.pairs import IMAGE_FOLDER, LABEL_FOLDER, Pair, find_pairs, label_folder
from tissue.tiling import Tile, tiles_of

FIELD = 256  # pixels, side of what is annotated at once
LEAST = 128  # pixels, side of a patch
SCORES = {"dice": "Dice", "aji": "AJI", "count_error": "count error"}


class Field(NamedTuple):
    """A part of an image that a person annotates."""

    name: str  # of the image
    tile: Tile
    nuclei: int
    dice: float  # of --init


class Trial(NamedTuple):
    """A training and what came of it: means of SCORES over the images held out."""

    draw: int
    what: str  # was learned from
    nuclei: int
    before: dict[str, float]
    after: dict[str, float]
    others: dict[str, tuple[float, float]]  # Dice of the sets of --also, before and after


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--root", required=True, help="folder with images and their label maps")
    parser.add_argument("--init", default=inference.SHIPPED, help="weights to start from")
    parser.add_argument("--images", type=int, nargs="*", default=[1, 2, 4], help="learned from")
    parser.add_argument("--nuclei", type=int, nargs="*", default=[50, 100, 200])
    parser.add_argument("--worst", type=float, help="share of the fields of --of images")
    parser.add_argument("--of", type=int, default=4, help="images whose worst fields are corrected")
    parser.add_argument("--held_out", type=int, default=2, help="images that are scored")
    parser.add_argument("--draws", type=int, default=3, help="choices of the images held out")
    parser.add_argument("--pixel_size", type=float, default=0.25, help="of the images, micrometres")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=IMAGES:MASKS")
    parser.add_argument("--results", default=results.RESULTS, help="file for the section")
    parser.add_argument("--title", default="A few images of one's own", help="of the section")
    parser.add_argument("--curve", help="SVG file of the scores by nuclei learned from")
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="flags of train.py")
    return parser.parse_args(argv)


def main(args):
    check_numbers(
        args, {"worst": (0.0, 1), "of": (1, 999), "draws": (1, 99), "pixel_size": (0.0, 9)}
    )
    labels = label_folder(args.root)
    pairs = [pair._replace(mask=labels.get(pair.name, pair.mask)) for pair in find_pairs(args.root)]
    pairs = {pair.name: pair for pair in pairs}
    learned = max([*args.images, args.of if args.worst else 1, 1])
    if not 0 < args.held_out <= len(pairs) - learned:
        raise InputError(
            f"--held_out: found {args.held_out} and {learned} to learn from, expected no more than "
            f"the {len(pairs)} images of {args.root}"
        )
    also = {name: places for name, places in map(parse_also, args.also)}
    trials = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        first = [score(args.init, *places, folder / name) for name, places in also.items()]
        links = link(pairs.values(), folder / "all")
        before = score(args.init, *links, folder / "before", args.pixel_size)
        fields = fields_of(pairs.values(), folder / "before")
        for draw in range(args.draws):
            names = random.Random(draw).sample(sorted(pairs), len(pairs))
            test, pool = names[: args.held_out], names[args.held_out :]
            held_out = link([pairs[name] for name in test], folder / f"test-{draw}")
            for number, (what, chosen) in enumerate(amounts(args, fields, pool, draw)):
                place = folder / f"{draw}-{number}"
                best = learn(args, pairs, chosen, place, draw)
                after = score(best, *held_out, place / "after", args.pixel_size)
                others = {}
                for (name, places), its in zip(also.items(), first, strict=True):
                    both = its, score(best, *places, place / f"also {name}")
                    others[name] = tuple(mean(rows, its)["dice"] for rows in both)
                count = sum(field.nuclei for field in chosen)
                means = mean(before, test), mean(after, test)
                trials.append(Trial(draw, what, count, *means, others))
                print(trials[-1], flush=True)
    write(args, trials, list(also))
    if args.curve:
        draw_curve(trials, args.curve)


# --- what is learned from -------------------------------------------------------------------------


def fields_of(pairs: list[Pair], predictions: Path) -> list[Field]:
    """All fields of all images, with what the predictions of inference.py have in them."""
    fields = []
    for pair in pairs:
        labels = masks.read(pair.mask).labels
        if labels is None:
            raise InputError(f"{pair.mask}: found a mask, expected a label map")
        labels = nuclei.reference_labels(labels)
        found = masks.read_mask(predictions / f"{pair.name}_prediction.png")
        for tile in tiles_of(*labels.shape, FIELD):
            if min(tile.height, tile.width) < LEAST:
                continue
            part = np.s_[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width]
            dice = agreement.dice(agreement.pixel_counts(found[part], labels[part] > 0))
            fields.append(Field(pair.name, tile, len(np.unique(labels[part])) - 1, dice))
    return fields


def amounts(args, fields: list[Field], pool: list[str], draw: int):
    """Yield what is learned from in a draw, in words and as a list of fields."""
    for number in args.images:
        names = pool[:number]
        yield f"{number} images", [field for field in fields if field.name in names]
    mixed = [field for field in fields if field.name in pool]
    random.Random(draw).shuffle(mixed)
    for number in args.nuclei:
        chosen = []
        for field in mixed:
            if sum(one.nuclei for one in chosen) < number or len(chosen) < 2:  # one validates
                chosen.append(field)
        yield f"{number} nuclei", chosen
    if args.worst:
        chosen = []
        for name in pool[: args.of]:
            there = sorted((f for f in fields if f.name == name), key=lambda f: f.dice)
            chosen += there[: max(1, round(args.worst * len(there)))]
        yield f"the worst {args.worst:.0%} of the fields of each of {args.of} images", chosen


def learn(args, pairs: dict[str, Pair], fields: list[Field], place: Path, seed: int) -> Path:
    """Fine-tune --init on these fields, as a user does; the best.pt."""
    root = place / "data"
    for kind in (IMAGE_FOLDER, LABEL_FOLDER):
        (root / kind).mkdir(parents=True)
    for name, (y, x, height, width), *_ in fields:
        part, file = np.s_[y : y + height, x : x + width], f"{name}_{y}_{x}.png"
        image, labels = read_image(pairs[name].image), masks.read(pairs[name].mask).labels
        pictures.write_image(root / IMAGE_FOLDER / file, image[part])
        numbers = nuclei.reference_labels(labels[part]).astype(np.uint16)
        pictures.write_image(root / LABEL_FOLDER / file, numbers)
    um = load_checkpoint(args.init)["pixel_size_um"] or args.pixel_size
    sizes = ("--pixel_size", args.pixel_size, "--patch_pixel_size", um)
    data.cut(root, "--val_fraction", 0.2, "--seed", seed, *sizes)
    command = ["train.py", "--root", root, "--log", place / "log", "--init", args.init]
    command = [sys.executable, *map(str, command), "--seed", str(seed), *args.train]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    (best,) = (place / "log").glob("*/best.pt")
    print((best.parent / "train.log").read_text(), flush=True)
    return best


# --- what comes of it -----------------------------------------------------------------------------


def link(pairs: list[Pair], place: Path) -> tuple[Path, Path]:
    """Folders of links to these images and to their references."""
    for kind in ("images", LABEL_FOLDER):
        (place / kind).mkdir(parents=True)
    for pair in pairs:
        for kind, path in (("images", pair.image), (LABEL_FOLDER, pair.mask)):
            (place / kind / (pair.name + path.suffix)).symlink_to(path.resolve())
    return place / "images", place / LABEL_FOLDER


def score(ckpt, images, references, out: Path, um: float | None = None) -> dict[str, dict]:
    """SCORES of each image, by name, as inference.py has them."""
    scores = {}
    for row in infer(ckpt, images, references, out, um):
        found, there = float(row["nuclei"]), float(row["gt_nuclei"])
        error = abs(found - there) / max(there, 1)
        scores[row["image"]] = {k: float(row[k]) for k in ("dice", "aji")} | {"count_error": error}
    return scores


def mean(scores: dict[str, dict], names) -> dict[str, float]:
    """The means of SCORES over these images."""
    return {key: statistics.mean(scores[name][key] for name in names) for key in SCORES}


def write(args, trials: list[Trial], also: list[str]) -> None:
    """Write the section: a row each training, and one for the mean of each amount."""
    header = ["learned from", "draw", "nuclei"]
    header += [f"{title}, before and after" for title in (*SCORES.values(), *also)]
    rows = []
    for what in dict.fromkeys(trial.what for trial in trials):
        same = [trial for trial in trials if trial.what == what]
        for trial in same:
            cells = [(trial.before[key], trial.after[key]) for key in SCORES]
            cells += trial.others.values()
            rows.append([what, trial.draw + 1, trial.nuclei, *map(arrow, cells)])
        columns = [[(t.before[key], t.after[key]) for t in same] for key in SCORES]
        columns += [[t.others[name] for t in same] for name in also]
        means = [tuple(map(statistics.mean, zip(*column, strict=True))) for column in columns]
        count = round(statistics.mean(trial.nuclei for trial in same))
        rows.append([what, "mean", count, *map(arrow, means)])
    results.write_section(
        args.title,
        f"Scores of "
        f"{args.held_out} images held out, in {args.draws} draws; those of --also by their "
        f"Dice.\n\n" + results.table(header, rows),
        args.results,
    )


def arrow(both: tuple[float, float]) -> str:
    """Before and after, for people."""
    return "{:.4f} -> {:.4f}".format(*both)


def draw_curve(trials: list[Trial], path: str) -> None:
    """Draw the scores by the number of nuclei learned from, a panel each, as SVG."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, len(SCORES))
    whats = list(dict.fromkeys(trial.what for trial in trials))
    groups = [[trial for trial in trials if trial.what == what] for what in whats]
    groups.sort(key=lambda group: statistics.mean(trial.nuclei for trial in group))
    x = [statistics.mean(trial.nuclei for trial in group) for group in groups]
    for axis, (key, title) in zip(axes, SCORES.items(), strict=True):
        for name, style in (("before", "--"), ("after", "-")):
            values = [[getattr(trial, name)[key] for trial in group] for group in groups]
            means = [statistics.mean(its) for its in values]
            (line,) = axis.plot(x, means, style, marker="o", markersize=3)
            line.set_label({"before": "unchanged", "after": "fine-tuned"}[name])
            low, high = ([edge(its) for its in values] for edge in (min, max))
            axis.fill_between(x, low, high, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="annotated nuclei", xscale="log")
    axes[0].legend(frameon=False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "transfer"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    run_script(main, parse_args)
