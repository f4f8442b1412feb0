"""Operators over whole sequences: each a pair of ``torch.library`` custom ops, forward and backward."""

from rnnkernels.ops.dropout import dropout
from rnnkernels.ops.gru import gru
from rnnkernels.ops.lstm import lstm
from rnnkernels.ops.rnn import NONLINEARITIES, rnn

__all__ = ["NONLINEARITIES", "dropout", "gru", "lstm", "rnn"]
