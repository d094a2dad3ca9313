"""Reads the outlines that other programs save: QuPath, COCO and labelme, and ImageJ by `rois`.

Each reader gives the outlines of a file one by one, and counts in `seen` what it passed over or
assumed: {text: how often}.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import shapely
from pycocotools import mask as coco_mask

from tissue.files import InputError
from tissue.jsons import members
from tissue.outlines import (
    LONGEST_CLASS,
    Fault,
    Outline,
    box_ring,
    is_region,
    named,
    oval_ring,
    polygons_of,
    ring_of,
)
from tissue.pairs import name_of, same_name
from tissue.rois import read_rois

NOT_NUCLEI = ("tile", "tma_core")  # objects of QuPath
# What QuPath 0.2 wrote as the id of an object, and what it is (PathObjectTypeAdapters.java).
_OF_ID = {
    "PathAnnotationObject": "annotation",
    "PathDetectionObject": "detection",
    "PathCellObject": "cell",
    "PathTileObject": "tile",
    "TMACoreObject": "tma_core",
}
_LISTS = ("features", "annotations", "shapes")
_OBJECT = "expected an object, export it anew"


def read_outlines(
    path: Path, name: str, shape: tuple[int, int], seen: Counter
) -> Iterator[Outline]:
    """The outlines of the file of image `name` of (height, width) pixels.

    Raises InputError that names the file, and the outline if one is at fault.
    """
    if path.suffix.lower() in (".zip", ".roi"):
        yield from read_rois(path, seen)
    elif path.suffix.lower() == ".json":
        yield from _json(path, name, shape, seen)
    else:
        yield from (outline for _, outline in read_features(path, seen))


# --- GeoJSON


def read_features(path: Path, seen: Counter) -> Iterator[tuple[str, Outline]]:
    """(id, or "" without; Outline) of each area of a GeoJSON file. Raises InputError."""
    head, number, known, planes = {}, None, set(), set()
    for key, value in members(path, _LISTS[:1]):
        if value is ...:
            number = 0
        elif key == "features" and number is not None:
            number += 1
            found = named(path, f"feature {number}", _feature, value, planes, seen)
            for identity, outline in found:
                if identity in known and identity not in _OF_ID:
                    seen["features that share an id, taken as a nucleus each"] += 1
                if identity:
                    known.add(identity)
                yield identity, outline
        else:
            head[key] = value
    if number is not None:
        return
    if head.get("type") != "Feature":
        if "coordinates" not in head and "geometries" not in head:
            raise InputError(
                f"{path}: found JSON without features, expected GeoJSON (a FeatureCollection), "
                f"export it anew"
            )
        head = {"type": "Feature", "geometry": head}
    yield from named(path, "feature 1", _feature, head, planes, seen)


def _feature(where, value, planes, seen):
    if not isinstance(value, dict) or value.get("type") != "Feature":
        raise Fault(f"found {_kind(value)} that is no GeoJSON feature, {_OBJECT}")
    properties = value.get("properties") or {}
    if not isinstance(properties, dict):
        raise Fault(f"found {_kind(properties)} as its properties, {_OBJECT}")
    for child in _list(properties.get("childObjects") or []):
        yield from _feature(where, child, planes, seen)
    label = properties.get("classification") or ""
    if isinstance(label, dict):
        names = label.get("names")  # QuPath's for a class within a class
        label = label.get("name") or ": ".join(map(str, names if isinstance(names, list) else ()))
    if not isinstance(label, str):
        raise Fault(f"found {_kind(label)} as its class, expected a name, give it a class again")
    kind, geometry = _object_type(value, properties), value.get("geometry")
    if kind in NOT_NUCLEI:
        seen[f"objects of type {kind}, passed over"] += 1
        return
    if value.get("nucleusGeometry") and not is_region(label):
        kind, geometry = "cell", value["nucleusGeometry"]
        seen["cells of which the nucleus was taken"] += 1
    elif kind == "cell" and not is_region(label):
        if value.get("id") != "PathCellObject":
            seen["cells without a nucleus, passed over"] += 1
            return
        # Converters of what networks found write nuclei so.
        seen["objects PathCellObject without a nucleus in them, taken as nuclei"] += 1
    if geometry is None:
        seen["features without a geometry, passed over"] += 1
        return
    polygons = _polygons(geometry, seen)
    if polygons is not None:
        _check_plane(geometry, planes)
        outline = Outline(where, label, polygons, _text(properties.get("name")), kind)
        identity = value.get("id")
        yield str(identity) if isinstance(identity, str | int) else "", outline


def _object_type(value, properties):
    """What an object of QuPath is: as 0.4 and later tell it, as 0.3 or as 0.2; "" of others."""
    told = _text(properties.get("objectType")) or _text(properties.get("object_type"))
    return told or _OF_ID.get(_text(value.get("id")), "")


def _check_plane(geometry, planes):
    """Raise Fault for an outline of another plane of a stack than those before it, whose `planes`
    are a set of (z, t). QuPath writes none for the first; channels show one place.
    """
    plane = geometry.get("plane")
    plane = plane if isinstance(plane, dict) else {}
    planes.add(tuple(str(plane.get(axis) or 0) for axis in "zt"))
    if len(planes) > 1:
        raise Fault(
            "found it in another plane (z or t) of a stack than objects before it, expected those "
            "of one image, save the objects of each plane in a file of its own"
        )


def _polygons(geometry, seen):
    """The polygons of a GeoJSON geometry; None of what has no area."""
    if not isinstance(geometry, dict):
        raise Fault(f"found {_kind(geometry)} as its geometry, {_OBJECT}")
    kind, places = geometry.get("type"), geometry.get("coordinates")
    if kind == "GeometryCollection":
        parts = [_polygons(part, seen) for part in _list(geometry.get("geometries"))]
        seen["collections of geometries, taken as one nucleus each"] += 1
        return [polygon for part in parts if part is not None for polygon in part] or None
    if kind in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        seen["points and lines, passed over"] += 1
        return None
    if kind == "Polygon":
        places = [places]
    elif kind != "MultiPolygon":
        raise Fault(
            f"found a geometry of type {kind!r:.60}, expected Polygon or MultiPolygon, remove it"
        )
    return [[ring_of(ring) for ring in _list(polygon)] for polygon in _list(places)]


def _list(value):
    if not isinstance(value, list):
        raise Fault(f"found {_kind(value)} as coordinates, expected lists of [x, y], draw it anew")
    return value


def _text(value):
    return value if isinstance(value, str) else ""


def _kind(value):
    """What a JSON value is, for a message."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "nothing" if value is None else names.get(type(value), "a number")


