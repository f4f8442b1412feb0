"""Cases about what comes after the backward pass: clipping and optimizer steps on many tensors at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import rnnkernels
from rnnkernels.__main__ import LIMITS, relative_error

LARGE = 50_000_000
"""Elements of the large tensor, beyond every cache."""

STEPS = 3
"""Steps after which both sides are compared with float64."""


@dataclass(frozen=True)
class TrainingCase:
    """A function or optimizer of rnnkernels beside PyTorch's, on the same tensors."""

    algorithm: str
    """An optimizer's class or a clipping function."""
    tensors: int
    """How many: 100 of 10 to 30,000 elements, spread evenly on a logarithmic scale, or 1 of 50 million."""
    options: dict = field(default_factory=dict, hash=False)
    """Arguments of the optimizer. For a norm: whether it ``clips``, or the gradients stay below the bound."""
    baseline: str = "foreach"
    """PyTorch's implementation: ``"foreach"``, ``"fused"``, or ``"copy"``, copying as many bytes as the step moves."""
    dtype: str = "float32"
    """Type of all tensors."""

    plain = False
    precision = "highest"

    @property
    def mode(self) -> str:
        """``"step"`` or ``"clipping"``."""
        return "clipping" if "clip" in self.algorithm else "step"

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        if self.tensors == 1:
            return [LARGE]
        return [round(10 ** (1 + 3.5 * i / (self.tensors - 1))) for i in range(self.tensors)]

    @property
    def name(self) -> str:
        """All of this in a line."""
        options = " ".join(key if value is True else f"{key}={value}" for key, value in self.options.items())
        what = "1 tensor of 50M" if self.tensors == 1 else f"{self.tensors} tensors"
        return " ".join(filter(None, [self.algorithm, options, what, self.dtype, f"beside {self.baseline}"]))


OPTIMIZERS = (
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("Adagrad", {}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Adam", {}),
    ("AdamW", {"amsgrad": True}),
)
CLIPPING = (("clip_grad_norm_", {"clips": True}), ("clip_grad_norm_", {"clips": False}), ("clip_grad_value_", {}))

STREAMS = {
    # How often a step reads or writes a number for each parameter
    ("SGD", ""): 3,
    ("SGD", "momentum"): 5,
    ("Adagrad", ""): 5,
    ("RMSprop", ""): 5,
    ("RMSprop", "momentum centered"): 9,
    ("Adam", ""): 7,
    ("AdamW", "amsgrad"): 9,
}


def cases(device_type: str) -> list[TrainingCase]:
    """The cases of a device, ``"cpu"`` or ``"cuda"``."""
    declared = [
        TrainingCase(algorithm, tensors, options)
        for tensors in (100, 1)
        for algorithm, options in (*OPTIMIZERS, *CLIPPING)
    ]
    if device_type == "cuda":
        fused = [(algorithm, options) for algorithm, options in OPTIMIZERS if algorithm != "RMSprop"]
        declared += [TrainingCase(*each, baseline="fused") for each in _with(100, fused) + _with(1, fused)]
        declared += [TrainingCase(*each, baseline="copy") for each in _with(1, OPTIMIZERS)]
        declared += [TrainingCase(*each, dtype="bfloat16") for each in _with(100, OPTIMIZERS)]
    return declared


def _with(tensors: int, algorithms) -> list[tuple[str, int, dict]]:
    return [(algorithm, tensors, options) for algorithm, options in algorithms]


def _parameters(case: TrainingCase, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Parameters and gradients, the same random numbers at every call."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for size in case.sizes:
        values, gradient = (torch.randn(size, device=device, generator=generator) for _ in range(2))
        param = torch.nn.Parameter(values.to(getattr(torch, case.dtype)).to(dtype))
        param.grad = gradient.to(getattr(torch, case.dtype)).to(dtype)
        params.append(param)
    return params


def _bounds(params: list[Tensor], clips: bool):
    """A bound for each call: a thousandth below the last norm, or far above every one."""
    norm = float(torch.stack([param.grad.norm() for param in params]).norm())
    while True:
        norm *= 0.999
        yield norm if clips else 1e6 * norm


def _function(case: TrainingCase, params: list[Tensor], module, **choice) -> Callable[[], object]:
    """What is timed, by PyTorch or rnnkernels: ``module`` has the optimizers or the clipping functions."""
    if case.mode == "step":
        return getattr(module, case.algorithm)(params, lr=1e-3, **case.options, **choice).step
    function = getattr(module, case.algorithm)
    if case.algorithm == "clip_grad_value_":
        return lambda: function(params, 0.5)
    bounds = _bounds(params, case.options["clips"])
    return lambda: function(params, next(bounds))


def _copy(case: TrainingCase, device: torch.device) -> Callable[[], object]:
    streams = STREAMS[case.algorithm, " ".join(case.options)]
    source = torch.empty(sum(case.sizes) * streams // 2, dtype=getattr(torch, case.dtype), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def sides(case: TrainingCase, device: torch.device) -> tuple[dict[str, Callable], dict[str, float], dict[str, float]]:
    """What is timed, by side; and the relative errors after some steps with the errors allowed."""
    dtype = getattr(torch, case.dtype)
    choice = {case.baseline: True} if case.mode == "step" and case.baseline != "copy" else {}
    of_torch, of_ours = (torch.optim, rnnkernels.optim) if case.mode == "step" else (torch.nn.utils, rnnkernels)

    def run(module, dtype, **choice):
        params = _parameters(case, device, dtype)
        function = _function(case, params, module, **choice)
        for _ in range(STEPS):
            function()
        return torch.cat([(p if case.mode == "step" else p.grad).detach().flatten() for p in params])

    exact = run(of_torch, torch.float64)
    runs = {"rnnkernels": (of_ours, dtype)} | ({} if case.baseline == "copy" else {"torch": (of_torch, dtype)})
    errors = {
        side: relative_error(run(*arguments, **(choice if side == "torch" else {})), exact)
        for side, arguments in runs.items()
    }
    allowed = dict.fromkeys(errors, LIMITS[case.dtype])
    del exact
    functions = {"rnnkernels": _function(case, _parameters(case, device, dtype), of_ours)}
    if case.baseline == "copy":
        functions["torch"] = _copy(case, device)
    else:
        functions["torch"] = _function(case, _parameters(case, device, dtype), of_torch, **choice)
    if any(math.isnan(error) for error in errors.values()):
        errors = dict.fromkeys(errors, math.nan)
    return functions, errors, allowed
