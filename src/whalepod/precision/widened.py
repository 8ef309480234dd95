"""BF16 products on a processor without BF16 instructions.

There torch multiplies BF16 matrices in a scalar loop, a hundred times slower than FP32 ones.
`widen_products` puts another kernel behind each of its BF16 products on the CPU: operands widened, the
product in FP32, the result rounded once. A product of two BF16 numbers is exact in FP32, and sums are FP32
where there are such instructions too, so the numerics are theirs. To everything above the kernels (autograd,
dry run, FLOP counters) the operations stay the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_OPERATIONS = {
    **dict.fromkeys((*_PRODUCTS, *(f"{name}.out" for name in _PRODUCTS)), 1),
    _ATTENTION: 1,  # the second result is the softmax's log-sum: FP32 for BF16 queries too
    f"{_ATTENTION}_backward": 3,
}
"""Kernels to replace, and how many of their results have the operands' type. Grouped products are made of
`mm.out`, expert by expert, whose wide weight stays in the cache."""


@lru_cache(maxsize=1)
def widen_products() -> bool:
    """Replaces the kernels, for the rest of this process; False where the processor needs it not."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"[\s\S]*Overriding a previously registered kernel")
        for name, results in _OPERATIONS.items():
            library.impl(name, _widened(name, results), "CPU", with_keyset=True)
    _kept.append(library)
    return True


_kept: list[torch.library.Library] = []  # a library that is dropped takes its kernels along


def _widened(name: str, results: int) -> Callable[..., Any]:
    original = torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        # A product with one or two rows reads its matrix once: there torch has vectors for BF16 too. Without
        # rows (experts that no token chose) nothing is worth widening.
        x = args[0]
        if x.dtype != torch.bfloat16 or not x.numel() or (name == "mm" and len(x) <= 2):
            return original(keys, *args, **kwargs)
        out = kwargs.pop("out", None)
        wide = [a.float() if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a for a in args]
        if out is not None:
            return out.copy_(original(keys, *wide, **kwargs, out=torch.empty(0)))
        found = original(keys, *wide, **kwargs)
        if isinstance(found, Tensor):
            return found.bfloat16()
        return (*(each.bfloat16() for each in found[:results]), *found[results:])

    return kernel
