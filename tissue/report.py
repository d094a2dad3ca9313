"""What a person opens: overlays, contact sheets, report.html."""

import base64
import html
import math
import os
import string
import urllib.parse
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from tissue import agreement, results
from tissue.files import replacing

OUTLINE = (255, 224, 0)  # RGB; yellow stands out from both stains
# Okabe & Ito's colours (jfly.uni-koeln.de/color), which colour-blind people can tell apart, without
# those that are near the stains.
ERROR_COLOURS = {
    "matched": (255, 255, 255),
    "missed": (86, 180, 233),
    "merged": (0, 158, 115),
    "split": (240, 228, 66),
    "spurious": (213, 94, 0),
}
ERROR_MEANINGS = {
    "matched": "found",
    "missed": "in the reference alone",
    "merged": "several nuclei found as one",
    "split": "one nucleus found as several",
    "spurious": "found, not in the reference",
}

LAYERS = {"image": "image", "overlay": "prediction", "gt": "reference", "errors": "errors"}
FILES = {
    "csv": "CSV",
    "geojson": "GeoJSON",
    "labels": "labels",
    "rois": "ROIs",
    "coco": "COCO",
    "prediction": "mask",
    "big_prediction": "mask",
    "distance": "depth",
    "big_distance": "depth",
}


class Column(NamedTuple):
    """A number of the report's tables: its key in a row, its title, and its digits as a mean."""

    key: str
    title: str
    digits: int


COLUMNS = (
    Column("nuclei", "nuclei", 1),
    Column("gt_nuclei", "reference nuclei", 1),
    Column("contours", "contours", 1),
    Column("gt_contours", "reference contours", 1),
    Column("dice", "Dice", 4),
    Column("aji", "AJI", 4),
    Column("pq", "PQ", 4),
    Column("nuclei_per_mm2", "nuclei per mm\u00b2", 0),
    Column("dropped", "dropped", 1),
)

PAGE = Path(__file__).with_name("report.html")
# Pictures of a page share so many bytes; a JPEG of tissue has about so many per pixel in base64.
PAGE_BYTES = 40_000_000
BYTES_PER_PIXEL = 0.6
LARGEST_SIDE = 1024  # pixels of an embedded picture
ENLARGED_SIDE = 512  # pixels; smaller ones are enlarged from the file beside the page
THUMBNAIL = 240  # pixels of those
LARGEST_PICTURE = 2**28  # pixels; larger files are linked alone
JPEG = [cv2.IMWRITE_JPEG_QUALITY, 75, cv2.IMWRITE_JPEG_OPTIMIZE, 1]

DEFINITIONS = {
    "nuclei": "Objects after touching ones are split and specks are dropped.",
    "contours": "Outer contours of the mask: touching nuclei are one, holes are not counted.",
    "mean absolute count error": "Mean over images of |predicted - reference|.",
    "mean relative count error": "Mean over images with any in the reference of |predicted - "
    "reference| / reference.",
    "bias, limits of agreement": "Mean of predicted - reference, and that mean \u00b1 1.96 "
    "standard deviations, between which 95 % of images are expected (Bland and Altman 1986).",
    "R\u00b2": "1 - sum of squared differences to the reference / sum of squared differences of "
    "the reference to its mean: 1 where all counts are equal, below 0 where the reference's mean "
    "would be the better guess.",
    "Dice": "2 TP / (2 TP + FP + FN) of an image's pixels.",
    "AJI": "Aggregated Jaccard index (Kumar et al. 2017), of nuclei.",
    "PQ": "Panoptic quality (Kirillov et al. 2019), of nuclei: detection times segmentation.",
    "nuclei per mm\u00b2": "Nuclei / area of the tissue in the image.",
}
DROPPED = "Nuclei that are not counted and not in the mask, for their depth is below --confidence."


# --- pictures


def overlay(
    image: np.ndarray, labels: np.ndarray, colour: tuple[int, int, int] = OUTLINE
) -> np.ndarray:
    """The image with the outlines of objects (holes too) drawn in, on the objects' own pixels.

    `image` is RGB uint8 (H, W, 3), `labels` a mask bool (H, W) or one integer per nucleus (H, W);
    returns RGB uint8 (H, W, 3).
    """
    drawn = image.copy()
    drawn[_edges(labels)] = colour
    return drawn


