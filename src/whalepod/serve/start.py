"""From a folder to an engine: says whether it fits, loads, starts the other ranks.

Under torchrun every process calls `open_engine`, and all but the first stay in it until the engine ends.
Otherwise a layout of several devices starts the others as local processes. They end with the first one.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from whalepod.parallel import processes, shm
from whalepod.parallel.inference import Inference, check_serving, spread, whole
from whalepod.parallel.mesh import Mesh, local_device, open_mesh
from whalepod.parallel.trained import Trained, is_run
from whalepod.parallel.weights_initial import StoredWeights
from whalepod.serve import native
from whalepod.serve.core import PAGE_SIZE, CoreConfig
from whalepod.serve.engine import Engine
from whalepod.serve.fleet import Fleet
from whalepod.serve.generate import DTYPES, FORMS, check_dtype, load_model, usual_dtype
from whalepod.serve.grammar import Grammars
from whalepod.serve.paged import token_bytes
from whalepod.spec.counts import GIB, params, weight_bytes
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.machine import main_memory
from whalepod.spec.model import ModelSpec, read_config
from whalepod.text.tokenizer import load_tokenizer

CACHE_SHARE = 0.5  # of what is free beside the weights: activations and the rest of the machine want some
Say = Callable[[str], Any]


@dataclass(frozen=True)
class EngineConfig:
    """path: a run's folder or a Hugging Face folder. dtype: `auto` (`generate.usual_dtype`), `bf16`, `fp32`,
    `fp8` or `int8` (`generate.load_model`). cache_gib: of each device; None is half of what is free beside
    the weights, or less if that holds `max_running` of the longest sequences. max_waiting: requests beyond
    those that run."""

    path: str
    layout: Layout = field(default_factory=Layout)
    dtype: str = "auto"
    device: str = "auto"
    cache_gib: float | None = None
    max_running: int = 64
    max_step_tokens: int = 512
    max_waiting: int = 1024
    speculate: bool = False
    threads_per_worker: int | None = None


@dataclass(frozen=True)
class Fit:
    """What a device's memory is spent on. tokens: that the cache of each replica holds."""

    weights_gib: float
    cache_gib: float
    free_gib: float
    tokens: int
    replicas: int
    max_positions: int

    def __str__(self) -> str:
        longest = min(self.tokens, self.max_positions)
        each = f" in each of {self.replicas} replicas" if self.replicas > 1 else ""
        return (
            f"{self.weights_gib:.2f} GiB of weights and {self.cache_gib:.2f} GiB of cache on each device, of "
            f"{self.free_gib:.1f} GiB free: {self.tokens:,} tokens{each}, as many as "
            f"{self.tokens // longest:,} sequences of {longest:,}"
        )


def serving_layout(tp: int = 1, pp: int = 1, dp: int = 1, ep: int = 1) -> Layout:
    """dp: replicas of the attention; ep: of their tp x dp devices those that share the experts out."""
    replicate, shard = (1, dp) if ep > 1 else (dp, 1)
    return Layout(pp=pp, dp_replicate=replicate, dp_shard=shard, tp=tp, ep=ep, global_batch=dp)


@contextmanager
def open_engine(config: EngineConfig, say: Say = lambda text: None) -> Iterator[Engine | None]:
    """A running engine; None on ranks that only follow, when they are through. Raises UserError for what
    cannot be served, before anything is loaded."""
    spec = _spec(config)
    tokens, dtype = 0, ""
    if os.environ.get("RANK", "0") == "0":
        fit = plan_memory(config, spec)
        say(f"{spec.name}: {fit}")
        tokens, dtype = fit.tokens, _dtype(config, spec)
    with _workers(config), _threads(config):
        device = local_device(config.device)
        with open_mesh(config.layout, device) as mesh:
            # What is free differs from rank to rank, and all keep the same books.
            tokens, dtype = json.loads(mesh.world.share(json.dumps([tokens, dtype]).encode())[0])
            config = replace(config, dtype=dtype)
            inference = _load(config, spec, mesh)
            tokenizer = load_tokenizer(config.path)
            core = CoreConfig(
                num_pages=tokens // PAGE_SIZE,
                max_running=config.max_running,
                max_step_tokens=config.max_step_tokens,
                speculate=config.speculate,
            )
            fleet = Fleet(inference, core, Grammars(tokenizer, spec.vocab_size).mask)
            if not mesh.is_first:
                with _deaf():
                    fleet.follow()
                yield None
                return
            engine = Engine(fleet, tokenizer, config.max_waiting)
            try:
                yield engine
            finally:
                engine.close()


