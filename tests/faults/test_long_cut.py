"""A network that is cut for longer than health.stuck_after_s, between two nodes that are network namespaces."""

import sys
import time
from pathlib import Path

import pytest

from tests.dist.launching import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from chaos_compare import differences  # noqa: E402
from chaos_job import SETTINGS, Job  # noqa: E402
from sample_data import make_sample_data  # noqa: E402
from two_nodes import two_nodes, why_not  # noqa: E402

CUT_S = 60
"""Three times the health.stuck_after_s of SETTINGS."""


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ranks_leave_and_the_launchers_form_the_job_anew_when_the_network_is_back(tmp_path: Path) -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    make_sample_data(tmp_path / "data", seed=0, train_per_class=12, val_per_class=5)
    with two_nodes() as nodes:
        runs = {}
        for name in ("undisturbed", "cut"):
            more = [
                f"data.path={tmp_path / 'data'}",
                f"run.folder={tmp_path}",
                f"run.name={name}",
                "train.epochs=3",
            ]
            runs[name] = Job(
                run=tmp_path / name, arguments=[*SETTINGS, *more], output=tmp_path / f"{name}.log", nodes=nodes
            )
        try:
            runs["undisturbed"].start()
            runs["undisturbed"].wait_until_finished()
            job = runs["cut"]
            job.start()
            job.wait_for_step(5)
            nodes.cut()
            time.sleep(CUT_S)
            summary = (job.run / "failure.txt").read_text()
            assert job.ranks() == [] and [launcher.poll() for launcher in job.launchers] == [None, None]
            nodes.restore()
            job.wait_until_finished()
        finally:
            for one in runs.values():
                one.kill()
    lines = summary.splitlines()
    assert lines[1].startswith("first cause: all 2 ranks are stuck at step "), summary
    assert "look at the network between them" in lines[1]
    assert [line[:12] for line in lines[2:4]] == ["also: rank 0", "also: rank 1"], summary
    assert (job.starts, job.rank_starts()) == (1, 2)
    assert differences(tmp_path / "cut", tmp_path / "undisturbed") == []
