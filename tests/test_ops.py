"""The operators on CPU tensors."""

import functools
import itertools
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from parity import (
    GATES,
    NAMES,
    arguments,
    assert_padding_goes_nowhere,
    assert_parity,
    exact,
    extra_weights,
    names_of,
    random_lengths,
    relative_error,
)

import rnnkernels as rk

RNN_OPTIONS = [
    {"operator": "rnn", "nonlinearity": nonlinearity, "reverse": reverse}
    for nonlinearity, reverse in itertools.product(rk.ops.NONLINEARITIES, (False, True))
]
OTHER_OPTIONS = [
    {"operator": o, "reverse": reverse} for o, reverse in itertools.product(("gru", "lstm"), (False, True))
]
OPTIONS = [*RNN_OPTIONS, *OTHER_OPTIONS]
OPERATORS = list(GATES)
LENGTHS = (None, "sorted", "unsorted")


def with_lengths(options, order, batch, sequence_length):
    return {**options, "lengths": order and random_lengths(batch, sequence_length, order)}


@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (3, 17, 3, 1), (17, 3, 1, 17), (5, 2, 129, 3), (2, 5, 17, 129)])
def test_float64_matches_the_reference(size, options, order):
    tensors = arguments(*size, torch.float64, operator=options["operator"])
    assert_parity(tensors, 1e-12, **with_lengths(options, order, size[1], size[0]))


@hypothesis.given(data=st.data())
def test_float32_matches_the_reference(data):
    sequence_length, batch, input_size, hidden_size = (data.draw(st.integers(1, most)) for most in (40, 9, 20, 40))
    bias = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    options = with_lengths(
        data.draw(st.sampled_from(OPTIONS)), data.draw(st.sampled_from(LENGTHS)), batch, sequence_length
    )
    sizes = sequence_length, batch, input_size, hidden_size
    assert_parity(arguments(*sizes, torch.float32, bias=bias, operator=options["operator"]), 5e-6, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_half_precision_stays_within_its_bound(dtype, tolerance, order, operator):
    # A few units in the last place (2^-8 and 2^-11) a step, over 7 steps.
    tensors = arguments(7, 5, 9, 17, dtype, operator=operator)
    assert_parity(tensors, tolerance, operator, **with_lengths({}, order, 5, 7))


@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("nonlinearity") != "relu"], ids=str)
def test_gradients_and_second_gradients_by_finite_differences(options, order):
    options = with_lengths(options, order, 3, 4)
    operator = options.pop("operator")
    tensors = arguments(4, 3, 2, 3, torch.float64, operator=operator)
    function = functools.partial(getattr(rk.ops, operator), **options)
    torch.autograd.gradcheck(function, tensors)
    torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("operator", "recompute_gates"), [*itertools.product(OPERATORS, (False,)), ("gru", True), ("lstm", True)]
)
def test_opcheck(bias, order, operator, recompute_gates):
    tensors = arguments(5, 3, 2, 4, torch.float32, bias=bias, operator=operator) + [None] * (0 if bias else 2)
    lengths = order and random_lengths(3, 5, order)
    options = (lengths, "tanh", False, "eager") if operator == "rnn" else (lengths, False, recompute_gates, "eager")
    torch.library.opcheck(getattr(torch.ops.rnnkernels, operator).default, (*tensors, *options))
    detached = [tensor if tensor is None else tensor.detach() for tensor in tensors]
    detached = detached[:-2] if operator == "rnn" else detached
    grads = torch.randn(5, 3, 4), torch.randn(3, 4), torch.randn(5, 3, 4)
    needs = [True, False, True, False, bias]
    if operator == "gru":
        grads, needs = (*grads, torch.rand(5, 3, 16)), [*needs, True]
    if operator == "lstm":
        grads = grads[0], grads[1], torch.randn(3, 4), grads[2], torch.rand(5, 3, 16), torch.randn(5, 3, 4)
        needs = [True, False, True, bias]
    backward = getattr(torch.ops.rnnkernels, f"{operator}_backward").default
    torch.library.opcheck(backward, (*grads, *detached, *options, needs))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck_of_the_lstm_on_onednn(reverse):
    tensors = arguments(5, 3, 2, 4, torch.float32, operator="lstm")
    torch.library.opcheck(torch.ops.rnnkernels.lstm_onednn.default, (*tensors, reverse))
    cotangents = torch.randn(5, 3, 4), torch.randn(3, 4), torch.randn(3, 4)
    detached = [tensor.detach() for tensor in tensors]
    torch.library.opcheck(torch.ops.rnnkernels.lstm_onednn_backward.default, (*cotangents, *detached, reverse))
    assert_parity(tensors, 5e-6, "lstm", reverse=reverse)
    compiled = torch.ops.rnnkernels.lstm_onednn(*tensors, reverse)
    eager = rk.ops.lstm(*tensors, reverse=reverse)
    for a, b in zip(both(compiled, tensors, cotangents), both(eager, tensors, cotangents), strict=True):
        torch.testing.assert_close(a, b)


