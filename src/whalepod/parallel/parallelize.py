"""The only door: a model and a Layout in, a model spread over this job's devices out.

Applied in one fixed order: add adapters, cut the parameters by the table, put the moves of tensor parallelism
around the modules, give the experts their exchange, compute in FP8, recompute, and last FSDP2 or flat
masters, which own the memory from then on. A model on the meta device is filled on the way, under FSDP2
block by block, so that a rank never holds more than its share and one block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from whalepod.models.attention import Attend, choose_core
from whalepod.models.lora import add_adapters
from whalepod.models.loss import not_counted, seen
from whalepod.models.moe import MoELayer, Router
from whalepod.models.tiled import tiled
from whalepod.models.transformer import Losses, Transformer, initial_value, target_windows
from whalepod.parallel.context import context_attend, document_positions, documents_apart, positions
from whalepod.parallel.exchange import make_dispatcher
from whalepod.parallel.mesh import Mesh
from whalepod.parallel.pipeline import Hidden, Pipeline
from whalepod.parallel.recompute import apply_recompute
from whalepod.parallel.replicated import Replicated
from whalepod.parallel.sharded import Sharded
from whalepod.parallel.sharding import Box, Held, shard_parameters
from whalepod.parallel.stage import Stage, make_stages, shared_parameters, tie_stages
from whalepod.parallel.state import TrainingState, sum_in_buckets
from whalepod.parallel.tensor import split_tensors
from whalepod.precision.fp8_training import compute_in_fp8
from whalepod.precision.widened import widen_products
from whalepod.spec.model import ModelSpec
from whalepod.spec.run import FP8Config, LoRAConfig
from whalepod.spec.schedule import RULES
from whalepod.spec.stages import split_stages

Part = Transformer  # a whole model, or a Stage of one
Initial = Callable[[str, Box], Tensor]
"""The first value of a parameter, by its name and the part of it that this rank holds; float32."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
"""Of weights and activations between products, by precision."""


class Batch(NamedTuple):
    """What this rank computes of some sequences, under context parallelism its part of each."""

    tokens_BS: Tensor
    targets_BSK: Tensor
    positions: Tensor
    """[S]; where documents are apart [B, S] of the whole sequences, counted from documents' beginnings."""


