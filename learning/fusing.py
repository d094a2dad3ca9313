"""A network made faster for prediction: convolutions take in batch norm and activation, and what is
not kept of a tile is left out as soon as nothing looks at it.
"""

from collections import Counter, defaultdict

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from learning.devices import choose_precision
from model import DoubleConv, EncoderUNet, EvenConv, UNet

BAND = 256  # rows
LOOK = 2  # pixels that two convolutions of 3 x 3 look further


class FusedConv(nn.Module):
    """A convolution and its activation in one pass over the memory, as oneDNN has it on a CPU.

    The operator is the one that torch.compile's CPU code calls; it takes half the time of a
    depthwise convolution and ReLU6 one after the other.
    """

    operator = None
    if torch.backends.mkldnn.is_available():
        operator = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    kinds = {  # noqa: RUF012
        nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0.0, 6.0]), nn.Identity: ("none", []),
    }  # fmt: skip

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module, precision: torch.dtype):
        super().__init__()
        weight, padding = convolution.weight, convolution.padding
        if type(convolution) is EvenConv:
            weight, padding = convolution.padded_weight(), convolution.paddings()[0]
        self.register_buffer("weight", weight.detach().to(precision))
        self.register_buffer("bias", convolution.bias.detach().to(precision))
        self.geometry = padding, convolution.stride, convolution.dilation
        self.groups, self.kind = convolution.groups, self.kinds[type(activation)]

    @classmethod
    def can(cls, convolution: nn.Conv2d, activation: nn.Module) -> bool:
        """Whether there is such a pass for these two, on a CPU."""
        plain = type(convolution) is nn.Conv2d and convolution.padding_mode == "zeros"
        plain &= not isinstance(convolution.padding, str)
        even = type(convolution) is EvenConv and max(convolution.dilation) == 1
        return cls.operator is not None and (plain or even) and type(activation) in cls.kinds

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        x, weight, bias = x.to(self.weight.dtype), self.weight, self.bias
        if skip is None:
            return self.operator(x, weight, bias, *self.geometry, self.groups, *self.kind, "")
        # Two convolutions whose sum is that of both side by side, which are never put there.
        first, second = weight.tensor_split([skip.shape[1]], dim=1)
        found = self.operator(skip.to(x.dtype), first, bias, *self.geometry, 1, "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            found, x, second, None, *self.geometry, 1, "add", 1.0, *self.kind, None
        )


class FusedDoubleConv(DoubleConv):
    """A DoubleConv whose first convolution is a FusedConv."""

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        first, *others = self.conv
        x = first(x, skip)
        for layer in others:
            x = layer(x)
        return x


Part = tuple[slice, slice]  # rows and columns of an image, or of what has a part of its resolution


class LeanUNet(UNet):
    """A UNet whose decoder computes what is kept of an image, and what that depends on, alone."""

    def forward(self, x: torch.Tensor, kept: Part | None = None) -> torch.Tensor:
        kept = kept or whole(x)
        if any(side % self.grid for side in x.shape[2:]):
            return cut(super().forward(x), kept)
        skips = [self.conv1(x)]
        for down in (self.down1, self.down2, self.down3):
            skips.append(down(skips[-1]))
        y = self.down4(skips[-1])
        part, seen = whole(y), seen_for(kept, LOOK, x, len(skips))
        for up in (self.up1, self.up2, self.up3, self.up4):
            y = up.up.up_scale(cut(y, halved(seen[-1]), part))
            part = seen.pop()
            y = up.conv(y, cut(skips.pop(), part))
        return self.last_conv(cut(y, kept, part))


class LeanEncoderUNet(EncoderUNet):
    """An EncoderUNet whose decoder computes what is kept of an image, and what that depends on,
    alone; its last stage, at full resolution, which has half of all that is in memory at once, band
    by band.
    """

    def forward(self, x: torch.Tensor, kept: Part | None = None) -> torch.Tensor:
        kept = kept or whole(x)
        x = self.padded(x)
        skips, y = self.features(x)
        look = 2 * LOOK  # the stem's, and the last stage's
        part, (_, *seen) = whole(y), seen_for(kept, look, x, 5)
        for scale, conv in zip(self.scales[:-1], self.convs[:-1], strict=True):
            y = scale(cut(y, halved(seen[-1]), part))
            part, skip = seen.pop(), skips.pop()
            y = conv(y, None if skip is None else cut(skip, part))
        rows, columns = kept
        logits = []
        for top in range(rows.start, rows.stop, BAND):
            band = slice(top, min(top + BAND, rows.stop)), columns
            wide = around(band, look, x)
            found = self.at_full_resolution(cut(x, wide), cut(y, halved(wide), part))
            logits.append(cut(found, band, wide))
        return torch.cat(logits, dim=2)


def whole(x: torch.Tensor) -> Part:
    return slice(0, x.shape[2]), slice(0, x.shape[3])


