"""Result files: what they say of the machine and the software, and how they are written."""

import datetime
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
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


def write(path: Path, document: dict) -> None:
    """Write a result file, whole or not at all, so that an interrupted run leaves the last one complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    draft.replace(path)


def new_file(folder: Path, device: torch.device, ending: str) -> Path:
    """A path that nothing has yet: date, device, and ``ending``, as in ``2026-11-20-nvidia-h200.json``."""
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    stem = f"{datetime.date.today().isoformat()}-{slug}"
    names = itertools.chain([f"{stem}{ending}"], (f"{stem}-{count}{ending}" for count in itertools.count(2)))
    return next(path for name in names if not (path := folder / name).exists())
