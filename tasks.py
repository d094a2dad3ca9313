"""What `make` does once there is an environment; for Windows, which has no make.

python -m tasks demo        everything once on synthetic tissue, and where to look
python -m tasks doctor      what of this machine the scripts can use, and what lacks
python -m tasks test        the tests, without those that take long
python -m tasks test-all    all tests
python -m tasks test-faults attacks: kills, disks, files from strangers (docs/reliability.md)
python -m tasks lint        ruff
python -m tasks image-side  the tests that need no torch, for one more version of numpy
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DATA, RESULTS = "data/demo", "results/demo"  # the demo writes here and in log/*-demo alone
LOOK = f"""
Look at:
  {DATA}/patches_preview.png   what the network learns from
  {RESULTS}/report.html        masks and counts, in a browser
  {RESULTS}/counts.csv         the same numbers for a spreadsheet
  tensorboard --logdir=.           the curves of the training"""
LINT = (["ruff", "check", "."], ["ruff", "format", "--check", "."])
IMAGE_SIDE = (
    "agreement", "agreement_peers", "annotations", "architecture", "background", "bad_annotations",
    "claims", "cutting", "depth", "exports", "files", "given_sizes", "images", "masks", "measures",
    "nuclei", "outline_files", "pairs", "patches", "pictures", "pixel_size", "project", "report",
    "results", "scanners", "stitching", "store", "strict", "synthetic", "windows",
)  # fmt: skip


def main(arguments: list[str]) -> None:
    """Run the task of that name; SystemExit with the code of the first command that fails."""
    tests = {
        "test": ["-m", "not slow"],
        "test-all": [],
        "image-side": ["-m", "not slow", *(f"tests/test_{name}.py" for name in IMAGE_SIDE)],
    }
    task = arguments[0] if len(arguments) == 1 else None
    if task == "demo":
        demo()
    elif task == "doctor":
        call("doctor.py")
    elif task == "lint":
        for command in LINT:
            call("-m", *command)
    elif task == "test-faults":
        call("-m", "pytest", "-q", "tests/faults")
        call("-m", "tests.faults.kill")
        call("-m", "tests.faults.mutate", "--images", "5000", "--others", "1000")
        call("-m", "tests.faults.many_slides")
    elif task in tests:
        # A program of its own on each core; four hold 4 GB of libraries.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        call("-m", "pytest", "-q", "-n", min(4, os.cpu_count() or 1), *tests[task])
    else:
        sys.exit(__doc__)


def demo() -> None:
    """Draw, cut, train and infer, unless that was done with the code as it is."""
    report = ROOT / RESULTS / "report.html"
    code = [path for room in (".", "tissue", "learning") for path in (ROOT / room).glob("*.py")]
    if not report.is_file() or any(p.stat().st_mtime > report.stat().st_mtime for p in code):
        call("-m", "tissue.synthetic", "--root", DATA)
        call("preprocess.py", "--root", DATA, "--patch_stride", 40)
        call("train.py", "--root", DATA, "--dimensions", 16, "--epoch", 4, "--name", "demo")
        run = max((ROOT / "log").glob("*-demo"))  # the names begin with the time
        call("inference.py", "--root", DATA, "--ckpt", run, "--image_folder", RESULTS)
    print(LOOK)


def call(*arguments) -> None:
    """Run Python with these arguments and end with its exit code where that is not 0."""
    command = [sys.executable, *map(str, arguments)]
    print("python", *command[1:], flush=True)
    if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
