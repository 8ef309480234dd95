"""Hugging Face folders from runs, and from each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

from torch import Tensor

from whalepod.parallel.trained import Adapters, is_run, read_adapters, read_model
from whalepod.parallel.weights import Format, convert_hf, save_weights
from whalepod.parallel.weights_files import copy_companions, write_adapter
from whalepod.spec.errors import UserError, nearest
from whalepod.spec.model import read_config


def export(
    src: Path, dst: Path, to: str = "keep", progress: Callable[[int, int], None] | None = None
) -> None:
    """Writes `dst`, a Hugging Face folder, from a run's newest checkpoint or another such folder.

    to: `bf16`, `fp32`, `fp8` (blocks with scales), or `keep`: BF16 for a run, unchanged otherwise; adapters
    are merged. `lora`: a run's adapters alone, in PEFT's form.
    """
    formats = (*get_args(Format), "lora")
    if to not in formats:
        raise UserError(f"unknown format {to!r}{nearest(to, formats)}")
    if not src.is_dir():
        raise UserError(f"no folder {str(src)!r}: give a run's folder or a Hugging Face checkpoint")
    if src.resolve() == dst.resolve():
        raise UserError("source and destination are the same folder")
    if to == "lora":
        adapters = read_adapters(src, read_config(src)) if is_run(src) else None
        if adapters is None:
            raise UserError(f"no adapters in {str(src)!r}: give the folder of a run with lora.r above 0")
        write_adapter(dst, _peft_config(adapters), _peft_tensors(adapters))
        return
    if not is_run(src):
        convert_hf(src, dst, cast(Format, to), progress=progress)
        return
    model = read_model(src, read_config(src))
    save_weights(model, dst, cast(Format, "bf16" if to == "keep" else to), progress=progress)
    copy_companions(src, dst)


def _peft_config(adapters: Adapters) -> dict[str, Any]:
    """`adapter_config.json` as PEFT reads it. Layers are named with what they are in, so that routed experts,
    whose matrices have the names of a dense layer's, are not meant."""
    targets = {".".join(path.split(".")[-2:]) for path in adapters.by_path}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapters.base,
        "r": adapters.config.r,
        "lora_alpha": adapters.config.alpha,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _peft_tensors(adapters: Adapters) -> dict[str, Tensor]:
    tensors = {}
    for path, (a, b) in adapters.by_path.items():
        tensors[f"base_model.model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.model.{path}.lora_B.weight"] = b
    return tensors
