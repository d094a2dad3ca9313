"""Thousands of damaged files, read as the scripts read them.

    python -m tests.faults.mutate --images 5000 --others 1000
    python -m tests.faults.mutate --images 20 --first 4711       # some of them again

What is read must be right, where that can be known, or refused by one line. A damage is drawn from
the number of its case alone. Children read: none may die, compute for more than 10 seconds, wait
for a minute, or take more than 1 GiB over what it had. Prints each that failed, and how many there
were; exit code 1 if any failed.
"""

import argparse
import contextlib
import faulthandler
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from tests.faults.mutations import PNG, mutated
from tests.faults.samples import groups
from tissue.files import InputError

PATIENCE = 10  # seconds
MOST_MEMORY = 2**30  # bytes
ROOM = 12 * 2**30  # bytes of addresses that a child may have; beyond it asks the system for more
LONGEST_LINE = 1000  # letters


class Outcome(NamedTuple):
    group: str
    number: int
    sample: str
    said: str  # "read", "refused", or what failed
    seconds: float = 0.0  # of computing, its own children's too: others use the machine as well
    memory: int = 0  # bytes


def sample_of(group: str, number: int) -> str:
    names = list(groups()[group])
    return names[number % len(names)]


def original(folder: Path, group: str, name: str) -> Path:
    """A whole sample's file, with its folder of files, written once."""
    place = folder / group / name
    told = place.with_name(f"{name}.opened")
    if not told.is_file():
        place.mkdir(parents=True)
        told.write_text(str(groups()[group][name].write(place).relative_to(place)))
    return place / told.read_text()


def damage(group: str, number: int, folder: Path, work: Path) -> tuple[Path, np.ndarray | None]:
    """Write the case's damaged file, and what its pixels must be if it is read at all."""
    name = sample_of(group, number)
    source = original(folder, group, name)
    place = folder / group / name
    shutil.copytree(place, work)
    sample = groups()[group][name]
    files = {path for pattern in sample.spoiled for path in work.glob(pattern) if path.is_file()}
    generator = random.Random(zlib.crc32(f"{group} {number}".encode()))
    spoiled = generator.choice(sorted(files))
    content = spoiled.read_bytes()
    new = mutated(spoiled, content, generator)
    spoiled.write_bytes(new)
    expected = None
    if group == "images" and new.startswith(PNG) and not checksums_changed(content, new):
        expected = sample.read(source)
    return work / source.relative_to(place), expected


def checksums_changed(content, new):
    """Whether the damage of a PNG is such that its checksums were made anew."""
    from tests.faults.mutations import chunks, with_checksum

    old = set(chunks(content))
    return any(c not in old and len(c) > 11 and with_checksum(c) == c for c in chunks(new))


def judge(group: str, number: int, folder: Path, work: Path) -> str:
    """Read a case's file: "read", "refused", or what is wrong."""
    path, expected = damage(group, number, folder, work)
    try:
        pixels = groups()[group][sample_of(group, number)].read(path)
    except (InputError, FileNotFoundError) as error:
        line, cause = str(error), error
        while cause:
            # OpenSlide asks, and says "Cannot allocate TIFF value": it has touched none of it.
            asked = "allocat" in str(cause) and "TIFF value" not in str(cause)
            if isinstance(cause, MemoryError) or asked:
                return f"asked for more memory than there is: {line:.300}"
            cause = cause.__cause__
        if len(line.splitlines()) != 1 or len(line) > LONGEST_LINE:
            return f"no line: {line:.300}"
        return "refused"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(last.filename).name}:{last.lineno}"
        return f"{type(error).__name__} at {at}: {str(error)[:200]!r}"
    if expected is not None and not np.array_equal(pixels, expected):
        return "other pixels than it had, in spite of checksums"
    return "read"


