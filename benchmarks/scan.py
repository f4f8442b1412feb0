"""``python -m benchmarks.scan``: recurrences that are parallel over time, beside those that are not.

- *scan*: ``linear_scan`` beside a loop over steps in plain PyTorch, results and all gradients.
- *training*: MinGRU and MinLSTM beside ``torch.nn.GRU`` and ``torch.nn.LSTM`` of equal width: results and the gradients
  of the input and of every weight. Another function is computed, so that nothing is compared but time.
- *copy* (on a GPU): bytes that ``linear_scan`` reads and writes in a second, beside ``Tensor.copy_``.
- *attention* (on a GPU): causal attention, results and gradients, beside ``scaled_dot_product_attention``.
- *chunks* (on a CPU): the scan in chunks of time beside the one in single steps, on whose measurement
  ``kernels.eager.linear_scan.CHUNKED_BELOW`` rests.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import rnnkernels as rk
from benchmarks import records, runner
from rnnkernels.kernels.eager import linear_scan as eager

SEQUENCE_LENGTH = 4096

SCAN_SHAPES = ((1, 64), (1, 256), (4, 256), (16, 256), (64, 256))
TRAINING_SHAPES = ((1, 64), (1, 256), (8, 64), (8, 256))
"""(batch, hidden_size)."""

COPY_SHAPES = ((64, 1024), (256, 1024), (256, 2048))

ATTENTION_SHAPES = ((8, 16, 1024, 64), (2, 16, 4096, 64), (2, 16, 4096, 128))
"""(batch, heads, sequence_length, head_dim)."""

PARTS = ("scan", "training", "copy", "attention", "chunks")

TARGETS = {"scan": 10.0, "MinGRU": 5.0, "copy": 0.8, "attention": 0.7}
"""Ratios that were promised, each of at least one shape."""

Sides = dict[str, Callable[[], object]]


def loop(decay: Tensor, input: Tensor, h_0: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as one writes it."""
    states, state = [], h_0
    for a, b in zip(decay, input, strict=True):
        state = a * state + b
        states.append(state)
    return torch.stack(states), state


def with_gradients(function: Callable, *tensors: Tensor) -> list[Tensor]:
    """Results, and the gradients of all tensors."""
    output, h_n = function(*tensors)
    return [output, h_n, *torch.autograd.grad((output, h_n), tensors, (output.detach(), h_n.detach()))]


def scan_sides(device: torch.device, steps: int, batch: int, hidden_size: int) -> Sides:
    """``linear_scan`` beside the loop, after a comparison."""
    shape = steps, batch, hidden_size
    decay = torch.rand(shape, device=device, requires_grad=True)
    input = torch.randn(shape, device=device, requires_grad=True)
    h_0 = torch.randn(shape[1:], device=device, requires_grad=True)
    tensors = decay, input, h_0
    sides = {
        "loop": lambda: with_gradients(loop, *tensors),
        "rnnkernels": lambda: with_gradients(rk.ops.linear_scan, *tensors),
    }
    for value, expected in zip(sides["rnnkernels"](), sides["loop"](), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)
    return sides


def training_sides(device: torch.device, steps: int, kind: str, batch: int, size: int) -> Sides:
    """A minimal layer beside the one of ``torch.nn`` that it stands in for."""
    x = torch.randn(steps, batch, size, device=device, requires_grad=True)

    def train(module):
        output = module(x)[0]
        return torch.autograd.grad(output, [x, *module.parameters()], output.detach())

    modules = {
        f"torch.nn.{kind}": getattr(torch.nn, kind)(size, size, device=device),
        f"Min{kind}": getattr(rk, f"Min{kind}")(size, size, device=device),
    }
    return {name: functools.partial(train, module) for name, module in modules.items()}


