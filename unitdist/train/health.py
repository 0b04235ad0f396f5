"""Is the training sound? Losses and gradients that are not finite, losses that jump, ranks whose weights differ.

A step that is not finite is found before its update, so weights, optimizer and (put back) running statistics stay as they
were before it. What follows says `health.on_nonfinite`. All ranks see the same numbers and decide alike.
"""

import math
import statistics
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unitdist.config import HealthConfig
from unitdist.data.batch import Batch
from unitdist.errors import CheckpointError, TrainingError
from unitdist.train import engine as engines
from unitdist.train.agreement import from_rank_zero, warn
from unitdist.train.checkpoint import load_model_state
from unitdist.train.metrics import TrainSums
from unitdist.train.nonfinite_batch import save_batch
from unitdist.train.retention import read_newest
from unitdist.train.saving import restore
from unitdist.train.state import Run, learning_rate_of_step

_WINDOWS = 20
"""Log windows whose median a loss is compared with."""


class BeforeStep:
    """What forward passes change beside gradients: running statistics and the sums of the metrics. Kept, and put back."""

    def __init__(self, module: nn.Module, sums: TrainSums) -> None:
        self._live = [*module.buffers(), sums.window]
        self._kept = [value.clone() for value in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def put_back(self) -> None:
        torch._foreach_copy_(self._live, self._kept)


class LossSpikes:
    """Compares the loss of a log window with the median of the 20 before it. Starts anew with each start of the job."""

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=_WINDOWS)

    def note(self, loss: float) -> float | None:
        """The median, where `loss` is more than `health.spike_factor` times it."""
        median = statistics.median(self._losses) if len(self._losses) == _WINDOWS else None
        self._losses.append(loss)
        return median if self._factor is not None and median is not None and loss > self._factor * median else None


@dataclass(frozen=True, kw_only=True)
class NotFinite:
    """What is wrong with a step: every rank's loss (summed over micro-batches) and norm of the reduced gradient, in rank order."""

    losses: list[float]
    gradient_norms: list[float]

    @property
    def ranks(self) -> list[int]:
        return [rank for rank, loss in enumerate(self.losses) if not math.isfinite(loss)]

    def __str__(self) -> str:
        if not self.ranks:
            return "the gradient is not finite (the loss is)"
        on = f" on rank {', '.join(map(str, self.ranks))}" if len(self.losses) > 1 else ""
        return f"the loss is {self.losses[self.ranks[0]]:g}{on}"


