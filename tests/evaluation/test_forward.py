import pytest
import torch
from torch import nn

from evaluation.forward import Scorer
from unitdist.errors import DataError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def build(model: nn.Module, **settings: object) -> Scorer:
    defaults = {"mean": MEAN, "std": STD, "device": torch.device("cpu"), "pixels_per_forward": 10_000, "average": "softmax"}
    return Scorer(model, **{**defaults, **settings})  # type: ignore[arg-type]


@pytest.fixture
def pixels_nhwc() -> torch.Tensor:
    return torch.randint(0, 256, (7, 32, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class OutOfMemoryAbove(nn.Module):
    """Fails as a small GPU does for batches above `limit`, and counts the images that came through."""

    def __init__(self, model: nn.Module, limit: int) -> None:
        super().__init__()
        self.model, self.limit, self.batches = model, limit, []

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        if len(x_nchw) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.batches.append(len(x_nchw))
        return self.model(x_nchw)


def test_scores_are_the_networks_probabilities_of_normalized_images(tiny_net: nn.Module, pixels_nhwc: torch.Tensor) -> None:
    x_nchw = (pixels_nhwc.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        plain = tiny_net(x_nchw).softmax(1)
        mirrored = tiny_net(x_nchw.flip(3)).softmax(1)
    scorer = build(tiny_net)
    (scores_nvk,) = scorer.score_batches([pixels_nhwc], mirrored=True)
    scorer.close()
    assert scores_nvk.shape == (7, 2, 16)
    torch.testing.assert_close(scores_nvk[:, 0], plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(scores_nvk[:, 1], mirrored, atol=1e-6, rtol=0)


def test_logits_are_not_passed_through_a_softmax(tiny_net: nn.Module, pixels_nhwc: torch.Tensor) -> None:
    scorers = [build(tiny_net, average=average) for average in ("softmax", "logits")]
    probabilities, logits = (scorer.score_batches([pixels_nhwc], mirrored=False)[0] for scorer in scorers)
    torch.testing.assert_close(logits.softmax(2), probabilities, atol=1e-6, rtol=0)
    assert (logits < 0).any()


@pytest.mark.parametrize("cpu_threads", [1, 3])
def test_the_bits_do_not_depend_on_threads(tiny_net: nn.Module, pixels_nhwc: torch.Tensor, cpu_threads: int) -> None:
    batches = [pixels_nhwc[:4], pixels_nhwc[4:], pixels_nhwc[:1]]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    scorer = build(tiny_net, cpu_threads=cpu_threads)
    scores = scorer.score_batches(batches, mirrored=True)
    scorer.close()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    reference = build(tiny_net).score_batches(batches, mirrored=True)
    torch.set_num_threads(before)
    for ours, expected in zip(scores, reference, strict=True):
        assert torch.equal(ours, expected)


def test_too_little_memory_halves_the_batch_says_so_and_goes_on(tiny_net: nn.Module, pixels_nhwc: torch.Tensor) -> None:
    said: list[str] = []
    model = OutOfMemoryAbove(tiny_net, limit=4)
    scorer = build(model, pixels_per_forward=14 * 32 * 40, say=said.append)
    (scores_nvk,) = scorer.score_batches([pixels_nhwc], mirrored=True)
    (reference,) = build(tiny_net, pixels_per_forward=14 * 32 * 40).score_batches([pixels_nhwc], mirrored=True)
    torch.testing.assert_close(scores_nvk, reference, atol=1e-6, rtol=0)
    assert model.batches == [2, 2, 2, 2, 2, 2, 2]  # of 14, 7 do not fit; 3 images and their mirrors are 6; 1 and its are 2
    assert len(said) == 2
    assert said[0].startswith("out of memory on cpu with 7 images of 32x40; going on with at most 8960 pixels")


def test_an_image_that_does_not_fit_alone_is_an_error(tiny_net: nn.Module, pixels_nhwc: torch.Tensor) -> None:
    scorer = build(OutOfMemoryAbove(tiny_net, limit=1), say=lambda line: None)
    with pytest.raises(DataError, match="too little memory for one image of 32x40 pixels and its mirror; use smaller scales"):
        scorer.score_batches([pixels_nhwc], mirrored=True)


def test_bfloat16_is_close_and_returns_float32(tiny_net: nn.Module, pixels_nhwc: torch.Tensor) -> None:
    (exact,) = build(tiny_net).score_batches([pixels_nhwc], mirrored=False)
    (rounded,) = build(tiny_net, precision="bf16").score_batches([pixels_nhwc], mirrored=False)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0)


def test_contiguous_and_channels_last_agree(tiny_net: nn.Module, pixels_nhwc: torch.Tensor) -> None:
    first, second = (build(tiny_net, channels_last=last).score_batches([pixels_nhwc], mirrored=True)[0] for last in (True, False))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
