"""A pipeline stage: some consecutive layers of a Transformer, under the whole model's parameter names.

Because names stay, checkpoints, weight files, initial values and the sharding table work on a stage as
on the whole. The loss is made inside the last stage: head and MTP blocks are its parameters.

MTP and a tied head need the embedding on the last stage too, so first and last hold a copy each
(DeepSeek-V3 instead put both on one rank, section 3.2.3, as a V does here). A copy's gradient is that of
its own uses; the two have to be added: `shared_parameters`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from whalepod.models.attention import Attend, Tables, causal
from whalepod.models.loss import head_loss
from whalepod.models.transformer import Transformer
from whalepod.parallel.comm import Axis
from whalepod.spec.model import ModelSpec
from whalepod.spec.schedule import stages_of_rank
from whalepod.spec.stages import StageSplit


class Stage(Transformer):
    """Some consecutive layers of a Transformer, under their own names, with what stands before and after.

    `layers` is keyed by the layers' numbers in the whole model. The first stage has the embedding; the last
    has final norm, head and MTP blocks, and a copy of the embedding if MTP or a tied head needs it. What a
    stage does not have is None.
    """

    def __init__(self, model: Transformer, index: int, split: StageSplit, attend: Attend = causal) -> None:
        nn.Module.__init__(self)
        self.spec, self.index, self.num_stages, self.attend = model.spec, index, split.num_stages, attend
        self.documents: Callable[[Tensor], tuple[Tensor, Attend]] | None = None
        """Where documents are apart: what makes of positions within them this rank's, and its attention."""
        parts: Any = self  # attributes that Transformer always has may be None here
        embedding, head = model.embed_tokens, model.lm_head
        copies = self.is_last and bool(shared_parameters(self.spec))
        if copies and not self.is_first:
            embedding = copy.deepcopy(embedding)
            if self.spec.tie_word_embeddings:
                head = copy.deepcopy(head)
                head.weight = embedding.weight
        has_embedding = self.is_first or copies
        # In the order of the whole model, so that a tied weight goes by the same name.
        parts.embed_tokens = embedding if has_embedding else None
        start, end = split.layers[index]
        parts.layers = nn.ModuleDict({str(i): model.layers[i] for i in range(start, end)})
        parts.norm = model.norm if self.is_last else None
        parts.lm_head = head if self.is_last else None
        parts.mtp = model.mtp if self.is_last else nn.ModuleList()
        self.head_loss = head_loss

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    def forward(  # type: ignore[override]
        self, x: Tensor, positions: Tensor | None = None, targets_BSK: Tensor | None = None
    ) -> Tensor:
        """Tokens [b, S] on the first stage, else hidden states [b, S, D], to hidden states; on the last, to
        the summed losses [1, 1 + MTP depths].

        positions: [S] or [b, S], for every stage. targets_BSK is read by the last.
        """
        attend = self.attend
        if self.documents is not None and positions is not None:
            positions, attend = self.documents(positions)
        cos_sin = self.tables(x, positions)
        x = self._blocks(x, cos_sin, attend)
        if not self.is_last:
            return x
        assert targets_BSK is not None
        losses = self.losses(x, targets_BSK, cos_sin, attend)
        # Not a view: torch cuts it from its graph in place.
        return torch.stack([torch.stack([losses.main, *losses.mtp])])

    def _blocks(self, x: Tensor, cos_sin: Tables, attend: Attend) -> Tensor:
        x = self.embed_tokens(x) if self.is_first else x
        for layer in cast(nn.ModuleDict, self.layers).values():
            x = layer(x, cos_sin, attend)
        return self.norm(x) if self.is_last else x


def shared_parameters(spec: ModelSpec) -> tuple[str, ...]:
    """Names of parameters that the first and the last stage both have, when these are two."""
    needed = spec.tie_word_embeddings or spec.num_nextn_predict_layers > 0
    return ("embed_tokens.weight",) if needed else ()


def make_stages(
    model: Transformer, split: StageSplit, schedule: str, pp: Axis, attend: Attend = causal
) -> list[Stage]:
    """This rank's stages, in the model's order, made of `model`'s own modules; it may be on the meta device.

    What the rank does not hold is left to `model`, which is to be dropped.
    """
    own = stages_of_rank(schedule, pp.rank, pp.size, split.num_stages // pp.size)
    return [Stage(model, index, split, attend) for index in own]


def tie_stages(stages: Sequence[Stage]) -> None:
    """Where one rank has the first stage and the last (a V), makes what both have one Parameter.

    Call it when parameters have their final place and values. Not under FSDP2, where a parameter belongs to
    one root module: there the copies stay two, on the same rank.
    """
    first, last = stages[0], stages[-1]
    if first.is_first and last.is_last and first is not last and last.embed_tokens is not None:
        tied = last.lm_head.weight is last.embed_tokens.weight
        last.embed_tokens.weight = first.embed_tokens.weight
        if tied:
            last.lm_head.weight = first.embed_tokens.weight
