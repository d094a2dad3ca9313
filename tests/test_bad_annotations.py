"""Annotations that are wrong: one line each, that names the file, and nothing else happens."""

import gzip
import json
import zipfile

import numpy as np
import pytest

from tests.test_outline_files import (
    SHAPE,
    SQUARE,
    annotation_of,
    coco,
    collection,
    feature,
    polygon,
    roi_of,
    roi_zip,
    square,
)
from tissue.annotations import open_annotation
from tissue.files import InputError


def geojson(*rings, **more):
    return json.dumps(collection(*(feature(polygon(ring), **more) for ring in rings)))


def shape(**values):
    return json.dumps({"shapes": [{"label": "n", "points": SQUARE} | values]})


def mask(**values):
    rle = {"size": list(SHAPE), "counts": [0, 5, 4795]} | values
    return json.dumps(coco(annotation_of(rle)))


def collections(depth):
    begin = '{"type":"GeometryCollection","geometries":['
    return f'{{"type":"Feature","geometry":{begin * depth}{"]}" * depth}}}'


def of_plane(**place):
    return {"plane": {"c": -1, "z": 0, "t": 0} | place}


def of_slice(**place):
    roi = roi_of("POLYGON", np.array(SQUARE[:-1]))
    for key, value in place.items():
        setattr(roi, key, value)
    return roi.tobytes()


def rings(count, y=0):
    return [square(8 * i + 1, y + 2, 5) for i in range(count)]


def pieces(count, y=0):
    """A geometry of nuclei side by side."""
    return {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings(count, y)]}


def flat(count):
    return [[v for point in ring[:-1] for v in point] for ring in rings(count)]


def composite(count):
    roi = roi_of("RECT", box=(2, 1, 7, 8 * count))
    path = [[0, *r[0], *(v for p in r[1:4] for v in (1, *p)), 4] for r in rings(count)]
    roi.multi_coordinates = np.concatenate(path).astype(np.float32)
    roi.shape_roi_size = len(roi.multi_coordinates)
    return roi.tobytes()


