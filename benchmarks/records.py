"""Result files: what they say of the machine and the software, and how they are written."""

import datetime
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

import rnnkernels
from rnnkernels.__main__ import cpu_model, driver_version, version_of

ROOT = Path(__file__).resolve().parent.parent
SCHEMA_VERSION = 1


def _git(*arguments: str) -> str | None:
    try:
        finished = subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.strip()


def _gpu(device: torch.device) -> dict | None:
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_properties(device)
    return {
        "name": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "memory_bytes": gpu.total_memory,
        "multiprocessors": gpu.multi_processor_count,
        "driver": driver_version(),
    }


def fingerprint() -> str:
    """What the package and the benchmarks consist of, in 16 digits: equal where their sources are, commit or not."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("rnnkernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        digest.update(f"\0{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def header(kind: str, command: list[str], device: torch.device, commit: str | None = None) -> dict:
    """What every result file begins with. ``commit`` stands in where the sources are no git checkout."""
    found = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "schema": SCHEMA_VERSION,
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "commit": found or commit,
        "dirty": bool(changes) if found else None,
        "sources": fingerprint(),
        "software": {
            "rnnkernels": rnnkernels.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "torch": torch.__version__,
            "triton": version_of("triton"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "machine": {
            "device": device.type,
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "gpu": _gpu(device),
        },
    }


def finite(value: float) -> float | None:
    """A number that JSON can hold: None for NaN and infinity."""
    return value if math.isfinite(value) else None


def _line(case: dict) -> str:
    return json.dumps(case, allow_nan=False)


def _text(value: object, line: Callable[[dict], str], indent: str = "") -> str:
    """JSON in which every case is a ``line``: good to compare, and much faster to write than where all is indented."""
    within = f"{indent} "
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(key)}: {_text(item, line, within)}" for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        lines = [line(item) for item in value]
    else:
        return json.dumps(value, allow_nan=False)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{within}" + f",\n{within}".join(lines) + f"\n{indent}{closing}"


def write(path: Path, document: dict, line: Callable[[dict], str] = _line) -> None:
    """Write a result file, whole or not at all, so that an interrupted run leaves the last one complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(_text(document, line) + "\n")
    draft.replace(path)


def _stem(device: torch.device) -> str:
    """What a file's name begins with: date and device, as in ``2026-11-20-nvidia-h200``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{datetime.date.today().isoformat()}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"


def new_file(folder: Path, device: torch.device) -> Path:
    """A path that nothing has yet: ``2026-11-20-nvidia-h200.json``, or ``-2.json`` and so on."""
    stem = _stem(device)
    names = itertools.chain([f"{stem}.json"], (f"{stem}-{count}.json" for count in itertools.count(2)))
    return next(path for name in names if not (path := folder / name).exists())


class VisitFile:
    """The result file of a visit: one document, whose parts grow case by case and are on the disk after each.

    A later call on the same sources, software and GPU goes on where the last one stopped.
    """

    def __init__(self, path: Path, document: dict):
        self.path = path
        self.document = document
        self._lines: dict[int, tuple[dict, str]] = {}  # of thousands of cases, a write encodes those that are new

    @classmethod
    def open(cls, folder: Path, document: dict, device: torch.device, anew: bool = False) -> "VisitFile":
        """The newest file of ``folder`` that ``document`` can extend; a new one where there is none, or if ``anew``."""
        found = []
        for path in [] if anew else folder.glob("*.json"):
            try:
                there = json.loads(path.read_text())
            except ValueError:  # somebody else's
                continue
            if isinstance(there, dict) and there.get("kind") == "visit" and _identity(there) == _identity(document):
                found.append((there["date"], path, there))
        if not found:
            return cls(new_file(folder, device), {**document, "parts": {}})
        _, path, there = max(found, key=lambda each: each[0])
        return cls(path, there)

    def part(self, name: str) -> dict:
        """What the file holds of a part: ``finished``, ``cases`` and what the part adds."""
        return self.document["parts"].setdefault(name, {"finished": False, "cases": []})

    def done(self, part: str) -> set[str]:
        """Names of the cases that need not run again."""
        return {case["name"] for case in self.part(part)["cases"]}

    def keep(self, part: str, name: str, results: list[dict]) -> None:
        """Put the results of a case in the place of what there was of it, and write the file."""
        entry = self.part(part)
        entry["cases"] = [case for case in entry["cases"] if case["name"] != name] + results
        self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        write(self.path, self.document, self._line)

    def _line(self, case: dict) -> str:
        if id(case) not in self._lines:
            self._lines[id(case)] = case, _line(case)  # with the case, lest another one get its id
        return self._lines[id(case)][1]


def visits(folder: Path) -> list[dict]:
    """The newest visit to each GPU that a folder holds, by the GPU's name. A rehearsal is no visit."""
    newest: dict[str, dict] = {}
    for path in sorted(folder.glob("**/*.json")):
        document = json.loads(path.read_text())
        if document["kind"] == "visit" and document["machine"]["gpu"] is not None:
            name = document["machine"]["gpu"]["name"]
            if name not in newest or document["date"] > newest[name]["date"]:
                newest[name] = document
    return [newest[name] for name in sorted(newest)]


def _identity(document: dict) -> tuple:
    """What two calls of one visit have in common."""
    return document["sources"], document["commit"], document["software"], document["machine"]["gpu"]
