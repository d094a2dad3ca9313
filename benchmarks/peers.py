"""This project beside what a user would pick instead: scores for the same time of training.

    python3 -m benchmarks.peers --pretrained efficientnet-lite0-57934424.pth --minutes 24
    python3 -m benchmarks.peers --root my_set other_set --cut "--pixel_size 0.25" --rounds 3

Every contender learns from the same patches in batches of 8, by turns, for so many processor
minutes (24 are 12 of two cores; a clock would tell how busy the machine was), and segments held-out
images after a quarter, a half and all of it.

ours: train.py with the encoder of the weights that ship, with its U-Net, and with a narrow one on
colours as they are; inference.py splits nuclei. Peers: segmentation-models-pytorch, MONAI, and the
first version's network, loss and rate with true colours; in float32 (--bfloat16: as ours where that
is fast) with the recipe that users take: Adam, one cycle to 1e-3, cross-entropy and Dice, flips,
lightness; connected components of the mask are the nuclei. smp's resnet34 begins at random: its
ImageNet weights are in no package. Nor are those of StarDist, Cellpose, InstanSeg and HoVer-Net,
which fetch them from the web: they are not here. Dice and AJI are means of the images, the count
error is |found - reference| / reference. Writes a section of benchmarks/RESULTS.md and a CSV.
"""

import argparse
import inspect
import json
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.ndimage
import tifffile
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

import inference
import train
from benchmarks import data, results
from benchmarks.train_speed import BATCH, endless, take
from learning.augment import transform
from learning.devices import choose_precision
from learning.losses import LOSSES
from learning.pretrained import read_weights
from model import IMAGENET_MEAN, IMAGENET_STD, UNet
from tissue import agreement, images, nuclei, patches
from tissue.depth import NOT_ANNOTATED
from tissue.files import Parser, run_script, write_table
from tissue.masks import read_label_map, read_mask
from tissue.pairs import Pair, find_pairs, label_folder

ARCH = "tf_efficientnet_lite0"  # of the weights that ship
SHARES = (0.25, 0.5, 1.0)  # of the budget
# train.py chooses its best epoch by so many patches, of every so many'th training image: no
# held-out image helps.
VALIDATED, EVERY = 64, 8
GRID = 32  # pixels; peers take sides that are a multiple of it
WARM_UP, TIMED = 3, 5  # steps that tell the speed for which a training is planned
RATE = "rate"  # the run of ours that tells it
COMMANDS = 3  # preprocess.py, train.py, inference.py: what a user of ours writes


def smp(encoder):
    def build(pretrained):
        import segmentation_models_pytorch

        model = segmentation_models_pytorch.Unet(encoder, encoder_weights=None)
        if pretrained and encoder == f"tu-{ARCH}":
            fits = model.encoder.model.load_state_dict(read_weights(pretrained, ARCH), strict=False)
            assert not fits.missing_keys, fits
        return model

    return build


def monai(_):
    from monai.networks.nets import BasicUNet

    return BasicUNet(spatial_dims=2, in_channels=3, out_channels=1)


