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

from evaluation.decoding import DecodedChunk, Decoder, EncodedImage, run_ahead
from evaluation.forward import Scorer
from evaluation.fully_convolutional import group_by_shape, order_by_shape
from evaluation.image_list import ImageList
from evaluation.partial import PartialScores, Scored
from evaluation.progress import Progress
from evaluation.ranks import Ranks
from evaluation.views import Pass
from unitdist.errors import DataError

BuildDecoder = Callable[[tuple[Pass, ...]], Decoder]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Images that are decoded together, and the passes in which they are not scored yet."""

    number: int
    image_ids: tuple[int, ...]
    passes: tuple[Pass, ...]


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
    mine: dict[str, list[Scored]] = {plan.name: [] for plan in open_passes}
    todo: list[Chunk] = []
    for number, image_ids in list(enumerate(cut_chunks(images, images_per_chunk)))[ranks.world.rank :: ranks.world.size]:
        kept = {plan.name: partial.load(plan, number) for plan in open_passes}
        for name, scored in kept.items():
            mine[name] += [scored] if scored is not None else []
        missing = tuple(plan for plan in open_passes if kept[plan.name] is None)
        if missing:
            todo.append(Chunk(number=number, image_ids=image_ids, passes=missing))
    progress.start(sum(len(chunk.image_ids) for chunk in todo))
    for chunk, decoded in _decode_ahead(images, todo, build_decoder):
        broken = {chunk.image_ids[position]: reason for position, reason in decoded.broken.items()}
        if broken and not skip_broken:
            raise broken_error(images, broken)
        kept_ids = np.array([chunk.image_ids[position] for position in decoded.kept], dtype=np.int64)
        for plan in chunk.passes:
            scored = Scored(image_ids=kept_ids, scores_bk=pass_scores(decoded, plan, scorer), broken=broken)
            partial.save(plan, scored, chunk.number)
            mine[plan.name].append(scored)
        progress.advance(len(chunk.image_ids))
    progress.close()
    scoring_s = time.perf_counter() - started
    scores, broken = {}, dict(images.broken)
    for plan in passes:
        gathered = ranks.gather(mine.get(plan.name, []))
        if not ranks.world.is_main:
            continue
        whole = partial.load(plan) if plan.name in finished else None
        parts = [whole] if whole is not None else [scored for share in gathered for scored in share]
        scores[plan.name] = assemble(parts, images, plan)
        for part in parts:
            broken.update(part.broken)
        if whole is None:
            found = {image_id: reason for part in parts for image_id, reason in part.broken.items()}
            ids = np.arange(len(images), dtype=np.int64)[[image_id not in {**found, **images.broken} for image_id in range(len(images))]]
            partial.save(plan, Scored(image_ids=ids, scores_bk=scores[plan.name][ids], broken=found))
    if not ranks.world.is_main:
        return None
    return PassScores(scores=scores, broken=broken, seconds={"scoring": scoring_s, "images_scored": float(progress.done)})


def pass_scores(decoded: DecodedChunk, plan: Pass, scorer: Scorer) -> np.ndarray:
    """Mean scores over the views of one pass for the B images of a chunk: float32 (B, K), averaged in float64."""
    if not decoded.kept:
        return np.zeros((0, 0), dtype=np.float32)
    if plan.kind == "crops":
        pixels = decoded.crops[plan.name]
        images, windows = pixels.shape[:2]
        views_nvk = scorer.view_scores(pixels.flatten(0, 1), plan.mirrored)
        views_bvk = views_nvk.reshape(images, windows * views_nvk.shape[1], -1)
        return np.asarray(views_bvk.double().mean(dim=1).float().cpu().numpy())
    wholes = decoded.wholes[plan.name]
    rows: list[tuple[list[int], torch.Tensor]] = []
    for positions in group_by_shape([tuple(whole.shape[:2]) for whole in wholes], scorer.pixels_per_forward):
        views_nvk = scorer.view_scores(torch.stack([wholes[position] for position in positions]), plan.mirrored)
        rows.append((positions, views_nvk.double().mean(dim=1).float()))
    scores_bk = torch.empty(len(wholes), rows[0][1].shape[1])
    for positions, scores_nk in rows:
        scores_bk[positions] = scores_nk.cpu()
    return np.asarray(scores_bk.numpy())


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
        raise DataError(f"{plan.name}: the network's scores of {len(bad)} images are not finite; first: {images.names[bad[0]]}")
    return scores_nk


def broken_error(images: ImageList, broken: dict[int, str]) -> DataError:
    """The error for images that cannot be decoded, naming the first."""
    first = min(broken)
    return DataError(
        f"{len(broken)} image{'s' if len(broken) > 1 else ''} cannot be decoded; first: {images.root / images.names[first]}: "
        f"{broken[first]}. Replace it, or leave such images out, counted and named, with --on-broken skip"
    )


def _decode_ahead(
    images: ImageList, todo: Sequence[Chunk], build_decoder: BuildDecoder
) -> Iterator[tuple[Chunk, DecodedChunk]]:
    """Chunks with their pixels; a thread decodes the next ones while the network works."""
    decoders: dict[tuple[Pass, ...], Decoder] = {}

    def decode(chunk: Chunk) -> tuple[Chunk, DecodedChunk]:
        if chunk.passes not in decoders:
            decoders[chunk.passes] = build_decoder(chunk.passes)
        encoded: list[EncodedImage] = [images.read(image_id) for image_id in chunk.image_ids]
        return chunk, decoders[chunk.passes].decode(encoded)

    try:
        yield from run_ahead(decode, todo)
    finally:
        for decoder in decoders.values():
            decoder.close()
