"""Serving engines as data: which kernels, how much host time, which policies, by engine and generation.

The constants are in `data/serving.yaml`, each with where it comes from. A GPU without curves of its own takes
those of its architecture's nearest kin, with its own peaks and bandwidths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from whalepod.planner.serve_kernels import Curve, KernelSet, LinkCurve
from whalepod.planner.serve_measured import around, served
from whalepod.planner.serve_memory import CONTEXT_BYTES, GRAPH_BYTES
from whalepod.spec.errors import UserError, nearest
from whalepod.spec.hardware import Gpu, load_gpu
from whalepod.spec.model import shown

_DATA = Path(__file__).parent / "data" / "serving.yaml"
OWN_ENGINE = "whalepod"
_CPU_BYTES = int(0.4 * 2**30)
"""Of a process that has loaded Python, torch and the engine, before any model."""
_USUAL_REACH = 0.7
"""Of the BF16 peak, on a chip whose products nobody published; as `planner.software` takes for training."""


@dataclass(frozen=True)
class Engine:
    """An engine of a generation on an architecture at a weight precision.

    cache: type of the KV cache.
    glue_us: the small kernels of a layer (norms, rotary, cache write, routing, quantisation) in a CUDA graph.
    floors: share of the kernels' launch floors left when they follow one another in a graph (programmatic
        dependent launch, shared experts on a second stream).
    step_us, request_us: host and sampling per decode step, and per running request of a rank.
    prefill_layer_us: host time per layer of a prefill pass, which has no graphs; longer kernels hide it.
    prefill_us: tokenisation and scheduling of a prompt.
    burst_us: more of the same per prompt, when many arrive at once at a rank.
    warm_up_s: kernels compiled or tuned for a first batch, per doubling of its requests.
    cold_start_s, cold_start_tokens: the same, all at once, when a first batch has at least so many tokens.
    balance_steps: decode steps that a prompt waits for other attention ranks' prompts, to run with them.
    experts_slowdown, prefill_slowdown, gather_slowdown: in the engine against the kernel alone.
    chunk_tokens: most prompt tokens per pass and attention rank.
    exchange_ranks: EP size from which a DP worker sends each token to its experts (DeepEP and its like);
        below it all tokens are gathered everywhere.
    overlap: two half batches, one computing while the other's tokens travel.
    transfer_us, transfer_gb_s: a prompt's hand-over from a prefill to a decode worker over the network,
        beside its bytes, which one prefill worker sends at this rate.
    decode_layer_us: host time per layer of a decode step without graphs, which longer kernels hide too.
    pipelined: stages work at the same time, each on a part of the batch.
    framework_bytes: what an idle engine holds beside weights and cache.
    measured: its kernels are those that a calibration timed on this very hardware.
    reach: by precision, the share of peak that the GPU's best products reach, over its kin's; 1 if absent.
    """

    engine: str
    generation: str
    kernels: KernelSet
    cache: str
    glue_us: float
    floors: float = 1.0
    step_us: float = 0.0
    request_us: float = 0.0
    prefill_layer_us: float = 0.0
    prefill_us: float = 0.0
    burst_us: float = 0.0
    warm_up_s: float = 0.0
    balance_steps: float = 0.0
    experts_slowdown: float = 1.0
    prefill_slowdown: float = 1.0
    gather_slowdown: float = 1.0
    chunk_tokens: int = 16384
    exchange_ranks: int = 16
    overlap: bool = False
    transfer_us: float = 0.0
    transfer_gb_s: float = 25.0
    cold_start_s: float = 0.0
    cold_start_tokens: int = 1 << 62
    decode_layer_us: float = 0.0
    pipelined: bool = True
    framework_bytes: int = CONTEXT_BYTES + GRAPH_BYTES
    measured: bool = False
    reach: Mapping[str, float] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


def engine_names() -> list[str]:
    return list(_database()["engines"])


def generations(engine: str) -> list[str]:
    """Names of an engine's generations, the oldest first."""
    return [g["name"] for g in _engine(engine)["generations"]]


def generation_of(engine: str, measured: str = "") -> str:
    """The generation of a run by its date (`2026-02-03`, as front ends number their releases themselves); no
    date is the newest."""
    entry = _engine(engine)["generations"]
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}", measured):
        started = [g["name"] for g in entry if str(g["since"]) <= measured]
        return started[-1] if started else entry[0]["name"]
    return entry[-1]["name"]


