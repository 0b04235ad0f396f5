"""The paper's sentences on its architectures: order of layers, strides, shortcuts, norms, map sizes."""

import pytest
import torch
from torch import Tensor, nn

from unitdist import Unitization2d
from unitdist.analysis.probe import capture_outputs, watch_layers
from unitdist.config import ModelConfig
from unitdist.errors import ConfigError
from unitdist.models.build import build_model
from unitdist.models.preact_resnet import PreactResNet


def build(name: str, norm: str = "unitization", image_size_px: int = 32, **keys: object) -> PreactResNet:
    config = ModelConfig(**{"name": name, "norm": norm, "num_classes": 10, **keys})  # type: ignore[arg-type]
    model = build_model(config, image_size_px=image_size_px)
    assert isinstance(model, PreactResNet)
    return model


def run_order(model: nn.Module, x_nchw: Tensor) -> list[str]:
    """Names of the modules without children, in the order in which they ran."""
    ran: list[str] = []
    for name, module in model.named_modules():
        if not list(module.children()) and not isinstance(module, nn.Identity):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    model.eval()(x_nchw)
    return ran


def divisors(model: nn.Module) -> dict[str, int]:
    return {
        name: int(module.norm_divisor) for name, module in model.named_modules() if isinstance(module, Unitization2d)
    }


def test_cifar_order_is_norm_relu_conv_in_every_block() -> None:
    order = run_order(build("cifar_resnet20", "batchnorm"), torch.randn(1, 3, 32, 32))
    chain = ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"]
    projected = ["norm1", "relu1", "projection", "conv1", "norm2", "relu2", "conv2"]
    blocks = [
        f"stages.{stage}.{block}.{part}"
        for stage in range(3)
        for block in range(3)
        for part in (projected if stage > 0 and block == 0 else chain)
    ]
    stem, head = ["stem_conv", "stem_norm", "stem_relu"], ["final_norm", "final_relu", "pool", "classifier"]
    assert order == [*stem, *blocks, *head]


def test_imagenet_order_has_no_stem_norm_and_no_final_norm() -> None:
    order = run_order(build("preact_resnet50", "batchnorm"), torch.randn(1, 3, 32, 32))
    first = ["norm1", "relu1", "projection", "conv1", "norm2", "relu2", "conv2", "norm3", "relu3", "conv3"]
    assert order[:12] == ["stem_conv", "stem_pool", *(f"stages.0.0.{part}" for part in first)]
    assert order[-4:] == ["stages.3.2.conv3", "final_relu", "pool", "classifier"]
    assert sum("norm" in name for name in order) == 48


def test_unitization_order_is_batchnorm_order_with_the_relu_fused() -> None:
    x_nchw = torch.randn(1, 3, 32, 32)
    fused = run_order(build("preact_resnet18"), x_nchw)
    plain = run_order(build("preact_resnet18", "batchnorm"), x_nchw)
    assert fused == [name for name in plain if "relu" not in name or name == "final_relu"]


def test_block_equals_its_formula() -> None:
    block = build("preact_resnet50").stages[1][0].eval()
    x_nchw = torch.randn(2, 256, 8, 8)
    out = block.conv1(block.norm1(x_nchw))
    out = block.conv3(block.norm3(block.conv2(block.norm2(out))))
    assert torch.equal(block(x_nchw), out + block.projection(x_nchw))


def test_projections_stand_only_where_the_shape_changes() -> None:
    def projections(name: str) -> list[str]:
        return [part for part, _ in build(name).named_modules() if part.endswith("projection")]

    assert projections("cifar_resnet20") == ["stages.1.0.projection", "stages.2.0.projection"]
    assert projections("preact_resnet18") == [f"stages.{stage}.0.projection" for stage in (1, 2, 3)]
    assert projections("preact_resnet50") == [f"stages.{stage}.0.projection" for stage in range(4)]


def test_resnet101_divisors_at_224_are_the_map_sizes() -> None:
    found = divisors(build("preact_resnet101", image_size_px=224))
    assert len(found) == 99
    sides = {}
    for stage, (blocks, side) in enumerate(zip((3, 4, 23, 3), (56, 28, 14, 7), strict=True)):
        for block in range(blocks):
            input_side = 2 * side if stage > 0 and block == 0 else side
            for norm, norm_side in (("norm1", input_side), ("norm2", side), ("norm3", side)):
                sides[f"stages.{stage}.{block}.{norm}"] = norm_side**2
    assert found == sides
    assert found["stages.0.0.norm1"] == 56**2 and found["stages.3.2.norm3"] == 7**2


