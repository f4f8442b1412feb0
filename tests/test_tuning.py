"""Tuning without a GPU: from times that are made up to a dispatch table that is rewritten."""

import ast
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import tuning  # noqa: E402
from rnnkernels.kernels.triton import dispatch  # noqa: E402

CPU = torch.device("cpu")
SOURCE = tuning.TABLE.read_text()


def comments(source):
    return [line.strip() for line in source.splitlines() if line.strip().startswith("#")]


def loaded(source):
    """The tables of a module's source."""
    module = type(dispatch)("rewritten")
    sys.modules["rewritten"] = module  # where its dataclasses look for their names
    try:
        exec(compile(source, "rewritten", "exec"), module.__dict__)
    finally:
        del sys.modules["rewritten"]
    return module


def test_nothing_changes_without_a_change():
    assert tuning.rewrite(SOURCE, [], "a test") == SOURCE


def test_rows_are_rewritten_and_all_else_stays():
    step = dataclasses.replace(dispatch.STEP["gru", True, True], block_batch=128, block_inner=128, num_warps=16)
    changes = [
        ("STEP", (("gru", True, True),), repr(step)),
        ("RESIDENT", (("lstm", "16-bit"), 64), "(16, 123456)"),
        ("RESIDENT", (("lstm", "16-bit"), 128), "(16, 234567)"),
    ]
    new = tuning.rewrite(SOURCE, changes, "a GPU, 2026-11-27")
    assert comments(new) == comments(SOURCE)
    assert f"{tuning.TUNED}a GPU, 2026-11-27.\n" in new
    assert max(map(len, new.splitlines())) <= 120
    module = loaded(new)
    assert repr(module.STEP["gru", True, True]) == repr(step)
    assert module.RESIDENT["lstm", "16-bit"][64] == (16, 123456)
    assert module.RESIDENT["lstm", "16-bit"][128] == (16, 234567)
    changed = {("gru", True, True)}
    assert all(repr(module.STEP[key]) == repr(row) for key, row in dispatch.STEP.items() if key not in changed)
    for key, blocks in dispatch.RESIDENT.items():
        for block, row in blocks.items():
            if key != ("lstm", "16-bit") or block not in (64, 128):
                assert module.RESIDENT[key][block] == row
    old, rewritten = ast.parse(SOURCE), ast.parse(new)
    differ = [a for a, b in zip(old.body, rewritten.body, strict=True) if ast.dump(a) != ast.dump(b)]
    assert [getattr(getattr(node, "targets", [None])[0], "id", "docstring") for node in differ] == [
        "docstring",
        "RESIDENT",
        "STEP",
    ]
    again = tuning.rewrite(new, changes[:1], "another GPU, 2026-11-28")
    assert again.count(tuning.TUNED) == 1
    assert f"{tuning.TUNED}another GPU, 2026-11-28.\n" in again


def test_characters_of_more_than_one_byte_do_not_shift_a_row():
    source = 'TABLE = {"é": {1: (2, 3), 4: (5, 6)}}  # ünder\n'
    changes = [("TABLE", ("é", 1), "(7, 8)"), ("TABLE", ("é", 4), "(9, 10)")]
    assert tuning.rewrite(source, changes, "x") == 'TABLE = {"é": {1: (7, 8), 4: (9, 10)}}  # ünder\n'


@pytest.mark.parametrize(
    ("table", "keys", "says"),
    [
        ("STEP", (("gru", 3, 4),), "a row of STEP with the key"),
        ("RESIDENT", (("gru", "16-bit"), 17), "a row of RESIDENT with the key 17"),
        ("NOWHERE", (1,), "a row of NOWHERE"),
        ("NOWHERE", (), "a table of the module"),
    ],
)
def test_a_row_that_is_not_there(table, keys, says):
    with pytest.raises(ValueError, match=says):
        tuning.rewrite(SOURCE, [(table, keys, "0")], "x")


def test_every_row_of_the_tables_is_tuned():
    found = tuning.rows(227 * 1024)
    keys = {(row.table, row.keys) for row in found if row.table != "PERSISTENT"}
    resident = {("RESIDENT", (key, block)) for key, blocks in dispatch.RESIDENT.items() for block in blocks}
    assert keys == {("STEP", (key,)) for key in dispatch.STEP} | resident
    assert len({(row.table, row.keys) for row in found}) == len(found)
    for row in found:
        for design in row.neighbours(row.design) if row.table != "PERSISTENT" else ():
            before, after = dataclasses.asdict(row.design), dataclasses.asdict(design)
            (differs,) = [field for field in before if before[field] != after[field]]
            assert differs in row.fields


def row(**more):
    (found,) = [row for row in tuning.rows(227 * 1024) if row.keys == (("lstm", False, True),)]
    return dataclasses.replace(found, **more)


