"""BF16 weights in the order in which oneDNN's matrix kernels read them, for inference on CPUs.

Decoding multiplies every weight with a few rows only, so it is as fast as weights come from memory, and the
kernels read their own order faster than the usual one, mostly 1.1 to 1.6 times (`bench/packed.py`). What is
packed stays so: the usual copy is dropped, only its shape remains (`weight`, on the meta device).

Experts are run one after the other, those that have rows, as the grouped product does on CPUs too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whalepod.models.attention import MLAttention
from whalepod.models.moe import GroupedExperts, Rows

_ops = torch.ops.mkldnn
ROWS = 32  # for which the order is chosen; it serves one row as well


def packs_here() -> bool:
    """Whether this machine's CPU multiplies BF16 by itself, and torch was built with oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(_ops._is_mkldnn_bf16_supported())


def pack(model: nn.Module) -> None:
    """Packs every BF16 linear layer and all experts of a model that is to be read only, in place."""
    for module in list(model.modules()):
        if isinstance(module, MLAttention):
            module.split_up_projection()
    for module in list(model.modules()):
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.__class__ = PackedLinear  # hooks and attributes stay
            module.packed = _packed(module.weight.data)  # type: ignore[assignment]
            module.weight = _shape_of(module.weight)
        elif type(module) is GroupedExperts and module.down.dtype == torch.bfloat16:
            module.__class__ = PackedExperts
            module.packed = [  # type: ignore[assignment]
                (_packed(gate_up.flatten(0, 1)), _packed(down))
                for gate_up, down in zip(module.gate_up.data, module.down.data, strict=True)
            ]
            module.gate_up, module.down = _shape_of(module.gate_up), _shape_of(module.down)


class PackedLinear(nn.Linear):
    """x [..., in] -> [..., out]."""

    packed: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return _times(x, self.packed, self.bias)


class PackedExperts(GroupedExperts):
    """Rows of all experts that are here, each times its own weights."""

    packed: list[tuple[Tensor, Tensor]]

    def forward(self, rows: Rows) -> Tensor:
        out, start = torch.zeros_like(rows.x_ND), 0
        weights = rows.weights_N.unsqueeze(-1).to(out.dtype)
        for (gate_up, down), end in zip(self.packed, rows.ends_E.tolist(), strict=True):
            if end > start:
                gate, up = _times(rows.x_ND[start:end], gate_up).chunk(2, dim=-1)
                out[start:end] = _times(F.silu(gate) * up * weights[start:end], down)
                start = end
        return out


def _packed(weight: Tensor) -> Tensor:
    return _ops._reorder_linear_weight(weight.contiguous(), ROWS)


def _times(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    return _ops._linear_pointwise(x, packed, bias, "none", [], "")


def _shape_of(weight: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
