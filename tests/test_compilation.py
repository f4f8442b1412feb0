"""Every launch that the dispatch can choose, compiled for GPUs that need not be there.

A worker process compiles, with Triton's interpreter off. ``RNNKERNELS_COMPILE_ALL=1`` crosses every option with every
tile (minutes); by default each tile is compiled with the options that need the most, and the largest tile of each type
with all of them for an H100.
"""

import concurrent.futures
import contextlib
import itertools
import math
import multiprocessing
import os
import re
from unittest import mock

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernels can't be compiled here")

pytestmark = [pytest.mark.offline, pytest.mark.slow]

CAPABILITIES = (80, 90)
MAX_SPILLED_BYTES = 32
MAX_BARRIERS = 40
"""Of the threads of a program in a step of the persistent design."""
TYPES = {"bfloat16": "highest", "float16": "highest", "float32 ieee": "highest", "float32 tf32": "high"}
LARGEST_RESIDENT = {
    "rnn": {"bfloat16": 256, "float16": 256, "float32 ieee": 64, "float32 tf32": 128},
    "gru": {"bfloat16": 128, "float16": 128, "float32 ieee": 64, "float32 tf32": 64},
    "lstm": {"bfloat16": 128, "float16": 128, "float32 ieee": 64, "float32 tf32": 64},
}
OPTIONS = {
    "rnn": list(itertools.product(("tanh", "sigmoid", "relu", "identity"), (False, True), (False, True))),
    "gru": list(itertools.product(("bias", "no bias"), (False, True), (False, True))),
    "lstm": list(itertools.product(("plain",), (False, True), (False, True))),
}
OF_LAUNCHES = ("write_table", "advance", "mask_elements")
"""Kernels that are there for others."""
EVERY = ("every option",)
HEAVIEST = {"rnn": ("tanh", True, True), "gru": ("bias", True, True), "lstm": ("plain", True, True)}

BOTH_DIRECTIONS = {cell: (variant, None, True) for cell, (variant, *_) in HEAVIEST.items()}

PERSISTENT_ELSEWHERE = {
    80: {("rnn", "16-bit"): (2048, (16, 32)), ("gru", "tf32"): (512, (32, 16)), ("lstm", "16-bit"): (512, (16, 32))},
    86: {("rnn", "16-bit"): (512, (16, 64)), ("gru", "16-bit"): (768, (16, 16)), ("lstm", "ieee"): (256, (16, 16))},
    100: {("rnn", "tf32"): (1024, (32, 16)), ("gru", "16-bit"): (2048, (16, 16)), ("lstm", "16-bit"): (1536, (16, 16))},
    "gfx942": dict.fromkeys(itertools.product(("rnn", "gru", "lstm"), ["ieee"]), (128, (16, 16))),
}
"""Rows of the persistent design that are compiled for other GPUs than an H100 as well."""

WAVEFRONT_ELSEWHERE = {
    80: {("gru", "16-bit"): (256, (16, 32)), ("lstm", "16-bit"): (512, (16, 16))},
    86: {("rnn", "tf32"): (512, (16, 16)), ("lstm", "ieee"): (128, (16, 16))},
    100: {("lstm", "16-bit"): (768, (16, 16))},
}
"""Rows of the wavefront that are compiled for other GPUs than an H100 as well."""

EVERY_OPTION = {"recurrent_dropout": 0.3, "zoneout": 0.2, "grad_clip": 1.0, "reverse": True, "key": 2**62 + 1}
GENERAL = {
    "rnn": ("rnn_forward", "rnn_backward"),
    "gru": ("gru_forward", "gru_backward"),
    "gru, reset before": (
        *("gru_gates_forward", "gru_candidate_forward"),
        *("gru_candidate_backward", "gru_gates_backward"),
    ),
    "lstm": ("lstm_forward", "lstm_backward"),
    "lstm, projection": ("lstm_forward", "state_forward", "state_backward", "lstm_backward"),
}
"""Variants of the cells with options, and the kernels of a step."""


