"""init.py: distributions by statistical tests, matrices by their singular values and eigenvalues, layouts by torch."""

import copy
import math

import pytest
import torch
from scipy import stats

import rnnkernels as rk
from rnnkernels import init

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MODULES = {
    "rk.RNN": (lambda **o: rk.RNN(3, 16, **o), 1),
    "rk.GRU": (lambda **o: rk.GRU(3, 16, **o), 3),
    "rk.LSTM": (lambda **o: rk.LSTM(3, 16, **o), 4),
    "torch.nn.RNN": (lambda **o: torch.nn.RNN(3, 16, **o), 1),
    "torch.nn.GRU": (lambda **o: torch.nn.GRU(3, 16, **o), 3),
    "torch.nn.LSTM": (lambda **o: torch.nn.LSTM(3, 16, **o), 4),
}
CELLS = {
    "rk.RNNCell": (rk.RNNCell, 1),
    "rk.GRUCell": (rk.GRUCell, 3),
    "rk.LSTMCell": (rk.LSTMCell, 4),
    "torch.nn.RNNCell": (torch.nn.RNNCell, 1),
    "torch.nn.GRUCell": (torch.nn.GRUCell, 3),
    "torch.nn.LSTMCell": (torch.nn.LSTMCell, 4),
}


@pytest.fixture(params=MODULES)
def layered(request):
    make, gates = MODULES[request.param]
    return make(num_layers=2, bidirectional=True), gates


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def singular_values(weight, gates):
    return torch.linalg.svdvals(weight.detach().double().unflatten(0, (gates, -1)))


def gate_sum(module, gates, gate, layer=0):
    total = module.state_dict()[f"bias_ih_l{layer}"] + module.state_dict()[f"bias_hh_l{layer}"]
    return total.chunk(gates)[gate]


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(17, 17), (17, 5), (5, 17), (1, 1)])
@pytest.mark.parametrize("gates", [1, 3, 4])
def test_orthogonal_blocks_have_equal_singular_values(dtype, rows, columns, gates):
    weight = torch.empty(gates * rows, columns, dtype=dtype)
    assert init.orthogonal_(weight, 0.7, gates=gates, generator=generator()) is weight
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    expected = torch.full((gates, min(rows, columns)), 0.7, dtype=torch.float64)
    torch.testing.assert_close(singular_values(weight, gates), expected, rtol=tolerance, atol=0)


def test_orthogonal_is_uniform_over_orthogonal_matrices():
    """By symmetry every entry has mean 0 and variance 1/H, and both signs of the determinant are as likely."""
    draws = torch.stack([init.orthogonal_(torch.empty(3, 3), generator=generator(s)) for s in range(4000)])
    assert draws.mean(0).abs().max() < 5 / math.sqrt(3 * 4000)
    assert (draws.square().mean(0) - 1 / 3).abs().max() < 5 * math.sqrt(
        4 / 45 / 4000
    )  # the variance of a squared entry
    assert stats.binomtest(int((torch.linalg.det(draws) > 0).sum()), 4000).pvalue > 1e-4


def test_orthogonal_gates_differ():
    a, b = init.orthogonal_(torch.empty(10, 5), gates=2).chunk(2)
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity(dtype):
    weight = init.identity_(torch.empty(12, 4, dtype=dtype), 0.5, gates=3)
    torch.testing.assert_close(weight, torch.eye(4, dtype=dtype).mul(0.5).repeat(3, 1), rtol=0, atol=0)


FILLS = {
    "xavier_uniform_": (
        init.xavier_uniform_,
        {"gain": 0.5},
        lambda r, c: stats.uniform(-(b := 0.5 * (6 / (r + c)) ** 0.5), 2 * b),
    ),
    "xavier_normal_": (init.xavier_normal_, {"gain": 0.5}, lambda r, c: stats.norm(0, 0.5 * (2 / (r + c)) ** 0.5)),
    "kaiming_uniform_": (init.kaiming_uniform_, {}, lambda r, c: stats.uniform(-(b := (6 / c) ** 0.5), 2 * b)),
    "kaiming_normal_": (init.kaiming_normal_, {}, lambda r, c: stats.norm(0, (2 / c) ** 0.5)),
    "kaiming_normal_ out": (init.kaiming_normal_, {"mode": "fan_out"}, lambda r, c: stats.norm(0, (2 / r) ** 0.5)),
    "kaiming_uniform_ tanh": (
        init.kaiming_uniform_,
        {"nonlinearity": "tanh"},
        lambda r, c: stats.uniform(-(b := 5 / 3 * (3 / c) ** 0.5), 2 * b),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FILLS)
@pytest.mark.parametrize("gates", [1, 4])
def test_law_of_the_entries(name, dtype, gates):
    fill, options, law = FILLS[name]
    weight = torch.empty(gates * 129, 17, dtype=dtype)
    assert fill(weight, gates=gates, generator=generator(), **options) is weight
    for block in weight.chunk(gates):
        assert stats.kstest(block.double().flatten().numpy(), law(129, 17).cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", FILLS)
def test_a_generator_decides_the_numbers(name):
    fill, options, _ = FILLS[name]
    first, second, third = (fill(torch.empty(6, 5), generator=generator(s), **options) for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "gates"), [(1, 1), (17, 1), (17, 3), (64, 4)])
def test_spectral_radius(dtype, size, gates):
    weight = torch.randn(gates * size, size).to(dtype)
    before = weight.clone()
    assert init.spectral_radius_(weight, 1.3, gates=gates) is weight
    radii = torch.linalg.eigvals(weight.double().unflatten(0, (gates, -1))).abs().amax(-1)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 20 * torch.finfo(dtype).eps)
    torch.testing.assert_close(radii, torch.full_like(radii, 1.3), rtol=tolerance, atol=0)
    for block, old in zip(weight.double().chunk(gates), before.double().chunk(gates), strict=True):
        cosine = (block * old).sum() / (block.norm() * old.norm())
        assert abs(cosine - 1) < 1e-4


