"""How far the images of a folder of results are: status.csv, and the bar of a terminal."""

import csv
import os
import time
from collections.abc import Sequence
from contextlib import suppress

from tqdm import tqdm

from tissue import results, tables
from tissue.claims import Job
from tissue.files import InputError, unfinished, write_table
from tissue.inputs import Task

EVERY = 5.0  # seconds from status.csv to status.csv, whoever writes it


class Status:
    """The images of a call, of which `todo` are to be done, and all others of the folder.

    A context, in which it looks where all are, writes status.csv, and moves the bar on; all the
    time that `job` lives.
    """

    def __init__(self, job: Job, tasks: Sequence[Task], todo: Sequence[Task]):
        self.job = job
        self.path = job.folder / results.STATUS
        self.mm2 = {task.pair.name: _mm2(task.megapixels, task.pixel_size_um) for task in tasks}
        self.todo = {task.pair.name: task.megapixels for task in todo}
        self.finished: dict[tuple, dict] = {}  # what records say, by name and time
        total = round(sum(self.todo.values()), 1)
        self.bar = tqdm(total=total, desc="infer", unit="Mpx", leave=False, disable=None)

    def __enter__(self):
        self.write()
        self.job.watch = self.watch
        return self

    def __exit__(self, *_):
        self.job.watch = lambda: None
        self.bar.close()
        self.job.claim(None)  # whatever ended it
        self.write()

    def watch(self) -> None:
        if not self.bar.disable:
            self.bar.n = min(self.bar.total, round(self._ended(self.look()), 1))
            self.bar.refresh()
        now = self.job.path.stat().st_mtime  # by the file system's clock: it was just written
        if not self.path.exists() or now - self.path.stat().st_mtime > EVERY:
            self.write()

    def look(self) -> dict[str, dict]:
        """The row of status.csv of each image that is known here, by name."""
        jobs = [self.job.held | {"megapixels": self.job.megapixels}, *self.job.others()]
        running = {job["image"]: job for job in jobs if job["image"] is not None}
        times, names = {}, {*self.mm2, *running}
        parts = {path.name for path in unfinished(self.job.rows)}
        for entry in os.scandir(self.job.rows):
            for kind, ending in results.ROW_ENDINGS.items():
                if entry.name.endswith(ending) and entry.name not in parts:
                    name = entry.name.removesuffix(ending)
                    with suppress(FileNotFoundError):  # taken up again by another process
                        times[name, kind] = entry.stat().st_mtime_ns
                        names.add(name)
        found = {}
        for name in sorted(names):
            if name in running:
                now = {"state": "running", "seconds": time.time() - running[name]["since"]}
                now["megapixels"] = running[name]["megapixels"]
            else:
                now = self._at_rest(name, times)
            found[name] = {"image": name, "mm2": self.mm2.get(name)} | now
        return found

    def _at_rest(self, name, times):
        """The state of an image on which nobody works."""
        began = self.job.started if name in self.todo else 0  # older ones are to be done again
        if times.get((name, "fault"), 0) > began:
            return {"state": "failed", "fault": self._fault(name)}
        if (time := times.get((name, "record"), 0)) > began:
            if (name, time) not in self.finished:
                self.finished[name, time] = self._record(name)
            return self.finished[name, time]
        return {"state": "queued"}

    def _fault(self, name):
        try:
            path = results.path_of(self.job.folder, name, "fault")
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has just been taken up again
            return ""

    def _record(self, name):
        try:
            record = results.read(self.job.folder, name)
        except (InputError, OSError) as error:
            return {"state": "failed", "fault": str(error)}
        if record is None:
            return {"state": "queued"}
        row = record["row"]
        mm2 = _mm2(row["height"] * row["width"] / 1e6, record["made_with"]["pixel_size"])
        return {"state": "done", "seconds": row["seconds"], "mm2": mm2}

    def _ended(self, states):
        """Megapixels of what was to be done that came to an end."""
        ended = 0.0
        for name, megapixels in self.todo.items():
            state = states[name]["state"]
            if state == "running":
                ended += min(megapixels, states[name]["megapixels"])
            elif state != "queued":
                ended += megapixels
        return ended

    def write(self) -> None:
        """Write status.csv; what calls that work beside this one have queued stays in it."""
        self.look()  # reads the records, for which nobody has to wait
        with self.job.locked():
            rows = {}
            for name, row in self.look().items():
                rows[_key(name)] = _cells(row)
            for row in self._of_others():
                if row.get("state") == "queued":
                    rows.setdefault(_key(row["image"]), _cells(row))
            write_table(self.path, results.STATUS_COLUMNS, (rows[key] for key in sorted(rows)))

    def _of_others(self):
        """The rows of status.csv, if others work here; none of a file that is no such table."""
        try:
            return tables.read_table(self.path) if self.job.others() else []
        except (OSError, ValueError, KeyError, AttributeError, csv.Error):
            return []


def _cells(row):
    return {key: tables.cell(row.get(key)) for key in results.STATUS_COLUMNS}


def _key(name):
    """A name as it is read back from a table, of one that is no text too."""
    return name.encode("utf-8", "backslashreplace").decode()


def _mm2(megapixels, pixel_size_um):
    return megapixels * pixel_size_um**2 if pixel_size_um else None
