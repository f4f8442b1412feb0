"""Both directions of a layer at once on Triton: in one launch where a design holds them, else one after the other."""

import dataclasses
import importlib
import itertools

import pytest
import torch
from parity import GATES, exact, random_lengths, relative_error
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkernels as rk

pytest.importorskip("triton", reason="Triton is not installed: its kernels can't be tested here")

from rnnkernels.kernels.triton import dispatch, persistent
from rnnkernels.nn import rnn as modules

pytestmark = pytest.mark.interpreter

OPERATORS = list(GATES)
kinds = pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
DESIGNS = {
    "persistent": dispatch.Persistent(16, 16, 128, chunks=1),
    "resident": dispatch.Resident(16, 32, num_warps=4),
    "step": dispatch.Step(16, 32, 32, num_warps=4, num_stages=1),
}


def kernels_of(kind):
    return importlib.import_module(f"rnnkernels.kernels.triton.{kind.lower()}")


@pytest.fixture
def force(monkeypatch, kernel_device):
    """Run the kernels of a module in this design, whatever the dispatch would choose; returns the lanes asked for."""

    def force(kind, design):
        asked = []

        def choose(cell, hidden_size, batch, dtype, device, lanes=1):
            asked.append(lanes)
            return design if isinstance(design, dispatch.Step) else dataclasses.replace(design, lanes=lanes)

        monkeypatch.setattr(kernels_of(kind), "choose", choose)
        return asked

    with rk.use_backend("triton"):
        yield force


@pytest.fixture
def in_one_launch(monkeypatch):
    """One launch for all steps, the barrier in it."""
    monkeypatch.setattr(persistent, "concurrent", lambda device: True)


@pytest.fixture
def launches(monkeypatch):
    """The grids of all launches of kernels of recurrences, by the kernels' names."""
    seen = []

    class Recorded:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            seen.append((self.name, grid))
            return self.kernel[grid]

    for kind, design, direction in itertools.product(OPERATORS, ("resident", "persistent"), ("forward", "backward")):
        name = f"{direction}_{design}"
        kernels = kernels_of(kind)
        monkeypatch.setattr(kernels, name, Recorded(name, getattr(kernels, name)))
    return seen


def module_of(kind, device, dtype=torch.float32, hidden_size=17, **options):
    return getattr(rk, kind)(3, hidden_size, bidirectional=True, device=device, dtype=dtype, **options)


def states_of(module, batch, like):
    shape = 2 * module.num_layers, batch, module.hidden_size
    count = 2 if isinstance(module, rk.LSTM) else 1
    return [torch.randn(shape, dtype=torch.float64).to(like).requires_grad_() for _ in range(count)]


def run(module, input, states=(), lengths=None):
    """All results of a module in a list; of ``torch.nn``'s too, which have to be told by packing how long they are."""
    hx = None if not states else states[0] if len(states) == 1 else tuple(states)
    if lengths is None or isinstance(module, modules.Recurrent):
        output, final = module(input, hx) if lengths is None else module(input, hx, lengths=lengths)
    else:
        packed, final = module(pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False), hx)
        output, _ = pad_packed_sequence(packed, total_length=len(input))
    return [output, *(final if isinstance(final, tuple) else (final,))]


def gradients(results, leaves, **how):
    torch.manual_seed(1)
    cotangents = [torch.randn(result.shape, dtype=torch.float64).to(result) for result in results]
    return torch.autograd.grad(results, leaves, cotangents, **how)


def results_and_gradients(module, input, states=(), lengths=None):
    results = run(module, input, states, lengths)
    return [*(result.detach() for result in results), *gradients(results, (input, *states, *module.parameters()))]


def assert_matches_torch(module, steps, batch, tolerance=5e-6, given=True, order="unsorted"):
    """Hold results and all gradients to ``torch.nn``'s in float64."""
    like = module.weight_ih_l0
    input = torch.randn(steps, batch, 3, dtype=torch.float64).to(like).requires_grad_()
    states = states_of(module, batch, like) if given else []
    lengths = order and random_lengths(batch, steps, order).to(like.device)
    arguments = {"nonlinearity": module.nonlinearity} if isinstance(module, rk.RNN) else {}
    torchs = getattr(torch.nn, type(module).__name__)(
        3, module.hidden_size, module.num_layers, bias=module.bias, bidirectional=True, **arguments
    )
    torchs.load_state_dict(module.state_dict())
    doubles = [exact(state.cpu()) for state in states]
    expected = results_and_gradients(torchs.double(), exact(input.cpu()), doubles, lengths)
    actual = results_and_gradients(module, input, states, lengths)
    for position, (value, right) in enumerate(zip(actual, expected, strict=True)):
        assert value.dtype == like.dtype
        error = relative_error(value.cpu(), right)
        assert error <= tolerance, f"result or gradient {position}: relative error {error:.2e} exceeds {tolerance:.2e}"


