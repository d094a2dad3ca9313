"""The folder of results: names, records and the tables made from them."""

import copy
import csv
import hashlib
import json
import os
import random
import re

import numpy as np
import pytest

from tests.test_report import NAMES
from tests.test_report import row as counted
from tissue import claims, results, tables
from tissue.files import InputError

MADE_WITH = {
    "checkpoint": "0" * 64,
    "threshold": 0.45,
    "tta": False,
    "sizes": [1.0],
    "overlap": 96,
    "split": {"sigma": 0.5, "h": 0.05, "hole": 2.5, "smallest": 2.5},
    "version": "0.1.0",
    "pixel_size": None,
    "bits": None,
    "files": [[10, 20], None, None],
}
ROW = {
    "image": "a", "height": 60, "width": 80, "contours": 9, "nuclei": 10, "nuclei_in_frame": 8,
    "tissue": 0.75, "seconds": 1.5, "gt_contours": 8, "gt_nuclei": 11, "accuracy": 0.9,
    "dice": 0.8, "iou": 0.7, "aji": 0.6, "pq": 0.5, "dq": 0.6, "sq": 0.8,
    "errors": {
        "matched": 7, "missed": 2, "spurious": 1, "merged_reference": 2, "merged_prediction": 1,
        "split_reference": 0, "split_prediction": 0,
    },
}  # fmt: skip


def finish(folder, name="a", made_with=MADE_WITH, **more):
    """Write files of an image, and the record that it is finished; return the record's path."""
    with claims.working(folder):
        for kind in ("prediction", "csv", "geojson"):
            results.path_of(folder, name, kind).write_text(f"{kind} of an image")
        shown = {"threshold": made_with["threshold"]}
        results.write(folder, ROW | {"image": name} | more, made_with, shown)
    return folder / "rows" / f"{name}.json"


def names_of(records):
    return [record["row"]["image"] for record in records]


# --- names


def test_a_name_leads_to_a_file_of_the_folder(tmp_path):
    assert results.path_of(tmp_path, "a b", "overlay") == tmp_path / "a b_overlay.png"
    assert results.path_of(tmp_path, "a b", "record") == tmp_path / "rows" / "a b.json"


LEADING_OUT = ["../evil", "..", ".", "", "a/b", "/etc/passwd", "a\0b", "a/", "\ud800"]


@pytest.mark.parametrize("name", LEADING_OUT)
def test_a_name_that_is_no_file_s_is_refused_wherever_a_path_is_made(tmp_path, name):
    with pytest.raises(InputError, match=r"expected .* name"):
        results.path_of(tmp_path, name, "image")
    (fault,) = results.check_names(tmp_path / "new", [name])
    assert "expected" in fault and "\n" not in fault
    assert not list(tmp_path.iterdir())


def test_a_name_may_be_as_long_as_the_longest_ending_leaves_room(tmp_path):
    room = os.pathconf(tmp_path, "PC_NAME_MAX") - len("_nuclei.geojson.gz")
    assert results.check_names(tmp_path / "not" / "there", ["n" * room]) == []
    for name in ("n" * (room + 1), "ü" * (room // 2 + 1)):
        (fault,) = results.check_names(tmp_path / "not" / "there", [name])
        assert f"expected at most {room}" in fault
    (tmp_path / ("n" * room + "_nuclei.geojson.gz")).touch()  # it does fit


ALIKE = [("Slide", "slide"), ("B\u00e4r", "Ba\u0308r"), ("STRASSE", "straße"), ("x", "x")]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_names_of_one_file_on_some_systems_are_refused(tmp_path, one, other):
    (fault,) = results.check_names(tmp_path, [one, "more", other])
    assert one in fault and other in fault
    assert results.check_names(tmp_path, [one, "more"]) == []


def test_a_name_that_differs_by_case_from_one_of_an_earlier_call_is_refused(tmp_path):
    finish(tmp_path, "Slide")
    assert results.check_names(tmp_path, ["Slide"]) == []
    assert len(results.check_names(tmp_path, ["slide"])) == 1


# --- the folder


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "file_rows").mkdir()
    (tmp_path / "file_rows" / "rows").touch()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "rows").symlink_to(tmp_path)
    (tmp_path / "folder" / "a_gt.png").mkdir(parents=True)
    (tmp_path / "record" / "rows" / "a.json").mkdir(parents=True)
    for name in ("file", "file/below", "file_rows", "link", "folder", "record"):
        before = sorted(tmp_path.rglob("*"))
        with (
            pytest.raises(InputError, match=r"expected a (file|folder)"),
            claims.working(tmp_path / name),
        ):
            raise AssertionError("it was taken")
        assert sorted(tmp_path.rglob("*")) == before


