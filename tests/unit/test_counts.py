"""Counts against published and independently computed figures, to the digit where the figures are exact."""

import pytest

from whalepod.spec import counts
from whalepod.spec.errors import UserError
from whalepod.spec.model import ModelSpec, from_config
from whalepod.spec.presets import preset, preset_names

# name, total, active with embedding and head, active head only (None for dense), MTP, KV elements per token
EXACT = [
    ("deepseek-llm-7b", 6_910_365_696, 6_910_365_696, None, 0, 245_760),
    ("deepseek-llm-67b", 67_425_001_472, 67_425_001_472, None, 0, 194_560),
    ("deepseek-coder-1.3b", 1_346_471_936, 1_346_471_936, None, 0, 98_304),
    ("deepseek-coder-6.7b", 6_740_512_768, 6_740_512_768, None, 0, 262_144),
    ("deepseek-coder-33b", 33_342_991_360, 33_342_991_360, None, 0, 126_976),
    ("deepseek-coder-7b-v1.5", 6_910_365_696, 6_910_365_696, None, 0, 245_760),
    ("deepseek-moe-16b", 16_375_728_128, 2_828_650_496, 2_618_935_296, 0, 114_688),
    ("deepseek-v2-lite", 15_706_484_224, 2_661_150_208, 2_451_435_008, 0, 15_552),
    ("deepseek-coder-v2-lite", 15_706_484_224, 2_661_150_208, 2_451_435_008, 0, 15_552),
    ("deepseek-v2", 235_741_434_880, 21_375_800_320, 20_851_512_320, 0, 34_560),
    ("deepseek-coder-v2", 235_741_434_880, 21_375_800_320, 20_851_512_320, 0, 34_560),
    ("deepseek-v2.5", 235_741_434_880, 21_375_800_320, 20_851_512_320, 0, 34_560),
    ("deepseek-v3", 671_026_419_200, 37_552_297_472, 36_625_618_432, 11_610_068_224, 35_136),
    ("deepseek-v3-0324", 671_026_419_200, 37_552_297_472, 36_625_618_432, 11_610_068_224, 35_136),
    ("deepseek-r1", 671_026_419_200, 37_552_297_472, 36_625_618_432, 11_610_068_224, 35_136),
    ("deepseek-r1-0528", 671_026_419_200, 37_552_297_472, 36_625_618_432, 11_610_068_224, 35_136),
    ("deepseek-v3.1", 671_026_419_200, 37_552_297_472, 36_625_618_432, 11_610_068_224, 35_136),
    ("deepseek-v3.2-exp", 671_877_944_064, 38_403_822_336, 37_477_143_296, 11_624_027_648, 35_136),
    ("deepseek-v3.2", 671_877_944_064, 38_403_822_336, 37_477_143_296, 11_624_027_648, 35_136),
    ("deepseek-r1-distill-qwen-1.5b", 1_777_088_000, 1_777_088_000, None, 0, 14_336),
    ("deepseek-r1-distill-qwen-7b", 7_615_616_512, 7_615_616_512, None, 0, 28_672),
    ("deepseek-r1-distill-qwen-14b", 14_770_033_664, 14_770_033_664, None, 0, 98_304),
    ("deepseek-r1-distill-qwen-32b", 32_763_876_352, 32_763_876_352, None, 0, 131_072),
    ("deepseek-r1-distill-llama-8b", 8_030_261_248, 8_030_261_248, None, 0, 65_536),
    ("deepseek-r1-distill-llama-70b", 70_553_706_496, 70_553_706_496, None, 0, 163_840),
    ("deepseek-r1-0528-qwen3-8b", 8_190_735_360, 8_190_735_360, None, 0, 73_728),
]
COUNTED = [name for name in preset_names() if preset(name).spec is not None]


def spec_of(name: str) -> ModelSpec:
    spec = preset(name).spec
    assert spec is not None
    return spec


def dense(name: str, *, layers: int, hidden: int, heads: tuple[int, int], mlp: int, vocab: int) -> ModelSpec:
    """A foreign model, through the config form it is published in."""
    config = {
        "model_type": "qwen2" if name.startswith("qwen") else "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": mlp,
        "vocab_size": vocab,
    }
    return from_config(config, name)


