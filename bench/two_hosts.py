"""One training job over two hosts: the same losses, the bytes between them, a cut link, a killed host.

    python bench/two_hosts.py [--rate-mbit 100] [--steps 12] [--cut-s 5] [--arms dp pp]

A host is a network namespace; one link that `tc` limits joins the two (bench/hosts.py). `torchrun` runs on
both, two ranks of one thread each, and they find each other over the link. An arm is a layout whose narrow
axis (tensor or expert) lies inside a host and whose data or pipeline axis goes across. For every arm:

- the job runs on one host (four ranks) and over the two: losses are compared bit by bit;
- the bytes that the link's interfaces counted for a step are set against the dry run's for what crosses.

For the first arm the link is unplugged for --cut-s seconds while it trains, and in another run all processes
of the second host are killed (kill -9) and its torchrun is started again; the losses must be those of the
quiet run.
Needs Linux and the right to make namespaces (root); says so in one line where it is missing.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts import ADDRESSES, LINK, NODES, kill_all, sent_bytes, set_link, two_nodes, why
from record import save

from whalepod.spec.layout import GROUPS, Layout
from whalepod.spec.run import RunConfig, dump_run, make_run
from whalepod.train.metrics import read_metrics

RANKS_PER_HOST = 2
PORT = 29533
ARMS: dict[str, dict[str, Any]] = {
    "dp": {"dp_replicate": 2, "tp": 2},
    "pp": {"pp": 2, "dp_shard": 2, "ep": 2, "zero": 1, "schedule": "1f1b"},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2, "ep": 2, "zero": 3},
}
INSIDE = {"dp": "tp 2", "pp": "ep 2", "hsdp": "fsdp 2, ep 2"}
ACROSS = {"dp": "replicas 2", "pp": "pp 2", "hsdp": "replicas 2"}
MODEL = {
    "preset": "v3-mini",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "vocab_size": 512,
}


def job(arm: str, out: Path, text: str, steps: int, model: dict[str, Any] = MODEL) -> RunConfig:
    """A small V3 in FP32, one thread a rank, a checkpoint every four steps."""
    layout = ARMS[arm] | {"micro_batch": 2, "global_batch": 8, "precision": "fp32"}
    return make_run(
        {
            "model": model,
            "layout": layout | {"devices_per_node": RANKS_PER_HOST},
            "data": {"source": text, "sequence_length": 128},
            "train": {"steps": steps, "checkpoint_every": 4, "evaluate_every": 0, "evaluate_sequences": 8},
            "schedule": {"warmup_steps": 2},
            "device": "cpu",
            "threads_per_worker": 1,
            "out": str(out),
        }
    )


@dataclass
class Job:
    """`torchrun` on each host, one command line; what they print goes to files beside the run's folder."""

    config: RunConfig
    names: list[str]
    hosts: int = NODES
    shared_memory: bool = True
    restarts: int = 0
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    def start(self, host: int) -> None:
        file = self.folder.with_suffix(".yaml")
        file.write_text(dump_run(self.config))
        command = [
            *("ip", "netns", "exec", self.names[host], sys.executable, "-m", "torch.distributed.run"),
            *(f"--nnodes={self.hosts}", f"--nproc-per-node={NODES * RANKS_PER_HOST // self.hosts}"),
            *(
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}",
                f"--rdzv-id={self.folder.name}",
            ),
            *(f"--rdzv-conf=is_host={int(host == 0)}", f"--local-addr={ADDRESSES[host]}"),
            *(f"--max-restarts={self.restarts}", "-m", "whalepod", "train", str(file)),
        ]
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": LINK,
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # addresses of the link have no names, and need none
            # torch 2.13: a first torchrun that has lived on tells a new one nothing of the store they should
            # share (dynamic_rendezvous.py, next_rendezvous), and both wait in vain; without sharing it does.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        if not self.shared_memory:
            environment["WHALEPOD_SHM"] = "0"
        with self.folder.with_suffix(f".host{host}.log").open("ab") as log:
            self.started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def steps(self) -> int:
        file = self.folder / "metrics.jsonl"
        rows = read_metrics(file) if file.is_file() else []
        return rows[-1]["step"] if rows else 0

    def wait(self, until: Callable[[], bool], timeout_s: float, what: str) -> None:
        end = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > end:
                raise SystemExit(f"{self.folder.name}: {what} took longer than {timeout_s:.0f} s")
            time.sleep(0.05)

    def finish(self, timeout_s: float = 400.0) -> None:
        """Waits for all that was started last on each host; raises with the log's end when one fails."""
        last = self.started[-self.hosts :]
        self.wait(lambda: all(p.poll() is not None for p in last), timeout_s, "the job")
        for process in last:
            if process.returncode:
                logs = [
                    p.read_text()[-2000:] for p in self.folder.parent.glob(f"{self.folder.name}.host*.log")
                ]
                raise SystemExit(
                    f"{self.folder.name}: torchrun ended with {process.returncode}\n" + "\n".join(logs)
                )

    def losses(self) -> list[float]:
        return [row["loss"] for row in read_metrics(self.folder / "metrics.jsonl")]


