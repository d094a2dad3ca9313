"""Segment and count the nuclei of whole images with a trained network.

    python3 inference.py --gpu_id 0 --ckpt ./log/<run>/best.pt --image_folder ./results/
    python3 inference.py --ckpt ./log/<run> --images my_slide.tif my_folder/
    python3 inference.py --ckpt ./log/<run> --images my_folder/ --masks my_masks/
    torchrun --nproc_per_node 4 -- inference.py --ckpt ./log/<run> --images slides/
    python3 inference.py --ckpt ./log/<run> --images my_slide.tif --check_seams
    python3 inference.py --ckpt ./log/<run> --export_model nuclei.onnx

Without --images it takes the validation images of <root>, with their masks as reference. Writes
<name>_prediction.png, _image.png, _overlay.png and, with a reference, _gt.png for each image, and
counts.csv and report.html for all images of the folder, those of earlier calls too; with a network
that has instances also its depth map, <name>_distance.png. Of an image of more than 64 megapixels
prediction and depth map are tiled BigTIFFs and the others are small views; it is never held in
memory.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import utils
from learning import checkpoints
from model import sees_all
from tissue import (
    agreement,
    exports,
    masks,
    measures,
    mosaic,
    nuclei,
    pairs,
    patches,
    pictures,
    report,
    results,
    stitching,
    synthetic,
    tiling,
    windows,
)
from tissue.depth import segment
from tissue.files import InputError, Parser, check_numbers, file_hash, run_script
from tissue.images import bits_in_use
from tissue.manifest import MANIFEST
from tissue.pixel_size import MICROSCOPE_UM, resampling_lines, scale_of

SHIPPED = Path(__file__).parent / "log" / "ckpt" / "nuclei.pt"
RANGES = {  # of flags that are numbers; --threshold and --split have their own
    "tile": (1, 2**14),
    "overlap": (0, 2**13),
    "batch_size": (1, 2**10),
    "gpu_id": (-1, 2**10),
    "pixel_size": MICROSCOPE_UM,
    "confidence": (0, 1),
}
SPLITTING = nuclei.Split._fields[:-1]  # what --split can change; confidence has its own flag


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    files = parser.add_argument_group("files")
    files.add_argument(
        "--root", nargs="+", default="./data/", help="folders given to preprocess.py"
    )
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
        help=f"change how touching nuclei are split: {', '.join(SPLITTING)}",
    )  # fmt: skip
    segmentation.add_argument(
        "--confidence", type=float,
        help="drop nuclei less deep than this share; without it the checkpoint's; needs instances",
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
    check_flags(args)
    device, rank, processes = utils.start_processes(args.gpu_id, waiting=True)
    say = print if rank == 0 else (lambda *_: None)
    network = load_network(args, device)
    if args.export_model:
        if rank == 0:
            print(export(args, network.model, network.checkpoint))
        return
    tasks, notes, faults = plan(args, network)
    if faults:
        if rank == 0:  # the others end in silence
            raise InputError("; ".join(faults))
        return
    where = f"{device} x {processes}" if processes > 1 else f"{device}"
    say(f"{network} | {where} | " + how_many(len(tasks), "image"))
    said = [*said_of_colours(network), *said_of_tiles(network), *said_of_sizes(tasks, network)]
    for note in [*said, *notes]:
        say(note)
    predict = utils.predictor(network.model, network.checkpoint, device, args.tta)
    if args.check_seams:
        for task in tasks[rank::processes]:
            print(check_seams(task, predict, network.tiled))
        return

    with ExitStack() as held:
        if fault := keep_others_out(Path(args.image_folder), held, rank):
            if rank == 0:
                raise InputError(fault)
            return
        todo, notes = choose(tasks, args.overwrite)
        for note in notes:
            say(note)
        shown = network.shown() | {"device": str(device)}
        failures = everyones(infer_all(todo, predict, shown))
        if args.check_exports:
            failures += everyones(check_all_exports(tasks))
        if rank == 0:
            write_report(Path(args.image_folder), {task.pair.name for task in tasks})
    utils.end_processes()
    if failures and rank == 0:
        raise InputError("; ".join(failures))


# --- plan


def check_flags(args) -> None:
    """Raise InputError for a number that a flag cannot have."""
    check_numbers(args, RANGES)
    if args.threshold is not None and not 0 < args.threshold < 1:
        raise InputError(f"--threshold: found {args.threshold}, expected a number between 0 and 1")
    split_of({}, args.split)


class Network(NamedTuple):
    """The network of a call, and how it is used on every image."""

    path: Path
    checkpoint: dict
    model: torch.nn.Module
    threshold: float
    split: nuclei.Split
    tiled: dict  # settings of tiling.predict_tiles
    made_with: dict  # the same as a record has them, results.MadeWith

    def __str__(self):
        config = self.model.config
        return (
            f"{self.path} | {config['arch']} {config['dimensions']} | threshold "
            f"{self.threshold:g} | split {self.split}"
        )

    def shown(self) -> dict:
        """The settings as report.html shows them."""
        shown = {
            "checkpoint": f"{self.path} ({self.made_with['checkpoint'][:8]})",
            "threshold": f"{self.threshold:g}",
            "split": str(self.split),
            "flips, turns and sizes averaged": self.made_with["tta"],
            "brought to one colour": self.tiled["colour"] is not None,
            "overlap of tiles": self.tiled["halo"],
        }
        return shown | {f"{name} version": text for name, text in utils.versions().items()}


def load_network(args, device) -> Network:
    """The network that the flags name, and their settings; InputError where they do not fit it."""
    path = find_checkpoint(args.ckpt)
    checkpoint = checkpoints.load_checkpoint(path)
    model = checkpoints.build_model(checkpoint, path)
    halo = model.halo if args.overlap is None else args.overlap
    for flag, pixels, least in (("tile", args.tile, halo), ("overlap", halo, 0)):
        if pixels % model.grid or pixels < least:
            raise InputError(
                f"--{flag}: found {pixels}, expected a multiple of {model.grid} of {least} or more"
            )
    threshold = checkpoint["threshold"] if args.threshold is None else args.threshold
    split = split_of(checkpoint, args.split)
    if args.confidence is not None:
        if not model.config.get("instances"):
            raise InputError(
                f"--confidence: found a network without instances ({path}), expected one that "
                f"learned with them; leave the flag out, or choose another --ckpt"
            )
        split = split._replace(confidence=args.confidence)
    tiled = utils.prediction_settings(model, checkpoint, args.tta)
    batch_size = args.batch_size or (4 if device.type == "cuda" else 1)
    tiled |= {"tile": args.tile, "halo": halo, "batch_size": batch_size}
    made_with = {"checkpoint": file_hash(path), "threshold": threshold, "tta": args.tta}
    made_with |= {"sizes": list(tiled["sizes"]), "overlap": halo}
    made_with |= {"split": split.values(), "version": utils.VERSION}
    return Network(path, checkpoint, model, threshold, split, tiled, made_with)


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
    made_with: dict | None = None  # results.MadeWith
    row: dict | None = None  # of an earlier run, of which only files of nuclei are missing

    def file(self, kind: str) -> Path:
        """Where a file of this image lies; `kind` is one of results.ENDINGS."""
        return results.path_of(self.results, self.pair.name, kind)

    @property
    def prediction(self) -> Path:
        return self.file("big_prediction" if self.image.is_big else "prediction")

    @property
    def distance(self) -> Path:
        return self.file("big_distance" if self.image.is_big else "distance")

    @property
    def has_depth(self) -> bool:
        """Whether the network has instances, so that nuclei are found in a depth map."""
        return self.tiled.get("outputs", 1) > 1


def plan(args, network: Network) -> tuple[list[Task], list[str], list[str]]:
    """A Task for each image, what is assumed about the files, and all faults of what is given."""
    todo, told, notes = find_images(args)
    folder = Path(args.image_folder)
    roots = () if args.images else pairs.set_folders(args.root, MANIFEST)
    label_maps = {name: p for root in roots for name, p in pairs.label_folder(root).items()}
    opened, bits, more, faults = open_images(todo, label_maps, network.checkpoint.get("bits"))
    notes += more
    if not args.check_seams:
        faults += check_results(folder, todo)
    trained_at = network.checkpoint.get("pixel_size_um")
    formats = ("csv", "geojson", "rois", "coco") if args.export else ("csv", "geojson")
    tasks = []
    for pair in todo:
        if pair.name not in opened:  # its fault is known
            continue
        image, label_map = opened[pair.name], label_maps.get(pair.name)
        size = args.pixel_size or told.get(pair.name, image.pixel_size_um)
        try:
            scale = scale_of(size, trained_at, "--pixel_size" if args.pixel_size else pair.image)
        except InputError as error:
            faults.append(str(error))
            continue
        how = at_scale(network.tiled, scale)
        files = [file_mark(path) for path in (*pair[1:], label_map)]
        made_with = network.made_with | {"pixel_size": size, "files": files}
        made_with["bits"] = bits.get(pair.name)
        tasks.append(
            Task(
                pair, image, size, size or trained_at, label_map, network.threshold, network.split,
                formats, how, folder, made_with,
            )
        )  # fmt: skip
    return tasks, notes, list(dict.fromkeys(faults))


def at_scale(tiled: dict, scale: float) -> dict:
    """The settings of tiling.predict_tiles for an image of which `scale` pixels make one of the
    network's; a tile is of about one size for the network, whatever the image's pixels.
    """
    grid = tiled["grid"]
    tile = round(tiled["tile"] * min(scale, 4) / grid) * grid or grid
    return tiled | {"scale": scale, "tile": tile}


def find_images(args) -> tuple[list[pairs.Pair], dict, list[str]]:
    """The images to segment, sorted by name, each with the path of its reference mask or None; the
    pixel sizes, by name, that the patch set took them as; and what was passed over.
    """
    if not args.images:
        if args.masks:
            raise InputError("--masks: found it without --images, expected both; add --images")
        found, told = [], {}
        for root in map(Path, pairs.set_folders(args.root, MANIFEST)):
            for image in patches.read_manifest(root)["images"]:
                if image["split"] == "val":
                    files = root / image["image"], root / image["mask"]
                    found.append(pairs.Pair(image["name"], *files))
                    told[image["name"]] = image["pixel_size_um"]
        return found, told, []
    images = pairs.find_images(*args.images)
    notes = pairs.passed_over(*args.images)
    if not args.masks:
        return [pairs.Pair(name, path, None) for name, path in images.items()], {}, notes
    references = pairs.find_images(args.masks)
    notes += pairs.passed_over(args.masks)
    lonely = ", ".join(str(path) for name, path in images.items() if name not in references)
    if lonely:
        raise InputError(f"{lonely}: found no mask of that name in {args.masks}, expected one each")
    left = [path for name, path in references.items() if name not in images]
    if left:
        notes.append(f"{and_more(left)}: without an image of that name, passed over")
    return [pairs.Pair(name, path, references[name]) for name, path in images.items()], {}, notes


def open_images(todo, label_maps, learned_bits) -> tuple[dict, dict, list[str], list[str]]:
    """Open all images, and decode the small ones and their references once, so that faults show
    before anything is written. Big ones show theirs where they are read.

    Returns the Windows by name, the bits in use by the names of 16-bit images, what is assumed, and
    all faults. 16-bit images are as bright as they are to each other, and to those that the network
    learned from: all have the most bits that any of them uses.
    """
    rank, processes = utils.place_among_processes()
    opened, bits, notes, faults = {}, {}, [], []
    for pair in todo:
        try:
            if found := bits_in_use(pair.image):
                bits[pair.name] = found
        except (InputError, OSError) as error:
            faults.append(str(error))
    if bits:
        most = max(*bits.values(), learned_bits or 0)
        bits = dict.fromkeys(bits, most)
        notes.append(f"16-bit images: {most} bits are in use, of which the upper 8 are kept")
    for index, pair in enumerate(todo):
        try:
            image = opened[pair.name] = windows.open_image(pair.image, bits=bits.get(pair.name))
            if index % processes == rank:
                notes += check_image(pair, image, label_maps.get(pair.name))
        except (InputError, OSError) as error:
            faults.append(str(error))
    return opened, bits, everyones(notes), everyones(faults)


def check_image(pair: pairs.Pair, image: windows.Windows, label_map: Path | None) -> list[str]:
    """What is assumed of an image's reference; InputError where they cannot be used together."""
    notes, expected = [], (image.height, image.width)
    if not image.is_big:
        image.read(0, 0, 1, 1)
    image.close()
    if pair.mask and image.is_big:
        mask = windows.open_mask(pair.mask)
        check_size(pair.mask, "mask", (mask.height, mask.width), expected, pair.image)
        notes += mask.notes
        mask.close()
    elif pair.mask:
        mask = masks.read(pair.mask)
        check_size(pair.mask, "mask", mask.foreground.shape, expected, pair.image)
        notes += mask.notes
    if label_map and not image.is_big:
        numbers = masks.read(label_map)
        check_size(label_map, "label map", numbers.foreground.shape, expected, pair.image)
        notes += numbers.notes
    return notes


