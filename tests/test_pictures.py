"""Outlines over images, by hand on small masks."""

import numpy as np

from tissue import agreement, pictures

# As docs/counting.md has them: of Okabe and Ito, RGB.
COLOURS = {
    "matched": (255, 255, 255),
    "missed": (86, 180, 233),
    "merged": (0, 158, 115),
    "split": (240, 228, 66),
    "spurious": (213, 94, 0),
}


def test_an_overlay_draws_the_objects_own_outer_pixels():
    mask = np.zeros((6, 6), bool)
    mask[1:5, 1:5] = True
    drawn = (pictures.overlay(np.zeros((6, 6, 3), np.uint8), mask) == pictures.OUTLINE).all(axis=2)
    expected = mask.copy()
    expected[2:4, 2:4] = False
    np.testing.assert_array_equal(drawn, expected)


def test_an_overlay_of_labels_parts_nuclei_that_touch():
    labels = np.zeros((5, 10), np.int32)
    labels[:, :5], labels[:, 5:] = 1, 2
    drawn = (pictures.overlay(np.zeros((5, 10, 3), np.uint8), labels) == pictures.OUTLINE).all(
        axis=2
    )
    inside = np.zeros((5, 10), bool)
    inside[1:4, 1:4] = inside[1:4, 6:9] = True
    np.testing.assert_array_equal(drawn, ~inside)


def test_an_error_overlay_colours_each_nucleus_by_its_class():
    labels, reference = np.zeros((2, 8, 40), np.int32)
    boxes = {"matched": slice(0, 8), "merged": slice(8, 16), "split": slice(16, 24)}
    boxes |= {"spurious": slice(24, 32), "missed": slice(32, 40)}
    for label, name in enumerate(("matched", "merged", "split", "spurious"), 1):
        labels[:, boxes[name]] = label
    reference[:, boxes["matched"]], reference[:, boxes["missed"]] = 1, 2
    classes = [  # as `agreement.errors` gives them
        np.array([0, agreement.MATCHED, agreement.MERGED, agreement.SPLIT, agreement.SPURIOUS]),
        np.array([0, agreement.MATCHED, agreement.MISSED]),
    ]
    drawn = pictures.error_overlay(np.full((8, 40, 3), 7, np.uint8), labels, reference, *classes)
    for name, box in boxes.items():
        width = 1 if name == "matched" else 2
        inner = drawn[width : 8 - width, box][:, width : 8 - width]
        assert (inner == 7).all(), name
        frame = drawn[:, box].copy()
        frame[width : 8 - width, width : 8 - width] = COLOURS[name]
        assert (frame == COLOURS[name]).all(), name


def test_pictures_of_a_report_that_are_not_there_or_not_whole_are_unreadable(tmp_path):
    path = tmp_path / "squares.png"
    for write in (lambda: None, path.touch, lambda: path.write_bytes(b"no picture")):
        write()  # as while another call makes it anew
        assert pictures.embedded(path, 8) == pictures.UNREADABLE
        assert pictures.embedded_squares(path, 8, [0, 1]) == [pictures.UNREADABLE] * 2
    pictures.write_image(path, np.zeros((16, 8, 3), np.uint8))
    found = pictures.embedded_squares(path, 8, [0, 1])
    assert [(square.width, square.height, square.said) for square in found] == [(8, 8, "")] * 2
    assert pictures.embedded_squares(path, 8, [2]) == [pictures.UNREADABLE]  # it is shorter
