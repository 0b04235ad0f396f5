"""The net of Fig. 2: an MLP on MNIST whose narrow last hidden layer of 8 units is watched."""

from collections import OrderedDict

from torch import Tensor, nn

from unitdist.models.norm import NormAndRelu

INPUT_FEATURES = 28 * 28
HIDDEN_FEATURES = (*(100,) * 10, 8)
WATCHED_LAYER = f"layers.norm{len(HIDDEN_FEATURES)}"
"""Module name of the 8-unit layer's norm, whose outputs Fig. 2 follows."""


class MnistMlp(nn.Module):
    """784 -> 10 layers of 100 -> 8 -> num_classes; each hidden linear layer is followed by norm, then ReLU.

    Images of any layout with 784 values per sample are flattened. The linear layers before a norm have no
    bias (the norm takes it away). Module names: layers.{linear,norm,relu}<1..11>, classifier.
    """

    def __init__(self, norm_and_relu: NormAndRelu, *, num_classes: int) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        in_features = INPUT_FEATURES
        for number, features in enumerate(HIDDEN_FEATURES, start=1):
            norm, relu = norm_and_relu(features)
            layers[f"linear{number}"] = nn.Linear(in_features, features, bias=False)
            layers[f"norm{number}"] = norm
            layers[f"relu{number}"] = relu
            in_features = features
        self.layers = nn.Sequential(layers)
        self.classifier = nn.Linear(in_features, num_classes)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, 1, 28, 28) or (N, 784) -> logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.layers(x_nchw.flatten(1)))
        return logits