class Parallel:
    """A spread model: its parts (the whole model, or this rank's pipeline stages) and training state."""

    def __init__(self, parts: list[Part], state: TrainingState, spec: ModelSpec, mesh: Mesh) -> None:
        self.parts, self.state, self.spec, self.mesh = parts, state, spec, mesh
        self.attend: Attend = context_attend(mesh["cp"])
        self._separator: int | None = None
        self._pipelines: dict[tuple[int, int], Pipeline] = {}

    def train(self, mode: bool = True) -> None:
        for part in self.parts:
            part.train(mode)

    def mask_documents(self, separator: int) -> None:
        """Attention ends at the beginning of a document: behind a token `separator`."""
        self._separator = separator
        for part in self.parts:
            if isinstance(part, Stage):
                part.documents = partial(documents_apart, cp=self.mesh["cp"])

    @property
    def routers(self) -> list[Router]:
        return [m for part in self.parts for m in part.modules() if isinstance(m, Router)]

    def batch(self, rows: Tensor) -> Batch:
        """This rank's share of sequences: `rows` [B, S + 1 + MTP depths], the same on all ranks that share
        their parts. Tokens below 0 (-1 - token) are read and not predicted."""
        depths = self.spec.num_nextn_predict_layers
        length = rows.shape[1] - 1 - depths
        where = positions(length, self.mesh["cp"], rows.device)
        targets = target_windows(rows[:, 1:], depths)
        rows = seen(rows)
        tokens = rows[:, :length]
        if self.mesh["cp"].size > 1:
            tokens, targets = tokens[:, where], targets[:, where]
        if self._separator is not None:
            where = document_positions(rows[:, :length], self._separator)
        return Batch(tokens, targets, where)

    def backward(self, rows: Tensor, tokens: int, mtp_weight: float) -> Tensor:
        """Forward and backward passes of a step's sequences [B, S + 1 + MTP depths].

        tokens: of the global batch, over which losses are means. Leaves gradients summed over all ranks
        in the state, and returns this rank's parts [2] of the mean next-token and mean MTP loss.
        """
        depths = self.spec.num_nextn_predict_layers
        # The mean over tokens, and of MTP losses over depths too.
        means = torch.tensor([1.0, *[1 / max(depths, 1)] * depths], device=rows.device) / tokens
        weights = means * torch.tensor([1.0, *[mtp_weight] * depths], device=rows.device)
        self.state.start_step()
        if self.mesh.layout.pp > 1:
            sums = self._pipeline(rows, len(rows) // self.mesh.layout.micro_batch).step(
                *self.batch(rows), weights
            )
        else:
            sums = torch.zeros(1 + depths, device=rows.device)
            micro_batches = rows.split(self.mesh.layout.micro_batch)
            for index, micro in enumerate(micro_batches):
                sums += self._micro_batch(index, micro, weights, index == len(micro_batches) - 1)
        self.state.finish_gradients()
        if self.copies:
            copies = [g for name, g, _ in self.state.gradients() if name in self.copies]
            sum_in_buckets(copies, self.mesh["ends"])
        parts = sums.double() * means
        return torch.stack((parts[0], parts[1:].sum()))

    def clip(self, max_norm: float) -> Tensor:
        """Scales all gradients so that their global 2-norm is at most `max_norm`; returns the norm.

        Each rank adds the squares of what it holds, over the number of ranks that hold the same; one sum
        over the world is then right for any mix of axes.
        """
        names, gradients, holders = zip(*self.state.gradients(), strict=True)
        shares = [1 / (n * (1 + (name in self.copies))) for name, n in zip(names, holders, strict=True)]
        squares = torch.stack(torch._foreach_norm(gradients)).double().square()
        square = squares @ torch.tensor(shares, dtype=torch.float64, device=squares.device)
        norm = self.mesh.world.all_reduce(square).sqrt().float()
        weights = [*self.state.decayed, *self.state.plain]
        torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
        return norm

    @torch.no_grad()
    def loss(self, rows: Tensor, counted: int | None = None) -> Tensor:
        """This rank's part of the summed next-token loss of the first `counted` of some sequences (None: of
        all), without gradient."""
        batch = self.batch(rows)
        if counted is not None:
            targets = batch.targets_BSK.clone()
            targets[counted:] = not_counted(targets[counted:])
            batch = batch._replace(targets_BSK=targets)
        if self.mesh.layout.pp > 1:
            return self._pipeline(rows, self.mesh.layout.accumulation_steps).evaluate(*batch)[0]
        return self._losses(batch)[0]

    def total(self, parts: Tensor) -> Tensor:
        """Sums what ranks returned as their parts of a loss. The ranks of `tp` all hold the same part."""
        return self.mesh.world.all_reduce(parts / self.mesh["tp"].size)

    def held(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Weights (masters and copies), buffers, gradients and moments that this rank holds between steps."""
        weights = [*self.state.decayed, *self.state.plain]
        held: list[Any] = [*weights, *(w.grad for w in weights if w.grad is not None)]
        for part in self.parts:
            held += [*part.parameters(), *part.buffers()]
        return held + [t for values in optimizer.state.values() for t in values.values()]

    def held_bytes(self, optimizer: torch.optim.Optimizer) -> int:
        """Bytes of `held`."""
        held: list[Any] = [*self.held(optimizer)]
        storages = [(t.to_local() if hasattr(t, "to_local") else t).untyped_storage() for t in held]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    @property
    def copies(self) -> frozenset[str]:
        """Names of weights of which two pipeline ranks, this one and another, hold a copy each."""
        if self.mesh["ends"].size == 1 or RULES[self.mesh.layout.schedule].placement == "v":
            return frozenset()
        return frozenset(shared_parameters(self.spec))

    def _micro_batch(self, _index: int, rows: Tensor, weights: Tensor, is_last: bool) -> Tensor:
        """One of a step's forward and backward passes; the summed losses."""
        losses = self._losses(self.batch(rows))
        self.state.before_backward(is_last)
        (losses @ weights).backward()
        return losses.detach()

    def _losses(self, batch: Batch) -> Tensor:
        """Summed losses [1 + MTP depths] of a whole model."""
        where, attend = batch.positions, self.attend
        if self._separator is not None:
            where, attend = documents_apart(where, self.mesh["cp"])
        losses: Losses = self.parts[0](batch.tokens_BS, batch.targets_BSK, where, attend)
        return torch.stack((losses.main, *losses.mtp))

    def _pipeline(self, rows: Tensor, micro_batches: int) -> Pipeline:
        """The schedule's runner for so many micro-batches of sequences as long as these."""
        layout, depths = self.mesh.layout, self.spec.num_nextn_predict_layers
        length = (rows.shape[1] - 1 - depths) // (layout.cp * layout.tp)
        if (length, micro_batches) not in self._pipelines:
            self._pipelines[length, micro_batches] = Pipeline(
                [part for part in self.parts if isinstance(part, Stage)],
                layout.schedule,
                micro_batches,
                self.mesh["pp"],
                Hidden(layout.micro_batch, length, DTYPES[layout.precision]),
                self.mesh.device,
                lambda stage: self.state.after_backward(),
            )
        return self._pipelines[length, micro_batches]


def seeded(spec: ModelSpec, seed: int) -> Initial:
    """The initial values that depend on names and `seed` alone, under every layout the same."""
    return lambda name, box: initial_value(name, box.whole, spec, seed, box.slices)


def parallelize(
    model: Transformer,
    mesh: Mesh,
    sequence_length: int,
    initial: Initial | None = None,
    fp8: FP8Config | None = None,
    lora: LoRAConfig | None = None,
) -> Parallel:
    """Spreads `model` by the mesh's layout. It must not be used on its own afterwards.

    The layout must fit the model (`Layout.check_model`) and sequences of `sequence_length`, for which
    pipeline stages are balanced. With `initial`, a model on the meta device is materialised with the values
    that it returns for each parameter's name and this rank's part of it; without, parameters are taken as
    they are. fp8: how precision `fp8` rounds. lora: adapters to train instead of the weights.
    """
    layout = mesh.layout
    if lora is not None and lora.r:
        add_adapters(model, lora)
    dtype = DTYPES[layout.precision]
    parts, held = place(model, mesh, sequence_length, dtype)
    for part in parts:
        if mesh.device.type == "cpu":
            choose_core(part, tiled)
        if layout.precision == "fp8":
            compute_in_fp8(part, fp8 or FP8Config())
        apply_recompute(part, layout.recompute, mesh.traffic)

    def filled(module: nn.Module, path: str) -> None:
        if initial is not None:
            fill(module, path, held, initial, mesh.device)

    if layout.fsdp > 1:
        state: TrainingState = Sharded(parts, held, mesh, dtype, filled)
    else:
        for part in parts:
            filled(part, "")
        if layout.pp > 1:
            tie_stages([part for part in parts if isinstance(part, Stage)])
        named = {name: p for part in parts for name, p in part.named_parameters() if p.requires_grad}
        state = Replicated(named, held, mesh, dtype)
    return Parallel(parts, state, model.spec, mesh)


def place(
    model: Transformer, mesh: Mesh, sequence_length: int, frozen: torch.dtype
) -> tuple[list[Part], dict[str, Held]]:
    """What this rank has of a model, for training and for inference alike: its parts, with parameters cut
    (those not trained of type `frozen`) and the moves of `tp` and `ep` around them; what it holds of each."""
    layout = mesh.layout
    if mesh.device.type == "cpu":
        widen_products()
    parts: list[Part] = [model]
    if layout.pp > 1:
        split = split_stages(model.spec, layout.num_stages, sequence_length, layout.stage_layers)
        parts = [*make_stages(model, split, layout.schedule, mesh["pp"], context_attend(mesh["cp"]))]
    held: dict[str, Held] = {}
    for part in parts:
        held |= shard_parameters(part, mesh, frozen)
        split_tensors(part, mesh)
        _spread_experts(part, mesh)
    return parts, held


def _spread_experts(part: nn.Module, mesh: Mesh) -> None:
    dispatcher = make_dispatcher(mesh)
    for module in part.modules():
        if not isinstance(module, MoELayer):
            continue
        module.dispatcher = dispatcher
        if mesh["sequence"].size > 1:
            module.gate.sum_counts = mesh["sequence"].sum


@torch.no_grad()
def fill(module: nn.Module, path: str, held: dict[str, Held], initial: Initial, device: torch.device) -> None:
    """Gives what is still on the meta device memory and initial values; what was shared stays shared.

    path: of the module within its part, from which parameters have their names.
    """
    made: dict[int, nn.Parameter] = {}
    old = list(module.parameters())  # alive until the end, or their ids could come again
    for below, owner in module.named_modules(prefix=path):
        for key, parameter in list(owner._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                name = f"{below}.{key}".lstrip(".")
                value = initial(name, held[name].box).to(device, parameter.dtype)
                made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            owner._parameters[key] = made[id(parameter)]
        for key, buffer in list(owner._buffers.items()):
            if buffer is None or not buffer.is_meta:
                continue
            value = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
            if key not in owner._non_persistent_buffers_set:
                shape = tuple(buffer.shape)
                value.copy_(initial(f"{below}.{key}".lstrip("."), Box(shape, (0,) * len(shape), shape)))
            owner._buffers[key] = value
    del old
