"""Patches per second of train.py, against a plain recipe and against the bare step in memory.

    python3 -m benchmarks.train_speed
    python3 -m benchmarks.train_speed --widths 64 --rounds 5 --gpu_id 0
    python3 -m benchmarks.train_speed --full_run

Three ways take turns: a plain script (fp32, contiguous, PNG read in the loop), train.py as it is
called, and its step on one batch that lies in memory, which is the most that train.py could reach.
Writes the sections "Training speed" and "The full training" of benchmarks/RESULTS.md.
"""

import csv
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks import data, results
from learning.augment import transform
from learning.devices import choose_device, choose_precision
from learning.processes import Machine
from learning.state import make_state
from model import UNet
from tissue import patches
from tissue.files import Parser, run_script
from tissue.manifest import SPLITS, write_manifest

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH = 8  # train.py's default
WARM_UP = 2  # steps before the clock starts
DIM = 128  # pixels, the side of a patch
SIDE = 4096  # of the matrices whose product tells what the machine can do
IMAGES = 28  # drawn at 512 x 512 and cut at stride 20: 7,600 + 3,600 patches
FULL = {"train": 7600, "val": 3600}
FULL_EPOCHS, FULL_WIDTH = 50, 64
FULL_TITLE = "The full training"


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--root", help="folder with own images and masks; without it drawn ones")
    parser.add_argument("--gpu_id", type=int, default=0, help="number of the GPU; -1: the CPU")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64], help="of the U-Net")
    parser.add_argument("--rounds", type=int, default=3, help="the median of this many is told")
    parser.add_argument("--seconds", type=float, default=11, help="length of train.py's epoch")
    parser.add_argument(
        "--full_run",
        action="store_true",
        help=f"measure {FULL_EPOCHS} epochs at width {FULL_WIDTH} instead; for a GPU",
    )
    parser.add_argument("--results", default=results.RESULTS, help="file for the tables")
    return parser.parse_args(argv)


def main(args):
    since = results.moment()
    device = choose_device(args.gpu_id)
    with tempfile.TemporaryDirectory() as folder:
        root = data.tissue(Path(folder) / "data", args.root, IMAGES)
        data.cut(root)
        if args.full_run:
            write_full_run(args, measure_full_run(args, root, device), since)
            return
        write_speeds(args, device, *measure_speeds(args, root, device), since)
    if not results.has_section(FULL_TITLE, args.results):
        write_full_run(args, "not measured")


# --- what is measured ---------------------------------------------------------------------------


