"""Operators over whole sequences: each a pair of ``torch.library`` custom ops, forward and backward."""

from rnnkernels.ops.attention import attention
from rnnkernels.ops.dropout import dropout
from rnnkernels.ops.gru import gru
from rnnkernels.ops.linear_scan import linear_scan
from rnnkernels.ops.lstm import lstm
from rnnkernels.ops.rnn import NONLINEARITIES, rnn

__all__ = ["NONLINEARITIES", "attention", "dropout", "gru", "linear_scan", "lstm", "rnn"]
