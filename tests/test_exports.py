"""The files for other programs, read back by other libraries than the ones that wrote them."""

import csv
import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import uuid
import zipfile

import cv2
import numpy as np
import pytest
import roifile
import shapely
import tifffile
from pyarrow import parquet
from pycocotools.coco import COCO

from tissue import exports, masks, nuclei_tables, pixel_size
from tissue.annotations import open_annotation
from tissue.files import InputError
from tissue.results import path_of
from tissue.store import Store
from tissue.tiling import Tile

HAS_ANNDATA = importlib.util.find_spec("anndata") is not None
ALL = tuple(key for key in exports.FORMATS if key != "anndata" or HAS_ANNDATA)
SHAPE = 120, 150  # pixels
MADE_WITH = {"checkpoint": "0f" * 32, "threshold": 0.5, "files": [[12, 34], None]}
NAMES = [
    "plain",
    "with spaces and 'quotes' and \"more\"",
    "<script>alert(1)<script>",
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "Größe µm 核 🔬",
    "100% #1 a&b?c",
]


def draw(count, shape=SHAPE):
    """A label image of `count` nuclei of many forms, and each nucleus' outline made by shapely."""
    labels = np.zeros(shape, np.int32)
    for label in range(1, count + 1):
        row, column = divmod(label - 1, 5)
        centre = 15 + 30 * column, 15 + 30 * row
        axes = 4 + label % 9, 3 + label % 5
        cv2.ellipse(labels, centre, axes, 25.0 * label, 0, 360, label, -1)
    return labels, [outline(labels == label) for label in range(1, count + 1)]


def outline(mask):
    y, x = np.nonzero(mask)
    polygon = shapely.union_all(shapely.box(x, y, x + 1, y + 1))
    assert not polygon.interiors
    return np.array(polygon.normalize().exterior.coords)


def measures(labels, pixel_size_um=0.25):
    ids = np.unique(labels[labels > 0])
    area = np.array([(labels == label).sum() for label in ids], int)
    centres = np.array([np.argwhere(labels == label).mean(axis=0) for label in ids])
    return {
        "id": ids,
        "y": centres.reshape(-1, 2)[:, 0],
        "x": centres.reshape(-1, 2)[:, 1],
        "area_px": area,
        "area_um2": area * (pixel_size_um or np.nan) ** 2,
        "orientation": np.linspace(-1.5, 1.5, len(ids)),
        "touches_border": ids % 2 == 0,
    }


def write_labels(path, labels, pixel_size_um):
    with Store(path.parent, labels.shape, np.uint32) as store:
        store.write(Tile(0, 0, *labels.shape), labels)
        store.save(path, pixel_size_um)


def export(folder, name="a", count=17, formats=ALL, pixel_size_um=0.25):
    labels, rings = draw(count)
    table = measures(labels, pixel_size_um)
    made_with = MADE_WITH | {"pixel_size": pixel_size_um}
    with exports.NucleiFiles(folder, name, SHAPE, formats, made_with) as files:
        files.add(table, rings)
    write_labels(path_of(folder, name, "labels"), labels, pixel_size_um)
    return labels, table


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def features_of(path):
    collection = json.loads(path.read_text())
    assert collection["type"] == "FeatureCollection"
    return collection["features"]


def test_the_csv_has_a_row_per_nucleus_with_four_decimals_at_most(tmp_path):
    _, table = export(tmp_path)
    rows = rows_of(tmp_path / "a_nuclei.csv")
    assert list(rows[0]) == list(table)
    assert [row["area_px"] for row in rows] == [str(area) for area in table["area_px"]]
    assert [row["touches_border"] for row in rows[:3]] == ["0", "1", "0"]
    for key in ("y", "x", "area_um2", "orientation"):
        np.testing.assert_allclose([float(row[key]) for row in rows], table[key], atol=5e-5)
        assert max(len(row[key].partition(".")[2]) for row in rows) <= 4


def test_without_a_pixel_size_the_micrometres_stay_empty(tmp_path):
    export(tmp_path, pixel_size_um=None)
    assert all(row["area_um2"] == "" for row in rows_of(tmp_path / "a_nuclei.csv"))
    for feature in features_of(tmp_path / "a_nuclei.geojson"):
        assert "area_um2" not in feature["properties"]["measurements"]
    assert pixel_size.pixel_size_um(tmp_path / "a_labels.tif") is None
    assert parquet.read_table(tmp_path / "a_nuclei.parquet")["area_um2"].null_count == 17
    assert b"pixel_size_um" not in parquet.read_schema(tmp_path / "a_nuclei.parquet").metadata


