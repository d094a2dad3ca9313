"""The patch sets that a run learns from, and how their patches come to the network."""

import gc
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from learning.augment import transform
from learning.devices import choose_workers
from learning.processes import Machine, share_of_batch
from learning.signals import begin_loader
from tissue.files import InputError, file_hash, some
from tissue.manifest import MANIFEST
from tissue.patches import PatchDataset, read_manifests, set_hash
from tissue.sampling import PatchSampler, balanced_order
from tissue.stain import STAINS
from tissue.unused import said_since_cut


class Sets(NamedTuple):
    """The patch sets of a run, as they are at its beginning."""

    roots: list[str]
    manifests: list[dict]
    hash: str  # patches.set_hash
    own: list[dict]  # the manifests of --root, without those of --replay
    notes: list[str]  # on files that are others than when the sets were cut

    @classmethod
    def of(cls, roots: list[str], replay: list[str], begins: bool = True) -> "Sets":
        """Those in the folders of --root and --replay; raises as `patches.read_manifests`, and
        InputError for one that is in both, for an image that is learned and validated, and where a
        run `begins`, for files that were changed since they were cut; one that goes on notes them.
        """
        if both := set(map(os.path.realpath, roots)) & set(map(os.path.realpath, replay)):
            raise InputError(
                f"--replay: found {', '.join(sorted(both))} in --root, too, expected other patch "
                f"sets; leave it out of one"
            )
        every, own = [*roots, *replay], len(roots)
        manifests = read_manifests(every)
        check_apart(every, manifests, own)
        notes = []
        if changed := some(map(str, changed_files(every, manifests))):
            found = f"{changed}: found other files than those that were cut"
            if begins:
                raise InputError(
                    f"{found}, expected the same; run preprocess.py again, so that the patches are "
                    f"of these"
                )
            notes.append(f"{found}; the run goes on with the patches of before")
        for root, manifest in zip(every, manifests, strict=True):
            notes += said_since_cut(root, manifest["images"])
        return cls(every, manifests, set_hash(*every), manifests[:own], notes)

    @property
    def patches(self) -> int:
        """Training patches of an epoch: those of --root, and as many of --replay if there are."""
        own = sum(manifest["patches"]["train"] for manifest in self.own)
        return own * (1 + (len(self.own) < len(self.manifests)))

    @property
    def patch_dim(self) -> int:
        """Height and width of all patches, pixels."""
        return self.manifests[0]["patch_dim"]

    @property
    def have_label_maps(self) -> bool:
        """Whether any training image of --root has a label map, by which a network can learn to
        tell nuclei apart."""
        images = (image for manifest in self.own for image in manifest["images"])
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


def changed_files(roots: list[str], manifests: list[dict]) -> list[Path]:
    """The masks and images that are others than those that were cut, as where they were corrected
    since: the patches are of before. Files that are not there do not matter.
    """
    changed = []
    for root, manifest in zip(map(Path, roots), manifests, strict=True):
        cut = (root / MANIFEST).stat().st_mtime
        for image in manifest["images"]:
            kinds = (kind for kind in ("image", "mask", "labels") if image[kind])
            hashes = {image[kind]: image[f"{kind}_sha256"] for kind in kinds}  # a mask may be both
            for file, digest in hashes.items():
                path = root / file
                # A copy may have any time. Masks are small enough to look at all of them.
                if path.is_file() and (file != image["image"] or path.stat().st_mtime > cut):
                    changed += [path] * (file_hash(path) != digest)
    return changed


def check_apart(roots: list[str], manifests: list[dict], own: int) -> None:
    """Raise InputError where a file is learned in one set and validated in another.

    The first `own` sets are those of --root; those after them are not validated.
    """
    learned = {}  # an image of each file and of each picture, as its root and name
    for root, manifest in zip(roots, manifests, strict=True):
        for image in manifest["images"]:
            if image["split"] == "train":
                learned |= dict.fromkeys(_hashes(image), f"{root}: {image['name']}")
    for root, manifest in zip(roots[:own], manifests, strict=False):
        for image in manifest["images"]:
            if image["split"] == "val" and (same := _hashes(image) & learned.keys()):
                raise InputError(
                    f"{root}: {image['name']}: found this validation image among the training "
                    f"images, too ({learned[same.pop()]}), expected other ones; remove "
                    f"one of both, or cut the sets with other --val_pattern"
                )


