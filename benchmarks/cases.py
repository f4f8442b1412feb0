"""What is measured, and what is promised of it: every benchmark case and every target is declared here."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import training
from benchmarks.training import TrainingCase

SHAPES = (
    (64, 32, 128, 256),
    (256, 16, 64, 128),
    (512, 1, 64, 256),
    (128, 64, 256, 512),
    (1000, 8, 32, 64),
)
"""(sequence_length, batch, input_size, hidden_size) of the cases that the targets speak of."""

SHORT_SHAPES = (
    (1, 1, 64, 128),
    (8, 32, 128, 256),
)
"""One step, as when a model generates text, and a few."""

GPU_SHAPES = (
    (512, 256, 128, 128),
    (512, 64, 256, 256),
    (256, 64, 1024, 1024),
)
"""Larger ones that fill a GPU better."""

MODES = ("forward+backward", "forward")

MODULES = ("RNN", "GRU", "LSTM")
"""Classes that ``rnnkernels`` and ``torch.nn`` both have."""


@dataclass(frozen=True)
class Case:
    """One module of rnnkernels beside its namesake of ``torch.nn``, with the same weights and input."""

    sequence_length: int
    """Steps; of the longest sequence where ``packed``."""
    batch: int
    """Sequences."""
    input_size: int
    """Features of the input."""
    hidden_size: int
    """Features of the state."""
    mode: str = "forward+backward"
    """``"forward"``: inference. ``"forward+backward"``: results, and the gradients of the input and every weight."""
    module: str = "RNN"
    """Which of ``MODULES``."""
    dtype: str = "float32"
    """Type of weights, input, and everything else."""
    precision: str = "highest"
    """float32 products: ``"highest"`` in IEEE arithmetic, ``"high"`` in TF32. The same for both sides."""
    num_layers: int = 1
    """Layers."""
    bidirectional: bool = False
    """Whether each layer also runs backwards."""
    packed: bool = False
    """Whether the input is a PackedSequence, with lengths spread evenly over 1 to ``sequence_length``, in no order."""
    padded: bool = False
    """Whether the sequences of a padded batch have such lengths: ``torch.nn`` packs it and pads the result again,
    rnnkernels takes ``lengths=``."""

    @property
    def name(self) -> str:
        """All of this in a line."""
        words = [
            self.module,
            f"T={self.sequence_length} B={self.batch} I={self.input_size} H={self.hidden_size}",
            self.mode,
            self.dtype if self.precision == "highest" else "TF32",
            f"{self.num_layers} layers" if self.num_layers > 1 else "",
            "bidirectional" if self.bidirectional else "",
            "packed" if self.packed else "",
            "padded" if self.padded else "",
        ]
        return " ".join(filter(None, words))

    @property
    def plain(self) -> bool:
        """Whether it is one of the cases that the targets' mean is taken over."""
        shape = self.sequence_length, self.batch, self.input_size, self.hidden_size
        return shape in SHAPES and self == Case(*shape, mode=self.mode, module=self.module)


VARIANTS = (
    {"bidirectional": True},
    {"num_layers": 2},
    {"packed": True},
    {"packed": True, "bidirectional": True},
    {"padded": True, "bidirectional": True},
)

VARIABLE_LENGTHS = frozenset(
    Case(*shape, module=module, padded=True) for module, shape in itertools.product(MODULES, SHAPES)
)
"""Cases of the target about sequences of different lengths."""

ARITHMETIC = (
    {"dtype": "float32"},
    {"dtype": "float32", "precision": "high"},
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
)


def cases(device_type: str) -> list[Case | TrainingCase]:
    """The cases of a device, ``"cpu"`` or ``"cuda"``: those that matter most come first."""
    product = itertools.product
    declared = [Case(*shape, mode=mode, module=module) for module, mode, shape in product(MODULES, MODES, SHAPES)]
    declared += [
        Case(*shape, mode=mode, module=module) for module, shape, mode in product(MODULES, SHORT_SHAPES, MODES)
    ]
    declared += [
        Case(*shape, mode=mode, module=module, padded=True) for module, mode, shape in product(MODULES, MODES, SHAPES)
    ]
    if device_type == "cuda":
        declared += [
            Case(*shape, mode=mode, module=module, **arithmetic)
            for arithmetic, module, mode, shape in product(ARITHMETIC, MODULES, MODES, SHAPES + GPU_SHAPES)
        ]
    shapes, kinds = (SHAPES[1:2], ARITHMETIC) if device_type == "cuda" else (SHAPES[:2], ARITHMETIC[:1])
    declared += [
        Case(*shape, mode=mode, module=module, **variant, **arithmetic)
        for arithmetic, module, variant, shape, mode in product(kinds, MODULES, VARIANTS, shapes, MODES)
    ]
    return [*dict.fromkeys(declared), *training.cases(device_type)]


@dataclass(frozen=True)
class Target:
    """A promise about the ratios of the measured cases."""

    text: str
    """What is promised."""
    statistic: str
    """``"geometric mean"`` or ``"lowest"``."""
    at_least: float
    """The bound."""
    applies: Callable[[Case | TrainingCase], bool]
    """To which cases."""
    complete: int = 1
    """How many of them must have been measured for a verdict."""


def _plain(module: str) -> Callable[[Case | TrainingCase], bool]:
    return lambda case: case.plain and case.module == module and case.mode == "forward+backward"


TARGETS = (
    *(
        Target(
            f"{module} forward+backward, plain float32, geometric mean of the five shapes",
            "geometric mean",
            at_least,
            _plain(module),
            complete=len(SHAPES),
        )
        for module, at_least in (("RNN", 1.5), ("GRU", 2.0), ("LSTM", 1.0))
    ),
    Target(
        "variable lengths beside packing, forward+backward, geometric mean of all modules and the five shapes",
        "geometric mean",
        1.5,
        lambda case: isinstance(case, Case) and case in VARIABLE_LENGTHS,
        complete=len(MODULES) * len(SHAPES),
    ),
    Target(
        "never slower: lowest ratio of all cases, 5 % left for noise",
        "lowest",
        0.95,
        lambda case: getattr(case, "baseline", None) != "copy",
    ),
)

TRAINING_TARGETS = (
    Target(
        "optimizers on a GPU, 100 tensors, beside PyTorch's fused steps, geometric mean",
        "geometric mean",
        1.2,
        lambda case: isinstance(case, TrainingCase) and case.baseline == "fused" and case.tensors == 100,
        complete=5,
    ),
    Target(
        "optimizers on a GPU, 50M elements: the lowest share of the bandwidth of a copy",
        "lowest",
        0.9,
        lambda case: isinstance(case, TrainingCase) and case.baseline == "copy",
        complete=7,
    ),
)
"""Promises about optimizers on a GPU, judged where such cases were measured."""

OPTION_TARGETS = (Target("options: never slower than the loop over steps", "lowest", 1.0, lambda case: True),)
"""Promises of ``python -m benchmarks.options``, which speaks of nothing else."""
