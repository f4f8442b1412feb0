"""diagnostics.py against Jacobians by brute force (torch.autograd.functional) and against closed forms."""

import gc
import math

import pytest
import torch
from torch.autograd.functional import jacobian

import rnnkernels as rk
from rnnkernels import diagnostics

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda a: a}
T, B, INPUT, H = 7, 3, 2, 5


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


MODULES = {
    "rk.RNN": lambda **o: rk.RNN(INPUT, H, **o),
    "rk.RNN two layers": lambda **o: rk.RNN(INPUT, H, num_layers=2, nonlinearity="sigmoid", **o),
    "rk.LSTM two layers": lambda **o: rk.LSTM(INPUT, H, num_layers=2, **o),
    "torch.nn.RNN": lambda **o: torch.nn.RNN(INPUT, H, **o),
    "torch.nn.GRU two layers": lambda **o: torch.nn.GRU(INPUT, H, num_layers=2, **o),
    "torch.nn.LSTM": lambda **o: torch.nn.LSTM(INPUT, H, **o),
    "torch.nn.LSTM projected": lambda **o: torch.nn.LSTM(INPUT, H, proj_size=3, **o),
}


@pytest.fixture(params=MODULES)
def make_module(request):
    torch.manual_seed(0)
    return lambda **options: MODULES[request.param](dtype=torch.float64, **options)


# ---------------------------------------------------------------- spectral radius


def test_spectral_radius_closed_forms():
    angle = 0.3
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    nilpotent = torch.tensor([[0.0, 100.0], [0.0, 0.0]])
    radii = diagnostics.spectral_radius(torch.stack([1.7 * rotation, nilpotent, torch.diag(torch.tensor([-3.0, 2.0]))]))
    torch.testing.assert_close(radii, torch.tensor([1.7, 0.0, 3.0]))


def test_spectral_radius_is_gelfands_limit():
    torch.manual_seed(0)
    matrix = random(H, H)
    power, log_norm, doublings = matrix, 0.0, 14
    for _ in range(doublings):  # power * exp(log_norm) is matrix to the power 2, 4, 8, ...
        power = power @ power
        log_norm = 2 * log_norm + power.norm().log()
        power = power / power.norm()
    torch.testing.assert_close(diagnostics.spectral_radius(matrix), (log_norm / 2**doublings).exp(), rtol=1e-3, atol=0)


# ---------------------------------------------------------------- Jacobians of the plain RNN


