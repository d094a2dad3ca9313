"""What all scripts and tools share about files and flags: the error for bad input and how it ends a
script, flags and their ranges, writing a file beside its place, and who may write in a folder."""

import argparse
import csv
import difflib
import errno
import hashlib
import math
import os
import re
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tissue import ending

NAMED = 5  # images that a line names, before it says how many more there are

# The hidden name of a file that is being written: `.<12 digits>.part<suffix>`.
PART, DIGITS = ".part", "[0-9a-f]" * 12
_RIGHT = "ask its owner for the right to write there, or choose another folder"
ADVICE = {  # what to do where a disk is the reason
    errno.ENOSPC: "make room, or choose a folder on another disk",
    errno.EDQUOT: "make room, or choose a folder on another disk",
    errno.EROFS: "choose a folder on another disk",
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.ENOENT: "if somebody removed it meanwhile, give the command again",
}
LOCK, HOLDER = ".lock", ".lock.txt"  # a folder's lock, and the text that says who holds it


class InputError(ValueError):
    """Bad input by the user: says which file, what was found, what was expected, what to do.

    Scripts print it as one line and end with exit code 2. A missing file raises FileNotFoundError.
    """


class SomeFailed(InputError):
    """Some of many images failed, and all others are finished: a line each, and exit code 3."""


