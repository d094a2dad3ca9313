"""Damaged files are an error, or read right: what decoders only warn of, and mutations."""

import io
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.pictures import BYTES, GREY, LABELS, MASK, RGB, RGBA, opencv, pillow, tiff, with_palette
from tissue import fax, masks, windows
from tissue.files import InputError
from tissue.images import bits_in_use, image_shape, read_image
from tissue.pixel_size import pixel_size_um

LARGE = np.kron(RGB, np.ones((4, 4, 1), np.uint8))  # enough for a JPEG's middle to be cut out


def jpeg(array=LARGE, kind="JPEG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def cmyk():
    buffer = io.BytesIO()
    Image.fromarray(LARGE).convert("CMYK").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


JPEGS = {
    "plain": jpeg(quality=95),
    "progressive": jpeg(quality=95, progressive=True),
    "full chroma": jpeg(quality=95, subsampling="4:4:4"),
    "half chroma": jpeg(quality=95, subsampling="4:2:2"),
    "optimised": jpeg(quality=95, optimize=True),
    "grey": jpeg(LARGE[..., 0], quality=95),
    "CMYK": cmyk(),
    "restart markers": jpeg(quality=95, restart_marker_blocks=8),
    "restart rows": jpeg(quality=95, restart_marker_rows=1),
    "progressive with restarts": jpeg(quality=95, progressive=True, restart_marker_rows=1),
    "two pictures": jpeg(kind="MPO", quality=95, save_all=True, append_images=[
        Image.fromarray(LARGE[::-1].copy())]),
    "more behind its end": jpeg(quality=95) + b"\0" * 64 + b"made by a camera",
    "profile": jpeg(quality=95, icc_profile=bytes(3000), comment=b"of a camera"),
}  # fmt: skip


@pytest.mark.parametrize("name", JPEGS)
def test_valid_jpegs_of_all_kinds_are_read(tmp_path, name):
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEGS[name])
    expected = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(read_image(path), expected)
    true = LARGE[..., :1] if name == "grey" else LARGE
    assert np.abs(expected.astype(int) - true).mean() < 6


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("kept", [1 / 3, 0.9, 0.99])
def test_a_jpeg_without_its_middle_is_refused(tmp_path, name, kept, capfd):
    path = tmp_path / "a.jpg"
    content = JPEGS[name]
    start = content.index(b"\xff\xda") + 14  # of the first scan's data
    end = content.index(b"\xff\xd9", start) if name == "more behind its end" else len(content)
    end = content.index(b"\xff\xd9", start) + 2 if name == "two pictures" else end
    half = int((end - start) * kept / 2)
    path.write_bytes(content[: start + half] + content[end - half :])
    with pytest.raises(InputError, match="expected a whole"):
        read_image(path)
    with pytest.raises(InputError, match="expected a whole"):
        windows.open_image(path).read(0, 0, 1, 1)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("colour", ["ycbcr", "rgb"])
def test_a_damaged_jpeg_tile_is_refused_at_its_window_and_as_a_whole(tmp_path, tables, colour):
    path = tmp_path / "a.tif"
    options = {"compression": "jpeg", "compressionargs": {"outcolorspace": colour, "level": 95}}
    tifffile.imwrite(path, LARGE, photometric="rgb", tile=(128, 128), **options)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tif:
        offset, count = tif.pages[0].dataoffsets[1], tif.pages[0].databytecounts[1]
    whole = read_image(path)
    scan = content.index(b"\xff\xda", offset) + 14
    lost = (offset + count - scan) // 3
    content[scan + lost : offset + count] = content[scan + 2 * lost : offset + count] + bytes(lost)
    path.write_bytes(content)
    image = windows.open_image(path, big=1)
    np.testing.assert_array_equal(image.read(0, 0, 128, 128), whole[:128, :128])
    with pytest.raises(InputError, match="JPEG"):
        image.read(0, 128, 9, 9)
    with pytest.raises(InputError, match="JPEG"):
        read_image(path)


