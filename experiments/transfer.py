"""What the shipped weights are worth to someone with a few annotated images of their own.

    python3 -m experiments.transfer --root monuseg
    python3 -m experiments.transfer --root monuseg --learn 2 4 --budget 3000

Learns from 2 and from 4 images, once from random weights and once from --init, with equal budgets,
and scores the other images whole, beside what --init scores without learning.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import inference
from benchmarks import data, results
from experiments import study
from learning import checkpoints
from learning.devices import choose_device
from tissue.files import InputError, check_positive, run_script
from tissue.pairs import find_pairs


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", help="folder with own images and masks; without it drawn ones")
    parser.add_argument("--init", default=inference.SHIPPED, help="weights to start from")
    parser.add_argument("--learn", type=int, nargs="+", default=[2, 4], help="images learned from")
    parser.add_argument("--draws", type=int, default=3, help="choices of images to learn from")
    parser.add_argument("--budget", type=int, default=3000, help="patches shown in a training")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of both")
    parser.add_argument("--augment", default="moderate", help="as train.py has it")
    parser.add_argument("--gpu_id", type=int, default=0, help="number of the GPU; -1: the CPU")
    parser.add_argument("--results", default=results.RESULTS, help="file for the table")
    return parser.parse_args(argv)


def main(args):
    check_positive(args, ("draws", "budget", "lr"))
    device = choose_device(args.gpu_id)
    start = Path(args.init).resolve()
    checkpoint = checkpoints.load_checkpoint(start)
    flags = {key: checkpoint["config"][key] for key in ("arch", "dimensions")}
    flags |= {"stain": "reinhard" if checkpoint["stain"] else "none", "augment": args.augment}
    flags |= {"lr": args.lr, "gpu_id": args.gpu_id}
    lines, margins = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = data.tissue(Path(folder) / "data", args.root, number=6)
        pairs = find_pairs(root)
        if not all(0 < number < len(pairs) for number in args.learn):
            raise InputError(f"--learn: found {args.learn}, expected 1 to {len(pairs) - 1} images")
        data.cut(root, "--val_pattern", pairs[0].name)  # dealt anew below
        for number in args.learn:
            found = {way: [] for way in ("unchanged", "from scratch", "fine-tuned")}
            for draw in range(args.draws):
                chosen = [pairs[(draw * number + i) % len(pairs)] for i in range(number)]
                held_out = [pair for pair in pairs if pair not in chosen]
                sample = root.parent / f"{number}-{draw}"
                names = ([pair.name for pair in part] for part in (chosen, held_out))
                sample.mkdir()
                study.write_set(root, sample, *names, args.budget)
                found["unchanged"].append(study.score_checkpoint(start, held_out, device))
                for way, init in (("from scratch", None), ("fine-tuned", start)):
                    log = sample / way
                    last, _ = study.call_train(sample, log=log, init=init, seed=draw, **flags)
                    found[way].append(study.score_checkpoint(last, held_out, device))
                    print(f"{number} images, draw {draw + 1}, {way}: {found[way][-1]}", flush=True)
            gains = [
                tuned["dice"] - scratch["dice"]
                for tuned, scratch in zip(found["fine-tuned"], found["from scratch"], strict=True)
            ]
            margins.append(
                f"From {number} images, fine-tuning is {statistics.mean(gains):+.4f} Dice better "
                f"than from scratch ({min(gains):+.4f} to {max(gains):+.4f})."
            )
            for way, scores in found.items():
                dice = [its["dice"] for its in scores]
                error = statistics.mean(its["count_error"] for its in scores)
                spread = f"{min(dice):.4f} to {max(dice):.4f}"
                lines.append((number, way, f"{statistics.mean(dice):.4f}", spread, f"{error:.1%}"))
    results.write_section(
        "A few images of one's own",
        f"`python3 -m experiments.transfer`, {data.source(args.root)}: {args.budget} patches a "
        f"training at a highest rate of {args.lr:g}, {args.augment} augmentation; mean over "
        f"{args.draws} choices of images, scored on all the other images, whole.\n\n"
        + results.table(
            ("learned from", "weights", "Dice", "of choices", "contour count error"), lines
        )
        + "\n\n"
        + " ".join(margins),
        args.results,
    )


if __name__ == "__main__":
    run_script(main, parse_args)
