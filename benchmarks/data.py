"""The tissue that benchmarks work on: drawn, or copies of the user's own."""

import contextlib
import io
import shutil
from pathlib import Path

import preprocess
from tissue import images
from tissue.synthetic import write_demo


def tissue(folder: Path | str, root: str | None, number: int, size: int = 512) -> Path:
    """`folder`, filled with the images and masks of `root`, or without one with drawn ones.

    Images are copied, because a benchmark writes patches beside them and removes them again.
    """
    folder = Path(folder)
    if root is None:
        write_demo(folder, number, size)
        return folder
    images.find_pairs(root)  # or it says what is missing
    for name in (images.IMAGE_FOLDER, *images.MASK_FOLDERS):
        if (Path(root) / name).is_dir():
            shutil.copytree(Path(root) / name, folder / name)
    return folder


def cut(folder: Path, *more) -> None:
    """Run preprocess.py on a folder within this process, without its closing table."""
    arguments = ["--root", str(folder), *map(str, more)]
    with contextlib.redirect_stdout(io.StringIO()):
        preprocess.main(preprocess.parse_args(arguments))


def source(root: str | None) -> str:
    """What the data was, for the results: no paths, they are nobody's business."""
    return "drawn tissue (tissue.synthetic)" if root is None else "tissue given by --root"
