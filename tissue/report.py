"""What a person or another program opens: overlays, contact sheets, CSV, HTML."""

import base64
import csv
import html
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from tissue.files import replacing

COUNT_COLUMNS = ("image", "height", "width", "contours", "gt_contours")
COUNT_COLUMNS += ("accuracy", "dice", "iou", "tissue_mm2", "seconds")
FRACTIONS = ("accuracy", "dice", "iou")
THUMBNAIL = 320  # pixels; the longer side of a picture in the report
OUTLINE = (255, 224, 0)  # RGB; yellow stands out from both stains

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Nuclei: masks and counts</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1rem; color: #222; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .4rem .6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid #ddd; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
img {{ display: block; width: 170px; }}
</style>
<h1>Nuclei: masks and counts</h1>
<p>{summary}.</p>
<div class="scroll"><table>
<thead><tr>{head}<th>image</th><th>prediction outlined</th><th>reference mask</th></tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<h2>Settings of this run</h2>
<table>{settings}</table>
</html>
"""


def overlay(
    image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = OUTLINE
) -> np.ndarray:
    """The image with the outlines of a mask's objects (holes too) drawn in.

    `image` is RGB uint8 (H, W, 3), `mask` bool (H, W); returns RGB uint8 (H, W, 3).
    """
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(image.copy(), outlines, -1, colour, 1)


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


def write_counts(path: Path | str, rows: Sequence[dict]) -> None:
    """Write counts.csv, a row per image with the columns of COUNT_COLUMNS, empty where unknown."""
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COUNT_COLUMNS, restval="", extrasaction="ignore")
        table.writeheader()
        for row in rows:
            rounded = {
                key: f"{value:.4f}" if isinstance(value, float) else value
                for key, value in row.items()
            }
            table.writerow(rounded)


def mean_count_error(rows: Sequence[dict]) -> float | None:
    """Mean over images of |contours - reference contours| / reference contours.

    Images without a reference, or whose reference is empty, do not count; None if none is left.
    """
    errors = [
        abs(row["contours"] - row["gt_contours"]) / row["gt_contours"]
        for row in rows
        if row.get("gt_contours")
    ]
    return sum(errors) / len(errors) if errors else None


def mean_row(rows: Sequence[dict]) -> dict:
    """Means over the images that have a value, by the columns that are averaged."""
    means = {}
    for column in ("contours", "gt_contours", "accuracy", "dice", "iou"):
        values = [row[column] for row in rows if column in row]
        if values:
            means[column] = sum(values) / len(values)
    return means


def text_table(rows: Sequence[dict]) -> str:
    """The counts and scores for a terminal: a line an image, a mean line, the mean count error."""
    width = max(len(row["image"]) for row in rows)
    lines = [f"{'image':{width}} | contours | reference contours | accuracy |   Dice"]
    for row in [*rows, {"image": "mean", **mean_row(rows)}]:
        cells = [
            f"{row['image']:{width}}",
            _cell(row.get("contours"), 8, 1),
            _cell(row.get("gt_contours"), 18, 1),
            _cell(row.get("accuracy"), 8, 4),
            _cell(row.get("dice"), 6, 4),
        ]
        lines.append(" | ".join(cells))
    error = mean_count_error(rows)
    if error is not None:
        lines.append(f"mean absolute error of the contour count: {error:.1%}")
    return "\n".join(lines)


def write_report(path: Path | str, folder: Path, rows: Sequence[dict], settings: dict) -> None:
    """Write report.html: one offline page with a row per image and the run's settings.

    Pictures are the `<name>_image.png`, `_overlay.png` and `_gt.png` of `folder`, embedded small;
    each links to its file, which lies beside the page.
    """
    columns = ["image", "contours", "gt_contours", "accuracy", "dice", "iou"]
    titles = {"gt_contours": "reference contours", "dice": "Dice", "iou": "IoU"}
    head = "".join(f"<th>{titles.get(column, column)}</th>" for column in columns)
    body = []
    for row in [*rows, {"image": "mean", **mean_row(rows)}]:
        name = row["image"]
        cells = [f"<td>{html.escape(name)}</td>"]
        for column in columns[1:]:
            digits = 4 if column in FRACTIONS else 1
            cells.append(f'<td class="number">{_cell(row.get(column), 0, digits)}</td>')
        for layer in ("image", "overlay", "gt"):
            cells.append(f"<td>{_thumbnail(folder / f'{name}_{layer}.png')}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    error = mean_count_error(rows)
    summary = f"{len(rows)} images" if len(rows) > 1 else "1 image"
    if error is not None:
        summary += f"; mean absolute error of the contour count {error:.1%}"
    listed = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in settings.items()
    )
    page = PAGE.format(summary=summary, head=head, body="\n".join(body), settings=listed)
    with replacing(path) as beside:
        beside.write_text(page, encoding="utf-8")


def _cell(value: float | None, width: int, digits: int) -> str:
    if value is None:
        return " " * width
    return f"{value:{width}.{digits}f}" if isinstance(value, float) else f"{value:{width}}"


def _thumbnail(path: Path) -> str:
    """An <img> of at most THUMBNAIL pixels a side that links to the file; empty without a file."""
    if not path.is_file():
        return ""
    pixels = cv2.imread(str(path))
    scale = min(1.0, THUMBNAIL / max(pixels.shape[:2]))
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    data = base64.b64encode(cv2.imencode(".jpg", small)[1]).decode()
    name = html.escape(path.name)
    link = html.escape(urllib.parse.quote(path.name))
    return f'<a href="{link}"><img alt="{name}" src="data:image/jpeg;base64,{data}"></a>'
