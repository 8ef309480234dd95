"""One worker under a workload: its decode step by batch, the time of a prompt, the room for cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from whalepod.planner.serve_kernels import Array
from whalepod.planner.serve_layout import Worker
from whalepod.planner.serve_memory import ServeMemory, serve_memory
from whalepod.planner.serve_software import Engine
from whalepod.planner.serve_step import DEFAULT_TRAFFIC, Step, Traffic
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster
from whalepod.spec.model import ModelSpec

_GRID = np.concatenate([[1.0], 2.0 ** (np.arange(1, 57) / 4.0)])
"""Batches per attention rank at which a decode step is timed, 1 to 16,384; others are interpolated."""


@dataclass(frozen=True)
class Workload:
    """Requests of `isl` prompt and `osl` output tokens.

    shortest: lengths are uniform between this share of them and all (1: all alike). requests_per_slot: how
    many requests each slot of the concurrency serves in a run, the first of which all arrive at once;
    infinite for a service that never restarts. drafts, acceptance: speculated tokens per step, and the
    chance that each is accepted after its predecessors.
    """

    isl: int
    osl: int
    shortest: float = 1.0
    requests_per_slot: float = np.inf
    drafts: int = 0
    acceptance: float = 0.8

    def __post_init__(self) -> None:
        if not (1 <= self.isl <= 10**7 and 1 <= self.osl <= 10**7):
            raise UserError(f"prompt and output lengths must be 1 to 10^7, not {self.isl} and {self.osl}")
        if not 0.0 < self.shortest <= 1.0:
            raise UserError(f"shortest must be above 0 and at most 1, not {self.shortest}")
        if self.drafts < 0 or self.drafts > 16 or not 0.0 <= self.acceptance <= 1.0:
            raise UserError("drafts must be 0 to 16 and acceptance 0 to 1")

    def check(self, spec: ModelSpec) -> None:
        """Raises UserError where the model's positions do not suffice."""
        if self.isl + self.osl > spec.max_position_embeddings:
            raise UserError(
                f"prompts of {self.isl} and {self.osl} output tokens exceed the "
                f"{spec.max_position_embeddings} positions of {spec.name}"
            )

    @property
    def mean_share(self) -> float:
        return (1.0 + self.shortest) / 2.0

    @property
    def prompt(self) -> float:
        return max(1.0, self.isl * self.mean_share)

    @property
    def output(self) -> float:
        return max(1.0, self.osl * self.mean_share)

    @property
    def context(self) -> float:
        """Mean context while decoding."""
        return self.prompt + self.output / 2.0

    @property
    def tokens_per_step(self) -> float:
        return tokens_per_step(self.drafts, self.acceptance)


def tokens_per_step(drafts: int, acceptance: float) -> float:
    """Tokens that one verified step yields: 1 + a + a^2 + ... + a^drafts."""
    return sum(acceptance**i for i in range(drafts + 1))


@dataclass(frozen=True)
class WorkerModel:
    """One worker under a workload: its decode step by batch, its prompt time, its cache.

    least_requests: running requests that are known to fit, whatever the memory model says.
    """

    spec: ModelSpec
    cluster: Cluster
    worker: Worker
    software: Engine
    precision: str
    work: Workload
    traffic: Traffic = DEFAULT_TRAFFIC
    least_requests: float = 0.0

    @cached_property
    def step(self) -> Step:
        return Step(self.spec, self.worker, self.cluster, self.software, self.precision, self.traffic)

    @cached_property
    def memory(self) -> ServeMemory:
        return self._memory(0.0)

    def _memory(self, tokens: float) -> ServeMemory:
        return serve_memory(
            self.spec,
            self.worker,
            self.cluster.gpu.memory_gib,
            self.precision,
            self.software.cache,
            self.software.chunk_tokens,
            tokens,
            self.work.drafts > 0,
            self.software.framework_bytes,
        )

    def memory_at(self, batch: float) -> ServeMemory:
        return self._memory(batch * self.work.context)

    @cached_property
    def most_requests(self) -> float:
        """Requests whose cache fits at a mean length half way through their output."""
        return max(self.memory.kv_capacity_tokens / self.work.context, self.least_requests)

    @cached_property
    def decode_grid(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Batches of the worker, seconds per step, and the step's parts at each."""
        batch = _GRID * self.worker.dp * self.worker.pp
        batch = np.concatenate([[1.0], batch]) if batch[0] > 1 else batch
        parts = self.step.decode(batch, self.work.context, self.work.drafts)
        parts = {k: np.broadcast_to(v, batch.shape) for k, v in parts.items()}
        return batch, sum(parts.values()), parts  # type: ignore[return-value]

    def decode_s(self, batch: Array) -> Array:
        """Seconds per output token of running requests when nothing else runs on the worker."""
        grid, step, _ = self.decode_grid
        # Uneven requests over the attention ranks: the fullest sets the pace.
        spread = 1.0 + (0.5 * (self.worker.dp - 1) / np.maximum(batch, 1.0) if self.worker.dp > 1 else 0.0)
        return (
            np.interp(np.minimum(batch * np.minimum(spread, 2.0), grid[-1]), grid, step)
            / self.work.tokens_per_step
        )

    def decode_parts(self, batch: float) -> dict[str, float]:
        grid, _, parts = self.decode_grid
        return {k: float(np.interp(batch, grid, v)) for k, v in parts.items()}

    def _prompt(self, active: float, full: bool) -> dict[str, float]:
        """Parts of one prompt's prefill; `full`: its share of passes filled to the chunk's size."""
        prompt, chunk = self.work.prompt, float(self.software.chunk_tokens)
        tokens = chunk if full else min(prompt, chunk)
        parts = self.step.prefill(np.array([tokens]), np.array([prompt]), active)
        passes = prompt / tokens
        return {k: float(np.asarray(v).ravel()[0]) * passes for k, v in parts.items()}

    @cached_property
    def prompt_parts(self) -> dict[str, float]:
        """Parts of a prompt that is prefilled alone."""
        return self._prompt(1.0 / self.worker.dp, full=False)

    @cached_property
    def prompt_alone_s(self) -> float:
        """Seconds of the worker for a prompt when nothing else runs."""
        return sum(self.prompt_parts.values())

    @cached_property
    def prompt_busy_s(self) -> float:
        """Seconds of the worker per prompt when all attention ranks have full passes to do."""
        stages = self.worker.pp if self.software.pipelined else 1
        return sum(self._prompt(1.0, full=True).values()) / self.worker.dp / stages


def need_memory(model: WorkerModel) -> None:
    """Raises UserError saying what is missing, where a worker holds not even one request."""
    memory, gib = model.memory, 2**30
    if memory.short:
        raise UserError(
            f"weights and buffers need {memory.fixed / gib:.1f} GiB per GPU, "
            f"{memory.short / gib:.1f} GiB more than {model.cluster.gpu.name} has; spread over more GPUs"
        )
    if model.most_requests < 1:
        need = model.work.context * memory.cache_bytes_per_token
        raise UserError(
            f"the cache of one request needs {need / gib:.1f} GiB, "
            f"{(memory.total - memory.fixed) / gib:.1f} GiB are left beside the weights"
        )
