"""`evaluate` as a whole: fully-convolutional against single crop, options, broken images, resuming, wrong networks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from evaluation import EvaluationOptions, evaluate
from evaluation.options import ViewSettings, settle_views
from evaluation.partial import PartialScores, Scored
from evaluation.protocols import assemble
from evaluation.views import Pass
from unitdist.config import Config, DataConfig, EvaluationConfig
from unitdist.data.index import ImageIndex
from unitdist.errors import ConfigError, DataError

SMALL = EvaluationOptions(
    scales_px=(32, 40), crop_px=32, single_scale_px=40, loader="torchvision", images_per_chunk=8, pictures=False
)


def options(**changes: Any) -> EvaluationOptions:
    return EvaluationOptions(**{**{name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}, **changes})


def quiet(line: str) -> None:
    """Swallows the table."""


def run(model: Any, data: Path, output: Path | None = None, protocols: Any = "crops", **changes: Any) -> dict[str, dict[str, Any]]:
    return evaluate(model, data, protocols=protocols, output=output, device="cpu", options=options(**changes), say=quiet)


class Counting(nn.Module):
    """Counts the images that the network sees; `fail_after` images the process is "killed"."""

    def __init__(self, model: nn.Module, fail_after: int | None = None) -> None:
        super().__init__()
        self.model, self.images, self.fail_after = model, 0, fail_after

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        self.images += len(x_nchw)
        if self.fail_after is not None and self.images > self.fail_after:
            raise KeyboardInterrupt
        return self.model(x_nchw)


@pytest.fixture
def square_val(tmp_path: Path, small_val: Path) -> Path:
    """Images of 32x32 pixels, in 16 classes."""
    for path in small_val.rglob("*.jpg"):
        (tmp_path / "square" / path.parent.name).mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("RGB").resize((32, 32)).save((tmp_path / "square" / path.parent.name / path.name).with_suffix(".png"))
    return tmp_path / "square"


def test_fully_convolutional_is_the_single_crop_on_images_of_the_crops_size(
    tiny_net: nn.Module, square_val: Path, tmp_path: Path
) -> None:
    run(tiny_net, square_val, tmp_path / "a", "fully_convolutional", scales_px=(32,), mirror=False, save_scores=True)
    run(tiny_net, square_val, tmp_path / "b", "single", single_scale_px=32, save_scores=True)
    whole = np.load(tmp_path / "a/scores_fully_convolutional.npz")["probabilities"]
    single = np.load(tmp_path / "b/scores_single.npz")["probabilities"]
    assert np.abs(whole - single).max() <= 1e-6


def test_ten_crop_is_the_crops_protocol_at_its_scale(tiny_net: nn.Module, small_val: Path) -> None:
    results = run(tiny_net, small_val, None, ("crops", "ten_crop"))
    crops_at_40 = results["crops"]["scales"][1]
    ten_crop = results["ten_crop"]["scales"][0]
    assert crops_at_40 == ten_crop
    assert ten_crop["views"] == 10


def test_all_means_every_protocol(tiny_net: nn.Module, small_val: Path) -> None:
    results = run(tiny_net, small_val, None, "all")
    views = {name: result["views"] for name, result in results.items()}
    assert views == {"crops": 12, "fully_convolutional": 4, "single": 1, "ten_crop": 10}
    assert all(result["count"] == 34 for result in results.values())


def test_every_view_has_the_same_weight(tiny_net: nn.Module, small_val: Path, tmp_path: Path) -> None:
    run(tiny_net, small_val, tmp_path, "crops", save_scores=True)
    partial = PartialScores(next(path for path in (tmp_path / "partial").iterdir() if path.is_dir()))
    parts = [partial.load(Pass(kind="crops", scale_px=scale, views=views)) for scale, views in ((32, 2), (40, 10))]
    assert parts[0] is not None and parts[1] is not None
    expected = (2 * parts[0].scores_bk.astype(np.float64) + 10 * parts[1].scores_bk) / 12
    np.testing.assert_allclose(np.load(tmp_path / "scores_crops.npz")["probabilities"], expected, atol=1e-7)


def test_averaged_logits_differ_from_averaged_probabilities(tiny_net: nn.Module, small_val: Path, tmp_path: Path) -> None:
    for average in ("softmax", "logits"):
        run(tiny_net, small_val, tmp_path / average, "crops", average=average, save_scores=True)
    one, two = (np.load(tmp_path / average / "scores_crops.npz")["probabilities"] for average in ("softmax", "logits"))
    np.testing.assert_allclose(two.sum(1), 1, atol=1e-6)
    assert 1e-4 < np.abs(one - two).max() < 0.3


def test_a_fixed_norm_divisor_makes_a_difference(tiny_net: nn.Module, small_val: Path, tmp_path: Path) -> None:
    for kind in ("fixed", "per_image"):
        run(tiny_net, small_val, tmp_path / kind, "fully_convolutional", norm_divisor=kind, save_scores=True)
    fixed, per_image = (np.load(tmp_path / kind / "scores_fully_convolutional.npz")["probabilities"] for kind in ("fixed", "per_image"))
    assert np.abs(fixed - per_image).max() > 1e-3
    assert json.loads((tmp_path / "per_image/report.json").read_text())["settings"]["norm_divisor"] == "per_image"


def test_an_evaluation_leaves_the_network_as_it_was(tiny_net: nn.Module, small_val: Path) -> None:
    before = {name: value.clone() for name, value in tiny_net.state_dict().items()}
    tiny_net.train()
    run(tiny_net, small_val, None, "fully_convolutional", norm_divisor="per_image")
    assert all(torch.equal(value, before[name]) for name, value in tiny_net.state_dict().items())
    assert all(module.training for module in tiny_net.modules())
    assert not any(module._forward_pre_hooks for module in tiny_net.modules())


def test_a_finished_scale_is_not_computed_again(tiny_net: nn.Module, small_val: Path, tmp_path: Path) -> None:
    first = Counting(tiny_net)
    results = run(first, small_val, tmp_path, "crops")
    assert first.images == 1 + 34 * 12
    again = Counting(tiny_net)
    assert run(again, small_val, tmp_path, "crops", resume=True) == results
    assert again.images == 1  # the image that tells the number of classes
    more = Counting(tiny_net)
    run(more, small_val, tmp_path, "crops", scales_px=(32, 40, 50), resume=True)
    assert more.images == 1 + 34 * 10


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_bytes(
    tiny_net: nn.Module, small_val: Path, tmp_path: Path
) -> None:
    run(Counting(tiny_net), small_val, tmp_path / "whole", "all")
    with pytest.raises(KeyboardInterrupt):
        run(Counting(tiny_net, fail_after=300), small_val, tmp_path / "cut", "all", num_threads=1)
    resumed = Counting(tiny_net)
    run(resumed, small_val, tmp_path / "cut", "all", resume=True)
    assert 0 < resumed.images < 34 * (12 + 4 + 1)
    assert (tmp_path / "cut/report.json").read_bytes() == (tmp_path / "whole/report.json").read_bytes()


def test_without_resume_everything_is_computed_again(tiny_net: nn.Module, small_val: Path, tmp_path: Path) -> None:
    for _ in range(2):
        model = Counting(tiny_net)
        run(model, small_val, tmp_path, "single")
        assert model.images == 1 + 34


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"average": "logits"}, "average was 'softmax', is now 'logits'"), ({"loader": "dali"}, "loader was 'torchvision', is now 'dali'")],
)
def test_resuming_another_evaluation_is_refused(
    tiny_net: nn.Module, small_val: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run(tiny_net, small_val, tmp_path, "single")
    with pytest.raises(ConfigError, match=message):
        run(tiny_net, small_val, tmp_path, "single", resume=True, **changes)


def test_resuming_with_another_network_is_refused(tiny_net: nn.Module, small_val: Path, tmp_path: Path) -> None:
    run(tiny_net, small_val, tmp_path, "single")
    tiny_net.classifier.bias.data += 1  # type: ignore[union-attr, operator]
    with pytest.raises(ConfigError, match="network_sha256 was"):
        run(tiny_net, small_val, tmp_path, "single", resume=True)


def test_resuming_needs_a_folder(tiny_net: nn.Module, small_val: Path) -> None:
    with pytest.raises(ConfigError, match="--resume needs --output"):
        run(tiny_net, small_val, None, "single", resume=True)


def test_damaged_partial_scores_are_named(tiny_net: nn.Module, small_val: Path, tmp_path: Path) -> None:
    run(tiny_net, small_val, tmp_path, "single")
    next((tmp_path / "partial").glob("*/crops_40px_1views.npz")).write_bytes(b"PK damaged")
    with pytest.raises(DataError, match="crops_40px_1views.npz is damaged .*; delete it and resume again"):
        run(tiny_net, small_val, tmp_path, "single", resume=True)


@pytest.fixture
def broken_val(tmp_path: Path, small_val: Path) -> Path:
    """`small_val` with one truncated image and one that is no image at all."""
    shutil.copytree(small_val, tmp_path / "broken")
    files = sorted((tmp_path / "broken").rglob("*_00*.jpg"))
    files[3].write_bytes(files[3].read_bytes()[:3000])
    files[9].write_bytes(b"no image")
    return tmp_path / "broken"


@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_broken_images_are_counted_and_named(
    loader: str, tiny_net: nn.Module, broken_val: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = run(tiny_net, broken_val, tmp_path / "out", ("crops", "fully_convolutional"), loader=loader, on_broken="skip")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["images"], report["count"], len(report["broken"])) == (34, 32, 2)
    assert results["crops"]["count"] == results["fully_convolutional"]["count"] == 32
    files = sorted(broken_val.rglob("*_00*.jpg"))
    assert {entry["image"] for entry in report["broken"]} == {str(files[i].relative_to(broken_val)) for i in (3, 9)}
    assert all(entry["reason"] for entry in report["broken"])


def test_broken_images_that_are_left_out_are_said_aloud(tiny_net: nn.Module, broken_val: Path) -> None:
    said: list[str] = []
    evaluate(tiny_net, broken_val, protocols="single", device="cpu", options=options(on_broken="skip"), say=said.append)
    first = sorted(broken_val.rglob("*_00*.jpg"))[3]
    assert said[1].startswith(f"left out: 2 of 34 images, which cannot be decoded; first: {first}: ")


@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_broken_images_are_an_error_by_default(
    loader: str, tiny_net: nn.Module, broken_val: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = sorted(broken_val.rglob("*_00*.jpg"))
    with pytest.raises(DataError, match=f"1 image cannot be decoded; first: {files[9]}: no readable image header"):
        run(tiny_net, broken_val, None, "single", loader=loader)
    files[9].unlink()
    with pytest.raises(DataError, match=f"1 image cannot be decoded; first: {files[3]}: .* --on-broken skip"):
        run(tiny_net, broken_val, None, "single", loader=loader)


def test_an_image_that_vanishes_is_an_error(
    tiny_net: nn.Module, broken_val: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(broken_val.rglob("*_00*.jpg"))
    files[9].unlink()
    original = ImageIndex.read

    def vanish(self: ImageIndex, sample_id: int) -> bytes:
        if self.name(sample_id) == str(files[20]):
            raise FileNotFoundError(2, "No such file or directory", self.name(sample_id))
        return original(self, sample_id)

    monkeypatch.setattr(ImageIndex, "read", vanish)
    with pytest.raises(DataError, match=f"cannot read {files[20]}: No such file"):
        run(tiny_net, broken_val, None, "single", on_broken="skip")


class Listed:
    """As much of an ImageList as `assemble` reads."""

    names = ("a.jpg", "b.jpg", "c.jpg")
    broken: dict[int, str] = {}
    root = Path("data")

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("ids", "message"),
    [([[0], [2]], "1 of 3 images were not scored exactly once; first: b.jpg, 0 times"), ([[0, 1], [1, 2]], "first: b.jpg, 2 times")],
)
def test_a_missing_or_repeated_image_is_an_error(ids: list[list[int]], message: str) -> None:
    parts = [Scored(image_ids=np.array(some), scores_bk=np.ones((len(some), 4), np.float32), broken={}) for some in ids]
    with pytest.raises(DataError, match=message):
        assemble(parts, Listed(), Pass(kind="crops", scale_px=32, views=1))  # type: ignore[arg-type]


def test_scores_that_are_not_finite_are_an_error(tiny_net: nn.Module, small_val: Path) -> None:
    tiny_net.classifier.bias.data[2] = float("nan")  # type: ignore[union-attr, operator]
    with pytest.raises(DataError, match="the network's scores of 34 images are not finite"):
        run(tiny_net, small_val, None, "single")


def test_a_network_of_another_kind_is_refused(small_val: Path) -> None:
    with pytest.raises(ConfigError, match="Sequential cannot take a colour image of 32x32 pixels"):
        run(nn.Sequential(nn.Conv2d(1, 4, 3)), small_val, None, "single")
    with pytest.raises(ConfigError, match="Conv2d is no classifier: expected scores"):
        run(nn.Conv2d(3, 4, 3), small_val, None, "single")
    dense = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16))
    with pytest.raises(ConfigError, match="cannot take a colour image of 32x48 pixels"):
        run(dense, small_val, None, "fully_convolutional")


def test_another_number_of_classes_is_refused(small_val: Path) -> None:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    with pytest.raises(DataError, match="the network has 10 outputs, .* has 16 classes"):
        run(net, small_val, None, "single")


@pytest.mark.parametrize(
    ("protocols", "message"), [("seven_crop", "unknown protocol 'seven_crop'; known: crops, "), ((), "no protocol was given")]
)
def test_unknown_protocols_are_refused(tiny_net: nn.Module, small_val: Path, protocols: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny_net, small_val, None, protocols)


def test_an_output_that_cannot_be_written_is_refused(tiny_net: nn.Module, small_val: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--output: cannot write"):
        run(tiny_net, small_val, tmp_path / "file" / "out", "single")


def test_cuda_without_a_gpu_is_refused(tiny_net: nn.Module, small_val: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda: torch sees no CUDA device"):
        evaluate(tiny_net, small_val, device="cuda", options=SMALL)
    with pytest.raises(ConfigError, match="--decode-device gpu: torch sees no CUDA device"):
        evaluate(tiny_net, small_val, options=options(loader="dali", decode_device="gpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_per_chunk": 0}, "images_per_chunk: must be >= 1, got 0"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std: give both or neither"),
        ({"decode_device": "gpu"}, "decode_device gpu needs loader dali"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**changes)


def test_a_scale_below_the_crop_is_refused(tiny_net: nn.Module, small_val: Path) -> None:
    with pytest.raises(ConfigError, match="single_scale_px: 20 is smaller than the crop of 32"):
        run(tiny_net, small_val, None, "single", single_scale_px=20)


def test_the_trainings_config_states_what_the_options_leave_open() -> None:
    training = Config(
        data=DataConfig(path="data", image_size_px=64, scale_range_px=(64, 90), val_resize_px=75),
        evaluation=EvaluationConfig(scales_px=(64, 96), crop_px=64, mirror=False, average="logits"),
    )
    assert settle_views(EvaluationOptions(), training) == ViewSettings(
        scales_px=(64, 96), crop_px=64, single_scale_px=75, mirror=False, average="logits"
    )
    assert settle_views(EvaluationOptions(crop_px=56, mirror=True, average="softmax"), training) == ViewSettings(
        scales_px=(64, 96), crop_px=56, single_scale_px=64, mirror=True, average="softmax"
    )
    assert settle_views(EvaluationOptions(), None) == ViewSettings()


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_probabilities(tiny_net: nn.Module, small_val: Path, tmp_path: Path) -> None:
    for compiled in (False, True):
        run(tiny_net, small_val, tmp_path / str(compiled), "fully_convolutional", compile=compiled, save_scores=True)
    one, two = (np.load(tmp_path / name / "scores_fully_convolutional.npz")["probabilities"] for name in ("False", "True"))
    np.testing.assert_allclose(one, two, atol=1e-5)
