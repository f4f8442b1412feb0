"""Any cell with any of its options on a GPU.

Where the persistent design holds the weights, all steps run in one launch of the cell's own kernels. Not so with layer
normalization, since no program sees a whole row, nor where a step has a second product, which takes a second barrier:
in the GRU whose reset gate acts before the product, and in the LSTM with a projection.

There, and where the weights fit in no other way, cuBLAS forms the products of a step, and one kernel does all that is
pointwise; two products need two. The kernels, in ``steps``, also leave the state as the next product reads it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rnnkernels.kernels.eager.random import RECURRENT, threshold
from rnnkernels.kernels.recurrence import Gradients, Recurrence, Trace, Weights
from rnnkernels.kernels.triton import gru, lstm, rnn, steps
from rnnkernels.kernels.triton.dispatch import Persistent, input_precision, persistent_design, pointwise
from rnnkernels.kernels.triton.persistent import empty_exchange, exchange_from, launch
from rnnkernels.kernels.triton.random import kept

MODULES = {"rnn": rnn, "gru": gru, "lstm": lstm}
"""Modules of the cells' own kernels."""

PARTS = {"rnn": 1, "gru": 4, "lstm": 4}
"""Values of a hidden unit that a step keeps."""
ROWS = {"rnn": 1, "gru": 3, "lstm": 4}
"""Rows of the weights that a hidden unit has."""


class _Launch:
    """A kernel with the arguments that are the same at every step."""

    def __init__(self, kernel, batch: int, size: int, whole_rows: bool, arguments: dict):
        design = pointwise(size, whole_rows)
        given = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        self.kernel, self.given = kernel[design.grid(batch, size)], {**given, **design.constants()}
        self.wanted = [name for name in kernel.arg_names if name not in self.given]

    def __call__(self, step: dict) -> None:
        self.kernel(**self.given, **{name: step[name] for name in self.wanted})


class _Stage(NamedTuple):
    """A product and a kernel; forward in this order, backward in the other."""

    values: Tensor | None
    """What is multiplied, for every step or for all alike; None for the state."""
    weight: Tensor
    result: Tensor
    """Where the product goes, for every step or for all alike."""
    launch: _Launch
    carries: bool = True
    """Whether the kernel, backward, passes on a gradient of the state beside the product."""


def _of_step(tensor: Tensor, t: int) -> Tensor:
    return tensor[t] if tensor.dim() == 3 else tensor


def _as_read(state: Tensor, t: int, reset: Tensor | None, mask: Tensor | None) -> Tensor:
    """A state, as the product of step t reads it; or the gradient of the state, from that of what was read."""
    read = state if mask is None else state * mask
    return read if reset is None else read.masked_fill(reset[t].unsqueeze(-1), 0)


def _times(sequence_length: int, reverse: bool) -> list[int]:
    return list(range(sequence_length))[:: -1 if reverse else 1]


def _zoneout(probability: float, training: bool) -> str:
    if not probability:
        return "none"
    return "drawn" if training else "expected"


