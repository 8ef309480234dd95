"""A model spread for inference: weights in the type they compute in, no gradients, any layout of tp, pp, ep,
dp.

The same shards and moves as in training (`parallelize`). Each replica of the attention reads tokens of its
own; experts that `ep` shares out among replicas are reached by the exchange, so all ranks must call `hidden`
together, those with nothing to read as well. Pipeline stages run one after the other, each handing its hidden
states on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whalepod.models.attention import Attend, Attention
from whalepod.models.transformer import Transformer
from whalepod.parallel.mesh import Mesh
from whalepod.parallel.parallelize import Initial, Part, fill, place
from whalepod.parallel.stage import Stage, tie_stages
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec
from whalepod.spec.schedule import rank_of_stage


class Inference:
    """This rank's parts of a model. T tokens stand in one row, whatever sequences they are of."""

    def __init__(self, parts: list[Part], spec: ModelSpec, mesh: Mesh) -> None:
        self.spec, self.mesh = spec, mesh
        self.stages = {part.index if isinstance(part, Stage) else 0: part for part in parts}
        self.layers = [m for part in parts for m in part.modules() if isinstance(m, Attention)]
        self.dtype = next(parts[0].parameters()).dtype
        layout = mesh.layout
        self._owners = [
            rank_of_stage(layout.schedule, index, layout.pp) if layout.pp > 1 else 0
            for index in range(layout.num_stages)
        ]

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    @property
    def has_mtp(self) -> bool:
        return self.spec.num_nextn_predict_layers > 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage, and with it the hidden states that `hidden` ends with."""
        return self._owners[-1] == self.mesh["pp"].rank

    @property
    def _last(self) -> Any:
        return self.stages[len(self._owners) - 1]

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """The last hidden states [T, D], normalised, on ranks of the last stage; nothing of use on others."""
        pp, tp = self.mesh["pp"], self.mesh["tp"]
        tokens, positions = self._padded(tokens_T), self._padded(positions_T)
        x = tokens.unsqueeze(0)
        for index, owner in enumerate(self._owners):
            if owner == pp.rank:
                x = self.stages[index].hidden(x, positions, attend)
            else:
                shape = (1, len(tokens) // tp.size, self.spec.hidden_size)
                x = torch.empty(shape, dtype=self.dtype, device=self.device)
            if index < len(self._owners) - 1:
                pp.broadcast(x, owner)
        return tp.gather(x, 1)[0, : len(tokens_T)]

    def logits(self, hidden_TD: Tensor, rows: Tensor) -> Tensor:
        """Of some rows of the hidden states, [N, V], on every rank of the replica."""
        pp, tp = self.mesh["pp"], self.mesh["tp"]
        if self.is_last:
            logits = tp.gather(self._head(hidden_TD[rows]), -1)
        else:
            logits = torch.empty(len(rows), self.spec.vocab_size, dtype=self.dtype, device=self.device)
        return pp.broadcast(logits.contiguous(), self._owners[-1])

    def guesses(
        self,
        hidden_TD: Tensor,
        rows: Tensor,
        following_N: Tensor,
        positions_N: Tensor,
        attend: Attend,
        wanted: Tensor,
    ) -> Tensor:
        """The MTP block over some `rows` of hidden states and the tokens that follow them: of those of its N
        results that are `wanted` the likeliest token, on every rank of the replica."""
        pp, tp = self.mesh["pp"], self.mesh["tp"]
        if self.is_last:
            block = self._last.mtp[0]
            following, positions = self._padded(following_N), self._padded(positions_N)
            part = self._padded(hidden_TD[rows]).chunk(tp.size)[tp.rank].unsqueeze(0)
            embedding = self._last.embed_tokens(following.unsqueeze(0))
            tables = self._last.tables(following.unsqueeze(0), positions)
            h = tp.gather(block(part, embedding, tables, attend), 1)[0]
            logits = tp.gather(self._head(h[wanted]), -1)
            best = logits.argmax(-1) if len(wanted) else wanted.clone()
        else:
            best = torch.empty_like(wanted)
        return pp.broadcast(best, self._owners[-1])

    def _head(self, h_ND: Tensor) -> Tensor:
        """Logits of this rank's part of the vocabulary: the layer without the moves of `tp` around it."""
        head = self._last.lm_head
        return type(head).forward(head, h_ND)

    def _padded(self, tensor: Tensor) -> Tensor:
        """With zeros behind it, so that `tp` ranks have equal parts."""
        missing = -len(tensor) % self.mesh["tp"].size
        return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:]))) if missing else tensor


def whole(model: Transformer, mesh: Mesh) -> Inference:
    """A model that is on this device as it is."""
    return Inference([model], model.spec, mesh)


def check_serving(spec: ModelSpec, layout: Layout) -> None:
    """Raises UserError for a layout that serving cannot have, or the model."""
    if layout.cp > 1:
        raise UserError(f"layout.cp {layout.cp}: serving cuts no sequences; use tp, pp, or dp_shard with ep")
    # Micro-batches are training's: as many as fill any schedule.
    filled = replace(layout, micro_batch=1, global_batch=2 * layout.pp * layout.num_replicas)
    filled.check_model(spec, layout.tp)


def spread(spec: ModelSpec, mesh: Mesh, dtype: torch.dtype, initial: Initial) -> Inference:
    """A model with weights of `dtype`, spread by the mesh's layout; `initial` gives this rank's part of each.

    Raises UserError for a layout that serving cannot have, or the model.
    """
    layout = mesh.layout
    check_serving(spec, layout)
    with torch.device("meta"):
        model = Transformer(spec)
    model.eval().requires_grad_(False)
    parts, held = place(model, mesh, 1, dtype)
    for part in parts:
        fill(part, "", held, initial, mesh.device)
        part.eval()
    if layout.pp > 1:
        tie_stages([part for part in parts if isinstance(part, Stage)])
    return Inference(parts, spec, mesh)
