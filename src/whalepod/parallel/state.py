"""The training state of a spread model: what a trainer needs of weights, wherever they live.

Replicated (`replicated.py`) or sharded with FSDP2 (`sharded.py`), both hold FP32 masters, compute in the
layout's precision, and sum gradients in FP32. The loss that a rank backpropagates is its part of the global
batch's mean; gradients are therefore summed.

What is summed over which ranks differs by parameter (`Held.reduce`): what `tp` splits over those that
saw other data, what it repeats over the `tp` ranks too, experts over those that hold the same experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from whalepod.parallel.comm import Axis
from whalepod.parallel.sharding import Box

BUCKET_BYTES = 32 * 2**20


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


def moments_by_name(optimizer: Any, weights: dict[str, Piece]) -> dict[str, Piece] | None:
    """`moments` of an optimiser that keeps them by parameter; None of one that does not."""
    by_name = getattr(optimizer, "by_name", None)
    if by_name is None:
        return None
    return {
        f"{name}/{key}": Piece(value, weights[name].box)
        for name, values in by_name.items()
        for key, value in values.items()
    }


def sum_in_buckets(tensors: list[Tensor], axis: Axis) -> None:
    """Sums tensors in place over an axis, a few together; while one bucket travels, the next is made."""
    bucket: list[Tensor] = []
    flying: tuple[dist.Work | None, Tensor, list[Tensor]] | None = None

    def land() -> None:
        if flying is None:
            return
        work, flat, members = flying
        if work is not None:
            work.wait()
        for tensor, total in zip(members, flat.split([t.numel() for t in members]), strict=True):
            tensor.copy_(total.view_as(tensor))

    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        if sum(t.nbytes for t in bucket) >= BUCKET_BYTES or i == len(tensors) - 1:
            flat = torch.cat([t.flatten() for t in bucket])
            started = (axis.start_all_reduce(flat), flat, bucket)
            land()
            flying, bucket = started, []
    land()