def check_size(path, kind, found, expected, image) -> None:
    """Raise InputError if a mask or label map has not the (height, width) of its image."""
    if tuple(found) != tuple(expected):
        raise InputError(
            f"{path}: found a {kind} of {found[0]} x {found[1]} pixels (height x width), expected "
            f"{expected[0]} x {expected[1]} as in {image}, replace one of them"
        )


def check_results(folder: Path, todo: list[pairs.Pair]) -> list[str]:
    """What keeps the results of these images from lying in a folder."""
    faults = results.check_names(folder, [pair.name for pair in todo])
    inside = [str(p) for pair in todo for p in pair[1:] if p and same_folder(p.parent, folder)]
    if inside:
        faults.append(
            f"--image_folder: found input in {folder} ({inside[0]}), expected another folder: "
            f"results may have the names of images"
        )
    try:
        results.check_folder(folder)
    except InputError as error:
        faults.append(str(error))
    return faults


def said_of_colours(network: Network) -> list[str]:
    """That the colours are fed in another order, if they are."""
    if network.checkpoint["channel_order"] != "bgr":
        return []
    return [
        f"{network.path} is a bare state dict of the first version, which learned from swapped "
        f"colours: it is fed blue, green, red."
    ]


def said_of_tiles(network: Network) -> list[str]:
    """That tiles are not what the whole image would be, if so."""
    if not sees_all(network.model):
        return []
    return [
        f"{network.model.config['arch']} sees all that it is shown: --tile changes the masks a "
        f"little, whatever --overlap."
    ]


