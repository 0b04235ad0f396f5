"""Whole training steps of one network under several norms, on synthetic images that lie on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measurement import ratio, summary, time_interleaved
from norm_candidates import ERROR_LIMIT, worst_error
from torch import Tensor, nn

from unitdist import Unitization2d
from unitdist.config import ModelConfig
from unitdist.functional import unitization_images
from unitdist.models.build import build_model

# Microseconds per image of ResNet-101 at 224, bf16, on one H200, at 788 TFLOP/s and 4.3 TB/s: convolutions, norm + ReLU in
# 8 passes, separate additions, pooling and optimizer. A calculation (docs/performance.md), the floor of the fused net.
FLOOR_US = 149.0
NORMS = ("unitization", "unitization_folded", "unitization_compiled", "batchnorm", "naive", "timm")


class Settings(NamedTuple):
    """What to time."""

    device: torch.device
    model: str
    image_px: int
    dtype: torch.dtype
    modes: tuple[str, ...]
    steps: int
    rounds: int


class _Naive(nn.Module):
    """The literal Algorithm 2 in primitive operations, differentiated by autograd."""

    def __init__(self, layer: Unitization2d) -> None:
        super().__init__()
        self.weight, self.bias, self.alpha = layer.weight, layer.bias, layer.alpha
        self.norm_divisor = int(layer.norm_divisor)

    def forward(self, x: Tensor) -> Tensor:
        """As Unitization2d with a ReLU, in training."""
        parameters = self.weight, self.bias, self.alpha
        return F.relu(unitization_images(x, *(p.to(x.dtype) for p in parameters), norm_divisor=self.norm_divisor))


def build_network(norm: str, settings: Settings) -> nn.Module:
    """The network with that norm, weights from seed 0, channels_last, in training mode."""
    torch.manual_seed(0)
    if norm == "timm":
        import timm

        net = timm.create_model("resnetv2_101", num_classes=1000)
    else:
        kind = "batchnorm" if norm == "batchnorm" else "unitization"
        config = ModelConfig(
            name=settings.model,
            norm=kind,
            fold_residual=norm == "unitization_folded",
            compile_norm=norm == "unitization_compiled",
        )
        net = build_model(config, image_size_px=settings.image_px, sync=False)
    if norm == "naive":
        for module in list(net.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Unitization2d):
                    setattr(module, name, _Naive(child))
    return net.to(settings.device, memory_format=torch.channels_last).train()


def check(settings: Settings) -> float:
    """Refuse wrong networks: one layer against float64, and at alpha = 0 the whole net against batch normalization."""
    x = (
        torch.randn(8, 64, 28, 28, device=settings.device)
        .to(settings.dtype)
        .contiguous(memory_format=torch.channels_last)
    )
    error = worst_error(x, torch.randn_like(x), "unitization")
    if error > ERROR_LIMIT[settings.dtype]:
        raise SystemExit(f"Unitization's relative error is {error:.1e}: no speed is reported")
    images = torch.randn(4, 3, settings.image_px, settings.image_px, device=settings.device)
    names = ("unitization", "unitization_folded", "batchnorm")
    # TF32 would round the convolutions' inputs so coarsely that rounding in the norms shows as a difference of the nets.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        outputs = [build_network(name, settings)(images) for name in names]
    for name, output in zip(names, outputs, strict=True):
        distance = ((output - outputs[-1]).abs().max() / outputs[-1].abs().max()).item()
        if distance > 1e-2:
            raise SystemExit(f"at alpha = 0 {name} differs from batchnorm by {distance:.1e}: no speed is reported")
    return error


def make_step(norm: str, mode: str, batch: int, settings: Settings) -> Callable[[], object]:
    """One optimizer step on a fixed batch. mode: eager | compiled | graph (a CUDA graph of the whole step)."""
    net = build_network(norm, settings)
    with torch.no_grad():
        for module in net.modules():
            if hasattr(module, "alpha"):
                nn.init.constant_(module.alpha, 0.1)
    cuda = settings.device.type == "cuda"
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=cuda)
    images = torch.randn(batch, 3, settings.image_px, settings.image_px, device=settings.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=settings.device)
    forward = torch.compile(net) if mode == "compiled" else net

    def step() -> Tensor:
        with torch.autocast(settings.device.type, settings.dtype, enabled=settings.dtype != torch.float32):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    def step_and_clear() -> None:
        step()
        optimizer.zero_grad(set_to_none=True)

    return _captured(step, step_and_clear) if mode == "graph" else step_and_clear


def _captured(step: Callable[[], object], step_and_clear: Callable[[], None]) -> Callable[[], object]:
    """A CUDA graph of the step. Captured without gradients, the backward pass writes them anew at every replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step_and_clear()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def run_batch(norms: list[str], batch: int, settings: Settings, say: Any = print) -> list[dict[str, Any]]:
    """Images/s, peak memory and share of the floor of every norm and mode at one batch size; ratios to batchnorm."""
    rows = []
    for mode in settings.modes:
        steps, peaks = {}, {}
        for norm in norms:
            if settings.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(settings.device)
                before = torch.cuda.memory_allocated(settings.device)
            steps[norm] = make_step(norm, mode, batch, settings)
            steps[norm]()
            if settings.device.type == "cuda":
                torch.cuda.synchronize(settings.device)
                peaks[norm] = (torch.cuda.max_memory_allocated(settings.device) - before) / 2**30
        times = time_interleaved(steps, settings.rounds, settings.device, settings.steps)
        for norm in norms:
            seen = summary(times[norm])
            speed = ratio(times, "batchnorm", norm) if "batchnorm" in times else None
            row = {
                "norm": norm,
                "mode": mode,
                "batch": batch,
                "ms": seen,
                "images_per_s": batch / seen["median"] * 1e3,
                "speed_against_batchnorm": speed,
                "peak_gib": peaks.get(norm),
                "share_of_floor": FLOOR_US * batch / 1e3 / seen["median"] if settings.device.type == "cuda" else None,
            }
            rows.append(row)
            say(_line(row))
        del steps
    return rows


def _line(row: dict[str, Any]) -> str:
    text = f"batch {row['batch']:3} {row['mode']:>8} {row['norm']:>20}: {row['images_per_s']:8.1f} images/s"
    if row["speed_against_batchnorm"]:
        seen = row["speed_against_batchnorm"]
        text += f"  {seen['median']:.2f} x batchnorm ({seen['low']:.2f} to {seen['high']:.2f})"
    if row["peak_gib"] is not None:
        text += f"  peak {row['peak_gib']:.1f} GiB  {row['share_of_floor']:.2f} of the floor"
    return text
