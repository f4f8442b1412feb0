"""Modules with parameters."""

from rnnkernels.nn.cells import GRUCell, LSTMCell, RNNCell
from rnnkernels.nn.minimal import MinGRU, MinLSTM
from rnnkernels.nn.outputs import ConditionedOutput, ContextOutput, SkipOutput
from rnnkernels.nn.rnn import GRU, LSTM, RNN
from rnnkernels.nn.transformer import KeyValueCache, Transformer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ConditionedOutput",
    "ContextOutput",
    "GRUCell",
    "KeyValueCache",
    "LSTMCell",
    "MinGRU",
    "MinLSTM",
    "RNNCell",
    "SkipOutput",
    "Transformer",
]
