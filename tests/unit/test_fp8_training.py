"""Training in FP8: rounding bit for bit, products by their definition, gradients by formula."""

from __future__ import annotations

from math import ceil, inf, nan

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from whalepod.models.moe import GroupedExperts, grouped_product
from whalepod.models.transformer import Transformer, init_weights, target_windows
from whalepod.precision import products
from whalepod.precision.fp8 import FP8, Block, ScaleFormat, scale_shape
from whalepod.precision.fp8_training import (
    FP8TrainedLinear,
    compute_in_fp8,
    fp8_experts,
    fp8_linear,
)
from whalepod.precision.tiles import COLUMN, ROW, SQUARE, Quantized, dequantize, dequantize_exactly, quantize
from whalepod.spec.presets import load_model_spec
from whalepod.spec.run import FP8Config

FORMATS = ("ue8m0", "float32")
RECIPES = [FP8Config(scales=s, gradients=g) for s in FORMATS for g in ("tiles", "blocks")]

# Every finite magnitude of E4M3, as its definition says: (-1)^s 2^(e - 7) (1 + m / 8), subnormal below 2^-6.
MAGNITUDES = torch.tensor(
    [m * 2.0**-9 for m in range(8)]
    + [2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)],
    dtype=torch.float64,
)


def nearest(x: Tensor) -> Tensor:
    """The E4M3 numbers nearest to `x`, ties to the even mantissa; in float64."""
    distance = (x.abs().unsqueeze(-1) - MAGNITUDES).abs()
    # MAGNITUDES[i] has mantissa i mod 8, and neighbours differ in its last bit.
    odd = torch.arange(len(MAGNITUDES)) % 2
    best = distance.amin(-1, keepdim=True)
    choice = torch.where(distance == best, odd, 2).argmin(-1)
    return MAGNITUDES[choice].copysign(x)


def by_definition(x: Tensor, block: Block, fmt: str) -> tuple[Tensor, Tensor]:
    """Values and scales, block by block, from the definition; values in float64."""
    rows, columns = (ceil(n / b) for n, b in zip(x.shape, block, strict=True))
    values, scale = torch.zeros(x.shape, dtype=torch.float64), torch.ones(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = x[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]].float()
            largest = part.abs().max()
            if largest > 0:
                s = torch.maximum(largest / 448, torch.tensor(2.0**-126))
                if fmt == "ue8m0":
                    s = torch.tensor(2.0 ** ceil(torch.log2(s.double()).item()))
                scale[i, j] = s
            shown = (part / scale[i, j]).double()
            place = (
                slice(i * block[0], i * block[0] + len(part)),
                slice(j * block[1], j * block[1] + part.shape[1]),
            )
            values[place] = nearest(shown)
    return values, scale


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from([ROW, COLUMN, SQUARE]),
    st.sampled_from(FORMATS),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(-120, 120),
    st.integers(0, 2**32),
)
def test_rounding_is_the_definitions_bit_for_bit(
    shape: tuple[int, int], block: Block, fmt: ScaleFormat, dtype: torch.dtype, power: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    # Outliers, zeros and tiny numbers beside each other; whole tiles of zeros too.
    x *= torch.rand(shape, generator=generator).mul(20).exp2()
    x[torch.rand(shape, generator=generator) < 0.3] = 0.0
    x = (x * 2.0**power).clamp(-3e38, 3e38).to(dtype)
    found = quantize(x, block, fmt)
    values, scale = by_definition(x, block, fmt)
    assert found.values.dtype == FP8
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.values.double(), values)
    assert found.values.shape == x.shape
    assert found.scale.shape == (ceil(shape[0] / block[0]), ceil(shape[1] / block[1]))


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_is_broken_stays_broken(fmt: ScaleFormat) -> None:
    x = torch.ones(3, 200)
    x[1, 5], x[2, 150] = inf, nan
    shown = dequantize(quantize(x, ROW, fmt), torch.float32)
    assert torch.equal(shown[0], x[0])
    assert not shown[1, 5].isfinite()
    assert shown[2, 150].isnan()
    assert torch.equal(shown[1, 128:], x[1, 128:])


def test_turning_powers_of_two_round_is_exact() -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = quantize(x, ROW, "ue8m0")
    again = products.turned(rows, "ue8m0")
    # What is lost is below the smallest number of a column's tile.
    lost = (dequantize(again, torch.float32) - dequantize(rows, torch.float32)).abs()
    assert bool((lost <= again.scale.repeat_interleave(128, 0) * 2.0**-10).all())
    assert torch.equal(
        dequantize(quantize(dequantize(rows, torch.bfloat16), ROW, "ue8m0"), torch.float32),
        dequantize(rows, torch.float32),
    )


# ------------------------------------------------------------------------------------------------ products


