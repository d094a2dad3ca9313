"""Regions: outlined or painted, opened, counted, and looked at alone."""

import json
import os

import cv2
import numpy as np
import pytest
import tifffile
from shapely.geometry import Polygon, box, mapping

from tests.pictures import refusal, with_palette
from tests.scripts import call, infer, table_of
from tests.test_review import checkpoint  # noqa: F401, a fixture
from tissue import masks
from tissue.files import InputError
from tissue.palettes import MAP_COLOURS
from tissue.regions import open_regions
from tissue.synthetic import draw_tissue

SHAPE = (200, 300)
# inference.py as a program, to which all images are big: for `call`
ALL_BIG = """
import sys
import inference
from tissue import windows
windows.BIG = 1
inference.main(inference.parse_args(sys.argv[1:]))
"""


def feature(geometry, label=None, name=None, kind="annotation"):
    properties = {"objectType": kind}
    properties |= {"classification": {"name": label}} if label else {}
    properties |= {"name": name} if name else {}
    return {"type": "Feature", "geometry": mapping(geometry), "properties": properties}


def write_regions(path, *features):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


@pytest.fixture
def opened(tmp_path):
    """Opens regions, given as features, of an image of SHAPE."""
    return lambda *features: open_regions(write_regions(tmp_path / "a.geojson", *features), SHAPE)


def counts_of(areas, points):
    """[(name, class, pixels, nuclei, sum of their values)], nuclei being (y, x, value)."""
    y, x, value = np.array(points, float).reshape(-1, 3).T
    pixels, nuclei, sums = areas.count(y, x, value[:, None])
    return [(*r, int(p), int(n), s) for r, p, n, s in zip(
        areas.regions, pixels, nuclei, sums[:, 0].tolist(), strict=True)]  # fmt: skip


# --- opening and counting


def test_pixels_and_nuclei_of_two_regions_by_hand(opened):
    areas = opened(feature(box(0, 0, 100, 50), "Tumor"), feature(box(100, 0, 110, 200), "Stroma"))
    # Centroids are whole numbers at pixel centres: column 99.5 is the border, half-open.
    points = [(0, 99.4, 1.0), (49.4, 99.5, 2.0), (49.5, 0, 4.0), (199.4, 109.4, 8.0), (10, 110, 16)]
    assert counts_of(areas, points) == [
        ("Tumor", "Tumor", 5000, 1, 1.0),
        ("Stroma", "Stroma", 2000, 2, 10.0),
    ]
    assert areas.notes == ()


def test_a_hole_is_not_in_its_region_and_several_parts_are_one(opened):
    ring = Polygon(box(0, 0, 20, 20).exterior, [box(5, 5, 15, 15).exterior])
    both = ring.union(box(100, 0, 110, 10))
    areas = opened(feature(both, "Gland"))
    points = [(10, 10, 1.0), (4, 10, 2.0), (5, 105, 4.0)]
    assert counts_of(areas, points) == [("Gland", "Gland", 400, 2, 6.0)]


def test_a_class_of_several_regions_comes_as_a_whole_too_and_overlaps_are_counted_in_each(opened):
    tumors = [feature(box(0, 0, 20, 10), "Tumor"), feature(box(10, 0, 30, 10), "Tumor")]
    areas = opened(*tumors, feature(box(0, 50, 9, 60), "Stroma"))
    assert counts_of(areas, [(5, 15, 3.0), (5, 5, 1.0)]) == [
        ("Tumor 1", "Tumor", 200, 2, 4.0),
        ("Tumor 2", "Tumor", 200, 1, 3.0),
        ("Stroma", "Stroma", 90, 0, 0.0),
        ("", "Tumor", 300, 2, 4.0),
    ]
    (note,) = areas.notes
    assert "overlap" in note and "counted in each" in note


