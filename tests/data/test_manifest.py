"""manifest.py: lists written and read back, damage and foreign files named, 1.28 million entries within the limits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unitdist.data.manifest import (
    FILES_FORMAT,
    OPEN_SHARDS_PER_THREAD,
    SHARDS_FORMAT,
    load_manifest,
    load_shards,
    write_lines,
)
from unitdist.errors import ConfigError, DataError


def file_lines(*rows: tuple[str, int, str]) -> list[str]:
    return [f"{path}\t{label}\t10\t5\t5\t00000000\t{verdict}\t" for path, label, verdict in rows]


GOOD = file_lines(("a/1.jpg", 0, "ok"), ("a/2.jpg", 0, "truncated JPEG: no end marker"), ("b/3.jpg", 1, "ok"))


def test_manifest_keeps_the_good_images_only(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.tsv", FILES_FORMAT, {"classes": ["a", "b"]}, GOOD)
    index = load_manifest(tmp_path / "train.tsv", tmp_path / "train")
    assert index.paths == ["a/1.jpg", "b/3.jpg"] and index.labels.tolist() == [0, 1]
    assert index.class_to_idx == {"a": 0, "b": 1} and index.ignored == 1
    assert index.name(1) == str(tmp_path / "train" / "b" / "3.jpg")


def test_missing_foreign_and_cut_off_lists_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    with pytest.raises(ConfigError, match=r"data.path: no such file: .*train.tsv; make it with python tools/data.py"):
        load_manifest(path, tmp_path)
    path.write_text("a/1.jpg,0\n")
    with pytest.raises(DataError, match="is no unitdist-files-1 file"):
        load_manifest(path, tmp_path)
    write_lines(path, FILES_FORMAT, {"classes": ["a", "b"]}, GOOD)
    path.write_text(path.read_text()[:-10])
    with pytest.raises(DataError, match="is damaged: 2 whole lines, its header announces 3"):
        load_manifest(path, tmp_path)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../x.jpg"])
def test_names_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / "t.tsv", FILES_FORMAT, {"classes": ["a"]}, file_lines((name, 0, "ok")))
    with pytest.raises(DataError, match="names a file outside its folder: .*: refused"):
        load_manifest(tmp_path / "t.tsv", tmp_path)


def test_classes_without_readable_images_and_wild_labels_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    write_lines(path, FILES_FORMAT, {"classes": ["a", "b", "c"]}, GOOD)
    with pytest.raises(DataError, match="1 of 3 classes hold no image: c$"):
        load_manifest(path, tmp_path)
    write_lines(path, FILES_FORMAT, {"classes": ["a"]}, GOOD)
    with pytest.raises(DataError, match="labels from 0 to 1 for 1 class"):
        load_manifest(path, tmp_path)
    write_lines(path, FILES_FORMAT, {"classes": ["a"]}, file_lines(("a/1.jpg", 0, "empty file")))
    with pytest.raises(DataError, match="lists no readable image"):
        load_manifest(path, tmp_path)


def write_shards(folder: Path, shards: int, images: int) -> None:
    """Shards of single bytes: image i of shard s is the byte s * images + i."""
    lines = []
    for shard in range(shards):
        (folder / f"{shard:03d}.tar").write_bytes(bytes(range(shard * images, (shard + 1) * images)))
        lines += [f"{shard}\t{i}\t1\t{i % 2}\t00000000\tx{shard}_{i}.jpg" for i in range(images)]
    header = {"kind": "webdataset", "classes": ["a", "b"], "shards": [f"{s:03d}.tar" for s in range(shards)]}
    write_lines(folder / "index.tsv", SHARDS_FORMAT, header, lines)


def test_shards_are_read_at_random_with_few_files_open(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=40, images=6)
    index = load_shards(tmp_path / "index.tsv", "webdataset", window_samples=24)
    before = len(list(Path("/proc/self/fd").iterdir()))
    ids = np.random.default_rng(0).permutation(240).tolist()
    assert [index.read(i)[0] for i in ids] == ids
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + OPEN_SHARDS_PER_THREAD
    assert index.name(7) == f"{tmp_path / '001.tar'}:x1_1.jpg"
    order = index.order(0, 1)
    assert sorted(order.tolist()) == list(range(240))
    for start in range(0, 240, 24):
        assert len({i // 6 for i in order[start : start + 24].tolist()}) <= 5
    assert order.tolist() != index.order(0, 2).tolist()


def test_wrong_kind_and_missing_shards_are_the_users_error(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=3, images=6)
    with pytest.raises(ConfigError, match="is an index of webdataset files, not of tfrecord"):
        load_shards(tmp_path / "index.tsv", "tfrecord", window_samples=8)
    (tmp_path / "001.tar").unlink()
    with pytest.raises(ConfigError, match="1 of 3 shards are missing, first .*001.tar"):
        load_shards(tmp_path / "index.tsv", "webdataset", window_samples=8)


LIMITS = """
import resource, sys, time
from pathlib import Path
import unitdist.data.build
from unitdist.data.manifest import load_manifest, load_shards
from unitdist.data.order import training_plan
from unitdist.world import World
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.process_time()
if path.name == "train.tsv":
    source = load_manifest(path, path.parent)
else:
    source = load_shards(path, "webdataset", window_samples=8192)
loaded = time.process_time()
plan = training_plan(source.order(0, 3), 640_000, World(rank=5, local_rank=5, size=8, local_size=8), 32)
source.content_hash
restored = time.process_time()
peak_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(len(source), len(plan.sample_ids), loaded - began, restored - loaded, peak_mib)
"""


@pytest.mark.parametrize("kind", ["manifest", "webdataset"])
def test_imagenets_length_loads_in_3_s_and_400_mib_and_resumes_in_3_s(tmp_path: Path, kind: str) -> None:
    count, classes = 1_281_167, [f"n{i:08d}" for i in range(1000)]
    if kind == "manifest":
        path = tmp_path / "train.tsv"
        tail = "\t110592\t375\t500\t89abcdef\tok\t"
        lines = [f"{classes[i % 1000]}/{classes[i % 1000]}_{i}.JPEG\t{i % 1000}{tail}" for i in range(count)]
        write_lines(path, FILES_FORMAT, {"classes": classes}, lines)
    else:
        path = tmp_path / "index.tsv"
        shards = [f"{i:06d}.tar" for i in range(1282)]
        for name in shards:
            (tmp_path / name).touch()
        lines = [
            f"{i // 1000}\t{i % 1000 * 110592 + 512}\t110000\t{i % 1000}\t89abcdef\t{classes[i % 1000]}/{i}.jpg"
            for i in range(count)
        ]
        write_lines(path, SHARDS_FORMAT, {"kind": kind, "classes": classes, "shards": shards}, lines)
    command = [sys.executable, "-c", LIMITS, str(path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split()
    samples, batches, load_s, restore_s, peak_mib = (float(value) for value in output)
    assert (samples, batches) == (count, (count - 640_000) // 256)
    assert load_s < 3 and restore_s < 3 and peak_mib < 400