def cases():
    """(cell, capability, type, hidden_size, batch, (variant, reverse, has lengths)) of every launch to compile."""
    everything = os.environ.get("RNNKERNELS_COMPILE_ALL") == "1"
    for cell, capability, kind in itertools.product(LARGEST_RESIDENT, CAPABILITIES, TYPES):
        largest = LARGEST_RESIDENT[cell][kind]
        resident = [1, 16] + [size for size in (31, 32, 63, 64, 127, 128, 255, 256) if size <= largest]
        step = [largest + 1, 1024]
        for hidden_size, batch in [(h, 3) for h in resident] + list(itertools.product(step, (3, 65))):
            of_note = (hidden_size, batch) in ((largest, 3), (largest + 1, 65))
            if kind == "float16" and not (everything or of_note):
                continue  # the same tiles and instructions as bfloat16
            every = everything or (of_note and capability == 90 and kind != "float16")
            for options in OPTIONS[cell] if every else [HEAVIEST[cell]]:
                # The direction of time changes no tile: one of the two will do, but for the heaviest.
                if everything or options == HEAVIEST[cell] or not options[1]:
                    yield cell, capability, kind, hidden_size, batch, options
        if everything or (capability == 90 and kind != "float16"):
            yield cell, capability, kind, largest, 3, BOTH_DIRECTIONS[cell]


def persistent_cases():
    """(cell, capability, type, inner_size, tile, hidden_size, (variant, reverse, has lengths)) of the persistent rows.

    By default each row is compiled once for an H100, at the worst hidden size that it takes; of each cell and type the
    largest tile once more with every option, and the row of the most shared memory for both directions.
    """
    from rnnkernels.kernels.triton import dispatch

    everything = os.environ.get("RNNKERNELS_COMPILE_ALL") == "1"
    kinds = {"16-bit": ("bfloat16", "float16") if everything else ("bfloat16",), "tf32": ("float32 tf32",)}
    for (cell, multiplication), sizes in dispatch.PERSISTENT.items():
        rows = [(size, tile) for size, tiles in sizes.items() for tile in tiles]
        fit = [row for row in rows if (cell, multiplication, *row) not in dispatch.SPILLS_WITH_OPTIONS]
        with_all = fit if everything else [max(fit, key=lambda row: (math.prod(row[1]), row[0]))]
        in_both = rows if everything else [max(rows, key=lambda row: sizes[row[0]][row[1]])]
        for inner_size, tile in rows:
            worst = inner_size - (not dispatch.needs_aligned_rows(cell, multiplication, inner_size, tile))
            chosen = [*(OPTIONS[cell] if everything else [HEAVIEST[cell]])]
            chosen += [EVERY] * ((inner_size, tile) in with_all) + [BOTH_DIRECTIONS[cell]] * (
                (inner_size, tile) in in_both
            )
            for kind in kinds.get(multiplication, ("float32 ieee",)):
                for hidden_size in (worst, inner_size) if everything and worst < inner_size else (worst,):
                    for options in chosen:
                        yield cell, 90, kind, inner_size, tile, hidden_size, options
    for capability, rows in PERSISTENT_ELSEWHERE.items():
        for (cell, multiplication), (inner_size, tile) in rows.items():
            kind = kinds.get(multiplication, ("float32 ieee",))[0]
            for options in (HEAVIEST[cell], EVERY) if (cell, capability) == ("lstm", 80) else (HEAVIEST[cell],):
                yield cell, capability, kind, inner_size, tile, inner_size, options


