"""The serving model held against published measurements: a table of runs, and single published figures.

The table is a CSV with one run per row (columns `gpu, engine, precision or moe_quant, isl, osl, concurrency,
layout`, and the measured `ttft_ms, tpot_ms`; `version` and `measured`, a date, choose the software's
generation). An error is predicted / published - 1.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from whalepod.planner.serve_layout import FP8_BLOCK, ServeLayout, Worker, parse_layout
from whalepod.planner.serve_software import Engine, engine_names, generation_of, load_software
from whalepod.planner.serve_step import Traffic
from whalepod.planner.serve_worker import WorkerModel, Workload
from whalepod.planner.serving import steady
from whalepod.spec.errors import UserError, nearest
from whalepod.spec.hardware import Cluster, load_gpu
from whalepod.spec.model import ModelSpec, shown
from whalepod.spec.presets import load_model_spec

_NEEDED = ("gpu", "engine", "isl", "osl", "concurrency", "layout")
_MOST_BYTES = 2**26
_PRECISION = {
    "nvfp4": "fp4",
    "fp4": "fp4",
    "fp8_block": "fp8",
    "fp8": "fp8",
    "bfloat16": "bf16",
    "bf16": "bf16",
}
_METRICS = ("ttft_ms", "tpot_ms", "output_tok_s_per_gpu")

# The client of InferenceX: random prompts and outputs of 80 to 100 % of the nominal length, ten requests per
# slot of the concurrency, all sent at once.
_SHORTEST, _REQUESTS_PER_SLOT = 0.8, 10.0


def serving_rows(path: str | Path) -> list[dict[str, Any]]:
    """Predicts every run of a CSV: its columns, `predicted_*`, `error_*` (None where nothing was published)
    and `notes`. Raises UserError with the row and column of what cannot be read."""
    predictions = []
    for number, row in enumerate(_read(Path(path)), start=2):
        name = row.get("id") or "no id"
        try:
            predictions.append(predict_row(row))
        except UserError as error:
            raise UserError(f"{path}, line {number} ({name}): {error}") from None
    return predictions


def predict_row(row: Mapping[str, str]) -> dict[str, Any]:
    """One run: see `serving_rows`. Raises UserError naming the column."""
    notes: list[str] = []
    spec = _cell(row, "model", lambda text: load_model_spec(text or "deepseek-v3"))
    gpu = _cell(row, "gpu", load_gpu)
    precision = _precision(row, gpu.tflops, notes)
    layout = _as_run(_cell(row, "layout", parse_layout), spec, notes)
    isl, osl = _whole(row, "isl"), _whole(row, "osl")
    concurrency = _whole(row, "concurrency")
    engine = (row.get("engine") or "").strip().lower()
    if engine not in engine_names():
        notes.append(f"engine {shown(engine)} has no constants of its own: those of sglang")
        engine = "sglang"
    generation = generation_of(engine, (row.get("measured") or "").strip())
    software = load_software(engine, gpu, precision, generation)
    per_node = gpu.gpus_per_node
    cluster = Cluster(gpu, layout.num_gpus, min(per_node, layout.num_gpus))
    _cell(row, "layout", lambda _: layout.check_links(cluster))
    work = Workload(isl, osl, shortest=_SHORTEST, requests_per_slot=_REQUESTS_PER_SLOT)
    decode = WorkerModel(spec, cluster, layout.decode, software, precision, work)
    prefill = None
    if layout.prefill is not None:
        prefill = WorkerModel(spec, cluster, layout.prefill, software, precision, work)
    if decode.most_requests < layout.decode.dp:
        notes.append("by this model's memory the run would not fit; predicted without a limit on the cache")
        decode = replace(decode, least_requests=float(concurrency))
    numbers = steady(layout, decode, prefill, np.array([float(concurrency)]))
    predicted = {
        "ttft_ms": 1e3 * float(numbers["ttft_s"][0]),
        "tpot_ms": 1e3 * float(numbers["tpot_s"][0]),
        "output_tok_s_per_gpu": float(numbers["requests_per_s"][0]) * osl / layout.num_gpus,
    }
    published = _published(row, concurrency, osl, layout.num_gpus)
    errors = {f"error_{name}": _error(predicted[name], published[name]) for name in _METRICS}
    return {
        **row,
        "generation": generation,
        **{f"predicted_{name}": value for name, value in predicted.items()},
        **errors,
        # The names that every table of `whalepod accuracy` has, here of the throughput.
        "published": published["output_tok_s_per_gpu"],
        "predicted": predicted["output_tok_s_per_gpu"],
        "error": errors["error_output_tok_s_per_gpu"],
        "notes": [*software.notes, *notes],
    }


def serving_medians(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median absolute errors: over all rows first, then by GPU, engine, mode and precision."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {("all",) * 4: list(rows)}
    for row in rows:
        key = tuple(str(row.get(name) or "") for name in ("gpu", "engine", "mode", "precision"))
        groups.setdefault(key, []).append(row)
    head = groups.pop(("all",) * 4)
    table = [(("all",) * 4, head), *sorted(groups.items())]
    return [
        {
            **dict(zip(("gpu", "engine", "mode", "precision"), key, strict=True)),
            "rows": len(members),
            **{f"median_error_{name}": _median([r[f"error_{name}"] for r in members]) for name in _METRICS},
        }
        for key, members in table
    ]


def published_points() -> list[dict[str, Any]]:
    """Single published figures of large deployments beside their predictions, in tokens/s per GPU.

    `comparable` is False where the published figure is an average over idle hours too; `error` is None where
    the setting follows from the figure itself.
    """
    points = []
    for case in _CASES:
        value = _point(**case["setting"])
        points.append(
            {
                "name": case["name"],
                "source": case["source"],
                "comparable": case.get("comparable", True),
                "unit": "tokens_per_s_per_gpu",
                "published": case["published"],
                "predicted": value,
                "error": None if case.get("circular") else _error(value, case["published"]),
                "note": case.get("note", ""),
            }
        )
    return points


_DEEPSEEK = "github.com/deepseek-ai/profile-data"
_OPEN_INFRA = "github.com/deepseek-ai/open-infra-index, day 6"
_LMSYS = "lmsys.org/blog/2025-05-05-large-scale-ep"


def _sglang(published: float, **setting: Any) -> dict[str, Any]:
    kind = "prefill" if "chunk" in setting else "decode"
    name = f"SGLang {kind} EP{setting['ranks']} on H100, {setting['isl'] // 1024}K prompts"
    # Redundant experts by EPLB keep the ranks nearly even.
    setting |= {"gpu": "h100", "engine": "sglang-wide-ep", "imbalance": 1.05}
    return {"name": name, "source": _LMSYS, "published": published, "setting": setting}


# Published figures are per node of eight, except DeepSeek's profiles.
_CASES: list[dict[str, Any]] = [
    {
        "name": "DeepSeek prefill EP32 on H800, 4K prompts, 16K tokens per GPU",
        "source": _DEEPSEEK,
        "published": 7839.0,
        "setting": {"gpu": "h800", "engine": "deepseek", "ranks": 32, "isl": 4096, "chunk": 16384},
    },
    {
        "name": "DeepSeek decode EP128 on H800, batch 128 per GPU, 4K context",
        "source": _DEEPSEEK,
        "published": 2324.0,
        "setting": {"gpu": "h800", "engine": "deepseek", "ranks": 128, "isl": 4096, "batch": 128},
    },
    _sglang(57_700 / 8, ranks=32, isl=1024, chunk=16384),
    _sglang(54_500 / 8, ranks=32, isl=2048, chunk=16384),
    _sglang(50_300 / 8, ranks=32, isl=4096, chunk=16384),
    _sglang(22_300 / 8, ranks=72, isl=2048, batch=256),
    {
        "name": "DeepSeek production prefill EP32 on H800, tokens not found in the cache",
        "source": _OPEN_INFRA,
        "published": 73_700 * (1 - 0.563) / 8,
        "comparable": False,
        "note": "mean over a day, 56.3 % of 73.7k tokens/s per node cached; prompt lengths not published",
        "setting": {"gpu": "h800", "engine": "deepseek", "ranks": 32, "isl": 4096, "chunk": 16384},
    },
    {
        "name": "DeepSeek production decode EP144 on H800, 4,989 tokens of context",
        "source": _OPEN_INFRA,
        "published": 14_800 / 8,
        "comparable": False,
        "circular": True,
        "note": "mean over a day; no error, as the batch of 88 per GPU is this figure over 20 to 22 tokens/s "
        "per user",
        "setting": {"gpu": "h800", "engine": "deepseek", "ranks": 144, "isl": 4989, "batch": 88},
    },
]


def _point(
    gpu: str, engine: str, ranks: int, isl: int, chunk: int = 0, batch: int = 0, imbalance: float = 1.0
) -> float:
    """Tokens per second per GPU of a DP x EP worker: prompts in full passes, or a decode step."""
    spec = load_model_spec("deepseek-v3")
    accelerator = load_gpu(gpu)
    software: Engine = load_software(engine, accelerator, "fp8")
    if chunk:
        software = replace(software, chunk_tokens=chunk)
    worker = Worker(dp=ranks, ep=ranks)
    cluster = Cluster(accelerator, ranks, accelerator.gpus_per_node)
    work = Workload(isl, 1)
    model = WorkerModel(spec, cluster, worker, software, "fp8", work, Traffic(imbalance=imbalance))
    if chunk:
        return isl / model.prompt_busy_s / ranks
    return batch / float(model.decode_s(batch * ranks))


# ------------------------------------------------------------------------------------------------ cells


def _read(path: Path) -> list[dict[str, str]]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is larger than a table of runs may be ({_MOST_BYTES >> 20} MiB)")
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(line for line in file if not line.startswith("#"))
            rows = [{k: v or "" for k, v in row.items() if isinstance(k, str)} for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read {shown(str(path))}: {error}") from None
    have = set(reader.fieldnames or ())
    for name in _NEEDED:
        if name not in have:
            raise UserError(f"{path}: column {name!r} is missing{nearest(name, have)}")
    return rows


def _cell(row: Mapping[str, str], column: str, read: Any) -> Any:
    try:
        return read((row.get(column) or "").strip())
    except UserError as error:
        raise UserError(f"column {column!r}: {error}") from None


def _whole(row: Mapping[str, str], column: str) -> int:
    text = (row.get(column) or "").strip()
    if not (text.isascii() and text.isdigit() and len(text) < 9 and int(text) > 0):
        raise UserError(f"column {column!r}: must be a whole number above 0, not {shown(text)}")
    return int(text)


def _number(row: Mapping[str, str], column: str) -> float | None:
    """A published figure; blank, or not a positive number, is None."""
    try:
        value = float(row.get(column) or "nan")
    except ValueError:
        return None
    return value if 0.0 < value < float("inf") else None


def _precision(row: Mapping[str, str], have: Mapping[str, float], notes: list[str]) -> str:
    for column in ("moe_quant", "precision"):
        text = (row.get(column) or "").strip().lower()
        if text in _PRECISION:
            precision = _PRECISION[text]
            if precision not in have:
                raise UserError(f"column {column!r}: this GPU has no {precision.upper()} arithmetic")
            return precision
    default = "fp8" if "fp8" in have else "bf16"
    notes.append(f"precision {shown(row.get('precision') or '')} is not known: {default}")
    return default


def _as_run(layout: ServeLayout, spec: ModelSpec, notes: list[str]) -> ServeLayout:
    """The layout with experts whole where their label would cut them below a block, which no engine does:
    tables label `moeTP32 EP1` what DeepEP runs as EP32."""

    def whole(worker: Worker) -> Worker:
        if spec.moe is None or spec.moe.moe_intermediate_size / worker.moe_tp >= FP8_BLOCK:
            return worker
        notes.append(
            f"{worker} would cut experts below a block of {FP8_BLOCK}: taken as EP {worker.stage_gpus}"
        )
        return replace(worker, ep=worker.stage_gpus, moe_tp=1)

    prefill = whole(layout.prefill) if layout.prefill is not None else None
    return replace(layout, decode=whole(layout.decode), prefill=prefill)


def _published(row: Mapping[str, str], concurrency: int, osl: int, gpus: int) -> dict[str, float | None]:
    ttft, tpot = _number(row, "ttft_ms"), _number(row, "tpot_ms")
    output = _number(row, "est_output_tok_s_per_gpu")
    if output is None and ttft and tpot:
        output = concurrency * osl / (ttft + tpot * (osl - 1)) * 1e3 / gpus
    return {"ttft_ms": ttft, "tpot_ms": tpot, "output_tok_s_per_gpu": output}


def _error(predicted: float, published: float | None) -> float | None:
    return predicted / published - 1.0 if published else None


def _median(errors: Sequence[float | None]) -> float | None:
    known = [abs(e) for e in errors if e is not None]
    return float(np.median(known)) if known else None