def _hashes(image):
    return {image["image_sha256"], image.get("pixels_sha256", image["image_sha256"])}


def make_loaders(args, machine: Machine) -> tuple[DataLoader, DataLoader]:
    """This process's share of the training patches, a batch at a time, and of those to validate."""
    device, rank, processes = machine.device, machine.rank, machine.processes
    stain = STAINS[args.stain]
    changes = transform("train", args.augment)
    train_set = PatchDataset([*args.root, *args.replay], "train", changes, stain)
    val_set = PatchDataset(args.root, "val", transform("val"), stain)
    if not len(val_set):
        raise InputError("--root: found no validation patch, expected some; cut the sets anew")
    check_nuclei(train_set, val_set)
    count, order = epoch_of(args, train_set)
    batch_size = share_of_batch(args.batch_size, count, processes)
    sampler = PatchSampler(count, args.batch_size, args.seed, rank, processes, order)
    workers = choose_workers(device) if args.workers is None else args.workers
    loading = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": begin_loader,
        "generator": torch.Generator(),  # else the loaders draw from the one that is saved
    }
    if workers:  # a collection in a loader process would copy all of Python's objects for itself
        gc.collect()
        gc.freeze()
    # Every process validates every n-th patch, none of them twice.
    mine = range(rank, len(val_set), processes)
    return (
        DataLoader(train_set, batch_size, sampler=sampler, **loading),
        DataLoader(val_set, batch_size, sampler=mine, **loading),
    )


def check_nuclei(train_set: PatchDataset, val_set: PatchDataset) -> None:
    """Raise InputError where no patch to learn from, or none to validate, has a nucleus."""
    for patches, what in ((train_set, "training"), (val_set, "validation")):
        if not any(patches.foreground):
            roots = ", ".join(map(str, dict.fromkeys(patches.roots)))
            raise InputError(
                f"{roots}: found no nucleus in any of the {len(patches)} {what} patches, expected "
                f"some; look at the masks, or cut with other validation images (--val_pattern, "
                f"--seed of preprocess.py)"
            )


def number_images(patches: PatchDataset) -> tuple[torch.Tensor, list[str]]:
    """The number of each patch's image, int64 (patches,), and the names of the images, in order;
    one that two sets share with the root before it.
    """
    names = (source["name"] for source in patches.sources)
    numbers = {}
    keys = zip(patches.roots, names, strict=True)
    numbered = [numbers.setdefault(key, len(numbers)) for key in keys]
    times = Counter(name for _, name in numbers)
    names = [name if times[name] == 1 else f"{root}/{name}" for root, name in numbers]
    return torch.tensor(numbered), names


def epoch_of(args, train_set: PatchDataset) -> tuple[int, Callable | None]:
    """How many patches an epoch has, and in which order, as PatchSampler takes it.

    The patches of --root come first in `train_set`, those of --replay after them.
    """
    own = sum(root in args.root for root in train_set.roots)
    order = None
    if args.sampler == "balanced":
        order = partial(balanced_order, train_set.foreground[:own], sets=train_set.roots[:own])
    if not args.replay:
        return own, order
    return 2 * own, partial(with_replay, order, own, len(train_set) - own)


def with_replay(
    order: Callable | None, own: int, kept: int, generator: np.random.Generator
) -> np.ndarray:
    """An epoch of `own` patches, in their order, with one of the `kept` ones after each of them,
    int64 (2 * own,): half of each batch. No kept one comes again before all others have come.
    """
    first = order(generator) if order else generator.permutation(own)
    passes = [generator.permutation(kept) for _ in range(-(-own // kept))]
    return np.stack([first, own + np.concatenate(passes)[:own]], 1).ravel()
