"""The model that a run's folder holds: its newest checkpoint, with adapters merged into what they adapt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whalepod.models.lora import A, B, add_adapters, is_adapter
from whalepod.models.moe import routers
from whalepod.models.transformer import Transformer
from whalepod.parallel.checkpoint import path_of, read_tensors, saved_buffers, steps_saved
from whalepod.parallel.sharding import Box
from whalepod.parallel.weights_initial import StoredWeights
from whalepod.spec.errors import UserError
from whalepod.spec.model import ModelSpec
from whalepod.spec.run import LoRAConfig, load_run


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, rather than a Hugging Face checkpoint."""
    return (folder / "run.yaml").is_file()


class Adapters(NamedTuple):
    """What a run with `lora` trained. by_path: of each layer A [r, in] and B [out, r], FP32."""

    config: LoRAConfig
    base: str
    by_path: dict[str, tuple[Tensor, Tensor]]


def read_adapters(folder: Path, spec: ModelSpec) -> Adapters | None:
    """The adapters of a run's newest checkpoint; None of a run that trained the weights themselves."""
    config = load_run(folder / "run.yaml")
    if not config.lora.r:
        return None
    with torch.device("meta"):
        model = Transformer(spec)
        add_adapters(model, config.lora)
    found = {n: torch.empty(p.shape) for n, p in model.named_parameters() if is_adapter(n)}
    read_tensors(_newest(folder), {f"model/{name}": tensor for name, tensor in found.items()})
    paths = [name.removesuffix(A) for name in found if name.endswith(A)]
    assert config.train.start_from is not None
    return Adapters(config.lora, config.train.start_from, {p: (found[p + A], found[p + B]) for p in paths})


def read_model(folder: Path, spec: ModelSpec) -> Transformer:
    """The model of a run's newest checkpoint: FP32 on the CPU, without optimiser state."""
    path = _newest(folder)
    with torch.device("meta"):
        model = Transformer(spec)
    model.to_empty(device="cpu")
    for router in routers(model):
        router.load.zero_()
    adapters = read_adapters(folder, spec)
    wanted = dict(model.named_parameters()) | saved_buffers(model)
    if adapters is None:
        read_tensors(path, {f"model/{name}": tensor.detach() for name, tensor in wanted.items()})
        return model
    stored = StoredWeights(adapters.base, spec)
    with torch.no_grad():
        for name, tensor in wanted.items():
            shape = tuple(tensor.shape)
            tensor.copy_(stored(name, Box(shape, (0,) * len(shape), shape)))
        for layer, (a, b) in adapters.by_path.items():
            weight: Any = model.get_submodule(layer).weight
            weight.addmm_(b, a, alpha=adapters.config.alpha / adapters.config.r)
    return model


def _newest(folder: Path) -> Path:
    saved = steps_saved(folder / "checkpoints")
    if not saved:
        raise UserError(f"the run in {folder} has no checkpoint yet")
    return path_of(folder / "checkpoints", saved[-1])
