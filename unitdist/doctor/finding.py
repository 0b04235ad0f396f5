"""One line of the doctor's report."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "fault"]
"""ok: works. note: good to know. warning: works, but badly or not everywhere. fault: a training would fail; exit code 1."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`area`: what was looked at, a word or two. `text`: what was seen. `remedy`: what to do, one line; empty if nothing."""

    area: str
    level: Level
    text: str
    remedy: str = ""


def ok(area: str, text: str) -> Finding:
    return Finding(area=area, level="ok", text=text)


def note(area: str, text: str, remedy: str = "") -> Finding:
    return Finding(area=area, level="note", text=text, remedy=remedy)


def warning(area: str, text: str, remedy: str) -> Finding:
    return Finding(area=area, level="warning", text=text, remedy=remedy)


def fault(area: str, text: str, remedy: str) -> Finding:
    return Finding(area=area, level="fault", text=text, remedy=remedy)
