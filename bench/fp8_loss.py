"""What FP8 costs in loss: the same V3-like model trained in BF16 and in FP8, on real text.

    python bench/fp8_loss.py [--arms bf16 bf16-again fp8 fp8-blocks] [--tokens 20.5e6] [--threads 1]
                              [--so-far]

The model has 10.3M active parameters of 36.7M (5 layers, MLA, 16 experts of which a token picks 2 besides
the shared one), the text is Python's standard library, 8,192 tokens a step, the learning rate's shape that
of DeepSeek-V3. Arms:

    bf16         BF16 with FP32 masters, seed 0
    bf16-again   the same with seed 1, other weights and another order of the text: what chance does
    fp8          layout.precision fp8, seed 0: everything else is as in the first
    fp8-blocks   the report's negative case: gradients in blocks of 128 x 128 for the input gradient

An arm takes hours on a CPU, where FP8 is emulated; each is trained when asked for, goes on where it was
stopped, and writes results/fp8_loss/ARM.json when it is done. What is there is then compared: training
losses smoothed as in the report (exponential moving average, 0.9), relative to `bf16` step by step, their
mean over the last tenth, and held-out losses. Prints a table, draws results/fp8_loss.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from record import save

from whalepod.spec.counts import active_params, total_params
from whalepod.spec.run import RunConfig, make_run
from whalepod.train.start import train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "fp8_loss"
MODEL = {
    "preset": "v3-mini",
    "num_hidden_layers": 5,
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 384,
}
SEQUENCES, LENGTH = 32, 256
ARMS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16", "seed": 0},
    "bf16-again": {"precision": "bf16", "seed": 1},
    "fp8": {"precision": "fp8", "seed": 0},
    "fp8-blocks": {"precision": "fp8", "seed": 0, "gradients": "blocks"},
}
SMOOTHING = 0.9


def config_of(arm: str, steps: int, threads: int) -> RunConfig:
    choice = ARMS[arm]
    return make_run(
        {
            "model": MODEL,
            "layout": {
                "precision": choice["precision"],
                "micro_batch": SEQUENCES,
                "global_batch": SEQUENCES,
            },
            "fp8": {"gradients": choice.get("gradients", "tiles")},
            "data": {"sequence_length": LENGTH},
            # Without the report's last phases, of which the first arm, trained before there were any, knew
            # nothing.
            "schedule": {"warmup_steps": min(100, steps // 10), "last_from": 1.0},
            "loss": {"bias_until": 1.0},
            "train": {
                "steps": steps,
                "seed": choice["seed"],
                "evaluate_every": max(1, steps // 10),
                "evaluate_sequences": 512,
                "checkpoint_every": 100,
                "keep_checkpoints": 1,
            },
            "threads_per_worker": threads,
            "out": str(ROOT / "runs" / f"fp8_loss-{arm}-{steps}"),
        }
    )


def record_arm(arm: str, config: RunConfig) -> None:
    """Writes what the arm's run folder holds: all of it, or as far as it came."""
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    spec = config.model_spec()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    save(
        RESULTS / f"{arm}.json",
        {
            "arm": arm,
            "commit": commit.stdout.strip(),
            "threads": config.threads_per_worker,
            "steps_planned": config.train.steps,
            "active_params": active_params(spec),
            "total_params": total_params(spec),
            "tokens": lines[-1]["tokens"],
            "tokens_per_step": SEQUENCES * LENGTH,
            "tokens_per_s": round(statistics.median(x["tokens_per_s"] for x in lines)),
            "skipped_steps": lines[-1]["skipped_steps"],
            "held_out": {
                str(x["step"]): x["validation_loss"] for x in lines if x["validation_loss"] is not None
            },
            "loss": [round(x["loss"], 5) for x in lines],
        },
    )


def smoothed(losses: list[float]) -> list[float]:
    """Exponential moving average, without a bias towards the first value."""
    out, total, weight = [], 0.0, 0.0
    for loss in losses:
        total = SMOOTHING * total + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + 1 - SMOOTHING
        out.append(total / weight)
    return out


def compare() -> dict[str, Any]:
    """Every arm there is beside `bf16`: relative gaps of the smoothed losses, and of the held-out ones."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))}
    base = found.get("bf16")
    if base is None:
        return {}
    reference = smoothed(base["loss"])
    table = {}
    for arm, values in found.items():
        steps = min(len(reference), len(values["loss"]))
        gaps = [b / a - 1 for a, b in zip(reference[:steps], smoothed(values["loss"])[:steps], strict=True)]
        last = gaps[-max(1, steps // 10) :]
        ends = [float(x["held_out"][str(steps)]) for x in (values, base) if str(steps) in x["held_out"]]
        table[arm] = {
            "tokens": values["tokens"],
            "final_loss_smoothed": smoothed(values["loss"])[-1],
            "gap_last_tenth_mean": statistics.mean(last),
            "gap_last_tenth_largest": max(last, key=abs),
            "held_out": ends[0] if ends else None,
            "held_out_gap": ends[0] / ends[1] - 1 if len(ends) == 2 else None,
            "tokens_per_s": values["tokens_per_s"],
            "gaps": gaps,
        }
    return table


def show(table: dict[str, Any]) -> None:
    print(f"\n{'':12}{'tokens':>12}{'loss':>9}{'gap to bf16':>13}{'largest':>10}{'held out':>10}{'gap':>9}")
    for arm, row in table.items():
        held = f"{row['held_out']:10.4f}" if row["held_out"] is not None else f"{'-':>10}"
        held_gap = f"{row['held_out_gap']:9.3%}" if row["held_out_gap"] is not None else f"{'-':>9}"
        print(
            f"{arm:12}{row['tokens']:12,}{row['final_loss_smoothed']:9.4f}{row['gap_last_tenth_mean']:13.3%}"
            f"{row['gap_last_tenth_largest']:10.3%}{held}{held_gap}"
        )
    print("loss, gap, largest: training loss smoothed by 0.9; gaps over the last tenth of the steps")


def draw(table: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for arm, row in table.items():
        values = json.loads((RESULTS / f"{arm}.json").read_text())
        tokens = [values["tokens_per_step"] * (i + 1) / 1e6 for i in range(len(values["loss"]))]
        top.plot(tokens, smoothed(values["loss"]), label=arm, linewidth=1)
        if arm != "bf16":
            below.plot(tokens[: len(row["gaps"])], [100 * g for g in row["gaps"]], label=arm, linewidth=1)
    top.set_ylabel("loss, nats per token (smoothed 0.9)")
    top.set_yscale("log")
    top.legend()
    below.axhspan(-0.25, 0.25, color="tab:green", alpha=0.15, label="0.25 %, the report's bound")
    below.set_ylim(-2, 2)
    below.set_ylabel("% above bf16")
    below.set_xlabel("million tokens")
    below.legend()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tokens", type=float, default=20.5e6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--so-far", action="store_true", help="train nothing, record what was begun")
    args = parser.parse_args()
    steps = max(10, round(args.tokens / (SEQUENCES * LENGTH)))
    for arm in args.arms:
        config = config_of(arm, steps, args.threads)
        if not args.so_far:
            train(config)
        elif not (Path(config.out) / "metrics.jsonl").exists():
            continue
        record_arm(arm, config)
    table = compare()
    show(table)
    if table:
        draw(table, ROOT / "results" / "fp8_loss.png")
        summary = {a: {k: v for k, v in row.items() if k != "gaps"} for a, row in table.items()}
        save(ROOT / "results" / "fp8_loss.json", {"arms": summary})


if __name__ == "__main__":
    main()
