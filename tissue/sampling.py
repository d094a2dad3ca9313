"""In which order the patches of a set come to a network that learns from them."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

STRATA = (0.05, 0.1, 0.2, 0.3, 0.4)  # foreground at which a stratum of nuclear density ends
MOST_VIEWS = 4  # a patch comes at most so often in a balanced epoch


class PatchSampler:
    """Patches of an epoch, in an order and with seeds that follow from (seed, epoch) alone.

    Yields (index, seed of this patch's augmentation) for PatchDataset, whole batches of them. Of
    each batch of `batch_size` patches, process `rank` of `processes` gets its equal share, so that
    the batches are the same however many processes there are. The training loop sets `epoch` before
    each pass, and `start`, the number of batches that an interrupted epoch has behind it.

    Each patch comes once an epoch, or else as often as `order` has it, which draws the indices of
    an epoch of the same length by a generator (a partial of `balanced_order`).
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        order: Callable[[np.random.Generator], np.ndarray] | None = None,
    ):
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.order = order
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        batches = self.count // self.batch_size - self.start
        return batches * self.batch_size // self.processes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = self.order(generator) if self.order else generator.permutation(self.count)
        order = order.tolist()
        seeds = generator.integers(2**31, size=self.count).tolist()
        first = self.start * self.batch_size + self.rank
        last = self.count - self.count % self.batch_size
        for place in range(first, last, self.processes):
            yield order[place], seeds[place]


def balanced_order(
    foreground: Sequence[float], generator: np.random.Generator, sets: Sequence | None = None
) -> np.ndarray:
    """Indices of as many patches as there are, int64 (count,), so that none drown the others.

    Each of the `sets` gets views as the square root of its number of patches: of two, one with 16
    times as many counts four times as much. Within a set the STRATA of `foreground` are drawn from
    evenly; those without patches are left out. No patch comes more than MOST_VIEWS times; what is
    left by that goes to larger sets and strata, and each patch comes once before any of its stratum
    comes again. All are spread over the whole epoch, so that every batch is mixed.
    """
    strata = np.digitize(foreground, STRATA)
    number = np.unique(sets, return_inverse=True)[1] if sets is not None else np.zeros_like(strata)
    members = [np.flatnonzero(number == one) for one in np.unique(number)]
    views = _shares([np.sqrt(len(patches)) for patches in members], members, len(strata))
    indices, places = [], []
    for patches, its_views in zip(members, views, strict=True):
        own = strata[patches]
        parts = [patches[own == stratum] for stratum in np.unique(own)]
        for part, count in zip(parts, _shares([1] * len(parts), parts, its_views), strict=True):
            passes = [generator.permutation(part) for _ in range(-(-count // len(part)))]
            indices.append(np.concatenate([*passes, np.zeros(0, int)])[:count])
            places.append((np.arange(count) + generator.random(count)) / max(count, 1))  # 0 to 1
    return np.concatenate(indices)[np.argsort(np.concatenate(places))]


def _shares(weights, members, total):
    """How many of `total` views each of these lists of patches gets, by its weight."""
    shares = [0] * len(members)
    left, weight = total, sum(weights)
    # Those first that need least, so that what they cannot take goes to the others.
    for k in sorted(range(len(members)), key=lambda k: len(members[k]) / weights[k]):
        most = MOST_VIEWS * len(members[k])
        shares[k] = min(int(left * weights[k] / weight + 1e-9), most)
        left, weight = left - shares[k], weight - weights[k]
        last = k
    shares[last] += left
    return shares
