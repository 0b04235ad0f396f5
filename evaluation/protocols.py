"""The loop: decode each image once, score it in every pass, bring the scores of all ranks together in the order of the list.

Images are cut into chunks of a fixed size, and whole chunks are dealt to the ranks. The batches that the network sees are
composed within one chunk and one pass, so a score is the same bits whichever rank computes it, however many there are, and
whatever was computed before an interruption.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evaluation.decoding import DecodedChunk, Decoder, run_ahead
from evaluation.forward import Scorer
from evaluation.fully_convolutional import group_by_shape, order_by_shape
from evaluation.image_list import ImageList
from evaluation.partial import PartialScores, Scored
from evaluation.progress import Progress
from evaluation.ranks import Ranks
from evaluation.views import Pass
from unitdist.errors import DataError, UnitdistError
from unitdist.wording import counted

BuildDecoder = Callable[[tuple[Pass, ...]], Decoder]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Images that are decoded together, by one rank."""

    number: int
    image_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PassScores:
    """All images in all passes. `scores`: pass name -> float32 (N, K), undefined rows for the images in `broken`."""

    scores: dict[str, np.ndarray]
    broken: dict[int, str]
    seconds: dict[str, float]


def cut_chunks(images: ImageList, images_per_chunk: int) -> list[tuple[int, ...]]:
    """Ids of the images with a readable header in runs of `images_per_chunk`, neighbours of like shape, independent of the ranks."""
    order = [image_id for image_id in order_by_shape(images.shapes) if image_id not in images.broken]
    return [tuple(order[start : start + images_per_chunk]) for start in range(0, len(order), images_per_chunk)]


def score_passes(
    images: ImageList,
    passes: Sequence[Pass],
    *,
    scorer: Scorer,
    build_decoder: BuildDecoder,
    ranks: Ranks,
    partial: PartialScores,
    images_per_chunk: int,
    skip_broken: bool,
    progress: Progress,
) -> PassScores | None:
    """Score every image in every pass. Collective: all ranks call it, rank 0 gets the result, the others None.

    Raises DataError for an image that cannot be decoded (unless `skip_broken`), and when an image is missing in the end.
    """
    started = time.perf_counter()
    finished = ranks.from_main(lambda: {plan.name for plan in passes if partial.finished(plan)})
    open_passes = tuple(plan for plan in passes if plan.name not in finished)
    chunks = [Chunk(number=n, image_ids=ids) for n, ids in enumerate(cut_chunks(images, images_per_chunk))]
    mine = chunks[ranks.world.rank :: ranks.world.size]
    progress.start(sum(len(chunk.image_ids) for chunk in mine) if open_passes else 0)
    scored: dict[str, list[Scored]] = {plan.name: [] for plan in open_passes}
    try:
        for chunk, passes_of_chunk in _score_chunks(mine, open_passes, images, scorer, build_decoder, partial, skip_broken):
            for name, scores in passes_of_chunk.items():
                scored[name].append(scores)
            progress.advance(len(chunk.image_ids))
    except UnitdistError as error:
        error.speaker = ranks.world.rank  # the others did not meet it
        raise
    finally:
        progress.close()
    scoring_s = time.perf_counter() - started
    scores_of, broken = {}, dict(images.broken)
    for plan in passes:
        shares = ranks.gather(scored.get(plan.name, []))
        if ranks.world.is_main:
            scores_of[plan.name], found = _whole_pass(plan, images, partial, [part for share in shares for part in share])
            broken.update(found)
    seconds = {"scoring_s": scoring_s, "images_of_rank_0": float(progress.done)}
    return PassScores(scores=scores_of, broken=broken, seconds=seconds) if ranks.world.is_main else None


def _score_chunks(
    chunks: Sequence[Chunk],
    passes: tuple[Pass, ...],
    images: ImageList,
    scorer: Scorer,
    build_decoder: BuildDecoder,
    partial: PartialScores,
    skip_broken: bool,
) -> Iterator[tuple[Chunk, dict[str, Scored]]]:
    """Each chunk with its scores by pass: from the disk where they are kept, else computed, and kept."""
    todo: list[tuple[Chunk, tuple[Pass, ...]]] = []
    for chunk in chunks if passes else ():
        kept = _kept(chunk, passes, partial)
        if len(kept) == len(passes):
            yield chunk, kept
        else:
            todo.append((chunk, tuple(plan for plan in passes if plan.name not in kept)))
    for chunk, missing, decoded in _decode_ahead(images, todo, build_decoder):
        broken = {chunk.image_ids[position]: reason for position, reason in decoded.broken.items()}
        if broken and not skip_broken:
            raise broken_error(images, broken)
        kept_ids = np.array([chunk.image_ids[position] for position in decoded.kept], dtype=np.int64)
        computed = {}
        for plan in missing:
            scores_bk = pass_scores(decoded, plan, scorer)
            computed[plan.name] = Scored(image_ids=kept_ids, scores_bk=scores_bk, broken=broken)
            partial.save(plan, computed[plan.name], chunk.number)
        others = tuple(plan for plan in passes if plan not in missing)
        yield chunk, {**_kept(chunk, others, partial), **computed}


