"""Makes errors of what image decoders only warn of, or fill up in silence."""

import math
import re
import struct
import zlib
from pathlib import Path

import imagecodecs
import simplejpeg
from PIL import Image

from tissue import fax

_FAX = (fax.RLE, fax.GROUP_3, fax.GROUP_4)  # numbers of TIFF compression, as below
_JPEG = (6, 7, 33007, 34892)
_WITHOUT_CHECKSUM = {5: imagecodecs.lzw_decode, 32773: imagecodecs.packbits_decode}
_T4_OPTIONS = 292  # TIFF tag
LARGEST_TILE = 2**28  # bytes
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# First column and row, and steps, of the passes of an interlaced PNG.
_ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
_ADAM7 += [(0, 1, 1, 2)]


def check_jpeg(data: bytes, tables: bytes | None = None) -> None:
    """Raise ValueError where libjpeg warns of a JPEG, as of data that end early or do not fit.

    `tables` are those that a TIFF keeps apart for all its tiles.
    """
    if tables:
        data = tables[: tables.rindex(b"\xff\xd9")] + data[2:]
    kind = simplejpeg.decode_jpeg_header(data)[2]
    wanted = kind if kind == "CMYK" else "CMYK" if kind == "YCCK" else "GRAY"
    # At an eighth of the size all is parsed, and little is computed.
    simplejpeg.decode_jpeg(data, wanted, min_height=1, min_width=1, min_factor=8, strict=True)


def check_png(path: Path) -> None:
    """Raise an exception where a PNG's checksums do not fit, its pixels end too early, or its parts
    are in another order: colours behind the pixels that they are of are lost.

    Pillow looks at none of these when it decodes pixels.
    """
    with Image.open(path, formats=("PNG",)) as picture:
        picture.verify()  # the checksum of each chunk
    content = path.read_bytes()
    width, height, depth, kind, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    expected = 0
    for x, y, step_x, step_y in _ADAM7 if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        bits = max(columns, 0) * depth * _PNG_CHANNELS[kind]
        expected += rows * (1 + -(-bits // 8)) if bits and rows > 0 else 0
    inflate, found, place, name, order = zlib.decompressobj(), 0, 8, b"", b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", content, place)
        if name == b"IDAT" and found <= expected:  # a small file may hold no end of zeros
            part = content[place + 8 : place + 8 + length]
            found += len(inflate.decompress(part, expected + 1 - found))
        place += 12 + length
        order += name if name[:1].isupper() else b""  # what must be understood
    wanted = rb"IHDR(PLTE)%s(IDAT)+IEND" % (b"" if kind == 3 else b"?")
    if not re.fullmatch(wanted, order):
        raise ValueError(f"its parts are in no order of a PNG: {order[:80]!r}")
    if not inflate.eof or found != expected:
        raise ValueError(f"its pixels have {found} bytes, {expected} were expected")


def check_pieces(tif, plane) -> None:
    """Raise ValueError unless a TIFF has all strips or tiles of an image, and all their bytes, and
    numbers of a kind that there is.

    Decoders fill up in silence what is missing.
    """
    size, page = tif.filehandle.size, plane.keyframe
    if page.dtype is None:
        raise ValueError(f"the file has numbers of {page.bitspersample} bits, which no kind has")
    for stored in plane.pages:
        ends = [a + b for a, b in zip(stored.dataoffsets, stored.databytecounts, strict=True)]
        if max(ends, default=0) > size:
            raise ValueError("the file ends before its pixels do")
        plain = page.compression == 1 and page.dtype.itemsize * 8 == page.bitspersample
        if len(ends) < math.prod(page.chunked) and not page.is_contiguous:
            raise ValueError("the file lists fewer strips or tiles than its size needs")
        if plain and (sum(stored.databytecounts) < page.nbytes or 0 in stored.databytecounts):
            # Of plain tiles that were never written tifffile misplaces those that follow.
            raise ValueError("the file has fewer bytes of pixels than its size needs")


def make_strict(page) -> None:
    """Have a page of tifffile check each of its strips and tiles before they are decoded.

    Raises ValueError for tiles that no writer makes: they may be larger than the image, which says
    nothing of the memory that they take.
    """
    if page.is_tiled and math.prod(page.chunks) * (page.bitspersample + 7) // 8 > LARGEST_TILE:
        raise ValueError(f"it has tiles of {' x '.join(map(str, page.chunks))} numbers")
    decode = page.decode
    compression = int(page.compression)
    if compression in _FAX:
        page.decode = _fax_decoder(page)
        return

    def strict(data, index, **how):
        if data is not None and compression in _JPEG and page.bitspersample == 8:
            check_jpeg(data, how.get("jpegtables"))
        if data is not None and compression in _WITHOUT_CHECKSUM:
            _check_length(page, data, decode(None, index)[2])
        return decode(data, index, **how)

    page.decode = strict


def _check_length(page, data, shape):
    """Raise ValueError unless a strip or tile (depth, height, width, samples) has all its bytes.

    A damaged code word of LZW stands for another number of bytes, mostly.
    """
    if not isinstance(page.bitspersample, int):
        return
    if page.fillorder == 2:
        data = imagecodecs.bitorder_decode(data)
    found = len(_WITHOUT_CHECKSUM[int(page.compression)](data))
    depth, height, width, samples = shape
    row = -(-width * samples * page.bitspersample // 8)
    most = height if page.is_tiled else page.rowsperstrip  # some writers fill the last strip up
    if found % row or not height <= found // row // depth <= max(height, most):
        raise ValueError(f"a strip or tile has {found} bytes of {depth * height * row}")


def _fax_decoder(page):
    """What tifffile calls to decode a strip or tile, for the codes that imagecodecs lacks."""
    height, width = (page.tilelength, page.tilewidth) if page.is_tiled else (
        page.rowsperstrip, page.imagewidth)  # fmt: skip
    across = -(-page.imagewidth // width)
    options = page.tags.valueof(_T4_OPTIONS, default=0)

    def decode(data, index, **_):
        y, x = index // across * height, index % across * width
        rows = height if page.is_tiled else min(height, page.imagelength - y)
        place, shape = (0, 0, y, x, 0), (1, rows, width, 1)
        if data is None:
            return None, place, shape
        if page.fillorder == 2:
            data = imagecodecs.bitorder_decode(data)
        pixels = fax.decode(data, rows, width, int(page.compression), options)
        return pixels.reshape(shape), place, shape

    return decode
