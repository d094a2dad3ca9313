"""From an image to what the network of a checkpoint makes of it, with all that this needs."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import utils
from learning.checkpoints import build_model, completed, load_checkpoint
from learning.devices import Threads, choose_precision
from learning.fusing import fuse
from model import sees_all
from tissue import nuclei
from tissue.files import InputError, file_hash
from tissue.memory import freed_memory_kept
from tissue.segmentation import Finder
from tissue.stain import Stain
from tissue.tiling import SIZES


@dataclass(frozen=True, kw_only=True)
class Predictor(Finder):
    """The network of a checkpoint, and what its outputs mean.

    `predict` takes RGB uint8 (N, H, W, 3) and returns float32 (N, C, H, W), 0 to 1: the probability
    of a nucleus and, of a network with instances, the depth in it. It does all that the checkpoint
    asks for: normalisation and order of the colour channels. With `tta` it averages the eight ways
    to lay a tile and two sizes (test-time augmentation). It works on a copy of `model` that is
    fused for inference. A batch too large for the GPU's memory is halved, for good, and a line says
    so. `dataclasses.replace` gives one that is used in another way.
    """

    model: nn.Module  # as it was loaded
    checkpoint: dict
    path: Path | None = None  # of the checkpoint
    tta: bool = False
    pixel_size_um: float | None  # micrometres, of the images that it learned from

    @classmethod
    def load(cls, path: Path, device: torch.device, tta: bool = False) -> "Predictor":
        """The network of a checkpoint's file; errors as `checkpoints.load_checkpoint`."""
        checkpoint = load_checkpoint(path)
        return cls.of(build_model(checkpoint), checkpoint, device, tta, path)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        checkpoint: dict,
        device: torch.device,
        tta: bool = False,
        path: Path | None = None,
    ) -> "Predictor":
        """A network in memory, with what a checkpoint says of it."""
        checkpoint = completed(checkpoint)
        stain = checkpoint["stain"]
        return cls(
            predict=halving(_predict(model, checkpoint, device, tta)),
            outputs=model.last_conv.out_channels,
            grid=model.grid,
            halo=model.halo,
            sizes=SIZES if tta else SIZES[:1],
            stain=Stain(**stain) if stain else None,
            model=model,
            checkpoint=checkpoint,
            path=path,
            tta=tta,
            threshold=checkpoint["threshold"],
            split=nuclei.Split(**checkpoint["split"]),
            pixel_size_um=checkpoint["pixel_size_um"],
        )

    @property
    def expected(self) -> dict[str, float]:
        """The mean relative count error of images that the network did not learn, as a row has it;
        empty where it is not known, or the network used in another way than then.
        """
        told = self.checkpoint.get("count_error")
        own = self.checkpoint["threshold"], nuclei.Split(**self.checkpoint["split"]), False
        is_own = own == (self.threshold, self.split, self.tta)
        return {"expected_count_error": told["mean"]} if told and is_own else {}

    @functools.cached_property
    def sha256(self) -> str:
        """Of the checkpoint's file."""
        return file_hash(self.path)

    @property
    def has_depth(self) -> bool:
        """Whether the network has instances, so that nuclei are found in a depth map."""
        return self.outputs > 1

    def __str__(self):
        config = self.model.config
        return (
            f"{self.path} | {config['arch']} {config['dimensions']} | threshold "
            f"{self.threshold:g} | split {self.split}"
        )

    def made_with(self) -> dict:
        """What the results of all images depend on, as record.MadeWith has it."""
        return {
            "checkpoint": self.sha256,
            "threshold": self.threshold,
            "tta": self.tta,
            "sizes": list(self.sizes),
            "overlap": self.halo,
            "split": self.split.values(),
            "version": utils.VERSION,
        }

    def settings(self) -> dict:
        """The settings as report.html shows them."""
        shown = {
            "checkpoint": f"{self.path} ({self.sha256[:8]})",
            "threshold": f"{self.threshold:g}",
            "split": str(self.split),
            "flips, turns and sizes averaged": self.tta,
            "stain normalised": self.stain is not None,
            "overlap of tiles": self.halo,
        }
        return shown | {f"{name} version": text for name, text in utils.versions().items()}

    def notes(self) -> list[str]:
        """That the colours are fed in another order, or that tiles change the masks, if so."""
        said = []
        if self.checkpoint["channel_order"] == "bgr":
            said.append(
                f"{self.path} is a bare state dict of the first version, which learned from "
                f"swapped colours: it is fed blue, green, red."
            )
        if sees_all(self.model):
            said.append(
                f"{self.model.config['arch']} sees all that it is shown: --tile_size changes the "
                f"masks a little, whatever --overlap."
            )
        return said