def test_cifar_divisors_are_32_16_8_squared() -> None:
    found = divisors(build("cifar_resnet20"))
    assert found["stem_norm"] == 32**2 and found["final_norm"] == 8**2
    assert {found[f"stages.0.{block}.norm{norm}"] for block in range(3) for norm in (1, 2)} == {32**2}
    assert [found[f"stages.1.{block}.norm{norm}"] for block in range(3) for norm in (1, 2)] == [32**2] + [16**2] * 5
    assert [found[f"stages.2.{block}.norm{norm}"] for block in range(3) for norm in (1, 2)] == [16**2] + [8**2] * 5


def test_stride_switch_moves_the_stride_to_the_3x3() -> None:
    paper = build("preact_resnet50", image_size_px=224)
    moved = build("preact_resnet50", image_size_px=224, stride_in_first_conv=False)
    strides = [[(block.conv1.stride, block.conv2.stride) for block in stage] for stage in paper.stages]
    moved_strides = [[(block.conv1.stride, block.conv2.stride) for block in stage] for stage in moved.stages]
    assert [stage[0] for stage in strides] == [((1, 1), (1, 1))] + [((2, 2), (1, 1))] * 3
    assert [stage[0] for stage in moved_strides] == [((1, 1), (1, 1))] + [((1, 1), (2, 2))] * 3
    assert {pair for stage in strides + moved_strides for pair in stage[1:]} == {((1, 1), (1, 1))}
    assert divisors(paper)["stages.1.0.norm2"] == 28**2 and divisors(moved)["stages.1.0.norm2"] == 56**2


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet164"])
def test_projection_switch_changes_what_the_projection_reads(name: str) -> None:
    for raw in (True, False):
        block = build(name, raw_projection=raw).stages[1][0].eval()
        seen: list[Tensor] = []
        block.projection.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        x_nchw = torch.randn(2, block.norm1.num_features, 8, 8)
        block(x_nchw)
        active = block.norm1(x_nchw)
        assert torch.equal(seen[0], x_nchw if raw else active)
        assert not torch.equal(x_nchw, active)


def test_stem_and_final_norm_switches_add_and_remove_norms() -> None:
    def ends(model: PreactResNet) -> tuple[bool, bool]:
        return isinstance(model.stem_norm, Unitization2d), isinstance(model.final_norm, Unitization2d)

    assert ends(build("preact_resnet18")) == (False, False)
    assert ends(build("preact_resnet18", stem_norm=True)) == (True, False)
    assert ends(build("preact_resnet18", final_norm=True)) == (False, True)
    assert ends(build("cifar_resnet20")) == (True, True)
    assert ends(build("cifar_resnet20", stem_norm=False, final_norm=False)) == (False, False)
    order = run_order(build("preact_resnet18", "batchnorm", stem_norm=True, final_norm=True), torch.randn(1, 3, 32, 32))
    assert order[:4] == ["stem_conv", "stem_norm", "stem_relu", "stem_pool"]
    assert order[-4:] == ["final_norm", "final_relu", "pool", "classifier"]


def test_net_without_final_norm_still_pools_nonnegative_values() -> None:
    features = build("preact_resnet18").eval().forward_features(torch.randn(2, 3, 64, 64)).detach()
    assert float(features.min()) == 0.0 and float(features.max()) > 0


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet164", "preact_resnet18", "preact_resnet50"])
def test_any_image_size_goes_in(name: str) -> None:
    model = build(name).eval()
    for height, width in ((32, 32), (33, 47), (70, 65)):
        assert model(torch.randn(2, 3, height, width)).shape == (2, 10)


def test_classifier_on_the_pooled_map_is_the_forward_pass() -> None:
    model = build("preact_resnet18").eval()
    x_nchw = torch.randn(2, 3, 64, 96)
    features_nchw = model.forward_features(x_nchw)
    assert features_nchw.shape == (2, 512, 2, 3)
    dense = nn.functional.conv2d(features_nchw, model.classifier.weight[:, :, None, None], model.classifier.bias)
    torch.testing.assert_close(dense.mean((2, 3)), model(x_nchw), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.forward_head(features_nchw, pre_logits=True), features_nchw.mean((2, 3)))


def test_gradients_reach_every_parameter() -> None:
    for norm in ("unitization", "batchnorm"):
        model = build("cifar_resnet20", norm)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("alpha"):
                    parameter.fill_(0.3)
        nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


FORMS: dict[str, dict[str, object]] = {
    "folded": {"fold_residual": True},
    "overlapped": {"overlap_sync": True},
    "both": {"fold_residual": True, "overlap_sync": True},
}


