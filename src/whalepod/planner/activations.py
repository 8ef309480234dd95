"""What training keeps in memory for the backward pass, per block and micro-batch, by formula.

Autograd keeps what derivatives need: of a matrix product its input, of a norm its input, of attention its
queries, keys, values, output and log-sum-exp, of SwiGLU its two inputs. Sums, gathers and moves of tokens
keep nothing. The counts below go through a block in that order (arXiv 2205.05198, section 4, does so for
GPT). A tensor that two of them need is counted once.

`t` are the tokens a device sees inside matrices: micro_batch x sequence / cp; `ts` those it has between them,
t / tp (sequence parallelism). Bytes are float64 arrays, one element a candidate.

FP8 (DeepSeek-V3, section 3.3; Transformer Engine's block scaling): a product keeps the FP8 copy of its input
that the weights' gradient reads, one byte and a scale per 128; everything else stays BF16. So the router's
input and attention's output are there in both forms. Not assumed: DeepSeek's own FP8 inputs of SwiGLU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from whalepod.planner.candidates import Candidates, Column
from whalepod.planner.routing import reached
from whalepod.spec.layout import FP8_BLOCK
from whalepod.spec.model import GQA, ModelSpec

PARTS = ("attention", "dense_mlp", "experts", "norms", "router", "ends")
"""Where activations arise. `norms`: the residual stream (the norms' inputs) and the norms' outputs, which the
products after them read. `ends`: final norm, head's input, multi-token prediction's (MTP) joint."""

Parts = dict[str, Column]


@dataclass(frozen=True)
class Framework:
    """How a training stack keeps things; the default is Megatron's with Transformer Engine.

    logits: bytes per logit from the loss to the head's backward pass. 2: a fused loss that turns BF16 logits
    into their gradient in place; 6: FP32 softmax beside BF16 gradient (unfused). 0: a loss in slices that
    keeps the gradients of the head's input and weight instead (`models.loss`). loss_slice: logits of such a
    slice, in compute precision and in FP32.
    dummy_gradients: weights' gradients are added to FP32 sums by the product itself, and autograd is handed
    one unused tensor per distinct weight shape, which stays (`get_dummy_wgrad`). Else a weight's gradient
    exists in compute precision for a moment.
    regathers: with sequence parallelism a product keeps this rank's part of its input and gathers it again.
    ring: keys and values of other cp ranks are not kept. output_twice: with cp attention's output is kept as
    the kernel left it and as the next product reads it (heads and sequence parts exchanged; Transformer
    Engine 2.8 and later).
    fused_norms: a norm keeps its input only, else both an FP32 copy of it and its normalised form (RMSNorm on
    CPUs). float_router: the router keeps an FP32 copy of its input.
    fused_swiglu: SwiGLU keeps its inputs only. padded_values: values as wide as keys (`models.attention`).
    copies: of the rows that travel to or from experts, how many exist at a time: what is sent, what is
    received, and in Megatron the rows dispatched, which its layer still names while their results return.
    sorts_again: where cheap things are made twice, rows sorted by expert are too, of those that arrived: a
    token's row comes once to a rank, however many of its experts are there.
    late_gradients: blocks' gradients take memory only once there are any (Megatron's buffers always do).
    waits_with_gradients: between the halves of a split backward pass the gradients of all products' results
    wait, and with them part of what was recomputed (torch's pipelines; `memory._waits_again`).
    """

    logits: float = 2
    loss_slice: int = 0
    dummy_gradients: bool = True
    regathers: bool = True
    ring: bool = True
    output_twice: bool = True
    fused_norms: bool = True
    float_router: bool = False
    fused_swiglu: bool = True
    padded_values: bool = False
    copies: int = 3
    sorts_again: bool = False
    late_gradients: bool = False
    waits_with_gradients: bool = False


MEGATRON = Framework()
OWN = Framework(
    logits=0,
    loss_slice=1 << 22,
    dummy_gradients=False,
    regathers=False,
    ring=False,
    output_twice=False,
    float_router=True,
    fused_swiglu=False,
    padded_values=True,
    copies=2,
    sorts_again=True,
    late_gradients=True,
    waits_with_gradients=True,
)
OWN_CPU = replace(OWN, fused_norms=False)
"""The runtime of `parallel/` and `models/`, on GPUs and on CPUs."""


@dataclass(frozen=True)
class Activations:
    """Bytes per micro-batch and block of candidates; `imbalance`: rows of the busiest rank's experts over
    the mean."""

    spec: ModelSpec
    candidates: Candidates
    sequence_length: int
    framework: Framework = MEGATRON
    imbalance: float = 1.0

    @cached_property
    def t(self) -> Column:
        """Tokens inside matrices."""
        return self.candidates.micro_batch * self.sequence_length / self.candidates.cp

    @cached_property
    def ts(self) -> Column:
        """Tokens between them."""
        return self.t / self.candidates.tp

    @cached_property
    def b(self) -> Column:
        """Bytes of a number in compute precision."""
        return np.where(self.candidates.precision == "fp32", 4.0, 2.0)

    @cached_property
    def fp8(self) -> Column:
        return self.candidates.precision == "fp8"

    @cached_property
    def li(self) -> Column:
        """Bytes of an element of a product's kept input."""
        return np.where(self.fp8, 1 + 4 / 128, self.b)

    @cached_property
    def gathered(self) -> Column:
        """Tokens of the kept input of a product that sequence parallelism gathers for."""
        return self.ts if self.framework.regathers else self.t

    @cached_property
    def rows(self) -> Column:
        """Rows of this rank's experts: top-k of its own tokens, on average; of all where tp cuts experts."""
        assert self.spec.moe is not None
        tokens = np.where(self.candidates.expert_tp > 1, self.t, self.ts)
        return tokens * self.spec.moe.num_experts_per_tok * self.imbalance

    @cached_property
    def _arrived(self) -> Column:
        """Bytes of the rows that came for this rank's experts, as they travelled."""
        m, d, c = self.spec.moe, self.spec.hidden_size, self.candidates
        assert m is not None
        ranks = {n: 0.0 if n == 1 else reached(m, 1, n, self.sequence_length)[1] for n in np.unique(c.ep)}
        wide = np.where(c.wire == "fp8", d + d // FP8_BLOCK * 4, d * self.b)
        rows = self.ts * np.array([ranks[n] for n in c.ep]) * self.imbalance
        return rows * (wide + 8 * m.num_experts_per_tok)

    # -------------------------------------------------------------------------------------- blocks

    def attention(self, recompute: Mapping[str, Column]) -> Parts:
        """The first half of a block: norm, attention, and the residual stream before it."""
        again = recompute["norms"] | recompute["all"]
        # Of a block that is made again all that stays is its input, not the copies that a plain norm keeps.
        alone = recompute["all"] & (not self.framework.fused_norms)
        inputs = np.where(alone, self.ts * self.spec.hidden_size * self.b, self._norm_input())
        return {
            "norms": inputs + np.where(again, 0, self._norm_output()),
            "attention": np.where(recompute["all"], 0, self._attention(recompute)),
        }

    def dense(self, recompute: Mapping[str, Column]) -> Parts:
        """The second half of a block without experts."""
        no = recompute["all"] | recompute["mlp"]
        width = self.spec.intermediate_size / self.candidates.tp
        # Megatron recomputes the activation function of experts only.
        act = recompute["moe_act"] & (not self.framework.fused_swiglu)
        mlp = self.t * width * (2 * self.b + np.where(act, 0, self.li + self._silu))
        return {
            # With the MLP goes the norm before it, which Transformer Engine fuses into its first product.
            "norms": np.where(recompute["all"], 0, self._norm_input())
            + np.where(no | recompute["norms"], self._travelled(self.spec.hidden_size, no), 0)
            + np.where(no | recompute["norms"], 0, self.li * self.spec.hidden_size * self.gathered),
            "dense_mlp": np.where(no, 0, mlp),
        }

    def moe(self, recompute: Mapping[str, Column]) -> Parts:
        """The second half of a block with experts: norm, router, shared and routed experts."""
        c, d, m = self.candidates, self.spec.hidden_size, self.spec.moe
        assert m is not None
        everything, act = recompute["all"], recompute["moe_act"]
        routed, shared = (
            m.moe_intermediate_size / c.expert_tp,
            m.n_shared_experts * m.moe_intermediate_size / c.tp,
        )
        # The router reads the norm's output as it is, the shared experts in the form of a product's input.
        once_more = self.fp8 | ((c.tp > 1) & (not self.framework.regathers))
        output = self.b * d * self.ts + np.where(once_more, self.li * d * self.gathered, 0) * (shared > 0)
        # Rows come with an FP32 weight and the index of where they came from; SwiGLU's output times its
        # weight is what the last product keeps, and without fusion the output before that too.
        weighted = self._silu + (0 if self.framework.fused_swiglu else self.b)
        experts = self.t * shared * 2 * self.b + np.where(act, 0, self.t * shared * (self.li + self._silu))
        inputs = self.rows * self.li * d
        if self.framework.sorts_again:
            inputs = np.where(recompute["norms"], self._arrived, inputs)
        experts = experts + inputs + self.rows * (2 * self.b * routed + 12)
        experts = experts + np.where(act, 0, self.rows * routed * (self.li + weighted))
        # FP32 logits, scores and the balance loss's scores, and the picks' weights and indices.
        copy = 4 * d * ((self.b < 4) & self.framework.float_router & ~recompute["norms"])
        router = self.ts * (12 * m.n_routed_experts + 12 * m.num_experts_per_tok + copy)
        return {
            "norms": np.where(everything, 0, self._norm_input())
            + np.where(
                everything | recompute["norms"], self._travelled(d, everything) * (shared > 0), output
            ),
            "router": np.where(everything, 0, router),
            "experts": np.where(everything, 0, experts),
        }

    def block(self, kind: str, recompute: Mapping[str, Column]) -> Parts:
        """All of a block; kind is `dense` or `moe`."""
        return added(self.attention(recompute), getattr(self, kind)(recompute))

    @cached_property
    def head(self) -> Parts:
        """Final norm and head, without logits; a loss in slices has no more need of the head's input."""
        kept = self.b * self.spec.hidden_size * self.gathered if self.framework.logits else 0
        return {"ends": self._norm_input() + kept}

    @cached_property
    def joint(self) -> Parts:
        """What an MTP depth has beside its block: two norms, the 2D-to-D product, and its own final norm."""
        d = self.spec.hidden_size
        return {"ends": 2 * self._norm_input() + self.b * 2 * d * self.ts + self.head["ends"]}

    @cached_property
    def embedding(self) -> Parts:
        """Token ids."""
        return {"ends": 8 * self.t}

    def _travelled(self, width: int, dropped: Column) -> Column:
        """Of a product's input that is made again: what `tp` gathered for it, which is not sent twice."""
        here = (self.candidates.tp > 1) & (not self.framework.regathers) & ~dropped
        return np.where(here, self.t * width * self.b, 0)

    def _norm_input(self) -> Column:
        return self.ts * (self._normed * self.spec.hidden_size + 4)

    @property
    def _normed(self) -> Column:
        """Bytes per element of what a norm keeps."""
        return self.b if self.framework.fused_norms else np.full(len(self.candidates), 8.0)

    def _norm_output(self) -> Column:
        """Input of attention's first products: MLA's down-projections work on the sequence's part."""
        tokens = self.gathered if isinstance(self.spec.attention, GQA) else self.ts
        return self.li * self.spec.hidden_size * tokens

    @property
    def _silu(self) -> Column:
        return np.zeros(len(self.candidates)) if self.framework.fused_swiglu else self.b

    def _attention(self, recompute: Mapping[str, Column]) -> Column:
        a, b, t = self.spec.attention, self.b, self.t
        heads = self.spec.num_attention_heads / self.candidates.tp
        cp = self.candidates.cp
        keys = t if self.framework.ring else t * cp
        if isinstance(a, GQA):
            groups, width = a.num_key_value_heads / self.candidates.tp, a.head_dim
            normed = (heads + groups) * width if a.qk_norm else 0
            inputs = b * (t * (heads * width + normed) + keys * 2 * groups * width)
            return inputs + self._output(heads, width)
        if not self.framework.ring:
            # Both halves of a rank's part expand the latents of all before them (`parallel.context`).
            keys = t * np.where(cp > 1, cp + 0.5, 1)
        value = a.qk_head_dim if self.framework.padded_values else a.v_head_dim
        low = (a.q_lora_rank or 0) + a.kv_lora_rank
        # Latents before their norms; after them, and what the up-projections make of them.
        total = self.ts * (self._normed * low + b * a.qk_rope_head_dim)
        up = recompute["mla_up_proj"]
        again = up | recompute["norms"]
        total = total + np.where(again, self._travelled(low, recompute["all"]), self.li * self.gathered * low)
        up_projected = b * heads * (t * a.qk_head_dim + keys * (a.qk_head_dim + value))
        output = self._output(heads, a.v_head_dim)
        if self.framework.padded_values:
            # The kernel's result, and what is cut out of it for the next product, which is cut out again
            # where cheap things are made twice.
            cut = np.where(recompute["norms"], t * heads * 4, output)
            output = cut + t * heads * a.qk_head_dim * b
        return total + np.where(up, 0, up_projected) + output + self._indexer()

    def _output(self, heads: Column, width: int) -> Column:
        """Attention's output, the copy that the next product reads if that is another, and log-sum-exp."""
        twice = (self.candidates.cp > 1) & self.framework.output_twice
        copy = np.where(self.fp8, self.li, np.where(twice, self.b, 0))
        return self.t * heads * (width * (self.b + copy) + 4)

    def _indexer(self) -> Column | float:
        """V3.2: the indexer's queries and keys, and the picked keys' indices."""
        i = self.spec.indexer
        if i is None:
            return 0.0
        return self.t * (self.b * (i.index_n_heads + 1) * i.index_head_dim + 4 * i.index_topk)

    # ------------------------------------------------------------------------------------- working

    def working(self, kind: str) -> tuple[Column, Column]:
        """Gradients under way in the backward pass of a block: (rows travelling to or from experts, others).

        Nothing of the block's second half is free yet, but what its last product kept; by the time the
        gradients of attention are there, all of it is.
        """
        d, b, c = self.spec.hidden_size, self.b, self.candidates
        residual = self.ts * d * b + np.where(c.tp > 1, self.t * d * b, 0)
        if kind == "moe":
            return self.framework.copies * self.rows * d * b, residual
        # SwiGLU's backward pass has one gradient in and two out; its output went with the product behind it.
        return np.zeros(len(c)), residual + self.t * b * 2 * self.spec.intermediate_size / c.tp

    def waiting(self, kind: str) -> Column:
        """Gradients of the results of a block's products, which wait for its weights' gradients."""
        spec, c, t, a = self.spec, self.candidates, self.t, self.spec.attention
        d, heads = spec.hidden_size, spec.num_attention_heads / c.tp
        if isinstance(a, GQA):
            wide = t * (heads + 2 * a.num_key_value_heads / c.tp) * a.head_dim
        else:
            low = self.ts * ((a.q_lora_rank or 0) + a.latent_dim)
            wide = low + t * heads * (a.qk_head_dim + a.qk_nope_head_dim + a.v_head_dim)
        total = wide + t * d
        if kind == "dense":
            return self.b * (total + t * (2 * spec.intermediate_size / c.tp + d))
        m = spec.moe
        assert m is not None
        shared = m.n_shared_experts * m.moe_intermediate_size / c.tp
        total = total + (shared > 0) * t * (2 * shared + d)
        total = total + self.rows * (2 * m.moe_intermediate_size / c.expert_tp + d)
        return self.b * total + 4.0 * self.ts * m.n_routed_experts


def added(*parts: Parts) -> Parts:
    """The sum, part by part."""
    out: Parts = {}
    for each in parts:
        for name, value in each.items():
            out[name] = out[name] + value if name in out else value
    return out