def wavefront_cases():
    """(cell, capability, type, inner_size, tile, hidden_size, (has lengths, dropout)) of the rows of the wavefront."""
    from rnnkernels.kernels.triton import dispatch

    everything = os.environ.get("RNNKERNELS_COMPILE_ALL") == "1"
    options = list(itertools.product((False, True), (False, True))) if everything else [(True, True)]
    kinds = {"16-bit": "bfloat16", "tf32": "float32 tf32", "ieee": "float32 ieee"}
    for (cell, multiplication), sizes in dispatch.WAVEFRONT.items():
        for inner_size, tile in ((size, tile) for size, tiles in sizes.items() for tile in tiles):
            worst = inner_size - (not dispatch.needs_aligned_rows(cell, multiplication, inner_size, tile))
            for each in options:
                yield cell, 90, kinds[multiplication], inner_size, tile, worst, each
    # Without dropout both products of a step back are one.
    yield "gru", 90, "bfloat16", 512, (16, 32), 511, (False, False)
    yield "lstm", 90, "bfloat16", 768, (16, 16), 767, (False, False)
    for capability, rows in WAVEFRONT_ELSEWHERE.items():
        for (cell, multiplication), (inner_size, tile) in rows.items():
            yield cell, capability, kinds[multiplication], inner_size, tile, inner_size, (True, True)


def multiplication_of(kind):
    return "16-bit" if "16" in kind else kind.split()[1]


def launch(cell, hidden_size, batch, dtype, variant="tanh", reverse=False, has_lengths=False, sequence_length=2):
    """Call the host functions of a forward and a backward pass. Runs in the worker."""
    import importlib

    import torch

    module = importlib.import_module(f"rnnkernels.kernels.triton.{cell}")
    both = (2,) if reverse is None else ()
    sequence = torch.zeros(*both, sequence_length, batch, hidden_size, dtype=dtype)
    state = sequence.select(-3, 0)
    lengths = torch.ones(batch, dtype=torch.int64) if has_lengths else None
    if cell == "rnn":
        weight = torch.zeros(*both, hidden_size, hidden_size, dtype=dtype)
        module.forward(sequence, state, weight, lengths, variant, reverse)
        module.backward(sequence, state, sequence, weight, lengths, variant, reverse)
    elif cell == "lstm":
        weight = torch.zeros(*both, 4 * hidden_size, hidden_size, dtype=dtype)
        gates = torch.zeros(*both, sequence_length, batch, 4 * hidden_size, dtype=dtype)
        *_, cells = module.forward(gates, state, state, weight, lengths, reverse)
        module.backward(sequence, state, state, sequence, gates, cells, state, state, weight, lengths, reverse)
    else:
        weight = torch.zeros(*both, 3 * hidden_size, hidden_size, dtype=dtype)
        gates = torch.zeros(*both, sequence_length, batch, 4 * hidden_size, dtype=dtype)
        bias = None if variant == "no bias" else weight[..., 0]
        module.forward(gates, state, weight, bias, lengths, reverse)
        module.backward(sequence, state, sequence, gates, state, weight, lengths, reverse)


def launch_layers(cell, design, hidden_size, batch, dtype, with_lengths, with_dropout, sequence_length=2):
    """Call the host functions of a wavefront's passes. Runs in the worker."""
    import torch

    from rnnkernels.kernels.triton import general, wavefront

    lanes, parts = design.lanes, general.PARTS[cell]
    states = torch.zeros(lanes, sequence_length, batch, hidden_size, dtype=dtype)
    gates, biases = (
        states.new_zeros(*states.shape[:3], parts * hidden_size),
        states.new_zeros(lanes, parts, hidden_size),
    )
    cells = states.float() if cell == "lstm" else None
    h_0 = states[:, 0].contiguous()
    c_0 = h_0 if cell == "lstm" else None
    weight = states.new_zeros(general.ROWS[cell] * hidden_size, hidden_size)
    weights = wavefront.squares(cell, [weight] * (lanes - 1), [weight] * lanes)
    lengths = torch.ones(batch, dtype=torch.int64) if with_lengths else None
    dropout = wavefront.Dropout(0.5, [3] * (lanes - 1)) if with_dropout else None
    below, output = states[1:], torch.zeros_like(states[0])  # of their own, as those that a call makes
    wavefront.forward(cell, design, gates, h_0, c_0, weights, biases, lengths, below.clone(), output, cells, dropout)
    wavefront.backward(
        *(
            cell,
            design,
            output,
            h_0,
            c_0,
            below.clone(),
            output,
            gates,
            cells,
            h_0,
            c_0,
            weights,
            lengths,
            dropout,
            gates,
        )
    )


