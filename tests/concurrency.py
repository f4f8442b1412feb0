"""Run the programs of a launch at once in Triton's interpreter: a forked process each, on memory that they share."""

import contextlib
import itertools
import math
import os
import signal
import sys
import time
import traceback

import torch


class Deadlock(RuntimeError):
    """The programs of a launch did not end in time."""


class Refusing:
    """A kernel of which the GPU refuses a cooperative launch."""

    def __init__(self, reason):
        self.reason = reason

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            raise RuntimeError(f"Triton Error [CUDA]: {self.reason}")

        return launch


@contextlib.contextmanager
def processes(seconds=120.0, late=0.0):
    """Launch so inside the block, on the CPU. A launch may take ``seconds``, else it raises :exc:`Deadlock`.

    The last program of a launch begins ``late`` seconds after the others.
    """
    from triton.runtime.interpreter import GridExecutor

    def call(self, *args, **kwargs):
        for tensor in itertools.chain(args, kwargs.values()):
            if isinstance(tensor, torch.Tensor):
                tensor.share_memory_()  # the storage, and with it every view
        grid = (*self.grid, 1, 1)[:3]
        children = []
        for place in itertools.product(*map(range, grid)):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    time.sleep(late if len(children) == math.prod(grid) - 1 else 0.0)
                    _run_one(self, run, grid, place, args, kwargs)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children.append(child)
        _wait_for(children, time.monotonic() + seconds)

    run = GridExecutor.__call__
    GridExecutor.__call__ = call
    try:
        yield
    finally:
        GridExecutor.__call__ = run


def _run_one(executor, run, grid, place, args, kwargs):
    """Run the program at one place of the grid. The process can do nothing else afterwards."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_dim, set_place, atomic = builder.set_grid_dim, builder.set_grid_idx, builder.create_atomic_rmw

    def patient_atomic(*arguments):
        time.sleep(0.001)  # who waits leaves the processor to the others
        return atomic(*arguments)

    builder.set_grid_dim = lambda *_: set_dim(*grid)
    builder.set_grid_idx = lambda *_: set_place(*place)
    builder.create_atomic_rmw = patient_atomic
    executor._restore_args_dev = lambda *_: None  # copying a tensor onto itself would undo what others write meanwhile
    executor.grid = (1, 1, 1)
    run(executor, *args, **kwargs)


def _wait_for(children, deadline):
    statuses = {}
    try:
        while len(statuses) < len(children):
            for child in children:
                if child not in statuses:
                    ended, status = os.waitpid(child, os.WNOHANG)
                    if ended:
                        statuses[child] = status
            if any(statuses.values()):
                raise RuntimeError("a program failed: what it says is in the captured output")
            if time.monotonic() > deadline:
                raise Deadlock(f"{len(children) - len(statuses)} of {len(children)} programs did not end")
            time.sleep(0.01)
    finally:
        for child in children:
            if child not in statuses:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
