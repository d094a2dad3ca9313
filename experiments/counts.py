"""How far counts of nuclei and of contours are from the annotators', on images with label maps.

    python3 -m experiments.counts --images my_images/ --labels my_label_maps/
    python3 -m experiments.counts --images my_images/ --labels my_label_maps/ --ckpt best.pt

Without --ckpt it counts on the reference's own masks (labels > 0), with it on the network's. Split
parameters are the defaults, and those that are best on all other images (leave one image out).
"""

import numpy as np

import inference
from benchmarks import results
from learning.devices import choose_device
from learning.predictor import Predictor
from tissue import agreement, nuclei, tiling, windows
from tissue.files import InputError, Parser, run_script
from tissue.masks import read_label_map
from tissue.pairs import find_images
from tissue.pixel_size import pixel_size_um


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--images", required=True, help="folder with images")
    parser.add_argument("--labels", required=True, help="folder with their label maps")
    parser.add_argument("--ckpt", help="checkpoint or run folder; without it reference masks")
    parser.add_argument("--tta", action="store_true", help="as inference.py's")
    parser.add_argument("--gpu_id", type=int, default=0, help="number of the GPU; -1: the CPU")
    parser.add_argument("--name", default="", help="added to the section's title")
    parser.add_argument("--results", default=results.RESULTS, help="file for the table")
    return parser.parse_args(argv)


def main(args):
    files, label_maps = find_images(args.images), find_images(args.labels)
    truths, sizes = [], []
    for name, path in files.items():
        label_map = read_label_map(label_maps[name]) if name in label_maps else None
        if label_map is None:
            raise InputError(f"{path}: found no label map of that name in {args.labels}")
        truths.append(nuclei.reference_labels(label_map))
        sizes.append(pixel_size_um(path))
    if args.ckpt:
        masks, default = predictions(args, files), nuclei.PREDICTION_SPLIT
    else:
        masks, default = [truth > 0 for truth in truths], nuclei.REFERENCE_SPLIT
    counts = [int(truth.max(initial=0)) for truth in truths]

    rows, columns = [], []
    for i, (name, truth) in enumerate(zip(files, truths, strict=True)):
        others = [j for j in range(len(masks)) if j != i]
        errors = nuclei.count_errors(
            *([values[j] for j in others] for values in (masks, counts, sizes)), default
        )
        chosen = min(errors, key=errors.get, default=default)
        labels, left_out = (nuclei.nuclei(masks[i], sizes[i], s) for s in (default, chosen))
        table = agreement.overlap(labels, truth)
        scores = agreement.aji(table), agreement.panoptic_quality(table)["pq"]
        dice = 2 * (masks[i] & (truth > 0)).sum() / max(1, masks[i].sum() + (truth > 0).sum())
        found = len(nuclei.contours(masks[i])), int(labels.max()), int(left_out.max())
        columns.append((*found, dice, *scores))
        rows.append([name, counts[i], *found, *(f"{score:.4f}" for score in (dice, *scores))])
    of_images = list(zip(*columns, strict=True))
    agreed = [agreement.count_agreement(found, counts) for found in of_images[:3]]
    means = [f"{np.mean(values):.4f}" for values in of_images[3:]]
    for title, key, form in (
        ("mean error", "mean_relative_error", "{:.1%}"), ("bias", "bias", "{:+.1f}"),
        ("lower limit", "lower", "{:+.1f}"), ("upper limit", "upper", "{:+.1f}"),
    ):  # fmt: skip
        errors = [form.format(found[key]) for found in agreed]
        rows.append([title, "", *errors, *(means if key == "mean_relative_error" else [""] * 3)])
    header = ("image", "annotated", "contours", "nuclei", "nuclei, left out", "Dice", "AJI", "PQ")
    masks_of = "a network's predictions" if args.ckpt else "the reference's own masks"
    text = (
        f"Counts on {masks_of}. Nuclei are split by the defaults, and ('left out') by the "
        "parameters that are best on all other images. Mean error: of |count - annotated| / "
        f"annotated. Limits of agreement: 95 %.\n\n{results.table(header, rows)}"
    )
    title = "Counts on predictions" if args.ckpt else "Counts on reference masks"
    results.write_section(f"{title}{args.name and f', {args.name}'}", text, args.results)


def predictions(args, files) -> list[np.ndarray]:
    """The masks of a network, bool (H, W) each."""
    path = inference.find_checkpoint(args.ckpt)
    network = Predictor.load(path, choose_device(args.gpu_id), args.tta)
    return [
        tiling.predict_image(windows.open_image(file), network)[0] >= network.threshold
        for file in files.values()
    ]


if __name__ == "__main__":
    run_script(main, parse_args)
