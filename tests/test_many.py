"""inference.py on many images: shards, failures, tables of what is there, calls at once."""

import subprocess
import sys

import pytest

import inference
from tests.scripts import REPOSITORY, infer, table_of
from tests.test_inference import TILES, all_are_big, checkpoint, pictures, slide  # noqa: F401
from tissue.files import InputError, run_script


def test_failed_slides_stop_no_others_and_the_same_command_does_what_is_left(
    slide, checkpoint, tmp_path, all_are_big, capsys  # noqa: F811
):  # fmt: skip
    whole, results = slide.read_bytes(), tmp_path / "out"
    for name in ("a", "z"):
        slide.with_name(f"{name}.tif").write_bytes(whole)
    slide.write_bytes(whole[:-40_000])
    flags = ["--ckpt", checkpoint, "--images", slide.parent, "--image_folder", results, *TILES]
    flags = [str(flag) for flag in [*flags, "--gpu_id", -1]]
    with pytest.raises(SystemExit) as stopped:
        run_script(inference.main, lambda: inference.parse_args(flags))
    assert stopped.value.code == 3
    fault, last = capsys.readouterr().err.splitlines()
    assert "big.tif" in fault and "ends before its pixels do" in fault
    assert last == "1 image failed"
    rows = table_of(results / "status.csv")
    assert [(row["image"], row["state"]) for row in rows] == [
        ("a", "done"), ("big", "failed"), ("z", "done")
    ]  # fmt: skip
    assert rows[1]["fault"] == fault
    assert [row["image"] for row in table_of(results / "counts.csv")] == ["a", "z"]
    slide.write_bytes(whole)
    run_script(inference.main, lambda: inference.parse_args(flags))
    assert "2 of them finished already" in capsys.readouterr().out
    assert [row["state"] for row in table_of(results / "status.csv")] == ["done"] * 3


def test_shards_leave_what_one_call_does_and_the_last_makes_the_tables(
    pictures, checkpoint, tmp_path, capsys  # noqa: F811
):  # fmt: skip
    flags = ["--ckpt", checkpoint, "--images", pictures]
    infer(tmp_path / "one", *flags)
    infer(tmp_path / "two", *flags, "--shard", "2/2")
    assert "2 of 3 images are not finished: the last shard makes tables" in capsys.readouterr().out
    assert not (tmp_path / "two" / "counts.csv").exists()
    states = [row["state"] for row in table_of(tmp_path / "two" / "status.csv")]
    assert sorted(states) == ["done", "queued", "queued"]
    infer(tmp_path / "two", *flags, "--shard", "1/2")
    tables = [table_of(tmp_path / name / "counts.csv") for name in ("one", "two")]
    for row in tables[0] + tables[1]:
        row.pop("seconds")
    assert tables[0] == tables[1] and len(tables[0]) == 3


def test_a_shard_looks_at_its_own_images_alone(pictures, checkpoint, tmp_path):  # noqa: F811
    flags = ["--ckpt", checkpoint, "--images", pictures, "--shard"]
    damaged = pictures / "b.png"  # the second of three of one size
    damaged.write_bytes(damaged.read_bytes()[:-30])
    infer(tmp_path / "out", *flags, "1/2")
    with pytest.raises(InputError, match=damaged.name):
        infer(tmp_path / "out", *flags, "2/2")


def test_tables_and_page_are_made_of_the_records_alone(pictures, checkpoint, tmp_path, capsys):  # noqa: F811
    results = tmp_path / "out"
    infer(results, "--ckpt", checkpoint, "--images", pictures)
    made = {name: (results / name).read_bytes() for name in ("counts.csv", "review.csv")}
    for path in [*pictures.iterdir(), *(results / name for name in (*made, "report.html"))]:
        path.unlink()
    infer(results, "--ckpt", tmp_path / "none.pt", "--report_only")
    assert {name: (results / name).read_bytes() for name in made} == made
    assert 'data-value="b"' in (results / "report.html").read_text()
    assert "mean" in capsys.readouterr().out
    with pytest.raises(InputError, match="found no record of any image"):
        infer(tmp_path / "new", "--report_only")
    assert not (tmp_path / "new").exists()


def test_two_equal_calls_at_once_share_the_images(pictures, checkpoint, tmp_path):  # noqa: F811
    results = tmp_path / "out"
    command = [sys.executable, "inference.py", "--gpu_id", "-1", "--ckpt", str(checkpoint)]
    command += ["--images", str(pictures), "--image_folder", str(results)]
    calls = [subprocess.Popen(command, cwd=REPOSITORY) for _ in range(2)]
    assert [one.wait(timeout=300) for one in calls] == [0, 0]
    infer(tmp_path / "alone", "--ckpt", checkpoint, "--images", pictures)
    for path in (tmp_path / "alone").glob("[abc]_*"):
        assert (results / path.name).read_bytes() == path.read_bytes()
    assert [row["image"] for row in table_of(results / "counts.csv")] == ["a", "b", "c"]
    assert [row["state"] for row in table_of(results / "status.csv")] == ["done"] * 3
