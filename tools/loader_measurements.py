"""What tools/bench_loader.py measures: CPU time per training image of our loaders and of the usual alternatives.

CPU time is user + system time of the process (and of worker processes that have ended), which repeats within about
5 % where wall-clock time on a shared machine does not.
"""

import io
import itertools
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as v1
from machine_load import QUIET_SHARE, Moment, load_average, waited_for_core_s
from nvidia.dali import Pipeline, fn
from PIL import Image

from unitdist.config import DataConfig
from unitdist.data.dali_graph import GraphSettings, graph_output, region_inputs, to_numpy, window_arrays
from unitdist.data.dali_loader import DaliLoader
from unitdist.data.draws import Ints
from unitdist.data.geometry import CornerRegion, corner_region
from unitdist.data.index import scan_image_folder
from unitdist.data.reading import read_ahead, read_batch
from unitdist.data.resample import Regions
from unitdist.data.split import Split
from unitdist.data.torchvision_loader import cut_window, decode_rgb
from unitdist.world import World

BATCH = 64
EPOCH_BATCHES = 512
"""Files are listed so many times that an epoch has this many batches: no measurement meets the end of one."""
BARE_BATCHES = 16
"""The bare pipeline goes round in so many prepared batches."""
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


def train_split(config: DataConfig, epoch_batches: int = EPOCH_BATCHES) -> Split:
    """The training side with the folder's images listed again and again until an epoch has epoch_batches batches."""
    index = scan_image_folder(Path(config.path) / "train")
    count = epoch_batches * BATCH
    repeated = replace(
        index,
        paths=[index.paths[i % len(index)] for i in range(count)],
        labels=np.resize(index.labels, count),
    )
    return Split(config=config, source=repeated, world=World.single(), per_rank_batch_size=BATCH, seed=0, training=True)


def our_loader(config: DataConfig) -> Case:
    """The DALI loader as training uses it, within a long epoch."""
    return lambda: epochs(DaliLoader(train_split(config), CPU))


def epochs(loader: DaliLoader) -> Iterator[object]:
    """One epoch after another."""
    epoch = 0
    while True:
        yield from loader.iterate(epoch)
        epoch += 1


def bare_pipeline(config: DataConfig) -> Case:
    """The same operators on the same windows, prepared before, with DALI's own file reader: what nobody can avoid."""

    def decoded(split: Split, settings: GraphSettings) -> Iterator[Regions]:
        plan = split.plan(0, 0).sample_ids[:BARE_BATCHES]
        windows = [window for _, window in read_windows(split, plan)]
        fed, taken = itertools.cycle(windows), itertools.cycle(windows)
        kinds, axes = zip(*window_arrays(settings), strict=True)
        pipeline = Pipeline(batch_size=BATCH, num_threads=config.num_threads, device_id=None)
        with pipeline:
            encoded, _ = fn.readers.file(files=[split.source.name(i) for i in plan.reshape(-1)])
            inputs = fn.external_source(
                source=lambda: region_inputs(next(fed)), num_outputs=len(kinds), batch=True, dtype=kinds, ndim=axes
            )
            pipeline.set_outputs(graph_output(settings, encoded, inputs))
        pipeline.build()
        while True:
            yield Regions(images=to_numpy(pipeline.run()[0]), region=next(taken))

    def batches() -> Iterator[object]:
        split = train_split(config)
        loader = DaliLoader(split, CPU)
        return loader.resampler.run(decoded(split, loader.settings))

    return batches


def read_windows(split: Split, plan: Ints) -> Iterator[tuple[list[bytes], CornerRegion]]:
    """The encoded images and the windows of each row of the plan."""
    for batch in read_ahead(split.source, plan, split.policy, threads=1, batches_ahead=2, refused={}):
        geometry = split.geometry(0, batch.sample_ids, batch.size_hw)
        yield batch.images, corner_region(geometry, batch.size_hw, split.config.image_size_px)


