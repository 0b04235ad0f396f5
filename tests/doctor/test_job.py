"""The doctor's job-wide side: what the config needs, what ranks have in common, and the screen."""

from pathlib import Path

import pytest

from tests.doctor.checking import check
from unitdist.config_file import load_config
from unitdist.doctor import ranks, screen
from unitdist.doctor.examine import on_other_node
from unitdist.doctor.finding import fault, note, ok, warning
from unitdist.doctor.needs import Needs, needs_of


def test_clocks() -> None:
    hosts = ["a", "a", "b"]
    check(ranks.check_clocks({0: 0.0, 1: 0.001, 2: -0.002}, hosts), "ok", "3 ranks within 0.003 s")
    check(
        ranks.check_clocks({0: 0.0, 1: 0.0, 2: 2.5}, hosts), "warning", "rank 2 on b is ahead of rank 0 on a", "chrony"
    )
    check(ranks.check_clocks({0: 0.0, 1: 0.0, 2: -61.0}, hosts), "fault", "rank 0 on a is ahead of rank 2 on b")


def test_versions_between_ranks() -> None:
    check(ranks.check_same_software(["torch 2.15"] * 3, ["a", "a", "b"]), "ok")
    check(
        ranks.check_same_software(["torch 2.15", "torch 2.15", "torch 2.14"], ["a", "a", "b"]),
        "fault",
        "rank 2 on b runs torch 2.14",
    )


def test_only_what_another_node_has_of_its_own_is_told() -> None:
    known = [ok("data", "there"), fault("DALI", "not installed", "install it")]
    found = [
        fault("data", "no such folder", "mount it"),
        fault("DALI", "not installed", "install it"),
        note("port", "x"),
    ]
    assert on_other_node("b", found, known=known) == [fault("data", "b: no such folder", "mount it")]


def test_needs_come_from_the_config() -> None:
    assert needs_of(None, data=Path("x")) == Needs(data=Path("x"))
    needs = needs_of(load_config("demo.yaml", ["train.ema_decay=0.99"]), data=None)
    assert needs.dali and not needs.deepspeed and needs.data == Path("sample_data")
    assert needs.checkpoint_files == 4  # the last two, the best, and the one being written
    weights, moments, average = 4 * 11_185_296, 4 * 11_185_296, 4 * 11_185_296
    assert needs.checkpoint_bytes == pytest.approx(weights + moments + average, rel=0.01)
    assert needs_of(load_config("demo.yaml", ["train.engine=deepspeed"]), data=None).compiler


def test_screen_counts_and_shows_remedies() -> None:
    findings = [ok("a", "good"), warning("b", "slow", "do this"), fault("c", "broken", "do that")]
    text = screen.as_text(findings, colour=False)
    assert "FAULT    c  broken\n            -> do that" in text and "\033" not in text
    assert text.endswith("1 fault, 1 warning: mend the faults before a training")
    assert "\033[31;1mFAULT" in screen.as_text(findings, colour=True)