QWEN_72B = dense("qwen2.5-72b", layers=80, hidden=8192, heads=(64, 8), mlp=29_568, vocab=152_064)
LLAMA_405B = dense("llama-3.1-405b", layers=126, hidden=16_384, heads=(128, 8), mlp=53_248, vocab=128_256)


def test_every_counted_preset_has_expected_digits() -> None:
    assert {row[0] for row in EXACT} == set(COUNTED) - {"v3-mini", "v3-bench"}


@pytest.mark.parametrize("row", EXACT, ids=lambda row: row[0])
def test_exact_counts(row) -> None:
    name, total, with_embedding, head_only, mtp, kv = row
    spec = spec_of(name)
    assert counts.total_params(spec) == total
    assert counts.active_params(spec, embedding=True) == with_embedding
    assert counts.reported_active_params(spec) == (total if head_only is None else head_only)
    if head_only is not None:
        assert counts.active_params(spec) == head_only
    assert counts.mtp_unique_params(spec) == mtp
    assert counts.kv_elements_per_token(spec) == kv
    assert counts.kv_bytes_per_token(spec) == 2 * kv
    assert counts.params(spec, mtp=True).total == total + mtp


def test_foreign_totals() -> None:
    # Qwen2.5 report: 72.7B; Llama 3 report: 405B (405,853,388,800 in the checkpoint)
    assert counts.total_params(QWEN_72B) == 72_706_203_648
    assert counts.total_params(LLAMA_405B) == 405_853_388_800


@pytest.mark.parametrize("name", COUNTED)
def test_layers_sum_to_the_model(name) -> None:
    spec = spec_of(name)
    layers = range(spec.num_hidden_layers)
    for active in (False, True):
        total = counts.embedding_params(spec) + counts.head_params(spec)
        for layer in layers:
            total += counts.layer_params(spec, layer, active)
        assert total == counts.params(spec, active)
    flops = counts.head_flops(spec)
    for layer in layers:
        flops += counts.layer_flops(spec, layer, 1000)
    assert flops.total == pytest.approx(counts.forward_flops(spec, 1000).total, rel=1e-12)
    for dtype in ("bf16", "fp8"):
        ends = 2 * (counts.embedding_params(spec) + counts.head_params(spec)).total
        blocks = sum(counts.layer_weight_bytes(spec, layer, dtype) for layer in layers)
        assert ends + blocks == counts.weight_bytes(spec, dtype)


def test_parts_of_v3() -> None:
    p = counts.params(spec_of("deepseek-v3"))
    assert p.embedding == p.head == 129_280 * 7168
    assert p.attention == 61 * 187_105_280
    assert p.selection_bias == 58 * 256
    assert p.routed_experts == 58 * 256 * counts.expert_params(spec_of("deepseek-v3"))
    assert "attn_q" not in p.as_dict()
    assert counts.indexer_params(spec_of("deepseek-v3.2")) == 13_959_424


def test_tied_embedding_counts_once() -> None:
    tied = spec_of("deepseek-r1-distill-qwen-1.5b").with_(tie_word_embeddings=True)
    assert counts.total_params(tied) == 1_777_088_000 - 151_936 * 1536  # 1.54B as the base model says
    assert counts.active_params(tied) == counts.total_params(tied)
    assert counts.head_flops(tied).total == 2 * 151_936 * 1536


# ------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(
    ("spec", "mtp", "published", "tolerance"),
    [
        (spec_of("deepseek-v3"), False, 249.7e9, 0.01),  # Megatron-Bridge, without MTP
        (spec_of("deepseek-v3"), True, 260.0e9, 0.01),  # Megatron-Bridge, with MTP
        (spec_of("deepseek-v3"), False, 250e9, 0.01),  # ISCA 2025, table 2
        (spec_of("deepseek-v2"), False, 155e9, 0.01),
        (LLAMA_405B, False, 2448e9, 0.015),
    ],
)
def test_training_flops_as_published(spec, mtp, published, tolerance) -> None:
    assert counts.train_flops(spec, 4096, mtp=mtp).total == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize("name", COUNTED)