def error_overlay(
    image: np.ndarray,
    labels: np.ndarray,
    reference_labels: np.ndarray,
    prediction_class: np.ndarray,
    reference_class: np.ndarray,
) -> np.ndarray:
    """The image with each nucleus outlined in the colour of its class (ERROR_COLOURS).

    `image` is RGB uint8 (H, W, 3), both label maps integer (H, W) with 0 as background. The class
    arrays have a class per label, at the label's own place, 0's is not used: names or numbers of
    `agreement.CLASSES`, as `agreement.errors` gives them. Of the reference, what is not matched is
    drawn, below the prediction. An outline is two pixels wide where something is wrong, but one
    where the prediction shows the same fault. Returns RGB uint8 (H, W, 3).
    """
    drawn = image.copy()
    colours = {"background": (0, 0, 0)} | ERROR_COLOURS
    palette = np.array([colours[name] for name in agreement.CLASSES], np.uint8)
    matched, missed = agreement.MATCHED, agreement.MISSED
    classes = _class_numbers(reference_class)[reference_labels]
    edge = _edges(reference_labels) & (classes != matched)
    edge |= _second_edges(reference_labels) & (classes == missed)
    drawn[edge] = palette[classes[edge]]
    classes = _class_numbers(prediction_class)[labels]
    edge = _edges(labels) | _second_edges(labels) & (classes != matched)
    drawn[edge] = palette[classes[edge]]
    return drawn


def _class_numbers(classes):
    """Numbers of `agreement.CLASSES`, uint8 (n,), of classes given as names or numbers."""
    classes = np.asarray(classes)
    if classes.dtype.kind in "iu":
        return classes.astype(np.uint8)
    return np.array([0, *map(agreement.CLASSES.index, classes[1:].tolist())], np.uint8)


def _edges(labels):
    """Pixels of objects, bool (H, W), with a side on another object, background or the outside."""
    padded = np.pad(labels, 1)
    edge = np.zeros(labels.shape, bool)
    for neighbour in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        edge |= neighbour != labels
    return edge & (labels != 0)


def _second_edges(labels):
    """Pixels within objects that lie at `_edges`."""
    return _edges(np.where(_edges(labels), 0, labels))


def contact_sheet(tiles: Sequence[np.ndarray], columns: int, gap: int = 4) -> np.ndarray:
    """Tiles of one size, RGB uint8 (h, w, 3), side by side on white, `gap` pixels apart."""
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    sheet = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8
    )
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        y, x = gap + row * (height + gap), gap + column * (width + gap)
        sheet[y : y + height, x : x + width] = tile
    return sheet


def write_image(path: Path | str, image: np.ndarray) -> None:
    """Write RGB uint8 (H, W, 3), or bool or uint8 (H, W), bool as 0 / 255; the ending says how."""
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    with replacing(path) as beside:  # not imwrite, which does not always notice a full disk
        beside.write_bytes(cv2.imencode(beside.suffix, image)[1])


# --- what the rows come to


class Agreement(NamedTuple):
    """How the predicted counts of images relate to the reference's; see `count_agreement`."""

    counted: str  # "nuclei" or "contours"
    images: int  # with a reference
    absolute_error: float  # mean |predicted - reference|
    relative_error: float | None  # mean of that / reference, where the reference is not empty
    bias: float  # mean of predicted - reference
    limits: tuple[float, float] | None  # the 95 % limits of agreement, of two images or more
    r2: float | None  # None where the reference is the same in all images


def count_pairs(rows: Sequence[dict]) -> tuple[str, list[tuple[int, dict]]]:
    """What is compared, nuclei or else contours, and (place, row) of the images that have both."""
    for counted in ("nuclei", "contours"):
        pairs = [
            (place, row)
            for place, row in enumerate(rows)
            if _known(row, counted) and _known(row, f"gt_{counted}")
        ]
        if pairs:
            return counted, pairs
    return "nuclei", []


