"""With what a run begins: on which machine, which network, with which weights and patches."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from learning import runs
from learning.checkpoints import load_checkpoint
from learning.devices import choose_precision
from learning.learned import said_of_validation
from learning.optimisation import depthwise_in_float32
from learning.pretrained import start_pretrained
from learning.processes import (
    Machine,
    everyone,
    seed_everything,
    share_batch_norm,
    start_processes,
)
from model import UNET, build, usual_dimensions
from tissue.files import InputError

# What the flags of learning are where they are left out, and with --init (docs/lab_notes.md).
USUAL = {"lr": 1e-3, "augment": "basic", "epoch": 50, "keep": 0.5}
FINE_TUNING = {"lr": 1e-4, "augment": "moderate"}
VIEWS = 500  # patches that are shown in a fine-tuning, as far as whole epochs allow


def find_machine(args) -> Machine:
    """This process's device and place among the others, and one number format for all of them: what
    --precision says or, for auto, what is fast or what a run that goes on has had on such a device.
    """
    device, rank, processes = start_processes(args.gpu_id)
    if args.asked_precision != "auto":
        precision = getattr(torch, args.asked_precision)
    else:
        precision = choose_precision(device)
        began = runs.read_settings(args.resume) if args.resume else {"device": None}
        if began["device"] == str(device) and began["asked_precision"] == "auto":
            precision = getattr(torch, began["precision"])
    return Machine(device, everyone(precision)[0], rank, processes)


def choose_network(args) -> dict | None:
    """Settle `args.arch`, `dimensions` and `stain`, and return the checkpoint of --init, if any.

    What the flags leave open is the checkpoint's, or else the usual. Raises InputError for flags
    that contradict it.
    """
    if args.init and args.pretrained:
        raise InputError(
            "--pretrained: found it with --init, whose weights take the place of all others, "
            "expected one of the two; leave one out"
        )
    origin = load_origin(args.init) if args.init else None
    config = origin["config"] if origin else {}
    args.arch = args.arch or config.get("arch", UNET)
    args.dimensions = args.dimensions or config.get("dimensions", usual_dimensions(args.arch))
    usual = origin["stain"] is not None if origin else args.arch == UNET
    args.stain = args.stain or ("reinhard" if usual else "none")
    asked = {"arch": args.arch, "dimensions": args.dimensions}
    if origin and any(config[key] != value for key, value in asked.items()):
        raise InputError(
            f"--init {args.init}: found {config}, expected {asked} as asked for; leave --arch and "
            f"--dimensions out, or choose another file"
        )
    return origin


def settle_learning(args, patches: int) -> None:
    """Give the flags of learning that are left out their values: the usual ones, or those of a
    short fine-tuning with --init. `patches` are those of an epoch.
    """
    usual = USUAL
    if args.init:
        usual = USUAL | FINE_TUNING | {"epoch": min(max(1, round(VIEWS / patches)), USUAL["epoch"])}
    for flag, value in usual.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)


def load_origin(path: Path | str) -> dict:
    """The checkpoint that --init names; InputError for one that no training can start from."""
    checkpoint = load_checkpoint(path)
    if checkpoint["channel_order"] != "rgb":
        raise InputError(
            f"--init {path}: found weights of the first version, for blue, green, red (bgr), "
            f"expected weights for red, green, blue; choose a checkpoint by this train.py"
        )
    return checkpoint


def take_weights(model: nn.Module, origin: dict) -> None:
    """Give a network the weights of --init; an output that those lack keeps its random ones, and
    one that the network lacks is left out.
    """
    state, own = dict(origin["model"]), model.state_dict()
    for key in ("last_conv.weight", "last_conv.bias"):
        same = min(len(own[key]), len(state[key]))
        state[key] = torch.cat([state[key][:same], own[key][same:]])
    model.load_state_dict(state)


def check_patches(args, config: dict, dim: int) -> None:
    """Raise InputError unless the network can learn from patches of `dim` x `dim` pixels."""
    with torch.device("meta"):  # shapes alone
        network = build(config)
        try:
            network(torch.empty(args.batch_size, 3, dim, dim))
        except ValueError as error:  # of batch norm, whose variance of one value is none
            raise InputError(
                f"--batch_size: found {args.batch_size}, expected 2 or more for --arch "
                f"{args.arch} and patches of {dim} x {dim} pixels"
            ) from error


def make_network(args, config: dict, origin: dict | None, machine: Machine) -> nn.Module:
    """The network of a `config` on its device, with the weights that it starts from: random ones,
    an encoder's of --pretrained, or those of `origin`, the checkpoint of --init.
    """
    seed_everything(args.seed)
    model = build(config)
    if not args.resume and args.pretrained:
        start_pretrained(model, args.pretrained)
    if origin:
        take_weights(model, origin)
    model = model.to(machine.device, memory_format=torch.channels_last)
    if machine.device.type == "cpu":
        depthwise_in_float32(model)
    if machine.processes > 1:
        share_batch_norm(model)
    return model


def said_of_origin(
    args, origin: dict | None, checkpoint: dict, manifests: Sequence[dict]
) -> list[str]:
    """A line for each way in which what is learned differs from what --init has learned, and if
    images that validate in these patch sets were learned by it.
    """
    lines = said_of_validation(origin, manifests, args.init) if origin else []
    if origin and origin["stain"] != checkpoint["stain"]:
        others = "none" if args.stain == "reinhard" else "reinhard"
        lines.append(f"{args.init} learned with --stain {others}, this run does not")
    if origin and origin["config"] != checkpoint["config"]:
        differs = "no label maps", "without its output for depth, which masks do not teach"
        if "instances" in checkpoint["config"]:
            differs = "label maps", "with one more output, for depth"
        lines.append(
            f"these patches have {differs[0]}: the network starts from {args.init} {differs[1]}; "
            f"--keep has no effect, and before and after are not compared"
        )
    old, new = ((one or {}).get("pixel_size_um") for one in (origin, checkpoint))
    if old and not new:
        lines.append(
            f"{args.init} learned at {old:g} um a pixel, that of these patches is not known: they "
            f"are taken as they are; preprocess.py --pixel_size SIZE --patch_pixel_size {old:g}"
        )
    elif old and old != new:
        lines.append(f"{args.init} learned at {old:g} um a pixel, these patches have {new:g}")
    return lines
