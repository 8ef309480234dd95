"""`whalepod models`: the family as rows, as a table, and one model in detail. No torch.

`models_json` gives the rows that everything else here draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from whalepod.spec import counts
from whalepod.spec.presets import Preset, load_preset, preset, preset_names

SEQ_LEN = 4096
"""Tokens per sequence at which training FLOPs are stated, as in the papers."""

_FULL_WIDTH = 116
"""Terminal columns that the family's table needs for every column."""


def models_json(name_or_path: str | Path | None = None) -> list[dict[str, Any]]:
    """One row per model of the family; with a name or path, that model's row with its parts.

    Keys (absent knowledge is None):

    - `total_params`: without MTP; `mtp_params`: what MTP adds, embedding and head being shared.
    - `active_params`: as the papers count, for MoE the active parameters with the head but not the embedding
      table, for dense models all of them. `active_params_head_only` and `..._with_embedding` say both.
    - `kv_bytes_per_token`: in `kv_cache_format`, BF16 where the model is counted (no indexer keys);
      `kv_bytes_per_token_fp8` is the FP8 layout of V3.2, indexer keys included.
    - `train_flops_per_token`: forward and backward at 4096 tokens, causal, without MTP.
    - `weights_gib_bf16`, `weights_gib_fp8` (what stays BF16 and the scales included), `training_state_gib`
      (16 bytes per parameter: BF16 weight and gradient, FP32 master weight and Adam moments); without MTP.
    - `figures`: `computed` by formula here, `published` exact figures, or `rounded` published ones.
    """
    if name_or_path is None:
        return [_row(preset(name)) for name in preset_names()]
    found = load_preset(name_or_path)
    return [_row(found) | _details(found)]


def family_table(rows: Sequence[Mapping[str, Any]], width: int = _FULL_WIDTH) -> Table:
    """The rows of `models_json` as a table; a terminal narrower than 116 columns gets fewer columns."""
    wide = width >= _FULL_WIDTH
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for title in ("params", "active", "KV B\n/token", "GFLOP\n/token", "FP8\nGiB", "BF16\nGiB"):
        table.add_column(title, justify="right", no_wrap=True)
    if wide:
        table.add_column("training\nGiB", justify="right", no_wrap=True)
        table.add_column("status", no_wrap=True)
        table.add_column("licence", no_wrap=True)
    for r in rows:
        cells = [
            r["name"],
            short_number(r["total_params"]),
            short_number(r["active_params"]),
            _number(r["kv_bytes_per_token"]),
            _number(r["train_flops_per_token"], 1e9),
            _number(r["weights_gib_fp8"]),
            _number(r["weights_gib_bf16"]),
        ]
        if wide:
            cells += [_number(r["training_state_gib"]), r["status"], licence_name(r["licence"])]
        table.add_row(*cells)
    caption = (
        f"KV cache in BF16 (V4: as deployed). GFLOP: training, {SEQ_LEN} tokens, causal, without MTP. "
        "training: weights, gradients, optimiser at 16 B per parameter."
    )
    if not wide:
        caption += f" Licence, status and training memory: from {_FULL_WIDTH} columns, or --json."
    table.caption, table.caption_justify = caption, "left"
    return table


def model_view(name_or_path: str | Path) -> Group:
    """One model: what is known of it, its parameters and FLOPs by part, KV cache and memory."""
    row = models_json(name_or_path)[0]
    facts = Table.grid(padding=(0, 2, 0, 0))
    for label, value in _summary(row):
        facts.add_row(Text(label, style="dim"), Text(str(value)))
    views: list[Any] = [Text(row["name"], style="bold"), facts]
    if row["params_by_part"]:
        views += [_params_table(row), _flops_table(row)]
    views.append(_kv_table(row))
    return Group(*views)


def licence_name(licence: str) -> str:
    """The licence without its details in brackets."""
    return licence.split(" (", 1)[0]


def short_number(value: float | None) -> str:
    """`671.03B`, `28.01M`; `-` for None."""
    if value is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:,.0f}"


# ---------------------------------------------------------------------------------------------- rows


def _row(found: Preset) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": found.name,
        "family": found.family,
        "architecture": found.architecture,
        "status": found.status,
        "licence": found.licence,
        "published_total": found.published_total,
        "published_active": found.published_active,
    }
    return row | (_published(found) if found.spec is None else _computed(found))


def _computed(found: Preset) -> dict[str, Any]:
    spec = found.spec
    assert spec is not None
    total = counts.total_params(spec)
    kv_fp8 = counts.kv_bytes_per_token(spec, "fp8") + counts.indexer_bytes_per_token(spec)
    return {
        "figures": "computed",
        "total_params": total,
        "active_params": counts.reported_active_params(spec),
        "active_params_head_only": counts.active_params(spec),
        "active_params_with_embedding": counts.active_params(spec, embedding=True),
        "mtp_params": counts.mtp_unique_params(spec),
        "kv_cache_format": "bf16",
        "kv_elements_per_token": counts.kv_elements_per_token(spec),
        "kv_bytes_per_token": counts.kv_bytes_per_token(spec),
        "kv_bytes_per_token_fp8": kv_fp8,
        "train_flops_per_token": round(counts.train_flops(spec, SEQ_LEN).total),
        "train_flops_per_token_with_mtp": round(counts.train_flops(spec, SEQ_LEN, mtp=True).total),
        "weights_gib_bf16": counts.weight_bytes(spec, "bf16") / counts.GIB,
        "weights_gib_fp8": counts.weight_bytes(spec, "fp8") / counts.GIB,
        "training_state_gib": total * counts.TRAINING_STATE_BYTES_PER_PARAM / counts.GIB,
        "max_position_embeddings": spec.max_position_embeddings,
    }


