"""Many processes in one folder of results: claims, take-over, status, shards. No network is run."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from tests.test_results import MADE_WITH, ROW
from tissue import claims, inputs, results, tables, windows
from tissue.claims import making_tables, working
from tissue.files import InputError
from tissue.pairs import Pair
from tissue.pictures import write_image
from tissue.status import Status

NAMES = [f"image_{number:02}" for number in range(30)]


def tasks_of(folder, names=NAMES):
    """{name: Task} of small images below a folder, with all that is planned of them."""
    tasks = {}
    for number, name in enumerate(names):
        path = folder / "images" / f"{name}.png"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_image(path, np.full((20, 30 + number, 3), 200, np.uint8))
        task = inputs.Task(
            Pair(name, path, None), windows.open_image(path), None, None, folder / "results",
            pixel_size_um=0.5, formats=("csv", "geojson"),
        )  # fmt: skip
        made_with = MADE_WITH | {"pixel_size": 0.5, "files": task.file_marks()}
        tasks[name] = task._replace(made_with=made_with)
    return tasks


def finish(job, task):
    """What inference.py does of an image, without a network."""
    for kind in ("prediction", "csv", "geojson"):
        task.file(kind).write_text(f"{kind} by {os.getpid()}")
    with job.finishing():
        row = ROW | {"image": task.pair.name, "height": 20, "width": 30}
        results.write(task.results, row, task.made_with, {})


def in_a_process(folder, code):
    code = f"import os, sys\nfrom pathlib import Path\nfrom tests.test_claims import *\n{code}"
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


DO_ALL = """
folder = Path(sys.argv[1])
with working(folder / "results") as job:
    left = tasks_of(folder)
    while task := job.take(left):
        print(task.pair.name)
        finish(job, task)
"""


def test_two_processes_do_each_image_once(tmp_path):
    tasks_of(tmp_path)
    both = [in_a_process(tmp_path, DO_ALL) for _ in range(2)]
    done = [process.communicate(timeout=300)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(done[0] + done[1]) == NAMES
    records, faults = results.finished(tmp_path / "results")
    assert [record["row"]["image"] for record in records] == NAMES and not faults
    left = [path.name for path in (tmp_path / "results" / "rows").iterdir()]
    assert sorted(left) == [f"{name}.json" for name in NAMES]


KILLED = """
folder = Path(sys.argv[1])
with working(folder / "results") as job:
    left = tasks_of(folder)
    finish(job, job.take(left))
    job.take(left)
    (folder / "results" / ".0123456789ab.part.tif").touch()
    os.kill(os.getpid(), 9)
