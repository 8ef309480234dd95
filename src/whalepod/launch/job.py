"""What is launched: a run.yaml on a cluster, checked, with what the planner expects of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from whalepod.planner.plan import time_run
from whalepod.planner.search import TrainingJob
from whalepod.planner.serve_layout import ServeLayout, parse_layout
from whalepod.planner.serve_software import Engine, load_software
from whalepod.planner.serve_worker import Workload
from whalepod.planner.serving import ServeEstimate, estimate
from whalepod.planner.software import Software
from whalepod.spec.counts import GIB
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster
from whalepod.spec.layout import AXES, Layout, layout_words
from whalepod.spec.model import ModelSpec
from whalepod.spec.presets import load_preset
from whalepod.spec.run import RunConfig


@dataclass(frozen=True)
class Expectation:
    """Of the whole deployment or step; memory of the fullest GPU. software: whose speed and memory these are.
    step_s is training's; ttft_ms and tpot_ms are serving's, at `concurrency` requests in flight. No speed is
    known where the network between nodes is not."""

    layout: str
    software: str
    memory_gib: float
    gpu_memory_gib: float
    tokens_per_s: float | None
    tokens_per_s_per_gpu: float | None
    limited_by: str
    step_s: float | None = None
    concurrency: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def words(self) -> str:
        memory = f"{self.memory_gib:.1f} of {self.gpu_memory_gib:.1f} GiB on the fullest GPU"
        if self.tokens_per_s is None:
            return f"{memory}; no speed: the network between nodes is not known (planned as {self.software})"
        speed = f"{self.tokens_per_s:,.0f} tokens/s ({self.tokens_per_s_per_gpu:,.0f} a GPU)"
        if self.step_s is not None:
            speed += f", {self.step_s:.3g} s a step"
        else:
            speed += (
                f" of output at {self.concurrency:,.0f} requests in flight, first token after "
                f"{self.ttft_ms:,.0f} ms, then one every {self.tpot_ms:.3g} ms"
            )
        return f"{speed}; {memory}; limited by {self.limited_by} (planned as {self.software})"


@dataclass(frozen=True)
class Job:
    """source: the run.yaml's name, for comments. image: of containers; None is the engine's own. shared: the
    folder of containers that all nodes see."""

    config: RunConfig
    source: str
    cluster: Cluster
    image: str | None = None
    shared: str = "/shared"

    @cached_property
    def spec(self) -> ModelSpec:
        return self.config.model_spec()

    @property
    def name(self) -> str:
        """For schedulers: a DNS label."""
        return re.sub(r"[^a-z0-9]+", "-", self.spec.name.lower()).strip("-")[:40].strip("-") or "model"

    @property
    def model(self) -> str:
        """Where weights are: a folder, or the hub's name of a preset."""
        model = self.config.model
        base = model if isinstance(model, str) else str(model.get("preset"))
        name = load_preset(base).name
        if "/" in base or not name.startswith("deepseek-"):
            return base
        cased = {"deepseek": "DeepSeek", "r1": "R1", "qwen3": "Qwen3"}
        if name.removeprefix("deepseek-").startswith(("llm", "moe", "coder")) and "v2" not in name:
            return f"deepseek-ai/{name}-base"  # of the hub's older, lower-case names
        words = [
            cased.get(w) or (w.upper() if re.fullmatch(r"\d+b", w) else w.title()) for w in name.split("-")
        ]
        return "deepseek-ai/" + "-".join(words)

    @property
    def per_node(self) -> int:
        return min(self.cluster.gpus_per_node, self.cluster.num_gpus)

    @property
    def num_nodes(self) -> int:
        return self.cluster.num_gpus // self.per_node

    # -- training

    @cached_property
    def layout(self) -> Layout:
        """Raises UserError unless it fits the model and fills the cluster's nodes."""
        layout, length = self.config.make_layout(), self.config.data.sequence_length
        layout.check_model(self.spec, length)
        have, gpu = self.cluster.num_gpus, self.cluster.gpu
        if layout.num_devices != have:
            sizes = " x ".join(
                f"{axis} {getattr(layout, axis)}" for axis in AXES if getattr(layout, axis) > 1
            )
            raise UserError(
                f"the layout is for {layout.num_devices} GPUs ({sizes or 'one device'}), and there are {have}"
                f": give --gpus {layout.num_devices}x{gpu.name}, or plan for {have}"
            )
        if have % self.per_node:
            raise UserError(
                f"{have} GPUs are no whole number of nodes of {self.per_node}: see --gpus-per-node"
            )
        if not gpu.supports(layout.precision) and gpu.architecture != "cpu":
            raise UserError(f"{gpu.name} has no {layout.precision.upper()} matrix products: use bf16")
        return layout

    def training(self, software: Software) -> Expectation:
        """Of the layout, as `software` runs it."""
        layout, gpu = self.layout, self.cluster.gpu
        if not gpu.supports(layout.precision):  # emulated on CPUs
            layout = replace(layout, precision="bf16")
        job = TrainingJob(
            *(self.spec, self.cluster, software, layout.global_batch),
            *(self.config.data.sequence_length, layout.precision),
            mtp=self.spec.num_nextn_predict_layers > 0,
        )
        plan = time_run(job, layout)
        known = self.cluster.num_gpus <= self.cluster.most
        return Expectation(
            "; ".join(layout_words(self.layout)),
            software.name,
            plan.memory_gib,
            gpu.memory_gib,
            plan.tokens_per_s if known else None,
            plan.tokens_per_s_per_gpu if known else None,
            plan.limited_by if known else "network",
            step_s=plan.step.seconds if known else None,
        )

    # -- serving

    @cached_property
    def deployment(self) -> ServeLayout:
        """Raises UserError unless it fits the model and the cluster."""
        serve = self.serve
        layout = parse_layout(serve.layout)
        layout.check(self.spec, self.cluster, serve.precision)
        for worker in (layout.prefill, layout.decode):
            if worker is not None and worker.num_gpus > self.per_node and worker.num_gpus % self.per_node:
                raise UserError(
                    f"a worker {worker} needs whole nodes of {self.per_node} GPUs: plan again with other --tp"
                )
        return layout

    @property
    def serve(self) -> Any:
        if self.config.serve is None:
            raise UserError("this run.yaml trains: for a deployment use whalepod plan --for serve --emit")
        return self.config.serve

    def engine(self, name: str) -> Engine:
        return load_software(name, self.cluster.gpu, self.serve.precision)

    def serving(self, engine: Engine) -> tuple[Expectation, ServeEstimate]:
        """Of the deployment in `engine`, with the planner's own estimate."""
        serve = self.serve
        found = estimate(
            *(self.spec, self.cluster, self.deployment),
            Workload(serve.isl, serve.osl, drafts=serve.drafts),
            *(serve.concurrency, serve.precision, engine),
        )
        memory = sum(found.memory.by_category().values()) / GIB
        expected = Expectation(
            str(self.deployment),
            f"{engine.engine} {engine.generation}",
            memory,
            self.cluster.gpu.memory_gib,
            found.output_tokens_per_s,
            found.output_tokens_per_s_per_gpu,
            found.limited_by,
            concurrency=found.concurrency,
            ttft_ms=1e3 * found.ttft_s,
            tpot_ms=1e3 * found.tpot_s,
        )
        return expected, found

    # -- what every file says of itself

    def header(self, expected: Expectation, version: str) -> list[str]:
        """Lines of comment: which plan made a file, and what to expect."""
        cluster, nodes = self.cluster, f"{self.num_nodes} node{'s' * (self.num_nodes > 1)} of {self.per_node}"
        return [
            f"Made by whalepod {version} (`whalepod launch`) from {self.source}: change the plan there.",
            f"{self.spec.name} on {cluster.num_gpus} x {cluster.gpu.name} ({nodes}): {expected.layout}",
            f"expect: {expected.words}",
        ]


Files = Mapping[str, str]
"""Text by file name."""
