"""``python -m benchmarks.options``: what ``torch.nn`` does not have, beside the loop over steps that stands in for it.

The loop is what one writes with PyTorch today, written well: one product for the input of all steps, masks drawn
at once, one fused product and addition a step where the cell allows it, gradients by autograd.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import rnnkernels
from rnnkernels import reference
from rnnkernels.__main__ import LIMITS, OPTIONS_SLACK, arithmetic, relative_error
from rnnkernels.kernels.eager import random

SHAPES = ((64, 32, 128, 256), (256, 16, 64, 128))
"""(sequence_length, batch, input_size, hidden_size)."""

P = 0.1
"""Probability of every random mask."""

GAIN = 0.3
"""Of layer normalization. With the default, 1, rounding errors in the LSTM grow from step to step, on either side."""

MODULES = {
    "RNN": {
        "zoneout": {"zoneout": P},
        "recurrent dropout": {"recurrent_dropout": P},
        "layer norm": {"layer_norm": True},
        "DropConnect": {"weight_dropout": P},
        "clipped gradient": {"grad_clip": 0.1},
        "lengths": {},
        "reset": {},
        "sigmoid": {"nonlinearity": "sigmoid"},
    },
    "GRU": {
        "zoneout": {"zoneout": P},
        "recurrent dropout": {"recurrent_dropout": P},
        "layer norm": {"layer_norm": True},
        "DropConnect": {"weight_dropout": P},
        "clipped gradient": {"grad_clip": 0.1},
        "lengths": {},
        "reset": {},
        "reset gate first": {"reset_after": False},
    },
    "LSTM": {
        "zoneout": {"zoneout": P, "zoneout_cell": P},
        "recurrent dropout": {"recurrent_dropout": P},
        "layer norm": {"layer_norm": True},
        "DropConnect": {"weight_dropout": P},
        "clipped gradient": {"grad_clip": 0.1},
        "lengths": {},
        "reset": {},
        "peephole": {"peephole": True},
    },
}
"""Options by module and name, as the module's constructor takes them; ``lengths`` and ``reset`` are for ``forward``."""


@dataclass(frozen=True)
class OptionCase:
    """A module with an option beside a loop over steps, with the same weights and input, forward and backward."""

    option: str
    """Which option of ``MODULES``."""
    sequence_length: int
    """Steps; of the longest sequence with ``lengths``."""
    batch: int
    """Sequences."""
    input_size: int
    """Features of the input."""
    hidden_size: int
    """Features of the state."""
    module: str = "RNN"
    """``"RNN"``, ``"GRU"`` or ``"LSTM"``."""
    dtype: str = "float32"
    """Type of weights, input, and everything else."""

    mode = "forward+backward"
    precision = "highest"

    @property
    def name(self) -> str:
        """All of this in a line."""
        sizes = f"T={self.sequence_length} B={self.batch} I={self.input_size} H={self.hidden_size}"
        return f"{self.module} {self.option} {sizes} {self.dtype}"


def cases(device_type: str) -> list[OptionCase]:
    """The cases of a device, ``"cpu"`` or ``"cuda"``."""
    dtypes = ("float32", "bfloat16") if device_type == "cuda" else ("float32",)
    return [
        OptionCase(option, *shape, module=module, dtype=dtype)
        for dtype in dtypes
        for shape in SHAPES
        for module, options in MODULES.items()
        for option in options
    ]


