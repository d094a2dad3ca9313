"""Segment and count the nuclei of whole images with a trained network.

    python3 inference.py --images my_slide.tif my_folder/ --pixel_size 0.25
    python3 inference.py --ckpt ./log/<run> --images my_folder/ --masks my_masks/
    python3 inference.py --gpu_id 0 --ckpt ./log/<run>/best.pt --image_folder ./results/
    python3 inference.py --images slides/ --regions qupath_export/ --only_regions
    torchrun --nproc_per_node 4 -- inference.py --ckpt ./log/<run> --images slides/
    python3 inference.py --images slides/ --shard 3/10
    python3 inference.py --image_folder ./results/ --report_only
    python3 inference.py --ckpt ./log/<run> --export_model nuclei.onnx

Without --images it takes the validation images of <root>, with their masks as reference. Writes
<name>_prediction.png, _image.png, _overlay.png and, with a reference, _gt.png for each image, and
counts.csv, review.csv and report.html for all images of the folder, those of earlier calls too;
with a network that has instances also its depth map. status.csv says how far all images are; calls
with equal settings may work in one folder at once. Of an image of more than 64 megapixels
prediction and depth map are tiled TIFFs and others small views; it is never held in memory. With
--regions, regions.csv counts in each region. Images of 500 um or more have a density map.
"""

if __name__ == "__main__":  # Ctrl-C while all else is imported
    from tissue import ending, memory

    ending.end_at_once()
    memory.share_one_heap()

import time
import traceback
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from learning.export import export_checked
from learning.learned import said_of_scored
from learning.predictor import Predictor
from learning.processes import Team, everyones, start_processes
from learning.sharing import shared_out
from learning.signals import end_processes
from tissue import (
    artefacts,
    claims,
    density,
    exports,
    inputs,
    marked,
    memory,
    nuclei,
    nuclei_tables,
    results,
    segmentation,
    tiling,
)
from tissue.files import InputError, Parser, SomeFailed, check_numbers, run_script, some
from tissue.inputs import Task, how_many
from tissue.pixel_size import MICROSCOPE_UM, resampling_lines, said_of_other, scale_of
from tissue.status import Status
from tissue.summary import check_exports, write_summary, write_tables
from tissue.todo import unfinished

