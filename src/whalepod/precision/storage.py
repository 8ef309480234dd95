"""Weights that stay in one byte in memory: FP8 bit for bit as in a file, or INT8.

`use_fp8_storage` makes a module's weight a property that dequantises; nothing else about the module changes.
Kernels that multiply such weights directly can come behind the same modules, as those of `serve/` do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from whalepod.precision.fp8 import (
    FP8,
    Block,
    as_blocks,
    dequantize_blocks,
    from_blocks,
    largest_magnitude,
    quantize_blocks,
    scale_shape,
)
from whalepod.spec.errors import UserError
from whalepod.spec.model import BlockFP8

KEPT_HIGH = ("lm_head", "eh_proj")
"""Linear layers that DeepSeek leaves in BF16, by the last part of their name. Embeddings, norms and routers
are not `nn.Linear` and stay as they are."""


@dataclass(frozen=True)
class Int8:
    """INT8 with one scale for each 128 numbers of a row: their largest magnitude / 127."""

    weight_block_size: Block = (1, 128)


Form = BlockFP8 | Int8
"""How a weight is stored."""


def quantize_weight(w: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Values and scales of `w` [..., out, in]. Raises UserError for what is not finite, or too large."""
    if isinstance(form, BlockFP8):
        return quantize_blocks(w, form.weight_block_size, form.scale_fmt)
    blocks = as_blocks(w.float(), form.weight_block_size)
    largest = largest_magnitude(blocks)
    if not bool(largest.isfinite().all()):
        raise UserError("a weight with NaN or infinity has no INT8 form")
    scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
    values = (blocks / scale[..., :, None, :, None]).round().to(torch.int8)
    return from_blocks(values, w.shape).contiguous(), scale


def storage_names(name: str) -> tuple[str, str]:
    """Names of the two parameters that hold weight `name` in one byte: values and scales."""
    return f"{name}_stored", f"{name}_scale_inv"


class FP8Storage(nn.Module):
    """What a module with FP8 weights adds to the one that it was.

    Weight `w` is two parameters without gradient, `w_stored` and `w_scale_inv`; reading `w` dequantises to
    `compute_dtype`. Moving the module keeps their bits; casting it (`.to(dtype)`) changes `compute_dtype`.
    """

    quantization: Form
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
            bits = tensor.detach().view(torch.uint8 if tensor.element_size() == 1 else torch.int32)
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
    quantization: Form | None = None,
    compute_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Keeps the weights that DeepSeek quantises in one byte, in place: linear layers and stacked experts.

    Experts are recognised by their parameters: matrices stacked to more than two dimensions. A model on the
    meta device gets storage without values, to be materialised and loaded; any other is quantised.
    `quantization`: FP8 blocks of 128 x 128 with float32 scales unless given.
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
    quantization: Form,
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
            module.store(name, w.to(torch.int8 if isinstance(quantization, Int8) else FP8), scale)
        else:
            module.store(name, *quantize_weight(w, quantization))


@cache
def _with_storage(base: type[nn.Module], names: tuple[str, ...]) -> type[FP8Storage]:
    """`base` with FP8 storage; its forward pass reads the weights and finds the properties."""

    def reader(name: str) -> property:
        def read(self: Any) -> Tensor:
            return self.dequantized(name)

        return property(read)

    return type(f"FP8{base.__name__}", (FP8Storage, base), {name: reader(name) for name in names})