def _predict(
    model: nn.Module, checkpoint: dict, device: torch.device, flips_and_turns: bool
) -> Callable:
    """`Predictor.predict` for batches that fit the memory; without `kept` all is."""
    model = fuse(copy.deepcopy(model).eval(), device)
    model = model.to(device, memory_format=torch.channels_last)
    precision = choose_precision(device)
    threads = Threads(device)
    mean, std = (
        torch.tensor(checkpoint["normalisation"][key], device=device).view(3, 1, 1) * 255
        for key in ("mean", "std")
    )
    swapped = checkpoint["channel_order"] == "bgr"
    ways = [(turns, flip) for turns in range(4) for flip in (False, True)]
    ways = ways if flips_and_turns else ways[:1]

    @torch.inference_mode()
    def predict(tiles: np.ndarray, kept: tuple[slice, slice] | None = None) -> np.ndarray:
        threads.adapt()
        batch = torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2)  # (N, 3, H, W), NHWC inside
        batch = (batch.flip(1) if swapped else batch).float().sub(mean).div(std)
        total, finite = None, torch.ones((), device=device, dtype=bool)
        for turns, flip in ways:
            laid = batch.rot90(turns, (2, 3)) if turns else batch
            laid = laid.flip(3) if flip else laid
            laid = laid.contiguous(memory_format=torch.channels_last)
            mixed = torch.autocast(device.type, precision, enabled=precision != torch.float32)
            with mixed, freed_memory_kept():
                logits = model(laid, None if flips_and_turns else kept)
            finite &= logits.isfinite().all()
            outputs = logits.float().sigmoid()
            outputs = outputs.flip(3) if flip else outputs
            outputs = outputs.rot90(-turns, (2, 3)) if turns else outputs
            total = outputs if total is None else total.add_(outputs)
        if kept and flips_and_turns:
            total = total[:, :, *kept]
        outputs = total.div_(len(ways)).cpu().numpy()
        if not finite:
            raise InputError(
                "found predictions that are not finite, expected numbers: the checkpoint's weights "
                "are too large to multiply; choose another"
            )
        return outputs

    return predict


def halving(predict: Callable) -> Callable:
    """`predict` for batches of any size: one that does not fit the memory is halved and tried anew.

    The size that fitted is kept for all later batches. Raises InputError if one tile is too much.
    """
    most = None

    def in_parts(tiles: np.ndarray, kept: tuple[slice, slice] | None = None) -> np.ndarray:
        nonlocal most
        while True:
            size = min(most or len(tiles), len(tiles))
            parts = np.split(tiles, range(size, len(tiles), size))
            try:
                return np.concatenate([predict(part, kept) for part in parts])
            except RuntimeError as error:  # the GPU's has a class of its own, the CPU's has not
                on_gpu = isinstance(error, torch.OutOfMemoryError)
                if not on_gpu and "DefaultCPUAllocator" not in str(error):
                    raise
                memory = "the GPU's memory" if on_gpu else "the memory"
                if size == 1:
                    raise InputError(
                        f"one tile of {tiles.shape[1]} x {tiles.shape[2]} pixels does not fit "
                        f"{memory}, expected it to; try a smaller --tile_size"
                    ) from error
            most = size // 2
            torch.cuda.empty_cache()
            print(f"A batch of {size} tiles does not fit {memory}: going on with {most}.")

    return in_parts
