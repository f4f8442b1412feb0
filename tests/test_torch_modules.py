"""PyTorch's own samples for its recurrent modules, put to ours: the checks of its test_modules.py that apply."""

import copy
import importlib
import io
import itertools
import pickle
import sys
import types
import unittest
import warnings

import pytest
import torch

import rnnkernels as rk

# The witness's own warning
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


def load_module_db():
    """PyTorch's samples. Their file imports expecttest for the base class of tests, which are not used here."""
    absent = importlib.util.find_spec("expecttest") is None
    path, flag = list(sys.path), "__allow_nonbracketed_mutation_flag"
    if absent:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("torch.testing._internal.common_modules").module_db
    except ImportError as error:  # they are not part of PyTorch's public interface
        pytest.skip(f"PyTorch's samples can't be imported: {error}", allow_module_level=True)
    finally:
        # The import locks torch.backends' flags and lengthens the path, which other tests would find so.
        torch.backends.flags_frozen.__globals__[flag] = True
        sys.path[:] = path
        if absent:
            del sys.modules["expecttest"]


NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
INFOS = [info for info in load_module_db() if info.module_cls in {getattr(torch.nn, name) for name in NAMES}]
CASES = [(info, training) for info, training in itertools.product(INFOS, (True, False))]
EVERY = pytest.mark.parametrize(("info", "training"), CASES, ids=lambda value: getattr(value, "name", str(value)))


def tensors_in(value):
    """All tensors in nested arguments or results."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for element in value for tensor in tensors_in(element)]
    return []


def samples(info, training, dtype=torch.float64, requires_grad=False, factory=None):
    """Ours and torch's module of each sample, with the same parameters, and the arguments of the call."""
    for sample in info.module_inputs_func(info, "cpu", dtype, requires_grad, training=training):
        if sample.forward_input is None:
            continue
        args, kwargs = sample.constructor_input.args, {**sample.constructor_input.kwargs, **(factory or {})}
        theirs = info.module_cls(*args, **kwargs).train(training)
        ours = getattr(rk, info.module_cls.__name__)(*args, **kwargs).train(training)
        theirs, ours = (module if factory else module.to(dtype) for module in (theirs, ours))
        ours.load_state_dict(theirs.state_dict())
        yield ours, theirs, sample


def call(module, sample):
    return tensors_in(module(*sample.forward_input.args, **sample.forward_input.kwargs))


def test_the_samples_are_there():
    assert {info.module_cls.__name__ for info in INFOS} == set(NAMES)
    for info, training in CASES:
        assert any(True for _ in samples(info, training))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward(info, training, dtype):
    for ours, theirs, sample in samples(info, training, dtype):
        torch.testing.assert_close(call(ours, sample), call(theirs, sample))
        if sample.reference_fn is not None:
            expected = sample.reference_fn(ours, *sample.forward_input.args, **sample.forward_input.kwargs)
            torch.testing.assert_close(call(ours, sample), tensors_in(expected))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients(info, training, dtype):
    for ours, theirs, sample in samples(info, training, dtype, requires_grad=True):
        given = tensors_in([sample.forward_input.args, *sample.forward_input.kwargs.values()])
        leaves = [tensor for tensor in given if tensor.requires_grad]
        gradients = []
        for module in (ours, theirs):
            results = call(module, sample)
            torch.manual_seed(1)
            cotangents = [torch.randn_like(result) for result in results]
            wanted = (*leaves, *module.parameters())
            gradients.append(torch.autograd.grad(results, wanted, cotangents, allow_unused=True))
        torch.testing.assert_close(*gradients)


@EVERY
def test_first_and_second_gradients_by_finite_differences(info, training):
    for ours, _, sample in itertools.islice(samples(info, training, requires_grad=True), 2):
        parameters = dict(ours.named_parameters())

        def function(*values, ours=ours, sample=sample, parameters=parameters):
            given = dict(zip(parameters, values, strict=True))
            args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
            return tuple(tensors_in(torch.func.functional_call(ours, given, args, kwargs)))

        torch.autograd.gradcheck(function, tuple(parameters.values()), fast_mode=True)
        torch.autograd.gradgradcheck(function, tuple(parameters.values()), fast_mode=True)


@EVERY
def test_factory_arguments_and_the_meta_device(info, training):
    for factory in ({"dtype": torch.float64}, {"device": "meta"}, {"device": "cpu", "dtype": torch.float16}):
        for sample in info.module_inputs_func(info, "cpu", torch.float32, False, training=training):
            args, kwargs = sample.constructor_input.args, {**sample.constructor_input.kwargs, **factory}
            name = info.module_cls.__name__
            ours, theirs = (getattr(owner, name)(*args, **kwargs) for owner in (rk, torch.nn))
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@EVERY
def test_repr_pickle_copy_and_save(info, training):
    for ours, theirs, sample in samples(info, training):
        assert isinstance(str(ours), str)
        assert isinstance(repr(theirs), str)
        saved = io.BytesIO()
        torch.save(ours.state_dict(), saved)
        saved.seek(0)
        fresh = copy.deepcopy(ours)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        fresh.load_state_dict(torch.load(saved, weights_only=True))
        for twin in (fresh, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            for a, b in zip(call(twin, sample), call(ours, sample), strict=True):
                assert torch.equal(a, b)


@EVERY
def test_inputs_that_are_not_contiguous(info, training):
    def scattered(value):
        if isinstance(value, torch.Tensor):
            return value.repeat_interleave(2, -1)[..., ::2] if value.dim() else value
        return type(value)(map(scattered, value)) if isinstance(value, (tuple, list)) else value

    for ours, _, sample in samples(info, training):
        expected = call(ours, sample)
        args = [scattered(arg) for arg in sample.forward_input.args]
        kwargs = {name: scattered(value) for name, value in sample.forward_input.kwargs.items()}
        torch.testing.assert_close(tensors_in(ours(*args, **kwargs)), expected)


@EVERY
def test_training_and_evaluation_modes(info, training):
    for ours, theirs, _ in samples(info, training):
        assert ours.training == theirs.training == training
        assert ours.train().training
        assert not ours.eval().training
        assert str(ours.requires_grad_(False)) == str(ours)
        assert all(not parameter.requires_grad for parameter in ours.parameters())


def construct_and_call(make, inputs):
    module = make(*inputs.constructor_input.args, **inputs.constructor_input.kwargs)
    module(*inputs.forward_input.args, **inputs.forward_input.kwargs)


@EVERY
def test_errors_are_torchs(info, training):
    if info.module_error_inputs_func is None:
        pytest.skip("PyTorch has no samples of errors for this module")
    for failure in info.module_error_inputs_func(info, "cpu", torch.float64, False, training=training):
        inputs = failure.module_error_input
        name = info.module_cls.__name__
        errors = []
        for owner in (torch.nn, rk):
            with pytest.raises(failure.error_type) as caught:
                construct_and_call(getattr(owner, name), inputs)
            errors.append(caught.type)
        assert errors[0] == errors[1]
