"""The decoder-only Transformer beside ``torch.nn.TransformerEncoder`` under a causal mask."""

import copy

import pytest
import torch
from parity import random_lengths

import rnnkernels as rk
from rnnkernels.nn.transformer import rotate


def make(*args, dtype=torch.float64, **kwargs):
    return rk.Transformer(*args, dtype=dtype, **kwargs)


POSITIONS = [{"positions": "rotary"}, {"positions": "learned", "max_length": 40}, {"positions": "none"}]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("sequence_length", "batch"), [(1, 1), (17, 3)])
def test_without_positions_it_is_torchs_encoder_under_a_causal_mask(sequence_length, batch, batch_first, bias):
    options = {"dropout": 0.0, "batch_first": batch_first, "bias": bias, "dtype": torch.float64}
    layer = torch.nn.TransformerEncoderLayer(12, 3, 20, activation="gelu", norm_first=True, **options)
    norm = torch.nn.LayerNorm(12, bias=bias, dtype=torch.float64)
    theirs = torch.nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ours = make(12, 3, 2, 20, batch_first=batch_first, bias=bias, positions="none")
    ours.load_state_dict(theirs.state_dict())
    shape = (batch, sequence_length, 12) if batch_first else (sequence_length, batch, 12)
    x = torch.randn(shape).double().requires_grad_()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(sequence_length, dtype=torch.float64)
    expected = theirs(x, mask=mask, is_causal=True)
    output, _ = ours(x)
    torch.testing.assert_close(output, expected)
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, [x, *ours.parameters()], cotangent)
    named = dict(theirs.named_parameters())
    others = torch.autograd.grad(expected, [x, *(named[name] for name, _ in ours.named_parameters())], cotangent)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", POSITIONS, ids=str)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_decoding_from_a_cache_gives_the_same(options, with_gradients):
    transformer = make(8, 2, 2, **options)
    x = torch.randn(30, 2, 8).double()
    with torch.set_grad_enabled(with_gradients):
        expected, _ = transformer(x)
        cache, outputs = None, []
        for part in (x[:7], *x[7:].unsqueeze(1)):
            output, cache = transformer(part, cache)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs), expected)
        assert cache.length == 30
        assert cache.bytes() == 30 * 2 * 8 * 8 * 2 * 2
        if with_gradients:
            gradients = (
                torch.autograd.grad(y, transformer.norm.weight, retain_graph=True)
                for y in (expected.square().sum(), torch.cat(outputs).square().sum())
            )
            torch.testing.assert_close(*gradients)


def test_a_copied_cache_goes_its_own_way():
    transformer = make(8, 2)
    x, one, other = torch.randn(5, 1, 8).double(), torch.randn(3, 1, 8).double(), torch.randn(3, 1, 8).double()
    with torch.no_grad():
        _, cache = transformer(x)
        branch = copy.deepcopy(cache)
        transformer(one, cache)
        output, _ = transformer(other, branch)
        torch.testing.assert_close(output, transformer(torch.cat([x, other]))[0][5:])


@pytest.mark.parametrize("options", POSITIONS, ids=str)
def test_no_step_sees_the_future_nor_the_padding(options):
    transformer = make(8, 2, 2, **options)
    x, lengths = torch.randn(20, 4, 8).double(), random_lengths(4, 20)
    output, _ = transformer(x, lengths=lengths)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(output[:length, b : b + 1], transformer(x[:length, b : b + 1])[0])
        assert not output[length:, b].any()


def test_rotations_depend_on_distance_alone():
    query, key = torch.randn(2, 1, 6).double().unbind(0)
    for distance in (0, 1, 17):
        products = [(rotate(query, first + distance) * rotate(key, first)).sum() for first in (0, 5, 3000)]
        torch.testing.assert_close(products[0].expand(3), torch.stack(products))
    # The complex form of the paper's equation 14.
    x = torch.randn(9, 6).double()
    pairs = torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous())
    angle = torch.arange(4, 13).double().unsqueeze(1) * 10000.0 ** (-torch.arange(3).double() / 3)
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    torch.testing.assert_close(rotate(x, 4), expected)


def test_positions_matter():
    # Without positions, the last step does not know in which order the others came.
    x = torch.randn(9, 1, 8).double()
    shuffled = torch.cat([x[:8].flip(0), x[8:]])
    for options in POSITIONS:
        transformer = make(8, 2, **options)
        same = torch.allclose(transformer(x)[0][-1], transformer(shuffled)[0][-1])
        assert same == (options["positions"] == "none")


def test_dropout_in_training_alone():
    transformer = make(8, 2, 2, dropout=0.5, dtype=torch.float32)
    x = torch.randn(6, 2, 8)
    torch.manual_seed(1)
    first = transformer(x)[0]
    torch.manual_seed(1)
    assert torch.equal(transformer(x)[0], first)
    assert not torch.equal(transformer(x)[0], first)
    transformer.eval()
    assert torch.equal(transformer(x)[0], transformer(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    transformer = make(16, 2, 2)
    x = torch.randn(20, 2, 16).double()
    expected = transformer(x)[0]
    output, _ = transformer.to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 0.02)


def test_compiles_without_graph_breaks():
    transformer = make(8, 2, 2, dtype=torch.float32)

    def train(x):
        return transformer(x)[0]

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 2, 8)
    torch.testing.assert_close(compiled(x), train(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"d_model": 0}, ValueError, "d_model: expected at least 1, got 0"),
        ({"num_layers": 1.5}, TypeError, "num_layers: expected an int, got float"),
        ({"nhead": 3}, ValueError, "nhead: expected a divisor of d_model = 8, got 3"),
        ({"nhead": 8}, ValueError, "nhead: expected heads of an even size for rotary positions, got 1"),
        ({"dropout": -1.0}, ValueError, "dropout: expected a probability"),
        ({"positions": "sine"}, ValueError, "positions: expected one of 'rotary', 'learned', 'none', got 'sine'"),
        ({"positions": "learned"}, ValueError, "max_length: expected an int with learned positions, got None"),
        ({"max_length": 8}, ValueError, "max_length: expected None with 'rotary', got 8"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        rk.Transformer(**{"d_model": 8, "nhead": 2, **arguments})


def test_bad_input_is_refused_by_name():
    transformer = make(8, 2, positions="learned", max_length=5)
    x = torch.randn(4, 2, 8).double()
    _, cache = transformer(x)
    for call, error, message in (
        (lambda: transformer([0.0]), TypeError, "input: expected a Tensor, got list"),
        (lambda: transformer(x[..., :4]), ValueError, r"input: expected shape \(sequence_length, batch, 8\), got"),
        (lambda: transformer(x, x), TypeError, "cache: expected a KeyValueCache, got Tensor"),
        (lambda: transformer(x, cache), ValueError, "input: expected at most max_length = 5 steps in all, got 8"),
        (lambda: transformer(x, lengths=torch.tensor([5, 1])), ValueError, "lengths: expected 1 to 4 steps"),
    ):
        with pytest.raises(error, match=message):
            call()
