"""FP8 blocks: the definition by hand, bounds and special values by property, storage modules by equality."""

from __future__ import annotations

import copy
from math import ceil, inf, nan

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from whalepod.models.moe import LocalDispatcher
from whalepod.models.transformer import Transformer, init_weights, target_windows
from whalepod.precision.fp8 import FP8, dequantize_blocks, quantize_blocks, scale_shape
from whalepod.precision.storage import FP8Linear, FP8Storage, use_fp8_storage
from whalepod.spec.errors import UserError
from whalepod.spec.model import MLA, BlockFP8, ModelSpec, MoE, Rope

SPEC = ModelSpec(
    name="toy",
    architecture="DeepseekV3ForCausalLM",
    num_hidden_layers=2,
    hidden_size=36,
    num_attention_heads=2,
    intermediate_size=50,
    vocab_size=40,
    max_position_embeddings=64,
    attention=MLA(q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=10),
    rope=Rope(interleaved=True),
    moe=MoE(
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=20,
        first_k_dense_replace=1,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
    ),
    num_nextn_predict_layers=1,
)
BLOCKS = BlockFP8((16, 16))


def expanded(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """The scale of every element, written down as the format defines it."""
    rows = torch.arange(shape[-2]) // block[0]
    columns = torch.arange(shape[-1]) // block[1]
    return scale[..., rows[:, None], columns[None, :]]


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
blocks = st.tuples(st.integers(1, 17), st.integers(1, 17))
formats = st.sampled_from(["float32", "ue8m0"])


@settings(max_examples=60, deadline=None)
@given(shapes, blocks, formats, st.integers(0, 2**32), st.tuples(st.floats(-40, 37), st.integers(0, 2)))
def test_error_bound_shape_and_scales(
    shape: tuple[int, int], block: tuple[int, int], fmt: str, seed: int, size: tuple[float, int]
) -> None:
    power, batch = size
    generator = torch.Generator().manual_seed(seed)
    shape = (*[2, 3][:batch], *shape)
    w = torch.randn(shape, generator=generator).clamp(-5, 5) * 10.0**power
    w[torch.rand(shape, generator=generator) < 0.2] = 0.0
    values, scale = quantize_blocks(w, block, fmt)
    assert values.dtype == FP8
    assert values.shape == w.shape
    assert scale.dtype == torch.float32
    assert scale.shape == scale_shape(shape, block)
    assert scale.shape == (*shape[:-2], ceil(shape[-2] / block[0]), ceil(shape[-1] / block[1]))
    assert not values.float().isnan().any()
    back = dequantize_blocks(values, scale, torch.float32, block)
    assert torch.equal(back, values.float() * expanded(scale, shape, block))
    # In float64: the bound itself must not be lost below the smallest float32.
    element = expanded(scale, shape, block).double()
    bound = torch.maximum(w.double().abs() / 16, element / 1024) * (1 + 1e-6) + 2.0**-149
    assert ((back.double() - w.double()).abs() <= bound).all()
    if fmt == "ue8m0":
        assert (torch.frexp(scale).mantissa == 0.5).all()


@settings(max_examples=40, deadline=None)
@given(shapes, blocks, st.integers(0, 2**32))
def test_powers_of_two_are_idempotent(shape: tuple[int, int], block: tuple[int, int], seed: int) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    pair = quantize_blocks(w, block, "ue8m0")
    once = dequantize_blocks(*pair, torch.float32, block)
    twice = dequantize_blocks(*quantize_blocks(once, block, "ue8m0"), torch.float32, block)
    assert torch.equal(once, twice)
    # A power of two changes no digit: BF16 holds the product exactly.
    assert torch.equal(dequantize_blocks(*pair, torch.bfloat16, block).float(), once)


def test_deepseeks_block_with_ragged_edges() -> None:
    w = torch.randn(300, 130)
    values, scale = quantize_blocks(w)
    assert scale.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            part = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            assert scale[i, j] == w[part].abs().max() / 448
            assert torch.equal(values[part].float(), (w[part] / scale[i, j]).to(FP8).float())


def test_zeros_and_extremes() -> None:
    values, scale = quantize_blocks(torch.zeros(3, 5), (2, 2))
    assert (scale == 1).all()
    assert (values.float() == 0).all()
    for size in (1e-45, 1e-38, 1e-30, 1e30, 2.9e38):
        back = dequantize_blocks(*quantize_blocks(torch.full((2, 2), size)), torch.float32)
        assert back.isfinite().all()
        assert ((back - size).abs() <= size / 16 + 2.0**-136).all()
    assert quantize_blocks(torch.full((1, 1), 448.0), scale_fmt="ue8m0")[1].item() == 1.0
    assert quantize_blocks(torch.full((1, 1), 449.0), scale_fmt="ue8m0")[1].item() == 2.0
    assert quantize_blocks(torch.empty(0, 4, 4))[1].shape == (0, 1, 1)


@pytest.mark.parametrize("bad", [inf, -inf, nan, 3.3e38])
def test_what_has_no_fp8_form_is_refused(bad: float) -> None:
    w = torch.ones(4, 4)
    w[2, 3] = bad
    with pytest.raises(UserError, match="has no FP8 form"):
        quantize_blocks(w)


def test_linear_multiplies_the_dequantised_weight() -> None:
    linear = nn.Linear(40, 24)
    values, scale = quantize_blocks(linear.weight.detach(), BLOCKS.weight_block_size)
    model = nn.Sequential(linear)
    use_fp8_storage(model, BLOCKS, torch.float32)
    assert isinstance(linear, FP8Linear)
    assert isinstance(linear, nn.Linear)
    w = dequantize_blocks(values, scale, torch.float32, (16, 16))
    x = torch.randn(5, 40, requires_grad=True)
    out = linear(x)
    assert torch.equal(out, F.linear(x, w, linear.bias))
    out.sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand(5, -1))
    assert set(dict(linear.named_parameters())) == {"bias", "weight_stored", "weight_scale_inv"}
    assert [n for n, p in linear.named_parameters() if p.requires_grad] == ["bias"]


