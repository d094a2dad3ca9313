"""The weights that ship do their work without a training, and the model card is of this file."""

import hashlib

import inference
from tests.scripts import infer, table_of
from tissue.synthetic import write_demo

CARD = inference.SHIPPED.parents[2] / "docs" / "model_card.md"


def test_without_a_checkpoint_the_shipped_weights_segment_drawn_tissue(tmp_path):
    write_demo(tmp_path, 3, 256, seed=99)
    images, labels = tmp_path / "tissue_images", tmp_path / "instance_labels"
    infer(tmp_path / "results", "--images", images, "--masks", labels)
    rows = table_of(tmp_path / "results" / "counts.csv")
    assert len(rows) == 3
    assert all(float(row["dice"]) > 0.8 for row in rows)
    assert all(abs(int(row["nuclei"]) / int(row["gt_nuclei"]) - 1) < 0.3 for row in rows)


def test_the_model_card_is_of_the_file_that_ships():
    weights = inference.SHIPPED.read_bytes()
    assert len(weights) < 40e6
    assert hashlib.sha256(weights).hexdigest() in CARD.read_text()
