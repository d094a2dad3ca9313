"""The tables and pictures of README and of the model cards, made from results written by hand."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from tissue.files import InputError
from tissue.images import read_image
from tissue.pictures import write_image
from tools import card_table, demo_picture, results_table

COLUMNS = ("image", "contours", "gt_contours", "nuclei", "gt_nuclei", "accuracy", "dice")
COLUMNS += ("aji", "pq")
ROWS = [
    ("human_liver_01", 80, 90, 90, 100, 0.9, 0.8, 0.5, 0.4),
    ("human_liver_02", 100, 90, 110, 100, 0.8, 0.6, 0.3, 0.2),
    ("mouse_skin_01", 40, 50, 50, 50, 1.0, 0.7, 0.4, 0.3),
]


@pytest.fixture
def results(tmp_path):
    with (tmp_path / "counts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows(ROWS)
    for name, *_ in ROWS:
        for layer in ("image", "prediction", "gt"):
            write_image(tmp_path / f"{name}_{layer}.png", np.full((8, 8, 3), 200, np.uint8))
    return tmp_path


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_card_has_a_row_for_each_folder_and_each_group_of_names(results, capsys):
    by = ["--by", r"^(?:human|mouse)_[a-z]+(?=_\d+$)"]
    card_table.main(card_table.parse_args([f"Own={results}", *by]))
    _, _, *rows = map(cells, capsys.readouterr().out.splitlines())
    scores = ["3", "0.7000", "0.6000", "0.4000", "0.3000"]  # images, Dice, worst, AJI, PQ
    assert rows[0] == ["Own", *scores, "6.7%", "+0.0", "-20 to 20"]  # off by 10, 10 and 0 %
    assert rows[1][:2] == ["human_liver", "2"] and rows[1][6:] == ["10.0%", "+0.0", "-28 to 28"]
    assert rows[2] == ["mouse_skin", "1", *["0.7000"] * 2, "0.4000", "0.3000", "0.0%", "+0.0", ""]


def test_the_card_is_of_images_with_references(results):
    table = (results / "counts.csv").read_text()
    (results / "counts.csv").write_text(table.replace("0.7,", ",", 1))
    with pytest.raises(InputError, match="without a reference"):
        card_table.main(card_table.parse_args([f"Own={results}"]))


@pytest.mark.parametrize(("flags", "layers"), [([], 1), (["--tissue"], 3)])
def test_readmes_table_shows_tissue_only_when_told_so(
    results, tmp_path, monkeypatch, capsys, flags, layers
):
    pictures = tmp_path / "pictures"
    monkeypatch.setattr(results_table, "PICTURES", pictures)
    results_table.main(results_table.parse_args([str(results), *flags]))
    header, _, *rows, means = map(cells, capsys.readouterr().out.splitlines())
    assert len(header) == len(means) == 1 + layers + 8
    assert [row[0] for row in rows] == [name for name, *_ in ROWS]
    assert means[1 + layers :] == [
        "73.3", "76.7", "83.3", "83.3", "0.9000", "0.7000", "0.4000", "0.3000",
    ]  # fmt: skip
    shown = {path.name.rpartition("_")[2] for path in pictures.iterdir()}
    assert shown == ({"prediction.png", "image.jpg", "gt.png"} if flags else {"prediction.png"})
    mask = read_image(pictures / "human_liver_01_prediction.png")
    assert mask.shape[:2] == (320, 320) and (mask == 255).all()


def test_the_demos_picture_has_a_row_an_image_and_a_column_a_layer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("docs", "results/demo", "data/demo/tissue_images"):
        (tmp_path / folder).mkdir(parents=True)
    side = demo_picture.SIDE
    for number, name in enumerate(demo_picture.IMAGES):
        tile = np.full((side + 5, side + 9, 3), 50 * number, np.uint8)
        write_image(tmp_path / "data/demo/tissue_images" / f"{name}.tif", tile)
        write_image(tmp_path / "results/demo" / f"{name}_overlay.png", tile + 10)
        write_image(tmp_path / "results/demo" / f"{name}_gt.png", tile + 20)
    demo_picture.main()
    picture = read_image(tmp_path / "docs" / "demo.png")
    middles = [4 + side // 2 + k * (side + 4) for k in range(3)]
    assert picture[np.ix_(middles, middles)][..., 0].tolist() == [
        [0, 10, 20], [50, 60, 70], [100, 110, 120],
    ]  # fmt: skip


def test_the_description_for_bioimage_io_is_that_of_the_shipped_network():
    for package in ("torch", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    import torch

    from inference import SHIPPED
    from learning.predictor import Predictor
    from tools.bioimageio_package import check_template

    network = Predictor.load(SHIPPED, torch.device("cpu"))
    check_template(network, 20)
    with pytest.raises(InputError, match="halo: 96"):
        check_template(replace(network, halo=96), 20)