"""


def test_the_image_of_a_killed_process_is_taken_over(tmp_path):
    tasks = tasks_of(tmp_path)
    assert in_a_process(tmp_path, KILLED).wait(timeout=300) == -9
    assert len(list((tmp_path / "results" / "rows").glob("*.job"))) == 1
    with working(tmp_path / "results") as job:
        assert not list((tmp_path / "results").glob(".*.part*"))
        assert job.take(tasks).pair.name == NAMES[1]  # the first is finished
    assert not list((tmp_path / "results" / "rows").glob("*.job"))


def test_a_process_of_another_machine_is_dead_when_it_is_not_heard_of(tmp_path, monkeypatch):
    tasks = tasks_of(tmp_path, "ab")
    other = claims.Job(tmp_path / "results", {}, False)
    other.held |= {"machine": "elsewhere 1", "process": 1}
    with working(tmp_path / "results") as job:
        other.claim("a")
        assert job.take(tasks).pair.name == "b" and list(tasks) == ["a"]
        then = other.path.stat().st_mtime - claims.STALE - 1
        os.utime(other.path, (then, then))
        assert job.take(tasks).pair.name == "a"
        with pytest.raises(InputError, match="a: found that another process has taken it over"):
            other.finishing().__enter__()


def test_calls_with_other_settings_are_told_who_is_there(tmp_path):
    with working(tmp_path, {"threshold": 0.5}):
        with working(tmp_path, {"threshold": 0.5}):
            pass
        before = sorted(tmp_path.rglob("*"))
        with (
            pytest.raises(InputError, match=f"found process {os.getpid()} on .* other settings"),
            working(tmp_path, {"threshold": 0.6}),
        ):
            raise AssertionError("both got in")
        assert sorted(tmp_path.rglob("*")) == before
    with working(tmp_path, {"threshold": 0.6}):
        pass


def test_what_others_write_stays_until_the_last_one_leaves(tmp_path):
    part = tmp_path / ".0123456789ab.part.tif"
    with working(tmp_path):
        part.touch()
        with working(tmp_path):
            assert part.exists()
        assert part.exists()
    assert not part.exists()


def test_an_image_that_failed_is_tried_again_by_the_next_call_alone(tmp_path):
    with working(tmp_path / "results") as one, working(tmp_path / "results") as other:
        one.failed(one.take(tasks_of(tmp_path, "a")).pair.name, "a.png: cut\noff")
        assert other.take(tasks_of(tmp_path, "a")) is None
        assert one.faults == other.faults == ["a.png: cut off"]
    with working(tmp_path / "results") as job:
        finish(job, job.take(tasks_of(tmp_path, "a")))
    assert [path.name for path in (tmp_path / "results" / "rows").iterdir()] == ["a.json"]


def test_two_images_of_one_name_do_not_take_turns(tmp_path):
    (tmp_path / "more").mkdir()
    with working(tmp_path / "results") as one, working(tmp_path / "results") as other:
        theirs = tasks_of(tmp_path / "more", "a")["a"]._replace(results=tmp_path / "results")
        finish(one, one.take(tasks_of(tmp_path, "a")))
        assert other.take({"a": theirs}) is None
        assert "a.png: found results of this name that a call beside" in other.faults[0]


def test_overwrite_redoes_what_was_there_before_once(tmp_path):
    tasks = tasks_of(tmp_path, "ab")
    with working(tmp_path / "results") as job:
        while task := job.take(tasks):
            finish(job, task)
    done = []
    with (
        working(tmp_path / "results", overwrite=True) as one,
        working(tmp_path / "results", overwrite=True) as other,
    ):
        for job in (one, other):
            left = tasks_of(tmp_path, "ab")
            while task := job.take(left):
                done.append(task.pair.name)
                finish(job, task)
    assert done == ["a", "b"]


# --- status


def states(folder):
    return {row["image"]: row["state"] for row in tables.read_table(folder / "status.csv")}


def test_status_says_how_far_each_image_is(tmp_path):
    tasks, folder = tasks_of(tmp_path, "abcd"), tmp_path / "results"
    with working(folder) as job:
        left = dict(tasks)
        with Status(job, list(tasks.values()), list(tasks.values())) as status:
            assert states(folder) == dict.fromkeys("abcd", "queued")
            finish(job, job.take(left))
            job.failed(job.take(left).pair.name, "b.png: cut off")
            job.take(left)
            status.write()
            assert states(folder) == dict(a="done", b="failed", c="running", d="queued")
        assert states(folder)["c"] == "queued"  # nobody works on it any more
        rows = tables.read_table(folder / "status.csv")
        assert [row["fault"] for row in rows] == ["", "b.png: cut off", "", ""]
        assert [row["mm2"] for row in rows] == [f"{20 * w * 0.25e-6:.4f}" for w in (30, 31, 32, 33)]
        assert rows[0]["seconds"] == "1.5000"
    todo = [tasks[name] for name in "bcd"]
    with working(folder) as job, Status(job, list(tasks.values()), todo):  # of the next call
        assert states(folder) == dict(a="done", b="queued", c="queued", d="queued")


def test_status_keeps_what_calls_beside_have_queued(tmp_path):
    folder = tmp_path / "results"
    a, b = tasks_of(tmp_path, "ab").values()
    with working(folder) as one:
        with Status(one, [a], [a]), working(folder) as other, Status(other, [b], [b]):
            assert states(folder) == {"a": "queued", "b": "queued"}
        assert states(folder) == {"a": "queued"}
        with Status(one, [a], [a]) as status, working(folder):
            for text in (b"", b"\xff\0", b"a,b\n1\n"):  # what is no such table
                status.path.write_bytes(text)
                status.write()
                assert states(folder) == {"a": "queued"}


# --- shards and tables


def test_shards_are_all_images_each_once():
    tasks = list(range(10))
    shards = [inputs.of_shard(tasks, f"{place}/3") for place in (1, 2, 3)]
    assert shards == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert inputs.of_shard(tasks, None) == tasks


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "/3", "1/0", "a/b", "-1/3", "1/2/3"])
def test_a_shard_that_is_none_is_named(text):
    with pytest.raises(InputError, match=f"--shard: found {text}, expected I/N"):
        inputs.of_shard([], text)


def test_tables_are_made_by_who_comes_last_and_not_once_more(tmp_path):
    """While the first makes them two others come; the second's have all that the third's would."""
    (tmp_path / "rows").mkdir()
    due, may_end = [], threading.Event()

    def make(wait=None):
        with making_tables(tmp_path) as is_due:
            due.append(is_due)
            if wait:
                begun.set()
                wait.wait(60)

    begun = threading.Event()
    first = threading.Thread(target=make, args=(may_end,))
    first.start()
    begun.wait(60)
    before = json.loads(f"[{(tmp_path / 'rows' / '.tables').read_text().replace(' ', ',')}]")
    assert before == [1, 0]
    others = [threading.Thread(target=make) for _ in range(2)]
    for other in others:
        other.start()
    while threading.active_count() < 4:
        pass
    threading.Event().wait(0.5)  # both have looked
    may_end.set()
    for thread in (first, *others):
        thread.join(60)
    assert sorted(due) == [False, True, True]
    make()
    assert due[-1]
