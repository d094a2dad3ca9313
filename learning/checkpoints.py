"""Checkpoints: nothing in the file is executed, and all that is used of it is checked first."""

import io
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import Field, Strict, TypeAdapter, with_config
from torch import nn
from typing_extensions import TypedDict

from model import IMAGENET_MEAN, IMAGENET_STD, build
from tissue.files import InputError, replacing
from tissue.nuclei import default_split
from tissue.pixel_size import MICROSCOPE_UM
from tissue.schema import CLOSED, OPEN, Count, Finite, check_content, is_newer

CHECKPOINT_VERSION = 1
DIMENSIONS = (1, 512)  # the least and the most
ADVICE = "expected a checkpoint by train.py; choose another file"
ZIP = b"PK\x03\x04"  # how a file begins that torch has saved since 1.6
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- what a checkpoint holds --------------------------------------------------------------------


def triple_of(least: float, most: float) -> type:
    """Three numbers, one a channel."""
    number = Annotated[Finite, Field(ge=least, le=most)]
    return Annotated[tuple[number, number, number], Strict(False)]  # JSON has lists alone


@with_config(CLOSED)
class Config(TypedDict):
    arch: str
    dimensions: Annotated[int, Field(ge=DIMENSIONS[0], le=DIMENSIONS[1])]
    instances: NotRequired[bool]


@with_config(CLOSED)
class Normalisation(TypedDict):
    mean: triple_of(-100, 100)
    std: triple_of(1e-3, 100)


@with_config(CLOSED)
class StainValues(TypedDict):
    mean: triple_of(-128, 128)
    spread: triple_of(1e-3, 128)


Threshold = Annotated[Finite, Field(gt=0, lt=1)]


@with_config(CLOSED)
class SplitValues(TypedDict):
    sigma: Annotated[Finite, Field(ge=0, le=10)]
    h: Annotated[Finite, Field(ge=0, le=1)]
    hole: Annotated[Finite, Field(ge=0, le=1e4)]
    smallest: Annotated[Finite, Field(ge=0, le=1e4)]
    confidence: NotRequired[Annotated[Finite, Field(ge=0, le=1)]]  # earlier versions': 0


@with_config(CLOSED)
class CountError(TypedDict):
    """How far counts of images were off that the network did not learn."""

    mean: Annotated[Finite, Field(ge=0)]  # of |found - reference| / reference
    images: Annotated[int, Field(ge=1)]


PixelSize = Annotated[Finite, Field(ge=MICROSCOPE_UM[0], le=MICROSCOPE_UM[1])]


@with_config(OPEN)
class Checkpoint(TypedDict):
    format_version: Literal[CHECKPOINT_VERSION]
    model: dict[str, Any]  # tensors, see `check_weights`
    config: Config
    normalisation: Normalisation
    channel_order: Literal["rgb", "bgr"]
    threshold: Threshold
    stain: NotRequired[StainValues | None]
    pixel_size_um: NotRequired[PixelSize | None]
    bits: NotRequired[Annotated[int, Field(ge=8, le=16)] | None]  # of 16-bit images
    split: NotRequired[SplitValues]
    count_error: NotRequired[CountError]
    learned: NotRequired[list[str]]  # first letters of the SHA-256 of each training image's file
    patch_dim: NotRequired[Annotated[int, Field(ge=1, le=2**16)]]
    epoch: NotRequired[Count]
    best_dice: NotRequired[Finite]
    versions: NotRequired[dict[str, str]]
    args: NotRequired[dict[str, Any] | list[dict[str, Any]]]
    training: NotRequired[dict[str, Any]]  # see `runs.load_training`


CHECKPOINT, CONFIG = TypeAdapter(Checkpoint), TypeAdapter(Config)
# What earlier versions did not write.
EARLIER = {"stain": None, "pixel_size_um": None, "bits": None}


# --- reading ------------------------------------------------------------------------------------