def measure_speeds(args, root: Path, device: torch.device) -> tuple[list[float], dict]:
    """TFLOP/s of matrix products, and for each width a list of figures a round, by their names."""
    precision = choose_precision(device)
    rates, speeds = [], {width: [] for width in args.widths}
    for number in range(1, args.rounds + 1):
        rates.append(product_rate(device, precision))
        for width in args.widths:
            memory = step_in_memory(root, width, device, precision, args.seconds / 3)
            sample = root.parent / f"width_{width}"
            if number == 1:
                count = max(3 * BATCH, int(memory * args.seconds) // BATCH * BATCH)
                take(root, sample, {"train": count, "val": BATCH})
            shipped = call_train(sample, width, 2, args.gpu_id, device)
            plain = plain_recipe(root, width, device, args.seconds * 2 / 3)
            speeds[width].append({"plain": plain, "memory": memory} | shipped)
            print(
                f"round {number} | width {width} | plain {plain:.1f}, "
                f"train.py {shipped['shipped']:.1f}, in memory {memory:.1f} patches/s",
                flush=True,
            )
    return rates, speeds


def plain_recipe(root: Path, width: int, device: torch.device, seconds: float) -> float:
    """Patches a second of a plain script."""
    torch.backends.cudnn.benchmark = False
    dataset = patches.PatchDataset(root, "train", transform("train"))
    batches = endless(DataLoader(dataset, BATCH, shuffle=True, drop_last=True))
    model = UNet(width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step():
        images, masks, _ = next(batches)
        loss = binary_cross_entropy_with_logits(model(images.to(device)), masks.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return BATCH * steps_per_second(step, device, seconds)


def step_in_memory(
    root: Path, width: int, device: torch.device, precision: torch.dtype, seconds: float
) -> float:
    """Patches a second of what train.py does in a step, on one batch that is on the device."""
    torch.backends.cudnn.benchmark = True
    dataset = patches.PatchDataset(root, "train", transform("train"))
    images, masks, _ = next(iter(DataLoader(dataset, BATCH)))
    images = images.to(device, memory_format=torch.channels_last)
    masks = masks.to(device)
    model = UNet(width).to(device, memory_format=torch.channels_last)
    flags = Namespace(lr=1e-3, epoch=1, init=None)
    state = make_state(model, flags, 10**6, precision, None)
    machine = Machine(device, precision)

    def step():
        loss_of = binary_cross_entropy_with_logits
        train.train_step(state, model, images, masks, loss_of, machine.autocast)
        state.after_step(torch.zeros(()), ())

    return BATCH * steps_per_second(step, device, seconds)


def call_train(root: Path, width: int, epochs: int, gpu_id: int, device: torch.device) -> dict:
    """Run train.py as a user does, with its own defaults.

    Returns patches a second in its last epoch (`shipped`), its wall time in `seconds`, and the
    most memory it took, GiB: `host` with its loader processes, and `gpu`, all that its process
    takes from the device.
    """
    log = Path(tempfile.mkdtemp(dir=root))
    flags = {"root": root, "log": log, "dimensions": width, "epoch": epochs, "gpu_id": gpu_id}
    arguments = [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    torch.cuda.empty_cache()  # what the other ways took
    before = gpu_memory(device)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments], cwd=REPOSITORY, stdout=subprocess.DEVNULL
    )
    host = gpu = 0.0
    while process.poll() is None:
        host = max(host, host_memory(process.pid))
        gpu = max(gpu, gpu_memory(device) - before)
        time.sleep(0.25)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"train.py ended with exit code {process.returncode}")
    (table,) = log.glob("*/metrics.csv")
    with table.open(newline="") as file:
        speed = float(list(csv.DictReader(file))[-1]["patches_per_second"])
    shutil.rmtree(log)
    return {"shipped": speed, "seconds": seconds, "host": host, "gpu": gpu}


def measure_full_run(args, root: Path, device: torch.device) -> str:
    """Wall time of the full training, for people."""
    take(root, root.parent / "full", FULL)
    run = call_train(root.parent / "full", FULL_WIDTH, FULL_EPOCHS, args.gpu_id, device)
    return f"{run['seconds'] / 60:.1f} minutes ({run['shipped']:.0f} patches/s in the last epoch)"


# --- how ----------------------------------------------------------------------------------------


def take(root: Path, sample: Path, counts: dict[str, int], every: int | None = None) -> None:
    """Make a patch set of so many random patches of another one; where there are too few, they
    come again. The patches themselves are links. With `every`, its validation images are every
    so many'th of the other's training images (one at least), and the other's own are left out.
    """
    sample.mkdir()
    rows, manifest = [], patches.read_manifest(root)
    if every:
        learned = [image for image in manifest["images"] if image["split"] == "train"]
        every = min(every, len(learned))
        splits = [SPLITS[index % every == every - 1] for index in range(len(learned))]
        images = [image | {"split": s} for image, s in zip(learned, splits, strict=True)]
        manifest |= {"images": images}
    split_of = {image["name"]: image["split"] for image in manifest["images"]}
    for split, count in counts.items():
        source = "train" if every else split
        for kind in ("rgb", "mask"):
            patches.folder(sample, kind, split).symlink_to(patches.folder(root, kind, source))
        there = [row | {"split": split} for row in patches.read_table(root, source)]
        there = [row for row in there if split_of[row["name"]] == split]
        random.Random(0).shuffle(there)
        rows += (there * (count // len(there) + 1))[:count]
    write_manifest(sample, manifest, rows)


def endless(loader: DataLoader):
    """The batches of a loader, over and over."""
    while True:
        yield from loader


def steps_per_second(step, device: torch.device, seconds: float) -> float:
    """How often a second `step` runs, over about `seconds` after a warm-up."""
    for _ in range(WARM_UP):
        step()
    synchronise(device)
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        step()
        steps += 1
    synchronise(device)
    return steps / (time.perf_counter() - started)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device, precision: torch.dtype) -> float:
    """TFLOP/s of the product of two square matrices."""
    one, two = torch.randn(2, SIDE, SIDE, device=device).to(precision)
    return 2 * SIDE**3 * steps_per_second(lambda: one @ two, device, 1.5) / 1e12


def training_flops(width: int) -> int:
    """Floating-point operations that learning from one patch takes, forward and backward."""
    with torch.device("meta"):  # counts without computing
        model, patch = UNet(width), torch.empty(1, 3, DIM, DIM)
    with FlopCounterMode(display=False) as counter:
        model(patch).sum().backward()
    return counter.get_total_flops()


def host_memory(pid: int) -> float:
    """GiB that a process and its children hold, pages that they share counted once (Linux)."""
    proc = Path("/proc") / str(pid)
    try:
        fields = (proc / "smaps_rollup").read_text().split()
        children = " ".join(path.read_text() for path in proc.glob("task/*/children")).split()
    except OSError:  # it has just ended, or this is no Linux
        return 0.0
    return int(fields[fields.index("Pss:") + 1]) / 2**20 + sum(
        host_memory(int(c)) for c in children
    )


def gpu_memory(device: torch.device) -> float:
    """GiB of the device that all processes together hold; 0 for a CPU."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30


# --- what is told -------------------------------------------------------------------------------


def write_speeds(args, device: torch.device, rates: list[float], speeds: dict, since) -> None:
    rate = statistics.median(rates)
    rows = []
    for width, rounds in speeds.items():
        middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        to_plain = statistics.median(one["shipped"] / one["plain"] for one in rounds)
        to_memory = statistics.median(one["shipped"] / one["memory"] for one in rounds)
        reached = middle["shipped"] * training_flops(width) / 1e12
        rows.append(
            (
                width,
                *(f"{middle[way]:.1f}" for way in ("plain", "shipped", "memory")),
                f"{to_plain:.2f}x",
                f"{to_memory:.2f}",
                f"{training_flops(width) / 1e9:.1f}",
                f"{reached:.2f}",
                f"{reached / rate:.0%}",
                f"{middle['host']:.1f} GiB",
                f"{middle['gpu']:.1f} GiB" if device.type == "cuda" else "-",
            )
        )
    precision = str(choose_precision(device)).removeprefix("torch.")
    header = "width", "a: plain", "b: train.py", "c: in memory", "b/a", "b/c", "GFLOP a patch"
    header += "b, TFLOP/s", "share of products", "memory of b", "on the GPU"
    results.write_section(
        "Training speed",
        f"Patches of {DIM} x {DIM} pixels a second at batch "
        f"{BATCH} on {data.source(args.root)}; median of {args.rounds} rounds in which all ways "
        f"take turns, ratios a round. a: fp32, contiguous, one process reads PNG and learns. b: "
        f"`train.py` with its defaults, its second epoch. c: its step ({precision}) on one batch "
        f"on the device. Matrix products of {SIDE} x {SIDE} in {precision} reach {rate:.2f} "
        f"TFLOP/s here. Memory: the most that the process and its loaders held.\n\n"
        f"{results.table(header, rows)}",
        args.results,
        since,
    )


def write_full_run(args, measured: str, since=None) -> None:
    row = f"{FULL_EPOCHS} epochs of {FULL['train']:,} + {FULL['val']:,} patches, width {FULL_WIDTH}"
    command = "`python3 -m benchmarks.train_speed --full_run`"
    results.write_section(
        FULL_TITLE,
        "Wall time of `train.py` with its defaults from call to end, validation after each epoch "
        "included.\n\n"
        + results.table(("training", "wall time", "command"), [(row, measured, command)]),
        args.results,
        since,
    )


if __name__ == "__main__":
    run_script(main, parse_args)
