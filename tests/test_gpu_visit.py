"""The visit to a GPU: what it does where there is none, and its file. No time that is measured here passes or fails."""

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rnnkernels as rk
from rnnkernels.__main__ import OPERATORS, options_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import designs, grid, model, parity, records, runner, stress  # noqa: E402
from benchmarks.cases import Case  # noqa: E402

CPU = torch.device("cpu")
MOMENT = {"seconds": 0.0, "rounds": (2, 2)}
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "capability": "9.0",
    "memory_bytes": 80 * 2**30,
    "multiprocessors": 132,
    "driver": None,
}


@pytest.fixture
def visit():
    pytest.importorskip("triton", reason="Triton is not installed")
    return importlib.import_module("benchmarks.gpu_visit")


def run_script(*arguments, seconds=600):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/gpu_visit.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds)


def header(**more):
    found = {**records.header("visit", ["python", "benchmarks/gpu_visit.py"], CPU), **more}
    return {**found, "calls": [{key: found[key] for key in ("date", "command")}]}


# ---------------------------------------------------------------- the whole of it


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_visit_needs_a_gpu(tmp_path):
    finished = run_script("--output", str(tmp_path))
    assert finished.returncode == 2
    assert finished.stderr.startswith("There is no GPU")
    assert not finished.stdout
    assert not os.listdir(tmp_path)


@pytest.mark.interpreter
@pytest.mark.slow
def test_a_rehearsal_goes_through_every_part_and_is_not_repeated(tmp_path, conform, visit):
    arguments = ["--device", "cpu", "--output", str(tmp_path), "--tests", "tests/test_main.py::test_relative_error"]
    arguments += ["--budget", "1700"]  # for a busy machine
    finished = run_script(*arguments, seconds=1800)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    conform(found)
    assert found["machine"]["device"] == "cpu"
    parts = found["parts"]
    assert list(parts) == list(visit.PARTS)
    assert all(part["finished"] for part in parts.values())
    assert parts["tests"]["cases"] == [{"name": "tests/test_main.py::test_relative_error", "status": "passed"}]
    for name, status in (("kernels", "agrees"), ("stress", "agrees"), ("designs", "measured")):
        kinds = {(case["operator"], case.get("design", "").partition("(")[0]) for case in parts[name]["cases"]}
        assert kinds >= set(itertools.product(("rnn", "gru", "lstm"), ("Resident", "Persistent", "Step")))
        assert {case["status"] for case in parts[name]["cases"]} == {status}
    options = {(case["operator"], case["option"]) for case in parts["kernels"]["cases"] if case.get("option")}
    assert options == {(operator, option) for operator in OPERATORS for option in options_of(operator, 3, 2, 5)}
    for name in ("grid", "scans", "tuning", "benchmarks", "options"):
        assert {case["status"] for case in parts[name]["cases"]} == {"measured"}
    assert "LSTM float32" in finished.stdout.partition("geometric means:")[2]

    finished = run_script(*arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert list(tmp_path.iterdir()) == [path]
    again = json.loads(path.read_text())
    assert len(again["calls"]) == 2
    assert again["parts"] == parts


@pytest.mark.interpreter
def test_a_visit_without_time_leaves_everything_to_another_call(tmp_path, conform):
    finished = run_script("--device", "cpu", "--output", str(tmp_path), "--budget", "0")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    conform(found)
    assert all(not part["finished"] and not part["cases"] for part in found["parts"].values())
    assert finished.stdout.count("not begun") == 10


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--filter", "("], "--filter: expected a regular expression"),
        (["--part", "everything"], "--part"),
        (["--show", "OTHER"], "--show: expected the file of a visit"),
    ],
)
def test_bad_arguments(visit, tmp_path, capsys, arguments, says):
    other = tmp_path / "other.json"
    other.write_text('{"kind": "benchmarks"}')
    with pytest.raises(SystemExit) as exit:
        visit.main([str(other) if argument == "OTHER" else argument for argument in arguments])
    assert exit.value.code == 2
    assert says in capsys.readouterr().err


