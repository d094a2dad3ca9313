import errno
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from tissue.pixel_size import pixel_size_um
from tissue.store import Store
from tissue.tiling import Tile, tiles_of


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint32])
def test_a_map_holds_what_tiles_wrote_and_is_gone_in_the_end(tmp_path, generator, dtype):
    wanted = generator.integers(0, 2**32, (70, 90), np.uint32).astype(dtype)
    wanted[:20, :40] = 0
    with Store(tmp_path, (70, 90), dtype) as store:
        for tile in tiles_of(70, 90, 32):
            store.write(tile, wanted[tile.y :, tile.x :][: tile.height, : tile.width])
        np.testing.assert_array_equal(store.read(0, 0, 70, 90), wanted)
        np.testing.assert_array_equal(store.read(13, 21, 40, 60), wanted[13:53, 21:81])
        np.testing.assert_array_equal(store.every(7), wanted[::7, ::7])
        assert store.read(0, 0, 1, 1).dtype == dtype
    assert not list(tmp_path.iterdir())


def test_where_nothing_is_found_nothing_is_stored(tmp_path):
    with Store(tmp_path, (2**15, 2**15), np.uint32) as store:  # 4 GiB
        store.write(Tile(0, 0, 1024, 1024), np.zeros((1024, 1024), np.uint32))
        store.write(Tile(9, 7, 2, 2), np.ones((2, 2), np.uint32))
        assert store.read(2**15 - 2, 0, 2, 2**15).max() == 0
        assert os.stat(store.path).st_blocks * 512 < 2**20


def own_memory():
    """What this process holds now of its own, bytes: its highest of all time says nothing here."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux alone tells it")
def test_a_large_map_is_not_held_in_memory(tmp_path):
    held, before = [], own_memory()
    with Store(tmp_path, (2**14, 2**14), np.uint32) as store:  # 1 GiB
        for tile in tiles_of(2**14, 2**14, 1024):
            store.write(tile, np.ones((1024, 1024), np.uint32))
            held.append(own_memory())
        for tile in tiles_of(2**14, 2**14, 1024):
            assert store.read(*tile).all()
            held.append(own_memory())
        assert store.every(64).all()
        held.append(own_memory())
    assert max(held) - before < 200 * 2**20


def test_a_map_is_saved_as_a_picture_with_its_pixel_size(tmp_path, generator):
    wanted = generator.integers(0, 70_000, (600, 700), np.uint32)
    with Store(tmp_path, (600, 700), np.uint32) as store:
        store.write(Tile(0, 0, 600, 700), wanted)
        store.save(tmp_path / "a.tif", 0.25)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), wanted)
    assert pixel_size_um(tmp_path / "a.tif") == pytest.approx(0.25)
    with Store(tmp_path, (600, 700), bool) as store:
        store.write(Tile(0, 0, 600, 700), wanted > 30_000)
        for name in ("b.png", "b.tif"):
            store.save(tmp_path / name, None)
            read = cv2.imread(str(tmp_path / name), cv2.IMREAD_UNCHANGED)
            np.testing.assert_array_equal(read, np.where(wanted > 30_000, 255, 0))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_an_error_and_no_crash(tmp_path):
    store = Store(tmp_path, (8, 8), bool)
    store.path.unlink()
    store.path.symlink_to("/dev/full")
    with pytest.raises(OSError) as raised:
        store.write(Tile(0, 0, 8, 8), np.ones((8, 8), bool))
    assert raised.value.errno == errno.ENOSPC
