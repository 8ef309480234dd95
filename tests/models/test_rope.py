"""Rotary embedding: frequencies against `transformers`, and the two layouts of pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEFAULT, LINEAR, LLAMA3, QWEN3_YARN, V2_YARN, YARN, llama, logit_error, spec_of
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from whalepod.models.rope import inverse_frequencies, rotate, softmax_scale, tables
from whalepod.spec.model import Rope

KINDS = {
    "default": DEFAULT,
    "linear": LINEAR,
    "llama3": LLAMA3,
    "llama3-released": LLAMA3 | {"original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn-v2": V2_YARN,
    "yarn-released": YARN | {"original_max_position_embeddings": 4096},
    "yarn-unequal": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn-plain": QWEN3_YARN,
    "yarn-betas": QWEN3_YARN | {"beta_fast": 16, "beta_slow": 2},
}


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_equal_transformers(kind: str, width: int) -> None:
    config = llama(head_dim=width, rope_parameters=KINDS[kind])
    ours, factor = inverse_frequencies(spec_of(config).rope, width)
    if kind == "default":
        expected = 10000.0 ** -(torch.arange(0, width, 2) / width)
        expected_factor = 1.0
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[KINDS[kind]["rope_type"]](config)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_softmax_scale() -> None:
    """1 / sqrt(width), times (0.1 m ln s + 1) squared where DeepSeek stretched (V2, section 3.1.4)."""
    assert softmax_scale(Rope(), 192) == pytest.approx(192**-0.5)
    v3 = Rope(kind="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
    assert softmax_scale(v3, 192) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert softmax_scale(v3, 192) == pytest.approx(0.13523, abs=1e-5)
    v2 = Rope(
        kind="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707
    )
    assert softmax_scale(v2, 192) == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)
    without = Rope(kind="yarn", factor=4.0, original_max_position_embeddings=32768)
    assert softmax_scale(without, 128) == pytest.approx(128**-0.5)  # its temperature is on cos and sin


@given(seed=st.integers(0, 2**31), width=st.sampled_from([2, 8, 16, 64]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_layouts_of_pairs_give_the_same_products(seed: int, width: int) -> None:
    """Neighbouring pairs, and the same numbers laid out as halves: equal query-key products."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 7, 3, width, generator=generator)
    cos_sin = tables(Rope(), width, torch.arange(7))

    def as_halves(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)

    def products(*, interleaved: bool) -> torch.Tensor:
        a, b = (q, k) if interleaved else (as_halves(q), as_halves(k))
        a, b = rotate(a, *cos_sin, interleaved), rotate(b, *cos_sin, interleaved)
        return torch.einsum("bshd,bthd->bhst", a, b)

    torch.testing.assert_close(products(interleaved=True), products(interleaved=False), rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 2**31), shift=st.integers(0, 100), interleaved=st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_products_depend_on_distance_only(seed: int, shift: int, interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 6, 1, 16, generator=generator)

    def products(start: int) -> torch.Tensor:
        cos_sin = tables(Rope(), 16, torch.arange(start, start + 6))
        a, b = rotate(q, *cos_sin, interleaved), rotate(k, *cos_sin, interleaved)
        return torch.einsum("bshd,bthd->bhst", a, b)

    torch.testing.assert_close(products(shift), products(0), rtol=1e-4, atol=1e-4)


def test_rotation_keeps_length_and_type() -> None:
    x = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0))
    cos_sin = tables(Rope(), 16, torch.arange(5).expand(2, 5))
    out = rotate(x, *cos_sin, interleaved=True)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(x, *cos_sin, interleaved=False)[:, 0], x[:, 0])  # position 0
    half = rotate(x.bfloat16(), *cos_sin, interleaved=True)
    assert half.dtype == torch.bfloat16
    assert logit_error(half.float(), out) < 0.01
