"""What stain, sampling, augmentation, network, loss, averaged weights and --tta are worth.

    python3 -m experiments.ablation --root cryonuseg --other monuseg
    python3 -m experiments.ablation --root cryonuseg --runs plain strong --seeds 0 1 2
    python3 -m experiments.ablation --root cryonuseg --runs plain strong --confirm

Every training is shown the same number of patches, --budget. It is scored on whole images that it
has not seen: the training images are dealt into folds by organ (what stands before the last `_` of
their names), and each fold is left out once. With --confirm the chosen runs learn from all training
images and are scored on the validation images; look at those once, when all is decided.

Each finished training is added to docs/ablation.csv, and what is there is not trained again, so
that the study goes on where it was stopped. Writes docs/ablation.md and docs/ablation.png, and
leaves what is written in the former under "What was learned" as it is.
"""

import csv
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import data, results
from experiments.study import (
    CONFIRM,
    REPOSITORY,
    THRESHOLD,
    call_train,
    deal,
    form,
    score_checkpoint,
    write_set,
)
from learning import checkpoints
from learning.devices import choose_device
from tissue import patches
from tissue.files import Parser, check_positive, replacing, run_script, write_table
from tissue.pairs import find_pairs

PLAIN = {"sampler": "uniform", "augment": "basic", "arch": "unet", "loss": "bce", "stain": "none"}
RUNS = {  # in what each differs from the plain recipe: one factor at a time, then combinations
    "plain": {},
    "balanced": {"sampler": "balanced"},
    "moderate": {"augment": "moderate"},
    "strong": {"augment": "strong"},
    "lite0": {"arch": "tf_efficientnet_lite0"},
    "bce_dice": {"loss": "bce_dice"},
    "stain normalisation": {"stain": "reinhard"},
    "balanced, bce_dice": {"sampler": "balanced", "loss": "bce_dice"},
    "moderate, bce_dice": {"augment": "moderate", "loss": "bce_dice"},
    "bce_dice, stain normalisation": {"loss": "bce_dice", "stain": "reinhard"},
    "moderate, bce_dice, stain normalisation": {
        "augment": "moderate", "loss": "bce_dice", "stain": "reinhard",
    },
    "strong, balanced": {"augment": "strong", "sampler": "balanced"},
    "strong, bce_dice": {"augment": "strong", "loss": "bce_dice"},
    "strong, balanced, bce_dice": {
        "augment": "strong", "sampler": "balanced", "loss": "bce_dice",
    },
    "strong, lite0": {"augment": "strong", "arch": "tf_efficientnet_lite0"},
    "strong, pretrained": {
        "augment": "strong", "arch": "tf_efficientnet_lite0", "pretrained": "imagenet",
    },
}  # fmt: skip
# What makes two rows of the CSV comparable; what names a training; how it was scored; the scores.
STUDY = ("patch_set", "dimensions", "patches")
TRAINING = ("run", "seed", "fold")
EVALUATION = ("ema", "tta")
SCORES = {
    "dice": "Dice",
    "worst_dice": "worst Dice",
    "accuracy": "accuracy",
    "count_error": "mean relative count error",
    "count_bias": "count bias",
    "other_dice": "Dice, other stain",
    "other_count_error": "mean relative count error, out-of-domain",
}
COLUMNS = (*STUDY, *TRAINING, *PLAIN, *EVALUATION, *SCORES, "train_seconds")
LEARNED = "## What was learned\n"


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--root", help="folder with own images and masks; without it drawn ones")
    parser.add_argument("--other", help="folder of another stain, on which all runs are scored too")
    parser.add_argument("--val_pattern", default="*03.tif", help="validation images of --root")
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, metavar="RUN",
        default=[name for name in RUNS if "pretrained" not in name],  # it needs the network
        help=f"which to train: {'; '.join(RUNS)}",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of each run")
    parser.add_argument("--folds", type=int, default=2, help="parts of the training images")
    parser.add_argument("--budget", type=int, default=12_000, help="patches shown in a training")
    parser.add_argument("--dimensions", type=int, default=16, help="of the networks")
    parser.add_argument(
        "--confirm", action="store_true", help="learn from all folds, score the validation images"
    )
    parser.add_argument("--gpu_id", type=int, default=0, help="number of the GPU; -1: the CPU")
    parser.add_argument("--results", default=REPOSITORY / "docs", help="folder for what is written")
    return parser.parse_args(argv)