def plan_memory(config: EngineConfig, spec: ModelSpec) -> Fit:
    """Raises UserError, with what would help, where weights and a cache for one sequence do not fit."""
    layout, device = config.layout, local_device(config.device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", layout.num_devices))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else main_memory("MemAvailable") / here
    dtype = DTYPES[_dtype(config, spec)]
    counted = params(spec, mtp=True)
    experts = counted.routed_experts / (layout.ep if layout.ep > 1 else layout.tp)
    rest = (counted.total - counted.routed_experts) / layout.tp
    weights = (experts + rest) / layout.pp * dtype.itemsize
    if config.dtype in FORMS:  # scales of INT8 are one for 128 numbers, 3 % more
        weights = weight_bytes(spec, "fp8", mtp=True) * (1 + 4 / 128 * (config.dtype == "int8"))
    a_token = token_bytes(spec, dtype, config.speculate) / layout.pp
    left = free - weights
    longest = min(spec.max_position_embeddings, PAGE_SIZE)
    if left * CACHE_SHARE < longest * a_token:
        raise UserError(
            f"{spec.name} needs {weights / GIB:.1f} GiB of weights in {str(dtype).removeprefix('torch.')} "
            f"on each of {layout.num_devices} devices, and {free / GIB:.1f} GiB are free there: "
            f"{_remedy(config, dtype)}"
        )
    wanted = config.max_running * spec.max_position_embeddings * a_token
    cache = min(left * CACHE_SHARE, wanted) if config.cache_gib is None else config.cache_gib * GIB
    if not math.isfinite(cache):
        raise UserError(f"a cache of {config.cache_gib} GiB is no number of bytes")
    if cache > left:
        raise UserError(
            f"a cache of {cache / GIB:.2f} GiB does not fit beside {weights / GIB:.1f} GiB of weights in "
            f"{free / GIB:.1f} GiB that are free: at most {left / GIB:.1f}"
        )
    pages = int(cache / a_token) // PAGE_SIZE
    if pages < 1:
        raise UserError(
            f"a cache of {cache / GIB:.4f} GiB holds no page of {PAGE_SIZE} tokens: make it larger"
        )
    tokens, positions = pages * PAGE_SIZE, spec.max_position_embeddings
    return Fit(weights / GIB, cache / GIB, free / GIB, tokens, layout.num_replicas, positions)


def _remedy(config: EngineConfig, dtype: torch.dtype) -> str:
    smaller = "dtype bf16, or " if dtype == torch.float32 else ""
    return f"use {smaller}more devices (tp {2 * config.layout.tp}, or ep for experts)"


def _spec(config: EngineConfig) -> ModelSpec:
    path = Path(config.path)
    if not path.is_dir():
        raise UserError(f"no folder {config.path!r}: give a run's folder or a Hugging Face checkpoint")
    check_dtype(config.dtype)
    if config.dtype in FORMS and config.layout.num_devices > 1:
        raise UserError(f"dtype {config.dtype} is for one device yet: use bf16 under this layout")
    spec = read_config(path)
    if config.speculate and not spec.num_nextn_predict_layers:
        raise UserError(f"{spec.name} has no multi-token prediction to speculate with")
    check_serving(spec, config.layout)
    return spec


def _dtype(config: EngineConfig, spec: ModelSpec) -> str:
    return usual_dtype(spec, local_device(config.device).type) if config.dtype == "auto" else config.dtype


def _load(config: EngineConfig, spec: ModelSpec, mesh: Mesh) -> Inference:
    if config.layout.num_devices == 1:
        return whole(load_model(config.path, config.dtype, mesh.device.type)[0], mesh)
    path = Path(config.path)
    stored = Trained(path, spec) if is_run(path) else StoredWeights(path, spec)
    inference = spread(spec, mesh, DTYPES[config.dtype], stored)
    if mesh.device.type == "cpu":
        for part in inference.stages.values():
            native.use(part)
    return inference


@contextmanager
def _workers(config: EngineConfig) -> Iterator[None]:
    """The other ranks as processes of this machine, unless a launcher has started them, or there are none."""
    size = config.layout.num_devices
    if size == 1 or "RANK" in os.environ:
        yield
        return
    device = local_device(config.device)
    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise UserError(f"the layout needs {size} GPUs, this machine has {torch.cuda.device_count()}")
    shm.register()  # compiled before others ask for it
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = config.threads_per_worker or max(1, len(os.sched_getaffinity(0)) // size)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": str(threads),
    }
    starts = [processes.as_here(_follow, config, common, rank) for rank in range(1, size)]
    others = [processes.context().Process(target=call, args=args, daemon=True) for call, args in starts]
    for process in others:
        process.start()
    before = {name: os.environ.get(name) for name in (*common, "RANK", "LOCAL_RANK")}
    os.environ.update(common, RANK="0", LOCAL_RANK="0")
    try:
        yield
        for process in others:
            process.join(timeout=30)
    finally:
        for process in others:
            process.kill()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _follow(config: EngineConfig, environment: dict[str, str], rank: int) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    with _deaf(), open_engine(config):
        pass


@contextmanager
def _deaf() -> Iterator[None]:
    """Signals that ask to end go to all ranks, and mean the first: it drains, and lets the others go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _threads(config: EngineConfig) -> Iterator[None]:
    before = torch.get_num_threads()
    wanted = config.threads_per_worker
    if wanted is None and config.layout.num_devices > 1:
        wanted = int(os.environ.get("OMP_NUM_THREADS", before))
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
