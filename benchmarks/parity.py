"""Every design of the Triton kernels against ``rnnkernels.reference`` in float64, forward and backward."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from unittest import mock

import torch

from benchmarks import records
from benchmarks.cases import ARITHMETIC
from benchmarks.designs import forced, without_fallback
from rnnkernels import ops, reference
from rnnkernels.__main__ import LIMITS, OPERATORS, OPTIONS_SLACK, arithmetic, errors, options_of, relative_error


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what is allocated uninitialized with NaN, so that an element that no kernel writes shows."""

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield


def cases(rehearsal: bool) -> Iterator[dict]:
    """What the part kernels compares: an operator at an odd size in every form, at others in two; then its options."""
    every = list(itertools.product((False, True), (False, True)))
    few = [(False, False), (True, True)]
    sizes = [(7, 33, 17, every), *((7, batch, hidden, few) for hidden in (48, 128, 256, 300) for batch in (33, 80))]
    sizes += [(7, 1, 1, few), (5, 2, 64, few), (3, 70, 1000, few), (2, 70_001, 32, few[:1])]
    kinds = ARITHMETIC
    if rehearsal:
        # Not bfloat16, which the interpreter gets wrong, and TF32 it does not have.
        sizes, kinds = [(3, 2, 5, every), (2, 66, 16, few)], [{"dtype": "float32"}, {"dtype": "float16"}]
    planned = list(itertools.product(sizes, OPERATORS, kinds))
    if not rehearsal:
        planned += [((70_000, 3, 16, few[:1]), operator, ARITHMETIC[0]) for operator in OPERATORS]
    for (sequence_length, batch, hidden_size, options), operator, kind in planned:
        nonlinearities = (None,) if operator != "rnn" else ops.NONLINEARITIES if options is every else ("tanh",)
        for nonlinearity, (reverse, has_lengths) in itertools.product(nonlinearities, options):
            yield {
                "operator": operator,
                "sequence_length": sequence_length,
                "batch": batch,
                "hidden_size": hidden_size,
                "nonlinearity": nonlinearity,
                "option": None,
                "reverse": reverse,
                "lengths": has_lengths,
                "dtype": kind["dtype"],
                "precision": kind.get("precision", "highest"),
            }
    sizes, forms = ((7, 33, 17), (7, 80, 128), (5, 3, 300)), ((False, False), (True, True))
    if rehearsal:
        sizes, forms, kinds = ((3, 2, 5),), forms[1:], kinds[:1]
    for size, operator, kind in itertools.product(sizes, OPERATORS, kinds):
        for option, (reverse, has_lengths) in itertools.product(options_of(operator, 1, 1, 1), forms):
            yield {
                "operator": operator,
                **dict(zip(("sequence_length", "batch", "hidden_size"), size, strict=True)),
                "nonlinearity": None,
                "option": option,
                "reverse": reverse,
                "lengths": has_lengths,
                "dtype": kind["dtype"],
                "precision": kind.get("precision", "highest"),
            }


def compare(case: dict, design, device: torch.device) -> dict:
    """The outcome of one comparison with ``rnnkernels.reference`` in float64."""
    torch.manual_seed(0)
    sequence_length, batch, dtype = case["sequence_length"], case["batch"], getattr(torch, case["dtype"])
    arguments = OPERATORS[case["operator"]](sequence_length, batch, 11, case["hidden_size"])
    options = {"reverse": case["reverse"]}
    if case["nonlinearity"] is not None:
        options["nonlinearity"] = case["nonlinearity"]
    if case["lengths"]:
        options["lengths"] = torch.randint(1, sequence_length + 1, (batch,))
    limit = LIMITS[arithmetic(dtype, device)]
    if case["option"] is not None:
        weights, given = options_of(case["operator"], sequence_length, batch, case["hidden_size"])[case["option"]]
        arguments, options, limit = arguments | weights, options | given, limit * OPTIONS_SLACK
    with forced(case["operator"], design), without_fallback(), poisoned():
        found = errors(case["operator"], arguments, dtype, device, **options)
    # A pre-activation within rounding of zero may fall on either side of ReLU's kink: a share of the gradients of about
    # the limit is then wholly different, and the norm of that is its root.
    loose = math.sqrt(limit) if case["nonlinearity"] == "relu" else limit
    wrong = [
        name for name, error in found.items() if not error <= (loose if name.startswith("gradient") else limit)
    ]  # NaN is wrong
    return {
        "relative_error": {name: records.finite(error) for name, error in found.items()},
        "allowed_error": {"results": limit, "gradients": loose},
        "status": "differs" if wrong else "agrees",
        "reason": f"too far from float64: {', '.join(wrong)}" if wrong else None,
    }


def compare_far_offsets(
    operator: str, device: torch.device, sequence_length: int, batch: int, hidden_size: int
) -> dict:
    """Whether the first and last rows are right in a batch of so many states that 32 bits can't count them."""
    torch.manual_seed(0)
    arguments = OPERATORS[operator](sequence_length, batch, 2, hidden_size)
    arguments = {name: argument.bfloat16() for name, argument in arguments.items()}
    cotangent = torch.randn(sequence_length, batch, 1).bfloat16()
    rows = torch.tensor([0, 1, batch - 2, batch - 1])

    def run(source, selected, device, dtype):
        own = {name: argument.to(device, dtype) for name, argument in arguments.items()}
        own["input"] = own["input"][:, selected].clone().requires_grad_()
        own |= {name: own[name][selected] for name in ("h_0", "c_0") if name in own}
        output, *_ = getattr(source, operator)(**own)
        outer = cotangent[:, selected].to(device, dtype).expand_as(output)
        return output.detach(), *torch.autograd.grad(output, own["input"], outer)

    actual = run(ops, slice(None), device, torch.bfloat16)
    expected = run(reference, rows, torch.device("cpu"), torch.float64)
    found = [relative_error(a[:, rows.to(device)], e) for a, e in zip(actual, expected, strict=True)]
    limit = LIMITS["bfloat16"]
    right = all(error <= limit for error in found)  # False for NaN
    return {
        "relative_error": dict(zip(("result 0", "gradient of input"), map(records.finite, found), strict=True)),
        "allowed_error": {"results": limit, "gradients": limit},
        "status": "agrees" if right else "differs",
        "reason": None if right else "too far from float64",
    }


FAR = {"rnn": (20_000, 1_700, 64), "gru": (10_000, 1_000, 64), "lstm": (10_000, 1_000, 64)}
"""Steps, batch and hidden units with more than 2^31 states, or gates."""


def far_offsets(operator: str, sizes: tuple[int, int, int], device: torch.device) -> dict:
    """The outcome of :func:`compare_far_offsets`, where there is memory for it; on tiny sizes for a rehearsal."""
    if device.type == "cpu":
        return compare_far_offsets(operator, device, 3, 5, 4)
    if torch.cuda.mem_get_info(device)[0] < 40 * 2**30:
        return {"status": "skipped", "reason": "it takes 40 GiB of a GPU's memory"}
    return compare_far_offsets(operator, device, *sizes)
