"""Inference on drawn tissue of 512 to 32,768 pixels a side, beside MONAI and the plain recipe.

    python3 -m benchmarks.inference_speed                      # speed against the two others
    python3 -m benchmarks.inference_speed --seams my_images/ --ckpt best.pt

ours: reads by windows, predicts exact tiles, writes the mask where it is big, counts contours.
MONAI: the image in memory, its sliding_window_inference with Gaussian blending and its default
overlap of 25 %, the same fused network and precision, the best of two tile sizes. plain: the whole
image at once in float32, as the first version did. Each measurement is a process of its own, and
all take turns.
"""

import argparse
import contextlib
import copy
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from monai.inferers import sliding_window_inference

import inference
from benchmarks.data import draw_giant
from benchmarks.results import moment, table, write_section
from learning.devices import choose_device, choose_precision
from learning.fusing import fuse
from learning.predictor import Predictor
from model import IMAGENET_MEAN, IMAGENET_STD, UNet
from tissue import images, nuclei, pairs, stitching, tiling, windows
from tissue.files import Parser, run_script
from tissue.memory import freed_memory_kept
from tissue.store import Store
from tissue.synthetic import draw_tissue

SIDES = (512, 4096, 16384)  # pixels
MONAI_TILES = (512, 1024)
ROUNDS = {512: 5, 4096: 3, 16384: 1}
NORMALISATION = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--dimensions", type=int, help="width; without it 32")
    parser.add_argument("--gpu_id", type=int, default=-1, help="number of the GPU; -1: the CPU")
    parser.add_argument("--sides", type=int, nargs="+", help="pixels, instead of all sizes")
    parser.add_argument("--seams", metavar="FOLDER", help="images on which to look for seams")
    parser.add_argument("--ckpt", help="for --seams; without it what ships")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # way, image, tile
    return parser.parse_args(argv)


def main(args):
    if args.measure:
        way, path, tile = args.measure
        print(json.dumps(measure(way, Path(path), int(tile), args.dimensions, args.gpu_id)))
    elif args.seams:
        seams(args)
    else:
        speed(args)


# --- speed --------------------------------------------------------------------------------------


def speed(args):
    """Each way on each size, in turns."""
    dimensions, since = args.dimensions or 32, moment()
    rows, most = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for side in args.sides or SIDES:
            path = draw_giant(Path(folder) / f"{side}.tif", side)
            ways = [("ours", tiling.TILE), *(("MONAI", tile) for tile in MONAI_TILES), ("plain", 0)]
            found = {way: [] for way in ways}
            for _ in range(ROUNDS.get(side, 1)):
                for way in ways:
                    found[way].append(in_process(*way, path, dimensions, args.gpu_id))
            path.unlink()
            for (way, tile), runs in found.items():
                if None in runs:
                    rows.append([f"{side}²", way, tile or "whole", "does not fit", "-", "-", "-"])
                    continue
                rate = statistics.median(run["megapixels_per_second"] for run in runs)
                memory = max(run["memory_gib"] for run in runs)
                most[way] = rate if way != "MONAI" else max(rate, most.get(way, 0))
                contours = runs[0]["contours"]
                rows.append(
                    [f"{side}²", way, tile or "whole", f"{rate:.2f}", f"{memory:.1f}", contours]
                )
                rows[-1].append(f"{rate / statistics.median(r['megapixels_per_second'] for r in found['ours', tiling.TILE]):.2f}x")  # noqa: E501  # fmt: skip
            print(table(("image", "way", "tile", "Mpx/s", "GiB", "contours", "of ours"), rows))
    text = (
        "From the file to mask and contour count, drawn "
        f"tissue, U-Net of width {dimensions} with random weights; megapixels a second (median of "
        f"{', '.join(f'{n} rounds at {side}²' for side, n in ROUNDS.items())}, all ways in turns) "
        "and the most memory that the process held. MONAI: sliding_window_inference at 25 % "
        "overlap with Gaussian blending, the same fused network, precision and memory setting as "
        "ours. plain: the whole image at once in float32.\n\n"
        + table(("image", "way", "tile", "Mpx/s", "GiB", "contours", "of ours"), rows)
    )
    write_section("Inference speed", text, since=since)


