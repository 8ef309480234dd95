"""The whole model: blocks, head, multi-token prediction and their losses."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from whalepod.models.attention import Attend, GroupedQueryAttention, MLAttention, Tables, causal
from whalepod.models.loss import head_loss, seen
from whalepod.models.mlp import SwiGLU
from whalepod.models.moe import MoELayer
from whalepod.models.rope import tables
from whalepod.spec.errors import UserError
from whalepod.spec.model import MLA, ModelSpec


class Losses(NamedTuple):
    """Sums over tokens of the negative log-likelihood, float32: next token, and by MTP depth."""

    main: Tensor
    mtp: tuple[Tensor, ...]


def target_windows(following: Tensor, num_depths: int) -> Tensor:
    """[B, S, 1 + num_depths] windows of `following` [B, S + num_depths], the tokens after each of S."""
    return following.unfold(1, 1 + num_depths, 1)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        attention = MLAttention if isinstance(spec.attention, MLA) else GroupedQueryAttention
        self.input_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.self_attn = attention(spec, layer)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.mlp = (
            MoELayer(spec) if spec.is_moe_layer(layer) else SwiGLU(spec.hidden_size, spec.intermediate_size)
        )

    def forward(self, x_BSD: Tensor, tables: Tables, attend: Attend = causal) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), tables, attend)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class MTPBlock(nn.Module):
    """One depth of multi-token prediction (V3, section 2.2; equations 21 to 23).

    Joins the previous depth's normalised hidden state with the embedding of the token one further
    on. The embedding and the head are the main model's.
    """

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.enorm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.hnorm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * spec.hidden_size, spec.hidden_size, bias=False)
        self.block = Block(spec, layer)
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)

    def forward(
        self, h_BSD: Tensor, embedding_BSD: Tensor, tables: Tables, attend: Attend = causal
    ) -> Tensor:
        joined = torch.cat((self.enorm(embedding_BSD), self.hnorm(h_BSD)), dim=-1)
        return self.norm(self.block(self.eh_proj(joined), tables, attend))


class Transformer(nn.Module):
    """A DeepSeek-family model. Parameters are uninitialised until `init_weights` or loading."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        if spec.indexer is not None:
            raise UserError(f"{spec.name}: sparse attention (V3.2) is planned for but cannot be run yet")
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Block(spec, i) for i in range(spec.num_hidden_layers))
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        first = spec.num_hidden_layers
        self.mtp = nn.ModuleList(MTPBlock(spec, first + k) for k in range(spec.num_nextn_predict_layers))
        self.head_loss = head_loss

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BSK: Tensor | None = None,
        positions: Tensor | None = None,
        attend: Attend = causal,
    ) -> Tensor | Losses:
        """Logits [B, S, V], or with targets the Losses.

        targets_BSK: [B, S, 1 + MTP depths], for each position the next token and those after it
        (`target_windows`). Targets below 0 are not counted in any loss; MTP reads them as -1 - token, or
        as token 0 where that is none.
        positions: [S] or [B, S], default 0, 1, ...
        """
        cos_sin = self.tables(tokens_BS, positions)
        x = self._blocks(tokens_BS, cos_sin, attend)
        if targets_BSK is None:
            return self.lm_head(x)
        return self.losses(x, targets_BSK, cos_sin, attend)

    def losses(self, x_BSD: Tensor, targets_BSK: Tensor, cos_sin: Tables, attend: Attend) -> Losses:
        """From the last hidden states, normalised, through head and MTP blocks."""
        weight = self.lm_head.weight
        main = self.head_loss(x_BSD, weight, targets_BSK[..., 0])
        mtp = []
        for depth, block in enumerate(self.mtp, start=1):
            following = seen(targets_BSK[..., depth - 1])
            embedding = self.embed_tokens(following * (following < self.spec.vocab_size))
            x_BSD = block(x_BSD, embedding, cos_sin, attend)
            mtp.append(self.head_loss(x_BSD, weight, targets_BSK[..., depth]))
        return Losses(main, tuple(mtp))

    def hidden(self, tokens_BS: Tensor, positions: Tensor | None, attend: Attend) -> Tensor:
        """The last hidden states [B, S, D], normalised: what the head reads."""
        return self._blocks(tokens_BS, self.tables(tokens_BS, positions), attend)

    def tables(self, tokens_BS: Tensor, positions: Tensor | None) -> Tables:
        if positions is None:
            positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        a = self.spec.attention
        return tables(self.spec.rope, a.qk_rope_head_dim if isinstance(a, MLA) else a.head_dim, positions)

    def _blocks(self, tokens_BS: Tensor, cos_sin: Tables, attend: Attend) -> Tensor:
        x = self.embed_tokens(tokens_BS)
        for layer in self.layers:
            x = layer(x, cos_sin, attend)
        return self.norm(x)


INITIAL_CHUNK = 1 << 20
"""Elements that one random stream initialises, or one index of the first dimension if that is more."""


def initial_value(
    name: str, whole: Sequence[int], spec: ModelSpec, seed: int, part: Sequence[slice] | None = None
) -> Tensor:
    """The initial value of a parameter or buffer of shape `whole`, or of `part` of it; float32, on the CPU.

    Depends on (name, seed) and on nothing else, so every rank of every layout starts from the same model.
    Only what `part` needs along the first dimension is drawn, a chunk at a time.
    """
    part = [slice(0, n) for n in whole] if part is None else part
    out = torch.empty([p.stop - p.start for p in part])
    if name.endswith(("norm.weight", "layernorm.weight")):
        return out.fill_(1.0)
    if name.endswith(("bias", "load", ".lora.B")):
        return out.zero_()
    rows = max(1, INITIAL_CHUNK // math.prod(whole[1:]))
    # Of an adapter's A, that of PEFT's uniform numbers.
    deviation = (3 * whole[-1]) ** -0.5 if name.endswith(".lora.A") else spec.initializer_range
    start, stop = part[0].start, part[0].stop
    for first in range(start // rows * rows, stop, rows):
        digest = hashlib.sha256(f"{seed}/{name}/{first}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        chunk = torch.empty(min(rows, whole[0] - first), *whole[1:])
        chunk.normal_(0.0, deviation, generator=generator)
        a, b = max(start, first), min(stop, first + rows)
        out[a - start : b - start] = chunk[(slice(a - first, b - first), *part[1:])]
    return out


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fills an unsharded model in place."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.copy_(initial_value(name, tensor.shape, model.spec, seed))
