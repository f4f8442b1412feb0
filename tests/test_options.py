"""What ``torch.nn`` does not have: every option of every cell, alone and together."""

import importlib
import itertools
import math

import hypothesis
import numpy as np
import pytest
import squares
import torch
from hypothesis import strategies as st
from parity import arguments, assert_parity, extra_weights, leaves_of, names_of, random_lengths

import rnnkernels as rk
from rnnkernels.ops import _sequence

OPERATORS = ("rnn", "gru", "lstm")
KINDS = ("RNN", "GRU", "LSTM")
SCALARS = {
    "zoneout": {"zoneout": 0.3, "seed": 5},
    "recurrent_dropout": {"recurrent_dropout": 0.4, "seed": 5},
    "not training": {"training": False},
    "grad_clip": {"grad_clip": 0.05},
    "reverse": {"reverse": True},
    "relu": {"nonlinearity": "relu"},
    "sigmoid": {"nonlinearity": "sigmoid"},
    "identity": {"nonlinearity": "identity"},
    "reset_before": {"reset_after": False},
    "zoneout_cell": {"zoneout_cell": 0.25, "seed": 5},
    "recompute_gates": {"recompute_gates": True},
}
"""Options that are numbers or names. All others are made by :func:`case`."""
SHARED = (
    "zoneout",
    "recurrent_dropout",
    "not training",
    "grad_clip",
    "reverse",
    "lengths",
    "reset",
    "no bias",
    "recompute_gates",
)
NAMES = {
    "rnn": (*SHARED, "norm_hh", "relu", "sigmoid", "identity"),
    "gru": (*SHARED, "norm_ih", "norm_hh", "reset_before"),
    "lstm": (*SHARED, "norm_ih", "norm_hh", "norm_cell", "peephole", "zoneout_cell", "projection"),
}
ACTIVATIONS = {"relu", "sigmoid", "identity"}


def case(operator, names, sizes=(6, 3, 2, 5), dtype=torch.float64):
    """Tensors and options of an operator with the options of these names."""
    sequence_length, batch, _, hidden_size = sizes
    state_size = max(1, hidden_size - 2) if "projection" in names else None
    bias = "no bias" not in names
    tensors = arguments(*sizes, dtype, operator=operator, bias=bias, state_size=state_size)
    options = {}
    for name in names:
        options |= SCALARS.get(name, {})
    wanted = {n for n in names if n.startswith("norm_")}
    wanted |= {"norm_cell_weight", "norm_cell_bias"} if "norm_cell" in names else set()
    wanted |= {"weight_peephole"} if "peephole" in names else set()
    options |= extra_weights(operator, hidden_size, dtype, names=wanted)
    if "lengths" in names:
        options["lengths"] = random_lengths(batch, sequence_length)
    if "reset" in names:
        options["reset"] = torch.rand(sequence_length, batch) < 0.3
    return tensors, options


def together(operator, names):
    """Whether these options can be given together: there is but one activation."""
    return len(ACTIVATIONS.intersection(names)) < 2


ALONE_AND_PAIRS = [
    (operator, chosen)
    for operator in OPERATORS
    for count in (1, 2)
    for chosen in itertools.combinations(NAMES[operator], count)
    if together(operator, chosen)
]
EVERYTHING = {
    operator: [n for n in NAMES[operator] if n not in {"not training", "no bias", "recompute_gates", *ACTIVATIONS}]
    for operator in OPERATORS
}


@pytest.mark.parametrize(("operator", "names"), ALONE_AND_PAIRS, ids=str)
def test_alone_and_in_pairs_they_match_the_reference(operator, names):
    tensors, options = case(operator, names)
    assert_parity(tensors, 1e-11, operator, **options)


@st.composite
def subsets(draw):
    operator = draw(st.sampled_from(OPERATORS))
    names = draw(st.sets(st.sampled_from(NAMES[operator])).filter(lambda chosen: together(operator, chosen)))
    sizes = draw(st.integers(1, 20)), draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(2, 24))
    return operator, sorted(names), sizes, draw(st.integers(0, 2**32))


@hypothesis.settings(max_examples=100)
@hypothesis.given(drawn=subsets())
def test_any_together_match_the_reference_in_float64(drawn):
    operator, names, sizes, seed = drawn
    torch.manual_seed(seed)
    tensors, options = case(operator, names, sizes)
    assert_parity(tensors, 1e-10, operator, **options)


@hypothesis.settings(max_examples=100)
@hypothesis.given(drawn=subsets())
def test_any_together_match_the_reference_in_float32(drawn):
    operator, names, sizes, seed = drawn
    torch.manual_seed(seed)
    tensors, options = case(operator, names, sizes, torch.float32)
    assert_parity(tensors, 1e-5, operator, **options)


