"""What to annotate next: fields of images in order of doubt, as tables, for QuPath, on the page."""

import json
import math
import re

import cv2
import numpy as np
import pytest
import tifffile
import torch
from shapely.geometry import box, shape

from model import UNet
from tests.scripts import checkpoint_of, infer, table_of
from tissue import images, pictures, review, windows
from tissue.synthetic import draw_tissue
from tissue.tiling import tiles_of

NUMBERS = ("y", "x", "height", "width", "nuclei", "rank")


def fields_of(path):
    """The rows of a table of fields, numbers as such."""
    return [
        row | {key: int(row[key]) for key in NUMBERS} | {"doubt": float(row["doubt"])}
        for row in table_of(path)
    ]


def places_of(rows):
    return [tuple(row[key] for key in NUMBERS[:4]) for row in rows]


def features_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["features"]


# --- fields


@pytest.mark.parametrize("size", [(1, 1), (100, 300), (383, 384), (512, 640), (1000, 777)])
@pytest.mark.parametrize("scale", [0.2, 1.0, 1.104, 4.0])
def test_fields_cover_an_image_once_and_are_about_as_large_as_they_should_be(size, scale):
    fields = review.Fields(size, scale)
    fields.add((0, 0, *size), np.full(size, 0.5, np.float32))
    covered = np.zeros(size, int)
    for y, x, height, width in places_of(fields.table("a")):
        covered[y : y + height, x : x + width] += 1
        for side, length in zip((height, width), size, strict=True):
            assert side <= 1.5 * 256 * scale + 1
            assert side == length or side >= 256 * scale / 1.5 - 1
    assert (covered == 1).all()


def test_sides_of_256_pixels_where_they_divide_the_image():
    fields = review.Fields((512, 256), 1.0)
    fields.add((0, 0, 512, 256), np.full((512, 256), 0.5, np.float32))
    assert places_of(fields.table("a")) == [(0, 0, 256, 256), (256, 0, 256, 256)]


def test_doubt_by_hand_and_fields_without_any_are_not_listed():
    probability = np.zeros((512, 512), np.float32)
    probability[:256, 256:] = 0.5
    probability[256:, :256] = 0.9  # 4 * 0.9 * 0.1 = 0.36
    probability[256:, 256:] = 1.0
    probability[256:384, 256:] = 0.5  # one half of its field
    fields = review.Fields((512, 512), 1.0)
    fields.add((0, 0, 512, 512), probability)
    found = [(row["y"], row["x"], row["doubt"], row["rank"]) for row in fields.table("a")]
    assert found == [(0, 256, 1.0, 1), (256, 256, 0.5, 2), (256, 0, 0.36, 3)]


@pytest.mark.parametrize("tile_size", [16, 96, 112, 256, 400, 1024])
def test_tiles_of_any_size_shared_by_processes_give_the_same_doubt(tile_size, generator):
    size = (450, 700)
    probability = generator.random(size, np.float32)
    expected = [
        (4 * probability.astype(float) * (1 - probability))[y : y + h, x : x + w].mean()
        for y, x, h, w in [(0, 0, 225, 233), (225, 466, 225, 234)]
    ]
    shares = [review.Fields(size, 1.0) for _ in range(3)]
    for number, (y, x, h, w) in enumerate(tiles_of(*size, tile_size)):
        shares[number % 3].add((y, x, h, w), probability[y : y + h, x : x + w])
    whole = review.Fields(size, 1.0)
    whole.doubt += sum(share.doubt for share in shares)
    found = {place[:2]: row["doubt"] for row in whole.table("a") for place in places_of([row])}
    assert [found[0, 0], found[225, 466]] == pytest.approx(expected, abs=6e-5)
    assert len(found) == 6


def test_a_nucleus_belongs_to_the_field_of_its_centroid():
    fields = review.Fields((512, 512), 1.0)
    fields.add((0, 0, 512, 512), np.full((512, 512), 0.5, np.float32))
    fields.count(np.array([255.4, 255.5, 0.0]), np.array([0.0, 255.4, 511.0]))
    counts = {(row["y"], row["x"]): row["nuclei"] for row in fields.table("a")}
    assert counts == {(0, 0): 1, (0, 256): 1, (256, 0): 1, (256, 256): 0}


