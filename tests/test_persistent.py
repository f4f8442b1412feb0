"""The persistent design: its kernels and the barrier between their programs, in Triton's interpreter.

The interpreter runs one program after another. So the kernels run one step a launch, as one program with the barrier,
and with a process for each program, where the barrier does its work. On a GPU all of it is one cooperative launch.
"""

import importlib
import itertools

import pytest
import torch
from parity import GATES, arguments, assert_parity, random_lengths

import rnnkernels as rk

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels can't be tested here")

import triton.language as tl  # noqa: E402, F401 (Triton's interpreter looks for it in every module with a kernel)

from rnnkernels.kernels.triton import barrier, dispatch, persistent  # noqa: E402

pytestmark = pytest.mark.interpreter

OPERATORS = list(GATES)
DIRECTIONS = list(itertools.product((False, True), (None, "unsorted")))


def module_of(operator):
    return importlib.import_module(f"rnnkernels.kernels.triton.{operator}")


@pytest.fixture
def force(monkeypatch, kernel_device):
    """Run an operator on Triton by this design, whatever the dispatch would choose."""

    def force(operator, hidden_size, block_batch=16, block_hidden=16):
        design = dispatch.Persistent(block_batch, block_hidden, 128, chunks=-(-hidden_size // 128))
        monkeypatch.setattr(module_of(operator), "choose", lambda *_: design)
        return design

    with rk.use_backend("triton"):
        yield force


@pytest.fixture
def in_one_launch(monkeypatch):
    """One launch for all steps, the barrier in it."""
    monkeypatch.setattr(persistent, "concurrent", lambda device: True)


def options_on(device, reverse, order, batch, sequence_length, **options):
    lengths = order and random_lengths(batch, sequence_length, order).to(device)
    return {**options, "reverse": reverse, "lengths": lengths}


@pytest.mark.parametrize(("reverse", "order"), DIRECTIONS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_direction_matches_the_reference(force, poisoned, kernel_device, operator, reverse, order):
    force(operator, 17)
    tensors = arguments(4, 17, 3, 17, torch.float32, kernel_device, operator=operator)
    assert_parity(tensors, 5e-6, operator, **options_on(kernel_device, reverse, order, 17, 4))


@pytest.mark.parametrize("operator", OPERATORS)
def test_without_biases(force, poisoned, kernel_device, operator):
    force(operator, 3)
    tensors = arguments(3, 2, 3, 3, torch.float32, kernel_device, bias=False, operator=operator)
    assert_parity(tensors, 5e-6, operator, **options_on(kernel_device, True, "unsorted", 2, 3))


@pytest.mark.parametrize("nonlinearity", [f for f in rk.ops.NONLINEARITIES if f != "tanh"])
def test_every_nonlinearity_matches_the_reference(force, poisoned, kernel_device, nonlinearity):
    force("rnn", 17)
    tensors = arguments(4, 3, 3, 17, torch.float32, kernel_device)
    assert_parity(tensors, 5e-6, **options_on(kernel_device, True, "sorted", 3, 4, nonlinearity=nonlinearity))


@pytest.mark.parametrize(
    ("sequence_length", "batch", "hidden_size", "tile"),
    [
        (1, 1, 1, (16, 16)),
        (9, 3, 17, (16, 8)),
        (2, 33, 129, (32, 32)),  # two chunks, and one unit in the last program
        (2, 1, 257, (16, 64)),
    ],
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_size_matches_the_reference(
    force, poisoned, kernel_device, operator, sequence_length, batch, hidden_size, tile
):
    force(operator, hidden_size, *tile)
    tensors = arguments(sequence_length, batch, 3, hidden_size, torch.float32, kernel_device, operator=operator)
    assert_parity(tensors, 5e-6, operator, **options_on(kernel_device, batch > 1, None, batch, sequence_length))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_half_precision_stays_within_its_bound(force, poisoned, kernel_device, operator, dtype, tolerance):
    force(operator, 17)
    tensors = arguments(5, 5, 9, 17, dtype, kernel_device, operator=operator)
    assert_parity(tensors, tolerance, operator, **options_on(kernel_device, False, "unsorted", 5, 5))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("nonlinearity", rk.ops.NONLINEARITIES)
def test_nan_and_infinity_stay_in_their_row(force, kernel_device, nonlinearity, value):
    force("rnn", 17)
    tensors = [tensor.detach() for tensor in arguments(4, 3, 4, 17, torch.float32, kernel_device)]
    tensors[0][2, 1, 0] = value
    leaves = [tensor.requires_grad_() for tensor in tensors]
    output, h_n = rk.ops.rnn(*leaves, nonlinearity=nonlinearity)
    expected = rk.reference.rnn(*leaves, nonlinearity=nonlinearity)
    torch.testing.assert_close((output, h_n), expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(result, leaves[0], torch.ones_like(result))[0] for result in (output, expected[0])]
    torch.testing.assert_close(*gradients, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_it_agrees_with_one_launch_a_step(force, kernel_device, operator):
    """Exchanged values are rounded as the step design rounds them, so that only the order of sums differs."""
    tensors = arguments(4, 3, 3, 17, torch.bfloat16, kernel_device, operator=operator)
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        for design in (force(operator, 17), dispatch.step_design(operator, 17, 3)):
            patch.setattr(module_of(operator), "choose", lambda *_, design=design: design)
            results = getattr(rk.ops, operator)(*tensors)
            torch.manual_seed(1)
            cotangents = [torch.randn_like(result) for result in results]
            runs.append((*results, *torch.autograd.grad(results, tensors, cotangents)))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("operator", OPERATORS)
def test_one_program_with_the_barrier(force, in_one_launch, poisoned, kernel_device, operator):
    force(operator, 13)
    tensors = arguments(5, 3, 3, 13, torch.float32, kernel_device, operator=operator)
    assert_parity(tensors, 5e-6, operator, **options_on(kernel_device, True, "unsorted", 3, 5))


def check_in_processes(kernel_device, operator, **how):
    """Two groups of three programs against the reference, the last of which is late."""
    import concurrency

    tensors = arguments(3, 17, 3, 33, torch.float32, kernel_device, operator=operator)
    with concurrency.processes(**how):
        assert_parity(tensors, 5e-6, operator, **options_on(kernel_device, False, "unsorted", 17, 3))


@pytest.fixture
def on_a_cpu(kernel_device):
    if kernel_device.type != "cpu":
        pytest.skip("on a GPU the programs run at once anyway")


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_process_for_each_program(force, in_one_launch, on_a_cpu, poisoned, kernel_device, operator):
    force(operator, 33)
    check_in_processes(kernel_device, operator, late=1.0)


@triton.jit
def nothing(counter, target):
    pass


@triton.jit
def arrive_at_nothing(counter):
    pass


@triton.jit
def wait_for_one_too_few(counter, target):
    barrier.wait(counter, target - 1)


@triton.jit
def wait_for_one_too_many(counter, target):
    barrier.wait(counter, target + 1)


SABOTAGE = {
    "wait removed": ("wait", nothing, "wrong"),
    "one too few awaited": ("wait", wait_for_one_too_few, "wrong"),
    "one too many awaited": ("wait", wait_for_one_too_many, "deadlock"),
    "arrive removed": ("arrive", arrive_at_nothing, "deadlock"),
}


@pytest.mark.parametrize("fault", list(SABOTAGE))
def test_a_broken_barrier_is_seen(force, in_one_launch, on_a_cpu, monkeypatch, kernel_device, fault):
    import concurrency

    force("rnn", 33)
    name, replacement, outcome = SABOTAGE[fault]
    monkeypatch.setattr(module_of("rnn"), name, replacement)
    if outcome == "deadlock":
        with pytest.raises(concurrency.Deadlock):
            check_in_processes(kernel_device, "rnn", seconds=10.0)
    else:
        with pytest.raises(AssertionError, match="relative error"):
            check_in_processes(kernel_device, "rnn", late=2.0)


@pytest.mark.parametrize("reason", ["too many blocks in cooperative launch", "operation not supported"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_refused_launch_falls_back(force, in_one_launch, monkeypatch, kernel_device, operator, reason):
    from concurrency import Refusing

    refused = set()
    monkeypatch.setattr(dispatch, "_refused", refused)
    design = force(operator, 17)
    for name in ("forward_persistent", "backward_persistent"):
        monkeypatch.setattr(module_of(operator), name, Refusing(reason))
    tensors = arguments(3, 2, 3, 17, torch.float32, kernel_device, operator=operator)
    with pytest.warns(RuntimeWarning, match="refused a cooperative launch"):
        assert_parity(tensors, 5e-6, operator)
    assert refused == {tensors[0].device}
    found = dispatch.designs(operator, 512, 4, torch.bfloat16, tensors[0].device)
    assert type(design) not in map(type, found)


def test_the_table_chooses_what_fits(monkeypatch):
    h100, a100, rtx = (227, 132), (163, 108), (99, 82)

    def chosen(hidden_size, batch, dtype=torch.bfloat16, gpu=h100, cell="lstm"):
        monkeypatch.setattr(dispatch, "shared_memory", lambda device: gpu[0] * 1024)
        monkeypatch.setattr(dispatch, "multiprocessors", lambda device: gpu[1])
        design = dispatch.choose(cell, hidden_size, batch, dtype, torch.device("cuda"))
        return (design.block_batch, design.block_hidden) if type(design) is dispatch.Persistent else type(design)

    # More of a batch takes larger tiles, until none is left whose programs all find a multiprocessor.
    assert [chosen(512, batch) for batch in (1, 64, 65, 128, 129, 256)] == [(16, 16)] * 2 + [(16, 32)] * 2 + [
        (32, 32)
    ] * 2
    assert chosen(512, 257) is dispatch.Step
    assert chosen(512, 64, gpu=a100) == (16, 32)
    assert chosen(512, 64, gpu=rtx) is dispatch.Step
    assert chosen(512, 32, gpu=rtx) == (16, 16)
    assert chosen(1536, 16) == (16, 16)
    assert chosen(1536, 17) is chosen(1536, 16, gpu=a100) is chosen(1537, 1) is dispatch.Step
    assert chosen(2048, 16, cell="gru") == (16, 16)
    assert chosen(128, 8) is dispatch.Resident
    assert chosen(128, 8, gpu=rtx) == (16, 16)
    # Rows off a 16-byte bound take no large tile.
    assert chosen(384, 256) == (32, 32)
    assert chosen(383, 256) is dispatch.Step
    assert (chosen(768, 48), chosen(767, 48)) == ((16, 32), (32, 16))
    assert chosen(1024, 8, torch.float32) is dispatch.Step
    assert chosen(512, 8, torch.float32) == (16, 16)


def test_every_row_of_the_table_is_as_the_kernels_need_it():
    for (cell, kind), sizes in dispatch.PERSISTENT.items():
        assert list(sizes) == sorted(sizes), (cell, kind)
        for inner_size, tiles in sizes.items():
            block_inner = dispatch.inner_block(inner_size, kind)
            assert inner_size % block_inner == 0
            assert block_inner >= 16 * dispatch.Persistent(16, 16, 128, 1).num_warps  # the least that a product takes
            # A program has units of its own in the exchange, also where the last one's are not all in use.
            assert all(inner_size % block_hidden == 0 for _, block_hidden in tiles)


def test_cooperative_launches_can_be_switched_off(monkeypatch):
    size = "rnn", 512, 8, torch.bfloat16, torch.device("cpu")
    assert [type(design) for design in dispatch.designs(*size)] == [dispatch.Persistent, dispatch.Step]
    monkeypatch.setattr(dispatch, "COOPERATIVE", False)
    assert [type(design) for design in dispatch.designs(*size)] == [dispatch.Step]
    assert dispatch._is_on("on") is not dispatch._is_on("off")
    with pytest.raises(ValueError, match="RNNKERNELS_COOPERATIVE: expected 'on' or 'off', got '1'"):
        dispatch._is_on("1")


@pytest.mark.filterwarnings("error")
def test_another_error_of_a_launch_is_raised(force, kernel_device, monkeypatch):
    class Failing:
        def __getitem__(self, grid):
            raise RuntimeError("out of memory")

    force("rnn", 17)
    monkeypatch.setattr(module_of("rnn"), "forward_persistent", Failing())
    with pytest.raises(RuntimeError, match="out of memory"):
        rk.ops.rnn(*arguments(3, 2, 3, 17, torch.float32, kernel_device))