def test_regions_have_their_own_name_or_their_class_or_a_number(opened):
    given = [("Tumor", "front"), ("Tumor", None), (None, "front"), (None, None), (None, "front 1")]
    boxes = [box(20 * i, 0, 20 * i + 10, 10) for i in range(5)]
    areas = opened(*(feature(b, *names) for b, names in zip(boxes, given, strict=True)))
    assert areas.regions == [
        ("front 2", "Tumor"),
        ("Tumor", "Tumor"),
        ("front 3", ""),
        ("region 1", ""),
        ("front 1", ""),
        ("", "Tumor"),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_regions_cut_along_any_line_add_up_to_the_whole(opened, generator, seed):
    random = np.random.default_rng(seed)
    height, width = SHAPE
    y = np.linspace(0, height, 9)
    x = random.integers(1, 2 * width, 9) / 2
    line = np.stack([x, y], axis=1)
    left = Polygon([(0, 0), *line, (0, height)]), Polygon([(width, 0), *line, (width, height)])
    areas = opened(*(feature(part) for part in left))
    # Many centroids lie right on borders of pixels.
    points = np.stack([random.integers(0, 2 * height - 1, 4000) / 2,
                       random.integers(0, 2 * width - 1, 4000) / 2,
                       random.integers(1, 9, 4000)], axis=1)  # fmt: skip
    found = counts_of(areas, points)
    pixels, nuclei, values = (sum(row[at] for row in found) for at in (2, 3, 4))
    assert (pixels, nuclei, values) == (height * width, 4000, points[:, 2].sum())


def test_windows_are_the_pixels_that_are_counted(opened):
    areas = opened(feature(Polygon([(10, 10), (200, 30), (90, 150)]), "Tumor"))
    whole = areas.within(0, 0, *SHAPE)
    assert whole.sum() == counts_of(areas, [])[0][2]
    np.testing.assert_array_equal(areas.within(40, 50, 70, 60), whole[40:110, 50:110])


def test_outlines_of_nuclei_in_an_export_of_qpath_are_no_regions(opened):
    nuclei = [feature(box(i, 0, i + 5, 5), "Nucleus", kind="detection") for i in range(3)]
    of_0_2 = feature(box(20, 0, 25, 5), kind=None) | {"id": "PathDetectionObject"}
    areas = opened(feature(box(0, 0, 50, 50), "Tumor"), *nuclei, of_0_2)
    assert areas.regions == [("Tumor", "Tumor")]
    assert any("detections and cells, passed over: 4" in note for note in areas.notes)


@pytest.mark.parametrize("label", ["Ignore*", "__ignore__", "ignored"])
def test_what_is_ignored_is_in_no_region_and_none_itself(opened, label):
    areas = opened(
        feature(box(0, 0, 100, 50), "Tumor"),
        feature(box(50, 0, 200, 40), label, "holes"),
        feature(box(60, 10, 70, 20), "Stroma"),
    )
    points = [(10, 20, 1.0), (10, 65, 2.0), (10, 150, 4.0), (45, 80, 8.0)]
    assert counts_of(areas, points) == [("Tumor", "Tumor", 50 * 50 + 50 * 10, 2, 9.0)]
    assert not areas.within(0, 50, 40, 250).any()
    assert [note.partition(": ")[2] for note in areas.notes] == [
        "areas of a class Ignore*, left out: 1",
        "regions wholly within these, passed over: 1",
    ]


def test_rois_are_regions_with_their_names(tmp_path):
    import roifile

    roi = roifile.ImagejRoi.frompoints(np.array([[0, 0], [40, 0], [40, 30], [0, 30]]), name="edge")
    roi.roitype = roifile.ROI_TYPE.POLYGON
    roi.tofile(tmp_path / "a.zip")
    areas = open_regions(tmp_path / "a.zip", SHAPE)
    assert counts_of(areas, []) == [("edge", "", 1200, 0, 0.0)]


def painted(path, pixels):
    path.parent.mkdir(exist_ok=True)
    tifffile.imwrite(path, pixels) if path.suffix == ".tif" else cv2.imwrite(str(path), pixels)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("step", [1, 4])
def test_an_image_of_numbers_is_a_region_for_each_value_at_full_size_or_less(tmp_path, name, step):
    pixels = np.zeros(SHAPE, np.uint8)
    pixels[:100, :200], pixels[100:, 200:] = 2, 7
    areas = open_regions(painted(tmp_path / name, pixels[::step, ::step].copy()), SHAPE)
    points = [(99.4, 199.4, 1.0), (99.5, 199.5, 2.0), (150, 100, 4.0)]
    assert counts_of(areas, points) == [("2", "2", 20_000, 1, 1.0), ("7", "7", 10_000, 1, 2.0)]
    np.testing.assert_array_equal(areas.within(90, 190, 30, 30), pixels[90:120, 190:220] > 0)
    assert any("2 values" in note for note in areas.notes)
    assert any("enlarged from 50 x 75" in note for note in areas.notes) == (step == 4)


PALETTES = {  # colours, the index of the region's pixels and of the others, the region's number
    "white first": ([(255,) * 3, (0,) * 3], 0, 1, "255"),
    "black first": ([(0,) * 3, (255,) * 3], 1, 0, "255"),
    "greys": ([(90,) * 3, (0,) * 3, (30,) * 3], 2, 1, "30"),
    "colours": ([(0, 0, 0), (200, 0, 0), (0, 0, 200)], 2, 0, "2"),
    "colours on white": ([(255, 255, 255), (200, 0, 0)], 1, 0, "1"),
    "inverting LUT of ImageJ": ([(255 - i,) * 3 for i in range(256)], 255, 0, "255"),
    "map of inference.py": ([*MAP_COLOURS], 5, 0, "5"),
}


@pytest.mark.parametrize("case", PALETTES.values(), ids=PALETTES)
def test_regions_of_a_palette_of_greys_are_what_it_shows_and_of_colours_its_indices(tmp_path, case):
    colours, inside, outside, number = case
    pixels = np.full(SHAPE, outside, np.uint8)
    pixels[:50, :100] = inside
    with_palette(pixels, colours)(tmp_path / "a.png")
    areas = open_regions(tmp_path / "a.png", SHAPE)
    assert counts_of(areas, [(20, 20, 3.0)]) == [(number, number, 5000, 1, 3.0)]
    assert areas.within(49, 99, 2, 2).tolist() == [[True, False], [False, False]]


def test_a_palette_of_colours_whose_black_is_not_first_is_refused(tmp_path):
    pixels = np.zeros(SHAPE, np.uint8)
    pixels[:50] = 1
    with_palette(pixels, [(200, 0, 0), (0, 0, 0)])(tmp_path / "a.png")
    refusal(lambda p: open_regions(p, SHAPE), tmp_path / "a.png", "black is not index 0")


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros(SHAPE, np.uint8), "nothing but 0"),
        (np.ones((200, 299), np.uint8), "200 x 299"),
        (np.ones((150, 225), np.uint8), "150 x 225"),
        (np.arange(60_000, dtype=np.uint16).reshape(SHAPE), "more than 100 values"),
        (np.full(SHAPE, 0.5, np.float32), "no whole numbers"),
        (np.full(SHAPE, -1, np.int16), "no whole numbers"),
    ],
)
def test_images_that_are_no_classes_are_refused(tmp_path, pixels, words):
    path = painted(tmp_path / "a.tif", pixels)
    refusal(lambda p: open_regions(p, SHAPE), path, words)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ([], "no region"),
        ([feature(box(0, 0, 50, 50), "Ignore*")], "a class Ignore*, left out: 1"),
        ([feature(box(0, 0, 5, 5), kind="detection")], "detections and cells, passed over: 1"),
        ([feature(box(0, 0, 50, 50)), feature(box(400, 0, 450, 50))], "feature 2"),
        ([feature(box(i % 300, 0, i % 300 + 1, 1)) for i in range(10_001)], "10,000"),
    ],
)
def test_files_without_regions_of_the_image_are_refused(tmp_path, features, words):
    path = write_regions(tmp_path / "a.geojson", *features)
    refusal(lambda p: open_regions(p, SHAPE), path, words)


