"""Writes small slides in the formats of scanners, as OpenSlide's documentation has them.

Each writer takes a path and the levels of a pyramid, RGB uint8, and returns what a reader should
find: a list of RGB uint8 (h, w, 3), by level.
"""

import io
import sqlite3
import struct
import zlib
from contextlib import closing

import cv2
import numpy as np
import tifffile
from PIL import Image

TILE = 64  # pixels
WHITE = 255
TIFF = {"tile": (TILE, TILE), "photometric": "rgb", "compression": "deflate", "metadata": None}
XML_TAG = 700
MARKERS = cv2.IMWRITE_JPEG_RST_INTERVAL, 2  # so that a JPEG can be read in part


def pyramid(generator, height=256, width=320, levels=3):
    """Smooth colours and, of every further level, an image of its own of half the size: a reader
    that takes its pixels from another level is caught.
    """
    found = []
    for level in range(levels):
        size = width >> level, height >> level
        coarse = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        found.append(cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC))
    return found


def padded(image, side=TILE):
    rows, columns = (-size % side for size in image.shape[:2])
    return np.pad(image, ((0, rows), (0, columns), (0, 0)))


def tiles(image, step=TILE):
    """The tiles of an image, row by row, each `step` pixels from the last: with overlap if less."""
    rows, columns = (range(0, size - TILE + 1, step) for size in image.shape[:2])
    return [[image[y : y + TILE, x : x + TILE] for x in columns] for y in rows]


def mosaic(grid):
    return np.concatenate([np.concatenate(row, axis=1) for row in grid])


def jpeg(image, *options):
    """JPEG of an image, and what a decoder makes of it."""
    best = cv2.IMWRITE_JPEG_QUALITY, 95
    full = cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
    data = cv2.imencode(".jpg", image[..., ::-1], [*best, *full, *options])[1].tobytes()
    return data, np.asarray(Image.open(io.BytesIO(data)))


def pages(path, levels, descriptions, **first):
    """A TIFF of one page a level; `first` are options of the first page alone."""
    with tifffile.TiffWriter(path) as tif:
        for level, (image, text) in enumerate(zip(levels, descriptions, strict=True)):
            own = {"subfiletype": 1} if level else first
            tif.write(image, description=text, **{"software": False, **TIFF, **own})


# --- TIFFs, which tifffile reads ---------------------------------------------------------------


def aperio(path, levels):
    """The second page is a thumbnail, in strips."""
    text = "Aperio Image Library v12.0.15\r\n320x256 (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990"
    with tifffile.TiffWriter(path) as tif:
        for level, image in enumerate(levels):
            tif.write(image, description=text, software=False, **TIFF)
            if level == 0:
                tif.write(levels[-1], description=text, photometric="rgb", metadata=None)
    return levels


def generic(path, levels):
    pages(path, levels, [None] * len(levels), resolution=(40000, 40000), resolutionunit=3)
    return levels


def ome(path, levels):
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as tif:
        told = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
        tif.write(levels[0], subifds=len(levels) - 1, **{**TIFF, "metadata": told})
        for image in levels[1:]:
            tif.write(image, subfiletype=1, **TIFF)
    return levels


# --- TIFFs of scanners -------------------------------------------------------------------------


def philips(path, levels):
    """Levels are padded to whole tiles, and what was not scanned has no tiles."""
    spacing = [
        f'<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING">'
        f'"{0.00025 * 2**n}" "{0.00025 * 2**n}"</Attribute></DataObject>'
        for n in range(len(levels))
    ]
    text = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array><DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>'
        '<Attribute Name="DICOM_PIXEL_SPACING">"0.00025" "0.00025"</Attribute>'
        '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>'
        f"{''.join(spacing)}</Array></Attribute></DataObject></Array></Attribute></DataObject>"
    )
    with tifffile.TiffWriter(path) as tif:
        for level, image in enumerate(map(padded, levels)):
            parts = [zlib.compress(tile.tobytes()) for row in tiles(image) for tile in row]
            parts[0] = b"" if level == 0 else parts[0]
            own = {"description": text, "software": "Philips DP v1.0"} if level == 0 else {}
            own |= {"subfiletype": 1} if level else {}
            tif.write(iter(parts), shape=image.shape, dtype=np.uint8, **TIFF, **own)
    expected = [image.copy() for image in levels]
    expected[0][:TILE, :TILE] = WHITE
    return expected