def count_agreement(rows: Sequence[dict]) -> Agreement | None:
    """The Agreement of counts (`agreement.count_agreement`), None without any reference."""
    counted, pairs = count_pairs(rows)
    if not pairs:
        return None
    counts = [[row[key] for _, row in pairs] for key in (counted, f"gt_{counted}")]
    found = {
        key: None if value != value else value
        for key, value in agreement.count_agreement(*counts).items()
    }
    return Agreement(
        counted,
        found["images"],
        found["mean_absolute_error"],
        found["mean_relative_error"],
        found["bias"],
        None if found["lower"] is None else (found["lower"], found["upper"]),
        found["r2"],
    )


def mean_row(rows: Sequence[dict]) -> dict:
    """Means over the images that have a value, by the columns that are averaged."""
    means = {}
    for key in ("accuracy", "iou", *(column.key for column in COLUMNS)):
        values = [row[key] for row in rows if _known(row, key)]
        if values:
            means[key] = sum(values) / len(values)
    return means


def text_table(rows: Sequence[dict]) -> str:
    """The counts and scores for a terminal: a line an image, a mean line, the mean count error."""
    columns = _columns(rows)
    lines = [["image", *(column.title for column in columns)]]
    for row in [*rows, {"image": "mean", **mean_row(rows)}]:
        lines.append([row["image"], *(_text(row, column) for column in columns)])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    text = "\n".join(" | ".join(cells) for cells in padded)
    agreed = count_agreement(rows)
    if agreed and agreed.relative_error is not None:
        error = f"{agreed.relative_error:.1%}"
        text += f"\nmean relative count error of {agreed.counted}: {error}"
    return text


def _known(row, key):
    return row.get(key) is not None and row[key] == row[key]  # NaN is not


def _columns(rows):
    """Those of COLUMNS for which any row has a value."""
    return [column for column in COLUMNS if any(_known(row, column.key) for row in rows)]


def _text(row, column):
    """A row's number as a text, empty where it is not known."""
    if not _known(row, column.key):
        return ""
    value = row[column.key]
    return f"{value:.{column.digits}f}" if isinstance(value, float | np.floating) else f"{value}"


# --- the page


def write_report(
    path: Path | str,
    folder: Path,
    rows: Sequence[dict],
    settings: dict,
    differing: Sequence[str] = (),
) -> None:
    """Write report.html: one page that needs no network, for a screen or for paper.

    It has what the rows (`results.Row`) come to, two plots from two images with a reference on, a
    table with a row per image, and the settings, of which the images' are said to be `differing`
    in those that are named. Pictures are `folder`'s
    `<name>_image.png`, `_overlay.png`, `_gt.png` and `_errors.png`, as far as they are there; they
    are embedded, the smaller the more there are, so that all fit into PAGE_BYTES, and are links to
    the files, which lie beside the page.
    """
    folder = Path(folder)
    pictures = [_pictures(folder, row["image"]) for row in rows]
    layers = [layer for layer in LAYERS if any(layer in there for there in pictures)]
    side = _embedded_side(sum(map(len, pictures)))
    with ThreadPoolExecutor() as pool:
        cells = list(pool.map(lambda there: _picture_cells(there, layers, side), pictures))
    columns = _columns(rows)
    dropped = any(column.key == "dropped" for column in columns)
    definitions = DEFINITIONS | ({"dropped": DROPPED} if dropped else {})
    body = [
        _table_row(place, row, links, columns, folder)
        for place, (row, links) in enumerate(zip(rows, cells, strict=True))
    ]
    agreed = count_agreement(rows)
    page = string.Template(PAGE.read_text(encoding="utf-8")).substitute(
        lead=_lead(folder, rows, agreed, differing),
        facts="\n".join(_facts(rows, agreed)),
        plots=_plots(rows, agreed),
        legend=_legend(layers),
        head=_head(layers, columns),
        body="\n".join(body),
        foot=_foot(rows, layers, columns) if len(rows) > 1 else "",
        definitions="\n".join(
            f"<div><dt>{term}</dt><dd>{text}</dd></div>" for term, text in definitions.items()
        ),
        layers="".join(
            f'<button type="button" data-layer="{layer}">{LAYERS[layer]}</button>'
            for layer in layers
        ),
        settings="".join(
            f'<tr><th scope="row">{_escape(key)}</th><td>{_escape(value)}</td></tr>'
            for key, value in settings.items()
        ),
    )
    with replacing(path) as beside:
        beside.write_text(page, encoding="utf-8", errors="backslashreplace")


