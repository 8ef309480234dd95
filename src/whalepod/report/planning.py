"""`whalepod plan` as data: training plans in JSON with stable keys, layouts in words, runs. No torch.

`training_json` gives the one dictionary that the table, the pictures and the page draw.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from whalepod.planner.answers import TrainingAnswer, TrainingPlan
from whalepod.planner.goodput import goodput_json, of_cluster
from whalepod.planner.micro_batch import micro_batch_curve as planned_curve
from whalepod.planner.search import TrainingJob
from whalepod.report.calculator import web_calculator
from whalepod.report.question import Question
from whalepod.spec.errors import UserError
from whalepod.spec.hardware import Cluster, Operation, usual_operation
from whalepod.spec.layout import Layout, layout_words
from whalepod.spec.presets import load_preset


def training_json(answer: TrainingAnswer, operation: Operation | None = None) -> dict[str, Any]:
    """The whole answer. Units are in the keys; a GiB is 2^30 bytes; plans are sorted, the best first.

    - `memory_gib`, `memory_by_category_gib`: of the fullest pipeline rank; `memory_by_rank_gib`: of all.
    - `time_parts_s`: of the busiest pipeline rank, adding up to `step_s`. `exposed`: communication that
      nothing hides, by axis. `interference`: computation slowed by what is hidden.
    - `micro_batches`: of the first plan's layout, throughput and memory by micro-batch.
    - `goodput`: of a long job's time, what brings it on (planner/goodput), with checkpoints every
      `checkpoint_every_s`. operation: how the cluster is run; the usual if left out.
    - `mfu`: of the dense BF16 peak. `helps`: one input changed, and what the plan gains then.
    """
    job = answer.job
    gpu = job.cluster.gpu
    lasting = of_cluster(job.spec, job.software.state, job.cluster, operation or usual_operation())
    plans = [plan_json(plan) | goodput_json(lasting, plan.step.seconds) for plan in answer.plans]
    curve = micro_batch_curve(answer.plans[0], job) if answer.plans else None
    return {
        "model": job.spec.name,
        "gpu": gpu.name,
        "num_gpus": job.cluster.num_gpus,
        "gpus_per_node": job.cluster.gpus_per_node,
        "goal": "train",
        "precision": job.precision,
        "software": job.software.name,
        "sequence_length": job.sequence_length,
        "global_batch": job.global_batch,
        "imbalance": job.imbalance,
        "mtp": bool(job.mtp and job.spec.num_nextn_predict_layers),
        "gpu_memory_gib": gpu.memory_gib,
        "usable_memory_gib": job.limit_gib,
        "price": price_json(job.cluster),
        "plans": plans,
        "micro_batches": curve,
        "rejected": [
            {
                "layout": None if r.layout is None else layout_json(r.layout),
                "layout_in_words": None if r.layout is None else "; ".join(layout_words(r.layout)),
                "reason": r.reason,
            }
            for r in answer.rejected
            if r.reason not in answer.advice
        ],
        "advice": list(answer.advice),
        "notes": [],
        "layouts_considered": answer.considered,
        "layouts_fitting": answer.fitting,
        "web_calculator": web_calculator(
            job.spec, job.cluster, job.precision, "train", cluster_memory_gib(answer.plans)
        ),
    }


def micro_batch_curve(plan: TrainingPlan, job: TrainingJob) -> dict[str, Any]:
    """`points` of the plan's layout by micro-batch, and in words where they turn."""
    precise = replace(job, precision=plan.layout.precision)
    return asdict(planned_curve(precise, plan.layout))


