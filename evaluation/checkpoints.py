"""Any checkpoint as a network: unitdist's own, timm's, torchvision's, bare state dicts, safetensors.

Nothing is guessed: a file that does not name its network needs `model`, and a Unitization network without norm divisors is
refused, because n belongs to the training and must not be taken from the test images.
"""

import hashlib
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from evaluation.options import EvaluationOptions
from unitdist.config import Config, ModelConfig
from unitdist.config_file import config_from_dict
from unitdist.errors import CheckpointError, ConfigError
from unitdist.layers import Unitization2d, convert_unitization, missing_norm_divisors, set_norm_divisors
from unitdist.models.build import build_model
from unitdist.train.checkpoint import FORMAT, load_model_state, read_file
from unitdist.train.init_from import EMA_KEYS, MODEL_KEYS, plain_name

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

State = dict[str, torch.Tensor]

WAY_OUT = "--norm-divisor-from-image-size 224 (the training's image size)"


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network ready to be evaluated, and what is known about it.

    `mean`, `std`: channel normalization in units of [0, 1]. `class_to_idx`: the training's, or None. `norm`: its
    normalization layers, for the report. `training`: the config it was trained with, if it is unitdist's own.
    """

    model: nn.Module
    name: str
    norm: str
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    class_to_idx: dict[str, int] | None = None
    training: Config | None = None
    source: str = "a module in memory"
    weights: str = "model"


def load_network(path: Path, options: EvaluationOptions) -> Network:
    """Read a checkpoint and build its network, in evaluation mode, on the CPU.

    Raises ConfigError for what the user has to say (no such file, no --model), CheckpointError for what the file lacks.
    """
    content = _read(path)
    state, weights = _choose_weights(content, options.weights, path)
    if content.get("format") == FORMAT:
        if options.model is not None:
            raise ConfigError(f"--model: {path} is unitdist's own and names its network; leave --model out")
        if options.num_classes is not None:
            raise ConfigError(f"--num-classes: {path} is unitdist's own and names its classes; leave --num-classes out")
        network = _own_network(content, state, path, options)
    else:
        network = _foreign_network(content, state, path, options)
    network = replace(network, source=path.name, weights=weights)
    if options.convert_unitization:
        network = replace(network, model=convert_unitization(network.model, sync=False), norm="unitization (converted)")
    if options.mean is not None and options.std is not None:
        network = replace(network, mean=options.mean, std=options.std)
    _require_norm_divisors(network.model, options, str(path))
    network.model.eval()
    return network


def module_network(model: nn.Module, options: EvaluationOptions) -> Network:
    """A network that is in memory already. Raises CheckpointError when it lacks norm divisors."""
    _require_norm_divisors(model, options, type(model).__name__)
    return Network(
        model=model,
        name=type(model).__name__,
        norm=_norm_of(model),
        mean=options.mean or IMAGENET_MEAN,
        std=options.std or IMAGENET_STD,
    )


def state_digest(model: nn.Module) -> str:
    """SHA-256 over names and values of all parameters and buffers: equal networks, equal digest, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


