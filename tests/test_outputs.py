"""The output layers against formulas in numpy, finite differences, and everything that a caller can get wrong."""

import copy

import numpy as np
import pytest
import torch

from rnnkernels.nn.outputs import ConditionedOutput, ContextOutput, SkipOutput

INPUT, HIDDEN, CONTEXT, OUTPUT = 3, 5, 4, 2
LEADING = [(7, 2), (2, 7), (2,), ()]  # (T, B), (B, T), one step of a batch, one step alone

NUMPY_ACTIVATIONS = {
    "identity": lambda a: a,
    "tanh": lambda a: (np.exp(a) - np.exp(-a)) / (np.exp(a) + np.exp(-a)),
    "relu": lambda a: np.where(a > 0, a, 0.0),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
}


def build(cls, activation="identity", bias=True, dtype=torch.float64):
    sizes = {
        ConditionedOutput: (HIDDEN, OUTPUT),
        SkipOutput: (INPUT, HIDDEN, OUTPUT),
        ContextOutput: (INPUT, HIDDEN, CONTEXT, OUTPUT),
    }[cls]
    return cls(*sizes, activation=activation, bias=bias, dtype=dtype)


def second_size(cls):
    return OUTPUT if cls is ConditionedOutput else INPUT


def draw(cls, leading, dtype=torch.float64):
    hidden = torch.randn(*leading, HIDDEN, dtype=dtype)
    return hidden, torch.randn(*leading, second_size(cls), dtype=dtype)


def formula(cls, parameters, hidden, second, activation):
    """The equations for one step, vectors as columns, every sum an explicit matrix product in numpy."""
    g = NUMPY_ACTIVATIONS[activation]
    p = {name: value.detach().numpy() for name, value in parameters.items()}
    zero = np.zeros(())
    if cls is ConditionedOutput:
        a = p["hidden_to_output.weight"] @ hidden + second + p.get("hidden_to_output.bias", zero)
    elif cls is SkipOutput:
        a = p["hidden_to_output.weight"] @ hidden + p["input_to_output.weight"] @ second
        a = a + p.get("hidden_to_output.bias", zero)
    else:
        context = np.tanh(p["hidden_to_context.weight"] @ hidden)
        inner = p["context_to_inner.weight"] @ context + p["input_to_inner.weight"] @ second
        inner = np.tanh(inner + p.get("context_to_inner.bias", zero))
        a = p["inner_to_output.weight"] @ inner + p.get("inner_to_output.bias", zero)
    return g(a)


every_class = pytest.mark.parametrize("cls", [ConditionedOutput, SkipOutput, ContextOutput])


@every_class
@pytest.mark.parametrize("activation", list(NUMPY_ACTIVATIONS))
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_equals_the_formula_at_every_step(cls, activation, leading, bias):
    module = build(cls, activation, bias)
    hidden, second = draw(cls, leading)
    actual = module(hidden, second).detach().numpy()
    assert actual.shape == (*leading, OUTPUT)
    parameters = dict(module.named_parameters())
    for index in np.ndindex(*leading):
        expected = formula(cls, parameters, hidden[index].numpy(), second[index].numpy(), activation)
        np.testing.assert_allclose(actual[index], expected, rtol=1e-12, atol=1e-14)


@every_class
def test_gradients_are_those_of_finite_differences(cls):
    module = build(cls, "tanh")
    names = [name for name, _ in module.named_parameters()]
    hidden, second = draw(cls, (3, 2))

    def call(hidden, second, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (hidden, second))

    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(call, (hidden.requires_grad_(), second.requires_grad_(), *values))


@every_class
def test_every_parameter_reaches_the_output(cls):
    module = build(cls)
    module(*draw(cls, (4, 3))).pow(2).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().min() > 0, name


@every_class
def test_an_axis_of_length_one_is_repeated(cls):
    module = build(cls)
    hidden, second = draw(cls, (6, 2))
    expected = module(hidden, second[:1].expand(6, 2, -1))
    torch.testing.assert_close(module(hidden, second[:1]), expected, rtol=1e-13, atol=1e-13)


@every_class
def test_parameters_start_within_the_bounds_of_linear(cls):
    module = build(cls)
    for linear in module.children():
        bound = linear.in_features**-0.5
        for parameter in linear.parameters():
            assert parameter.abs().max() <= bound
    torch.manual_seed(3)
    first = build(cls).state_dict()
    torch.manual_seed(3)
    for name, value in build(cls).state_dict().items():
        assert torch.equal(value, first[name]), name


