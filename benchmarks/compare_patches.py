"""Compare every patch of a set with its crop of the image and of the mask, bit by bit.

Images of another pixel size than the set's are resampled first, as preprocess.py does it.

python3 -m benchmarks.compare_patches --root data/demo
"""

from pathlib import Path

import numpy as np

from tissue import images, masks, patches
from tissue.files import InputError, Parser, run_script
from tissue.pixel_size import scale_of


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--root", default="./data/", help="folder with the patch set")
    return parser.parse_args(argv)


def main(args):
    root = Path(args.root)
    manifest = patches.read_manifest(root)
    dim, compared = manifest["patch_dim"], 0
    for source in manifest["images"]:
        image = images.read_image(root / source["image"])
        mask = masks.read_mask(root / source["mask"])
        scale = scale_of(source["pixel_size_um"], manifest["pixel_size_um"], source["name"])
        image, mask = patches.resample(image, mask, scale)
        for row in patches.read_table(root, source["split"]):
            if row["name"] != source["name"]:
                continue
            y, x = row["y"], row["x"]
            crop = slice(y, y + dim), slice(x, x + dim)
            patch, patch_mask = patches.read_patch(root, source["split"], row["file"])
            same = np.array_equal(patch_mask > 0, mask[crop])
            if not (same and np.array_equal(patch, image[crop])):
                raise InputError(f"{row['file']}: found other pixels than its crop has")
            compared += 1
    print(f"{compared} patches and their masks equal their crops bit by bit")


if __name__ == "__main__":
    run_script(main, parse_args)
