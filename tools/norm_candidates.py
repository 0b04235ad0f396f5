"""The forms of norm + ReLU that benchmarks compare, and the check that each Unitization is right before it is timed."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitdist import Unitization2d
from unitdist.functional import unitization_images
from unitdist.layers import compile_norms

# (channels, side, layers) of the 100 norm layers of ResNet-101 at 224 pixels, stride in the 3x3 convolutions.
RESNET101_SHAPES = (
    (64, 56, 7), (256, 56, 3), (128, 56, 1), (128, 28, 7), (512, 28, 4), (256, 28, 1),
    (256, 14, 45), (1024, 14, 23), (512, 14, 1), (512, 7, 5), (2048, 7, 3),
)  # fmt: skip

CANDIDATES = ("unitization", "unitization_compiled", "batchnorm", "batchnorm_compiled", "composite", "literal")

Function = Callable[[Tensor], Tensor]
ERROR_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Candidate(NamedTuple):
    """A function of x with the parameters whose gradients are taken too."""

    function: Function
    parameters: list[nn.Parameter]


def make_candidate(name: str, channels: int, side: int, device: torch.device) -> Candidate:
    """unitization | unitization_compiled | batchnorm | batchnorm_compiled | composite | literal, each with a ReLU."""
    if name.startswith("batchnorm"):
        norm = nn.BatchNorm2d(channels, device=device)

        def function(x: Tensor) -> Tensor:
            return F.relu(norm(x))

        return Candidate(torch.compile(function) if name.endswith("compiled") else function, list(norm.parameters()))
    layer = Unitization2d(channels, norm_divisor=side * side, activation="relu", device=device)
    with torch.no_grad():
        nn.init.uniform_(layer.alpha)
    functions: dict[str, Function] = {
        "unitization": layer,
        "composite": lambda x: _composite(layer, x),
        "literal": lambda x: F.relu(_literal(layer, x)),
    }
    if name == "unitization_compiled":
        return Candidate(compile_norms(layer), list(layer.parameters()))
    return Candidate(functions[name], list(layer.parameters()))


def _literal(layer: Unitization2d, x: Tensor) -> Tensor:
    """Algorithm 2 in primitive operations, as one would write it down."""
    parameters = layer.weight, layer.bias, layer.alpha
    return unitization_images(x, *(p.to(x.dtype) for p in parameters), norm_divisor=int(layer.norm_divisor))


def _composite(layer: Unitization2d, x: Tensor) -> Tensor:
    """Algorithm 2 on top of F.batch_norm without affine, as one would write it with some care."""
    normalized = F.batch_norm(x, None, None, training=True, eps=layer.eps)
    squares = normalized.square().mean((2, 3)).sum(1) / layer.norm_divisor
    inverse = torch.rsqrt(squares + layer.eps).view(-1, 1, 1, 1)
    alpha, weight, bias = (p.to(x.dtype).view(1, -1, 1, 1) for p in (layer.alpha, layer.weight, layer.bias))
    return F.relu(weight * (inverse * alpha + 1 - alpha) * normalized + bias)


def worst_error(x: Tensor, grad_y: Tensor, name: str) -> float:
    """Largest relative error of output and gradients of a Unitization against the float64 literal, at most 16 samples.

    The gradient is compared behind the mask that the candidate's own output has: a value that rounds to zero is no error.
    """
    x, grad_y = x[:16].detach().clone(), grad_y[:16].clone()
    candidate = make_candidate(name, x.shape[1], x.shape[2], x.device)
    leaf = x.requires_grad_()
    y = candidate.function(leaf)
    grads = torch.autograd.grad(y, [leaf, *candidate.parameters], grad_y)
    wide = [copy.deepcopy(p).double() for p in candidate.parameters]
    wide_leaf = x.detach().double().requires_grad_()
    literal = unitization_images(wide_leaf, *wide, norm_divisor=x.shape[2] * x.shape[3])
    wanted = torch.autograd.grad(literal, [wide_leaf, *wide], grad_y.double() * (y > 0))
    pairs = [(y, literal.relu()), *zip(grads, wanted, strict=True)]
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