def load_checkpoint(path: Path | str) -> dict:
    """A checkpoint with its tensors on the CPU; nothing in the file is executed.

    Keys, types, ranges and the weights' names, shapes and values are as `build_model` and inference
    need them; keys that earlier versions did not write have the values that were meant. A bare
    U-Net state dict, as the pipeline's first version wrote, becomes such a checkpoint
    (`of_first_version`). Raises FileNotFoundError, and InputError for a file that is damaged, no
    checkpoint, or would execute code.
    """
    content = load_tensors(path)
    if isinstance(content, dict) and "format_version" in content:
        version = content["format_version"]
        if type(version) is not int or version != CHECKPOINT_VERSION:
            found = " ".join(repr(version).split())
            newer = ", made by a newer version" * is_newer(version, CHECKPOINT_VERSION)
            raise InputError(
                f"{path}: found checkpoint format {found:.40}{newer}, expected "
                f"{CHECKPOINT_VERSION}; use the version of this project that wrote it"
            )
        if not begins_as_zip(path):
            raise InputError(f"{path}: found a checkpoint without checksums, {ADVICE}")
        if "colour" in content:  # as 0.1.0 called it
            content["stain"] = content.pop("colour")
        content = check_content(CHECKPOINT, content, path, "choose another file")
        check_weights(content["model"], weights_of(content["config"], path), path)
        return completed(content)
    if isinstance(content, dict) and "conv1.conv.0.weight" in content:
        return completed(of_first_version(content, path))
    raise InputError(f"{path}: found a file without a network's weights, {ADVICE}")


def completed(content: dict) -> dict:
    """A checkpoint with the values that were meant for keys that earlier versions did not write."""
    split = default_split(content["config"].get("instances", False))
    return EARLIER | {"split": split._asdict()} | content


def of_first_version(state: dict, path: Path | str) -> dict:
    """The checkpoint of a bare U-Net state dict, as the pipeline's first version wrote.

    Its width is read from the tensors, and its channel order is "bgr", because that version trained
    on patches with swapped colours. Its decoder concatenated (upscaled, skip), ours concatenates
    (skip, upscaled): the halves of the input channels of each `up*.conv.conv.0.weight` change
    places.
    """
    first = state["conv1.conv.0.weight"]
    width = len(first) if isinstance(first, torch.Tensor) and first.ndim else 0
    config = {"arch": "unet", "dimensions": width}
    config = check_content(CONFIG, config, path, "choose another file")
    check_weights(state, weights_of(config, path), path)
    swapped = {f"up{stage}.conv.conv.0.weight" for stage in (1, 2, 3, 4)}
    return {
        "format_version": CHECKPOINT_VERSION,
        "model": {
            key: torch.cat(value.chunk(2, dim=1)[::-1], dim=1) if key in swapped else value
            for key, value in state.items()
        },
        "config": config,
        "normalisation": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        "channel_order": "bgr",
        "threshold": 0.5,
    }


