"""Break the package one term at a time, and see whether a test notices.

    python tools/mutate.py              # all mutations
    python tools/mutate.py lstm clip    # those whose name contains any of these
    python tools/mutate.py --list       # their names, and whether they still apply

Each mutation is made in a copy of the package in a temporary folder, where the tests that ought to notice it then run.
A mutation that survives means that a test is missing; one that no longer applies means that the table below is out of
date. Either makes the exit status 1.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

SUITES = {
    "ops": (
        "tests/test_ops.py",
        "float64_matches or reverse or without_gradients or empty or without_onednn or shorter_self or alone"
        " or last_step or bias or padding or in_parts",
    ),
    "options": (
        "tests/test_options.py",
        "alone_and_in_pairs or all_together or masks or draws or dropconnect or reset or dropout",
    ),
    "reference": ("tests/test_reference.py", ""),
    "random": ("tests/test_random.py", "not triton"),
    "modules": (
        "tests/test_nn.py tests/test_options.py",
        "(test_nn and (torch_gives or cell or packed)) or loop or forgets or module or law or mask or parameters"
        " or bad_calls",
    ),
    "transforms": ("tests/test_transforms.py", "vmap or forward_mode or per_sample or cells"),
    "scan": (
        "tests/test_linear_scan.py tests/test_minimal.py",
        "float64_matches or (parts and not bfloat16) or one_part_at_a_time or bound_decides",
    ),
    "recompute": ("tests/test_options.py", "(recompute and not any_together) or piece_of_time"),
    "steps": ("tests/test_launch.py", ""),
    "second": (
        "tests/test_ops.py tests/test_options.py",
        "second_gradients",
    ),
    "eager": ("tests/test_eager.py", ""),
    "directions": ("tests/test_directions.py", "(match_torch and unsorted) or a_process or twice"),
    "persistent": ("tests/test_persistent.py", "(direction and unsorted) or a_process or (every_size and 129)"),
    "persistent options": ("tests/test_persistent_options.py", "every_option or lengths_resets or clipped"),
    "wavefront": (
        "tests/test_wavefront.py",
        "(matches_torch and tile0) or (dropout and (is_that or bits)) or a_process",
    ),
}
"""What to run: files, and pytest's -k."""


class Mutation(NamedTuple):
    """One change of one file of the package: ``before`` occurs there exactly once."""

    name: str
    path: str
    before: str
    after: str
    suite: str = "ops"


def of(path: str, suite: str, *changes: tuple[str, str, str]) -> list[Mutation]:
    return [Mutation(name, path, before, after, suite) for name, before, after in changes]


