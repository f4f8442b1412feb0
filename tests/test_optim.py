"""The optimizers against PyTorch's in float64 and float32, step after step, on both back ends."""

import copy
import inspect
import io
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import rnnkernels as rk

SIZES = ((3, 17), (129,), (1,), (), (0,), (1025, 9))
NAMES = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")
STEPS = 200


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


def parameters(device="cpu", dtype=torch.float32, sizes=SIZES):
    return [torch.nn.Parameter(torch.randn(size, device=device).to(dtype)) for size in sizes]


def copied(params, dtype=None):
    return [torch.nn.Parameter(param.detach().clone().to(dtype or param.dtype)) for param in params]


def give_gradients(*sides, sparsity=0.0):
    """The same random gradients to all sides; some have none in this step, but never the first."""
    for number, params in enumerate(zip(*sides, strict=True)):
        missing = number > 0 and float(torch.rand(())) < sparsity
        scale = 10 ** float(torch.randn(()))
        gradient = scale * torch.randn(params[0].shape, device=params[0].device)
        for param in params:
            param.grad = None if missing else gradient.to(params[0].dtype).to(param.dtype, copy=True)


def largest_error(own, exact):
    """Of any parameter, relative to the largest of its tensor."""
    errors = [0.0]
    for one, other in zip(own, exact, strict=True):
        if one.numel():
            one, other = one.detach().double(), other.detach().double()
            errors.append(float((one - other).abs().max() / other.abs().max().clamp_min(1e-3)))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


COMMON = {"lr": st.sampled_from([1e-3, 0.05]), "weight_decay": st.sampled_from([0, 0.1]), "maximize": st.booleans()}
OPTIONS = {
    "SGD": st.fixed_dictionaries(
        {
            **COMMON,
            "momentum": st.sampled_from([0, 0.9]),
            "dampening": st.sampled_from([0, 0.5]),
            "nesterov": st.booleans(),
        }
    ),
    "Adagrad": st.fixed_dictionaries(
        {**COMMON, "lr_decay": st.sampled_from([0, 0.1]), "initial_accumulator_value": st.sampled_from([0, 0.5])}
    ),
    "RMSprop": st.fixed_dictionaries(
        {
            **COMMON,
            "alpha": st.sampled_from([0.5, 0.99]),
            "momentum": st.sampled_from([0, 0.9]),
            "centered": st.booleans(),
        }
    ),
    "Adam": st.fixed_dictionaries(
        {**COMMON, "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)]), "amsgrad": st.booleans()}
    ),
}
OPTIONS["AdamW"] = OPTIONS["Adam"]
# With neighbours of opposite sign the variance of "centered" cancels: eps decides how much of the rounding shows.
FIXED = {"SGD": {}, "Adagrad": {"eps": 1e-6}, "RMSprop": {"eps": 1e-2}, "Adam": {"eps": 1e-6}, "AdamW": {"eps": 1e-6}}


def checked(name, options):
    if name == "SGD" and options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
        return {**options, "nesterov": False}
    return options


@hypothesis.settings(
    max_examples=12, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)
@hypothesis.given(data=st.data())
@pytest.mark.parametrize("name", NAMES)
def test_every_option_and_group_as_in_torch(place, name, data):
    """Few steps, many options: two groups, the second with another learning rate, parameters without gradients."""
    options = {**FIXED[name], **checked(name, data.draw(OPTIONS[name]))}
    torch.manual_seed(data.draw(st.integers(0, 3)))
    own = parameters(place, sizes=SIZES[:5])
    other, exact = copied(own), copied(own, torch.float64)

    def optimizer(module, params):
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}]
        return getattr(module, name)(groups, **options)

    tested, torchs, reference = (
        optimizer(rk.optim, own),
        optimizer(torch.optim, other),
        optimizer(torch.optim, exact),
    )
    for _ in range(4):
        give_gradients(own, other, exact, sparsity=0.3)
        for each in (tested, torchs, reference):
            each.step()
    assert largest_error(own, exact) <= 2e-6 + 4 * largest_error(other, exact)


SETTINGS = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("Adagrad", {"lr_decay": 0.01}),
    ("RMSprop", {"eps": 1e-3}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "eps": 1e-1}),
    ("Adam", {"weight_decay": 0.01}),
    ("AdamW", {"amsgrad": True}),
]


