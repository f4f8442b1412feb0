"""Train six models on five tasks at growing lengths, and record the scores that chapters 9, 10 and 11 draw.

Usage, from the repository's root: ``OMP_NUM_THREADS=1 python book/record_lengths.py [TASK ...]``

Writes ``book/data/lengths.json``. All models have the same number of parameters within a few per cent and see the same
batches, as many updates each. For each task and model the learning rate is the best of three, chosen at the third
length on a seed that is not among those reported. The score is the accuracy on new sequences of the same length, and of
two and four times that length; for the adding problem it is the mean squared error.

A stopped run goes on where it was: what the file holds is not computed again. Without arguments all tasks are done, in
about an hour on one core; two processes may share the work, each with tasks of its own.
"""

import functools
import itertools
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, mse_loss

import rnnkernels as rk

PATH = Path(__file__).resolve().parent / "data" / "lengths.json"
MODELS = ("RNN", "LSTM", "GRU", "MinGRU", "MinLSTM", "Transformer")
LAYERS = {"RNN": 1, "LSTM": 1, "GRU": 1, "MinGRU": 2, "MinLSTM": 2, "Transformer": 2}
WIDTH, HEADS = 32, 2  # of the Transformer; the others are as wide as gives as many parameters
BATCH, UPDATES, WARMUP, MAX_NORM = 32, 1000, 50, 1.0
RATES, RATE_SEED, SEEDS = (1e-3, 3e-3, 1e-2), 100, range(5)
RATE_SIZE = 2  # place among a task's sizes
TEST = 500  # sequences

# task: (function, what its size is called, sizes, other arguments, tokens, answers)
TASKS = {
    "adding_problem": (rk.data.adding_problem, "length", (12, 25, 50), {}, None, 1),
    "copying_memory": (rk.data.copying_memory, "delay", (3, 10, 30), {"symbols": 10, "alphabet": 8}, 10, 8),
    "parity": (rk.data.parity, "length", (8, 16, 24), {}, 2, 2),
    "dyck_language": (rk.data.dyck_language, "length", (8, 16, 32), {"kinds": 2, "depth": 4}, 4, 2),
    "selective_recall": (rk.data.selective_recall, "pairs", (2, 4, 8), {"keys": 16, "values": 16}, 33, 16),
}


class Model(torch.nn.Module):
    """An encoder of the input, a core that runs through time, and a linear output at every step."""

    def __init__(self, name, width, tokens, answers, max_time=None):
        super().__init__()
        self.encoder = torch.nn.Linear(2, width) if tokens is None else torch.nn.Embedding(tokens, width)
        if name == "Transformer":
            self.core = rk.Transformer(width, HEADS, LAYERS[name])
        else:
            self.core = getattr(rk, name)(width, width, LAYERS[name])
        if max_time is not None:
            start(self.core, max_time)
        self.head = torch.nn.Linear(width, answers)

    def forward(self, input):
        return self.head(self.core(self.encoder(input))[0])


def start(core, max_time):
    """Let the gates that keep a state begin with memories of 2 to ``max_time`` steps, and orthogonal matrices."""
    if isinstance(core, rk.RNN):
        rk.init.initialize(core, "orthogonal")
    elif isinstance(core, (rk.LSTM, rk.GRU)):
        rk.init.initialize(core, "orthogonal", max_time=max_time)
    elif isinstance(core, (rk.MinGRU, rk.MinLSTM)):
        for layer in range(core.num_layers):
            # Both keep the share sigmoid(b) of their state: by b_z = -b, or by b_f = b together with b_i = -b.
            gates = getattr(core, f"bias_ih_l{layer}").detach().unflatten(0, (core.parts, -1))
            bias = torch.empty_like(gates[0]).uniform_(1, max_time - 1).log_()
            gates[0] = -bias if isinstance(core, rk.MinGRU) else bias
            if isinstance(core, rk.MinLSTM):
                gates[1] = -bias


def count(module):
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


@functools.cache
def width(name, tokens, answers):
    """The width that brings a model nearest to the Transformer's number of parameters."""
    if name == "Transformer":
        return WIDTH
    wanted = count(Model("Transformer", WIDTH, tokens, answers))
    return min(range(16, 160), key=lambda size: abs(count(Model(name, size, tokens, answers)) - wanted))


def make_batch(task, size, batch, seed):
    """Sequences of a task from a seed of its own: the same for every model."""
    function, what, _, options, *_ = TASKS[task]
    generator = torch.Generator().manual_seed(1000 * seed + size)
    return function(batch, **{what: size}, **options, generator=generator)


@functools.lru_cache(maxsize=1)
def training_data(task, size, seed):
    """Input and target of all updates, side by side."""
    return make_batch(task, size, BATCH * UPDATES, seed)[:2]


def make_model(task, name, size, seed):
    """The model at its start; its memories may last as long as a sequence."""
    *_, tokens, answers = TASKS[task]
    torch.manual_seed(seed)
    steps = len(make_batch(task, size, 1, 0).input)
    return Model(name, width(name, tokens, answers), tokens, answers, max_time=steps)


def loss_and_score(task, output, target):
    """What is minimized, and what is reported."""
    if task == "adding_problem":
        error = mse_loss(output[-1].squeeze(-1), target)
        return error, error.item()
    asked = target != rk.data.tasks.IGNORED
    answers, target = output[asked], target[asked]
    return cross_entropy(answers, target), (answers.argmax(-1) == target).double().mean().item()


