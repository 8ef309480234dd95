"""Checkpoint folders into models: whole, sharded or a stage; BF16, FP32 or FP8 storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from whalepod.models.transformer import Transformer
from whalepod.parallel.weights_files import Progress, Region
from whalepod.parallel.weights_names import SCALE_SUFFIX, Slot
from whalepod.parallel.weights_source import Source, open_source, quantised
from whalepod.precision.fp8 import FP8
from whalepod.precision.storage import Form, FP8Storage, Int8, storage_names, use_fp8_storage
from whalepod.spec.errors import UserError
from whalepod.spec.model import BlockFP8, shown


def build_model(
    folder: Path | str,
    dtype: torch.dtype | Literal["keep", "fp8", "int8"] = torch.bfloat16,
    device: torch.device | str = "cpu",
    *,
    ignore_mtp: bool = False,
    progress: Progress | None = None,
) -> Transformer:
    """The model of a Hugging Face folder, in evaluation mode.

    `dtype`: of all parameters, FP8 ones dequantised; "keep" leaves every parameter in its stored type and
    FP8 weights in FP8 storage; "fp8" and "int8": BF16, but the weights that DeepSeek quantises in one byte,
    the blocks of an FP8 folder bit for bit. `ignore_mtp`: leave out the layers of multi-token prediction.
    Raises UserError, before anything is allocated, naming the tensor and file that are wrong.
    """
    if dtype not in ("keep", "fp8", "int8", torch.bfloat16, torch.float32):
        allowed = "torch.bfloat16, torch.float32, 'keep', 'fp8' or 'int8'"
        raise UserError(f"a model is built in {allowed}, not {shown(dtype)}")
    source = open_source(folder)
    spec = source.spec.with_(num_nextn_predict_layers=0) if ignore_mtp else source.spec
    found = source.check(spec, ignore_mtp)
    with torch.device("meta"):
        model = Transformer(spec)
    types: dict[str, torch.dtype] = {}
    if dtype == "keep":
        for slot in found:
            stored = source.dtype(slot)
            types[slot.ours] = torch.promote_types(types.get(slot.ours, stored), stored)
        if spec.quantization is not None:
            use_fp8_storage(model, spec.quantization, compute_dtype=types["embed_tokens.weight"])
    elif isinstance(dtype, str):
        use_fp8_storage(model, Int8() if dtype == "int8" else spec.quantization)
        dtype = torch.bfloat16
    _materialise(model, device, types.__getitem__ if isinstance(dtype, str) else lambda _: dtype)
    _fill(model, source, found, progress)
    return model.eval()


def load_weights(
    model: Transformer,
    folder: Path | str,
    progress: Progress | None = None,
    *,
    ignore_mtp: bool = False,
) -> None:
    """Fills a materialised model, on one device or sharded (DTensor), from a Hugging Face folder, in place.

    Each rank reads what it holds. FP8 weights are dequantised into ordinary parameters and copied as they
    are into FP8 storage. A part of a model (a pipeline stage) takes what it has. No collective is called.
    `ignore_mtp`: the folder may hold layers of multi-token prediction that the model lacks.
    Raises UserError, before anything is written, naming the tensor and file that are wrong.
    """
    source = open_source(folder)
    _fill(model, source, source.check(model.spec, ignore_mtp), progress)


def _materialise(
    model: nn.Module, device: torch.device | str, dtype_of: Callable[[str], torch.dtype]
) -> None:
    """Memory for a model on the meta device; what was shared stays shared. Buffers are float32 zeros."""
    made: dict[int, nn.Parameter] = {}
    old = list(model.parameters())  # alive until the end, or their ids could come again
    for path, module in model.named_modules():
        weights = module.stored if isinstance(module, FP8Storage) else ()
        stored = {name for weight in weights for name in storage_names(weight)}
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in made:
                dtype = p.dtype if name in stored else dtype_of(f"{path}.{name}".lstrip("."))
                empty = torch.empty(p.shape, dtype=dtype, device=device)
                made[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
            module._parameters[name] = made[id(p)]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.zeros(b.shape, device=device)
    del old


@torch.no_grad()
def _fill(model: nn.Module, source: Source, found: Sequence[Slot], progress: Progress | None) -> None:
    targets, stored = tensors_of(model), storage_of(model)
    left = {id(t) for t in targets.values()}
    total = sum(source.files.entries[slot.hf].num_bytes for slot in found)
    done = 0
    for slot in found:
        fp8 = storage_names(slot.ours)
        if fp8[0] in targets:
            assert stored is not None
            _fill_storage([targets[name] for name in fp8], source, slot, stored)
            left -= {id(targets[name]) for name in fp8}
        elif slot.ours in targets:
            target = targets[slot.ours]
            part = _local_part(target, slot.index)
            if part is not None and slot.copy_of is not None:
                source.check_copy(slot, part[1])
            elif part is not None:
                part[0].copy_(source.read_part(slot, part[1], part[0].dtype))
            left.discard(id(target))
        done += source.files.entries[slot.hf].num_bytes
        if progress is not None:
            progress(done, total)
    unknown = [name for name, t in targets.items() if id(t) in left]
    assert not unknown, f"no tensor of the checkpoint is for {unknown[0]}"


def _fill_storage(pair: Sequence[Tensor], source: Source, slot: Slot, stored: Form) -> None:
    """Values and scales of a weight in one byte: as they are in a folder of the same form, else quantised."""
    parts = [_local_part(tensor, slot.index) for tensor in pair]
    raw = source.dtype(slot) == FP8 and isinstance(stored, BlockFP8)
    if raw:
        quantization = source.spec.quantization
        assert quantization is not None
        assert quantization.weight_block_size == stored.weight_block_size, "blocks of another size"
        whole: Sequence[Tensor] = ()
    else:
        # Scales are of whole blocks: every rank quantises the whole matrix and keeps its part.
        everything = tuple(slice(0, n) for n in slot.shape)
        values = source.read_part(slot, everything, torch.float32) if any(parts) else None
        whole = () if values is None else quantised(slot, values, stored)
    for i, part in enumerate(parts):
        if part is not None:
            name = slot.hf + (SCALE_SUFFIX if i else "")
            part[0].copy_(source.files.read(name, part[1]) if raw else whole[i][part[1]])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that belong in checkpoints, by our names."""
    return {n.replace("_orig_mod.", ""): t for n, t in model.state_dict(keep_vars=True).items()}


def storage_of(model: nn.Module) -> Form | None:
    """The form of a model's weights of one byte; None if it has none."""
    forms = {m.quantization for m in model.modules() if isinstance(m, FP8Storage)}
    assert len(forms) < 2, "one model, one form"
    return next(iter(forms), None)


def _local_part(tensor: Tensor, index: tuple[int, ...]) -> tuple[Tensor, Region] | None:
    """What this rank holds of `tensor[index]`, as a view, and where in it that lies; None if nothing."""
    local, offset = tensor.detach(), (0,) * tensor.dim()
    if isinstance(local, DTensor):
        mesh, placements = local.device_mesh, local.placements
        shape, offset = compute_local_shape_and_global_offset(local.shape, mesh, placements)
        local = local.to_local()
        assert tuple(local.shape) == tuple(shape)
    if local.numel() == 0:
        return None
    for position, start in zip(index, offset, strict=False):
        if not start <= position < start + local.shape[0]:
            return None
        local = local[position - start]
    rest = offset[len(index) :]
    return local, tuple(slice(o, o + n) for o, n in zip(rest, local.shape, strict=True))
