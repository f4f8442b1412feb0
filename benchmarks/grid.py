"""The grid of a visit to a GPU: every cell, type, pass and size beside ``torch.nn``, the most telling cases first.

Beside ``torch.nn`` stand the loop over steps of ``benchmarks.options`` and, in some cases, the reference's loop through
``torch.compile``; where they can be captured, each in a CUDA graph as well. A plain layer's recurrence is also timed
alone, without the product of the input.
"""

import contextlib
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import designs, model, runner
from benchmarks.cases import Case
from benchmarks.options import Loop
from rnnkernels import reference
from rnnkernels.__main__ import LIMITS, arithmetic

# Each from what says most to what says least
MODULES = ("LSTM", "GRU", "RNN")
KINDS = (
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"dtype": "float32", "precision": "high"},
)
MODES = ("forward+backward", "forward")
BATCHES = (16, 64, 256, 1)
HIDDEN_SIZES = (512, 128, 1024, 256, 768, 2048, 64)
SEQUENCE_LENGTHS = (1024, 128)

LONGEST_LOOP = 128
"""Steps up to which the loop runs too: it takes longer than all else."""

COMPILED_LOOPS = ((16, 512),)
"""(batch, hidden_size) of the cases with a compiled loop: compiling takes longer than all else."""

COMPILED_STEPS = 4
"""Steps that are compiled as one."""

VARIANTS = ({"num_layers": 3}, {"bidirectional": True}, {"padded": True})
VARIANT_BATCHES = (16, 64)
VARIANT_HIDDEN_SIZES = (512, 256, 1024)

FIRST = (
    Case(1024, 16, 768, 768, "forward", "LSTM", "float16"),
    Case(1024, 16, 768, 768, "forward+backward", "LSTM", "float16"),
)
"""The size of the best published figure of cuDNN."""


def cases() -> list[Case]:
    """The grid, from coarse to fine: the first cases of each choice before the second ones."""
    found = []
    axes = (MODULES, KINDS, MODES, BATCHES, HIDDEN_SIZES, SEQUENCE_LENGTHS)
    for rank, (module, kind, mode, batch, size, steps) in _ranked(*axes):
        found.append((rank, Case(steps, batch, size, size, mode, module, **kind)))
    axes = (VARIANTS, MODULES, KINDS, MODES, VARIANT_BATCHES, VARIANT_HIDDEN_SIZES, SEQUENCE_LENGTHS[:1])
    for rank, (variant, module, kind, mode, batch, size, steps) in _ranked(*axes):
        found.append((rank + 1, Case(steps, batch, size, size, mode, module, **kind, **variant)))
    ordered = [case for _, case in sorted(found, key=lambda each: each[0])]
    return list(dict.fromkeys((*FIRST, *ordered)))


def missing(results: list[dict]) -> list[Case]:
    """The cases of the grid that were not measured."""
    measured = {result["name"] for result in results if result["status"] == "measured"}
    return [case for case in cases() if case.name not in measured]


def _ranked(*axes: tuple) -> list[tuple[int, tuple]]:
    """Every combination, with the sum of its positions on the axes."""
    positions = itertools.product(*(range(len(axis)) for axis in axes))
    return [(sum(each), tuple(axis[i] for axis, i in zip(axes, each, strict=True))) for each in positions]


def is_plain(case: Case) -> bool:
    """Whether it is one layer in one direction, all sequences of one length."""
    return case.num_layers == 1 and not (case.bidirectional or case.padded or case.packed)


