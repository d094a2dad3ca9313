"""A checkpoint is read as it was written, or refused in one line that names it."""

import math
import pickle
import random
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch

from learning import checkpoints
from learning.predictor import Predictor
from model import UNet, build
from tests.mutations import MISSING, NONSENSE, OF_PICKLES, changed, damaged, places, with_entry
from tests.scripts import checkpoint_of
from tissue.files import InputError
from tissue.nuclei import PREDICTION_SPLIT


def whole_checkpoint(model):
    """A checkpoint with every key that train.py writes, but for `training`."""
    return {
        "format_version": 1,
        "config": model.config,
        "normalisation": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
        "channel_order": "rgb",
        "stain": {"mean": (62.0, 26.0, -18.0), "spread": (17.0, 10.5, 8.5)},
        "patch_dim": 128,
        "pixel_size_um": 0.25,
        "bits": 12,
        "threshold": 0.5,
        "split": {"sigma": 0.5, "h": 0.05, "hole": 2.5, "smallest": 2.5},
        "args": {"lr": 1e-3},
        "versions": {"project": "0.1.0"},
        "epoch": 3,
        "best_dice": 0.8,
        "model": dict(model.state_dict()),
    }


@pytest.fixture
def model():
    torch.manual_seed(0)
    return UNet(2).eval()


@pytest.fixture
def tile(generator):
    return generator.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)


def is_usable(path, tile):
    """Whether a file is refused in one line; else it must be fit for inference."""
    try:
        checkpoint = checkpoints.load_checkpoint(path)
    except InputError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
        assert len(str(error)) < 600
        return False
    assert 0 < checkpoint["threshold"] < 1
    size = checkpoint["pixel_size_um"]
    assert size is None or 0.01 <= size <= 20
    assert checkpoint["bits"] is None or 8 <= checkpoint["bits"] <= 16
    assert checkpoint["channel_order"] in ("rgb", "bgr")
    split = checkpoint["split"]
    assert split.keys() - {"confidence"} == {"sigma", "h", "hole", "smallest"}
    assert all(0 <= value <= 10_000 for value in split.values())
    if colour := checkpoint["stain"]:
        assert all(map(math.isfinite, (*colour["mean"], *colour["spread"])))
        assert min(colour["spread"]) > 0
    network = checkpoints.build_model(checkpoint)
    probability = Predictor.of(network, checkpoint, torch.device("cpu")).predict(tile)
    assert probability.shape == (1, 1, 32, 32) and probability.min() >= 0 and probability.max() <= 1
    return True


# --- values


def test_any_value_anywhere_is_refused_or_usable(tmp_path, model, tile):
    checkpoint = whole_checkpoint(model)
    keys = [place for place in places(checkpoint) if place[0] != "model"]
    keys += [("model",), ("normalisation", "mean"), ("stain", "spread")]
    generator = random.Random(1)
    path = tmp_path / "best.pt"
    usable = 0
    for _ in range(400):
        place = generator.choice(keys)
        torch.save(changed(checkpoint, place, generator.choice(NONSENSE + OF_PICKLES)), path)
        usable += is_usable(path, tile)
    assert 10 < usable < 150  # what is not needed may be missing


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("threshold",), 7), (("threshold",), 0), (("threshold",), 1.0), (("threshold",), math.nan),
        (("threshold",), MISSING), (("pixel_size_um",), -0.25), (("pixel_size_um",), 0),
        (("pixel_size_um",), math.nan), (("pixel_size_um",), 250.0), (("pixel_size_um",), "0.25"),
        (("channel_order",), "grb"), (("config", "arch"), 18), (("config",), MISSING),
        (("config", "dimensions"), 0), (("config", "dimensions"), 513), (("config", "x"), 1),
        (("config", "dimensions"), 2.0), (("config", "dimensions"), True), (("bits",), 7),
        (("bits",), 17), (("bits",), 12.0), (("split", "sigma"), math.nan), (("split", "x"), 1),
        (("split", "hole"), -1), (("split",), {}), (("stain", "spread"), (1, 1, 0)),
        (("stain", "mean"), (1, 1, math.inf)), (("stain", "mean"), (1, 1)),
        (("normalisation", "std"), (0.2, 0.2, 0)), (("normalisation", "std"), (0.2, 0.2, -0.2)),
        (("normalisation", "mean"), (0.2, 0.2, math.nan)), (("normalisation",), MISSING),
        (("format_version",), 2), (("format_version",), True), (("format_version",), "1"),
        (("format_version",), torch.ones(2)), (("model",), MISSING), (("model",), [1]),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_named(tmp_path, model, place, value):
    checkpoint = whole_checkpoint(model)
    torch.save(changed(checkpoint, place, value), tmp_path / "best.pt")
    with pytest.raises(InputError, match=rf"best\.pt: found .*{place[0].split('_')[0]}"):
        checkpoints.load_checkpoint(tmp_path / "best.pt")


