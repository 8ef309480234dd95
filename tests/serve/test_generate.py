"""Generation from runs and Hugging Face folders."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from whalepod.parallel.export import export
from whalepod.serve.generate import generate, generate_ids, load_model
from whalepod.serve.request import Sampling
from whalepod.serve.sampling import pick
from whalepod.spec.errors import UserError
from whalepod.spec.run import make_run
from whalepod.train.start import train


@pytest.fixture
def run(run_values) -> Path:
    run_values["train"] = {"steps": 30, "evaluate_every": 0, "checkpoint_every": 0}
    train(make_run(run_values), quiet=True)
    return Path(run_values["out"])


def greedy_without_cache(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cached_absorbed_decode_equals_the_full_forward(run) -> None:
    model, tokenizer = load_model(run, "fp32")
    prompt = tokenizer.encode("def function_3_7(value, other=7):\n    return")
    found = list(generate_ids(model, prompt, 24, Sampling()))
    assert found == greedy_without_cache(model, prompt, 24)


def test_text_streams_and_repeats_by_seed(run) -> None:
    model, tokenizer = load_model(run, "fp32")
    pieces: list[str] = []
    first = generate(model, tokenizer, "def ", 32, Sampling(1.0, seed=3), pieces.append)
    assert "".join(pieces) == first.text
    assert first.text == generate(model, tokenizer, "def ", 32, Sampling(1.0, seed=3)).text
    assert first.text != generate(model, tokenizer, "def ", 32, Sampling(1.0, seed=4)).text
    assert "value" in generate(model, tokenizer, "def function_1_1(", 24).text  # it learnt its corpus
    # 2 layers of 16 + 8 latent elements in FP32.
    assert first.cache_bytes_per_token == 2 * 24 * 4


def test_export_generates_the_same(run, tmp_path) -> None:
    export(run, tmp_path / "hf", "fp32")
    a, tokenizer = load_model(run, "fp32")
    b, other = load_model(tmp_path / "hf", "fp32")
    assert tokenizer.fingerprint == other.fingerprint
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name
    export(run, tmp_path / "fp8", "fp8")
    export(tmp_path / "fp8", tmp_path / "back", "bf16")
    eight, _ = load_model(tmp_path / "back", "fp32")
    ids = torch.tensor([tokenizer.encode("def function_1_1(value")])
    close = (a(ids) - eight(ids)).abs().max() / a(ids).abs().max()
    assert 0 < close < 0.2


def test_transformers_reads_an_export(run, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    export(run, tmp_path / "hf", "fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ours, tokenizer = load_model(run, "fp32")
    ids = torch.tensor([tokenizer.encode("def function_1_1(value, other=1):")])
    with torch.no_grad():
        a, b = ours(ids), theirs(ids).logits
    assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_bad_requests(run, tmp_path) -> None:
    model, _ = load_model(run)
    for prompt, new, message in (
        ([], 5, "empty"),
        ([600], 5, "vocabulary"),
        ([1], 0, "at least 1"),
        ([1] * 10, 4090, "exceed"),
    ):
        with pytest.raises(UserError, match=message):
            list(generate_ids(model, prompt, new, Sampling()))
    for bad in (
        lambda: Sampling(-1),
        lambda: Sampling(top_p=0),
        lambda: Sampling(top_k=-3),
        lambda: Sampling(seed=2**70),
        lambda: load_model(tmp_path / "nowhere"),
        lambda: load_model(run, "fp7"),
        lambda: export(run, run),
        lambda: export(run, tmp_path / "x", "fp7"),
    ):
        with pytest.raises(UserError):
            bad()


def test_sampling_keeps_to_its_limits() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(400, 4)
    u = [(i + 0.5) / 400 for i in range(400)]

    def drawn(**limits: float) -> dict[int, int]:
        return dict(Counter(pick(logits, [Sampling(1.0, **limits)] * 400, u)))  # type: ignore[arg-type]

    assert pick(logits, [Sampling()] * 400, u) == [3] * 400
    # softmax is .03 .09 .24 .64: .64 alone covers .6, two are needed for .7
    assert drawn(top_p=0.6) == drawn(top_k=1) == drawn(min_p=0.5) == {3: 400}
    assert drawn(top_p=0.7) == drawn(top_k=2) == drawn(min_p=0.3) == {2: 108, 3: 292}
    assert drawn() == {0: 13, 1: 35, 2: 94, 3: 258}  # 400 times the shares
    assert drawn(top_k=3, top_p=0.75) == {2: 108, 3: 292}  # of the three that are left .27 .09 .665 ...
