"""One rank's training step, run on fake tensors and counted: memory, FLOPs, collectives."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from whalepod.dryrun.norms import fuse_norms
from whalepod.dryrun.replay import repeats, replaying
from whalepod.dryrun.routing import draw_picks, settle
from whalepod.dryrun.tally import Counts, Tally
from whalepod.dryrun.world import answers, pretend, replaced
from whalepod.models.attention import choose_core, fused
from whalepod.parallel.comm import Axis
from whalepod.parallel.ledger import Ledger
from whalepod.parallel.replicated import Replicated
from whalepod.parallel.stage import Stage
from whalepod.planner.in_flight import representative
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec
from whalepod.spec.run import RunConfig
from whalepod.spec.schedule import RULES
from whalepod.train.step import TrainStep

GRAIN_SHARE = 1 / 2000
"""Of the memory held between steps, what a change must be to be drawn."""
MAX_POINTS = 2000
"""Of a step's memory over time."""
PLAYED = 256
"""Micro-batches of a pipeline up to which all are there, most of them played back: that costs milliseconds
each, and a step may have tens of thousands."""


@dataclass(frozen=True)
class Held:
    """A parameter: elements on this rank, and the whole's shape."""

    name: str
    local: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """A counted step. peak: bytes of tensors at the fullest moment, by category; where that was.

    state: bytes by category before the step. timeline: (share of the step's operations, bytes by category).
    """

    rank: int
    stages: tuple[str, ...]
    parameters: int
    peak: int
    categories: dict[str, int]
    peak_at: str
    state: dict[str, int]
    counts: Counts
    timeline: tuple[tuple[float, dict[str, int]], ...]
    held: tuple[Held, ...]
    operations: int


def measure(
    config: RunConfig,
    spec: ModelSpec,
    rank: int,
    *,
    on_gpu: bool = True,
    imbalance: float = 1.0,
    plainly: bool = False,
) -> Measured:
    """Runs the job's training step as rank `rank` and counts.

    on_gpu: norms and attention are CUDA's. plainly: all micro-batches run. Else passes of a pipeline that
    repeat others are played back; and without a pipeline, or with very many micro-batches, there are as many
    as show all that a step does, and the counts of one in its middle stand for those left out.
    """
    layout = config.make_layout()
    whole = layout.accumulation_steps
    played = repeats(layout) and not plainly
    run = whole if plainly or (played and whole <= PLAYED) else enough(layout)
    batch = run * layout.micro_batch * layout.num_replicas
    short = config.model_copy(update={"layout": config.layout.model_copy(update={"global_batch": batch})})
    with pretend(short.make_layout(), rank) as mesh:
        work = TrainStep(short, spec, mesh, lambda name, box: torch.empty(box.shape))
        parts = work.parallel.parts
        if on_gpu:
            for part in parts:
                fuse_norms(part)
                choose_core(part, fused)
        if spec.moe is not None:
            settle(parts, partial(draw_picks, spec.moe, ep=layout.ep, imbalance=imbalance))
        ledger = Ledger([(name, m) for part in parts for name, m in part.named_modules()])
        answers(ledger)
        with ledger:  # once, so that moments are there
            _make_moments(work)
        mesh.traffic.calls.clear()  # Muon sends something for it
        mesh.traffic.bytes.clear()
        state = _hold_state(ledger, work)
        ledger.begin(grain=int(ledger.total * GRAIN_SHARE))
        tally = Tally(mesh.traffic, ledger, middle(layout))
        length = config.data.sequence_length + 1 + spec.num_nextn_predict_layers
        rows = torch.zeros(run * layout.micro_batch, length, dtype=torch.int64)
        gc.disable()  # no cycle holds a tensor; looking for them took a fifth of the time
        try:
            most = replaying(mesh.layout, mesh["pp"].rank, ledger, tally) if played else nullcontext()
            with ledger, tally, most, _follow_shards(ledger):
                _, norm = work.step(rows, 1e-4)
                work.balance(norm)
        except (RuntimeError, AssertionError, ValueError) as error:
            where = ledger.broken or ledger.where
            raise UserError(f"rank {rank} breaks at {where}: {_first_cause(error)}") from error
        finally:
            gc.enable()
        pieces = work.state.weights()
        held = tuple(Held(n, p.tensor.numel(), p.box.whole) for n, p in pieces.items())
        return Measured(
            rank=rank,
            stages=tuple(stage_name(part) for part in parts),
            parameters=sum(h.local for h in held) + _frozen(parts),
            peak=ledger.peak.bytes,
            categories={k: v for k, v in ledger.peak.categories.items() if v},
            peak_at=ledger.peak.where,
            state=state,
            counts=tally.now().more(whole - run, tally.middle),
            timeline=thinned(ledger),
            held=held,
            operations=ledger.operations,
        )


