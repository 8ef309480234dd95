"""`micro_batch: auto`, `recompute: auto`: the fastest that fits, by dry run first and then by running.

Larger micro-batches make larger matrices and, sharded, fewer gathers; they also keep more for the backward
pass. From the largest downwards a dry run says which is the lightest recomputation that fits the memory; what
fits is then run for a few steps, in processes of its own, with random tokens. One that runs out of memory all
the same is noted and stepped back from. The fastest is taken.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from whalepod.dryrun.role import measure
from whalepod.parallel.checkpoint_files import steps_saved
from whalepod.parallel.mesh import local_device, open_mesh
from whalepod.parallel.parallelize import seeded
from whalepod.spec.counts import GIB
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.machine import main_memory
from whalepod.spec.model import ModelSpec
from whalepod.spec.run import RunConfig, load_run
from whalepod.train.counted import counted
from whalepod.train.start import start_workers, take_cores, worker_threads
from whalepod.train.step import TrainStep

POLICIES = ("none", "selective", "full")
WARM_STEPS, TIMED_STEPS = 2, 3
PROCESS_GIB = {"cpu": 0.7, "cuda": 1.5}
"""Of a process beside its tensors: Python, torch and its caches; on CUDA the context and NCCL's buffers."""
SLACK = 1.08  # of the allocator: blocks that no tensor fills
WORSE_IN_A_ROW = 2  # smaller micro-batches that were slower: those below will be too
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "exit code -9", "std::bad_alloc", "MemoryError")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tried:
    """A choice. dry_run_gib: tensors at a step's peak on the fullest rank, by the dry run; measured_gib: the
    same as counted in a real step. outcome: `fits`, `too large` (by the dry run or as counted), `out of
    memory`, or `not run`."""

    micro_batch: int
    recompute: str
    dry_run_gib: float
    measured_gib: float | None = None
    tokens_per_s: float | None = None
    outcome: str = "not run"


@dataclass(frozen=True)
class Choice:
    """What was tried within `memory_gib` of tensors, and the job with the fastest of it."""

    config: RunConfig
    memory_gib: float
    tried: tuple[Tried, ...]


def choose(config: RunConfig, *, progress: Progress | None = None, restart: bool = False) -> Choice:
    """Closes an open layout. A run that goes on keeps what it had.

    Under torchrun, where no other processes can be started, the dry run alone decides: the largest
    micro-batch that fits. Raises UserError where nothing fits, with how much is missing.
    """
    spec, budget = config.model_spec(), _budget_gib(config)
    if not restart and (before := _before(config)) is not None:
        return Choice(before, budget, ())
    tell = progress or (lambda stage, done, total: None)
    open_layouts = _micro_batches(config)
    tried: list[Tried] = []
    fitting: list[int] = []  # of tried
    for done, micro_batch in enumerate(open_layouts):
        tell("dry runs of micro-batches", done, len(open_layouts))
        for policy in _policies(config):
            candidate = Tried(micro_batch, policy, _dry_run_gib(config, spec, micro_batch, policy))
            fits = candidate.dry_run_gib <= budget
            tried.append(candidate if fits else replace(candidate, outcome="too large"))
            if fits:
                fitting.append(len(tried) - 1)
                break
    tell("dry runs of micro-batches", len(open_layouts), len(open_layouts))
    if not fitting:
        least = min(tried, key=lambda t: t.dry_run_gib)
        raise UserError(
            f"no micro-batch fits: the smallest, {least.micro_batch} with recompute {least.recompute}, needs "
            f"{least.dry_run_gib:.2f} GiB of tensors per device, {budget:.2f} are there; use more devices "
            "(layout.dp_shard), or set train.memory_gib"
        )
    if "RANK" in os.environ:
        best = tried[fitting[0]]
    else:
        _run_those(config, tried, fitting, budget, tell)
        ran = [t for t in tried if t.outcome == "fits"]
        if not ran:
            raise UserError(
                "no micro-batch ran within the memory, whatever the dry run said; use more devices"
            )
        best = max(ran, key=lambda t: t.tokens_per_s or 0.0)
    closed = config.with_layout(micro_batch=best.micro_batch, recompute=best.recompute)
    return Choice(closed, budget, tuple(tried))


def write_choice(choice: Choice) -> None:
    """micro_batch.json in the run's folder, once that is there: what was tried, and how it went."""
    if choice.tried and (Path(choice.config.out) / "run.yaml").is_file():
        tried = [asdict(t) for t in choice.tried]
        text = json.dumps({"memory_gib": choice.memory_gib, "tried": tried}, indent=1)
        (Path(choice.config.out) / "micro_batch.json").write_text(text)


# ------------------------------------------------------------------------------------------ what there is


def _before(config: RunConfig) -> RunConfig | None:
    """The choice of a run that this one goes on from."""
    folder = Path(config.out)
    if not steps_saved(folder / "checkpoints") or not (folder / "run.yaml").is_file():
        return None
    old = load_run(folder / "run.yaml").layout
    same = config.with_layout(micro_batch=old.micro_batch, recompute=old.recompute)
    return same if same.layout == old else None


def _policies(config: RunConfig) -> Sequence[str]:
    return POLICIES if config.layout.recompute == "auto" else (config.layout.recompute,)


