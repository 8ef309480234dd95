"""What a model costs, by formula: parameters, FLOPs per token and KV-cache bytes per token.

Everything is plain arithmetic over a ModelSpec, small and composable: a planner asks for one layer, the
report for the whole model. Conventions, the same as the papers' and Megatron's:

- One multiply-add is 2 FLOPs; only matrix products count (no norms, softmax, activations, embedding lookup).
- Backward is twice forward. Recomputation is not model work and is not counted.
- Causal attention is half the square: a token attends to `seq_len / 2` keys on average.
- Parameters are without multi-token prediction (MTP) unless asked for; MTP shares embedding and head.

FLOPs are per token, and those of `Flops` forward only; `train_flops` gives forward and backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import ceil
from typing import Any, Literal, Self

from whalepod.spec.errors import UserError, nearest
from whalepod.spec.model import GQA, MLA, ModelSpec, MoE

GIB = 2**30
"""Bytes per GiB."""

TRAINING_STATE_BYTES_PER_PARAM = 16
"""BF16 weight and gradient (2 + 2) beside FP32 master weight and two FP32 Adam moments (12)."""

WeightType = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class _Parts:
    """Numbers with names: `+`, `scaled` and `total` go over all fields."""

    def __add__(self, other: Self) -> Self:
        if type(other) is not type(self):
            return NotImplemented
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def scaled(self, factor: int) -> Self:
        """Every part times `factor`."""
        return type(self)(*(getattr(self, f.name) * factor for f in fields(self)))

    def as_dict(self) -> dict[str, Any]:
        """The parts that are not zero, by name."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name))}


@dataclass(frozen=True)
class Params(_Parts):
    """Parameters by part, in elements.

    The `attn_*` matrices are those of MLA (`q_a` to `kv_b`, or `q` without query compression) or of GQA.
    `norms` holds every normalisation weight, those on latents, queries and keys included.
    `selection_bias` is V3's `e_score_correction_bias`: no gradient, yet counted by the report.
    """

    embedding: int = 0
    attn_q: int = 0
    attn_q_a: int = 0
    attn_q_b: int = 0
    attn_kv_a: int = 0
    attn_kv_b: int = 0
    attn_k: int = 0
    attn_v: int = 0
    attn_o: int = 0
    attn_bias: int = 0
    indexer: int = 0
    dense_mlp: int = 0
    router: int = 0
    selection_bias: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    norms: int = 0
    mtp_proj: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return sum(self.as_dict().values())

    @property
    def attention(self) -> int:
        """All attention matrices and biases, without the indexer and the norms."""
        return sum(v for k, v in self.as_dict().items() if k.startswith("attn_"))


@dataclass(frozen=True)
class Flops(_Parts):
    """Forward FLOPs per token by part. `attn_scores` are the query-key and score-value products."""

    attn_proj: float = 0
    attn_scores: float = 0
    indexer_proj: float = 0
    indexer_scores: float = 0
    dense_mlp: float = 0
    router: float = 0
    routed_experts: float = 0
    shared_experts: float = 0
    mtp_proj: float = 0
    head: float = 0

    @property
    def total(self) -> float:
        return sum(self.as_dict().values())


# ---------------------------------------------------------------------------------------- parameters


def attention_params(spec: ModelSpec) -> Params:
    """One layer's attention with its inner norms, biases and indexer (V2 2.1, V3.2-Exp 2.1)."""
    d, heads, a = spec.hidden_size, spec.num_attention_heads, spec.attention
    if isinstance(a, GQA):
        q, kv = heads * a.head_dim, a.num_key_value_heads * a.head_dim
        return Params(
            attn_q=d * q,
            attn_k=d * kv,
            attn_v=d * kv,
            attn_o=q * d,
            attn_bias=q + 2 * kv if a.qkv_bias else 0,
            norms=2 * a.head_dim if a.qk_norm else 0,
        )
    q = heads * a.qk_head_dim
    low_rank = a.q_lora_rank is not None
    return Params(
        attn_q=0 if low_rank else d * q,
        attn_q_a=d * (a.q_lora_rank or 0),
        attn_q_b=(a.q_lora_rank or 0) * q,
        attn_kv_a=d * a.latent_dim,
        attn_kv_b=a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim),
        attn_o=heads * a.v_head_dim * d,
        indexer=indexer_params(spec),
        norms=(a.q_lora_rank or 0) + a.kv_lora_rank,
    )