MUTATIONS = [
    *of(
        "reference.py",
        "reference",
        (
            "reference rnn: the state's bias left out",
            "bias for bias in (bias_ih, bias_hh) if bias is not None), a)\n    return ACT",
            "bias for bias in (bias_ih,) if bias is not None), a)\n    return ACT",
        ),
        (
            "reference rnn: unclipped",
            "return ACTIVATIONS[nonlinearity](clip_gradient(a, grad_clip))",
            "return ACTIVATIONS[nonlinearity](a)",
        ),
        (
            "reference gru: gates exchanged",
            "r, z = torch.sigmoid(clip_gradient(from_input[0]",
            "z, r = torch.sigmoid(clip_gradient(from_input[0]",
        ),
        (
            "reference gru: update the other way round",
            "return (1 - z) * n + z * hidden",
            "return z * n + (1 - z) * hidden",
        ),
        (
            "reference gru: reset after either way",
            "recurrent if reset_after else r * recurrent, weight_hh[candidate]",
            "recurrent, weight_hh[candidate]",
        ),
        ("reference gru: the mask reaches the carried state", "+ z * hidden", "+ z * recurrent"),
        ("reference lstm: gates exchanged", "a_i, a_f, a_g, a_o = a.chunk", "a_i, a_g, a_f, a_o = a.chunk"),
        (
            "reference lstm: peephole from the old cell state",
            "a_o = a_o + weight_peephole[2] * cell\n    o",
            "a_o = a_o + weight_peephole[2] * 0 * cell\n    o",
        ),
        (
            "reference lstm: peepholes exchanged",
            "a_i + weight_peephole[0] * cell, a_f + weight_peephole[1] * cell",
            "a_i + weight_peephole[1] * cell, a_f + weight_peephole[0] * cell",
        ),
        (
            "reference lstm: no bias of the normalized cell",
            "layer_norm(cell, norm_cell_weight) + norm_cell_bias",
            "layer_norm(cell, norm_cell_weight)",
        ),
        (
            "reference lstm: normalized cell carried on",
            "hidden = o * torch.tanh(shown)",
            "hidden, cell = o * torch.tanh(shown), shown",
        ),
        ("reference: zoneout the other way round", "torch.where(stays, old, new)", "torch.where(stays, new, old)"),
        (
            "reference: expectation the other way round",
            "stays * old + (1 - stays) * new",
            "stays * new + (1 - stays) * old",
        ),
        (
            "reference: reset one step late",
            "torch.where(reset[t].unsqueeze(-1), 0, state)",
            "torch.where(reset[t - 1].unsqueeze(-1), 0, state)",
        ),
        ("reference: one step too many", "active = (t < lengths)", "active = (t <= lengths)"),
        ("reference: output in padding", "outputs[t] = torch.where(active, outputs[t], 0)", "pass"),
        (
            "reference: both zoneouts share a mask",
            "zip((random.ZONEOUT, random.ZONEOUT_CELL), zoneout",
            "zip((random.ZONEOUT, random.ZONEOUT), zoneout",
        ),
    ),
    *of(
        "kernels/eager/random.py",
        "random",
        ("random: a round less", "for addend in (z, y, z):", "for addend in (z, z):"),
        ("random: even keys", "| 1\n", "| 0\n"),
        ("random: no stream", "flat, first = mask.view(-1), stream << 56", "flat, first = mask.view(-1), 0"),
        (
            "random: every chunk the same",
            "torch.arange(first + start, first + start + part.numel()",
            "torch.arange(first, first + part.numel()",
        ),
        ("random: a scale off", "1 / (1 - probability)", "1 / probability"),
        ("random: keeps what it should drop", "shape, like.device).logical_not_()", "shape, like.device)"),
        ("random: a mask for each step though shared", "input.shape[1:] if shared else input.shape", "input.shape"),
        ("random: threshold halved", "round(probability * 2**32)", "round(probability * 2**31)"),
    ),
    *of(
        "kernels/eager/rnn.py",
        "ops",
        (
            "rnn: derivative of tanh",
            "torch.addcmul(states.new_ones(()), states, states, value=-1)",
            "torch.addcmul(states.new_ones(()), states, states, value=-2)",
        ),
        (
            "rnn: derivative of the sigmoid",
            "torch.addcmul(states, states, states, value=-1)",
            "torch.addcmul(states, states, states, value=1)",
        ),
        ("rnn: derivative of relu", "(states <= 0)", "(states <= 1)"),
        ("rnn: derivative of the identity", "torch.ones_like(states)", "torch.zeros_like(states)"),
        (
            "rnn: transposed product backward",
            "product = Recurrent(weight_hh.t(), len(states) / len(counts))",
            "product = Recurrent(weight_hh, len(states) / len(counts))",
        ),
        (
            "rnn: transposed product forward",
            "product = Recurrent(weight_hh, len(states) / len(counts))",
            "product = Recurrent(weight_hh.t(), len(states) / len(counts))",
        ),
        (
            "rnn: gradient of the initial state dropped",
            "grad_h_0[:count] = previous @ weight_hh",
            "grad_h_0[:count] = 0",
        ),
        (
            "rnn: gradient of the last state dropped",
            "reached = grad_h_n[:0] if previous is None",
            "grad_h_n = grad_h_n * 0\n            reached = grad_h_n[:0] if previous is None",
        ),
        ("rnn: arriving gradient forgotten where rows begin", "grad_h_0, count) + arriving", "grad_h_0, count)"),
        ("rnn: last state of the sequences that go on", "h_n[:count] = hidden", "h_n[:count] = h_0[:count]"),
        (
            "rnn: order of the backward pass",
            "slice(0, len(counts)), not reverse)",
            "slice(0, len(counts)), reverse)",
        ),
    ),
    *of(
        "kernels/eager/gru.py",
        "ops",
        (
            "gru: rows not rolled",
            "product = Recurrent(_rolled(weight_hh), len(gates) / len(counts))",
            "product = Recurrent(weight_hh, len(gates) / len(counts))",
        ),
        ("gru: candidate's bias left out", "0 if bias_hh is None else bias_hh[2 * hidden_size :]", "0"),
        ("gru: reset gate left out", "n.addcmul_(r, hn).tanh_()", "n.add_(hn).tanh_()"),
        (
            "gru: update the other way round",
            "hidden = torch.lerp(n, hidden, z, out=new)",
            "hidden = torch.lerp(hidden, n, z, out=new)",
        ),
        ("gru: slope of z", "slope_z.mul_(torch.addcmul(z, z, z, value=-1))", "slope_z.mul_(z)"),
        ("gru: slope of n", "slope_n.addcmul_(slope_n, z, value=-1)", "slope_n.addcmul_(slope_n, z, value=1)"),
        (
            "gru: slope of r",
            "torch.addcmul(hn, hn, r, value=-1), slope_hn, out=slope_r",
            "torch.addcmul(hn, hn, r, value=-1), slope_n, out=slope_r",
        ),
        ("gru: slope of hn", "torch.mul(slope_n, r, out=slope_hn)", "torch.mul(slope_n, z, out=slope_hn)"),
        (
            "gru: gradient straight through the update gate dropped",
            "carried = product(from_state, kept, kept)",
            "carried = product(from_state, kept * 0, kept)",
        ),
        (
            "gru: transposed product backward",
            "product = Recurrent(_rolled(weight_hh).t(), len(gates) / len(counts))",
            "product = Recurrent(_rolled(weight_hh.roll(1, 1)).t(), len(gates) / len(counts))",
        ),
        ("gru: gradient of the initial state dropped", "grad_h_0[:count] = carried", "grad_h_0[:count] = 0"),
        ("gru: order of the backward pass", "counts, some, not reverse)", "counts, some, reverse)"),
    ),
    *of(
        "ops/_sequence.py",
        "recompute",
        (
            "pieces: a step that belongs to the one before",
            "(lengths - steps.start).clamp",
            "(lengths - steps.start + 1).clamp",
        ),
        (
            "pieces: the state of who has not begun",
            "(lengths > steps.stop).unsqueeze(-1), later, initial",
            "(lengths > 0).unsqueeze(-1), later, initial",
        ),
        ("pieces: the state of who has ended", "torch.where((lengths > 0).unsqueeze(-1), final, before)", "final"),
        ("pieces: in one order only", "return pieces[::-1] if reverse else pieces", "return pieces"),
        (
            "pieces: the last one's gradient alone",
            "torch.stack(list(gradients)).sum(0, ",
            "torch.stack(list(gradients[:1])).sum(0, ",
        ),
        ("pieces: each from the beginning", "states[steps.start - 1] if steps.start else initial", "initial"),
    ),
    *of(
        "kernels/eager/packing.py",
        "eager",
        ("packing: off by one in time", "earlier = t + 1 if reverse else t - 1", "earlier = t if reverse else t - 1"),
        ("packing: a state that was there already", "[h_0[known : counts[t]]]", "[h_0[: counts[t] - known]]"),
        ("packing: not the first step", "if start else torch.cat([h_0,", "if True else torch.cat([h_0,"),
        ("packing: not the last step", "whole = stop < len(counts)", "whole = True"),
    ),
    *of(
        "kernels/eager/variable_length.py",
        "eager",
        ("steps: counted from zero", "range(steps.start + first, steps.start + last)", "range(first, last)"),
        ("steps: pieces in one order only", "in reversed(pieces) if reverse else pieces", "in pieces"),
        ("steps: all views at once", "size = max(1, _VIEWS // len(sequences))", "size = len(offsets)"),
    ),
    *of(
        "kernels/eager/products.py",
        "eager",
        ("products: a part twice", "columns.copy_(torch.baddbmm(", "columns[:1].copy_(torch.baddbmm("),
        ("products: addend forgotten", "columns.copy_(torch.baddbmm(addends, states", "columns.copy_(torch.bmm(states"),
        ("products: parts for many rows", "in_parts = rows <= most_rows and ", "in_parts = "),
    ),
    *of(
        "kernels/eager/linear_scan.py",
        "scan",
        ("scan: each part from the beginning", "state = states[0 if reverse else -1]\n", "pass\n"),
        ("scan: gradient from part to part", "return decay[first] * gradient[first]", "return gradient[first]"),
        (
            "scan: the last step's own gradient",
            "torch.add(added[last], carried, out",
            "torch.add(0 * carried, carried, out",
        ),
        ("scan: decays not late", "scan(decay[followers], added", "scan(decay[others], added"),
        (
            "scan: gradient of decays at resets",
            "grad_decay[steps].masked_fill_(reset[steps].unsqueeze(-1), 0)",
            "pass",
        ),
    ),
    *of(
        "kernels/eager/minimal.py",
        "scan",
        ("minimal: each part from the beginning", "state = states[0 if reverse else -1]", "pass"),
        ("minimal: the share falls unnoticed", "None, reverse, steps) - value", "None, reverse, steps) - 0"),
        (
            "minimal: slope of the gate",
            "through.mul_(gradient).mul_(decay).mul_(share)",
            "through.mul_(gradient).mul_(decay)",
        ),
        ("minimal: sign of the gate", "torch.neg(through, out=gates[0])", "gates[0].copy_(through)"),
        ("minimal: slope of the input gate", "torch.sigmoid(-input).neg_()", "torch.sigmoid(-input)"),
        ("minimal: slope of tanh", "return 1 - value.square()", "return 1 - value"),
        ("minimal: slope of g above zero", ".masked_fill_(candidate > 0, 1)", ""),
    ),
    *of(
        "ops/minimal.py",
        "scan",
        (
            "minimal: bias left out",
            "linear(input.flatten(0, 1), weight_ih, bias_ih, out",
            "linear(input.flatten(0, 1), weight_ih, None, out",
        ),
        ("minimal: lengths forgotten", "and not (masked or transformed())", "and not transformed()"),
    ),
    *of(
        "kernels/eager/packing.py",
        "ops",
        (
            "packing: order of the states",
            "return state.index_select(0, self.inverse)",
            "return state.index_select(0, self.order)",
        ),
        (
            "packing: initial state's part in the weight's gradient",
            ".addmm_(first.t(), h_0)",
            ".addmm_(first.t(), h_0, beta=1, alpha=0)",
        ),
    ),
    *of(
        "kernels/eager/variable_length.py",
        "ops",
        (
            "lengths: rows that begin come from nowhere",
            "torch.cat([carried, initial[len(carried) : count]])",
            "torch.cat([carried, 0 * initial[len(carried) : count]])",
        ),
        (
            "lengths: final state of the rows that end",
            "final[count : len(carried)] = carried[count:]",
            "final[count : len(carried)] = 0",
        ),
    ),
    *of(
        "kernels/eager/variable_length.py",
        "options",
        (
            "lengths: padding off by one",
            "return (lengths <= steps).unsqueeze(-1)",
            "return (lengths < steps).unsqueeze(-1)",
        ),
        ("lengths: initial state in reverse", "earlier = torch.where(first.unsqueeze(-1), initial, earlier)", "pass"),
    ),
    *of(
        "ops/gru.py",
        "ops",
        ("gru: bias of the input left out", "return bias if bias_ih is None else bias + bias_ih", "return bias"),
        (
            "gru: gradient of the state's bias not rolled",
            "grad_bias_hh = from_state.flatten(0, -2).sum(0).roll(-hidden_size, 0)",
            "grad_bias_hh = from_state.flatten(0, -2).sum(0)",
        ),
        (
            "gru: gradient of the weight not rolled",
            "weight_gradient(from_state).roll(-hidden_size, 0)",
            "weight_gradient(from_state)",
        ),
        (
            "gru: gradient of h_0 in the wrong order",
            "else grad_input, rows.unsorted(grad_h_0)",
            "else grad_input, grad_h_0",
        ),
        (
            "gru: native forward not turned round",
            "return output.flip(0) if reverse else output, h_n.squeeze(0)",
            "return output, h_n.squeeze(0)",
        ),
    ),
    *of(
        "ops/gru.py",
        "options",
        (
            "gru: inner bias in both places",
            "outer = torch.cat([outer[: 2 * hidden_size], torch.zeros_like(inner)])",
            "pass",
        ),
        ("gru: the candidate's bias outside the reset gate", "if outer is not None and reset_after:", "if False:"),
    ),
    *of("ops/rnn.py", "ops", ("rnn: biases' gradients share memory", "gradients[5] = grad_bias.clone()", "pass")),
    *of(
        "ops/rnn.py",
        "options",
        ("rnn: bias before the normalization", "if norm_hh is not None and biases:", "if False:"),
    ),
    *of(
        "ops/rnn.py",
        "second",
        (
            "rnn: second gradients forget the lengths",
            "results = results_of(reference.rnn, input, tensors[1:], lengths=lengths, **options)",
            "results = results_of(reference.rnn, input, tensors[1:], **options)",
        ),
    ),
    *of(
        "ops/gru.py",
        "second",
        (
            "gru: second gradients forget the direction",
            'tensors[1:], reverse=ctx.options["reverse"], lengths=lengths)',
            "tensors[1:], reverse=False, lengths=lengths)",
        ),
    ),
    *of(
        "ops/_general.py",
        "second",
        (
            "options: second gradients unclipped",
            '"grad_clip": None if grad_clip == UNBOUNDED else grad_clip,\n    }\n    if cell',
            '"grad_clip": None,\n    }\n    if cell',
        ),
    ),
    *of(
        "ops/_general.py",
        "options",
        (
            "options: gradient of the rnn's gain",
            "grad_norm = _total(grad_a * _normalized(trace.products, (trace.products.shape[-1],)))\n    grad_bias",
            "grad_norm = _total(grad_a)\n    grad_bias",
        ),
        (
            "options: groups of the gru's gain",
            "normalized = _normalized(trace.products, (2 * size, size))",
            "normalized = _normalized(trace.products, (3 * size,))",
        ),
        (
            "options: reset gate in the gradient of W_hn",
            "factor = recurrent if reset_after else recurrent * trace",
            "factor = recurrent if True else recurrent * trace",
        ),
        (
            "options: gradient of the peephole of i",
            "torch.stack([_total(grad_i * old_c)",
            "torch.stack([_total(grad_i * cells)",
        ),
        ("options: gradient of the peephole of o", "_total(grad_o * cells)])", "_total(grad_o * old_c)])"),
        (
            "options: cells after zoneout",
            "cells = trace.cells if trace.new_cells is None else trace.new_cells\n    grad_i",
            "cells = trace.cells\n    grad_i",
        ),
        (
            "options: gradient of the projection",
            "_product(gradients.states, o * shown)",
            "_product(gradients.states, shown)",
        ),
        (
            "options: bias of the normalized cell's gradient",
            "_total(grad_shown * normalized), _total(grad_shown)",
            "_total(grad_shown * normalized), _total(grad_hidden)",
        ),
        (
            "options: through the normalized cell",
            "grad_shown = grad_hidden * o * (1 - shown * shown)",
            "grad_shown = grad_hidden * o",
        ),
    ),
    *of(
        "kernels/eager/general.py",
        "options",
        ("general rnn: unclipped", "grad_a = self.clip_(slopes.mul_(grad_h))", "grad_a = slopes.mul_(grad_h)"),
        (
            "general gru: unclipped z and n",
            "self.clip_(zn.view(-1, 2, size).mul_(grad_h.unsqueeze(1)))",
            "zn.view(-1, 2, size).mul_(grad_h.unsqueeze(1))",
        ),
        ("general gru: unclipped r", "            self.clip_(r)\n", ""),
        ("general gru: unclipped r, reset before", "self.clip_(r.mul_(grad_reset))", "r.mul_(grad_reset)"),
        (
            "general gru: straight path dropped",
            "grad_recurrent.addmm_(grad_rz, self.weight_rz), grad_h * self.update[t], None",
            "grad_recurrent.addmm_(grad_rz, self.weight_rz), grad_h * 0, None",
        ),
        (
            "general gru: straight path dropped, in one product",
            "self.rolled_t), grad_h * self.update[t], None",
            "self.rolled_t), grad_h * 0, None",
        ),
        (
            "general gru: reset before, product not masked",
            "grad_recurrent = grad_reset * hn",
            "grad_recurrent = grad_reset",
        ),
        (
            "general gru: bias inside the reset gate",
            "torch.add(carried, self.weights.bias, out=hn)",
            "hn.copy_(carried)",
        ),
        ("general lstm: unclipped o", "self.clip_(o.mul_(grad_h))", "o.mul_(grad_h)"),
        (
            "general lstm: peephole of o forgotten on the way back",
            "grad_c = torch.addcmul(grad_c, o, self.peephole[2])",
            "pass",
        ),
        (
            "general lstm: peepholes of i and f forgotten on the way back",
            "grad_c.addcmul_(i, self.peephole[0]).addcmul_(f, self.peephole[1])",
            "grad_c.addcmul_(i, self.peephole[0])",
        ),
        (
            "general lstm: peephole of f",
            "f.addcmul_(self.peephole[1], c.to(f.dtype))",
            "f.addcmul_(self.peephole[0], c.to(f.dtype))",
        ),
        (
            "general lstm: old cell state at o's peephole",
            "o.addcmul_(self.peephole[2], new_c.to(o.dtype))",
            "o.addcmul_(self.peephole[2], c.to(o.dtype))",
        ),
        (
            "general lstm: no projection on the way back",
            "grad_h = grad_h @ self.projection",
            "grad_h = grad_h @ (2 * self.projection)",
        ),
        ("general: mask not drawn again", "through if mask is None else through * mask", "through"),
        ("general: zoneout's old state gets nothing", "torch.where(stays, gradient, 0)", "gradient * 0"),
        (
            "general: expectation's old state gets nothing",
            "return gradient * (1 - self.probability), gradient * self.probability",
            "return gradient * (1 - self.probability), gradient * 0",
        ),
        ("general: gradient past a reset", "earlier_h = earlier_h.masked_fill(cleared[time], 0)", "pass"),
        (
            "general: gradient of the cell state past a reset",
            "earlier_c = earlier_c.masked_fill(cleared[time], 0) if has_cells else None",
            "pass",
        ),
        (
            "general: the cell state not reset",
            "old_c = c.masked_fill(cleared[t], 0) if has_cells else None",
            "old_c = c",
        ),
        ("general: gradient in the padding", "arriving_h = arriving_h.masked_fill(~active[time], 0)", "pass"),
        ("general: state goes on in the padding", "h = torch.where(active[t], new_h, h)", "h = new_h"),
        (
            "general: both zoneouts share a mask",
            "random.dropped(recurrence.key, stream, probability",
            "random.dropped(recurrence.key, random.ZONEOUT, probability",
        ),
        ("general: previous states not reset", "h = h.masked_fill(cleared, 0)", "pass"),
        ("general: previous states not masked", "return h, c, h if mask is None else h * mask", "return h, c, h"),
        (
            "general: gradient of the initial cell state dropped",
            "grad_c_0 = grad_c.to(c_0.dtype, copy=True)",
            "grad_c_0 = torch.zeros_like(c_0)",
        ),
    ),
    *of(
        "kernels/eager/general.py",
        "ops",
        ("lstm: slope of i", "slope_i).mul_(g)", "slope_i).mul_(f)"),
        ("lstm: slope of f", "slope_f).mul_(c)", "slope_f).mul_(cells)"),
        ("lstm: slope of g", "slope_g).mul_(i)", "slope_g).mul_(f)"),
        ("lstm: slope of o", "slope_o).mul_(shown)", "slope_o).mul_(cells)"),
        (
            "lstm: the gradient of the last cell state dropped",
            "grad_c = grad_c_n.to(trace.cells.dtype) if has_cells",
            "grad_c = 0 * grad_c_n.to(trace.cells.dtype) if has_cells",
        ),
        (
            "lstm: forget gate left out",
            "new_c = (f * c).addcmul_(i, g.tanh_())",
            "new_c = c.clone().addcmul_(i, g.tanh_())",
        ),
    ),
    *of(
        "kernels/eager/variable_length.py",
        "ops",
        (
            "lengths: read backwards off by one",
            "torch.where(steps < lengths, lengths - 1 - steps, steps)",
            "torch.where(steps < lengths - 1, lengths - 1 - steps, steps)",
        ),
    ),
    *of(
        "kernels/eager/onednn.py",
        "ops",
        ("onednn: input gate open in the padding", "column[:hidden_size] = -_SHUT", "column[:hidden_size] = 0"),
        (
            "onednn: forget gate shut in the padding",
            "column[hidden_size : 2 * hidden_size] = _SHUT",
            "column[hidden_size : 2 * hidden_size] = 0",
        ),
        (
            "onednn: gradients of the states exchanged",
            "return grad_input, grad_h_0, grad_c_0, *grad_weights",
            "return grad_input, grad_c_0, grad_h_0, *grad_weights",
        ),
        ("onednn: what the padding holds", "input.masked_fill(ended, 0)", "input"),
    ),
    *of(
        "ops/_sequence.py",
        "ops",
        ("padding counts in the weights' gradients", "input.masked_fill(padding(lengths, input.shape[0]), 0)", "input"),
    ),
    *of(
        "ops/lstm.py",
        "ops",
        ("lstm: a part starts one step late", "longest_first[:running] - start", "longest_first[:running] - start + 1"),
        ("lstm: cell states of the parts in the wrong order", "torch.cat(final[::-1])", "torch.cat(final)"),
        ("lstm: initial states of the parts unsorted", "h_0.index_select(0, order), c_0", "h_0, c_0"),
        ("lstm: parts left in the order of length", "torch.cat(states).index_select(1, inverse)", "torch.cat(states)"),
        (
            "lstm: last state one step early",
            "output.gather(0, (lengths - 1).view",
            "output.gather(0, (lengths - 2).clamp(min=0).view",
        ),
        ("lstm: output in the padding", "output.masked_fill(padding(lengths, output.shape[0]), 0)", "output"),
    ),
    *of(
        "ops/lstm.py",
        "second",
        (
            "lstm: second gradients forget the direction",
            "results = reference.lstm(*tensors, reverse=ctx.reverse)",
            "results = reference.lstm(*tensors)",
        ),
    ),
    *of(
        "ops/dropout.py",
        "options",
        (
            "dropout: another mask on the way back",
            "return torch.ops.rnnkernels.dropout(gradient, seed, *ctx.options)",
            "return torch.ops.rnnkernels.dropout(gradient, seed + 1, *ctx.options)",
        ),
    ),
    *of(
        "nn/rnn.py",
        "modules",
        ("modules: one seed for all masks", "self.last = self.last + 1\n", ""),
        (
            "modules: dropout behind the last layer too",
            "self.training and layer < self.num_layers - 1:",
            "self.training:",
        ),
        (
            "modules: a backward direction that forgets one step late",
            '_seen_from_behind(reset) if suffix == "_reverse" and reset is not None else reset',
            "reset",
        ),
        (
            "modules: packed states not sorted",
            "state.index_select(1, sorted_indices) for state in states",
            "state for state in states",
        ),
        (
            "modules: final states not unsorted",
            "state.index_select(1, unsorted_indices) for state in final",
            "state for state in final",
        ),
        (
            "modules: DropConnect out of training",
            "if self.weight_dropout and self.training:",
            "if self.weight_dropout:",
        ),
        (
            "modules: reset not transposed",
            "reset.transpose(0, 1) if isinstance(reset, Tensor) and reset.dim() == 2 else reset",
            "reset",
        ),
        ("modules: zoneout of the cell state not passed on", 'return {"zoneout_cell": self.zoneout_cell}', "return {}"),
        ("modules: clipping not passed on", "grad_clip=self.grad_clip,\n                        training", "training"),
        (
            "modules: gains not reset",
            'if name.startswith("norm"):\n                self._reset_added',
            'if name.startswith("none"):\n                self._reset_added',
        ),
        ("modules: reset_after not passed on", 'return {"reset_after": self.reset_after}', "return {}"),
    ),
    *of(
        "kernels/triton/launch.py",
        "steps",
        ("steps: sequences that have ended multiply", "tl.where(tl.max(length) > time, hidden_size, 0)", "hidden_size"),
        (
            "steps: in no order",
            "argsort(lengths, descending=True, stable=True)",
            "arange(len(lengths), device=lengths.device)",
        ),
        ("steps: every row from its place", "tl.load(order + positions, mask=positions < batch, other=0)", "positions"),
    ),
    *of(
        "kernels/triton/lstm.py",
        "steps",
        (
            "steps: no gradients where all have ended",
            "left_out = tl.where(tl.program_id(1) == 0, inner_end,",
            "left_out = tl.where(tl.program_id(1) == 0, hidden_size,",
        ),
    ),
    *of(
        "kernels/triton/launch.py",
        "steps",
        (
            "launch: no time passes from graph to graph",
            "advance[(1,)](table, direction * CHUNK)",
            "advance[(1,)](table, 0)",
        ),
        ("launch: a graph begins a step early", "for step in range(1, CHUNK + 1)", "for step in range(CHUNK)"),
        ("launch: one graph for all constants", "key = kernel, *constants.items(), grid", "key = kernel, grid"),
        (
            "launch: one graph for all hidden sizes",
            "table.data_ptr(), *widths\n",
            "table.data_ptr()\n",
        ),
        ("launch: the last steps left out", "for step in range(1, left + 1)", "for step in range(1, left)"),
        (
            "launch: the first gradient where none is read",
            "both[times[0] % 2] = gradient",
            "both[1 - times[0] % 2] = gradient",
        ),
        ("launch: reverse begins a step early", "time >= length - 1", "time >= length - 2"),
        ("launch: a final state in padding", "if reverse or lengths is None", "if True"),
    ),
    *of(
        "kernels/eager/general.py",
        "recompute",
        ("recompute: the padding as it comes", "written.masked_fill_(ended, 0)", "pass"),
        (
            "recompute: new cell states left out",
            "new_cells.view_as(trace.cells) if recurrence.zoneout_cell",
            "None if recurrence.zoneout_cell",
        ),
    ),
    *of(
        "ops/gru.py",
        "recompute",
        ("recompute: gru without its bias", " projection_bias(bias_ih, bias_hh)).unflatten", " None).unflatten"),
        (
            "recompute: gru keeps the gates",
            "return output, h_n, nothing if recompute_gates else gates",
            "return output, h_n, gates",
        ),
    ),
    *of(
        "ops/lstm.py",
        "recompute",
        ("recompute: lstm keeps the gates", "c_n, input.new_empty(0) if recompute_gates else gates", "c_n, gates"),
        ("recompute: oneDNN keeps its workspace", "(recompute_gates and differentiable(tensors))", "False"),
    ),
    *of(
        "nn/rnn.py",
        "recompute",
        (
            "modules: recompute_gates not passed on",
            "recompute_gates=self.recompute_gates,\n                        grad",
            "grad",
        ),
    ),
    *of(
        "nn/cells.py",
        "transforms",
        (
            "cells: the lstm's states exchanged",
            "new = reference.lstm_cell(input, *hx,",
            "new = reference.lstm_cell(input, *hx[::-1],",
        ),
    ),
    *of(
        "kernels/triton/barrier.py",
        "persistent",
        ("persistent: nobody is waited for", '"acquire", scope="gpu") < target:', '"acquire", scope="gpu") < 0:'),
        ("persistent: each arrives twice", "tl.atomic_add(counter, 1,", "tl.atomic_add(counter, 2,"),
    ),
    *of(
        "kernels/triton/persistent.py",
        "persistent",
        (
            "persistent: the first chunk twice",
            "ahead = tl.load(source + (chunk + 1) * BLOCK_INNER,",
            "ahead = tl.load(source + chunk * BLOCK_INNER,",
        ),
        (
            "persistent: half of the splits",
            "tl.arange(0, SPLITS)[:, None] * size",
            "tl.arange(0, SPLITS)[:, None] // 2 * size",
        ),
        (
            "persistent: the first step from behind",
            "tl.where(reverse, length - 1, 0) == time",
            "tl.where(reverse, length, 0) == time",
        ),
        (
            "persistent: no first time",
            "return (tl.zeros_like(length) + time >= 0) & (time < length)",
            "return time < length",
        ),
        ("persistent: the state before the last", "exchange[..., (steps - 1) % 2,", "exchange[..., steps % 2,"),
    ),
    *of(
        "kernels/triton/wavefront.py",
        "wavefront",
        (
            "wavefront: a step too few awaited",
            "following, MATRICES)\n        if BARRIER:\n            wait(counter, (step + 1) *",
            "following, MATRICES)\n        if BARRIER:\n            wait(counter, step *",
        ),
        (
            "wavefront: all layers with the weights of the first",
            "weight_hh + lane * matrices\n    has_below",
            "weight_hh\n    has_below",
        ),
        ("wavefront: the cell state goes on in the padding", "c = tl.where(active, new_c, c)", "c = new_c"),
        (
            "wavefront: dropout on the way up alone",
            "grad_h += sums + above * mask_of(",
            "grad_h += sums + above + 0 * mask_of(",
        ),
        (
            "wavefront: the first parts of the gates' gradients for the layer below",
            "within_length[FIRST + index], mask=has_below",
            "within_length[index], mask=has_below",
        ),
        (
            "wavefront: the GRU's matrices in the order of the weights",
            'own.roll(1, 1) if cell == "gru" else own',
            "own",
        ),
        (
            "wavefront: the final states a step early",
            "exchange[:, (steps - 1) % 2, :batch, 1",
            "exchange[:, steps % 2, :batch, 1",
        ),
    ),
    *of(
        "kernels/triton/random.py",
        "wavefront",
        (
            "random: the mask of dropout not rounded",
            "0.0, scale).to(KIND).to(tl.float32)",
            "0.0, scale).to(tl.float32)",
        ),
    ),
    *of(
        "ops/_layers.py",
        "wavefront",
        (
            "layers: the lowest lane's bias twice",
            "bias = self.outer_bias(layer) if layer > first else None",
            "bias = self.outer_bias(layer)",
        ),
        (
            "layers: the gradient of a launch's input without dropout",
            "grad_output = stack.dropped(of_lowest, first - 1)",
            "grad_output = of_lowest",
        ),
        (
            "layers: the weights' gradients from what dropout had not dropped",
            "values = stack.dropped(values, layer - 1)",
            "pass",
        ),
    ),
    *of(
        "nn/rnn.py",
        "wavefront",
        ("modules: other seeds for all layers at once", "seeds.next()  # an operator's", "pass  # an operator's"),
    ),
    *of(
        "kernels/triton/rnn.py",
        "persistent",
        (
            "persistent rnn: one slot for all steps",
            "tl.store(target + step % 2 * slot_size, as_read(",
            "tl.store(target + (step + 1) % 2 * slot_size, as_read(",
        ),
        (
            "persistent rnn: the gradient not carried through the padding",
            "grad_h = tl.where(active, forget(grad_old, cleared), grad_h)",
            "grad_h = tl.where(active, forget(grad_old, cleared), 0.0)",
        ),
    ),
    *of(
        "kernels/triton/gru.py",
        "persistent",
        (
            "persistent gru: z carries nothing back",
            "        grad_old += grad_new * z.to(tl.float32)\n",
            "",
        ),
        (
            "persistent gru: gates exchanged",
            "weights = load_weights(weight_hh + 2 * matrix,",
            "weights = load_weights(weight_hh + matrix,",
        ),
        ("persistent gru: no bias inside the reset gate", "hn = tl.sum(hn, axis=0) + bias", "hn = tl.sum(hn, axis=0)"),
    ),
    *of(
        "kernels/triton/lstm.py",
        "persistent",
        (
            "persistent lstm: the cell state goes on in the padding",
            "        h = tl.where(active, new, h)\n        c = tl.where(active, mixed, c)",
            "        h = tl.where(active, new, h)\n        c = mixed",
        ),
        (
            "persistent lstm: the initial cell state a step late",
            "previous = load_either(zero == sequence_length - 2 - step,",
            "previous = load_either(zero == sequence_length - 1 - step,",
        ),
        (
            "persistent lstm: the cell state's gradient in the padding",
            "grad_c = tl.where(active, forget(grad_old_c + onward_c, cleared), grad_c)",
            "grad_c = forget(grad_old_c + onward_c, cleared)",
        ),
        ("persistent lstm: gates exchanged", "g, o = sum_two(g, o)", "o, g = sum_two(g, o)"),
    ),
    *of(
        "kernels/triton/options.py",
        "persistent options",
        ("options: the product reads what is dropped", "forget(state.to(tl.float32) * factor,", "forget(state,"),
        ("options: nothing forgotten", "return tl.where(cleared, 0.0, state)", "return state"),
    ),
    *of(
        "kernels/triton/general.py",
        "persistent options",
        ("options: the first product reads all", "exchange_from(design, read)", "exchange_from(design, h_0)"),
    ),
    *of(
        "kernels/triton/rnn.py",
        "persistent options",
        ("options rnn: a reset a step late", "as_read(h, factor, clears_next)", "as_read(h, factor, cleared)"),
        (
            "options rnn: unclipped",
            "gradient = clip(through_activation(grad_new, y.to(tl.float32), NONLINEARITY), grad_clip)",
            "gradient = through_activation(grad_new, y.to(tl.float32), NONLINEARITY)",
        ),
    ),
    *of(
        "kernels/triton/gru.py",
        "persistent options",
        ("options gru: dropout of z's old state", "new_state(z, n, old)", "new_state(z, n, old * factor)"),
        ("options gru: the state from the exchange", "        before = state + tile\n", ""),
        ("options gru: no reset on the way back", "as_read(product, factor, cleared_later)", "product * factor"),
    ),
    *of(
        "kernels/triton/lstm.py",
        "persistent options",
        ("options lstm: zoneout before tanh", "computed = new_cells", "computed = cells"),
        (
            "options lstm: one mask for both states",
            "mixed = zone_out(old_c, new_c, offset, key, zoneout_cell, CELL,",
            "mixed = zone_out(old_c, new_c, offset, key, zoneout_cell, STATE,",
        ),
        ("options lstm: no gradient through f's peephole", " + grad_f * peepholes[1]", ""),
    ),
    *of(
        "kernels/triton/directions.py",
        "directions",
        ("directions: both run forward", "return lane, lane == 1", "return lane, lane == 2"),
        ("directions: the last step of the forward one", "sequence[1, 0]", "sequence[1, -1]"),
    ),
    *of(
        "kernels/directions.py",
        "directions",
        ("directions: forward twice", "reverse=bool(d)", "reverse=False"),
    ),
    *of(
        "kernels/triton/persistent.py",
        "directions",
        ("directions: counters shared", "(lane * tl.num_programs(0) + tl.program_id(0))", "tl.program_id(0)"),
        ("directions: the exchange shared", "exchange += 2 * lane * slot_size", "exchange += lane * slot_size"),
    ),
    *of(
        "kernels/triton/dispatch.py",
        "directions",
        ("directions: half as many programs", "batch, kind, device, lanes) if batch", "batch, kind, device) if batch"),
    ),
    *of(
        "kernels/triton/lstm.py",
        "directions",
        ("directions: one initial cell state", "    c_0 += lane * stride\n", ""),
    ),
    *of(
        "kernels/triton/gru.py",
        "directions",
        ("directions: one initial state", ", h_0 + lane * stride", ", h_0"),
    ),
    *of(
        "ops/_sequence.py",
        "directions",
        ("directions: half of the input's gradient", "of_input[0].add_(of_input[1])", "of_input[0]"),
    ),
    *of(
        "ops/rnn.py",
        "transforms",
        (
            "transforms: lengths forgotten",
            "lengths=arguments.lengths,\n            reset=arguments.reset,",
            "reset=arguments.reset,",
        ),
    ),
]


