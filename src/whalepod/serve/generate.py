"""Text from a model: load a run's or a Hugging Face folder, prefill, decode, stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whalepod.models.transformer import Transformer
from whalepod.parallel import trained
from whalepod.parallel.inference import whole
from whalepod.parallel.mesh import make_mesh
from whalepod.parallel.weights import build_model
from whalepod.precision.storage import Int8, use_fp8_storage
from whalepod.serve import native
from whalepod.serve.core import PAGE_SIZE, CoreConfig
from whalepod.serve.engine import Engine
from whalepod.serve.fleet import Fleet
from whalepod.serve.paged import multiplies_bf16
from whalepod.serve.request import Request, Sampling
from whalepod.spec.counts import weight_bytes
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.machine import main_memory
from whalepod.spec.model import BlockFP8, ModelSpec, read_config
from whalepod.text.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16, "int8": torch.bfloat16}
"""Of activations, embedding, router and head, by what is asked for; `FORMS` of all other weights."""
FORMS = {"fp8": BlockFP8(), "int8": Int8()}


@dataclass(frozen=True)
class Generated:
    """A finished generation. Speeds are tokens per second of prefill and of decode."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    cache_bytes_per_token: float


def load_model(path: str | Path, dtype: str = "auto", device: str = "auto") -> tuple[Transformer, Tokenizer]:
    """Model (evaluation mode) and tokenizer of a run's folder or a Hugging Face folder.

    dtype: `bf16`, `fp32`, `fp8` (blocks of 128 x 128, those of an FP8 folder bit for bit), `int8`, or `auto`
    (`usual_dtype`). On a CPU it decodes natively (`native.py`).
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no folder {str(path)!r}: give a run's folder or a Hugging Face checkpoint")
    check_dtype(dtype)
    spec = read_config(path)
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = usual_dtype(spec, kind)
    if trained.is_run(path):
        model = trained.read_model(path, spec).to(kind)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
        if dtype in FORMS:
            use_fp8_storage(model, FORMS[dtype])
    else:
        form: Any = dtype if dtype in FORMS else DTYPES[dtype]
        model = build_model(path, form, kind)
    model.eval().requires_grad_(False)
    if kind == "cpu":
        native.use(model)
    return model, load_tokenizer(path)


def check_dtype(dtype: str) -> None:
    """Raises UserError for one that is not served."""
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype must be auto, {', '.join([*DTYPES][:-1])} or int8, not {dtype!r}")


def usual_dtype(spec: ModelSpec, kind: str) -> str:
    """Of weights on a device of that kind: BF16, but FP32 on CPUs without products in BF16, unless the
    weights would fill more than half of the free memory."""
    if kind != "cpu" or multiplies_bf16() or native.library() is not None:
        return "bf16"
    return "fp32" if 4 * weight_bytes(spec) <= main_memory("MemAvailable") else "bf16"


def generate_ids(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yields up to `max_new_tokens` ids after `prompt`; ends before a stop id.

    Raises UserError for an empty prompt, ids beyond the vocabulary, or more positions than the
    model has.
    """
    model.spec.check_prompt(prompt, max_new_tokens)
    pages = -(-(len(prompt) + max_new_tokens) // PAGE_SIZE)
    alone = whole(model, make_mesh(Layout(), model.embed_tokens.weight.device))
    fleet = Fleet(alone, CoreConfig(pages, max_running=1))
    job = fleet.add(Request(tuple(prompt), max_new_tokens, sampling), stop_ids)
    while not fleet.is_idle:
        for _ in fleet.step():
            yield from (each.token for each in job.picked if each.token not in stop_ids)


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    on_text: Callable[[str], Any] | None = None,
) -> Generated:
    """Continues `prompt`; `on_text` gets each piece of text as soon as it is whole UTF-8."""
    ids = _ids(tokenizer, prompt)
    model.spec.check_prompt(ids, max_new_tokens)
    pages = -(-(len(ids) + max_new_tokens) // PAGE_SIZE)
    alone = whole(model, make_mesh(Layout(), model.embed_tokens.weight.device))
    engine = Engine(Fleet(alone, CoreConfig(pages, max_running=1)), tokenizer)
    try:
        return continued(engine, tokenizer, prompt, max_new_tokens, sampling, on_text)
    finally:
        engine.close()


def continued(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    on_text: Callable[[str], Any] | None = None,
) -> Generated:
    """The same by an engine that is there."""
    ids = _ids(tokenizer, prompt)
    request = Request(tuple(ids), max_new_tokens, sampling or Sampling())
    start = time.perf_counter()
    first, pieces, count = start, [], 0
    for chunk in engine.stream(request):
        if count == 0:
            first = time.perf_counter()
        count = chunk.new_tokens - (chunk.finish_reason == "stop")  # EOS is not written
        pieces.append(chunk.text)
        if chunk.text and on_text is not None:
            on_text(chunk.text)
    end = time.perf_counter()
    return Generated(
        text="".join(pieces),
        prompt_tokens=len(ids),
        new_tokens=count,
        prefill_tokens_per_s=len(ids) / max(first - start, 1e-9),
        decode_tokens_per_s=max(count - 1, 0) / max(end - first, 1e-9),
        cache_bytes_per_token=engine.token_bytes,
    )


def _ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt)
    return [tokenizer.bos_id] if not ids and tokenizer.bos_id is not None else ids
