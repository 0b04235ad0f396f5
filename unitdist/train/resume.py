"""What a checkpoint and the run that continues from it must share."""

from typing import Any

from unitdist.config import Config
from unitdist.config_file import config_to_dict
from unitdist.data.batch import Loader
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

Fingerprint = dict[str, int | float | str]

MAY_DIFFER = ("world_size",)
"""Items that change neither the samples nor their order: told, not refused."""
BOUND_WITHIN_EPOCH = ("loader", "decoder", "versions")
"""Items that change pixels by a grey level or so: free between epochs, and within one by data.accept_other_decoder."""
MEANING = {
    "source": "the source (data.source)",
    "content": "the list of images (SHA-256 of names and labels)",
    "num_samples": "the number of training images",
    "seed": "the seed (run.seed)",
    "world_size": "the number of ranks",
    "global_batch_size": "data.global_batch_size",
    "versions": "the versions of what makes the pixels",
}


def job_fingerprint(config: Config, loader: Loader, *, world_size: int) -> Fingerprint:
    """What is saved in checkpoints: the training data, its order, and how the job shared it out."""
    return loader.fingerprint() | {"global_batch_size": config.data.global_batch_size, "world_size": world_size}


def check_same_run(config: Config, fingerprint: Fingerprint, checkpoint: dict[str, Any], *, source: str) -> list[str]:
    """Raises ConfigError that names the first setting, or item of job_fingerprint, in which the two differ.

    Returns what differs and may, in words. Items that the checkpoint's version did not save yet are not compared.
    """
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
    notes = []
    for key, was in checkpoint["loader"].items():
        now = fingerprint.get(key, "absent")
        if now == was:
            continue
        name = MEANING.get(key, key)
        within_epoch = bool(checkpoint["samples"]) and not config.data.accept_other_decoder
        if key not in MAY_DIFFER and not (key in BOUND_WITHIN_EPOCH and not within_epoch):
            raise ConfigError(_refusal(source, key, f"{name} was {was}, is {now}"))
        notes.append(f"{name} was {was}, is {now}")
    return notes


def _refusal(source: str, key: str, difference: str) -> str:
    if key in BOUND_WITHIN_EPOCH:
        return (
            f"{source} stands within an epoch, and {difference}: pixels would change by a grey level or so; use the same, resume "
            "from the end of an epoch, or accept it with data.accept_other_decoder=true"
        )
    return (
        f"{source} was made on other data: {difference}; a resume would not see the same samples; use the same, or start a "
        "new run"
    )
