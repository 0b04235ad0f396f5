"""A trained network as a folder that anybody can load: model.safetensors, config.json, README.md (the model card).

config.json, format "unitdist-hub-1":

| key | content |
| --- | --- |
| format, unitdist_version | what wrote it |
| model | the `model` section of the run's config: name, classes, norm and every switch |
| weights | {"file", "sha256", "source": model or model_ema, "num_parameters"} |
| classes | class names in the order of the logits |
| norm_divisors | layer name -> n, as stored in the weights |
| preprocessing | channels, image_size_px, resize_px (shorter side), crop, interpolation, mean, std |
| recipe | the run's whole config |
| results | epoch, step; validation in percent; so are the protocols of an evaluation report |
| versions | unitdist, torch, Python, ranks of the run |
| architecture, num_classes, pretrained_cfg, model_args | timm's keys, where `unitdist.timm` registers this net |
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unitdist.config import Config, ModelConfig
from unitdist.config_file import config_from_dict
from unitdist.errors import CheckpointError, ConfigError
from unitdist.model_card import model_card
from unitdist.models.build import build_model, input_channels
from unitdist.train.checkpoint import load_model_state

FORMAT = "unitdist-hub-1"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
HUB_PREFIX = "hf:"

Weights = Literal["auto", "model", "model_ema"]


def export_checkpoint(
    checkpoint: dict[str, Any],
    folder: Path,
    *,
    weights: Weights = "auto",
    evaluation: dict[str, Any] | None = None,
    license: str = "apache-2.0",
) -> dict[str, Any]:
    """Write `checkpoint` (as `read_checkpoint` gives it) to `folder`; returns the content of config.json.

    `weights`: the trained ones, the averaged ones, or auto: averaged where there are such, which is what validation
    counted. `evaluation`: a report.json of the evaluation module. Raises ConfigError when the checkpoint has no
    averaged weights, CheckpointError when its weights are not this config's network.
    """
    from safetensors.torch import save

    source = (
        "model_ema" if weights == "auto" and checkpoint["model_ema"] is not None else weights.replace("auto", "model")
    )
    state: dict[str, Tensor] | None = checkpoint[source]
    if state is None:
        raise ConfigError("--weights model_ema: this run kept no averaged weights (train.ema_decay: null)")
    config = config_from_dict(checkpoint["config"])
    model = _fresh_model(config.model, config.data.image_size_px)
    load_model_state(model, state, "the checkpoint")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: cannot make the folder {folder}: {error.strerror}") from None
    weights_file = folder / WEIGHTS_FILE
    content = save({name: value.contiguous() for name, value in state.items()}, metadata={"format": "pt"})
    weights_file.write_bytes(content)  # safetensors' own `save_file` makes a file that only its owner may read
    description = {
        "format": FORMAT,
        "unitdist_version": checkpoint["versions"]["unitdist"],
        "model": checkpoint["config"]["model"],
        "weights": {
            "file": WEIGHTS_FILE,
            "sha256": _sha256(weights_file),
            "source": source,
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "classes": sorted(checkpoint["class_to_idx"], key=checkpoint["class_to_idx"].__getitem__),
        "norm_divisors": _norm_divisors(state),
        "preprocessing": _preprocessing(config),
        "recipe": checkpoint["config"],
        "results": _results(checkpoint, evaluation),
        "versions": checkpoint["versions"],
        **_timm_keys(config),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(model_card(description, license), encoding="utf-8")
    return description


def load_pretrained(source: str | Path) -> nn.Module:
    """The network in `source`, in evaluation mode on the CPU, with its norm divisors.

    `source`: a folder written by tools/export.py, or "hf:OWNER/NAME" or "hf:OWNER/NAME@REVISION", which is downloaded by
    huggingface_hub. Raises ConfigError when there is no such folder, CheckpointError when a file in it is
    missing, altered, or not what config.json says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = _folder_of(source)
    description = read_description(folder)
    weights_file = folder / WEIGHTS_FILE
    if not weights_file.is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}")
    if _sha256(weights_file) != description["weights"]["sha256"]:
        raise CheckpointError(
            f"{weights_file} is damaged: its checksum is not the one in {CONFIG_FILE}; fetch it again"
        )
    try:
        state = load_file(weights_file)
    except SafetensorError as error:
        raise CheckpointError(f"{weights_file} cannot be read: {error}") from None
    if _norm_divisors(state) != description["norm_divisors"]:
        raise CheckpointError(f"{folder}: the norm divisors in {CONFIG_FILE} and in {WEIGHTS_FILE} differ")
    config = config_from_dict({"model": description["model"]}).model
    model = _fresh_model(config, description["preprocessing"]["image_size_px"])
    load_model_state(model, state, str(weights_file))
    return model.eval()