CHECKED = {
    "rgb.png": pillow(LARGE),
    "grey.png": pillow(LARGE[..., 0]),
    "palette.png": with_palette(LABELS, [(9 * i, 0, i) for i in range(8)]),
    "16.png": opencv(LARGE.astype(np.uint16) * 257),
    "zlib.tif": tiff(LARGE, photometric="rgb", compression="zlib", predictor=True),
    "tiles.tif": tiff(LARGE, photometric="rgb", compression="zlib", tile=(64, 64)),
    "lzma.tif": tiff(LARGE, photometric="rgb", compression="lzma"),
}


@pytest.mark.parametrize("name", CHECKED)
def test_a_flipped_bit_in_pixels_with_a_checksum_is_an_error_always(tmp_path, name, generator):
    path = tmp_path / name
    CHECKED[name](path)
    content = path.read_bytes()
    if "png" in name:
        start = content.index(b"IDAT") + 4
        pieces = [(start, content.index(b"IEND") - 8)]
    else:
        with tifffile.TiffFile(path) as tif:
            page = tif.pages[0]
            pieces = list(zip(page.dataoffsets, page.databytecounts, strict=True))
            pieces = [(offset, offset + count) for offset, count in pieces]
    for _ in range(40):
        start, end = pieces[generator.integers(len(pieces))]
        damaged = bytearray(content)
        damaged[generator.integers(start, end)] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            read_image(path)


@pytest.mark.parametrize("compression", ["lzw", "packbits"])
def test_pixels_without_a_checksum_must_have_their_length(tmp_path, compression):
    path = tmp_path / "a.tif"
    for cut in (3, 5, 200):
        tifffile.imwrite(path, LARGE, photometric="rgb", compression=compression, rowsperstrip=16)
        with tifffile.TiffFile(path, mode="r+b") as tif:
            counts = list(tif.pages[0].databytecounts)
            counts[1] -= cut
            tif.pages[0].tags["StripByteCounts"].overwrite(counts)
        with pytest.raises(InputError):
            read_image(path)


def test_a_png_whose_pixels_end_early_is_refused(tmp_path):
    path = tmp_path / "a.png"
    pillow(GREY)(path)
    content = path.read_bytes()
    start = content.index(b"IDAT")
    length = int.from_bytes(content[start - 4 : start], "big")
    rows = zlib.decompress(content[start + 4 : start + 4 + length])
    less = b"IDAT" + zlib.compress(rows[: len(rows) // 2])
    chunk = (len(less) - 4).to_bytes(4, "big") + less + zlib.crc32(less).to_bytes(4, "big")
    path.write_bytes(content[: start - 4] + chunk + content[start + 8 + length :])
    with pytest.raises(InputError):
        read_image(path)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (8, 8), (1, 5), (9, 17), (90, 70)])
@pytest.mark.parametrize("lost", [0, 1])
def test_an_interlaced_png_is_read_whole_or_not_at_all(tmp_path, generator, shape, lost):
    """PNG specification, 8.2: seven passes, each with one filter byte a row."""
    pixels = generator.integers(0, 256, shape, dtype=np.uint8)
    rows = b""
    for y, x, down, right in ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2),
                              (0, 1, 2, 2), (1, 0, 2, 1)):  # fmt: skip
        part = pixels[y::down, x::right]
        rows += b"".join(b"\0" + row.tobytes() for row in part if row.size)
    header = shape[1].to_bytes(4, "big") + shape[0].to_bytes(4, "big") + bytes([8, 0, 0, 0, 1])
    content = b"\x89PNG\r\n\x1a\n"
    packed = zlib.compress(rows[: len(rows) - lost])
    for chunk in (b"IHDR" + header, b"IDAT" + packed, b"IEND"):
        content += (len(chunk) - 4).to_bytes(4, "big") + chunk
        content += zlib.crc32(chunk).to_bytes(4, "big")
    path = tmp_path / "a.png"
    path.write_bytes(content)
    if lost:
        with pytest.raises(InputError):
            read_image(path)
    else:
        np.testing.assert_array_equal(read_image(path)[..., 0], pixels)


