"""What a person reads: the tables of the terminal and report.html."""

import io
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup, escape

from tissue import agreement, pictures, results, review, tables
from tissue.files import replacing

LAYERS = {"image": "image", "overlay": "prediction", "gt": "reference", "errors": "errors"}
LAYERS |= {"density_picture": "density", "tissue": "tissue"}
FILES = {
    "csv": "CSV",
    "parquet": "Parquet",
    "geojson": "GeoJSON",
    "geojson_gz": "GeoJSON",
    "labels": "labels",
    "rois": "ROIs",
    "coco": "COCO",
    "anndata": "AnnData",
    "prediction": "mask",
    "big_prediction": "mask",
    "distance": "depth",
    "big_distance": "depth",
    "density": "density",
    "tissue_geojson": "tissue",
    "review_geojson": "fields",
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

LINES, MOST_REGIONS = 50, 500  # of images in a terminal, and of regions in the page
PAGE = Path(__file__).with_name("report.html")
# Pictures of a page share so many bytes; a JPEG of tissue has about so many per pixel in base64.
PAGE_BYTES = 40_000_000
# From so many images on one picture of each is embedded, and all of them in so many bytes.
MANY, MANY_BYTES = 200, 12_000_000
BYTES_PER_PIXEL = 0.6
LARGEST_SIDE = 1024  # pixels of an embedded picture
THUMBNAIL = 240  # pixels of those that are enlarged from the file beside the page

PLOT = (400, 300)  # SVG's pixels
INK, QUIET, DASHED = "#1a1a1a", "#595959", "#9a4a00"  # as in the page
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 12}
STYLE |= {"axes.autolimit_mode": "round_numbers", "axes.xmargin": 0, "axes.ymargin": 0}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#737373"}
STYLE |= {"xtick.major.size": 0, "ytick.major.size": 0, "xtick.major.pad": 6}
STYLE |= {"xtick.labelcolor": QUIET, "ytick.labelcolor": QUIET, "axes.labelcolor": INK}
STYLE |= {"legend.frameon": False, "legend.labelcolor": QUIET}
STYLE |= {"lines.linewidth": 1, "grid.color": "#ececec"}

# --- what the rows come to


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


def count_agreement(rows: Sequence[dict]) -> dict | None:
    """`agreement.count_agreement` of the images with a reference, and what is `counted` ("nuclei"
    or "contours"); None for a number that they are too few for, and without any reference.
    """
    counted, pairs = count_pairs(rows)
    if not pairs:
        return None
    counts = [[row[key] for _, row in pairs] for key in (counted, f"gt_{counted}")]
    found = agreement.count_agreement(*counts).items()
    return {"counted": counted} | {k: None if v != v else v for k, v in found}


def mean_row(rows: Sequence[dict]) -> dict:
    """Means over the images that have a value, by the columns that are averaged; an image of which
    none was dropped, where others have some, has 0 of these.
    """
    means = {"image": "mean"}
    if any("dropped" in row for row in rows):
        rows = [{"dropped": 0} | row for row in rows]
    for column in COLUMNS:
        values = [row[column.key] for row in rows if _known(row, column.key)]
        if values:
            means[column.key] = sum(values) / len(values)
    return means


def text_table(rows: Sequence[dict]) -> str:
    """The counts and scores for a terminal: a line an image (LINES at most), a line that has the
    means of all, and the mean count error.
    """
    columns = _columns(rows)
    lines = [["image", *(column.title for column in columns)]]
    for row in [*rows[:LINES], mean_row(rows)]:
        lines.append([row["image"], *_texts(row, columns).values()])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    text = "\n".join(" | ".join(cells) for cells in padded)
    if len(rows) > LINES:
        text += f"\nand {len(rows) - LINES} more images, which the mean has too"
    agreed = count_agreement(rows)
    if agreed and agreed["mean_relative_error"] is not None:
        error = f"{agreed['mean_relative_error']:.1%}"
        text += f"\nmean relative count error of {agreed['counted']}: {error}"
    elif not agreed and (expected := expected_error(rows)):
        text += f"\ncounts of images that were not learned were off by {expected} in the mean: "
        text += "expect that here, and more of other kinds of tissue"
    return text


def expected_error(rows: Sequence[dict]) -> str:
    """The `expected_count_error` of the images, in percent; from the least to the largest where
    they differ, and "" where none has one.
    """
    known = [row["expected_count_error"] for row in rows if _known(row, "expected_count_error")]
    percents = dict.fromkeys(f"{100 * each(known):.0f}" for each in (min, max) if known)
    return f"{' to '.join(percents)} %" if percents else ""


def said_of_differing(settings: Sequence[str]) -> str:
    """That images of one folder were made in several ways, without a full stop."""
    return f"Not all images of this folder have the same settings: other {', '.join(settings)}"


def _known(row, key):
    return row.get(key) is not None and row[key] == row[key]  # NaN is not


def _columns(rows):
    """Those of COLUMNS for which any row has a value."""
    return [column for column in COLUMNS if any(_known(row, column.key) for row in rows)]