def python_alone(config: DataConfig) -> Case:
    """What our loader does beside reading and the graph: headers, draws, windows, handing over."""

    def batches() -> Iterator[object]:
        split = train_split(config)
        index = split.source
        in_memory = {index.name(sample_id): index.read(sample_id) for sample_id in range(len(index))}
        # The index is frozen for everybody else.
        object.__setattr__(index, "read", lambda sample_id: in_memory[index.name(sample_id)])
        while True:
            for images, window in read_windows(split, split.plan(0, 0).sample_ids):
                yield [np.frombuffer(image, dtype=np.uint8) for image in images], region_inputs(window)

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
        split = train_split(config)
        while True:
            for sample_ids in split.plan(0, 0).sample_ids:
                batch = read_batch(split.source, sample_ids, split.policy, {})
                geometry = split.geometry(0, batch.sample_ids, batch.size_hw)
                images = torch.empty((BATCH, 3, 224, 224), dtype=torch.uint8, memory_format=torch.channels_last)
                for row, data in enumerate(batch.images):
                    images[row] = cut_window(decode_rgb(data), geometry, row, 224)
                yield images * 0.017 - 2.0  # the normalization's cost

    return batches


def cpu_ms_per_image(cases: dict[str, Case], *, rounds: int, batches: int) -> dict[str, float]:
    """Median over interleaved rounds, so that a busy moment of the machine meets all cases alike."""
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


@dataclass(frozen=True, kw_only=True)
class Window:
    """A measurement by the clock and the share of the cores that other programs used meanwhile."""

    value: float
    others: float


def by_the_clock(measure: dict[str, Callable[[], float]], *, rounds: int) -> dict[str, list[Window]]:
    """Interleaved windows of each measurement."""
    windows: dict[str, list[Window]] = {name: [] for name in measure}
    for _ in range(rounds):
        for name, once in measure.items():
            moment = Moment.now()
            value = once()
            windows[name].append(Window(value=value, others=moment.others_since()))
    return windows


def quiet_median(windows: list[Window], needed: int = 3) -> float | None:
    """Median over the windows in which the machine was ours; None when too few were."""
    quiet = [window.value for window in windows if window.others < QUIET_SHARE]
    return statistics.median(quiet) if len(quiet) >= needed else None


def busy_text(*windows: list[Window]) -> str:
    shares = [window.others for each in windows for window in each]
    return (
        f"no verdict by the clock: other programs used {100 * statistics.median(shares):.0f} % of the cores "
        f"({100 * min(shares):.0f} to {100 * max(shares):.0f} %, {load_average()})"
    )


def images_per_second(stream: Iterator[object], batches: int) -> float:
    """Wall-clock speed over some batches of a running stream."""
    began = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return batches * BATCH / (time.perf_counter() - began)


def stall_share(stream: Iterator[object], loader_speed: float, batches: int) -> float:
    """Share of the time that a training step waits for data when the loader is 1.3 times faster than the step.

    The step sleeps, as a step on a GPU does from the host's point of view, and takes no core from the loader. Time in which
    the asking thread itself got no core is left out; what the loader's threads lose to other programs is not.
    """
    step_s = 1.3 * BATCH / loader_speed
    next(stream)
    time.sleep(step_s)  # the step of that batch; a request right after another would meet an empty queue
    waited, began = 0.0, time.perf_counter()
    for _ in range(batches):
        asked, without_core = time.perf_counter(), waited_for_core_s()
        next(stream)
        waited += time.perf_counter() - asked - (waited_for_core_s() - without_core)
        time.sleep(step_s)
    return waited / (time.perf_counter() - began)


def first_wait_ms(stream: Iterator[object], epoch_batches: int) -> float:
    """Wait for an epoch's first batch, ms. The stream stands at an epoch's end, and then at the next one's."""
    began = time.perf_counter()
    next(stream)
    waited = time.perf_counter() - began
    for _ in range(epoch_batches - 1):
        next(stream)
    return 1000 * waited


