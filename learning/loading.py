"""The patch sets that a run learns from, and how their patches come to the network."""

from functools import partial
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from learning.augment import transform
from learning.devices import choose_workers
from learning.processes import Machine, share_of_batch
from learning.signals import ignore_signals
from tissue.files import InputError
from tissue.patches import PatchDataset, read_manifests, set_hash
from tissue.sampling import PatchSampler, balanced_order
from tissue.stain import STAINS


class Sets(NamedTuple):
    """The patch sets of a run, as they are at its beginning."""

    roots: list[str]
    manifests: list[dict]
    hash: str  # patches.set_hash

    @classmethod
    def of(cls, roots: list[str]) -> "Sets":
        """Those in these folders; raises as `patches.read_manifests`."""
        return cls(roots, read_manifests(roots), set_hash(*roots))

    @property
    def patch_dim(self) -> int:
        """Height and width of all patches, pixels."""
        return self.manifests[0]["patch_dim"]

    @property
    def have_label_maps(self) -> bool:
        """Whether any training image has a label map, by which a network can learn to tell nuclei
        apart."""
        images = (image for manifest in self.manifests for image in manifest["images"])
        return any(image["labels"] and image["split"] == "train" for image in images)

    def check(self) -> None:
        """Raise InputError unless the sets are still those that the run began with."""
        try:
            same = set_hash(*self.roots) == self.hash
        except OSError:  # one is being cut
            same = False
        if not same:
            raise InputError(
                f"{', '.join(self.roots)}: found another patch set than the run began with, "
                f"expected the same until its end; last.pt is from before: cut the set as it was "
                f"and go on with --resume, or start a new run"
            )


def make_loaders(args, machine: Machine) -> tuple[DataLoader, DataLoader]:
    """This process's share of the training patches, a batch at a time, and of those to validate."""
    device, rank, processes = machine.device, machine.rank, machine.processes
    stain = STAINS[args.stain]
    train_set = PatchDataset(args.root, "train", transform("train", args.augment), stain)
    val_set = PatchDataset(args.root, "val", transform("val"), stain)
    if not len(val_set):
        raise InputError("--root: found no validation patch, expected some; cut the sets anew")
    batch_size = share_of_batch(args.batch_size, len(train_set), processes)
    order = None
    if args.sampler == "balanced":
        order = partial(balanced_order, train_set.foreground, sets=train_set.roots)
    sampler = PatchSampler(len(train_set), args.batch_size, args.seed, rank, processes, order)
    workers = choose_workers(device) if args.workers is None else args.workers
    loading = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": ignore_signals,
        "generator": torch.Generator(),  # else the loaders draw from the one that is saved
    }
    # Every process validates every n-th patch, none of them twice.
    mine = range(rank, len(val_set), processes)
    return (
        DataLoader(train_set, batch_size, sampler=sampler, **loading),
        DataLoader(val_set, batch_size, sampler=mine, **loading),
    )
