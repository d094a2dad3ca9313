"""Errors of a training that are not the program's are told in one line."""

import pytest
import torch

from learning.signals import explain
from tissue.files import InputError


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DataLoader worker (pid 7) is killed"), ConnectionResetError(104), EOFError()],
)
def test_a_killed_loader_is_told_however_it_shows(error):
    with pytest.raises(InputError, match="killed from outside"):
        explain(error)


def test_a_full_memory_and_a_bad_patch_in_a_loader_process_are_one_line():
    with pytest.raises(InputError, match=r"memory is full.*--batch_size"):
        explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"))
    wrapped = (
        "Caught InputError in a worker.\nOriginal Traceback:\ntissue.files.InputError: a.png: bad"
    )
    with pytest.raises(InputError, match=r"^a\.png: bad$"):
        explain(InputError(wrapped))


def test_other_errors_are_left_as_they_are():
    explain(RuntimeError("shapes do not fit"))