def test_geojson_polygons_are_valid_and_have_the_nuclei_s_areas(tmp_path):
    _, table = export(tmp_path)
    for feature, area in zip(
        features_of(tmp_path / "a_nuclei.geojson"), table["area_px"], strict=True
    ):
        polygon = shapely.from_geojson(json.dumps(feature["geometry"]))
        assert shapely.is_valid(polygon)
        assert polygon.area == area
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]


def test_geojson_has_what_qupath_reads(tmp_path):
    """QuPathTypeAdapters.java: an id that is no UUID is dropped, measures must be numbers."""
    _, table = export(tmp_path)
    features = features_of(tmp_path / "a_nuclei.geojson")
    for number, feature in zip(table["id"], features, strict=True):
        properties = feature["properties"]
        assert feature["type"] == "Feature"
        assert properties["objectType"] == "detection"
        assert properties["classification"] == {"name": "Nucleus", "color": [255, 224, 0]}
        assert properties["name"] == str(number)
        assert properties["measurements"]["id"] == number
        assert all(type(value) in (int, float) for value in properties["measurements"].values())
    assert len({uuid.UUID(feature["id"]) for feature in features}) == len(features)


def test_a_nucleus_keeps_its_uuid_when_it_is_exported_again(tmp_path):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        export(tmp_path / folder)
        export(tmp_path / folder, "b")
    texts = [(tmp_path / folder / "a_nuclei.geojson").read_text() for folder in ("first", "second")]
    assert texts[0] == texts[1] != (tmp_path / "first" / "b_nuclei.geojson").read_text()


def test_the_parquet_has_the_csv_s_numbers_and_says_units_and_pixel_size(tmp_path):
    labels, rings = draw(17)
    columns = measures(labels)
    columns["orientation"][3] = np.nan
    made_with = MADE_WITH | {"pixel_size": 0.25}
    with exports.NucleiFiles(tmp_path, "Größe", SHAPE, ALL, made_with) as files:
        files.add(columns, rings)
    table = parquet.read_table(tmp_path / "Größe_nuclei.parquet")
    with (tmp_path / "Größe_nuclei.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for key in table.column_names:
        assert table[key].to_pylist() == [float(row[key]) if row[key] else None for row in rows]
    assert table["orientation"][3].as_py() is None and table["id"].to_pylist() == list(range(1, 18))
    units = {field.name: (field.metadata or {}).get(b"unit") for field in table.schema}
    assert (units["x"], units["area_um2"], units["orientation"]) == (b"px", b"um^2", b"rad")
    facts = table.schema.metadata
    assert facts[b"image"].decode() == "Größe" and float(facts[b"pixel_size_um"]) == 0.25
    assert (facts[b"height"], facts[b"width"]) == (b"120", b"150")
    assert json.loads(facts[b"made_with"]) == made_with


def test_a_parquet_comes_in_groups_of_rows_as_the_nuclei_do(tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "BATCH", 2)
    monkeypatch.setattr(nuclei_tables, "ROW_GROUP", 6)
    export(tmp_path, formats=("parquet",))
    with parquet.ParquetFile(tmp_path / "a_nuclei.parquet") as file:
        groups = range(file.num_row_groups)
        assert [file.metadata.row_group(group).num_rows for group in groups] == [6, 6, 5]
        assert file.read(["id"])["id"].to_pylist() == list(range(1, 18))


@pytest.mark.parametrize("count", [0, 17])
@pytest.mark.parametrize("table", ["csv", "parquet"])
def test_measures_are_read_from_either_table(tmp_path, table, count):
    _, columns = export(tmp_path, count=count, formats=(table,))
    assert [path.name for path in sorted(tmp_path.iterdir())][1:] == [f"a_nuclei.{table}"]
    found = exports.read_measures(tmp_path, "a", ("x", "area_px", "y"))
    assert list(found) == ["x", "area_px", "y"]
    for key, values in found.items():
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, columns[key], atol=5e-5)
    exports.check_exports(tmp_path, "a", (table,))


@pytest.mark.parametrize("table", ["csv", "parquet"])
def test_a_table_without_the_column_is_refused(tmp_path, table):
    export(tmp_path, formats=(table,))
    with pytest.raises(InputError, match=f"a_nuclei.{table}: .*depth"):
        exports.read_measures(tmp_path, "a", ("x", "depth"))


