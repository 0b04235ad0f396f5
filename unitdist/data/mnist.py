"""MNIST's four IDX files in torchvision's layout, packed or not."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from unitdist.data.resident import ImageArrays
from unitdist.errors import ConfigError, DataError

_PLACES = ("MNIST/raw", "raw", "")


def _find(root: Path, name: str) -> Path:
    """The file under root, as torchvision stores it (MNIST/raw) or directly, with or without .gz."""
    for place in _PLACES:
        for suffix in ("", ".gz"):
            path = root / place / (name + suffix)
            if path.is_file():
                return path
    raise ConfigError(
        f"data.path: {root} holds no MNIST: looked for {name} and {name}.gz in MNIST/raw, raw and itself; "
        f"to download it: python tools/data.py fetch mnist --output {root}"
    )


def _read_idx(path: Path, axes: int) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes: two zero bytes, type 8, the number of axes, big-endian sizes, then the data."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    start = 4 + 4 * axes
    if len(data) < start or data[:4] != bytes((0, 0, 8, axes)):
        raise DataError(f"{path} is no IDX file of bytes with {axes} axes")
    sizes = np.frombuffer(data, dtype=">u4", count=axes, offset=4).astype(np.int64)
    if len(data) - start != int(sizes.prod()):
        raise DataError(f"{path} announces {int(sizes.prod()):,} bytes of data and holds {len(data) - start:,}")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(sizes)


def read_mnist(root: Path, *, training: bool) -> ImageArrays:
    """60,000 training or 10,000 test images of 28 x 28, one channel; classes "0" to "9".

    Raises ConfigError when the files are not there, DataError when they are damaged.
    """
    prefix = "train" if training else "t10k"
    images = _read_idx(_find(root, f"{prefix}-images-idx3-ubyte"), axes=3)
    labels = _read_idx(_find(root, f"{prefix}-labels-idx1-ubyte"), axes=1)
    if len(images) != len(labels) or labels.max(initial=0) > 9:
        raise DataError(f"{root}: {len(images)} MNIST images do not fit {len(labels)} labels in 0..9")
    return ImageArrays(
        kind="mnist",
        images_nhwc=images[..., None],
        labels=labels.astype(np.int64),
        class_to_idx={str(digit): digit for digit in range(10)},
    )
