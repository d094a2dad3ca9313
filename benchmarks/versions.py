"""Whether inference.py with its shipped weights became faster: beside another checkout of it.

    git worktree add ../before 9844c31    # 0.1.0
    python3 -m benchmarks.versions --before ../before

Both do the whole command on one synthetic image, in turns, multiplying in float32, as most CPUs do.
Writes a section of benchmarks/RESULTS.md.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import results
from benchmarks.beside import REPOSITORY
from benchmarks.data import draw_giant
from tissue.files import Parser, run_script

# The number format is the machine's choice; a program of its own may make another.
IN_FLOAT32 = (
    "import sys, torch\n"
    "try:\n"
    "    import learning.devices as room\n"
    "except ImportError:\n"  # 0.1.0
    "    import utils as room\n"
    "room.choose_precision = lambda device: torch.float32\n"
    "import inference\n"
    "inference.main(inference.parse_args(sys.argv[1:]))\n"
)


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--before", required=True, help="folder of the other checkout")
    parser.add_argument("--side", type=int, default=4096, help="pixels of the image's side")
    parser.add_argument("--rounds", type=int, default=3, help="the median of this many is told")
    parser.add_argument("--results", default=results.RESULTS, help="file for the section")
    return parser.parse_args(argv)


def main(args):
    since = results.moment()
    seconds = {Path(args.before).resolve(): [], REPOSITORY: []}
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "tissue.tif"
        draw_giant(image, args.side)
        for number in range(args.rounds):
            for tree, its in seconds.items():
                flags = ["--images", image, "--gpu_id", -1, "--pixel_size", 0.25]
                flags += ["--image_folder", Path(folder) / f"{tree.name}-{number}"]
                command = [sys.executable, "-c", IN_FLOAT32, *map(str, flags)]
                begun = time.monotonic()
                subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
                its.append(time.monotonic() - begun)
                print(f"{tree.name}: {its[-1]:.1f} s", flush=True)
    before, now = seconds.values()
    ratio = statistics.median(a / b for a, b in zip(before, now, strict=True))
    rows = [
        [name, f"{statistics.median(its):.1f}"] for name, its in (("before", before), ("now", now))
    ]
    results.write_section(
        "inference.py before and now",
        f"Seconds of the whole command with the "
        f"weights that ship, on an image of {args.side} x {args.side} pixels in float32; median of "
        f"{args.rounds} rounds in turns. Now it is {ratio:.2f} times as fast.\n\n"
        + results.table(["checkout", "seconds"], rows),
        args.results,
        since,
    )


if __name__ == "__main__":
    run_script(main, parse_args)
