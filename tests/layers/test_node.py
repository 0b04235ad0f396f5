"""The operator under torch.library's checks, torch.compile, torch.export; its options against the plain layer."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unitdist import Unitization1d, Unitization2d
from unitdist.layers import compile_norms, normalize_and_convolve
from unitdist.layers.node import runs_eagerly, unitization, unitization_backward

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("weight", "bias", "alpha")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moved(channels: int, dtype: torch.dtype = torch.float64, **settings: object) -> Unitization2d:
    layer = Unitization2d(channels, dtype=dtype, **settings)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(random(channels, seed=seed + 50))
    return layer


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    norms = moved(8, dtype, activation="relu", norm_divisor=9), moved(4, dtype, norm_divisor=9)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norms[0], nn.Conv2d(8, 4, 1), norms[1])
    return net.to(dtype=dtype, memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("pixel_norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_opcheck(pixel_norm: bool, residual: bool, training: bool) -> None:
    x = random(3, 4, 5, 2).requires_grad_()
    addend = random(3, 4, 5, 2, seed=1).requires_grad_() if residual else None
    parameters = [random(4, seed=s).requires_grad_() for s in (2, 3, 4)]
    running, divisor = (random(4, seed=5), random(4, seed=6).square() + 0.1), torch.tensor(6)
    settings = (1e-5, True, pixel_norm, training, False, "")
    torch.library.opcheck(unitization, (x, addend, *parameters, *running, divisor, *settings))
    with torch.no_grad():
        _, total, *saved = unitization(x, addend, *parameters, *running, divisor, *settings)
        detached = [p.detach() for p in parameters]
        normalized = total if residual else x.detach()
        arguments = (random(3, 4, 5, 2, seed=7), addend, normalized, *detached, divisor, saved, *settings)
        arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(unitization_backward, arguments)


def gradients_of(net: nn.Module, module: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters())]


def test_compiles_without_a_graph_break_in_training_and_evaluation() -> None:
    net = network()
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = random(4, 3, 8, 8, dtype=torch.float32)
    for have, want in zip(gradients_of(twin, compiled, x), gradients_of(net, net, x), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    for (name, have), want in zip(twin.state_dict().items(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(have, want, msg=lambda text, name=name: f"{name}: {text}")
    net.eval(), twin.eval()
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)


def test_the_first_batch_fixes_the_norm_divisor_inside_a_compiled_graph() -> None:
    layer = Unitization2d(3)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(random(2, 3, 4, 6, dtype=torch.float32))
    assert layer.norm_divisor.item() == 24 and layer.knows_norm_divisor()


def test_exports_in_evaluation_for_any_batch() -> None:
    net = network().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (random(2, 3, 8, 8, dtype=torch.float32),), dynamic_shapes=({0: batch},))
    x = random(5, 3, 8, 8, seed=1, dtype=torch.float32)
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm_scope", ["image", "pixel"])
@pytest.mark.parametrize("use_total", [False, True])
def test_folded_residual_equals_a_separate_addition(
    memory_format: torch.memory_format, norm_scope: str, use_total: bool
) -> None:
    layer = moved(5, activation="relu", norm_scope=norm_scope)
    inputs = [random(3, 5, 4, 3, seed=s).contiguous(memory_format=memory_format).requires_grad_() for s in (0, 1)]
    leaves = [*inputs, *layer.parameters()]
    weights = random(3, 5, 4, 3, seed=3)

    def loss(y: Tensor, total: Tensor) -> Tensor:
        return (y * weights).sum() + (total.square().sum() if use_total else 0.0)

    total = inputs[0] + inputs[1]
    want_y = layer(total)
    want = torch.autograd.grad(loss(want_y, total), leaves)
    y, folded = layer(*inputs)
    got = torch.autograd.grad(loss(y, folded), leaves)
    torch.testing.assert_close(folded, total, rtol=0, atol=0)
    torch.testing.assert_close(y, want_y, rtol=0, atol=1e-13)
    for have, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(have, wanted, rtol=0, atol=1e-11)


def test_a_residual_sum_used_alone_passes_its_gradient() -> None:
    layer, x, residual = moved(3), random(2, 3, 2, 2).requires_grad_(), random(2, 3, 2, 2, seed=1).requires_grad_()
    _, total = layer(x, residual)
    got = torch.autograd.grad((total * x.detach()).sum(), [x, residual])
    assert torch.equal(got[0], x) and torch.equal(got[1], x)


@pytest.mark.parametrize("keep_output", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_norm_and_convolution_as_one_node_equal_the_separate_form(
    keep_output: bool, residual: bool, groups: int
) -> None:
    norm = moved(4, activation="relu")
    twin = copy.deepcopy(norm)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups, bias=residual, dtype=torch.float64)
    x, addend = random(3, 4, 7, 6).requires_grad_(), random(3, 4, 7, 6, seed=1).requires_grad_()
    extra = [addend] if residual else []
    want_parts = twin(x, *extra) if residual else (twin(x), x)
    want_out = conv(want_parts[0])
    want = torch.autograd.grad(
        want_out.square().sum() + want_parts[1].pow(3).sum(), [x, *extra, *twin.parameters(), *conv.parameters()]
    )
    parts = normalize_and_convolve(norm, conv, x, *extra, keep_output=keep_output)
    out, total = parts if residual else (parts, x)
    assert type(out.grad_fn).__name__ == "UnitizationConvolutionFunctionBackward"
    got = torch.autograd.grad(
        out.square().sum() + total.pow(3).sum(), [x, *extra, *norm.parameters(), *conv.parameters()]
    )
    torch.testing.assert_close(out, want_out, rtol=0, atol=1e-13)
    for have, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(have, wanted, rtol=0, atol=1e-11)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("keep_output", "activations"), [(True, 2), (False, 1)])
def test_one_node_keeps_one_activation_when_the_output_is_recomputed(keep_output: bool, activations: int) -> None:
    norm, conv = moved(8, torch.float32, activation="relu"), nn.Conv2d(8, 8, 1)
    x = random(4, 8, 16, 16, dtype=torch.float32).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        normalize_and_convolve(norm, conv, x, keep_output=keep_output)
    assert sum(count for count in kept.values() if count >= x.numel()) == activations * x.numel()


def test_where_the_node_does_not_apply_the_modules_run_one_after_the_other() -> None:
    norm, conv, seen = moved(4, norm_divisor=9), nn.Conv2d(4, 4, 3, dtype=torch.float64), []
    x = random(2, 4, 5, 5)
    torch.testing.assert_close(normalize_and_convolve(norm.eval(), conv, x), conv(norm(x)), rtol=0, atol=0)
    handle = norm.train().register_forward_hook(lambda *_: seen.append(1))
    normalize_and_convolve(norm, conv, x)
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert normalize_and_convolve(norm, conv, x).dtype == conv(norm(x)).dtype
    assert seen == [1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck_of_norm_and_convolution() -> None:
    from unitdist.layers.overlap import unitization_convolution

    values = [random(4, seed=s).requires_grad_() for s in (1, 2, 3)]
    x, weight = random(2, 4, 5, 5).requires_grad_(), random(6, 4, 3, 3, seed=4).requires_grad_()
    torch.library.opcheck(
        unitization_convolution,
        (x, None, *values, torch.tensor(5), weight, None, [1, 1], [1, 1], [1, 1], 1, 1e-5, True, False, True, ""),
    )


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # torch 2.11's Inductor
def test_compiled_pieces_equal_the_plain_layer() -> None:
    plain = moved(6, torch.float32, activation="relu")
    compiled = compile_norms(nn.Sequential(copy.deepcopy(plain)))[0]
    x = random(3, 6, 5, 4, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    addend, grad_y = random(3, 6, 5, 4, seed=1, dtype=torch.float32), random(3, 6, 5, 4, seed=2, dtype=torch.float32)
    results = []
    for layer in (compiled, plain):
        leaf = x.clone().requires_grad_()
        y, total = layer(leaf, addend)
        (y * grad_y + total * grad_y).sum().backward()
        results.append([y, leaf.grad, *(getattr(layer, name).grad for name in NAMES), layer.running_var])
    for have, want in zip(*results, strict=True):
        assert ((have - want).abs().max() / want.abs().max()).item() < 1e-5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_compiled_vectors_equal_the_operator(training: bool, activation: str | None) -> None:
    eager = Unitization1d(6, activation=activation, dtype=torch.float64).train(training)
    with torch.no_grad():
        for seed, parameter in enumerate(eager.parameters()):
            parameter.copy_(random(6, seed=seed + 50))
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = random(9, 6)
    for have, want in zip(gradients_of(twin, compiled, x), gradients_of(eager, eager, x), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-11)
    for have, want in zip(twin.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-13)


def test_importing_the_package_registers_the_operator() -> None:
    """A program that a user exported with torch.export names it, and loads after `import unitdist`."""
    code = "import torch, unitdist; torch.ops.unitdist.unitization.default"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


class Watching(TorchDispatchMode):
    """Does nothing but be there: the layer then goes through its operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("norm_scope", ["image", "pixel"])
