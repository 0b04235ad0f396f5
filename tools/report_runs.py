"""One run folder as values, and what several runs have in common. What a folder lacks is None or empty, never a number."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from unitdist.config import Config
from unitdist.config_file import config_to_dict, load_config
from unitdist.errors import ConfigError
from unitdist.train.schedule import peak_learning_rate
from unitdist.wording import counted

Event = dict[str, Any]
LAYER_KEY = re.compile(r"analysis/(?P<layer>.+)/(?P<quantity>[^/]+)")
SECTIONS = ("model", "data", "optim", "schedule", "train")
HOW_NOT_WHAT = frozenset(
    (
        *("model.fold_residual", "model.overlap_sync", "model.compile_norm"),
        *("data.path", "data.train_split", "data.val_split", "data.source", "data.loader", "data.val_batch_size"),
        *("data.num_threads", "data.prefetch_batches", "data.shuffle_window", "data.roi_decode", "data.gpu_decode"),
        *(
            "data.hw_decoder_load",
            "data.set_affinity",
            "data.on_broken",
            "data.max_broken_share",
            "data.accept_other_decoder",
        ),
        *("data.max_image_megapixels", "data.synthetic_samples", "data.synthetic_classes"),
        *("train.engine", "train.zero_stage", "train.channels_last", "train.compile", "train.log_every_steps"),
        *("train.timeout_s", "optim.reference_batch_size"),
    )
)
"""Keys of these sections that change how fast or from where the same thing is computed, not what is."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """`name`: the folder's. `config`: None where config.yaml is missing or cannot be read (`config_error`).

    `steps`, `epochs`: the two kinds of events of metrics.jsonl, in order. `status`: status.json or {}. `starts`: the lines
    of environment.jsonl, one for each start of the run. `evaluations`: file -> report.json of the evaluation module.
    """

    name: str
    folder: Path
    config: Config | None
    config_error: str
    steps: list[Event]
    epochs: list[Event]
    status: Event
    starts: list[Event]
    commit: str | None
    evaluations: dict[str, Event] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted key -> value of the config; empty without one."""
        if self.config is None:
            return {}
        return {
            f"{section}.{key}": value
            for section, values in config_to_dict(self.config).items()
            for key, value in values.items()
        }

    @property
    def last_step(self) -> int | None:
        return max((event["step"] for event in (*self.steps, *self.epochs)), default=None)

    @property
    def is_finished(self) -> bool:
        """Whether the last epoch, or train.max_steps, was reached."""
        if self.config is None:
            return bool(self.status.get("state") == "finished")
        limit = self.config.train.max_steps
        by_steps = limit is not None and (self.last_step or 0) >= limit
        return by_steps or bool(self.epochs and self.epochs[-1]["epoch"] >= self.config.train.epochs)

    def best(self, key: str) -> Event | None:
        """The epoch record with the highest `key`, None where no epoch has it."""
        return max((event for event in self.epochs if key in event), key=lambda event: event[key], default=None)

    def last(self, key: str) -> Any:
        """The last recorded value of `key` in the epoch records, or None."""
        return next((event[key] for event in reversed(self.epochs) if event.get(key) is not None), None)

    def usual(self, key: str) -> float | None:
        """The median of `key` over the finished epochs, over the log lines where there is none."""
        values = [event[key] for event in self.epochs or self.steps if key in event]
        return median(values) if values else None

    def layers(self) -> list[str]:
        """Layers that the monitor measured, in the order of the network."""
        for event in reversed(self.epochs):
            names = [match["layer"] for key in event if (match := LAYER_KEY.fullmatch(key))]
            if names:
                return list(dict.fromkeys(names))
        return []

    def layer_series(self, layer: str, quantity: str) -> list[tuple[float, float]]:
        """(epoch, value) of one quantity of one layer, where it was defined."""
        key = f"analysis/{layer}/{quantity}"
        return [(event["epoch"], event[key]) for event in self.epochs if event.get(key) is not None]


def essence(config: Config) -> dict[str, Any]:
    """Dotted key -> value of what decides the result: no place, no seed, nothing about speed, logs or evaluation.

    optim.lr is the rate at the config's own batch.
    """
    sections = config_to_dict(config)
    flat = {f"{section}.{key}": value for section in SECTIONS for key, value in sections[section].items()}
    flat["optim.lr"] = peak_learning_rate(config.optim, global_batch_size=config.data.global_batch_size)
    return {key: value for key, value in flat.items() if key not in HOW_NOT_WHAT}