# ---------------------------------------------------------------- its file


def test_a_later_call_extends_the_file_of_its_sources_and_gpu(tmp_path):
    def opened(anew=False, **more):
        return records.VisitFile.open(tmp_path, header(**more), CPU, anew)

    first = opened()
    first.keep("kernels", "a", [{"name": "a", "status": "agrees"}])
    (tmp_path / "torn.json").write_text('{"kind"')
    (tmp_path / "list.json").write_text("[]")
    assert opened().path == first.path
    assert opened().done("kernels") == {"a"}
    assert opened().done("grid") == set()
    machine = {**first.document["machine"], "gpu": H100}
    for other in (opened(anew=True), opened(sources="0" * 16), opened(commit="x"), opened(machine=machine)):
        assert other.path != first.path
        assert not other.document["parts"]
    assert opened(machine={**first.document["machine"], "load": 3.0}).path == first.path


def test_results_of_a_case_take_the_place_of_older_ones(tmp_path):
    file = records.VisitFile(tmp_path / "file.json", header())
    file.document["parts"] = {}
    file.keep("designs", "a", [{"name": "a", "design": 1}, {"name": "a", "design": 2}])
    file.keep("designs", "b", [{"name": "b"}])
    file.keep("designs", "a", [{"name": "a", "design": 3}])
    assert json.loads(file.path.read_text())["parts"]["designs"]["cases"] == [{"name": "b"}, {"name": "a", "design": 3}]


# ---------------------------------------------------------------- cases, one by one


@pytest.fixture
def begun(visit, tmp_path):
    """A visit that has begun, with a watch that never looks."""

    class Watch(visit.Watch):
        def _look(self):
            pass

    file = records.VisitFile(tmp_path / "file.json", {**header(), "parts": {}})
    return visit.Visit(CPU, file, deadline=math.inf), Watch


def result(**more):
    return {"status": "agrees", "reason": None, **more}


def test_one_broken_case_does_not_lose_the_others_and_none_runs_twice(visit, begun):
    state, watch = begun
    ran = []

    def case(name):
        def run():
            ran.append(name)
            if name == "b":
                raise ValueError("broken")
            return result()

        return visit.Task({"name": name}, run)

    def work(**more):
        for key, value in more.items():
            setattr(state, key, value)
        visit.work(state, "kernels", [case("a"), case("b"), case("c")], math.inf, watch(state))
        return {c["name"]: (c["status"], c["reason"]) for c in state.file.part("kernels")["cases"]}

    assert work(filter="[ab]") == {"a": ("agrees", None), "b": ("failed", "ValueError: broken")}
    assert not state.file.part("kernels")["finished"]
    work(filter="")
    assert state.file.part("kernels")["finished"]
    assert ran == ["a", "b", "c"]
    work(again=True, ran=set())
    assert ran == ["a", "b", "c"] * 2
    assert len(state.file.part("kernels")["cases"]) == 3


def test_what_the_time_did_not_suffice_for_is_left(visit, begun):
    state, watch = begun

    def run():
        raise visit.OutOfTime

    tasks = [visit.Task({"name": "a"}, run), visit.Task({"name": "b"}, lambda: result())]
    visit.work(state, "tuning", tasks, math.inf, watch(state))
    assert [case["name"] for case in state.file.part("tuning")["cases"]] == ["b"]
    assert not state.file.part("tuning")["finished"]
    visit.work(state, "stress", tasks, time.monotonic() - 1, watch(state))
    assert not state.file.part("stress")["cases"]


def test_a_gpu_that_is_not_fit_for_more_ends_the_worker(visit, begun, monkeypatch):
    state, watch = begun
    codes = []
    monkeypatch.setattr(visit, "fit_for_more", lambda device: False)
    monkeypatch.setattr(visit.os, "_exit", codes.append)
    visit.work(state, "kernels", [visit.Task({"name": "a"}, lambda: 1 / 0)], math.inf, watch(state))
    assert codes == [visit.BEGIN_AGAIN]
    assert json.loads(state.file.path.read_text())["parts"]["kernels"]["cases"][0]["status"] == "failed"


