"""Times norm + ReLU over ResNet-101's shapes; refuses a speed-up of anything that is not right in the same run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from measurement import ratio, summary, time_interleaved, weighted_total
from norm_candidates import ERROR_LIMIT, RESNET101_SHAPES, Candidate, make_candidate, worst_error
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

PASSES = {"forward": 3, "backward": 5, "both": 8}
ROTATED_BYTES = 256 * 2**20  # more than four times the L2 cache of an H200, so that every pass comes from memory


class Settings(NamedTuple):
    """What to time."""

    device: torch.device
    dtype: torch.dtype
    samples: int
    rounds: int
    candidates: Sequence[str]
    memory_format: torch.memory_format
    parts: Sequence[str]
    graph: bool
    shapes: Sequence[tuple[int, int, int]] = RESNET101_SHAPES


def run_benchmark(settings: Settings, say: Any = print) -> dict[str, Any]:
    """Rows per shape, totals weighted by ResNet-101's layers, and the worst error of each Unitization.

    Raises SystemExit when a Unitization's error exceeds `ERROR_LIMIT`: no number is reported then.
    """
    rows, collected = [], {part: [] for part in settings.parts}
    for channels, side, layers in settings.shapes:
        row = _one_shape(settings, channels, side)
        for part in settings.parts:
            collected[part].append((layers, row["times"][part]))
        rows.append({"channels": channels, "side": side, "layers": layers, **_summarize(row, settings)})
        say(_line(rows[-1], settings))
    totals = {part: weighted_total(collected[part]) for part in settings.parts}
    result = {
        "samples": settings.samples,
        "dtype": str(settings.dtype),
        "memory_format": str(settings.memory_format),
        "graph": settings.graph,
        "rows": rows,
        "weighted_ms": {part: {n: summary(v) for n, v in totals[part].items()} for part in settings.parts},
        "ratio_to_batchnorm": {
            part: {name: ratio(totals[part], name, "batchnorm") for name in settings.candidates}
            for part in settings.parts
        },
    }
    for part, ratios in result["ratio_to_batchnorm"].items():
        for name, value in ratios.items():
            spread = f"{value['low']:.2f} to {value['high']:.2f}"
            say(f"{part:>8} {name:>22}: {value['median']:.2f} x batchnorm + ReLU ({spread}), weighted by layers")
    return result


def _one_shape(settings: Settings, channels: int, side: int) -> dict[str, Any]:
    shape = (settings.samples, channels, side, side)
    generator = torch.Generator(device=settings.device).manual_seed(0)

    def image() -> Tensor:
        tensor = torch.randn(shape, generator=generator, device=settings.device).to(settings.dtype)
        return tensor.contiguous(memory_format=settings.memory_format)

    size = settings.samples * channels * side * side * settings.dtype.itemsize
    copies = max(1, min(8, ROTATED_BYTES // size)) if settings.device.type == "cuda" else 1
    pairs = [(image().requires_grad_(), image()) for _ in range(copies)]
    errors = {}
    for name in settings.candidates:
        if name.startswith("unitization"):
            errors[name] = worst_error(*pairs[0], name)
            if errors[name] > ERROR_LIMIT[settings.dtype]:
                raise SystemExit(
                    f"{name} {shape} {settings.dtype}: relative error {errors[name]:.1e}, no time is reported"
                )
    made = {name: make_candidate(name, channels, side, settings.device) for name in settings.candidates}
    times = {part: _time(settings, part, made, pairs) for part in settings.parts}
    launches = {name: _launches(settings, candidate, pairs) for name, candidate in made.items()}
    return {
        "errors": errors,
        "times": times,
        "copy": _copy_time(settings, pairs),
        "bytes": size,
        "launches": launches,
    }


def _launches(settings: Settings, candidate: Candidate, pairs: Any) -> int | None:
    """Kernels launched by one forward and backward pass; None on the CPU."""
    if settings.device.type != "cuda":
        return None
    step = _step(candidate, "both", pairs[:1])
    step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if "LaunchKernel" in event.key)


def _time(settings: Settings, part: str, made: dict[str, Candidate], pairs: Any) -> dict[str, list[float]]:
    if settings.graph and part == "backward":
        # Autograd runs a backward pass on its forward's stream, which a capture may not touch: take the difference.
        both, forward = (_time(settings, other, made, pairs) for other in ("both", "forward"))
        return {name: [b - f for b, f in zip(both[name], forward[name], strict=True)] for name in made}
    steps = {name: _step(candidate, part, pairs) for name, candidate in made.items()}
    if settings.graph:
        steps = {name: _captured(step) for name, step in steps.items()}
    inner = 8 if settings.device.type == "cuda" else 1
    return time_interleaved(steps, settings.rounds, settings.device, inner)


def _step(candidate: Candidate, part: str, pairs: Any) -> Any:
    """One call does the part for every pair of tensors in rotation (on the CPU there is one)."""
    function, parameters = candidate
    if part == "forward":
        return lambda: [function(x) for x, _ in pairs]
    if part == "both":
        return lambda: [torch.autograd.grad(function(x), [x, *parameters], g) for x, g in pairs]
    outputs = [(function(x), x, g) for x, g in pairs]
    return lambda: [torch.autograd.grad(y, [x, *parameters], g, retain_graph=True) for y, x, g in outputs]


def _captured(step: Any) -> Any:
    """The step as a CUDA graph, without the cost of launching its kernels one by one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _copy_time(settings: Settings, pairs: Any) -> list[float]:
    """Of one read and one write of x: the bandwidth that the kernels are compared with."""
    target = [torch.empty_like(x) for x, _ in pairs]

    def step() -> None:
        with torch.no_grad():
            for (x, _), y in zip(pairs, target, strict=True):
                y.copy_(x)

    inner = 8 if settings.device.type == "cuda" else 1
    times = time_interleaved({"copy": step}, settings.rounds, settings.device, inner)["copy"]
    return [time / len(pairs) for time in times]


def _summarize(row: dict[str, Any], settings: Settings) -> dict[str, Any]:
    copies = max(1, min(8, ROTATED_BYTES // row["bytes"])) if settings.device.type == "cuda" else 1
    copy_ms = summary(row["copy"])["median"]
    parts = {}
    for part, times in row["times"].items():
        parts[part] = {}
        for name, values in times.items():
            seen = summary([value / copies for value in values])
            floor = PASSES[part] / 2 * copy_ms  # a copy is two passes
            parts[part][name] = {**seen, "share_of_copy_bandwidth": floor / seen["median"]}
    return {
        "launches": row["launches"],
        "errors": row["errors"],
        "copy_ms": copy_ms,
        "copy_gb_per_s": 2 * row["bytes"] / copy_ms / 1e6,
        "ms": parts,
    }


def _line(row: dict[str, Any], settings: Settings) -> str:
    part = settings.parts[-1]
    cells = [f"{name} {value['median']:.3f}" for name, value in row["ms"][part].items()]
    shares = [f"{p} {row['ms'][p]['unitization']['share_of_copy_bandwidth']:.2f}" for p in settings.parts]
    error = max(row["errors"].values(), default=0.0)
    head = f"C {row['channels']:4} HW {row['side']:2} x{row['layers']:<2}"
    launches = [f"{name} {count}" for name, count in row["launches"].items() if count is not None]
    head += f" launches: {', '.join(launches)}" if launches else ""
    return f"{head} {part} ms: {', '.join(cells)} | of copy bandwidth at 3/5/8 passes: {', '.join(shares)} | error {error:.0e}"