# ---------------------------------------------------------------- biases


@pytest.mark.parametrize("kind", ["torch.nn.LSTM", "torch.nn.GRU", "rk.GRU", "rk.LSTM"])
def test_forget_gate_bias_sets_the_sum_and_nothing_else(kind):
    make, gates = MODULES[kind]
    module = make(num_layers=2, bidirectional=True)
    before = copy.deepcopy(module)
    assert init.forget_gate_bias_(module, 2.5) is module
    for (name, parameter), old in zip(module.named_parameters(), before.parameters(), strict=True):
        for gate, (rows, old_rows) in enumerate(zip(parameter.chunk(gates), old.chunk(gates), strict=True)):
            if gate == 1 and name.startswith("bias"):
                assert (rows == (2.5 if name.startswith("bias_ih") else 0)).all()
            else:
                assert torch.equal(rows, old_rows)


@pytest.mark.parametrize("make", [torch.nn.LSTMCell, rk.LSTMCell, torch.nn.GRUCell, rk.GRUCell])
def test_forget_gate_bias_of_a_cell_keeps_the_state(make):
    """What the rows mean, seen from outside: with the gate wide open the state stays."""
    cell = make(3, 16)
    x, h, c = torch.randn(2, 3), torch.randn(2, 16), torch.randn(2, 16)
    init.forget_gate_bias_(cell, 30.0)
    if isinstance(cell, torch.nn.LSTMCell):
        with torch.no_grad():
            cell.bias_ih[:16] = -30  # nothing new comes in
        torch.testing.assert_close(cell(x, (h, c))[1], c)
    else:
        torch.testing.assert_close(cell(x, h), h)


@pytest.mark.parametrize("kind", ["torch.nn.LSTM", "torch.nn.GRU", "rk.GRU", "rk.LSTM"])
@pytest.mark.parametrize("min_time", [2.0, 10.0])
def test_chrono_spreads_the_times_evenly(kind, min_time):
    module = type(MODULES[kind][0]())(3, 2000, dtype=torch.float64)
    gates = MODULES[kind][1]
    init.chrono_(module, 300, min_time=min_time, generator=generator())
    keeping = gate_sum(module, gates, 1)
    times = 1 / (1 - torch.sigmoid(keeping))  # the definition, not the formula
    assert min_time * (1 - 1e-9) <= times.min() < times.max() <= 300 * (1 + 1e-9)
    assert stats.kstest(times.numpy(), stats.uniform(min_time, 300 - min_time).cdf).pvalue > 1e-3
    if gates == 4:
        torch.testing.assert_close(gate_sum(module, gates, 0), -keeping)
    torch.manual_seed(0)
    untouched = type(module)(3, 2000, dtype=torch.float64)
    torch.manual_seed(0)
    again = init.chrono_(type(module)(3, 2000, dtype=torch.float64), 300)
    for gate in (0, 2) if gates == 3 else (2, 3):
        assert torch.equal(gate_sum(untouched, gates, gate), gate_sum(again, gates, gate))


# ---------------------------------------------------------------- whole modules


def blocks(module, prefix, gates):
    for name, parameter in module.named_parameters():
        if name.startswith(prefix):
            yield from parameter.detach().chunk(gates)


def test_initialize_orthogonal(layered):
    module, gates = layered
    assert init.initialize(module, "orthogonal", gain=0.9) is module
    for block in blocks(module, "weight_hh", gates):
        torch.testing.assert_close(torch.linalg.svdvals(block), torch.full((16,), 0.9))
    for block in blocks(module, "weight_ih", gates):
        bound = math.sqrt(6 / sum(block.shape))
        assert 0.8 * bound < block.abs().max() <= bound
    assert all((block == 0).all() for block in blocks(module, "bias", gates))