@pytest.mark.parametrize("nonlinearity", ACTIVATIONS)
def test_state_jacobians_and_product_against_brute_force(nonlinearity):
    torch.manual_seed(1)
    f, weight_hh, drive = ACTIVATIONS[nonlinearity], random(H, H), random(T, H)

    def run(h, start):
        states = []
        for t in range(start, T):
            h = f(drive[t] + weight_hh @ h)
            states.append(h)
        return states

    initial = random(H)
    states = run(initial, 0)
    jacobians = diagnostics.state_jacobians(weight_hh, torch.stack(states), nonlinearity)
    products = diagnostics.jacobian_product(jacobians)
    before = [initial, *states]
    assert products.shape == (T + 1, H, H)
    for t in range(T):
        step = jacobian(lambda h, t=t: f(drive[t] + weight_hh @ h), before[t])
        torch.testing.assert_close(jacobians[t], step, rtol=1e-12, atol=1e-13)
    for lag in range(1, T + 1):
        whole = jacobian(lambda h, lag=lag: run(h, T - lag)[-1], before[T - lag])
        torch.testing.assert_close(products[lag], whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(products[0], torch.eye(H, dtype=torch.float64), rtol=0, atol=0)


def test_identity_activation_gives_powers():
    weight_hh = random(H, H)
    products = diagnostics.jacobian_product(diagnostics.state_jacobians(weight_hh, random(T, B, H), "identity"))
    for k in range(T + 1):
        power = torch.linalg.matrix_power(weight_hh, k).expand(B, H, H)
        torch.testing.assert_close(products[k], power, rtol=1e-10, atol=1e-12)


def test_product_keeps_batch_entries_apart():
    weight_hh, states = random(H, H), torch.tanh(random(T, B, H))
    together = diagnostics.jacobian_product(diagnostics.state_jacobians(weight_hh, states))
    for b in range(B):
        alone = diagnostics.jacobian_product(diagnostics.state_jacobians(weight_hh, states[:, b]))
        torch.testing.assert_close(together[:, b], alone)


# ---------------------------------------------------------------- gradient norm per lag


def last_output(module, input, hx=None):
    return module(input, hx)[0][-1]


@pytest.mark.parametrize("wrt", ["state", "input"])
def test_gradient_norm_against_brute_force(make_module, wrt):
    """Every lag from one call of the whole remaining sequence, differentiated by torch.autograd.functional."""
    module, input = make_module(), random(T, B, INPUT)
    features = last_output(module, input).shape[-1]
    cotangent = random(B, features)
    norms = diagnostics.gradient_norm_per_lag(module, input, cotangent=cotangent, wrt=wrt)
    assert norms.shape == (T + (wrt == "state"), B)

    def score(output):
        return (output * cotangent).sum()

    for lag in range(len(norms)):
        if wrt == "input":
            (gradient,) = torch.autograd.grad(score(last_output(module, x := input.clone().requires_grad_())), x)
            parts = [gradient[T - 1 - lag].unsqueeze(0)]
        elif lag == 0:
            torch.testing.assert_close(norms[0], cotangent.norm(dim=1))
            continue
        else:
            state = module(input[: T - lag])[1] if lag < T else None
            if state is None:
                state = module(input[:1])[1]
                state = tuple(map(torch.zeros_like, state)) if isinstance(state, tuple) else torch.zeros_like(state)
            sources = state if isinstance(state, tuple) else (state,)
            sources = [s.detach().requires_grad_() for s in sources]
            hx = tuple(sources) if isinstance(state, tuple) else sources[0]
            parts = torch.autograd.grad(score(last_output(module, input[T - lag :], hx)), sources)
        expected = torch.stack([p.square().sum(dim=(0, 2)) for p in parts]).sum(0).sqrt()
        torch.testing.assert_close(norms[lag], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("make", [rk.RNN, torch.nn.RNN])
def test_gradient_norm_is_the_transposed_product(make):
    torch.manual_seed(2)
    module = make(INPUT, H, dtype=torch.float64)
    input, cotangent = random(T, B, INPUT), random(B, H)
    products = diagnostics.jacobian_product(diagnostics.state_jacobians(module.weight_hh_l0, module(input)[0]))
    norms = diagnostics.gradient_norm_per_lag(module, input, cotangent=cotangent)
    expected = torch.einsum("kbij,bi->kbj", products, cotangent).norm(dim=-1)
    torch.testing.assert_close(norms, expected.detach(), rtol=1e-10, atol=1e-14)


def test_batch_first_initial_state_and_untouched_gradients(make_module):
    module, input = make_module(), random(T, B, INPUT)
    batch_first = make_module(batch_first=True)
    batch_first.load_state_dict(module.state_dict())
    _, hx = module(random(4, B, INPUT))
    hx = tuple(s.detach() for s in hx) if isinstance(hx, tuple) else hx.detach()
    cotangent = random(B, last_output(module, input).shape[-1])
    for wrt in ("state", "input"):
        norms = diagnostics.gradient_norm_per_lag(module, input, hx, cotangent=cotangent, wrt=wrt)
        other = diagnostics.gradient_norm_per_lag(batch_first, input.transpose(0, 1), hx, cotangent=cotangent, wrt=wrt)
        torch.testing.assert_close(norms, other)
        zeros = diagnostics.gradient_norm_per_lag(module, input, cotangent=cotangent, wrt=wrt)
        assert not torch.allclose(norms, zeros)
    assert all(p.grad is None for p in module.parameters())


def test_default_cotangents_are_reproducible_unit_vectors():
    module, input = torch.nn.RNN(INPUT, H), torch.randn(T, B, INPUT)
    first, second, third = (
        diagnostics.gradient_norm_per_lag(module, input, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    torch.testing.assert_close(first[0], torch.ones(B))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.allclose(first, third)


def test_gradient_norm_works_under_no_grad_and_in_eval_mode():
    module, input = torch.nn.RNN(INPUT, H).eval(), torch.randn(T, B, INPUT)
    with torch.no_grad():
        assert diagnostics.gradient_norm_per_lag(module, input).isfinite().all()


def test_gradient_norm_below_the_range_of_its_squares():
    module = torch.nn.RNN(INPUT, H)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.weight_hh_l0.fill_diagonal_(2.0**-10)  # with states at zero, one lag is one factor of 2**-10
    norms = diagnostics.gradient_norm_per_lag(module, torch.zeros(12, B, INPUT))
    expected = torch.tensor([2.0 ** (-10 * k) for k in range(13)]).unsqueeze(1).expand(13, B)
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)  # 2**-120, its square is not a float32


# ---------------------------------------------------------------- Jacobians of any module


def flat(state):
    """(layers, B, H) and its like as one row a sequence, written out."""
    parts = state if isinstance(state, tuple) else (state,)
    return torch.cat([part[layer] for part in parts for layer in range(len(part))], dim=-1)


def unflat(row, like):
    parts, pieces = like if isinstance(like, tuple) else (like,), []
    for part in parts:
        size = part.shape[0] * part.shape[-1]
        piece, row = row[:, :size], row[:, size:]
        pieces.append(torch.stack(piece.chunk(part.shape[0], dim=1)))
    return tuple(pieces) if isinstance(like, tuple) else pieces[0]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_jacobian_per_lag_against_brute_force(make_module, batch_first, given):
    """Every lag from one call of the whole remaining sequence, differentiated by torch.autograd.functional."""
    module, input = make_module(), random(T, B, INPUT)
    _, hx = module(random(2, B, INPUT))
    hx = tuple(s.detach() for s in hx) if isinstance(hx, tuple) else hx.detach()
    if not given:
        hx = tuple(map(torch.zeros_like, hx)) if isinstance(hx, tuple) else torch.zeros_like(hx)
    tested = make_module(batch_first=batch_first)
    tested.load_state_dict(module.state_dict())
    P = diagnostics.jacobian_per_lag(tested, input.transpose(0, 1) if batch_first else input, hx if given else None)
    size = flat(hx).shape[1]
    assert P.shape == (T + 1, B, size, size)
    for lag in range(T + 1):
        before = module(input[: T - lag], hx)[1] if lag < T else hx
        for b in range(B):
            alone = tuple(s[:, b : b + 1] for s in before) if isinstance(before, tuple) else before[:, b : b + 1]

            def rest(row, lag=lag, b=b, alone=alone):
                start = unflat(row.unsqueeze(0), alone)
                return flat(module(input[T - lag :, b : b + 1], start)[1] if lag else start)[0]

            torch.testing.assert_close(P[lag, b], jacobian(rest, flat(alone)[0]), rtol=1e-9, atol=1e-13)
    some = diagnostics.singular_values_per_lag(tested, input.transpose(0, 1) if batch_first else input, hx, lags=[5, 2])
    torch.testing.assert_close(some, torch.linalg.svdvals(P[[5, 2]]))
    assert all(p.grad is None for p in tested.parameters())


def test_jacobian_per_lag_is_the_product_for_a_plain_rnn():
    module, input = rk.RNN(INPUT, H, dtype=torch.float64), random(T, B, INPUT)
    states = module(input)[0].detach()
    expected = diagnostics.jacobian_product(diagnostics.state_jacobians(module.weight_hh_l0.detach(), states))
    torch.testing.assert_close(diagnostics.jacobian_per_lag(module, input), expected)


# ---------------------------------------------------------------- gates

EVERY_FORM = {"num_layers": 2, "bidirectional": True, "batch_first": True}


@pytest.mark.parametrize("options", [{}, EVERY_FORM, {"bias": False}, {"dropout": 0.5, "num_layers": 2}])
@pytest.mark.parametrize("make", [torch.nn.LSTM, torch.nn.GRU, rk.GRU, rk.RNN, rk.LSTM])
def test_gates_lead_to_the_modules_states(make, options):
    module = make(INPUT, H, dtype=torch.float64, **options)
    input, training = random(B, T, INPUT), module.training
    _, hx = module(input)
    found = diagnostics.gate_activations(module, input, hx)
    assert module.training is training
    layers = (2 if "num_layers" in options else 1) * (2 if "bidirectional" in options else 1)
    assert len(found) == layers
    names = {"LSTM": ["input", "forget", "cell", "output"], "GRU": ["reset", "update", "new"], "RNN": ["hidden"]}
    time, batch = (T, B) if "batch_first" in options else (B, T)
    for gates in found:
        assert list(gates) == names[make.__name__]
        assert all(values.shape == (time, batch, H) for values in gates.values())


def test_lstm_gates_follow_from_the_cell_states_seen_from_outside():
    """c_t = f c_{t-1} + i g and h_t = o tanh(c_t), with the states from torch's own cell."""
    lstm, input = torch.nn.LSTM(INPUT, H, dtype=torch.float64), random(T, B, INPUT)
    cell = torch.nn.LSTMCell(INPUT, H, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    (gates,) = diagnostics.gate_activations(lstm, input)
    h = c = torch.zeros(B, H, dtype=torch.float64)
    for t in range(T):
        before, (h, c) = c, cell(input[t], (h, c))
        torch.testing.assert_close(gates["forget"][t] * before + gates["input"][t] * gates["cell"][t], c)
        torch.testing.assert_close(gates["output"][t] * c.tanh(), h)


@pytest.mark.parametrize("make", [torch.nn.GRU, rk.GRU])
def test_gru_gates_by_their_biases(make):
    gru = make(INPUT, H, dtype=torch.float64)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.zero_()
        gru.bias_ih_l0.copy_(torch.tensor([-2.0, 1.0, 0.5], dtype=torch.float64).repeat_interleave(H))
    (gates,) = diagnostics.gate_activations(gru, random(T, B, INPUT))
    for name, value in {
        "reset": 1 / (1 + math.exp(2)),
        "update": 1 / (1 + math.exp(-1)),
        "new": math.tanh(0.5),
    }.items():
        torch.testing.assert_close(gates[name], torch.full((T, B, H), value, dtype=torch.float64))


def test_gate_statistics_count_by_hand():
    lstm, input = torch.nn.LSTM(INPUT, 8), 10 * torch.randn(T, B, INPUT)
    (gates,), (statistics,) = diagnostics.gate_activations(lstm, input), diagnostics.gate_statistics(lstm, input)
    for name, values in gates.items():
        values = values.double().flatten().tolist()
        low, high = (-0.8, 0.8) if name == "cell" else (0.1, 0.9)
        mean = sum(values) / len(values)
        expected = (
            mean,
            math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)),
            sum(v < low for v in values) / len(values),
            sum(v > high for v in values) / len(values),
        )
        assert statistics[name] == pytest.approx(expected, abs=1e-6)
        assert 0 < expected[2] < 1
        assert 0 < expected[3] < 1


def test_gate_statistics_of_plain_networks():
    input = torch.randn(T, B, INPUT)
    for nonlinearity in ("relu", "identity", "sigmoid"):
        rnn = rk.RNN(INPUT, 64, nonlinearity=nonlinearity)
        statistics = diagnostics.gate_statistics(rnn, input)[0]["hidden"]
        states = rnn(input)[0]
        zeros = (states == 0).double().mean().item()
        expected = {"relu": (zeros, 0), "identity": (0, 0), "sigmoid": (0, 0)}[nonlinearity]
        assert (statistics.low, statistics.high) == pytest.approx(expected)
        assert statistics.mean == pytest.approx(states.mean().item(), abs=1e-6)


def test_gates_refuse_equations_that_are_not_the_textbooks():
    class Strange(torch.nn.GRU):
        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output + 0.01, h_n

    with pytest.raises(ValueError, match=r"module.*textbook"):
        diagnostics.gate_activations(Strange(INPUT, H), torch.randn(T, B, INPUT))


# ---------------------------------------------------------------- recorders


def test_update_recorder_measures_the_steps_made():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
    recorder = diagnostics.UpdateRecorder(model.named_parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    assert recorder.ratios["0.weight"].shape == (0,)
    expected = []
    for _ in range(3):
        model(random(5, 3)).square().sum().backward()
        before = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
        with recorder:
            optimizer.step()
        after = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
        expected.append({n: ((after[n] - before[n]) ** 2).sum() ** 0.5 / (before[n] ** 2).sum() ** 0.5 for n in before})
    for name, ratios in recorder.ratios.items():
        torch.testing.assert_close(ratios, torch.tensor([step[name] for step in expected], dtype=torch.float64))


def test_update_recorder_skips_a_failed_step():
    weight = torch.ones(2, requires_grad=True)
    recorder = diagnostics.UpdateRecorder([("weight", weight)])
    with pytest.raises(RuntimeError, match="stop"), recorder:
        raise RuntimeError("stop")
    assert recorder.ratios["weight"].shape == (0,)


def test_clip_recorder():
    recorder = diagnostics.ClipRecorder(max_norm=2.0)
    assert math.isnan(recorder.share)
    for norm in (1.0, torch.tensor(3.0), 2.0, torch.tensor(float("nan")), float("inf")):
        recorder.record(norm)
    assert recorder.share == pytest.approx(3 / 5)
    assert recorder.norms.shape == (5,)


# ---------------------------------------------------------------- saved tensors


def test_saved_tensors_are_counted_once_and_released():
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    with diagnostics.measure_saved_tensors() as saved:
        exponential = x.exp()  # saves its result
        product = exponential * exponential[:]  # saves the same storage again, and a view of it
        assert saved.current == 8000
        other = product.sin()  # saves its argument
        assert saved.current == saved.peak == 16000
        (gradient,) = torch.autograd.grad(other.sum(), x)
        assert saved.current == 0
        x.exp().sum().backward()
        assert saved.current == 0
        assert saved.peak == 16000
    expected = (2 * x).exp().cos() * 2 * (2 * x).exp()
    torch.testing.assert_close(gradient, expected)


def test_saved_tensors_need_no_garbage_collector():
    x = torch.randn(10, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with diagnostics.measure_saved_tensors() as saved:
            y = x.exp()
            assert saved.current == 40
            del y
            assert saved.current == 0
    finally:
        gc.enable()


def test_saved_tensors_exclude():
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(3, 4, requires_grad=True)
    with diagnostics.measure_saved_tensors(exclude=[weight]) as saved:
        y = x @ weight.T
        assert saved.current == 3 * 4 * 4
        del y


@pytest.mark.parametrize("make", [rk.RNN, torch.nn.RNN])
def test_saved_tensors_of_a_layer_grow_linearly(make):
    module, counts = make(3, 16), []
    for length in (20, 40, 60):
        input = torch.randn(length, 2, 3)
        with diagnostics.measure_saved_tensors(exclude=module.parameters()) as saved:
            output, _ = module(input)
            counts.append(saved.current)
            output.sum().backward()
            assert saved.current == 0
        del output
    assert counts[2] - counts[1] == counts[1] - counts[0] >= 20 * 2 * 16 * 4


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: diagnostics.spectral_radius([[1.0]]), TypeError, "matrix.*list"),
        (lambda: diagnostics.spectral_radius(torch.ones(2, 3)), ValueError, r"matrix.*\(2, 3\)"),
        (lambda: diagnostics.spectral_radius(torch.ones(2, 2).half()), TypeError, "matrix.*float16"),
        (lambda: diagnostics.spectral_radius(torch.ones(2, 2).long()), TypeError, "matrix.*int64"),
        (lambda: diagnostics.spectral_radius(torch.ones(0, 0)), ValueError, r"matrix.*\(0, 0\)"),
        (
            lambda: diagnostics.state_jacobians(torch.ones(2, 2), torch.ones(4, 3)),
            ValueError,
            r"states.*\(T, 2\).*\(4, 3\)",
        ),
        (lambda: diagnostics.state_jacobians(torch.ones(2, 2), torch.ones(2)), ValueError, r"states.*\(T, 2\)"),
        (lambda: diagnostics.state_jacobians(torch.ones(2, 2), None), TypeError, "states.*NoneType"),
        (lambda: diagnostics.state_jacobians(torch.ones(1, 2, 2), torch.ones(4, 2)), ValueError, "weight_hh"),
        (
            lambda: diagnostics.state_jacobians(torch.ones(2, 2), torch.ones(4, 2), "gelu"),
            ValueError,
            "nonlinearity.*'gelu'",
        ),
        (lambda: diagnostics.jacobian_product(torch.ones(2, 2)), ValueError, r"jacobians.*\(2, 2\)"),
        (lambda: diagnostics.jacobian_product(torch.ones(5, 2, 3)), ValueError, r"jacobians.*\(5, 2, 3\)"),
        (lambda: diagnostics.gradient_norm_per_lag(torch.nn.RNN(INPUT, H), None), TypeError, "input.*NoneType"),
        (lambda: diagnostics.gradient_norm_per_lag(torch.nn.RNN(INPUT, H), torch.ones(T, INPUT)), ValueError, "input"),
        (
            lambda: diagnostics.gradient_norm_per_lag(torch.nn.RNN(INPUT, H), torch.ones(0, B, INPUT)),
            ValueError,
            "input.*one",
        ),
        (
            lambda: diagnostics.gradient_norm_per_lag(torch.nn.RNN(INPUT, H), torch.ones(T, B, INPUT), wrt="output"),
            ValueError,
            "wrt.*'output'",
        ),
        (
            lambda: diagnostics.gradient_norm_per_lag(
                torch.nn.RNN(INPUT, H), torch.ones(T, B, INPUT), cotangent=torch.ones(B, H + 1)
            ),
            ValueError,
            r"cotangent.*\(3, 5\).*\(3, 6\)",
        ),
        (
            lambda: diagnostics.gradient_norm_per_lag(
                torch.nn.RNN(INPUT, H, bidirectional=True), torch.ones(T, B, INPUT)
            ),
            ValueError,
            "bidirectional",
        ),
        (
            lambda: diagnostics.jacobian_per_lag(torch.nn.RNN(INPUT, H), torch.ones(T, B, INPUT), lags=[8]),
            ValueError,
            "lags.*0 to 7.*8",
        ),
        (
            lambda: diagnostics.jacobian_per_lag(torch.nn.GRU(INPUT, H, bidirectional=True), torch.ones(T, B, INPUT)),
            ValueError,
            "bidirectional",
        ),
        (lambda: diagnostics.gate_activations(torch.nn.Linear(2, 2), torch.ones(T, B, 2)), TypeError, "module.*Linear"),
        (lambda: diagnostics.gate_activations(rk.RNN(INPUT, H), torch.ones(T, B, 9)), ValueError, "input.*9"),
        (lambda: diagnostics.gate_statistics(torch.nn.Linear(2, 2), torch.ones(T, B, 2)), TypeError, "module.*Linear"),
        (lambda: diagnostics.ClipRecorder(0), ValueError, "max_norm.*0"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()
