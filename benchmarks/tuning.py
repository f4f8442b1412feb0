"""Sweeps over the tiles of the dispatch table, and the table rewritten by what they found.

``python -m benchmarks.tuning FILE`` rewrites ``rnnkernels/kernels/triton/dispatch.py`` from the file of a visit. Only
the literals of the rows that became faster change: comments, order and everything else stay.
"""

import argparse
import ast
import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import designs, runner

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "rnnkernels" / "kernels" / "triton" / "dispatch.py"

WORTH = 0.97
"""A row changes where the time falls below this share of what it was."""

MAX_SPILLED_BYTES = 32
"""What ``tests/test_compilation.py`` allows."""

SMALLEST_SHARED_MEMORY = 99 * 1024
"""A tile of ``STEP`` serves every GPU: this is what the smallest allows."""

RANGES = {
    "block_batch": (16, 32, 64, 128),
    "block_hidden": (16, 32, 64, 128),
    "block_inner": (16, 32, 64, 128),
    "num_warps": (2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4),
}
"""What a field of a tile may be."""

UNTUNED = "No row has been timed on a GPU yet."
TUNED = "Tiles were last tuned on "


@dataclass(frozen=True)
class Row:
    """A row of a dispatch table, and what it is tuned on."""

    table: str
    """``"STEP"``, ``"RESIDENT"`` or ``"PERSISTENT"``."""
    keys: tuple
    """The keys that lead to the row, from the outside."""
    design: object
    """What it stands for now."""
    fields: tuple[str, ...]
    """What of the design may change."""
    shared_memory: int
    """Bytes that it may need."""
    cases: tuple[dict, ...]
    """Passes whose times count, as ``benchmarks.designs`` takes them."""
    entries: tuple[tuple[object, tuple, int], ...] = ()
    """For a row that lists tiles in the order of preference: each with its key and value."""

    @property
    def name(self) -> str:
        """All of the keys in a line."""
        return f"{self.table} {', '.join(map(repr, self.keys))}"

    def neighbours(self, design) -> list:
        """Designs that differ from this one in one field, by one place in its range; or all that the row lists."""
        found = [other for other, _, needed in self.entries if needed <= self.shared_memory and other != design]
        for field in self.fields:
            values, here = RANGES[field], getattr(design, field)
            if here in values:
                place = values.index(here)
                around = values[max(0, place - 1) : place + 2]
                found += [dataclasses.replace(design, **{field: value}) for value in around if value != here]
        return found

    def text(self, design, shared_memory: int) -> str:
        """What the table says of a design."""
        if self.table == "RESIDENT":
            return f"({design.num_warps}, {shared_memory})"
        if self.table == "PERSISTENT":  # the best tile comes first, the others stay in their order
            ordered = sorted(self.entries, key=lambda entry: entry[0] != design)
            return repr({key: value for _, key, value in ordered})
        return repr(design)


def _cases(operator: str, hidden_sizes: tuple[int, ...], batch: int, kinds: tuple[dict, ...]) -> tuple[dict, ...]:
    sizes = {"operator": operator, "batch": batch, "sequence_length": 128}
    return tuple(
        {**sizes, "hidden_size": hidden_size, **kind, "pass": direction}
        for hidden_size, kind, direction in itertools.product(hidden_sizes, kinds, ("forward", "backward"))
    )


KINDS = {
    "16-bit": {"dtype": "bfloat16", "precision": "highest"},
    "tf32": {"dtype": "float32", "precision": "high"},
    "ieee": {"dtype": "float32", "precision": "highest"},
}


