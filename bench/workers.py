"""What a second worker brings in data parallelism: one core each, equal global batch, interleaved.

    python bench/workers.py [--rounds 3] [--steps 8] [--global-batch 64] [--out results/workers.json]

Trains v3-mini on Python's standard library, in turn on one worker, on two (replicated), and as two runs of
one worker at the same time that never speak to each other, a few steps each. The last is what this machine's
cores give at most. Speeds are tokens per second of the median step;
ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
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


def pinned(core: int, steps: int, global_batch: int, out: Path) -> float:
    os.sched_setaffinity(0, {core})
    return run(1, steps, global_batch, out / f"apart{core}").tokens_per_s


def apart(steps: int, global_batch: int, out: Path) -> float:
    """Joint tokens per second of two runs at the same time, each on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(pinned, core, steps, global_batch, out) for core in cores]
        return sum(r.result() for r in runs)


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
            both = apart(options.steps, options.global_batch, Path(folder))
        assert abs(one.loss - two.loss) < 2e-3 * one.loss, "the runs must be the same run"
        rows.append(
            {
                "one": one.tokens_per_s,
                "two": two.tokens_per_s,
                "apart": both,
                "ratio": two.tokens_per_s / one.tokens_per_s,
                "ceiling": both / one.tokens_per_s,
            }
        )
        print(
            f"{index + 1}: tokens/s {one.tokens_per_s:,.0f}, {two.tokens_per_s:,.0f}, apart {both:,.0f}, "
            f"{rows[-1]['ratio']:.2f} times, at most {rows[-1]['ceiling']:.2f}; last loss {one.loss:.6f} and "
            f"{two.loss:.6f}"
        )
    median, ceiling = (statistics.median(row[key] for row in rows) for key in ("ratio", "ceiling"))
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, one core a worker",
        "global_batch_sequences": options.global_batch,
        "rounds": rows,
        "ratio_median": median,
        "ceiling_median": ceiling,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1))
    print(
        f"two workers: {median:.2f} times one, of at most {ceiling:.2f} (medians of {options.rounds} rounds)"
    )


if __name__ == "__main__":
    main()
