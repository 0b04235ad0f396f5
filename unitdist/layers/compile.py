"""Switching a network's Unitization layers to Inductor's compiled pieces (`model.compile_norm`)."""

from torch import nn

from unitdist.errors import ConfigError
from unitdist.layers.unitization import _Unitization


def compile_norms(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Let every Unitization layer run as compiled pieces (or, with `enabled=False`, no longer); returns the model.

    On the CPU the first step at each shape compiles four pieces, seconds each, and needs a C++ compiler. On CUDA the
    hand-written kernels are the default; this replaces them by Inductor's. Raises ConfigError without such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, _Unitization)]
    if not layers:
        raise ConfigError(f"compile_norms: {type(model).__name__} has no Unitization layer")
    for layer in layers:
        layer.compiled = enabled
    return model