# --- COCO and labelme


def _json(path, name, shape, seen):
    """By what is in it: COCO, labelme, or GeoJSON with another ending."""
    head, lists = {}, set()
    for key, value in members(path, _LISTS):
        if value is ...:
            lists.add(key)
        elif key not in lists and key != "imageData":
            head[key] = value
    if "annotations" in lists:
        yield from _coco(path, name, shape, head, seen)
    elif "shapes" in lists:
        yield from _labelme(path, name, shape, head, seen)
    else:
        yield from (outline for _, outline in read_features(path, seen))


def _check_size(path, head, keys, shape):
    """Raise InputError if a file says that its image is of another size."""
    said = tuple(head.get(key) for key in keys)
    if all(isinstance(side, int | float) for side in said) and said != tuple(shape):
        raise InputError(
            f"{path}: found outlines of an image of {said[0]:g} x {said[1]:g} pixels (height x "
            f"width), expected {shape[0]} x {shape[1]}, take those of this image"
        )


def _is_file_of(file, *names):
    """Whether the file of an image, a text with folders of any system, has one of these names."""
    path = Path(str(file).replace("\\", "/"))
    return not {same_name(path.name), same_name(name_of(path))}.isdisjoint(map(same_name, names))


def _said_of_other(file, name):
    """What is said of each outline where `file`, the image's as they say, is not that of `name`;
    "" where it is, or is the picture that our own COCO files have.
    """
    if not isinstance(file, str) or not file or _is_file_of(file, name, f"{name}_image"):
        return ""
    plain = "".join(letter if letter.isprintable() else " " for letter in file[-LONGEST_CLASS:])
    return f"outlines of an image called {plain!r} there, taken as those of {name}"


def _coco(path, name, shape, head, seen):
    images, categories = (
        [item for item in head[key] if isinstance(item, dict)]
        if isinstance(head.get(key), list)
        else []
        for key in ("images", "categories")
    )
    if len(images) > 1:
        mine = [i for i in images if _is_file_of(i.get("file_name"), name)]
        if len(mine) != 1:
            raise InputError(
                f"{path}: found {len(images)} images, {len(mine)} of which are named {name}, "
                f"expected one; save the annotations of each image in a file of its own"
            )
        images = mine
    image = images[0] if images else {}
    _check_size(path, image, ("height", "width"), shape)
    other = _said_of_other(image.get("file_name"), name)
    labels = {str(c.get("id")): str(c.get("name") or "") for c in categories}
    number = 0
    for key, value in members(path, ("annotations",)):
        if key == "annotations" and value is not ...:
            number += 1
            where = f"annotation {number}"
            for outline in named(path, where, _annotation, value, (image, labels, shape), seen):
                if other:
                    seen[other] += 1
                yield outline