def middle(layout: Layout) -> int:
    """A micro-batch with which a step does what it does with most, neither the first nor the last.

    Where pipelines gather weights pass by pass, passes before and after matter, and a full pipeline's come
    after one micro-batch for every rank."""
    return layout.pp if layout.pp > 1 and layout.fsdp > 1 and layout.zero == 3 else 1


def enough(layout: Layout) -> int:
    """Micro-batches of a step after which more of them change nothing but the counts."""
    # One more than fill the pipeline: with them in flight, the sums of gradients are there too. Interleaved
    # rounds stay as long as they are in the whole step, and their third has those sums.
    filled = representative(layout.schedule, layout.pp, layout.accumulation_steps)
    filled += not layout.schedule.startswith("interleaved")
    needed = max(2 * middle(layout) + 1, filled)
    while layout.pp > 1 and not RULES[layout.schedule].accepts(layout.pp, needed):
        needed += 1
    return min(needed, layout.accumulation_steps)


def _make_moments(work: TrainStep) -> None:
    """The optimiser makes its moments in its first step."""
    weights = [*work.state.decayed, *work.state.plain]
    before = [w.grad for w in weights]
    for w in weights:
        w.grad = torch.empty_like(w)
    work.optimizer.step()
    for w, grad in zip(weights, before, strict=True):
        w.grad = grad


def _hold_state(ledger: Ledger, work: TrainStep) -> dict[str, int]:
    """What lies there between steps, by category."""
    weights = [*work.state.decayed, *work.state.plain]
    for part in work.parallel.parts:
        ledger.hold([*part.parameters(), *part.buffers()], "weights")
    ledger.hold(weights, "optimizer")  # masters, of which weights are made
    moments = [t for values in work.optimizer.state.values() for t in values.values()]
    ledger.hold([t for t in moments if isinstance(t, Tensor)], "optimizer")
    if isinstance(work.state, Replicated):
        ledger.hold([w.grad for w in weights if w.grad is not None], "gradients")
    return {k: v for k, v in ledger.live.items() if v}


@contextmanager
def _follow_shards(ledger: Ledger) -> Iterator[None]:
    """FSDP2's buffers by their purpose: weights on their way, gradients before and after they are summed."""

    def tagged(function: Callable[..., Any], category: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with ledger.tagged(category):
                return function(*args, **kwargs)

        return call

    def scattering(self: Axis, out: Tensor, tensor: Tensor, *more: Any) -> Any:
        ledger.hold([out], "gradients")
        return scatter(self, out, tensor, *more)

    scatter = Axis.reduce_scatter_into
    with ExitStack() as stack:
        stack.enter_context(replaced(Axis, "reduce_scatter_into", scattering))
        for owner, name, category in (
            (_fsdp_param_group, "foreach_all_gather", "gathered"),
            (_fsdp_param_group, "foreach_all_gather_copy_out", "gathered"),
            (_fsdp_param_group, "foreach_reduce", "gathered"),
            (FSDPParam, "to_accumulated_grad_if_needed", "gradients"),
        ):
            stack.enter_context(replaced(owner, name, tagged(getattr(owner, name), category)))
        yield


def _frozen(parts: Sequence[nn.Module]) -> int:
    """Elements of weights that are not trained, which the training state does not list."""
    found: list[Any] = [p for part in parts for p in part.parameters() if not p.requires_grad]
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in found)


def thinned(ledger: Ledger) -> tuple[tuple[float, dict[str, int]], ...]:
    """At most so many points; of those left out the highest stays."""
    points, whole = ledger.timeline, max(ledger.operations, 1)
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    kept = [max(group, key=lambda point: sum(point[1].values())) for group in groups]
    return tuple((at / whole, now) for at, now in kept)


def _first_cause(error: BaseException) -> str:
    """What went wrong before others wrapped it: a shape that does not fit, say."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


def stage_name(part: Any) -> str:
    if not isinstance(part, Stage):
        return "whole model"
    layers = [int(name) for name in part.layers]  # type: ignore[union-attr]
    names = ["embedding"] if part.is_first else []
    names += (
        [f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"] if layers else []
    )
    names += ["head" + (" and MTP" if len(part.mtp) else "")] if part.is_last else []
    return ", ".join(names)
