"""``python -m rnnkernels``: what it reports, and that its self-check sees what is wrong."""

import inspect
import math
import os
import subprocess
import sys
import types

import pytest
import torch

import rnnkernels as rk
from rnnkernels import __main__ as report
from rnnkernels import _backend
from rnnkernels.kernels.eager import general, random
from rnnkernels.kernels.eager import rnn as eager

OPERATORS = ("rnn", "gru", "lstm", "dropout")


def run(**environment):
    unset = dict.fromkeys(("TRITON_INTERPRET", "RNNKERNELS_BACKEND"))
    env = {name: value for name, value in {**os.environ, **unset, **environment}.items() if value is not None}
    return subprocess.run([sys.executable, "-m", "rnnkernels"], env=env, capture_output=True, text=True, timeout=300)


def checks(output):
    """The lines of the self-check, as words."""
    lines = output.partition("Self-check")[2].splitlines()[1:]
    return [line.split() for line in lines if line.startswith("  ")]


def test_the_report_of_this_machine():
    finished = run()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert not finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[0] == f"rnnkernels {rk.__version__}"
    assert any(line.split()[:2] == ["torch", f"{torch.__version__},"] for line in lines)
    assert "  rnn  cpu  float32, bfloat16, float16: eager" in lines
    on_cpu = [words for words in checks(finished.stdout) if words[1] == "cpu"]
    dtypes = ("float64", "float32", "bfloat16", "float16")
    assert [(words[0], *words[2:5]) for words in on_cpu] == [
        (operator, dtype, "eager", "ok") for operator in OPERATORS for dtype in dtypes
    ]


@pytest.mark.interpreter
def test_the_interpreter_checks_the_triton_kernels():
    pytest.importorskip("triton")
    finished = run(TRITON_INTERPRET="1")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for operator in OPERATORS:
        assert [operator, "cpu", "float32", "triton", "ok"] in [words[:5] for words in checks(finished.stdout)]


def test_a_backend_that_cannot_run_is_an_error():
    finished = run(RNNKERNELS_BACKEND="triton")
    if torch.cuda.is_available():
        assert finished.returncode == 0
    else:
        assert finished.returncode == 1
        assert "nothing: no operator has an implementation here" in finished.stdout
    assert "rnn  cpu  float64: none" in finished.stdout


def wrong_gradient(*arguments):
    grad_projected, grad_h_0 = backward(*arguments)
    return grad_projected, grad_h_0 * (1 + 1e-4)


def nan_gradient(*arguments):
    grad_projected, grad_h_0 = backward(*arguments)
    return grad_projected, grad_h_0 * math.nan


def no_gradient(*arguments):
    raise RuntimeError("out of order")


backward = eager.backward


@pytest.mark.parametrize(
    ("broken", "says"),
    [(wrong_gradient, "WRONG"), (nan_gradient, "WRONG"), (no_gradient, "RuntimeError: out of order")],
)
def test_the_self_check_sees_a_broken_kernel(monkeypatch, capsys, broken, says):
    monkeypatch.setattr(eager, "backward", broken)
    monkeypatch.setattr(report, "DTYPES", (torch.float32,))
    assert report.main() == 1
    output = capsys.readouterr().out
    assert any(line.startswith("  rnn  cpu  float32") and says in line for line in output.splitlines())
    assert "Failed: " in output


def test_the_self_check_sees_a_broken_option(monkeypatch):
    backward = general.backward

    def wrong(*arguments):
        gradients = backward(*arguments)
        if gradients.products is None:
            return gradients
        return gradients._replace(products=gradients.products * (1 + 1e-4))

    monkeypatch.setattr(general, "backward", wrong)
    monkeypatch.setattr(report, "DTYPES", (torch.float32,))
    broken = [line for right, line in report._self_check() if not right]
    assert [line.split()[0] for line in broken] == ["rnn", "gru", "lstm"]
    assert all("WRONG" in line and "with every option" in line for line in broken)


def test_the_self_check_sees_another_mask(monkeypatch):
    dropout = random.dropout
    monkeypatch.setattr(random, "dropout", lambda input, p, key, shared: dropout(input, p, key + 2, shared))
    monkeypatch.setattr(report, "DTYPES", (torch.float32,))
    assert [line.split()[0] for right, line in report._self_check() if not right] == ["dropout"]


@pytest.mark.parametrize("operator", ["rnn", "gru", "lstm"])
def test_every_option_of_an_operator_is_checked(operator):
    plain = {"input", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "nonlinearity"}
    weights, options = report.options_of(operator, 3, 2, 4)["every option"]
    accepted = set(inspect.signature(getattr(rk.ops, operator)).parameters)
    apart = {"reverse", "lengths", "training", "recompute_gates"}
    assert accepted - plain - apart == (weights.keys() | options.keys()) - plain
    errors = report._recurrence_errors(operator, torch.float64, torch.device("cpu"))
    assert any("gates recomputed" in name for name in errors)


def test_the_self_check_leaves_the_random_state_alone(monkeypatch, capsys):
    monkeypatch.setattr(report, "DTYPES", (torch.float32,))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    report.main()
    assert torch.equal(torch.rand(2), expected)


def test_without_triton(monkeypatch, capsys):
    monkeypatch.setattr(_backend, "has_triton", lambda: False)
    monkeypatch.setattr(report, "version_of", lambda package: None)
    assert report.main() == 0
    output = capsys.readouterr().out
    assert "triton      not installed" in output


def test_a_gpu_is_described_with_the_designs_of_its_kernels(monkeypatch):
    dispatch = pytest.importorskip("rnnkernels.kernels.triton.dispatch", exc_type=ImportError)
    gpu = types.SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=140 * 2**30, multi_processor_count=132
    )
    monkeypatch.setattr(report, "devices", lambda: [torch.device("cpu"), torch.device("cuda", 0)])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(report, "driver_version", lambda: "580.1")
    monkeypatch.setattr(dispatch, "shared_memory", lambda device: 227 * 1024)
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: 132)
    lines = list(report._device_lines())
    assert lines[1] == "cuda:0  NVIDIA H200, capability 9.0, 140 GiB, 132 multiprocessors, driver 580.1"
    designs = {line.split()[2].rstrip(","): line for line in report._designs() if line.startswith("rnn")}
    assert "resident for 16, 32, 64, 128, 256; persistent for 512, 1024" in designs["bfloat16"]
    assert "resident for 16, 32, 64; persistent for 128, 256, 512, 1024" in designs["float32"]
    assert "rnn  cuda:0  float32, bfloat16, float16: triton" in list(report._implementations())


def test_relative_error():
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert report.relative_error(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert math.isnan(report.relative_error(torch.tensor([math.nan, 4.0]), expected))
