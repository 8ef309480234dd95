"""How many bytes and operations a training step has beside products: one step of v3-mini, counted.

    python bench/elementwise.py

The planner's `CPU_ELEMENTWISE`, `CPU_LOGITS` and `CPU_LAUNCHES`. Bytes are counted below autograd: operands
and results of all that is not a view, a product, attention, a pick of rows or the optimiser; apart from
those, what touches logits, and what adds gradients up. The fused bytes are the formula's own. Operations of
a pass forward and back are counted for models of one and two layers; a third of the difference is a layer's.
Products are answered with zeros and nothing is timed. Prints all and writes results/elementwise.json.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from whalepod.calibrate.kernels import Operations
from whalepod.parallel.mesh import open_mesh
from whalepod.parallel.parallelize import seeded
from whalepod.planner.plan import time_run
from whalepod.planner.search import TrainingJob
from whalepod.planner.software import CPU_ELEMENTWISE, CPU_LOGITS, load_software
from whalepod.spec.hardware import Cluster, load_gpu
from whalepod.spec.run import make_run
from whalepod.train.step import TrainStep

ROOT = Path(__file__).resolve().parents[1]
OTHERS = (
    "mm",
    "bmm",
    "_grouped_mm",
    "index",
    "embedding",
    "gather",
    "scatter",
    "sort",
    "topk",
    "_fused_adamw",
)
ONE = {"num_nextn_predict_layers": 0, "num_hidden_layers": 1}
TWO = {**ONE, "num_hidden_layers": 2}


class Moved(TorchDispatchMode):
    """bytes by what they are: `logits`, `gradients`, else `elementwise`. sums: storages of gradients."""

    def __init__(self, vocabulary: int, sums: set[int]) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self._vocabulary, self._sums = vocabulary, sums

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        if func.is_view or name.startswith("empty") or name in ("_unsafe_view", "detach"):
            return out
        if name.lstrip("_").startswith(tuple(o.lstrip("_") for o in OTHERS)) or "attention" in name:
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        logits = [t for t in tensors if t.dim() == 2 and t.shape[-1] == self._vocabulary]
        added = name in ("add_", "copy_") and args[0].untyped_storage().data_ptr() in self._sums
        self.bytes["gradients" if added else "logits" if logits else "elementwise"] += sum(
            t.nbytes for t in tensors
        )
        return out


class Instant(TorchDispatchMode):
    """Products and attention come out as zeros."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if name == "mm":
            return args[0].new_zeros(args[0].shape[0], args[1].shape[1])
        if name == "mm.out":
            return (kwargs or {})["out"].zero_()
        if name.startswith("_grouped_mm"):
            a, b, ends = args[0], args[1], args[2]
            return (
                a.new_zeros(a.shape[0], b.shape[2])
                if b.dim() == 3
                else a.new_zeros(len(ends), a.shape[0], b.shape[1])
            )
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            q = args[0]
            return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32)
        if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            return tuple(torch.zeros_like(x) for x in args[1:4])
        return func(*args, **(kwargs or {}))


def step_of(
    watch: Callable[[Any, set[int]], Any], precision: str, micro_batch: int, **model: Any
) -> tuple[Any, Any, Any]:
    """(spec, layout, what watched) of a step of 32 sequences, after a first one."""
    config = make_run(
        {
            "model": {"preset": "v3-mini", **model},
            "layout": {"micro_batch": micro_batch, "global_batch": 32, "precision": precision},
            "data": {"sequence_length": 256},
        }
    )
    spec, layout = config.model_spec(), config.make_layout()
    with open_mesh(layout, torch.device("cpu")) as mesh, Instant():
        work = TrainStep(config, spec, mesh, seeded(spec, 0))
        rows = torch.randint(0, spec.vocab_size, (32, 256 + 1 + spec.num_nextn_predict_layers))
        work.step(rows, 1e-4)
        sums = [p.grad for group in work.optimizer.param_groups for p in group["params"]]
        with watch(spec, {g.untyped_storage().data_ptr() for g in sums if g is not None}) as seen:
            work.step(rows, 1e-4)
    return spec, layout, seen


def bytes_moved(precision: str) -> dict[str, float]:
    spec, layout, moved = step_of(lambda spec, sums: Moved(spec.vocab_size, sums), precision, 16)
    gpu = load_gpu("cpu")
    software = load_software("whalepod")
    job = TrainingJob(spec, Cluster(gpu, 1, 1), software, layout.global_batch, 256, layout.precision)
    rate = gpu.memory_tb_s * 1e12 * software.of(gpu).memory
    parts = time_run(job, layout).step.parts
    logits = 16 * 32 * 256 * (1 + spec.num_nextn_predict_layers) * spec.vocab_size
    fused = (parts["memory"] * rate - CPU_LOGITS * logits) / CPU_ELEMENTWISE[precision == "fp32"]
    return {
        "elementwise": moved.bytes["elementwise"] / fused,
        "logits": moved.bytes["logits"] / logits,
        "gradients": moved.bytes["gradients"] / (parts["gradients"] * rate),
        "fused_gb": fused / 1e9,
    }


def operations(**model: Any) -> float:
    """Of a pass forward and back."""
    counts = [step_of(lambda spec, sums: Operations(), "bf16", n, **model)[2].count for n in (16, 8)]
    return (counts[1] - counts[0]) / 2


def main() -> None:
    found: dict[str, Any] = {precision: bytes_moved(precision) for precision in ("bf16", "fp32")}
    one, two = operations(**ONE, first_k_dense_replace=1), operations(**TWO, first_k_dense_replace=2)
    found["operations"] = {
        "a dense layer": (two - one) / 3,
        "a layer of experts": (operations(**TWO, first_k_dense_replace=1) - one) / 3,
        "embedding and head": (2 * one - two) / 3,
    }
    for name, values in found.items():
        print(name, {what: round(value, 2) for what, value in values.items()})
    save(ROOT / "results" / "elementwise.json", {"command": "python bench/elementwise.py", **found})


if __name__ == "__main__":
    main()
