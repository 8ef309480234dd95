"""Serving at a steady state: time to first token, time per output token and throughput at a concurrency.

`concurrency` requests are always in flight (a closed loop), so Little's law ties everything together:
concurrency = requests per second x (TTFT + (output - 1) x TPOT). In an aggregated worker prompts and running
requests share the GPUs: during the life of a request every other slot is refilled once, and the running ones
wait for those prefills. Disaggregated, the decode batch follows from what the prefill workers deliver.
With one output token there is no TPOT; what stands for it is the time of a decode step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from whalepod.planner.serve_layout import ServeLayout
from whalepod.planner.serve_memory import ServeMemory
from whalepod.planner.serve_software import Engine
from whalepod.planner.serve_step import DEFAULT_TRAFFIC, Traffic
from whalepod.planner.serve_worker import WorkerModel, Workload, need_memory
from whalepod.spec.counts import GIB
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster
from whalepod.spec.model import ModelSpec

_QUEUE = 2.0
"""Prompts that wait at a prefill pool in use to a share u: this x u^2 / (1 - u). Even work and random
arrivals give 0.5, random work 1; prompts come in waves. Errors over all published runs are flat from 1 to 4.
"""


@dataclass(frozen=True)
class ServeEstimate:
    """A deployment at one concurrency. `decode_parts` and `prefill_parts`: seconds of one step and of one
    prompt alone by kind. batch: running requests per decode worker. concurrency: what was asked for;
    `admitted` of them hold cache, the others queue."""

    layout: ServeLayout
    concurrency: float
    admitted: float
    ttft_s: float
    tpot_s: float
    output_tokens_per_s: float
    output_tokens_per_s_per_gpu: float
    total_tokens_per_s_per_gpu: float
    requests_per_s: float
    batch: float
    memory: ServeMemory
    kv_capacity_tokens: int
    limited_by: str
    decode_parts: Mapping[str, float] = field(hash=False)
    prefill_parts: Mapping[str, float] = field(hash=False)
    prefill_memory: ServeMemory | None = None
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_s_per_user(self) -> float:
        return 1.0 / self.tpot_s

    def as_dict(self) -> dict[str, Any]:
        """Plain values with their units in the names, for JSON. Memory is of a decode worker's GPU."""
        memory = self.memory.by_category()
        found = {
            "layout": self.layout.as_dict(),
            "num_gpus": self.layout.num_gpus,
            "concurrency": self.concurrency,
            "admitted": self.admitted,
            "batch": self.batch,
            "ttft_ms": 1e3 * self.ttft_s,
            "tpot_ms": 1e3 * self.tpot_s,
            "tokens_per_s": self.output_tokens_per_s,
            "tokens_per_s_per_gpu": self.output_tokens_per_s_per_gpu,
            "total_tokens_per_s_per_gpu": self.total_tokens_per_s_per_gpu,
            "tokens_per_s_per_user": self.tokens_per_s_per_user,
            "requests_per_s": self.requests_per_s,
            "kv_capacity_tokens": self.kv_capacity_tokens,
            "memory_gib": sum(memory.values()) / GIB,
            "memory_by_category_gib": {name: size / GIB for name, size in memory.items()},
            "limited_by": self.limited_by,
            "decode_step_ms": {name: 1e3 * time for name, time in self.decode_parts.items()},
            "prefill_ms": {name: 1e3 * time for name, time in self.prefill_parts.items()},
            "notes": list(self.notes),
        }
        if self.prefill_memory is not None:
            prefill = self.prefill_memory.by_category()
            found["prefill_memory_by_category_gib"] = {name: size / GIB for name, size in prefill.items()}
        return found


