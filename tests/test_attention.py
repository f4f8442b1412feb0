"""Causal attention: PyTorch's on a CPU, the Triton kernels in the interpreter or on a GPU."""

import concurrent.futures
import multiprocessing
import os

import pytest
import torch
from parity import relative_error
from torch.nn import functional

import rnnkernels as rk

SIZES = [
    (1, 1, 1, 1, 1),
    (2, 1, 3, 3, 5),
    (1, 2, 17, 17, 8),
    (1, 2, 3, 40, 16),
    (1, 1, 70, 131, 20),
    (1, 1, 65, 65, 33),
]
"""(batch, heads, query_length, key_length, head_dim)."""


def arguments(batch, heads, query_length, key_length, head_dim, dtype, device="cpu"):
    shapes = [(batch, heads, length, head_dim) for length in (query_length, key_length, key_length)]
    tensors = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [tensor.to(dtype=dtype, device=device).requires_grad_() for tensor in tensors]


def textbook(query, key, value, is_causal=True, scale=None):
    """PyTorch's attention, with the mask written out: the last query stands at the last key."""
    rows, columns = torch.arange(query.shape[2]), torch.arange(key.shape[2])
    visible = columns <= rows.unsqueeze(1) + len(columns) - len(rows) if is_causal else None
    visible = None if visible is None else visible.to(query.device)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)


def outcome(function, tensors, cotangent, **options):
    output = function(*tensors, **options)
    return [output.detach(), *torch.autograd.grad(output, tensors, cotangent)]


def assert_parity(tensors, tolerance, **options):
    if tensors[0].device.type == "cuda":
        tolerance *= 5  # a GPU's exponential is an approximation
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    cotangent = torch.randn_like(tensors[0])
    expected = outcome(textbook, exact, cotangent.double(), **options)
    for value, right in zip(outcome(rk.ops.attention, tensors, cotangent, **options), expected, strict=True):
        assert value.dtype == tensors[0].dtype
        assert value.shape == right.shape
        # Where a row sees one key, its gradient is zero but for rounding.
        assert (value.double() - right).abs().max() <= tolerance * max(1.0, right.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"is_causal": False}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_float64_and_the_reference(size, options):
    assert_parity(arguments(*size, torch.float64), 1e-12, **options)
    tensors = arguments(*size, torch.float64)
    torch.testing.assert_close(rk.reference.attention(*tensors, **options), textbook(*tensors, **options))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("size", SIZES)
def test_every_type(size, dtype, tolerance):
    assert_parity(arguments(*size, dtype), tolerance)


def test_a_step_of_a_whole_past_is_the_last_row():
    query, key, value = arguments(2, 3, 20, 20, 8, torch.float64)
    whole = rk.ops.attention(query, key, value)
    torch.testing.assert_close(rk.ops.attention(query[:, :, -1:], key, value), whole[:, :, -1:])
    torch.testing.assert_close(rk.ops.attention(query[:, :, -5:], key, value), whole[:, :, -5:])


def test_no_step_sees_the_future():
    query, key, value = (tensor.detach() for tensor in arguments(1, 1, 12, 12, 4, torch.float32))
    expected = rk.ops.attention(query, key, value)
    for tensor in (query, key, value):
        tensor[:, :, 7:] = torch.randn(1, 1, 5, 4)
    torch.testing.assert_close(rk.ops.attention(query, key, value)[:, :, :7], expected[:, :, :7])


def test_transforms_of_functions():
    query, key, value = (tensor.detach() for tensor in arguments(1, 2, 5, 5, 3, torch.float64))
    mapped = torch.func.vmap(rk.ops.attention)(*(tensor.expand(3, 1, 2, 5, 3) for tensor in (query, key, value)))
    torch.testing.assert_close(mapped[1], textbook(query, key, value))
    leaf = query.clone().requires_grad_()
    expected = torch.autograd.grad(textbook(leaf, key, value).sum(), leaf)[0]
    torch.testing.assert_close(torch.func.grad(lambda q: rk.ops.attention(q, key, value).sum())(query), expected)


def test_compiles_without_graph_breaks():
    compiled = torch.compile(rk.ops.attention, fullgraph=True, backend="aot_eager")
    for lengths in ((6, 6), (1, 9), (3, 8)):
        tensors = arguments(2, 2, *lengths, 4, torch.float32)
        torch.testing.assert_close(compiled(*tensors), textbook(*tensors))


