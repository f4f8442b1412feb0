"""Steps replayed as a CUDA graph: on a GPU where there is one, else with a stand-in for the graph."""

import importlib

import pytest
import torch
from parity import GATES, arguments, assert_parity, random_lengths

import rnnkernels as rk

pytestmark = pytest.mark.interpreter

OPERATORS = list(GATES)
CHUNK = 3


@pytest.fixture
def steps(monkeypatch, kernel_device):
    """The module that launches steps, with every recurrence in that design and chunks of a few steps."""
    from rnnkernels.kernels.triton import dispatch, launch

    for table in ("PERSISTENT", "RESIDENT"):
        monkeypatch.setattr(dispatch, table, {key: {} for key in getattr(dispatch, table)})
    monkeypatch.setattr(launch, "CHUNK", CHUNK)
    launch._graphs.clear()
    with rk.use_backend("triton"):
        yield launch
    launch._graphs.clear()


@pytest.fixture
def replays(monkeypatch, kernel_device, steps):
    """A list that grows by one number a graph captured, of how often it was replayed."""
    counts, capture = [], steps.capture

    def captured(launches):
        index, replay = len(counts), launches if kernel_device.type == "cpu" else capture(launches)
        counts.append(0)

        def count_and_replay():
            counts[index] += 1
            replay()

        return count_and_replay

    monkeypatch.setattr(steps, "capture", captured)
    if kernel_device.type == "cpu":
        monkeypatch.setattr(steps, "graphs_serve", lambda device: True)
        monkeypatch.setattr(steps, "stream_of", lambda device: 0)
    return counts


def results_and_gradients(operator, tensors, **options):
    results = getattr(rk.ops, operator)(*tensors, **options)
    torch.manual_seed(1)
    return [*results, *torch.autograd.grad(results, tensors, [torch.randn_like(result) for result in results])]


@pytest.mark.parametrize("sequence_length", [CHUNK, 2 * CHUNK + 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_replay_gives_the_bits_of_launches(steps, replays, kernel_device, operator, reverse, sequence_length):
    tensors = arguments(sequence_length, 3, 2, 5, torch.float32, kernel_device, operator=operator)
    options = {"reverse": reverse, "lengths": random_lengths(3, sequence_length).to(kernel_device)}
    replayed = results_and_gradients(operator, tensors, **options)
    whole = (sequence_length - 1) // CHUNK
    assert replays == ([whole] * 2 if whole else [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "graphs_serve", lambda device: False)
        launched = results_and_gradients(operator, tensors, **options)
    assert replays == ([whole] * 2 if whole else [])
    for a, b in zip(replayed, launched, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_replayed_steps_match_the_reference(replays, poisoned, kernel_device, operator, reverse):
    tensors = arguments(3 * CHUNK + 2, 17, 3, 17, torch.float32, kernel_device, operator=operator)
    lengths = random_lengths(17, 3 * CHUNK + 2).to(kernel_device)
    assert_parity(tensors, 5e-6, operator, lengths=lengths, reverse=reverse)
    assert replays == [3, 3]


@pytest.mark.parametrize("operator", OPERATORS)
def test_one_graph_serves_every_length_and_batch_and_leaves_earlier_results_alone(replays, kernel_device, operator):
    runs = []
    for sequence_length, batch in ((2 * CHUNK + 1, 3), (3 * CHUNK, 1), (CHUNK + 3, 16)):
        tensors = arguments(sequence_length, batch, 2, 5, torch.float32, kernel_device, operator=operator)
        found = results_and_gradients(operator, tensors)
        runs.append((tensors, found, [result.clone() for result in found]))
    assert len(replays) == 2
    for tensors, found, copies in runs:
        assert all(torch.equal(a, b) for a, b in zip(found, copies, strict=True))
        assert_parity(tensors, 5e-6, operator)


def test_what_a_graph_depends_on_makes_another(replays, kernel_device):
    def forward(hidden_size=5, batch=3, dtype=torch.float32, **options):
        tensors = arguments(CHUNK + 1, batch, 2, hidden_size, dtype, kernel_device)
        with torch.no_grad():
            rk.ops.rnn(*tensors, **options)
        return len(replays)

    assert forward() == forward() == 1
    assert forward(hidden_size=6) == 2
    assert forward(batch=17) == 3
    assert forward(dtype=torch.bfloat16) == 4
    assert forward(reverse=True) == 5
    assert forward(nonlinearity="relu") == 6
    assert forward(lengths=torch.tensor([1, 2, CHUNK + 1], device=kernel_device)) == 7
    assert forward() == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("operator", OPERATORS)
def test_within_a_callers_capture(steps, replays, operator):
    tensors = [t.detach() for t in arguments(3 * CHUNK, 3, 2, 5, torch.float32, "cuda", operator=operator)]
    expected = getattr(rk.ops, operator)(*tensors)
    assert replays == [2]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = getattr(rk.ops, operator)(*tensors)
    assert replays == [2]
    for _ in range(2):
        for result in captured:
            result.zero_()
        graph.replay()
        for a, b in zip(captured, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_programs_whose_sequences_have_ended_multiply_nothing(steps, poisoned, kernel_device, operator, reverse):
    lengths = torch.ones(35, dtype=torch.int64)
    lengths[[3, 20]] = torch.tensor([6, 4])  # in the first program of three, once they are sorted
    tensors = arguments(6, 35, 3, 17, torch.float32, kernel_device, operator=operator)
    assert_parity(tensors, 5e-6, operator, lengths=lengths.to(kernel_device), reverse=reverse)
    if kernel_device.type == "cpu":
        module = importlib.import_module(f"rnnkernels.kernels.triton.{operator}")
        with pytest.MonkeyPatch.context() as patch:
            loads = []
            patch.setattr(module, "weight_tile", counting(module.weight_tile, loads))
            assert_parity(tensors, 5e-6, operator, lengths=lengths, reverse=reverse)
        # Forward and backward: three programs where all sequences run, one at each of the other five steps.
        assert len(loads) == 2 * (3 + 5) * {"rnn": 1, "gru": 3, "lstm": 4}[operator]


def counting(function, calls):
    """The same function of a kernel in the interpreter, which leaves a trace of every call."""

    def counted(*arguments):
        calls.append(len(arguments))
        return function(*arguments)

    return counted
