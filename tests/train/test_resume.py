"""resume.py: what may differ between a checkpoint and the run that goes on from it, and what may not."""

from dataclasses import replace
from typing import Any

import pytest

from unitdist.config import Config
from unitdist.config_file import config_to_dict
from unitdist.errors import ConfigError
from unitdist.train.resume import Fingerprint, check_same_run

CONFIG = Config()
SAVED: Fingerprint = {
    "loader": "dali",
    "decoder": "dali on the CPU",
    "versions": "unitdist 1, nvidia-dali 2.4.0",
    "source": "image_folder",
    "content": "aa",
    "num_samples": 100,
    "seed": 0,
    "augmentation": "scale (256, 480)",
    "global_batch_size": 64,
    "world_size": 8,
}


def check(now: dict[str, Any], *, samples: int = 640, config: Config = CONFIG) -> list[str]:
    checkpoint = {"config": config_to_dict(CONFIG), "loader": SAVED, "samples": samples}
    return check_same_run(config, SAVED | now, checkpoint, source="last.pt")


@pytest.mark.parametrize("samples", [0, 640])
@pytest.mark.parametrize(
    ("key", "now", "message"),
    [
        ("content", "bb", r"the list of images \(SHA-256 of names and labels\) was aa, is bb"),
        ("source", "webdataset", r"the source \(data.source\) was image_folder, is webdataset"),
        ("num_samples", 99, "the number of training images was 100, is 99"),
        ("seed", 1, r"the seed \(run.seed\) was 0, is 1"),
        ("augmentation", "scale (256, 500)", r"augmentation was scale \(256, 480\), is scale \(256, 500\)"),
        ("global_batch_size", 32, "data.global_batch_size was 64, is 32"),
    ],
)
def test_what_changes_the_samples_is_always_refused_by_name(key: str, now: Any, message: str, samples: int) -> None:
    with pytest.raises(ConfigError, match=f"^last.pt was made on other data: {message}; .* start a new run$"):
        check({key: now}, samples=samples)


def test_an_item_that_this_run_lacks_is_refused() -> None:
    fingerprint = {key: value for key, value in SAVED.items() if key != "content"}
    checkpoint = {"config": config_to_dict(CONFIG), "loader": SAVED, "samples": 0}
    with pytest.raises(ConfigError, match="was aa, is absent"):
        check_same_run(CONFIG, fingerprint, checkpoint, source="last.pt")


@pytest.mark.parametrize("samples", [0, 640])
def test_another_number_of_ranks_goes_on_and_is_told(samples: int) -> None:
    assert check({"world_size": 2}, samples=samples) == ["the number of ranks was 8, is 2"]


@pytest.mark.parametrize(
    ("key", "now"),
    [("loader", "torchvision"), ("decoder", "dali on the GPU"), ("versions", "unitdist 1, nvidia-dali 2.5.0")],
)
def test_another_decoder_is_refused_within_an_epoch_unless_accepted(key: str, now: str) -> None:
    with pytest.raises(
        ConfigError,
        match=f"within an epoch, and .*was {SAVED[key]}, is {now}: .*accept it with data.accept_other_decoder=true",
    ):
        check({key: now})
    accepting = replace(CONFIG, data=replace(CONFIG.data, accept_other_decoder=True))
    for notes in (check({key: now}, samples=0), check({key: now}, config=accepting)):
        assert len(notes) == 1 and notes[0].endswith(f"was {SAVED[key]}, is {now}")


def test_items_that_an_older_checkpoint_lacks_are_not_compared() -> None:
    older = {key: value for key, value in SAVED.items() if key not in ("versions", "decoder", "world_size")}
    checkpoint = {"config": config_to_dict(CONFIG), "loader": older, "samples": 640}
    assert check_same_run(CONFIG, SAVED, checkpoint, source="last.pt") == []
