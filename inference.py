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

import json
import math
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Threads that wait leave their core to other programs; it must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from tqdm import tqdm

import utils
from tissue import (
    agreement,
    exports,
    masks,
    mosaic,
    nuclei,
    pairs,
    patches,
    report,
    stitching,
    synthetic,
    tiling,
    windows,
)
from tissue.files import InputError, Parser, check_positive, file_hash, run_script
from tissue.pixel_size import scale_of

SHIPPED = Path(__file__).parent / "log" / "ckpt" / "nuclei_unet.pt"


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    files = parser.add_argument_group("files")
    files.add_argument("--root", default="./data/", help="folder given to preprocess.py")
    files.add_argument("--images", nargs="+", help="image files or folders, instead of --root's")
    files.add_argument("--masks", help="folder with reference masks for --images")
    files.add_argument("--ckpt", help="checkpoint or run folder; without it the weights that ship")
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
        "--tta", action="store_true",
        help="average over flips, quarter turns and two sizes: 13 times the work",
    )  # fmt: skip
    segmentation.add_argument(
        "--split", nargs="+", metavar="NAME=VALUE", default=[],
        help=f"change how touching nuclei are split: {', '.join(nuclei.Split._fields)}",
    )  # fmt: skip
    segmentation.add_argument(
        "--export", action="store_true", help="write ImageJ's ROI zip and COCO JSON too"
    )
    segmentation.add_argument(
        "--check_exports", action="store_true", help="read all exports back and compare them"
    )
    tiles = parser.add_argument_group("tiles, for large images")
    tiles.add_argument("--tile", type=int, default=tiling.TILE, help="side of a tile, pixels")
    tiles.add_argument(
        "--overlap", type=int,
        help="pixels of context around a tile; without it all that the network sees: exact",
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
    # --- what to do, and whether it can be done ---
    device, rank, processes = utils.start_processes(args.gpu_id, waiting=True)
    path = find_checkpoint(args.ckpt)
    checkpoint = utils.load_checkpoint(path)
    model = utils.build_model(checkpoint, path)
    halo = model.halo if args.overlap is None else args.overlap
    for flag, pixels, least in (("tile", args.tile, halo), ("overlap", halo, 0)):
        if pixels % model.grid or pixels < least:
            raise InputError(
                f"--{flag}: found {pixels}, expected a multiple of {model.grid} of {least} or more"
            )
    threshold = checkpoint["threshold"] if args.threshold is None else args.threshold
    if args.export_model:
        if rank == 0:
            print(export(args, model, checkpoint))
        return
    todo = find_images(args)
    opened, faults, notes = check_images(todo, rank, processes)
    if faults:
        if rank == 0:  # the others end in silence
            raise InputError("; ".join(faults))
        return
    sizes = {pair.name: args.pixel_size or opened[pair.name].pixel_size_um for pair in todo}
    split = split_of(checkpoint, args.split)
    trained_at = checkpoint.get("pixel_size_um")
    scales = {name: scale_of(size, trained_at, name) for name, size in sizes.items()}
    say = print if rank == 0 else (lambda *_: None)
    say(
        f"{path} | {model.config['arch']} {model.config['dimensions']} | {device}"
        + (f" x {processes}" if processes > 1 else "")
        + f" | threshold {threshold:g} | split {split} | {len(todo)} image"
        + ("s" if len(todo) > 1 else "")
    )
    for note in notes:
        say(note)
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

    predict = utils.predictor(model, checkpoint, device, args.tta)
    batch_size = args.batch_size or (4 if device.type == "cuda" else 1)
    tiled = utils.prediction_settings(model, checkpoint, args.tta)
    tiled |= {"tile": args.tile, "halo": halo, "batch_size": batch_size}
    if args.check_seams:
        for pair in todo[rank::processes]:
            how = tiled | {"scale": scales[pair.name]}
            print(check_seams(pair.name, opened[pair.name], predict, threshold, how))
        return

    # --- what is finished already ---
    results = Path(args.image_folder)
    inside = [str(p) for pair in todo for p in pair[1:] if p and same_folder(p.parent, results)]
    if inside:
        raise InputError(
            f"--image_folder: found input in {results} ({inside[0]}), expected another folder: "
            f"results may have the names of images"
        )
    (results / "rows").mkdir(parents=True, exist_ok=True)
    formats = ("csv", "geojson", "rois", "coco") if args.export else ("csv", "geojson")
    settings = {"checkpoint": file_hash(path), "threshold": threshold, "tta": args.tta}
    settings |= {"sizes": list(tiled["sizes"])}
    settings |= {"overlap": halo, "split": split._asdict()}
    settings |= {"formats": list(formats), "version": utils.VERSION}
    label_maps = {} if args.images else pairs.label_folder(args.root)
    made_with, tasks = {}, []
    for pair in todo:
        label_map = label_maps.get(pair.name)
        files = [file_mark(path) for path in (*pair[1:], label_map)]
        made_with[pair.name] = settings | {"pixel_size": sizes[pair.name], "files": files}
        image = opened[pair.name]
        how = tiled | {"scale": scales[pair.name]}
        # Of about one size for the network, whatever the image's pixels.
        how["tile"] = (
            round(args.tile * min(how["scale"], 4) / model.grid) * model.grid or model.grid
        )
        size = sizes[pair.name]
        task = Task(
            pair,
            image,
            size,
            size or trained_at,
            label_map,
            threshold,
            split,
            formats,
            how,
            results,
        )
        if args.overwrite or finished_row(results, pair.name, made_with[pair.name]) is None:
            tasks.append(task)
    if len(tasks) < len(todo):
        say(f"{len(todo) - len(tasks)} of them finished already; --overwrite redoes them")
    utils.everyone(None)  # nobody writes before all have looked

    # --- predict, count, write ---
    shared = [task for task in tasks if task.image.is_big]
    mine = [task for task in tasks if not task.image.is_big][rank::processes]
    failures = []
    bar = tqdm(
        total=round(sum(megapixels(task.image) for task in mine + shared), 1), desc="infer",
        unit="Mpx", leave=False, disable=None if rank == 0 else True,
    )  # fmt: skip
    for task in mine + shared:
        started = time.monotonic()
        name, size = task.pair.name, task.pixel_size_um
        if rank == 0 or not task.image.is_big:  # an earlier run's results hold no more
            for outdated in (f"rows/{name}.json", f"{name}_gt.png", f"{name}_errors.png"):
                (results / outdated).unlink(missing_ok=True)
        try:
            row = (infer_shared if task.image.is_big else infer_alone)(task, predict, bar)
        except (InputError, OSError) as error:
            failures.append(str(error))
            continue
        finally:
            task.image.close()
        if row is None:  # the first process has it
            continue
        row |= {"image": name, "height": task.image.height, "width": task.image.width}
        if size:
            row["tissue_mm2"] = row["tissue"] * megapixels(task.image) * size**2
        if size and row["tissue"]:
            row["nuclei_per_mm2"] = row["nuclei"] / row["tissue_mm2"]
        row["seconds"] = time.monotonic() - started
        content = {"row": row, "made_with": made_with[name]}
        utils.write_json(results / "rows" / f"{name}.json", content)
        if args.check_exports:
            try:
                tqdm.write(f"{name}: {exports.check_exports(results, name)}")
            except InputError as error:
                failures.append(str(error))
    bar.close()
    failures = [fault for faults in utils.everyone(failures) for fault in faults]

    # --- report ---
    if rank == 0:
        found = (finished_row(results, pair.name, made_with[pair.name]) for pair in todo)
        rows = [row for row in found if row is not None]
        if not rows:
            for outdated in ("counts.csv", "errors.csv", "report.html"):
                (results / outdated).unlink(missing_ok=True)
        else:
            about = {"checkpoint": str(path), "threshold": f"{threshold:g}"}
            about |= {"split": str(split), "flips, turns and sizes averaged": args.tta}
            about |= {"brought to one colour": tiled["colour"] is not None, "device": str(device)}
            about |= {f"{name} version": version for name, version in utils.versions().items()}
            skipped = {row["image"]: f"{row['skipped']:.0%}" for row in rows if row.get("skipped")}
            about |= {f"skipped as glass in {name}": share for name, share in skipped.items()}
            report.write_counts(results / "counts.csv", rows)
            report.write_errors(results / "errors.csv", error_rows(rows))
            report.write_report(results / "report.html", results, rows, about)
            print(report.text_table(rows))
            for name, share in skipped.items():
                print(f"{name}: {share} of it is glass and was skipped")
            print(f"masks and overlays: {results} | counts: {results / 'counts.csv'}")
            print(f"look at {results / 'report.html'}")
    utils.end_processes()
    if failures and rank == 0:
        raise InputError("; ".join(failures))


class Task(NamedTuple):
    """One image to infer, and how."""

    pair: pairs.Pair
    image: windows.Windows
    pixel_size_um: float | None
    split_at_um: float | None  # the same, or where that is not known the network's
    label_map: Path | None  # one number per nucleus, if there is such a reference
    threshold: float
    split: nuclei.Split
    formats: tuple[str, ...]  # of exports.FORMATS
    tiled: dict  # settings of tiling.predict_tiles
    results: Path

    def file(self, ending: str) -> Path:
        return self.results / f"{self.pair.name}{ending}"


def infer_alone(task, predict, bar) -> dict:
    """Predict one image in memory, write its files, and return what is counted and scored."""
    image = task.image
    probability = np.zeros((image.height, image.width), np.float32)
    tissue = 0.0  # pixels
    tiles = tiling.tiles_of(image.height, image.width, task.tiled["tile"])
    for part, values, share in tiling.predict_tiles(image, tiles, predict, **task.tiled):
        if values is not None:
            probability[part.y : part.y + part.height, part.x : part.x + part.width] = values
        tissue += share * part.height * part.width
        bar.update(part.height * part.width / 1e6)
    mask = probability >= task.threshold
    del probability  # four bytes a pixel
    pixels = image.read(0, 0, image.height, image.width)
    row = {"tissue": tissue / mask.size, "contours": len(nuclei.contours(mask))}
    whole = tiling.tiles_of(image.height, image.width, max(mask.shape))
    (labels,) = (found.labels for found in write_nuclei(task, windows.from_array(mask), whole, row))
    exports.write_labels(task.file("_labels.tif"), labels, task.pixel_size_um)
    report.write_image(task.file("_prediction.png"), mask)
    report.write_image(task.file("_image.png"), pixels)
    report.write_image(task.file("_overlay.png"), report.overlay(pixels, labels))
    if task.pair.mask:
        reference, numbers, _ = masks.read(task.pair.mask)
        counts = utils.pixel_counts(torch.from_numpy(mask), torch.from_numpy(reference))
        row |= {"gt_contours": len(nuclei.contours(reference)), **utils.scores(counts)}
        truth = reference_nuclei(task, reference, numbers)
        table = agreement.overlap(labels, truth)
        found = agreement.errors(table)
        row |= {"gt_nuclei": int(truth.max(initial=0)), "aji": agreement.aji(table)}
        row |= agreement.panoptic_quality(table) | {"errors": found.counts}
        report.write_image(task.file("_gt.png"), reference)
        classes = [np.array(agreement.CLASSES)[part] for part in found[:2]]
        drawn = report.error_overlay(pixels, labels, truth, *classes)
        report.write_image(task.file("_errors.png"), drawn)
    return row


def reference_nuclei(task, mask, numbers) -> np.ndarray:
    """The reference's nuclei, int32 (H, W): as its label map has them, or else split."""
    path = task.label_map or task.pair.mask
    label_map = masks.read(path).labels if task.label_map else numbers
    if label_map is not None and label_map.shape != mask.shape:
        raise InputError(
            f"{path}: found a label map of {label_map.shape[0]} x {label_map.shape[1]} pixels "
            f"(height x width), expected {mask.shape[0]} x {mask.shape[1]}, replace or remove it"
        )
    if label_map is not None:
        return nuclei.reference_labels(label_map)
    return nuclei.nuclei(mask, task.split_at_um, nuclei.REFERENCE_SPLIT)


def write_nuclei(task, mask, tiles, row) -> Iterator[stitching.FoundNuclei]:
    """Write the files of a mask's nuclei while they are found, tile by tile, and count them."""
    find = partial(nuclei.nuclei, pixel_size_um=task.split_at_um, split=task.split)
    shape = mask.height, mask.width
    row |= {"nuclei": 0, "nuclei_in_frame": 0}
    with exports.NucleiFiles(task.results, task.pair.name, shape, task.formats) as files:
        for found in stitching.nuclei_by_tiles(mask, tiles, find):
            table = nuclei.measure(found.new, task.image.read(*found.window), task.pixel_size_um)
            corner = np.array([found.window.x, found.window.y])
            table |= {"id": found.ids, "y": table["y"] + corner[1], "x": table["x"] + corner[0]}
            rings = [ring + corner for ring in nuclei.outlines(found.new)]
            files.add(table, rings)
            row["nuclei"] += len(rings)
            row["nuclei_in_frame"] += nuclei.count_in_frame(rings)
            yield found


def write_nuclei_by_tiles(task, mask, tiles, row) -> None:
    """`write_nuclei`, and their label map with it, holding neither map nor nuclei."""
    found = write_nuclei(task, mask, tiles, row)
    labels = (part.labels.astype(np.uint32) for part in found)
    how = task.tiled["tile"], np.uint32, task.pixel_size_um
    mosaic.write_tiles(task.file("_labels.tif"), labels, tiles, *how)


def infer_shared(task, predict, bar) -> dict | None:
    """Predict one image by windows, its rows of tiles shared out among all processes.

    The first process puts the mask together, finds the nuclei, and returns what is counted.
    """
    rank, processes = utils.place_among_processes()
    image, tile = task.image, task.tiled["tile"]
    tiles = tiling.tiles_of(image.height, image.width, tile)
    mine = [part for part in tiles if part.y // tile % processes == rank]
    path = task.results / f".{task.pair.name}.{rank}.part"
    pixels = {"tissue": 0.0, "skipped": 0.0}

    def keep(predicted):
        part, probability, tissue = predicted
        size = part.height * part.width
        pixels["tissue"] += tissue * size
        pixels["skipped"] += size if probability is None else 0
        glass = np.zeros((part.height, part.width), bool)
        spool.add(part, glass if probability is None else probability >= task.threshold)
        return size

    outcome = {"fault": None, "pixels": pixels, "places": {}}
    try:
        spool = mosaic.Spool(path, tile)
        predicted = tiling.predict_tiles(image, mine, predict, **task.tiled)
        for size in tiling.ahead(keep, predicted, 4):
            bar.update(size * processes / 1e6)
        outcome["places"] = spool.close()
    except (InputError, OSError) as error:
        outcome["fault"] = str(error)
    outcomes = utils.everyone(outcome)
    fault = next((o["fault"] for o in outcomes if o["fault"]), None)
    row = None
    try:
        if rank == 0 and not fault:
            totals = {key: sum(o["pixels"][key] for o in outcomes) for key in pixels}
            row = {key: value / image.height / image.width for key, value in totals.items()}
            places = {part: place for o in outcomes for part, place in o["places"].items()}
            row |= merge(task, tiles, places)
    finally:
        utils.everyone(None)  # the others' tiles are read
        path.unlink(missing_ok=True)
    if fault and rank == 0:
        raise InputError(fault)
    return row


def merge(task, tiles, places) -> dict:
    """Write the mask of all processes' tiles, count and score it on the way, find its nuclei."""
    image, tile = task.image, task.tiled["tile"]
    counter = stitching.ContourCounter(image.height, image.width)
    reference = windows.open_mask(task.pair.mask) if task.pair.mask else None
    gt_counter = stitching.ContourCounter(image.height, image.width)
    counts = torch.zeros(4, dtype=torch.int64)

    def visit(part, mask):
        counter.add(mask, part.y, part.x)
        if reference:
            truth = reference.read(*part)
            gt_counter.add(truth, part.y, part.x)
            counts.add_(utils.pixel_counts(torch.from_numpy(mask), torch.from_numpy(truth)))

    prediction = task.file("_prediction.tif")
    mosaic.write_mosaic(prediction, tiles, places, tile, task.pixel_size_um, visit)
    row = {"contours": counter.count()}
    mask = windows.open_mask(prediction)
    write_nuclei_by_tiles(task, mask, tiles, row)
    if reference:
        row |= {"gt_contours": gt_counter.count()}
        row |= utils.scores(counts)
        report.write_image(task.file("_gt.png"), reference.view() > 127)
        reference.close()
    small = image.view()
    report.write_image(task.file("_image.png"), small)
    report.write_image(task.file("_overlay.png"), report.overlay(small, mask.view() > 127))
    mask.close()
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
    pixels = synthetic.draw_tissue(512, 512, seed=0).image
    if args.images:
        image = windows.open_image(next(iter(pairs.find_images(*args.images).values())))
        if min(image.height, image.width) >= 3 * model.grid:
            pixels = image.read(0, 0, min(512, image.height), min(512, image.width))
    return utils.export_model(Path(args.export_model), model, checkpoint, pixels)


def error_rows(rows) -> list[dict]:
    """What became of each image's reference nuclei, for errors.csv."""
    table = []
    for row in rows:
        if counts := row.get("errors"):
            both = {key: counts[key] for key in ("matched", "missed", "spurious")}
            both |= {key: counts[f"{key}_reference"] for key in ("merged", "split")}
            true = sum(count for key, count in both.items() if key != "spurious")
            table.append({"image": row["image"], "true": true} | both)
    return table


def split_of(checkpoint: dict, changes: list[str]) -> nuclei.Split:
    """How touching nuclei are split: the checkpoint's way, or the default, with `--split`'s."""
    split = nuclei.PREDICTION_SPLIT._replace(**checkpoint.get("split", {}))
    for change in changes:
        name, _, value = change.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        largest = {"sigma": 10, "h": 1}.get(name, math.inf)  # micrometres; share of the depth
        if name not in nuclei.Split._fields or not 0 <= number <= largest or number == math.inf:
            raise InputError(
                f"--split: found {change}, expected NAME=NUMBER, a name of "
                f"{', '.join(nuclei.Split._fields)} and a number from 0 up (sigma to 10, h to 1)"
            )
        split = split._replace(**{name: number})
    return split


def megapixels(image: windows.Windows) -> float:
    return image.height * image.width / 1e6


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


def find_images(args) -> list[pairs.Pair]:
    """The images to segment, sorted by name, each with the path of its reference mask or None."""
    if not args.images:
        if args.masks:
            raise InputError("--masks: found it without --images, expected both; add --images")
        root = Path(args.root)
        return [
            pairs.Pair(image["name"], root / image["image"], root / image["mask"])
            for image in patches.read_manifest(root)["images"]
            if image["split"] == "val"
        ]
    found = pairs.find_images(*args.images)
    masks = pairs.find_images(args.masks) if args.masks else dict.fromkeys(found)
    lonely = ", ".join(str(path) for name, path in found.items() if name not in masks)
    if lonely:
        raise InputError(f"{lonely}: found no mask of that name in {args.masks}, expected one each")
    return [pairs.Pair(name, path, masks[name]) for name, path in found.items()]


def check_images(todo, rank, processes) -> tuple[dict, list[str], list[str]]:
    """Open all images, and decode the small ones and all references once, so that faults show
    before anything is written. Big ones show theirs where they are read.

    Returns the Windows by name, and the faults and the notes on references of all processes.
    """
    opened, faults, notes = {}, [], []
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
            if index % processes == rank and pair.mask:
                notes += reference.notes
                reference.close()
            image.close()
        except (InputError, OSError) as error:
            faults.append(str(error))
    everyones = utils.everyone((faults, notes))
    faults, notes = (
        list(dict.fromkeys(line for lines in part for line in lines))
        for part in zip(*everyones, strict=True)
    )
    return opened, faults, notes


def same_folder(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def file_mark(path: Path | None) -> list | None:
    """What changes when a file does: its size and its time."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path else None


def finished_row(results: Path, name: str, made_with: dict) -> dict | None:
    """An image's row, if an earlier run finished it with the same checkpoint and settings."""
    record = results / "rows" / f"{name}.json"
    masks = (results / f"{name}_prediction{suffix}" for suffix in (".png", ".tif"))
    if not record.is_file() or not any(mask.is_file() for mask in masks):
        return None
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content["row"] if content["made_with"] == made_with else None


if __name__ == "__main__":
    run_script(main, parse_args)
