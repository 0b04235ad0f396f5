import sys

import pytest

from evaluation import progress as progress_module
from evaluation.progress import Progress


def test_plain_lines_tell_rate_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: seconds[0])
    progress = Progress(shown=True)
    progress.start(100)
    for _ in range(4):
        seconds[0] += 10
        progress.advance(10)
    progress.close()
    assert capsys.readouterr().err == "40/100 images of this rank, 1.0 images/s, 60 s left\n"


def test_other_ranks_are_silent_but_for_messages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", -1.0)
    progress = Progress(shown=False)
    progress.start(10)
    progress.advance(5)
    assert capsys.readouterr().err == ""
    progress.say("out of memory")
    assert capsys.readouterr().err == "out of memory\n"


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(shown=True)
    progress.start(10)
    progress.advance(10)
    progress.say("halved")
    progress.close()
    text = capsys.readouterr().err
    assert "evaluating: 100%" in text
    assert "halved\n" in text
