"""The device, and the number format that it multiplies fast."""

import pytest
import torch

from learning.devices import choose_device, choose_precision
from tissue.files import InputError


def test_minus_one_is_the_cpu_without_a_word(capsys):
    assert choose_device(-1) == torch.device("cpu")
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_any_gpu_means_the_cpu_where_there_is_none_and_a_line_says_so(capsys):
    assert choose_device(3) == torch.device("cpu")
    assert capsys.readouterr().out == "No GPU found, using the CPU\n"


def test_apples_gpu_is_used_where_it_is_the_only_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(0) == torch.device("mps")
    assert choose_device(-1) == torch.device("cpu")
    assert choose_precision(torch.device("mps")) == torch.float32
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_beyond_the_last_is_an_error():
    with pytest.raises(InputError, match="--gpu_id"):
        choose_device(torch.cuda.device_count())


@pytest.mark.parametrize(
    ("has", "precision"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC 9R14"}, torch.bfloat16),
        ({"avx2": True, "cpu_name": "AMD Ryzen 5 3600"}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_bfloat16_on_a_cpu_that_multiplies_it_faster(monkeypatch, has, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert choose_precision(torch.device("cpu")) == precision


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        ((6, 1), torch.float32),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_the_precision_of_a_gpu_is_that_of_its_generation(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision(torch.device("cuda", 0)) == precision
