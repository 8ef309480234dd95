"""A spread model says the same tokens as the engine of one device, under every kind of layout."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import parity
from harness import run_ranks

from whalepod.models.transformer import Transformer, init_weights
from whalepod.parallel.mesh import Groups, make_mesh, open_world
from whalepod.parallel.parallelize import parallelize, seeded
from whalepod.parallel.predict import greedy
from whalepod.serve.generate import generate_ids
from whalepod.serve.request import Sampling
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec

PROMPT = [int(i) for i in torch.randint(0, 256, (11,), generator=torch.Generator().manual_seed(5))]
COUNT, SEED = 10, 3
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"dp_shard": 2},
        {"dp_replicate": 2},
        {"tp": 2},
        {"pp": 2},
        {"pp": 2, "schedule": "zbv"},
        {"dp_shard": 2, "ep": 2},
        {"tp": 2, "ep": 2},
    ],
    4: [
        {"pp": 2, "tp": 2, "schedule": "interleaved"},
        {"pp": 2, "dp_shard": 2, "schedule": "zbv"},
        {"dp_shard": 2, "tp": 2, "ep": 4},
    ],
}


def spec() -> ModelSpec:
    # A wide initial range: with the usual one, tied logits would decide.
    return replace(parity.models()["V3-like"], initializer_range=0.1)


def expected() -> list[int]:
    model = Transformer(spec())
    init_weights(model, SEED)
    return list(generate_ids(model.eval(), PROMPT, COUNT, Sampling()))


def say(axes: dict[str, Any], groups: Groups | None = None) -> list[int]:
    """This rank's ids; training goes on undisturbed before and after."""
    layout = Layout(**axes, micro_batch=1, global_batch=4, precision="fp32")
    mesh = make_mesh(layout, torch.device("cpu"), groups)
    with torch.device("meta"):
        model = Transformer(spec())
    parallel = parallelize(model, mesh, parity.LENGTH, seeded(model.spec, SEED))
    parallel.train()
    ids = greedy(parallel, PROMPT, COUNT)
    extra = 1 + parallel.spec.num_nextn_predict_layers
    rows = torch.ones(4 // mesh["dp"].size, parity.LENGTH + extra, dtype=torch.int64)
    parallel.backward(rows, rows.numel(), 0.3)
    assert all(part.training for part in parallel.parts)
    assert greedy(parallel, PROMPT, 2) == ids[:2]
    return ids


def run_rank() -> list[list[int]]:
    groups: Groups = {}
    with open_world(torch.device("cpu")):
        return [say(axes, groups) for axes in LAYOUTS[int(os.environ["WORLD_SIZE"])]]


def test_one_device_says_what_the_engine_says() -> None:
    ids = expected()
    assert len(set(ids)) > COUNT // 2  # not a model that repeats itself
    assert say({}) == ids


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_every_layout_says_what_one_device_says(num_ranks: int) -> None:
    ids = expected()
    for found in run_ranks(run_rank, num_ranks):
        for axes, said in zip(LAYOUTS[num_ranks], found, strict=True):
            assert said == ids, axes


def test_says_what_is_wrong_with_a_prompt() -> None:
    mesh = make_mesh(Layout(), torch.device("cpu"))
    parallel = parallelize(Transformer(spec()), mesh, parity.LENGTH)
    for prompt, count, message in [
        ([], 1, "empty"),
        ([256], 1, "token id 256 is beyond the model's vocabulary of 256"),
        ([-1], 1, "token id -1 is beyond the model's vocabulary of 256"),
        ([1], 0, "at least 1, not 0"),
        ([1], 4096, "prompt of 1 and 4096 new tokens exceed the model's 4096 positions"),
    ]:
        with pytest.raises(UserError, match=message):
            greedy(parallel, prompt, count)
    parallel.mesh = replace(mesh, layout=Layout(cp=2))
    with pytest.raises(UserError, match=r"layout\.cp 2"):
        greedy(parallel, [1], 1)