def copy_sides(device: torch.device, batch: int, hidden_size: int) -> Sides:
    """The forward pass of the scan reads two elements and writes one; so many are copied."""
    shape = 1024, batch, hidden_size
    decay, input = torch.rand(shape, device=device), torch.randn(shape, device=device)
    source, target = (torch.randn(3 * decay.numel() // 2, device=device) for _ in range(2))
    return {"copy": lambda: target.copy_(source), "rnnkernels": lambda: rk.ops.linear_scan(decay, input)}


def attention_sides(device: torch.device, shape: tuple[int, ...]) -> Sides:
    """The kernel to read beside the one to use, after a comparison."""
    tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def train(function):
        output = function(*tensors)
        return [output, *torch.autograd.grad(output, tensors, output.detach())]

    fused = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    sides = {"SDPA": functools.partial(train, fused), "rnnkernels": functools.partial(train, rk.ops.attention)}
    for value, expected in zip(sides["rnnkernels"](), sides["SDPA"](), strict=True):
        torch.testing.assert_close(value, expected, rtol=3e-2, atol=3e-2)
    return sides


def chunk_sides(device: torch.device, channels: int) -> Sides:
    """Both ways of the eager scan, forward."""
    decay, input = torch.rand(SEQUENCE_LENGTH, channels), torch.randn(SEQUENCE_LENGTH, channels)
    output, initial = torch.empty_like(input), torch.zeros(channels)

    def run(bound):
        before, eager.CHUNKED_BELOW = eager.CHUNKED_BELOW, bound
        try:
            eager.scan(decay, input, initial, output, False)
        finally:
            eager.CHUNKED_BELOW = before

    return {"steps": lambda: run(0), "chunks": lambda: run(10**9)}


def cases(part: str, device: torch.device, steps: int = SEQUENCE_LENGTH) -> Iterator[tuple[str, Callable[[], Sides]]]:
    """Names of a part's cases, and what makes and compares their sides."""
    make = functools.partial
    if part == "scan":
        for shape in SCAN_SHAPES:
            yield "scan T={} B={} H={}".format(steps, *shape), make(scan_sides, device, steps, *shape)
    elif part == "training":
        for kind, shape in itertools.product(("GRU", "LSTM"), TRAINING_SHAPES):
            name = "Min{} T={} B={} I=H={}".format(kind, steps, *shape)
            yield name, make(training_sides, device, steps, kind, *shape)
    elif part == "copy" and device.type == "cuda":
        for shape in COPY_SHAPES:
            yield "copy T=1024 B={} H={}".format(*shape), make(copy_sides, device, *shape)
    elif part == "attention" and device.type == "cuda":
        for shape in ATTENTION_SHAPES:
            yield f"attention {'x'.join(map(str, shape))} bfloat16", make(attention_sides, device, shape)
    elif part == "chunks" and device.type == "cpu":
        for channels in (64, 1024, 2048, 4096, 8192, 16384):
            yield f"chunks T={SEQUENCE_LENGTH} B*H={channels}", make(chunk_sides, device, channels)


def run_case(make: Callable[[], Sides], device: torch.device, seconds: float, rounds: tuple[int, int]) -> dict:
    """Time the sides of a case, which take turns."""
    sides = make()
    times = runner.interleave(sides, runner.clock(device), seconds, rounds)
    milliseconds = {side: runner.summarize(values) for side, values in times.items()}
    first, second = (milliseconds[side]["median"] for side in sides)
    return {"status": "measured", "reason": None, "milliseconds": milliseconds, "ratio": first / second}


def row(result: dict) -> str:
    """A case's line in the table."""
    if result["status"] != "measured":
        return f"{result['name']:34}  {result['status']}: {result['reason']}"
    sides = "  ".join(f"{side} {times['median']:9.4g} ms" for side, times in result["milliseconds"].items())
    return f"{result['name']:34}  {sides}  {result['ratio']:7.2f}x"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scan", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given again")
    parser.add_argument("--quick", action="store_true", help="measure each case for a moment only")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that PyTorch uses on the CPU")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    machine = records.header("scan", sys.argv, device)["machine"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, threads: {machine['threads']}"
    print(f"{where}; torch {torch.__version__}; load {machine['load']}\n")
    budget = {"seconds": 0.0, "rounds": (3, 3)} if options.quick else {"seconds": 5.0, "rounds": (5, 200)}
    best: dict[str, float] = {}
    for part in options.part or PARTS:
        for name, make in cases(part, device):
            result = {"name": name, **run_case(make, device, **budget)}
            print(row(result), flush=True)
            kind = result["name"].split()[0]
            best[kind] = max(best.get(kind, 0.0), result["ratio"])
    print()
    for kind, at_least in TARGETS.items():
        if kind in best:
            verdict = "met" if best[kind] >= at_least else "NOT met"
            print(f"target {verdict}: {kind} at least {at_least}x, reaches {best[kind]:.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
