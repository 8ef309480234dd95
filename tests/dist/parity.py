"""The parity table: one optimiser step under every layout equals the step of one device.

    python tests/dist/parity.py          runs all of it and writes docs/parity.md

`LAYOUTS` lists the layouts by number of ranks; every one runs with every model that it fits, in real
processes over the CPU backend, in float32. What is compared: the losses, every gradient (each rank's
part against the same part of the single device's), the norm, the experts' loads, and the held-out loss
after the optimiser's step.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from harness import run_ranks

from whalepod.models.transformer import Transformer
from whalepod.parallel.mesh import Mesh, make_mesh, open_world
from whalepod.parallel.parallelize import parallelize, seeded
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec
from whalepod.spec.presets import load_model_spec
from whalepod.spec.run import LoRAConfig
from whalepod.train.balance import balance_step, set_balance_weight

LENGTH, BATCH, SEED = 32, 8, 3
MTP_WEIGHT, BALANCE = 0.3, 0.01
LOSS_TOLERANCE, GRADIENT_TOLERANCE, NEXT_TOLERANCE = 1e-6, 1e-4, 1e-5

_SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 256,
}
_EXPERTS = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
_LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}


def models() -> dict[str, ModelSpec]:
    """V3-like: sigmoid router with selection bias, compressed queries, MTP. V2-like: softmax router,
    plain queries. dense: grouped-query attention, head and embedding one weight."""
    v2 = load_model_spec("deepseek-v2-lite").with_(**_SMALL, **_LATENT, **_EXPERTS)
    dense = load_model_spec("deepseek-r1-distill-qwen-1.5b").with_(
        **_SMALL, num_key_value_heads=4, head_dim=16
    )
    return {
        "V3-like": load_model_spec("v3-mini").with_(**_SMALL, **_LATENT, **_EXPERTS, q_lora_rank=32),
        "V2-like": v2.with_(topk_method="group_limited_greedy"),
        "dense": replace(dense, tie_word_embeddings=True),
    }


def _two_hop(**axes: Any) -> dict[str, Any]:
    return axes | {"exchange": "two_hop", "devices_per_node": 2}


LAYOUTS: dict[int, list[dict[str, Any]]] = {
    # every axis alone, every ZeRO stage, every schedule, every policy; `ep` needs devices to share
    2: [
        {"dp_replicate": 2},
        {"dp_shard": 2, "zero": 1},
        {"dp_shard": 2, "zero": 2},
        {"dp_shard": 2, "zero": 3},
        {"cp": 2},
        {"tp": 2},
        {"pp": 2},
        {"pp": 2, "schedule": "gpipe"},
        {"pp": 2, "schedule": "interleaved"},
        {"pp": 2, "schedule": "interleaved_zero_bubble"},
        {"pp": 2, "schedule": "zbv"},
        {"pp": 2, "schedule": "dualpipev"},
        {"pp": 2, "stage_layers": (3, 1)},
        {"dp_shard": 2, "ep": 2},
        {"cp": 2, "ep": 2},
        {"tp": 2, "ep": 2},
        {"tp": 2, "recompute": "full"},
        {"tp": 2, "ep": 2, "recompute": "selective"},
        {"tp": 2, "ep": 2, "exchange": "flat"},
        {"pp": 2, "recompute": "selective"},
        {"pp": 2, "schedule": "zbv", "recompute": "selective"},
        {"pp": 2, "schedule": "dualpipev", "recompute": "full"},
        {"pp": 2, "schedule": "interleaved", "recompute": "full"},
        {"dp_shard": 2, "ep": 2, "recompute": "selective"},
    ],
    # all pairs, and protocols
    4: [
        {"tp": 4},
        {"cp": 4},
        {"pp": 4},
        {"dp_shard": 4, "ep": 2},
        {"dp_replicate": 2, "dp_shard": 2},
        {"dp_replicate": 2, "cp": 2},
        {"dp_replicate": 2, "tp": 2},
        {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
        {"dp_replicate": 2, "pp": 2},
        {"dp_shard": 2, "cp": 2},
        {"dp_shard": 2, "tp": 2},
        {"dp_shard": 2, "pp": 2},
        {"cp": 2, "tp": 2},
        {"cp": 2, "pp": 2},
        {"tp": 2, "pp": 2, "schedule": "interleaved_zero_bubble", "recompute": "selective"},
        {"tp": 2, "ep": 2, "pp": 2, "schedule": "zbv"},
        {"dp_shard": 2, "ep": 2, "pp": 2},
        {"dp_shard": 2, "pp": 2, "schedule": "dualpipev"},
        {"dp_shard": 2, "ep": 2, "pp": 2, "schedule": "zbv", "zero": 1},
        {"dp_shard": 4, "ep": 4, "exchange": "flat"},
        _two_hop(dp_shard=4, ep=4),
        _two_hop(dp_shard=2, tp=2, ep=4, recompute="selective"),
    ],
    # triples and four at once
    8: [
        {"pp": 2, "dp_replicate": 2, "dp_shard": 2},
        {"pp": 2, "dp_replicate": 2, "cp": 2},
        {"pp": 2, "dp_replicate": 2, "tp": 2, "schedule": "zbv"},
        {"pp": 2, "dp_shard": 2, "cp": 2},
        {"pp": 2, "dp_shard": 2, "tp": 2, "schedule": "interleaved"},
        {"pp": 2, "cp": 2, "tp": 2, "recompute": "selective"},
        {"dp_replicate": 2, "dp_shard": 2, "cp": 2},
        {"dp_replicate": 2, "dp_shard": 2, "tp": 2},
        {"dp_shard": 2, "cp": 2, "tp": 2, "zero": 2},
        {"dp_replicate": 2, "cp": 2, "tp": 2},
        {"dp_replicate": 2, "dp_shard": 2, "tp": 2, "ep": 2},
        {"pp": 2, "dp_shard": 2, "tp": 2, "ep": 4, "schedule": "dualpipev", "recompute": "selective"},
        _two_hop(pp=2, cp=2, tp=2, ep=4),
        _two_hop(dp_shard=2, cp=2, tp=2, ep=4, recompute="full"),
        {"dp_shard": 8},  # which 12 experts are no multiple of
        {"dp_replicate": 2, "cp": 2, "tp": 2, "ep": 2, "exchange": "flat"},
        {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "ep": 2, "schedule": "interleaved_zero_bubble"},
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table: the largest relative differences over all ranks."""

    model: str
    layout: str
    loss: float
    gradient: float
    worst: str
    norm: float
    load: float
    next_loss: float

    @property
    def passed(self) -> bool:
        return (
            self.loss <= LOSS_TOLERANCE
            and self.gradient <= GRADIENT_TOLERANCE
            and self.norm <= GRADIENT_TOLERANCE
            and self.load == 0
            and self.next_loss <= NEXT_TOLERANCE
        )


