"""FP8 weights with a scale per block, as DeepSeek-V3 stores them (V3, section 3.3; README_WEIGHTS).

E4M3 has 4 bits of exponent and 3 of mantissa: values up to 448, about one significant digit. One scale for
a whole matrix would let its largest element push small ones below the smallest FP8 number, so every block
of 128 x 128 elements has a scale of its own:

    weight            float8_e4m3fn  [out, in]
    weight_scale_inv  float32        [ceil(out / 128), ceil(in / 128)]
    value           = weight * weight_scale_inv of its block

"inv" says that it is multiplied with, not divided by. Blocks at the right and lower edge may be cut short.
V3.1's scales are powers of two (`ue8m0`: an exponent of 8 bits and no mantissa), stored as float32 still.

`use_fp8_storage` keeps a model's weights in this form in memory, bit for bit as in a file: a module's weight
becomes a property that dequantises, and nothing else about the module changes. Kernels that multiply FP8
directly can come behind the same modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import ceil
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whalepod.spec.errors import UserError
from whalepod.spec.model import BlockFP8

Block = tuple[int, int]
ScaleFormat = Literal["float32", "ue8m0"]

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""Largest E4M3 value; there is no infinity."""

KEPT_HIGH = ("lm_head", "eh_proj")
"""Linear layers that DeepSeek leaves in BF16, by the last part of their name. Embeddings, norms and routers
are not `nn.Linear` and stay as they are."""

_SMALLEST_SCALE = 2.0**-126  # float32's smallest normal number: below it scales would lose their digits
_LARGEST = 3e38  # rounding up by 1/16 must stay finite in float32
_CHUNK = 2**24  # elements that are held in float32 at a time: stacks of experts are many times larger


# ---------------------------------------------------------------------------------------- tensors


def scale_shape(shape: tuple[int, ...], block: Block = (128, 128)) -> tuple[int, ...]:
    """Shape of the scales of a weight [..., out, in]: [..., ceil(out / block[0]), ceil(in / block[1])]."""
    return (*shape[:-2], ceil(shape[-2] / block[0]), ceil(shape[-1] / block[1]))


def quantize_blocks(
    w: Tensor, block: Block = (128, 128), scale_fmt: ScaleFormat = "float32"
) -> tuple[Tensor, Tensor]:
    """E4M3 values of `w` [..., out, in], and their scales in float32, of `scale_shape`.

    A block's scale is its largest magnitude / 448, rounded up to a power of two for `ue8m0`; that of a block
    of zeros is 1. Elements round to the nearest E4M3 number, so the error is at most 1/16 of the element,
    or 2^-10 of the scale where that is more.

    Raises UserError for NaN, infinity and magnitudes above 3e38: one such element would void its block.
    """
    values = torch.empty(w.shape, dtype=FP8, device=w.device)
    scale_inv = torch.empty(scale_shape(w.shape, block), dtype=torch.float32, device=w.device)
    for w_part, values_part, scale_part in _chunks(w, values, scale_inv):
        blocks = _as_blocks(w_part.float(), block)
        largest = blocks.abs().amax((-3, -1))
        if not bool((largest <= _LARGEST).all()):  # NaN compares false
            raise UserError("a weight with NaN, infinity or a magnitude above 3e38 has no FP8 form")
        scale = _scale(largest, scale_fmt)
        values_part.copy_(_from_blocks(_scaled(blocks, scale[..., :, None, :, None]), w_part.shape))
        scale_part.copy_(scale)
    return values, scale_inv


def _scale(largest: Tensor, scale_fmt: ScaleFormat) -> Tensor:
    """The scales of groups of numbers with these largest magnitudes."""
    scale = (largest / FP8_MAX).clamp_min(_SMALLEST_SCALE)
    if scale_fmt == "ue8m0":
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1): 0.5 is a power of two already
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return scale.masked_fill(largest == 0, 1.0)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    # The cast to E4M3 does not saturate: what rounding lifts above 448 would become NaN.
    return (x / scale).clamp(-FP8_MAX, FP8_MAX)


def dequantize_blocks(
    values: Tensor, scale_inv: Tensor, dtype: torch.dtype, block: Block = (128, 128)
) -> Tensor:
    """`values` [..., out, in] times their blocks' scales; the product is made in float32, then rounded."""
    assert scale_inv.shape == scale_shape(values.shape, block), "scales of another shape or block size"
    w = torch.empty(values.shape, dtype=dtype, device=values.device)
    for w_part, values_part, scale_part in _chunks(w, values, scale_inv):
        blocks = _as_blocks(values_part.float(), block) * scale_part[..., :, None, :, None]
        w_part.copy_(_from_blocks(blocks, values_part.shape))
    return w


def quantize_tiles(x: Tensor, tile: int = 128) -> tuple[Tensor, Tensor]:
    """E4M3 values of activations `x` [T, D], and their scales in float32 [T, D / tile] (V3, section 3.3.2).

    D must be a multiple of `tile`. The rule is that of `quantize_blocks`, without its check: that would
    make the host wait for the device, and a broken activation has to show in the loss, as NaN.
    """
    tiles = x.float().unflatten(-1, (-1, tile))
    scale = _scale(tiles.abs().amax(-1), "float32")
    return _scaled(tiles, scale.unsqueeze(-1)).to(FP8).flatten(-2), scale


