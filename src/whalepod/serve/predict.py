"""What the planner expects of the engine on the very machine that it runs on: the engine's own scheduler, on
requests that do not exist, each step as long as the planner says.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from whalepod.parallel.here import here, with_threads
from whalepod.parallel.mesh import local_device
from whalepod.planner.serve_layout import deployment
from whalepod.planner.serve_measured import around, served
from whalepod.planner.serve_pass import pass_parts
from whalepod.planner.serve_software import OWN_ENGINE, load_software
from whalepod.planner.serve_step import Step
from whalepod.serve.core import PAGE_SIZE, Core, CoreConfig, Job
from whalepod.serve.fleet import no_grammar
from whalepod.serve.generate import usual_dtype
from whalepod.serve.paged import FEW
from whalepod.serve.picked import Next, Picked
from whalepod.serve.request import Request
from whalepod.serve.scheduler import Run
from whalepod.serve.start import EngineConfig
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster, Gpu
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec, read_config

MAX_STEPS = 20_000
"""That are played: milliseconds for a thousand of them."""


@dataclass(frozen=True)
class Expected:
    """Of a load. output_tokens_per_s: over all of it; ttft_s, tpot_s: medians, None of answers of one token;
    parts: seconds by part of all steps; notes: of the kernels that they are timed by."""

    hardware: str
    seconds: float
    output_tokens_per_s: float
    ttft_s: float
    tpot_s: float | None
    parts: dict[str, float]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values with their units in the names, for JSON."""
        return {
            "hardware": self.hardware,
            "output_tokens_per_s": self.output_tokens_per_s,
            "ttft_ms": self.ttft_s * 1e3,
            "tpot_ms": self.tpot_s and self.tpot_s * 1e3,
            "limited_by": self.limited_by,
            "notes": list(self.notes),
        }

    @property
    def limited_by(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


def predict(
    config: EngineConfig,
    spec: ModelSpec,
    requests: Sequence[tuple[int, int]],
    concurrency: int,
    gpu: Gpu | None = None,
) -> Expected:
    """Of requests of (prompt, new) tokens, so many in flight. gpu None: this machine's.

    Raises UserError where the planner cannot tell: no profile, another precision than it was measured in, a
    layout that it does not know, more ranks than cores.
    """
    device = local_device(config.device)
    gpu = here(device) if gpu is None else gpu
    if gpu is None:
        raise UserError("no profile describes this machine's accelerator: `whalepod calibrate` writes one")
    if config.speculate:
        raise UserError("how many drafts come true is not known beforehand")
    layout, on_cpu = config.layout, gpu.architecture == "cpu"
    dtype = usual_dtype(spec, device.type) if config.dtype == "auto" else config.dtype
    if dtype == "fp32" and not on_cpu:
        raise UserError("the planner does not know serving in FP32 on GPUs")
    if on_cpu:
        served(gpu)
        threads = _threads(config)
        if threads * layout.num_devices > gpu.gpus_per_node:
            raise UserError(
                f"{layout.num_devices} workers of {threads} threads share {gpu.gpus_per_node} cores: how "
                "they get in each other's way is not known"
            )
        gpu = with_threads(gpu, threads)
    software = load_software(OWN_ENGINE, gpu, dtype)
    cluster = Cluster(gpu, layout.num_devices, min(gpu.gpus_per_node, layout.num_devices))
    worker = deployment(layout).decode
    return _Play(Step(spec, worker, cluster, software, dtype), config, layout).of(requests, concurrency)


def predict_written(config: EngineConfig, lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Beside what `generate` measured of prompts and answers so long, all asked for at once, in JSON's terms:
    `decode_tokens_per_s` of one alone, `output_tokens_per_s` over all; where the planner cannot tell,
    `not_predicted` says why."""
    try:
        spec = read_config(Path(config.path))
        found = predict(config, spec, [(p, max(n, 1)) for p, n in lengths], len(lengths))
    except UserError as error:
        return {"not_predicted": str(error)}
    alone = 1 / found.tpot_s if found.tpot_s and len(lengths) == 1 else None
    return found.as_dict() | {"decode_tokens_per_s": alone}


def predicted_line(predicted: dict[str, Any], measured: float) -> str:
    """Predicted beside measured tokens/s and time per token."""
    if "not_predicted" in predicted:
        return f"no prediction: {predicted['not_predicted']}"
    rate = predicted["decode_tokens_per_s"] or predicted["output_tokens_per_s"]
    each = "" if predicted["tpot_ms"] is None else f", {predicted['tpot_ms']:,.3g} ms a token"
    return f"predicted {rate:,.1f} new tokens/s{each}; measured {measured:,.1f}, {measured / rate:.2f} of it"


def _threads(config: EngineConfig) -> int:
    if config.threads_per_worker is not None:
        return config.threads_per_worker
    if config.layout.num_devices == 1:
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) // config.layout.num_devices)


class _Play:
    def __init__(self, step: Step, config: EngineConfig, layout: Layout) -> None:
        self._step, self._config, self._layout = step, config, layout
        self._seconds = cache(self._timed)
        # Replicas that share no experts take every step together all the same.
        software, worker = step.software, step.worker
        alone = worker.dp == 1 and layout.num_replicas > 1
        self._agree = around(served(step.cluster.gpu)[1].steps).ep[0] if alone and software.measured else 0.0

    def _timed(
        self, writing: int, pages: int, chunks: tuple[tuple[int, int], ...], heads: int, total: int
    ) -> tuple[float, dict[str, float]]:
        parts = pass_parts(self._step, writing, pages * PAGE_SIZE, chunks, heads, total)
        parts["host"] += self._agree
        return sum(parts.values()), parts

    def of(self, requests: Sequence[tuple[int, int]], concurrency: int) -> Expected:
        config, spec = self._config, self._step.spec
        longest = max(prompt + new for prompt, new in requests)
        pages = (-(-longest // PAGE_SIZE) + 1) * config.max_running
        core_config = CoreConfig(pages, config.max_running, config.max_step_tokens)
        cores = [Core(spec, core_config) for _ in range(self._layout.num_replicas)]
        waiting, clock, parts = iter(enumerate(requests)), 0.0, Counter[str]()
        began: dict[int, float] = {}
        first: dict[int, float] = {}
        ends: list[tuple[float, int]] = []
        numbers: dict[int, int] = {}
        jobs: list[Job] = []  # kept, or their ids would come again

        def ask() -> None:
            for number, (prompt, new) in waiting:
                core = min(cores, key=lambda each: each.load)
                # Prompts that share no page, as far as a first token can tell.
                tokens = (number % spec.vocab_size, number // spec.vocab_size, *[0] * prompt)[:prompt]
                job = core.admit(Request(tokens, new), frozenset())
                core.begin(job, no_grammar)
                jobs.append(job)
                began[number], numbers[id(job)] = clock, number
                return

        for _ in range(concurrency):
            ask()
        for _ in range(MAX_STEPS):
            plans = [core.schedule() for core in cores]
            if not any(runs for runs, _ in plans):
                break
            seconds, spent = self._slowest([runs for runs, _ in plans])
            clock += seconds
            parts.update(spent)
            for core, (runs, found) in zip(cores, plans, strict=True):
                following = [Next([Picked(0)] * run.writes, ()) for run in runs]
                for job in core.apply(runs, found, following):
                    number = numbers[id(job)]
                    first.setdefault(number, clock)
                    if job.reason is not None:
                        ends.append((clock, number))
                        ask()
        made = sum(job.sequence.num_new for job in jobs)
        later = [
            (end - first[number]) / (requests[number][1] - 1)
            for end, number in ends
            if requests[number][1] > 1
        ]
        return Expected(
            hardware=self._step.cluster.gpu.title,
            seconds=clock,
            output_tokens_per_s=made / clock,
            ttft_s=statistics.median(first[number] - began[number] for number in first),
            tpot_s=statistics.median(later) if later else None,
            parts=dict(parts),
            notes=self._step.software.notes,
        )

    def _slowest(self, plans: Sequence[Sequence[Run]]) -> tuple[float, dict[str, float]]:
        """Replicas take every step together."""
        total = sum(max(1, sum(run.count for run in runs)) for runs in plans)
        found = []
        for runs in plans:
            few = [run for run in runs if run.count <= FEW]
            pages = max((-(-run.end // PAGE_SIZE) for run in few), default=1)
            chunks = tuple((run.start, run.count) for run in runs if run.count > FEW)
            heads = sum(run.writes for run in runs)
            together = total if self._step.worker.dp > 1 else sum(run.count for run in runs)
            found.append(self._seconds(len(few), pages, chunks, heads, together))
        return max(found, key=lambda pair: pair[0])
