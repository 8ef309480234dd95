"""The main job on this machine, end to end: plan, train on one worker and on all, write text, serve."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from whalepod.report.training import Curve, draw_scaling
from whalepod.serve.generate import Generated, generate, load_model
from whalepod.serve.http.open import ServerOptions, background_server
from whalepod.serve.predict import predict_written, predicted_line
from whalepod.serve.request import Sampling
from whalepod.serve.start import EngineConfig, serving_layout
from whalepod.spec.counts import GIB, params
from whalepod.spec.run import RunConfig, make_run
from whalepod.text.sources import Progress
from whalepod.train.loop import RunResult
from whalepod.train.metrics import read_metrics
from whalepod.train.predict import Prediction, predict
from whalepod.train.start import train

PROMPT = "def read_lines(path):\n    "
GLOBAL_BATCH, SEQUENCE_LENGTH = 32, 256
STEPS, STEPS_ALONE, STEPS_SHARDED = 110, 12, 8
MAX_WORKERS = 8


@dataclass(frozen=True)
class Demo:
    """What the demo showed; `closing` is its one-line answer."""

    model: str
    total_params: int
    workers: int
    alone: RunResult
    replicated: RunResult
    sharded: RunResult | None
    speedup: float
    largest_loss_gap: float
    predicted_state_mib: dict[str, float]
    generated: Generated
    picture: str
    closing: str


def run_demo(
    folder: Path, say: Callable[[str], Any], progress: Progress | None = None, steps: int = STEPS
) -> Demo:
    """Runs it all into `folder` (deleted first) and returns the figures; `say` gets each line."""
    workers = max(n for n in (1, 2, 4, MAX_WORKERS) if n <= len(os.sched_getaffinity(0)))
    shutil.rmtree(folder, ignore_errors=True)
    spec = make_run(_config(folder, "", 1, 1, steps)).model_spec()
    total = params(spec, mtp=True).total
    expected = {
        "replicated": _predict(_config(folder, "", workers, 1, steps)),
        "sharded": _predict(_config(folder, "", 1, workers, steps)),
    }
    predicted = {name: found.state_gib * 1024 for name, found in expected.items()}
    say(
        f"{spec.name}: DeepSeek-V3 architecture (latent attention, experts, multi-token prediction), "
        f"{total / 1e6:.1f} M parameters; {workers} worker(s), one core each"
    )
    say(
        f"predicted training state per worker: {predicted['replicated']:,.0f} MiB replicated, "
        f"{predicted['sharded']:,.0f} MiB fully sharded over {workers}"
    )
    alone_until = min(STEPS_ALONE, steps)
    tokens = GLOBAL_BATCH * SEQUENCE_LENGTH
    say(f"\n1 worker: the first {alone_until} of {steps} steps, {tokens:,} tokens each")
    alone = train(_run(folder, "alone", 1, 1, steps), until=alone_until, progress=progress)
    sharded = None
    if workers > 1:
        say(f"\n{workers} workers, fully sharded (FSDP2): {STEPS_SHARDED} steps of the same job")
        sharded = train(_run(folder, "sharded", 1, workers, steps), until=min(STEPS_SHARDED, steps))
    say(f"\n{workers} worker(s), replicated: the whole job, {steps} steps")
    replicated = train(_run(folder, "replicated", workers, 1, steps))

    rows = {name: read_metrics(folder / name / "metrics.jsonl") for name in ("alone", "replicated")}
    pairs = zip(rows["alone"], rows["replicated"], strict=False)
    gap = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in pairs)
    curves = [_curve("1 worker", alone, predicted["replicated"])]
    if sharded is not None:
        curves.append(_curve(f"{workers} workers", replicated, predicted["replicated"]))
        curves.append(_curve(f"{workers} sharded", sharded, predicted["sharded"]))
    picture = draw_scaling(curves, f"{spec.name}, {total / 1e6:.1f} M parameters", folder / "demo.png")

    say(f"\nprompt: {PROMPT!r}\n")
    model, tokenizer = load_model(folder / "replicated")
    written = generate(model, tokenizer, PROMPT, 96, Sampling(temperature=0.6, top_p=0.9, seed=1))
    say(PROMPT + written.text)
    alone_config = EngineConfig(str(folder / "replicated"), device="cpu")
    expected_text = predict_written(alone_config, [(written.prompt_tokens, written.new_tokens)])
    say(predicted_line(expected_text, written.decode_tokens_per_s))
    say("\n" + _served(folder / "replicated", workers))
    speedup = replicated.tokens_per_s / alone.tokens_per_s
    closing = _closing(workers, speedup, alone, replicated, sharded, gap)
    return Demo(
        model=spec.name,
        total_params=total,
        workers=workers,
        alone=alone,
        replicated=replicated,
        sharded=sharded,
        speedup=speedup,
        largest_loss_gap=gap,
        predicted_state_mib=predicted,
        generated=written,
        picture=str(picture),
        closing=closing,
    )


def _served(folder: Path, workers: int) -> str:
    """One request to the API, by as many workers as trained."""
    layout = serving_layout(dp=workers, ep=workers)
    engine = EngineConfig(str(folder), layout, device="cpu", cache_gib=0.25, threads_per_worker=1)
    asked = {"model": folder.name, "prompt": PROMPT, "max_tokens": 32, "temperature": 0}
    with background_server(engine, ServerOptions(port=0), lambda _: None) as url:
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
    usage, text = answer["usage"], answer["choices"][0]["text"]
    return (
        f"served over {workers} worker(s), each with its share of the experts: POST /v1/completions, "
        f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out: {text!r}"
    )


def demo_table(demo: Demo) -> Table:
    """Speed, memory and loss of the runs, predictions beside measurements."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in (
        "run",
        "tokens/s\npredicted",
        "\nmeasured",
        "speed-up",
        "MFU",
        "state MiB\npredicted",
        "\nmeasured",
        "peak RSS\nGiB",
        "loss",
    ):
        table.add_column(name, justify="left" if name == "run" else "right")
    runs = [("1 worker", demo.alone, "replicated")]
    if demo.sharded is not None:
        runs.append((f"{demo.workers} workers, replicated", demo.replicated, "replicated"))
        runs.append((f"{demo.workers} workers, fully sharded", demo.sharded, "sharded"))
    for label, result, kind in runs:
        table.add_row(
            label,
            _expected(result),
            f"{result.tokens_per_s:,.0f}",
            f"{result.tokens_per_s / demo.alone.tokens_per_s:.2f}",
            f"{result.mfu:.0%}",
            f"{demo.predicted_state_mib[kind]:,.0f}",
            f"{max(result.state_gib) * 1024:,.0f}",
            f"{max(result.memory_gib):.2f}",
            f"{result.loss:.3f} at step {result.steps}",
        )
    return table


