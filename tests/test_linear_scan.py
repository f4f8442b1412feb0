"""The linear recurrence: the operator on a CPU, and its Triton kernels in every regime."""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from parity import random_lengths, relative_error

import rnnkernels as rk
from rnnkernels.kernels.eager import linear_scan as eager

NAMES = ("output", "h_n", "grad decay", "grad input", "grad h_0")
REGIMES = ("lanes", "chunks", "phases")


def arguments(sequence_length, batch, hidden_size, dtype, device="cpu"):
    """Random decays, most of them gates that remember, inputs and initial states."""
    decay = torch.randn(sequence_length, batch, hidden_size, dtype=torch.float64).add(2).sigmoid()
    decay = torch.where(torch.rand_like(decay) < 0.1, -decay, decay)
    tensors = decay, torch.randn_like(decay), torch.randn(batch, hidden_size, dtype=torch.float64)
    return [tensor.to(dtype=dtype, device=device).requires_grad_() for tensor in tensors]


def random_options(sequence_length, batch, lengths=True, reset=True, reverse=False, device="cpu"):
    return {
        "lengths": random_lengths(batch, sequence_length).to(device) if lengths else None,
        "reset": (torch.rand(sequence_length, batch) < 0.2).to(device) if reset else None,
        "reverse": reverse,
    }


OPTIONS = [
    {"lengths": lengths, "reset": reset, "reverse": reverse}
    for lengths in (False, True)
    for reset in (False, True)
    for reverse in (False, True)
]


def outcome(function, tensors, cotangents, **options):
    results = function(*tensors, **options)
    gradients = torch.autograd.grad(results, tensors, cotangents)
    return [tensor.detach() for tensor in (*results, *gradients)]


def assert_parity(tensors, tolerance, **options):
    """Hold the operator to the reference in float64."""
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    cotangents = [torch.randn_like(tensor).to(tensors[0].dtype) for tensor in (tensors[0], tensors[2])]
    expected = outcome(rk.reference.linear_scan, exact, [c.double() for c in cotangents], **options)
    actual = outcome(rk.ops.linear_scan, tensors, cotangents, **options)
    for name, value, right in zip(NAMES, actual, expected, strict=True):
        assert value.dtype == tensors[0].dtype
        assert value.shape == right.shape
        assert relative_error(value, right) <= tolerance, name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 17, 3), (17, 3, 1), (129, 2, 17), (131, 1, 1), (257, 3, 5)])
def test_float64_matches_the_reference(size, options):
    assert_parity(arguments(*size, torch.float64), 1e-12, **random_options(*size[:2], **options))


@hypothesis.given(data=st.data())
def test_float32_matches_the_reference(data):
    sequence_length, batch, hidden_size = (data.draw(st.integers(1, most)) for most in (300, 5, 9))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    options = random_options(sequence_length, batch, **data.draw(st.sampled_from(OPTIONS)))
    assert_parity(arguments(sequence_length, batch, hidden_size, torch.float32), 2e-6, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-3), (torch.float16, 8e-4)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_half_precision_is_rounded_once(options, dtype, tolerance):
    # Sums are float32: the error is that of storing states, which gradients of decays read, however many the steps.
    assert_parity(arguments(300, 3, 5, dtype), tolerance, **random_options(300, 3, **options))


def numpy_loop(decay, input, initial, reverse=False):
    """Final state and states of the recurrence in float64."""
    states, state = np.empty_like(input), initial
    for t in reversed(range(len(input))) if reverse else range(len(input)):
        state = states[t] = decay[t] * state + input[t]
    return states


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sequence_length", [1000, 9_973, 65_537, 100_000])
def test_long_sequences_match_a_loop_in_float64(sequence_length, reverse):
    decay, input, h_0 = arguments(sequence_length, 1, 3, torch.float32)
    output, h_n = rk.ops.linear_scan(decay, input, h_0, reverse=reverse)
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, (decay, input, h_0), cotangent)
    a, b, initial, outer = (tensor.detach().double().numpy() for tensor in (decay, input, h_0, cotangent))
    states = numpy_loop(a, b, initial, reverse)
    if reverse:
        following, earlier = np.concatenate([0 * a[:1], a[:-1]]), np.concatenate([states[1:], initial[None]])
    else:
        following, earlier = np.concatenate([a[1:], 0 * a[:1]]), np.concatenate([initial[None], states[:-1]])
    carried = numpy_loop(following, outer, 0 * initial, not reverse)
    first = -1 if reverse else 0
    expected = states, states[0 if reverse else -1], carried * earlier, carried, (a * carried)[first]
    for value, right in zip((output, h_n, *gradients), expected, strict=True):
        assert relative_error(value.detach(), torch.from_numpy(right)) < 2e-6