def indexer_params(spec: ModelSpec) -> int:
    """One layer's lightning indexer: query, key and head-weight projections, and the key's LayerNorm."""
    if spec.indexer is None:
        return 0
    return _indexer_matrices(spec) + 2 * spec.indexer.index_head_dim


def mlp_params(spec: ModelSpec, layer: int, active: bool = False) -> Params:
    """The feed-forward part of block `layer`: dense, or router with experts.

    `active`: only the routed experts that one token visits.
    """
    m = spec.moe
    if m is None or not spec.is_moe_layer(layer):
        return Params(dense_mlp=3 * spec.hidden_size * spec.intermediate_size)
    expert = expert_params(spec)
    return Params(
        router=m.n_routed_experts * spec.hidden_size,
        selection_bias=m.n_routed_experts if m.selection_bias else 0,
        routed_experts=(m.num_experts_per_tok if active else m.n_routed_experts) * expert,
        shared_experts=m.n_shared_experts * expert,
    )


def expert_params(spec: ModelSpec) -> int:
    """One expert: gate, up and down projection."""
    m = _need_moe(spec)
    return 3 * spec.hidden_size * m.moe_intermediate_size


def layer_params(spec: ModelSpec, layer: int, active: bool = False) -> Params:
    """Block `layer` with its two norms; MTP blocks' own layers follow the last (>= num_hidden_layers)."""
    norms = Params(norms=2 * spec.hidden_size)
    return attention_params(spec) + mlp_params(spec, layer, active) + norms


def embedding_params(spec: ModelSpec) -> Params:
    """The input embedding."""
    return Params(embedding=spec.vocab_size * spec.hidden_size)


def head_params(spec: ModelSpec) -> Params:
    """Final norm and output head; a tied head is the embedding and counts there."""
    head = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size
    return Params(norms=spec.hidden_size, head=head)


def mtp_params(spec: ModelSpec, active: bool = False) -> Params:
    """What MTP adds, all depths (V3 2.2): a block, a 2d-to-d projection and three norms each.

    Embedding and head are shared with the main model and not counted again.
    """
    d = spec.hidden_size
    total = Params()
    for depth in range(spec.num_nextn_predict_layers):
        block = layer_params(spec, spec.num_hidden_layers + depth, active)
        total += block + Params(mtp_proj=2 * d * d, norms=3 * d)
    return total


def params(spec: ModelSpec, active: bool = False, mtp: bool = False) -> Params:
    """The whole model by part; `active` as in `mlp_params`, `mtp` adds `mtp_params`."""
    total = embedding_params(spec) + head_params(spec)
    for layer, count in _layer_kinds(spec):
        total += layer_params(spec, layer, active).scaled(count)
    return total + mtp_params(spec, active) if mtp else total


def total_params(spec: ModelSpec) -> int:
    """Parameters without MTP."""
    return params(spec).total


def active_params(spec: ModelSpec, embedding: bool = False) -> int:
    """Parameters that one token uses: the head, and the embedding table only if asked for.

    A tied table is the head, so it counts either way.
    """
    active = params(spec, active=True)
    keep = embedding or spec.tie_word_embeddings
    return active.total - (0 if keep else active.embedding)


def reported_active_params(spec: ModelSpec) -> int:
    """Active parameters as the papers count: of a dense model all, of an MoE those with the head only."""
    return total_params(spec) if spec.moe is None else active_params(spec)


def mtp_unique_params(spec: ModelSpec) -> int:
    """Parameters of the MTP modules without the shared embedding and head."""
    return mtp_params(spec).total


def layer_weight_bytes(spec: ModelSpec, layer: int, dtype: WeightType = "bf16") -> int:
    """Bytes of block `layer`'s weights; `dtype` as in `weight_bytes`."""
    if dtype not in ("bf16", "fp8"):
        raise UserError(f"unknown weight precision {dtype!r}{nearest(dtype, ('bf16', 'fp8'))}")
    p = layer_params(spec, layer)
    if dtype == "bf16":
        return 2 * p.total
    block = spec.quantization.weight_block_size if spec.quantization else (128, 128)
    elements = scales = 0
    for rows, columns, count in _linears(spec, layer):
        elements += count * rows * columns
        scales += count * ceil(rows / block[0]) * ceil(columns / block[1])
    return elements + 4 * scales + 2 * (p.total - elements - p.selection_bias) + 4 * p.selection_bias


