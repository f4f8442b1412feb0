"""The model of a step's time: against arithmetic done by hand, and against what must be true of any such model."""

import doctest
import itertools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import model  # noqa: E402

CELLS, KINDS, PASSES = tuple(model.GATES), tuple(model.BYTES), ("forward", "backward")
EVERY = list(itertools.product(CELLS, KINDS, PASSES))


def test_its_examples():
    assert doctest.testmod(model).failed == 0


@pytest.mark.parametrize("device", model.DEVICES.values(), ids=lambda device: device.name)
def test_data_sheets_agree_with_themselves(device):
    """Peaks are operations per clock and multiprocessor, powers of two, times clocks and multiprocessors."""
    for kind, operations in device.operations.items():
        each = operations / device.multiprocessors / device.clock
        nearest = min((2**power for power in range(6, 14)), key=lambda value: abs(value - each))
        # Outside of tensor cores, Hopper's boost clock is 1.98 GHz.
        assert each == pytest.approx(nearest, rel=0.1 if kind == "ieee" else 0.02), kind


def test_an_lstm_step_by_hand():
    """H=128, B=16, bfloat16 on an H100, resident: 4 * 128 * 128 weights, 16 rows."""
    device = model.DEVICES["H100"]
    step = model.step("lstm", 128, 16, "16-bit", "resident", device)
    assert step.parts == {
        "product": pytest.approx(2 * 65536 * 16 * 132 / 989e12),
        "weights": pytest.approx(131072 / 128 / 1.83e9),
        "gates": pytest.approx(5 * 2 * 16 * 128 / 16 / 1.83e9),
        "exchange": 0,
        "traffic": pytest.approx(16 * 128 * ((4 + 4 + 1) * 2 + 4) / 3.35e12),
    }
    assert step.floor == pytest.approx(1280 / 1.83e9)
    assert step.modelled == pytest.approx(model.CHAIN + (1024 + 1280) / 1.83e9)


def test_a_persistent_step_by_hand():
    """H=1024, B=16: 8 units in each of 128 programs, which all read the state of all."""
    device = model.DEVICES["H100"]
    step = model.step("lstm", 1024, 16, "16-bit", "persistent", device)
    assert step.latency == model.BARRIER
    assert step.parts["weights"] == pytest.approx(4 * 8 * 1024 * 2 / 128 / 1.83e9)
    assert step.parts["exchange"] == pytest.approx(128 * 16 * 1024 * 2 / (5120 * 1.83e9))


@pytest.mark.parametrize(("cell", "kind", "direction"), EVERY)
@pytest.mark.parametrize("device", model.DEVICES.values(), ids=lambda device: device.name)
def test_a_floor_is_a_floor_and_more_work_takes_longer(device, cell, kind, direction):
    for design in model.DESIGNS:
        for batch in (1, 16, 17, 256):
            steps = [model.step(cell, size, batch, kind, design, device, direction) for size in model.HIDDEN_SIZES]
            there = [step for step in steps if step is not None]
            assert all(0 < step.latency + max(step.parts.values()) <= step.floor <= step.modelled for step in there)
            floors = [step.floor for step in there]
            assert floors == sorted(floors)
            # What does not fit at one size fits at no larger one.
            assert [step is None for step in steps] == sorted(step is None for step in steps)
    for size in model.HIDDEN_SIZES:
        times = [model.best(cell, size, batch, kind, device, direction).modelled for batch in (1, 16, 64, 256, 4096)]
        assert times == sorted(times)


def test_no_step_is_faster_than_the_roofs():
    device = model.DEVICES["H100"]
    for (cell, kind, direction), size, batch in itertools.product(EVERY, model.HIDDEN_SIZES, (1, 16, 256)):
        for design in model.DESIGNS:
            step = model.step(cell, size, batch, kind, design, device, direction)
            if step is not None:
                assert step.floor >= model.operations(cell, size, batch) / device.operations[kind]
                assert step.floor >= model.traffic(cell, size, batch, kind, direction) / device.memory_bandwidth
                if design == "step":
                    assert step.floor >= model.LAUNCH


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cell": "transformer"}, "cell: expected one of"),
        ({"multiplication": "fp8"}, "multiplication: expected one of"),
        ({"design": "magic"}, "design: expected one of"),
        ({"direction": "sideways"}, "direction: expected one of"),
        ({"hidden_size": 0}, "hidden_size: expected at least 1, got 0"),
        ({"batch": -1}, "batch: expected at least 1, got -1"),
    ],
)
def test_bad_arguments(change, says):
    arguments = {"cell": "rnn", "hidden_size": 8, "batch": 1, "multiplication": "ieee", "design": "step"}
    with pytest.raises(ValueError, match=says):
        model.step(**arguments | {"device": model.DEVICES["L4"], "direction": "forward"} | change)


