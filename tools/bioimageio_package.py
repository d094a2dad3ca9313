"""Make a folder for bioimage.io of the weights that ship, which its validator takes.

    python3 -m tools.bioimageio_package nuclei_bioimageio
    bioimageio test nuclei_bioimageio/rdf.yaml

The second command wants an environment of its own: pip install bioimageio.core onnxruntime
"pydantic<2.12" (0.11.0 of it fails with pydantic 2.14, whatever it is given).

The network as ONNX, a synthetic image and what PyTorch makes of it, a cover, the model card,
and tools/rdf.yaml, which describes them. Raises InputError where that says otherwise than the
network.
"""

import shutil
from pathlib import Path

import numpy as np
import onnx
import torch

import inference
from learning.export import WithColours, export_checked
from learning.predictor import Predictor
from tissue.files import InputError, Parser, run_script
from tissue.pictures import contact_sheet, write_image
from tissue.synthetic import draw_tissue

TEMPLATE = Path(__file__).with_name("rdf.yaml")
CARD = Path(__file__).parent.parent / "docs" / "model_card.md"
SIDES = 320, 288  # pixels, of the test image; unlike, so that swapped sides would show


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="to write to; made if need be")
    return parser.parse_args(argv)


def main(args):
    args.folder.mkdir(parents=True, exist_ok=True)
    network = Predictor.load(inference.SHIPPED, torch.device("cpu"))
    file = args.folder / "nuclei.onnx"
    print(export_checked(file, network, ()))
    check_template(network, onnx.load(file).opset_import[0].version)
    image = draw_tissue(*SIDES, seed=1).image
    given = np.ascontiguousarray(image.transpose(2, 0, 1)[None])  # (1, 3, H, W) uint8
    with torch.inference_mode():
        whole = WithColours(network.model, network.checkpoint).eval()
        found = whole(torch.from_numpy(given).float()).numpy()  # which the ONNX file must reproduce
    np.save(args.folder / "test_input.npy", given)
    np.save(args.folder / "test_output.npy", found)
    shown = np.repeat((found[0, 0] * 255).astype(np.uint8)[..., None], 3, 2)
    write_image(args.folder / "cover.png", contact_sheet([image, shown], columns=2))
    shutil.copy(CARD, args.folder / "README.md")
    shutil.copy(TEMPLATE, args.folder / "rdf.yaml")
    print(f"{args.folder}: for `bioimageio test {args.folder / 'rdf.yaml'}`")


def check_template(network: Predictor, opset: int) -> None:
    """Raise InputError where rdf.yaml does not say what the network is."""
    text = TEMPLATE.read_text(encoding="utf-8")
    for what in (
        f"opset_version: {opset}",
        f"step: {network.grid}}}",
        f"halo: {network.halo},",
        f"scale: {network.pixel_size_um:g},",
        f"a mask from {network.threshold:g}",
    ):
        if what not in text:
            raise InputError(f"{TEMPLATE}: found no {what!r}, expected it of {inference.SHIPPED}")


if __name__ == "__main__":
    run_script(main, parse_args)