def _escape(value):
    return html.escape(str(value))


def _breakable(name):
    """A name as HTML that a browser breaks after _ and - first."""
    return _escape(name).replace("_", "_<wbr>").replace("-", "-<wbr>")


def _link(path):
    """A relative URL of a file beside the page; of its bytes, for it may not be text."""
    return urllib.parse.quote(os.fsencode(path.name))


def _number(value, digits=1):
    return f"{value:,.{digits}f}".replace(",", "\u202f")


def _signed(value):
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "\u2212")


def _lead(folder, rows, agreed, differing):
    text = f"{len(rows)} image{'s' * (len(rows) != 1)}"
    text += f", {agreed.images} with a reference" if agreed else ", no reference"
    tables = [
        f'<a href="{name}">{name}</a>'
        for name in (results.COUNTS, results.ERRORS)
        if (folder / name).is_file()
    ]
    text += f". The numbers: {', '.join(tables)}." if tables else "."
    if differing:
        text += f" <strong>{said_of_differing(differing)}</strong> (see the settings below)."
    return text


def said_of_differing(settings: Sequence[str]) -> str:
    """That images of one folder were made in several ways, without a full stop."""
    return f"Not all images of this folder have the same settings: other {', '.join(settings)}"


def _facts(rows, agreed) -> Iterable[str]:
    def fact(title, value, small=""):
        small = f"<small>{small}</small>" if small else ""
        return f"<div><dt>{title}</dt><dd>{value}{small}</dd></div>"

    means = mean_row(rows)
    counted = agreed.counted if agreed else "nuclei" if "nuclei" in means else "contours"
    total = sum(row[counted] for row in rows if _known(row, counted))
    yield fact(f"{counted} found", _number(total, 0), f"in {_number(len(rows), 0)} images")
    if agreed:
        error = agreed.relative_error
        share = f"mean relative count error {error:.1%}" if error is not None else ""
        title = f"mean absolute count error of {counted}"
        yield fact(title, _number(agreed.absolute_error), share.replace("%", " %"))
        limits = agreed.limits
        small = "95 % limits {} to {}".format(*map(_signed, limits)) if limits else ""
        yield fact("bias of the count", _signed(agreed.bias), small)
        if agreed.r2 is not None:
            yield fact("R\u00b2 of the count", f"{agreed.r2:.3f}")
    for key, title in (("dice", "Dice"), ("aji", "AJI"), ("pq", "PQ")):
        if key in means:
            lowest = min(row[key] for row in rows if _known(row, key))
            yield fact(f"mean {title}", f"{means[key]:.3f}", f"lowest {lowest:.3f}")
    if "nuclei_per_mm2" in means:
        yield fact("mean nuclei per mm\u00b2", _number(means["nuclei_per_mm2"], 0))


def _legend(layers):
    lists = {"overlay": {"nuclei": OUTLINE}}
    lists["errors"] = {f"{name}: {ERROR_MEANINGS[name]}": c for name, c in ERROR_COLOURS.items()}
    return "\n".join(
        f'<ul class="legend" data-of="{layer}"><li>Outlines of \u201c{LAYERS[layer]}\u201d:</li>'
        + "".join(_swatch(text, colour) for text, colour in colours.items())
        + "</ul>"
        for layer, colours in lists.items()
        if layer in layers
    )


def _swatch(text, colour):
    thin = ' class="thin"' if colour in (OUTLINE, ERROR_COLOURS["matched"]) else ""
    return f'<li><i{thin} style="border-color:rgb({",".join(map(str, colour))})"></i>{text}</li>'


def _head(layers, columns):
    def sortable(title, kind):
        button = f'<button type="button">{title}</button>'
        return f'<th scope="col"{kind} aria-sort="none">{button}</th>'

    pictures = [f'<th scope="col" class="picture">{LAYERS[layer]}</th>' for layer in layers]
    numbers = [sortable(column.title, ' class="number"') for column in columns]
    return "".join([sortable("image", ""), *pictures, *numbers])


