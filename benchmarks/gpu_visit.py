"""Everything worth doing on a machine with a GPU, in one script: report, tests, kernels, designs, benchmarks, options.

``python benchmarks/gpu_visit.py`` needs torch and triton, and imports the package from the checkout that it lies in.
Each part can run by itself (``--part``), ends when its time is used up (``--budget``), and keeps what it has by then.
``--device cpu`` is a rehearsal without a GPU: every part, on tiny sizes, in Triton's interpreter.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[0:0] = [str(ROOT)]  # the checkout's package, also where another one is installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import __main__ as table  # noqa: E402
from benchmarks import options as option_cases  # noqa: E402
from benchmarks import records, runner  # noqa: E402
from benchmarks.cases import ARITHMETIC, Case, cases  # noqa: E402
from benchmarks.options import OptionCase  # noqa: E402
from benchmarks.training import TrainingCase  # noqa: E402
from rnnkernels import _backend, ops, reference  # noqa: E402
from rnnkernels.__main__ import (  # noqa: E402
    LIMITS,
    OPERATORS,
    OPTIONS_SLACK,
    arithmetic,
    errors,
    options_of,
    relative_error,
)

PARTS = ("report", "tests", "kernels", "designs", "benchmarks", "options")


@dataclasses.dataclass(frozen=True)
class Visit:
    """What the parts are told."""

    device: torch.device
    """A GPU, or the CPU for a rehearsal."""
    output: Path
    """Folder of the result files."""
    budget: float
    """Seconds that a part may take."""
    commit: str | None
    """Commit of the sources, where they are no git checkout."""
    tests: tuple[str, ...]
    """What pytest runs; empty for the test files about GPUs."""
    filter: str
    """Regular expression that the names of benchmark cases must contain."""
    command: tuple[str, ...]
    """The command line."""

    @property
    def rehearsal(self) -> bool:
        """Whether there is no GPU."""
        return self.device.type == "cpu"

    def file(self, ending: str) -> Path:
        """A new file for results."""
        return records.new_file(self.output, self.device, ending)

    def document(self, kind: str) -> dict:
        """The beginning of a result file."""
        return {**records.header(kind, list(self.command), self.device, self.commit), "cases": []}


def environment() -> dict[str, str]:
    """The environment of a subprocess that imports the package from this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def stream(command: list[str], log: Path, seconds: float) -> tuple[int | None, list[str]]:
    """Run a command, show its output and write it to ``log``. Returns its exit code, None if it ran out of time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    lines, late = [], threading.Event()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with log.open("w") as file, subprocess.Popen(command, cwd=ROOT, env=environment(), **options) as process:

        def stop():
            late.set()
            os.killpg(process.pid, signal.SIGKILL)  # its children as well

        timer = threading.Timer(seconds, stop)
        timer.start()
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
        timer.cancel()
        code = process.wait()
    return (None if late.is_set() else code), lines


def report(visit: Visit) -> bool:
    """``python -m rnnkernels``."""
    code, _ = stream([sys.executable, "-m", "rnnkernels"], visit.file("-report.txt"), visit.budget)
    return code == 0


TEST_LINE = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<status>[A-Z]+) (?P<name>\S+::.+?)|(?P<name_first>\S+::.+?) (?P<status_last>[A-Z]+)"
    r"(?: .*)?(?: +\[ *\d+%\])?) *$"
)
STATUSES = {"PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS"}


def read_tests(lines: list[str]) -> list[dict[str, str]]:
    """Name and status of each test in what ``pytest -v`` printed, with or without xdist."""
    statuses = {}
    for line in lines:
        if line.startswith("=") and "short test summary" in line:
            break
        if found := TEST_LINE.match(line):
            name, status = found["name"] or found["name_first"], found["status"] or found["status_last"]
            if status in STATUSES:
                statuses[name] = status.lower()
    return [{"name": name, "status": status} for name, status in statuses.items()]


def tests_of_gpus() -> list[str]:
    """The test files that speak of a GPU. Others may need what only an installed project has: tools, pages, pins."""
    speaks = re.compile(r"\b(cuda|gpu|kernel_device)\b")
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if speaks.search(path.read_text())]


def tests(visit: Visit) -> bool:
    """The unit tests that have to do with a GPU; not those that compile for absent ones."""
    document = visit.document("tests")
    path = visit.file("-tests.json")
    if missing := [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]:
        print(f"{' and '.join(missing)} not installed: the part kernels stands in for the tests")
        records.write(path, document | {"finished": False, "exit_code": None})
        return True
    command = [sys.executable, "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", "-m", "not offline"]
    # A warning of a version that the project does not pin is no failure here.
    command += ["-W", "default", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None and not visit.rehearsal:
        command += ["-n", str(min(8, os.cpu_count() or 1))]  # compiling, on the CPU, is most of the work
    command += visit.tests or tests_of_gpus()
    code, lines = stream(command, visit.file("-tests.log"), visit.budget)
    document["cases"] = read_tests(lines)
    records.write(path, document | {"finished": code is not None, "exit_code": code})
    if code is None:
        print(f"the time was used up: {len(document['cases'])} tests had run")
    return code == 0


def triton_kernels(operator: str) -> ModuleType:
    """The module of an operator's Triton kernels."""
    return importlib.import_module(f"rnnkernels.kernels.triton.{operator}")