@pytest.mark.parametrize("residual", [True, False])
def test_the_eager_function_and_the_operator_are_the_same_to_the_last_bit(
    residual: bool, norm_scope: str, momentum: float | None, training: bool
) -> None:
    results = []
    for mode in (nullcontext(), Watching()):
        layer = moved(5, norm_scope=norm_scope, momentum=momentum, activation="relu", norm_divisor=7).train(training)
        leaves = [random(3, 5, 4, 2, seed=s).requires_grad_() for s in (0, 1)][: 1 + residual]
        with mode:
            out = layer(*leaves)
        y, total = out if residual else (out, leaves[0])
        grads = torch.autograd.grad((y * total).sum(), [*leaves, *layer.parameters()])
        results.append([y, total, *grads, *layer.buffers()])
        if isinstance(mode, Watching):
            assert "unitdist::unitization" in mode.seen
        else:
            assert type(y.grad_fn).__name__ == "UnitizationFunctionBackward"
    for have, want in zip(*results, strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("residual", [True, False])
def test_the_eager_node_with_a_convolution_and_its_operator_are_the_same_to_the_last_bit(residual: bool) -> None:
    results = []
    for mode in (nullcontext(), Watching()):
        norm, conv = moved(4, activation="relu"), nn.Conv2d(4, 6, 3, dtype=torch.float64)
        with torch.no_grad():
            conv.weight.copy_(random(6, 4, 3, 3, seed=9)), conv.bias.copy_(random(6, seed=8))
        leaves = [random(3, 4, 5, 6, seed=s).requires_grad_() for s in (0, 1)][: 1 + residual]
        with mode:
            out = normalize_and_convolve(norm, conv, *leaves)
        y, total = out if residual else (out, leaves[0])
        grads = torch.autograd.grad(
            y.square().sum() + total.pow(3).sum(), [*leaves, *norm.parameters(), *conv.parameters()]
        )
        results.append([y, total, *grads, *norm.buffers()])
        assert ("unitdist::unitization_convolution" in mode.seen) if isinstance(mode, Watching) else True
    for have, want in zip(*results, strict=True):
        assert torch.equal(have, want)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    layer, x = moved(3), random(4, 3, 2, 2).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace.*is deprecated")
def test_who_watches_operators_gets_the_operator() -> None:
    x = random(2, 3, 4, 4)
    assert runs_eagerly(x) and runs_eagerly(nn.Parameter(x))
    with Watching():
        assert not runs_eagerly(x)
    assert not runs_eagerly(x.to("meta"))
    assert not runs_eagerly(x.as_subclass(type("Tagged", (Tensor,), {})))
    seen: list[bool] = []
    torch.vmap(lambda row: (seen.append(runs_eagerly(row)), row)[1])(x)
    torch.jit.trace(lambda tensor: (seen.append(runs_eagerly(tensor)), tensor + 1)[1], x, check_trace=False)
    assert seen and not any(seen)


def test_under_another_default_device_the_layer_works_where_its_input_lies() -> None:
    layer, x = moved(3, torch.float32, activation="relu"), random(4, 3, 2, 2, dtype=torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=memory_format).requires_grad_()
        with torch.device("meta"):
            layer(leaf).sum().backward()
        assert leaf.grad is not None and leaf.grad.device.type == "cpu"