def _table_row(place, row, links, columns, folder):
    name = row["image"]
    beside = [(results.path_of(folder, name, kind), title) for kind, title in FILES.items()]
    files = " ".join(
        f'<a href="{_link(path)}">{title}</a>' for path, title in beside if path.is_file()
    )
    texts = {column.title: _text(row, column) for column in columns}
    facts = ", ".join(f"{title} {text}" for title, text in texts.items() if text)
    return (
        f'<tr id="row-{place}" data-facts="{facts}"><th scope="row" data-value="{_escape(name)}">'
        f'{_breakable(name)}<span class="files">{files}</span></th>{links}{_number_cells(texts)}'
        "</tr>"
    )


def _foot(rows, layers, columns):
    means = mean_row(rows)
    texts = {column.title: _text(means, column) for column in columns}
    pictures = '<td class="picture"></td>' * len(layers)
    cells = _number_cells(texts)
    return f'<tfoot><tr><th scope="row">mean</th>{pictures}{cells}</tr></tfoot>'


def _number_cells(texts):
    return "".join(
        f'<td class="number" data-title="{title}" data-value="{text}">{text}</td>'
        for title, text in texts.items()
    )


def _pictures(folder, name):
    paths = {layer: results.path_of(folder, name, layer) for layer in LAYERS}
    return {layer: path for layer, path in paths.items() if path.is_file()}


def _embedded_side(count: int) -> int:
    """Pixels of the longer side of each of `count` pictures, so that they fit into PAGE_BYTES."""
    side = int((PAGE_BYTES / BYTES_PER_PIXEL / max(1, count)) ** 0.5)
    return min(side, LARGEST_SIDE if side >= ENLARGED_SIDE else THUMBNAIL)


def _picture_cells(paths, layers, side):
    """A <td> per layer: the picture of at most `side` pixels, a link to its file.

    A link is marked `data-linked` where the file is what to enlarge.
    """
    cells = []
    for layer in layers:
        content = ""
        if layer in paths:
            path = paths[layer]
            picture, linked = _embedded(path, side, _escape(f"{LAYERS[layer]}, {path.name}"))
            mark = " data-linked" if linked else ""
            content = f'<a href="{_link(path)}" data-layer="{layer}"{mark}>{picture}</a>'
        cells.append(f'<td class="picture">{content}</td>')
    return "".join(cells)


def _embedded(path, side, alt):
    """An <img> of a PNG with at most `side` pixels a side, and whether its file shows much more."""
    encoded = np.fromfile(path, np.uint8)
    if len(encoded) < 24:
        return "unreadable", False
    width, height = encoded[16:24].view(">u4").tolist()  # of the header; PNG 1.2, section 4.1.1
    if height * width > LARGEST_PICTURE:
        return f"{height} x {width} pixels", True
    pixels = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)  # a mask stays grey, which is smaller
    if pixels is None or pixels.shape[:2] != (height, width):
        return "unreadable", False
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", pixels, JPEG)[1]
    source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    image = (
        f'<img alt="{alt}" width="{size[0]}" height="{size[1]}" decoding="async" src="{source}">'
    )
    return image, scale < 1 and side < ENLARGED_SIDE


# --- plots


def _plots(rows, agreed):
    """Predicted against reference counts, and their differences (Bland-Altman), from two images on.

    The SVG is written here because its points are links to the rows of their images, and say whose
    they are.
    """
    if not agreed or agreed.images < 2:
        return ""
    counted, pairs = count_pairs(rows)
    counts = [(row[f"gt_{counted}"], row[counted], row["image"], place) for place, row in pairs]
    most = max(max(g, p) for g, p, *_ in counts)
    against = _scatter(
        "Predicted against reference counts",
        (f"reference {counted}", f"predicted {counted}"),
        [(g, p, f"{name}: {p} predicted, {g} in the reference", at) for g, p, name, at in counts],
        [(1, 0, "dashed", "identity")],
        extent=((0, most), (0, most)),
    )
    low, high = agreed.limits
    bland_altman = _scatter(
        "Bland-Altman plot of the counts",
        (f"mean of predicted and reference {counted}", "predicted \u2212 reference"),
        [((g + p) / 2, p - g, f"{name}: {p - g:+g}", at) for g, p, name, at in counts],
        [
            (0, high, "dashed", f"+1.96 SD: {_signed(high)}"),
            (0, agreed.bias, "line", f"bias: {_signed(agreed.bias)}"),
            (0, low, "dashed", f"\u22121.96 SD: {_signed(low)}"),
        ],
    )
    captions = (
        "Predicted against reference counts; on the dashed line they are equal.",
        "Difference against mean (Bland and Altman), with bias and 95 % limits of agreement.",
    )
    figures = zip((against, bland_altman), captions, strict=True)
    figures = "".join(
        f"<figure>{svg}<figcaption>{text}</figcaption></figure>" for svg, text in figures
    )
    return f'<h2>Agreement of the counts</h2><div class="plots">{figures}</div>'


