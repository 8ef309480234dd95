"""Pipeline parallelism: consecutive layers on different ranks, micro-batches passing through.

`Pipeline` hands this rank's stages (`parallel/stage.py`) to `torch.distributed.pipelining`, whose schedules
decide what runs when (`spec/schedule.py` says how they differ, and is held equal to them). Nothing here
decides an order, except forward only.

What torch leaves to the caller:

* Shapes. Every stage is given its input and output beforehand, so that ranks send nothing but data.
* The loss is made inside the last stage (head and MTP blocks are parameters, which FSDP must gather), which
  returns a few sums instead of logits; a rank's `loss_fn` only weighs them.
* Zero-bubble schedules compute weight gradients by themselves and add them to `.grad`; no hook of autograd
  sees them. `on_backward` is called after every backward pass that made weight gradients.
* FSDP2 must not reduce gradients, nor drop weights, pass by pass: torch's stages turn that off, and reduce
  once, at a step's end. So `set_requires_gradient_sync` and its kin are not the trainer's to call.
* Losses of a step are kept with their graphs, which hold the last stage's inputs: here they are cut off.
* Messages wait in buffers which torch would hold for all micro-batches of a step, twice the activations
  of a stage's edge for each. Here a buffer lives from its message to its use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import (
    _Action,
    _add_send_recv,
    _add_unshard_reshard,
    _ComputationType,
    _PipelineScheduleRuntime,
)
from torch.utils.checkpoint import GraphExecGroup

from whalepod.parallel.comm import Axis
from whalepod.parallel.stage import Stage
from whalepod.spec.schedule import check_schedule, rank_of_stage

SCHEDULES: dict[str, type] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}


class Hidden(NamedTuple):
    """What stages send: sequences, their length (of this rank's part, where `tp` cuts them) and type."""

    micro_batch: int
    length: int
    dtype: torch.dtype


class Pipeline:
    """This rank's stages under one schedule.

    hidden: of one micro-batch between stages. `tokens` and `targets` may be longer than `hidden.length`: by
    the size of `tp`, which cuts sequences inside the stages. on_backward(stage): called whenever a stage's
    weight gradients may have grown, with gradients in `.grad`.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        schedule: str,
        num_micro_batches: int,
        pp: Axis,
        hidden: Hidden,
        device: torch.device,
        on_backward: Callable[[Stage], None] = lambda stage: None,
    ) -> None:
        check_schedule(schedule, pp.size, len(stages), num_micro_batches)
        self._stages, self._name, self._pp, self._hidden = list(stages), schedule, pp, hidden
        self._device, self._num_micro_batches = device, num_micro_batches
        self._weights = torch.zeros(0)
        self._num_losses = 1 + stages[0].spec.num_nextn_predict_layers
        self._evaluations: dict[int, _ForwardOnly] = {}
        wrapped = self._wrapped(on_backward)
        cls = SCHEDULES[schedule]
        single = issubclass(cls, schedules.PipelineScheduleSingle)
        for stage in self._stages:
            if isinstance(stage, FSDPModule) and not single:
                # These schedules gather and drop whole stages by themselves. Did a forward pass drop weights
                # between a backward pass's two halves, the second would add to shards: wrong, and silently.
                stage.set_reshard_after_forward(False)
        self._schedule = cls(
            wrapped[0] if single else wrapped, num_micro_batches, loss_fn=self._weigh, scale_grads=False
        )

    def step(self, tokens_BS: Tensor, targets_BSK: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
        """Forward and backward of a step's micro-batches, B of them together; gradients are added to `.grad`.

        What is differentiated is the sum of losses [1 + MTP depths] times `weights`. Returns the losses'
        sums over the tokens, zeros on a rank without the last stage.
        """
        self._weights = weights
        return self._run(self._schedule, tokens_BS, targets_BSK, positions, self._num_micro_batches)

    @torch.no_grad()
    def evaluate(self, tokens_BS: Tensor, targets_BSK: Tensor, positions: Tensor) -> Tensor:
        """The losses' sums alone, for any number of micro-batches."""
        count = tokens_BS.shape[0] // self._hidden.micro_batch
        if count not in self._evaluations:
            self._evaluations[count] = _ForwardOnly(self._wrapped(), self._name, count)
        return self._run(self._evaluations[count], tokens_BS, targets_BSK, positions, count)

    def _run(
        self, schedule: Any, tokens_BS: Tensor, targets_BSK: Tensor, positions: Tensor, count: int
    ) -> Tensor:
        batch = tokens_BS.shape[0]
        assert batch == count * self._hidden.micro_batch, (batch, count, self._hidden)
        if positions.dim() == 1:
            positions = positions.expand(batch, -1)  # torch cuts everything along the batch
        inputs = (tokens_BS,) if self._stages[0].is_first else ()
        # torch wants a target where there is a loss; ours has been in the stage already.
        target = targets_BSK if self._stages[-1].is_last else None
        out = schedule.step(*inputs, target=target, positions=positions, targets_BSK=targets_BSK)
        if out is None:
            return torch.zeros(self._num_losses, device=self._device)
        return out.detach().sum(0)

    def _weigh(self, losses: Tensor, _target: Tensor) -> Tensor:
        return (losses * self._weights).sum()

    def _wrapped(self, on_backward: Callable[[Stage], None] = lambda stage: None) -> list[TorchStage]:
        wrapped = [TorchStage(s, self._pp, self._hidden, self._device, on_backward) for s in self._stages]
        for stage in wrapped:
            stage.stage_index_to_group_rank = _homes(self._name, stage.num_stages, self._pp.size)
        return wrapped


def _homes(schedule: str, num_stages: int, pp: int) -> dict[int, int]:
    return {stage: rank_of_stage(schedule, stage, pp) for stage in range(num_stages)}


class TorchStage(PipelineStage):
    """torch's stage with fixed shapes, counted messages, short-lived buffers and `on_backward`."""

    def __init__(
        self,
        stage: Stage,
        pp: Axis,
        hidden: Hidden,
        device: torch.device,
        on_backward: Callable[[Stage], None],
    ) -> None:
        shape = (hidden.micro_batch, hidden.length, stage.spec.hidden_size)
        states = torch.empty(shape, dtype=hidden.dtype, device="meta", requires_grad=True)
        tokens = torch.empty(shape[:2], dtype=torch.int64, device="meta")
        losses = torch.empty(1, 1 + stage.spec.num_nextn_predict_layers, device="meta", requires_grad=True)
        super().__init__(
            stage,
            stage.index,
            stage.num_stages,
            device,
            input_args=tokens if stage.is_first else states,
            output_args=losses if stage.is_last else states,
            group=pp.group,
        )
        self._pp, self._on_backward = pp, on_backward

    # Messages --------------------------------------------------------------------------------------

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id))

    def _counted(self, sends: list[Any]) -> list[Any]:
        for send in sends:
            self._pp.traffic.add(self._pp.name, "send", send.tensor)
        return sends

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        self._make_buffers(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        if self.has_backward and not self.is_last:
            self._make_buffers(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _make_buffers(self, infos: Sequence[Any]) -> None:
        for info in infos:
            if not info.is_root_arg and info.tensor_meta is not None:
                meta = info.tensor_meta
                info.buffer = torch.empty_strided(
                    meta.shape, meta.stride, dtype=meta.dtype, device=self.device
                )

    def _prepare_forward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_forward_infra(1, *args, **kwargs)
        self.args_recv_info = _without_buffers(self.args_recv_info[0], num_microbatches)
        return result

    def _prepare_backward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_backward_infra(1, *args, **kwargs)
        self.chunks = num_microbatches
        self.grad_recv_info = _without_buffers(self.grad_recv_info[0], num_microbatches)
        return result

    # Work ------------------------------------------------------------------------------------------

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        out = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        for info in self.args_recv_info[fwd_chunk_id]:
            info.buffer = None  # the graph has it as long as it needs it
        return out

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        for info in self.grad_recv_info.get(bwd_chunk_id, ()):
            info.buffer = None
        if full_backward:
            self._after_weights()
            self._let_go(bwd_chunk_id, loss)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        # torch makes a pass for every group of weights; together they go through a recomputed block once.
        with GraphExecGroup():
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._after_weights()
        self._let_go(bwd_chunk_id)

    def _let_go(self, chunk: int, loss: Tensor | None = None) -> None:
        """Cuts a finished micro-batch's losses from their graph. torch keeps them to the step's end, and the
        graph's leaves are the stage's input and its gradient."""
        if self.is_last:
            self.output_chunks[chunk].detach_()
            if loss is not None:
                loss.detach_()

    def _after_weights(self) -> None:
        if isinstance(self.submod, FSDPModule):
            _sum_unsharded(self.submod)
        self._on_backward(cast(Stage, self.submod))


def _without_buffers(infos: tuple[Any, ...], count: int) -> dict[int, tuple[Any, ...]]:
    for info in infos:
        info.buffer = None
    return {chunk: tuple(copy.copy(info) for info in infos) for chunk in range(count)}


def _sum_unsharded(module: nn.Module) -> None:
    """Moves fresh gradients of a whole FSDP2 stage into the sums that FSDP2 keeps in its reduction type.

    It does so itself after a backward pass, but not for weight gradients of a zero-bubble schedule, which
    would add up in BF16.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            for group in cast(Any, part)._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    if hasattr(parameter, "_unsharded_param"):
                        parameter.accumulate_unsharded_grad_if_needed()
                        parameter.to_accumulated_grad_if_needed()


class _ForwardOnly(_PipelineScheduleRuntime):
    """Every micro-batch through a rank's first stage, then through its second: torch has no such schedule
    for a V, and none that would take any number of micro-batches."""

    def __init__(self, stages: list[TorchStage], name: str, num_micro_batches: int) -> None:
        super().__init__(stages, num_micro_batches)
        homes = _homes(name, self._num_stages, self.pp_group_size)
        self.stage_index_to_group_rank = homes
        for stage in stages:
            stage.stage_index_to_group_rank = homes
        orders: dict[int, list[_Action]] = {rank: [] for rank in range(self.pp_group_size)}
        for stage, rank in homes.items():
            for micro_batch in range(num_micro_batches):
                orders[rank].append(_Action(stage, _ComputationType.FORWARD, micro_batch))
        gathered = {rank: _add_unshard_reshard(list(order)) for rank, order in orders.items()}
        self.pipeline_order_with_comms = _add_send_recv(gathered, homes.__getitem__, self._num_stages)
