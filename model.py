"""The U-Net, and nothing else.

Layout after Ronneberger et al. 2015 (MICCAI, LNCS 9351:234), with batch norm and padded
convolutions, so that the output has the input's height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
