"""How the doctor's tests look at a finding."""

from unitdist.doctor.finding import Finding


def check(finding: Finding | None, level: str, *words: str) -> None:
    """The finding has that level, its lines hold the words, and what is wrong has a remedy."""
    assert finding is not None and finding.level == level
    for word in words:
        assert word in f"{finding.text}\n{finding.remedy}"
    assert finding.remedy or level in ("ok", "note")
    assert "\n" not in finding.text + finding.remedy
