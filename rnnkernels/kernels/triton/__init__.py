"""Triton implementations. Imported on first use, so that ``import rnnkernels`` needs only torch."""
