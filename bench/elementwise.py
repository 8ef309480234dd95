"""How many bytes a training step moves beside products, over what fused kernels would: one step of v3-mini.

    python bench/elementwise.py

The planner's `CPU_ELEMENTWISE` and `CPU_LOGITS`. Counted below autograd: operands and results of all that is
not a view, a product, attention, a pick of rows or the optimiser; apart from those, what touches logits.
logsumexp counts with the passes within it (largest, difference, exponential, sum: 24 bytes a logit). The
fused bytes are the planner's own formula. Prints both ratios and writes results/elementwise.json.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from record import save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
WITHIN_LOGSUMEXP = 24 - 4  # bytes a logit, less the reading that is seen


class Moved(TorchDispatchMode):
    """bytes: by whether logits are touched."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.bytes: Counter[bool] = Counter()
        self._vocabulary = vocabulary

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        if func.is_view or name.startswith("empty") or name in ("_unsafe_view", "detach"):
            return out
        if name.lstrip("_").startswith(tuple(o.lstrip("_") for o in OTHERS)) or "attention" in name:
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        logits = [t for t in tensors if t.dim() == 2 and t.shape[-1] == self._vocabulary]
        self.bytes[bool(logits)] += sum(t.nbytes for t in tensors)
        if name == "logsumexp":
            self.bytes[True] += WITHIN_LOGSUMEXP * logits[0].numel()
        return out


def main() -> None:
    config = make_run({"model": "v3-mini", "layout": {"micro_batch": 16, "global_batch": 32}})
    config = config.model_copy(update={"data": config.data.model_copy(update={"sequence_length": 256})})
    spec, layout = config.model_spec(), config.make_layout()
    tokens, depths = layout.global_batch * 256, spec.num_nextn_predict_layers
    with open_mesh(layout, torch.device("cpu")) as mesh:
        work = TrainStep(config, spec, mesh, seeded(spec, 0))
        rows = torch.randint(0, spec.vocab_size, (layout.global_batch, 256 + 1 + depths))
        work.step(rows, 1e-4)
        with Moved(spec.vocab_size) as moved:
            work.step(rows, 1e-4)
    gpu = load_gpu("cpu")
    software = load_software("whalepod")
    job = TrainingJob(spec, Cluster(gpu, 1, 1), software, layout.global_batch, 256, layout.precision)
    rate = gpu.memory_tb_s * 1e12 * software.of(gpu).memory
    formula = time_run(job, layout).step.parts["memory"] * rate
    logits = 16.0 * tokens * (1 + depths) * spec.vocab_size
    fused = (formula - CPU_LOGITS * logits) / CPU_ELEMENTWISE
    found = {
        "elementwise": moved.bytes[False] / fused,
        "logits": moved.bytes[True] / logits,
        "moved_gb": moved.bytes[False] / 1e9,
        "fused_gb": fused / 1e9,
    }
    for name, value in found.items():
        print(f"{name}: {value:.2f}")
    save(ROOT / "results" / "elementwise.json", {"command": "python bench/elementwise.py", **found})


if __name__ == "__main__":
    main()
