"""What margins and pixel sizes of other people's files cost: Dice of the same images changed.

    python3 -m benchmarks.elsewhere --images val/images --masks val/masks --um 0.25

Each image is predicted as it is, with margins of half its size around it (white, black, two greys;
as PNG, and as JPEG), turned by 20 degrees with black corners, and resampled to 0.5 and 0.125
micrometres. Masks of changed images are compared with masks changed alike. Writes a section of
benchmarks/RESULTS.md.
"""

import statistics

import cv2
import numpy as np
import torch

import inference
from benchmarks import results
from learning.predictor import Predictor
from tissue import tiling
from tissue.files import InputError, Parser, run_script
from tissue.images import read_image
from tissue.masks import read_mask
from tissue.pairs import find_images
from tissue.pixel_size import scale_of
from tissue.windows import from_array

MARGINS = {"white": 255, "black": 0, "grey": 128, "light grey": 210}
MIRRORED = "turned, mirrored edges"  # what the next one is to be compared with
QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 90]


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--masks", required=True, help="folder of their masks")
    parser.add_argument("--um", type=float, default=0.25, help="pixel size of the images")
    parser.add_argument("--ckpt", help="checkpoint or run folder; without it the shipped weights")
    parser.add_argument("--results", default=results.RESULTS, help="file for the section")
    return parser.parse_args(argv)


def main(args):
    path = inference.find_checkpoint(args.ckpt)
    network = Predictor.load(path, torch.device("cpu"))

    def predict(image, um):
        scale = scale_of(um, network.pixel_size_um, "an image")
        return (
            tiling.predict_image(from_array(image), network.at_scale(scale))[0] >= network.threshold
        )

    masks = find_images(args.masks)
    table = {}
    for name, file in find_images(args.images).items():
        if name not in masks:
            raise InputError(f"{file}: found no mask of that name in {args.masks}")
        image, truth = read_image(file), read_mask(masks[name])
        for way, (changed, its_truth, inside, um) in changes(image, truth, args.um).items():
            mask = predict(changed, um)
            outside = 0 if way == MIRRORED else np.count_nonzero(mask & ~inside)
            table.setdefault(way, []).append((dice(mask & inside, its_truth), outside))
        print(name, {way: round(found[-1][0], 4) for way, found in table.items()}, flush=True)
    rows = [
        [
            way,
            f"{statistics.mean(d for d, _ in found):.4f}",
            f"{max(abs(d - own) for (d, _), (own, _) in zip(found, table['as it is'], strict=True)):.4f}",  # noqa: E501
            sum(outside for _, outside in found),
        ]
        for way, found in table.items()
    ]
    text = (
        f"Mean Dice of {len(masks)} "
        f"images, the largest difference of one image to itself unchanged, and pixels of margins "
        f"and corners that became mask.\n\n"
        + results.table(["images", "Dice", "largest difference", "pixels outside"], rows)
    )
    results.write_section("Margins and pixel sizes", text, args.results)


def changes(image, truth, um) -> dict[str, tuple]:
    """For each way: the image changed, its mask, where it shows the image, and its pixel size."""
    height, width = truth.shape
    everywhere = np.ones_like(truth)
    found = {"as it is": (image, truth, everywhere, um)}
    top, left = height // 2, width // 2
    place = np.s_[top : top + height, left : left + width]
    inside = np.zeros((2 * height, 2 * width), bool)
    inside[place] = True
    its_truth = np.zeros_like(inside)
    its_truth[place] = truth
    for name, value in MARGINS.items():
        page = np.full((*inside.shape, 3), value, np.uint8)
        page[place] = image
        found[f"{name} margins"] = page, its_truth, inside, um
        found[f"{name} margins, JPEG"] = as_jpeg(page), its_truth, inside, um
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), 20, 1)
    turn[:, 2] += width / 4, height / 4
    size = width * 3 // 2, height * 3 // 2
    its_truth, inside = (
        cv2.warpAffine(m.astype(np.uint8), turn, size, flags=cv2.INTER_NEAREST) > 0
        for m in (truth, everywhere)
    )
    mirrored = cv2.warpAffine(image, turn, size, borderMode=cv2.BORDER_REFLECT_101)
    found[MIRRORED] = mirrored, its_truth, inside, um
    found["turned, black corners"] = cv2.warpAffine(image, turn, size), its_truth, inside, um
    for factor, how in ((0.5, cv2.INTER_AREA), (2.0, cv2.INTER_CUBIC)):
        size = round(width * factor), round(height * factor)
        its_truth = cv2.resize(truth.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
        changed = cv2.resize(image, size, interpolation=how)
        found[f"at {um / factor:g} um"] = changed, its_truth, its_truth | True, um / factor
    return found


def as_jpeg(image):
    encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), QUALITY)[1]
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)


def dice(mask, truth):
    both = np.count_nonzero(mask) + np.count_nonzero(truth)
    return 2 * np.count_nonzero(mask & truth) / both if both else 1.0


if __name__ == "__main__":
    run_script(main, parse_args)
