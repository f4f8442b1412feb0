"""Build the book: execute the chapters that changed, render every page, and stop on any warning.

Outputs of executed chapters are kept in ``_build/.jupyter_cache``, which looks up a chapter by its code alone. What
that leaves out, the package and everything else that a chapter's code reads, is fingerprinted here; when it changes,
every chapter is executed again. The chapters that the cache lacks are executed a few at a time before any page is made.
Pages are always rendered together, because one page can show another's numbers and titles.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import yaml
from jupyter_cache import get_cache
from jupyter_cache.executors.basic import ExecutionWorkerLocalMProc, ProcessData
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
STATE = BUILD / "state.json"
INDEX = BUILD / "html" / "index.html"
# What a chapter's outputs depend on beside its own code
READ_BY_CHAPTERS = [
    "rnnkernels/**/*.py",
    "book/*.py",
    "book/data/**/*",
    "benchmarks/*.py",
    "benchmarks/results/**/*.json",
]
# What the pages depend on beside that
READ_BY_PAGES = ["_config.yml", "_toc.yml", "book/**/*", "_extra/**/*", "tools/build_book.py", "*.md", "CITATION.cff"]
IGNORED = {"__pycache__", ".ipynb_checkpoints", ".jupyter_cache"}


def fingerprint(patterns, start=""):
    """Return a hash of the names and contents of all files under the root that match, and of `start`."""
    digest = hashlib.sha256(start.encode())
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        if path.is_file() and not IGNORED & set(path.parts):
            digest.update(f"\0{path.relative_to(ROOT).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def installed():
    """Return the versions of Python and of every installed distribution."""
    versions = sorted({f"{entry.name}=={entry.version}" for entry in metadata.distributions()})
    return "\n".join([platform.python_version(), *versions])


def execute(jobs):
    """Execute the chapters that the cache lacks, `jobs` at a time. Return those that failed, whose errors are shown.

    Whatever succeeds is in the cache, where the build looks first.
    """
    cache = get_cache(BUILD / ".jupyter_cache")
    listed = [str(ROOT / f"{document}.ipynb") for document in parse_toc_yaml(ROOT / "_toc.yml")]
    listed = [path for path in listed if Path(path).exists()]
    for path in listed:
        cache.add_nb_to_project(path)
    missing = sorted(cache.list_unexecuted(filter_uris=listed), key=lambda record: record.uri)
    timeout = yaml.safe_load((ROOT / "_config.yml").read_text())["execute"]["timeout"]
    tasks = [ProcessData(record.pk, record.uri, cache, timeout, allow_errors=False) for record in missing]
    failed = []
    if tasks:
        with multiprocessing.Pool(min(jobs, len(tasks))) as pool:
            executed = pool.imap_unordered(ExecutionWorkerLocalMProc(), tasks)
            for count, (status, path) in enumerate(executed, start=1):
                name = Path(path).relative_to(ROOT).as_posix()
                print(f"{'failed' if status else 'executed'} {name} ({count} of {len(tasks)})", flush=True)
                if status:
                    failed.append(name)
    return sorted(failed)


def main(jobs=2):
    chapters = fingerprint(READ_BY_CHAPTERS, start=installed())
    pages = fingerprint(READ_BY_PAGES, start=chapters)
    state = json.loads(STATE.read_text()) if STATE.exists() else {}
    if state.get("pages") == pages and INDEX.exists():
        print(f"The book is up to date; open {INDEX.as_uri()}")
        return 0

    BUILD.mkdir(exist_ok=True)
    stale = ["html", ".doctrees", "jupyter_execute"]
    if state.get("chapters") != chapters:
        stale.append(".jupyter_cache")
    for name in stale:
        shutil.rmtree(BUILD / name, ignore_errors=True)
    # Written before the build: chapters that succeed are kept when a later one fails.
    STATE.write_text(json.dumps({"chapters": chapters}))
    if failed := execute(jobs):
        print(f"Error: {', '.join(failed)} failed, as shown above. make book tries again.", file=sys.stderr)
        return 1

    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", ".", "-n", "-W", "--keep-going"]
    if subprocess.run(command, cwd=ROOT).returncode:
        print("Error: the book was not built without warnings; they are above. make book tries again.", file=sys.stderr)
        return 1
    STATE.write_text(json.dumps({"chapters": chapters, "pages": pages}))
    print(f"\nThe book is built; open {INDEX.as_uri()}, or see it with make serve")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Execute the chapters that changed, and build the book's pages.")
    default = min(2, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=default, help=f"chapters at a time (default: {default})")
    try:
        sys.exit(main(parser.parse_args().jobs))
    except KeyboardInterrupt:
        sys.exit(130)
