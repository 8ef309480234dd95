"""Low-rank adapters: y = W x + (alpha / r) B A x beside frozen weights (LoRA, arXiv 2106.09685, section 4.1).

An adapter is a submodule `lora` of its linear layer, to whose output it is added; `A` [r, in] begins as noise
and `B` [out, r] as zeros, so the model begins as it was. Linear layers of attention, dense MLPs and shared
experts can have one; routed experts, routers, embedding, head and MTP layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whalepod.models.moe import GroupedExperts
from whalepod.spec.errors import UserError, nearest
from whalepod.spec.run import LoRAConfig

A, B = ".lora.A", ".lora.B"


class Adapter(nn.Module):
    """x [..., in] -> scale * B A x [..., out]."""

    def __init__(self, linear: nn.Linear, r: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        device = linear.weight.device
        self.A = nn.Parameter(torch.empty(r, linear.in_features, device=device))
        self.B = nn.Parameter(torch.empty(linear.out_features, r, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A) * self.scale, self.B)


def adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that can have an adapter, by path."""
    for path, module in model.named_modules():
        if path.startswith("layers.") and isinstance(module, nn.Linear):
            yield path, module


def add_adapters(model: nn.Module, config: LoRAConfig) -> None:
    """Freezes a model and gives the layers that `config` names an adapter each, without values yet.

    Raises UserError for a name that no layer has.
    """
    found = list(adaptable(model))
    names = {path.rpartition(".")[2] for path, _ in found}
    # PEFT on transformers 5 takes a shared expert's layers, by their names, for the stacked routed experts.
    has_experts = any(isinstance(module, GroupedExperts) for module in model.modules())
    usual = {path.rpartition(".")[2] for path, _ in found if ".self_attn." in path or not has_experts}
    wanted = usual if config.modules is None else set(config.modules)
    for name in sorted(wanted - names):
        raise UserError(
            f"lora.modules: no linear layer is called {name!r}{nearest(name, names)}; "
            f"there are {', '.join(sorted(names))}"
        )
    model.requires_grad_(False)
    for path, linear in found:
        if path.rpartition(".")[2] in wanted:
            linear.lora = Adapter(linear, config.r, config.alpha / config.r)
            linear.register_forward_hook(_added)


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's."""
    return name.endswith((A, B))


def _added(linear: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
    return out + linear.lora(args[0])
