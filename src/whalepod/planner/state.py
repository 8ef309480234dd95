"""Training state per device: weights, gradients, masters and moments, and whole copies of what is sharded.

ZeRO (arXiv 1910.02054) shares state over the dp_shard x cp devices that would hold the same (for experts over
`expert_shard`): stage 1 masters and moments, stage 2 gradients too, stage 3 weights too. Tensor parallelism
cuts the wide matrices, as `parallel.sharding.TABLE` says, and expert parallelism deals the experts out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from whalepod.planner.candidates import Candidates, Column
from whalepod.planner.cut import Cut
from whalepod.spec.counts import Params, attention_params, expert_params, layer_params
from whalepod.spec.model import ModelSpec

FP8_WEIGHT_BYTES = 2 * (1 + 4 / (128 * 128))
"""Of a weight in FP8 training: values with a scale per block, and once more transposed for the products of
the backward pass. They take the place of the BF16 copy (Megatron's `fp8-param-gather`); masters stay FP32.
DeepSeek-V3, section 3.3, quantises the matrices of blocks; embedding, head, router and norms stay BF16."""


@dataclass(frozen=True)
class StateTypes:
    """Bytes per element of training state.

    The default is Megatron's: BF16 weights, FP32 gradient sums, masters and Adam moments.
    shards_weights: with ZeRO 3 shards of the weights lie beside those of the masters; else (FSDP2 over FP32
    parameters) weights are made from the masters as they are gathered. whole_in_pipelines: a pipeline reduces
    gradients once a step (torch's do), so they lie whole whatever ZeRO's stage. muon: the matrices of blocks
    have the first moment only (`by_muon`).
    """

    weight: float = 2
    master: float = 4
    gradient: float = 4
    moment1: float = 4
    moment2: float = 4
    shards_weights: bool = True
    whole_in_pipelines: bool = False
    muon: bool = False


MEGATRON_STATE = StateTypes()
DEEPSEEK_STATE = StateTypes(moment1=2, moment2=2)
"""BF16 moments (DeepSeek-V3, section 3.3.2)."""
OWN_STATE = StateTypes(shards_weights=False, whole_in_pipelines=True)
"""This project's runtime: 18 bytes per parameter replicated, 16 / shards fully sharded."""
BF16_STATE = StateTypes(master=0, gradient=2, moment1=2, moment2=2)
"""BF16 throughout, without masters: 8 bytes."""

STATE = ("weights", "gradients", "optimizer", "gathered", "passing", "sent", "stays", "kept")
SHARERS = ("plain", "experts")
Counts = Mapping[str, np.ndarray]
"""How many of each unit a pipeline rank's stages hold, [pp, stages]. Units: blocks (`dense`, `moe`),
`embedding`, `head` with the final norm, and `joint`, what an MTP depth has beside its block."""


class Elements(NamedTuple):
    """Parameters of a unit: `whole` on every tp rank, `cut` over tp, `experts`; and what FP8 training
    quantises of the first two (experts it quantises all)."""

    whole: int
    cut: int
    experts: int
    whole_fp8: int
    cut_fp8: int


@dataclass(frozen=True)
class State:
    """The state of candidates, in bytes; arrays [rows, pp] for the rows and counts of one pipeline."""

    spec: ModelSpec
    candidates: Candidates
    types: StateTypes

    @property
    def block_kinds(self) -> tuple[str, ...]:
        return ("dense",) if self.spec.moe is None else ("dense", "moe")

    def of(self, counts: Counts, rows: np.ndarray) -> dict[str, np.ndarray]:
        """`weights`, `gradients`, `optimizer` (masters and moments), `gathered`; `passing`: what of that is
        not there after the last forward pass; `sent`: gradients of one block on their way to shards; `stays`:
        weights that a pipeline's backward pass leaves gathered; `kept`: sums of the ends' gradients, which
        come last, that FSDP2 holds until the next micro-batch sends some."""
        number = self._number(counts)
        c, types = self.candidates, self.types
        zero, fsdp = c.zero[rows, None], c.fsdp[rows, None]
        # FSDP2 makes weights of sharded masters; where nothing is sharded there is a copy to compute with.
        made = (fsdp > 1) & (not types.shards_weights)
        # In FP32 the weights are the masters, unless they are gathered copies of these.
        same = (c.precision[rows] == "fp32")[:, None] & ~made
        whole = (c.pp[rows, None] > 1) & types.whole_in_pipelines
        out = {name: np.zeros((len(rows), len(number["head"]))) for name in STATE}
        held, second = self.elements(counts, rows), self.second_moments(counts, rows)
        blocks: dict[str, np.ndarray] = {}
        sent: dict[str, np.ndarray] = {}
        last: np.ndarray | float = 0.0
        for sharer in SHARERS:
            shards, elements = self.shards[sharer][rows, None], held[sharer]
            weights = sum(number[u] * self.bytes[u][sharer][rows, None] for u in number)
            out["weights"] += np.where(zero < 3, weights, np.where(made, 0, weights / shards))
            out["gradients"] += elements * types.gradient / np.where((zero > 1) & ~whole, shards, 1)
            kept = elements * (np.where(same, 0, types.master) + types.moment1)
            out["optimizer"] += (kept + second[sharer] * types.moment2) / shards
            ends = sum((number[u] > 0) * self.bytes[u][sharer][rows, None] for u in ("embedding", "head"))
            gathers, takes = (zero == 3) & ((shards > 1) | made), (zero > 1) & (shards > 1)
            out["gathered"] += np.where(gathers, ends, 0)
            last_sent = sum(
                (number[u] > 0) * self.local[u][sharer][rows, None] for u in ("embedding", "head")
            )
            out["kept"] += np.where(takes & ~whole, last_sent * types.gradient, 0)
            out["stays"] += np.where(gathers & whole, weights, 0)
            for kind in self.block_kinds:
                has = number[kind] > 0
                weight = has * np.where(gathers, self.bytes[kind][sharer][rows, None], 0)
                gradient = has * np.where(takes, self.local[kind][sharer][rows, None], 0)
                blocks[kind] = blocks.get(kind, 0.0) + weight
                sent[kind] = sent.get(kind, 0.0) + gradient * (self.compute[rows, None] + types.gradient)
                last = weight if sharer == ("experts" if kind == "moe" else "plain") else last
        # Two blocks are whole, one at work and the next on its way, and so are the ends, which are needed
        # from the first to the last; of gradients one block's, beside what is sent of it. After the forward
        # pass FSDP2 still has the result of its last gather, a block's experts.
        largest = np.max(list(blocks.values()), axis=0)
        out["gathered"] += 2 * largest
        out["passing"] = np.where(whole, 0, 2 * largest - last)
        out["sent"] = np.max(list(sent.values()), axis=0)
        return out

    def elements(self, counts: Counts, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters on each rank before ZeRO shards them, by who shares them."""
        return self._sum(self.local, counts, rows)

    def second_moments(self, counts: Counts, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Those of them that have a second moment."""
        return self._sum(self._local(self._by_adamw) if self.types.muon else self.local, counts, rows)

    def _sum(
        self, local: dict[str, dict[str, Column]], counts: Counts, rows: np.ndarray
    ) -> dict[str, np.ndarray]:
        number = self._number(counts)
        zeros = np.zeros((len(rows), len(number["head"])))
        return {s: sum((number[u] * local[u][s][rows, None] for u in number), zeros) for s in SHARERS}

    def dummies(self, counts: Counts, rows: np.ndarray) -> np.ndarray:
        """One gradient in compute precision for each weight shape among a rank's blocks."""
        spec, c = self.spec, self.candidates
        d, has = spec.hidden_size, {name: count.sum(1) > 0 for name, count in counts.items()}
        whole, cut, *_ = split(attention_params(spec), matrices_only=True)
        total = (has["dense"] | has["moe"]) * (whole + cut / c.tp)[rows, None]
        total = total + has["dense"] * (3 * d * spec.intermediate_size / c.tp)[rows, None]
        total = total + has["joint"] * 2.0 * d * d
        if spec.moe is not None:
            expert = expert_params(spec) / c.expert_tp
            shared = expert_params(spec) * spec.moe.n_shared_experts / c.tp
            total = total + has["moe"] * (expert + np.where(shared == expert, 0, shared))[rows, None]
        return total * self.compute[rows, None]

    def largest_gradient(self, counts: Counts, rows: np.ndarray) -> np.ndarray:
        """Of one weight in a rank's blocks, in compute precision: gate and up of all experts, or an MLP's
        gate. 0 where ZeRO takes gradients apart: there they are among what is `gathered`."""
        spec, c = self.spec, self.candidates
        has = {name: count.sum(1) > 0 for name, count in counts.items()}
        largest = has["dense"] * (spec.hidden_size * spec.intermediate_size / c.tp)[rows, None]
        if spec.moe is not None:
            largest = np.maximum(largest, has["moe"] * (2 / 3 * self.local["moe"]["experts"])[rows, None])
        whole = (c.zero == 1) | (c.fsdp == 1)
        return largest * (whole * self.compute)[rows, None]

    @cached_property
    def compute(self) -> Column:
        """Bytes of a number in compute precision."""
        return np.where(self.candidates.precision == "fp32", 4.0, 2.0)

    @cached_property
    def shards(self) -> dict[str, Column]:
        """Devices that share the state of what is not an expert, and of experts."""
        c = self.candidates
        return {"plain": c.fsdp, "experts": np.where(c.ep > 1, c.expert_shard, c.fsdp)}

    @cached_property
    def local(self) -> dict[str, dict[str, Column]]:
        """Elements on a device before ZeRO shards them: {unit: {plain, experts}}."""
        return self._local(self._units)

    def _local(self, units: dict[str, Elements]) -> dict[str, dict[str, Column]]:
        c = self.candidates
        return {
            unit: {"plain": e.whole + e.cut / c.tp, "experts": e.experts / (c.ep * c.expert_tp)}
            for unit, e in units.items()
        }

    @cached_property
    def bytes(self) -> dict[str, dict[str, Column]]:
        """The same as weights that compute, in bytes."""
        c = self.candidates
        high = np.where(c.precision == "fp32", 4.0, self.types.weight)
        low = np.where(c.precision == "fp8", FP8_WEIGHT_BYTES, high)
        out: dict[str, dict[str, Column]] = {}
        for unit, e in self._units.items():
            whole = (e.whole - e.whole_fp8) * high + e.whole_fp8 * low
            cut = (e.cut - e.cut_fp8) * high + e.cut_fp8 * low
            out[unit] = {"plain": whole + cut / c.tp, "experts": self.local[unit]["experts"] * low}
        return out

    @property
    def _units(self) -> dict[str, Elements]:
        return {unit: split(params) for unit, params in self._params.items()}

    @property
    def _by_adamw(self) -> dict[str, Elements]:
        """What Muon leaves to AdamW."""
        matrices = {unit: by_muon(params).scaled(-1) for unit, params in self._params.items()}
        return {unit: split(params + matrices[unit]) for unit, params in self._params.items()}

    @cached_property
    def _params(self) -> dict[str, Params]:
        spec, d = self.spec, self.spec.hidden_size
        table = spec.vocab_size * d
        units = {
            "embedding": Params(embedding=table),
            "head": Params(head=0 if spec.tie_word_embeddings else table, norms=d),
            "joint": Params(mtp_proj=2 * d * d, norms=3 * d),
        }
        for kind in self.block_kinds:
            layers = (i for i in range(spec.num_hidden_layers + 1) if spec.is_moe_layer(i) == (kind == "moe"))
            layer = next(layers, None)
            units[kind] = Params() if layer is None else layer_params(spec, layer)
        return units

    def _number(self, counts: Counts) -> dict[str, np.ndarray]:
        """Units on each rank, [pp]. An embedding that the last stage needs too, as its head or for MTP, is
        there a second time unless the first stage is on the same rank."""
        number = {unit: counts[unit].sum(1).astype(float) for unit in self._units}
        if self.spec.tie_word_embeddings or self.spec.num_nextn_predict_layers:
            number["embedding"] = np.maximum(number["embedding"], number["head"])
        return number


def unit_counts(spec: ModelSpec, layers: Cut) -> Counts:
    """How many of each unit a pipeline's stages hold; MTP is one more block of the last layer's kind."""
    depths = spec.num_nextn_predict_layers
    kind = "moe" if spec.is_moe_layer(spec.num_hidden_layers) else "dense"
    counts = {
        "dense": layers.dense,
        "moe": layers.moe,
        "embedding": layers.embedding,
        "head": layers.head,
        "joint": depths * layers.head,
    }
    return counts | {kind: counts[kind] + depths * layers.head}


def by_muon(p: Params) -> Params:
    """The matrices that Muon moves; AdamW has the rest (`train.muon`)."""
    return replace(p, embedding=0, head=0, norms=0, attn_bias=0, selection_bias=0)


def split(p: Params, matrices_only: bool = False) -> Elements:
    """Parameters by who holds them; `matrices_only` leaves out norms, biases and the indexer."""
    down = p.attn_q_a + p.attn_kv_a
    heads = p.attention - down - p.attn_bias
    quantised = heads + p.dense_mlp + p.shared_experts
    if matrices_only:
        return Elements(down, quantised, p.routed_experts, down, quantised)
    return Elements(
        whole=down + p.indexer + p.norms + p.router + p.selection_bias + p.mtp_proj,
        cut=quantised + p.attn_bias + p.embedding + p.head,
        experts=p.routed_experts,
        whole_fp8=down + p.indexer,
        cut_fp8=quantised,
    )
