"""Outlines as other programs save them: what is read, and what each format means."""

import gzip
import json
import zipfile

import numpy as np
import pytest
import roifile
import shapely
from pycocotools import mask as coco_mask
from skimage.draw import disk

from tissue import exports
from tissue.annotations import open_annotation
from tissue.files import InputError
from tissue.jsons import items_of, write_features
from tissue.measures import measure, outlines
from tissue.results import path_of
from tissue.synthetic import draw_tissue

SHAPE = 60, 80  # pixels
SQUARE = [[10, 10], [20, 10], [20, 20], [10, 20], [10, 10]]


def feature(geometry, label=None, **more):
    properties = {"objectType": "annotation"}
    if label is not None:
        named = label if isinstance(label, dict) else {"name": label}
        properties["classification"] = named | {"color": [1, 2, 3]}
    return {"type": "Feature", "geometry": geometry, "properties": properties} | more


def polygon(*rings):
    return {"type": "Polygon", "coordinates": list(rings)}


def square(x, y, side=10):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def collection(*features):
    return {"type": "FeatureCollection", "features": list(features)}


def drawn(path, content=None, shape=SHAPE):
    """The whole label map of a file."""
    if content is not None:
        write(path, content)
    return open_annotation(path, shape).numbers(0, 0, *shape)


def boxes(*places, shape=SHAPE):
    """A label map of rectangles (y, x, height, width), numbered in order."""
    labels = np.zeros(shape, np.int32)
    for number, (y, x, height, width) in enumerate(places, 1):
        labels[y : y + height, x : x + width] = number
    return labels


# --- our own exports


