"""Make the weights that ship, log/ckpt/nuclei.pt, from finished runs.

    python3 -m tools.ship_weights log/<run>/best.pt
    python3 -m tools.ship_weights log/<run>/last.pt log/<run>/last.pt --threshold 0.45

Weights of several runs are averaged (Wortsman et al. 2022, ICML, "Model soups"): that works for
runs which began at the same trained weights (`train.py --init`), and with these weights beside
them, which may be a file of this script. Keeps what inference needs, in half precision, and leaves
out what tells of the machine. All but the weights is the first run's, unless flags change it. The
pixel size is that of all of them; where they do not know it, or differ, --pixel_size must tell.
Prints what docs/model_card.md says of the file.
"""

from pathlib import Path

import numpy as np
import torch

from inference import SHIPPED
from learning.checkpoints import (
    build_model,
    check_weights,
    load_checkpoint,
    mean_of_weights,
    save_checkpoint,
    weights_of,
)
from learning.predictor import Predictor
from tissue.files import InputError, Parser, check_numbers, file_hash, run_script
from tissue.nuclei import SPLITTING, Split, changed
from tissue.pixel_size import MICROSCOPE_UM, SAME
from tissue.synthetic import draw_tissue

KEPT = ("format_version", "config", "normalisation", "channel_order", "stain", "patch_dim")
KEPT += ("bits", "epoch", "versions")
SETTINGS = ("arch", "dimensions", "loss", "stain", "augment", "sampler", "lr", "batch_size")
SETTINGS += ("epoch", "seed", "device", "precision", "compile")


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("ckpt", nargs="+", help="best.pt or last.pt of a run, or a mean of some")
    parser.add_argument("--threshold", type=float, default=0.5, help="as cross-validation found it")
    parser.add_argument(
        "--pixel_size", type=float, help="micrometres that it learned from; without it the runs'"
    )
    parser.add_argument(
        "--split", nargs="+", metavar="NAME=VALUE", default=[],
        help=f"change how touching nuclei are split: {', '.join(SPLITTING)}",
    )  # fmt: skip
    parser.add_argument("--confidence", type=float, help="below which nuclei are dropped")
    parser.add_argument(
        "--count_error", type=float, nargs=2, metavar=("MEAN", "IMAGES"),
        help="mean relative count error of so many images that were not learned",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=SHIPPED, help="file to write")
    return parser.parse_args(argv)


def main(args):
    ranges = {"threshold": (0.01, 0.99), "pixel_size": MICROSCOPE_UM, "confidence": (0, 1)}
    check_numbers(args, ranges)
    if args.out.is_dir():
        raise InputError(f"--out {args.out}: found a folder, expected a file to write")
    checkpoints = [load_checkpoint(path) for path in args.ckpt]
    for path, checkpoint in zip(args.ckpt, checkpoints, strict=True):
        for key in ("config", "normalisation", "channel_order"):
            if checkpoint[key] != checkpoints[0][key]:
                raise InputError(
                    f"{path}: found {key} {checkpoint[key]}, expected {checkpoints[0][key]}, that "
                    f"of {args.ckpt[0]}; average runs of one network"
                )
    split = changed(Split(**checkpoints[0]["split"]), args.split)
    if args.confidence is not None:
        split = split._replace(confidence=args.confidence)
    weights = mean_of_weights([checkpoint["model"] for checkpoint in checkpoints])
    shipped = {key: checkpoints[0][key] for key in KEPT if key in checkpoints[0]} | {
        "pixel_size_um": args.pixel_size or common_pixel_size(args.ckpt, checkpoints),
        "args": [run for checkpoint in checkpoints for run in runs_of(checkpoint)],
        "threshold": args.threshold,
        "split": split._asdict(),
        "model": {k: v.half() if v.is_floating_point() else v for k, v in weights.items()},
    }
    if args.count_error:
        mean, images = args.count_error
        shipped["count_error"] = {"mean": mean, "images": int(images)}
    name = f"{args.out}, in half precision"  # what is too large for it is infinite
    check_weights(shipped["model"], weights_of(shipped["config"], name), name)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(args.out, shipped)

    image = draw_tissue(512, 512, seed=0).image[None]
    device = torch.device("cpu")
    before, after = (
        Predictor.of(build_model(checkpoint), checkpoint, device).predict(image)
        for checkpoint in (shipped | {"model": weights}, load_checkpoint(args.out))
    )
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    print(f"SHA-256 {file_hash(args.out)}")
    print(f"half precision moves probabilities by at most {np.abs(before - after).max():.1e}")


def common_pixel_size(paths: list[str], checkpoints: list[dict]) -> float:
    """The mean pixel size of checkpoints, micrometres; InputError where one has none, or they
    differ: without it no image would be resampled.
    """
    sizes = [checkpoint["pixel_size_um"] for checkpoint in checkpoints]
    for path, size in zip(paths, sizes, strict=True):
        if size is None or abs(size / (sizes[0] or size) - 1) > SAME:
            raise InputError(
                f"{path}: found a pixel size of {size} um, expected one that is known and within "
                f"{SAME:.0%} of that of {paths[0]}; give --pixel_size"
            )
    return sum(sizes) / len(sizes)


def runs_of(checkpoint: dict) -> list[dict]:
    """The settings of the run, or runs, whose weights a checkpoint has."""
    args = checkpoint.get("args", {})
    return args if isinstance(args, list) else [{key: args.get(key) for key in SETTINGS}]


if __name__ == "__main__":
    run_script(main, parse_args)