@pytest.mark.parametrize(
    ("name", "multiprocessors", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 132, "H100 SXM"),
        ("NVIDIA H200", 132, "H200 SXM"),
        ("NVIDIA A100-SXM4-80GB", 108, "A100 SXM 80 GB"),
        ("NVIDIA L4", 58, "L4"),
        ("NVIDIA L40S", 142, None),
        ("NVIDIA H100 PCIe", 114, None),
        ("NVIDIA GeForce RTX 4090", 128, None),
    ],
)
def test_a_gpu_is_known_by_its_name_and_size(name, multiprocessors, expected):
    found = model.device_of(name, multiprocessors)
    assert (found.name if found else None) == expected


def test_the_command(capsys):
    assert model.main(["--cell", "gru", "--batch", "64", "--device", "L4"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("A model, not a measurement: L4, batch 64")
    assert text.count("gru") == 2 * len(model.HIDDEN_SIZES)
    with pytest.raises(SystemExit):
        model.main(["--batch", "0"])
    assert "expected at least 1, got 0" in capsys.readouterr().err


def test_both_directions_share_the_gpu():
    h100 = model.DEVICES["H100"]

    def times(hidden_size, design):
        size = "lstm", hidden_size, 64, "16-bit", design, h100
        return model.step(*size), model.step(*size, bidirectional=True)

    for hidden_size, design in ((64, "resident"), (512, "persistent")):
        one, both = times(hidden_size, design)
        assert both.latency == one.latency
        assert one.modelled <= both.modelled < 2 * one.modelled
        assert both.parts["traffic"] == 2 * one.parts["traffic"]
    one, both = times(512, "step")
    assert (both.modelled, both.floor) == (2 * one.modelled, 2 * one.floor)
    one, both = times(1536, "persistent")
    assert one is not None
    assert both is None


def test_a_wavefront_of_layers_costs_a_barrier_and_twice_the_rest():
    device = model.DEVICES["H100"]
    one = model.step("lstm", 512, 16, "16-bit", "persistent", device)
    two = model.wavefront("lstm", 512, 16, 2, "16-bit", device, tile=(16, 16))
    assert (two.design, two.latency) == ("wavefront", model.BARRIER)
    assert two.parts["traffic"] == 2 * one.parts["traffic"]
    alone = model._spread(model._Problem("lstm", 512, 16, "16-bit", device, "forward"), 16, 1)
    assert [two.parts[part] / alone.parts[part] for part in ("product", "weights", "gates")] == [2, 2, 1]
    assert two.parts["exchange"] == 4 * alone.parts["exchange"]  # twice the programs read twice as much
    assert model.wavefront("lstm", 512, 17, 5, "16-bit", device, tile=(16, 16)) is None
    with pytest.raises(ValueError, match="layers: expected at least 2, got 1"):
        model.wavefront("lstm", 512, 16, 1, "16-bit", device)


def test_the_table_of_wavefronts_begins_where_the_model_has_them_gain():
    pytest.importorskip("triton", reason="Triton is not installed")
    from rnnkernels.kernels.triton import dispatch

    device = model.DEVICES["H100"]

    def gains(cell, kind, size, tile, layers):
        """At every batch that fits: how many times as long one layer after the other takes."""
        for batch in itertools.count(tile[0], tile[0]):
            passes = [model.wavefront(cell, size, batch, layers, kind, device, each, tile) for each in PASSES]
            if None in passes:
                return
            alone = (layers * model.best(cell, size, batch, kind, device, each).modelled for each in PASSES)
            yield sum(alone) / sum(step.modelled for step in passes)

    for (cell, kind), sizes in dispatch.WAVEFRONT.items():
        for size, tiles in sizes.items():
            for tile, (_, least) in tiles.items():
                enough = [min(gains(cell, kind, size, tile, layers), default=0) >= 1.15 for layers in range(2, 5)]
                assert enough.index(True) + 2 == least, (cell, kind, size, tile)
