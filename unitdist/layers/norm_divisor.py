"""Fixing the norm divisors of a network for a training resolution, without running it."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unitdist.errors import ConfigError
from unitdist.layers.unitization import Unitization2d, _Unitization


def set_norm_divisors(
    model: nn.Module, image_size: int | tuple[int, int], *, channels: int = 3, only_missing: bool = False
) -> dict[str, int]:
    """Fix n of every image-scope Unitization2d to its H*W at input `image_size` (side, or height and width, px).

    One dry run on the meta device: no memory, no computation, no change of running statistics. Layers that the
    run does not reach keep their state. `only_missing`: leave divisors that are known. Returns the divisors by
    qualified name. Raises ConfigError when a layer meets two sizes, the model has no such layer, or it does not run on such images.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Unitization2d) and module.norm_scope == "image"
    }
    if not layers:
        raise ConfigError(
            f"set_norm_divisors: {type(model).__name__} has no Unitization2d layer with norm_scope='image'"
        )
    size = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
        raise ConfigError(
            f"set_norm_divisors: image_size must be a side, or (height, width), >= 1 px; got {image_size!r}"
        )
    try:
        divisors = _dry_run(model, layers, (1, channels, *size))
    except RuntimeError as error:
        raise ConfigError(
            f"set_norm_divisors: {type(model).__name__} does not run on an image of {channels} channels and {size[0]} x {size[1]} px "
            f"(channels=N names another number): {error}"
        ) from error
    for name, divisor in divisors.items():
        if not (only_missing and layers[name].knows_norm_divisor()):
            layers[name].set_norm_divisor(divisor)
    return divisors


def missing_norm_divisors(model: nn.Module) -> list[str]:
    """Qualified names of the Unitization2d layers whose n is not yet known."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, Unitization2d) and not module.knows_norm_divisor()
    ]


def _dry_run(model: nn.Module, layers: dict[str, Unitization2d], shape: tuple[int, ...]) -> dict[str, int]:
    divisors: dict[str, int] = {}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pixels = inputs[0].shape[2] * inputs[0].shape[3]
        if divisors.setdefault(name, pixels) != pixels:
            raise ConfigError(f"set_norm_divisors: layer {name} is used at {divisors[name]} and at {pixels} pixels")

    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    dtype = next((tensor.dtype for tensor in meta.values() if tensor.is_floating_point()), torch.float32)
    unitizations = [module for module in model.modules() if isinstance(module, _Unitization)]
    known = [module._norm_divisor_is_known for module in unitizations]
    modes = [(module, module.training) for module in model.modules()]
    hooks = [module.register_forward_pre_hook(partial(record, name)) for name, module in layers.items()]
    try:
        model.eval()
        for unitization in unitizations:
            unitization._norm_divisor_is_known = True  # or evaluation would refuse
        with torch.no_grad():
            functional_call(model, meta, (torch.empty(shape, device="meta", dtype=dtype),))
    finally:
        for hook in hooks:
            hook.remove()
        for unitization, is_known in zip(unitizations, known, strict=True):
            unitization._norm_divisor_is_known = is_known
        for module, training in modes:
            module.training = training
    return divisors
