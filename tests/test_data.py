"""Data sets, splits, and batches: against NumPy, against the definitions, and against leaks."""

import sys

import numpy as np
import pytest
import torch

from rnnkernels.data import (
    Standardizer,
    Vocabulary,
    forecast_windows,
    pydoc_topics,
    split,
    sunspots,
    token_streams,
    token_windows,
)


def squeezed_paragraphs(text):
    return [" ".join(p.split()) for p in text.split("\n\n")]


# ---------------------------------------------------------------- text


def test_pydoc_topics_keeps_each_paragraph_once_and_loses_none():
    everything, unique = pydoc_topics(unique=False), pydoc_topics()
    paragraphs = squeezed_paragraphs(unique)
    assert len(paragraphs) == len(set(paragraphs))
    assert set(paragraphs) == set(squeezed_paragraphs(everything))
    assert len(unique) < 0.95 * len(everything)  # the copies are worth removing in every version of Python


def test_pydoc_topics_holds_the_words_of_the_standard_library():
    from pydoc_data.topics import topics

    expected = sum(len(topic.split()) for topic in topics.values())
    assert len(pydoc_topics(unique=False).split()) == expected
    assert expected > 40_000


def test_pydoc_topics_keeps_first_copies_in_order():
    everything = squeezed_paragraphs(pydoc_topics(unique=False))
    assert squeezed_paragraphs(pydoc_topics()) == list(dict.fromkeys(everything))


def test_pydoc_topics_without_the_standard_library_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ImportError, match="pydoc_data"):
        pydoc_topics()


def test_vocabulary_round_trip_on_the_real_text():
    text = pydoc_topics()
    vocabulary = Vocabulary.from_text(text)
    tokens = vocabulary.encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(text),)
    assert tokens.min() >= 1
    assert tokens.max() == len(vocabulary) - 1
    assert vocabulary.decode(tokens) == text
    assert tokens.unique().tolist() == list(range(1, len(vocabulary)))


def test_vocabulary_sends_every_unseen_character_to_zero():
    vocabulary = Vocabulary.from_text("hello")
    assert vocabulary.characters == (Vocabulary.UNKNOWN, "e", "h", "l", "o")
    assert vocabulary.encode("jello\n").tolist() == [0, 1, 3, 3, 4, 0]
    assert vocabulary.decode([0, 1]) == Vocabulary.UNKNOWN + "e"
    assert vocabulary.encode(Vocabulary.UNKNOWN).tolist() == [0]
    assert vocabulary.encode("").shape == (0,)
    assert vocabulary.decode(torch.tensor([], dtype=torch.int64)) == ""


def test_vocabulary_from_text_that_holds_the_unknown_sign():
    assert len(Vocabulary.from_text("a" + Vocabulary.UNKNOWN)) == 2


def test_vocabulary_keeps_the_order_it_is_given():
    vocabulary = Vocabulary("zya")
    assert vocabulary.encode("ayz").tolist() == [3, 2, 1]
    assert repr(vocabulary) == "Vocabulary('zya')"


@pytest.mark.parametrize(
    ("characters", "error", "message"),
    [
        (["a", 1], TypeError, "strings, got int"),
        (["ab"], ValueError, "single characters, got 'ab'"),
        ("aa", ValueError, "distinct"),
        (["\N{REPLACEMENT CHARACTER}"], ValueError, "unknown"),
    ],
)
def test_vocabulary_rejects(characters, error, message):
    with pytest.raises(error, match=message):
        Vocabulary(characters)


def test_vocabulary_rejects_what_it_cannot_translate():
    vocabulary = Vocabulary("ab")
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        vocabulary.encode(b"ab")
    with pytest.raises(TypeError, match="text must be a str, got list"):
        Vocabulary.from_text(["a"])
    with pytest.raises(ValueError, match=r"0\.\.2, got 1\.\.3"):
        vocabulary.decode([1, 3])
    with pytest.raises(ValueError, match=r"0\.\.2, got -1\.\.0"):
        vocabulary.decode([-1, 0])
    with pytest.raises(TypeError, match=r"integers, got dtype torch\.float32"):
        vocabulary.decode([0.5])
    with pytest.raises(ValueError, match=r"1 dimension\(s\), got shape \(1, 2\)"):
        vocabulary.decode([[0, 1]])


# ---------------------------------------------------------------- split


