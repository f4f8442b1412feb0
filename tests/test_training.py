"""training.py: gradients against the definition, computed step by step; memory by counting what is alive."""

import math
import weakref
from functools import partial

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

import rnnkernels as rk
from rnnkernels import training

T, B, INPUT, H = 17, 3, 2, 5
sum_of_squares = partial(mse_loss, reduction="sum")

MODULES = {
    "rk.RNN": lambda **o: rk.RNN(INPUT, H, **o),
    "rk.GRU two layers": lambda **o: rk.GRU(INPUT, H, num_layers=2, **o),
    "rk.LSTM": lambda **o: rk.LSTM(INPUT, H, **o),
    "torch.nn.GRU": lambda **o: torch.nn.GRU(INPUT, H, **o),
    "torch.nn.LSTM two layers": lambda **o: torch.nn.LSTM(INPUT, H, num_layers=2, **o),
}


@pytest.fixture(params=MODULES)
def make_module(request):
    return lambda **options: MODULES[request.param](dtype=torch.float64, **options)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def detached(state):
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def step_through(module, input, state):
    """States before every step and after the last, one call a step."""
    states = [state]
    for x in input.split(1):
        state = detached(module(x, state)[1])
        states.append(state)
    return states


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()))


def assert_all_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- truncated BPTT


@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (4, 4), (1, 6), (4, 6), (3, 11), (5, 100), (17, 17), (40, 40)])
def test_every_window_against_the_definition(make_module, k1, k2):
    module, input, target = make_module(), random(T, B, INPUT), random(T, B, H)
    states = step_through(module, input, None)
    windows = training.TruncatedBPTT(module, mse_loss, k1, k2)
    begins = list(range(0, T, k1))
    for begin, loss in zip(begins, windows(input, target), strict=True):
        end, back = min(begin + k1, T), max(0, begin - (k2 - k1))
        output = module(input[back:end], states[back])[0][begin - back :]
        expected = mse_loss(output, target[begin:end])
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert_all_close(gradients(loss, module), gradients(expected, module))
    final = states[-1] if isinstance(states[-1], tuple) else (states[-1],)
    assert_all_close(windows.state if isinstance(windows.state, tuple) else (windows.state,), final)


def test_without_a_limit_the_windows_add_up_to_the_whole_gradient(make_module):
    module, input, target = make_module(), random(T, B, INPUT), random(T, B, H)
    for loss in training.TruncatedBPTT(module, sum_of_squares, 3, 100)(input, target):
        loss.backward()
    expected = gradients(sum_of_squares(module(input)[0], target), module)
    assert_all_close([p.grad for p in module.parameters()], expected)


def test_single_losses_reach_back_as_far_as_promised():
    """k1 = 1: the loss of step t, by the terms of the sum over lags, written out for a linear scalar network."""
    module = rk.RNN(1, 1, nonlinearity="identity", bias=False, dtype=torch.float64)
    w, v = (module.get_parameter(name).item() for name in ("weight_hh_l0", "weight_ih_l0"))
    x = random(9).tolist()
    h = [0.0]
    for value in x:
        h.append(w * h[-1] + v * value)
    for k2 in (1, 2, 5):
        windows = training.TruncatedBPTT(module, lambda output, target: output.sum(), 1, k2)
        losses = windows(torch.tensor(x, dtype=torch.float64).view(9, 1, 1), torch.zeros(9, 1))
        for t, loss in enumerate(losses, start=1):
            (gradient,) = torch.autograd.grad(loss, module.weight_hh_l0)
            expected = sum(w**k * h[t - k - 1] for k in range(min(k2, t)))  # lag k: dh_t/dh_{t-k} times h_{t-k-1}
            assert gradient.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(("k1", "k2"), [(4, 4), (4, 7), (2, 9)])
