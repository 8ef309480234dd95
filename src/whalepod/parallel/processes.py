"""Local processes that start fast: forks of one server that has torch and the model's code imported.

Importing torch takes a core seconds, a fork milliseconds. The server is Python's own `forkserver`: it starts
no threads and touches no GPU, so that its forks may. A fork has the server's environment, of when that
began: `as_here` brings it up to date.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

START_METHOD = "forkserver"
# Names, not imports: the server runs them, and they lie on floors above this one.
_IMPORTED = ["whalepod.parallel.parallelize", "whalepod.train.loop", "whalepod.serve.engine"]


def context() -> ForkServerContext:
    """The multiprocessing context of these processes; the server starts with the first of them."""
    forks = multiprocessing.get_context(START_METHOD)
    forks.set_forkserver_preload(_IMPORTED)
    return forks


def as_here(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function and arguments to start a process with, that calls `function(*args)` in the environment of
    the caller; what a launcher has set for the process itself stays."""
    return _in_environment, (dict(os.environ), function, args)


def _in_environment(environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    os.environ.update(environment)
    for name in [n for n in os.environ if n.startswith("WHALEPOD_") and n not in environment]:
        del os.environ[name]
    return function(*args)
