"""ModelSpec and config.json: every valid spec survives the round trip, every bad file is one clear line."""

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whalepod.spec.errors import UserError
from whalepod.spec.model import (
    GQA,
    MLA,
    BlockFP8,
    Indexer,
    ModelSpec,
    MoE,
    Rope,
    from_config,
    read_config,
    shown,
    to_config,
)
from whalepod.spec.presets import load_model_spec

MLA_MODELS = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM")
GQA_MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "DeepseekForCausalLM")

sizes = st.integers(1, 2**18)
ratios = st.floats(1e-6, 1e6)


@st.composite
def ropes(draw: st.DrawFn, interleaved: st.SearchStrategy[bool]) -> Rope:
    kind = draw(st.sampled_from(["default", "linear", "yarn", "llama3"]))
    values: dict[str, Any] = {}
    if kind != "default":
        values["factor"] = draw(ratios)
    if kind in ("yarn", "llama3"):
        values["original_max_position_embeddings"] = draw(sizes)
    if kind == "yarn":
        values |= {k: draw(ratios) for k in ("beta_fast", "beta_slow")}
        values |= {k: draw(st.none() | ratios) for k in ("mscale", "mscale_all_dim")}
    if kind == "llama3":
        values |= {k: draw(ratios) for k in ("low_freq_factor", "high_freq_factor")}
    return Rope(theta=draw(st.floats(1.0, 1e8)), kind=kind, interleaved=draw(interleaved), **values)


