"""The operators on CPU tensors."""

import functools
import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from parity import GATES, NAMES, arguments, assert_parity, random_lengths

import rnnkernels as rk

RNN_OPTIONS = [
    {"operator": "rnn", "nonlinearity": nonlinearity, "reverse": reverse}
    for nonlinearity, reverse in itertools.product(rk.ops.NONLINEARITIES, (False, True))
]
OPTIONS = [*RNN_OPTIONS, {"operator": "gru", "reverse": False}, {"operator": "gru", "reverse": True}]
OPERATORS = ["rnn", "gru"]
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
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(bias, order, operator):
    tensors = arguments(5, 3, 2, 4, torch.float32, bias=bias, operator=operator) + [None] * (0 if bias else 2)
    lengths = order and random_lengths(3, 5, order)
    options = (lengths, "tanh", False, "eager") if operator == "rnn" else (lengths, False, "eager")
    torch.library.opcheck(getattr(torch.ops.rnnkernels, operator).default, (*tensors, *options))
    detached = [tensor.detach() for tensor in tensors[:4]]
    grads = torch.randn(5, 3, 4), torch.randn(3, 4), torch.randn(5, 3, 4)
    needs = [True, False, True, False, bias]
    if operator == "gru":
        grads, needs = (*grads, torch.rand(5, 3, 16)), [*needs, True]
    backward = getattr(torch.ops.rnnkernels, f"{operator}_backward").default
    torch.library.opcheck(backward, (*grads, *detached, *options, needs))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_without_gradients_the_results_are_the_same(operator, biases, reverse):
    tensors = arguments(6, 3, 4, 5, torch.float64, operator=operator)
    tensors[4:] = [bias if kept else None for bias, kept in zip(tensors[4:], biases, strict=True)]
    with torch.no_grad():
        actual = getattr(rk.ops, operator)(*tensors, reverse=reverse)
    assert not actual[0].requires_grad
    torch.testing.assert_close(actual, getattr(rk.reference, operator)(*tensors, reverse=reverse))


@pytest.mark.parametrize("wanted", range(6))
@pytest.mark.parametrize("operator", OPERATORS)
def test_each_gradient_can_be_asked_for_alone(wanted, operator):
    function = getattr(rk.ops, operator)
    tensors = arguments(6, 3, 4, 5, torch.float64, operator=operator)
    output, h_n = function(*tensors)
    cotangents = torch.randn_like(output), torch.randn_like(h_n)
    expected = torch.autograd.grad((output, h_n), tensors[wanted], cotangents)[0]
    alone = [tensor.detach().requires_grad_(i == wanted) for i, tensor in enumerate(tensors)]
    output, h_n = function(*alone)
    torch.autograd.backward((output, h_n), cotangents)
    assert torch.equal(alone[wanted].grad, expected)
    assert all(tensor.grad is None for i, tensor in enumerate(alone) if i != wanted)


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_either_bias_can_be_left_out(missing, operator):
    named = dict(zip(NAMES, arguments(4, 3, 2, 5, torch.float64, operator=operator), strict=True))
    del named[missing]
    results = [getattr(module, operator)(**named) for module in (rk.ops, rk.reference)]
    cotangents = [torch.randn_like(result) for result in results[0]]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(result, tuple(named.values()), cotangents) for result in results]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gradient_of_one_result_alone(operator):
    tensors = arguments(6, 3, 4, 5, torch.float64, operator=operator)
    output, h_n = getattr(rk.ops, operator)(*tensors)
    expected_output, expected_h_n = getattr(rk.reference, operator)(*tensors)
    cotangent = torch.randn_like(output)
    for got, expected in ((output, expected_output), (h_n, expected_h_n)):
        cotangent = torch.randn_like(got)
        pairs = (torch.autograd.grad(result, tensors, cotangent, retain_graph=True) for result in (got, expected))
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("operator", OPERATORS)
def test_backward_twice_gives_the_same_bits_and_changes_nothing(operator):
    tensors = arguments(9, 3, 4, 5, torch.float32, operator=operator)
    before = [tensor.detach().clone() for tensor in tensors]
    lengths = random_lengths(3, 9)
    output, h_n = getattr(rk.ops, operator)(*tensors, lengths=lengths)
    results = output.detach().clone(), h_n.detach().clone()
    cotangents = torch.randn_like(output), torch.randn_like(h_n)
    kept = [cotangent.clone() for cotangent in cotangents]
    first = torch.autograd.grad((output, h_n), tensors, cotangents, retain_graph=True)
    second = torch.autograd.grad((output, h_n), tensors, cotangents)
    again = getattr(rk.ops, operator)(*tensors, lengths=lengths)
    for a, b in zip(
        (*first, *tensors, *cotangents, output, h_n, *again), (*second, *before, *kept, *results, *results), strict=True
    ):
        assert torch.equal(a, b)


def test_the_gradients_of_both_biases_do_not_share_memory():
    tensors = arguments(3, 2, 2, 2, torch.float32)
    output, _ = rk.ops.rnn(*tensors)
    *_, grad_ih, grad_hh = torch.autograd.grad(output, tensors, torch.randn_like(output))
    assert torch.equal(grad_ih, grad_hh)
    assert grad_ih.data_ptr() != grad_hh.data_ptr()


