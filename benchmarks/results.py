"""Where the benchmarks put what they measured: a section each in RESULTS.md."""

import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import torch

from learning.devices import moment

RESULTS = Path(__file__).with_name("RESULTS.md")
HEADER = "# Results\n\nEach section is written by the script that it names, and replaced by it.\n"


def write_section(
    title: str, text: str, path: Path | str = RESULTS, since: tuple[float, float] | None = None
) -> None:
    """Print a section and put it into the results file: in place of the one of that title, if any.

    The command that made it, the machine and the date are added, and how busy others kept the
    processors `since` a `devices.moment()`. Other sections stay as they are.
    """
    path = Path(path)
    section = f"## {title}\n\n`{command_line()}`\n\n{text.strip()}\n\n{machine_line()}\n"
    if since and Path("/proc/stat").is_file():
        seconds, others = (now - then for now, then in zip(moment(), since, strict=True))
        share = max(0.0, others / seconds / os.cpu_count())
        section += f"Other programs took {share:.0%} of the processors meanwhile.\n"
    print(f"\n{section}")
    head, *sections = re.split(r"^(?=## )", _content(path), flags=re.MULTILINE)
    places = [i for i, old in enumerate(sections) if old.startswith(f"## {title}\n")]
    if places:
        sections[places[0]] = section
    else:
        sections.append(section)
    path.write_text("\n".join(part.rstrip() + "\n" for part in (head, *sections)))


def has_section(title: str, path: Path | str = RESULTS) -> bool:
    """Whether the results file has a section of that title."""
    return f"## {title}\n" in _content(Path(path))


def _content(path):
    return path.read_text() if path.is_file() else HEADER


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def command_line() -> str:
    """What was called, without folders of this machine."""
    words = [re.sub(r"(?<![^=:])/[^=:]*/", "", word) for word in sys.orig_argv[1:]]
    return shlex.join(["python3", *words])


def machine_line() -> str:
    """Processor, memory, GPU, versions and date, without names of machine or user."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"Machine: {cpu}, {os.cpu_count()} cores, {memory:.0f} GiB memory, {gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, OpenCV {cv2.__version__}; "
        f"{time.strftime('%Y-%m-%d')}."
    )
