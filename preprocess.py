"""Cut tissue images and their masks into patches for train.py.

    python3 preprocess.py
    python3 preprocess.py --root ./data/demo/ --val_pattern '*03.tif'
    python3 preprocess.py --val_fraction 0.2 --group_pattern '^[^_]+' --seed 1
    python3 preprocess.py --root data/one data/other --pixel_size nuclei 0.25

Reads <root>/tissue_images/ and <root>/mask binary/ (or mask_binary/, masks/, instance_labels/),
pairs by name. Writes patches_rgb_train/, patches_mask_train/, patches_rgb_val/, patches_mask_val/,
patches.csv, patches_preview.png and patches.json below <root>. All patches have one pixel size, of
several roots too: images of another are resampled. Where instance_labels/ tells nuclei apart, the
masks do too. The same input again changes nothing, bad input leaves what there is.
"""

import argparse
import math
import os
import statistics
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from tissue import manifest, masks, patches, pictures, splits, windows
from tissue.colour import colour_of
from tissue.depth import UNKNOWN, depth_of
from tissue.files import InputError, Parser, check_numbers, file_hash, locked, run_script
from tissue.images import bits_in_use, read_image
from tissue.nuclei import reference_labels
from tissue.pairs import (
    IMAGE_FOLDER,
    LABEL_FOLDER,
    Files,
    Pair,
    check_pair,
    find_pairs,
    label_folder,
    passed_over,
    set_folders,
    unused_labels,
    unused_masks,
)
from tissue.pixel_size import (
    MICROSCOPE_UM,
    pixel_size_um,
    resampling_lines,
    scale_of,
    size_by_nuclei,
)

PREVIEW_PATCHES = 48
BY_NUCLEI = "nuclei"  # a pixel size that the nuclei tell
MOST_MAPS = 64  # label maps of a set that tell how large its nuclei are


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument(
        "--root", nargs="+", default="./data/",
        help="folder with images and masks, or several, or a folder of such folders",
    )  # fmt: skip
    parser.add_argument("--patch_dim", type=int, default=128, help="side of a patch, pixels")
    parser.add_argument("--patch_stride", type=int, default=20, help="patch to patch, pixels")
    parser.add_argument(
        "--pixel_size", nargs="+", metavar="UM", default=[],
        help="micrometres, of all images, or one a root; without it what they say; "
        f"{BY_NUCLEI}: by the size of a set's nuclei",
    )  # fmt: skip
    parser.add_argument(
        "--patch_pixel_size", type=float, metavar="UM",
        help="micrometres, of all patches; without it the median of the images'",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="threads that read, cut and write"
    )
    held_out = parser.add_argument_group(
        "images kept for validation",
        f"Those that match {splits.VAL_PATTERN}, and where none does a fraction of "
        f"{splits.VAL_FRACTION}.",
    )
    held_out.add_argument("--val_pattern", help="those whose name matches, whatever its suffix")
    held_out.add_argument(
        "--val_fraction", type=float, help="this fraction of all, drawn in whole groups"
    )
    held_out.add_argument(
        "--group_pattern",
        metavar="REGEX",
        help="what it finds in a name, or its first (...), is the image's group: patient or slide; "
        "without it each image is its own",
    )
    held_out.add_argument("--seed", type=int, default=0, help="of the draw")
    return parser.parse_args(argv)


class Plan(NamedTuple):
    """A set that is to be cut: what there is, and how."""

    root: Path
    pairs: list[Pair]
    labels: Files  # label maps by the names of images
    split_of: dict[str, str]
    settings: dict
    sizes: dict[str, float | None]  # micrometres a pixel, of each image

    @property
    def known_sizes(self) -> list[float]:
        return [um for name, um in self.sizes.items() if um and self.split_of[name] == "train"]


def main(args):
    given = check_flags(args)
    cv2.setNumThreads(1)  # one thread an image is enough: there are as many images as threads
    roots = [Path(root) for root in set_folders(args.root, IMAGE_FOLDER)]
    with ThreadPoolExecutor(args.workers) as pool:
        # --- plan: what there is, and what is to be made of it ---
        sizes = zip(roots, given_to_each(given, roots), strict=True)
        plans = [make_plan(args, root, size, pool) for root, size in sizes]
        settle_pixel_size(plans, args.patch_pixel_size, pool)
        todo = []
        for plan in plans:
            sources = describe(plan, pool)
            if is_up_to_date(plan.root, plan.settings, sources):
                print(f"{plan.root}: the patch set is up to date, nothing to do")
                print_counts(plan.root, manifest.read_manifest(plan.root))
                continue
            # --- check: every fault of every image, before anything is written ---
            todo.append((plan, sources, check(plan, pool)))
        faults = [fault for *_, checked in todo for fault in checked if isinstance(fault, str)]
        if faults:
            raise InputError("; ".join(faults))
        for plan, _, checked in todo:
            check_pictures(plan, checked)
            # 16-bit images are as bright as they are to each other: one number of bits for all.
            bits = pool.map(bits_in_use, [pair.image for pair in plan.pairs])
            plan.settings["bits"] = max(filter(None, bits), default=None)

    # --- cut: beside the old set, in whose place it is put when it is complete ---
    for plan, sources, checked in todo:
        say(plan, checked)
        for source, facts in zip(sources, checked, strict=True):
            source["height"], source["width"] = facts.height, facts.width
            source["pixel_size_um"] = plan.sizes[source["name"]]
            source["foreground"] = round(facts.foreground, 4)
        with locked(plan.root, "cuts patches"), patches.new_set(plan.root) as new:
            written = cut(new, plan, sources, args.workers)
        print_counts(plan.root, written)


