"""Modules with parameters."""

from rnnkernels.nn.rnn import RNN, RNNCell

__all__ = ["RNN", "RNNCell"]