def weight_bytes(spec: ModelSpec, dtype: WeightType = "bf16", mtp: bool = False) -> int:
    """Bytes of the weights. `fp8` is the published form of V3 (report 3.3; README_WEIGHTS).

    In `fp8` the linear layers hold one byte per element and one FP32 scale per block (128 x 128 unless the
    model says otherwise); embedding, head, router, norms, biases, the MTP projection and the indexer's head
    weights stay BF16, the selection bias FP32.
    """
    total = 2 * (embedding_params(spec) + head_params(spec)).total
    for layer, count in _layer_kinds(spec):
        total += count * layer_weight_bytes(spec, layer, dtype)
    if mtp:
        d = spec.hidden_size
        for depth in range(spec.num_nextn_predict_layers):
            total += layer_weight_bytes(spec, spec.num_hidden_layers + depth, dtype) + 2 * (2 * d * d + 3 * d)
    return total


# --------------------------------------------------------------------------------------------- FLOPs


def attended_keys(spec: ModelSpec, seq_len: int, causal: bool = True) -> float:
    """Keys that a token attends to, on average over a sequence; at most `index_topk` with an indexer."""
    _need_length("sequence length", seq_len)
    limit = min(seq_len, spec.indexer.index_topk) if spec.indexer else seq_len
    if not causal:
        return limit
    # Half the square up to the limit, then a full row of `limit` keys for each later token.
    return (limit * limit / 2 + (seq_len - limit) * limit) / seq_len


def attention_flops(spec: ModelSpec, keys: float, scored_keys: float = 0, absorbed: bool = False) -> Flops:
    """One layer's attention for one token that attends to `keys` keys; its indexer scores `scored_keys`.

    `absorbed`: MLA over the latent cache (V2 2.1.2): scores over `latent_dim`, values over `kv_lora_rank`.
    The up-projection then multiplies queries and outputs instead of keys and values: the same FLOPs a token.
    """
    p, a, heads = attention_params(spec), spec.attention, spec.num_attention_heads
    if isinstance(a, GQA):
        widths = 2 * a.head_dim
    elif absorbed:
        widths = a.latent_dim + a.kv_lora_rank
    else:
        widths = a.qk_head_dim + a.v_head_dim
    flops = Flops(attn_proj=2 * (p.attention - p.attn_bias), attn_scores=2 * heads * widths * keys)
    if spec.indexer is None:
        return flops
    # Per key and indexer head: a dot product, and one multiply-add into the weighted sum of heads.
    per_key = spec.indexer.index_n_heads * (spec.indexer.index_head_dim + 1)
    return flops + Flops(indexer_proj=2 * _indexer_matrices(spec), indexer_scores=2 * per_key * scored_keys)


def mlp_flops(spec: ModelSpec, layer: int) -> Flops:
    """The feed-forward part of block `layer`: of the routed experts only the active ones."""
    p = mlp_params(spec, layer, active=True)
    return Flops(
        dense_mlp=2 * p.dense_mlp,
        router=2 * p.router,
        routed_experts=2 * p.routed_experts,
        shared_experts=2 * p.shared_experts,
    )


def layer_flops(spec: ModelSpec, layer: int, seq_len: int = 4096, causal: bool = True) -> Flops:
    """Block `layer`, forward, per token of a sequence of `seq_len`."""
    keys = attended_keys(spec, seq_len, causal)
    scored = seq_len / 2 if causal else seq_len
    return attention_flops(spec, keys, scored) + mlp_flops(spec, layer)


def head_flops(spec: ModelSpec) -> Flops:
    """The output head, for one token."""
    return Flops(head=2 * spec.vocab_size * spec.hidden_size)


def mtp_flops(spec: ModelSpec, seq_len: int = 4096, causal: bool = True) -> Flops:
    """All MTP depths, forward, per token: projection, block and the shared head once more (V3 2.2)."""
    total = Flops()
    for depth in range(spec.num_nextn_predict_layers):
        total += layer_flops(spec, spec.num_hidden_layers + depth, seq_len, causal) + head_flops(spec)
        total += Flops(mtp_proj=2 * 2 * spec.hidden_size**2)
    return total


def forward_flops(spec: ModelSpec, seq_len: int = 4096, causal: bool = True, mtp: bool = False) -> Flops:
    """The whole model, forward, per token of a sequence of `seq_len`; prefill pays the head once only."""
    total = head_flops(spec)
    for layer, count in _layer_kinds(spec):
        total += layer_flops(spec, layer, seq_len, causal).scaled(count)
    return total + mtp_flops(spec, seq_len, causal) if mtp else total