BAD = {  # name: (file, content, what the line says)
    "empty file": ("a.geojson", "", "neither an object nor a list"),
    "no JSON": ("a.geojson", "hello", "neither an object nor a list"),
    "XML": ("a.geojson", "<xml/>", "neither an object nor a list"),
    "cut off": ("a.geojson", geojson(SQUARE)[:-40], "its end within a value"),
    "cut off between features": ("a.geojson", geojson(SQUARE)[:-2], "its end in place of ','"),
    "comma missing": ("a.geojson", geojson(SQUARE).replace("], [", "] [", 1), "delimiter at char"),
    "two files in one": ("a.geojson", geojson(SQUARE) * 2, "more after its end"),
    "NUL bytes": ("a.geojson", geojson(SQUARE) + "\0" * 9, "more after its end"),
    "UTF-16": ("a.geojson", geojson(SQUARE).encode("utf-16"), "no UTF-8"),
    "deep": ("a.geojson", "[" * 200_000, "nested too deep"),
    "deep geometry": ("a.geojson", '{"type":"Feature","geometry":' * 200_000, "nested too deep"),
    "deep collections": ("a.geojson", collections(1500), "nested too deep"),
    "collections": ("a.geojson", collections(480), "nested too deep|no outline"),  # by version
    "no features": ("a.geojson", "{}", "JSON without features"),
    "settings": ("a.json", '{"a": 1, "b": [1, 2]}', "JSON without features"),
    "list of numbers": ("a.json", "[1, 2, 3]", "feature 1: found a number"),
    "list of results": ("a.json", json.dumps([annotation_of(SQUARE)]), "feature 1: found an obj"),
    "null feature": ("a.geojson", '{"features": [null]}', "feature 1: found nothing"),
    "NaN": ("a.geojson", geojson(SQUARE, [[1, 1], [float("nan"), 5], [5, 1]]), "feature 2: .* not"),
    "infinity": ("a.geojson", geojson([[1, 1], [9, float("inf")], [5, 1]]), "not finite"),
    "far": ("a.geojson", geojson([[1, 1], [9, 1e30], [5, 1]]), "beyond 16,777,216"),
    "huge number": ("a.geojson", geojson([[1, 1], [9, 10**400], [5, 1]]), "no list of"),
    "endless number": ("a.geojson", "[" + "9" * 6000 + "]", "number of too many digits"),
    "texts": ("a.geojson", geojson([["1", "1"], ["9", "1"]]), "feature 1: .* no list of"),
    "null point": ("a.geojson", geojson([[1, 1], None, [5, 5]]), "feature 1: .* no list of"),
    "ragged": ("a.geojson", geojson([[1, 1], [2], [5, 5]]), "feature 1: .* no list of"),
    "flat": ("a.geojson", geojson([1, 1, 9, 9]), "feature 1: .* no list of"),
    "rings are a text": ("a.geojson", geojson("abc"), "feature 1: .* no list of"),
    "other geometry": ("a.geojson", json.dumps(feature({"type": "Circle"})), "type 'Circle'"),
    "geometry is a text": ("a.geojson", json.dumps(feature("x")), "found a text as its geometry"),
    "polygon of nothing": ("a.geojson", json.dumps(feature({"type": "Polygon"})), "found nothing"),
    "class is a number": ("a.geojson", geojson(SQUARE, label=5), "a number as its class"),
    "properties are a list": ("a.geojson", geojson(SQUARE, properties=[1]), "list as its prop"),
    "points alone": (
        "a.geojson",
        json.dumps(feature({"type": "Point", "coordinates": [3, 4]})),
        "no outline of a nucleus",
    ),
    "zero area alone": ("a.geojson", geojson([[1, 1], [5, 5], [1, 1]]), "no outline of a nucleus"),
    "cells without nuclei": (
        "a.geojson", geojson(SQUARE, properties={"objectType": "cell"}), "cells without a nucleus",
    ),
    "longitude and latitude": (
        "a.geojson",
        geojson([[13.4, 52.51], [13.42, 52.5], [13.41, 52.53], [13.4, 52.51]]),
        "like longitude and latitude",
    ),
    "wrong image": (
        "a.geojson",
        geojson(SQUARE, square(200, 20), square(10, 300)),
        "found 2 of 3 outlines outside an image of 60 x 80",
    ),
    "region outside": ("a.geojson", geojson(square(100, 5), label="Region"), "region outside of"),
    "all ignored": ("a.geojson", geojson(square(0, 0, 90), label="Ignore*"), "no part of the imag"),
    "tissue outlined": (
        "a.geojson",
        geojson(*(square(x, 1, 1) for x in range(5)), square(0, 0, 50)),
        "feature 6: found an outline of 2,500 pixels",
    ),
    "all nuclei merged in QuPath": (
        "a.geojson", json.dumps(feature(pieces(9))), "feature 1: found one outline of 9 parts",
    ),
    "all nuclei in a composite ROI": (
        "a.zip", {"a.roi": composite(9)}, "ROI 'a.roi': found one outline of 9 parts.*More > Split",
    ),
    "all nuclei in an annotation of COCO": (
        "a.json", json.dumps(coco(annotation_of(flat(9)))), "annotation 1: found one outline of 9",
    ),
    "all nuclei in a group of labelme": (
        "a.json",
        json.dumps({"shapes": [{"label": "n", "points": r, "group_id": 2} for r in rings(9)]}),
        "shape 1 and others of group_id 2: found one outline of 9 parts",
    ),
    "nuclei merged in threes": (
        "a.geojson",
        json.dumps(collection(*(feature(pieces(3, 20 * y)) for y in range(3)))),
        "found 3 outlines of 9 parts",
    ),
    "a million corners": (
        "a.geojson",
        '{"features": [{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [['
        + "[1,2]," * 1_000_001 + "[1,2]]]}}]}",
        "feature 1: found an outline of 1,000,002 corners",
    ),
    "10 million corners": (
        "a.geojson.gz",
        gzip.compress(b'{"features": [{"type": "Feature", "geometry": {"type": "Polygon", '
                      b'"coordinates": [[' + b"[1,2]," * 10_000_000 + b"[1,2]]]}}]}", 1),
        "more than 16,777,216 characters",
    ),
    "bomb": ("a.geojson.gz", gzip.compress(b"[" + b" " * 200_000_000), "more than 200 times"),
    "damaged gzip": ("a.geojson.gz", gzip.compress(geojson(SQUARE).encode())[:-20], "damaged gzip"),
    "gzip of noise": ("a.geojson.gz", b"\x1f\x8b" + bytes(range(256)), "damaged gzip"),
    "no zip": ("a.zip", "hello", "zip that cannot be read"),
    "zip bomb": ("a.zip", {"a.roi": b"\0" * 70_000_000}, "more than 67,108,864 bytes"),
    "no ROI in it": ("a.zip", {"a.roi": b"hello"}, "ROI 'a.roi': found what is no ROI"),
    "ROI cut off": ("a.roi", roi_of("POLYGON", np.array(SQUARE)).tobytes()[:70], "no ROI"),
    "zip of texts": ("a.zip", {"a.txt": b"hello"}, "files that are no ROI, passed over: 1"),
    "zip of GeoJSON": ("a.zip", {"a.geojson": geojson(SQUARE)}, "zip of 'a.geojson'.*unpack it"),
    "zip of XML": ("a.zip", {"annotations.xml": "<a/>"}, "'annotations.xml'.* as COCO JSON"),
    "zip of COCO": ("a.zip", {"__MACOSX/._b.xml": "", "b.json": "{}"}, "zip of 'b.json'.*unpack"),
    "objects of a stack": (
        "a.geojson",
        json.dumps(collection(feature(polygon(SQUARE)), feature(polygon(SQUARE) | of_plane(z=1)))),
        "feature 2: found it in another plane",
    ),
    "objects of times": (
        "a.geojson",
        json.dumps([feature(polygon(SQUARE) | of_plane(z=3, t=t)) for t in (1, 1, 2)]),
        "feature 3: found it in another plane.*in a file of its own",
    ),
    "ROIs of a stack": (
        "a.zip",
        {f"{z}.roi": of_slice(position=z) for z in (0, 1, 2)},
        "ROI '2.roi': found it in another slice of a stack",
    ),
    "ROIs of a hyperstack": (
        "a.zip",
        {f"{z}.roi": of_slice(z_position=z, c_position=1) for z in (1, 2)},
        "save the ROIs of each slice in a file of its own",
    ),
    "COCO of another size": ("a_coco.json", json.dumps(coco(height=50)), "image of 50 x 80"),
    "COCO of another size as fractions": (
        "a_coco.json", json.dumps(coco(height=60.0, width=512.0)), "image of 60 x 512 pixels",
    ),
    "odd coordinates": ("a.json", json.dumps(coco(annotation_of([[1, 2, 3]]))), "annotation 1: "),
    "segmentation is a text": ("a.json", json.dumps(coco(annotation_of("x"))), "found a text as c"),
    "mask of another size": ("a.json", mask(size=[5, 5]), "annotation 1: found a mask of size"),
    "mask that is not full": ("a.json", mask(counts=[0, 5]), "annotation 1: found a mask that"),
    "mask of noise": ("a.json", mask(counts="zzzz"), "annotation 1: found a mask that"),
    "mask of texts": ("a.json", mask(counts=["a", None]), "annotation 1: found a mask that"),
    "labelme of another size": (
        "a.json", json.dumps({"shapes": [], "imageHeight": 5, "imageWidth": 80}), "image of 5 x 80",
    ),
    "labelme mask": ("a.json", shape(shape_type="mask"), "shape 1: found a shape of type 'mask'"),
    "circle of 4 points": ("a.json", shape(shape_type="circle"), "found a circle of 5 points"),
    "shape without points": ("a.json", shape(points=None), "shape 1: found nothing as coordinates"),
    "shape is a list": ("a.json", json.dumps({"shapes": [[1]]}), "shape 1: found a list"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "content", "says"), BAD.values(), ids=BAD)
def test_a_bad_annotation_is_one_line_that_names_the_file(tmp_path, file, content, says):
    path = tmp_path / file
    if isinstance(content, dict):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=says) as error:
        open_annotation(path, SHAPE)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_an_encrypted_zip_is_refused(tmp_path):
    path = roi_zip(tmp_path / "a.zip", roi_of("POLYGON", np.array(SQUARE)))
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + flags] |= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="zip that cannot be read"):
        open_annotation(path, SHAPE)
