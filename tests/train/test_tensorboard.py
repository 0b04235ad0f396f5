"""unitdist.train.tensorboard and wandb_run: what is written is read back; W&B only where asked for."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from unitdist.config import Config, OptimConfig, RunConfig
from unitdist.errors import ConfigError
from unitdist.train.tensorboard import HPARAMS_METRICS, Board, hyperparameters
from unitdist.train.wandb_run import ID_FILE, WandbRun, open_wandb, require_wandb

CONFIG = Config(run=RunConfig(name="a", seed=3), optim=OptimConfig(lr=0.02))


def plugin_data(folder: Path) -> dict[str, plugin_data_pb2.HParamsPluginData]:
    """Tag -> content of the HParams plugin in the folder's own event files."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    contents = accumulator.summary_metadata
    return {
        tag: plugin_data_pb2.HParamsPluginData.FromString(contents[tag].plugin_data.content)
        for tag in contents
        if contents[tag].plugin_data.plugin_name == metadata.PLUGIN_NAME
    }


def test_hparams_and_final_metrics_are_in_the_runs_own_folder(tmp_path: Path) -> None:
    board = Board(tmp_path, CONFIG, resumed_step=0, tell=print)
    for step, top1 in ((10, 50.0), (20, 75.5)):
        board.scalars("val", {"top1": top1, "top5": 99.0, "loss": 0.5}, step)
    board.finish()
    board.close()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # add_hparams would make one for each call
    data = plugin_data(tmp_path)
    shown = data[metadata.SESSION_START_INFO_TAG].session_start_info.hparams
    assert shown["optim.lr"].number_value == 0.02 and shown["run.seed"].number_value == 3
    assert shown["model.norm"].string_value == "unitization" and shown["optim.nesterov"].string_value == "true"
    assert "data.path" not in shown and "run.folder" not in shown
    metrics = [info.name.tag for info in data[metadata.EXPERIMENT_TAG].experiment.metric_infos]
    assert metrics == list(HPARAMS_METRICS)
    assert data[metadata.SESSION_END_INFO_TAG].session_end_info.status == api_pb2.Status.Value("STATUS_SUCCESS")
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert accumulator.Scalars("val/top1")[-1].value == 75.5  # what the tab shows beside the hyperparameters


def test_a_run_that_did_not_end_is_no_success(tmp_path: Path) -> None:
    Board(tmp_path, CONFIG, resumed_step=0, tell=print).close()
    data = plugin_data(tmp_path)
    assert metadata.SESSION_START_INFO_TAG in data and metadata.SESSION_END_INFO_TAG not in data


def test_every_key_that_is_set_is_shown() -> None:
    shown = hyperparameters(CONFIG)
    assert shown["schedule.milestones_epochs"] == "[31, 61, 91]"
    assert "train.ema_decay" not in shown  # unset


class StubRun:
    """Stands for what wandb.init gives."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.exit_code: int | None = None
        self.step_metrics: list[tuple[str, str]] = []

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.step_metrics.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self, *, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], StubRun]]:
    """A module named wandb; the list holds the arguments of every init and its run."""
    started: list[tuple[dict[str, Any], StubRun]] = []
    module = ModuleType("wandb")

    def init(**arguments: Any) -> StubRun:
        started.append((arguments, StubRun()))
        return started[-1][1]

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return started


def test_wandb_asked_for_and_not_installed_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run\.wandb: the package wandb is not installed: pip install wandb"):
        require_wandb()


def test_wandb_gets_scalars_and_config_only_when_asked(
    tmp_path: Path, stub: list[tuple[dict[str, Any], StubRun]]
) -> None:
    assert open_wandb(tmp_path, CONFIG) is None and stub == []
    asked = Config(run=RunConfig(name="a", wandb=True, wandb_project="p"))
    board = Board(tmp_path / "tensorboard", asked, resumed_step=0, tell=print, wandb=open_wandb(tmp_path, asked))
    board.scalars("val", {"top1": 75.5, "note": "text"}, 20)
    board.finish()
    board.close()
    arguments, run = stub[0]
    assert (arguments["project"], arguments["name"], arguments["dir"]) == ("p", "a", str(tmp_path))
    assert arguments["config"]["optim"]["lr"] == asked.optim.lr
    assert run.logged == [{"val/top1": 75.5, "step": 20}] and run.step_metrics == [("*", "step")] and run.exit_code == 0


def test_a_resumed_run_goes_on_in_the_same_wandb_run(
    tmp_path: Path, stub: list[tuple[dict[str, Any], StubRun]]
) -> None:
    for _ in range(2):
        WandbRun(tmp_path, CONFIG).close(finished=False)
    first, second = (arguments for arguments, _ in stub)
    assert first["id"] == second["id"] == (tmp_path / ID_FILE).read_text().strip() and second["resume"] == "allow"
    assert stub[1][1].exit_code == 1
