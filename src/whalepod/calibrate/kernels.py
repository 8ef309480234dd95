"""Kernels of one device in the forms that training runs them in: linear layers, grouped products of experts
and their weights' gradients, causal attention as training runs it, elementwise passes, fused AdamW.

A time is the median of several. What an operation costs by itself, however little it computes, is measured
with a model too small to compute anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from whalepod.models.attention import fused
from whalepod.models.tiled import tiled
from whalepod.models.transformer import Transformer, init_weights
from whalepod.precision.widened import widen_products
from whalepod.spec.measured import Attended, Grouped, Precision, Product
from whalepod.spec.presets import load_model_spec
from whalepod.train.metrics import synchronize

Progress = Callable[[str, int, int], None]
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
VALUES = 2 / 3  # of the width of keys, in DeepSeek-V2 and V3: 128 of 192
BACKWARD = 2.5  # FLOPs of attention's backward pass over the forward one's


@dataclass(frozen=True)
class Sizes:
    """What is measured. products: (rows, inner, columns); grouped: (experts, rows, inner, columns);
    attention: (sequences, heads, tokens, width of keys); stream: bytes of a tensor; cold: bytes of weights
    read before the first is read again, more than a cache holds; collectives: bytes;
    budget_s: seconds for each figure, or three repeats."""

    products: tuple[tuple[int, int, int], ...] = (
        *((n, n, n) for n in (256, 512, 1024, 2048)),
        *((4096, 64, 1024), (4096, 128, 1024), (4096, 256, 1024), (4096, 512, 256), (128, 2048, 2048)),
    )
    grouped: tuple[tuple[int, int, int, int], ...] = (
        *((8, rows, 512, 512) for rows in (8, 32, 128, 512)),
        *((32, 128, 256, 256), (8, 256, 1024, 1024)),
    )
    attention: tuple[tuple[int, int, int, int], ...] = (
        *((4, 4, tokens, width) for tokens in (128, 256, 512, 1024) for width in (48, 96, 192)),
        (1, 4, 2048, 192),
    )
    stream: int = 2**27
    cold: int = 2**27
    collectives: tuple[int, ...] = tuple(2**n for n in range(12, 25, 2))
    budget_s: float = 0.3


QUICK = Sizes(
    products=(*((n, n, n) for n in (256, 512, 1024, 2048)), (4096, 64, 1024), (4096, 128, 1024)),
    grouped=tuple((8, rows, 512, 512) for rows in (8, 32, 256)),
    attention=tuple((2, 4, tokens, width) for tokens in (128, 512) for width in (48, 192)),
    collectives=(2**12, 2**16, 2**20, 2**24),
    budget_s=0.08,
)


def time_kernels(place: torch.device, sizes: Sizes, report: Progress) -> dict[str, Any]:
    """Fields of Measured, and `peak_gb_s`, the most that any elementwise pass moved."""
    if place.type == "cpu":
        widen_products()
    total, done = 2 * (len(sizes.products) + len(sizes.grouped) + len(sizes.attention)) + 5, 0

    def step() -> None:
        nonlocal done
        done += 1
        report("kernels", done, total)

    def timed(call: Callable[[], Any]) -> float:
        return median_seconds(call, place, sizes.budget_s)

    def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, device=place).to(dtype)

    report("kernels", 0, total)
    products, grouped, attention = [], [], []
    for name, dtype in DTYPES.items():
        for m, k, n in sizes.products:
            x, w = random(m, k, dtype=dtype), random(n, k, dtype=dtype)
            rate = 2 * m * k * n / timed(lambda x=x, w=w: F.linear(x, w))
            products.append(Product(name, m, k, n, short(rate)))
            step()
        for experts, m, k, n in sizes.grouped:
            x, w = random(experts * m, k, dtype=dtype), random(experts, n, k, dtype=dtype)
            ends = torch.arange(m, experts * m + 1, m, dtype=torch.int32, device=place)
            seconds = timed(lambda x=x, w=w, e=ends: F.grouped_mm(x, w.transpose(1, 2), offs=e))
            grouped.append(Grouped(name, experts, m, k, n, short(2 * experts * m * k * n / seconds)))
            step()
        for shape in sizes.attention:
            there, back = _attention(shape, dtype, place, timed)
            sequences, heads, tokens, width = shape
            flops = sequences * heads * tokens**2 * width * (1 + VALUES)
            rates = short(flops / there), short(BACKWARD * flops / back)
            attention.append(Attended(name, tokens, width, *rates))
            step()
    with torch.no_grad():
        memory = _memory(sizes.stream, place, timed, step)
    memory["operation_us"] = _operation(place, timed) * 1e6
    step()
    return {
        "products": tuple(products),
        "grouped": tuple(grouped),
        "attention": tuple(attention),
        **{key: short(value) for key, value in memory.items()},
    }


def _attention(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    place: torch.device,
    timed: Callable[[Callable[[], Any]], float],
) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    *rows, width = shape
    values = int(width * VALUES)
    q, k, v, grad = (torch.randn(*rows, n, device=place).to(dtype) for n in (width, width, values, values))
    for each in (q, k, v):
        each.requires_grad_()
    core = tiled if place.type == "cpu" else fused

    def forward() -> torch.Tensor:
        return core(q, k, v, None, True, width**-0.5)

    with torch.no_grad():
        there = timed(forward)
    out = forward()
    return there, timed(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))


def _memory(
    size: int, place: torch.device, timed: Callable[[Callable[[], Any]], float], step: Callable[[], None]
) -> dict[str, float]:
    """GB/s of elementwise passes, of picking rows and of AdamW; microseconds of a small operation."""
    rates: dict[torch.dtype, list[float]] = {}
    for dtype in DTYPES.values():
        n = size // dtype.itemsize
        a, b, out = (torch.ones(n, dtype=dtype, device=place) for _ in range(3))
        rates[dtype] = [
            3 * size / timed(lambda a=a, b=b, out=out: torch.add(a, b, out=out)),
            2 * size / timed(lambda a=a, out=out: torch.mul(a, 0.5, out=out)),
        ]
    step()
    rows = torch.ones(size // 2 // 1024, 1024, dtype=torch.bfloat16, device=place)
    order = torch.randperm(len(rows), device=place)
    gather = 2 * size / timed(lambda: rows.index_select(0, order))
    step()
    weight = torch.nn.Parameter(torch.ones(size // 16, device=place))
    weight.grad = torch.full_like(weight, 1e-3)
    adam = torch.optim.AdamW([weight], fused=True)
    with torch.enable_grad():
        optimizer = 28 * weight.numel() / timed(adam.step)  # reads four FP32 tensors, writes three
    step()
    small = torch.ones(16, device=place)
    dispatch = timed(lambda: small.add_(0.0))
    step()
    return {
        "peak_gb_s": max(max(each) for each in rates.values()) / 1e9,
        "stream_gb_s": statistics.mean(rates[torch.bfloat16]) / 1e9,
        "gather_gb_s": gather / 1e9,
        "optimizer_gb_s": optimizer / 1e9,
        "dispatch_us": dispatch * 1e6,
    }


class Operations(TorchDispatchMode):
    """Counts those that do something: views are part of what comes before them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        self.count += not (func.is_view or name in ("detach", "_unsafe_view"))
        return func(*args, **(kwargs or {}))


