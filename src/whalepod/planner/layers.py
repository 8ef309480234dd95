"""How long each kind of layer takes for one micro-batch: products, attention, memory traffic, launches,
and what travels.

Times are rows of a matrix: forward (F), gradient of the input (I), gradient of the weights (W), and the
part of the forward pass that recomputation repeats (R), each a column over candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from whalepod.planner.candidates import Candidates
from whalepod.planner.kernels import Kernels
from whalepod.planner.network import UNREACHABLE_S, Network
from whalepod.planner.roofline import smooth_max
from whalepod.planner.routing import expected_nodes
from whalepod.planner.software import Software
from whalepod.spec.counts import attended_keys, attention_flops
from whalepod.spec.model import GQA, ModelSpec

F, I, W, R = range(4)  # noqa: E741
UP_LAUNCHES = 0.3  # of attention's launches that MLA's up-projections and the rotary embedding are
Again = np.ndarray | bool
FP8_SCALE = 1 + 4 / 128  # bytes of an FP8 element with its share of a 1 x 128 tile's scale


@dataclass
class Layer:
    """Seconds of one layer and micro-batch; arrays of shape [4, rows] by part, communication [2, rows]
    (forward, backward) by axis, launches on the host [4, rows]."""

    rows: int
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    moves: dict[str, np.ndarray] = field(default_factory=dict)
    host: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        self.host = np.zeros((4, self.rows))

    def add(self, part: str, passes: tuple[int, ...], seconds: np.ndarray, again: Again = False) -> None:
        """Adds seconds to a part's passes; and to R where `again`."""
        table = self.parts.setdefault(part, np.zeros((4, self.rows)))
        for each in passes:
            table[each] += seconds
        if F in passes:
            table[R] += np.where(again, seconds, 0.0)

    def move(self, axis: str, forward: np.ndarray, backward: np.ndarray) -> None:
        table = self.moves.setdefault(axis, np.zeros((2, self.rows)))
        table[0] += forward
        table[1] += backward

    def take(self, index: np.ndarray) -> Layer:
        """The columns of `index`."""
        parts = {name: table[:, index] for name, table in self.parts.items()}
        moves = {name: table[:, index] for name, table in self.moves.items()}
        out = Layer(len(index), parts, moves)
        out.host = self.host[:, index]
        return out

    @cached_property
    def device(self) -> np.ndarray:
        """Seconds of the GPU's kernels, [4, rows]."""
        return sum(self.parts.values(), np.zeros((4, self.rows)))


