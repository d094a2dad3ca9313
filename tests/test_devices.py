"""The device, and the number format that it multiplies fast."""

import pytest
import torch

from learning.devices import bfloat16_gain, choose_device, choose_precision
from tissue.files import InputError


def test_minus_one_is_the_cpu_without_a_word(capsys):
    assert choose_device(-1) == torch.device("cpu")
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_any_gpu_means_the_cpu_where_there_is_none_and_a_line_says_so(capsys):
    assert choose_device(3) == torch.device("cpu")
    assert "--gpu_id 3 means the CPU" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_beyond_the_last_is_an_error():
    with pytest.raises(InputError, match="--gpu_id"):
        choose_device(torch.cuda.device_count())


@pytest.mark.parametrize(
    ("has", "gain", "precision"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, 0.6, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, 2.3, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, 0.6, torch.float32),
        ({"avx2": True}, 2.3, torch.float32),
        ({}, 2.3, torch.float32),
    ],
)
def test_bfloat16_on_a_cpu_that_multiplies_it_faster(monkeypatch, has, gain, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr("learning.devices.bfloat16_gain", lambda: gain)
    assert choose_precision.__wrapped__(torch.device("cpu")) == precision


def test_the_precision_is_chosen_once(monkeypatch):
    chosen = choose_precision(torch.device("cpu"))
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"amx_bf16": chosen != torch.bfloat16}
    )
    assert choose_precision(torch.device("cpu")) == chosen


def test_the_gain_of_bfloat16_is_measured():
    assert 0.001 < bfloat16_gain() < 1000
