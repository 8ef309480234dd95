"""Memory pooled for real: a model that one worker cannot hold trains and generates over several.

    python bench/pooled_memory.py [--limit-gib 2] [--steps 3] [--out results/pooled_memory.json]

A training state is four numbers a parameter: the weight, its gradient and Adam's two moments, 16 bytes in
float32. Every layout shares them out in its own way, and each needs something besides: activations, what it
gathers or repeats. Here a V3-like model, nearly all of it experts, trains a few steps on one batch and
continues a prompt, on 1, 2, 4 and 8 processes that share this machine's memory:

    fsdp  dp_shard N, ZeRO 3          tp  every matrix cut in N
    pp    N stages of 1F1B            ep  experts to N workers, the rest by FSDP

One worker alone, and the four of each layout, get the same limit on what they may allocate (RLIMIT_AS, on top
of what a worker is once a tiny model of the same form has trained in it: libraries, threads, staging areas).
Peaks are resident memory (VmHWM) above that same point, of the worker that has most; Linux only. Blocks are
recomputed, as one does when memory is short; float32, so that losses and tokens of all arms can be compared.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "dist"))
from harness import run_ranks  # pyright: ignore[reportMissingImports]
from record import save

from whalepod.models.transformer import Transformer
from whalepod.parallel import shm
from whalepod.parallel.mesh import Mesh, open_mesh
from whalepod.parallel.parallelize import Parallel, parallelize, seeded
from whalepod.parallel.predict import greedy
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec
from whalepod.spec.presets import load_model_spec

GIB = 2**30
STATE_BYTES_PER_PARAM = 16
LENGTH, BATCH, PROMPT, NEW_TOKENS, SEED = 32, 8, 8, 5, 1
LEARNING_RATE = 1e-3
# Small freed pieces go back to the system: glibc would keep them, and a peak would be the allocator's.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "2"}
ARMS = {"fsdp": ("dp_shard",), "tp": ("tp",), "pp": ("pp",), "ep": ("dp_shard", "ep")}
EXPLANATION = """\
What keeps a row from the ideal. All: one block's activations, and its gradients before they join
their sums.
fsdp: the block at work and the next are gathered whole, their gradients too before they are scattered.
tp: routers, norms and MLA's down-projections are on every worker.
pp: layers are whole numbers, and the first dense one is light; embedding and head are at the ends.
ep: as fsdp for what is not an expert; experts are never gathered."""


@dataclass(frozen=True)
class Job:
    """What every arm does. limit_bytes: what a worker may allocate on top of what it is, None: anything."""

    spec: ModelSpec
    steps: int
    limit_bytes: int | None = None


def model(layers: int = 24, experts: int = 24, hidden: int = 512, width: int = 256) -> ModelSpec:
    return load_model_spec("v3-mini").with_(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=8,
        intermediate_size=2 * hidden,
        moe_intermediate_size=width,
        n_routed_experts=experts,
        n_group=4,
        topk_group=2,
        vocab_size=2048,
        num_nextn_predict_layers=0,
        initializer_range=0.06,  # wide enough for a young model to have something to say
    )


def layout_of(axes: dict[str, Any]) -> Layout:
    # Pipelines need several micro-batches; the others take the batch at once.
    size = 1 if "pp" in axes else BATCH // axes.get("dp_shard", 1)
    return Layout(**axes, micro_batch=size, global_batch=BATCH, precision="fp32", recompute="full")


# ------------------------------------------------------------------------------------------ one rank


def status(key: str) -> int:
    """A line of this process's status, in bytes: VmRSS, VmHWM (the largest VmRSS), VmSize."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1]) * 1024


class Peaks:
    """The largest resident memory of each phase, above where it started."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}
        self._base = status("VmRSS")
        self._restart()

    def end(self, phase: str) -> None:
        self.of[phase] = (status("VmHWM") - self._base) / GIB
        self._restart()

    @staticmethod
    def _restart() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS


def train(job: Job, parallel: Parallel, optimizer: torch.optim.Optimizer) -> list[float]:
    """The loss before each step; every step sees the same batch, of sequences that count upwards."""
    mesh, losses = parallel.mesh, []
    rows = torch.arange(BATCH).unsqueeze(1) * 97 + torch.arange(LENGTH + 1) * 3
    mine = (rows % job.spec.vocab_size).chunk(mesh["dp"].size)[mesh["dp"].rank]
    for _ in range(job.steps):
        losses.append(float(parallel.total(parallel.backward(mine, BATCH * LENGTH, 0.0))[0]))
        parallel.clip(1.0)
        optimizer.step()
        parallel.state.write_back()
    return losses


def live(job: Job, mesh: Mesh, peaks: Peaks | None = None) -> dict[str, Any]:
    """Builds, trains, generates; with what this worker held in each phase."""

    def ended(phase: str) -> None:
        if peaks is not None:
            peaks.end(phase)

    with torch.device("meta"):
        whole = Transformer(job.spec)
    parallel = parallelize(whole, mesh, LENGTH, seeded(whole.spec, SEED))
    parallel.train()
    ended("build")
    weights = [*parallel.state.decayed, *parallel.state.plain]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, eps=1e-5, fused=True)
    losses = train(job, parallel, optimizer)
    state = parallel.held_bytes(optimizer)
    ended("train")
    prompt = [(97 + 3 * i) % job.spec.vocab_size for i in range(PROMPT)]
    ids = greedy(parallel, prompt, NEW_TOKENS)
    ended("generate")
    return {"losses": losses, "ids": ids, "state_gib": state / GIB}


def run_rank(job: Job, axes: dict[str, Any]) -> dict[str, Any]:
    """One worker's life. Alone and out of memory it returns the `error`; with others it raises it."""
    with open_mesh(layout_of(axes), torch.device("cpu")) as mesh:
        live(Job(model(8, experts=8, hidden=64, width=64), 1), mesh)
        gc.collect()
        if job.limit_bytes is not None:
            limit = status("VmSize") + job.limit_bytes
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        peaks = Peaks()
        try:
            result = live(job, mesh, peaks)
        except RuntimeError as error:
            if mesh.world.size > 1 or "can't allocate memory" not in str(error):
                raise
            return {"error": str(error).splitlines()[0]}
        mesh.world.barrier()
        return result | {"peak_gib": peaks.of}