def on_cores(case: Case, cores: set[int]) -> Case:
    """The case with all of its threads kept on these cores; so is the thread that asks, while it does."""

    def batches() -> Iterator[object]:
        before = os.sched_getaffinity(0)
        stream = case()
        while True:
            os.sched_setaffinity(0, cores)  # threads that start now inherit it
            try:
                batch = next(stream)
            finally:
                os.sched_setaffinity(0, before)
            yield batch

    return batches


def print_scaling(root: Path, *, rounds: int, batches: int) -> None:
    """Two threads on two cores against one on one core, and the stall of a step; by the clock only where the machine was ours.

    One thread must be kept on one core: one decodes and another resamples, side by side.
    """
    one, two = (our_loader(config_of(root, "scale", num_threads=n)) for n in (1, 2))
    cases = {"1": on_cores(one, {min(os.sched_getaffinity(0))}), "2": two}
    one_ms, two_ms = cpu_ms_per_image(cases, rounds=rounds, batches=batches).values()
    streams = {name: case() for name, case in cases.items()}
    for stream in streams.values():
        images_per_second(stream, 4)
    print(f"two threads: {2 * one_ms / two_ms:.2f} times one by CPU time per image ", end="")
    speeds = by_the_clock(
        {name: partial(images_per_second, stream, batches) for name, stream in streams.items()}, rounds=rounds
    )
    one_speed, two_speed = (quiet_median(windows) for windows in speeds.values())
    if one_speed is None or two_speed is None:
        print(f"({busy_text(*speeds.values())})")
    else:
        print(
            f"and {two_speed / one_speed:.2f} times by the clock ({one_speed:.0f} and {two_speed:.0f} images/s, "
            f"{load_average()})"
        )
    loader_speed = two_speed or statistics.median(window.value for window in speeds["2"])
    stalls = by_the_clock({"stall": partial(stall_share, streams["2"], loader_speed, 2 * batches)}, rounds=rounds)[
        "stall"
    ]
    stalled = quiet_median(stalls)
    waits = f"{100 * statistics.median(window.value for window in stalls):.1f} %; {busy_text(stalls)}"
    print(f"a step 1.3 times slower than the loader waits {waits if stalled is None else f'{100 * stalled:.1f} %'}")


def print_first_wait(root: Path, *, rounds: int, epoch_batches: int = 4) -> None:
    """What comes on top once per epoch: nothing is read before an epoch is asked for, so its first batch takes its latency."""
    stream = epochs(DaliLoader(train_split(config_of(root, "scale", num_threads=2), epoch_batches), CPU))
    first_wait_ms(stream, epoch_batches)  # builds the pipeline
    windows = by_the_clock({"first": partial(first_wait_ms, stream, epoch_batches)}, rounds=rounds)["first"]
    quiet = quiet_median(windows)
    busy = f"{statistics.median(window.value for window in windows):.0f} ms; {busy_text(windows)}"
    print(f"an epoch's first batch, two threads, comes after {busy if quiet is None else f'{quiet:.0f} ms'}")


def ffcv_row(root: Path, *, rounds: int, batches: int) -> str:
    """FFCV's random-resized-crop where it is installed; it has no counterpart of the scale augmentation."""
    try:
        from ffcv_case import ffcv_loader
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("ffcv", "cv2", "numba"):
            raise
        return f"FFCV: not measured ({error.name} is not installed)"
    cost = cpu_ms_per_image({"ffcv": ffcv_loader(root / "train")}, rounds=rounds, batches=batches)
    return f"FFCV, random_resized_crop, uint8, re-encoded at quality 92: {cost['ffcv']:.3f} ms"


KINDS = (our_loader, bare_pipeline, python_alone, torchvision_pil, torchvision_tensors)


def print_report(root: Path, *, rounds: int, batches: int) -> None:
    """Everything about the folder root, which holds train/<class>/, as a Markdown table and lines."""
    print(load_average())
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
    print(ffcv_row(root, rounds=rounds, batches=batches))
    print_scaling(root, rounds=rounds, batches=batches)
    print_first_wait(root, rounds=rounds)
