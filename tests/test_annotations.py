"""Annotated nuclei: found by name, read by windows, compared."""

import json

import cv2
import numpy as np
import pytest
import shapely

from tests.test_outline_files import (
    SHAPE,
    SQUARE,
    boxes,
    collection,
    drawn,
    feature,
    polygon,
    square,
    write,
)
from tissue.annotations import Changes, compare, find_annotations, open_annotation
from tissue.files import InputError
from tissue.pairs import Files
from tissue.pictures import write_image

# --- found


def test_each_image_has_one_file_whatever_its_format(tmp_path):
    files = {
        "a.geojson": "a",
        "b.geojson.gz": "b",
        "c_nuclei.geojson": "c",
        "C2_nuclei.GEOJSON.GZ": "C2",
        "d.zip": "d",
        "e.roi": "e",
        "f_rois.zip": "f",
        "g_coco.json": "g",
        "h.json": "h",
        "i.png": "i",
        "j_cp_masks.tif": "j",
        "k_labels.tif": "k",
        "l.ome.tif": "l",
        "m_1.2.geojson": "m_1.2",
        "_nuclei.csv": None,
        ".hidden.geojson": None,
        "notes.txt": None,
    }
    for name in files:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.zip").mkdir()
    found = find_annotations(tmp_path)
    names = {path.name: name for name, path in found.items()}
    assert names == {file: name for file, name in files.items() if name}
    assert found["A"] == tmp_path / "a.geojson"
    assert not find_annotations(tmp_path / "none")


def test_a_name_that_ends_as_our_exports_do_is_that_of_its_image(tmp_path):
    images = Files({name: tmp_path for name in ("a_nuclei", "b_nuclei", "c", "d_labels")})
    files = {
        "a_nuclei.geojson": "a_nuclei",
        "B_nuclei_nuclei.geojson.gz": "B_nuclei",
        "c_nuclei.geojson": "c",
        "d_labels.tif": "d_labels",
        "e_nuclei.geojson": "e",
    }
    for name in files:
        (tmp_path / name).write_bytes(b"")
    found = find_annotations(tmp_path, images)
    assert {path.name: name for name, path in found.items()} == files


def test_all_faults_of_a_folder_are_told_at_once(tmp_path):
    for name in ("a.geojson", "A_nuclei.geojson", "b_seg.npy", "c.jpg", "d.qpdata", "e.json"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError) as error:
        find_annotations(tmp_path)
    text = str(error.value)
    assert "A_nuclei.geojson and" in text and "several annotations of image A" in text
    assert "b_seg.npy: found a file that is not read, in Cellpose choose" in text
    assert "c.jpg" in text and "Export objects as GeoJSON" in text and "e.json" not in text


# --- read by windows


def crowd(generator, count=60):
    """GeoJSON of polygons with fractions that overlap, the first two wholly below the last; their
    shapely polygons in order."""
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    rings = []
    for _ in range(count):
        centre, radii = generator.uniform((0, 0), (80, 60)), generator.uniform(2, 9, (12, 1))
        ring = np.float32(centre + radii * np.stack([np.cos(angles), np.sin(angles)], 1))
        rings.append([*ring.tolist(), ring[0].tolist()])
    rings[:2] = rings[-1:] * 2
    return collection(*(feature(polygon(r)) for r in rings)), [shapely.Polygon(r) for r in rings]


def numbers_of(polygons, height, width):
    y, x = np.mgrid[:height, :width] + 0.5
    labels = np.zeros((height, width), int)
    for number, outline in enumerate(polygons, 1):
        labels[shapely.intersects_xy(outline, x, y)] = number
    return labels


