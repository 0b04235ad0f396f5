"""An experiment's results as one JSON file: what was run, where, and the numbers that its table or figure needs."""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from paper_experiments import Arm, Experiment
from paper_run import COMMIT_FILE, config_path, epoch_records, run_folder

from unitdist.config import Config
from unitdist.config_file import config_to_dict, load_config
from unitdist.errors import ConfigError

Results = dict[str, Any]
"""{"experiment", "config", "commit", "torch", "hardware", "runs": {arm: {seed: run}}}; run: see `_run`."""

PER_EPOCH = {
    "accuracy": ("epoch", "lr", "train_loss", "val_top1"),
    "protocols": ("epoch", "lr", "train_loss", "val_top1"),
    "moments": ("epoch", "lr", "train_loss", "val_top1", "unit_mean", "unit_variance", "unit_skewness", "unit_kurtosis",
                "alpha_min", "alpha_mean", "alpha_max", "p_mean", "p_std", "shift"),
    "distance": ("epoch", "lr", "train_loss", "val_top1", "em_distance", "shift"),
}  # fmt: skip
"""Last parts of the record keys that are kept of each epoch, by the experiment's kind."""


def collect(experiment: Experiment, runs: Path, results: Path) -> Path:
    """Write results/<experiment>.json from the run folders; returns its path."""
    found: dict[str, dict[str, Any]] = {}
    for arm in experiment.arms:
        pattern = f"{arm.name}_seed*"
        seeds = sorted(int(path.name.rpartition("seed")[2]) for path in (runs / experiment.name).glob(pattern))
        entries = {str(seed): _run(experiment, arm, run_folder(runs, experiment, arm, seed)) for seed in seeds}
        found[arm.name] = {seed: entry for seed, entry in entries.items() if entry["epochs_done"]}
    content = {
        "experiment": experiment.name,
        "config": f"configs/paper/{experiment.config}",
        "collected": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commits(experiment, runs),
        "torch": torch.__version__,
        "hardware": hardware(),
        "runs": found,
    }
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{experiment.name}.json"
    path.write_text(json.dumps(content, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    return path


def find_results(experiment: Experiment, results: Path) -> Results:
    """What `collect` wrote; no runs where there is no file. Raises ConfigError when the file is damaged."""
    path = results / f"{experiment.name}.json"
    if not path.exists():
        return {"experiment": experiment.name, "runs": {}}
    try:
        content = json.loads(path.read_text())
        content["runs"].items()
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); remove it, or collect it anew with `paper.py run`"
        ) from None
    return content  # type: ignore[no-any-return]


def finished_runs(results: Results, arm: str) -> dict[str, Any]:
    """seed -> run of the arm's finished runs."""
    return {s: run for s, run in results["runs"].get(arm, {}).items() if run["epochs_done"] >= run["epochs"]}


def unfinished_runs(results: Results, arm: str) -> dict[str, Any]:
    """seed -> run of the arm's runs that have not reached their last epoch."""
    return {s: run for s, run in results["runs"].get(arm, {}).items() if run["epochs_done"] < run["epochs"]}


def hardware() -> str:
    """The GPUs, or the CPU, of this machine in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"CPU {model}, {torch.get_num_threads()} threads a run"


def _run(experiment: Experiment, arm: Arm, folder: Path) -> dict[str, Any]:
    """One run folder: {"epochs", "epochs_done", "seconds", "changed", "metrics", "per_epoch": {key: list over epochs}}."""
    records = epoch_records(folder)
    saved = folder / "config.yaml"
    planned = load_config(config_path(experiment), arm.overrides)
    config = load_config(saved) if saved.exists() else planned
    per_epoch: dict[str, list[Any]] = {}
    for record in records:
        for key, value in record.items():
            if key.rpartition("/")[2] in PER_EPOCH[experiment.kind]:
                per_epoch.setdefault(key, []).append(_rounded(value))
    last = records[-1] if records else {}
    return {
        "epochs": config.train.epochs,
        "epochs_done": last.get("epoch", 0),
        "seconds": round(sum(record.get("seconds", 0.0) for record in records)),
        "changed": changed_keys(planned, config),
        "metrics": _protocol_metrics(folder) | {key: last[key] for key in ("val_top1", "val_top5") if key in last},
        "per_epoch": per_epoch,
    }


def changed_keys(planned: Config, config: Config) -> list[str]:
    """What a run has that its experiment has not (--set), as key=value; its own seed, folder and data path do not count."""
    wanted = config_to_dict(planned)
    return [
        f"{section}.{key}={value}"
        for section, fields in config_to_dict(config).items()
        for key, value in fields.items()
        if section != "run" and (section, key) != ("data", "path") and wanted[section][key] != value
    ]


def _protocol_metrics(folder: Path) -> dict[str, float]:
    """ "<protocol> top1" and "<protocol> top5" in percent from the run's evaluation reports, where there are any."""
    metrics = {}
    for path in sorted(folder.rglob("report.json")):
        for protocol, entry in json.loads(path.read_text()).get("protocols", {}).items():
            for key in ("top1", "top5"):
                if key in entry:
                    metrics[f"{protocol} {key}"] = entry[key]
    return metrics


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _commits(experiment: Experiment, runs: Path) -> str:
    """The commits that the runs were started from."""
    files = sorted((runs / experiment.name).glob(f"*/{COMMIT_FILE}"))
    return ", ".join(sorted({file.read_text().strip() for file in files})) or "not recorded"