def _annotation(where, value, context, seen):
    image, labels, shape = context
    if not isinstance(value, dict):
        raise Fault(f"found {_kind(value)}, {_OBJECT}")
    if "id" in image and value.get("image_id") != image["id"]:
        seen["annotations of other images, passed over"] += 1
        return
    if value.get("iscrowd"):
        seen["annotations marked as crowds (iscrowd), taken as one nucleus each"] += 1
    drawn, label = value.get("segmentation"), labels.get(str(value.get("category_id")), "")
    if not drawn:
        seen["annotations that have a box and no outline, passed over"] += 1
    elif isinstance(drawn, dict):
        yield Outline(where, label, _run_lengths(drawn, shape))
    else:
        yield Outline(where, label, [[ring_of(_pairs(ring))] for ring in _list(drawn)])


def _pairs(ring):
    """x, y, x, y as a list of [x, y]."""
    ring = _list(ring)
    if len(ring) % 2:
        raise Fault(f"found {len(ring)} coordinates, expected x, y, x, y, draw it anew")
    return [list(pair) for pair in zip(ring[::2], ring[1::2], strict=True)]


def _run_lengths(value, shape):
    """The polygons around the pixels of a COCO mask (RLE)."""
    counts, size = value.get("counts"), value.get("size")
    if size != list(shape):
        raise Fault(
            f"found a mask of size {size!r:.60}, expected {list(shape)} (height, width) as the "
            f"image, export it anew"
        )
    try:
        if isinstance(counts, list):
            if sum(counts) != shape[0] * shape[1] or min(counts) < 0:
                raise ValueError("its runs do not fill it")
            value = coco_mask.frPyObjects(value, *shape)
        mask = coco_mask.decode({"size": size, "counts": value["counts"]})
        if isinstance(counts, str) and coco_mask.encode(mask)["counts"] != counts.encode():
            raise ValueError("its runs are no whole mask")
    except (TypeError, ValueError, KeyError, OverflowError, AttributeError) as error:
        raise Fault(f"found a mask that cannot be read ({error}), export it anew") from error
    left, top, width, height = map(int, coco_mask.toBbox(value))
    mask = np.pad(mask[top : top + height, left : left + width].astype(np.int8), ((1, 1), (0, 0)))
    # Columns of pixels, as boxes that are joined.
    column, first = np.nonzero(np.diff(mask, axis=0).T == 1)
    _, behind = np.nonzero(np.diff(mask, axis=0).T == -1)
    column = column + left
    boxes = shapely.box(column, first + top, column + 1, behind + top)
    return polygons_of(shapely.union_all(boxes))


def _labelme(path, name, shape, head, seen):
    _check_size(path, head, ("imageHeight", "imageWidth"), shape)
    other = _said_of_other(head.get("imagePath"), name)
    several, number = {}, 0
    for key, value in members(path, ("shapes",)):
        if key == "shapes" and value is not ...:
            number += 1
            for group, outline in named(path, f"shape {number}", _shape, value, seen):
                if other:
                    seen[other] += 1
                several.setdefault(group or number, []).append(outline)
    for (first, *others), group in zip(several.values(), several, strict=True):
        if others and not is_region(first.label):
            seen["groups (group_id) of several shapes, taken as one nucleus each"] += 1
            first = first._replace(where=f"{first.where} and others of group_id {group[1]:.60}")
        yield first._replace(polygons=sum((o.polygons for o in others), first.polygons))


def _shape(where, value, seen):
    """((label, number) of the group of which it is a part, or None; Outline)"""
    if not isinstance(value, dict):
        raise Fault(f"found {_kind(value)}, {_OBJECT}")
    kind, label = value.get("shape_type") or "polygon", str(value.get("label") or "")
    if kind in ("point", "line", "linestrip", "points"):
        seen["points and lines, passed over"] += 1
        return
    points = ring_of(_list(value.get("points")))
    group = (label, str(value["group_id"])) if value.get("group_id") is not None else None
    if kind in ("rectangle", "circle"):
        if len(value["points"]) != 2:
            raise Fault(
                f"found a {kind} of {len(value['points'])} points, expected 2, draw it anew"
            )
        first, other = np.array(value["points"], float)[:, :2]
        if kind == "circle":
            radius = math.dist(first, other)
            first, other = first - radius, first + radius
            points = oval_ring(*first, *other)
        else:
            points = box_ring(*first, *other)
    elif kind != "polygon":
        raise Fault(
            f"found a shape of type {kind!r:.60}, expected polygon, rectangle or circle, draw it so"
        )
    yield group, Outline(where, label, [[points]])
