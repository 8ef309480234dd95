"""Bytes that one rank's collectives carry in a training step, by axis and operation, by formula.

Axes are those of `spec.layout.GROUPS`, bytes those that the runtime counts: the tensor of an all-reduce, the
result of an all-gather, the input of a reduce-scatter or all-to-all, what a send sends. What runs is the
runtime's own rule: FSDP2 where dp_shard x cp devices share the state, else all-reduced FP32 gradients; moves
of activations around what `tp`, `cp` and `ep` split, transposed in the backward pass.

Rows that travel to experts are those of balanced routing: every expert gets its share, and a token reaches as
many nodes and ranks as it does on average of many drawn ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from whalepod.planner.cut import cut
from whalepod.planner.routing import reached
from whalepod.planner.state import by_muon, split, unit_counts
from whalepod.spec.counts import Params, embedding_params, head_params, layer_params
from whalepod.spec.layout import FP8_BLOCK, GROUPS, Layout
from whalepod.spec.model import GQA, ModelSpec, MoE
from whalepod.spec.schedule import RULES, Action, actions_of, stages_of_rank, stages_per_rank

Bytes = dict[str, dict[str, float]]

TRANSPOSED = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather"}
ID, INDEX, FLOAT, DOUBLE = 4, 8, 4, 8  # bytes
KEPT_STAGES = 3
"""Stages of a rank that torch's schedules keep gathered."""


def step_traffic(
    spec: ModelSpec, layout: Layout, sequence_length: int, rank: int = 0, muon: bool = False
) -> Bytes:
    """{axis: {operation: bytes}} of one rank in one training step. muon: that is the optimiser, not AdamW.

    `exchange` auto is two_hop, as it is without DeepEP; the sequence-wise balance loss is taken to be on.
    """
    step = _Step(spec, layout, sequence_length, rank)
    step.count()
    if muon:
        step.matrices()
    return {axis: dict(ops) for axis, ops in sorted(step.bytes.items())}


class _Move(NamedTuple):
    """Bytes of activations in a forward and in a backward pass. repeats: in a recomputed pass too, which ends
    with the last tensor that the backward pass wants; what moves after that does not."""

    axis: str
    op: str
    forward: float
    backward: float
    repeats: bool = True


