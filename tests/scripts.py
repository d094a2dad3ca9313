"""The scripts as the tests call them: on small data, with small settings."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import inference
import preprocess
import train
from learning import checkpoints
from model import IMAGENET_MEAN, IMAGENET_STD
from tissue.masks import read_mask

REPOSITORY = Path(__file__).parent.parent
SMALL = ["--patch_dim", "32", "--patch_stride", "16", "--val_pattern", "*04"]


def cut(root, *more):
    preprocess.main(preprocess.parse_args(["--root", str(root), *SMALL, *more]))


def learn(root, log, *more):
    """Train a tiny network and return its run folder."""
    before = set(log.glob("*"))
    arguments = ["--root", root, "--log", log, "--gpu_id", -1, "--dimensions", 4, "--epoch", 2]
    train.main(train.parse_args([str(a) for a in [*arguments, "--workers", 0, *more]]))
    (run,) = set(log.glob("*")) - before
    return run


def infer(results, *more):
    arguments = ["--image_folder", results, "--gpu_id", -1, *more]
    inference.main(inference.parse_args([str(a) for a in arguments]))


def call(folder, code, arguments, processes):
    """Run Python code on one process, or under torchrun on several."""
    script = folder / "script.py"
    script.write_text(code)
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        "--",
    ]
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), str(script), *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def checkpoint_of(model):
    """A checkpoint of a network as it is, with nothing that it can do without."""
    return {
        "format_version": checkpoints.CHECKPOINT_VERSION,
        "model": model.state_dict(),
        "config": model.config,
        "normalisation": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        "channel_order": "rgb",
        "threshold": 0.5,
    }


def fingerprint(folder):
    """Names, contents and times of all files below a folder."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def table_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def dice_of(prediction, reference):
    """Dice of two files of masks, counted pixel by pixel; 1 where both are empty."""
    one, two = read_mask(prediction), read_mask(reference)
    both, total = int((one & two).sum()), int(one.sum()) + int(two.sum())
    return 2 * both / total if total else 1.0
