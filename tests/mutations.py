"""Damaged and made-up content for files of ours, drawn from a seed."""

import copy
import math
import random
import zipfile

import torch

MISSING = object()
NONSENSE = (
    MISSING, None, True, False, 0, -1, 3, 10**12, 10**400, 0.3, -0.5, 1e300, math.nan, math.inf,
    -math.inf, "", "x", "0.5", "../x", "\ud800", [], [1], {}, {"x": 1}, [[]], [math.nan] * 3,
)  # fmt: skip
# What JSON has no word for.
OF_PICKLES = (
    b"x", (), (1, 2, 3), (0.1, math.nan, 1), 1j, torch.zeros(()), torch.tensor(math.nan),
    torch.zeros(3), torch.ones(2, 2), torch.tensor([True]), {1: 2}, {(): None}, {None},
)  # fmt: skip


def places(content, here=()):
    """The ways to all parts of nested dicts and lists, tuples among them."""
    if isinstance(content, dict):
        parts = list(content.items())
    elif isinstance(content, list):
        parts = list(enumerate(content))
    else:
        parts = []
    for key, part in parts:
        yield (*here, key)
        yield from places(part, (*here, key))


def changed(content, place, value):
    """A copy of nested dicts and lists with another value at a place, or none."""
    content = copy.deepcopy(content)
    part = content
    for key in place[:-1]:
        part = part[key]
    if value is MISSING:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    return content


def damaged(content: bytes, seed: int) -> bytes:
    """The bytes of a file with a flipped bit, a part cut out, doubled, or filled with nothing."""
    generator = random.Random(seed)
    start = generator.randrange(len(content))
    length = generator.choice((1, 2, 7, 100, 5000))
    before, middle, after = content[:start], content[start : start + length], content[start:]
    after = after[length:]
    kind = seed % 6
    if kind <= 1:
        return before + bytes([content[start] ^ 1 << generator.randrange(8)]) + content[start + 1 :]
    if kind == 2:
        return before + after
    if kind == 3:
        return before + middle + middle + after
    if kind == 4:
        return before + bytes(len(middle)) + after
    return content[:start]


def with_entry(path, ending, change):
    """Write a zip anew in which the entry of this ending is changed, and its checksum with it."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith(ending) else content)
