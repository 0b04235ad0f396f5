"""Index WebDataset tars or TFRecord files that exist already, so that single images can be read from them.

Writes FOLDER/index.tsv, which data.source=webdataset or tfrecord reads. Classes come from .cls members or class
folders (tars), image/class/synset or image/class/label (TFRecord).
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from unitdist.data.index import require_folder
from unitdist.data.manifest import SHARDS_FORMAT, write_lines
from unitdist.data.shards import class_list, crc32_of, shard_paths, tar_entries, tfrecord_entries
from unitdist.errors import ConfigError, DataError
from unitdist.wording import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder of the shards of one split")
    parser.add_argument("--kind", choices=("webdataset", "tfrecord"), required=True)
    parser.add_argument("--classes", type=Path, help="text file with one class name per line, for numbered classes")


def class_names(texts: set[str], file: Path | None) -> tuple[dict[str, int], list[str]]:
    """(class text in the shards -> label, class names). Raises ConfigError when names and numbers do not fit."""
    labels = class_list(texts)
    if file is None:
        return labels, list(labels)
    names = file.read_text().split("\n")
    names = names[:-1] if names[-1] == "" else names
    if len(names) != len(labels):
        raise ConfigError(
            f"--classes: {file} has {counted(len(names), 'name')}, the shards have {counted(len(labels), 'class', 'classes')}"
        )
    return labels, names


def run(options: argparse.Namespace) -> int:
    require_folder(options.folder)
    paths = shard_paths(options.folder, options.kind)
    if not paths:
        raise DataError(f"{options.folder} holds no {options.kind} files")
    entries_of = tar_entries if options.kind == "webdataset" else tfrecord_entries
    found = [
        (number, entry)
        for number, path in enumerate(tqdm(paths, unit="file", disable=None))
        for entry in entries_of(path)
    ]
    if not found:
        raise DataError(f"{options.folder}: {counted(len(paths), f'{options.kind} file')} without an image")
    labels, names = class_names({entry.class_text for _, entry in found}, options.classes)
    lines = [
        f"{number}\t{entry.offset}\t{entry.size}\t{labels[entry.class_text]}"
        f"\t{crc32_of(paths[number], entry.offset, entry.size)}\t{entry.name}"
        for number, entry in found
    ]
    header = {"kind": options.kind, "classes": names, "shards": [path.name for path in paths]}
    write_lines(options.folder / "index.tsv", SHARDS_FORMAT, header, lines)
    print(
        f"{counted(len(lines), 'image')} of {counted(len(names), 'class', 'classes')} in {counted(len(paths), 'file')}; "
        f"index: {options.folder / 'index.tsv'}"
    )
    return 0