def both(results, tensors, cotangents):
    """Results and gradients in one list."""
    return [*results, *torch.autograd.grad(results, tensors, cotangents, create_graph=True)]


@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
def test_the_lstm_without_onednn_matches_the_reference(bias, reverse, order):
    tensors = arguments(9, 5, 3, 17, torch.float32, bias=bias, operator="lstm")
    with torch.backends.mkldnn.flags(enabled=False):
        assert_parity(tensors, 5e-6, "lstm", **with_lengths({"reverse": reverse}, order, 5, 9))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("batch", [4, 5, 17])
@pytest.mark.parametrize("longest", [1, 7, 11])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_lstm_takes_sequences_of_different_lengths_in_parts(monkeypatch, reverse, longest, batch):
    # As it does large batches, here small ones; sequences may end together, or all before the batch does
    module = sys.modules["rnnkernels.ops.lstm"]
    parts, in_parts = [], module._in_parts
    monkeypatch.setattr(module, "_ENOUGH", 0)
    monkeypatch.setattr(module, "_in_parts", lambda *args: parts.append(args) or in_parts(*args))
    tensors = arguments(11, batch, 3, 5, torch.float32, operator="lstm")
    lengths = torch.randint(1, longest + 1, (batch,))
    assert_parity(tensors, 5e-6, "lstm", reverse=reverse, lengths=lengths)
    assert parts


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 2, 4])])
@pytest.mark.parametrize("reverse", [False, True])
def test_onednn_is_differentiated_twice_as_the_reference_is(reverse, lengths):
    tensors = arguments(5, 3, 2, 4, torch.float32, operator="lstm")
    random = torch.Generator().manual_seed(1)

    def twice(function, tensors):
        results = function(*tensors, reverse=reverse, lengths=lengths)
        cotangents = [torch.randn(r.shape, generator=random).to(r).requires_grad_() for r in results]
        first = torch.autograd.grad(results, tensors, cotangents, create_graph=True)
        outer = [torch.randn(g.shape, generator=random).to(g) for g in first]
        return torch.autograd.grad(first, [*tensors, *cotangents], outer)

    actual = twice(rk.ops.lstm, tensors)
    random.manual_seed(1)
    for value, expected in zip(actual, twice(rk.reference.lstm, [exact(t) for t in tensors]), strict=True):
        assert relative_error(value, expected) < 5e-6


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("vendor_id : AuthenticAMD\ncpu family : 26\nmodel : 2\nflags : avx2 avx512f", (True, True)),
        ("vendor_id : AuthenticAMD\ncpu family : 25\nmodel : 17\nflags : avx2 avx512f", (True, False)),
        ("vendor_id : AuthenticAMD\ncpu family : 25\nmodel : 1\nflags : avx2", (False, False)),
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", (True, True)),
        ("vendor_id : GenuineIntel\ncpu family : 6\nflags : avx2 avx512f", (False, False)),
        ("", (False, False)),
    ],
)
def test_the_library_for_products_is_chosen_by_the_processor(description, expected):
    from rnnkernels.kernels.eager import products

    assert products._vectors(description) == expected


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_products_by_onednn_match_the_reference(monkeypatch, operator, reverse, order):
    # As large products are on some processors, here for small ones on any
    from rnnkernels.kernels.eager import products

    monkeypatch.setattr(products, "_ENOUGH", 0)
    monkeypatch.setattr(products, "ENOUGH_COLUMNS", 0)
    monkeypatch.setattr(products, "_onednn_gains", lambda: (True, True))
    tensors = arguments(9, 5, 3, 17, torch.float32, operator=operator)
    options = with_lengths({"reverse": reverse}, order, 5, 9)
    assert_parity(tensors, 5e-6, operator, **options)
    assert_parity(tensors, 5e-6, operator, **options, zoneout=0.1, seed=1)


