"""A smaller MNIST of the same format: the first images of the training files, the test files as they are."""

import gzip
import struct
from pathlib import Path

from unitdist.data.mnist import read_mnist


def write_mnist_subset(source: Path, target: Path, num_train: int) -> Path:
    """Write the first `num_train` training images and all test images of `source` as IDX files; returns `target`.

    Done once: a complete target is left as it is (the test labels are written last).
    """
    done = target / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    if done.is_file():
        return target
    done.parent.mkdir(parents=True, exist_ok=True)
    for prefix, training, limit in (("train", True, num_train), ("t10k", False, None)):
        arrays = read_mnist(source, training=training)
        images, labels = arrays.images_nhwc[:limit, :, :, 0], arrays.labels[:limit]
        for kind, values in (("images-idx3", images), ("labels-idx1", labels.astype("uint8"))):
            header = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
            content = gzip.compress(header + values.tobytes(), compresslevel=6, mtime=0)
            (done.parent / f"{prefix}-{kind}-ubyte.gz").write_bytes(content)
    return target