class Watch:
    """Judges every step before its update, and does what the config says about the bad ones."""

    def __init__(self, config: HealthConfig, module: nn.Module, sums: TrainSums) -> None:
        self.before = BeforeStep(module, sums)
        self.spikes = LossSpikes(config.spike_factor)
        self.in_a_row = 0
        self._config = config
        self._back_at: int | None = None

    def judge(self, engine: engines.Engine, losses: list[Tensor]) -> NotFinite | None:
        """None for a sound step. Reads two numbers a rank from the device, after the backward and before the update.

        Under fp16 the gradient is the loss scaler's business, which skips such a step and lowers its scale.
        """
        loss = torch.stack(losses).sum().double()
        norm = torch.zeros_like(loss) if engine.scaler is not None else engines.gradient_norm(engine).double()
        by_rank = engine.gather_over_ranks(torch.stack([loss, norm])).tolist()
        if all(math.isfinite(value) for pair in by_rank for value in pair):
            return None
        return NotFinite(losses=[loss for loss, _ in by_rank], gradient_norms=[norm for _, norm in by_rank])

    def handle(self, run: Run, batches: list[Batch], found: NotFinite) -> None:
        """After the bad step's backward, instead of its update. Raises TrainingError, on all ranks, where the run has to end."""
        self.before.put_back()
        engines.drop_gradients(run.engine)
        step = run.state.step + 1
        where = (
            f"{found} at step {step} (epoch {run.state.epoch + 1}, lr {learning_rate_of_step(run, run.state.step):g})"
        )
        kept = save_batch(run, batches, losses=found.losses, gradient_norms=found.gradient_norms)
        if run.record is not None:
            policy = {"policy": self._config.on_nonfinite, "reason": str(found), "ranks": found.ranks}
            run.record.write("nonfinite", {"epoch": run.state.epoch + 1, "step": step, **policy})
        self.in_a_row += 1
        if self._config.on_nonfinite == "stop":
            raise _agreed_error(f"{where}; {kept}the last checkpoint is {_last(run)}; lower optim.lr, or add warm-up")
        if self._config.on_nonfinite == "rollback":
            self._roll_back(run, where, kept)
        elif self.in_a_row > self._config.max_in_a_row:
            raise _agreed_error(
                f"{where}; {kept}{self._config.max_in_a_row} steps before it were skipped, which health.max_in_a_row allows; "
                f"the last checkpoint is {_last(run)}"
            )
        elif run.engine.world.is_main:
            warn(run.engine.world, f"{where}; {kept}its update is skipped ({self.in_a_row} in a row)")

    def _roll_back(self, run: Run, where: str, kept: str) -> None:
        """Weights, optimizer and averaged weights of the newest checkpoint; data and learning rate go on after the bad batch."""

        def newest() -> tuple[str, dict[str, Any]]:
            run.writer.wait()
            path, checkpoint, _ = read_newest(run.folder.path)
            if checkpoint is None:
                raise CheckpointError(f"{where}; {kept}there is no checkpoint to roll back to yet")
            return str(path), checkpoint

        path, checkpoint = from_rank_zero(run.engine.world, newest)
        self.in_a_row = self.in_a_row if self._back_at == checkpoint["step"] else 1
        self._back_at = checkpoint["step"]
        if self.in_a_row > self._config.max_in_a_row:
            raise _agreed_error(
                f"{where}; {kept}the run was rolled back to {path} {self._config.max_in_a_row} times, which health.max_in_a_row allows"
            )
        assert run.engine.module is not None
        load_model_state(run.engine.module, checkpoint["model"], path)
        restore(run, checkpoint)
        if run.engine.world.is_main:
            warn(
                run.engine.world,
                f"{where}; {kept}rolled back to the weights of step {checkpoint['step']} ({path}); the images of steps "
                f"{checkpoint['step'] + 1} to {run.state.step + 1} are left out, data and learning rate go on after them",
            )

    def sound(self) -> None:
        """After a good update."""
        if self._config.on_nonfinite != "rollback":
            self.in_a_row = 0


def check_same_parameters(run: Run) -> None:
    """Compare every rank's parameters, bit by bit, through one sum a parameter. Raises TrainingError on all ranks.

    A flipped bit changes the sum of the words (integers, modulo 2^64) for certain; two changes can cancel each other.
    """
    assert run.engine.module is not None
    names = [name for name, _ in run.engine.module.named_parameters()]
    sums = torch.stack([_sum_of_words(parameter) for parameter in run.engine.module.parameters()])
    by_rank = run.engine.gather_over_ranks(sums).cpu()
    if bool((by_rank == by_rank[0]).all()):
        return
    counts = [Counter(column) for column in by_rank.T.tolist()]
    first = next(index for index, count in enumerate(counts) if len(count) > 1)
    usual, votes = counts[first].most_common(1)[0]
    if 2 * votes > run.engine.world.size:
        odd = [rank for rank, value in enumerate(by_rank[:, first].tolist()) if value != usual]
        who = f"rank {', '.join(map(str, odd))} differs from the other {votes}"
    else:
        who = f"the {run.engine.world.size} ranks differ, and no majority says which is right,"
    raise _agreed_error(
        f"after step {run.state.step} {who} in the parameters, first in {names[first]}: a memory, device or link alters bits. They "
        f"were equal {run.config.health.checksum_every_steps} steps before; check that machine, and resume without it from a checkpoint "
        f"of before ({run.folder.path})"
    )


def _sum_of_words(parameter: nn.Parameter) -> Tensor:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return parameter.detach().view(words).sum(dtype=torch.int64)


def _agreed_error(message: str) -> TrainingError:
    error = TrainingError(message)
    error.speaker = 0  # all ranks saw the same numbers
    return error


def _last(run: Run) -> str:
    return str(run.folder.last) if run.folder.last.exists() else "none"
