"""How touching nuclei are split: chosen at the end of a training on its own images."""

import math
from pathlib import Path
from typing import NamedTuple

from learning.checkpoints import build_model, load_checkpoint, save_checkpoint
from learning.predictor import Predictor
from tissue import nuclei
from tissue.depth import segment
from tissue.files import InputError
from tissue.masks import read as read_labels
from tissue.pixel_size import scale_of
from tissue.splits import spread
from tissue.tiling import predict_image
from tissue.windows import open_image

MOST_COUNTED = 32  # images of a set by which the split of touching nuclei is chosen


class Counted(NamedTuple):
    """A training image by which `choose_split` chooses."""

    path: Path
    pixel_size_um: float | None
    scale: float  # how many of its pixels make one of the network's
    count: int  # nuclei


def counted_images(roots: list[str], manifests: list[dict]) -> list[Counted]:
    """The training images that have a label map and are small enough for the memory, of each set
    MOST_COUNTED at most, spread over it. Raises InputError with all faults of the maps.
    """
    counted, faults = [], []
    for root, manifest in zip(roots, manifests, strict=True):
        wanted = [i for i in manifest["images"] if i["split"] == "train" and i["labels"]]
        for entry in spread(wanted, MOST_COUNTED):
            try:
                counted.append(count_image(Path(root), entry, manifest["pixel_size_um"]))
            except (InputError, OSError) as error:
                faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    return [one for one in counted if one]


def count_image(root: Path, entry: dict, pixel_size_um: float | None) -> Counted | None:
    """A training image as the manifest has it, with its nuclei counted, for a set of that pixel
    size; None where it is big or not there. Raises InputError for a label map that does not fit.
    """
    path, label_map = root / entry["image"], root / entry["labels"]
    if not (path.is_file() and label_map.is_file()):  # patches alone were brought here
        return None
    image = open_image(path)
    if image.is_big:
        return None
    scale = scale_of(entry["pixel_size_um"], pixel_size_um, path)
    mask = read_labels(label_map)
    if mask.foreground.shape != (image.height, image.width):
        found = " x ".join(map(str, mask.foreground.shape))
        raise InputError(
            f"{label_map}: found labels of {found} pixels (height x width), expected "
            f"{image.height} x {image.width} as in {path}; replace or remove it"
        )
    if mask.labels is None:  # it was when the set was cut
        raise InputError(f"{label_map}: found a mask, expected a label map, as before")
    labels = nuclei.reference_labels(mask.labels)
    return Counted(path, entry["pixel_size_um"], scale, int(labels.max()))


def choose_split(best: Path, counted: list[Counted], device) -> str:
    """Put into best.pt the parameters of nuclei.Split with the smallest count error on the images
    of `counted_images`, and return a line that says which and why.

    Whatever fails, best.pt keeps the defaults: a training is not lost by it.
    """
    checkpoint = load_checkpoint(best)
    default = f"split {nuclei.Split(**checkpoint['split'])}, the default"
    if not counted:
        return f"{default} (no training image has a label map to choose on)"
    try:
        split, error = best_split(checkpoint, counted, device)
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        return f"{default} (it could not be chosen: {' '.join(str(error).split()):.300})"
    if math.isnan(error):
        return f"{default} (no label map of a training image has nuclei to choose on)"
    save_checkpoint(best, checkpoint | {"split": split._asdict()})
    return (
        f"split {split}, chosen on {len(counted)} training images with label maps, count error "
        f"{error:.1%}"
    )


def best_split(checkpoint: dict, counted: list[Counted], device) -> tuple[nuclei.Split, float]:
    """`nuclei.choose_split` on what the network finds in the images of `counted_images`."""
    model = build_model(checkpoint, "best.pt")
    network = Predictor.of(model, checkpoint, device)
    found, sizes = [], []
    for one in counted:
        image = open_image(one.path)
        outputs = predict_image(image, network.at_scale(one.scale))
        image.close()
        found.append(segment(outputs, network.threshold))
        sizes.append(one.pixel_size_um or network.pixel_size_um)
    default = network.split  # the usual one, or that of --init
    depths = found if network.has_depth else None
    masks, counts = [segmented > 0 for segmented in found], [one.count for one in counted]
    return nuclei.choose_split(masks, counts, sizes, default, depths)
