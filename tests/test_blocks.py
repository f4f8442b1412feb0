"""The backward passes on a CPU work through a sequence block by block: no boundary between blocks may show."""

import itertools

import pytest
import torch
from parity import GATES, arguments, assert_parity, random_lengths
from test_options import EVERYTHING, case

from rnnkernels.kernels.eager import variable_length


@pytest.fixture(params=[1, 300])
def small_blocks(request, monkeypatch):
    """One step in a block, or a few: with more, the sequences of these tests would fit in one."""
    monkeypatch.setattr(variable_length, "_IN_CACHE", request.param)


@pytest.mark.parametrize("order", [None, "sorted", "unsorted"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("operator", list(GATES))
def test_plain_cells(small_blocks, operator, reverse, order):
    tensors = arguments(11, 3, 2, 5, torch.float64, operator=operator)
    lengths = None if order is None else random_lengths(3, 11, order)
    assert_parity(tensors, 1e-11, operator, reverse=reverse, lengths=lengths)


@pytest.mark.parametrize(("operator", "reverse"), list(itertools.product(GATES, (False, True))))
def test_every_option_at_once(small_blocks, operator, reverse):
    tensors, options = case(operator, EVERYTHING[operator], (11, 3, 2, 5))
    assert_parity(tensors, 1e-10, operator, **{**options, "reverse": reverse})


def test_blocks_are_the_sequence_in_order():
    for steps, width, from_the_first in itertools.product((1, 7, 100), (1, 10**4, 10**6), (True, False)):
        blocks = variable_length.blocks([3] * steps, width, from_the_first)
        blocks = blocks if from_the_first else blocks[::-1]
        assert list(itertools.chain.from_iterable(range(b.start, b.stop) for b in blocks)) == list(range(steps))
