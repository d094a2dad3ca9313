"""Damage of files, drawn from a seed: bits, cuts, lies of headers, chunks in another order."""

import json
import random
import re
import struct
import zlib
from pathlib import Path

import tifffile

from tests.mutations import MISSING, NONSENSE, changed, places
from tissue.schema import seal
from tissue.tiff import TIFF_SIGNATURES

EXTREMES = (0, 1, 2, 7, 255, 256, 32767, 32768, 65535, 65536, 10**6, 2**24, 2**31 - 1, 2**31)
EXTREMES += (2**32 - 1, 2**40, 10**12, 2**63 - 1, 2**64 - 1)
NUMBERS = (b"9" * 40_000, b"-1", b"1e999", b"nan", b"0", b"0.0000001", b"65536", b"1000000000000")
PNG = b"\x89PNG\r\n\x1a\n"


def mutated(path: Path, content: bytes, generator: random.Random) -> bytes:
    """The content of a file with one to three damages of any kind."""
    kinds = [flipped, cut, inserted, removed, header, swapped, lying, numbers, filled]
    kinds += [named_field] * 3 + [json_value] * 3
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        content = generator.choice(kinds)(content, generator)
    return content


def flipped(content, generator):
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 3, 20)) if data else 0):
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return bytes(data)


def cut(content, generator):
    return content[: generator.randrange(len(content) + 1)]


def _range(content, generator):
    start = generator.randrange(len(content) + 1)
    return start, min(len(content), start + generator.choice((1, 2, 4, 16, 100, 1000, 20_000)))


def inserted(content, generator):
    start, end = _range(content, generator)
    new = generator.choice((generator.randbytes(end - start), bytes(end - start)))
    return content[:start] + generator.choice((new, content[start:end])) + content[start:]


def removed(content, generator):
    start, end = _range(content, generator)
    return content[:start] + content[end:]


def filled(content, generator):
    start, end = _range(content, generator)
    return content[:start] + generator.choice((b"\0", b"\xff")) * (end - start) + content[end:]


def _put(content, place, size, value, order):
    value &= (1 << 8 * size) - 1
    return content[:place] + value.to_bytes(size, order) + content[place + size :]


def header(content, generator):
    """An extreme number at the beginning, or at the end, where many a TIFF has its directory."""
    size, order = generator.choice((1, 2, 4, 8)), generator.choice(("little", "big"))
    place = generator.randrange(min(len(content), 600) + 1)
    place = place if generator.random() < 0.6 else max(0, len(content) - 600) + place
    return _put(content, place, size, generator.choice(EXTREMES), order)[: len(content)]


def swapped(content, generator):
    """Two parts of one length in each other's place; whole chunks of a PNG."""
    if content.startswith(PNG) and len(parts := chunks(content)) > 2:
        one, other = generator.sample(range(len(parts)), 2)
        parts[one], parts[other] = parts[other], parts[one]
        return PNG + b"".join(parts)
    (a, b), (c, d) = sorted((_range(content, generator), _range(content, generator)))
    length = min(b - a, d - c, c - a)
    return b"".join(
        (content[:a], content[c : c + length], content[a + length : c], content[a : a + length],
         content[c + length :])
    )  # fmt: skip


def chunks(content):
    found, place = [], len(PNG)
    while place + 12 <= len(content):
        length = 12 + int.from_bytes(content[place : place + 4], "big")
        found.append(content[place : place + length])
        place += length
    return found


def numbers(content, generator):
    """A number written in digits, as in XML, JSON and tables, that is absurd."""
    found = list(re.finditer(rb"\d+(\.\d+)?", content))
    if not found:
        return flipped(content, generator)
    one = generator.choice(found)
    return content[: one.start()] + generator.choice(NUMBERS) + content[one.end() :]


def lying(content, generator):
    """A header of another size, with right checksums where the format has them."""
    value = generator.choice(EXTREMES)
    if content.startswith(PNG) and (parts := chunks(content)) and len(parts[0]) == 25:
        place = generator.choice((8, 12, 16, 17, 20))  # width, height, depth, colours, interlaced
        first = bytearray(parts[0])
        size = 4 if place < 16 else 1
        first[place : place + size] = (value % 256**size).to_bytes(size, "big")
        return PNG + with_checksum(bytes(first)) + b"".join(parts[1:])
    if content.startswith(b"\xff\xd8") and (at := re.search(rb"\xff[\xc0-\xc2]", content)):
        return _put(content, at.start() + generator.choice((5, 7)), 2, value, "big")
    if content.startswith(b"BM"):
        return _put(content, generator.choice((10, 18, 22)), 4, value, "little")
    return header(content, generator)


def with_checksum(chunk):
    return chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4]))


def named_field(content, generator):
    """A number of a TIFF's directory, or of any PNG chunk, whose checksum then fits."""
    if content.startswith(PNG) and (parts := chunks(content)):
        at = generator.randrange(len(parts))
        damaged = flipped(parts[at][8:-4], generator)
        parts[at] = with_checksum(parts[at][:8] + damaged + b"\0\0\0\0")
        return PNG + b"".join(parts)
    if not content.startswith(TIFF_SIGNATURES):
        return lying(content, generator)
    fields = tiff_fields(content)
    if not fields:
        return header(content, generator)
    place, size, order = generator.choice(fields)
    return _put(content, place, size, generator.choice(EXTREMES), order)


def tiff_fields(content):
    """(place, bytes, byte order) of each number in a TIFF's directories."""
    order = "little" if content[:1] == b"I" else "big"
    sizes = {1: 1, 3: 2, 4: 4, 13: 4, 16: 8, 18: 8}  # by type
    fields = []
    try:
        with tifffile.TiffFile(tifffile.FileHandle(_file(content))) as tif:
            big = tif.is_bigtiff
            pages = [tif.pages.get(n) for n in range(len(tif.pages))]
            pages += [page for one in pages for page in one.pages or ()]
            for tag in (tag for page in pages for tag in page.tags):
                fields += [(tag.offset, 2, order), (tag.offset + 2, 2, order)]
                fields += [(tag.offset + 4, 8 if big else 4, order)]
                size = sizes.get(int(tag.dtype), 1)
                fields += [(tag.valueoffset + size * n, size, order)
                           for n in range(min(tag.count, 4))] * 3  # fmt: skip
    except Exception:  # it is damaged already
        return []
    return [field for field in fields if field[0] + field[1] <= len(content)]


def _file(content):
    import io

    return io.BytesIO(content)


def json_value(content, generator):
    """Another value at a place of a JSON file; half of the seals fit then."""
    try:
        value = json.loads(content)
        ways = list(places(value))
        value = changed(value, generator.choice(ways), generator.choice((*NONSENSE, MISSING)))
        if isinstance(value, dict) and "sha256" in value and generator.random() < 0.7:
            value["sha256"] = seal(value)
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, IndexError, RecursionError, KeyError):
        return named_field(content, generator)
