"""Everything worth doing on a machine with a GPU: correctness, then the grid of benchmarks, then tuning, in one file.

``python benchmarks/gpu_visit.py`` needs torch and triton, and imports the package from the checkout that it lies in. A
call ends within nine minutes (``--budget``). It extends the result file that an earlier call on the same sources and
GPU began, case by case: what is there is not run again, so that a few calls complete a visit. ``--part`` runs parts one
by one. ``--device cpu`` is a rehearsal without a GPU: every part, on tiny sizes, in Triton's interpreter.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0:0] = [str(ROOT)]  # the checkout's package, also where another one is installed

import torch  # noqa: E402

from benchmarks import designs, grid, options, parity, records, runner, scan, stress, tuning  # noqa: E402
from benchmarks.cases import ARITHMETIC, Case, cases  # noqa: E402
from benchmarks.options import OptionCase  # noqa: E402
from benchmarks.training import TrainingCase  # noqa: E402
from rnnkernels import _backend  # noqa: E402
from rnnkernels.__main__ import OPERATORS  # noqa: E402

BUDGET = 520.0
"""Seconds for a call: within nine minutes, with what it takes to start and to end."""

PATIENCE = 150.0
"""Seconds after which a case that gives no sign of life is taken to wait forever."""

BEGIN_AGAIN = 75
"""Exit code of a worker whose GPU is not fit for more: a new process takes it up where it left."""

GRACE = 15.0
"""Seconds after the budget until a worker is ended by force."""


@dataclass(frozen=True)
class Task:
    """A case of a part."""

    fields: dict
    """What a result file says of the case itself; ``name`` among it."""
    run: Callable[[], dict | list[dict]]
    """What it found: one result, or several of one name. An exception makes the status *failed*."""
    show: Callable[[dict], str | None] = lambda result: None
    """The line to print of a result, None for no line."""


@dataclass
class Visit:
    """What the parts are told."""

    device: torch.device
    """A GPU, or the CPU for a rehearsal."""
    file: records.VisitFile
    """Where results go."""
    deadline: float
    """When the call must end, on ``time.monotonic()``'s clock."""
    tests: tuple[str, ...] = ()
    """What pytest runs; empty for the test files about GPUs."""
    filter: str = ""
    """Regular expression that the names of cases must contain."""
    again: bool = False
    """Whether what the file has is measured anew."""
    ran: set[tuple[str, str]] = field(default_factory=set)
    """Part and name of the cases that this call has run."""

    @property
    def rehearsal(self) -> bool:
        """Whether there is no GPU."""
        return self.device.type == "cpu"

    @property
    def measurement(self) -> dict:
        """How long a comparison is timed."""
        return {"seconds": 0.0, "rounds": (2, 2)} if self.rehearsal else {"seconds": 0.2, "rounds": (5, 200)}

    def left(self, until: float) -> float:
        """Seconds until then."""
        return max(0.0, until - time.monotonic())


class OutOfTime(Exception):
    """A case stopped half-way, to be run from its beginning by another call."""


class Watch:
    """Ends the process when a case gives no sign of life, and says in the file which one it was."""

    def __init__(self, visit: Visit):
        self.visit, self.end, self.until, self.part, self.fields = visit, math.inf, math.inf, "", {}
        threading.Thread(target=self._look, daemon=True).start()

    def begin(self, part: str, fields: dict, until: float) -> None:
        """A case begins, and should be over by then."""
        self.part, self.fields, self.until = part, fields, until
        self.end = time.monotonic() + PATIENCE

    def alive(self) -> None:
        """The case is getting on. Raises :class:`OutOfTime` where its time is used up."""
        if time.monotonic() >= self.until:
            raise OutOfTime
        self.end = time.monotonic() + PATIENCE

    def rest(self) -> None:
        """No case is running."""
        self.end = math.inf

    def _look(self) -> None:
        while True:
            time.sleep(0.5)
            if time.monotonic() >= self.end:
                reason = f"no sign of life for {PATIENCE:.0f} s: the process was ended"
                print(f"{self.fields['name']}: {reason}", flush=True)
                result = {**self.fields, "status": "failed", "reason": reason}
                self.visit.file.keep(self.part, result["name"], [result])
                os._exit(BEGIN_AGAIN)  # the thread that waits for the GPU can't be asked to stop


