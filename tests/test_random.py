"""The generator of masks: its bits beside Python's integers, its statistics, and the same bits in Triton."""

import math

import hypothesis
import numpy as np
import pytest
import squares
import torch
from hypothesis import strategies as st

import rnnkernels as rk
from rnnkernels.kernels.eager import random

SEEDS = st.integers(-(2**63), 2**63 - 1)


def as_signed(word):
    return word - 2**64 if word >= 2**63 else word


def test_the_streams_are_those_of_the_witness():
    names = "RECURRENT", "ZONEOUT", "ZONEOUT_CELL", "ELEMENTS"
    assert [getattr(random, name) for name in names] == [getattr(squares, name) for name in names]


@hypothesis.given(seed=SEEDS)
def test_keys_are_those_of_splitmix(seed):
    key = random.key_of(seed)
    assert key == as_signed(squares.key_of(seed))
    assert key % 2 == 1
    assert -(2**63) <= key < 2**63


def test_published_values_of_splitmix():
    # The first outputs for seed 1234567. The state advances by the golden ratio's increment from one to the next, and
    # our keys have their last bit set.
    outputs = 6457827717110365317, 3203168211198807973, 9817491932198370423
    for position, output in enumerate(outputs):
        state = (1234567 + position * 0x9E3779B97F4A7C15) % 2**64
        assert squares.key_of(state) == output | 1


@hypothesis.given(seed=SEEDS, counters=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20))
def test_bits_are_those_of_pythons_integers(seed, counters):
    actual = random.bits(torch.tensor(counters), random.key_of(seed)).tolist()
    assert actual == [squares.bits(counter, squares.key_of(seed)) for counter in counters]


@pytest.mark.parametrize("stream", range(4))
@pytest.mark.parametrize("probability", [0.0, 1e-3, 0.3, 0.5, 1.0])
def test_masks_are_those_of_pythons_integers(stream, probability):
    expected = squares.dropped(11, stream, probability, (3, 5, 17))
    actual = random.dropped(random.key_of(11), stream, probability, (3, 5, 17), "cpu")
    np.testing.assert_array_equal(actual, expected)
    kept = random.kept(random.key_of(11), stream, probability, (3, 5, 17), torch.zeros((), dtype=torch.float64))
    scale = 0 if probability == 1 else 1 / (1 - probability)
    np.testing.assert_array_equal(kept, np.where(expected, 0, scale))


def test_masks_longer_than_a_block_go_on_counting():
    size = random._BLOCK + 100
    mask = random.dropped(random.key_of(1), random.ELEMENTS, 0.5, (size,), "cpu")
    key, first = squares.key_of(1), squares.ELEMENTS * 2**56
    for index in (0, random._BLOCK - 1, *range(random._BLOCK, size)):
        assert mask[index].item() == (squares.bits(first + index, key) < 2**31)


@pytest.mark.parametrize("shared", [False, True])
def test_dropout_takes_its_own_stream(shared):
    input = torch.randn(4, 3, 5, dtype=torch.float64)
    dropped = squares.dropped(2, squares.ELEMENTS, 0.4, (3, 5) if shared else (4, 3, 5))
    expected = np.where(dropped, 0, input / 0.6)
    np.testing.assert_allclose(random.dropout(input, 0.4, random.key_of(2), shared), expected)


def values(seed, count, stream=random.ELEMENTS):
    counters = torch.arange(count) + (stream << 56)
    return random.bits(counters, random.key_of(seed))


@pytest.mark.parametrize("seed", [0, 1, 2, -1, 2**62])
def test_bits_are_uniform(seed):
    count = 2**18
    x = values(seed, count)
    assert x.min() >= 0
    assert x.max() < 2**32
    # Every bit is set half of the time, and the top byte takes each value equally often (chi-squared, 255 degrees).
    ones = torch.stack([(x >> bit & 1).double().mean() for bit in range(32)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / math.sqrt(count)
    for shift in (24, 0):
        observed = torch.bincount(x >> shift & 255, minlength=256).double()
        statistic = float(((observed - count / 256).square() / (count / 256)).sum())
        assert abs(statistic - 255) < 5 * math.sqrt(2 * 255)
    assert len(x.unique()) > count - 2 * count**2 / 2**33 - 30  # collisions as often as among random words


@pytest.mark.parametrize("lag", [1, 2, 3, 17, 64, 128, 1024])
def test_neighbours_are_independent(lag):
    x = values(3, 2**18).double() / 2**32 - 0.5
    correlation = float((x[lag:] * x[:-lag]).mean() * 12)
    assert abs(correlation) < 5 / math.sqrt(2**18)


def test_seeds_and_streams_are_independent():
    count = 2**16
    families = [values(seed, count) for seed in range(8)] + [values(0, count, stream) for stream in range(3)]
    centred = torch.stack(families).double() / 2**32 - 0.5
    correlations = centred @ centred.t() * 12 / count
    off_diagonal = correlations - torch.diag(correlations.diagonal())
    assert off_diagonal.abs().max() < 5 / math.sqrt(count)
    # Bit for bit too: seeds next to each other differ in half of the bits.
    changed = sum((families[0] ^ families[1]) >> bit & 1 for bit in range(32)).double().mean()
    assert abs(float(changed) - 16) < 5 * math.sqrt(8 / count)


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_the_rate_of_dropped_elements(probability):
    count = 2**18
    mask = random.dropped(random.key_of(5), random.ELEMENTS, probability, (count,), "cpu")
    assert abs(float(mask.double().mean()) - probability) < 5 * math.sqrt(probability * (1 - probability) / count)


@pytest.fixture
def on_triton(kernel_device):
    from rnnkernels.kernels.triton import random as triton_random

    return triton_random, kernel_device


# The interpreter computes in NumPy, which warns where 64-bit products wrap around as they must.
wraps = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@wraps
@pytest.mark.interpreter
@pytest.mark.parametrize("stream", range(4))
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 123456789])
def test_triton_draws_the_same_bits(on_triton, seed, stream):
    triton_random, device = on_triton
    key, like = random.key_of(seed), torch.zeros((), device=device)
    for probability in (0.3, 1.0):
        actual = triton_random.kept(key, stream, probability, (3, 7, 129), like)
        expected = random.kept(key, stream, probability, (3, 7, 129), torch.zeros(()))
        assert torch.equal(actual.cpu(), expected)


@wraps
@pytest.mark.interpreter
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_on_triton_gives_the_same_bits(kernel_device, dtype, shared):
    input = torch.randn(5, 3, 1025, device=kernel_device).to(dtype).requires_grad_()
    gradients = []
    for backend in ("triton", "eager"):
        with rk.use_backend(backend):
            output = rk.ops.dropout(input, 0.3, seed=9, shared=shared)
            gradients += [output, *torch.autograd.grad(output, input, torch.ones_like(output))]
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[1], gradients[3])
    assert torch.equal(gradients[0], input * gradients[1])
