"""Opens TIFFs as themselves, strictly: of what is lost tifffile only logs."""

import logging
import re
import threading
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import tifffile

from tissue import strict
from tissue.files import check_regular

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, both byte orders
_NDPI, _XMP = 65420, 700  # tags


def signature_of(path: Path) -> bytes:
    """A file's first bytes; InputError for what is no file."""
    check_regular(path)
    with open(path, "rb") as file:
        return file.read(132)  # DICOM's name comes last


def is_of_scanner(path: Path) -> bool:
    """Whether a TIFF is one of Hamamatsu, Leica, Philips, Trestle or Ventana, which have tiles that
    overlap, several images on one stage, and levels that are padded; by what OpenSlide goes by.
    """
    _keep_quiet()
    try:
        with tifffile.TiffFile(path, is_mmstack=False, is_ndtiff=False) as tif:
            page = tif.pages.first
            maker, text = page.software, page.description
            return (
                _NDPI in page.tags
                or maker.startswith("MedScan")
                or (maker.startswith("Philips") and "DPUfsImport" in text)
                or "leica-microsystems.com/scn/" in text
                or "iScan" in str(page.tags.valueof(_XMP, default=""))  # text or bytes
            )
    except Exception:  # whoever reads it says why
        return False


class _Lost(threading.local):
    """What tifffile logged in this thread of pixels or tags that the TIFF being opened lacks."""

    messages = ()


_lost = _Lost()


@contextmanager
def open_tiff(path):
    """Open a TIFF as itself, and raise what tifffile only logs of what is lost.

    Tags and pages would silently be lost, and three channels pass as one grey plane.
    """
    _keep_quiet()
    _lost.messages = ()
    alone = {"is_mmstack": False, "is_ndtiff": False}  # Micro-Manager's, of several files
    with tifffile.TiffFile(path, **alone) as tif:
        alone |= _ome_alone(tif)
    with tifffile.TiffFile(path, **alone) as tif:
        if tif.series and _lost.messages:
            raise ValueError(_lost.messages[0])
        pages = [page for series in tif.series for level in series.levels for page in level.pages]
        for page in {id(page.keyframe): page.keyframe for page in pages if page}.values():
            strict.make_strict(page)
        yield tif


def _keep_quiet():
    logging.getLogger("tifffile").addFilter(_note_lost)  # has no effect the second time


def _note_lost(record):
    message = record.getMessage()
    if re.search("invalid (value|page) offset|zeroed|circular reference|corrupted tag", message):
        _lost.messages += (message,)
    return False  # to the filtered logger: keep it off stderr


def _ome_alone(tif):
    """How to open an OME-TIFF so that its pixels are its own: without the files that it names.

    tifffile reads the planes from the files that OME-XML names. Of a file that names another the
    metadata are left alone: its pages say what they are.
    """
    try:
        root = ElementTree.fromstring(tif.ome_metadata) if tif.is_ome else None
    except ElementTree.ParseError:
        return {"is_ome": False}
    if root is None:
        return {}
    own = root.get("UUID")
    for plane in [element for element in root.iter() if element.tag.endswith("TiffData")]:
        for uuid in [element for element in plane if element.tag.endswith("UUID")]:
            is_own = uuid.text == own if own else uuid.get("FileName") == tif.filename
            if not is_own:
                return {"is_ome": False}
            plane.remove(uuid)
    return {"omexml": ElementTree.tostring(root, encoding="unicode")}
