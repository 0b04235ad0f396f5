"""The layer against the literal algorithms, against torch's BatchNorm, and its manners as a module."""

import copy
import io
import itertools

import pytest
import torch
from torch import Tensor, nn

from unitdist import Unitization1d, Unitization2d
from unitdist.errors import CheckpointError, ConfigError
from unitdist.functional import unitization_images, unitization_vectors


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moved(layer: nn.Module, seed: int = 7) -> nn.Module:
    """The layer with weight, bias and alpha away from their initial values."""
    with torch.no_grad():
        for index, name in enumerate(("weight", "bias", "alpha")):
            parameter = getattr(layer, name)
            parameter.copy_(random(*parameter.shape, seed=seed + index))
    return layer


SETTINGS = list(itertools.product(["image", "pixel"], [None, "relu"], [True, False]))
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("norm_scope", "activation", "training"), SETTINGS)
def test_output_and_gradients_equal_algorithm_2(
    norm_scope: str, activation: str | None, training: bool, memory_format: torch.memory_format
) -> None:
    layer = moved(Unitization2d(6, norm_divisor=11, norm_scope=norm_scope, activation=activation, dtype=torch.float64))
    layer.running_mean.copy_(random(6, seed=20))
    layer.running_var.copy_(random(6, seed=21).square() + 0.1)
    statistics = (None, None) if training else (layer.running_mean.clone(), layer.running_var.clone())
    layer.train(training)
    x = random(5, 6, 3, 7).contiguous(memory_format=memory_format).requires_grad_()
    grad_y = random(5, 6, 3, 7, seed=1)
    inputs = [x, layer.weight, layer.bias, layer.alpha]
    y = layer(x)
    assert y.is_contiguous(memory_format=memory_format)
    got = torch.autograd.grad(y, inputs, grad_y)
    want_y = unitization_images(
        *inputs, norm_divisor=11, norm_scope=norm_scope, mean_c=statistics[0], var_c=statistics[1]
    )
    want_y = want_y.relu() if activation else want_y
    want = torch.autograd.grad(want_y, inputs, grad_y)
    torch.testing.assert_close(y, want_y, rtol=0, atol=1e-10)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=1e-10)
    torch.testing.assert_close(got[3], want[3], rtol=0, atol=1e-10)


def test_output_and_gradients_equal_algorithm_1() -> None:
    layer = moved(Unitization1d(6, dtype=torch.float64))
    x = random(9, 6).requires_grad_()
    inputs = [x, layer.weight, layer.bias, layer.alpha]
    y, want_y = layer(x), unitization_vectors(*inputs)
    torch.testing.assert_close(y, want_y, rtol=0, atol=1e-10)
    got = torch.autograd.grad(y, inputs, random(9, 6, seed=1))
    want = torch.autograd.grad(want_y, inputs, random(9, 6, seed=1))
    for have, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(have, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("norm_scope", "activation", "training"), SETTINGS)
def test_gradcheck(norm_scope: str, activation: str | None, training: bool) -> None:
    layer = Unitization2d(3, norm_divisor=5, norm_scope=norm_scope, activation=activation, dtype=torch.float64)
    layer.train(training)
    parameters = [random(3, seed=s).requires_grad_() for s in (1, 2, 3)]
    x = random(3, 3, 2, 2).requires_grad_()

    def function(x: Tensor, *values: Tensor) -> Tensor:
        names = ("weight", "bias", "alpha")
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_alpha_zero_is_torch_batch_norm(dimensions: int, activation: str | None) -> None:
    kinds = ((Unitization1d, nn.BatchNorm1d), (Unitization2d, nn.BatchNorm2d))[dimensions - 1]
    ours, theirs = kinds[0](4, activation=activation), kinds[1](4)
    nn.init.uniform_(ours.weight)
    theirs.weight.data.copy_(ours.weight)
    shape = (6, 4) if dimensions == 1 else (6, 4, 5, 3)
    for step in range(3):
        x, grad_y = random(*shape, seed=step, dtype=torch.float32) * 2 + 1, random(*shape, seed=9, dtype=torch.float32)
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = ours(inputs[0]), theirs(inputs[1])
        outputs = (outputs[0], outputs[1].relu()) if activation else outputs
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=2e-6)
        for output in outputs:
            output.backward(grad_y)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-6, atol=1e-7)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
    ours.eval(), theirs.eval()
    want = theirs(x).relu() if activation else theirs(x)
    torch.testing.assert_close(ours(x), want, rtol=1e-5, atol=2e-6)


