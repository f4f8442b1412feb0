"""The designs of the Triton kernels, one by one: which there are for a case, and what a step takes in each."""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import records, runner
from rnnkernels import _backend
from rnnkernels.__main__ import BY_STEPS, LIMITS, OPERATORS, arithmetic, relative_error


def triton_kernels(operator: str) -> ModuleType:
    """The module of an operator's Triton kernels."""
    return importlib.import_module(f"rnnkernels.kernels.triton.{operator}")


@contextlib.contextmanager
def forced(operator: str, design) -> Iterator[None]:
    """Let the Triton kernels of an operator run with a design, whatever the dispatch would choose; None: its choice.

    A cell with options runs on the kernels of a step where this is not a persistent design; for another number of
    directions than it has lanes, there is one launch a step.
    """
    from rnnkernels.kernels.triton import dispatch

    def forced_choice(cell, hidden_size, batch, dtype, device, lanes=1):
        return design if design.lanes == lanes else dispatch.step_design(cell, hidden_size, batch)

    kernels, general = triton_kernels(operator), triton_kernels("general")
    choose, with_options = kernels.choose, general.persistent_design
    if design is not None:  # plain assignments, since this is within what is timed
        kernels.choose = forced_choice
        general.persistent_design = lambda *_: design if isinstance(design, general.Persistent) else None
    try:
        with _backend.use_backend("triton"):
            yield
    finally:
        kernels.choose, general.persistent_design = choose, with_options


@contextlib.contextmanager
def without_fallback() -> Iterator[None]:
    """Raise where a persistent design is refused by the GPU, instead of going on with another."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*refused a cooperative launch")
        yield


def designs_for(case: dict, device: torch.device, *batches: int) -> list:
    """The designs that fit, the dispatch's choice first, and what it has for one launch a step at other batches."""
    from rnnkernels.kernels.triton import dispatch

    operator, hidden_size, dtype = case["operator"], case["hidden_size"], getattr(torch, case["dtype"])
    sizes = operator, hidden_size, case["batch"], dtype, device
    if case.get("option") is not None:
        persistent = None if case["option"] in BY_STEPS else dispatch.persistent_design(*sizes)
        return [*filter(None, [persistent]), dispatch.pointwise(hidden_size, whole_rows=False)]
    found = dispatch.designs(*sizes, case.get("directions", 1))
    return list(dict.fromkeys(found + [dispatch.step_design(operator, hidden_size, batch) for batch in batches]))