def _operation(place: torch.device, timed: Callable[[Callable[[], Any]], float]) -> float:
    """Seconds of one operation of a forward and backward pass, through modules and autograd."""
    small = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 64}
    few = {"num_hidden_layers": 2, "n_routed_experts": 8, "num_nextn_predict_layers": 0}
    model = Transformer(load_model_spec("v3-mini").with_(**small, **few))
    init_weights(model, 0)
    model.to(place, torch.bfloat16)
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=place)

    def step() -> None:
        model(tokens, tokens.unsqueeze(-1)).main.backward()

    step()
    with Operations() as counted:
        step()
    return timed(step) / counted.count


def median_seconds(call: Callable[[], Any], place: torch.device, budget_s: float) -> float:
    """Of one call, after a first one; each sample is of as many calls as the clock needs. A first call that
    takes longer than the budget (a large BF16 product on a CPU that has no BF16) is the only one."""

    def sample(repeats: int) -> float:
        synchronize(place)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(place)
        return (time.perf_counter() - start) / repeats

    end = time.perf_counter() + budget_s
    if (first := sample(1)) > budget_s:
        return first
    repeats = max(1, round((2e-3 if place.type == "cuda" else 2e-4) / max(sample(1), 1e-7)))
    samples: list[float] = []
    while len(samples) < 3 or time.perf_counter() < end:
        samples.append(sample(repeats))
    return statistics.median(samples)


def short(value: float) -> float:
    """Four digits: nothing here is known better."""
    return float(f"{value:.4g}")
