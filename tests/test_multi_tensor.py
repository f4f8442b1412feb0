"""The multi-tensor kernels, compiled for GPUs that need not be there, and their arithmetic of addresses."""

import collections
import concurrent.futures
import itertools
import math
import multiprocessing
import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels can't be compiled here")

import triton
import triton.language as tl

from rnnkernels.kernels.triton import multi_tensor, tables

CAPABILITIES = (80, 90)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SPILLED_BYTES = 32

RULES = {
    # name: (rule, number of states, whether it has the step's number, options)
    "sgd": ("sgd", 0, False, {}),
    "sgd with momentum": ("sgd", 1, False, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd, first step": ("sgd", 1, False, {"momentum": 0.9, "first": True}),
    "adagrad": ("adagrad", 1, True, {"maximize": True}),
    "rmsprop": ("rmsprop", 1, False, {}),
    "rmsprop, centered, momentum": ("rmsprop", 3, False, {"centered": True, "momentum": 0.9}),
    "adam": ("adam", 2, True, {}),
    "adamw, amsgrad": ("adam", 3, True, {"decoupled": True, "weight_decay": 0.1}),
}


def columns(dtype, sizes, roles, aligned):
    start = 0 if aligned else 1
    return [[torch.zeros(size + 1, dtype=dtype)[start:][:size] for size in sizes] for _ in range(roles)]


def launch_all(dtype, sizes=(20_000, 3), aligned=True, tensor_lr=False):
    """Call every host function. Runs in the worker."""
    tensors, others = columns(dtype, sizes, 2, aligned)
    factor = torch.ones(1)
    for norm in multi_tensor.NORMS:
        multi_tensor.norm_and_factor(tensors, 1.0, norm)
    multi_tensor.scale(tensors, factor)
    multi_tensor.clamp(tensors, 0.5)
    multi_tensor.adaptive_clip(tensors, others, 0.01, 1e-3)
    lr = torch.zeros(()) if tensor_lr else 0.1
    for rule, states, counts, options in RULES.values():
        params, grads, *buffers = columns(dtype, sizes, 2 + states, aligned)
        steps = [torch.ones(()) for _ in sizes] if counts else None
        multi_tensor.step(
            rule,
            params,
            grads,
            buffers,
            steps,
            lr=lr,
            factor=factor if tensor_lr else None,
            betas=(0.9, 0.999),
            **options,
        )


def compile_all(capability, dtype, aligned):
    """What each kernel needs, and its widest loads and stores. Runs in the worker."""
    import offline

    with offline.absent_gpu(capability) as launches:
        launch_all(dtype, aligned=aligned, tensor_lr=not aligned)
    return [
        {"name": kernel.__name__, "wide": ".v4.b32" in compiled.asm["ptx"], **offline.needs(compiled, capability)}
        for kernel, compiled in launches
    ]


def kernels_compiled_for_other_tensors():
    """How many kernels a GPU would compile for more and fewer tensors of other sizes. Runs in the worker."""
    import offline

    hashes = set()
    with offline.absent_gpu(90) as launches:
        launch_all(torch.float32)
        few = len({compiled.hash for _, compiled in launches})
        for sizes in ((1,), (16,), (17, 5, 3, 100_000)):
            launch_all(torch.float32, sizes)
        hashes = {compiled.hash for _, compiled in launches}
    return few, len(hashes)


@pytest.fixture(scope="module")
def worker():
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            patch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))
            pool.submit(os.getpid).result(timeout=60)  # begins the process
        yield pool


@pytest.mark.offline
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "aligned"),
    [*itertools.product(CAPABILITIES, TYPES[:2], (True, False)), (90, torch.float16, True)],
    ids=str,
)
def test_they_compile_without_spills(worker, capability, dtype, aligned):
    found = worker.submit(compile_all, capability, dtype, aligned).result(timeout=300)
    assert {each["name"] for each in found} == {
        "norm_kernel", "finish_kernel", "scale_kernel", "clamp_kernel", "adaptive_kernel", "step_kernel"
    }  # fmt: skip
    for each in found:
        assert each["spilled_bytes"] <= MAX_SPILLED_BYTES, each
        assert each["shared_memory"] <= 1024, each
        # 16 bytes at a time, where the addresses allow it.
        if each["name"] in ("norm_kernel", "scale_kernel", "clamp_kernel", "step_kernel"):
            assert each["wide"] == aligned, each