def memory_of(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def child(cases, folder: Path) -> None:
    """Judge the cases that come, with the seconds and the memory that each takes."""
    used = memory_of("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM,) * 2)
    work = Path(tempfile.mkdtemp(prefix="case-", dir=folder))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    faulthandler.disable()  # of pytest, which would show a crash that is counted
    while (case := cases.recv()) is not None:
        before = memory_of("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start = sum(os.times()[:4])
        said = judge(*case, folder, work / str(case[1]))
        seconds = sum(os.times()[:4]) - start
        shutil.rmtree(work / str(case[1]), ignore_errors=True)
        of_children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        memory = max(memory_of("VmHWM"), of_children) - before
        cases.send(Outcome(*case, sample_of(*case), said, seconds, memory))


class Reader:
    """A child process that reads, and the case that it has."""

    def __init__(self, folder: Path):
        self.folder, self.case, self.began = folder, None, 0.0
        self._start()

    def _start(self):
        self.pipe, other = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(
            target=child, args=(other, self.folder), daemon=True
        )
        self.process.start()
        other.close()

    def give(self, case):
        self.case, self.began = case, time.monotonic()
        self.pipe.send(case)

    def take(self) -> Outcome | None:
        """The outcome of its case, if there is one by now."""
        case, sample = self.case, sample_of(*self.case)
        if self.pipe.poll():
            try:
                outcome = self.pipe.recv()
            except (EOFError, ConnectionResetError):
                self.process.join()
                outcome = Outcome(*case, sample, f"died (exit code {self.process.exitcode})")
                self._start()
        elif time.monotonic() - self.began > 6 * PATIENCE:
            self.process.kill()
            self.process.join()
            outcome = Outcome(*case, sample, "hangs")
            self._start()
        else:
            return None
        self.case = None
        return outcome

    def end(self):
        self.pipe.send(None)
        self.process.join()


def outcomes(cases: list, folder: Path, processes: int):
    """Yield the Outcome of each case, as they come."""
    for group, number in cases:
        original(folder, group, sample_of(group, number))
    readers = [Reader(folder) for _ in range(processes)]
    waiting = iter(cases)
    with contextlib.suppress(StopIteration):
        for reader in readers:
            reader.give(next(waiting))
    while busy := [reader for reader in readers if reader.case]:
        wait([reader.pipe for reader in busy], timeout=1)
        for reader in busy:
            if outcome := reader.take():
                if outcome.said in ("read", "refused"):
                    if outcome.seconds > PATIENCE:
                        outcome = outcome._replace(said=f"took {outcome.seconds:.0f} seconds")
                    if outcome.memory > MOST_MEMORY:
                        outcome = outcome._replace(said=f"took {outcome.memory / 2**20:.0f} MiB")
                yield outcome
                if (case := next(waiting, None)) is not None:
                    reader.give(case)
    for reader in readers:
        reader.end()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--others", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    cases = [
        (group, args.first + number)
        for group, count in (("images", args.images), ("others", args.others))
        for number in range(count)
    ]
    seen, slowest, most = Counter(), 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for outcome in outcomes(cases, Path(folder), args.processes):
            good = outcome.said in ("read", "refused")
            seen[outcome.group, outcome.said if good else "failed"] += 1
            slowest, most = max(slowest, outcome.seconds), max(most, outcome.memory)
            if not good:
                print(f"{outcome.group} {outcome.number} ({outcome.sample}): {outcome.said}")
                sys.stdout.flush()
    for group in ("images", "others"):
        counts = [seen[group, what] for what in ("read", "refused", "failed")]
        if sum(counts):
            print(f"{group}: {sum(counts)} tried, {counts[0]} read, {counts[1]} refused, "
                  f"{counts[2]} failed")  # fmt: skip
    print(f"slowest {slowest:.1f} s, most memory {most / 2**20:.0f} MiB")
    return 1 if any(what == "failed" for _, what in seen) else 0


if __name__ == "__main__":
    sys.exit(main())
