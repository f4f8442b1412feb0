"""Modules with parameters."""

from rnnkernels.nn.outputs import ConditionedOutput, ContextOutput, SkipOutput
from rnnkernels.nn.rnn import GRU, RNN, GRUCell, RNNCell

__all__ = ["GRU", "RNN", "ConditionedOutput", "ContextOutput", "GRUCell", "RNNCell", "SkipOutput"]
