"""The same report, bit for bit, on 1, 2, 3 and 5 ranks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# One launch of five processes plays all worlds, one after the other: ranks beyond a world's size sit it out.
WORKER = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from evaluation import EvaluationOptions, evaluate, protocols
checkpoint, data, folder = map(Path, sys.argv[2:5])
rank = int(os.environ["RANK"])
torch.set_num_threads(1 + rank % 2)
options = EvaluationOptions(
    scales_px=(32, 40), crop_px=32, single_scale_px=40, images_per_chunk=4, num_threads=1 + rank % 3, pictures=False,
    save_scores=True, on_broken="skip", resume=True)

def start_and_die(folder):
    # What a killed evaluation leaves: some chunks of some passes.
    whole, calls = protocols.pass_scores, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return whole(*arguments)

    protocols.pass_scores = dying
    try:
        evaluate(checkpoint, data, protocols="all", output=folder, device="cpu", options=options, say=lambda line: None)
        raise SystemExit("was not interrupted")
    except KeyboardInterrupt:
        protocols.pass_scores = whole
    assert len(list((folder / "partial").rglob("chunk_*.npz"))) == 20

for size in (1, 2, 3, 5):
    if rank >= size:
        continue
    os.environ.update(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), LOCAL_RANK=str(rank), RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[5 + size])
    if size == 1:
        start_and_die(folder / "ranks3")
    results = evaluate(checkpoint, data, protocols="all", output=folder / f"ranks{size}", device="cpu", options=options,
                       say=lambda line: None)
    assert results["crops"]["count"] == 33, results["crops"]["count"]
    assert not dist.is_initialized()
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def reports(checkpoint: Path, small_val: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs ranks1, ranks2, ranks3 and ranks5; ranks3 goes on where an evaluation on one rank
    was interrupted. Ranks differ in their numbers of threads on purpose."""
    folder = tmp_path_factory.mktemp("worlds")
    data = folder / "data"
    subprocess.run(["cp", "-r", str(small_val), str(data)], check=True)
    broken = sorted(data.rglob("*_00*.jpg"))[7]
    broken.write_bytes(broken.read_bytes()[:3000])
    (folder / "worker.py").write_text(WORKER)
    ports = [str(free_port()) for _ in range(6)]
    processes = []
    for rank in range(5):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "5", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", folder / "worker.py", REPOSITORY, checkpoint, data, folder, *ports]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=280)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 5, "\n".join(errors)
    return folder


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_report_is_the_same_bytes_on_any_number_of_ranks(reports: Path, size: int) -> None:
    assert (reports / f"ranks{size}/report.json").read_bytes() == (reports / "ranks1/report.json").read_bytes()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_scores_are_the_same_bits_on_any_number_of_ranks(reports: Path, size: int) -> None:
    for protocol in ("crops", "fully_convolutional", "single", "ten_crop"):
        name = f"scores_{protocol}.npz"
        assert (reports / f"ranks{size}" / name).read_bytes() == (reports / "ranks1" / name).read_bytes()


def test_every_image_was_counted_once(reports: Path) -> None:
    report = json.loads((reports / "ranks5/report.json").read_text())
    assert (report["images"], report["count"], len(report["broken"])) == (34, 33, 1)
    for summary in report["protocols"].values():
        assert sum(entry["count"] for entry in summary["per_class"]) == 33
        assert all(scale["count"] == 33 for scale in summary["scales"])


def test_the_work_was_shared(reports: Path) -> None:
    timing = json.loads((reports / "ranks5/timing.json").read_text())
    assert timing["ranks"] == 5
    assert timing["images_of_rank_0"] == 8
