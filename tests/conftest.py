"""One set-up for all tests: kernels run on the GPU where there is one, and in Triton's interpreter where not."""

import json
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, so before anything imports them

hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=60, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "project"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def compiled_anew():
    """torch.compile compiles the same code but a few times in a process, and many files compile our modules."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def kernel_device():
    """Where the Triton kernels run in these tests."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels can't be tested here")
    if torch.cuda.is_available():
        return torch.device("cuda")
    import interpreter

    interpreter.repair()
    return torch.device("cpu")


@pytest.fixture
def poisoned(monkeypatch):
    """Fill with NaN what is allocated uninitialized, so that an element that no kernel writes shows."""

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(scope="session")
def conform():
    """A function that holds a result file's content to the schema."""
    jsonschema = pytest.importorskip("jsonschema", reason="comes with nbval")
    schema = json.loads((Path(__file__).resolve().parent.parent / "benchmarks" / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)

    def conform(document):
        error = jsonschema.exceptions.best_match(validator.iter_errors(document))
        assert error is None, f"{error.json_path}: {error.message}"

    return conform
