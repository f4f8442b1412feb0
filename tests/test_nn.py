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
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import rnnkernels as rk

KINDS = ("RNN", "GRU", "LSTM")
FORMS = ("batched", "unbatched", "packed", "packed unsorted", "lengths")


def pair(*args, kind="RNN", dtype=torch.float64, native=False, **kwargs):
    """Ours and torch's module with the same parameters. Ours calls torch's operator, for a few steps, if ``native``."""
    theirs = getattr(torch.nn, kind)(*args, dtype=dtype, **kwargs)
    ours = getattr(rk, kind)(*args, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    if not native:
        ours._native_steps = ours._native_steps_training = 0
    return ours, theirs


def data_of(output):
    return output.data if isinstance(output, PackedSequence) else output


def tensors_of(states):
    """Initial or final states, or None, as a tuple."""
    return () if states is None else (states,) if isinstance(states, torch.Tensor) else tuple(states)


def results_of(module, input, hx, lengths=None):
    """The output's data and the final states, by lengths or, where the module is torch's, by packing."""
    if lengths is None:
        output, final = module(input, hx)
    elif hasattr(module, "state_names"):
        output, final = module(input, hx, lengths=lengths)
    else:
        packed = pack_padded_sequence(input, lengths, module.batch_first, enforce_sorted=False)
        packed, final = module(packed, hx)
        total = input.shape[1 if module.batch_first else 0]
        output, _ = pad_packed_sequence(packed, module.batch_first, total_length=total)
    return (data_of(output), *tensors_of(final))


def outcome(module, input, hx, cotangents, lengths=None):
    """Results and all gradients of a module, under these cotangents."""
    leaves = [data_of(input), *tensors_of(hx), *module.parameters()]
    results = results_of(module, input, hx, lengths)
    gradients = torch.autograd.grad(results, leaves, cotangents)
    return [*(result.detach() for result in results), *gradients]


def in_float64(value):
    """The same in float64: a module, tensors that are leaves, or None."""
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, PackedSequence):
        return PackedSequence(in_float64(value.data), *value[1:])
    if isinstance(value, tuple):
        return tuple(in_float64(element) for element in value)
    return value if value is None else value.detach().double().requires_grad_()


def distances(values, expected):
    """The largest error of each tensor, relative to its largest element."""
    for value, wanted in zip(values, expected, strict=True):
        assert value.shape == wanted.shape
        if wanted.numel():
            yield float((value.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-10))
        else:
            yield 0.0


def assert_same(ours, theirs, input, hx=None, lengths=None, tolerance=1e-10):
    """``tolerance`` bounds the error of each result and gradient, relative to its largest element.

    In float32, the witness is in float64, and four times the error that torch makes in float32 is allowed on top: where
    sums cancel, nobody does better.
    """
    with torch.no_grad():
        cotangents = [torch.randn_like(result) for result in results_of(theirs, input, hx, lengths)]
    actual, expected = (outcome(module, input, hx, cotangents, lengths) for module in (ours, theirs))
    assert [value.dtype for value in actual] == [value.dtype for value in expected]
    allowed = [0.0] * len(actual)
    if expected[0].dtype == torch.float32:
        exact = outcome(*map(in_float64, (theirs, input, hx)), [c.double() for c in cotangents], lengths)
        allowed, expected = [4 * error for error in distances(expected, exact)], exact
    for error, more in zip(distances(actual, expected), allowed, strict=True):
        assert error <= tolerance + more