def test_the_parts_of_a_killed_run_are_removed_from_both_folders(tmp_path):
    finish(tmp_path)
    for name in (".0123456789ab.part", ".0123456789ab.part.png", "rows/.0123456789ab.part.json"):
        (tmp_path / name).touch()
    with claims.working(tmp_path):
        assert not list(tmp_path.rglob("*.part*"))
    assert names_of(results.finished(tmp_path)[0]) == ["a"]


# --- records


@pytest.mark.parametrize("name", [*NAMES, b"caf\xe9".decode("utf-8", "surrogateescape"), ".x"])
def test_a_record_of_any_name_is_read_as_it_was_written(tmp_path, name):
    finish(tmp_path, name, nuclei_per_mm2=float("nan"))
    (record,), faults = results.finished(tmp_path)
    assert record["row"] == ROW | {"image": name}  # what is not a number is not known
    assert record["made_with"] == MADE_WITH
    assert not faults and not results.lost(tmp_path, record)


def test_without_a_record_an_image_is_not_finished(tmp_path):
    assert results.finished(tmp_path) == ([], [])
    finish(tmp_path)
    results.forget(tmp_path, "a")
    assert results.read(tmp_path, "a") is None
    assert results.finished(tmp_path) == ([], [])


def spoil(path, how):
    if how == "gone":
        path.unlink()
    elif how == "link":
        other = path.rename(path.with_name("elsewhere"))
        path.symlink_to(other)
    else:
        path.write_bytes({"empty": b"", "short": path.read_bytes()[:-1]}[how])


@pytest.mark.parametrize("how", ["gone", "empty", "short", "link"])
def test_an_image_whose_file_is_gone_or_changed_is_not_finished(tmp_path, how):
    finish(tmp_path)
    finish(tmp_path, "b")
    spoil(tmp_path / "a_nuclei.csv", how)
    records, (fault,) = results.finished(tmp_path)
    assert names_of(records) == ["b"]
    assert "a_nuclei.csv" in fault
    assert results.lost(tmp_path, results.read(tmp_path, "a")) == ["csv"]


def sealed(record):
    """A record whose checksum is right, whatever it holds."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True)
    return json.dumps(content | {"sha256": hashlib.sha256(text.encode()).hexdigest()})


def places(content, path=()):
    """The paths to all values within a record, of lists and dicts too."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


WRONG = [float("nan"), float("inf"), -float("inf"), -1, -0.5, 10**400, 1e300, "", "nan", "12", None]
WRONG += [[], {}, [[]], {"a": 1}, True]


def wrong_values():
    """A record with one thing wrong in each, its checksum right, and what is wrong."""
    record = {"row": ROW, "made_with": MADE_WITH, "shown": {"threshold": "0.45"}}
    record |= {"files": {"prediction": 22, "csv": 15}}
    record |= {"marks": {"csv": {"time": 20, "sha256": "0" * 64}}}
    for place in places(record):
        for value in WRONG:
            changed = copy.deepcopy(record)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            yield sealed(changed), f"{place} = {value!r:.20}"
        if isinstance(place[-1], str):
            for name in (None, f"{place[-1]}x"):
                changed = copy.deepcopy(record)
                inner = changed
                for key in place[:-1]:
                    inner = inner[key]
                old = inner.pop(place[-1])
                if name:
                    inner[name] = old
                yield sealed(changed), f"{place} -> {name}"