def dequantize_tiles(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` [T, D] times their tiles' scales [T, D / 128]; made in float32, then rounded to `dtype`."""
    tiles = values.float().unflatten(-1, (scale.shape[-1], -1))
    return (tiles * scale.unsqueeze(-1)).flatten(-2).to(dtype)


def _chunks(*stacks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few matrices of each [..., rows, columns], as views, until all have come."""
    flat = [s.flatten(0, -3) if s.dim() > 2 else s.unsqueeze(0) for s in stacks]
    step = max(1, _CHUNK // max(1, flat[0][:1].numel()))
    for start in range(0, len(flat[0]), step):
        yield tuple(s[start : start + step] for s in flat)


def _as_blocks(x: Tensor, block: Block) -> Tensor:
    """[N, out, in] -> [N, block rows, rows in one, block columns, columns in one], zeros at ragged edges."""
    missing = (-x.shape[-1] % block[1], -x.shape[-2] % block[0])
    if any(missing):
        x = F.pad(x, (0, missing[0], 0, missing[1]))
    return x.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))


def _from_blocks(x: Tensor, shape: torch.Size) -> Tensor:
    return x.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]]


# ---------------------------------------------------------------------------------------- modules


def storage_names(name: str) -> tuple[str, str]:
    """Names of the two parameters that hold weight `name` in FP8 storage: values and scales."""
    return f"{name}_fp8", f"{name}_scale_inv"


class FP8Storage(nn.Module):
    """What a module with FP8 weights adds to the one that it was.

    Weight `w` is two parameters without gradient, `w_fp8` and `w_scale_inv`; reading `w` dequantises to
    `compute_dtype`. Moving the module keeps their bits; casting it (`.to(dtype)`) changes `compute_dtype`.
    """

    quantization: BlockFP8
    compute_dtype: torch.dtype
    stored: tuple[str, ...]

    def dequantized(self, name: str) -> Tensor:
        """Weight `name` in `compute_dtype`."""
        values, scale_inv = (self._parameters[n] for n in storage_names(name))
        assert values is not None
        assert scale_inv is not None
        return dequantize_blocks(values, scale_inv, self.compute_dtype, self.quantization.weight_block_size)

    def store(self, name: str, values: Tensor, scale_inv: Tensor) -> None:
        """Puts `values` and `scale_inv` in place of weight `name`."""
        self._parameters.pop(name, None)
        for own, tensor in zip(storage_names(name), (values, scale_inv), strict=True):
            self._parameters[own] = nn.Parameter(tensor, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP8Storage:
        # A cast must not touch stored bits: FP8 without its scale is another number. As integers they pass
        # through casts unchanged, and through moves like any tensor.
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        kept: list[tuple[str, torch.dtype, Tensor]] = []
        for name in (own for weight in self.stored for own in storage_names(weight)):
            tensor = self._parameters.pop(name)
            assert tensor is not None
            bits = tensor.detach().view(torch.uint8 if tensor.dtype == FP8 else torch.int32)
            kept.append((name, tensor.dtype, bits))
        super()._apply(fn, recurse)
        for name, dtype, bits in kept:
            self._parameters[name] = nn.Parameter(fn(bits).view(dtype), requires_grad=False)
        return self


class FP8Linear(FP8Storage, nn.Linear):
    """`nn.Linear` whose weight is stored in FP8: x [..., in] -> [..., out]."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight [out, in] in `compute_dtype`."""
        return self.dequantized("weight")


def use_fp8_storage(
    model: nn.Module,
    quantization: BlockFP8 | None = None,
    compute_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Keeps the weights that DeepSeek quantises as FP8 blocks, in place: linear layers and stacked experts.

    Experts are recognised by their parameters: matrices stacked to more than two dimensions. A model on the
    meta device gets storage without values, to be materialised and loaded; any other is quantised.
    `quantization`: block size and scale format, 128 x 128 and float32 unless given.
    """
    quantization = quantization or BlockFP8()
    for path, module in list(model.named_modules()):
        if isinstance(module, FP8Storage) or path.rpartition(".")[2] in KEPT_HIGH:
            continue
        if type(module) is nn.Linear:
            _convert(module, ("weight",), FP8Linear, quantization, compute_dtype)
            continue
        stacks = tuple(n for n, p in module.named_parameters(recurse=False) if p.dim() > 2)
        if stacks:
            _convert(module, stacks, _with_storage(type(module), stacks), quantization, compute_dtype)


@torch.no_grad()
def _convert(
    module: nn.Module,
    names: tuple[str, ...],
    to: type[FP8Storage],
    quantization: BlockFP8,
    compute_dtype: torch.dtype,
) -> None:
    weights = {name: module.get_parameter(name).detach() for name in names}
    block = quantization.weight_block_size
    # The class changes, the module stays: hooks, other attributes and the forward pass are as before.
    module.__class__ = to
    assert isinstance(module, FP8Storage)
    module.quantization, module.compute_dtype, module.stored = quantization, compute_dtype, names
    for name, w in weights.items():
        if w.is_meta:
            scale = torch.empty(scale_shape(w.shape, block), dtype=torch.float32, device="meta")
            module.store(name, w.to(FP8), scale)
        else:
            module.store(name, *quantize_blocks(w, block, quantization.scale_fmt))


@cache
def _with_storage(base: type[nn.Module], names: tuple[str, ...]) -> type[FP8Storage]:
    """`base` with FP8 storage; its forward pass reads the weights and finds the properties."""

    def reader(name: str) -> property:
        def read(self: Any) -> Tensor:
            return self.dequantized(name)

        return property(read)

    return type(f"FP8{base.__name__}", (FP8Storage, base), {name: reader(name) for name in names})
