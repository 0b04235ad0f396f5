"""The names nearest to one that does not exist, for error messages."""

import difflib
from collections.abc import Sequence


def did_you_mean(given: str, known: Sequence[str], count: int = 3) -> str:
    """ " (did you mean a, b or c?)", or nothing where no name is near."""
    near = difflib.get_close_matches(given, known, n=count, cutoff=0.5)
    if not near:
        return ""
    return f" (did you mean {', '.join(near[:-1])}{' or ' if len(near) > 1 else ''}{near[-1]}?)"
