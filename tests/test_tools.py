"""What make and its scripts promise: a sentence where something is missing, and no more work than needed."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"

pytestmark = pytest.mark.skipif(
    os.name != "posix" or not shutil.which("make"), reason="needs make and a POSIX shell, as the scripts themselves do"
)


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command, cwd=ROOT, **environment):
    """Run a command without the variables that an outer make sets, and return what came of it."""
    variables = {name: text for name, text in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        command, cwd=cwd, env=variables | environment, capture_output=True, text=True, timeout=60, check=False
    )


def executable(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path):
    """Return a folder, with a space in its name, that holds what make needs to create an environment."""
    folder = tmp_path / "a checkout"
    shutil.copytree(TOOLS, folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def bare(tmp_path):
    """Return a folder of programs, as a search path, that has the shell's tools but no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("awk", "cat", "df", "dirname", "grep", "id", "make", "mkdir", "printf", "rm", "sh", "touch"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def assert_sentence(result, *words):
    """Assert that a command failed with one line on what is wrong, and without a traceback."""
    assert result.returncode != 0
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    for word in words:
        assert word in line
    assert "Traceback" not in result.stdout + result.stderr


class TestMake:
    def test_help_is_the_default_and_lists_every_public_target(self):
        shown = run("make").stdout
        assert shown == run("make", "help").stdout
        listed = set(re.findall(r"^  make ([a-z-]+) +\S", shown, flags=re.M))
        declared = re.search(r"^\.PHONY: (bench .*)$", (ROOT / "Makefile").read_text(), flags=re.M)[1].split()
        assert {"book", "test", "lab", "serve", "bench", "help"} <= listed
        assert listed == set(declared) - {"space"}

    @pytest.mark.parametrize("target", ["book", "test", "lab", "serve", "bench", "lint"])
    def test_no_python(self, checkout, bare, target):
        assert_sentence(run("make", target, cwd=checkout, PATH=str(bare)), "no Python 3.10 or newer")

    def test_old_python(self, checkout, bare):
        executable(bare / "python3", 'case "$2" in *print*) echo 3.9;; *) exit 1;; esac')
        assert_sentence(run("make", "test", cwd=checkout, PATH=str(bare)), "no Python 3.10 or newer", "python3 is 3.9")

    def test_python_of_choice_is_too_old(self, checkout, bare):
        python = executable(bare / "python3.9", "exit 1")
        result = run("make", "env", f"PYTHON={python}", cwd=checkout)
        assert_sentence(result, str(python), "not a Python 3.10")

    def test_no_venv_module(self, checkout, bare):
        executable(bare / "python3", 'case "$2" in *ensurepip*) exit 1;; esac')
        assert_sentence(run("make", "test", cwd=checkout, PATH=str(bare)), "venv module", "python3-venv")

    def test_no_network(self, checkout):
        # Port 9 of this machine refuses: the same failure as an unreachable index, without the wait
        unreachable = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull}
        # An empty variable would be an unset one to pip, a folder without files is a source without packages.
        nothing = {"PIP_FIND_LINKS": str(checkout / "tools"), "PIP_EXTRA_INDEX_URL": unreachable["PIP_INDEX_URL"]}
        result = run("make", "env", cwd=checkout, PIP_RETRIES="0", PIP_NO_CACHE_DIR="1", **unreachable, **nothing)
        assert_sentence(result, "could not be reached", "network")
        assert not (checkout / ".venv/.ready").exists()

    def test_full_disk(self, checkout, bare):
        (bare / "df").unlink()
        executable(bare / "df", "echo header; echo /dev/disk 1000000 999000 1000 100% /")
        assert_sentence(run("make", "book", cwd=checkout, PATH=str(bare)), "the disk is full", "0 MB are free")


