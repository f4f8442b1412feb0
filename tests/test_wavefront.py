"""Layers in one launch: the wavefront, in Triton's interpreter.

As for the persistent design, the kernels run one step a launch, and with a process for each program, where the barrier
does its work: one program of a lane needs it too, since lanes wait for each other.
"""

import copy

import pytest
import torch
from parity import random_lengths, relative_error
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkernels as rk

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels can't be tested here")

import triton.language as tl  # noqa: E402 (Triton's interpreter looks for it in every module with a kernel)

from rnnkernels.kernels.triton import barrier, dispatch, persistent, wavefront  # noqa: E402
from rnnkernels.ops import _layers  # noqa: E402

pytestmark = pytest.mark.interpreter

KINDS = ("RNN", "GRU", "LSTM")
INPUT_SIZE = 5


@pytest.fixture
def force(monkeypatch, kernel_device):
    """Take so many layers in a launch, with this tile, whatever the dispatch chooses. Lists pass and lanes of each."""

    def force(lanes, hidden_size, block_batch=16, block_hidden=16):
        design = dispatch.Persistent(block_batch, block_hidden, 128, chunks=-(-hidden_size // 128), lanes=lanes)
        calls = []
        for name in ("forward", "backward"):
            original = getattr(wavefront, name)

            def counted(cell, design, *arguments, original=original, name=name, **options):
                calls.append((name, design.lanes))
                return original(cell, design, *arguments, **options)

            monkeypatch.setattr(wavefront, name, counted)
        monkeypatch.setattr(dispatch, "wavefront", lambda *_: design)
        return calls

    with rk.use_backend("triton"):
        yield force


@pytest.fixture
def in_one_launch(monkeypatch):
    """One launch for all steps, the barrier in it."""
    monkeypatch.setattr(persistent, "concurrent", lambda device: True)


def data(kind, num_layers, sequence_length, batch, hidden_size, dtype, device, lengths=None):
    """Input, states and lengths for a module."""
    input = torch.randn(sequence_length, batch, INPUT_SIZE, dtype=torch.float64)
    states = torch.randn(2 if kind == "LSTM" else 1, num_layers, batch, hidden_size, dtype=torch.float64)
    lengths = lengths and random_lengths(batch, sequence_length, lengths).to(device)
    return [tensor.to(device, dtype) for tensor in (input, *states)], lengths


def outcome(module, tensors, lengths, given=True, seed=7):
    """Results, and the gradients of input, states and parameters, by name. Random numbers begin anew each time."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    input, *states = tensors
    hx = None if not given else tuple(states) if len(states) == 2 else states[0]
    torch.manual_seed(seed)
    if lengths is not None and not hasattr(module, "state_names"):  # torch's has to pack
        packed, final = module(pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False), hx)
        output, _ = pad_packed_sequence(packed, total_length=len(input))
    else:
        output, final = module(input, hx, **({} if lengths is None else {"lengths": lengths}))
    final = final if isinstance(final, tuple) else (final,)
    results = dict(zip(("output", "h_n", "c_n"), (output, *final), strict=False))
    torch.manual_seed(seed)
    cotangents = [torch.randn(r.shape, dtype=torch.float64).to(r.device, r.dtype) for r in results.values()]
    leaves = {
        **dict(zip(("input", "h_0", "c_0"), tensors if given else tensors[:1], strict=False)),
        **dict(module.named_parameters()),
    }
    gradients = torch.autograd.grad(tuple(results.values()), tuple(leaves.values()), cotangents)
    found = {name: result.detach() for name, result in results.items()}
    return found | {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def assert_parity(ours, tensors, lengths, tolerance, reference=torch.nn, given=True):
    """Hold a module to torch's in float64, or to ours on the other back end, where there is dropout.

    ``tolerance`` bounds the relative error of each result and gradient. Where sums cancel, that module itself errs in
    the tensors' type, and four times its error is allowed on top.
    """
    found, witnesses = outcome(ours, tensors, lengths, given), []
    with rk.use_backend("eager"):
        for dtype in (torch.float64, tensors[0].dtype):
            sizes = ours.input_size, ours.hidden_size, ours.num_layers
            module = getattr(reference, type(ours).__name__)(
                *sizes, bias=ours.bias, dropout=ours.dropout, device=tensors[0].device, dtype=dtype
            )
            module.load_state_dict(ours.state_dict())
            witnesses.append(outcome(module, [tensor.to(dtype) for tensor in tensors], lengths, given))
    expected, textbook = witnesses
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value.dtype, value.shape) == (tensors[0].dtype, expected[name].shape), name
        error = relative_error(value, expected[name])
        bound = tolerance + 4 * relative_error(textbook[name], expected[name])
        assert error <= bound, f"{name}: relative error {error:.2e} exceeds {bound:.2e}"


def module_of(kind, num_layers, hidden_size, device, dtype=torch.float32, **options):
    return getattr(rk, kind)(INPUT_SIZE, hidden_size, num_layers, device=device, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("num_layers", "sequence_length", "batch", "hidden_size", "tile", "lengths", "given", "bias"),
    [
        (2, 3, 3, 17, (16, 16), "unsorted", True, True),
        (3, 2, 17, 3, (16, 16), None, True, True),  # more layers than steps
        (2, 3, 2, 9, (16, 8), "unsorted", False, False),
        (3, 1, 1, 1, (16, 16), None, False, True),
        (2, 1, 33, 129, (32, 64), None, True, True),  # two chunks, and one unit in the last program
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_matches_torch(
    force, poisoned, kernel_device, kind, num_layers, sequence_length, batch, hidden_size, tile, lengths, given, bias
):
    calls = force(num_layers, hidden_size, *tile)
    ours = module_of(kind, num_layers, hidden_size, kernel_device, bias=bias)
    tensors, lengths = data(
        kind, num_layers, sequence_length, batch, hidden_size, torch.float32, kernel_device, lengths
    )
    assert_parity(ours, tensors, lengths, 5e-6, given=given)
    assert calls == [("forward", num_layers), ("backward", num_layers)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_within_its_bound(force, poisoned, kernel_device, kind, dtype, tolerance):
    force(2, 13)
    tensors, lengths = data(kind, 2, 3, 5, 13, dtype, kernel_device, "unsorted")
    assert_parity(module_of(kind, 2, 13, kernel_device, dtype), tensors, lengths, tolerance)


@pytest.mark.parametrize(
    ("kind", "num_layers", "lanes", "launches"),
    [
        *((kind, 3, 3, [3]) for kind in KINDS),
        ("GRU", 4, 2, [2, 2]),
        ("RNN", 3, 2, [2]),  # a layer that is left over runs alone
        ("LSTM", 3, 2, [2]),
    ],
)
def test_dropout_is_that_of_the_other_back_end(force, poisoned, kernel_device, kind, num_layers, lanes, launches):
    calls = force(lanes, 13)
    ours = module_of(kind, num_layers, 13, kernel_device, dropout=0.4)
    tensors, lengths = data(kind, num_layers, 2, 3, 13, torch.float32, kernel_device, "unsorted")
    assert_parity(ours, tensors, lengths, 5e-6, reference=rk)
    assert calls == [(name, lanes) for name in ("forward", "backward") for lanes in launches]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_has_the_bits_of_its_operator(force, kernel_device, dtype):
    """Layers that hand their input on unchanged, so that nothing but dropout is left of them."""
    force(3, 13)
    input = torch.randn(3, 3, 13).to(kernel_device, dtype).requires_grad_()
    unit, nothing = torch.eye(13).to(input), torch.zeros(13, 13).to(input)
    weights, seeds = [{"weight_ih": unit, "weight_hh": nothing}] * 3, [torch.tensor(5), torch.tensor(2**60)]
    h_0 = torch.zeros(3, 3, 13).to(input)
    options = {"dropout": 0.3, "seeds": seeds, "nonlinearity": "identity"}
    output, _ = _layers.layers("rnn", input, [h_0], weights, **options)
    with rk.use_backend("eager"):
        expected = rk.ops.dropout(rk.ops.dropout(input, 0.3, seed=seeds[0]), 0.3, seed=seeds[1])
    assert torch.equal(output, expected)
    cotangent = torch.randn(3, 3, 13).to(output)
    assert torch.equal(*(torch.autograd.grad(result, input, cotangent)[0] for result in (output, expected)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_behind_the_end_goes_nowhere(force, kernel_device, kind):
    force(2, 5)
    module, lengths = getattr(rk, kind)(INPUT_SIZE, 5, 2, device=kernel_device), torch.tensor([4, 2, 1])
    lengths = lengths.to(kernel_device)
    (input, *states), _ = data(kind, 2, 4, 3, 5, torch.float32, kernel_device)
    expected = outcome(module, [input, *states], lengths)
    for row, length in enumerate(lengths.tolist()):
        input[length:, row] = float("nan")
    for name, value in outcome(module, [input, *states], lengths).items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def on_a_cpu(kernel_device):
    if kernel_device.type != "cpu":
        pytest.skip("on a GPU the programs run at once anyway")


def check_in_processes(kernel_device, kind, dropout=0.0, **how):
    """Two layers of two groups of two programs against the other back end; the last program is late."""
    import concurrency

    ours = module_of(kind, 2, 17, kernel_device, dropout=dropout)
    tensors, lengths = data(kind, 2, 3, 17, 17, torch.float32, kernel_device, "unsorted")
    with concurrency.processes(**how):
        assert_parity(ours, tensors, lengths, 5e-6, reference=rk)


@pytest.mark.parametrize(("kind", "dropout"), [("GRU", 0.3), ("LSTM", 0.0)])
def test_a_process_for_each_program(force, in_one_launch, on_a_cpu, poisoned, kernel_device, kind, dropout):
    calls = force(2, 17)
    check_in_processes(kernel_device, kind, dropout, late=0.5)
    assert calls == [("forward", 2), ("backward", 2)]


@triton.jit
def nothing(counter, target):
    pass


@triton.jit
def wait_for_one_lane(counter, target):
    barrier.wait(counter, target // tl.num_programs(2))


@triton.jit
def wait_for_one_too_many(counter, target):
    barrier.wait(counter, target + 1)


SABOTAGE = {
    "wait removed": (nothing, "wrong"),
    "one lane awaited": (wait_for_one_lane, "wrong"),
    "one too many awaited": (wait_for_one_too_many, "deadlock"),
}


@pytest.mark.parametrize("fault", list(SABOTAGE))
def test_a_broken_barrier_is_seen(force, in_one_launch, on_a_cpu, monkeypatch, kernel_device, fault):
    import concurrency

    force(2, 17)
    replacement, result = SABOTAGE[fault]
    monkeypatch.setattr(wavefront, "wait", replacement)
    if result == "deadlock":
        with pytest.raises(concurrency.Deadlock):
            check_in_processes(kernel_device, "RNN", seconds=4.0)
    else:
        with pytest.raises(AssertionError, match="relative error"):
            check_in_processes(kernel_device, "RNN", late=1.5)


@pytest.mark.parametrize("name", ["forward_wavefront", "backward_wavefront"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_launch_falls_back(force, in_one_launch, monkeypatch, kernel_device, kind, name):
    """To a launch for each layer; the pass that is not refused must read what the other one kept."""

    from concurrency import Refusing

    refused = set()
    monkeypatch.setattr(dispatch, "_refused", refused)
    force(3, 5)
    monkeypatch.setattr(persistent, "concurrent", lambda device: False)
    monkeypatch.setattr(wavefront, name, Refusing("too many blocks in cooperative launch"))
    ours = module_of(kind, 3, 5, kernel_device, dropout=0.3)
    tensors, lengths = data(kind, 3, 3, 2, 5, torch.float32, kernel_device, "unsorted")
    with pytest.warns(RuntimeWarning, match="refused a cooperative launch"):
        assert_parity(ours, tensors, lengths, 5e-6, reference=rk)
    assert refused == {kernel_device}


def positional(kind, module, tensors, lengths, backend="triton"):
    """What the operator takes."""
    input, h_0, *c_0 = tensors
    seeds = torch.arange(3, 3 + module.num_layers - 1) if module.dropout else None
    weights = list(module.parameters())
    return input, h_0, c_0[0] if c_0 else None, weights, lengths, seeds, module.dropout, kind.lower(), "tanh", backend


@pytest.mark.parametrize(("kind", "dropout"), [("RNN", 0.0), ("LSTM", 0.3)])
def test_opcheck(force, kernel_device, kind, dropout):
    force(2, 3)
    module = getattr(rk, kind)(INPUT_SIZE, 3, 2, dropout=dropout, device=kernel_device)
    tensors, lengths = data(kind, 2, 2, 2, 3, torch.float32, kernel_device, "unsorted")
    given = positional(kind, module, [tensor.requires_grad_() for tensor in tensors], lengths)
    torch.library.opcheck(torch.ops.rnnkernels.layers.default, given)
    with torch.no_grad():
        results = torch.ops.rnnkernels.layers(*given)
    input, h_0, c_0, weights, *options = given
    detached = [value if value is None else value.detach() for value in (input, h_0, c_0)]
    cotangents = [torch.randn_like(result) for result in results[:3]]
    cotangents[2] = cotangents[2] if kind == "LSTM" else None
    kept, needs = (results[0], *results[3:]), [True, True, False, True, True, False, True, True, True]
    weights = [weight.detach() for weight in weights]
    backward = torch.ops.rnnkernels.layers_backward.default
    torch.library.opcheck(backward, (*cotangents, *kept, *detached, weights, *options, needs))


def test_it_compiles_without_graph_breaks_or_a_new_graph_for_new_sizes(force, kernel_device):
    force(2, 3)
    module, graphs = rk.LSTM(INPUT_SIZE, 3, 2, dropout=0.3, device=kernel_device), []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend=count, dynamic=True)
    for sequence_length, batch in ((2, 3), (3, 5), (4, 2)):
        input = torch.randn(sequence_length, batch, INPUT_SIZE, device=kernel_device)
        results = []
        for function in (compiled, module):
            torch.manual_seed(1)
            results.append(function(input)[0])
        assert torch.equal(*results)
    assert len(graphs) == 1
    assert any("rnnkernels.layers" in str(node.target) for node in graphs[0].graph.nodes)


def test_gradients_of_a_compiled_module(force, kernel_device):
    force(2, 3)
    module = rk.GRU(INPUT_SIZE, 3, 2, device=kernel_device)
    tensors, lengths = data("GRU", 2, 3, 2, 3, torch.float32, kernel_device, "unsorted")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = outcome(module, tensors, lengths)

    class Named:  # the compiled module's parameters have other names
        state_names = module.state_names
        named_parameters = module.named_parameters
        __call__ = staticmethod(compiled)

    for name, value in outcome(Named(), tensors, lengths).items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize(("kind", "dropout"), [("RNN", 0.0), ("GRU", 0.0), ("LSTM", 0.3)])
def test_second_gradients_are_the_references(force, kernel_device, kind, dropout):
    force(2, 3)
    ours = module_of(kind, 2, 3, kernel_device, dropout=dropout)
    theirs = copy.deepcopy(ours).double()
    tensors, lengths = data(kind, 2, 3, 2, 3, torch.float32, kernel_device, "unsorted")

    def second(module, tensors):
        tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        torch.manual_seed(3)
        output, _ = module(tensors[0], tuple(tensors[1:]) if len(tensors) == 3 else tensors[1], lengths=lengths)
        leaves = [*tensors, *module.parameters()]
        gradients = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    found = second(ours, tensors)
    with rk.use_backend("eager"):
        expected = second(theirs, [tensor.double() for tensor in tensors])
    for value, other in zip(found, expected, strict=True):
        assert relative_error(value, other) < 2e-5


def test_it_takes_what_is_plain_and_nothing_else(force, kernel_device):
    calls = force(2, 3)
    input = torch.randn(3, 2, INPUT_SIZE, device=kernel_device)

    def launches(kind="GRU", num_layers=2, call=None, **options):
        calls.clear()
        module = getattr(rk, kind)(INPUT_SIZE, 3, num_layers, device=kernel_device, **options)
        with torch.no_grad():
            module(input, **(call or {}))
        return list(calls)

    assert launches() == launches(dropout=0.5) == launches("LSTM") == launches("RNN", nonlinearity="relu") != []
    reset = torch.zeros(3, 2, dtype=torch.bool, device=kernel_device)
    others = [launches(num_layers=1), launches(bidirectional=True), launches(call={"reset": reset})]
    others += [launches("LSTM", proj_size=2), launches("LSTM", peephole=True), launches("RNN", nonlinearity="sigmoid")]
    others += [launches(zoneout=0.1), launches(recompute_gates=True), launches(grad_clip=1.0)]
    assert others == [[]] * len(others)
    calls.clear()
    with rk.use_backend("eager"):
        assert launches() == []
    torch.func.vmap(rk.GRU(INPUT_SIZE, 3, 2, device=kernel_device))(input.unsqueeze(0))
    assert calls == []


def test_autocast(force, kernel_device):
    calls = force(2, 3)
    module = rk.LSTM(INPUT_SIZE, 3, 2, device=kernel_device)
    input = torch.randn(3, 2, INPUT_SIZE, device=kernel_device)
    with torch.autocast(kernel_device.type, torch.bfloat16):
        output, (h_n, c_n) = module(input)
    assert {output.dtype, h_n.dtype, c_n.dtype} == {torch.bfloat16}
    assert calls == [("forward", 2)]
    torch.testing.assert_close(output.float(), module(input)[0], rtol=2e-2, atol=2e-2)


def test_a_weight_that_does_not_fit_is_named(force, kernel_device):
    force(2, 3)
    module = rk.GRU(INPUT_SIZE, 3, 2, device=kernel_device)
    module.weight_hh_l1 = torch.nn.Parameter(torch.zeros(9, 2, device=kernel_device))
    with pytest.raises(ValueError, match=r"weight_hh: expected shape \(9, 3\), got \(9, 2\)"):
        module(torch.randn(3, 2, INPUT_SIZE, device=kernel_device))


def test_the_table_chooses_what_fits(monkeypatch):
    h100, a100, rtx = (227, 132), (163, 108), (99, 82)

    def chosen(hidden_size, batch, layers=2, dtype=torch.bfloat16, gpu=h100, cell="lstm"):
        monkeypatch.setattr(dispatch, "shared_memory", lambda device: gpu[0] * 1024)
        monkeypatch.setattr(dispatch, "multiprocessors", lambda device: gpu[1])
        design = dispatch.wavefront(cell, hidden_size, batch, layers, dtype, torch.device("cuda"))
        return design and (design.lanes, design.block_batch, design.block_hidden)

    assert chosen(512, 16, layers=4) == (4, 16, 16)
    assert chosen(512, 32, layers=2) == (2, 16, 16)
    assert chosen(512, 33) is chosen(512, 16, layers=1) is chosen(512, 0) is None
    assert chosen(512, 32, layers=4) == (4, 32, 16)
    # Where not all fit at once, equal shares in as few launches as can be.
    assert chosen(512, 16, layers=5) == (3, 16, 16)
    assert chosen(512, 16, layers=8) == (4, 16, 16)
    assert chosen(768, 16, layers=3) == (2, 16, 16)
    assert [chosen(256, batch) for batch in (64, 128, 129)] == [(2, 16, 16), (2, 16, 32), None]
    assert (chosen(768, 16), chosen(769, 16)) == ((2, 16, 16), None)
    assert (chosen(512, 16, gpu=a100), chosen(512, 17, gpu=a100), chosen(512, 1, gpu=rtx)) == ((2, 16, 16), None, None)
    assert chosen(256, 32, gpu=rtx) == (2, 16, 16)
    # From how many layers on depends on the row, and the smallest layers need no barrier.
    assert (chosen(128, 16, cell="gru"), chosen(128, 16, 3, cell="gru")) == (None, (3, 16, 16))
    assert (chosen(65, 16), chosen(64, 16, 8)) == ((2, 16, 16), None)
    assert (chosen(200, 16, 2, torch.float32), chosen(200, 16, 3, torch.float32)) == (None, (3, 16, 16))
    assert chosen(1500, 16, cell="rnn") == (2, 16, 32)
    monkeypatch.setattr(dispatch, "COOPERATIVE", False)
    assert chosen(512, 16) is None


def test_every_row_of_the_table_is_as_the_kernels_need_it():
    assert dispatch.WAVEFRONT.keys() == dispatch.PERSISTENT.keys()
    for (cell, kind), sizes in dispatch.WAVEFRONT.items():
        assert list(sizes) == sorted(sizes), (cell, kind)
        for inner_size, tiles in sizes.items():
            block_inner = dispatch.inner_block(inner_size, kind)
            assert inner_size % block_inner == 0
            assert block_inner >= 16 * dispatch.Persistent(16, 16, 128, 1).num_warps  # the least that a product takes
            assert all(
                inner_size % block_hidden == 0 and layers >= 2 for (_, block_hidden), (_, layers) in tiles.items()
            )
