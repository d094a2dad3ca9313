"""What all scripts and tools share about files: the error for bad input and how it ends a script,
and writing a file beside its place before moving it there."""

import hashlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input by the user: says which file, what was found, what was expected, what to do.

    Scripts print it as one line and end with exit code 2. A missing file raises FileNotFoundError.
    """


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Give a path beside `path` to write to, and move it into place when the block ends well.

    A failed writer leaves the old file or none, never half of one. A killed one also leaves what it
    had written, under a hidden name that the next writer takes. That name keeps the suffix of
    `path`, because image writers choose the format by it.
    """
    path = Path(path)
    beside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_positive(args: Namespace, flags: Sequence[str]) -> None:
    """Raise InputError for the first of these flags that is given and not more than 0."""
    for flag in flags:
        value = getattr(args, flag)
        if value is not None and value <= 0:
            raise InputError(f"--{flag}: found {value}, expected more than 0")


def run_script(main: Callable, parse_args: Callable) -> None:
    """Call `main(parse_args())`, the last line of every script.

    Bad input, and files that cannot be read or written, end the script with one line and exit code
    2, Ctrl-C with 130. Any other exception is a defect and keeps its traceback.
    """
    try:
        main(parse_args())
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped", file=sys.stderr)
        sys.exit(130)
