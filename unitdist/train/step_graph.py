"""The training step recorded once as a CUDA graph and replayed from then on (`train.cuda_graph`).

Eagerly, a step of a deep net launches thousands of kernels one by one, and at small batches the host is slower than the
device. A graph launches them at once. What changes from step to step lies in tensors with fixed addresses: the inputs,
and the learning rate (a tensor in the optimizer). Random draws on the device follow torch's generator, which is
seeded before every step as in an eager run.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from unitdist.config import Config
from unitdist.errors import ConfigError, TrainingError
from unitdist.world import World

WARM_UP_STEPS = 3
"""Steps before the recording, run eagerly: they choose convolution algorithms, compile kernels and make the
optimizer's buffers, none of which a recording may do."""

Work = Callable[[], None]


class Recorder(Protocol):
    """A device's way to record work."""

    def run(self, work: Work) -> None:
        """Do the work now, where it will be recorded later."""

    def record(self, work: Work) -> Work:
        """Record the work without doing it; what is returned does it, as often as it is called."""


class CudaRecorder:
    """Records on a stream of its own, on which the warm-up runs too; replays on the caller's stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Work) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads of the data loader may allocate and copy meanwhile, which "global" forbids.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class StepGraph:
    """`step(*inputs)`, run eagerly WARM_UP_STEPS times, then recorded, then replayed, once per call of `run`.

    `step` must read nothing back to the host and keep no reference to what it computes; every change it makes must be in
    place. Its inputs are copied into fixed tensors first. Inputs of other shapes (the next stage of a progressive resizing) drop
    the recording and begin anew.
    """

    def __init__(self, step: Callable[..., None], recorder: Recorder) -> None:
        self._step = step
        self._recorder = recorder
        self._inputs: tuple[Tensor, ...] = ()
        self._warm_steps = 0
        self._replay: Work | None = None

    def run(self, *inputs: Tensor) -> None:
        """One step on `inputs`. Raises TrainingError when the step cannot be recorded."""
        if [(t.shape, t.dtype) for t in inputs] != [(t.shape, t.dtype) for t in self._inputs]:
            self._replay = None  # before the next warm-up: its memory is needed
            self._inputs = tuple(torch.empty_like(tensor) for tensor in inputs)
            self._warm_steps = 0
        for fixed, given in zip(self._inputs, inputs, strict=True):
            fixed.copy_(given, non_blocking=True)
        if self._warm_steps < WARM_UP_STEPS:
            self._recorder.run(self._work)
            self._warm_steps += 1
            return
        if self._replay is None:
            self._replay = self._record()
        self._replay()

    def _work(self) -> None:
        self._step(*self._inputs)

    def _record(self) -> Work:
        try:
            return self._recorder.record(self._work)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise TrainingError(
                f"the training step cannot be recorded as a CUDA graph ({reason}); set train.cuda_graph=false"
            ) from error


def check_ranks(config: Config, world: World) -> None:
    """Raises ConfigError for several ranks: DDP's and NCCL's part of a recorded step has not been tried on GPUs."""
    if config.train.cuda_graph and world.size > 1:
        raise ConfigError(
            f"train.cuda_graph: true is for one process, this job has {world.size}: recording DDP's and NCCL's collectives is "
            "not offered; set train.cuda_graph=false"
        )


def check_device(config: Config) -> None:
    """Raises ConfigError without a CUDA device."""
    if config.train.cuda_graph and not torch.cuda.is_available():
        raise ConfigError(
            "train.cuda_graph: true needs a CUDA device, and torch sees none here; set train.cuda_graph=false to train on the CPU"
        )
