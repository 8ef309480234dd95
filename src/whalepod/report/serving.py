"""`whalepod plan --for serve` as data: deployments in JSON with stable keys, and the Pareto front. No torch.

`serving_json` gives the one dictionary that the table, the pictures and the page draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import yaml

from whalepod.planner.answers import Help
from whalepod.planner.serve_layout import parse_layout
from whalepod.planner.serve_memory import ServeMemory
from whalepod.planner.serve_plan import ServingAnswer, ServingJob, serving_traps
from whalepod.planner.serving import ServeEstimate
from whalepod.report.calculator import web_calculator
from whalepod.report.planning import price_json
from whalepod.report.question import Question
from whalepod.spec.counts import GIB
from whalepod.spec.errors import UserError
from whalepod.spec.run import make_run


def serving_json(answer: ServingAnswer) -> dict[str, Any]:
    """The whole answer. `tokens_per_s` are of output; `memory_...` of the fullest decode GPU at that load;
    `decode_parts_ms` of one step, `prefill_parts_ms` of one prompt alone; `pareto`: the fastest for a user
    first."""
    job = answer.job
    gpu = job.cluster.gpu
    best = answer.plans[0] if answer.plans else None
    return {
        "model": job.spec.name,
        "gpu": gpu.name,
        "num_gpus": job.cluster.num_gpus,
        "gpus_per_node": job.cluster.gpus_per_node,
        "goal": "serve",
        "precision": job.precision,
        "software": job.engine,
        "sequence_length": job.isl + job.osl,
        "global_batch": None,
        "isl": job.isl,
        "osl": job.osl,
        "concurrency": job.concurrency,
        "ttft_limit_ms": job.ttft_limit_s and job.ttft_limit_s * 1e3,
        "tpot_limit_ms": job.tpot_limit_s and job.tpot_limit_s * 1e3,
        "speculated_tokens": job.drafts,
        "gpu_memory_gib": gpu.memory_gib,
        "usable_memory_gib": gpu.memory_gib,
        "price": price_json(job.cluster),
        "plans": [
            estimate_json(plan, job, answer.helps if place == 0 else ())
            for place, plan in enumerate(answer.plans)
        ],
        "pareto": [front_json(point) for point in answer.front],
        "rejected": [
            {"layout": parse_layout(layout).as_dict(), "layout_in_words": layout, "reason": reason}
            for layout, reason in answer.rejected
        ],
        "advice": list(answer.advice),
        "layouts_considered": answer.considered,
        "web_calculator": web_calculator(
            job.spec, job.cluster, job.precision, "serve", None if best is None else held_gib(best)
        ),
    }


def serve_yaml(question: Question, answer: ServingAnswer, gpus: str) -> str:
    """The best deployment as the text of a run.yaml for `whalepod launch`. Raises UserError without one."""
    job = answer.job
    if not answer.plans:
        raise UserError(f"there is no plan to emit: {answer.advice[0] if answer.advice else 'nothing fits'}")
    best = answer.plans[0]
    serve = {
        "layout": str(best.layout),
        "engine": job.engine,
        "precision": job.precision,
        "isl": job.isl,
        "osl": job.osl,
        "concurrency": round(best.concurrency, 1),
        "drafts": job.drafts,
    }
    values = {"model": question.run_model, "gpus": gpus, "serve": serve}
    if question.gpus_per_node is not None:
        values["gpus_per_node"] = question.gpus_per_node
    make_run(values)
    return yaml.safe_dump(values, sort_keys=False)


def estimate_json(plan: ServeEstimate, job: ServingJob, helps: Sequence[Help] = ()) -> dict[str, Any]:
    """One deployment; see `serving_json`. Only the first says what would help."""
    memory = memory_gib(plan.memory)
    pools = [memory] if plan.prefill_memory is None else [memory, memory_gib(plan.prefill_memory)]
    price = job.cluster.gpu.price
    hourly = price and price.usd_per_hour * job.cluster.num_gpus
    return {
        "layout": plan.layout.as_dict(),
        "layout_in_words": str(plan.layout),
        "concurrency": plan.concurrency,
        "tokens_per_s": plan.output_tokens_per_s,
        "tokens_per_s_per_gpu": plan.output_tokens_per_s_per_gpu,
        "total_tokens_per_s_per_gpu": plan.total_tokens_per_s_per_gpu,
        "tokens_per_s_per_user": plan.tokens_per_s_per_user,
        "requests_per_s": plan.requests_per_s,
        "ttft_ms": plan.ttft_s * 1e3,
        "tpot_ms": plan.tpot_s * 1e3,
        "batch_per_worker": plan.batch,
        "kv_capacity_tokens": plan.kv_capacity_tokens,
        "memory_gib": sum(memory.values()),
        "memory_by_category_gib": memory,
        "memory_by_rank_gib": pools,
        "decode_parts_ms": {k: v * 1e3 for k, v in plan.decode_parts.items()},
        "prefill_parts_ms": {k: v * 1e3 for k, v in plan.prefill_parts.items()},
        "time_parts_s": {"decode": dict(plan.decode_parts), "prefill": dict(plan.prefill_parts)},
        "limited_by": plan.limited_by,
        "helps": [asdict(help_) for help_ in helps],
        "warnings": serving_traps(plan, job),
        "notes": list(plan.notes),
        "usd_per_hour": hourly,
        "usd_per_million_output_tokens": hourly and hourly / 3600 / plan.output_tokens_per_s * 1e6,
    }


def front_json(point: ServeEstimate) -> dict[str, Any]:
    """A point of the Pareto front."""
    return {
        "layout_in_words": str(point.layout),
        "concurrency": point.concurrency,
        "tokens_per_s_per_user": point.tokens_per_s_per_user,
        "tokens_per_s_per_gpu": point.output_tokens_per_s_per_gpu,
        "ttft_ms": point.ttft_s * 1e3,
        "tpot_ms": point.tpot_s * 1e3,
    }


def memory_gib(memory: ServeMemory) -> dict[str, float]:
    return {name: size / GIB for name, size in memory.by_category().items()}


def held_gib(plan: ServeEstimate) -> float:
    """What a deployment holds on all of its GPUs together."""
    layout = plan.layout
    decode = layout.num_decode * layout.decode.num_gpus * sum(memory_gib(plan.memory).values())
    if layout.prefill is None or plan.prefill_memory is None:
        return decode
    return decode + layout.num_prefill * layout.prefill.num_gpus * sum(
        memory_gib(plan.prefill_memory).values()
    )
