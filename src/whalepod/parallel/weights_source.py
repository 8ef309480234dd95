"""A checkpoint folder held against what a model of its config must have, and read as that.

Every departure is one line that names the tensor, and nothing is allocated before all is checked.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whalepod.parallel.weights_files import DTYPES, Checkpoint, Region, open_checkpoint
from whalepod.parallel.weights_names import (
    SCALE_SUFFIX,
    Slot,
    is_ignorable,
    mtp_prefixes,
    optional_slots,
    slots,
)
from whalepod.precision.fp8 import FP8, dequantize_blocks, scale_shape
from whalepod.precision.storage import Form, quantize_weight
from whalepod.spec.errors import UserError
from whalepod.spec.model import ModelSpec, read_config, shown

_COMPARE_BYTES = 16 * 2**20
_MANY = 1000


@dataclass(frozen=True)
class Source:
    """A folder's tensors and its config."""

    files: Checkpoint
    spec: ModelSpec

    def dtype(self, slot: Slot) -> torch.dtype:
        return DTYPES[self.files.entries[slot.hf].dtype]

    def read(self, slot: Slot) -> tuple[Tensor, Tensor | None]:
        """A whole tensor as stored; with its scales if it is FP8."""
        values = self.files.read(slot.hf)
        return values, self.files.read(slot.hf + SCALE_SUFFIX) if values.dtype == FP8 else None

    def read_part(self, slot: Slot, region: Region, dtype: torch.dtype) -> Tensor:
        """A part of a tensor as numbers: FP8 comes dequantised to `dtype`, anything else as stored."""
        if self.dtype(slot) != FP8:
            return self.files.read(slot.hf, region)
        assert self.spec.quantization is not None
        block = self.spec.quantization.weight_block_size
        # Whole blocks around the part, so that values and scales begin together; then the part of these.
        first = [s.start // b for s, b in zip(region, block, strict=True)]
        last = [-(-s.stop // b) for s, b in zip(region, block, strict=True)]
        sizes = zip(first, last, block, slot.shape, strict=True)
        values = self.files.read(slot.hf, tuple(slice(f * b, min(e * b, n)) for f, e, b, n in sizes))
        scale = self.files.read(slot.hf + SCALE_SUFFIX, tuple(map(slice, first, last)))
        inner = (slice(s.start - f * b, s.stop - f * b) for s, f, b in zip(region, first, block, strict=True))
        return dequantize_blocks(values, scale, dtype, block)[tuple(inner)]

    def check_copy(self, slot: Slot, region: Region) -> None:
        """Raises UserError unless `slot`, a copy, equals its original within `region`, bit for bit."""
        assert slot.copy_of is not None
        rows = region[0]
        step = max(1, _COMPARE_BYTES // (4 * slot.shape[1]))
        for start in range(rows.start, rows.stop, step):
            part = (slice(start, min(start + step, rows.stop)), *region[1:])
            copy, original = self.files.read(slot.hf, part), self.files.read(slot.copy_of, part)
            same = copy.dtype == original.dtype
            if not same or not torch.equal(copy.view(torch.uint8), original.view(torch.uint8)):
                file = self.files.entries[slot.hf].file
                raise UserError(f"{file}: tensor {slot.hf!r} must equal {slot.copy_of!r}, which it repeats")

    def check(self, spec: ModelSpec, ignore_mtp: bool = False) -> list[Slot]:
        """The tensors that a model of `spec` takes from here. Raises UserError if they are not just so."""
        entries = self.files.entries
        found: list[Slot] = []
        missing: list[str] = []
        for slot in slots(spec):
            if slot.hf in entries:
                self._check_tensor(slot)
                found.append(slot)
            else:
                missing.append(slot.hf)
                # The table of a hostile config has no end; what is found is bounded by the files.
                if len(missing) > _MANY:
                    break
        for slot in optional_slots(spec):
            if slot.hf in entries:
                self._check_tensor(slot)
                found.append(slot)
        known = {slot.hf for slot in found}
        known |= {slot.hf + SCALE_SUFFIX for slot in found if self.dtype(slot) == FP8}
        extra = [name for name in entries if name not in known and not is_ignorable(name)]
        if missing:
            raise UserError(self._missing(spec, missing, extra))
        dropped = mtp_prefixes(self.spec)[spec.num_nextn_predict_layers :]
        mtp = [name for name in extra if name.startswith(dropped)]
        if mtp and not ignore_mtp:
            raise UserError(
                f"{self.files.folder} has multi-token prediction ({shown(mtp[0])}) and the model has none: "
                "pass ignore_mtp=True to leave it out"
            )
        extra = [name for name in extra if not name.startswith(dropped)]
        if extra:
            others = f" (and {len(extra) - 1} more)" if len(extra) > 1 else _closest(extra[0], known)
            file = entries[extra[0]].file
            raise UserError(f"{file} holds tensor {shown(extra[0])}, which this model does not have{others}")
        return found

    def _check_tensor(self, slot: Slot) -> None:
        entry, quantization = self.files.entries[slot.hf], self.spec.quantization
        where = f"{entry.file}: tensor {shown(slot.hf)}"
        if entry.shape != slot.shape:
            raise UserError(f"{where} has shape {list(entry.shape)}, config.json asks for {list(slot.shape)}")
        if entry.dtype not in DTYPES:
            raise UserError(f"{where} is of type {shown(entry.dtype)} (allowed: {', '.join(DTYPES)})")
        if entry.dtype != "F8_E4M3":
            if slot.quantised and quantization is not None:
                raise UserError(f"{where} is {entry.dtype}, but quantization_config asks for F8_E4M3")
            return
        if quantization is None:
            raise UserError(f"{where} is F8_E4M3, but config.json has no quantization_config")
        if not slot.quantised:
            raise UserError(f"{where} is F8_E4M3, but only weights of linear layers and experts may be")
        scale = self.files.entries.get(slot.hf + SCALE_SUFFIX)
        if scale is None:
            raise UserError(f"{where} is FP8, but its scales {slot.hf + SCALE_SUFFIX!r} are missing")
        shape = scale_shape(slot.shape, quantization.weight_block_size)
        if scale.shape != shape or scale.dtype != "F32":
            raise UserError(
                f"{scale.file}: scales {slot.hf + SCALE_SUFFIX!r} have shape {list(scale.shape)} in "
                f"{shown(scale.dtype)}, not {list(shape)} in F32"
            )

    def _missing(self, spec: ModelSpec, missing: list[str], extra: list[str]) -> str:
        count = f"more than {_MANY - 1}" if len(missing) > _MANY else str(len(missing) - 1)
        others = f" (and {count} more)" if len(missing) > 1 else _closest(missing[0], extra)
        advice = ""
        if all(name.startswith(mtp_prefixes(spec)) for name in missing):
            advice = "; if it was saved without multi-token prediction, pass ignore_mtp=True"
        return f"tensor {missing[0]!r} is missing from {self.files.folder}{others}{advice}"


def open_source(folder: Path | str) -> Source:
    """The folder's headers and config, each checked by itself; `Source.check` holds them together.

    A folder without a single tensor of multi-token prediction has no such layers, whatever its config
    says: transformers keeps the config's count and leaves the weights out when it saves.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder with a checkpoint")
    files, spec = open_checkpoint(folder), read_config(folder)
    if not any(name.startswith(mtp_prefixes(spec)) for name in files.entries):
        spec = spec.with_(num_nextn_predict_layers=0)
    return Source(files, spec)


def _closest(name: str, choices: Iterable[str]) -> str:
    """A hint at the likeliest of `choices`, which may be many: only those of the same layer are compared."""
    alike = [c for c in choices if len(c) < 200 and c.split(".")[:3] == name.split(".")[:3]][:_MANY]
    close = difflib.get_close_matches(name[:200], alike, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def quantised(slot: Slot, values: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Values and scales of a tensor. Raises UserError naming it."""
    try:
        return quantize_weight(values, form)
    except UserError as error:
        raise UserError(f"tensor {slot.hf!r}: {error}") from None
