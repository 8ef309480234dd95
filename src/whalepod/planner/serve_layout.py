"""ServeLayout: how a model is spread over GPUs for serving, and `TP8 DPattn1 moeTP1 EP8` as text.

A worker is one engine: `tp` x `dp` GPUs per pipeline stage. Attention is split by heads over `tp`; `dp`
groups hold different requests (data-parallel attention). The same GPUs hold the experts, in `ep` groups of
whole experts, each split by width over `moe_tp`: tp x dp = ep x moe_tp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Literal

from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster
from whalepod.spec.layout import Layout
from whalepod.spec.model import MLA, ModelSpec, shown

FP8_BLOCK = 128
_WORKER = re.compile(r"TP(\d+)\s+DPattn(\d+)\s+moeTP(\d+)\s+EP(\d+)(?:\s+PP(\d+))?", re.IGNORECASE)
_POOL = re.compile(rf"([PD])\s+(\d+)x\(({_WORKER.pattern})\)", re.IGNORECASE)


@dataclass(frozen=True)
class Worker:
    """One engine's GPUs, see above; `pp` pipeline stages of tp x dp GPUs each."""

    tp: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1
    moe_tp: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "ep", "pp", "moe_tp"):
            if not 1 <= getattr(self, name) <= 4096:
                raise UserError(f"layout: {name} must be 1 to 4096, not {getattr(self, name)}")
        if self.tp * self.dp != self.ep * self.moe_tp:
            raise UserError(
                f"layout {self}: attention's TP x DP = {self.tp} x {self.dp} and the experts' moeTP x EP = "
                f"{self.moe_tp} x {self.ep} share the same GPUs, so the products must be equal"
            )

    def __str__(self) -> str:
        text = f"TP{self.tp} DPattn{self.dp} moeTP{self.moe_tp} EP{self.ep}"
        return text + (f" PP{self.pp}" if self.pp > 1 else "")

    @property
    def stage_gpus(self) -> int:
        return self.tp * self.dp

    @property
    def num_gpus(self) -> int:
        return self.tp * self.dp * self.pp

    def check(self, spec: ModelSpec, precision: str) -> None:
        """Raises UserError saying what to change where the model does not divide so."""
        if spec.num_attention_heads % self.tp:
            raise UserError(f"TP {self.tp} must divide {spec.num_attention_heads} attention heads")
        if self.pp > spec.num_hidden_layers:
            raise UserError(f"PP {self.pp} exceeds the model's {spec.num_hidden_layers} layers")
        # DP attention computes dense layers whole or over all GPUs, whichever divides.
        widths = [("intermediate_size", spec.intermediate_size, self.tp)]
        moe = spec.moe
        if moe is None:
            if self.ep > 1:
                raise UserError(f"EP {self.ep} needs experts, and {spec.name} is a dense model; use EP 1")
        else:
            widths.append(("moe_intermediate_size", moe.moe_intermediate_size, self.moe_tp))
            if moe.n_routed_experts % self.ep and not self.redundant(spec):
                raise UserError(
                    f"EP {self.ep} must divide {moe.n_routed_experts} routed experts, or exceed a tenth "
                    "of them (then some are held twice)"
                )
            if self.ep > 2 * moe.n_routed_experts:
                raise UserError(f"EP {self.ep} is more than twice the {moe.n_routed_experts} routed experts")
        block = FP8_BLOCK if precision == "fp8" and spec.quantization is not None else 1
        for name, size, parts in widths:
            if size % parts or (size // parts) % block:
                rule = f" no multiple of the FP8 block of {block}" if size % parts == 0 else " not whole"
                both = gcd(size // block, spec.num_attention_heads)
                fits = max(p for p in range(1, parts + 1) if both % p == 0)
                raise UserError(
                    f"TP {parts} cuts {name} {size} into {size / parts:g},{rule}; at most TP {fits} here, "
                    "or spread the rest over DP and EP"
                )

    def redundant(self, spec: ModelSpec) -> int:
        """Extra copies of experts where EP does not divide them (DeepSeek: 32 at EP144)."""
        moe = spec.moe
        if moe is None or moe.n_routed_experts % self.ep == 0 or self.ep * 10 < moe.n_routed_experts:
            return 0
        return -moe.n_routed_experts % self.ep


@dataclass(frozen=True)
class ServeLayout:
    """Workers of a deployment: `prefill` None is aggregated (one pool does both)."""

    decode: Worker
    num_decode: int = 1
    prefill: Worker | None = None
    num_prefill: int = 0

    def __post_init__(self) -> None:
        if self.num_decode < 1 or (self.prefill is None) != (self.num_prefill < 1):
            raise UserError("layout: a pool needs at least one worker")

    @property
    def mode(self) -> Literal["aggregated", "disaggregated"]:
        return "aggregated" if self.prefill is None else "disaggregated"

    @cached_property
    def num_gpus(self) -> int:
        prefill = self.num_prefill * self.prefill.num_gpus if self.prefill else 0
        return self.num_decode * self.decode.num_gpus + prefill

    def __str__(self) -> str:
        if self.prefill is None:
            return str(self.decode) if self.num_decode == 1 else f"{self.num_decode}x({self.decode})"
        return f"P {self.num_prefill}x({self.prefill}) + D {self.num_decode}x({self.decode})"

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        pools = {"decode": (self.decode, self.num_decode)}
        if self.prefill is not None:
            pools["prefill"] = (self.prefill, self.num_prefill)
        else:
            pools = {"worker": (self.decode, self.num_decode)}
        return {
            "mode": self.mode,
            "text": str(self),
            "num_gpus": self.num_gpus,
            **{
                name: {"workers": n, "tp": w.tp, "dp": w.dp, "moe_tp": w.moe_tp, "ep": w.ep, "pp": w.pp}
                for name, (w, n) in pools.items()
            },
        }

    def check(self, spec: ModelSpec, cluster: Cluster | None, precision: str) -> None:
        """Raises UserError with one line on what does not divide or is not there."""
        for worker in (self.prefill, self.decode):
            if worker is not None:
                worker.check(spec, precision)
        if cluster is None:
            return
        check_precision(cluster.gpu.name, cluster.gpu.tflops, precision)
        self.check_links(cluster)
        if self.num_gpus > cluster.num_gpus:
            raise UserError(f"layout {self} needs {self.num_gpus} GPUs, and there are {cluster.num_gpus}")

    def check_links(self, cluster: Cluster) -> None:
        """Raises UserError where nobody knows how fast GPUs that must talk do. Aggregated workers need not
        talk to each other."""
        check_links(cluster, self.num_gpus if self.prefill else self.decode.num_gpus)


def deployment(layout: Layout) -> ServeLayout:
    """An engine's layout as the planner names it: without EP its replicas are workers of their own. Raises
    UserError for experts over some of a stage's devices."""
    if layout.ep == 1:
        return ServeLayout(Worker(tp=layout.tp, pp=layout.pp, moe_tp=layout.tp), layout.num_replicas)
    if layout.ep != layout.tp * layout.num_replicas:
        raise UserError("the planner knows experts over all devices of a stage, not over some of them")
    return ServeLayout(Worker(tp=layout.tp, dp=layout.num_replicas, ep=layout.ep, pp=layout.pp))


def check_links(cluster: Cluster, num_gpus: int) -> None:
    """Raises UserError where so many GPUs would use a link or a network whose bandwidth is not known."""
    measured = cluster.gpu.measured
    known = cluster.domain_gb_s is not None or (measured is not None and measured.collectives)
    if num_gpus > 1 and not known:
        raise UserError(f"the link between {cluster.gpu.name}s is not known: give the profile its pcie_gb_s")
    if num_gpus > cluster.most:
        raise UserError(
            f"the network between nodes of {cluster.gpu.name} is not known: give GB/s per GPU with --nic-gb-s"
        )


def check_precision(gpu: str, tflops: object, precision: str) -> None:
    """Raises UserError where the GPU has no arithmetic of the precision."""
    if precision not in ("bf16", "fp8", "fp4", "fp32"):
        raise UserError(f"precision must be bf16, fp8 or fp4, not {shown(precision)}")
    have = [p for p in ("fp8", "bf16") if p in tflops]  # type: ignore[operator]
    if precision not in tflops:  # type: ignore[operator]
        raise UserError(f"{gpu} has no {precision.upper()} arithmetic; use {' or '.join(have)}")


def parse_layout(text: str) -> ServeLayout:
    """`TP8 DPattn1 moeTP1 EP8`, or `P 2x(TP1 DPattn8 moeTP1 EP8) + D 1x(TP8 DPattn1 moeTP1 EP8)`.

    Raises UserError showing the form.
    """
    text = text.strip()
    alone = re.fullmatch(rf"(?:(\d+)x\()?{_WORKER.pattern}\)?", text, re.IGNORECASE)
    if alone and len(text) < 200:
        return ServeLayout(_worker(alone.groups()[1:]), int(alone.group(1) or 1))
    parts = [_POOL.fullmatch(part.strip()) for part in text.split("+")] if len(text) < 400 else []
    pools = {m.group(1).upper(): (int(m.group(2)), _worker(m.groups()[3:])) for m in parts if m}
    if len(parts) != 2 or set(pools) != {"P", "D"}:
        raise UserError(
            f"layout {shown(text)} must look like 'TP8 DPattn1 moeTP1 EP8' or "
            "'P 1x(TP1 DPattn8 moeTP1 EP8) + D 2x(TP8 DPattn1 moeTP1 EP8)'"
        )
    return ServeLayout(pools["D"][1], pools["D"][0], pools["P"][1], pools["P"][0])


def _worker(groups: tuple[str | None, ...]) -> Worker:
    tp, dp, moe_tp, ep, pp = (int(g) if g and len(g) < 7 else 1 if g is None else 10**7 for g in groups[:5])
    return Worker(tp=tp, dp=dp, ep=ep, pp=pp, moe_tp=moe_tp)


def is_latent(spec: ModelSpec) -> bool:
    """Whether the cache is MLA's latent, which tensor parallelism repeats instead of splitting."""
    return isinstance(spec.attention, MLA)
