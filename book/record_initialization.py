"""Train on the adding problem from every initialization of chapter 6, and record the results that its page draws.

Usage, from the repository's root: ``OMP_NUM_THREADS=1 python book/record_initialization.py``

Writes ``book/data/initialization.json``: for each initialization and seed the mean squared error during training (means
of 50 updates) and on 2,000 test sequences, with the versions and the command that made them. It takes about ten minutes
on one core.
"""

import json
import platform
import time
from pathlib import Path

import torch
from torch.nn.functional import mse_loss

import rnnkernels as rk

LENGTH, HIDDEN, BATCH, UPDATES, RATE, SEEDS = 100, 64, 32, 800, 1e-3, range(5)

# name on the page: (cell, nonlinearity of a plain RNN, arguments of rk.init.initialize)
STARTS = {
    "RNN default": ("RNN", "tanh", {"recipe": "default"}),
    "RNN Xavier": ("RNN", "tanh", {"recipe": "xavier"}),
    "RNN orthogonal": ("RNN", "tanh", {"recipe": "orthogonal"}),
    "RNN ρ = 1.1": ("RNN", "tanh", {"recipe": "spectral_radius", "gain": 1.1}),
    "ReLU Kaiming": ("RNN", "relu", {"recipe": "kaiming"}),
    "ReLU orthogonal": ("RNN", "relu", {"recipe": "orthogonal"}),
    "ReLU identity": ("RNN", "relu", {"recipe": "identity"}),
    "IRNN (published)": ("RNN", "relu", {"recipe": "identity"}),
    "LSTM default": ("LSTM", None, {"recipe": "default"}),
    "LSTM forget 1": ("LSTM", None, {"recipe": "orthogonal", "forget_bias": 1.0}),
    "LSTM forget 3": ("LSTM", None, {"recipe": "orthogonal", "forget_bias": 3.0}),
    "LSTM chrono": ("LSTM", None, {"recipe": "orthogonal", "max_time": LENGTH}),
    "GRU default": ("GRU", None, {"recipe": "default"}),
    "GRU chrono": ("GRU", None, {"recipe": "orthogonal", "max_time": LENGTH}),
}


def make_layer(name, input_size=2, hidden_size=HIDDEN, **options):
    """The recurrent layer that an entry of STARTS describes."""
    cell, nonlinearity, recipe = STARTS[name]
    if nonlinearity is not None:
        options["nonlinearity"] = nonlinearity
    layer = rk.init.initialize(getattr(rk, cell)(input_size, hidden_size, **options), **recipe)
    if "published" in name:  # Le, Jaitly and Hinton (2015) begin with very small input weights
        torch.nn.init.normal_(layer.weight_ih_l0, std=0.001)
    return layer


def adding_problem(length, batch, device="cpu"):
    """Numbers from 0 to 1 and two marks, one in each half; the target is the sum of the marked numbers.

    Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9(8), 1997, section 5.4, in the form of Le,
    Jaitly and Hinton (2015). Answering 1 always has an error of 1/6.
    """
    values, marks = torch.rand(length, batch, device=device), torch.zeros(length, batch, device=device)
    half, each = length // 2, torch.arange(batch, device=device)
    marks[torch.randint(0, half, (batch,), device=device), each] = 1
    marks[torch.randint(half, length, (batch,), device=device), each] = 1
    return torch.stack([values, marks], -1), (values * marks).sum(0)


def train(layer, length, updates, rate=RATE, batch=BATCH, device="cpu"):
    """Train a layer and a linear output. Returns the training errors and the error on test sequences."""
    head = torch.nn.Linear(layer.hidden_size, 1, device=device)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer, errors = torch.optim.Adam(parameters, lr=rate), []
    for _ in range(updates):
        x, y = adding_problem(length, batch, device)
        loss = mse_loss(head(layer(x)[0][-1]).squeeze(-1), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        errors.append(loss.detach())
    x, y = adding_problem(length, 2000, device)
    with torch.no_grad():
        test = mse_loss(head(layer(x)[0][-1]).squeeze(-1), y)
    return torch.stack(errors).tolist(), test.item()


def main():
    began, results = time.perf_counter(), {}
    for name in STARTS:
        results[name] = {"train": [], "test": []}
        for seed in SEEDS:
            torch.manual_seed(seed)
            errors, test = train(make_layer(name), LENGTH, UPDATES)
            means = torch.tensor(errors).unflatten(0, (-1, 50)).mean(1)
            results[name]["train"].append([float(f"{value:.4g}") for value in means])
            results[name]["test"].append(float(f"{test:.4g}"))
        print(f"{name:16}", "  ".join(f"{value:.4f}" for value in results[name]["test"]), flush=True)
    record = {
        "command": "OMP_NUM_THREADS=1 python book/record_initialization.py",
        "task": f"adding problem, {LENGTH} steps",
        "hidden_size": HIDDEN,
        "batch": BATCH,
        "updates": UPDATES,
        "learning_rate": RATE,
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
    path = Path(__file__).resolve().parent / "data" / "initialization.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path.name} after {record['seconds']} seconds")


if __name__ == "__main__":
    main()