def _expected(result: RunResult) -> str:
    found = result.predicted
    return "-" if found is None or found.tokens_per_s is None else f"{found.tokens_per_s:,.0f}"


def _closing(
    workers: int, speedup: float, alone: RunResult, all_: RunResult, sharded: RunResult | None, gap: float
) -> str:
    held_out = "" if all_.validation_loss is None else f"; held-out loss {all_.validation_loss:.2f}"
    if sharded is None:
        speed = f"{alone.tokens_per_s:,.0f} tokens/s"
        return f"One core, one worker: {speed}{held_out}; more cores would add workers."
    share = max(sharded.state_gib) / max(all_.state_gib)
    return (
        f"{workers} workers instead of 1: {alone.tokens_per_s:,.0f} -> {all_.tokens_per_s:,.0f} tokens/s, "
        f"{speedup:.2f} times the speed; sharding cuts each worker's training state to {share:.0%}; "
        f"losses agree within {gap:.1e}{held_out}."
    )


def _curve(label: str, result: RunResult, predicted_mib: float) -> Curve:
    return Curve(
        label=label,
        metrics=read_metrics(Path(result.folder) / "metrics.jsonl"),
        tokens_per_s=result.tokens_per_s,
        state_mib_per_worker=max(result.state_gib) * GIB / 2**20,
        predicted_state_mib_per_worker=predicted_mib,
    )


def _run(folder: Path, name: str, replicas: int, shards: int, steps: int) -> RunConfig:
    return make_run(_config(folder, name, replicas, shards, steps))


def _predict(values: dict[str, Any]) -> Prediction:
    config = make_run(values)
    found = predict(config.model_spec(), config.make_layout(), SEQUENCE_LENGTH, torch.device("cpu"))
    assert found is not None  # the database has CPUs
    return found


def _config(folder: Path, name: str, replicas: int, shards: int, steps: int) -> dict[str, Any]:
    per_worker = GLOBAL_BATCH // (replicas * shards)
    return {
        "model": "v3-mini",
        "layout": {
            "dp_replicate": replicas,
            "dp_shard": shards,
            "micro_batch": min(16, per_worker),
            "global_batch": GLOBAL_BATCH,
        },
        "data": {"sequence_length": SEQUENCE_LENGTH, "max_mib": 16},
        "optimizer": {"learning_rate": 2e-3},
        "schedule": {"warmup_steps": 10},
        # The report's 0.001 a step is for millions of steps; a hundred need a faster hand.
        "loss": {"bias_update_speed": 0.02},
        "train": {"steps": steps, "evaluate_every": 50, "checkpoint_every": 0},
        "device": "cpu",
        "threads_per_worker": 1,
        "out": str(folder / name),
    }
