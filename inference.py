"""Segment and count the nuclei of whole images with a trained network.

    python3 inference.py --gpu_id 0 --ckpt ./log/<run>/best.pt --image_folder ./results/
    python3 inference.py --ckpt ./log/<run> --images my_slide.tif my_folder/
    python3 inference.py --ckpt ./log/<run> --images my_folder/ --masks my_masks/

Without --images it takes the validation images of <root>, with their masks as reference. Writes
<name>_prediction.png, _image.png, _overlay.png and, with a reference, _gt.png for each image, and
counts.csv and report.html for all.
"""

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from tissue import images, nuclei, patches, report, tiling
from tissue.files import InputError, check_positive, run_script

SHIPPED = Path("log/ckpt/nuclei_unet.pt")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    files = parser.add_argument_group("files")
    files.add_argument("--root", default="./data/", help="folder given to preprocess.py")
    files.add_argument("--images", nargs="+", help="image files or folders, instead of --root's")
    files.add_argument("--masks", help="folder with reference masks for --images")
    files.add_argument("--ckpt", help=f"checkpoint or run folder; without it {SHIPPED}")
    files.add_argument("--image_folder", default="./results/", help="folder for the results")
    segmentation = parser.add_argument_group("segmentation")
    segmentation.add_argument(
        "--threshold", type=float, help="probability of a nucleus; without it the checkpoint's"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpu_id", type=int, default=0, help="number of the GPU; -1: the CPU")
    machine.add_argument("--batch_size", type=int, default=4, help="tiles predicted at once")
    return parser.parse_args(argv)


def main(args):
    check_positive(args, ("batch_size",))
    if args.threshold is not None and not 0 < args.threshold < 1:
        raise InputError(f"--threshold: found {args.threshold}, expected a number between 0 and 1")

    # --- what to do, and whether it can be done ---
    device = utils.choose_device(args.gpu_id)
    path = find_checkpoint(args.ckpt)
    checkpoint = utils.load_checkpoint(path)
    model = utils.build_model(checkpoint, path)
    threshold = checkpoint["threshold"] if args.threshold is None else args.threshold
    todo = find_images(args)
    check_images(todo)
    print(
        f"{path} | U-Net {model.config['dimensions']} | {device} | threshold {threshold:g} | "
        f"{len(todo)} image{'s' if len(todo) > 1 else ''}"
    )
    if checkpoint["channel_order"] == "bgr":
        print(
            f"{path} is a bare state dict of the first version, which learned from swapped "
            f"colours: it is fed blue, green, red."
        )

    # --- predict, count, write ---
    results = Path(args.image_folder)
    results.mkdir(parents=True, exist_ok=True)
    predict = utils.predictor(model, checkpoint, device)
    rows = []
    for pair in tqdm(todo, "infer", leave=False, disable=None):
        started = time.monotonic()
        image = images.read_image(pair.image)
        probability = tiling.predict_image(image, predict, batch_size=args.batch_size)
        mask = probability >= threshold
        height, width = mask.shape
        row = {"image": pair.name, "height": height, "width": width}
        row["contours"] = len(nuclei.contours(mask))
        report.write_image(results / f"{pair.name}_prediction.png", mask)
        report.write_image(results / f"{pair.name}_image.png", image)
        report.write_image(results / f"{pair.name}_overlay.png", report.overlay(image, mask))
        if pair.mask:
            reference = images.read_mask(pair.mask)
            counts = utils.pixel_counts(torch.from_numpy(mask), torch.from_numpy(reference))
            row["gt_contours"] = len(nuclei.contours(reference))
            row["accuracy"] = utils.accuracy(counts)
            row["dice"] = utils.dice(counts)
            row["iou"] = utils.iou(counts)
            report.write_image(results / f"{pair.name}_gt.png", reference)
        row["seconds"] = time.monotonic() - started
        rows.append(row)

    # --- report ---
    report.write_counts(results / "counts.csv", rows)
    settings = {"checkpoint": str(path), "threshold": f"{threshold:g}", "device": str(device)}
    settings |= {f"{name} version": version for name, version in utils.versions().items()}
    report.write_report(results / "report.html", results, rows, settings)
    print(report.text_table(rows))
    print(f"masks and overlays: {results} | counts: {results / 'counts.csv'}")
    print(f"look at {results / 'report.html'}")


def find_checkpoint(ckpt: str | None) -> Path:
    """The checkpoint that `--ckpt` means: a file, a run folder's best one, or the shipped one."""
    path = Path(ckpt) if ckpt else SHIPPED
    if path.is_dir():
        path = path / "best.pt"
    if not path.is_file():
        newest = max(Path("log").glob("*/best.pt"), key=lambda p: p.stat().st_mtime, default=None)
        advice = f"--ckpt {newest}" if newest else "run train.py first, or give --ckpt"
        raise FileNotFoundError(f"{path}: no such checkpoint; try {advice}")
    return path


def find_images(args) -> list[images.Pair]:
    """The images to segment, sorted by name, each with the path of its reference mask or None."""
    if not args.images:
        if args.masks:
            raise InputError("--masks: found it without --images, expected both; add --images")
        root = Path(args.root)
        return [
            images.Pair(image["name"], root / image["image"], root / image["mask"])
            for image in patches.read_manifest(root)["images"]
            if image["split"] == "val"
        ]
    found = images.find_images(*args.images)
    masks = images.find_images(args.masks) if args.masks else dict.fromkeys(found)
    lonely = ", ".join(str(path) for name, path in found.items() if name not in masks)
    if lonely:
        raise InputError(f"{lonely}: found no mask of that name in {args.masks}, expected one each")
    return [images.Pair(name, path, masks[name]) for name, path in found.items()]


def check_images(todo: list[images.Pair]) -> None:
    """Decode every image and reference once, so that faults show before anything is written."""
    faults = []
    for pair in todo:
        try:
            if pair.mask:
                images.check_pair(pair, patch_dim=1)
            else:
                images.read_image(pair.image)
        except (InputError, OSError) as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))


if __name__ == "__main__":
    run_script(main, parse_args)