def weights_of(config: dict, path: Path | str) -> dict[str, torch.Tensor]:
    """The state dict of a network without its values: names, shapes and types, but no memory.

    Raises InputError as `model.build`, which then names `path`.
    """
    try:
        with torch.device("meta"):
            return build(config).state_dict()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def check_weights(state: Any, wanted: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Raise InputError, which names `path`, if `misfit` finds anything."""
    if reason := misfit(state, wanted):
        raise InputError(
            f"{path}: found weights that do not fit the network they name ({reason}), {ADVICE}"
        )


def misfit(state: Any, wanted: Mapping[str, torch.Tensor]) -> str:
    """In what a state dict differs from the one that is `wanted`; empty where it fits.

    It has tensors of the same names and shapes, of any floating type where such are wanted, all
    finite, variances 0 or more. Batch norm's counters may be missing: torch before 0.4.1, and with
    it torchvision's files, had none.
    """
    if not isinstance(state, dict):
        return f"a {type(state).__name__} instead of a state dict"
    for key in (*wanted, *state):
        if key not in wanted:
            return f"{key!r:.80} is too much"
        if key not in state and not key.endswith("num_batches_tracked"):
            return f"{key} is missing"
    for key, value in state.items():  # before any is looked into, which takes time and memory
        if reason := misshapen(value, wanted[key]):
            return f"{key}{reason}"
    for key, value in state.items():
        if not value.isfinite().all():
            return f"{key}: numbers that are not finite"
        if key.endswith(("running_var", "num_batches_tracked")) and (value < 0).any():
            return f"{key}: numbers below 0"
    return ""


def misshapen(value: Any, wanted: torch.Tensor) -> str:
    """In what an entry of a state dict differs from the tensor `wanted`, its numbers aside, as the
    end of a sentence that begins with its key; empty where it does not.
    """
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        return f" is no tensor but {type(value).__name__}"
    if value.shape != wanted.shape:
        return f": {tuple(value.shape)} instead of {tuple(wanted.shape)}"
    if value.dtype not in (FLOATS if wanted.dtype.is_floating_point else (wanted.dtype,)):
        return f": {value.dtype} instead of {wanted.dtype}"
    if value.untyped_storage().nbytes() < value.nbytes:
        return ": one number stands for many"
    return ""


def load_tensors(path: Path | str, advice: str = ADVICE) -> Any:
    """What torch saved in a file, on the CPU, if it is of plain types and tensors alone.

    Raises FileNotFoundError, and InputError for a file that is damaged (a zip's checksums tell, the
    format before had none) or would execute code; `advice` says there what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not found, expected a checkpoint; choose log/<run>/best.pt, "
            f"or log/ckpt/nuclei.pt, which ships"
        )
    is_zip = begins_as_zip(path)  # an OSError is the file's, those below are its content's
    try:
        content = checked_zip(path) if is_zip else path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; the errors say more
            return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle's bytes are a program, which can fail in any way
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper():
            raise InputError(
                f"{path}: found objects that would execute code when loaded (refused), {advice}"
            ) from error
        raise InputError(f"{path}: found no checkpoint or a damaged one, {advice}") from error


def begins_as_zip(path: Path | str) -> bool:
    """Whether a file is what torch writes since 1.6, a zip."""
    with open(path, "rb") as file:
        return file.read(len(ZIP)) == ZIP


def checked_zip(path: Path) -> io.BytesIO:
    """The entries of a zip as torch writes it, whose checksums hold, in a zip made anew.

    For torch looks at no checksum, and a flipped bit that makes an entry a folder to it alone
    leaves a tensor of whatever lay in the memory. Raises BadZipFile.
    """
    checked = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as anew:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        fits = sum(entry.file_size for entry in entries) <= path.stat().st_size
        if not stored or not fits or len({entry.filename for entry in entries}) < len(entries):
            raise zipfile.BadZipFile("compressed, overlapping or double entries")
        for entry in entries:
            anew.writestr(entry.filename, archive.read(entry))
    checked.seek(0)
    return checked


def build_model(checkpoint: dict) -> nn.Module:
    """The network of a checkpoint that `load_checkpoint` has checked, with its weights."""
    model = build(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    return model


# --- writing ------------------------------------------------------------------------------------


def save_checkpoint(path: Path | str, checkpoint: dict) -> None:
    """Write a checkpoint, a dict of plain types and tensors, in one move.

    Equal content gives equal bytes, whatever the file's name.
    """
    content = io.BytesIO()  # where an exception breaks into writing a file, torch ends the process
    torch.save(checkpoint, content)
    with replacing(path) as beside:
        try:
            beside.write_bytes(content.getbuffer())
        except OSError as error:
            raise OSError(
                f"{path}: could not be written (is the disk full?); the last whole one is kept"
            ) from error


def mean_of_weights(models: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of each tensor, batch norm's statistics included; integers are the first's.

    That of networks which learned on from the same weights is as good as an average of their
    probabilities would be (Wortsman et al. 2022, ICML, "Model soups"); of others it is nonsense.
    """
    return {
        key: torch.stack([model[key].float() for model in models]).mean(0)
        if value.is_floating_point()
        else value
        for key, value in models[0].items()
    }
