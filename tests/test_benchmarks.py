"""The benchmarks' machinery. No time that is measured here passes or fails a test."""

import dataclasses
import gc
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rnnkernels as rk
from rnnkernels.kernels.eager import rnn as eager

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as table  # noqa: E402
from benchmarks import options as option_cases  # noqa: E402
from benchmarks import records, runner  # noqa: E402
from benchmarks.cases import MODES, MODULES, SHAPES, TARGETS, Case, cases  # noqa: E402
from benchmarks.options import OptionCase  # noqa: E402
from benchmarks.training import STREAMS, TrainingCase  # noqa: E402

CPU = torch.device("cpu")
MOMENT = {"seconds": 0.0, "rounds": (2, 2)}
TRAINING, INFERENCE = Case(40, 3, 4, 6), Case(40, 3, 4, 6, mode="forward")


def document(kind="benchmarks", **more):
    return {**records.header(kind, ["python", "-m", "benchmarks"], CPU), "cases": [], **more}


def run_script(*arguments, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


# ---------------------------------------------------------------- cases


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_declared_cases(device_type):
    declared = cases(device_type)
    assert len({case.name for case in declared}) == len(declared)
    plain = [case for case in declared if case.plain]
    assert [(c.module, c.sequence_length, c.batch, c.input_size, c.hidden_size, c.mode) for c in plain] == [
        (module, *shape, mode) for module in MODULES for mode in MODES for shape in SHAPES
    ]
    assert all(case.dtype == "float32" and case.precision == "highest" for case in plain)
    kinds = {(case.dtype, case.precision) for case in declared}
    assert kinds >= ({("bfloat16", "highest"), ("float32", "high")} if device_type == "cuda" else set())


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_declared_training_cases(device_type):
    declared = [case for case in cases(device_type) if isinstance(case, TrainingCase)]
    assert {case.algorithm for case in declared} >= {*rk.optim.__all__, "clip_grad_norm_", "clip_grad_value_"}
    assert {case.baseline for case in declared} == {"foreach", *(("fused", "copy") if device_type == "cuda" else ())}
    for case in declared:
        assert len(case.sizes) == case.tensors in (1, 100)
        if case.baseline == "copy":  # parameter, gradient, and each state: read and, but for the gradient, written
            param = torch.nn.Parameter(torch.ones(3))
            param.grad = torch.ones(3)
            optimizer = getattr(rk.optim, case.algorithm)([param], **case.options)
            optimizer.step()
            states = sum(value.numel() == 3 for value in optimizer.state[param].values())
            assert STREAMS[case.algorithm, " ".join(case.options)] == 3 + 2 * states


# ---------------------------------------------------------------- comparison


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True},
        {"num_layers": 2},
        {"packed": True},
        {"packed": True, "bidirectional": True},
        {"padded": True},
        {"padded": True, "bidirectional": True},
    ],
)
@pytest.mark.parametrize("case", [TRAINING, INFERENCE], ids=lambda case: case.mode)
@pytest.mark.parametrize("module", MODULES)
def test_a_case_is_compared_and_measured(conform, module, case, options):
    case = dataclasses.replace(case, module=module, **options)
    result = runner.run_case(case, CPU, **MOMENT)
    assert result["status"] == "measured", result["reason"]
    assert all(0 < result["relative_error"][side] < 1e-6 for side in runner.SIDES)
    medians = {side: result["milliseconds"][side]["median"] for side in runner.SIDES}
    assert result["ratio"] == medians["torch.nn"] / medians["rnnkernels"]
    conform(document(cases=[result], targets=runner.verdicts([result])))


