"""Segment and count the nuclei of whole images with a trained network.

    python3 inference.py --gpu_id 0 --ckpt ./log/<run>/best.pt --image_folder ./results/
    python3 inference.py --ckpt ./log/<run> --images my_slide.tif my_folder/
    python3 inference.py --ckpt ./log/<run> --images my_folder/ --masks my_masks/
    torchrun --nproc_per_node 4 -- inference.py --ckpt ./log/<run> --images slides/
    python3 inference.py --ckpt ./log/<run> --images my_slide.tif --check_seams
    python3 inference.py --ckpt ./log/<run> --export_model nuclei.onnx

Without --images it takes the validation images of <root>, with their masks as reference. Writes
<name>_prediction.png, _image.png, _overlay.png and, with a reference, _gt.png for each image, and
counts.csv and report.html for all. Of an image of more than 64 megapixels the prediction is a tiled
BigTIFF and the others are small views; it is never held in memory.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import utils
from tissue import images, mosaic, nuclei, patches, report, stitching, synthetic, tiling, windows
from tissue.files import InputError, check_positive, file_hash, run_script

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
    files.add_argument(
        "--overwrite", action="store_true", help="redo images that have their results already"
    )
    segmentation = parser.add_argument_group("segmentation")
    segmentation.add_argument(
        "--threshold", type=float, help="probability of a nucleus; without it the checkpoint's"
    )
    segmentation.add_argument(
        "--pixel_size", type=float, help="micrometres, of all images; without it what they say"
    )
    segmentation.add_argument(
        "--tta", action="store_true", help="average over flips and quarter turns: 8 times the work"
    )
    tiles = parser.add_argument_group("tiles, for large images")
    tiles.add_argument("--tile", type=int, default=tiling.TILE, help="side of a tile, pixels")
    tiles.add_argument(
        "--overlap", type=int,
        help="pixels of context around a tile; without it all that the network sees: exact",
    )  # fmt: skip
    tiles.add_argument(
        "--skip", action=argparse.BooleanOptionalAction, default=True,
        help="skip glass in images of more than 64 megapixels",
    )  # fmt: skip
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpu_id", type=int, default=0, help="number of the GPU; -1: the CPU")
    machine.add_argument(
        "--batch_size", type=int, help="tiles predicted at once; without it 4 on a GPU, else 1"
    )
    instead = parser.add_argument_group("instead of results")
    instead.add_argument(
        "--check_seams", action="store_true", help="compare tiled with untiled prediction"
    )
    instead.add_argument("--export_model", metavar="FILE", help="write model.pt2 or model.onnx")
    return parser.parse_args(argv)


def main(args):
    check_positive(args, ("batch_size", "tile", "pixel_size"))
    if args.threshold is not None and not 0 < args.threshold < 1:
        raise InputError(f"--threshold: found {args.threshold}, expected a number between 0 and 1")
    halo = tiling.HALO if args.overlap is None else args.overlap
    for flag, pixels, least in (("tile", args.tile, halo), ("overlap", halo, 0)):
        if pixels % tiling.GRID or pixels < least:
            raise InputError(
                f"--{flag}: found {pixels}, expected a multiple of {tiling.GRID} of {least} or more"
            )

    # --- what to do, and whether it can be done ---
    device, rank, processes = utils.start_processes(args.gpu_id, waiting=True)
    path = find_checkpoint(args.ckpt)
    checkpoint = utils.load_checkpoint(path)
    model = utils.build_model(checkpoint, path)
    threshold = checkpoint["threshold"] if args.threshold is None else args.threshold
    if args.export_model:
        if rank == 0:
            print(export(args, model, checkpoint))
        return
    todo = find_images(args)
    opened, faults = check_images(todo, rank, processes)
    if faults:
        if rank == 0:  # the others end in silence
            raise InputError("; ".join(faults))
        return
    sizes = {pair.name: args.pixel_size or opened[pair.name].pixel_size_um for pair in todo}
    trained_at = checkpoint.get("pixel_size_um")
    scales = {name: scale_of(size, trained_at) for name, size in sizes.items()}
    say = print if rank == 0 else (lambda *_: None)
    say(
        f"{path} | U-Net {model.config['dimensions']} | {device}"
        + (f" x {processes}" if processes > 1 else "")
        + f" | threshold {threshold:g} | {len(todo)} image{'s' if len(todo) > 1 else ''}"
    )
    if checkpoint["channel_order"] == "bgr":
        say(
            f"{path} is a bare state dict of the first version, which learned from swapped "
            f"colours: it is fed blue, green, red."
        )
    unknown = [name for name, size in sizes.items() if trained_at and not size]
    if unknown:
        say(
            f"No pixel size in {unknown[0]}"
            + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
            + f": taken as the network's {trained_at:.3g} um; --pixel_size tells it."
        )

    utils.keep_freed_memory()
    predict = utils.predictor(model, checkpoint, device, args.tta)
    batch_size = args.batch_size or (4 if device.type == "cuda" else 1)
    tiled = {"tile": args.tile, "halo": halo, "batch_size": batch_size}
    if args.check_seams:
        for pair in todo[rank::processes]:
            print(check_seams(pair.name, opened[pair.name], predict, threshold, tiled))
        return

    # --- what is finished already ---
    results = Path(args.image_folder)
    (results / "rows").mkdir(parents=True, exist_ok=True)
    made_with = {"checkpoint": file_hash(path), "threshold": threshold, "tta": args.tta}
    made_with |= {"overlap": halo, "skip": args.skip, "version": utils.VERSION}
    made_with = {
        pair.name: made_with
        | {"scale": scales[pair.name], "files": [file_mark(file) for file in pair[1:]]}
        for pair in todo
    }
    left = [
        pair for pair in todo
        if args.overwrite or finished_row(results, pair.name, made_with[pair.name]) is None
    ]  # fmt: skip
    if len(left) < len(todo):
        say(f"{len(todo) - len(left)} of them finished already; --overwrite redoes them")
    utils.everyone(None)  # nobody writes before all have looked

    # --- predict, count, write ---
    is_big = {pair.name: opened[pair.name].is_big for pair in left}
    shared = [pair for pair in left if is_big[pair.name]]
    mine = [pair for pair in left if not is_big[pair.name]][rank::processes]
    megapixels = {
        pair.name: opened[pair.name].height * opened[pair.name].width / 1e6 for pair in left
    }
    failures = []
    bar = tqdm(
        total=round(sum(megapixels[pair.name] for pair in mine + shared), 1), desc="infer",
        unit="Mpx", leave=False, disable=None if rank == 0 else True,
    )  # fmt: skip
    for pair in mine + shared:
        started = time.monotonic()
        image = opened[pair.name]
        settings = tiled | {"scale": scales[pair.name]}
        infer = infer_shared if is_big[pair.name] else infer_alone
        extra = {"skip_glass": args.skip} if is_big[pair.name] else {}
        try:
            row = infer(results, pair, image, predict, threshold, settings | extra, bar)
        except (InputError, OSError) as error:
            failures.append(str(error))
            continue
        finally:
            image.close()
        if row:
            if sizes[pair.name]:
                row["tissue_mm2"] = (
                    row.pop("tissue") * megapixels[pair.name] * sizes[pair.name] ** 2
                )
            row["seconds"] = time.monotonic() - started
            content = {"row": row, "made_with": made_with[pair.name]}
            utils.write_json(results / "rows" / f"{pair.name}.json", content)
    bar.close()
    failures = [fault for faults in utils.everyone(failures) for fault in faults]

    # --- report ---
    if rank == 0:
        found = (finished_row(results, pair.name, made_with[pair.name]) for pair in todo)
        rows = [row for row in found if row is not None]
        if rows:
            report.write_counts(results / "counts.csv", rows)
            settings = {"checkpoint": str(path), "threshold": f"{threshold:g}"}
            settings |= {"device": str(device), "flips and turns averaged": args.tta}
            settings |= {f"{name} version": version for name, version in utils.versions().items()}
            skipped = {row["image"]: f"{row['skipped']:.0%}" for row in rows if row.get("skipped")}
            settings |= {f"skipped as glass in {name}": share for name, share in skipped.items()}
            report.write_report(results / "report.html", results, rows, settings)
            print(report.text_table(rows))
            for name, share in skipped.items():
                print(f"{name}: {share} of it is glass and was skipped (--no-skip predicts it too)")
            print(f"masks and overlays: {results} | counts: {results / 'counts.csv'}")
            print(f"look at {results / 'report.html'}")
    utils.end_processes()
    if failures and rank == 0:
        raise InputError("; ".join(failures))


def infer_alone(results, pair, image, predict, threshold, settings, bar) -> dict:
    """Predict one image in memory, write its files, and return its row of counts.csv."""
    probability = np.zeros((image.height, image.width), np.float32)
    share = 0.0  # of tissue
    tiles = tiling.tiles_of(image.height, image.width, settings["tile"])
    for part, values, tissue in tiling.predict_tiles(image, tiles, predict, **settings):
        probability[part.y : part.y + part.height, part.x : part.x + part.width] = values
        share += tissue * part.height * part.width / probability.size
        bar.update(part.height * part.width / 1e6)
    mask = probability >= threshold
    pixels = image.read(0, 0, image.height, image.width)
    row = {"image": pair.name, "height": image.height, "width": image.width, "tissue": share}
    row["contours"] = len(nuclei.contours(mask))
    report.write_image(results / f"{pair.name}_prediction.png", mask)
    report.write_image(results / f"{pair.name}_image.png", pixels)
    report.write_image(results / f"{pair.name}_overlay.png", report.overlay(pixels, mask))
    if pair.mask:
        reference = images.read_mask(pair.mask)
        counts = utils.pixel_counts(torch.from_numpy(mask), torch.from_numpy(reference))
        row |= {"gt_contours": len(nuclei.contours(reference)), **utils.scores(counts)}
        report.write_image(results / f"{pair.name}_gt.png", reference)
    return row


def infer_shared(results, pair, image, predict, threshold, settings, bar) -> dict | None:
    """Predict one image by windows, its rows of tiles shared out among all processes.

    The first process puts the mask together, counts, and returns the row of counts.csv.
    """
    rank, processes = utils.place_among_processes()
    tile = settings["tile"]
    tiles = tiling.tiles_of(image.height, image.width, tile)
    mine = [part for part in tiles if part.y // tile % processes == rank]
    spool = mosaic.Spool(results / f".{pair.name}.{rank}.part", tile)
    pixels = {"tissue": 0.0, "skipped": 0.0}

    def keep(predicted):
        part, probability, tissue = predicted
        size = part.height * part.width
        pixels["tissue"] += tissue * size
        pixels["skipped"] += size if probability is None else 0
        spool.add(
            part, np.zeros(part[2:], bool) if probability is None else probability >= threshold
        )
        return size

    outcome = {"fault": None, "pixels": pixels}
    try:
        predicted = tiling.predict_tiles(image, mine, predict, **settings)
        for size in tiling.ahead(keep, predicted, 4):
            bar.update(size * processes / 1e6)
    except (InputError, OSError) as error:
        outcome["fault"] = str(error)
    outcome["places"] = spool.close()
    outcomes = utils.everyone(outcome)
    fault = next((o["fault"] for o in outcomes if o["fault"]), None)
    row = None
    try:
        if rank == 0 and not fault:
            row = {"image": pair.name, "height": image.height, "width": image.width}
            row |= {k: sum(o["pixels"][k] for o in outcomes) for k in pixels}
            row |= {k: row[k] / image.height / image.width for k in pixels}
            places = {part: place for o in outcomes for part, place in o["places"].items()}
            row |= merge(results, pair, image, tiles, places, tile)
    finally:
        utils.everyone(None)  # the others' tiles are read
        spool.path.unlink(missing_ok=True)
    if fault and rank == 0:
        raise InputError(fault)
    return row


def merge(results, pair, image, tiles, places, tile) -> dict:
    """Write the mask of all processes' tiles, and count and score it on the way."""
    counter = stitching.ContourCounter(image.height, image.width)
    reference = windows.open_mask(pair.mask) if pair.mask else None
    gt_counter = stitching.ContourCounter(image.height, image.width)
    counts = torch.zeros(4, dtype=torch.int64)

    def visit(part, mask):
        counter.add(mask, part.y, part.x)
        if reference:
            truth = reference.read(*part)
            gt_counter.add(truth, part.y, part.x)
            counts.add_(utils.pixel_counts(torch.from_numpy(mask), torch.from_numpy(truth)))

    prediction = results / f"{pair.name}_prediction.tif"
    mosaic.write_mosaic(prediction, tiles, places, tile, image.pixel_size_um, visit)
    row = {"contours": counter.count()}
    if reference:
        row |= {"gt_contours": gt_counter.count(), **utils.scores(counts)}
        report.write_image(results / f"{pair.name}_gt.png", reference.view() > 127)
        reference.close()
    small = image.view()
    with_mask = windows.open_mask(prediction)
    report.write_image(results / f"{pair.name}_image.png", small)
    mask = with_mask.view() > 127
    report.write_image(results / f"{pair.name}_overlay.png", report.overlay(small, mask))
    with_mask.close()
    return row


