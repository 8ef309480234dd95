"""Data parallelism: the training state replicated, or sharded with FSDP2, behind one interface.

Both hold FP32 masters, compute in the layout's precision, and sum gradients in FP32. The loss that
a rank backpropagates is its part of the global batch's mean; gradients are therefore summed.

What is summed over which ranks differs by parameter (`Held.reduce`): what `tp` splits over those that
saw other data, what it repeats over the `tp` ranks too, experts over those that hold the same experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from whalepod.models.moe import GroupedExperts
from whalepod.models.transformer import Block, MTPBlock
from whalepod.parallel.comm import Axis, CountedGather, CountedSum
from whalepod.parallel.mesh import Mesh
from whalepod.parallel.sharding import Box, Held, local_part
from whalepod.precision.master import MasterWeights

BUCKET_BYTES = 32 * 2**20
Fill = Callable[[nn.Module, str], None]
"""Gives a module (and its path in its model part) memory and values, if it has none yet."""


class Piece(NamedTuple):
    """A tensor of the training state as this rank holds it: the part `box` of a whole."""

    tensor: Tensor
    box: Box


class TrainingState(Protocol):
    """A model's weights as a trainer needs them, wherever they live.

    decayed, plain: FP32 tensors for the optimiser with and without weight decay; after
    `finish_gradients` their `.grad` are global sums.
    """

    decayed: list[nn.Parameter]
    plain: list[nn.Parameter]

    def start_step(self) -> None:
        """Before the first micro-batch: forgets the last step's gradients."""
        ...

    def before_backward(self, is_last: bool) -> None:
        """Before each backward pass; says whether it is the step's last."""
        ...

    def after_backward(self) -> None:
        """After a backward pass that may have added gradients without autograd's hooks."""
        ...

    def finish_gradients(self) -> None:
        """After the last backward pass: waits until every rank holds the global sums."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor, int]]:
        """Name, local gradient, and how many ranks of this pipeline stage hold the same one."""
        ...

    def write_back(self) -> None:
        """After an optimiser step or a load: the model computes with the new weights."""
        ...

    def weights(self) -> dict[str, Piece]:
        """FP32 masters by parameter name."""
        ...

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Piece]:
        """The optimiser's tensors by `parameter name / state name`."""
        ...