# --- fax ----------------------------------------------------------------------------------------

FAXES = {
    "rows": {"compression": "tiff_ccitt"},
    "group 3": {"compression": "group3"},
    "group 3 with fill bits": {"compression": "group3", "tiffinfo": {292: 4}},
    "group 3 of two dimensions": {"compression": "group3", "tiffinfo": {292: 1}},
    "group 4": {"compression": "group4"},
}


@pytest.mark.parametrize("name", FAXES)
@pytest.mark.parametrize("width", [1, 7, 64, 200, 1792, 2624, 5300])
def test_a_fax_coded_mask_is_what_libtiff_wrote(tmp_path, name, width, generator):
    path = tmp_path / "a.tif"
    places = np.arange(width)
    kinds = [generator.random((12, width)) < share for share in (0.5, 0.01, 0.99)]
    kinds += [np.cumsum(generator.random((12, width)) < 9 / width, axis=1) % 2 == 1]
    kinds += [places[None] >= generator.integers(0, width + 1, (40, 1))]
    kinds += [~kinds[-1], np.zeros((3, width), bool)]
    pixels = np.vstack(kinds)
    Image.fromarray(pixels).save(path, **FAXES[name])
    np.testing.assert_array_equal(masks.read_mask(path), pixels)
    image = windows.open_mask(path, big=1)
    np.testing.assert_array_equal(image.read(3, 0, 30, width), pixels[3:33])


def test_all_lengths_of_runs_are_known(tmp_path):
    pixels = np.arange(2700)[None] >= np.arange(2700)[:, None]
    for name in ("rows", "group 4"):
        for part in (pixels, ~pixels):
            Image.fromarray(part).save(tmp_path / "a.tif", **FAXES[name])
            np.testing.assert_array_equal(masks.read_mask(tmp_path / "a.tif"), part)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shown", [0, 1])
def test_a_fax_reads_both_orders_of_bits_and_both_meanings_of_white(tmp_path, order, shown):
    path = tmp_path / "a.tif"
    Image.fromarray(MASK).save(path, compression="group4", tiffinfo={262: shown, 266: order})
    with Image.open(path) as picture:
        np.testing.assert_array_equal(masks.read_mask(path), np.asarray(picture))


@pytest.mark.parametrize("name,least", [("rows", 0.99), ("group 3", 0.99), ("group 4", 0.8)])
def test_a_flipped_bit_in_a_fax_is_an_error_or_moves_an_edge_a_little(tmp_path, name, least, capfd):
    """The code has no checksum: a bit may make another picture, which no decoder can know."""
    path = tmp_path / "a.tif"
    Image.fromarray(MASK).save(path, **FAXES[name])
    content = path.read_bytes()
    with tifffile.TiffFile(path) as tif:
        start, count = tif.pages[0].dataoffsets[0], tif.pages[0].databytecounts[0]
    found = []
    for bit in range(start * 8, (start + count) * 8, 1 if name == "group 4" else 7):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found.append(np.count_nonzero(masks.read_mask(path) != MASK))
        except InputError as error:
            assert "fax" in str(error)
            found.append(-1)
    found = np.array(found)
    assert (found <= 0).mean() >= least
    assert found.max() <= 0.05 * MASK.size
    assert capfd.readouterr().err == ""  # libtiff would speak there


@pytest.mark.parametrize(
    "code",
    [
        "00000000",  # no code word
        "1" * 7 + "0",  # rows of white, and no more
        "0001" * 4,  # passes by nothing
        "001" + "00110101" + "0000110111",  # no run at all
        "010" * 9,  # left of the row
    ],
)
def test_what_no_encoder_writes_is_refused(code):
    data = int(code.ljust(64, "0"), 2).to_bytes(8, "big")
    with pytest.raises(ValueError, match="fax"):
        fax.decode(data, 8, 30, fax.GROUP_4)


