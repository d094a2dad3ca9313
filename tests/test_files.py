import pytest

from tissue.files import replacing


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
