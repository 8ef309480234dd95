"""Training speed: whalepod beside transformers, one V3-like model, BF16, interleaved step by step.

    python bench/train_peers.py [--rounds 12] [--threads 2] [--out results/train_peers.json]

Every arm starts from the same weights and reads the same batches (4 x 512 tokens of Python's standard
library). A round is one optimiser step of each arm (forward, backward, clipping, fused AdamW) and one
measurement of the machine's BF16 matrix peak; ratios are taken within a round, medians over rounds.
whalepod keeps FP32 masters and FP32 gradient sums. transformers is tried with each of its experts
implementations, both with weights, gradients and moments all in BF16 (less memory traffic, and less
accurate than what whalepod does) and with FP32 weights under autocast; a short heat picks the fastest. On a
processor without BF16 instructions every arm gets the products of `precision/widened.py`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import save

from whalepod.models.transformer import Transformer, init_weights
from whalepod.parallel.mesh import make_mesh
from whalepod.parallel.parallelize import parallelize, seeded
from whalepod.precision.widened import widen_products
from whalepod.spec.counts import train_flops
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec, to_config
from whalepod.spec.presets import load_model_spec
from whalepod.text.tokenizer import train_tokenizer
from whalepod.train.data import PackedTokens
from whalepod.train.metrics import measure_peak_flops
from whalepod.train.prepare import prepare

BATCH, LENGTH = 4, 512
Step = Callable[[torch.Tensor], float]


def whalepod_arm(spec: ModelSpec) -> Step:
    mesh = make_mesh(Layout(micro_batch=BATCH, global_batch=BATCH), torch.device("cpu"))
    with torch.device("meta"):
        model = Transformer(spec)
    parallel = parallelize(model, mesh, LENGTH, seeded(model.spec, 0))
    parallel.train()
    state = parallel.state
    optimizer = torch.optim.AdamW([*state.decayed, *state.plain], lr=1e-4, fused=True)

    def step(rows: torch.Tensor) -> float:
        losses = parallel.backward(rows, BATCH * LENGTH, mtp_weight=0.0)
        parallel.clip(1.0)
        optimizer.step()
        state.write_back()
        return losses[0].item()

    return step


def transformers_arm(spec: ModelSpec, experts: str, pure_bf16: bool) -> Step:
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(**to_config(spec))
    model: Any = AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", experts_implementation=experts, dtype=torch.float32
    )
    own = Transformer(spec)
    init_weights(own, 0)
    weights = {}
    for name, tensor in own.state_dict().items():
        theirs = name if name.startswith("lm_head") else f"model.{name}"
        if name.endswith((".experts.gate_up", ".experts.down")):
            theirs += "_proj"
        weights[theirs] = tensor.flatten(1, 2) if name.endswith(".gate_up") else tensor
    model.load_state_dict(weights)
    model.train()
    if pure_bf16:
        model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(rows: torch.Tensor) -> float:
        context = nullcontext() if pure_bf16 else torch.autocast("cpu", torch.bfloat16)
        with context:
            logits = model(rows[:, :LENGTH], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1 : LENGTH + 1].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def fastest_transformers(spec: ModelSpec, batches: PackedTokens) -> tuple[str, Step, dict[str, float]]:
    """Six steps of every variant; the fastest one's name and a fresh arm of it.

    `batched_mm` is left out: it copies an expert's weights for every token and needs over 24 GiB here.
    """
    speeds: dict[str, float] = {}
    variants: dict[str, tuple[str, bool]] = {
        f"{experts}, {'all BF16' if pure else 'autocast'}": (experts, pure)
        for experts in ("grouped_mm", "eager")
        for pure in (True, False)
    }
    for name, (experts, pure) in variants.items():
        step = transformers_arm(spec, experts, pure)
        seconds = [timed(step, rows_of(batches, i))[0] for i in range(6)]
        speeds[name] = BATCH * LENGTH / min(seconds)
        print(f"  transformers {name}: {speeds[name]:,.0f} tokens/s")
    best = max(speeds, key=lambda name: speeds[name])
    return best, transformers_arm(spec, *variants[best]), speeds


def rows_of(batches: PackedTokens, index: int) -> torch.Tensor:
    return torch.from_numpy(batches.batch(index, BATCH))


def timed(step: Step, rows: torch.Tensor) -> tuple[float, float]:
    start = time.perf_counter()
    loss = step(rows)
    return time.perf_counter() - start, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/train_peers.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    widened = widen_products()
    if widened:
        print("no BF16 instructions here: every arm gets our FP32 products in place of torch's loops")
    import transformers

    transformers.logging.set_verbosity_error()
    spec = load_model_spec("v3-bench")
    tokenizer = train_tokenizer("stdlib", spec.vocab_size)
    batches = PackedTokens(prepare("stdlib", tokenizer).train.path, LENGTH, seed=0)
    flops = train_flops(spec, LENGTH).total
    print(f"{spec.name}: {BATCH} x {LENGTH} tokens a step, {flops / 1e6:.1f} model MFLOP a token; heats:")
    best, theirs, heats = fastest_transformers(spec, batches)
    arms = {"whalepod": whalepod_arm(spec), f"transformers ({best})": theirs}
    for warm in range(2):
        for step in arms.values():
            step(rows_of(batches, 100 + warm))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    losses: dict[str, list[float]] = {name: [] for name in arms}
    peaks: list[float] = []
    for index in range(options.rounds):
        peaks.append(measure_peak_flops(torch.device("cpu"), torch.bfloat16, 0.2))
        for name, step in arms.items():
            spent, loss = timed(step, rows_of(batches, index))
            seconds[name].append(spent)
            losses[name].append(loss)
    peak = statistics.median(peaks)
    ours, other = seconds.values()
    ratios = sorted(b / a for a, b in zip(ours, other, strict=True))
    rows = [
        {
            "arm": name,
            "tokens_per_s": BATCH * LENGTH / statistics.median(values),
            "fastest_tokens_per_s": BATCH * LENGTH / min(values),
            "peak_share": flops * BATCH * LENGTH / statistics.median(values) / peak,
            "last_loss": losses[name][-1],
        }
        for name, values in seconds.items()
    ]
    result = {
        "threads": options.threads,
        "bf16_products_in_fp32": widened,
        "transformers": transformers.__version__,
        "rounds": options.rounds,
        "peak_bf16_gflop_per_s": peak / 1e9,
        "arms": rows,
        "ratio_median": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "heats_tokens_per_s": heats,
    }
    save(options.out, result)
    print(f"\nmeasured BF16 matrix peak: {peak / 1e9:,.0f} GFLOP/s")
    for row in rows:
        print(
            f"{row['arm']:46} {row['tokens_per_s']:8,.0f} tokens/s   {row['peak_share']:6.1%} of peak   "
            f"loss {row['last_loss']:.3f}"
        )
    print(
        f"whalepod is {result['ratio_median']:.2f} times as fast (median of {options.rounds} rounds, "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
