"""All layers in one small picture, without matplotlib: a row per layer, a panel per quantity.

Each panel shows, from left to right, the sorted values of one quantity over the layer's units or samples
(its quantiles), as a grey level between fixed ends, so that pictures of different epochs compare. Layers
that lack the quantity are hatched.
"""

import torch
from torch import Tensor

PANELS: dict[str, tuple[float, float]] = {
    "alpha": (-0.5, 1.5),
    "p": (0.0, 2.0),
    "skewness": (-3.0, 3.0),
    "kurtosis": (1.0, 9.0),
}
"""Quantity -> the values drawn black and white."""

CELL_PX = 6
PANEL_CELLS = 24
GAP_PX = 8


def draw_layers(rows: list[dict[str, Tensor]]) -> Tensor:
    """One dict (quantity -> 1-D values) per layer, top to bottom -> uint8 picture (3, H, W)."""
    panels = []
    for quantity, (low, high) in PANELS.items():
        panel = torch.stack([_grey_row(row.get(quantity), low, high) for row in rows])
        panel = panel.repeat_interleave(CELL_PX, 0).repeat_interleave(CELL_PX, 1)
        panels += [panel, torch.full((panel.shape[0], GAP_PX), 255, dtype=torch.uint8)]
    return torch.cat(panels[:-1], dim=1).expand(3, -1, -1).contiguous()


def _grey_row(values: Tensor | None, low: float, high: float) -> Tensor:
    finite = values[torch.isfinite(values)] if values is not None else torch.empty(0)
    if finite.numel() == 0:
        return (torch.arange(PANEL_CELLS) % 2 * 255).to(torch.uint8)
    ordered = finite.double().sort().values
    position = torch.linspace(0, ordered.numel() - 1, PANEL_CELLS).round().long()
    return ((ordered[position] - low) / (high - low) * 255).clamp(0, 255).round().to(torch.uint8)
