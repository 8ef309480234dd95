"""The model that a run's folder holds: its newest checkpoint, with adapters merged into what they adapt."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from whalepod.models.lora import A, B, add_adapters, is_adapter
from whalepod.models.moe import routers
from whalepod.models.transformer import Transformer
from whalepod.parallel.checkpoint import Part, read_tensors, saved_buffers
from whalepod.parallel.checkpoint_files import newest_whole
from whalepod.parallel.comm import Axis
from whalepod.parallel.sharding import Box
from whalepod.parallel.state import Piece
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

    @property
    def scale(self) -> float:
        return self.config.alpha / self.config.r


def read_adapters(folder: Path, spec: ModelSpec) -> Adapters | None:
    """The adapters of a run's newest checkpoint; None of a run that trained the weights themselves."""
    config = load_run(folder / "run.yaml")
    if not config.lora.r:
        return None
    if config.train.start_from is None:
        raise UserError(f"{folder / 'run.yaml'}: lora adapts weights, and train.start_from names none")
    with torch.device("meta"):
        model = Transformer(spec)
        add_adapters(model, config.lora)
    try:
        found = {n: torch.empty(p.shape) for n, p in model.named_parameters() if is_adapter(n)}
    except RuntimeError:  # no more is said of memory
        raise UserError(
            f"{folder / 'run.yaml'}: lora.r {config.lora.r} takes more memory than there is"
        ) from None
    read_tensors(_newest(folder), {f"model/{name}": tensor for name, tensor in found.items()})
    paths = [name.removesuffix(A) for name in found if name.endswith(A)]
    return Adapters(config.lora, config.train.start_from, {p: (found[p + A], found[p + B]) for p in paths})


class Trained:
    """A run's weights and biases as `spread` asks for them: of each what a rank holds, FP32, with adapters
    added. Raises UserError where there is none."""

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self._checkpoint, self._adapters = _newest(folder), read_adapters(folder, spec)
        self._base = None if self._adapters is None else StoredWeights(self._adapters.base, spec)

    def __call__(self, name: str, box: Box) -> Tensor:
        if self._base is None or self._adapters is None:
            out = torch.zeros(box.shape)
            if out.numel():
                read_tensors(self._checkpoint, {f"model/{name}": Part(Piece(out, box))})
            return out
        out = self._base(name, box)
        pair = self._adapters.by_path.get(name.removesuffix(".weight"))
        if pair is not None:
            rows, columns = box.slices
            out.addmm_(pair[1][rows], pair[0][:, columns], alpha=self._adapters.scale)
        return out


def read_model(folder: Path, spec: ModelSpec) -> Transformer:
    """The model of a run's newest checkpoint: FP32 on the CPU, without optimiser state."""
    trained = Trained(folder, spec)
    with torch.device("meta"):
        model = Transformer(spec)
    model.to_empty(device="cpu")
    for router in routers(model):
        router.load.zero_()
    with torch.no_grad():
        for name, tensor in (dict(model.named_parameters()) | saved_buffers(model)).items():
            shape = tuple(tensor.shape)
            tensor.copy_(trained(name, Box(shape, (0,) * len(shape), shape)))
    return model


def _newest(folder: Path) -> Path:
    path = newest_whole(folder / "checkpoints", Axis("alone"))
    if path is None:
        raise UserError(f"the run in {folder} has no checkpoint yet")
    return path
