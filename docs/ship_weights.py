"""Make the weights that ship, log/ckpt/nuclei_unet.pt, from a finished run.

    python3 docs/ship_weights.py log/<run>/last.pt --threshold 0.45

Keeps what inference needs, the weights in half precision, and leaves out what tells of the machine.
Prints what docs/model_card.md says of the file.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import utils
from inference import SHIPPED
from tissue.files import file_hash, run_script
from tissue.nuclei import PREDICTION_SPLIT
from tissue.synthetic import draw_tissue

KEPT = ("format_version", "config", "normalisation", "channel_order", "patch_dim")
KEPT += ("pixel_size_um", "epoch", "versions")
SETTINGS = ("arch", "dimensions", "loss", "augment", "sampler", "lr", "batch_size", "epoch", "seed")
SETTINGS += ("device", "precision", "compile")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ckpt", help="best.pt or last.pt of a run")
    parser.add_argument("--threshold", type=float, default=0.5, help="as cross-validation found it")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="file to write")
    return parser.parse_args(argv)


def main(args):
    checkpoint = utils.load_checkpoint(args.ckpt)
    shipped = {key: checkpoint[key] for key in KEPT}
    shipped["args"] = {key: checkpoint["args"][key] for key in SETTINGS}
    shipped["threshold"] = args.threshold
    shipped["split"] = PREDICTION_SPLIT._asdict()
    shipped["model"] = {
        key: value.half() if value.is_floating_point() else value
        for key, value in checkpoint["model"].items()
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    utils.save_checkpoint(args.out, shipped)

    image = draw_tissue(512, 512, seed=0).image[None]
    device = torch.device("cpu")
    before, after = (
        utils.predictor(utils.build_model(weights, args.out), weights, device)(image)
        for weights in (checkpoint, utils.load_checkpoint(args.out))
    )
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    print(f"SHA-256 {file_hash(args.out)}")
    print(f"half precision moves probabilities by at most {np.abs(before - after).max():.1e}")


if __name__ == "__main__":
    run_script(main, parse_args)