def exact_pass(
    case: dict, projected: Tensor, outer: Tensor, initial: list[Tensor], weight_hh: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """What a pass gives in float64, and what a forward pass keeps for the backward pass, rounded as it does."""
    from rnnkernels.kernels.eager import general
    from rnnkernels.kernels.recurrence import Recurrence, Weights

    recurrence, weights = Recurrence(case["operator"]), Weights(weight_hh.double())
    h_0, c_0, *_ = *(state.double() for state in initial), None
    trace = general.forward(projected.double(), h_0, c_0, weights, None, None, recurrence)
    states, gates = trace.output.to(projected.dtype), trace.gates.to(projected.dtype)
    if case["operator"] == "rnn":
        kept, gates = [states], states
    else:
        kept = [states, gates] if c_0 is None else [states, gates, trace.cells.float()]
    if case["pass"] == "forward":
        return trace.output, kept
    rounded = trace._replace(output=states.double(), gates=gates.double())
    gradients = general.backward(outer.double(), h_0, c_0, rounded, h_0, c_0, weights, None, None, recurrence)
    return gradients.gates, kept


def _reverse(weight_hh: Tensor) -> bool | None:
    """What the kernels take as their direction: the forward one, or None for the weights of both."""
    return None if weight_hh.dim() == 3 else False


def forward(operator: str, buffer: Tensor, initial: list[Tensor], weight_hh: Tensor) -> list[Tensor]:
    """The states, and what else the backward pass reads; ``buffer`` holds the projected input, and receives gates."""
    kernels = triton_kernels(operator)
    if operator == "rnn":
        kernels.forward(buffer, *initial, weight_hh, None, "tanh", _reverse(weight_hh))
        return [buffer]
    bias = [None] if operator == "gru" else []
    output, *_, cells = kernels.forward(buffer, *initial, weight_hh, *bias, None, _reverse(weight_hh))
    return [output, buffer] if operator == "gru" else [output, buffer, cells]


def backward(operator: str, outer: Tensor, kept: list[Tensor], initial: list[Tensor], weight_hh: Tensor) -> Tensor:
    """The gradient of the projected input, from that of the states and of the final states (some numbers)."""
    kernels = triton_kernels(operator)
    if operator == "rnn":
        return kernels.backward(outer, *initial, *kept, weight_hh, None, "tanh", _reverse(weight_hh))[0]
    return kernels.backward(outer, *initial, *kept, *initial, weight_hh, None, _reverse(weight_hh))[0]


def data_of(case: dict, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Random initial states, recurrent weights, buffer with the projected input, and gradient of the states.

    Of both directions along a leading dimension, where the case has two ``directions``.
    """
    torch.manual_seed(0)
    operator, dtype = case["operator"], getattr(torch, case["dtype"])
    steps, batch, hidden_size = case["sequence_length"], case["batch"], case["hidden_size"]
    directions = case.get("directions", 1)
    both = (2,) if directions == 2 else ()
    drawn = [OPERATORS[operator](1, batch, 1, hidden_size) for _ in range(directions)]
    *initial, weight_hh = (
        torch.stack([arguments[name] for arguments in drawn]).view(*both, *drawn[0][name].shape).to(device, dtype)
        for name in ("h_0", "c_0", "weight_hh")
        if name in drawn[0]
    )
    # The GRU's kernels take a buffer with room for one part more, in front of the projected input.
    width = weight_hh.shape[-2] + hidden_size * (operator == "gru")
    projected = torch.randn(*both, steps, batch, width, device=device).to(dtype)
    outer = torch.randn(*both, steps, batch, hidden_size, device=device).to(dtype)
    return initial, weight_hh, projected, outer


def pass_of(case: dict, device: torch.device) -> Callable[[], object]:
    """A function that runs the steps of a case's pass, in the design that the dispatch chooses, on random data."""
    initial, weight_hh, buffer, outer = data_of(case, device)
    kept = forward(case["operator"], buffer, initial, weight_hh)
    if case["pass"] == "forward":
        return lambda: forward(case["operator"], buffer, initial, weight_hh)
    return lambda: backward(case["operator"], outer, kept, initial, weight_hh)


def compare_designs(case: dict, device: torch.device, measurement: dict, designs: list | None = None) -> list[dict]:
    """Microseconds a step of every design that fits, or of ``designs``, measured side by side."""
    operator, steps = case["operator"], case["sequence_length"]
    initial, weight_hh, projected, outer = data_of(case, device)
    exact, kept = exact_pass(case, projected[..., -weight_hh.shape[0] :], outer, initial, weight_hh)
    limit = LIMITS[arithmetic(weight_hh.dtype, device)]

    def function(design):
        # In the timed runs, a pass over the buffer starts from what the last one left: as random as the first input.
        buffer = projected.clone()

        def run():
            with forced(operator, design):
                if case["pass"] == "backward":
                    return backward(operator, outer, kept, initial, weight_hh)
                return forward(operator, buffer, initial, weight_hh)[0]

        return run

    def check(run):
        with without_fallback():
            error = relative_error(run(), exact)
        right = error <= limit  # False for NaN
        reason = None if right else f"relative error {error:.1e}, allowed {limit:.1e}"
        found = {"relative_error": records.finite(error), "allowed_error": limit}
        return {**found, "status": "measured" if right else "differs", "reason": reason}

    results, functions = [], {}
    for position, design in enumerate(designs or designs_for(case, device, 1, 1024)):
        run = function(design)
        results.append({**case, "design": str(design), "chosen": position == 0, **runner.attempt(check, run)})
        if results[-1]["status"] == "measured":
            functions[str(design)] = run
    times = runner.interleave(functions, runner.clock(device), **measurement)
    for result in results:
        if result["design"] in times:
            per_step = [milliseconds * 1e3 / steps for milliseconds in times[result["design"]]]
            result["microseconds_per_step"] = runner.summarize(per_step)
    return results