def test_missing_chromium(bare):
    result = run("sh", TOOLS / "find_chromium.sh", PATH=str(bare), CHROMIUM="")
    assert result.returncode == 1
    assert "page tests do not run" in result.stderr
    browser = executable(bare / "google-chrome", "")
    assert run("sh", TOOLS / "find_chromium.sh", PATH=str(bare), CHROMIUM="").stdout.strip() == str(browser)


def test_oldest_reads_the_lower_bounds():
    shown = run(sys.executable, TOOLS / "oldest.py").stdout
    assert re.fullmatch(r"torch==2\.\d+\.\*\ntriton==3\.\d+\.\*\n", shown)


class TestServe:
    def test_serves_on_the_next_free_port(self, tmp_path):
        (tmp_path / "index.html").write_text("a page")
        first = load("serve").FIRST_PORT
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                taken.bind(("127.0.0.1", first))
                taken.listen()
            except OSError:
                pass  # somebody else holds it, which is as good
            server = subprocess.Popen([sys.executable, TOOLS / "serve.py", tmp_path], stdout=subprocess.PIPE, text=True)
            try:
                port = int(re.search(r"localhost:(\d+)", server.stdout.readline())[1])
                assert port > first
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:
                    assert page.read() == b"a page"
            finally:
                server.terminate()
                server.communicate()

    def test_says_that_the_chosen_port_is_taken(self, tmp_path):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert_sentence(run(sys.executable, TOOLS / "serve.py", tmp_path, str(port)), f"port {port} is taken")

    @pytest.mark.parametrize("port", ["many", "70000"])
    def test_says_that_a_port_is_none(self, tmp_path, port):
        assert_sentence(run(sys.executable, TOOLS / "serve.py", tmp_path, port), f"PORT={port}")


def load_build_book():
    pytest.importorskip("jupyter_cache", reason="comes with jupyter-book")
    return load("build_book")


class TestBuildBook:
    @pytest.fixture
    def book(self, tmp_path, monkeypatch):
        """Return the module, working on a small project whose build is counted instead of done."""
        module = load_build_book()
        for name in ("book", "rnnkernels"):
            (tmp_path / name).mkdir()
        (tmp_path / "_config.yml").touch()
        (tmp_path / "rnnkernels/reference.py").write_text("one = 1")
        (tmp_path / "book/01_background.ipynb").write_text("{}")
        build = tmp_path / "_build"
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "BUILD", build)
        monkeypatch.setattr(module, "STATE", build / "state.json")
        monkeypatch.setattr(module, "INDEX", build / "html/index.html")
        monkeypatch.setattr(module, "execute", lambda jobs: module.failed)
        module.builds, module.status, module.failed = [], 0, []

        def build_book(command, cwd):
            assert {"-n", "-W", "--keep-going"} <= set(command)
            cache = build / ".jupyter_cache"
            module.builds.append("some" if cache.exists() else "all")
            cache.mkdir(exist_ok=True)
            module.INDEX.parent.mkdir()
            module.INDEX.touch()
            return subprocess.CompletedProcess(command, module.status)

        monkeypatch.setattr(module.subprocess, "run", build_book)
        return module

    def test_builds_once(self, book):
        assert book.main() == 0
        assert book.main() == 0
        assert book.builds == ["all"]

    @pytest.mark.parametrize(
        ("path", "text", "executes"),
        [
            ("book/01_background.ipynb", "{ }", "some"),
            ("book/index.md", "# New", "some"),
            ("_config.yml", "title: New", "some"),
            ("book/figures.py", "", "all"),
            ("rnnkernels/reference.py", "one = 2", "all"),
            ("rnnkernels/reference.py", None, "all"),
            ("rnnkernels/nn/new.py", "", "all"),
        ],
    )
    def test_executes_what_a_change_touches(self, book, path, text, executes):
        book.main()
        changed = book.ROOT / path
        changed.parent.mkdir(exist_ok=True)
        changed.unlink() if text is None else changed.write_text(text)
        assert book.main() == 0
        assert book.main() == 0
        assert book.builds == ["all", executes]

    def test_executes_all_in_another_environment(self, book, monkeypatch):
        book.main()
        monkeypatch.setattr(book, "installed", lambda: "torch==99")
        book.main()
        assert book.builds == ["all", "all"]

    def test_tries_again_after_a_failure_and_keeps_what_succeeded(self, book):
        book.status = 1
        assert book.main() == 1
        book.status = 0
        assert book.main() == 0
        assert book.builds == ["all", "some"]

    def test_builds_again_when_the_pages_are_gone(self, book):
        book.main()
        shutil.rmtree(book.BUILD / "html")
        book.main()
        assert book.builds == ["all", "some"]

    def test_makes_no_page_where_a_chapter_failed(self, book, capsys):
        book.failed = ["book/01_background.ipynb"]
        assert book.main() == 1
        assert book.builds == []
        assert "Error: book/01_background.ipynb failed" in capsys.readouterr().err
        book.failed = []
        assert book.main() == 0


