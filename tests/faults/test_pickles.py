"""Checkpoints that would run code: refused, and nothing of them has run."""

import builtins
import codecs
import functools
import importlib
import operator
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from learning import checkpoints
from model import UNet
from tests.scripts import checkpoint_of
from tissue.files import InputError


class Call:
    """Calls a function when it is unpickled; with `state`, sets that of what it gave."""

    def __init__(self, function, *arguments, state=None):
        self.told = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.told


def calls(victim):
    """What writes, or makes, the file `victim`, by many a way."""
    shell, code = f"touch {victim}", f"open({str(victim)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, shell),
        "os.popen": Call(os.popen, shell),
        "os.mkdir": Call(os.mkdir, str(victim)),
        "os.open": Call(os.open, str(victim), os.O_CREAT),
        "os.execv": Call(os.execv, "/bin/touch", ["touch", str(victim)]),
        "os.posix_spawn": Call(os.posix_spawn, "/bin/touch", ["touch", str(victim)], {}),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(victim)]),
        "subprocess.run": Call(subprocess.run, shell, -1, None, None, None, None, None, True),
        "subprocess.getoutput": Call(subprocess.getoutput, shell),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(victim), "w"),
        "__import__": Call(builtins.__import__, "antigravity"),
        "importlib": Call(importlib.import_module, "antigravity"),
        "getattr": Call(getattr, Call(importlib.import_module, "os"), "system"),
        "map": Call(list, Call(map, os.mkdir, [str(victim)])),
        "functools.partial": Call(functools.partial, os.mkdir, str(victim)),
        "functools.reduce": Call(functools.reduce, os.open, [str(victim), os.O_CREAT]),
        "operator.methodcaller": Call(operator.methodcaller, "mkdir", str(victim)),
        "operator.attrgetter": Call(operator.attrgetter, "system"),
        "runpy": Call(runpy.run_path, str(victim)),
        "shutil.copy": Call(shutil.copy, __file__, str(victim)),
        "shutil.rmtree": Call(shutil.rmtree, str(victim.parent / "kept")),
        "codecs.open": Call(codecs.open, str(victim), "w"),
        "numpy.save": Call(np.save, str(victim), 1),
        "numpy.load": Call(np.load, str(victim), None, True),
        "torch.save": Call(torch.save, 1, str(victim)),
        "torch.load": Call(torch.load, str(victim)),
        "torch.hub": Call(torch.hub.load, str(victim.parent), "x"),
        "os.symlink": Call(os.symlink, "/etc", str(victim)),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(victim)))),
        "a state": Call(dict, state={"x": Call(os.mkdir, str(victim))}),
        "zipfile": Call(zipfile.ZipFile, str(victim), "w"),
        "sys.exit": Call(sys.exit, 3),
    }


KINDS = list(calls(Path("/nowhere")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_runs_no_code(tmp_path, kind):
    """As a part of a checkpoint, of a bare state dict, alone, in either format of torch."""
    (tmp_path / "kept").mkdir()
    evil = calls(tmp_path / "victim")[kind]
    whole = checkpoint_of(UNet(2))
    bare = dict(whole["model"])
    contents = (whole | {"args": {"x": evil}}, bare | {"conv1.conv.0.bias": evil}, evil)
    files = []
    for number, content in enumerate(contents):
        for zipped in (True, False):
            files.append(tmp_path / f"{number}{zipped}.pt")
            torch.save(content, files[-1], _use_new_zipfile_serialization=zipped)
        files.append(tmp_path / f"{number}.pickle")
        files[-1].write_bytes(pickle.dumps(content))
    before = sorted(tmp_path.iterdir())
    for path in files:
        with pytest.raises(InputError) as error:
            checkpoints.load_checkpoint(path)
        assert len(str(error.value).splitlines()) == 1 and str(path) in str(error.value)
        if path.suffix == ".pt":
            assert "execute code" in str(error.value)
    assert sorted(tmp_path.iterdir()) == before
    assert "antigravity" not in sys.modules
