"""A process that ends with its launcher, by the signal it asked for."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")

CHILD = """
import pathlib, signal, sys, time
from unitdist.train.parent import end_with_parent
folder = pathlib.Path(sys.argv[1])
def stop(number, frame):
    (folder / "stopped").write_text(signal.Signals(number).name)
    sys.exit()
signal.signal(signal.SIGTERM, stop)
end_with_parent(signal.SIGTERM)
(folder / "ready").touch()
while True:
    time.sleep(0.1)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.05)


def test_a_training_by_itself_is_asked_to_stop_when_its_launcher_is_killed(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(tmp_path)])
    wait_for(tmp_path / "ready")
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_for(tmp_path / "stopped")
    while (text := (tmp_path / "stopped").read_text()) == "":
        time.sleep(0.01)
    assert text == "SIGTERM"