def load_software(engine: str, gpu: Gpu, precision: str, generation: str | None = None) -> Engine:
    """Constants of an engine on a GPU. Raises UserError for an unknown engine or generation, and on CPUs for
    all but a calibrated one's own."""
    names = generations(engine)
    if gpu.architecture == "cpu":
        return _on_cpu(engine, gpu, precision)
    name = names[-1] if generation is None else generation
    if name not in names:
        raise UserError(f"unknown generation {shown(name)} of {engine}{nearest(name, names)}")
    entry = next(g for g in _engine(engine)["generations"] if g["name"] == name)
    kin, notes = _kin(gpu)
    values: dict[str, Any] = {}
    for block in (_engine(engine)["common"], entry):
        for part in (block, block.get(kin, {}), block.get(kin, {}).get(precision, {})):
            values |= {k: v for k, v in part.items() if k in Engine.__dataclass_fields__}
    cache_type = values.pop("cache", "bf16")
    reach = _reach(gpu, kin) if notes else {}
    if engine == OWN_ENGINE:
        notes += ("no GPU has run whalepod's engine: SGLang's kernels, each launched by itself",)
    return Engine(
        engine=engine,
        generation=name,
        kernels=kernel_set(_engine(engine)["kernels"], kin),
        cache=cache_type,
        reach=reach,
        notes=notes,
        **values,
    )


def _on_cpu(engine: str, gpu: Gpu, precision: str) -> Engine:
    """This project's engine as the profile has it."""
    if engine != OWN_ENGINE:
        raise UserError(f"no CPU ran {engine} for the planner: there it knows --engine {OWN_ENGINE} only")
    found = served(gpu)[1]
    if precision != found.precision:
        raise UserError(
            f"the engine serves in {found.precision.upper()} on this CPU, and was calibrated so: "
            f"{precision.upper()} is not known"
        )
    fixed = around(found.steps)
    nothing = LinkCurve(0.0, 1.0)
    return Engine(
        engine=engine,
        generation="measured",
        kernels=KernelSet({}, {}, {}, {}, nothing, nothing, min_heads=1),
        cache=precision,
        glue_us=fixed.layer * 1e6,
        step_us=(fixed.step - fixed.request) * 1e6,
        request_us=fixed.request * 1e6,
        chunk_tokens=512,
        exchange_ranks=2,
        pipelined=False,
        framework_bytes=_CPU_BYTES,
        measured=True,
    )


@cache
def kernel_set(family: str, kin: str) -> KernelSet:
    """Curves `family` (such as `trtllm`) on `kin` (an architecture with curves); SGLang's where the family
    was not measured there."""
    families = _database()["kernels"]
    entry = families[family].get(kin) or families["sglang"][kin]
    last = {
        "gemm": "step_ns",
        "experts": "row_passes",
        "decode_attention": None,
        "prefill_attention": "row_passes",
    }

    def curves(kind: str) -> Mapping[str, Curve]:
        shares = 1 if kind == "prefill_attention" else 2
        found: dict[str, Curve] = {}
        for precision, numbers in entry[kind].items():
            curve = Curve(*numbers[: 1 + shares])
            found[precision] = replace(curve, **{last[kind]: numbers[-1]}) if last[kind] else curve
        # Weights narrower than the arithmetic there is run through the next wider kernel.
        for precision, wider in (("fp8", "bf16"), ("fp4", "fp8")):
            found.setdefault(precision, found[wider])
        return found

    return KernelSet(
        gemm=curves("gemm"),
        experts=curves("experts"),
        decode_attention=curves("decode_attention"),
        prefill_attention=curves("prefill_attention"),
        all_reduce=LinkCurve(*entry["all_reduce"]),
        gather=LinkCurve(*_database()["links"][kin]),
        min_heads=entry["min_heads"],
        narrow_attention=kin == "blackwell",
    )


def _kin(gpu: Gpu) -> tuple[str, tuple[str, ...]]:
    """The architecture whose curves a GPU takes, and a note where it was not measured itself."""
    known = _database()["measured"]
    if gpu.name.lower() in known:
        return known[gpu.name.lower()], ()
    # Cards without NVLink have another chip than the accelerators of their architecture's name.
    kin = "blackwell" if gpu.architecture == "blackwell" and gpu.scale_up is not None else "hopper"
    return kin, (f"{gpu.name}: kernel efficiencies of {kin.title()} with its own peaks and bandwidths",)


def _reach(gpu: Gpu, kin: str) -> dict[str, float]:
    """Share of peak that the GPU's best products reach, over that of the kin whose curves it takes; in
    precisions that were not measured on both, what BF16's are."""
    other = load_gpu({"blackwell": "b200", "hopper": "h200"}[kin]).reachable
    alike = gpu.scale_up is not None and gpu.architecture == kin
    usual = gpu.reachable.get("bf16", other["bf16"] if alike else _USUAL_REACH) / other["bf16"]
    measured = gpu.reachable.keys() & other.keys()
    ratios = {p: gpu.reachable[p] / other[p] if p in measured else usual for p in gpu.tflops}
    return {p: min(1.0, ratio) for p, ratio in ratios.items()}


def _engine(name: str) -> dict[str, Any]:
    engines = _database()["engines"]
    if name not in engines:
        raise UserError(f"unknown engine {shown(name)}{nearest(name, engines)}")
    return engines[name]


@cache
def _database() -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with _DATA.open(encoding="utf-8") as file:
        return yaml.load(file, loader)