class _Piece(NamedTuple):
    """Parameters: elements on a rank before FSDP2 shards them, the length of the dimension that it cuts, the
    axis of their shards, and the axes that sum what is left, with and without FSDP2."""

    elements: float
    rows: float
    shards: str
    rest: str
    sums: str

    def padded(self, shards: int) -> float:
        """Elements, with those that make all shards alike."""
        return self.elements * -(-self.rows // shards) * shards / self.rows

    def local(self, shards: int, index: int) -> float:
        """Elements in one shard."""
        chunk = -(-self.rows // shards)
        return self.elements * min(max(self.rows - index * chunk, 0), chunk) / self.rows


@dataclass(eq=False)
class _Step:
    spec: ModelSpec
    layout: Layout
    length: int
    rank: int
    bytes: defaultdict[str, defaultdict[str, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )

    def add(self, axis: str, op: str, count: float) -> None:
        if count and self.size(axis) > 1:
            self.bytes[axis][op] += count

    def size(self, axis: str) -> int:
        return len(self.groups[axis])

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        return {name: self.layout.group(name, self.rank) for name in GROUPS}

    def count(self) -> None:
        for stage in range(self.stages):
            for unit in ("dense", "moe"):
                if count := self.held.get(unit, [0] * self.stages)[stage]:
                    self.passes(self.block(unit), count, self.repeated[self.own[stage]])
            self.passes(self.ends(stage))
        self.messages()
        if self.layout.fsdp > 1:
            self.sharded()
        self.sums()
        self.once()

    # ------------------------------------------------------------------------------------- what a rank has

    @cached_property
    def stages(self) -> int:
        """On this rank."""
        return stages_per_rank(self.layout.schedule, self.layout.stages_per_rank) if self.layout.pp > 1 else 1

    @cached_property
    def own(self) -> tuple[int, ...]:
        """This rank's stages, in the model's order."""
        if self.layout.pp == 1:
            return (0,)
        return stages_of_rank(self.layout.schedule, self.place["pp"], self.layout.pp, self.stages)

    @cached_property
    def place(self) -> dict[str, int]:
        return self.layout.place(self.rank)

    @cached_property
    def held(self) -> dict[str, list[int]]:
        """How many of each unit each of this rank's stages has; an embedding that the last one needs too, as
        its head or for multi-token prediction (MTP), is there a second time."""
        layout, spec = self.layout, self.spec
        layers = cut(spec, layout.pp, self.stages, layout.schedule, self.length, layout.stage_layers)
        counts = unit_counts(spec, layers).items()
        held = {unit: n[self.place["pp"]].tolist() for unit, n in counts if n.any()}
        if self.shared:
            held["embedding"] = [max(e, h) for e, h in zip(held["embedding"], held["head"], strict=True)]
        return held

    @cached_property
    def shared(self) -> bool:
        """Whether first and last stage both need the embedding."""
        return self.spec.tie_word_embeddings or self.spec.num_nextn_predict_layers > 0

    # --------------------------------------------------------------------------------------- activations

    @cached_property
    def t(self) -> float:
        """Tokens inside matrices, of one micro-batch."""
        return self.layout.micro_batch * self.length / self.layout.cp

    @cached_property
    def b(self) -> int:
        """Bytes of a number in compute precision."""
        return 4 if self.layout.precision == "fp32" else 2

    @cached_property
    def order(self) -> list[Action]:
        """What this pipeline rank does in a step."""
        layout = self.layout
        build, place = RULES[layout.schedule].build, self.place["pp"]
        steps = build(place, layout.pp, self.stages, layout.accumulation_steps)
        return [action for step in steps for action in actions_of(step)]

    @cached_property
    def repeated(self) -> dict[int, int]:
        """Of each of this rank's stages, passes through recomputed blocks in a step: one for a backward pass,
        two where it is split, but for the first stage, which has no gradient of its input to send."""
        layout = self.layout
        times = dict.fromkeys(self.own, layout.accumulation_steps if layout.recompute == "full" else 0)
        if layout.recompute == "full" and layout.pp > 1:
            for action in self.order:
                times[action.stage] += action.kind == "I" and action.stage > 0
        return times

    def passes(self, moves: Iterator[_Move], count: int = 1, repeated: int = 0) -> None:
        """All micro-batches' forward and backward passes, and so many repeated ones, of `count` layers."""
        for move in moves:
            times = self.layout.accumulation_steps
            forward = times + (repeated if move.repeats else 0)
            self.add(move.axis, move.op, count * forward * move.forward)
            self.add(move.axis, TRANSPOSED.get(move.op, move.op), count * times * move.backward)

    def move(self, axis: str, op: str, width: float, repeats: bool = True) -> _Move:
        """Of so many bytes for each token inside matrices."""
        return _Move(axis, op, self.t * width, self.t * width, repeats)

    def block(self, unit: str) -> Iterator[_Move]:
        spec, b, d, a = self.spec, self.b, self.spec.hidden_size, self.spec.attention
        if isinstance(a, GQA):
            gathered, kept = d, 2 * a.num_key_value_heads * a.head_dim / self.layout.tp
        else:
            gathered, kept = d if a.q_lora_rank is None else a.q_lora_rank + a.latent_dim, a.latent_dim
        yield self.move("tp", "all_gather", gathered * b)
        yield self.move("cp", "all_gather", self.layout.cp * kept * b)
        yield self.move("tp", "reduce_scatter", d * b)
        if unit == "dense":
            yield self.move("tp", "all_gather", d * b)
            yield self.move("tp", "reduce_scatter", d * b, repeats=False)
            return
        moe = spec.moe
        assert moe is not None
        counted = self.layout.micro_batch * moe.n_routed_experts * FLOAT
        yield _Move("sequence", "all_reduce", counted, 0)
        if self.layout.expert_tp > 1:
            yield self.move("tp", "all_gather", d * b + moe.num_experts_per_tok * FLOAT)
            yield _Move("tp", "all_gather", self.t * moe.num_experts_per_tok * INDEX, 0)
            yield self.move("tp", "reduce_scatter", d * b, repeats=False)
        elif moe.n_shared_experts:
            yield self.move("tp", "all_gather", d * b)
            yield self.move("tp", "reduce_scatter", d * b)
        if self.layout.ep > 1:
            yield from self.exchange(moe)

    def exchange(self, moe: MoE) -> Iterator[_Move]:
        """Sizes, then rows to experts and back."""
        layout, picks, d = self.layout, moe.num_experts_per_tok, self.spec.hidden_size
        tokens, body = self.t / layout.tp, d * self.b
        nodes, places = layout.ep // layout.ep_node, layout.ep_node
        if layout.exchange == "flat":
            legs = [("ep", tokens * picks)]
            told = [("ep", layout.ep)]
            carried = 1
        else:
            rail, node = reached(moe, nodes, places, round(tokens))
            legs = [("ep_rail", tokens * rail), ("ep_node", tokens * node)]
            told = [("ep_rail", nodes * (1 + 2 * places)), ("ep_node", places * 2)]
            carried = picks
        there = d + d // FP8_BLOCK * FLOAT if layout.wire == "fp8" else body
        for axis, count in told:
            yield _Move(axis, "all_to_all", count * INDEX, 0)
        for axis, rows in legs:
            out, back = there + carried * (ID + FLOAT), body + carried * FLOAT
            yield _Move(axis, "all_to_all", rows * out, rows * back)
            yield _Move(axis, "all_to_all", rows * body, rows * body, repeats=False)

    def ends(self, stage: int) -> Iterator[_Move]:
        d, b, depths = self.spec.hidden_size, self.b, self.spec.num_nextn_predict_layers
        first, last = self.own[stage] == 0, bool(self.held["head"][stage])
        for _ in range(first + last * depths):
            yield self.move("tp", "reduce_scatter", d * b)
        for _ in range(last * (1 + depths)):
            yield self.move("tp", "all_gather", d * b)
            # Log-sum-exp and the target's logit.
            yield _Move("tp", "all_gather", self.t * self.layout.tp * 2 * FLOAT, 0)

    def messages(self) -> None:
        """Hidden states to the next stage, gradients to the one before, where another rank has it."""
        size = self.t / self.layout.tp * self.spec.hidden_size * self.b
        for stage in self.own:
            for other in (stage - 1, stage + 1):
                if 0 <= other < self.layout.num_stages and other not in self.own:
                    self.add("pp", "send", self.layout.accumulation_steps * size)

    # ------------------------------------------------------------------------------------------- weights

    @cached_property
    def pieces(self) -> dict[str, list[_Piece]]:
        """Of each unit."""
        return {unit: [*self.pieces_of(params)] for unit, params in self.params.items()}

    @cached_property
    def params(self) -> dict[str, Params]:
        """What has a gradient, by unit."""
        spec, d = self.spec, self.spec.hidden_size
        units = {
            "embedding": embedding_params(spec),
            "head": head_params(spec),
            "joint": Params(mtp_proj=2 * d * d, norms=3 * d),
        }
        for layer in range(spec.num_hidden_layers + 1):
            units["moe" if spec.is_moe_layer(layer) else "dense"] = layer_params(spec, layer)
        return {unit: replace(params, selection_bias=0) for unit, params in units.items()}

    def pieces_of(self, params: Params) -> Iterator[_Piece]:
        layout, d, a = self.layout, self.spec.hidden_size, self.spec.attention
        columns = {"norms": 1, "attn_bias": 1, "mtp_proj": 2 * d}
        if not isinstance(a, GQA):
            columns |= {"attn_q_b": a.q_lora_rank or 1, "attn_kv_b": a.kv_lora_rank}
        for name, number in params.as_dict().items():
            kind = split(Params(**{name: number}))
            if kind.experts:
                yield self.experts(number / (layout.ep * layout.expert_tp))
                continue
            elements = number / (layout.tp if kind.cut else 1)
            sums = self.summed(bool(kind.cut) and layout.tp > 1)
            if name in ("dense_mlp", "shared_experts"):
                # gate and up have the width as rows, down has it as columns.
                yield _Piece(elements * 2 / 3, elements / (3 * d), "fsdp", *sums)
                yield _Piece(elements / 3, d, "fsdp", *sums)
            else:
                rows = d if name == "attn_o" else elements / columns.get(name, d)
                yield _Piece(elements, rows, "fsdp", *sums)

    def experts(self, elements: float) -> _Piece:
        layout, moe, d = self.layout, self.spec.moe, self.spec.hidden_size
        assert moe is not None
        shards = "expert_shard" if layout.ep > 1 else "fsdp"
        rows = d if self.cuts_hidden else moe.n_routed_experts // layout.ep
        sums = ("dp_replicate", "expert_data") if layout.ep > 1 else self.summed(layout.tp > 1)
        return _Piece(elements, rows, shards, *sums)

    @property
    def cuts_hidden(self) -> bool:
        """FSDP2 cuts experts' hidden dimension where their number does not divide."""
        ep, moe = self.layout.ep, self.spec.moe
        if moe is None:
            return False
        size = self.size("expert_shard" if ep > 1 else "fsdp")
        return moe.n_routed_experts // ep % size > 0 and self.spec.hidden_size % size == 0

    @staticmethod
    def summed(cut: bool) -> tuple[str, str]:
        """tp's ranks hold different parts of what it cuts, and see other tokens with what it repeats."""
        return ("dp_replicate", "data") if cut else ("replicas", "stage")

    def sharded(self) -> None:
        """FSDP2 gathers weights and scatters gradients unit by unit."""
        layout = self.layout
        for stage in range(self.stages):
            for unit, held in self.held.items():
                gathers = held[stage] * self.gathers(stage, whole=unit in ("embedding", "head"))
                each = layout.pp == 1 and layout.zero > 1
                scatters = held[stage] * (layout.accumulation_steps if each else 1)
                for piece in self.pieces[unit]:
                    padded = piece.padded(self.size(piece.shards))
                    self.add(piece.shards, "all_gather", gathers * padded * self.b)
                    self.add(piece.shards, "reduce_scatter", scatters * padded * FLOAT)

    def sums(self) -> None:
        """Gradients that FSDP2 has not summed, and those of an embedding that two pipeline ranks have."""
        index = {axis: self.groups[axis].index(self.rank) for axis in ("fsdp", "expert_shard")}
        for unit, count in self.distinct.items():
            for piece in self.pieces[unit]:
                axis, local = piece.sums, piece.elements
                if self.layout.fsdp > 1:
                    axis, local = piece.rest, piece.local(self.size(piece.shards), index[piece.shards])
                self.add(axis, "all_reduce", count * local * FLOAT)
                if unit == "embedding" and self.shared and RULES[self.layout.schedule].placement != "v":
                    self.add("ends", "all_reduce", local * FLOAT)

    @cached_property
    def distinct(self) -> dict[str, int]:
        """Units of this rank; both ends' embedding is one where they share a rank."""
        distinct = {unit: sum(held) for unit, held in self.held.items()}
        return distinct | {"embedding": min(distinct["embedding"], 1)}

    def gathers(self, stage: int, whole: bool) -> int:
        """How often a unit of a stage is gathered in a step; `whole`: the ends, which stay gathered."""
        layout = self.layout
        if layout.pp == 1:
            return layout.accumulation_steps * (1 if whole else 2) if layout.zero == 3 else 1
        if RULES[layout.schedule].default == 1:
            # Dropped after every forward pass, not after a backward pass, whose successor finds them.
            return layout.accumulation_steps + 1 if layout.zero == 3 and not whole else 1
        return self.fetched[self.own[stage]]

    @cached_property
    def fetched(self) -> dict[int, int]:
        """How often torch's schedules gather each stage: before each action what the next few stages lack."""
        if self.stages <= KEPT_STAGES:
            return dict.fromkeys(self.own, 1)
        order = [action.stage for action in self.order]
        times, active = dict.fromkeys(self.own, 0), set()
        for at in range(len(order)):
            wanted = [*dict.fromkeys(order[at:])][:KEPT_STAGES]
            for stage in wanted:
                times[stage] += stage not in active
            active = set(wanted)
        return times

    def matrices(self) -> None:
        """Muon's momenta, each summed up whole where a rank has a part of its matrix."""
        layout = self.layout
        for unit, count in self.distinct.items():
            for name, number in by_muon(self.params[unit]).as_dict().items():
                kind = split(Params(**{name: number}))
                if kind.experts:
                    parts = layout.expert_tp > 1 or (layout.fsdp > 1 and self.cuts_hidden)
                else:
                    parts = layout.fsdp > 1 or (layout.tp > 1 and kind.cut > 0)
                self.add("stage", "all_reduce", count * parts * number * FLOAT)

    def once(self) -> None:
        """What a step sends besides: the gradient's norm, two losses, and experts' loads."""
        self.add("world", "all_reduce", 3 * DOUBLE)
        if self.spec.moe is not None and (routers := self.distinct.get("moe")):
            self.add("stage", "all_reduce", routers * self.spec.moe.n_routed_experts * FLOAT)
        self.add("pp", "all_reduce", self.layout.pp * 3 * DOUBLE)
