"""Many nets of Fig. 2 side by side on one leading axis, so that treatments of alpha and seeds share one core.

Axes: s net, n sample, i features of a layer's input, o its outputs, d units of a normalization layer. The layer is
Algorithm 1 in `unitdist.functional`'s literal form, batched over the nets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from unitdist.config import ModelConfig
from unitdist.functional.unitization import unitization_images
from unitdist.models.build import build_model
from unitdist.models.mlp import HIDDEN_FEATURES

MOMENTA = (0.1, 0.01)
"""Running statistics are kept with each of these at once; they do not act back on the training."""

Statistics = list[tuple[Tensor, Tensor]]
"""(mean, biased variance), each (S, d), of every normalization layer."""


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What is done to alpha, from its start on. `confined`: put back into [0, 1] after each step."""

    start: float = 0.0
    trained: bool = True
    confined: bool = False
    divide_by_width: bool = False


TREATMENTS = {
    "bn": Treatment(trained=False),
    "unit": Treatment(),
    "confined": Treatment(confined=True),
    "one": Treatment(start=1.0, trained=False),
    "width": Treatment(divide_by_width=True),
}


class StackedMlp:
    """S nets 784 -> 10 x 100 -> 8 -> 10; net s has treatments[s] and the initial weights of `build_model` at seeds[s]."""

    def __init__(self, treatments: list[Treatment], seeds: list[int]) -> None:
        nets = []
        for seed in seeds:
            torch.manual_seed(seed)
            model = build_model(ModelConfig(name="mnist_mlp", num_classes=10, norm="batchnorm"), image_size_px=28)
            nets.append(dict(model.named_parameters()))
        self.parameters = {key: torch.stack([net[key].detach() for net in nets]) for key in nets[0]}
        start_s1 = torch.tensor([[treatment.start] for treatment in treatments])
        for number, features in enumerate(HIDDEN_FEATURES, start=1):
            self.parameters[f"layers.norm{number}.alpha"] = start_s1.repeat(1, features)
        for value in self.parameters.values():
            value.requires_grad_(True)
        self.running: dict[float, Statistics] = {
            momentum: [(torch.zeros(len(nets), d), torch.ones(len(nets), d)) for d in HIDDEN_FEATURES]
            for momentum in MOMENTA
        }
        self._divisors_s = [
            torch.tensor([float(width) if treatment.divide_by_width else 1.0 for treatment in treatments])
            for width in HIDDEN_FEATURES
        ]
        self._trained_s1 = torch.tensor([[float(treatment.trained)] for treatment in treatments])
        ends = [(0.0, 1.0) if treatment.confined else (-torch.inf, torch.inf) for treatment in treatments]
        self._low_s1, self._high_s1 = torch.tensor(ends)[:, :, None].unbind(1)

    def forward(self, x_sni: Tensor, statistics: Statistics | None) -> tuple[Tensor, Tensor, Statistics]:
        """(logits (S, N, 10), the 8-unit layer's normalized outputs before the ReLU (S, N, 8), the statistics used).

        statistics None: those of the batch, as in training.
        """
        used: Statistics = []
        normalized_snd = x_sni
        for number, divisor_s in enumerate(self._divisors_s, start=1):
            weight_sio = self.parameters[f"layers.linear{number}.weight"].transpose(1, 2)
            h_snd = torch.bmm(x_sni, weight_sio)
            if statistics is None:
                var_sd, mean_sd = torch.var_mean(h_snd, 1, correction=0)
            else:
                mean_sd, var_sd = statistics[number - 1]
            used.append((mean_sd, var_sd))
            weight, bias, alpha = (self.parameters[f"layers.norm{number}.{key}"] for key in ("weight", "bias", "alpha"))
            normalized_snd = _normalize(h_snd, weight, bias, alpha, divisor_s, mean_sd, var_sd)
            x_sni = normalized_snd.relu()
        weight_sio = self.parameters["classifier.weight"].transpose(1, 2)
        logits_sno = torch.baddbmm(self.parameters["classifier.bias"][:, None], x_sni, weight_sio)
        return logits_sno, normalized_snd, used

    def loss(self, x_sni: Tensor, labels_sn: Tensor) -> tuple[Tensor, Statistics]:
        """(mean cross-entropy of each net (S,), the batch statistics)."""
        logits_sno, _, used = self.forward(x_sni, None)
        loss_sn = cross_entropy(logits_sno.flatten(0, 1), labels_sn.flatten(), reduction="none")
        return loss_sn.view(labels_sn.shape).mean(1), used

    @torch.no_grad()
    def step(self, loss_s: Tensor, used: Statistics, lr: float, batch_size: int) -> None:
        """One step of plain SGD on each net's own loss, and of the running statistics (unbiased variance)."""
        values = list(self.parameters.values())
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss_s.sum(), values)
        for (name, value), gradient in zip(self.parameters.items(), gradients, strict=True):
            if name.endswith("alpha"):
                value.sub_(lr * self._trained_s1 * gradient)
                value.clamp_(self._low_s1, self._high_s1)
            else:
                value.sub_(lr * gradient)
        for momentum, running in self.running.items():
            for (mean_sd, var_sd), (batch_mean_sd, batch_var_sd) in zip(running, used, strict=True):
                mean_sd.lerp_(batch_mean_sd.detach(), momentum)
                var_sd.lerp_(batch_var_sd.detach() * (batch_size / (batch_size - 1)), momentum)


def _normalize(
    h_snd: Tensor,
    weight_sd: Tensor,
    bias_sd: Tensor,
    alpha_sd: Tensor,
    divisor_s: Tensor,
    mean_sd: Tensor,
    var_sd: Tensor,
) -> Tensor:
    def one_net(
        h: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, divisor: Tensor, mean: Tensor, var: Tensor
    ) -> Tensor:
        return unitization_images(h, weight, bias, alpha, norm_divisor=divisor, mean_c=mean, var_c=var)

    y_snd: Tensor = torch.func.vmap(one_net)(h_snd, weight_sd, bias_sd, alpha_sd, divisor_s, mean_sd, var_sd)
    return y_snd