# --- inference

QUARTERS = {  # of an image of 320 x 400, cut aslant
    "a": [(0, 0), (190, 0), (205, 150), (0, 170)],
    "b": [(190, 0), (400, 0), (400, 160), (205, 150)],
    "c": [(0, 170), (205, 150), (180, 320), (0, 320)],
    "d": [(205, 150), (400, 160), (400, 320), (180, 320)],
}
TILES = ["--tile_size", 96, "--overlap", 96]


@pytest.fixture
def slides(tmp_path):
    """A folder with two drawn images of 320 x 400 pixels."""
    (tmp_path / "slides").mkdir()
    resolution = {"resolution": (4e4, 4e4), "resolutionunit": "CENTIMETER"}
    for number in (1, 2):
        image = draw_tissue(320, 400, seed=number).image
        path = tmp_path / "slides" / f"s{number}.tif"
        tifffile.imwrite(path, image, photometric="rgb", tile=(64, 64), **resolution)
    return tmp_path / "slides"


def quarters(path):
    return write_regions(
        path, *(feature(Polygon(p), "left" if n in "ac" else "right", n) for n, p in
                QUARTERS.items())
    )  # fmt: skip


def test_counts_of_a_slide_cut_into_four_regions_add_up_to_the_whole(
    slides, tmp_path, checkpoint, capsys  # noqa: F811
):  # fmt: skip
    quarters(tmp_path / "regions" / "S1.geojson")
    write_regions(tmp_path / "regions" / "other.geojson", feature(box(0, 0, 9, 9)))
    flags = ["--ckpt", checkpoint, "--images", slides, *TILES]
    infer(tmp_path / "out", *flags, "--regions", tmp_path / "regions")
    said = capsys.readouterr().out
    assert "other.geojson: without an image of that name, passed over" in said
    assert "s2: without regions in" in said
    whole = next(row for row in table_of(tmp_path / "out" / "counts.csv") if row["image"] == "s1")
    rows = table_of(tmp_path / "out" / "regions.csv")
    assert [(r["image"], r["region"], r["class"]) for r in rows] == [
        ("s1", "a", "left"), ("s1", "b", "right"), ("s1", "c", "left"), ("s1", "d", "right"),
        ("s1", "", "left"), ("s1", "", "right"),
    ]  # fmt: skip
    for part in (rows[:4], rows[4:]):
        assert sum(int(row["nuclei"]) for row in part) == int(whole["nuclei"]) > 50
        assert sum(int(row["area_px"]) for row in part) == 320 * 400
    nuclei = table_of(tmp_path / "out" / "s1_nuclei.csv")
    for row in rows[:4]:
        own = [n for n in nuclei if Polygon(QUARTERS[row["region"]]).contains(
            box(*(float(n[k]) + 0.5 for k in "xyxy")).centroid)]  # fmt: skip
        # By the pixel of the centroid: the odd one at a slanting border may differ.
        assert abs(len(own) - int(row["nuclei"])) <= 3
        area = int(row["area_px"]) * 0.25**2 / 1e6
        assert float(row["area_mm2"]) == pytest.approx(area, abs=1e-6)
        assert float(row["nuclei_per_mm2"]) == pytest.approx(int(row["nuclei"]) / area)
    for key, column in (("nuclear_area_px", "area_px"), ("haematoxylin_od",) * 2):
        mean = np.mean([float(nucleus[column]) for nucleus in nuclei])
        parts = sum(float(row[key]) * int(row["nuclei"]) for row in rows[:4])
        assert parts / len(nuclei) == pytest.approx(mean, abs=1e-3)
    assert 'href="regions.csv"' in (tmp_path / "out" / "report.html").read_text()


