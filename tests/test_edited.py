"""Patches that somebody changed, or put where a set lies: kept, and said."""

import os
import shutil

import cv2
import pytest

from tests.scripts import cut, fingerprint
from tissue import patches
from tissue.files import InputError
from tissue.manifest import read_manifest, read_table

EDITED = "patches_mask_train/Drawn_01_patch_00_01.png"
ADDED = "patches_rgb_train/mine_patch_00_00.png"


def paint(path):
    """Paint a nucleus into the mask of a patch, as an editor does."""
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    mask[4:20, 4:20] = 255 - mask[4:20, 4:20]
    cv2.imwrite(str(path), mask)
    return path.read_bytes()


def said(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "are kept" in line]


@pytest.mark.parametrize("table", [None, "the columns of another program,1\n"])
def test_patches_of_the_user_s_own_where_there_is_no_set_are_named_and_stay(root, table):
    """As those of the first version, which wrote no patches.json."""
    for kind in ("rgb", "mask"):
        (root / f"patches_{kind}_train").mkdir()
        (root / f"patches_{kind}_train" / "biopsy7_patch_1_2.png").write_bytes(b"mine")
    if table:
        (root / "patches.csv").write_text(table)
    before = fingerprint(root)
    with pytest.raises(
        InputError, match=r"y7_patch_1_2\.png: found them without a patch set.*move them"
    ):
        cut(root)
    assert fingerprint(root) == before
    for name in ("patches_rgb_train", "patches_mask_train"):
        shutil.move(root / name, root / f"old_{name}")
    (root / "patches.csv").unlink(missing_ok=True)
    cut(root)
    assert read_manifest(root) and len(list(root.glob("old_*/*.png"))) == 2


def test_a_patch_that_was_added_to_a_set_without_its_manifest_is_named(root):
    cut(root)
    (root / "patches.json").unlink()
    (root / ADDED).write_bytes(b"mine")
    with pytest.raises(InputError, match=r"mine_patch_00_00\.png: found it without a patch set"):
        cut(root)
    (root / ADDED).unlink()
    cut(root)
    assert read_manifest(root)


@pytest.mark.parametrize("flags", [[], ["--patch_stride", "32"]])
def test_patches_that_were_changed_or_added_are_kept_before_a_set_is_cut_anew(root, flags, capsys):
    cut(root)
    old = read_manifest(root)
    (root / ADDED).write_bytes(b"mine")
    os.utime(root / ADDED, (1, 1))  # moved there, with a time of long ago
    painted = paint(root / EDITED)
    cut(root, *flags)
    lines = capsys.readouterr().out.splitlines()
    why = "other settings (patch_stride)" if flags else "patches are not as they were written"
    assert lines.count(f"{root}: cut anew: {why}") == 1
    (line,) = (line for line in lines if "are kept" in line)
    assert f"{root}: 2 files were changed or added" in line
    assert f"{EDITED} as Drawn_01_patch_00_01.png.changed" in line
    assert f"{ADDED} as mine_patch_00_00.png.changed" in line
    assert (root / f"{EDITED}.changed").read_bytes() == painted
    assert (root / f"{ADDED}.changed").read_bytes() == b"mine"
    assert not (root / ADDED).exists() and len(list(root.rglob("*.changed*"))) == 2
    assert (read_manifest(root)["sha256"] == old["sha256"]) == (not flags)
    paint(root / EDITED)
    cut(root, "--patch_stride", "30")  # and the next beside it
    assert (root / f"{EDITED}.changed").read_bytes() == painted
    assert (root / f"{EDITED}.changed-2").is_file()
    assert len(said(capsys)) == 1


def test_a_set_that_nobody_changed_is_cut_anew_without_keeping_any(root, tmp_path, capsys):
    cut(root)
    cut(root, "--patch_stride", "30")
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)  # all of it is newer
    cut(tmp_path / "copy", "--patch_stride", "32")
    for path in (root / "patches_rgb_train").iterdir():  # brought back from elsewhere
        os.utime(path)
    (root / "patches.json").unlink()
    cut(root, "--patch_stride", "30")
    assert not said(capsys)
    assert not list(tmp_path.rglob("*.changed*"))


@pytest.mark.parametrize("damage", ["table", "format"])
def test_what_was_changed_is_kept_also_where_a_table_is_damaged(root, damage):
    cut(root)
    painted = paint(root / EDITED)
    if damage == "table":
        lines = (root / "patches.csv").read_text().splitlines(keepends=True)
        (root / "patches.csv").write_text("".join(lines[:9]))
    else:
        (root / "patches.json").write_text('{"format_version": 2}')
    newer = (root / EDITED).stat().st_mtime_ns - 1
    for name in ("patches.csv", "patches.json"):
        os.utime(root / name, ns=(newer, newer))
    cut(root)
    assert [path.name for path in root.rglob("*.changed")] == [f"{EDITED.split('/')[1]}.changed"]
    assert (root / f"{EDITED}.changed").read_bytes() == painted
    assert len(read_table(root, "train")) == 60


def test_a_call_that_fails_while_it_cuts_renames_none(root, monkeypatch):
    cut(root)
    paint(root / EDITED)
    before = fingerprint(root)

    def fails(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(patches, "write_patches", fails)
    with pytest.raises(OSError, match="No space"):
        cut(root)
    assert fingerprint(root) == before