@pytest.mark.offline
def test_other_tensors_compile_nothing(worker):
    few, all_ = worker.submit(kernels_compiled_for_other_tensors).result(timeout=300)
    assert all_ <= few + 3  # a buffer of partial sums may begin off a 16-byte boundary, once for each norm


@triton.jit
def where(table, chunks, tensors, programs, out, ELEMENTS: tl.constexpr, CHUNK: tl.constexpr):
    tensor, start, remaining = multi_tensor.locate(table, chunks, tensors, programs, 1, CHUNK)
    begin = multi_tensor.pointer(table, tensor, tensors, start, 0, ELEMENTS, False)
    tl.store(out + 2 * tl.program_id(0), begin.to(tl.int64))
    tl.store(out + 2 * tl.program_id(0) + 1, remaining)


@pytest.mark.interpreter
def test_addresses_beyond_32_bits(kernel_device):
    """Where the chunks of a tensor of more than 2^31 elements begin, computed as the kernels do."""
    size, address = 2**31 + 5 * multi_tensor.CHUNK + 7, 2**40
    chunks = multi_tensor._chunks_of([3, size], [multi_tensor.CHUNK] * 2)
    table = torch.tensor([0, address, 3, size], device=kernel_device)
    chosen = torch.tensor([0, 1, chunks.shape[1] - 1])
    out = torch.zeros(3, 2, dtype=torch.int64, device=kernel_device)
    where[(3,)](
        table,
        chunks[:, chosen].contiguous().to(kernel_device),
        2,
        3,
        out,
        ELEMENTS=(tl.float32,),
        CHUNK=multi_tensor.CHUNK,
    )
    first_of_last = (chunks.shape[1] - 2) * multi_tensor.CHUNK
    assert first_of_last > 2**31
    assert out.tolist() == [[0, 3], [address, size], [address + 4 * first_of_last, size - first_of_last]]


def test_chunks_cover_every_element_once():
    sizes = (1, multi_tensor.CHUNK, multi_tensor.CHUNK + 1, 5 * multi_tensor.CHUNK - 1)
    chunks = multi_tensor._chunks_of(sizes, (multi_tensor.CHUNK,) * 4)
    assert chunks.dtype == torch.int32
    assert chunks.tolist() == [[0, 1, 2, 2, 3, 3, 3, 3, 3], [0, 0, 0, 1, 0, 1, 2, 3, 4]]


def test_tables_are_kept_and_make_room(monkeypatch):
    monkeypatch.setattr(tables, "KEPT", 2)
    cache, made = collections.OrderedDict(), []

    def get(key):
        return tables.kept(cache, key, lambda: made.append(key) or key)

    assert [get(key) for key in "abacb"] == list("abacb")
    assert made == list("abcb")


@pytest.mark.interpreter
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999999])
def test_bias_correction_does_not_cancel(kernel_device, beta):
    """Adam's $1 - \\beta^t$, seen through one step: a parameter moves by lr whatever the gradient and the betas."""
    for step in (1.0, 2.0, 7.0, 1000.0, 1e6):
        exact = -math.expm1(step * math.log(beta)) if beta else 1.0
        param, grad = torch.zeros(4, device=kernel_device), torch.ones(4, device=kernel_device)
        mean, square = torch.zeros_like(param), torch.zeros_like(param)
        multi_tensor.step(
            "adam", [param], [grad], [[mean], [square]], [torch.tensor(step, device=kernel_device)], lr=1.0, eps=1e-30,
            betas=(beta, 0.0),
        )  # fmt: skip
        torch.testing.assert_close(
            -param.double(), torch.full_like(param, (1 - beta) / exact).double(), rtol=1e-6, atol=0
        )
