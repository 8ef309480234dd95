"""Attention: multi-head latent attention (MLA) in both its forms, and grouped-query attention.

MLA (DeepSeek-V2, section 2.1; V3, section 2.1.1) keeps one latent vector per token: the
compressed key-value c (rank C) beside one rotary key shared by all heads (width R).

* Expanded: W_UK and W_UV turn c into keys and values per head, then ordinary attention.
  Fewest operations when many queries share the keys: training and prefill.
* Absorbed: the same products in another order, (q W_UK) c^T instead of q (c W_UK^T)^T, and W_UV
  after the softmax. Attention then runs over the C + R wide latent itself, one key head for all
  queries, and nothing is expanded: decode.

The seam is `attend(attention, q, kv)`. A module computes its queries and what a cache would store
(`kv`: the latent, or keys and values), and hands both over; `causal` is the stateless default,
a cache appends `kv` and calls `expanded` or `absorbed` itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whalepod.models.rope import rotate, softmax_scale
from whalepod.spec.model import GQA, MLA, ModelSpec

Attend = Callable[["Attention", Tensor, Tensor], Tensor]
Core = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], Tensor]
"""q [B, H, S, D], k [B, heads, L, D], v [B, heads, L, V], mask, is_causal, scale -> [B, H, S, V]."""
Tables = tuple[Tensor, Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """torch's own kernels. They want one width for queries, keys and values: without padding the CPU falls
    back to an S x L score matrix at half the speed."""
    width, num_groups = v.shape[-1], q.shape[1] // k.shape[1]
    v = F.pad(v, (0, q.shape[-1] - width)) if width < q.shape[-1] else v
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=num_groups > 1
    )
    return out[..., :width]


def causal(attention: Attention, q: Tensor, kv: Tensor) -> Tensor:
    """Every position sees itself and what came before; no cache."""
    return attention.expanded(q, kv, None)


def document_mask(positions_BS: Tensor) -> Tensor:
    """[B, 1, S, S]: every position sees what came before it in its own document, which begins where positions
    are 0."""
    document = (positions_BS == 0).cumsum(1)
    same = document.unsqueeze(1) == document.unsqueeze(2)
    return (same & causal_mask(same.shape[1], same.shape[2], same.device)).unsqueeze(1)


def masked(mask: Tensor) -> Attend:
    """Positions see what `mask` says; no cache."""
    return lambda attention, q, kv: attention.expanded(q, kv, mask)


class Attention(nn.Module):
    """What a cache needs to know: `layer` (its index) and the two ways to attend.

    q [B, S, H, width], kv [B, L, width of the cache] -> [B, S, H x value width].
    `mask` [S, L] or [B, 1, S, L] is True where a query may look; None is causal, the queries being
    the last S of the L positions.
    """

    layer: int
    core: Core = staticmethod(fused)
    """What attends: `choose_core` puts another in its place."""
    compute_dtype: torch.dtype | None = None
    """In which a cache should attend, where that is not the weights' type."""

    @property
    def cache_width(self) -> int:
        """Elements of a token in the cache, as this module's weights make them."""
        raise AssertionError("abstract")

    @property
    def value_width(self) -> int:
        """Of a head's result."""
        raise AssertionError("abstract")

    def expanded(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        raise AssertionError("abstract")

    def absorbed(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        """Only MLA has a cheaper form for few queries."""
        return self.expanded(q, kv, mask)

    def prefers_absorbed(self, num_queries: int) -> bool:
        """Whether `absorbed` costs fewer operations for this many queries over a long cache."""
        return False


def causal_mask(num_queries: int, length: int, device: torch.device) -> Tensor:
    """[S, L], True where the last S of L positions may look."""
    return torch.ones(num_queries, length, dtype=torch.bool, device=device).tril(length - num_queries)


def choose_core(module: nn.Module, core: Core) -> None:
    """For every attention below `module`."""
    for each in module.modules():
        if isinstance(each, Attention):
            each.core = core


def _attention(core: Core, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention on [B, S or L, heads, width]; keys may have fewer heads than queries."""
    num_queries, length = q.shape[1], k.shape[1]
    square = mask is None and num_queries == length
    if mask is None and 1 < num_queries < length:
        mask = causal_mask(num_queries, length, q.device)
    out = core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, square, scale)
    return out.transpose(1, 2)


class MLAttention(Attention):
    """Multi-head latent attention; parameter names are those of the Hugging Face checkpoints."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        a = spec.attention
        assert isinstance(a, MLA)
        self.layer, self.config = layer, a
        self.interleaved = spec.rope.interleaved
        self.scale = softmax_scale(spec.rope, a.qk_head_dim)
        hidden, heads = spec.hidden_size, spec.num_attention_heads
        if a.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * a.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, a.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(a.q_lora_rank, eps=spec.rms_norm_eps)
            self.q_b_proj = nn.Linear(a.q_lora_rank, heads * a.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, a.latent_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(a.kv_lora_rank, eps=spec.rms_norm_eps)
        self.kv_b_proj = nn.Linear(a.kv_lora_rank, heads * (a.qk_nope_head_dim + a.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * a.v_head_dim, hidden, bias=False)
        self._split: tuple[Tensor, Tensor] | None = None

    def forward(self, x_BSD: Tensor, tables: Tables, attend: Attend = causal) -> Tensor:
        a = self.config
        if a.q_lora_rank is None:
            q = self.q_proj(x_BSD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        q = q.unflatten(-1, (-1, a.qk_head_dim))
        q_nope, q_rope = q.split((a.qk_nope_head_dim, a.qk_rope_head_dim), dim=-1)
        q = torch.cat((q_nope, rotate(q_rope, *tables, self.interleaved)), dim=-1)
        c, k_rope = self.kv_a_proj_with_mqa(x_BSD).split((a.kv_lora_rank, a.qk_rope_head_dim), dim=-1)
        k_rope = rotate(k_rope.unsqueeze(-2), *tables, self.interleaved).squeeze(-2)
        latent = torch.cat((self.kv_a_layernorm(c), k_rope), dim=-1)
        return self.o_proj(attend(self, q, latent))

    @property
    def cache_width(self) -> int:
        return self.config.latent_dim

    @property
    def value_width(self) -> int:
        return self.config.v_head_dim

    def up_projection(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, N, C] and W_UV transposed [H, C, V], views of kv_b_proj's weight, or its copies if
        `split_up_projection` has made them."""
        if self._split is not None:
            return self._split
        a = self.config
        w_HXC = self.kv_b_proj.weight.unflatten(0, (-1, a.qk_nope_head_dim + a.v_head_dim))
        w_uk, w_uv = w_HXC.split((a.qk_nope_head_dim, a.v_head_dim), dim=1)
        return w_uk, w_uv.transpose(1, 2)

    def split_up_projection(self) -> None:
        """Keeps both as matrices of their own, which absorbed attention reads at every token: for weights
        that no longer change."""
        w_uk, w_uv = self.up_projection()
        self._split = (w_uk.detach().contiguous(), w_uv.detach().contiguous())

    def expanded(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        a = self.config
        c, k_rope = kv.split((a.kv_lora_rank, a.qk_rope_head_dim), dim=-1)
        keys_values = self.kv_b_proj(c).unflatten(-1, (-1, a.qk_nope_head_dim + a.v_head_dim))
        k_nope, v = keys_values.split((a.qk_nope_head_dim, a.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)), dim=-1)
        return _attention(self.core, q, k, v, mask, self.scale).flatten(-2)

    def prefers_absorbed(self, num_queries: int) -> bool:
        # Per head and cached token: expanding costs C (N + V) once and N + R + V for each query,
        # absorbed attention 2 C + R for each query.
        a = self.config
        expand = a.kv_lora_rank * (a.qk_nope_head_dim + a.v_head_dim)
        extra = 2 * a.kv_lora_rank - a.qk_nope_head_dim - a.v_head_dim
        return num_queries * extra < expand

    def absorbed(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        a = self.config
        w_uk, w_uv = (w.to(q.dtype) for w in self.up_projection())
        q_nope, q_rope = q.split((a.qk_nope_head_dim, a.qk_rope_head_dim), dim=-1)
        q = torch.cat((torch.einsum("bshn,hnc->bshc", q_nope, w_uk), q_rope), dim=-1)
        num_queries, heads = q.shape[1:3]
        # All heads share one key, so heads and queries are rows of a single product per sequence.
        scores = torch.bmm(q.flatten(1, 2), kv.transpose(1, 2)).unflatten(1, (num_queries, heads))
        scores = scores.float() * self.scale
        if mask is None:
            mask = causal_mask(num_queries, kv.shape[1], q.device)
        allowed = mask[None, :, None] if mask.dim() == 2 else mask.transpose(1, 2)
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).to(q.dtype)
        # Over the rotary keys as well: to leave them out first would copy all the rest.
        out = torch.bmm(weights.flatten(1, 2), kv)[..., : a.kv_lora_rank]
        return torch.einsum("bshc,hcv->bshv", out.unflatten(1, (num_queries, heads)), w_uv).flatten(-2)


class GroupedQueryAttention(Attention):
    """Attention of the Llama, Qwen2 and Qwen3 forms, and of DeepSeekMoE-16B."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        a = spec.attention
        assert isinstance(a, GQA)
        self.layer, self.config = layer, a
        self.interleaved = spec.rope.interleaved
        self.scale = softmax_scale(spec.rope, a.head_dim)
        hidden, heads = spec.hidden_size, spec.num_attention_heads
        self.q_proj = nn.Linear(hidden, heads * a.head_dim, bias=a.qkv_bias)
        self.k_proj = nn.Linear(hidden, a.num_key_value_heads * a.head_dim, bias=a.qkv_bias)
        self.v_proj = nn.Linear(hidden, a.num_key_value_heads * a.head_dim, bias=a.qkv_bias)
        self.o_proj = nn.Linear(heads * a.head_dim, hidden, bias=False)
        if a.qk_norm:
            self.q_norm = nn.RMSNorm(a.head_dim, eps=spec.rms_norm_eps)
            self.k_norm = nn.RMSNorm(a.head_dim, eps=spec.rms_norm_eps)

    def forward(self, x_BSD: Tensor, tables: Tables, attend: Attend = causal) -> Tensor:
        heads = (-1, self.config.head_dim)
        q, k = self.q_proj(x_BSD).unflatten(-1, heads), self.k_proj(x_BSD).unflatten(-1, heads)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *tables, self.interleaved), rotate(k, *tables, self.interleaved)
        kv = torch.cat((k.flatten(-2), self.v_proj(x_BSD)), dim=-1)
        return self.o_proj(attend(self, q, kv))

    @property
    def cache_width(self) -> int:
        return 2 * self.k_proj.weight.shape[0]

    @property
    def value_width(self) -> int:
        return self.config.head_dim

    def expanded(self, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        k, v = kv.unflatten(-1, (2, -1, self.config.head_dim)).unbind(-3)
        return _attention(self.core, q, k, v, mask, self.scale).flatten(-2)
