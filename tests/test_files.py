import types

import pytest

from tissue.files import InputError, replacing, run_script


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


def test_a_defect_keeps_its_traceback():
    def main(args):
        raise ValueError("operands could not be broadcast")

    with pytest.raises(ValueError, match="broadcast"):
        run_script(main, types.SimpleNamespace)