@pytest.mark.parametrize("n", [9, 10, 11, 309, 1001])
@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.1), (0.5, 0.5), (1.0,), (1 / 3, 1 / 3, 1 / 3)])
def test_split_is_ordered_complete_and_close_to_its_fractions(n, fractions):
    parts = split(list(range(n)), fractions)
    assert [x for part in parts for x in part] == list(range(n))
    ends = np.cumsum([len(part) for part in parts])
    assert np.abs(ends - n * np.cumsum(fractions)).max() <= 0.5 + 1e-9


def test_split_cuts_tensors_along_time_and_strings_alike():
    series = torch.randn(20, 3)
    assert torch.equal(torch.cat(split(series)), series)
    assert [len(part) for part in split(series)] == [16, 2, 2]
    assert "".join(split("a" * 16 + "bbcc")) == "a" * 16 + "bbcc"


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.5, -0.5), (1.0, 0.0), (float("nan"), 1.0)])
def test_split_rejects_fractions(fractions):
    with pytest.raises(ValueError, match="fractions must be positive"):
        split("abcdefghij", fractions)


def test_split_rejects_sequences():
    with pytest.raises(ValueError, match="length 3 is too short for 3"):
        split("abc")
    with pytest.raises(TypeError, match="got generator"):
        split(x for x in "abc")
    with pytest.raises(TypeError, match="got dict"):
        split({"a": 1})


# ---------------------------------------------------------------- batches of tokens


@pytest.mark.parametrize(("n", "batch_size"), [(2, 1), (10, 3), (11, 3), (101, 7), (64, 63)])
def test_token_streams_are_contiguous_and_shifted_by_one(n, batch_size):
    tokens = torch.randint(50, (n,))
    inputs, targets = token_streams(tokens, batch_size)
    steps = (n - 1) // batch_size
    assert inputs.shape == targets.shape == (steps, batch_size)
    assert torch.equal(inputs.T.flatten(), tokens[: steps * batch_size])
    assert torch.equal(targets.T.flatten(), tokens[1 : steps * batch_size + 1])
    assert inputs.is_contiguous()
    assert targets.is_contiguous()


def test_carrying_the_state_over_stream_chunks_equals_one_pass():
    """What the streams are for: chunks with a carried state give the outputs of the unbroken sequence."""
    tokens = torch.randint(9, (85,))
    inputs, _ = token_streams(tokens, 4)
    embedding, rnn = torch.nn.Embedding(9, 5).double(), torch.nn.RNN(5, 6).double()
    whole, _ = rnn(embedding(inputs))
    state, pieces = None, []
    for chunk in inputs.split(8):
        output, state = rnn(embedding(chunk), state)
        pieces.append(output)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-12, atol=1e-12)


def test_token_windows_are_pieces_of_the_text():
    tokens = torch.randint(1000, (300,))
    every = np.lib.stride_tricks.sliding_window_view(tokens.numpy(), 18)
    known = {tuple(row) for row in every}
    inputs, targets = token_windows(tokens, 17, 64)
    assert inputs.shape == targets.shape == (17, 64)
    for b in range(64):
        assert (*inputs[:, b].tolist(), targets[-1, b].item()) in known
    assert torch.equal(inputs[1:], targets[:-1])