def test_regions_that_come_or_change_later_are_counted_in_the_nuclei_that_are_there(
    slides, tmp_path, checkpoint, capsys  # noqa: F811
):  # fmt: skip
    out, place = tmp_path / "out", tmp_path / "regions"
    flags = ["--ckpt", checkpoint, "--images", slides, *TILES]
    infer(out, *flags)
    assert not (out / "regions.csv").exists()
    made = {path: path.stat().st_mtime_ns for path in out.glob("s?_*")}
    whole = {row["image"]: row["nuclei"] for row in table_of(out / "counts.csv")}
    write_regions(place / "s1.geojson", feature(box(0, 0, 400, 320), "all"))
    infer(out, *flags, "--regions", place)
    assert "1 of these get regions" in capsys.readouterr().out
    (row,) = table_of(out / "regions.csv")
    assert (row["region"], row["nuclei"]) == ("all", whole["s1"])
    before = (out / "rows" / "s1.json").stat().st_mtime_ns
    infer(out, *flags, "--regions", place)  # nothing to do
    assert (out / "rows" / "s1.json").stat().st_mtime_ns == before
    quarters(place / "s1.geojson")
    write_regions(place / "s2.geojson", feature(box(0, 0, 100, 100), "corner"))
    infer(out, *flags, "--regions", place)
    assert len(table_of(out / "regions.csv")) == 7
    infer(tmp_path / "at once", *flags, "--regions", place)  # tissue is counted on the way then
    assert table_of(tmp_path / "at once" / "regions.csv") == table_of(out / "regions.csv")
    infer(out, "--ckpt", checkpoint, "--images", slides / "s2.tif", *TILES)  # of the record
    assert [row["image"] for row in table_of(out / "regions.csv")] == ["s1"] * 6 + ["s2"]
    assert made == {path: path.stat().st_mtime_ns for path in out.glob("s?_*")}


