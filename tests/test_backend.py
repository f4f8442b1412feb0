"""The choice of an implementation, and what importing the package costs."""

import os
import subprocess
import sys

import pytest
import torch
from parity import arguments

import rnnkernels as rk
from rnnkernels import _backend


def run(code, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_the_device_and_the_type_decide():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert _backend.resolve(cpu, torch.float32) == "eager"
    expected = "triton" if _backend.has_triton() else "eager"
    assert [_backend.resolve(cuda, dtype) for dtype in _backend.TRITON_DTYPES] == [expected] * 3
    assert _backend.resolve(cuda, torch.float64) == "eager"
    assert _backend.resolve(torch.device("mps"), torch.float32) == "eager"


def test_use_backend_nests_and_restores_after_an_error():
    cuda = torch.device("cuda")
    before = _backend.resolve(cuda, torch.float32)
    with rk.use_backend("eager"):
        assert _backend.resolve(cuda, torch.float32) == "eager"
        with rk.use_backend("auto"):
            assert _backend.resolve(cuda, torch.float32) == before
        assert _backend.resolve(cuda, torch.float32) == "eager"
    with pytest.raises(ZeroDivisionError), rk.use_backend("eager"):
        raise ZeroDivisionError
    assert _backend.resolve(cuda, torch.float32) == before


@pytest.mark.parametrize("name", ["cuda", "", None, "Triton"])
def test_an_unknown_backend_is_refused(name):
    with (
        pytest.raises(ValueError, match=r"^backend: expected one of 'auto', 'triton', 'eager', got"),
        rk.use_backend(name),
    ):
        pass


def test_asking_for_triton_where_it_cannot_run_is_refused(monkeypatch):
    tensors = arguments(3, 2, 2, 2, torch.float64)
    with rk.use_backend("triton"):
        with pytest.raises(RuntimeError, match=r'"triton" was asked for, but .*got torch\.float64'):
            rk.ops.rnn(*tensors)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(RuntimeError, match=r"the tensors are on cpu.*TRITON_INTERPRET=1"):
            rk.ops.rnn(*(tensor.float() for tensor in tensors))
        monkeypatch.setattr(_backend, "has_triton", lambda: False)
        with pytest.raises(RuntimeError, match="triton is not installed"):
            rk.ops.rnn(*(tensor.float() for tensor in tensors))


def test_backward_uses_what_forward_used(kernel_device, monkeypatch):
    from rnnkernels.kernels.eager import rnn as eager

    tensors = arguments(3, 2, 2, 2, torch.float32, kernel_device)
    with rk.use_backend("triton"):
        output, _ = rk.ops.rnn(*tensors)
    monkeypatch.delattr(eager, "backward")
    torch.autograd.grad(output, tensors, torch.randn_like(output))


def test_the_environment_variable():
    code = "import rnnkernels._backend as b, torch; print(b.resolve(torch.device('cuda'), torch.float32))"
    assert run(code, RNNKERNELS_BACKEND="eager").stdout.strip() == "eager"
    refused = run(code, RNNKERNELS_BACKEND="fast")
    assert refused.returncode != 0
    assert "environment variable RNNKERNELS_BACKEND: expected one of" in refused.stderr


def test_import_brings_nothing_but_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import rnnkernels; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    assert run(code).stdout.strip() == "['rnnkernels']"
    code = "import sys, rnnkernels; print([m for m in ('triton', 'matplotlib', 'statsmodels') if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"


def test_lazy_parts_and_unknown_names():
    assert rk.data.__name__ == "rnnkernels.data"
    assert {"RNN", "RNNCell", "data", "diagnostics", "use_backend"} <= set(dir(rk))
    with pytest.raises(AttributeError, match="no attribute 'LSTMM'"):
        rk.LSTMM  # noqa: B018


@pytest.mark.parametrize(("hidden_size", "expected"), [(4096, "triton"), (4097, "eager")])
def test_a_row_too_long_to_normalize_falls_back(monkeypatch, hidden_size, expected):
    pytest.importorskip("triton", reason="Triton is not installed")
    from rnnkernels.ops import _checks, _general

    gain = torch.ones(hidden_size)
    tensors = {"h_0": torch.zeros(1, hidden_size), "norm_hh": gain}
    arguments = _checks.Arguments(tensors, None, None, "triton")
    assert _general._backend_for(arguments) == expected
    assert _general._backend_for(arguments._replace(tensors={**tensors, "norm_hh": None})) == "triton"
    with rk.use_backend("triton"):
        assert _general._backend_for(arguments) == "triton"