# --- mutations ----------------------------------------------------------------------------------

FILES = {
    "plain.tif": tiff(RGB, photometric="rgb", rowsperstrip=16),
    "lzw.tif": tiff(RGB, photometric="rgb", compression="lzw", predictor=True),
    "zlib.tif": tiff(RGB, photometric="rgb", compression="zlib", tile=(32, 32)),
    "jpeg.tif": tiff(RGB, photometric="rgb", compression="jpeg", tile=(32, 32)),
    "deep.tif": tiff(RGB.astype(np.uint16) * 16, photometric="rgb", tile=(32, 32)),
    "ome.ome.tif": tiff(RGB, photometric="rgb", ome=True),
    "imagej.tif": tiff(BYTES, imagej=True),
    "labels.tif": tiff(LABELS * np.uint32(70000)),
    "palette.tif": with_palette(LABELS, [(9 * i, 0, i) for i in range(8)]),
    "fax.tif": pillow(MASK, compression="group4"),
    "rgb.png": pillow(RGB),
    "rgba.png": pillow(RGBA),
    "deep.png": opencv(RGB.astype(np.uint16) * 257),
    "palette.png": with_palette(LABELS, [(9 * i, 0, i) for i in range(8)]),
    "bits.png": pillow(MASK),
    "rgb.jpg": pillow(RGB, quality=95),
    "progressive.jpg": pillow(RGB, quality=95, progressive=True),
    "mask.jpg": pillow(BYTES, quality=60),
    "mask.bmp": pillow(BYTES),
}
MUTATIONS = 24  # a file


def mutated(content, random):
    """The bytes with bits flipped, a byte changed, or a part cut out, zeroed or put in."""
    data = bytearray(content)
    place = int(random.integers(len(data)))
    some = slice(place, place + int(random.integers(1, 64)))
    kind = random.integers(6)
    if kind == 0:
        for bit in random.integers(0, len(data) * 8, 3):
            data[bit // 8] ^= 1 << bit % 8
    elif kind == 1:  # in the header
        data[place % min(len(data), 400)] = random.integers(256)
    elif kind == 2:  # in the directory of many a TIFF
        data[-1 - place % min(len(data), 400)] = random.integers(256)
    elif kind == 3:
        del data[place : place + int(random.integers(1, len(data)))]
    elif kind == 4:
        data[some] = bytes(len(data[some]))
    else:
        data[place:place] = random.bytes(8)
    return bytes(data)


def read_by_windows(path):
    for opened in (windows.open_image, windows.open_mask):
        image = opened(path, big=1)
        image.read(0, 0, image.height, image.width)
        image.close()


@pytest.mark.parametrize("name", FILES)
def test_a_mutated_file_is_read_or_refused_in_one_line(tmp_path, name, capfd):
    """No exception but InputError; a PNG, which has checksums, is right if it is read."""
    path = tmp_path / name
    FILES[name](path)
    content = path.read_bytes()
    whole = read_image(path) if "labels" not in name else None
    random = np.random.default_rng(zlib.crc32(name.encode()))
    readers = (masks.read, image_shape, bits_in_use, pixel_size_um, read_by_windows, read_image)
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(content, random))
        for read in readers:
            try:
                result = read(path)
            except InputError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                continue
            if read == read_image:
                assert result.dtype == np.uint8 and result.shape[2] == 3
                if name.endswith("png"):
                    np.testing.assert_array_equal(result, whole)
    assert capfd.readouterr().err == ""


def test_numbers_of_a_kind_that_is_none_are_refused(tmp_path):
    path = tmp_path / "fax.tif"
    FILES["fax.tif"](path)
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages[0].tags["BitsPerSample"].overwrite(241)
    with pytest.raises(InputError, match="numbers of 241 bits"):
        read_image(path)
