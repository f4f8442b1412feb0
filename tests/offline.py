"""Compile kernels for GPUs that are not there, and read what they need from the compiler's output."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch


class _AbsentGPU:
    """A Triton driver that knows its target and nothing else: enough to compile exactly what a launch would."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton keeps what it compiled by device: two targets must not be one

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        return "int"


def compile_kernel(kernel, arguments, constants, capability):
    """Compile what ``kernel[grid](*arguments, **constants)`` would run, and return its needs."""
    import triton

    triton.runtime.driver.set_active(_AbsentGPU(capability))
    compiled = kernel.warmup(*arguments, grid=(1,), **constants)
    registers, spills = _registers_and_spills(compiled.asm["ptx"], capability)
    return {
        "shared_memory": compiled.metadata.shared,
        "registers": registers,
        "spilled_bytes": spills,
        "warps": compiled.metadata.num_warps,
        "ttgir": compiled.asm["ttgir"],
        "ptx": compiled.asm["ptx"],
    }


def _registers_and_spills(ptx, capability):
    """Registers a thread and bytes spilled, as ptxas reports them."""
    from triton import knobs

    architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        report = subprocess.run(
            [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={architecture}", "-o", os.devnull, str(source)],
            check=True,
            capture_output=True,
            text=True,
        ).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()
    return int(re.search(r"Used (\d+) registers", report).group(1)), max(int(stores), int(loads))
