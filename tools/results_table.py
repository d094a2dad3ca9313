"""Print the table of docs/results.md, and put its pictures into docs/results/.

    python3 inference.py --root cryonuseg --tta --image_folder results/cryonuseg
    python3 -m tools.results_table results/cryonuseg
    python3 inference.py --root drawn --tta --image_folder results/drawn
    python3 -m tools.results_table results/drawn --tissue

Predicted masks and numbers alone, unless --tissue says that the images and their reference masks
may be shown, too: those of this project's own drawn tissue.
"""

from pathlib import Path

import cv2

from tissue.files import Parser, run_script
from tissue.images import read_image
from tissue.pictures import write_image
from tissue.tables import read_table

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "results"
SHOWN = 160  # pixels of a picture's side in README; twice as many in its file
COUNTS = ("contours", "gt_contours", "nuclei", "gt_nuclei")
SCORES = ("accuracy", "dice", "aji", "pq")
NAMES = {"gt_contours": "reference contours", "gt_nuclei": "reference nuclei", "dice": "Dice"}
NAMES |= {"aji": "AJI", "pq": "PQ"}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("results", help="an --image_folder of inference.py, all with references")
    parser.add_argument("--tissue", action="store_true", help="show images and reference masks too")
    return parser.parse_args(argv)


def main(args):
    layers = {"prediction": "predicted mask"}
    if args.tissue:
        layers = {"image": "input", "prediction": "predicted mask", "gt": "reference mask"}
    rows = read_table(Path(args.results) / "counts.csv")
    columns = ["image", *layers.values(), *(NAMES.get(key, key) for key in COUNTS + SCORES)]
    print(f"| {' | '.join(columns)} |")
    print(f"|---|{'---|' * (len(columns) - 1)}")
    PICTURES.mkdir(exist_ok=True)
    for row in rows:
        cells = [row["image"]]
        for layer in layers:
            name = f"{row['image']}_{layer}"
            picture = read_image(Path(args.results) / f"{name}.png")
            file = PICTURES / f"{name}.{'jpg' if layer == 'image' else 'png'}"
            small = cv2.resize(picture, (2 * SHOWN, 2 * SHOWN), interpolation=cv2.INTER_AREA)
            write_image(file, small if layer == "image" else small[..., 0] > 127)
            cells.append(f'<img src="results/{file.name}" width="{SHOWN}">')
        cells += [row[key] for key in COUNTS] + [f"{float(row[key]):.4f}" for key in SCORES]
        print(f"| {' | '.join(cells)} |")
    means = [sum(float(row[key]) for row in rows) / len(rows) for key in COUNTS + SCORES]
    cells = [f"{value:.1f}" for value in means[:4]] + [f"{value:.4f}" for value in means[4:]]
    print(f"| mean | {'| ' * len(layers)}{' | '.join(cells)} |")


if __name__ == "__main__":
    run_script(main, parse_args)
