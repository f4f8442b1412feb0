"""The reference beside NumPy loops written from the equations, and beside ``torch.nn``."""

import itertools

import numpy as np
import pytest
import squares
import torch
from parity import arguments, extra_weights, names_of, random_lengths

import rnnkernels as rk


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


ACTIVATIONS = {"tanh": np.tanh, "relu": lambda a: np.maximum(a, 0), "sigmoid": sigmoid, "identity": lambda a: a}


def normalized(a, gain):
    """A vector with mean 0 and variance 1, times the gain; as it is without one."""
    return a if gain is None else gain * (a - a.mean()) / np.sqrt(((a - a.mean()) ** 2).mean() + 1e-5)


def rnn_step(w, x, h, _, seen, nonlinearity="tanh"):
    a = normalized(w["weight_ih"] @ x + w["weight_hh"] @ seen, w.get("norm_hh"))
    return ACTIVATIONS[nonlinearity](a + w["bias_ih"] + w["bias_hh"]), None


def gru_step(w, x, h, _, seen, reset_after=True):
    size = len(h)

    def product(rows, kind, vector):
        gain = w.get(f"norm_{kind}")
        return normalized(w[f"weight_{kind}"][rows] @ vector, None if gain is None else gain[rows])

    def bias(rows, kind):
        return w[f"bias_{kind}"][rows]

    both, last = slice(0, 2 * size), slice(2 * size, 3 * size)
    gates = sigmoid(product(both, "ih", x) + bias(both, "ih") + product(both, "hh", seen) + bias(both, "hh"))
    r, z = gates[:size], gates[size:]
    if reset_after:
        recurrent = r * (product(last, "hh", seen) + bias(last, "hh"))
    else:
        recurrent = product(last, "hh", r * seen) + bias(last, "hh")
    n = np.tanh(product(last, "ih", x) + bias(last, "ih") + recurrent)
    return (1 - z) * n + z * h, None


def lstm_step(w, x, h, c, seen):
    a = normalized(w["weight_ih"] @ x, w.get("norm_ih")) + normalized(w["weight_hh"] @ seen, w.get("norm_hh"))
    i, f, g, o = np.split(a + w["bias_ih"] + w["bias_hh"], 4)
    p = w.get("weight_peephole", np.zeros((3, 1)))
    c = sigmoid(f + p[1] * c) * c + sigmoid(i + p[0] * c) * np.tanh(g)
    shown = normalized(c, w.get("norm_cell_weight")) + w.get("norm_cell_bias", 0)
    h = sigmoid(o + p[2] * c) * np.tanh(shown)
    return w["weight_hr"] @ h if "weight_hr" in w else h, c


STEPS = {"rnn": rnn_step, "gru": gru_step, "lstm": lstm_step}


def in_numpy(
    operator,
    tensors,
    *,
    reverse=False,
    lengths=None,
    reset=None,
    recurrent_dropout=0.0,
    zoneout=0.0,
    zoneout_cell=0.0,
    training=True,
    seed=None,
    **options,
):
    """One row after the other, one step after the other."""
    w = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    sequence_length, batch, _ = w["input"].shape
    output = np.zeros((sequence_length, batch, w["h_0"].shape[1]))
    final = [], []
    for b in range(batch):
        h, c = w["h_0"][b], w["c_0"][b] if "c_0" in w else None
        steps = range(sequence_length if lengths is None else lengths[b])
        for t in reversed(steps) if reverse else steps:
            if reset is not None and reset[t, b]:
                h, c = 0 * h, None if c is None else 0 * c
            seen = h
            if training and recurrent_dropout:
                missing = squares.dropped(seed, squares.RECURRENT, recurrent_dropout, w["h_0"].shape)[b]
                seen = np.where(missing, 0, h / (1 - recurrent_dropout))
            new_h, new_c = STEPS[operator](w, w["input"][t, b], h, c, seen, **options)
            mixed = []
            for old, new, probability, stream in (
                (h, new_h, zoneout, squares.ZONEOUT),
                (c, new_c, zoneout_cell, squares.ZONEOUT_CELL),
            ):
                if old is None or not probability:
                    mixed.append(new)
                elif training:
                    stays = squares.dropped(seed, stream, probability, (sequence_length, batch, len(old)))[t, b]
                    mixed.append(np.where(stays, old, new))
                else:
                    mixed.append(probability * old + (1 - probability) * new)
            h, c = mixed
            output[t, b] = h
        final[0].append(h)
        final[1].append(c)
    states = [np.array(kind) for kind in final]
    return [output, *(states if operator == "lstm" else states[:1])]


VARIANTS = {
    "plain": {},
    "zoneout": {"zoneout": 0.3, "seed": 5},
    "zoneout out of training": {"zoneout": 0.3, "training": False},
    "recurrent dropout": {"recurrent_dropout": 0.4, "seed": -7},
    "both": {"zoneout": 0.2, "recurrent_dropout": 0.3, "seed": 2**62},
}
ONLY = {
    "rnn": [{"nonlinearity": name} for name in rk.ops.NONLINEARITIES],
    "gru": [{"reset_after": True}, {"reset_after": False}],
    "lstm": [{}, {"zoneout_cell": 0.4, "seed": 3}, {"zoneout_cell": 0.4, "training": False}],
}
CASES = [
    (operator, {**variant, **only}, reverse)
    for operator in STEPS
    for variant, only, reverse in itertools.product(VARIANTS.values(), ONLY[operator], (False, True))
]


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize(("operator", "options", "reverse"), CASES, ids=str)
def test_numpy_gives_the_same(operator, options, reverse, with_weights):
    state_size = 3 if operator == "lstm" and with_weights else None
    tensors = arguments(6, 3, 2, 4, torch.float64, operator=operator, state_size=state_size)
    tensors = dict(zip(names_of(operator), tensors, strict=False))
    if with_weights:
        tensors |= extra_weights(operator, 4, torch.float64)
    for lengths, reset in ((None, None), (random_lengths(3, 6), None), (random_lengths(3, 6), torch.rand(6, 3) < 0.3)):
        options = {**options, "reverse": reverse, "lengths": lengths, "reset": reset}
        results = getattr(rk.reference, operator)(**tensors, **options)
        expected = in_numpy(operator, tensors, **options)
        for actual, wanted in zip(results, expected, strict=True):
            np.testing.assert_allclose(actual.detach(), wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["weight_peephole", "norm_ih", "norm_hh", "norm_cell"])
