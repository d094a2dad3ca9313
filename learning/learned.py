"""Which images a network has learned, so that none of them is taken for one that was held out."""

from collections.abc import Iterable, Mapping

from tissue.files import file_hash, some
from tissue.inputs import Task

LETTERS = 16  # of the SHA-256 of an image's file, by which a checkpoint knows it


def learned_images(manifests: Iterable[Mapping], before: Iterable[str] = ()) -> list[str]:
    """What a checkpoint says of the training images of these patch sets, and of those `before`."""
    own = {
        image["image_sha256"][:LETTERS]
        for manifest in manifests
        for image in manifest["images"]
        if image["split"] == "train"
    }
    return sorted(own.union(before))


def said_of_validation(origin: Mapping, manifests: Iterable[Mapping], init: str) -> list[str]:
    """A line if validation images of these patch sets were learned by the checkpoint of --init."""
    known = set(origin.get("learned", ()))
    names = [
        image["name"]
        for manifest in manifests
        for image in manifest["images"]
        if image["split"] == "val" and image["image_sha256"][:LETTERS] in known
    ]
    if not names:
        return []
    return [
        f"{init} has learned {some(names)}, which validate here: their scores are too good; cut "
        f"the set with other validation images (--val_pattern)"
    ]


def said_of_scored(checkpoint: Mapping, tasks: Iterable[Task]) -> list[str]:
    """A line if images that have a reference were learned by the checkpoint."""
    known = set(checkpoint.get("learned", ()))
    scored = [task.pair for task in tasks if known and task.pair.mask]
    names = [pair.name for pair in scored if file_hash(pair.image)[:LETTERS] in known]
    if not names:
        return []
    return [f"The network has learned {some(names)}: scores of others will be lower"]