@pytest.mark.parametrize("decay", [1.0, 1 - 1e-7, 1e-30, 0.0, -1.0])
def test_extreme_decays_lose_nothing(decay):
    # Sums of integers below 2^24 are exact in float32; products of small decays underflow, and may.
    input = torch.randint(-9, 10, (20_000, 1, 2)).float()
    output, _ = rk.ops.linear_scan(torch.full_like(input, decay), input)
    states = numpy_loop(np.full(input.shape, np.float32(decay), dtype=np.float64), input.double().numpy(), 0.0)
    assert relative_error(output, torch.from_numpy(states)) <= (0 if abs(decay) in (0, 1) else 1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sequence_length", [1, 4, 40])
def test_gradients_and_second_gradients_by_finite_differences(sequence_length, options):
    tensors = arguments(sequence_length, 2, 1, torch.float64)
    function = functools.partial(rk.ops.linear_scan, **random_options(sequence_length, 2, **options))
    torch.autograd.gradcheck(function, tensors)
    torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_that_can_be_differentiated_are_the_same(options):
    tensors = arguments(50, 3, 2, torch.float64)
    options = random_options(50, 3, **options)
    results = rk.ops.linear_scan(*tensors, **options)
    cotangents = [torch.randn_like(result) for result in results]
    plain = torch.autograd.grad(results, tensors, cotangents, retain_graph=True)
    for a, b in zip(torch.autograd.grad(results, tensors, cotangents, create_graph=True), plain, strict=True):
        assert a.requires_grad
        torch.testing.assert_close(a.detach(), b)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_opcheck(options):
    tensors = arguments(40, 3, 2, torch.float32)
    options = tuple(random_options(40, 3, **options).values())
    torch.library.opcheck(torch.ops.rnnkernels.linear_scan.default, (*tensors, *options, "eager"))
    decay, _, h_0 = (tensor.detach() for tensor in tensors)
    output = torch.randn_like(decay)
    torch.library.opcheck(
        torch.ops.rnnkernels.linear_scan_backward.default,
        (torch.randn_like(output), torch.randn_like(h_0), output, decay, h_0, *options, "eager"),
    )


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_each_gradient_can_be_asked_for_alone(wanted):
    tensors = arguments(40, 3, 2, torch.float32)
    cotangents = torch.randn(40, 3, 2), torch.randn(3, 2)
    expected = torch.autograd.grad(rk.ops.linear_scan(*tensors), tensors[wanted], cotangents)[0]
    alone = [tensor.detach().requires_grad_(i == wanted) for i, tensor in enumerate(tensors)]
    torch.autograd.backward(rk.ops.linear_scan(*alone), cotangents)
    assert torch.equal(alone[wanted].grad, expected)
    assert all(tensor.grad is None for i, tensor in enumerate(alone) if i != wanted)


def test_without_an_initial_state_it_begins_at_zero():
    decay, input, h_0 = arguments(40, 3, 2, torch.float64)
    for got, expected in zip(
        rk.ops.linear_scan(decay, input), rk.ops.linear_scan(decay, input, 0 * h_0.detach()), strict=True
    ):
        assert torch.equal(got, expected)


def test_chunks_and_steps_in_turn_agree(monkeypatch):
    tensors = arguments(1000, 2, 3, torch.float64)
    for reverse in (False, True):
        chunked = rk.ops.linear_scan(*tensors, reverse=reverse)
        with monkeypatch.context() as patch:
            patch.setattr(eager, "CHUNKED_BELOW", 0)
            torch.testing.assert_close(chunked, rk.ops.linear_scan(*tensors, reverse=reverse), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("elements", [1, 45, 800])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 6e-3)])
def test_parts_that_a_cache_holds_join(monkeypatch, dtype, tolerance, elements, options):
    # Parts of one step, of three, and of as many as chunks take; the last is shorter than the others.
    monkeypatch.setattr(eager, "IN_CACHE", elements)
    assert_parity(arguments(130, 3, 5, dtype), tolerance, **random_options(130, 3, **options))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_padded_sequence_is_its_shorter_self(reverse):
    decay, input, h_0 = arguments(70, 3, 4, torch.float64)
    lengths = torch.tensor([44, 70, 1])
    output, h_n = rk.ops.linear_scan(decay, input, h_0, lengths=lengths, reverse=reverse)
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        alone, last = rk.ops.linear_scan(decay[:length, one], input[:length, one], h_0[one], reverse=reverse)
        torch.testing.assert_close(output[:length, one], alone)
        torch.testing.assert_close(h_n[one], last)
        assert not output[length:, b].any()