def made_up(times, spilled=(), differs=(), shared=2048):
    """Stand-ins for what measures, by a function from a design to its microseconds."""

    class Compiled:
        def __init__(self, design):
            self.metadata = type("metadata", (), {"shared": shared})
            self.n_spills = 100 if design in spilled else 0

    def compare(case, device, measurement, designs):
        return [
            {"design": str(design), "status": "differs", "reason": "wrong"}
            if design in differs
            else {"design": str(design), "status": "measured", "microseconds_per_step": {"median": times(design)}}
            for design in designs
        ]

    return Compiled, compare


def sweep(monkeypatch, tuned, times, **more):
    compiled_of, compare = made_up(times, **more)
    launched = []
    monkeypatch.setattr(
        tuning, "_once", lambda case, design, device: launched.append(compiled_of(design)) or {"reason": None}
    )
    monkeypatch.setattr(tuning.designs, "compare_designs", compare)

    class Launched:
        def __enter__(self):
            launched.clear()
            return launched

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(tuning, "compiled_kernels", Launched)
    return tuning.sweep(tuned, CPU, {})


def badness(design):
    """Lowest for a tile of 32 rows and 8 warps, two changes away from the row."""
    return 1 + (design.block_batch != 32) + (design.num_warps != 8) + (design.num_stages != 3)


def test_a_sweep_climbs_to_the_best_tile(monkeypatch, conform, tmp_path):
    tuned = row()
    found = sweep(monkeypatch, tuned, badness)
    best = dataclasses.replace(tuned.design, block_batch=32, num_warps=8)
    assert (found["status"], found["before"], found["after"]) == ("measured", str(tuned.design), str(best))
    assert len({candidate["design"] for candidate in found["candidates"]}) == len(found["candidates"])

    from benchmarks import records

    part = {"finished": True, "cases": [{**tuning.fields(tuned), **found}]}
    header = records.header("visit", ["x"], CPU)
    document = {**header, "calls": [{"date": header["date"], "command": "x"}], "parts": {"tuning": part}}
    conform(document)
    path, table = tmp_path / "visit.json", tmp_path / "dispatch.py"
    records.write(path, document)
    table.write_text(SOURCE)
    assert tuning.main([str(path), "--table", str(table)]) == 0
    assert repr(loaded(table.read_text()).STEP["lstm", False, True]) == repr(best)
    assert comments(table.read_text()) == comments(SOURCE)


def test_a_gain_within_the_noise_changes_nothing(monkeypatch):
    found = sweep(monkeypatch, row(), lambda design: 1 - 0.02 * (design.num_warps == 8))
    assert (found["literal"], found["after"]) == (None, found["before"])


def test_tiles_that_spill_or_differ_or_do_not_fit_are_out(monkeypatch):
    tuned = row()
    best = dataclasses.replace(tuned.design, num_warps=8)
    for out in ({"spilled": [best]}, {"differs": [best]}):
        found = sweep(monkeypatch, tuned, lambda design: 1 + (design != best), **out)
        assert found["literal"] is None
        (entry,) = [each for each in found["candidates"] if each["design"] == str(best)]
        assert entry["microseconds_per_step"] is None
        assert entry["reason"]
    found = sweep(monkeypatch, tuned, badness, shared=tuning.SMALLEST_SHARED_MEMORY + 1)
    assert found["status"] == "failed"


def test_a_resident_row_takes_the_shared_memory_that_it_was_seen_to_need(monkeypatch):
    keys = ("lstm", "16-bit"), 128
    (tuned,) = [r for r in tuning.rows(227 * 1024) if r.table == "RESIDENT" and r.keys == keys]
    found = sweep(monkeypatch, tuned, lambda design: design.num_warps, shared=4321)
    assert found["literal"] == "(2, 4321)"


@pytest.mark.parametrize("content", [{"kind": "benchmarks"}])
def test_only_a_visit_rewrites_the_table(tmp_path, content, capsys):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        tuning.main([str(path)])
    assert "expected the file of a visit" in capsys.readouterr().err


def test_tiles_of_the_persistent_design_change_their_order(monkeypatch):
    keys = ("lstm", "16-bit"), 512
    (tuned,) = [r for r in tuning.rows(227 * 1024) if r.table == "PERSISTENT" and r.keys == keys]
    tiles = dispatch.PERSISTENT[keys[0]][512]
    assert [(d.block_batch, d.block_hidden) for d in (tuned.design, *tuned.neighbours(tuned.design))] == list(tiles)
    found = sweep(monkeypatch, tuned, lambda design: 2 - (design.block_hidden == 32) - design.block_batch / 64)
    assert len(found["candidates"]) == len(tiles)
    row = loaded(tuning.rewrite(SOURCE, [("PERSISTENT", keys, found["literal"])], "x")).PERSISTENT[keys[0]][512]
    assert row == tiles
    assert list(row) == [(32, 32), *(tile for tile in tiles if tile != (32, 32))]
    # A GPU with less shared memory tries only what it can hold, and loses nothing of the row.
    (tuned,) = [r for r in tuning.rows(160 * 1024 - 1) if r.table == "PERSISTENT" and r.keys == (keys[0], 384)]
    assert len(tuned.neighbours(tuned.design)) < len(tuned.entries)
    assert all(d.block_hidden < 32 or d.block_batch < 32 for d in tuned.neighbours(tuned.design))