def backward_flops(spec: ModelSpec, seq_len: int = 4096, causal: bool = True, mtp: bool = False) -> Flops:
    """Twice forward: gradients of inputs and of weights."""
    return forward_flops(spec, seq_len, causal, mtp).scaled(2)


def train_flops(
    spec: ModelSpec, seq_len: int = 4096, causal: bool = True, mtp: bool = False, weights: bool = True
) -> Flops:
    """Forward and backward per token: V3 at 4096, causal, 250 GFLOP (ISCA 2025, table 2).

    weights: without gradients of these, as with adapters (whose own products are not counted), a third less
    but for attention's scores.
    """
    forward = forward_flops(spec, seq_len, causal, mtp)
    if weights:
        return forward.scaled(3)
    return forward.scaled(2) + Flops(attn_scores=forward.attn_scores)


def decode_flops(spec: ModelSpec, context_len: int) -> Flops:
    """One generated token that attends to `context_len` keys (itself included), MLA in absorbed form."""
    _need_length("context length", context_len)
    keys = min(context_len, spec.indexer.index_topk) if spec.indexer else context_len
    attention = attention_flops(spec, keys, context_len, absorbed=True)
    total = head_flops(spec) + attention.scaled(spec.num_hidden_layers)
    for layer, count in _layer_kinds(spec):
        total += mlp_flops(spec, layer).scaled(count)
    return total


# ------------------------------------------------------------------------------------------ KV cache


def kv_elements_per_layer(spec: ModelSpec) -> int:
    """Cached elements per token and layer: MLA's latent and rotary key, else keys and values."""
    a = spec.attention
    return a.latent_dim if isinstance(a, MLA) else 2 * a.num_key_value_heads * a.head_dim


def kv_elements_per_token(spec: ModelSpec) -> int:
    """Cached elements per token, all layers, without indexer keys."""
    return spec.num_hidden_layers * kv_elements_per_layer(spec)


def kv_bytes_per_layer(spec: ModelSpec, cache: str | int = "bf16") -> float:
    """Cached bytes per token and layer, without indexer keys.

    `cache`: `bf16`; `fp8`, for MLA the layout of V3.2 (FP8 latent, an FP32 scale per 128 of it, BF16 rotary
    key: 656 bytes); or bits per element, such as the 6 of V2 (section 3.2.3).
    """
    elements = kv_elements_per_layer(spec)
    if isinstance(cache, int) and not isinstance(cache, bool):
        if not 1 <= cache <= 64:
            raise UserError(f"KV cache bits per element must be 1 to 64, not {cache}")
        return _whole(elements * cache / 8)
    if cache == "bf16":
        return 2 * elements
    if cache == "fp8":
        a = spec.attention
        if isinstance(a, MLA):
            return a.kv_lora_rank + 4 * ceil(a.kv_lora_rank / 128) + 2 * a.qk_rope_head_dim
        return elements
    raise UserError(f"unknown KV cache format {cache!r}{nearest(cache, ('bf16', 'fp8'))}")


def kv_bytes_per_token(spec: ModelSpec, cache: str | int = "bf16") -> float:
    """Cached bytes per token, all layers, without indexer keys; `cache` as in `kv_bytes_per_layer`."""
    return spec.num_hidden_layers * kv_bytes_per_layer(spec, cache)


def indexer_bytes_per_layer(spec: ModelSpec) -> int:
    """Bytes of indexer keys per token and layer: FP8 with one FP32 scale per 128 (V3.2: 132)."""
    if spec.indexer is None:
        return 0
    return spec.indexer.index_head_dim + 4 * ceil(spec.indexer.index_head_dim / 128)


def indexer_bytes_per_token(spec: ModelSpec) -> int:
    """Bytes of indexer keys per token, all layers; they are kept beside every cache format."""
    return spec.num_hidden_layers * indexer_bytes_per_layer(spec)


def v4_entry_bytes(head_dim: int, rope_dim: int) -> int:
    """One compressed entry of V4 (arXiv 2606.19348): FP8 latent, BF16 rotary part, one-byte scales.

    Scales are one per 64, padded to a multiple of eight: 448 + 2*64 + 8 = 584 bytes.
    """
    latent = head_dim - rope_dim
    return latent + 2 * rope_dim + 8 * ceil(latent / 64 / 8)


def mxfp4_bytes(width: int, group: int = 32) -> int:
    """A vector of four-bit elements with a one-byte scale per `group`."""
    return width // 2 + width // group


