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


def scan_cases(device: torch.device) -> Iterator[tuple[str, Sides]]:
    """``linear_scan`` beside the loop, after a comparison."""
    for batch, hidden_size in SCAN_SHAPES:
        shape = SEQUENCE_LENGTH, batch, hidden_size
        decay = torch.rand(shape, device=device, requires_grad=True)
        input = torch.randn(shape, device=device, requires_grad=True)
        h_0 = torch.randn(shape[1:], device=device, requires_grad=True)
        tensors = decay, input, h_0
        sides = {
            "loop": lambda tensors=tensors: with_gradients(loop, *tensors),
            "rnnkernels": lambda tensors=tensors: with_gradients(rk.ops.linear_scan, *tensors),
        }
        for value, expected in zip(sides["rnnkernels"](), sides["loop"](), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)
        yield f"scan T={SEQUENCE_LENGTH} B={batch} H={hidden_size}", sides


def training_cases(device: torch.device) -> Iterator[tuple[str, Sides]]:
    """The minimal layers beside those of ``torch.nn`` that they stand in for."""
    for kind in ("GRU", "LSTM"):
        for batch, size in TRAINING_SHAPES:
            x = torch.randn(SEQUENCE_LENGTH, batch, size, device=device, requires_grad=True)

            def train(module, x=x):
                output = module(x)[0]
                return torch.autograd.grad(output, [x, *module.parameters()], output.detach())

            modules = {
                f"torch.nn.{kind}": getattr(torch.nn, kind)(size, size, device=device),
                f"Min{kind}": getattr(rk, f"Min{kind}")(size, size, device=device),
            }
            sides = {name: lambda module=module, train=train: train(module) for name, module in modules.items()}
            yield f"Min{kind} T={SEQUENCE_LENGTH} B={batch} I=H={size}", sides


def copy_cases(device: torch.device) -> Iterator[tuple[str, Sides]]:
    """The forward pass of the scan reads two elements and writes one; so many are copied."""
    if device.type != "cuda":
        return
    for batch, hidden_size in COPY_SHAPES:
        shape = 1024, batch, hidden_size
        decay, input = torch.rand(shape, device=device), torch.randn(shape, device=device)
        source, target = (torch.randn(3 * decay.numel() // 2, device=device) for _ in range(2))
        sides = {
            "copy": lambda source=source, target=target: target.copy_(source),
            "rnnkernels": lambda decay=decay, input=input: rk.ops.linear_scan(decay, input),
        }
        yield f"copy T=1024 B={batch} H={hidden_size}", sides


def attention_cases(device: torch.device) -> Iterator[tuple[str, Sides]]:
    """The kernel to read beside the one to use, after a comparison."""
    if device.type != "cuda":
        return

    def fused(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    for shape in ATTENTION_SHAPES:
        tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

        def train(function, tensors=tensors):
            output = function(*tensors)
            return [output, *torch.autograd.grad(output, tensors, output.detach())]

        sides = {
            "SDPA": lambda train=train: train(fused),
            "rnnkernels": lambda train=train: train(rk.ops.attention),
        }
        for value, expected in zip(sides["rnnkernels"](), sides["SDPA"](), strict=True):
            torch.testing.assert_close(value, expected, rtol=3e-2, atol=3e-2)
        yield f"attention {'x'.join(map(str, shape))} bfloat16", sides


def chunk_cases(device: torch.device) -> Iterator[tuple[str, Sides]]:
    """Both ways of the eager scan, forward."""
    if device.type != "cpu":
        return
    for channels in (64, 1024, 2048, 4096, 8192, 16384):
        decay, input = torch.rand(SEQUENCE_LENGTH, channels), torch.randn(SEQUENCE_LENGTH, channels)
        output, initial = torch.empty_like(input), torch.zeros(channels)

        def run(bound, arguments=(decay, input, initial, output, False)):
            before, eager.CHUNKED_BELOW = eager.CHUNKED_BELOW, bound
            try:
                eager.scan(*arguments)
            finally:
                eager.CHUNKED_BELOW = before

        sides = {"steps": lambda run=run: run(0), "chunks": lambda run=run: run(10**9)}
        yield f"chunks T={SEQUENCE_LENGTH} B*H={channels}", sides


CASES = {
    "scan": scan_cases,
    "training": training_cases,
    "copy": copy_cases,
    "attention": attention_cases,
    "chunks": chunk_cases,
}


def measure(part: str, device: torch.device, seconds: float, rounds: tuple[int, int]) -> Iterator[dict]:
    """Time the cases of a part, the sides of each taking turns."""
    for name, sides in CASES[part](device):
        times = runner.interleave(sides, runner.clock(device), seconds, rounds)
        milliseconds = {side: runner.summarize(values) for side, values in times.items()}
        first, second = (milliseconds[side]["median"] for side in sides)
        yield {"name": name, "status": "measured", "milliseconds": milliseconds, "ratio": first / second}


def row(result: dict) -> str:
    """A case's line in the table."""
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
        for result in measure(part, device, **budget):
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
