"""The scale at which an image's nuclei are as large as those learned."""

import cv2
import numpy as np
import pytest

from learning.checkpoints import load_checkpoint, save_checkpoint
from tests.scripts import infer, table_of
from tissue import fitting, results
from tissue.report import write_image
from tissue.synthetic import draw_tissue
from tissue.windows import from_array


def discs(radius, count=36, side=600):
    """A label map of discs of one radius in rows, none at the edge."""
    labels = np.zeros((side, side), np.int32)
    columns = int(np.sqrt(count))
    for number in range(count):
        row, column = divmod(number, columns)
        at = (50 + column * 90, 50 + row * 90)
        cv2.circle(labels, at, radius, number + 1, -1)
    return labels


def scale_of_discs(labels, usual):
    image = from_array(np.zeros((*labels.shape, 3), np.uint8))
    return fitting.nuclear_scale(image, lambda _: labels, usual)


@pytest.mark.parametrize(("times", "expected"), [(2, 2), (0.5, 0.5), (1.2, 1), (0.8, 1), (9, 3)])
def test_nuclei_so_many_times_as_long_give_that_scale(times, expected):
    labels = discs(20)
    area = np.count_nonzero(labels) / 36
    scale, count = scale_of_discs(labels, area / times**2)
    assert scale == pytest.approx(expected, rel=1e-3) and count == 36


def test_few_nuclei_tell_nothing_and_those_at_the_edge_do_not_count():
    assert scale_of_discs(discs(20, count=16), 10) == (1.0, 16)
    labels = discs(20)
    labels[:, :71] = 99  # the first column of discs is gone, and one at the edge instead
    assert scale_of_discs(labels, 10)[1] == 30


def test_a_large_image_is_looked_at_in_four_places_within_it():
    assert fitting.places(700, 1536) == [(0, 0, 700, 1536)]
    found = fitting.places(10_000, 3000)
    assert len(found) == 4
    assert all(0 <= y <= 10_000 - h and 0 <= x <= 3000 - w for y, x, h, w in found)
    assert {(h, w) for _, _, h, w in found} == {(768, 768)}


def test_an_image_of_unknown_pixel_size_is_predicted_at_the_scale_of_its_nuclei(tmp_path, capsys):
    shipped = load_checkpoint("log/ckpt/nuclei_unet.pt")
    save_checkpoint(tmp_path / "net.pt", shipped | {"nucleus_um2": 24.0})
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    tissue = draw_tissue(320, 320, seed=5)
    for name, times in (("usual", 1), ("large", 2.5)):
        side = round(320 * times)
        image = cv2.resize(tissue.image, (side, side), interpolation=cv2.INTER_CUBIC)
        mask = cv2.resize((tissue.labels > 0).astype(np.uint8), (side, side), interpolation=0)
        write_image(tmp_path / "images" / f"{name}.png", image)
        write_image(tmp_path / "masks" / f"{name}.png", mask > 0)
    files = "--ckpt", tmp_path / "net.pt", "--images", tmp_path / "images", "--masks"
    infer(tmp_path / "out", *files, tmp_path / "masks")
    said = capsys.readouterr().out
    assert "large: " in said and "predicted again as of 0.1" in said and "\nusual: " not in said
    by_name = {row["image"]: row for row in table_of(tmp_path / "out" / "counts.csv")}
    assert float(by_name["large"]["dice"]) > 0.75
    assert by_name["large"]["tissue_mm2"] == ""  # a guess is no measure
    record = results.read(tmp_path / "out", "large")
    assert 0.08 < record["row"]["taken_as_um"] < 0.13
    infer(tmp_path / "out", *files, tmp_path / "masks", "--export")  # from the mask that is there
    assert results.read(tmp_path / "out", "large")["row"] == record["row"]
    infer(tmp_path / "out", *files, tmp_path / "masks", "--pixel_size", 0.25)
    assert "predicted again" not in capsys.readouterr().out
