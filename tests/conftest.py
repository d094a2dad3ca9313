"""Small data for the tests, written to tmp_path by the project's own functions."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "2")  # fixed: results are compared to the last bit

import numpy as np
import pytest

from tissue import pictures
from tissue.synthetic import draw_tissue

try:
    import torch
except ImportError:  # the tests of the image side run without it (tasks.py)
    pass
else:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """train.main takes Ctrl-C for itself; pytest gets it back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def root(tmp_path):
    """A root folder with four drawn images of 96 x 80 pixels, one of them for validation."""
    root = tmp_path / "data"
    for folder in ("tissue_images", "mask binary"):
        (root / folder).mkdir(parents=True)
    for number in (1, 2, 3, 4):
        tissue = draw_tissue(96, 80, seed=number)
        pictures.write_image(root / "tissue_images" / f"Drawn_{number:02}.tif", tissue.image)
        pictures.write_image(root / "mask binary" / f"Drawn_{number:02}.png", tissue.labels > 0)
    return root


@pytest.fixture
def generator():
    return np.random.default_rng(0)