# --- inference


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network of random weights whose probabilities of drawn tissue lie on both sides of 0.5."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("ckpt") / "net.pt"
    model = UNet(4).eval()
    pixels = torch.from_numpy(draw_tissue(320, 320, seed=1).image).permute(2, 0, 1)[None] / 255
    made = checkpoint_of(model)
    mean, std = (torch.tensor(made["normalisation"][key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        model.last_conv.weight *= 50
        model.last_conv.bias *= 50
        model.last_conv.bias -= model((pixels - mean) / std).median()
    torch.save(made | {"model": model.state_dict(), "pixel_size_um": 0.25}, path)
    return path


@pytest.fixture
def drawn(tmp_path):
    """A folder with a drawn image of 2 x 3 fields, of which the last column is glass."""
    image = draw_tissue(512, 768, seed=2).image
    image[:, 500:] = 244
    (tmp_path / "drawn").mkdir()
    path = tmp_path / "drawn" / "one.tif"
    tifffile.imwrite(
        path, image, photometric="rgb", tile=(64, 64), resolution=(4e4, 4e4),
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


def call(folder, checkpoint, *more):
    infer(folder, "--ckpt", checkpoint, *more)


def test_inference_lists_all_fields_with_tissue_and_proposes_one_of_four(
    drawn, checkpoint, tmp_path
):
    call(tmp_path / "out", checkpoint, "--images", drawn)
    rows = fields_of(tmp_path / "out" / "review.csv")
    assert sorted(places_of(rows)) == [(y, x, 256, 256) for y in (0, 256) for x in (0, 256)]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]
    doubts = [row["doubt"] for row in rows]
    assert doubts == sorted(doubts, reverse=True) and 0 < doubts[-1] < doubts[0] <= 1
    (counts,) = table_of(tmp_path / "out" / "counts.csv")
    assert sum(row["nuclei"] for row in rows) == int(counts["nuclei"]) > 0

    (feature,) = features_of(tmp_path / "out" / "one_review.geojson")
    y, x, height, width = places_of(rows)[0]
    assert shape(feature["geometry"]).equals(box(x, y, x + width, y + height))
    properties = feature["properties"]
    assert properties["objectType"] == "annotation"
    assert properties["classification"]["name"] == "Region"
    assert properties["isLocked"] is False

    # The picture is that field of the overlay, but for what JPEG loses, and no other field.
    picture = images.read_image(tmp_path / "out" / "one_review.jpg").astype(float)
    overlay = images.read_image(tmp_path / "out" / "one_overlay.png")
    off = {
        place: np.abs(picture - overlay[place[0] :, place[1] :][:256, :256]).mean()
        for place in [(0, 0), (0, 256), (256, 0), (256, 256)]
    }
    assert min(off, key=off.get) == (y, x)
    assert off[y, x] < min(off[place] for place in off if place != (y, x)) / 2


def test_big_images_and_other_tiles_give_the_same_fields(drawn, checkpoint, tmp_path, monkeypatch):
    call(tmp_path / "one", checkpoint, "--images", drawn)
    call(tmp_path / "tiled", checkpoint, "--images", drawn, "--tile_size", 96)
    monkeypatch.setattr(windows, "BIG", 1)
    call(tmp_path / "big", checkpoint, "--images", drawn, "--tile_size", 160)
    for name in ("review.csv", "one_review.geojson"):
        whole = (tmp_path / "one" / name).read_bytes()
        assert (tmp_path / "tiled" / name).read_bytes() == whole
        assert (tmp_path / "big" / name).read_bytes() == whole
    assert (tmp_path / "big" / "one_review.jpg").is_file()


def test_fields_are_of_the_network_s_pixel_size_in_the_image_s_pixels(drawn, checkpoint, tmp_path):
    call(tmp_path / "out", checkpoint, "--images", drawn, "--pixel_size", 0.125)
    rows = fields_of(tmp_path / "out" / "review.csv")
    assert sorted(places_of(rows)) == [(0, 0, 512, 384), (0, 384, 512, 384)]


def test_a_tenth_of_the_fields_is_proposed(checkpoint, tmp_path):
    pictures.write_image(tmp_path / "a.png", draw_tissue(768, 1100, seed=4).image)
    call(tmp_path / "out", checkpoint, "--images", tmp_path / "a.png", "--pixel_size", 0.5)
    rows = fields_of(tmp_path / "out" / "review.csv")
    features = features_of(tmp_path / "out" / "a_review.geojson")
    assert len(rows) == 6 * 9 and len(features) == math.ceil(5.4)
    found = [tuple(map(int, shape(f["geometry"]).bounds)) for f in features]
    assert found == [(x, y, x + w, y + h) for y, x, h, w in places_of(rows[:6])]
    assert cv2.imread(str(tmp_path / "out" / "a_review.jpg")).shape == (6 * 256, 256, 3)


def test_review_is_of_all_images_of_the_folder_until_they_are_forgotten(
    drawn, checkpoint, tmp_path
):
    out, second = tmp_path / "out", drawn.with_name("=two.png")
    call(out, checkpoint, "--images", drawn)
    pictures.write_image(second, draw_tissue(256, 256, seed=5).image)
    call(out, checkpoint, "--images", second)
    rows = fields_of(out / "review.csv")
    assert {row["image"] for row in rows} == {"one", "'=two"}
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    doubts = [row["doubt"] for row in rows]
    assert doubts == sorted(doubts, reverse=True)

    (out / "rows" / "one.json").unlink()
    call(out, checkpoint, "--images", second)
    assert {row["image"] for row in fields_of(out / "review.csv")} == {"'=two"}

    (out / "=two_review.csv").unlink()
    call(out, checkpoint, "--images", second)  # is made anew
    assert len(fields_of(out / "review.csv")) == 1


def test_an_image_that_became_glass_has_no_fields_and_keeps_no_pictures(checkpoint, tmp_path):
    path = tmp_path / "a.png"
    pictures.write_image(path, draw_tissue(256, 256, seed=5).image)
    call(tmp_path / "out", checkpoint, "--images", path)
    assert (tmp_path / "out" / "a_review.jpg").is_file()
    pictures.write_image(path, np.full((256, 256, 3), 244, np.uint8))
    call(tmp_path / "out", checkpoint, "--images", path)
    assert fields_of(tmp_path / "out" / "review.csv") == []
    assert features_of(tmp_path / "out" / "a_review.geojson") == []
    assert not (tmp_path / "out" / "a_review.jpg").exists()
    assert "What to annotate next" not in (tmp_path / "out" / "report.html").read_text()


def test_a_damaged_table_is_left_out_and_said(drawn, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    call(out, checkpoint, "--images", drawn)
    path = out / "one_review.csv"
    path.write_bytes(path.read_bytes().replace(b"256", b"x56"))
    call(out, checkpoint, "--images", drawn)
    assert f"{path}: found no table of fields" in capsys.readouterr().out
    assert fields_of(out / "review.csv") == []
    assert len(table_of(out / "counts.csv")) == 1


# --- the page


def test_the_page_shows_the_most_doubtful_fields_and_links_to_their_images(
    drawn, checkpoint, tmp_path
):
    out = tmp_path / "out"
    for number in range(13):
        image = draw_tissue(256, 256, seed=number).image
        pictures.write_image(drawn.with_name(f"<b>{number:02}.png"), image)
    drawn.unlink()
    call(out, checkpoint, "--images", drawn.parent)
    page = (out / "report.html").read_text()
    section = page[page.index('id="fields-title"') : page.index('id="meaning-title"')]
    places = [int(place) for place in re.findall(r'href="#row-(\d+)"', section)]
    expected = [int(row["image"][3:]) for row in fields_of(out / "review.csv")[:12]]
    assert places == expected
    assert section.count("data:image/jpeg;base64,") == 12
    assert "<b>" not in section
    assert len(section) < 12 * 60_000


def test_a_damaged_picture_of_fields_is_said_on_the_page(drawn, checkpoint, tmp_path):
    out = tmp_path / "out"
    call(out, checkpoint, "--images", drawn)
    path = out / "one_review.jpg"
    path.write_bytes(b"x" * path.stat().st_size)
    call(out, checkpoint, "--images", drawn)
    page = (out / "report.html").read_text()
    section = page[page.index('id="fields-title"') : page.index('id="meaning-title"')]
    assert "unreadable" in section and "data:image" not in section