def leica(path, levels):
    """The scanned area is a part of the slide: what is read is this part."""
    um, left, top = 0.5, 40, 24  # pixels
    size = [round(1000 * um * n) for n in (levels[0].shape[1], levels[0].shape[0])]
    dimensions = "".join(
        f'<dimension sizeX="{image.shape[1]}" sizeY="{image.shape[0]}" r="{n}" ifd="{n}"/>'
        for n, image in enumerate(levels)
    )
    text = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection sizeX="{2 * size[0]}" sizeY="{3 * size[1]}"><image>'
        f"<pixels>{dimensions}</pixels>"
        f'<view sizeX="{size[0]}" sizeY="{size[1]}" '
        f'offsetX="{round(1000 * um * left)}" offsetY="{round(1000 * um * top)}"/><scanSettings>'
        "<objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings>"
        "<illuminationSource>brightfield</illuminationSource></illuminationSettings>"
        "</scanSettings></image></collection></scn>"
    )
    pages(
        path, levels, [text, *[None] * (len(levels) - 1)], resolution=(20000, 20000),
        resolutionunit=3,
    )  # fmt: skip
    return levels


def ventana_tiff(path, levels):
    xml = b'<iScan Magnification="20" ScanRes="0.465"/>\0'
    texts = [f"level={n} mag={20 / 2**n:g} quality=95" for n in range(len(levels))]
    told = [(XML_TAG, "B", len(xml), xml, True)]
    pages(path, [levels[-1], *levels], ["Label Image", *texts], extratags=told)
    return levels


def ventana_bif(path, levels):
    """Tiles of level 0 overlap; the writer cuts them from one image, which is what is read."""
    xml = b'<iScan Magnification="40" ScanRes="0.25"/>\0'
    grid = tiles(levels[0], TILE - 8)
    rows, columns = len(grid), len(grid[0])

    def number(row, column):  # from the bottom up, every other row from the right
        from_below = rows - 1 - row
        place = columns - 1 - column if from_below % 2 else column
        return from_below * columns + place + 1

    joints = [
        (number(row, column - 1), number(row, column), "RIGHT", 8, 0)
        for row in range(rows) for column in range(1, columns)
    ]  # fmt: skip
    joints += [
        (number(row, column), number(row - 1, column), "UP", 0, 8)
        for row in range(1, rows) for column in range(columns)
    ]  # fmt: skip
    joints = "".join(
        f'<TileJointInfo FlagJoined="1" Confidence="98" Direction="{way}" Tile1="{one}" '
        f'Tile2="{two}" OverlapX="{x}" OverlapY="{y}"/>'
        for one, two, way, x, y in joints
    )
    stitched = (
        f'<EncodeInfo Ver="2"><SlideStitchInfo><ImageInfo AOIScanned="1" AOIIndex="0" '
        f'NumRows="{rows}" NumCols="{columns}" Width="{TILE}" Height="{TILE}" Pos-X="0" Pos-Y="0">'
        f'{joints}</ImageInfo></SlideStitchInfo><AoiOrigin><AOI0 OriginX="0" OriginY="0"/>'
        f"</AoiOrigin></EncodeInfo>"
    ).encode() + b"\0"
    with tifffile.TiffWriter(path) as tif:
        for text, image, told in (
            ("Label Image", levels[-1], xml), ("level=0 mag=40 quality=95", mosaic(grid), stitched)
        ):  # fmt: skip
            own = {"extratags": [(XML_TAG, "B", len(told), told, True)]}
            tif.write(padded(image), description=text, **TIFF, **own, software=False)
    side = (TILE - 8) * (rows - 1) + TILE, (TILE - 8) * (columns - 1) + TILE
    return [levels[0][: side[0], : side[1]]]


def trestle(path, levels):
    """Tiles overlap here too, of the first level alone; its resolution is in micrometres."""
    grid = tiles(levels[0], TILE - 4)
    stored = [mosaic(grid), *levels[1:]]
    text = "Background Color=E6E6E6;White Balance=1;Objective Power=20;OverlapsXY=4 4 0 0 0 0"
    pages(
        path, stored, [text] * len(stored), software="MedScan", resolution=(0.5, 0.5),
        resolutionunit=1,
    )  # fmt: skip
    side = [(TILE - 4) * (len(line) - 1) + TILE for line in (grid, grid[0])]
    return [levels[0][: side[0], : side[1]], *levels[1:]]


def hamamatsu_ndpi(path, levels):
    """A JPEG a level, with restart markers so that it can be read in part, but for the last."""
    expected = []
    with tifffile.TiffWriter(path) as tif:
        for level, image in enumerate(levels):
            last = level == len(levels) - 1
            data, decoded = jpeg(image, *(() if last else MARKERS))
            expected.append(decoded)
            tags = [(271, "s", 0, "Hamamatsu", True), (65420, "I", 1, 1, True)]
            tags += [(65421, "f", 1, 20 / 2**level, True), (65424, "i", 1, 0, True)]
            tif.write(
                iter([data]), shape=image.shape, dtype=np.uint8, photometric="ycbcr",
                subsampling=(1, 1), compression="jpeg", rowsperstrip=image.shape[0],
                extratags=tags, metadata=None, software=False, resolution=(20000, 20000),
                resolutionunit=3,
            )  # fmt: skip
    return expected