@pytest.mark.parametrize("reverse", [False, True])
def test_what_lies_in_the_padding_goes_nowhere(reverse):
    tensors = arguments(40, 3, 4, torch.float64)
    lengths = torch.tensor([4, 40, 1])
    cotangents = [torch.randn(40, 3, 4).double(), torch.randn(3, 4).double()]
    expected = outcome(rk.ops.linear_scan, tensors, cotangents, lengths=lengths, reverse=reverse)
    past_end = (torch.arange(40).unsqueeze(1) >= lengths).unsqueeze(-1)
    spoiled = [tensor.detach().masked_fill(past_end, float("nan")).requires_grad_() for tensor in tensors[:2]]
    cotangents[0] = cotangents[0].masked_fill(past_end, float("nan"))
    actual = outcome(rk.ops.linear_scan, [*spoiled, tensors[2]], cotangents, lengths=lengths, reverse=reverse)
    for got, right in zip(actual, expected, strict=True):
        assert torch.equal(got, right)


def test_a_reset_begins_a_new_sequence():
    decay, input, h_0 = arguments(100, 2, 3, torch.float64)
    reset = torch.zeros(100, 2, dtype=torch.bool)
    reset[60] = True
    output, h_n = rk.ops.linear_scan(decay, input, h_0, reset=reset)
    torch.testing.assert_close(output[:60], rk.ops.linear_scan(decay[:60], input[:60], h_0)[0])
    torch.testing.assert_close((output[60:], h_n), rk.ops.linear_scan(decay[60:], input[60:]))


def test_any_memory_layout_will_do():
    tensors = arguments(70, 3, 4, torch.float64)
    cotangents = torch.randn(3, 70, 4).double().transpose(0, 1), torch.ones(()).double().expand(3, 4)
    expected = outcome(rk.ops.linear_scan, tensors, cotangents)
    scattered = [tensor.detach().transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors[:2]]
    scattered.append(tensors[2].detach().t().contiguous().t())
    actual = outcome(rk.ops.linear_scan, [tensor.requires_grad_() for tensor in scattered], cotangents)
    for got, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, right)


def test_the_same_call_gives_the_same_bits_and_changes_nothing():
    tensors = arguments(300, 3, 4, torch.float32)
    before = [tensor.detach().clone() for tensor in tensors]
    cotangents = torch.randn(300, 3, 4), torch.randn(3, 4)
    options = random_options(300, 3)
    runs = [outcome(rk.ops.linear_scan, tensors, cotangents, **options) for _ in range(2)]
    for a, b in zip([*runs[0], *tensors], [*runs[1], *before], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(40, 0, 3), (40, 3, 0)])
def test_nothing_in_nothing_out(size):
    tensors = arguments(*size, torch.float32)
    for value, like in zip(
        outcome(rk.ops.linear_scan, tensors, (torch.randn(size), torch.randn(size[1:]))),
        (tensors[0], tensors[2], *tensors),
        strict=True,
    ):
        assert value.shape == like.shape


def test_compiles_without_graph_breaks():
    compiled = torch.compile(rk.ops.linear_scan, fullgraph=True, backend="aot_eager")
    for steps in (50, 40, 3):
        tensors = arguments(steps, 3, 2, torch.float32)
        options = random_options(steps, 3)
        cotangents = torch.randn(steps, 3, 2), torch.randn(3, 2)
        pairs = (outcome(function, tensors, cotangents, **options) for function in (compiled, rk.ops.linear_scan))
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, in jvp
def test_transforms_of_functions():
    decay, input, h_0 = (tensor.detach() for tensor in arguments(6, 3, 2, torch.float64))
    alone = [rk.ops.linear_scan(decay, input[:, [b]].expand(6, 3, 2), h_0)[0] for b in range(3)]
    mapped = torch.func.vmap(lambda b: rk.ops.linear_scan(decay, b.unsqueeze(1).expand(6, 3, 2), h_0)[0], 1)(input)
    torch.testing.assert_close(mapped, torch.stack(alone))

    def loss(a):
        return rk.ops.linear_scan(a, input, h_0)[0].square().sum()

    leaf = decay.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(decay), torch.autograd.grad(loss(leaf), leaf)[0])
    tangent = torch.randn_like(decay)
    _, along = torch.func.jvp(loss, (decay,), (tangent,))
    torch.testing.assert_close(along, (torch.func.grad(loss)(decay) * tangent).sum())


