"""Modules with parameters."""

from rnnkernels.nn.outputs import ConditionedOutput, ContextOutput, SkipOutput
from rnnkernels.nn.rnn import RNN, RNNCell

__all__ = ["RNN", "ConditionedOutput", "ContextOutput", "RNNCell", "SkipOutput"]
