"""How the weights start: He et al. (2015), the same draws whatever the normalization."""

from torch import nn


def he_init(model: nn.Module) -> None:
    """Draw every convolution and linear weight from N(0, 2/fan_in), in module order; biases become 0.

    The draws come from torch's global generator, so the caller's seed decides them. Normalization layers
    draw nothing and keep weight 1, bias 0, alpha 0: two nets that differ in nothing but their normalization get
    byte-identical weights from the same seed.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
