"""tools/paper_variants.py: the stacked nets are the project's nets, and the treatments of alpha are what they say."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from unitdist.config import ModelConfig
from unitdist.models.build import build_model

TOOLS = Path(__file__).resolve().parents[2] / "tools"
BATCH, STEPS, LR = 16, 3, 0.05


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(BATCH, 784, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def train_stack(names: list[str], seeds: list[int]):  # type: ignore[no-untyped-def]
    from paper_stacked import TREATMENTS, StackedMlp

    stack = StackedMlp([TREATMENTS[name] for name in names], seeds)
    for x_ni, labels_n in batches():
        loss_s, used = stack.loss(x_ni.expand(len(names), -1, -1), labels_n.expand(len(names), -1))
        stack.step(loss_s, used, LR, BATCH)
    return stack


def train_net(norm: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = ModelConfig(name="mnist_mlp", num_classes=10, norm=norm)  # type: ignore[arg-type]
    model = build_model(config, image_size_px=28)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for x_ni, labels_n in batches():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x_ni), labels_n).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("place", "norm", "seed"), [(0, "batchnorm", 0), (1, "unitization", 0), (2, "unitization", 1)])
def test_stacked_nets_train_as_the_projects_nets(place: int, norm: str, seed: int) -> None:
    stack, model = train_stack(["bn", "unit", "unit"], [0, 0, 1]), train_net(norm, seed)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(stack.parameters[name][place], parameter, rtol=1e-4, atol=2e-6, msg=name)
    for number in range(1, 12):
        layer = model.get_submodule(f"layers.norm{number}")
        mean_sd, var_sd = stack.running[0.1][number - 1]
        torch.testing.assert_close(mean_sd[place], layer.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(var_sd[place], layer.running_var, rtol=1e-4, atol=1e-5)


def test_treatments_of_alpha() -> None:
    names = ["bn", "unit", "confined", "one", "width"]
    alpha = dict(zip(names, train_stack(names, [0] * 5).parameters["layers.norm11.alpha"].detach(), strict=True))
    assert torch.equal(alpha["bn"], torch.zeros(8))
    assert torch.equal(alpha["one"], torch.ones(8))
    assert bool((alpha["unit"] < 0).any())
    assert bool((alpha["confined"] >= 0).all()) and bool((alpha["confined"] <= 1).all())
    assert not torch.equal(alpha["width"], alpha["unit"])


def test_a_width_divisor_divides_the_squared_norm_by_the_width() -> None:
    from paper_stacked import TREATMENTS, StackedMlp

    stack = StackedMlp([TREATMENTS["width"], TREATMENTS["unit"]], [0, 0])
    with torch.no_grad():
        for number in range(1, 12):
            stack.parameters[f"layers.norm{number}.alpha"].fill_(1)
    x_sni = batches()[0][0].expand(2, -1, -1)
    _, outputs_snd, _ = stack.forward(x_sni, None)
    lengths_s = torch.linalg.vector_norm(outputs_snd, dim=2).mean(1)
    torch.testing.assert_close(lengths_s, torch.tensor([8**0.5, 1.0]), rtol=1e-4, atol=0.0)