def main(args):
    check_positive(args, ("budget", "dimensions", "folds"))
    device = choose_device(args.gpu_id)
    output = Path(args.results)
    with tempfile.TemporaryDirectory() as folder:
        root = data.tissue(Path(folder) / "data", args.root, number=27)
        data.cut(root, "--val_pattern", args.val_pattern)
        pairs = {pair.name: pair for pair in find_pairs(root)}
        other = find_pairs(args.other) if args.other else []
        study = dict(
            zip(STUDY, (patches.set_hash(root)[:12], args.dimensions, args.budget), strict=True)
        )
        folds = deal(root, args.folds, args.confirm)
        todo = [(r, s, f) for s in args.seeds for r in args.runs for f in folds]  # seed by seed
        for run, seed, fold in todo:
            training = study | {"run": run, "seed": seed, "fold": fold}
            if any(
                all(row[key] == str(value) for key, value in training.items())
                for row in read_rows(output)
            ):
                continue
            learn, held_out = folds[fold]
            sample = Path(tempfile.mkdtemp(dir=folder))
            write_set(root, sample, learn, held_out, args.budget)
            machine = {"gpu_id": args.gpu_id, "dimensions": args.dimensions, "seed": seed}
            last, seconds = call_train(sample, **machine, **(PLAIN | RUNS[run]))
            settings = training | PLAIN | RUNS[run] | {"train_seconds": f"{seconds:.1f}"}
            seen = [pairs[name] for name in held_out]
            scored = list(evaluate(last, seen, other, device))
            rows = read_rows(output)  # again: another process may have added to it
            rows += [settings | evaluation | scores for evaluation, scores in scored]
            texts = [{key: row.get(key) for key in COLUMNS} for row in rows]
            write_table(output / "ablation.csv", COLUMNS, texts)
            write_report(output, args, study, rows)
    write_report(output, args, study, read_rows(output))


def evaluate(path: Path, held_out: list, other: list, device: torch.device):
    """Scores with and without averaged weights, with these and --tta: what was done and scores.

    The last weights are scored and not those of the best epoch, which would be chosen by looking.
    """
    checkpoint = checkpoints.load_checkpoint(path)
    for ema, tta in (("no", "no"), ("yes", "no"), ("yes", "yes")):
        weights = checkpoint["model"] if ema == "yes" else checkpoint["training"]["model"]
        how = {"weights": weights, "tta": tta == "yes"}
        scores = score_checkpoint(path, held_out, device, **how)
        if other:
            theirs = score_checkpoint(path, other, device, **how)
            scores |= {f"other_{key}": theirs[key] for key in ("dice", "count_error")}
        rounded = {key: f"{value:.4f}" for key, value in scores.items()}
        yield {"ema": ema, "tta": tta}, dict.fromkeys(SCORES, "") | rounded


# --- record and tell ----------------------------------------------------------------------------


def read_rows(output: Path) -> list[dict]:
    """What was measured so far, all values as text."""
    path = output / "ablation.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_report(output: Path, args, study: dict, rows: list[dict]) -> None:
    """Write ablation.md and ablation.png from the rows of this study."""
    rows = [row for row in rows if all(row[key] == str(study[key]) for key in STUDY)]
    path = output / "ablation.md"
    old = path.read_text(encoding="utf-8") if path.is_file() else f"{LEARNED}\n(not yet written)\n"
    learned = old[old.index(LEARNED) :]
    folds = [row for row in rows if row["fold"] != CONFIRM]
    confirmed = [row for row in rows if row["fold"] == CONFIRM]
    text = [
        "# What sampling, augmentation, network and loss are worth",
        f"`{results.command_line()}`",
        f"{data.source(args.root)}: {args.budget} patches a training, width {args.dimensions}, "
        f"scored on whole images of organs that it has not seen, at threshold {THRESHOLD}. Every "
        f"training is in `ablation.csv`.",
    ]
    if folds:
        text += [
            "## Trainings",
            "Means over folds and seeds (n), with averaged weights, without `--tta`.",
            table_of_runs(folds),
            "![Differences from the plain recipe](ablation.png)",
            "*Differences from the plain recipe of the same fold and seed: each a dot, their mean "
            "a bar.*",
            "## With averaged weights and `--tta`, against the plain recipe without both",
            "Gains in Dice over the same fold and seed: their mean, the means of single seeds, and "
            "single trainings.",
            table_of_gains(folds),
            "## Averaged weights and `--tta`",
            "Mean change by each, over all trainings.",
            table_of_evaluations(folds),
        ]
        draw(output, folds)
    if confirmed:
        text += ["## On the validation images", table_of_runs(confirmed)]
    text += [results.machine_line(), learned]
    with replacing(path) as beside:
        beside.write_text("\n\n".join(text), encoding="utf-8")