def test_a_pixel_is_of_the_last_outline_around_its_centre_in_every_window(
    tmp_path, generator, monkeypatch
):
    monkeypatch.setattr("tissue.outlines.BATCH", 7)
    monkeypatch.setattr("tissue.shapes.BAND", 7)
    content, polygons = crowd(generator)
    annotation = open_annotation(write(tmp_path / "a.geojson", content), SHAPE)
    whole = numbers_of(polygons, *SHAPE)
    np.testing.assert_array_equal(annotation.numbers(0, 0, *SHAPE), whole)
    assert annotation.nuclei == 60 and annotation.levels == [SHAPE] and not annotation.is_big
    for _ in range(40):
        y, x = generator.integers(0, SHAPE)
        height, width = (generator.integers(1, side + 1) for side in (SHAPE[0] - y, SHAPE[1] - x))
        window = whole[y : y + height, x : x + width]
        np.testing.assert_array_equal(annotation.numbers(y, x, height, width), window)
        np.testing.assert_array_equal(annotation.read(y, x, height, width), window > 0)
        assert annotation.numbers(y, x, height, width).dtype == np.int32
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.5
    often = sum(shapely.intersects_xy(outline, x, y).astype(int) for outline in polygons)
    shared = int((often - 1).clip(0).sum())
    hidden = 60 - len(np.unique(whole[whole > 0]))
    assert hidden >= 2
    shown = [note.partition(": ")[2] for note in annotation.notes]
    assert f"pixels in several outlines, taken as the last one's of the file: {shared}" in shown
    told = [n for n in shown if n.startswith("nuclei without a pixel")]
    assert told == [f"nuclei without a pixel, too small or wholly under later ones: {hidden}"]
    assert annotation.is_label_map
    annotation.close()
    assert annotation.view(20).shape == (15, 20)


def test_resampled_outlines_are_those_of_the_resampled_image(tmp_path, generator):
    content, polygons = crowd(generator)
    annotation = open_annotation(write(tmp_path / "a.geojson", content), SHAPE).scaled(90, 160)
    larger = [shapely.transform(p, lambda points: points * (2, 1.5)) for p in polygons]
    assert (annotation.height, annotation.width, annotation.nuclei) == (90, 160, 60)
    np.testing.assert_array_equal(annotation.numbers(0, 0, 90, 160), numbers_of(larger, 90, 160))


def test_outlines_of_nothing_and_one_without_a_pixel(tmp_path):
    empty = open_annotation(write(tmp_path / "a.geojson", collection()), SHAPE)
    assert not empty.read(0, 0, *SHAPE).any() and empty.nuclei == 0 and empty.classes == {}
    assert "an image without nuclei" in empty.notes[0]
    small = collection(feature(polygon(square(5, 5, 0.25))), feature(polygon(SQUARE)))
    found = open_annotation(write(tmp_path / "b.geojson", small), SHAPE)
    assert "nuclei without a pixel" in found.notes[0] and found.nuclei == 2
    np.testing.assert_array_equal(found.numbers(0, 0, *SHAPE), 2 * boxes((10, 10, 10, 10)))


def test_what_is_outside_of_the_image_is_clipped_or_passed_over(tmp_path):
    content = collection(
        *(feature(polygon(square(x, 10))) for x in (-30, -5, 20, 40, 75, 90)),
    )
    expected = boxes((10, 0, 10, 5), (10, 20, 10, 10), (10, 40, 10, 10), (10, 75, 10, 5))
    np.testing.assert_array_equal(drawn(tmp_path / "a.geojson", content), expected)
    notes = open_annotation(tmp_path / "a.geojson", SHAPE).notes
    assert any(n.endswith("passed over (the first: feature 1): 2") for n in notes)
    assert any(n.endswith("clipped (the first: feature 2): 2") for n in notes)


def test_what_looks_odd_is_said_in_a_line(tmp_path):
    content = collection(
        feature(polygon(square(5, 5)), "Tu\nmor\0", id="one"),
        feature(polygon(square(25, 5)), " ", id="one"),
        feature(polygon(square(45, 5)), "x" * 500, id="PathCellObject"),
        feature(polygon(square(5, 25)), {"names": ["a", "b"]}, id="PathCellObject"),
    )
    found = open_annotation(write(tmp_path / "a.geojson", content), SHAPE)
    assert found.classes == {"Tu mor": 1, "unclassified": 1, "x" * 80: 1, "a: b": 1}
    (note,) = found.notes
    assert note == f"{tmp_path}/a.geojson: features that share an id, taken as a nucleus each: 1"