def _micro_batches(config: RunConfig) -> list[int]:
    """Those to try, the largest first."""
    if config.layout.micro_batch != "auto":
        return [config.layout.micro_batch]
    one = config.with_layout(micro_batch=1, recompute="none").make_layout()
    return one.micro_batches[::-1]


def _budget_gib(config: RunConfig) -> float:
    """GiB of tensors that a device may hold. Under a launcher it is of what there is and not of what is free:
    every rank has to come to the same answer."""
    device, launched = local_device(config.device), "RANK" in os.environ
    if config.train.memory_gib is not None:
        total = config.train.memory_gib
    elif device.type == "cuda":
        free, there = torch.cuda.mem_get_info(device)
        total = (there if launched else free) / GIB
    else:
        workers = config.with_layout(micro_batch=1, recompute="none").make_layout().num_devices
        here = int(os.environ.get("LOCAL_WORLD_SIZE", workers))
        total = 0.9 * main_memory("MemTotal" if launched else "MemAvailable") / GIB / here
    return max(0.0, (total - PROCESS_GIB[device.type]) / SLACK)


# ----------------------------------------------------------------------------------- dry, then for real


def _dry_run_gib(config: RunConfig, spec: ModelSpec, micro_batch: int, policy: str) -> float:
    closed = config.with_layout(micro_batch=micro_batch, recompute=policy)
    layout = closed.make_layout()
    layout.check_model(spec, config.data.sequence_length)
    each = layout.num_devices // layout.pp
    on_gpu = local_device(config.device).type == "cuda"
    ends = sorted({0, layout.pp - 1})
    return max(measure(closed, spec, place * each, on_gpu=on_gpu).peak for place in ends) / GIB


def _run_those(
    config: RunConfig, tried: list[Tried], fitting: Sequence[int], budget: float, tell: Progress
) -> None:
    """Runs what fits by the dry run, the largest first, and writes the outcomes into `tried`."""
    sequences = max(tried[i].micro_batch for i in fitting)
    worse, best = 0, 0.0
    for done, index in enumerate(fitting):
        tell("running micro-batches", done, len(fitting))
        if worse >= WORSE_IN_A_ROW:
            break
        tried[index] = trial(config, tried[index], sequences, budget)
        speed = tried[index].tokens_per_s or 0.0
        if tried[index].outcome == "fits":
            worse, best = (worse + 1 if speed < best else 0), max(best, speed)
    tell("running micro-batches", len(fitting), len(fitting))


def trial(config: RunConfig, candidate: Tried, sequences: int, budget: float) -> Tried:
    """`candidate` with what a few real steps in other processes brought."""
    closed = config.with_layout(micro_batch=candidate.micro_batch, recompute=candidate.recompute)
    layout: Layout = closed.make_layout()
    if layout.pp == 1:  # as many sequences whatever the micro-batch; a pipeline's bubble needs all of them
        closed = closed.with_layout(global_batch=sequences * layout.num_replicas)
    threads = worker_threads(closed)
    try:
        results = start_workers(layout.num_devices, threads, _timed, closed.model_dump_json())
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        return replace(candidate, outcome="out of memory")
    peak = max(result[1] for result in results) / GIB
    return replace(
        candidate,
        measured_gib=peak,
        tokens_per_s=min(result[0] for result in results),
        outcome="fits" if peak <= budget else "too large",
    )


@record
def _timed(config_json: str, threads: int | None) -> tuple[float, int]:
    """One rank: tokens/s of all, and the bytes of this one's tensors at a step's peak."""
    take_cores(threads)
    config = RunConfig.model_validate_json(config_json)
    spec, layout = config.model_spec(), config.make_layout()
    device = local_device(config.device)
    if config.train.memory_gib is not None:
        _hold_to(config.train.memory_gib, device)
    with open_mesh(layout, device) as mesh:
        work = TrainStep(config, spec, mesh, seeded(spec, 0))
        length = config.data.sequence_length + 1 + spec.num_nextn_predict_layers
        generator = torch.Generator().manual_seed(mesh["dp"].rank)
        shape = layout.global_batch // layout.num_replicas, length
        rows = torch.randint(0, spec.vocab_size, shape, generator=generator).to(device)

        def step() -> None:
            _, norm = work.step(rows, 1e-6)
            work.balance(norm)

        seconds = []
        for index in range(WARM_STEPS + TIMED_STEPS):
            mesh.world.barrier()
            start = time.perf_counter()
            step()
            if index >= WARM_STEPS:
                seconds.append(time.perf_counter() - start)
        _, peak = counted(work, step)
    tokens = layout.global_batch * config.data.sequence_length
    return tokens / statistics.median(seconds), peak


def _hold_to(memory_gib: float, device: torch.device) -> None:
    """Makes more than that an error, here and now, where it would otherwise be the machine's end."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gib * GIB / total), device)
    elif (pages := Path("/proc/self/statm")).exists():
        # Addresses that this process has already are mostly no memory; threads will take more of them.
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        limit = now + int((1.25 * memory_gib + 1) * GIB)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def choice_rows(choice: Choice) -> list[dict[str, Any]]:
    """`Tried` for a table, the chosen one marked."""
    layout = choice.config.layout
    chosen = layout.micro_batch, layout.recompute
    return [asdict(t) | {"chosen": (t.micro_batch, t.recompute) == chosen} for t in choice.tried]