class Loop:
    """The loop over steps, for any cell and option, with the weights of a module of rnnkernels."""

    def __init__(self, module: torch.nn.Module):
        self.cell = type(module).__name__
        self.module = module

    def __call__(
        self, input: Tensor, lengths: Tensor | None, reset: Tensor | None, masks: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """Outputs and final states. ``masks`` are used where they are given; what is missing is drawn."""
        module = self.module
        steps, batch, _ = input.shape
        states = tuple(input.new_zeros(batch, module.hidden_size) for _ in range(1 + (self.cell == "LSTM")))
        masks = self._drawn(input) | masks
        weight = module.weight_hh_l0
        if "weight" in masks:
            weight = weight * masks["weight"]
        stays = [mask.unbind(0) for name, mask in masks.items() if name.startswith("stays")]
        cell = {"RNN": self._rnn, "GRU": self._gru, "LSTM": self._lstm}[self.cell](input, weight)
        if reset is not None:
            keeps = (~reset).to(input.dtype).unsqueeze(-1).unbind(0)
        if lengths is not None:
            running = (torch.arange(steps, device=input.device)[:, None] < lengths).unsqueeze(-1).unbind(0)
        outputs = []
        for t in range(steps):
            if reset is not None:
                states = tuple(state * keeps[t] for state in states)
            seen = states[0] * masks["recurrent"] if "recurrent" in masks else states[0]
            new = cell(t, seen, *states)
            if stays:
                new = tuple(torch.where(stay[t], *each) for stay, *each in zip(stays, states, new, strict=True))
            if lengths is not None:
                outputs.append(new[0] * running[t])
                new = tuple(torch.where(running[t], *each) for each in zip(new, states, strict=True))
            else:
                outputs.append(new[0])
            states = new
        return torch.stack(outputs), *states

    def _drawn(self, input: Tensor) -> dict[str, Tensor]:
        module, (steps, batch, _) = self.module, input.shape
        state = batch, module.hidden_size

        def kept(p, *shape):
            return functional.dropout(input.new_ones(shape), p)

        masks = {}
        if module.weight_dropout:
            masks["weight"] = kept(module.weight_dropout, *module.weight_hh_l0.shape)
        if module.recurrent_dropout:
            masks["recurrent"] = kept(module.recurrent_dropout, *state)
        if module.zoneout:
            masks["stays"] = torch.rand(steps, *state, device=input.device) < module.zoneout
        if getattr(module, "zoneout_cell", 0):
            masks["stays of the cell"] = torch.rand(steps, *state, device=input.device) < module.zoneout_cell
        return masks

    def _clipped(self, argument: Tensor) -> Tensor:
        bound = self.module.grad_clip
        if bound is not None and argument.requires_grad:
            argument.register_hook(lambda gradient: gradient.clamp(-bound, bound))
        return argument

    def _rnn(self, input: Tensor, weight: Tensor) -> Callable:
        module, transposed = self.module, weight.t()
        activation = reference.ACTIVATIONS[module.nonlinearity]
        if module.layer_norm:
            projected = functional.linear(input, module.weight_ih_l0).unbind(0)
            bias, gain = module.bias_ih_l0 + module.bias_hh_l0, module.norm_hh_l0

            def step(t, seen, h):
                a = functional.layer_norm(torch.addmm(projected[t], seen, transposed), gain.shape, gain)
                return (activation(self._clipped(a + bias)),)
        else:
            projected = functional.linear(input, module.weight_ih_l0, module.bias_ih_l0 + module.bias_hh_l0).unbind(0)

            def step(t, seen, h):
                return (activation(self._clipped(torch.addmm(projected[t], seen, transposed))),)

        return step

    def _gru(self, input: Tensor, weight: Tensor) -> Callable:
        module, size = self.module, self.module.hidden_size
        groups = 2 * size, size

        def normalized(product, gain):
            if not module.layer_norm:
                return product
            parts = zip(product.split(groups, -1), gain.split(groups), strict=True)
            return torch.cat([functional.layer_norm(part, g.shape, g) for part, g in parts], -1)

        gain_ih, gain_hh = (module.norm_ih_l0, module.norm_hh_l0) if module.layer_norm else (None, None)
        projected = normalized(functional.linear(input, module.weight_ih_l0), gain_ih) + module.bias_ih_l0
        from_input = [part.unbind(0) for part in projected.split(groups, -1)]
        transposed, bias = weight.t(), module.bias_hh_l0
        if not module.reset_after:
            (weight_rz, weight_n), (bias_rz, bias_n) = weight.split(groups), bias.split(groups)

            def step(t, seen, h):
                r, z = torch.sigmoid(from_input[0][t] + functional.linear(seen, weight_rz, bias_rz)).chunk(2, -1)
                n = torch.tanh(from_input[1][t] + functional.linear(r * seen, weight_n, bias_n))
                return (torch.lerp(n, h, z),)

            return step

        def step(t, seen, h):
            if module.layer_norm:
                from_state = normalized(seen @ transposed, gain_hh) + bias
            else:
                from_state = torch.addmm(bias, seen, transposed)
            rz, carried = from_state.split(groups, -1)
            r, z = torch.sigmoid(self._clipped(from_input[0][t] + rz)).chunk(2, -1)
            n = torch.tanh(self._clipped(torch.addcmul(from_input[1][t], r, carried)))
            return (torch.lerp(n, h, z),)

        return step

    def _lstm(self, input: Tensor, weight: Tensor) -> Callable:
        module, transposed = self.module, weight.t()
        bias = module.bias_ih_l0 + module.bias_hh_l0
        if module.layer_norm:
            gain_ih, gain_hh = module.norm_ih_l0, module.norm_hh_l0
            projected = functional.layer_norm(functional.linear(input, module.weight_ih_l0), gain_ih.shape, gain_ih)
            projected = (projected + bias).unbind(0)
        else:
            projected = functional.linear(input, module.weight_ih_l0, bias).unbind(0)

        def step(t, seen, h, c):
            if module.layer_norm:
                a = projected[t] + functional.layer_norm(seen @ transposed, gain_hh.shape, gain_hh)
            else:
                a = torch.addmm(projected[t], seen, transposed)
            a = self._clipped(a)
            a_i, a_f, a_g, a_o = a.chunk(4, -1)
            if module.peephole:
                p_i, p_f, p_o = module.weight_peephole_l0
                a_i, a_f = torch.addcmul(a_i, p_i, c), torch.addcmul(a_f, p_f, c)
            new_c = torch.sigmoid(a_f) * c + torch.sigmoid(a_i) * torch.tanh(a_g)
            if module.peephole:
                a_o = torch.addcmul(a_o, p_o, new_c)
            shown = new_c
            if module.layer_norm:
                shown = functional.layer_norm(
                    new_c, new_c.shape[-1:], module.norm_cell_weight_l0, module.norm_cell_bias_l0
                )
            return torch.sigmoid(a_o) * torch.tanh(shown), new_c

        return step


def _masks(case: OptionCase, module: torch.nn.Module, seed: int, like: Tensor) -> dict[str, Tensor]:
    """The masks that the module draws after ``torch.manual_seed(seed)``, by the loop's names."""
    torch.manual_seed(seed)
    first = int(torch.randint(2**62, ()))
    keys = [random.key_of(first + 1), random.key_of(first + 2)]
    masks = {}
    if module.weight_dropout:
        shape = module.weight_hh_l0.shape
        masks["weight"] = random.kept(keys.pop(0), random.ELEMENTS, module.weight_dropout, shape, like)
    state = case.batch, case.hidden_size
    if module.recurrent_dropout:
        masks["recurrent"] = random.kept(keys[0], random.RECURRENT, module.recurrent_dropout, state, like)
    streams = {"stays": (random.ZONEOUT, module.zoneout)}
    if case.module == "LSTM":
        streams["stays of the cell"] = random.ZONEOUT_CELL, module.zoneout_cell
    for name, (stream, probability) in streams.items():
        if probability:
            masks[name] = random.dropped(keys[0], stream, probability, (case.sequence_length, *state), like.device)
    return masks


def _exact(module: torch.nn.Module, input: Tensor, lengths, reset, masks: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Results by ``rnnkernels.reference``'s cells in the module's type, every step masked as told."""
    weights = {name.removesuffix("_l0"): weight for name, weight in module.named_parameters()}
    if "weight" in masks:
        weights["weight_hh"] = weights["weight_hh"] * masks["weight"]
    options = {"grad_clip": module.grad_clip, "recurrent_mask": masks.get("recurrent")}
    name = type(module).__name__
    if name == "RNN":
        options["nonlinearity"] = module.nonlinearity
    if name == "GRU":
        options["reset_after"] = module.reset_after
    cell = getattr(reference, f"{name.lower()}_cell")
    states = tuple(input.new_zeros(input.shape[1], module.hidden_size) for _ in range(1 + (name == "LSTM")))
    stays = [mask for key, mask in masks.items() if key.startswith("stays")]
    outputs = []
    for t, row in enumerate(input):
        before = states if reset is None else tuple(torch.where(reset[t, :, None], 0, state) for state in states)
        new = cell(row, *before, **weights, **options)
        new = new if isinstance(new, tuple) else (new,)
        if stays:
            new = tuple(map(reference.zone_out, before, new, (stay[t] for stay in stays)))
        running = torch.ones_like(input[0, :, :1], dtype=torch.bool) if lengths is None else (t < lengths)[:, None]
        outputs.append(torch.where(running, new[0], 0))
        states = tuple(torch.where(running, *each) for each in zip(new, states, strict=True))
    return torch.stack(outputs), *states


def sides(case: OptionCase, device: torch.device) -> tuple[dict[str, Callable], dict[str, float], dict[str, float]]:
    """What is timed, by side; and the relative errors of each side with the errors allowed."""
    dtype = getattr(torch, case.dtype)
    sizes = case.input_size, case.hidden_size
    arguments = MODULES[case.module][case.option]
    module = getattr(rnnkernels, case.module)(*sizes, **arguments, device=device, dtype=dtype)
    for name, parameter in module.named_parameters():
        if name.startswith("norm") and "bias" not in name:
            torch.nn.init.constant_(parameter, GAIN)
    exact_module = getattr(rnnkernels, case.module)(*sizes, **arguments, device=device, dtype=torch.float64)
    exact_module.load_state_dict(module.state_dict())
    input = torch.randn(case.sequence_length, case.batch, case.input_size, device=device).to(dtype).requires_grad_()
    exact_input = input.detach().double().requires_grad_()
    lengths = reset = None
    if case.option == "lengths":
        lengths = (torch.arange(1, case.batch + 1) * case.sequence_length / case.batch).ceil().long()
        lengths = lengths[torch.randperm(case.batch)].to(device)
    if case.option == "reset":
        reset = torch.rand(case.sequence_length, case.batch, device=device) < P
    loop = Loop(module)

    def by_module():
        output, final = module(input, lengths=lengths, reset=reset)
        return (output, *final) if isinstance(final, tuple) else (output, final)

    def by_loop(masks=None):
        output, *final = loop(input, lengths, reset, masks or {})
        return output, *(state.unsqueeze(0) for state in final)

    cotangents = [torch.randn_like(result) for result in by_module()]

    def gradients(results, inputs, of):
        outer = [cotangent.to(of.weight_hh_l0.dtype) for cotangent in cotangents]
        return torch.autograd.grad(results, (inputs, *of.parameters()), outer)

    seed = 5
    masks = _masks(case, module, seed, input.detach())
    output, *final = _exact(exact_module, exact_input, lengths, reset, _masks(case, module, seed, exact_input.detach()))
    results = output, *(state.unsqueeze(0) for state in final)
    exact = *results, *gradients(results, exact_input, exact_module)
    torch.manual_seed(seed)
    found = {}
    for side, run in (("rnnkernels", by_module), ("loop", lambda: by_loop(masks))):
        results = run()
        values = *results, *gradients(results, input, module)
        errors = [relative_error(*pair) for pair in zip(values, exact, strict=True)]
        found[side] = max(errors) if all(error == error for error in errors) else float("nan")
    limit = OPTIONS_SLACK * LIMITS[arithmetic(dtype, device)]
    functions = {
        "rnnkernels": lambda: gradients(by_module(), input, module),
        "loop": lambda: gradients(by_loop(), input, module),
    }
    return functions, found, {"rnnkernels": limit, "loop": 10 * limit}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run, and return the exit code."""
    from benchmarks import __main__ as table

    return table.main(arguments, declared=cases, program="python -m benchmarks.options")


if __name__ == "__main__":
    from benchmarks.options import main as imported  # once more, under the name by which the runner knows the cases

    sys.exit(imported())