class Replicated:
    """Every rank holds everything; gradients are all-reduced in buckets while backward runs."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        held: dict[str, Held],
        mesh: Mesh,
        dtype: torch.dtype,
    ) -> None:
        self._held = held
        self._sums: list[_Sum] = []
        for axis in ("stage", "data", "expert_data"):
            own = {name: p for name, p in parameters.items() if held[name].reduce == axis}
            if own:
                self._sums.append(_Sum(MasterWeights(own, dtype), mesh[axis]))
        self.decayed = [s.master.decayed for s in self._sums if s.master.decayed.numel()]
        self.plain = [s.master.plain for s in self._sums if s.master.plain.numel()]

    def start_step(self) -> None:
        for each in self._sums:
            each.start_step()

    def before_backward(self, is_last: bool) -> None:
        for each in self._sums if is_last else ():
            each.send_as_they_come()

    def after_backward(self) -> None:
        for each in self._sums:
            each.master.collect()

    def finish_gradients(self) -> None:
        for each in self._sums:
            each.start_rest()
        for each in self._sums:
            each.wait()

    def gradients(self) -> Iterator[tuple[str, Tensor, int]]:
        for each in self._sums:
            views = each.master.named(
                cast(Tensor, each.master.decayed.grad), cast(Tensor, each.master.plain.grad)
            )
            for name, view in views.items():
                yield name, view, each.axis.size

    def write_back(self) -> None:
        for each in self._sums:
            each.master.write_back()

    def weights(self) -> dict[str, Piece]:
        return {
            name: Piece(view, self._held[name].box)
            for each in self._sums
            for name, view in each.master.named(
                each.master.decayed.detach(), each.master.plain.detach()
            ).items()
        }

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Piece]:
        pieces = {}
        for each in self._sums:
            m = each.master
            state = {p: optimizer.state[p] for p in (m.decayed, m.plain) if p.numel()}
            keys = [k for k, v in next(iter(state.values())).items() if v.dim()]
            for key in keys:
                flat = [state[p][key] if p in state else p.detach() for p in (m.decayed, m.plain)]
                for name, view in m.named(*flat).items():
                    pieces[f"{name}/{key}"] = Piece(view, self._held[name].box)
        return pieces


class _Sum:
    """Masters whose gradients are summed over one axis, and the buckets in which they travel."""

    def __init__(self, master: MasterWeights, axis: Axis) -> None:
        self.master, self.axis = master, axis
        self._bucket_size = BUCKET_BYTES // master.gradients.element_size()
        self._buckets = master.gradients.split(self._bucket_size)
        self._missing: list[int] = []
        self._works: list[dist.Work | None] = []  # of the buckets that have left

    def start_step(self) -> None:
        self.master.start_step()
        self.master.on_gradient = None
        self._missing = [bucket.numel() for bucket in self._buckets]
        self._works = []

    def send_as_they_come(self) -> None:
        """Lets buckets leave during the backward pass that begins now, the step's last."""
        self.master.on_gradient = self._arrived if self.axis.size > 1 else None

    def _arrived(self, offset: int, size: int) -> None:
        # A parameter may straddle buckets; each bucket leaves when all its elements are final.
        end = offset + size
        while offset < end:
            index = offset // self._bucket_size
            step = min(end, (index + 1) * self._bucket_size) - offset
            self._missing[index] -= step
            offset += step
        # Buckets leave in one order on every rank, or ranks would sum different ones: a complete
        # bucket waits for those before it.
        while len(self._works) < len(self._buckets) and self._missing[len(self._works)] == 0:
            self._start_next()

    def _start_next(self) -> None:
        self._works.append(self.axis.start_all_reduce(self._buckets[len(self._works)]))

    def start_rest(self) -> None:
        self.master.on_gradient = None
        self.master.clear_missing()
        # A parameter without a gradient holds its bucket back, and those behind it, until here.
        while self.axis.size > 1 and len(self._works) < len(self._buckets):
            self._start_next()

    def wait(self) -> None:
        for work in self._works:
            if work is not None:
                work.wait()
        self._works = []


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
            wrapped = cast(Any, fully_shard(module, mesh=device_mesh, **options, **more))
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
                wrap(path, unit, shards, mesh["fsdp"])
            wrap("", part, shards, mesh["fsdp"])

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
        return {
            f"{name}/{key}": Piece(value, self._pieces[name].box)
            for name, local in self._locals.items()
            for key, value in optimizer.state[local].items()
            if value.dim()
        }


def _expert_placement(size: int) -> Any:
    """Shards whole experts where their number allows, else their hidden dimension if that divides."""

    def place(parameter: nn.Parameter) -> Shard | None:
        dim = 1 if parameter.dim() == 3 else 3  # D of down [E, D, I] and of gate_up [E, 2, I, D]
        uneven = parameter.shape[0] % size != 0
        return Shard(dim) if uneven and parameter.shape[dim] % size == 0 else None

    return place


def sum_in_buckets(tensors: list[Tensor], axis: Axis) -> None:
    """Sums tensors in place over an axis, a few together."""
    bucket: list[Tensor] = []
    started: list[tuple[dist.Work | None, Tensor, list[Tensor]]] = []
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        if sum(t.nbytes for t in bucket) >= BUCKET_BYTES or i == len(tensors) - 1:
            flat = torch.cat([t.flatten() for t in bucket])
            started.append((axis.start_all_reduce(flat), flat, bucket))
            bucket = []
    for work, flat, members in started:
        if work is not None:
            work.wait()
        for tensor, total in zip(members, flat.split([t.numel() for t in members]), strict=True):
            tensor.copy_(total.view_as(tensor))


def clip_gradients(state: TrainingState, max_norm: float, mesh: Mesh, copies: frozenset[str]) -> Tensor:
    """Scales all gradients so that their global 2-norm is at most `max_norm`; returns the norm.

    Each rank adds the squares of what it holds, over the number of ranks that hold the same; one sum
    over the world is then right for any mix of axes. `copies`: weights that two stages hold.
    """
    names, gradients, holders = zip(*state.gradients(), strict=True)
    shares = [1 / (n * (1 + (name in copies))) for name, n in zip(names, holders, strict=True)]
    squares = torch.stack(torch._foreach_norm(gradients)).double().square()
    square = squares @ torch.tensor(shares, dtype=torch.float64, device=squares.device)
    norm = mesh.world.all_reduce(square).sqrt().float()
    torch.nn.utils.clip_grads_with_norm_([*state.decayed, *state.plain], max_norm, norm)
    return norm
