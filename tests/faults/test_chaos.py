"""tools/chaos.py: a training under a schedule of faults ends as an undisturbed one, bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.launching import ROOT, environment

sys.path.insert(0, str(ROOT / "tools"))
from two_nodes import why_not  # noqa: E402


def chaos(folder: Path, *arguments: str, timeout_s: int) -> str:
    command = [sys.executable, "tools/chaos.py", "--folder", str(folder), *arguments]
    with open(folder.with_suffix(".txt"), "w+") as output:
        done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=output, stderr=output, timeout=timeout_s)
        output.seek(0)
        text = output.read()
    assert done.returncode == 0, text
    assert text.endswith("weights, optimizer and metrics identical\n")
    return text


@pytest.mark.timeout(1500)
def test_killed_stopped_by_signal_and_torn(tmp_path: Path) -> None:
    kinds = ["kill_rank", "signal_rank", "torn_checkpoint"]
    text = chaos(tmp_path / "chaos", "--one-node", "--faults=3", f"--kinds={','.join(kinds)}", timeout_s=1400)
    assert all(f"  {kind} " in text for kind in kinds)


@pytest.mark.timeout(1500)
def test_network_cut_between_two_nodes_is_survived(tmp_path: Path) -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    text = chaos(tmp_path / "chaos", "--faults=1", "--kinds=cut_network", timeout_s=1400)
    assert "network cut for" in text and "training went on" in text


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_lost_node_is_replaced_and_a_full_disk_survived(tmp_path: Path) -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    chaos(tmp_path / "chaos", "--faults=3", "--kinds=lose_node,full_disk,cut_network", timeout_s=2900)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_twenty_kills_are_twenty_restarts(tmp_path: Path) -> None:
    """Fails where torchrun's restarts hang, as they do without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."""
    text = chaos(tmp_path / "chaos", "--one-node", "--faults=20", "--kinds=kill_rank", timeout_s=7100)
    assert text.count("; the summary names it\n") == 20 and "20 faults, 21 starts: " in text


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_twenty_faults(tmp_path: Path) -> None:
    chaos(tmp_path / "chaos", "--seed=0", "--faults=20", timeout_s=7100)


def test_what_cannot_be_had_here_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "tools/chaos.py", "--folder", str(tmp_path / "chaos"), "--one-node", "--kinds=full_disk"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and not (tmp_path / "chaos").exists()
    assert done.stdout.startswith("chaos.py: error: cannot do full_disk here (--one-node); choose among kill_rank, ")
