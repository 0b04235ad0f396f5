"""tools/loader_measurements.py: what tools/bench_loader.py prints, on a set small enough for a test."""

import importlib
import os
import re
import subprocess
import sys
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
    assert "load average" in output and "FFCV: not measured (ffcv is not installed)" in output
    scaling, stall = (line for line in output.split("\n") if line.startswith(("two threads:", "a step 1.3 times")))
    assert re.search(
        r"\nan epoch's first batch, two threads, comes after \d+ ms(; no verdict by the clock: .+)?\n", output
    )
    assert "times one by CPU time per image" in scaling
    assert ("no verdict by the clock: other programs used" in scaling) != ("times by the clock" in scaling)
    assert re.fullmatch(
        r"a step 1\.3 times slower than the loader waits -?\d+\.\d %(; no verdict by the clock: .+)?", stall
    )


def test_no_measurement_meets_the_end_of_an_epoch_and_the_wait_after_one_is_measured_apart(
    measurements, sample_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurements, "BATCH", 8)
    config = measurements.config_of(sample_data, "scale")
    long = measurements.train_split(config)
    assert long.batches_per_epoch == measurements.EPOCH_BATCHES >= 500
    files = len(measurements.scan_image_folder(sample_data / "train"))
    for sample_id in (0, 5):
        assert long.source.name(sample_id) == long.source.name(sample_id + files)
        assert long.source.labels[sample_id] == long.source.labels[sample_id + files]

    def two_epochs_of_three() -> Iterator[None]:
        for number in range(6):
            if number % 3 == 0:
                time.sleep(0.05)
            yield

    stream = two_epochs_of_three()
    assert min(measurements.first_wait_ms(stream, 3) for _ in range(2)) >= 50
    assert list(stream) == []


def test_a_busy_machine_gives_no_verdict(measurements) -> None:
    window = measurements.Window
    quiet, busy = [window(value=v, others=0.01) for v in (1.0, 2.0, 9.0)], [window(value=5.0, others=0.4)] * 10
    assert measurements.quiet_median(quiet + busy) == 2.0
    assert measurements.quiet_median(quiet[:2] + busy) is None
    assert "other programs used 40 % of the cores" in measurements.busy_text(busy)


def test_cpu_time_of_other_programs_is_seen(measurements) -> None:
    """A child that burns CPU and has not ended is "others"; this process's own work is not."""
    load = importlib.import_module("machine_load")
    stat = "cpu  100 20 30 1000 50 1 2 3 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    assert load.busy_cpu_seconds(stat) == 156 / os.sysconf("SC_CLK_TCK")
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        moment = load.Moment.now()
        time.sleep(1.5)
        assert moment.others_since() > 0.05
    finally:
        child.kill()
        child.wait()


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