def read_description(source: str | Path) -> dict[str, Any]:
    """The content of config.json: classes, preprocessing, results, ... Raises as `load_pretrained`."""
    file = _folder_of(source) / CONFIG_FILE
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file.parent} holds no {CONFIG_FILE}; tools/export.py makes such folders") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not one of unitdist's (no format: {FORMAT})")
    return description


def read_report(file: Path) -> dict[str, Any]:
    """A report.json of the evaluation module. Raises ConfigError when it cannot be read or is something else."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--evaluation: cannot read {file}: {error}") from None
    if not isinstance(report, dict) or "protocols" not in report:
        raise ConfigError(f"--evaluation: {file} is no report.json of evaluation/multi_scale.py")
    return report


def _folder_of(source: str | Path) -> Path:
    """The local folder; a hub's repository is downloaded, and only where the source says "hf:"."""
    if not str(source).startswith(HUB_PREFIX):
        folder = Path(source)
        if not folder.is_dir():
            raise ConfigError(
                f"no such folder: {folder}; a repository on the Hugging Face hub is written hf:OWNER/NAME"
            )
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(f"{source} needs huggingface_hub ({error}): pip install huggingface_hub") from None
    repository, _, revision = str(source).removeprefix(HUB_PREFIX).partition("@")
    wanted = [WEIGHTS_FILE, CONFIG_FILE, CARD_FILE]
    return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))


def _fresh_model(config: ModelConfig, image_size_px: int) -> nn.Module:
    """The network with random weights that will be replaced; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        return build_model(config, image_size_px=image_size_px)


def _norm_divisors(state: dict[str, Tensor]) -> dict[str, int]:
    ending = ".norm_divisor"
    return {name.removesuffix(ending): int(value) for name, value in sorted(state.items()) if name.endswith(ending)}


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _preprocessing(config: Config) -> dict[str, Any]:
    data = config.data
    from_files = data.dataset == "image_folder"
    return {
        "channels": input_channels(config.model),
        "image_size_px": data.image_size_px,
        "resize_px": data.val_resize_px if from_files else data.image_size_px,
        "crop": "center",
        "interpolation": "bilinear",
        "mean": list(data.mean),
        "std": list(data.std),
    }


def _results(checkpoint: dict[str, Any], evaluation: dict[str, Any] | None) -> dict[str, Any]:
    results: dict[str, Any] = {"epoch": checkpoint["epoch"], "step": checkpoint["step"]}
    if "last" in checkpoint["metrics"]:
        results["validation_percent"] = checkpoint["metrics"]["last"]
    if evaluation is not None:
        keys = ("top1", "top5", "top1_interval", "count", "views", "average", "mirrored")
        results["protocols"] = {
            name: {key: summary[key] for key in keys if key in summary}
            for name, summary in evaluation["protocols"].items()
        }
    return results


def _timm_keys(config: Config) -> dict[str, Any]:
    """What timm.create_model("local-dir:FOLDER") and "hf-hub:..." read, for nets that `unitdist.timm` registers."""
    arms = {"unitization": "unit", "batchnorm": "bn"}
    model, data = config.model, config.data
    if not model.name.startswith("preact_resnet") or model.norm not in arms or model.norm_eps != 1e-5:
        return {}
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    switches = ("norm_scope", "stride_in_first_conv", "raw_projection", "stem_norm", "final_norm")
    arguments = {key: getattr(model, key) for key in switches if getattr(model, key) not in (defaults[key], None)}
    return {
        "architecture": f"{model.name}_{arms[model.norm]}",
        "num_classes": model.num_classes,
        "model_args": {**arguments, "img_size": data.image_size_px},
        "pretrained_cfg": {
            "num_classes": model.num_classes,
            "input_size": [len(data.mean), data.image_size_px, data.image_size_px],
            "crop_pct": data.image_size_px / data.val_resize_px,
            "interpolation": "bilinear",
            "mean": list(data.mean),
            "std": list(data.std),
            "first_conv": "stem_conv",
            "classifier": "classifier",
        },
    }
