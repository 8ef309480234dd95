"""The engine below text: under mixed load everyone gets the tokens of a model that runs for them alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from whalepod.models.transformer import Transformer, init_weights
from whalepod.parallel.inference import whole
from whalepod.parallel.mesh import make_mesh
from whalepod.parallel.weights import build_model
from whalepod.serve.core import CoreConfig, Job
from whalepod.serve.fleet import Fleet
from whalepod.serve.request import Request, Sampling
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.model import ModelSpec
from whalepod.spec.presets import load_model_spec

SMALL: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 16,  # few, so that a guess of an untrained block is right now and then
    "initializer_range": 0.15,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


def spec_of(kind: str) -> ModelSpec:
    if kind == "dense":
        small = load_model_spec("deepseek-r1-distill-qwen-1.5b").with_(num_key_value_heads=2, head_dim=16)
        return replace(small.with_(**SMALL), tie_word_embeddings=True)
    return load_model_spec("v3-mini").with_(**SMALL, **EXPERTS, q_lora_rank=32)


def model_of(kind: str) -> Transformer:
    model = Transformer(spec_of(kind))
    init_weights(model, 1)
    return model.eval().requires_grad_(False)


def fleet(model: Transformer, config: CoreConfig, *more: Any) -> Fleet:
    return Fleet(whole(model, make_mesh(Layout(), torch.device("cpu"))), config, *more)


def alone(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy, without cache, batch or page."""
    ids = [*prompt]
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def load(seed: int) -> list[tuple[int, list[int], int]]:
    """When requests come, their prompts (some share a beginning) and how much they ask for."""
    draw = random.Random(seed)
    common = [draw.randrange(16) for _ in range(40)]
    out = []
    for _ in range(12):
        own = [draw.randrange(16) for _ in range(draw.randint(1, 30))]
        prompt = common[: draw.choice([0, 16, 33, 40])] + own
        out.append((draw.randint(0, 12), prompt, draw.randint(1, 24)))
    return sorted(out, key=lambda each: each[0])


def serve(core: Fleet, arrivals: list[tuple[int, list[int], int]], **wishes: Any) -> list[Job]:
    arrivals, jobs, step = [*arrivals], [], 0
    while arrivals or not core.is_idle:
        while arrivals and arrivals[0][0] <= step:
            _, prompt, count = arrivals.pop(0)
            jobs.append(core.add(Request(tuple(prompt), count, **wishes)))
        core.step()
        core.check_integrity()
        step += 1
    return jobs


def written(job: Job) -> list[int]:
    return job.sequence.tokens[job.sequence.num_prompt :]


CONFIGS = {
    "roomy": CoreConfig(num_pages=200, page_size=8, max_running=16, max_step_tokens=256),
    "small steps": CoreConfig(num_pages=200, page_size=8, max_running=16, max_step_tokens=7),
    "few pages": CoreConfig(num_pages=24, page_size=4, max_running=16, max_step_tokens=48),
    "drafts": CoreConfig(num_pages=200, page_size=8, max_running=16, max_step_tokens=64, speculate=True),
    "all of it": CoreConfig(num_pages=24, page_size=4, max_running=5, max_step_tokens=19, speculate=True),
}