def sakura(path, levels):
    """A database of JPEGs, one a tile and colour."""
    expected = []
    with closing(sqlite3.connect(path)) as base, base:
        base.execute("CREATE TABLE DataManagerSQLiteConfigXPO (TableName)")
        base.execute("INSERT INTO DataManagerSQLiteConfigXPO VALUES ('tiles')")
        base.execute("CREATE TABLE tiles (id PRIMARY KEY, data)")
        base.execute("CREATE TABLE SVSlideDataXPO (OID)")
        base.execute("CREATE TABLE SVHRScanDataXPO (ParentSlide, ResolutionMmPerPix)")
        base.execute("INSERT INTO SVSlideDataXPO VALUES (1)")
        base.execute("INSERT INTO SVHRScanDataXPO VALUES (1, 0.0005)")
        height, width = levels[0].shape[:2]
        head = struct.pack("<IIIII", TILE, width, height, 0, 1)
        base.execute("INSERT INTO tiles VALUES ('++MagicBytes', 'SVGigaPixelImage')")
        base.execute("INSERT INTO tiles VALUES ('Header', ?)", [head])
        for level, image in enumerate(levels):
            step, pixels = 2**level, padded(image).copy()
            for y in range(0, len(pixels), TILE):
                for x in range(0, pixels.shape[1], TILE):
                    for colour in range(3):
                        part = pixels[y : y + TILE, x : x + TILE, colour]
                        data = cv2.imencode(".jpg", part)[1].tobytes()
                        part[:] = np.asarray(Image.open(io.BytesIO(data)))
                        name = f"T;{x * step}|{y * step};{step};{colour};0"
                        base.execute("INSERT INTO tiles VALUES (?, ?)", [name, data])
            expected.append(pixels[: image.shape[0], : image.shape[1]])
    return expected


# --- several files -----------------------------------------------------------------------------


def hamamatsu_vms(path, levels):
    """Two JPEGs side by side and a small one, the map."""
    half = 3 * TILE
    parts = levels[0][:, :half], levels[0][:, half:], levels[-1]
    names = [f"{path.stem}{end}.jpg" for end in ("", "(1,0)", "_map2")]
    decoded = []
    for name, image in zip(names, parts, strict=True):
        data, pixels = jpeg(image, *MARKERS)
        (path.parent / name).write_bytes(data)
        decoded.append(pixels)
    height, width = levels[0].shape[:2]
    path.write_text(
        "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=2\nNoJpegRows=1\n"
        f"ImageFile={names[0]}\nImageFile(1,0)={names[1]}\nMapFile={names[2]}\nSourceLens=40\n"
        f"PhysicalWidth={250 * width}\nPhysicalHeight={250 * height}\n"
    )
    return [np.concatenate(decoded[:2], axis=1)]


def hamamatsu_vmu(path, levels):
    """12 bits a sample in columns, of which the upper 8 are read."""
    levels = [levels[0], levels[-1]]
    high, wide = levels[0].shape[:2]
    for name, image in zip(("image.ngr", "map.ngr"), levels, strict=True):
        height, width = image.shape[:2]
        head = b"GN\0\0" + struct.pack("<iii8xi", width, height, 16, 28)
        columns = (image[:, x : x + 16] for x in range(0, width, 16))
        data = b"".join((part.astype("<u2") << 4 | 7).tobytes() for part in columns)
        (path.parent / name).write_bytes(head + data)
    path.write_text(
        "[Uncompressed Virtual Microscope Specimen]\nImageFile=image.ngr\nMapFile=map.ngr\n"
        f"BitsPerPixel=36\nPixelOrder=RGB\nSourceLens=20\nPhysicalWidth={500 * wide}\n"
        f"PhysicalHeight={500 * high}\n"
    )
    return levels


