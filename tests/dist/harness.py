"""Runs a function on N real processes over gloo; the first failure comes back with its traceback."""

from __future__ import annotations

import gc
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

from whalepod.parallel import processes


class RankError(AssertionError):
    """What a rank raised, traceback included."""


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 240) -> list[Any]:
    """`function(*args)` on every rank, with the variables a launcher would set; its results, by rank.

    The function must be at the top level of a module. It joins the job itself, as under torchrun:
    `dist.init_process_group("gloo")` or `open_mesh`. One thread per rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = processes.context()
    results: Any = context.Queue()
    starts = [
        processes.as_here(_rank, results, function, rank, num_ranks, port, args) for rank in range(num_ranks)
    ]
    ranks = [context.Process(target=call, args=arguments, daemon=True) for call, arguments in starts]
    for rank in ranks:
        rank.start()
    returned: dict[int, Any] = {}
    try:
        while len(returned) < num_ranks:
            try:
                rank, value, failure = results.get(timeout=timeout_s)
            except queue.Empty:
                silent = sorted(set(range(num_ranks)) - set(returned))
                raise RankError(f"no answer from ranks {silent} within {timeout_s} s") from None
            if failure is not None:
                raise RankError(f"rank {rank} of {num_ranks}:\n{failure}")
            returned[rank] = value
    finally:
        for process in ranks:
            process.join(timeout=10 if len(returned) == num_ranks else 0)
            if process.is_alive():
                process.kill()
    return [returned[rank] for rank in range(num_ranks)]


def run_on_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 240
) -> list[Any]:
    """The same inside a job: the process group is started before the function and ended after it."""
    return run_ranks(_joined, num_ranks, function, *args, timeout_s=timeout_s)


def _joined(function: Callable[..., Any], *args: Any) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()
        gc.collect()  # modules may hold groups in reference cycles, whose threads must end first


def _rank(
    results: Any, function: Callable[..., Any], rank: int, num_ranks: int, port: int, args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)
    try:
        value = function(*args)
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise SystemExit(1) from None
    results.put((rank, value, None))