def _texts(row, columns):
    """A row's numbers as {title: text}, empty where one is not known."""
    texts = {}
    for key, title, digits in columns:
        value = row[key] if _known(row, key) else ""
        whole = not isinstance(value, float)
        texts[title] = f"{value}" if whole else f"{value:.{digits}f}"
    return texts


# --- the page


def write_report(
    path: Path | str,
    folder: Path,
    rows: Sequence[dict],
    settings: dict,
    differing: Sequence[str] = (),
    doubtful: Sequence[review.Field] = (),
) -> None:
    """Write report.html: one page that needs no network, for a screen or for paper.

    It has what the rows (`record.Row`) come to, two plots from two images with a reference on, a
    table with a row per image, the fields that are most `doubtful`, and the settings, of which the
    images' are said to be `differing` in those that are named. Pictures are `folder`'s
    `<name>_image.png`, `_overlay.png`, `_gt.png` and `_errors.png`, as far as they are there; they
    are embedded, the smaller the more there are, so that all fit into PAGE_BYTES, and are links to
    the files, which lie beside the page. Of MANY images all but the overlays are links alone.
    """
    folder = Path(folder)
    columns, agreed = _columns(rows), count_agreement(rows)
    shown = _embedded_pictures(folder, rows)
    images = [
        (row["image"], _files(folder, row["image"], FILES), there, _texts(row, columns))
        for row, there in zip(rows, shown, strict=True)
    ]
    # Names of files and settings are anybody's: all texts are escaped where they are put in.
    page = jinja2.Template(PAGE.read_text(encoding="utf-8"), autoescape=True).render(
        images=images,
        lazy=Markup(' loading="lazy"' * (len(rows) >= MANY)),
        agreed=agreed,
        fields=_fields(rows, doubtful),
        tables=[n for n in results.TABLES if n != results.REPORT and (folder / n).is_file()],
        regions=_regions(folder),
        differing=said_of_differing(differing) if differing else "",
        facts=list(_facts(rows, agreed)),
        plots=_plots(rows, agreed) if agreed and agreed["images"] > 1 else (),
        layers={key: LAYERS[key] for key in LAYERS if any(key in there for there in shown)},
        file_titles=FILES,
        outline=pictures.OUTLINE,
        error_colours=pictures.ERROR_COLOURS,
        titles=[column.title for column in columns],
        means=_texts(mean_row(rows), columns),
        settings=settings,
        breakable=_breakable,
        link=_link,
    )
    with replacing(path) as beside:
        beside.write_text(page, encoding="utf-8", errors="backslashreplace")


def _embedded_pictures(folder, rows):
    """{layer: (path, Embedded)} of each image."""
    shown = [_files(folder, row["image"], LAYERS) for row in rows]
    pictured, page_bytes = (LAYERS, PAGE_BYTES) if len(rows) < MANY else (("overlay",), MANY_BYTES)
    side = _embedded_side(sum(layer in there for there in shown for layer in pictured), page_bytes)

    def picture(layer, path):
        if layer in pictured:
            return pictures.embedded(path, side)
        return pictures.Embedded("", 0, 0, LAYERS[layer], linked=True)

    def with_pictures(paths):
        return {layer: (path, picture(layer, path)) for layer, path in paths.items()}

    with ThreadPoolExecutor() as pool:
        return list(pool.map(with_pictures, shown))


def _files(folder, name, kinds):
    """{kind: path} of an image's files of some kinds, as far as they are there."""
    paths = {kind: results.path_of(folder, name, kind) for kind in kinds}
    return {kind: path for kind, path in paths.items() if path.is_file()}


def _regions(folder):
    """The rows of regions.csv, as far as the page shows them."""
    path = folder / results.REGIONS
    return tables.read_table(path)[:MOST_REGIONS] if path.is_file() else []


def _fields(rows, doubtful):
    """(place of the image's row, field, picture) of each field that is shown."""
    places, found = {row["image"]: place for place, row in enumerate(rows)}, {}
    for path in {field.pictures for field in doubtful}:
        own = [field.place for field in doubtful if field.pictures == path]
        squares = pictures.embedded_squares(path, review.SIDE, own)
        found |= {(path, place): square for place, square in zip(own, squares, strict=True)}
    return [(places[row["image"]], row, found[path, place]) for row, place, path in doubtful]


def _embedded_side(count: int, page_bytes: float) -> int:
    """Pixels of the longer side of each of `count` pictures, so that all fit into `page_bytes`."""
    side = int((page_bytes / BYTES_PER_PIXEL / max(1, count)) ** 0.5)
    return min(side, LARGEST_SIDE if side >= pictures.ENLARGED_SIDE else THUMBNAIL)


def _breakable(name):
    """A name as HTML that a browser breaks after _ and - first."""
    return escape(name).replace("_", Markup("_<wbr>")).replace("-", Markup("-<wbr>"))


def _link(path):
    """A relative URL of a file beside the page; of its bytes, for it may not be text."""
    return urllib.parse.quote(os.fsencode(path.name))


