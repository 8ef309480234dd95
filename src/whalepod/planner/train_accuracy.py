"""The planner's training times beside published ones, row by row.

A row is a line of a CSV in the columns of `COLUMNS`: a published run's model, GPUs, layout, what is known
of its software, and tokens per second and GPU. Nothing is fitted to a row: its stack's named generation and
the row's own dispatcher, overlap, graphs and recomputation are all that the prediction is told.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from whalepod.planner.candidates import RECOMPUTED, Candidates, objects
from whalepod.planner.software import GENERATIONS, GRAPHED, LADDER, Software, load_software
from whalepod.planner.training import Step, TrainingTimes
from whalepod.spec.errors import UserError, nearest
from whalepod.spec.hardware import Cluster, load_gpu
from whalepod.spec.model import ModelSpec
from whalepod.spec.presets import load_model_spec

COLUMNS = (
    *("model", "mtp", "gpu", "gpus", "prec", "seq", "gbs", "mbs", "tp", "pp", "vp", "ep", "cp", "dp"),
    *("tok_s_gpu", "cls", "dispatcher", "overlap", "graphs", "recompute", "note"),
)
MAX_ROWS = 10_000
MAX_VALUE = 2**20


@dataclass(frozen=True)
class Row:
    """A published run, ready to be predicted."""

    spec: ModelSpec
    candidates: Candidates
    cluster: Cluster
    software: Software
    sequence_length: int
    mtp: bool
    published: float

    def predict(self) -> tuple[float, Step]:
        """Tokens per second and GPU, and the step."""
        times = TrainingTimes(
            *(self.spec, self.candidates, self.cluster, self.software, self.sequence_length),
            mtp=self.mtp,
        ).balanced()
        step = times.time_step(0)
        tokens = int(self.candidates.global_batch[0]) * self.sequence_length
        return tokens / step.seconds / self.cluster.num_gpus, step


def read_rows(path: Path | str, columns: Iterable[str]) -> list[dict[str, str]]:
    """Lines of a CSV; raises UserError, with the column's name, unless all `columns` are there."""
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path} has no column {missing[0]!r} (needs: {', '.join(columns)})")
            rows = []
            for row in reader:
                rows.append(
                    {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)}
                )
                if len(rows) > MAX_ROWS:
                    raise UserError(f"{path} has more than {MAX_ROWS} rows")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return rows


def training_rows(path: Path | str) -> list[dict[str, Any]]:
    """Every row with `published`, `predicted` (tokens per second and GPU) and `error`, which is
    predicted / published - 1."""
    out = []
    rung = 0
    for number, row in enumerate(read_rows(path, COLUMNS), start=2):
        ladder = row["note"].startswith("ladder")
        rung = rung + 1 if ladder else 0
        try:
            published = parse_row(row, rung - 1 if ladder else None)
            predicted, step = published.predict()
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        out.append(
            {
                **row,
                "software": published.software.name,
                "published": published.published,
                "predicted": predicted,
                "error": predicted / published.published - 1,
                "step_s_predicted": step.seconds,
            }
        )
    return out


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median absolute error over all rows and by group."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        others = () if row["software"] == "ladder" else ("all but the ladder",)
        for key in ("all", *others, f"class {row['cls']}", row["gpu"], row["software"]):
            groups.setdefault(key, []).append(abs(row["error"]))
    return {key: median(errors) for key, errors in groups.items()}