@pytest.mark.parametrize(
    ("algorithm", "options", "baseline"),
    [
        *((name, {}, "foreach") for name in rk.optim.__all__),
        ("Adam", {}, "fused"),
        ("Adam", {}, "copy"),
        ("clip_grad_norm_", {"clips": True}, "foreach"),
        ("clip_grad_norm_", {"clips": False}, "foreach"),
        ("clip_grad_value_", {}, "foreach"),
    ],
)
def test_a_training_case_is_compared_and_measured(conform, algorithm, options, baseline):
    case = TrainingCase(algorithm, 5, options, baseline)
    result = runner.run_case(case, CPU, **MOMENT)
    assert result["status"] == "measured", result["reason"]
    assert all(error < 1e-5 for error in result["relative_error"].values())
    assert runner.case_of(result) == case
    found = document(cases=[result, runner.skipped(case, "no time")], targets=runner.verdicts([result]))
    assert len(found["targets"]) == len(TARGETS) + 2
    conform(found)


def test_no_speed_up_is_reported_where_a_step_differs(monkeypatch, conform):
    step = rk.optim.Adam.step
    monkeypatch.setattr(
        rk.optim.Adam,
        "step",
        lambda self: [p.data.mul_(1 + 1e-4) for p in self.param_groups[0]["params"]] and step(self),
    )
    result = runner.run_case(TrainingCase("Adam", 3), CPU, **MOMENT)
    assert (result["status"], "ratio" in result) == ("differs", False)
    conform(document(cases=[result], targets=runner.verdicts([result])))


@pytest.mark.parametrize(("module", "option"), [(m, o) for m, each in option_cases.MODULES.items() for o in each])
def test_an_option_is_compared_with_a_loop(conform, module, option):
    case = OptionCase(option, 20, 4, 3, 5, module)
    result = runner.run_case(case, CPU, **MOMENT)
    assert result["status"] == "measured", result["reason"]
    assert all(0 < error < 2e-6 for error in result["relative_error"].values())
    assert runner.case_of(result) == case
    assert result["ratio"] == result["milliseconds"]["loop"]["median"] / result["milliseconds"]["rnnkernels"]["median"]
    verdicts = runner.verdicts([result])
    assert [verdict["value"] for verdict in verdicts] == [result["ratio"]]
    conform(document(cases=[result, runner.skipped(case, "no time")], targets=verdicts))


@pytest.mark.parametrize("option", ["zoneout", "recurrent dropout", "DropConnect"])
def test_an_option_with_another_mask_is_not_timed(monkeypatch, option):
    masks = option_cases._masks
    monkeypatch.setattr(option_cases, "_masks", lambda case, module, seed, like: masks(case, module, seed + 1, like))
    result = runner.run_case(OptionCase(option, 9, 4, 3, 50), CPU, **MOMENT)
    assert result["status"] == "differs"
    assert "ratio" not in result


def test_an_option_with_a_wrong_loop_is_not_timed(monkeypatch):
    clipped = option_cases.Loop._clipped
    monkeypatch.setattr(option_cases.Loop, "_clipped", lambda self, argument: clipped(self, argument * 1.001))
    result = runner.run_case(OptionCase("reset", 9, 4, 3, 5), CPU, **MOMENT)
    assert result["status"] == "differs"
    assert "loop" in result["reason"]