def run(config: RunConfig, names: list[str], hosts: int = NODES) -> Job:
    """The job from start to end, undisturbed."""
    # Between hosts all ranks speak gloo; where one host has them all they would share memory, which adds up
    # sums of four in another order.
    found = Job(config, names, hosts, shared_memory=hosts > 1)
    for host in range(hosts):
        found.start(host)
    found.finish()
    return found


# --------------------------------------------------------------------------------- bytes over the link


def planned_bytes(config: RunConfig) -> dict[str, float]:
    """What the dry run says a step sends from host to host, by axis; rank 0's pipeline, and the others'."""
    from whalepod.dryrun.roles import dry_run
    from whalepod.dryrun.views import dryrun_json
    from whalepod.spec.hardware import parse_gpus

    layout = config.make_layout()
    doc = dryrun_json(dry_run(config, parse_gpus(f"{layout.num_devices}xcpu", RANKS_PER_HOST)))
    total: dict[str, float] = {}
    for role in doc["roles"]:
        for row in role["collectives"]:
            if crosses(layout, row["axis"], role["rank"]):
                sent = wire_bytes(row["op"], row["bytes"], layout.group(row["axis"], role["rank"]))
                total[row["axis"]] = total.get(row["axis"], 0.0) + sent * doc["ranks_per_role"]
    return total


