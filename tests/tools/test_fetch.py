"""tools/data.py fetch: torchvision's downloads end where the loaders read. A server of our own stands in."""

import gzip
import hashlib
import importlib
import pickle
import socket
import struct
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
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


class Breaking(Quiet):
    """Announces the whole content and sends what `broken` sends."""

    content: bytes
    over: threading.Event
    broken: Callable[["Breaking", bytes], None]

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        type(self).broken(self, self.content)


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


def fetch(monkeypatch: pytest.MonkeyPatch, output: Path, dataset: str = "cifar10") -> int:
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr(sys, "argv", ["data.py", "fetch", dataset, "--output", str(output)])
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
    assert fetch(monkeypatch, tmp_path / "data") == 1
    assert_told(capsys.readouterr().err, "incomplete or altered (checksum)", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == [tmp_path / "data" / f"{CIFAR10.filename}.part"]


def test_a_server_that_is_not_there_is_an_error(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.unlink()
    assert fetch(monkeypatch, tmp_path / "data") == 1
    assert "404" in capsys.readouterr().err


def assert_told(error: str, reason: str, folder: Path) -> None:
    """One line: the address, what happened, that it can be run again, and that the part is not taken for the whole."""
    assert (
        error.strip()
        .splitlines()[-1]
        .startswith(f"error: {CIFAR10.filename} could not be downloaded from {CIFAR10.url}: ")
    )
    assert error.count("error:") == 1 and "Traceback" not in error
    assert reason in error and "Run the same command again" in error
    assert f"{folder / CIFAR10.filename}.part, which is not whole, is not used" in error


def close_midway(handler: Breaking, content: bytes) -> None:
    handler.wfile.write(content[: len(content) // 2])


def reset_midway(handler: Breaking, content: bytes) -> None:
    handler.wfile.write(content[: len(content) // 2])
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()  # with this linger time: a reset, not an end


def fall_silent(handler: Breaking, content: bytes) -> None:
    handler.wfile.write(content[: len(content) // 2])
    handler.wfile.flush()
    Breaking.over.wait(30)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (close_midway, "incomplete or altered (checksum)"),
        (reset_midway, "Connection reset by peer (ConnectionResetError)"),
        (fall_silent, "timed out (TimeoutError)"),
    ],
)
def test_a_download_that_breaks_off_is_told_and_goes_well_the_next_time(
    broken: Callable[[Breaking, bytes], None],
    reason: str,
    server: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {
        "content": server.read_bytes(),
        "over": threading.Event(),
        "broken": staticmethod(broken),
    }.items():
        monkeypatch.setattr(Breaking, name, value, raising=False)
    good_address = CIFAR10.url
    http = ThreadingHTTPServer(("127.0.0.1", 0), Breaking)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{http.server_port}/{CIFAR10.filename}")
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr(importlib.import_module("data_verbs.fetch"), "SILENCE_S", 1.0)
    try:
        assert fetch(monkeypatch, tmp_path / "data") == 1
        assert_told(capsys.readouterr().err, reason, tmp_path / "data")
        assert not (tmp_path / "data" / CIFAR10.filename).exists()
    finally:
        Breaking.over.set()
        http.shutdown()
        http.server_close()
    monkeypatch.setattr(CIFAR10, "url", good_address)
    assert fetch(monkeypatch, tmp_path / "data") == 0
    assert len(read_cifar(tmp_path / "data", "cifar10", training=True).images_nhwc) == 20
    assert not list((tmp_path / "data").glob("*.part"))


def test_mnist_is_taken_from_the_mirror_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, MNIST = tmp_path / "server", torchvision.datasets.MNIST
    served.mkdir()
    resources = []
    for name, _ in MNIST.resources:
        (served / name).write_bytes(gzip.compress(name.encode()))
        resources.append((name, hashlib.md5((served / name).read_bytes(), usedforsecurity=False).hexdigest()))
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served)))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = unused.getsockname()[1]
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{port}/" for port in (nobody, http.server_port)])
    monkeypatch.setattr(MNIST, "resources", resources)
    assert fetch(monkeypatch, tmp_path / "data", "mnist") == 0
    http.shutdown()
    http.server_close()
    for name, _ in resources:
        assert (tmp_path / "data" / "MNIST" / "raw" / name.removesuffix(".gz")).read_bytes() == name.encode()
