"""doctor.py says what a machine has, what lacks and what to do, and runs where nothing is there."""

import subprocess
import sys
from pathlib import Path

import pytest

import doctor

REPOSITORY = Path(__file__).parent.parent


def call(*flags):
    return subprocess.run(
        [sys.executable, *flags, "doctor.py"], cwd=REPOSITORY, capture_output=True, text=True
    )


def test_where_the_scripts_run_it_says_so_and_finds_nuclei():
    pytest.importorskip("torch", reason="two of the scripts need it")
    done = call()
    assert done.returncode == 0, done.stdout
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert {"Python", "packages", "PyTorch", "GPU", "processor", "memory", "slides"} <= set(lines)
    assert lines["weights"].startswith("ok") and "found 0 nuclei" not in lines["weights"]
    assert not [line for line in lines.values() if line.startswith("lacks")]


def test_a_python_without_any_package_is_told_what_to_install():
    done = call("-I", "-S")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lacking = [line for line in done.stdout.splitlines() if line.startswith("lacks")]
    assert lacking and all("pip install -r requirements.txt" in line for line in lacking)
    assert "mend what lacks" in done.stderr


def test_packages_that_lack_or_have_another_version_are_named(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text(
        "# comment\n\npytest>=1  # here\npytest<1\nno-such-package-here>=2\n"
        'no-such-package-here; python_version < "3"\n'
    )
    pytest_line, absent = doctor.unmet(file)
    assert pytest_line == f"pytest {pytest.__version__} (expected <1)"
    assert absent == "no no-such-package-here"