SILENT = """
import json, math, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from benchmarks import gpu_visit, records
gpu_visit.PATIENCE = 1.0
path = Path({path!r})
file = records.VisitFile(path, json.loads(path.read_text()))
visit = gpu_visit.Visit(torch.device("cpu"), file, math.inf)
tasks = [gpu_visit.Task({{"name": name}}, lambda: time.sleep(60)) for name in ("a", "b")]
gpu_visit.work(visit, "kernels", tasks, math.inf, gpu_visit.Watch(visit))
"""


def test_a_case_that_falls_silent_is_ended_and_not_tried_again(visit, tmp_path):
    path = tmp_path / "file.json"
    records.write(path, {**header(), "parts": {}})
    program = SILENT.format(root=str(ROOT), path=str(path))
    for _ in range(2):
        finished = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert finished.returncode == visit.BEGIN_AGAIN, finished.stderr
    cases = json.loads(path.read_text())["parts"]["kernels"]["cases"]
    assert [(case["name"], case["status"]) for case in cases] == [("a", "failed"), ("b", "failed")]
    assert "no sign of life" in cases[0]["reason"]


def test_a_worker_that_gives_up_is_followed_by_another(visit, tmp_path, monkeypatch):
    calls = []

    class Worker:
        pid = 0

        def __init__(self, command, **options):
            calls.append(command)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def wait(self, seconds):
            return visit.BEGIN_AGAIN if len(calls) < 3 else 0

    monkeypatch.setattr(visit.subprocess, "Popen", Worker)
    monkeypatch.setattr(visit.records, "_git", lambda *arguments: None)
    assert visit.main(["--device", "cpu", "--output", str(tmp_path), "--again"]) == 0
    assert len(calls) == 3
    assert ["--again" in command for command in calls] == [True, False, False]
    assert len({command[command.index("--worker") + 1] for command in calls}) == 1


def test_the_time_is_shared_out_among_what_is_unfinished(visit, begun, monkeypatch):
    state, watch = begun
    given = {}

    def part(name):
        def run(state, until, watch):
            """A part."""
            given[name] = until - time.monotonic()

        return run

    monkeypatch.setattr(visit, "Watch", watch)
    monkeypatch.setattr(visit, "PARTS", {name: (part(name), share) for name, share in (("a", 1), ("b", 2), ("c", 1))})
    state.file.part("a")["finished"] = True
    state.deadline = time.monotonic() + 300
    visit.visit_parts(state, ["a", "b", "c"])
    assert given == {"b": pytest.approx(200, abs=5), "c": pytest.approx(300, abs=5)}


def test_reading_what_pytest_prints(visit):
    lines = [
        "tests/test_a.py::test_x[a b-1] PASSED                 [  9%]",
        "tests/test_a.py::test_y SKIPPED (needs a CUDA device)  [ 18%]",
        "[gw3] [ 27%] FAILED tests/test_a.py::test_z[1-2] ",
        "tests/test_a.py::test_w ",
        "=================================== FAILURES ===================================",
        "E       assert 0",
        "=========================== short test summary info ============================",
        "FAILED tests/test_a.py::test_z[1-2] - assert 0",
    ]
    assert visit.read_tests(lines) == [
        {"name": "tests/test_a.py::test_x[a b-1]", "status": "passed"},
        {"name": "tests/test_a.py::test_y", "status": "skipped"},
        {"name": "tests/test_a.py::test_z[1-2]", "status": "failed"},
    ]
    assert visit.failures(lines) == lines[4:]
    assert visit.failures(lines[:4]) == []


def test_the_tests_that_have_to_do_with_a_gpu_are_found(visit):
    assert "tests/test_kernels.py" in visit.tests_of_gpus()


def test_a_command_that_outlasts_its_time_is_ended(visit, tmp_path, capsys):
    late = tmp_path / "late"
    program = f"import pathlib, time; print('begun', flush=True); time.sleep(30); pathlib.Path({str(late)!r}).touch()"
    code, lines = visit.stream([sys.executable, "-c", program], seconds=3)
    assert code is None
    assert lines in (["begun"], [])
    assert not late.exists()


