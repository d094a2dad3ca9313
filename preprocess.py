"""Cut tissue images and their masks into patches for train.py.

    python3 preprocess.py
    python3 preprocess.py --root ./data/demo/ --val_pattern '*03.tif'
    python3 preprocess.py --val_fraction 0.2 --group_pattern '^[^_]+' --seed 1

Reads <root>/tissue_images/ and <root>/mask binary/ (or mask_binary/, masks/), pairs by name.
Writes patches_rgb_train/, patches_mask_train/, patches_rgb_val/, patches_mask_val/, patches.csv,
patches_preview.png and patches.json below <root>. All patches have one pixel size: images of
another are resampled. The same input again changes nothing, bad input leaves what there is.
"""

import math
import os
import statistics
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
from tqdm import tqdm

from tissue import manifest, patches, report, splits, windows
from tissue.colour import colour_of
from tissue.files import InputError, Parser, check_numbers, file_hash, locked, run_script
from tissue.images import bits_in_use, read_image
from tissue.masks import read_mask
from tissue.pairs import (
    LABEL_FOLDER,
    check_pair,
    find_pairs,
    passed_over,
    unused_labels,
    unused_masks,
)
from tissue.pixel_size import MICROSCOPE_UM, pixel_size_um, resampling_lines, scale_of

PREVIEW_PATCHES = 48


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--root", default="./data/", help="folder with images and masks")
    parser.add_argument("--patch_dim", type=int, default=128, help="side of a patch, pixels")
    parser.add_argument("--patch_stride", type=int, default=20, help="patch to patch, pixels")
    parser.add_argument(
        "--pixel_size", type=float, help="micrometres, of all images; without it what they say"
    )
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


def main(args):
    check_flags(args)
    root = Path(args.root)

    # --- plan: what there is, and what is to be made of it ---
    pairs = find_pairs(root)
    patches.check_places(root)
    folders = pairs[0].image.parent, pairs[0].mask.parent, root / LABEL_FOLDER
    names = [pair.name for pair in pairs]
    for line in passed_over(*folders) + unused_masks(root) + unused_labels(root, names):
        print(line)
    split_of, chosen_by = choose_split(args, pairs)
    settings = {"patch_dim": args.patch_dim, "patch_stride": args.patch_stride, **chosen_by}
    settings["pixel_size_given_um"] = args.pixel_size
    cv2.setNumThreads(1)  # one thread an image is enough: there are as many images as threads
    with ThreadPoolExecutor(args.workers) as pool:
        sources = describe(root, pairs, split_of, pool)
        if is_up_to_date(root, settings, sources):
            print(f"{root}: the patch set is up to date, nothing to do")
            print_counts(root, manifest.read_manifest(root))
            return

        # --- check: every fault of every image, before anything is written ---
        sizes = dict(zip(names, pool.map(told_size, pairs), strict=True))
        sizes = {name: args.pixel_size or size for name, size in sizes.items()}
        known = [size for name, size in sizes.items() if size and split_of[name] == "train"]
        settings["pixel_size_um"] = statistics.median_low(known) if known else None
        checked = check(root, pairs, split_of, sizes, settings, pool)
        # 16-bit images are as bright as they are to each other: one number of bits for all.
        settings["bits"] = max(
            filter(None, pool.map(bits_in_use, [pair.image for pair in pairs])), default=None
        )
    if settings["bits"]:
        print(f"16-bit images: {settings['bits']} bits are in use, of which the upper 8 are kept")
    for line in resampling_lines(sizes, settings["pixel_size_um"]):
        print(line)
    for note in sorted({note for facts in checked for note in facts.notes}):
        print(note)
    for source, facts in zip(sources, checked, strict=True):
        source["height"], source["width"] = facts.height, facts.width
        source["pixel_size_um"] = sizes[source["name"]]
        source["foreground"] = round(facts.foreground, 4)

    # --- cut: beside the old set, in whose place it is put when it is complete ---
    with locked(root, "cuts patches"), patches.new_set(root) as new:
        written = cut(new, pairs, sources, settings, args.workers)
    print_counts(root, written)


