"""`python -m unitdist.timm_script`: our own small scripts under it, and timm's where its repository is at hand."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import unitdist.timm
from unitdist import Unitization2d
from unitdist.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unitdist.timm_script", *map(str, arguments)]
    settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=REPOSITORY, env=settings)


def test_a_script_runs_with_the_models_registered(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("ANSWER = 42\n")
    (tmp_path / "train.py").write_text(
        "import sys, timm, beside\n"
        "assert __name__ == '__main__' and beside.ANSWER == 42\n"
        "print(sys.argv[1:], timm.is_model('preact_resnet18_unit'))\n"
    )
    arguments = ["--model", "preact_resnet18_unit", "--convert", "-h"]  # all of them are the script's
    good = run(tmp_path / "train.py", *arguments)
    assert good.returncode == 0 and good.stdout == f"{arguments} True\n", good.stderr


def test_a_script_that_is_not_there_is_told_once() -> None:
    bad = run("none.py", LOCAL_RANK="0")
    assert bad.returncode == 2
    assert bad.stderr == (
        "error: there is no file none.py: the first argument is one of timm's scripts, "
        "train.py or validate.py for example, which come with timm's repository\n"
    )
    other_rank = run("none.py", LOCAL_RANK="1")
    assert (other_rank.returncode, other_rank.stderr) == (2, "")
    usage = run("--help")
    assert usage.returncode == 0 and "[--convert] script" in usage.stdout
    nothing = run()
    assert nothing.returncode == 2 and "usage: python -m unitdist.timm_script" in nothing.stderr


def test_what_the_user_typed_wrong_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import timm\ntimm.create_model('preact_resnet18_unit', norm_scope='pixl')\n")
    bad = run(script)
    assert bad.returncode == 2
    assert bad.stderr == "error: norm_scope='pixl': allowed are 'image' and 'pixel'\n"


def test_convert_converts_what_the_script_creates(tmp_path: Path) -> None:
    """Checkpoints with batch normalization and with Unitization load; a teacher's batch normalization stays."""
    plain = timm.create_model("resnet10t", num_classes=3)
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "bn.pth.tar")
    (tmp_path / "train.py").write_text(
        "import sys, importlib.util, timm, torch\n"
        "from timm.models import create_model\n"
        "from unitdist import Unitization2d\n"
        "def layers(net): return sum(isinstance(module, Unitization2d) for module in net.modules())\n"
        "folder = sys.argv[1]\n"
        "first = create_model('resnet10t', num_classes=3, checkpoint_path=folder + '/bn.pth.tar')\n"
        "torch.nn.init.constant_(first.bn1.alpha, 0.5)\n"
        "first.train()(torch.zeros(2, 3, 64, 64))\n"
        "torch.save({'state_dict': first.state_dict()}, folder + '/unit.pth.tar')\n"
        "second = timm.create_model('resnet10t', False, num_classes=3, checkpoint_path=folder + '/unit.pth.tar')\n"
        "saved = torch.load(folder + '/bn.pth.tar')['state_dict']\n"
        "print(layers(first), layers(second), torch.equal(first.fc.weight, saved['fc.weight']))\n"
        "print(second.bn1.norm_divisor.item(), set(second.bn1.alpha.tolist()))\n"
        "if importlib.util.find_spec('timm.task'):\n"
        "    from timm.task.distillation import create_model as create_teacher\n"
        "    assert layers(create_teacher('resnet10t')) == 0\n"
    )
    good = run("--convert", tmp_path / "train.py", tmp_path)
    count = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert good.returncode == 0, good.stderr
    assert good.stdout == f"{count} {count} True\n{32 * 32} {{0.5}}\n"


@pytest.mark.parametrize(
    ("model", "reason"),
    [("vit_tiny_patch16_224", "no batch normalization layer"), ("resnet10t", "TorchScript cannot compile")],
)
def test_convert_says_what_it_cannot_convert(tmp_path: Path, model: str, reason: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"from timm import create_model\ncreate_model({model!r}, scriptable={model == 'resnet10t'})\n")
    bad = run("--convert", script)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ") and reason in bad.stderr and bad.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("preact_resnet18_unit", {}),
        ("preact_resnet18_bn", {}),
        ("resnet18", {"norm_layer": unitdist.timm.norm_layer}),
        ("regnetx_002", {"norm_layer": unitdist.timm.norm_act_layer}),
    ],
)
def test_a_net_for_torchscript_is_refused(model: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="use torch.compile instead of scriptable=True"):
        timm.create_model(model, scriptable=True, **arguments)


