"""A network as a file for other programs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from learning.predictor import Predictor
from tissue import pairs
from tissue.files import InputError, replacing
from tissue.synthetic import draw_tissue
from tissue.windows import open_image


class WithColours(nn.Module):
    """A network with its normalisation: RGB 0 to 255 float32 (N, 3, H, W) -> probability, and with
    instances depth, (N, 1 or 2, H, W), for other programs.
    """

    def __init__(self, model: nn.Module, checkpoint: dict):
        super().__init__()
        self.model = model
        self.swapped = checkpoint["channel_order"] == "bgr"
        for key in ("mean", "std"):
            values = torch.tensor(checkpoint["normalisation"][key], dtype=torch.float32)
            self.register_buffer(key, values.view(3, 1, 1) * 255)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.flip(1) if self.swapped else images
        return self.model((images - self.mean) / self.std).sigmoid()


def export_checked(path: str | Path, network: Predictor, images: Sequence[str]) -> str:
    """`export_model`, checked on the first of these image files and folders that is large enough,
    or on synthetic tissue.
    """
    pixels = draw_tissue(512, 512, seed=0).image
    for image in map(open_image, pairs.find_images(*images).values() if images else ()):
        if min(image.height, image.width) >= 3 * network.grid:
            pixels = image.read(0, 0, min(512, image.height), min(512, image.width))
            break
    return export_model(Path(path), network.model, network.checkpoint, pixels)


def export_model(path: Path, model: nn.Module, checkpoint: dict, image: np.ndarray) -> str:
    """Write a network for other programs, .pt2 (torch.export) or .onnx, and say what it takes.

    Batch, height and width are free, the latter multiples of the network's grid. Before the file is
    put in place it is read back and compared with the network on `image`, RGB uint8 (H, W, 3) of
    three cells of the grid or more a side. Raises InputError for another ending, a missing package,
    or a difference.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise InputError(f"--export_model: found {path.name}, expected a name in .pt2 or .onnx")
    grid = model.grid
    height, width = (side // grid * grid for side in image.shape[:2])
    height = min(height, width - grid) or height  # not square, so that swapped sides would show
    pixels = torch.from_numpy(image[:height, :width].copy()).permute(2, 0, 1)[None].float()
    whole = WithColours(model, checkpoint).eval()
    sides = {
        2: grid * torch.export.Dim("rows", min=2),
        3: grid * torch.export.Dim("columns", min=2),
    }
    free = {"images": {0: torch.export.Dim("batch")} | sides}
    batch = torch.cat([pixels, pixels.flip(2)])
    with torch.inference_mode():
        expected = whole(pixels)
    outputs = ("probability", "probability and depth")[expected.shape[1] - 1]
    with replacing(path) as beside, torch.no_grad():
        program = torch.export.export(whole, (batch,), dynamic_shapes=free)
        if path.suffix == ".pt2":
            torch.export.save(program, beside)
            found = torch.export.load(beside).module()(pixels)
        else:
            try:
                import onnxruntime
                import onnxscript  # noqa: F401
            except ImportError as error:
                raise InputError(
                    f"--export_model: found no package {error.name}, expected it for .onnx; "
                    f"pip install onnx onnxscript onnxruntime"
                ) from error
            torch.onnx.export(
                program, dynamo=True, input_names=["images"],
                output_names=[outputs.replace(" ", "_")],
                external_data=False, verbose=False,
            ).save(beside)  # fmt: skip
            session = onnxruntime.InferenceSession(beside, providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {"images": pixels.numpy()})[0])
        largest = (found - expected).abs().max().item()
        if not largest < 1e-3:
            raise InputError(
                f"{path}: found probabilities that differ from the network's by {largest:.1e}, "
                f"expected less than 1e-3; nothing was written, please report this"
            )
    stain = checkpoint["stain"]
    before = (
        f"; normalise the stain of each image before (tissue/stain.py): {stain}" if stain else ""
    )
    return (
        f"{path}: RGB 0 to 255, float32 (N, 3, H, W), H and W multiples of {grid} -> {outputs} "
        f"(N, {expected.shape[1]}, H, W); differs from the network by {largest:.1e} at most"
        + before
    )
