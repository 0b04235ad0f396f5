"""unitdist.train.metrics: sums without synchronization, a record that survives a kill."""

import json
import resource
from pathlib import Path

import pytest
import torch

from unitdist.train.metrics import Record, TrainSums, read_record


def test_sums_weigh_micro_batches_by_their_size() -> None:
    sums = TrainSums(torch.device("cpu"))
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    sums.add(torch.tensor(1.0), logits, torch.tensor([0, 0]))
    sums.add(torch.tensor(4.0), logits[:1], torch.tensor([0]))
    assert sums.fold(sums.window.clone()) == (2.0, 200 / 3)
    assert sums.epoch == [6.0, 2.0, 3.0] and sums.window.tolist() == [0.0, 0.0, 0.0]


def test_resumed_record_drops_what_came_later_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = Record(path, resumed_step=0, tell=print)
    for step in (10, 20, 30):
        record.write("train", {"step": step})
    with open(path, "a") as file:
        file.write('{"event": "train", "st')
    Record(path, resumed_step=20, tell=print).write("train", {"step": 21})
    assert [event["step"] for event in read_record(path)] == [10, 20, 21]
    assert all(json.loads(line)["event"] == "train" for line in path.read_text().splitlines())


def test_lines_that_cannot_be_written_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, told = tmp_path / "metrics.jsonl", []
    record = Record(path, resumed_step=0, tell=told.append)
    record.write("train", {"step": 1})
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, usual[1]))  # the next line is torn
    try:
        record.write("train", {"step": 2})
        record.write("train", {"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert [event["step"] for event in read_record(path)] == [1]
    assert len(told) == 1 and "metrics.jsonl: File too large; its lines are kept" in told[0]
    record.write("train", {"step": 4})
    assert [event["step"] for event in read_record(path)] == [1, 2, 3, 4]
