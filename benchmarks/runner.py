"""Run benchmark cases: compare first, then time both implementations side by side."""

import contextlib
import dataclasses
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnkernels
from benchmarks import options, records, training
from benchmarks.cases import OPTION_TARGETS, TARGETS, TRAINING_TARGETS, Case
from benchmarks.options import OptionCase
from benchmarks.training import TrainingCase
from rnnkernels.__main__ import LIMITS, arithmetic, relative_error

SIDES = ("torch.nn", "rnnkernels")
TRAINING_SIDES = ("torch", "rnnkernels")
OPTION_SIDES = ("loop", "rnnkernels")

AnyCase = Case | TrainingCase | OptionCase

BASELINE_SLACK = 10
"""``torch.nn`` may err this much more than rnnkernels: its sums of 16-bit gradients over many steps are inexact."""

WARM_UPS = 2
FULL = {"seconds": 2.0, "rounds": (15, 1000)}
QUICK = {"seconds": 0.2, "rounds": (5, 100)}
"""How long a case is measured, and the least and most rounds."""


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Let float32 products of both sides be IEEE (``"highest"``) or TF32 (``"high"``).

    ``torch.nn`` runs on cuDNN, which has a switch of its own, and its default is TF32.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(name)
    torch.backends.cudnn.allow_tf32 = name != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class CPUClock:
    """Milliseconds that a call takes."""

    def __call__(self, function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3


class CUDAClock:
    """Milliseconds that a call takes on a GPU that was idle and whose L2 cache holds nothing of use.

    Events on the stream read the GPU's own clock. Waiting before the first puts the launches inside the measurement.
    """

    def __init__(self, device: torch.device):
        self.evict = torch.empty(256 * 2**20, dtype=torch.int8, device=device)  # several times any L2 cache
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, function: Callable[[], object]) -> float:
        self.evict.zero_()
        torch.cuda.synchronize()
        self.start.record()
        function()
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end)


def clock(device: torch.device) -> CPUClock | CUDAClock:
    """The clock for work on a device."""
    return CUDAClock(device) if device.type == "cuda" else CPUClock()


def interleave(
    functions: dict[str, Callable[[], object]], measure: Callable, seconds: float, rounds: tuple[int, int]
) -> dict[str, list[float]]:
    """Milliseconds of each call, the functions taking turns for ``seconds``, but at least and at most so many rounds.

    A machine that slows down or serves somebody else in between slows all of them. (``torch.utils.benchmark`` times one
    statement after the other, so that such a change would pass for a difference.) Every other round runs in the
    opposite order, so that none always follows the same one.
    """
    for _ in range(WARM_UPS):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begin, (fewest, most) = time.perf_counter(), rounds
        for done in range(most):
            if done >= fewest and time.perf_counter() - begin >= seconds:
                break
            for name in order if done % 2 == 0 else reversed(order):
                times[name].append(measure(functions[name]))
    finally:
        if collecting:
            gc.enable()
    return times