def test_what_earlier_versions_did_not_write_has_the_value_that_was_meant(tmp_path, model):
    checkpoint = whole_checkpoint(model)
    for key in ("stain", "pixel_size_um", "bits", "split", "versions", "args", "epoch"):
        del checkpoint[key]
    torch.save(checkpoint, tmp_path / "old.pt")
    loaded = checkpoints.load_checkpoint(tmp_path / "old.pt")
    unknown = {"stain": None, "pixel_size_um": None, "bits": None}
    assert {key: loaded[key] for key in unknown} == unknown
    assert loaded["split"] == PREDICTION_SPLIT._asdict()


# --- weights


WEIGHTS = {
    "NaN": lambda w: w.index_fill(0, torch.tensor([0]), math.nan),
    "infinity": lambda w: w.index_fill(0, torch.tensor([0]), math.inf),
    "another shape": lambda w: torch.zeros(*w.shape, 1),
    "one number less": lambda w: w[:-1].clone(),
    "whole numbers": lambda w: w.to(torch.int32),
    "complex numbers": lambda w: w.to(torch.complex64),
    "one number for many": lambda w: torch.zeros(()).expand(w.shape),
    "no tensor": lambda w: w.tolist(),
    "a sparse tensor": lambda w: w.to_sparse(),
    "nothing": lambda w: None,
}


@pytest.mark.parametrize("arch", ["unet", "test_efficientnet"])
@pytest.mark.parametrize("change", WEIGHTS)
def test_weights_that_cannot_be_are_named(tmp_path, arch, change):
    checkpoint = whole_checkpoint(build({"arch": arch, "dimensions": 2}))
    keys = [key for key, value in checkpoint["model"].items() if value.ndim]
    key = random.Random(change).choice(keys)
    checkpoint["model"][key] = WEIGHTS[change](checkpoint["model"][key])
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(InputError, match=rf"best\.pt: found weights that do not fit.*{key}"):
        checkpoints.load_checkpoint(tmp_path / "best.pt")


def test_names_of_weights_must_be_those_of_the_network(tmp_path, model):
    for change in ({"another": torch.zeros(1)}, {3: torch.zeros(1)}):
        checkpoint = whole_checkpoint(model)
        checkpoint["model"] |= change
        torch.save(checkpoint, tmp_path / "best.pt")
        with pytest.raises(InputError, match=r"best\.pt: found"):
            checkpoints.load_checkpoint(tmp_path / "best.pt")
    checkpoint = whole_checkpoint(model)
    del checkpoint["model"]["last_conv.bias"]
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(InputError, match=r"last_conv\.bias is missing"):
        checkpoints.load_checkpoint(tmp_path / "best.pt")