def test_only_regions_are_predicted_and_what_lies_outside_is_no_nucleus(
    slides, tmp_path, checkpoint, capsys  # noqa: F811
):  # fmt: skip
    place = tmp_path / "regions"
    flags = ["--ckpt", checkpoint, "--images", slides / "s1.tif", *TILES]
    write_regions(place / "s1.geojson", feature(box(10, 100, 90, 180), "Tumor"))
    infer(tmp_path / "whole", *flags)
    capsys.readouterr()
    infer(tmp_path / "out", *flags, "--regions", place, "--only_regions")
    # 20 tiles of 96 pixels cover 320 x 400; the region lies in one of them.
    assert f"{1 - 96 * 96 / (320 * 400):.0%} of it is outside regions or glass" in (
        capsys.readouterr().out
    )
    name = "s1_prediction.png"
    whole, found = (masks.read_mask(tmp_path / folder / name) for folder in ("whole", "out"))
    inside = np.zeros((320, 400), bool)
    inside[100:180, 10:90] = True
    assert found[inside].any() and not found[~inside].any()
    middle = np.s_[120:160, 30:70]  # away from nuclei that are cut at the border
    np.testing.assert_array_equal(found[middle], whole[middle])
    record = json.loads((tmp_path / "out" / "rows" / "s1.json").read_text())
    assert record["row"]["outside"] == pytest.approx(1 - 80 * 80 / (320 * 400))
    assert record["row"]["tissue"] <= 80 * 80 / (320 * 400)
    (row,) = table_of(tmp_path / "out" / "regions.csv")
    (counted,) = table_of(tmp_path / "out" / "counts.csv")
    assert row["nuclei"] == counted["nuclei"]

    # The same again does nothing; other regions, or all of the image, are predicted anew.
    path = tmp_path / "out" / name
    before = path.stat().st_mtime_ns
    infer(tmp_path / "out", *flags, "--regions", place, "--only_regions")
    assert path.stat().st_mtime_ns == before
    write_regions(place / "s1.geojson", feature(box(200, 200, 300, 300), "Tumor"))
    infer(tmp_path / "out", *flags, "--regions", place, "--only_regions")
    found = masks.read_mask(path)
    assert found[200:300, 200:300].any() and not found[:200].any()
    infer(tmp_path / "out", *flags, "--regions", place)
    np.testing.assert_array_equal(masks.read_mask(path), whole)


