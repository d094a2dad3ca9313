"""Names that mean something to a shell, a browser, a spreadsheet or a terminal are names."""

import csv
import json
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from learning import checkpoints
from model import UNet
from tests.scripts import checkpoint_of, cut, infer, learn, table_of
from tests.test_outline_files import collection, feature, polygon, square
from tests.test_report import BROWSER, Elements
from tissue import exports, results, tables
from tissue.files import InputError
from tissue.synthetic import draw_tissue

ROOT = Path(__file__).parents[2]
RUNS = "document.title = 'executed'"
HOSTILE = [
    "\"quoted\" 'twice'",
    f"<script>{RUNS}<script>",
    f'<img src=x onerror="{RUNS}">',
    f"'\"><svg onload={RUNS}>",
    "two\nlines",
    "\u202egnp.exe",  # right to left
    "=cmd|' C'!A0",
    "-rf",
    "%s%n{0}",
    "back\\slash",
    "$(touch executed) `touch executed`; & |",
    "\U0001f52c" * 40,  # 160 bytes
    os.fsdecode(b"caf\xe9"),  # no UTF-8
    "</script><!--",
    "\x1b]0;title\x07",  # to a terminal
]
HOSTILE = [name.replace("</", "<") for name in HOSTILE]  # no file has a slash


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Results of images of all these names, with regions of such names too."""
    folder = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    checkpoints.save_checkpoint(folder / "a.pt", checkpoint_of(UNet(2)) | {"pixel_size_um": 0.25})
    (folder / "images").mkdir()
    (folder / "regions").mkdir()
    for number, name in enumerate(HOSTILE):
        image = draw_tissue(48, 48, seed=number).image
        with (folder / "images" / f"{name}.png").open("wb") as file:
            Image.fromarray(image).save(file, "PNG")
        if name.isprintable() and "\\" not in name:  # others are no names of annotations
            drawn = feature(polygon(square(4, 4, 30)), f"class {name}")
            drawn["properties"]["name"] = name
            path = folder / "regions" / f"{name}.geojson"
            path.write_text(json.dumps(collection(drawn)))
    infer(folder / "out", "--ckpt", folder / "a.pt", "--images", folder / "images", "--export",
          "--check_exports", "--density", "--regions", folder / "regions")  # fmt: skip
    return folder


def test_every_name_has_all_its_files_and_its_rows(finished):
    records, faults = results.finished(finished / "out")
    assert faults == [] and {r["row"]["image"] for r in records} == set(HOSTILE)
    for name in HOSTILE:
        exports.check_exports(finished / "out", name, ("csv", "geojson", "rois", "coco"))
        coco = json.loads(results.path_of(finished / "out", name, "coco").read_text())
        assert name in coco["images"][0]["file_name"]
    said = {row["image"] for row in tables.read_table(finished / "out" / "counts.csv")}
    as_text = {n.encode("utf-8", "backslashreplace").decode() for n in map(_utf8, HOSTILE)}
    assert said == as_text
    assert not list(finished.rglob("executed"))


def _utf8(name):
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def test_no_name_gives_a_terminal_orders(finished):
    flags = ["--images", finished / "images", "--ckpt", finished / "a.pt", "--gpu_id", "-1"]
    command = [sys.executable, ROOT / "inference.py", "--image_folder", finished / "said", *flags]
    called = subprocess.run(command, capture_output=True, check=False)
    said = (called.stdout + called.stderr).decode()
    assert called.returncode == 0, said
    assert "\\x1b]0;title\\x07" in said and "\\u202egnp" in said
    assert not {"\x1b", "\x07", "\u202e"} & set(said)


def test_no_cell_of_a_table_is_a_formula(finished):
    """OWASP, CSV Injection: = + - @, tab and carriage return at the beginning of a cell."""
    tables = list((finished / "out").glob("*.csv"))
    assert len(tables) > len(HOSTILE)
    cells = 0
    for path in tables:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                for cell in row:
                    cells += 1
                    number = cell.lstrip("-").replace(".", "", 1).isdigit()
                    assert number or not cell.startswith(tuple("=+-@\t\r")), (path, cell)
    assert cells > 500
    regions = table_of(finished / "out" / "regions.csv")
    assert "'=cmd|' C'!A0" in {row["region"] for row in regions}


def test_the_page_shows_the_names_and_runs_none(finished):
    page = (finished / "out" / "report.html").read_text(encoding="utf-8")
    elements = Elements(page)
    assert len([tag for tag, _ in elements.tags if tag == "script"]) == 1
    assert not any(key.startswith("on") for _, found in elements.tags for key in found)
    links = elements.attributes("a", "href")
    for name in HOSTILE:
        file = f"{name}_nuclei.csv"
        assert any(urllib.parse.unquote(x, errors="surrogateescape") == file for x in links), name


@pytest.mark.skipif(not BROWSER, reason="no browser is installed")
def test_a_browser_runs_nothing_of_a_name(finished, tmp_path):
    import re
    import subprocess

    page = finished / "out" / "report.html"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom",
               page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    title = re.search("<title>(.*?)</title>", page.read_text(encoding="utf-8"))[1]
    assert f"<title>{title}</title>" in done.stdout and "executed" not in title
    assert done.stdout.count("<svg onload") == done.stdout.count("onerror=x") == 0


NAMES = ["<script>alert(1)<script>", "=1+1", "-rf", "%s", "$(touch executed)", "\U0001f52c \u202ex"]


def test_runs_of_such_names_are_in_tensorboard_and_in_their_settings(root, tmp_path):
    cut(root)
    for name in NAMES[:3]:
        run = learn(root, tmp_path / "log", "--epoch", 1, f"--name={name}")
        assert run.name.endswith(f"-{name}")
        assert json.loads((run / "args.json").read_text(encoding="utf-8"))["name"] == name
        events = EventAccumulator(str(run))
        events.Reload()
        assert events.Tags()["scalars"]


@pytest.mark.parametrize("name", ["two\nlines", "a/../../b", "\x1b[2J", "..", "a\\b", "x" * 300])
def test_a_name_that_no_folder_can_have_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match="--name: found") as error:
        learn(tmp_path, tmp_path / "log", f"--name={name}")
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