@pytest.mark.parametrize("recipe", ["xavier", "kaiming", "spectral_radius"])
def test_initialize_scales(layered, recipe):
    module, gates = layered
    init.initialize(module, recipe, gain=0.5)
    deviation = {"xavier": 0.5 / 4, "kaiming": 0.5 * math.sqrt(2) / 4}
    for block in blocks(module, "weight_hh", gates):
        if recipe == "spectral_radius":
            assert abs(torch.linalg.eigvals(block).abs().max() - 0.5) < 1e-4
        else:
            assert abs(block.std() / deviation[recipe] - 1) < 0.3
    assert all((block == 0).all() for block in blocks(module, "bias", gates))


def test_initialize_default_is_torchs(layered):
    module, _ = layered
    torch.manual_seed(7)
    fresh = copy.deepcopy(module)
    fresh.reset_parameters()
    torch.manual_seed(7)
    init.initialize(module, "default")
    for one, other in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)


def test_identity_network_copies_its_state():
    """An IRNN without input keeps a non-negative state forever."""
    rnn = init.initialize(rk.RNN(3, 17, nonlinearity="relu"), "identity")
    h = torch.rand(1, 5, 17)
    torch.testing.assert_close(rnn(torch.zeros(129, 5, 3), h)[1], h, rtol=0, atol=0)
    bound = math.sqrt(6 / 20)
    assert 0.8 * bound < rnn.weight_ih_l0.abs().max() <= bound


def test_initialize_reaches_every_recurrent_part_of_a_model_and_no_other():
    model = torch.nn.ModuleDict(
        {"rnn": rk.RNN(3, 8), "deep": torch.nn.ModuleList([torch.nn.LSTM(8, 8)]), "head": torch.nn.Linear(8, 2)}
    )
    head = copy.deepcopy(model["head"])
    init.initialize(model, "orthogonal", forget_bias=1.0)
    assert torch.equal(model["head"].weight, head.weight)
    for part, gates in ((model["rnn"], 1), (model["deep"][0], 4)):
        for block in blocks(part, "weight_hh", gates):
            torch.testing.assert_close(block @ block.T, torch.eye(8))
    assert (gate_sum(model["deep"][0], 4, 1) == 1).all()
    assert (gate_sum(model["deep"][0], 4, 0) == 0).all()


@pytest.mark.parametrize("name", CELLS)
def test_initialize_a_cell(name):
    make, gates = CELLS[name]
    cell = init.initialize(make(3, 8), "orthogonal", **({"max_time": 50} if gates > 1 else {}))
    for block in cell.weight_hh.detach().chunk(gates):
        torch.testing.assert_close(block @ block.T, torch.eye(8))
    if gates > 1:
        assert (cell.bias_ih.chunk(gates)[1] >= 0).all()
        assert cell.bias_ih.chunk(gates)[1].std() > 0


def test_initialize_a_projected_lstm():
    lstm = init.initialize(torch.nn.LSTM(3, 16, proj_size=5), "orthogonal")
    assert singular_values(lstm.weight_hh_l0, 4).sub(1).abs().max() < 1e-6
    assert lstm.weight_hr_l0.abs().max() <= math.sqrt(6 / 21)


def test_initialize_keeps_gradients_and_parameters():
    module = torch.nn.GRU(3, 8)
    parameters = list(module.parameters())
    init.initialize(module, "orthogonal", max_time=20)
    assert all(
        one is other and one.requires_grad and one.is_leaf
        for one, other in zip(module.parameters(), parameters, strict=True)
    )


# ---------------------------------------------------------------- initial states


def as_parts(state):
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("kind", ["zeros", "uniform", "normal"])
def test_initial_state_fits_the_module(layered, kind):
    module, _ = layered
    module = module.double()
    state = init.initial_state(module, 5, kind)
    _, final = module(torch.randn(2, 5, 3, dtype=torch.float64), state)
    assert [p.shape for p in as_parts(state)] == [p.shape for p in as_parts(final)]
    assert all(p.dtype == torch.float64 for p in as_parts(state))


@pytest.mark.parametrize("name", CELLS)
def test_initial_state_fits_a_cell(name):
    cell = CELLS[name][0](3, 8)
    final = cell(torch.randn(5, 3), init.initial_state(cell, 5, "normal"))
    assert [p.shape for p in as_parts(final)] == [p.shape for p in as_parts(init.initial_state(cell, 5))]


def test_initial_state_laws():
    lstm = torch.nn.LSTM(3, 40)
    laws = {"uniform": stats.uniform(-0.5, 1), "normal": stats.norm(0, 0.5)}
    for kind, law in laws.items():
        parts = init.initial_state(lstm, 50, kind, scale=0.5, generator=generator())
        for part in parts:
            assert stats.kstest(part.flatten().numpy(), law.cdf).pvalue > 1e-3
        assert not torch.equal(*parts)
    assert all((part == 0).all() for part in init.initial_state(lstm, 50))


