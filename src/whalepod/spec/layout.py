"""Layout: how one model is spread over devices; the handshake of every part of the program.

Ranks are numbered with `tp` fastest, then `cp`, `dp_shard`, `dp_replicate`, `pp`:

    rank = (((pp x dp_replicate + r) x dp_shard + s) x cp + c) x tp + t

Experts lie across the same devices in another way (DeepSeek-V3, section 3.2): `ep` is carved out of
dp_shard x cp x tp, whose ranks are numbered in the same order, `ep` fastest. What is left of them,
`expert_shard` = dp_shard x cp x tp / ep, shards each expert (or repeats it, where dp_shard x cp is 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, lcm
from typing import Literal, NamedTuple, get_args

from whalepod.spec.errors import UserError, nearest
from whalepod.spec.model import GQA, ModelSpec
from whalepod.spec.schedule import RULES, check_schedule, stages_per_rank
from whalepod.spec.stages import split_stages

Precision = Literal["bf16", "fp32", "fp8"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev"]
Recompute = Literal["none", "selective", "full"]
Exchange = Literal["auto", "flat", "two_hop"]
Wire = Literal["bf16", "fp8"]

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
MAX_SIZE = 2**20
FP8_BLOCK = 128

# What each group of ranks is for; the value lists the mesh axes it runs along, the others being fixed.
GROUPS: dict[str, tuple[str, ...]] = {
    "pp": ("pp",),
    "ends": ("pp",),  # the first and the last pipeline rank, which may hold copies of one weight
    "dp": ("dp_replicate", "dp_shard"),  # ranks that read different sequences
    "dp_replicate": ("dp_replicate",),
    "fsdp": ("dp_shard", "cp"),  # shards of weights, gradients and moments
    "cp": ("cp",),
    "tp": ("tp",),
    "sequence": ("cp", "tp"),  # parts of one sequence
    "data": ("dp_replicate", "dp_shard", "cp"),  # sums of gradients of what `tp` splits
    "stage": ("dp_replicate", "dp_shard", "cp", "tp"),  # ... and of what it repeats
    "replicas": ("dp_replicate", "tp"),  # after `fsdp` has summed and scattered: what it repeats
    "ep": ("ep_rail", "ep_node"),
    "ep_node": ("ep_node",),  # within a node, and
    "ep_rail": ("ep_rail",),  # across nodes: the ranks at the same place in each
    "expert_shard": ("expert_shard",),
    "expert_data": ("dp_replicate", "expert_shard"),
    "world": AXES,
}


class _Width(NamedTuple):
    """A size that `tp` cuts, and the multiple that each part must be."""

    name: str
    size: int
    multiple: int = 1
    why: str = "1"


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes, batch and precision. A value; it validates itself.

    pp: pipeline ranks. dp_replicate: groups of devices that each hold the whole training state.
    dp_shard: devices within a group that share it. cp: parts of every sequence. tp: parts of every
    matrix, and of the sequence between matrices. ep: devices that share the experts out (1: experts
    are split by width over `tp` like everything else).
    zero: what dp_shard x cp devices share out. 1: optimiser state; gradients are reduced once a
    step. 2: gradients too, reduced after every micro-batch. 3: weights too (FSDP).
    schedule, stages_per_rank, stage_layers: the pipeline's; stages_per_rank None is the schedule's
    own number, stage_layers None splits by cost, else the number of layers in each stage.
    recompute: activations recomputed in the backward pass: `none`; `selective` (norms, MLA
    up-projections, SwiGLU: DeepSeek-V3, section 3.2.3); `full` (every block).
    exchange, wire, devices_per_node: how tokens travel to experts and back, and where nodes end; `auto` is
    DeepEP on CUDA where it is installed, else `two_hop`.
    micro_batch: sequences per device and forward pass. global_batch: sequences per step, over all
    devices. precision: of compute; masters, gradient sums and reductions are float32.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    zero: Literal[1, 2, 3] = 3
    schedule: Schedule = "1f1b"
    stages_per_rank: int | None = None
    stage_layers: tuple[int, ...] | None = None
    recompute: Recompute = "none"
    exchange: Exchange = "auto"
    wire: Wire = "bf16"
    devices_per_node: int = 8
    micro_batch: int = 1
    global_batch: int = 1
    precision: Precision = "bf16"

    def __post_init__(self) -> None:
        for name in (*AXES, "ep", "devices_per_node", "micro_batch", "global_batch"):
            value = getattr(self, name)
            # The bound keeps a slip of the keyboard from asking for terabytes of token ids.
            if not 1 <= value <= MAX_SIZE:
                raise UserError(f"layout.{name} must be at least 1 and at most {MAX_SIZE}, not {value!s:.30}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"layout.{name}: unknown {value!r}{nearest(value, map(str, choices))}")
        self._check_experts_axis()
        self._check_batch()

    def _check_experts_axis(self) -> None:
        inner = self.dp_shard * self.cp * self.tp
        if inner % self.ep:
            raise UserError(
                f"layout.ep {self.ep} must divide dp_shard x cp x tp = {self.dp_shard} x {self.cp} x "
                f"{self.tp} = {inner}, whose devices share the experts out; "
                f"nearest: {near_divisors(inner, self.ep)}"
            )

    def _check_batch(self) -> None:
        per_pass = self.micro_batch * self.num_replicas
        if self.global_batch % per_pass:
            devices = "devices" if self.num_replicas == self.num_devices else "dp_replicate x dp_shard"
            raise UserError(
                f"layout.global_batch {self.global_batch} must be a multiple of micro_batch x {devices} = "
                f"{self.micro_batch} x {self.num_replicas} = {per_pass}; "
                f"nearest: {near_multiples(per_pass, self.global_batch)}"
            )

    @property
    def num_devices(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def num_replicas(self) -> int:
        """Groups of devices that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def num_stages(self) -> int:
        return self.pp * stages_per_rank(self.schedule, self.stages_per_rank) if self.pp > 1 else 1

    @property
    def expert_shard(self) -> int:
        return self.dp_shard * self.cp * self.tp // self.ep

    @property
    def ep_node(self) -> int:
        """Ranks of an expert-parallel group that are sure to share a node."""
        return gcd(self.ep, self.devices_per_node)

    @property
    def fsdp(self) -> int:
        """Devices that share the state of what is not an expert."""
        return self.dp_shard * self.cp

    @property
    def expert_tp(self) -> int:
        """Ways that each routed expert's width is split."""
        return self.tp if self.ep == 1 else 1

    @property
    def micro_batches(self) -> list[int]:
        """Micro-batches that the global batch and the pipeline's schedule would take, smallest first: powers
        of two, this layout's own, and all of a device's sequences."""
        share, accepts = self.global_batch // self.num_replicas, RULES[self.schedule].accepts
        sizes = {2**n for n in range(share.bit_length())} | {share, self.micro_batch}
        return [n for n in sorted(sizes) if share % n == 0 and (self.pp == 1 or accepts(self.pp, share // n))]

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per device and optimiser step."""
        return self.global_batch // (self.micro_batch * self.num_replicas)

    def place(self, rank: int) -> dict[str, int]:
        """This rank's coordinate on every axis, `ep` and `expert_shard` among them."""
        place: dict[str, int] = {}
        rest = rank
        for axis in reversed(AXES):
            rest, place[axis] = divmod(rest, getattr(self, axis))
        inner = rank % (self.dp_shard * self.cp * self.tp)
        place["expert_shard"], place["ep"] = divmod(inner, self.ep)
        place["ep_rail"], place["ep_node"] = divmod(place["ep"], self.ep_node)
        return place

    def group(self, name: str, rank: int) -> list[int]:
        """The ranks of `rank`'s group of that name (GROUPS), in the group's order."""
        along = GROUPS[name]
        place = self.place(rank)
        if name == "ends":
            stages = self.group("pp", rank)
            return sorted({stages[0], stages[-1]}) if rank in (stages[0], stages[-1]) else [rank]
        if name.startswith(("ep", "expert")):
            inner = self.dp_shard * self.cp * self.tp
            sizes = {
                "dp_replicate": self.dp_replicate,
                "expert_shard": self.expert_shard,
                "ep_rail": self.ep // self.ep_node,
                "ep_node": self.ep_node,
            }
            strides = {
                "dp_replicate": inner,
                "expert_shard": self.ep,
                "ep_rail": self.ep_node,
                "ep_node": 1,
            }
        else:
            sizes = {axis: getattr(self, axis) for axis in AXES}
            strides, stride = {}, 1
            for axis in reversed(AXES):
                strides[axis], stride = stride, stride * sizes[axis]
        ranks = [rank - sum(place[axis] * strides[axis] for axis in along)]
        for axis in along:
            ranks = [first + i * strides[axis] for first in ranks for i in range(sizes[axis])]
        return ranks

    def check_devices(self, available: int) -> None:
        """Raises UserError unless the layout uses exactly `available` devices."""
        if self.num_devices != available:
            used = [axis for axis in AXES if getattr(self, axis) > 1] or ["dp_replicate", "dp_shard"]
            sizes = " x ".join(str(getattr(self, axis)) for axis in used)
            equals = f" = {self.num_devices}" if len(used) > 1 else ""
            raise UserError(
                f"the layout needs {' x '.join(used)} = {sizes}{equals} workers, but {available} were started"
            )

    def check_model(self, spec: ModelSpec, sequence_length: int) -> None:
        """Raises UserError, with the rule, the numbers and the nearest valid values, unless `spec` can be
        spread so and sequences of `sequence_length` be cut so."""
        self._check_widths(spec)
        self._check_experts(spec)
        self._check_sequence(sequence_length)
        self._check_pipeline(spec, sequence_length)

    def _check_pipeline(self, spec: ModelSpec, sequence_length: int) -> None:
        if self.pp == 1:
            for name in ("stages_per_rank", "stage_layers"):
                if getattr(self, name) is not None:
                    raise UserError(f"layout.{name} has no effect with pp 1: leave it out")
            return
        check_schedule(self.schedule, self.pp, self.stages_per_rank, self.accumulation_steps)
        split_stages(spec, self.num_stages, sequence_length, self.stage_layers)

    def _check_widths(self, spec: ModelSpec) -> None:
        rules = [*self._widths(spec)]

        def broken(tp: int) -> _Width | None:
            return next((rule for rule in rules if rule.size % (tp * rule.multiple)), None)

        rule = broken(self.tp)
        if rule is None:
            return
        if alone := broken(1):
            remedy = ": use layout.precision bf16, or tp 1" if alone.multiple == FP8_BLOCK else ""
            raise UserError(f"{alone.name} {alone.size} is no multiple of {alone.why}{remedy}")
        valid = [tp for tp in range(1, spec.num_attention_heads + 1) if not broken(tp)]
        below = max((tp for tp in valid if tp < self.tp), default=None)
        above = next((tp for tp in valid if tp > self.tp), None)
        near = ", ".join(str(tp) for tp in (below, above) if tp is not None)
        if rule.size % self.tp:
            raise UserError(f"layout.tp {self.tp} must divide {rule.name} {rule.size}; nearest: {near}")
        raise UserError(
            f"layout.tp {self.tp} cuts {rule.name} {rule.size} into {rule.size // self.tp}, which is no "
            f"multiple of {rule.why}; nearest: {near}"
        )

    def _widths(self, spec: ModelSpec) -> Iterator[_Width]:
        """What `tp` cuts. In FP8 between blocks only: they are then the same as on one device."""
        in_blocks = self.precision == "fp8" and self.tp > 1
        fp8 = (FP8_BLOCK, f"the {FP8_BLOCK}-wide FP8 blocks") if in_blocks else (1, "1")
        a, heads = spec.attention, spec.num_attention_heads
        yield _Width("num_attention_heads", heads)
        yield _Width("vocab_size", spec.vocab_size)
        if isinstance(a, GQA):
            yield _Width("num_key_value_heads", a.num_key_value_heads)
            yield _Width("num_key_value_heads x head_dim", a.num_key_value_heads * a.head_dim, *fp8)
        else:
            yield _Width("num_attention_heads x qk_head_dim", heads * a.qk_head_dim, *fp8)
            yield _Width("num_attention_heads x v_head_dim", heads * a.v_head_dim, *fp8)
        if not all(spec.is_moe_layer(i) for i in range(spec.num_hidden_layers)):
            yield _Width("intermediate_size", spec.intermediate_size, *fp8)
        if (moe := spec.moe) is not None:
            width = moe.moe_intermediate_size
            if moe.n_shared_experts:
                shared = moe.n_shared_experts * width
                yield _Width("n_shared_experts x moe_intermediate_size", shared, *fp8)
            if self.ep == 1:
                yield _Width("moe_intermediate_size", width, *fp8)
                yield _Width("moe_intermediate_size", width, *self._grouped)

    @property
    def _grouped(self) -> tuple[int, str]:
        """The multiple that widths of grouped products must be, and why."""
        elements = 4 if self.precision == "fp32" else 8
        return elements, f"{elements}, as grouped products need (16 bytes)"

    def _check_experts(self, spec: ModelSpec) -> None:
        if self.ep == 1:
            for name, value in (("wire", self.wire), ("exchange", self.exchange)):
                if value in ("fp8", "two_hop"):
                    raise UserError(
                        f"layout.{name} {value} has no effect with ep 1: nothing travels to experts"
                    )
            return
        if spec.moe is None:
            raise UserError(f"layout.ep {self.ep}: {spec.name} has no experts to share out; use ep 1")
        experts = spec.moe.n_routed_experts
        if experts % self.ep:
            inner = self.dp_shard * self.cp * self.tp
            raise UserError(
                f"layout.ep {self.ep} must divide the {experts} routed experts, as well as dp_shard x cp x "
                f"tp = {inner}; nearest: {near_divisors(gcd(experts, inner), self.ep)}"
            )
        multiple, why = self._grouped
        if spec.moe.moe_intermediate_size % multiple:
            raise UserError(f"moe_intermediate_size {spec.moe.moe_intermediate_size} is no multiple of {why}")
        if self.wire == "fp8" and spec.hidden_size % FP8_BLOCK:
            raise UserError(
                f"layout.wire fp8 sends 1 x {FP8_BLOCK} tiles, and hidden_size {spec.hidden_size} is no "
                f"multiple of {FP8_BLOCK}: use bf16"
            )

    def _check_sequence(self, length: int) -> None:
        unit = lcm(2 * self.cp if self.cp > 1 else 1, self.cp * self.tp)
        if length % unit:
            why = []
            if self.cp > 1:
                why.append(f"2 x cp = {2 * self.cp} causally balanced chunks")
            if self.tp > 1:
                why.append(f"cp x tp = {self.cp * self.tp} parts between matrices")
            raise UserError(
                f"sequence_length {length} is cut into {' and '.join(why)}: it must be a multiple of {unit}; "
                f"nearest: {near_multiples(unit, length)}"
            )


def layout_words(layout: Layout) -> tuple[str, str]:
    """How a model is spread, `pp 16 x dp 128 x ep 64`, and how it works, `dualpipev, micro-batch 1, ...`."""
    names = {"dp_replicate": "replicate", "dp_shard": "dp"}
    sizes = [(names.get(axis, axis), getattr(layout, axis)) for axis in AXES]
    axes = " x ".join(f"{name} {size}" for name, size in sizes if size > 1) or "1 device"
    if layout.ep > 1:
        axes += f", ep {layout.ep}"
    work = [f"micro-batch {layout.micro_batch}", f"ZeRO {layout.zero}"]
    if layout.pp > 1:
        stages = f" x {layout.stages_per_rank}" if (layout.stages_per_rank or 1) > 1 else ""
        work.insert(0, f"{layout.schedule}{stages}")
    work.append("no recompute" if layout.recompute == "none" else f"recompute {layout.recompute}")
    return axes, ", ".join(work)


_CHOICES: dict[str, tuple[object, ...]] = {
    "zero": (1, 2, 3),
    "schedule": get_args(Schedule),
    "recompute": get_args(Recompute),
    "exchange": get_args(Exchange),
    "wire": get_args(Wire),
    "precision": get_args(Precision),
}


def near_divisors(number: int, value: int) -> str:
    """The divisors of `number` next below and above `value`, for messages: '16, 32'."""
    below = max((d for d in range(1, min(value, number) + 1) if number % d == 0), default=None)
    # Not beyond what any axis may be: the next divisor of a product of primes can be very far.
    above = next((d for d in range(value + 1, min(number, MAX_SIZE) + 1) if number % d == 0), None)
    return ", ".join(str(d) for d in (below, above) if d is not None)


def near_multiples(unit: int, value: int) -> str:
    """The multiples of `unit` next below and above `value`, for messages."""
    low = value // unit * unit
    return f"{low}, {low + unit}" if low else f"{unit}"
