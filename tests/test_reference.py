"""The reference beside NumPy loops written from the equations, and beside ``torch.nn``."""

import numpy as np
import pytest
import torch
from parity import arguments, random_lengths

import rnnkernels as rk

IN_NUMPY = {
    "tanh": np.tanh,
    "relu": lambda a: np.maximum(a, 0),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "identity": lambda a: a,
}


@pytest.mark.parametrize("nonlinearity", rk.ops.NONLINEARITIES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_numpy_gives_the_same(nonlinearity, reverse, ragged):
    tensors = [tensor.detach() for tensor in arguments(6, 3, 2, 4, torch.float64)]
    lengths = random_lengths(3, 6) if ragged else None
    output, h_n = rk.reference.rnn(*tensors, nonlinearity=nonlinearity, reverse=reverse, lengths=lengths)
    x, h_0, w_ih, w_hh, b_ih, b_hh = (tensor.numpy() for tensor in tensors)
    expected = np.zeros((6, 3, 4))
    for b in range(3):
        steps = range(lengths[b] if ragged else 6)
        h = h_0[b]
        for t in reversed(steps) if reverse else steps:
            h = IN_NUMPY[nonlinearity](w_ih @ x[t, b] + b_ih + w_hh @ h + b_hh)
            expected[t, b] = h
        np.testing.assert_allclose(h_n[b], h, rtol=1e-12)
    np.testing.assert_allclose(output, expected, rtol=1e-12)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_torch_gives_the_same(nonlinearity):
    module = torch.nn.RNN(3, 4, nonlinearity=nonlinearity, dtype=torch.float64)
    input, h_0 = torch.randn(7, 2, 3).double(), torch.randn(2, 4).double()
    output, h_n = rk.reference.rnn(input, h_0, *module.all_weights[0], nonlinearity=nonlinearity)
    expected_output, expected_h_n = module(input, h_0[None])
    torch.testing.assert_close((output, h_n[None]), (expected_output, expected_h_n))


def test_a_step_can_do_without_biases():
    _, hidden, weight_ih, weight_hh = (tensor.detach() for tensor in arguments(1, 3, 2, 4, torch.float64, bias=False))
    input = torch.randn(3, 2).double()
    expected = torch.tanh(input @ weight_ih.T + hidden @ weight_hh.T)
    torch.testing.assert_close(rk.reference.rnn_cell(input, hidden, weight_ih, weight_hh), expected)


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_numpy_gives_the_same_gru(reset_after, bias):
    tensors = [tensor.detach() for tensor in arguments(6, 1, 2, 4, torch.float64, bias=bias, operator="gru")]
    output, h_n = rk.reference.gru(*tensors, reset_after=reset_after)
    x, h_0, w_ih, w_hh, *biases = (tensor.numpy() for tensor in tensors)
    b_ih, b_hh = biases or (np.zeros(12), np.zeros(12))
    sigmoid, h = IN_NUMPY["sigmoid"], h_0[0]
    for t in range(6):
        a, u = w_ih @ x[t, 0] + b_ih, w_hh @ h + b_hh
        r, z = sigmoid(a[:4] + u[:4]), sigmoid(a[4:8] + u[4:8])
        inner = r * u[8:] if reset_after else w_hh[8:] @ (r * h) + b_hh[8:]
        h = (1 - z) * np.tanh(a[8:] + inner) + z * h
        np.testing.assert_allclose(output[t, 0], h, rtol=1e-12)
    np.testing.assert_allclose(h_n[0], h, rtol=1e-12)


def test_torch_gives_the_same_gru():
    module = torch.nn.GRU(3, 4, dtype=torch.float64)
    input, h_0 = torch.randn(7, 2, 3).double(), torch.randn(2, 4).double()
    output, h_n = rk.reference.gru(input, h_0, *module.all_weights[0])
    torch.testing.assert_close((output, h_n[None]), module(input, h_0[None]))