def is_sane(record):
    """Whether a record that was taken has nothing in it that could harm: by hand, not by schema."""
    row = record["row"]
    numbers = [value for key, value in row.items() if key not in ("image", "errors")]
    numbers += row.get("errors", {}).values()
    assert row["image"] == "a"
    assert {"height", "width", "contours", "nuclei", "tissue", "seconds"} <= set(row)
    assert all(type(number) in (int, float) and 0 <= number < 1e16 for number in numbers)
    for key in ("height", "width", "contours", "nuclei", "gt_nuclei", "gt_contours"):
        assert type(row.get(key, 0)) is int
    assert all(row.get(key, 0) <= 1.001 for key in ("dice", "iou", "accuracy", "aji", "pq"))
    assert all(type(size) is int and size > 0 for size in record["files"].values())
    assert set(record["files"]) <= set(results.ENDINGS)
    assert all(type(text) is str for text in record["shown"].values())
    for kind, mark in record.get("marks", {}).items():
        assert kind in results.ENDINGS and set(mark) == {"time", "sha256"}
        assert type(mark["time"]) is int and type(mark["sha256"]) is str
    assert type(record["made_with"]["tta"]) is bool and 0 < record["made_with"]["threshold"] < 1
    return True


def test_a_record_with_a_wrong_value_is_one_line_or_harmless(tmp_path):
    path = finish(tmp_path)
    refused = taken = 0
    for text, what in wrong_values():
        path.write_text(text)
        try:
            record = results.read(tmp_path, "a")
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 500, what
            assert str(path) in str(error), what
            refused += 1
        else:
            assert is_sane(record), what
            taken += 1
        whole, faults = results.finished(tmp_path)
        assert len(whole) + len(faults) == 1, what
    assert refused > 500 and taken < refused / 5


def damaged(text, generator):
    """Bytes of a record after one of what happens to files."""
    data = bytearray(text.encode())
    place = generator.randrange(len(data))
    kind = generator.randrange(6)
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        data[place] ^= 1 << generator.randrange(8)
    elif kind == 2:
        del data[place : place + generator.randrange(1, 40)]
    elif kind == 3:
        data[place:place] = generator.randbytes(3)
    elif kind == 4:
        data[place:] = bytes(len(data) - place)
    else:
        digits = [at for at, byte in enumerate(data) if chr(byte).isdigit()]
        at = generator.choice(digits)
        data[at] = ord(str((int(chr(data[at])) + 1) % 10))
    return bytes(data)


def test_a_damaged_record_is_one_line_or_means_the_same(tmp_path):
    path = finish(tmp_path)
    text = path.read_text()
    whole = json.loads(text)
    generator = random.Random(0)
    refused = 0
    for _ in range(400):
        path.write_bytes(damaged(text, generator))
        try:
            assert results.read(tmp_path, "a") == whole
        except InputError as error:
            assert re.match(r"[^\n]+: found [^\n]+, expected", str(error))
            refused += 1
    assert refused > 300


ODD = [
    b"",
    b"[]",
    b"null",
    b"{}",
    b"[" * 100_000,
    b'{"row": ' * 50_000,
    b"\xff\xfe",
    b"NaN",
    b"1e999",
]


@pytest.mark.parametrize("content", ODD)
def test_what_is_no_record_at_all_is_one_line(tmp_path, content):
    finish(tmp_path).write_bytes(content)
    finish(tmp_path, "b")
    records, (fault,) = results.finished(tmp_path)
    assert names_of(records) == ["b"]
    assert ": found " in fault and "record" in fault and "\n" not in fault


def test_a_record_of_another_name_a_link_and_a_pipe_are_none(tmp_path):
    path = finish(tmp_path)
    (path.with_name("b.json")).write_bytes(path.read_bytes())
    path.rename(tmp_path / "there.json")
    path.symlink_to(tmp_path / "there.json")
    os.mkfifo(path.with_name("c.json"))
    records, faults = results.finished(tmp_path)
    assert not records and len(faults) == 3


def test_records_that_differ_in_their_settings_are_told_apart(tmp_path):
    finish(tmp_path)
    finish(tmp_path, "b", MADE_WITH | {"pixel_size": 0.5, "files": [[1, 2], [3, 4], None]})
    records, _ = results.finished(tmp_path)
    assert results.settings_of(records) == ({"threshold": "0.45"}, [])
    finish(tmp_path, "c", MADE_WITH | {"threshold": 0.6, "checkpoint": "1" * 64})
    shown, differing = results.settings_of(results.finished(tmp_path)[0])
    assert shown == {"threshold": "0.45 (2 images); 0.6 (1 image)"}
    assert differing == ["checkpoint", "threshold"]


