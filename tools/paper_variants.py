"""Why Fig. 2 looks as it does: five treatments of alpha, each measured in four ways at the same weights.

`python tools/paper_variants.py run --data DIR_OF_MNIST` trains the net of Fig. 2 once per treatment and seed, all side by side, on a
schedule shortened to --epochs, and writes fig2_variants.json after every epoch; `table` prints it.

Treatments: bn (alpha stays 0), unit (the paper's: alpha free from 0, n = 1), confined (alpha free from 0, put back into [0, 1] after
every step), one (alpha stays 1), width (alpha free from 0, n = the layer's width). Measured by: momentum0.1 and momentum0.01
(running statistics), population (statistics of all measured images), batches (training mode, batches of 128).
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from paper_results import hardware  # noqa: E402
from paper_run import current_commit  # noqa: E402
from paper_stability import measure_units  # noqa: E402
from paper_stacked import MOMENTA, TREATMENTS, StackedMlp, Statistics  # noqa: E402

from unitdist.analysis.moments import moments_of  # noqa: E402
from unitdist.config_file import load_config  # noqa: E402
from unitdist.data.build import build_train_loader  # noqa: E402
from unitdist.data.mnist import read_mnist  # noqa: E402
from unitdist.errors import ConfigError, UnitdistError  # noqa: E402
from unitdist.world import World  # noqa: E402

CONFIG = ROOT / "configs" / "paper" / "fig2.yaml"
FILE = "fig2_variants.json"
BATCH = 128
MEASURED_IMAGES = 80 * BATCH
"""The first images of the training split."""
KEPT = ("skewness", "kurtosis")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--data", metavar="DIR", help="run: the folder of MNIST")
    parser.add_argument("--epochs", type=int, default=30, metavar="N", help="run: instead of 200 (default 30)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", metavar="DIR")
    arguments = parser.parse_args()
    path = arguments.results / FILE
    if arguments.action == "run":
        if not arguments.data:
            raise ConfigError("--data: give the folder of mnist")
        run(arguments.data, arguments.seeds, arguments.epochs, path)
    elif not path.exists():
        raise ConfigError(f"{path} is not there: python tools/paper_variants.py run --data DIR_OF_MNIST")
    print_table(json.loads(path.read_text()))


def run(data: str, seeds: list[int], epochs: int, path: Path) -> None:
    """Train and measure; write what there is after each epoch."""
    config = load_config(CONFIG, [f"data.path={data}"])
    nets = [(name, seed) for name in TREATMENTS for seed in seeds]
    stack = StackedMlp([TREATMENTS[name] for name, _ in nets], [seed for _, seed in nets])
    cpu = torch.device("cpu")
    loaders = [
        build_train_loader(config.data, World.single(), per_rank_batch_size=BATCH, seed=seed, device=cpu)
        for seed in seeds
    ]
    measured_ni, test_ni, test_labels_n = images_of(data, config.data.mean[0], config.data.std[0])
    # The paper's milestones at the same fractions of the shorter run.
    milestones = [1 + (m - 1) * epochs // config.train.epochs for m in config.schedule.milestones_epochs]
    content: dict[str, Any] = {
        "commit": current_commit(), "torch": torch.__version__, "hardware": hardware(), "epochs": epochs,
        "collected": datetime.now(UTC).strftime("%Y-%m-%d"), "milestones_epochs": milestones, "measured_images": MEASURED_IMAGES,
        "nets": [f"{name} seed {seed}" for name, seed in nets], "lr": [], "loss": [], "top1": [],
        "alpha_mean": [], "alpha_min": [], "alpha_max": [],
        "moments": {measured_by: {moment: [] for moment in KEPT} for measured_by in measures(stack)},
    }  # fmt: skip
    training_loss = torch.compile(stack.loss)
    for epoch in range(epochs):
        started = time.perf_counter()
        lr = config.optim.lr * config.schedule.factor ** sum(milestone <= epoch + 1 for milestone in milestones)
        losses = []
        for batches in zip(*(loader.iterate(epoch) for loader in loaders), strict=True):
            x_sni = torch.stack([batch.images.flatten(1) for batch in batches]).repeat(len(TREATMENTS), 1, 1)
            labels_sn = torch.stack([batch.labels for batch in batches]).repeat(len(TREATMENTS), 1)
            loss_s, used = training_loss(x_sni, labels_sn)
            stack.step(loss_s, used, lr, BATCH)
            losses.append(loss_s.detach())
        record(content, stack, measured_ni, test_ni, test_labels_n)
        content["lr"].append(lr)
        content["loss"].append(rounded(torch.stack(losses).mean(0)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, separators=(",", ":")).replace('],"', '],\n"') + "\n")
        print(f"epoch {epoch + 1}/{epochs}: {time.perf_counter() - started:.0f} s", flush=True)


def images_of(data: str, mean: float, std: float) -> tuple[Tensor, Tensor, Tensor]:
    """The measured training images (N, 784), the test images (10000, 784) and their labels."""
    train, test = (read_mnist(Path(data), training=training) for training in (True, False))
    measured, tested = (
        (torch.from_numpy(arrays.images_nhwc.copy()).flatten(1) / 255 - mean) / std for arrays in (train, test)
    )
    return measured[:MEASURED_IMAGES], tested, torch.from_numpy(test.labels)


def measures(stack: StackedMlp) -> dict[str, tuple[Statistics | None, int]]:
    """Name -> (statistics or None for the batch's own, batch size) of each way to measure."""
    ways: dict[str, tuple[Statistics | None, int]] = {f"momentum{m}": (stack.running[m], 1024) for m in MOMENTA}
    return ways | {"population": (None, MEASURED_IMAGES), "batches": (None, BATCH)}


@torch.no_grad()
def record(content: dict[str, Any], stack: StackedMlp, measured_ni: Tensor, test_ni: Tensor, labels_n: Tensor) -> None:
    """Append one epoch's moments (net by net, unit by unit), test accuracy and alphas of the watched layer."""
    num_nets = len(content["nets"])
    for name, (statistics, batch_size) in measures(stack).items():
        outputs_snd = torch.cat(
            [stack.forward(part.expand(num_nets, -1, -1), statistics)[1] for part in measured_ni.split(batch_size)], 1
        )
        moments = moments_of(outputs_snd.transpose(0, 1).flatten(1), name)
        for moment, values in (("skewness", moments.skewness_c), ("kurtosis", moments.kurtosis_c)):
            content["moments"][name][moment].append(rounded(values.view(num_nets, -1)))
    logits_sno = torch.cat(
        [stack.forward(part.expand(num_nets, -1, -1), stack.running[0.1])[0] for part in test_ni.split(1000)], 1
    )
    content["top1"].append(rounded(100 * (logits_sno.argmax(2) == labels_n).double().mean(1)))
    alpha_sd = stack.parameters["layers.norm11.alpha"]
    content["alpha_mean"].append(rounded(alpha_sd.mean(1)))
    content["alpha_min"].append(rounded(alpha_sd.amin(1)))
    content["alpha_max"].append(rounded(alpha_sd.amax(1)))


def rounded(values: Tensor) -> Any:
    """Nested lists with four significant digits."""
    return [rounded(value) for value in values] if values.dim() else float(f"{float(values):.4g}")


def print_table(content: dict[str, Any]) -> None:
    """Standard deviation over the epochs, its median over the units, and of that the median and range over the seeds."""
    last = content["milestones_epochs"][-1]
    done = len(content["lr"])
    first_epochs = [1, last] if done > last else [1]
    print(
        f"{done} of {content['epochs']} epochs; {content['hardware']}, torch {content['torch']}, commit {content['commit']}"
    )
    print("standard deviation over the epochs: median over units; of that the median over seeds (lowest..highest)")
    spans = [f"{moment}, epochs {first}-{done}" for moment in KEPT for first in first_epochs]
    rows = [["treatment", "measured by", *spans]]
    for name in TREATMENTS:
        for measured_by, moments in content["moments"].items():
            cells = [_cell(moments[moment], content["nets"], name, first) for moment in KEPT for first in first_epochs]
            rows.append([name, measured_by, *cells])
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, (10, 12, *[26] * len(spans)), strict=True)).rstrip()
        )
    for name in TREATMENTS:
        mine = [i for i, net in enumerate(content["nets"]) if net.split()[0] == name]
        low, high = min(content["alpha_min"][-1][i] for i in mine), max(content["alpha_max"][-1][i] for i in mine)
        top1 = ", ".join(f"{content['top1'][-1][i]:.2f}" for i in mine)
        print(f"{name}: test top-1 {top1}; alpha of the watched layer at the end {low:.2f}..{high:.2f}")


def _cell(series: list[Any], nets: list[str], treatment: str, first_epoch: int) -> str:
    per_epoch = np.asarray(series, dtype=np.float64)
    values = [
        float(np.median(measure_units(per_epoch[:, i], "std", first_epoch)))
        for i, net in enumerate(nets)
        if net.split()[0] == treatment
    ]
    return f"{median(values):.4f} ({min(values):.4f}..{max(values):.4f})"


if __name__ == "__main__":
    try:
        main()
    except UnitdistError as error:
        print(f"paper_variants.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