def launch_general(variant, hidden_size, batch, dtype, norm, with_options, sequence_length=2):
    """Call the host functions of the general recurrence, with every option or with none. Runs in the worker."""
    import torch

    from rnnkernels.kernels.recurrence import Recurrence, Weights
    from rnnkernels.kernels.triton import general

    def zeros(*shape):
        return torch.zeros(*shape, dtype=dtype)

    cell, *special = variant.split(", ")
    rows, size = general.ROWS[cell] * hidden_size, 33 if special == ["projection"] else hidden_size
    is_lstm = cell == "lstm"
    options = {**EVERY_OPTION, "zoneout_cell": 0.2 if is_lstm else 0.0} if with_options else {}
    recurrence = Recurrence(cell, reset_after=special != ["reset before"], **options)
    weights = Weights(
        zeros(rows, size),
        bias=None if is_lstm else zeros(hidden_size),
        weight_hr=zeros(size, hidden_size) if special == ["projection"] else None,
        weight_peephole=zeros(3, hidden_size) if is_lstm and with_options else None,
        norm_hh=zeros(rows) if norm else None,
        norm_cell_weight=zeros(hidden_size) if is_lstm and norm else None,
        norm_cell_bias=zeros(hidden_size) if is_lstm and norm else None,
    )
    lengths = torch.ones(batch, dtype=torch.int64) if with_options else None
    reset = torch.zeros(sequence_length, batch, dtype=torch.bool) if with_options else None
    h, c = zeros(batch, size), zeros(batch, hidden_size) if is_lstm else None
    trace = general.forward(zeros(sequence_length, batch, rows), h, c, weights, lengths, reset, recurrence)
    general.backward(trace.output, h, c, trace, h, c, weights, lengths, reset, recurrence)


def compile_general(case):
    """What the kernels of a step need, by name. Runs in the worker."""
    import offline
    import torch

    variant, capability, kind, hidden_size, norm, with_options = case
    with offline.absent_gpu(capability) as launches, without("PERSISTENT"):
        launch_general(variant, hidden_size, 3, getattr(torch, kind), norm, with_options)
    by_name = {kernel.__name__: compiled for kernel, compiled in launches}
    return {name: offline.needs(compiled, capability) for name, compiled in by_name.items()}


def general_kernels_compiled_for_new_lengths_and_batches(variant):
    """How many kernels a GPU would compile for many lengths and batches of an odd size. Runs in the worker."""
    import offline
    import torch

    counts = {}
    with offline.absent_gpu(90) as launches:
        # Without normalization, a cell with one product a step runs in one launch.
        for norm in (True, False) if variant in LARGEST_RESIDENT else (True,):
            for sequence_length, batch in ((1, 1), (2, 16), (17, 3), (16, 64)):
                launch_general(variant, 17, batch, torch.bfloat16, norm, True, sequence_length)
    for kernel, compiled in launches:
        counts.setdefault(kernel.__name__, set()).add(compiled.hash)
    return {name: len(hashes) for name, hashes in counts.items()}


