"""Collectives between CPU workers of one host, over shared memory: a c10d backend with gloo behind it.

gloo speaks TCP even to itself, which on one host costs several times what memory does. This backend moves
the same bytes with one copy into a staging area that all ranks of a group share and one copy (or one fused
reduction) out of it, in pieces that stay in the processor's cache. Reductions are combined in rank order,
16-bit floats in FP32 rounded once, so results have the same bits on every rank and in every run.

    dist.init_process_group(shm.register())

Each group decides for itself: all its ranks on one host, shared memory; otherwise gloo (see backend.py).
What is shared and how ranks wait: native/segment.h; the collectives: native/collectives.h; sends and
receives: native/pipes.h; who runs them: native/driver.h; c10d's face: native/backend.cpp.

WHALEPOD_SHM=0 in the environment of every rank switches it off.
"""

from __future__ import annotations

import functools
import logging
import os
import sys

from whalepod.parallel.shm import backend, build
from whalepod.parallel.shm.backend import carries

__all__ = ["carries", "register", "will_compile"]

log = logging.getLogger(__name__)


def will_compile() -> bool:
    """Whether the next `register` on this machine compiles first, which takes about half a minute."""
    return _switched_off() is None and build.will_compile()


def _switched_off() -> str | None:
    if os.environ.get("WHALEPOD_SHM") == "0":
        return "WHALEPOD_SHM=0"
    return None if sys.platform == "linux" else f"this is {sys.platform}, not Linux"


@functools.cache
def register() -> str:
    """Registers the backend and returns the name to give to `init_process_group` for CPU jobs.

    "whale", or "gloo" with WHALEPOD_SHM=0 or outside Linux. Where the native part cannot be built the name is
    "whale" all the same, because other hosts of the job may have it: every group with this rank then agrees
    on gloo. The reason is logged once.

    The first call on a machine compiles for about half a minute; a launcher may call it before its workers
    start, else the first worker builds and the others wait.
    """
    if (reason := _switched_off()) is not None:
        log.info("workers of one host speak through gloo: %s", reason)
        return "gloo"
    native = None
    try:
        native = build.load()
    except build.Unavailable as problem:
        log.warning("workers of one host speak through gloo, which is slower: %s", problem)
    backend.register(native)
    return backend.NAME
