"""``python -m rnnkernels``: versions, devices, the implementation of every operator and why, and a self-check.

With ``TRITON_INTERPRET=1`` in the environment, the self-check runs the Triton kernels too, on the CPU in Triton's
interpreter. The exit code is 1 where something is wrong.
"""

import functools
import importlib.metadata
import itertools
import math
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import rnnkernels
from rnnkernels import _backend, ops, reference
from rnnkernels.kernels.eager import random

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LIMITS = {
    # The relative error, ||result - exact|| / ||exact||, that an operator may have in each result and gradient
    "float64": 1e-12,
    "float32": 1e-5,
    "float32 as TF32": 2e-3,
    "bfloat16": 1.5e-2,
    "float16": 2e-3,
}

HIDDEN_SIZES = (16, 32, 64, 128, 256, 512, 1024)
"""Sizes for which the report names the design."""


def arithmetic(dtype: torch.dtype, device: torch.device) -> str:
    """The row of ``LIMITS`` for products of this type, as ``torch.get_float32_matmul_precision()`` has them formed."""
    name = str(dtype).removeprefix("torch.")
    tf32 = device.type == "cuda" and dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return f"{name} as TF32" if tf32 else name


GATES = {"rnn": 1, "gru": 3, "lstm": 4}
"""Recurrent operators, and how many rows of the weights a hidden unit has."""


def recurrent_arguments(
    operator: str, sequence_length: int, batch: int, input_size: int, hidden_size: int
) -> dict[str, Tensor]:
    """Random arguments of an operator in float64, at the scale of ``torch.nn``'s initialization."""
    scale, rows = hidden_size**-0.5, GATES[operator] * hidden_size
    states = ("h_0", "c_0") if operator == "lstm" else ("h_0",)
    return {
        "input": torch.randn(sequence_length, batch, input_size, dtype=torch.float64),
        **{name: torch.randn(batch, hidden_size, dtype=torch.float64) for name in states},
        "weight_ih": torch.empty(rows, input_size, dtype=torch.float64).uniform_(-scale, scale),
        "weight_hh": torch.empty(rows, hidden_size, dtype=torch.float64).uniform_(-scale, scale),
        "bias_ih": torch.empty(rows, dtype=torch.float64).uniform_(-scale, scale),
        "bias_hh": torch.empty(rows, dtype=torch.float64).uniform_(-scale, scale),
    }


OPERATORS = {operator: functools.partial(recurrent_arguments, operator) for operator in GATES}
"""Operators that are reported and checked, each with what makes its arguments."""


Options = tuple[dict[str, Tensor], dict[str, object]]


BY_STEPS = ("layer norm", "reset gate first", "projection", "every option")
"""Options that can't ride along in one launch of all steps, by the names of :func:`options_of`."""


