"""How near `micro_batch: auto` comes to the best of a hand sweep.

    python bench/auto_micro_batch.py [--rounds 1] [--jobs one two sharded]

For each job: `auto` chooses; then every micro-batch there is, with every recomputation that fits, trains a
few steps of its own, round after round in turn. A row's figure is its median over the rounds; printed is the
chosen one's over the best one's. All is printed and written to results/auto_micro_batch.json, which keeps
what it has of other jobs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from record import save

from whalepod.dryrun.auto import POLICIES, Tried, choose, trial
from whalepod.spec.run import make_run

ROOT = Path(__file__).resolve().parents[1]
JOBS: dict[str, dict[str, Any]] = {  # of sequences of 256 tokens, with gibibytes that make the choice matter
    "one": {"layout": {"global_batch": 8}, "memory_gib": 1.45},
    "two": {"layout": {"global_batch": 8, "dp_replicate": 2}, "memory_gib": 1.35},
    "sharded": {"layout": {"global_batch": 8, "dp_shard": 2, "ep": 2}, "memory_gib": 1.15},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "auto_micro_batch.json")
    args = parser.parse_args()
    found = json.loads(args.out.read_text())["jobs"] if args.out.exists() else {}
    for name in args.jobs:
        job = JOBS[name]
        config = make_run(
            {
                "model": "v3-mini",
                "layout": {"micro_batch": "auto", "recompute": "auto", **job["layout"]},
                "data": {"sequence_length": 256},
                "train": {"memory_gib": job["memory_gib"]},
                "threads_per_worker": 1,
                "out": str(ROOT / "runs" / f"auto-{name}"),
            }
        )
        choice = choose(config, restart=True)
        chosen = choice.config.layout.micro_batch, choice.config.layout.recompute
        largest = max(t.micro_batch for t in choice.tried if t.outcome != "too large")
        sizes = [t.micro_batch for t in choice.tried if t.micro_batch <= largest]
        speeds: dict[tuple[int, str], list[float]] = {}
        for _ in range(args.rounds):
            for micro_batch in sorted(set(sizes)):
                for policy in POLICIES:
                    ran = trial(config, Tried(micro_batch, policy, 0.0), largest, choice.memory_gib)
                    if ran.outcome == "fits" and ran.tokens_per_s is not None:
                        speeds.setdefault((micro_batch, policy), []).append(ran.tokens_per_s)
        medians = {key: statistics.median(values) for key, values in speeds.items()}
        best = max(medians, key=medians.__getitem__)
        share = medians[chosen] / medians[best]
        print(
            f"{name}: auto takes {chosen}, {medians[chosen]:,.0f} tokens/s; "
            f"best {best}, {medians[best]:,.0f}: {share:.1%}"
        )
        for (micro_batch, policy), speed in sorted(medians.items()):
            print(f"  {micro_batch:4} {policy:10} {speed:9,.0f}")
        found[name] = {
            "rounds": args.rounds,
            "chosen": chosen,
            "best": best,
            "share_of_best": share,
            "tokens_per_s": [[*key, speed] for key, speed in sorted(medians.items())],
        }
        save(args.out, {"jobs": found})


if __name__ == "__main__":
    main()
