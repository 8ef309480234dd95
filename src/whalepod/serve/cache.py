"""The cache of a batch of equally long sequences: per layer one latent (or key-value) row a token."""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.models.attention import Attention
from whalepod.spec.counts import kv_elements_per_layer
from whalepod.spec.model import ModelSpec


class LatentCache:
    """Room for `max_length` tokens of each sequence; `attend` is the models' seam.

    Queries are the newest tokens. After a forward pass call `advance` with its number of tokens.
    """

    def __init__(
        self, spec: ModelSpec, batch: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (spec.num_hidden_layers, batch, max_length, kv_elements_per_layer(spec))
        self._rows = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def attend(self, attention: Attention, q: Tensor, kv: Tensor) -> Tensor:
        end = self.length + kv.shape[1]
        rows = self._rows[attention.layer]
        assert end <= rows.shape[1], "the cache is full"
        rows[:, self.length : end] = kv
        if attention.prefers_absorbed(q.shape[1]):
            return attention.absorbed(q, rows[:, :end], None)
        return attention.expanded(q, rows[:, :end], None)

    def advance(self, num_tokens: int) -> None:
        self.length += num_tokens

    @property
    def num_bytes(self) -> int:
        return self._rows.numel() * self._rows.element_size()
