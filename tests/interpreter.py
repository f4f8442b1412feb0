"""Repairs of Triton's interpreter, for the tests alone.

As shipped (3.4 to 3.7), a product of bfloat16 tiles multiplies the raw bits, and a cast from float32 to bfloat16
truncates where a GPU rounds to the nearest even.
"""

import numpy as np
import torch


def _to_float32(data):
    """bfloat16, which the interpreter keeps as its bits, as float32."""
    return torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16).float().numpy()


def _to_bfloat16(data):
    return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def repair():
    """Repair the interpreter of this process. A second call changes nothing."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder, "repaired", False):
        return
    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.bfloat16:
            a = TensorHandle(_to_float32(a.data), tl.float32)
            b = TensorHandle(_to_float32(b.data), tl.float32)
        return create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def cast(self, src, dst_type):
        types = src.dtype.scalar, dst_type.scalar
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(_to_float32(src.data), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bfloat16(src.data), tl.bfloat16)
        return cast_impl(self, src, dst_type)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.repaired = True