def general_cases():
    """(variant, capability, type, hidden_size, normalization, every option) of the steps to compile."""
    everything = os.environ.get("RNNKERNELS_COMPILE_ALL") == "1"
    for variant, capability in itertools.product(GENERAL, CAPABILITIES):
        for kind, hidden_size in (("bfloat16", 129), ("float32", 4096)):
            yield variant, capability, kind, hidden_size, True, True
        yield variant, capability, "bfloat16", 1000, False, True
        if capability == CAPABILITIES[0]:
            yield variant, "gfx942", "bfloat16", 129, True, True
        if everything:
            flags = itertools.product((False, True), repeat=2)
            for kind, size, (norm, options) in itertools.product(("bfloat16", "float32"), (1, 64, 512, 1024), flags):
                yield variant, capability, kind, size, norm, options


def cases_of_other_gpus():
    """The largest resident tile that fits, and a step, of each cell for other GPUs of NVIDIA's and for one of AMD's."""
    largest = {
        86: {"rnn": (128, 128), "gru": (64, 64), "lstm": (64, 64)},
        100: {"rnn": (256, 128), "gru": (128, 64), "lstm": (128, 64)},
        "gfx942": {"rnn": (128, 64), "gru": (32, 32), "lstm": (32, 32)},
    }
    for gpu, sizes in largest.items():
        for cell, pair in sizes.items():
            for kind, hidden_size in zip(("bfloat16", "float32 tf32"), pair, strict=True):
                yield cell, gpu, kind, hidden_size, 3, HEAVIEST[cell]
            yield cell, gpu, "bfloat16", 1000, 65, HEAVIEST[cell]


def compile_case(case):
    """What the kernels of a forward and a backward pass need, by name. Runs in the worker."""
    import offline
    import torch

    cell, capability, kind, hidden_size, batch, options = case
    torch.set_float32_matmul_precision(TYPES[kind])
    with offline.absent_gpu(capability) as launches, without("PERSISTENT"):
        launch(cell, hidden_size, batch, getattr(torch, kind.split()[0]), *options)
    found = {}
    for kernel, compiled in launches:
        if kernel.__name__ not in found and kernel.__name__ not in OF_LAUNCHES:
            found[kernel.__name__] = offline.needs(compiled, capability)
            if offline.is_nvidia(capability):
                ptx = compiled.asm["ptx"]
                found[kernel.__name__]["waits"] = ptx.count("griddepcontrol.wait")
                found[kernel.__name__]["tf32"] = "tf32" in ptx
                found[kernel.__name__]["unaligned"] = ptx.count("ld.global.b16")
            if kernel.__name__.endswith("resident"):
                block = max(16, 1 << (hidden_size - 1).bit_length())
                staged = offline.staged_in_loop(compiled.asm["ttgir"], f"{block}x{block}")
                # The 16 rows of the state are staged each step; at 16 units they look like the weights.
                found[kernel.__name__]["weights staged in loop"] = 0 if block == 16 else staged
    return found


def without(*tables):
    """Choose no design of these tables. Runs in the worker."""
    from rnnkernels.kernels.triton import dispatch

    stack = contextlib.ExitStack()
    for table in tables:
        empty = {key: {} for key in getattr(dispatch, table)}
        stack.enter_context(mock.patch.object(dispatch, table, empty))
    return stack


