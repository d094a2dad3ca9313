"""How glibc, where a program has it, keeps and gives back memory that is freed."""

import contextlib
import ctypes
import itertools
from collections.abc import Iterator

OFTEN = 32  # times that memory is kept before it is given back: it lies ever more apart
_times = itertools.count(1)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, glibc keeps large blocks that are freed instead of giving them back to the system.

    The network's activations are tens of megabytes; fetching zeroed pages for each of them anew
    takes as long as the network itself. Everything else is better off without: blocks of all sizes
    in one heap leave ever more gaps, so that now and then all that is free is given back. Elsewhere
    than with glibc nothing happens.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never trimmed
    mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
    try:
        yield
    finally:
        mallopt(-4, 65536)  # the default
        if next(_times) % OFTEN == 0:
            give_back()


def share_one_heap() -> None:
    """Let all threads that begin from now on take memory from one heap of glibc's: each with its
    own leaves gaps in each. Imports of libraries begin threads: it is called before them.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(-8, 1)  # M_ARENA_MAX


def give_back() -> None:
    """Give what is free, and what `freed_memory_kept` has kept, back to the system."""
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def _of_glibc(name):
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
