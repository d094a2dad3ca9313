"""Tables of a folder of results that somebody has changed, or put there: kept before new ones are
written, or removed.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tissue import results
from tissue.files import file_hash, replacing

WRITTEN = ".written"  # beside the records: the SHA-256 of each table as it was written
TABLES = tuple(name for name in results.TABLES if name.endswith(".csv"))


@contextmanager
def keeping(folder: Path) -> Iterator[list[str]]:
    """Rename the tables that are not as they were written, and remember those that are written
    meanwhile, for all others are somebody's own; gives a line for each that is kept. Who does so
    holds the lock of the tables.

    A call that is killed meanwhile leaves nothing to compare with: its tables are overwritten.
    """
    memory = folder / results.ROWS / WRITTEN
    lines = [keep(path, how) for path, how in _changed(folder, memory)]
    memory.unlink(missing_ok=True)
    yield lines
    there = [path for path in (folder / name for name in TABLES) if path.is_file()]
    with replacing(memory) as beside:
        beside.write_text(json.dumps({path.name: file_hash(path) for path in there}) + "\n")


def _changed(folder, memory):
    """The tables that are not as they were written, or were not, and which of it; none where no
    call has remembered them.
    """
    known = None
    with suppress(OSError, ValueError, RecursionError):
        known = json.loads(memory.read_text(encoding="ascii"))
    for path in [folder / name for name in TABLES] if isinstance(known, dict) else ():
        if not path.is_file() or path.is_symlink() or not path.stat().st_size:
            continue
        if path.name not in known:
            yield path, "no table that inference.py wrote"
        elif file_hash(path) != known[path.name]:
            yield path, "changed since it was written"


def keep(path: Path, how: str) -> str:
    """Rename a file that is `how`, and return a line that says so."""
    place = path.rename(results.place_aside(path))
    return f"{path}: {how}; kept as {place.name}"
