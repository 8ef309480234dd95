"""How far the planner can be trusted here: predicted against measured, of small models under many layouts.

    whalepod calibrate && python bench/trust.py [--steps 9] [--models v3-mini wide] [--layouts one dp ...]
    ... --precision fp32 --tokens 2048           # on a CPU without BF16 products, where those take minutes

Every row is a `whalepod train` of a few steps, on one worker or two, each with one core: its predicted and
measured step time (median), tensors in memory at the peak of a step, and bytes by axis, as the command itself
prints them. Ends with the median and largest error of each. All is printed and written to results/trust.json.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import save

from whalepod.report.prediction import compared
from whalepod.spec.run import make_run
from whalepod.train.start import train

ROOT = Path(__file__).resolve().parents[1]
MODELS: dict[str, dict[str, Any]] = {
    "v3-mini": {"model": "v3-mini", "data": {"sequence_length": 256}},
    "long": {"model": "v3-mini", "data": {"sequence_length": 1024}},
    "wide": {
        "model": {"preset": "v3-mini", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4},
        "data": {"sequence_length": 256},
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {  # micro_batch: of 32 sequences
    "one": {},
    "small passes": {"micro_batch": 4},
    "recompute": {"recompute": "full"},
    "dp": {"dp_replicate": 2},
    "fsdp": {"dp_shard": 2},
    "zero 1": {"dp_shard": 2, "zero": 1},
    "tp": {"tp": 2},
    "ep": {"dp_shard": 2, "ep": 2},
    "cp": {"cp": 2},
    "pp": {"pp": 2, "micro_batch": 4},
    "zbv": {"pp": 2, "schedule": "zbv", "micro_batch": 4},
}


def measure(model: str, layout: str, steps: int, precision: str, tokens: int) -> dict[str, Any]:
    values = MODELS[model]
    sequences = tokens // values["data"]["sequence_length"]
    where = {"micro_batch": 16, "global_batch": sequences, "precision": precision, **LAYOUTS[layout]}
    where["micro_batch"] = max(1, where["micro_batch"] * sequences // 32)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(
            {
                **values,
                "layout": where,
                "train": {"steps": steps, "evaluate_every": 0, "checkpoint_every": 0},
                "threads_per_worker": 1,
                "out": folder + "/run",
            }
        )
        result = train(run, quiet=True)
    return {"model": model, "layout": layout, "rows": [asdict(row) for row in compared(result)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "trust.json")
    args = parser.parse_args()
    runs, errors = [], {"step": [], "memory": [], "bytes": []}
    for model in args.models:
        for layout in args.layouts:
            run = measure(model, layout, args.steps, args.precision, args.tokens)
            runs.append(run)
            print(f"{model:8} {layout:13}", end="")
            for row in run["rows"]:
                kind = "bytes" if row["what"].startswith("sent") else row["what"].split(",")[0]
                if kind not in errors or not row["measured"]:
                    continue
                ratio = row["predicted"] / row["measured"]
                errors[kind].append(abs(ratio - 1))
                print(f"  {row['what']} {row['predicted']:.3g} / {row['measured']:.3g} = {ratio:.2f}", end="")
            print(flush=True)
    summary = {
        kind: {"median": statistics.median(values), "largest": max(values), "rows": len(values)}
        for kind, values in errors.items()
        if values
    }
    for kind, figures in summary.items():
        print(
            f"{kind}: off by {figures['median']:.1%} in the median, {figures['largest']:.1%} at most, "
            f"{figures['rows']} rows"
        )
    save(
        args.out,
        {"command": shlex.join(["python", "bench/trust.py", *sys.argv[1:]]), "errors": summary, "runs": runs},
    )


if __name__ == "__main__":
    main()
