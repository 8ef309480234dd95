"""ModelSpec: what a DeepSeek-family model is, read from a Hugging Face `config.json`.

Field names are those of the config files. Everything downstream (counts, the torch model, the
planner) asks the spec; nothing looks at a model's name.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from whalepod.spec.errors import UserError, nearest


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. `kind` is the config's `rope_type`; unused fields keep their defaults.

    `interleaved`: pairs are neighbours (DeepSeek's MLA) rather than halves (Llama).
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    interleaved: bool = False


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of what is cached per token and layer: compressed key-value and rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class GQA:
    """Grouped-query attention of the Llama-like models (MHA when the counts are equal)."""

    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class MoE:
    """Fine-grained experts. `scoring_func` softmax is V2's router, sigmoid V3's.

    `topk_method`: `greedy`; `group_limited_greedy` (a group's score is its best expert);
    `noaux_tc` (selection bias; a group's score is the sum of its best two).
    """

    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    moe_layer_freq: int = 1
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "greedy"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    @property
    def selection_bias(self) -> bool:
        """Whether the router carries `e_score_correction_bias` (V3, section 2.1.2)."""
        return self.topk_method == "noaux_tc"


@dataclass(frozen=True)
class Indexer:
    """The lightning indexer of DeepSeek sparse attention (V3.2)."""

    index_n_heads: int
    index_head_dim: int
    index_topk: int


@dataclass(frozen=True)
class BlockFP8:
    """Weights stored as E4M3 with one scale per block (`weight_scale_inv`)."""

    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: Literal["float32", "ue8m0"] = "float32"


@dataclass(frozen=True)
class ModelSpec:
    """A model's architecture; a value. `name` is for messages only."""

    name: str
    architecture: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    attention: MLA | GQA
    rope: Rope
    moe: MoE | None = None
    indexer: Indexer | None = None
    num_nextn_predict_layers: int = 0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    quantization: BlockFP8 | None = None

    def __post_init__(self) -> None:
        _validate(self)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` has experts; MTP blocks (>= num_hidden_layers) follow the last."""
        if self.moe is None:
            return False
        return layer >= self.moe.first_k_dense_replace and layer % self.moe.moe_layer_freq == 0

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe_layer(i) for i in range(self.num_hidden_layers))

    def check_prompt(self, ids: Sequence[int], max_new_tokens: int) -> None:
        """Raises UserError unless the model can take a prompt of these tokens and write so many after it."""
        if not ids:
            raise UserError("the prompt is empty")
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            worst = max(ids) if min(ids) >= 0 else min(ids)
            raise UserError(f"token id {worst} is beyond the model's vocabulary of {self.vocab_size}")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if len(ids) + max_new_tokens > self.max_position_embeddings:
            raise UserError(
                f"prompt of {len(ids)} and {max_new_tokens} new tokens exceed the model's "
                f"{self.max_position_embeddings} positions"
            )

    def with_(self, **changes: Any) -> ModelSpec:
        """A copy with fields of the spec or of its attention, experts or rope replaced."""
        for key, value in changes.items():
            places = (self, self.attention, self.moe, self.rope)
            old = next((getattr(part, key) for part in places if hasattr(part, key)), None)
            allowed = (int, float) if type(old) is float else type(old)
            if isinstance(value, dict | list) or (
                isinstance(old, bool | int | float | str)
                and (not isinstance(value, allowed) or isinstance(value, bool) != isinstance(old, bool))
            ):
                raise UserError(f"{key} must be of type {type(old).__name__}, not {shown(value)}")
        own = {k: v for k, v in changes.items() if k in ModelSpec.__dataclass_fields__}
        rest = {k: v for k, v in changes.items() if k not in own}
        for part in ("attention", "moe", "rope"):
            value = own.get(part, getattr(self, part))
            if value is None:
                continue
            mine = {k: rest.pop(k) for k in list(rest) if k in type(value).__dataclass_fields__}
            if mine:
                own[part] = replace(value, **mine)
        if rest:
            key = next(iter(rest))
            known = set(ModelSpec.__dataclass_fields__)
            for part in (self.attention, self.moe, self.rope):
                known |= set(type(part).__dataclass_fields__) if part is not None else set()
            raise UserError(f"unknown model field {shown(key)}{nearest(key[:100], known)}")
        return replace(self, **own)


_MLA_TYPES = {"deepseek_v2", "deepseek_v3", "deepseek_v32"}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
}
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_MAX_CONFIG_CHARS = 2**22


def shown(value: object) -> str:
    """`repr` for messages: short and shallow, whatever a hostile file holds."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # integers of thousands of digits have no repr
        return "a huge number"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def read_config(path: Path | str) -> ModelSpec:
    """ModelSpec of a Hugging Face folder or `config.json`. Raises UserError with one line."""
    path = Path(path)
    try:
        file = path / "config.json" if path.is_dir() else path
        with file.open(encoding="utf-8") as stream:
            text = stream.read(_MAX_CONFIG_CHARS + 1)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise UserError(f"cannot read model config {shown(str(path))}: {error}") from None
    if len(text) > _MAX_CONFIG_CHARS:
        raise UserError(f"{file} is larger than a model config may be ({_MAX_CONFIG_CHARS} characters)")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also integers of thousands of digits
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold a JSON object, not {type(config).__name__}")
    try:
        return from_config(config, name=path.name if path.is_dir() else path.parent.name or "model")
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """ModelSpec from a parsed `config.json`, in the form of the hub or of transformers 5.

    Raises UserError naming the field that is missing, of the wrong type or not supported.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"config must be a mapping, not {type(config).__name__}")
    c = _Fields(config)
    model_type = c.get("model_type", str, None)
    if model_type is None:
        by_class = {v: k for k, v in _ARCHITECTURES.items()}
        first = next(iter(c.get("architectures", list, [])), None)
        model_type = by_class.get(first) if isinstance(first, str) else None
        if model_type is None:
            raise UserError("config has neither a known 'model_type' nor 'architectures'")
    if model_type not in _ARCHITECTURES:
        raise UserError(f"model_type {model_type!r} is not supported{nearest(model_type, _ARCHITECTURES)}")
    heads = c.need("num_attention_heads", int)
    hidden = c.need("hidden_size", int)
    mla = model_type in _MLA_TYPES
    attention: MLA | GQA
    if mla:
        attention = MLA(
            q_lora_rank=c.get("q_lora_rank", int, None),
            kv_lora_rank=c.need("kv_lora_rank", int),
            qk_nope_head_dim=c.need("qk_nope_head_dim", int),
            qk_rope_head_dim=c.need("qk_rope_head_dim", int),
            v_head_dim=c.need("v_head_dim", int),
        )
    else:
        attention = GQA(
            num_key_value_heads=c.get("num_key_value_heads", int, None) or heads,
            head_dim=c.get("head_dim", int, None) or hidden // max(heads, 1),
            qkv_bias=c.get("attention_bias", bool, False) or model_type == "qwen2",
            qk_norm=model_type == "qwen3",
        )
    sparse = model_type == "deepseek_v32"
    quantization = c.get("quantization_config", dict, None)
    return ModelSpec(
        name=name,
        architecture=_ARCHITECTURES[model_type],
        num_hidden_layers=c.need("num_hidden_layers", int),
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=c.need("intermediate_size", int),
        vocab_size=c.need("vocab_size", int),
        max_position_embeddings=c.get("max_position_embeddings", int, 4096),
        attention=attention,
        rope=_rope(c, interleaved=mla and c.get("rope_interleave", bool, True)),
        moe=_moe(c, model_type),
        indexer=Indexer(
            c.need("index_n_heads", int), c.need("index_head_dim", int), c.need("index_topk", int)
        )
        if sparse
        else None,
        num_nextn_predict_layers=c.get("num_nextn_predict_layers", int, 0)
        if model_type in ("deepseek_v3", "deepseek_v32")
        else 0,
        rms_norm_eps=c.get("rms_norm_eps", float, 1e-6),
        tie_word_embeddings=c.get("tie_word_embeddings", bool, False),
        initializer_range=c.get("initializer_range", float, 0.02),
        quantization=_quantization(quantization) if quantization else None,
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face `config.json` of a spec; `from_config` reads it back to an equal spec."""
    model_type = {v: k for k, v in _ARCHITECTURES.items()}[spec.architecture]
    config: dict[str, Any] = {
        "architectures": [spec.architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "num_hidden_layers": spec.num_hidden_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "initializer_range": spec.initializer_range,
        "torch_dtype": "bfloat16",
    }
    a = spec.attention
    if isinstance(a, MLA):
        config |= {f: getattr(a, f) for f in a.__dataclass_fields__}
        config |= {"num_key_value_heads": spec.num_attention_heads, "attention_bias": False}
        config["rope_interleave"] = spec.rope.interleaved
    else:
        config |= {"num_key_value_heads": a.num_key_value_heads, "head_dim": a.head_dim}
        config["attention_bias"] = a.qkv_bias and model_type != "qwen2"
    if spec.moe is not None:
        config |= {f: getattr(spec.moe, f) for f in spec.moe.__dataclass_fields__}
    if spec.indexer is not None:
        config |= {f: getattr(spec.indexer, f) for f in spec.indexer.__dataclass_fields__}
    if spec.num_nextn_predict_layers or model_type in ("deepseek_v3", "deepseek_v32"):
        config["num_nextn_predict_layers"] = spec.num_nextn_predict_layers
    config["rope_theta"] = spec.rope.theta
    config["rope_scaling"] = _rope_scaling(spec.rope)
    if spec.quantization is not None:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(spec.quantization.weight_block_size),
        }
        if spec.quantization.scale_fmt != "float32":
            config["quantization_config"]["scale_fmt"] = spec.quantization.scale_fmt
    return config


def _rope(c: _Fields, interleaved: bool) -> Rope:
    # The hub writes rope_theta and rope_scaling; transformers 5 one rope_parameters.
    merged = c.get("rope_parameters", dict, None) or c.get("rope_scaling", dict, None) or {}
    s = _Fields(merged)
    kind = s.get("rope_type", str, None) or s.get("type", str, "default")
    if kind not in _ROPE_FIELDS:
        raise UserError(f"rope type {kind!r} is not supported{nearest(kind, _ROPE_FIELDS)}")
    # Only what the kind uses: stray fields of another kind would make equal models differ.
    used = {
        f: s.get(f, int if f == "original_max_position_embeddings" else float, getattr(Rope, f))
        for f in _ROPE_FIELDS[kind]
    }
    theta = s.get("rope_theta", float, None) or c.get("rope_theta", float, 10000.0)
    return Rope(theta=theta, kind=kind, interleaved=interleaved, **used)


def _rope_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    values = {f: getattr(rope, f) for f in _ROPE_FIELDS[rope.kind] if getattr(rope, f) is not None}
    return {"type": rope.kind, "rope_type": rope.kind} | values


def _moe(c: _Fields, model_type: str) -> MoE | None:
    if model_type not in ("deepseek", *_MLA_TYPES) or c.get("n_routed_experts", int, None) is None:
        return None
    v3 = model_type in ("deepseek_v3", "deepseek_v32")
    scoring = c.get("scoring_func", str, "sigmoid" if v3 else "softmax")
    if scoring not in ("softmax", "sigmoid"):
        raise UserError(f"scoring_func {scoring!r} is not supported (allowed: sigmoid, softmax)")
    method = c.get("topk_method", str, "noaux_tc" if v3 else "greedy")
    methods = ("greedy", "group_limited_greedy", "noaux_tc")
    if method not in methods:
        raise UserError(f"topk_method {method!r} is not supported{nearest(method, methods)}")
    return MoE(
        n_routed_experts=c.need("n_routed_experts", int),
        num_experts_per_tok=c.need("num_experts_per_tok", int),
        n_shared_experts=c.get("n_shared_experts", int, None) or 0,
        moe_intermediate_size=c.need("moe_intermediate_size", int),
        first_k_dense_replace=c.get("first_k_dense_replace", int, 0),
        moe_layer_freq=c.get("moe_layer_freq", int, 1),
        scoring_func=scoring,
        topk_method=method,
        n_group=c.get("n_group", int, None) or 1,
        topk_group=c.get("topk_group", int, None) or 1,
        norm_topk_prob=c.get("norm_topk_prob", bool, v3),
        routed_scaling_factor=c.get("routed_scaling_factor", float, 2.5 if v3 else 1.0),
    )


def _quantization(config: dict[str, Any]) -> BlockFP8:
    q = _Fields(config)
    method = q.get("quant_method", str, "fp8")
    if method != "fp8":
        raise UserError(f"quantization_config quant_method {method!r} is not supported (allowed: fp8)")
    block = q.get("weight_block_size", list, [128, 128])
    if len(block) != 2 or not all(
        isinstance(b, int) and not isinstance(b, bool) and 0 < b < 10**9 for b in block
    ):
        raise UserError(f"weight_block_size must be two positive numbers, not {shown(block)}")
    scale_fmt = q.get("scale_fmt", str, "float32")
    if scale_fmt not in ("float32", "ue8m0"):
        raise UserError(f"scale_fmt {scale_fmt!r} is not supported (allowed: float32, ue8m0)")
    return BlockFP8((block[0], block[1]), scale_fmt)


class _Fields:
    """Typed access to a parsed config: a wrong type is the user's mistake, said in one line."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023:
            value = float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{key} must be of type {kind.__name__}, not {shown(value)}")
        if isinstance(value, str) and len(value) > 200:
            raise UserError(f"{key} must be at most 200 characters long, not {len(value)}")
        return value

    def need(self, key: str, kind: type) -> Any:
        value = self.get(key, kind, None)
        if value is None:
            raise UserError(f"required field {key!r} is missing")
        return value


def _validate(s: ModelSpec) -> None:
    a, m = s.attention, s.moe
    positive = {
        "num_hidden_layers": s.num_hidden_layers,
        "hidden_size": s.hidden_size,
        "num_attention_heads": s.num_attention_heads,
        "intermediate_size": s.intermediate_size,
        "vocab_size": s.vocab_size,
        "max_position_embeddings": s.max_position_embeddings,
        "rms_norm_eps": s.rms_norm_eps,
        "rope_theta": s.rope.theta,
        "rope factor": s.rope.factor,
    }
    parts = [p for p in (a, m, s.indexer) if p is not None]
    optional = {"n_shared_experts", "first_k_dense_replace", "q_lora_rank"}
    for part in parts:
        for field in part.__dataclass_fields__:
            value = getattr(part, field)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and field not in optional:
                positive[field] = value
    for field, value in positive.items():
        # An upper bound keeps a hostile config from asking for more than any machine has.
        if not 0 < value < 10**9:
            raise UserError(f"{field} must be greater than 0 and below {10**9}, not {shown(value)}")
    rope = {f: v for f in s.rope.__dataclass_fields__ if isinstance(v := getattr(s.rope, f), float)}
    for field, value in (rope | {"initializer_range": s.initializer_range}).items():
        if not isfinite(value):
            raise UserError(f"{field} must be a finite number, not {value}")
    if not 0 < (s.rope.original_max_position_embeddings or 1) < 10**9:
        number = shown(s.rope.original_max_position_embeddings)
        raise UserError(f"original_max_position_embeddings must be between 1 and {10**9 - 1}, not {number}")
    if s.initializer_range < 0:
        raise UserError(f"initializer_range must not be negative, not {s.initializer_range}")
    if not 0 <= s.num_nextn_predict_layers <= 16:
        raise UserError(f"num_nextn_predict_layers must be 0 to 16, not {shown(s.num_nextn_predict_layers)}")
    if s.num_hidden_layers > 10_000:
        raise UserError(f"num_hidden_layers must be at most 10000, not {s.num_hidden_layers}")
    if isinstance(a, MLA):
        if a.q_lora_rank is not None and not 0 < a.q_lora_rank < 10**9:
            number = shown(a.q_lora_rank)
            raise UserError(f"q_lora_rank must be between 1 and {10**9 - 1} or null, not {number}")
        if a.q_lora_rank is None and s.indexer is not None:
            raise UserError("q_lora_rank must not be null: the indexer reads the compressed query")
        rotary = a.qk_rope_head_dim
    else:
        if s.num_attention_heads % a.num_key_value_heads:
            raise UserError(
                f"num_key_value_heads {a.num_key_value_heads} must divide "
                f"num_attention_heads {s.num_attention_heads}"
            )
        rotary = a.head_dim
    if rotary % 2:
        raise UserError(f"rotary dimension must be even, not {rotary}")
    if s.rope.kind in ("yarn", "llama3") and not s.rope.original_max_position_embeddings:
        raise UserError(f"rope type {s.rope.kind!r} needs original_max_position_embeddings")
    if m is None:
        return
    if m.n_routed_experts % m.n_group:
        raise UserError(f"n_group {m.n_group} must divide n_routed_experts {m.n_routed_experts}")
    if m.topk_group > m.n_group:
        raise UserError(f"topk_group {m.topk_group} must be at most n_group {m.n_group}")
    reachable = m.n_routed_experts // m.n_group * m.topk_group
    if m.num_experts_per_tok > reachable:
        raise UserError(
            f"num_experts_per_tok {m.num_experts_per_tok} must be at most the {reachable} within reach"
        )
    for field in ("first_k_dense_replace", "n_shared_experts"):
        if not 0 <= getattr(m, field) < 10**9:
            raise UserError(f"{field} must be between 0 and {10**9 - 1}, not {shown(getattr(m, field))}")
    if m.topk_method == "noaux_tc" and m.n_group > 1 and m.n_routed_experts // m.n_group < 2:
        raise UserError("noaux_tc scores a group by its best two experts; groups of one are not possible")
