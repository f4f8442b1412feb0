"""What transforms functions: ``torch.func``, forward-mode differentiation, ``torch.compile`` and ``torch.export``."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import rnnkernels as rk

# PyTorch's own, when it first loads its rules of forward mode
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")

KINDS = ("RNN", "GRU", "LSTM")
EVERYTHING = {
    "RNN": {"zoneout": 0.2, "recurrent_dropout": 0.2, "layer_norm": True, "grad_clip": 100.0},
    "GRU": {"zoneout": 0.2, "recurrent_dropout": 0.2, "layer_norm": True, "grad_clip": 100.0, "reset_after": False},
    "LSTM": {
        "zoneout": 0.2,
        "zoneout_cell": 0.1,
        "recurrent_dropout": 0.2,
        "layer_norm": True,
        "grad_clip": 100.0,
        "peephole": True,
        "proj_size": 3,
    },
}
VARIANTS = ("plain", "lengths", "options", "everything")
T, B, INPUT, HIDDEN = 5, 2, 3, 4

kinds = pytest.mark.parametrize("kind", KINDS)
cases = pytest.mark.parametrize("variant", VARIANTS)
# In float32, the LSTM is on oneDNN where it has no options.
typed_cases = pytest.mark.parametrize(
    ("variant", "dtype"),
    [(variant, torch.float64) for variant in VARIANTS] + [("plain", torch.float32), ("lengths", torch.float32)],
)


def case(kind, variant, dtype=torch.float64, num_layers=2, **given):
    """A module, out of training so that it draws nothing, and the keywords of its calls."""
    options = EVERYTHING[kind] if variant in ("options", "everything") else {}
    module = getattr(rk, kind)(INPUT, HIDDEN, num_layers, bidirectional=True, dtype=dtype, **options, **given).eval()
    keywords = {}
    if variant in ("lengths", "everything"):
        keywords["lengths"] = torch.tensor([3, 5])
    if variant == "everything":
        keywords["reset"] = torch.tensor([[False, True, False, False, False], [True, False, False, True, False]]).t()
    return module, keywords


def assert_close(actual, expected):
    """Close in each element; in float32, relative to the largest one."""
    rounded = expected.dtype == torch.float32
    bounds = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, float(expected.detach().abs().max()))} if rounded else {}
    torch.testing.assert_close(actual, expected, **bounds)


def tensors_of(result):
    """The output and all final states."""
    output, final = result
    return (output, final) if isinstance(final, torch.Tensor) else (output, *final)


def loss_of(module, keywords):
    def loss(parameters, input):
        return sum(t.square().sum() for t in tensors_of(functional_call(module, parameters, (input,), keywords)))

    return loss


@kinds
@typed_cases
def test_grad_is_autograds(variant, dtype, kind):
    module, keywords = case(kind, variant, dtype)
    parameters, input = dict(module.named_parameters()), torch.randn(T, B, INPUT, dtype=dtype)
    loss = loss_of(module, keywords)
    gradients = grad(loss)(parameters, input)
    loss(parameters, input).backward()
    for name, parameter in parameters.items():
        assert_close(gradients[name], parameter.grad)


@kinds
@typed_cases
def test_vmap_is_a_loop(variant, dtype, kind):
    module, keywords = case(kind, variant, dtype)
    inputs = torch.randn(3, T, B, INPUT, dtype=dtype)
    together = vmap(lambda input: tensors_of(module(input, **keywords)))(inputs)
    apart = [tensors_of(module(input, **keywords)) for input in inputs]
    for all_of_them, *each in zip(together, *apart, strict=True):
        assert_close(all_of_them, torch.stack(each))


@kinds
@cases
def test_gradients_of_each_sample(variant, kind):
    module, keywords = case(kind, variant)
    parameters, inputs = dict(module.named_parameters()), torch.randn(3, T, B, INPUT).double()
    loss = loss_of(module, keywords)
    together = vmap(grad(loss), in_dims=(None, 0))(parameters, inputs)
    for i, input in enumerate(inputs):
        alone = torch.autograd.grad(loss(parameters, input), tuple(parameters.values()))
        for name, gradient in zip(parameters, alone, strict=True):
            torch.testing.assert_close(together[name][i], gradient)


@kinds
@typed_cases
def test_an_ensemble_of_modules_is_a_loop(variant, dtype, kind):
    modules = [case(kind, variant, dtype)[0] for _ in range(3)]
    _, keywords = case(kind, variant, dtype)
    parameters, buffers = stack_module_state(modules)
    skeleton = copy.deepcopy(modules[0]).to("meta")
    input = torch.randn(T, B, INPUT, dtype=dtype)

    def call(parameters, buffers, input):
        return tensors_of(functional_call(skeleton, (parameters, buffers), (input,), keywords))

    together = vmap(call, in_dims=(0, 0, None))(parameters, buffers, input)
    apart = [tensors_of(module(input, **keywords)) for module in modules]
    for all_of_them, *each in zip(together, *apart, strict=True):
        assert_close(all_of_them, torch.stack(each))


@kinds
@typed_cases
def test_forward_mode_is_reverse_mode(variant, dtype, kind):
    module, keywords = case(kind, variant, dtype)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    input = torch.randn(T, B, INPUT, dtype=dtype)

    def call(parameters, input):
        return functional_call(module, parameters, (input,), keywords)[0]

    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}, torch.randn_like(input)
    output, tangent = jvp(call, (parameters, input), tangents)
    assert_close(output, call(parameters, input))
    # <J v, w> = <v, J^T w>
    cotangent = torch.randn_like(output)
    pulled_parameters, pulled_input = vjp(call, parameters, input)[1](cotangent)
    pairs = [(tangents[0][name], pulled_parameters[name]) for name in parameters] + [(tangents[1], pulled_input)]
    expected = sum((v * w).sum() for v, w in pairs)
    assert_close((tangent * cotangent).sum(), expected)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(p, tangents[0][name]) for name, p in parameters.items()}
        result = call(dual, forward_ad.make_dual(input, tangents[1]))
        assert_close(forward_ad.unpack_dual(result).tangent, tangent)
    if dtype == torch.float64:
        step = 1e-6
        sides = []
        for sign in (1, -1):
            moved = {name: p + sign * step * tangents[0][name] for name, p in parameters.items()}
            sides.append(call(moved, input + sign * step * tangents[1]))
        torch.testing.assert_close((sides[0] - sides[1]) / (2 * step), tangent, rtol=1e-6, atol=1e-7)


@kinds
@cases
def test_jacobians(variant, kind):
    module, keywords = case(kind, variant, num_layers=1)
    input = torch.randn(T, B, INPUT).double()

    def call(input):
        return module(input, **keywords)[0]

    expected = torch.autograd.functional.jacobian(call, input)
    torch.testing.assert_close(jacrev(call)(input), expected)
    torch.testing.assert_close(jacfwd(call)(input), expected)


@kinds
@cases
def test_hessian_vector_products(variant, kind):
    module, keywords = case(kind, variant, num_layers=1)
    input = torch.randn(T, B, INPUT).double()
    parameters = dict(module.named_parameters())
    direction = torch.randn_like(input)

    def loss(input):
        return loss_of(module, keywords)(parameters, input)

    forward_over_reverse = jvp(grad(loss), (input,), (direction,))[1]
    reverse_over_reverse = grad(lambda x: (grad(loss)(x) * direction).sum())(input)
    leaf = input.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad((first * direction).sum(), leaf)
    torch.testing.assert_close(forward_over_reverse, expected)
    torch.testing.assert_close(reverse_over_reverse, expected)


@kinds
def test_a_hessian(kind):
    module = getattr(rk, kind)(1, 2, dtype=torch.float64)
    input = torch.randn(2, 1, 1).double()

    def loss(input):
        return module(input)[0].square().sum()

    torch.testing.assert_close(hessian(loss)(input), torch.autograd.functional.hessian(loss, input))


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_masks_under_transforms_are_those_without(kind, dropout):
    options = {"zoneout": 0.3, "recurrent_dropout": 0.3, "weight_dropout": 0.3}
    module = getattr(rk, kind)(INPUT, HIDDEN, 2, dropout=dropout, dtype=torch.float64, **options)
    input = torch.randn(T, B, INPUT).double()
    torch.manual_seed(1)
    expected = module(input)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(jvp(lambda x: module(x)[0], (input,), (input,))[0], expected)
    parameters = dict(module.named_parameters())
    torch.manual_seed(1)
    gradients = grad(loss_of(module, {}))(parameters, input)
    torch.manual_seed(1)
    loss_of(module, {})(parameters, input).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)
    torch.manual_seed(1)
    batched = vmap(lambda x: module(x)[0], randomness="same")(torch.stack([input, input]))
    torch.testing.assert_close(batched, torch.stack([expected, expected]))


@kinds
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_cells_under_transforms(counted, given, batched, kind):
    cell = getattr(rk, f"{kind}Cell")(INPUT, HIDDEN, dtype=torch.float64)
    rows = [B] if batched else []
    states = tuple(torch.randn(*rows, HIDDEN).double() for _ in range(1 + (kind == "LSTM"))) if given else ()

    def call(input, *states):
        result = cell(input, None if not states else states if kind == "LSTM" else states[0])
        return result[0] if kind == "LSTM" else result

    inputs = torch.randn(3, *rows, INPUT).double()
    apart = [call(input, *states) for input in inputs]
    torch.testing.assert_close(vmap(call, in_dims=(0, *[None] * len(states)))(inputs, *states), torch.stack(apart))
    expected = torch.autograd.functional.jacobian(lambda x: call(x, *states), inputs[0])
    torch.testing.assert_close(jacrev(call)(inputs[0], *states), expected)
    torch.testing.assert_close(jacfwd(call)(inputs[0], *states), expected)
    torch.testing.assert_close(counted.compile(call)(inputs[0], *states), apart[0])


def test_dropout_under_transforms():
    input = torch.randn(4, 3, dtype=torch.float64)
    expected = rk.ops.dropout(input, 0.4, seed=3)

    def call(x):
        return rk.ops.dropout(x, 0.4, seed=3)

    torch.testing.assert_close(vmap(call)(torch.stack([input, input])), torch.stack([expected, expected]))
    torch.testing.assert_close(jvp(call, (input,), (input,)), (expected, expected))
    torch.testing.assert_close(grad(lambda x: call(x).sum())(input), torch.where(expected == 0, 0, 1 / 0.6).double())


class Counted:
    """A compiler that counts what it is given to compile."""

    def __init__(self):
        from torch._dynamo.testing import CompileCounterWithBackend

        torch._dynamo.reset()
        self.counter = CompileCounterWithBackend("aot_eager")

    def compile(self, function):
        return torch.compile(function, fullgraph=True, backend=self.counter)

    @property
    def graphs(self):
        return self.counter.frame_count


@pytest.fixture
def counted():
    yield Counted()
    torch._dynamo.reset()


def results_and_gradients(function, module, input, keywords, cotangents=None):
    leaf = input.detach().requires_grad_()
    torch.manual_seed(11)
    results = tensors_of(function(leaf, **keywords))
    torch.manual_seed(12)
    cotangents = [torch.randn_like(result) for result in results]
    return [*results, *torch.autograd.grad(results, (leaf, *module.parameters()), cotangents)]


@kinds
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("variant", "dtype"), [("everything", torch.float64), ("lengths", torch.float32)])
def test_compiles_without_graph_breaks(counted, variant, dtype, training, kind):
    module, keywords = case(kind, variant, dtype, batch_first=True, dropout=0.3)
    module.train(training)
    if "reset" in keywords:
        keywords["reset"] = keywords["reset"].t()
    compiled = counted.compile(module)
    input = torch.randn(B, T, INPUT, dtype=dtype)
    actual, expected = (results_and_gradients(f, module, input, keywords) for f in (compiled, module))
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


@kinds
@pytest.mark.parametrize(("variant", "dtype"), [("everything", torch.float64), ("plain", torch.float32)])
def test_new_lengths_and_batches_do_not_compile_again(counted, variant, dtype, kind):
    module, _ = case(kind, variant, dtype)
    compiled = counted.compile(module)
    for number, (steps, batch) in enumerate([(5, 2), (6, 3), (7, 4), (9, 3), (4, 8)]):
        input = torch.randn(steps, batch, INPUT, dtype=dtype)
        keywords = {}
        if variant in ("lengths", "everything"):
            keywords["lengths"] = torch.randint(1, steps + 1, (batch,))
        if variant == "everything":
            keywords["reset"] = torch.rand(steps, batch) < 0.2
        actual, expected = (results_and_gradients(f, module, input, keywords) for f in (compiled, module))
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b)
        if number == 1:
            graphs = counted.graphs
    assert counted.graphs == graphs <= 2


@pytest.mark.parametrize("operator", ["rnn", "gru", "lstm"])
def test_a_compiled_operator_with_a_given_seed(counted, operator):
    from parity import arguments

    tensors = arguments(T, B, INPUT, HIDDEN, torch.float64, operator=operator)
    function = getattr(rk.ops, operator)
    options = {"zoneout": 0.3, "recurrent_dropout": 0.3}
    compiled = counted.compile(lambda seed: function(*tensors, seed=seed, **options))
    for seed in (1, 2, 3):
        torch.testing.assert_close(compiled(torch.tensor(seed)), function(*tensors, seed=seed, **options))
    assert counted.graphs == 1


class Positional(torch.nn.Module):
    """Calls a module with what it takes by keyword."""

    def __init__(self, module, names):
        super().__init__()
        self.module, self.names = module, names

    def forward(self, input, options):
        return tensors_of(self.module(input, **dict(zip(self.names, options, strict=True))))


@kinds
@pytest.mark.parametrize(
    ("variant", "dtype"), [("plain", torch.float32), ("lengths", torch.float32), ("everything", torch.float64)]
)
def test_export_with_any_number_of_steps_and_sequences(variant, dtype, kind):
    module, keywords = case(kind, variant, dtype)
    wrapped = Positional(module, tuple(keywords))
    arguments = torch.randn(T, B, INPUT, dtype=dtype), tuple(keywords.values())
    steps, batch = torch.export.Dim("steps", min=2, max=1000), torch.export.Dim("batch", min=2, max=1000)
    dynamic = {"lengths": {0: batch}, "reset": {0: steps, 1: batch}}
    shapes = {"input": {0: steps, 1: batch}, "options": tuple(dynamic[name] for name in keywords)}
    fixed = torch.export.export(wrapped, arguments)
    program = torch.export.export(wrapped, arguments, dynamic_shapes=shapes)
    larger = {"lengths": torch.tensor([7, 1, 4]), "reset": torch.rand(7, 3) < 0.3}
    others = torch.randn(7, 3, INPUT, dtype=dtype), tuple(larger[name] for name in keywords)
    for exported, given in ((fixed, arguments), (program, arguments), (program, others)):
        for a, b in zip(exported.module()(*given), wrapped(*given), strict=True):
            assert_close(a, b)


@kinds
def test_checkpointing_a_compiled_or_plain_module(kind):
    module = getattr(rk, kind)(INPUT, HIDDEN, dropout=0.0, zoneout=0.3)
    input = torch.randn(T, B, INPUT, requires_grad=True)
    torch.manual_seed(5)
    (expected,) = torch.autograd.grad(module(input)[0].square().sum(), input)
    torch.manual_seed(5)
    output = torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], input, use_reentrant=False)
    (actual,) = torch.autograd.grad(output.square().sum(), input)
    assert torch.equal(actual, expected)