def test_pixel_sizes_and_regions_alone_are_settings_too(tmp_path):
    finish(tmp_path, made_with=MADE_WITH | {"pixel_size": 0.25})
    finish(tmp_path, "b", MADE_WITH | {"pixel_size": 0.251})  # as tags round it
    finish(tmp_path, "c")  # not known
    assert results.settings_of(results.finished(tmp_path)[0])[1] == []
    finish(tmp_path, "d", MADE_WITH | {"pixel_size": 0.5}, outside=0.5)
    differing = results.settings_of(results.finished(tmp_path)[0])[1]
    assert differing == ["pixel size", "--only_regions"]


def test_bits_differ_only_where_they_are_known(tmp_path):
    finish(tmp_path)
    finish(tmp_path, "b", MADE_WITH | {"bits": 12})
    assert results.settings_of(results.finished(tmp_path)[0])[1] == []
    finish(tmp_path, "c", MADE_WITH | {"bits": 14})
    assert results.settings_of(results.finished(tmp_path)[0])[1] == ["bits of 16-bit images"]


# --- tables


def test_counts_have_all_columns_and_stay_empty_where_nothing_is_known(tmp_path):
    rows = [counted("a", 12, 10, aji=np.float32(0.5), nuclei_per_mm2=float("nan"))]
    tables.write_counts(tmp_path / "counts.csv", [*rows, counted("b", 7)])
    first, second = tables.read_table(tmp_path / "counts.csv")
    assert tuple(first) == tables.COUNT_COLUMNS
    assert (first["nuclei"], first["gt_nuclei"], first["dice"]) == ("12", "10", "0.9000")
    assert (first["aji"], first["nuclei_per_mm2"], first["pq"]) == ("0.5000", "", "")
    assert second["gt_nuclei"] == second["dice"] == ""


def test_areas_of_counts_are_exact_to_a_square_micrometre(tmp_path):
    own = {"tissue_mm2": 0.000346, "nuclei_per_mm2": 28901.7341, "excluded": {"pen_mm2": 1.5e-6}}
    tables.write_counts(tmp_path / "counts.csv", [counted("a", 10, **own)])
    (row,) = tables.read_table(tmp_path / "counts.csv")
    assert (row["tissue_mm2"], row["nuclei_per_mm2"]) == ("0.000346", "28901.7341")
    assert row["pen_mm2"] in ("0.000001", "0.000002")


def test_an_image_of_which_no_nucleus_was_dropped_has_0(tmp_path):
    rows = [counted("a", 10, dropped=5), counted("b", 10), counted("c", 10, dropped=3)]
    tables.write_counts(tmp_path / "counts.csv", rows)
    assert [r["dropped"] for r in tables.read_table(tmp_path / "counts.csv")] == ["5", "0", "3"]
    tables.write_counts(tmp_path / "counts.csv", rows[1:2])
    assert "dropped" not in tables.read_table(tmp_path / "counts.csv")[0]


def test_errors_have_a_row_per_image_with_a_reference(tmp_path):
    tables.write_errors(tmp_path / "errors.csv", [ROW, counted("b", 7)])
    (found,) = tables.read_table(tmp_path / "errors.csv")
    expected = {"matched": 7, "missed": 2, "merged": 2, "split": 0, "true": 11, "spurious": 1}
    assert found == {"image": "a", **{key: str(value) for key, value in expected.items()}}


@pytest.mark.parametrize("name", [*NAMES, "\tTab", "\uff1d1+1"])
def test_no_name_is_a_formula_in_a_spreadsheet_and_all_read_back_right(tmp_path, name):
    tables.write_counts(tmp_path / "counts.csv", [counted(name)])
    with (tmp_path / "counts.csv").open(newline="", encoding="utf-8") as file:
        (written,) = csv.DictReader(file)
    assert not written["image"].startswith(tables.FORMULA)
    assert written["image"] in (name, f"'{name}")
    (read,) = tables.read_table(tmp_path / "counts.csv")
    assert read["image"] == name


def test_a_file_name_that_is_no_text_stops_no_table(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")  # Latin-1, as os.listdir gives it
    tables.write_counts(tmp_path / "counts.csv", [counted(name)])
    assert tables.read_table(tmp_path / "counts.csv")[0]["image"] == "caf\\udce9"
