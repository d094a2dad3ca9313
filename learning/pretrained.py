"""An encoder's first weights: what timm fetches, or a file."""

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from learning.checkpoints import load_tensors, misfit
from model import UNET, create_encoder
from tissue.files import InputError, one_line

FETCHED = "imagenet"  # what --pretrained is without a file
ADVICE = "choose another file, or another --arch"


def start_pretrained(model: nn.Module, source: str) -> None:
    """Give the encoder of a network weights that it learned elsewhere, mostly on ImageNet.

    `source` is FETCHED, which timm fetches once and keeps, or a file (`read_weights`). Raises
    InputError or FileNotFoundError where they cannot be had or do not fit.
    """
    arch = model.config["arch"]
    if arch == UNET:
        raise InputError(
            f"--pretrained: found it with --arch {UNET}, which has no encoder of timm; expected "
            f"another --arch, as tf_efficientnet_lite0"
        )
    if source == FETCHED:
        encoder = fetch(arch)
    else:
        weights = read_weights(source, arch)
        given = {"state_dict": dict(weights)}
        encoder = create_encoder(arch, pretrained=True, pretrained_cfg_overlay=given)
        check_came(encoder, weights, source)
    if reason := misfit(encoder.state_dict(), model.encoder.state_dict()):
        raise InputError(f"--pretrained: found weights of {arch} that are no use ({reason})")
    model.encoder.load_state_dict(encoder.state_dict())


def fetch(arch: str) -> nn.Module:
    """The encoder with the weights that timm fetches; InputError where none are to be had."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a warning for each try
    try:
        return create_encoder(arch, pretrained=True)
    except Exception as error:  # no network, no such weights, a damaged download
        about = timm.get_pretrained_cfg(arch)
        place = f"https://huggingface.co/{about.hf_hub_id}" if about and about.hf_hub_id else "it"
        raise InputError(
            f"--pretrained: the weights of {arch} could not be fetched "
            f"({one_line(error):.150}); fetch {place} on another machine and give "
            f"--pretrained FILE, or leave --pretrained out"
        ) from error


def read_weights(path: str, arch: str) -> dict[str, torch.Tensor]:
    """The tensors of a file under timm's names, without the classifier's.

    The file has a state dict, by torch or safetensors: timm's of this network, or another library's
    whose tensors come in the same order, with the same shapes and the same kinds (weight, bias,
    running_mean ...). Raises InputError for any other, and FileNotFoundError.
    """
    state = read_file(Path(path))
    with torch.device("meta"):  # shapes alone
        whole = timm.create_model(arch)
    heads = whole.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)

    def without_heads(tensors):
        begins = tuple(f"{head}." for head in heads)
        return {k: v for k, v in tensors.items() if not str(k).startswith(begins or "\0")}

    wanted = without_heads(whole.state_dict())
    if isinstance(state, dict):
        by_name = without_heads(state)
        by_order = without_heads(in_order_of(state, list(whole.state_dict()), list(wanted)))
    else:
        by_name = by_order = state
    if not (reason := misfit(by_name, wanted)):
        return by_name
    if by_order and not misfit(by_order, wanted):
        return by_order
    raise InputError(
        f"--pretrained {path}: found no weights of {arch} ({reason}), expected timm's by name, or "
        f"as many in the same order; {ADVICE}"
    )


def check_came(encoder: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Raise InputError unless all numbers of an encoder are among these weights: timm loads what
    fits and leaves the rest as it was.
    """
    sums = {value.double().sum().item() for value in weights.values()}
    for name, value in encoder.state_dict().items():
        if value.is_floating_point() and value.double().sum().item() not in sums:
            raise InputError(f"--pretrained {source}: timm takes no {name} from it; {ADVICE}")


def in_order_of(state: dict, *orders: list[str]) -> dict:
    """A state dict under the first of these lists of names that has the same kinds, else empty."""
    for names in orders:
        kinds = [[str(name).rpartition(".")[2] for name in those] for those in (state, names)]
        if kinds[0] == kinds[1]:
            return dict(zip(names, state.values(), strict=True))
    return {}


def read_file(path: Path) -> Any:
    """What a file of torch or safetensors holds; nothing in it is executed."""
    if not path.is_file():
        raise FileNotFoundError(f"--pretrained {path}: not found, expected a file with weights")
    advice = f"expected weights saved by torch or safetensors; {ADVICE}"
    try:
        content = load_file(path) if path.suffix == ".safetensors" else load_tensors(path, advice)
    except SafetensorError as error:
        raise InputError(
            f"--pretrained {path}: found a damaged file ({error}), {advice}"
        ) from error
    except InputError as error:
        raise InputError(f"--pretrained {error}") from error
    # Trainings with timm write more than the weights.
    inner = content.get("state_dict") if isinstance(content, dict) else None
    return inner if isinstance(inner, dict) else content