def select(rows: list[dict], **wanted: str) -> dict[tuple, dict]:
    """The rows with these values, by fold and seed."""
    return {
        (row["fold"], row["seed"]): row
        for row in rows
        if all(row[key] == value for key, value in wanted.items())
    }


def mean(rows: Sequence[dict], key: str) -> str:
    """The mean of a column for people; empty where it was not measured."""
    values = [float(row[key]) for row in rows if row[key] != ""]
    if not values:
        return ""
    return form(statistics.mean(values), key)


def measured(rows: list[dict]) -> dict[str, str]:
    """The scores that these rows have, with their names for people."""
    return {key: name for key, name in SCORES.items() if any(row[key] != "" for row in rows)}


def table_of_runs(rows: list[dict]) -> str:
    """A Markdown table, a line a run."""
    names, lines = measured(rows), []
    for run in RUNS:
        its = list(select(rows, run=run, ema="yes", tta="no").values())
        if its:
            seconds = statistics.mean(float(row["train_seconds"]) for row in its)
            lines.append((run, len(its), *(mean(its, key) for key in names), f"{seconds:.0f}"))
    return results.table(("run", "n", *names.values(), "seconds"), lines)


def table_of_gains(rows: list[dict]) -> str:
    """A Markdown table of what all gives over nothing, a line a run."""
    plain = select(rows, run="plain", ema="no", tta="no")
    lines = []
    for run in RUNS:
        its = select(rows, run=run, ema="yes", tta="yes")
        gains = {
            place: float(row["dice"]) - float(plain[place]["dice"])
            for place, row in its.items()
            if place in plain
        }
        if not gains:
            continue
        seeds = sorted({seed for _, seed in gains})
        of_seeds = [
            statistics.mean(gain for (_, seed), gain in gains.items() if seed == its_seed)
            for its_seed in seeds
        ]
        spans = (f"{min(v):+.4f} to {max(v):+.4f}" for v in (of_seeds, gains.values()))
        scores = (mean(its.values(), key) for key in ("dice", "worst_dice", "count_error"))
        lines.append((run, len(seeds), *scores, f"{statistics.mean(gains.values()):+.4f}", *spans))
    header = (
        "run",
        "seeds",
        "Dice",
        "worst Dice",
        "mean relative count error",
        "gain",
        "of seeds",
        "of trainings",
    )
    return results.table(header, lines)


def table_of_evaluations(rows: list[dict]) -> str:
    """A Markdown table of what averaged weights and --tta change, a line each."""
    names, lines = measured(rows), []
    ways = {
        "averaged weights": ({"ema": "yes", "tta": "no"}, {"ema": "no", "tta": "no"}),
        "`--tta`": ({"ema": "yes", "tta": "yes"}, {"ema": "yes", "tta": "no"}),
    }
    for way, (with_it, without) in ways.items():
        changes = {key: [] for key in names}
        for run in RUNS:
            before = select(rows, run=run, **without)
            for place, row in select(rows, run=run, **with_it).items():
                for key, values in changes.items():
                    if row[key] != "":
                        values.append(float(row[key]) - float(before[place][key]))
        lines.append((way, *(form(statistics.mean(v), key) for key, v in changes.items())))
    return results.table(("change by", *names.values()), lines)


def draw(output: Path, rows: list[dict]) -> None:
    """Draw each run's differences from the plain recipe, a panel a score."""
    shown = ("dice", "count_error", "other_dice", "other_count_error")
    keys = [key for key in shown if key in measured(rows)]
    plain = select(rows, run="plain", ema="yes", tta="no")
    runs = [run for run in RUNS if run != "plain" and select(rows, run=run)]
    figure = Figure(figsize=(3.2 * len(keys) + 2, 0.4 * len(runs) + 1.5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(keys), sharey=True))
    for axis, key in zip(axes, keys, strict=True):
        for height, run in enumerate(runs):
            its = select(rows, run=run, ema="yes", tta="no")
            changes = [
                float(row[key]) - float(plain[place][key])
                for place, row in its.items()
                if place in plain
            ]
            if changes:
                axis.barh(height, statistics.mean(changes), color="lightsteelblue")
                axis.plot(changes, [height] * len(changes), "o", color="navy", markersize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(SCORES[key])
    axes[0].set_yticks(range(len(runs)), runs)
    axes[0].invert_yaxis()
    with replacing(output / "ablation.png") as path:
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_script(main, parse_args)