@contextlib.contextmanager
def forced(operator: str, design) -> Iterator[None]:
    """Let the Triton kernels of an operator run with a design, whatever the dispatch would choose; None: its choice."""
    if design is None:
        with _backend.use_backend("triton"):
            yield
        return
    with _backend.use_backend("triton"), mock.patch.object(triton_kernels(operator), "choose", return_value=design):
        yield


def designs_for(case: dict, device: torch.device, *batches: int) -> list:
    """The designs that fit, the dispatch's choice first, and what it has for one launch a step at other batches."""
    from rnnkernels.kernels.triton import dispatch

    operator, hidden_size, dtype = case["operator"], case["hidden_size"], getattr(torch, case["dtype"])
    found = dispatch.designs(operator, hidden_size, case["batch"], dtype, device)
    return list(dict.fromkeys(found + [dispatch.step_design(operator, hidden_size, batch) for batch in batches]))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what is allocated uninitialized with NaN, so that an element that no kernel writes shows."""

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield


def parity_cases(visit: Visit) -> Iterator[dict]:
    """What the part kernels compares: an operator at an odd size in every form, at others in two; then its options."""
    every = list(itertools.product((False, True), (False, True)))
    few = [(False, False), (True, True)]
    sizes = [(7, 33, 17, every), *((7, batch, hidden, few) for hidden in (48, 128, 256, 300) for batch in (33, 80))]
    sizes += [(7, 1, 1, few), (5, 2, 64, few), (3, 70, 1000, few), (2, 70_001, 32, few[:1])]
    kinds = ARITHMETIC
    if visit.rehearsal:
        # Not bfloat16, which the interpreter gets wrong, and TF32 it does not have.
        sizes, kinds = [(3, 2, 5, every), (2, 66, 16, few)], [{"dtype": "float32"}, {"dtype": "float16"}]
    planned = list(itertools.product(sizes, OPERATORS, kinds))
    if not visit.rehearsal:
        planned += [((70_000, 3, 16, few[:1]), operator, ARITHMETIC[0]) for operator in OPERATORS]
    for (sequence_length, batch, hidden_size, options), operator, kind in planned:
        nonlinearities = (None,) if operator != "rnn" else ops.NONLINEARITIES if options is every else ("tanh",)
        for nonlinearity, (reverse, has_lengths) in itertools.product(nonlinearities, options):
            yield {
                "operator": operator,
                "sequence_length": sequence_length,
                "batch": batch,
                "hidden_size": hidden_size,
                "nonlinearity": nonlinearity,
                "option": None,
                "reverse": reverse,
                "lengths": has_lengths,
                "dtype": kind["dtype"],
                "precision": kind.get("precision", "highest"),
            }
    sizes, forms = ((7, 33, 17), (7, 80, 128), (5, 3, 300)), ((False, False), (True, True))
    if visit.rehearsal:
        sizes, forms, kinds = ((3, 2, 5),), forms[1:], kinds[:1]
    for size, operator, kind in itertools.product(sizes, OPERATORS, kinds):
        for option, (reverse, has_lengths) in itertools.product(options_of(operator, 1, 1, 1), forms):
            yield {
                "operator": operator,
                **dict(zip(("sequence_length", "batch", "hidden_size"), size, strict=True)),
                "nonlinearity": None,
                "option": option,
                "reverse": reverse,
                "lengths": has_lengths,
                "dtype": kind["dtype"],
                "precision": kind.get("precision", "highest"),
            }


def compare(case: dict, design, device: torch.device) -> dict:
    """The outcome of one comparison with ``rnnkernels.reference`` in float64."""
    torch.manual_seed(0)
    sequence_length, batch, dtype = case["sequence_length"], case["batch"], getattr(torch, case["dtype"])
    arguments = OPERATORS[case["operator"]](sequence_length, batch, 11, case["hidden_size"])
    options = {"reverse": case["reverse"]}
    if case["nonlinearity"] is not None:
        options["nonlinearity"] = case["nonlinearity"]
    if case["lengths"]:
        options["lengths"] = torch.randint(1, sequence_length + 1, (batch,))
    limit = LIMITS[arithmetic(dtype, device)]
    if case["option"] is not None:
        weights, given = options_of(case["operator"], sequence_length, batch, case["hidden_size"])[case["option"]]
        arguments, options, limit = arguments | weights, options | given, limit * OPTIONS_SLACK
    with forced(case["operator"], design), poisoned():
        found = errors(case["operator"], arguments, dtype, device, **options)
    # A pre-activation within rounding of zero may fall on either side of ReLU's kink: a share of the gradients of about
    # the limit is then wholly different, and the norm of that is its root.
    loose = math.sqrt(limit) if case["nonlinearity"] == "relu" else limit
    wrong = [
        name for name, error in found.items() if not error <= (loose if name.startswith("gradient") else limit)
    ]  # NaN is wrong
    return {
        "relative_error": {name: records.finite(error) for name, error in found.items()},
        "allowed_error": {"results": limit, "gradients": loose},
        "status": "differs" if wrong else "agrees",
        "reason": f"too far from float64: {', '.join(wrong)}" if wrong else None,
    }


def compare_far_offsets(
    operator: str, device: torch.device, sequence_length: int, batch: int, hidden_size: int
) -> dict:
    """Whether the first and last rows are right in a batch of so many states that 32 bits can't count them."""
    torch.manual_seed(0)
    arguments = OPERATORS[operator](sequence_length, batch, 2, hidden_size)
    arguments = {name: argument.bfloat16() for name, argument in arguments.items()}
    cotangent = torch.randn(sequence_length, batch, 1).bfloat16()
    rows = torch.tensor([0, 1, batch - 2, batch - 1])

    def run(source, selected, device, dtype):
        own = {name: argument.to(device, dtype) for name, argument in arguments.items()}
        own["input"] = own["input"][:, selected].clone().requires_grad_()
        own |= {name: own[name][selected] for name in ("h_0", "c_0") if name in own}
        output, *_ = getattr(source, operator)(**own)
        outer = cotangent[:, selected].to(device, dtype).expand_as(output)
        return output.detach(), *torch.autograd.grad(output, own["input"], outer)

    actual = run(ops, slice(None), device, torch.bfloat16)
    expected = run(reference, rows, torch.device("cpu"), torch.float64)
    found = [relative_error(a[:, rows.to(device)], e) for a, e in zip(actual, expected, strict=True)]
    limit = LIMITS["bfloat16"]
    right = all(error <= limit for error in found)  # False for NaN
    return {
        "relative_error": dict(zip(("result 0", "gradient of input"), map(records.finite, found), strict=True)),
        "allowed_error": {"results": limit, "gradients": limit},
        "status": "agrees" if right else "differs",
        "reason": None if right else "too far from float64",
    }