def test_momentum_none_is_the_plain_average() -> None:
    ours, theirs = Unitization2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    for step in range(4):
        x = random(2, 3, 4, 4, seed=step, dtype=torch.float32)
        ours(x), theirs(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_eval_ignores_other_samples() -> None:
    layer = moved(Unitization2d(4, norm_divisor=9)).eval()
    x = random(5, 4, 3, 3, dtype=torch.float32)
    torch.testing.assert_close(layer(x)[2:3], layer(x[2:3]), rtol=0, atol=0)


def test_norm_uses_the_sample_at_hand_in_eval() -> None:
    layer = Unitization2d(2, norm_divisor=4, dtype=torch.float64).eval()
    nn.init.ones_(layer.alpha)
    x = random(3, 2, 2, 2)
    s = (x.square() / (1 + 1e-5)).sum((1, 2, 3), keepdim=True) / (4 * 4)
    torch.testing.assert_close(layer(x), x / (1 + 1e-5) ** 0.5 / (s + 1e-5).sqrt(), rtol=1e-12, atol=0)


def test_norm_divisor_is_fixed_by_the_first_training_batch_and_never_follows_the_input() -> None:
    layer = Unitization2d(2)
    assert layer.norm_divisor.item() == 0 and "norm_divisor=unknown" in repr(layer)
    layer(random(2, 2, 4, 5, dtype=torch.float32))
    assert layer.norm_divisor.item() == 20 and layer.norm_divisor.dtype == torch.int64
    layer(random(2, 2, 8, 8, dtype=torch.float32))
    layer.eval()(random(2, 2, 16, 16, dtype=torch.float32))
    assert layer.norm_divisor.item() == 20 and "norm_divisor=20" in repr(layer)


def test_eval_before_the_norm_divisor_is_known_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="norm divisor.*set_norm_divisors"):
        Unitization2d(2).eval()(torch.zeros(1, 2, 3, 3))


def test_norm_divisor_is_saved_and_loaded() -> None:
    trained, fresh = Unitization2d(2), Unitization2d(2)
    trained(random(2, 2, 4, 4, dtype=torch.float32))
    fresh.load_state_dict(trained.state_dict())
    x = random(1, 2, 7, 7, dtype=torch.float32)
    assert torch.equal(fresh.eval()(x), trained.eval()(x))


def test_norm_divisor_copied_past_load_state_dict_is_seen() -> None:
    average, source = Unitization2d(2), Unitization2d(2)
    source(random(2, 2, 3, 3, dtype=torch.float32))
    with torch.no_grad():
        average.norm_divisor.copy_(source.norm_divisor)  # as an average of weights does with buffers
    average.train()(random(2, 2, 8, 8, dtype=torch.float32))
    assert average.norm_divisor.item() == 9


def test_batch_norm_state_loads_strictly_with_alpha_zero() -> None:
    norm = nn.BatchNorm2d(3)
    norm(random(4, 3, 5, 5, dtype=torch.float32))
    layer = moved(Unitization2d(3, norm_divisor=25))
    state = norm.state_dict()
    layer.load_state_dict(state)
    assert "alpha" not in state
    assert layer.alpha.tolist() == [0.0] * 3 and layer.norm_divisor.item() == 25
    x = random(2, 3, 5, 5, seed=1, dtype=torch.float32)
    torch.testing.assert_close(layer.eval()(x), norm.eval()(x), rtol=1e-5, atol=1e-6)


def test_unitization_state_without_norm_divisor_is_reported() -> None:
    state = Unitization2d(3, norm_divisor=4).state_dict()
    del state["norm_divisor"]
    with pytest.raises(RuntimeError, match='Missing key.*"norm_divisor"'):
        Unitization2d(3).load_state_dict(state)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_statistics_stay_float32_under_casts(cast: str) -> None:
    layer = Unitization2d(3)
    value = torch.tensor([1.0001, 1e-8, 70000.0])
    layer.running_var.copy_(value)
    getattr(layer, cast)()
    assert layer.weight.dtype == layer.alpha.dtype == getattr(torch, cast if cast != "half" else "float16")
    assert layer.running_var.dtype == layer.running_mean.dtype == torch.float32
    assert torch.equal(layer.running_var, value)
    assert layer.double().running_var.dtype == torch.float64
    assert Unitization2d(3, dtype=torch.float16).running_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["float32", "same"])
