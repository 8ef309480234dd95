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

from whalepod.models.attention import Attend, Attention, causal, document_mask, masked
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


def context_attend(cp: Axis, masks: tuple[Tensor | None, Tensor | None] = (None, None)) -> Attend:
    """The models' `attend` seam over sequences that lie on the ranks of `cp`. masks: where this rank's early
    and its late queries may look among the positions up to their own last; None is causal."""
    if cp.size == 1:
        return causal

    def attend(attention: Attention, q: Tensor, kv: Tensor) -> Tensor:
        # From rank order (chunk r beside chunk 2 cp - 1 - r) back to the sequence's.
        pieces = cp.gather(kv, 1).split(kv.shape[1] // 2, dim=1)
        whole = torch.cat((*pieces[0::2], *reversed(pieces[1::2])), dim=1)
        parts = zip(q.chunk(2, dim=1), _ends(whole.shape[1], cp), masks, strict=True)
        return torch.cat([attention.expanded(x, whole[:, :end], mask) for x, end, mask in parts], dim=1)

    return attend


def _ends(length: int, cp: Axis) -> tuple[int, int]:
    """Positions behind this rank's early and its late chunk of a sequence."""
    chunk = length // (2 * cp.size)
    return (cp.rank + 1) * chunk, (2 * cp.size - cp.rank) * chunk


def documents_apart(positions_BS: Tensor, cp: Axis) -> tuple[Tensor, Attend]:
    """Of whole sequences' positions within their documents, those of this rank's tokens; and attention that
    ends at the beginning of a document."""
    mask = document_mask(positions_BS)
    length = positions_BS.shape[1]
    if cp.size == 1:
        return positions_BS, masked(mask)
    chunk = length // (2 * cp.size)
    early, late = (mask[:, :, end - chunk : end, :end] for end in _ends(length, cp))
    return positions_BS[:, positions(length, cp, mask.device)], context_attend(cp, (early, late))