def test_autocast_takes_the_widest_type():
    decay, input, h_0 = arguments(5, 3, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = rk.ops.linear_scan(decay, input.bfloat16(), h_0)
    assert output.dtype == h_n.dtype == torch.float32
    assert torch.equal(output, rk.ops.linear_scan(decay, input.bfloat16().float(), h_0)[0])


GOOD = {"decay": torch.rand(5, 3, 4), "input": torch.rand(5, 3, 4), "h_0": torch.rand(3, 4)}
BAD = [
    ("decay", TypeError, "Tensor, got list", [[0.0]]),
    ("decay", ValueError, r"shape \(sequence_length, batch, hidden_size\), got \(5, 3\)", torch.rand(5, 3)),
    ("decay", ValueError, "at least 1 step", torch.rand(0, 3, 4)),
    ("decay", TypeError, "floating-point dtype, got torch.int64", torch.ones(5, 3, 4, dtype=torch.int64)),
    ("input", ValueError, r"\(5, 3, 4\), got \(5, 3, 1\)", torch.rand(5, 3, 1)),
    ("input", TypeError, "dtype torch.float32, as decay has, got torch.float64", torch.rand(5, 3, 4).double()),
    ("input", ValueError, "device cpu, where decay is, got meta", torch.rand(5, 3, 4, device="meta")),
    ("h_0", ValueError, r"\(3, 4\), got \(1, 3, 4\)", torch.rand(1, 3, 4)),
    ("h_0", TypeError, "Tensor, got float", 0.0),
    ("lengths", ValueError, "1 to 5 steps, got 0 to 5", torch.tensor([5, 0, 1])),
    ("reset", TypeError, "torch.bool, got torch.float32", torch.zeros(5, 3)),
    ("reset", ValueError, r"\(5, 3\), got \(3, 5\)", torch.zeros(3, 5, dtype=torch.bool)),
]


@pytest.mark.parametrize(("name", "error", "message", "value"), BAD)
def test_bad_input_is_refused_by_name(name, error, message, value):
    with pytest.raises(error, match=f"^{name}: expected.*{message}"):
        rk.ops.linear_scan(**{**GOOD, name: value})


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch, kernel_device):
    """Run everything in the test on Triton in this regime, with tiles so small that there are several of them."""
    from rnnkernels.kernels.triton import linear_scan as kernels

    small = {key: dataclasses.replace(value, block_time=8, block_channels=8) for key, value in kernels.REGIMES.items()}
    monkeypatch.setattr(kernels, "REGIMES", small)
    monkeypatch.setattr(kernels, "choose", lambda *_: request.param)
    # So few programs that a span holds several tiles.
    monkeypatch.setattr(kernels, "PROGRAMS_PER_PROCESSOR", 1)
    monkeypatch.setattr(kernels, "processors", lambda _: 4)
    with rk.use_backend("triton"):
        yield request.param


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: these tiles take minutes in the interpreter")
@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("size", [(1000, 3, 48), (1000, 5, 17), (130, 70, 33)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 6e-3)])
def test_every_regime_with_its_own_tiles(monkeypatch, name, size, dtype, tolerance):
    from rnnkernels.kernels.triton import linear_scan as kernels

    monkeypatch.setattr(kernels, "choose", lambda *_: name)
    for reverse in (False, True):
        options = random_options(*size[:2], reverse=reverse, device="cuda")
        assert_parity(arguments(*size, dtype, "cuda"), tolerance, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_regime_matches_the_reference(regime, poisoned, kernel_device, options):
    tensors = arguments(21, 3, 5, torch.float32, kernel_device)
    assert_parity(tensors, 2e-6, **random_options(21, 3, **options, device=kernel_device))


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 17), (8, 2, 4), (70, 1, 1), (16, 1, 16)])
def test_every_regime_takes_any_size(regime, poisoned, kernel_device, size):
    tensors = arguments(*size, torch.float32, kernel_device)
    for reverse in (False, True):
        assert_parity(tensors, 2e-6, **random_options(*size[:2], reverse=reverse, device=kernel_device))


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-3), (torch.float16, 8e-4)])
def test_every_regime_takes_half_precision(regime, poisoned, kernel_device, dtype, tolerance):
    assert_parity(arguments(37, 2, 3, dtype, kernel_device), tolerance, **random_options(37, 2, device=kernel_device))