@dataclass(frozen=True)
class LayerCosts:
    """Builds `Layer`s for candidates. imbalance: tokens of the busiest rank's experts over the mean."""

    spec: ModelSpec
    c: Candidates
    sequence_length: int
    kernels: Kernels
    network: Network
    software: Software
    imbalance: float = 1.0

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of a micro-batch on each rank between tensor-parallel regions' gathers."""
        return self.c.micro_batch * self.sequence_length / self.c.cp

    @property
    def b(self) -> np.ndarray:
        """Bytes of a number between products."""
        return np.where(self.c.precision == "fp32", 4.0, 2.0)

    @property
    def shard(self) -> np.ndarray:
        """... and on its own part of the sequence."""
        return self.tokens / self.c.tp

    def layer(self, kind: str) -> Layer:
        """One `dense`, `moe` or `mtp` layer, the `embedding`, or the `head` with its loss."""
        out = Layer(len(self.c))
        if kind == "embedding":
            out.add("memory", (F, W), self.kernels.stream(self.tokens * self.spec.hidden_size * 2 * self.b))
            self._add_up(out, self.spec.vocab_size * self.spec.hidden_size / self.c.tp)
        elif kind == "head":
            self._head(out)
        else:
            self._attention(out)
            if kind == "dense":
                self._dense(out)
            else:
                self._experts(out)
            if kind == "mtp":
                self._product(
                    out, "projections", self.shard, 2 * self.spec.hidden_size, self.spec.hidden_size
                )
        if kind in ("embedding", "head"):
            return out  # recomputation is of blocks
        for part in out.parts.values():
            part[R] = np.where(self.c.recompute["all"], part[F], part[R])
        out.host[R] = np.where(self.c.recompute["all"], out.host[F], out.host[R])
        return out

    # ------------------------------------------------------------------------------------------ parts

    def _product(
        self, out: Layer, part: str, rows, inner, columns, again: Again = False, precision=None
    ) -> None:
        """A linear layer: the product and the two of its backward pass."""
        k, p = self.kernels, self.c.precision if precision is None else precision
        out.add(part, (F,), k.product(rows, inner, columns, p), again)
        out.add(part, (I,), k.product(rows, columns, inner, p))
        out.add(part, (W,), k.product(inner, rows, columns, p, out_bytes=self._written))
        self._add_up(out, inner * columns)

    @property
    def _written(self) -> float | None:
        """Bytes per element of a weight's gradient that its product moves: FP32 sums, or the result alone."""
        return 8.0 if self.software.framework.dummy_gradients else None

    def _add_up(self, out: Layer, elements) -> None:
        """Gradients read and their FP32 sums read and written, where the product does not add by itself."""
        if not self.software.framework.dummy_gradients:
            out.add("gradients", (W,), self.kernels.stream(elements * (self.b + 8.0)))

    def _memory(self, out: Layer, forward, backward, again: Again = False) -> None:
        """Numbers that elementwise work reads and writes."""
        each = self.b * np.where(self.c.precision == "fp32", *self.software.elementwise[::-1])
        out.add("memory", (F,), self.kernels.stream(forward * each), again)
        out.add("memory", (I,), self.kernels.stream(backward * each))

    def _quantize(self, out: Layer, elements, again: Again = False) -> None:
        """BF16 read, FP8 written along rows and along columns (the weights' gradients want those); the
        gradients of the outputs likewise."""
        moved = np.where(self.c.precision == "fp8", elements * 4.0, 0.0) * self.software.quantize
        out.add("quantize", (F, I), self.kernels.stream(moved), again)

    def _launch(self, out: Layer, part: str, again: Again = False, count: np.ndarray | float = 1.0) -> None:
        if part in self.software.graphed:
            return
        seconds = self.software.host_us * 1e-6 * self.software.launches[part] * count
        out.host[F] += seconds
        out.host[I] += seconds
        out.host[W] += seconds
        out.host[R] += np.where(again, seconds, 0.0)

    def _attention(self, out: Layer) -> None:
        spec, c, a = self.spec, self.c, self.spec.attention
        d, heads, tokens = spec.hidden_size, spec.num_attention_heads, self.tokens
        up, norms = c.recompute["mla_up_proj"], c.recompute["norms"]
        ring = self.software.framework.ring
        if isinstance(a, GQA):
            width = (heads + 2 * a.num_key_value_heads) * a.head_dim / c.tp
            self._product(out, "projections", tokens, d, width)
            self._product(out, "projections", tokens, heads * a.head_dim / c.tp, d)
            wide, keys, values = width, a.head_dim, a.head_dim
            inputs, gathered = d + heads * a.head_dim, d
            travels = 2 * a.num_key_value_heads * a.head_dim / c.tp
        else:
            rank = a.q_lora_rank
            if rank is not None:
                self._product(out, "projections", self.shard, d, rank)
            # Plain queries want the gathered input, and the latents are made of it too, on every rank.
            self._product(out, "projections", tokens if rank is None else self.shard, d, a.latent_dim)
            self._product(out, "projections", tokens, rank or d, heads * a.qk_head_dim / c.tp, up)
            both = a.qk_nope_head_dim + a.v_head_dim
            # This project gathers latents, and both halves of a rank's part expand all that are before them.
            expanded = tokens * (1 if ring else np.where(c.cp > 1, c.cp + 0.5, 1))
            self._product(out, "projections", expanded, a.kv_lora_rank, heads * both / c.tp, up)
            self._product(out, "projections", tokens, heads * a.v_head_dim / c.tp, d)
            wide = heads * (2 * a.qk_head_dim + a.v_head_dim) / c.tp
            keys, values = a.qk_head_dim, a.v_head_dim
            travels = heads * (keys + values) / c.tp if ring else np.full(len(c), float(a.latent_dim))
            inputs = d + (rank or 0) + a.kv_lora_rank + heads * a.v_head_dim
            gathered = d if rank is None else rank + a.latent_dim
        # A token attends to half of its sequence on average, wherever context parallelism put it, or to what
        # a sparse model's indexer selects, which scores them all.
        kept = attended_keys(spec, self.sequence_length)
        flops = 2.0 * tokens * kept * heads / c.tp * (keys + values)
        if spec.indexer is not None:
            extra = attention_flops(spec, 0, self.sequence_length / 2)
            scores = tokens / c.tp * (extra.indexer_scores + extra.indexer_proj)
            size = self.sequence_length, spec.indexer.index_head_dim
            out.add("attention", (F,), self.kernels.attention(scores, c.precision, *size))
            out.add("attention", (I,), self.kernels.attention(2.0 * scores, c.precision, *size))
        core = self.kernels.attention(flops, c.precision, self.sequence_length, keys)
        out.add("attention", (F,), core)
        # Five products instead of two, scores among them computed again.
        back = self.kernels.attention(2.5 * flops, c.precision, self.sequence_length, keys, backward=True)
        out.add("attention", (I,), back)
        # Two norms and two residual additions read and write the hidden states ten times; rotary
        # embedding and building keys read and write queries, keys and values.
        self._memory(out, self.shard * d * 6.0, self.shard * d * 10.0)
        self._memory(out, self.shard * d * 4.0, 0.0, norms)
        self._memory(out, tokens * wide * 2.0, tokens * wide * 2.0, up)
        self._quantize(out, tokens * inputs / c.tp)
        self._launch(out, "attention")
        out.host[R] += np.where(up, UP_LAUNCHES * out.host[F], 0.0)
        self._tensor(out, gathered, d)
        size, inner = c.cp, self.network.inner(c.cp, c.tp)
        moved = tokens * c.cp * travels * self.b
        there = self.network.all_gather(moved, size, inner)
        again = self.network.reduce_scatter(moved, size, inner)
        if ring:  # the next part's keys and values travel while attention works on this one's
            there, again = np.maximum(there - core, 0.0), np.maximum(again - back, 0.0)
        out.move("cp", there, again)

    def _tensor(self, out: Layer, gathered: float, scattered: float) -> None:
        """All-gather before, reduce-scatter after a region that `tp` splits; transposed backward."""
        c, n = self.c, self.network
        inner = n.inner(c.tp)
        before, after = self.tokens * gathered * self.b, self.tokens * scattered * self.b
        out.move(
            "tp",
            n.all_gather(before, c.tp, inner) + n.reduce_scatter(after, c.tp, inner),
            n.all_gather(after, c.tp, inner) + n.reduce_scatter(before, c.tp, inner),
        )

    def _dense(self, out: Layer) -> None:
        d, width = self.spec.hidden_size, self.spec.intermediate_size / self.c.tp
        again = self.c.recompute["mlp"]
        self._product(out, "dense", self.tokens, d, 2 * width, again)
        self._product(out, "dense", self.tokens, width, d, again)
        # Megatron recomputes the activation function of experts only.
        act = self.c.recompute["moe_act"] & (not self.software.framework.fused_swiglu)
        self._memory(out, self.tokens * width * 3.0, self.tokens * width * 5.0, again | act)
        self._quantize(out, self.tokens * (d + width), again)
        self._launch(out, "shared", again)
        self._tensor(out, d, d)

    def _experts(self, out: Layer) -> None:
        spec, c, k, moe = self.spec, self.c, self.kernels, self.spec.moe
        assert moe is not None
        d, width, picks = spec.hidden_size, moe.moe_intermediate_size, moe.num_experts_per_tok
        act = c.recompute["moe_act"]
        # The router decides in BF16 or FP32, never in FP8.
        high = np.where(c.precision == "fp8", "bf16", c.precision)
        self._product(out, "router", self.shard, d, moe.n_routed_experts, precision=high)
        self._launch(out, "router")
        if moe.n_shared_experts:
            shared = moe.n_shared_experts * width / c.tp
            self._product(out, "shared", self.tokens, d, 2 * shared)
            self._product(out, "shared", self.tokens, shared, d)
            self._memory(out, self.tokens * shared * 3.0, self.tokens * shared * 5.0, act)
            self._quantize(out, self.tokens * (d + shared))
            self._launch(out, "shared")
            self._tensor(out, d, d)
        # Without expert parallelism every rank has all experts, cut by width, and the whole sequence.
        tokens = np.where(c.ep == 1, self.tokens, self.shard)
        local = moe.n_routed_experts / c.ep
        rows = self.imbalance * tokens * picks / local
        cut = width / c.expert_tp
        for inner, columns in ((d, 2 * cut), (cut, d)):
            out.add("experts", (F,), k.grouped(local, rows, inner, columns, c.precision))
            out.add("experts", (I,), k.grouped(local, rows, columns, inner, c.precision))
            out.add(
                "experts",
                (W,),
                k.grouped(local, inner, rows, columns, c.precision, out_bytes=self._written, of="inner"),
            )
            self._add_up(out, local * inner * columns)
        routed = self.imbalance * tokens * picks
        self._memory(out, routed * cut * 3.0, routed * cut * 5.0, act)
        self._quantize(out, routed * (d + cut))
        copies = 2 if self.software.dispatcher == "all-to-all" else 1
        moved = routed * d * self.b * 4.0 * copies * self.software.permute
        out.add("permute", (F, I), self.kernels.gather(moved))
        self._launch(out, "dispatch")
        self._launch(out, "experts")
        self._launch(out, "expert", count=local)
        seconds = self._exchange(tokens)
        behind = np.zeros((4, len(c)))
        if self.software.behind_shared and "shared" in out.parts:
            # Half of the exchange is the way there (backward: the way back's transpose).
            behind = np.minimum(out.parts["shared"], seconds / 2)
        out.move("ep", seconds - behind[F], seconds - behind[I])

    def _exchange(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds of one dispatch and one combine."""
        moe, c, n = self.spec.moe, self.c, self.network
        assert moe is not None
        d, picks = self.spec.hidden_size, moe.num_experts_per_tok
        there = np.where(c.wire == "fp8", FP8_SCALE, self.b) * d
        both = tokens * (there + self.b * d) * self.imbalance
        inner = n.inner(c.ep)
        inside, outside = self.software.exchange[self.software.dispatcher]
        seconds = np.zeros(len(c))
        for ep, ranks in set(zip(c.ep.tolist(), inner.tolist(), strict=True)):
            rows = (c.ep == ep) & (inner == ranks)
            if ep == 1:
                continue
            nodes = -(-ep // ranks)
            if self.software.dispatcher == "all-to-all":
                copies, crossing = picks * (ep - 1) / ep, picks * (ep - ranks) / ep
                local = copies - crossing
            else:
                # One copy to each node (rank, inside), however many experts a token has there.
                hit = expected_nodes(moe, nodes)
                crossing = hit * (nodes - 1) / nodes if nodes > 1 else 0.0
                within = picks / hit
                local = hit * ranks * (1 - (1 - 1 / ranks) ** within) * (ep - 1) / ep
            if nodes == 1 and (once := n.all_to_all(both[rows] * local / 2, ep)) is not None:
                seconds[rows] = 2 * once
                continue
            card = n.card * outside
            over = both[rows] * crossing / card if card else np.full(rows.sum(), UNREACHABLE_S)
            times = np.maximum(both[rows] * local / n.link(ranks, inside), over if nodes > 1 else 0.0)
            seconds[rows] = times + 2 * (15e-6 + 1e-6 * ep)
        return seconds

    def _head(self, out: Layer) -> None:
        c, d, v = self.c, self.spec.hidden_size, self.spec.vocab_size / self.c.tp
        high = np.where(c.precision == "fp8", "bf16", c.precision)
        self._product(out, "head", self.tokens, d, v, precision=high)
        # Logits written in BF16, read and widened for the softmax, their gradient written and read.
        logits = self.kernels.stream(self.tokens * v * self.software.logits)
        out.add("memory", (F,), logits * 10.0)
        out.add("memory", (I,), logits * 6.0)
        self._launch(out, "shared")
        self._tensor(out, d, 0)


def together(device: np.ndarray, host: np.ndarray, sharpness: float) -> np.ndarray:
    """Seconds of kernels that the device works on and the host launches (`Software.host_sharpness`)."""
    return smooth_max(device, host, power=sharpness)