def test_projected_initial_state():
    lstm = torch.nn.LSTM(3, 8, proj_size=5)
    h, c = init.initial_state(lstm, 2)
    assert h.shape == (1, 2, 5)
    assert c.shape == (1, 2, 8)


@pytest.mark.parametrize("make", [rk.RNN, rk.GRU, torch.nn.LSTM])
def test_learned_state_gets_the_gradient_of_h_0_summed_over_the_batch(make):
    module = make(3, 8, num_layers=2, dtype=torch.float64)
    start, x = init.LearnedState(module), torch.randn(7, 5, 3, dtype=torch.float64)
    cotangent = torch.randn(7, 5, 8, dtype=torch.float64)
    (module(x, start(5))[0] * cotangent).sum().backward()
    state = init.initial_state(module, 5)
    for part in as_parts(state):
        part.requires_grad_()
    expected = torch.autograd.grad((module(x, state)[0] * cotangent).sum(), as_parts(state))
    for parameter, gradient in zip(start.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient.sum(1, keepdim=True))
    again = init.LearnedState(module)
    again.load_state_dict(start.state_dict())


def test_learned_state_learns():
    gru = rk.GRU(3, 8)
    start, x = init.LearnedState(gru), torch.randn(4, 5, 3)
    target = gru(x, init.initial_state(gru, 5, "normal").mean(1, keepdim=True).expand(1, 5, 8).contiguous())[0].detach()
    optimizer = torch.optim.Adam(start.parameters(), lr=0.1)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        losses.append(torch.nn.functional.mse_loss(gru(x, start(5))[0], target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 100


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: init.orthogonal_([1.0]), TypeError, "tensor.*list"),
        (lambda: init.orthogonal_(torch.ones(4)), ValueError, r"tensor.*\(4,\)"),
        (lambda: init.orthogonal_(torch.ones(4, 4).long()), TypeError, "tensor.*int64"),
        (lambda: init.identity_(torch.ones(7, 2), gates=4), ValueError, r"tensor.*\(4 \* H.*\(7, 2\)"),
        (lambda: init.identity_(torch.ones(7, 2), gates=0), ValueError, "gates.*0"),
        (lambda: init.kaiming_normal_(torch.ones(2, 2), mode="fan"), ValueError, "mode.*'fan'"),
        (lambda: init.kaiming_normal_(torch.ones(2, 2), nonlinearity="cube"), ValueError, "nonlinearity.*cube"),
        (lambda: init.spectral_radius_(torch.ones(2, 3)), ValueError, r"tensor.*\(2, 3\)"),
        (lambda: init.spectral_radius_(torch.ones(2, 2), -1.0), ValueError, "radius.*-1"),
        (lambda: init.spectral_radius_(torch.zeros(2, 2)), ValueError, "tensor.*eigenvalue"),
        (lambda: init.forget_gate_bias_(rk.RNN(3, 8)), ValueError, "module.*RNN"),
        (lambda: init.forget_gate_bias_(torch.nn.LSTM(3, 8, bias=False)), ValueError, "module.*bias"),
        (lambda: init.forget_gate_bias_(torch.nn.Linear(3, 8)), TypeError, "module.*Linear"),
        (lambda: init.chrono_(torch.nn.LSTM(3, 8), 2), ValueError, "max_time.*2"),
        (lambda: init.chrono_(torch.nn.LSTM(3, 8), 20, min_time=1), ValueError, "min_time.*1"),
        (lambda: init.initialize(torch.nn.Linear(3, 8)), TypeError, "module.*Linear"),
        (lambda: init.initialize(rk.RNN(3, 8), "magic"), ValueError, "recipe.*'magic'"),
        (lambda: init.initialize(rk.GRU(3, 8), "identity"), ValueError, "recipe.*GRU"),
        (lambda: init.initialize(rk.GRU(3, 8), "default", gain=2.0), ValueError, "recipe.*gain"),
        (lambda: init.initialize(rk.RNN(3, 8), max_time=9), ValueError, "max_time.*GRU"),
        (lambda: init.initialize(rk.GRU(3, 8), max_time=9, forget_bias=1), ValueError, "at most one"),
        (lambda: init.initial_state(rk.GRU(3, 8), 2, "ones"), ValueError, "kind.*'ones'"),
        (lambda: init.initial_state(rk.GRU(3, 8), -2), ValueError, "batch_size.*-2"),
        (lambda: init.initial_state(torch.nn.ReLU(), 2), TypeError, "module.*ReLU"),
        (lambda: init.LearnedState(torch.nn.Linear(3, 8)), TypeError, "module.*Linear"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()