@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_two_hundred_steps_stay_near_torchs(place, name, options):
    own = parameters(place, sizes=((3, 17),))
    other, exact = copied(own), copied(own, torch.float64)
    modules = (rk.optim, torch.optim, torch.optim)
    optimizers = [
        getattr(module, name)(side, lr=0.01, **options)
        for module, side in zip(modules, (own, other, exact), strict=True)
    ]
    for _ in range(STEPS):
        give_gradients(own, other, exact)
        for optimizer in optimizers:
            optimizer.step()
    assert largest_error(own, exact) <= 2e-6 + 4 * largest_error(other, exact)
    torch.testing.assert_close(own, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_16_bit_parameters(place, name, options, dtype):
    """Rounded at each step: held to a float64 run from the same state, one step at a time."""
    own = parameters(place, dtype, sizes=((3, 17), (129,)))
    optimizer = getattr(rk.optim, name)(own, lr=0.01, **options)
    resolution = torch.finfo(dtype).eps
    for _ in range(5):
        exact = copied(own, torch.float64)
        reference = getattr(torch.optim, name)(exact, lr=0.01, **options)
        # Sizes that neither overflow when squared nor vanish, and a square that is not lost beside the last one.
        for param, twin in zip(own, exact, strict=True):
            param.grad = (torch.randn_like(param).sign() * (0.5 + torch.rand_like(param))).to(dtype)
            twin.grad = param.grad.double()
        state = copy.deepcopy(optimizer.state_dict())
        if state["state"]:
            reference.load_state_dict(state)
        optimizer.step()
        reference.step()
        for param, twin in zip(own, exact, strict=True):
            torch.testing.assert_close(param.double(), twin.detach(), rtol=4 * resolution, atol=8 * resolution * 0.05)


# ---------------------------------------------------------------- state


@pytest.mark.parametrize(("name", "options"), SETTINGS)
@pytest.mark.parametrize("towards", ["torch", "rnnkernels"])
def test_state_is_exchangeable(place, name, options, towards):
    first, second = (rk.optim, torch.optim) if towards == "torch" else (torch.optim, rk.optim)
    params = parameters(place)
    begin, straight = getattr(first, name)(params, **options), copied(params)
    onward = getattr(first, name)(straight, **options)
    for _ in range(3):
        give_gradients(params, straight)
        begin.step()
        onward.step()
    stream = io.BytesIO()
    torch.save(begin.state_dict(), stream)
    stream.seek(0)
    own = copied(params)
    resumed = getattr(second, name)(own, **options)
    resumed.load_state_dict(torch.load(stream))
    for _ in range(3):
        give_gradients(own, straight)
        resumed.step()
        onward.step()
    assert largest_error(own, straight) < 1e-5
    states = resumed.state_dict()["state"], onward.state_dict()["state"]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][key].keys() == states[1][key].keys() for key in states[0])


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_torchs_and_two_more(name):
    own = inspect.signature(getattr(rk.optim, name)).parameters
    torchs = inspect.signature(getattr(torch.optim, name)).parameters
    added = ("max_norm", "norm_type")
    assert [key for key in own if key not in added] == list(torchs)
    for key, parameter in torchs.items():
        assert (own[key].default, own[key].kind) == (parameter.default, parameter.kind)
    assert all(own[key].kind is inspect.Parameter.KEYWORD_ONLY for key in added)
    assert issubclass(getattr(rk.optim, name), getattr(torch.optim, name))


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(place, name):
    params = parameters(place)
    optimizer = getattr(rk.optim, name)(params, max_norm=0.5)
    give_gradients(params)
    optimizer.step()
    again = copy.deepcopy(optimizer)
    assert again.max_norm == 0.5
    again.step()


# ---------------------------------------------------------------- clipping within the step


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 3.0])
def test_clipping_within_the_step(place, name, norm_type):
    own = parameters(place, sizes=((3, 17), (129,), (9000,)))
    other = copied(own)
    optimizer = getattr(rk.optim, name)(
        [{"params": own[:1]}, {"params": own[1:], "lr": 1e-3}], lr=0.1, max_norm=0.7, norm_type=norm_type
    )
    torchs = getattr(torch.optim, name)([{"params": other[:1]}, {"params": other[1:], "lr": 1e-3}], lr=0.1)
    for _ in range(4):
        give_gradients(own, other)
        optimizer.step()
        expected = torch.nn.utils.clip_grad_norm_(other, 0.7, norm_type)
        torchs.step()
        torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-6, atol=0)
    assert largest_error(own, other) < 1e-5