def _kept(chunk: Chunk, passes: tuple[Pass, ...], partial: PartialScores) -> dict[str, Scored]:
    on_disk = {plan.name: partial.load(plan, chunk.number) for plan in passes}
    return {name: scored for name, scored in on_disk.items() if scored is not None}


def _whole_pass(
    plan: Pass, images: ImageList, partial: PartialScores, parts: list[Scored]
) -> tuple[np.ndarray, dict[int, str]]:
    """All images' scores of one pass, from the disk if it is finished there, and the images that could not be decoded."""
    kept = partial.load(plan)
    if kept is not None:
        return assemble([kept], images, plan), kept.broken
    scores_nk = assemble(parts, images, plan)
    broken = {image_id: reason for part in parts for image_id, reason in part.broken.items()}
    readable = np.array([i for i in range(len(images)) if i not in broken and i not in images.broken], dtype=np.int64)
    partial.save(plan, Scored(image_ids=readable, scores_bk=scores_nk[readable], broken=broken))
    return scores_nk, broken


def pass_scores(decoded: DecodedChunk, plan: Pass, scorer: Scorer) -> np.ndarray:
    """Mean scores over the views of one pass for the B images of a chunk: float32 (B, K), averaged in float64."""
    if not decoded.kept:
        return np.zeros((0, 0), dtype=np.float32)
    if plan.kind == "crops":
        windows_bvhwc = decoded.crops[plan.name]
        images, windows, height, width = windows_bvhwc.shape[:4]
        windows_nhwc = windows_bvhwc.flatten(0, 1)
        step = scorer.images_per_forward(height, width, plan.mirrored)
        batches = [windows_nhwc[start : start + step] for start in range(0, len(windows_nhwc), step)]
        views_nvk = torch.cat(scorer.score_batches(batches, plan.mirrored))
        views_bvk = views_nvk.reshape(images, windows * views_nvk.shape[1], -1)
        return np.asarray(views_bvk.double().mean(dim=1).float().cpu().numpy())
    wholes = decoded.wholes[plan.name]
    shapes = [(whole.shape[0], whole.shape[1]) for whole in wholes]
    groups = group_by_shape(shapes, scorer.pixels_per_forward // (2 if plan.mirrored else 1))
    scores = scorer.score_batches([torch.stack([wholes[i] for i in group]) for group in groups], plan.mirrored)
    means = torch.cat([views_nvk.double().mean(dim=1).float() for views_nvk in scores]).cpu().numpy()
    scores_bk = np.empty_like(means)
    scores_bk[[i for group in groups for i in group]] = means
    return scores_bk


def assemble(parts: Sequence[Scored], images: ImageList, plan: Pass) -> np.ndarray:
    """One (N, K) table in the order of the list. Raises DataError unless every readable image came exactly once."""
    times = np.zeros(len(images), dtype=np.int64)
    broken = set(images.broken).union(*(part.broken for part in parts))
    filled = [part for part in parts if len(part.image_ids)]
    if not filled:
        raise DataError(f"{images.root}: none of the {len(images)} images can be decoded")
    scores_nk = np.full((len(images), filled[0].scores_bk.shape[1]), np.nan, dtype=np.float32)
    for part in filled:
        scores_nk[part.image_ids] = part.scores_bk
        np.add.at(times, part.image_ids, 1)
    wrong = [image_id for image_id in range(len(images)) if times[image_id] != (image_id not in broken)]
    if wrong:
        first = wrong[0]
        raise DataError(
            f"{plan.name}: {len(wrong)} of {len(images)} images were not scored exactly once; first: {images.names[first]}, "
            f"{times[first]} times. No result is reported"
        )
    bad = [image_id for image_id in np.flatnonzero(~np.isfinite(scores_nk).all(axis=1)).tolist() if image_id not in broken]
    if bad:
        raise DataError(f"{plan.name}: the network's scores of {counted(len(bad), 'image')} are not finite; first: {images.names[bad[0]]}")
    return scores_nk


def broken_error(images: ImageList, broken: dict[int, str]) -> DataError:
    """The error for images that cannot be decoded, naming the first."""
    first = min(broken)
    return DataError(
        f"{counted(len(broken), 'image')} cannot be decoded; first: {images.source.name(first)}: "
        f"{broken[first]}. Replace it, or leave such images out, counted and named, with --on-broken skip"
    )


def _decode_ahead(
    images: ImageList, todo: Sequence[tuple[Chunk, tuple[Pass, ...]]], build_decoder: BuildDecoder
) -> Iterator[tuple[Chunk, tuple[Pass, ...], DecodedChunk]]:
    """Chunks with the pixels for their passes; a thread decodes the next ones while the network works."""
    decoders: dict[tuple[Pass, ...], Decoder] = {}

    def decode(item: tuple[Chunk, tuple[Pass, ...]]) -> tuple[Chunk, tuple[Pass, ...], DecodedChunk]:
        chunk, passes = item
        if passes not in decoders:
            decoders[passes] = build_decoder(passes)
        return chunk, passes, decoders[passes].decode([images.read(image_id) for image_id in chunk.image_ids])

    try:
        yield from run_ahead(decode, todo)
    finally:
        for decoder in decoders.values():
            decoder.close()
