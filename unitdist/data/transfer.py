"""From uint8 batches in the host's memory to normalized float32 on the device."""

from collections.abc import Iterator

import torch


def copy_ahead(images: Iterator[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield the (pinned) images on the device; on a GPU the next batch is copied while the last one is computed on."""
    if device.type != "cuda":
        for batch in images:
            yield batch.to(device)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: tuple[torch.Tensor, torch.cuda.Event] | None = None
    for batch in images:
        with torch.cuda.stream(copying):
            sent = batch.to(device, non_blocking=True), copying.record_event()
        if waiting is not None:
            yield _arrived(waiting, device)
        waiting = sent
    if waiting is not None:
        yield _arrived(waiting, device)


def _arrived(sent: tuple[torch.Tensor, torch.cuda.Event], device: torch.device) -> torch.Tensor:
    batch, event = sent
    computing = torch.cuda.current_stream(device)
    computing.wait_event(event)
    batch.record_stream(computing)
    return batch


def uint8_normalization(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift), each (1, C, 1, 1) float32, with uint8 * scale + shift = (uint8 / 255 - mean) / std."""
    mean_c, std_c = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    scale_c, shift_c = 1 / (255 * std_c), -mean_c / std_c
    return tuple(  # type: ignore[return-value]
        value.to(device, torch.float32)[None, :, None, None] for value in (scale_c, shift_c)
    )
