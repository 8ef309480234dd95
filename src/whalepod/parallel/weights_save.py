"""Models into checkpoint folders, and folders into folders of another format, streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from whalepod.models.transformer import Transformer
from whalepod.parallel.comm import from_first_rank
from whalepod.parallel.weights_files import Planned, Progress, write_checkpoint
from whalepod.parallel.weights_load import storage_of, tensors_of
from whalepod.parallel.weights_names import SCALE_SUFFIX, Slot, slots
from whalepod.parallel.weights_source import open_source, quantised
from whalepod.precision.fp8 import FP8, dequantize_blocks, scale_shape
from whalepod.precision.storage import Int8, storage_names
from whalepod.spec.errors import UserError, nearest
from whalepod.spec.model import BlockFP8, to_config

Format = Literal["bf16", "fp32", "fp8", "keep"]

_FORMATS: dict[str, torch.dtype | None] = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8": torch.bfloat16,  # of what is not quantised
    "keep": None,
}
_SHARD_BYTES = 2 * 2**30


def save_weights(
    model: Transformer,
    folder: Path | str,
    format: Format = "keep",
    max_shard_bytes: int = _SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes a model as a Hugging Face folder: safetensors, index when there are several, config.json.

    `format`: "bf16" or "fp32" for all parameters; "fp8" for block-scaled FP8 with the rest in BF16; "keep"
    as the model holds them. FP8 storage is written to FP8 as it is. The selection bias is float32 always.
    The folder appears when all is on the disk; a checkpoint that was there is replaced then.

    A sharded model (DTensor) is gathered parameter by parameter: all ranks call this, rank 0 writes. Of a
    model that is not sharded the caller writes.
    Raises UserError, on all ranks, if the folder must not be overwritten or cannot be written.
    """
    _check_format(format)
    spec, targets = model.spec, tensors_of(model)
    stored = storage_of(model)
    if isinstance(stored, Int8):
        raise UserError("weights in INT8 are for serving only: load the model in another type to save it")
    if format == "fp8":
        quantization = stored or spec.quantization or BlockFP8()
    else:
        quantization = stored if format == "keep" else None

    def dtype_now(slot: Slot) -> torch.dtype:
        if slot.float32:
            return torch.float32
        return FP8 if storage_names(slot.ours)[0] in targets else targets[slot.ours].dtype

    target = _Target(quantization, _FORMATS[format], stored)
    wanted = list(slots(spec))
    if format == "keep" and stored is not None:
        plain = [slot.hf for slot in wanted if slot.quantised and dtype_now(slot) != FP8]
        if plain:
            raise UserError(f"only some weights are FP8 ({plain[0]!r} is not): choose a format, not 'keep'")
    config = to_config(spec.with_(quantization=quantization))
    config["torch_dtype"] = _dtype_name(target.dtype or targets["embed_tokens.weight"].dtype)
    gathered = _gathered(targets, wanted)

    def write() -> None:
        plan, tensors = target.plan(wanted, dtype_now), target.encode(gathered)
        size = max_shard_bytes
        write_checkpoint(folder, config, plan, tensors, max_shard_bytes=size, progress=progress)

    if not any(isinstance(t, DTensor) for t in targets.values()):
        write()
        return
    failed: Exception | None = None
    if dist.get_rank() == 0:
        try:
            write()
        except Exception as error:  # to be raised when the other ranks are through
            failed = error
    for _ in gathered:  # a rank that does not write, or no longer does, takes part in every gather still
        pass
    message = from_first_rank(None if failed is None else str(failed))
    if failed is not None:
        raise failed
    if message is not None:
        raise UserError(message)