def check_refused(slides, folder, checkpoint, flags, words):  # noqa: F811
    """That a call on both slides, of which `folder` has masks, too, ends before it writes."""
    for name in ("s1", "s2"):
        painted(folder / "masks" / f"{name}.png", np.zeros((320, 400), np.uint8))
    with pytest.raises(InputError, match=words):
        infer(folder / "out", "--ckpt", checkpoint, "--images", slides, *flags)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only_regions"], "--regions"),
        (["--regions", "nowhere"], "--regions nowhere: no such folder, expected"),
        (["--regions", "bad/s1.geojson"], r"bad/s1\.geojson: found a file, expected a folder"),
        (["--regions", "others"], "no regions of any image"),
        (["--regions", "regions", "--only_regions"], "s2"),
        (["--regions", "bad"], "feature 1"),
        (["--regions", "regions", "--only_regions", "--masks", "masks"], "references"),
    ],
)
def test_regions_that_cannot_be_used_are_refused_before_anything_is_written(
    slides, tmp_path, checkpoint, monkeypatch, flags, words  # noqa: F811
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_regions(tmp_path / "regions" / "s1.geojson", feature(box(0, 0, 9, 9)))
    write_regions(tmp_path / "bad" / "s1.geojson", feature(box(900, 0, 909, 9)))
    write_regions(tmp_path / "others" / "s3.geojson", feature(box(0, 0, 9, 9)))
    check_refused(slides, tmp_path, checkpoint, flags, words)


def test_areas_without_a_pixel_size_are_in_pixels(tmp_path, checkpoint):  # noqa: F811
    (tmp_path / "images").mkdir()
    image = draw_tissue(160, 160, seed=1).image
    cv2.imwrite(str(tmp_path / "images" / "p.png"), image[..., ::-1])
    write_regions(tmp_path / "regions" / "p.geojson", feature(box(0, 0, 80, 160), "Tumor"))
    flags = ["--ckpt", checkpoint, "--images", tmp_path / "images", "--density"]
    infer(tmp_path / "out", *flags, "--regions", tmp_path / "regions")
    (row,) = table_of(tmp_path / "out" / "regions.csv")
    assert row["area_px"] == str(80 * 160) and float(row["nuclear_area_px"]) > 0
    assert [row[key] for key in ("area_mm2", "nuclei_per_mm2", "nuclear_area_um2")] == [""] * 3
    assert not list((tmp_path / "out").glob("*density*"))


@pytest.mark.slow
def test_two_processes_count_in_regions_as_one_does(slides, tmp_path, checkpoint):  # noqa: F811
    for name in ("s1", "s2"):
        quarters(tmp_path / "regions" / f"{name}.geojson")
        os.utime(tmp_path / "regions" / f"{name}.geojson", (1e9, 1e9))
    tables = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        flags = ["--images", slides, "--regions", tmp_path / "regions", "--only_regions"]
        flags += ["--image_folder", out, "--ckpt", checkpoint, "--gpu_id", -1, *TILES]
        call(tmp_path, ALL_BIG, flags, processes)
        tables.append((out / "regions.csv").read_text())
    assert tables[0] == tables[1] and len(tables[0].splitlines()) == 13


def test_an_image_without_nuclei_has_regions_without_any(tmp_path, checkpoint):  # noqa: F811
    painted(tmp_path / "images" / "glass.png", np.full((160, 160, 3), 244, np.uint8))
    write_regions(tmp_path / "regions" / "glass.geojson", feature(box(0, 0, 80, 160), "=1+1"))
    flags = ["--ckpt", checkpoint, "--images", tmp_path / "images", "--pixel_size", 0.25]
    infer(tmp_path / "out", *flags, "--regions", tmp_path / "regions", "--density")
    (row,) = table_of(tmp_path / "out" / "regions.csv")
    assert row["region"] == row["class"] == "'=1+1"  # no formula
    assert (row["nuclei"], row["area_px"], row["area_mm2"]) == ("0", "12800", "0.000800")
    assert row["nuclei_per_mm2"] == "0.0000" and row["haematoxylin_od"] == ""
    assert not tifffile.imread(tmp_path / "out" / "glass_density.tif").any()
