"""The models of `transformers` as an oracle: small configs, random weights, copies into whalepod."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from whalepod.models.attention import Attention
from whalepod.models.transformer import Transformer
from whalepod.spec.model import ModelSpec, from_config

VOCAB = 96
LENGTH = 24

# Long enough before stretching that of a width of 16 some pairs keep their frequency, some are
# stretched and some are in between.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V2_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
QWEN3_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": 256,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Every width differs from every other, so that no two can be confused. (Grouped products want rows
# of a multiple of 16 bytes: the experts' width is a multiple of 8.)
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}


def v3(**changes: Any) -> DeepseekV3Config:
    base = {"q_lora_rank": 34, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "rope_parameters": YARN}
    return DeepseekV3Config(**_COMMON | _MLA | base | {"num_nextn_predict_layers": 0} | changes)


def v2(**changes: Any) -> DeepseekV2Config:
    base = {"q_lora_rank": None, "n_shared_experts": 2, "rope_parameters": V2_YARN}
    return DeepseekV2Config(**_COMMON | _MLA | base | changes)


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**_COMMON | {"num_key_value_heads": 4, "rope_parameters": DEFAULT} | changes)


def qwen2(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**_COMMON | {"num_key_value_heads": 2, "rope_parameters": DEFAULT} | changes)


def qwen3(**changes: Any) -> Qwen3Config:
    base = {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": QWEN3_YARN}
    return Qwen3Config(**_COMMON | base | changes)


V2_GROUPS: dict[str, Any] = {
    "q_lora_rank": 34,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 16.0,
}
MLA_CONFIGS: dict[str, PreTrainedConfig] = {
    "v3": v3(),
    "v3-no-q-lora": v3(q_lora_rank=None),
    "v3-one-group": v3(n_group=1, topk_group=1),
    "v3-rope-default": v3(rope_parameters=DEFAULT),
    "v3-wide-values": v3(v_head_dim=40),
    "v2-lite": v2(),
    "v2-groups": v2(**V2_GROUPS),
    "v2.5-mscale-1": v2(**V2_GROUPS | {"rope_parameters": YARN}),
}
CONFIGS: dict[str, PreTrainedConfig] = MLA_CONFIGS | {
    "llama": llama(),
    "llama-gqa": llama(num_key_value_heads=2),
    "llama-linear": llama(rope_parameters=LINEAR),
    "llama3": llama(num_key_value_heads=1, rope_parameters=LLAMA3),
    "llama-tied": llama(tie_word_embeddings=True),
    "qwen2": qwen2(),
    "qwen3": qwen3(),
}


def spec_of(config: PreTrainedConfig) -> ModelSpec:
    """As a user's config.json would be read."""
    return from_config(config.to_dict(), config.model_type)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Fills every parameter and selection bias so that each one matters and logits have scale."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("inv_freq", "load")):
            continue
        tensor.normal_(generator=generator)
        if name.endswith("norm.weight"):
            tensor.mul_(0.2).add_(1.0)
        elif name.endswith("e_score_correction_bias"):
            tensor.mul_(0.3)
        elif tensor.dim() > 1 and "embed_tokens" not in name:
            tensor.mul_(1.5 * tensor.shape[-1] ** -0.5)


def oracle_model(config: PreTrainedConfig, seed: int = 0) -> Any:
    """The transformers model in fp32, by its plainest code: eager attention, a loop over experts."""
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise(model, seed)
    return model.eval()


def our_name(name: str) -> str:
    """transformers' parameter name to whalepod's."""
    name = name.removeprefix("model.")
    return name.replace("mlp.experts.gate_up_proj", "mlp.experts.gate_up").replace(
        "mlp.experts.down_proj", "mlp.experts.down"
    )


def our_model(reference: nn.Module, config: PreTrainedConfig) -> Transformer:
    """whalepod's model of the same config, holding copies of the reference's weights."""
    model = Transformer(spec_of(config))
    ours = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in reference.state_dict().items():
            target = ours.pop(our_name(name))
            target.copy_(tensor.view_as(target))
    missing = {name for name in ours if not name.startswith("mtp.")}
    assert not missing, f"not in transformers' model: {missing}"
    return model.eval()


def pair(config: PreTrainedConfig, seed: int = 0) -> tuple[Any, Transformer]:
    reference = oracle_model(config, seed)
    return reference, our_model(reference, config)


def random_tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gradients(reference: nn.Module, model: Transformer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, whalepod's gradient and transformers', for every parameter of whalepod's but MTP's."""
    expected = {our_name(n): p.grad for n, p in reference.named_parameters()}
    ours = {n: p.grad for n, p in model.named_parameters() if not n.startswith("mtp.")}
    assert ours.keys() == expected.keys()
    for name, grad in ours.items():
        wanted = expected[name]
        assert grad is not None, f"{name} has no gradient"
        assert wanted is not None, f"{name} has no gradient in transformers"
        yield name, grad, wanted.view_as(grad)


def logit_error(ours: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def relative(ours: Tensor, expected: Tensor) -> float:
    """2-norm of the difference over that of the expected."""
    return ((ours - expected).norm() / expected.norm()).item()


class GrowingCache:
    """The simplest cache behind the `attend` seam: keeps every layer's rows and appends to them."""

    def __init__(self, form: str, mask: Tensor | None = None) -> None:
        self.form, self.mask = form, mask
        self.rows: dict[int, Tensor] = {}

    def attend(self, attention: Attention, q: Tensor, kv: Tensor) -> Tensor:
        before = self.rows.get(attention.layer)
        rows = kv if before is None else torch.cat((before, kv), dim=1)
        self.rows[attention.layer] = rows
        return getattr(attention, self.form)(q, rows, self.mask)
