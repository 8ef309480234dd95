"""Names and shapes: the one two-way table between Hugging Face checkpoints and this package's models.

A model's parameters are named as in the checkpoints, without `model.`, but for two things:

    model.layers.{i}.mlp.experts.{e}.gate_proj.weight   mlp.experts.gate_up[e, 0]    [E, 2, I, D]
                                     up_proj            mlp.experts.gate_up[e, 1]
                                     down_proj          mlp.experts.down[e]          [E, D, I]

    model.layers.{L + k}.enorm, hnorm, eh_proj          mtp.{k}.enorm, hnorm, eh_proj
                         shared_head.norm               mtp.{k}.norm
                         all of a block                 mtp.{k}.block. ...
                         embed_tokens, shared_head.head copies of the main model's, which has them once

(L layers, k the depth of multi-token prediction, e of E experts, I their width, D the hidden size.)
A weight in FP8 has its scales beside it, named `..._scale_inv`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from whalepod.spec.model import GQA, MLA, ModelSpec

SCALE_SUFFIX = "_scale_inv"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a checkpoint and its place in the model.

    It is `ours[index]`: a parameter or buffer, or one matrix of a stacked one. `quantised`: stored as FP8
    blocks in FP8 checkpoints. `float32`: always stored so. `copy_of`: the checkpoint repeats this tensor.
    """

    hf: str
    shape: Shape
    ours: str
    index: Shape = ()
    quantised: bool = False
    float32: bool = False
    copy_of: str | None = None


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[Shape, bool]]:
    """Every tensor of a Hugging Face checkpoint of `spec`, MTP included: shape, and whether FP8 quantises it.

    The scales of quantised tensors, which only FP8 checkpoints have, are not listed.
    """
    return {slot.hf: (slot.shape, slot.quantised) for slot in slots(spec)}


def slots(spec: ModelSpec) -> Iterator[Slot]:
    """The table for one model; what belongs to one of our parameters comes in succession."""
    d, v = spec.hidden_size, spec.vocab_size
    embed = Slot("model.embed_tokens.weight", (v, d), "embed_tokens.weight")
    head = embed if spec.tie_word_embeddings else Slot("lm_head.weight", (v, d), "lm_head.weight")
    yield embed
    for layer in range(spec.num_hidden_layers):
        yield from _block(spec, layer, f"layers.{layer}")
    yield Slot("model.norm.weight", (d,), "norm.weight")
    if head is not embed:
        yield head
    for depth in range(spec.num_nextn_predict_layers):
        layer = spec.num_hidden_layers + depth
        hf, ours = f"model.layers.{layer}", f"mtp.{depth}"
        yield Slot(f"{hf}.embed_tokens.weight", (v, d), embed.ours, copy_of=embed.hf)
        yield Slot(f"{hf}.enorm.weight", (d,), f"{ours}.enorm.weight")
        yield Slot(f"{hf}.hnorm.weight", (d,), f"{ours}.hnorm.weight")
        yield Slot(f"{hf}.eh_proj.weight", (d, 2 * d), f"{ours}.eh_proj.weight")
        yield from _block(spec, layer, f"{ours}.block")
        yield Slot(f"{hf}.shared_head.norm.weight", (d,), f"{ours}.norm.weight")
        yield Slot(f"{hf}.shared_head.head.weight", (v, d), head.ours, copy_of=head.hf)


def optional_slots(spec: ModelSpec) -> Iterator[Slot]:
    """What a checkpoint may hold without need: the head of a model whose head is its embedding."""
    if spec.tie_word_embeddings:
        shape = (spec.vocab_size, spec.hidden_size)
        yield Slot("lm_head.weight", shape, "embed_tokens.weight", copy_of="model.embed_tokens.weight")


def is_ignorable(hf: str) -> bool:
    """Whether old exporters wrote this although it follows from the config."""
    return hf.endswith("rotary_emb.inv_freq")