# --- plan ---------------------------------------------------------------------------------------


def check_flags(args) -> list[float | str]:
    """The values of --pixel_size; InputError for the first flag that none can be taken from."""
    ranges = {"patch_dim": (manifest.LEAST_DIM, math.inf), "workers": (1, 1024)}
    ranges |= {"patch_pixel_size": MICROSCOPE_UM, "val_fraction": (0.0, 0.99), "seed": (0, 2**32)}
    check_numbers(args, ranges)
    if not 0 < args.patch_stride <= args.patch_dim:
        raise InputError(
            f"--patch_stride: found {args.patch_stride}, expected 1 to the patch's side of "
            f"{args.patch_dim} pixels; a larger one would leave tissue out"
        )
    for flag in ("val_pattern", "group_pattern"):
        if any("\ud800" <= letter <= "\udfff" for letter in getattr(args, flag) or ""):
            raise InputError(f"--{flag}: found text that is no UTF-8, expected a pattern")
    for flag in ("val_fraction", "group_pattern"):
        if args.val_pattern is not None and getattr(args, flag) is not None:
            raise InputError(f"--{flag}: found it with --val_pattern, expected one of them")
    return [text if text == BY_NUCLEI else as_number(text) for text in args.pixel_size]


def as_number(text: str) -> float:
    """A pixel size as a number; InputError where it is none that a microscope has."""
    try:
        size = float(text)
    except ValueError as error:
        raise InputError(
            f"--pixel_size: found {text!r:.40}, expected micrometres or {BY_NUCLEI}"
        ) from error
    check_numbers(argparse.Namespace(pixel_size=size), {"pixel_size": MICROSCOPE_UM})
    return size


def given_to_each(given: list, roots: list[Path]) -> list[float | str | None]:
    """What --pixel_size gives for each root: the one value for all, its own, or None."""
    if len(given) > 1 and len(given) != len(roots):
        raise InputError(
            f"--pixel_size: found {len(given)} values for {len(roots)} roots, expected one, or one "
            f"each"
        )
    return given if len(given) > 1 else (given or [None]) * len(roots)


def make_plan(args, root: Path, given: float | str | None, pool) -> Plan:
    """A set's images, how they are split, and the pixel size of each as far as it is known."""
    pairs = find_pairs(root)
    patches.check_places(root)
    folders = pairs[0].image.parent, pairs[0].mask.parent, root / LABEL_FOLDER
    names = [pair.name for pair in pairs]
    for line in passed_over(*folders) + unused_masks(root) + unused_labels(root, names):
        print(line)
    found = label_folder(root)
    labels = Files({name: found[name] for name in names if name in found})
    split_of, chosen_by = choose_split(args, root, pairs)
    settings = {"patch_dim": args.patch_dim, "patch_stride": args.patch_stride, **chosen_by}
    settings["pixel_size_given_um"] = given
    if isinstance(given, float):
        sizes = dict.fromkeys(names, given)
    elif given == BY_NUCLEI:
        sizes = dict.fromkeys(names, size_of_set(root, labels, pool))
    else:
        sizes = dict(zip(names, pool.map(told_size, pairs), strict=True))
    return Plan(root, pairs, labels, split_of, settings, sizes)


def size_of_set(root: Path, labels: Files, pool) -> float:
    """Micrometres a pixel, by the nuclei of a set's label maps; prints it."""
    maps = [path for _, path in labels.items()]
    areas = pool.map(nucleus_areas, splits.spread(maps, MOST_MAPS))
    areas = np.concatenate([np.zeros(0), *areas])
    size = size_by_nuclei(areas)
    if not size:
        raise InputError(
            f"{root}: found no label map with nuclei in {LABEL_FOLDER}, expected some to tell the "
            f"pixel size by; give it in micrometres with --pixel_size"
        )
    size = float(f"{size:.2g}")
    print(
        f"{root}: taken as {size:g} um a pixel, by its median nucleus of {np.median(areas):.0f} "
        f"pixels; --pixel_size tells it"
    )
    return size