def test_numpy_gives_the_same_for_each_weight_of_the_lstm(name):
    tensors = dict(zip(names_of("lstm"), arguments(4, 2, 3, 5, torch.float64, operator="lstm"), strict=False))
    extra = extra_weights("lstm", 5, torch.float64)
    tensors |= {key: value for key, value in extra.items() if key.startswith(name)}
    for actual, wanted in zip(rk.reference.lstm(**tensors), in_numpy("lstm", tensors), strict=True):
        np.testing.assert_allclose(actual.detach(), wanted, rtol=1e-10, atol=1e-13)


def test_the_lstms_cell_state_enters_the_hidden_state_before_its_zoneout():
    tensors = arguments(1, 1, 2, 4, torch.float64, operator="lstm")
    _, h, c = rk.reference.lstm(*tensors)
    _, kept_h, kept_c = rk.reference.lstm(*tensors, zoneout_cell=1.0, seed=0)
    assert torch.equal(kept_c, tensors[2])
    assert torch.equal(kept_h, h)
    assert not torch.equal(c, kept_c)


@pytest.mark.parametrize(
    ("kind", "options", "module_options"),
    [
        ("RNN", {"nonlinearity": "tanh"}, {"nonlinearity": "tanh"}),
        ("RNN", {"nonlinearity": "relu"}, {"nonlinearity": "relu"}),
        ("GRU", {}, {}),
        ("LSTM", {}, {}),
        ("LSTM", {}, {"proj_size": 2}),
    ],
)
def test_torch_gives_the_same(kind, options, module_options):
    module = getattr(torch.nn, kind)(3, 4, dtype=torch.float64, **module_options)
    sizes = (module_options.get("proj_size", 4), 4)[: 2 if kind == "LSTM" else 1]
    input, states = torch.randn(7, 2, 3).double(), [torch.randn(2, size).double() for size in sizes]
    results = getattr(rk.reference, kind.lower())(input, *states, *module.all_weights[0])
    if options:
        results = getattr(rk.reference, kind.lower())(input, *states, *module.all_weights[0], **options)
    given = tuple(state[None] for state in states)
    output, final = module(input, given if kind == "LSTM" else given[0])
    final = final if kind == "LSTM" else (final,)
    torch.testing.assert_close(results, (output, *(state[0] for state in final)))


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_torchs_cell_gives_the_same_step(kind):
    cell = getattr(torch.nn, f"{kind}Cell")(3, 4, dtype=torch.float64)
    input, h, c = (torch.randn(2, size).double() for size in (3, 4, 4))
    weights = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    step = getattr(rk.reference, f"{kind.lower()}_cell")
    if kind == "LSTM":
        torch.testing.assert_close(step(input, h, c, *weights), cell(input, (h, c)))
    else:
        torch.testing.assert_close(step(input, h, *weights), cell(input, h))


@pytest.mark.parametrize("operator", STEPS)
def test_a_step_can_do_without_biases(operator):
    with_biases = arguments(1, 3, 2, 4, torch.float64, operator=operator)
    without = getattr(rk.reference, operator)(*with_biases[:-2])
    zeros = [torch.zeros_like(bias) for bias in with_biases[-2:]]
    torch.testing.assert_close(without, getattr(rk.reference, operator)(*with_biases[:-2], *zeros))


@pytest.mark.parametrize("operator", STEPS)
def test_clipping_bounds_the_gradient_of_what_is_activated(operator):
    # One step, one unit: the gradients of the biases are those of the activations' arguments.
    tensors = [10 * tensor.detach() for tensor in arguments(1, 1, 1, 1, torch.float64, operator=operator)]
    leaves = [(tensor / 20).requires_grad_() for tensor in tensors]
    gradients = []
    for bound in (None, 1e-3, 1e9):
        output = getattr(rk.reference, operator)(*leaves, grad_clip=bound)[0]
        gradients.append(torch.autograd.grad(output, leaves[-2:], torch.full_like(output, 100.0)))
    (free, _), (clipped, _), (loose, _) = gradients
    assert torch.equal(free, loose)
    assert clipped.abs().max() == 1e-3
    if operator == "gru":  # what reaches the reset gate has been clipped on its way through the candidate
        free, clipped = free[1:], clipped[1:]
    torch.testing.assert_close(clipped, free.clamp(-1e-3, 1e-3))


def test_masks_want_a_seed():
    for operator in STEPS:
        tensors = arguments(2, 1, 1, 2, torch.float64, operator=operator)
        for options in ({"zoneout": 0.5}, {"recurrent_dropout": 0.5}):
            with pytest.raises(ValueError, match=r"^seed: expected an integer"):
                getattr(rk.reference, operator)(*tensors, **options)
            getattr(rk.reference, operator)(*tensors, **options, training=False)
