"""Fill-in-the-middle: documents rearranged so that a model learns to write what stands between two texts."""

from __future__ import annotations

import numpy as np

from whalepod.text.tokenizer import Tokenizer

SEED = 2207


def rearranged(text: str, number: int, rate: float, tokenizer: Tokenizer) -> list[int] | None:
    """The ids of document `number` as begin, prefix, hole, suffix, end, middle (PSM: DeepSeek-V3, section
    4.1; arXiv 2207.14255), cut at two places; None for those, 1 - `rate` of all, that stay as they are.

    The number alone decides, so the same text becomes the same tokens everywhere. The tokenizer must have
    `fim_ids`.
    """
    if not rate:
        return None
    assert tokenizer.fim_ids is not None
    chance = np.random.default_rng((SEED, number))
    if chance.random() >= rate:
        return None
    begin, hole, end = tokenizer.fim_ids
    first, second = sorted(chance.integers(0, len(text) + 1, 2).tolist())
    prefix, middle, suffix = tokenizer.encode_many([text[:first], text[first:second], text[second:]])
    return [begin, *prefix, hole, *suffix, end, *middle]