def estimate(
    spec: ModelSpec,
    cluster: Cluster,
    layout: ServeLayout,
    work: Workload,
    concurrency: float,
    precision: str,
    software: Engine,
    traffic: Traffic = DEFAULT_TRAFFIC,
) -> ServeEstimate:
    """What `layout` does at `concurrency`. Raises UserError where it does not divide or not fit."""
    work.check(spec)
    layout.check(spec, cluster, precision)
    decode = WorkerModel(spec, cluster, layout.decode, software, precision, work, traffic)
    prefill = None
    if layout.prefill is not None:
        prefill = WorkerModel(spec, cluster, layout.prefill, software, precision, work, traffic)
    for model in (prefill, decode):
        if model is not None:
            try:
                need_memory(model)
            except UserError as error:
                raise UserError(f"{model.worker}: {error}") from None
    if concurrency < 1 or not np.isfinite(concurrency):
        raise UserError(f"concurrency must be at least 1, not {concurrency}")
    numbers = steady(layout, decode, prefill, np.array([float(concurrency)]))
    return build(layout, decode, prefill, numbers, 0)


def steady(
    layout: ServeLayout, decode: WorkerModel, prefill: WorkerModel | None, concurrency: np.ndarray
) -> dict[str, np.ndarray]:
    """ttft_s, tpot_s, requests_per_s, batch (per worker), admitted and prefill_use at each concurrency."""
    if prefill is None:
        return _aggregated(decode, concurrency / layout.num_decode, layout.num_decode)
    return _disaggregated(layout, decode, prefill, concurrency)


def _aggregated(model: WorkerModel, concurrency: np.ndarray, workers: int) -> dict[str, np.ndarray]:
    work, software = model.work, model.software
    admitted = np.minimum(concurrency, model.most_requests)
    per_rank = admitted / model.worker.dp
    # Few requests: prompts come alone, and all attention ranks wait. Many: ranks prefill together.
    alone, busy = model.prompt_alone_s, min(model.prompt_busy_s, model.prompt_alone_s)
    together = np.clip(np.log2(np.maximum(per_rank, 1.0)) / 5.0, 0.0, 1.0)
    prompt = alone ** (1.0 - together) * busy**together
    step = model.decode_s(admitted)
    others = np.maximum(admitted - 1.0, 0.0)
    # While a request writes its output every other slot is refilled once. One token comes of the prefill:
    # then nothing is decoded, and the TPOT is only what a step would take.
    decodes = work.osl > 1
    tpot = step + (others * prompt / work.output if decodes else 0.0)
    outputs = (work.osl - 1) * tpot
    step = step * decodes
    use = np.minimum(admitted * prompt / (work.output * tpot + alone), 0.95)
    wait = 0.5 * step + np.minimum(0.5 * use / (1.0 - use), others) * prompt
    ttft = alone + wait + 1e-6 * software.prefill_us
    # No more requests come out than prompts go in.
    ttft = np.maximum(ttft, admitted * prompt - outputs)
    # The first requests of all slots arrive at once.
    first = 1.0 / work.requests_per_slot
    cold = np.where(admitted * work.prompt > software.cold_start_tokens, software.cold_start_s, 0.0)
    if model.worker.dp > 1:
        ttft = ttft + software.balance_steps * step
    burst = 0.5 * admitted * (busy + 1e-6 * software.burst_us / model.worker.dp)
    ttft = ttft + first * (burst + cold + software.warm_up_s * np.log2(np.maximum(admitted, 1.0)))
    # Who holds no cache waits for a slot: Little's law again.
    rate = admitted / (ttft + outputs)
    ttft = concurrency / rate - outputs
    return {
        "ttft_s": ttft,
        "tpot_s": tpot,
        "requests_per_s": rate * workers,
        "batch": admitted,
        "admitted": admitted * workers,
        "prefill_use": rate * prompt,
    }