class TestExecute:
    """The chapters' execution, in real kernels."""

    @pytest.fixture
    def chapters(self, tmp_path, monkeypatch):
        """Return the module, and a function that writes the code of a chapter of a small book."""
        module = load_build_book()
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "BUILD", tmp_path / "_build")
        (tmp_path / "book").mkdir()
        (tmp_path / "book/index.md").write_text("# A book")
        (tmp_path / "book/beside.py").write_text("two = 2")
        (tmp_path / "_config.yml").write_text("execute: {timeout: 30}")
        (tmp_path / "_toc.yml").write_text(
            "format: jb-book\nroot: book/index\nchapters:\n- file: book/01_a\n- file: book/02_b\n"
        )

        def write(name, code):
            kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
            notebook = new_notebook(cells=[new_code_cell(code)], metadata={"kernelspec": kernel})
            nbformat.write(notebook, tmp_path / f"book/{name}.ipynb")

        return module, write

    def test_runs_chapters_at_the_same_time_and_each_once(self, chapters, capsys):
        module, write = chapters
        # Each waits for the other, in its own folder; the count is one line for each execution.
        meet = """
import pathlib, time
from beside import two
with open("{own}", "a") as count: count.write("once\\n")
end = time.monotonic() + 20
while not pathlib.Path("{other}").exists():
    assert time.monotonic() < end
    time.sleep(0.02)
print(two)"""
        write("01_a", meet.format(own="a", other="b"))
        write("02_b", meet.format(own="b", other="a"))
        write("03_unlisted", "assert False")
        assert module.execute(2) == []
        assert "executed book/02_b.ipynb" in capsys.readouterr().out
        cache = module.get_cache(module.BUILD / ".jupyter_cache")
        for name in ("01_a", "02_b"):
            notebook = nbformat.read(module.ROOT / f"book/{name}.ipynb", as_version=4)
            assert cache.match_cache_notebook(notebook).data["execution_seconds"] > 0
            assert cache.merge_match_into_notebook(notebook)[1].cells[0].outputs[0].text == "2\n"
        write("02_b", meet.format(own="b", other="a") + " # changed")
        assert module.execute(2) == []
        assert capsys.readouterr().out == "executed book/02_b.ipynb (1 of 1)\n"
        assert [len((module.ROOT / "book" / name).read_text().split()) for name in "ab"] == [1, 2]

    def test_shows_the_error_of_a_chapter_and_keeps_the_others(self, chapters, capfd):
        module, write = chapters
        write("01_a", "x = 1")
        write("02_b", "one = 1\nassert one == 2, 'not two'")
        assert module.execute(1) == ["book/02_b.ipynb"]
        shown = capfd.readouterr()
        assert "book/02_b.ipynb" in shown.err
        assert "AssertionError" in shown.err
        assert "not two" in shown.err
        assert module.execute(1) == ["book/02_b.ipynb"]
        assert capfd.readouterr().out == "failed book/02_b.ipynb (1 of 1)\n"
        write("02_b", "one = 2")
        assert module.execute(1) == []
