"""A few of the kills of `python -m tests.faults.kill`, of all three scripts."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="two of the scripts need it")

from tests.faults.kill import COMMANDS, ROOT, open_whole


@pytest.mark.slow
def test_scripts_that_are_killed_at_random_moments_leave_nothing_wrong():
    """In a program of its own, whose forks have no threads to wait for; the last bits of a training
    depend on how many it has, and these on what else runs.
    """
    command = [sys.executable, "-m", "tests.faults.kill", "--kills", "4", "--seed", "1"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("4 of 4 kills left nothing wrong") == len(COMMANDS)


HALVES = {
    "a.csv": "x,y\n1,2\n1", "b.csv": "x,y\n1,2", "a.json": '{"x": ', "a.html": "<html>",
    "a.png": "\x89PNG", "a.pt": "PK", "a.zip": "PK", "a.tif": "II*",
}  # fmt: skip


@pytest.mark.parametrize("name", HALVES)
def test_half_a_file_is_found(name, tmp_path):
    (tmp_path / name).write_text(HALVES[name])
    with pytest.raises(Exception, match=r"."):
        open_whole(tmp_path / name)
