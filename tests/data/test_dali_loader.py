"""dali_loader.py: the same batches on any world size, after any interruption and with any number of threads."""

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unitdist.config import DataConfig
from unitdist.data.batch import Batch, Loader
from unitdist.data.index import scan_image_folder
from unitdist.errors import DataError

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
MakeConfig = Callable[..., DataConfig]
BuildLoader = Callable[..., Loader]


def columns(batches: list[Batch]) -> tuple[list[int], torch.Tensor]:
    return torch.cat([b.sample_ids for b in batches]).tolist(), torch.cat([b.images for b in batches])


def test_batches_have_the_promised_form(small_config: MakeConfig, build_loader: BuildLoader) -> None:
    loader = build_loader(small_config(), batch=8)
    batch = next(iter(loader.iterate(0)))
    assert batch.images.shape == (8, 3, 32, 32) and batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == batch.sample_ids.dtype == torch.int64 and batch.valid.tolist() == [True] * 8
    index = scan_image_folder(Path(small_config().path) / "train")
    assert batch.labels.tolist() == index.labels[batch.sample_ids.numpy()].tolist()
    assert (loader.num_samples, len(loader.class_to_idx), loader.batches_per_epoch) == (192, 16, 24)


@pytest.mark.parametrize("augmentation", ["scale", "random_resized_crop"])
def test_every_world_size_sees_the_same_samples_and_pixels_in_the_same_order(
    small_config: MakeConfig, build_loader: BuildLoader, augmentation: str
) -> None:
    config = small_config(augmentation=augmentation)
    ids, images = columns(list(build_loader(config, batch=12).iterate(1)))
    for size in (2, 3):
        ranks = [list(build_loader(config, rank=r, size=size, batch=12 // size).iterate(1)) for r in range(size)]
        job = [ranks[rank][step] for step in range(16) for rank in range(size)]
        job_ids, job_images = columns(job)
        assert job_ids == ids
        assert torch.equal(job_images, images)


@pytest.mark.parametrize("augmentation", ["scale", "random_resized_crop"])
def test_resume_anywhere_gives_the_same_batches_bit_for_bit(
    small_config: MakeConfig, build_loader: BuildLoader, augmentation: str
) -> None:
    whole = list(build_loader(small_config(augmentation=augmentation), rank=1, size=2, batch=8).iterate(3))
    assert len(whole) == 12
    other = small_config(augmentation=augmentation, num_threads=2, prefetch_batches=3)
    resumed = build_loader(other, rank=1, size=2, batch=8)
    for step in (0, 1, 7, 11, 12):
        rest = list(resumed.iterate(3, start_sample=step * 16))
        assert len(rest) == 12 - step
        for ours, expected in zip(rest, whole[step:], strict=True):
            assert ours.sample_ids.tolist() == expected.sample_ids.tolist()
            assert torch.equal(ours.images, expected.images)


def test_another_world_size_continues_with_the_remaining_samples(
    small_config: MakeConfig, build_loader: BuildLoader
) -> None:
    ids, images = columns(list(build_loader(small_config(), batch=12).iterate(0)))
    ranks = [list(build_loader(small_config(), rank=r, size=3, batch=4).iterate(0, start_sample=60)) for r in range(3)]
    job_ids, job_images = columns([ranks[rank][step] for step in range(11) for rank in range(3)])
    assert job_ids == ids[60:]
    assert torch.equal(job_images, images[60:])


@pytest.mark.parametrize("augmentation", ["scale", "random_resized_crop"])
def test_leaving_an_epoch_early_does_not_disturb_the_next(
    small_config: MakeConfig, build_loader: BuildLoader, augmentation: str
) -> None:
    loader = build_loader(small_config(augmentation=augmentation), batch=16)
    expected = list(loader.iterate(1))
    iterator = loader.iterate(0)
    next(iterator)
    del iterator
    for ours, reference in zip(loader.iterate(1), expected, strict=True):
        assert torch.equal(ours.images, reference.images)


def test_epochs_and_seeds_draw_other_orders_and_windows(small_config: MakeConfig, build_loader: BuildLoader) -> None:
    config = small_config()
    runs = [columns(list(build_loader(config, batch=16, seed=s).iterate(e))) for s, e in ((0, 0), (0, 1), (1, 0))]
    for ids, _ in runs:
        assert sorted(ids) == list(range(192))
    pixels = [images[np.argsort(ids)] for ids, images in runs]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert runs[first][0] != runs[second][0]
        assert (pixels[first] != pixels[second]).flatten(1).any(1).float().mean() > 0.95


def test_full_and_region_decoding_agree_to_one_grey_level(small_config: MakeConfig, build_loader: BuildLoader) -> None:
    for augmentation in ("scale", "random_resized_crop"):
        region, full = (
            columns(list(build_loader(small_config(augmentation=augmentation, roi_decode=roi), batch=16).iterate(0)))[1]
            for roi in (True, False)
        )
        grey_levels = (region - full).abs() * 255 * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        assert grey_levels.max() < 1.01


@pytest.mark.parametrize(("size", "batch"), [(1, 16), (3, 7), (2, 64)])
def test_validation_yields_each_image_once_and_equal_batches_on_all_ranks(
    small_config: MakeConfig, build_loader: BuildLoader, size: int, batch: int
) -> None:
    reference = columns(list(build_loader(small_config(), batch=20, training=False).iterate(0)))[1]
    seen: list[int] = []
    counts = set()
    for rank in range(size):
        loader = build_loader(small_config(), rank=rank, size=size, batch=batch, training=False)
        for _epoch in range(2):
            batches = list(loader.iterate(0))
        counts.add((len(batches), loader.batches_per_epoch))
        for b in batches:
            assert b.images.shape[0] == batch
            seen += b.sample_ids[b.valid].tolist()
            assert torch.equal(b.images[b.valid], reference[b.sample_ids[b.valid]])
    assert sorted(seen) == list(range(80))
    assert len(counts) == 1


def copy_train(sample_data: Path, target: Path) -> Path:
    shutil.copytree(sample_data, target)
    return target


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def refused_by_decoders_only(path: Path) -> None:
    """A JPEG whose header and end are whole and whose quantization tables are gone."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\xff\xdb", b"\xff\xfe"))


@pytest.mark.parametrize(
    ("damage", "augmentation"),
    [
        (cut_file, "scale"),
        (refused_by_decoders_only, "scale"),
        (refused_by_decoders_only, "random_resized_crop"),
        (Path.unlink, "scale"),
    ],
)
def test_unreadable_jpeg_stops_with_its_name_or_is_replaced_within_its_class(
    sample_data: Path,
    tmp_path: Path,
    small_config: MakeConfig,
    build_loader: BuildLoader,
    damage: Callable,
    augmentation: str,
) -> None:
    root = copy_train(sample_data, tmp_path / "data")
    victim = root / "train" / "coffee" / "coffee_0003.jpg"
    stops = small_config(path=str(root), augmentation=augmentation)
    replaces = replace(stops, on_broken="replace", max_broken_share=0.01)
    stopping, replacing, resumed = (build_loader(config, batch=16) for config in (stops, replaces, replaces))
    untouched = list(replacing.iterate(0))
    damage(victim)
    with pytest.raises(DataError, match=rf"^unreadable image {victim} \(.+\); repair or remove it"):
        list(stopping.iterate(0))
    batches = list(replacing.iterate(0))
    assert list(replacing.broken) == [str(victim)]
    assert len(batches) == len(untouched)
    different = []
    for ours, whole in zip(batches, untouched, strict=True):
        assert ours.sample_ids.tolist() == whole.sample_ids.tolist()
        rows = (ours.images != whole.images).flatten(1).any(1)
        different += ours.sample_ids[rows].tolist()
    index = scan_image_folder(sample_data / "train")
    assert [index.paths[i] for i in different] == ["coffee/coffee_0003.jpg"]
    for ours, expected in zip(resumed.iterate(0, start_sample=64), batches[4:], strict=True):
        assert torch.equal(ours.images, expected.images)


def test_more_broken_images_than_allowed_stop_the_run(
    sample_data: Path, tmp_path: Path, small_config: MakeConfig, build_loader: BuildLoader
) -> None:
    root = copy_train(sample_data, tmp_path / "data")
    for number in range(3):
        cut_file(root / "train" / "cat" / f"cat_{number:04d}.jpg")
    loader = build_loader(small_config(path=str(root), on_broken="replace", max_broken_share=0.0105), batch=16)
    with pytest.raises(DataError, match=r"^3 unreadable images, more than the 2 that data.max_broken_share allows"):
        list(loader.iterate(0))


def test_dali_that_stops_without_a_bad_image_is_told_apart(
    small_config: MakeConfig, build_loader: BuildLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unitdist.data import dali_graph

    build_pipeline, built = dali_graph.build_pipeline, []

    def failing(*_: object) -> None:
        raise RuntimeError("no driver")

    def broken_at_the_third_run(*arguments: object):
        pipeline = build_pipeline(*arguments)  # type: ignore[arg-type]
        if not built:
            run, calls = pipeline.run, []

            def third_fails(*stream: object):
                calls.append(1)
                if len(calls) == 3:
                    raise RuntimeError("out of memory")
                return run(*stream)

            pipeline.run = third_fails
        built.append(pipeline)
        return pipeline

    monkeypatch.setattr(dali_graph, "build_pipeline", failing)
    with pytest.raises(DataError, match="^DALI cannot start: no driver$"):
        list(build_loader(small_config()).iterate(0))
    monkeypatch.setattr(dali_graph, "build_pipeline", broken_at_the_third_run)
    with pytest.raises(DataError, match="^DALI stopped, but every image of the batch decodes alone: out of memory$"):
        list(build_loader(small_config()).iterate(0))


def test_batches_for_a_gpu_are_ordered_by_the_stream_that_computes(
    small_config: MakeConfig, build_loader: BuildLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: DALI is given torch's current stream of that device, and none on the CPU."""
    from unitdist.data import dali_graph

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    given = []

    class Recording:
        def run(self, stream: object) -> None:
            given.append(stream)
            raise StopIteration

        def reset(self) -> None: ...

    loader = build_loader(small_config())
    monkeypatch.setattr(dali_graph, "build_pipeline", lambda *_: Recording())
    pipeline = loader._pipeline
    object.__setattr__(pipeline._settings, "device_id", 3)
    for gpu_decode in (True, False):
        object.__setattr__(pipeline._settings, "gpu_decode", gpu_decode)
        assert list(pipeline._attempt(np.zeros((1, 8), int), None, {})) == []
    assert given == ["stream of 3", None]


def test_validation_never_replaces(
    sample_data: Path, tmp_path: Path, small_config: MakeConfig, build_loader: BuildLoader
) -> None:
    root = copy_train(sample_data, tmp_path / "data")
    cut_file(root / "val" / "cat" / "cat_0001.jpg")
    config = small_config(path=str(root), on_broken="replace", max_broken_share=1.0)
    with pytest.raises(DataError, match="unreadable image .*cat_0001.jpg"):
        list(build_loader(config, training=False).iterate(0))


def test_decoded_pixels_are_pillows(tmp_path: Path, sample_data: Path, build_loader: BuildLoader) -> None:
    """Formats and encodings in one class, decoded and cut without any resampling: equal to the bit."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    with Image.open(sample_data / "train" / "cat" / "cat_0000.jpg") as opened:
        photograph = opened.convert("RGB").resize((64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    files: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "444.jpg": (photograph, {"subsampling": 0}),
        "422.jpg": (photograph, {"subsampling": 1}),
        "420.jpg": (photograph, {"subsampling": 2}),
        "progressive.jpg": (photograph, {"progressive": True}),
        "gray.jpg": (photograph.convert("L"), {}),
        "cmyk.jpg": (photograph.convert("CMYK"), {}),
        "turned.jpg": (photograph, {"exif": exif}),
        "png_inside.jpg": (photograph, {"format": "PNG"}),
        "palette.png": (photograph.convert("P"), {}),
        "alpha.png": (photograph.convert("RGBA"), {}),
        "webp.webp": (photograph, {}),
        "bmp.bmp": (photograph, {}),
    }
    for name, (image, options) in files.items():
        buffer = io.BytesIO()
        options.setdefault("format", {"jpg": "JPEG"}.get(name.split(".")[1], name.split(".")[1]))
        image.save(buffer, **options)
        (folder / name).write_bytes(buffer.getvalue())
    config = DataConfig(
        path=str(tmp_path),
        image_size_px=64,
        val_resize_px=64,
        scale_range_px=(64, 64),
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
        num_threads=1,
    )
    batch = next(iter(build_loader(config, batch=len(files), training=False).iterate(0)))
    for name, image_chw in zip(sorted(files), batch.images, strict=True):
        with Image.open(folder / name) as opened:
            expected = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(image_chw, expected.float()), name