@pytest.mark.interpreter
def test_every_regime_repeats_its_bits_and_empties(regime, kernel_device):
    tensors = arguments(20, 2, 3, torch.float32, kernel_device)
    cotangents = torch.randn(20, 2, 3, device=kernel_device), torch.randn(2, 3, device=kernel_device)
    runs = [outcome(rk.ops.linear_scan, tensors, cotangents) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    empty = arguments(4, 0, 3, torch.float32, kernel_device)
    assert rk.ops.linear_scan(*empty)[0].shape == (4, 0, 3)


@pytest.mark.interpreter
def test_double_backward_on_triton(regime, kernel_device):
    penalties = []
    tensors = arguments(10, 2, 2, torch.float32, kernel_device)
    for function in (rk.ops.linear_scan, rk.reference.linear_scan):
        gradients = torch.autograd.grad(function(*tensors)[0].square().sum(), tensors, create_graph=True)
        penalties.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors))
    for a, b in zip(*penalties, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
def test_the_table_has_a_regime_for_every_shape(kernel_device):
    from rnnkernels.kernels.triton import linear_scan as kernels

    device = torch.device("cpu")  # stands for a GPU of 132 multiprocessors
    assert kernels.choose(4096, 2048 * 132, device) == "lanes"
    assert kernels.choose(4096, 64 * 132, device) == kernels.choose(512, 1, device) == "chunks"
    assert kernels.choose(4096, 64 * 132 - 1, device) == "phases"
    expected = {(name, bytes, aligned) for name in REGIMES for bytes in (2, 4) for aligned in (False, True)}
    assert set(kernels.REGIMES) == expected


def compile_regime(name, capability, dtype, hidden_size):
    """What the kernels of a forward and a backward pass with every option need. Runs in a worker."""
    import offline
    import torch

    from rnnkernels.kernels.triton import linear_scan as kernels

    kernels.choose, kernels.processors = lambda *_: name, lambda _: 132
    sequence = torch.zeros(4096, 4, hidden_size, dtype=getattr(torch, dtype))
    options = torch.ones(4, dtype=torch.int64), torch.zeros(4096, 4, dtype=torch.bool)
    with offline.absent_gpu(capability) as launches:
        kernels.forward(sequence, sequence, sequence[0], *options, False)
        kernels.backward(sequence, sequence[0], sequence, sequence, sequence[0], *options, False)
    return [offline.needs(compiled, capability) for _, compiled in launches]


def compiled_for_new_lengths_and_batches():
    """How many kernels a GPU compiles for many lengths and batches. Runs in a worker."""
    import offline
    import torch

    from rnnkernels.kernels.triton import linear_scan as kernels

    kernels.choose = lambda *_: "chunks"
    with offline.absent_gpu(90) as launches:
        for sequence_length, batch in ((1, 1), (2, 16), (17, 3), (16, 64), (33, 1)):
            sequence = torch.zeros(sequence_length, batch, 32)
            kernels.forward(sequence, sequence, sequence[0], None, None, False)
    return len({compiled.hash for _, compiled in launches})


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
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hidden_size", [64, 17])
@pytest.mark.parametrize("name", REGIMES)
def test_it_compiles_and_fits(worker, name, hidden_size, dtype, capability):
    found = worker.submit(compile_regime, name, capability, dtype, hidden_size).result(timeout=600)
    assert len(found) == (6 if name == "phases" else 2)
    for needs in found:
        assert needs["spilled_bytes"] <= 32, needs
        assert needs["shared_memory"] <= 32 * 1024, needs
        if name == "lanes":
            assert needs["shared_memory"] == 0, "a channel's steps are spread over threads"


@pytest.mark.offline
def test_a_new_length_or_batch_compiles_nothing(worker):
    assert worker.submit(compiled_for_new_lengths_and_batches).result(timeout=600) == 1


def test_the_benchmark_runs(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent)
    from benchmarks import scan

    monkeypatch.setattr(scan, "SEQUENCE_LENGTH", 40)
    monkeypatch.setattr(scan, "SCAN_SHAPES", ((2, 3),))
    monkeypatch.setattr(scan, "TRAINING_SHAPES", ((2, 3),))
    bound = eager.CHUNKED_BELOW
    assert scan.main(["--quick", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for kind in ("scan", "MinGRU", "MinLSTM", "chunks"):
        assert f"{kind} T=40" in printed
    assert "target" in printed
    assert bound == eager.CHUNKED_BELOW
