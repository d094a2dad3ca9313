"""Which process works on which image of a folder of results, so that many can at once.

Each process has a file `rows/<12 digits>.job`: its settings, machine and process, and the image
that it has claimed. Its first line, how far it is, is written every few seconds. A process of this
machine that is gone, and any that was not heard of for STALE seconds, is dead, and its image is
anybody's. Who looks and then claims holds the folder's lock, for milliseconds, so that no two claim
one image. All times are those of the folder's file system.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tissue import results
from tissue.files import DIGITS, HOLDER, InputError, holding, remove_unfinished, replacing
from tissue.inputs import Task
from tissue.todo import unfinished

BEAT, STALE = 2.0, 120.0  # seconds
PAUSE = 1.0  # seconds from look to look of who waits for images that others work on
WAIT = 60.0  # seconds for a lock that everybody holds for milliseconds
MAKING = 7200.0  # seconds for one that is held for as long as it takes to make tables, by many


class Job:
    """This process among those that work in a folder of results; `working` gives one.

    `watch` is called every few seconds, `faults` are those of its images.
    """

    def __init__(self, folder: Path, settings: dict, overwrite: bool):
        self.folder, self.rows, self.overwrite = folder, folder / results.ROWS, overwrite
        self.path = self.rows / f"{secrets.token_hex(6)}.job"
        self.held = {"settings": settings, "machine": _machine(), "process": os.getpid()}
        self.megapixels = 0.0  # of the image in work, that came to an end
        self.faults: list[str] = []
        self.watch: Callable[[], None] = lambda: None
        self.writing, self.ended = threading.Lock(), threading.Event()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock, shortly; InputError if another program has it for long."""
        with holding(self.folder, 2 if os.path.lexists(self.folder / HOLDER) else WAIT):
            yield

    def join(self) -> None:
        """Begin; InputError if anybody works here with other settings."""
        (self.folder / HOLDER).unlink(missing_ok=True)  # of a killed one
        self.claim(None)
        self.started = self.path.stat().st_mtime_ns
        others = self.others()
        for other in others:
            if other["settings"] != self.held["settings"]:
                self.path.unlink()
                raise InputError(
                    f"{self.folder}: found process {other['process']} on "
                    f"{other['machine'].split()[0]} writing here with other settings, expected "
                    f"nobody or the same settings; wait for its end, or choose another folder"
                )
        self._clean(others)

    def leave(self) -> None:
        self.claim(None)
        others = self.others()
        self.path.unlink()
        self._clean(others)

    def _clean(self, others):
        """Remove what killed processes had begun, unless it may be what others write."""
        if not others:
            remove_unfinished(self.folder)
            remove_unfinished(self.rows)

    def claim(self, name: str | None) -> None:
        """Work on an image, or on none; who asks first holds the lock."""
        self.held |= {"image": name, "since": time.time()}
        self.megapixels = 0.0
        with self.writing, replacing(self.path) as beside:
            beside.write_text(f"{0:012.3f}\n{json.dumps(self.held)}\n", encoding="utf-8")

    def advance(self, megapixels: float) -> None:
        self.megapixels += megapixels

    def beat(self) -> None:
        """Say that this process lives, and how far it is; OSError if it was taken for dead."""
        with self.writing, self.path.open("r+b", buffering=0) as file:
            file.write(b"%012.3f" % self.megapixels)

    def live(self) -> None:
        """Say so again and again, in a thread."""
        while not self.ended.wait(BEAT):
            for act in (self.beat, self.watch):
                with suppress(OSError, InputError):  # as on a full disk: a later one may be heard
                    act()

    def others(self) -> list[dict]:
        """What others that live have in their files; those of dead ones are removed."""
        self.beat()
        now, found = self.path.stat().st_mtime, []
        for path in self.rows.glob(f"{DIGITS}.job"):
            try:
                heard, (done, text) = path.stat().st_mtime, path.read_text("utf-8").splitlines()
                job = json.loads(text) | {"megapixels": float(done)}
                job = {key: job[key] for key in (*self.held, "megapixels")}
                dead = now - heard > STALE or _is_gone(job)
            except (OSError, ValueError, KeyError, TypeError):  # it has just left; or no such file
                continue
            if dead:
                path.unlink(missing_ok=True)
            elif path != self.path:
                found.append(job)
        return found

    def take(self, left: dict[str, Task]) -> Task | None:
        """Claim the first image of `left` that nobody works on; None once all are finished.

        What is finished, failed or claimed is taken out of `left`. While others work on the last
        ones it waits: they may die.
        """
        while True:
            with self.locked():
                self.claim(None)
                theirs = {other["image"] for other in self.others()}
                for name in [name for name in left if name not in theirs]:
                    if task := self._still(left.pop(name)):
                        self.claim(name)
                        results.path_of(self.folder, name, "fault").unlink(missing_ok=True)
                        return task
            if not left:
                return None
            time.sleep(PAUSE)

    def _still(self, task):
        """A task as it is to be done now, None if that was done since this process began."""
        name = task.pair.name
        if self.is_new(fault := results.path_of(self.folder, name, "fault")):
            self.faults.append(fault.read_text(encoding="utf-8", errors="replace"))
            return None
        is_new = self.is_new(results.path_of(self.folder, name, "record"))
        todo, _ = unfinished([task], self.overwrite and not is_new)
        if todo and is_new and not todo[0].row:
            record = results.read(self.folder, name)
            if record and record["made_with"] != task.made_with:
                self.faults.append(
                    f"{task.pair.image}: found results of this name that a call beside this one "
                    f"has just made of other files (image, reference, regions), expected the same; "
                    f"wait for its end, or rename the image"
                )
                return None
        return todo[0] if todo else None

    def is_new(self, path: Path) -> bool:
        """Whether a file was written since this process began."""
        try:
            return path.stat().st_mtime_ns > self.started
        except FileNotFoundError:
            return False

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Hold the lock for the record of the image in work; InputError if that is not its own."""
        with self.locked():
            if not self.path.exists():
                raise InputError(
                    f"{self.held['image']}: found that another process has taken it over, expected "
                    f"a sign of life of this one every {STALE:.0f} seconds; start it again"
                )
            yield
            self.claim(None)

    def failed(self, name: str, line: str) -> None:
        """An image of this process has failed: for its list, and for all who look."""
        line = " ".join(line.splitlines())
        self.faults.append(line)
        with suppress(OSError):  # the disk may be full
            results.write_fault(self.folder, name, line)
            self.claim(None)


@contextmanager
def working(
    folder: Path | str, settings: dict | None = None, overwrite: bool = False
) -> Iterator[Job]:
    """Make the folder of results if need be, and work there, beside others with equal settings.

    Raises InputError if one with others does, and for what `results.check_folder` does. What killed
    processes left is removed when nobody else is there.
    """
    folder = Path(folder)
    results.check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(folder, settings or {}, overwrite)
    with job.locked():
        job.rows.mkdir(exist_ok=True)
        job.join()
    thread = threading.Thread(target=job.live, daemon=True)
    thread.start()
    try:
        yield job
    finally:
        job.ended.set()
        thread.join()
        with suppress(OSError, InputError), job.locked():
            job.leave()


@contextmanager
def making_tables(folder: Path) -> Iterator[bool]:
    """Wait until nobody makes the tables of a folder; gives whether they are to be made now, and
    not made already, by who began after this call did and so found all that it would.
    """
    rows = folder / results.ROWS
    made = rows / ".tables"  # how often that was begun, and the last one that came to its end

    def known():
        with suppress(OSError, ValueError):
            begun, ended = map(int, made.read_text().split())
            return begun, ended
        return 0, 0

    def say(*numbers):
        with replacing(made) as beside:
            beside.write_text("{} {}\n".format(*numbers))

    before, _ = known()
    with holding(rows, MAKING):
        begun, ended = known()
        if begun > before and begun == ended:
            yield False
            return
        say(begun + 1, ended)
        yield True
        say(begun + 1, begun + 1)


def _machine():
    """This machine, and what else tells which processes are meant by their numbers."""
    where = [socket.gethostname()]
    with suppress(OSError):
        where.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        where.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(where)


def _is_gone(job):
    """Whether a process is known not to live, for it would on this machine."""
    if os.name != "posix" or job["machine"] != _machine():
        return False
    try:
        os.kill(job["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return False