def test_training_on_another_size_than_the_divisors_are_for_is_told() -> None:
    images = torch.zeros(2, 3, 64, 64)
    default = timm.create_model("preact_resnet18_unit", num_classes=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        default.eval()(images)  # testing on another size is what n is saved for
        timm.create_model("preact_resnet18_unit", num_classes=2, img_size=64)(images)
        timm.create_model("preact_resnet18_unit", num_classes=2, img_size=(64, 64))(images)
        timm.create_model("preact_resnet18_unit", num_classes=2, fix_norm_divisors=False)(images)
        timm.create_model("preact_resnet18_bn", num_classes=2)(images)
    with pytest.warns(
        UserWarning, match=r"of \(224, 224\) px, and this net trains on \(64, 64\) px.*pass img_size=64 "
    ):
        default.train()(images)
    with pytest.warns(UserWarning, match=r"pass img_size=\(64,96\) "):
        default.train()(torch.zeros(2, 3, 64, 96))


@pytest.mark.slow
@pytest.mark.skipif("UNITDIST_TIMM_REPO" not in os.environ, reason="UNITDIST_TIMM_REPO: folder of timm's repository")
@pytest.mark.parametrize("kind", ["registered", "converted"])
def test_timms_scripts_train_and_validate_a_unit_net(sample_data: Path, kind: str, tmp_path: Path) -> None:
    """train.py's own last accuracy is validate.py's on its checkpoint, and on another size n stays as trained."""
    scripts = Path(os.environ["UNITDIST_TIMM_REPO"])
    common = ["--data-dir", sample_data, "--num-classes", "16", "--device", "cpu", "-j", "0", "--batch-size", "16"]
    ours = [] if kind == "registered" else ["--convert"]
    common += ["--model", "preact_resnet18_unit" if kind == "registered" else "resnet18"]
    sizes = [] if kind == "converted" else ["--model-kwargs", "img_size=64"]
    schedule = ["--epochs", "3", "--lr", "0.002" if kind == "registered" else "0.02", "--warmup-epochs", "0"]
    trained = run(
        *ours, scripts / "train.py", *common, "--img-size", "64", *sizes, *schedule,
        "--model-ema", "--model-ema-decay", "0.9", "--output", tmp_path, "--experiment", "run",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    last = max(result_of(trained), key=lambda epoch: epoch["epoch"])
    losses = [epoch["train"]["loss"] for epoch in sorted(result_of(trained), key=lambda epoch: epoch["epoch"])]
    assert losses[-1] < losses[0], losses
    checkpoint = tmp_path / "run" / "last.pth.tar"
    loaded = torch.load(checkpoint, weights_only=False)
    for state in (loaded["state_dict"], loaded["state_dict_ema"]):
        divisors = [int(value) for name, value in state.items() if name.endswith("norm_divisor")]
        assert divisors == expected_divisors(kind)
        assert all(bool(value.any()) for name, value in state.items() if name.endswith("alpha"))
    decays = {group["weight_decay"]: len(group["params"]) for group in loaded["optimizer"]["param_groups"]}
    assert decays[0.0] == 3 * len(divisors) + 1  # weight, bias and alpha of each norm, and the classifier's bias
    for size in ("64", "96"):
        checked = run(
            *ours, scripts / "validate.py", *common, "--checkpoint", checkpoint, "--use-ema", "--img-size", size, "--use-train-size"
        )  # fmt: skip
        assert checked.returncode == 0, checked.stderr
        result = result_of(checked)
        assert result["img_size"] == int(size)
        if size == "64":
            assert result["top1"] == pytest.approx(last["validation"]["top1"], abs=1e-3)


def result_of(finished: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(finished.stdout.split("--result\n")[1])


def expected_divisors(kind: str) -> list[int]:
    if kind == "registered":
        model = timm.create_model("preact_resnet18_unit", num_classes=16, img_size=64)
    else:
        model = unitdist.convert_unitization(timm.create_model("resnet18", num_classes=16))
        unitdist.set_norm_divisors(model, 64)
    return [int(module.norm_divisor) for module in model.modules() if isinstance(module, Unitization2d)]
