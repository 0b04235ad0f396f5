"""The tables of the page. Every text that comes from a run is escaped; what a run lacks reads "not recorded"."""

from collections.abc import Sequence
from html import escape
from typing import Any

from report_charts import run_colour
from report_paper import measured, middle_and_spread, paper_rows
from report_runs import Event, RunRecord, by_recipe, differences

MISSING = '<span class="soft">not recorded</span>'


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = (), wide: Sequence[int] = ()
) -> str:
    """HTML; the cells are HTML already. `numbers`, `wide`: columns of numbers, and of long text."""

    def kind(column: int) -> str:
        if column == 0:
            return ' class="name"'
        return ' class="number"' if column in numbers else ' class="wide"' if column in wide else ""

    titles = "".join(f"<th{kind(i) if i else ''}>{title}</th>" for i, title in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def number(value: float | None, form: str = ".2f") -> str:
    return MISSING if value is None else format(value, form)


def text(value: Any) -> str:
    return MISSING if value is None or value == "" else escape(str(value))


def setting(value: Any) -> str:
    """A value of a config as YAML would show it."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(setting(item) for item in value) + "]"
    if value is None:
        return "null"
    return escape(str(value).lower() if isinstance(value, bool) else str(value))


def legend(runs: Sequence[RunRecord]) -> str:
    entries = (
        f'<span><i class="swatch" style="background:{run_colour(i)}"></i>{escape(run.name)}</span>'
        for i, run in enumerate(runs)
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def state(run: RunRecord) -> str:
    """Finished, or how far it came and what its status says."""
    step = f"step {run.last_step:,}" if run.last_step is not None else "no step recorded"
    if run.is_finished:
        return f"finished, {step}"
    said = run.status.get("state")
    reason = run.status.get("reason")
    words = {None: "unfinished", "running": "unfinished (running, or killed)", "finished": "unfinished"}.get(
        said, str(said)
    )
    return f'<span class="bad">{escape(words)}</span>, {step}' + (f": {escape(str(reason))}" if reason else "")


def final_table(runs: Sequence[RunRecord]) -> str:
    """One row per run: what came out. Averaged weights decide where a run kept them, as they do for best.pt."""
    rows = []
    for i, run in enumerate(runs):
        prefix = "val_ema" if run.last("val_ema_top1") is not None else "val"
        best = run.best(f"{prefix}_top1")
        epochs = None if run.config is None else run.config.train.epochs
        done = run.epochs[-1]["epoch"] if run.epochs else 0
        wait = run.usual("data_wait_share")
        rows.append(
            [
                f'<i class="swatch" style="background:{run_colour(i)}"></i>{escape(run.name)}',
                state(run),
                f"{done} of {MISSING if epochs is None else epochs}",
                text(run.settings.get("run.seed")),
                MISSING
                if best is None
                else f"{best[f'{prefix}_top1']:.2f} <span class='soft'>(epoch {best['epoch']})</span>",
                number(run.last(f"{prefix}_top1")),
                number(run.last(f"{prefix}_top5")),
                number(run.last("train_loss"), ".4f"),
                number(run.usual("images_per_s"), ",.1f"),
                MISSING if wait is None else f"{100 * wait:.1f} %",
            ]
        )
    head = [
        "run",
        "state",
        "epochs",
        "seed",
        "best top-1 %",
        "last top-1 %",
        "last top-5 %",
        "train loss",
        "images/s",
        "data wait",
    ]
    note = (
        '<p class="soft">Single-crop validation in the loop; the best epoch is chosen on the same images, so the last is the fairer '
        "number. Images/s and data wait: medians over the epochs.</p>"
    )
    return table(head, rows, numbers=(2, 3, 4, 5, 6, 7, 8, 9), wide=(1,)) + note


def difference_table(runs: Sequence[RunRecord]) -> str:
    """Only the keys in which the runs differ."""
    unread = [run for run in runs if run.config is None]
    notes = "".join(
        f'<p class="bad">{escape(run.name)}: config.yaml {escape(run.config_error) or "is missing"}; it is left out here.</p>'
        for run in unread
    )
    known = [run for run in runs if run.config is not None]
    if len(known) < 2:
        return notes + '<p class="soft">One run: nothing to compare.</p>'
    rows = [[escape(key).replace(".", ".<wbr>"), *map(setting, values)] for key, values in differences(known).items()]
    if not rows:
        return notes + "<p>The configs are the same, seed included.</p>"
    return notes + table(["key", *(escape(run.name) for run in known)], rows)


def seed_table(runs: Sequence[RunRecord]) -> str:
    """Several runs of one recipe: median and spread of the finished ones; empty where no recipe has several."""
    rows = []
    for group in by_recipe(runs):
        if len(group) < 2:
            continue
        finished = [run for run in group if run.is_finished]
        cells = [
            middle_and_spread([value for run in finished if (value := run.last(key)) is not None])
            for key in ("val_top1", "val_top5", "train_loss")
        ]
        left_out = len(group) - len(finished)
        rows.append(
            [", ".join(escape(run.name) for run in group), *cells, f"{left_out} unfinished" if left_out else ""]
        )
    if not rows:
        return ""
    head = ["runs of one recipe", "last top-1 %: median (range)", "last top-5 %", "train loss", "left out"]
    return "<h3>Seeds of one recipe</h3>" + table(head, rows, numbers=(1, 2, 3, 4))


def paper_table(runs: Sequence[RunRecord]) -> str:
    """Beside the paper, where the recipe is the paper's."""
    rows = []
    for group in by_recipe(runs):
        for row in paper_rows(group[0]):
            values = [value for run in group if (value := measured(run, row.metric)) is not None]
            names = ", ".join(escape(run.name) for run in group)
            ours = middle_and_spread(values) if values else MISSING
            rows.append([names, escape(f"{row.title}; {row.label}"), escape(row.metric), f"{row.paper:.2f}", ours])
    if not rows:
        return '<p class="soft">No run here has a recipe of the paper\'s tables.</p>'
    head = ["runs", "experiment", "metric (%)", "paper", "here: median (range), finished runs"]
    return table(head, rows, numbers=(3,), wide=(1,))


def evaluation_table(runs: Sequence[RunRecord]) -> str:
    """Every protocol and scale of every evaluation report."""
    rows = []
    for run in runs:
        for file, report in run.evaluations.items():
            for protocol, summary in report["protocols"].items():
                scales = summary.get("scales", [])
                names = [f"{scale.get('scale_px')}\N{NO-BREAK SPACE}px" for scale in scales]
                whole = names[0] if len(scales) == 1 else "all\N{NO-BREAK SPACE}scales"
                rows.append(_evaluation_row(run, file, protocol, whole, summary))
                if len(scales) > 1:
                    rows += [
                        _evaluation_row(run, file, protocol, name, scale)
                        for name, scale in zip(names, scales, strict=True)
                    ]
    if not rows:
        return '<p class="soft">No report.json of evaluation/multi_scale.py in the run folders: not recorded.</p>'
    head = ["run", "protocol", "scale", "views", "images", "top-1 % (95 % interval)", "top-5 %", "paper", "file"]
    return table(head, rows, numbers=(3, 4, 5, 6, 7))


def _evaluation_row(run: RunRecord, file: str, protocol: str, scale: str, summary: Event) -> list[str]:
    paper = summary.get("paper")
    return [
        escape(run.name),
        escape(protocol),
        escape(scale),
        text(summary.get("views")),
        text(summary.get("count")),
        _with_interval(summary, "top1"),
        _with_interval(summary, "top5"),
        "" if paper is None else f"{paper['top1']:.2f} / {paper['top5']:.2f}",
        escape(file),
    ]


def _with_interval(summary: Event, key: str) -> str:
    if key not in summary:
        return MISSING
    low, high = summary.get(f"{key}_interval") or (None, None)
    between = "" if low is None else f' <span class="soft">({low:.2f} to {high:.2f})</span>'
    return f"{summary[key]:.2f}{between}"


ENVIRONMENT = ("started", "resumed_step", "world_size", "hardware", "commit", "command")
"""Keys of environment.jsonl in columns of their own; `versions` is one more."""


def environment_table(runs: Sequence[RunRecord]) -> str:
    """Each start of each run: when, from which step, on what, with which versions and commit."""
    rows = []
    for run in runs:
        for start in run.starts or [{}]:
            versions = start.get("versions") or {}
            listed = ", ".join(f"{escape(str(name))} {escape(str(value))}" for name, value in versions.items())
            cells = [text(start.get(key)) for key in ENVIRONMENT]
            cells[4] = text(start.get("commit") or (None if run.starts else run.commit))
            rows.append([escape(run.name), text(run.settings.get("run.seed")), *cells, listed or MISSING])
    head = ["run", "seed", "started (UTC)", "from step", "ranks", "hardware", "commit", "command", "versions"]
    return table(head, rows, numbers=(1, 2, 3, 4), wide=(7, 8))