def _published(found: Preset) -> dict[str, Any]:
    figures = found.figures
    total = figures["total_params"]
    return {
        "figures": "rounded" if figures.get("rounded") else "published",
        "total_params": total,
        "active_params": figures["active_params_head_only"],
        "active_params_head_only": figures["active_params_head_only"],
        "active_params_with_embedding": figures.get("active_params_with_embedding"),
        "mtp_params": None,
        "kv_cache_format": "compressed, as deployed",
        "kv_elements_per_token": None,
        "kv_bytes_per_token": counts.compressed_kv_bytes_per_token(found.config),
        "kv_bytes_per_token_fp8": None,
        "train_flops_per_token": None,
        "train_flops_per_token_with_mtp": None,
        "weights_gib_bf16": total * 2 / counts.GIB,
        "weights_gib_fp8": None,
        "training_state_gib": total * counts.TRAINING_STATE_BYTES_PER_PARAM / counts.GIB,
        "max_position_embeddings": found.config.get("max_position_embeddings"),
    }


def _details(found: Preset) -> dict[str, Any]:
    spec = found.spec
    known: dict[str, Any] = {"sources": found.sources, "confidence": found.confidence}
    empty: dict[str, Any] = {}
    if spec is None:
        window = counts.sliding_window_bytes(found.config) if found.config["kv_layout"] == "v4" else None
        return known | {
            "params_by_part": empty,
            "active_params_by_part": empty,
            "mtp_params_by_part": empty,
            "forward_flops_per_token_by_part": empty,
            "decode_flops_per_token_by_part": empty,
            "indexer_kv_bytes_per_token": None,
            "sliding_window_bytes_per_sequence": window,
        }
    return known | {
        "params_by_part": counts.params(spec).as_dict(),
        "active_params_by_part": counts.params(spec, active=True).as_dict(),
        "mtp_params_by_part": counts.mtp_params(spec).as_dict(),
        "forward_flops_per_token_by_part": counts.forward_flops(spec, SEQ_LEN).as_dict(),
        "decode_flops_per_token_by_part": counts.decode_flops(spec, SEQ_LEN).as_dict(),
        "indexer_kv_bytes_per_token": counts.indexer_bytes_per_token(spec),
        "sliding_window_bytes_per_sequence": 0,
    }


# --------------------------------------------------------------------------------------------- views


def _summary(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    active = f"{row['active_params']:,}"
    lines = [
        ("architecture", row["architecture"]),
        ("status", row["status"]),
        ("licence", row["licence"]),
        ("published", " / ".join(v for v in (row["published_total"], row["published_active"]) if v) or "-"),
        ("sources", f"{row['sources']}; confidence: {row['confidence']}"),
        ("parameters", f"{row['total_params']:,} total, {active} active ({row['figures']})"),
    ]
    if row["mtp_params"]:
        lines.append(("MTP adds", f"{row['mtp_params']:,}"))
    if row["train_flops_per_token"] is not None:
        flops = f"{_number(row['train_flops_per_token'], 1e9)} GFLOP per token at {SEQ_LEN}"
        if row["mtp_params"]:
            flops += f", {_number(row['train_flops_per_token_with_mtp'], 1e9)} with MTP"
        lines.append(("training", flops))
    memory = [f"{_number(row['weights_gib_bf16'])} GiB in BF16"]
    if row["weights_gib_fp8"] is not None:
        memory.append(f"{_number(row['weights_gib_fp8'])} GiB in FP8")
    memory.append(f"{_number(row['training_state_gib'])} GiB of training state")
    return [*lines, ("memory", ", ".join(memory))]


def _params_table(row: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("parameters", "total", "share", "active"):
        table.add_column(title, justify="left" if title == "parameters" else "right", no_wrap=True)
    for part, value in row["params_by_part"].items():
        share = value / row["total_params"]
        table.add_row(part, f"{value:,}", f"{share:.2%}", f"{row['active_params_by_part'][part]:,}")
    table.add_section()
    active = sum(row["active_params_by_part"].values())
    table.add_row("total", f"{row['total_params']:,}", "100.00%", f"{active:,}")
    return table


def _flops_table(row: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("MFLOP per token", f"forward, {SEQ_LEN}", "share", f"decode at {SEQ_LEN}"):
        table.add_column(title, justify="left" if title.startswith("MFLOP") else "right", no_wrap=True)
    forward, decode = row["forward_flops_per_token_by_part"], row["decode_flops_per_token_by_part"]
    total = sum(forward.values())
    for part, value in forward.items():
        table.add_row(part, _number(value, 1e6), f"{value / total:.2%}", _number(decode[part], 1e6))
    table.add_section()
    table.add_row("total", _number(total, 1e6), "100.00%", _number(sum(decode.values()), 1e6))
    return table


def _kv_table(row: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("KV cache")
    table.add_column("bytes per token", justify="right")
    table.add_row(row["kv_cache_format"], f"{row['kv_bytes_per_token']:,}")
    if row["kv_bytes_per_token_fp8"] is not None:
        beside = " with indexer keys" if row["indexer_kv_bytes_per_token"] else ""
        table.add_row(f"fp8{beside}", f"{row['kv_bytes_per_token_fp8']:,}")
    if row["sliding_window_bytes_per_sequence"]:
        table.add_row("and per sequence, sliding window", f"{row['sliding_window_bytes_per_sequence']:,}")
    return table


def _number(value: float | None, unit: float = 1) -> str:
    """With separators; decimals only where they say something; `-` for None."""
    if value is None:
        return "-"
    value = value / unit
    decimals = 0 if value >= 1000 or float(value).is_integer() else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f}"