def _scatter(title, axes, points, lines, extent=None):
    """An SVG of points (x, y, what it says, row's place) and of lines y = slope x + level.

    Lines are (slope, level, CSS class, label); `axes` are the titles of x and y, and `extent` what
    they must show besides the points.
    """
    width, height, left, top, bottom = 400, 300, 50, 10, 46  # SVG's pixels
    right = max(112, 8 + 7 * max(len(label) for *_, label in lines))  # a letter has 7 at most
    extent = extent or ((), [level for _, level, _, _ in lines])
    x_ticks = _ticks([*extent[0], *(x for x, *_ in points)])
    y_ticks = _ticks([*extent[1], *(y for _, y, *_ in points)])

    def place_x(x):
        share = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return round(left + share * (width - left - right), 1)

    def place_y(y):
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(height - bottom - share * (height - top - bottom), 1)

    x_end, y_end, floor = width - right, top, height - bottom
    drawn = []
    for tick in x_ticks:
        x = place_x(tick)
        drawn.append(f'<path class="grid" d="M{x} {floor}V{y_end}"/>')
        drawn.append(
            f'<text class="tick" x="{x}" y="{floor + 16}" text-anchor="middle">{_tick(tick)}'
        )
        drawn.append("</text>")
    for tick in y_ticks:
        y = place_y(tick)
        drawn.append(f'<path class="grid" d="M{left} {y}H{x_end}"/>')
        drawn.append(
            f'<text class="tick" x="{left - 6}" y="{y + 4}" text-anchor="end">{_tick(tick)}'
        )
        drawn.append("</text>")
    drawn.append(f'<path class="axis" d="M{left} {y_end}V{floor}H{x_end}"/>')
    label_y = -np.inf
    for slope, level, kind, label in sorted(lines, key=lambda line: -line[1]):
        ends = [place_y(slope * x + level) for x in (x_ticks[0], x_ticks[-1])]
        drawn.append(f'<path class="{kind}" d="M{left} {ends[0]}L{x_end} {ends[1]}"/>')
        label_y = max(ends[1] + 4, label_y + 14)  # labels of lines that coincide do not
        drawn.append(f'<text class="tick" x="{x_end + 5}" y="{label_y}">{label}</text>')
    radius = 4 if len(points) <= 100 else 2.5
    for x, y, text, place in points:
        drawn.append(
            f'<a href="#row-{place}" tabindex="-1"><circle cx="{place_x(x)}" cy="{place_y(y)}" '
            f'r="{radius}"><title>{_escape(text)}</title></circle></a>'
        )
    middle_x, middle_y = (left + x_end) / 2, (y_end + floor) / 2
    drawn.append(f'<text x="{middle_x}" y="{height - 8}" text-anchor="middle">{axes[0]}</text>')
    turned = f'transform="translate(13 {middle_y}) rotate(-90)"'
    drawn.append(f'<text {turned} text-anchor="middle">{axes[1]}</text>')
    view = f'viewBox="0 0 {width} {height}"'
    return f'<svg {view} role="group" aria-label="{title}">{"".join(drawn)}</svg>'


def _ticks(values):
    """About five round numbers from at most the lowest value to at least the highest."""
    low, high = min(values), max(values)
    rough = (high - low or 1) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * k for k in range(first, max(last, first + 1) + 1)]


def _tick(value):
    return f"{value:.10g}".replace("-", "\u2212")
