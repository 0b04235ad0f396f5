"""What tools/bench_eval.py measures: the evaluation, its forward passes alone, and one view at a time with PIL.

No speed-up is reported unless the scores of the evaluation and of the obvious loop agree in the same run.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from evaluation.forward import Scorer
from evaluation.image_list import ImageList, list_images
from evaluation.options import EvaluationOptions, ViewSettings, protocol_passes
from evaluation.partial import PartialScores
from evaluation.progress import Progress
from evaluation.protocols import cut_chunks, pass_scores, score_passes
from evaluation.ranks import Ranks
from evaluation.run import VIEWS_PER_FORWARD, build_decoders
from evaluation.views import Pass
from unitdist.config import ModelConfig
from unitdist.data.index import ImageIndex
from unitdist.models.build import build_model
from unitdist.world import World

TOLERANCE = {"fp32": 0.02, "bf16": 0.1}
"""Largest difference of a probability between evaluation and loop: DALI's resize is not PIL's to the bit."""

TABLE_3 = ViewSettings()

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def measure(
    data: Path,
    *,
    model_name: str,
    num_images: int,
    repeats: int,
    device: str,
    precision: Any,
    loader: Any,
    decode_device: Any,
    threads: int | None,
    views: ViewSettings = TABLE_3,
) -> dict[str, Any]:
    """Medians over `repeats` interleaved runs, for both protocols, with what they were measured on.

    On a GPU seconds of the clock, on a CPU seconds of computing, summed over the cores.
    """
    threads = threads or len(os.sched_getaffinity(0))
    options = EvaluationOptions(loader=loader, decode_device=decode_device, num_threads=threads, precision=precision)
    images = some_images(list_images(data), num_images)
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=model_name, num_classes=1000), image_size_px=views.crop_px, sync=False).eval()
    clock = "wall" if device == "cuda" else "CPU"
    figures: dict[str, Any] = {"clock": clock, "model": model_name, "images": len(images), "threads": threads, "options": {
        "device": device, "precision": precision, "loader": loader, "decode_device": decode_device}, **surroundings(place)}  # fmt: skip
    figures["protocols"] = {
        name: _measure_protocol(name, images, model, options, views, place, threads, repeats)
        for name in ("crops", "fully_convolutional")
    }
    figures["correct"] = all(
        entry["largest_difference"] <= TOLERANCE[precision] for entry in figures["protocols"].values()
    )
    return figures


def _measure_protocol(
    name: str,
    images: ImageList,
    model: nn.Module,
    options: EvaluationOptions,
    views: ViewSettings,
    device: torch.device,
    threads: int,
    repeats: int,
) -> dict[str, Any]:
    passes = protocol_passes(name, views)
    pixels = VIEWS_PER_FORWARD[device.type] * views.crop_px**2
    build = build_decoders(options, views.crop_px, device, threads)
    scorer = Scorer(
        model, mean=MEAN, std=STD, device=device, pixels_per_forward=pixels, average="softmax", precision=options.precision,
        cpu_threads=threads,
    )  # fmt: skip
    decoder = build(passes)
    chunks = cut_chunks(images, options.images_per_chunk)
    decoded = [decoder.decode([images.read(image_id) for image_id in chunk]) for chunk in chunks]
    torch.set_num_threads(threads)
    loop_images = [images.root / images.names[image_id] for image_id in range(min(2, len(images)))]
    runs: dict[str, Callable[[], Any]] = {
        "evaluation": lambda: _evaluation(images, passes, scorer, build, options),
        "forward": lambda: [pass_scores(chunk, plan, scorer) for chunk in decoded for plan in passes],
        "decode": lambda: [decoder.decode([images.read(image_id) for image_id in chunk]) for chunk in chunks],
        "loop": lambda: [_obvious_loop(path, passes, views.crop_px, model, device) for path in loop_images],
    }
    # The cores of a CPU may be shared with others: there, what the process itself used is counted.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    results: dict[str, Any] = {}
    for repeat in range(repeats + 1):  # the first one warms up and is not counted
        for key, work in runs.items():
            torch.set_num_threads(1 if device.type == "cpu" else threads)
            started = clock()
            results[key] = work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[key] += [clock() - started] if repeat else []
    scorer.close()
    decoder.close()
    ours = sum(plan.views * results["evaluation"][plan.name].astype(np.float64) for plan in passes) / sum(
        p.views for p in passes
    )
    per_image = {
        key: [value / (len(loop_images) if key == "loop" else len(images)) for value in values]
        for key, values in seconds.items()
    }
    ratios = [
        evaluation / forward for evaluation, forward in zip(per_image["evaluation"], per_image["forward"], strict=True)
    ]
    return {
        "seconds_per_image": {key: _spread(values) for key, values in per_image.items()},
        "evaluation_over_forward": _spread(ratios),
        "speed_up_over_loop": _spread(
            [loop / own for loop, own in zip(per_image["loop"], per_image["evaluation"], strict=True)]
        ),
        "largest_difference": float(
            max(np.abs(ours[place] - reference).max() for place, reference in enumerate(results["loop"]))
        ),
    }


def _evaluation(
    images: ImageList, passes: tuple[Pass, ...], scorer: Scorer, build: Callable[..., Any], options: EvaluationOptions
) -> dict[str, np.ndarray]:
    scored = score_passes(
        images, passes, scorer=scorer, build_decoder=build, ranks=Ranks(World.single(), use_cuda=False), partial=PartialScores(None),
        images_per_chunk=options.images_per_chunk, skip_broken=False, progress=Progress(shown=False),
    )  # fmt: skip
    assert scored is not None
    return scored.scores


@torch.inference_mode()
def _obvious_loop(
    path: Path, passes: tuple[Pass, ...], crop_px: int, model: nn.Module, device: torch.device
) -> np.ndarray:
    """Mean probabilities of one image as one writes it first: open, resize, cut, and run one view after the other."""
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    views = []
    for plan in passes:
        resized = transforms.Resize(plan.scale_px)(Image.open(path).convert("RGB"))
        if plan.kind == "whole":
            windows = (resized,)
        else:
            cut = transforms.FiveCrop(crop_px) if plan.views > 2 else transforms.CenterCrop(crop_px)
            windows = cut(resized) if plan.views > 2 else (cut(resized),)
        views += [view for window in windows for view in (window, transforms.functional.hflip(window))]
    total = 0.0
    for view in views:
        total = total + model(normalize(view)[None].to(device)).softmax(1)[0].double().cpu().numpy()
    return np.asarray(total) / len(views)


def some_images(images: ImageList, count: int) -> ImageList:
    """`count` images spread evenly over the list."""
    ids = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int).tolist()
    names = [images.names[i] for i in ids]
    return list_images(
        ImageIndex(root=images.root, paths=names, labels=images.labels_n[ids], class_to_idx=images.class_to_idx)
    )


def surroundings(device: torch.device) -> dict[str, str]:
    """Hardware, versions and commit of a measurement."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "hardware": f"{name}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures for people; speed-ups only where the scores agree."""
    lines = [
        f"{figures['model']}, {figures['images']} images, {figures['hardware']}, {figures['threads']} threads, {figures['options']}"
    ]
    for name, entry in figures["protocols"].items():
        lines.append(f"\n{name}: {figures['clock']} seconds per image (median, smallest to largest)")
        for key, spread in entry["seconds_per_image"].items():
            lines.append(f"  {key:<12} {spread['median']:9.4f}   {spread['min']:.4f} to {spread['max']:.4f}")
        lines.append(f"  largest difference of a probability from the loop's: {entry['largest_difference']:.5f}")
        if figures["correct"]:
            ratio, speed_up = entry["evaluation_over_forward"], entry["speed_up_over_loop"]
            lines.append(
                f"  evaluation / forward passes alone: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"
            )
            lines.append(
                f"  obvious loop / evaluation: {speed_up['median']:.2f} ({speed_up['min']:.2f} to {speed_up['max']:.2f})"
            )
    if not figures["correct"]:
        lines.append("\nThe scores do not agree with the loop's: no speed-up is shown.")
    return "\n".join(lines)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
