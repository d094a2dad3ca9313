"""The benchmarks run, and each replaces its own results alone."""

import numpy as np
import pytest
import tifffile

from benchmarks import annotations_speed, data, elsewhere, preprocess_speed, results, results_speed
from tissue import windows
from tissue.pairs import find_pairs
from tissue.synthetic import write_demo


def test_a_section_is_replaced_and_the_others_stay(tmp_path, monkeypatch):
    called = [
        "python3",
        "-m",
        "some.script",
        "--root",
        "/home/her/tnbc",
        "--also=a=/x/b:/x/c",
        "a b",
    ]
    monkeypatch.setattr("sys.orig_argv", called)
    path = tmp_path / "RESULTS.md"
    for title, text in (("One", "first"), ("Two", "second"), ("One", "third")):
        results.write_section(title, text, path)
    content = path.read_text()
    assert content.startswith("# Results")
    command = "`python3 -m some.script --root tnbc --also=a=b:c 'a b'`"
    first, second = (
        f"## {name}\n\n{command}\n\n{text}" for name, text in (("One", "third"), ("Two", "second"))
    )
    assert content.index(first) < content.index(second)
    assert "first" not in content and content.count("## ") == 2


def test_cutting_is_measured(tmp_path):
    path = tmp_path / "RESULTS.md"
    small = ["--images", "3", "--size", "148", "--rounds", "1", "--results", str(path)]
    preprocess_speed.main(preprocess_speed.parse_args(small))
    assert "12 patches of 128 x 128 pixels" in path.read_text()


def test_writing_results_is_measured(tmp_path):
    path = tmp_path / "RESULTS.md"
    small = ["--nuclei", "150", "--images", "3", "--results", str(path)]
    results_speed.main(results_speed.parse_args(small))
    assert "150 nuclei" in path.read_text() and "report.html of 3 images" in path.read_text()


def test_reading_annotations_is_measured(tmp_path):
    path = tmp_path / "RESULTS.md"
    small = ["--nuclei", "50", "--results", str(path)]
    annotations_speed.main(annotations_speed.parse_args(small))
    assert "opened, 50 nuclei counted" in path.read_text()


def test_what_many_images_cost_is_measured(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from benchmarks import scaling

    for owner, name in scaling.STEPS.values():
        monkeypatch.setattr(owner, name, getattr(owner, name))  # as it was, afterwards
    path = tmp_path / "RESULTS.md"
    small = ["--parts", "folder", "cut", "--folder", "2", "5", "--images", "2", "3"]
    small += ["--size", "148", "--rounds", "1", "--results", str(path)]
    scaling.main(scaling.parse_args(small))
    rows = [line.split(" | ") for line in path.read_text().splitlines()]
    assert [row[0] for row in rows if len(row) == 9][2:] == ["| 2", "| 5"]
    assert [row[0] for row in rows if len(row) == 5][2:] == ["| 2", "| 3"]


def test_a_big_image_is_counted_as_a_small_one(tmp_path, monkeypatch):
    pytest.importorskip("monai", reason="the benchmark measures beside MONAI")
    from benchmarks import inference_speed

    path = data.draw_giant(tmp_path / "a.tif", 300)
    small = inference_speed.measure("ours", path, 96, 2, -1)
    monkeypatch.setattr(windows, "BIG", 1)
    big = inference_speed.measure("ours", path, 96, 2, -1)
    assert small["contours"] == big["contours"] > 0


def test_peers_are_scored_as_by_hand(tmp_path):
    """Two nuclei of four pixels each that a mask joins by one pixel: one of two, Dice 16 / 17."""
    pytest.importorskip("torch")
    from benchmarks import peers

    labels = np.zeros((5, 5), np.uint8)
    labels[1:3, :2], labels[1:3, 3:] = 1, 2
    for name in ("tissue_images", "instance_labels"):
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "a.tif", np.repeat(labels[..., None], 3, 2)
                         if name == "tissue_images" else labels)  # fmt: skip
    joined = labels > 0
    joined[1, 2] = True
    found = peers.scores(tmp_path, find_pairs(tmp_path), lambda _: (joined, joined.astype(int)))
    assert found["dice"] == pytest.approx(16 / 17) and found["count_error"] == 0.5
    assert found["aji"] == pytest.approx(8 / 18)


def test_what_margins_and_pixel_sizes_cost_is_measured(tmp_path):
    write_demo(tmp_path, 1, 128, seed=3)
    folders = ["--images", tmp_path / "tissue_images", "--masks", tmp_path / "mask binary"]
    path = tmp_path / "RESULTS.md"
    elsewhere.main(elsewhere.parse_args([*map(str, folders), "--results", str(path)]))
    rows = [line.split(" | ") for line in path.read_text().splitlines() if "margins |" in line]
    assert [row[2:] for row in rows] == [["0.0000", "0 |"]] * 4  # white, black, two greys
