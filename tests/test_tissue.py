"""Where tissue is: artefacts told apart, maps written and read, files of the user's, inference."""

import json

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from shapely.geometry import Polygon, box

from experiments.artefacts import mosaic, with_artefacts
from tests.pictures import refusal
from tests.scripts import call, infer, table_of
from tests.test_outline_files import roi_of, roi_zip
from tests.test_regions import (  # noqa: F401
    ALL_BIG,
    check_refused,
    feature,
    painted,
    quarters,
    slides,
    write_regions,
)
from tests.test_review import checkpoint  # noqa: F401, a fixture
from tissue import masks
from tissue.artefacts import ARTEFACTS, CLASSES, Map, Marked, are_likely, find, open_map
from tissue.regions import open_regions
from tissue.synthetic import draw_tissue
from tissue.windows import from_array

SHAPE = (200, 300)
UM = 0.5


@pytest.fixture(scope="module")
def slide():
    """RGB of 1 mm of synthetic tissue with glass around, at UM."""
    drawn = [(draw_tissue(500, 500, seed=seed).image, np.ones((500, 500), int)) for seed in (1, 2)]
    return mosaic(drawn, 2000)[0]


def classes_at(found, shape):
    """The class of each pixel of an image, by the nearest of a thumbnail."""
    return cv2.resize(found, shape[::-1], interpolation=cv2.INTER_NEAREST)


# --- finding


def test_clean_tissue_is_tissue_and_glass_is_glass(slide):
    found = classes_at(find(from_array(slide), UM), slide.shape[:2])
    assert set(np.unique(found)) == {0, 1}
    assert (found[256:-256, 256:-256] == 1).mean() > 0.99  # but for a corner that is drawn as glass
    assert (found[:200] == 0).all() and (found[:, -200:] == 0).all()


def test_drawn_artefacts_are_found_by_their_names_and_the_rest_is_kept(slide):
    drawn, truth = with_artefacts(slide, UM)
    found = classes_at(find(from_array(drawn), UM), slide.shape[:2])
    for name, mask in truth.items():
        kind = name.split()[0]
        if name not in ("fold of two layers", "blur of 2 um"):  # of these a part is found
            assert (found[mask] == CLASSES.index(kind)).mean() > (
                0.6 if kind == "fold" else 0.85
            ), name
    clean = classes_at(find(from_array(slide), UM), slide.shape[:2])
    anything = np.any([*truth.values()], axis=0).astype(np.uint8)
    far = cv2.distanceTransform(1 - anything, cv2.DIST_L2, 3) > 80  # 40 um
    assert (found != clean)[far].mean() < 0.005


def test_a_fold_is_more_layers_of_tissue_than_one(slide):
    folded, fold = slide.copy(), np.zeros(slide.shape[:2], bool)
    fold[700:1700, 500:600] = True
    layers = slide[700:1700, 900:1000] / np.float32(255) * slide[700:1700, 1200:1300] / 255
    folded[fold] = (folded[700:1700, 500:600] * layers).reshape(-1, 3)
    found = classes_at(find(from_array(folded), UM), slide.shape[:2]) == CLASSES.index("fold")
    assert found[fold].mean() > 0.6
    assert found[~fold].sum() < 0.2 * fold.sum()


def test_ink_on_bare_glass_is_ink_and_no_tissue(slide):
    marked = slide.copy()
    marked[60:180, 300:1500] = (60, 90, 170)
    found = classes_at(find(from_array(marked), UM), slide.shape[:2])
    assert (found[70:170, 310:1490] == CLASSES.index("pen")).all()


def test_dust_and_small_artefacts_are_left(slide):
    dusty = slide.copy()
    dusty[100:112, 1000:1012] = 90  # 6 um
    dusty[1000:1100, 1000:1100] = (40, 70, 160)  # 50 um
    found = find(from_array(dusty), UM)
    np.testing.assert_array_equal(found, find(from_array(slide), UM))