def in_process(way, tile, path, dimensions, gpu_id):
    """What `measure` returns, from a process of its own; None if that was killed or had no room."""
    command = [sys.executable, "-m", "benchmarks.inference_speed", "--measure", way, path, tile]
    command += ["--dimensions", dimensions, "--gpu_id", gpu_id]
    if way == "plain" and not plain_fits(path, dimensions, gpu_id):
        return None
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        print(f"{way} on {path.name}: {done.stderr.strip().splitlines()[-1:]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def plain_fits(path, dimensions, gpu_id):
    """Whether the memory holds five activations of the first stage in float32; the kernel would
    end this whole machine's work if not.
    """
    image = windows.open_image(path)
    return gpu_id >= 0 or 20 * dimensions * image.height * image.width < images.free_memory()


def measure(way, path, tile, dimensions, gpu_id):
    """Predict and count one image in one of the three ways."""
    device = choose_device(gpu_id)
    model = a_network(dimensions)
    checkpoint = {
        "config": model.config,
        "normalisation": NORMALISATION,
        "channel_order": "rgb",
        "threshold": 0.5,
    }
    started = time.perf_counter()
    image = windows.open_image(path)
    if way == "ours":
        contours = ours(image, replace(Predictor.of(model, checkpoint, device), tile_size=tile))
    else:
        network = model.to(device) if way == "plain" else fuse(model, device).to(device)
        contours = in_memory(way, images.read_image(path), network, tile, device)
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rate = image.height * image.width / 1e6 / seconds
    return {"megapixels_per_second": rate, "memory_gib": memory, "contours": contours}


def a_network(dimensions):
    """A U-Net of random weights that calls a fifth of drawn tissue nuclei."""
    torch.manual_seed(0)
    model = UNet(dimensions).eval()
    mean, std = (torch.tensor(NORMALISATION[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
    pixels = torch.from_numpy(draw_tissue(512, 512, seed=9).image).permute(2, 0, 1)[None]
    with torch.no_grad():
        model.last_conv.bias -= model((pixels - mean) / std).quantile(0.8)
    return model


def ours(image, network):
    """Contours of an image's mask, which is written to disk as inference.py does."""
    tiles = tiling.tiles_of(image.height, image.width, network.tile_size)
    with (
        tempfile.TemporaryDirectory() as folder,
        Store(Path(folder), (image.height, image.width), bool) as mask,
    ):

        def keep(predicted):
            mask.write(predicted.tile, predicted.outputs[0] >= 0.5)

        predicted = tiling.predict_tiles(image, tiles, network)
        deque(tiling.ahead(keep, predicted, 4), maxlen=0)
        mask.save(Path(folder) / "mask.tif", None)
        return stitching.count_contours(mask)


@torch.inference_mode()
def in_memory(way, image, network, tile, device):
    """The image as one tensor, in MONAI's tiles or whole."""
    mean, std = (torch.tensor(NORMALISATION[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
    precision = choose_precision(device) if way == "MONAI" else torch.float32
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float().sub_(mean).div_(std)

    def predict(part):
        layout = torch.channels_last if way == "MONAI" else torch.contiguous_format
        part = part.to(device).contiguous(memory_format=layout)
        kept = freed_memory_kept() if way == "MONAI" else contextlib.nullcontext()
        mixed = torch.autocast(device.type, precision, enabled=precision != torch.float32)
        with mixed, kept:
            return network(part).float().cpu()

    if way == "MONAI":
        logits = sliding_window_inference(
            pixels, (tile, tile), 1, predict, overlap=0.25, mode="gaussian"
        )
    else:
        logits = predict(pixels)
    return len(nuclei.contours((logits[0, 0] >= 0).numpy()))


# --- seams --------------------------------------------------------------------------------------


def seams(args):
    """Tiled against untiled on the user's images: pixels and contours that differ."""
    path = inference.find_checkpoint(args.ckpt)
    device = choose_device(args.gpu_id)
    whole_network = Predictor.load(path, device)
    checkpoint = whole_network.checkpoint
    network = fuse(copy.deepcopy(whole_network.model).eval(), device)
    mean, std = (torch.tensor(checkpoint["normalisation"][key]).view(3, 1, 1) * 255
                 for key in ("mean", "std"))  # fmt: skip
    precision = choose_precision(device)

    @torch.inference_mode()
    def logits(part):
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return network(part.to(device).contiguous(memory_format=torch.channels_last)).float()

    rows = []
    for number, file in enumerate(pairs.find_images(args.seams).values(), start=1):
        image = windows.open_image(file)

        def mask(tile, halo):
            how = replace(whole_network, tile_size=tile, halo=halo)
            return tiling.predict_image(image, how)[0] >= 0.5  # noqa: B023, used at once

        whole = mask(10**6 // 128 * 128, whole_network.halo)
        masks = {f"ours, halo {halo}": mask(512, halo) for halo in (96, 64, 32)}
        pixels = image.read(0, 0, image.height, image.width)
        tensor = (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() - mean) / std
        with torch.inference_mode():
            blended = sliding_window_inference(
                tensor, (512, 512), 1, logits, overlap=0.25, mode="gaussian"
            )
        masks["MONAI"] = (blended[0, 0] >= 0).numpy()
        untiled = len(nuclei.contours(whole))
        row = [f"{number}", untiled]
        for mask in masks.values():
            row += [f"{np.mean(mask != whole):.4%}", f"{len(nuclei.contours(mask)) - untiled:+d}"]
        rows.append(row)
    header = ["image", "contours"]
    for name in masks:
        header += [f"{name}: pixels", "contours"]
    text = (
        "Pixels of the mask "
        "and contours that differ from the untiled prediction, on the user's images (tile 512; "
        f"MONAI: roi 512, 25 % overlap, Gaussian blending). U-Net of width "
        f"{checkpoint['config']['dimensions']}.\n\n" + table(header, rows)
    )
    write_section("Seams", text)


if __name__ == "__main__":
    with (
        contextlib.redirect_stderr(io.StringIO())
        if "--measure" in sys.argv
        else (contextlib.nullcontext())
    ):
        run_script(main, parse_args)
