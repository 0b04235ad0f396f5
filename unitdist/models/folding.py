"""A trained network for inference and export, in plain tensor operations.

The batch normalization inside Unitization is one scale and shift per channel at test time; it is folded here, into the
convolution before the layer where that convolution feeds nothing else. The norm of the sample is no constant: it
stays, divided by the fixed n. Axes: n samples, c channels.
"""

import copy
import logging
from typing import cast

import torch
from torch import Tensor, fx, nn

from unitdist.errors import CheckpointError, ConfigError
from unitdist.layers import Unitization1d, Unitization2d, missing_norm_divisors
from unitdist.layers.convert import UnitizationAct2d
from unitdist.models.preact_resnet import PreactBlock

_log = logging.getLogger(__name__)

UnitizationLayer = Unitization1d | Unitization2d


class FoldedUnitization(nn.Module):
    """Unitization at test time: y = (p * with_norm + without_norm) * xh + shift, then ReLU if it was fused.

    xh = scale * x + offset, or x itself where `into_convolution`; s = sum over c of the mean over space of xh^2 / n (pixel
    scope: sum over c of xh^2 / n); p = 1/sqrt(s + eps), one per sample (pixel). with_norm = weight * alpha,
    without_norm = weight * (1 - alpha), shift = bias. Where alpha is 0 in every channel there is no norm to compute
    (`has_norm` False). All constants are buffers; no training.
    """

    scale: Tensor
    offset: Tensor
    with_norm: Tensor
    without_norm: Tensor
    shift: Tensor

    def __init__(self, layer: UnitizationLayer, *, into_convolution: bool) -> None:
        super().__init__()
        inverse_std_c = torch.rsqrt(layer.running_var + layer.eps)
        self.num_features = layer.num_features
        self.eps = layer.eps
        self.norm_divisor = int(layer.norm_divisor)
        self.pixel_scope = layer.norm_scope == "pixel"
        self.relu = layer.activation == "relu"
        self.into_convolution = into_convolution
        self.has_norm = bool((layer.alpha != 0).any())
        self.register_buffer("scale", inverse_std_c)
        self.register_buffer("offset", -layer.running_mean * inverse_std_c)
        self.register_buffer("with_norm", (layer.weight * layer.alpha).detach())
        self.register_buffer("without_norm", (layer.weight * (1 - layer.alpha)).detach())
        self.register_buffer("shift", layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, *spatial) -> y of the same shape."""
        column = (1, -1) + (1,) * (x.dim() - 2)
        normalized = x if self.into_convolution else x * self.scale.view(column) + self.offset.view(column)
        factor = self.without_norm.view(column)
        if self.has_norm:
            factor = self._inverse_norm(normalized) * self.with_norm.view(column) + factor
        y = normalized * factor + self.shift.view(column)
        return torch.relu(y) if self.relu else y

    def _inverse_norm(self, normalized: Tensor) -> Tensor:
        """p (N, 1, ...), one per sample, or per pixel."""
        squares = normalized.square()
        if normalized.dim() > 2 and not self.pixel_scope:
            squares = squares.mean(tuple(range(2, normalized.dim())), keepdim=True)
        return torch.rsqrt(squares.sum(1, keepdim=True) / self.norm_divisor + self.eps)

    def extra_repr(self) -> str:
        """What was folded where, and n."""
        place = "convolution" if self.into_convolution else "scale and offset"
        norm = f"norm_divisor={self.norm_divisor}" if self.has_norm else "no norm (alpha = 0)"
        return f"{self.num_features}, {norm}, batch norm in {place}, relu={self.relu}"


def fold_unitization(model: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode, every Unitization layer replaced by a `FoldedUnitization`.

    Where a convolution or linear layer feeds a Unitization layer and nothing else, its weights take up the
    layer's batch normalization. Outputs are the same but for rounding. Raises ConfigError when there is no such
    layer, CheckpointError when a norm divisor is not known.
    """
    unknown = missing_norm_divisors(model)
    if unknown:
        raise CheckpointError(f"cannot fold: the norm divisor of {unknown[0]} is not known ({len(unknown)} in all)")
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        if isinstance(module, PreactBlock):  # forms for training, which tracing cannot follow
            module.fold_residual = module.overlap_sync = False
    feeds = _feeding_layers(folded)
    named = list(folded.named_modules(remove_duplicate=False))  # a layer that is used in two places has two names
    layers = [(name, module) for name, module in named if isinstance(module, UnitizationLayer)]
    if not layers:
        raise ConfigError(f"cannot fold: {type(model).__name__} has no Unitization layer")
    plain: dict[nn.Module, nn.Module] = {}
    with torch.no_grad():
        for name, layer in layers:
            if layer not in plain:
                plain[layer] = _folded(layer, into_convolution=name in feeds)
            if name in feeds:
                _scale_outputs(folded.get_submodule(feeds[name]), layer)
            folded.set_submodule(name, plain[layer])
    _log.info("folded %d Unitization layers, %d of them into the layer before", len(plain), len(feeds))
    return folded


def _folded(layer: UnitizationLayer, *, into_convolution: bool) -> nn.Module:
    plain = FoldedUnitization(layer, into_convolution=into_convolution)
    if isinstance(layer, UnitizationAct2d):
        return nn.Sequential(plain, layer.drop, layer.act).eval()
    return plain.eval()


def _scale_outputs(feeding: nn.Module, layer: UnitizationLayer) -> None:
    """Make `feeding` put out xh of `layer`: weight * r_c, (bias - mean_c) * r_c."""
    feeding = cast("nn.Conv2d | nn.Linear", feeding)
    inverse_std_c = torch.rsqrt(layer.running_var + layer.eps).to(feeding.weight.dtype)
    bias_c = torch.zeros_like(inverse_std_c) if feeding.bias is None else feeding.bias
    feeding.weight.mul_(inverse_std_c.view(-1, *(1,) * (feeding.weight.dim() - 1)))
    feeding.bias = nn.Parameter((bias_c - layer.running_mean.to(bias_c.dtype)) * inverse_std_c, requires_grad=False)


class _LeafTracer(fx.Tracer):
    """Stops at every module that has no children, and at Unitization layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, UnitizationLayer) or not list(m.children())


def _feeding_layers(model: nn.Module) -> dict[str, str]:
    """Unitization layer -> the convolution or linear layer that feeds it and nothing else, by qualified names.

    Found by tracing. A network that cannot be traced keeps its convolutions as they are, and the log says so.
    """
    try:
        graph = _LeafTracer().trace(model)
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        _log.warning("not folded into convolutions: %s cannot be traced (%r)", type(model).__name__, error)
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    used = [modules[node.target] for node in calls]
    feeds: dict[str, str] = {}
    for node in calls:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        layer, feeding = modules[node.target], modules[before.target]
        once = used.count(layer) == 1 and used.count(feeding) == 1
        if once and isinstance(layer, UnitizationLayer) and isinstance(feeding, nn.Conv2d | nn.Linear):
            feeds[str(node.target)] = str(before.target)
    return feeds