def cases(num_ranks: int, model: str) -> list[dict[str, Any]]:
    """The layouts of so many ranks that fit a model."""
    return [axes for axes in LAYOUTS[num_ranks] if not (model == "dense" and axes.get("ep", 1) > 1)]


def label(axes: dict[str, Any]) -> str:
    def text(key: str, value: Any) -> str:
        return f"{key} {'+'.join(map(str, value)) if isinstance(value, tuple) else value}"

    return ", ".join(text(key, value) for key, value in axes.items() if key != "devices_per_node")


@dataclass
class Outcome:
    losses: Tensor
    gradients: dict[str, Tensor]
    norm: Tensor
    loads: list[float]
    next_loss: Tensor
    boxes: dict[str, Any]


def step(
    spec: ModelSpec, mesh: Mesh, separator: int | None = None, lora: LoRAConfig | None = None
) -> Outcome:
    """One optimiser step of this rank, as the trainer makes it; with a separator, documents apart; with
    adapters, of which neither matrix is 0."""
    with torch.device("meta"):
        model = Transformer(spec)
    values = seeded(spec, SEED)
    p = parallelize(
        model, mesh, LENGTH, lambda name, box: values(name.replace("lora.B", "lora.b"), box), lora=lora
    )
    p.train()
    if separator is not None:
        p.mask_documents(separator)
    set_balance_weight(p.routers, BALANCE, BATCH)
    extra = 1 + spec.num_nextn_predict_layers
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, spec.vocab_size, (BATCH, LENGTH + extra), generator=generator)
    mine = rows.chunk(mesh["dp"].size)[mesh["dp"].rank]
    losses = p.total(p.backward(mine, BATCH * LENGTH, MTP_WEIGHT))
    gradients = {name: gradient.clone() for name, gradient, _ in p.state.gradients()}
    norm = p.clip(1.0)
    weights = [*p.state.decayed, *p.state.plain]
    torch.optim.AdamW(weights, lr=1e-3, eps=1e-4).step()
    p.state.write_back()
    load = balance_step(p.routers, 1e-3, mesh)
    p.train(False)
    next_loss = p.total(p.loss(mine).double())
    boxes = {name: piece.box for name, piece in p.state.weights().items()}
    return Outcome(losses, gradients, norm, [load.worst, load.mean] if load else [], next_loss, boxes)


