"""The Triton kernels of any cell with any of its options: on a GPU where there is one, else in Triton's interpreter."""

import itertools

import pytest
import torch
from parity import GATES, assert_parity, assert_repeatable, drawn, names_of

import rnnkernels as rk

pytestmark = pytest.mark.interpreter

OPERATORS = list(GATES)
MASKED = {"recurrent_dropout": 0.4, "seed": 3}, {"zoneout": 0.3, "seed": 3}
OPTIONS = {
    "rnn": [
        {"norm_hh": True},
        {"norm_hh": True, "bias": False},
        {"lengths": True},
        {"lengths": True, "reverse": True},
        {"reset": True},
        *MASKED,
        {"zoneout": 0.3, "training": False},
        {"grad_clip": 0.05},
    ]
}
OPTIONS["gru"] = [*OPTIONS["rnn"], {"reset_after": False}]
OPTIONS["lstm"] = [
    *OPTIONS["rnn"],
    {"state_size": 5},
    {"weight_peephole": True},
    {"norm_cell_weight": True, "norm_cell_bias": True},
    {"zoneout_cell": 0.3, "seed": 3},
    {"zoneout_cell": 0.3, "training": False},
]
ALL = {
    operator: {k: v for option in options for k, v in option.items() if k not in ("training", "bias")}
    for operator, options in OPTIONS.items()
}
ALL["rnn"]["nonlinearity"] = "relu"


def pairs(operator):
    """Pairs of options that do not contradict each other."""
    for one, other in itertools.combinations(OPTIONS[operator], 2):
        if all(one[name] == other[name] for name in one.keys() & other.keys()):
            if {"training", "seed"} <= one.keys() | other.keys():
                continue  # no mask is drawn in evaluation
            yield {**one, **other}


@pytest.fixture(autouse=True)
def on_triton(kernel_device, monkeypatch):
    """Run everything on the kernels of a step: see ``test_persistent_options.py`` for the others."""
    from rnnkernels.kernels.triton import dispatch

    monkeypatch.setattr(dispatch, "PERSISTENT", {key: {} for key in dispatch.PERSISTENT})
    with rk.use_backend("triton"):
        yield


@pytest.mark.parametrize(("operator", "option"), [(o, option) for o in OPERATORS for option in OPTIONS[o]], ids=str)
def test_every_option_matches_the_reference(poisoned, kernel_device, operator, option):
    tensors, options = drawn(operator, 5, 5, 17, torch.float32, kernel_device, option)
    assert_parity(tensors, 1e-5, operator, **options)


@pytest.mark.parametrize(("operator", "pair"), [(o, pair) for o in OPERATORS for pair in pairs(o)], ids=str)
def test_every_pair_of_options_matches_the_reference(poisoned, kernel_device, operator, pair):
    tensors, options = drawn(operator, 3, 3, 17, torch.float32, kernel_device, pair)
    assert_parity(tensors, 1e-5, operator, **options)


@pytest.mark.parametrize(("lengths", "reset", "reverse"), list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("operator", OPERATORS)
def test_lengths_resets_and_directions(poisoned, kernel_device, operator, lengths, reset, reverse):
    flags = {"lengths": lengths or None, "reset": reset or None, "reverse": reverse}
    options = {"reset_after": False} if operator == "gru" else {"state_size": 5} if operator == "lstm" else {}
    tensors, options = drawn(operator, 5, 5, 3, torch.float32, kernel_device, {**flags, **options})
    assert_parity(tensors, 1e-5, operator, **options)


@pytest.mark.parametrize(
    ("operator", "option"), [("rnn", {}), ("gru", {}), ("gru", {"reset_after": False}), ("lstm", {})], ids=str
)
def test_the_gradient_of_every_gate_is_clipped(kernel_device, operator, option):
    tensors, options = drawn(operator, 2, 5, 17, torch.float32, kernel_device, {"grad_clip": 0.01, **option})
    with torch.no_grad():  # large products, so that even the reset gate's gradient, which others bound, exceeds it
        tensors[names_of(operator).index("weight_hh")].mul_(8)
    assert_parity(tensors, 1e-5, operator, **options)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("sequence_length", "batch", "hidden_size"), [(1, 1, 2), (17, 1, 17), (2, 129, 3), (3, 3, 300)]
)
def test_all_options_together_at_every_size(
    poisoned, kernel_device, operator, sequence_length, batch, hidden_size, norm
):
    options = {name: value for name, value in ALL[operator].items() if norm or not name.startswith("norm")}
    if not norm and operator == "gru":
        options["reset_after"] = True  # with normalization the other way
    tensors, options = drawn(operator, sequence_length, batch, hidden_size, torch.float32, kernel_device, options)
    assert_parity(tensors, 2e-5, operator, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_half_precision_stays_within_its_bound(poisoned, kernel_device, operator, norm, dtype, tolerance):
    options = {name: value for name, value in ALL[operator].items() if norm or not name.startswith("norm")}
    tensors, options = drawn(operator, 5, 5, 33, dtype, kernel_device, options)
    assert_parity(tensors, tolerance, operator, **options)


@pytest.mark.parametrize("operator", OPERATORS)
def test_both_back_ends_draw_the_same_masks(kernel_device, operator):
    tensors, options = drawn(operator, 5, 3, 17, torch.float32, kernel_device, ALL[operator])
    with torch.no_grad():
        actual = getattr(rk.ops, operator)(*tensors, **options)
        with rk.use_backend("eager"):
            expected = getattr(rk.ops, operator)(*tensors, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_same_call_gives_the_same_bits_and_changes_no_argument(kernel_device, operator):
    tensors, options = drawn(operator, 5, 3, 17, torch.float32, kernel_device, ALL[operator])
    assert_repeatable(operator, tensors, **options)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_empty_batch(kernel_device, operator):
    tensors, options = drawn(operator, 4, 0, 3, torch.float32, kernel_device, ALL[operator] | {"lengths": None})
    results = getattr(rk.ops, operator)(*tensors, **options)
    assert results[0].shape[:2] == (4, 0)
    gradients = torch.autograd.grad(results, tensors, [torch.randn_like(result) for result in results])
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_lies_in_the_padding_goes_nowhere(kernel_device, operator):
    """Input in the padding, and a gradient there, change nothing; outputs there are zero."""
    tensors, options = drawn(operator, 5, 3, 17, torch.float32, kernel_device, ALL[operator])
    lengths = options["lengths"] = torch.tensor([2, 5, 1], device=kernel_device)
    padding = (torch.arange(5, device=kernel_device).unsqueeze(1) >= lengths).unsqueeze(-1)
    runs = []
    for value in (0.0, 1e4):
        values = [tensors[0].detach().masked_fill(padding, value).requires_grad_(), *tensors[1:]]
        results = getattr(rk.ops, operator)(*values, **options)
        assert not results[0].masked_fill(~padding, 0).any()
        torch.manual_seed(1)
        cotangents = [torch.randn_like(result) for result in results]
        cotangents[0] = cotangents[0].masked_fill(padding, value)
        gradients = torch.autograd.grad(results, values, cotangents)
        assert not gradients[names_of(operator).index("input")].masked_fill(~padding, 0).any()
        runs.append((*results, *gradients))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_too_long_to_normalize_are_refused(kernel_device):
    from rnnkernels.kernels.triton import dispatch

    assert dispatch.pointwise(10_000, whole_rows=False).grid(3, 10_000)[1] > 1
    with pytest.raises(ValueError, match="at most 4096 hidden units on Triton, got 4097"):
        dispatch.pointwise(4097, whole_rows=True)