@pytest.mark.parametrize("order", [None, "unsorted"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_first_and_second_gradients_of_a_graph_are_the_references(dtype, options, order):
    options = with_lengths(options, order, 3, 4)
    operator = options.pop("operator")
    tensors = arguments(4, 3, 2, 5, dtype, operator=operator)
    gradients = []
    for module in (rk.ops, rk.reference):
        results = getattr(module, operator)(*tensors, **options)
        torch.manual_seed(1)
        cotangents = [torch.randn_like(result) for result in results]
        first = torch.autograd.grad(results, tensors, cotangents, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        gradients.append([*first, *second])
    bounds = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **bounds)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("lengths", [None, (6, 2, 5), (1, 3, 4)], ids=str)
def test_without_gradients_the_results_are_the_same(operator, lengths, dtype, biases, reverse):
    tensors = arguments(6, 3, 4, 5, dtype, operator=operator)
    tensors[-2:] = [bias if kept else None for bias, kept in zip(tensors[-2:], biases, strict=True)]
    options = {"reverse": reverse, "lengths": lengths and torch.tensor(lengths)}
    with torch.no_grad():
        actual = getattr(rk.ops, operator)(*tensors, **options)
    assert not actual[0].requires_grad
    torch.testing.assert_close(actual, getattr(rk.reference, operator)(*tensors, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("operator", "wanted"), [(o, n) for o in OPERATORS for n in range(6 + (o == "lstm"))])
def test_each_gradient_can_be_asked_for_alone(operator, wanted, dtype):
    function = getattr(rk.ops, operator)
    tensors = arguments(6, 3, 4, 5, dtype, operator=operator)
    results = function(*tensors)
    cotangents = [torch.randn_like(result) for result in results]
    expected = torch.autograd.grad(results, tensors[wanted], cotangents)[0]
    alone = [tensor.detach().requires_grad_(i == wanted) for i, tensor in enumerate(tensors)]
    torch.autograd.backward(function(*alone), cotangents)
    assert torch.equal(alone[wanted].grad, expected)
    assert all(tensor.grad is None for i, tensor in enumerate(alone) if i != wanted)


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("operator", OPERATORS)
def test_either_bias_can_be_left_out(operator, dtype, missing):
    named = dict(zip(names_of(operator), arguments(4, 3, 2, 5, dtype, operator=operator), strict=False))
    del named[missing]
    results = [getattr(module, operator)(**named) for module in (rk.ops, rk.reference)]
    cotangents = [torch.randn_like(result) for result in results[0]]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(result, tuple(named.values()), cotangents) for result in results]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gradient_of_one_result_alone(operator):
    tensors = arguments(6, 3, 4, 5, torch.float64, operator=operator)
    results, expected = (getattr(module, operator)(*tensors) for module in (rk.ops, rk.reference))
    for pair in zip(results, expected, strict=True):
        cotangent = torch.randn_like(pair[0])
        gradients = (torch.autograd.grad(result, tensors, cotangent, retain_graph=True) for result in pair)
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", [None, "unsorted"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_backward_twice_gives_the_same_bits_and_changes_nothing(operator, order):
    tensors = arguments(9, 3, 4, 5, torch.float32, operator=operator)
    before = [tensor.detach().clone() for tensor in tensors]
    options = with_lengths({}, order, 3, 9)
    results = getattr(rk.ops, operator)(*tensors, **options)
    copies = [result.detach().clone() for result in results]
    cotangents = [torch.randn_like(result) for result in results]
    kept = [cotangent.clone() for cotangent in cotangents]
    first = torch.autograd.grad(results, tensors, cotangents, retain_graph=True)
    second = torch.autograd.grad(results, tensors, cotangents)
    again = getattr(rk.ops, operator)(*tensors, **options)
    for a, b in zip(
        (*first, *tensors, *cotangents, *results, *again), (*second, *before, *kept, *copies, *copies), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_gradients_of_both_biases_do_not_share_memory(operator):
    tensors = arguments(3, 2, 2, 2, torch.float64, operator=operator)
    output = getattr(rk.ops, operator)(*tensors)[0]
    *_, grad_ih, grad_hh = torch.autograd.grad(output, tensors, torch.randn_like(output))
    assert torch.equal(grad_ih, grad_hh) == (operator != "gru")
    assert grad_ih.data_ptr() != grad_hh.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("operator", OPERATORS)
def test_any_memory_layout_will_do(operator, dtype):
    bounds = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    tensors = arguments(6, 3, 4, 5, dtype, operator=operator)
    expected = getattr(rk.ops, operator)(*tensors, lengths=torch.tensor([2, 6, 4]))
    cotangents = [torch.randn_like(result) for result in expected]
    expected_gradients = torch.autograd.grad(expected, tensors, cotangents)
    scattered = [tensor.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_() for tensor in tensors]
    recurrent = names_of(operator).index("weight_hh")
    scattered[recurrent] = tensors[recurrent].detach().t().contiguous().t().requires_grad_()
    results = getattr(rk.ops, operator)(*scattered, lengths=torch.tensor([2, 0, 6, 0, 4, 0])[::2])
    transposed = [cotangents[0].transpose(0, 1).contiguous().transpose(0, 1), *cotangents[1:]]
    gradients = torch.autograd.grad(results, scattered, transposed)
    for a, b in zip((*results, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(a, b, **bounds)
    # An expanded cotangent, as from output.sum(), has strides of zero.
    for leaves in (tensors, scattered):
        output = getattr(rk.ops, operator)(*leaves)[0]
        expanded = torch.autograd.grad(output, leaves, torch.ones((), dtype=dtype).expand_as(output))
        output = getattr(rk.reference, operator)(*tensors)[0]
        for a, b in zip(expanded, torch.autograd.grad(output, tensors, torch.ones_like(output)), strict=True):
            torch.testing.assert_close(a, b, **bounds)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("lengths", [None, torch.ones(0, dtype=torch.int64)])
def test_an_empty_batch(lengths, operator):
    tensors = arguments(4, 0, 3, 2, torch.float32, operator=operator)
    results = getattr(rk.ops, operator)(*tensors, lengths=lengths)
    assert [result.shape for result in results] == [(4, 0, 2), *[(0, 2)] * (len(results) - 1)]
    gradients = torch.autograd.grad(results, tensors, [torch.randn_like(result) for result in results])
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [o for o in OPTIONS if not o["reverse"]], ids=str)
def test_nan_and_infinity_pass_through(options, dtype, value):
    options = dict(options)
    operator = options.pop("operator")
    tensors = arguments(6, 3, 4, 5, dtype, operator=operator)
    with torch.no_grad():
        tensors[0][2, 1, 0] = value
    actual, expected = (getattr(module, operator)(*tensors, **options) for module in (rk.ops, rk.reference))
    torch.testing.assert_close(actual, expected, equal_nan=True)
    assert actual[0][:, [0, 2]].isfinite().all()
    gradients = (
        torch.autograd.grad(results[0], tensors[0], torch.ones_like(results[0]))[0] for results in (actual, expected)
    )
    torch.testing.assert_close(*gradients, equal_nan=True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_more_than_65535_steps(operator):
    tensors = [tensor.detach() for tensor in arguments(70_001, 1, 1, 2, torch.float64, operator=operator)]
    output, *last = getattr(rk.ops, operator)(*tensors)
    assert torch.equal(last[0], output[-1])
    if operator != "lstm":
        expected, _ = getattr(rk.reference, operator)(tensors[0][-300:], output[-301], *tensors[2:])
        torch.testing.assert_close(output[-300:], expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_reverse_is_the_flipped_sequence(operator):
    tensors = arguments(6, 3, 4, 5, torch.float64, operator=operator)
    output, *last = getattr(rk.ops, operator)(*tensors, reverse=True)
    flipped, *expected = getattr(rk.ops, operator)(tensors[0].flip(0), *tensors[1:])
    torch.testing.assert_close(output, flipped.flip(0))
    torch.testing.assert_close(last, expected)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_padded_sequence_is_its_shorter_self(dtype, reverse, operator):
    tensors = arguments(6, 3, 4, 5, dtype, operator=operator)
    states = names_of(operator).index("weight_ih")
    lengths = torch.tensor([4, 6, 1])
    output, *last = getattr(rk.ops, operator)(*tensors, lengths=lengths, reverse=reverse)
    for b, length in enumerate(lengths):
        alone, *expected = getattr(rk.ops, operator)(
            tensors[0][:length, b : b + 1],
            *(state[b : b + 1] for state in tensors[1:states]),
            *tensors[states:],
            reverse=reverse,
        )
        torch.testing.assert_close(output[:length, b : b + 1], alone)
        torch.testing.assert_close([state[b : b + 1] for state in last], expected)
        assert not output[length:, b].any()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_sequence_has_to_reach_the_last_step(dtype, reverse, operator):
    tensors = arguments(6, 3, 4, 5, dtype, operator=operator)
    for lengths in ([4, 2, 3], [1, 1, 1], [3, 3, 2]):
        tolerance = 1e-12 if dtype == torch.float64 else 5e-6
        assert_parity(tensors, tolerance, operator, lengths=torch.tensor(lengths), reverse=reverse)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_the_padding_holds_goes_nowhere(dtype, reverse, operator):
    assert_padding_goes_nowhere(operator, arguments(6, 3, 4, 5, dtype, operator=operator), reverse=reverse)


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_the_padding_holds_goes_nowhere_with_options(operator):
    norms = extra_weights(operator, 5, torch.float32, names=("norm_ih", "norm_hh"))
    tensors = arguments(6, 3, 4, 5, torch.float32, operator=operator)
    assert_padding_goes_nowhere(operator, tensors, zoneout=0.3, seed=4, **norms)


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_without_graph_breaks(operator):
    compiled = torch.compile(getattr(rk.ops, operator), fullgraph=True, backend="aot_eager")
    for steps in (5, 4, 3):
        tensors = arguments(steps, 3, 2, 4, torch.float32, operator=operator)
        results, expected = compiled(*tensors), getattr(rk.ops, operator)(*tensors)
        cotangents = [torch.randn_like(result) for result in expected]
        pairs = (torch.autograd.grad(r, tensors, cotangents) for r in (results, expected))
        torch.testing.assert_close(results, expected)
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_runs_in_its_type_and_keeps_the_weights_type(operator):
    tensors = arguments(5, 3, 2, 4, torch.float32, operator=operator)
    with torch.autocast("cpu", torch.bfloat16):
        results = getattr(rk.ops, operator)(*tensors)
    assert {result.dtype for result in results} == {torch.bfloat16}
    gradients = torch.autograd.grad(results[0], tensors, torch.randn_like(results[0]))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    torch.testing.assert_close(results[0].float(), getattr(rk.reference, operator)(*tensors)[0], atol=3e-2, rtol=0)


BAD = {
    "input": [
        (TypeError, "Tensor", [[0.0]]),
        (ValueError, r"shape \(sequence_length, batch, input_size\), got \(5, 2\)", torch.randn(5, 2)),
        (ValueError, "at least 1 step, got an empty sequence", torch.randn(0, 3, 2)),
        (TypeError, "floating-point dtype, got torch.int64", torch.zeros(5, 3, 2, dtype=torch.int64)),
    ],
    "h_0": [
        (TypeError, "Tensor, got NoneType", None),
        (ValueError, r"\(3, hidden_size\), got \(2, 4\)", torch.randn(2, 4)),
        (ValueError, r"\(3, hidden_size\), got \(1, 3, 4\)", torch.randn(1, 3, 4)),
        (TypeError, "dtype torch.float32, as input has, got torch.float64", torch.randn(3, 4).double()),
        (ValueError, "device cpu, where input is, got meta", torch.randn(3, 4, device="meta")),
    ],
    "weight_ih": [
        (ValueError, r"\(4, 2\), got \(4, 3\)", torch.randn(4, 3)),
        (ValueError, r"\(4, 2\), got \(2, 4\)", torch.randn(2, 4)),
    ],
    "weight_hh": [
        (ValueError, r"\(4, 4\), got \(8, 4\)", torch.randn(8, 4)),
        (TypeError, "dtype torch.float32", torch.randn(4, 4).half()),
    ],
    "bias_ih": [(ValueError, r"\(4\), got \(3,\)", torch.randn(3)), (TypeError, "Tensor, got float", 0.5)],
    "bias_hh": [(ValueError, r"\(4\), got \(1, 4\)", torch.randn(1, 4))],
    "nonlinearity": [
        (ValueError, "'tanh', 'relu', 'sigmoid', 'identity', got 'gelu'", "gelu"),
        (ValueError, "got None", None),
    ],
    "lengths": [
        (TypeError, "Tensor, got list", [5, 5, 5]),
        (TypeError, "torch.int64, got torch.int32", torch.ones(3, dtype=torch.int32)),
        (ValueError, r"shape \(3,\), one length a sequence, got \(2,\)", torch.ones(2, dtype=torch.int64)),
        (ValueError, "1 to 5 steps, got 0 to 5", torch.tensor([5, 0, 1])),
        (ValueError, "1 to 5 steps, got 1 to 6", torch.tensor([6, 1, 1])),
    ],
}


@pytest.mark.parametrize(
    ("name", "error", "message", "value"), [(name, *case) for name, cases in BAD.items() for case in cases]
)
def test_bad_input_is_refused_by_name(name, error, message, value):
    good = dict(zip(NAMES, arguments(5, 3, 2, 4, torch.float32), strict=True))
    with pytest.raises(error, match=f"^{name}: expected.*{message}"):
        rk.ops.rnn(**{**good, name: value})


def test_the_gru_wants_three_rows_a_unit():
    good = dict(zip(NAMES, arguments(5, 3, 2, 4, torch.float32, operator="gru"), strict=True))
    for name, shape in (("weight_ih", (12, 2)), ("weight_hh", (12, 4)), ("bias_ih", (12,)), ("bias_hh", (12,))):
        with pytest.raises(ValueError, match=f"^{name}: expected shape .12"):
            rk.ops.gru(**{**good, name: torch.zeros(4, *shape[1:])})


BAD_STATES = {
    "c_0": [
        (TypeError, "Tensor, got NoneType", None),
        (ValueError, r"\(3, 4\), got \(3, 5\)", torch.randn(3, 5)),
        (ValueError, r"\(3, 4\), got \(2, 4\)", torch.randn(2, 4)),
        (TypeError, "dtype torch.float32, as input has, got torch.float64", torch.randn(3, 4).double()),
    ],
    "weight_ih": [(ValueError, r"\(16, 2\), got \(4, 2\)", torch.randn(4, 2))],
    "weight_hh": [(ValueError, r"\(16, 4\), got \(12, 4\)", torch.randn(12, 4))],
    "bias_ih": [(ValueError, r"\(16\), got \(12,\)", torch.randn(12))],
    "bias_hh": [(ValueError, r"\(16\), got \(4,\)", torch.randn(4))],
    "weight_peephole": [(ValueError, r"\(3, 4\), got \(4,\)", torch.randn(4)), (TypeError, "Tensor, got bool", True)],
}


@pytest.mark.parametrize(
    ("name", "error", "message", "value"), [(name, *case) for name, cases in BAD_STATES.items() for case in cases]
)
def test_bad_input_of_the_lstm_is_refused_by_name(name, error, message, value):
    good = dict(zip(names_of("lstm"), arguments(5, 3, 2, 4, torch.float32, operator="lstm"), strict=False))
    with pytest.raises(error, match=f"^{name}: expected.*{message}"):
        rk.ops.lstm(**{**good, name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("h_0", torch.randn(3, 4), r"^weight_hh: expected shape \(20, 4\), got \(20, 2\)"),
        ("c_0", torch.randn(3, 4), r"^weight_ih: expected shape \(16, 2\)"),
        ("weight_hr", torch.randn(5, 2), r"^weight_hr: expected shape \(2, 5\), got \(5, 2\)"),
        ("weight_hr", None, r"^c_0: expected shape \(3, 2\), got \(3, 5\)"),
        ("norm_cell_weight", torch.ones(5), "^norm_cell_bias: expected a Tensor, as norm_cell_weight and"),
        ("norm_cell_bias", torch.ones(5), "^norm_cell_weight: expected a Tensor, as norm_cell_weight and"),
    ],
)
def test_bad_input_of_the_projected_lstm_is_refused_by_name(name, value, message):
    tensors = arguments(5, 3, 2, 5, torch.float32, operator="lstm", state_size=2)
    good = dict(zip(names_of("lstm"), tensors, strict=True))
    with pytest.raises(ValueError, match=message):
        rk.ops.lstm(**{**good, name: value})


@pytest.mark.parametrize("operator", OPERATORS)
def test_lengths_without_padding_are_no_lengths(operator):
    tensors = arguments(5, 3, 4, 6, torch.float32, operator=operator)
    run = getattr(rk.ops, operator)
    pairs = zip(run(*tensors, lengths=torch.full((3,), 5)), run(*tensors), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert a.grad_fn.name() == b.grad_fn.name()