def _shared(
    recurrence: Recurrence,
    weights: Weights,
    h_0: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> dict:
    """Arguments of the kernels, by name, that both passes share."""
    mask = None
    if recurrence.training and recurrence.recurrent_dropout:
        mask = kept(recurrence.key, RECURRENT, recurrence.recurrent_dropout, h_0.shape, h_0)
    return {
        **{name: None if value is None else value.contiguous() for name, value in weights._asdict().items()},
        "lengths": lengths,
        "reset": None if reset is None else reset.contiguous().view(torch.uint8),
        "recurrent_mask": mask,
        "batch": len(h_0),
        "state_size": h_0.shape[1],
        "hidden_size": weights.weight_hh.shape[0] // ROWS[recurrence.cell],
        "epsilon": recurrence.epsilon,
        "grad_clip": recurrence.grad_clip,
        "key": recurrence.key,
        "zoneout": threshold(recurrence.zoneout),
        "zoneout_cell": threshold(recurrence.zoneout_cell),
        "NONLINEARITY": recurrence.nonlinearity,
        "ZONEOUT": _zoneout(recurrence.zoneout, recurrence.training),
        "ZONEOUT_CELL": _zoneout(recurrence.zoneout_cell, recurrence.training),
    }


def _persistent(recurrence: Recurrence, weights: Weights, arguments: dict, like: Tensor) -> Persistent | None:
    """The design in which all steps run in one launch, where the options allow it and the weights fit."""
    elsewhere = weights.norm_hh, weights.norm_cell_weight, weights.weight_hr
    if not recurrence.reset_after or any(weight is not None for weight in elsewhere):
        return None
    return persistent_design(recurrence.cell, arguments["hidden_size"], arguments["batch"], like.dtype, like.device)


def _launch_persistent(
    direction: str, design: Persistent, steps: int, recurrence: Recurrence, arguments: dict, output: Tensor
) -> bool:
    """Launch the cell's kernel for all steps of a pass, with its arguments by name. False if the GPU refuses to."""
    module = MODULES[recurrence.cell]
    kernel = getattr(module, f"{direction}_persistent")
    weights = module.squares(arguments["weight_hh"])
    bound = recurrence.grad_clip
    arguments = {
        **arguments,
        "weight_hh": weights,
        "bias_n": arguments["bias"],
        "grad_clip": None if bound == float("inf") else bound,
        "REVERSE": recurrence.reverse,
        "HAS_LENGTHS": arguments["lengths"] is not None,
        "HAS_BIAS": arguments["bias"] is not None,
        "PRECISION": input_precision(output.dtype),
    }
    names = kernel.arg_names
    tensors = tuple(arguments[name] for name in names[: names.index("counters")])
    sizes = *output.shape, weights.shape[-1]
    options = {name: arguments[name] for name in names[names.index("weight_size") + 1 :] if name in arguments}
    return launch(kernel, design, steps, tensors, sizes, **options)


def _launches(arguments: dict, *kernels) -> list[_Launch]:
    """Kernels of a cell, of which those of the state have its size."""
    whole_rows = arguments["norm_hh"] is not None or arguments["norm_cell_weight"] is not None
    batch, hidden_size, state_size = (arguments[name] for name in ("batch", "hidden_size", "state_size"))
    return [
        _Launch(kernel, batch, state_size, False, arguments)
        if "state_size" in kernel.arg_names
        else _Launch(kernel, batch, hidden_size, whole_rows, arguments)
        for kernel in kernels
    ]


def _forward_stages(recurrence: Recurrence, arguments: dict, h_0: Tensor, trace: Trace) -> list[_Stage]:
    batch, size = arguments["batch"], arguments["hidden_size"]
    weight = arguments["weight_hh"]
    scratch = h_0.new_empty(batch, weight.shape[0])
    kept_products = trace.products is not None and recurrence.cell != "rnn"  # the RNN normalizes the sum with the input
    product = arguments["product"] = trace.products if kept_products else scratch
    if recurrence.cell == "rnn":
        return [_Stage(None, weight, product, *_launches(arguments, steps.rnn_forward))]
    if recurrence.cell == "gru" and recurrence.reset_after:
        return [_Stage(None, weight, product, *_launches(arguments, steps.gru_forward))]
    if recurrence.cell == "gru":
        trace.gates[..., :size].zero_()
        reset_state = arguments["reset_state"] = torch.empty_like(h_0)
        gates, candidate = _launches(arguments, steps.gru_gates_forward, steps.gru_candidate_forward)
        return [
            _Stage(None, weight[: 2 * size], product[..., : 2 * size], gates),
            _Stage(reset_state, weight[2 * size :], product[..., 2 * size :], candidate),
        ]
    weight_hr = arguments["weight_hr"]
    hidden = arguments["hidden"] = None if weight_hr is None else h_0.new_empty(batch, size)
    projection = arguments["projection"] = torch.empty_like(h_0)
    cell, state = _launches(arguments, steps.lstm_forward, steps.state_forward)
    stages = [_Stage(None, weight, product, cell)]
    return stages if weight_hr is None else [*stages, _Stage(hidden, weight_hr, projection, state)]


def forward(
    projected: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Weights,
    lengths: Tensor | None,
    reset: Tensor | None,
    recurrence: Recurrence,
) -> Trace:
    """Run the cell over the projected input."""
    projected, h_0 = projected.contiguous(), h_0.contiguous()
    arguments = _shared(recurrence, weights, h_0, lengths, reset)
    sequence_length, batch, _ = projected.shape
    size = arguments["hidden_size"]
    output = projected.new_empty(sequence_length, *h_0.shape)
    gates = projected.new_empty(sequence_length, batch, PARTS[recurrence.cell] * size)
    products = None if weights.norm_hh is None else torch.empty_like(projected)
    cells = new_cells = None
    if c_0 is not None:
        cells = projected.new_empty(sequence_length, batch, size, dtype=torch.float32)
        new_cells = torch.empty_like(cells) if recurrence.zoneout_cell else None
    if output.numel() == 0:
        return Trace(output, h_0.clone(), None if c_0 is None else c_0.clone(), gates, cells, new_cells, products)
    mask, times = arguments["recurrent_mask"], _times(sequence_length, recurrence.reverse)
    read = _as_read(h_0, times[0], reset, mask)
    initial_cells = None if c_0 is None else c_0.contiguous().float()
    arguments |= {"projected": projected, "output": output, "gates": gates, "products": products}
    arguments |= {"cells": cells, "new_cells": new_cells}
    trace = Trace(output, h_0, c_0, gates, cells, new_cells, products)
    design = _persistent(recurrence, weights, arguments, output)
    if design is not None:
        h_n = h_0.clone()
        given = {"exchange": exchange_from(design, read), "state": h_n, "c_0": initial_cells}
        if _launch_persistent("forward", design, sequence_length, recurrence, arguments | given, output):
            c_n = None if c_0 is None else cells[times[-1]].to(c_0.dtype, copy=True)
            return trace._replace(h_n=h_n, c_n=c_n)
    recurrent = arguments["recurrent"] = None if mask is None and reset is None else torch.empty_like(h_0)
    stages = _forward_stages(recurrence, arguments, h_0, trace)
    standing = None if lengths is None else [torch.empty_like(h_0), torch.empty_like(h_0)]
    h, earlier, c, earlier_cell = h_0, 0, initial_cells, 0
    for k, t in enumerate(times):
        following = None if standing is None else standing[k % 2]
        step = {"time": t, "later": times[min(k + 1, sequence_length - 1)], "following": following}
        step |= {"h": h, "earlier": earlier, "c": c, "earlier_cell": earlier_cell}
        for stage in stages:
            values = read if stage.values is None else stage.values
            torch.mm(values, stage.weight.t(), out=_of_step(stage.result, t))
            stage.launch(step)
        h, earlier = (output, t) if following is None else (following, 0)
        c, earlier_cell = cells, t
        read = recurrent if recurrent is not None else output[t] if following is None else following
    h_n = output[times[-1]] if standing is None else h
    c_n = None if c_0 is None else cells[times[-1]].to(c_0.dtype, copy=True)
    return trace._replace(h_n=h_n.clone(), c_n=c_n)


def _backward_stages(recurrence: Recurrence, arguments: dict, through: Tensor, grad: Gradients) -> list[_Stage]:
    weight, size, norm = arguments["weight_hh"], arguments["hidden_size"], arguments["norm_hh"]
    through_product = grad.gates if norm is None else grad.products
    if recurrence.cell == "rnn":
        return [_Stage(through_product, weight, through, *_launches(arguments, steps.rnn_backward))]
    if recurrence.cell == "gru" and recurrence.reset_after:
        if norm is None:  # the gradients of the gates are in the order n, r, z
            through_product, weight = grad.gates[..., : 3 * size], weight.roll(size, 0)
        return [_Stage(through_product, weight, through, *_launches(arguments, steps.gru_backward))]
    if recurrence.cell == "gru":
        grad.gates[..., :size].zero_()
        reset_state = arguments["grad_reset_state"] = torch.empty_like(through)
        candidate, gates = _launches(arguments, steps.gru_candidate_backward, steps.gru_gates_backward)
        parts = grad.gates[..., size:] if norm is None else grad.products
        return [
            _Stage(parts[..., 2 * size :], weight[2 * size :], reset_state, candidate),
            _Stage(parts[..., : 2 * size], weight[: 2 * size], through, gates),
        ]
    weight_hr = arguments["weight_hr"]
    hidden = None if weight_hr is None else through.new_empty(len(through), size)
    arguments["grad_hidden"] = hidden
    state, cell = _launches(arguments, steps.state_backward, steps.lstm_backward)
    if weight_hr is None:
        return [_Stage(through_product, weight, through, cell)]
    return [_Stage(grad.states, weight_hr, hidden, state), _Stage(through_product, weight, through, cell, False)]


def backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor | None,
    trace: Trace,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Weights,
    lengths: Tensor | None,
    reset: Tensor | None,
    recurrence: Recurrence,
) -> Gradients:
    """Gradients of what :func:`forward` computed."""
    h_0 = h_0.contiguous()
    arguments = _shared(recurrence, weights, h_0, lengths, reset)
    keeps_states = weights.weight_hr is not None or weights.norm_cell_weight is not None
    grad = Gradients(
        torch.empty_like(trace.gates),
        None if trace.products is None else torch.empty_like(trace.products),
        torch.empty_like(trace.output) if keeps_states else None,
        grad_h_n,
        grad_c_n,
    )
    sequence_length = len(trace.output)
    if trace.output.numel() == 0:
        return grad._replace(h_0=grad_h_n.clone(), c_0=None if c_0 is None else grad_c_n.clone())
    arguments |= {"grad_output": grad_output.contiguous(), "grad_gates": grad.gates, "gates": trace.gates}
    design = _persistent(recurrence, weights, arguments, trace.output)
    if design is not None:
        grad_h, grad_c = (
            None if gradient is None else gradient.contiguous().to(torch.float32, copy=True)
            for gradient in (grad_h_n, grad_c_n)
        )
        given = {
            "output": trace.gates if recurrence.cell == "rnn" else trace.output,
            "cells": trace.cells,
            "new_cells": trace.new_cells,
            "h_0": h_0,
            "c_0": None if c_0 is None else c_0.contiguous().float(),
            "grad_projected": grad.gates,
            **{"carried": grad_h, "carried_h": grad_h, "carried_c": grad_c},
            "exchange": empty_exchange(design, len(h_0), ROWS[recurrence.cell], trace.output),
        }
        if _launch_persistent("backward", design, sequence_length + 1, recurrence, arguments | given, trace.output):
            grad_c_0 = None if c_0 is None else grad_c.to(c_0.dtype)
            return grad._replace(h_0=grad_h.to(h_0.dtype), c_0=grad_c_0)
    through = torch.zeros_like(h_0)
    arguments |= {"grad_products": grad.products, "grad_states": grad.states}
    arguments |= {"through": through, "products": trace.products}
    arguments["new_cells"] = trace.cells if trace.new_cells is None else trace.new_cells
    arguments["h_0"] = h_0 if recurrence.reverse and lengths is not None else None
    stages = _backward_stages(recurrence, arguments, through, grad)
    beside, following = grad_h_n.contiguous().float(), h_0.new_empty(h_0.shape, dtype=torch.float32)
    spare = torch.empty_like(following)
    c_first = grad_c = following_c = spare_c = None
    if c_0 is not None:
        c_first, grad_c = c_0.contiguous().float(), grad_c_n.contiguous().float()
        following_c, spare_c = torch.empty_like(c_first), torch.empty_like(c_first)
    times = _times(sequence_length, recurrence.reverse)
    for k in reversed(range(sequence_length)):
        step = {"time": times[k], "later": times[min(k + 1, sequence_length - 1)]}
        step |= {"earlier": times[k - 1], "earlier_cell": times[k - 1], "h": trace.output, "c": trace.cells}
        if k == 0:
            step |= {"earlier": 0, "earlier_cell": 0, "h": h_0, "c": c_first}
        step |= {"grad_c": grad_c, "following_c": following_c}
        for stage in stages:
            stage.launch({**step, "beside": beside, "following": following})
            torch.mm(_of_step(stage.values, times[k]), stage.weight, out=stage.result)
            if stage.carries:
                # What came as an argument may be the caller's: it is read, never written.
                beside, following, spare = following, spare, following
        grad_c, following_c, spare_c = following_c, spare_c, following_c
    grad_h_0 = (beside + _as_read(through.float(), times[0], reset, arguments["recurrent_mask"])).to(h_0.dtype)
    return grad._replace(h_0=grad_h_0, c_0=None if c_0 is None else grad_c.to(c_0.dtype, copy=True))