@pytest.mark.parametrize("order", [None, "unsorted"])
@pytest.mark.parametrize("design", DESIGNS)
@kinds
def test_both_directions_match_torch(force, poisoned, kernel_device, kind, design, order):
    asked = force(kind, DESIGNS[design])
    assert_matches_torch(module_of(kind, kernel_device), 3, 17, order=order)
    assert asked == ([2] * 2 if design != "step" else [2, 1, 1] * 2)


@pytest.mark.parametrize("design", ["persistent", "resident"])
@kinds
def test_layers_without_biases_and_states(force, poisoned, kernel_device, kind, design):
    force(kind, DESIGNS[design])
    module = module_of(kind, kernel_device, num_layers=2, bias=False)
    assert_matches_torch(module, 3, 2, given=False)


@pytest.mark.parametrize(
    ("steps", "batch", "hidden_size", "tile"), [(1, 1, 1, (16, 16)), (5, 3, 13, (16, 8)), (2, 17, 129, (16, 32))]
)
@kinds
def test_every_size_matches_torch(force, poisoned, kernel_device, kind, steps, batch, hidden_size, tile):
    force(kind, dispatch.Persistent(*tile, 128, chunks=-(-hidden_size // 128)))
    assert_matches_torch(module_of(kind, kernel_device, hidden_size=hidden_size), steps, batch)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "design", "hidden_size"),
    [(torch.bfloat16, 2e-2, "persistent", 5), (torch.float16, 3e-3, "resident", 17)],
)
@kinds
def test_half_precision_stays_within_its_bound(
    force, poisoned, kernel_device, kind, dtype, tolerance, design, hidden_size
):
    force(kind, DESIGNS[design])
    assert_matches_torch(module_of(kind, kernel_device, dtype, hidden_size), 3, 3, tolerance)


@kinds
def test_one_launch_with_the_barrier(force, in_one_launch, launches, poisoned, kernel_device, kind):
    force(kind, DESIGNS["persistent"])
    assert_matches_torch(module_of(kind, kernel_device, hidden_size=13), 5, 17)
    assert launches == [("forward_persistent", (2, 1, 2)), ("backward_persistent", (2, 1, 2))]


@kinds
def test_one_launch_of_the_resident_design(force, launches, kernel_device, kind):
    force(kind, DESIGNS["resident"])
    assert_matches_torch(module_of(kind, kernel_device), 3, 17)
    assert launches == [("forward_resident", (2, 1, 2)), ("backward_resident", (2, 1, 2))]


@kinds
def test_a_process_for_each_program(force, in_one_launch, launches, poisoned, kernel_device, kind):
    """Two groups of two programs for each direction, the last of which is late."""
    if kernel_device.type != "cpu":
        pytest.skip("on a GPU the programs run at once anyway")
    import concurrency

    force(kind, DESIGNS["persistent"])
    with concurrency.processes(late=1.0):
        assert_matches_torch(module_of(kind, kernel_device), 3, 17)
    assert launches == [("forward_persistent", (2, 2, 2)), ("backward_persistent", (2, 2, 2))]


@kinds
def test_the_bits_are_those_of_one_direction_after_the_other(force, kernel_device, kind):
    module, lengths = module_of(kind, kernel_device), torch.tensor([2, 3, 1], device=kernel_device)
    input = torch.randn(3, 3, 3, device=kernel_device, requires_grad=True)
    force(kind, DESIGNS["persistent"])
    found = results_and_gradients(module, input, lengths=lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "can_run_both", lambda input: False)
        expected = results_and_gradients(module, input, lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@kinds
def test_a_refused_launch_falls_back(force, launches, monkeypatch, kernel_device, kind):
    asked = force(kind, DESIGNS["persistent"])
    monkeypatch.setattr(kernels_of(kind), "launch", lambda *_, **__: False)
    assert_matches_torch(module_of(kind, kernel_device), 3, 2)
    assert asked == [2, 1, 1] * 2
    assert not launches


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_gates_computed_again_are_the_same(force, poisoned, kernel_device, kind):
    force(kind, DESIGNS["resident"])
    assert_matches_torch(module_of(kind, kernel_device, recompute_gates=True), 4, 3)


@pytest.mark.parametrize("nonlinearity", rk.ops.NONLINEARITIES)
def test_every_nonlinearity_matches_the_other_back_end(force, poisoned, kernel_device, nonlinearity):
    asked = force("RNN", DESIGNS["persistent"])
    module = module_of("RNN", kernel_device, nonlinearity=nonlinearity)
    assert_back_ends_agree(module, torch.randn(4, 3, 3, device=kernel_device), torch.tensor([2, 4, 1]))
    assert asked == [2, 2]


def assert_back_ends_agree(module, input, lengths=None, tolerance=1e-5):
    runs = []
    for backend in ("triton", "eager"):
        torch.manual_seed(3)
        with rk.use_backend(backend):
            runs.append(results_and_gradients(module, input.requires_grad_(), lengths=lengths))
    for a, b in zip(*runs, strict=True):
        assert relative_error(a, b.double()) <= tolerance


@kinds
def test_random_masks_are_those_of_the_other_back_end(force, kernel_device, kind):
    asked = force(kind, DESIGNS["resident"])
    module = module_of(kind, kernel_device, num_layers=2, dropout=0.5, weight_dropout=0.5)
    assert_back_ends_agree(module, torch.randn(4, 3, 3, device=kernel_device))
    assert asked == [2] * 4


@kinds
def test_every_form_of_input(force, kernel_device, kind):
    asked = force(kind, DESIGNS["resident"])
    module, input = module_of(kind, kernel_device, batch_first=True), torch.randn(4, 3, 3, device=kernel_device)
    lengths = torch.tensor([2, 4, 1], device=kernel_device)
    output, _ = module(input.transpose(0, 1), lengths=lengths)
    packed = pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)
    unpacked, _ = pad_packed_sequence(module(packed)[0], batch_first=True)
    torch.testing.assert_close(unpacked, output)
    alone, _ = module(input[:, 1])
    torch.testing.assert_close(alone, output[1])
    assert set(asked) == {2}


@kinds
def test_autocast_runs_in_its_type_and_keeps_the_weights_type(force, kernel_device, kind):
    asked = force(kind, DESIGNS["resident"])
    module, input = module_of(kind, kernel_device), torch.randn(4, 3, 3, device=kernel_device, requires_grad=True)
    exactly = run(module, input)
    with torch.autocast(kernel_device.type, torch.bfloat16):
        results = run(module, input)
    assert {result.dtype for result in results} == {torch.bfloat16}
    assert {gradient.dtype for gradient in gradients(results, [input, *module.parameters()])} == {torch.float32}
    torch.testing.assert_close([result.float() for result in results], exactly, atol=3e-2, rtol=0)
    assert asked == [2] * 3


@kinds
def test_second_gradients_match_the_other_back_end(force, kernel_device, kind):
    force(kind, DESIGNS["resident"])
    module, input = module_of(kind, kernel_device), torch.randn(3, 2, 3, device=kernel_device, requires_grad=True)
    leaves, runs = [input, *module.parameters()], []
    for backend in ("triton", "eager"):
        with rk.use_backend(backend):
            results = run(module, input, lengths=torch.tensor([3, 2]))
            first = gradients(results, leaves, create_graph=True)
            runs.append(gradients(first, leaves))
    for a, b in zip(*runs, strict=True):
        assert relative_error(a, b.double()) <= 2e-5


def positional(operator, bias, device):
    """Random tensors of both directions, for the operator, and what its results are like."""
    rows = GATES[operator] * 5
    shapes = [(2, 3, 5)] * (2 if operator == "lstm" else 1) + [(2, rows, 3), (2, rows, 5)]
    tensors = [torch.randn(4, 3, 3), *(torch.randn(shape) / 2 for shape in shapes)]
    tensors += [torch.randn(2, rows) if bias else None for _ in range(2)]
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize(
    ("operator", "recompute_gates", "bias"),
    [
        ("rnn", False, True),
        ("gru", False, True),
        ("gru", True, False),
        ("lstm", False, True),
        ("lstm", True, False),
    ],
)
def test_opcheck(kernel_device, operator, recompute_gates, bias):
    tensors = positional(operator, bias, kernel_device)
    lengths = torch.tensor([2, 4, 1], device=kernel_device) if bias else None
    options = ["tanh"] if operator == "rnn" else []
    options += [None] + [recompute_gates] * (operator != "rnn") + ["triton"]
    with rk.use_backend("triton"):
        call = getattr(torch.ops.rnnkernels, operator).default
        leaves = [tensor if tensor is None else tensor.requires_grad_() for tensor in tensors]
        torch.library.opcheck(call, (*leaves, lengths, *options))
        results = [result.detach() for result in call(*leaves, lengths, *options)]
        detached = [tensor if tensor is None else tensor.detach() for tensor in tensors]
        final, kept = (3, results[3:]) if operator == "lstm" else (2, results[2:])
        cotangents = [torch.randn_like(result) for result in results[:final]]
        needs = {"rnn": [True, False, True, False, bias], "gru": [False, False, True, True, bias, bias]}
        needs = needs.get(operator, [True, False, True, bias])
        own = detached[:-2] if operator == "rnn" else detached
        backward = getattr(torch.ops.rnnkernels, f"{operator}_backward").default
        torch.library.opcheck(backward, (*cotangents, results[0], *kept, *own, lengths, *options, needs))


@kinds
def test_new_lengths_and_batches_do_not_compile_again(force, kernel_device, kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    asked = force(kind, DESIGNS["resident"])
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = module_of(kind, kernel_device, hidden_size=5)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for number, (steps, batch) in enumerate([(3, 2), (4, 3), (5, 17)]):
        input = torch.randn(steps, batch, 3, device=kernel_device, requires_grad=True)
        lengths = random_lengths(batch, steps).to(kernel_device)
        runs = []
        for function in (compiled, module):
            output, final = function(input, lengths=lengths)
            results = [output, *(final if isinstance(final, tuple) else (final,))]
            runs.append([*results, *gradients(results, [input, *module.parameters()])])
        torch.testing.assert_close(*runs)
        if number == 1:
            compilations = counter.frame_count
    assert counter.frame_count == compilations <= 2
    assert set(asked) == {2}


class _Called(Exception):
    pass


OTHERS = [
    ("LSTM", {"zoneout": 0.1}),
    ("LSTM", {"zoneout_cell": 0.1}),
    ("LSTM", {"proj_size": 3}),
    ("LSTM", {"peephole": True}),
    ("LSTM", {"layer_norm": True}),
    ("GRU", {"reset_after": False}),
    ("GRU", {"recurrent_dropout": 0.1}),
    ("RNN", {"grad_clip": 1.0}),
]


@pytest.fixture
def never_both(monkeypatch):
    def called(*_, **__):
        raise _Called

    monkeypatch.setattr(modules, "both_directions", called)


@pytest.mark.parametrize(("kind", "options"), OTHERS)
def test_options_run_one_direction_after_the_other(never_both, kernel_device, kind, options):
    input = torch.randn(3, 2, 3, device=kernel_device)
    with rk.use_backend("triton"):
        module_of(kind, kernel_device, hidden_size=5, **options)(input)


@kinds
def test_what_else_runs_one_direction_after_the_other(never_both, kernel_device, kind):
    module, input = module_of(kind, kernel_device, hidden_size=5), torch.randn(3, 2, 3, device=kernel_device)
    with rk.use_backend("triton"):
        with pytest.raises(_Called):
            module(input)
        module(input, reset=torch.zeros(3, 2, dtype=torch.bool, device=kernel_device))
        torch.func.jacrev(lambda x: module(x)[0])(input)
        getattr(rk, kind)(3, 5, device=kernel_device)(input)
    with rk.use_backend("eager"):
        module(input)


def test_two_directions_need_twice_the_multiprocessors():
    def chosen(hidden_size, batch, lanes, cell="lstm"):
        design = dispatch.choose(cell, hidden_size, batch, torch.bfloat16, torch.device("cpu"), lanes)
        tile = (design.block_batch, design.block_hidden) if isinstance(design, dispatch.Persistent) else type(design)
        return tile, design.lanes, design.grid(batch, hidden_size)

    step = dispatch.Step
    assert chosen(512, 64, 1) == ((16, 16), 1, (4, 32))
    assert chosen(512, 32, 2) == ((16, 16), 2, (2, 32, 2))
    assert chosen(512, 33, 2) == chosen(512, 64, 2)[:2] + ((3, 16, 2),) == ((16, 32), 2, (3, 16, 2))
    assert chosen(512, 128, 2)[:2] == ((32, 32), 2)
    assert chosen(512, 129, 2)[:2] == (step, 1)
    assert chosen(1024, 16, 2)[:2] == ((16, 16), 2)
    assert chosen(1536, 16, 1)[0] == (16, 16)
    assert chosen(1536, 16, 2)[:2] == (step, 1)
    assert chosen(128, 40, 2) == (dispatch.Resident, 2, (3, 1, 2))
    assert chosen(128, 40, 1) == (dispatch.Resident, 1, (3,))