def test_without_any_table_both_are_named(tmp_path):
    for read in (exports.check_exports, lambda *image: exports.read_measures(*image, ("x",))):
        with pytest.raises(InputError, match=r"a_nuclei.csv: not found, nor a_nuclei.parquet"):
            read(tmp_path, "a")


def test_the_gzipped_geojson_is_the_geojson(tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "BATCH", 3)  # several members
    for count in (0, 17):
        export(tmp_path, count=count)
        plain = (tmp_path / "a_nuclei.geojson").read_bytes()
        packed = (tmp_path / "a_nuclei.geojson.gz").read_bytes()
        assert gzip.decompress(packed) == plain
    again = tmp_path / "again"
    again.mkdir()
    export(again)
    assert (again / "a_nuclei.geojson.gz").read_bytes() == packed
    annotation = open_annotation(tmp_path / "a_nuclei.geojson.gz", SHAPE)
    found = annotation.numbers(0, 0, *SHAPE)
    np.testing.assert_array_equal(found > 0, draw(17)[0] > 0)


JAVA = """
import java.io.*; import java.nio.file.*; import java.util.zip.*;
class Unpack { public static void main(String[] files) throws IOException {
    try (var packed = new BufferedInputStream(Files.newInputStream(Path.of(files[0])));
         var text = new GZIPInputStream(packed)) { text.transferTo(System.out); } } }
"""