def cut(x: torch.Tensor, part: Part, of: Part | None = None) -> torch.Tensor:
    """A part of an image, which `x` (N, C, h, w) is, or has the part `of` alone."""
    starts = [side.start for side in of] if of else (0, 0)
    rows, columns = (
        slice(side.start - start, side.stop - start)
        for side, start in zip(part, starts, strict=True)
    )
    return x[:, :, rows, columns]


def around(part: Part, look: int, x: torch.Tensor, shrunk: int = 1) -> Part:
    """`part` and so many pixels more on all sides, from even to even ones, as far as `x` goes: an
    image, whose height and width are those of the part's by `shrunk`, and even by it.
    """
    ends = (side // shrunk for side in x.shape[2:])
    return tuple(
        slice(max(side.start - look, 0) // 2 * 2, min(side.stop + look + 1, end) // 2 * 2)
        for side, end in zip(part, ends, strict=True)
    )


def halved(part: Part) -> Part:
    return tuple(slice(side.start // 2, side.stop // 2) for side in part)


def seen_for(kept: Part, look: int, x: torch.Tensor, stages: int) -> list[Part]:
    """What the stages of a decoder have to see, at 1, 1/2, ... of the image's resolution, so that
    the last one gives the part `kept` of it; that one looks so many pixels further.
    """
    seen = [around(kept, look, x)]
    for stage in range(1, stages):
        seen.append(around(halved(seen[-1]), LOOK, x, 2**stage))
    return seen


def fuse(model: nn.Module, device: torch.device) -> nn.Module:
    """Take batch norm into the convolution before it, and on a CPU the activation too, in place.

    For inference alone.
    """
    precision = choose_precision(device)
    for convolution_name, norm_name, relu_name in fusable(model):
        norm = model.get_submodule(norm_name)
        convolution = fuse_conv_bn_eval(model.get_submodule(convolution_name), norm)
        model.set_submodule(norm_name, own_activation(norm))
        relu = model.get_submodule(relu_name)
        if device.type == "cpu" and FusedConv.can(convolution, relu):
            convolution = FusedConv(convolution, relu, precision)
            model.set_submodule(relu_name, nn.Identity())
        model.set_submodule(convolution_name, convolution)
    if device.type == "cpu" and FusedConv.can(model.last_conv, nn.Identity()):
        model.last_conv = FusedConv(model.last_conv, nn.Identity(), precision)
    for module in model.modules():
        if isinstance(module, DoubleConv) and isinstance(module.conv[0], FusedConv):
            module.__class__ = FusedDoubleConv
    model.__class__ = {UNet: LeanUNet, EncoderUNet: LeanEncoderUNet}.get(type(model), type(model))
    return model


def own_activation(norm: nn.BatchNorm2d) -> nn.Module:
    """The activation that timm's BatchNormAct2d has within; of others an nn.Identity."""
    return getattr(norm, "act", nn.Identity())


def fusable(model: nn.Module) -> list[tuple[str, str, str]]:
    """The names of each convolution, of the batch norm that alone takes what it makes, and of the
    ReLU that alone takes what that makes (the batch norm's again where it has one or none).

    A small image shows who takes what: its gradient's graph has each value's makers and takers.
    """
    kinds = (nn.Conv2d, EvenConv, nn.BatchNorm2d, BatchNormAct2d, nn.ReLU, nn.ReLU6)
    names = {module: name for name, module in model.named_modules() if type(module) in kinds}
    taken, made, hooks = defaultdict(list), defaultdict(list), []
    for module in names:
        hooks += [
            module.register_forward_pre_hook(lambda m, inputs: taken[m].append(inputs[0].grad_fn)),
            module.register_forward_hook(lambda m, _, output: made[m].append(output.grad_fn)),
        ]
    with torch.inference_mode(False), torch.enable_grad():
        parameter = next(model.parameters())
        todo = [model(torch.zeros(1, 3, 64, 64).to(parameter)).grad_fn]
    for hook in hooks:
        hook.remove()
    takers, seen = Counter(), set(todo)
    while todo:
        makers = [node for node, _ in todo.pop().next_functions if node is not None]
        takers.update(makers)
        todo += set(makers) - seen
        seen.update(makers)
    maker = {nodes[0]: module for module, nodes in made.items() if len(nodes) == 1}
    after = {
        maker[nodes[0]]: module
        for module, nodes in taken.items()
        if len(nodes) == 1 and nodes[0] in maker and takers[nodes[0]] == 1
    }
    found = []
    for module, name in names.items():
        norm = after.get(module)
        if isinstance(module, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            relu = after.get(norm)
            is_alone = isinstance(own_activation(norm), nn.Identity) and type(relu) in kinds[-2:]
            found.append((name, names[norm], names[relu if is_alone else norm]))
    return found
