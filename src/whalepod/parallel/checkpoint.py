"""Checkpoints: torch's distributed checkpoint in safetensors files, resumable under another layout.

A checkpoint is a folder `step_00000100` holding every rank's shards (weights in FP32, moments,
selection biases) and `state.json`. It is written under a temporary name and renamed when whole, so
a crash at any moment leaves the previous one. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from whalepod.models.moe import routers
from whalepod.models.transformer import Transformer
from whalepod.parallel.comm import Axis
from whalepod.parallel.data import TrainingState
from whalepod.spec.errors import UserError
from whalepod.spec.model import ModelSpec

_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: everything that is not a tensor."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def steps_saved(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    names = (_NAME.fullmatch(p.name) for p in folder.iterdir() if (p / "state.json").is_file())
    return sorted(int(match.group(1)) for match in names if match)


def tensors(model: nn.Module, state: TrainingState, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a training state by name; loading fills them in place."""
    result = {f"model/{name}": value for name, value in state.weights().items()}
    result |= {f"model/{name}": value for name, value in saved_buffers(model).items()}
    return result | {f"optimizer/{name}": value for name, value in state.moments(optimizer).items()}


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a checkpoint: the selection biases."""
    persistent = set(model.state_dict())
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def save(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    state: TrainingState,
    optimizer: torch.optim.Optimizer,
    data: Axis,
    keep: int,
) -> Path:
    """Writes a checkpoint from all ranks, then removes all but the newest `keep`. Returns its path."""
    final = path_of(folder, progress.step)
    unfinished = final.with_suffix(".unfinished")
    if data.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    data.barrier()
    writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
    with _quiet():
        dcp.save(tensors(model, state, optimizer), storage_writer=writer, no_dist=data.size == 1)
    if data.rank == 0:
        (unfinished / "state.json").write_text(json.dumps(asdict(progress)))
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        for step in steps_saved(folder)[:-keep]:
            shutil.rmtree(path_of(folder, step))
    data.barrier()
    return final


def load(
    path: Path,
    model: nn.Module,
    state: TrainingState,
    optimizer: torch.optim.Optimizer,
    data: Axis,
) -> Progress:
    """Fills a training state from a checkpoint written under any data-parallel layout."""
    progress = read_progress(path)
    _prime(optimizer, progress.step)
    read_tensors(path, tensors(model, state, optimizer), no_dist=data.size == 1)
    state.write_back()
    return progress


def read_progress(path: Path) -> Progress:
    try:
        values = json.loads((path / "state.json").read_text())
        return Progress(int(values["step"]), int(values["tokens"]), float(values["seconds"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path} has no readable state.json: {error}") from None


def read_tensors(path: Path, into: dict[str, Tensor], no_dist: bool = True) -> None:
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
        if tuple(stored[name].size) != tuple(tensor.shape):
            raise UserError(
                f"checkpoint {path} is of another model: {name!r} has shape {list(stored[name].size)} there, "
                f"{list(tensor.shape)} here"
            )
    with _quiet():
        dcp.load(into, storage_reader=reader, no_dist=no_dist)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, rather than a Hugging Face checkpoint."""
    return (folder / "run.yaml").is_file()


def read_model(folder: Path, spec: ModelSpec) -> Transformer:
    """The model of a run's newest checkpoint: FP32 on the CPU, without optimiser state."""
    saved = steps_saved(folder / "checkpoints")
    if not saved:
        raise UserError(f"the run in {folder} has no checkpoint yet")
    with torch.device("meta"):
        model = Transformer(spec)
    model.to_empty(device="cpu")
    for router in routers(model):
        router.load.zero_()
    wanted = dict(model.named_parameters()) | saved_buffers(model)
    path = path_of(folder / "checkpoints", saved[-1])
    read_tensors(path, {f"model/{name}": tensor.detach() for name, tensor in wanted.items()})
    return model


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
