"""A layout as overrides of Megatron-Bridge's DeepSeek recipes (`run_recipe.py --recipe NAME KEY=VALUE`).

What Megatron-Core has no word for is said, with the nearest that it has.
"""

from __future__ import annotations

from typing import Any

from whalepod.launch.job import Job
from whalepod.launch.names import TRAINING
from whalepod.launch.render import quoted, render
from whalepod.launch.training import on_nodes, sbatch
from whalepod.spec.errors import UserError, nearest
from whalepod.spec.layout import Layout
from whalepod.spec.stages import split_stages

BRIDGE_IMAGE = "nvcr.io/nvidia/nemo:26.02"
RECIPES = {
    "deepseek-v3": "deepseek_v3_pretrain_config",
    "deepseek-v2": "deepseek_v2_pretrain_config",
    "deepseek-v2-lite": "deepseek_v2_lite_pretrain_config",
}
_SCHEDULES = {"1f1b", "interleaved"}
_RECOMPUTE: dict[str, dict[str, str]] = {
    "none": {"granularity": "null", "modules": "null", "method": "null", "num_layers": "null"},
    "selective": {
        "granularity": "selective",
        "modules": "[layernorm,mla_up_proj,moe_act]",
        "method": "null",
        "num_layers": "null",
    },
    "full": {"granularity": "full", "modules": "null", "method": "uniform", "num_layers": "1"},
}


def megatron(job: Job, comment: str, folder: str) -> dict[str, str]:
    """node.sh that runs the recipe under torchrun, and a Slurm script around it."""
    lines = overrides(job)
    out = f'"$SHARED_DIR"/{quoted(job.config.out)}-megatron'
    script = render(
        "megatron.sh", comment=comment, out=out, recipe=recipe(job), overrides=lines, **on_nodes(job)
    )
    image = job.image or BRIDGE_IMAGE
    return {
        "node.sh": script,
        "job.sbatch": sbatch(job, comment, folder, "node.sh", "job.sbatch", image=image),
    }


def recipe(job: Job) -> str:
    """The recipe of the job's model. Raises UserError where Bridge has none."""
    name = job.spec.name
    if name not in RECIPES:
        raise UserError(
            f"Megatron-Bridge has no recipe to pre-train {name}{nearest(name, RECIPES)}: use --on torchrun"
        )
    return RECIPES[name]


def check(layout: Layout) -> None:
    """Raises UserError naming what Megatron-Core cannot do, and the nearest that it can."""
    if layout.pp > 1 and layout.schedule not in _SCHEDULES:
        near = "interleaved" if layout.num_stages > layout.pp else "1f1b"
        raise UserError(
            f"Megatron has no pipeline schedule {layout.schedule}: the nearest is {near}; plan again with "
            f"--schedule {near}, or use --on torchrun"
        )
    if layout.precision == "fp32":
        raise UserError("Megatron-Bridge's recipes compute in BF16 or FP8: set layout.precision=bf16")


def overrides(job: Job) -> list[str]:
    """KEY=VALUE for the recipe. Raises UserError for what it cannot express."""
    layout, spec = job.layout, job.spec
    check(layout)
    length = job.config.data.sequence_length
    values: dict[str, Any] = {
        TRAINING[name]: getattr(layout, name)
        for name in ("tp", "pp", "cp", "ep", "expert_tp", "micro_batch", "global_batch")
    }
    values["model.sequence_parallel"] = layout.tp > 1
    mtp = spec.num_nextn_predict_layers
    stages = None
    if layout.pp > 1:
        split = split_stages(spec, layout.num_stages, length, layout.stage_layers)
        stages = ["t" * (end - start) for start, end in split.layers]
        stages[0], stages[-1] = "E" + stages[0], stages[-1] + "m" * mtp + "L"
    values[TRAINING["stage_layers"]] = "|".join(stages) if stages else "null"
    values[TRAINING["stages_per_rank"]] = "null"  # follows from the stages
    values["model.mtp_num_layers"] = mtp or "null"
    values |= _sharing(layout)
    values |= {f"model.recompute_{key}": value for key, value in _RECOMPUTE[layout.recompute].items()}
    if layout.precision == "fp8":
        tiles = job.cluster.gpu.architecture == "hopper"
        values["mixed_precision"] = f"bf16_with_{'fp8_subchannel_scaling' if tiles else 'mxfp8'}_mixed"
    train, optimizer = job.config.train, job.config.optimizer
    values |= {
        "dataset.seq_length": length,
        "train.train_iters": train.steps,
        "optimizer.lr": optimizer.learning_rate,
    }
    values["scheduler.lr_warmup_iters"] = job.config.schedule.warmup_steps
    values["checkpoint.save_interval"] = train.checkpoint_every or train.steps
    return [f"{key}={_spelled(value)}" for key, value in values.items()]


def _sharing(layout: Layout) -> dict[str, Any]:
    """What data-parallel ranks share out."""
    shared = layout.fsdp > 1
    values: dict[str, Any] = {"ddp.use_distributed_optimizer": shared}
    if shared and layout.dp_replicate > 1:
        values[TRAINING["dp_replicate"]] = layout.dp_replicate
    if shared and layout.zero > 1:
        values |= {
            "ddp.use_megatron_fsdp": True,
            "ddp.data_parallel_sharding_strategy": {2: "optim_grads", 3: "optim_grads_params"}[layout.zero],
            "checkpoint.ckpt_format": "fsdp_dtensor",
        }
    return values


def _spelled(value: Any) -> str:
    """As Hydra's overrides write it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