@st.composite
def constructor_arguments(draw):
    arguments = {
        "kind": draw(st.sampled_from(KINDS)),
        "input_size": draw(st.integers(1, 9)),
        "hidden_size": draw(st.integers(1, 17)),
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if arguments["kind"] == "RNN":
        arguments["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if arguments["kind"] == "LSTM":
        arguments["proj_size"] = draw(st.integers(0, arguments["hidden_size"] - 1))
    if arguments["num_layers"] > 1:
        arguments["dropout"] = draw(st.sampled_from([0.0, 0.5]))
    return arguments


@st.composite
def configurations(draw):
    """Arguments of the module, the form and sizes of a batch, whether there is an initial state, and a seed."""
    sizes = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    arguments = {**draw(constructor_arguments()), "native": draw(st.integers(0, 3)) == 0}
    return arguments, draw(st.sampled_from(FORMS)), sizes, draw(st.booleans()), draw(st.integers(0, 2**32))


def case(arguments, form, sizes, has_state, dtype=torch.float64):
    """An input of this form, an initial state, both leaves, and lengths."""
    (sequence_length, batch), features = sizes, arguments["input_size"]
    layers = arguments["num_layers"] * (1 + arguments["bidirectional"])
    lengths = None
    if form == "unbatched":
        shape = (sequence_length, features)
    else:
        shape = (batch, sequence_length, features) if arguments["batch_first"] else (sequence_length, batch, features)
    input = torch.randn(shape, dtype=dtype, requires_grad=True)
    if form not in ("batched", "unbatched"):
        lengths = torch.randint(1, sequence_length + 1, (batch,))
        if form == "packed":
            lengths = lengths.sort(descending=True).values
    if form.startswith("packed"):
        packed = pack_padded_sequence(input, lengths, arguments["batch_first"], enforce_sorted=form == "packed")
        input, lengths = PackedSequence(packed.data.detach().requires_grad_(), *packed[1:]), None
    if not has_state:
        return input, None, lengths
    hidden_size = arguments["hidden_size"]
    widths = (hidden_size,) if arguments["kind"] != "LSTM" else (arguments["proj_size"] or hidden_size, hidden_size)
    shapes = [(layers, *([] if form == "unbatched" else [batch]), width) for width in widths]
    states = tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return input, states if arguments["kind"] == "LSTM" else states[0], lengths


@hypothesis.settings(max_examples=300)
@hypothesis.given(configuration=configurations())
def test_torch_gives_the_same_in_float64(configuration):
    arguments, form, sizes, has_state, seed = configuration
    torch.manual_seed(seed)
    ours, theirs = pair(**arguments)
    if arguments.get("dropout"):
        ours.eval(), theirs.eval()
    assert_same(ours, theirs, *case(arguments, form, sizes, has_state))


# The witness's own warning
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@hypothesis.settings(max_examples=300)
@hypothesis.given(configuration=configurations())
def test_torch_gives_the_same_in_float32(configuration):
    arguments, form, sizes, has_state, seed = configuration
    torch.manual_seed(seed)
    ours, theirs = pair(**arguments, dtype=torch.float32)
    if arguments.get("dropout"):
        ours.eval(), theirs.eval()
    assert_same(ours, theirs, *case(arguments, form, sizes, has_state, torch.float32), tolerance=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("input_size", "hidden_size"), [(1, 129), (17, 3), (129, 17), (64, 64)])
def test_torch_gives_the_same_in_float32_at_larger_sizes(input_size, hidden_size, kind):
    ours, theirs = pair(input_size, hidden_size, 2, bidirectional=True, dtype=torch.float32, kind=kind)
    input = torch.randn(33, 5, input_size, requires_grad=True)
    states = tuple(torch.randn(4, 5, hidden_size, requires_grad=True) for _ in ours.state_names)
    assert_same(ours, theirs, input, states if kind == "LSTM" else states[0], tolerance=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("native", [True, False])
def test_results_without_gradients(native, dtype, batch_first, kind):
    ours, theirs = pair(3, 4, 2, bidirectional=True, batch_first=batch_first, dtype=dtype, kind=kind, native=native)
    input = torch.randn(5, 5, 3, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(ours(input), theirs(input))
    with torch.inference_mode():
        torch.testing.assert_close(ours(input), theirs(input))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (2, 5, 1), (4, 1, 3)])
@pytest.mark.parametrize("form", ["lengths", "packed", "batch_first"])
def test_different_lengths_without_gradients(form, lengths, has_state, kind):
    options = {"bidirectional": True, "batch_first": form == "batch_first"}
    ours, theirs = pair(3, 4, 2, kind=kind, native=True, **options)
    input = torch.randn(3, 5, 3, dtype=torch.float64) if form == "batch_first" else torch.randn(5, 3, 3).double()
    states = tuple(torch.randn(4, 3, 4, dtype=torch.float64) for _ in ours.state_names)
    hx = None if not has_state else states if kind == "LSTM" else states[0]
    lengths = torch.tensor(lengths)
    packed = pack_padded_sequence(input, lengths, options["batch_first"], enforce_sorted=False)
    with torch.no_grad():
        expected, final = theirs(packed, hx)
        padded = pad_packed_sequence(expected, options["batch_first"], total_length=5)[0]
        output, ours_final = ours(packed, hx) if form == "packed" else ours(input, hx, lengths=lengths)
    torch.testing.assert_close(ours_final, final)
    torch.testing.assert_close(data_of(output), expected.data if form == "packed" else padded)


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
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_empty_batch(dtype, has_state, kind):
    arguments = {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bidirectional": True, "batch_first": False}
    if kind == "LSTM":
        arguments["proj_size"] = 0
    ours, theirs = pair(**arguments, kind=kind, dtype=dtype)
    input, hx, _ = case({**arguments, "kind": kind}, "batched", (5, 0), has_state, dtype)
    shapes = [[result.shape for result in results_of(module, input, hx)] for module in (ours, theirs)]
    assert shapes[0] == shapes[1]
    cotangents = [torch.zeros(shape, dtype=dtype) for shape in shapes[0]]
    gradients = outcome(ours, input, hx, cotangents)[len(cotangents) :]
    assert gradients[0].shape == input.shape
    assert all(not gradient.any() for gradient in gradients)


@hypothesis.given(arguments=constructor_arguments(), seed=st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_parameters(arguments, seed):
    kind = arguments.pop("kind")
    modules = []
    for owner in (torch.nn, rk):
        torch.manual_seed(seed)
        modules.append(getattr(owner, kind)(**arguments))
    theirs, ours = modules
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    # Ours also says which activation, where it is not the default one.
    assert repr(ours).replace(", nonlinearity='relu'", "") == repr(theirs)
    torch.manual_seed(seed)
    ours.reset_parameters()
    torch.manual_seed(seed)
    theirs.reset_parameters()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    ours = getattr(rk, kind)(**arguments)
    assert str(ours.load_state_dict(theirs.state_dict())) == str(theirs.load_state_dict(ours.state_dict()))
    assert [[w.shape for w in ws] for ws in ours.all_weights] == [[w.shape for w in ws] for ws in theirs.all_weights]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_seed_gives_the_same_parameters_of_a_cell(bias, kind):
    cells = []
    for owner in (torch.nn, rk):
        torch.manual_seed(4)
        cells.append(getattr(owner, f"{kind}Cell")(5, 7, bias, dtype=torch.float64))
    assert list(cells[0].state_dict()) == list(cells[1].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(cell.parameters() for cell in cells), strict=True))
    assert repr(cells[0]) == repr(cells[1])


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


@pytest.mark.parametrize(
    ("kind", "positional"),
    [
        ("RNN", (3, 4, 2, "relu", False, True, 0.5, True)),
        ("GRU", (3, 4, 2, False, True, 0.5, True)),
        ("LSTM", (3, 4, 2, False, True, 0.5, True, 2)),
    ],
)
def test_positional_arguments_are_torchs(kind, positional):
    ours, theirs = getattr(rk, kind)(*positional), getattr(torch.nn, kind)(*positional)
    names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"]
    for name in [*names, "nonlinearity"] if kind == "RNN" else names:
        assert getattr(ours, name) == getattr(theirs, name)
    assert repr(ours).replace(", nonlinearity='relu'", "") == repr(theirs)


def test_what_repr_shows_of_options():
    assert "nonlinearity='sigmoid'" in repr(rk.RNN(3, 4, nonlinearity="sigmoid"))
    assert repr(rk.RNNCell(3, 4, False, "relu")) == repr(torch.nn.RNNCell(3, 4, False, "relu"))
    assert repr(rk.GRUCell(3, 4, reset_after=False)) == "GRUCell(3, 4, reset_after=False)"
    options = {"peephole": True, "zoneout_cell": 0.2, "recurrent_dropout": 0.1, "layer_norm": True, "grad_clip": 1.0}
    shown = repr(rk.LSTM(3, 4, 2, **options, zoneout=0.0))
    assert shown.startswith("LSTM(3, 4, num_layers=2")
    assert all(f"{name}={value}" in shown for name, value in options.items())
    assert "zoneout=" not in shown


def test_a_device_and_a_type_by_name():
    for kind in KINDS:
        for make in (getattr(rk, kind), getattr(rk, f"{kind}Cell")):
            module = make(3, 4, device="meta", dtype=torch.float16)
            assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float16)}
    module = rk.LSTM(3, 4, peephole=True, layer_norm=True, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_follows_torchs_law(kind):
    module = getattr(rk, kind)(4, 64, 2, dropout=0.25)
    first = getattr(rk, kind)(4, 64)
    first.load_state_dict({name: value for name, value in module.state_dict().items() if name.endswith("l0")})
    seen = []
    # What reaches the second layer, as the operator's own input
    operator, name = getattr(rk.ops, kind.lower()), kind.lower()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rk.ops, name, lambda input, *args, **options: seen.append(input) or operator(input, *args, **options)
        )
        input = torch.randn(100, 8, 4)
        module(input)
    undropped = first(input)[0]
    dropped = seen[1] == 0
    torch.testing.assert_close(seen[1], torch.where(dropped, 0, undropped / 0.75))
    # Five standard deviations
    assert abs(dropped.double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / dropped.numel())


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_at_its_limits(kind):
    module = getattr(rk, kind)(3, 4, 2, dropout=1.0, bias=False)
    assert not module(torch.randn(5, 2, 3))[0].any()
    plain = getattr(rk, kind)(3, 4, 2, bias=False)
    plain.load_state_dict(module.state_dict())
    input = torch.randn(5, 2, 3)
    assert torch.equal(module.eval()(input)[0], plain(input)[0])
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        getattr(rk, kind)(3, 4, dropout=0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("native", [True, False])
def test_gradients_in_eval_mode_and_double_backward(native, dtype, kind):
    ours, theirs = pair(3, 4, 2, kind=kind, native=native)
    input = torch.randn(5, 2, 3, dtype=dtype, requires_grad=True)
    ours = ours.to(dtype)
    penalties = []
    for module, leaf in ((ours.eval(), input), (theirs.eval(), input.detach().double().requires_grad_())):
        (gradient,) = torch.autograd.grad(module(leaf)[0].square().sum(), leaf, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), tuple(module.parameters())))
    for a, b in zip(*penalties, strict=True):
        torch.testing.assert_close(a, b.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_backward_twice_through_a_module_gives_the_same(kind):
    module = getattr(rk, kind)(3, 4, 2, bidirectional=True)
    input = torch.randn(5, 2, 3, requires_grad=True)
    results = results_of(module, input, None, torch.tensor([5, 3]))
    cotangents = [torch.randn_like(result) for result in results]
    leaves = (input, *module.parameters())
    first = torch.autograd.grad(results, leaves, cotangents, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(results, leaves, cotangents), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_it_survives_what_modules_go_through(kind):
    ours, _ = pair(3, 4, 2, bidirectional=True, dtype=torch.float32, kind=kind)
    input = torch.randn(5, 2, 3)
    expected = ours(input)[0]
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    assert ours.share_memory() is ours
    assert all(parameter.is_shared() for parameter in ours.parameters())
    ours.flatten_parameters()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(saved, weights_only=False)):
        assert torch.equal(twin(input)[0], expected)
        assert repr(twin) == repr(ours)
    parameters = {name: parameter * 0.5 for name, parameter in ours.named_parameters()}
    halved = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(torch.func.functional_call(ours, parameters, input)[0], halved(input)[0])
    assert ours.double()(input.double())[0].dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_device(kind):
    options = {"zoneout": 0.1, "dropout": 0.1, "layer_norm": True, "recurrent_dropout": 0.1}
    for given in ({}, {"bidirectional": True, "batch_first": True}, options):
        ours = getattr(rk, kind)(3, 4, 2, device="meta", **given)
        theirs = getattr(torch.nn, kind)(3, 4, 2, **{k: v for k, v in given.items() if k not in options})
        input = torch.randn(5, 2, 3, device="meta")
        results = results_of(ours, input, None)
        assert {result.device.type for result in results} == {"meta"}
        expected = results_of(theirs, torch.zeros(5, 2, 3), None)
        assert [result.shape for result in results] == [result.shape for result in expected]
    built = getattr(rk, kind)(3, 4, 2, device="meta").to_empty(device="cpu")
    torch.manual_seed(1)
    built.reset_parameters()
    torch.manual_seed(1)
    assert torch.equal(built.weight_hh_l1, getattr(torch.nn, kind)(3, 4, 2).weight_hh_l1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_weights_are_used(normalize, kind):
    ours, theirs = pair(3, 4, kind=kind)
    for module in (ours, theirs):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(torch.nn.utils.parametrizations, normalize)(module, "weight_hh_l0")
        module.eval()
        if normalize == "weight_norm":
            with torch.no_grad():
                module.parametrizations.weight_hh_l0.original0.mul_(2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    input = torch.randn(5, 2, 3).double()
    results = [results_of(module, input, None) for module in (ours, theirs)]
    torch.testing.assert_close(*results)
    cotangents = [torch.randn_like(result) for result in results[0]]
    gradients = [
        torch.autograd.grad(result, tuple(module.parameters()), cotangents)
        for module, result in zip((ours, theirs), results, strict=True)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_are_called_as_torchs(kind):
    calls = []
    for module in pair(3, 4, kind=kind):
        seen = []
        module.register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(("before", len(args))) or (2 * args[0],)
        )
        module.register_forward_hook(lambda m, args, result, seen=seen: seen.append(("after", result[0].detach())))
        module.register_full_backward_hook(
            lambda m, grad_input, grad_output, seen=seen: seen.append(("backward", grad_input[0], grad_output[0]))
        )
        module.weight_hh_l0.register_hook(lambda gradient, seen=seen: seen.append(("weight", gradient)) or 3 * gradient)
        torch.manual_seed(2)
        input = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
        module(input)[0].square().sum().backward()
        calls.append([*sorted(seen, key=lambda call: call[0]), ("grad", module.weight_hh_l0.grad), ("x", input.grad)])
    for a, b in zip(*calls, strict=True):
        assert a[0] == b[0]
        for x, y in zip(a[1:], b[1:], strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_get_no_gradient(kind):
    ours, theirs = pair(3, 4, kind=kind)
    for name in ("weight_hh_l0", "bias_ih_l0", "weight_ih_l0", "bias_hh_l0"):
        for module in (ours, theirs):
            getattr(module, name).requires_grad_(False)
            module.zero_grad()
        input = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
        gradients = []
        for module in (ours, theirs):
            leaf = input.detach().requires_grad_()
            module(leaf)[0].square().sum().backward()
            gradients.append([leaf.grad, *(parameter.grad for parameter in module.parameters())])
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_an_optimizer_goes_as_torchs(kind):
    input, target = torch.randn(7, 3, 2).double(), torch.randn(7, 3, 4).double()
    modules = pair(2, 4, 2, kind=kind)
    for module in modules:
        optimizer = torch.optim.Adam(module.parameters(), 0.05)
        for _ in range(10):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(module(input)[0], target).backward()
            optimizer.step()
    for a, b in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    module = getattr(rk, kind)(3, 4, 2)
    input = torch.randn(5, 2, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, final = module(input)
        assert module(input.bfloat16(), final)[0].dtype == torch.bfloat16
        packed, _ = module(pack_padded_sequence(input, torch.tensor([5, 3])))
        assert packed.data.dtype == torch.bfloat16
    assert {output.dtype, *(state.dtype for state in tensors_of(final))} == {torch.bfloat16}
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
    "state's rank": ((GOOD, (2, 4)), r"{name}: expected a Tensor of 3 dimensions.*got shape \(2, 4\)"),
    "state's rank, unbatched": ((GOOD[:, 0], (1, 2, 4)), "{name}: expected a Tensor of 2 dimensions"),
    "state's batch": ((GOOD, (1, 3, 4)), r"{name}: expected shape \(1, 2, 4\), got \(1, 3, 4\)"),
    "state's layers": ((GOOD, (2, 2, 4)), r"{name}: expected shape \(1, 2, 4\)"),
    "state's size": ((GOOD, (1, 2, 3)), r"{name}: expected shape \(1, 2, 4\)"),
    "state's dtype": ((GOOD, (1, 2, 4), torch.float64), "{name}: expected dtype torch.float32"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize(("kind", "wrong"), [("RNN", 0), ("GRU", 0), ("LSTM", 0), ("LSTM", 1)])
def test_bad_calls_raise_what_torch_raises_and_name_the_argument(kind, wrong, name):
    (input, *state), message = BAD_CALLS[name]
    arguments = [input]
    if state:
        good = torch.zeros((1, 2, 4) if input.dim() == 3 else (1, 4))
        bad = torch.zeros(state[0], dtype=state[1] if len(state) > 1 else torch.float32)
        arguments.append(bad if kind != "LSTM" else (bad, good) if wrong == 0 else (good, bad))
    message = message.replace("{name}", "hx" if kind != "LSTM" else ("h_0", "c_0")[wrong])
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        getattr(torch.nn, kind)(3, 4)(*arguments)
    with pytest.raises(theirs.type, match=message):
        getattr(rk, kind)(3, 4)(*arguments)


@pytest.mark.parametrize("states", [1, 3])
def test_the_lstm_wants_two_states(states):
    with pytest.raises(RuntimeError, match=r"hx: expected a pair of Tensors \(h_0, c_0\), got tuple"):
        rk.LSTM(3, 4)(GOOD, (torch.zeros(1, 2, 4),) * states)
    with pytest.raises(RuntimeError, match="hx: expected a pair of Tensors"):
        rk.LSTM(3, 4)(GOOD, torch.zeros(1, 2, 4))
    output, _ = rk.LSTM(3, 4)(GOOD, [torch.zeros(1, 2, 4)] * 2)  # a list will do, as in torch
    assert output.shape == (5, 2, 4)


def test_the_projected_lstms_states_have_two_sizes():
    module = rk.LSTM(3, 4, proj_size=2)
    h, c = torch.zeros(1, 2, 2), torch.zeros(1, 2, 4)
    assert module(GOOD, (h, c))[0].shape == (5, 2, 2)
    with pytest.raises(RuntimeError, match=r"h_0: expected shape \(1, 2, 2\), got \(1, 2, 4\)"):
        module(GOOD, (c, c))
    with pytest.raises(RuntimeError, match=r"c_0: expected shape \(1, 2, 4\), got \(1, 2, 2\)"):
        module(GOOD, (h, h))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("input", [[[0.0]], None, "text"])
def test_what_is_no_tensor_is_refused(input, kind):
    with pytest.raises(TypeError, match="input: expected a Tensor or a PackedSequence, got"):
        getattr(rk, kind)(3, 4)(input)


@pytest.mark.parametrize("kind", KINDS)
def test_another_device_is_refused(kind):
    with pytest.raises(RuntimeError, match="input: expected device cpu, where the weights are, got meta"):
        getattr(rk, kind)(3, 4)(torch.zeros(5, 2, 3, device="meta"))


PACKED = pack_padded_sequence(GOOD, torch.tensor([5, 2]))
BAD_FORMS = [
    (ValueError, "lengths: expected None with a PackedSequence", PACKED, {"lengths": torch.tensor([5, 2])}),
    (ValueError, "reset: expected None with a PackedSequence", PACKED, {"reset": torch.zeros(5, 2).bool()}),
    (ValueError, "lengths: expected None with an input without batch", GOOD[:, 0], {"lengths": torch.tensor([5])}),
    (ValueError, "lengths: expected 1 to 5 steps, got 2 to 6", GOOD, {"lengths": torch.tensor([6, 2])}),
    (TypeError, "lengths: expected a Tensor, got list", GOOD, {"lengths": [5, 2]}),
    (TypeError, "lengths: expected dtype torch.int64, got torch.float32", GOOD, {"lengths": torch.ones(2)}),
    (ValueError, r"lengths: expected shape \(2,\)", GOOD, {"lengths": torch.ones(3, dtype=torch.int64)}),
    (TypeError, "reset: expected a Tensor, got list", GOOD, {"reset": [True]}),
    (TypeError, "reset: expected dtype torch.bool, got torch.float32", GOOD, {"reset": torch.zeros(5, 2)}),
    (ValueError, r"reset: expected shape \(5, 2\), got \(2, 5\)", GOOD, {"reset": torch.zeros(2, 5).bool()}),
    (ValueError, r"reset: expected shape \(5, 2\), got \(5,\)", GOOD, {"reset": torch.zeros(5).bool()}),
]


@pytest.mark.parametrize(("error", "message", "input", "options"), BAD_FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_lengths_and_resets_are_refused(kind, error, message, input, options):
    with pytest.raises(error, match=message):
        getattr(rk, kind)(3, 4)(input, **options)


BAD_ARGUMENTS = [
    {"hidden_size": 0},
    {"input_size": -1},
    {"num_layers": 0},
    {"dropout": 1.5},
    {"dropout": -0.1},
    {"dropout": True},
    {"dropout": "half"},
    {"bias": 1},
    {"batch_first": "yes"},
    {"hidden_size": 2.0},
    {"nonlinearity": "gelu"},
    {"proj_size": -1},
    {"proj_size": 4},
    {"proj_size": 5},
    {"unheard_of": 1},
]


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_arguments_raise_what_torch_raises(kind, arguments):
    arguments = {"input_size": 3, "hidden_size": 4, **arguments}
    try:
        getattr(torch.nn, kind)(**arguments)
    except Exception as error:
        theirs = type(error)
    else:
        pytest.skip(f"torch {torch.__version__} does not refuse it")
    with pytest.raises(theirs):
        getattr(rk, kind)(**arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nan_passes_through(dtype, kind):
    ours, theirs = pair(3, 4, 2, bidirectional=True, kind=kind, dtype=dtype)
    input = torch.randn(5, 2, 3, dtype=dtype)
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_the_gru_cell_with_its_reset_gate_before_the_product(given, batched, bias):
    cell = rk.GRUCell(3, 5, bias, dtype=torch.float64, reset_after=False)
    input, hidden = torch.randn(2, 3).double(), torch.randn(2, 5).double()
    weights = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    state = hidden if given else torch.zeros_like(hidden)
    expected = rk.reference.gru_cell(input, state, *weights, reset_after=False)
    layer = rk.GRU(3, 5, bias=bias, dtype=torch.float64, reset_after=False)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    torch.testing.assert_close(layer(input[None], state[None])[0][0], expected)
    if not batched:
        input, hidden, expected = input[0], hidden[0], expected[0]
    torch.testing.assert_close(cell(input, hidden) if given else cell(input), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_cell_is_torchs_cell(dtype, tolerance, given, batched, bias, kind):
    theirs = getattr(torch.nn, f"{kind}Cell")(3, 5, bias, dtype=dtype)
    ours = getattr(rk, f"{kind}Cell")(3, 5, bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    rows = [2] if batched else []
    input = torch.randn(*rows, 3, dtype=dtype, requires_grad=True)
    states = tuple(torch.randn(*rows, 5, dtype=dtype, requires_grad=True) for _ in range(1 + (kind == "LSTM")))
    hx = (states if kind == "LSTM" else states[0]) if given else None
    outcomes = []
    for module in (ours, theirs):
        results = tensors_of(module(input, hx))
        torch.manual_seed(1)
        cotangents = [torch.randn_like(result) for result in results]
        leaves = (input, *(states if given else ()), *module.parameters())
        outcomes.append([*results, *torch.autograd.grad(results, leaves, cotangents)])
    torch.testing.assert_close(*outcomes, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "make",
    [
        rk.RNNCell,
        functools.partial(rk.RNNCell, nonlinearity="identity"),
        rk.GRUCell,
        functools.partial(rk.GRUCell, reset_after=False),
    ],
)
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


def test_the_lstm_cell_refuses_bad_input():
    cell, state = rk.LSTMCell(3, 5), torch.zeros(2, 5)
    with pytest.raises(TypeError, match="input: expected a Tensor, got list"):
        cell([1.0])
    for hx in (state, 0.0, (state,), (state, state, state)):
        with pytest.raises(TypeError, match=r"hx: expected a pair of Tensors, \(h, c\), got"):
            cell(torch.zeros(2, 3), hx)
    with pytest.raises(TypeError, match="hx: expected a Tensor, got float"):
        cell(torch.zeros(2, 3), (state, 0.0))
    with pytest.raises(ValueError, match=r"input: expected 1 or 2 dimensions, got shape \(1, 2, 3\)"):
        cell(torch.zeros(1, 2, 3))
    for hx in ((state[:, :4], state), (state, state[:, :4]), (state[:1], state), (state, state[:1])):
        with pytest.raises(RuntimeError):
            cell(torch.zeros(2, 3), hx)


def test_the_cell_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="nonlinearity: expected one of"):
        rk.RNNCell(3, 5, nonlinearity="gelu")


def test_a_gru_that_keeps_nothing_is_one_call_of_torchs(monkeypatch):
    module, input = rk.GRU(3, 5, num_layers=2, bidirectional=True), torch.randn(40, 2, 3)
    expected, calls = module(input), []
    native = torch.gru
    monkeypatch.setattr(torch, "gru", lambda *arguments: (calls.append(len(arguments)), native(*arguments))[1])
    with torch.no_grad():
        found = module(input)
    assert len(calls) == 1
    torch.testing.assert_close(found, tuple(result.detach() for result in expected), rtol=1e-5, atol=1e-6)