def _number(value, digits=1):
    return f"{value:,.{digits}f}".replace(",", "\u202f")


def _signed(value):
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "\u2212")


def _facts(rows, agreed) -> Iterator[tuple[str, str, str]]:
    """What the page begins with: title, number, and what is said below it."""
    means = mean_row(rows)
    counted = agreed["counted"] if agreed else "nuclei" if "nuclei" in means else "contours"
    total = sum(row[counted] for row in rows if _known(row, counted))
    yield f"{counted} found", _number(total, 0), f"in {_number(len(rows), 0)} images"
    if agreed:
        error, lower, upper = (agreed[k] for k in ("mean_relative_error", "lower", "upper"))
        small = "" if error is None else f"mean relative count error {100 * error:.1f} %"
        title = f"mean absolute count error of {counted}"
        yield title, _number(agreed["mean_absolute_error"]), small
        small = "" if lower is None else f"95 % limits {_signed(lower)} to {_signed(upper)}"
        yield "bias of the count", _signed(agreed["bias"]), small
        if agreed["r2"] is not None:
            yield "R\u00b2 of the count", f"{agreed['r2']:.3f}", ""
    elif expected := expected_error(rows):
        yield "expected count error", expected, "the mean of images that were not learned"
    for key, title in (("dice", "Dice"), ("aji", "AJI"), ("pq", "PQ")):
        if key in means:
            lowest = min(row[key] for row in rows if _known(row, key))
            yield f"mean {title}", f"{means[key]:.3f}", f"lowest {lowest:.3f}"
    if "nuclei_per_mm2" in means:
        yield "mean nuclei per mm\u00b2", _number(means["nuclei_per_mm2"], 0), ""


# --- plots


class Plot(NamedTuple):
    """A plot of the page, whose points are links to the rows of their images."""

    title: str
    caption: str
    drawn: Markup  # SVG of all but the points
    points: list[tuple[float, float, int, str]]  # x, y in PLOT, place of the row, what it says


def _plots(rows, agreed) -> Iterator[Plot]:
    """Predicted against reference counts, and their differences (Bland-Altman)."""
    counted, pairs = count_pairs(rows)
    found, true = (np.array([row[k] for _, row in pairs]) for k in (counted, f"gt_{counted}"))
    most = max(found.max(), true.max())
    texts = [
        f"{row['image']}: {row[counted]} predicted, {row[f'gt_{counted}']} in the reference"
        for _, row in pairs
    ]
    places = [place for place, _ in pairs]

    def plot(title, caption, axes, values, lines):
        drawn, points = _drawn(axes, *values, lines)
        return Plot(title, caption, drawn, list(zip(*points, places, texts, strict=True)))

    yield plot(
        "Predicted against reference counts",
        "Predicted against reference counts; on the dashed line they are equal.",
        (f"reference {counted}", f"predicted {counted}"),
        (true, found),
        [("identity", "--", (most, most))],
    )
    mean, difference = (found + true) / 2, found - true
    lower, bias, upper = (agreed[k] for k in ("lower", "bias", "upper"))
    yield plot(
        "Bland-Altman plot of the counts",
        "Difference against mean (Bland and Altman), with bias and 95 % limits of agreement.",
        (f"mean of predicted and reference {counted}", "predicted \u2212 reference"),
        (mean, difference),
        [
            (f"bias {_signed(bias)}", "-", bias),
            (f"95 % limits {_signed(lower)} to {_signed(upper)}", "--", lower),
            (None, "--", upper),
        ],
    )


def _drawn(titles, x, y, lines):
    """The SVG of axes and lines, and where in it the points x, y are.

    A line is (label, dashes, level), level y all over the width, or where it is (x, y) from 0 to
    there.
    """
    from matplotlib import style  # here, for it takes a second and few calls need it
    from matplotlib.figure import Figure

    with style.context(STYLE, after_reset=True):  # whatever the user's matplotlibrc says
        figure = Figure([side / 72 for side in PLOT], dpi=72, layout="constrained")
        axes = figure.add_subplot(xlabel=titles[0], ylabel=titles[1], axisbelow=True)
        axes.plot(x, y, " ")  # the page draws the points
        for label, dashes, level in lines:
            how = {"linestyle": dashes, "color": INK if dashes == "-" else DASHED, "clip_on": False}
            if isinstance(level, tuple):
                axes.plot((0, level[0]), (0, level[1]), label=label, **how)
            else:
                axes.axhline(level, label=label, **how)
        axes.locator_params(nbins=5, integer=True)
        axes.grid(clip_on=False)
        figure.legend(loc="outside upper left", ncols=2)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    drawn = file.getvalue()
    drawn = drawn[drawn.index('<g id="figure_1">') : drawn.rindex("</svg>")]
    right, up = axes.transData.transform(np.stack([x, y], 1)).T
    # Two plots on a page would have the same ids, which nothing refers to.
    return Markup(re.sub(r' id="[^"]*"', "", drawn)), (right.round(1), (PLOT[1] - up).round(1))
