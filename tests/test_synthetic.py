import hashlib

import cv2
import numpy as np
import pytest
import tifffile

from tissue import synthetic
from tissue.synthetic import (
    EOSIN,
    HAEMATOXYLIN,
    ORGANS,
    PIXEL_SIZE,
    Canvas,
    beer_lambert,
    draw_tissue,
    write_demo,
)


@pytest.fixture(scope="module")
def drawn():
    """One image of each organ."""
    return {organ: draw_tissue(256, 256, 7, organ) for organ in ORGANS}


def haematoxylin_density(image):
    """Haematoxylin by colour deconvolution with Ruifrok & Johnston's vectors, (H, W)."""
    stains = np.stack([HAEMATOXYLIN[0], EOSIN[0], np.cross(HAEMATOXYLIN[0], EOSIN[0])])
    density = -np.log((image.astype(float) + 1) / 256)
    return (density @ np.linalg.inv(stains))[..., 0]


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_threads():
    threads = cv2.getNumThreads()
    first = draw_tissue(200, 120, 3, "Colon")
    try:
        cv2.setNumThreads(1 if threads != 1 else 2)
        second = draw_tissue(200, 120, 3, "Colon")
    finally:
        cv2.setNumThreads(threads)
    assert first.image.tobytes() == second.image.tobytes()
    assert first.labels.tobytes() == second.labels.tobytes()


def test_another_seed_gives_another_image():
    first, second = draw_tissue(128, 128, 0, "Liver"), draw_tissue(128, 128, 1, "Liver")
    assert (first.labels != second.labels).any()
    assert (first.image != second.image).mean() > 0.5


def test_labels_run_from_1_to_count_and_each_is_one_piece(drawn):
    for tissue in drawn.values():
        assert tissue.labels.dtype == np.int32
        assert np.array_equal(np.unique(tissue.labels), np.arange(tissue.count + 1))
        for number in range(1, tissue.count + 1):
            mask = (tissue.labels == number).astype(np.uint8)
            assert cv2.connectedComponents(mask, connectivity=4)[0] == 2  # background and one


def test_nuclei_hold_more_haematoxylin_than_what_lies_between_them(drawn):
    for tissue in drawn.values():
        density = haematoxylin_density(tissue.image)
        inside, outside = density[tissue.labels > 0], density[tissue.labels == 0]
        assert inside.mean() > 1.3 * outside.mean()
        # ... but no threshold tells them apart: some nuclei are paler than some cytoplasm
        assert np.percentile(inside, 2) < np.percentile(outside, 98)


def test_nuclei_are_as_large_and_as_many_as_in_tissue(drawn):
    for tissue in drawn.values():
        areas = np.bincount(tissue.labels.ravel())[1:] * PIXEL_SIZE**2  # square micrometres
        assert areas.min() >= 2
        assert 12 < np.median(areas) < 45
        assert np.percentile(areas, 95) < 130
        assert 0.05 < (tissue.labels > 0).mean() < 0.6
        per_mm2 = tissue.count / (tissue.labels.size * PIXEL_SIZE**2 * 1e-6)
        assert 2_000 < per_mm2 < 30_000


def test_some_nuclei_touch(drawn):
    for organ in ("Colon", "Spleen"):
        labels = drawn[organ].labels
        left, right = labels[:, :-1], labels[:, 1:]
        assert ((left > 0) & (right > 0) & (left != right)).any()


def test_stain_varies_between_images_of_one_organ():
    colours = [draw_tissue(96, 96, seed, "Breast").image.mean((0, 1)) for seed in range(6)]
    assert (np.std(colours, axis=0) > 3).all()


def test_beer_lambert_by_hand():
    haematoxylin, eosin = np.array([[1.0, 0.0]]), np.array([[0.5, 0.0]])
    stains = [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]]
    light = beer_lambert((240, 250, 245), stains, (haematoxylin, eosin))
    # exp(-(0.65 + 0.035)) = 0.50409, exp(-(0.70 + 0.495)) = 0.30270, exp(-(0.29 + 0.055)) = 0.70822
    assert light[0, 0] == pytest.approx([120.98, 75.68, 173.51], abs=0.01)
    assert light[0, 1] == pytest.approx([240, 250, 245])  # unstained glass


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 301), (129, 40)])
def test_sizes_odd_and_small(height, width):
    for seed in range(3):
        tissue = draw_tissue(height, width, seed)
        assert tissue.image.shape == (height, width, 3)
        assert tissue.image.dtype == np.uint8
        assert tissue.labels.shape == (height, width)
        assert tissue.labels.max() == tissue.count


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="16 x 16"):
        draw_tissue(15, 64, 0)
    with pytest.raises(ValueError, match="Liver"):
        draw_tissue(64, 64, 0, "Cheese")


def test_a_smaller_canvas_shows_the_same_tissue():
    """What is drawn at a place does not depend on what is drawn far from it."""
    for period in (PIXEL_SIZE, 3.0, 50.0):
        small, large = (Canvas(1, size, size).noise("a", period, 2) for size in (90, 300))
        np.testing.assert_allclose(small, large[:90, :90], atol=1e-5)
    small, large = draw_tissue(320, 320, 5, "Kidney"), draw_tissue(400, 480, 5, "Kidney")
    assert np.array_equal(small.labels[:160, :160] > 0, large.labels[:160, :160] > 0)
    same = small.image[:160, :160].astype(int) - large.image[:160, :160]
    assert abs(same).max() <= 1


def test_demo_files_are_named_readable_and_agree(tmp_path):
    names = write_demo(tmp_path, images=4, size=96, seed=1)
    assert names == ["Demo_Liver_01", "Demo_Liver_02", "Demo_Liver_03", "Demo_Kidney_01"]
    for index, name in enumerate(names):
        with tifffile.TiffFile(tmp_path / "tissue_images" / f"{name}.tif") as tif:
            image, tags = tif.asarray(), tif.pages[0].tags
        numerator, denominator = tags["XResolution"].value
        assert tags["YResolution"].value == (numerator, denominator)
        assert tags["ResolutionUnit"].value == 3  # centimetre
        assert 1e4 / (numerator / denominator) == PIXEL_SIZE  # micrometres
        assert "DateTime" not in tags
        mask = cv2.imread(str(tmp_path / "mask binary" / f"{name}.png"), cv2.IMREAD_UNCHANGED)
        labels = cv2.imread(str(tmp_path / "instance_labels" / f"{name}.png"), cv2.IMREAD_UNCHANGED)
        tissue = draw_tissue(96, 96, 10_000 + index, name.split("_")[1])
        assert np.array_equal(image, tissue.image)
        assert labels.dtype == np.uint16
        assert np.array_equal(labels, tissue.labels)
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, np.where(tissue.labels > 0, 255, 0))


def test_27_images_are_three_of_each_organ_and_a_second_run_writes_the_same_bytes(tmp_path, capsys):
    def digests():
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in files}

    args = synthetic.parse_args(["--root", str(tmp_path), "--size", "32"])
    synthetic.main(args)
    assert "27 images of 32 x 32" in capsys.readouterr().out
    tissue_images = [path.stem for path in (tmp_path / "tissue_images").iterdir()]
    assert sorted(tissue_images) == sorted(f"Demo_{o}_{n:02d}" for o in ORGANS for n in (1, 2, 3))
    first = digests()
    synthetic.main(args)
    assert digests() == first