def options_of(operator: str, sequence_length: int, batch: int, hidden_size: int) -> dict[str, Options]:
    """What an operator takes beyond ``torch.nn``, by name: weights that an option adds or changes, and arguments."""
    rows, cell = GATES[operator] * hidden_size, (hidden_size,)

    def weights(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
        return {name: torch.rand(shape, dtype=torch.float64) for name, shape in shapes.items()}

    found: dict[str, Options] = {
        "reset": ({}, {"reset": torch.rand(sequence_length, batch) < 0.2}),
        "recurrent dropout": ({}, {"recurrent_dropout": 0.25, "seed": 3}),
        "zoneout": ({}, {"zoneout": 0.25, "seed": 3}),
        "layer norm": (weights(norm_hh=(rows,)), {}),
        "clipped gradient": ({}, {"grad_clip": 1.0}),
    }
    if operator != "rnn":
        found["layer norm"][0].update(weights(norm_ih=(rows,)))
    if operator == "gru":
        found["reset gate first"] = {}, {"reset_after": False}
    if operator == "lstm":
        found["zoneout"][1]["zoneout_cell"] = 0.25
        found["layer norm"][0].update(weights(norm_cell_weight=cell, norm_cell_bias=cell))
        found["peephole"] = weights(weight_peephole=(3, hidden_size)), {}
        size = (hidden_size + 1) // 2
        changed = weights(h_0=(batch, size), weight_hh=(rows, size), weight_hr=(size, hidden_size))
        found["projection"] = {name: (value - 0.5) * size**-0.5 for name, value in changed.items()}, {}
    for together, names in (
        ("all that ride along", [n for n in found if n not in BY_STEPS]),
        ("every option", [*found]),
    ):
        every: Options = {}, {}
        for name in names:
            every[0].update(found[name][0])
            every[1].update(found[name][1])
        found[together] = every
    return found


def errors(operator: str, arguments: dict[str, Tensor], dtype: torch.dtype, device: torch.device, **options):
    """Relative errors of an operator's results and gradients against the reference in float64 on the CPU, by name.

    ``arguments`` are rounded to ``dtype`` first, so that both compute the same function. Every result gets a random
    cotangent.
    """
    rounded = {name: argument.to(dtype) for name, argument in arguments.items()}
    exact = {name: argument.double().requires_grad_() for name, argument in rounded.items()}
    tested = {name: argument.to(device).requires_grad_() for name, argument in rounded.items()}
    said = {name: value for name, value in options.items() if name != "recompute_gates"}  # it changes no result
    expected = getattr(reference, operator)(**exact, **said)
    actual = getattr(ops, operator)(**tested, **options)
    cotangents = [torch.randn_like(result).to(dtype) for result in expected]
    expected_gradients = torch.autograd.grad(expected, exact.values(), [c.double() for c in cotangents])
    actual_gradients = torch.autograd.grad(actual, tested.values(), [c.to(device) for c in cotangents])
    names = [*(f"result {i}" for i in range(len(expected))), *(f"gradient of {name}" for name in rounded)]
    pairs = zip((*actual, *actual_gradients), (*expected, *expected_gradients), strict=True)
    return {name: relative_error(*pair) for name, pair in zip(names, pairs, strict=True)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64: on the GPU where both are there, else on the CPU."""
    device = actual.device if actual.device == expected.device and actual.is_cuda else torch.device("cpu")
    actual, expected = (tensor.detach().to(device).double() for tensor in (actual, expected))
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def devices() -> list[torch.device]:
    """The CPU and every GPU."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def version_of(package: str) -> str | None:
    """The version of an installed package, which is not imported; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return platform.processor() or platform.machine()


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _versions() -> Iterator[str]:
    yield f"python      {platform.python_version()}, {platform.system()} {platform.machine()}"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield f"torch       {torch.__version__}, {built}"
    yield f"triton      {version_of('triton') or 'not installed'}"
    yield f"backend     {_backend._selected}"
    yield f"interpreter {'on' if _backend.interpreting() else 'off'}"


def _device_lines() -> Iterator[str]:
    threads = torch.get_num_threads()
    yield f"cpu     {cpu_model()}, {threads} thread{'s' * (threads != 1)}"
    for device in devices()[1:]:
        gpu = torch.cuda.get_device_properties(device)
        yield (
            f"{device}  {gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, "
            f"{gpu.multi_processor_count} multiprocessors, driver {driver_version() or 'unknown'}"
        )


def _implementations() -> Iterator[str]:
    for operator in (*OPERATORS, "dropout"):
        for device in devices():
            names: dict[tuple[str, str], list[str]] = {}
            for dtype in DTYPES:
                try:
                    choice = _backend.explain(device, dtype)
                except RuntimeError as error:
                    choice = "none", str(error)
                names.setdefault(choice, []).append(str(dtype).removeprefix("torch."))
            for (backend, reason), dtypes in names.items():
                yield f"{operator}  {device}  {', '.join(dtypes)}: {backend}"
                yield f"    {reason}"


def _designs() -> Iterator[str]:
    from rnnkernels.kernels.triton import dispatch

    for operator, device, dtype in itertools.product(OPERATORS, devices()[1:], _backend.TRITON_DTYPES):
        designs = {size: dispatch.choose(operator, size, 32, dtype, device) for size in HIDDEN_SIZES}
        runs = itertools.groupby(designs, key=lambda size: type(designs[size]).__name__.lower())
        chosen = "; ".join(f"{design} for {', '.join(map(str, sizes))}" for design, sizes in runs)
        yield f"{operator}  {device}  {arithmetic(dtype, device)}, hidden_size: {chosen}"


def _can_be_checked(device: torch.device, dtype: torch.dtype, backend: str) -> bool:
    try:
        with _backend.use_backend(backend):
            implementation = _backend.resolve(device, dtype)
    except RuntimeError:
        return False
    # The interpreter, as shipped, multiplies bfloat16 wrongly.
    return not (implementation == "triton" and _backend.interpreting() and dtype == torch.bfloat16)


def _cases() -> Iterator[tuple[str, torch.device, torch.dtype, str]]:
    """What can be checked here: operator, device, type, and the backend to select."""
    for operator, device, dtype in itertools.product((*OPERATORS, "dropout"), devices(), DTYPES):
        backends = [_backend._selected]
        if device.type == "cpu" and _backend._selected == "auto" and _backend.interpreting():
            backends.append("triton")
        yield from (
            (operator, device, dtype, backend) for backend in backends if _can_be_checked(device, dtype, backend)
        )


WITH_EVERY_OPTION = ", with every option"
OPTIONS_SLACK = 4
"""Normalization divides by a standard deviation, and with it what 16 bits have rounded away: this much more may err."""


def _recurrence_errors(operator: str, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Relative errors of an operator plain, reversed with lengths, recomputing gates, and with all options."""
    arguments = OPERATORS[operator](sequence_length=9, batch=5, input_size=7, hidden_size=19)
    lengths = torch.tensor([9, 3, 1, 9, 6])

    def with_options(name: str) -> tuple[dict, dict]:
        weights, given = options_of(operator, sequence_length=9, batch=5, hidden_size=19)[name]
        return arguments | weights, given | {"lengths": lengths}

    ways = {
        "": (arguments, {}),
        ", reversed with lengths": (arguments, {"reverse": True, "lengths": lengths}),
        ", gates recomputed": (arguments, {"recompute_gates": True}),
        ", with options in one launch": with_options("all that ride along"),
        WITH_EVERY_OPTION: with_options("every option"),
    }
    return {
        f"{name}{way}": error
        for way, (tensors, given) in ways.items()
        for name, error in errors(operator, tensors, dtype, device, **given).items()
    }


NETWORKS = {", two layers": {"num_layers": 2}, ", both directions": {"bidirectional": True}}
"""Networks whose layers or directions may share a launch."""


def _network_errors(operator: str, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Relative errors of the networks against ``torch.nn`` in float64 on the CPU."""
    found, kind = {}, operator.upper()
    for way, network in NETWORKS.items():
        exact = getattr(torch.nn, kind)(7, 70, dtype=dtype, **network)
        tested = getattr(rnnkernels, kind)(7, 70, dtype=dtype, device=device, **network)
        tested.load_state_dict(exact.state_dict())
        input, results, gradients = torch.randn(9, 5, 7).to(dtype), [], []
        for module in (tested, exact.double()):
            like = next(module.parameters())
            own = input.to(like.device, like.dtype).requires_grad_()
            output, final = module(own)
            results.append((output, *(final if isinstance(final, tuple) else (final,))))
            if not gradients:
                cotangents = [torch.randn_like(result, device="cpu") for result in results[0]]
            given = [cotangent.to(like.device, like.dtype) for cotangent in cotangents]
            gradients.append(torch.autograd.grad(results[-1], (own, *module.parameters()), given))
        names = ["gradient of input", *(f"gradient of {name}" for name, _ in tested.named_parameters())]
        names = [*(f"result {i}" for i in range(len(results[0]))), *names]
        pairs = zip(*((*a, *b) for a, b in zip(results, gradients, strict=True)), strict=True)
        found |= {f"{name}{way}": relative_error(*pair) for name, pair in zip(names, pairs, strict=True)}
    return found


def _dropout_errors(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Relative errors of dropout against the mask of its seed, element by element and with one mask for all steps."""
    found = {}
    for shared in (False, True):
        input, cotangent = torch.randn(2, 7, 5, 3).to(dtype)
        tested = input.to(device).requires_grad_()
        mask = random.kept(random.key_of(3), random.ELEMENTS, 0.25, input.shape[shared:], input.double())
        actual = ops.dropout(tested, 0.25, seed=3, shared=shared)
        (gradient,) = torch.autograd.grad(actual, tested, cotangent.to(device))
        way = ", one mask for all steps" if shared else ""
        found[f"result 0{way}"] = relative_error(actual, input.double() * mask)
        found[f"gradient of input{way}"] = relative_error(gradient, cotangent.double() * mask)
    return found


def _self_check() -> Iterator[tuple[bool, str]]:
    """For each operator, device, type and implementation at hand: whether it is right, and a line that says so."""
    for operator, device, dtype, backend in _cases():
        name = f"{operator}  {device}  {str(dtype).removeprefix('torch.'):8}"
        try:
            with _backend.use_backend(backend):
                used = _backend.resolve(device, dtype)
                if operator == "dropout":
                    found = _dropout_errors(dtype, device)
                else:
                    found = _recurrence_errors(operator, dtype, device) | _network_errors(operator, dtype, device)
        except Exception as error:  # a report says what is broken, whatever it is
            yield False, f"{name}  FAILED  {type(error).__name__}: {error}"
            continue
        limits = {
            name: LIMITS[arithmetic(dtype, device)] * (OPTIONS_SLACK if name.endswith(WITH_EVERY_OPTION) else 1)
            for name in found
        }
        worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name] / limits[name])
        limit = limits[worst]
        right = found[worst] <= limit  # False for NaN
        yield (
            right,
            (
                f"{name}  {used:6}  {'ok   ' if right else 'WRONG'}  relative error up to {found[worst]:.1e} "
                f"({worst}), allowed {limit:.1e}"
            ),
        )


def main() -> int:
    """Print the report, and return the exit code."""
    print(f"rnnkernels {rnnkernels.__version__}")
    sections = [("", _versions()), ("Devices", _device_lines()), ("Implementations", _implementations())]
    if torch.cuda.is_available() and _backend.has_triton():
        sections.append(("Designs of the Triton kernels, batch 32", _designs()))
    for title, lines in sections:
        if title:
            print(f"\n{title}")
        for line in lines:
            print(f"  {line}")
    print("\nSelf-check: results and gradients against rnnkernels.reference in float64")
    checks = wrong = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for right, line in _self_check():
            print(f"  {line}", flush=True)
            checks += 1
            wrong += not right
    if wrong:
        print(f"\nFailed: {wrong} of {checks} checks.")
    elif not checks:
        print("  nothing: no operator has an implementation here")
    else:
        print("\nAll agree.")
    return int(wrong > 0 or checks == 0)


if __name__ == "__main__":
    sys.exit(main())
