"""From batch normalization to Unitization and back, in an existing network."""

import logging
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unitdist.errors import ConfigError
from unitdist.functional.unitization import NormScope
from unitdist.layers.unitization import Unitization1d, Unitization2d, _Unitization

_log = logging.getLogger(__name__)

LayerFilter = Callable[[nn.Module, str], bool]


class UnitizationAct2d(Unitization2d):
    """Unitization2d followed by `drop` and `act`: what a norm+act layer becomes if its act is not a plain ReLU."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """act(drop(Unitization2d(x))), all of x's shape."""
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


class BatchNormAct2d(nn.BatchNorm2d):
    """BatchNorm2d followed by `drop` and `act`: what a Unitization with an activation reverts to."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """act(drop(BatchNorm2d(input))), all of the input's shape."""
        y: Tensor = self.act(self.drop(super().forward(input)))
        return y


def convert_unitization(
    model: nn.Module,
    *,
    filter: LayerFilter | None = None,
    norm_divisor: int | None = None,
    norm_scope: NormScope = "image",
    process_group: dist.ProcessGroup | None = None,
    sync: bool = True,
) -> nn.Module:
    """Replace BatchNorm1d, BatchNorm2d, SyncBatchNorm (and its subclasses) and norm+act layers (timm's) by Unitization.

    State is kept: parameters are the same objects, statistics are copied, alpha is 0, so the network computes what it
    computed until alpha moves. A norm+act layer keeps its dropout and activation, a plain ReLU is fused.
    `filter(module, qualified_name)`: convert where it returns True. `process_group`, `sync`, `norm_scope`,
    `norm_divisor`: as in Unitization2d; a SyncBatchNorm's own group is kept if none is given. Returns the model (a
    new module if the model itself is a norm layer). Raises ConfigError when nothing was converted.
    """

    def convert(module: nn.Module) -> nn.Module | None:
        if not _is_convertible(module):
            return None
        assert isinstance(module, _BatchNorm)
        group = process_group if process_group is not None else getattr(module, "process_group", None)
        return _to_unitization(module, norm_divisor, norm_scope, group, sync)

    model, count = _replace(model, convert, filter)
    if count == 0:
        raise ConfigError(
            f"convert_unitization: {type(model).__name__} has no batch normalization layer to convert "
            "(BatchNorm1d, BatchNorm2d, SyncBatchNorm, or norm+act) that the filter lets through"
        )
    _log.info("converted %d batch normalization layers to Unitization", count)
    return model


def revert_unitization(model: nn.Module, *, filter: LayerFilter | None = None) -> nn.Module:
    """Replace Unitization layers by BatchNorm1d and BatchNorm2d; alpha and the norm divisor are dropped.

    The network computes the same function where alpha is 0. A fused ReLU, dropout and activation are kept in a
    `BatchNormAct2d` with the same parameter names. Returns the model; ConfigError when nothing was converted.
    """

    def revert(module: nn.Module) -> nn.Module | None:
        return _to_batch_norm(module) if isinstance(module, _Unitization) else None

    model, count = _replace(model, revert, filter)
    if count == 0:
        raise ConfigError(
            f"revert_unitization: {type(model).__name__} has no Unitization layer that the filter lets through"
        )
    _log.info("converted %d Unitization layers to batch normalization", count)
    return model


def _replace(
    model: nn.Module, make: Callable[[nn.Module], nn.Module | None], filter: LayerFilter | None
) -> tuple[nn.Module, int]:
    made: dict[nn.Module, nn.Module] = {}  # a layer that is used in two places stays one layer

    def visit(module: nn.Module, name: str) -> nn.Module:
        if module in made:
            return made[module]
        new = make(module) if filter is None or filter(module, name) else None
        if new is not None:
            made[module] = new
            return new
        for child_name, child in list(module._modules.items()):  # named_children() would hide the second use
            if child is None:
                continue
            replacement = visit(child, f"{name}.{child_name}" if name else child_name)
            if replacement is not child:
                setattr(module, child_name, replacement)
        return module

    return visit(model, ""), len(made)


def _has_activation(module: nn.Module) -> bool:
    return isinstance(getattr(module, "act", None), nn.Module) and isinstance(getattr(module, "drop", None), nn.Module)


def _is_convertible(module: nn.Module) -> bool:
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) or isinstance(module, nn.SyncBatchNorm):
        return True
    return isinstance(module, nn.BatchNorm2d) and _has_activation(module)


def _to_unitization(
    norm: _BatchNorm,
    norm_divisor: int | None,
    norm_scope: NormScope,
    process_group: dist.ProcessGroup | None,
    sync: bool,
) -> _Unitization:
    if norm.running_mean is None or norm.running_var is None:
        raise ConfigError(
            "convert_unitization: a layer with track_running_stats=False has no running statistics to keep"
        )
    act, drop = (getattr(norm, "act", None), getattr(norm, "drop", None)) if _has_activation(norm) else (None, None)
    fused = isinstance(act, nn.ReLU) and isinstance(drop, nn.Identity)
    nothing = act is None or (isinstance(act, nn.Identity) and isinstance(drop, nn.Identity))
    if isinstance(norm, nn.BatchNorm1d):
        kind: type[_Unitization] = Unitization1d
    else:
        kind = Unitization2d if fused or nothing else UnitizationAct2d
    layer = kind(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm_divisor=None if kind is Unitization1d else norm_divisor,
        norm_scope="image" if kind is Unitization1d else norm_scope,
        activation="relu" if fused else None,
        process_group=process_group,
        sync=sync,
        device=norm.running_mean.device,
        dtype=norm.weight.dtype if norm.affine else norm.running_mean.dtype,
    )
    if isinstance(layer, UnitizationAct2d):
        assert act is not None and drop is not None
        layer.drop, layer.act = drop, act
    if norm.affine:
        layer.weight, layer.bias = norm.weight, norm.bias
    else:
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
    _copy_statistics(norm, layer)
    return layer


def _to_batch_norm(layer: _Unitization) -> _BatchNorm:
    has_activation = isinstance(layer, UnitizationAct2d) or layer.activation is not None
    if isinstance(layer, Unitization1d):
        if has_activation:
            raise ConfigError(
                "revert_unitization: a Unitization1d with activation has no batch normalization to revert to"
            )
        kind: type[_BatchNorm] = nn.BatchNorm1d
    else:
        kind = BatchNormAct2d if has_activation else nn.BatchNorm2d
    norm = kind(
        layer.num_features, layer.eps, layer.momentum, device=layer.running_mean.device, dtype=layer.weight.dtype
    )
    if isinstance(norm, BatchNormAct2d):
        if isinstance(layer, UnitizationAct2d):
            norm.drop, norm.act = layer.drop, layer.act
        else:
            norm.drop, norm.act = nn.Identity(), nn.ReLU()
    norm.weight, norm.bias = layer.weight, layer.bias
    _copy_statistics(layer, norm)
    return norm


def _copy_statistics(source: nn.Module, target: nn.Module) -> None:
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        getattr(target, name).copy_(getattr(source, name))
    target.train(source.training)
