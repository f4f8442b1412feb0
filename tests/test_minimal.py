"""MinGRU and MinLSTM, held to the paper's equations in NumPy."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from parity import random_lengths, relative_error
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkernels as rk
from rnnkernels.kernels.eager import linear_scan
from rnnkernels.ops import minimal

KINDS = ("MinGRU", "MinLSTM")
NONLINEARITIES = ("positive", "identity", "tanh")


def make(kind, *args, dtype=torch.float64, **kwargs):
    return getattr(rk, kind)(*args, dtype=dtype, **kwargs)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


G = {"positive": lambda x: np.where(x >= 0, x + 0.5, sigmoid(x)), "identity": lambda x: x, "tanh": np.tanh}


def by_the_paper(kind, weight, bias, x, h, nonlinearity):
    """Sections 3.1 and 3.2 of Feng et al., one step after the other: states at every step."""
    parts = np.split(x @ weight.T + bias, 2 if kind == "MinGRU" else 3, axis=-1)
    states = []
    for step in zip(*parts, strict=True):
        if kind == "MinGRU":
            z, candidate = sigmoid(step[0]), G[nonlinearity](step[1])
            h = (1 - z) * h + z * candidate
        else:
            f, i, candidate = sigmoid(step[0]), sigmoid(step[1]), G[nonlinearity](step[2])
            h = f / (f + i) * h + i / (f + i) * candidate
        states.append(h)
    return np.stack(states)


def log_g(x):
    return torch.where(x >= 0, torch.log(torch.relu(x) + 0.5), torch.nn.functional.logsigmoid(x))


def by_the_paper_in_log_space(kind, weight, bias, x, h):
    """Appendix B: the same with positive candidates, all steps at once by sums of logarithms."""
    parts = (x @ weight.T + bias).chunk(2 if kind == "MinGRU" else 3, -1)
    softplus = torch.nn.functional.softplus
    if kind == "MinGRU":
        log_decay, log_input = -softplus(parts[0]), -softplus(-parts[0])
    else:
        difference = softplus(-parts[0]) - softplus(-parts[1])
        log_decay, log_input = -softplus(difference), -softplus(-difference)
    values = torch.cat([h.log().unsqueeze(0), log_input + log_g(parts[-1])])
    products = torch.cat([torch.zeros_like(values[:1]), log_decay.cumsum(0)])
    return (products + torch.logcumsumexp(values - products, 0)).exp()[1:]


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (3, 17, 3, 1), (129, 3, 1, 17), (400, 2, 5, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_equations(kind, size, nonlinearity):
    _, batch, input_size, hidden_size = size
    module = make(kind, input_size, hidden_size, nonlinearity=nonlinearity)
    x, h_0 = torch.randn(size[:3]).double(), torch.randn(1, batch, hidden_size).double()
    output, h_n = module(x, h_0)
    weight, bias = (parameter.detach().numpy() for parameter in module.parameters())
    expected = by_the_paper(kind, weight, bias, x.numpy(), h_0[0].numpy(), nonlinearity)
    torch.testing.assert_close(output.detach(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    assert torch.equal(h_n[0], output[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_log_space_form(kind):
    module = make(kind, 3, 5)
    x, h_0 = torch.randn(50, 2, 3).double(), torch.rand(1, 2, 5).double() + 0.1
    weight, bias = module.parameters()
    expected = by_the_paper_in_log_space(kind, weight, bias, x, h_0[0])
    output, _ = module(x, h_0)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    cotangent = torch.randn_like(output)
    gradients = (torch.autograd.grad(result, (weight, bias), cotangent) for result in (output, expected))
    for actual, right in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("magnitude", [10.0, 100.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_gates_in_float32(kind, magnitude):
    # Gates that open and shut all the way: float64 logarithms are the witness, float32 must neither overflow nor stall.
    exact = make(kind, 4, 6)
    with torch.no_grad():
        exact.weight_ih_l0.mul_(magnitude)
    module = make(kind, 4, 6, dtype=torch.float32)
    module.load_state_dict({name: value.float() for name, value in exact.state_dict().items()})
    exact.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    x, h_0 = torch.randn(2000, 2, 4), torch.rand(1, 2, 6) + 0.1
    output, _ = module(x, h_0)
    expected = by_the_paper_in_log_space(kind, *exact.parameters(), x.double(), h_0[0].double())
    # The arguments of the gates are float32 sums of this magnitude.
    assert relative_error(output.detach(), expected.detach()) < 1e-6 * magnitude
    for gradient in torch.autograd.grad(output.square().mean(), list(module.parameters())):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_that_is_nearly_shut_remembers_in_any_type(kind, dtype):
    # 1 - sigmoid(-9) is 0.99988, which 16 bits round to 1.
    module = make(kind, 1, 1, dtype=dtype, nonlinearity="identity")
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.bias_ih_l0.copy_(torch.tensor([-9.0, 0.0] if kind == "MinGRU" else [0.0, -9.0, 0.0]))
    with torch.no_grad():
        _, h_n = module(torch.zeros(5000, 1, 1, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype))
    z = sigmoid(-9.0)
    left = (1 - z) ** 5000 if kind == "MinGRU" else (0.5 / (0.5 + z)) ** 5000
    assert float(h_n) == pytest.approx(left, rel=5e-3)


@pytest.mark.parametrize("configuration", [{}, {"num_layers": 2}, {"num_layers": 2, "bias": False}])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_gives_the_same(kind, dtype, tolerance, configuration):
    module = make(kind, 3, 5, dtype=dtype, **configuration)
    x = torch.randn(100, 2, 3, dtype=dtype)
    with torch.no_grad():
        output, h_n = module(x)
        state, steps = None, []
        for x_t in x:
            step, state = module(x_t.unsqueeze(0), state)
            steps.append(step)
    assert relative_error(torch.cat(steps), output.double()) <= tolerance
    assert relative_error(state, h_n.double()) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_gradients_too(kind):
    module = make(kind, 3, 2)
    tensors = (torch.randn(1, 2, 3).double().requires_grad_(), torch.randn(1, 2, 2).double().requires_grad_())
    torch.autograd.gradcheck(module, tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("configuration", [{"num_layers": 2, "bidirectional": True}, {"nonlinearity": "tanh"}], ids=str)
def test_gradients_by_finite_differences(kind, configuration):
    module = make(kind, 2, 2, **configuration)
    count = 4 if "num_layers" in configuration else 1
    x, h_0 = torch.randn(5, 2, 2).double().requires_grad_(), torch.randn(count, 2, 2).double().requires_grad_()
    options = {"lengths": torch.tensor([3, 5]), "reset": torch.rand(5, 2) < 0.3}

    def function(x, h_0, *parameters):
        names = [name for name, _ in module.named_parameters()]
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, h_0), options)

    torch.autograd.gradcheck(function, (x, h_0, *module.parameters()))


@pytest.fixture
def fused(monkeypatch):
    """Let the operator that long sequences take run whatever the length."""
    monkeypatch.setattr(minimal, "FUSED_FROM", 0)


def both_ways(kind, nonlinearity, reverse, dtype, size=(150, 3, 2, 5)):
    """Results and gradients of a layer by the operator of one part at a time, and composed of others in float64."""
    sequence_length, batch, input_size, hidden_size = size
    module = make(kind, input_size, hidden_size, nonlinearity=nonlinearity)
    x, h_0 = torch.randn(size[:3]).double(), torch.randn(batch, hidden_size).double()
    tensors = [tensor.detach().to(dtype) for tensor in (x, *module.parameters(), h_0)]
    cotangents = torch.randn(sequence_length, batch, hidden_size).to(dtype), torch.randn(batch, hidden_size).to(dtype)
    outcomes = []
    for function, kept in ((minimal.minimal, dtype), (minimal._composed, torch.float64)):
        leaves = [tensor.to(kept).requires_grad_() for tensor in tensors]
        results = function(*leaves, kind=kind, nonlinearity=nonlinearity, reverse=reverse)
        gradients = torch.autograd.grad(results, leaves, [cotangent.to(kept) for cotangent in cotangents])
        outcomes.append([tensor.detach() for tensor in (*results, *gradients)])
    return outcomes


@pytest.mark.parametrize("elements", [1, 45, 2**20])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_part_at_a_time_gives_the_same(monkeypatch, fused, kind, nonlinearity, reverse, elements):
    monkeypatch.setattr(linear_scan, "IN_CACHE", elements)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        for actual, expected in zip(*both_ways(kind, nonlinearity, reverse, dtype), strict=True):
            assert actual.dtype == dtype
            assert relative_error(actual, expected) <= tolerance


@pytest.mark.parametrize("size", [(2, 1, 1, 1), (3, 17, 1, 3), (129, 1, 17, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_part_at_a_time_takes_any_size(fused, kind, size):
    for actual, expected in zip(*both_ways(kind, "positive", False, torch.float64, size), strict=True):
        assert relative_error(actual, expected) <= 1e-12


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_gradients_by_finite_differences(fused, kind, nonlinearity, reverse):
    rows = 2 * len(("z", "h") if kind == "MinGRU" else ("f", "i", "h"))
    tensors = [torch.randn(shape).double().requires_grad_() for shape in ((4, 2, 3), (rows, 3), (rows,), (2, 2))]
    function = functools.partial(minimal.minimal, kind=kind, nonlinearity=nonlinearity, reverse=reverse)
    torch.autograd.gradcheck(function, tensors)
    torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    rows = 5 * (2 if kind == "MinGRU" else 3)
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((40, 3, 4), (rows, 4), (rows,), (3, 5))]
    torch.library.opcheck(torch.ops.rnnkernels.minimal.default, (*tensors, kind, "tanh", True))
    x, weight, _, h_0 = (tensor.detach() for tensor in tensors)
    saved = torch.randn(40, 3, 5), torch.randn(40, 3, rows), x, weight, h_0
    for needs in ([True, True, True], [False, True, False]):
        arguments = torch.randn(40, 3, 5), torch.randn(3, 5), *saved, kind, "tanh", True, needs
        torch.library.opcheck(torch.ops.rnnkernels.minimal_backward.default, arguments)


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_can_be_asked_for_alone(fused, wanted):
    tensors = [torch.randn(shape) for shape in ((40, 3, 4), (10, 4), (10,), (3, 5))]
    options = {"kind": "MinGRU", "nonlinearity": "positive"}
    every = [tensor.clone().requires_grad_() for tensor in tensors]
    alone = [tensor.clone().requires_grad_(i == wanted) for i, tensor in enumerate(tensors)]
    for leaves in (every, alone):
        minimal.minimal(*leaves, **options)[0].square().sum().backward()
    assert torch.equal(alone[wanted].grad, every[wanted].grad)
    assert all(leaf.grad is None for i, leaf in enumerate(alone) if i != wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_decides_which_way_is_taken(monkeypatch, kind):
    ways = []
    monkeypatch.setattr(minimal, "_composed", lambda *_, **__: ways.append("composed") or (torch.zeros(1),) * 2)
    monkeypatch.setattr(minimal, "FUSED_FROM", 60)
    module = make(kind, 3, 4, dtype=torch.float32)
    x = torch.randn(5, 3, 3)
    module(x)
    assert ways == []
    module(x, lengths=torch.tensor([5, 2, 1]))
    module(x[:4])
    assert len(ways) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_again_and_nothing_in_nothing_out(fused, kind):
    module = make(kind, 3, 4, dtype=torch.float32)
    x = torch.randn(300, 5, 3)
    runs = []
    for _ in range(2):
        output, _ = module(x)
        runs.append((output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    output, h_n = module(x[:, :0])
    assert (output.shape, h_n.shape) == ((300, 0, 4), (1, 0, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_two_directions_are_two_modules(kind):
    both = make(kind, 3, 4, bidirectional=True)
    x, h_0 = torch.randn(30, 2, 3).double(), torch.randn(2, 2, 4).double()
    output, h_n = both(x, h_0)
    for suffix, part, states, order in (("", slice(0, 4), 0, x), ("_reverse", slice(4, 8), 1, x.flip(0))):
        alone = make(kind, 3, 4)
        alone.load_state_dict({name: getattr(both, name + suffix) for name in ("weight_ih_l0", "bias_ih_l0")})
        one, last = alone(order, h_0[states : states + 1])
        torch.testing.assert_close(output[..., part], one.flip(0) if suffix else one)
        torch.testing.assert_close(h_n[states], last[0])


@pytest.mark.parametrize("kind", KINDS)
def test_all_forms_of_a_batch_agree(kind):
    options = {"num_layers": 2, "bidirectional": True}
    module, first = make(kind, 3, 4, **options), make(kind, 3, 4, batch_first=True, **options)
    first.load_state_dict(module.state_dict())
    x, h_0, lengths = torch.randn(20, 3, 3).double(), torch.randn(4, 3, 4).double(), random_lengths(3, 20)
    output, h_n = module(x, h_0, lengths=lengths)
    transposed, last = first(x.transpose(0, 1), h_0, lengths=lengths)
    torch.testing.assert_close((transposed.transpose(0, 1), last), (output, h_n))
    packed, last = module(pack_padded_sequence(x, lengths, enforce_sorted=False), h_0)
    torch.testing.assert_close((pad_packed_sequence(packed, total_length=20)[0], last), (output, h_n))
    for b, length in enumerate(lengths):
        alone, last = module(x[:length, b], h_0[:, b])
        torch.testing.assert_close((alone, last), (output[:length, b], h_n[:, b]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_begins_a_new_sequence(kind):
    module = make(kind, 3, 4, num_layers=2, bidirectional=True)
    x, reset = torch.randn(20, 1, 3).double(), torch.zeros(20, 1, dtype=torch.bool)
    reset[12] = True
    output, _ = module(x, reset=reset)
    torch.testing.assert_close(output, torch.cat([module(x[:12])[0], module(x[12:])[0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_it_survives_what_modules_go_through(kind):
    module = make(kind, 3, 4, num_layers=2, dropout=0.5)
    x = torch.randn(9, 2, 3).double()
    expected = module.eval()(x)[0]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x)[0], expected)
    module.train()
    torch.manual_seed(1)
    dropped = module(x)[0]
    torch.manual_seed(1)
    assert torch.equal(module(x)[0], dropped)
    assert not torch.equal(dropped, expected)
    assert repr(module) == f"{kind}(3, 4, num_layers=2, dropout=0.5)"
    assert [name for name, _ in make(kind, 1, 1, bidirectional=True).named_parameters()] == [
        "weight_ih_l0",
        "bias_ih_l0",
        "weight_ih_l0_reverse",
        "bias_ih_l0_reverse",
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", [0, 2**22])
def test_compiles_without_graph_breaks(monkeypatch, kind, bound):
    monkeypatch.setattr(minimal, "FUSED_FROM", bound)
    module = make(kind, 3, 4, num_layers=2, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for steps in (40, 1):
        x = torch.randn(steps, 2, 3)
        gradients = []
        for each in (module, compiled):
            output, h_n = each(x)
            gradients.append(torch.autograd.grad(output.square().sum() + h_n.sum(), list(module.parameters())))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    module = make(kind, 3, 4, dtype=torch.float32)
    x = torch.randn(40, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = module(x)
    assert output.dtype == h_n.dtype == torch.bfloat16
    assert relative_error(output.detach(), module(x)[0].detach().double()) < 2e-2
    output.float().sum().backward()
    assert module.weight_ih_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_a_memory(kind):
    # The first input decides the last output: gates that begin nearly shut keep it, and learn when to open.
    module, readout = make(kind, 2, 8, dtype=torch.float32), torch.nn.Linear(8, 1)
    with torch.no_grad():
        module.bias_ih_l0[slice(0, 8) if kind == "MinGRU" else slice(8, 16)] = -3
    parameters = [*module.parameters(), *readout.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(60):
        x = torch.randn(20, 32, 2)
        x[..., 1] = 0
        x[0, :, 1] = 1
        loss = (readout(module(x)[0][-1]).squeeze(-1) - x[0, :, 0].sign()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_size": 0}, ValueError, "input_size: expected at least 1, got 0"),
        ({"hidden_size": 2.0}, TypeError, "hidden_size: expected an int, got float"),
        ({"num_layers": 0}, ValueError, "num_layers: expected at least 1, got 0"),
        ({"dropout": 1.5}, ValueError, "dropout: expected a probability"),
        ({"nonlinearity": "relu"}, ValueError, "nonlinearity: expected one of"),
    ],
)
def test_bad_arguments_are_refused_by_name(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(rk, kind)(**{"input_size": 3, "hidden_size": 4, **arguments})


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_refused_by_name(kind):
    module = make(kind, 3, 4)
    x = torch.randn(5, 2, 3).double()
    for arguments, error, message in (
        ((x[..., :2],), RuntimeError, r"input: expected 3 features \(input_size\), got 2"),
        ((x.float(),), ValueError, "input: expected dtype torch.float64"),
        ((x[:0],), RuntimeError, "input: expected at least 1 step"),
        ((x, torch.zeros(2, 2, 4).double()), RuntimeError, r"hx: expected shape \(1, 2, 4\), got \(2, 2, 4\)"),
        (([0.0],), TypeError, "input: expected a Tensor or a PackedSequence, got list"),
    ):
        with pytest.raises(error, match=message):
            module(*arguments)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_the_modules_on_triton(kind, kernel_device):
    module = make(kind, 3, 4, num_layers=2, bidirectional=True, dtype=torch.float32, device=kernel_device)
    x, lengths = torch.randn(12, 2, 3, device=kernel_device), torch.tensor([5, 12])
    reset = torch.rand(12, 2, device=kernel_device) < 0.2
    results = []
    for backend in ("eager", "triton"):
        with rk.use_backend(backend):
            output, h_n = module(x, lengths=lengths, reset=reset)
            gradients = torch.autograd.grad(output.square().sum() + h_n.sum(), list(module.parameters()))
            results.append((output, h_n, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