def test_weights_that_change_between_windows(make_module, k1, k2):
    """The gradient is that of the present weights, from a state that older ones left behind."""
    module, input, target = make_module(), random(T, B, INPUT), random(T, B, H)
    windows = training.TruncatedBPTT(module, mse_loss, k1, k2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    stored, position = None, 0  # the state before step `position`, as the latest window left it
    for begin, loss in zip(range(0, T, k1), windows(input, target), strict=True):
        end = min(begin + k1, T)
        states = step_through(module, input[position:end], stored)
        output = module(input[position:end], stored)[0]
        expected = mse_loss(output[begin - position :], target[begin:end])
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        optimizer.zero_grad()
        loss.backward()
        assert_all_close([p.grad for p in module.parameters()], gradients(expected, module))
        following = max(position, end - (k2 - k1))
        stored, position = states[following - position], following
        optimizer.step()


@pytest.mark.parametrize(("k1", "k2"), [(4, 4), (4, 9)])
def test_a_stream_may_come_in_parts_and_batch_first(make_module, k1, k2):
    module, input, target = make_module(), random(T, B, INPUT), random(T, B, H)
    expected = [gradients(loss, module) for loss in training.TruncatedBPTT(module, mse_loss, k1, k2)(input, target)]
    other = make_module(batch_first=True)
    other.load_state_dict(module.state_dict())
    windows, found = training.TruncatedBPTT(other, mse_loss, k1, k2), []
    for part in (slice(0, 8), slice(8, 12), slice(12, T)):
        losses = windows(input[part].transpose(0, 1), target[part].transpose(0, 1))
        found += [gradients(loss, other) for loss in losses]
    for one, two in zip(found, expected, strict=True):
        assert_all_close(one, two)
    windows.reset()
    assert windows.state is None
    first = next(windows(input[:k1].transpose(0, 1), target[:k1].transpose(0, 1)))
    assert_all_close(gradients(first, other), expected[0])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("k1", "k2"), [(3, 3), (3, 8), (5, 40)])
def test_starts_keep_sequences_apart(make_module, k1, k2, learned):
    """Rows that hold several sequences each, against the same sequences run one by one."""
    module, input, target = make_module(), random(T, B, INPUT), random(T, B, H)
    start = rk.init.LearnedState(module) if learned else None
    if learned:
        for parameter in start.parameters():
            torch.nn.init.normal_(parameter)
    begins = [[0], [0, 1, 7], [0, 7, 16]]
    starts = torch.zeros(T, B, dtype=torch.bool)
    for row, places in enumerate(begins):
        starts[places, row] = True
    windows = training.TruncatedBPTT(module, sum_of_squares, k1, k2, initial_state=start)
    owners = [module, start] if learned else [module]
    parameters = [p for owner in owners for p in owner.parameters()]
    found = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in windows(input, target, starts)]
    for begin, actual in zip(range(0, T, k1), found, strict=True):
        end, total = min(begin + k1, T), 0
        for row, places in enumerate(begins):
            for first, last in zip(places, [*places[1:], T], strict=True):
                if first >= end or last <= begin:
                    continue
                x, state = input[:, row : row + 1], start(1) if learned else None
                back = max(first, begin - (k2 - k1))
                if back > first:
                    state = detached(module(x[first:back], state)[1])
                output = module(x[back : min(last, end)], state)[0][max(first, begin) - back :]
                wanted = target[max(first, begin) : min(last, end), row : row + 1]
                total = total + sum_of_squares(output, wanted)
        expected = torch.autograd.grad(total, parameters, allow_unused=True)
        for one, other in zip(actual, expected, strict=True):
            one, other = (torch.zeros(()) if g is None else g for g in (one, other))
            torch.testing.assert_close(one.double(), other.double().expand_as(one), rtol=1e-9, atol=1e-12)


