"""How a training with strong augmentation should end: as it began, or with milder changes.

    python3 -m experiments.finishing --root cryonuseg --other monuseg

In each fold by organ (as in experiments.ablation) a network learns from --budget patches with
strong augmentation, and from there as many again with each augmentation. What comes of it, and the
mean of the weights at that point and at the end, is scored on the whole images of the organs left
out.
"""

import statistics
import tempfile
from pathlib import Path

from benchmarks import data, results
from experiments import study
from learning import checkpoints
from learning.devices import choose_device
from tissue.files import Parser, check_positive, run_script
from tissue.pairs import find_pairs

START = "strong"
ENDS = ("basic", "moderate", "strong")


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--root", help="folder with own images and masks; without it drawn ones")
    parser.add_argument("--other", help="folder of another stain, scored too")
    parser.add_argument("--val_pattern", default="*03.tif", help="images of --root to leave alone")
    parser.add_argument("--folds", type=int, default=2, help="parts of the training images")
    parser.add_argument("--budget", type=int, default=8000, help="patches of each half")
    parser.add_argument("--dimensions", type=int, default=16, help="of the network")
    parser.add_argument("--gpu_id", type=int, default=0, help="number of the GPU; -1: the CPU")
    parser.add_argument("--results", default=results.RESULTS, help="file for the table")
    return parser.parse_args(argv)


def main(args):
    check_positive(args, ("budget", "dimensions", "folds"))
    device = choose_device(args.gpu_id)
    flags = {"gpu_id": args.gpu_id, "dimensions": args.dimensions}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = data.tissue(Path(folder) / "data", args.root, number=27)
        data.cut(root, "--val_pattern", args.val_pattern)
        pairs = {pair.name: pair for pair in find_pairs(root)}
        other = find_pairs(args.other) if args.other else []
        for fold, (learn, held_out) in study.deal(root, args.folds, confirm=False).items():
            sample = Path(tempfile.mkdtemp(dir=folder))
            study.write_set(root, sample, learn, held_out, args.budget)
            start, _ = study.call_train(sample, log=sample / "start", augment=START, **flags)
            ways = {START: [start]}
            for end in ENDS:
                going_on = {"augment": end, "init": start, "seed": 1, "lr": 1e-3, "keep": 0}
                path, _ = study.call_train(sample, log=sample / end, **going_on, **flags)
                ways |= {f"{START}, then {end}": [path], f"{end}: mean of both": [start, path]}
            for way, paths in ways.items():
                mean = checkpoints.mean_of_weights(
                    [checkpoints.load_checkpoint(path)["model"] for path in paths]
                )
                scores = [
                    study.score_checkpoint(paths[0], part, device, mean)
                    for part in ([pairs[name] for name in held_out], other)
                    if part
                ]
                found.setdefault(way, []).append(scores)
                print(f"fold {fold}, {way}: {scores}", flush=True)
    lines = []
    for way, folds in found.items():
        cells = [way]
        for part in zip(*folds, strict=True):  # at home, then on the other stain
            for key in ("dice", "count_error"):
                cells.append(study.form(statistics.mean(scores[key] for scores in part), key))
        lines.append(cells)
    header = ["training", "Dice", "contour count error"]
    header += ["Dice, other stain", "contour count error, out-of-domain"] if args.other else []
    results.write_section(
        "The end of a training",
        f"{data.source(args.root)}: {args.budget} patches with "
        f"{START} augmentation, and as many after them, width {args.dimensions}; mean over "
        f"{args.folds} folds, whole images of organs that were left out, threshold "
        f"{study.THRESHOLD}, one seed.\n\n" + results.table(header, lines),
        args.results,
    )


if __name__ == "__main__":
    run_script(main, parse_args)