def crosses(layout: Layout, axis: str, rank: int) -> bool:
    return axis in GROUPS and len({r // RANKS_PER_HOST for r in layout.group(axis, rank)}) > 1


def wire_bytes(op: str, payload: float, ranks: list[int]) -> float:
    """What one of these ranks sends over the link, on average, for so many bytes handed over: collectives go
    round a ring, some of whose edges cross."""
    if op == "send":
        return payload
    edges = zip(ranks, ranks[1:] + ranks[:1], strict=True)
    crossing = sum(a // RANKS_PER_HOST != b // RANKS_PER_HOST for a, b in edges) / len(ranks)
    passes = 2 if op == "all_reduce" else 1
    return payload * passes * (len(ranks) - 1) / len(ranks) * crossing


# ------------------------------------------------------------------------------------------- one arm


def quiet(arm: str, place: Path, names: list[str], text: str, steps: int) -> dict[str, Any]:
    """Losses on one host and on two, and the bytes of a step: of a longer run less those of a shorter one."""
    alone = run(job(arm, place / f"{arm}-one", text, steps), names, hosts=1)
    short, before = 4, sent_bytes(names)
    run(job(arm, place / f"{arm}-short", text, short), names)
    middle = sent_bytes(names)
    both = run(job(arm, place / f"{arm}-two", text, steps), names)
    # Steps that the longer run has more; both write one checkpoint less than they have fours of steps.
    measured = (sent_bytes(names) - middle - (middle - before)) / (steps - short)
    planned = planned_bytes(both.config)
    return {
        "arm": arm,
        "inside": INSIDE[arm],
        "across": ACROSS[arm],
        "equal": alone.losses() == both.losses(),
        "largest_difference": max(abs(a - b) for a, b in zip(alone.losses(), both.losses(), strict=True)),
        "losses": both.losses(),
        "measured_bytes": measured,
        "planned_bytes": planned,
        "ratio": measured / sum(planned.values()) if planned else None,
    }


def cut(config: RunConfig, names: list[str], seconds: float, at: int = 3) -> dict[str, Any]:
    """Unplugs the link while the job trains."""
    found = Job(config, names)
    for host in range(NODES):
        found.start(host)
    found.wait(lambda: found.steps() >= at, 300, "the first steps")
    start, step = time.monotonic(), found.steps()
    set_link(names[1], up=False)
    time.sleep(seconds)
    still = found.steps() - step
    set_link(names[1], up=True)
    found.wait(lambda: found.steps() > step + still, 300, "going on after the cut")
    went_on = time.monotonic() - start - seconds
    found.finish()
    return {"losses": found.losses(), "cut_s": seconds, "steps_meanwhile": still, "went_on_after_s": went_on}


def kill(config: RunConfig, names: list[str], at: int = 6) -> dict[str, Any]:
    """Kills the second host; the first one's torchrun waits for it, and it is started again."""
    found = Job(config, names, restarts=3)
    for host in range(NODES):
        found.start(host)
    found.wait(lambda: found.steps() >= at, 300, "the first steps")
    step, killed, start = found.steps(), kill_all(names[1]), time.monotonic()
    found.started[-1].wait()
    first = found.started[0]
    time.sleep(2.0)
    survived = first.poll() is None
    if not survived:  # the same command again, on both
        found.start(0)
    found.start(1)
    if survived:
        found.started.append(found.started.pop(0))
    found.wait(lambda: found.steps() < step, 300, "starting again")
    again_from = found.steps()
    found.wait(lambda: found.steps() > again_from, 300, "going on after the kill")
    seconds = time.monotonic() - start
    found.finish()
    return {
        "losses": found.losses(),
        "killed_processes": killed,
        "killed_at_step": step,
        "went_on_from_step": again_from,
        "first_torchrun_survived": survived,
        "next_step_after_s": seconds,
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    print("inside a host   across       losses                   bytes/step  dry run's   ratio")
    for r in rows:
        same = "equal to the bit" if r["equal"] else f"off by {r['largest_difference']:.1e}"
        planned = sum(r["planned_bytes"].values())
        print(
            f"{r['inside']:14}  {r['across']:11}  {same:22} {r['measured_bytes'] / 1e6:9.3f} MB "
            f"{planned / 1e6:7.3f} MB  {r['ratio']:6.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rate-mbit", type=int, default=100)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cut-s", type=float, default=5.0)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=["dp", "pp"])
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--out", type=Path, default=Path("results/two_hosts.json"))
    options = parser.parse_args()
    # An end by signal goes through the clean-up too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    result: dict[str, Any] = {"rate_mbit": options.rate_mbit, "steps": options.steps}
    try:
        with two_nodes(options.rate_mbit) as names, tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            rows = [quiet(arm, place, names, options.text, options.steps) for arm in options.arms]
            result["arms"] = rows
            print_rows(rows)
            for what, disturb in (("cut", cut), ("kill", kill)):
                config = job(options.arms[0], place / what, options.text, options.steps)
                more = (options.cut_s,) if what == "cut" else ()
                found = disturb(config, names, *more)
                found["equal"] = found["losses"] == rows[0]["losses"]
                result[what] = found
                print(f"{what}: " + ", ".join(f"{k} {v}" for k, v in found.items() if k != "losses"))
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        print(f"nothing measured: two namespaces and a limited link could not be made here ({why(error)})")
        result["not_measured"] = why(error)
    save(options.out, result)


if __name__ == "__main__":
    main()