SHIPPED = Path(__file__).parent / "log" / "ckpt" / "nuclei.pt"
RANGES = {  # of flags that are numbers; --threshold and --split have their own
    "tile_size": (1, 2**14),
    "overlap": (0, 2**13),
    "batch_size": (1, 2**10),
    "gpu_id": (-1, 2**10),
    "pixel_size": MICROSCOPE_UM,
    "confidence": (0, 1),
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--root", nargs="+", default="./data/", help="folders of preprocess.py")
    files.add_argument("--images", nargs="+", help="image files or folders, instead of --root's")
    files.add_argument("--masks", help="folder with references for --images: masks or annotations")
    files.add_argument("--ckpt", help="checkpoint or run folder; without it the included weights")
    files.add_argument("--image_folder", default="./results/", help="folder for the results")
    files.add_argument("--overwrite", action="store_true", help="redo images that have results")
    segmentation = parser.add_argument_group("segmentation")
    segmentation.add_argument(
        "--threshold", type=float, help="probability of a nucleus; without it the checkpoint's"
    )
    sizes = segmentation.add_mutually_exclusive_group()
    sizes.add_argument(
        "--pixel_size", type=float, help="micrometres, of all images; without it what they say"
    )
    sizes.add_argument(
        "--pixel_sizes", metavar="FILE", help="CSV of image,pixel_size_um: of some of the images"
    )
    segmentation.add_argument(
        "--tta", action="store_true",
        help="average over flips, quarter turns and two sizes: 13 times the work",
    )  # fmt: skip
    segmentation.add_argument(
        "--split", nargs="+", metavar="NAME=VALUE", default=[],
        help=f"change how touching nuclei are split: {', '.join(nuclei.SPLITTING)}",
    )  # fmt: skip
    segmentation.add_argument(
        "--confidence", type=float,
        help="drop nuclei less deep than this share; without it the checkpoint's; needs instances",
    )  # fmt: skip
    segmentation.add_argument(
        "--export", nargs="*", choices=exports.MORE, metavar="NAME",
        help=f"write more files: of {', '.join(exports.MORE)}; without a name rois and coco",
    )  # fmt: skip
    segmentation.add_argument(
        "--check_exports", action="store_true", help="read all exports back and compare them"
    )
    regions = parser.add_argument_group("regions and density")
    regions.add_argument("--regions", metavar="FOLDER", help="outlines or class maps of the images")
    regions.add_argument("--only_regions", action="store_true", help="find no nuclei outside them")
    regions.add_argument(
        "--tissue", metavar="FOLDER", help="files that mark tissue; all: artefacts are tissue too"
    )
    regions.add_argument("--density", action="store_true", help="density map of small images too")
    tiles = parser.add_argument_group("tiles, for large images")
    tiles.add_argument("--tile_size", type=int, default=tiling.TILE, help="side of a tile, pixels")
    tiles.add_argument(
        "--overlap", type=int,
        help="pixels of context around a tile; without it 96 (exact), with an encoder 64",
    )  # fmt: skip
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpu_id", type=int, default=0, help="number of the GPU; -1: the CPU")
    machine.add_argument("--batch_size", type=int, help="tiles at once; else 4 on a GPU, or 1")
    machine.add_argument("--shard", metavar="I/N", help="do the I'th of N shares, for job arrays")
    instead = parser.add_argument_group("instead of results")
    instead.add_argument("--report_only", action="store_true", help="tables and page made again")
    instead.add_argument("--export_model", metavar="FILE", help="write model.pt2 or model.onnx")
    return parser.parse_args(argv)


def main(args):
    check_flags(args)
    folder = Path(args.image_folder)
    if args.report_only:
        print(*said_of_ignored(args), *write_summary(folder), sep="\n")
        return
    device, rank, processes = start_processes(args.gpu_id, waiting=True)
    say = print if rank == 0 else (lambda *_: None)
    network = load_network(args, device)
    if args.export_model:
        if rank == 0:
            written = export_checked(args.export_model, network, args.images or ())
            print(*said_of_ignored(args), written, sep="\n")
        return
    tasks, notes, faults = plan(args, network)
    if stop(faults, rank):
        return
    where = f"{device} x {processes}" if processes > 1 else f"{device}"
    shard = f" | shard {args.shard}" if args.shard else ""
    say(f"{network} | {where} | {how_many(len(tasks), 'image')}{shard}")
    for note in [*network.notes(), *said_of_sizes(tasks, network), *notes]:
        say(note)
    with ExitStack() as held:
        settings = network.made_with() | {"only regions": args.only_regions}
        faults = []
        try:
            job = held.enter_context(claims.working(folder, settings, args.overwrite))
        except (InputError, OSError) as error:
            faults.append(str(error))
        if stop(everyones(faults), rank):
            return
        mine = inputs.of_shard(tasks, args.shard)
        todo, notes = unfinished(mine, args.overwrite)
        for note in notes:
            say(note)
        shown = network.settings() | {"only regions": args.only_regions, "device": str(device)}
        infer_all(tasks, todo, network, shown, job)
        checked = check_exports(mine[rank::processes]) if args.check_exports else []
        failures = everyones(job.faults + checked)
        if rank == 0:
            print(*write_tables(folder, tasks, mine), sep="\n")
    end_processes()
    if failures and rank == 0:
        raise SomeFailed("\n".join([*failures, f"{how_many(len(failures), 'image')} failed"]))


def stop(faults: list[str], rank: int) -> bool:
    """Whether there are faults; the first process raises them, the others end in silence."""
    if faults and rank == 0:
        raise InputError("; ".join(faults))
    return bool(faults)


# --- plan


def check_flags(args) -> None:
    """Raise InputError for a number that a flag cannot have."""
    check_numbers(args, RANGES)
    if args.threshold is not None and not 0 < args.threshold < 1:
        raise InputError(f"--threshold: found {args.threshold}, expected a number between 0 and 1")
    nuclei.changed(nuclei.PREDICTION_SPLIT, args.split)
    nuclei_tables.check_packages(args.export or ())
    inputs.of_shard([], args.shard)
    if args.only_regions and not args.regions:
        raise InputError("--only_regions: found it without --regions, expected both; add --regions")


def said_of_ignored(args) -> list[str]:
    """A line with the flags that --report_only or --export_model have no use for."""
    flag, used = "export_model", {"export_model", "ckpt", "images", "gpu_id"}
    if args.report_only:
        flag, used = "report_only", {"report_only", "image_folder", "gpu_id"}
    usual = vars(parse_args([]))
    more = [f"--{key}" for key, value in vars(args).items() if value != usual[key]]
    more = [name for name in more if name[2:] not in used]
    return [f"--{flag}: {', '.join(more)} have no effect with it"] if more else []


def load_network(args, device) -> Predictor:
    """The network that the flags name, used as they say; InputError where they do not fit it."""
    network = Predictor.load(find_checkpoint(args.ckpt), device, args.tta)
    halo = network.halo if args.overlap is None else args.overlap
    for flag, pixels, least in (("tile_size", args.tile_size, halo), ("overlap", halo, 0)):
        if pixels % network.grid or pixels < least:
            if args.overlap is not None and flag == "tile_size" and not pixels % network.grid:
                raise InputError(
                    f"--overlap {halo} --tile_size {pixels}: found more overlap than tile, "
                    f"expected a smaller --overlap, or a --tile_size of {halo} or more"
                )
            raise InputError(
                f"--{flag}: found {pixels}, expected a multiple of {network.grid} of {least} or "
                f"more"
            )
    split = nuclei.changed(network.split, args.split)
    if args.confidence is not None:
        if not network.has_depth:
            raise InputError(
                f"--confidence: found a network without instances ({network.path}), expected one "
                f"that learned with them; leave the flag out, or choose another --ckpt"
            )
        split = split._replace(confidence=args.confidence)
    return replace(
        network,
        tile_size=args.tile_size,
        halo=halo,
        batch_size=args.batch_size or (4 if device.type == "cuda" else 1),
        threshold=network.threshold if args.threshold is None else args.threshold,
        split=split,
    )


def plan(args, network: Predictor) -> tuple[list[Task], list[str], list[str]]:
    """A Task for each image, what is assumed about the files, and all faults of what is given."""
    found = inputs.find_images(args.images, args.masks, args.root, args.pixel_sizes)
    folder = Path(args.image_folder)
    rank, processes = Team().place
    mine = inputs.of_shard(range(len(found.pairs)), args.shard)[rank::processes]
    is_mine = set(mine).__contains__  # other shards look at their images themselves
    tasks, notes, faults = inputs.open_tasks(found, folder, network.checkpoint.get("bits"), is_mine)
    if args.regions:
        tasks, more = marked.with_regions(tasks, args.regions, args.only_regions, is_mine)
        notes, faults = notes + more.notes, faults + more.faults
    if args.tissue and args.tissue != "all":
        tasks, more = marked.with_tissue(tasks, args.tissue, is_mine)
        notes, faults = notes + more.notes, faults + more.faults
    beside = [path for task in tasks for path in (task.regions, task.tissue) if path]
    beside += [Path(args.pixel_sizes)] if args.pixel_sizes else []
    faults = everyones(faults) + inputs.faults_of_place(folder, found, beside)
    faults += [] if args.overwrite or faults else inputs.faults_of_names(tasks)
    made_with, planned = network.made_with(), []
    for task in tasks:
        size = args.pixel_size or task.told_um
        source = "--pixel_size" if args.pixel_size else task.pair.image
        try:
            scale = scale_of(size, network.pixel_size_um, source)
        except InputError as error:
            faults.append(str(error))
            continue
        own = {"pixel_size": size, "bits": task.bits, "files": task.file_marks()}
        finds = args.tissue != "all" and not task.tissue and artefacts.are_likely(task.shape, size)
        own |= {"tissue": "found"} if finds else {}
        planned.append(
            task._replace(
                pixel_size_um=size, split_at_um=size or network.pixel_size_um, scale=scale,
                formats=exports.formats_of(task.image.is_big, args.export),
                made_with=made_with | own, finds_tissue=finds,
                density=bool(size) and (args.density or min(task.shape) * size >= density.SIDE_UM),
            )
        )  # fmt: skip
    notes += said_of_scored(network.checkpoint, planned)
    told = {t.pair.image.name: (t.image.pixel_size_um, t.pixel_size_um) for t in planned}
    notes = found.notes + everyones(notes) + said_of_other(told)
    unknown = [task.pair.name for task in planned if not task.pixel_size_um]
    if args.density and unknown:
        notes.append(f"No pixel size in {some(unknown)}: no density map; --pixel_size tells it")
    return planned, notes, list(dict.fromkeys(faults))


def said_of_sizes(tasks: list[Task], network: Predictor) -> list[str]:
    """What is known of pixel sizes, and what is resampled: a line for each pixel size."""
    if not network.pixel_size_um:
        return [f"{network.path} does not say its pixel size: no image is resampled."]
    sizes = {task.pair.name: task.pixel_size_um for task in tasks}
    return resampling_lines(sizes, network.pixel_size_um)


# --- predict


def infer_all(tasks: list[Task], todo: list[Task], network: Predictor, shown: dict, job) -> None:
    """Infer those `todo` of all images, with all who work in the folder; `job` has the faults."""
    is_first = Team().place[0] == 0
    with Status(job, tasks, todo) if is_first else nullcontext():
        for task, team in shared_out(job, tasks, todo):
            infer_one(task, network, team, shown, job)


def infer_one(task: Task, network: Predictor, team: Team, shown: dict, job: claims.Job) -> None:
    """Write all files of an image and its record, or why there is none."""
    started = time.monotonic()
    try:
        if not job.overwrite:
            team.first(lambda: results.set_aside(task.results, task.pair.name))
        row = infer(task, network, team, job.advance)
        if team.place[0] == 0:
            row.setdefault("seconds", time.monotonic() - started)
            row |= {"source": task.source} | network.expected
            marks = results.marks_of(task.results, task.pair.name)
            with job.finishing():
                results.write(task.results, row, task.made_with, shown, marks)
    except (InputError, OSError) as error:
        job.failed(task.pair.name, str(error))
    except Exception as error:  # a defect, in one image of many
        if team.place[1] > 1:  # the others wait for this process
            raise
        traceback.print_exc()
        job.failed(task.pair.name, f"{task.pair.image}: {type(error).__name__}: {error}")
    finally:
        task.image.close()


def infer(task: Task, network: Predictor, team: Team, advance) -> dict:
    """Write all files of an image but its record, and return its row."""
    if task.row:
        advance(task.megapixels)
        row = task.row  # regions and density are made of the nuclei that are there
        if task.formats:
            results.forget(task.results, task.pair.name)
            row = segmentation.export_again(task, network)
        return row | segmentation.from_nuclei(task)
    outdated = "gt", "errors", "distance", "big_distance", "review_pictures"
    outdated += "density", "density_picture", "tissue", "tissue_geojson"
    outdated += ("prediction" if task.image.is_big else "big_prediction",)

    def begin():
        results.forget(task.results, task.pair.name, outdated)
        segmentation.map_tissue(task)
        return held.enter_context(segmentation.new_map(task, network))

    with ExitStack() as held:
        found = team.first(begin)
        shares = team.each(lambda: segmentation.predict(task, network, found, team.place, advance))
        seen = [sum(of_all) for of_all in zip(*shares, strict=True)]
        memory.give_back()
        return team.first(lambda: segmentation.finish(task, network, found, seen))


def find_checkpoint(ckpt: str | None) -> Path:
    """The checkpoint that `--ckpt` means: a file, a run folder's best one, or the shipped one."""
    path = Path(ckpt) if ckpt else SHIPPED
    if path.is_dir():
        path = path / "best.pt"
    if not path.is_file():
        newest = max(Path("log").glob("*/best.pt"), key=lambda p: p.stat().st_mtime, default=None)
        advice = f"try --ckpt {newest}" if newest else "try it without --ckpt, for those that ship"
        if not ckpt:
            advice = "the weights that ship are part of a checkout; copy them there, or give --ckpt"
        raise FileNotFoundError(f"{path}: no such checkpoint; {advice}")
    return path


if __name__ == "__main__":
    run_script(main, parse_args)
