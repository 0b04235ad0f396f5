"""tools/loader_measurements.py: what tools/bench_loader.py prints, on a set small enough for a test."""

import importlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("loader_measurements")


def test_report_has_a_figure_for_every_case(
    measurements, sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measurements, "BATCH", 8)
    kilobytes = measurements.noisy_set(sample_data / "train", tmp_path, sigma=13, count=32)
    assert 70 < kilobytes < 130
    measurements.print_report(tmp_path, rounds=1, batches=4)
    output = capsys.readouterr().out
    for augmentation in ("scale", "random_resized_crop"):
        line = next(line for line in output.split("\n") if line.startswith(f"| {augmentation} |"))
        figures = [float(cell.split()[0]) for cell in line.split("|")[2:-1]]
        assert len(figures) == len(measurements.KINDS) == 5
        assert figures[2] < figures[0] < 50
    assert "two threads:" in output and "waits" in output


def test_work_in_the_background_is_counted_as_the_cases_own(measurements, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(measurements, "BATCH", 1)

    def burn(milliseconds: int) -> None:
        end = time.thread_time() + milliseconds / 1000
        while time.thread_time() < end:
            pass

    def ahead() -> Iterator[object]:
        with ThreadPoolExecutor(1) as pool:
            waiting = [pool.submit(burn, 40) for _ in range(2)]
            while True:
                waiting.append(pool.submit(burn, 40))
                yield waiting.pop(0).result()

    def idle() -> Iterator[object]:
        while True:
            yield None

    cost = measurements.cpu_ms_per_image({"ahead": ahead, "idle": idle}, rounds=3, batches=3)
    assert 35 < cost["ahead"] < 55
    assert cost["idle"] < 5
