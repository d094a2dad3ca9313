"""Say what of this machine and its Python the scripts can use, and what to do about what lacks.

    python3 doctor.py

A line for each thing: `ok`, `note` (works, but less or slower) or `lacks` (the scripts cannot run).
Ends with exit code 1 where something lacks. Runs where nothing is installed yet.
"""

import argparse
import contextlib
import importlib.metadata
import io
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent
OK, NOTE, LACKS = "ok", "note", "lacks"
GIB = 2**30
MEMORY, DISK = 4, 2  # GiB that are little
CODECS = ["JPEG", "JPEG2K", "LZW", "DEFLATE", "PACKBITS", "ZSTD", "LZMA", "WEBP", "JPEGXL", "PNG"]
INSTALL = "pip install -r requirements.txt"


def parse_args(argv=None):
    return argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(argv)


def main(_):
    states = []
    for look in (python, packages, extras, devices, room, codecs, slides, weights):
        try:
            for state, what, said in look():
                print(f"{state:6} {what:11} {said}", flush=True)
                states.append(state)
        except (ImportError, OSError) as error:  # OSError: a library of another machine
            reason = " ".join(str(error).split())
            print(f"{LACKS:6} {look.__name__:11} cannot be looked at ({reason}); {INSTALL}")
            states.append(LACKS)
    if LACKS in states:
        sys.exit("The scripts cannot run here yet: mend what lacks, from the top, and call again.")
    print("The scripts can run here. Next: python -m tasks demo, or inference.py --images FILE")


def python() -> Iterator[tuple]:
    """Lines (state, name, text) about Python; so do all that follow about their thing."""
    found = sys.version_info[:2]
    place = "" if sys.prefix != sys.base_prefix else "; in no environment: python3 -m venv .venv"
    expected = "" if (3, 11) <= found <= (3, 14) else "; 3.11 to 3.14 expected: install one"
    state = LACKS if found < (3, 11) else NOTE if expected or place else OK
    yield state, "Python", f"{platform.python_version()}{expected or place}"


def packages() -> Iterator[tuple]:
    faults = list(unmet(ROOT / "requirements.txt"))
    said = f"found {', '.join(faults)}; {INSTALL}" if faults else "all that the scripts need"
    lacking = any(fault.startswith("no ") for fault in faults)  # another version may do
    yield LACKS if lacking else NOTE if faults else OK, "packages", said


def extras() -> Iterator[tuple]:
    for file in sorted(ROOT.glob("requirements-*.txt")):
        extra = file.stem.partition("-")[2]
        faults = list(unmet(file))
        said = f"found {', '.join(faults)}; pip install -e .[{extra}]" if faults else "all there"
        yield NOTE if faults else OK, f"[{extra}]", said


def unmet(file: Path) -> Iterator[str]:
    """What of a requirements file is not installed, or in another version than it takes."""
    from packaging.requirements import InvalidRequirement, Requirement

    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            wanted = Requirement(line.partition("#")[0].strip())
        except InvalidRequirement:  # an empty line
            continue
        if wanted.marker and not wanted.marker.evaluate():
            continue
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"no {wanted.name}"
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            yield f"{wanted.name} {found} (expected {wanted.specifier})"


def devices() -> Iterator[tuple]:
    import torch

    from learning.devices import choose_precision

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU alone"
    yield OK, "PyTorch", f"{torch.__version__}, built {build}"
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            fast = str(choose_precision(torch.device("cuda", number))).removeprefix("torch.")
            said = f"{number}: {about.name}, {about.total_memory / GIB:.0f} GiB, learns in {fast}"
            yield OK, "GPU", said
    elif torch.backends.mps.is_available():
        yield OK, "GPU", "Apple's, learns in float32"
    elif shutil.which("nvidia-smi") and not subprocess.call(
        ["nvidia-smi", "-L"], stdout=subprocess.DEVNULL
    ):
        advice = "update its driver, or install the torch that fits it (https://pytorch.org)"
        yield NOTE, "GPU", f"found one that this PyTorch cannot use, the CPU works; {advice}"
    else:
        advice = "begin with train.py --dimensions 16 --epoch 1, or --init log/ckpt/nuclei.pt"
        yield NOTE, "GPU", f"found none, the CPU works; {advice}"
    has = torch.cpu.get_capabilities()
    known = [name for name in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if has.get(name)]
    fast = str(choose_precision(torch.device("cpu"))).removeprefix("torch.")
    name = has.get("cpu_name") or platform.machine()
    yield OK, "processor", f"{', '.join([name, *known])}; works in {fast}"
    set_by = " (by OMP_NUM_THREADS)" if "OMP_NUM_THREADS" in os.environ else ""
    yield OK, "cores", f"{os.cpu_count()}, of which PyTorch takes {torch.get_num_threads()}{set_by}"


def room() -> Iterator[tuple]:
    from tissue.images import free_memory

    free = free_memory() / GIB
    little = "" if free >= MEMORY else f"; {MEMORY} expected: close programs, or --tile_size 512"
    yield NOTE if little else OK, "memory", f"{free:.1f} GiB free{little}"
    free = shutil.disk_usage(Path.cwd()).free / GIB
    little = "" if free >= DISK else f"; {DISK} expected: give --image_folder and --log elsewhere"
    yield NOTE if little else OK, "disk", f"{free:.1f} GiB free in {Path.cwd()}{little}"


def codecs() -> Iterator[tuple]:
    import imagecodecs

    lacking = [name for name in CODECS if not getattr(imagecodecs, name).available]
    there = f"{imagecodecs.__version__}: {', '.join(n for n in CODECS if n not in lacking)}"
    if lacking:
        there += f"; no {', '.join(lacking)}: pip install --force-reinstall imagecodecs"
    yield NOTE if lacking else OK, "imagecodecs", there


def slides() -> Iterator[tuple]:
    from tissue.scanners import INSTALL, SUFFIXES

    try:
        import openslide
        import pydicom
    except (ImportError, OSError) as error:
        said = f"no {', '.join(SUFFIXES)} ({error}); {INSTALL}"
        yield NOTE, "slides", said
        return
    version = openslide.__library_version__
    yield (
        OK,
        "slides",
        f"OpenSlide {version}, pydicom {pydicom.__version__}; SVS and TIFF need none",
    )


def weights() -> Iterator[tuple]:
    """Whether the default weights load, and an image runs from its file to its count."""
    import inference
    from tissue.files import InputError
    from tissue.synthetic import write_demo

    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            write_demo(folder, 1, 256)
            flags = ["--images", f"{folder}/tissue_images", "--image_folder", f"{folder}/results"]
            inference.main(inference.parse_args([*flags, "--gpu_id", "-1"]))
            table = Path(folder, "results", "counts.csv").read_text(encoding="utf-8").splitlines()
    except (InputError, OSError) as error:
        yield LACKS, "weights", f"{error}; fetch this repository anew"
        return
    row = dict(zip(table[0].split(","), table[1].split(","), strict=True))
    yield (
        OK,
        "weights",
        f"{inference.SHIPPED.name} found {row['nuclei']} nuclei in a synthetic image",
    )


if __name__ == "__main__":
    main(parse_args())
