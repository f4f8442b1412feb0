"""``python -m benchmarks``: a table of rnnkernels beside PyTorch on this machine."""

import argparse
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import records, runner
from benchmarks.cases import cases


def run(
    selected: list[runner.AnyCase],
    device: torch.device,
    document: dict,
    path: Path | None = None,
    deadline: float = math.inf,
    **measurement,
) -> None:
    """Run cases, print the table as it grows, and keep ``document``, and the file at ``path``, up to date.

    Cases whose turn comes after ``deadline``, on ``time.monotonic()``'s clock, are listed as skipped.
    ``measurement`` goes to :func:`benchmarks.runner.run_case`.
    """
    results = document["cases"] = []
    print(runner.HEADER, flush=True)
    for case in selected:
        if time.monotonic() < deadline:
            result = runner.run_case(case, device, **measurement)
        else:
            result = runner.skipped(case, "the time was used up")
        results.append(result)
        document["targets"] = runner.verdicts(results)
        print(runner.row(result), flush=True)
        if path is not None:
            records.write(path, document)
    print(f"\n{runner.footer(results)}")


def exit_code(document: dict, check: bool) -> int:
    """1 where a case failed or differed and, if ``check``, where a target was missed; else 0."""
    broken = any(case["status"] in ("differs", "failed") for case in document["cases"])
    missed = any(target["met"] is False for target in document["targets"])
    return int(broken or (check and missed))


def main(
    arguments: list[str] | None = None,
    declared: Callable[[str], list[runner.AnyCase]] = cases,
    program: str = "python -m benchmarks",
) -> int:
    """Parse the command line, run, and return the exit code. ``declared`` are the cases of a kind of device."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Time rnnkernels beside PyTorch: medians and 20th to 80th percentiles of calls that take turns.",
        epilog="The exit code is 1 where results or gradients differ and, with --check, where a target is missed.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--filter", metavar="REGEX", default="", help="only cases in whose name this occurs")
    parser.add_argument("--json", metavar="PATH", type=Path, help="write the results here as well")
    parser.add_argument("--quick", action="store_true", help="measure each case for a moment only")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that PyTorch uses on the CPU")
    parser.add_argument("--check", action="store_true", help="let the exit code tell whether the targets are met")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no GPU that this PyTorch can use")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"argument --threads: expected at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    try:
        pattern = re.compile(options.filter)
    except re.error as error:
        parser.error(f"argument --filter: expected a regular expression, got {options.filter!r}: {error}")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    selected = [case for case in declared(device.type) if pattern.search(case.name)]
    if not selected:
        parser.error(f"argument --filter: no case's name has {options.filter!r} in it; --list shows them")
    if options.list:
        print("\n".join(case.name for case in selected))
        return 0

    command = [*program.split(), *(sys.argv[1:] if arguments is None else arguments)]
    document = records.header("benchmarks", command, device)
    machine = document["machine"]
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, threads: {machine['threads']}"
    print(f"{where}; torch {torch.__version__}")
    if machine["load"] is not None and machine["load"] > machine["cores"] / 2:
        print(f"The machine is busy (load {machine['load']:.1f} on {machine['cores']} cores): expect noise.")
    print()
    run(selected, device, document, options.json, **(runner.QUICK if options.quick else runner.FULL))
    return exit_code(document, options.check)


if __name__ == "__main__":
    sys.exit(main())