# ---------------------------------------------------------------- correctness of the kernels


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("operator", "nonlinearity"), [("rnn", "tanh"), ("rnn", "relu"), ("gru", None), ("lstm", None)]
)
def test_a_wrong_kernel_is_seen(monkeypatch, operator, nonlinearity, kernel_device):
    kernels = designs.triton_kernels(operator)
    case = {"operator": operator, "sequence_length": 5, "batch": 4, "hidden_size": 6, "dtype": "float32"}
    case |= {"nonlinearity": nonlinearity, "option": None, "reverse": False, "lengths": True}
    backward = kernels.backward
    for design in designs.designs_for(case, kernel_device):
        monkeypatch.setattr(kernels, "backward", backward)
        assert parity.compare(case, design, kernel_device)["status"] == "agrees"
        monkeypatch.setattr(kernels, "backward", lambda *arguments: [g * 1.01 for g in backward(*arguments)])
        found = parity.compare(case, design, kernel_device)
        assert found["status"] == "differs"
        assert "gradient of weight_hh" in found["reason"]


@pytest.mark.interpreter
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_design_is_not_timed(monkeypatch, operator, direction, kernel_device):
    case = {"operator": operator, "sequence_length": 3, "batch": 2, "hidden_size": 6, "dtype": "float32"}
    case |= {"precision": "highest", "pass": direction}
    results = designs.compare_designs(case, kernel_device, MOMENT)
    assert [found["status"] for found in results] == ["measured"] * len(results)
    assert [found["chosen"] for found in results] == [True] + [False] * (len(results) - 1)
    run = getattr(designs, direction)

    def wrong(*arguments):
        found = run(*arguments)
        return found * 1.01 if direction == "backward" else [found[0] * 1.01, *found[1:]]

    monkeypatch.setattr(designs, direction, wrong)
    for found in designs.compare_designs(case, kernel_device, MOMENT):
        assert found["status"] == "differs"
        assert "microseconds_per_step" not in found


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_design_is_forced(operator, kernel_device):
    from rnnkernels.kernels.triton import dispatch

    kernels, case = designs.triton_kernels(operator), {"operator": operator, "batch": 4, "hidden_size": 6}
    resident, persistent, step = designs.designs_for({**case, "dtype": "float32"}, kernel_device)
    assert [type(d) for d in (resident, persistent, step)] == [dispatch.Resident, dispatch.Persistent, dispatch.Step]
    with designs.forced(operator, step):
        assert kernels.choose(operator, 6, 4, torch.float32, kernel_device) == step
        assert rk._backend._selected == "triton"
    assert kernels.choose(operator, 6, 4, torch.float32, kernel_device) == resident


@pytest.mark.interpreter
def test_a_refused_launch_does_not_pass_for_the_design(monkeypatch, kernel_device):
    from rnnkernels.kernels.triton import persistent

    case = {**stress.TINY, "operator": "rnn", "pass": "forward"}
    _, design, step = designs.designs_for(case, kernel_device)
    launch = persistent.launch

    def refuse(kernel, *arguments, **options):
        class Kernel:
            def __getitem__(self, grid):
                def run(*arguments, **options):
                    raise RuntimeError("too many blocks in cooperative launch")

                return run

        return launch(Kernel(), *arguments, **options)

    monkeypatch.setattr(designs.triton_kernels("rnn"), "launch", refuse)
    monkeypatch.setattr(persistent.dispatch, "_refused", set())
    found = designs.compare_designs(case, kernel_device, MOMENT, [design, step])
    assert [each["status"] for each in found] == ["failed", "measured"]
    assert "refused a cooperative launch" in found[0]["reason"]