OURS = {
    "this project": ["--arch", ARCH],
    "this project, U-Net": ["--dimensions", "32"],
    "this project, narrow U-Net": ["--dimensions", "16", "--stain", "none"],
}
PEERS = {
    "smp Unet, resnet34": smp("resnet34"),
    f"smp Unet, {ARCH}": smp(f"tu-{ARCH}"),
    "MONAI BasicUNet": monai,
    "first version, true colours": lambda _: UNet(64),
}
FIRST = "first version, true colours"  # Adam at 2e-5, cross-entropy alone


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--root", nargs="+", default=[], help="sets; without it a synthetic one")
    parser.add_argument("--cut", default="", help="more flags of preprocess.py, for each set")
    parser.add_argument("--images", type=int, default=27, help="of the synthetic set")
    parser.add_argument("--minutes", type=float, default=24, help="of a processor, each training")
    parser.add_argument("--rounds", type=int, default=1, help="the mean of this many is told")
    parser.add_argument("--contenders", nargs="+", default=[*OURS, *PEERS], help="of all, in order")
    parser.add_argument("--pretrained", help=f"file with ImageNet's weights of {ARCH}")
    parser.add_argument("--bfloat16", action="store_true", help="peers as ours, where it is fast")
    parser.add_argument("--results", default=results.RESULTS, help="file for the section")
    parser.add_argument("--csv", default="peers.csv", help="file for all figures")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a contender, in its own process
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(args):
    if args.measure:
        learn = learn_ours if args.measure in OURS else learn_peer
        Path(args.csv).write_text(json.dumps(learn(args, Path(args.root[0]))))
        return
    since, rows = results.moment(), []
    for number, given in enumerate(args.root or [None]):
        with tempfile.TemporaryDirectory() as folder:
            root = data.tissue(Path(folder) / "data", given, args.images)
            data.cut(root, "--patch_stride", 64, *shlex.split(args.cut))
            name = f"set {number + 1}" if given else "synthetic"
            for seed in range(args.rounds):
                for contender in args.contenders:
                    measured = in_process(args, root, contender, seed)
                    rows += [{"tissue": name, "contender": contender, "round": seed} | row
                             for row in measured]  # fmt: skip
                    write_table(args.csv, rows[0], rows)
                    print(json.dumps(rows[-1]), flush=True)
    results.write_section("Beside other tools", told(args, rows), args.results, since)


def in_process(args, root: Path, contender: str, seed: int) -> list[dict]:
    """What a contender's process measures: a row for each share of the budget."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        flags = {"measure": contender, "root": root, "minutes": args.minutes, "csv": out}
        flags |= {"seed": seed} | ({"pretrained": args.pretrained} if args.pretrained else {})
        command = [f"--{key}={value}" for key, value in flags.items()]
        command += ["--bfloat16"] if args.bfloat16 else []
        subprocess.run([sys.executable, "-m", "benchmarks.peers", *command], check=True)
        return json.loads(out.read_text())


# --- ours ---------------------------------------------------------------------------------------


def learn_ours(args, root: Path) -> list[dict]:
    """Train by train.py, in epochs of a quarter of the budget, and segment with inference.py."""
    rate = BATCH * TIMED / run_train(args, root, RATE, BATCH * TIMED, 2)[1][-1]
    quarter = max(1, round(rate * args.minutes * 60 * SHARES[0] / BATCH)) * BATCH
    log, seconds = run_train(args, root, "run", quarter, round(1 / SHARES[0]))
    memory, rows = peak_gib(), []
    for share in SHARES:
        epochs = round(share / SHARES[0])
        out = root.parent / f"results_{args.measure}_{args.seed}_{share}"
        pairs, began = held_out(root), time.process_time()
        flags = ["--root", root, "--ckpt", log / f"best_{epochs}.pt", "--image_folder", out]
        inference.main(inference.parse_args([*map(str, flags), "--gpu_id", "-1"]))
        spent = time.process_time() - began
        row = {"share": share, "patches": quarter * epochs}
        row["learned_seconds"] = sum(seconds[:epochs])
        row |= scores(root, pairs, lambda name, out=out: segmented(out, name))
        rows.append(row | cost(root, pairs, spent, memory, COMMANDS))
    return rows


def run_train(args, root: Path, name: str, count: int, epochs: int) -> tuple[Path, list[float]]:
    """Run train.py on so many patches; its folder, with the best weights after each epoch as
    best_<n>.pt, and the processor seconds of each epoch.
    """
    sample, seconds = root.parent / f"{name}_{args.measure}_{args.seed}", []
    take(root, sample, {"train": count, "val": VALIDATED}, EVERY)
    for place in root.iterdir():  # the images by which it chooses how nuclei are split
        if place.is_dir() and not place.name.startswith("patches") and name != RATE:
            (sample / place.name).symlink_to(place)
    one_epoch = train.train_one_epoch

    def keep_best():
        for best in sample.glob("log/*/best.pt"):
            shutil.copy(best, best.with_name(f"best_{len(seconds)}.pt"))

    def timed(run, state, network):
        keep_best()
        began = time.process_time()
        one_epoch(run, state, network)
        seconds.append(time.process_time() - began)

    flags = {"root": sample, "log": sample / "log", "epoch": epochs, "batch_size": BATCH}
    flags |= {"seed": args.seed, "gpu_id": -1}
    if args.pretrained and "--arch" in OURS[args.measure]:
        flags["pretrained"] = args.pretrained
    train.train_one_epoch = timed
    try:
        arguments = [f"--{key}={value}" for key, value in flags.items()]
        train.main(train.parse_args(OURS[args.measure] + arguments))
    finally:
        train.train_one_epoch = one_epoch
    keep_best()  # with the split that was chosen at the end
    return next(sample.glob("log/*")), seconds


def segmented(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mask and nuclei that inference.py wrote."""
    labels = tifffile.imread(folder / f"{name}_labels.tif")
    return read_mask(folder / f"{name}_prediction.png"), labels


