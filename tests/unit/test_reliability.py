"""The parts that a job's survival rests on, one by one."""

from __future__ import annotations

import errno
import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from whalepod.parallel.mesh import Mesh
from whalepod.parallel.rounds import round_store
from whalepod.parallel.watchdog import Standing, _missing, _summary
from whalepod.spec.layout import Layout
from whalepod.train.metrics import _Lines, read_metrics
from whalepod.train.stragglers import SILENCE_STEPS, STEPS, Stragglers


def in_threads(size: int, store: Any, ranks: list[int] | None = None) -> dict[int, Any]:
    """What `round_store` returns to each of these ranks; a rank that fails has its exception."""
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        try:
            found[rank] = round_store(store.clone(), rank, size, timeout_s=1.0 if ranks else 30.0)
        except TimeoutError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks or range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_every_round_has_a_store_of_its_own() -> None:
    """Also after rounds in which some ranks died before they met the others."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    size = 3
    for dead in ([], [0, 1], [2], [1, 2]):
        if dead:  # a round that not all reach
            assert all(isinstance(e, TimeoutError) for e in in_threads(size, server, dead).values())
        stores = in_threads(size, server)
        assert not [s for s in stores.values() if isinstance(s, Exception)]
        assert not stores[0].check(["address/0"])  # nothing of a round before
        for rank, store in stores.items():
            store.set(f"address/{rank}", str(rank))
        assert stores[size - 1].get("address/0") == b"0"  # and all have the same


def standing(rank: int, waiting: tuple[str, str] | None, calls: int = 7) -> Standing:
    return Standing(rank, "host", 100 + rank, 1, 9.0, 5, "mlp forward", waiting, {"dp": calls})


def test_who_is_missing() -> None:
    layout = Layout(dp_replicate=4, global_batch=4)
    mesh = Mesh(torch.device("cpu"), layout, dict.fromkeys(("dp", "world")))  # type: ignore[arg-type]
    waits = ("dp", "all_reduce")
    mine = standing(0, waits)

    def blamed(others: list[Standing], silent: set[int]) -> list[int]:
        return [s.rank for s in _missing([mine, *others], silent, mesh, mine)]

    assert blamed([standing(1, waits), standing(2, waits)], {2}) == [2]  # it does not answer
    assert blamed([standing(1, None), standing(2, waits)], set()) == [1]  # it is somewhere else
    assert blamed([standing(1, waits), standing(2, ("dp", "all_gather"), 6)], set()) == [2]  # it is behind
    text = _summary([standing(2, None)], mine)
    assert text == "in step 5 rank 0 waits in all_reduce #7 of axis dp; not arrived: rank 2 (host, pid 102)"


def test_stragglers_are_named_after_a_while_and_not_again_at_once() -> None:
    watch = Stragglers([[0, 1, 2], [3]], ["a", "b", "c", "d"])
    told = [(step, lines) for step in range(1, 150) if (lines := watch.add(step, [1.0, 1.1, 2.0, 9.0])[1])]
    assert [step for step, _ in told] == [STEPS, STEPS + SILENCE_STEPS]
    assert "rank 2 (c) is slow" in told[0][1][0]
    assert watch.add(150, [1.0, 1.1, 2.0, 9.0])[0] == pytest.approx(2.0 / 1.1)
    assert all(not watch.add(step, [1.0, 1.0 + step % 2, 1.0, 1.0])[1] for step in range(200, 300))


class _SmallDisk(io.FileIO):
    """A file on a disk with so many bytes left."""

    left = 0

    def write(self, data: Any) -> int:
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(bytes(data)[: self.left])
        self.left -= written
        return written


def test_lines_that_a_full_disk_refuses_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = _Lines(path, 0)
    lines._file = disk = _SmallDisk(path, "r+b")
    disk.left = 30
    for step in range(1, 6):
        lines.write(f'{{"step": {step}}}\n')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert caplog.text.count("cannot be written now") == 1
    disk.left = 1000
    lines.write('{"step": 6}\n')
    lines.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    resumed = _Lines(path, 4)
    resumed.write('{"step": 5, "again": true}\n')
    resumed.close()
    assert read_metrics(path)[3:] == [{"step": 4}, {"step": 5, "again": True}]
