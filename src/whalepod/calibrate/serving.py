"""The engine as a CPU's planner sees it: its linear layers with few rows and weights out of memory, attention
over its cache, and whole decode steps of models so small that only what surrounds arithmetic is left.

All of it is the engine's own code, so that the figures follow when its kernels change.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from whalepod.calibrate.kernels import DTYPES, Progress, Sizes, median_seconds, short
from whalepod.models.transformer import initial_value
from whalepod.parallel.inference import Inference, spread
from whalepod.parallel.mesh import Groups, Mesh, make_mesh
from whalepod.serve import native
from whalepod.serve.core import PAGE_SIZE, CoreConfig
from whalepod.serve.fleet import Fleet
from whalepod.serve.generate import usual_dtype
from whalepod.serve.paged import PagedCache
from whalepod.serve.request import Request
from whalepod.serve.scheduler import Run, Sequence
from whalepod.serve.start import serving_layout
from whalepod.spec.measured import Decoded, EngineStep, Precision, Served, Thin
from whalepod.spec.model import ModelSpec
from whalepod.spec.presets import load_model_spec

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SHAPES = ((256, 512), (1024, 1024))
TINY: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 2, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 512, "num_nextn_predict_layers": 0,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
ALONE = ((2, 0, 1, 1), (8, 0, 1, 1), (2, 6, 1, 1), (2, 6, 8, 1), (2, 0, 1, 16), (8, 0, 1, 16), (2, 6, 8, 16))
"""(dense layers, expert layers, experts a token, sequences) of models on one worker."""
SHARED = ((2, 0, 1, 1), (8, 0, 1, 1), (2, 6, 4, 1))
"""The same of models over several, a sequence for each replica."""
WARM = 4


def usual_precision() -> Precision:
    """In which the engine serves on this CPU (`serve.generate.usual_dtype`)."""
    return usual_dtype(load_model_spec("v3-mini"), "cpu")


def time_serving(sizes: Sizes, report: Progress) -> Served:
    """All of it on one worker."""
    parts = []
    for done, measure in enumerate((time_products, time_attention, time_steps)):
        report("serving", done, 3)
        parts.append(measure(sizes))
    report("serving", 3, 3)
    return Served(usual_precision(), *parts)


def time_products(sizes: Sizes) -> tuple[Thin, ...]:
    """Linear layers by rows and size."""
    budget_s = sizes.budget_s / 3
    dtype, out = DTYPES[usual_precision()], []
    with torch.inference_mode():
        alone = _linears(16, 16, 1, dtype)
        overhead = median_seconds(lambda: alone[0](_ones(1, 16, dtype)), torch.device("cpu"), budget_s)
        for inner, columns in SHAPES:
            layers = _linears(inner, columns, max(1, sizes.cold // (inner * columns * dtype.itemsize)), dtype)
            for rows in ROWS:
                x, turn = _ones(rows, inner, dtype), cycle(layers)
                seconds = median_seconds(lambda x=x, t=turn: next(t)(x), torch.device("cpu"), budget_s)
                flops = 2 * rows * inner * columns
                out.append(Thin(rows, inner, columns, short(flops / max(seconds - overhead, seconds / 4))))
    return tuple(out)


def _linears(inner: int, columns: int, count: int, dtype: torch.dtype) -> list[nn.Module]:
    model = nn.Sequential(*(nn.Linear(inner, columns, bias=False, dtype=dtype) for _ in range(count)))
    return [*_served(model)]  # type: ignore[misc]


def _served(model: Any) -> Any:
    model.requires_grad_(False)
    native.use(model)
    return model


def _ones(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(rows, width, dtype=dtype)


def time_attention(sizes: Sizes) -> tuple[Decoded, ...]:
    """Absorbed attention with DeepSeek's latent and with a narrow one, over the engine's pages."""
    budget_s = sizes.budget_s / 3
    out = []
    for heads, rank, rope in ((4, 64, 16), (4, 512, 64), (16, 512, 64)):
        spec = _spec(1, 0, 1).with_(num_attention_heads=heads, kv_lora_rank=rank, qk_rope_head_dim=rope)
        inference = _model(spec, make_mesh(serving_layout(), torch.device("cpu")))
        for requests in (1, 8):
            few, many = (_attended(inference, requests, pages * PAGE_SIZE, budget_s) for pages in (1, 17))
            flops = 4 * requests * heads * (rank + rope) * 16 * PAGE_SIZE
            out.append(Decoded(requests, heads, rank + rope, short(flops / max(many - few, many / 10))))
    return tuple(out)


def _attended(inference: Inference, requests: int, keys: int, budget_s: float) -> float:
    """A layer, in which each of `requests` writes behind so many tokens."""
    pages = keys // PAGE_SIZE
    cache = PagedCache(inference, requests * pages, PAGE_SIZE, mtp=False)
    runs = []
    for index in range(requests):
        sequence = Sequence([0] * keys, keys, keys + 1, computed=keys - 1)
        sequence.holding.pages = [*range(index * pages, (index + 1) * pages)]
        runs.append(Run(sequence, keys - 1, 1, (), True))
    tokens = torch.zeros(requests, dtype=torch.int64)
    positions, step = torch.full_like(tokens, keys - 1), cache.step(runs)
    with torch.inference_mode():
        return median_seconds(
            lambda: inference.hidden(tokens, positions, step), torch.device("cpu"), budget_s
        )


def time_steps(sizes: Sizes) -> tuple[EngineStep, ...]:
    """Decode steps of small models on this worker alone."""
    mesh = make_mesh(serving_layout(), torch.device("cpu"))
    return tuple(_step(mesh, *each, sizes.budget_s) for each in ALONE)


def shared_steps(budget_s: float, world: int, groups: Groups) -> Iterator[tuple[Any, ...]]:
    """The same over all ranks of an open world, by tensor parallelism and by experts; every rank calls it."""
    for layout in (serving_layout(tp=world), serving_layout(dp=world, ep=world)):
        mesh = make_mesh(layout, torch.device("cpu"), groups)
        for sizes in SHARED if layout.ep == 1 else SHARED[::2]:
            yield tuple(_step(mesh, *sizes, budget_s))


def _step(mesh: Mesh, dense: int, expert: int, experts: int, requests: int, budget_s: float) -> EngineStep:
    spec, layout = _spec(dense, expert, experts), mesh.layout
    inference = _model(spec, mesh)
    new = WARM + max(4, round(200 * budget_s))
    prompt = 3
    pages = requests * -(-(prompt + new) // PAGE_SIZE)  # no request waits for another's
    fleet = Fleet(inference, CoreConfig(pages, max_running=requests))
    if not mesh.is_first:
        fleet.follow()
        seconds = 1.0
    else:
        for number in range(requests * layout.num_replicas):
            fleet.add(Request((1 + number, *[2] * (prompt - 1)), new))
        seconds = statistics.median(_each(fleet)[WARM:])
        fleet.stop()
    return EngineStep(dense, expert, experts, requests, layout.tp, layout.ep, short(seconds))


def _each(fleet: Fleet) -> list[float]:
    times = []
    while not fleet.is_idle:
        start = time.perf_counter()
        fleet.step()
        times.append(time.perf_counter() - start)
    return times


def _spec(dense: int, expert: int, experts: int) -> ModelSpec:
    return load_model_spec("v3-mini").with_(
        **TINY,
        num_hidden_layers=dense + expert,
        first_k_dense_replace=dense,
        n_routed_experts=4 * experts,
        num_experts_per_tok=experts,
    )


def _model(spec: ModelSpec, mesh: Mesh) -> Inference:
    dtype = DTYPES[usual_precision()]
    found = spread(spec, mesh, dtype, lambda name, box: initial_value(name, box.whole, spec, 0, box.slices))
    for part in found.stages.values():
        _served(part)
    return found