def run_steps(model: PreactResNet, side_px: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Two training steps' gradients, statistics, and the logits of an evaluation."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.sin(torch.arange(len(parameter)) + index))
    model = model.to(dtype)
    x_nchw = torch.randn(3, 3, side_px, side_px, generator=torch.Generator().manual_seed(1)).to(dtype)
    for scale in (1.0, 2.0):
        nn.functional.cross_entropy(model(scale * x_nchw), torch.arange(3)).backward()
    found = {
        f"grad {name}": parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return found | {"logits": model.eval()(x_nchw).detach()}


@pytest.mark.parametrize("form", ["folded", "overlapped", "both"])
@pytest.mark.parametrize("name", ["cifar_resnet20", "preact_resnet50"])
def test_faster_forms_of_the_block_have_the_same_gradients(name: str, form: str) -> None:
    keys = {"stem_norm": True, "final_norm": True} if form == "both" else {}
    torch.manual_seed(0)
    plain = run_steps(build(name, **keys), 32, torch.float64)
    torch.manual_seed(0)
    other = run_steps(build(name, **keys, **FORMS[form]), 32, torch.float64)
    assert list(other) == list(plain)
    for key, expected in plain.items():
        torch.testing.assert_close(
            other[key], expected, rtol=1e-8, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_faster_forms_hold_with_preactivated_projection_and_checkpointing() -> None:
    keys = {"raw_projection": False, "fold_residual": True, "overlap_sync": True}
    torch.manual_seed(0)
    plain = run_steps(build("cifar_resnet20", raw_projection=False), 32, torch.float64)
    torch.manual_seed(0)
    model = build("cifar_resnet20", **keys)
    model.set_grad_checkpointing()
    other = run_steps(model, 32, torch.float64)
    for key, expected in plain.items():
        torch.testing.assert_close(
            other[key], expected, rtol=1e-8, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_folded_block_puts_out_the_two_terms() -> None:
    block = build("cifar_resnet20", fold_residual=True).stages[0][0].eval()
    x_nchw, residual = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    out, shortcut = block(x_nchw, residual)
    assert torch.equal(shortcut, x_nchw + residual)
    plain = build("cifar_resnet20").stages[0][0].eval()
    plain.load_state_dict(block.state_dict())
    torch.testing.assert_close(out + shortcut, plain(x_nchw + residual))


def test_compiled_norms_are_switched_on_in_every_layer() -> None:
    layers = [
        module for module in build("cifar_resnet20", compile_norm=True).modules() if isinstance(module, Unitization2d)
    ]
    assert len(layers) == 20 and all(layer.compiled for layer in layers)


@pytest.mark.parametrize("key", ["fold_residual", "overlap_sync", "compile_norm"])
def test_faster_forms_are_refused_for_another_norm(key: str) -> None:
    with pytest.raises(ConfigError, match=f"model.{key}: must be false for another norm than unitization"):
        build("cifar_resnet20", "batchnorm", **{key: True})


def backward_nodes(out: Tensor) -> list[str]:
    """Names of the autograd nodes behind `out`."""
    seen, waiting = {out.grad_fn}, [out.grad_fn]
    while waiting:
        node = waiting.pop()
        assert node is not None
        before = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= before
        waiting += before
    return [node.name() for node in seen if node is not None]


def test_overlapped_net_has_one_node_per_norm_and_convolution() -> None:
    def count(part: str, **keys: object) -> int:
        nodes = backward_nodes(build("cifar_resnet20", **keys)(torch.randn(2, 3, 32, 32)))
        return sum(part in node for node in nodes)

    assert count("UnitizationConvolutionFunction", overlap_sync=True) == 18
    assert count("UnitizationFunction", overlap_sync=True) == 2
    assert count("AddBackward") == 9
    assert count("AddBackward", fold_residual=True) == 0


def test_probes_see_the_same_in_the_faster_forms() -> None:
    plain = build("cifar_resnet20").eval()
    faster = build("cifar_resnet20", fold_residual=True, overlap_sync=True).eval()
    faster.load_state_dict(plain.state_dict())
    x_nchw = torch.randn(2, 3, 32, 32)
    names = ["stages.0.1.norm1", "stages.1.0.norm1", "stages.2.2.norm2", "final_norm"]
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for model in (plain, faster):
        with watch_layers(model, names, lambda name, _, x, y: seen[name].extend([x, y])):
            watched = model(x_nchw)
        assert torch.equal(watched, model(x_nchw))
    for name, (x_plain, y_plain, x_faster, y_faster) in seen.items():
        torch.testing.assert_close(x_faster, x_plain, msg=name)
        torch.testing.assert_close(y_faster, y_plain, msg=name)
    with capture_outputs(faster, names) as outputs:
        faster(x_nchw)
    assert set(outputs) == set(names) and float(outputs["final_norm"].min()) < 0