def said_of_sizes(tasks: list[Task], network: Network) -> list[str]:
    """What is known of pixel sizes, and what is resampled: a line for each pixel size."""
    trained_at = network.checkpoint.get("pixel_size_um")
    if not trained_at:
        return [f"{network.path} does not say its pixel size: no image is resampled."]
    return resampling_lines({t.pair.name: t.pixel_size_um for t in tasks}, trained_at)


def and_more(names: list) -> str:
    return f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def how_many(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# --- predict


def keep_others_out(folder: Path, held: ExitStack, rank: int) -> str | None:
    """Lock the folder of results for all processes of this call; why not, if that cannot be."""
    fault = None
    if rank == 0:
        try:
            held.enter_context(results.writing(folder))
        except (InputError, OSError) as error:
            fault = str(error)
    return utils.everyone(fault)[0]


def choose(tasks: list[Task], overwrite: bool) -> tuple[list[Task], list[str]]:
    """The tasks that are not finished, or not with these settings, and lines that say so.

    An image of which only files of nuclei are missing has its `row`: its mask is there. One that
    was exported is exported again.
    """
    todo, notes = [], []
    for task in tasks:
        name, folder = task.pair.name, task.results
        try:
            record = results.read(folder, name)
        except (InputError, OSError) as error:
            record = None
            notes.append(f"{error}; made anew")
        kept = record["files"] if record else ()
        both = tuple(key for key in exports.FORMATS if key in (*task.formats, *kept))
        task = task._replace(formats=both)
        if overwrite or record is None or record["made_with"] != task.made_with:
            todo.append(task)
            continue
        lost = results.lost(folder, record)
        if lost:
            notes.append(f"{results.said_of_lost(folder, name, lost)}; made anew")
        if any(kind not in exports.FORMATS for kind in lost):
            todo.append(task)
        elif lost or any(key not in kept for key in both):
            todo.append(task._replace(row=record["row"]))
    utils.everyone(None)  # nobody writes before all have looked
    notes = at_most(notes)
    exported = len([task for task in todo if task.row])
    if done := len(tasks) - len(todo) + exported:
        notes.append(f"{done} of them finished already; --overwrite redoes them")
    if exported:
        notes.append(f"{exported} of these are exported from the masks that are there")
    return todo, notes


def at_most(lines: list[str], most: int = 5) -> list[str]:
    """So many lines, and a last one that says how many more there are."""
    return lines[:most] + [f"and {len(lines) - most} more"] * (len(lines) > most)


def everyones(texts: list[str]) -> list[str]:
    """The texts of all processes, each once."""
    return list(dict.fromkeys(text for given in utils.everyone(texts) for text in given))


def infer_all(tasks: list[Task], predict, shown: dict) -> list[str]:
    """Infer this process's share of the images, write their files and records; return faults."""
    rank, processes = utils.place_among_processes()
    shared = [task for task in tasks if task.image.is_big and not task.row]
    mine = [task for task in tasks if task.row or not task.image.is_big][rank::processes]
    failures = []
    bar = tqdm(
        total=round(sum(megapixels(task.image) for task in mine + shared), 1), desc="infer",
        unit="Mpx", leave=False, disable=None if rank == 0 else True,
    )  # fmt: skip
    for task in mine + shared:
        try:
            infer(task, predict, bar, shown)
        except (InputError, OSError) as error:
            failures.append(str(error))
        finally:
            task.image.close()
    bar.close()
    return failures


def infer(task: Task, predict, bar, shown: dict) -> None:
    """Infer one image, alone or together with the other processes, and record it as finished."""
    started = time.monotonic()
    image = task.image
    if task.row:
        results.forget(task.results, task.pair.name)
        row = export_again(task)
        bar.update(megapixels(image))
    elif image.is_big:
        row = infer_shared(task, predict, bar)
    else:
        outdated = "gt", "errors", "big_prediction", "distance", "big_distance"
        results.forget(task.results, task.pair.name, outdated)
        row = infer_alone(task, predict, bar)
    if row is None:  # the first process has it
        return
    row |= {"image": task.pair.name, "height": image.height, "width": image.width}
    if size := task.pixel_size_um:
        row["tissue_mm2"] = row["tissue"] * megapixels(image) * size**2
        if row["tissue"]:
            row["nuclei_per_mm2"] = row["nuclei"] / row["tissue_mm2"]
    row.setdefault("seconds", time.monotonic() - started)
    results.write(task.results, row, task.made_with, shown)


def infer_alone(task, predict, bar) -> dict:
    """Predict one image in memory, write its files, and return what is counted and scored."""
    image = task.image
    shape = image.height, image.width
    segmented = np.zeros(shape, np.uint8 if task.has_depth else bool)
    tissue = 0.0  # pixels
    tiles = tiling.tiles_of(*shape, task.tiled["tile"])
    for part, outputs, share in tiling.predict_tiles(image, tiles, predict, **task.tiled):
        if outputs is not None:
            at = np.s_[part.y : part.y + part.height, part.x : part.x + part.width]
            segmented[at] = segment(outputs, task.threshold)
        tissue += share * part.height * part.width
        bar.update(part.height * part.width / 1e6)
    pixels = image.read(0, 0, *shape)
    row = {"tissue": tissue / segmented.size, "contours": 0}
    whole = tiling.tiles_of(*shape, max(shape))
    parts = write_nuclei(task, windows.from_array(segmented), whole, row)
    ((labels, dropped),) = ((part.labels, part.dropped) for part in parts)
    mask = (segmented > 0) & ~dropped
    row["contours"] = len(nuclei.contours(mask))
    if task.has_depth:
        pictures.write_image(task.distance, segmented)
    exports.write_labels(task.file("labels"), labels, task.pixel_size_um)
    pictures.write_image(task.prediction, mask)
    pictures.write_image(task.file("image"), pixels)
    pictures.write_image(task.file("overlay"), pictures.overlay(pixels, labels))
    if task.pair.mask:
        reference = masks.read(task.pair.mask)
        counts = utils.pixel_counts(torch.from_numpy(mask), torch.from_numpy(reference.foreground))
        row |= {"gt_contours": len(nuclei.contours(reference.foreground)), **utils.scores(counts)}
        truth = reference_nuclei(task, reference)
        table = agreement.overlap(labels, truth)
        found = agreement.errors(table)
        row |= {"gt_nuclei": int(truth.max(initial=0)), "aji": agreement.aji(table)}
        row |= agreement.panoptic_quality(table) | {"errors": found.counts}
        pictures.write_image(task.file("gt"), reference.foreground)
        drawn = pictures.error_overlay(pixels, labels, truth, found.prediction, found.reference)
        pictures.write_image(task.file("errors"), drawn)
    return row


def reference_nuclei(task: Task, mask: masks.Mask) -> np.ndarray:
    """The reference's nuclei, int32 (H, W): as its label map has them, or else split."""
    labels = masks.read(task.label_map).labels if task.label_map else mask.labels
    if labels is not None:
        return nuclei.reference_labels(labels)
    return nuclei.nuclei(mask.foreground, task.split_at_um, nuclei.REFERENCE_SPLIT)


def write_nuclei(task, segmented, tiles, row) -> Iterator[stitching.FoundNuclei]:
    """Write the files of the nuclei of a mask or depth map while they are found, tile by tile, and
    count them.
    """
    find, least = partial(find_nuclei, task), task.split.confidence
    shape = segmented.height, segmented.width
    row |= {"nuclei": 0, "nuclei_in_frame": 0, "dropped": 0}
    with exports.NucleiFiles(task.results, task.pair.name, shape, task.formats) as files:
        for found in stitching.nuclei_by_tiles(segmented, tiles, find, least):
            table = measures.measure(found.new, task.image.read(*found.window), task.pixel_size_um)
            corner = np.array([found.window.x, found.window.y])
            table |= {"id": found.ids, "y": table["y"] + corner[1], "x": table["x"] + corner[0]}
            if found.confidence is not None:
                table["confidence"] = found.confidence
            rings = [ring + corner for ring in measures.outlines(found.new)]
            files.add(table, rings)
            row["nuclei"] += len(rings)
            row["nuclei_in_frame"] += measures.count_in_frame(rings)
            row["dropped"] += found.new_dropped
            yield found
    if not row["dropped"]:
        del row["dropped"]


def find_nuclei(task: Task, segmented: np.ndarray) -> nuclei.Found:
    """All nuclei of a window of a mask bool (H, W), or of a depth map uint8 (H, W)."""
    depth = segmented if task.has_depth else None
    return nuclei.find_nuclei(segmented > 0, task.split_at_um, task.split, depth)


def write_nuclei_by_tiles(task, segmented, tiles, row, visit=lambda _: None) -> None:
    """`write_nuclei`, and their label map with it, holding neither map nor nuclei; `visit` is shown
    what is found in each tile.
    """

    def labels():
        for found in write_nuclei(task, segmented, tiles, row):
            visit(found)
            yield found.labels.astype(np.uint32)

    how = task.tiled["tile"], np.uint32, task.pixel_size_um
    mosaic.write_tiles(task.file("labels"), labels(), tiles, *how)


def infer_shared(task, predict, bar) -> dict | None:
    """Predict one image by windows, its rows of tiles shared out among all processes.

    The first process puts the mask together, finds the nuclei, and returns what is counted.
    """
    rank, processes = utils.place_among_processes()
    image, tile = task.image, task.tiled["tile"]
    tiles = tiling.tiles_of(image.height, image.width, tile)
    mine = [part for part in tiles if part.y // tile % processes == rank]
    spool = None
    pixels = {"tissue": 0.0, "skipped": 0.0}

    def keep(predicted):
        part, outputs, tissue = predicted
        size = part.height * part.width
        pixels["tissue"] += tissue * size
        pixels["skipped"] += size if outputs is None else 0
        glass = np.zeros((part.height, part.width), bool)
        spool.add(part, glass if outputs is None else segment(outputs, task.threshold))
        return size

    outcome = {"fault": None, "pixels": pixels, "places": {}}
    try:
        if rank == 0:  # an earlier run's results hold no more
            outdated = "gt", "errors", "prediction", "distance", "big_distance"
            results.forget(task.results, task.pair.name, outdated)
        spool = mosaic.Spool(task.results, tile)
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
        if spool:
            spool.remove()
    if fault and rank == 0:
        raise InputError(fault)
    return row


def merge(task, tiles, places) -> dict:
    """Put all processes' tiles together, find the nuclei, and return what is counted and scored.

    In a depth map they are found before the mask is written, which is without those that are
    dropped; without depths they are found in the mask.
    """
    row, spool = {"contours": 0, "nuclei": 0, "nuclei_in_frame": 0}, None
    try:
        if task.has_depth:
            spool = mosaic.Spool(task.results, task.tiled["tile"])
            places = merge_depths(task, tiles, places, spool, row)
        merge_mask(task, tiles, places, row)
    finally:
        if spool:
            spool.remove()
    mask = windows.open_mask(task.prediction)
    if not task.has_depth:
        write_nuclei_by_tiles(task, mask, tiles, row)
    small = task.image.view()
    pictures.write_image(task.file("image"), small)
    pictures.write_image(task.file("overlay"), pictures.overlay(small, mask.view() > 127))
    mask.close()
    return row


def merge_depths(task, tiles, places, spool, row) -> dict:
    """Write the depth map and its nuclei, and return where the tiles of the mask without those that
    are dropped lie in `spool`.
    """
    how = task.tiled["tile"], task.pixel_size_um
    mosaic.write_mosaic(task.distance, tiles, places, *how, lambda *_: None)
    depth = windows.open_depth(task.distance)

    def keep(found):
        spool.add(found.tile, (depth.read(*found.tile) > 0) & ~found.dropped)

    write_nuclei_by_tiles(task, depth, tiles, row, keep)
    depth.close()
    return spool.close()


def merge_mask(task, tiles, places, row) -> None:
    """Write the mask that tiles make, and count and score it on the way."""
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

    mosaic.write_mosaic(task.prediction, tiles, places, tile, task.pixel_size_um, visit)
    row["contours"] = counter.count()
    if reference:
        row |= {"gt_contours": gt_counter.count(), **utils.scores(counts)}
        pictures.write_image(task.file("gt"), reference.view() > 127)
        reference.close()


def export_again(task: Task) -> dict:
    """Write the files of the nuclei of a mask that an earlier run predicted; return its row."""
    image, row = task.image, dict(task.row)
    if task.has_depth:
        segmented = windows.open_depth(task.distance)
    else:
        segmented = windows.open_mask(task.prediction)
    if image.is_big:
        tiles = tiling.tiles_of(image.height, image.width, task.tiled["tile"])
        write_nuclei_by_tiles(task, segmented, tiles, row)
    else:
        whole = tiling.tiles_of(image.height, image.width, max(image.height, image.width))
        for _ in write_nuclei(task, segmented, whole, row):
            pass
    segmented.close()
    if row["nuclei"] != task.row["nuclei"]:
        raise InputError(
            f"{segmented.path}: found a mask of {row['nuclei']} nuclei, expected "
            f"{task.row['nuclei']} as it was predicted; run inference.py again"
        )
    return row


def check_seams(task: Task, predict, tiled: dict) -> str:
    """A line that compares an image's tiled prediction with the untiled one."""
    pixels, differing, contours = 0, 0, [0, 0]
    tiled = tiled | {"scale": task.tiled["scale"]}
    for pair in tiling.seam_samples(task.image, predict, **tiled):
        untiled, tiled_mask = (outputs[0] >= task.threshold for outputs in pair)
        pixels += untiled.size
        differing += np.count_nonzero(untiled != tiled_mask)
        contours = [
            n + len(nuclei.contours(m))
            for n, m in zip(contours, (untiled, tiled_mask), strict=True)
        ]
    task.image.close()
    return (
        f"{task.pair.name}: {differing} of {pixels} pixels differ ({differing / pixels:.4%}), "
        f"contours {contours[0]} untiled and {contours[1]} tiled"
    )


# --- report


def check_all_exports(tasks: list[Task]) -> list[str]:
    """Read back this process's share of all finished images' exports, and return the faults."""
    rank, processes = utils.place_among_processes()
    faults = []
    for task in tasks[rank::processes]:
        try:
            record = results.read(task.results, task.pair.name)
            if record is not None:  # else its own fault is said
                kinds = [key for key in (*exports.FORMATS, "labels") if key in record["files"]]
                found = exports.check_exports(task.results, task.pair.name, kinds)
                print(f"{task.pair.name}: {found}")
        except (InputError, OSError) as error:
            faults.append(str(error))
    return faults


def write_report(folder: Path, names: set[str]) -> None:
    """Write the tables and the page of all finished images, and print those of this call's."""
    records, faults = results.finished(folder)
    for line in at_most(faults):
        print(f"{line}; left out of the tables")
    rows = [record["row"] for record in records]
    if not rows:
        for outdated in (results.COUNTS, results.ERRORS, results.REPORT):
            (folder / outdated).unlink(missing_ok=True)
        return
    shown, differing = results.settings_of(records)
    skipped = {row["image"]: f"{row['skipped']:.0%}" for row in rows if row.get("skipped")}
    shown |= {f"skipped as glass in {name}": share for name, share in skipped.items()}
    results.write_counts(folder / results.COUNTS, rows)
    results.write_errors(folder / results.ERRORS, rows)
    report.write_report(folder / results.REPORT, folder, rows, shown, differing)
    own = [row for row in rows if row["image"] in names]
    if own:
        print(report.text_table(own))
    for name in names & set(skipped):
        share = skipped[name]
        print(f"{name}: {share} of it is glass and was skipped")
    if len(rows) > len(own):
        others = how_many(len(rows) - len(own), "image")
        print(f"{others} of earlier calls in {folder} too: in its tables, not in this one")
    if differing:
        print(f"{report.said_of_differing(differing)}")
    print(f"masks and overlays: {folder} | counts: {folder / results.COUNTS}")
    print(f"look at {folder / results.REPORT}")


# --- what the parts need


def export(args, model, checkpoint) -> str:
    """Write the network for other programs, checked on the first image there is."""
    pixels = synthetic.draw_tissue(512, 512, seed=0).image
    if args.images:
        image = windows.open_image(next(iter(pairs.find_images(*args.images).values())))
        if min(image.height, image.width) >= 3 * model.grid:
            pixels = image.read(0, 0, min(512, image.height), min(512, image.width))
    return utils.export_model(Path(args.export_model), model, checkpoint, pixels)


def split_of(checkpoint: dict, changes: list[str]) -> nuclei.Split:
    """How touching nuclei are split: the checkpoint's way, or the default, with `--split`'s."""
    split = nuclei.Split(**checkpoint.get("split", nuclei.PREDICTION_SPLIT._asdict()))
    for change in changes:
        name, _, value = change.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        largest = {"sigma": 10, "h": 1}.get(name, 10_000)  # um; share of the depth; um^2
        if name not in SPLITTING or not 0 <= number <= largest:
            raise InputError(
                f"--split: found {change}, expected NAME=NUMBER, a name of "
                f"{', '.join(SPLITTING)} and a number from 0 up (sigma to 10, h to 1, "
                f"others to 10,000)"
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


def same_folder(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def file_mark(path: Path | None) -> list | None:
    """What changes when a file does: its size and its time."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path else None


if __name__ == "__main__":
    run_script(main, parse_args)
