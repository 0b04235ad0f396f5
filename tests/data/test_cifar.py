"""cifar.py: pickles (as Python 2 and 3 wrote them) and binary files, without ever running what a pickle says."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from unitdist.data.cifar import read_cifar
from unitdist.errors import ConfigError, DataError

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (6, 3072), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 9]


def python2_pickle(pixels: np.ndarray, label_key: bytes, labels: list[int]) -> bytes:
    """The dictionary as Python 2's protocol 2 wrote it: byte strings as BINSTRING, numpy.core's old names."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"K" + bytes([len(pixels)]) + b"M\x00\x0c\x86"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(label_key) + numbers + b"u."


def write_python(root: Path, *, python2: bool) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        old = python2_pickle(PIXELS, b"labels", LABELS)
        new = pickle.dumps({b"data": PIXELS, b"labels": LABELS}, protocol=2)
        (folder / name).write_bytes(old if python2 else new)


@pytest.mark.parametrize("python2", [True, False])
def test_cifar10_pickles(tmp_path: Path, python2: bool) -> None:
    write_python(tmp_path, python2=python2)
    train, test = (read_cifar(tmp_path, "cifar10", training=training) for training in (True, False))
    assert (len(train.labels), len(test.labels)) == (30, 6)
    assert test.labels.tolist() == LABELS
    assert np.array_equal(test.images_nhwc, PIXELS.reshape(6, 3, 32, 32).transpose(0, 2, 3, 1))
    assert train.class_to_idx["ship"] == 8


def test_cifar10_binary(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = np.concatenate([np.array(LABELS, dtype=np.uint8)[:, None], PIXELS], axis=1)
    (folder / "test_batch.bin").write_bytes(records.tobytes())
    test = read_cifar(tmp_path, "cifar10", training=False)
    assert test.labels.tolist() == LABELS
    assert np.array_equal(test.images_nhwc, PIXELS.reshape(6, 3, 32, 32).transpose(0, 2, 3, 1))


def test_cifar100_takes_the_fine_labels_and_their_names(tmp_path: Path) -> None:
    binary, python = tmp_path / "cifar-100-binary", tmp_path / "python"
    binary.mkdir()
    coarse, fine = np.full((6, 1), 7, dtype=np.uint8), np.array([[90], [1], [2], [3], [4], [99]], dtype=np.uint8)
    (binary / "test.bin").write_bytes(np.concatenate([coarse, fine, PIXELS], axis=1).tobytes())
    (binary / "fine_label_names.txt").write_text("\n".join(f"name{i}" for i in range(100)))
    test = read_cifar(tmp_path, "cifar100", training=False)
    assert test.labels.tolist() == fine[:, 0].tolist() and test.class_to_idx["name99"] == 99
    folder = python / "cifar-100-python"
    folder.mkdir(parents=True)
    content = {b"data": PIXELS, b"fine_labels": fine[:, 0].tolist(), b"coarse_labels": [7] * 6}
    (folder / "test").write_bytes(pickle.dumps(content, protocol=2))
    meta = {b"fine_label_names": [f"name{i}".encode() for i in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    assert read_cifar(python, "cifar100", training=False).labels.tolist() == fine[:, 0].tolist()
    assert read_cifar(python, "cifar100", training=False).class_to_idx == test.class_to_idx


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_pickle_that_would_run_a_program_is_refused_and_not_run(tmp_path: Path) -> None:
    write_python(tmp_path, python2=True)
    exploit = pickle.dumps({b"data": PIXELS, b"labels": Exploit(tmp_path / "ran")}, protocol=2)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(exploit)
    with pytest.raises(DataError, match="asks for posix.system, which no data set needs: refused"):
        read_cifar(tmp_path, "cifar10", training=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({b"data": 3}), pickle.dumps([1])])
def test_other_content_is_named(tmp_path: Path, content: bytes) -> None:
    write_python(tmp_path, python2=True)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match="test_batch is no CIFAR batch"):
        read_cifar(tmp_path, "cifar10", training=False)


def test_missing_files_are_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no cifar10: looked for cifar-10-batches-py or cifar-10-batches-bin"):
        read_cifar(tmp_path, "cifar10", training=True)
    write_python(tmp_path, python2=True)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(ConfigError, match="cifar10 is incomplete, missing .*data_batch_3$"):
        read_cifar(tmp_path, "cifar10", training=True)


def test_binary_file_of_a_wrong_length_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "test_batch.bin").write_bytes(b"x" * 4000)
    with pytest.raises(DataError, match="test_batch.bin: 4,000 bytes are not whole records of 3073"):
        read_cifar(tmp_path, "cifar10", training=False)


def test_labels_out_of_range_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "test_batch.bin").write_bytes(bytes([77]) + PIXELS[0].tobytes())
    with pytest.raises(DataError, match="do not fit"):
        read_cifar(tmp_path, "cifar10", training=False)
