"""Make README's picture, docs/demo.png, from the results of `make demo`.

python3 -m tools.demo_picture
"""

from pathlib import Path

from tissue.images import read_image
from tissue.pictures import contact_sheet, write_image

IMAGES = ("Demo_Liver_03", "Demo_Colon_03", "Demo_Breast_03")
SIDE = 300  # pixels of each picture, from the image's top left


def main():
    results, root = Path("results/demo"), Path("data/demo")
    tiles = [
        read_image(path)[:SIDE, :SIDE]
        for name in IMAGES
        for path in (
            root / "tissue_images" / f"{name}.tif",
            results / f"{name}_overlay.png",
            results / f"{name}_gt.png",
        )
    ]
    write_image("docs/demo.png", contact_sheet(tiles, columns=3))


if __name__ == "__main__":
    main()
