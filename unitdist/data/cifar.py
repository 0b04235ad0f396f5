"""CIFAR-10 and CIFAR-100 in torchvision's layout (python pickles) or the binary one.

The pickles come from the internet and a pickle can run any program. Ours is read by an unpickler that can build
numbers, text, lists, dicts and one inert stand-in for numpy arrays, and nothing else.
"""

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unitdist.data.resident import ImageArrays
from unitdist.errors import ConfigError, DataError

_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_PIXELS = 3 * 32 * 32

# (folder, training files, test files, bytes of labels before the pixels of a binary record)
_LAYOUTS = {
    "cifar10": (
        ("cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), 0),
        ("cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",), 1),
    ),
    "cifar100": (
        ("cifar-100-python", ("train",), ("test",), 0),
        ("cifar-100-binary", ("train.bin",), ("test.bin",), 2),
    ),
}


class _Array:
    """Stands in for numpy.ndarray while unpickling: keeps the raw bytes."""

    data: bytes = b""

    def __setstate__(self, state: Any) -> None:
        _, _, _, _, data = state
        self.data = data if isinstance(data, bytes) else data.encode("latin1")


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, _: Any) -> bytes:
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Knows numpy's array, and how Python 3 wrote bytes for Python 2, by name only; every other name is refused."""

    _allowed = {
        ("numpy", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        stand_in = self._allowed.get((module.split(".")[0], name))
        if stand_in is not None:
            return stand_in
        raise DataError(f"a CIFAR file asks for {module}.{name}, which no data set needs: refused, do not trust it")


def _read_pickle(path: Path, label_key: bytes) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """(pixels (N, 3072), labels) of one python batch."""
    try:
        content = _Unpickler(BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels = np.frombuffer(content[b"data"].data, dtype=np.uint8)
        labels = [int(label) for label in content[label_key]]
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no CIFAR batch: {type(error).__name__}: {error}") from error
    return pixels, labels


def _read_binary(path: Path, label_bytes: int) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """(pixels, labels) of one binary batch: records of label bytes (the last one is the class) and 3072 pixels."""
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    if len(data) == 0 or len(data) % (label_bytes + _PIXELS):
        raise DataError(f"{path}: {len(data):,} bytes are not whole records of {label_bytes + _PIXELS}")
    records = data.reshape(-1, label_bytes + _PIXELS)
    return records[:, label_bytes:].reshape(-1), records[:, label_bytes - 1].tolist()


def _class_names(dataset: str, folder: Path, classes: int) -> list[str]:
    """The official names; CIFAR-100's stand in fine_label_names.txt or the pickle "meta", else class_<label>."""
    if dataset == "cifar10":
        return list(_CIFAR10_CLASSES)
    if (folder / "meta").is_file():
        try:
            content = _Unpickler(BytesIO((folder / "meta").read_bytes()), encoding="bytes").load()
            names = [name.decode() for name in content[b"fine_label_names"]]
        except (OSError, pickle.UnpicklingError, EOFError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{folder / 'meta'} is no CIFAR meta file: {error}") from error
    elif (folder / "fine_label_names.txt").is_file():
        names = (folder / "fine_label_names.txt").read_text().split()
    else:
        names = [f"class_{label:02d}" for label in range(classes)]
    if len(set(names)) != classes:
        raise DataError(f"{folder}: {len(set(names))} class names for {classes} classes")
    return names


def read_cifar(root: Path, dataset: str, *, training: bool) -> ImageArrays:
    """dataset: cifar10 or cifar100. 50,000 training or 10,000 test images of 32 x 32 x 3.

    Raises ConfigError when the files are not there, DataError when they are damaged or not to be trusted.
    """
    classes = 10 if dataset == "cifar10" else 100
    for folder_name, train_files, test_files, label_bytes in _LAYOUTS[dataset]:
        folder = root / folder_name
        paths = [folder / name for name in (train_files if training else test_files)]
        if not folder.is_dir():
            continue
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise ConfigError(f"data.path: {dataset} is incomplete, missing {', '.join(missing)}")
        key = b"labels" if dataset == "cifar10" else b"fine_labels"
        parts = [_read_binary(path, label_bytes) if label_bytes else _read_pickle(path, key) for path in paths]
        pixels = np.concatenate([part[0] for part in parts])
        labels = np.asarray([label for part in parts for label in part[1]], dtype=np.int64)
        if pixels.size != len(labels) * _PIXELS or labels.min() < 0 or labels.max() >= classes:
            raise DataError(
                f"{folder}: {len(labels)} labels do not fit {pixels.size:,} bytes of pixels or {classes} classes"
            )
        names = _class_names(dataset, folder, classes)
        return ImageArrays(
            kind=dataset,
            images_nhwc=np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)),
            labels=labels,
            class_to_idx={name: label for label, name in enumerate(names)},
        )
    places = " or ".join(layout[0] for layout in _LAYOUTS[dataset])
    raise ConfigError(
        f"data.path: {root} holds no {dataset}: looked for {places}; to download it: python tools/data.py fetch {dataset} --output {root}"
    )
