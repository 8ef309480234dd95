"""Which part of each parameter a rank holds: one table for the whole family, applied by one loop.

A rank's part is always one `Box` of the whole tensor, so that checkpoints, weight files and initial
values need to know nothing else about a layout. Tensor and expert parallelism cut here; FSDP2 cuts
what is left once more, along one dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from whalepod.models.lora import A as LORA_A
from whalepod.models.lora import B as LORA_B
from whalepod.models.lora import is_adapter
from whalepod.parallel.mesh import Mesh
from whalepod.spec.layout import Layout

# Parameter path (its end), axis, dimension. The first line that matches counts; no line, no cut. Of the
# adapter of a layer that is cut, B is cut like the layer's outputs, or A like its inputs.
# `experts` is `ep` along the experts, or without expert parallelism `tp` along their width.
TABLE: tuple[tuple[str, str, int], ...] = (
    ("embed_tokens.weight", "tp", 0),  # vocabulary
    ("lm_head.weight", "tp", 0),
    ("self_attn.q_proj.weight", "tp", 0),  # heads
    ("self_attn.k_proj.weight", "tp", 0),
    ("self_attn.v_proj.weight", "tp", 0),
    ("self_attn.q_proj.bias", "tp", 0),
    ("self_attn.k_proj.bias", "tp", 0),
    ("self_attn.v_proj.bias", "tp", 0),
    ("self_attn.q_b_proj.weight", "tp", 0),
    ("self_attn.kv_b_proj.weight", "tp", 0),
    ("self_attn.o_proj.weight", "tp", 1),
    (".experts.gate_up", "experts", 2),  # [E, gate and up, width, D]
    (".experts.down", "experts", 2),  # [E, D, width]
    (".gate_proj.weight", "tp", 0),  # width of dense layers and shared experts
    (".up_proj.weight", "tp", 0),
    (".down_proj.weight", "tp", 1),
)


@dataclass(frozen=True)
class Box:
    """A part of a tensor: the whole's shape, and where the part begins and how large it is."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    def inner(self, offset: tuple[int, ...], shape: tuple[int, ...]) -> Box:
        """The part of this part at `offset`, of `shape`."""
        return Box(self.whole, tuple(a + b for a, b in zip(self.offset, offset, strict=True)), tuple(shape))


@dataclass(frozen=True)
class Held:
    """What this rank holds of a parameter before FSDP2, and how its gradient's parts spread.

    reduce: the axis over which gradients are summed: `data` for what `tp` splits, `stage` for what it
    repeats (its ranks see other tokens), `expert_data` for experts that `ep` shares out.
    """

    box: Box
    reduce: str


def cut(name: str, layout: Layout) -> tuple[str, int] | None:
    """The axis and dimension along which a parameter is cut, or None."""
    base = name
    if is_adapter(name):
        base = name.removesuffix(LORA_A).removesuffix(LORA_B) + ".weight"
    found = next(((axis, dim) for end, axis, dim in TABLE if base.endswith(end)), None)
    if found is None:
        return None
    axis, dim = found
    if base != name and name.endswith(LORA_A) == (dim == 0):
        return None
    if axis == "experts":
        axis, dim = ("ep", 0) if layout.ep > 1 else ("tp", dim)
    return (axis, dim) if getattr(layout, axis) > 1 else None


def shard_parameters(part: nn.Module, mesh: Mesh, frozen: torch.dtype = torch.float32) -> dict[str, Held]:
    """Replaces every parameter of a model part by this rank's share, by name.

    Parameters on the meta device stay there. One that two modules share stays shared. What is not trained
    is `frozen` from now on.
    """
    layout = mesh.layout
    held: dict[str, Held] = {}
    made: dict[int, nn.Parameter] = {}
    old = list(part.parameters())  # alive until the end, or their ids could come again
    for path, module in part.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            name = f"{path}.{key}".lstrip(".")
            first = id(parameter) not in made
            box = Box(tuple(parameter.shape), (0,) * parameter.dim(), tuple(parameter.shape))
            where = cut(name, layout)
            if where is not None:
                box = _slice(box, where[1], mesh[where[0]].size, mesh[where[0]].rank)
            if first:
                # Masters: FP32 whatever the weights came in.
                trained, part_of_it = parameter.requires_grad, parameter.detach()[box.slices]
                dtype = torch.float32 if trained else frozen
                local = part_of_it.to(dtype, copy=True, memory_format=torch.contiguous_format)
                made[id(parameter)] = nn.Parameter(local, requires_grad=trained)
                held[name] = Held(box, _reduce_axis(where, layout))
            module._parameters[key] = made[id(parameter)]
    del old
    return held


def _slice(box: Box, dim: int, size: int, index: int) -> Box:
    assert box.shape[dim] % size == 0, (box, dim, size)
    length = box.shape[dim] // size
    offset = tuple(index * length if d == dim else 0 for d in range(len(box.shape)))
    return box.inner(offset, tuple(length if d == dim else n for d, n in enumerate(box.shape)))


def _reduce_axis(where: tuple[str, int] | None, layout: Layout) -> str:
    if where is not None and where[0] == "ep":
        return "expert_data"
    # Without tensor parallelism the two are the same ranks: one name keeps one buffer.
    return "data" if where is not None and layout.tp > 1 else "stage"


def local_part(parameter: Tensor, held: Held) -> tuple[Tensor, Box]:
    """What this process really has of a parameter, FSDP2 included: the plain tensor and its box."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), held.box
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    local: Any = parameter.to_local().detach()
    assert tuple(local.shape) == tuple(shape), (local.shape, shape)
    return local, held.box.inner(tuple(offset), tuple(shape))