@pytest.mark.parametrize("batch", [1, 2000])
def test_a_nucleus_of_a_few_parts_is_one_and_a_line_says_so(tmp_path, monkeypatch, batch):
    """Crumbs beside it, as a brush leaves them, are no parts."""
    monkeypatch.setattr("tissue.outlines.BATCH", batch)
    parts = [square(8 * i + 1, 2, 5) for i in range(8)]
    crumbs = [square(3 * i + 1, 30, 2) for i in range(20)]
    lobes = {"type": "MultiPolygon", "coordinates": [[ring] for ring in parts]}
    brushed = {"type": "MultiPolygon", "coordinates": [[ring] for ring in [SQUARE, *crumbs]]}
    for content, said in (([lobes], 1), ([brushed], 0), ([lobes, *[polygon(SQUARE)] * 7], 1)):
        path = write(tmp_path / "a.geojson", collection(*map(feature, content)))
        found = open_annotation(path, SHAPE)
        assert found.nuclei == len(content)
        note = "outlines of several parts, taken as one nucleus each (the first: feature 1): 1"
        assert (f"{path}: {note}" in found.notes) == said
    small = collection(*(feature(polygon(square(x, 40, 9))) for x in (0, 20, 40)), feature(brushed))
    small["features"] += [feature(lobes | {"coordinates": [[ring] for ring in parts[:2]]})] * 2
    annotation = open_annotation(write(path, small), SHAPE)
    assert annotation.notes[0].endswith("one nucleus each (the first: feature 5): 2")
    merged = {"type": "MultiPolygon", "coordinates": [[square(6 * i, 2, 4)] for i in range(9)]}
    small["features"].append(feature(merged))
    with pytest.raises(InputError, match="feature 7: found one outline of 9 parts"):
        open_annotation(write(path, small), SHAPE)
    region = collection(feature(lobes, "Region"), *(feature(polygon(ring)) for ring in parts))
    assert open_annotation(write(path, region), SHAPE).nuclei == 8


@pytest.mark.parametrize("side", [160, 60])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_field_drawn_without_a_class_is_no_nucleus(tmp_path, side, count):
    """Of one or two outlines there is no median to compare the largest with."""
    shape, fields = (400, 400), [square(10, 10, side), square(200, 10, side - 50)]
    content = collection(*(feature(polygon(ring)) for ring in [*fields, square(200, 200, 160)]))
    content["features"] = content["features"][:count]
    path = write(tmp_path / "a.geojson", content)
    text = (
        "outlines of more than 8,000 pixels, taken as nuclei (regions?) (the first: feature 1): 1"
    )
    is_said = side == 160 and count < 3
    assert open_annotation(path, shape).notes == (f"{path}: {text}",) * is_said
    assert open_annotation(path, shape, 0.15).nuclei == count  # 576 square micrometres
    assert not open_annotation(path, shape, 0.15).notes
    if side == 60:
        assert open_annotation(path, shape, 0.25).nuclei == count  # 225
        return
    found = "feature 1: found an outline" if count < 3 else "found outlines with a median"
    with pytest.raises(InputError, match=f"{found}.* of 1,600 square micrometres.*class Region"):
        open_annotation(path, shape, 0.25)


# --- regions


def test_regions_say_where_all_nuclei_are_annotated(tmp_path):
    content = collection(
        feature(polygon(square(0, 0, 40)), "Region*"),
        feature(polygon(square(30, 30, 20)), "training"),
        feature(polygon(square(5, 5, 5)), "Ignore*"),
        feature(polygon(SQUARE), "Tumor"),
    )
    annotation = open_annotation(write(tmp_path / "a.geojson", content), SHAPE)
    known = np.zeros(SHAPE, bool)
    known[:40, :40] = known[30:50, 30:50] = True
    known[5:10, 5:10] = False
    np.testing.assert_array_equal(annotation.known(0, 0, *SHAPE), known)
    np.testing.assert_array_equal(annotation.known(3, 33, 50, 20), known[3:53, 33:53])
    np.testing.assert_array_equal(annotation.numbers(0, 0, *SHAPE), boxes((10, 10, 10, 10)))
    assert annotation.nuclei == 1 and annotation.regions.area == known.sum()
    half = annotation.scaled(30, 40)
    assert half.regions.area == known.sum() / 4
    np.testing.assert_array_equal(half.known(0, 0, 30, 40)[15:25, 15:25], True)
    without = write(tmp_path / "b.geojson", collection(feature(polygon(SQUARE))))
    assert open_annotation(without, SHAPE).known(0, 0, *SHAPE) is None
    assert open_annotation(without, SHAPE).regions is None


