"""What a user asks of the planner, checked: names into facts, numbers within bounds, defaults filled in.

A `Question` holds what was typed, None where nothing was; `job` turns it into the planner's own values. Every
mistake is a UserError with one line. No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from whalepod.planner.search import SCHEDULES, TrainingJob, default_batch
from whalepod.planner.serve_measured import served
from whalepod.planner.serve_plan import ServingJob
from whalepod.planner.serve_software import OWN_ENGINE, engine_names
from whalepod.planner.serve_step import Traffic
from whalepod.planner.software import load_software, usual_software
from whalepod.spec.errors import UserError, nearest
from whalepod.spec.hardware import (
    MAX_GPUS,
    Cluster,
    Gpu,
    Operation,
    load_gpu,
    override_gpu,
    parse_gpus,
    usual_operation,
)
from whalepod.spec.layout import MAX_SIZE
from whalepod.spec.model import ModelSpec, shown
from whalepod.spec.presets import load_model_spec, preset

GOALS = ("train", "serve")
PRECISIONS = {"train": ("auto", "bf16", "fp8", "fp32"), "serve": ("bf16", "fp8", "fp4")}
RECOMPUTE = ("none", "selective", "full")
MODES = ("aggregated", "disaggregated", "any")
SEQUENCE_LENGTH = 4096
ISL, OSL = 4096, 1024
ENGINE = "sglang"
TTFT_S, TPOT_S = 5.0, 0.1
"""What people wait for at most, where nobody says: beyond it only queues grow."""
MAX_COUNTS = 64
MAX_TOP = 50


def _asked(flag: str, low: float, high: float, goal: str | None = None) -> Any:
    """A number of the question: its option, its bounds, and the goal that it belongs to (None: both)."""
    return field(default=None, metadata={"flag": flag, "low": low, "high": high, "goal": goal})


def _named(flag: str, choices: tuple[str, ...] | None, goal: str | None = None) -> Any:
    return field(default=None, metadata={"flag": flag, "choices": choices, "goal": goal})


@dataclass(frozen=True)
class Question:
    """A model, a goal, and what was said about them. Raises UserError for what cannot be meant.

    memory_gib to price: overrides of the GPU's own figures. tp to recompute: fields of the layout that are
    given. isl, osl: tokens of a request's prompt and output. mtp None: trained where the model has it,
    not used to speculate.
    """

    model: str
    goal: str
    precision: str | None = None
    software: str | None = _named("--software", None, "train")
    global_batch: int | None = _asked("--global-batch", 1, MAX_SIZE, "train")
    sequence_length: int | None = _asked("--sequence-length", 1, MAX_SIZE, "train")
    imbalance: float | None = _asked("--imbalance", 1.0, 256.0)
    gpus_per_node: int | None = _asked("--gpus-per-node", 1, MAX_GPUS)
    memory_gib: float | None = _asked("--memory-gib", 1e-3, 1e6)
    memory_tb_s: float | None = _asked("--memory-tb-s", 1e-3, 1e6)
    scale_up_gb_s: float | None = _asked("--scale-up-gb-s", 1e-3, 1e6)
    nic_gb_s: float | None = _asked("--nic-gb-s", 1e-3, 1e6)
    price: float | None = _asked("--price", 0.0, 1e6)
    gpu_hours_per_failure: float | None = _asked("--gpu-hours-per-failure", 1.0, 1e9, "train")
    restart_s: float | None = _asked("--restart-s", 1e-3, 1e7, "train")
    storage_gb_s: float | None = _asked("--storage-gb-s", 1e-3, 1e6, "train")
    tp: int | None = _asked("--tp", 1, MAX_SIZE)
    pp: int | None = _asked("--pp", 1, MAX_SIZE)
    ep: int | None = _asked("--ep", 1, MAX_SIZE)
    cp: int | None = _asked("--cp", 1, MAX_SIZE, "train")
    micro_batch: int | None = _asked("--micro-batch", 1, MAX_SIZE, "train")
    zero: int | None = _asked("--zero", 1, 3, "train")
    schedule: str | None = _named("--schedule", tuple(dict.fromkeys(name for name, _ in SCHEDULES)), "train")
    recompute: str | None = _named("--recompute", RECOMPUTE, "train")
    mtp: bool | None = None
    isl: int | None = _asked("--isl", 1, 10_000_000, "serve")
    osl: int | None = _asked("--osl", 1, 10_000_000, "serve")
    concurrency: float | None = _asked("--concurrency", 1, 1e7, "serve")
    engine: str | None = _named("--engine", tuple(engine_names()), "serve")
    mode: str | None = _named("--mode", MODES, "serve")
    ttft_ms: float | None = _asked("--ttft-ms", 1e-3, 1e9, "serve")
    tpot_ms: float | None = _asked("--tpot-ms", 1e-3, 1e9, "serve")

    def __post_init__(self) -> None:
        check_name("--for", self.goal, GOALS)
        if self.precision is not None:
            other = GOALS[self.goal == "train"]
            if self.precision in PRECISIONS[other] and self.precision not in PRECISIONS[self.goal]:
                allowed = ", ".join(PRECISIONS[self.goal])
                raise UserError(
                    f"--precision {self.precision} is not for --for {self.goal} (allowed: {allowed})"
                )
            check_name("--precision", self.precision, PRECISIONS[self.goal])
        for f in fields(self):
            value, rule = getattr(self, f.name), f.metadata
            if value is None or not rule:
                continue
            if rule["goal"] not in (None, self.goal):
                raise UserError(f"{rule['flag']} has no effect with --for {self.goal}: leave it out")
            if "low" in rule:
                check_number(rule["flag"], value, rule["low"], rule["high"])
            elif rule["choices"] is not None:
                check_name(rule["flag"], value, rule["choices"])

    @cached_property
    def spec(self) -> ModelSpec:
        spec = load_model_spec(self.model)
        if self.mtp is False and spec.num_nextn_predict_layers:
            return spec.with_(num_nextn_predict_layers=0)
        if self.mtp and not spec.num_nextn_predict_layers:
            raise UserError(f"--mtp: {shown(spec.name)} has no multi-token prediction")
        return spec

    @property
    def run_model(self) -> str | dict[str, Any]:
        """The model as a run.yaml names it: a preset by its name, a checkpoint by its whole path."""
        path = Path(self.model)
        on_disk = path.is_file() or (path / "config.json").is_file()
        name = str(path.resolve()) if on_disk else preset(self.model).name
        if self.spec.num_nextn_predict_layers == load_model_spec(self.model).num_nextn_predict_layers:
            return name
        return {"preset": name, "num_nextn_predict_layers": 0}

    def cluster(self, gpus: str) -> Cluster:
        """Of `64xH100`, with what was overridden."""
        cluster = parse_gpus(gpus, self.gpus_per_node)
        return replace(cluster, gpu=self._overridden(cluster.gpu))

    def cluster_of(self, gpu: str, count: int) -> Cluster:
        """`count` of a GPU by its name, or its profile's file."""
        found = self._overridden(load_gpu(gpu))
        return Cluster(found, count, self.gpus_per_node or found.gpus_per_node)

    def _overridden(self, gpu: Gpu) -> Gpu:
        return override_gpu(
            gpu,
            memory_gib=self.memory_gib,
            memory_tb_s=self.memory_tb_s,
            scale_up_gb_s=self.scale_up_gb_s,
            nic_gb_s=self.nic_gb_s,
            usd_per_hour=self.price,
        )

    def precision_on(self, gpu: Gpu) -> str:
        """The given one; else FP8 where the released weights are and the GPU computes in it, else BF16.

        `auto`, which tries FP8 and BF16, is BF16 on a GPU that has no other."""
        if self.precision is not None:
            return "bf16" if self.precision == "auto" and not gpu.supports("fp8") else self.precision
        if self.goal == "serve" and gpu.architecture == "cpu":
            return served(gpu)[1].precision
        return "fp8" if self.spec.quantization is not None and gpu.supports("fp8") else "bf16"

    @property
    def operation(self) -> Operation:
        """How the cluster is run: the usual, with what was said over it."""
        names = ("gpu_hours_per_failure", "restart_s", "storage_gb_s")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if "storage_gb_s" in given:  # of all nodes together, however many
            given["node_storage_gb_s"] = given["storage_gb_s"]
        return replace(usual_operation(), **given)

    def training_job(self, cluster: Cluster) -> TrainingJob:
        """What the planner is asked to train on `cluster`."""
        spec, gpu = self.spec, cluster.gpu
        length = self.sequence_length or min(SEQUENCE_LENGTH, spec.max_position_embeddings)
        if length > spec.max_position_embeddings:
            raise UserError(
                f"--sequence-length {length} is more than the {spec.max_position_embeddings} positions of "
                f"{shown(spec.name)}"
            )
        names = ("tp", "pp", "ep", "cp", "micro_batch", "zero", "schedule", "recompute")
        return TrainingJob(
            spec,
            cluster,
            load_software(self.software or usual_software(gpu)),
            self.global_batch or default_batch(spec, cluster.num_gpus, length),
            length,
            self.precision_on(gpu),
            self.imbalance or 1.0,
            self.mtp is not False,
            {name: getattr(self, name) for name in names if getattr(self, name) is not None},
        )

    def serving_job(self, cluster: Cluster) -> ServingJob:
        """What the planner is asked to serve on `cluster`."""
        spec = self.spec
        isl, osl = self.isl or min(ISL, spec.max_position_embeddings // 2), self.osl or OSL
        osl = osl if self.osl else min(osl, max(1, spec.max_position_embeddings - isl))
        if isl + osl > spec.max_position_embeddings:
            raise UserError(
                f"--isl {isl} and --osl {osl} together are more than the {spec.max_position_embeddings} "
                f"positions of {shown(spec.name)}"
            )
        engine = self.engine or (OWN_ENGINE if cluster.gpu.architecture == "cpu" else ENGINE)
        modes = MODES[:2] if self.mode in (None, "any") else (self.mode,)
        if engine == OWN_ENGINE:
            modes = MODES[:1]
            if self.mode == "disaggregated":
                raise UserError(f"--engine {OWN_ENGINE} has no disaggregated serving; use aggregated")
        usual = self.ttft_ms is None and self.tpot_ms is None and self.concurrency is None
        return ServingJob(
            spec,
            cluster,
            self.precision_on(cluster.gpu),
            engine,
            isl,
            osl,
            self.concurrency,
            TTFT_S if usual else self.ttft_ms and self.ttft_ms / 1e3,
            TPOT_S if usual else self.tpot_ms and self.tpot_ms / 1e3,
            modes,
            1 if self.mtp else 0,
            Traffic() if self.imbalance is None else Traffic(imbalance=self.imbalance),
            {axis: size for axis in ("tp", "pp", "ep") if (size := getattr(self, axis)) is not None},
            usual,
        )


def check_name(flag: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError, with the nearest choice, unless `value` is one of them."""
    if value not in choices:
        raise UserError(f"unknown {flag} {shown(value)}{nearest(value[:100], choices)}")


def check_number(flag: str, value: float, low: float, high: float) -> None:
    """Raises UserError unless `value` is a number from `low` to `high`."""
    if not (isfinite(value) and low <= value <= high):
        raise UserError(f"{flag} must be from {low:.15g} to {high:.15g}, not {shown(value)}")


def check_top(top: int) -> None:
    check_number("--top", top, 1, MAX_TOP)


def parse_counts(text: str) -> list[int]:
    """GPU counts of `8,16,64` or `8..2048` (doublings), each once, the smallest first."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:\.\.\s*(\d{1,9})\s*)?", part, re.ASCII)
        if match is None:
            raise UserError(f"--counts must be like 8,16,64 or 8..2048 (doublings), not {shown(text)}")
        first, last = int(match[1]), int(match[2] or match[1])
        for count in (first, last):
            check_number("--counts: a count", count, 1, MAX_GPUS)
        if last < first:
            raise UserError(f"--counts: {first}..{last} runs backwards; write {last}..{first}")
        while first <= last:
            found.add(first)
            first *= 2
        if len(found) > MAX_COUNTS:
            raise UserError(f"--counts names more than {MAX_COUNTS} counts")
    return sorted(found)
