"""The recurrent modules beside ``torch.nn``'s, the independent witness."""

import copy
import functools
import io
import math
import pickle
import warnings

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import rnnkernels as rk

KINDS = ("RNN", "GRU")


def pair(*args, kind="RNN", dtype=torch.float64, **kwargs):
    """Ours and torch's module with the same parameters."""
    theirs = getattr(torch.nn, kind)(*args, dtype=dtype, **kwargs)
    ours = getattr(rk, kind)(*args, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def data_of(output):
    return output.data if isinstance(output, PackedSequence) else output


def outcome(module, input, hx, cotangents):
    """Results and all gradients of a module, under these cotangents."""
    leaves = [data_of(input), *([] if hx is None else [hx]), *module.parameters()]
    output, h_n = module(input, hx)
    return [data_of(output), h_n, *torch.autograd.grad((data_of(output), h_n), leaves, cotangents)]


def assert_same(ours, theirs, input, hx=None, rtol=1e-10, atol=1e-12):
    with torch.no_grad():
        output, h_n = theirs(input, hx)
    cotangents = torch.randn_like(data_of(output)), torch.randn_like(h_n)
    pairs = zip(outcome(ours, input, hx, cotangents), outcome(theirs, input, hx, cotangents), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@st.composite
def configurations(draw):
    """Arguments of the module, a batch, and whether there is an initial state."""
    arguments = {
        "kind": draw(st.sampled_from(KINDS)),
        "input_size": draw(st.integers(1, 9)),
        "hidden_size": draw(st.integers(1, 17)),
        "num_layers": draw(st.integers(1, 3)),
        "nonlinearity": draw(st.sampled_from(["tanh", "relu"])),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if arguments["kind"] == "GRU":
        del arguments["nonlinearity"]
    form = draw(st.sampled_from(["batched", "unbatched", "packed", "packed unsorted"]))
    sizes = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    return arguments, form, sizes, draw(st.booleans()), draw(st.integers(0, 2**32))


def case(arguments, form, sizes, has_state):
    """An input of this form and an initial state, both leaves."""
    (sequence_length, batch), features = sizes, arguments["input_size"]
    states = arguments["num_layers"] * (1 + arguments["bidirectional"])
    shape = [states, batch, arguments["hidden_size"]]
    if form == "unbatched":
        input, shape = torch.randn(sequence_length, features), [shape[0], shape[2]]
    else:
        input = torch.randn(
            (batch, sequence_length, features) if arguments["batch_first"] else (sequence_length, batch, features)
        )
    input = input.double()
    if form.startswith("packed"):
        lengths = torch.randint(1, sequence_length + 1, (batch,))
        if form == "packed":
            lengths = lengths.sort(descending=True).values
        input = pack_padded_sequence(input, lengths, arguments["batch_first"], enforce_sorted=form == "packed")
        input = PackedSequence(input.data.requires_grad_(), *input[1:])
    else:
        input.requires_grad_()
    return input, torch.randn(shape, dtype=torch.float64, requires_grad=True) if has_state else None


@hypothesis.settings(max_examples=150)
@hypothesis.given(configuration=configurations())
def test_torch_gives_the_same_in_float64(configuration):
    arguments, form, sizes, has_state, seed = configuration
    torch.manual_seed(seed)
    ours, theirs = pair(**arguments)
    assert_same(ours, theirs, *case(arguments, form, sizes, has_state))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize(("input_size", "hidden_size"), [(1, 129), (17, 3), (129, 17), (64, 64)])
def test_torch_gives_the_same_in_float32(input_size, hidden_size, nonlinearity):
    ours, theirs = pair(input_size, hidden_size, 2, nonlinearity, bidirectional=True, dtype=torch.float32)
    input = torch.randn(33, 5, input_size, requires_grad=True)
    assert_same(ours, theirs, input, torch.randn(4, 5, hidden_size, requires_grad=True), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_packed_from_a_list(kind):
    ours, theirs = pair(3, 4, 2, bidirectional=True, kind=kind)
    packed = pack_sequence([torch.randn(n, 3).double() for n in (2, 5, 1)], enforce_sorted=False)
    packed = PackedSequence(packed.data.requires_grad_(), *packed[1:])
    assert_same(ours, theirs, packed)
    ours_output, theirs_output = ours(packed)[0], theirs(packed)[0]
    for a, b in zip(ours_output, theirs_output, strict=True):
        assert a is b or torch.allclose(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind):
    ours, theirs = pair(3, 4, 2, bidirectional=True, kind=kind)
    for a, b in zip(ours(torch.zeros(5, 0, 3).double()), theirs(torch.zeros(5, 0, 3).double()), strict=True):
        assert a.shape == b.shape


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "identity"])
def test_the_added_activations_are_the_reference_layer_by_layer(nonlinearity):
    module = rk.RNN(3, 4, 2, nonlinearity, bidirectional=True, dtype=torch.float64)
    input, hx = torch.randn(6, 2, 3).double(), torch.randn(4, 2, 4).double()
    output, final = input, []
    for layer in range(2):
        results = [
            rk.reference.rnn(
                output, hx[2 * layer + d], *module.all_weights[2 * layer + d], nonlinearity=nonlinearity, reverse=d == 1
            )
            for d in range(2)
        ]
        output = torch.cat([result[0] for result in results], -1)
        final += [result[1] for result in results]
    torch.testing.assert_close(module(input, hx), (output, torch.stack(final)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_parameters(kind):
    arguments = {"input_size": 5, "hidden_size": 7, "num_layers": 2, "bidirectional": True}
    torch.manual_seed(3)
    theirs = getattr(torch.nn, kind)(**arguments)
    torch.manual_seed(3)
    ours = getattr(rk, kind)(**arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(4)
    theirs, cell = getattr(torch.nn, f"{kind}Cell")(5, 7), None
    torch.manual_seed(4)
    cell = getattr(rk, f"{kind}Cell")(5, 7)
    assert all(torch.equal(a, b) for a, b in zip(cell.parameters(), theirs.parameters(), strict=True))


def test_positional_arguments_are_torchs():
    arguments = (3, 4, 2, "relu", False, True, 0.5, True)
    ours, theirs = rk.RNN(*arguments), torch.nn.RNN(*arguments)
    for name in (
        "input_size",
        "hidden_size",
        "num_layers",
        "nonlinearity",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
    ):
        assert getattr(ours, name) == getattr(theirs, name)
    assert repr(rk.RNN(3, 4, 2)) == repr(torch.nn.RNN(3, 4, 2))
    assert "nonlinearity='sigmoid'" in repr(rk.RNN(3, 4, nonlinearity="sigmoid"))
    assert repr(rk.GRU(3, 4, 2, bidirectional=True)) == repr(torch.nn.GRU(3, 4, 2, bidirectional=True))
    assert repr(rk.RNNCell(3, 4, False, "relu")) == repr(torch.nn.RNNCell(3, 4, False, "relu"))


def test_dropout_follows_torchs_law():
    module = rk.RNN(4, 64, 2, dropout=0.25, nonlinearity="identity", bias=False)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            torch.nn.init.zeros_(weight) if "hh" in name else torch.nn.init.eye_(weight)
    input = torch.ones(400, 8, 4)
    kept = module(input)[0][..., :4]
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    # 12,800 draws: five standard deviations
    assert abs((kept == 0).double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / kept.numel())
    assert torch.equal(module.eval()(input)[0][..., :4], input)
    assert not rk.RNN(3, 4, 2, dropout=1.0, bias=False)(torch.randn(5, 2, 3))[0].any()
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        rk.RNN(3, 4, dropout=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_eval_mode_and_double_backward(kind):
    ours, theirs = pair(3, 4, 2, kind=kind)
    input = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    penalties = []
    for module in (ours.eval(), theirs.eval()):
        (gradient,) = torch.autograd.grad(module(input)[0].square().sum(), input, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), tuple(module.parameters())))
    for a, b in zip(*penalties, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_it_survives_what_modules_go_through(kind):
    ours, _ = pair(3, 4, 2, bidirectional=True, dtype=torch.float32, kind=kind)
    input = torch.randn(5, 2, 3)
    expected = ours(input)[0]
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    ours.share_memory()
    ours.flatten_parameters()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(saved, weights_only=False)):
        assert torch.equal(twin(input)[0], expected)
    parameters = {name: parameter * 0.5 for name, parameter in ours.named_parameters()}
    halved = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(torch.func.functional_call(ours, parameters, input)[0], halved(input)[0])
    assert ours.double()(input.double())[0].dtype == torch.float64
    assert getattr(rk, kind)(3, 4, device="meta")(torch.randn(5, 2, 3, device="meta"))[0].shape == (5, 2, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_parametrized_weights_are_used(kind):
    ours, theirs = pair(3, 4, kind=kind)
    for module in (ours, theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
        with torch.no_grad():
            module.parametrizations.weight_hh_l0.original0.mul_(2)
    input = torch.randn(5, 2, 3).double()
    torch.testing.assert_close(ours(input), theirs(input))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_breaks(kind):
    module = getattr(rk, kind)(3, 4, 2, bidirectional=True, batch_first=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 5, 3)
    torch.testing.assert_close(compiled(input), module(input))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    module = getattr(rk, kind)(3, 4, 2)
    input = torch.randn(5, 2, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = module(input)
        assert module(input.bfloat16(), h_n)[0].dtype == torch.bfloat16
    assert output.dtype == h_n.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert {parameter.grad.dtype for parameter in module.parameters()} == {torch.float32}
    torch.testing.assert_close(output.float(), module(input)[0], atol=3e-2, rtol=0)


GOOD = torch.zeros(5, 2, 3)
BAD_CALLS = {
    "features": ((torch.zeros(5, 2, 4),), r"input: expected 3 features \(input_size\), got 4"),
    "features, unbatched": ((torch.zeros(5, 4),), "input: expected 3 features"),
    "rank 1": ((torch.zeros(5),), r"input: expected 2 or 3 dimensions, got shape \(5,\)"),
    "rank 4": ((torch.zeros(5, 2, 3, 1),), "input: expected 2 or 3 dimensions"),
    "dtype": ((GOOD.double(),), "input: expected dtype torch.float32, as the weights have, got torch.float64"),
    "integers": ((GOOD.long(),), "input: expected dtype torch.float32"),
    "empty": ((torch.zeros(0, 2, 3),), "input: expected at least 1 step, got an empty sequence"),
    "state's rank": ((GOOD, torch.zeros(2, 4)), r"hx: expected a Tensor of 3 dimensions.*got shape \(2, 4\)"),
    "state's rank, unbatched": ((GOOD[:, 0], torch.zeros(1, 2, 4)), "hx: expected a Tensor of 2 dimensions"),
    "state's batch": ((GOOD, torch.zeros(1, 3, 4)), r"hx: expected shape \(1, 2, 4\), got \(1, 3, 4\)"),
    "state's layers": ((GOOD, torch.zeros(2, 2, 4)), r"hx: expected shape \(1, 2, 4\)"),
    "state's size": ((GOOD, torch.zeros(1, 2, 3)), r"hx: expected shape \(1, 2, 4\)"),
    "state's dtype": ((GOOD, torch.zeros(1, 2, 4).double()), "hx: expected dtype torch.float32"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_calls_raise_what_torch_raises_and_name_the_argument(name, kind):
    arguments, message = BAD_CALLS[name]
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        getattr(torch.nn, kind)(3, 4)(*arguments)
    with pytest.raises(theirs.type, match=message):
        getattr(rk, kind)(3, 4)(*arguments)


@pytest.mark.parametrize("input", [[[0.0]], None, "text"])
def test_what_is_no_tensor_is_refused(input):
    with pytest.raises(TypeError, match="input: expected a Tensor or a PackedSequence, got"):
        rk.RNN(3, 4)(input)


def test_another_device_is_refused():
    with pytest.raises(RuntimeError, match="input: expected device cpu, where the weights are, got meta"):
        rk.RNN(3, 4)(torch.zeros(5, 2, 3, device="meta"))


BAD_ARGUMENTS = [
    {"hidden_size": 0},
    {"input_size": -1},
    {"num_layers": 0},
    {"dropout": 1.5},
    {"dropout": True},
    {"bias": 1},
    {"batch_first": "yes"},
    {"hidden_size": 2.0},
    {"nonlinearity": "gelu"},
]


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=str)
def test_bad_arguments_raise_what_torch_raises(arguments):
    arguments = {"input_size": 3, "hidden_size": 4, **arguments}
    try:
        torch.nn.RNN(**arguments)
    except Exception as error:
        theirs = type(error)
    else:
        pytest.skip(f"torch {torch.__version__} does not refuse it")
    with pytest.raises(theirs):
        rk.RNN(**arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_passes_through(kind):
    ours, theirs = pair(3, 4, 2, bidirectional=True, kind=kind)
    input = torch.randn(5, 2, 3).double()
    input[2, 0, 0] = float("nan")
    torch.testing.assert_close(ours(input), theirs(input), equal_nan=True)


@pytest.mark.parametrize("nonlinearity", rk.ops.NONLINEARITIES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_the_cell_is_one_step(nonlinearity, bias, batched, given):
    cell = rk.RNNCell(3, 5, bias, nonlinearity, dtype=torch.float64)
    input, hidden = torch.randn(2, 3).double(), torch.randn(2, 5).double()
    if not batched:
        input, hidden = input[0], hidden[0]
    biases = (cell.bias_ih, cell.bias_hh)
    expected = rk.reference.rnn_cell(
        input, hidden if given else torch.zeros_like(hidden), cell.weight_ih, cell.weight_hh, *biases, nonlinearity
    )
    torch.testing.assert_close(cell(input, hidden) if given else cell(input), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cell_is_torchs_cell(kind):
    theirs = getattr(torch.nn, f"{kind}Cell")(3, 5, dtype=torch.float64)
    ours = getattr(rk, f"{kind}Cell")(3, 5, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    leaves = [torch.randn(2, 3).double().requires_grad_(), torch.randn(2, 5).double().requires_grad_()]
    cotangent = torch.randn(2, 5).double()
    results = [
        (module(*leaves), *torch.autograd.grad(module(*leaves), (*leaves, *module.parameters()), cotangent))
        for module in (ours, theirs)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("make", [rk.RNNCell, functools.partial(rk.RNNCell, nonlinearity="identity"), rk.GRUCell])
def test_the_cells_refuse_bad_input(make):
    cell = make(3, 5)
    with pytest.raises(TypeError, match="input: expected a Tensor, got list"):
        cell([1.0])
    with pytest.raises(TypeError, match="hx: expected a Tensor, got float"):
        cell(torch.zeros(2, 3), 0.0)
    with pytest.raises(ValueError, match=r"input: expected 1 or 2 dimensions, got shape \(1, 2, 3\)"):
        cell(torch.zeros(1, 2, 3))
    with pytest.raises(RuntimeError):
        cell(torch.zeros(2, 4))
    with pytest.raises(RuntimeError):
        cell(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(RuntimeError):
        cell(torch.zeros(2, 3), torch.zeros(3, 5))


def test_the_cell_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="nonlinearity: expected one of"):
        rk.RNNCell(3, 5, nonlinearity="gelu")
