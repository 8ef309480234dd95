"""How far predictions of serving can be trusted here: predicted against measured, of small models.

    whalepod calibrate && python bench/serve_trust.py [--models v3-mini wide] [--layouts one tp ep dp]

Every row is a closed loop of requests through the engine (`serve/fleet.py`) on one worker or two, with one
core each: prompts of 256 random tokens, answers of 48, one request in flight or eight, no HTTP, so that no
client takes a core. `wide` has DeepSeek's own latent widths. Predicted beside measured stand output tokens/s,
time per output token and time to first token (medians over requests); last come the medians of the errors.
All is printed and written to results/serve_trust.json.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from record import save
from torch.distributed.elastic.multiprocessing.errors import record

from whalepod.models.transformer import initial_value
from whalepod.parallel.inference import spread
from whalepod.parallel.mesh import local_device, open_mesh
from whalepod.parallel.parallelize import DTYPES
from whalepod.serve import native
from whalepod.serve.core import PAGE_SIZE, CoreConfig
from whalepod.serve.fleet import Fleet
from whalepod.serve.generate import usual_dtype
from whalepod.serve.predict import predict
from whalepod.serve.request import Request
from whalepod.serve.start import EngineConfig, serving_layout
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec
from whalepod.spec.presets import load_model_spec
from whalepod.train.start import compile_once, start_workers, take_cores

ROOT = Path(__file__).resolve().parents[1]
MODELS: dict[str, dict[str, Any]] = {
    "v3-mini": {},
    "wide": {
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "moe_intermediate_size": 512,
        "num_hidden_layers": 4, "num_attention_heads": 8, "n_routed_experts": 32, "n_group": 1,
        "topk_group": 1, "q_lora_rank": 512, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128,
    },
}  # fmt: skip
LAYOUTS: dict[str, dict[str, int]] = {"one": {}, "tp": {"tp": 2}, "ep": {"dp": 2, "ep": 2}, "dp": {"dp": 2}}
CONCURRENCY = (1, 8)
FIGURES = ("output_tokens_per_s", "tpot_ms", "ttft_ms")


def spec_of(model: str) -> ModelSpec:
    return load_model_spec("v3-mini").with_(**MODELS[model], num_nextn_predict_layers=0)


@record
def worker(
    model: str, layout: Layout, prompt: int, new: int, rounds: int, threads: int | None
) -> list[dict[str, float]]:
    """This rank's part; the first one's answer has a point for each concurrency."""
    take_cores(threads)
    spec = spec_of(model)
    dtype = usual_dtype(spec, "cpu")
    with open_mesh(layout, local_device("cpu")) as mesh:
        inference = spread(
            spec, mesh, DTYPES[dtype], lambda name, box: initial_value(name, box.whole, spec, 0, box.slices)
        )
        for part in inference.stages.values():
            native.use(part)
        pages = max(CONCURRENCY) * (-(-(prompt + new) // PAGE_SIZE) + 1)
        fleet = Fleet(inference, CoreConfig(2 * pages))
        if not mesh.is_first:
            fleet.follow()
            return []
        drive(fleet, spec, 1, 1, prompt, new)
        found = [drive(fleet, spec, c, rounds * c, prompt, new) for c in CONCURRENCY]
        fleet.stop()
        return found


def drive(
    fleet: Fleet, spec: ModelSpec, concurrency: int, requests: int, prompt: int, new: int
) -> dict[str, float]:
    """So many requests, so many of them in flight."""
    draw = random.Random(f"{concurrency} {requests}")
    began: dict[int, float] = {}
    first: dict[int, float] = {}
    ends: dict[int, float] = {}

    def ask() -> None:
        job = fleet.add(Request(tuple(draw.choices(range(spec.vocab_size), k=prompt)), new))
        began[job.number] = time.perf_counter()

    start = time.perf_counter()
    for _ in range(min(concurrency, requests)):
        ask()
    while not fleet.is_idle:
        for job in fleet.step():
            now = time.perf_counter()
            first.setdefault(job.number, now)
            if job.reason is not None:
                ends[job.number] = now
                if len(began) < requests:
                    ask()
    return {
        "output_tokens_per_s": requests * new / (time.perf_counter() - start),
        "tpot_ms": 1e3 * statistics.median((ends[n] - first[n]) / (new - 1) for n in ends),
        "ttft_ms": 1e3 * statistics.median(first[n] - began[n] for n in ends),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "serve_trust.json")
    args = parser.parse_args()
    compile_once(lambda *_: None)
    rows: list[dict[str, Any]] = []
    for model in args.models:
        spec = spec_of(model)
        for name in args.layouts:
            layout = serving_layout(**LAYOUTS[name])
            asked = (model, layout, args.prompt, args.new, args.rounds)
            points = start_workers(layout.num_devices, 1, worker, *asked)[0]
            config = EngineConfig("", layout, device="cpu", threads_per_worker=1)
            for concurrency, measured in zip(CONCURRENCY, points, strict=True):
                load = [(args.prompt, args.new)] * (args.rounds * concurrency)
                expected = predict(config, spec, load, concurrency)
                predicted = {figure: expected.as_dict()[figure] for figure in FIGURES}
                ratio = {figure: predicted[figure] / measured[figure] for figure in FIGURES}
                rows.append(
                    {
                        "model": model,
                        "layout": name,
                        "workers": layout.num_devices,
                        "concurrency": concurrency,
                    }
                    | {"predicted": predicted, "measured": measured, "predicted_over_measured": ratio}
                )
                print(f"{model:8} {name:4} {concurrency} in flight", end="")
                for figure in FIGURES:
                    print(f"  {figure} {predicted[figure]:.4g} / {measured[figure]:.4g}", end="")
                    print(f" = {ratio[figure]:.2f}", end="")
                print(flush=True)
    errors = {}
    for figure in FIGURES:
        off = {n: [abs(r["predicted_over_measured"][figure] - 1) for r in rows if r["workers"] in n]
               for n in ((1, 2), (1,), (2,))}  # fmt: skip
        errors[figure] = {
            "median": statistics.median(off[1, 2]),
            "largest": max(off[1, 2]),
            "median_one_worker": statistics.median(off[(1,)]) if off[(1,)] else None,
            "median_two_workers": statistics.median(off[(2,)]) if off[(2,)] else None,
        }
        said = errors[figure]
        print(f"{figure}: off by {said['median']:.1%} in the median, {said['largest']:.1%} at most", end="")
        for workers in ("one_worker", "two_workers"):
            if said[f"median_{workers}"] is not None:
                print(f"; {workers.replace('_', ' ')} {said[f'median_{workers}']:.1%}", end="")
        print()
    command = shlex.join(["python", "bench/serve_trust.py", *sys.argv[1:]])
    save(args.out, {"command": command, "errors": errors, "rows": rows})


if __name__ == "__main__":
    main()
