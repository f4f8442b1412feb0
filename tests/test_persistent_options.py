"""Options inside the persistent design: its kernels in Triton's interpreter, as ``test_persistent.py`` runs them."""

import itertools

import numpy as np
import pytest
import squares
import torch
from parity import GATES, arguments, assert_padding_goes_nowhere, assert_parity, assert_repeatable, drawn, names_of

import rnnkernels as rk
from rnnkernels import __main__ as report

pytest.importorskip("triton", reason="Triton is not installed: its kernels can't be tested here")

from rnnkernels.kernels.recurrence import Recurrence, Weights
from rnnkernels.kernels.triton import dispatch, general, persistent

pytestmark = pytest.mark.interpreter

OPERATORS = list(GATES)
OPTIONS = {
    "rnn": [
        {"reset": True},
        {"recurrent_dropout": 0.4, "seed": 3},
        {"zoneout": 0.3, "seed": 3},
        {"zoneout": 0.3, "training": False},
        {"grad_clip": 0.05},
        {"lengths": True},
        {"lengths": True, "reverse": True},
    ]
}
OPTIONS["gru"] = [*OPTIONS["rnn"], {"bias": False}]
OPTIONS["lstm"] = [
    *OPTIONS["rnn"],
    {"weight_peephole": True},
    {"zoneout_cell": 0.3, "seed": 3},
    {"zoneout_cell": 0.3, "training": False},
]
ALL = {
    operator: {k: v for option in options for k, v in option.items() if k not in ("training", "bias")}
    for operator, options in OPTIONS.items()
}


def pairs(operator):
    """Pairs of options that do not contradict each other. A bound on gradients has a test of its own."""
    paired = [option for option in OPTIONS[operator] if option not in ({"grad_clip": 0.05}, {"lengths": True})]
    for one, other in itertools.combinations(paired, 2):
        agree = all(one[name] == other[name] for name in one.keys() & other.keys())
        if agree and not {"training", "seed"} <= one.keys() | other.keys():
            yield {**one, **other}


BOTH = ["forward_persistent", "backward_persistent"]


@pytest.fixture
def launches(monkeypatch, kernel_device):
    """The kernels of the persistent design that have been launched, each once a pass."""
    found = []

    def launch(kernel, *passed, **named):
        found.append(kernel.__name__)
        return persistent.launch(kernel, *passed, **named)

    monkeypatch.setattr(general, "launch", launch)
    with rk.use_backend("triton"):
        yield found


