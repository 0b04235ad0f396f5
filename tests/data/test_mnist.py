"""mnist.py: the real files where they are, small ones in the same format, and damaged ones."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from unitdist.data.mnist import read_mnist
from unitdist.errors import ConfigError, DataError

REAL = Path(os.environ.get("UNITDIST_MNIST", Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"))


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def write_mnist(folder: Path, *, packed: bool = False, count: int = 5) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            data = idx(array)
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)
    return pixels


@pytest.mark.parametrize("place", ["MNIST/raw", "raw", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_files_are_read_from_torchvisions_places_packed_or_not(tmp_path: Path, place: str, packed: bool) -> None:
    pixels = write_mnist(tmp_path / place, packed=packed)
    arrays = read_mnist(tmp_path, training=False)
    assert np.array_equal(arrays.images_nhwc[..., 0], pixels)
    assert arrays.labels.tolist() == [0, 1, 2, 3, 4]
    assert arrays.class_to_idx == {str(digit): digit for digit in range(10)}


@pytest.mark.skipif(not REAL.is_dir(), reason=f"MNIST is not at UNITDIST_MNIST or {REAL.name}")
def test_real_mnist_has_its_known_counts_and_moments() -> None:
    train, test = read_mnist(REAL, training=True), read_mnist(REAL, training=False)
    assert np.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.images_nhwc.shape == (60_000, 28, 28, 1)
    pixels = train.images_nhwc / 255.0
    assert round(pixels.mean(), 4) == 0.1307 and round(pixels.std(), 4) == 0.3081


def test_absent_files_are_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no MNIST: looked for train-images-idx3-ubyte and .*gz in MNIST/raw"):
        read_mnist(tmp_path, training=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-10], "announces 3,920 bytes of data and holds 3,910"),
        (lambda data: b"\x00\x00\x0d" + data[3:], "is no IDX file of bytes with 3 axes"),
        (lambda data: b"", "is no IDX file"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, change, message: str) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        read_mnist(tmp_path, training=True)
    assert str(path) in str(error.value)


def test_cut_off_archive_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="cannot read .*train-images-idx3-ubyte.gz"):
        read_mnist(tmp_path, training=True)