def test_clipping_leaves_the_options_of_a_checkpoint_alone():
    params = parameters()
    optimizer = rk.optim.SGD(params, max_norm=1.0)
    optimizer.load_state_dict(torch.optim.SGD(copied(params), lr=0.5).state_dict())
    assert (optimizer.max_norm, optimizer.param_groups[0]["lr"]) == (1.0, 0.5)
    assert "max_norm" not in optimizer.state_dict()["param_groups"][0]


# ---------------------------------------------------------------- how it is used


def test_closure_hooks_and_schedulers(place):
    own = parameters(place, sizes=((3, 4),))
    other = copied(own)
    tested, torchs = rk.optim.SGD(own, lr=0.1, momentum=0.9), torch.optim.SGD(other, lr=0.1, momentum=0.9)
    calls = []
    tested.register_step_pre_hook(lambda *_: calls.append("before"))
    tested.register_step_post_hook(lambda *_: calls.append("after"))
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(each, 0.2, total_steps=12) for each in (tested, torchs)]
    for _ in range(12):
        for params, optimizer, scheduler in zip((own, other), (tested, torchs), schedulers, strict=True):

            def closure(params=params, optimizer=optimizer):
                optimizer.zero_grad()
                loss = (params[0] - 3).square().sum()
                loss.backward()
                return loss

            assert optimizer.step(closure).requires_grad
            if scheduler.last_epoch < 11:
                scheduler.step()
    assert calls == ["before", "after"] * 12
    torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name", NAMES)
def test_learning_rate_as_a_tensor(place, name):
    own = parameters(place, sizes=((3, 17), (9000,)))
    other = copied(own)
    lr = torch.tensor(0.05)
    tested, torchs = getattr(rk.optim, name)(own, lr=lr), getattr(torch.optim, name)(other, lr=0.05)
    for rate in (0.05, 0.01):
        lr.fill_(rate)
        torchs.param_groups[0]["lr"] = rate
        give_gradients(own, other)
        tested.step()
        torchs.step()
    assert largest_error(own, other) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_learning_rate_on_the_gpu(kernel_device, name, monkeypatch):
    """The kernel reads it from there, so that a graph follows a scheduler."""
    from rnnkernels.kernels.triton import multi_tensor

    own, state = parameters(kernel_device, sizes=((129,),)), {}
    expected = copied(own)
    give_gradients(own, expected)
    getattr(torch.optim, name)(expected, lr=0.05).step()
    step = multi_tensor.step
    monkeypatch.setattr(multi_tensor, "step", lambda *a, lr, **k: step(*a, lr=state["lr"], **k))
    state["lr"] = torch.tensor(0.05, device=kernel_device)
    with rk.use_backend("triton"):
        getattr(rk.optim, name)(own, lr=1e6).step()
    assert largest_error(own, expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_sparse_gradients_are_refused(place, name):
    embedding = torch.nn.Embedding(5, 3, sparse=True, device=place)
    embedding(torch.tensor([1, 2], device=place)).sum().backward()
    with pytest.raises(RuntimeError, match=f"{name}: expected dense gradients, got a sparse one"):
        getattr(rk.optim, name)(embedding.parameters()).step()


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_layouts(place, name, gaps):
    """Transposed, off a 16-byte boundary, with gaps; gradients strided otherwise than their parameters."""
    base = torch.randn(7, 5, device=place)
    own = [
        torch.nn.Parameter(base.t()),
        torch.nn.Parameter(torch.randn(4001, device=place)[1:]),
        torch.nn.Parameter(torch.randn(6, 4, device=place)),
    ]
    if gaps:  # the kernels leave such a group to PyTorch
        own.append(torch.nn.Parameter(torch.randn(9, 8, device=place)[:, ::2]))
    other = [torch.nn.Parameter(param.detach().clone()) for param in own]
    tested, torchs = getattr(rk.optim, name)(own, lr=0.1), getattr(torch.optim, name)(other, lr=0.1)
    for _ in range(3):
        for one, two in zip(own, other, strict=True):
            one.grad = torch.randn(one.shape[::-1], device=place).permute(*range(one.dim())[::-1])
            two.grad = one.grad.clone()
        tested.step()
        torchs.step()
    assert largest_error(own, other) < 1e-5
    assert own[0].data_ptr() == base.data_ptr()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"differentiable": True}, {"fused": True}])
