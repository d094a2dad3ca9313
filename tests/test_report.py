"""Pictures, tables and the page: by hand on small masks, and in a real browser."""

import html.parser
import json
import re
import shutil
import subprocess
import urllib.parse

import numpy as np
import pytest

from tissue import pictures, report
from tissue.synthetic import draw_tissue
from tissue.tables import REGION_COLUMNS

NAMES = [
    "plain_01",
    "with spaces and 'quotes' and \"more\"",
    "<script>document.title = 'executed'<script>",
    "=HYPERLINK(1)",
    "+1",
    "-1",
    "@SUM(A1)",
    "'already quoted",
    "Größe µm 核 🔬",
    "100% #1 a&b?c&amp;",
    "$lead ${rows}",
    "javascript:alert(1)",
]


def row(name, nuclei=10, reference=None, **more):
    there = {"image": name, "height": 60, "width": 80, "contours": nuclei - 1, "nuclei": nuclei}
    if reference is not None:
        there |= {"gt_contours": reference - 2, "gt_nuclei": reference, "dice": 0.9}
    return there | {"seconds": 1.25} | more


def write_pictures(folder, name, layers=("image", "overlay", "gt", "errors"), shape=(60, 80)):
    tissue = draw_tissue(*shape, seed=1)
    for layer in layers:
        pictures.write_image(folder / f"{name}_{layer}.png", tissue.image)


def page_of(folder, rows, settings=None):
    report.write_report(folder / "report.html", folder, rows, settings or {"threshold": "0.5"})
    return (folder / "report.html").read_text(encoding="utf-8")