def compare(model: str, axes: dict[str, Any], ours: Outcome, alone: Outcome) -> Row:
    def relative(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max() / b.abs().max())

    errors = {"": 0.0}
    for name, gradient in ours.gradients.items():
        if gradient.numel():
            expected = alone.gradients[name]
            part = expected[ours.boxes[name].slices]
            # Over the whole's norm, scaled to the part's share of it.
            scale = expected.norm() * (part.numel() / expected.numel()) ** 0.5
            errors[name] = float((gradient - part).norm() / scale)
    worst = max(errors, key=errors.__getitem__)
    return Row(
        model,
        label(axes),
        relative(ours.losses, alone.losses),
        errors[worst],
        worst,
        relative(ours.norm, alone.norm),
        max((abs(a - b) for a, b in zip(ours.loads, alone.loads, strict=True)), default=0.0),
        relative(ours.next_loss, alone.next_loss),
    )


def run_rank(model: str) -> list[Row]:
    """All layouts of this job's size, with one model, on one rank."""
    import os

    device = torch.device("cpu")
    layout = Layout(micro_batch=1, global_batch=BATCH, precision="fp32")
    spec = models()[model]
    alone = step(spec, make_mesh(layout, device))
    rows, groups = [], {}
    with open_world(device):
        for axes in cases(int(os.environ["WORLD_SIZE"]), model):
            mesh = make_mesh(replace(layout, **axes), device, groups)
            mesh.layout.check_model(spec, LENGTH)
            rows.append(compare(model, axes, step(spec, mesh), alone))
    return rows


def table(num_ranks: int, model: str) -> list[Row]:
    """The rows of one model on so many ranks: of every rank the worst."""

    def worst(rows: tuple[Row, ...]) -> Row:
        by_gradient = max(rows, key=lambda row: row.gradient)
        return replace(
            by_gradient,
            **{key: max(getattr(row, key) for row in rows) for key in ("loss", "norm", "load", "next_loss")},
        )

    return [worst(rows) for rows in zip(*run_ranks(run_rank, num_ranks, model, timeout_s=900), strict=True)]


def page(rows: dict[int, list[Row]]) -> str:
    """docs/parity.md."""
    lines = [
        "# The same step under every layout",
        "",
        f"Written by `python tests/dist/parity.py` on {date.today().isoformat()}, torch {torch.__version__}, "
        "float32, real processes on two CPU cores. One optimiser step of a small model under each layout "
        "against the same step on one device: relative differences, the largest of all ranks. "
        f"`make test` runs the same and asks for losses within {LOSS_TOLERANCE:g}, every gradient within "
        f"{GRADIENT_TOLERANCE:g} and equal expert loads.",
        "",
        "V3-like: sigmoid router with selection bias and groups, compressed queries, shared expert, one "
        "dense layer, multi-token prediction. V2-like: softmax router, plain queries. dense: grouped-query "
        "attention, embedding and head one weight.",
    ]
    for num_ranks, found in rows.items():
        lines += [
            "",
            f"## {num_ranks} ranks",
            "",
            "| layout | model | loss | worst gradient | norm | loss after |",
        ]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        order = {label(axes): i for i, axes in enumerate(LAYOUTS[num_ranks])}
        for row in sorted(found, key=lambda row: order[row.layout]):
            lines.append(
                f"| {row.layout} | {row.model} | {row.loss:.1e} | {row.gradient:.1e} | {row.norm:.1e} | "
                f"{row.next_loss:.1e} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    rows: dict[int, list[Row]] = {}
    for num_ranks in LAYOUTS:
        rows[num_ranks] = [row for model in models() for row in table(num_ranks, model)]
        for row in rows[num_ranks]:
            print(f"{num_ranks} ranks, {row}{'' if row.passed else '   <- FAILED'}", flush=True)
    out = Path(__file__).parents[2] / "docs" / "parity.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text(page(rows))
    print(out)


if __name__ == "__main__":
    main()
