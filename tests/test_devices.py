"""The device, the number format that it multiplies fast, and how many threads it is left."""

import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from learning import devices
from learning.devices import Threads, choose_device, choose_precision, own_seconds
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


# --- threads

CPU = torch.device("cpu")
on_linux = pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="needs Linux's /proc")


@pytest.fixture
def four_threads(monkeypatch):
    """Four threads, whose number nobody has fixed."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@on_linux
def test_other_programs_are_left_the_cores_that_they_take(four_threads, monkeypatch):
    took = iter([(0, 0), (2, 4), (4, 4.8), (6, 50), (8, 50)])  # seconds, and those of others
    monkeypatch.setattr(devices, "moment", took.__next__)
    threads = Threads(CPU)
    counts = []
    for _ in range(4):
        threads.adapt()
        counts.append(torch.get_num_threads())
    assert counts == [2, 4, 1, 4]


@on_linux
def test_it_is_not_looked_at_every_step_what_others_take(four_threads, monkeypatch):
    took = iter([(time.monotonic() + 3600, 0)])  # which a second look would exhaust
    monkeypatch.setattr(devices, "moment", took.__next__)
    Threads(CPU).adapt()
    assert torch.get_num_threads() == 4


def test_a_number_of_threads_that_is_fixed_stays(four_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    took = iter(())
    monkeypatch.setattr(devices, "moment", took.__next__)
    Threads(CPU).adapt()
    assert torch.get_num_threads() == 4


def work(seconds, done, end):
    while time.process_time() < seconds:
        pass
    done.set()
    end.wait()


@on_linux
def test_what_own_processes_take_is_not_that_of_others():
    """While they work, as those that read patches do, and when they have ended."""
    done, end = multiprocessing.Event(), multiprocessing.Event()
    child = multiprocessing.Process(target=work, args=(1.0, done, end), daemon=True)
    before, own = own_seconds(), time.process_time()
    child.start()
    done.wait()
    living = own_seconds() - before - (time.process_time() - own)
    end.set()
    child.join()
    ended = own_seconds() - before - (time.process_time() - own)
    assert living > 0.8 and ended > 0.8
