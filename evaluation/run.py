"""`evaluate`: a checkpoint or a network, a folder of images, and the protocols of Table 3."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evaluation.checkpoints import Network, following_image_size, load_network, module_network, state_digest
from evaluation.decoding import Decoder
from evaluation.forward import Scorer
from evaluation.fully_convolutional import require_dense_classifier
from evaluation.gallery import save_gallery
from evaluation.image_list import ImageList, list_images, require_same_labels
from evaluation.options import (
    PROTOCOLS,
    TABLE_3_PROTOCOLS,
    EvaluationOptions,
    ViewSettings,
    protocol_names,
    protocol_passes,
    settle_views,
)
from evaluation.partial import Fingerprint, PartialScores, open_partial
from evaluation.progress import Progress
from evaluation.protocols import PassScores, broken_error, score_passes
from evaluation.ranks import Ranks
from evaluation.report import (
    SCHEMA,
    ProtocolResult,
    console_table,
    paper_row,
    save_scores,
    summarize_protocol,
    write_json,
)
from evaluation.views import Pass
from unitdist.data.reading import ImageSource
from unitdist.errors import ConfigError
from unitdist.train.agreement import agreed
from unitdist.wording import install_extra
from unitdist.world import World

VIEWS_PER_FORWARD = {"cuda": 256, "cpu": 16}
"""Crops in one forward pass unless the user says otherwise; on a CPU larger batches fall out of the caches."""


def evaluate(
    model_or_checkpoint: str | Path | nn.Module | Network,
    data: str | Path | ImageSource,
    *,
    protocols: str | Sequence[str] = TABLE_3_PROTOCOLS,
    output: str | Path | None = None,
    device: str | torch.device | None = None,
    options: EvaluationOptions | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate on `data` by the given protocols ("all": crops, fully_convolutional, single, ten_crop).

    `data`: folder/<class>/<image>, a folder of tars or TFRecords with their index, or a source that is open already.
    Returns protocol -> {"count", "top1", "top5" (percent), "top1_correct", "top5_correct", intervals, "scales", ...}, the
    same on every rank and for every number of ranks. `output`: folder for report.json, pictures, gallery and partial scores.
    `device` None: this rank's GPU if there is one; a network in memory is moved there, and is otherwise left as it was.
    `say` receives the table and messages (None: stdout of rank 0).
    Collective: under torchrun all ranks call it. Raises ConfigError, CheckpointError or DataError.
    """
    options = options or EvaluationOptions()
    names = protocol_names(protocols)
    world = World.from_environment()
    device = _device(device, world)
    if options.decode_device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("--decode-device gpu: torch sees no CUDA device here; use --decode-device cpu")
    folder = None if output is None else Path(output)
    if options.resume and folder is None:
        raise ConfigError("--resume needs --output, the folder of the interrupted evaluation")
    say = say or (print if world.is_main else _silent)
    modes = [(module, module.training) for module in _modules(model_or_checkpoint)]
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # a search among algorithms could end differently on another rank
    ranks = Ranks(world, use_cuda=device.type == "cuda")
    try:
        return _evaluate(model_or_checkpoint, Path(data) if isinstance(data, str) else data, names, folder, device, options, ranks, say)
    finally:
        torch.backends.cudnn.benchmark = benchmark
        for module, training in modes:
            module.training = training
        ranks.close()