def check_seams(name, image, predict, threshold, tiled) -> str:
    """A line that compares an image's tiled prediction with the untiled one."""
    pixels, differing, contours = 0, 0, [0, 0]
    for pair in tiling.seam_samples(image, predict, **tiled):
        untiled, tiled_mask = (probability >= threshold for probability in pair)
        pixels += untiled.size
        differing += np.count_nonzero(untiled != tiled_mask)
        contours = [
            n + len(nuclei.contours(m))
            for n, m in zip(contours, (untiled, tiled_mask), strict=True)
        ]
    image.close()
    return (
        f"{name}: {differing} of {pixels} pixels differ ({differing / pixels:.4%}), contours "
        f"{contours[0]} untiled and {contours[1]} tiled"
    )


def export(args, model, checkpoint) -> str:
    """Write the network for other programs, checked on the first image there is."""
    if args.images:
        image = images.read_image(next(iter(images.find_images(*args.images).values())))
    else:
        image = synthetic.draw_tissue(256, 256, seed=0).image
    return utils.export_model(Path(args.export_model), model, checkpoint, image[:512, :512])


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


def check_images(todo, rank, processes) -> tuple[dict[str, windows.Windows], list[str]]:
    """Open all images, and decode the small ones and their references once, so that faults show
    before anything is written. Big ones show theirs where they are read.
    """
    opened, faults = {}, []
    for index, pair in enumerate(todo):
        try:
            image = opened[pair.name] = windows.open_image(pair.image)
            reference = windows.open_mask(pair.mask) if pair.mask else image
            if (reference.height, reference.width) != (image.height, image.width):
                raise InputError(
                    f"{pair.mask}: found a mask of {reference.height} x {reference.width} pixels "
                    f"(height x width), expected {image.height} x {image.width} as in "
                    f"{pair.image}, replace one of them"
                )
            if index % processes == rank and not image.is_big:
                image.read(0, 0, 1, 1)
                reference.read(0, 0, 1, 1)
            image.close()
        except (InputError, OSError) as error:
            faults.append(str(error))
    everyones = [fault for faults in utils.everyone(faults) for fault in faults]
    return opened, list(dict.fromkeys(everyones))


def scale_of(size: float | None, trained_at: float | None) -> float:
    """How many of an image's pixels make one of the network's; 1 if they are about equal, or if
    one of the pixel sizes (micrometres) is not known.
    """
    if not size or not trained_at or abs(trained_at / size - 1) <= windows.SAME:
        return 1.0
    return trained_at / size


def file_mark(path: Path | None) -> list | None:
    """What changes when a file does: its size and its time."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path else None


def finished_row(results: Path, name: str, made_with: dict) -> dict | None:
    """An image's row, if an earlier run finished it with the same checkpoint and settings."""
    record = results / "rows" / f"{name}.json"
    if not record.is_file() or not list(results.glob(f"{name}_prediction.*")):
        return None
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content["row"] if content["made_with"] == made_with else None


if __name__ == "__main__":
    run_script(main, parse_args)