def train(task, name, size, seed, rate):
    """Train one model. Returns the model and the processor's seconds."""
    model, began = make_model(task, name, size, seed), time.process_time()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    inputs, targets = (tensor.split(BATCH, -1 if tensor.dim() < 3 else 1) for tensor in training_data(task, size, seed))
    for update, (input, target) in enumerate(zip(inputs, targets, strict=True)):
        for group in optimizer.param_groups:  # warm up, then fall to zero
            group["lr"] = rate * min((update + 1) / WARMUP, (UPDATES - update) / (UPDATES - WARMUP))
        optimizer.zero_grad()
        loss_and_score(task, model(input), target)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    return model, time.process_time() - began


@torch.no_grad()
def test(task, model, size):
    """Score on new sequences, the same for every model and seed."""
    input, target, _ = make_batch(task, size, TEST, seed=10**6)
    return loss_and_score(task, model(input), target)[1]


def choose_rate(task, name):
    """Try every learning rate at one length. Returns the best and all scores."""
    sign = -1 if task == "adding_problem" else 1
    size = TASKS[task][2][RATE_SIZE]
    scores = {rate: test(task, train(task, name, size, RATE_SEED, rate)[0], size) for rate in RATES}
    return max(scores, key=lambda rate: sign * scores[rate]), scores


def settings():
    """Everything that a reader needs to know of how the results were made."""
    return {
        "models": {name: {"layers": LAYERS[name]} for name in MODELS},
        "heads": HEADS,
        "positions": "rotary",
        "batch": BATCH,
        "updates": UPDATES,
        "optimizer": f"Adam, {WARMUP} updates of warm-up, then linearly to zero",
        "max_norm": MAX_NORM,
        "start": "orthogonal recurrent weights; gates that keep begin with 2 to T steps (chrono)",
        "rates_tried": list(RATES),
        "rate_seed": RATE_SEED,
        "rate_size": RATE_SIZE,
        "seeds": list(SEEDS),
        "test_sequences": TEST,
        "tasks": {
            task: {"size": what, "sizes": list(sizes), "options": options}
            for task, (_, what, sizes, options, *_) in TASKS.items()
        },
    }


def load():
    """What the file holds, as far as it was made under the same settings."""
    empty = {
        "command": "OMP_NUM_THREADS=1 python book/record_lengths.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rnnkernels": rk.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "settings": settings(),
        "rates": {},
        "results": [],
    }
    record = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else empty
    if {**record["settings"], "tasks": None} != {**empty["settings"], "tasks": None}:
        return empty
    kept = [result for result in record["results"] if result["size"] in TASKS[result["task"]][2]]
    return record | {"settings": empty["settings"], "results": kept}


def save(results=(), rates=()):
    """Add results, and rates of (task, model), to what the file holds now."""
    record = load()
    record["results"].extend(results)
    for (task, name), rate in dict(rates).items():
        record["rates"].setdefault(task, {})[name] = rate
    order = {name: place for place, name in enumerate((*TASKS, *MODELS))}
    record["results"].sort(key=lambda r: (order[r["task"]], order[r["model"]], r["length"], r["seed"]))
    lines = ",\n".join("  " + json.dumps(result) for result in record["results"])
    text = json.dumps(record | {"results": "RESULTS"}, indent=1, ensure_ascii=False)
    new = PATH.with_suffix(f".{os.getpid()}")
    new.write_text(text.replace('"RESULTS"', f"[\n{lines}\n ]") + "\n", encoding="utf-8")
    new.replace(PATH)


def main(tasks):
    PATH.parent.mkdir(exist_ok=True)
    done = {(r["task"], r["model"], r["size"], r["seed"]) for r in load()["results"]}
    for task, name in itertools.product(tasks, MODELS):
        if name not in load()["rates"].get(task, {}):
            rate, scores = choose_rate(task, name)
            tried = {f"{rate:g}": float(f"{score:.4g}") for rate, score in scores.items()}
            save(rates={(task, name): {"rate": rate, "scores": tried}})
            print(task, name, rate, tried, flush=True)
    for seed, task in itertools.product(SEEDS, tasks):
        for size, name in itertools.product(TASKS[task][2], MODELS):
            if (task, name, size, seed) not in done:
                result = run(task, name, size, seed)
                save(results=[result])
                print(*result.values(), flush=True)


def run(task, name, size, seed):
    """One entry of the results."""
    rate = load()["rates"][task][name]["rate"]
    model, seconds = train(task, name, size, seed, rate)
    metric = "mean_squared_error" if task == "adding_problem" else "accuracy"
    times = () if TASKS[task][1] == "pairs" else (2, 4)  # there are no more keys to pair
    return {
        "task": task,
        "model": name,
        "length": len(make_batch(task, size, 1, 0).input),
        "size": size,
        "seed": seed,
        "metric": metric,
        "score": round(test(task, model, size), 5),
        "longer": {str(k): round(test(task, model, k * size), 5) for k in times},
        "trivial": round(rk.data.trivial_score(task)[metric], 5),
        "parameters": count(model),
        "width": width(name, *TASKS[task][-2:]),
        "updates": UPDATES,
        "rate": rate,
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    main(sys.argv[1:] or list(TASKS))