@pytest.mark.parametrize(
    ("colour", "kind"), [((244, 243, 245), "glass"), ((0, 0, 0), "black"), ((5, 4, 9), "black")]
)
def test_slides_of_one_colour(colour, kind):
    found = find(from_array(np.full((2100, 2500, 3), colour, np.uint8)), UM)
    assert {CLASSES[value] for value in np.unique(found)} == {kind}


@pytest.mark.parametrize(
    ("shape", "um", "likely"),
    [((4000, 4000), 0.25, True), ((3999, 9000), 0.25, False), ((9000, 9000), None, False)],
)
def test_artefacts_are_looked_for_from_a_millimetre_on(shape, um, likely):
    assert are_likely(shape, um) == likely


# --- maps


def a_map():
    classes = np.ones((25, 50), np.uint8)
    classes[:, :4], classes[10:14, 10:30], classes[20:, 40:] = 0, 2, 5
    classes[3:8, 20:24], classes[16:18, 6:9] = 3, 4
    return classes


@pytest.mark.parametrize("shape", [(200, 400), (197, 400), (200, 399), (25, 50)])
def test_maps_are_read_back_and_by_other_programs(tmp_path, shape):
    path = tmp_path / "a_tissue.png", tmp_path / "a.geojson"
    Map(a_map(), shape).write(*path)
    np.testing.assert_array_equal(np.asarray(Image.open(path[0])), a_map())
    assert len(np.unique(cv2.imread(str(path[0])).reshape(-1, 3), axis=0)) == 6  # in colours
    made = open_map(path[0], shape)
    rows, columns = (np.arange(n) * 2 + 1 for n in shape)
    whole = a_map()[rows * 25 // (2 * shape[0])][:, columns * 50 // (2 * shape[1])]
    np.testing.assert_array_equal(made.within(0, 0, *shape), whole == 1)
    for part in ((0, 0, 10, 10), (5, 0, 9, 3), (20, 20, 5, 30), (3, 7, 22, 1)):
        y, x, height, width = part
        own = whole[y : y + height, x : x + width] == 1
        np.testing.assert_array_equal(made.within(*part), own)
        assert made.meets(*part) or not own.any()
    assert not made.meets(0, 0, 20, shape[1] * 3 // 50)
    areas = open_regions(path[1], shape)
    labels = np.array([label for _, label in areas.regions])
    for kind in CLASSES[1:]:
        found = areas.within(0, 0, *shape, labels == kind.capitalize())
        # Borders in the middle of a pixel may go either way.
        np.testing.assert_array_equal(found, whole == CLASSES.index(kind))
    each = shape[0] * shape[1] / a_map().size
    assert made.pixels() == pytest.approx(
        {kind: (a_map() == CLASSES.index(kind)).sum() * each for kind in ARTEFACTS}
    )
    marked = Marked(path[1], shape)
    np.testing.assert_array_equal(marked.within(0, 0, *shape), whole == 1)
    assert marked.pixels() == {k: (whole == CLASSES.index(k)).sum() for k in ARTEFACTS}


def test_what_is_marked_is_tissue_but_for_artefacts(tmp_path):
    path = write_regions(
        tmp_path / "a.geojson",
        feature(box(0, 0, 100, 100), "Tumor"), feature(box(200, 0, 300, 50)),
        feature(box(90, 90, 150, 150), "pen"), feature(box(0, 0, 10, 10), "Pen"),
        feature(box(5, 0, 15, 10), "Pen"), feature(box(20, 50, 40, 70), "Ignore*"),
    )  # fmt: skip
    marked = Marked(path, SHAPE)
    expected = np.zeros(SHAPE, bool)
    expected[:100, :100] = expected[:50, 200:] = True
    expected[50:70, 20:40] = False
    expected[90:, 90:150] = expected[:10, :15] = False
    np.testing.assert_array_equal(marked.within(0, 0, *SHAPE), expected)
    np.testing.assert_array_equal(marked.within(80, 70, 60, 50), expected[80:140, 70:120])
    assert marked.meets(0, 0, 50, 50) and not marked.meets(100, 0, 100, 300)
    assert marked.pixels() == {"pen": 3600 + 150, "fold": 0, "blur": 0, "black": 0}


def test_rois_of_imagej_have_names_for_classes(tmp_path):
    whole, *pens = (
        roi_of("RECT", box=edges, name=name)
        for edges, name in (
            ((0, 0, 200, 300), "Tissue"), ((0, 0, 10, 10), "Pen"), ((50, 0, 60, 10), "pen"),
        )
    )  # fmt: skip
    marked = Marked(roi_zip(tmp_path / "a.zip", whole, *pens), (200, 300))
    expected = np.ones((200, 300), bool)
    expected[:10, :10] = expected[50:60, :10] = False
    np.testing.assert_array_equal(marked.within(0, 0, 200, 300), expected)
    assert marked.pixels() == {"pen": 200, "fold": 0, "blur": 0, "black": 0}


@pytest.mark.parametrize("step", [1, 4])
def test_pictures_mark_tissue_by_one_number_or_by_those_of_a_map(tmp_path, step):
    pixels = np.zeros((50, 75), np.uint8)
    pixels[10:20, 10:40] = 255
    pixels = pixels.repeat(4 // step, axis=0).repeat(4 // step, axis=1)
    whole = pixels.repeat(step, axis=0).repeat(step, axis=1)
    marked = Marked(painted(tmp_path / "a.png", pixels), SHAPE)
    np.testing.assert_array_equal(marked.within(0, 0, *SHAPE), whole == 255)
    numbers = np.where(pixels == 255, 1, 0).astype(np.uint8)
    numbers[:4] = 2
    marked = Marked(painted(tmp_path / "b.png", numbers), SHAPE)
    np.testing.assert_array_equal(marked.within(0, 0, *SHAPE), whole == 255)
    assert marked.pixels()["pen"] == 4 * step * 300


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: write_regions(p / "a.geojson", feature(box(0, 0, 9, 9), "Pen")), "pen alone"),
        (lambda p: painted(p / "a.png", np.tri(200, 300, dtype=np.uint8) + 2), "expected tissue"),
        (
            lambda p: painted(p / "a.png", np.tri(200, 300, dtype=np.uint8) + 6),
            "6, 7, expected",
        ),
        (lambda p: painted(p / "a.png", np.zeros(SHAPE, np.uint8)), "nothing but 0"),
    ],
)
def test_files_that_mark_no_tissue_are_refused(tmp_path, write, words):
    refusal(lambda path: Marked(path, SHAPE), write(tmp_path), words)