@pytest.fixture
def force(monkeypatch, launches):
    """Run every cell with options by the persistent design in this tile."""

    def force(block_batch=16, block_hidden=16):
        def design(cell, hidden_size, *_):
            return dispatch.Persistent(block_batch, block_hidden, 128, chunks=-(-hidden_size // 128))

        monkeypatch.setattr(general, "persistent_design", design)
        return launches

    return force


@pytest.fixture
def forced(force):
    """The same in the smallest tile, and what is launched."""
    return force()


@pytest.fixture
def in_one_launch(monkeypatch):
    """One launch for all steps, the barrier in it."""
    monkeypatch.setattr(persistent, "concurrent", lambda device: True)


@pytest.mark.parametrize(("operator", "option"), [(o, option) for o in OPERATORS for option in OPTIONS[o]], ids=str)
def test_every_option_matches_the_reference(poisoned, forced, kernel_device, operator, option):
    tensors, options = drawn(operator, 3, 3, 17, torch.float32, kernel_device, option)
    assert_parity(tensors, 5e-6, operator, **options)
    assert forced == BOTH


@pytest.mark.parametrize(("operator", "pair"), [(o, pair) for o in OPERATORS for pair in pairs(o)], ids=str)
def test_every_pair_of_options_matches_the_reference(poisoned, forced, in_one_launch, kernel_device, operator, pair):
    tensors, options = drawn(operator, 3, 3, 13, torch.float32, kernel_device, pair)
    assert_parity(tensors, 5e-6, operator, **options)
    assert forced == BOTH


@pytest.mark.parametrize(("lengths", "reset", "reverse"), list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("operator", OPERATORS)
def test_lengths_resets_and_directions(
    poisoned, forced, in_one_launch, kernel_device, operator, lengths, reset, reverse
):
    flags = {"lengths": lengths or None, "reset": reset or None, "reverse": reverse}
    tensors, options = drawn(operator, 5, 5, 3, torch.float32, kernel_device, {**ALL[operator], **flags})
    assert_parity(tensors, 1e-5, operator, **options)


@pytest.mark.parametrize("nonlinearity", rk.ops.NONLINEARITIES)
def test_every_nonlinearity(poisoned, forced, in_one_launch, kernel_device, nonlinearity):
    options = {"zoneout": 0.3, "seed": 1, "reset": True, "nonlinearity": nonlinearity}
    tensors, options = drawn("rnn", 4, 3, 13, torch.float32, kernel_device, options)
    assert_parity(tensors, 5e-6, "rnn", **options)


@pytest.mark.parametrize(
    ("sequence_length", "batch", "hidden_size", "tile"),
    [(1, 1, 1, (16, 16)), (2, 17, 33, (16, 16)), (2, 2, 129, (16, 64)), (2, 33, 17, (32, 32))],
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_all_together_at_every_size(
    poisoned, force, kernel_device, operator, sequence_length, batch, hidden_size, tile
):
    """Several programs and groups, two chunks, and a launch for each step."""
    force(*tile)
    options = {**ALL[operator], "reverse": batch > 2}
    tensors, options = drawn(operator, sequence_length, batch, hidden_size, torch.float32, kernel_device, options)
    assert_parity(tensors, 1e-5, operator, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_half_precision_stays_within_its_bound(
    poisoned, forced, in_one_launch, kernel_device, operator, dtype, tolerance
):
    tensors, options = drawn(operator, 5, 5, 13, dtype, kernel_device, {**ALL[operator], "grad_clip": None})
    assert_parity(tensors, tolerance, operator, **options)
    assert forced == BOTH


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_gradient_of_every_gate_is_clipped(forced, in_one_launch, kernel_device, operator):
    tensors, options = drawn(operator, 2, 5, 13, torch.float32, kernel_device, {"grad_clip": 0.01})
    with torch.no_grad():  # large products, so that even the reset gate's gradient, which others bound, exceeds it
        tensors[names_of(operator).index("weight_hh")].mul_(8)
    assert_parity(tensors, 1e-5, operator, **options)


@pytest.mark.parametrize("operator", OPERATORS)
def test_zoneout_draws_the_masks_of_the_generator(forced, kernel_device, operator):
    sizes = 5, 3, 17
    tensors = arguments(5, 3, 2, 17, torch.float32, kernel_device, operator=operator)
    tensors = [tensor.detach() for tensor in tensors]
    output, *_ = getattr(rk.ops, operator)(*tensors, zoneout=0.4, seed=7)
    stayed = output == torch.cat([tensors[1][None], output[:-1]])
    np.testing.assert_array_equal(stayed.cpu(), squares.dropped(7, squares.ZONEOUT, 0.4, sizes))
    if operator == "lstm":
        *_, c_n = rk.ops.lstm(tensors[0][:1], *tensors[1:], zoneout_cell=0.4, seed=7)
        expected = squares.dropped(7, squares.ZONEOUT_CELL, 0.4, (1, *sizes[1:]))
        np.testing.assert_array_equal((c_n == tensors[2])[None].cpu(), expected)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_either_pass_may_run_by_steps(poisoned, forced, monkeypatch, kernel_device, operator, direction):
    def launch(kernel, *passed, **named):
        return kernel.__name__.startswith(direction) and persistent.launch(kernel, *passed, **named)

    monkeypatch.setattr(general, "launch", launch)
    tensors, options = drawn(operator, 4, 3, 13, torch.float32, kernel_device, ALL[operator])
    assert_parity(tensors, 1e-5, operator, **options)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_refused_launch_falls_back(forced, in_one_launch, monkeypatch, kernel_device, operator):
    class Refusing:
        def __init__(self, kernel):
            self.arg_names = kernel.arg_names
            self.__name__ = kernel.__name__

        def __getitem__(self, grid):
            def launch(*passed, **named):
                raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

            return launch

    monkeypatch.setattr(dispatch, "_refused", set())
    module = general.MODULES[operator]
    for name in BOTH:
        monkeypatch.setattr(module, name, Refusing(getattr(module, name)))
    tensors, options = drawn(operator, 3, 3, 13, torch.float32, kernel_device, ALL[operator])
    with pytest.warns(RuntimeWarning, match="refused a cooperative launch"):
        assert_parity(tensors, 1e-5, operator, **options)
    assert forced == BOTH
    assert dispatch.persistent_design(operator, 13, 3, torch.float32, kernel_device) is None


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_process_for_each_program(force, in_one_launch, poisoned, kernel_device, operator):
    import concurrency

    if kernel_device.type != "cpu":
        pytest.skip("on a GPU the programs run at once anyway")
    force()
    tensors, options = drawn(operator, 3, 17, 17, torch.float32, kernel_device, ALL[operator])
    with concurrency.processes(late=1.0):
        assert_parity(tensors, 1e-5, operator, **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_the_padding_holds_goes_nowhere(forced, in_one_launch, kernel_device, operator, reverse):
    tensors, options = drawn(operator, 6, 3, 5, torch.float32, kernel_device, {**ALL[operator], "reverse": reverse})
    options.pop("lengths")
    options = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    assert_padding_goes_nowhere(operator, tensors, large=9.0, **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_kept_is_finite_in_the_padding(poisoned, forced, kernel_device, operator, reverse):
    size, lengths = 5, torch.tensor([2, 4, 1], device=kernel_device)
    ended = (torch.arange(4, device=kernel_device).unsqueeze(1) >= lengths).unsqueeze(-1)
    rows = GATES[operator] * size
    projected = torch.randn(4, 3, rows, device=kernel_device).masked_fill(ended, float("nan"))
    weights = Weights(torch.randn(rows, size, device=kernel_device))
    h_0, c_0 = torch.randn(2, 3, size, device=kernel_device)
    c_0 = c_0 if operator == "lstm" else None
    zoneout_cell = 0.2 if operator == "lstm" else 0.0
    recurrence = Recurrence(operator, reverse=reverse, zoneout=0.2, zoneout_cell=zoneout_cell)
    trace = general.forward(projected, h_0, c_0, weights, lengths, None, recurrence)
    assert forced == ["forward_persistent"]
    assert all(field.isfinite().all() for field in trace if field is not None)
    assert not trace.output.masked_fill(~ended, 0).any()


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_same_call_gives_the_same_bits_and_changes_no_argument(forced, kernel_device, operator):
    tensors, options = drawn(operator, 3, 3, 13, torch.float32, kernel_device, ALL[operator])
    assert_repeatable(operator, tensors, **options)


@pytest.mark.parametrize("operator", OPERATORS)
def test_layer_norm_and_second_products_run_by_steps(launches, kernel_device, operator):
    for name, (weights, given) in report.options_of(operator, 2, 1, 5).items():
        tensors = {
            k: v.float().to(kernel_device) for k, v in (report.OPERATORS[operator](2, 1, 3, 5) | weights).items()
        }
        given = {k: v.to(kernel_device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        tensors["input"].requires_grad_()
        getattr(rk.ops, operator)(**tensors, **given)[0].sum().backward()
        assert launches == ([] if name in report.BY_STEPS else BOTH), name
        launches.clear()


def test_the_dispatch_chooses_it_where_it_fits(monkeypatch):
    def chosen(cell, hidden_size, batch, dtype=torch.bfloat16):
        design = dispatch.persistent_design(cell, hidden_size, batch, dtype, torch.device("cpu"))
        return design and (design.block_batch, design.block_hidden)

    # Small sizes too, which have a resident design without options.
    assert [chosen(cell, 17, 3) for cell in OPERATORS] == [(16, 16)] * 3
    assert [chosen(cell, 64, 3, torch.float32) for cell in OPERATORS] == [(16, 16)] * 3
    # Not in a tile that spills with options.
    assert [chosen("lstm", 512, batch) for batch in (64, 128, 129)] == [(16, 16), (16, 32), None]
    assert [chosen("gru", size, batch) for size, batch in ((768, 64), (1024, 64))] == [(32, 16)] * 2
    assert chosen("lstm", 768, 48) == (32, 16)
    assert chosen("lstm", 1537, 1) is chosen("rnn", 512, 10_000) is None
    monkeypatch.setattr(dispatch, "COOPERATIVE", False)
    assert chosen("rnn", 17, 3) is None


def test_tiles_that_spill_are_in_the_table():
    for cell, multiplication, inner_size, tile in dispatch.SPILLS_WITH_OPTIONS:
        assert tile in dispatch.PERSISTENT[cell, multiplication][inner_size]