def cudnn_algorithm(case: Case, direction: str, capability: tuple[int, int], multiprocessors: int) -> str:
    """The algorithm of cuDNN that PyTorch asks for: ``"persistent"``, ``"persistent, small"`` or ``"standard"``.

    The rule is ``get_algo`` of PyTorch's ``aten/src/ATen/native/cudnn/RNN.cpp`` for GPUs from Ampere on. What cuDNN
    then runs is in the names of its kernels.
    """
    if case.packed or case.padded:
        return "standard"
    # cuDNN's own kernels for a hidden state that one multiprocessor can hold
    small = {"forward": (384, 192), "backward": (256, 128)}[direction][case.module != "RNN"]
    if case.hidden_size <= small:
        return "persistent, small"
    plain = case.num_layers == 1 and not case.bidirectional and case.dtype == "float16"
    sizes = case.hidden_size <= 1024 and case.hidden_size % 128 == case.input_size % 128 == 0
    device = capability[0] >= 8 and capability[1] != 6 and multiprocessors >= 98
    batch = case.batch % 8 == 0 and case.batch <= 128
    if case.module == "RNN":
        batch = batch and (case.batch < 96 or case.hidden_size < 896)
    return "persistent" if plain and sizes and device and batch and case.module != "GRU" else "standard"


def rows_to_compare(batch: int) -> Tensor:
    """At most 16 rows, spread over the batch: float64 is too slow and too large for all of them."""
    return torch.linspace(0, batch - 1, min(batch, 16)).round().long()


def _loop(tested: runner.Call) -> runner.Call:
    """The loop over steps on the weights and input of rnnkernels' side."""
    module, input, *_ = tested.forward.args
    loop = Loop(module)

    def forward():
        output, *final = loop(input, None, None, {})
        return output, *(state.unsqueeze(0) for state in final)

    return runner.Call(forward, tested.leaves, tested.cotangents)