def rows(shared_memory: int) -> list[Row]:
    """Every row of the tables, what matters most first; resident designs may need so many bytes of shared memory."""
    from rnnkernels.kernels.triton import dispatch

    found = []
    for (cell, many, aligned), design in dispatch.STEP.items():
        fields = tuple(field.name for field in dataclasses.fields(design))
        kinds = KINDS["16-bit"], KINDS["ieee"]
        cases = _cases(cell, (512, 1024) if aligned else (500, 1000), 256 if many else 32, kinds)
        found.append(Row("STEP", ((cell, many, aligned),), design, fields, SMALLEST_SHARED_MEMORY, cases))
    for (cell, multiplication), blocks in dispatch.RESIDENT.items():
        for block, (num_warps, _) in blocks.items():
            design = dispatch.Resident(block_batch=16, block_hidden=block, num_warps=num_warps)
            cases = _cases(cell, (block,), 64, (KINDS[multiplication],))
            found.append(Row("RESIDENT", ((cell, multiplication), block), design, ("num_warps",), shared_memory, cases))
    for (cell, multiplication), sizes in dispatch.PERSISTENT.items():
        for inner_size, tiles in sizes.items():
            inner = dispatch.inner_block(inner_size, multiplication)
            entries = tuple(
                (dispatch.Persistent(*tile, inner, inner_size // inner), tile, needed) for tile, needed in tiles.items()
            )
            fit = [design for design, _, needed in entries if needed <= shared_memory]
            if len(fit) > 1:
                cases = _cases(cell, (inner_size,), 16, (KINDS[multiplication],))
                keys = (cell, multiplication), inner_size
                found.append(Row("PERSISTENT", keys, fit[0], (), shared_memory, cases, entries))
    return sorted(found, key=_rank)


def rows_for(device: torch.device) -> list[Row]:
    """The rows to tune on a GPU; on a CPU one of each table, with little to do."""
    from rnnkernels.kernels.triton import dispatch

    found = rows(dispatch.shared_memory(device))
    if device.type == "cpu":
        small = {"batch": 2, "hidden_size": 16, "sequence_length": 2, **KINDS["ieee"]}
        tables = {row.table: row for row in found if row.table != "PERSISTENT"}
        found = [
            dataclasses.replace(
                row,
                fields=("num_warps",),
                cases=tuple({**case, **small} for case in row.cases[:2]),  # forward and backward
            )
            for row in tables.values()
        ]
    return found


def _rank(row: Row) -> tuple:
    """First persistent tiles and products in 16 bits, then those of aligned sizes; small resident blocks last."""
    if row.table == "STEP":
        return 1 if row.keys[0][2] else 3, 0
    (_, multiplication), size = row.keys
    if row.table == "PERSISTENT":
        return 0 if multiplication == "16-bit" else 4, 0
    return 2 if multiplication == "16-bit" else 4, -size


@contextlib.contextmanager
def compiled_kernels() -> Iterator[list]:
    """The list of compiled kernels that launches inside the block fill."""
    from triton.runtime.jit import JITFunction

    found, run = [], JITFunction.run

    def remember(kernel, *args, **kwargs):
        compiled = run(kernel, *args, **kwargs)
        found.append(compiled)
        return compiled

    JITFunction.run = remember
    try:
        yield found
    finally:
        JITFunction.run = run


def needs(compiled: list) -> tuple[int, int]:
    """Bytes of shared memory and of spills, the most that any of the kernels needs; 0 where the interpreter ran."""
    kernels = [kernel for kernel in compiled if hasattr(kernel, "metadata")]
    shared = max((kernel.metadata.shared for kernel in kernels), default=0)
    return shared, max((4 * (getattr(kernel, "n_spills", 0) or 0) for kernel in kernels), default=0)


def measure(
    row: Row, candidates: list, device: torch.device, measurement: dict, alive: Callable[[], None]
) -> dict[object, dict]:
    """For each candidate the geometric mean of its microseconds a step over all cases, or why it is out.

    ``alive`` is called before each of them is compiled; what it raises ends the sweep.
    """
    times = {str(candidate): [] for candidate in candidates}
    found = {candidate: {"shared_memory": 0, "reason": None} for candidate in candidates}
    for case in row.cases:
        with runner.precision(case["precision"]):
            for candidate in candidates:  # compiled one by one, to know whose kernels they are
                alive()
                with compiled_kernels() as compiled:
                    outcome = runner.attempt(_once, case, candidate, device)
                shared, spilled = needs(compiled)
                entry = found[candidate]
                entry["shared_memory"] = max(entry["shared_memory"], shared)
                if outcome["reason"]:
                    entry["reason"] = outcome["reason"]
                elif shared > row.shared_memory:
                    entry["reason"] = f"needs {shared} bytes of shared memory"
                elif spilled > MAX_SPILLED_BYTES:
                    entry["reason"] = f"spills {spilled} bytes"
            fit = [candidate for candidate in candidates if found[candidate]["reason"] is None]
            for result in designs.compare_designs(case, device, measurement, fit) if fit else []:
                if result["status"] == "measured":
                    times[result["design"]].append(result["microseconds_per_step"]["median"])
                else:
                    (candidate,) = [each for each in fit if str(each) == result["design"]]
                    found[candidate]["reason"] = result["reason"]
    for candidate, entry in found.items():
        values = times[str(candidate)]
        entry["microseconds_per_step"] = None if entry["reason"] else statistics.geometric_mean(values)
    return found


def _once(case: dict, design, device: torch.device) -> dict:
    with designs.forced(case["operator"], design), designs.without_fallback():
        designs.pass_of(case, device)()
    return {"reason": None}


def sweep(row: Row, device: torch.device, measurement: dict, alive: Callable[[], None] = lambda: None) -> dict:
    """From the row's design to better neighbours, as long as there are any."""
    best, tried = row.design, {}
    while True:
        candidates = [best, *(each for each in row.neighbours(best) if each not in tried)]
        if len(candidates) == 1:
            break
        measured = measure(row, candidates, device, measurement, alive)
        if measured[best]["microseconds_per_step"] is None:
            return {"status": "failed", "reason": f"the row's own design: {measured[best]['reason']}"}
        fit = [each for each in candidates if measured[each]["reason"] is None]
        fastest = min(fit, key=lambda each: measured[each]["microseconds_per_step"])
        # Of one measurement, side by side: figures of another may have met another clock.
        gain = measured[fastest]["microseconds_per_step"] / measured[best]["microseconds_per_step"]
        tried |= {each: {**entry, "relative_to": str(best)} for each, entry in measured.items() if each not in tried}
        if gain >= WORTH:
            break
        best = fastest
    after = row.text(best, tried[best]["shared_memory"]) if best != row.design else None
    return {
        "status": "measured",
        "reason": None,
        "before": str(row.design),
        "after": str(best),
        "literal": after,
        "candidates": [{"design": str(design), **entry} for design, entry in tried.items()],
    }


def fields(row: Row) -> dict:
    """What a result file says of the row itself."""
    return {"name": row.name, "table": row.table, "keys": [repr(key) for key in row.keys]}


# The table


def rewrite(source: str, changes: list[tuple[str, tuple, str]], origin: str) -> str:
    """The table's source with other values in some rows.

    Parameters
    ----------
    source : str
        A module that assigns dictionaries to names.
    changes : list of (table, keys, literal)
        The name of a dictionary, the keys that lead to a value, and the literal that takes its place.
    origin : str
        Where they come from, for the module's docstring.

    Raises
    ------
    ValueError
        If the source has no such row.
    """
    tables = {
        target.id: node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    lines = source.splitlines(keepends=True)
    for node, literal in sorted(
        ((_value(tables.get(table), table, keys), literal) for table, keys, literal in changes),
        key=lambda each: (each[0].lineno, each[0].col_offset),
        reverse=True,  # so that the places of those before stay true
    ):
        # Columns count bytes of UTF-8.
        before = lines[node.lineno - 1].encode()[: node.col_offset].decode()
        after = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
        lines[node.lineno - 1 : node.end_lineno] = [f"{before}{literal}{after}"]
    new = "".join(lines)
    if changes:
        told = [line for line in new.splitlines() if line.startswith((UNTUNED, TUNED))]
        for line in told[:1]:
            new = new.replace(line, f"{TUNED}{origin}.", 1)
    ast.parse(new)
    return new


def _value(node: ast.expr | None, table: str, keys: tuple) -> ast.expr:
    for key in keys:
        entries = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
        found = [value for at, value in entries if at is not None and ast.literal_eval(at) == key]
        if len(found) != 1:
            raise ValueError(f"changes: expected a row of {table} with the key {key!r}, found {len(found)}")
        (node,) = found
    if node is None:
        raise ValueError(f"changes: expected a table of the module, got {table!r}")
    return node


def changes_of(document: dict) -> list[tuple[str, tuple, str]]:
    """What the sweeps of a visit would change."""
    cases = document["parts"].get("tuning", {"cases": []})["cases"]
    return [
        (case["table"], tuple(ast.literal_eval(key) for key in case["keys"]), case["literal"])
        for case in cases
        if case["status"] == "measured" and case["literal"] is not None
    ]


def apply(document: dict, path: Path = TABLE) -> int:
    """Rewrite the table from the document of a visit, and return how many rows changed."""
    changes = changes_of(document)
    gpu = document["machine"]["gpu"]
    where = f"{gpu['name'] if gpu else 'a CPU, in a rehearsal'}, {document['date'][:10]}"
    source = path.read_text()
    new = rewrite(source, changes, where)
    if new != source:
        path.write_text(new)
    return len(changes)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, rewrite the table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="the result file of a visit")
    parser.add_argument("--table", type=Path, default=TABLE, help="default: the package's dispatch table")
    options = parser.parse_args(arguments)
    document = json.loads(options.file.read_text())
    if document.get("kind") != "visit":
        parser.error(f"argument file: expected the file of a visit, got one of kind {document.get('kind')!r}")
    print(f"{apply(document, options.table)} rows rewritten; hold them against tests/test_compilation.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