def nucleus_areas(label_map: Path) -> np.ndarray:
    """The pixels of each nucleus of a label map that does not meet the image's edge, (n,)."""
    try:
        labels = masks.read_label_map(label_map)
    except (InputError, OSError):
        return np.zeros(0)  # `check_pair` says why
    if labels is None:
        return np.zeros(0)
    labels = reference_labels(labels)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        areas[edge] = 0
    return areas[areas > 0]


def settle_pixel_size(plans: list[Plan], wanted: float | None, pool) -> None:
    """Put the one pixel size of all patches into the settings: that of --patch_pixel_size, or the
    median of the training images'. A set that tells none goes by its nuclei if there is a size to
    come to, and else is taken as it is.
    """
    known = [size for plan in plans for size in plan.known_sizes]
    wanted = wanted or (statistics.median_low(known) if known else None)
    for plan in plans:
        plan.settings["pixel_size_um"] = wanted
        if wanted and not any(plan.sizes.values()) and plan.labels:
            plan.sizes.update(dict.fromkeys(plan.sizes, size_of_set(plan.root, plan.labels, pool)))


def choose_split(args, root, pairs) -> tuple[dict[str, str], dict]:
    """Return {name: "train" or "val"} and the flags that decided it; prints what was drawn."""
    if len(pairs) < 2:
        raise InputError(
            f"{pairs[0].image}: found one image, expected at least two images, one to train on and "
            f"one to validate"
        )
    chosen_by = dict.fromkeys(("val_pattern", "val_fraction", "group_pattern", "seed"))
    if args.val_fraction is None and args.group_pattern is None:
        pattern = splits.VAL_PATTERN if args.val_pattern is None else args.val_pattern
        split_of = splits.by_pattern(pairs, pattern)
        if len(set(split_of.values())) == 2:
            return split_of, chosen_by | {"val_pattern": pattern}
        missing = "training" if "val" in split_of.values() else "validation"
        if args.val_pattern is not None:
            raise InputError(
                f"--val_pattern: found no {missing} image among the {len(pairs)} in {root} "
                f"with {pattern!r}, expected at least one; --val_fraction {splits.VAL_FRACTION} in "
                f"its place draws some"
            )
        which = "none" if missing == "validation" else "each"
        print(
            f"{pattern} matches {which} of the {len(pairs)} images: --val_fraction "
            f"{splits.VAL_FRACTION} is taken instead"
        )
    fraction = args.val_fraction or splits.VAL_FRACTION
    names = [pair.name for pair in pairs]
    split_of, groups = splits.by_groups(names, fraction, args.group_pattern, args.seed)
    count = list(split_of.values()).count("val")
    print(
        f"{count} of {len(pairs)} images are for validation (--seed {args.seed}): "
        f"{', '.join(groups)}"
    )
    drawn = {"val_fraction": fraction, "group_pattern": args.group_pattern, "seed": args.seed}
    return split_of, chosen_by | drawn


def describe(plan: Plan, pool) -> list[dict]:
    """What the manifest says of each pair before it is decoded."""
    paths = {
        "image": [pair.image for pair in plan.pairs],
        "mask": [pair.mask for pair in plan.pairs],
        "labels": [plan.labels.get(pair.name) for pair in plan.pairs],
    }
    sources = [{"name": pair.name, "split": plan.split_of[pair.name]} for pair in plan.pairs]
    for kind, its in paths.items():
        hashes = pool.map(lambda path: path and file_hash(path), its)
        for source, path, digest in zip(sources, its, hashes, strict=True):
            source[kind] = path and path.relative_to(plan.root).as_posix()
            source[f"{kind}_sha256"] = digest
    return sources


def is_up_to_date(root: Path, settings: dict, sources: list[dict]) -> bool:
    """Whether a whole patch set lies below `root`, cut from these files with these settings."""
    try:
        found = manifest.read_manifest(root)
        same = (
            all(found[key] == value for key, value in settings.items())
            and [{key: image[key] for key in sources[0]} for image in found["images"]] == sources
        )
        return (
            same
            and file_hash(root / manifest.TABLE) == found["table_sha256"]
            and manifest.size_on_disk(root) == (found["patches"], found["bytes"])
        )
    except (InputError, OSError):
        return False


# --- check --------------------------------------------------------------------------------------


def told_size(pair) -> float | None:
    """Micrometres per pixel as the image tells them; None also where it cannot be read."""
    try:
        return pixel_size_um(pair.image)
    except (InputError, OSError):
        return None  # `check_pair` says why