def test_flops_follow_from_parameters(name) -> None:
    """Without scores, forward is two FLOPs per active matrix element."""
    spec = spec_of(name)
    f, p = counts.forward_flops(spec, 4096), counts.params(spec, active=True)
    scores = f.attn_scores + f.indexer_scores
    vectors = p.norms + p.selection_bias + p.attn_bias
    if spec.indexer:
        vectors += 2 * spec.indexer.index_head_dim * spec.num_hidden_layers
    assert f.total - scores == 2 * (p.total - p.embedding - vectors)
    assert counts.backward_flops(spec).total == 2 * f.total
    assert counts.train_flops(spec).total == pytest.approx(3 * f.total)


def test_causal_is_half_the_square() -> None:
    v3 = spec_of("deepseek-v3")
    causal, full = counts.forward_flops(v3, 8192), counts.forward_flops(v3, 8192, causal=False)
    assert full.attn_scores == 2 * causal.attn_scores == 61 * 128 * (192 + 128) * 2 * 8192
    assert full.total - full.attn_scores == causal.total - causal.attn_scores


def test_sparse_attention_keeps_its_keys() -> None:
    """Beyond index_topk the core grows no more, the indexer does (V3.2-Exp, section 2.1)."""
    v32 = spec_of("deepseek-v3.2")
    assert counts.attended_keys(v32, 2048) == 1024
    assert counts.attended_keys(v32, 4096) == (1024 * 2048 + 2048 * 2048) / 4096
    assert counts.attended_keys(v32, 128_000, causal=False) == 2048
    short, long = counts.decode_flops(v32, 2048), counts.decode_flops(v32, 131_072)
    assert long.attn_scores == short.attn_scores
    assert long.indexer_scores == 64 * short.indexer_scores


def test_decode_is_absorbed() -> None:
    v3 = spec_of("deepseek-v3")
    decode = counts.decode_flops(v3, 1000)
    assert decode.attn_scores == 61 * 128 * (576 + 512) * 2 * 1000
    assert decode.attn_proj == counts.forward_flops(v3).attn_proj  # absorption moves products, adds none
    dense_67b = counts.decode_flops(spec_of("deepseek-llm-67b"), 1000)
    assert dense_67b.attn_scores == 95 * 64 * 256 * 2 * 1000


@pytest.mark.parametrize("length", [0, -1])
def test_lengths_are_checked(length) -> None:
    with pytest.raises(UserError, match="sequence length"):
        counts.forward_flops(spec_of("v3-mini"), length)
    with pytest.raises(UserError, match="context length"):
        counts.decode_flops(spec_of("v3-mini"), length)


# ---------------------------------------------------------------------------------------------- KV cache


def test_kv_table_of_the_isca_paper() -> None:
    """ISCA 2025 (arXiv 2505.09343), table 1: 70.272, 327.680 and 516.096 KB per token."""
    assert counts.kv_bytes_per_token(spec_of("deepseek-v3")) == 70_272
    assert counts.kv_bytes_per_token(QWEN_72B) == 327_680
    assert counts.kv_bytes_per_token(LLAMA_405B) == 516_096
    assert round(327_680 / 70_272, 2) == 4.66


def test_kv_of_v2_against_67b() -> None:
    """V2, abstract: 93.3 % less KV cache, which needs the deployed 6 bits per element."""
    v2, large = spec_of("deepseek-v2"), spec_of("deepseek-llm-67b")
    assert counts.kv_bytes_per_token(v2, 6) == 25_920
    assert counts.kv_bytes_per_token(large) == 389_120
    assert round(1 - 25_920 / 389_120, 3) == 0.933
    assert round(1 - counts.kv_bytes_per_token(v2) / 389_120, 3) == 0.822
    mha = dense("small MoE's attention", layers=27, hidden=2048, heads=(16, 16), mlp=10_944, vocab=102_400)
    assert counts.kv_elements_per_token(mha) == 110_592