# --- inference

TILES = ["--tile_size", 96, "--overlap", 96]


def test_nuclei_are_found_in_marked_tissue_alone(
    slides, tmp_path, checkpoint, capsys  # noqa: F811
):  # fmt: skip
    place, out = tmp_path / "marked", tmp_path / "out"
    write_regions(
        place / "s1.geojson", feature(box(10, 100, 190, 280)), feature(box(60, 150, 90, 180), "Pen")
    )
    quarters(tmp_path / "regions" / "s1.geojson")
    flags = ["--ckpt", checkpoint, "--images", slides, *TILES]
    infer(tmp_path / "whole", *flags)
    infer(out, *flags, "--tissue", place, "--regions", tmp_path / "regions")
    assert "s2: nothing is marked in" in capsys.readouterr().out
    whole, found = (masks.read_mask(f / "s1_prediction.png") for f in (tmp_path / "whole", out))
    inside = np.zeros((320, 400), bool)
    inside[100:280, 10:190] = True
    inside[150:180, 60:90] = False
    assert found[inside].any() and not found[~inside].any()
    middle = np.s_[220:260, 40:150]  # away from nuclei that are cut at the border
    np.testing.assert_array_equal(found[middle], whole[middle])
    same = [(f / "s2_labels.tif").read_bytes() for f in (tmp_path / "whole", out)]
    assert same[0] == same[1]

    first, second = table_of(out / "counts.csv")
    assert float(first["pen_mm2"]) == pytest.approx(900 * 0.0625e-6, abs=1e-6)
    assert float(first["tissue_mm2"]) <= inside.sum() * 0.0625e-6 + 1e-6
    assert first["fold_mm2"] == "0.000000" and second["pen_mm2"] == ""
    record = json.loads((out / "rows" / "s1.json").read_text())
    assert record["row"]["tissue"] <= inside.mean()
    assert record["row"]["excluded"]["pen_mm2"] == pytest.approx(900 * 0.0625e-6)
    of_regions = sum(region["tissue_px"] for region in record["row"]["regions"] if region["region"])
    assert of_regions == round(record["row"]["tissue"] * 320 * 400)
    assert not list(out.glob("*_tissue.*"))

    # The same again does nothing; another file is another prediction.
    path = out / "s1_prediction.png"
    before = path.stat().st_mtime_ns
    infer(out, *flags, "--tissue", place, "--regions", tmp_path / "regions")
    assert path.stat().st_mtime_ns == before
    write_regions(place / "s1.geojson", feature(box(200, 0, 400, 90)))
    infer(out, *flags, "--tissue", place)
    found = masks.read_mask(path)
    assert found[:90, 200:].any() and not found[:, :200].any()
    infer(out, *flags)
    np.testing.assert_array_equal(masks.read_mask(path), whole)