# --- peers --------------------------------------------------------------------------------------


def recipe(args, root: Path, mixed):
    """How users train a peer: what begins a training of so many steps, and one step of it."""
    first = args.measure == FIRST
    loss_of = binary_cross_entropy_with_logits if first else LOSSES["bce_dice"]
    dataset = patches.PatchDataset(root, "train", transform("train", "basic"))
    batches = endless(DataLoader(dataset, BATCH, shuffle=True, drop_last=True))

    def begin(steps):
        model = PEERS[args.measure](args.pretrained)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-5)
        if first:
            return model, optimizer, None
        # which sets the rate; one step more than is taken, as one step has no cycle
        return model, optimizer, OneCycleLR(optimizer, 1e-3, total_steps=steps + 1)

    def step(model, optimizer, cycle):
        picture, mask, _ = next(batches)
        with mixed:
            logits = model(picture)
        nucleus = (mask != 0) & (mask != NOT_ANNOTATED)
        loss = loss_of(logits.float(), nucleus.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if cycle:
            cycle.step()

    return begin, step


def learn_peer(args, root: Path) -> list[dict]:
    """Train a peer as its users do, for the budget, and segment with it."""
    precision = choose_precision(torch.device("cpu")) if args.bfloat16 else torch.float32
    mixed = torch.autocast("cpu", precision, enabled=precision != torch.float32)
    torch.manual_seed(args.seed)
    begin, step = recipe(args, root, mixed)
    trial, moments = begin(WARM_UP + TIMED), []
    for _ in range(WARM_UP + TIMED):
        step(*trial)
        moments.append(time.process_time())
    rate = TIMED / (moments[-1] - moments[WARM_UP - 1])
    steps, rows, learned = max(4, round(rate * args.minutes * 60)), [], 0.0
    training = begin(steps)
    for number in range(1, steps + 1):
        began = time.process_time()
        training[0].train()
        step(*training)
        learned += time.process_time() - began
        for share in SHARES:
            if number == round(share * steps):
                row = {"share": share, "patches": number * BATCH, "learned_seconds": learned}
                rows.append(row | score_peer(args, root, training[0], mixed))
    return rows


def score_peer(args, root: Path, model, mixed) -> dict:
    pairs, began, memory = held_out(root), time.process_time(), peak_gib()
    found = {pair.name: segment_by(model.eval(), pair, mixed) for pair in pairs}
    seconds = time.process_time() - began
    lines = sum(code_lines(part) for part in (recipe, segment_by))
    return scores(root, pairs, found.get) | cost(root, pairs, seconds, memory, lines)


@torch.inference_mode()
def segment_by(model, pair: Pair, mixed) -> tuple[np.ndarray, np.ndarray]:
    """Mask and nuclei, its connected components, of an image in one piece."""
    picture = images.read_image(pair.image)
    height, width = picture.shape[:2]
    below, right = -height % GRID, -width % GRID
    padded = np.pad(picture, ((0, below), (0, right), (0, 0)), "reflect")
    normal = (padded / 255 - IMAGENET_MEAN) / IMAGENET_STD
    with mixed:
        logits = model(torch.from_numpy(normal).float().permute(2, 0, 1)[None])
    mask = (logits[0, 0, :height, :width] > 0).numpy()
    return mask, scipy.ndimage.label(mask)[0]


# --- what is measured ---------------------------------------------------------------------------


def held_out(root: Path) -> list[Pair]:
    names = {i["name"] for i in patches.read_manifest(root)["images"] if i["split"] == "val"}
    return [pair for pair in find_pairs(root) if pair.name in names]


def scores(root: Path, pairs: list[Pair], segmented_of) -> dict:
    """Mean Dice, AJI and relative count error of images; without label maps the reference's nuclei
    are the connected components of its mask.
    """
    label_maps, found = label_folder(root), []
    for pair in pairs:
        mask, labels = segmented_of(pair.name)
        reference = read_mask(pair.mask)
        numbers = scipy.ndimage.label(reference)[0]
        if pair.name in label_maps:
            numbers = nuclei.reference_labels(read_label_map(label_maps[pair.name]))
        table = agreement.overlap(labels, numbers)
        count, expected = (len(np.unique(each)) - 1 for each in (labels, numbers))
        dice = agreement.dice(agreement.pixel_counts(mask, reference))
        found.append((dice, agreement.aji(table), abs(count - expected) / max(1, expected)))
    return dict(zip(("dice", "aji", "count_error"), map(float, np.mean(found, 0)), strict=True))


def cost(root: Path, pairs: list[Pair], seconds: float, learning_gib: float, lines: int) -> dict:
    """Processor seconds a mm2 (of the set's pixel size, or 0.25 um), peak memory, lines of code."""
    um = patches.read_manifest(root)["pixel_size_um"] or 0.25
    area = sum(read_mask(pair.mask).size for pair in pairs) * um**2 / 1e6
    return {"seconds_per_mm2": seconds / area, "memory_gib": max(learning_gib, peak_gib()),
            "lines": lines}  # fmt: skip


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux has KiB


def code_lines(function) -> int:
    return sum(bool(line.strip()) for line in inspect.getsource(function).splitlines())


def told(args, rows: list[dict]) -> str:
    """The tables: a row a contender, of each set."""
    header = ["contender", "patches a processor second"]
    header += [
        f"{score} at {share:g}" for score in ("Dice", "AJI", "count error") for share in SHARES
    ]
    text = (
        f"Scores of held-out images after a quarter, a half and all of {args.minutes:g} processor "
        f"minutes of training, peers in {'the format of ours' if args.bfloat16 else 'float32'}.\n"
    )
    header += ["processor seconds a mm²", "GiB", "lines"]
    for tissue in dict.fromkeys(row["tissue"] for row in rows):
        table = []
        for contender in args.contenders:
            own = [r for r in rows if r["tissue"] == tissue and r["contender"] == contender]

            def middle(key, share=1.0, own=own):
                return statistics.fmean(row[key] for row in own if row["share"] == share)

            line = [contender, f"{middle('patches') / middle('learned_seconds'):.1f}"]
            for key, form in (("dice", ".4f"), ("aji", ".4f"), ("count_error", ".1%")):
                line += [format(middle(key, share), form) for share in SHARES]
            line += [f"{middle('seconds_per_mm2'):.0f}", f"{middle('memory_gib'):.1f}"]
            table.append([*line, round(middle("lines"))])
        text += f"\n{tissue}:\n\n{results.table(header, table)}"
    return text


if __name__ == "__main__":
    run_script(main, parse_args)