def parse_row(row: Mapping[str, str], rung: int | None = None) -> Row:
    """A row's inputs. `rung`: its place on the ladder of single optimisations (0 is the baseline)."""
    gpu = load_gpu(row["gpu"])
    precision = "bf16" if row["prec"].upper().startswith("BF16") else "fp8"
    pp = _integer(row, "pp")
    schedule, stages = "1f1b", 1
    if row["vp"].lower().startswith("dualpipe"):
        schedule, stages = "dualpipev", 2
    elif row["vp"].lower().startswith("zb"):
        schedule, stages = "zbv", 2
    elif pp > 1 and (virtual := _integer(row, "vp", 1)) > 1:
        schedule, stages = "interleaved", virtual
    software = _software(row, gpu.name, rung)
    gpus, ep, tp, cp = (_integer(row, key) for key in ("gpus", "ep", "tp", "cp"))
    dp = _integer(row, "dp", gpus // (tp * pp * cp))
    # One published row names more expert ranks than a pipeline stage has ranks.
    ep = min(ep, dp * cp * tp)
    parts = _recomputed(row["recompute"])
    fsdp = "fsdp" in row["note"].lower()
    spec = _model(row["model"])
    one = {
        "pp": pp, "stages": stages, "dp_replicate": 1, "dp_shard": dp, "cp": cp, "tp": tp, "ep": ep,
        "zero": 3 if fsdp else 1, "micro_batch": _integer(row, "mbs", 1),
        "global_batch": _integer({"gbs": row["gbs"].split("->")[-1]}, "gbs"),
    }  # fmt: skip
    wire = "fp8" if software.name.startswith("deepseek") else "bf16"
    candidates = Candidates(
        **{key: np.array([value]) for key, value in one.items()},
        schedule=np.array([schedule], dtype=object),
        precision=np.array([precision], dtype=object),
        wire=np.array([wire], dtype=object),
        # SimuMax cuts by layers, not by cost; other stacks' pipelines are laid out by hand.
        stage_layers=objects(
            [(spec.num_hidden_layers // pp,) * pp if software.name == "simumax" and pp > 1 else None]
        ),
        recompute={part: np.array([part in parts]) for part in RECOMPUTED},
    )
    return Row(
        spec,
        candidates,
        Cluster(gpu, gpus, gpu.gpus_per_node),
        software,
        _integer(row, "seq"),
        row["mtp"] == "1",
        _number(row, "tok_s_gpu"),
    )


def _integer(row: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = row.get(key, "")
    if not text and default is not None:
        return default
    try:
        value = int(text)
    except ValueError:
        raise UserError(f"{key} must be a whole number, not {text[:40]!r}") from None
    if not 1 <= value <= MAX_VALUE:
        raise UserError(f"{key} must be from 1 to {MAX_VALUE}, not {text[:40]}")
    return value


def _known(row: Mapping[str, str], key: str, choices: Iterable[str]) -> None:
    if row[key] and row[key] not in choices:
        raise UserError(f"unknown {key} {row[key][:40]!r}{nearest(row[key][:40], choices)}")


def _release(note: str) -> str | None:
    """Of `rel 26.04 ...` the newest release with constants that is not newer, else the oldest."""
    named = re.search(r"rel (\d\d\.\d\d)", note)
    if named is None:
        return None
    known = sorted(name.removeprefix("megatron-") for name in GENERATIONS if name.startswith("megatron-"))
    return max((r for r in known if r <= named[1]), default=known[0])


def _number(row: Mapping[str, str], key: str) -> float:
    try:
        value = float(row[key])
    except ValueError:
        raise UserError(f"{key} must be a number, not {row[key][:40]!r}") from None
    if not 0 < value < 1e9:
        raise UserError(f"{key} must be above 0, not {row[key][:40]}")
    return value


def _model(name: str) -> ModelSpec:
    """A preset by its published name; `DSv3 4L` is four layers of it, the first of them dense."""
    if name.startswith("DSv"):
        preset = f"deepseek-v{name[3:4]}"
        layers = _integer({"layers": name.split()[1].removesuffix("L") if " " in name else ""}, "layers")
        return load_model_spec(preset).with_(num_hidden_layers=layers, first_k_dense_replace=1)
    return load_model_spec(name.lower().removesuffix("-671b").removesuffix("-236b"))


def _recomputed(text: str) -> frozenset[str]:
    if not text or text == "none" or text.startswith("no "):
        return frozenset()
    if text in ("full", "some", "all"):
        return frozenset({"all"})
    names = {"swiglu": "moe_act"}
    return frozenset(names.get(part, part) for part in text.split("+")) & frozenset(RECOMPUTED)


def _software(row: Mapping[str, str], gpu: str, rung: int | None) -> Software:
    note, source = row["note"].lower(), row.get("src", "").lower()
    release = _release(note)
    if rung is not None:
        software = LADDER[min(rung, len(LADDER) - 1)]
    elif release:
        software = load_software(f"megatron-{release}")
    elif "fsdp" in note:
        software = load_software("automodel")
    elif "simumax" in note or "simumax" in source:
        software = load_software("simumax")
    elif gpu == "H800":
        # DeepSeek-V2's framework (arXiv 2405.04434, section 3.1.3) had no DualPipe yet.
        software = load_software("deepseek-2024" if "v2" in row["model"].lower() else "deepseek")
    else:
        software = load_software("megatron-26.02")
    changes: dict[str, Any] = {}
    _known(row, "dispatcher", software.exchange)
    _known(row, "graphs", GRAPHED)
    _known(row, "overlap", ("yes", "no"))
    if row["dispatcher"]:
        changes |= {"dispatcher": row["dispatcher"], "rack_dispatcher": None}
    if row["overlap"]:
        changes["overlap"] = row["overlap"] == "yes"
    if rung is None:
        # A row that does not say is taken for one without.
        changes["graphed"] = GRAPHED[row["graphs"] or "no"]
    return software.with_(**changes) if changes else software
