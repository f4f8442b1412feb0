"""The chapters' form, and proof that running them through nbval means something.

The cells themselves are run by nbval: ``make test-notebooks``, or

    OMP_NUM_THREADS=1 python -m pytest --nbval-lax --nbval-cell-timeout=300 -n 2 --dist loadfile tests/notebooks book

nbval starts each kernel in the notebook's own folder, so that ``import figures`` works. Under ``--nbval-lax`` a cell
passes when it raises nothing; a cell tagged ``nbval-check-output`` must also print what the notebook has stored.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]_*.ipynb"))
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))  # chapters, and pages that are computed
PINNED = {"nbval-check-output", "keep_output"}

each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def run_nbval(folder, *arguments):
    """Run nbval over a folder, apart from this project's settings; return its exit code and what it printed."""
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", "-c", os.devnull]
    run = subprocess.run(
        [*command, "--rootdir", str(folder), str(folder), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return run.returncode, run.stdout + run.stderr


def test_the_table_of_contents_lists_every_chapter():
    listed = re.findall(r"file: book/(\d\d_\w+)", (ROOT / "_toc.yml").read_text(encoding="utf-8"))
    assert listed == [path.stem for path in CHAPTERS]
    assert listed


@each_notebook
def test_is_a_valid_notebook(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor >= 5) == (4, True), "cells have ids from format 4.5 on"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.kernelspec.get("language", "python") == "python"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}, "only what every machine has in common"


@each_notebook
def test_carries_output_only_where_it_is_pinned(path):
    for cell in cells(path, "code"):
        pinned = tags(cell) & PINNED
        assert pinned in (set(), PINNED), f"{cell.id}: a pinned cell has both tags"
        assert bool(cell.outputs) == bool(pinned), f"{cell.id}: output and pins do not match"
        for output in cell.outputs:
            text = output.text if output.output_type == "stream" else output.data["text/plain"]
            assert text.strip(), f"{cell.id}: the pinned output is empty"
            assert set(output.get("data", {})) <= {"text/plain"}, f"{cell.id}: only text can be pinned"


@each_chapter
def test_compares_at_least_one_output(path):
    assert any(tags(cell) >= PINNED for cell in cells(path, "code"))


@each_chapter
def test_names_and_checks_every_labelled_equation(path):
    prose = "\n".join(cell.source for cell in cells(path, "markdown"))
    code = [cell.source for cell in cells(path, "code")]
    labels = re.findall(r"\$\$[ \t]*\(([\w:-]+)\)", prose)
    comments = "\n".join(re.findall(r"#.*", "\n".join(code)))
    assert labels, "a chapter has equations"
    unnamed = [label for label in labels if not re.search(rf"(?<![\w-]){re.escape(label)}(?![\w-])", comments)]
    assert unnamed == [], "the cell under an equation names its label in a comment"
    checks = re.findall(r"^\s*assert\b|\bassert_\w+\(|\bgradcheck\(", "\n".join(code), flags=re.M)
    assert len(checks) >= len(labels)


@each_notebook
def test_displays_no_equation_without_a_label(path):
    prose = "\n".join(cell.source for cell in cells(path, "markdown"))
    displayed = re.findall(r"^[ \t]*\$\$(.+?)\$\$[ \t]*(\([\w:-]+\))?", prose, flags=re.M | re.S)
    assert [formula[:40] for formula, label in displayed if not label] == []


@each_notebook
def test_hides_nothing_from_the_tests(path):
    escapes = {"nbval-skip", "nbval-ignore-output", "raises-exception", "skip-execution"}
    for cell in cells(path, "code"):
        assert not tags(cell) & escapes, f"{cell.id}: try and assert instead"
        assert "filterwarnings" not in cell.source, cell.id


def test_every_label_is_used_once_in_the_book():
    labels = []
    for path in NOTEBOOKS:
        prose = "\n".join(cell.source for cell in cells(path, "markdown"))
        labels += re.findall(r"\$\$[ \t]*\(([\w:-]+)\)|^:label: *(\S+)|^\(([\w:-]+)\)=$", prose, flags=re.M)
        labels += [c.metadata.get("mystnb", {}).get("figure", {}).get("name") for c in cells(path, "code")]
    names = [name for entry in labels if entry for name in ([entry] if isinstance(entry, str) else entry) if name]
    assert sorted(names) == sorted(set(names))


def test_nbval_collects_every_cell():
    code, output = run_nbval(ROOT / "book", "--collect-only", "-q")
    assert code == 0, output
    collected = Counter(re.findall(r"(\w+)\.ipynb::Cell \d+", output))
    assert collected == {path.stem: sum(bool(c.source.strip()) for c in cells(path, "code")) for path in NOTEBOOKS}


def pinned(source, text):
    output = new_output("stream", name="stdout", text=text)
    return new_code_cell(source, execution_count=1, outputs=[output], metadata={"tags": sorted(PINNED)})


EXAMPLES = {
    "sound": [new_code_cell("from beside import two"), pinned("print(two)", "2\n")],
    "another_output": [new_code_cell("two = 2"), pinned("print(two)", "3\n")],
    "false_assertion": [new_code_cell("two = 2"), new_code_cell("assert two == 3")],
    "error": [new_code_cell("two = 2"), new_code_cell("three")],
}


def test_nbval_fails_broken_notebooks_only(tmp_path):
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for name, code_cells in EXAMPLES.items():
        notebook = new_notebook(cells=[new_markdown_cell("# A chapter"), *code_cells], metadata=kernel)
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    (tmp_path / "beside.py").write_text("two = 2\n")
    code, output = run_nbval(tmp_path)
    assert code == 1
    assert set(re.findall(r"^FAILED .*?(\w+)\.ipynb::Cell 1", output, flags=re.M)) == {*EXAMPLES} - {"sound"}, output
    assert "3 failed, 5 passed" in output


def test_nothing_but_notebooks_is_needed_to_read_them():
    """A notebook is JSON in one canonical form, so that a change of one cell is a change of a few lines."""
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n", path.name