def compile_persistent(case):
    """What the kernels of a forward and a backward pass need, by name. Runs in the worker."""
    import importlib

    import offline
    import torch

    from rnnkernels.kernels.triton import dispatch, general

    cell, capability, kind, inner_size, (block_batch, block_hidden), hidden_size, options = case
    dtype = getattr(torch, kind.split()[0])
    torch.set_float32_matmul_precision(TYPES[kind])
    block_inner = dispatch.inner_block(inner_size, multiplication_of(kind))
    lanes = 2 if None in options else 1
    design = dispatch.Persistent(block_batch, block_hidden, block_inner, inner_size // block_inner, lanes=lanes)
    module = importlib.import_module(f"rnnkernels.kernels.triton.{cell}")
    with (
        offline.absent_gpu(capability) as launches,
        mock.patch.object(module, "choose", return_value=design),
        mock.patch.object(general, "persistent_design", return_value=design),
    ):
        if options == EVERY:
            launch_general(cell, hidden_size, block_batch, dtype, False, True)
        else:
            launch(cell, hidden_size, block_batch, dtype, *options)
    return needs_of_persistent(launches, design, capability)


def needs_of_persistent(launches, design, capability):
    """What the persistent kernels among the launches need, by name. Runs in the worker."""
    import offline

    found, inner = {}, design.block_inner // design.num_warps
    for kernel, compiled in launches:
        if kernel.__name__ in OF_LAUNCHES:
            continue
        needs = found[kernel.__name__] = offline.needs(compiled, capability)
        needs["cooperative"] = compiled.metadata.launch_cooperative_grid
        split = f"{design.num_warps}x{inner}x{design.block_hidden}"
        staged = offline.staged_in_loop(compiled.asm["ttgir"], split)
        # Where a split has as many units as the tile has rows, what is exchanged looks like the weights.
        needs["weights staged in loop"] = 0 if inner == design.block_batch else staged
        if offline.is_nvidia(capability):
            needs["loop"] = offline.synchronization(compiled.asm["ptx"])
    return found


def compile_wavefront(case):
    """What the kernels of a forward and a backward pass of layers need, by name. Runs in the worker."""
    import offline
    import torch

    from rnnkernels.kernels.triton import dispatch

    cell, capability, kind, inner_size, (block_batch, block_hidden), hidden_size, options = case
    torch.set_float32_matmul_precision(TYPES[kind])
    block_inner = dispatch.inner_block(inner_size, multiplication_of(kind))
    design = dispatch.Persistent(block_batch, block_hidden, block_inner, inner_size // block_inner, lanes=2)
    with offline.absent_gpu(capability) as launches:
        launch_layers(cell, design, hidden_size, block_batch, getattr(torch, kind.split()[0]), *options)
    return needs_of_persistent(launches, design, capability)


def kernels_compiled_for_new_lengths_and_batches(cell):
    """How many kernels a GPU would compile for many lengths and batches of one size. Runs in the worker."""
    import offline
    import torch

    counts = {}
    for hidden_size, tables in ((32, ()), (512, ()), (512, ("PERSISTENT",))):
        with offline.absent_gpu(90) as launches, without(*tables):
            for sequence_length, batch in ((1, 1), (2, 16), (17, 3), (16, 64), (33, 1)):
                launch(cell, hidden_size, batch, torch.bfloat16, sequence_length=sequence_length)
        for kernel, compiled in launches:
            counts.setdefault(kernel.__name__, set()).add(compiled.hash)
    return {name: len(hashes) for name, hashes in counts.items()}


def wavefronts_compiled_for_new_lengths_and_batches(cell):
    """How many kernels a GPU would compile for many lengths and batches of layers. Runs in the worker."""
    import offline
    import torch

    from rnnkernels.kernels.triton import dispatch

    counts = {}
    with offline.absent_gpu(90) as launches:
        design = dispatch.wavefront(cell, 256, 16, 3, torch.bfloat16, torch.device("cuda"))
        for sequence_length, batch in ((1, 1), (2, 16), (17, 3), (16, 64), (33, 1)):
            launch_layers(cell, design, 256, batch, torch.bfloat16, True, True, sequence_length)
    for kernel, compiled in launches:
        counts.setdefault(kernel.__name__, set()).add(compiled.hash)
    return {name: len(hashes) for name, hashes in counts.items()}


def launches_of_steps(cell, sequence_length):
    """Every launch of a forward and a backward pass in steps, as text. Runs in the worker."""
    import offline
    import torch

    with offline.recorded_launches() as launches, without("PERSISTENT"):
        launch(cell, 1000, 3, torch.bfloat16, *HEAVIEST[cell], sequence_length)
    shown = {torch.Tensor: lambda table: f"table of {len(table)}"}
    return [
        (kernel, grid, overlaps, [shown.get(type(value), repr)(value) for value in arguments])
        for kernel, grid, overlaps, arguments in launches
    ]


@pytest.fixture(scope="module")
def workers():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
            yield pool


@pytest.fixture(scope="module")
def compiled(workers):
    return {case: workers.submit(compile_case, case) for case in cases()}


@pytest.fixture(scope="module")
def compiled_for_others(workers):
    return {case: workers.submit(compile_case, case) for case in cases_of_other_gpus()}


@pytest.fixture(scope="module")
def compiled_persistent(workers):
    return {case: workers.submit(compile_persistent, case) for case in persistent_cases()}


@pytest.fixture(scope="module")
def compiled_wavefronts(workers):
    return {case: workers.submit(compile_wavefront, case) for case in wavefront_cases()}


@pytest.fixture(scope="module")
def compiled_general(workers):
    return {case: workers.submit(compile_general, case) for case in general_cases()}


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_it_compiles_and_fits(compiled, case):
    import offline

    from rnnkernels.kernels.triton import dispatch

    cell, capability, kind, hidden_size, *_ = case
    found = compiled[case].result(timeout=600)
    resident = hidden_size <= LARGEST_RESIDENT[cell][kind]
    design = "resident" if resident else "step"
    assert sorted(found) == [f"backward_{design}", f"forward_{design}"]
    for name, needs in found.items():
        assert needs["spilled_bytes"] <= MAX_SPILLED_BYTES, (name, needs)
        assert needs["shared_memory"] <= offline.SHARED_MEMORY[capability], (name, needs)
        assert needs.get("weights staged in loop", 0) == 0, (name, needs)
        assert needs["waits"] == (1 if capability >= 90 and not resident else 0), (name, needs)
        assert needs["tf32"] == (kind == "float32 tf32"), (name, needs)
        if hidden_size % 16 == 0 and not resident:  # else the addresses in the table are not known to be aligned
            assert needs["unaligned"] == 0, (name, needs)
    if resident:
        multiplication = multiplication_of(kind)
        block = max(16, 1 << (hidden_size - 1).bit_length())
        _, promised = dispatch.RESIDENT[cell, multiplication][block]
        assert max(needs["shared_memory"] for needs in found.values()) <= promised
    else:
        assert max(needs["shared_memory"] for needs in found.values()) <= offline.SHARED_MEMORY[86]


@pytest.mark.parametrize("case", list(cases_of_other_gpus()), ids=str)
def test_it_fits_other_gpus(compiled_for_others, case):
    import offline

    _, gpu, _, hidden_size, *_ = case
    found = compiled_for_others[case].result(timeout=600)
    design = "step" if hidden_size == 1000 else "resident"
    assert sorted(found) == [f"backward_{design}", f"forward_{design}"]
    for name, needs in found.items():
        assert needs["spilled_bytes"] <= MAX_SPILLED_BYTES, (name, needs)
        assert needs["shared_memory"] <= offline.SHARED_MEMORY[gpu], (name, needs)


@pytest.mark.parametrize("case", list(persistent_cases()), ids=str)
def test_persistent_kernels_compile_and_fit(compiled_persistent, case):
    from rnnkernels.kernels.triton import dispatch

    cell, capability, kind, inner_size, tile, *_ = case
    found = compiled_persistent[case].result(timeout=600)
    assert sorted(found) == ["backward_persistent", "forward_persistent"]
    assert_persistent(found, capability)
    if capability == 90:
        promised = dispatch.PERSISTENT[cell, multiplication_of(kind)][inner_size][tile]
        assert max(needs["shared_memory"] for needs in found.values()) <= promised


@pytest.mark.parametrize("case", list(wavefront_cases()), ids=str)
def test_wavefronts_compile_and_fit(compiled_wavefronts, case):
    from rnnkernels.kernels.triton import dispatch

    cell, capability, kind, inner_size, tile, *_ = case
    found = compiled_wavefronts[case].result(timeout=600)
    assert sorted(found) == ["backward_wavefront", "forward_wavefront"]
    assert_persistent(found, capability)
    if capability == 90:
        promised, _ = dispatch.WAVEFRONT[cell, multiplication_of(kind)][inner_size][tile]
        assert max(needs["shared_memory"] for needs in found.values()) <= promised


def assert_persistent(found, capability):
    """What holds for every kernel of a cooperative launch."""
    import offline

    for name, needs in found.items():
        assert needs["cooperative"], name
        assert needs["weights staged in loop"] == 0, (name, needs)
        assert needs["shared_memory"] <= offline.SHARED_MEMORY[capability], (name, needs)
        if offline.is_nvidia(capability):
            assert needs["spilled_bytes"] <= MAX_SPILLED_BYTES, (name, needs)
            # One barrier over the grid a step; what is exchanged is stored before it and read past the L1 after it.
            assert needs["loop"].count("release") == needs["loop"].count("acquire") == 1, (name, needs)
            order = r"(cg |bar )+(st |bar )+bar release (st |ld |bar )+acquire (bar ?)+"
            assert re.fullmatch(order, needs["loop"]), (name, needs)
            assert needs["loop"].count("bar") <= MAX_BARRIERS, (name, needs)


@pytest.mark.parametrize("cell", list(LARGEST_RESIDENT))
def test_a_new_length_or_batch_compiles_nothing(workers, cell):
    counts = workers.submit(kernels_compiled_for_new_lengths_and_batches, cell).result(timeout=600)
    designs = "resident", "persistent", "step"
    names = [f"{direction}_{design}" for design in designs for direction in ("forward", "backward")]
    assert counts == dict.fromkeys([*names, "write_table"], 1)


@pytest.mark.parametrize("cell", list(LARGEST_RESIDENT))
def test_a_new_length_or_batch_compiles_no_wavefront(workers, cell):
    counts = workers.submit(wavefronts_compiled_for_new_lengths_and_batches, cell).result(timeout=600)
    assert counts == {"forward_wavefront": 1, "backward_wavefront": 1}


@pytest.mark.parametrize("cell", list(LARGEST_RESIDENT))
def test_a_compiled_step_is_launched_with_what_triton_would_pass(workers, cell):
    launches = workers.submit(launches_of_steps, cell, 4).result(timeout=600)
    for name, direction in (("forward_step", -1), ("backward_step", 1)):  # of a reversed sequence
        (_, grid, overlaps, first), *others = (launch for launch in launches if launch[0] == name)
        assert (grid, overlaps, first[:2]) == ((1, 32, 1), True, ["table of 13", "0"])
        expected = [(name, grid, True, [first[0], repr(direction * step), *first[2:]]) for step in (1, 2, 3)]
        assert others == expected
    assert [launch[0] for launch in launches].count("write_table") == 2


@pytest.mark.parametrize("case", list(general_cases()), ids=str)
def test_steps_compile_and_fit(compiled_general, case):
    import offline

    variant = case[0]
    found = compiled_general[case].result(timeout=600)
    masks = ["mask_elements"] * bool(case[-1])
    assert sorted(found) == sorted([*GENERAL[variant], *masks])
    for name, needs in found.items():
        assert needs["spilled_bytes"] <= MAX_SPILLED_BYTES, (name, needs)
        assert needs["shared_memory"] <= offline.SHARED_MEMORY[86], (name, needs)


@pytest.mark.parametrize("variant", list(GENERAL))
def test_a_new_length_or_batch_compiles_no_step(workers, variant):
    counts = workers.submit(general_kernels_compiled_for_new_lengths_and_batches, variant).result(timeout=600)
    persistent = ("forward_persistent", "backward_persistent") if variant in LARGEST_RESIDENT else ()
    assert counts == dict.fromkeys((*GENERAL[variant], *persistent, "mask_elements"), 1)
