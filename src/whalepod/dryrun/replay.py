"""Micro-batches that repeat others: their memory and counts are added, their layers do not run.

Under a pipeline a rank's step is hundreds of passes through the same layers, and what a pass allocates,
frees, computes and sends does not depend on which micro-batch it is of: after the first of each kind, which
makes gradients, all are alike. So two of each stage and kind run, and for the others the record of the last
that did is played into the ledger at the moment at which the schedule has them. Order, messages and what
waits for its backward pass stay the program's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from whalepod.dryrun.tally import Counts, Tally
from whalepod.dryrun.world import replaced
from whalepod.parallel.ledger import Ledger, Span
from whalepod.parallel.pipeline import TorchStage
from whalepod.spec.layout import Layout
from whalepod.spec.schedule import RULES, actions_of


def repeats(layout: Layout) -> bool:
    """Whether passes are alike: not where weights are gathered ahead, for whatever pass comes next."""
    return layout.pp > 1 and not (layout.zero == 3 and layout.fsdp > 1)


def _shown(layout: Layout, rank: int) -> dict[int, set[int]]:
    """Of each stage of a pipeline rank, the micro-batches that run: the first two of every kind of backward
    pass, of which a schedule may have two."""
    rule, count = RULES[layout.schedule], layout.accumulation_steps
    order = rule.build(rank, layout.pp, layout.num_stages // layout.pp, count)
    kinds: dict[tuple[int, str], list[int]] = {}
    for action in (action for step in order for action in actions_of(step)):
        kinds.setdefault((action.stage, action.kind), []).append(action.micro_batch)
    shown: dict[int, set[int]] = {}
    for (stage, _), micro_batches in kinds.items():
        shown.setdefault(stage, set()).update(micro_batches[:2])
    return shown


@contextmanager
def replaying(layout: Layout, rank: int, ledger: Ledger, tally: Tally) -> Iterator[None]:
    """Within, most passes of pipeline rank `rank` are played back."""
    shown = _shown(layout, rank)
    records: dict[tuple[int, str, bool], tuple[Span, Counts]] = {}

    def replay(name: str, stand_in: Callable[..., Any], category: str) -> Callable[..., Any]:
        run = getattr(TorchStage, name)

        def call(stage: TorchStage, index: int, *args: Any, **kwargs: Any) -> Any:
            key = (stage.stage_index, name, kwargs.get("full_backward", True))
            if index not in shown[stage.stage_index]:
                span, counts = records[key]
                tally.add(counts)
                with ledger.tagged(category):
                    return ledger.again(span, lambda: stand_in(stage, index, *args, **kwargs))
            before = tally.now()
            with ledger.apart() as span:
                out = run(stage, index, *args, **kwargs)
            records[key] = span, tally.now().more(-1, before)
            return out

        return call

    with ExitStack() as stack:
        for name, stand_in, category in (
            ("forward_one_chunk", _forward, "activations"),
            ("backward_one_chunk", _backward, "working"),
            ("backward_weight_one_chunk", _weights, "working"),
        ):
            stack.enter_context(replaced(TorchStage, name, replay(name, stand_in, category)))
        yield


def _forward(stage: Any, index: int, *_args: Any, save_forward_output: bool = True, **_kwargs: Any) -> Tensor:
    """An output that is as large, and the input kept until the backward pass."""
    out = _like(stage._stage_meta.outputs[0], stage.device)
    if stage.is_last and save_forward_output:
        stage.output_chunks.append(out)
    received = [] if stage.is_first else [info.buffer for info in stage.args_recv_info[index]]
    for info in stage.args_recv_info[index]:
        info.buffer = None
    stage.fwd_cache[index] = ((out,), received)
    return out


def _backward(stage: Any, index: int, *_args: Any, full_backward: bool = True, **_kwargs: Any) -> None:
    """A gradient for the stage before; what came from the stage after, and what was kept, goes: at once, or
    with the gradient once weights have theirs."""
    kept = [*stage.fwd_cache.pop(index)]
    for info in stage.grad_recv_info.get(index, ()):
        kept.append(info.buffer)
        info.buffer = None
    inputs = stage._stage_meta.inputs
    gradient = None if stage.is_first else _like(inputs[0], stage.device)
    stage.bwd_cache[index] = (gradient,)
    if not full_backward:
        stage.backward_state[index] = [*kept, gradient]


def _weights(stage: Any, index: int, *_args: Any, **_kwargs: Any) -> None:
    stage.backward_state.pop(index)


def _like(meta: Any, device: torch.device) -> Tensor:
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=device)