@pytest.mark.parametrize("key", ["geojson", "rois", "coco"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_exported_comes_back_to_the_pixel(tmp_path, key, seed):
    tissue = draw_tissue(250, 200, seed)
    with exports.NucleiFiles(tmp_path, "a", tissue.labels.shape, (key,)) as files:
        files.add(measure(tissue.labels, tissue.image, None), outlines(tissue.labels))
    annotation = open_annotation(path_of(tmp_path, "a", key), tissue.labels.shape)
    assert annotation.nuclei == tissue.count and annotation.notes == ()
    np.testing.assert_array_equal(annotation.numbers(0, 0, 250, 200), tissue.labels)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_features_that_are_written_are_geojson_again(tmp_path, count):
    features = [feature(polygon(square(20 * i, 5)), "Ä") for i in range(count)]
    write_features(tmp_path / "a.geojson", iter(features))
    assert json.loads((tmp_path / "a.geojson").read_text("ascii")) == collection(*features)
    assert list(items_of(tmp_path / "a.geojson")) == features
    assert [path.name for path in tmp_path.iterdir()] == ["a.geojson"]


# --- GeoJSON


def test_holes_parts_and_classes_of_qupath(tmp_path):
    ring, hole = square(10, 10, 20), square(15, 15, 5)
    parts = {"type": "MultiPolygon", "coordinates": [[square(40, 10)], [square(55, 10)]]}
    content = collection(
        feature(polygon(ring, hole), "Tumor"),
        feature(parts, "Immune"),
        feature(polygon(square(40, 40)), "Tumor"),
        feature(polygon(square(60, 40))),
    )
    expected = boxes((10, 10, 20, 20), (10, 40, 10, 10), (40, 40, 10, 10), (40, 60, 10, 10))
    expected[15:20, 15:20] = 0
    expected[10:20, 55:65] = 2
    np.testing.assert_array_equal(drawn(tmp_path / "a.geojson", content), expected)
    annotation = open_annotation(tmp_path / "a.geojson", SHAPE)
    assert annotation.classes == {"Tumor": 2, "Immune": 1, "unclassified": 1}
    assert annotation.nuclei == 4


def test_objects_of_one_plane_in_any_channel_are_those_of_an_image(tmp_path):
    planes = [{"plane": {"c": channel, "z": 2, "t": 0}} for channel in (-1, 0, 2)]
    content = [feature(polygon(square(20 * i, 10)) | plane) for i, plane in enumerate(planes)]
    content.append(feature({"type": "Point", "coordinates": [1, 2]}))
    expected = boxes(*((10, x, 10, 10) for x in (0, 20, 40)))
    np.testing.assert_array_equal(drawn(tmp_path / "a.geojson", content), expected)


def of_version(version, kind, ring, **more):
    """An object as QuPath 0.2, 0.3 or 0.4 writes it."""
    names = {"cell": "PathCellObject", "tile": "PathTileObject", "tma_core": "TMACoreObject"}
    names |= {"detection": "PathDetectionObject", "annotation": "PathAnnotationObject"}
    told = {"0.3": {"object_type": kind}, "0.4": {"objectType": kind}}.get(version, {})
    identity = {"id": names[kind]} if version == "0.2" else {}
    return feature(polygon(ring), properties={"isLocked": False} | told) | identity | more


@pytest.mark.parametrize("version", ["0.2", "0.3", "0.4"])
def test_the_nucleus_of_a_cell_is_taken_whatever_version_of_qupath_wrote_it(tmp_path, version):
    content = [
        of_version(version, "cell", square(5, 5, 20), nucleusGeometry=polygon(SQUARE)),
        of_version(version, "cell", square(45, 5, 20), nucleusGeometry=polygon(square(50, 10))),
        of_version(version, "tile", square(0, 0, 30)),
        of_version(version, "tma_core", square(0, 0, 60)),
        of_version(version, "detection", square(40, 40)),
        of_version(version, "annotation", square(60, 40)),
    ]
    expected = boxes(*((10, x, 10, 10) for x in (10, 50)), *((40, x, 10, 10) for x in (40, 60)))
    np.testing.assert_array_equal(drawn(tmp_path / "a.geojson", content), expected)
    shown = [n.partition(": ")[2] for n in open_annotation(tmp_path / "a.geojson", SHAPE).notes]
    assert shown == [
        "cells of which the nucleus was taken: 2",
        "objects of type tile, passed over: 1",
        "objects of type tma_core, passed over: 1",
    ]


def test_objects_that_converters_call_cells_are_nuclei_and_a_line_says_so(tmp_path):
    """As those of what HoVer-Net found; QuPath itself writes the nucleus beside the cell."""
    content = [feature(polygon(SQUARE), properties={}, id="PathCellObject")]
    np.testing.assert_array_equal(drawn(tmp_path / "a.geojson", content), boxes((10, 10, 10, 10)))
    (note,) = open_annotation(tmp_path / "a.geojson", SHAPE).notes
    assert note.endswith("objects PathCellObject without a nucleus in them, taken as nuclei: 1")


@pytest.mark.parametrize(
    "content",
    [
        collection(feature(polygon(SQUARE))),
        [feature(polygon(SQUARE))],
        feature(polygon(SQUARE)),
        polygon(SQUARE),
        collection(feature(polygon(SQUARE[:-1]))),  # open
        collection(feature(polygon([[x, y, 0.5] for x, y in SQUARE]))),
        collection({"type": "Feature", "geometry": polygon(SQUARE), "properties": None}),
        collection(feature(polygon(SQUARE), properties={"classification": None})),
        collection(feature(polygon(square(0, 0, 50)), nucleusGeometry=polygon(SQUARE))
                   | {"properties": {"objectType": "cell"}}),
        collection(feature(None, properties={"childObjects": [feature(polygon(SQUARE))]})),
        {"crs": {"features": []}} | collection(feature(polygon(SQUARE))) | {"more": 1.5},
    ],
)  # fmt: skip
def test_one_nucleus_in_any_layout_of_geojson(tmp_path, content):
    expected = boxes((10, 10, 10, 10))
    np.testing.assert_array_equal(drawn(tmp_path / "a.geojson", content), expected)
    np.testing.assert_array_equal(drawn(tmp_path / "a.json", content), expected)
    packed = tmp_path / "b.geojson.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(content, indent=2).encode()))
    np.testing.assert_array_equal(drawn(packed), expected)


def test_a_file_longer_than_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tissue.jsons.CHUNK", 7)
    content = collection(*(feature(polygon(square(x, 1.25, 4)), "ü") for x in range(0, 70, 5)))
    content["last"] = 1234567.5
    write(tmp_path / "a.geojson", content)
    assert open_annotation(tmp_path / "a.geojson", SHAPE).classes == {"ü": 14}


def test_what_is_no_area_is_passed_over_and_said(tmp_path):
    line = {"type": "LineString", "coordinates": [[1, 1], [5, 5]]}
    tile = feature(polygon(SQUARE)) | {"properties": {"objectType": "tile"}}
    content = collection(
        feature({"type": "Point", "coordinates": [1, 2]}),
        feature(line),
        tile,
        feature(polygon([[1, 1], [5, 5], [9, 9], [1, 1]])),
        feature(polygon([[1, 1], [1, 1]])),
        feature(polygon()),
        feature(polygon(SQUARE)),
    )
    np.testing.assert_array_equal(drawn(tmp_path / "a.geojson", content), boxes((10, 10, 10, 10)))
    notes = " ".join(open_annotation(tmp_path / "a.geojson", SHAPE).notes)
    assert "points and lines, passed over: 2" in notes
    assert "objects of type tile, passed over: 1" in notes
    assert "without area, passed over (the first: feature 4): 3" in notes


def test_a_self_crossing_outline_is_mended_and_said(tmp_path):
    eight = [[10, 10], [30, 30], [30, 10], [10, 30], [10, 10]]
    loop = [[40, 10], [60, 10], [60, 30], [50, 30], [50, 5], [55, 5], [55, 25], [40, 25], [40, 10]]
    found = drawn(tmp_path / "a.geojson", collection(*(feature(polygon(r)) for r in (eight, loop))))
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.5
    lobes = [shapely.Polygon([*eight[i : i + 2], [20, 20]]) for i in (1, 3)]
    inside = np.any([shapely.intersects_xy(lobe, x, y) for lobe in lobes], axis=0)
    assert abs(int((found == 1).sum()) - int(inside.sum())) <= 20  # centres on the lines
    assert (found == 2)[12:22, 51:54].all()  # what it encloses twice is no hole
    note = open_annotation(tmp_path / "a.geojson", SHAPE).notes[0]
    assert note.endswith("cross or touch themselves, mended (the first: feature 1): 2")


# --- ImageJ


def roi_zip(path, *rois):
    with zipfile.ZipFile(path, "w") as archive:
        for number, roi in enumerate(rois, 1):
            archive.writestr(f"{number:04}.roi", roi.tobytes())
    return path


def roi_of(kind, points=None, box=None, name=""):
    roi = roifile.ImagejRoi() if points is None else roifile.ImagejRoi.frompoints(points)
    roi.roitype, roi.name, roi.version = roifile.ROI_TYPE[kind], name, 228
    if box:
        roi.top, roi.left, roi.bottom, roi.right = box
    return roi


@pytest.mark.parametrize("kind", ["POLYGON", "FREEHAND", "TRACED"])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_areas_of_imagej(tmp_path, kind, dtype):
    roi = roi_of(kind, np.array(SQUARE[:-1], dtype))
    assert roi.subpixelresolution == (dtype == np.float32)
    path = tmp_path / "a.roi"
    roi.tofile(path)
    np.testing.assert_array_equal(drawn(path), boxes((10, 10, 10, 10)))


def test_rectangles_ovals_and_composites_of_imagej(tmp_path):
    composite = roi_of("RECT", box=(40, 40, 60, 60))
    rings = [square(40, 40, 20), square(45, 45, 5)[::-1]]
    path = [[0.0, *ring[0], *(v for p in ring[1:4] for v in (1.0, *p)), 4.0] for ring in rings]
    composite.multi_coordinates = np.concatenate(path).astype(np.float32)
    composite.shape_roi_size = len(composite.multi_coordinates)
    file = roi_zip(
        tmp_path / "a.zip",
        roi_of("RECT", box=(1, 2, 11, 8)),
        roi_of("OVAL", box=(20, 10, 41, 31)),
        composite,
        roi_of("LINE"),
        roi_of("POLYGON", np.array(square(60, 10), np.int32), name="Region 1"),
    )
    annotation = open_annotation(file, SHAPE)
    found = annotation.numbers(0, 0, *SHAPE)
    expected = boxes((1, 2, 10, 6), (0, 0, 0, 0), (40, 40, 20, 20))
    expected[disk((30, 20), 10.5)] = 2
    expected[45:50, 45:50] = 0
    np.testing.assert_array_equal(found, expected)
    assert "points and lines, passed over: 1" in annotation.notes[0]
    assert annotation.regions.bounds == (60, 10, 70, 20)


def test_rois_of_one_slice_in_any_channel_are_those_of_an_image(tmp_path):
    rois = [roi_of("POLYGON", np.array(square(x, 10), np.int32)) for x in (0, 20, 40)]
    for channel, roi in enumerate(rois):
        roi.c_position, roi.z_position = channel, 1 if channel else 0
    found = drawn(roi_zip(tmp_path / "a.zip", *rois))
    np.testing.assert_array_equal(found, boxes(*((10, x, 10, 10) for x in (0, 20, 40))))


def test_what_macos_puts_into_a_zip_is_no_roi(tmp_path):
    path = roi_zip(tmp_path / "a.zip", roi_of("POLYGON", np.array(SQUARE[:-1], np.int32)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/._0001.roi", b"\0\5\x16\7 Mac OS X")
        archive.writestr("rois/._0001.roi", b"\0\5\x16\7 Mac OS X")
    np.testing.assert_array_equal(drawn(path), boxes((10, 10, 10, 10)))
    assert not open_annotation(path, SHAPE).notes


def test_coordinates_beyond_16_bits(tmp_path):
    roi = roi_of("POLYGON", np.array(square(70_000, 5), np.float32))
    roi.tofile(tmp_path / "a.roi")
    annotation = open_annotation(tmp_path / "a.roi", (30, 80_000))
    assert annotation.numbers(0, 69_990, 30, 40)[5:15, 10:20].all()
    assert annotation.read(0, 0, 30, 80_000).sum() == 100


# --- COCO and labelme


def coco(*annotations, **image):
    images = [{"id": 7, "file_name": "a.png", "height": 60, "width": 80} | image]
    categories = [{"id": 1, "name": "Tumor"}]
    return {"images": images, "annotations": list(annotations), "categories": categories}


def annotation_of(segmentation, **more):
    return {"id": 1, "image_id": 7, "category_id": 1, "segmentation": segmentation} | more


def test_polygons_and_masks_of_coco(tmp_path):
    mask = boxes((20, 30, 10, 5), (30, 33, 6, 9)) > 0
    mask[24, 31] = False
    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    packed = {"size": packed["size"], "counts": packed["counts"].decode()}
    column_wise = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(column_wise)) + 1
    plain = {"size": [60, 80], "counts": np.diff([0, *changes.tolist(), 4800]).tolist()}
    flat = [v for point in SQUARE[:-1] for v in point]
    content = coco(
        annotation_of([flat, [v + 15 for v in flat]]),
        annotation_of(packed),
        annotation_of(flat, image_id=8),
        annotation_of([]),
    )
    expected = boxes((10, 10, 10, 10))
    expected[25:35, 25:35] = 1
    expected[mask] = 2
    np.testing.assert_array_equal(drawn(tmp_path / "a_coco.json", content), expected)
    annotation = open_annotation(tmp_path / "a_coco.json", SHAPE)
    assert annotation.classes == {"Tumor": 2}
    notes = " ".join(annotation.notes)
    assert "other images, passed over: 1" in notes and "no outline, passed over: 1" in notes
    content = coco(annotation_of(plain, iscrowd=1))
    np.testing.assert_array_equal(drawn(tmp_path / "b.json", content), mask.astype(int))
    assert "iscrowd" in open_annotation(tmp_path / "b.json", SHAPE).notes[0]


@pytest.mark.parametrize("file", ["folder/A.TIF", "C:\\folder\\a.png"])
def test_of_several_images_of_coco_the_one_of_that_name_counts(tmp_path, file):
    content = coco(annotation_of([[10, 10, 20, 10, 20, 20]]), file_name=file)
    content["images"].append({"id": 8, "file_name": "b.png", "height": 5, "width": 5})
    assert open_annotation(write(tmp_path / "a_coco.json", content), SHAPE).nuclei == 1
    with pytest.raises(InputError, match="found 2 images, 0 of which are named c"):
        open_annotation(write(tmp_path / "c_coco.json", content), SHAPE)


@pytest.mark.parametrize(
    ("file", "is_other"),
    [
        ("a.png", False),
        ("A.OME.tif", False),
        ("folder/a.jpg", False),
        ("C:\\images\\a.svs", False),
        ("a", False),
        ("a_image.png", False),  # our own
        (None, False),
        ("b.png", True),
        ("C:\\a\\other slide.tif", True),
    ],
)
def test_an_image_of_another_name_is_said(tmp_path, file, is_other):
    label = {"shapes": [{"label": "n", "points": SQUARE}], "imagePath": file}
    content = coco(annotation_of([[10, 10, 20, 10, 20, 20]]), file_name=file)
    for name, its in (("a.json", label), ("a_coco.json", content)):
        found = open_annotation(write(tmp_path / name, its), SHAPE)
        said = f"outlines of an image called {file!r} there, taken as those of a: 1"
        assert found.notes == (f"{tmp_path / name}: {said}",) * is_other


def test_shapes_of_labelme(tmp_path):
    shapes = [
        {"label": "n", "points": SQUARE[:-1], "shape_type": "polygon"},
        {"label": "n", "points": [[40, 30], [30, 20]], "shape_type": "rectangle", "group_id": None},
        {"label": "n", "points": [[60, 30], [60, 40.5]], "shape_type": "circle"},
        {"label": "n", "points": square(1, 1, 5), "group_id": 4},
        {"label": "n", "points": [[1, 1]], "shape_type": "point"},
        {"label": "n", "points": square(1, 50, 5), "group_id": 4},
        {"label": "Region", "points": [[0, 0], [80, 60]], "shape_type": "rectangle"},
    ]
    content = {"version": "5.0", "flags": {}, "shapes": shapes, "imagePath": "a.png"}
    content |= {"imageData": "AAAA" * 10, "imageHeight": 60, "imageWidth": 80}
    expected = boxes((10, 10, 10, 10), (20, 30, 10, 10), (0, 0, 0, 0), (1, 1, 5, 5))
    y, x = np.mgrid[:60, :80] + 0.5
    expected[(y - 30) ** 2 + (x - 60) ** 2 < 10.5**2] = 3
    expected[50:55, 1:6] = 4
    np.testing.assert_array_equal(drawn(tmp_path / "a.json", content), expected)
    annotation = open_annotation(tmp_path / "a.json", SHAPE)
    assert annotation.regions.area == 4800
    notes = " ".join(annotation.notes)
    assert "groups (group_id) of several shapes, taken as one nucleus each: 1" in notes
    assert "several parts, taken as one nucleus each (the first: shape 4 and others of" in notes