@pytest.mark.skipif(not shutil.which("javac"), reason="no Java compiler")
def test_java_unpacks_the_gzipped_geojson_as_qupath_does(tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "BATCH", 3)
    export(tmp_path)
    (tmp_path / "Unpack.java").write_text(JAVA)
    command = ["java", tmp_path / "Unpack.java", tmp_path / "a_nuclei.geojson.gz"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == (tmp_path / "a_nuclei.geojson").read_bytes()


@pytest.mark.skipif(not HAS_ANNDATA, reason="anndata is not installed")
@pytest.mark.parametrize("um", [0.25, None])
def test_anndata_has_measures_places_and_units(tmp_path, um):
    import anndata

    _, columns = export(tmp_path, pixel_size_um=um)
    found = anndata.read_h5ad(tmp_path / "a_nuclei.h5ad")
    known = ["area_px", "area_um2", "orientation"] if um else ["area_px", "orientation"]
    assert list(found.var_names) == known and found.X.dtype == np.float32
    assert list(found.var["unit"]) == (["px^2", "um^2", "rad"] if um else ["px^2", "rad"])
    for key in known:
        np.testing.assert_allclose(found[:, key].X.ravel(), columns[key], rtol=1e-6, atol=5e-5)
    assert list(found.obs_names) == [str(number) for number in columns["id"]]
    assert list(found.obs["touches_border"]) == list(columns["touches_border"])
    for key in ("y", "x"):
        np.testing.assert_allclose(found.obs[key], columns[key], atol=5e-5)
    corner = np.stack([columns["x"] + 0.5, columns["y"] + 0.5], axis=1)
    np.testing.assert_allclose(found.obsm["spatial"], corner * (um or 1), atol=1e-4)
    assert found.uns["spatial_unit"] == ("um" if um else "px")
    assert (found.uns["image"], found.uns["height"], found.uns["width"]) == ("a", *SHAPE)
    assert found.uns.get("pixel_size_um") == um
    assert json.loads(found.uns["made_with"]) == MADE_WITH | {"pixel_size": um}


def test_without_anndata_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(nuclei_tables, "find_spec", lambda name: None)
    nuclei_tables.check_packages(["rois", "csv"])
    with pytest.raises(InputError, match=r"requirements-anndata.txt"):
        export(tmp_path, formats=("csv", "anndata"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("is_big", "more", "expected"),
    [
        (False, None, {"csv", "geojson"}),
        (True, None, {"parquet", "geojson_gz"}),
        (False, [], {"csv", "geojson", "rois", "coco"}),
        (True, ["csv", "rois"], {"parquet", "geojson_gz", "csv", "rois"}),
        (False, ["anndata", "csv"], {"csv", "geojson", "anndata"}),
    ],
)
def test_the_formats_of_an_image_go_by_its_size_and_by_the_flag(is_big, more, expected):
    assert set(exports.formats_of(is_big, more)) == expected


@pytest.mark.skipif(not shutil.which("ogrinfo"), reason="GDAL's ogrinfo is not installed")
@pytest.mark.parametrize("count", [0, 1, 17])
def test_gdal_opens_the_geojson(tmp_path, count):
    export(tmp_path, count=count)
    command = ["ogrinfo", "-ro", "-so", "-al", tmp_path / "a_nuclei.geojson"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"Feature Count: {count}\n" in done.stdout
    assert count == 0 or "Geometry: Polygon" in done.stdout


def test_imagej_gets_a_polygon_named_by_id_for_each_nucleus(tmp_path):
    _, table = export(tmp_path)
    rois = roifile.roiread(tmp_path / "a_rois.zip")
    assert [roi.name for roi in rois] == [str(number) for number in table["id"]]
    assert {roi.roitype for roi in rois} == {roifile.ROI_TYPE.POLYGON}
    assert [shapely.Polygon(roi.coordinates()).area for roi in rois] == list(table["area_px"])
    with zipfile.ZipFile(tmp_path / "a_rois.zip") as archive:
        assert archive.namelist() == [f"{number}.roi" for number in table["id"]]


def test_far_from_the_corner_of_a_slide_all_polygons_are_exact(tmp_path):
    labels, rings = draw(3)
    table, far = measures(labels), np.array([90_000, 70_001])
    with exports.NucleiFiles(tmp_path, "slide", (100_000, 100_000), ALL) as files:
        files.add(table, [ring + far for ring in rings])
    exports.check_exports(tmp_path, "slide")
    for roi, ring in zip(roifile.roiread(tmp_path / "slide_rois.zip"), rings, strict=True):
        np.testing.assert_array_equal(roi.coordinates(), (ring + far)[:-1])


def test_pycocotools_rebuilds_the_label_image(tmp_path, capsys):
    labels, table = export(tmp_path)
    coco = COCO(tmp_path / "a_coco.json")
    (picture,) = coco.loadImgs(coco.getImgIds())
    assert (picture["file_name"], picture["height"], picture["width"]) == ("a_image.png", *SHAPE)
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["nucleus"]
    assert sorted(coco.getAnnIds()) == list(table["id"])
    for annotation in coco.loadAnns(coco.getAnnIds()):
        nucleus = labels == annotation["id"]
        y, x = np.nonzero(nucleus)
        assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        assert annotation["area"] == nucleus.sum()
        assert annotation["iscrowd"] == 0
        np.testing.assert_array_equal(coco.annToMask(annotation).astype(bool), nucleus)


@pytest.mark.parametrize(("largest", "dtype"), [(65535, np.uint16), (65536, np.uint32)])
def test_labels_are_stored_in_the_smallest_type_that_holds_them(tmp_path, largest, dtype):
    labels = np.zeros((300, 270), np.int32)  # no whole number of tiles
    labels[299, 269], labels[3, 2] = largest, 7
    (tmp_path / "instance_labels").mkdir()
    path = tmp_path / "instance_labels" / "a_labels.tif"
    write_labels(path, labels, 0.2425)
    stored = tifffile.imread(path)
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, labels)
    np.testing.assert_array_equal(masks.read_mask(path), labels > 0)
    assert pixel_size.pixel_size_um(path) == pytest.approx(0.2425, rel=1e-6)
    with tifffile.TiffFile(path) as tif:
        assert tif.pages.first.is_tiled
        assert tif.pages.first.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert not tif.is_bigtiff


def test_nuclei_in_many_batches_give_the_files_of_one(tmp_path, monkeypatch):
    export(tmp_path)
    labels, rings = draw(17)
    table = measures(labels)
    with exports.NucleiFiles(tmp_path, "b", SHAPE, ALL) as files:
        for part in (slice(0, 0), slice(0, 5), slice(5, 5), slice(5, 17)):
            files.add({key: column[part] for key, column in table.items()}, rings[part])
        assert files.count == 17
    monkeypatch.setattr(exports, "BATCH", 4)
    export(tmp_path, "c")
    for other in ("b", "c"):
        exports.check_exports(tmp_path, other)
        first, second = (tmp_path / f"{name}_nuclei.csv" for name in ("a", other))
        assert first.read_bytes() == second.read_bytes()
        first, second = (roifile.roiread(tmp_path / f"{name}_rois.zip") for name in ("a", other))
        assert first == second
        first, second = (
            json.loads((tmp_path / f"{name}_coco.json").read_text()) for name in ("a", other)
        )
        assert first["annotations"] == second["annotations"]


NO_UTF8 = pytest.param(os.fsdecode(b"caf\xe9"), id="no UTF-8")


@pytest.mark.parametrize("name", [*NAMES, NO_UTF8])
def test_any_name_is_right_in_every_file(tmp_path, name):
    _, table = export(tmp_path, name)
    checked = exports.check_exports(tmp_path, name)
    assert checked.nuclei == 17
    assert checked.area_px == table["area_px"].sum()
    assert len(checked.files) == len(ALL) + 1
    assert {path.name for path in tmp_path.iterdir()} == set(checked.files)
    coco = json.loads((tmp_path / f"{name}_coco.json").read_text(encoding="utf-8"))
    assert coco["images"][0]["file_name"] == f"{name}_image.png"


@pytest.mark.parametrize("count", [0, 1])
def test_no_nucleus_and_one_nucleus_are_whole_files(tmp_path, count, capsys):
    _, table = export(tmp_path, count=count)
    assert exports.check_exports(tmp_path, "a").nuclei == count
    assert (tmp_path / "a_nuclei.csv").read_text().splitlines()[0].split(",") == list(table)
    assert len(features_of(tmp_path / "a_nuclei.geojson")) == count
    assert len(COCO(tmp_path / "a_coco.json").getAnnIds()) == count
    with zipfile.ZipFile(tmp_path / "a_rois.zip") as archive:
        assert len(archive.namelist()) == count


def test_an_image_without_a_single_batch_still_has_its_files(tmp_path):
    with exports.NucleiFiles(tmp_path, "a", SHAPE, ALL):
        pass
    assert exports.check_exports(tmp_path, "a").nuclei == 0


def test_a_run_that_fails_leaves_the_old_files_and_nothing_beside_them(tmp_path):
    export(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    labels, rings = draw(4)
    with pytest.raises(RuntimeError), exports.NucleiFiles(tmp_path, "a", SHAPE, ALL) as files:
        files.add(measures(labels), rings)
        raise RuntimeError
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_formats_of_an_earlier_run_do_not_stay_with_ids_that_no_longer_hold(tmp_path):
    export(tmp_path)
    export(tmp_path, formats=("csv", "geojson"), count=4)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a_nuclei.csv", "a_nuclei.geojson", "a_labels.tif"}


def test_other_columns_or_too_few_outlines_are_refused(tmp_path):
    labels, rings = draw(3)
    table = measures(labels)
    with exports.NucleiFiles(tmp_path, "a", SHAPE) as files:
        with pytest.raises(ValueError, match="2 rings for 3 nuclei"):
            files.add(table, rings[:2])
        with pytest.raises(ValueError, match="as before"):
            files.add({"id": table["id"]}, rings)


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def without_second_line(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:]))


def other_pixel(path):
    labels = tifffile.imread(path)
    labels[15, 15] = 2
    write_labels(path, labels, None)


def of_others(path):
    """Put a table of fewer nuclei in the place of a file."""
    export(path.parent, "b", 16)
    (path.parent / path.name.replace("a_", "b_", 1)).replace(path)


DIFFERENCES = [
    ("geojson", without_second_line, "found 16 nuclei, expected 17"),
    ("geojson", lambda path: change(path, '{"id":3,', '{"id":33,'), "id 33 at nucleus 3"),
    ("geojson", lambda path: change(path, "]}\n", ""), "cannot be read back"),
    ("coco", lambda path: change(path, '"id":5,', '"id":4,'), "id 4 at nucleus 5, expected id 5"),
    ("rois", lambda path: path.write_bytes(path.read_bytes()[:-30]), "cannot be read back"),
    ("geojson_gz", lambda path: path.write_bytes(path.read_bytes()[:-30]), "cannot be read back"),
    ("geojson_gz", lambda path: path.write_bytes(b"{}"), "cannot be read back"),
    ("parquet", lambda path: path.write_bytes(path.read_bytes()[:-30]), "cannot be read back"),
    ("parquet", of_others, "found 16 nuclei, expected 17"),
    ("anndata", of_others, "found 16 nuclei, expected 17"),
    ("anndata", lambda path: path.write_bytes(path.read_bytes()[:900]), "cannot be read back"),
    ("labels", other_pixel, "for nucleus 1, expected"),
    ("labels", lambda path: path.write_bytes(path.read_bytes()[:40]), "cannot be read back"),
    ("csv", lambda path: change(path, "\n3,", "\n2,"), "twice"),
    ("csv", lambda path: path.write_text(""), "cannot be read back"),
]


@pytest.mark.parametrize(("key", "spoil", "text"), DIFFERENCES)
def test_a_file_that_differs_is_named_with_the_first_difference(tmp_path, key, spoil, text):
    export(tmp_path)
    path = path_of(tmp_path, "a", key)
    spoil(path)
    with pytest.raises(InputError, match=text) as error:
        exports.check_exports(tmp_path, "a")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
