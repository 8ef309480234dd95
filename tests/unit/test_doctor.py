"""The checkup: faults put into reports, axes and disks come out by name; and it runs on two real workers."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from whalepod import cli
from whalepod.doctor import between, probe, run
from whalepod.doctor.probe import Disk, Link, Report
from whalepod.doctor.verdict import Check, Needs, judge, worst
from whalepod.parallel.comm import Axis
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.run import make_run

GOOD = 0.5  # GB/s


def cluster(hosts: int = 4, per_host: int = 2) -> list[Report]:
    """Reports of a cluster on which nothing is wrong, every rank linked to every other."""
    ranks = hosts * per_host
    return [
        Report(
            rank=rank,
            host=f"node-{rank // per_host}",
            host_id=f"id {rank // per_host}",
            device="cpu",
            versions={"python": "3.11.7", "torch": "2.13.0", "whalepod": "0.1.0"},
            open_files=65536,
            locked_memory=-1,
            shm_gib=16.0,
            memory_free_gib=64.0,
            tflops=1.0,
            fp8="emulated",
            disk=Disk("/runs", 500.0, 900.0, 1200.0, 4.0) if rank % per_host == 0 else None,
            clock_s=1e-4 * rank,
            clock_error_s=1e-4,
            links=tuple(Link(peer, 5e-5, GOOD) for peer in range(ranks) if peer != rank),
            axes=("dp", "world"),
        )
        for rank in range(ranks)
    ]


def checks(
    reports: list[Report], needs: Needs | None = None, layout: Layout | None = None
) -> dict[str, Check]:
    layout = layout or Layout(dp_replicate=len(reports), global_batch=len(reports))
    return {check.name: check for check in judge(reports, layout, needs or Needs())}


def changed(reports: list[Report], ranks: tuple[int, ...], **changes: Any) -> list[Report]:
    return [replace(r, **changes) if r.rank in ranks else r for r in reports]


def test_a_sound_cluster_has_nothing_to_mend() -> None:
    found = checks(cluster(), Needs(memory_gib=40, checkpoint_gib=100, checkpoints=3))
    assert worst(found.values()) == "ok"
    assert all(check.remedy is None for check in found.values())
    assert "shared folder" not in found


@pytest.mark.parametrize(
    ("ranks", "changes", "needs", "name", "status", "words"),
    [
        ((5,), {"tflops": 0.7}, {}, "speed", "warning", "rank 5 (node-2)"),
        ((4, 5), {"tflops": 0.3}, {}, "speed", "failed", "ranks 4-5 (node-2)"),
        ((1,), {"open_files": 100}, {}, "limits", "failed", "rank 1 (node-0)"),
        ((1,), {"open_files": 1024}, {}, "limits", "warning", "rank 1 (node-0)"),
        ((6,), {"memory_free_gib": 30.0}, {"memory_gib": 40}, "memory", "failed", "rank 6 (node-3)"),
        ((6,), {"memory_free_gib": 41.0}, {"memory_gib": 40}, "memory", "warning", "takes 40.00"),
        ((6,), {"memory_free_gib": 30.0}, {}, "memory", "warning", "usually 64.0"),
        ((3,), {"fp8": "wrong by 40%"}, {"fp8": True}, "FP8", "failed", "rank 3 (node-1)"),
        ((3,), {"clock_s": 7.0}, {}, "clocks", "warning", "rank 3 (node-1)"),
        ((2,), {"disk": Disk("/runs", error="No space left")}, {}, "disk", "failed", "rank 2 (node-1)"),
        (
            (2,),
            {"disk": Disk("/runs", 50.0, 900.0)},
            {"checkpoint_gib": 60},
            "disk",
            "failed",
            "50.0 GiB free",
        ),
        ((2,), {"disk": Disk("/runs", 500.0, 9.0)}, {}, "disk", "warning", "9 MB/s"),
        (
            (4,),
            {"disk": Disk("/runs", 500.0, 900.0, sees_first=False)},
            {},
            *("shared folder", "failed", "rank 4 (node-2)"),
        ),
        ((7,), {"wrong": ("tp/all_reduce: 3 of 8",)}, {}, "collectives", "failed", "rank 7 (node-3)"),
    ],
)
def test_a_fault_is_named_with_its_rank_and_its_host(
    ranks: tuple[int, ...], changes: dict, needs: dict, name: str, status: str, words: str
) -> None:
    found = checks(changed(cluster(), ranks, **changes), Needs(**needs))
    assert found[name].status == status
    assert words in found[name].found
    assert found[name].remedy
    assert all(check.status == "ok" for other, check in found.items() if other != name)


@pytest.mark.parametrize(
    ("what", "status"), [("torch", "failed"), ("whalepod", "failed"), ("python", "warning")]
)
def test_a_rank_of_another_version_is_named(what: str, status: str) -> None:
    reports = cluster()
    other = changed(reports, (6,), versions={**reports[6].versions, what: "9.9"})
    check = checks(other)["versions"]
    assert check.status == status
    assert "9.9 on rank 6 (node-3)" in check.found


def slow(reports: list[Report], is_slow: Any, gb_s: float = 0.1) -> list[Report]:
    """Links for which `is_slow(a, b)` have so many GB/s, seen from both ends."""
    return [
        replace(
            r,
            links=tuple(
                replace(link, gb_s=gb_s) if is_slow(*sorted((r.rank, link.peer))) else link
                for link in r.links
            ),
        )
        for r in reports
    ]


@pytest.mark.parametrize(
    ("is_slow", "gb_s", "status", "words"),
    [
        (lambda a, b: (a, b) == (0, 5), 0.1, "warning", "rank 0 (node-0) to rank 5 (node-2)"),
        (
            lambda a, b: a // 2 != b // 2 and 2 in (a // 2, b // 2),
            0.1,
            "warning",
            "every link of host node-2",
        ),
        (lambda a, b: a // 2 != b // 2 and 5 in (a, b), 0.01, "failed", "every link of rank 5 (node-2)"),
        (lambda a, b: (a // 2, b // 2) == (1, 3), 0.1, "warning", "node-1 to node-3"),
        (lambda a, b: (a, b) == (6, 7), 0.1, "warning", "inside a host"),
    ],
)
def test_the_slow_link_is_named(is_slow: Any, gb_s: float, status: str, words: str) -> None:
    check = checks(slow(cluster(), is_slow, gb_s))["links"]
    assert check.status == status
    assert words in check.found


def test_tensor_parallel_groups_that_leave_a_host_are_a_warning() -> None:
    reports = cluster(hosts=2, per_host=2)
    assert checks(reports, layout=Layout(dp_replicate=2, tp=2, global_batch=4))["collectives"].status == "ok"
    across = checks(reports, layout=Layout(tp=4, global_batch=4))["collectives"]
    assert across.status == "warning"
    assert "tp leave the host" in across.found


@dataclass(frozen=True)
class FakeAxis(Axis):
    """One rank of three, the others answering as they should; `spoil` is the operation that is broken."""

    size: int = 3
    rank: int = 1
    spoil: str = ""

    def _out(self, op: str, right: Tensor) -> Tensor:
        if op == self.spoil:
            right[5] += 1
        return right

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self._out("all_reduce", tensor / 2 * 6)

    def gather_into(self, out: Tensor, tensor: Tensor, async_op: bool = False) -> None:
        out.copy_(self._out("all_gather", torch.cat([tensor / 2 * f for f in (1, 2, 3)])))

    def reduce_scatter_into(self, out: Tensor, tensor: Tensor, async_op: bool = False) -> None:
        if self.spoil == "reduce_scatter":
            raise RuntimeError("no route to host")
        out.copy_(tensor.chunk(3)[1] / 2 * 6)

    def start_all_to_all(self, rows: Tensor, send: Any, receive: Any) -> Tensor:
        return self._out("all_to_all", torch.arange(3).repeat_interleave(send[0]) * 10.0 + 1)

    def wait(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        return self._out("broadcast", tensor / 2 * 3)

    def shift_into(self, out: Tensor, tensor: Tensor) -> None:
        out.copy_(self._out("send", tensor / 2))


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "all_to_all", "broadcast", "send"])
def test_one_wrong_number_of_a_collective_is_seen(op: str) -> None:
    assert between.wrong_collectives(FakeAxis("tp"), torch.device("cpu")) == []
    (line,) = between.wrong_collectives(FakeAxis("tp", spoil=op), torch.device("cpu"))
    assert line.startswith(f"{op}: 1 of ")


def test_a_collective_that_raises_is_named() -> None:
    found = between.wrong_collectives(FakeAxis("tp", spoil="reduce_scatter"), torch.device("cpu"))
    assert found == ["reduce_scatter: no route to host"]


@pytest.mark.parametrize("size", [1, 2, 3, 6, 16, 17, 100])
def test_ranks_meet_in_pairs(size: int) -> None:
    met = {(r, r ^ mask) for mask in between.masks(size) for r in range(size) if r ^ mask < size}
    assert all((b, a) in met and a != b for a, b in met)
    if size <= between.ALL_PAIRS:
        assert len(met) == size * (size - 1)
    elif size > 1:
        assert len(between.masks(size)) == (size - 1).bit_length()


def test_a_full_disk_is_seen_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = probe.time_disk(tmp_path / "not" / "there" / "yet")
    assert (good.error, good.folder) == (None, str(tmp_path))
    assert good.write_mb_s > 0
    assert good.read_mb_s > 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):  # what a write to a full disk raises
        probe.time_file(Path("/dev/full"), tmp_path, 0)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(probe, "time_file", full)
    assert probe.time_disk(tmp_path).error == "No space left on device"
    assert not list(tmp_path.iterdir())


def test_reports_travel_whole() -> None:
    for report in cluster():
        assert Report.from_json(report.to_json()) == report


def test_two_workers_are_well(tmp_path: Path) -> None:
    """The real thing: two processes, a job's layout, memory and folder."""
    config = make_run(
        {
            "layout": {"dp_shard": 2, "ep": 2, "zero": 3, "micro_batch": 1, "global_batch": 2},
            "device": "cpu",
            "threads_per_worker": 1,
            "out": str(tmp_path / "run"),
        }
    )
    found = run.doctor(config)
    by_name = {check.name: check for check in found.checks}
    assert [r.rank for r in found.reports] == [0, 1]
    for name in ("versions", "memory", "disk", "clocks", "collectives"):
        assert by_name[name].status in ("ok", "warning"), by_name[name]
    assert {"fsdp", "ep", "world"} <= set(found.reports[0].axes)
    assert "the plan takes" in by_name["memory"].found
    (pair,) = found.as_json()["links"]
    assert (pair["a"], pair["b"]) == (0, 1)
    assert pair["gb_s"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_prints_and_says_by_its_code_whether_a_check_failed(
    broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = changed(cluster(), (6,), tflops=0.1) if broken else cluster()
    layout = Layout(dp_replicate=8, global_batch=8)
    every = judge(reports, layout, Needs())
    checkup = run.Checkup(worst(every), every, tuple(reports), layout)
    monkeypatch.setattr(run, "doctor", lambda config, timeout_s: checkup)
    table, as_json = (CliRunner().invoke(cli.app, ["doctor", *more]) for more in ([], ["--json"]))
    assert table.exit_code == as_json.exit_code == int(broken)
    assert ("1 failed" if broken else "everything is well") in table.output
    doc = json.loads(as_json.output)
    assert doc["status"] == ("failed" if broken else "ok")
    assert (doc["num_ranks"], doc["num_hosts"], len(doc["links"])) == (8, 4, 28)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    many = tmp_path / "run.yaml"
    many.write_text("layout: {dp_replicate: 128, micro_batch: 1, global_batch: 128}\ndevice: cpu\n")
    for arguments in (["nowhere.yaml"], [str(many)]):
        assert cli.main(["doctor", *arguments]) == 2
    layout = {"dp_replicate": 128, "micro_batch": 1, "global_batch": 128}
    with pytest.raises(UserError, match="under torchrun"):
        run.doctor(make_run({"layout": layout, "device": "cpu"}))