def whole_numbers(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-8, 9, (rows, columns), generator=generator).float()


def scales(shape: tuple[int, int], fmt: str, generator: torch.Generator) -> Tensor:
    powers = torch.randint(-3, 4, shape, generator=generator).float().exp2()
    return powers if fmt == "ue8m0" else powers * torch.rand(shape, generator=generator)


def product_by_definition(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """In FP32, block by block along the inner dimension; sums of whole numbers are exact in any order."""
    k = a.values.shape[1]
    out = torch.zeros(len(a.values), len(b.values))
    for block in range(ceil(k / 128)):
        part = slice(block * 128, (block + 1) * 128)
        sums = (a.values[:, part].double() @ b.values[:, part].double().T).float()
        rows, columns = (
            torch.stack([q.scale[i // q.block[0], block] for i in range(len(q.values))]) for q in (a, b)
        )
        out += sums * rows[:, None] * columns
    return out.to(dtype)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 150),
    st.integers(1, 300),
    st.integers(1, 150),
    st.sampled_from(FORMATS),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_products_are_the_definitions_bit_for_bit(
    m: int, k: int, n: int, fmt: ScaleFormat, blocks: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inner = ceil(k / 128)
    a = Quantized(whole_numbers(m, k, generator).to(FP8), scales((m, inner), fmt, generator))
    rows = ceil(n / 128) if blocks else n
    b = Quantized(whole_numbers(n, k, generator).to(FP8), scales((rows, inner), fmt, generator))
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(products.multiply(a, b, fmt, dtype), product_by_definition(a, b, dtype))


@pytest.mark.parametrize("fmt", FORMATS)
def test_groups_are_products_of_their_rows(fmt: ScaleFormat) -> None:
    generator = torch.Generator().manual_seed(1)
    ends = torch.tensor([128, 128, 384, 512], dtype=torch.int32)  # an expert without rows, idle rows at last
    a = Quantized(whole_numbers(600, 256, generator).to(FP8), scales((600, 2), fmt, generator))
    b = Quantized(
        torch.stack([whole_numbers(136, 256, generator) for _ in ends]).to(FP8),
        torch.stack([scales((2, 2), fmt, generator) for _ in ends]),
    )
    out = products.multiply_groups(a, b, ends, fmt, torch.bfloat16)
    start = 0
    for e, end in enumerate(ends.tolist()):
        rows = Quantized(a.values[start:end], a.scale[start:end])
        alone = products.multiply(rows, Quantized(b.values[e], b.scale[e]), fmt, torch.bfloat16)
        assert torch.equal(out[start:end], alone)
        start = end
    assert not out[start:].any()


@pytest.mark.parametrize("fmt", FORMATS)
def test_sums_over_groups_see_their_own_rows_only(fmt: ScaleFormat) -> None:
    generator = torch.Generator().manual_seed(2)
    ends = torch.tensor([100, 100, 400, 520], dtype=torch.int32)  # tiles of 128 rows straddle experts
    a = Quantized(whole_numbers(640, 24, generator).to(FP8), scales((5, 24), fmt, generator))
    b = Quantized(whole_numbers(640, 40, generator).to(FP8), scales((5, 40), fmt, generator))
    out = products.sum_groups(a, b, ends, fmt, torch.float32)
    start = 0
    for e, end in enumerate(ends.tolist()):
        alone = [dequantize(q, torch.float64)[start:end] for q in (a, b)]
        assert torch.allclose(out[e].double(), alone[0].T @ alone[1], rtol=1e-6, atol=1e-4)
        start = end
    assert out.shape == (4, 24, 40)


# ------------------------------------------------------------------------------------------------- layers


def close(found: Tensor, expected: Tensor) -> None:
    """To BF16's last digit, beside the largest number of all."""
    assert float((found.detach().double() - expected).abs().max()) <= 2.0**-7 * float(expected.abs().max())


def shown(x: Tensor, block: Block, recipe: FP8Config) -> Tensor:
    return dequantize(quantize(x, block, recipe.scales), torch.float64)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize(("tokens", "inner", "columns"), [(256, 128, 384), (130, 200, 72)])
def test_a_linear_layers_three_products(recipe: FP8Config, tokens: int, inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, tokens // 2, inner, generator=generator).bfloat16().requires_grad_()
    w = torch.randn(columns, inner, generator=generator).bfloat16().requires_grad_()
    gradient = torch.randn(2, tokens // 2, columns, generator=generator).bfloat16()
    y = fp8_linear(x, w, recipe)
    y.backward(gradient)
    x2, g2 = x.detach().flatten(0, 1), gradient.flatten(0, 1)
    close(y.flatten(0, 1), shown(x2, ROW, recipe) @ shown(w.detach(), SQUARE, recipe).T)
    tile = SQUARE if recipe.gradients == "blocks" else ROW
    assert x.grad is not None
    assert w.grad is not None
    close(x.grad.flatten(0, 1), shown(g2, tile, recipe) @ shown(w.detach(), SQUARE, recipe))
    turned = shown(shown(x2, ROW, recipe).float(), COLUMN, recipe)
    close(w.grad, shown(g2, COLUMN, recipe).T @ turned)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_experts_are_linear_layers_side_by_side(recipe: FP8Config) -> None:
    """Where groups end between tiles, each expert's products are those of a layer of its own."""
    generator = torch.Generator().manual_seed(4)
    ends = torch.tensor([128, 128, 384], dtype=torch.int32)
    x = torch.randn(400, 64, generator=generator).bfloat16()
    x[384:] = nan  # idle rows: whatever they hold, it must not spread
    w = torch.randn(3, 32, 64, generator=generator).bfloat16()
    gradient = torch.randn(400, 32, generator=generator).bfloat16()
    xs, ws = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = fp8_experts(xs, ws, ends, recipe)
    assert not y[384:].any()
    y.backward(gradient)
    assert xs.grad is not None
    assert ws.grad is not None
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end == start:
            assert not ws.grad[e].any()
            continue
        xe, we = x[start:end].clone().requires_grad_(), w[e].clone().requires_grad_()
        ye = fp8_linear(xe, we, recipe)
        ye.backward(gradient[start:end])
        assert xe.grad is not None
        assert we.grad is not None
        for found, alone in ((y, ye), (xs.grad, xe.grad)):
            close(found[start:end].detach(), alone.detach().double())
        if e < 2:
            close(ws.grad[e], we.grad.double())
        start = end
    assert ws.grad[2].isfinite().all()


def small() -> Transformer:
    spec = load_model_spec("v3-mini").with_(
        num_hidden_layers=2, vocab_size=256, n_routed_experts=8, n_group=2
    )
    model = Transformer(spec)
    init_weights(model, 0)
    return model.bfloat16()


def test_which_layers_compute_in_fp8() -> None:
    model = small()
    compute_in_fp8(model, FP8Config())
    high = {name for name, m in model.named_modules() if type(m) is nn.Linear}
    assert high == {"lm_head", "mtp.0.eh_proj"}
    assert sum(isinstance(m, FP8TrainedLinear) for m in model.modules()) > 10
    experts = [m for m in model.modules() if isinstance(m, GroupedExperts)]
    assert experts
    assert all(m.product is not grouped_product for m in experts)


def test_a_models_loss_and_gradients_stay_near_bf16s() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, 256, (16, 66), generator=generator)  # fewer: gates see chance
    found: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for name in ("bf16", "fp8"):
        model = small()
        if name == "fp8":
            compute_in_fp8(model, FP8Config())
        losses = model(rows[:, :64], target_windows(rows[:, 1:], 1))
        (losses.main + 0.3 * losses.mtp[0]).backward()
        found[name] = (
            losses.main.item(),
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        )
    (a, high), (b, low) = found["bf16"], found["fp8"]
    assert abs(b / a - 1) < 2e-3
    assert high.keys() == low.keys()
    for name, gradient in high.items():
        cosine = F.cosine_similarity(gradient.double().flatten(), low[name].double().flatten(), dim=0)
        assert cosine > 0.95, name


@pytest.mark.parametrize("power", [-126, -20, 0, 6, 7, 100, 118])
@pytest.mark.parametrize("block", [ROW, COLUMN, SQUARE])
def test_every_fp8_number_widens_to_bf16_exactly(block: Block, power: int) -> None:
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[(numbers & 0x7F) != 0x7F]  # NaN
    generator = torch.Generator().manual_seed(0)
    values = numbers[torch.randint(len(numbers), (150, 260), generator=generator)].view(FP8)
    values[0, : len(numbers)] = numbers.view(FP8)
    scale = torch.full(scale_shape(values.shape, block), 2.0**power)
    x = Quantized(values, scale)
    expected = values.to(torch.float64) * 2.0**power
    assert torch.equal(dequantize_exactly(x).double(), expected.bfloat16().double())
    assert torch.equal(dequantize_exactly(x.mT).double(), expected.bfloat16().double().mT)


@pytest.mark.parametrize("broken", [inf, -inf, nan])
def test_a_broken_number_makes_its_tile_nan(broken: float) -> None:
    x = torch.ones(3, 256, dtype=torch.bfloat16)
    x[1, 5] = broken
    wide = dequantize_exactly(quantize(x, ROW, "ue8m0"))
    assert wide[1, :128].isnan().all()
    assert (wide[1, 128:] == 1).all()
    assert (wide[::2] == 1).all()
