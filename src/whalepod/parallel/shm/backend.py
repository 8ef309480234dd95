"""Decides, group by group, whether its ranks can share memory, and makes the group's backend.

The ranks of a new group tell each other through the store where they live. If all live on one host, rank 0
makes an anonymous memory file, the others open it through /proc, and all vote: unless every rank has it
mapped, every rank takes gloo. So a group is never half of one and half of the other.

A host is a kernel (boot id) with a network and a process namespace: two containers are two hosts, and so are
two network namespaces that stand for two hosts in tests. Cloned virtual machines may agree in all of these;
the random number in the memory file tells them apart, and the vote then fails.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import weakref
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroupGloo

NAME = "whale"

_open: weakref.WeakSet[Any] = weakref.WeakSet()


def host_identity() -> str:
    """What two ranks must have in common to share memory."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return " ".join((boot, os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/pid")))


def _gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> ProcessGroupGloo:
    backend = ProcessGroupGloo(store, rank, size, timeout=timeout)
    backend._set_sequence_number_for_group()
    return backend


def _exchange(store: dist.Store, rank: int, size: int, key: str, value: str) -> list[str]:
    """Every rank's value, by rank."""
    store.set(f"{key}/{rank}", value)
    return [value if r == rank else store.get(f"{key}/{r}").decode() for r in range(size)]


def _attach(native: ModuleType, offer: str, pids: list[int], **group: Any) -> Any:
    """The backend over the memory that rank 0 offers, or None if this rank cannot reach it."""
    if not offer:
        return None
    pid, number, nonce0, nonce1 = map(int, offer.split())
    fd = -1
    try:
        fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        return native.ShmBackend(fd=fd, nonce0=nonce0, nonce1=nonce1, pids=pids, **group)
    except (OSError, RuntimeError):
        return None
    finally:
        if fd >= 0:
            os.close(fd)


def create(native: ModuleType | None, options: Any) -> Any:
    """A c10d backend for one new group: over shared memory where all ranks can, else gloo."""
    rank, size, timeout = options.group_rank, options.group_size, options.timeout
    gloo_store = dist.PrefixStore("gloo", options.store)
    store = dist.PrefixStore("shm", options.store)

    home = f"{host_identity()}|{os.getpid()}" if native is not None else ""
    homes = _exchange(store, rank, size, "home", home)
    if native is None or any(h.partition("|")[0] != home.partition("|")[0] for h in homes):
        return _gloo(gloo_store, rank, size, timeout)

    memory = -1
    if rank == 0:
        nonce0, nonce1 = secrets.randbits(63), secrets.randbits(63)
        with contextlib.suppress(RuntimeError):
            memory = native.create_segment(size, nonce0, nonce1)
        store.set("offer", f"{os.getpid()} {memory} {nonce0} {nonce1}" if memory >= 0 else "")
    backend = _attach(
        native,
        store.get("offer").decode(),
        [int(h.partition("|")[2]) for h in homes],
        rank=rank,
        size=size,
        timeout=timeout,
        make_gloo=lambda: _gloo(gloo_store, rank, size, timeout),
    )
    votes = _exchange(store, rank, size, "vote", "yes" if backend is not None else "no")
    if memory >= 0:
        os.close(memory)  # after the vote: until then others open it through this process
    if "no" in votes:
        return _gloo(gloo_store, rank, size, timeout)
    _open.add(backend)
    return backend


def _shut_down_all() -> None:
    """Threads must end before the interpreter does, also in a program that destroys no group."""
    for backend in list(_open):
        backend.shutdown()


def register(native: ModuleType | None) -> None:
    if hasattr(dist.Backend, NAME.upper()):
        return
    dist.Backend.register_backend(
        NAME, lambda options, _: create(native, options), extended_api=True, devices=["cpu"]
    )
    atexit.register(_shut_down_all)


def carries(group: dist.ProcessGroup | None = None) -> bool:
    """Whether this group goes over shared memory."""
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    return group._get_backend(torch.device("cpu")).name() == NAME