def mtp_prefixes(spec: ModelSpec) -> tuple[str, ...]:
    """How the names of MTP tensors begin; empty without MTP."""
    first = spec.num_hidden_layers
    return tuple(f"model.layers.{first + k}." for k in range(spec.num_nextn_predict_layers))


def _block(spec: ModelSpec, layer: int, ours: str) -> Iterator[Slot]:
    hf, d = f"model.layers.{layer}", spec.hidden_size
    yield Slot(f"{hf}.input_layernorm.weight", (d,), f"{ours}.input_layernorm.weight")
    for name, shape, quantised in _attention(spec):
        own = f"self_attn.{name}"
        yield Slot(f"{hf}.{own}", shape, f"{ours}.{own}", quantised=quantised)
    yield Slot(f"{hf}.post_attention_layernorm.weight", (d,), f"{ours}.post_attention_layernorm.weight")
    hf, ours, m = f"{hf}.mlp", f"{ours}.mlp", spec.moe
    if m is None or not spec.is_moe_layer(layer):
        yield from _mlp(hf, ours, d, spec.intermediate_size)
        return
    num_experts, width = m.n_routed_experts, m.moe_intermediate_size
    yield Slot(f"{hf}.gate.weight", (num_experts, d), f"{ours}.gate.weight")
    if m.selection_bias:
        name = "gate.e_score_correction_bias"
        yield Slot(f"{hf}.{name}", (num_experts,), f"{ours}.{name}", float32=True)
    for e in range(num_experts):
        for position, name in enumerate(("gate_proj", "up_proj")):
            expert = f"{hf}.experts.{e}.{name}.weight"
            yield Slot(expert, (width, d), f"{ours}.experts.gate_up", (e, position), quantised=True)
    for e in range(num_experts):
        expert = f"{hf}.experts.{e}.down_proj.weight"
        yield Slot(expert, (d, width), f"{ours}.experts.down", (e,), quantised=True)
    if m.n_shared_experts:
        yield from _mlp(f"{hf}.shared_experts", f"{ours}.shared_experts", d, m.n_shared_experts * width)


def _mlp(hf: str, ours: str, d: int, width: int) -> Iterator[Slot]:
    for name, shape in (("gate_proj", (width, d)), ("up_proj", (width, d)), ("down_proj", (d, width))):
        yield Slot(f"{hf}.{name}.weight", shape, f"{ours}.{name}.weight", quantised=True)


def _attention(spec: ModelSpec) -> Iterator[tuple[str, Shape, bool]]:
    """Names below `self_attn.`, shapes, and whether FP8 quantises them."""
    d, heads, a = spec.hidden_size, spec.num_attention_heads, spec.attention
    if isinstance(a, GQA):
        widths = {"q": heads * a.head_dim} | dict.fromkeys("kv", a.num_key_value_heads * a.head_dim)
        for name, width in widths.items():
            yield f"{name}_proj.weight", (width, d), True
            if a.qkv_bias:
                yield f"{name}_proj.bias", (width,), False
        yield "o_proj.weight", (d, heads * a.head_dim), True
        if a.qk_norm:
            yield "q_norm.weight", (a.head_dim,), False
            yield "k_norm.weight", (a.head_dim,), False
        return
    assert isinstance(a, MLA)
    if a.q_lora_rank is None:
        yield "q_proj.weight", (heads * a.qk_head_dim, d), True
    else:
        yield "q_a_proj.weight", (a.q_lora_rank, d), True
        yield "q_a_layernorm.weight", (a.q_lora_rank,), False
        yield "q_b_proj.weight", (heads * a.qk_head_dim, a.q_lora_rank), True
    yield "kv_a_proj_with_mqa.weight", (a.latent_dim, d), True
    yield "kv_a_layernorm.weight", (a.kv_lora_rank,), False
    yield "kv_b_proj.weight", (heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank), True
    yield "o_proj.weight", (d, heads * a.v_head_dim), True
