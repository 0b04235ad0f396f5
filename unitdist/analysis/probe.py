"""Reading a model from outside: which layers it has, what goes through them, without touching its code."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from unitdist.errors import ConfigError
from unitdist.layers import Unitization1d, Unitization2d

See = Callable[[str, nn.Module, Tensor, Tensor], None]
"""Called with the layer's name, the layer, its input and its output."""


def check_layer_names(model: nn.Module, layer_names: Sequence[str]) -> None:
    """Raise ConfigError for the first name that is no module of `model`, with the nearest names."""
    known = [name for name, _ in model.named_modules() if name]
    for name in layer_names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise ConfigError(
                f"no layer named {name!r} in {type(model).__name__}; the nearest are {', '.join(nearest)}"
            )


def normalization_layers(model: nn.Module) -> list[str]:
    """Names of every Unitization, batch and group normalization layer, in the order of the model's modules."""
    kinds = (Unitization1d, Unitization2d, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@torch.no_grad()
def inverse_norms(layer: nn.Module, x: Tensor) -> Tensor | None:
    """p = 1/sqrt(s + eps) of each sample (or each pixel, Fig. 1b) that enters a Unitization layer; None for others.

    In evaluation mode (running mean and variance), as Alg. 2, lines 2 to 4: s is the sum over channels and
    pixels of xh^2, divided by n M. Returns (N,) or (N * M,), float32 or wider.
    """
    if not isinstance(layer, Unitization1d | Unitization2d):
        return None
    x_ncp = x.flatten(2) if x.dim() > 2 else x[:, :, None]
    normalized_ncp = (x_ncp - layer.running_mean[:, None]) * torch.rsqrt(layer.running_var + layer.eps)[:, None]
    if layer.norm_scope == "pixel":
        squared_norm = (normalized_ncp.square().sum(1) / layer.norm_divisor).flatten()
    else:
        squared_norm = normalized_ncp.square().sum((1, 2)) / (layer.norm_divisor * x_ncp.shape[2])
    return torch.rsqrt(squared_norm + layer.eps)


@contextmanager
def watch_layers(model: nn.Module, layer_names: Sequence[str], see: See) -> Iterator[None]:
    """Inside the block, each forward pass calls see(name, layer, input, output) as each named layer finishes.

    Input and output are detached. A layer that also applies the ReLU after it is seen before the ReLU, so
    that "the layer's normalized output" means one thing in every net. Raises ConfigError on a name the model does
    not have.
    """
    check_layer_names(model, layer_names)
    with ExitStack() as stack:
        for name in layer_names:
            stack.enter_context(_watch_layer(name, model.get_submodule(name), see))
        yield


@contextmanager
def _watch_layer(name: str, layer: nn.Module, see: See) -> Iterator[None]:
    fused = isinstance(layer, Unitization1d | Unitization2d) and layer.activation == "relu"

    def hook(
        module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor | tuple[Tensor, Tensor]
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        # A layer that was given a residual too (model.fold_residual) normalizes the sum and puts out both.
        y, x = output if isinstance(output, tuple) else (output, arguments[0])
        see(name, module, x.detach(), y.detach())
        if not fused:
            return None
        return (y.relu(), x) if isinstance(output, tuple) else y.relu()

    handle = layer.register_forward_hook(hook)
    if fused:
        layer.activation = None  # type: ignore[assignment]
    try:
        yield
    finally:
        handle.remove()
        if fused:
            layer.activation = "relu"  # type: ignore[assignment]


@contextmanager
def capture_outputs(model: nn.Module, layer_names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside the block, each forward pass leaves the named layers' outputs (as `watch_layers` sees them) in the dict."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        outputs[name] = output

    with watch_layers(model, layer_names, keep):
        yield outputs


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block every module is in evaluation mode and runs uncompiled; afterwards each is as it was.

    (A compiled module would be compiled anew with the hooks of the measure in it.)
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