def fit_for_more(device: torch.device) -> bool:
    """Whether the GPU still answers after an error; an illegal access, for one, spoils the whole process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def work(visit: Visit, part: str, tasks: Iterable[Task], until: float, watch: Watch) -> None:
    """Run the cases that the file lacks until the time is used up, and keep what each gives."""
    done = {name for of, name in visit.ran if of == part} if visit.again else visit.file.done(part)
    left = 0
    for task in tasks:
        name = task.fields["name"]
        if name in done or not re.search(visit.filter, name):
            continue
        if time.monotonic() >= until:
            left += 1
            continue
        watch.begin(part, task.fields, until)
        try:
            found = task.run()
            found = [{**task.fields, **result} for result in (found if isinstance(found, list) else [found])]
        except OutOfTime:
            left += 1
            continue
        except Exception as error:  # one broken case must not lose the others
            found = [{**task.fields, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:600]}]
        watch.rest()
        visit.ran.add((part, name))
        visit.file.keep(part, name, found)
        for result in found:
            if line := task.show(result):
                print(line, flush=True)
        if any(result["status"] == "failed" for result in found) and not fit_for_more(visit.device):
            print("the GPU is not fit for more: going on in a new process", flush=True)
            os._exit(BEGIN_AGAIN)
        _spare_memory(visit.device)
    entry = visit.file.part(part)
    entry["finished"] = left == 0 and not visit.filter
    visit.file.write()
    if left:
        print(f"{left} cases are left for another call", flush=True)


def _spare_memory(device: torch.device) -> None:
    """Give back what the allocator holds, before the next case of another size finds none."""
    if device.type == "cuda" and torch.cuda.memory_reserved(device) > torch.cuda.mem_get_info(device)[1] / 2:
        torch.cuda.empty_cache()


def if_wrong(result: dict) -> str | None:
    """A line for what ought not to be."""
    wrong = result["status"] in ("differs", "failed")
    return f"{result['status']}: {result['name']}: {result['reason']}" if wrong else None


def always(result: dict) -> str:
    """A line for every result."""
    return f"{result['status']}: {result['name']}" + (f": {result['reason']}" if result["reason"] else "")


# Parts that run a command


def environment() -> dict[str, str]:
    """The environment of a subprocess that imports the package from this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def stream(command: list[str], seconds: float) -> tuple[int | None, list[str]]:
    """Run a command and show its output. Returns its exit code, None if it ran out of time, and the lines."""
    lines, late = [], threading.Event()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment(), **options) as process:

        def stop():
            late.set()
            os.killpg(process.pid, signal.SIGKILL)  # its children as well

        timer = threading.Timer(seconds, stop)
        timer.start()
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            print(line, end="", flush=True)
        timer.cancel()
        code = process.wait()
    return (None if late.is_set() else code), lines


def report(visit: Visit, until: float, watch: Watch) -> None:
    """``python -m rnnkernels``."""
    code, lines = stream([sys.executable, "-m", "rnnkernels"], visit.left(until))
    status = "skipped" if code is None else "passed" if code == 0 else "failed"
    found = {"name": "python -m rnnkernels", "status": status}
    # Where the time did not suffice for its self-check, the part kernels goes over the same ground.
    visit.file.part("report").update(finished=True, exit_code=code, lines=lines, cases=[found])
    visit.file.write()


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


def failures(lines: list[str]) -> list[str]:
    """The tracebacks in what pytest printed, and the summary after them; at most 400 lines."""
    starts = [position for position, line in enumerate(lines) if re.match(r"=+ (FAILURES|ERRORS) =+$", line)]
    return lines[starts[0] :][:400] if starts else []


def tests_of_gpus() -> list[str]:
    """The test files that speak of a GPU. Others may need what only an installed project has: tools, pages, pins."""
    speaks = re.compile(r"\b(cuda|gpu|kernel_device)\b")
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if speaks.search(path.read_text())]


