"""timm's own training parts (data, optimizer, schedule, loss, EMA, checkpoints) train a unit net."""

import math
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy
from torch import nn

import unitdist.timm  # noqa: F401  registers the models
from unitdist import Unitization2d, convert_unitization, set_norm_divisors


def registered_net(classes: int) -> nn.Module:
    model: nn.Module = timm.create_model("preact_resnet18_unit", num_classes=classes, img_size=64, drop_rate=0.1)
    return model


def converted_net(classes: int) -> nn.Module:
    model = convert_unitization(timm.create_model("resnet10t", num_classes=classes))
    set_norm_divisors(model, 64)
    return model


def test_a_registered_net_takes_what_timms_train_script_passes_by_default() -> None:
    """Whatever is None there, timm.create_model leaves out; `drop_rate` and the rest are not."""
    left_out = dict.fromkeys(("drop_path_rate", "drop_block_rate", "global_pool", "bn_momentum", "bn_eps"))
    model = timm.create_model(
        "preact_resnet18_unit", pretrained=False, in_chans=3, num_classes=7, drop_rate=0.0, scriptable=False, checkpoint_path="", **left_out
    )  # fmt: skip
    assert model.num_classes == 7
    options = dict.fromkeys(("input_size", "img_size", "crop_pct", "mean", "std"), None) | {
        "interpolation": "",
        "batch_size": 128,
    }
    data = resolve_data_config(options, model=model)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, 224, 224), 0.875, "bilinear")


@pytest.mark.filterwarnings("ignore:unclosed file <_io.BufferedReader:ResourceWarning")  # by timm's image reader
@pytest.mark.parametrize("make", [registered_net, converted_net])
def test_timms_parts_train_save_and_load_a_unit_net(sample_data: Path, make: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dataset = create_dataset("", root=str(sample_data), split="train")
    dataset.reader.samples = dataset.reader.samples[::2]
    model = make(16)
    data = resolve_data_config({"input_size": (3, 64, 64)}, model=model)
    loader = create_loader(
        dataset, input_size=data["input_size"], batch_size=32, is_training=True, use_prefetcher=False, num_workers=0
    )
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.005, momentum=0.9, weight_decay=1e-4)
    schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2, warmup_epochs=0)
    average = ModelEmaV3(model, decay=0.5)
    criterion = LabelSmoothingCrossEntropy(0.1)
    divisors = [int(module.norm_divisor) for module in model.modules() if isinstance(module, Unitization2d)]
    losses = []
    for epoch in range(2):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            average.update(model)
            losses.append(float(loss.detach()))
        schedule.step(epoch + 1)
    assert len(losses) == 2 * (96 // 32) and all(math.isfinite(loss) for loss in losses)
    assert min(losses[-3:]) < losses[0]
    trained = [module for module in average.module.modules() if isinstance(module, Unitization2d)]
    assert [int(module.norm_divisor) for module in trained] == divisors
    assert sum(float(module.alpha.detach().abs().sum()) for module in trained) > 0
    saver = CheckpointSaver(
        model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, metric=1.0)
    images, labels = next(iter(loader))
    fresh = make(16)
    timm.models.load_checkpoint(fresh, str(tmp_path / "last.pth.tar"), use_ema=True)
    top1, _ = accuracy(average.module.eval()(images), labels, topk=(1, 5))
    assert 0 <= float(top1) <= 100
    assert torch.equal(fresh.eval()(images), average.module(images))
