"""Every start of a job's workers gets a store of its own.

torch's elastic agent keeps one key-value store for all restarts of a job. A rank that comes up again would
find there where its peers lived before they died, and wait for them for ever. Its count of restarts is no
help: it differs from host to host, since an agent that is only asked to join again does not count that.

So the ranks agree on a name for this round. Each sets a number of its own; the first lists the numbers it
finds, and each that finds its own number in the list confirms it. What a dead rank left is replaced when the
living one comes, and the first lists again. When all have confirmed a list, the round is named after it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable

from torch.distributed import PrefixStore, Store

_PAUSE_S = 0.01


def round_store(store: Store, rank: int, size: int, timeout_s: float = 1800.0) -> Store:
    """The part of `store` that belongs to the ranks that are alive now; called by all of them."""
    mine, end = secrets.token_hex(8), time.monotonic() + timeout_s
    keys = [f"whalepod/here/{r}" for r in range(size)]
    store.set(keys[rank], mine)

    def until(done: Callable[[], bool]) -> None:
        while not done():
            if time.monotonic() > end:
                raise TimeoutError(f"rank {rank}: not all of {size} workers came within {timeout_s:.0f} s")
            time.sleep(_PAUSE_S)

    listed: list[str] = []

    def agreed() -> bool:
        """The first's part: lists who is there, until all have found themselves in the list."""
        nonlocal listed
        if not store.check(keys):
            return False
        found = [number.decode() for number in store.multi_get(keys)]
        if found != listed:
            listed = found
            store.set("whalepod/list", json.dumps(listed))
        name = _name(listed)
        if not store.check([f"whalepod/{name}/{r}" for r in range(1, size)]):
            return False
        store.set(f"whalepod/{name}/go", "")
        return True

    def confirmed() -> bool:
        """The others' part."""
        nonlocal listed
        if not store.check(["whalepod/list"]):
            return False
        found = json.loads(store.get("whalepod/list"))
        if len(found) != size or found[rank] != mine:
            return False
        if found != listed:
            listed = found
            store.set(f"whalepod/{_name(listed)}/{rank}", "")
        return store.check([f"whalepod/{_name(listed)}/go"])

    until(agreed if rank == 0 else confirmed)
    return PrefixStore(f"whalepod/{_name(listed)}", store)


def _name(numbers: list[str]) -> str:
    return hashlib.sha256(" ".join(numbers).encode()).hexdigest()[:16]