def check(plan: Plan, pool) -> list:
    """The PairFacts of all pairs, in their order; of a pair with faults these, as text."""

    def facts_of(pair):
        try:
            wanted = plan.settings["pixel_size_um"]
            scale = scale_of(plan.sizes[pair.name], wanted, pair.image)
            label_map = plan.labels.get(pair.name)
            return check_pair(pair, plan.settings["patch_dim"], scale, label_map)
        except (InputError, OSError) as error:
            return str(error)

    facts = pool.map(facts_of, plan.pairs)
    return list(tqdm(facts, "check", len(plan.pairs), leave=False, disable=None))


def check_pictures(plan: Plan, checked: list) -> None:
    """Raise InputError where one picture is in training and in validation."""
    names_of_picture = defaultdict(list)
    for pair, facts in zip(plan.pairs, checked, strict=True):
        names_of_picture[facts.pixels_sha256].append(pair.name)
    shared = [
        " = ".join(names)
        for names in names_of_picture.values()
        if len({plan.split_of[name] for name in names}) > 1
    ]
    if shared:
        raise InputError(
            f"{plan.root}: found the same picture in training and validation ({', '.join(shared)}),"
            f" expected different ones; remove one of each, or choose other images for validation"
        )


def say(plan: Plan, checked: list) -> None:
    """Print what is assumed of a set's images and masks."""
    if bits := plan.settings["bits"]:
        print(f"16-bit images: {bits} bits are in use, of which the upper 8 are kept")
    for line in resampling_lines(plan.sizes, plan.settings["pixel_size_um"]):
        print(line)
    for note in sorted({note for facts in checked for note in facts.notes}):
        print(note)


# --- cut ----------------------------------------------------------------------------------------


def cut(new: Path, plan: Plan, sources: list[dict], workers: int) -> dict:
    """Write a patch set below `new`; what its manifest says."""
    settings = plan.settings
    grid = patches.Grid(settings["patch_dim"], settings["patch_stride"])

    def write(pair):
        scale = scale_of(plan.sizes[pair.name], settings["pixel_size_um"], pair.image)
        whole = read_image(pair.image, settings["bits"]), masks.read_mask(pair.mask)
        image, mask = patches.resample(*whole, scale)
        if label_map := plan.labels.get(pair.name):
            mask = with_depth(mask, label_map)
        split = plan.split_of[pair.name]
        rows = patches.write_patches(new, split, pair.name, image, mask, grid)
        return rows, colour_of(windows.from_array(image))

    with ThreadPoolExecutor(workers) as pool:
        written = pool.map(write, plan.pairs)
        written = list(tqdm(written, "cut", len(plan.pairs), leave=False, disable=None))
    table = [row for rows, _ in written for row in rows]
    write_preview(new, table)
    for source, (_, colour) in zip(sources, written, strict=True):
        source["colour"] = colour._asdict() if colour else None
    return manifest.write_manifest(new, {**settings, "images": sources}, table)


def with_depth(mask: np.ndarray, label_map: Path) -> np.ndarray:
    """A mask bool (H, W) as uint8 with the depth in the nuclei of its label map, which is brought
    to the mask's size; UNKNOWN where only the mask has a nucleus.
    """
    labels = masks.read_label_map(label_map)
    places = (
        ((np.arange(side) + 0.5) * of / side).astype(int)
        for side, of in zip(mask.shape, labels.shape, strict=True)
    )
    depth = depth_of(reference_labels(labels)[np.ix_(*places)])
    return np.where(mask, np.maximum(depth, UNKNOWN), 0).astype(np.uint8)


def write_preview(root: Path, table: list[dict]) -> None:
    """Write patches_preview.png: patches spread over the whole set, nuclei outlined."""
    shown = [table[len(table) * i // PREVIEW_PATCHES] for i in range(PREVIEW_PATCHES)]
    outlined = []
    for row in shown:
        image, mask = patches.read_patch(root, row["split"], row["file"])
        outlined.append(pictures.overlay(image, mask > 0))
    pictures.write_image(root / patches.PREVIEW, pictures.contact_sheet(outlined, columns=8))


def print_counts(root: Path, found: dict) -> None:
    """Print the closing table and where to look."""
    names = {split: 0 for split in ("train", "val")}
    for image in found["images"]:
        names[image["split"]] += 1
    print(f"{'':8} {'Train Images':>14} | {'Validation Images':>17}")
    print(f"{'images':8} {names['train']:>14} | {names['val']:>17}")
    print(f"{'patches':8} {found['patches']['train']:>14} | {found['patches']['val']:>17}")
    print(f"patches with their masks outlined: {root / patches.PREVIEW}")


if __name__ == "__main__":
    run_script(main, parse_args)
