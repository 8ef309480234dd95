"""Products in FP8 by the fastest well-kept kernels that are installed, on GPUs of compute capability 9.

DeepGEMM if it can be imported, else cuBLAS through torch's `scaled_mm`, from CUDA 12.9 on. Both want the
dimensions in whole blocks and scales laid out in their own way; what does not fit goes to the Triton kernels,
and so do the weights' gradients of experts: the tiles of 128 rows that they sum over run across the groups.

Argument forms are those of DeepGEMM's `csrc/apis/gemm.hpp` and torch's `ScaledBlas.cpp`.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from whalepod.precision.tiles import TILE

Library = Literal["DeepGEMM", "torch", "Triton"]
_log = logging.getLogger(__name__)


@cache
def choose() -> Library:
    """For this process; says so in the log."""
    chosen: Library = "Triton"
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        if importlib.util.find_spec("deep_gemm") is not None:
            chosen = "DeepGEMM"
        elif tuple(int(n) for n in (torch.version.cuda or "0").split(".")) >= (12, 9):
            chosen = "torch"
    _log.info(
        "FP8 products by %s", {"Triton": "our Triton kernels", "torch": "torch.scaled_mm"}.get(chosen, chosen)
    )
    return chosen


def mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """a [M, K] times b [N, K] transposed, where the chosen library can: else None.

    a in tiles of 1 x 128, b in such tiles or in blocks of 128 x 128.
    """
    chosen = choose()
    blocks = len(b_scale) != len(b)
    whole = a.shape[0] % 16 == 0 and a.shape[1] % TILE == 0 and b.shape[0] % TILE == 0
    if chosen == "Triton" or not whole or len(a_scale) != len(a) or (blocks and dtype != torch.bfloat16):
        return None
    call = _deep_gemm if chosen == "DeepGEMM" else _scaled_mm
    return call(a.contiguous(), a_scale, b.contiguous(), b_scale, blocks, dtype)


def grouped_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Rows of a [N, K], those before `ends` [E], times their b [E, M, K] transposed: [N, M], else None.

    a in tiles of 1 x 128, b in blocks of 128 x 128. DeepGEMM computes blocks of rows, each of one group: rows
    move to where their group begins a block, and back.
    """
    whole = all(size % TILE == 0 for size in b.shape[1:])
    if choose() != "DeepGEMM" or not whole or len(a_scale) != len(a) or dtype != torch.bfloat16 or not len(a):
        return None
    deep_gemm = _module()
    height = deep_gemm.get_mk_alignment_for_contiguous_layout()
    place, group = _placed(ends, len(a), height)
    # As many blocks as any sizes of the groups can need, and one for rows behind the last group.
    rows = -(-len(a) // height) * height + (len(ends) + 1) * height
    values, scale = a.new_zeros(rows, a.shape[1]), a_scale.new_ones(rows, a_scale.shape[1])
    values.view(torch.uint8)[place] = a.contiguous().view(torch.uint8)
    scale[place] = a_scale
    groups = torch.full((rows,), -1, dtype=torch.int32, device=a.device)
    groups[place] = torch.where(group < len(ends), group, -1).to(torch.int32)
    out = torch.zeros(rows, b.shape[1], dtype=dtype, device=a.device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (values, scale), (b.contiguous(), b_scale.contiguous()), out, groups
    )
    return out[place].masked_fill_((group == len(ends)).unsqueeze(1), 0)


def _placed(ends: Tensor, num_rows: int, height: int) -> tuple[Tensor, Tensor]:
    """Where each row goes when every group begins at a multiple of `height`, and its group; rows behind the
    last group are a group of their own."""
    index = torch.arange(num_rows, device=ends.device)
    group = torch.searchsorted(ends.long(), index, right=True)
    starts = F.pad(ends.long(), (1, 0))
    sizes = starts.diff()
    begins = F.pad((sizes + height - 1) // height * height, (1, 0)).cumsum(0)
    return begins[group] + index - starts[group], group


def _deep_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, blocks: bool, dtype: torch.dtype
) -> Tensor:
    left, right = (a, a_scale.contiguous()), (b, b_scale.contiguous())
    if blocks:
        out = torch.empty(len(a), len(b), dtype=dtype, device=a.device)
        _module().fp8_gemm_nt(left, right, out)
        return out
    # Tiles on both sides: this kernel adds to FP32.
    total = torch.zeros(len(a), len(b), device=a.device)
    _module().fp8_gemm_nt(left, right, total, c=total, recipe=(1, 1, TILE))
    return total.to(dtype)


def _module() -> Any:
    import deep_gemm  # type: ignore[import-not-found]

    return deep_gemm


def _scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, blocks: bool, dtype: torch.dtype
) -> Tensor:
    if blocks:
        # Column after column of blocks, the number in a column rounded up to a multiple of four.
        b_scale, recipe = F.pad(b_scale, (0, -b_scale.shape[1] % 4)).T, ScalingType.BlockWise128x128
    else:
        b_scale, recipe = _by_columns(b_scale), ScalingType.BlockWise1x128
    return F.scaled_mm(
        *(a, b.T, _by_columns(a_scale), ScalingType.BlockWise1x128, b_scale, recipe), output_dtype=dtype
    )


def _by_columns(x: Tensor) -> Tensor:
    """The same matrix, each column contiguous."""
    return x.T.contiguous().T