def test_autocast_runs_in_its_type():
    tensors = arguments(1, 2, 6, 6, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = rk.ops.attention(*tensors)
    assert output.dtype == torch.bfloat16
    assert relative_error(output.detach(), textbook(*tensors).detach().double()) < 2e-2


GOOD = {"query": torch.randn(2, 3, 5, 4), "key": torch.randn(2, 3, 7, 4), "value": torch.randn(2, 3, 7, 4)}


@pytest.mark.parametrize(
    ("name", "error", "message", "value"),
    [
        ("query", TypeError, "Tensor, got list", [[0.0]]),
        ("query", ValueError, r"\(batch, heads, query_length, head_dim\), got \(5, 4\)", torch.randn(5, 4)),
        ("key", ValueError, r"\(2, 3, key_length, 4\), got \(2, 3, 7, 5\)", torch.randn(2, 3, 7, 5)),
        ("key", TypeError, "torch.float32, as query has, got torch.float64", torch.randn(2, 3, 7, 4).double()),
        ("value", ValueError, r"\(2, 3, 7, 4\), got \(2, 3, 6, 4\)", torch.randn(2, 3, 6, 4)),
    ],
)
def test_bad_input_is_refused_by_name(name, error, message, value):
    with pytest.raises(error, match=f"^{name}: expected.*{message}"):
        rk.ops.attention(**{**GOOD, name: value})


def test_a_query_must_have_its_key():
    few = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="key: expected at least 5 steps, got 4"):
        rk.ops.attention(GOOD["query"], few, few)
    assert rk.ops.attention(GOOD["query"], few, few, is_causal=False).shape == (2, 3, 5, 4)


@pytest.fixture
def on_triton(kernel_device):
    with rk.use_backend("triton"):
        yield kernel_device


@pytest.mark.interpreter
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_the_kernels_match_in_any_size(on_triton, poisoned, size, is_causal):
    assert_parity(arguments(*size, torch.float32, on_triton), 3e-6, is_causal=is_causal)


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("size", [(1, 2, 70, 100, 16), (1, 1, 33, 33, 65)])
def test_the_kernels_match_in_half_precision(on_triton, poisoned, size, dtype, tolerance):
    assert_parity(arguments(*size, dtype, on_triton), tolerance)


@pytest.mark.interpreter
def test_the_kernels_stand_large_scores(on_triton):
    # Exponentials of such scores overflow, unless the maximum is taken off.
    query, key, value = arguments(1, 1, 40, 40, 8, torch.float32, on_triton)
    tensors = [(30 * query).detach().requires_grad_(), (30 * key).detach().requires_grad_(), value]
    exact = [tensor.detach().double() for tensor in tensors]
    assert relative_error(rk.ops.attention(*tensors).detach(), textbook(*exact)) < 2e-3


@pytest.mark.interpreter
def test_the_kernels_repeat_their_bits(on_triton):
    tensors = arguments(1, 2, 40, 40, 8, torch.float32, on_triton)
    runs = [outcome(rk.ops.attention, tensors, torch.ones_like(tensors[0])) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.interpreter
def test_double_backward_of_the_kernels(on_triton):
    tensors = arguments(1, 1, 5, 6, 3, torch.float32, on_triton)
    penalties = []
    for function in (rk.ops.attention, rk.reference.attention):
        gradients = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        penalties.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors))
    for a, b in zip(*penalties, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.interpreter
def test_wide_heads_and_no_heads(on_triton):
    assert_parity(arguments(1, 1, 5, 5, 130, torch.float32, on_triton), 3e-6)
    tensors = arguments(0, 2, 5, 5, 4, torch.float32, on_triton)
    assert rk.ops.attention(*tensors).shape == (0, 2, 5, 4)


@pytest.mark.interpreter
def test_opcheck_of_the_kernels(on_triton):
    tensors = arguments(1, 2, 17, 20, 8, torch.float32, on_triton)
    torch.library.opcheck(torch.ops.rnnkernels.attention.default, (*tensors, True, 0.3))


def compile_kernels(capability, kind, head_dim):
    """What the three kernels need. Runs in a worker, without the interpreter."""
    import offline
    import torch

    from rnnkernels.kernels.triton import attention as kernels

    torch.set_float32_matmul_precision("high" if kind == "float32 tf32" else "highest")
    tensor = torch.zeros(1, 2, 200, head_dim, dtype=getattr(torch, kind.split()[0]))
    with offline.absent_gpu(capability) as launches:
        output, logsumexp = kernels.forward(tensor, tensor, tensor, True, 0.1)
        kernels.backward(tensor, output, logsumexp, tensor, tensor, tensor, True, 0.1)
    return [offline.needs(compiled, capability) for _, compiled in launches]


@pytest.fixture(scope="module")
def worker():
    pytest.importorskip("triton", reason="Triton is not installed: its kernels can't be compiled here")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
            yield pool


@pytest.mark.offline
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["bfloat16", "float32 ieee", "float32 tf32"])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_it_compiles_and_fits(worker, head_dim, kind, capability):
    found = worker.submit(compile_kernels, capability, kind, head_dim).result(timeout=600)
    assert len(found) == 3
    for needs in found:
        assert needs["spilled_bytes"] <= 32, needs
        assert needs["shared_memory"] <= 99 * 1024, needs
