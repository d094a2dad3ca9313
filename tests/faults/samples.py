"""Whole files of all kinds that the project reads, and how its scripts read them."""

import functools
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image

from learning import checkpoints, runs
from model import UNet
from tests import slide_files
from tests.pictures import (
    BYTES,
    LABELS,
    MASK,
    RGB,
    RGBA,
    aperio,
    opencv,
    pillow,
    pyramid,
    tiff,
    with_palette,
)
from tests.scripts import checkpoint_of, cut, infer, learn
from tests.test_outline_files import (
    annotation_of,
    coco,
    collection,
    feature,
    polygon,
    roi_of,
    roi_zip,
    square,
)
from tissue import exports, manifest, masks, pictures, results, windows
from tissue.annotations import open_annotation
from tissue.files import InputError
from tissue.given_sizes import read_sizes
from tissue.images import bits_in_use, image_shape, read_image
from tissue.pixel_size import pixel_size_um
from tissue.regions import open_regions
from tissue.scanners import heads
from tissue.summary import write_summary
from tissue.synthetic import draw_tissue

SHAPE = (60, 80)
DEEP = RGB.astype(np.uint16) * 257
GREY16 = DEEP[..., 0]
COLOURS = [(9 * i, 0, i) for i in range(8)]


class Sample(NamedTuple):
    """Files of a kind: `write(folder)` makes them and gives the one that is opened, `read(path)`
    reads it as the scripts do; `spoiled` are patterns of the files that may be damaged.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], np.ndarray | None]
    spoiled: tuple[str, ...] = ("**/*",)


# --- images -------------------------------------------------------------------------------------


def read_by_windows(path: Path) -> np.ndarray:
    """Opened as inference opens it; of what is big a few windows."""
    image = windows.open_image(path, bits=bits_in_use(path))
    height, width = image.height, image.width
    if image.is_big:
        for share in (0, 0.5, 1):
            y, x = int(share * max(0, height - 512)), int(share * max(0, width - 512))
            image.read(y, x, min(512, height), min(512, width))
        raise InputError("too large to be compared")
    pixels = image.read(0, 0, height, width)
    for level, (rows, columns) in enumerate(image.levels):
        image.read(0, 0, min(rows, 512), min(columns, 512), level)
    image.close()
    return pixels


def read_mask_by_windows(path):
    mask = windows.open_mask(path)
    mask.read(0, 0, min(mask.height, 512), min(mask.width, 512))
    mask.close()


def read_picture(path: Path) -> np.ndarray:
    """All that the scripts do to read an image or a mask; InputError where any refuses it.

    What is read whole must be what is read by windows.
    """
    refusals, found = [], {}
    assert heads([path]) == [path]
    readers = (image_shape, bits_in_use, pixel_size_um, masks.read, read_mask_by_windows)
    for read in (*readers, read_by_windows, read_image):
        try:
            found[read] = read(path)
        except (InputError, FileNotFoundError) as error:
            refusals.append(error)
    if read_image not in found and masks.read in found:
        return found[masks.read].foreground
    if read_image in found:
        pixels = found[read_image]
        assert pixels.dtype == np.uint8 and pixels.shape == (*found[image_shape], 3)
        if read_by_windows in found:
            np.testing.assert_array_equal(pixels, found[read_by_windows])
        return pixels
    raise refusals[-1]


def in_file(name: str, write: Callable) -> Sample:
    def into(folder):
        write(folder / name)
        return folder / name

    return Sample(into, read_picture)


def slide(suffix: str, write: Callable) -> Sample:
    levels = slide_files.pyramid(np.random.default_rng(0), levels=2)
    return in_file(f"slide{suffix}", lambda path: write(path, levels))


def strips(**options):
    return tiff(RGB, photometric="rgb", rowsperstrip=16, **options)


def tiled(array=RGB, **options):
    return tiff(array, photometric="rgb", tile=(32, 32), **options)


def grey_png(bits):
    """Grey of 1, 2 or 4 bits, which Pillow writes of a palette alone."""
    ramp = [(i * 255 // (2**bits - 1),) * 3 for i in range(2**bits)]
    return with_palette(LABELS % 2**bits, ramp, bits=bits)


def cmyk(path):
    Image.fromarray(RGB).convert("CMYK").save(path, quality=95)


def several_ome(path):
    options = {"photometric": "rgb", "tile": (32, 32), "compression": "zlib"}
    told = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25, "SignificantBits": 8}
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as tif:
        tif.write(RGB, subifds=2, metadata=told, **options)
        for step in (2, 4):
            tif.write(RGB[::step, ::step].copy(), subfiletype=1, **options)


WRITERS = {
    "strips.tif": strips(),
    "big_endian.tif": strips(byteorder=">"),
    "big.tif": strips(bigtiff=True),
    "lzw.tif": strips(compression="lzw", predictor=True),
    "zlib.tif": strips(compression="zlib", predictor=True),
    "tiles_zlib.tif": tiled(compression="zlib"),
    "packbits.tif": strips(compression="packbits"),
    "lzma.tif": strips(compression="lzma"),
    "zstd.tif": tiled(compression="zstd"),
    "jpeg.tif": tiled(compression="jpeg"),
    "jpeg_rgb.tif": tiled(compression="jpeg", compressionargs={"outcolorspace": "rgb"}),
    "jpeg2000.tif": tiled(compression="jpeg2000"),
    "webp.tif": tiled(compression="webp", compressionargs={"lossless": True}),
    "planes.tif": tiff(np.moveaxis(RGB, -1, 0).copy(), photometric="rgb", planarconfig="separate"),
    "deep.tif": tiled(DEEP, compression="zlib"),
    "grey.tif": tiff(RGB[..., 0], photometric="minisblack", compression="zlib"),
    "negative.tif": tiff(RGB[..., 0], photometric="miniswhite"),
    "float.tif": tiff(MASK.astype(np.float32), compression="zlib", predictor=True),
    "labels.tif": tiff(LABELS * np.uint32(70000), compression="zlib"),
    "imagej.tif": tiff(RGB, imagej=True, resolution=(4, 4), metadata={"unit": "um"}),
    "ome.ome.tif": tiff(RGB, photometric="rgb", ome=True, metadata={"PhysicalSizeX": 0.5}),
    "pyramid.ome.tif": several_ome,
    "pages.tif": pyramid(RGB, subifds=False),
    "levels.tif": pyramid(RGB, subifds=True),
    "aperio.svs": aperio,
    "palette.tif": with_palette(LABELS, COLOURS),
    "fax3.tif": pillow(MASK, compression="group3"),
    "fax4.tif": pillow(MASK, compression="group4"),
    "rle.tif": pillow(MASK, compression="tiff_ccitt"),
    "turned.tif": pillow(RGB, tiffinfo={274: 6}),
    "rgb.png": pillow(RGB, dpi=(72, 72)),
    "rgba.png": pillow(RGBA),
    "grey8.png": pillow(RGB[..., 0]),
    "grey1.png": pillow(MASK),
    "palette1.png": grey_png(1),
    "palette2.png": grey_png(2),
    "palette4.png": grey_png(4),
    "palette8.png": with_palette(LABELS, COLOURS),
    "grey16.png": opencv(GREY16),
    "rgb16.png": opencv(DEEP),
    "rgb.jpg": pillow(RGB, quality=95),
    "progressive.jpg": pillow(RGB, quality=95, progressive=True),
    "grey.jpg": pillow(BYTES, quality=60),
    "cmyk.jpg": cmyk,
    "rgb.bmp": pillow(RGB),
    "grey.bmp": pillow(RGB[..., 0]),
    "bits.bmp": pillow(MASK),
}
SLIDES = {
    "aperio": (".svs", slide_files.aperio),
    "philips": (".tiff", slide_files.philips),
    "leica": (".scn", slide_files.leica),
    "ventana_tiff": (".tif", slide_files.ventana_tiff),
    "ventana": (".bif", slide_files.ventana_bif),
    "trestle": (".tif", slide_files.trestle),
    "ndpi": (".ndpi", slide_files.hamamatsu_ndpi),
    "sakura": (".svslide", slide_files.sakura),
    "vms": (".vms", slide_files.hamamatsu_vms),
    "vmu": (".vmu", slide_files.hamamatsu_vmu),
    "mirax": (".mrxs", slide_files.mirax),
    "dicom": (".dcm", slide_files.dicom),
    "dicom_jpeg": (".dcm", slide_files.dicom_jpeg),
}
IMAGES = {name: in_file(name, write) for name, write in WRITERS.items()}
SCANS = {name: slide(*how) for name, how in SLIDES.items()}


# --- all else -----------------------------------------------------------------------------------


def checkpoint(folder):
    torch.manual_seed(0)
    content = checkpoint_of(UNet(2)) | {"pixel_size_um": 0.25, "versions": {"torch": "2"}}
    checkpoints.save_checkpoint(folder / "a.pt", content)
    return folder / "a.pt"


def bare_weights(folder):
    torch.manual_seed(0)
    torch.save(UNet(2).state_dict(), folder / "a.pth")
    return folder / "a.pth"


def old_weights(folder):
    torch.manual_seed(0)
    state = UNet(2).state_dict()
    torch.save(state, folder / "a.pth", _use_new_zipfile_serialization=False)
    return folder / "a.pth"


def read_checkpoint(path):
    content = checkpoints.load_checkpoint(path)
    checkpoints.build_model(content).eval()


def drawn_root(folder):
    for number in (1, 2, 3, 4):
        tissue = draw_tissue(72, 64, seed=number)
        for place, values in (("tissue_images", tissue.image), ("masks", tissue.labels > 0)):
            (folder / place).mkdir(parents=True, exist_ok=True)
            pictures.write_image(folder / place / f"Drawn_{number:02}.png", values)
    return folder


def patch_set(folder):
    cut(drawn_root(folder))
    for place in ("tissue_images", "masks"):  # which no test here opens
        shutil.rmtree(folder / place)
    return folder / "patches.json"


def read_patch_set(path):
    for split in manifest.SPLITS:
        manifest.read_table(path.parent, split)


def run(folder):
    """A training of one epoch, without its patches."""
    made = learn(cut_root(folder), folder / "log", "--epoch", 1)
    for name in ("args.json", "last.pt", "best.pt"):
        shutil.copy(made / name, folder / name)
    shutil.rmtree(folder / "log")
    shutil.rmtree(folder / "root")
    return folder / "last.pt"


def cut_root(folder):
    cut(drawn_root(folder / "root"))
    return folder / "root"


def read_run(path):
    """What `train.py --resume` reads first, of a run that has learned to its end."""
    settings = runs.read_settings(path.parent)
    content = checkpoints.load_checkpoint(path)
    runs.check_content(runs.TRAINING, content.get("training"), path, runs.ANEW)
    model = checkpoints.build_model(content)
    runs.check_state(content["training"], model, path)
    runs.check_progress(content["training"], settings["epoch"], 3, path)


def outlined(name, content):
    def write(folder):
        path = folder / name
        data = json.dumps(content).encode()
        path.write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
        return path

    return Sample(write, read_outlines)


def read_outlines(path):
    """As a reference, and as regions."""
    found = []
    for opened in (open_annotation, open_regions):
        try:
            one = opened(path, SHAPE)
        except InputError as error:
            found.append(error)
            continue
        if opened is open_annotation:
            assert one.numbers(0, 0, *SHAPE).shape == SHAPE and isinstance(one.notes, tuple)
        else:
            one.within(0, 0, *SHAPE)
        one.close()
    if found:
        raise found[0]


def rois(folder):
    shapes = [roi_of("POLYGON", np.array(square(x, 5, 8))) for x in (4, 20, 40)]
    return roi_zip(folder / "a.zip", *shapes)


def roi(folder):
    (folder / "a.roi").write_bytes(roi_of("POLYGON", np.array(square(4, 5, 8))).tobytes())
    return folder / "a.roi"


def label_map(name):
    def write(folder):
        (folder / "instance_labels").mkdir()
        labels = np.zeros(SHAPE, np.uint16)
        for number, (y, x) in enumerate([(5, 5), (20, 40), (40, 10)], 1):
            labels[y : y + 9, x : x + 9] = number
        pictures.write_image(folder / "instance_labels" / name, labels)
        return folder / "instance_labels" / name

    return Sample(write, read_outlines)


def sizes(folder):
    lines = [f"slide_{n}.tif,{0.2 + n / 100:.3f}" for n in range(20)]
    (folder / "sizes.csv").write_text("image,pixel_size_um\n" + "\n".join(lines) + "\n")
    return folder / "sizes.csv"


def read_pixel_sizes(path):
    found, _ = read_sizes(path, [f"slide_{n}" for n in range(20)])
    assert all(0.01 <= um <= 20 for um in found.values())


def finished(folder):
    """A folder of results."""
    images = folder / "images"
    images.mkdir()
    for number in (1, 2):
        pictures.write_image(images / f"Drawn_{number}.png", draw_tissue(96, 80, number).image)
    infer(folder / "results", "--images", images, "--export")
    shutil.rmtree(images)
    return folder / "results"


def read_results(folder):
    """The tables and the page of a folder of results, and its exports, read back."""
    write_summary(folder, {"Drawn_1", "Drawn_2"})
    faults = []
    for name in ("Drawn_1", "Drawn_2"):
        try:
            if record := results.read(folder, name):
                kinds = [key for key in (*exports.FORMATS, "labels") if key in record["files"]]
                exports.check_exports(folder, name, kinds)
        except (InputError, OSError) as error:
            faults.append(error)
    if faults:
        raise faults[0]


SQUARES = [feature(polygon(square(x, 5, 8)), "Tumour") for x in (4, 20, 40)]
SHAPES = {"shapes": [{"label": "n", "points": square(4, 5, 8), "shape_type": "polygon"}],
          "imageHeight": SHAPE[0], "imageWidth": SHAPE[1], "imageData": "AAAA"}  # fmt: skip
RUNS = {"size": list(SHAPE), "counts": [100, 9, 51, 9, 51, 9, 4571]}
OTHERS = {
    "checkpoint": Sample(checkpoint, read_checkpoint),
    "bare weights": Sample(bare_weights, read_checkpoint),
    "weights of the format before zips": Sample(old_weights, read_checkpoint),
    "patch set": Sample(patch_set, read_patch_set, ("patches.json", "patches.csv")),
    "run": Sample(run, read_run, ("args.json", "last.pt")),
    "geojson": outlined("a.geojson", collection(*SQUARES)),
    "geojson.gz": outlined("a.geojson.gz", collection(*SQUARES)),
    "coco": outlined("a_coco.json", coco(annotation_of([np.ravel(square(4, 5, 8)).tolist()]),
                                         annotation_of(RUNS))),
    "labelme": outlined("a.json", SHAPES),
    "roi": Sample(roi, read_outlines),
    "roi zip": Sample(rois, read_outlines),
    "label map png": label_map("a.png"),
    "label map tif": label_map("a.tif"),
    "pixel sizes": Sample(sizes, read_pixel_sizes),
    "results": Sample(finished, read_results, ("results/rows/*.json", "results/Drawn*")),
    "records": Sample(finished, read_results, ("results/rows/*.json",)),
}  # fmt: skip


@functools.cache
def groups() -> dict[str, dict[str, Sample]]:
    """The samples by group; slides of scanners alone where OpenSlide is installed."""
    try:
        import openslide  # noqa: F401
        import pydicom  # noqa: F401
    except ImportError:
        return {"images": IMAGES, "others": OTHERS}
    return {"images": IMAGES | SCANS, "others": OTHERS}
