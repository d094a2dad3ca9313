"""Cut tissue images and their masks into patches for train.py.

    python3 preprocess.py
    python3 preprocess.py --val_fraction 0.2 --group_pattern '^[^_]+' --seed 1
    python3 preprocess.py --root ./data/demo/ --val_pattern '*03.tif'
    python3 preprocess.py --root data/one data/other --pixel_size nuclei 0.25
    python3 preprocess.py --root data/mine --corrected_from results/

Reads <root>/tissue_images/ and <root>/mask binary/ (or mask_binary/, masks/, instance_labels/) or
<root>/annotations/ (QuPath, ImageJ, COCO, labelme, label maps), pairs by name. Writes
patches_rgb_train/, patches_mask_train/, patches_rgb_val/, patches_mask_val/, patches.csv,
patches_preview.png, annotations_preview.png and patches.json below <root>. All patches have one
pixel size, of several roots too: images of another are resampled. Where annotations/ or
instance_labels/ tell nuclei apart, the masks do too. Annotated images may have any size; where
they have regions, patches are cut in these alone. The same input again changes nothing, bad input
leaves what there is.
"""

if __name__ == "__main__":  # Ctrl-C while all else is imported
    from tissue import ending

    ending.end_at_once()

import argparse
import math
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
from tqdm import tqdm

from tissue import cutting, edited, manifest, patches, splits
from tissue.annotations import find_annotations
from tissue.corrections import said_of_corrections
from tissue.cutting import Plan
from tissue.files import InputError, Parser, check_numbers, locked, run_script
from tissue.masks import ANNOTATION_FOLDER, LABEL_FOLDER
from tissue.pairs import (
    IMAGE_FOLDER,
    Files,
    Pair,
    find_pairs,
    image_files,
    label_folder,
    mask_folder,
    name_of,
    numbered,
    set_folders,
)
from tissue.pixel_size import MICROSCOPE_UM
from tissue.unused import (
    passed_over,
    said_of_annotations,
    said_of_spelling,
    unused_labels,
    unused_masks,
)

BY_NUCLEI = "nuclei"  # a pixel size that the nuclei tell


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "--root", nargs="+", default="./data/",
        help="folder with images and masks or annotations, or several, or one of such folders",
    )  # fmt: skip
    parser.add_argument("--patch_dim", type=int, default=128, help="side of a patch, pixels")
    parser.add_argument("--patch_stride", type=int, default=20, help="from patch to patch, pixels")
    parser.add_argument(
        "--pixel_size", nargs="+", metavar="UM", default=[],
        help="micrometres, of all images, or one a root; without it what they say; "
        f"{BY_NUCLEI}: by the size of a set's nuclei",
    )  # fmt: skip
    parser.add_argument(
        "--pixel_sizes", metavar="FILE",
        help="CSV of image,pixel_size_um: of some images, in the place of what they say",
    )  # fmt: skip
    parser.add_argument(
        "--patch_pixel_size", type=float, metavar="UM",
        help="micrometres, of all patches; without it the median of training images",
    )  # fmt: skip
    parser.add_argument(
        "--corrected_from", metavar="RESULTS",
        help="say what was corrected in annotations since inference.py wrote them there",
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
        "without it each image is its own; with --val_pattern, groups in both parts are told",
    )
    held_out.add_argument("--seed", type=int, help="other images by chance; without it 0")
    return parser.parse_args(argv)