# ------------------------------------------------------------------------------------------- all arms


def run_arm(job: Job, axes: dict[str, Any], num_workers: int) -> dict[str, Any]:
    """One row: of memory, the worker that has most. Raises if workers disagree about the result."""
    os.environ |= MALLOC  # read when a process starts
    start = time.perf_counter()
    ranks = run_ranks(run_rank, num_workers, job, axes, timeout_s=1200)
    if "error" in ranks[0]:
        return ranks[0]
    assert all(r["ids"] == ranks[0]["ids"] and r["losses"] == ranks[0]["losses"] for r in ranks), ranks
    phases = {phase: max(r["peak_gib"][phase] for r in ranks) for phase in ranks[0]["peak_gib"]}
    return {
        "num_workers": num_workers,
        "state_gib": max(r["state_gib"] for r in ranks),
        "peak_gib": max(phases.values()),
        "peak_by_phase_gib": phases,
        "losses": ranks[0]["losses"],
        "ids": ranks[0]["ids"],
        "seconds": time.perf_counter() - start,
    }


def num_parameters(spec: ModelSpec) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(spec).parameters())


def print_table(rows: list[dict[str, Any]]) -> None:
    one = rows[0]
    print("                  state GiB a worker     peak GiB a worker     peak while it")
    print("layout  workers    ideal     is              ideal     is      builds  trains  generates   losses")
    for row in rows:
        count, phases = row["num_workers"], row["peak_by_phase_gib"]
        print(
            f"{row['layout']:6}{count:9}"
            f"{one['state_gib'] / count:9.2f}{row['state_gib']:7.2f}{row['state_ratio']:7.2f}x"
            f"{one['peak_gib'] / count:10.2f}{row['peak_gib']:7.2f}{row['peak_ratio']:7.2f}x"
            f"{phases['build']:7.2f}{phases['train']:8.2f}{phases['generate']:11.2f}   "
            + " ".join(f"{loss:.5f}" for loss in row["losses"])
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--limit-gib", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--layouts", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("results/pooled_memory.json"))
    options = parser.parse_args()
    shm.register()  # compiles, if need be, before workers wait for it
    spec = model()
    parameters = num_parameters(spec)
    state_gib = parameters * STATE_BYTES_PER_PARAM / GIB
    limit = int(options.limit_gib * GIB)

    failed = run_arm(Job(spec, options.steps, limit), {}, 1)
    assert "error" in failed, "one worker was to run out of memory: lower --limit-gib"
    print(
        f"{parameters / 1e6:.0f} M parameters. One worker needs {state_gib:.2f} GiB of training state and is "
        f"limited to {options.limit_gib:.2f} GiB: out of memory ({failed['error']})\n",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    arms = [("one", {}, 1)]
    arms += [(name, dict.fromkeys(ARMS[name], n), n) for name in options.layouts for n in options.workers]
    for name, axes, count in arms:
        limited = count == 4
        row = run_arm(Job(spec, options.steps, limit if limited else None), axes, count)
        rows.append({"layout": name, "axes": axes, "limited": limited, **row})
        one = rows[0]
        rows[-1] |= {f"{k}_ratio": row[f"{k}_gib"] * count / one[f"{k}_gib"] for k in ("state", "peak")}
        print(
            f"{name} x {count}: {row['peak_gib']:.2f} GiB, {row['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    print_table(rows)
    spread = max(abs(a - b) / b for r in rows for a, b in zip(r["losses"], rows[0]["losses"], strict=True))
    same = [r for r in rows if r["ids"] == rows[0]["ids"]]
    print(
        f"\nThe rows of four workers ran within the {options.limit_gib:.2f} GiB that one worker failed in. "
        f"Losses agree to {spread:.1e}. "
        f"{len(same)} of {len(rows)} arms continue the prompt with {rows[0]['ids']}.\n\n{EXPLANATION}"
    )
    result = {
        "precision": "fp32",
        "parameters": parameters,
        "state_gib": state_gib,
        "limit_gib": options.limit_gib,
        "sequence_length": LENGTH,
        "global_batch": BATCH,
        "one_worker_limited": failed["error"],
        "largest_loss_difference": spread,
        "arms_with_equal_tokens": len(same),
        "arms": rows,
    }
    save(options.out, result)


if __name__ == "__main__":
    main()