@pytest.mark.interpreter
@pytest.mark.parametrize(("direction", "directions"), [("forward", 1), ("backward", 1), ("backward", 2)])
def test_other_bits_under_load_are_seen(monkeypatch, direction, directions, kernel_device):
    case = {**stress.TINY, "operator": "lstm", "pass": direction, "directions": directions}
    design = designs.designs_for(case, kernel_device)[0]
    assert design.lanes == directions
    found = stress.soak(case, design, kernel_device, steps=10, seconds=math.inf)
    assert found == {"status": "agrees", "reason": None, "runs": 3}
    assert stress.soak(case, design, kernel_device, steps=100, seconds=0.0)["status"] == "skipped"
    again, calls = stress.Pass.again, []

    def disturbed(self):
        calls.append(self)
        states = again(self)
        if len(calls) == 4:  # the second run; the first call is not under load, and the next is one launch a step
            states = states.clone()
            states.view(-1)[0] = torch.nextafter(states.view(-1)[0], torch.tensor(math.inf))  # the smallest of changes
        return states

    monkeypatch.setattr(stress.Pass, "again", disturbed)
    found = stress.soak(case, design, kernel_device, steps=100, seconds=math.inf)
    assert (found["status"], found["runs"]) == ("differs", 2)


@pytest.mark.interpreter
def test_layers_that_give_other_bits_are_seen(monkeypatch, kernel_device):
    from rnnkernels.kernels.triton import wavefront

    case = {**stress.TINY, "operator": "gru", "layers": 2}
    design = stress.wavefront_of(case, torch.device("cpu"))
    calls, forward = [], wavefront.forward
    monkeypatch.setattr(wavefront, "forward", lambda *arguments: calls.append(arguments) or forward(*arguments))
    found = stress.soak_layers(case, design, kernel_device, steps=10, seconds=math.inf)
    assert found == {"status": "agrees", "reason": None, "runs": 2}
    assert len(calls) == 3

    def disturbed(*arguments):
        calls.append(arguments)
        final = forward(*arguments)
        arguments[9].view(-1)[0] += 1e-6 * (len(calls) % 2)  # the output
        return final

    monkeypatch.setattr(wavefront, "forward", disturbed)
    assert stress.soak_layers(case, design, kernel_device, steps=10, seconds=math.inf)["status"] == "differs"


def test_without_a_sanitizer_nothing_is_claimed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stress.sanitize("memcheck", 1.0) == {
        "status": "skipped",
        "reason": "compute-sanitizer is not on the PATH",
    }
    program = tmp_path / "compute-sanitizer"
    for code, status in ((0, "agrees"), (66, "differs")):
        program.write_text(f"#!/bin/sh\necho found $2; exit {code}\n")
        program.chmod(0o755)
        found = stress.sanitize("racecheck", 30.0)
        assert found["status"] == status
        assert code == 0 or "found racecheck" in found["reason"]


# ---------------------------------------------------------------- the grid


def test_the_grid_is_whole_and_begins_with_what_tells_most():
    declared = grid.cases()
    assert len({case.name for case in declared}) == len(declared)
    plain = [case for case in declared if grid.is_plain(case)]
    axes = {
        "module": {"RNN", "GRU", "LSTM"},
        "mode": {"forward", "forward+backward"},
        "batch": {1, 16, 64, 256},
        "hidden_size": {64, 128, 256, 512, 768, 1024, 2048},
        "sequence_length": {128, 1024},
    }
    for axis, values in axes.items():
        assert {getattr(case, axis) for case in plain} == values
    kinds = {(case.dtype, case.precision) for case in plain}
    assert kinds == {("float32", "high"), ("bfloat16", "highest"), ("float16", "highest")}
    assert len(plain) == math.prod(map(len, axes.values())) * len(kinds)
    for variant in ({"num_layers": 3}, {"bidirectional": True}, {"padded": True}):
        assert any(all(getattr(case, key) == value for key, value in variant.items()) for case in declared)
    first = declared[:60]
    for axis in ("module", "mode", "batch", "dtype", "sequence_length"):
        assert {getattr(c, axis) for c in first} >= {getattr(c, axis) for c in declared} - {1}


