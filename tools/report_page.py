"""One HTML page for one or many runs. It holds all it needs: no script, no font, no picture and no request from outside."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from report_charts import NUM_COLOURS, Line, depth_colour, line_chart, range_chart, run_colour
from report_runs import Event, RunRecord
from report_tables import (
    difference_table,
    environment_table,
    evaluation_table,
    final_table,
    legend,
    paper_table,
    seed_table,
)

STYLE = Path(__file__).with_name("report_page.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The browser itself refuses whatever the page might ask for from outside."""


def build_page(runs: Sequence[RunRecord], *, now: datetime | None = None) -> str:
    """The whole page. `now`: stands in the head, UTC."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    made = (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC")
    sections = [
        ("Results", final_table(runs) + seed_table(runs)),
        ("Recipe differences", difference_table(runs)),
        ("Beside the paper", paper_table(runs)),
        ("Curves", legend(runs) + curves(runs)),
        ("Throughput and data", legend(runs) + throughput(runs)),
        ("Alpha and shift per layer", layers(runs)),
        ("Evaluation", evaluation_table(runs)),
        ("Environment and seeds", environment_table(runs)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="soft">Written by unitdist\'s tools/report.py, {made}.</p>{body}</body></html>\n'
    )


def curves(runs: Sequence[RunRecord]) -> str:
    charts = [
        _chart("Training loss, log scale", runs, _steps("loss"), "step", logarithmic=True),
        _chart("Training top-1 (%)", runs, _steps("top1"), "step"),
        _chart("Validation top-1 (%)", runs, _epochs("val_top1"), "epoch"),
        _chart("Validation loss, log scale", runs, _epochs("val_loss"), "epoch", logarithmic=True),
        _chart("Learning rate", runs, _steps("lr"), "step"),
    ]
    if any("val_ema_top1" in event for run in runs for event in run.epochs):
        charts.append(_chart("Validation top-1 of averaged weights (%)", runs, _epochs("val_ema_top1"), "epoch"))
    return _grid(charts)


def throughput(runs: Sequence[RunRecord]) -> str:
    charts = [
        _chart("Images per second", runs, _steps("images_per_s"), "step"),
        _chart("Share of time waiting for data (%)", runs, _steps("data_wait_share", 100), "step"),
    ]
    return _grid(charts)


def layers(runs: Sequence[RunRecord]) -> str:
    """Per run: alpha of every layer at the last measure, its mean over the epochs, and every layer's shift."""
    parts = [
        '<p class="soft">Lines and bars go from the first layer <i class="scale"></i> to the last. Shift: sliced EM distance of a layer\'s '
        "outputs to the measure before. Hover a line for its layer.</p>"
    ]
    for i, run in enumerate(runs):
        names = run.layers()
        opened = " open" if i < 4 else ""
        content = (
            _layer_charts(run, names)
            if names
            else '<p class="soft">not recorded (analysis.every_epochs: 0, or no epoch was finished)</p>'
        )
        parts.append(f"<details{opened}><summary>{escape(run.name)}</summary>{content}</details>")
    return "".join(parts)


def _layer_charts(run: RunRecord, names: Sequence[str]) -> str:
    ranges = []
    for name in names:
        low, middle, high = (run.layer_series(name, f"alpha_{which}") for which in ("min", "mean", "max"))
        if low and middle and high:
            ranges.append((name, low[-1][1], middle[-1][1], high[-1][1]))
    charts = []
    if ranges:
        epoch = max(run.layer_series(name, "alpha_mean")[-1][0] for name, *_ in ranges)
        charts.append(range_chart(f"Alpha after epoch {epoch:g}: lowest, mean, highest", ranges, x_label="layer"))
        charts.append(_by_depth("Mean alpha", run, names, "alpha_mean"))
    else:
        charts.append('<p class="soft">No alpha: this network has no unitization layer that was measured.</p>')
    charts.append(_by_depth("Shift", run, names, "shift"))
    return _grid(charts)


def _by_depth(title: str, run: RunRecord, names: Sequence[str], quantity: str) -> str:
    lines = [
        Line(label=name, points=run.layer_series(name, quantity), colour=depth_colour(place, len(names)))
        for place, name in enumerate(names)
    ]
    return line_chart(title, lines, x_label="epoch")


Points = list[tuple[float, float]]


def _steps(key: str, factor: float = 1.0) -> Callable[[RunRecord], Points]:
    return lambda run: _points(run.steps, "step", key, factor)


def _epochs(key: str) -> Callable[[RunRecord], Points]:
    return lambda run: _points(run.epochs, "epoch", key, 1.0)


def _points(events: Sequence[Event], x: str, y: str, factor: float) -> Points:
    return [(event[x], factor * event[y]) for event in events if isinstance(event.get(y), int | float)]


def _chart(
    title: str,
    runs: Sequence[RunRecord],
    read: Callable[[RunRecord], Points],
    x_label: str,
    *,
    logarithmic: bool = False,
) -> str:
    lines = [
        Line(label=run.name, points=read(run), colour=run_colour(i), dashed=i >= NUM_COLOURS)
        for i, run in enumerate(runs)
    ]
    return line_chart(title, lines, x_label=x_label, logarithmic=logarithmic)


def _grid(charts: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>'
