"""Entry points of torch.hub: torch.hub.load("OWNER/REPOSITORY", "net", "preact_resnet101", num_classes=1000)."""

from torch import nn

dependencies = ["torch", "safetensors", "yaml"]


def net(
    name: str = "preact_resnet101",
    norm: str = "unitization",
    num_classes: int = 1000,
    image_size_px: int = 224,
) -> nn.Module:
    """A randomly initialized network of unitdist's, with the norm divisors of `image_size_px`.

    `name`: a model.name of the configuration (preact_resnet18 ... 152, cifar_resnet20, timm:NAME, ...).
    `norm`: unitization or batchnorm.
    """
    from unitdist.config import ModelConfig
    from unitdist.models.build import build_model

    config = ModelConfig(name=name, norm=norm, num_classes=num_classes)
    return build_model(config, image_size_px=image_size_px)


def pretrained(source: str) -> nn.Module:
    """A trained network, in evaluation mode: `source` as in unitdist.load_pretrained."""
    from unitdist.hub import load_pretrained

    return load_pretrained(source)