@pytest.mark.parametrize("operator", OPERATORS)
def test_any_memory_layout_will_do(operator):
    tensors = arguments(6, 3, 4, 5, torch.float64, operator=operator)
    expected = getattr(rk.ops, operator)(*tensors, lengths=torch.tensor([2, 6, 4]))
    cotangents = [torch.randn_like(result) for result in expected]
    expected_gradients = torch.autograd.grad(expected, tensors, cotangents)
    scattered = [tensor.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_() for tensor in tensors]
    scattered[3] = tensors[3].detach().t().contiguous().t().requires_grad_()
    results = getattr(rk.ops, operator)(*scattered, lengths=torch.tensor([2, 0, 6, 0, 4, 0])[::2])
    transposed = [cotangents[0].transpose(0, 1).contiguous().transpose(0, 1), cotangents[1]]
    gradients = torch.autograd.grad(results, scattered, transposed)
    for a, b in zip((*results, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(a, b)
    # An expanded cotangent, as from output.sum(), has strides of zero.
    output, _ = getattr(rk.ops, operator)(*tensors)
    expanded = torch.autograd.grad(output, tensors, torch.ones(()).double().expand_as(output))
    output, _ = getattr(rk.reference, operator)(*tensors)
    for a, b in zip(expanded, torch.autograd.grad(output, tensors, torch.ones_like(output)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_empty_batch(operator):
    tensors = arguments(4, 0, 3, 2, torch.float32, operator=operator)
    output, h_n = getattr(rk.ops, operator)(*tensors)
    assert output.shape == (4, 0, 2)
    assert h_n.shape == (0, 2)
    gradients = torch.autograd.grad((output, h_n), tensors, (torch.randn_like(output), torch.randn_like(h_n)))
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_pass_through(value):
    tensors = arguments(6, 3, 4, 5, torch.float32)
    with torch.no_grad():
        tensors[0][2, 1, 0] = value
    for nonlinearity in rk.ops.NONLINEARITIES:
        actual = rk.ops.rnn(*tensors, nonlinearity=nonlinearity)
        expected = rk.reference.rnn(*tensors, nonlinearity=nonlinearity)
        torch.testing.assert_close(actual, expected, equal_nan=True)
        assert actual[0][:, [0, 2]].isfinite().all()
        gradients = (
            torch.autograd.grad(output, tensors[0], torch.ones_like(output))[0] for output, _ in (actual, expected)
        )
        torch.testing.assert_close(*gradients, equal_nan=True)


def test_more_than_65535_steps():
    tensors = [tensor.detach() for tensor in arguments(70_001, 1, 1, 2, torch.float64)]
    output, h_n = rk.ops.rnn(*tensors)
    expected, _ = rk.reference.rnn(tensors[0][-300:], output[-301], *tensors[2:])
    torch.testing.assert_close(output[-300:], expected)
    assert torch.equal(h_n, output[-1])


@pytest.mark.parametrize("operator", OPERATORS)
def test_reverse_is_the_flipped_sequence(operator):
    tensors = arguments(6, 3, 4, 5, torch.float64, operator=operator)
    output, h_n = getattr(rk.ops, operator)(*tensors, reverse=True)
    flipped, last = getattr(rk.ops, operator)(tensors[0].flip(0), *tensors[1:])
    torch.testing.assert_close(output, flipped.flip(0))
    torch.testing.assert_close(h_n, last)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_padded_sequence_is_its_shorter_self(reverse, operator):
    tensors = arguments(6, 3, 4, 5, torch.float64, operator=operator)
    lengths = torch.tensor([4, 6, 1])
    output, h_n = getattr(rk.ops, operator)(*tensors, lengths=lengths, reverse=reverse)
    for b, length in enumerate(lengths):
        alone, last = getattr(rk.ops, operator)(
            tensors[0][:length, b : b + 1], tensors[1][b : b + 1], *tensors[2:], reverse=reverse
        )
        torch.testing.assert_close(output[:length, b : b + 1], alone)
        torch.testing.assert_close(h_n[b : b + 1], last)
        assert not output[length:, b].any()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_gradient_in_the_padding_goes_nowhere(reverse, operator):
    tensors = arguments(6, 3, 4, 5, torch.float64, operator=operator)
    lengths = torch.tensor([4, 6, 1])
    output, _ = getattr(rk.ops, operator)(*tensors, lengths=lengths, reverse=reverse)
    cotangent = torch.randn_like(output)
    expected = torch.autograd.grad(output, tensors, cotangent, retain_graph=True)
    for b, length in enumerate(lengths):
        cotangent[length:, b] = float("nan")
    for a, b in zip(torch.autograd.grad(output, tensors, cotangent), expected, strict=True):
        assert torch.equal(a, b)


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
        output, h_n = getattr(rk.ops, operator)(*tensors)
    assert output.dtype == h_n.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output, tensors, torch.randn_like(output))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    torch.testing.assert_close(output.float(), getattr(rk.reference, operator)(*tensors)[0], atol=3e-2, rtol=0)


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