def test_tissue_of_regions_adds_up_to_that_of_the_image(slides, tmp_path, checkpoint):  # noqa: F811
    image = tifffile.imread(slides / "s1.tif")
    image[40:150, 150:260] = 244  # glass, in all four quarters
    painted(tmp_path / "images" / "s1.png", image[..., ::-1])
    quarters(tmp_path / "regions" / "s1.geojson")
    out = tmp_path / "out"
    flags = ["--ckpt", checkpoint, "--images", tmp_path / "images", *TILES, "--pixel_size", 0.25]
    infer(out, *flags, "--regions", tmp_path / "regions")
    (whole,) = (json.loads((out / "rows" / "s1.json").read_text()),)
    rows = table_of(out / "regions.csv")
    tissue, area = (sum(float(row[key]) for row in rows[:4]) for key in ("tissue_mm2", "area_mm2"))
    assert tissue == pytest.approx(whole["row"]["tissue_mm2"], abs=3e-6)
    assert tissue < area - 100 * 100 * 0.0625e-6
    pixels = sum(region["tissue_px"] for region in whole["row"]["regions"][:4])
    assert pixels == round(whole["row"]["tissue"] * 320 * 400)


@pytest.fixture(scope="module")
def marked_slide(tmp_path_factory):
    """A folder with a slide of a millimetre, at 0.99 um, with a black stroke and glass."""
    tissue = draw_tissue(512, 256, seed=3).image
    image = np.full((1024, 1024, 3), 244, np.uint8)
    image[:, :256] = np.tile(tissue, (2, 1, 1))
    image[300:420] = (50, 50, 55)
    folder = tmp_path_factory.mktemp("slides")
    cv2.imwrite(str(folder / "i.png"), image[..., ::-1])
    return folder


