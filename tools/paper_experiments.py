"""What the paper ran, as data: every experiment, its arms, its seeds, and the numbers in the paper.

An arm is a set of overrides of the experiment's YAML in configs/paper/. Arms of one seed start from the same weights (the
seed draws convolution and linear weights alone; normalization starts from constants) and see the same images.
"""

from dataclasses import dataclass
from typing import Literal

from unitdist.errors import ConfigError

Numbers = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of a table. `paper`: the paper's numbers in the order of the experiment's metrics; empty: a figure."""

    name: str
    label: str
    overrides: tuple[str, ...]
    paper: Numbers = ()


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """`config` in configs/paper/; `metrics`: keys of the last epoch's record, in percent; `num_seeds` runs of each arm.

    `num_train`: train on so many first images of MNIST alone (None: the whole data set).
    """

    name: str
    title: str
    config: str
    arms: tuple[Arm, ...]
    num_seeds: int
    metrics: tuple[str, ...] = ("val_top1",)
    kind: Literal["accuracy", "protocols", "moments", "distance"] = "accuracy"
    num_train: int | None = None
    note: str = ""


BN = ("model.norm=batchnorm",)
UNIT = ("model.norm=unitization",)


def _two(
    bn: Numbers = (), unit: Numbers = (), *, prefix: str = "", label: str = "", overrides: tuple[str, ...] = ()
) -> tuple[Arm, Arm]:
    return (
        Arm(name=f"{prefix}bn", label=f"{label}BN", overrides=(*overrides, *BN), paper=bn),
        Arm(name=f"{prefix}unit", label=f"{label}unitization", overrides=(*overrides, *UNIT), paper=unit),
    )


def _resnets(bn: Numbers, unit: Numbers) -> tuple[Arm, ...]:
    arms: list[Arm] = []
    for i, (depth, batch) in enumerate(((20, 128), (110, 128), (164, 64))):
        overrides = (f"model.name=cifar_resnet{depth}", f"data.global_batch_size={batch}")
        arms += _two((bn[i],), (unit[i],), prefix=f"resnet{depth}_", label=f"ResNet-{depth} ", overrides=overrides)
    return tuple(arms)


def _group_norms(by_groups: Numbers, by_channels: Numbers) -> tuple[Arm, ...]:
    arms = []
    for key, word, paper in (
        ("group_norm_groups", "groups", by_groups),
        ("group_norm_channels", "channels a group", by_channels),
    ):
        for i, count in enumerate((1, 2, 4, 8, 16)):
            name = f"gn_{'groups' if word == 'groups' else 'channels'}{count}"
            overrides = ("model.norm=groupnorm", f"model.{key}={count}")
            arms.append(Arm(name=name, label=f"GN, {count} {word}", overrides=overrides, paper=paper[i : i + 1]))
    return tuple(arms)


_TABLE4_GN = _group_norms((10.00, 10.00, 10.00, 71.63, 73.76), (79.54, 73.58, 70.68, 72.04, 10.00))

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            name="fig2",
            title="Fig. 2: moments of the 8-unit layer's normalized outputs, MNIST",
            config="fig2.yaml",
            arms=_two(),
            num_seeds=3,
            kind="moments",
            note="Paper: skewness and kurtosis fluctuate under BN, are stable under unitization (a figure, no number).",
        ),
        Experiment(
            name="table1",
            title="Table 1: CIFAR-10, top-1 in percent, median of 5",
            config="table1.yaml",
            arms=_resnets((91.79, 93.99, 94.34), (92.21, 94.12, 94.62)),
            num_seeds=5,
        ),
        Experiment(
            name="table2",
            title="Table 2: CIFAR-100, top-1 in percent, median of 5",
            config="table2.yaml",
            arms=_resnets((66.43, 72.27, 76.56), (67.49, 73.31, 77.58)),
            num_seeds=5,
        ),
        Experiment(
            name="table3",
            title="Table 3: ImageNet, ResNet-101, top-1 / top-5 in percent",
            config="table3.yaml",
            arms=_two((78.12, 93.45, 76.47, 93.02), (78.33, 93.22, 77.84, 93.33)),
            num_seeds=1,
            metrics=("crops top1", "crops top5", "fully_convolutional top1", "fully_convolutional top5"),
            kind="protocols",
        ),
        Experiment(
            name="table4",
            title="Table 4: micro-batches of 2, CIFAR-10, ResNet-110, top-1 in percent, median of 3",
            config="table4.yaml",
            arms=(*_two((71.50,), (81.88,)), *_TABLE4_GN),
            num_seeds=3,
        ),
        Experiment(
            name="fig3",
            title="Fig. 3: EM distance of deep layers over the epochs, CIFAR, ResNet-110 with unitization",
            config="fig3.yaml",
            arms=(
                Arm(name="cifar10", label="CIFAR-10", overrides=()),
                Arm(
                    name="cifar100",
                    label="CIFAR-100",
                    overrides=(
                        "data.dataset=cifar100",
                        "model.num_classes=100",
                        "data.mean=[0.5071, 0.4865, 0.4409]",
                        "data.std=[0.2673, 0.2564, 0.2762]",
                    ),
                ),
            ),
            num_seeds=1,
            kind="distance",
            note="Paper: the distance drops where the learning rate drops (a figure, no number).",
        ),
        Experiment(
            name="table4_mnist",
            title="Table 4's idea on MNIST: micro-batches of 2, ResNet-8, top-1 in percent, median of 3",
            config="table4_mnist.yaml",
            arms=(
                *_two(),
                *(Arm(name=arm.name, label=arm.label, overrides=arm.overrides) for arm in _TABLE4_GN),
            ),
            num_seeds=3,
            num_train=2000,
            note="Not the paper's experiment: another data set, another net, 2000 images, 2 epochs.",
        ),
        Experiment(
            name="fig3_mnist",
            title="Fig. 3's idea on MNIST: EM distance of deep layers over the epochs, the net of Fig. 2",
            config="fig3_mnist.yaml",
            arms=_two(),
            num_seeds=1,
            kind="distance",
            num_train=6000,
            note="Not the paper's experiment: another data set, another net, 6000 images, 16 epochs, 40 critic steps.",
        ),
    )
}


def find_experiment(name: str) -> Experiment:
    """The experiment of that name; ConfigError that lists all."""
    if name not in EXPERIMENTS:
        raise ConfigError(f"no experiment named {name!r}; there are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def select_arms(experiment: Experiment, names: list[str] | None) -> tuple[Arm, ...]:
    """The named arms (None: all), in the experiment's order; ConfigError that lists them."""
    known = [arm.name for arm in experiment.arms]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ConfigError(f"{experiment.name} has no arm {unknown[0]!r}; its arms are {', '.join(known)}")
    return tuple(arm for arm in experiment.arms if names is None or arm.name in names)