def read_run(folder: Path, *, name: str | None = None) -> RunRecord:
    """Raises ConfigError where there is no such folder, or nothing of a run in it."""
    if not folder.is_dir():
        raise ConfigError(f"no such run folder: {folder}")
    if not any((folder / file).exists() for file in ("metrics.jsonl", "config.yaml")):
        raise ConfigError(
            f"{folder} holds no run (neither metrics.jsonl nor config.yaml); runs are the folders RUN.FOLDER/RUN.NAME"
        )
    config, error = None, ""
    try:
        config = load_config(folder / "config.yaml") if (folder / "config.yaml").exists() else None
    except ConfigError as problem:
        error = str(problem)
    events = read_lines(folder / "metrics.jsonl")
    starts = read_lines(folder / "environment.jsonl")
    commit_file = folder / "commit.txt"
    recorded = [start["commit"] for start in starts if start.get("commit")]
    if commit_file.exists():
        recorded.append(commit_file.read_text(errors="replace").strip())
    return RunRecord(
        name=name or folder.resolve().name,
        folder=folder,
        config=config,
        config_error=error,
        steps=[event for event in events if event.get("event") == "train" and "step" in event],
        epochs=[event for event in events if event.get("event") == "epoch" and {"epoch", "step"} <= event.keys()],
        status=next(iter(read_lines(folder / "status.json")), {}),
        starts=starts,
        commit=", ".join(dict.fromkeys(recorded)) or None,
        evaluations=find_evaluations(folder),
    )


def read_lines(path: Path) -> list[Event]:
    """The JSON objects of a file with one a line, up to a line that a kill has torn; none where there is no file."""
    events: list[Event] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            break
        if isinstance(event, dict):
            events.append(event)
    return events


def find_evaluations(folder: Path) -> dict[str, Event]:
    """Path within the folder -> content, of every report.json of the evaluation module below it."""
    return {str(path.relative_to(folder)): read_evaluation(path) for path in sorted(folder.rglob("report.json"))}


def read_evaluation(path: Path) -> Event:
    """Raises ConfigError when it is not a report of the evaluation module."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(report, dict) or not isinstance(report.get("protocols"), dict):
        raise ConfigError(f"{path} is no report.json of evaluation/multi_scale.py")
    return report


def read_runs(folders: Sequence[Path], evaluations: Sequence[Path]) -> list[RunRecord]:
    """The runs with names that differ. `evaluations`: reports that lie elsewhere, in the order of the runs."""
    if len(evaluations) > len(folders):
        raise ConfigError(
            f"--evaluation: {counted(len(evaluations), 'file')} for {counted(len(folders), 'run')}; give one per run, in their order"
        )
    names = unique_names(folders)
    runs = [read_run(folder, name=name) for folder, name in zip(folders, names, strict=True)]
    for run, path in zip(runs, evaluations, strict=False):
        run.evaluations[str(path)] = read_evaluation(path)
    return runs


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; with their parents' where two are alike. Raises ConfigError for a folder given twice."""
    paths = [folder.resolve() for folder in folders]
    twice = [str(path) for path in paths if paths.count(path) > 1]
    if twice:
        raise ConfigError(f"the run {twice[0]} is given twice")
    depth = 1
    while len({"/".join(path.parts[-depth:]) for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def differences(runs: Iterable[RunRecord]) -> dict[str, list[Any]]:
    """Key -> every run's value, of the keys that are not the same in all runs; place and name left out, seed not."""
    settings = [run.settings for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    hidden = {"run.folder", "run.name", "data.path"}
    rows = {key: [one.get(key) for one in settings] for key in keys if key not in hidden}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def by_recipe(runs: Iterable[RunRecord]) -> list[list[RunRecord]]:
    """Runs of one recipe (see `essence`) together, in order of appearance; a run without a config stands alone."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        key = json.dumps(essence(run.config), sort_keys=True) if run.config else f"alone: {run.name}"
        groups.setdefault(key, []).append(run)
    return list(groups.values())
