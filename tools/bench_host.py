"""What one norm + ReLU costs the host beside its tensor passes: python tools/bench_host.py [--json FILE].

A hundred layers on a fast GPU wait for the host if calling them takes longer than their passes. Each form of the call is timed
forward and backward on a tiny tensor, the passes replaced by functions that only make the results' tensors: the layer
as it is called eagerly, the same through its operator, and batch normalization + ReLU with its (tiny) passes, for scale. Refuses
to report if function and operator differ in a bit on random data.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from measurement import environment, ratio, summary, time_interleaved, write_json  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from unitdist import Unitization2d  # noqa: E402
from unitdist.functional.unitization import GradientTables  # noqa: E402
from unitdist.kernels import passes  # noqa: E402
from unitdist.layers import unitization as layers  # noqa: E402

SHAPE = (2, 64, 4, 4)
CALLS = 200  # per reading


@contextmanager
def replaced(module: Any, **functions: Any) -> Iterator[None]:
    """Attributes of `module` exchanged for the time of the context."""
    before = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(before)


def empty_passes() -> Any:
    """`passes` without arithmetic: every result has its shape, type and memory, and no meaning."""

    def moments(x: Tensor, residual: Tensor | None, compiled: bool) -> tuple[Tensor, ...]:
        samples, channels = x.shape[:2]
        tables = x.new_empty(samples, channels), x.new_empty(samples, channels)
        return x, *tables, x.new_empty(2 * channels + 1, dtype=torch.float64)

    def normalize(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1]), x.new_empty(x.shape[0])

    def gradients(grad_y: Tensor, x: Tensor, *_: Any) -> tuple[GradientTables, Any]:
        vectors = (x.new_empty(x.shape[1]) for _ in range(3))
        return GradientTables(*vectors, x.new_empty(x.shape[0]), x.new_empty(2 * x.shape[1])), grad_y

    def input_gradient(carry: Any, x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    functions = {
        "moments": moments,
        "normalize": normalize,
        "gradients": gradients,
        "input_gradient": input_gradient,
    }
    return replaced(passes, **functions)


def through_the_operator(**functions: Any) -> Any:
    """The layer does not take its short way."""
    return replaced(layers, runs_eagerly=lambda x: False, **functions)


def check_equal(x: Tensor, grad_y: Tensor) -> None:
    """Raises SystemExit unless the two ways agree in every bit."""
    results = []
    for way in (replaced(layers), through_the_operator()):
        torch.manual_seed(0)
        layer = Unitization2d(SHAPE[1], activation="relu", norm_divisor=16)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        with way:
            y = layer(x)
        results.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], grad_y), *layer.buffers()])
    if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
        raise SystemExit("the layer's function and its operator differ: no time is reported")


def repeated(function: Callable[[Tensor], Tensor], way: Any, x: Tensor, grad_y: Tensor) -> Callable[[], None]:
    """CALLS calls of `function` within the context that `way()` makes."""

    def work() -> None:
        with way():
            for _ in range(CALLS):
                function(x).backward(grad_y)

    return work


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    x, grad_y = (torch.randn(SHAPE).contiguous(memory_format=torch.channels_last) for _ in range(2))
    check_equal(x.requires_grad_(), grad_y)
    layer, norm = Unitization2d(SHAPE[1], activation="relu", norm_divisor=16), nn.BatchNorm2d(SHAPE[1])

    def operator() -> Any:
        # The function moves the running statistics within `normalize`, the operator's caller afterwards.
        return through_the_operator(update_running_statistics=lambda *_: None)

    forms = {
        "batchnorm": (lambda x: torch.relu(norm(x)), nullcontext),
        "function": (layer, nullcontext),
        "operator": (layer, operator),
    }
    with empty_passes():
        steps = {name: repeated(form, way, x, grad_y) for name, (form, way) in forms.items()}
        times = time_interleaved(steps, options.rounds, device)
    for name in times:
        seen = ratio(times, name, "operator")
        print(
            f"{name:>10}: {seen['median']:.2f} x the operator ({seen['low']:.2f} to {seen['high']:.2f}), forward and backward"
        )
    results = {"environment": environment(device), "calls": CALLS, "ms": {n: summary(v) for n, v in times.items()}}
    write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
