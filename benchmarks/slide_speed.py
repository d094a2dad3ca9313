"""What a slide costs: seconds per square millimetre of it, memory, and which step takes how much.

    python3 -m benchmarks.slide_speed --side 16384
    python3 -m benchmarks.slide_speed --side 32768 --regions           # four regions and density
    python3 -m benchmarks.slide_speed --images my_slide.svs --precision float32

Draws a slide full of tissue, of 0.25 micrometres a pixel, or takes one, and calls inference.py on
it in this process. A step's share is of the processor time of the threads that work on it; the
network's is that of its thread times the number of its threads. What no step has is Python between
them, starting and the page.
"""

if __name__ == "__main__":  # as inference.py has it
    from tissue import memory

    memory.share_one_heap()

import argparse
import json
import resource
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

import inference
from benchmarks.data import draw_giant
from benchmarks.results import table, write_section
from learning import devices, fusing, predictor
from learning.devices import moment
from tissue import (
    artefacts,
    exports,
    measures,
    nuclei,
    pictures,
    scanners,
    segmentation,
    slides,
    stitching,
    tiling,
)
from tissue.files import Parser, run_script
from tissue.store import Store
from tissue.windows import open_image

UM = 0.25  # micrometres; a pixel of what is drawn
STEPS = {  # (where it is looked up, its name), of which the outermost counts
    "reading": [(slides.Segments, "read"), (scanners.Scan, "read")],
    "tissue": [(artefacts, "find"), (tiling, "background"), (tiling, "for_network")],
    "splitting": [(nuclei, "find_nuclei"), (stitching, "count_contours")],
    "measuring": [(measures, "measure"), (measures, "outlines"), (segmentation, "from_nuclei")],
    "writing": [
        (exports.NucleiFiles, "add"), (Store, "write"), (Store, "save"),
        (pictures, "overlay"), (pictures, "write_image"),
    ],
}  # fmt: skip


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--side", type=int, default=16384, help="pixels of what is drawn")
    parser.add_argument("--images", help="a slide instead")
    parser.add_argument("--regions", action="store_true", help="count in its four quarters too")
    parser.add_argument("--ckpt", help="without it the weights that ship")
    parser.add_argument("--tile_size", type=int, default=tiling.TILE, help="pixels")
    parser.add_argument("--gpu_id", type=int, default=-1, help="number of the GPU; -1: the CPU")
    parser.add_argument("--precision", choices=["float32"], help="even where bfloat16 is fast")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.precision:
        for module in (devices, fusing, predictor):
            module.choose_precision = lambda device: torch.float32
    spent = Counter()
    inside = threading.local()
    for step, functions in STEPS.items():
        for owner, name in functions:
            setattr(owner, name, timed(getattr(owner, name), step, spent, inside))
    load = predictor.Predictor.load

    def load_timed(*arguments):
        network = load(*arguments)
        predict = timed(network.predict, "network", spent, inside, torch.get_num_threads())
        return replace(network, predict=predict)

    predictor.Predictor.load = load_timed
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        path = args.images or draw_giant(place / "slide.tif", args.side)
        image = open_image(path)
        area = image.height * image.width * (image.pixel_size_um or UM) ** 2 / 1e6  # mm2
        more = ["--regions", str(quarters(place / "regions", path, image))] * args.regions
        more += ["--ckpt", args.ckpt] if args.ckpt else []
        more += ["--tile_size", str(args.tile_size), "--gpu_id", str(args.gpu_id)]
        if not image.pixel_size_um:
            more += ["--pixel_size", str(UM)]
        since, began, processor = moment(), time.monotonic(), time.process_time()
        flags = ["--images", str(path), "--image_folder", str(place / "results"), *more]
        inference.main(inference.parse_args(flags))
        seconds, processor = time.monotonic() - began, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB, on Linux
    rows = [[step, f"{s:.0f}", f"{s / processor:.0%}"] for step, s in spent.most_common()]
    rest = processor - sum(spent.values())
    rows.append(["else", f"{rest:.0f}", f"{rest / processor:.0%}"])
    text = (
        f"{seconds:.0f} s, **{seconds / area:.1f} s per mm²**, {3600 / seconds:.1f} such slides "
        f"an hour, at most {peak:.2f} GiB; {processor:.0f} s of processor time.\n\n"
    )
    text += table(["step", "processor seconds", "share"], rows)
    what = f"{image.height} x {image.width} pixels, {area:.1f} mm²"
    write_section(f"A slide of {what}{', four regions' * args.regions}", text, since=since)


def timed(function, step, spent, inside, threads=1):
    """A function whose thread's processor time goes to `spent`, unless it is within another one."""

    def call(*arguments, **named):
        if getattr(inside, "step", None):
            return function(*arguments, **named)
        inside.step, began = step, time.thread_time()
        try:
            return function(*arguments, **named)
        finally:
            spent[step] += (time.thread_time() - began) * threads
            inside.step = None

    return call


def quarters(folder: Path, path: Path | str, image) -> Path:
    """A folder with the four quarters of an image as regions."""
    folder.mkdir()
    y, x = image.height // 2, image.width // 2
    features = []
    for top, bottom in ((0, y), (y, image.height)):
        for left, right in ((0, x), (x, image.width)):
            ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
            features.append(
                {
                    "type": "Feature",
                    "geometry": {"type": "Polygon", "coordinates": [ring]},
                    "properties": {"classification": {"name": f"quarter {len(features) + 1}"}},
                }
            )
    text = json.dumps({"type": "FeatureCollection", "features": features})
    (folder / f"{Path(path).stem}.geojson").write_text(text)
    return folder


if __name__ == "__main__":
    run_script(main, parse_args)