@every_class
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_state_dict_goes_around(cls, bias):
    module, other = build(cls, bias=bias), build(cls, bias=bias)
    names = {
        ConditionedOutput: ["hidden_to_output.weight", "hidden_to_output.bias"],
        SkipOutput: ["hidden_to_output.weight", "hidden_to_output.bias", "input_to_output.weight"],
        ContextOutput: [
            "hidden_to_context.weight",
            "context_to_inner.weight",
            "context_to_inner.bias",
            "input_to_inner.weight",
            "inner_to_output.weight",
            "inner_to_output.bias",
        ],
    }[cls]
    assert list(module.state_dict()) == [name for name in names if bias or not name.endswith("bias")]
    arguments = draw(cls, (4, 3))
    assert not torch.equal(module(*arguments), other(*arguments))
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    assert torch.equal(module(*arguments), other(*arguments))


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_stay_close_to_double(cls, dtype):
    module = build(cls, "tanh")
    hidden, second = draw(cls, (5, 3))
    expected = module(hidden, second)
    actual = copy.deepcopy(module).to(dtype)(hidden.to(dtype), second.to(dtype))
    assert actual.dtype == dtype
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


def test_the_context_layer_acts_on_the_output():
    # The form without this connection is the published slip that ContextOutput repairs.
    module = build(ContextOutput)
    arguments = draw(ContextOutput, (4, 3))
    before = module(*arguments)
    with torch.no_grad():
        module.hidden_to_context.weight.add_(0.5)
    assert (module(*arguments) - before).abs().min() > 0


def test_nan_and_infinity_pass_through():
    module = build(SkipOutput)
    hidden, second = draw(SkipOutput, (3, 2))
    hidden[1, 0, 0] = float("nan")
    second[2, 1, 0] = float("inf")
    output = module(hidden, second)
    assert output[1, 0].isnan().all()
    assert output[2, 1].isinf().all()
    assert output[0].isfinite().all()
    assert output[1, 1].isfinite().all()


def test_repr_tells_the_sizes_and_the_activation():
    assert "5, 2, activation='tanh'" in repr(build(ConditionedOutput, "tanh"))
    assert "3, 5, 2, activation='identity'" in repr(build(SkipOutput))
    assert "3, 5, 4, 2, activation='relu'" in repr(build(ContextOutput, "relu"))


@every_class
@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (0, ValueError, "hidden_size must be at least 1, got 0"),
        (2.0, TypeError, "hidden_size must be an int, got float"),
    ],
)
def test_a_wrong_size_is_named(cls, size, error, message):
    sizes = {"hidden_size": size, "output_size": 2}
    if cls is not ConditionedOutput:
        sizes["input_size"] = 3
    if cls is ContextOutput:
        sizes["context_size"] = 4
    with pytest.raises(error, match=message):
        cls(**sizes)


@every_class
def test_an_unknown_activation_is_named(cls):
    with pytest.raises(ValueError, match=r"activation must be one of .*'tanh'.*, got 'softmax'"):
        build(cls, "softmax")


@every_class
def test_wrong_arguments_are_named(cls):
    module = build(cls)
    hidden, second = draw(cls, (7, 2))
    name, size = ("condition", OUTPUT) if cls is ConditionedOutput else ("input", INPUT)
    with pytest.raises(TypeError, match=r"hidden must be a torch\.Tensor, got ndarray"):
        module(hidden.numpy(), second)
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
        module(hidden, second.tolist())
    with pytest.raises(TypeError, match=f"{name} must have a floating-point dtype, got torch.int64"):
        module(hidden, second.long())
    with pytest.raises(ValueError, match=r"hidden must have shape \(\.\.\., 5\), got \(7, 2, 4\)"):
        module(hidden[..., :4], second)
    with pytest.raises(ValueError, match=rf"{name} must have shape \(\.\.\., {size}\), got \(7, 2, 9\)"):
        module(hidden, torch.zeros(7, 2, 9))
    with pytest.raises(ValueError, match=rf"{name} must have the leading axes \(7, 2\) of hidden"):
        module(hidden, second[:3])
    # (B, features) would broadcast over the steps of (B, T, hidden_size) as soon as B = T.
    with pytest.raises(ValueError, match=rf"{name} must have the leading axes \(2, 2\) of hidden"):
        module(hidden[:2], second[0])
    with pytest.raises(ValueError, match=rf"{name} must have shape \(\.\.\., {size}\), got \(\)"):
        module(hidden, torch.tensor(1.0))
