"""Sharded data parallelism (ZeRO 1 to 3) on FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from whalepod.models.moe import GroupedExperts
from whalepod.models.transformer import Block, MTPBlock
from whalepod.parallel.comm import Axis, CountedGather, CountedSum
from whalepod.parallel.mesh import Mesh
from whalepod.parallel.sharding import Held, local_part
from whalepod.parallel.state import Piece, moments_by_name, sum_in_buckets

Fill = Callable[[nn.Module, str], None]
"""Gives a module (and its path in its model part) memory and values, if it has none yet."""


class Sharded:
    """FSDP2: weights, gradients and moments live in shards; each block gathers its own to compute.

    `fill` is called for each block before it is sharded.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        held: dict[str, Held],
        mesh: Mesh,
        dtype: torch.dtype,
        fill: Fill,
    ) -> None:
        self._layout = mesh.layout
        self._wrap(parts, mesh, dtype, fill)
        self._roots = [cast(FSDPModule, part) for part in parts]
        self._modules = [m for part in parts for m in part.modules() if isinstance(m, FSDPModule)]
        self._named: dict[str, nn.Parameter] = {}
        # Where one rank has both ends of a pipeline, the last stage's copy of a weight follows the first's.
        self._copies: dict[str, nn.Parameter] = {}
        for part in parts:
            for name, parameter in part.named_parameters():
                if not parameter.requires_grad:
                    continue
                (self._copies if name in self._named else self._named)[name] = parameter
        self._pieces = {n: Piece(*local_part(p, held[n])) for n, p in self._named.items()}
        # Plain tensors over the shards' memory: an optimiser need not know of meshes.
        self._locals = {n: nn.Parameter(piece.tensor) for n, piece in self._pieces.items()}
        filled = [p for p in self._locals.values() if p.numel()]
        self.decayed = [p for p in filled if p.dim() >= 2]
        self.plain = [p for p in filled if p.dim() < 2]
        rest = {"stage": "replicas", "data": "dp_replicate", "expert_data": "dp_replicate"}
        self._rest = {n: mesh[rest[held[n].reduce]] for n in self._named}

    @staticmethod
    def _wrap(parts: Sequence[nn.Module], mesh: Mesh, dtype: torch.dtype, fill: Fill) -> None:
        layout = mesh.layout
        options: dict[str, Any] = {
            # Inputs keep their type: rounding the rotary tables to BF16 would move every position.
            "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
            "reshard_after_forward": layout.zero == 3,
        }
        shards = mesh.device_mesh("fsdp")
        experts = mesh.device_mesh("expert_shard") if layout.ep > 1 else shards

        def wrap(path: str, module: nn.Module, device_mesh: Any, axis: Axis, **more: Any) -> None:
            fill(module, path)
            wrapped = cast(Any, fully_shard(module, mesh=device_mesh, **(options | more)))
            wrapped.set_custom_all_gather(CountedGather(axis))
            wrapped.set_custom_reduce_scatter(CountedSum(axis))

        for part in parts:
            # Modules come before what is in them, and MTP blocks hold a block of their own.
            units: dict[str, nn.Module] = {}
            for path, module in part.named_modules():
                if isinstance(module, Block | MTPBlock) and path.removesuffix(".block") not in units:
                    units[path] = module
            for path, unit in units.items():
                for below, module in [*unit.named_modules(prefix=path)] if layout.ep > 1 else []:
                    if isinstance(module, GroupedExperts):
                        placement = _expert_placement(mesh["expert_shard"].size)
                        wrap(below, module, experts, mesh["expert_shard"], shard_placement_fn=placement)
                placement = _expert_placement(mesh["fsdp"].size)
                wrap(path, unit, shards, mesh["fsdp"], shard_placement_fn=placement)
            # What is left, embedding and head, is needed from the first to the last: it stays gathered.
            wrap("", part, shards, mesh["fsdp"], reshard_after_forward=False)

    def start_step(self) -> None:
        for parameter in (*self._named.values(), *self._copies.values(), *self._locals.values()):
            parameter.grad = None

    def before_backward(self, is_last: bool) -> None:
        once = self._layout.zero == 1
        for root in self._roots:
            root.set_is_last_backward(is_last)
            root.set_requires_gradient_sync(is_last or not once)
            if self._layout.zero < 3:  # weights stay gathered from one micro-batch to the next
                root.set_reshard_after_backward(is_last)

    def after_backward(self) -> None:
        """FSDP2 collects by itself."""

    def finish_gradients(self) -> None:
        for name, local in self._locals.items():
            grad = cast(Any, self._named[name].grad)
            local.grad = torch.zeros_like(local) if grad is None else grad.to_local()
        for name, parameter in self._copies.items():
            if (grad := cast(Any, parameter.grad)) is not None:
                cast(Tensor, self._locals[name].grad).add_(grad.to_local())
        for axis in {id(a): a for a in self._rest.values() if a.size > 1}.values():
            same = [cast(Tensor, p.grad) for n, p in self._locals.items() if self._rest[n] is axis]
            sum_in_buckets(same, axis)

    def gradients(self) -> Iterator[tuple[str, Tensor, int]]:
        for name, local in self._locals.items():
            yield name, cast(Tensor, local.grad), self._rest[name].size

    def write_back(self) -> None:
        """FSDP2 gathers from the masters at the next forward pass."""
        for name, parameter in self._copies.items():
            cast(Any, parameter).to_local().detach().copy_(self._pieces[name].tensor)
        for module in self._modules:
            module.reshard()

    def weights(self) -> dict[str, Piece]:
        return self._pieces

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Piece]:
        if (named := moments_by_name(optimizer, self._pieces)) is not None:
            return named
        return {
            f"{name}/{key}": Piece(value, self._pieces[name].box)
            for name, local in self._locals.items()
            for key, value in optimizer.state[local].items()
            if value.dim()
        }


def _expert_placement(size: int) -> Any:
    """Shards whole experts where their number allows, else their hidden dimension if that divides.

    Other parameters are cut along their first dimension, as FSDP2 does.
    """

    def place(parameter: nn.Parameter) -> Shard | None:
        if parameter.dim() < 3:
            return None
        dim = 1 if parameter.dim() == 3 else 3  # D of down [E, D, I] and of gate_up [E, 2, I, D]
        uneven = parameter.shape[0] % size != 0
        return Shard(dim) if uneven and parameter.shape[dim] % size == 0 else None

    return place
