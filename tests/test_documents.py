"""The code in documents: what a page or the README shows runs, and prints what it says."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import rnnkernels as rk

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(path):
    """The Python code of a document, each block with the line that it starts on."""
    text = path.read_text(encoding="utf-8")
    return [
        (text[: b.start()].count("\n") + 1, b[1]) for b in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    ]


@pytest.mark.parametrize("name", ["book/moving.md", "README.md"])
def test_runs_as_shown(name):
    found = blocks(ROOT / name)
    assert found
    shared = {}
    for line, code in found:
        if ">>>" not in code:
            exec(compile(code, name, "exec"), shared)
            continue
        examples = doctest.DocTestParser().get_doctest(code, shared, name, name, line)
        report = []
        runner = doctest.DocTestRunner(optionflags=OPTIONS)
        runner.run(examples, out=report.append, clear_globs=False)
        assert runner.failures == 0, "".join(report)
        shared = examples.globs


def test_a_wrong_document_is_seen(tmp_path, monkeypatch):
    (tmp_path / "wrong.md").write_text("# A page\n\n```python\n>>> 1 + 1\n3\n```\n")
    monkeypatch.setattr(__import__(__name__), "ROOT", tmp_path)
    with pytest.raises(AssertionError, match="Expected"):
        test_runs_as_shown("wrong.md")


def rows(title):
    """The first cells of the table in a section of the page about moving, as text."""
    section = (ROOT / "book/moving.md").read_text(encoding="utf-8").partition(f"## {title}\n")[2]
    return [line.split("|") for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")]


def test_every_option_of_the_modules_is_listed_as_added():
    listed = "".join(cell for row in rows("What is added") for cell in row)
    for module in (rk.RNN, rk.GRU, rk.LSTM):
        for option in module._options:
            assert f"`{option}=" in listed, option
    assert "lengths=lengths" in listed
    assert "reset=mask" in listed


class TestMoving:
    """What the page about moving says without an example."""

    x = torch.randn(5, 2, 3)

    @pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
    def test_what_is_the_same(self, name):
        torch.manual_seed(0)
        theirs = getattr(torch.nn, name)(3, 4, 2, bidirectional=True)
        torch.manual_seed(0)
        ours = getattr(rk, name)(3, 4, 2, bidirectional=True)
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
        assert isinstance(ours, torch.nn.RNNBase)
        assert not isinstance(ours, getattr(torch.nn, name))
        assert ours.flatten_parameters() is None
        assert ours(self.x[:, :0])[0].shape == theirs(self.x[:, :0])[0].shape == (5, 0, 8)

    def test_what_differs(self):
        ours, theirs = rk.GRU(3, 4, 2, dropout=0.5), torch.nn.GRU(3, 4, 2, dropout=0.5)
        theirs.load_state_dict(ours.state_dict())
        results = []
        for module in (ours, theirs):
            torch.manual_seed(0)
            results.append(module(self.x)[0])
        assert not torch.allclose(*results)
        with torch.autocast("cpu", torch.bfloat16):
            assert [module(self.x)[0].dtype for module in (ours, theirs)] == [torch.bfloat16, torch.float32]

    def test_what_is_refused(self):
        gru = rk.GRU(3, 4)
        with pytest.raises(ValueError, match="lengths: expected None with an input without batch"):
            gru(self.x[:, 0], lengths=torch.tensor([5]))
        for empty in (lambda: gru(self.x[:0]), lambda: torch.nn.GRU(3, 4)(self.x[:0])):
            with pytest.raises(RuntimeError):
                empty()
        with pytest.raises(ValueError, match="lengths: expected 1 to 5 steps, got 0 to 5"):
            gru(self.x, lengths=torch.tensor([5, 0]))
        with pytest.raises(TypeError, match=r"lengths: expected dtype torch.int64"):
            gru(self.x, lengths=torch.tensor([5, 2], dtype=torch.int32))
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            rk.LSTMCell(3, 4, peephole=True)
        with pytest.raises(ValueError, match="proj_size: expected no such argument"):
            rk.GRU(3, 4, proj_size=2)

    @pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
    def test_torch_nn_breaks_the_graph(self, name):
        compiled = torch.compile(getattr(torch.nn, name)(3, 4), fullgraph=True, backend="eager")
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(self.x)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
    def test_torchscript_and_quantization(self):
        lstm = rk.LSTM(3, 4)
        with pytest.raises(torch.jit.frontend.NotSupportedError):
            torch.jit.script(lstm)
        model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(lstm), {torch.nn.LSTM})
        assert type(model[0]) is rk.LSTM
        model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.LSTM(3, 4)), {torch.nn.LSTM})
        assert type(model[0]) is not torch.nn.LSTM