def plan_json(plan: TrainingPlan) -> dict[str, Any]:
    """One plan; see `training_json`."""
    step = plan.step
    known = sum(step.parts.values()) + sum(step.exposed.values())
    known += step.bubble + step.optimizer + step.interference
    return {
        "layout": layout_json(plan.layout),
        "layout_in_words": "; ".join(layout_words(plan.layout)),
        "tokens_per_s": plan.tokens_per_s,
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu,
        "tflops_per_gpu": plan.tflops_per_gpu,
        "mfu": plan.mfu,
        "step_s": step.seconds,
        "memory_gib": plan.memory_gib,
        "memory_allocated_gib": plan.memory_allocated_gib,
        "memory_reserved_gib": plan.memory_reserved_gib,
        "memory_by_category_gib": dict(plan.memory_by_category),
        "memory_by_rank_gib": [dict(parts) for parts in plan.memory_by_rank],
        "time_parts_s": {
            "computation": {name: s for name, s in step.parts.items() if s > 0},
            "exposed": {axis: s for axis, s in step.exposed.items() if s > 0},
            "bubble": step.bubble,
            "interference": step.interference,
            "optimizer": step.optimizer,
            "other": max(step.seconds - known, 0.0),
        },
        "limited_by": plan.limited_by,
        "helps": [asdict(help_) for help_ in plan.helps],
        "warnings": list(plan.warnings),
        "usd_per_hour": plan.usd_per_hour,
        "usd_per_trillion_tokens": plan.usd_per_trillion_tokens,
        "days_per_trillion_tokens": plan.days_per_trillion_tokens,
        "gpu_hours_per_trillion_tokens": plan.gpu_hours_per_trillion_tokens,
    }


def layout_json(layout: Layout) -> dict[str, Any]:
    """Every field of the layout."""
    values = asdict(layout)
    if layout.stage_layers is not None:
        values["stage_layers"] = list(layout.stage_layers)
    return values


def price_json(cluster: Cluster) -> dict[str, Any] | None:
    """The GPU's price with its date and source; None where nobody said one."""
    price = cluster.gpu.price
    if price is None:
        return None
    return {"usd_per_gpu_hour": price.usd_per_hour, "date": price.date, "source": price.source}


def cluster_memory_gib(plans: tuple[TrainingPlan, ...]) -> float | None:
    """What the best plan holds on all devices together."""
    if not plans:
        return None
    best = plans[0]
    devices = best.num_gpus // len(best.memory_by_rank)
    return devices * sum(sum(parts.values()) for parts in best.memory_by_rank)


def run_yaml(question: Question, answer: TrainingAnswer, gpus: str) -> str:
    """The best plan as the text of a run.yaml that `whalepod train` takes. Raises UserError without one.

    gpus: what was planned for, as it was typed.
    """
    from whalepod.spec.run import dump_run, make_run

    name = answer.job.spec.name
    if not answer.plans:
        raise UserError(f"there is no plan to emit: {answer.advice[0] if answer.advice else 'nothing fits'}")
    if load_preset(question.model).status == "counts":
        raise UserError(f"{name} can be planned for but not trained yet, so there is no run to emit")
    layout = answer.plans[0].layout
    layout.check_model(answer.job.spec, answer.job.sequence_length)
    lasting = of_cluster(answer.job.spec, answer.job.software.state, answer.job.cluster, question.operation)
    folder = "".join(c if c.isalnum() or c in "-._" else "-" for c in name).strip(".") or "run"
    config = make_run(
        {
            "model": question.run_model,
            "gpus": gpus,
            "gpus_per_node": question.gpus_per_node,
            "layout": layout_json(layout),
            "data": {"sequence_length": answer.job.sequence_length},
            "train": {"checkpoint_every": lasting.steps(answer.plans[0].step.seconds)},
            "out": f"runs/{folder}",
        }
    )
    return dump_run(config)


def run_notes(answer: TrainingAnswer) -> list[str]:
    """How the run that was emitted differs from the plan."""
    software = answer.job.software.name
    if software == "whalepod":
        return []
    return [
        f"the speed and memory are those of {software}; `whalepod train`, which takes the emitted file, is "
        "--software whalepod (FP32 moments)"
    ]


def write_text(path: Path, text: str, flag: str) -> None:
    """Writes a file that the user named; raises UserError with one line where that cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{flag}: cannot write {str(path)!r}: {reason}") from None


def check_place(path: Path | None, flag: str, suffixes: tuple[str, ...] = ()) -> None:
    """Raises UserError, before anything is computed, where a file cannot be written there."""
    if path is None:
        return
    try:
        folder, is_folder = path.parent.is_dir(), path.is_dir()
    except (OSError, ValueError):
        folder, is_folder = False, False
    if is_folder:
        raise UserError(f"{flag}: {str(path)!r} is a folder")
    if not folder:
        raise UserError(f"{flag}: there is no folder {str(path.parent)!r}")
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{flag}: the name must end in {' or '.join(suffixes)}, not {path.suffix!r}")
