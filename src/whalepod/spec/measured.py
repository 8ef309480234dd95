"""What `whalepod calibrate` measured on a machine, as the `measured` section of a hardware profile, and where
profiles lie. Rates are FLOP/s or GB/s (10^9 bytes) of one accelerator, or of one thread of a CPU."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, ConfigDict, Field

MAX_ROWS = 2000
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")

_Text = Annotated[str, Field(max_length=400, pattern=r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029]+\z")]
Precision = Annotated[str, Field(pattern=r"\A(bf16|fp8|fp4|fp32)\z")]
_Size = Annotated[int, Field(strict=True, ge=1, le=2**40)]
_Flops = Annotated[float, Field(strict=True, ge=1e3, le=1e18)]
_Positive = Annotated[float, Field(strict=True, ge=1e-6, le=1e9)]
_Seconds = Annotated[float, Field(strict=True, ge=1e-9, le=1e4)]


class Product(NamedTuple):
    """rows x inner times inner x columns."""

    precision: Precision
    rows: _Size
    inner: _Size
    columns: _Size
    flop_s: _Flops


class Grouped(NamedTuple):
    """`experts` products at once, each of `rows` x inner times inner x columns."""

    precision: Precision
    experts: _Size
    rows: _Size
    inner: _Size
    columns: _Size
    flop_s: _Flops


class Attended(NamedTuple):
    """Causal attention over sequences of so many tokens, with queries and keys of so many numbers a head.
    Causal FLOPs, without what padding adds; the backward pass counts 2.5 times the forward one's."""

    precision: Precision
    tokens: _Size
    width: _Size
    forward_flop_s: _Flops
    backward_flop_s: _Flops


class Collective(NamedTuple):
    """bytes: of the whole result (all-gather), the whole input (the others), or what a rank sends (send)."""

    op: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
    ranks: _Size
    bytes: _Size
    seconds: _Seconds


class Thin(NamedTuple):
    """A linear layer as the engine has it, its weights out of memory: rows x inner times inner x columns."""

    rows: _Size
    inner: _Size
    columns: _Size
    flop_s: _Flops


class Decoded(NamedTuple):
    """Attention of the next tokens of so many sequences over their cached rows of `width`, for `heads`: what
    longer sequences add. FLOPs of scores and values, 4 heads x width a cached token."""

    requests: _Size
    heads: _Size
    width: _Size
    flop_s: _Flops


class EngineStep(NamedTuple):
    """A decode step of a model so small that its arithmetic hardly counts. experts: that a token goes to;
    tp, ep: ranks that share it."""

    dense_layers: Annotated[int, Field(strict=True, ge=0, le=10**4)]
    expert_layers: Annotated[int, Field(strict=True, ge=0, le=10**4)]
    experts: _Size
    requests: _Size
    tp: _Size
    ep: _Size
    seconds: _Seconds


_FEW = Field(max_length=MAX_ROWS)


@dataclass(frozen=True)
class Served:
    """What this project's engine takes on a worker's thread, in the precision that it serves in here."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    precision: Precision
    products: Annotated[tuple[Thin, ...], _FEW, Field(min_length=2)]
    attention: Annotated[tuple[Decoded, ...], _FEW, Field(min_length=1)]
    steps: Annotated[tuple[EngineStep, ...], _FEW, Field(min_length=6)]


@dataclass(frozen=True)
class Measured:
    """peak_tflops, peak_gb_s: the profile's own when it was written; shares of the peaks are of these.
    stream: elementwise passes, counted as read and written once; gather: rows picked by index; optimizer:
    fused AdamW in FP32. Microseconds of small operations: dispatch_us of one alone, operation_us of one of a
    training step, with what Python and autograd do around it (None in profiles of before)."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    date: Annotated[_Text, BeforeValidator(str)]  # YAML reads a whole date as one
    machine: _Text
    torch: Annotated[_Text, BeforeValidator(str)]
    peak_tflops: Mapping[Precision, _Positive] = field(hash=False)
    peak_gb_s: _Positive
    stream_gb_s: _Positive
    gather_gb_s: _Positive
    optimizer_gb_s: _Positive
    dispatch_us: _Positive
    products: Annotated[tuple[Product, ...], _FEW, Field(min_length=1)]
    grouped: Annotated[tuple[Grouped, ...], _FEW] = ()
    attention: Annotated[tuple[Attended, ...], _FEW] = ()
    collectives: Annotated[tuple[Collective, ...], _FEW] = ()
    quick: Annotated[bool, Field(strict=True)] = False
    operation_us: _Positive | None = None
    served: Served | None = None


def profile_folder() -> Path:
    """Where `whalepod calibrate` writes profiles and names are looked up first: `hardware` in
    $WHALEPOD_HOME, else in `whalepod` of $XDG_DATA_HOME or ~/.local/share."""
    home = os.environ.get("WHALEPOD_HOME")
    if home:
        return Path(home).expanduser() / "hardware"
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "whalepod" / "hardware"


def profile_name(machine: str) -> str:
    """Of the profile of an accelerator that calls itself `machine`."""
    return re.sub("[^a-z0-9]+", "-", machine.lower()).strip("-")[:50] + "-here"