@contextmanager
def following_image_size(model: nn.Module) -> Iterator[None]:
    """Within, every layer's n is the H*W of the image at hand: `--norm-divisor per_image`, against the paper.

    All images of a batch have one shape, so a hook before each layer that sets its divisor is enough.
    """

    def set_divisor(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, Unitization2d)
        layer.norm_divisor.fill_(inputs[0].shape[2] * inputs[0].shape[3])

    layers = [module for module in model.modules() if isinstance(module, Unitization2d) and module.norm_scope == "image"]
    if not layers:
        raise ConfigError("--norm-divisor per_image: this network has no Unitization layer with a norm per image")
    trained = [layer.norm_divisor.clone() for layer in layers]
    hooks = [layer.register_forward_pre_hook(set_divisor) for layer in layers]
    try:
        yield
    finally:
        for layer, divisor, hook in zip(layers, trained, hooks, strict=True):
            hook.remove()
            layer.norm_divisor.copy_(divisor)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(f"checkpoint not found: {path}")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None
    content = read_file(path) if path.is_dir() or zipfile.is_zipfile(path) else _read_before_zip(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a state dict or a checkpoint")
    return content


def _read_before_zip(path: Path) -> Any:
    """The format of torch before 1.6, in which torchvision still publishes some weights. Never runs code either."""
    with open(path, "rb") as file:
        start = file.read(2)
    if start[:1] != pickle.PROTO:
        return read_file(path)  # says that the file is damaged
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen unrelated types here; each means that the file is not usable
        raise CheckpointError(f"{path} is damaged, or not plain tensors: {str(error).strip().splitlines()[0]}") from None


def _choose_weights(content: dict[str, Any], wanted: str, path: Path) -> tuple[State, str]:
    averaged = next((key for key in EMA_KEYS if isinstance(content.get(key), dict)), None)
    plain = next((key for key in MODEL_KEYS if isinstance(content.get(key), dict)), None)
    if wanted == "ema" and averaged is None:
        raise ConfigError(f"--weights ema: {path} holds no averaged weights ({', '.join(EMA_KEYS)})")
    key = averaged if averaged is not None and wanted != "model" else plain
    state = content if key is None else content[key]
    tensors = {plain_name(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors or (key is None and len(tensors) < len(state)):
        raise CheckpointError(f"{path} holds no state dict (looked for {', '.join(MODEL_KEYS + EMA_KEYS)}; found {_first(content)})")
    return tensors, "ema" if key is not None and key == averaged else "model"


def _own_network(content: dict[str, Any], state: State, path: Path, options: EvaluationOptions) -> Network:
    config = config_from_dict(content["config"])
    model = build_model(config.model, image_size_px=config.data.image_size_px, sync=False)
    _load(model, state, path, options)
    return Network(
        model=model,
        name=config.model.name,
        norm=config.model.norm,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        class_to_idx=content["class_to_idx"],
        training=config,
    )


def _foreign_network(content: dict[str, Any], state: State, path: Path, options: EvaluationOptions) -> Network:
    name = options.model
    if name is None and isinstance(content.get("arch"), str):
        name = f"timm:{content['arch']}"
    if name is None:
        raise ConfigError(f"{path} does not say which network it belongs to; give --model, e.g. --model timm:resnet50")
    has_alpha = any(key == "alpha" or key.endswith(".alpha") for key in state)
    num_classes = options.num_classes or _outputs_of(state, name)
    model = _plain_model(name, num_classes, "unitization" if has_alpha else "batchnorm")
    _load(model, state, path, options)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return Network(
        model=model,
        name=name,
        norm="unitization" if has_alpha else _norm_of(model),
        mean=tuple(cfg.get("mean", IMAGENET_MEAN)),
        std=tuple(cfg.get("std", IMAGENET_STD)),
    )


def _plain_model(name: str, num_classes: int, norm: Literal["unitization", "batchnorm"]) -> nn.Module:
    """A network by name: torchvision:NAME, timm:NAME, or one of unitdist's own. Its norm divisors are whatever they are."""
    if not name.startswith("torchvision:"):
        return build_model(ModelConfig(name=name, num_classes=num_classes, norm=norm), image_size_px=224, sync=False)
    from torchvision import models

    name = name.removeprefix("torchvision:")
    if name not in models.list_models(models):
        raise ConfigError(f"--model: torchvision has no image classifier {name!r}; see torchvision.models.list_models()")
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    return convert_unitization(model, sync=False) if norm == "unitization" else model


def _load(model: nn.Module, state: State, path: Path, options: EvaluationOptions) -> None:
    """Load strictly; norm divisors that the file lacks are computed only where the user gave the training's image size."""
    lacking = [
        f"{name}.norm_divisor" if name else "norm_divisor"
        for name, module in model.named_modules()
        if isinstance(module, Unitization2d) and not int(state.get(f"{name}.norm_divisor", torch.tensor(0)))
    ]
    if lacking:
        if options.norm_divisor_from_image_size is None:
            raise CheckpointError(
                f"{path} has no norm divisors (first: {lacking[0]}); n belongs to the training and is not guessed from "
                f"the test images. Give {WAY_OUT}"
            )
        set_norm_divisors(model, options.norm_divisor_from_image_size)
        own = model.state_dict()
        state = {**state, **{name: own[name] for name in lacking}}
    load_model_state(model, state, str(path))


def _require_norm_divisors(model: nn.Module, options: EvaluationOptions, source: str) -> None:
    missing = missing_norm_divisors(model)
    if missing and options.norm_divisor_from_image_size is None:
        raise CheckpointError(f"the norm divisors of {source} are not known (first: {missing[0]}); give {WAY_OUT}")
    if missing:
        set_norm_divisors(model, int(options.norm_divisor_from_image_size or 0), only_missing=True)


def _outputs_of(state: State, name: str) -> int:
    """Number of classes of a state dict: the size of those parameters whose size follows the number of classes."""
    with torch.device("meta"):
        two, three = (_plain_model(name, classes, "batchnorm").state_dict() for classes in (2, 3))
    grows = [key for key in two if two[key].shape != three[key].shape and key in state and state[key].dim() > 0]
    if not grows:
        raise CheckpointError(f"the state dict has no classifier of {name} that shows the number of classes; give --num-classes")
    axis = next(axis for axis, sides in enumerate(zip(two[grows[-1]].shape, three[grows[-1]].shape, strict=True)) if len(set(sides)) == 2)
    return int(state[grows[-1]].shape[axis])


def _norm_of(model: nn.Module) -> str:
    if any(isinstance(module, Unitization2d) for module in model.modules()):
        return "unitization"
    kinds = [type(module).__name__ for module in model.modules() if "Norm" in type(module).__name__]
    return kinds[0] if kinds else "none"


def _first(content: dict[str, Any]) -> str:
    return ", ".join(list(map(str, content))[:5]) or "nothing"
