"""From a folder to an engine: what fits, what does not, and local workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learnt import PROMPTS

from whalepod.serve.generate import generate, load_model
from whalepod.serve.request import Request, Sampling
from whalepod.serve.start import EngineConfig, open_engine, plan_memory
from whalepod.spec.counts import params
from whalepod.spec.errors import UserError
from whalepod.spec.layout import Layout
from whalepod.spec.model import read_config
from whalepod.spec.presets import load_model_spec


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "layout"),
    [
        ("hf", Layout()),
        ("run", Layout(tp=2)),
        ("hf", Layout(dp_shard=2, ep=2, global_batch=2)),
        ("hf", Layout(pp=2)),
    ],
    ids=["one device", "tp", "ep", "pp"],
)
def test_local_workers_write_what_one_device_writes(learnt: Path, folder: str, layout: Layout) -> None:
    model, tokenizer = load_model(learnt / "hf", "fp32")
    expected = [generate(model, tokenizer, text, 12).text for text in PROMPTS]
    said: list[str] = []
    config = EngineConfig(str(learnt / folder), layout, "fp32", "cpu", cache_gib=0.01, speculate=True)
    with open_engine(config, said.append) as engine:
        assert engine is not None
        requests = [Request(tuple(tokenizer.encode(text)), 12) for text in PROMPTS]
        assert [text for text, _ in engine.complete(requests)] == expected
        drawn = Request(requests[0].prompt, 12, Sampling(1.0, seed=1))
        assert engine.complete([drawn, drawn])[0] == engine.complete([drawn])[0]
    assert "GiB of weights" in said[0]


def test_says_what_fits() -> None:
    spec = load_model_spec("v3-mini")
    one = plan_memory(EngineConfig("", dtype="bf16", device="cpu"), spec)
    assert one.weights_gib == pytest.approx(params(spec, mtp=True).total * 2 / 2**30)
    assert one.tokens % 64 == 0
    few = plan_memory(EngineConfig("", dtype="bf16", device="cpu", cache_gib=1.0), spec)
    width = spec.num_hidden_layers * spec.attention.latent_dim  # type: ignore[union-attr]
    assert few.tokens == 2**30 // (2 * width) // 64 * 64
    assert f"{few.tokens:,} tokens" in str(few)
    spread = plan_memory(
        EngineConfig("", Layout(dp_shard=2, ep=2, global_batch=2), "bf16", "cpu", cache_gib=1.0), spec
    )
    assert (spread.tokens, spread.replicas) == (few.tokens, 2)
    assert "in each of 2 replicas" in str(spread)
    assert spread.weights_gib < few.weights_gib


def test_says_what_does_not_fit(tmp_path: Path) -> None:
    v3 = load_model_spec("deepseek-v3")
    with pytest.raises(UserError, match=r"12\d\d\.\d GiB of weights in bfloat16 on each of 1 devices.*tp 2"):
        plan_memory(EngineConfig("", dtype="bf16", device="cpu"), v3)
    mini = load_model_spec("v3-mini")
    with pytest.raises(UserError, match="does not fit beside"):
        plan_memory(EngineConfig("", device="cpu", cache_gib=1e6), mini)
    with pytest.raises(UserError, match="holds no page"):
        plan_memory(EngineConfig("", device="cpu", cache_gib=1e-9), mini)
    for config, message in [
        (EngineConfig(str(tmp_path / "nowhere")), "no folder"),
        (EngineConfig(str(tmp_path), dtype="int3"), "dtype must be"),
    ]:
        with pytest.raises(UserError, match=message), open_engine(config):
            pass


def test_speculation_needs_a_block_for_it(learnt: Path, tmp_path: Path) -> None:
    spec = read_config(learnt / "hf")
    assert spec.num_nextn_predict_layers == 1
    config = (learnt / "hf" / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"num_nextn_predict_layers": 1', '"num_nextn_predict_layers": 0')
    )
    with (
        pytest.raises(UserError, match="no multi-token prediction"),
        open_engine(EngineConfig(str(tmp_path), speculate=True)),
    ):
        pass
    assert torch.get_num_threads() >= 1
