"""How much tissue is taken for artefacts, and how much of drawn artefacts is found.

    python3 -m experiments.artefacts --root data_1/ data_2/

The annotated images of each slide (those whose names differ in their last number) are laid side by
side, with glass around, until there is a square millimetre. In it tissue/artefacts.py looks for
artefacts: of all nuclei that are annotated, those are lost that are not taken as tissue. Then ink,
folds of two and of three layers, blur and a black margin are drawn over it.
"""

import math
import re
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
from scipy import ndimage

from tissue import artefacts, masks, pairs
from tissue.files import Parser, run_script
from tissue.images import read_image
from tissue.windows import from_array

MARGIN = 256  # pixels of glass
INKS = {"black": (50, 50, 55), "blue": (40, 70, 160), "green": (30, 130, 80), "red": (200, 40, 60)}
BLURS = 2.0, 3.0, 5.0  # micrometres; standard deviations


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--root", nargs="+", required=True, help="folders as preprocess.py has")
    parser.add_argument("--pixel_size", type=float, default=0.25, help="micrometres, of all images")
    return parser.parse_args(argv)


def main(args):
    lost, found = defaultdict(lambda: np.zeros(len(artefacts.CLASSES), int)), defaultdict(list)
    um = args.pixel_size
    for root in args.root:
        for slide, members in slides_of(root).items():
            image, y, x = mosaic(members, round(artefacts.SIDE_UM / um))
            classes = artefacts.find(from_array(image), um)
            lost[root] += np.bincount(at(classes, image, y, x), minlength=len(lost[root]))
            drawn, truth = with_artefacts(image, um)
            classes = artefacts.find(from_array(drawn), um)
            y, x = np.mgrid[0 : len(image) : 16, 0 : len(image) : 16].reshape(2, -1)
            seen = at(classes, image, y, x)
            for name, mask in truth.items():
                own = seen[mask[::16, ::16].ravel()]
                kind = artefacts.CLASSES.index(name.split()[0])
                found[name].append(((own > 1).mean(), (own == kind).mean()))
            print(root, slide, lost[root])
    print("\n| nuclei | all |", " | ".join(artefacts.CLASSES), "|")
    for root, counts in {**lost, "all": sum(lost.values())}.items():
        shares = (f"{count / counts.sum():.3%}" for count in counts)
        print(f"| {Path(root).name} | {counts.sum()} |", " | ".join(shares), "|")
    print("\n| drawn | left out, mean over slides | least | by its own name |")
    for name, values in found.items():
        (left_out, own), least = np.mean(values, axis=0), np.min(values, axis=0)[0]
        print(f"| {name} | {left_out:.1%} | {least:.1%} | {own:.1%} |")


def slides_of(root):
    """(image, label map) of the images of each slide, by its name."""
    members = defaultdict(list)
    images = pairs.find_images(Path(root) / pairs.IMAGE_FOLDER)
    labels = pairs.label_folder(Path(root))
    if not labels:
        labels = {pair.name: pair.mask for pair in pairs.find_pairs(root)}
    for name, path in images.items():
        label_map = masks.read_label_map(labels[name])
        if label_map is None:
            label_map = ndimage.label(masks.read_mask(labels[name]))[0]
        members[re.sub(r"[_-]*\d+$", "", name)].append((read_image(path), label_map))
    return members


def mosaic(members, side):
    """(RGB uint8 of a square of `side` pixels or more with glass around, y and x of its nuclei)

    The darkest images lie together in a corner, so that dense tissue is no speck.
    """
    members = sorted(members, key=lambda member: member[0][..., 2].mean())
    size = min(min(image.shape[:2]) for image, _ in members)
    count = max(-(-side // size), math.isqrt(len(members)))
    white = np.percentile(np.stack([i[:size:4, :size:4] for i, _ in members]), 99.9, (0, 1, 2))
    whole = np.full((count * size + 2 * MARGIN,) * 2 + (3,), white, np.uint8)
    places, centres = [], {}
    for number, (row, column) in enumerate(
        sorted(np.ndindex(count, count), key=lambda place: place[0] ** 2 + place[1] ** 2)
    ):
        which = number * len(members) // count**2
        image, label_map = (values[:size, :size] for values in members[which])
        if which not in centres:
            ids = np.unique(label_map[label_map > 0])
            centres[which] = ndimage.center_of_mass(label_map > 0, label_map, ids)
        top, left = row * size + MARGIN, column * size + MARGIN
        whole[top : top + size, left : left + size] = image
        places += [(top + y, left + x) for y, x in centres[which]]
    return whole, *np.array(places).reshape(-1, 2).T


def at(classes, image, y, x):
    """The classes of a thumbnail at places of its image."""
    rows, columns = (
        (v * n / s).astype(int) for v, n, s in zip((y, x), classes.shape, image.shape, strict=False)
    )
    return classes[rows, columns]


def with_artefacts(image, um):
    """(An image with artefacts drawn over it, {class and kind: bool (H, W) of where})"""
    image, truth, side = image.copy(), {}, len(image)
    white = (np.percentile(image[::8, ::8], 99.9, axis=(0, 1)) / 255).astype(np.float32)
    layer = np.roll(image, side // 3, axis=1) / np.float32(255) / white

    def stroke(name, points, seen_through, soft_um):
        """What is seen through the stroke as a share, of its window (y, x, height, width)."""
        drawn = np.zeros((side, side), np.uint8)
        points = (np.array(points) * side).astype(np.int32)
        cv2.polylines(drawn, [points], False, 255, max(1, round(60 / um)))
        left, top, width, height = cv2.boundingRect(drawn)
        place = np.s_[top : top + height, left : left + width]
        strength = cv2.GaussianBlur(drawn[place], (0, 0), soft_um / um)[..., None] / np.float32(255)
        image[place] = (image[place] * seen_through(place) ** strength).clip(0, 255)
        truth[name] = drawn > 127

    for row, (name, ink) in enumerate(INKS.items()):
        y, share = 0.12 + 0.1 * row, np.float32(ink) / 255
        stroke(f"pen {name}", [(0.01, y), (0.2, y + 0.04), (0.45, y)], lambda _, s=share: s, 8)
    path = np.array([(0.55, 0.12), (0.65, 0.25), (0.63, 0.5)])
    stroke("fold of two layers", path, lambda place: layer[place], 2)
    stroke("fold of three layers", path + np.array([0.2, 0]), lambda place: layer[place] ** 2, 2)
    radius = side // 8
    for column, sigma in enumerate(BLURS):
        y, x = round(side * 0.75), round(side * (0.2 + 0.3 * column))
        disc = np.zeros((side, side), np.uint8)
        cv2.circle(disc, (x, y), radius, 1, -1)
        place = np.s_[y - radius : y + radius + 1, x - radius : x + radius + 1]
        blurred = cv2.GaussianBlur(image[place], (0, 0), sigma / um)
        image[place] = np.where(disc[place][..., None] > 0, blurred, image[place])
        truth[f"blur of {sigma:g} um"] = disc > 0
    image[-side // 20 :] = 0
    truth["black"] = np.zeros((side, side), bool)
    truth["black"][-side // 20 :] = True
    jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return cv2.imdecode(jpeg, cv2.IMREAD_COLOR)[..., ::-1].copy(), truth


if __name__ == "__main__":
    run_script(main, parse_args)
