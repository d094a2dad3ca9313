"""Two things that every file written or read by this project shares: the error for bad input, and
writing beside a file's place before moving into it."""

import os
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input by the user: says which file, what was found, what was expected, what to do.

    Scripts print it as one line and end with exit code 2. A missing file raises FileNotFoundError.
    """


@contextmanager
def replacing(path):
    """Give a path beside `path` to write to, and move it into place when the block ends well.

    A killed or failed writer leaves the old file or none, never half of one. The name given keeps
    the suffix of `path`, because image writers choose the format by it.
    """
    path = Path(path)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