def test_casting_and_moving_keep_the_bits() -> None:
    model = nn.Sequential(nn.Linear(40, 24))
    use_fp8_storage(model, BLOCKS)
    before = copy.deepcopy(model)
    for change in (model.float, model.double, lambda: model.to("cpu", torch.float16), model.bfloat16):
        change()
        assert model[0].weight.dtype == model[0].bias.dtype
        for name in ("weight_stored", "weight_scale_inv"):
            old, new = getattr(before[0], name), getattr(model[0], name)
            assert old.dtype == new.dtype
            assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))
    assert torch.equal(model[0].weight, before[0].weight)
    model.load_state_dict(before.state_dict())


def toy() -> Transformer:
    model = Transformer(SPEC)
    init_weights(model, 3)
    return model.eval()


def test_a_model_computes_as_with_its_dequantised_weights() -> None:
    model, plain = toy(), toy()
    use_fp8_storage(model, BLOCKS, torch.float32)
    for path, module in model.named_modules():
        if isinstance(module, FP8Storage):
            for name in module.stored:
                plain.get_parameter(f"{path}.{name}").data.copy_(module.dequantized(name))
    tokens = torch.randint(0, 40, (2, 9))
    targets = torch.randint(0, 40, (2, 10))
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))
        windows = target_windows(targets, len(plain.mtp))
        assert torch.equal(model(tokens, windows).mtp[0], plain(tokens, windows).mtp[0])
        absorbed = model(tokens, attend=lambda a, q, kv: a.absorbed(q, kv, None))
        assert torch.equal(absorbed, plain(tokens, attend=lambda a, q, kv: a.absorbed(q, kv, None)))
    experts = model.layers[1].mlp.experts
    assert experts.gate_up.shape == (4, 2, 20, 36)
    assert experts.gate_up_scale_inv.shape == (4, 2, 2, 3)
    assert isinstance(experts, type(plain.layers[1].mlp.experts))
    assert isinstance(model.layers[1].mlp.dispatcher, LocalDispatcher)


def test_what_deepseek_leaves_high_stays() -> None:
    with torch.device("meta"):
        model = Transformer(SPEC)
    use_fp8_storage(model, BLOCKS)
    assert model.layers[0].self_attn.q_a_proj.weight.shape == (20, 36)
    assert model.layers[0].self_attn.q_a_proj.weight.is_meta
    kept = {n for n, p in model.named_parameters() if not n.endswith(("_stored", "_scale_inv"))}
    kept = {n.split(".", 2)[-1] if n.startswith(("layers", "mtp")) else n for n in kept}
    assert kept == {
        "embed_tokens.weight",
        "norm.weight",
        "lm_head.weight",
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        *(f"{b}{n}" for b in ("", "block.") for n in (
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            "self_attn.q_a_layernorm.weight",
            "self_attn.kv_a_layernorm.weight",
            "mlp.gate.weight",
        )),
    }  # fmt: skip
    num_stored = len([n for n, _ in model.named_parameters() if n.endswith("_stored")])
    use_fp8_storage(model, BLOCKS)
    assert len([n for n, _ in model.named_parameters() if n.endswith("_stored")]) == num_stored
