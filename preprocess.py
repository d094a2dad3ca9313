"""Cut tissue images and their masks into patches for train.py.

    python3 preprocess.py
    python3 preprocess.py --root ./data/demo/ --val_pattern '*03.tif'

Reads <root>/tissue_images/ and <root>/mask binary/ (or mask_binary/, masks/), pairs by name.
Writes patches_rgb_train/, patches_mask_train/, patches_rgb_val/, patches_mask_val/, patches.csv,
patches_preview.png and patches.json below <root>. The same input again changes nothing.
"""

import os
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import cv2
from tqdm import tqdm

from tissue import patches, report, windows
from tissue.colour import colour_of
from tissue.files import InputError, Parser, check_positive, file_hash, run_script
from tissue.images import read_image
from tissue.masks import read_mask
from tissue.pairs import check_pair, find_pairs

PREVIEW = "patches_preview.png"
PREVIEW_PATCHES = 48


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--root", default="./data/", help="folder with images and masks")
    parser.add_argument("--patch_dim", type=int, default=128, help="side of a patch, pixels")
    parser.add_argument("--patch_stride", type=int, default=20, help="patch to patch, pixels")
    parser.add_argument(
        "--val_pattern",
        default="*03.tif",
        help="images whose file name, or name without ending, matches are kept for validation",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="threads that read, cut and write"
    )
    return parser.parse_args(argv)


def main(args):
    root = Path(args.root)
    check_positive(args, ("patch_dim", "workers"))
    if not 0 < args.patch_stride <= args.patch_dim:
        raise InputError(
            f"--patch_stride: found {args.patch_stride}, expected 1 to the patch's side of "
            f"{args.patch_dim} pixels; a larger one would leave tissue out"
        )

    # --- what there is ---
    pairs = find_pairs(root)
    splits = {
        pair.name: "val"
        if any(fnmatch(name, args.val_pattern) for name in (pair.image.name, pair.name))
        else "train"
        for pair in pairs
    }
    for split, kind in (("val", "validation"), ("train", "training")):
        if split not in splits.values():
            raise InputError(
                f"--val_pattern: found no {kind} image among the {len(pairs)} in {root} with "
                f"{args.val_pattern!r}, expected at least one; try --val_pattern "
                f"'{pairs[-1].image.name}'"
            )
    pool = ThreadPoolExecutor(args.workers)
    cv2.setNumThreads(1)  # one thread an image is enough: there are as many images as threads
    settings = {
        "format_version": patches.FORMAT_VERSION,
        "patch_dim": args.patch_dim,
        "patch_stride": args.patch_stride,
        "val_pattern": args.val_pattern,
    }
    sources = [
        {
            "name": pair.name,
            "split": splits[pair.name],
            "image": pair.image.relative_to(root).as_posix(),
            "mask": pair.mask.relative_to(root).as_posix(),
            "image_sha256": image_hash,
            "mask_sha256": mask_hash,
        }
        for pair, image_hash, mask_hash in zip(
            pairs,
            pool.map(file_hash, [pair.image for pair in pairs]),
            pool.map(file_hash, [pair.mask for pair in pairs]),
            strict=True,
        )
    ]
    if is_up_to_date(root, settings, sources):
        print(f"{root}: the patch set is up to date, nothing to do")
        print_counts(root, patches.read_manifest(root))
        return

    # --- every fault of every image, before anything is written ---
    def check(pair):
        try:
            return check_pair(pair, args.patch_dim)
        except (InputError, OSError) as error:
            return error

    checked = list(tqdm(pool.map(check, pairs), "check", len(pairs), leave=False, disable=None))
    faults = [str(facts) for facts in checked if isinstance(facts, Exception)]
    if faults:
        raise InputError("; ".join(faults))
    names_of_picture = defaultdict(list)
    for pair, facts in zip(pairs, checked, strict=True):
        names_of_picture[facts.pixels_sha256].append(pair.name)
        for note in facts.notes:
            print(f"warning: {note}", file=sys.stderr)
    shared = [
        " = ".join(names)
        for names in names_of_picture.values()
        if len({splits[name] for name in names}) > 1
    ]
    if shared:
        raise InputError(
            f"{root}: found the same picture in training and validation ({', '.join(shared)}), "
            f"expected different ones; remove one of each or change --val_pattern"
        )

    # --- cut: without its manifest the set is unfinished, and train.py will not take it ---
    patches.remove_set(root)

    def write(pair):
        image, mask = read_image(pair.image), read_mask(pair.mask)
        dim, stride = args.patch_dim, args.patch_stride
        rows = patches.write_patches(root, splits[pair.name], pair.name, image, mask, dim, stride)
        return rows, colour_of(windows.from_array(image))

    written = list(tqdm(pool.map(write, pairs), "cut", len(pairs), leave=False, disable=None))
    table = [row for rows, _ in written for row in rows]
    write_preview(root, table)
    for source, facts, (_, colour) in zip(sources, checked, written, strict=True):
        source["height"], source["width"] = facts.height, facts.width
        source["pixel_size_um"] = facts.pixel_size_um
        source["foreground"] = round(facts.foreground, 4)
        source["colour"] = colour._asdict() if colour else None
    counts = {split: sum(row["split"] == split for row in table) for split in ("train", "val")}
    manifest = {**settings, "patches": counts, "images": sources}
    patches.write_manifest(root, manifest, table)
    print_counts(root, manifest)


def is_up_to_date(root: Path, settings: dict, sources: list[dict]) -> bool:
    """Whether a complete patch set lies below `root`, cut from these files with these settings."""
    try:
        manifest = patches.read_manifest(root)
        same = (
            all(manifest[key] == value for key, value in settings.items())
            and [{key: image[key] for key in sources[0]} for image in manifest["images"]] == sources
        )
        return same and patches.count_files(root) == manifest["patches"]
    except (InputError, OSError, KeyError):
        return False


def write_preview(root: Path, table: list[dict]) -> None:
    """Write patches_preview.png: patches spread over the whole set, nuclei outlined."""
    shown = [table[len(table) * i // PREVIEW_PATCHES] for i in range(PREVIEW_PATCHES)]
    outlined = []
    for row in shown:
        image, mask = patches.read_patch(root, row["split"], row["file"])
        outlined.append(report.overlay(image, mask))
    report.write_image(root / PREVIEW, report.contact_sheet(outlined, columns=8))


def print_counts(root: Path, manifest: dict) -> None:
    """Print the closing table and where to look."""
    names = {split: 0 for split in ("train", "val")}
    for image in manifest["images"]:
        names[image["split"]] += 1
    print(f"{'':8} {'Train Images':>14} | {'Validation Images':>17}")
    print(f"{'images':8} {names['train']:>14} | {names['val']:>17}")
    print(f"{'patches':8} {manifest['patches']['train']:>14} | {manifest['patches']['val']:>17}")
    print(f"patches with their masks outlined: {root / PREVIEW}")


if __name__ == "__main__":
    run_script(main, parse_args)
