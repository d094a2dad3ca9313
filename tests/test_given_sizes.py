import pytest

from tests.pictures import refusal
from tissue.given_sizes import read_sizes

NAMES = ["One", "two", "three.of"]


def table(tmp_path, text, **options):
    path = tmp_path / "sizes.csv"
    path.write_bytes(text.encode(**options))
    return path


@pytest.mark.parametrize(
    "text",
    [
        "image,pixel_size_um\nOne.svs,0.25\ntwo,0.5\nthree.of.ome.tif,1\n",
        "pixel_size_um, image\r\n0.25, one\r\n5e-1, TWO.tif\r\n1.0, three.of\r\n",
        "\ufeffimage,pixel_size_um\nslides/One.mrxs,0.25\n\ntwo.x,.5\nthree.of.png,1",
    ],
)
def test_a_table_gives_sizes_by_name(tmp_path, text):
    sizes, line = read_sizes(table(tmp_path, text), [*NAMES, "four"])
    assert sizes == {"One": 0.25, "two": 0.5, "three.of": 1.0}
    assert line == f"{tmp_path / 'sizes.csv'}: the pixel size of 3 of 4 images, 0.25 to 1 um"


def test_a_table_of_no_image_changes_none(tmp_path):
    sizes, line = read_sizes(table(tmp_path, "image,pixel_size_um\n"), NAMES)
    assert sizes == {} and "0 of 3 images" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["columns"]),
        ("image;pixel_size_um\none;0.25\n", ["columns", "image;pixel_size_um"]),
        ("name,mpp\none,0.25\n", ["name, mpp"]),
        ("image,pixel_size_um,by\none,0.25,me\n", ["columns"]),
        ("image,pixel_size_um\nfour,0.25\n", ["line 2", "four", "3 images"]),
        ("image,pixel_size_um\none,0.25\nONE.tif,0.25\n", ["line 3", "again"]),
        ("image,pixel_size_um\none,a quarter\n", ["line 2", "a quarter"]),
        ("image,pixel_size_um\none,\n", ["line 2"]),
        ("image,pixel_size_um\none,nan\n", ["nan"]),
        ("image,pixel_size_um\none,0\n", ["0.01 to 20"]),
        ("image,pixel_size_um\none,250\n", ["250", "0.01 to 20"]),
        ("image,pixel_size_um\none,0,25\n", ["line 2", "3 values"]),
        ("image,pixel_size_um\none\n", ["line 2", "1 values"]),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, text, words):
    refusal(lambda path: read_sizes(path, NAMES), table(tmp_path, text), *words)


def test_what_is_no_text_is_refused(tmp_path):
    path = table(tmp_path, "image,pixel_size_um\none,0.25\n", encoding="utf-16")
    refusal(lambda path: read_sizes(path, NAMES), path, "UTF-8")
    with pytest.raises(FileNotFoundError):
        read_sizes(tmp_path / "none.csv", NAMES)