def test_the_command_about_options(capsys):
    assert option_cases.main(["--list", "--device=cpu"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(set(names)) == len(option_cases.cases("cpu"))
    finished = run_script("-m", "benchmarks.options", "--device=cpu", "--quick", "--filter=RNN sigmoid T=256")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "target " in finished.stdout
    assert "variable lengths" not in finished.stdout


def slightly_wrong(forward):
    def wrong(self, input, hx=None):
        output, h_n = forward(self, input, hx)
        return output * (1 + 1e-4), h_n

    return wrong


def nan(forward):
    def wrong(self, input, hx=None):
        output, h_n = forward(self, input, hx)
        return output, h_n * math.nan

    return wrong


@pytest.mark.parametrize("break_", [slightly_wrong, nan])
@pytest.mark.parametrize("case", [TRAINING, INFERENCE], ids=lambda case: case.mode)
def test_no_speed_up_is_reported_where_results_differ(monkeypatch, conform, case, break_):
    monkeypatch.setattr(rk.RNN, "forward", break_(rk.RNN.forward))
    result = runner.run_case(case, CPU, **MOMENT)
    assert result["status"] == "differs"
    assert "rnnkernels" in result["reason"]
    assert not {"ratio", "milliseconds"} & result.keys()
    assert "differs" in runner.row(result)
    conform(document(cases=[result], targets=runner.verdicts([result])))


def test_no_speed_up_is_reported_where_gradients_differ(monkeypatch):
    backward = eager.backward
    monkeypatch.setattr(eager, "backward", lambda *arguments: [g * (1 + 1e-4) for g in backward(*arguments)])
    assert runner.run_case(TRAINING, CPU, **MOMENT)["status"] == "differs"
    assert runner.run_case(INFERENCE, CPU, **MOMENT)["status"] == "measured"


def test_packed_lengths():
    for case in (Case(64, 5, 3, 4, packed=True), Case(3, 7, 3, 4, packed=True), Case(9, 1, 3, 4, packed=True)):
        lengths = torch.nn.utils.rnn.pad_packed_sequence(runner._input(case, CPU))[1]
        assert sorted(runner._lengths(case).tolist()) == sorted(lengths.tolist())
        assert (int(lengths.min()) >= 1, int(lengths.max())) == (True, case.sequence_length)
        assert len(set(lengths.tolist())) == min(case.sequence_length, case.batch)


def test_a_case_that_raises_does_not_lose_the_others(conform):
    result = runner.run_case(dataclasses.replace(TRAINING, module="Transformer"), CPU, **MOMENT)
    assert result["status"] == "failed"
    assert "AttributeError" in result["reason"] or "TypeError" in result["reason"]
    conform(document(cases=[result], targets=runner.verdicts([result])))


def test_precision_is_the_same_for_both_sides_and_restored(monkeypatch):
    def switches():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = switches()
    with runner.precision("highest"):
        assert switches() == ("highest", False)
        with runner.precision("high"):
            assert switches() == ("high", True)
        assert switches() == ("highest", False)
    assert switches() == before


# ---------------------------------------------------------------- measurement


def test_calls_take_turns_in_changing_order():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = runner.interleave(functions, lambda function: function() or len(calls), seconds=0.0, rounds=(3, 100))
    warm_up = "ab" * runner.WARM_UPS
    assert "".join(calls) == warm_up + "ab" + "ba" + "ab"
    assert times == {"a": [5, 8, 9], "b": [6, 7, 10]}
    assert gc.isenabled()
    times = runner.interleave(functions, lambda function: 1.0, seconds=math.inf, rounds=(3, 7))
    assert [len(values) for values in times.values()] == [7, 7]


def test_statistics():
    found = runner.summarize([float(value) for value in (6, 1, 11, 2, 10, 3, 9, 4, 8, 5, 7)])
    assert found == {"median": 6, "percentile_20": 3, "percentile_80": 9, "minimum": 1, "rounds": 11}
    assert runner.summarize([2.0])["percentile_80"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpus_clock_waits_for_the_work():
    measure = runner.clock(torch.device("cuda"))
    short, long = (measure(lambda cycles=cycles: torch.cuda._sleep(cycles)) for cycles in (1_000_000, 50_000_000))
    assert long > 5 * short > 0


# ---------------------------------------------------------------- verdicts and the command line


def measured(case, ratio):
    return {"name": case.name, **dataclasses.asdict(case), "status": "measured", "reason": None, "ratio": ratio}


def verdicts(results):
    """The verdicts by what they are about: a module, variable lengths, or the lowest ratio."""
    words = ("RNN", "GRU", "LSTM", "variable", "never")
    found = {next(w for w in words if v["target"].startswith(w)): v for v in runner.verdicts(results)}
    assert found.keys() == set(words)
    return found


def test_verdicts():
    training = [Case(*shape) for shape in SHAPES]
    results = [measured(case, ratio) for case, ratio in zip(training, (1.0, 2.0, 4.0, 1.0, 2.0), strict=True)]
    found = verdicts(results)
    mean, lowest = found["RNN"], found["never"]
    assert mean["value"] == pytest.approx(16 ** (1 / 5))
    assert (mean["met"], lowest["met"], lowest["value"]) == (True, True, 1.0)
    assert {found[name]["met"] for name in ("GRU", "LSTM", "variable")} == {None}
    others = [measured(dataclasses.replace(training[0], mode="forward"), 0.94)]
    others += [measured(dataclasses.replace(training[0], packed=True), 9.0)]
    assert verdicts(results + others)["RNN"] == mean
    assert verdicts(results + others)["never"]["met"] is False
    assert verdicts([measured(case, 1.4) for case in training])["RNN"]["met"] is False
    assert [verdicts(results[:4])[name]["met"] for name in ("RNN", "never")] == [None, True]
    assert {verdict["met"] for verdict in runner.verdicts([])} == {None}


@pytest.mark.parametrize(("module", "bound"), [("RNN", 1.5), ("GRU", 2.0), ("LSTM", 1.0)])
def test_the_bound_of_each_module(module, bound):
    for ratio, met in ((bound, True), (bound - 0.01, False)):
        found = verdicts([measured(Case(*shape, module=module), ratio) for shape in SHAPES])
        assert {name: verdict["met"] for name, verdict in found.items() if name != "never"} == {
            **dict.fromkeys(("RNN", "GRU", "LSTM", "variable")),
            module: met,
        }


def test_the_bound_of_variable_lengths():
    of_all = [Case(*shape, module=module, padded=True) for module in MODULES for shape in SHAPES]
    assert verdicts([measured(case, 1.5) for case in of_all])["variable"]["met"] is True
    assert verdicts([measured(case, 1.49) for case in of_all])["variable"]["met"] is False
    assert verdicts([measured(case, 1.5) for case in of_all[1:]])["variable"]["met"] is None
    assert set(of_all) <= set(cases("cpu"))


@pytest.mark.parametrize(
    ("statuses", "met", "check", "code"),
    [
        (("measured", "skipped"), False, False, 0),
        (("measured",), False, True, 1),
        (("measured",), True, True, 0),
        (("measured",), None, True, 0),
        (("measured", "differs"), True, False, 1),
        (("failed",), True, False, 1),
    ],
)
def test_exit_code(statuses, met, check, code):
    found = {"cases": [{"status": status} for status in statuses], "targets": [{"met": met}]}
    assert table.exit_code(found, check) == code


def test_the_command_prints_a_table_and_writes_a_file(tmp_path, conform):
    path = tmp_path / "folder" / "results.json"
    pattern = "RNN T=512 .*forward float32$"
    finished = run_script("-m", "benchmarks", "--device=cpu", "--quick", "--filter", pattern, "--json", str(path))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    result = json.loads(path.read_text())
    conform(result)
    assert [case["name"] for case in result["cases"]] == ["RNN T=512 B=1 I=64 H=256 forward float32"]
    assert result["cases"][0]["name"] in finished.stdout
    assert f"lowest ratio: {result['cases'][0]['ratio']:.2f}" in finished.stdout
    assert result["machine"]["threads"] == 1
    assert os.listdir(path.parent) == ["results.json"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--filter", "("], "--filter: expected a regular expression"),
        (["--filter", "no such case"], "--filter: no case's name has 'no such case' in it"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--device", "tpu"], "--device"),
        pytest.param(
            ["--device", "cuda"],
            "there is no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments(capsys, arguments, says):
    with pytest.raises(SystemExit) as exit:
        table.main(arguments)
    assert exit.value.code == 2
    assert says in capsys.readouterr().err


def test_a_spent_budget_lists_what_was_left_out(capsys, conform, tmp_path):
    found, path = document(), tmp_path / "results.json"
    table.run([TRAINING, INFERENCE], CPU, found, path, deadline=-math.inf, **MOMENT)
    assert [case["status"] for case in found["cases"]] == ["skipped", "skipped"]
    assert json.loads(path.read_text()) == found
    conform(found)


# ---------------------------------------------------------------- result files


def test_a_file_says_where_it_comes_from(conform):
    found = document(targets=[])
    conform(found)
    assert found["software"]["torch"] == torch.__version__
    if shutil.which("git") and (ROOT / ".git").exists():
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        assert found["commit"] == commit
        assert isinstance(found["dirty"], bool)
    assert str(ROOT) not in json.dumps(found)


def test_sources_without_git_take_the_commit_that_is_given(monkeypatch, conform):
    monkeypatch.setattr(records, "_git", lambda *arguments: None)
    found = records.header("benchmarks", ["x"], CPU, commit="abc")
    assert (found["commit"], found["dirty"]) == ("abc", None)
    conform({**found, "cases": [], "targets": []})


def test_files_never_replace_one_another(tmp_path):
    paths = []
    for _ in range(3):
        paths.append(records.new_file(tmp_path, CPU))
        records.write(paths[-1], {})
    assert [path.name.partition("-cpu")[2] for path in paths] == [".json", "-2.json", "-3.json"]


def test_a_case_is_a_line(tmp_path):
    found = {"a": {"cases": [{"x": [1, None], "y": {"z": "\n"}}, {"x": 2}], "empty": []}, "b": 1.5, "c": {}}
    path = tmp_path / "file.json"
    records.write(path, found)
    assert json.loads(path.read_text()) == found
    assert '   {"x": 2}\n' in path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.write(path, {"cases": [{"x": math.nan}]})
    assert json.loads(path.read_text()) == found


def test_equal_sources_have_one_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    (tmp_path / "rnnkernels").mkdir()
    source = tmp_path / "rnnkernels" / "a.py"
    source.write_text("1\n")
    first = records.fingerprint()
    source.write_text("2\n")
    second = records.fingerprint()
    source.write_text("1\n")
    assert first == records.fingerprint() != second
    source.rename(source.with_name("b.py"))
    assert records.fingerprint() != first


def test_the_schema_refuses_a_ratio_that_was_not_measured(conform):
    result = runner.run_case(INFERENCE, CPU, **MOMENT)
    conform(document(cases=[result], targets=[]))
    for wrong in ({**result, "status": "differs"}, {k: v for k, v in result.items() if k != "ratio"}):
        with pytest.raises(AssertionError, match=r"^\$"):
            conform(document(cases=[wrong], targets=[]))


def test_recorded_results_conform(conform):
    for path in (ROOT / "benchmarks" / "results").glob("**/*.json"):
        conform(json.loads(path.read_text()))


def test_the_readme_explains_every_field():
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    schema = json.loads((ROOT / "benchmarks" / "schema.json").read_text())
    machine = schema["properties"]["machine"]["properties"]
    names = [*schema["properties"], *schema["properties"]["software"]["properties"], *machine]
    names += machine["gpu"]["oneOf"][1]["properties"]
    for kind in ("times", "target"):
        names += schema["$defs"][kind]["properties"]
    declared = {field.name for field in (*dataclasses.fields(Case), *dataclasses.fields(OptionCase))}
    names += set(schema["$defs"]["option"]["properties"]) - declared
    names += set(schema["$defs"]["benchmark"]["properties"]) - declared
    parts = schema["oneOf"][1]["properties"]["parts"]["properties"]
    names += [*parts, *(name for part in parts.values() for name in part["properties"])]
    for kind in ("check", "row", "design"):
        names += set(schema["$defs"][kind]["properties"]) - declared
    names += schema["$defs"]["row"]["properties"]["candidates"]["items"]["properties"]
    missing = [name for name in names if f"`{name}`" not in readme]
    assert not missing
