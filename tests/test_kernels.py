"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter."""

import itertools

import pytest
import torch
from parity import GATES, arguments, assert_padding_goes_nowhere, assert_parity, random_lengths

import rnnkernels as rk

pytestmark = pytest.mark.interpreter

DESIGNS = ("resident", "step")
OPERATORS = list(GATES)
GATED = ["gru", "lstm"]
LENGTHS = (None, "sorted", "unsorted")
# A sum of exponentials that overflows to infinity is what the sigmoid's tail needs.
overflow = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.fixture(params=DESIGNS)
def design(request, monkeypatch, kernel_device):
    """Run everything in the test by this design, on Triton."""
    from rnnkernels.kernels.triton import dispatch

    for table in ("PERSISTENT",) if request.param == "resident" else ("PERSISTENT", "RESIDENT"):
        monkeypatch.setattr(dispatch, table, {key: {} for key in getattr(dispatch, table)})
    with rk.use_backend("triton"):
        yield request.param


def on_device(tensors, device):
    return [tensor.detach().to(device).requires_grad_() for tensor in tensors]


def options_on(device, order, batch, sequence_length, **options):
    return {**options, "lengths": order and random_lengths(batch, sequence_length, order).to(device)}


@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize(
    ("nonlinearity", "reverse"), list(itertools.product(rk.ops.NONLINEARITIES, (False, True))), ids=str
)
def test_every_option_matches_the_reference(design, poisoned, kernel_device, nonlinearity, reverse, order):
    tensors = arguments(5, 17, 3, 17, torch.float32, kernel_device)
    options = options_on(kernel_device, order, 17, 5, nonlinearity=nonlinearity, reverse=reverse)
    assert_parity(tensors, 5e-6, **options)


@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("operator", GATED)
def test_every_option_of_a_gated_cell_matches_the_reference(
    design, poisoned, kernel_device, operator, bias, reverse, order
):
    tensors = arguments(5, 17, 3, 17, torch.float32, kernel_device, bias=bias, operator=operator)
    assert_parity(tensors, 5e-6, operator, **options_on(kernel_device, order, 17, 5, reverse=reverse))