def tests(visit: Visit, until: float, watch: Watch) -> None:
    """The unit tests that have to do with a GPU; not those that compile for absent ones."""
    entry = visit.file.part("tests")
    if missing := [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]:
        print(f"{' and '.join(missing)} not installed: the part kernels stands in for the tests")
        entry.update(finished=True, exit_code=None, lines=[f"{' and '.join(missing)} not installed"])
        return visit.file.write()
    command = [sys.executable, "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", "-m", "not offline"]
    # A warning of a version that the project does not pin is no failure here.
    command += ["-W", "default", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None and not visit.rehearsal:
        command += ["-n", str(min(8, os.cpu_count() or 1))]  # compiling, on the CPU, is most of the work
    command += visit.tests or tests_of_gpus()
    code, lines = stream(command, visit.left(until))
    entry.update(finished=code is not None, exit_code=code, lines=failures(lines), cases=read_tests(lines))
    visit.file.write()
    if code is None:
        print(f"the time was used up: {len(entry['cases'])} tests had run")
    return None


# Parts that run cases


def kernels(visit: Visit, until: float, watch: Watch) -> None:
    """Every design of the Triton kernels against ``rnnkernels.reference`` in float64, forward and backward."""
    work(visit, "kernels", kernel_tasks(visit), until, watch)


def kernel_tasks(visit: Visit) -> Iterator[Task]:
    """A comparison for each case and design, and one for each operator with very many elements."""
    for case in parity.cases(visit.rehearsal):
        with runner.precision(case["precision"]):
            found = designs.designs_for(case, visit.device)
        for design in found:
            fields = {"name": f"{design} {' '.join(f'{k}={v}' for k, v in case.items())}", **case}
            fields["design"] = str(design)

            def run(case=case, design=design):
                with runner.precision(case["precision"]):
                    return parity.compare(case, design, visit.device)

            yield Task(fields, run, if_wrong)
    for operator, sizes in parity.FAR.items():
        fields = {"name": f"{operator}, more than 2^31 elements", "operator": operator}
        yield Task(fields, lambda each=(operator, sizes): parity.far_offsets(*each, visit.device), always)


def stresses(visit: Visit, until: float, watch: Watch) -> None:
    """A barrier under load, CUDA graphs, grids that do not fit, compute-sanitizer."""

    def tasks() -> Iterator[Task]:
        for fields, check in stress.tasks(visit.device):
            yield Task(fields, lambda check=check: check(min(visit.left(until), 0.8 * PATIENCE)), always)

    work(visit, "stress", tasks(), until, watch)


TINY_GRID = (
    Case(3, 2, 4, 4, "forward", "LSTM"),
    Case(3, 20, 4, 4, "forward+backward", "GRU"),
    Case(3, 2, 4, 4, "forward+backward", "RNN", num_layers=3),
    Case(3, 2, 4, 4, "forward+backward", "LSTM", padded=True),
)


def benchmark_grid(visit: Visit, until: float, watch: Watch) -> None:
    """Every cell, type, pass and size beside ``torch.nn``, the most telling cases first."""
    declared = TINY_GRID if visit.rehearsal else grid.cases()
    print(runner.HEADER, flush=True)
    work(
        visit,
        "grid",
        (
            Task(
                runner.fields(case),
                lambda case=case: grid.run_case(case, visit.device, **visit.measurement),
                runner.row,
            )
            for case in declared
        ),
        until,
        watch,
    )
    entry = visit.file.part("grid")
    gpu = visit.file.document["machine"]["gpu"]
    entry["targets"] = grid.verdicts(entry["cases"], gpu, complete=entry["finished"])
    visit.file.write()


def scans(visit: Visit, until: float, watch: Watch) -> None:
    """Linear scans beside a loop and a copy, minimal cells beside ``torch.nn``, attention beside PyTorch's."""
    parts = ("copy", "attention", "training", "scan")
    declared = [case for part in parts for case in scan.cases(part, visit.device, *([5] if visit.rehearsal else []))]
    tasks = (
        Task(
            {"name": name},
            lambda make=make: scan.run_case(make, visit.device, **visit.measurement),
            scan.row,
        )
        for name, make in declared
    )
    work(visit, "scans", tasks, until, watch)


def sweeps(visit: Visit, until: float, watch: Watch) -> None:
    """Tiles around those of the dispatch table, row by row."""

    def show(result: dict) -> str:
        if result["status"] != "measured":
            return always(result)
        becomes = f"-> {result['after']}" if result["literal"] else f"kept of {len(result['candidates'])} candidates"
        return f"{result['name']}: {result['before']} {becomes}"

    tasks = (
        Task(tuning.fields(row), lambda row=row: tuning.sweep(row, visit.device, visit.measurement, watch.alive), show)
        for row in tuning.rows_for(visit.device)
    )
    work(visit, "tuning", tasks, until, watch)


def design_times(visit: Visit, until: float, watch: Watch) -> None:
    """Whether the design that the dispatch chooses is the fastest of those that fit."""
    sizes, batches, steps = (256, 128, 64, 32, 16, 512, 1024), (64, 1, 16, 256, 1024), 256
    kinds = (ARITHMETIC[2], ARITHMETIC[0], ARITHMETIC[1])  # float16 is as bfloat16
    if visit.rehearsal:
        sizes, batches, steps, kinds = (16,), (2,), 3, ARITHMETIC[:1]

    def show(result: dict) -> str:
        figure = f"{result['status']}: {result['reason']}"
        if result["status"] == "measured":
            figure = f"{result['microseconds_per_step']['median']:8.2f} µs a step"
        return f"{result['name']} {'*' if result.get('chosen') else ' '} {figure}  {result.get('design', '')}"

    def tasks() -> Iterator[Task]:
        passes = stress.PASSES
        for batch, size, operator, kind, direction in itertools.product(batches, sizes, OPERATORS, kinds, passes):
            case = {"operator": operator, "hidden_size": size, "batch": batch, "sequence_length": steps}
            case |= {"dtype": kind["dtype"], "precision": kind.get("precision", "highest"), "pass": direction}
            name = f"{operator} H={size} B={batch} {case['dtype']} {case['precision']} {direction}"

            def run(case=case):
                with runner.precision(case["precision"]):
                    return designs.compare_designs(case, visit.device, visit.measurement)

            yield Task({"name": name, **case}, run, show)

    work(visit, "designs", tasks(), until, watch)
    print("* the dispatch's choice")


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


def measure(visit: Visit, part: str, declared: Iterable[runner.AnyCase], until: float, watch: Watch) -> None:
    """Run cases of ``python -m benchmarks`` or of ``benchmarks.options``, and judge its targets."""
    measurement = visit.measurement if visit.rehearsal else {**runner.FULL, "seconds": 0.5}
    print(runner.HEADER, flush=True)
    tasks = (
        Task(runner.fields(case), lambda case=case: runner.run_case(case, visit.device, **measurement), runner.row)
        for case in declared
    )
    work(visit, part, tasks, until, watch)
    entry = visit.file.part(part)
    entry["targets"] = runner.verdicts(entry["cases"])
    visit.file.write()
    print(f"\n{runner.footer(entry['cases'])}")


def benchmarks(visit: Visit, until: float, watch: Watch) -> None:
    """``python -m benchmarks``, with every case that a GPU has."""
    measure(visit, "benchmarks", TINY if visit.rehearsal else cases(visit.device.type), until, watch)


def option_benchmarks(visit: Visit, until: float, watch: Watch) -> None:
    """``python -m benchmarks.options``: what ``torch.nn`` does not have, beside a loop over steps."""
    measure(visit, "options", TINY_OPTIONS if visit.rehearsal else options.cases(visit.device.type), until, watch)


PARTS = {
    # name: (function, share of the time)
    "report": (report, 1),
    "kernels": (kernels, 5),
    "stress": (stresses, 4),
    "grid": (benchmark_grid, 12),
    "scans": (scans, 2),
    "tuning": (sweeps, 4),
    "tests": (tests, 4),
    "designs": (design_times, 2),
    "benchmarks": (benchmarks, 3),
    "options": (option_benchmarks, 2),
}
"""In this order. What is left of a call is shared out among the parts that are still to be finished."""

SHORTEST = 30.0
"""Seconds that a part has at least, as long as the call has them."""


def visit_parts(visit: Visit, wanted: list[str]) -> None:
    """Run the parts that are wanted and not finished yet."""
    watch = Watch(visit)
    unfinished = [name for name in wanted if visit.again or not visit.file.part(name)["finished"]]
    for position, name in enumerate(unfinished):
        part, share = PARTS[name]
        now, left = time.monotonic(), visit.left(visit.deadline)
        seconds = max(SHORTEST, left * share / sum(PARTS[other][1] for other in unfinished[position:]))
        print(f"\n== {name}: {part.__doc__.partition(chr(10))[0]}", flush=True)
        if left <= 0:
            print("the time was used up: another call goes on here", flush=True)
            continue
        try:
            part(visit, min(visit.deadline, now + seconds), watch)
        except Exception:  # a part that can't run must not lose the others
            traceback.print_exc()
        watch.rest()
        print(f"{name}: {time.monotonic() - now:.0f} s", flush=True)


def wrong(document: dict) -> list[tuple[str, dict]]:
    """Part and case of everything that ought not to be."""
    bad = ("differs", "failed", "error", "xpass")
    return [(name, case) for name, part in document["parts"].items() for case in part["cases"] if case["status"] in bad]


def summary(document: dict) -> str:
    """A short table of a visit: its parts, what is wrong, and the grid's ratios and targets."""
    gpu = document["machine"]["gpu"]
    lines = [f"{gpu['name'] if gpu else 'a CPU (rehearsal)'}, {document['date']}, sources {document['sources']}", ""]
    for name in PARTS:
        part = document["parts"].get(name)
        if part is None:
            lines.append(f"{name:11} not begun")
            continue
        counts: dict[str, int] = {}
        for case in part["cases"]:
            counts[case["status"]] = counts.get(case["status"], 0) + 1
        told = ", ".join(f"{number} {status}" for status, number in counts.items()) or "nothing"
        lines.append(f"{name:11} {'finished' if part['finished'] else 'to go on'}: {told}")
    if found := wrong(document):
        lines += ["", *(f"{name}: {case['status']}: {case['name']}" for name, case in found[:10])]
        lines += [f"and {len(found) - 10} more"] * (len(found) > 10)
    if cases_of_grid := document["parts"].get("grid", {}).get("cases"):
        lines += ["", "torch.nn's time over rnnkernels', geometric means:", *grid.table(cases_of_grid), ""]
        lines += [grid.verdict_line(verdict) for verdict in document["parts"]["grid"].get("targets", [])]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python benchmarks/gpu_visit.py", description=__doc__.partition("\n")[0])
    found.add_argument("--part", choices=(*PARTS, "all"), action="append", help="can be given again; default: all")
    found.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result file")
    found.add_argument(
        "--budget", type=float, default=BUDGET, help=f"seconds that the call may take (default: {BUDGET:.0f})"
    )
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal without a GPU")
    found.add_argument("--tests", nargs="+", default=[], help="what pytest runs (default: test files about GPUs)")
    found.add_argument("--filter", metavar="REGEX", default="", help="only cases in whose name this occurs")
    found.add_argument("--commit", help="commit of the sources, where they are no git checkout")
    found.add_argument("--again", action="store_true", help="measure anew what the file has")
    found.add_argument("--new", action="store_true", help="begin a new file")
    found.add_argument("--show", metavar="FILE", type=Path, help="print the table of a recorded visit and stop")
    found.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # the file to extend, in a process of its own
    return found


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the parts, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parser().parse_args(arguments)
    try:
        re.compile(chosen.filter)
    except re.error as error:
        parser().error(f"argument --filter: expected a regular expression, got {chosen.filter!r}: {error}")
    if chosen.show is not None:
        document = json.loads(chosen.show.read_text())
        if document.get("kind") != "visit":
            parser().error(f"argument --show: expected the file of a visit, got one of kind {document.get('kind')!r}")
        print(summary(document))
        return 0
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
    wanted = [name for name in PARTS if chosen.part is None or {name, "all"} & set(chosen.part)]
    if chosen.worker is not None:
        file = records.VisitFile(chosen.worker, json.loads(chosen.worker.read_text()))
        deadline = time.monotonic() + chosen.budget
        visit_parts(Visit(device, file, deadline, tuple(chosen.tests), chosen.filter, chosen.again), wanted)
        return 0
    return supervise(chosen, arguments, device, wanted)


def supervise(chosen: argparse.Namespace, arguments: list[str], device: torch.device, wanted: list[str]) -> int:
    """Let workers run the parts, one after the other where a GPU fell silent; then print the table.

    The process of a worker is the only thing that ends with a kernel that waits forever.
    """
    deadline = time.monotonic() + chosen.budget
    header = records.header("visit", ["python", "benchmarks/gpu_visit.py", *arguments], device, chosen.commit)
    file = records.VisitFile.open(chosen.output.resolve(), header, device, chosen.new)
    file.document.setdefault("calls", []).append({key: header[key] for key in ("date", "command")})
    file.write()
    again = arguments
    while True:
        seconds = max(0.0, deadline - time.monotonic())
        command = [sys.executable, str(Path(__file__).resolve()), *again]
        command += ["--worker", str(file.path), "--budget", str(seconds)]
        with subprocess.Popen(command, env=environment(), start_new_session=True) as worker:
            try:
                code = worker.wait(seconds + GRACE)
            except subprocess.TimeoutExpired:
                print("the time is over: the worker was ended", flush=True)
                code = None
            except BaseException:
                os.killpg(worker.pid, signal.SIGKILL)
                raise
                os.killpg(worker.pid, signal.SIGKILL)
        if code != BEGIN_AGAIN or time.monotonic() >= deadline:
            break
        again = [argument for argument in arguments if argument != "--again"]  # what it has is of this call
    document = json.loads(file.path.read_text())
    print(f"\n{summary(document)}")
    tuned = document["parts"].get("tuning", {"finished": False})["finished"]
    asked = chosen.part is not None and "tuning" in chosen.part
    if tuned and chosen.device != "cpu" and (asked or document["parts"].get("grid", {}).get("finished")):
        print(f"\nThe dispatch table: {tuning.apply(document)} rows rewritten. A new visit measures what they gain.")
    print(f"\nResults are in {os.path.relpath(file.path)}")
    return int(code != 0 or bool(wrong(document)))


if __name__ == "__main__":
    sys.exit(main())
