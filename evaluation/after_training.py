"""The protocols of `evaluation.protocols` on the best checkpoint, at the end of a training."""

from pathlib import Path

from evaluation.options import EvaluationOptions
from evaluation.run import evaluate
from unitdist.config import Config
from unitdist.data.build import open_source
from unitdist.train.agreement import agreed
from unitdist.world import World


def evaluate_run(config: Config, folder: Path, world: World) -> None:
    """Evaluate the training's best.pt (last.pt where it was too short for a validation) on its validation split.

    The report goes to folder/evaluation. Collective. Scales, crop and averaging are those of the config's `evaluation`
    section, which the checkpoint holds.
    """
    with agreed(world):
        source = open_source(config.data, Path(config.data.path).expanduser() / config.data.val_split)
    best = folder / "best.pt"
    evaluate(
        best if best.exists() else folder / "last.pt",
        source,
        protocols=config.evaluation.protocols,
        output=folder / "evaluation",
        options=EvaluationOptions(
            loader="torchvision" if config.data.loader == "torchvision" else "dali",
            num_threads=config.data.num_threads,
            on_broken="skip" if config.data.on_broken == "replace" else "error",
            precision=config.train.precision,
            channels_last=config.train.channels_last,
        ),
        say=print if world.is_main else None,
    )