@pytest.mark.parametrize("order", [None, "unsorted"])
@pytest.mark.parametrize(
    ("sequence_length", "batch", "hidden_size"),
    [(1, 1, 1), (3, 1, 17), (17, 3, 1), (2, 129, 3), (3, 3, 64), (2, 17, 129), (3, 65, 48), (2, 65, 256)],
)
def test_every_size_matches_the_reference(design, poisoned, kernel_device, sequence_length, batch, hidden_size, order):
    tensors = arguments(sequence_length, batch, 3, hidden_size, torch.float32, kernel_device)
    assert_parity(tensors, 5e-6, **options_on(kernel_device, order, batch, sequence_length))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("sequence_length", "batch", "hidden_size"), [(3, 1, 17), (17, 3, 2), (2, 129, 3), (2, 17, 129), (2, 65, 48)]
)
@pytest.mark.parametrize("operator", GATED)
def test_every_size_of_a_gated_cell_matches_the_reference(
    design, poisoned, kernel_device, operator, sequence_length, batch, hidden_size, reverse
):
    tensors = arguments(sequence_length, batch, 3, hidden_size, torch.float32, kernel_device, operator=operator)
    options = options_on(kernel_device, "unsorted" if reverse else None, batch, sequence_length, reverse=reverse)
    assert_parity(tensors, 5e-6, operator, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize(
    ("operator", "hidden_size", "order"),
    [
        *itertools.product(OPERATORS, (17,), (None, "unsorted")),
        *itertools.product(OPERATORS, (129,), (None,)),
        *(("rnn", 256, "unsorted"), ("gru", 100, "unsorted"), ("lstm", 100, "unsorted")),  # the largest resident tiles
    ],
)
def test_half_precision_stays_within_its_bound(
    design, poisoned, kernel_device, operator, dtype, tolerance, hidden_size, order
):
    tensors = arguments(5, 5, 9, hidden_size, dtype, kernel_device, operator=operator)
    assert_parity(tensors, tolerance, operator, **options_on(kernel_device, order, 5, 5))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_the_padding_holds_goes_nowhere(design, kernel_device, operator, reverse):
    tensors = arguments(6, 3, 4, 5, torch.float32, kernel_device, operator=operator)
    assert_padding_goes_nowhere(operator, tensors, large=9.0, reverse=reverse)  # more overflows the interpreter


@pytest.mark.parametrize("matmul_precision", ["highest", "high", "medium"])
def test_float32_products_follow_the_matmul_precision(kernel_device, matmul_precision):
    from rnnkernels.kernels.triton import dispatch

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(matmul_precision)
        assert dispatch.input_precision(torch.float32) == ("ieee" if matmul_precision == "highest" else "tf32")
        assert dispatch.input_precision(torch.bfloat16) == "ieee"
        tensors = arguments(3, 3, 3, 48, torch.float32, kernel_device)
        with rk.use_backend("triton"):  # TF32 keeps 10 bits of each factor
            assert_parity(tensors, 5e-6 if matmul_precision == "highest" else 5e-3)
    finally:
        torch.set_float32_matmul_precision(before)


@overflow
@pytest.mark.parametrize("nonlinearity", rk.ops.NONLINEARITIES)
def test_activations_over_the_whole_range(kernel_device, nonlinearity):
    magnitudes = torch.logspace(-38, 38, 400, dtype=torch.float64)
    near_the_branch = torch.linspace(0.2, 0.3, 101, dtype=torch.float64)
    x = torch.cat([-magnitudes, -near_the_branch, torch.zeros(1), near_the_branch, magnitudes]).float()
    x = torch.cat([x, torch.tensor([float("inf"), -float("inf"), float("nan")])]).to(kernel_device)
    zeros = torch.zeros(1, 1, device=kernel_device)
    with rk.use_backend("triton"):
        output, _ = rk.ops.rnn(x.view(1, -1, 1), zeros.expand(len(x), 1), zeros + 1, zeros, nonlinearity=nonlinearity)
    expected = rk.reference.ACTIVATIONS[nonlinearity](x.double())
    rtol = 4e-7 if kernel_device.type == "cpu" else 1e-5  # a GPU's exponential is an approximation
    torch.testing.assert_close(output.flatten().double(), expected, rtol=rtol, atol=1e-38, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("nonlinearity", rk.ops.NONLINEARITIES)
def test_nan_and_infinity_stay_in_their_row(design, kernel_device, nonlinearity, value):
    tensors = [tensor.detach() for tensor in arguments(6, 3, 4, 17, torch.float32, kernel_device)]
    tensors[0][2, 1, 0] = value
    leaves = on_device(tensors, kernel_device)
    output, h_n = rk.ops.rnn(*leaves, nonlinearity=nonlinearity)
    expected = rk.reference.rnn(*leaves, nonlinearity=nonlinearity)
    torch.testing.assert_close((output, h_n), expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(result, leaves[0], torch.ones_like(result))[0] for result in (output, expected[0])]
    torch.testing.assert_close(*gradients, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_same_call_gives_the_same_bits(design, kernel_device, operator):
    tensors = arguments(7, 33, 5, 33, torch.float32, kernel_device, operator=operator)
    runs = []
    for _ in range(2):
        results = getattr(rk.ops, operator)(*tensors)
        torch.manual_seed(1)
        runs.append((*results, *torch.autograd.grad(results, tensors, [torch.randn_like(r) for r in results])))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_empty_batch(design, kernel_device, operator):
    tensors = arguments(4, 0, 3, 2, torch.float32, kernel_device, operator=operator)
    results = getattr(rk.ops, operator)(*tensors)
    assert results[0].shape == (4, 0, 2)
    gradients = torch.autograd.grad(results, tensors, [torch.randn_like(result) for result in results])
    assert all(not gradient.any() for gradient in gradients)


def test_more_than_65535_steps(kernel_device):
    if kernel_device.type != "cuda":
        pytest.skip("70,001 steps take minutes in Triton's interpreter: this test needs a GPU")
    tensors = [t.detach() for t in arguments(70_001, 1, 1, 16, torch.float32, kernel_device)]
    output, h_n = rk.ops.rnn(*tensors)
    expected, _ = rk.reference.rnn(tensors[0][-300:], output[-301], *tensors[2:])
    torch.testing.assert_close(output[-300:], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(h_n, output[-1])


@pytest.mark.parametrize("operator", OPERATORS)
def test_double_backward(design, kernel_device, operator):
    leaves = arguments(3, 2, 2, 3, torch.float32, kernel_device, operator=operator)
    penalties = []
    for function in (getattr(rk.ops, operator), getattr(rk.reference, operator)):
        output = function(*leaves)[0]
        torch.manual_seed(1)
        (gradient,) = torch.autograd.grad(output, leaves[0], torch.randn_like(output), create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), leaves[1:5]))
    for a, b in zip(*penalties, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_not_a_multiple_of_16_bytes_is_read_right(design, kernel_device, operator):
    # A view whose data starts off an aligned address.
    tensors = arguments(3, 4, 3, 16, torch.float32, kernel_device, operator=operator)
    shifted = [torch.cat([tensor.detach().new_zeros(1), tensor.detach().flatten()])[1:] for tensor in tensors]
    shifted = [s.view(tensor.shape).requires_grad_() for s, tensor in zip(shifted, tensors, strict=True)]
    assert_parity(shifted, 5e-6, operator)


def test_the_table_chooses_what_fits(kernel_device):
    from rnnkernels.kernels.triton import dispatch

    def choose(hidden_size, dtype, shared_memory, cell="rnn"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "shared_memory", lambda device: shared_memory)
            patch.setattr(dispatch, "COOPERATIVE", False)
            return type(dispatch.choose(cell, hidden_size, 8, dtype, torch.device("cuda"))).__name__

    h100, a100, rtx = 227 * 1024, 163 * 1024, 99 * 1024
    assert choose(256, torch.bfloat16, h100) == choose(256, torch.bfloat16, a100) == "Resident"
    assert choose(256, torch.bfloat16, rtx) == choose(257, torch.bfloat16, h100) == "Step"
    assert choose(128, torch.bfloat16, a100, "lstm") == "Resident"
    assert choose(128, torch.bfloat16, rtx, "lstm") == choose(129, torch.bfloat16, h100, "lstm") == "Step"
    assert choose(64, torch.float32, rtx) == "Resident"
    assert choose(65, torch.float32, h100) == "Step"  # "highest", PyTorch's default, spills above 64
