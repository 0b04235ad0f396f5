"""Small charts as inline SVG: lines over steps or epochs, and ranges per layer. Colours are the page's CSS variables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 440, 264
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 38
NUM_COLOURS = 8
MOST_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Line:
    """`colour`: a CSS colour. `dashed`: for more lines than there are colours, and for a second quantity."""

    label: str
    points: Points
    colour: str
    dashed: bool = False


def run_colour(index: int) -> str:
    return f"var(--run{index % NUM_COLOURS})"


def depth_colour(place: int, count: int) -> str:
    """From the first layer to the last: light to strong, as a mixture of two of the page's colours."""
    share = 100 if count < 2 else round(100 * place / (count - 1))
    return f"color-mix(in srgb, var(--deep) {share}%, var(--shallow))"


def line_chart(title: str, lines: Sequence[Line], *, x_label: str, logarithmic: bool = False) -> str:
    """Lines over a common axis; a chart without any point says so. `logarithmic`: values <= 0 are left out."""
    kept = [(line, thinned(finite(line.points, positive=logarithmic))) for line in lines]
    kept = [(line, points) for line, points in kept if points]
    if not kept:
        return _empty(title)
    xs = [x for _, points in kept for x, _ in points]
    ys = [y for _, points in kept for _, y in points]
    frame = Frame.around(xs, ys, logarithmic=logarithmic)
    parts = [frame.axes(x_label)]
    for line, points in kept:
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        style = f'style="stroke:{line.colour}"'
        label = f"<title>{escape(line.label)}</title>"
        if len(points) > 1:
            parts.append(f'<polyline class="line" points="{path}" {style}{dash}>{label}</polyline>')
        x, y = points[-1]
        parts.append(
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3" style="fill:{line.colour}">{label}</circle>'
        )
    return _svg(title, parts)


def range_chart(title: str, ranges: Sequence[tuple[str, float, float, float]], *, x_label: str) -> str:
    """For each (name, lowest, middle, highest), in order, a bar with a mark at the middle."""
    shown = [entry for entry in ranges if all(math.isfinite(value) for value in entry[1:])]
    if not shown:
        return _empty(title)
    values = [value for entry in shown for value in entry[1:]]
    frame = Frame.around([0.5, len(shown) + 0.5], [*values, 0.0])
    parts = [frame.axes(x_label)]
    width = max(1.5, min(9.0, 0.6 * (WIDTH - LEFT - RIGHT) / len(shown)))
    for place, (name, low, middle, high) in enumerate(shown):
        x, top, bottom = frame.x(place + 1), frame.y(high), frame.y(low)
        colour = depth_colour(place, len(shown))
        label = f"<title>{escape(name)}: {low:.4g} to {high:.4g}, mean {middle:.4g}</title>"
        parts.append(
            f'<rect x="{x - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{max(bottom - top, 1):.1f}" '
            f'style="fill:{colour}">{label}</rect>'
        )
        y = frame.y(middle)
        parts.append(
            f'<line class="mark" x1="{x - width / 2:.1f}" x2="{x + width / 2:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    return _svg(title, parts)


def finite(points: Points, *, positive: bool = False) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not positive)]


def thinned(points: list[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most about `most` points; of each stretch the lowest and the highest stay, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Short, for an axis: 0.05, 1e-05, 12k."""
    if value and not 1e-3 <= abs(value) < 1e4:
        mantissa, _, power = f"{value:.3g}".partition("e")
        if power:
            return f"{mantissa}e{int(power)}"
        return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:.0e}".replace("e-0", "e-")
    return f"{value:g}"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The mapping of values to the drawing, and its axes."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    logarithmic: bool

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float], *, logarithmic: bool = False) -> "Frame":
        low, high = (math.log10(min(ys)), math.log10(max(ys))) if logarithmic else (min(ys), max(ys))
        room = 0.05 * (high - low) or max(0.05 * abs(high), 1e-3)
        bottom = low if low == 0 else low - room
        x_low, x_high = min(xs), max(xs)
        if x_high == x_low:
            x_low, x_high = x_low - 1, x_high + 1
        return cls(x_low=x_low, x_high=x_high, y_low=bottom, y_high=high + room, logarithmic=logarithmic)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        place = math.log10(value) if self.logarithmic else value
        return HEIGHT - BOTTOM - (place - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_label: str) -> str:
        parts = []
        for value in self._y_ticks():
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
        for value in ticks(self.x_low, self.x_high):
            if value == int(value):  # steps, epochs and layers are counted
                parts.append(
                    f'<text x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number(value)}</text>'
                )
        base = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
        return "".join(parts)

    def _y_ticks(self) -> list[float]:
        if not self.logarithmic:
            return ticks(self.y_low, self.y_high)
        powers = range(math.floor(self.y_low), math.ceil(self.y_high) + 1)
        wanted = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        inside = [value for value in wanted if self.y_low <= math.log10(value) <= self.y_high]
        whole = [value for value in inside if math.log10(value).is_integer()]
        return whole if len(inside) > 9 and len(whole) > 1 else inside or [10**self.y_low, 10**self.y_high]


def _svg(title: str, parts: Sequence[str]) -> str:
    name = escape(title)
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}"><text class="title" x="4" y="16">{name}</text>'
    return head + "".join(parts) + "</svg>"


def _empty(title: str) -> str:
    text = f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">not recorded</text>'
    return _svg(title, [text])
