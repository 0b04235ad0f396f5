"""tools/data.py fetch: torchvision's downloads end where the loaders read. A server of our own stands in."""

import hashlib
import pickle
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision

from unitdist.data.cifar import read_cifar

TOOLS = Path(__file__).resolve().parents[2] / "tools"
CIFAR10 = torchvision.datasets.CIFAR10


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """CIFAR-10's archive with 4 images a file, behind an address that torchvision takes for the real one."""
    folder = tmp_path / "server" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        content = {b"data": np.full((4, 3072), i, dtype=np.uint8), b"labels": [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    archive = folder.parent / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=CIFAR10.base_folder)
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(archive.parent)))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{http.server_port}/{CIFAR10.filename}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest())
    yield archive
    http.shutdown()
    http.server_close()


def fetch(monkeypatch: pytest.MonkeyPatch, output: Path) -> int:
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr(sys, "argv", ["data.py", "fetch", "cifar10", "--output", str(output)])
    import data

    return data.main()


def test_fetched_cifar_is_what_the_loader_reads(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(monkeypatch, tmp_path / "data") == 0
    assert f"data.path={tmp_path / 'data'}" in capsys.readouterr().out
    arrays = read_cifar(tmp_path / "data", "cifar10", training=True)
    assert arrays.images_nhwc.shape == (20, 32, 32, 3)
    assert arrays.images_nhwc[:, 0, 0, 0].tolist() == [i for i in range(5) for _ in range(4)]
    server.unlink()
    assert fetch(monkeypatch, tmp_path / "data") == 0  # whole already: the server is not asked


def test_a_damaged_download_is_an_error(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.write_bytes(server.read_bytes()[:-20])
    assert fetch(monkeypatch, tmp_path / "data") != 0
    assert "cifar10 could not be downloaded" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_an_error(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.unlink()
    assert fetch(monkeypatch, tmp_path / "data") != 0
    assert "cifar10 could not be downloaded" in capsys.readouterr().err