def test_artefacts_of_a_slide_are_left_out_and_those_of_a_field_are_not_looked_for(
    marked_slide, tmp_path, checkpoint  # noqa: F811
):  # fmt: skip
    out = tmp_path / "out"
    flags = ["--ckpt", checkpoint, "--images", marked_slide, *TILES]
    infer(out, *flags, "--pixel_size", 0.99)
    found = masks.read_mask(out / "i_prediction.png")
    assert not found[300:420].any() and found[:280].any() and found[440:].any()
    (row,) = table_of(out / "counts.csv")
    pen = 120 * 1024 * 0.99**2 / 1e6
    assert pen < float(row["pen_mm2"]) < 1.4 * pen and float(row["blur_mm2"]) == 0
    assert float(row["tissue_mm2"]) < (1024 - 120) * 256 * 0.99**2 / 1e6
    np.testing.assert_array_equal(
        np.asarray(Image.open(out / "i_tissue.png")), find(from_array(cv2.imread(
            str(marked_slide / "i.png"))[..., ::-1].copy()), 0.99))  # fmt: skip
    assert {f["properties"]["classification"]["name"] for f in json.loads(
        (out / "i_tissue.geojson").read_text())["features"]} == {"Tissue", "Pen"}  # fmt: skip
    page = (out / "report.html").read_text()
    assert 'data-layer="tissue"' in page and "i_tissue.geojson" in page

    # Its own outlines give the same, given as a file of the user's.
    given = tmp_path / "given"
    given.mkdir()
    (given / "i_tissue.geojson").write_bytes((out / "i_tissue.geojson").read_bytes())
    infer(tmp_path / "again", *flags, "--pixel_size", 0.99, "--tissue", given)
    same = [(f / "i_labels.tif").read_bytes() for f in (out, tmp_path / "again")]
    assert same[0] == same[1]

    # A lost map is made anew; without artefacts, and of a smaller image, there is none.
    (out / "i_tissue.png").unlink()
    infer(out, *flags, "--pixel_size", 0.99)
    assert (out / "i_tissue.png").is_file()
    infer(out, *flags, "--pixel_size", 0.99, "--tissue", "all")
    assert not list(out.glob("i_tissue.*"))
    assert "pen_mm2" not in (out / "counts.csv").read_text()
    infer(out, *flags, "--pixel_size", 0.99)
    infer(out, *flags, "--pixel_size", 0.9)
    assert not list(out.glob("i_tissue.*"))


def test_a_slide_of_glass_alone_has_no_tissue(tmp_path, checkpoint):  # noqa: F811
    painted(tmp_path / "images" / "g.png", np.full((1100, 1100, 3), 243, np.uint8))
    flags = ["--ckpt", checkpoint, "--images", tmp_path / "images", "--pixel_size", 0.95]
    infer(tmp_path / "out", *flags)
    (row,) = table_of(tmp_path / "out" / "counts.csv")
    assert (row["nuclei"], row["tissue_mm2"], row["pen_mm2"]) == ("0", "0.000000", "0.000000")
    record = json.loads((tmp_path / "out" / "rows" / "g.json").read_text())
    assert record["row"]["skipped"] == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tissue", "nowhere"], "--tissue nowhere: no such folder, expected"),
        (["--tissue", "bad/s1.geojson"], r"bad/s1\.geojson: found a file, expected a folder"),
        (["--tissue", "others"], "no tissue of any image"),
        (["--tissue", "bad"], "pen alone"),
        (["--tissue", "marked", "--masks", "masks"], "references"),
    ],
)
def test_files_of_tissue_that_cannot_be_used_are_refused_before_anything_is_written(
    slides, tmp_path, checkpoint, monkeypatch, flags, words  # noqa: F811
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_regions(tmp_path / "marked" / "s1.geojson", feature(Polygon([(0, 0), (9, 0), (9, 9)])))
    write_regions(tmp_path / "bad" / "s1.geojson", feature(box(0, 0, 9, 9), "Pen"))
    write_regions(tmp_path / "others" / "s3.geojson", feature(box(0, 0, 9, 9)))
    check_refused(slides, tmp_path, checkpoint, flags, words)


@pytest.mark.slow
def test_two_processes_leave_out_what_one_does(marked_slide, tmp_path, checkpoint):  # noqa: F811
    made = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        flags = ["--images", marked_slide, "--pixel_size", 0.99, "--image_folder", out]
        call(tmp_path, ALL_BIG, [*flags, "--ckpt", checkpoint, "--gpu_id", -1, *TILES], processes)
        made.append([(out / f"i{end}").read_bytes() for end in ("_tissue.png", "_labels.tif")])
    assert made[0] == made[1]