def test_torchs_implementations_on_request(name, options):
    if name == "RMSprop" and "fused" in options:
        pytest.skip("PyTorch has none")
    own = parameters()
    other = copied(own)
    if "differentiable" in options:  # PyTorch does not take leaves that need gradients
        own, other = ([param.detach() for param in side] for side in (own, other))
    tested, torchs = getattr(rk.optim, name)(own, **options), getattr(torch.optim, name)(other, **options)
    for _ in range(3):
        give_gradients(own, other)
        tested.step()
        torchs.step()
    assert all(torch.equal(one, two) for one, two in zip(own, other, strict=True))


def test_complex_and_float64_parameters():
    own = [torch.nn.Parameter(torch.randn(4, dtype=torch.complex64)), torch.nn.Parameter(torch.randn(3).double())]
    other = copied(own)
    for name in NAMES[1:]:
        tested, torchs = getattr(rk.optim, name)(own), getattr(torch.optim, name)(other)
        for one, two in zip(own, other, strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        tested.step()
        torchs.step()
    torch.testing.assert_close(own, other)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("name", NAMES)
def test_nonfinite_gradients_spread_as_in_torch(place, name):
    own = parameters(place, sizes=((5,),))
    other = copied(own)
    tested, torchs = getattr(rk.optim, name)(own), getattr(torch.optim, name)(other)
    for gradient in ([1.0, math.nan, math.inf, -math.inf, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]):
        for params, optimizer in ((own, tested), (other, torchs)):
            params[0].grad = torch.tensor(gradient, device=place)
            optimizer.step()
    torch.testing.assert_close(own, other, equal_nan=True)


def test_autograd_notices_a_step(place):
    weight = torch.nn.Parameter(torch.ones(3, device=place))
    loss = (weight * weight).sum()
    weight.grad = torch.ones_like(weight)
    rk.optim.Adam([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_scaler(place):
    """Skips a step with an overflow, and unscales the others, clipping included."""
    own = parameters(place, sizes=((3, 4),))
    other = copied(own)
    tested, torchs = rk.optim.Adam(own, lr=0.1, max_norm=0.5), torch.optim.Adam(other, lr=0.1)
    scaler = torch.amp.GradScaler(place.type, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=place))
    for value in (1.0, math.inf, 2.0):
        own[0].grad = torch.full_like(own[0], 1024.0 * value)
        scale = scaler.get_scale()
        own[0].grad.mul_(scale / 1024.0)
        scaler.step(tested)
        scaler.update()
        if math.isfinite(value):
            other[0].grad = torch.full_like(other[0], value)
            torch.nn.utils.clip_grad_norm_(other, 0.5)
            torchs.step()
    assert scaler.get_scale() == 512.0
    torch.testing.assert_close(own, other)


def test_bad_arguments():
    with pytest.raises(ValueError, match="max_norm: expected 0 or more"):
        rk.optim.SGD(parameters(), max_norm=-1.0)
    with pytest.raises(ValueError, match="fused: expected None together with max_norm"):
        rk.optim.Adam(parameters(), fused=True, max_norm=1.0)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        rk.optim.Adam(parameters(), lr=-1.0)


def test_compiles_as_torchs_does():
    own = parameters(sizes=((3, 4), (5,)))
    other = copied(own)
    tested, torchs = rk.optim.AdamW(own, max_norm=0.5), torch.optim.AdamW(other)
    step = torch.compile(tested.step, backend="eager")
    for _ in range(3):
        give_gradients(own, other)
        step()
        torch.nn.utils.clip_grad_norm_(other, 0.5)
        torchs.step()
    torch.testing.assert_close(own, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_captured_in_a_graph(name):
    own = parameters("cuda", sizes=((300, 40), (17,)))
    other = copied(own)
    tested, torchs = getattr(rk.optim, name)(own, max_norm=0.5), getattr(torch.optim, name)(other)
    for param in own:
        param.grad = torch.zeros_like(param)

    def both(step):
        for one, two in zip(own, other, strict=True):
            one.grad.normal_()
            two.grad = one.grad.clone()
        step()
        torch.nn.utils.clip_grad_norm_(other, 0.5)
        torchs.step()

    both(tested.step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tested.step()
    for _ in range(4):
        both(graph.replay)
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
