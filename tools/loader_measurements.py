"""What tools/bench_loader.py measures: CPU time per training image of our loaders and of the usual alternatives.

CPU time is user + system time of the process (and of worker processes that have ended), which repeats within about
5 % where wall-clock time on a shared machine does not.
"""

import io
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as v1
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from unitdist.config import DataConfig
from unitdist.data.build import build_train_loader
from unitdist.data.dali_graph import graph_inputs, normalized_windows
from unitdist.data.dali_loader import DaliLoader
from unitdist.data.index import scan_image_folder
from unitdist.data.reading import read_ahead, read_batch
from unitdist.data.split import Split
from unitdist.data.torchvision_loader import cut_window, decode_rgb
from unitdist.world import World

BATCH = 64
CPU = torch.device("cpu")
Case = Callable[[], Iterator[object]]
"""Starts an endless stream of batches of 64 images."""


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def settled_cpu_seconds() -> float:
    """CPU time when nothing runs in the background: what a pipeline prepares ahead is counted as its own."""
    before, now = -1.0, cpu_seconds()
    while now - before > 0.003:
        time.sleep(0.15)
        before, now = now, cpu_seconds()
    return now


def noisy_set(source: Path, target: Path, *, sigma: float, count: int) -> float:
    """Copy images with sensor noise of the given standard deviation, quality 92; mean kB per file.

    Enlarged crops are smoother than photographs and decode faster; the noise brings them to ImageNet's 110 kB.
    """
    random = np.random.default_rng(0)
    sizes = []
    paths = sorted(source.glob("*/*.jpg"))
    for path in paths[:: max(1, len(paths) // count)]:
        with Image.open(path) as image:
            pixels = np.asarray(image).astype(np.float32)
        noise = random.normal(0, sigma, pixels.shape[:2]).astype(np.float32)
        noisy = np.clip(pixels + (noise if pixels.ndim == 2 else noise[..., None]), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, format="JPEG", quality=92)
        (target / "train" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (target / "train" / path.parent.name / path.name).write_bytes(buffer.getvalue())
        sizes.append(len(buffer.getvalue()))
    return sum(sizes) / len(sizes) / 1000


def config_of(root: Path, augmentation: str, **changes: object) -> DataConfig:
    values: dict[str, object] = {"path": str(root), "augmentation": augmentation, "num_threads": 1}
    return DataConfig(**(values | changes))  # type: ignore[arg-type]


def our_loader(config: DataConfig) -> Case:
    """The DALI loader as training uses it."""

    def batches() -> Iterator[object]:
        loader = build_train_loader(config, World.single(), per_rank_batch_size=BATCH, seed=0, device=CPU)
        epoch = 0
        while True:
            yield from loader.iterate(epoch)
            epoch += 1

    return batches


def bare_pipeline(config: DataConfig) -> Case:
    """The same operators on the same windows, prepared before, with DALI's own file reader: what nobody can avoid."""

    def batches() -> Iterator[object]:
        index = scan_image_folder(Path(config.path) / "train")
        split = Split(
            config=config, source=index, world=World.single(), per_rank_batch_size=BATCH, seed=0, training=True
        )
        settings = DaliLoader(split, CPU).settings
        plan = split.plan(0, 0).sample_ids
        windows = []
        for sample_ids in plan:
            batch = read_batch(index, sample_ids, split.policy, {})
            windows.append(graph_inputs(settings, split.geometry(0, batch.sample_ids, batch.size_hw), batch.size_hw))
        position = iter(range(10**9))
        pipeline = Pipeline(batch_size=BATCH, num_threads=config.num_threads, device_id=None)
        with pipeline:
            encoded, _ = fn.readers.file(files=[index.name(i) for i in plan.reshape(-1)])
            *window, flip = fn.external_source(
                source=lambda: windows[next(position) % len(windows)],
                num_outputs=5,
                batch=True,
                dtype=[types.INT32, types.INT32, types.FLOAT, types.FLOAT, types.INT32],
                ndim=[1, 1, 1, 1, 0],
            )
            pipeline.set_outputs(normalized_windows(settings, encoded, window, flip))
        pipeline.build()
        while True:
            yield torch.utils.dlpack.from_dlpack(pipeline.run()[0].as_tensor())

    return batches


def python_alone(config: DataConfig) -> Case:
    """What our loader does beside reading and the graph: headers, draws, windows, handing over."""

    def batches() -> Iterator[object]:
        index = scan_image_folder(Path(config.path) / "train")
        in_memory = [index.read(sample_id) for sample_id in range(len(index))]
        object.__setattr__(index, "read", in_memory.__getitem__)  # the index is frozen for everybody else
        split = Split(
            config=config, source=index, world=World.single(), per_rank_batch_size=BATCH, seed=0, training=True
        )
        settings = DaliLoader(split, CPU).settings
        epoch = 0
        while True:
            plan = split.plan(epoch, 0).sample_ids
            for batch in read_ahead(index, plan, split.policy, threads=1, batches_ahead=2, refused={}):
                geometry = split.geometry(epoch, batch.sample_ids, batch.size_hw)
                images = [np.frombuffer(image, dtype=np.uint8) for image in batch.images]
                yield [images, *graph_inputs(settings, geometry, batch.size_hw)]
            epoch += 1

    return batches


def torchvision_pil(config: DataConfig) -> Case:
    """torchvision's classic transforms on Pillow images, as in its ImageNet example."""

    def batches() -> Iterator[object]:
        index = scan_image_folder(Path(config.path) / "train")
        low, high = config.scale_range_px
        random_crop = v1.RandomResizedCrop(224) if config.augmentation == "random_resized_crop" else None
        tail = v1.Compose([v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(config.mean, config.std)])
        while True:
            for start in range(0, len(index) // BATCH * BATCH, BATCH):
                tensors = []
                for sample_id in range(start, start + BATCH):
                    with Image.open(index.name(sample_id)) as opened:
                        image = opened.convert("RGB")
                    if random_crop is None:
                        shorter = int(torch.randint(low, high + 1, ()))
                        image = v1.RandomCrop(224)(v1.functional.resize(image, shorter))
                    else:
                        image = random_crop(image)
                    tensors.append(tail(image))
                yield torch.stack(tensors)

    return batches


def torchvision_tensors(config: DataConfig) -> Case:
    """What the workers of our torchvision loader do, in this process: Pillow's decoder, uint8 tensors, v2 resize."""

    def batches() -> Iterator[object]:
        index = scan_image_folder(Path(config.path) / "train")
        split = Split(
            config=config, source=index, world=World.single(), per_rank_batch_size=BATCH, seed=0, training=True
        )
        while True:
            for sample_ids in split.plan(0, 0).sample_ids:
                batch = read_batch(index, sample_ids, split.policy, {})
                geometry = split.geometry(0, batch.sample_ids, batch.size_hw)
                images = torch.empty((BATCH, 3, 224, 224), dtype=torch.uint8, memory_format=torch.channels_last)
                for row, data in enumerate(batch.images):
                    images[row] = cut_window(decode_rgb(data), geometry, row, 224)
                yield images * 0.017 - 2.0  # the normalization's cost

    return batches


def cpu_ms_per_image(cases: dict[str, Case], *, rounds: int, batches: int) -> dict[str, float]:
    """Median over interleaved rounds, so that a busy moment of the machine meets all cases alike.

    batches should be whole epochs of the set: at an epoch's end nothing is prepared ahead, at its start more.
    """
    streams = {name: case() for name, case in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for stream in streams.values():
        for _ in range(4):
            next(stream)
    for _ in range(rounds):
        for name, stream in streams.items():
            began = settled_cpu_seconds()
            for _ in range(batches):
                next(stream)
            settled = settled_cpu_seconds()
            times[name].append(1000 * (settled - began) / (batches * BATCH))
    return {name: statistics.median(values) for name, values in times.items()}


def images_per_second(case: Case, batches: int) -> float:
    """Wall-clock speed after four batches."""
    stream = case()
    for _ in range(4):
        next(stream)
    began = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return batches * BATCH / (time.perf_counter() - began)


def stall_share(case: Case, loader_speed: float, batches: int) -> float:
    """Share of the time that a training step waits for data when the loader is 1.3 times faster than the step.

    The step sleeps, as a step on a GPU does from the host's point of view.
    """
    step_s = 1.3 * BATCH / loader_speed
    stream = case()
    for _ in range(4):
        next(stream)
    waited, began = 0.0, time.perf_counter()
    for _ in range(batches):
        asked = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - asked
        time.sleep(step_s)
    return waited / (time.perf_counter() - began)


KINDS = (our_loader, bare_pipeline, python_alone, torchvision_pil, torchvision_tensors)


def print_report(root: Path, *, rounds: int, batches: int) -> None:
    """Everything about the folder root, which holds train/<class>/, as a Markdown table and lines."""
    print("| augmentation | our DALI loader | bare DALI pipeline | our Python | on Pillow | on tensors |")
    print("| --- | --- | --- | --- | --- | --- |")
    for augmentation in ("scale", "random_resized_crop"):
        config = config_of(root, augmentation)
        cost = cpu_ms_per_image({kind.__name__: kind(config) for kind in KINDS}, rounds=rounds, batches=batches)
        print(f"| {augmentation} | {' | '.join(f'{value:.3f} ms' for value in cost.values())} |")
        share, bare = cost["our_loader"] / cost["torchvision_pil"], cost["bare_pipeline"]
        added = 100 * (cost["our_loader"] / bare - 1)
        print(f"  {share:.2f} of torchvision on Pillow; {added:+.1f} % against the bare pipeline, ", end="")
        print(f"our Python by itself {100 * cost['python_alone'] / bare:.1f} % of it")
    cases = {str(n): our_loader(config_of(root, "scale", num_threads=n)) for n in (1, 2)}
    one_ms, two_ms = cpu_ms_per_image(cases, rounds=rounds, batches=batches).values()
    one, two = (images_per_second(case, 16) for case in cases.values())
    print(f"two threads: {2 * one_ms / two_ms:.2f} times one by CPU time, {two / one:.2f} times by the clock")
    stalled = stall_share(cases["2"], two, 16)
    print(f"a step 1.3 times slower than the loader waits {100 * stalled:.1f} % of the time (wall clock)")