@st.composite
def experts(draw: st.DrawFn) -> MoE:
    groups, per_group = draw(st.integers(1, 8)), draw(st.integers(2, 64))
    top_groups = draw(st.integers(1, groups))
    return MoE(
        n_routed_experts=groups * per_group,
        num_experts_per_tok=draw(st.integers(1, top_groups * per_group)),
        n_shared_experts=draw(st.integers(0, 4)),
        moe_intermediate_size=draw(sizes),
        first_k_dense_replace=draw(st.integers(0, 4)),
        moe_layer_freq=draw(st.integers(1, 3)),
        scoring_func=draw(st.sampled_from(["softmax", "sigmoid"])),
        topk_method=draw(st.sampled_from(["greedy", "group_limited_greedy", "noaux_tc"])),
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(ratios),
    )


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Any valid spec that its architecture can express."""
    architecture = draw(st.sampled_from(MLA_MODELS + GQA_MODELS))
    mla = architecture in MLA_MODELS
    sparse = architecture == "DeepseekV32ForCausalLM"
    kv_heads = draw(st.integers(1, 16))
    heads = kv_heads * draw(st.integers(1, 16))
    even = st.integers(1, 512).map(lambda n: 2 * n)
    attention: MLA | GQA
    if mla:
        q_rank = draw(sizes) if sparse else draw(st.none() | sizes)
        attention = MLA(q_rank, draw(sizes), draw(sizes), draw(even), draw(sizes))
    else:
        bias = architecture == "Qwen2ForCausalLM" or draw(st.booleans())
        attention = GQA(kv_heads, draw(even), qkv_bias=bias, qk_norm=architecture == "Qwen3ForCausalLM")
    moe = draw(st.none() | experts()) if mla or architecture == "DeepseekForCausalLM" else None
    v3 = architecture in MLA_MODELS[1:]
    block = st.builds(
        BlockFP8, st.tuples(st.integers(1, 512), st.integers(1, 512)), st.sampled_from(["float32", "ue8m0"])
    )
    return ModelSpec(
        name="any",
        architecture=architecture,
        num_hidden_layers=draw(st.integers(1, 128)),
        hidden_size=draw(sizes),
        num_attention_heads=heads,
        intermediate_size=draw(sizes),
        vocab_size=draw(sizes),
        max_position_embeddings=draw(sizes),
        attention=attention,
        rope=draw(ropes(st.booleans() if mla else st.just(False))),
        moe=moe,
        indexer=draw(st.builds(Indexer, sizes, sizes, sizes)) if sparse else None,
        num_nextn_predict_layers=draw(st.integers(0, 16)) if v3 else 0,
        rms_norm_eps=draw(st.floats(1e-20, 1.0)),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=draw(st.floats(0, 1)),
        quantization=draw(st.none() | block),
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 10**9, 10**40, 10**400, 2**63, 1e308])
    | st.floats()
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
V32 = to_config(load_model_spec("deepseek-v3.2"))
FIELDS = sorted(V32)
ROPE_FIELDS = sorted(V32["rope_scaling"])


@given(specs())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_config_round_trip(spec: ModelSpec) -> None:
    config = json.loads(json.dumps(to_config(spec), allow_nan=False))
    assert from_config(config, spec.name) == spec


def check_only_user_errors(config: Any) -> None:
    try:
        spec = from_config(config, "any")
    except UserError as error:
        message = str(error)
    else:
        assert from_config(to_config(spec), "any") == spec
        return
    assert message
    assert "\n" not in message
    assert len(message) < 1000


@given(st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_replaced_fields_raise_user_errors_only(junk: dict[str, Any]) -> None:
    check_only_user_errors(V32 | junk)


@given(st.dictionaries(st.sampled_from(ROPE_FIELDS), json_values, min_size=1, max_size=2))
@settings(max_examples=200, deadline=None)
def test_replaced_rope_fields_raise_user_errors_only(junk: dict[str, Any]) -> None:
    check_only_user_errors(V32 | {"rope_scaling": V32["rope_scaling"] | junk})
    check_only_user_errors(V32 | {"rope_parameters": junk})
    check_only_user_errors(V32 | {"quantization_config": junk | {"weight_block_size": list(junk.values())}})


@given(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=4), json_values)
@settings(max_examples=100, deadline=None)
def test_missing_fields_and_junk_raise_user_errors_only(missing: list[str], junk: Any) -> None:
    check_only_user_errors({k: v for k, v in V32.items() if k not in missing})
    check_only_user_errors(junk)
    check_only_user_errors({"architectures": [junk]})


@pytest.mark.parametrize(
    "field",
    ["hidden_size", "num_hidden_layers", "kv_lora_rank", "vocab_size", "index_topk", "n_routed_experts"],
)
def test_missing_field_is_named(field) -> None:
    config = {k: v for k, v in V32.items() if k != field}
    if field == "n_routed_experts":  # without it the model is dense
        assert from_config(config, "any").moe is None
        return
    with pytest.raises(UserError, match=field):
        from_config(config, "any")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "7168"}, "hidden_size must be of type int"),
        ({"hidden_size": True}, "hidden_size must be of type int"),
        ({"hidden_size": 7168.5}, "hidden_size must be of type int"),
        ({"hidden_size": 10**5000}, "hidden_size must be greater than 0"),
        ({"hidden_size": -1}, "hidden_size must be greater than 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"initializer_range": math.nan}, "initializer_range"),
        ({"initializer_range": -1.0}, "initializer_range"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": V32["rope_scaling"] | {"mscale": math.nan}}, "mscale"),
        ({"rope_scaling": V32["rope_scaling"] | {"original_max_position_embeddings": -4096}}, "original_max"),
        ({"rope_scaling": {"type": "yran"}}, "did you mean 'yarn'"),
        ({"scoring_func": "sigmiod"}, "scoring_func"),
        ({"topk_method": "greddy"}, "did you mean 'greedy'"),
        ({"model_type": "deepseek_v4"}, "not supported"),
        ({"model_type": None, "architectures": [["nested"]]}, "model_type"),
        ({"model_type": None, "architectures": []}, "model_type"),
        ({"model_type": "x" * 10**6}, "200 characters"),
        ({"num_experts_per_tok": 129}, "within reach"),
        ({"n_group": 7}, "must divide"),
        ({"n_group": None, "topk_group": 2}, "topk_group"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_nextn_predict_layers": 17}, "num_nextn_predict_layers"),
        ({"q_lora_rank": None}, "q_lora_rank"),
        ({"q_lora_rank": 10**12}, "q_lora_rank"),
        ({"n_shared_experts": 10**12}, "n_shared_experts"),
        ({"qk_rope_head_dim": 63}, "even"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"weight_block_size": [128]}}, "weight_block_size"),
    ],
)
def test_bad_values_are_explained(change, message) -> None:
    with pytest.raises(UserError, match=message):
        from_config(V32 | change, "any")


def deep_list(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_deep_values_are_shown_shortly() -> None:
    with pytest.raises(UserError, match="hidden_size must be of type int") as refused:
        from_config(V32 | {"hidden_size": deep_list(50_000)}, "any")
    assert len(str(refused.value)) < 200
    assert shown("a" * 10**6).endswith("'")
    assert len(shown(dict.fromkeys(range(1000), "x" * 1000))) < 1000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not json",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b"\xff\xfe\x00",
        b'{"hidden_size": 1' + b"0" * 10_000 + b"}",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model_type": "deepseek_v3", "hidden_size": NaN}',
        b'{"model_type": "llama", "hidden_size": Infinity, "num_attention_heads": -Infinity}',
        b" " * (2**22 + 1),
        b'{"model_type": "\\ud800"}',
    ],
    ids=lambda data: repr(data[:16]),
)
def test_malformed_files_raise_user_errors(tmp_path, data) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(data)
    for path in (file, tmp_path, str(file)):
        with pytest.raises(UserError, match="config"):
            read_config(path)


@given(data=st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_raise_user_errors(tmp_path, data) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(data)
    with pytest.raises(UserError):
        read_config(file)


@pytest.mark.parametrize("path", ["does/not/exist", "\0", "x" * 5000])
def test_unreadable_paths_raise_user_errors(path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_config(path)


def test_unreadable_folder_has_no_config(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_config(tmp_path)


def test_files_are_utf8_whatever_the_locale(tmp_path) -> None:
    config = V32 | {"comment": "鲸鱼"}
    (tmp_path / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    assert read_config(tmp_path).name == tmp_path.name


def test_transformers_5_form() -> None:
    """rope_parameters in one place; floats where the hub has integers."""
    hub = {k: v for k, v in V32.items() if k not in ("rope_theta", "rope_scaling")}
    rope = V32["rope_scaling"] | {"rope_theta": 10000, "factor": 40, "rope_type": "yarn"}
    assert from_config(hub | {"rope_parameters": rope}, "any") == from_config(V32, "any")
    assert from_config(V32 | {"hidden_size": 7168.0}, "any").hidden_size == 7168


def test_with_() -> None:
    spec = load_model_spec("deepseek-v3")
    smaller = spec.with_(num_hidden_layers=4, kv_lora_rank=256, n_routed_experts=64, theta=5e5)
    assert isinstance(smaller.attention, MLA)
    assert smaller.moe is not None
    assert (smaller.attention.kv_lora_rank, smaller.moe.n_routed_experts, smaller.rope.theta) == (
        256,
        64,
        5e5,
    )
    with pytest.raises(UserError, match="did you mean 'hidden_size'"):
        spec.with_(hiden_size=1)


def test_moe_layers() -> None:
    spec = load_model_spec("deepseek-v3")
    assert [spec.is_moe_layer(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert spec.num_moe_layers == 58
    assert load_model_spec("deepseek-llm-7b").num_moe_layers == 0
