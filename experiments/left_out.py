"""How masks hold on tissue of which nothing was learned: one set after the other is left out.

    python3 -m experiments.left_out --root data/nuinsseg data/tnbc data/dsb2018 \\
        --also MoNuSeg=monuseg/tissue_images:monuseg/instance_labels \\
        --train --arch tf_efficientnet_lite0 --pretrained FILE --stain own

The sets are cut as for train.py. One network learns from all but the one left out, and is scored
on images of it, at the pixel size that its patch set has, and on those of --also.
All flags behind --train are train.py's, but for the epochs: --budget says how many patches are
shown. Writes a section of benchmarks/RESULTS.md.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import results
from experiments.study import REPOSITORY, infer
from tissue.files import InputError, Parser, run_script
from tissue.manifest import read_manifest
from tissue.masks import LABEL_FOLDER
from tissue.pairs import find_images
from tissue.splits import spread

SCORES = ("dice", "least dice", "aji", "count error")


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--root", nargs="+", required=True, help="sets, cut for train.py")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=IMAGES:MASKS")
    parser.add_argument("--images", type=int, default=32, help="of a set that are scored, at most")
    parser.add_argument("--budget", type=int, default=9000, help="patches shown in a training")
    parser.add_argument("--log", help="folder that keeps the runs; without it they are removed")
    parser.add_argument("--results", default=results.RESULTS, help="file for the section")
    parser.add_argument("--title", default="One set left out", help="of the section")
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="flags of train.py")
    return parser.parse_args(argv)


def main(args):
    if len(args.root) < 2:
        raise InputError(f"--root: found {args.root}, expected two sets or more")
    also = dict(parse_also(text) for text in args.also)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for left_out in args.root:
            others = [root for root in args.root if root != left_out]
            log = Path(args.log or folder) / Path(left_out).name
            patches = sum(read_manifest(root)["patches"]["train"] for root in others)
            epochs = max(1, round(args.budget / patches))
            command = [sys.executable, "train.py", "--log", log, *args.train, "--epoch", epochs]
            command += ["--root", *others]
            subprocess.run(list(map(str, command)), cwd=REPOSITORY, check=True)
            run = max(log.iterdir())
            own = images_of(left_out, folder / f"{Path(left_out).name}-images", args.images)
            tried = {Path(left_out).name: own} | {
                name: (*files, None) for name, files in also.items()
            }
            for number, (name, files) in enumerate(tried.items()):
                scores = score(run, *files, folder / f"{Path(left_out).name}-{number}")
                learned = " + ".join(Path(root).name for root in others)
                rows.append([learned, name, *(f"{scores[key]:.3f}" for key in SCORES)])
                print(*rows[-1], flush=True)
    text = (
        f"Mean Dice and the "
        f"least of an image, mean AJI, and mean error of the count of nuclei as a share of the "
        f"reference's, of at most {args.images} images a set; about {args.budget} patches a "
        f"training.\n\n" + results.table(["learned from", "scored on", *SCORES], rows)
    )
    results.write_section(args.title, text, args.results)


def parse_also(text: str) -> tuple[str, tuple[str, str]]:
    """The name and the two folders of an --also."""
    name, _, files = text.partition("=")
    images, _, masks = files.partition(":")
    if not (name and images and masks):
        raise InputError(f"--also: found {text!r:.80}, expected NAME=IMAGES:MASKS")
    return name, (images, masks)


def images_of(root: str, place: Path, most: int) -> tuple[Path, Path, float | None]:
    """Links to images of a set, spread over it, and to their references: (folder, folder, um)."""
    manifest = read_manifest(root)
    entries = manifest["images"]
    masks = LABEL_FOLDER if all(entry["labels"] for entry in entries) else "masks"
    for kind in ("images", masks):
        (place / kind).mkdir(parents=True)
    for entry in spread(entries, most):
        reference = entry["labels"] if masks == LABEL_FOLDER else entry["mask"]
        for kind, file in (("images", entry["image"]), (masks, reference)):
            path = (Path(root) / file).resolve()
            (place / kind / (entry["name"] + path.suffix)).symlink_to(path)
    sizes = {entry["pixel_size_um"] for entry in entries}
    return place / "images", place / masks, sizes.pop() if len(sizes) == 1 else None


def score(run: Path, images, masks, um: float | None, out: Path) -> dict[str, float]:
    """What inference.py makes of a folder of images, by the SCORES."""
    rows = infer(run, images, masks, out, um)
    assert len(rows) == len(find_images(images))
    found = [(float(row["nuclei"]), float(row["gt_nuclei"])) for row in rows]
    errors = [abs(count - truth) / truth for count, truth in found if truth]
    dice = [float(row["dice"]) for row in rows]
    aji = statistics.mean(float(row["aji"]) for row in rows if row["aji"])
    return dict(
        zip(SCORES, (statistics.mean(dice), min(dice), aji, statistics.mean(errors)), strict=True)
    )


if __name__ == "__main__":
    run_script(main, parse_args)
