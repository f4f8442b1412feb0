"""What the recurrences in PyTorch are built of."""

import itertools
import weakref

import pytest
import torch

from rnnkernels.kernels.eager import products
from rnnkernels.kernels.eager.packing import previous_rows
from rnnkernels.kernels.eager.variable_length import each_step, order_of_steps

COUNTS = {
    "alike": [3] * 5,
    "one": [1],
    "falling": [4, 4, 2, 1, 1],
    "many": [2] * 400,
    "many, then none": [5, *[3] * 300, 0],
}
of_every_kind = pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [1, 2, 7, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_in_parts(three_threads, rows, transposed):
    torch.manual_seed(rows)
    weight = torch.randn(*(768, 900)[:: -1 if transposed else 1])
    weight = weight.t() if transposed else weight
    product = products.Recurrent(weight, rows)
    assert product.parts == 3
    state, wide = torch.randn(rows, 900), torch.randn(rows, 1000)
    addend = wide[:, :768]
    expected = addend.double() + state.double() @ weight.double().t()
    for out in (torch.full((rows, 768), torch.nan), addend):  # apart, and in place
        torch.testing.assert_close(product(state, addend, out).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(addend.double(), expected, rtol=1e-5, atol=1e-4)


def test_when_a_product_is_in_parts(three_threads):
    assert products.Recurrent(torch.randn(768, 900), 9).parts == 1
    assert products.Recurrent(torch.randn(768, 600), 1).parts == 1
    assert products.Recurrent(torch.randn(767, 900), 1).parts == 1


@pytest.mark.parametrize("reverse", [False, True])
@of_every_kind
def test_steps_come_in_order_with_their_rows(counts, reverse):
    starts = [0, *itertools.accumulate(counts)]
    numbers = torch.arange(starts[-1])
    for steps in (slice(0, len(counts)), slice(len(counts) // 3, len(counts) - len(counts) // 4)):
        part = numbers[starts[steps.start] : starts[steps.stop]]
        found = [(t, a.tolist(), b.tolist()) for t, (a, b) in each_step((part, -part), counts, steps, reverse)]
        order = range(len(counts))[steps][:: -1 if reverse else 1]
        expected = [list(range(starts[t], starts[t + 1])) for t in order]
        assert found == [(t, rows, [-row for row in rows]) for t, rows in zip(order, expected, strict=True)]


def test_few_views_exist_at_once():
    views, most = weakref.WeakSet(), 0
    for _, parts in each_step((torch.randn(3000, 2), torch.randn(3000, 3)), [1] * 3000, slice(0, 3000), False):
        views.update(parts)
        most = max(most, len(views))
    assert most < 700  # from which on Python's collector looks for garbage


@pytest.mark.parametrize("reverse", [False, True])
@of_every_kind
def test_rows_before_some_steps(counts, reverse):
    starts = [0, *itertools.accumulate(counts)]
    states, h_0 = torch.randn(starts[-1], 2), torch.randn(counts[0], 2)
    before, expected = h_0.clone(), {}
    for t in order_of_steps(len(counts), reverse):
        expected[t] = before[: counts[t]].clone()
        before[: counts[t]] = states[starts[t] : starts[t + 1]]
    for start, stop in {(0, len(counts)), (0, 1), (len(counts) - 1, len(counts)), (len(counts) // 3, len(counts))}:
        found = previous_rows(states, h_0, counts, starts, slice(start, stop), reverse)
        torch.testing.assert_close(found, torch.cat([expected[t] for t in range(start, stop)]), rtol=0, atol=0)
