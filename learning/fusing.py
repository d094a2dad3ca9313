"""A network made faster for prediction: convolutions take in batch norm and activation."""

from collections import Counter, defaultdict

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from learning.devices import choose_precision
from model import DoubleConv, EncoderUNet, EvenConv

BAND = 256  # rows
MARGIN = 4  # rows that four convolutions of 3 x 3 look further, two of the stem, two of the stage


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


class BandedEncoderUNet(EncoderUNet):
    """An EncoderUNet that does its last stage, at full resolution, band by band: the stage has half
    of all that is in memory at once, and looks MARGIN rows beyond a band.
    """

    def at_full_resolution(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        bands, height = [], x.shape[2]
        for top in range(0, height, BAND):
            first, last = max(0, top - MARGIN), min(height, top + BAND + MARGIN)
            half = y[:, :, first // 2 : last // 2]
            logits = super().at_full_resolution(x[:, :, first:last], half)
            bands.append(logits[:, :, top - first : top - first + BAND])
        return torch.cat(bands, dim=2)


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
    if device.type == "cpu" and type(model) is EncoderUNet:
        model.__class__ = BandedEncoderUNet
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
