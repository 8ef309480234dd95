"""Context parallelism: each `cp` rank has a part of every sequence, and attention sees all of it.

MLA makes long sequences cheap to split. What queries must see of the other ranks' tokens is their
latent, 576 numbers a token in DeepSeek-V3, not 128 heads of keys and values (40,960): the latents
are gathered, 71 times fewer bytes, and each rank expands what its own queries look at. Grouped-query
attention gathers its keys and values in the same way.

Under a causal mask later queries see more keys. A sequence is therefore cut into 2 x cp chunks and
rank r gets chunks r and 2 cp - 1 - r: together they see 2 cp + 1 chunks, on every rank the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.models.attention import Attend, Attention, causal
from whalepod.parallel.comm import Axis


def positions(length: int, cp: Axis, device: torch.device) -> Tensor:
    """The positions [length / cp] of this rank's tokens in sequences of `length`."""
    everywhere = torch.arange(length, device=device)
    if cp.size == 1:
        return everywhere
    chunks = everywhere.chunk(2 * cp.size)
    return torch.cat((chunks[cp.rank], chunks[2 * cp.size - 1 - cp.rank]))


def document_positions(tokens_BS: Tensor, separator: int) -> Tensor:
    """Positions [B, S] of packed documents' tokens within them; each but a sequence's first begins behind a
    `separator`."""
    index = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
    begins = F.pad(tokens_BS[:, :-1] == separator, (1, 0))
    return index - (begins * index).cummax(1).values


def context_attend(cp: Axis) -> Attend:
    """The models' `attend` seam over sequences that lie on the ranks of `cp`."""
    if cp.size == 1:
        return causal

    def attend(attention: Attention, q: Tensor, kv: Tensor) -> Tensor:
        chunk = kv.shape[1] // 2
        # From rank order (chunk r beside chunk 2 cp - 1 - r) back to the sequence's.
        pieces = cp.gather(kv, 1).split(chunk, dim=1)
        whole = torch.cat((*pieces[0::2], *reversed(pieces[1::2])), dim=1)
        early, late = q.split(chunk, dim=1)
        ends = ((cp.rank + 1) * chunk, (2 * cp.size - cp.rank) * chunk)
        seen = (attention.expanded(x, whole[:, :e], None) for x, e in zip((early, late), ends, strict=True))
        return torch.cat(tuple(seen), dim=1)

    return attend
