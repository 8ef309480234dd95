"""Text from a spread model: the most likely next token, under any layout of weights.

A model too large for one device is too large for one device to generate with, so the same shards that
train it predict here. Every rank runs the same prompt: FSDP gathers each block when it is its turn,
experts get their tokens by the layout's exchange, `tp` ranks hold their part of the sequence between
matrices, and pipeline stages run one after the other, each handing its hidden states to all.

Of the head only the last position is computed, and never all of its logits: each `tp` rank picks the best
of its part of the vocabulary, and the pairs (value, id) are compared.

There is no cache: each token costs a forward pass over a sequence of fixed length, whose end is padding that
causal attention never looks at. That is for proofs and for samples during training; serving is `serve/`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from whalepod.models.attention import Attend
from whalepod.models.transformer import Transformer
from whalepod.parallel.comm import Axis
from whalepod.parallel.parallelize import DTYPES, Parallel
from whalepod.parallel.stage import Stage
from whalepod.spec.errors import UserError
from whalepod.spec.schedule import rank_of_stage


@torch.no_grad()
def greedy(parallel: Parallel, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """The `max_new_tokens` ids that follow `prompt_ids`, each the most likely; the same on every rank.

    All ranks call it with the same arguments. Raises UserError for an empty prompt, ids beyond the
    vocabulary, more positions than the model has, or a layout with context parallelism.
    """
    mesh = parallel.mesh
    if (cp := mesh.layout.cp) > 1:
        raise UserError(f"layout.cp {cp}: a prompt cannot be cut over context-parallel ranks yet; use cp 1")
    parallel.spec.check_prompt(prompt_ids, max_new_tokens)
    stages = {part.index if isinstance(part, Stage) else 0: part for part in parallel.parts}
    for part in stages.values():
        module: Any = part
        # FSDP2 gathers weights for what it knows as a forward method, and for nothing else.
        if not hasattr(module, "predict"):
            module.predict = partial(_predict, part, mesh["tp"], parallel.attend)
            register_fsdp_forward_method(module, "predict")
    ids = list(prompt_ids)
    length = len(ids) + max_new_tokens - 1
    length += -length % mesh["tp"].size
    was_training = parallel.parts[0].training
    parallel.train(False)
    for _ in range(max_new_tokens):
        padded = ids + [0] * (length - len(ids))
        tokens = torch.tensor([padded[:length]], device=mesh.device)
        ids.append(_next(parallel, stages, tokens, len(ids) - 1))
    parallel.train(was_training)
    return ids[len(prompt_ids) :]


def _next(parallel: Parallel, stages: dict[int, Transformer], tokens_BS: Tensor, last: int) -> int:
    """The best token after position `last`, on every rank."""
    mesh, layout = parallel.mesh, parallel.mesh.layout
    pp, tp = mesh["pp"], mesh["tp"]
    hidden = (1, tokens_BS.shape[1] // tp.size, parallel.spec.hidden_size)
    x = tokens_BS
    for index in range(layout.num_stages):
        owner = rank_of_stage(layout.schedule, index, pp.size)
        is_last = index == layout.num_stages - 1
        if owner == pp.rank:
            part: Any = stages[index]
            x = part.predict(x, tokens_BS.shape[1], last)
            x = _best(x, tp) if is_last else x
        else:
            shape, dtype = ((), torch.int64) if is_last else (hidden, DTYPES[layout.precision])
            x = torch.empty(shape, dtype=dtype, device=mesh.device)
        pp.broadcast(x, owner)
    return int(x)


def _predict(part: Transformer, tp: Axis, attend: Attend, x: Tensor, length: int, last: int) -> Tensor:
    """Tokens [1, S], or hidden states [1, S / tp, D] of the stage before, to those after this part's layers;
    where the head is, to the logits [V / tp] that this rank has of position `last`."""
    x = part.hidden(x, torch.arange(length, device=x.device), attend)
    if isinstance(part, Stage) and not part.is_last:
        return x
    # Every rank offers the row at the place of the wanted one in its part; one of them is it.
    rank, place = divmod(last, x.shape[1])
    row = tp.gather(x[:, place])[rank]
    return F.linear(row, part.lm_head.weight)


def _best(logits: Tensor, tp: Axis) -> Tensor:
    """The id of the largest logit, the first of equal ones, over a vocabulary split by `tp`."""
    own = logits.argmax()
    # In float64 both numbers of a pair are exact.
    pair = torch.stack((logits[own].double(), (own + tp.rank * len(logits)).double()))
    pairs = tp.gather(pair.unsqueeze(0))
    return pairs[pairs[:, 0].argmax(), 1].long()
