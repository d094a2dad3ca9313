"""Walks JSON files of any size: one value at a time is held, whatever the file says it is. Writes
such files with a list, and reads its items back.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs

from tissue.files import InputError, replacing

LONGEST = 2**26  # characters of one value: labelme has the image itself in one
LONGEST_ITEM = 2**24  # characters of one item of a streamed list
CHUNK = 2**20  # characters that are read at once
MOST_PACKED = 200  # times that text is as long as its gzip; a bomb has 1000, outlines have 10
TOKEN = 16  # characters; of what is cut off, an error lies within the last ones
_SPACE = re.compile(r"[ \t\r\n]*")
_GZIP = b"\x1f\x8b"


@contextmanager
def json_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is walked into InputError."""
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: found bytes that are no UTF-8 ({error.reason}), expected JSON, export it anew"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: found a damaged gzip ({error}), expected a whole one, copy it anew"
        ) from error
    except RecursionError as error:
        raise InputError(
            f"{path}: found JSON that is nested too deep, expected outlines, export it anew"
        ) from error


def members(path: Path, streamed: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The members of a JSON object as (name, value), plain or gzipped, one after the other.

    Of a list whose name is in `streamed`, first (name, ...) comes in place of it, and then its
    items as (name, item); a file that is a list is one of the first such name. Raises InputError
    for what is no such JSON, for a value of more than LONGEST characters or an item of more than
    LONGEST_ITEM, and for text MOST_PACKED times as long as its gzip; it may have given a part.
    """
    with json_errors(path), path.open("rb") as file:
        packed = file.read(2) == _GZIP
        file.seek(0)
        binary = gzip.GzipFile(fileobj=file) if packed else file
        text = io.TextIOWrapper(binary, encoding="utf-8-sig")
        walk = _Walk(path, text, path.stat().st_size * MOST_PACKED if packed else None)
        if walk.next() == "[":
            yield streamed[0], ...
            yield from ((streamed[0], item) for item in walk.items("[", "]", LONGEST_ITEM))
        elif walk.next() == "{":
            for name in walk.items("{", "}"):
                if not isinstance(name, str):
                    raise walk.fault("a member without a name")
                walk.skip(":")
                if name in streamed and walk.next() == "[":
                    yield name, ...
                    yield from ((name, item) for item in walk.items("[", "]", LONGEST_ITEM))
                else:
                    yield name, walk.value()
        else:
            raise walk.fault("neither an object nor a list")
        if walk.next():
            raise walk.fault("more after its end")


class _Walk:
    """A place in a text, which is read as far as need be."""

    def __init__(self, path, file, most):
        self.path, self.file, self.most = path, file, most
        self.text, self.at = "", 0
        self.behind = 0  # characters before `text`
        self.ended = False
        self.decoder = json.JSONDecoder()

    def fault(self, found):
        return InputError(
            f"{self.path}: found {found} at character {self.behind + self.at + 1}, expected JSON "
            f"(GeoJSON, COCO or labelme), export it anew"
        )

    def more(self, longest=LONGEST):
        """Read on; False at the end of the file."""
        rest = len(self.text) - self.at
        if rest > longest:
            raise self.fault(f"a value of more than {longest:,} characters")
        new = self.file.read(min(max(CHUNK, rest), longest + 1 - rest))
        self.behind += self.at
        self.text, self.at = self.text[self.at :] + new, 0
        self.ended = not new
        if self.most and self.behind > max(self.most, LONGEST):
            raise InputError(
                f"{self.path}: found a gzip that unpacks to more than {MOST_PACKED} times its "
                f"size, expected outlines, which pack to a tenth; export it anew"
            )
        return bool(new)

    def next(self):
        """The next character that is no space, "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def skip(self, character):
        if (found := self.next()) != character:
            found = f"{found!r}" if found else "its end"
            raise self.fault(f"{found} in place of {character!r}")
        self.at += 1

    def value(self, longest=LONGEST):
        self.next()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                at = error.pos - self.at
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - TOKEN
                if cut and self.more(longest):  # not yet read to its end
                    continue
                self.at = self.at + at if not cut else len(self.text)
                raise self.fault("its end within a value" if cut else error.msg) from error
            except ValueError as error:
                raise self.fault("a number of too many digits") from error
            # A number may go on behind what was read.
            if end == len(self.text) and not self.ended and self.more(longest):
                continue
            self.at = end
            return value

    def items(self, opening, closing, longest=LONGEST):
        """The values of a list, or the names of an object, after each of which stands `:`."""
        self.skip(opening)
        if self.next() == closing:
            self.at += 1
            return
        while True:
            yield self.value(longest)
            if self.next() == closing:
                self.at += 1
                return
            self.skip(",")


# --- files of our own


@contextmanager
def writing_items(path: Path, head: dict, key: str, text: Callable) -> Iterator[Callable]:
    """Write a JSON object: `head` and a list under `key`, one item a line so that none need be
    held. Gives what writes a batch of items, by `text` of it: bytes, with ",\\n" between items.

    A gzip has a member for each batch (RFC 1952, 2.2), made by libdeflate: half the time of zlib.
    """
    pack = partial(imagecodecs.gzip_encode, level=1) if path.suffix == ".gz" else bytes
    with path.open("wb") as file:
        separator = f'{json.dumps(head)[:-1]}, "{key}": [\n'.encode()

        def write(batch):
            nonlocal separator
            if len(batch):
                file.write(pack(separator + bytes(text(batch))))
                separator = b",\n"

        yield write
        file.write(pack((b"" if separator == b",\n" else separator[:-1]) + b"\n]}\n"))


def write_features(path: Path, features: Iterable[dict]) -> None:
    """Write a GeoJSON file in one move, one feature a line, ASCII, as QuPath reads it."""
    with (
        replacing(path) as beside,
        writing_items(beside, {"type": "FeatureCollection"}, "features", str.encode) as write,
    ):
        write(",\n".join(map(json.dumps, features)))


def items_of(path: Path) -> Iterator[dict]:
    """The items that `writing_items` wrote; ValueError where its end is missing."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="ascii") as file:
        file.readline()
        for line in file:
            if line == "]}\n":
                return
            yield json.loads(line.rstrip(",\n"))
    raise ValueError("its end is missing")