def compressed_kv_bytes_per_token(config: Mapping[str, Any]) -> float:
    """KV bytes per token of long contexts for V4 and V4.1, whose layers compress several tokens to one entry.

    `config` holds `kv_layout` (`v4`, `v4.1`), `compress_ratios` per layer, `head_dim`, `qk_rope_head_dim`,
    `index_head_dim`, and for V4.1 `kv_source_layer_ids`. The sliding window is per sequence, not per token:
    `sliding_window_bytes`.
    """
    ratios = config["compress_ratios"][: config["num_hidden_layers"]]
    key = mxfp4_bytes(config["index_head_dim"])
    if config["kv_layout"] == "v4.1":
        # The latent is FP4 with an E4M3 scale per 16; each source keeps index keys too.
        entry = mxfp4_bytes(config["head_dim"], group=16) + key
        return _whole(sum(entry / ratios[layer] for layer in config["kv_source_layer_ids"]))
    entry = v4_entry_bytes(config["head_dim"], config["qk_rope_head_dim"])
    # Only the sparse layers (ratio 4) select, so only they keep index keys; ratio 0 keeps the window alone.
    return _whole(sum((entry + (key if ratio == 4 else 0)) / ratio for ratio in ratios if ratio))


def sliding_window_bytes(config: Mapping[str, Any]) -> int:
    """Bytes per sequence of V4's sliding window, which every layer keeps beside its compressed entries.

    `config` as in `compressed_kv_bytes_per_token`, with `sliding_window`; V4.1's is not published.
    """
    if config["kv_layout"] != "v4":
        raise UserError(f"sliding window bytes are known for kv_layout 'v4', not {config['kv_layout']!r}")
    entry = v4_entry_bytes(config["head_dim"], config["qk_rope_head_dim"])
    return config["num_hidden_layers"] * config["sliding_window"] * entry


# ------------------------------------------------------------------------------------- inner workings


def _layer_kinds(spec: ModelSpec) -> Sequence[tuple[int, int]]:
    """(a layer of the kind, how many there are) for dense and MoE layers, MTP left out."""
    kinds: dict[bool, tuple[int, int]] = {}
    for layer in range(spec.num_hidden_layers):
        kind = spec.is_moe_layer(layer)
        first, count = kinds.get(kind, (layer, 0))
        kinds[kind] = (first, count + 1)
    return list(kinds.values())


def _linears(spec: ModelSpec, layer: int) -> list[tuple[int, int, int]]:
    """(out, in, how many) of the matrices that are FP8 in a published FP8 checkpoint."""
    d, heads, a, m = spec.hidden_size, spec.num_attention_heads, spec.attention, spec.moe
    if isinstance(a, GQA):
        q, kv = heads * a.head_dim, a.num_key_value_heads * a.head_dim
        found = [(q, d, 1), (kv, d, 2), (d, q, 1)]
    else:
        q = heads * a.qk_head_dim
        found = [(q, d, 1)] if a.q_lora_rank is None else [(a.q_lora_rank, d, 1), (q, a.q_lora_rank, 1)]
        found += [
            (a.latent_dim, d, 1),
            (heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank, 1),
            (d, heads * a.v_head_dim, 1),
        ]
        if spec.indexer is not None:
            width = spec.indexer.index_n_heads * spec.indexer.index_head_dim
            found += [(width, a.q_lora_rank or d, 1), (spec.indexer.index_head_dim, d, 1)]
    if m is None or not spec.is_moe_layer(layer):
        return [*found, (spec.intermediate_size, d, 2), (d, spec.intermediate_size, 1)]
    width, n = m.moe_intermediate_size, m.n_routed_experts
    found += [(width, d, 2 * n), (d, width, n)]
    if m.n_shared_experts:  # one MLP as wide as all shared experts
        shared = m.n_shared_experts * width
        found += [(shared, d, 2), (d, shared, 1)]
    return found


def _indexer_matrices(spec: ModelSpec) -> int:
    a, i = spec.attention, spec.indexer
    assert i is not None
    assert isinstance(a, MLA)
    queries = (a.q_lora_rank or spec.hidden_size) * i.index_n_heads * i.index_head_dim
    return queries + spec.hidden_size * (i.index_head_dim + i.index_n_heads)


def _need_moe(spec: ModelSpec) -> MoE:
    if spec.moe is None:
        raise UserError(f"{spec.name} is a dense model and has no experts")
    return spec.moe


def _need_length(what: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{what} must be at least 1, not {value}")


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value
