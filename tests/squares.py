"""The generator of masks in Python's integers, written from the papers: the witness of every other implementation.

Squares: Widynski, arXiv:2004.06278, figure 1 (four rounds, 32 bits). Keys come from seeds by SplitMix64: Steele, Lea
and Flood, OOPSLA 2014, figure 14.
"""

import math

import numpy as np

RECURRENT, ZONEOUT, ZONEOUT_CELL, ELEMENTS = range(4)
_WORD = 2**64


def key_of(seed):
    """The key that belongs to a seed, from 0 to 2^64, odd."""
    state = (seed + 0x9E3779B97F4A7C15) % _WORD
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % _WORD
    state = (state ^ state >> 27) * 0x94D049BB133111EB % _WORD
    return (state ^ state >> 31) | 1


def bits(counter, key):
    """32 random bits for a counter."""

    def exchanged(word):
        return word >> 32 | word % 2**32 << 32

    y = counter * key % _WORD
    x = exchanged((y * y + y) % _WORD)
    x = exchanged((x * x + y + key) % _WORD)
    x = exchanged((x * x + y) % _WORD)
    return (x * x + y + key) % _WORD >> 32


def dropped(seed, stream, probability, shape):
    """True where an element is dropped, counted in the order of memory, each stream from its own 2^56th counter."""
    key, bound = key_of(seed), round(probability * 2**32)
    flat = [bits(stream * 2**56 + index, key) < bound for index in range(math.prod(shape))]
    return np.array(flat, dtype=bool).reshape(shape)
