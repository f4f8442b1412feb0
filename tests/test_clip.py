"""Clipping against PyTorch's functions and the equations in float64, on both back ends."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import rnnkernels as rk

SIZES = ((17, 129), (3,), (1,), (), (0,), (8192,), (9001,), (2, 3, 5), (1024, 8))


@pytest.fixture(params=["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def place(request):
    """A device, with its back end selected."""
    if request.param == "eager":
        with rk.use_backend("eager"):
            yield torch.device("cpu")
    else:
        device = request.getfixturevalue("kernel_device")
        with rk.use_backend("triton"):
            yield device


def parameters(device, dtype=torch.float32, sizes=SIZES, scale=1.0):
    """Parameters with random gradients, and a copy of both for the other side."""
    own = [torch.nn.Parameter(torch.randn(size, device=device).to(dtype)) for size in sizes]
    other = [torch.nn.Parameter(parameter.detach().clone()) for parameter in own]
    for one, two in zip(own, other, strict=True):
        one.grad = (scale * torch.randn(one.shape, device=device)).to(dtype)
        two.grad = one.grad.clone()
    return own, other


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def gradients(own):
    return [parameter.grad for parameter in own]


# ---------------------------------------------------------------- the norm


@pytest.mark.parametrize("norm_type", [1, 2.0, 3.5, 0, math.inf, "inf", -math.inf])
@pytest.mark.parametrize("max_norm", [0.0, 0.25, 1e6])
def test_norm_is_torchs(place, norm_type, max_norm):
    sizes = [size for size in SIZES if 0 not in size] if norm_type in (math.inf, "inf", -math.inf) else SIZES
    own, other = parameters(place, sizes=sizes)
    total = rk.clip_grad_norm_(own, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(other, max_norm, norm_type)
    assert (total.shape, total.dtype, total.device) == (expected.shape, expected.dtype, expected.device)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(own), gradients(other), rtol=2e-6, atol=1e-30)


def test_norm_of_float64_and_of_the_specification():
    own, _ = parameters("cpu", torch.float64)
    before = flat(gradients(own))
    total = rk.clip_grad_norm_(own, 0.5)
    torch.testing.assert_close(total, before.square().sum().sqrt(), rtol=1e-14, atol=0)
    torch.testing.assert_close(flat(gradients(own)), before * 0.5 / (total + 1e-6), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_of_16_bit_gradients(place, dtype):
    own, _ = parameters(place, dtype)
    before = flat(gradients(own))
    total = rk.clip_grad_norm_(own, 1.0)
    assert total.dtype == dtype
    resolution = torch.finfo(dtype).eps
    torch.testing.assert_close(total.double(), before.norm(), rtol=2 * resolution, atol=0)
    torch.testing.assert_close(flat(gradients(own)), before / before.norm(), rtol=4 * resolution, atol=1e-6)


def test_norm_over_several_types(place):
    own, other = parameters(place)
    for parameter in (*own[::2], *other[::2]):
        gradient, parameter.grad = parameter.grad.half(), None
        parameter.data, parameter.grad = parameter.data.half(), gradient
    total = rk.clip_grad_norm_(own, 1.0)
    assert total.dtype == torch.float32
    exact = flat(gradients(other))
    torch.testing.assert_close(total.double(), exact.norm(), rtol=1e-3, atol=0)
    torch.testing.assert_close(flat(gradients(own)), exact / exact.norm(), rtol=2e-3, atol=1e-5)


def test_the_norm_of_16_bit_gradients_does_not_overflow_on_a_gpu(kernel_device):
    weight = torch.nn.Parameter(torch.zeros(10_000, dtype=torch.float16, device=kernel_device))
    weight.grad = torch.full_like(weight, 1000.0)  # a norm of 1e5, beyond float16
    with rk.use_backend("triton"):
        assert torch.isinf(rk.clip_grad_norm_(weight, 1.0))
    torch.testing.assert_close(weight.grad.float(), torch.full_like(weight, 0.01).float(), rtol=1e-2, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_nonfinite_gradients(place, wrong, norm_type):
    own, other = parameters(place, sizes=((3,), (9000,)))
    for parameter in (own[1], other[1]):
        parameter.grad[8999] = wrong
    before = [gradient.clone() for gradient in gradients(own)]
    with pytest.raises(RuntimeError, match="error_if_nonfinite=False"):
        rk.clip_grad_norm_(own, 1.0, norm_type, error_if_nonfinite=True)
    torch.testing.assert_close(gradients(own), before, rtol=0, atol=0, equal_nan=True)
    total = rk.clip_grad_norm_(own, 1.0, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(other, 1.0, norm_type)
    torch.testing.assert_close(total, expected, equal_nan=True)
    torch.testing.assert_close(gradients(own), gradients(other), equal_nan=True)


def test_no_gradient_at_all(place):
    weight = torch.nn.Parameter(torch.zeros(3, device=place))
    total = rk.clip_grad_norm_([weight], 1.0)
    assert (float(total), total.dtype) == (0.0, torch.float32)
    rk.clip_grad_value_([weight], 1.0)
    rk.adaptive_grad_clip_([weight])
    rk.clip_weight_value_([], 1.0)
    assert weight.grad is None
    with pytest.warns(UserWarning, match="the generator is empty"):
        rk.clip_grad_norm_((parameter for parameter in ()), 1.0)
    weight.grad = torch.zeros(3, device=place)
    assert float(rk.clip_grad_norm_(weight, 1.0)) == 0.0


def test_gradients_of_any_layout(place):
    """Transposed, with gaps, expanded, and not at a 16-byte boundary."""
    layouts = [
        torch.randn(7, 5, device=place).t(),
        torch.randn(9, 8, device=place)[:, ::2],
        torch.randn(4001, device=place)[1:],
    ]
    for layout in layouts:
        own, other = (torch.nn.Parameter(torch.zeros_like(layout)) for _ in range(2))
        own.grad, other.grad = layout, layout.clone()
        total = rk.clip_grad_norm_([own], 0.5)
        expected = torch.nn.utils.clip_grad_norm_([other], 0.5)
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(own.grad, other.grad, rtol=2e-6, atol=1e-30)
        rk.clip_grad_value_([own], 0.01)
        rk.adaptive_grad_clip_([own], 0.01)
        assert float(own.grad.abs().max()) <= 0.01


@pytest.mark.parametrize("foreach", [True, False])
def test_foreach_as_in_torch(foreach):
    own, other = parameters("cpu")
    total = rk.clip_grad_norm_(own, 0.25, foreach=foreach)
    assert torch.equal(total, torch.nn.utils.clip_grad_norm_(other, 0.25, foreach=foreach))
    rk.clip_grad_value_(own, 1e-3, foreach=foreach)
    torch.nn.utils.clip_grad_value_(other, 1e-3, foreach=foreach)
    assert torch.equal(flat(gradients(own)), flat(gradients(other)))


def test_same_bits_again(place):
    own, other = parameters(place, sizes=((30_001,), (5,)))
    assert torch.equal(rk.clip_grad_norm_(own, 1.0), rk.clip_grad_norm_(other, 1.0))
    assert torch.equal(flat(gradients(own)), flat(gradients(other)))


def test_a_gradient_that_needs_no_clipping_keeps_its_bits(place):
    own, other = parameters(place)
    rk.clip_grad_norm_(own, 1e6)
    assert torch.equal(flat(gradients(own)), flat(gradients(other)))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_torchs(place, dtype):
    own, other = parameters(place, dtype, sizes=(*SIZES, (20_000,)))
    for parameter in (own[0], other[0]):
        parameter.grad[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    rk.clip_grad_value_(own, 0.5)
    torch.nn.utils.clip_grad_value_(other, 0.5)
    torch.testing.assert_close(gradients(own), gradients(other), rtol=0, atol=0, equal_nan=True)


def test_weights_not_gradients_are_clipped(place):
    own, other = parameters(place, sizes=(*SIZES, (20_000,)))
    rk.clip_weight_value_(own, 0.01)
    assert torch.equal(flat(own), flat(other).clamp(-0.01, 0.01).float().double())
    assert torch.equal(flat(gradients(own)), flat(gradients(other)))
    assert all(parameter.requires_grad for parameter in own)


def test_autograd_notices_that_weights_have_changed(place):
    weight = torch.nn.Parameter(torch.ones(3, device=place))
    loss = (weight * weight).sum()
    rk.clip_weight_value_(weight, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------- units


def by_rows(weight, gradient, clip_factor, eps):
    """The equation, unit by unit, in float64."""
    weight, gradient = weight.detach().double(), gradient.double()
    if weight.dim() < 2:
        weight, gradient = weight.reshape(1, -1), gradient.reshape(1, -1)
    clipped = []
    for row, grad in zip(weight, gradient, strict=True):
        largest = clip_factor * max(float(row.norm()), eps)
        clipped.append(grad * min(1.0, largest / float(grad.norm())) if float(grad.norm()) > 0 else grad)
    return torch.stack(clipped) if clipped else gradient


@hypothesis.settings(
    max_examples=15, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)
@hypothesis.given(
    sizes=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 9), st.integers(1, 40)),
            st.tuples(st.sampled_from([1, 3, 17, 129, 1025])),
            st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
            st.just(()),
        ),
        min_size=1,
        max_size=4,
    ),
    clip_factor=st.sampled_from([0.0, 0.01, 0.3, 10.0]),
    eps=st.sampled_from([0.0, 1e-3, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_units_follow_the_equation(place, sizes, clip_factor, eps, dtype):
    own, other = parameters(place, dtype, sizes)
    own[0].data.zero_()
    other[0].data.zero_()
    rk.adaptive_grad_clip_(own, clip_factor, eps)
    tolerance = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for parameter, before in zip(own, other, strict=True):
        expected = by_rows(before, before.grad, clip_factor, eps).reshape(parameter.shape)
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=tolerance, atol=1e-7)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_units_with_nan_and_infinity(place):
    weight = torch.nn.Parameter(torch.ones(3, 2, device=place))
    weight.grad = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [3.0, 4.0]], device=place)
    rk.adaptive_grad_clip_(weight, 0.1)
    expected = torch.tensor([[math.nan, 1.0], [math.nan, 0.0], [0.6 * 0.02**0.5, 0.8 * 0.02**0.5]], device=place)
    torch.testing.assert_close(weight.grad, expected, equal_nan=True)


# ---------------------------------------------------------------- what else


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: rk.clip_grad_norm_(w, -1.0), "max_norm: expected 0 or more, got -1.0"),
        (lambda w: rk.clip_grad_norm_(w, math.nan), "max_norm: expected 0 or more, got nan"),
        (lambda w: rk.clip_grad_value_(w, -1.0), "clip_value: expected 0 or more"),
        (lambda w: rk.clip_weight_value_(w, -1.0), "clip_value: expected 0 or more"),
        (lambda w: rk.adaptive_grad_clip_(w, -1.0), "clip_factor: expected 0 or more"),
        (lambda w: rk.adaptive_grad_clip_(w, eps=-1.0), "eps: expected 0 or more"),
        (lambda w: rk.clip_grad_norm_([w, 3], 1.0), "parameters: expected Tensors, got int"),
    ],
)
def test_bad_arguments(call, message):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises((TypeError, ValueError), match=message):
        call(weight)
    assert torch.equal(weight.grad, torch.ones(2))


def test_compiles_as_torchs_does():
    own, other = parameters("cpu")
    compiled = torch.compile(lambda tensors: rk.clip_grad_norm_(tensors, 0.25), backend="eager")
    torch.testing.assert_close(compiled(own), torch.nn.utils.clip_grad_norm_(other, 0.25))
    torch.testing.assert_close(gradients(own), gradients(other))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without distributed")
def test_sharded_parameters():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = torch.randn(6, 4)
        weight = torch.nn.Parameter(distribute_tensor(torch.zeros(6, 4), mesh, [Shard(0)]))
        weight.grad = distribute_tensor(whole, mesh, [Shard(0)])
        total = rk.clip_grad_norm_([weight], 1.0)
        torch.testing.assert_close(total.full_tensor(), whole.norm())
        torch.testing.assert_close(weight.grad.full_tensor(), whole / whole.norm(), rtol=1e-5, atol=1e-6)
        rk.clip_grad_value_([weight], 0.01)
        assert float(weight.grad.full_tensor().abs().max()) <= 0.01
        rk.optim.AdamW([weight], lr=0.1, max_norm=0.001).step()
        rk.clip_weight_value_([weight], 0.05)
        torch.testing.assert_close(weight.full_tensor(), torch.full_like(whole, 0.05) * -whole.sign())
        with pytest.raises(TypeError, match="a shard does not know the norm of its rows"):
            rk.adaptive_grad_clip_([weight])
    finally:
        torch.distributed.destroy_process_group()
