"""Every form of the family against `transformers`: logits, gradients, cached decode, generation.

The spec is read from transformers' own config, so reading configs is under test as well.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    CONFIGS,
    LENGTH,
    MLA_CONFIGS,
    VOCAB,
    GrowingCache,
    gradients,
    logit_error,
    oracle_model,
    our_model,
    pair,
    random_tokens,
    relative,
)
from torch import Tensor

from whalepod.models.attention import Attention, MLAttention
from whalepod.models.transformer import Transformer, target_windows

# The worst seen over four seeds of every config was 6e-6 of the logits' scale and 9e-6 of a
# gradient's norm. (Promised are 1e-4 and 1e-3.)
LOGITS = 2e-5
GRADIENTS = 5e-5


def logits_of(model: Transformer, tokens: Tensor, **kwargs: object) -> Tensor:
    out = model(tokens, **kwargs)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name: str) -> None:
    reference, model = pair(CONFIGS[name])
    tokens = random_tokens(2, LENGTH)
    with torch.no_grad():
        expected, ours = reference(tokens).logits, logits_of(model, tokens)
    assert expected.abs().max() > 1  # the error is relative to a scale worth the name
    assert logit_error(ours, expected) < LOGITS


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_every_parameter(name: str) -> None:
    reference, model = pair(CONFIGS[name])
    model.train()  # as training runs it; the family has no dropout
    sequence = random_tokens(2, LENGTH + 1)
    tokens, targets = sequence[:, :-1], sequence[:, 1:]
    expected = F.cross_entropy(reference(tokens).logits.view(-1, VOCAB), targets.flatten())
    expected.backward()
    loss = model(tokens, target_windows(targets, len(model.mtp))).main / targets.numel()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for parameter, ours, wanted in gradients(reference, model):
        assert wanted.norm() > 0, parameter
        assert relative(ours, wanted) < GRADIENTS, parameter


@pytest.mark.parametrize("name", MLA_CONFIGS)
def test_absorbed_equals_expanded(name: str) -> None:
    model = our_model(oracle_model(MLA_CONFIGS[name]), MLA_CONFIGS[name])
    tokens = random_tokens(2, LENGTH)

    def run(form: str) -> tuple[Tensor, dict[str, Tensor]]:
        def attend(attention: Attention, q: Tensor, kv: Tensor) -> Tensor:
            assert isinstance(attention, MLAttention)
            return getattr(attention, form)(q, kv, None)

        model.zero_grad()
        logits = logits_of(model, tokens, attend=attend)
        logits.logsumexp(-1).sum().backward()
        return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expanded, expected_grads = run("expanded")
    absorbed, grads = run("absorbed")
    assert logit_error(absorbed, expanded) < LOGITS
    assert grads.keys() == expected_grads.keys()
    for parameter, grad in grads.items():
        assert relative(grad, expected_grads[parameter]) < GRADIENTS, parameter


def mask_for(start: int, end: int) -> Tensor:
    return torch.arange(end) <= torch.arange(start, end).unsqueeze(1)


@pytest.mark.parametrize("masked", [False, True], ids=["implicit", "mask"])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("name", ["v3", "v3-no-q-lora", "v3-wide-values", "v2-groups", "llama-gqa", "qwen3"])
def test_cached_decode_equals_full_forward(name: str, form: str, masked: bool) -> None:
    """A prefill in two chunks, then single tokens, against one pass of transformers."""
    reference, model = pair(CONFIGS[name])
    tokens = random_tokens(2, LENGTH)
    cache = GrowingCache(form)
    pieces = []
    with torch.no_grad():
        expected = reference(tokens).logits
        for start, end in [(0, 7), (7, 12), *((i, i + 1) for i in range(12, LENGTH))]:
            cache.mask = mask_for(start, end) if masked else None
            positions = torch.arange(start, end)
            pieces.append(logits_of(model, tokens[:, start:end], positions=positions, attend=cache.attend))
    assert logit_error(torch.cat(pieces, dim=1), expected) < LOGITS


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("name", ["v3", "llama-gqa"])
def test_left_padded_batch_equals_each_sequence_alone(name: str, form: str) -> None:
    """Positions and masks of their own for every sequence of a batch."""
    _, model = pair(CONFIGS[name])
    short, long = random_tokens(1, 9), random_tokens(1, 14, seed=2)
    padding = long.shape[1] - short.shape[1]
    tokens = torch.cat((F.pad(short, (padding, 0)), long))
    positions = torch.stack((torch.arange(14) - padding, torch.arange(14)))
    visible = torch.stack((torch.arange(14) >= padding, torch.ones(14, dtype=torch.bool)))
    # A padding position may look at itself: softmax over nothing is not a number.
    mask = mask_for(0, 14) & visible[:, None, None, :] | torch.eye(14, dtype=torch.bool)
    with torch.no_grad():
        batch = logits_of(
            model, tokens, positions=positions.clamp_min(0), attend=GrowingCache(form, mask).attend
        )
        alone_short, alone_long = logits_of(model, short), logits_of(model, long)
    assert logit_error(batch[:1, padding:], alone_short) < LOGITS
    assert logit_error(batch[1:], alone_long) < LOGITS


@pytest.mark.parametrize("name", ["v3", "v2-lite", "llama-gqa", "qwen2"])
def test_greedy_generation_token_for_token(name: str) -> None:
    reference, model = pair(CONFIGS[name])
    prompt = random_tokens(1, 8)
    new = 32
    expected = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    cache = GrowingCache("absorbed")
    tokens, step = prompt, prompt
    with torch.no_grad():
        for _ in range(new):
            positions = torch.arange(tokens.shape[1] - step.shape[1], tokens.shape[1])
            logits = logits_of(model, step, positions=positions, attend=cache.attend)
            step = logits[:, -1:].argmax(-1)
            tokens = torch.cat((tokens, step), dim=1)
    assert len(set(tokens[0, 8:].tolist())) > 4  # not one token repeated
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_stays_near_fp32(name: str) -> None:
    """The same code in BF16: no layer silently needs float32, and selection bias stays exact."""
    _, model = pair(CONFIGS[name])
    tokens = random_tokens(16, LENGTH)  # of two rows the median is mostly the draw's
    with torch.no_grad():
        expected = logits_of(model, tokens)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        ours = logits_of(model, tokens)
    assert ours.dtype == torch.bfloat16
    # Near ties may route a few tokens elsewhere: the median token is compared, not the worst.
    error = (ours.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.05
