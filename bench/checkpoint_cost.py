"""What a checkpoint costs the training it interrupts: blocks of steps without one, with one in the
background, and with one that training waits for.

    python bench/checkpoint_cost.py [--rounds 5] [--steps 6] [--model v3-bench] [--threads 2]

One process trains the model of bench/train_peers.py (105.6 M parameters, BF16 with FP32 masters and moments:
a checkpoint of 1.3 GB) with the trainer's own steps. A round is a block of each arm. An arm's checkpoint
begins before its block's first step and must be whole on the disk before the block ends, so a block pays for
the copy, the writing beside the steps, CRC-32 and fsync. Costs are differences within a round, medians over
rounds.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from record import save

from whalepod.parallel.mesh import open_mesh
from whalepod.spec.run import make_run
from whalepod.train.loop import Trainer
from whalepod.train.start import prepare_data

ARMS = ("none", "background", "waited for")
SENSIBLE_STEPS = 100  # the default of train.checkpoint_every
BOUND = 0.03


def block(trainer: Trainer, steps: int, arm: str) -> tuple[float, float]:
    """Seconds of a block, and how long training stood still before its first step."""
    start = time.perf_counter()
    checkpoints = trainer.checkpoints
    if arm != "none":
        checkpoints.start(trainer.progress, background=arm == "background")
        if arm == "waited for":
            checkpoints.finish()
    stood_s = time.perf_counter() - start
    for _ in range(steps):
        trainer.step()
        trainer.progress = replace(trainer.progress, step=trainer.progress.step + 1)
        checkpoints.settle([checkpoints.status])
    checkpoints.finish()
    return time.perf_counter() - start, stood_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model", default="v3-bench")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to write to; the default is a temporary one")
    parser.add_argument("--out", type=Path, default=Path("results/checkpoint_cost.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    config = make_run(
        {
            "model": options.model,
            "layout": {"micro_batch": 4, "global_batch": 4, "precision": "bf16"},
            "data": {"source": "stdlib", "sequence_length": 512},
            "train": {"keep_checkpoints": 1},
            "device": "cpu",
            "out": str(folder),
        }
    )
    try:
        with open_mesh(config.make_layout(), torch.device("cpu")) as mesh:
            spec = config.model_spec()
            trainer = Trainer(config, spec, prepare_data(config, spec)[1], mesh)
            block(trainer, 2, "none")
            block(trainer, 1, "background")  # the copy's memory is made once
            seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
            stood: dict[str, list[float]] = {arm: [] for arm in ARMS}
            for number in range(options.rounds):
                for arm in ARMS[number % 3 :] + ARMS[: number % 3]:
                    spent, still = block(trainer, options.steps, arm)
                    seconds[arm].append(spent)
                    stood[arm].append(still)
            size = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
            assert trainer.checkpoints.failures == 0
    finally:
        shutil.rmtree(folder)
    step_s = statistics.median(seconds["none"]) / options.steps
    rows = []
    for arm in ARMS[1:]:
        costs = [with_ - without for with_, without in zip(seconds[arm], seconds["none"], strict=True)]
        cost = statistics.median(costs)
        rows.append(
            {
                "arm": arm,
                "cost_s": cost,
                "cost_s_min": min(costs),
                "cost_s_max": max(costs),
                "stands_still_s": statistics.median(stood[arm]),
                "share_at_every_100_steps": cost / (SENSIBLE_STEPS * step_s),
                "steps_between_for_3_percent": cost / (BOUND * step_s),
            }
        )
    save(
        options.out,
        {
            "model": options.model,
            "threads": options.threads,
            "rounds": options.rounds,
            "steps_per_block": options.steps,
            "checkpoint_gb": size / 1e9,
            "step_s": step_s,
            "arms": rows,
        },
    )
    print(f"{options.model}: a step {step_s:.2f} s, a checkpoint {size / 1e9:.2f} GB")
    titles = ("cost s", "(min to max)", "stands still s", "at every 100 steps")
    print("{:12} {:>7} {:>16} {:>15} {:>19}".format("checkpoint", *titles))
    for row in rows:
        spread = f"({row['cost_s_min']:.2f} to {row['cost_s_max']:.2f})"
        print(
            f"{row['arm']:12} {row['cost_s']:7.2f} {spread:>16} {row['stands_still_s']:15.2f} "
            f"{row['share_at_every_100_steps']:19.2%}   3 % at every {row['steps_between_for_3_percent']:.0f}"
        )


if __name__ == "__main__":
    main()