def _compiled_loop(tested: runner.Call, backend: str = "inductor") -> runner.Call:
    """The loop of the reference on the weights and input of rnnkernels' side, some steps at a time compiled."""
    module, input, *_ = tested.forward.args
    cell = getattr(reference, type(module).__name__.lower())
    weights = [getattr(module, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]

    torch.compiler.reset()  # what other cases compiled counts against a limit

    @torch.compile(fullgraph=True, dynamic=False, backend=backend)
    def some_steps(input, *states):
        return cell(input, *states, *weights)

    def forward():
        zeros = input.new_zeros(input.shape[1], module.hidden_size)
        states, outputs = (zeros,) * (2 if module.mode == "LSTM" else 1), []
        for chunk in input.split(COMPILED_STEPS):
            output, *states = some_steps(chunk, *states)
            outputs.append(output)
        return torch.cat(outputs), *(state.unsqueeze(0) for state in states)

    return runner.Call(forward, tested.leaves, tested.cotangents)


def _graphed(call: runner.Call) -> Callable[[], tuple[Tensor, ...]]:
    """All that a call does, in a CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(runner.WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        results = call()

    def replay(_=None):
        graph.replay()
        return results

    return replay


def recurrence(case: Case) -> dict:
    """What ``benchmarks.designs`` needs to know of the case to run its steps alone: the last pass of its mode."""
    return {
        "operator": case.module.lower(),
        "hidden_size": case.hidden_size,
        "batch": case.batch,
        "sequence_length": case.sequence_length,
        "dtype": case.dtype,
        "precision": case.precision,
        "pass": "forward" if case.mode == "forward" else "backward",
    }


def kernel_names(function: Callable[[], object]) -> list[str]:
    """The kernels that a call launches on the GPU, by the time that they take."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    found = [event for event in profiler.key_averages() if event.device_time_total > 0]
    return [event.key for event in sorted(found, key=lambda event: -event.device_time_total)][:5]


def run_case(case: Case, device: torch.device, seconds: float, rounds: tuple[int, int]) -> dict:
    """Compare and time one case, as :func:`benchmarks.runner.run_case` does, beside the loop as well."""
    torch.manual_seed(0)
    result = {**runner.fields(case), "status": "failed", "reason": None}
    with runner.precision(case.precision):
        return result | runner.attempt(_measured, case, device, seconds, rounds)


def _measured(case: Case, device: torch.device, seconds: float, rounds: tuple[int, int]) -> dict:
    limit = LIMITS[arithmetic(getattr(torch, case.dtype), device)]
    rows = rows_to_compare(case.batch)
    calls = runner.calls_of(case, device, rows)
    exact = calls.pop("exact")()
    errors = runner.errors_of(calls, exact, rows)
    found = runner.compared(errors, {"torch.nn": runner.BASELINE_SLACK * limit, "rnnkernels": limit})
    found["compared_rows"] = len(rows)
    if found["status"] == "differs":
        return found
    clock = runner.clock(device)
    times = runner.interleave(calls, clock, seconds, rounds)
    if is_plain(case):
        if case.sequence_length <= LONGEST_LOOP:
            times |= _loop_times(_loops(case, calls["rnnkernels"]), exact, rows, runner.BASELINE_SLACK * limit, clock)
        alone = recurrence(case)
        found["design"] = str(designs.designs_for(alone, device)[0])
        with designs.without_fallback():
            run = designs.pass_of(alone, device)
            milliseconds = runner.interleave({"recurrence": run}, clock, seconds / 3, rounds)["recurrence"]
        found["microseconds_per_step"] = runner.summarize([1e3 * each / case.sequence_length for each in milliseconds])
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        directions = ("forward", "backward") if case.mode == "forward+backward" else ("forward",)
        found["cudnn"] = {
            each: cudnn_algorithm(case, each, (gpu.major, gpu.minor), gpu.multi_processor_count) for each in directions
        }
        if case.sequence_length == min(SEQUENCE_LENGTHS):
            with contextlib.suppress(RuntimeError):  # where another profiler is at work
                found["cudnn_kernels"] = kernel_names(calls["torch.nn"])
    return found | runner.timed(times)


def _loops(case: Case, tested: runner.Call) -> dict[str, runner.Call]:
    """The loops that stand beside a case."""
    compiled = (case.batch, case.hidden_size) in COMPILED_LOOPS
    return {"loop": _loop(tested)} | ({"compiled loop": _compiled_loop(tested)} if compiled else {})


def _loop_times(
    loops: dict[str, runner.Call], exact: tuple[Tensor, ...], rows: Tensor, limit: float, clock: Callable
) -> dict[str, list[float]]:
    """The loops' times, and those of their graphs on a GPU; nothing of one that is wrong or can't run.

    Few rounds, since they are far slower than their neighbours.
    """
    times = {}
    for name, loop in loops.items():
        sides = {name: loop}
        try:
            if not runner.errors_of(sides, exact, rows)[name] <= limit:
                raise RuntimeError("its results are wrong")
            if isinstance(clock, runner.CUDAClock):
                sides[f"{name} in a CUDA graph"] = _graphed(loop)
            times |= runner.interleave(sides, clock, seconds=0.0, rounds=(3, 3))
        except RuntimeError as error:  # out of memory, or the compiler's own
            print(f"the {name} was not timed: {error}", flush=True)
    return times


# What is promised


@dataclass(frozen=True)
class Target:
    """A promise about the measured cases."""

    text: str
    """What is promised."""
    statistic: str
    """``"geometric mean"``, ``"lowest"`` or ``"highest"``."""
    bound: float
    """At least this, or at most for ``"highest"``."""
    value: Callable[[Case, dict, model.Device | None], float | None]
    """What a case counts; None where the target does not speak of it."""


def _ratio(applies: Callable[[Case], bool]) -> Callable[[Case, dict, model.Device | None], float | None]:
    return lambda case, result, device: result["ratio"] if applies(case) else None


def _of_floor(case: Case, result: dict, device: model.Device | None) -> float | None:
    step, microseconds = modelled(case, result.get("design"), device), _microseconds(result)
    if step is None or microseconds is None or step.design == "step":
        return None
    return microseconds / (1e6 * step.floor)


def _microseconds(result: dict) -> float | None:
    return result["microseconds_per_step"]["median"] if "microseconds_per_step" in result else None


def modelled(case: Case, design: str | None, device: model.Device | None) -> model.Step | None:
    """The model's time for the recurrence that the case times alone; None where it has none."""
    if device is None or design is None or not is_plain(case):
        return None
    kind = "16-bit" if case.dtype != "float32" else "tf32" if case.precision == "high" else "ieee"
    direction = recurrence(case)["pass"]
    name = design.partition("(")[0].lower()
    if name not in model.DESIGNS:
        return None
    return model.step(case.module.lower(), case.hidden_size, case.batch, kind, name, device, direction)


_SLOW_PATHS = {
    "bfloat16": lambda case: case.dtype == "bfloat16",
    "GRU": lambda case: case.module == "GRU",
    "stacked": lambda case: case.num_layers > 1,
    "bidirectional": lambda case: case.bidirectional,
    "variable lengths": lambda case: case.padded,
}

TARGETS = (
    Target(
        "forward+backward, geometric mean of the grid",
        "geometric mean",
        2.0,
        _ratio(lambda case: case.mode == "forward+backward"),
    ),
    Target("never slower: lowest ratio of the grid, 5 % left for noise", "lowest", 0.95, _ratio(lambda case: True)),
    *(
        Target(f"cuDNN's slow paths: {name}, geometric mean", "geometric mean", 3.0, _ratio(applies))
        for name, applies in _SLOW_PATHS.items()
    ),
    Target(
        "LSTM forward, float16, H=768, B=16, T=1024: microseconds a step",
        "highest",
        2.0,
        lambda case, result, device: _microseconds(result) if case == FIRST[0] else None,
    ),
    Target("resident and persistent designs: a step's time over the model's floor", "highest", 2.0, _of_floor),
)
"""Promises about the grid on an H100 or H200."""


def verdicts(results: list[dict], gpu: dict | None, complete: bool) -> list[dict]:
    """Each target with the value reached.

    ``met`` is None where nothing that it speaks of was measured and, for a mean, where the grid is not ``complete``; a
    bound on every case is broken by one.
    """
    device = model.device_of(gpu["name"], gpu["multiprocessors"]) if gpu else None
    measured = [(runner.case_of(result), result) for result in results if result["status"] == "measured"]
    combine = {"geometric mean": statistics.geometric_mean, "lowest": min, "highest": max}
    found = []
    for target in TARGETS:
        values = [target.value(case, result, device) for case, result in measured]
        values = [value for value in values if value is not None]
        value = combine[target.statistic](values) if values else None
        bound = "at_most" if target.statistic == "highest" else "at_least"
        within = value is not None and (value <= target.bound if bound == "at_most" else value >= target.bound)
        broken = value is not None and not within and target.statistic != "geometric mean"
        met = within if values and (complete or broken) else None
        found.append({"target": target.text, bound: target.bound, "value": value, "met": met})
    return found


def table(results: list[dict]) -> list[str]:
    """For each module and type the geometric means of the ratios, and the lowest one."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        if result["status"] == "measured":
            kind = result["dtype"] if result["precision"] == "highest" else "TF32"
            groups.setdefault((result["module"], kind), []).append(result)
    lines = [f"{'':14}{'forward+backward':>24}{'forward':>24}  lowest ratio"] if groups else []
    for (module, kind), measured in sorted(groups.items()):
        columns = []
        for mode in MODES:
            ratios = [result["ratio"] for result in measured if result["mode"] == mode]
            text = f"{statistics.geometric_mean(ratios):.2f} of {len(ratios)} cases" if ratios else "-"
            columns.append(f"{text:>24}")
        lowest = min(measured, key=lambda result: result["ratio"])
        lines.append(f"{module:5}{kind:9}{''.join(columns)}  {lowest['ratio']:.2f} ({lowest['name']})")
    return lines


def verdict_line(verdict: dict) -> str:
    """A target in a line."""
    undecided = "not measured yet" if verdict["value"] is None else "undecided"
    met = {True: "met", False: "NOT met", None: undecided}[verdict["met"]]
    bound = f"at least {verdict['at_least']}" if "at_least" in verdict else f"at most {verdict['at_most']}"
    value = "" if verdict["value"] is None else f", is {verdict['value']:.2f}"
    if verdict["met"] is None and value:
        value += " so far"
    return f"target {met}: {verdict['target']}; {bound}{value}"
