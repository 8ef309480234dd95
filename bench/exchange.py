"""What the exchange protocols send over a slow link between two nodes, and how long they take.

    python bench/exchange.py [--rate-mbit 100] [--hidden 2048] [--tokens 256] [--rounds 7]

Two nodes are two network namespaces, joined by one link that `tc` limits to --rate-mbit in each direction;
four ranks run in each, speaking gloo. DeepSeek-V3's router picks 8 of 256 experts from 4 of 8 groups, one
group to a rank. Every arm brings --tokens tokens of each rank to their experts and back, without the experts'
products; arms take turns, and times are the slowest rank's, median over rounds. Bytes that cross the link are
counted twice: payload, by the exchange, and everything, by the interfaces. Needs Linux and the right to make
namespaces (root); says so in one line where it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from hosts import ADDRESSES, LINK, NODES, two_nodes, why
from record import save

from whalepod.models.moe import Router
from whalepod.parallel.exchange import Exchange, make_dispatcher
from whalepod.parallel.mesh import Mesh, open_mesh
from whalepod.spec import layout as spec_layout
from whalepod.spec.presets import load_model_spec

RANKS_PER_NODE = 4
PORT = 29511  # nothing else listens in a namespace of our own
ARMS = [(e, w) for e in ("flat", "two_hop") for w in get_args(spec_layout.Wire)]


# ------------------------------------------------------------------------------------- the two nodes


def start_ranks(names: list[str], arguments: list[str]) -> None:
    """Runs this file as a worker of every rank. Raises when one fails; none is left behind."""
    workers = []
    try:
        for rank in range(NODES * RANKS_PER_NODE):
            node, place = divmod(rank, RANKS_PER_NODE)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(place),
                "WORLD_SIZE": str(NODES * RANKS_PER_NODE),
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": LINK,
                "OMP_NUM_THREADS": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",  # addresses of the link have no names, and need none
            }
            command = ["ip", "netns", "exec", names[node], sys.executable, __file__, "--worker", *arguments]
            workers.append(subprocess.Popen(command, env=os.environ | environment))
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):
                raise SystemExit("a rank failed")
            time.sleep(0.2)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()


# ------------------------------------------------------------------------------------------ one rank


def interface_bytes() -> int:
    return int(Path(f"/sys/class/net/{LINK}/statistics/tx_bytes").read_text())


def layout_of(exchange: Any = "flat", wire: Any = "bf16") -> spec_layout.Layout:
    ranks = NODES * RANKS_PER_NODE
    return spec_layout.Layout(
        dp_shard=ranks,
        ep=ranks,
        devices_per_node=RANKS_PER_NODE,
        global_batch=ranks,
        exchange=exchange,
        wire=wire,
    )


@torch.no_grad()
def worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with open_mesh(layout_of(), torch.device("cpu")) as mesh:
        torch.manual_seed(mesh.world.rank)
        x = torch.randn(options.tokens, options.hidden).bfloat16()
        router = Router(load_model_spec("deepseek-v3").with_(hidden_size=options.hidden)).eval()
        weight = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(0))
        router.weight.copy_(weight * options.hidden**-0.5)
        ids, weights = router(x.unsqueeze(0))
        exchanges = [make_dispatcher(replace(mesh, layout=layout_of(*arm))) for arm in ARMS]
        measured: list[list[dict[str, float]]] = [[] for _ in ARMS]
        for turn in range(options.rounds + 1):
            for arm, exchange in zip(measured, exchanges, strict=True):
                assert isinstance(exchange, Exchange)
                result = once(mesh, exchange, x, ids, weights)
                if turn:  # the first opens connections
                    arm.append(result)
        if mesh.is_first:
            options.out.write_text(json.dumps(measured))


def once(
    mesh: Mesh, exchange: Exchange, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> dict[str, float]:
    """Time and bytes of one dispatch and combine."""
    exchange.crossed.clear()
    mesh.world.barrier()
    before, start = interface_bytes(), time.perf_counter()
    rows, plan = exchange.finish(exchange.start(x, ids, weights, 256))
    middle = time.perf_counter()
    out = exchange.combine(rows.x_ND * rows.weights_N.unsqueeze(1).to(x.dtype), plan)
    seconds = time.perf_counter() - start
    # Experts that only weigh: every token must come back as itself times its weights.
    error = (out.float() - x.float() * weights.sum(1, keepdim=True)).norm() / out.float().norm()
    assert error < 0.05, float(error)
    crossed = [exchange.crossed["dispatch"], exchange.crossed["combine"]]
    everyone = mesh.world.all_gather_floats([seconds, middle - start, *crossed])
    mesh.world.barrier()
    # Before the bytes of this rank's node are read, all have been sent.
    sent = mesh.world.all_gather_floats([float(interface_bytes() - before)])
    return {
        "seconds": max(row[0] for row in everyone),
        "dispatch_seconds": max(row[1] for row in everyone),
        "dispatch_bytes": sum(row[2] for row in everyone),
        "combine_bytes": sum(row[3] for row in everyone),
        "interface_bytes": sum(sent[node * RANKS_PER_NODE][0] for node in range(NODES)),
    }


# --------------------------------------------------------------------------------------- the report


def summary(measured: list[list[dict[str, float]]], rate_mbit: int) -> list[dict[str, Any]]:
    rows = []
    for (exchange, wire), rounds in zip(ARMS, measured, strict=True):
        median = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        counted = median["dispatch_bytes"] + median["combine_bytes"]
        rows.append(
            {
                "exchange": exchange,
                "wire": wire,
                "seconds": median["seconds"],
                "seconds_min": min(r["seconds"] for r in rounds),
                "seconds_max": max(r["seconds"] for r in rounds),
                "dispatch_seconds": median["dispatch_seconds"],
                "dispatch_bytes": median["dispatch_bytes"],
                "combine_bytes": median["combine_bytes"],
                "counted_bytes": counted,
                "interface_bytes": median["interface_bytes"],
                # The link is full in both directions while it sends half of the bytes in each.
                "seconds_of_link": median["interface_bytes"] / NODES * 8 / (rate_mbit * 1e6),
            }
        )
    for row in rows:
        row["speedup"] = rows[0]["seconds"] / row["seconds"]
        row["bytes_ratio"] = row["counted_bytes"] / rows[0]["counted_bytes"]
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print("                 dispatch  combine  counted  interfaces   share      time   link alone   times")
    print("                      MB       MB       MB          MB  of flat        ms           ms  faster")
    for r in rows:
        sizes = [r[k] / 1e6 for k in ("dispatch_bytes", "combine_bytes", "counted_bytes", "interface_bytes")]
        print(
            f"{r['exchange']:8} {r['wire']:4}"
            f"{sizes[0]:12.2f} {sizes[1]:8.2f} {sizes[2]:8.2f} {sizes[3]:11.2f} {r['bytes_ratio']:8.3f}"
            f"{r['seconds'] * 1e3:10.0f} {r['seconds_of_link'] * 1e3:12.0f} {r['speedup']:7.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rate-mbit", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/exchange.json"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    # An end by signal goes through the clean-up too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "load_average_before": os.getloadavg()[0],
    }
    sizes = {key: getattr(options, key) for key in ("rate_mbit", "hidden", "tokens", "rounds")}
    raw = options.out.with_suffix(".rounds.json")
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in sizes.items()]
    try:
        with two_nodes(options.rate_mbit) as names:
            start_ranks(names, [*arguments, f"--out={raw.resolve()}"])
        measured = json.loads(raw.read_text())
        rows = summary(measured, options.rate_mbit)
        result |= sizes | {"nodes": NODES, "ranks_per_node": RANKS_PER_NODE}
        result |= {"arms": rows, "every_round": measured}
        print_table(rows)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        reason = why(error)
        print(f"nothing measured: two namespaces and a limited link could not be made here ({reason})")
        result["not_measured"] = reason
    finally:
        raw.unlink(missing_ok=True)
    save(options.out, result)


if __name__ == "__main__":
    main()