def mirax(path, levels):
    """A folder of the slide's name has the tiles. The first column of them was not scanned, which
    is left out of the image, and one within was not either.
    """
    levels = levels[:2]
    folder = path.with_suffix("")
    folder.mkdir()
    slide, data, index = "ABCDEF", b"", []
    across = levels[0].shape[1] // TILE
    for level, image in enumerate(levels):
        page = []
        for y, row in enumerate(tiles(padded(image))):
            for x, tile in enumerate(row):
                if level == 0 and (x == 0 or (x, y) == (2, 1)):
                    continue
                png = cv2.imencode(".png", tile[..., ::-1])[1].tobytes()
                place = (y << level) * across + (x << level)
                page.append(struct.pack("<iiii", place, len(data), len(png), 0))
                data += png
        index.append(page)
    (folder / "Data0000.dat").write_bytes(data)
    start = len("01.02" + slide) + 8
    pointers, body, at = b"", b"", start + 4 * len(index)
    for page in index:
        pointers += struct.pack("<i", at)
        body += struct.pack("<iiii", 0, at + 8, len(page), 0) + b"".join(page)
        at = start + 4 * len(index) + len(body)
    head = b"01.02" + slide.encode() + struct.pack("<ii", start, 0)
    (folder / "Index.dat").write_bytes(head + pointers + body)
    text = (
        f"[GENERAL]\nSLIDE_ID={slide}\nIMAGENUMBER_X={across}\n"
        f"IMAGENUMBER_Y={levels[0].shape[0] // TILE}\nOBJECTIVE_MAGNIFICATION=20\n"
        "[HIERARCHICAL]\nINDEXFILE=Index.dat\nHIER_COUNT=1\nNONHIER_COUNT=0\n"
        f"HIER_0_NAME=Slide zoom level\nHIER_0_COUNT={len(levels)}\n"
    )
    text += "".join(f"HIER_0_VAL_{n}_SECTION=LEVEL_{n}\n" for n in range(len(levels)))
    text += "[DATAFILE]\nFILE_COUNT=1\nFILE_0=Data0000.dat\n"
    for level in range(len(levels)):
        text += (
            f"[LEVEL_{level}]\nOVERLAP_X=0\nOVERLAP_Y=0\nMICROMETER_PER_PIXEL_X={0.25 * 2**level}\n"
            f"MICROMETER_PER_PIXEL_Y={0.25 * 2**level}\nIMAGE_FORMAT=PNG\n"
            f"IMAGE_FILL_COLOR_BGR=16777215\nDIGITIZER_WIDTH={TILE}\nDIGITIZER_HEIGHT={TILE}\n"
            f"IMAGE_CONCAT_FACTOR={min(level, 1)}\n"
        )
    (folder / "Slidedat.ini").write_text(text)
    path.write_bytes(jpeg(levels[-1])[0])  # a picture of it, as scanners put there
    expected = [image.copy() for image in levels]
    expected[0][TILE : 2 * TILE, 2 * TILE : 3 * TILE] = WHITE
    return [expected[0][:, TILE:], expected[1][:, TILE // 2 :]]


def dicom(path, levels, is_jpeg=False):
    """A file a level, of one series; `path` is that of the largest."""
    from pydicom import uid
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    series, study, expected = uid.generate_uid(), uid.generate_uid(), []
    for level, image in enumerate(levels):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = uid.VLWholeSlideMicroscopyImageStorage
        meta.MediaStorageSOPInstanceUID = uid.generate_uid()
        meta.TransferSyntaxUID = uid.JPEGBaseline8Bit if is_jpeg else uid.ExplicitVRLittleEndian
        file = path.with_name(f"{path.stem}{f'_{level}' if level else ''}.dcm")
        data = FileDataset(file, {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta[0x00020002].value, meta[0x00020003].value
        data.SeriesInstanceUID, data.StudyInstanceUID = series, study
        data.Modality, data.PatientID = "SM", "drawn"
        data.ImageType = ["DERIVED" if level else "ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        data.ImageType[3] = "RESAMPLED" if level else "NONE"
        data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = image.shape[:2]
        data.TotalPixelMatrixFocalPlanes = 1
        data.Rows = data.Columns = TILE
        grid = tiles(padded(image))
        frames = [tile.tobytes() for row in grid for tile in row]
        if is_jpeg:
            frames = [jpeg(tile)[0] for row in grid for tile in row]
            grid = [[jpeg(tile)[1] for tile in row] for row in grid]
        expected.append(mosaic(grid)[: image.shape[0], : image.shape[1]])
        data.NumberOfFrames = len(frames)
        data.DimensionOrganizationType = "TILED_FULL"
        data.SamplesPerPixel = 3
        data.PhotometricInterpretation = "YBR_FULL_422" if is_jpeg else "RGB"
        data.PlanarConfiguration, data.PixelRepresentation = 0, 0
        data.BitsAllocated = data.BitsStored = 8
        data.HighBit = 7
        measures, shared = Dataset(), Dataset()
        measures.PixelSpacing = [0.00025 * 2**level] * 2
        shared.PixelMeasuresSequence = [measures]
        data.SharedFunctionalGroupsSequence = [shared]
        path_of_light = Dataset()
        path_of_light.OpticalPathIdentifier, path_of_light.ObjectiveLensPower = "0", "40"
        data.OpticalPathSequence = [path_of_light]
        data.PixelData = encapsulate(frames) if is_jpeg else b"".join(frames)
        data.save_as(file, enforce_file_format=True)
    return expected


def dicom_jpeg(path, levels):
    return dicom(path, levels, is_jpeg=True)
