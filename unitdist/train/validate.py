"""Single-crop validation, exact on any number of ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from unitdist.data.batch import Loader
from unitdist.errors import TrainingError, UnitdistError
from unitdist.train.agreement import agreed
from unitdist.train.engine import Engine
from unitdist.train.stopping import StopRequest
from unitdist.train.watchdog import Watchdog


@torch.no_grad()
def validate(
    engine: Engine,
    loader: Loader,
    *,
    stop: StopRequest | None = None,
    watchdog: Watchdog | None = None,
    state: dict[str, Tensor] | None = None,
) -> dict[str, float | int]:
    """Top-1 and top-5 in percent, mean loss and count over the whole validation set, on every rank.

    Each image counts once: integer counts over `valid` images are summed over ranks, and their total must be the size
    of the set, else TrainingError. `state` (an EMA's) replaces the network's weights and running statistics.
    With fewer than five classes top-5 takes all of them. A rank that cannot read an image makes all ranks raise DataError.
    """
    assert engine.module is not None
    module = engine.module
    was_training = module.training
    module.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=engine.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    batches, failure = loader.iterate(0), None
    for _ in range(loader.batches_per_epoch):
        if stop is not None:
            stop.check()
        if failure is not None:
            continue  # the other ranks go on until they know, and meet in check()
        try:
            batch = next(batches)
        except UnitdistError as error:
            failure = error
            if stop is not None:
                stop.fail(error)
            continue
        images, labels, valid = (
            part.to(engine.device, non_blocking=True) for part in (batch.images, batch.labels, batch.valid)
        )
        with engine.autocast():
            logits = module(images) if state is None else functional_call(module, state, (images,))
        logits = logits.float()
        losses = nn.functional.cross_entropy(logits, labels.clamp(min=0), reduction="none")
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        counts += torch.stack([(top[:, 0] & valid).sum(), (top.any(1) & valid).sum(), valid.sum()])
        loss_sum += (losses * valid).sum().double()
        if watchdog is not None:
            watchdog.again()
    module.train(was_training)
    with agreed(engine.world):  # a failure in the last batches, which no check() has told yet
        if failure is not None:
            raise failure
    top1, top5, count = engine.sum_over_ranks(counts).tolist()
    total_loss = float(engine.sum_over_ranks(loss_sum))
    if count != loader.num_samples:
        raise TrainingError(f"validation saw {count} images of {loader.num_samples}; its accuracy would be wrong")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": total_loss / count, "count": count}


def broadcast_running_statistics(engine: Engine) -> None:
    """Give every rank rank 0's buffers. They differ only where statistics are not synchronized over the whole world;
    what is validated and saved is then rank 0's."""
    assert engine.module is not None
    if engine.world.size > 1:
        for buffer in engine.module.buffers():
            dist.broadcast(buffer, src=0)