def main(args):
    given = check_flags(args)
    cv2.setNumThreads(1)  # one thread an image is enough: there are as many images as threads
    roots = [Path(root) for root in set_folders(args.root, IMAGE_FOLDER)]
    if found := [str(root) for root in roots if root not in map(Path, args.root)]:
        print(f"--root: {IMAGE_FOLDER} found in folders within it: {', '.join(found)}")
    with ThreadPoolExecutor(args.workers) as pool:
        # --- plan: what there is, and what is to be made of it ---
        sizes = zip(roots, given_to_each(given, roots), strict=True)
        plans = [make_plan(args, root, size, pool) for root, size in sizes]
        if args.group_pattern and len(plans) > 1:
            print_lines(said_of_roots(plans, args.group_pattern))
        print_lines(cutting.take_sizes(plans, args.pixel_sizes))
        print_lines(cutting.settle_pixel_size(plans, args.patch_pixel_size, pool))
        if args.corrected_from:
            print_lines(said_of_corrections(plans, Path(args.corrected_from)))
        cutting.settle_bits(plans, pool)
        todo = []
        for plan in plans:
            plan.sources = cutting.describe(plan, pool)
            reason = cutting.reason_to_cut(plan)
            if reason is None:
                print(f"{plan.root}: the patch set is up to date, nothing to do")
                print_counts(plan.root, manifest.read_manifest(plan.root))
                continue
            todo.append(plan)
            print_lines([f"{plan.root}: cut anew: {reason}"] * bool(reason))
        # --- check: every fault of every image, before anything is written ---
        check(todo, pool)
        cutting.check_pictures(plans)

    # --- cut: beside the old set, in whose place it is put when it is complete ---
    for plan in todo:
        print_lines(cutting.assumptions(plan))
        with locked(plan.root, "cuts patches"), patches.new_set(plan.root) as new:
            written = cut(new, plan, args.workers)
            print_lines(edited.keep_edited(plan.root, new))
        print_counts(plan.root, written)
    print("next: python3", shlex.join(["train.py", "--root", *map(str, roots)]))


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
    if args.val_pattern is not None and args.val_fraction is not None:
        raise InputError("--val_fraction: found it with --val_pattern, expected one of them")
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
    print_lines(said_of_spelling(root))
    folder = root / ANNOTATION_FOLDER
    annotated = None
    if folder.is_dir():
        images = image_files(root / IMAGE_FOLDER) if (root / IMAGE_FOLDER).is_dir() else ()
        annotated = find_annotations(folder, Files({name_of(path): path for path in images}))
    pairs = find_pairs(root, annotated)
    patches.check_places(root)
    folders = root / IMAGE_FOLDER, mask_folder(root), root / LABEL_FOLDER
    names = [pair.name for pair in pairs]
    lines = passed_over(*dict.fromkeys(filter(None, folders)))
    lines += unused_masks(root) + unused_labels(root, names)
    print_lines(lines + said_of_annotations(root, pairs))
    labels = labels_of(root, pairs, pool)
    wanted = splits.Wanted(args.val_pattern, args.val_fraction, args.group_pattern, args.seed)
    split_of, chosen_by, lines = splits.choose(root, pairs, wanted)
    print_lines(lines)
    settings = {"patch_dim": args.patch_dim, "patch_stride": args.patch_stride, **chosen_by}
    settings["pixel_size_given_um"] = given
    told = dict(zip(names, pool.map(cutting.told_size, pairs), strict=True))
    if isinstance(given, float):
        sizes = dict.fromkeys(names, given)
    elif given == BY_NUCLEI:
        size, line = cutting.size_of_set(root, pairs, labels, pool)
        print(line)
        sizes = dict.fromkeys(names, size)
    else:
        sizes = dict(told)
    return Plan(root, pairs, labels, split_of, settings, told, sizes)


def said_of_roots(plans: list[Plan], group_pattern: str) -> list[str]:
    """A line with groups that are for training in one root and for validation in another."""
    groups, split_of = {}, {}
    for plan in plans:
        for name, group in splits.groups_of(list(plan.split_of), group_pattern).items():
            groups[plan.root, name], split_of[plan.root, name] = group, plan.split_of[name]
    return splits.said_of_both(
        groups, split_of, "if they are the same patients, put their images into one root"
    )


def labels_of(root: Path, pairs: list[Pair], pool) -> Files:
    """What tells the nuclei of each image apart, by name: its annotation, its label map, or its
    mask where that is one.
    """
    found = label_folder(root)
    rest = [pair for pair in pairs if not pair.is_annotated and pair.name not in found]
    masks = dict(zip([pair.name for pair in rest], pool.map(numbered, rest), strict=True))
    labels = {name: path for name, path in masks.items() if path}
    for pair in pairs:
        if pair.is_annotated:
            labels[pair.name] = pair.mask
        elif pair.name in found:
            labels[pair.name] = found[pair.name]
    return Files(labels)


# --- check and cut ------------------------------------------------------------------------------


def check(plans: list[Plan], pool) -> None:
    """Put the facts of all pairs into the plans; InputError with all faults of all of them."""
    faults = []
    for plan in plans:
        found = pool.map(lambda pair, plan=plan: cutting.facts_or_fault(plan, pair), plan.pairs)
        plan.facts = list(tqdm(found, "check", len(plan.pairs), leave=False, disable=None))
        faults += [fault for fault in plan.facts if isinstance(fault, str)]
    if faults:
        raise InputError("; ".join(faults))


def cut(new: Path, plan: Plan, workers: int) -> dict:
    """Write a patch set below `new`; what its manifest says."""
    # A pool of its own: whatever fails, no thread still writes when the folder is removed.
    with ThreadPoolExecutor(workers) as pool:
        written = pool.map(lambda pair: cutting.cut_pair(new, plan, pair), plan.pairs)
        written = list(tqdm(written, "cut", len(plan.pairs), leave=False, disable=None))
    return cutting.complete_set(new, plan, written)


def print_lines(lines: list[str]) -> None:
    for line in lines:
        print(line)


def print_counts(root: Path, found: dict) -> None:
    """Print the closing table and where to look."""
    names = {split: 0 for split in ("train", "val")}
    for image in found["images"]:
        names[image["split"]] += 1
    print(f"{'':8} {'Train Images':>14} | {'Validation Images':>17}")
    print(f"{'images':8} {names['train']:>14} | {names['val']:>17}")
    print(f"{'patches':8} {found['patches']['train']:>14} | {found['patches']['val']:>17}")
    print(f"patches with their masks outlined: {root / patches.PREVIEW}")
    if (root / patches.ANNOTATIONS).is_file():
        print(f"annotations as they were read: {root / patches.ANNOTATIONS}")


if __name__ == "__main__":
    run_script(main, parse_args)
