"""What a checkpoint and the run that continues from it must share."""

from typing import Any

from unitdist.config import Config
from unitdist.config_file import config_to_dict
from unitdist.errors import ConfigError

# Keys that change what is computed from the next step on. The rest (threads, folders, log intervals, epochs, engine, world
# size, precision, ...) may differ: the same checkpoint serves every engine and number of ranks.
BOUND = {
    "model": None,
    "data": (
        "global_batch_size",
        "augmentation",
        "image_size_px",
        "progressive_resizing",
        "scale_range_px",
        "area_range",
        "aspect_range",
        "dataset",
    ),
    "optim": ("name",),
    "run": ("seed",),
}
FREE_MODEL_KEYS = ("sync_group", "stats_batch_size", "init_from", "init_head")


def check_same_run(config: Config, fingerprint: dict[str, Any], checkpoint: dict[str, Any], *, source: str) -> None:
    """Raises ConfigError that names the first setting, or property of the data, in which the two differ."""
    own, saved = config_to_dict(config), checkpoint["config"]
    for section, keys in BOUND.items():
        for key in keys if keys is not None else own[section]:
            if section == "model" and key in FREE_MODEL_KEYS:
                continue
            if saved.get(section, {}).get(key, own[section][key]) != own[section][key]:
                raise ConfigError(
                    f"{source} was made with {section}.{key}: {saved[section][key]}, this run has {own[section][key]}; "
                    "use the same, or start a new run"
                )
    for key, value in checkpoint["loader"].items():
        if key in fingerprint and fingerprint[key] != value:
            raise ConfigError(
                f"{source} was made on other data: {key} was {value}, is {fingerprint[key]}; a resume would not see the same samples"
            )