def test_truncated_bptt_of_a_language_model():
    """Integer inputs, an output layer, a model that is not a torch.nn layer, memory that does not grow."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.gru, self.head = torch.nn.Embedding(7, 4), rk.GRU(4, 16), torch.nn.Linear(16, 7)

        def forward(self, tokens, state):
            output, state = self.gru(self.embedding(tokens), state)
            return self.head(output), state

    model, tokens = Model(), (torch.arange(401).unsqueeze(1) + torch.tensor([0, 2, 4])) % 7  # a cycle, to be learned
    windows = training.TruncatedBPTT(
        model, lambda y, t: torch.nn.functional.cross_entropy(y.flatten(0, 1), t.flatten()), 10
    )
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.02), []
    with rk.diagnostics.measure_saved_tensors(exclude=model.parameters()) as saved:
        held = []
        for loss in windows(tokens[:-1], tokens[1:]):
            held.append(saved.current)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] > 1.8
    assert losses[-1] < 0.2
    assert len(set(held[1:])) == 1  # the first has no state before it


# ---------------------------------------------------------------- gradient accumulation


def masked_sum(module, input, target, mask):
    return ((module(input)[0] - target).square().sum(-1) * mask).sum(), mask.sum()


@pytest.mark.parametrize("sizes", [[8], [5, 3], [1, 6, 1], [1] * 8])
def test_accumulation_is_the_large_batch(make_module, sizes):
    module, input, target = make_module(), random(T, 8, INPUT), random(T, 8, H)
    mask = torch.arange(T).unsqueeze(1) < torch.tensor([17, 1, 3, 9, 17, 2, 16, 5])  # very unequal lengths
    total, count = masked_sum(module, input, target, mask)
    expected = gradients(total / count, module)
    parts = zip(*(tensor.split(sizes, dim=1) for tensor in (input, target, mask)), strict=True)
    loss = training.accumulate_gradients(module.parameters(), (masked_sum(module, *part) for part in parts))
    torch.testing.assert_close(loss, total.detach() / count, rtol=1e-12, atol=0)
    assert not loss.requires_grad
    assert_all_close([p.grad for p in module.parameters()], expected)


def test_accumulation_adds_to_what_is_there_and_leaves_others_alone():
    a, b, frozen = (torch.ones(2, requires_grad=r) for r in (True, True, False))
    a.grad = torch.tensor([10.0, 20.0])
    training.accumulate_gradients([a, b, frozen], [((a * 3).sum(), 2), ((a * 5).sum(), 2)])
    torch.testing.assert_close(a.grad, torch.tensor([12.0, 22.0]))
    assert b.grad is None
    b.grad = torch.ones(2)
    training.accumulate_gradients([a, b], [(a.sum(), 1)])
    torch.testing.assert_close(b.grad, torch.ones(2))


def test_accumulation_restores_after_an_error():
    a = torch.ones(2, requires_grad=True)
    a.grad = kept = torch.tensor([1.0, 2.0])

    def failing():
        yield a.sum(), 1
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        training.accumulate_gradients([a], failing())
    assert a.grad is kept
    with pytest.raises(ValueError, match=r"sums.*none"):
        training.accumulate_gradients([a], [])
    assert a.grad is kept


def test_accumulation_holds_one_graph_at_a_time():
    module, input = torch.nn.GRU(INPUT, H), torch.randn(T, 8, INPUT)
    peaks = []
    for size in (8, 1):
        with rk.diagnostics.measure_saved_tensors(exclude=module.parameters()) as saved:
            parts = ((module(x.clone())[0].square().sum(), x.shape[1]) for x in input.split(size, dim=1))
            training.accumulate_gradients(module.parameters(), parts)
        peaks.append(saved.peak)
    assert peaks[1] * 7 < peaks[0]


# ---------------------------------------------------------------- checkpointed BPTT


class CountAlive(TorchDispatchMode):
    """Bytes of all tensors that operators have made and that are still alive."""

    def __init__(self, *others):
        super().__init__()
        self.current = self.peak = 0
        self.known = weakref.WeakSet(other.untyped_storage() for other in others)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self.release, storage.nbytes()).atexit = False
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
        return result

    def release(self, size):
        self.current -= size


@pytest.mark.parametrize("segment_length", [None, 1, 4, 100])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_checkpointing_changes_nothing_but_memory(make_module, segment_length, given, batch_first):
    module, input = make_module(batch_first=batch_first), random(T, B, INPUT).requires_grad_()
    if batch_first:
        input = input.detach().transpose(0, 1).requires_grad_()
    hx = None
    if given:
        hx = module(random(B, 2, INPUT) if batch_first else random(2, B, INPUT))[1]
        hx = tuple(h.detach().requires_grad_() for h in hx) if isinstance(hx, tuple) else hx.detach().requires_grad_()
    output, state = module(input, hx)
    tested, tested_state = training.checkpointed_bptt(module, input, hx, segment_length=segment_length)
    torch.testing.assert_close(tested, output, rtol=1e-12, atol=1e-14)
    as_parts = lambda s: list(s) if isinstance(s, tuple) else [s]  # noqa: E731
    ends, tested_ends = [output, *as_parts(state)], [tested, *as_parts(tested_state)]
    cotangents = [torch.randn_like(end) for end in ends]
    sources = [input, *module.parameters(), *(as_parts(hx) if given else [])]
    assert_all_close(
        torch.autograd.grad(tested_ends, sources, cotangents), torch.autograd.grad(ends, sources, cotangents)
    )


def test_checkpointing_with_a_loss_and_with_dropout():
    module = torch.nn.GRU(INPUT, H, num_layers=2, dropout=0.5, dtype=torch.float64)
    input, target = random(T, B, INPUT), random(T, B, H)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        loss, _ = training.checkpointed_bptt(module, input, segment_length=6, loss=sum_of_squares, target=target)
        found.append((loss, gradients(loss, module)))
    assert found[0][0] == found[1][0]
    torch.manual_seed(3)
    state, total = None, 0
    for x, y in zip(input.split(6), target.split(6), strict=True):
        output, state = module(x, state)
        total = total + sum_of_squares(output, y)
    torch.testing.assert_close(found[0][0], total)
    assert_all_close(found[0][1], gradients(total, module))


@pytest.mark.parametrize("make", [rk.RNN, rk.GRU, rk.LSTM, torch.nn.LSTM])
def test_checkpointing_memory_grows_as_the_root(make):
    """The peak over forward and backward, at 16 times the length: 16 times without, about 4 times with checkpoints."""
    module, growth = make(INPUT, 32), {}
    for name in ("plain", "checkpointed"):
        peaks = []
        for length in (64, 1024):
            input, target = torch.randn(length, 8, INPUT), torch.randn(length, 8, 32)
            with CountAlive(input, target) as alive:
                if name == "plain":
                    loss = sum_of_squares(module(input)[0], target)
                else:
                    loss, _ = training.checkpointed_bptt(module, input, loss=sum_of_squares, target=target)
                loss.backward()
                del loss
            peaks.append(alive.peak)
        growth[name] = peaks[1] / peaks[0]
    assert growth["plain"] > 10
    assert growth["checkpointed"] < 6


# ---------------------------------------------------------------- auxiliary loss


@pytest.mark.parametrize("weight", [0, 0.3, 1])
def test_target_replication_by_loops(weight):
    losses, lengths = random(7, 4).square(), torch.tensor([7, 1, 4, 6])
    for given in (None, lengths):
        total = 0
        for b in range(4):
            steps = losses[: 7 if given is None else int(lengths[b]), b].tolist()
            total += ((1 - weight) * steps[-1] + weight * sum(steps) / len(steps)) / 4
        assert training.target_replication(losses, weight, given).item() == pytest.approx(total, rel=1e-12)


def test_target_replication_ignores_what_is_beyond_the_end():
    losses = torch.tensor([[1.0, 2.0], [3.0, math.nan]], requires_grad=True)
    value = training.target_replication(losses, 0.5, torch.tensor([2, 1]))
    value.backward()
    torch.testing.assert_close(value.detach(), torch.tensor(((3 + 2) / 2 + 2) / 2))
    torch.testing.assert_close(losses.grad, torch.tensor([[0.125, 0.5], [0.375, 0.0]]))


# ---------------------------------------------------------------- bad input

rnn, x, y = rk.RNN(INPUT, H), torch.randn(4, B, INPUT), torch.randn(4, B, H)
windows = training.TruncatedBPTT(rnn, mse_loss, 2)


def after_another_batch():
    stream = training.TruncatedBPTT(rnn, mse_loss, 2)
    list(stream(x, y))
    stream(x[:, :1], y[:, :1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: training.TruncatedBPTT(rnn, mse_loss, 0), ValueError, "k1.*0"),
        (lambda: training.TruncatedBPTT(rnn, mse_loss, 5, 4), ValueError, "k2.*at least 5.*4"),
        (lambda: windows([1.0], y), TypeError, "input.*list"),
        (lambda: windows(x[:, 0, 0], y), ValueError, r"input.*\(4,\)"),
        (lambda: windows(x, y[:3]), ValueError, r"target.*\(4, 3\).*\(3, 3, 5\)"),
        (lambda: windows(x, y, torch.zeros(4, B)), TypeError, "starts.*bool.*float32"),
        (lambda: windows(x, y, torch.zeros(4, 2, dtype=torch.bool)), ValueError, r"starts.*\(4, 3\).*\(4, 2\)"),
        (after_another_batch, ValueError, "input.*3 sequences.*got 1"),
        (lambda: training.checkpointed_bptt(rnn, x[:0]), ValueError, "input.*one"),
        (lambda: training.checkpointed_bptt(rnn, x, segment_length=0), ValueError, "segment_length.*0"),
        (lambda: training.checkpointed_bptt(rnn, x, loss=mse_loss), ValueError, "loss, target"),
        (lambda: training.checkpointed_bptt(rnn, x, loss=mse_loss, target=y[:1]), ValueError, r"target.*\(1, 3, 5\)"),
        (lambda: training.target_replication(torch.ones(4)), ValueError, r"losses.*\(4,\)"),
        (lambda: training.target_replication(torch.ones(0, 2)), ValueError, r"losses.*\(0, 2\)"),
        (lambda: training.target_replication(torch.ones(4, 2), 1.5), ValueError, "weight.*1.5"),
        (lambda: training.target_replication(torch.ones(4, 2), 0.5, torch.ones(3)), ValueError, r"lengths.*\(2,\)"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()
