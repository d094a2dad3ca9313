"""Files from strangers: what is damaged, lies or leads elsewhere is one line, and in time."""

import contextlib
import os
import re
import signal
import struct
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from tests import slide_files
from tests.faults import mutate
from tests.faults.mutations import PNG, chunks
from tests.faults.samples import IMAGES, Sample
from tests.pictures import LABELS, RGB, refusal, with_palette
from tests.scripts import REPOSITORY, cut
from tests.test_outline_files import SHAPE, roi_of, roi_zip, square
from tests.test_scanners import needs_openslide
from tissue import exports, images, manifest, scanners, windows
from tissue.annotations import open_annotation
from tissue.files import InputError
from tissue.given_sizes import read_sizes
from tissue.images import image_shape, read_image
from tissue.measures import measure, outlines
from tissue.pixel_size import pixel_size_um
from tissue.regions import open_regions
from tissue.results import path_of
from tissue.synthetic import draw_tissue

SECONDS = 20  # for what takes a fraction of one: a machine may be busy


@pytest.fixture
def in_time():
    """An error in place of waiting for ever."""

    def over(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- damage -------------------------------------------------------------------------------------

QUICK = {  # what needs neither a training nor a process of OpenSlide
    "images": set(IMAGES),
    "others": {"bare weights", "geojson", "geojson.gz", "coco", "labelme", "roi", "roi zip",
               "label map png", "label map tif", "pixel sizes"},
}  # fmt: skip


def test_damaged_files_are_read_right_or_refused_in_one_line(tmp_path):
    """A few of the thousands of `python -m tests.faults.mutate`, the same ones each time."""
    cases = [
        (group, number)
        for group, count in (("images", 200), ("others", 130))
        for number in range(count)
        if mutate.sample_of(group, number) in QUICK[group]
    ]
    found = list(mutate.outcomes(cases, tmp_path, 1))
    assert len(found) == len(cases) > 200
    assert [outcome for outcome in found if outcome.said not in ("read", "refused")] == []
    assert {outcome.said for outcome in found} == {"read", "refused"}


def raising(path):
    raise KeyError("no such thing")


def hungry(path):
    np.ones(mutate.MOST_MEMORY + 2**28, np.uint8)


READERS = {
    "raises": (raising, "KeyError"),
    "dies": (lambda path: os.kill(os.getpid(), signal.SIGSEGV), r"died \(exit code -11\)"),
    "is hungry": (hungry, "took 1[0-9]{3} MiB"),
    "asks for too much": (lambda path: np.ones(2**50, np.uint8), "MemoryError"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_that_fails_is_noticed(tmp_path, monkeypatch, name):
    read, says = READERS[name]

    def write(folder):
        (folder / "a.txt").write_text("text")
        return folder / "a.txt"

    monkeypatch.setattr(mutate, "groups", lambda: {"others": {"a": Sample(write, read)}})
    (found,) = mutate.outcomes([("others", 0)], tmp_path, 1)
    assert re.match(says, found.said)


# --- sizes that headers promise -----------------------------------------------------------------


def test_a_small_file_that_promises_a_large_picture_is_refused(tmp_path):
    """Tiles that were never written: 240 bytes or so for 1.2 GB."""
    path = tmp_path / "sparse.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tags = tif.pages[0].tags
        tags["ImageWidth"].overwrite(20_000)
        tags["ImageLength"].overwrite(20_000)
        tags["TileWidth"].overwrite(20_000 // 3 // 16 * 16)
        tags["TileLength"].overwrite(20_000 // 4 // 16 * 16)
        count = len(tif.pages[0].dataoffsets)
        tags["TileByteCounts"].overwrite([0] * count)
    refusal(read_image, path, "20000 x 20000", "bytes")


@pytest.mark.parametrize("read", [read_image, windows.open_image])
def test_a_tile_that_is_far_larger_than_its_image_is_refused(tmp_path, read):
    path = tmp_path / "tile.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", tile=(96, 96), compression="zlib")
    enlarge_tiles(path)
    with pytest.raises(InputError, match="tiles of 32768 x 32768"):
        read(path)


def enlarge_tiles(path):
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags["TileWidth"].overwrite(32768)
        tif.pages[0].tags["TileLength"].overwrite(32768)


PEAK = """
import sys
from pathlib import Path
from tissue import images

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

path = Path(sys.argv[1])
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
images.read_image(path)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux tells the peak")
@pytest.mark.parametrize("name", ["rgb.png", "rgb16.png", "cmyk.jpg", "planes.tif"])
def test_what_decoding_takes_is_reckoned_before(tmp_path, monkeypatch, name):
    """In a process that has twice as much free as it takes; with half of it the file is refused."""
    path, side = tmp_path / name, 2048
    pixels = np.kron(RGB, np.ones((23, 30, 1), np.uint8))[:side, :side]
    write = {
        "rgb.png": lambda: Image.fromarray(pixels).save(path, compress_level=1),
        "rgb16.png": lambda: cv2.imwrite(str(path), pixels.astype(np.uint16) * 257),
        "cmyk.jpg": lambda: Image.fromarray(pixels).convert("CMYK").save(path),
        "planes.tif": lambda: tifffile.imwrite(
            path, np.moveaxis(pixels, -1, 0).astype(np.uint16), photometric="rgb",
            planarconfig="separate", compression="zlib",
        ),
    }  # fmt: skip
    write[name]()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    taken = int(done.stdout)
    monkeypatch.setattr(images, "free_memory", lambda: 2 * taken)
    images.check_memory(path)
    monkeypatch.setattr(images, "free_memory", lambda: 0.95 * taken)
    refusal(images.check_memory, path, "for this memory")


# --- what is no picture of its kind -------------------------------------------------------------


def test_colours_behind_the_pixels_of_a_png_are_no_colours(tmp_path):
    path = tmp_path / "a.png"
    with_palette(LABELS, [(9 * i, 0, i) for i in range(8)])(path)
    parts = {chunk[4:8]: chunk for chunk in chunks(path.read_bytes())}
    for order in ((b"IHDR", b"IDAT", b"PLTE", b"IEND"), (b"IHDR", b"IDAT", b"IEND")):
        path.write_bytes(PNG + b"".join(parts[name] for name in order))
        refusal(read_image, path, "order")


def test_a_plain_tile_without_bytes_does_not_move_the_others(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", tile=(32, 32))
    with tifffile.TiffFile(path, mode="r+b") as tif:
        counts = list(tif.pages[0].databytecounts)
        counts[3] = 0
        tif.pages[0].tags["TileByteCounts"].overwrite(counts)
    refusal(read_image, path, "fewer bytes")


# --- waiting, and text without end --------------------------------------------------------------

PIPES = {
    "a.geojson": lambda path: open_annotation(path, SHAPE),
    "a.json": lambda path: open_regions(path, SHAPE),
    "a.zip": lambda path: open_annotation(path, SHAPE),
    "a.roi": lambda path: open_regions(path, SHAPE),
    "a.csv": lambda path: read_sizes(path, ["a"]),
    "a.dcm": lambda path: scanners.heads([path]),
    "a.tif": read_image,
}


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_is_refused_wherever_a_file_is_read(tmp_path, in_time, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="no regular file"):
        PIPES[name](tmp_path / name)


def test_a_pipe_in_the_place_of_the_table_of_patches_is_refused(tmp_path, root, in_time):
    cut(root)
    (root / "patches.csv").unlink()
    os.mkfifo(root / "patches.csv")
    with pytest.raises(InputError, match="no regular file"):
        manifest.read_table(root, "train")


@needs_openslide
@pytest.mark.parametrize(
    ("write", "name", "part"),
    [
        (slide_files.hamamatsu_vms, "a.vms", "a(1,0).jpg"),
        (slide_files.mirax, "a.mrxs", "a/Data0000.dat"),
        (slide_files.dicom, "a.dcm", "a_1.dcm"),
    ],
)
def test_a_pipe_among_the_files_of_a_slide_is_refused(tmp_path, in_time, write, name, part):
    write(tmp_path / name, slide_files.pyramid(np.random.default_rng(0)))
    (tmp_path / part).unlink()
    os.mkfifo(tmp_path / part)
    with pytest.raises(InputError, match="no regular file"):
        windows.open_image(tmp_path / name)


MUCH = 200_000
TEXTS = {
    "digits": "9" * MUCH,
    "spaces": " " * MUCH,
    "lines": "a=1\n" * (MUCH // 4),
    "sizes": 'PhysicalSizeX="' * (MUCH // 15),
    "bits": 'SignificantBits="' * (MUCH // 17) + "9" * MUCH,
    "tags": "<a>" * (MUCH // 3),
    "entities": "&#x41;" * (MUCH // 6),
    "mpp": "MPP = " * (MUCH // 6),
}
HEADS = ("", "ImageJ=1.11a\nunit=", '<OME><Image><Pixels PhysicalSizeX="', "Aperio |MPP = ")


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_of_metadata_takes_long(tmp_path, name):
    path = tmp_path / "a.tif"
    for head in HEADS:
        text = (head + TEXTS[name]).encode()
        tifffile.imwrite(path, RGB, photometric="rgb", description=text, metadata=None)
        began = time.process_time()
        for read in (image_shape, pixel_size_um, read_image):
            with contextlib.suppress(InputError):
                read(path)
        assert time.process_time() - began < SECONDS / 4


def test_no_key_file_of_a_slide_takes_long(tmp_path):
    path = tmp_path / "a.vms"
    path.write_text("[Virtual Microscope Specimen]\nImageFile=x" + " " * 60_000 + "y\n")
    began = time.process_time()
    assert scanners.heads([path]) == [path]
    assert time.process_time() - began < SECONDS / 4


# --- names that lead elsewhere ------------------------------------------------------------------

ELSEWHERE = ("../b.jpg", "/etc/passwd", "..", "folder/b.jpg", "..\\b.jpg")


@needs_openslide
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_slide_does_not_name_files_elsewhere(tmp_path, name):
    levels = slide_files.pyramid(np.random.default_rng(0))
    (tmp_path / "in").mkdir()
    slide_files.hamamatsu_vms(tmp_path / "in" / "a.vms", levels)
    (tmp_path / "in" / "a(1,0).jpg").rename(tmp_path / "b.jpg")
    slide_files.mirax(tmp_path / "in" / "b.mrxs", levels)
    for path, file, old in (
        ("a.vms", "a.vms", "ImageFile(1,0)=a(1,0).jpg"),
        ("b.mrxs", "b/Slidedat.ini", "FILE_0=Data0000.dat"),
        ("b.mrxs", "b/Slidedat.ini", "INDEXFILE=Index.dat"),
    ):
        told = tmp_path / "in" / file
        before = told.read_text()
        told.write_text(before.replace(old, f"{old.partition('=')[0]}={name}"))
        with pytest.raises(InputError, match="expected the name of a file beside it"):
            windows.open_image(tmp_path / "in" / path)
        told.write_text(before)


# --- our own exports ----------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path):
    """The exports of an image `a`."""
    tissue = draw_tissue(90, 90, 0)
    with exports.NucleiFiles(tmp_path, "a", tissue.labels.shape, ("csv", "rois")) as files:
        files.add(measure(tissue.labels, tissue.image, None), outlines(tissue.labels))
    tile = {"tile": (96, 96), "compression": "zlib"}
    tifffile.imwrite(path_of(tmp_path, "a", "labels"), tissue.labels.astype(np.uint16), **tile)
    assert exports.check_exports(tmp_path, "a", ("csv", "rois", "labels")).nuclei == tissue.count
    return tmp_path


def test_labels_that_are_read_back_have_tiles_that_fit_them(exported):
    enlarge_tiles(path_of(exported, "a", "labels"))
    with pytest.raises(InputError, match="tiles of 32768 x 32768"):
        exports.check_exports(exported, "a")


def test_a_zip_with_a_wrong_directory_is_named_in_a_line(exported, tmp_path):
    path = path_of(tmp_path, "a", "rois")
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\5\6") + 16  # where the directory begins
    content[place : place + 4] = struct.pack("<I", struct.unpack_from("<I", content, place)[0] + 1)
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read back"):
        exports.check_exports(tmp_path, "a", ("csv", "rois"))


def test_what_a_damaged_zip_says_is_cut_short(tmp_path):
    path = roi_zip(tmp_path / "a.zip", roi_of("POLYGON", np.array(square(4, 5, 8))))
    content = bytearray(path.read_bytes())
    content[26:28] = b"\xc8\0"  # the length of the first name, which a message repeats
    path.write_bytes(content)
    with pytest.raises(InputError, match="zip that cannot be read") as error:
        open_annotation(path, SHAPE)
    assert len(str(error.value)) < len(str(path)) + 300
