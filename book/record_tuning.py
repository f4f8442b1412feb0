"""Search for hyperparameters of a small digit classifier in three ways, and record the results that chapter 8 draws.

Usage, from the repository's root: ``OMP_NUM_THREADS=1 python book/record_tuning.py``

Writes ``book/data/tuning.json``: for each way to search and each of five repetitions the validation loss of every trial
in its order, and the test accuracy of the trial that validation chose, with the versions and the command. It takes some
minutes on one core.
"""

import json
import platform
import time
from pathlib import Path

import optuna
import sklearn
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import rnnkernels as rk

TRIALS, REPETITIONS, UPDATES = 40, range(5), 120


def digits(device="cpu", seed=0):
    """The scikit-learn digits, one row of eight pixels a step, in parts of 200, 500 and 1,097 images.

    Returns
    -------
    dict of str to (torch.Tensor, torch.Tensor)
        For "train", "validation" and "test" the images, shape (8, images, 8), and their digits.
    """
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(images, dtype=torch.float32)[order].view(-1, 8, 8).transpose(0, 1) / 16
    y = torch.tensor(labels)[order]
    parts = zip(("train", "validation", "test"), x.split([200, 500, 1097], 1), y.split([200, 500, 1097]), strict=True)
    return {name: (some.contiguous().to(device), classes.to(device)) for name, some, classes in parts}


class Classifier(torch.nn.Module):
    """A recurrent layer that reads an image row by row, and a linear layer on its last state."""

    def __init__(self, layer, dropout=0.0):
        super().__init__()
        self.layer, self.dropout = layer, torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(layer.hidden_size, 10)

    def forward(self, x):
        return self.head(self.dropout(self.layer(x)[0][-1]))


def measure(model, part):
    """Mean cross-entropy and accuracy on one part of the data."""
    x, y = part
    model.eval()
    with torch.no_grad():
        scores = model(x)
    return cross_entropy(scores, y).item(), (scores.argmax(1) == y).double().mean().item()


def train(model, part, updates, rate=3e-3, batch=32, weight_decay=0.0, every=None, watch=()):
    """Train, and measure the parts in `watch` after each `every` updates. Returns those measurements."""
    (x, y), history = part, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=weight_decay)
    for update in range(1, updates + 1):
        chosen = torch.randint(0, len(y), (batch,), device=y.device)
        model.train()
        loss = cross_entropy(model(x[:, chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if every and update % every == 0:
            history.append([measure(model, other) for other in watch])
    return history


def trial_loss(data, rate, hidden_size, batch, nonlinearity, seed, part="validation"):
    """Train with these hyperparameters. Returns loss and accuracy on `part`; a diverged run counts as a loss of 10."""
    torch.manual_seed(seed)
    device = data["train"][1].device
    model = Classifier(rk.RNN(8, hidden_size, nonlinearity=nonlinearity)).to(device)
    train(model, data["train"], UPDATES, rate=rate, batch=batch)
    loss, accuracy = measure(model, data[part])
    return min(loss, 10.0) if loss == loss else 10.0, accuracy


def suggest(trial):
    """The search space, for a trial of Optuna."""
    return {
        "rate": trial.suggest_float("rate", 1e-4, 1e-1, log=True),
        "hidden_size": trial.suggest_int("hidden_size", 4, 128, log=True),
        "batch": trial.suggest_categorical("batch", [8, 32, 128]),
        "nonlinearity": trial.suggest_categorical("nonlinearity", ["tanh", "relu", "sigmoid"]),
    }


GRID = {
    "rate": [1e-4, 1e-3, 1e-2, 1e-1],
    "hidden_size": [4, 23, 128],
    "batch": [8, 128],
    "nonlinearity": ["tanh", "sigmoid"],
}
SAMPLERS = {
    "grid": lambda seed: optuna.samplers.GridSampler(GRID, seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "TPE": lambda seed: optuna.samplers.TPESampler(seed=seed),
}


def search(data, way, seed, trials=TRIALS):
    """Run one study. Returns it; its trials have the validation loss as value."""
    study = optuna.create_study(sampler=SAMPLERS[way](seed))
    study.optimize(lambda trial: trial_loss(data, **suggest(trial), seed=seed)[0], n_trials=trials)
    return study


def main():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    began, data, results = time.perf_counter(), digits(), {}
    for way in SAMPLERS:
        results[way] = {"losses": [], "test": [], "chosen": []}
        for seed in REPETITIONS:
            study = search(data, way, seed)
            results[way]["losses"].append([float(f"{trial.value:.4g}") for trial in study.trials])
            results[way]["chosen"].append(study.best_params)
            results[way]["test"].append(round(trial_loss(data, **study.best_params, seed=seed, part="test")[1], 4))
        print(f"{way:8}", *results[way]["test"], flush=True)
    record = {
        "command": "OMP_NUM_THREADS=1 python book/record_tuning.py",
        "task": "digits row by row, 200 training images",
        "trials": TRIALS,
        "updates": UPDATES,
        "seeds": list(REPETITIONS),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "optuna": optuna.__version__,
        "scikit-learn": sklearn.__version__,
        "rnnkernels": rk.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - began),
        "results": results,
    }
    path = Path(__file__).resolve().parent / "data" / "tuning.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path.name} after {record['seconds']} seconds")


if __name__ == "__main__":
    main()
