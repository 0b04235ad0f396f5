"""launch/train.py in this process, and the one line that it prints when something is wrong."""

import contextlib
import io
import runpy
import sys

from tests.dist.launching import ROOT

CONFIG = ROOT / "tests" / "dist" / "small.yaml"


def run_script(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    out, error, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["train.py", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        sys.argv = argv
    return code, out.getvalue(), error.getvalue()


def complaint(code: int, *arguments: str) -> str:
    """The one line that a failing start prints."""
    got, _, error = run_script(list(arguments))
    assert got == code, error
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("unitdist: error: ")]
    assert len(lines) == 1, error
    return lines[0].removeprefix("unitdist: error: ")
