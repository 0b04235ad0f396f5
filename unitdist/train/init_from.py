"""Weights to start a training from: `model.init_from`."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unitdist.config import Config, ModelConfig
from unitdist.errors import CheckpointError
from unitdist.models.build import build_model
from unitdist.train.checkpoint import load_model_state, read_file

EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict")
MODEL_KEYS = ("model", "state_dict", "model_state", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel, DDP and torch.compile put before every name."""
_OWN_OF_UNITIZATION = (".alpha", ".norm_divisor")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in `path`: averaged weights where there are such, names without DDP's and torch.compile's prefixes.

    A checkpoint of unitdist, timm or torchvision, a bare state dict, or safetensors. Code in a file is never run.
    Raises ConfigError where there is no such file, CheckpointError where it is damaged or holds no state dict.
    """
    if path.suffix == ".safetensors" and path.is_file():
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise CheckpointError(f"model.init_from: {path} is damaged or no safetensors file: {error}") from None
    content: Any = read_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"model.init_from: {path} holds a {type(content).__name__}, expected a state dict")
    state = next((content[key] for key in (*EMA_KEYS, *MODEL_KEYS) if isinstance(content.get(key), dict)), content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"model.init_from: {path} holds no state dict (looked for {', '.join(MODEL_KEYS + EMA_KEYS)}, and for names of tensors)"
        )
    return {plain_name(str(name)): value for name, value in state.items()}


def init_model(model: torch.nn.Module, state: dict[str, Tensor], config: Config) -> None:
    """Load `state` into a freshly built `model`, strictly but for what only Unitization has.

    A batch normalization checkpoint has no alpha, which stays 0, and no norm divisor, which stays that of
    data.image_size_px: the network starts as the one that was saved. Norm divisors in `state` are taken, as the weights
    were trained with them, unless model.norm_divisor says another. Without model.init_head the classifier stays as built.
    Raises CheckpointError that names what does not fit.
    """
    source = f"model.init_from: {config.model.init_from}"
    own = model.state_dict()
    head = _head_names(config)
    if config.model.init_head and any(name in state and state[name].shape != own[name].shape for name in head):
        name = next(name for name in head if name in state and state[name].shape != own[name].shape)
        raise CheckpointError(
            f"{source} has another number of classes: {name} is {tuple(state[name].shape)} there, {tuple(own[name].shape)} "
            "here; model.init_head=false starts the classifier anew"
        )
    taken = {name: value for name, value in state.items() if config.model.init_head or name not in head}
    kept = {
        name: value
        for name, value in own.items()
        if (name not in taken and name.endswith(_OWN_OF_UNITIZATION))
        or (name.endswith(".norm_divisor") and config.model.norm_divisor is not None)
        or (name in head and not config.model.init_head)
    }
    load_model_state(model, taken | kept, source)


def _head_names(config: Config) -> tuple[str, ...]:
    """Names of the parameters whose shape follows the number of classes."""
    shapes = []
    with torch.device("meta"):
        for classes in (2, 3):
            plain = ModelConfig(
                name=config.model.name,
                num_classes=classes,
                norm="batchnorm",
                stem_norm=config.model.stem_norm,
                final_norm=config.model.final_norm,
            )
            net = build_model(plain, image_size_px=config.data.image_size_px, sync=False)
            shapes.append({name: value.shape for name, value in net.state_dict().items()})
    return tuple(name for name in shapes[0] if shapes[0][name] != shapes[1][name])


def plain_name(name: str) -> str:
    """The name without what wrappers put before it."""
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name
