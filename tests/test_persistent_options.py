"""Options inside the persistent design: its kernels in Triton's interpreter, as ``test_persistent.py`` runs them."""

import itertools
import math

import pytest
import torch
from parity import GATES, arguments, assert_padding_goes_nowhere, assert_parity, drawn, names_of

import rnnkernels as rk

pytest.importorskip("triton", reason="Triton is not installed: its kernels can't be tested here")

from rnnkernels.kernels.triton import dispatch, general, persistent  # noqa: E402

pytestmark = pytest.mark.interpreter

OPERATORS = list(GATES)
OPTIONS = {
    "rnn": [
        {"reset": True},
        {"recurrent_dropout": 0.4, "seed": 3},
        {"zoneout": 0.3, "seed": 3},
        {"zoneout": 0.3, "training": False},
        {"grad_clip": 0.05},
        {"lengths": True},
        {"lengths": True, "reverse": True},
    ]
}
OPTIONS["gru"] = [*OPTIONS["rnn"], {"bias": False}]
OPTIONS["lstm"] = [
    *OPTIONS["rnn"],
    {"weight_peephole": True},
    {"zoneout_cell": 0.3, "seed": 3},
    {"zoneout_cell": 0.3, "training": False},
]
ALL = {
    operator: {k: v for option in options for k, v in option.items() if k not in ("training", "bias")}
    for operator, options in OPTIONS.items()
}


def pairs(operator):
    """Pairs of options that do not contradict each other."""
    for one, other in itertools.combinations(OPTIONS[operator], 2):
        agree = all(one[name] == other[name] for name in one.keys() & other.keys())
        if agree and not {"training", "seed"} <= one.keys() | other.keys():
            yield {**one, **other}


@pytest.fixture(autouse=True)
def launches(monkeypatch, kernel_device):
    """Run every cell with options by the persistent design; the list of passes that did."""
    found = []

    def design(cell, hidden_size, *_):
        return dispatch.Persistent(16, 16, 128, chunks=-(-hidden_size // 128))

    def launch(kernel, *arguments, **options):
        found.append(kernel.__name__)
        return persistent.launch(kernel, *arguments, **options)

    monkeypatch.setattr(general, "persistent_design", design)
    monkeypatch.setattr(general, "launch", launch)
    with rk.use_backend("triton"):
        yield found


@pytest.fixture
def in_one_launch(monkeypatch):
    """One launch for all steps, the barrier in it."""
    monkeypatch.setattr(persistent, "concurrent", lambda device: True)


@pytest.mark.parametrize(("operator", "option"), [(o, option) for o in OPERATORS for option in OPTIONS[o]], ids=str)
def test_every_option_matches_the_reference(poisoned, launches, kernel_device, operator, option):
    tensors, options = drawn(operator, 4, 3, 17, torch.float32, kernel_device, option)
    assert_parity(tensors, 5e-6, operator, **options)
    assert launches == ["forward_persistent", "backward_persistent"]
