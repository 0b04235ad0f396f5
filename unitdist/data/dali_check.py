"""Which encoded images does DALI's decoder get through? For scans; training has its own search (dali_graph.py)."""

from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, types


class DecodeCheck:
    """Decodes whole images with the operator that training uses, on the CPU, and tells which it refuses."""

    def __init__(self, num_threads: int, max_batch_size: int = 64) -> None:
        self._num_threads = num_threads
        self._max_batch_size = max_batch_size
        self._next: list[bytes] = []
        self._pipeline: Pipeline | None = None

    def _build(self) -> Pipeline:
        pipeline = Pipeline(
            batch_size=self._max_batch_size, num_threads=self._num_threads, device_id=None, prefetch_queue_depth=1
        )

        def feed() -> list[Any]:
            return [np.frombuffer(image, dtype=np.uint8) for image in self._next]

        with pipeline:
            encoded = fn.external_source(source=feed, batch=True, dtype=types.UINT8, ndim=1)
            image = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)
            # One number per image leaves the pipeline; the pixels stay inside.
            pipeline.set_outputs(fn.reductions.sum(image, dtype=types.UINT64))
        pipeline.build()
        return pipeline

    def decodes(self, images: list[bytes]) -> list[bool]:
        """One verdict per image. A batch that fails is halved until the culprits stand alone."""
        verdicts: list[bool] = []
        for start in range(0, len(images), self._max_batch_size):
            verdicts += self._verdicts(images[start : start + self._max_batch_size])
        return verdicts

    def _verdicts(self, images: list[bytes]) -> list[bool]:
        self._next = images
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            self._pipeline.run()
            return [True] * len(images)
        except RuntimeError:
            self._pipeline = None
        if len(images) == 1:
            return [False]
        half = len(images) // 2
        return self._verdicts(images[:half]) + self._verdicts(images[half:])