def test_kv_of_v32_in_fp8() -> None:
    v32 = spec_of("deepseek-v3.2")
    assert counts.kv_bytes_per_layer(v32, "fp8") == 656
    assert counts.indexer_bytes_per_layer(v32) == 132
    assert counts.kv_bytes_per_token(v32, "fp8") == 40_016
    assert counts.kv_bytes_per_token(v32, "fp8") + counts.indexer_bytes_per_token(v32) == 48_068
    assert counts.indexer_bytes_per_token(spec_of("deepseek-v3")) == 0
    assert counts.kv_bytes_per_token(QWEN_72B, "fp8") == 327_680 / 2


def test_kv_of_compressed_models() -> None:
    """V4 and V4.1 by their formulas: 584 and 68 bytes an entry, 356 a source."""
    assert counts.v4_entry_bytes(512, 64) == 584
    assert counts.mxfp4_bytes(128) == 68
    of = {name: counts.compressed_kv_bytes_per_token(preset(name).config) for name in preset_names()[19:22]}
    assert of == {"deepseek-v4-flash": 3514.25, "deepseek-v4-pro": 5031.4375, "deepseek-v4.1-flash": 890}
    flash, pro = preset("deepseek-v4-flash").config, preset("deepseek-v4-pro").config
    assert (flash["compress_ratios"].count(4), flash["compress_ratios"].count(128)) == (21, 20)
    assert (pro["compress_ratios"].count(4), pro["compress_ratios"].count(128)) == (30, 31)
    assert counts.sliding_window_bytes(flash) == 43 * 128 * 584
    with pytest.raises(UserError, match="kv_layout"):
        counts.sliding_window_bytes(preset("deepseek-v4.1-flash").config)


@pytest.mark.parametrize("kv_format", ["fp7", "", 0, 65, True, None])
def test_unknown_cache_format(kv_format) -> None:
    with pytest.raises(UserError, match="KV cache"):
        counts.kv_bytes_per_token(spec_of("v3-mini"), kv_format)


def test_odd_bits_stay_exact() -> None:
    assert counts.kv_bytes_per_layer(spec_of("v3-mini"), 3) == 80 * 3 / 8
    assert isinstance(counts.kv_bytes_per_layer(spec_of("deepseek-v2"), 6), int)


# ---------------------------------------------------------------------------------------- weight memory


def test_fp8_weights_by_hand() -> None:
    """One dense block of V3: FP8 bytes, FP32 scales per 128 x 128 (partial blocks too), BF16 norms."""
    v3 = spec_of("deepseek-v3")
    matrices = counts.attention_params(v3).attention + 3 * 7168 * 18_432
    blocks = 12 * 56 + 192 * 12 + 5 * 56 + 256 * 4 + 56 * 128 + 3 * 56 * 144  # kv_a: 576 rows are 4.5 blocks
    norms = 2 * 7168 + 1536 + 512
    assert counts.layer_weight_bytes(v3, 0, "fp8") == matrices + 4 * blocks + 2 * norms


@pytest.mark.parametrize("name", COUNTED)
def test_weight_bytes_are_bounded(name) -> None:
    spec = spec_of(name)
    total = counts.params(spec, mtp=True).total
    assert counts.weight_bytes(spec, "bf16", mtp=True) == 2 * total
    assert total < counts.weight_bytes(spec, "fp8", mtp=True) < 2 * total


def test_v3_checkpoint_size() -> None:
    """The hub lists 685B parameters and 689 GB: FP8 with MTP, which stores its embedding and head again."""
    v3 = spec_of("deepseek-v3")
    again = 2 * counts.params(v3).embedding
    assert (counts.params(v3, mtp=True).total + again) / 1e9 == pytest.approx(684.5, abs=0.1)
    assert (counts.weight_bytes(v3, "fp8", mtp=True) + 2 * again) / 1e9 == pytest.approx(688.6, abs=0.1)


def test_unknown_weight_precision() -> None:
    with pytest.raises(UserError, match="fp8"):
        counts.weight_bytes(spec_of("v3-mini"), "fp9")  # type: ignore[arg-type]


def test_dense_models_have_no_experts() -> None:
    with pytest.raises(UserError, match="no experts"):
        counts.expert_params(QWEN_72B)