def test_token_windows_reach_both_ends_and_obey_the_generator():
    tokens = torch.arange(12)
    starts = token_windows(tokens, 10, 200)[0][0]
    assert starts.unique().tolist() == [0, 1]  # 12 tokens hold two windows of 10 with a target each
    one = token_windows(tokens, 3, 5, generator=torch.Generator().manual_seed(1))
    two = token_windows(tokens, 3, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: token_streams([1, 2, 3], 1), TypeError, "tokens must be a torch.Tensor, got list"),
        (lambda: token_streams(torch.zeros(5), 1), TypeError, "tokens must be integers, got dtype torch.float32"),
        (lambda: token_streams(torch.arange(6).view(2, 3), 1), ValueError, r"tokens must have 1 .* shape \(2, 3\)"),
        (lambda: token_streams(torch.arange(5), 0), ValueError, "batch_size must be at least 1, got 0"),
        (lambda: token_streams(torch.arange(5), 2.0), TypeError, "batch_size must be an int, got float"),
        (lambda: token_streams(torch.arange(5), True), TypeError, "batch_size must be an int, got bool"),
        (lambda: token_streams(torch.arange(5), 5), ValueError, "at least batch_size [+] 1 = 6 tokens, got 5"),
        (lambda: token_windows(torch.arange(5), 5, 1), ValueError, "more than length = 5 tokens, got 5"),
        (lambda: token_windows(torch.arange(5), -1, 1), ValueError, "length must be at least 1, got -1"),
        (lambda: token_windows(torch.ones(5, dtype=torch.bool), 2, 1), TypeError, "integers, got dtype torch.bool"),
    ],
)
def test_token_batches_reject(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------- time series


def test_sunspots_are_the_published_series():
    pytest.importorskip("statsmodels")
    years, numbers = sunspots()
    assert torch.equal(years, torch.arange(1700, 2009))
    assert years.dtype == torch.int64
    assert numbers.dtype == torch.float32
    # Yearly means of the Zurich series, as printed by NOAA: 1700, the maximum of 1957, the end of the record.
    known = {1700: 5.0, 1750: 83.4, 1957: 190.2, 2000: 119.6, 2008: 2.9}
    for year, number in known.items():
        assert numbers[years == year].item() == pytest.approx(number, abs=1e-4)


def test_sunspots_repeat_after_about_eleven_years():
    pytest.importorskip("statsmodels")
    numbers = sunspots()[1].double().numpy()
    centred = numbers - numbers.mean()
    correlation = np.correlate(centred, centred, "full")[len(centred) - 1 :]
    assert 5 + correlation[5:17].argmax() in (10, 11)


def test_sunspots_without_statsmodels_say_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "rnnkernels\[data\]"'):
        sunspots()


@pytest.mark.parametrize("shape", [(50,), (50, 3)])
def test_standardizer_against_numpy(shape):
    train, test = 5 + 3 * torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    standardizer = Standardizer.fit(train)
    expected = (test.numpy() - train.numpy().mean(axis=0)) / train.numpy().std(axis=0)
    np.testing.assert_allclose(standardizer(test).numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(standardizer.inverse(standardizer(test)), test, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(standardizer(train).numpy().std(axis=0), 1.0, rtol=1e-12)


def test_standardizer_knows_nothing_of_later_values():
    train = torch.arange(10.0)
    assert torch.equal(Standardizer.fit(train)(train), Standardizer.fit(train)(torch.cat([train, 1e6 * train]))[:10])


@pytest.mark.parametrize(
    ("series", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "series must be a torch.Tensor, got list"),
        (torch.arange(5), TypeError, r"floating point, got dtype torch\.int64"),
        (torch.zeros(0), ValueError, r"empty, got shape \(0,\)"),
        (torch.ones(5), ValueError, "constant"),
        (torch.stack([torch.arange(5.0), torch.ones(5)], dim=1), ValueError, "constant"),
        (torch.randn(2, 2, 2), ValueError, r"1 or 2 dimension\(s\), got shape \(2, 2, 2\)"),
    ],
)
def test_standardizer_rejects(series, error, message):
    with pytest.raises(error, match=message):
        Standardizer.fit(series)


@pytest.mark.parametrize(("n", "length", "horizon"), [(2, 1, 1), (30, 7, 4), (30, 26, 4)])
@pytest.mark.parametrize("features", [None, 1, 3])
def test_forecast_windows_against_numpy(n, length, horizon, features):
    series = torch.randn(n) if features is None else torch.randn(n, features)
    past, future = forecast_windows(series, length, horizon)
    count = n - length - horizon + 1
    assert past.shape[:2] == (length, count)
    assert future.shape[:2] == (horizon, count)
    for b in range(count):
        np.testing.assert_array_equal(past[:, b].numpy(), series[b : b + length].numpy())
        np.testing.assert_array_equal(future[:, b].numpy(), series[b + length : b + length + horizon].numpy())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: forecast_windows(torch.randn(5), 4, 2), ValueError, "length [+] horizon = 6 steps, got 5"),
        (lambda: forecast_windows(torch.randn(5), 0), ValueError, "length must be at least 1, got 0"),
        (lambda: forecast_windows(torch.randn(5), 2, 0), ValueError, "horizon must be at least 1, got 0"),
        (lambda: forecast_windows(np.zeros(5), 2), TypeError, "torch.Tensor, got ndarray"),
    ],
)
def test_forecast_windows_reject(call, error, message):
    with pytest.raises(error, match=message):
        call()
