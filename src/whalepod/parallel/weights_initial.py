"""Training that starts from a Hugging Face folder: each rank's first values, read part by part."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from whalepod.parallel.sharding import Box
from whalepod.parallel.weights_names import Slot
from whalepod.parallel.weights_source import open_source
from whalepod.spec.model import ModelSpec


class StoredWeights:
    """The weights of a folder as `parallelize` asks for first values: FP32, FP8 dequantised, and of each
    tensor only the part that a rank holds.

    Layers of multi-token prediction that the model lacks are left out. Raises UserError, before anything is
    read, naming the tensor and file that are wrong.
    """

    def __init__(self, folder: Path | str, spec: ModelSpec) -> None:
        self._source = open_source(folder)
        self._slots: dict[str, list[Slot]] = {}
        for slot in self._source.check(spec, ignore_mtp=spec.num_nextn_predict_layers == 0):
            if slot.copy_of is None:
                self._slots.setdefault(slot.ours, []).append(slot)

    def __call__(self, name: str, box: Box) -> Tensor:
        out = torch.empty(box.shape)
        for slot in self._slots[name] if out.numel() else ():
            leading = len(slot.index)
            begins, sizes = box.offset[:leading], box.shape[:leading]
            place = tuple(i - begin for i, begin in zip(slot.index, begins, strict=True))
            if all(0 <= p < n for p, n in zip(place, sizes, strict=True)):
                out[place].copy_(self._source.read_part(slot, box.slices[leading:], torch.float32))
        return out
