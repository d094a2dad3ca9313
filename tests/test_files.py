import argparse
import math
import os
import subprocess
import sys
import types

import pytest

from tissue.files import (
    InputError,
    Parser,
    check_numbers,
    locked,
    one_line,
    replacing,
    run_script,
    write_table,
)


def test_a_file_is_replaced_when_the_block_ends_well(tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text("old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
        assert beside.suffix == ".csv"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_writer_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [InputError("a.tif: found text"), FileNotFoundError("a.tif: not found")]
)
def test_bad_input_is_one_line_and_exit_code_2(error, capsys):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_script(main, types.SimpleNamespace)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f": {error}\n")


def test_a_full_memory_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda args: bytearray(2**60), types.SimpleNamespace)
    assert stopped.value.code == 2
    assert "the memory is full" in capsys.readouterr().err


def test_a_name_of_several_lines_is_told_in_one(capsys):
    def main(args):
        raise InputError("a\nb.tif: found text")

    with pytest.raises(SystemExit):
        run_script(main, types.SimpleNamespace)
    assert capsys.readouterr().err.endswith(": a b.tif: found text\n")


@pytest.mark.parametrize("given", [["--init", ""], ["--init="], ["--images", "a.tif", ""]])
def test_text_that_a_shell_left_empty_does_not_pass_for_a_flag_that_is_not_given(given, capsys):
    parser = Parser("Train.")
    parser.add_argument("--init")
    parser.add_argument("--images", nargs="+")
    parser.add_argument("--name", default="")
    assert parser.parse_args(["--name", ""]).init is None
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(given)
    assert stopped.value.code == 2 and "found empty text" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback():
    def main(args):
        raise ValueError("operands could not be broadcast")

    with pytest.raises(ValueError, match="broadcast"):
        run_script(main, types.SimpleNamespace)


def test_two_writers_of_one_file_do_not_meet_and_links_are_not_followed(tmp_path):
    path = tmp_path / "counts.csv"
    with replacing(path) as one, replacing(path) as other:
        assert one != other
        with pytest.raises(FileExistsError):  # as a planted link of that name would have it
            os.close(os.open(one, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the block that ends last
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_the_longest_name_there_is_can_be_replaced(tmp_path):
    path = tmp_path / ("n" * 251 + ".csv")
    with replacing(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new"


def test_a_folder_has_one_writer_and_says_which(tmp_path):
    folder = tmp_path / "results"
    with locked(folder, "writes results"):
        with (
            pytest.raises(InputError, match=f"process {os.getpid()} on .* writes results"),
            locked(folder, "writes results"),
        ):
            raise AssertionError("both got in")
        (folder / "a.csv").write_text("1")
    with locked(folder, "writes results"):
        assert (folder / "a.csv").read_text() == "1"


def test_what_a_killed_writer_left_is_removed_and_its_lock_is_free(tmp_path):
    code = (
        "import os, sys; from tissue.files import locked, replacing\n"
        "with locked(sys.argv[1], 'writes'), replacing(sys.argv[1] + '/a.csv') as beside:\n"
        "    beside.write_text('half'); os._exit(9)"
    )
    (tmp_path / ".mine.part.csv").write_text("not ours")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(list(tmp_path.glob(".*.part.csv"))) == 2
    with locked(tmp_path, "writes results"):
        assert [path.name for path in tmp_path.glob(".*.part.csv")] == [".mine.part.csv"]
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1.1])
def test_numbers_out_of_their_range_are_one_line(value):
    with pytest.raises(InputError, match=r"--lr: found .*, expected more than 0 and at most 1$"):
        check_numbers(argparse.Namespace(lr=value), {"lr": (0.0, 1)})


def test_numbers_in_their_range_pass():
    check_numbers(argparse.Namespace(lr=1.0, seed=0, size=None),
                  {"lr": (0.0, 1), "seed": (0, 2**32 - 1), "size": (0.0, math.inf)})  # fmt: skip


@pytest.mark.parametrize("flags", [["--lr", "x"], ["--rate", "1"], ["--l", "1"]])
def test_flags_that_are_none_are_one_line_and_exit_code_2(flags, capsys):
    parser = Parser("Train.")
    parser.add_argument("--lr", type=float, default=1.0)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(flags)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_table_has_its_columns_alone_and_any_text(tmp_path):
    rows = [{"a": 'x,"y"', "b": 1}, {"a": b"caf\xe9".decode("utf-8", "surrogateescape")}]
    write_table(tmp_path / "table.csv", ("a", "b"), rows)
    with pytest.raises(ValueError, match="more"):
        write_table(tmp_path / "table.csv", ("a", "b"), [{"a": 1, "more": 2}])
    expected = 'a,b\r\n"x,""y""",1\r\ncaf\\udce9,\r\n'
    assert (tmp_path / "table.csv").read_bytes() == expected.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_help_shows_the_defaults_that_say_something(capsys):
    parser = Parser("Train.")
    parser.add_argument("--lr", type=float, default=0.5, help="rate")
    parser.add_argument("--init", help="checkpoint")
    parser.add_argument("--tta", action="store_true", help="average")
    parser.add_argument("--split", nargs="+", default=[], help="changes")
    parser.add_argument("--seed", type=int, default=0, help="of all numbers")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert text.count("default") == 2
    assert "rate (default: 0.5)" in text and "of all numbers (default: 0)" in text


def test_help_ends_with_the_first_two_commands_of_the_docstring(capsys):
    with pytest.raises(SystemExit):
        Parser(
            "Cut.\n\n    python3 a.py --x\n    torchrun a.py\n    python3 a.py\n    python3 b.py\n"
        ).parse_args(["-h"])
    text = capsys.readouterr().out
    assert text.endswith("examples:\n    python3 a.py --x\n    python3 a.py\n")


@pytest.mark.parametrize(
    ("given", "advice"),
    [("--image", "did you mean --images?"), ("a.tif", "expected a flag before each value")],
)
def test_a_flag_that_is_none_is_told_which_may_be_meant(given, advice, capsys):
    parser = Parser("Train.")
    parser.add_argument("--images", nargs="+")
    with pytest.raises(SystemExit):
        parser.parse_args([given])
    assert f"{given}; {advice}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("bad\n  magic\tnumber "), "bad magic number"),
        (MemoryError(), "MemoryError"),
        (OSError("\n"), "OSError"),
    ],
)
def test_what_an_error_says_is_part_of_a_line(error, said):
    assert one_line(error) == said