@pytest.mark.parametrize(
    ("change", "capability", "expected"),
    [
        ({}, (9, 0), ("persistent", "persistent")),
        ({"dtype": "bfloat16"}, (9, 0), ("standard", "standard")),
        ({"dtype": "float32"}, (9, 0), ("standard", "standard")),
        ({"module": "GRU"}, (9, 0), ("standard", "standard")),
        ({"num_layers": 3}, (9, 0), ("standard", "standard")),
        ({"bidirectional": True}, (9, 0), ("standard", "standard")),
        ({"padded": True}, (9, 0), ("standard", "standard")),
        ({"batch": 256}, (9, 0), ("standard", "standard")),
        ({"batch": 12}, (9, 0), ("standard", "standard")),
        ({"hidden_size": 2048}, (9, 0), ("standard", "standard")),
        ({"hidden_size": 800}, (9, 0), ("standard", "standard")),
        ({}, (8, 6), ("standard", "standard")),
        ({"module": "RNN", "batch": 96, "hidden_size": 1024}, (9, 0), ("standard", "standard")),
        ({"hidden_size": 192, "dtype": "bfloat16"}, (9, 0), ("persistent, small", "standard")),
        ({"hidden_size": 128, "module": "GRU"}, (9, 0), ("persistent, small", "persistent, small")),
        ({"hidden_size": 256, "module": "RNN"}, (9, 0), ("persistent, small", "persistent, small")),
        ({"hidden_size": 128, "padded": True}, (9, 0), ("standard", "standard")),
    ],
)
def test_the_rule_for_cudnns_algorithm(change, capability, expected):
    case = Case(**{**grid.FIRST[1].__dict__, **change})
    found = tuple(grid.cudnn_algorithm(case, each, capability, 132) for each in ("forward", "backward"))
    assert found == expected


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("change", [{}, {"padded": True}, {"num_layers": 3}, {"bidirectional": True}])
@pytest.mark.parametrize("module", ["RNN", "GRU", "LSTM"])
def test_a_case_of_the_grid_is_compared_in_some_rows(monkeypatch, kernel_device, module, mode, change):
    case = Case(5, 20, 6, 6, mode, module, **change)
    rows = grid.rows_to_compare(20)
    assert (len(rows), rows[0], rows[-1], len(set(rows.tolist()))) == (16, 0, 19, 16)
    found = grid.run_case(case, kernel_device, **MOMENT)
    assert found["status"] == "measured", found["reason"]
    assert found["compared_rows"] == 16
    assert all(0 < error < 1e-6 for error in found["relative_error"].values())
    assert ("loop" in found["milliseconds"]) == ("microseconds_per_step" in found) == (not change)

    # An error in a row that is compared, or in a weight's gradient, is seen.
    forward = getattr(rk, module).forward

    def wrong(self, input, *arguments, **options):
        output, final = forward(self, input, *arguments, **options)
        return output * (1 + 1e-4 * (torch.arange(20, device=output.device) == 19)[:, None]), final

    monkeypatch.setattr(getattr(rk, module), "forward", wrong)
    found = grid.run_case(case, kernel_device, **MOMENT)
    assert found["status"] == "differs"
    assert "ratio" not in found


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # the compiler's
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("module", ["RNN", "GRU", "LSTM"])
def test_the_compiled_loop_is_the_same_network(monkeypatch, module, mode):
    case, device = Case(5, 3, 4, 6, mode, module), torch.device("cpu")
    calls = runner.calls_of(case, device)
    exact = calls.pop("exact")()
    monkeypatch.setattr(grid, "COMPILED_STEPS", 2)
    calls["compiled loop"] = grid._compiled_loop(calls["rnnkernels"], backend="aot_eager")
    errors = runner.errors_of(calls, exact)
    assert errors["compiled loop"] < 1e-6, errors


def test_few_cases_have_a_compiled_loop(monkeypatch):
    calls = runner.calls_of(Case(2, 16, 3, 512), torch.device("cpu"))
    for hidden_size, names in ((512, ["loop", "compiled loop"]), (513, ["loop"])):
        assert list(grid._loops(Case(2, 16, 3, hidden_size), calls["rnnkernels"])) == names


