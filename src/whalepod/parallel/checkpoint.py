"""Checkpoints: torch's distributed checkpoint in safetensors files, resumable under another layout.

A checkpoint is a folder `step_00000100` holding every rank's parts (weights in FP32, moments,
selection biases) and `state.json`. A part is a box of a whole tensor, whichever axes of a layout cut
it out, so any other layout finds its own parts in it. It is written under a temporary name and
renamed when whole, so a crash at any moment leaves the previous one. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from whalepod.parallel.comm import Axis
from whalepod.parallel.parallelize import Parallel
from whalepod.parallel.state import Piece, TrainingState
from whalepod.spec.errors import UserError

_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: everything that is not a tensor."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0  # steps that changed nothing, for NaN or infinite gradients


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def steps_saved(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    names = (_NAME.fullmatch(p.name) for p in folder.iterdir() if (p / "state.json").is_file())
    return sorted(int(match.group(1)) for match in names if match)


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


def save(
    folder: Path,
    progress: Progress,
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    """Writes a checkpoint from all ranks, then removes all but the newest `keep`. Returns its path."""
    world: Axis = parallel.mesh.world
    final = path_of(folder, progress.step)
    unfinished = final.with_suffix(".unfinished")
    if world.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    world.barrier()
    writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
    with _quiet():
        dcp.save(tensors(parallel, optimizer), storage_writer=writer, no_dist=world.size == 1)
    if world.rank == 0:
        (unfinished / "state.json").write_text(json.dumps(asdict(progress)))
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        for step in steps_saved(folder)[:-keep]:
            shutil.rmtree(path_of(folder, step))
    world.barrier()
    return final


def load(path: Path, parallel: Parallel, optimizer: torch.optim.Optimizer) -> Progress:
    """Fills a training state from a checkpoint written under any layout."""
    progress = read_progress(path)
    _prime(optimizer, progress.step - progress.skipped)
    read_tensors(path, tensors(parallel, optimizer), no_dist=parallel.mesh.world.size == 1)
    parallel.state.write_back()
    return progress


def read_progress(path: Path) -> Progress:
    try:
        values = json.loads((path / "state.json").read_text())
        skipped = int(values.get("skipped", 0))
        return Progress(int(values["step"]), int(values["tokens"]), float(values["seconds"]), skipped)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path} has no readable state.json: {error}") from None


def read_tensors(path: Path, into: Mapping[str, Tensor], no_dist: bool = True) -> None:
    """Fills `into` in place from a checkpoint; each rank reads what it holds.

    Raises UserError naming the first tensor that is missing or has another shape.
    """
    reader = HuggingFaceStorageReader(str(path))
    try:
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    except Exception as error:  # safetensors raises its own type for a torn file
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None
    for name, tensor in into.items():
        if name not in stored:
            raise UserError(f"checkpoint {path} is of another model: it has no {name!r}")
        if tuple(stored[name].size) != tuple(tensor.size()):
            raise UserError(
                f"checkpoint {path} is of another model: {name!r} has shape {list(stored[name].size)} there, "
                f"{list(tensor.size())} here"
            )
    with _quiet():
        dcp.load(dict(into), storage_reader=reader, no_dist=no_dist)


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
def _quiet() -> Iterator[None]:
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
