"""The planner's memory beside the dry run's at true size, for our own software.

    python bench/plan_vs_dryrun.py [--only v2-lite]

A row is one rank of one layout: tensors at the peak of its step as the formulas say and as the program itself
makes them on fake devices. Times nothing. Prints each row with its ratio, then the median and the largest
error, and writes results/plan_vs_dryrun.json.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from record import save

from whalepod.dryrun.roles import dry_run
from whalepod.spec.counts import GIB
from whalepod.spec.hardware import parse_gpus
from whalepod.spec.run import make_run

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("workspace", "fragmentation", "overhead")
LITE: dict[str, Any] = {"ep": 4, "dp_shard": 8, "zero": 3, "micro_batch": 1, "global_batch": 64}
PIPED: dict[str, Any] = {**LITE, "pp": 2, "dp_shard": 4}
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("deepseek-v2-lite", "8xH100", {**axes, "recompute": recompute})
    for axes in (
        LITE,
        {**LITE, "tp": 2, "dp_shard": 4},
        PIPED,
        {**PIPED, "tp": 2, "dp_shard": 2, "ep": 2},
        {**PIPED, "schedule": "zbv", "zero": 1},
        {**PIPED, "schedule": "interleaved"},
    )
    for recompute in ("none", "selective", "full")
] + [
    ("deepseek-v2", "64xH100", {**LITE, "ep": 32, "dp_shard": 64, "recompute": "full"}),
    (
        "deepseek-v2",
        "64xH100",
        {**PIPED, "pp": 4, "ep": 16, "dp_shard": 16, "recompute": "selective"},
    ),
    (
        "deepseek-v3",
        "2048xH800",
        {**LITE, "ep": 64, "dp_shard": 2048, "global_batch": 2048, "recompute": "full"},
    ),
    (
        "deepseek-v3",
        "2048xH800",
        {
            **PIPED,
            "pp": 4,
            "tp": 2,
            "ep": 64,
            "dp_shard": 256,
            "global_batch": 3840,
            "recompute": "selective",
        },
    ),
]


def measure(model: str, gpus: str, layout: dict[str, Any]) -> dict[str, Any]:
    run = make_run({"model": model, "layout": layout, "data": {"sequence_length": 4096}})
    found = dry_run(run, parse_gpus(gpus), roles="first")
    planned = {k: v for k, v in found.plan.memory_by_rank[0].items() if k not in OUTSIDE and v}
    role = found.roles[0]
    return {
        "model": model,
        "layout": layout,
        "planned_gib": sum(planned.values()),
        "dry_gib": role.peak / GIB,
        "planned": planned,
        "dry": {name: size / GIB for name, size in role.categories.items()},
        "peak_at": role.peak_at,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="models whose names contain this")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "plan_vs_dryrun.json")
    args = parser.parse_args()
    rows = []
    for model, gpus, layout in ROWS:
        if args.only not in model:
            continue
        row = measure(model, gpus, layout)
        rows.append(row)
        axes = " ".join(f"{k} {v}" for k, v in layout.items() if k not in ("micro_batch", "global_batch"))
        ratio = row["planned_gib"] / row["dry_gib"]
        print(
            f"{model:17} {axes:62} {row['planned_gib']:6.2f} {row['dry_gib']:6.2f} {ratio:5.2f}", flush=True
        )
    errors = [abs(row["planned_gib"] / row["dry_gib"] - 1) for row in rows]
    print(
        f"off by {statistics.median(errors):.1%} in the median, {max(errors):.1%} at most, {len(rows)} rows"
    )
    save(args.out, {"command": "python bench/plan_vs_dryrun.py", "rows": rows})


if __name__ == "__main__":
    main()