def test_narrow_input_gives_narrow_output_with_float32_statistics(dtype: torch.dtype, parameters: str) -> None:
    layer = moved(Unitization2d(4, activation="relu"))
    if parameters == "same":
        layer.to(dtype)
    reference = copy.deepcopy(layer).double()
    x = (random(6, 4, 8, 8) * 3 + 2).to(dtype)
    narrow, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y, want = layer(narrow), reference(wide)
    grad_y = random(6, 4, 8, 8, seed=1).to(dtype)
    y.backward(grad_y)
    want.backward(grad_y.double() * (y > 0))
    step = torch.finfo(dtype).eps
    assert y.dtype == narrow.grad.dtype == dtype and layer.weight.grad.dtype == layer.weight.dtype
    assert (y.double() - want).abs().max() < step * want.abs().max()
    assert (narrow.grad.double() - wide.grad).abs().max() < 2 * step * wide.grad.abs().max()
    for name in ("weight", "bias", "alpha"):
        have, wanted = getattr(layer, name).grad.double(), getattr(reference, name).grad
        assert (have - wanted).abs().max() < step * wanted.abs().max(), name


def test_autocast_leaves_the_input_type_as_batch_norm_does() -> None:
    ours, theirs = Unitization2d(3), nn.BatchNorm2d(3)
    for dtype in (torch.float32, torch.bfloat16):
        x = random(2, 3, 4, 4, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == theirs(x).dtype == dtype


def test_float32_is_well_conditioned_where_the_mean_is_a_hundred_deviations() -> None:
    layer = moved(Unitization2d(5, activation="relu"))
    reference = copy.deepcopy(layer).double()
    x = random(6, 5, 9, 9, dtype=torch.float32) + 100
    grad_y = random(6, 5, 9, 9, seed=1)
    have, want = x.clone().requires_grad_(), x.double().requires_grad_()
    y, want_y = layer(have), reference(want)
    y.backward(grad_y.float())
    want_y.backward(grad_y)
    assert (y.double() - want_y).abs().max() / want_y.abs().max() < 2e-5
    assert (have.grad.double() - want.grad).abs().max() / want.grad.abs().max() < 2e-5
    torch.testing.assert_close(layer.running_var.double(), reference.running_var, rtol=1e-6, atol=0)


def test_empty_batch_keeps_running_statistics_and_gives_zero_gradients() -> None:
    layer = moved(Unitization2d(3, norm_divisor=4))
    x = torch.zeros(0, 3, 2, 2, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and layer.weight.grad.tolist() == layer.alpha.grad.tolist() == [0.0] * 3
    assert layer.running_mean.tolist() == [0.0] * 3 and layer.running_var.tolist() == [1.0] * 3


def test_one_value_per_channel_is_an_error_in_training() -> None:
    with pytest.raises(ValueError, match="more than 1 value"):
        Unitization1d(3)(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("layer", "shape"), [(Unitization1d, (2, 3, 4, 4)), (Unitization2d, (2, 3)), (Unitization2d, (2, 4, 3, 3))]
)
def test_wrong_shapes_are_refused(layer: type[nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected .* got"):
        layer(3)(torch.zeros(shape))


@pytest.mark.parametrize("setting", [{"norm_scope": "row"}, {"activation": "gelu"}, {"norm_divisor": 0}])
def test_wrong_settings_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        Unitization2d(3, **setting)


def test_only_x_and_tables_are_kept_for_backward() -> None:
    kept: list[Tensor] = []
    x = random(4, 8, 16, 16, dtype=torch.bfloat16).requires_grad_()
    layer = Unitization2d(8, activation="relu")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    large = [t for t in kept if t.numel() >= x.numel() // 8]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


def test_layer_is_no_batch_norm_and_torch_leaves_it_alone() -> None:
    net = nn.Sequential(Unitization2d(3))
    assert not isinstance(net[0], nn.modules.batchnorm._BatchNorm)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(net)[0]) is Unitization2d


def test_layer_can_be_copied_and_pickled() -> None:
    layer = moved(Unitization2d(3, norm_divisor=4, activation="relu"))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    x = random(2, 3, 2, 2, dtype=torch.float32)
    for other in (copy.deepcopy(layer), torch.load(stream, weights_only=False)):
        assert repr(other) == repr(layer)
        assert torch.equal(other.eval()(x), copy.deepcopy(layer).eval()(x))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_output_may_be_changed_in_place(memory_format: torch.memory_format) -> None:
    layer = moved(Unitization2d(4, norm_divisor=15, dtype=torch.float64))
    x = random(3, 4, 3, 5).contiguous(memory_format=memory_format).requires_grad_()
    grad_y = random(3, 4, 3, 5, seed=1)
    (want,) = torch.autograd.grad(layer(x).relu(), [x], grad_y)
    (have,) = torch.autograd.grad(layer(x).relu_(), [x], grad_y)
    torch.testing.assert_close(have, want, rtol=0, atol=0)
