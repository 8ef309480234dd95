"""Hugging Face folders from runs, and from each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast, get_args

from whalepod.parallel import checkpoint
from whalepod.parallel.weights import Format, convert_hf, save_weights
from whalepod.parallel.weights_files import copy_companions
from whalepod.spec.errors import UserError, nearest
from whalepod.spec.model import read_config


def export(
    src: Path, dst: Path, to: str = "keep", progress: Callable[[int, int], None] | None = None
) -> None:
    """Writes `dst`, a Hugging Face folder, from a run's newest checkpoint or another such folder.

    to: `bf16`, `fp32`, `fp8` (blocks with scales), or `keep`: BF16 for a run, unchanged otherwise.
    """
    formats = get_args(Format)
    if to not in formats:
        raise UserError(f"unknown format {to!r}{nearest(to, formats)}")
    if not src.is_dir():
        raise UserError(f"no folder {str(src)!r}: give a run's folder or a Hugging Face checkpoint")
    if src.resolve() == dst.resolve():
        raise UserError("source and destination are the same folder")
    if not checkpoint.is_run(src):
        convert_hf(src, dst, cast(Format, to), progress=progress)
        return
    model = checkpoint.read_model(src, read_config(src))
    save_weights(model, dst, cast(Format, "bf16" if to == "keep" else to), progress=progress)
    copy_companions(src, dst)