class Elements(html.parser.HTMLParser):
    """The start tags of a page, (tag, attributes), and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def attributes(self, tag, name):
        return [
            attributes[name]
            for found, attributes in self.tags
            if found == tag and name in attributes
        ]


# --- what the rows come to


def test_agreement_of_counts_by_hand():
    rows = [row("a", 12, 10), row("b", 18, 20), row("c", 36, 30), row("d", 5)]
    agreed = report.count_agreement(rows)
    assert (agreed["counted"], agreed["images"]) == ("nuclei", 3)
    assert agreed["mean_absolute_error"] == pytest.approx(10 / 3)
    assert agreed["mean_relative_error"] == pytest.approx((0.2 + 0.1 + 0.2) / 3)
    assert agreed["bias"] == pytest.approx(2)
    assert (agreed["lower"], agreed["upper"]) == pytest.approx((2 - 1.96 * 4, 2 + 1.96 * 4))
    assert agreed["r2"] == pytest.approx(1 - (4 + 4 + 36) / 200)


def test_agreement_of_few_or_equal_images_leaves_out_what_is_not_defined():
    assert report.count_agreement([row("a")]) is None
    one = report.count_agreement([row("a", 3, 0)])
    assert one["mean_absolute_error"] == 3
    assert [one[k] for k in ("mean_relative_error", "lower", "upper", "r2")] == [None] * 4
    contours = [{"image": "a", "contours": 5, "gt_contours": 4}]
    assert report.count_agreement(contours)["counted"] == "contours"


def test_the_terminal_s_table_has_the_columns_that_are_known_and_a_mean():
    lines = report.text_table([row("a", 12, 10), row("long name", 8)]).splitlines()
    assert lines[0].split(" | ")[:3] == ["image    ", "nuclei", "reference nuclei"]
    assert "AJI" not in lines[0]
    assert lines[3].split(" | ")[:2] == ["mean     ", "  10.0"]
    assert lines[4] == "mean relative count error of nuclei: 20.0%"


def test_the_mean_of_dropped_nuclei_has_the_images_of_which_none_was():
    rows = [row("a", dropped=5), row("b"), row("c"), row("d", dropped=3), row("e")]
    assert report.mean_row(rows)["dropped"] == 8 / 5
    assert "dropped" not in report.mean_row(rows[1:3])


def test_of_many_images_the_terminal_shows_the_first_and_the_mean_of_all():
    lines = report.text_table([row(f"image {n:02}", n) for n in range(1, 61)]).splitlines()
    assert len(lines) == 1 + 50 + 2
    assert lines[50].startswith("image 50") and "30.5" in lines[51]  # the mean of 1 to 60
    assert lines[52] == "and 10 more images, which the mean has too"


# --- the page


def test_the_page_needs_nothing_from_outside(tmp_path):
    write_pictures(tmp_path, "a")
    page = page_of(tmp_path, [row("a", 12, 10), row("b", 12, 11)])
    elements = Elements(page)
    addresses = [*elements.attributes("a", "href"), *elements.attributes("img", "src")]
    assert len(addresses) > 8
    for address in addresses:
        assert address.startswith(("data:image/jpeg;base64,", "#row-")) or (
            not urllib.parse.urlsplit(address).scheme and (tmp_path / address).is_file()
        )
    assert not {tag for tag, _ in elements.tags} & {"link", "iframe", "object", "base"}
    assert not re.search(r"url\(|@import|fetch|XMLHttp", page)
    assert not elements.attributes("script", "src")


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_shown_as_it_is_and_links_to_its_files(tmp_path, name):
    write_pictures(tmp_path, name)
    (tmp_path / f"{name}_nuclei.csv").touch()
    elements = Elements(page_of(tmp_path, [row(name)], settings={name: name}))
    assert elements.text.count(name) >= 3
    assert elements.attributes("th", "data-value") == [name]
    links = [urllib.parse.unquote(link) for link in elements.attributes("a", "href")]
    endings = ("_nuclei.csv", "_image.png", "_overlay.png", "_gt.png", "_errors.png")
    assert links == [f"{name}{ending}" for ending in endings]
    assert len([tag for tag, _ in elements.tags if tag == "script"]) == 1
    assert not any(key.startswith("on") for _, attributes in elements.tags for key in attributes)


def test_a_file_name_that_is_no_text_is_linked(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")  # Latin-1, as os.listdir gives it
    write_pictures(tmp_path, name)
    link = Elements(page_of(tmp_path, [row(name)])).attributes("a", "href")[0]
    assert (tmp_path / urllib.parse.unquote(link, errors="surrogateescape")).is_file()


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(40), None])
def test_a_damaged_picture_is_said_to_be_unreadable(tmp_path, content):
    write_pictures(tmp_path, "a", layers=("image", "overlay"))
    path = tmp_path / "a_overlay.png"
    path.write_bytes(path.read_bytes()[:60] + bytes(500) if content is None else content)
    page = page_of(tmp_path, [row("a")])
    assert page.count("data:image/jpeg") == 1 and ">unreadable</a>" in page


def test_the_page_says_that_settings_differ(tmp_path):
    assert "same settings" not in page_of(tmp_path, [row("a")])
    report.write_report(tmp_path / "report.html", tmp_path, [row("a")], {}, ["threshold", "split"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Not all images of this folder have the same settings" in page
    assert "other threshold, split" in page


def test_an_error_without_a_reference_count_is_nowhere_nan(tmp_path):
    rows = [row("a", 3, 0, dice=float("nan")), row("b", 2, 0, dice=float("nan"))]
    for text in (Elements(page_of(tmp_path, rows)).text, report.text_table(rows)):
        assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)


def test_the_count_error_is_called_what_it_is(tmp_path):
    rows = [row("a", 12, 10), row("b", 18, 20)]  # off by 2 and 2: 20 % and 10 %
    text = " ".join(Elements(page_of(tmp_path, rows)).text.split())
    assert "mean absolute count error of nuclei2.0mean relative count error 15.0 %" in text


@pytest.mark.parametrize("references", [0, 1, 2])
def test_plots_come_with_the_second_reference(tmp_path, references):
    rows = [row(f"image {n}", 10 + n, 11 if n < references else None) for n in range(3)]
    elements = Elements(page_of(tmp_path, rows))
    assert len([tag for tag, _ in elements.tags if tag == "svg"]) == (2 if references == 2 else 0)
    points = [link for link in elements.attributes("a", "href") if link.startswith("#")]
    assert points == (["#row-0", "#row-1"] * 2 if references == 2 else [])
    assert set(link[1:] for link in points) <= set(elements.attributes("tr", "id"))


@pytest.mark.parametrize("counts", [[(0, 0), (0, 0)], [(5, 5), (5, 5)], [(0, 9), (100_000, 3)]])
def test_plots_of_odd_counts_stay_within_their_frame(tmp_path, counts):
    rows = [row(str(place), *pair) for place, pair in enumerate(counts)]
    plots = re.findall("<svg.*?</svg>", page_of(tmp_path, rows), re.DOTALL)
    assert len(plots) == 2
    for plot in plots:
        grid = re.findall(
            r'd="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n" style="[^"]*#ececec', plot
        )
        ends = np.array(grid, float).reshape(-1, 2)
        points = np.array(re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', plot), float)
        assert len(points) == 2
        assert (ends.min(0) - 0.1 <= points).all() and (points <= ends.max(0) + 0.1).all()
        assert (ends >= 0).all() and (ends <= (400, 300)).all()


def test_equal_counts_lie_on_the_line_of_identity(tmp_path):
    page = page_of(tmp_path, [row("a", 10, 10), row("b", 25, 25), row("c", 40, 30)])
    number = r"([\d.]+)"
    (ends,) = re.findall(
        rf'd="M {number} {number} \nL {number} {number} \n" style="[^"]*dasharray', page
    )[:1]
    left, below, right, above = map(float, ends)
    circles = re.findall(rf'<circle cx="{number}" cy="{number}"', page)[:3]
    (*equal, more) = [
        float(y) - below - (float(x) - left) * (above - below) / (right - left) for x, y in circles
    ]
    assert equal == pytest.approx([0, 0], abs=0.2)
    assert more < -10  # predicted are more: above the line


@pytest.mark.parametrize("name", NAMES)
def test_a_point_of_any_name_says_whose_it_is(tmp_path, name):
    elements = Elements(page_of(tmp_path, [row(name, 12, 10), row("b", 8, 9)]))
    assert elements.text.count(f"{name}: 12 predicted, 10 in the reference") == 2
    assert len([tag for tag, _ in elements.tags if tag == "script"]) == 1


def test_no_image_without_pictures_or_scores_breaks_the_page(tmp_path):
    write_pictures(tmp_path, "b", layers=("image",))
    page = page_of(tmp_path, [row("a"), row("b")])
    assert page.count("data:image/jpeg") == 1
    assert "Dice</button>" not in page and "reference nuclei" not in page


def test_embedded_pictures_share_the_page(tmp_path, monkeypatch):
    write_pictures(tmp_path, "a", layers=("image",), shape=(300, 640))
    sides = []
    for count in (1, 160, 300, 12_000):
        side = report._embedded_side(count, report.PAGE_BYTES)
        assert count * side**2 * report.BYTES_PER_PIXEL <= report.PAGE_BYTES
        sides.append(side)
    assert sides[:3] == [1024, 645, 240]
    assert sides[3] < 100
    linked = []
    for budget in (report.PAGE_BYTES, 10_000):
        monkeypatch.setattr(report, "PAGE_BYTES", budget)
        elements = Elements(page_of(tmp_path, [row("a")]))
        sides.append(elements.attributes("img", "width")[0])
        linked.append(len(elements.attributes("a", "data-linked")))
    assert sides[-2:] == ["640", "129"]
    assert linked == [0, 1]


def test_the_page_shows_the_regions_of_the_table(tmp_path):
    assert "Regions</h2>" not in page_of(tmp_path, [row("a")])
    columns = ("image", "region", "class", "area_px", "area_mm2", "nuclei", "nuclei_per_mm2")
    assert set(columns) < set(REGION_COLUMNS)
    cells = ["'=a", "<b>tumour", "'-Tumor", "", "0.25", "12", "48.0000"]  # as `cell` writes texts
    lines = [",".join(columns), ",".join(cells)]
    (tmp_path / "regions.csv").write_text("\n".join(lines))
    page = page_of(tmp_path, [row("a")])
    shown = ["=a", "&lt;b&gt;tumour", "-Tumor", "12", "0.25", "48.0000"]
    assert "".join(f"<td>{cell}</td>" for cell in shown) in page


def test_of_many_images_the_overlays_alone_are_embedded(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MANY", 2)
    for name in "ab":
        write_pictures(tmp_path, name)
    elements = Elements(page_of(tmp_path, [row("a", 5, 5), row("b", 6, 6)]))
    assert elements.attributes("img", "alt")[:2] == [f"prediction, {n}_overlay.png" for n in "ab"]
    assert elements.attributes("img", "loading") == ["lazy", "lazy"]
    links = [
        f"{name}_{layer}.png" for name in "ab" for layer in ("image", "overlay", "gt", "errors")
    ]
    assert [link for link in elements.attributes("a", "href") if link.endswith(".png")] == links


def test_a_picture_too_large_to_decode_is_linked_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "LARGEST_PICTURE", 60 * 80 - 1)
    write_pictures(tmp_path, "a", layers=("image",))
    page = page_of(tmp_path, [row("a")])
    assert "data:image/jpeg" not in page
    assert 'href="a_image.png" data-layer="image" data-linked>60 x 80 pixels</a>' in page


# --- in a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

CLICKS = """
<pre id="seen"></pre>
<script>
addEventListener("load", async () => {
  const seen = {};
  const names = () => [...rows.rows].map(row => row.cells[0].dataset.value);
  const heading = text => [...document.querySelectorAll("#images thead button")]
    .find(button => button.textContent === text);
  const state = () => [document.getElementById("viewer-name").textContent,
    viewer.querySelector("[aria-pressed=true]").dataset.layer];
  const press = key => {
    viewer.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
    return state();
  };
  heading("nuclei").click();
  seen.ascending = names();
  seen.sorted = heading("nuclei").closest("th").getAttribute("aria-sort");
  heading("nuclei").click();
  seen.descending = names();
  heading("Dice").click();
  seen.unknown_last = names();
  seen.others = heading("nuclei").closest("th").getAttribute("aria-sort");
  heading("image").click();
  seen.by_name = names();
  heading("image").focus();
  seen.focus = document.activeElement.textContent;

  document.querySelector("#row-1 a[data-layer=image]").click();
  seen.open = viewer.open;
  seen.first = state();
  seen.right = press("ArrowRight");
  seen.left = [press("ArrowLeft"), press("ArrowLeft")];
  viewer.querySelector("[data-layer=gt]").click();
  seen.button = state();
  seen.down = press("ArrowDown");
  seen.missing = viewer.querySelector("[data-layer=gt]").disabled;
  press("ArrowUp");
  while (!(picture.complete && picture.naturalWidth))
    await new Promise(resolve => setTimeout(resolve, 20));
  seen.source = picture.src.slice(0, 5);
  seen.pixels = [picture.naturalWidth, picture.naturalHeight];
  document.getElementById("viewer-close").click();
  seen.closed = !viewer.open;
  seen.title = document.title;
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
</script>
"""


def clicked(page, folder):
    """What CLICKS saw in a page, as it lies beside the files it links to."""
    path = page.with_name("clicked.html")
    path.write_text(
        page.read_text(encoding="utf-8").replace("</body>", f"{CLICKS}</body>"), encoding="utf-8"
    )
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update",
        f"--user-data-dir={folder}", "--virtual-time-budget=10000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout)
    assert seen, f"the page's script did not get to its end: {done.stderr[-500:]}"
    return json.loads(html.unescape(seen[1]))


@pytest.mark.skipif(not BROWSER, reason=f"no browser is installed: {', '.join(BROWSERS)}")
@pytest.mark.parametrize("linked", ["none", "all", "all but the overlay"])
def test_a_browser_sorts_enlarges_and_switches_layers(tmp_path, monkeypatch, linked):
    if linked == "all":
        monkeypatch.setattr(report, "PAGE_BYTES", 20_000)
    elif linked == "all but the overlay":
        monkeypatch.setattr(report, "MANY", 3)
    names = ["image 10", "image 9", "<script>document.title = 'executed'<script>"]
    write_pictures(tmp_path, names[0])
    write_pictures(tmp_path, names[1], shape=(120, 200))
    write_pictures(tmp_path, names[2], layers=("image", "overlay"))
    rows = [row(names[0], 9, 9), row(names[1], 100, 90, dice=0.5), row(names[2], 20)]
    page_of(tmp_path, rows)
    seen = clicked(tmp_path / "report.html", tmp_path / "browser")
    assert seen["ascending"] == [names[0], names[2], names[1]]
    assert (seen["sorted"], seen["others"]) == ("ascending", "none")
    assert seen["descending"] == [names[1], names[2], names[0]]
    assert seen["unknown_last"] == [names[1], names[0], names[2]]
    assert seen["by_name"] == [names[2], names[1], names[0]]
    assert seen["focus"] == "image"
    assert seen["open"]
    assert seen["first"] == [names[1], "image"]
    assert seen["right"] == [names[1], "overlay"]
    assert seen["left"] == [[names[1], "image"], [names[1], "errors"]]
    assert seen["button"] == [names[1], "gt"]
    assert seen["down"] == [names[0], "gt"]
    assert not seen["missing"]
    assert seen["source"] == ("data:" if linked == "none" else "file:")
    assert seen["pixels"] == [200, 120]
    assert seen["closed"]
    assert seen["title"] == "Nuclei: masks and counts"
