"""The report as one screen of text, or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from unitdist.doctor.finding import Finding
from unitdist.wording import counted

SCHEMA = "unitdist-doctor-1"
_MARKS = {"ok": "ok", "note": "note", "warning": "WARNING", "fault": "FAULT"}
_COLOURS = {"ok": "32", "note": "36", "warning": "33", "fault": "31;1"}


def as_text(findings: Sequence[Finding], *, colour: bool) -> str:
    """A line for each finding, its remedy on the next, and a last line that counts."""
    lines = []
    width = max(len(finding.area) for finding in findings)
    for finding in findings:
        mark = f"{_MARKS[finding.level]:<7}"
        if colour:
            mark = f"\033[{_COLOURS[finding.level]}m{mark}\033[0m"
        lines.append(f"{mark}  {finding.area:<{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':<{9 + width}}  -> {finding.remedy}")
    faults, warnings = count(findings, "fault"), count(findings, "warning")
    verdict = "nothing stands in the way of a training here" if not faults else "mend the faults before a training"
    lines.append(f"\n{counted(faults, 'fault')}, {counted(warnings, 'warning')}: {verdict}")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """{"schema", "faults", "warnings", "findings": [{"area", "level", "text", "remedy"}, ...]}"""
    content = {
        "schema": SCHEMA,
        "faults": count(findings, "fault"),
        "warnings": count(findings, "warning"),
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def count(findings: Sequence[Finding], level: str) -> int:
    return sum(finding.level == level for finding in findings)
