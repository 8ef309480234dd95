"""What a second worker brings in data parallelism: one core each, equal global batch, interleaved.

    python bench/workers.py [--rounds 3] [--steps 8] [--global-batch 64] [--out results/workers.json]

Trains v3-mini on Python's standard library, in turn on one worker and on two (replicated), for a few steps
each. Speeds are tokens per second of the median step; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from datetime import date
from pathlib import Path

from whalepod.spec.run import make_run
from whalepod.train.loop import RunResult
from whalepod.train.start import train


def run(workers: int, steps: int, global_batch: int, out: Path) -> RunResult:
    values = {
        "model": "v3-mini",
        "layout": {"dp_replicate": workers, "micro_batch": 16, "global_batch": global_batch},
        "data": {"sequence_length": 256, "max_mib": 16},
        "loss": {"bias_update_speed": 0.02},
        "train": {"steps": steps, "evaluate_every": 0, "checkpoint_every": 0, "evaluate_sequences": 32},
        "device": "cpu",
        "threads_per_worker": 1,
        "out": str(out),
    }
    return train(make_run(values), quiet=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--global-batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("results/workers.json"))
    options = parser.parse_args()
    rows = []
    for index in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            one, two = (run(n, options.steps, options.global_batch, Path(folder) / str(n)) for n in (1, 2))
        assert abs(one.loss - two.loss) < 2e-3 * one.loss, "the runs must be the same run"
        rows.append(
            {"one": one.tokens_per_s, "two": two.tokens_per_s, "ratio": two.tokens_per_s / one.tokens_per_s}
        )
        print(
            f"round {index + 1}: tokens/s {one.tokens_per_s:,.0f} and {two.tokens_per_s:,.0f}, "
            f"{rows[-1]['ratio']:.2f} times; last loss {one.loss:.6f} and {two.loss:.6f}"
        )
    median = statistics.median(row["ratio"] for row in rows)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, one core a worker",
        "global_batch_sequences": options.global_batch,
        "rounds": rows,
        "ratio_median": median,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1))
    print(f"two workers: {median:.2f} times one (median of {options.rounds} rounds)")


if __name__ == "__main__":
    main()