@pytest.mark.parametrize("kind", ["V3-like", "dense"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_the_model_alone(kind: str, name: str) -> None:
    model, config = model_of(kind), CONFIGS[name]
    core, arrivals = fleet(model, config), load(seed=3)
    jobs = serve(core, arrivals)
    for (_, prompt, count), job in zip(arrivals, jobs, strict=True):
        assert written(job) == alone(model, prompt, count), (kind, name)
        assert job.reason == "length"
    stats = core.stats()
    assert stats.pages_in_use == 0
    assert stats.new_tokens == sum(count for _, _, count in arrivals)
    assert stats.prompt_tokens == sum(len(prompt) for _, prompt, _ in arrivals)
    assert stats.cached_tokens > 0
    assert (stats.preemptions > 0) == (config.num_pages == 24)


@pytest.mark.parametrize("kind", ["v3", "qwen2"])
def test_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "eos_token_id": None,
    }  # fmt: skip
    experts: dict[str, Any] = {
        "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 24,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    theirs = (
        transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**(sizes | experts)))
        if kind == "v3"
        else transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    ).eval()
    theirs.save_pretrained(tmp_path)
    core = fleet(build_model(tmp_path, torch.float32), CoreConfig(40, page_size=4, max_step_tokens=9))
    arrivals = [(2 * i, [(7 * i + j) % 64 for j in range(5 + 3 * i)], 30) for i in range(5)]
    for (_, prompt, count), job in zip(arrivals, serve(core, arrivals), strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert job.sequence.tokens == expected[0].tolist()


def test_drafts_save_steps() -> None:
    model = model_of("V3-like")
    steps = {}
    for speculate in (False, True):
        core = fleet(model, CoreConfig(num_pages=50, speculate=speculate))
        (job,) = serve(core, [(0, [1, 2, 3], 200)])
        steps[speculate] = core.stats().steps
        assert written(job) == alone(model, [1, 2, 3], 200)
    assert steps[False] == 200
    assert steps[True] < 195


@pytest.mark.parametrize("speculate", [False, True])
def test_draws_depend_on_the_request_alone(speculate: bool) -> None:
    model, arrivals = model_of("V3-like"), load(seed=4)
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=12, seed=7)
    together = serve(
        fleet(model, CoreConfig(24, page_size=4, max_step_tokens=19, speculate=speculate)),
        arrivals,
        sampling=sampling,
    )
    for (_, prompt, count), job in zip(arrivals, together, strict=True):
        (single,) = serve(fleet(model, CoreConfig(50)), [(0, prompt, count)], sampling=sampling)
        assert written(single) == written(job)
    assert any(written(job) != alone(model, p, n) for (_, p, n), job in zip(arrivals, together, strict=True))


def test_ends_at_the_tokens_that_end_it() -> None:
    model, prompt = model_of("V3-like"), [5, 6, 7]
    whole = alone(model, prompt, 30)
    end = whole[11]
    expected = whole[: whole.index(end) + 1]
    for speculate in (False, True):
        core = fleet(model, CoreConfig(20, speculate=speculate))
        job = core.add(Request(tuple(prompt), 30), frozenset({end}))
        while not core.is_idle:
            core.step()
        assert (written(job), job.reason) == (expected, "stop")
        core.check_integrity()
    core = fleet(model, CoreConfig(20))
    job = core.add(Request(tuple(prompt), 30))
    core.step()
    core.end(job, "abort")
    assert core.step() == []
    assert core.is_idle
    assert core.stats().pages_in_use == 0


def test_logprobs_are_the_models_own() -> None:
    model, prompt = model_of("V3-like"), [5, 6, 7]
    core = fleet(model, CoreConfig(20))
    job = core.add(Request(tuple(prompt), 4, Sampling(1.5, seed=1, presence_penalty=1.0), logprobs=3))
    picked = []
    while not core.is_idle:
        core.step()
        picked += job.picked
    logprobs = model(torch.tensor([job.sequence.tokens]))[0].log_softmax(-1)[len(prompt) - 1 :]
    for each, row in zip(picked, logprobs[:-1], strict=True):
        assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-5)
        best = row.topk(3)
        assert [token for token, _ in each.top] == best.indices.tolist()
        assert [value for _, value in each.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_penalties_change_what_is_written() -> None:
    model, prompt = model_of("dense"), [1, 2, 1, 2, 1, 2]
    (plain,) = serve(fleet(model, CoreConfig(20)), [(0, prompt, 40)])
    (job,) = serve(fleet(model, CoreConfig(20)), [(0, prompt, 40)], sampling=Sampling(frequency_penalty=2.0))
    assert max(written(job).count(t) for t in range(16)) < max(written(plain).count(t) for t in range(16))
    (first,) = serve(
        fleet(model, CoreConfig(20)), [(0, [3, 3], 1)], sampling=Sampling(repetition_penalty=100.0)
    )
    logits = model(torch.tensor([[3, 3]]))[0, -1]
    logits[3] = logits[3] / 100 if logits[3] > 0 else logits[3] * 100
    assert written(first) == [int(logits.argmax())]


def test_what_cannot_be_done_is_said() -> None:
    core = fleet(model_of("dense"), CoreConfig(num_pages=2, page_size=8))
    for request, message in [
        (Request((), 1), "empty"),
        (Request((16,), 1), "vocabulary"),
        (Request((1,), 0), "at least 1"),
        (Request((1,) * 10, 7), "do not fit the cache of 16"),
    ]:
        with pytest.raises(UserError, match=message):
            core.add(request)
    assert core.is_idle
