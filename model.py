"""The networks, and nothing else: RGB in, one logit a pixel out.

Each has a `config` that rebuilds it, and tells how it is to be tiled, in pixels: `halo` is the
context around a tile within which its logits are those of the whole image, and tiles start at
multiples of `grid`. The U-Net's layout is that of Ronneberger et al. 2015 (MICCAI, LNCS 9351:234),
with batch norm and padded convolutions, so that the output has the input's height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet34


class DoubleConv(nn.Module):
    """Twice a 3x3 convolution, batch norm and ReLU: (N, C, H, W) -> (N, out_channels, H, W)."""

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

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Down(nn.Module):
    """Halve height and width (rounded down), then convolve: (N, C, H, W) -> (N, 2C, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class UpScale(nn.Module):
    """Double height and width, pad to the skip's size, and put the skip in front of the channels.

    (N, C, h, w) with a skip (N, C/2, H, W) -> (N, C, H, W).
    """

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
        return torch.cat([skip, x], dim=1)


class Up(nn.Module):
    """One stage of the decoder: (N, C, h, w) with a skip (N, C/2, H, W) -> (N, C/2, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.up = UpScale(in_channels)
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(self.up(x, skip))


class UNet(nn.Module):
    """Nuclei against background: RGB (N, 3, H, W) float -> one logit a pixel, (N, 1, H, W).

    `dimensions` is the number of channels of the first stage; each of the four stages below has
    twice as many (64: 31.04 M parameters, 32: 7.77 M, 16: 1.94 M). Height and width are 16 pixels
    or more. The attribute names are those of the pipeline's first version, whose state dicts load.
    """

    halo = 96  # logits of a cell of the grid depend on 94 pixels around it, measured by gradient
    grid = 16  # four poolings by two

    def __init__(self, dimensions: int = 64):
        super().__init__()
        self.config = {"arch": "unet", "dimensions": dimensions}  # what rebuilds this network
        self.conv1 = DoubleConv(3, dimensions)
        self.down1 = Down(dimensions, dimensions * 2)
        self.down2 = Down(dimensions * 2, dimensions * 4)
        self.down3 = Down(dimensions * 4, dimensions * 8)
        self.down4 = Down(dimensions * 8, dimensions * 16)
        self.up1 = Up(dimensions * 16, dimensions * 8)
        self.up2 = Up(dimensions * 8, dimensions * 4)
        self.up3 = Up(dimensions * 4, dimensions * 2)
        self.up4 = Up(dimensions * 2, dimensions)
        self.last_conv = nn.Conv2d(dimensions, 1, 1)
        self.bottleneck = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.conv1(x)  # (N, D, H, W)
        skip2 = self.down1(skip1)  # (N, 2D, H/2, W/2)
        skip3 = self.down2(skip2)
        skip4 = self.down3(skip3)
        x = self.bottleneck(self.down4(skip4))  # (N, 16D, H/16, W/16)
        x = self.up1(x, skip4)
        x = self.up2(x, skip3)
        x = self.up3(x, skip2)
        x = self.up4(x, skip1)
        return self.last_conv(x)


class WindowAttention(nn.Module):
    """Self-attention within windows of 8 x 8 pixels of the bottleneck: (N, C, h, w), same out.

    Windows keep the memory linear in the image's size (Liu et al. 2021, ICCV, Swin). They lie at
    multiples of their side, so a tile that starts there has the windows of the whole image; windows
    beyond the edge have their outer part masked. A head sees where pixels lie to each other by
    rotary embedding, half of it for rows and half for columns (Su et al. 2021, arXiv:2104.09864).
    """

    side = 8  # the bottleneck of a training patch of 128 pixels is one window
    heads = 4

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        pairs = channels // self.heads // 4  # of channels that turn together, for each direction
        speed = self.side ** -(torch.arange(pairs) / pairs)  # radians a pixel, 1 to about 1/side
        place = torch.cartesian_prod(*[torch.arange(self.side)] * 2)  # (64, 2): row and column
        angle = (place[:, :, None] * speed).flatten(1)  # (64, half of a head)
        self.register_buffer("cosine", angle.cos(), persistent=False)
        self.register_buffer("sine", angle.sin(), persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        """Turn each pair of channels by its angle at each place: (..., 64, head), same out."""
        first, second = x.chunk(2, dim=-1)
        cosine, sine = self.cosine.to(x.dtype), self.sine.to(x.dtype)
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)

    def windows(self, x: Tensor) -> Tensor:
        """(N, C, rows * 8, columns * 8) -> (N * rows * columns, 64, C)."""
        x = x.unflatten(3, (-1, self.side)).unflatten(2, (-1, self.side))
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        padding = (0, -width % self.side, 0, -height % self.side)
        padded = F.pad(x, padding)
        inside = F.pad(x.new_ones(1, 1, height, width, dtype=torch.bool), padding)
        inside = self.windows(inside).transpose(1, 2)[:, None]  # (windows of one image, 1, 1, 64)
        tokens = self.windows(padded)  # (windows, 64, C)
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (windows, heads, 64, head)
            for part in self.query_key_value(self.norm(tokens)).chunk(3, dim=2)
        )
        mask = inside.repeat(x.shape[0], 1, 1, 1)
        attended = F.scaled_dot_product_attention(self.turn(query), self.turn(key), value, mask)
        attended = self.project(attended.transpose(1, 2).flatten(2))
        rows, columns = padded.shape[2] // self.side, padded.shape[3] // self.side
        attended = attended.reshape(x.shape[0], rows, columns, self.side, self.side, -1)
        attended = attended.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return x + attended[:, :, :height, :width]


class AttentionUNet(UNet):
    """The U-Net with self-attention at its bottleneck, within windows of 128 x 128 pixels.

    Its tiles give the untiled prediction where they start at multiples of such a window and have
    the windows around them whole, hence the wide halo.
    """

    halo = 256  # in whole windows; logits of a window depend on 190 pixels around it
    grid = 16 * WindowAttention.side

    def __init__(self, dimensions: int = 64):
        super().__init__(dimensions)
        self.config = {"arch": "attention", "dimensions": dimensions}
        self.bottleneck = WindowAttention(dimensions * 16)


class ResNetUNet(nn.Module):
    """A U-Net whose encoder is torchvision's ResNet-34 (He et al. 2016, CVPR): same in and out.

    `dimensions` is the number of channels of the decoder's last stage; each of the four before it
    has twice as many. The encoder has 21.3 M parameters whatever it is. Any size will do: it is
    padded to multiples of 32 by its last row and column.

    A logit depends on up to 513 pixels around its cell of the grid, but hardly: pixels beyond 256
    hold 5e-5 of its gradient and change probabilities by less than 1e-5 (measured), which is below
    the rounding of bfloat16.
    """

    halo = 256
    grid = 32  # five halvings

    def __init__(self, dimensions: int = 16):
        super().__init__()
        self.config = {"arch": "resnet34", "dimensions": dimensions}
        self.encoder = resnet34()  # random weights; utils.start_from_imagenet gives it others
        self.encoder.fc = nn.Identity()
        skips = (256, 128, 64, 64, 0)  # channels of the encoder at 1/16, 1/8, 1/4, 1/2 and 1
        widths = [512] + [dimensions * 2**stage for stage in (4, 3, 2, 1, 0)]
        self.scales, self.convs = nn.ModuleList(), nn.ModuleList()
        for channels, out, skip in zip(widths, widths[1:], skips, strict=False):
            self.scales.append(nn.ConvTranspose2d(channels, out, 2, stride=2))
            self.convs.append(DoubleConv(out + skip, out))
        self.last_conv = nn.Conv2d(dimensions, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % self.grid, 0, -height % self.grid), mode="replicate")
        encoder = self.encoder
        skip1 = encoder.relu(encoder.bn1(encoder.conv1(x)))  # (N, 64, H/2, W/2)
        skip2 = encoder.layer1(encoder.maxpool(skip1))  # (N, 64, H/4, W/4)
        skip3 = encoder.layer2(skip2)  # (N, 128, H/8, W/8)
        skip4 = encoder.layer3(skip3)  # (N, 256, H/16, W/16)
        x = encoder.layer4(skip4)  # (N, 512, H/32, W/32)
        for scale, conv, skip in zip(
            self.scales, self.convs, (skip4, skip3, skip2, skip1, None), strict=True
        ):
            x = scale(x)
            x = conv(x if skip is None else torch.cat([skip, x], dim=1))
        return self.last_conv(x)[:, :, :height, :width]


NETWORKS = {"unet": UNet, "attention": AttentionUNet, "resnet34": ResNetUNet}