class Compact(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that fits a screen: a line for most flags, and the defaults that say something."""

    def __init__(self, prog, **settings):
        super().__init__(prog, **({"max_help_position": 28} | settings))

    def _get_help_string(self, action):
        is_said = action.default not in (None, [], "") and action.default is not False
        return super()._get_help_string(action) if is_said else action.help

    def _get_default_metavar_for_optional(self, action):
        return "N" if action.type in (int, float) else action.dest.rpartition("_")[2].upper()

    def _format_args(self, action, default_metavar):
        if action.nargs != "+":
            return super()._format_args(action, default_metavar)
        return f"{action.metavar or default_metavar} ..."


class Parser(argparse.ArgumentParser):
    """argparse's, with a short --help, and bad flags told in one line as all bad input is.

    `doc` is a script's docstring: its first line, and the first two of its commands as examples.
    Text may be empty only where that is the default: else `--init "$FILE"`, where the shell knows
    no FILE, would pass for no --init.
    """

    def __init__(self, doc: str):
        commands = re.findall(r"^    python3 (?:.*\\\n)*.*$", doc, re.MULTILINE)[:2]
        super().__init__(
            usage="%(prog)s [FLAG [VALUE ...] ...]", description=doc.split("\n")[0],
            epilog="\n".join(["examples:", *commands]) if commands else None,
            formatter_class=Compact, allow_abbrev=False, add_help=False,
        )  # fmt: skip
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            advice = f"; did you mean {near[0]}?" if near else ""
            if not flag.startswith("-"):
                advice = "; expected a flag before each value"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
        for action in self._actions:
            if action.nargs == "+" and isinstance(getattr(parsed, action.dest), str):
                setattr(parsed, action.dest, [getattr(parsed, action.dest)])  # its default
        for flag, value in vars(parsed).items():
            given = value if isinstance(value, list) else [value]
            if "" in given and self.get_default(flag) != "":
                self.error(f"--{flag}: found empty text, expected a value")
        return parsed

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def check_numbers(args: argparse.Namespace, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise InputError for the first of these flags that is given and not a number in its range.

    `ranges` has (lowest, highest) for each flag, both allowed, but for a lowest of 0.0 (a float).
    NaN and infinity are in no range.
    """
    for flag, (lowest, highest) in ranges.items():
        value = getattr(args, flag)
        if value is None:
            continue
        open_end = isinstance(lowest, float) and lowest == 0
        fits = lowest <= value <= highest and value != math.inf
        if not fits or (open_end and value == 0):
            least = "more than 0" if open_end else f"{lowest:g} or more"
            shown = f"{highest:,}" if isinstance(highest, int) else f"{highest:g}"
            most = "" if highest == math.inf else f" and at most {shown}"
            raise InputError(f"--{flag}: found {value}, expected {least}{most}")


@contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Let an OSError of the block, that a disk is the reason of, name a file and what to do.

    The file is `path` unless the error names one that is not hidden.
    """
    try:
        yield
    except OSError as error:
        advice = ADVICE.get(error.errno)
        if advice is None or advice in error.strerror:
            raise
        other = error.filename
        is_told = isinstance(other, str) and PART not in other and not other.endswith(LOCK)
        text = f"{error.strerror}; {advice}"
        raise OSError(error.errno, text, other if is_told else str(path)) from error


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Give a path beside `path` to write to, and move it into place when the block ends well.

    A failed writer leaves the old file or none, never half of one. Each writer has a hidden name of
    its own, a new and empty file (what lies at a name, be it a link, is never followed), which
    keeps the suffix of `path`, because image writers choose the format by it. What a killed writer
    leaves there, `locked` removes.
    """
    path = Path(path)
    beside = path.with_name(f".{secrets.token_hex(6)}{PART}{path.suffix}")
    try:
        with named(path):
            os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield beside
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def unfinished(folder: Path) -> list[Path]:
    """The files of a folder that are being written, or were when a run was killed."""
    return list(folder.glob(f".{DIGITS}{PART}*"))


def remove_unfinished(folder: Path) -> None:
    """Remove what killed runs left in a folder in which nobody writes."""
    for left in unfinished(folder):
        if left.is_file() or left.is_symlink():
            left.unlink()


def write_table(path: Path | str, columns: Iterable[str], rows: Iterable[Mapping]) -> None:
    """Write a CSV in one move: UTF-8, a line of column names, and a line of each row's values.

    A value that a row lacks is empty, one of no column a ValueError. Letters of a name that are no
    text, which a file on Linux may have, become escapes.
    """
    with (
        replacing(path) as beside,
        beside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)


@contextmanager
def holding(folder: Path, seconds: float = 0) -> Iterator[None]:
    """Hold a folder's lock; InputError that says who else does, after so many seconds.

    The system frees the lock of a process that was killed.
    """
    lock = FileLock(folder / LOCK, timeout=seconds, mode=0o666)
    try:
        with named(folder):
            lock.acquire()
    except Timeout as error:
        try:
            who = (folder / HOLDER).read_text(encoding="utf-8")
        except (OSError, ValueError):
            who = "another process"
        raise InputError(
            f"{folder}: found {who} writing here, expected nobody; wait for its end, or choose "
            f"another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def locked(folder: Path | str, purpose: str) -> Iterator[None]:
    """Make `folder` if need be, and keep other programs that write into it out meanwhile.

    Raises InputError that says who is in it: `purpose` (as "cuts patches"), process and machine.
    What a process that was killed had begun is removed.
    """
    folder = Path(folder)
    with named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    holder = folder / HOLDER
    with holding(folder), named(folder):
        try:
            remove_unfinished(folder)
            with replacing(holder) as beside:
                text = f"process {os.getpid()} on {socket.gethostname()}, which {purpose},"
                beside.write_text(text, encoding="utf-8")
            yield
        finally:
            holder.unlink(missing_ok=True)


def longest_name(folder: Path) -> int:
    """Bytes that the name of a file may have in a folder, which need not be there yet."""
    folder = folder.absolute()
    there = next((place for place in (folder, *folder.parents) if place.is_dir()), folder)
    try:
        return os.pathconf(there, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows, and systems that do not say
        return 255


def in_the_way(folder: Path) -> Path | None:
    """What is no folder in the place of one or of those above it, a link to nowhere too."""
    places = (folder, *folder.parents)
    return next((p for p in places if os.path.lexists(p) and not p.is_dir()), None)


def check_regular(path: Path) -> None:
    """Raise InputError for a pipe or a device, for which one would wait for ever, and a folder."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: found no regular file, expected one, replace it")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_positive(args: argparse.Namespace, flags) -> None:
    """As `check_numbers`, for numbers above 0."""
    check_numbers(args, {flag: (0.0, math.inf) for flag in flags})


def run_script(main: Callable, parse_args: Callable) -> None:
    """Call `main(parse_args())`, the last line of every script.

    Bad input, files that cannot be read or written, and a full memory end the script with one line
    and exit code 2, Ctrl-C with 130; SomeFailed with its lines and 3. Any other exception is a
    defect and keeps its traceback.
    """
    try:
        try:
            ending.raise_again()
            ending.keep_output_open()
            main(parse_args())
        finally:  # what is left is to say how it went
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except SomeFailed as error:
        print(error, file=sys.stderr)
        sys.exit(3)
    except (InputError, OSError) as error:
        line = "".join(  # the names of files may have more lines, and what a terminal obeys
            sign if sign.isprintable() or "\udc80" <= sign <= "\udcff" else ascii(sign)[1:-1]
            for sign in " ".join(str(error).splitlines())
        )
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:
        print(f"{Path(sys.argv[0]).name}: the memory is full ({error})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        ending.stopped()
        sys.exit(130)


def some(names: Iterable[str]) -> str:
    """The first of names, for a line, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def one_line(error: BaseException) -> str:
    """What an error says, as part of a line; the name of its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
