"""Measure what chapter 10 compares, and record what takes too long for its page.

Usage, from the repository's root:

- ``OMP_NUM_THREADS=1 python book/record_transformers.py patience``: the two losers of the chapter's two tasks, trained
  for 3,000 updates over five seeds; about four minutes on one core. Writes ``book/data/transformers_patience.json``.
- ``python book/record_transformers.py speed``: training time and time per decoded token against the length, on a GPU
  where there is one. Writes ``book/data/transformers_speed_DEVICE.json``, which the chapter draws if it is a GPU's.
"""

import functools
import itertools
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import rnnkernels as rk
from record_lengths import HEADS, WIDTH, Model, count, loss_and_score, width

DATA = Path(__file__).resolve().parent / "data"
KEYS, PAIRS, STEPS = 8, 4, 24  # of the look-up task, and of parity
POSITIONS = ("none", "learned", "rotary")
UPDATES, EVERY, SEEDS = 3000, 250, range(5)
SPEED = {"width": 512, "layers": 4, "batches": (1, 64), "lengths": (16, 64, 256, 1024, 4096)}


class LSTMWithAttention(torch.nn.Module):
    """An LSTM whose output reads, beside the state, one attention over all states so far."""

    def __init__(self, width, tokens, answers):
        super().__init__()
        self.encoder = torch.nn.Embedding(tokens, width)
        self.core = rk.LSTM(width, width)
        self.project = torch.nn.Linear(width, 3 * width)
        self.head = torch.nn.Linear(2 * width, answers)

    def forward(self, input):
        states = self.core(self.encoder(input))[0]  # (T, B, H)
        query, key, value = self.project(states).transpose(0, 1).unsqueeze(1).chunk(3, -1)  # (B, 1, T, H)
        found = rk.ops.attention(query, key, value).squeeze(1).transpose(0, 1)
        return self.head(torch.cat([states, found], -1))


def make_model(name, tokens, answers, device="cpu"):
    """A model with the Transformer's number of parameters, within a few per cent; or one layer with given positions."""
    if name in POSITIONS:
        model = Model("Transformer", WIDTH, tokens, answers)
        model.core = rk.Transformer(WIDTH, HEADS, positions=name, max_length=32 if name == "learned" else None)
        return model.to(device)
    if name != "LSTM with attention":
        return Model(name, width(name, tokens, answers), tokens, answers).to(device)
    wanted = count(Model("Transformer", width("Transformer", tokens, answers), tokens, answers))
    sizes = {count(LSTMWithAttention(size, tokens, answers)): size for size in range(16, 80)}
    return LSTMWithAttention(sizes[min(sizes, key=lambda size: abs(size - wanted))], tokens, answers).to(device)


def recall(batch, generator=None):
    """The look-up task: four pairs out of eight keys and values."""
    return rk.data.selective_recall(batch, PAIRS, keys=KEYS, values=KEYS, generator=generator)[:2]


def parity(batch, generator=None):
    """Is the number of ones so far odd?"""
    return rk.data.parity(batch, STEPS, generator=generator)[:2]


def parity_with_notes(batch, generator=None):
    """Parity with the last answer written beside each input: token 2 * answer + bit."""
    input, target = parity(batch, generator)
    answers = torch.cat([torch.zeros_like(target[:1]), target[:-1]])
    return 2 * answers + input, target


def copying(batch, generator=None):
    """Six symbols, four blanks, a cue."""
    return rk.data.copying_memory(batch, 4, symbols=6, generator=generator)[:2]


# name: (function, tokens, answers)
TASKS = {
    "recall": (recall, 2 * KEYS + 1, KEYS),
    "parity": (parity, 2, 2),
    "notes": (parity_with_notes, 4, 2),
    "copying": (copying, 10, 8),
}


@functools.lru_cache(maxsize=5)
def make_batches(task, seed, count, batch):
    """Batches of a task: the same for every model."""
    generator = torch.Generator().manual_seed(seed)
    return [TASKS[task][0](batch, generator) for _ in range(count)]


def learn(task, name, seed, updates, rate, every=25, batch=32, device="cpu", watch=None):
    """Train a model; returns it with its accuracy on 500 new sequences, before and after each ``every`` updates."""
    make_batch, tokens, answers = TASKS[task]
    torch.manual_seed(seed)
    model, batches = make_model(name, tokens, answers, device), make_batches(task, seed, updates, batch)
    new, asked = (tensor.to(device) for tensor in make_batch(500, torch.Generator().manual_seed(10**6)))
    optimizer, scores = torch.optim.Adam(model.parameters(), lr=rate), []
    for update in range(updates + 1):
        if update % every == 0:
            with torch.no_grad():
                scores.append(loss_and_score(task, model(new), asked)[1])
            if watch is not None:
                watch(model, update)
        if update == updates:
            return model, scores
        input, target = (tensor.to(device) for tensor in batches[update])
        optimizer.zero_grad()
        loss_and_score(task, model(input), target)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


# ------------------------------------------------------------------------------------------------------------- speed


