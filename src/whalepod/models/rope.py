"""Rotary position embedding (RoPE) with the scalings that the family uses.

YaRN (arXiv 2309.00071) stretches low frequencies by `factor`, keeps high ones, blends between;
DeepSeek applies it to the decoupled rotary key only and scales the softmax by `mscale` squared
(DeepSeek-V2, section 3.1.4; V3, section 4.3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from whalepod.spec.model import Rope


def yarn_mscale(factor: float, mscale: float) -> float:
    """sqrt(t) of YaRN: 0.1 m ln s + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(rope: Rope, qk_head_dim: int) -> float:
    """Factor on query-key products, YaRN's attention temperature included."""
    scale = qk_head_dim**-0.5
    if rope.kind == "yarn" and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(rope: Rope, dim: int) -> tuple[Tensor, float]:
    """Angular step per pair, shape [dim / 2] in float32, and the factor on cos and sin."""
    inv_freq = rope.theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if rope.kind == "default":
        return inv_freq, 1.0
    if rope.kind == "linear":
        return inv_freq / rope.factor, 1.0
    original = rope.original_max_position_embeddings
    assert original is not None
    if rope.kind == "llama3":
        # Between the two wavelengths the division by `factor` is faded in linearly.
        smooth = (original * inv_freq / (2 * math.pi) - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        smooth = smooth.clamp(0, 1)
        return (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq, 1.0

    def pair_turning(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_turning(rope.beta_fast)), 0)
    high = min(math.ceil(pair_turning(rope.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    inv_freq = inv_freq / rope.factor * (1 - keep) + inv_freq * keep
    if rope.mscale and rope.mscale_all_dim:
        factor = yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    else:
        factor = yarn_mscale(rope.factor, 1.0)
    return inv_freq, factor


def tables(rope: Rope, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin in float32 for `positions` of shape [S] or [B, S]; shape [..., S, 1, dim / 2]."""
    inv_freq, factor = inverse_frequencies(rope, dim)
    angles = positions[..., None].float() * inv_freq.to(positions.device)
    return (angles.cos() * factor).unsqueeze(-2), (angles.sin() * factor).unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates x [B, S, H, dim] pairwise in float32; the result keeps x's type.

    Interleaved pairs come out as halves: a fixed permutation of the width that queries and keys
    share, so products are unchanged and no copy is spent on putting them back.
    """
    if interleaved:
        even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    else:
        even, odd = x.float().chunk(2, dim=-1)
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1).to(x.dtype)