def occurrences(mutation: Mutation, package: Path) -> int:
    return (package / mutation.path).read_text().count(mutation.before)


def run_tests(folder: str, suite: str, log: str) -> None:
    """In a process of its own: run the tests of ``folder`` on its own package. The exit status is pytest's."""
    os.chdir(folder)
    sys.path[:0] = [folder, str(Path(folder) / "tests")]
    sys.dont_write_bytecode = True
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        import pytest

        import rnnkernels

        if not Path(rnnkernels.__file__).is_relative_to(folder):
            os._exit(99)
        files, expression = SUITES[suite]
        arguments = [*files.split(), "-x", "-q", "-p", "no:cacheprovider", *(["-k", expression] if expression else [])]
        os._exit(int(pytest.main(arguments)))


def outcome(folder: Path, suite: str, log: Path) -> int:
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(str(folder), suite, str(log)))
    process.start()
    process.join()
    return process.exitcode


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Break the package one term at a time, and see whether a test notices."
    )
    parser.add_argument("names", nargs="*", help="only mutations whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="list the mutations instead")
    given = parser.parse_args()
    chosen = [m for m in MUTATIONS if not given.names or any(name in m.name for name in given.names)]
    stale = [m for m in chosen if occurrences(m, ROOT / "rnnkernels") != 1]
    if given.list:
        for mutation in chosen:
            print(f"{'stale' if mutation in stale else 'applies':8}{mutation.path}: {mutation.name}")
        return 1 if stale else 0
    # Loaded once, and inherited by the process of each mutation
    import numpy  # noqa: F401
    import torch

    torch.set_num_threads(1)
    survivors, started = [], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutate-") as temporary:
        folder, log = Path(temporary) / "copy", Path(temporary) / "log"
        for part in ("rnnkernels", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for suite in sorted({m.suite for m in chosen}):
            if outcome(folder, suite, log):
                print(log.read_text()[-3000:])
                sys.exit(f"The tests {suite!r} fail without any mutation.")
        for mutation in chosen:
            if mutation in stale:
                continue
            path = folder / "rnnkernels" / mutation.path
            original = path.read_text()
            path.write_text(original.replace(mutation.before, mutation.after))
            status = outcome(folder, mutation.suite, log)
            path.write_text(original)
            if status == 0:
                survivors.append(mutation)
            last = log.read_text().rstrip().splitlines()[-1:] if log.exists() else []
            print(f"{'SURVIVES' if status == 0 else 'noticed':10}{mutation.name}  ({' '.join(last)})", flush=True)
    noticed = len(chosen) - len(stale) - len(survivors)
    seconds = time.perf_counter() - started
    print(f"\n{noticed} noticed, {len(survivors)} survive, {len(stale)} out of date, {seconds:.0f} s")
    for title, group in (("Survives", survivors), ("Out of date", stale)):
        for mutation in group:
            print(f"{title}: {mutation.name}, in rnnkernels/{mutation.path}")
    return 1 if survivors or stale else 0


if __name__ == "__main__":
    sys.exit(main())
