"""How well the doubt of fields finds what is wrong in them, on images with masks or label maps.

    python3 -m experiments.review --images my_images/ --references my_masks/
    python3 -m experiments.review --images my_images/ --references my_label_maps/ --ckpt best.pt

For several kinds of doubt it prints Spearman's correlation with what is wrong in a field, and which
share of all that is wrong lies in the most doubtful tenth of the fields.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.ndimage import center_of_mass
from scipy.stats import spearmanr

import inference
from benchmarks import results
from learning.devices import choose_device
from learning.predictor import Predictor
from tissue import depth, nuclei, tiling, windows
from tissue.files import InputError, Parser, run_script
from tissue.pairs import find_images
from tissue.pixel_size import scale_of
from tissue.review import SHARE, Fields

WRONG = ("wrong pixels", "1 - Dice", "nuclei too many or few")
FLIPS = [(), (1,), (2,), (1, 2)]  # axes of a batch (N, H, W, 3)


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--images", required=True, help="folder with images")
    parser.add_argument("--references", required=True, help="folder with masks or label maps")
    parser.add_argument("--only", default="*", help="pattern of names, as *_01")
    parser.add_argument("--ckpt", help="checkpoint or run folder; without it the one that ships")
    parser.add_argument("--gpu_id", type=int, default=0, help="number of the GPU; -1: the CPU")
    return parser.parse_args(argv)


def main(args):
    files, references = find_images(args.images), find_images(args.references)
    files = {name: path for name, path in files.items() if Path(name).match(args.only)}
    if lonely := [str(path) for name, path in files.items() if name not in references]:
        raise InputError(f"{lonely[0]}: found no reference in {args.references}, expected one each")
    network = Predictor.load(inference.find_checkpoint(args.ckpt), choose_device(args.gpu_id))
    found = [measured(network, path, references[name]) for name, path in files.items()]
    fields = {key: np.concatenate([image[key] for image in found]) for key in found[0]}
    fields["the error itself"] = None
    wrong = {key: fields.pop(key) for key in WRONG}
    most = max(1, round(SHARE * len(wrong[WRONG[0]])))
    rows = []
    for kind, doubt in fields.items():
        row = [kind]
        for values in wrong.values():
            order = values if doubt is None else doubt
            there = values[np.argsort(-order, kind="stable")[:most]].sum() / values.sum()
            row += [f"{spearmanr(order, values).statistic:.2f}", f"{there:.1%}"]
        rows.append(row)
    print(f"{len(files)} images, {len(wrong[WRONG[0]])} fields, the most doubtful {most}\n")
    header = [title for key in WRONG for title in (f"{key}: correlation", "in the tenth")]
    print(results.table(["doubt", *header], rows))


def measured(network: Predictor, path: Path, reference: Path) -> dict[str, np.ndarray]:
    """Kinds of doubt and what is WRONG of each field of an image that has tissue, (n,) each."""
    image, truth = windows.open_image(path), windows.open_mask(reference)
    whole, um = (0, 0, image.height, image.width), image.pixel_size_um or network.pixel_size_um
    network = network.at_scale(scale_of(image.pixel_size_um, network.pixel_size_um, path))
    views = [predicted(image, network, axes) for axes in FLIPS]
    p, true = views[0][0], truth.read(*whole)
    segmented = depth.segment(views[0], network.threshold)
    has_depth = segmented.dtype != bool
    labels, confident = nuclei.find_nuclei(
        segmented > 0, um, network.split, segmented if has_depth else None
    )
    confident = np.ones(labels.max(initial=0)) if confident is None else confident
    kept = confident >= network.split.confidence
    mask = (segmented > 0) & ~np.append(False, ~kept)[labels]
    there = (
        nuclei.reference_labels(truth.numbers(*whole))
        if truth.is_label_map
        else nuclei.nuclei(true, um, nuclei.REFERENCE_SPLIT)
    )
    fields = Fields(p.shape, network.scale)

    def total(values):
        rows = np.add.reduceat(values, fields.edges[0][:-1], axis=0, dtype=float)
        return np.add.reduceat(rows, fields.edges[1][:-1], axis=1)

    def count(labels, weights):
        centres = center_of_mass(labels > 0, labels, np.arange(1, len(weights) + 1))
        centres = np.reshape(centres, (-1, 2)) + 0.5
        return np.histogram2d(*centres.T, fields.edges, weights=weights)[0]

    size, nuclear = total(np.ones(p.shape)), total(mask)
    error = count(labels, kept.astype(float)) - count(there, np.ones(there.max()))
    unsure = total((p > 0.25) & (p < 0.75))
    kinds = {
        "4 p (1 - p)": total(4 * p * (1 - p)) / size,
        "pixels with p of 0.25 to 0.75": unsure / size,
        "the same, of nuclear pixels": unsure / np.maximum(nuclear, 1),
        "nuclei expected to be wrong": has_depth
        and count(labels, np.where(kept, 1 - confident, confident)),
        "standard deviation over flips": total(np.std([view[0] for view in views], axis=0)) / size,
        "nuclear pixels": nuclear / size,
        WRONG[0]: total(mask != true),
        WRONG[1]: 1 - 2 * total(mask & true) / np.maximum(nuclear + total(true), 1),
        WRONG[2]: np.abs(error),
    }
    return {key: values[total(p) > 0] for key, values in kinds.items() if values is not False}


def predicted(image: windows.Windows, network: Predictor, axes: tuple) -> np.ndarray:
    """What a network gives for an image whose tiles it sees flipped, float32 (C, H, W)."""

    def predict(tiles, kept):
        outputs = network.predict(np.ascontiguousarray(np.flip(tiles, axes)))
        return np.flip(outputs, [axis + 1 for axis in axes])[..., *kept]

    return tiling.predict_image(image, replace(network, predict=predict))


if __name__ == "__main__":
    run_script(main, parse_args)
