"""The networks, and nothing else: RGB in, logits of every pixel out.

The first logit is that of a nucleus. A network with `instances` has a second one: how deep in its
nucleus a pixel lies, as a share of that nucleus' largest depth.

Each has a `config` that rebuilds it (`build`), and tells how it is to be tiled, in pixels: `halo`
is the context around a tile within which its logits are those of the whole image, or nearly, and
tiles start at multiples of `grid`. The U-Net's layout is that of Ronneberger et al. 2015 (MICCAI,
LNCS 9351:234), with batch norm and padded convolutions, so that the output has the input's height
and width.
"""

import difflib
import functools
import logging
import warnings

import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from tissue.files import InputError, one_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB, 0 to 1
UNET = "unet"  # what `arch` is of the UNet; of others it is timm's name of the encoder
LADDERS = ([1, 2, 4, 8, 16, 32], [2, 4, 8, 16, 32], [4, 8, 16, 32])  # how an encoder may shrink


class DoubleConv(nn.Module):
    """Twice a 3x3 convolution, batch norm and ReLU: (N, C, H, W) -> (N, out_channels, H, W).

    The channels of a `skip` (N, S, H, W) are put in front of the others.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )
        # Batch norm takes a bias before it away again: its gradient is rounding noise, which Adam
        # would scale up to full steps. The biases stay for the state dicts of the first version.
        for convolution in (self.conv[0], self.conv[3]):
            convolution.bias.requires_grad_(False)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.conv(x if skip is None else torch.cat([skip, x], dim=1))


class Down(nn.Module):
    """Halve height and width (rounded down), then convolve: (N, C, H, W) -> (N, 2C, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class UpScale(nn.Module):
    """Double height and width, and pad to the skip's: (N, C, h, w) -> (N, C/2, H, W)."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.up_scale = nn.ConvTranspose2d(in_channels, in_channels // 2, 2, stride=2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up_scale(x)
        # Pooling rounds odd sizes down, so a row or a column may be missing here.
        rows = skip.shape[2] - x.shape[2]
        columns = skip.shape[3] - x.shape[3]
        if rows or columns:  # padding by nothing would copy
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return x


class Up(nn.Module):
    """One stage of the decoder: (N, C, h, w) with a skip (N, C/2, H, W) -> (N, C/2, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.up = UpScale(in_channels)
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(self.up(x, skip), skip)


class UNet(nn.Module):
    """Nuclei against background: RGB (N, 3, H, W) float -> logits (N, 1 or 2, H, W).

    `dimensions` is the number of channels of the first stage; each of the four stages below has
    twice as many (64: 31.04 M parameters, 32: 7.77 M, 16: 1.94 M). Height and width are 16 pixels
    or more. The attribute names are those of the pipeline's first version, whose state dicts load.
    """

    halo = 96  # logits of a cell of the grid depend on 94 pixels around it, measured by gradient
    grid = 16  # four poolings by two

    def __init__(self, dimensions: int = 64, instances: bool = False):
        super().__init__()
        self.config = config_of(UNET, dimensions, instances)
        self.conv1 = DoubleConv(3, dimensions)
        self.down1 = Down(dimensions, dimensions * 2)
        self.down2 = Down(dimensions * 2, dimensions * 4)
        self.down3 = Down(dimensions * 4, dimensions * 8)
        self.down4 = Down(dimensions * 8, dimensions * 16)
        self.up1 = Up(dimensions * 16, dimensions * 8)
        self.up2 = Up(dimensions * 8, dimensions * 4)
        self.up3 = Up(dimensions * 4, dimensions * 2)
        self.up4 = Up(dimensions * 2, dimensions)
        self.last_conv = nn.Conv2d(dimensions, 1 + instances, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.conv1(x)  # (N, D, H, W)
        skip2 = self.down1(skip1)  # (N, 2D, H/2, W/2)
        skip3 = self.down2(skip2)
        skip4 = self.down3(skip3)
        x = self.down4(skip4)  # (N, 16D, H/16, W/16)
        x = self.up1(x, skip4)
        x = self.up2(x, skip3)
        x = self.up3(x, skip2)
        x = self.up4(x, skip1)
        return self.last_conv(x)


class EncoderUNet(nn.Module):
    """A U-Net decoder on the features of any network of timm: in and out as the UNet.

    `arch` is timm's name of the encoder, whose features come at 1/2 or 1/4 to 1/32 of the image's
    height and width. A stem of two convolutions sees the image at full resolution, for outlines.
    `dimensions` is the number of channels of the stem and of the decoder's last stage; each of the
    four before it has twice as many. Any size will do: it is padded to multiples of 32 by its last
    row and column. Raises InputError as `features_of`.

    A logit depends on pixels far away (477 of them in each direction for tf_efficientnet_lite0),
    but hardly: what the halo leaves out is measured in docs/lab_notes.md.
    """

    halo = 64
    grid = 32  # five halvings

    def __init__(self, arch: str, dimensions: int = 16, instances: bool = False):
        super().__init__()
        self.config = config_of(arch, dimensions, instances)
        width, *skips = reversed(features_of(arch))  # channels, from 1/32 up
        skips += [0] * (4 - len(skips)) + [dimensions]  # of 1/16, ... 1/2 and 1
        self.encoder = create_encoder(arch)
        self.stem = DoubleConv(3, dimensions)
        self.scales, self.convs = nn.ModuleList(), nn.ModuleList()
        for stage, skip in zip((4, 3, 2, 1, 0), skips, strict=True):
            out = dimensions * 2**stage
            self.scales.append(nn.ConvTranspose2d(width, out, 2, stride=2))
            self.convs.append(DoubleConv(out + skip, out))
            width = out
        self.last_conv = nn.Conv2d(dimensions, 1 + instances, 1)

    def forward(self, x: Tensor) -> Tensor:
        padded = self.padded(x)
        skips, y = self.features(padded)
        for scale, conv in zip(self.scales[:-1], self.convs[:-1], strict=True):
            y = conv(scale(y), skips.pop())
        logits = self.at_full_resolution(padded, y)
        return logits if padded is x else logits[:, :, : x.shape[2], : x.shape[3]]

    def padded(self, x: Tensor) -> Tensor:
        """Images as they are, or with more rows and columns behind, up to multiples of the grid."""
        below, right = -x.shape[2] % self.grid, -x.shape[3] % self.grid
        return F.pad(x, (0, right, 0, below), mode="replicate") if below or right else x

    def features(self, x: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """The encoder's features at 1/2, 1/4, 1/8, 1/16 (None for none), and at 1/32."""
        *skips, y = usable(self.encoder, x)
        return [*[None] * (4 - len(skips)), *skips], y

    def at_full_resolution(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits of images (N, 3, H, W) and what the decoder has at half their resolution."""
        return self.last_conv(self.convs[-1](self.scales[-1](y), self.stem(x)))


class EvenConv(Conv2dSame):
    """timm's Conv2dSame for heights and widths that its strides divide, as those in EncoderUNet.

    The padding that TensorFlow has depends on the size, but is one and the same for all of these;
    torch.export cannot follow how it depends on them. Where it has one more behind than before, the
    kernel gets a zero in front: both sides are padded alike then, and the image is not copied.
    """

    def forward(self, x: Tensor) -> Tensor:
        padding, more = self.paddings()
        weight = self.weight
        # A zero of a dilated kernel would be too far away; and ONNX takes no padded kernel.
        if any(more) and (max(self.dilation) > 1 or torch.compiler.is_exporting()):
            x = F.pad(x, (0, more[1], 0, more[0]))
            padding = [side - one for side, one in zip(padding, more, strict=True)]
        else:
            weight = self.padded_weight()
        return F.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def paddings(self) -> tuple[list[int], list[int]]:
        """Pixels of padding on both sides, with a kernel that has so many zeros (0 or 1) in front;
        of rows and of columns.
        """
        geometry = zip(self.kernel_size, self.stride, self.dilation, strict=True)
        whole = [max((size - 1) * dilation + 1 - stride, 0) for size, stride, dilation in geometry]
        return [(padding + 1) // 2 for padding in whole], [padding % 2 for padding in whole]

    def padded_weight(self) -> Tensor:
        """The kernel with its zeros in front."""
        rows, columns = self.paddings()[1]
        return F.pad(self.weight, (columns, 0, rows, 0)) if rows or columns else self.weight


def create_encoder(arch: str, **settings) -> nn.Module:
    """timm's network of that name, which gives the features of images of multiples of 32 pixels;
    random weights unless `settings`, those of timm.create_model, say otherwise.
    """
    logging.getLogger("timm").setLevel(logging.ERROR)  # it tells of each tensor that it leaves out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm's own names and layers
        encoder = timm.create_model(arch, features_only=True, **settings)
    for module in encoder.modules():
        if type(module) is Conv2dSame:
            module.__class__ = EvenConv
    return encoder


def usable(encoder: nn.Module, x: Tensor) -> list[Tensor]:
    """An encoder's features (N, C, h, w) of 1/2 of the image's height and width and less."""
    features = encoder(x)
    if getattr(encoder, "output_fmt", "NCHW") == "NHWC":
        features = [feature.permute(0, 3, 1, 2) for feature in features]
    return features[-5:]  # some begin at full resolution, which is the stem's


@functools.cache
def features_of(arch: str) -> tuple[int, ...]:
    """The channels of an encoder's features, from 1/2 or 1/4 of the image's size to 1/32.

    Raises InputError for an encoder with other features, or with other sizes of images than any.
    """
    height, width = 64, 96
    try:
        with torch.device("meta"):  # shapes alone
            encoder = create_encoder(arch)
            ladder, channels = encoder.feature_info.reduction(), encoder.feature_info.channels()
            found = [tuple(f.shape) for f in usable(encoder, torch.empty(2, 3, height, width))]
        reason = f"its features are 1/{', 1/'.join(map(str, ladder))} of the image's size"
    except Exception as error:  # timm refuses in many ways
        reason = one_line(error)
    else:
        steps = list(zip(channels, ladder, strict=True))[-5:]
        if ladder in LADDERS and found == [(2, c, height // s, width // s) for c, s in steps]:
            return tuple(channel for channel, _ in steps)
    raise InputError(
        f"found {arch}, expected an encoder that takes images of any size and has features of 1/2 "
        f"or 1/4 to 1/32 of it ({reason:.200}); choose another, as tf_efficientnet_lite0, resnet34 "
        f"or convnext_nano"
    )


def build(config: dict) -> nn.Module:
    """The network of a `config`, with random weights; InputError as `check_arch`."""
    arch, *others = config["arch"], config["dimensions"], config.get("instances", False)
    check_arch(arch)
    return UNet(*others) if arch == UNET else EncoderUNet(arch, *others)


def config_of(arch: str, dimensions: int, instances: bool) -> dict:
    """What rebuilds a network (`build`); earlier versions knew no instances, and say nothing."""
    config = {"arch": arch, "dimensions": dimensions}
    return config | {"instances": True} if instances else config


def usual_dimensions(arch: str) -> int:
    """The `dimensions` of a network for which none are given."""
    return 64 if arch == UNET else 16


def check_arch(arch: str) -> None:
    """Raise InputError unless `arch` is "unet", or timm's name of an encoder that `features_of`
    can use.
    """
    if arch == UNET:
        return
    names = timm.list_models()
    if arch not in names:
        close = difflib.get_close_matches(arch[:80], [UNET, *names], 5)
        raise InputError(
            f"found {arch!r:.80}, expected {UNET} or the name of a network of timm, "
            + (f"as {', '.join(close)}" if close else "as timm.list_models() has them")
        )
    features_of(arch)


@torch.no_grad()
def sees_all(network: nn.Module) -> bool:
    """Whether a network's logits depend on the whole image, however large it is: by attention over
    all of it, say, or squeeze-and-excitation.

    What is no number makes no number of all that depends on it, whatever the weights: so it is put
    into one end of a strip of 64 x 4096 pixels, and looked for at the other.
    """
    if isinstance(network, UNet):
        return False
    strip = torch.zeros(1, 3, 64, 4096, device=network.last_conv.weight.device)
    strip[..., :1] = torch.nan
    learns = network.training
    logits = network.eval()(strip)
    network.train(learns)
    return bool(logits[..., -1].isnan().any())
