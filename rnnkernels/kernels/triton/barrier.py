"""A barrier over the programs of one launch, which must all be running at once: a cooperative launch.

A counter in global memory goes up by one for each program that arrives. Whoever has seen it reach n * programs after
waiting for the n-th time also sees what every program stored before it arrived, where loads bypass the L1 cache
(``cache_modifier=".cg"``).
"""

import triton
import triton.language as tl


@triton.jit
def arrive(counter):
    """Publish what this program has stored."""
    tl.debug_barrier()  # the atomic is one thread's, and releases what all of them stored before
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, target):
    """Go on when ``target`` arrivals have been counted."""
    # The loop needs what the atomic returns: an acquire whose result is unused may be dropped.
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()
