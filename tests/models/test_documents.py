"""Packed documents that do not see each other: each as if it were alone."""

from __future__ import annotations

import torch

from whalepod.models.attention import document_mask, masked
from whalepod.models.transformer import Transformer, init_weights
from whalepod.parallel.context import document_positions
from whalepod.spec.presets import load_model_spec

EOS = 1


def test_positions_begin_again_behind_a_separator() -> None:
    tokens = torch.tensor([[5, 6, EOS, 7, EOS, EOS, 8, 9], [EOS, 3, 3, 3, 3, 3, 3, EOS]])
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert document_positions(tokens, EOS).tolist() == expected


def test_packed_documents_give_the_logits_of_each_alone() -> None:
    spec = load_model_spec("v3-mini").with_(num_hidden_layers=2, vocab_size=64, num_nextn_predict_layers=0)
    model = Transformer(spec).eval()
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(2, 64, (n,), generator=generator) for n in (7, 1, 12, 4)]
    ended = [torch.cat((d, torch.tensor([EOS]))) for d in documents]
    packed = torch.cat(ended).unsqueeze(0)
    positions = document_positions(packed, EOS)
    with torch.no_grad():
        together = model(packed, positions=positions, attend=masked(document_mask(positions)))
        seen = model(packed)
        start = 0
        for document in ended:
            alone = model(document.unsqueeze(0))
            part = together[:, start : start + len(document)]
            assert torch.allclose(part, alone, atol=1e-5, rtol=1e-4)
            if start:
                assert not torch.allclose(seen[:, start : start + len(document)], alone, atol=1e-3)
            start += len(document)