def _disaggregated(
    layout: ServeLayout, decode: WorkerModel, prefill: WorkerModel, concurrency: np.ndarray
) -> dict[str, np.ndarray]:
    work, software = decode.work, decode.software
    most = decode.most_requests * layout.num_decode
    # A prompt's cache goes over the rack's fast link, or over the network, where the sender may limit.
    size = prefill.memory.cache_bytes_per_token * work.prompt
    link = decode.cluster.gpu.scale_up
    if link is not None and link.size >= layout.num_gpus and link.size > decode.cluster.gpu.gpus_per_node:
        send, hand_over = size / (1e9 * link.gb_s), 0.0
    else:
        send, hand_over = size / (1e9 * software.transfer_gb_s), 1e-6 * software.transfer_us
    prompt = min(prefill.prompt_busy_s, prefill.prompt_alone_s)
    capacity = layout.num_prefill / np.maximum(prompt, send)
    own = prefill.prompt_alone_s + 1e-6 * software.prefill_us + send + hand_over
    others = np.maximum(concurrency - 1.0, 0.0)

    def per_token(batch: np.ndarray) -> np.ndarray:
        return decode.decode_s(np.maximum(batch / layout.num_decode, 1.0))

    # The decode batch (of all workers) at which all requests are somewhere: decoding, in their own prefill,
    # or waiting for it as in any queue, the longer the closer the pool is to what it can do.
    low, high = np.full_like(concurrency, 1e-6), np.minimum(concurrency, most)
    for _ in range(40):
        batch = 0.5 * (low + high)
        rate = batch / (work.osl * per_token(batch))
        use = np.minimum(rate / capacity, 1.0 - 1e-9)
        waiting = np.minimum(_QUEUE * use**2 / (1.0 - use), others)
        more = (batch + rate * own + waiting < concurrency) & (rate < capacity)
        low, high = np.where(more, batch, low), np.where(more, high, batch)
    batch = high
    tpot = per_token(batch)
    rate = np.minimum(batch / (work.osl * tpot), capacity)
    outputs = work.osl - 1
    ttft = concurrency / rate - outputs * tpot
    first = 1.0 / work.requests_per_slot
    ranks = layout.num_prefill * prefill.worker.dp
    burst = 0.5 * concurrency * (1.0 / capacity + 1e-6 * software.burst_us / ranks)
    burst = np.maximum(burst - (ttft - own), 0.0) + software.warm_up_s * np.log2(concurrency)
    ttft = np.maximum(ttft, own) + first * burst
    rate = concurrency / (ttft + outputs * tpot)
    return {
        "ttft_s": ttft,
        "tpot_s": tpot,
        "requests_per_s": rate,
        "batch": batch / layout.num_decode,
        "admitted": np.minimum(concurrency, batch + rate * own),
        "prefill_use": rate / capacity,
    }


def build(
    layout: ServeLayout,
    decode: WorkerModel,
    prefill: WorkerModel | None,
    numbers: Mapping[str, np.ndarray],
    index: int,
) -> ServeEstimate:
    """The estimate at one index of `steady`'s arrays."""
    at = {k: float(v[index]) for k, v in numbers.items()}
    work = decode.work
    rate, tpot = at["requests_per_s"], at["tpot_s"]
    source = prefill or decode
    parts = decode.decode_parts(max(at["batch"], 1.0))
    concurrency = rate * (at["ttft_s"] + (work.osl - 1) * tpot)
    return ServeEstimate(
        layout=layout,
        concurrency=concurrency,
        admitted=at["admitted"],
        ttft_s=at["ttft_s"],
        tpot_s=tpot,
        output_tokens_per_s=rate * work.osl,
        output_tokens_per_s_per_gpu=rate * work.osl / layout.num_gpus,
        total_tokens_per_s_per_gpu=rate * (work.osl + work.isl) / layout.num_gpus,
        requests_per_s=rate,
        batch=at["batch"],
        memory=decode.memory_at(at["batch"]),
        kv_capacity_tokens=decode.memory.kv_capacity_tokens * layout.num_decode,
        limited_by=_limit(at, decode, parts),
        decode_parts=parts,
        prefill_parts=source.prompt_parts,
        prefill_memory=prefill.memory if prefill else None,
        notes=decode.software.notes,
    )


def _limit(at: Mapping[str, float], decode: WorkerModel, parts: Mapping[str, float]) -> str:
    """What would have to grow for more throughput at this concurrency."""
    if at["prefill_use"] > 0.8:
        return "prefill"
    if at["batch"] > 0.98 * decode.most_requests:
        return "kv_cache"
    groups = {
        "communication": parts.get("all_reduce", 0.0) + parts.get("exchange", 0.0),
        "experts": parts.get("experts", 0.0),
        "attention": parts.get("attention", 0.0),
        "host": parts.get("host", 0.0) + parts.get("other", 0.0),
    }
    return max(groups, key=lambda name: groups[name])