@pytest.mark.parametrize("recompute_gates", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("operator", OPERATORS)
def test_all_together_match_the_reference(operator, reverse, training, recompute_gates):
    tensors, options = case(operator, EVERYTHING[operator], (17, 3, 9, 33))
    options |= {"reverse": reverse, "training": training, "recompute_gates": recompute_gates}
    assert_parity(tensors, 1e-11, operator, **options)


@pytest.mark.parametrize("names", [(), ("norm_hh",), ("reset_before",)], ids=str)
def test_the_gradient_of_the_reset_gate_is_clipped_itself(names):
    # What reaches it was clipped in the candidate; only a large product with the state brings it beyond the bound.
    tensors, options = case("gru", names)
    with torch.no_grad():
        tensors[1].mul_(10)
        tensors[3][10:].mul_(10)
        tensors[4][10:] = -10
        tensors[5][10:] = 20
    assert_parity(tensors, 1e-11, "gru", grad_clip=0.05, **options)
    free, clipped = (
        torch.autograd.grad(rk.ops.gru(*tensors, grad_clip=bound, **options)[0].sum(), tensors[4])[0]
        for bound in (None, 1e-4)
    )
    assert clipped.abs().max() < free.abs().max()


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("names", [(), ("lengths",), ("norm_hh", "reset"), "everything"], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_sequences_of_many_blocks_match_the_reference(monkeypatch, operator, names, reverse):
    from rnnkernels.kernels.eager import variable_length

    monkeypatch.setattr(variable_length, "_IN_CACHE", 200)  # so that a block is a few steps
    tensors, options = case(operator, EVERYTHING[operator] if names == "everything" else names, (23, 3, 2, 5))
    assert_parity(tensors, 1e-11, operator, **{**options, "reverse": reverse})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize(
    ("operator", "name"), [(o, n) for o in OPERATORS for n in (*NAMES[o], "everything") if n != "grad_clip"]
)
def test_half_precision_stays_within_its_bound(operator, name, dtype, tolerance):
    # A few units in the last place (2^-8 and 2^-11) a step, over 7 steps.
    names = [n for n in EVERYTHING[operator] if n != "grad_clip"] if name == "everything" else [name]
    tensors, options = case(operator, names, (7, 5, 9, 17), dtype)
    assert_parity(tensors, tolerance, operator, **options)


DIFFERENTIABLE = [
    (operator, names)
    for operator in OPERATORS
    for names in (
        *[(n,) for n in NAMES[operator] if n not in {"grad_clip", "relu", "no bias", "reverse"}],
        tuple(n for n in EVERYTHING[operator] if n != "grad_clip"),
    )
]


@pytest.mark.parametrize(("operator", "names"), DIFFERENTIABLE, ids=str)
def test_gradients_and_second_gradients_by_finite_differences(operator, names):
    tensors, options = case(operator, names, (3, 2, 2, 3))
    leaves = leaves_of(operator, tensors, options)
    function = getattr(rk.ops, operator)

    def call(*values):
        return function(**{**options, **dict(zip(leaves, values, strict=True))})

    torch.autograd.gradcheck(call, tuple(leaves.values()))
    torch.autograd.gradgradcheck(call, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("operator", OPERATORS)
def test_second_gradients_are_the_references(operator, dtype):
    tensors, options = case(operator, EVERYTHING[operator], dtype=dtype)
    leaves = tuple(leaves_of(operator, tensors, options).values())
    seconds = []
    for module in (rk.ops, rk.reference):
        results = getattr(module, operator)(*tensors, **options)
        torch.manual_seed(1)
        cotangents = [torch.randn_like(result) for result in results]
        first = torch.autograd.grad(results, leaves, cotangents, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        seconds.append([*first, *torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)])
    for a, b in zip(*seconds, strict=True):
        bounds = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4 * float(b.detach().abs().max())}
        torch.testing.assert_close(a, b, **bounds)


@pytest.mark.parametrize("operator", OPERATORS)
def test_each_gradient_can_be_asked_for_alone(operator):
    tensors, options = case(operator, EVERYTHING[operator])
    leaves = leaves_of(operator, tensors, options)
    rest = {name: value for name, value in options.items() if name not in leaves}
    function = getattr(rk.ops, operator)
    results = function(**leaves, **rest)
    cotangents = [torch.randn_like(result) for result in results]
    expected = dict(zip(leaves, torch.autograd.grad(results, tuple(leaves.values()), cotangents), strict=True))
    for wanted in leaves:
        alone = {name: leaf.detach().requires_grad_(name == wanted) for name, leaf in leaves.items()}
        torch.autograd.backward(function(**alone, **rest), cotangents)
        torch.testing.assert_close(alone[wanted].grad, expected[wanted])
        assert all(leaf.grad is None for name, leaf in alone.items() if name != wanted)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gradient_of_one_result_alone(operator):
    tensors, options = case(operator, EVERYTHING[operator])
    leaves = tuple(leaves_of(operator, tensors, options).values())
    results, expected = (getattr(module, operator)(*tensors, **options) for module in (rk.ops, rk.reference))
    for pair in zip(results, expected, strict=True):
        cotangent = torch.randn_like(pair[0])
        kwargs = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        torch.testing.assert_close(*(torch.autograd.grad(result, leaves, cotangent, **kwargs) for result in pair))


@pytest.mark.parametrize("operator", OPERATORS)
def test_backward_twice_gives_the_same_bits_and_changes_nothing(operator):
    tensors, options = case(operator, EVERYTHING[operator], dtype=torch.float32)
    leaves = tuple(leaves_of(operator, tensors, options).values())
    before = [leaf.detach().clone() for leaf in leaves]
    results = getattr(rk.ops, operator)(*tensors, **options)
    copies = [result.detach().clone() for result in results]
    cotangents = [torch.randn_like(result) for result in results]
    kept = [cotangent.clone() for cotangent in cotangents]
    first = torch.autograd.grad(results, leaves, cotangents, retain_graph=True)
    second = torch.autograd.grad(results, leaves, cotangents)
    again = getattr(rk.ops, operator)(*tensors, **options)
    for a, b in zip(
        (*first, *leaves, *cotangents, *results, *again), (*second, *before, *kept, *copies, *copies), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("operator", OPERATORS)
def test_any_memory_layout_will_do(operator):
    tensors, options = case(operator, EVERYTHING[operator])
    scattered, scattered_options = (
        [tensor.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_() for tensor in tensors],
        {
            name: value.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_(value.requires_grad)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in options.items()
        },
    )
    expected = getattr(rk.ops, operator)(*tensors, **options)
    results = getattr(rk.ops, operator)(*scattered, **scattered_options)
    cotangents = [torch.randn_like(result) for result in results]
    transposed = [cotangents[0].transpose(0, 1).contiguous().transpose(0, 1), *cotangents[1:]]
    leaves, others = (
        tuple(leaves_of(operator, *given).values()) for given in ((tensors, options), (scattered, scattered_options))
    )
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(
        torch.autograd.grad(results, others, transposed), torch.autograd.grad(expected, leaves, cotangents)
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_empty_batch(operator):
    tensors, options = case(operator, EVERYTHING[operator], (4, 1, 3, 5), torch.float32)
    states = names_of(operator).index("weight_ih")
    tensors[:states] = [
        tensor.detach()[:, :0].requires_grad_() if i == 0 else tensor.detach()[:0].requires_grad_()
        for i, tensor in enumerate(tensors[:states])
    ]
    options |= {"lengths": options["lengths"][:0], "reset": options["reset"][:, :0]}
    results = getattr(rk.ops, operator)(*tensors, **options)
    assert all(0 in result.shape for result in results)
    gradients = torch.autograd.grad(results, tensors, [torch.zeros_like(result) for result in results])
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_runs_in_its_type_and_keeps_the_weights_type(operator):
    tensors, options = case(operator, EVERYTHING[operator], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = getattr(rk.ops, operator)(*tensors, **options)
    assert {result.dtype for result in results} == {torch.bfloat16}
    leaves = tuple(leaves_of(operator, tensors, options).values())
    gradients = torch.autograd.grad(results, leaves, [torch.randn_like(result) for result in results])
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    expected = getattr(rk.reference, operator)(*tensors, **options)[0]
    torch.testing.assert_close(results[0].float(), expected, atol=1e-1, rtol=0)


def general_arguments(operator, names, dtype=torch.float32):
    """Positional arguments of ``torch.ops.rnnkernels.recurrence`` for these options."""
    tensors, options = case(operator, names, dtype=dtype)
    named = {**dict(zip(names_of(operator), tensors, strict=False)), **options}
    weights = "weight_hr", "weight_peephole", "norm_hh", "norm_cell_weight", "norm_cell_bias"
    rows = named["weight_hh"].shape[0]
    bias = None if operator == "lstm" else torch.randn(5, dtype=dtype, requires_grad=True)
    if operator == "rnn" and "norm_hh" not in names:
        bias = None
    probabilities = [float(options.get(name, 0.0)) for name in ("recurrent_dropout", "zoneout", "zoneout_cell")]
    return (
        torch.randn(6, 3, rows, dtype=dtype, requires_grad=True),
        named["h_0"],
        named.get("c_0"),
        named["weight_hh"],
        bias,
        *(named.get(name) for name in weights),
        options.get("lengths"),
        options.get("reset"),
        torch.tensor(5),
        operator,
        options.get("nonlinearity", "tanh"),
        options.get("reset_after", True),
        options.get("reverse", False),
        *probabilities,
        options.get("training", True),
        float(options.get("grad_clip", math.inf)),
        options.get("recompute_gates", False),
        "eager",
    )


@pytest.mark.parametrize(
    ("operator", "names"),
    [
        (o, names)
        for o in OPERATORS
        for names in (
            (),
            tuple(EVERYTHING[o]),
            (*EVERYTHING[o], "recompute_gates"),
            ("zoneout", "lengths"),
            ("norm_hh",),
        )
    ]
    + [("lstm", ("projection",)), ("lstm", ("zoneout_cell",)), ("lstm", ("norm_cell",)), ("gru", ("reset_before",))],
    ids=str,
)
def test_opcheck(operator, names):
    positional = general_arguments(operator, names)
    torch.library.opcheck(torch.ops.rnnkernels.recurrence.default, positional)
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in positional]
    trace = torch.ops.rnnkernels.recurrence(*detached)
    output, h_n, c_n = trace[:3]
    cotangents = torch.randn_like(output), torch.randn_like(h_n), torch.randn_like(c_n) if operator == "lstm" else None
    backward = torch.ops.rnnkernels.recurrence_backward.default
    torch.library.opcheck(backward, (*cotangents, list(trace), *detached))


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck_of_dropout(shared):
    for input in (torch.randn(5, 3, 4, requires_grad=True), torch.randn(4, 5).t().requires_grad_()):
        torch.library.opcheck(torch.ops.rnnkernels.dropout.default, (input, torch.tensor(3), 0.3, shared, "eager"))


def within(rate, probability, count):
    """Whether an observed rate is within five standard deviations."""
    return abs(float(rate) - probability) < 5 * math.sqrt(probability * (1 - probability) / count)


def linear(hidden_size, batch, steps, weight_hh):
    """A plain RNN of the identity without biases: $h_t = x_t + W h_{t-1}$."""
    eye = torch.eye(hidden_size, dtype=torch.float64)
    return torch.zeros(steps, batch, hidden_size).double(), torch.ones(batch, hidden_size).double(), eye, weight_hh


def test_the_variational_mask_is_one_for_all_steps():
    eye = torch.eye(64).double()
    output, _ = rk.ops.rnn(*linear(64, 100, 5, eye), nonlinearity="identity", recurrent_dropout=0.2, seed=3)
    kept = output[0] > 0
    for t in range(5):
        torch.testing.assert_close(output[t], kept.double() * 1.25 ** (t + 1))
    assert within((~kept).double().mean(), 0.2, kept.numel())
    # Its own mask for every sequence, and for every unit
    for dimension in (0, 1):
        rates = (~kept).double().mean(dimension)
        assert rates.std() < 2 * math.sqrt(0.2 * 0.8 / kept.shape[dimension])
        assert len(kept.unique(dim=1 - dimension).t() if dimension else kept.unique(dim=0)) > 1


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_zoneout_draws_for_every_step_and_unit(probability):
    input, h_0, weight_ih, _ = linear(32, 16, 50, None)
    input += torch.arange(1, 51).view(-1, 1, 1) * 10
    output, h_n = rk.ops.rnn(
        input, h_0, weight_ih, torch.zeros(32, 32).double(), nonlinearity="identity", zoneout=probability, seed=8
    )
    before = torch.cat([h_0[None], output[:-1]])
    stayed = output == before
    assert torch.equal(output, torch.where(stayed, before, input))
    assert torch.equal(h_n, output[-1])
    assert within(stayed.double().mean(), probability, stayed.numel())
    for dimension in range(3):
        both = stayed.narrow(dimension, 1, stayed.shape[dimension] - 1)
        both = both & stayed.narrow(dimension, 0, stayed.shape[dimension] - 1)
        assert within(both.double().mean(), probability**2, both.numel())


def test_zoneout_of_both_states_of_the_lstm():
    steps, batch, size = 40, 16, 32
    tensors = [t.detach() for t in arguments(steps, batch, 3, size, torch.float64, operator="lstm")]
    output, _, _ = rk.ops.lstm(*tensors, zoneout=0.3, seed=4)
    stayed_h = output == torch.cat([tensors[1][None], output[:-1]])
    assert within(stayed_h.double().mean(), 0.3, stayed_h.numel())
    cells = [tensors[2]]
    for t in range(1, steps + 1):  # the masks of the first steps do not depend on how many follow
        cells.append(rk.ops.lstm(tensors[0][:t], *tensors[1:], zoneout=0.3, zoneout_cell=0.2, seed=4)[2])
    cells = torch.stack(cells)
    stayed_c = cells[1:] == cells[:-1]
    assert within(stayed_c.double().mean(), 0.2, stayed_c.numel())
    assert within((stayed_h & stayed_c).double().mean(), 0.06, stayed_c.numel())  # independently of one another


def test_dropconnect_masks_the_recurrent_weight_once_for_a_pass():
    size = 64
    module = rk.RNN(1, size, nonlinearity="identity", bias=False, weight_dropout=0.3, dtype=torch.float64)
    basis = torch.eye(size).double()[None]
    output, _ = module(torch.zeros(2, size, 1).double(), basis)
    dropped = output[0].t()  # what each unit vector becomes is a column of the weight
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, module.weight_hh_l0 / 0.7, 0.0))
    torch.testing.assert_close(output[1], output[0] @ dropped.t())
    assert within((~kept).double().mean(), 0.3, kept.numel())
    (gradient,) = torch.autograd.grad(output[0].sum(), module.weight_hh_l0)
    torch.testing.assert_close(gradient, kept.double() / 0.7)
    again, _ = module(torch.zeros(2, size, 1).double(), basis)
    assert not torch.equal(again, output)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_shared_and_not(dtype, probability):
    input = torch.randn(20, 30, 40, dtype=dtype, requires_grad=True)
    scale = torch.tensor(1 / (1 - probability), dtype=dtype)
    for shared in (False, True):
        output = rk.ops.dropout(input, probability, seed=6, shared=shared)
        cotangent = torch.randn_like(output)
        (gradient,) = torch.autograd.grad(output, input, cotangent)
        zero = output == 0
        assert torch.equal(output, torch.where(zero, 0, input * scale))
        assert torch.equal(gradient, torch.where(zero, 0, cotangent * scale))
        assert bool((zero == zero[0]).all()) == shared
        count = zero[0].numel() if shared else zero.numel()
        assert within(zero[:1].double().mean() if shared else zero.double().mean(), probability, count)
        expected = squares.dropped(6, squares.ELEMENTS, probability, (30, 40) if shared else (20, 30, 40))
        np.testing.assert_array_equal(zero[0] if shared else zero, expected)


def test_dropout_at_its_limits():
    input = torch.randn(5, 4, requires_grad=True)
    assert rk.ops.dropout(input, 0.0) is input
    assert rk.ops.dropout(input, 0.5, training=False) is input
    output = rk.ops.dropout(input, 1.0)
    assert not output.any()
    assert not torch.autograd.grad(output.sum(), input)[0].any()
    assert rk.ops.dropout(torch.ones(()), 0.5, seed=1).shape == ()
    assert rk.ops.dropout(torch.ones(0, 3), 0.5, seed=1).shape == (0, 3)
    torch.autograd.gradcheck(lambda x: rk.ops.dropout(x, 0.3, seed=2), input.double())
    torch.autograd.gradgradcheck(lambda x: rk.ops.dropout(x, 0.3, seed=2).square(), input.double())
    transposed = torch.randn(4, 6).t()
    torch.testing.assert_close(
        rk.ops.dropout(transposed, 0.5, seed=1), rk.ops.dropout(transposed.contiguous(), 0.5, seed=1)
    )


MASKED = {
    "rnn": {"zoneout": 0.3, "recurrent_dropout": 0.3},
    "gru": {"zoneout": 0.3, "recurrent_dropout": 0.3},
    "lstm": {"zoneout": 0.3, "recurrent_dropout": 0.3, "zoneout_cell": 0.3},
}
ONE_MASK = [(operator, {name: 0.3}) for operator, masks in MASKED.items() for name in masks]


@pytest.mark.parametrize(("operator", "options"), ONE_MASK, ids=str)
def test_the_seed_makes_the_mask(operator, options):
    tensors = arguments(6, 3, 4, 5, torch.float64, operator=operator)
    function = getattr(rk.ops, operator)
    first, second = (function(*tensors, **options, seed=seed)[-1] for seed in (1, 1))
    assert torch.equal(first, second)
    assert torch.equal(first, function(*tensors, **options, seed=torch.tensor(1))[-1])
    assert not torch.equal(first, function(*tensors, **options, seed=2)[-1])
    drawn = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        drawn.append(function(*tensors, **options)[-1])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(function(*tensors, **options)[-1], function(*tensors, **options)[-1])


@pytest.mark.parametrize("operator", OPERATORS)
def test_out_of_training_nothing_is_drawn(operator):
    tensors = arguments(6, 3, 4, 5, torch.float64, operator=operator)
    state = torch.get_rng_state()
    function = getattr(rk.ops, operator)
    results = function(*tensors, **MASKED[operator], training=False)
    function(*tensors, **MASKED[operator], seed=1)
    function(*tensors, seed=None, grad_clip=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    expected = function(*tensors, **{**MASKED[operator], "recurrent_dropout": 0.0}, training=False)
    torch.testing.assert_close(results, expected, rtol=0, atol=0)
    function(*tensors, **MASKED[operator])
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_draws_once_in_training_and_never_out_of_it(kind):
    options = {"zoneout": 0.2, "recurrent_dropout": 0.2, "weight_dropout": 0.2, "dropout": 0.2}
    module = getattr(rk, kind)(3, 4, 2, bidirectional=True, **options)
    input = torch.randn(5, 2, 3)
    torch.manual_seed(3)
    first = module(input)[0]
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.randint(2**62, ())
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(3)
    assert torch.equal(module(input)[0], first)
    assert not torch.equal(module(input)[0], first)
    before = torch.get_rng_state()
    module.eval()
    assert torch.equal(module(input)[0], module(input)[0])
    getattr(rk, kind)(3, 4, device="meta")
    plain = getattr(rk, kind)(3, 4, 2, layer_norm=True, grad_clip=1.0, device="meta").to_empty(device="cpu")
    plain(input)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["zoneout", "recurrent_dropout", "weight_dropout", "zoneout_cell"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_and_direction_has_its_own_masks(kind, name):
    if name == "zoneout_cell" and kind != "LSTM":
        pytest.skip("only the LSTM has a cell state")
    module = getattr(rk, kind)(8, 8, 2, bidirectional=True, bias=False, dtype=torch.float64, **{name: 0.5})
    with torch.no_grad():  # the same weights everywhere, and nothing from below
        for parameter_name, parameter in module.named_parameters():
            parameter.zero_() if "_ih_" in parameter_name else parameter.copy_(module.weight_hh_l0)
    hx = torch.ones(4, 1, 8).double()
    # The steps of one direction are the other's: all four would agree if they shared a mask.
    final = module(torch.zeros(1, 1, 8).double(), (hx, hx) if kind == "LSTM" else hx)[1]
    states = final[1] if name == "zoneout_cell" else final[0] if kind == "LSTM" else final
    for a, b in itertools.combinations(states, 2):
        assert not torch.equal(a, b)


def pieces_of(starts, sequence_length):
    """Slices between the steps at which sequences start."""
    edges = sorted({0, *starts, sequence_length})
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("at_the_start", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_reset_is_the_pieces_run_one_after_the_other(operator, at_the_start, reverse, dtype):
    sequence_length, batch = 9, 3
    tensors = arguments(sequence_length, batch, 4, 5, dtype, operator=operator)
    first_weight = names_of(operator).index("weight_ih")
    input, states, weights = tensors[0], tensors[1:first_weight], tensors[first_weight:]
    reset = torch.zeros(sequence_length, batch, dtype=torch.bool)
    starts = [[4], [], [1, 2, 7]]
    first_taken = sequence_length - 1 if reverse else 0
    for b, steps in enumerate(starts):
        reset[steps, b] = True
        reset[first_taken, b] = at_the_start
    function = getattr(rk.ops, operator)
    results = function(*tensors, reset=reset, reverse=reverse)
    for b, steps in enumerate(starts):
        edges = [step + 1 for step in steps] if reverse else steps
        pieces = pieces_of(edges, sequence_length)
        state = [torch.zeros_like(s[b : b + 1]) if at_the_start else s[b : b + 1] for s in states]
        for piece in reversed(pieces) if reverse else pieces:
            output, *last = function(input[piece, b : b + 1], *state, *weights, reverse=reverse)
            torch.testing.assert_close(results[0][piece, b : b + 1], output)
            state = [torch.zeros_like(s) for s in state]
        torch.testing.assert_close([final[b : b + 1] for final in results[1:]], last)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_forgets_in_both_directions(kind, batch_first):
    module = getattr(rk, kind)(3, 4, 2, bidirectional=True, batch_first=batch_first, dtype=torch.float64)
    sequence_length, batch = 8, 2
    input, starts = torch.randn(sequence_length, batch, 3).double(), [[3], [1, 6]]
    hx = [torch.randn(4, batch, 4).double() for _ in module.state_names]
    reset = torch.zeros(sequence_length, batch, dtype=torch.bool)
    for b, steps in enumerate(starts):
        reset[steps, b] = True

    def run(input, hx, reset=None):
        input, reset = (t if t is None or not batch_first else t.transpose(0, 1) for t in (input, reset))
        output, final = module(input, tuple(hx) if kind == "LSTM" else hx[0], reset=reset)
        return output.transpose(0, 1) if batch_first else output, final if kind == "LSTM" else (final,)

    output, final = run(input, hx, reset)
    for b, steps in enumerate(starts):
        pieces = pieces_of(steps, sequence_length)
        for piece in pieces:
            # States come in where the whole sequence starts, in each direction, and leave where it ends.
            state = [torch.zeros(4, 1, 4).double() for _ in hx]
            for given, mine in zip(hx, state, strict=True):
                if piece is pieces[0]:
                    mine[0::2] = given[0::2, b : b + 1]
                if piece is pieces[-1]:
                    mine[1::2] = given[1::2, b : b + 1]
            alone, last = run(input[piece, b : b + 1], state)
            torch.testing.assert_close(output[piece, b : b + 1], alone)
            for whole, part in zip(final, last, strict=True):
                if piece is pieces[-1]:
                    torch.testing.assert_close(whole[0::2, b : b + 1], part[0::2])
                if piece is pieces[0]:
                    torch.testing.assert_close(whole[1::2, b : b + 1], part[1::2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_without_a_batch(kind):
    module = getattr(rk, kind)(3, 4, bidirectional=True, dtype=torch.float64)
    input, reset = torch.randn(6, 3).double(), torch.tensor([0, 0, 1, 0, 0, 1]).bool()
    output, _ = module(input, reset=reset)
    for piece in (slice(0, 2), slice(2, 5), slice(5, 6)):
        torch.testing.assert_close(output[piece], module(input[piece])[0])


COMMON = {"zoneout": 0.3, "recurrent_dropout": 0.2, "weight_dropout": 0.25, "dropout": 0.4, "layer_norm": True}
MODULE_OPTIONS = {
    "RNN": [{}, {"nonlinearity": "sigmoid"}],
    "GRU": [{}, {"reset_after": False}],
    "LSTM": [{}, {"peephole": True, "zoneout_cell": 0.2, "proj_size": 3}],
}


def in_a_loop(module, input, hx, lengths, reset, seed):
    """What a module computes, step by step over :mod:`rnnkernels.reference`'s cells, with the witness's masks."""
    kind, sequence_length, batch = type(module).__name__, *input.shape[:2]
    seeds = itertools.count(seed + 1)

    def mask(stream, probability, shape, seed=None):
        seed = next(seeds) if seed is None else seed
        return torch.from_numpy(squares.dropped(seed, stream, probability, tuple(shape)))

    def kept(stream, probability, shape, seed=None):
        return (~mask(stream, probability, shape, seed)).double() / (1 - probability)

    layer_input, final, state_index = input, [], 0
    for layer in range(module.num_layers):
        outputs = []
        for suffix in ("", "_reverse") if module.bidirectional else ("",):
            which = f"_l{layer}{suffix}"
            weights = {n.removesuffix(which): p for n, p in module.named_parameters() if n.endswith(which)}
            if module.training and module.weight_dropout:
                shape = weights["weight_hh"].shape
                weights["weight_hh"] = weights["weight_hh"] * kept(squares.ELEMENTS, module.weight_dropout, shape)
            mask_seed = next(seeds) if module.training else None
            states = [state[state_index] for state in hx]
            state_index += 1
            seen = None
            if module.training and module.recurrent_dropout:
                seen = kept(squares.RECURRENT, module.recurrent_dropout, states[0].shape, mask_seed)
            zones = []
            probabilities = module.zoneout, getattr(module, "zoneout_cell", 0.0)
            for state, p, stream in zip(states, probabilities, (squares.ZONEOUT, squares.ZONEOUT_CELL), strict=False):
                drawn = module.training and p
                shape = sequence_length, *state.shape
                zones.append(
                    mask(stream, p, shape, mask_seed).double() if drawn else torch.full(shape, p, dtype=torch.float64)
                )
            output = torch.zeros(sequence_length, *states[0].shape).double()
            cell = getattr(rk.reference, f"{kind.lower()}_cell")
            named = {n: getattr(module, n) for n in ("nonlinearity", "reset_after") if hasattr(module, n)}
            for t in reversed(range(sequence_length)) if suffix else range(sequence_length):
                fresh = torch.zeros(batch, 1).double()
                if reset is not None:
                    following = (
                        torch.zeros_like(reset[0]) if t + 1 == sequence_length else reset[min(t + 1, len(reset) - 1)]
                    )
                    fresh = (following if suffix else reset[t])[:, None].double()
                old = [state * (1 - fresh) for state in states]
                new = cell(layer_input[t], *old, **weights, **named, recurrent_mask=seen, grad_clip=module.grad_clip)
                new = new if isinstance(new, tuple) else (new,)
                mixed = [zone[t] * o + (1 - zone[t]) * n for zone, o, n in zip(zones, old, new, strict=True)]
                running = (t < lengths)[:, None].double() if lengths is not None else torch.ones(batch, 1).double()
                output = output.index_put((torch.tensor(t),), mixed[0] * running)
                states = [running * m + (1 - running) * s for m, s in zip(mixed, states, strict=True)]
            outputs.append(output)
            final.append(states)
        layer_input = torch.cat(outputs, -1)
        if module.training and module.dropout and layer + 1 < module.num_layers:
            layer_input = layer_input * kept(squares.ELEMENTS, module.dropout, layer_input.shape)
    return [layer_input, *(torch.stack(kind) for kind in zip(*final, strict=True))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "own"), [(kind, own) for kind in KINDS for own in MODULE_OPTIONS[kind]], ids=str)
def test_a_module_with_every_option_is_a_loop_over_steps(kind, own, training):
    module = getattr(rk, kind)(3, 5, 2, bidirectional=True, dtype=torch.float64, grad_clip=0.1, **COMMON, **own)
    module.train(training)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("norm"):
                parameter.add_(torch.randn_like(parameter) / 4)
    input = torch.randn(6, 3, 3, dtype=torch.float64, requires_grad=True)
    hx = [torch.randn(4, 3, size, dtype=torch.float64, requires_grad=True) for size in module._state_sizes()]
    lengths, reset = torch.tensor([4, 6, 1]), torch.rand(6, 3) < 0.25
    torch.manual_seed(9)
    seed = int(torch.randint(2**62, ()))
    torch.manual_seed(9)
    output, final = module(input, tuple(hx) if kind == "LSTM" else hx[0], lengths=lengths, reset=reset)
    actual = [output, *(final if kind == "LSTM" else (final,))]
    expected = in_a_loop(module, input, hx, lengths, reset, seed)
    torch.testing.assert_close(actual, expected)
    cotangents = [torch.randn_like(result) for result in actual]
    leaves = (input, *hx, *module.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(results, leaves, cotangents) for results in (actual, expected)))


@pytest.mark.parametrize("kind", KINDS)
def test_zoneout_out_of_training_is_the_expectation_in_a_loop_over_torchs_cell(kind):
    module = getattr(rk, kind)(3, 4, zoneout=0.3, dtype=torch.float64).eval()
    cell = getattr(torch.nn, f"{kind}Cell")(3, 4, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    input, h, c = torch.randn(6, 2, 3).double(), torch.zeros(2, 4).double(), torch.zeros(2, 4).double()
    output, _ = module(input)
    for t in range(6):
        new, c = cell(input[t], (h, c)) if kind == "LSTM" else (cell(input[t], h), None)
        h = 0.3 * h + 0.7 * new
        torch.testing.assert_close(output[t], h)


@pytest.mark.parametrize("kind", KINDS)
def test_options_that_do_nothing_change_nothing(kind):
    plain = getattr(rk, kind)(3, 4, 2, bidirectional=True, dtype=torch.float64)
    idle = getattr(rk, kind)(3, 4, 2, bidirectional=True, dtype=torch.float64, grad_clip=1e9, recurrent_dropout=0.5)
    idle.load_state_dict(plain.state_dict())
    input = torch.randn(5, 2, 3).double()
    torch.testing.assert_close(idle.eval()(input), plain(input))
    reset = torch.zeros(5, 2, dtype=torch.bool)
    torch.testing.assert_close(plain(input, reset=reset, lengths=torch.tensor([5, 5])), plain(input))


def test_new_parameters_of_options():
    module = rk.LSTM(3, 4, 2, bidirectional=True, proj_size=2, peephole=True, layer_norm=True)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    added = {
        "weight_peephole": (3, 4),
        "norm_ih": (16,),
        "norm_hh": (16,),
        "norm_cell_weight": (4,),
        "norm_cell_bias": (4,),
    }
    for name, shape in added.items():
        for which in ("l0", "l0_reverse", "l1", "l1_reverse"):
            assert shapes[f"{name}_{which}"] == shape
    assert len(shapes) == 4 * (5 + len(added))
    assert (module.norm_ih_l0 == 1).all()
    assert (module.norm_cell_weight_l1 == 1).all()
    assert (module.norm_cell_bias_l0_reverse == 0).all()
    assert module.weight_peephole_l1.abs().max() <= 0.5
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(9.0)
    module.reset_parameters()
    assert (module.norm_hh_l1_reverse == 1).all()
    assert (module.norm_cell_bias_l0 == 0).all()
    assert module.weight_peephole_l0.abs().max() <= 0.5
    assert set(dict(rk.RNN(3, 4, layer_norm=True).named_parameters())) - set(dict(rk.RNN(3, 4).named_parameters())) == {
        "norm_hh_l0"
    }
    # A checkpoint of torch's fits what is left of the options.
    missing, unexpected = rk.GRU(3, 4, layer_norm=True).load_state_dict(torch.nn.GRU(3, 4).state_dict(), strict=False)
    assert set(missing) == {"norm_ih_l0", "norm_hh_l0"}
    assert not unexpected


def test_training_with_options_goes_down():
    module = rk.LSTM(2, 8, 2, dropout=0.1, recurrent_dropout=0.1, zoneout=0.1, layer_norm=True, peephole=True)
    head = torch.nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], 0.02)
    input = torch.randn(12, 16, 2)
    target = input[..., :1].cumsum(0) / 3
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(head(module(input)[0]), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


BAD_OPTIONS = [
    (ValueError, r"recurrent_dropout: expected a probability from 0 to 1, got 1\.5", {"recurrent_dropout": 1.5}),
    (ValueError, r"zoneout: expected a probability from 0 to 1, got -0\.1", {"zoneout": -0.1}),
    (ValueError, "zoneout: expected a probability from 0 to 1, got nan", {"zoneout": math.nan}),
    (TypeError, "zoneout: expected a float, got bool", {"zoneout": True}),
    (TypeError, "recurrent_dropout: expected a float, got str", {"recurrent_dropout": "0.5"}),
    (ValueError, "grad_clip: expected a positive bound, got 0", {"grad_clip": 0}),
    (ValueError, r"grad_clip: expected a positive bound, got -1\.0", {"grad_clip": -1.0}),
    (ValueError, "grad_clip: expected a positive bound, got nan", {"grad_clip": math.nan}),
    (TypeError, "grad_clip: expected a float or None, got bool", {"grad_clip": True}),
    (TypeError, "grad_clip: expected a float or None, got str", {"grad_clip": "1"}),
]
BAD_OPERATOR_OPTIONS = [
    (TypeError, "training: expected a bool, got int", {"training": 1}),
    (TypeError, "seed: expected an integer, got float", {"seed": 1.0}),
    (TypeError, "seed: expected an integer, got bool", {"seed": True}),
    (ValueError, "seed: expected a 64-bit integer, got", {"seed": 2**63}),
    (TypeError, "seed: expected an integer or an int64 scalar on the CPU, got", {"seed": torch.tensor([1])}),
    (TypeError, "seed: expected an integer or an int64 scalar on the CPU, got", {"seed": torch.tensor(1.0)}),
    (ValueError, r"norm_hh: expected shape \(\d+\), got \(7,\)", {"norm_hh": torch.ones(7)}),
    (TypeError, "norm_hh: expected a Tensor, got bool", {"norm_hh": True}),
    (TypeError, "norm_hh: expected dtype torch.float32, as input has", {"norm_hh": torch.ones(1).double()}),
    (TypeError, "reset: expected a Tensor, got bool", {"reset": True}),
    (TypeError, "reset: expected dtype torch.bool, got torch.int64", {"reset": torch.zeros(5, 3, dtype=torch.int64)}),
    (ValueError, r"reset: expected shape \(5, 3\), got \(3, 5\)", {"reset": torch.zeros(3, 5).bool()}),
]


@pytest.mark.parametrize(("error", "message", "options"), [*BAD_OPTIONS, *BAD_OPERATOR_OPTIONS])
@pytest.mark.parametrize("operator", OPERATORS)
def test_bad_options_of_operators_are_refused_by_name(operator, error, message, options):
    if options.get("norm_hh") is not None and torch.is_tensor(options["norm_hh"]) and len(options["norm_hh"]) == 1:
        options = {"norm_hh": torch.ones({"rnn": 4, "gru": 12, "lstm": 16}[operator]).double()}
    tensors = arguments(5, 3, 2, 4, torch.float32, operator=operator)
    with pytest.raises(error, match=f"^{message}"):
        getattr(rk.ops, operator)(*tensors, **options)


@pytest.mark.parametrize(("error", "message", "options"), BAD_OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_options_of_modules_are_refused_by_name(kind, error, message, options):
    with pytest.raises(error, match=f"^{message}"):
        getattr(rk, kind)(3, 4, **options)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "zoneout_cell: expected a probability", lambda: rk.LSTM(3, 4, zoneout_cell=2.0)),
        (ValueError, "weight_dropout: expected a probability", lambda: rk.RNN(3, 4, weight_dropout=2.0)),
        (ValueError, "p: expected a probability", lambda: rk.ops.dropout(torch.ones(2), 1.5)),
        (TypeError, "p: expected a float, got str", lambda: rk.ops.dropout(torch.ones(2), "half")),
        (TypeError, "input: expected a Tensor, got list", lambda: rk.ops.dropout([1.0])),
        (
            TypeError,
            "input: expected a floating-point dtype, got torch.int64",
            lambda: rk.ops.dropout(torch.ones(2).long()),
        ),
        (ValueError, "input: expected at least 1 dimension", lambda: rk.ops.dropout(torch.ones(()), shared=True)),
        (TypeError, "seed: expected an integer, got str", lambda: rk.ops.dropout(torch.ones(2), seed="1")),
        (TypeError, "unexpected keyword", lambda: rk.RNN(3, 4, zoneout_cell=0.1)),
        (TypeError, "unexpected keyword", lambda: rk.GRU(3, 4, peephole=True)),
        (TypeError, "unexpected keyword", lambda: rk.LSTM(3, 4, reset_after=False)),
        (TypeError, "positional", lambda: rk.LSTM(3, 4, 1, True, False, 0.0, False, 0, None, None, True)),
    ],
)
def test_other_bad_options_are_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


def saved_bytes(operator, tensors, **options):
    """What an operator keeps for its backward pass, its arguments apart."""
    weights = [value for value in options.values() if isinstance(value, torch.Tensor)]
    with rk.diagnostics.measure_saved_tensors(exclude=[*(t for t in tensors if t is not None), *weights]) as saved:
        results = getattr(rk.ops, operator)(*tensors, **options)
    results[0].sum().backward()
    return saved.current if saved.current else saved.peak


@pytest.mark.parametrize("names", [(), ("lengths",), ("reverse",)], ids=str)
@pytest.mark.parametrize("operator", ["gru", "lstm"])
def test_recomputed_gates_are_not_kept(operator, names):
    sizes = sequence_length, batch, _, hidden_size = 11, 3, 2, 5
    tensors, options = case(operator, names, sizes)
    kept, recomputed = (saved_bytes(operator, tensors, **options, recompute_gates=choice) for choice in (False, True))
    assert kept - recomputed == sequence_length * batch * 4 * hidden_size * 8


@pytest.mark.parametrize(
    ("operator", "names", "parts"),
    [
        ("rnn", (), 0),
        ("rnn", ("zoneout",), 1),
        ("rnn", ("norm_hh",), 2),
        ("gru", ("zoneout",), 4),
        ("gru", ("norm_hh",), 7),
        ("gru", ("reset_before",), 4),
        ("lstm", ("zoneout",), 4),
        ("lstm", ("norm_hh", "zoneout_cell"), 9),
    ],
    ids=str,
)
def test_what_options_add_is_recomputed_too(operator, names, parts):
    sizes = sequence_length, batch, _, hidden_size = 11, 3, 2, 5
    tensors, options = case(operator, names, sizes)
    kept, recomputed = (saved_bytes(operator, tensors, **options, recompute_gates=choice) for choice in (False, True))
    assert kept - recomputed == sequence_length * batch * parts * hidden_size * 8


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
def test_a_recomputing_lstm_on_onednn_keeps_its_arguments_alone():
    tensors, _ = case("lstm", (), (11, 3, 2, 5), torch.float32)
    assert saved_bytes("lstm", tensors) >= 11 * 3 * 5 * 5 * 4
    assert saved_bytes("lstm", tensors, recompute_gates=True) == 0
    kept, recomputed = (
        torch.autograd.grad(rk.ops.lstm(*tensors, recompute_gates=choice)[0].square().sum(), tensors)
        for choice in (False, True)
    )
    for a, b in zip(kept, recomputed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.interpreter
@pytest.mark.parametrize("names", [(), ("lengths", "reverse"), ("zoneout", "norm_hh")], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_recomputed_gates_on_triton_match_the_reference(kernel_device, operator, names):
    tensors, options = case(operator, names, (5, 3, 2, 5), torch.float32)
    tensors = [t if t is None else t.detach().to(kernel_device).requires_grad_() for t in tensors]
    options = {k: v.detach().to(kernel_device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    options = {k: v.requires_grad_() if k.startswith("norm") else v for k, v in options.items()}
    with rk.use_backend("triton"):
        assert_parity(tensors, 5e-6, operator, **options, recompute_gates=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [None, "unsorted"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("operator", ["gru", "lstm"])
@pytest.mark.parametrize("by_steps", [False, True])
def test_gates_that_are_not_kept_exist_a_piece_of_time_at_once(
    monkeypatch, kernel_device, operator, reverse, order, dtype, by_steps
):
    steps, batch, size = 7, 5, 6
    monkeypatch.setattr(_sequence, "AT_ONCE", 2 * batch * 4 * size)  # two steps, so three pieces and a rest
    module, pieces = importlib.import_module(f"rnnkernels.kernels.triton.{operator}"), []
    forward = module.forward
    if by_steps:
        monkeypatch.setattr(module, "choose", lambda cell, size, batch, *_: module.step_design(cell, size, batch))
    monkeypatch.setattr(module, "forward", lambda gates, *rest: (pieces.append(len(gates)), forward(gates, *rest))[1])
    tensors = arguments(steps, batch, 3, size, dtype, kernel_device, operator=operator)
    lengths = order and random_lengths(batch, steps, order).to(kernel_device)
    tolerance = 5e-6 if dtype == torch.float32 else 2e-2
    with rk.use_backend("triton"):
        assert_parity(tensors, tolerance, operator, reverse=reverse, lengths=lengths, recompute_gates=True)
        assert sorted(pieces) == [1, 2, 2, 2]
        pieces.clear()
        run = getattr(rk.ops, operator)
        with torch.no_grad():  # nothing is kept either
            found = run(*tensors, reverse=reverse, lengths=lengths)
        assert sorted(pieces) == [1, 2, 2, 2]
        whole = run(*tensors, reverse=reverse, lengths=lengths)
    assert len(pieces) == 5
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=0)


@pytest.mark.interpreter
@pytest.mark.parametrize("network", [{"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_a_long_sequence_runs_in_pieces_where_nothing_is_kept(monkeypatch, kernel_device, kind, network):
    module, input = getattr(rk, kind)(3, 70, **network).to(kernel_device), torch.randn(7, 5, 3, device=kernel_device)
    kernels, most = importlib.import_module(f"rnnkernels.kernels.triton.{kind.lower()}"), []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda gates, *rest: (most.append(gates.numel()), forward(gates, *rest))[1])
    with rk.use_backend("triton"):
        whole = module(input)
        most.clear()
        monkeypatch.setattr(_sequence, "AT_ONCE", 2 * 5 * 4 * 70)
        assert len(module(input)[0]) == 7  # the gates are kept
        assert max(most, default=7 * 5 * 4 * 70) >= 7 * 5 * 4 * 70
        most.clear()
        with torch.no_grad():
            found = module(input)
    assert max(most) == 2 * 5 * 4 * 70
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_recomputed_gates_are_finite_in_padding(operator, reverse):
    tensors, options = case(operator, ("lengths", "zoneout"), (5, 3, 2, 4))
    ended = (torch.arange(5).unsqueeze(1) >= options["lengths"]).unsqueeze(-1)
    tensors[0] = tensors[0].detach().masked_fill(ended, float("nan")).requires_grad_()
    for some in (options, {"lengths": options["lengths"]}):
        results = getattr(rk.ops, operator)(*tensors, **some, reverse=reverse, recompute_gates=True)
        gradients = torch.autograd.grad(results, tensors, [torch.randn_like(result) for result in results])
        assert all(gradient.isfinite().all() for gradient in gradients[1:2])
        assert not gradients[0].masked_fill(~ended, 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_modules_recompute_gates(kind):
    input = torch.randn(6, 3, 4, dtype=torch.float64)
    gradients, sizes = [], []
    for recompute_gates in (False, True):
        torch.manual_seed(3)
        options = {"num_layers": 2, "bidirectional": True, "zoneout": 0.2, "recompute_gates": recompute_gates}
        module = getattr(rk, kind)(4, 5, dtype=torch.float64, **options)
        with rk.diagnostics.measure_saved_tensors() as saved:
            output, _ = module(input)
        sizes.append(saved.peak)
        output.square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert sizes[0] - sizes[1] == 4 * 6 * 3 * (1 if kind == "RNN" else 4) * 5 * 8
    assert "recompute_gates=True" in repr(module)
    with pytest.raises(TypeError, match="recompute_gates: expected a bool, got int"):
        getattr(rk, kind)(4, 5, recompute_gates=1)
