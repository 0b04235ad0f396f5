"""tools/data.py: from odd files and ImageNet's download formats to sources that loaders read."""

import csv
import importlib
import importlib.util
import io
import random
import shutil
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unitdist.config import DataConfig
from unitdist.data.batch import Batch
from unitdist.data.build import build_train_loader, build_val_loader, open_source
from unitdist.world import World

TOOLS = Path(__file__).resolve().parents[2] / "tools"
RunData = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunData:
    """run_data("scan", folder, ...) -> (exit code, stdout, stderr), in this process."""
    monkeypatch.syspath_prepend(str(TOOLS))
    data = importlib.import_module("data")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["data.py", *map(str, arguments)])
        code = data.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def jpeg(photograph: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    photograph.save(buffer, format="JPEG", **options)
    return buffer.getvalue()


def as_format(photograph: Image.Image, image_format: str, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    (photograph.convert(mode) if mode else photograph).save(buffer, format=image_format)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG from raw rows, for what Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_size(data: bytes, height: int, width: int) -> bytes:
    """A baseline JPEG that announces another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def damaged_scan(data: bytes) -> bytes:
    """200 random bytes in the middle of the compressed pixels; no marker arises."""
    middle = len(data) * 3 // 4
    return data[:middle] + bytes(random.Random(0).choices(range(255), k=200)) + data[middle + 200 :]


def odd_files(photograph: Image.Image) -> dict[str, tuple[bytes | None, str]]:
    """{name: (content, verdict of the scan)}; None: a dangling link."""
    good, exif = jpeg(photograph, quality=90), Image.Exif()
    exif[0x0112] = 6
    refuses, foreign = "the decoder refuses it", "not a JPEG, PNG, WebP or BMP image"
    return {
        "half.jpg": (good[: len(good) // 2], "truncated JPEG: no end marker"),
        "last_2_bytes.jpg": (good[:-2], "truncated JPEG: no end marker"),
        "100_bytes.jpg": (good[:100], "truncated JPEG: no image header"),
        "text.jpg": (b"<html>404 not found</html>", foreign),
        "zeros.jpg": (b"\x00" * 5000, foreign),
        "gif.jpg": (as_format(photograph, "GIF", "P"), foreign),
        "tiff.jpg": (as_format(photograph, "TIFF"), foreign),
        "empty.jpg": (b"", "empty file"),
        "dangling.jpg": (None, "No such file or directory"),
        "no_tables.jpg": (good.replace(b"\xff\xdb", b"\xff\xfe"), refuses),
        "no_size.jpg": (with_size(good, 0, 0), "JPEG of size 0 x 0"),
        "bomb.jpg": (with_size(good, 9000, 12000), "12000 x 9000 pixels exceed the limit"),
        "bomb.png": (png(20_000, 20_000, 1, 0, b"\x00" * 2501 * 20_000), "20000 x 20000 pixels exceed the limit"),
        "half.png": (as_format(photograph, "PNG")[:5000], "truncated PNG: no end chunk"),
        "random_scan.jpg": (damaged_scan(good), "ok"),  # no decoder can know: only checksums do
        "cmyk.jpg": (jpeg(photograph.convert("CMYK")), "ok"),
        "gray.jpg": (jpeg(photograph.convert("L")), "ok"),
        "progressive.jpg": (jpeg(photograph, progressive=True), "ok"),
        "444.jpg": (jpeg(photograph, subsampling=0), "ok"),
        "turned.jpg": (jpeg(photograph, exif=exif), "ok"),
        "broken_exif.jpg": (jpeg(photograph, exif=b"Exif\x00\x00" + b"\xff" * 50), "ok"),
        "trailing.jpg": (good + b"\x00" * 1000, "ok"),
        "png.jpg": (as_format(photograph, "PNG"), "ok"),
        "rgba.png": (as_format(photograph, "PNG", "RGBA"), "ok"),
        "palette.png": (as_format(photograph, "PNG", "P"), "ok"),
        "rgb16.png": (png(40, 30, 16, 2, (b"\x00" + b"\x12\x34" * 120) * 30), "ok"),
        "gray16.png": (png(40, 30, 16, 0, (b"\x00" + b"\x80\x00" * 40) * 30), "ok"),
        "webp.jpg": (as_format(photograph, "WEBP"), "ok"),
        "bmp.jpg": (as_format(photograph, "BMP"), "ok"),
        "1x1.jpg": (jpeg(Image.new("RGB", (1, 1))), "ok"),
        "wide.jpg": (jpeg(Image.new("RGB", (6000, 10))), "ok"),
        "high.jpg": (jpeg(Image.new("RGB", (10, 6000))), "ok"),
    }


@pytest.fixture
def odd_folder(sample_data: Path, tmp_path: Path) -> tuple[Path, dict[str, tuple[bytes | None, str]]]:
    """root/train with the 32 odd files in class odd beside class cat; root/val likewise, all good."""
    for split in ("train", "val"):
        for class_name, source in (("cat", "cat"), ("odd", "moon")):
            shutil.copytree(sample_data / split / source, tmp_path / split / class_name)
    with Image.open(sample_data / "train" / "coffee" / "coffee_0000.jpg") as opened:
        files = odd_files(opened.convert("RGB").resize((160, 120)))
    for name, (content, _) in files.items():
        path = tmp_path / "train" / "odd" / name
        if content is None:
            path.symlink_to("nowhere.jpg")
        else:
            path.write_bytes(content)
    return tmp_path, files


def test_scan_gives_each_of_32_odd_files_its_verdict_and_training_agrees(odd_folder, run_data: RunData) -> None:
    root, files = odd_folder
    code, output, _ = run_data("scan", root / "train", "--threads", 2)
    assert code == 0
    rows = [line.split("\t") for line in (root / "train.tsv").read_text().split("\n")[1:-1]]
    verdicts = {Path(row[0]).name: row[6] for row in rows if Path(row[0]).name in files}
    assert verdicts == {name: verdict for name, (_, verdict) in files.items()}
    bad = {name for name, (_, verdict) in files.items() if verdict != "ok"}
    for name in bad:
        assert f"bad: {root / 'train' / 'odd' / name} ({verdicts[name]})" in output
    assert f"{24 + len(files) - len(bad)} good and {len(bad)} bad images in 2 classes" in output
    assert "odd, but fine: 1 cmyk (cmyk)" in output and "odd, but fine: 1 png named .jpg (png)" in output
    crc_of = {Path(row[0]).name: row[5] for row in rows}
    assert crc_of["cmyk.jpg"] == f"{zlib.crc32((root / 'train' / 'odd' / 'cmyk.jpg').read_bytes()):08x}"

    def config(**changes: object) -> DataConfig:
        sizes = {"image_size_px": 32, "scale_range_px": (40, 64), "val_resize_px": 40, "num_threads": 1}
        return DataConfig(path=str(root), **(sizes | changes))  # type: ignore[arg-type]

    arguments = {"per_rank_batch_size": 6, "seed": 0, "device": torch.device("cpu")}
    from_manifest = build_train_loader(config(source="manifest"), World.single(), **arguments)
    assert len(list(from_manifest.iterate(0))) == (24 + len(files) - len(bad)) // 6
    assert from_manifest.broken == {}
    for loader_name in ("dali", "torchvision"):
        settings = config(loader=loader_name, on_broken="replace", max_broken_share=0.5)
        loader = build_train_loader(settings, World.single(), **(arguments | {"per_rank_batch_size": 8}))
        for epoch in range(2):
            assert len(list(loader.iterate(epoch))) == 7
        assert {Path(name).name for name in loader.broken} == bad
        loader.close()
    from_manifest.close()


def test_scan_without_dali_says_what_to_install_and_other_verbs_work(
    sample_data: Path, run_data: RunData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "unitdist.data.dali_check", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    code, _, error = run_data("scan", sample_data / "val")
    assert code == 2 and error.startswith("error: scan needs NVIDIA DALI: pip install 'unitdist[dali-cuda13]'")
    assert run_data("audit", sample_data)[0] == 0


def test_verbs_name_impossible_arguments_and_files(sample_data: Path, tmp_path: Path, run_data: RunData) -> None:
    for arguments, code, message in (
        (("scan", sample_data / "val", "--threads", 0), 2, "--threads and --max-megapixels must be >= 1"),
        (("scan", tmp_path / "none"), 2, f"data.path: no such folder: {tmp_path / 'none'}"),
        (("scan", sample_data / "val", "--output", tmp_path / "no" / "m.tsv"), 1, str(tmp_path / "no" / "m.tsv.part")),
        (("bench", sample_data, "--threads", 0), 2, "--threads must be >= 1"),
        (("bench", tmp_path), 2, "no folder, manifest or index of split train"),
        (("audit", sample_data, "--world", 0), 2, "--world, --batch and --epochs must be >= 1"),
        (("pack", sample_data / "val", "--output", tmp_path, "--quality", 0), 2, "--quality in 1..100"),
        (("index", tmp_path, "--kind", "webdataset"), 1, "holds no webdataset files"),
        (("prepare-train", tmp_path / "x.tar", "--output", tmp_path), 2, f"no such file: {tmp_path / 'x.tar'}"),
        (("prepare-val", tmp_path / "x.tar", "--labels", "l", "--output", "o"), 2, "no such file or folder"),
    ):
        found, _, error = run_data(*arguments)
        assert found == code and error.startswith("error: ") and message in error, (arguments, error)


def test_interrupted_scan_continues_and_gives_the_same_manifest(
    odd_folder, run_data: RunData, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = odd_folder
    scan = importlib.import_module("data_verbs.scan")
    monkeypatch.setattr(scan, "BATCH", 10)
    run_data("scan", root / "train", "--output", root / "whole.tsv")
    check_batch, calls = scan.check_batch, []

    def interrupted(*arguments: object) -> list[str]:
        calls.append(arguments[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return check_batch(*arguments)

    monkeypatch.setattr(scan, "check_batch", interrupted)
    code, _, error = run_data("scan", root / "train")
    assert code == 130 and "continue where they were" in error
    with open(root / "train.tsv.part", "a") as part:
        part.write("half a li")
    code, _, _ = run_data("scan", root / "train")
    assert code == 0 and calls[3] == range(20, 30)
    assert (root / "train.tsv").read_text() == (root / "whole.tsv").read_text()
    assert not (root / "train.tsv.part").exists()


def columns(batches: list[Batch]) -> tuple[list[int], torch.Tensor]:
    return torch.cat([b.sample_ids for b in batches]).tolist(), torch.cat([b.images for b in batches])


def small(root: Path, source: str, **changes: object) -> DataConfig:
    values = {"image_size_px": 32, "scale_range_px": (40, 64), "val_resize_px": 40, "num_threads": 1}
    return DataConfig(path=str(root), source=source, shuffle_window=40, **(values | changes))  # type: ignore[arg-type]


def loader_of(config: DataConfig, rank: int = 0, size: int = 1, batch: int = 12):
    world = World(rank=rank, local_rank=rank, size=size, local_size=size)
    return build_train_loader(config, world, per_rank_batch_size=batch, seed=3, device=torch.device("cpu"))


def write_tfrecords(root: Path, split: str, index) -> None:
    test_shards = importlib.util.spec_from_file_location(
        "shards_of_tests", Path(__file__).parents[1] / "data" / "test_shards.py"
    )
    module = importlib.util.module_from_spec(test_shards)
    test_shards.loader.exec_module(module)
    names = list(index.class_to_idx)
    (root / split).mkdir(parents=True)
    for start in range(0, len(index), 25):
        records = [
            module.example({"image/encoded": index.read(i), "image/class/synset": names[index.labels[i]].encode()})
            for i in range(start, min(start + 25, len(index)))
        ]
        (root / split / f"{split}-{start // 25:05d}-of-00008").write_bytes(module.tfrecord(records))


@pytest.fixture
def packed(sample_data: Path, tmp_path: Path, run_data: RunData) -> Path:
    """The sample data as tars/{train,val} (pack) and records/{train,val} (index)."""
    for split in ("train", "val"):
        target = tmp_path / "tars" / split
        code, output, _ = run_data(
            "pack", sample_data / split, "--output", target, "--images-per-shard", 20, "--workers", 1
        )
        assert code == 0 and "verified" in output
        write_tfrecords(tmp_path / "records", split, open_source(DataConfig(), sample_data / split))
        code, output, _ = run_data("index", tmp_path / "records" / split, "--kind", "tfrecord")
        assert code == 0 and "images of 16 classes" in output
    return tmp_path


@pytest.mark.parametrize(("source", "folder"), [("webdataset", "tars"), ("tfrecord", "records")])
def test_shards_hold_the_same_images_and_keep_every_promise_of_the_loaders(
    packed: Path, sample_data: Path, source: str, folder: str
) -> None:
    config = small(packed / folder, source)
    files, shards = open_source(DataConfig(), sample_data / "train"), open_source(config, packed / folder / "train")
    assert shards.class_to_idx == files.class_to_idx
    by_content = {files.read(i): int(files.labels[i]) for i in range(len(files))}
    assert {shards.read(i): int(shards.labels[i]) for i in range(len(shards))} == by_content
    ids, images = columns(list(loader_of(config).iterate(1)))
    assert len(set(ids)) == 192
    ranks = [list(loader_of(config, rank, 3, 4).iterate(1)) for rank in range(3)]
    job_ids, job_images = columns([ranks[rank][step] for step in range(16) for rank in range(3)])
    assert job_ids == ids and torch.equal(job_images, images)
    rest_ids, rest_images = columns(list(loader_of(config).iterate(1, start_sample=60)))
    assert rest_ids == ids[60:] and torch.equal(rest_images, images[60:])
    validation = [
        b
        for rank in range(3)
        for b in build_val_loader(
            config,
            World(rank=rank, local_rank=rank, size=3, local_size=3),
            per_rank_batch_size=7,
            device=torch.device("cpu"),
        ).iterate(0)
    ]
    assert sorted(i for b in validation for i in b.sample_ids[b.valid].tolist()) == list(range(80))


def test_pack_continues_gives_the_same_bytes_and_refuses_other_arguments(
    packed: Path, sample_data: Path, run_data: RunData
) -> None:
    target = packed / "tars" / "train"
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    (target / "000003.tar").unlink()
    (target / "index.tsv").unlink()
    arguments = ("pack", sample_data / "train", "--output", target, "--images-per-shard", 20, "--workers", 1)
    assert run_data(*arguments)[0] == 0
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    code, _, error = run_data(*arguments, "--seed", 5)
    assert code == 2 and error == f"error: {target} was packed with other seed: give another --output\n"
    content = bytearray(before["000002.tar"])
    content[5000] ^= 1
    (target / "000002.tar").write_bytes(content)
    code, _, error = run_data(*arguments)
    assert code == 1 and "000002.tar" in error and "pack again" in error


def test_pack_shrinks_larger_images_to_the_asked_side(sample_data: Path, tmp_path: Path, run_data: RunData) -> None:
    arguments = ("--output", tmp_path, "--resize-shorter", 64, "--workers", 1)
    assert run_data("pack", sample_data / "val", *arguments)[0] == 0
    index = open_source(DataConfig(source="webdataset"), tmp_path)
    sizes, modes = set(), set()
    for i in range(len(index)):
        with Image.open(io.BytesIO(index.read(i))) as image:
            sizes.add(min(image.size))
            modes.add(image.mode)
    assert sizes == {64} and modes == {"L", "RGB"}


def test_index_finds_in_packed_tars_what_pack_wrote(packed: Path, run_data: RunData) -> None:
    target = packed / "tars" / "train"
    before = (target / "index.tsv").read_text()
    code, _, _ = run_data("index", target, "--kind", "webdataset", "--classes", target / "classes.txt")
    assert code == 0 and (target / "index.tsv").read_text() == before
    (packed / "few.txt").write_text("a\nb\n")
    code, _, error = run_data("index", target, "--kind", "webdataset", "--classes", packed / "few.txt")
    assert code == 2 and "few.txt has 2 names, the shards have 16 classes" in error


def test_audit_proves_exactly_once_for_each_source(packed: Path, sample_data: Path, run_data: RunData) -> None:
    for folder, source in ((sample_data, "folder"), (packed / "tars", "webdataset")):
        for world, batch in ((1, 32), (5, 7), (8, 3)):
            code, output, _ = run_data("audit", folder, "--source", source, "--world", world, "--batch", batch)
            steps, left_out = divmod(192, world * batch)
            assert code == 0
            expected = f"epoch 2: {steps} steps x {world} ranks x {batch} images, none twice, {left_out} left out"
            assert expected in output
            assert f"each of 192 images exactly once on {world} ranks" in output


def test_audit_finds_a_repeated_sample(sample_data: Path, run_data: RunData, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = importlib.import_module("data_verbs.audit")
    plan = audit.training_plan

    def repeating(*arguments: object):
        result = plan(*arguments)
        result.sample_ids[-1] = result.sample_ids[0]
        return result

    monkeypatch.setattr(audit, "training_plan", repeating)
    code, _, error = run_data("audit", sample_data, "--world", 2, "--batch", 8)
    assert code == 1 and "images twice" in error


def test_stats_are_those_of_the_pixels_and_a_picture_is_drawn(
    sample_data: Path, tmp_path: Path, run_data: RunData
) -> None:
    code, output, _ = run_data("stats", sample_data, "--split", "val", "--picture", tmp_path / "sizes.png")
    pixels = []
    for path in sorted((sample_data / "val").glob("*/*")):
        with Image.open(path) as image:
            pixels.append(np.asarray(image.convert("RGB")).reshape(-1, 3))
    mean, std = (getattr(np.concatenate(pixels) / 255, name)(axis=0).round(4).tolist() for name in ("mean", "std"))
    assert code == 0
    assert f"looked at 80: mean {mean}, std {std}" in output
    assert "80 images in 16 classes, 5 to 5 per class" in output
    with Image.open(tmp_path / "sizes.png") as picture:
        assert picture.width > 500


def test_bench_prints_a_line_per_source_and_number_of_threads(
    sample_data: Path, tmp_path: Path, run_data: RunData
) -> None:
    code, _, error = run_data("bench", sample_data, "--images", 192, "--threads", 1, 2)
    assert code == 2 and error == "error: the split and --images must hold at least 256 images\n"
    for number in range(2):
        shutil.copytree(sample_data / "train", tmp_path / "train" if number == 0 else tmp_path / "more")
    for path in list((tmp_path / "more").glob("*/*")):
        path.rename(tmp_path / "train" / path.parent.name / f"more_{path.name}")
    code, output, _ = run_data("bench", tmp_path, "--images", 320, "--threads", 1, 2)
    assert code == 0
    assert output.count("| folder | ") == 2 and "fastest here: data.source=folder data.num_threads=" in output


def imagenet_downloads(folder: Path, sample_data: Path) -> dict[str, list[str]]:
    """Small files in the exact formats of ILSVRC2012_img_train.tar, _img_val.tar, _devkit_t12.tar.gz and the CSV.

    Returns {class: names of its validation images}.
    """
    from scipy.io import savemat

    classes = {"n01440764": "cat", "n01443537": "moon", "n04579145": "brick"}
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w", format=tarfile.USTAR_FORMAT) as outer:
        for wnid, name in classes.items():
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as inner:
                for number, path in enumerate(sorted((sample_data / "train" / name).iterdir())):
                    inner.add(path, arcname=f"{wnid}_{number}.JPEG")
            info = tarfile.TarInfo(f"{wnid}.tar")
            info.size = len(buffer.getvalue())
            outer.addfile(info, io.BytesIO(buffer.getvalue()))
    # ILSVRC2012_IDs are not in the order of the WordNet ids.
    ids = {"n01440764": 3, "n01443537": 1, "n04579145": 2}
    images = [(wnid, path) for wnid, name in classes.items() for path in sorted((sample_data / "val" / name).iterdir())]
    random.Random(0).shuffle(images)
    names: dict[str, list[str]] = {wnid: [] for wnid in classes}
    truth, rows = [], []
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (wnid, path) in enumerate(images, 1):
            file_name = f"ILSVRC2012_val_{number:08d}.JPEG"
            archive.add(path, arcname=file_name)
            names[wnid].append(file_name)
            truth.append(str(ids[wnid]))
            rows.append((Path(file_name).stem, f"{wnid} 85 1 499 272 "))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.array([(ids[wnid], wnid, name, 0) for wnid, name in classes.items()], dtype=kind)
    savemat(folder / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    (folder / "truth.txt").write_text("\n".join(truth) + "\n")
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as devkit:
        devkit.add(folder / "meta.mat", "ILSVRC2012_devkit_t12/data/meta.mat")
        devkit.add(folder / "truth.txt", "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt")
    with open(folder / "LOC_val_solution.csv", "w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "PredictionString"), *sorted(rows, reverse=True)])
    return names


def test_imagenet_downloads_become_a_first_epoch_step_by_step(
    sample_data: Path, tmp_path: Path, run_data: RunData
) -> None:
    names = imagenet_downloads(tmp_path, sample_data)
    root = tmp_path / "imagenet"
    code, output, _ = run_data("prepare-train", tmp_path / "ILSVRC2012_img_train.tar", "--output", root / "train")
    assert (code, output) == (0, f"36 images in 3 class folders under {root / 'train'}\n")
    shutil.rmtree(root / "train" / "n01443537")
    assert run_data("prepare-train", tmp_path / "ILSVRC2012_img_train.tar", "--output", root / "train")[1] == output
    val = ("prepare-val", tmp_path / "ILSVRC2012_img_val.tar", "--labels")
    assert run_data(*val, tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "--output", root / "val")[0] == 0
    assert run_data(*val, tmp_path / "LOC_val_solution.csv", "--output", tmp_path / "by_csv")[0] == 0
    flat = tmp_path / "flat"
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar") as archive:
        archive.extractall(flat, filter="data")
    folder_val = (
        "prepare-val",
        flat,
        "--labels",
        tmp_path / "LOC_val_solution.csv",
        "--output",
        tmp_path / "by_folder",
    )
    assert run_data(*folder_val)[0] == 0
    for made in (root / "val", tmp_path / "by_csv", tmp_path / "by_folder"):
        assert {d.name: sorted(f.name for f in d.iterdir()) for d in made.iterdir()} == names
    assert run_data("scan", root / "train")[0] == run_data("scan", root / "val")[0] == 0
    config = small(root, "manifest")
    assert len(list(loader_of(config, batch=6).iterate(0))) == 6
    val_loader = build_val_loader(config, World.single(), per_rank_batch_size=4, device=torch.device("cpu"))
    assert sum(int(batch.valid.sum()) for batch in val_loader.iterate(0)) == 15
    assert val_loader.class_to_idx == {"n01440764": 0, "n01443537": 1, "n04579145": 2}


def test_wrong_labels_and_hostile_archives_are_refused(sample_data: Path, tmp_path: Path, run_data: RunData) -> None:
    imagenet_downloads(tmp_path, sample_data)
    images, output = tmp_path / "ILSVRC2012_img_val.tar", tmp_path / "val"
    lines = (tmp_path / "LOC_val_solution.csv").read_text().split("\n")
    (tmp_path / "short.csv").write_text("\n".join(lines[:5]))
    code, _, error = run_data("prepare-val", images, "--labels", tmp_path / "short.csv", "--output", output)
    assert code == 1 and "says nothing about 11 images, first ILSVRC2012_val_" in error
    code, _, error = run_data("prepare-val", images, "--labels", tmp_path / "none.csv", "--output", output)
    assert code == 2 and "no such file or folder" in error
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        info = tarfile.TarInfo("../../evil.JPEG")
        archive.addfile(info, io.BytesIO())
    code, _, error = run_data(
        "prepare-val", tmp_path / "evil.tar", "--labels", tmp_path / "LOC_val_solution.csv", "--output", output
    )
    assert code == 1 and "'../../evil.JPEG', expected plain file names: refused" in error
    (tmp_path / "evil.csv").write_text("ILSVRC2012_val_00000001,../evil\n")
    code, _, error = run_data("prepare-val", images, "--labels", tmp_path / "evil.csv", "--output", output)
    assert code == 1 and "'../evil', expected plain file names: refused" in error
    (tmp_path / "cut.tar").write_bytes((tmp_path / "ILSVRC2012_img_train.tar").read_bytes()[:300_000])
    code, _, error = run_data("prepare-train", tmp_path / "cut.tar", "--output", tmp_path / "t")
    assert code == 1 and "cut.tar is damaged or cut off" in error