def _evaluate(
    model_or_checkpoint: str | Path | nn.Module | Network,
    data: Path | ImageSource,
    names: tuple[str, ...],
    folder: Path | None,
    device: torch.device,
    options: EvaluationOptions,
    ranks: Ranks,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    started = time.perf_counter()
    with agreed(ranks.world):
        network = _network(model_or_checkpoint, options)
        views = settle_views(options, network.training)
    plans = {name: protocol_passes(name, views) for name in names}
    passes = tuple({plan.name: plan for plan_group in plans.values() for plan in plan_group}.values())
    val_split = "val" if network.training is None else network.training.data.val_split
    images = ranks.from_main(
        lambda: list_images(data, labels_file=options.labels, class_to_idx=network.class_to_idx, val_split=val_split)
    )
    with agreed(ranks.world):
        if images.broken and options.on_broken == "error":
            raise broken_error(images, images.broken)
        num_outputs = _probe(network, passes, views.crop_px, device)
        require_same_labels(images, network.class_to_idx, num_outputs)
    pixels_per_forward = (options.views_per_forward or VIEWS_PER_FORWARD.get(device.type, 16)) * views.crop_px**2
    fingerprint = ranks.from_main(lambda: _fingerprint(network, images, options, views, device, pixels_per_forward))
    kept = None
    if folder is not None:
        kept = ranks.from_main(lambda: open_partial(folder / "partial", fingerprint, options.resume))
    scored = _score(network, images, passes, views, options, device, pixels_per_forward, kept, ranks)

    def summarize() -> dict[str, dict[str, Any]]:
        assert scored is not None
        papers = {name: paper_row(name, network.name, network.norm, num_outputs, plan) for name, plan in plans.items()}
        results = [
            summarize_protocol(name, plan, scored.scores, images, scored.broken, views.average, papers[name])
            for name, plan in plans.items()
        ]
        say(console_table(results, network.name, network.norm))
        if scored.broken:
            first = min(scored.broken)
            say(
                f"left out: {len(scored.broken):,} of {len(images):,} images, which cannot be decoded; "
                f"first: {images.source.name(first)}: {scored.broken[first]}"
            )
        if folder is not None:
            seconds = time.perf_counter() - started
            for remark in _write(folder, results, scored, images, fingerprint, network, options, seconds, ranks.world):
                say(remark)
            say(f"report: {folder / 'report.json'}")
        return {result.name: result.summary for result in results}

    return ranks.from_main(summarize)


def _score(
    network: Network,
    images: ImageList,
    passes: tuple[Pass, ...],
    views: ViewSettings,
    options: EvaluationOptions,
    device: torch.device,
    pixels_per_forward: int,
    kept: Path | None,
    ranks: Ranks,
) -> PassScores | None:
    progress = Progress(shown=ranks.world.is_main)
    threads = _threads(options, ranks.world)
    per_image = options.norm_divisor == "per_image"
    scorer = Scorer(
        network.model,
        mean=network.mean,
        std=network.std,
        device=device,
        pixels_per_forward=pixels_per_forward,
        average=views.average,
        precision=options.precision,
        channels_last=options.channels_last,
        compile_model=options.compile,
        # Compiling, and layers whose divisor is set before each call, are not for several threads at once.
        cpu_threads=1 if options.compile or per_image else threads,
        say=progress.say,
    )
    try:
        with following_image_size(network.model) if per_image else nullcontext():
            return score_passes(
                images,
                passes,
                scorer=scorer,
                build_decoder=build_decoders(options, views.crop_px, device, threads),
                ranks=ranks,
                partial=PartialScores(kept),
                images_per_chunk=options.images_per_chunk,
                skip_broken=options.on_broken == "skip",
                progress=progress,
            )
    finally:
        scorer.close()


def _write(
    folder: Path,
    results: Sequence[ProtocolResult],
    scored: PassScores,
    images: ImageList,
    fingerprint: Fingerprint,
    network: Network,
    options: EvaluationOptions,
    total_s: float,
    world: World,
) -> list[str]:
    """Fill the output folder; returns what the user should know."""
    for name in PROTOCOLS:  # of an earlier evaluation into this folder, perhaps of another network
        for form in ("{}_per_class.png", "{}_confusion.png", "{}_calibration.png", "{}_errors.html", "scores_{}.npz"):
            (folder / form.format(name)).unlink(missing_ok=True)
    report = {
        "schema": SCHEMA,
        "count": len(images) - len(scored.broken),
        "images": len(images),
        "broken": [{"image": images.names[image_id], "reason": reason} for image_id, reason in sorted(scored.broken.items())],
        "network": {"name": network.name, "norm": network.norm, "source": network.source, "weights": network.weights},
        "settings": fingerprint,
        "protocols": {result.name: result.summary for result in results},
    }
    write_json(folder / "report.json", report)
    timing = {"ranks": world.size, "total_s": total_s, **scored.seconds}
    write_json(folder / "timing.json", timing)
    for result in results:
        save_gallery(folder / f"{result.name}_errors.html", result, images, options.gallery_images)
        if options.save_scores:
            save_scores(folder / f"scores_{result.name}.npz", result, images)
    if not options.pictures:
        return []
    try:
        from evaluation.pictures import save_pictures
    except ImportError as error:
        return [f"no pictures: matplotlib cannot be imported ({error}); {install_extra('demo')}"]
    for result in results:
        save_pictures(folder, result)
    return []


def _network(model_or_checkpoint: str | Path | nn.Module | Network, options: EvaluationOptions) -> Network:
    if isinstance(model_or_checkpoint, Network):
        return model_or_checkpoint
    if isinstance(model_or_checkpoint, nn.Module):
        return module_network(model_or_checkpoint, options)
    return load_network(Path(model_or_checkpoint), options)


def _modules(model_or_checkpoint: str | Path | nn.Module | Network) -> list[nn.Module]:
    model = model_or_checkpoint.model if isinstance(model_or_checkpoint, Network) else model_or_checkpoint
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _probe(network: Network, passes: Sequence[Pass], crop_px: int, device: torch.device) -> int:
    """Number of outputs, found by running one black image; a network of another kind fails here, with its reason."""
    shapes = {(crop_px, crop_px)}
    if any(plan.kind == "whole" for plan in passes):
        require_dense_classifier(network.model)
        smallest = min(plan.scale_px for plan in passes if plan.kind == "whole")
        shapes = {(smallest, smallest + smallest // 2)}
    network.model.to(device).eval()
    outputs = 0
    for height, width in shapes:
        try:
            with torch.inference_mode():
                logits = network.model(torch.zeros(1, len(network.mean), height, width, device=device))
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{network.name} cannot take a colour image of {height}x{width} pixels: {reason}") from None
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
            raise ConfigError(f"{network.name} is no classifier: expected scores (images, classes), got {type(logits).__name__}")
        outputs = logits.shape[1]
    return outputs


def _fingerprint(
    network: Network,
    images: ImageList,
    options: EvaluationOptions,
    views: ViewSettings,
    device: torch.device,
    pixels_per_forward: int,
) -> Fingerprint:
    """All that the scores depend on, in values that JSON gives back unchanged."""
    return {
        "network_sha256": state_digest(network.model),
        "images_sha256": images.digest(),
        "mean": list(network.mean),
        "std": list(network.std),
        "crop_px": views.crop_px,
        "average": views.average,
        "norm_divisor": options.norm_divisor,
        "loader": options.loader,
        "decode_device": options.decode_device,
        "interpolation": "bilinear, antialiased",
        "on_broken": options.on_broken,
        "device": device.type,
        "precision": options.precision,
        "channels_last": options.channels_last,
        "compile": options.compile,
        "images_per_chunk": options.images_per_chunk,
        "pixels_per_forward": pixels_per_forward,
    }


def _threads(options: EvaluationOptions, world: World) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return options.num_threads or max(1, cores // world.local_size)


def build_decoders(
    options: EvaluationOptions, crop_px: int, device: torch.device, threads: int
) -> Callable[[tuple[Pass, ...]], Decoder]:
    """What makes the decoder for a choice of passes. It raises ConfigError when DALI is asked for and not installed."""

    def build(passes: tuple[Pass, ...]) -> Decoder:
        if options.loader == "torchvision":
            from evaluation.torchvision_views import TorchvisionDecoder

            return TorchvisionDecoder(passes, crop_px=crop_px, num_threads=threads)
        try:
            from evaluation.dali_views import DaliDecoder
        except ImportError as error:
            raise ConfigError(
                f"--loader dali: DALI cannot be imported ({error}); {install_extra('dali-cuda13', 'dali-cuda12')}, or give "
                "--loader torchvision"
            ) from None
        return DaliDecoder(
            passes,
            crop_px=crop_px,
            images_per_chunk=options.images_per_chunk,
            num_threads=threads,
            device_id=(device.index or 0) if options.decode_device == "gpu" else None,
        )

    return build


def _device(device: str | torch.device | None, world: World) -> torch.device:
    if device is None:
        device = f"cuda:{world.local_rank}" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu")
        chosen = torch.device("cuda", world.local_rank if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
    return chosen


def _silent(line: str) -> None:
    """Ranks other than 0 say nothing."""