# --- plan ---------------------------------------------------------------------------------------


def check_flags(args) -> None:
    """Raise InputError for the first flag that no value can be taken from."""
    ranges = {"patch_dim": (manifest.LEAST_DIM, math.inf), "workers": (1, 1024)}
    ranges |= {"pixel_size": MICROSCOPE_UM, "val_fraction": (0.0, 0.99), "seed": (0, 2**32)}
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


def choose_split(args, pairs) -> tuple[dict[str, str], dict]:
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
                f"--val_pattern: found no {missing} image among the {len(pairs)} in {args.root} "
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


def describe(root, pairs, split_of, pool) -> list[dict]:
    """What the manifest says of each pair before it is decoded."""
    hashes = (pool.map(file_hash, [pair[kind] for pair in pairs]) for kind in (1, 2))
    return [
        {
            "name": pair.name,
            "split": split_of[pair.name],
            "image": pair.image.relative_to(root).as_posix(),
            "mask": pair.mask.relative_to(root).as_posix(),
            "image_sha256": image_hash,
            "mask_sha256": mask_hash,
        }
        for pair, image_hash, mask_hash in zip(pairs, *hashes, strict=True)
    ]


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


def check(root, pairs, split_of, sizes, settings, pool) -> list:
    """The PairFacts of all pairs, in their order; one InputError with all faults of all."""

    def facts_of(pair):
        try:
            scale = scale_of(sizes[pair.name], settings["pixel_size_um"], pair.image)
            return check_pair(pair, settings["patch_dim"], scale)
        except (InputError, OSError) as error:
            return error

    checked = list(tqdm(pool.map(facts_of, pairs), "check", len(pairs), leave=False, disable=None))
    faults = [str(facts) for facts in checked if isinstance(facts, Exception)]
    if faults:
        raise InputError("; ".join(faults))
    names_of_picture = defaultdict(list)
    for pair, facts in zip(pairs, checked, strict=True):
        names_of_picture[facts.pixels_sha256].append(pair.name)
    shared = [
        " = ".join(names)
        for names in names_of_picture.values()
        if len({split_of[name] for name in names}) > 1
    ]
    if shared:
        raise InputError(
            f"{root}: found the same picture in training and validation ({', '.join(shared)}), "
            f"expected different ones; remove one of each, or choose other images for validation"
        )
    return checked


# --- cut ----------------------------------------------------------------------------------------


def cut(new: Path, pairs, sources, settings, workers) -> dict:
    """Write a patch set of these pairs below `new`; what its manifest says."""
    split_of = {source["name"]: source["split"] for source in sources}
    sizes = {source["name"]: source["pixel_size_um"] for source in sources}

    def write(pair):
        scale = scale_of(sizes[pair.name], settings["pixel_size_um"], pair.image)
        whole = read_image(pair.image, settings["bits"]), read_mask(pair.mask)
        image, mask = patches.resample(*whole, scale)
        dim, stride = settings["patch_dim"], settings["patch_stride"]
        rows = patches.write_patches(new, split_of[pair.name], pair.name, image, mask, dim, stride)
        return rows, colour_of(windows.from_array(image))

    with ThreadPoolExecutor(workers) as pool:
        written = list(tqdm(pool.map(write, pairs), "cut", len(pairs), leave=False, disable=None))
    table = [row for rows, _ in written for row in rows]
    write_preview(new, table)
    for source, (_, colour) in zip(sources, written, strict=True):
        source["colour"] = colour._asdict() if colour else None
    return manifest.write_manifest(new, {**settings, "images": sources}, table)


def write_preview(root: Path, table: list[dict]) -> None:
    """Write patches_preview.png: patches spread over the whole set, nuclei outlined."""
    shown = [table[len(table) * i // PREVIEW_PATCHES] for i in range(PREVIEW_PATCHES)]
    outlined = []
    for row in shown:
        image, mask = patches.read_patch(root, row["split"], row["file"])
        outlined.append(report.overlay(image, mask))
    report.write_image(root / patches.PREVIEW, report.contact_sheet(outlined, columns=8))


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
