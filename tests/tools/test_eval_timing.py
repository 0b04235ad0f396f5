"""The evaluation's benchmark on images and crops so small that only its form is tested, not its figures."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from evaluation.options import ViewSettings

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def eval_timing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_timing", TOOLS / "eval_timing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(eval_timing: ModuleType, data: Path) -> dict:
    return eval_timing.measure(
        data, model_name="cifar_resnet20", num_images=3, repeats=1, device="cpu", precision="fp32", loader="torchvision",
        decode_device="cpu", threads=1, views=ViewSettings(scales_px=(32, 40), crop_px=32, single_scale_px=40),
    )  # fmt: skip


def test_figures_and_table_of_both_protocols(eval_timing: ModuleType, sample_data: Path) -> None:
    figures = measure(eval_timing, sample_data)
    assert figures["correct"]
    for entry in figures["protocols"].values():
        assert set(entry["seconds_per_image"]) == {"evaluation", "forward", "decode", "loop"}
        assert entry["largest_difference"] <= 1e-5  # torchvision's decoder is the loop's
        assert entry["speed_up_over_loop"]["median"] > 0
    text = eval_timing.table(figures)
    assert "crops: CPU seconds per image" in text
    assert text.count("obvious loop / evaluation:") == 2


def test_no_speed_up_is_shown_when_the_scores_differ(
    eval_timing: ModuleType, sample_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = eval_timing._obvious_loop

    def wrong(*arguments: object) -> object:
        return original(*arguments)[::-1]

    monkeypatch.setattr(eval_timing, "_obvious_loop", wrong)
    figures = measure(eval_timing, sample_data)
    assert not figures["correct"]
    text = eval_timing.table(figures)
    assert "no speed-up is shown" in text
    assert "obvious loop / evaluation" not in text
