"""All layers in one small picture: a row per layer with its name, a panel per quantity.

Each panel shows, from left to right, the sorted values of one quantity over the layer's units or samples
(its quantiles), as a grey level between fixed ends, so that pictures of different epochs compare. The ends stand
above the panel. Layers that lack the quantity are hatched.
"""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PANELS: dict[str, tuple[float, float]] = {
    "alpha": (-0.5, 1.5),
    "p": (0.0, 2.0),
    "skewness": (-3.0, 3.0),
    "kurtosis": (1.0, 9.0),
}
"""Quantity -> the values drawn black and white."""

CELL_HW = (12, 6)
"""Pixels of one value; a row is as high as a line of text."""
PANEL_CELLS = 24
GAP_PX = 8
TITLE_PX = 16
FONT_PX = 10


def draw_layers(rows: Mapping[str, dict[str, Tensor]]) -> Tensor:
    """Layer name -> quantity -> 1-D values; one row per layer, top to bottom -> uint8 picture (3, H, W)."""
    font = ImageFont.load_default(FONT_PX)
    names_px = GAP_PX + max((int(font.getlength(name)) for name in rows), default=0)
    panel_px = PANEL_CELLS * CELL_HW[1]
    size = (names_px + len(PANELS) * (panel_px + GAP_PX), TITLE_PX + len(rows) * CELL_HW[0])
    picture = Image.new("L", size, 255)
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(rows):
        draw.text((GAP_PX // 2, TITLE_PX + row * CELL_HW[0]), name, fill=0, font=font)
    for place, (quantity, (low, high)) in enumerate(PANELS.items()):
        left = names_px + place * (panel_px + GAP_PX)
        draw.text((left, 2), f"{quantity}: {low:g} black, {high:g} white", fill=0, font=font)
        for row, values in enumerate(rows.values()):
            cells = _grey_row(values.get(quantity), low, high).numpy()
            block = Image.fromarray(np.kron(cells[None], np.ones(CELL_HW, dtype=np.uint8)))
            picture.paste(block, (left, TITLE_PX + row * CELL_HW[0]))
    return torch.from_numpy(np.array(picture)).expand(3, -1, -1).contiguous()


def _grey_row(values: Tensor | None, low: float, high: float) -> Tensor:
    finite = values[torch.isfinite(values)] if values is not None else torch.empty(0)
    if finite.numel() == 0:
        return (torch.arange(PANEL_CELLS) % 2 * 255).to(torch.uint8)
    ordered = finite.double().sort().values
    position = torch.linspace(0, ordered.numel() - 1, PANEL_CELLS).round().long()
    return ((ordered[position] - low) / (high - low) * 255).clamp(0, 255).round().to(torch.uint8)