def test_outlines_that_are_read_at_once_need_not_have_a_nucleus(tmp_path, monkeypatch):
    monkeypatch.setattr("tissue.outlines.BATCH", 1)
    rings = [(square(0, 0, 40), "Region"), (square(100, 5), ""), (SQUARE, ""), (SQUARE, "Ignore")]
    content = collection(*(feature(polygon(ring), label) for ring, label in rings))
    content["features"] += [feature(polygon(square(25, 5)))]
    expected = boxes((10, 10, 10, 10), (5, 25, 10, 10))
    np.testing.assert_array_equal(drawn(tmp_path / "a.geojson", content), expected)


# --- label maps


@pytest.mark.parametrize("name", ["a.png", "a_cp_masks.png", "a_labels.tif"])
def test_label_maps_are_numbered_from_one(tmp_path, generator, name):
    labels = boxes((5, 5, 10, 10), (5, 30, 10, 10), (30, 5, 10, 10)).astype(np.uint16)
    values = np.array([0, 7, 300, 9], np.uint16)
    (tmp_path / "annotations").mkdir()
    write_image(tmp_path / "annotations" / name, values[labels])
    annotation = open_annotation(tmp_path / "annotations" / name, SHAPE)
    assert annotation.nuclei == 3 and annotation.classes == {"unclassified": 3}
    ranks = np.array([0, 1, 3, 2], np.int32)[labels]
    np.testing.assert_array_equal(annotation.numbers(2, 3, 50, 60), ranks[2:52, 3:63])
    np.testing.assert_array_equal(annotation.read(0, 0, *SHAPE), labels > 0)
    assert annotation.known(0, 0, *SHAPE) is None and annotation.is_label_map
    half = annotation.scaled(30, 40)
    nearest = cv2.resize(ranks.astype(np.uint8), (40, 30), interpolation=cv2.INTER_NEAREST_EXACT)
    np.testing.assert_array_equal(half.numbers(0, 0, 30, 40), nearest)
    np.testing.assert_array_equal(half.numbers(7, 9, 11, 13), nearest[7:18, 9:22])
    with pytest.raises(InputError, match="expected 60 x 81 as in its image"):
        open_annotation(tmp_path / "annotations" / name, (60, 81))


def test_a_label_map_of_one_nucleus_or_none_is_no_mask(tmp_path):
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "a.png"
    for boxes_of in ([(5, 5, 10, 10)], []):
        write_image(path, boxes(*boxes_of).astype(np.uint8))
        assert open_annotation(path, SHAPE).nuclei == len(boxes_of)
    write_image(
        path, 255 * boxes((5, 5, 9, 9)).astype(np.uint8) | boxes((9, 40, 9, 9)).astype("u1")
    )
    assert open_annotation(path, SHAPE).nuclei == 2
    write_image(path, 255 * (boxes((5, 5, 9, 9), (9, 40, 9, 9)) > 0).astype(np.uint8))
    with pytest.raises(InputError, match="expected one whole number per nucleus"):
        open_annotation(path, SHAPE)


# --- compared


def test_corrections_are_counted_by_id(tmp_path):
    one = [feature(polygon(square(x, 5)), id=f"id {x}") for x in (0, 15, 30, 45)]
    before = write(tmp_path / "a.geojson", collection(*one))
    ring = square(15, 5)[:-1]
    same = feature(polygon([*ring[2:], *ring[:2], ring[2]][::-1]), id="id 15")
    moved = feature(polygon(square(31, 5)), id="id 30")
    new = feature(polygon(square(60, 30)), id="new")
    region = feature(polygon(square(0, 0, 70)), "Region", id="region")
    after = write(tmp_path / "b.geojson", collection(new, one[0], same, moved, region))
    assert compare(before, after) == Changes(added=1, deleted=1, changed=1)
    assert compare(before, before) == Changes(0, 0, 0)
    features = json.loads(before.read_text())
    for item in features["features"]:  # as if detections had been turned into annotations
        item["id"] += " anew"
    others = write(tmp_path / "c.geojson", features)
    assert compare(before, others) == Changes(0, 0, 0)
    assert compare(others, after) == Changes(added=2, deleted=2, changed=0)
    for content in (before, after):  # as old versions of QuPath wrote them: the kind in place of it
        features = json.loads(content.read_text())
        for item in features["features"]:
            item["id"] = "PathDetectionObject"
        write(content, features)
    assert compare(before, after) == Changes(added=2, deleted=2, changed=0)
