"""Train cells with and without each gate and option of chapter 9, and record the results that its page draws.

Usage, from the repository's root: ``OMP_NUM_THREADS=1 python book/record_gates.py``

Writes ``book/data/gates.json``: for each task, hidden size, learning rate, model and seed the score on test sequences,
with the versions and the command that made them. It takes about a quarter of an hour on one core.
"""

import json
import platform
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, mse_loss, one_hot

import rnnkernels as rk

BATCH, SEEDS = 32, range(5)
GATES = ("input", "forget", "cell", "output")  # as an LSTM stacks their rows

# name on the page: (cell, options, gates held open)
MODELS = {
    "RNN": ("RNN", {}, ()),
    "LSTM": ("LSTM", {}, ()),
    "no input gate": ("LSTM", {}, ("input",)),
    "no forget gate": ("LSTM", {}, ("forget",)),
    "no output gate": ("LSTM", {}, ("output",)),
    "peepholes": ("LSTM", {"peephole": True}, ()),
    "layer norm": ("LSTM", {"layer_norm": True}, ()),
    "GRU": ("GRU", {}, ()),
    "GRU, reset before": ("GRU", {"reset_after": False}, ()),
}

# (task, hidden size, updates, learning rates, models)
SWEEPS = (
    ("store and recall", 8, 1000, (1e-2,), tuple(MODELS)),
    ("store and recall", 32, 1000, (1e-2,), tuple(MODELS)),
    ("adding", 32, 1000, (1e-2,), tuple(MODELS)),
    ("pulse", 4, 1000, (1e-2,), ("LSTM", "peepholes")),
    ("pulse", 16, 1000, (1e-2,), ("LSTM", "peepholes")),
    ("copying", 32, 400, (3e-3, 1e-2, 3e-2, 1e-1), ("LSTM", "layer norm")),
)


def store_and_recall(batch, length=50, rate=0.1):
    """Keep the number that came with the last store mark, and say it wherever it is asked for, and there only.

    Input of shape (T, B, 3): a number from -1 to 1, a store mark, an ask mark. The first step stores. Each later step
    stores with probability `rate`, or else asks with that probability. Target of shape (T, B, 1). Answering 0 has a
    mean squared error of 1/3 where it is asked.
    """
    value, chance = 2 * torch.rand(length, batch) - 1, torch.rand(length, batch)
    store, ask = chance < rate, chance > 1 - rate
    store[0], ask[0] = True, False
    steps = torch.arange(length)[:, None].expand(length, batch)
    latest = torch.where(store, steps, 0).cummax(0).values
    answer = value.gather(0, latest) * ask
    return torch.stack([value, store.float(), ask.float()], -1), answer.unsqueeze(-1)


def pulse(batch, length=60, delay=20):
    """Answer 1 exactly `delay` steps after the only 1 of the input, and 0 at all other steps."""
    x, y, each = torch.zeros(length, batch, 1), torch.zeros(length, batch, 1), torch.arange(batch)
    begin = torch.randint(0, length - delay, (batch,))
    x[begin, each], y[begin + delay, each] = 1, 1
    return x, y


def hold_open(lstm, *gates):
    """Set gates of an LSTM to 1 for good.

    The sigmoid of 50 is 1 in float32, and its slope 0: no gradient ever reaches these rows.
    """
    for gate in gates:
        for parameter in lstm.parameters():
            parameter.detach().chunk(4)[GATES.index(gate)].zero_()
        lstm.bias_ih_l0.detach().chunk(4)[GATES.index(gate)].fill_(50)
    return lstm


def make_layer(name, input_size, hidden_size, **options):
    """The layer that an entry of MODELS describes, with orthogonal weights and a forget (or update) gate bias of 1."""
    cell, own, held = MODELS[name]
    layer = getattr(rk, cell)(input_size, hidden_size, **own, **options)
    rk.init.initialize(layer, "orthogonal", forget_bias=None if cell == "RNN" else 1.0)
    return hold_open(layer, *held)


def asked_error(output, x, y):
    """Mean squared error where an answer is asked for."""
    return (output - y)[x[..., 2] > 0].square().mean()


def adding(batch, length=50):
    """The adding problem of rnnkernels.data."""
    x, y, _ = rk.data.adding_problem(batch, length)
    return x, y[None, :, None]


def copying(batch, delay=20, symbols=4):
    """The copying memory problem of rnnkernels.data, its tokens one-hot."""
    x, y, _ = rk.data.copying_memory(batch, delay, symbols)
    return one_hot(x, 10).float(), y[-symbols:]


def accuracy(output, x, y):
    """Share of the tokens that are right."""
    return (output.argmax(-1) == y).float().mean()


def class_loss(output, y):
    """Softmax cross-entropy over all asked steps."""
    return cross_entropy(output.flatten(0, 1), y.flatten())


# name: (batch maker, outputs a step, loss, score, score of a trivial answer)
TASKS = {
    "store and recall": (store_and_recall, 1, mse_loss, asked_error, 1 / 3),
    "adding": (adding, 1, mse_loss, lambda output, x, y: mse_loss(output, y), 1 / 6),
    "pulse": (pulse, 1, mse_loss, lambda output, x, y: len(x) * mse_loss(output, y), 1.0),
    "copying": (copying, 8, class_loss, accuracy, 1 / 8),
}


def train(layer, task, updates, rate, device="cpu", each_update=None):
    """Train a layer and a linear output on a task; returns the output, and the score on 1,000 test sequences.

    `each_update`, if given, is called with the number of updates so far, before each of them.
    """
    make_batch, outputs, loss, score, _ = TASKS[task]
    head = torch.nn.Linear(layer.hidden_size, outputs).to(device)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer = rk.optim.Adam(parameters, lr=rate, max_norm=1.0)

    def run(batch):
        x, y = (part.to(device) for part in make_batch(batch))
        return head(layer(x)[0][-len(y) :]), x, y

    for update in range(updates):
        if each_update is not None:
            each_update(update)
        output, _, y = run(BATCH)
        optimizer.zero_grad()
        loss(output, y).backward()
        optimizer.step()
    with torch.no_grad():
        return head, score(*run(1000)).item()


def main():
    began, results = time.perf_counter(), []
    for task, hidden_size, updates, rates, models in SWEEPS:
        inputs = TASKS[task][0](1)[0].shape[-1]
        for rate in rates:
            for name in models:
                scores = []
                for seed in SEEDS:
                    torch.manual_seed(seed)
                    layer = make_layer(name, inputs, hidden_size)
                    scores.append(float(f"{train(layer, task, updates, rate)[1]:.4g}"))
                results.append(
                    {
                        "task": task,
                        "hidden_size": hidden_size,
                        "updates": updates,
                        "learning_rate": rate,
                        "model": name,
                        "scores": scores,
                        "trivial": TASKS[task][4],
                    }
                )
                print(f"{task} {hidden_size} {rate:g} {name:18}", *scores, flush=True)
    record = {
        "command": "OMP_NUM_THREADS=1 python book/record_gates.py",
        "batch": BATCH,
        "max_norm": 1.0,
        "seeds": list(SEEDS),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rnnkernels": rk.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - began),
        "results": results,
    }
    path = Path(__file__).resolve().parent / "data" / "gates.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path.name} after {record['seconds']} seconds")


if __name__ == "__main__":
    main()
