"""Comparison of an operator with its specification: results and every gradient, under random cotangents."""

import torch

import rnnkernels as rk

NAMES = ("input", "h_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


GATES = {"rnn": 1, "gru": 3}
"""Operators, and how many rows of the weights a hidden unit has."""


def arguments(sequence_length, batch, input_size, hidden_size, dtype, device="cpu", bias=True, operator="rnn"):
    """Random tensors for an operator, exact in ``dtype``, scaled so that the state neither dies nor explodes."""
    rows = GATES[operator] * hidden_size
    shapes = ((sequence_length, batch, input_size), (batch, hidden_size), (rows, input_size))
    shapes += ((rows, hidden_size), (rows,), (rows,))
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[2] /= input_size**0.5
    tensors[3] /= hidden_size**0.5
    return [tensor.to(dtype=dtype, device=device).requires_grad_() for tensor in tensors[: 6 if bias else 4]]


def random_lengths(batch, sequence_length, order="unsorted"):
    """Lengths of 1 to ``sequence_length`` for a batch: the longest somewhere, in descending order or in none."""
    lengths = torch.randint(1, sequence_length + 1, (batch,))
    lengths[batch // 2] = sequence_length
    return lengths.sort(descending=True).values if order == "sorted" else lengths


def outcome(function, tensors, cotangents, **options):
    """The results of ``function`` and the gradients of all ``tensors``, by name."""
    output, h_n = function(*tensors, **options)
    gradients = torch.autograd.grad((output, h_n), tensors, cotangents)
    return {
        "output": output.detach(),
        "h_n": h_n.detach(),
        **dict(zip((f"grad {name}" for name in NAMES), gradients, strict=False)),
    }


def relative_error(value, expected):
    """The largest error of an element, relative to the largest element."""
    return float((value.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_parity(tensors, tolerance, operator="rnn", **options):
    """Hold an operator to the reference in float64.

    ``tolerance`` bounds the relative error of each result and gradient. Where sums cancel, the textbook loop itself
    errs in the tensors' type, and four times its error is allowed on top.
    """
    reference = getattr(rk.reference, operator)
    dtype = tensors[0].dtype
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    cotangents = [torch.randn_like(result).to(dtype) for result in reference(*exact, **options)]
    expected = outcome(reference, exact, [cotangent.double() for cotangent in cotangents], **options)
    textbook = outcome(reference, tensors, cotangents, **options)
    actual = outcome(getattr(rk.ops, operator), tensors, cotangents, **options)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == dtype
        assert value.shape == expected[name].shape
        error = relative_error(value, expected[name])
        bound = tolerance + 4 * relative_error(textbook[name], expected[name])
        assert error <= bound, f"{name}: relative error {error:.2e} exceeds {bound:.2e}"
