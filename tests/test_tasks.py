"""The synthetic tasks: each target is what the task's words say, found anew in plain Python."""

import math

import pytest
import torch

from rnnkernels.data import (
    adding_problem,
    copying_memory,
    dyck_language,
    parity,
    selective_recall,
    trivial_score,
)
from rnnkernels.data.tasks import IGNORED

TASKS = {
    "copying_memory": lambda **options: copying_memory(40, (3, 9), **options),
    "adding_problem": lambda **options: adding_problem(40, (5, 17), **options),
    "parity": lambda **options: parity(40, (5, 17), **options),
    "dyck_language": lambda **options: dyck_language(40, (6, 30), **options),
    "selective_recall": lambda **options: selective_recall(40, (3, 9), **options),
}


def sequences(batch):
    """Input and target of each sequence, as lists without padding."""
    for b, length in enumerate(batch.lengths.tolist()):
        assert not batch.input[length:, b].any()
        if batch.target.dim() == 2:
            assert (batch.target[length:, b] == IGNORED).all()
            yield batch.input[:length, b].tolist(), batch.target[:length, b].tolist()
        else:
            yield batch.input[:length, b].tolist(), batch.target[b].item()


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_batch(task):
    first, second, other = (TASKS[task](generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first.input.shape != other.input.shape or not torch.equal(first.input, other.input)
    torch.manual_seed(3)
    default = TASKS[task]()
    torch.manual_seed(3)
    assert torch.equal(TASKS[task]().input, default.input)


@pytest.mark.parametrize("task", TASKS)
def test_lengths_vary_and_reach_both_bounds(task):
    lengths = torch.cat([TASKS[task]().lengths for _ in range(10)])
    bounds = {"copying_memory": (23, 29), "dyck_language": (6, 30), "selective_recall": (10, 28)}
    assert (int(lengths.min()), int(lengths.max())) == bounds.get(task, (5, 17))
    batch = TASKS[task]()
    assert batch.input.shape[:2] == (int(batch.lengths.max()), 40)
    assert batch.lengths.dtype == torch.int64


def test_copying_memory():
    for input, target in sequences(copying_memory(50, (1, 20), symbols=4, alphabet=5)):
        delay = len(input) - 8
        string, rest = input[:4], input[4:]
        assert all(1 <= token <= 5 for token in string)
        assert rest == [0] * delay + [6] + [0] * 3
        assert target == [IGNORED] * (4 + delay) + [token - 1 for token in string]


def test_adding_problem():
    for input, target in sequences(adding_problem(200, (2, 13))):
        marked = [i for i, (_, mark) in enumerate(input) if mark]
        assert len(marked) == 2
        assert marked[0] < len(input) // 2 <= marked[1]
        assert target == pytest.approx(sum(input[i][0] for i in marked))
    _, target, _ = adding_problem(100_000, 2)
    error = (target - 1).square().mean().item()
    assert error == pytest.approx(trivial_score("adding_problem")["mean_squared_error"], rel=0.02)


def test_parity():
    for input, target in sequences(parity(50, (1, 30))):
        assert target == [sum(input[: t + 1]) % 2 for t in range(len(input))]


@pytest.mark.parametrize(("kinds", "depth"), [(1, 1), (2, 4), (3, 2)])
def test_dyck_language(kinds, depth):
    deepest = 0
    for input, target in sequences(dyck_language(100, (2, 40), kinds=kinds, depth=depth)):
        stack, expected = [], [IGNORED] * len(input)
        for t, token in enumerate(input):
            if token < kinds:
                stack.append(token)
            else:
                assert stack.pop() == token - kinds
                expected[t - 1] = token - kinds
            deepest = max(deepest, len(stack))
        assert not stack
        assert target == expected
    assert deepest == depth


@pytest.mark.parametrize("queries", [None, 2])
def test_selective_recall(queries):
    for input, target in sequences(selective_recall(50, (2, 6), keys=6, values=3, queries=queries)):
        cut = input.index(9)
        pairs = dict(zip(input[:cut:2], input[1:cut:2], strict=True))
        assert len(pairs) == cut // 2
        questions = input[cut + 1 :]
        assert len(questions) == len(set(questions)) == (queries or len(pairs))
        assert target == [IGNORED] * (cut + 1) + [pairs[key] - 6 for key in questions]


@pytest.mark.parametrize("task", ["copying_memory", "parity", "dyck_language", "selective_recall"])
def test_classes_are_balanced_so_that_a_guess_has_the_trivial_score(task):
    targets = torch.cat([batch.target[batch.target != IGNORED] for batch in (TASKS[task]() for _ in range(40))])
    score = trivial_score(task)
    shares = targets.bincount() / len(targets)
    assert len(shares) == round(1 / score["accuracy"])
    assert shares.max().item() == pytest.approx(score["accuracy"], rel=0.2)
    assert score["cross_entropy"] == pytest.approx(math.log(len(shares)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: copying_memory(0, 3), ValueError, "batch must be at least 1"),
        (lambda: copying_memory(2, 0), ValueError, "delay must be at least 1"),
        (lambda: copying_memory(2, (5, 3)), ValueError, r"delay must be .* ascending order, got \(5, 3\)"),
        (lambda: copying_memory(2, 2.5), TypeError, "delay must be an int, got float"),
        (lambda: adding_problem(2, 1), ValueError, "length must be at least 2"),
        (lambda: adding_problem(2, (1, 2, 3)), ValueError, "length must be an int or a pair, got 3 values"),
        (lambda: dyck_language(2, 5), ValueError, "length must be even, got 5"),
        (lambda: dyck_language(2, 4, depth=0), ValueError, "depth must be at least 1"),
        (lambda: selective_recall(2, 5, keys=4), ValueError, "pairs must be at most keys = 4, got 5"),
        (lambda: selective_recall(2, 3, queries=4), ValueError, "queries must be at most the fewest pairs, 3, got 4"),
        (lambda: trivial_score("chess"), ValueError, "task must be one of .*, got 'chess'"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
