"""The tensors of a training state as torch's distributed checkpoint takes them, and how they are read.

A checkpoint is a folder `step_00000100` that holds every rank's parts: weights in FP32, moments, selection
biases (`checkpoint_files.py` says how it stays whole, `checkpoint_writer.py` writes it). A part is a box of a
whole tensor, whichever axes of a layout cut it out, so any other layout finds its own parts in it. All are in
safetensors files. Nothing in a checkpoint is a pickle.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from whalepod.parallel.checkpoint_files import Progress, read_progress
from whalepod.parallel.parallelize import Parallel
from whalepod.parallel.state import Piece, TrainingState
from whalepod.spec.errors import UserError


class Part(Tensor):
    """A Piece as torch's checkpoints take it: what is written, what is to be read, and into what.

    Checkpoints accept no other objects than tensors, but ask any tensor for these three methods
    (`torch.distributed._checkpointable`). `size()` is the whole's.
    """

    piece: Piece

    @staticmethod
    def __new__(cls, piece: Piece) -> Part:
        part = Tensor._make_subclass(cls, piece.tensor)
        part.piece = piece
        return part

    def size(self, dim: int | None = None) -> Any:
        whole = torch.Size(self.piece.box.whole)
        return whole if dim is None else whole[dim]

    def __create_write_items__(self, name: str, _object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.piece.tensor)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        box = self.piece.box
        if not self.piece.tensor.numel():
            return []
        return [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))]

    def __get_tensor_shard__(self, _index: MetadataIndex) -> Tensor:
        return self.piece.tensor


def tensors(parallel: Parallel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a training state by name; loading fills them in place."""
    state: TrainingState = parallel.state
    result: dict[str, Tensor] = {f"model/{n}": Part(p) for n, p in state.weights().items()}
    for part in parallel.parts:
        result |= {f"model/{name}": value for name, value in saved_buffers(part).items()}
    return result | {f"optimizer/{n}": Part(p) for n, p in state.moments(optimizer).items()}


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a checkpoint: the selection biases."""
    persistent = set(model.state_dict())
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def load(path: Path, parallel: Parallel, optimizer: torch.optim.Optimizer) -> Progress:
    """Fills a training state from a checkpoint written under any layout."""
    progress = read_progress(path)
    _prime(optimizer, progress.step - progress.skipped)
    read_tensors(path, tensors(parallel, optimizer), no_dist=parallel.mesh.world.size == 1)
    parallel.state.write_back()
    return progress


def read_tensors(path: Path, into: Mapping[str, Tensor], no_dist: bool = True) -> None:
    """Fills `into` in place from a checkpoint; each rank reads what it holds.

    Raises UserError naming the first tensor that is missing or has another shape, and for files that are not
    what they should be, whoever wrote them.
    """
    reader = HuggingFaceStorageReader(str(path))
    with _reading(path):
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for name, tensor in into.items():
        if name not in stored:
            raise UserError(f"checkpoint {path} is of another model: it has no {name!r}")
        if tuple(stored[name].size) != tuple(tensor.size()):
            raise UserError(
                f"checkpoint {path} is of another model: {name!r} has shape {list(stored[name].size)} there, "
                f"{list(tensor.size())} here"
            )
        if sum(prod(chunk.sizes) for chunk in stored[name].chunks) != prod(stored[name].size):
            raise UserError(f"checkpoint {path} cannot be read: it holds {name!r} only in part, or twice")
    with quiet(), _reading(path):
        dcp.load(dict(into), storage_reader=reader, no_dist=no_dist)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever safetensors and torch raise for what they did not expect
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"checkpoint {path} cannot be read: {text}") from None


def _prime(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Makes the optimiser create its state, so that there is something to load into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()
        group["lr"] = 0.0
    optimizer.step()
    for values in optimizer.state.values():
        if "step" in values:
            values["step"].fill_(step)


@contextmanager
def quiet() -> Iterator[None]:
    # DCP remarks on single-process use and on its own deprecations at every call.
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