def measured(case, ratio, microseconds=None, design=None):
    found = {**runner.fields(case), "status": "measured", "reason": None, "ratio": ratio}
    if microseconds is not None:
        found |= {"design": design, "microseconds_per_step": {"median": microseconds}}
    return found


def verdicts(*results, complete=True, gpu=H100):
    found = grid.verdicts(list(results), gpu, complete)
    return {verdict["target"].split(",")[0].split(":")[0]: (verdict["value"], verdict["met"]) for verdict in found}


def test_targets_of_the_grid():
    training, inference = grid.FIRST[1], grid.FIRST[0]
    found = verdicts(measured(training, 4.0), measured(Case(128, 16, 64, 64, dtype="bfloat16"), 1.0))
    assert found["forward+backward"] == (pytest.approx(2.0), True)
    assert found["never slower"] == (1.0, True)
    assert verdicts(measured(training, 1.9))["forward+backward"] == (pytest.approx(1.9), False)
    assert verdicts(measured(training, 1.9), complete=False)["forward+backward"][1] is None
    assert verdicts(measured(inference, 0.94), complete=False)["never slower"] == (0.94, False)
    assert verdicts(measured(inference, 0.96), complete=False)["never slower"] == (0.96, None)
    assert {met for _, met in verdicts().values()} == {None}


def test_targets_of_the_steps():
    case, floor = grid.FIRST[0], model.step("lstm", 768, 16, "16-bit", "persistent", model.DEVICES["H100"]).floor * 1e6
    persistent, step = "Persistent(block_batch=16)", "Step(block_batch=16)"
    target, ratio = "LSTM forward", "resident and persistent designs"
    assert verdicts(measured(case, 1.0, 1.9, persistent))[target] == (1.9, True)
    assert verdicts(measured(case, 1.0, 2.1, persistent))[target] == (2.1, False)
    assert verdicts(measured(case, 1.0, 3 * floor, persistent))[ratio] == (pytest.approx(3.0), False)
    assert verdicts(measured(case, 1.0, 1.5 * floor, persistent))[ratio] == (pytest.approx(1.5), True)
    assert verdicts(measured(case, 1.0, 9.0, step))[ratio] == (None, None)
    assert verdicts(measured(case, 1.0, 9.0, persistent), gpu=None)[ratio] == (None, None)


def test_the_slow_paths_of_cudnn():
    changes = {
        "bfloat16": {"dtype": "bfloat16"},
        "GRU": {"module": "GRU"},
        "stacked": {"num_layers": 3},
        "bidirectional": {"bidirectional": True},
        "variable lengths": {"padded": True},
    }
    for name, change in changes.items():
        case = Case(**{**grid.FIRST[0].__dict__, **change})
        found = grid.verdicts([measured(case, 2.9)], H100, complete=True)
        missed = [v["target"] for v in found if v["target"].startswith("cuDNN") and v["met"] is False]
        assert len(missed) == 1
        assert name in missed[0]


def test_the_table_that_comes_last(visit):
    training, inference = grid.FIRST[1], grid.FIRST[0]
    other = Case(128, 1, 64, 64, "forward", "GRU", precision="high")
    results = [measured(training, 8.0), measured(inference, 2.0), measured(other, 0.5)]
    results.append({**runner.fields(Case(128, 1, 64, 64)), "status": "failed", "reason": "x"})
    found = {**header(machine={**header()["machine"], "gpu": H100}), "parts": {}}
    found["parts"]["grid"] = {"finished": False, "cases": results, "targets": grid.verdicts(results, H100, False)}
    text = visit.summary(found)
    assert "NVIDIA H100" in text
    assert "grid        to go on: 3 measured, 1 failed" in text
    assert "8.00 of 1 cases" in text
    assert f"0.50 ({other.name})" in text
    assert "GRU  TF32" in text
    assert "target NOT met: never slower" in text
    assert "at least 2.0, is 8.00 so far" in text
