"""Compile kernels for GPUs that are not there, and read what they need from the compiler's output.

Triton's interpreter must be off in a process that uses this: see ``test_compilation.py``.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one program may use: A100, RTX 30, H100, B200, MI300."""

MULTIPROCESSORS = {80: 108, 86: 82, 90: 132, 100: 148, "gfx942": 304}
"""Of an A100, an RTX 3090, an H100, a B200 and an MI300X."""


def is_nvidia(capability):
    """Whether this is a number of NVIDIA's, or a name of AMD's."""
    return isinstance(capability, int)


class _AbsentGPU:
    """A Triton driver that knows its target and nothing else: enough to compile exactly what a launch would."""

    def __init__(self, capability: int | str):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32) if is_nvidia(capability) else GPUTarget("hip", capability, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton keeps what it compiled by device: two targets must not be one

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def absent_gpu(capability):
    """Compile instead of launching. Yields the list of (kernel, compiled) that launches inside the block fill.

    The process has no other GPU from then on.
    """
    import triton
    from triton.runtime.jit import JITFunction

    from rnnkernels.kernels.triton import dispatch, persistent

    launches = []
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, run(kernel, *args, grid=grid, warmup=True, **kwargs)))

    triton.runtime.driver.set_active(_AbsentGPU(capability))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(dispatch, "shared_memory", return_value=SHARED_MEMORY[capability]),
        mock.patch.object(dispatch, "multiprocessors", return_value=MULTIPROCESSORS[capability]),
        mock.patch.object(dispatch, "programmatic_launch", return_value=is_nvidia(capability) and capability >= 90),
        mock.patch.object(dispatch, "on_amd", return_value=not is_nvidia(capability)),
        mock.patch.object(persistent, "concurrent", return_value=True),
    ):
        yield launches


class _NothingLaunched:
    """What stands for a launcher: it keeps what it was called with."""

    def __init__(self, launches):
        self.launches = launches

    def __call__(self, source, metadata):
        def launch(*arguments):
            grid, function = arguments[:3], arguments[4]
            self.launches.append((function, grid, metadata.launch_pdl, arguments[9:]))

        return launch


class _NothingLoaded:
    """What stands for the functions of a driver."""

    def load_binary(self, name, binary, shared, device):
        return None, name, 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_MEMORY[90]}


@contextlib.contextmanager
def recorded_launches():
    """Compile for an H100 and launch into a list of (kernel, grid, whether it overlaps, arguments)."""
    import triton

    from rnnkernels.kernels.triton import dispatch

    launches = []
    driver = _AbsentGPU(90)
    driver.launcher_cls, driver.utils = _NothingLaunched(launches), _NothingLoaded()
    triton.runtime.driver.set_active(driver)
    answers = dispatch.shared_memory, dispatch.programmatic_launch
    dispatch.shared_memory, dispatch.programmatic_launch = lambda device: SHARED_MEMORY[90], lambda device: True
    try:
        yield launches
    finally:
        dispatch.shared_memory, dispatch.programmatic_launch = answers


def needs(compiled, capability):
    """Shared memory, registers and spills of a compiled kernel."""
    if not is_nvidia(capability):
        counts = dict(re.findall(r"\.([sv]gpr_(?:spill_)?count): +(\d+)", compiled.asm["amdgcn"]))
        spilled = 4 * (int(counts["vgpr_spill_count"]) + int(counts["sgpr_spill_count"]))
        registers = int(counts["vgpr_count"])
    else:
        registers, spilled = _registers_and_spills(compiled.asm["ptx"], capability)
    return {"shared_memory": compiled.metadata.shared, "registers": registers, "spilled_bytes": spilled}


def _registers_and_spills(ptx, capability):
    """Registers a thread and bytes spilled, as ptxas reports them."""
    from triton import knobs

    architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    assembler = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        report = subprocess.run(
            [assembler.path, "-v", f"--gpu-name={architecture}", "-o", os.devnull, str(source)],
            check=True,
            capture_output=True,
            text=True,
        ).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()
    return int(re.search(r"Used (\d+) registers", report).group(1)), max(int(stores), int(loads))


def synchronization(ptx):
    """What the first loop of a kernel does with memory, in order: ``cg`` (a load past the L1 cache), ``ld``, ``st``,
    ``release``, ``acquire``, and ``bar`` for a barrier of its threads."""
    words = {
        r"ld\.global\.cg": "cg",
        r"(ld|atom)\.global\S*\.acquire": "acquire",
        r"(red|atom)\.global\S*\.release": "release",
        r"bar\.sync": "bar",
        r"ld\.global": "ld",
        r"st\.global": "st",
    }
    loop = re.search(r"(\$L__BB\w+):\s+// =>This Loop Header: Depth=1(.*?)bra\s+\1;", ptx, re.DOTALL)[2]
    hits = (hit[0] for hit in re.finditer("|".join(words), loop))
    return " ".join(next(word for pattern, word in words.items() if re.match(pattern, hit)) for hit in hits)


def staged_in_loop(ttgir, shape):
    """How often a tile of this shape is put into shared memory inside a loop."""
    inside = ttgir[ttgir.index("scf.for") :]
    return len(re.findall(rf"ttg\.local_alloc .*memdesc<{shape}x", inside))
