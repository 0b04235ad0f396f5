"""The network as a function from uint8 pixels to scores: normalization, mirrors, memory format, autocast, batch limits."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import torch
from torch import nn

from unitdist.errors import DataError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Scorer:
    """Runs the network on batches of at most `pixels_per_forward` pixels, mirrors included.

    The scores of a batch are the same bits whoever computes them on such a device. On a CPU that needs a fixed number of threads
    per convolution (two threads add in another order than one), so every batch gets one, and `cpu_threads` batches run
    side by side. Only where a GPU's memory is too small is the limit halved, said aloud, for the rest of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        pixels_per_forward: int,
        average: Literal["softmax", "logits"],
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        channels_last: bool = True,
        compile_model: bool = False,
        cpu_threads: int = 1,
        say: Callable[[str], None] = print,
    ) -> None:
        self.pixels_per_forward = pixels_per_forward
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._model: Callable[[torch.Tensor], torch.Tensor] = model.to(device).to(memory_format=self._format).eval()
        if compile_model:
            self._model = torch.compile(model)
        self._device = device
        self._autocast_dtype = PRECISIONS[precision]
        self._softmax = average == "softmax"
        # uint8 x becomes (x - 255 mean) / (255 std).
        self._shift_c11 = (255 * torch.tensor(mean, dtype=torch.float32, device=device)).view(-1, 1, 1)
        self._scale_c11 = (255 * torch.tensor(std, dtype=torch.float32, device=device)).view(-1, 1, 1)
        self._threads = ThreadPoolExecutor(max_workers=cpu_threads) if device.type == "cpu" and cpu_threads > 1 else None
        self._torch_threads = torch.get_num_threads()
        if device.type == "cpu":
            torch.set_num_threads(1)
        self._say = say

    def close(self) -> None:
        """Stop the threads, and give torch back the number that it had."""
        if self._threads is not None:
            self._threads.shutdown()
        torch.set_num_threads(self._torch_threads)

    def images_per_forward(self, height: int, width: int, mirrored: bool) -> int:
        """How many images of that shape one forward pass takes, at least 1."""
        return max(1, self.pixels_per_forward // (height * width * (2 if mirrored else 1)))

    def score_batches(self, batches_nhwc: Sequence[torch.Tensor], mirrored: bool) -> list[torch.Tensor]:
        """Scores of batches of uint8 (N, H, W, 3) images: float32 (N, 1, K) each, or (N, 2, K) with each image's mirror second.

        Probabilities or logits, as `average` says. Raises DataError when a single image does not fit into the memory.
        """
        score = partial(self._score_in_memory, mirrored=mirrored)
        return list(self._threads.map(score, batches_nhwc)) if self._threads else [score(batch) for batch in batches_nhwc]

    @torch.inference_mode()
    def _score_in_memory(self, pixels_nhwc: torch.Tensor, *, mirrored: bool) -> torch.Tensor:
        height, width = pixels_nhwc.shape[1:3]
        pieces, start = [], 0
        while start < len(pixels_nhwc):
            piece_nhwc = pixels_nhwc[start : start + self.images_per_forward(height, width, mirrored)]
            try:
                pieces.append(self._forward(piece_nhwc, mirrored))
            except torch.OutOfMemoryError:
                self._halve(len(piece_nhwc), height, width, mirrored)
                continue
            start += len(piece_nhwc)
        return torch.cat(pieces)

    def _forward(self, pixels_nhwc: torch.Tensor, mirrored: bool) -> torch.Tensor:
        if self._device.type == "cuda" and pixels_nhwc.device.type == "cpu":
            pixels_nhwc = pixels_nhwc.pin_memory()
        x_nchw = pixels_nhwc.to(self._device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32)
        x_nchw = (x_nchw - self._shift_c11) / self._scale_c11
        if mirrored:
            x_nchw = torch.cat([x_nchw, x_nchw.flip(-1)])
        x_nchw = x_nchw.contiguous(memory_format=self._format)
        with torch.autocast(self._device.type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None):
            logits_nk = self._model(x_nchw)
        scores_nk = logits_nk.float().softmax(dim=1) if self._softmax else logits_nk.float()
        return scores_nk.view(2 if mirrored else 1, len(pixels_nhwc), -1).transpose(0, 1)

    def _halve(self, images: int, height: int, width: int, mirrored: bool) -> None:
        torch.cuda.empty_cache()
        if images == 1:
            raise DataError(
                f"the {self._device} has too little memory for one image of {height}x{width} pixels"
                f"{' and its mirror' if mirrored else ''}; use smaller scales, --no-mirror, or --device cpu"
            )
        used = images * height * width * (2 if mirrored else 1)
        self.pixels_per_forward = used // 2
        self._say(
            f"out of memory on {self._device} with {images} images of {height}x{width}; going on with at most "
            f"{self.pixels_per_forward} pixels per forward pass (--views-per-forward sets it from the start)"
        )