def convert_hf(
    src: Path | str,
    dst: Path | str,
    format: Format = "keep",
    max_shard_bytes: int = _SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Rewrites a Hugging Face folder in another format (as in `save_weights`) or with shards of another size.

    The model is never built: memory is a shard and a few tensors. Tokenizer, generation config and chat
    template come along, and the config keeps every field but type and quantisation. `dst` may be `src`.
    Raises UserError as `load_weights` and `save_weights` do.
    """
    _check_format(format)
    source = open_source(src)
    found = source.check(source.spec)
    stored = source.spec.quantization
    quantization = (stored or BlockFP8()) if format == "fp8" else stored if format == "keep" else None
    target = _Target(quantization, _FORMATS[format], stored)
    config: dict[str, Any] = json.loads((Path(src) / "config.json").read_text(encoding="utf-8"))
    if target.dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = _dtype_name(target.dtype)
    if quantization is None:
        config.pop("quantization_config", None)
    elif stored is None:
        config["quantization_config"] = to_config(source.spec.with_(quantization=quantization))[
            "quantization_config"
        ]

    def items() -> Iterator[_Item]:
        for slot in found:
            if slot.copy_of is not None:
                source.check_copy(slot, tuple(slice(0, n) for n in slot.shape))
            # Copies: a shard's small tensors would keep all that was read with them mapped.
            values, scale = source.read(slot)
            yield slot, values.clone(), None if scale is None else scale.clone()

    write_checkpoint(
        dst,
        config,
        target.plan(found, source.dtype),
        target.encode(items()),
        max_shard_bytes=max_shard_bytes,
        companions=Path(src),
        progress=progress,
    )


_Item = tuple[Slot, Tensor, Tensor | None]
"""A tensor on its way out: values, and scales if they are FP8."""


@dataclass(frozen=True)
class _Target:
    """The form in which tensors are written: FP8 blocks for what is quantised, `dtype` (None: as is) else."""

    quantization: BlockFP8 | None
    dtype: torch.dtype | None
    stored: BlockFP8 | None  # the blocks of FP8 values that come in

    def plan(self, wanted: Iterable[Slot], dtype_now: Callable[[Slot], torch.dtype]) -> list[Planned]:
        """Names, shapes and types of what `encode` yields, before any of it exists."""
        planned = []
        for slot in wanted:
            if slot.quantised and self.quantization is not None:
                scales = scale_shape(slot.shape, self.quantization.weight_block_size)
                planned.append(Planned(slot.hf, slot.shape, FP8))
                planned.append(Planned(slot.hf + SCALE_SUFFIX, scales, torch.float32))
            else:
                planned.append(Planned(slot.hf, slot.shape, self._plain(slot, dtype_now(slot))))
        return planned

    def encode(self, items: Iterable[_Item]) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors as they are to be written."""
        for slot, values, scale in items:
            if slot.quantised and self.quantization is not None:
                pair = (values, scale) if scale is not None else quantised(slot, values, self.quantization)
                yield slot.hf, pair[0]
                yield slot.hf + SCALE_SUFFIX, pair[1]
                continue
            dtype = self._plain(slot, values.dtype)
            if scale is None:
                yield slot.hf, values.to(dtype)
            else:
                assert self.stored is not None
                yield slot.hf, dequantize_blocks(values, scale, dtype, self.stored.weight_block_size)

    def _plain(self, slot: Slot, now: torch.dtype) -> torch.dtype:
        if self.dtype is None:
            return now
        return torch.float32 if slot.float32 else self.dtype


def _gathered(targets: dict[str, Tensor], wanted: Iterable[Slot]) -> Iterator[_Item]:
    """The whole model on the CPU, tensor by tensor, each parameter gathered when its turn comes.

    Nothing in here fails on one rank alone, so that all ranks can go through all of it.
    """
    for ours, group in groupby(wanted, key=lambda slot: slot.ours):
        fp8 = storage_names(ours)
        full = [_full(targets[name]) for name in (fp8 if fp8[0] in targets else (ours,))]
        for slot in group:
            parts = [t[slot.index].cpu() for t in full]
            # safetensors refuses tensors that share memory.
            values = parts[0].clone() if slot.copy_of is not None else parts[0]
            values = values.float() if slot.float32 else values
            yield slot, values, parts[1] if len(parts) > 1 else None


def _full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    # gloo has no float8.
    sent: Any = tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor
    return sent.full_tensor().view(tensor.dtype)


def _check_format(format: str) -> None:
    if format not in _FORMATS:
        raise UserError(f"unknown weight format {format!r}{nearest(format, _FORMATS)}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