def summarize(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and minimum of milliseconds; and of how many."""
    quintiles = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    return {
        "median": statistics.median(times),
        "percentile_20": quintiles[0],
        "percentile_80": quintiles[3],
        "minimum": min(times),
        "rounds": len(times),
    }


def _modules(case: Case, device: torch.device) -> dict[str, torch.nn.Module]:
    """Both sides and, by the name of ``"exact"``, torch's in float64: with the same weights."""
    options = {"num_layers": case.num_layers, "bidirectional": case.bidirectional}
    sizes, dtype = (case.input_size, case.hidden_size), getattr(torch, case.dtype)
    baseline = getattr(torch.nn, case.module)(*sizes, **options, device=device, dtype=dtype)
    tested = getattr(rnnkernels, case.module)(*sizes, **options, device=device, dtype=dtype)
    exact = getattr(torch.nn, case.module)(*sizes, **options, device=device, dtype=torch.float64)
    for module in (tested, exact):
        module.load_state_dict(baseline.state_dict())
    modules = {"torch.nn": baseline, "rnnkernels": tested, "exact": exact}
    for module in modules.values():
        module.train(case.mode != "forward")
    return modules


def _lengths(case: Case) -> Tensor:
    lengths = (torch.arange(1, case.batch + 1) * case.sequence_length / case.batch).ceil().long()
    return lengths[torch.randperm(case.batch)]


def _input(case: Case, device: torch.device) -> Tensor | PackedSequence:
    input = torch.randn(case.sequence_length, case.batch, case.input_size, device=device).to(getattr(torch, case.dtype))
    return pack_padded_sequence(input, _lengths(case), enforce_sorted=False) if case.packed else input


def some(values: Tensor | PackedSequence, rows: Tensor | None) -> Tensor | PackedSequence:
    """These rows of the batch; None: all."""
    return values if rows is None else values[:, rows.to(values.device)]


def _leaf(input: Tensor | PackedSequence, dtype: torch.dtype) -> tuple[Tensor | PackedSequence, Tensor]:
    """The input in another type, and the tensor in it that gradients are asked for."""
    if isinstance(input, PackedSequence):
        leaf = input.data.to(dtype).detach().requires_grad_()
        return input._replace(data=leaf), leaf
    leaf = input.to(dtype).detach().requires_grad_()
    return leaf, leaf


def _results(
    module: torch.nn.Module, input: Tensor | PackedSequence, lengths: Tensor | None, sequence_length: int
) -> tuple[Tensor, ...]:
    """Output and final states; with ``lengths``, ``torch.nn`` packs the input and pads the output again."""
    if lengths is None:
        output, final = module(input)
    elif isinstance(module, (rnnkernels.RNN, rnnkernels.GRU, rnnkernels.LSTM)):
        output, final = module(input, lengths=lengths)
    else:
        output, final = module(pack_padded_sequence(input, lengths, enforce_sorted=False))
        output, _ = pad_packed_sequence(output, total_length=sequence_length)
    output = output.data if isinstance(output, PackedSequence) else output
    return (output, *final) if isinstance(final, tuple) else (output, final)


@dataclasses.dataclass
class Call:
    """What is timed: the results of a side and, unless it is inference, the gradients of ``leaves``."""

    forward: Callable[[], tuple[Tensor, ...]]
    """All results."""
    leaves: tuple[Tensor, ...]
    """The input and every weight; nothing for inference."""
    cotangents: list[Tensor] = dataclasses.field(default_factory=list)
    """Gradients of the results, one each."""

    def __call__(self, cotangents: list[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The results and gradients, from these cotangents or from its own."""
        if not self.leaves:
            with torch.no_grad():
                return self.forward()
        results = self.forward()
        return *results, *torch.autograd.grad(results, self.leaves, cotangents or self.cotangents)


def calls_of(case: Case, device: torch.device, rows: Tensor | None = None) -> dict[str, Call]:
    """What is timed of each module, and ``"exact"``, which sees only ``rows`` of the batch."""
    input = _input(case, device)
    lengths = _lengths(case) if case.padded else None
    calls = {}
    for name, module in _modules(case, device).items():
        selected = rows if name == "exact" else None
        own_input, leaf = _leaf(some(input, selected), module.weight_ih_l0.dtype)
        own_lengths = lengths if lengths is None or selected is None else lengths[selected]
        leaves = (leaf, *module.parameters()) if case.mode == "forward+backward" else ()
        calls[name] = Call(functools.partial(_results, module, own_input, own_lengths, case.sequence_length), leaves)
    if case.mode == "forward+backward":
        with torch.no_grad():
            cotangents = [torch.randn_like(result) for result in calls["torch.nn"].forward()]
        for name, call in calls.items():
            selected = rows if name == "exact" else None
            call.cotangents = [some(cotangent, selected).to(call.leaves[0].dtype) for cotangent in cotangents]
    return calls


def errors_of(calls: dict[str, Call], exact: tuple[Tensor, ...], rows: Tensor | None = None) -> dict[str, float]:
    """The largest relative error of any result or gradient, for each side; ``exact`` has ``rows`` of the batch alone.

    Where only some rows are compared, the others get no cotangent, so that the gradients of the weights come from these
    rows alone.
    """
    errors = {}
    for side, call in calls.items():
        values = list(call(None if rows is None else [_only(cotangent, rows) for cotangent in call.cotangents]))
        batched = len(values) - len(call.leaves[1:])  # all but the gradients of the weights
        values[:batched] = [some(value, rows) for value in values[:batched]]
        found = [relative_error(*pair) for pair in zip(values, exact, strict=True)]
        errors[side] = math.nan if any(map(math.isnan, found)) else max(found)
    return errors


def _only(cotangent: Tensor, rows: Tensor) -> Tensor:
    """The cotangent with zeros in all other rows of the batch."""
    rows = rows.to(cotangent.device)
    return torch.zeros_like(cotangent).index_copy_(1, rows, cotangent[:, rows])


def attempt(function: Callable[..., dict], *arguments: object) -> dict:
    """What the function returns, or that it failed and why: one broken case must not lose the others."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}


def _compared(case: AnyCase, device: torch.device) -> tuple[dict[str, Callable], dict, dict]:
    """What is timed, by side, the baseline first; the relative error of each side, and what is allowed."""
    for kind, module, order in ((TrainingCase, training, TRAINING_SIDES), (OptionCase, options, OPTION_SIDES)):
        if isinstance(case, kind):
            functions, errors, allowed = module.sides(case, device)
            return {side: functions[side] for side in order}, errors, allowed
    limit = LIMITS[arithmetic(getattr(torch, case.dtype), device)]
    functions = calls_of(case, device)
    errors = errors_of(functions, functions.pop("exact")())
    return functions, errors, {"torch.nn": BASELINE_SLACK * limit, "rnnkernels": limit}


def compared(errors: dict[str, float], allowed: dict[str, float]) -> dict:
    """What a result file says of a comparison; the status is ``"differs"`` where a side errs too much."""
    found = {
        "relative_error": {side: records.finite(error) for side, error in errors.items()},
        "allowed_error": allowed,
        "status": "failed",
    }
    wrong = [side for side in errors if not errors[side] <= allowed[side]]  # NaN is wrong
    if wrong:
        came = " and ".join(f"{errors[side]:.1e} for {side} ({allowed[side]:.1e} allowed)" for side in wrong)
        found |= {"status": "differs", "reason": f"relative error of {came}: no speed-up is reported"}
    return found


def timed(times: dict[str, list[float]]) -> dict:
    """What a result file says of times; the baseline comes first, rnnkernels second."""
    milliseconds = {side: summarize(of_side) for side, of_side in times.items()}
    baseline, ours, *_ = milliseconds.values()
    return {
        "status": "measured",
        "reason": None,
        "milliseconds": milliseconds,
        "ratio": baseline["median"] / ours["median"],
        "ratio_of_minima": baseline["minimum"] / ours["minimum"],
    }


def run_case(case: AnyCase, device: torch.device, seconds: float, rounds: tuple[int, int]) -> dict:
    """Compare and time one case.

    Returns what a result file says of it. Times and ratios are there only where both sides agree with float64:
    ``status`` is ``"measured"`` then, and else ``"differs"``, or ``"failed"`` where one of them raised.
    """
    result = {**fields(case), "status": "failed", "reason": None}
    torch.manual_seed(0)
    try:
        with precision(case.precision):
            functions, errors, allowed = _compared(case, device)
            result |= compared(errors, allowed)
            if result["status"] == "differs":
                return result
            times = interleave(functions, clock(device), seconds, rounds)
    except Exception as error:  # one case that can't run must not lose the others
        return result | {"reason": f"{type(error).__name__}: {error}"}
    return result | timed(times)


def fields(case: AnyCase) -> dict:
    """What a result file says of the case itself."""
    return {"name": case.name, "mode": case.mode, **dataclasses.asdict(case)}


def case_of(result: dict) -> AnyCase:
    """The case that :func:`fields` wrote down."""
    kind = TrainingCase if "algorithm" in result else OptionCase if "option" in result else Case
    return kind(**{field.name: result[field.name] for field in dataclasses.fields(kind)})


def skipped(case: AnyCase, reason: str) -> dict:
    """What a result file says of a case that was not run."""
    return {**fields(case), "status": "skipped", "reason": reason}


def verdicts(results: list[dict]) -> list[dict]:
    """Each target with the value reached; ``met`` is None where the cases that it takes were not all measured."""
    ratios = [(case_of(result), result["ratio"]) for result in results if result["status"] == "measured"]
    found = []
    if any("option" in result for result in results):
        targets = OPTION_TARGETS
    else:
        targets = TARGETS + (TRAINING_TARGETS if any(isinstance(case, TrainingCase) for case, _ in ratios) else ())
    for target in targets:
        values = [ratio for case, ratio in ratios if target.applies(case)]
        enough = len(values) >= target.complete
        combine = statistics.geometric_mean if target.statistic == "geometric mean" else min
        value = combine(values) if values else None
        met = value >= target.at_least if enough else None
        found.append({"target": target.text, "at_least": target.at_least, "value": value, "met": met})
    return found


WIDTH = 74
HEADER = f"{'case':{WIDTH}}  {'PyTorch, ms':>23}  {'rnnkernels, ms':>23}  {'ratio':>5}  minima"


def row(result: dict) -> str:
    """A case's line in the table: medians with their 20th and 80th percentiles, and how many times faster it is."""
    name = f"{result['name']:{WIDTH}}"
    if result["status"] != "measured":
        return f"{name}  {result['status']}: {result['reason']}"

    def span(times):
        return f"{times['median']:.4g} ({times['percentile_20']:.4g}–{times['percentile_80']:.4g})"

    columns = [f"{span(times):>23}" for times in result["milliseconds"].values()]
    return f"{name}  {columns[0]}  {columns[1]}  {result['ratio']:5.2f}  {result['ratio_of_minima']:6.2f}"


def footer(results: list[dict]) -> str:
    """Geometric means, the lowest ratio, and the verdicts."""
    measured = [result for result in results if result["status"] == "measured"]
    lines = []
    for mode in dict.fromkeys(result["mode"] for result in measured):
        ratios = [result["ratio"] for result in measured if result["mode"] == mode]
        lines.append(f"{mode}: geometric mean {statistics.geometric_mean(ratios):.2f} over {len(ratios)} cases")
    if measured:
        lowest = min(measured, key=lambda result: result["ratio"])
        lines.append(f"lowest ratio: {lowest['ratio']:.2f} ({lowest['name']})")
    for verdict in verdicts(results):
        met = {True: "met", False: "NOT met", None: "not measured"}[verdict["met"]]
        value = "" if verdict["met"] is None else f", is {verdict['value']:.2f}"
        lines.append(f"target {met}: {verdict['target']}; at least {verdict['at_least']}{value}")
    return "\n".join(lines)