def attempt(function, *arguments) -> dict:
    """What the function returns, or that it failed and why: one broken case must not lose the others."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}


FAR = {"rnn": (20_000, 1_700, 64), "gru": (10_000, 1_000, 64), "lstm": (10_000, 1_000, 64)}
"""Steps, batch and hidden units with more than 2^31 states, or gates."""


def far_offsets(visit: Visit, deadline: float) -> Iterator[dict]:
    """The outcome of :func:`compare_far_offsets` for each operator."""
    for operator, sizes in FAR.items():
        result = {"name": f"{operator}, more than 2^31 elements", "operator": operator, "status": "skipped"}
        if time.monotonic() >= deadline:
            result["reason"] = "the time was used up"
        elif visit.rehearsal:
            result |= attempt(compare_far_offsets, operator, visit.device, 3, 5, 4)
        elif torch.cuda.mem_get_info(visit.device)[0] < 40 * 2**30:
            result["reason"] = "it takes 40 GiB of a GPU's memory"
        else:
            result |= attempt(compare_far_offsets, operator, visit.device, *sizes)
        yield result


def kernels(visit: Visit) -> bool:
    """Both designs of the Triton kernels against ``rnnkernels.reference`` in float64, forward and backward."""
    deadline = time.monotonic() + visit.budget
    document, path = visit.document("kernels"), visit.file("-kernels.json")
    counts: dict[tuple, Counter] = {}
    for case in parity_cases(visit):
        with runner.precision(case["precision"]):
            kind = arithmetic(getattr(torch, case["dtype"]), visit.device)
            # A cell with an option has kernels of one design, for what is pointwise in it.
            for design in designs_for(case, visit.device) if case["option"] is None else [None]:
                named = "Pointwise" if design is None else str(design)
                result = {"name": f"{named} {' '.join(f'{k}={v}' for k, v in case.items())}", **case}
                result |= {"design": named, "status": "skipped", "reason": "the time was used up"}
                if time.monotonic() < deadline:
                    result |= attempt(compare, case, design, visit.device)
                document["cases"].append(result)
                group = case["operator"], kind, named.partition("(")[0].lower()
                counts.setdefault(group, Counter())[result["status"]] += 1
                if result["status"] in ("differs", "failed"):
                    print(f"{result['status']}: {result['name']}: {result['reason']}", flush=True)
        records.write(path, document)
    for group, count in counts.items():
        print(f"{', '.join(group)}: {', '.join(f'{number} {status}' for status, number in count.items())}")
    for result in far_offsets(visit, deadline):
        document["cases"].append(result)
        records.write(path, document)
        print(f"{result['name']}: {result['status']} {result['reason'] or ''}", flush=True)
    return not any(case["status"] in ("differs", "failed") for case in document["cases"])


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


def run_forward(operator: str, kernels: ModuleType, buffer: Tensor, initial: list[Tensor], weight_hh: Tensor) -> Tensor:
    """The states; ``buffer`` holds the projected input and receives what the backward pass reads."""
    if operator == "rnn":
        kernels.forward(buffer, *initial, weight_hh, None, "tanh", False)
        return buffer
    bias = [None] if operator == "gru" else []
    return kernels.forward(buffer, *initial, weight_hh, *bias, None, False)[0]


def run_backward(
    operator: str, kernels: ModuleType, outer: Tensor, kept: list[Tensor], initial: list[Tensor], weight_hh: Tensor
) -> Tensor:
    """The gradient of the projected input, from that of the states and of the final states (some numbers)."""
    if operator == "rnn":
        return kernels.backward(outer, *initial, *kept, weight_hh, None, "tanh", False)[0]
    return kernels.backward(outer, *initial, *kept, *initial, weight_hh, None, False)[0]


def compare_designs(case: dict, device: torch.device, measurement: dict) -> list[dict]:
    """Microseconds a step of every design that fits, measured side by side."""
    torch.manual_seed(0)
    operator, dtype = case["operator"], getattr(torch, case["dtype"])
    steps, batch, hidden_size = case["sequence_length"], case["batch"], case["hidden_size"]
    arguments = OPERATORS[operator](1, batch, 1, hidden_size)
    initial = [arguments[name].to(device, dtype) for name in ("h_0", "c_0") if name in arguments]
    weight_hh = arguments["weight_hh"].to(device, dtype)
    # The GRU's kernels take a buffer with room for one part more, in front of the projected input.
    rows = weight_hh.shape[0]
    projected = torch.randn(steps, batch, rows + hidden_size * (operator == "gru"), device=device).to(dtype)
    outer = torch.randn(steps, batch, hidden_size, device=device).to(dtype)
    triton = triton_kernels(operator)
    exact, kept = exact_pass(case, projected[..., -rows:], outer, initial, weight_hh)
    limit = LIMITS[arithmetic(dtype, device)]

    def function(design):
        # In the timed runs, a pass over the buffer starts from what the last one left: as random as the first input.
        buffer = projected.clone()

        def run():
            with forced(operator, design):
                if case["pass"] == "backward":
                    return run_backward(operator, triton, outer, kept, initial, weight_hh)
                return run_forward(operator, triton, buffer, initial, weight_hh)

        return run

    def check(run):
        error = relative_error(run(), exact)
        right = error <= limit  # False for NaN
        reason = None if right else f"relative error {error:.1e}, allowed {limit:.1e}"
        found = {"relative_error": records.finite(error), "allowed_error": limit}
        return {**found, "status": "measured" if right else "differs", "reason": reason}

    results, functions = [], {}
    for position, design in enumerate(designs_for(case, device, 1, 1024)):
        run = function(design)
        results.append({**case, "design": str(design), "chosen": position == 0, **attempt(check, run)})
        if results[-1]["status"] == "measured":
            functions[str(design)] = run
    times = runner.interleave(functions, runner.clock(device), **measurement)
    for result in results:
        if result["design"] in times:
            per_step = [milliseconds * 1e3 / steps for milliseconds in times[result["design"]]]
            result["microseconds_per_step"] = runner.summarize(per_step)
    return results


def designs(visit: Visit) -> bool:
    """Whether the design that the dispatch chooses is the fastest of those that fit."""
    deadline = time.monotonic() + visit.budget
    document, path = visit.document("designs"), visit.file("-designs.json")
    sizes, batches, steps = (256, 128, 64, 32, 16, 512, 1024), (64, 1, 16, 256, 1024), 256
    kinds = (ARITHMETIC[2], ARITHMETIC[0], ARITHMETIC[1])  # float16 is as bfloat16
    measurement = {"seconds": 0.2, "rounds": (7, 100)}
    if visit.rehearsal:
        sizes, batches, steps, kinds, measurement = (16,), (2,), 3, ARITHMETIC[:1], {"seconds": 0.0, "rounds": (2, 2)}
    passes = ("forward", "backward")
    for batch, hidden_size, operator, kind, direction in itertools.product(batches, sizes, OPERATORS, kinds, passes):
        case = {"operator": operator, "hidden_size": hidden_size, "batch": batch, "sequence_length": steps}
        case |= {"dtype": kind["dtype"], "precision": kind.get("precision", "highest"), "pass": direction}
        case["name"] = f"{operator} H={hidden_size} B={batch} {case['dtype']} {case['precision']} {direction}"
        if time.monotonic() >= deadline:
            document["cases"].append({**case, "status": "skipped", "reason": "the time was used up"})
            continue
        with runner.precision(case["precision"]):
            try:
                found = compare_designs(case, visit.device, measurement)
            except Exception as error:
                found = [{**case, "status": "failed", "reason": f"{type(error).__name__}: {error}"}]
        document["cases"] += found
        records.write(path, document)
        print(case["name"], flush=True)
        for result in found:
            if result["status"] == "measured":
                figure = f"{result['microseconds_per_step']['median']:8.2f} µs a step"
            else:
                figure = f"{result['status']}: {result['reason']}"
            print(f"  {'*' if result.get('chosen') else ' '} {figure}  {result.get('design', '')}", flush=True)
    records.write(path, document)
    print("* the dispatch's choice")
    return not any(case["status"] in ("differs", "failed") for case in document["cases"])


TINY = (
    Case(3, 2, 3, 4),
    Case(3, 2, 3, 4, mode="forward", module="GRU"),
    Case(4, 3, 2, 5, packed=True, bidirectional=True),
    Case(4, 3, 2, 5, module="LSTM", padded=True),
    TrainingCase("Adam", 2),
)
TINY_OPTIONS = tuple(
    OptionCase(option, 3, 2, 4, 5, module=module)
    for module, option in (("RNN", "layer norm"), ("GRU", "reset gate first"), ("LSTM", "zoneout"))
)


def measure(visit: Visit, declared: Iterable[runner.AnyCase], ending: str) -> bool:
    """Run cases until the time is used up, and write what they gave."""
    deadline = time.monotonic() + visit.budget
    selected = [case for case in declared if re.search(visit.filter, case.name)]
    measurement = {"seconds": 0.0, "rounds": (2, 2)} if visit.rehearsal else {**runner.FULL, "seconds": 0.5}
    document = visit.document("benchmarks")
    table.run(selected, visit.device, document, visit.file(ending), deadline, **measurement)
    return table.exit_code(document, check=False) == 0


def benchmarks(visit: Visit) -> bool:
    """``python -m benchmarks``, with every case that a GPU has."""
    return measure(visit, TINY if visit.rehearsal else cases(visit.device.type), ".json")


def options(visit: Visit) -> bool:
    """``python -m benchmarks.options``: what ``torch.nn`` does not have, beside a loop over steps."""
    return measure(visit, TINY_OPTIONS if visit.rehearsal else option_cases.cases(visit.device.type), "-options.json")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the parts, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_visit.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=(*PARTS, "all"), action="append", help="can be given again; default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds that each part may take (default: 500)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal without a GPU")
    parser.add_argument("--tests", nargs="+", default=[], help="what pytest runs (default: test files about GPUs)")
    parser.add_argument("--filter", metavar="REGEX", default="", help="only benchmark cases in whose name this occurs")
    parser.add_argument("--commit", help="commit of the sources, where they are no git checkout")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print(
            "There is no GPU that this PyTorch can use; --device cpu rehearses the visit without one.", file=sys.stderr
        )
        return 2
    if not _backend.has_triton():
        print("Triton is not installed, and the visit is about its kernels.", file=sys.stderr)
        return 2
    if chosen.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the first use of Triton
    device = torch.device("cuda", torch.cuda.current_device()) if chosen.device == "cuda" else torch.device("cpu")
    visit = Visit(
        device=device,
        output=chosen.output.resolve(),
        budget=chosen.budget,
        commit=chosen.commit,
        tests=tuple(chosen.tests),
        filter=chosen.filter,
        command=("python", "benchmarks/gpu_visit.py", *arguments),
    )
    wanted = chosen.part or ["all"]
    parts = {"report": report, "tests": tests, "kernels": kernels, "designs": designs}
    parts |= {"benchmarks": benchmarks, "options": options}
    outcome = {}
    for name, part in parts.items():
        if name in wanted or "all" in wanted:
            print(f"\n== {name}: {part.__doc__.partition(chr(10))[0]}", flush=True)
            start = time.monotonic()
            outcome[name] = part(visit)
            print(f"{name}: {'ok' if outcome[name] else 'FAILED'} after {time.monotonic() - start:.0f} s", flush=True)
    print(f"\nResults are in {os.path.relpath(visit.output)}")
    return int(not all(outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
