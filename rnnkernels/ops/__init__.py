"""Operators over whole sequences: each a pair of ``torch.library`` custom ops, forward and backward."""

from rnnkernels.ops.rnn import NONLINEARITIES, rnn

__all__ = ["NONLINEARITIES", "rnn"]
