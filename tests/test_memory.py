"""Memory for large results."""

import ctypes
import mmap

import pytest
import torch

from rnnkernels.kernels.eager import memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (1100, 1101), (2**21 + 1,)])
def test_it_is_an_empty_tensor_like_any_other(shape, dtype):
    tensor = memory.empty(shape, dtype, torch.device("cpu"))
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (torch.Size(shape), dtype, True)
    assert (tensor.fill_(2) == 2).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux takes advice on huge pages")
def test_advice_is_given_for_large_tensors_within_their_pages(monkeypatch):
    given = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *advice: given.append(advice))
    memory.empty((memory._LARGE // 4 - 1,), torch.float32, torch.device("cpu"))
    assert given == []
    tensor = memory.empty((memory._LARGE // 4,), torch.float32, torch.device("cpu"))
    ((start, length, kind),) = given
    assert start % mmap.PAGESIZE == 0
    assert tensor.data_ptr() <= start < tensor.data_ptr() + mmap.PAGESIZE
    assert start + length == tensor.data_ptr() + tensor.nbytes
    assert kind == mmap.MADV_HUGEPAGE


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux takes advice on huge pages")
def test_the_system_takes_the_call():
    size = 4 * mmap.PAGESIZE
    with mmap.mmap(-1, size) as region:
        address = ctypes.addressof(view := ctypes.c_char.from_buffer(region))
        # Zero, or EINVAL from a kernel that was built without huge pages.
        assert memory._madvise()(address, size, mmap.MADV_HUGEPAGE) in (0, -1)
        del view


def test_without_advice_to_give_it_is_torch_empty(monkeypatch):
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    assert memory.empty((memory._LARGE,), torch.uint8, torch.device("cpu")).nbytes == memory._LARGE