def make_cores(size, layers, device="cpu"):
    """A Transformer, and an LSTM and a GRU of one layer with as many parameters."""
    cores = {"Transformer": rk.Transformer(size, size // 32, layers, device=device)}
    for name, gates in (("LSTM", 4), ("GRU", 3)):
        hidden = round((count(cores["Transformer"]) / (2 * gates)) ** 0.5)
        cores[name] = getattr(rk, name)(hidden, hidden, device=device)
    return cores


def input_for(core, length, batch=1):
    """Random input for a module or cell."""
    parameter = next(core.parameters())
    size = core.d_model if isinstance(core, rk.Transformer) else core.input_size
    return torch.randn(length, batch, size, device=parameter.device)


def seconds(works, rounds=4, at_least=0.5):
    """The shortest time of each of several functions, which take turns so that a disturbance meets all of them.

    The first round does not count. Short works get more rounds, until ``at_least`` seconds have gone by. One thread on
    a CPU is measured by the time that the processor gave to it, which other programs do not lengthen.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    times = {name: [] for name in works}
    started = time.perf_counter()
    while min(map(len, times.values())) <= rounds or time.perf_counter() - started < at_least:
        for name, work in works.items():
            synchronize()
            began = clock()
            work()
            synchronize()
            times[name].append(clock() - began)
    return {name: min(found[1:]) for name, found in times.items()}


def synchronize():
    """Wait until a GPU has done all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def training_seconds(cores, length, batch=1):
    """Seconds of forward and backward pass over random sequences, for each of ``cores``."""

    def work(core, input):
        torch.autograd.grad(core(input)[0].square().mean(), list(core.parameters()))

    return seconds(
        {name: functools.partial(work, core, input_for(core, length, batch)) for name, core in cores.items()}
    )


def as_cell(core):
    """The same recurrent layer for one step at a time."""
    cell = (rk.LSTMCell if isinstance(core, rk.LSTM) else rk.GRUCell)(core.input_size, core.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in core.state_dict().items()})
    return cell.to(next(core.parameters()).device)


@torch.no_grad()
def decoding_seconds(cores, length, tokens=10):
    """Seconds of one more token after ``length`` steps, for each of ``cores``."""

    def work(step, new, state):
        for _ in range(tokens):
            state = step(new, state)

    works = {}
    for name, core in cores.items():
        state, new = core(input_for(core, length))[1], input_for(core, 1)
        if isinstance(core, rk.Transformer):
            works[name] = functools.partial(work, lambda new, state, core=core: core(new, state)[1], new, state)
        else:
            state = tuple(part[0] for part in state) if isinstance(state, tuple) else state[0]
            works[name] = functools.partial(work, as_cell(core), new[0], state)
    return {name: time / tokens for name, time in seconds(works).items()}


def state_bytes(state):
    """Memory of what a core has to keep between two tokens."""
    if isinstance(state, rk.KeyValueCache):
        return state.bytes()
    parts: tuple[Tensor, ...] = state if isinstance(state, tuple) else (state,)
    return sum(part.numel() * part.element_size() for part in parts)


def by_name(rows):
    """A curve for each name, from one dictionary for each point."""
    rows = list(rows)
    return {name: [row[name] for row in rows] for name in rows[0]}


def crossing(lengths, one, other):
    """Where the first of two curves rises above the second, in words; read off between lengths in logarithms."""
    gaps = [math.log(a / b) for a, b in zip(one, other, strict=True)]
    for i, (gap, following) in enumerate(itertools.pairwise(gaps)):
        if gap < 0 <= following:
            part = gap / (gap - following)
            return f"at T ≈ {lengths[i] * (lengths[i + 1] / lengths[i]) ** part:.0f}"
    return "beyond the lengths measured" if gaps[-1] < 0 else "below the lengths measured"


# ----------------------------------------------------------------------------------------------------------- records


def write(name, command, **record):
    """Write a record with the versions that made it."""
    record = {
        "command": command,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rnnkernels": rk.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **record,
    }
    DATA.mkdir(exist_ok=True)
    (DATA / name).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {name}")


def record_patience():
    """More time for the LSTM on the look-up, and for the Transformer on parity."""
    began, results = time.process_time(), {}
    for task, name, rate in (("recall", "LSTM", 3e-3), ("parity", "Transformer", 1e-3)):
        runs = [learn(task, name, seed, UPDATES, rate, EVERY)[1] for seed in SEEDS]
        results[task] = {"model": name, "rate": rate, "scores": [[round(s, 4) for s in run] for run in runs]}
        print(task, name, [run[-1] for run in runs], flush=True)
    command = "OMP_NUM_THREADS=1 python book/record_transformers.py patience"
    sizes = {"updates": UPDATES, "every": EVERY, "batch": 32, "seeds": list(SEEDS)}
    write("transformers_patience.json", command, **sizes, seconds=round(time.process_time() - began), results=results)


def record_speed():
    """Times against the length on this machine's device."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "cpu"
    cores = make_cores(SPEED["width"], SPEED["layers"], "cuda" if cuda else "cpu")
    training = {
        str(batch): by_name(training_seconds(cores, T, batch) for T in SPEED["lengths"]) for batch in SPEED["batches"]
    }
    decoding = by_name(decoding_seconds(cores, T) for T in SPEED["lengths"])
    name = f"transformers_speed_{device.lower().replace(' ', '_')}.json"
    measured = {"device": device, "settings": SPEED, "training": training, "decoding": decoding}
    write(name, "python book/record_transformers.py speed", **measured)


if __name__ == "__main__":
    parts = {"patience": record_patience, "speed": record_speed}
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        raise SystemExit(f"usage: python {sys.argv[0]} {' | '.join(parts)}")
    parts[sys.argv[1]]()
