"""unitdist.train.failure_summary: the summary names the first cause first; rank_log and watchdog as one process sees them."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.dist.launching import ROOT, environment
from unitdist.config import HealthConfig
from unitdist.errors import ConfigError, TrainingError
from unitdist.train.failure_summary import claims_report, settled_records, summarize
from unitdist.train.rank_log import RankLog
from unitdist.train.rank_record import RankRecord, process_state, read_records, this_machine, write_record
from unitdist.train.watchdog import Watchdog
from unitdist.world import World

PAIR = World(rank=0, local_rank=0, size=2, local_size=2)


def record(rank: int, state: str, **changes: object) -> RankRecord:
    values = {
        "start": "s", "rank": rank, "host": f"h{rank}", "machine": "elsewhere", "pid": 10 + rank, "state": state, "step": 7,
        "phase": "training", "in_phase_s": 40.0, "at": 100.0, "where": "sync.py:79 in sum_over_group", "reason": "because",
    }  # fmt: skip
    return RankRecord(**(values | changes))  # type: ignore[arg-type]


def lines(*records: RankRecord, unheard: tuple[int, ...] = ()) -> list[str]:
    world = World(rank=0, local_rank=0, size=len(records) + len(unheard), local_size=1)
    text = summarize(records, unheard=unheard, world=world, folder=Path("run"), start="s", now=104.0)
    return text.splitlines()[1:-1]


def test_silent_rank_comes_before_those_that_waited_or_lost_contact() -> None:
    silent = record(1, "running", step=5, phase="data")
    assert lines(record(0, "stuck"), silent, record(2, "lost contact")) == [
        "first cause: rank 1 on h1 (pid 11) does not answer: its process is killed, stopped or blocked, or its node is cut off; last "
        "heard of at step 5 (data), 4 s before; the others stood at step 7",
        "then: rank 0 on h0 (pid 10) waited for it at step 7 (training), at sync.py:79 in sum_over_group",
        "then: rank 2 on h2 (pid 12) lost contact at step 7 (training): because",
    ]


def test_of_two_errors_the_earlier_is_the_first_cause() -> None:
    found = lines(record(0, "error", at=103.0, reason="late"), record(1, "error", at=101.0, reason="early"))
    assert found == [
        "first cause: rank 1 on h1 (pid 11) failed at step 7 (training): early",
        "also: rank 0 on h0 (pid 10) failed at step 7 (training): late",
    ]


@pytest.mark.parametrize(
    ("behind", "ahead"),
    [
        (("data", 7), ("training", 7)),
        (("training", 6), ("data", 7)),
        (("validation", 7), ("data", 7)),
        (("validation", 7), ("checkpoint", 7)),
    ],
)
def test_of_stuck_ranks_the_least_far_on_is_the_first_cause(behind: tuple[str, int], ahead: tuple[str, int]) -> None:
    found = lines(
        record(0, "stuck", phase=ahead[0], step=ahead[1]), record(1, "stuck", phase=behind[0], step=behind[1])
    )
    assert found[0].startswith(
        f"first cause: rank 1 on h1 (pid 11) is stuck at step {behind[1]} ({behind[0]}), for 40 s"
    )
    assert found[1].startswith("then: rank 0 on h0 (pid 10) waited for it")


def test_a_cut_network_has_no_rank_to_blame_and_a_rank_without_record_is_named() -> None:
    assert lines(record(0, "lost contact"), record(1, "lost contact"))[0].startswith(
        "first cause: no rank gave a reason"
    )
    assert lines(record(0, "lost contact"), unheard=(1,))[0].startswith("first cause: rank 1: nothing was heard of it")


def test_ranks_that_are_all_stuck_at_one_place_have_none_to_blame() -> None:
    assert lines(record(0, "stuck"), record(1, "stuck")) == [
        "first cause: all 2 ranks are stuck at step 7 (training), none of them behind the others; look at the network between them, "
        "and at where each stands",
        "also: rank 0 on h0 (pid 10) is stuck at step 7 (training), for 40 s, at sync.py:79 in sum_over_group",
        "also: rank 1 on h1 (pid 11) is stuck at step 7 (training), for 40 s, at sync.py:79 in sum_over_group",
    ]
    assert lines(record(0, "stuck"), record(1, "stuck"), record(2, "lost contact"))[0].startswith(
        "first cause: rank 0 "
    )


def test_a_thousand_followers_are_not_a_thousand_lines() -> None:
    found = lines(record(0, "error"), *(record(rank, "lost contact") for rank in range(1, 1000)))
    assert len(found) == 10 and found[-1] == "and 991 more ranks likewise"


def test_records_of_an_earlier_start_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    write_record(tmp_path, record(0, "running"))
    write_record(tmp_path, record(1, "lost contact", start="earlier"))
    assert read_records(tmp_path, PAIR, start="s") == [record(0, "running"), None]
    started = time.monotonic()
    assert settled_records(tmp_path, PAIR, start="s", grace_s=0.5)[1] is None
    assert time.monotonic() - started >= 0.5
    assert claims_report(tmp_path, start="s") and not claims_report(tmp_path, start="s")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_state_of_a_process_is_known_on_its_machine_only() -> None:
    sleeper = subprocess.Popen(["sleep", "100"])
    here = record(0, "running", machine=this_machine(), pid=sleeper.pid)
    assert process_state(here) == "alive"
    assert process_state(record(0, "running", pid=sleeper.pid)) == "unknown"
    sleeper.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED)
    assert process_state(here) == "stopped"
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert process_state(here) == "gone"  # not yet reaped
    sleeper.wait()
    assert process_state(here) == "gone"


def test_log_holds_what_is_printed_and_appends_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for start in ("first", "second"):
        with RankLog(tmp_path, PAIR, start=start) as log:
            print("a line")
            print("an error", file=sys.stderr)
            print("\r 10% redrawn", file=sys.stderr)
            log.note("to the log alone")
        print("after it")
    text = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert text.count("a line\nan error\n") == 2 and text.count("to the log alone\n") == 2
    assert "=== start second (torchrun restart 0): rank 0 of 2 on " in text
    assert "redrawn" not in text and "after it" not in text
    assert capsys.readouterr().out == "a line\nafter it\n" * 2


def test_log_on_a_full_disk_warns_once_and_the_rank_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RankLog(tmp_path, PAIR, start="s")
    log.file.close()
    log.file = open("/dev/full", "a", buffering=1)
    print("one")
    print("two")
    log.close()
    seen = capsys.readouterr()
    assert seen.out == "one\ntwo\n" and seen.err.count("warning: cannot write") == 2  # once while open, once on closing


def test_first_time_of_a_phase_has_more_time(tmp_path: Path) -> None:
    config = HealthConfig(stuck_after_s=50, stuck_after_first_s=200)
    with RankLog(tmp_path, World.single(), start="s") as log:
        watchdog = Watchdog(config, World.single(), tmp_path, log, start="s")
        try:
            limits = []
            for phase, step in (("data", 0), ("training", 0), ("data", 1), ("validation", 1)):
                watchdog.enter(phase, step)
                limits.append(watchdog.mark.limit_s)
            watchdog.again()
            limits.append(watchdog.mark.limit_s)
            watchdog.enter("analysis", 1, watched=False)
            limits.append(watchdog.mark.limit_s)
            watchdog.enter("training", 1, first=True)
            limits.append(watchdog.mark.limit_s)
        finally:
            watchdog.close()
    assert limits == [200, 200, 50, 200, 50, None, 200]


def test_agreed_error_of_another_rank_is_not_this_ranks_failure(tmp_path: Path) -> None:
    error = TrainingError("the loss is nan")
    error.speaker = 1
    with RankLog(tmp_path, PAIR, start="s") as log:
        watchdog = Watchdog(HealthConfig(), PAIR, tmp_path, log, start="s")
        watchdog.failed(error, lost_contact=False)
        watchdog.close()
    assert json.loads((tmp_path / "ranks" / "rank_00000.json").read_text())["state"] == "told"
    assert not (tmp_path / "failure.txt").exists()


def test_what_the_first_to_leave_says_is_the_last_word(tmp_path: Path) -> None:
    """A heartbeat, or the end of a training that was only waiting, does not replace it."""
    with RankLog(tmp_path, PAIR, start="s") as log:
        watchdog = Watchdog(HealthConfig(stuck_after_s=5, stuck_after_first_s=5), PAIR, tmp_path, log, start="s")
        watchdog.failed(ValueError("first"), lost_contact=False)
        watchdog.failed(ValueError("second"), lost_contact=False)
        watchdog.finished()
        time.sleep(3 * watchdog._beat_s)
        watchdog.close()
    said = json.loads((tmp_path / "ranks" / "rank_00000.json").read_text())
    assert (said["state"], said["reason"]) == ("error", "ValueError: first")


def test_rank_that_waited_stays_so_when_the_stuck_one_ends_first(tmp_path: Path) -> None:
    """The watchdog of a waiting rank collects the others' words; meanwhile the stuck rank ends, and the collective fails."""
    code = f"""
    import pathlib, time
    from unitdist.config import HealthConfig
    from unitdist.train.rank_log import RankLog
    from unitdist.train.rank_record import RankRecord, write_record
    from unitdist.train.watchdog import Watchdog
    from unitdist.world import World
    folder = pathlib.Path({str(tmp_path)!r})
    world = World(rank=0, local_rank=0, size=2, local_size=2)
    other = dict(start="s", rank=1, host="h1", machine="elsewhere", pid=1, step=0, phase="data", in_phase_s=1, at=time.time())
    log = RankLog(folder, world, start="s")
    watchdog = Watchdog(HealthConfig(stuck_after_s=1.0, stuck_after_first_s=1.0), world, folder, log, start="s")
    write_record(folder, RankRecord(state="running", **other))
    watchdog.enter("training", 0)
    while not (folder / "ranks" / "report_s").exists():
        time.sleep(0.01)
    write_record(folder, RankRecord(state="stuck", **other))
    watchdog.failed(RuntimeError("Connection closed by peer"), lost_contact=True)
    print("still here")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=environment(),
        timeout=90,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    summary = (tmp_path / "failure.txt").read_text()
    assert "first cause: rank 1 on h1 (pid 1) is stuck at step 0 (data)" in summary
    assert "then: rank 0 on " in summary and "waited for it at step 0 (training)" in summary


def test_a_thread_that_holds_the_interpreter_is_ended_with_its_stack(tmp_path: Path) -> None:
    code = f"""
    import ctypes, pathlib
    from unitdist.config import HealthConfig
    from unitdist.train.rank_log import RankLog
    from unitdist.train.watchdog import Watchdog
    from unitdist.world import World
    folder = pathlib.Path({str(tmp_path)!r})
    log = RankLog(folder, World.single(), start="s")
    watchdog = Watchdog(HealthConfig(stuck_after_s=1.0, stuck_after_first_s=1.0), World.single(), folder, log, start="s")
    def held():
        ctypes.PyDLL(None).sleep(100)
    import time
    time.sleep(0.5)
    watchdog.again()
    held()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=environment(), timeout=90, capture_output=True
    )
    assert done.returncode == 1
    log = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert "Timeout (" in log and "in held" in log


def test_limits_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="health.stuck_after_first_s: must be >= health.stuck_after_s: 300"):
        HealthConfig(stuck_after_first_s=10)
    with pytest.raises(ConfigError, match="health.stuck_after_s: must be > 0 or null, got 0"):
        HealthConfig(stuck_after_s=0)
    assert HealthConfig(stuck_after_s=None).stuck_after_first_s == 900