def test_a_negative_variance_is_named(tmp_path, model):
    checkpoint = whole_checkpoint(model)
    checkpoint["model"]["conv1.conv.1.running_var"][0] = -1.0
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(InputError, match="running_var"):
        checkpoints.load_checkpoint(tmp_path / "best.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_may_be_of_any_precision(tmp_path, model, tile, dtype):
    checkpoint = whole_checkpoint(model.to(dtype))
    torch.save(checkpoint, tmp_path / "best.pt")
    assert is_usable(tmp_path / "best.pt", tile)


def test_a_network_that_is_said_to_be_wide_takes_no_memory(tmp_path, model):
    checkpoint = whole_checkpoint(model)
    checkpoint["config"] = {"arch": "resnet34", "dimensions": 512}  # 5 GB
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(InputError, match="do not fit"):
        checkpoints.load_checkpoint(tmp_path / "best.pt")


def test_weights_too_large_to_multiply_are_named_when_they_predict(tmp_path, model, tile):
    checkpoint = whole_checkpoint(model)
    for key in ("up4.conv.conv.4.bias", "last_conv.weight"):
        checkpoint["model"][key].fill_(1e30)
    torch.save(checkpoint, tmp_path / "best.pt")
    loaded = checkpoints.load_checkpoint(tmp_path / "best.pt")
    network = Predictor.of(checkpoints.build_model(loaded), loaded, torch.device("cpu"))
    with pytest.raises(InputError, match="not finite"):
        network.predict(tile)


# --- bytes


def same(one, two):
    """Whether nested content is equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return one == two


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path, model):
    path = tmp_path / "best.pt"
    torch.save(whole_checkpoint(model), path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    generator = random.Random(0)
    for _ in range(40):
        entry = generator.choice(entries)
        name, extra = struct.unpack_from("<HH", content, entry.header_offset + 26)
        place = entry.header_offset + 30 + name + extra + generator.randrange(entry.file_size)
        flipped = bytearray(content)
        flipped[place] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(InputError, match=r"best\.pt.*damaged"):
            checkpoints.load_checkpoint(path)


def test_an_entry_that_is_a_folder_to_torch_alone_changes_nothing(tmp_path, model):
    """One bit of a zip's directory; torch then leaves a tensor of whatever lay in the memory."""
    path = tmp_path / "best.pt"
    torch.save(whole_checkpoint(model), path)
    content, wanted = path.read_bytes(), checkpoints.load_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        place, entries = archive.start_dir, archive.infolist()
    for entry in entries:
        flipped = bytearray(content)
        flipped[place + 38] ^= 0x10  # of the entry's attributes
        path.write_bytes(flipped)
        try:
            assert same(checkpoints.load_checkpoint(path), wanted)
        except InputError as error:
            assert "damaged" in str(error)
        place += 46 + len(entry.filename) + len(entry.extra) + len(entry.comment)


def test_damaged_bytes_are_refused_or_change_nothing(tmp_path, model):
    path = tmp_path / "best.pt"
    torch.save(whole_checkpoint(model), path)
    content, wanted = path.read_bytes(), checkpoints.load_checkpoint(path)
    refused = 0
    for seed in range(300):
        path.write_bytes(damaged(content, seed))
        try:
            assert same(checkpoints.load_checkpoint(path), wanted)
        except InputError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
            refused += 1
    assert refused > 150


def test_a_damaged_pickle_with_right_checksums_is_refused_or_usable(tmp_path, model, tile):
    """Whatever the bytes of the pickle do as a program: one line, or what inference can use."""
    path, whole = tmp_path / "best.pt", tmp_path / "whole.pt"
    checkpoint = whole_checkpoint(model)
    torch.save(checkpoint, whole)
    refused = 0
    for seed in range(300):
        path.write_bytes(whole.read_bytes())
        with_entry(path, "data.pkl", lambda content, seed=seed: damaged(content, seed))
        refused += not is_usable(path, tile)
    assert refused > 150


class Malice:
    """What writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("place", [("model",), ("args", "lr"), ("split", "h"), ("another",)])
def test_no_code_runs_wherever_it_is_hidden(tmp_path, model, place):
    victim = tmp_path / "victim"
    checkpoint = changed(whole_checkpoint(model) | {"another": 1}, place, Malice(victim))
    torch.save(checkpoint, tmp_path / "best.pt")
    torch.save(checkpoint, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for file in ("best.pt", "old.pt"):
        with pytest.raises(InputError, match="execute code"):
            checkpoints.load_checkpoint(tmp_path / file)
    assert not victim.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"(" * 200_000 + b"t" * 100_000 + b".",  # nested without end
        b"\x80\x02X\xff\xff\xff\x7fa.",  # a text longer than the file
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",  # no UTF-8
        b"\x80\x02h\x05.",  # a memo that is not there
        b"\x80\x02" + b"0" * 50 + b".",  # from an empty stack
        b"\x80\x02(K\x01K\x02o.",
        b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
        b"\x80\x63.", b".", b"",
        b"\x80\x02}(K\x01K\x02K\x03u.", b"\x80\x02]q\x00(h\x00e.", b"\x80\x02J\x00\x00.",
        b"\x80\x02ccollections\nOrderedDict\nK\x05R.",
        b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03tR.",
        b"\x80\x02K\x01Q.", b"\x80\x02(X\x07\x00\x00\x00storagetQ.",
    ],
)  # fmt: skip
def test_a_pickle_that_fails_in_any_way_is_one_line(tmp_path, model, program):
    path = tmp_path / "best.pt"
    torch.save(whole_checkpoint(model), path)
    with_entry(path, "data.pkl", lambda _: program)
    with pytest.raises(InputError, match=r"best\.pt"):
        checkpoints.load_checkpoint(path)
    (tmp_path / "plain.pt").write_bytes(program)
    with pytest.raises(InputError, match=r"plain\.pt"):
        checkpoints.load_checkpoint(tmp_path / "plain.pt")


def test_zips_that_torch_does_not_write_are_refused(tmp_path, model):
    torch.save(whole_checkpoint(model), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    with zipfile.ZipFile(tmp_path / "double.pt", "w") as archive:
        for name, content in (*entries, entries[-1]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zipfile notices
                archive.writestr(name, content)
    for file in ("packed.pt", "double.pt"):
        with pytest.raises(InputError, match=file):
            checkpoints.load_checkpoint(tmp_path / file)


def test_the_format_before_zips_is_read_for_bare_state_dicts_alone(tmp_path, model):
    old = {"_use_new_zipfile_serialization": False}
    torch.save(model.state_dict(), tmp_path / "original.pth", **old)
    loaded = checkpoints.load_checkpoint(tmp_path / "original.pth")
    assert loaded["config"] == {"arch": "unet", "dimensions": 2}
    torch.save(whole_checkpoint(model), tmp_path / "best.pt", **old)
    with pytest.raises(InputError, match="without checksums"):
        checkpoints.load_checkpoint(tmp_path / "best.pt")


def test_bare_state_dicts_are_checked_as_whole_checkpoints_are(tmp_path, model):
    state = dict(model.state_dict())
    bad = [state | {"conv1.conv.0.weight": value} for value in (None, torch.zeros(()), 5)]
    bad += [state | {"conv1.conv.0.weight": torch.zeros(600, 3, 3, 3)}]
    bad += [state | {"up1.conv.conv.0.weight": value} for value in (None, torch.zeros(3))]
    bad += [state | {"up1.conv.conv.0.weight": state["up1.conv.conv.0.weight"] * math.nan}]
    bad += [{key: value for key, value in state.items() if key != "last_conv.bias"}]
    for number, content in enumerate(bad):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(InputError, match=rf"{number}\.pth"):
            checkpoints.load_checkpoint(path)


def test_equal_checkpoints_are_equal_files(tmp_path, model):
    for name in ("best.pt", "last.pt"):
        checkpoints.save_checkpoint(tmp_path / name, whole_checkpoint(model))
    assert (tmp_path / "best.pt").read_bytes() == (tmp_path / "last.pt").read_bytes()


# --- what is no checkpoint, or a bare one


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    model = UNet(4)
    checkpoints.save_checkpoint(tmp_path / "best.pt", checkpoint_of(model))
    loaded = checkpoints.load_checkpoint(tmp_path / "best.pt")
    again = checkpoints.build_model(loaded)
    assert again.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    assert loaded["channel_order"] == "rgb"


def test_a_bare_state_dict_loads_with_its_width_and_swapped_colours(tmp_path):
    torch.save(UNet(8).state_dict(), tmp_path / "original.pth")
    loaded = checkpoints.load_checkpoint(tmp_path / "original.pth")
    assert loaded["config"] == {"arch": "unet", "dimensions": 8}
    assert loaded["channel_order"] == "bgr"
    checkpoints.build_model(loaded)


def test_a_checkpoint_that_would_execute_code_is_refused_and_executes_nothing(tmp_path):
    victim = tmp_path / "written_by_the_checkpoint"
    torch.save({"format_version": 1, "model": Malice(victim)}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt.*execute code.*refused"):
        checkpoints.load_checkpoint(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malice(victim)))
    with pytest.raises(InputError, match=r"plain\.pt"):
        checkpoints.load_checkpoint(tmp_path / "plain.pt")
    assert not victim.exists()


def test_a_whole_pickled_network_is_refused(tmp_path):
    torch.save(UNet(4), tmp_path / "whole.pt")
    with pytest.raises(InputError, match="execute code"):
        checkpoints.load_checkpoint(tmp_path / "whole.pt")


@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_a_truncated_checkpoint_is_named(tmp_path, keep):
    torch.save(checkpoint_of(UNet(4)), tmp_path / "whole.pt")
    path = tmp_path / "cut.pt"
    path.write_bytes((tmp_path / "whole.pt").read_bytes()[:keep])
    with pytest.raises(InputError, match=r"cut\.pt.*damaged"):
        checkpoints.load_checkpoint(path)


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], torch.zeros(3)])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt.*without a network"):
        checkpoints.load_checkpoint(tmp_path / "other.pt")


def test_an_image_given_as_checkpoint_is_named(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(InputError, match=r"image\.png"):
        checkpoints.load_checkpoint(tmp_path / "image.png")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"arch": "unet", "dimensions": 8}, r"best\.pt.*do not fit.*\(4, .* instead of \(8, "),
        ({"arch": "another", "dimensions": 4}, r"best\.pt: found 'another', expected unet or"),
        ({"arch": "unet"}, r"best\.pt.*dimensions"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_named(tmp_path, config, text):
    """Before any network is built of them, which is not checked again (`build_model`)."""
    torch.save(checkpoint_of(UNet(4)) | {"config": config}, tmp_path / "best.pt")
    with pytest.raises(InputError, match=text):
        checkpoints.load_checkpoint(tmp_path / "best.pt")
